"""The training step: four iterations of the reference on its own random noise, and what makes it reproducible."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Golden, close_to_largest
from test_discriminator import to_neighbours

from ddgan_jax.method import state as state_lib
from ddgan_jax.method import train_step as ts
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.losses import Losses, Phase, PhaseNoise
from ddgan_jax.method.sampling import Denoiser
from ddgan_jax.networks.generator import Generator
from ddgan_jax.networks.mlp import PointDiscriminator, PointGenerator
from ddgan_jax.storage.torch import convert


def method_of(generator, discriminator, image_shape=(2,), **options):
    gen = lambda params, *args: generator.apply({"params": params}, *args)  # noqa: E731
    losses = options.get("losses", Losses(Schedule.create(4), r1_gamma=0.02))
    defaults = dict(
        denoiser=Denoiser(gen, generator.init, losses.schedule, image_shape, generator.nz),
        init_disc=discriminator.init,
        losses=losses,
        disc=lambda params, *args, **names: discriminator.apply({"params": params}, *args, **names),
        optimizer=optax.scale_by_adam(0.5, 0.9),
        lr_g=state_lib.constant_schedule(1.6e-4),
        lr_d=state_lib.constant_schedule(1.25e-4),
        ema_decay=0.9,
        batch_size=8,
    )
    return ts.Method(**(defaults | options))


def pairs_of(method, state, x0, noise):
    """The discriminator's inputs for real x_0, and x0_hat."""
    return method.losses.make_pairs(ts.bind(method.denoiser.gen, state.gen_params), Phase(x0, noise))


def phase_noise(golden, prefix, order):
    images = {key: golden.nhwc(f"{prefix}{key}")[order] for key in ("noise_t", "noise_tp1", "noise_posterior")}
    return PhaseNoise(t=golden.ints(prefix + "t")[order], z=golden[prefix + "z"][order], **images)


@pytest.mark.golden
def test_learning_rates_equal_reference():
    golden = Golden("lr_schedule")
    epochs, per_epoch = int(golden["num_epoch"]), 7
    for name in ("g", "d"):
        rate = state_lib.cosine_schedule(float(golden[f"base_lr_{name}"]), per_epoch, epochs, float(golden["eta_min"]))
        # In force from the first to the last step of each epoch; the reference's last one is number num_epoch.
        for step in (np.arange(epochs + 1) * per_epoch, np.arange(epochs + 1) * per_epoch + per_epoch - 1):
            np.testing.assert_allclose(jax.vmap(rate)(step), golden[f"lr_{name}"], rtol=2e-6)
            np.testing.assert_allclose(jax.vmap(rate)(step), golden[f"closed_form_{name}"], rtol=2e-6)
        assert rate(jnp.int32(10**6)) == golden["eta_min"]


@pytest.mark.golden
def test_four_steps_equal_reference():
    golden = Golden("train_step")
    flags = golden.config
    (generator, gen_params), (disc, disc_params) = golden.generator("init/G/"), golden.discriminator("init/D/")
    method = method_of(
        generator,
        disc,
        losses=Losses(
            Schedule.create(flags["num_timesteps"], "vp", flags["beta_min"], flags["beta_max"]), flags["r1_gamma"]
        ),
        lr_g=state_lib.cosine_schedule(flags["lr_g"], 3, flags["num_epoch"]),
        lr_d=state_lib.cosine_schedule(flags["lr_d"], 3, flags["num_epoch"]),
        ema_decay=flags["ema_decay"],
    )
    order = to_neighbours(flags["batch_size"])
    back = np.argsort(order)
    state = state_lib.create(gen_params, disc_params, method.optimizer)
    names = {"G": json.loads(str(golden["param_names/G"])), "D": json.loads(str(golden["param_names/D"]))}
    d_gradients = jax.jit(lambda s, x, d, r1: ts.d_gradients(method, s, Phase(x, d), r1), static_argnums=3)
    g_gradients = jax.jit(lambda s, x, d: ts.g_gradients(method, s, Phase(x, d)))
    pairs = jax.jit(lambda s, x, d: pairs_of(method, s, x, d))
    update = jax.jit(partial(ts.update, method), static_argnums=3)

    # Adam moves by lr g / |g|, whatever |g| is: where a gradient is as small as the rounding of the largest one in its
    # array (6.4e-6 of it, see docs/parity.md), a step may go anywhere in between, and only there.
    slack = {"G": {}, "D": {}}

    def compare_gradients(network, step, grads):
        grads = convert.to_state_dict(grads)
        for name, value in grads.items():
            uncertain = np.minimum(1, 6.4e-6 * np.abs(value).max() / np.maximum(np.abs(value), 1e-30))
            slack[network][name] = slack[network].get(name, 0) + flags[f"lr_{network.lower()}"] * uncertain
        for name, value in golden.below(f"step{step}/{network}/grad/").items():
            close_to_largest(grads[name], value, 1e-4, f"step {step} {name}")
        for name, norm in zip(names[network], golden[f"step{step}/{network}/grad_norms"], strict=True):
            if not name.endswith("NIN_1.b"):
                np.testing.assert_allclose(np.linalg.norm(grads[name]), norm, rtol=1e-4, err_msg=name)

    def compare_params(network, prefix, tree):
        ours = convert.to_state_dict(tree)
        expected = golden.below(f"{prefix}/{network}/")
        assert expected
        for name, value in expected.items():
            if not name.endswith("NIN_1.b"):  # its true gradient is zero; the reference steps along rounding noise
                off = np.abs(ours[name] - value) - slack["D" if network == "D" else "G"][name]
                assert off.max() <= 5e-6, f"{prefix} {network} {name}: {off.max():.2g} too far"

    for step in range(4):
        x0 = golden.nhwc(f"step{step}/real")[order]
        d_noise, g_noise = (phase_noise(golden, f"rand/step{step}/{network}/", order) for network in "DG")
        with_r1 = step % flags["lazy_reg"] == 0
        assert with_r1 == golden[f"step{step}/has_r1"]

        grads, parts = d_gradients(state, x0, d_noise, with_r1)
        compare_gradients("D", step, grads)
        np.testing.assert_allclose(parts["d_real"][back], golden[f"step{step}/D_real"], atol=2e-5)
        np.testing.assert_allclose(parts["d_fake"][back], golden[f"step{step}/D_fake"], atol=2e-5)
        if step == 0:
            x_t, fake, x_tp1 = (x[back] for x in pairs(state, x0, d_noise)[0])
            np.testing.assert_allclose(x_t, golden.nhwc("step0/D/x_t"), atol=1e-5)
            np.testing.assert_allclose(x_tp1, golden.nhwc("step0/D/x_tp1"), atol=1e-5)
            np.testing.assert_allclose(fake, golden.nhwc("step0/D/x_pos_sample"), atol=2e-5)
            keys = () if d_noise.dropout_keys is None else (d_noise.dropout_keys,)
            x0_hat = jax.jit(method.denoiser.gen)(state.gen_params, x_tp1[order], d_noise.t, d_noise.z, *keys)
            np.testing.assert_allclose(x0_hat[back], golden.nhwc("step0/D/x_0_predict"), atol=2e-5)

        new_state, metrics = update(state, Phase(x0, d_noise), Phase(x0, g_noise), with_r1)
        np.testing.assert_allclose(
            metrics["d_loss"], golden[f"step{step}/errD_real"] + golden[f"step{step}/errD_fake"], rtol=1e-5
        )
        real_loss, fake_loss = jax.nn.softplus(-parts["d_real"]), jax.nn.softplus(parts["d_fake"])
        np.testing.assert_allclose(jnp.mean(real_loss), golden[f"step{step}/errD_real"], rtol=1e-5)
        np.testing.assert_allclose(jnp.mean(fake_loss), golden[f"step{step}/errD_fake"], rtol=1e-5)
        if with_r1:
            np.testing.assert_allclose(metrics["r1"], golden[f"step{step}/grad_penalty"], rtol=1e-5)
        np.testing.assert_allclose(metrics["g_loss"], golden[f"step{step}/errG"], rtol=1e-5)
        np.testing.assert_allclose(
            [metrics["lr_d"], metrics["lr_g"]], [golden[f"step{step}/lr_{n}"] for n in "dg"], rtol=2e-6
        )

        stepped_d = state.replace(disc_params=new_state.disc_params)  # G is trained against the new D
        grads, parts = g_gradients(stepped_d, x0, g_noise)
        compare_gradients("G", step, grads)
        np.testing.assert_allclose(parts["g_fake"][back], golden[f"step{step}/G/output"], atol=2e-5)
        fake = pairs(state, x0, g_noise)[0].fake
        np.testing.assert_allclose(fake[back], golden.nhwc(f"step{step}/G/x_pos_sample"), atol=2e-5)

        state = new_state
        if step < 3:
            compare_params("G", f"step{step}/after", state.gen_params)
            compare_params("D", f"step{step}/after", state.disc_params)
        if step == 0:
            jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.gen_params)
        if step >= 2:
            compare_params("G", f"after{step + 1}", state.gen_params)
            compare_params("D", f"after{step + 1}", state.disc_params)
            compare_params("ema", f"after{step + 1}", state.ema_params)
        if step == 2:  # the reference samples at the end of an epoch, with the raw weights
            from test_sampling import golden_noise

            from ddgan_jax.method.sampling import denoise

            noise = golden_noise(golden, "rand/epoch0_end/", "z_t{}", "noise_t{}")
            gen = partial(method.denoiser.gen, state.gen_params)
            sample = jax.jit(lambda gen, n: denoise(gen, method.losses.schedule, n).x_t[0], static_argnums=0)(
                gen, noise
            )
            np.testing.assert_allclose(sample, golden.nhwc("epoch0_end/fake_sample"), atol=5e-5)
    assert state.step == 4


POINTS = PointGenerator(width=16, depth=2), PointDiscriminator(width=16, depth=2)


@pytest.fixture(scope="module")
def points():
    """(method, a fresh state, 2-D data): the whole method on points, in milliseconds."""
    generator, disc = POINTS
    x, t, z = jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32), jnp.zeros((1, generator.nz))
    method = method_of(generator, disc)

    @jax.jit
    def fresh(key):
        g_key, d_key = jax.random.split(key)
        params = generator.init(g_key, x, t, z)["params"], disc.init(d_key, x, t, x)["params"]
        return state_lib.create(*params, method.optimizer)

    return method, fresh(jax.random.key(0)), jax.random.normal(jax.random.key(1), (16, 2))


def test_the_method_runs_on_points(points):
    """The same step, unchanged, trains MLPs on 2-D data: D learns to tell, G moves, everything stays finite."""
    method, state, data = points
    method = dataclasses.replace(method, lr_g=state_lib.constant_schedule(1e-3), lr_d=state_lib.constant_schedule(1e-3))
    steps = [jax.jit(ts.make_train_step(method, 0, with_r1)) for with_r1 in (True, False)]
    first = None
    for i in range(200):
        state, metrics = steps[i % 10 != 0](state, data * 0.1 + 1.0)
        assert all(bool(jnp.isfinite(value).all()) for value in metrics.values()), f"step {i}: {metrics}"
        first = first or metrics
    assert ("r1" in first) and ("r1" not in metrics) and int(state.step) == 200
    from ddgan_jax.method.sampling import sample

    samples = sample(method.denoiser, state.ema_params, jax.random.key(5), jnp.arange(256))
    before = 1.4  # the distance of the data's mean from the origin, where an untrained network samples
    assert float(jnp.linalg.norm(jnp.mean(samples, axis=0) - 1.0)) < before / 2


def test_a_step_is_a_function_of_state_and_seed(points):
    method, state, data = points
    step = jax.jit(ts.make_train_step(method, 7, True))
    one, metrics = step(state, data)
    two, _ = step(state, data)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    other, _ = jax.jit(ts.make_train_step(method, 8, True))(state, data)
    assert not np.array_equal(jax.tree.leaves(one.gen_params)[0], jax.tree.leaves(other.gen_params)[0])
    later, _ = step(state.replace(step=state.step + 1), data)  # other noise, though nothing else changed
    assert not np.array_equal(jax.tree.leaves(one.disc_params)[0], jax.tree.leaves(later.disc_params)[0])
    for name in ("d_count_by_t", "g_count_by_t"):
        np.testing.assert_allclose(jnp.sum(metrics[name]), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(metrics["d_loss_by_t"]), metrics["d_loss"], rtol=1e-5)


def test_noise_belongs_to_examples():
    """The noise of example i is the same in any batch, and independent between examples, phases and steps."""
    generator, disc = POINTS
    method = method_of(generator, disc, image_shape=(3, 3, 1), dropout=True)
    raw = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
    )
    whole, part = (
        [raw(ts.draw(method, keys)) for keys in ts.step_keys(0, 3, indices)[1:]]
        for indices in (jnp.arange(16), jnp.arange(8, 16))
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[8:], b), whole, part)
    flip_keys, *phase_keys = ts.step_keys(1, 0, jnp.arange(4000))
    phases = [ts.draw(method, keys) for keys in phase_keys]
    noises = [
        getattr(phase, name)[:, 0, 0, 0] for phase in phases for name in ("noise_t", "noise_tp1", "noise_posterior")
    ]
    correlations = np.corrcoef([*noises, *(phase.z[:, 0] for phase in phases)])
    np.testing.assert_allclose(correlations, np.eye(8), atol=0.07)
    for phase in phases:
        np.testing.assert_allclose(np.bincount(phase.t, minlength=4) / 4000, 0.25, atol=0.03)
    np.testing.assert_allclose(jnp.mean(jax.vmap(jax.random.bernoulli)(flip_keys)), 0.5, atol=0.03)


def linear(shape=(2,), gen=lambda params, x, t, z: params * x, scale=1.0, **options):
    """(method, a fresh state): G(x) = w x and D(x_t) = v . x_t from w = v = 0, T = 1, so that the last x_t is x_0."""
    losses = options.pop("losses", Losses(Schedule.create(1), r1_gamma=0.0))
    defaults = dict(
        denoiser=Denoiser(gen, None, losses.schedule, shape, nz=1, scale=scale),
        init_disc=None,
        disc=lambda params, x_t, t, x_tp1: jnp.sum(params * x_t, axis=tuple(range(1, x_t.ndim))),
        losses=losses,
        optimizer=optax.identity(),
        lr_g=state_lib.constant_schedule(0.1),
        lr_d=state_lib.constant_schedule(1.0),
        ema_decay=0.0,
        batch_size=8,
    )
    method = ts.Method(**(defaults | options))
    return method, state_lib.create(jnp.float32(0.0), jnp.zeros(shape), method.optimizer)


def noise_of(method, num, seed=0):
    """The noise of D's phase of a step."""
    return ts.draw(method, ts.step_keys(seed, 0, jnp.arange(num))[1])


def test_images_are_scaled_and_mirrored():
    """uint8 0 and 255 become -1 and 1, and with flip about half of the images are mirrored.

    Seen through a generator that returns nothing and a D that is linear in x_t at t = 0, where x_t is x_0 itself:
    D's gradient in its weights is then a sum over the images as they were seen.
    """
    method, state = linear((2, 4, 1), lr_g=state_lib.constant_schedule(0.0))
    images = np.zeros((64, 2, 4, 1), np.uint8)
    images[:, :, 0] = 255
    plain = np.float32(images[0]) / 127.5 - 1
    # d/dw mean softplus(-w.x) at w = 0 is -mean(x) / 2, and the step goes against it.
    seen = {flip: ts.make_train_step(dataclasses.replace(method, flip=flip), 0, False) for flip in (False, True)}
    seen = {flip: 2 * jax.jit(step)(state, images)[0].disc_params for flip, step in seen.items()}
    np.testing.assert_allclose(seen[False], plain, atol=1e-6)
    mirrored = (seen[True][0, 3, 0] + 1) / 2  # the share of images whose bright column is now the last
    assert 0.25 < mirrored < 0.75
    np.testing.assert_allclose(seen[True], (1 - mirrored) * plain + mirrored * plain[:, ::-1], atol=1e-5)


def test_the_discriminator_can_see_the_image_without_noise():
    """D's gradient is that of x_0 and x0_hat; G's is the squared error's, beside that of D."""
    paper = Losses(Schedule.create(4), r1_gamma=0.0)
    ours = dataclasses.replace(paper, discriminator_input="x_0", reconstruction=state_lib.constant_schedule(2.0))
    method, state = linear(losses=ours)
    x0 = jax.random.normal(jax.random.key(1), (8, 2))
    noise = noise_of(method, 8)
    (pairs, x0_hat), (usual, same) = (
        pairs_of(dataclasses.replace(method, losses=losses), state, x0, noise) for losses in (ours, paper)
    )
    np.testing.assert_array_equal(pairs.real, x0)
    for found in (pairs.fake, x0_hat):
        np.testing.assert_array_equal(found, same)
    np.testing.assert_array_equal(pairs.condition, usual.condition)
    grad, _ = ts.d_gradients(method, state, Phase(x0, noise), False)  # at v = 0, as above
    np.testing.assert_allclose(grad, (x0_hat - x0).mean(axis=0) / 2, rtol=1e-5, atol=1e-7)

    grad, values = ts.g_gradients(method, state, Phase(x0, noise))  # D = 0 has no gradient to give
    snr = (method.losses.schedule.a_s_cum[1:] / method.losses.schedule.sigmas_cum[1:])[noise.t] ** 2
    generated = lambda params: ts.bind(method.denoiser.gen, params)(usual.condition, noise.t, noise.z)  # noqa: E731
    expected = jax.grad(lambda params: 2 * jnp.mean(snr[:, None] * jnp.square(x0 - generated(params))))
    np.testing.assert_allclose(grad, expected(state.gen_params), rtol=1e-4, atol=1e-6)
    assert set(values) == {"g_fake", "g_loss", "g_squared_error"}


def test_a_generator_without_z_learns_from_parts_of_a_batch():
    """As from the whole, to rounding; its z [B, 0] divides by any number."""
    generator, disc = PointGenerator(width=8, depth=1, nz=0), PointDiscriminator(width=8, depth=1)
    x, t, z = jax.random.normal(jax.random.key(0), (8, 2)), jnp.zeros(8, jnp.int32), jnp.zeros((8, 0))
    params = generator.init(jax.random.key(1), x, t, z)["params"], disc.init(jax.random.key(2), x, t, x)["params"]
    method = method_of(generator, disc)
    phases = [Phase(x, noise_of(method, 8, seed)) for seed in (0, 1)]
    whole, parts = (
        ts.update(m, state_lib.create(*params, m.optimizer), *phases, True)
        for m in (method, dataclasses.replace(method, accumulate=2))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), whole, parts)


def test_ema_is_a_geometric_mean_of_the_stepped_weights():
    ema, params = jnp.float32(100.0), [jnp.float32(x) for x in (1.0, 2.0, 4.0)]
    for step, p in enumerate(params):
        ema = state_lib.update_ema(ema, p, jnp.int32(step), 0.75)
    np.testing.assert_allclose(ema, 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4, rtol=1e-6)


def test_gradients_that_nobody_uses_are_not_computed():
    """D's phase runs no backward pass of G: its program is little longer than G's forward pass alone."""
    generator = Generator(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), nz=4, z_emb_dim=8, n_mlp=1)
    disc = PointDiscriminator(width=4, depth=1)
    flat = lambda params, x_t, t, x_tp1: disc.apply(  # noqa: E731
        {"params": params}, x_t.reshape(x_t.shape[0], -1), t, x_tp1.reshape(x_t.shape[0], -1)
    )
    method = method_of(generator, disc, (8, 8, 3), disc=flat)
    x, t, z = jnp.zeros((4, 8, 8, 3)), jnp.zeros(4, jnp.int32), jnp.zeros((4, 4))
    shapes = jax.eval_shape(
        lambda k: state_lib.create(
            generator.init(k, x, t, z)["params"],
            disc.init(k, x.reshape(4, -1), t, x.reshape(4, -1))["params"],
            method.optimizer,
        ),
        jax.random.key(0),
    )
    noise = jax.eval_shape(lambda: noise_of(method, 4))

    def convolutions(f, *args):
        """As a GPU runs them: a CPU has other forms for some, which depend on their widths."""
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.convolution")

    forward = convolutions(method.denoiser.gen, shapes.gen_params, x, t, z)
    assert convolutions(lambda s, x, d: ts.d_gradients(method, s, Phase(x, d), True), shapes, x, noise) == forward
    assert convolutions(lambda s, x, d: ts.g_gradients(method, s, Phase(x, d)), shapes, x, noise) > 2 * forward


def test_the_gaussian_objective_learns_the_mean():
    """Of x_0 ~ N(0, 4 I) the mean given x_1 is w x_1, w = 4 a / (4 a^2 + s^2); D is left as it was."""
    schedule = Schedule.create(1, "geometric", 0.01, 0.5)
    method, state = linear(losses=Losses(schedule, r1_gamma=0.0, objective="gaussian"))
    data = 2 * jax.random.normal(jax.random.key(0), (4096, 2))
    step = jax.jit(ts.make_train_step(method, 0, True))
    for _ in range(30):
        state, metrics = step(state, data)
    a, s = schedule.a_s_cum[1], schedule.sigmas_cum[1]
    np.testing.assert_allclose(state.gen_params, 4 * a / (4 * a**2 + s**2), rtol=0.03)
    np.testing.assert_allclose(metrics["g_loss"], 4 * s**2 / (4 * a**2 + s**2), rtol=0.05)
    np.testing.assert_array_equal(state.disc_params, jnp.zeros(2))
    assert not any(name.startswith("d_") for name in metrics) and "r1" not in metrics


def test_the_one_shot_objective_compares_diffused_images():
    """G sees pure noise at t = 0; D both images at the same x_t, and nothing of x_{t+1}."""
    schedule = Schedule.create(4)
    losses = Losses(schedule, r1_gamma=0.0, objective="one_shot")
    method, state = linear(losses=losses, gen=lambda w, x, t, z: w * x + t[:, None])
    x0 = jax.random.normal(jax.random.key(0), (64, 2))
    noise = noise_of(method, 64, seed=1)
    (x_t, fake_x_t, x_tp1), _ = pairs_of(method, state.replace(gen_params=jnp.float32(3.0)), x0, noise)
    a, s = (jnp.asarray(c)[noise.t][:, None] for c in (schedule.a_s_cum, schedule.sigmas_cum))
    np.testing.assert_allclose(x_t, a * x0 + s * noise.noise_t, atol=1e-5)
    np.testing.assert_allclose(fake_x_t, a * 3 * noise.noise_tp1 + s * noise.noise_posterior, atol=1e-5)
    np.testing.assert_array_equal(x_tp1, 0)


def test_points_are_scaled():
    """D's gradient in v at 0 is -mean(x_0) / 2, as G returns 0; and x_0 is `scale` times the data."""
    data = jax.random.normal(jax.random.key(0), (64, 2)) + 1
    for scale in (1.0, 4.0):
        method, state = linear(scale=scale)
        state, _ = jax.jit(ts.make_train_step(method, 0, False))(state, data)
        np.testing.assert_allclose(state.disc_params, scale * data.mean(0) / 2, rtol=1e-5)


def test_levels_normalise_what_point_networks_see():
    levels, t = (2.0, 3.0, 5.0), jnp.array([0, 1, 1, 0])
    x, x_tp1 = jax.random.normal(jax.random.key(0), (2, 4, 2))
    plain, normal = (PointGenerator(width=8, depth=2, levels=given) for given in ((), levels))
    params = plain.init(jax.random.key(1), x, t, x)
    above, here = (jnp.array(levels)[k][:, None] for k in (t + 1, t))
    np.testing.assert_allclose(normal.apply(params, above * x, t, x), 2 * plain.apply(params, x, t, x), rtol=1e-5)
    plain, normal = (PointDiscriminator(width=8, depth=2, levels=given) for given in ((), levels))
    params = plain.init(jax.random.key(1), x, t, x_tp1)
    found, expected = normal.apply(params, here * x, t, above * x_tp1), plain.apply(params, x, t, x_tp1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_octaves_are_waves_of_every_coordinate():
    """At depth 0 the networks are linear in what they see; waves: sin and cos of 2^i pi x, divided by 2^i."""
    x, t, z = jnp.array([[0.25, -0.7]]), jnp.zeros(1, jnp.int32), jnp.zeros((1, 0))
    generator = PointGenerator(nz=0, depth=0, t_emb_dim=4, octaves=2)
    params = generator.init(jax.random.key(0), x, t, z)
    assert params["params"]["out"]["kernel"].shape == (2 * (1 + 2 * 2) + 4, 2)
    kernel = jnp.zeros((14, 2)).at[:10, 0].set(jnp.arange(1.0, 11))  # a weight for each input that is seen
    seen = [x, jnp.sin(jnp.pi * x), jnp.cos(jnp.pi * x), jnp.sin(2 * jnp.pi * x) / 2, jnp.cos(2 * jnp.pi * x) / 2]
    expected = jnp.arange(1.0, 11) @ jnp.concatenate(seen, 1)[0]
    found = generator.apply({"params": {"out": {"kernel": kernel, "bias": jnp.zeros(2)}}}, x, t, z)
    np.testing.assert_allclose(found[0], [expected, 0], rtol=1e-6)


def test_a_generator_without_z():
    """nz = 0: the same image for the same x_{t+1}, and gradients that are finite."""
    options = dict(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), nz=0, z_emb_dim=8, n_mlp=1)
    generator, x, t = Generator(**options), jnp.ones((2, 8, 8, 3)), jnp.zeros(2, jnp.int32)
    params = jax.jit(lambda k: generator.init(k, x, t, jnp.zeros((2, 0))))(jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(generator.apply(p, x, t, jnp.zeros((2, 0))) ** 2)))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_the_logged_norms_are_of_parameters_and_of_the_first_moments():
    method, state = linear(optimizer=optax.scale_by_adam(0.5, 0.9), lr_d=state_lib.constant_schedule(0.1))
    data = 1 + jax.random.normal(jax.random.key(0), (64, 2))
    state, _ = jax.jit(ts.make_train_step(method, 0, False))(state, data)
    norms = state_lib.norms(state)
    np.testing.assert_allclose(norms["d_param_norm"], np.linalg.norm(state.disc_params), rtol=1e-6)
    np.testing.assert_allclose(norms["g_grad_norm"], np.linalg.norm(state.gen_opt.mu), rtol=1e-6)
    np.testing.assert_allclose(norms["d_grad_norm"], 0.5 * np.linalg.norm(state.disc_opt.mu / 0.5), rtol=1e-6)
