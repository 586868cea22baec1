"""Single operations against the golden numbers, and what they are by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden, close_to_largest

from ddgan_jax.errors import UserError
from ddgan_jax.materialize import materialize
from ddgan_jax.models import convolution, layers
from ddgan_jax.torch_weights import _SUBLAYERS, _layer_params

KERNELS = {"1331": (1, 3, 3, 1), "121": (1, 2, 1), "1234_asym": (1, 2, 3, 4)}


def counts(traced, operation):
    """How often it is in the program for each platform."""
    platforms = ("cpu", "cuda", "tpu")
    return {name: traced.lower(lowering_platforms=(name,)).as_text().count(operation) for name in platforms}


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.golden
@pytest.mark.parametrize("name", KERNELS)
def test_fir_resampling_equals_reference(name):
    golden, kernel = Golden("ops"), KERNELS[name]
    x, weight = golden.nhwc("x"), golden["conv_w/" + name].transpose(2, 3, 1, 0)

    def fused(direction):
        params = {"params": {"fir_conv": {"kernel": weight, "bias": np.zeros(5, np.float32)}}}
        return nchw(layers.Resample(direction, 5, kernel).apply(params, x))

    np.testing.assert_allclose(nchw(layers.fir_upsample(x, kernel)), golden["upsample_2d/" + name], atol=1e-6)
    np.testing.assert_allclose(nchw(layers.fir_downsample(x, kernel)), golden["downsample_2d/" + name], atol=1e-6)
    # Sums of 45 products, which processors add up in different orders: 3.8e-6 was seen where the largest is 8.6.
    close_to_largest(fused("down"), golden["conv_downsample_2d/" + name], 1e-6)
    close_to_largest(fused("up"), golden["PATCHED_upsample_conv_2d/" + name], 1e-6)


@pytest.mark.golden
def test_single_operations_equal_reference():
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
    params = _layer_params(style, {"style": "style"})
    out = layers.AdaptiveGroupNorm().apply({"params": params}, golden.nhwc("adagn/x"), golden["adagn/style_in"])
    np.testing.assert_allclose(nchw(out), golden["adagn/out"], atol=5e-6)

    params = _layer_params(golden.below("attn/sd/"), _SUBLAYERS["attn"])
    out = layers.Attention().apply({"params": params}, golden.nhwc("attn/x"))
    np.testing.assert_allclose(nchw(out), golden["attn/out"], atol=5e-6)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 4, 6, 4, 1)])
def test_fir_is_zero_insertion_and_convolution(kernel):
    """The two-phase upsampling is the textbook one, and both are adjoint to each other up to the factor 4."""
    x = np.random.default_rng(0).normal(size=(1, 6, 10, 2)).astype(np.float32)
    k2 = np.outer(kernel, kernel) / np.sum(kernel) ** 2
    before = (len(kernel) - 1) // 2 + 1
    zeros = np.zeros((1, 12, 20, 2))
    zeros[:, ::2, ::2] = x
    padded = np.pad(zeros, ((0, 0), (before, len(kernel)), (before, len(kernel)), (0, 0)))
    expected = np.zeros_like(zeros)
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            expected += 4 * k2[::-1, ::-1][i, j] * padded[:, i : i + 12, j : j + 20]
    np.testing.assert_allclose(layers.fir_upsample(x, kernel), expected, atol=1e-5)
    if kernel == kernel[::-1] and len(kernel) % 2 == 0:
        y = np.random.default_rng(1).normal(size=(1, 3, 5, 2)).astype(np.float32)
        left, right = jnp.vdot(layers.fir_downsample(x, kernel), y), jnp.vdot(x, layers.fir_upsample(y, kernel)) / 4
        np.testing.assert_allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 4, 6, 4, 1)])
@pytest.mark.parametrize("name", ["down", "up", "up with margin", "same size"])
def test_gradients_of_fir_are_its_transposes(name, kernel):
    """<f(x), y> = <x, f'(y)>, and the gradient of that gradient is the filter again; of odd sizes too."""
    filters = {
        "down": lambda x: layers.fir_downsample(x, kernel),
        "up": lambda x: layers.fir_upsample(x, kernel),
        "up with margin": lambda x: layers.fir_upsample(x, kernel, margin=1),
        "same size": lambda x: layers.fir_filter(x, kernel, pad=len(kernel)),
    }
    x = jax.random.normal(jax.random.key(0), (1, 7, 10, 2))
    result, pullback = jax.vjp(filters[name], x)
    y = jax.random.normal(jax.random.key(1), result.shape)
    np.testing.assert_allclose(jnp.vdot(result, y), jnp.vdot(x, pullback(y)[0]), atol=1e-4)
    again = jax.grad(lambda y: jnp.vdot(pullback(y)[0], x))(y)
    np.testing.assert_allclose(again, result, atol=1e-5)


@pytest.mark.parametrize("start", [-3, -1, 0, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_fir_by_matrix_products_is_fir_by_shifts(stride, start):
    """What a TPU runs, and its transpose."""
    f = layers._Filter((0.1, 0.7, -0.3, 0.5), start, stride, x_sizes=(7, 10), y_sizes=(5, 6))
    x, y = (jax.random.normal(jax.random.key(i), (2, *sizes, 3)) for i, sizes in enumerate((f.x_sizes, f.y_sizes)))
    np.testing.assert_allclose(layers._products(x, f), layers._filtered(x, f), atol=1e-6)
    np.testing.assert_allclose(layers._products(y, f, transposed=True), layers._spread(y, f), atol=1e-6)


@pytest.mark.parametrize("resample", [layers.fir_downsample, layers.fir_upsample])
def test_only_a_tpu_resamples_by_matrix_products(resample):
    traced = jax.jit(jax.value_and_grad(lambda x: jnp.sum(resample(x)))).trace(jnp.zeros((1, 8, 8, 4)))
    products = counts(traced, "stablehlo.dot_general")
    assert products == {"cpu": 0, "cuda": 0, "tpu": 4}  # two axes, and two of the gradient


def test_fir_keeps_constants_inside():
    x = jnp.ones((1, 8, 8, 3))
    np.testing.assert_allclose(layers.fir_downsample(x)[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(layers.fir_upsample(x)[:, 2:-2, 2:-2], 1, rtol=1e-6)
    assert layers.fir_downsample(jnp.ones((1, 7, 9, 1))).shape == (1, 3, 4, 1)


def test_leaky_relu_slope_at_zero():
    assert jax.grad(lambda x: layers.leaky_relu(x))(0.0) == np.float32(0.2)


def test_dropout_belongs_to_the_example():
    x, keys = jnp.ones((8, 4, 4, 2)), jax.random.split(jax.random.key(0), 8)
    whole = layers.dropout(x, 0.4, keys)
    np.testing.assert_array_equal(whole[5:], layers.dropout(x[5:], 0.4, keys[5:]))
    assert 0.4 < float(jnp.mean(whole > 0)) < 0.8 and np.allclose(np.unique(whole), [0, 1 / 0.6])


@pytest.mark.parametrize("channels", [3, 30, 130])
def test_group_norm_refuses_uneven_widths(channels):
    with pytest.raises(UserError, match=f"{channels} channels"):
        layers.normalize(jnp.zeros((1, 2, 2, channels)), jnp.ones((1, channels)), jnp.zeros((1, channels)), False)


def test_what_is_materialized_is_made_once():
    """A CPU fuses nothing across, forward or backward; a GPU is not asked to do anything."""

    def loss(x):
        x = materialize(jnp.tanh(x) + 1)
        return jnp.sum(jnp.sin(x) * x)

    x = jnp.linspace(-1, 1, 64)
    plain = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.tanh(x) + 1) * (jnp.tanh(x) + 1)))
    np.testing.assert_allclose(jax.grad(loss)(x), plain(x), rtol=1e-5)
    traced = jax.jit(jax.grad(loss)).trace(x)
    assert traced.lower().compile().as_text().count('inlineable="false"') >= 2
    assert "inlineable" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def plain_convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("shape", "features"),
    [
        *(((2, 33, 20, 3), 6), ((1, 64, 8, 2), 6), ((2, 5, 5, 4), 6), ((2, 7, 10, 9), 3)),
        *(((2, 33, 20, 3), 10), ((1, 64, 8, 2), 10), ((2, 5, 5, 4), 10), ((4, 16, 18, 128), 160)),
    ],
)
def test_convolutions_and_their_derivatives_are_the_plain_ones(shape, features):
    """Up to the second order, as R1 needs; gradients of kernels from neighbours, where features are few, in strips that
    divide the height or not, and whole; and all by Winograd's transforms, which a CPU takes for the last shape."""
    x, tangent = jax.random.normal(jax.random.key(0), (2, *shape))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], features)) / (9 * shape[-1]) ** 0.5

    def numbers(conv):
        loss = lambda x, k: jnp.sum(jnp.tanh(conv(x, k)))  # noqa: E731
        along = lambda x, k: jnp.vdot(jax.grad(loss)(x, k), tangent)  # noqa: E731
        about_kernel = lambda x, k: jnp.sum(jnp.square(jax.grad(loss, 1)(x, k)))  # noqa: E731
        return [conv(x, kernel)] + [
            gradient for f in (loss, along, about_kernel) for gradient in jax.grad(f, (0, 1))(x, kernel)
        ]

    for ours, theirs in zip(numbers(convolution.convolve), numbers(plain_convolution), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


def test_wide_convolutions_are_exact_for_whole_numbers():
    """Winograd's transforms halve kernels, and add: of small integers nothing is rounded."""
    x, g, kernel = (
        jax.random.randint(jax.random.key(i), shape, -4, 5).astype(jnp.float32)
        for i, shape in enumerate([(4, 16, 20, 128), (4, 16, 20, 130), (3, 3, 128, 130)])
    )
    result, pullback = jax.vjp(plain_convolution, x, kernel)
    x_gradient, kernel_gradient = pullback(g)
    np.testing.assert_array_equal(convolution.convolve(x, kernel), result)
    np.testing.assert_array_equal(convolution.input_gradient(g, kernel), x_gradient)
    np.testing.assert_array_equal(convolution.kernel_gradient(x, g), kernel_gradient)


@pytest.mark.parametrize(
    ("px", "channels", "dtype", "on_cpu"),
    [
        (16, 64, "float32", 0),
        (16, 48, "float32", 3),
        (128, 128, "float32", 0),
        (128, 64, "float32", 2 + 16),  # the gradient of the kernel in strips
        (16, 128, "bfloat16", 3),
    ],
)
def test_only_a_cpu_convolves_by_transforms_and_only_wide_layers_in_float32(px, channels, dtype, on_cpu):
    x, kernel = jnp.zeros((4, px, px, channels), dtype), jnp.zeros((3, 3, channels, channels), dtype)
    traced = jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(convolution.convolve(x, k)), (0, 1))).trace(x, kernel)
    assert counts(traced, "stablehlo.convolution") == {"cpu": on_cpu, "cuda": 3, "tpu": 3}
    assert counts(traced, "@LayoutConstraint") == {"cpu": 0, "cuda": 0, "tpu": 6}  # of two images each


def test_pointwise_is_a_1x1_convolution():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 3, 4)), jax.random.normal(jax.random.key(1), (1, 1, 4, 7))
    np.testing.assert_allclose(
        convolution.pointwise(x, kernel), jnp.einsum("bhwc,cf->bhwf", x, kernel[0, 0]), rtol=1e-5
    )


def test_group_norm_is_that_of_its_definition():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 3, 12))
    gain, bias = jax.random.normal(jax.random.key(1), (2, 2, 12))
    groups = np.asarray(x, np.float64).reshape(2, 15, 3, 4)  # min(12 // 4, 32) groups
    centred = groups - groups.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    expected = normed * np.asarray(gain)[:, None, None] + np.asarray(bias)[:, None, None]
    np.testing.assert_allclose(layers.normalize(x, gain, bias, False), expected, atol=1e-5)
    np.testing.assert_allclose(layers.normalize(x, gain, bias, True), expected / (1 + np.exp(-expected)), atol=1e-5)


def test_group_norm_of_bfloat16_loses_nothing_by_its_single_pass():
    x = (20 + jax.random.normal(jax.random.key(0), (2, 16, 16, 32))).astype(jnp.bfloat16)
    gain, bias = jnp.ones((1, 32)), jnp.zeros((1, 32))
    expected = layers.normalize(x.astype(jnp.float32), gain, bias, False)
    np.testing.assert_allclose(layers.normalize(x, gain, bias, False), expected, atol=1e-4)  # x is rounded to 1 / 16

    constant = jnp.full((2, 7, 9, 12), 777, jnp.bfloat16)  # for which rounding leaves a variance of -0.06
    assert np.isfinite(layers.normalize(constant, gain[:, :12], bias[:, :12], False)).all()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("examples", [1, 2])  # of gain and bias
def test_gradients_of_group_norm_are_those_of_its_definition(examples, silu):
    """Of all arguments, and of the first gradients."""
    x, tangent = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 12))
    gain, bias = jax.random.normal(jax.random.key(1), (2, examples, 12))

    def definition(x, gain, bias):
        groups = x.reshape(2, 15, 3, 4)
        centred = groups - groups.mean((1, 3), keepdims=True)
        normed = (centred / jnp.sqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
        y = normed * gain[:, None, None] + bias[:, None, None]
        return y / (1 + jnp.exp(-y)) if silu else y

    def numbers(norm):
        loss = lambda *args: jnp.sum(jnp.sin(norm(*args)) * tangent)  # noqa: E731
        first = jax.grad(loss, (0, 1, 2))
        second = jax.grad(lambda *args: sum(jnp.vdot(d, jnp.cos(d)) for d in first(*args)), (0, 1, 2))
        return first(x, gain, bias) + second(x, gain, bias)

    for ours, theirs in zip(numbers(lambda *args: layers.normalize(*args, silu)), numbers(definition), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("rescale", [False, True])
def test_merge_is_a_rescaled_sum(rescale):
    x, h, g = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 3))
    y, pullback = jax.vjp(lambda x, h: layers.merge(x, h, rescale), x, h)
    scale = 0.5**0.5 if rescale else 1
    np.testing.assert_allclose(y, (x + h) * scale, rtol=1e-6, atol=1e-7)
    for gradient in pullback(g):
        np.testing.assert_allclose(gradient, g * scale, rtol=1e-6)


def test_group_norm_keeps_little_for_its_gradient():
    x, gain, bias = jnp.ones((2, 16, 16, 8)), jnp.ones((2, 8)), jnp.zeros((2, 8))
    _, pullback = jax.vjp(lambda *args: layers.normalize(*args, True), x, gain, bias)
    assert sum(kept.size for kept in jax.tree.leaves(pullback)) < 1.1 * x.size
