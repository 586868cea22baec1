"""Single layers against the golden numbers, and what they are by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden, close_to_largest
from test_ops import KERNELS, nchw

from ddgan_jax.networks import layers


@pytest.mark.golden
def test_golden_tests_multiply_in_full_float32():
    """On a GPU or a TPU too."""
    product = jax.jit(jnp.dot).trace(jnp.ones((2, 2)), jnp.ones((2, 2))).lower(lowering_platforms=("tpu",))
    assert "precision = [HIGHEST, HIGHEST]" in product.as_text()


@pytest.mark.golden
@pytest.mark.parametrize("name", KERNELS)
def test_resampling_convolutions_equal_released_code(name, form):
    golden, kernel = Golden("ops"), KERNELS[name]
    x, weight = golden.nhwc("x"), golden["conv_w/" + name].transpose(2, 3, 1, 0)

    def fused(direction):
        params = {"params": {"fir_conv": {"kernel": weight, "bias": np.zeros(5, np.float32)}}}
        return nchw(layers.Resample(direction, 5, kernel).apply(params, x))

    # Sums of 45 products, which processors add up in different orders: 3.8e-6 was seen where the largest is 8.6.
    close_to_largest(fused("down"), golden["conv_downsample_2d/" + name], 1e-6)
    close_to_largest(fused("up"), golden["PATCHED_upsample_conv_2d/" + name], 1e-6)


@pytest.mark.golden
def test_single_layers_equal_released_code(form):
    golden = Golden("ops")
    x = golden.nhwc("x")
    np.testing.assert_allclose(nchw(layers.resample(x, "up", None)), golden["naive_upsample_2d"], atol=1e-6)
    np.testing.assert_allclose(nchw(layers.resample(x, "down", None)), golden["naive_downsample_2d"], atol=1e-6)
    for key, value in golden.below("temb/dim").items():
        # The angles reach 7 radians, where a float32 step is 5e-7.
        np.testing.assert_allclose(layers.sinusoidal_embedding(golden["temb/t"], int(key)), value, atol=2e-6)
    np.testing.assert_allclose(layers.pixel_norm(golden["pixelnorm/in"]), golden["pixelnorm/out"], atol=1e-6)
    nin = np.einsum("bhwi,io->bhwo", x, golden["nin/W"]) + golden["nin/b"]
    np.testing.assert_allclose(nchw(nin), golden["nin/out"], atol=1e-6)

    assert golden["adagn/num_groups"] == 12 // 4
    style = {"style.weight": golden["adagn/style.weight"], "style.bias": golden["adagn/style.bias"]}
    params = {"style": {"kernel": style["style.weight"].T, "bias": style["style.bias"]}}
    out = layers.AdaptiveGroupNorm().apply({"params": params}, golden.nhwc("adagn/x"), golden["adagn/style_in"])
    np.testing.assert_allclose(nchw(out), golden["adagn/out"], atol=5e-6)

    theirs = golden.below("attn/sd/")
    params = {"norm": {"scale": theirs["GroupNorm_0.weight"], "bias": theirs["GroupNorm_0.bias"]}}
    for i, name in enumerate(("q", "k", "v", "out")):
        params[name] = {"kernel": theirs[f"NIN_{i}.W"], "bias": theirs[f"NIN_{i}.b"]}
    out = layers.Attention().apply({"params": params}, golden.nhwc("attn/x"))
    np.testing.assert_allclose(nchw(out), golden["attn/out"], atol=5e-6)


def test_patches():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = layers.to_patches(x, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(layers.from_patches(patches, 2), x)
    np.testing.assert_array_equal(layers.to_patches(x, 1), x)


def test_leaky_relu_slope_at_zero():
    assert jax.grad(lambda x: layers.leaky_relu(x))(0.0) == np.float32(0.2)


def test_dropout_belongs_to_the_example():
    x, keys = jnp.ones((8, 4, 4, 2)), jax.random.split(jax.random.key(0), 8)
    whole = layers.dropout(x, 0.4, keys)
    np.testing.assert_array_equal(whole[5:], layers.dropout(x[5:], 0.4, keys[5:]))
    assert 0.4 < float(jnp.mean(whole > 0)) < 0.8 and np.allclose(np.unique(whole), [0, 1 / 0.6])


@pytest.mark.parametrize("rescale", [False, True])
def test_merge_is_a_rescaled_sum(rescale, form):
    x, h, g = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 3))
    y, pullback = jax.vjp(lambda x, h: layers.merge(x, h, rescale), x, h)
    scale = 0.5**0.5 if rescale else 1
    np.testing.assert_allclose(y, (x + h) * scale, rtol=1e-6, atol=1e-7)
    for gradient in pullback(g):
        np.testing.assert_allclose(gradient, g * scale, rtol=1e-6)


@pytest.mark.parametrize("dtype, error", [(jnp.bfloat16, 0.005), (jnp.float32, 5e-5)])
def test_large_logits_of_attention_are_not_rounded(dtype, error):
    """bfloat16 steps by 0.25 near 40, which changes a weight by up to 13 %; v's type rounds it by 0.4 % at most."""
    q, k = (4 * jax.random.normal(jax.random.key(0), (2, 1, 64, 128))).astype(dtype)
    v = jnp.eye(64, dtype=dtype)[None]  # which makes the output the weights
    logits = np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(1, 2) / 128**0.5
    assert np.abs(logits).max() > 40
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = np.asarray(layers.attention(q, k, v), np.float64)
    large = weights > 1e-3
    np.testing.assert_allclose(found[large], weights[large], rtol=error)
