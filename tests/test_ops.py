"""Every fast operation against its reference, the references against their definitions, and the switch between them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, Golden, close_to_largest

from ddgan_jax.config import presets
from ddgan_jax.errors import UserError
from ddgan_jax.method.build import build, init_state
from ddgan_jax.method.train_step import make_train_step
from ddgan_jax.networks import ops
from ddgan_jax.networks.ops import fir, reference
from ddgan_jax.networks.ops.conv import input_gradient, kernel_gradient

KERNELS = {"1331": (1, 3, 3, 1), "121": (1, 2, 1), "1234_asym": (1, 2, 3, 4)}


def counts(traced, operation):
    """How often it is in the program for each platform."""
    platforms = ("cpu", "cuda", "tpu")
    return {name: traced.lower(lowering_platforms=(name,)).as_text().count(operation) for name in platforms}


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


# --- Fast and reference: values, first and second gradients -----------------------------------------------------


def images(*shape):
    """x [B, H, W, C], whose mean is not 0."""
    return 1 + 2 * jax.random.normal(jax.random.key(0), shape)


def conv_case(shape, features):
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], features)) / (9 * shape[-1]) ** 0.5
    return "conv", (images(*shape), kernel), {}


def norm_case(shape, examples, silu):
    gain, bias = jax.random.normal(jax.random.key(1), (2, examples, shape[-1]))
    return "group_norm", (images(*shape), gain, bias), {"silu": silu}


# {name: (operation, what it is differentiated by, the rest)}: every branch that a CPU can run, odd sizes too.
CASES = {
    # Gradients of kernels in strips that divide the height or not, and whole; and all by Winograd's transforms, for the
    # last shape.
    **{
        f"conv {shape} to {features}": conv_case(shape, features)
        for shape, features in [
            *(((2, 7, 10, 9), 3), ((1, 64, 8, 2), 10), ((2, 33, 20, 3), 10), ((2, 5, 5, 4), 10)),
            ((4, 16, 18, 64), 66),
        ]
    },
    "pointwise": ("pointwise", (images(2, 5, 3, 4), jax.random.normal(jax.random.key(1), (1, 1, 4, 7))), {}),
    **{
        f"{name} {options} by {kernel}": (name, (images(1, 7, 10, 2),), {"kernel": kernel} | options)
        for kernel in [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 4, 6, 4, 1)]
        for name, options in [
            ("fir_downsample", {}),
            ("fir_upsample", {}),
            ("fir_upsample", {"margin": 1}),
            ("fir_filter", {"pad": len(kernel)}),
        ]
    },
    **{
        f"group_norm {shape}, {examples} gains, silu={silu}": norm_case(shape, examples, silu)
        for shape, examples, silu in [((2, 5, 3, 12), 1, True), ((2, 5, 3, 12), 2, False), ((3, 4, 7, 160), 3, True)]
    },
    "add_shift": ("add_shift", (images(2, 5, 3, 4), jax.random.normal(jax.random.key(1), (2, 4))), {}),
    "materialize": ("materialize", (images(2, 5, 3, 4),), {}),
    "row_major": ("row_major", ({"kernel": images(3, 3, 5, 4), "bias": jnp.ones(4)},), {}),
}


TYPED = [
    (case, dtype)
    for case, (name, _, options) in CASES.items()
    for dtype in ("float32", "bfloat16")
    # FIR filters of all kernels have the same types.
    if dtype == "float32" or options.get("kernel", ops.FIR_KERNEL) == ops.FIR_KERNEL
]


def numbers(function, args):
    """[value, first gradients, second gradients] of it by all of `args`, the second along some direction."""
    everything = tuple(range(len(args)))
    wave = lambda result: jnp.sum(jnp.sin(result.astype(jnp.float32)))  # noqa: E731
    first = jax.grad(lambda *args: sum(map(wave, jax.tree.leaves(function(*args)))), everything)

    def along(*args):
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(first(*args))]
        return sum(jnp.vdot(x, jax.random.normal(jax.random.key(i), x.shape)) for i, x in enumerate(leaves))

    return function(*args), first(*args), jax.grad(along, everything)(*args)


@pytest.mark.parametrize(("case", "dtype"), TYPED)
def test_fast_form_equals_reference(case, dtype):
    name, args, options = CASES[case]
    cast = lambda i, arg: arg if i and name == "group_norm" else arg.astype(dtype)  # noqa: E731 gains are float32
    args = tuple(jax.tree.map(lambda x, i=i: cast(i, x), arg) for i, arg in enumerate(args))

    def found():
        return jax.jit(lambda *args: numbers(lambda *args: getattr(ops, name)(*args, **options), args))(*args)

    fast = found()
    with ops.use_reference():
        plain = found()
    # Of the largest number. bfloat16 has steps of 2^-8.
    tolerances = (1e-6, 1e-5, 2e-5) if dtype == "float32" else (0.01, 0.02, 0.04)
    for what, rtol, ours, theirs in zip(("value", "first", "second"), tolerances, fast, plain, strict=True):
        for i, (one, other) in enumerate(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)):
            assert one.dtype == other.dtype
            close_to_largest(one, other, rtol, f"{what} {i}")


# --- What the references are by definition ----------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", KERNELS)
def test_fir_resampling_equals_released_code(name, form):
    golden, kernel = Golden("ops"), KERNELS[name]
    x = golden.nhwc("x")
    np.testing.assert_allclose(nchw(ops.fir_upsample(x, kernel)), golden["upsample_2d/" + name], atol=1e-6)
    np.testing.assert_allclose(nchw(ops.fir_downsample(x, kernel)), golden["downsample_2d/" + name], atol=1e-6)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 4, 6, 4, 1)])
def test_fir_is_zero_insertion_and_convolution(kernel, form):
    """Upsampling is the textbook's, and downsampling its adjoint up to the factor 4."""
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
    np.testing.assert_allclose(ops.fir_upsample(x, kernel), expected, atol=1e-5)
    if kernel == kernel[::-1] and len(kernel) % 2 == 0:
        y = np.random.default_rng(1).normal(size=(1, 3, 5, 2)).astype(np.float32)
        left, right = jnp.vdot(ops.fir_downsample(x, kernel), y), jnp.vdot(x, ops.fir_upsample(y, kernel)) / 4
        np.testing.assert_allclose(left, right, rtol=1e-4)


def test_fir_keeps_constants_inside(form):
    x = jnp.ones((1, 8, 8, 3))
    np.testing.assert_allclose(ops.fir_downsample(x)[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(ops.fir_upsample(x)[:, 2:-2, 2:-2], 1, rtol=1e-6)
    assert ops.fir_downsample(jnp.ones((1, 7, 9, 1))).shape == (1, 3, 4, 1)


def test_pointwise_is_a_matrix_product(form):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 3, 4)), jax.random.normal(jax.random.key(1), (1, 1, 4, 7))
    np.testing.assert_allclose(ops.pointwise(x, kernel), jnp.einsum("bhwc,cf->bhwf", x, kernel[0, 0]), rtol=1e-5)


def test_group_norm_is_that_of_its_definition(form):
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 3, 12))
    gain, bias = jax.random.normal(jax.random.key(1), (2, 2, 12))
    groups = np.asarray(x, np.float64).reshape(2, 15, 3, 4)  # min(12 // 4, 32) groups
    centred = groups - groups.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    expected = normed * np.asarray(gain)[:, None, None] + np.asarray(bias)[:, None, None]
    np.testing.assert_allclose(ops.group_norm(x, gain, bias), expected, atol=1e-5)
    np.testing.assert_allclose(ops.group_norm(x, gain, bias, True), expected / (1 + np.exp(-expected)), atol=1e-5)


@pytest.mark.parametrize("channels", [3, 30, 130])
def test_group_norm_refuses_uneven_widths(channels, form):
    with pytest.raises(UserError, match=f"{channels} channels"):
        ops.group_norm(jnp.zeros((1, 2, 2, channels)), jnp.ones((1, channels)), jnp.zeros((1, channels)))


# --- What the fast forms gain, and where ------------------------------------------------------------------------


def test_wide_convolutions_are_exact_for_whole_numbers():
    """Winograd's transforms halve kernels, and add: of small integers nothing is rounded."""
    x, g, kernel = (
        jax.random.randint(jax.random.key(i), shape, -4, 5).astype(jnp.float32)
        for i, shape in enumerate([(4, 16, 20, 128), (4, 16, 20, 130), (3, 3, 128, 130)])
    )
    result, pullback = jax.vjp(reference.conv, x, kernel)
    x_gradient, gradient = pullback(g)
    np.testing.assert_array_equal(ops.conv(x, kernel), result)
    np.testing.assert_array_equal(input_gradient(g, kernel), x_gradient)
    np.testing.assert_array_equal(kernel_gradient(x, g), gradient)


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
    traced = jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(ops.conv(x, k)), (0, 1))).trace(x, kernel)
    assert counts(traced, "stablehlo.convolution") == {"cpu": on_cpu, "cuda": 3, "tpu": 3}
    assert counts(traced, "@LayoutConstraint") == {"cpu": 0, "cuda": 0, "tpu": 6}  # of two images each


def test_only_a_cpu_multiplies_matrices_for_1x1_convolutions():
    traced = jax.jit(ops.pointwise).trace(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 1, 2, 3)))
    assert counts(traced, "stablehlo.convolution") == {"cpu": 0, "cuda": 1, "tpu": 1}


@pytest.mark.parametrize("before", [-1, 0, 2])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (1, 2), (2, 1)])
def test_fir_by_matrix_products_is_the_reference(up, down, before):
    """What a TPU runs, which this device can run as well, and its gradient."""
    x, options = images(2, 7, 10, 3), {"gain": 0.7, "up": up, "down": down, "before": before, "after": 3}
    fast, plain = (
        numbers(lambda x, form=form: form(x, (1, 2, -3, 4), **options), (x,))
        for form in (fir.products, reference.upfirdn)
    )
    for one, other in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        close_to_largest(one, other, 1e-5)


@pytest.mark.parametrize("resample", [ops.fir_downsample, ops.fir_upsample])
def test_only_a_tpu_resamples_by_matrix_products(resample):
    traced = jax.jit(jax.value_and_grad(lambda x: jnp.sum(resample(x)))).trace(jnp.zeros((1, 8, 8, 4)))
    products = counts(traced, "stablehlo.dot_general")
    assert products == {"cpu": 0, "cuda": 0, "tpu": 4}  # two axes, and two of the gradient


def test_group_norm_of_bfloat16_loses_nothing_by_its_single_pass():
    x = (20 + jax.random.normal(jax.random.key(0), (2, 16, 16, 32))).astype(jnp.bfloat16)
    gain, bias = jnp.ones((1, 32)), jnp.zeros((1, 32))
    expected = ops.group_norm(x.astype(jnp.float32), gain, bias).astype(jnp.bfloat16)
    difference = np.abs(ops.group_norm(x, gain, bias).astype(jnp.float32) - expected)
    assert np.mean(difference) < 1e-4 and np.max(difference) <= 2**-6  # a few are rounded to the other side

    constant = jnp.full((2, 7, 9, 12), 777, jnp.bfloat16)  # for which rounding leaves a variance of -0.06
    assert np.isfinite(ops.group_norm(constant, gain[:, :12], bias[:, :12])).all()


def test_what_is_materialized_is_made_once():
    """A CPU fuses nothing across, forward or backward; a GPU is not asked to do anything."""

    def loss(x):
        x = ops.materialize(jnp.tanh(x) + 1)
        return jnp.sum(jnp.sin(x) * x)

    x = jnp.linspace(-1, 1, 64)
    traced = jax.jit(jax.grad(loss)).trace(x)
    assert traced.lower().compile().as_text().count('inlineable="false"') >= 2
    assert "inlineable" not in traced.lower(lowering_platforms=("cuda",)).as_text()


# --- The table and the switch -----------------------------------------------------------------------------------


def test_every_reference_form_is_an_operation():
    public = {name for name, value in vars(reference).items() if getattr(value, "__module__", "") == reference.__name__}
    assert ops.OPERATIONS == {name for name in public if not name.startswith("_")} - {"num_groups"}
    assert ops.OPERATIONS <= set(ops.__all__)
    for name in ops.OPERATIONS:
        assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__


def test_the_switch_changes_functions_that_are_traced_already():
    """The networks of `build` and a whole step are traced again in the other form, and nothing fast is left in one."""
    method = build(presets.get("digits:smoke"))
    denoiser = method.denoiser
    x, t, z = jnp.zeros((1, *denoiser.image_shape)), jnp.zeros(1, jnp.int32), jnp.zeros((1, denoiser.nz))
    state, step = jax.eval_shape(lambda: init_state(method, 0)), jax.jit(make_train_step(method, 0, True))
    batch = jax.ShapeDtypeStruct((method.batch_size, *denoiser.image_shape), jnp.uint8)

    def words():
        """How often the programs hold what only fast forms have."""
        gen = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(denoiser.gen(p, x, t, z))))(state.gen_params)
        forward = jax.make_jaxpr(denoiser.gen)(state.gen_params, x, t, z)
        programs = map(str, (gen, forward, step.trace(state, batch).jaxpr))
        return [[text.count(word) for word in ("custom_vjp", "platform_index")] for text in programs]

    fast = words()
    with ops.use_reference():
        plain = words()
    assert words() == fast
    assert plain == [[0, 0]] * 3
    (_, in_gradient), (custom, in_forward), (_, in_step) = fast
    assert custom and in_forward and in_gradient > in_forward and in_step


def test_compiled_code_follows_the_switch():
    """One jitted function, called in both forms."""
    x, kernel = jnp.ones((1, 64, 8, 2)), jnp.ones((3, 3, 2, 10))
    traces = []

    @jax.jit
    def gradient(x, kernel):
        traces.append(ops.use_reference)
        return jax.grad(lambda k: jnp.sum(ops.conv(x, k)))(kernel)

    for _ in range(2):
        gradient(x, kernel)
        with ops.use_reference():
            gradient(x, kernel)
    assert len(traces) == 2  # each form once
    program = lambda: gradient.lower(x, kernel).as_text().count("stablehlo.convolution")  # noqa: E731
    fast = program()
    with ops.use_reference():
        assert program() == 1 < fast  # the kernel's gradient whole, and in strips


@pytest.mark.parametrize(("value", "expected"), [("reference", "False"), ("", "True"), ("fast", "True")])
def test_the_environment_chooses_the_form(value, expected):
    script = (
        "import jax, jax.numpy as jnp; from ddgan_jax.networks import ops; "
        "print('custom_vjp' in str(jax.make_jaxpr(ops.materialize)(jnp.ones(2))))"
    )
    env = os.environ | {"DDGAN_OPS": value}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_operations_are_chosen_one_by_one():
    """Of two operations with a fast form, one runs as the reference."""

    def is_fast():
        conv = jax.make_jaxpr(ops.conv)(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)))
        norm = jax.make_jaxpr(ops.group_norm)(jnp.ones((1, 4, 4, 4)), jnp.ones((1, 4)), jnp.ones((1, 4)))
        return ["custom_vjp" in str(program) for program in (conv, norm)]

    with ops.use_reference("conv", "upfirdn"):
        assert is_fast() == [False, True]
    with ops._form("reference:group_norm"):
        assert is_fast() == [True, False]
    assert is_fast() == [True, True]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("quick", "DDGAN_OPS=quick .*: it is fast, reference, portable"),
        ("fast:conv", "DDGAN_OPS=fast:conv .*: it is fast, reference, portable"),
        ("reference:cov", "no operation cov: they are add_shift, conv, "),
    ],
)
def test_an_unknown_form_is_one_sentence(form, message):
    with ops._form(form), pytest.raises(UserError, match=message):
        ops.conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)))
