"""Generators that predict x_0 (the paper's method), x_t or noise (its ablations)."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import preset_with

import ddgan_jax
from ddgan_jax.commands import generate, setup
from ddgan_jax.commands.train import train
from ddgan_jax.config.settings import as_dict, read
from ddgan_jax.errors import UserError
from ddgan_jax.method.build import build, denoiser, init_state
from ddgan_jax.method.diffusion import Schedule, no_posterior, q_sample, sample_posterior, x0_from_noise
from ddgan_jax.method.losses import Losses, Phase, weighted_error
from ddgan_jax.method.sampling import Denoiser, sample
from ddgan_jax.method.train_step import draw, make_train_step
from ddgan_jax.model.sampler import posterior_of
from ddgan_jax.storage.torch import files

STD, COUNT = 0.5, 40_000  # of the data, and of the samples


def preset(predicts, **fields):
    return preset_with("digits:smoke", diffusion__predicts=predicts, **PAPERS_LOSSES | fields)


PAPERS_LOSSES = {"loss__discriminator_input": "x_t", "loss__reconstruction": 0.0}


@pytest.mark.parametrize("T", [1, 4])
def test_noise_gives_x_0(T):
    """Equation (7) inverts (2)."""
    schedule = Schedule.create(T, beta_max=6.0)
    x0, noise = jax.random.normal(jax.random.key(0), (2, T, 3, 3, 1))
    t = jnp.arange(T)
    np.testing.assert_allclose(x0_from_noise(schedule, noise, q_sample(schedule, x0, t + 1, noise), t), x0, atol=2e-5)


def exact_generator(schedule, predicts):
    """The conditional distribution of x_0, x_t or the noise given x_{t+1}, for numbers x_0 ~ N(0, STD^2).

    All of them are Gaussian. The mean of y given x is cov(y, x) / var(x) x, and the variance var(y) - cov(y, x)^2 /
    var(x).
    """
    a, s = jnp.asarray(schedule.a_s_cum), jnp.asarray(schedule.sigmas_cum)
    variances = a**2 * STD**2 + s**2  # of x_0, ..., x_T

    def gen(params, x, t, z):
        var_x = variances[t + 1]
        covariance, variance = {
            "x_0": (a[t + 1] * STD**2, STD**2),
            "x_t": (jnp.asarray(schedule.a_s)[t + 1] * variances[t], variances[t]),
            "noise": (s[t + 1], 1.0),
        }[predicts]
        deviation = jnp.sqrt(jnp.maximum(variance - covariance**2 / var_x, 0))
        output = (covariance / var_x)[:, None] * x + deviation[:, None] * z
        return x0_from_noise(schedule, output, x, t) if predicts == "noise" else output

    return gen


@pytest.mark.parametrize("predicts", ["x_0", "x_t", "noise"])
@pytest.mark.parametrize("T", [1, 3])
def test_exact_generators_sample_the_data(predicts, T):
    schedule = Schedule.create(T, beta_max=8.0)
    given = Denoiser(exact_generator(schedule, predicts), None, schedule, (1,), nz=1, predicts_x_t=predicts == "x_t")
    x = sample(given, None, jax.random.key(1), jnp.arange(COUNT), posterior=posterior_of(given, "gaussian"))[:, 0]
    assert abs(float(x.mean())) < 4 * STD / COUNT**0.5
    # x_T starts from N(0, 1), whose variance is that of x_T up to abar_T (1 - STD^2) = 0.013; x_0 hardly depends on it.
    assert float(x.var()) == pytest.approx(STD**2, rel=4 * (2 / COUNT) ** 0.5)


def test_a_posterior_would_spoil_samples_of_x_t():
    schedule = Schedule.create(3, beta_max=8.0)
    given = Denoiser(exact_generator(schedule, "x_t"), None, schedule, (1,), nz=1, predicts_x_t=True)
    assert posterior_of(given, "gaussian") is no_posterior
    x = sample(given, None, jax.random.key(1), jnp.arange(COUNT), posterior=sample_posterior)
    assert abs(float(x.var()) / STD**2 - 1) > 0.1


@pytest.mark.parametrize("name", ["digits", "gaussians"])
def test_the_networks_output(name):
    """With predicts = 'noise' x0_hat is (7) of the network's output, which has no bounds; else it is the output."""
    fields = {"loss__reconstruction": 0.0, "loss__discriminator_input": "x_t"}
    free = {"generator__tanh": False} if name == "digits" else {}
    plain = denoiser(preset_with(f"{name}:smoke", **fields, **free))
    x = 3 * jax.random.normal(jax.random.key(0), (4, *plain.image_shape))
    t, z = jnp.array([0, 1, 0, 1]), jax.random.normal(jax.random.key(1), (4, plain.nz))
    params = jax.tree.map(lambda p: p + 0.3, plain.init_gen(jax.random.key(2)))  # the last layer's are 1e-10
    output = plain.gen(params, x, t, z)
    for predicts in ("x_t", "noise"):
        given = denoiser(preset_with(f"{name}:smoke", diffusion__predicts=predicts, **fields))
        expected = x0_from_noise(given.schedule, output, x, t) if predicts == "noise" else output
        np.testing.assert_allclose(given.gen(params, x, t, z), expected, rtol=1e-5, atol=1e-5)
        assert given.predicts_x_t == (predicts == "x_t")


def test_pairs_of_direct_denoising():
    """The fake x_t is G's output: the posterior's noise has no effect on it."""
    method = build(preset("x_t"))
    state = init_state(method, 0)
    keys = jax.random.split(jax.random.key(0), 6)
    noise, x0 = draw(method, keys), jnp.zeros((6, 8, 8, 1))
    gen = lambda x, t, z: method.denoiser.gen(state.gen_params, x, t, z)  # noqa: E731
    for shift in (0, 5):
        phase = Phase(x0, noise.replace(noise_posterior=noise.noise_posterior + shift))
        pairs, output = method.losses.make_pairs(gen, phase)
        np.testing.assert_array_equal(pairs.fake, output)
        np.testing.assert_array_equal(output, gen(pairs.condition, noise.t, noise.z))
    of_x_0 = Losses(method.losses.schedule, 0.0).make_pairs(gen, Phase(x0, noise))[0]
    np.testing.assert_array_equal(pairs.real, of_x_0.real)
    assert not np.allclose(pairs.fake, of_x_0.fake)


def test_the_squared_error_of_the_noise():
    """SNR ||x_0 - x0_hat||^2 = ||noise - predicted noise||^2: the recipe's weight is DDPM's simple loss."""
    fields = {"loss__reconstruction": 2.0, "objective": "adversarial"}
    losses = build(preset("noise", **fields)).losses
    x0, noise, output = jax.random.normal(jax.random.key(0), (3, 3, 8, 8, 1))
    t = jnp.array([0, 1, 2])
    x_tp1 = q_sample(losses.schedule, x0, t + 1, noise)
    _, values = weighted_error(losses.schedule, x0, x0_from_noise(losses.schedule, output, x_tp1, t), t)
    expected = jnp.mean(jnp.square(noise - output), axis=(1, 2, 3))
    np.testing.assert_allclose(values["g_squared_error"], expected, rtol=1e-4)


@pytest.mark.parametrize("predicts", ["x_t", pytest.param("noise", marks=pytest.mark.slow)])
def test_every_use(predicts, tmp_path):
    """Training, samples, files and exports know what the generator predicts; so does editing, whose steps are these."""
    train(preset(predicts, eval__every=8), str(tmp_path / "run"))
    model = ddgan_jax.load(str(tmp_path / "run"))
    assert model.config.diffusion.predicts == predicts and model.denoiser.predicts_x_t == (predicts == "x_t")
    samples, image = model.sample(4, seed=1), np.zeros((8, 8, 1), np.uint8)
    model.save(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(ddgan_jax.load(str(tmp_path / "model.safetensors")).sample(4, seed=1), samples)
    exported = jax.export.deserialize(bytearray(model.export())).call(np.uint32(1), np.arange(4, dtype=np.int32))
    assert np.abs(np.asarray(model.to_images(exported)).astype(int) - samples).max() <= 1
    with pytest.raises(UserError, match=rf"x.pth: the reference has no generator of {predicts}"):
        generate.export(model, str(tmp_path / "x.pth"))
    if predicts == "noise":
        assert model.sample(1, posterior="deterministic").shape == (1, 8, 8, 1)
        return
    with pytest.raises(
        UserError, match="posterior='deterministic' is for a generator of x_0, and this one outputs x_t"
    ):
        model.sample(1, posterior="deterministic")
    for images in (model.edit(image, 2, 3), model.inpaint(image, np.eye(8) > 0, 3), model.vary(3, 1)[1]):
        assert images.shape == (3, 8, 8, 1)
    steps = model.trajectory(4, seed=1)
    np.testing.assert_array_equal(steps.x_t, steps.x0_hat)
    assert np.abs(np.asarray(model.to_images(steps.x_t[0])).astype(int) - samples).max() <= 1
    generate.draw_trajectory(model, str(tmp_path / "t.png"), 4)
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_direct_denoising_learns():
    """G's gradients reach it through x_t alone."""
    method = build(preset_with("gaussians:smoke", diffusion__predicts="x_t"))
    state = init_state(method, 0)
    points = np.random.default_rng(0).normal(size=(method.batch_size, 2)).astype(np.float32)
    after, metrics = jax.jit(make_train_step(method, 0, with_r1=True))(state, points)
    before, now = jax.tree.leaves(state.gen_params), jax.tree.leaves(after.gen_params)
    changed = [not np.array_equal(a, b) for a, b in zip(before, now, strict=True)]
    assert all(np.isfinite(x).all() for x in metrics.values()) and all(changed)


@pytest.mark.parametrize(
    "predicts, fields, message",
    [
        ("x_1", {}, "diffusion.predicts='x_1' is not supported: it is x_0, x_t or noise"),
        ("noise", {"objective": "one_shot"}, "predicts='noise' is for objective='adversarial', not 'one_shot'"),
        ("noise", {"generator__tanh": True}, "predicts='noise' needs outputs without bounds: leave generator.tanh out"),
        ("x_t", {"objective": "gaussian"}, "predicts='x_t' is for objective='adversarial', not 'gaussian'"),
        ("x_t", {"loss__reconstruction": 1.0}, "predicts='x_t' leaves no prediction of x_0: set loss.discriminator"),
        ("x_t", {"loss__discriminator_input": "x_0"}, "predicts='x_t' leaves no prediction of x_0"),
    ],
)
def test_settings_that_exclude_it(predicts, fields, message):
    with pytest.raises(UserError, match=message):
        build(preset(predicts, **fields))


def test_networks_of_another_prediction_are_refused(tmp_path):
    """Their parameters have the same shapes."""
    before, now = as_dict(preset("noise")), read(preset("x_t"))
    with pytest.raises(UserError, match=r"runs/x holds a run with diffusion.predicts=noise, and this .* has x_t"):
        setup.as_begun(now, before, "runs/x")
    ddgan_jax.load("digits").save(tmp_path / "x_0.safetensors")
    fields = dict(train__init_from=str(tmp_path / "x_0.safetensors"), train__num_steps=1, **PAPERS_LOSSES)
    config = preset_with("digits", diffusion__predicts="noise", **fields)
    with pytest.raises(UserError, match=r"was trained with diffusion.predicts=x_0, and this configuration has noise"):
        train(config, str(tmp_path / "run"))
    generator = {"conv_in.weight": np.zeros((2, 2), np.float32)}
    files.save(str(tmp_path / "netG_1.pth"), generator)
    with pytest.raises(
        UserError, match=r"netG_1.pth holds a generator of x_0, not of noise: set diffusion.predicts to"
    ):
        ddgan_jax.load(str(tmp_path / "netG_1.pth"), config=config)
