"""The discriminator: golden logits, R1 and double backward, sizes, presets, the minibatch-stddev groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden, assert_spread, close_to_largest, golden_inventory

from ddgan_jax.errors import UserError
from ddgan_jax.method import losses
from ddgan_jax.networks import ops
from ddgan_jax.networks.discriminator import LARGE, SMALL, Discriminator, minibatch_stddev, preset
from ddgan_jax.networks.layers import from_patches
from ddgan_jax.storage.torch.convert import to_state_dict


def to_neighbours(batch: int) -> np.ndarray:
    """The order in which our groups of neighbours are the reference's strided groups: sample g * (B / G) + m."""
    group = min(batch, 4)
    return np.arange(batch).reshape(group, batch // group).T.reshape(-1)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["small", "large"])
def test_logits_and_gradients_equal_reference(kind):
    golden = Golden(f"discriminator_{kind}")
    disc, params = golden.discriminator()
    assert disc.stages == (SMALL if kind == "small" else LARGE)
    gamma = golden.config["r1_gamma"]
    x, x_t, t = golden.nhwc("x"), golden.nhwc("x_t"), golden.ints("t")
    cases = {f"batch{n}/": (x[:n], x_t[:n], t[:n]) for n in (8, 4, 3, 1)}
    if kind == "small":
        cases["size16_batch4/"] = (x[:4, :16, :16], x_t[:4, :16, :16], t[:4])
    else:
        twice = lambda a: a[:2].repeat(2, axis=1).repeat(2, axis=2)  # noqa: E731
        cases["size256_batch2/"] = (twice(x), twice(x_t), t[:2])

    # `x` is the golden files' name for x_t, and `x_t` for x_{t+1}.
    def r1(params, x, t, x_t):
        return losses.r1_penalty(lambda *a: disc.apply({"params": params}, *a), x, t, x_t, gamma)

    def plain(params, x, t, x_t):
        return jnp.mean(jax.nn.softplus(-disc.apply({"params": params}, x, t, x_t)))

    @jax.jit
    def gradients(params, x, t, x_t):
        grad_x = jax.grad(lambda x: jnp.sum(disc.apply({"params": params}, x, t, x_t)))(x)
        return jax.grad(r1, has_aux=True)(params, x, t, x_t)[0], jax.grad(plain)(params, x, t, x_t), grad_x

    for prefix, (x, x_t, t) in cases.items():
        order = to_neighbours(len(x))
        back = np.argsort(order)
        penalty, parts = jax.jit(r1)(params, x[order], t[order], x_t[order])
        np.testing.assert_allclose(parts["logits"][back], golden[prefix + "out"], atol=2e-5, rtol=0, err_msg=prefix)
        np.testing.assert_allclose(penalty, golden[prefix + "r1_penalty"], rtol=1e-4, err_msg=prefix)
        if prefix + "softplus_loss_real" in golden:
            loss = jnp.mean(jax.nn.softplus(-parts["logits"]))
            np.testing.assert_allclose(loss, golden[prefix + "softplus_loss_real"], atol=2e-5)
            close_to_largest(parts["grad_norm_sq"][back], golden[prefix + "r1_grad_norm_sq"], 1e-4, prefix)
        if prefix == "batch8/":
            r1_grads, grads, grad_x = gradients(params, x[order], t[order], x_t[order])
            expected = golden.nhwc(prefix + "r1_grad_x")
            error = np.linalg.norm(grad_x[back] - expected) / np.linalg.norm(expected)
            assert error < 1e-3  # by norm, for in the large D a few activations flip their sign
            if kind == "small":
                close_to_largest(grad_x[back], expected, 1e-4, "r1_grad_x")
            for name, ours in (("r1_grad_param/", r1_grads), ("loss_grad_param/", grads)):
                ours = to_state_dict(ours)
                for key, value in golden.below(prefix + name).items():
                    close_to_largest(ours[key], value, 1e-4, name + key)


@pytest.mark.golden
def test_reference_operations_equal_released_code():
    """R1's gradients too. The large one, too, with DDGAN_OPS=reference."""
    with ops.use_reference():
        test_logits_and_gradients_equal_reference("small")


def shapes_of(disc, size, channels=3, batch=4):
    x, t = jnp.zeros((batch, size, size, channels)), jnp.zeros(batch, jnp.int32)
    return jax.eval_shape(disc.init, jax.random.key(0), x, t, x)["params"]


@pytest.mark.golden
@pytest.mark.parametrize("name, size, parameters", [("cifar10", 32, 12_741_633), ("celeba256", 256, 27_737_217)])
def test_paper_networks(name, size, parameters):
    """Number of parameters, every key and shape, and the spread of the first weights."""
    disc, inventory = Discriminator(**preset(size)), golden_inventory(name)
    x, t = jnp.zeros((4, size, size, 3)), jnp.zeros(4, jnp.int32)
    params = jax.jit(lambda key: disc.init(key, x, t, x)["params"])(jax.random.key(0))
    ours = to_state_dict(jax.tree.map(np.asarray, params))
    assert sum(value.size for value in ours.values()) == inventory["n_params_D"] == parameters
    assert [[key, list(value.shape)] for key, value in ours.items()] == inventory["D"]
    assert_spread(ours, inventory["init_stats_D"])


@pytest.mark.parametrize("size", [8, 12, 16, 24, 28, 32, 48, 64, 96, 100, 128, 256, 512, 1000, 1024])
def test_presets(size):
    """Every size ends at 4 to 7 px, with widths that never fall and an affordable first stage."""
    fields = preset(size)
    left, widths = size, [width for width, _ in fields["stages"]]
    for _, halve in fields["stages"]:
        left = left // 2 if halve else left
    assert 4 <= left <= 7 and widths == sorted(widths) and max(widths) <= 8
    assert fields["start"] * size <= 2 * 256  # the work of the first stage never exceeds that of the paper's at 256 px
    disc = Discriminator(ngf=8, t_emb_dim=8, **fields)
    shapes_of(disc, size)
    if size == 32:
        assert fields == dict(start=2, stages=SMALL, zero_final=True)
    if size == 256:
        assert fields == dict(start=2, stages=LARGE, zero_final=False)


@pytest.mark.parametrize("size", [4, 7, 1025, 4096])
def test_no_preset(size):
    with pytest.raises(UserError, match=f"not {size}"):
        preset(size)


def test_stddev_groups_are_neighbours():
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    feature = minibatch_stddev(x)[..., -1]
    for group in (x[:4], x[4:]):
        expected = np.mean(np.sqrt(np.var(group, axis=0) + 1e-8))
        np.testing.assert_allclose(minibatch_stddev(group)[..., -1], expected, rtol=1e-5)
    np.testing.assert_array_equal(feature[:4], minibatch_stddev(x[:4])[..., -1])
    np.testing.assert_array_equal(feature[4:], minibatch_stddev(x[4:])[..., -1])
    np.testing.assert_allclose(minibatch_stddev(x[:1])[..., -1], 1e-4, rtol=1e-6)
    with pytest.raises(UserError, match="batch of 6"):
        minibatch_stddev(jnp.zeros((6, 4, 4, 3)))


def test_patches_are_pixels_of_more_channels():
    disc = Discriminator(ngf=8, t_emb_dim=16, **preset(8))
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 8, 8, 12))
    t = jnp.arange(4)
    params = disc.init(jax.random.key(1), x, t, y)
    patched = disc.clone(patch_size=2).apply(params, from_patches(x, 2), t, from_patches(y, 2))
    np.testing.assert_allclose(patched, disc.apply(params, x, t, y), atol=1e-6)


def test_the_product_tells_how_well_two_images_fit():
    """log q(x_{t+1} | x_0) depends on both images through <x_0, x_{t+1}> alone: one pass over the product has it."""
    disc = Discriminator(ngf=8, t_emb_dim=16, product=True, **preset(8))
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 8, 8, 3))
    t = jnp.arange(4)
    params = disc.init(jax.random.key(1), x, t, y)["params"]
    kernel = params["conv_in"]["kernel"]
    assert kernel.shape[-2] == 3 * 3

    def reading(kernel):
        return {"params": params | {"conv_in": params["conv_in"] | {"kernel": kernel}}}

    only_product = reading(jnp.zeros_like(kernel).at[..., 6:, :].set(0.1))
    only_first = reading(jnp.zeros_like(kernel[..., :6, :]).at[..., :3, :].set(0.1))
    expected = disc.clone(product=False).apply(only_first, x * y, t, y)
    np.testing.assert_allclose(disc.apply(only_product, x, t, y), expected, rtol=1e-5)


def test_too_small_images():
    with pytest.raises(UserError, match="8x8 are too small"):
        shapes_of(Discriminator(ngf=8, **preset(64)), 8)


def test_bfloat16_is_close_to_float32():
    golden = Golden("discriminator_small")
    disc, params = golden.discriminator()
    args = golden.nhwc("x"), golden.ints("t"), golden.nhwc("x_t")
    full = jax.jit(lambda p: disc.apply({"params": p}, *args))(params)
    half = jax.jit(lambda p: disc.clone(dtype=jnp.bfloat16).apply({"params": p}, *args))(params)
    assert half.dtype == jnp.float32
    assert 1e-5 < float(jnp.linalg.norm(half - full) / jnp.linalg.norm(full)) < 0.02
