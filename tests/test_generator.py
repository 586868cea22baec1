"""The generator: golden outputs and gradients, sizes, initialisation, options, precision."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden, assert_spread, close_to_largest, golden_inventory

from ddgan_jax.errors import UserError
from ddgan_jax.networks import ops
from ddgan_jax.networks.generator import Generator
from ddgan_jax.networks.layers import from_patches, to_patches
from ddgan_jax.storage.torch.convert import from_state_dict, to_state_dict

TINY = dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), nz=6, z_emb_dim=8, n_mlp=1)
CELEBA = dict(nf=64, ch_mult=(1, 1, 2, 2, 4, 4), n_mlp=3)


def inputs(size=8, channels=3, nz=6, batch=4):
    key = jax.random.split(jax.random.key(0), 2)
    x, z = jax.random.normal(key[0], (batch, size, size, channels)), jax.random.normal(key[1], (batch, nz))
    return x, jnp.arange(batch) % 4, z


def shapes_of(generator, size=32):
    x, t, z = inputs(size, generator.image_channels, generator.nz, batch=1)
    return jax.eval_shape(generator.init, jax.random.key(0), x, t, z)["params"]


def count(params):
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def random_params(generator, size=16):
    """Random weights of a size that lets every layer matter: at initialisation the blocks end in (almost) zeros."""
    random = np.random.default_rng(0)

    def leaf(shape):
        return np.float32(random.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) if len(shape) > 1 else 10))

    return jax.tree.map(lambda struct: leaf(struct.shape), shapes_of(generator, size))


def run(generator, params, *inputs):
    """Compiled as a whole: op by op, compilation takes ten times as long."""
    return jax.jit(lambda p, *args: generator.apply({"params": p}, *args))(params, *inputs)


@pytest.mark.golden
def test_output_and_gradients_equal_reference(golden_generator):
    golden: Golden = golden_generator
    generator, params = golden.generator()
    t, cotangent = golden.ints("t"), golden.nhwc("cotangent")

    @jax.jit
    def run(params, x, z):
        out, pullback = jax.vjp(lambda *args: generator.apply({"params": args[0]}, args[1], t, args[2]), params, x, z)
        return out, *pullback(jnp.asarray(cotangent))

    out, grads, grad_x, grad_z = run(params, golden.nhwc("x"), golden["z"])
    np.testing.assert_allclose(out, golden.nhwc("out"), atol=2e-5, rtol=0)
    close_to_largest(grad_x, golden.nhwc("grad/x"), 1e-4, "x")
    close_to_largest(grad_z, golden["grad/z"], 1e-4, "z")
    grads = to_state_dict(grads)
    named = golden.below("grad/param/")
    assert named
    for name, expected in named.items():
        if not name.endswith("NIN_1.b"):  # its true gradient is zero, as ours is; the reference has rounding noise
            close_to_largest(grads[name], expected, 1e-4, name)
    names, values = json.loads(str(golden["grad_norm/names"])), golden["grad_norm/values"]
    unused = json.loads(str(golden["unused_params"]))
    assert set(names) | set(unused) == set(grads)
    for name, value in zip(names, values, strict=True):
        if not name.endswith("NIN_1.b"):
            np.testing.assert_allclose(np.linalg.norm(grads[name]), value, rtol=1e-4, err_msg=name)
    for name in unused:
        assert not grads[name].any()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["01_default32", "03_one_outskip_inskip_sum"])
def test_reference_operations_equal_released_code(name):
    """The others, too, with DDGAN_OPS=reference."""
    with ops.use_reference():
        test_output_and_gradients_equal_reference(Golden(f"generator_{name}"))


@pytest.mark.golden
@pytest.mark.parametrize(
    "name, fields, size, parameters", [("cifar10", {}, 32, 48_432_515), ("celeba256", CELEBA, 256, 39_726_979)]
)
def test_paper_networks(name, fields, size, parameters):
    """The two networks of the paper: number of parameters, every key and shape; the spread of the first weights."""
    generator, inventory = Generator(**fields), golden_inventory(name)
    shapes = shapes_of(generator, size)
    assert count(shapes) == inventory["n_params_G"] == parameters
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    assert [[key, list(value.shape)] for key, value in to_state_dict(zeros).items()] == inventory["G"]
    if name != "cifar10":
        return  # one network shows how layers are initialised
    x, t, z = inputs(size, 3, 100, batch=1)
    # Only the parameters are wanted: without the outputs the compiler drops the forward pass.
    params = jax.jit(lambda key: generator.init(key, x, t, z)["params"])(jax.random.key(0))
    ours = to_state_dict(jax.tree.map(np.asarray, params))
    assert_spread(ours, inventory["init_stats_G"])


@pytest.mark.parametrize(
    "options",
    [
        dict(centered=False),
        dict(tanh=False),
        dict(skip_rescale=False),
        dict(conditional=False),
        dict(image_channels=1),
        dict(image_channels=4, ch_mult=(1, 1, 1)),
        dict(ch_mult=(2,), nf=12),
        dict(ch_mult=(1, 3), num_res_blocks=2, attn_resolutions=(16, 8)),
        dict(resblock_type="ddpm", fir=False),
        dict(resblock_type="ddpm", resamp_with_conv=False, progressive="output_skip"),
        dict(fir=False, progressive_input="input_skip", progressive_combine="cat"),
        dict(resblock_type="biggan_oneadagn", progressive="output_skip", progressive_input="input_skip"),
        dict(fir_kernel=(1, 2, 1)),
    ],
    ids=str,
)
def test_options_run(options):
    """Every option gives finite images that react to x and z, and to t when conditional, and converts bit for bit."""
    generator = Generator(**(TINY | options))
    x, t, z = inputs(16, generator.image_channels)
    params = random_params(generator)
    apply = jax.jit(lambda x, t, z: generator.apply({"params": params}, x, t, z))
    out = apply(x, t, z)
    assert out.shape == x.shape and out.dtype == jnp.float32 and bool(jnp.isfinite(out).all())
    assert not np.allclose(out, apply(-x, t, z)) and not np.allclose(out, apply(x, t, -z))
    assert np.allclose(out, apply(x, 3 - t, z), atol=1e-6) == (not generator.conditional)
    state_dict = to_state_dict(jax.device_get(params))
    assert count(params) == sum(value.size for value in state_dict.values())
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(state_dict, params), params)


def test_output_options_are_what_they_say():
    generator = Generator(**TINY)
    x, t, z = inputs(16)
    params = random_params(generator)
    out = run(generator, params, x, t, z)
    np.testing.assert_allclose(jnp.tanh(run(generator.clone(tanh=False), params, x, t, z)), out, atol=1e-5)
    np.testing.assert_allclose(run(generator.clone(centered=False), params, (x + 1) / 2, t, z), out, atol=1e-5)
    assert not np.allclose(run(generator.clone(skip_rescale=False), params, x, t, z), out, atol=1e-3)


def test_untrained_generator_is_almost_zero():
    generator = Generator(**TINY)
    out, _ = jax.jit(generator.init_with_output)(jax.random.key(0), *inputs(16))
    assert 0 < float(jnp.abs(out).max()) < 1e-3


def test_bfloat16_is_close_to_float32():
    generator = Generator(**(TINY | dict(nf=32)))
    x, t, z = inputs(16, batch=8)
    params = random_params(generator)
    half = generator.clone(dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes_of(half, 16)))
    full, approximate = run(generator, params, x, t, z), run(half, params, x, t, z)
    assert approximate.dtype == jnp.float32
    error = float(jnp.linalg.norm(approximate - full) / jnp.linalg.norm(full))
    assert 1e-5 < error < 0.02


def test_rematerialisation_changes_nothing():
    generator = Generator(**TINY)
    x, t, z = inputs(16)
    params, remat = random_params(generator), generator.clone(remat=True)

    def gradient(generator):
        return jax.jit(jax.grad(lambda p: jnp.sum(generator.apply({"params": p}, x, t, z) ** 2)))(params)

    assert shapes_of(remat, 16) == shapes_of(generator, 16)
    ours, theirs = to_state_dict(gradient(remat)), to_state_dict(gradient(generator))
    for name in ours:
        close_to_largest(ours[name], theirs[name], 1e-4, name)
    assert "remat" in str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(remat.apply({"params": p}, x, t, z))))(params))


def test_patches_are_pixels_of_more_channels():
    generator = Generator(**TINY, image_channels=12)
    x, t, z = inputs(8, channels=12)
    params = random_params(generator, 8)
    pixels = from_patches(x, 2)
    patched = run(generator.clone(image_channels=3, patch_size=2), params, pixels, t, z)
    np.testing.assert_allclose(to_patches(patched, 2), run(generator, params, x, t, z), atol=1e-6)


def test_dropout_needs_keys():
    generator = Generator(**TINY, dropout=0.3)
    x, t, z = inputs(16)
    params, keys = random_params(generator), jax.random.split(jax.random.key(1), 4)
    apply = jax.jit(lambda *args: generator.apply({"params": params}, *args))
    plain, dropped = apply(x, t, z), apply(x, t, z, keys)
    np.testing.assert_allclose(plain, run(generator.clone(dropout=0.0), params, x, t, z, keys), atol=1e-6)
    assert not np.allclose(plain, dropped, atol=1e-2)
    np.testing.assert_allclose(apply(x[2:], t[2:], z[2:], keys[2:]), dropped[2:], atol=1e-5)


def test_a_width_without_groups_is_refused():
    with pytest.raises(UserError, match="30 channels"):
        jax.eval_shape(Generator(**(TINY | {"nf": 30})).init, jax.random.key(0), *inputs(16))
