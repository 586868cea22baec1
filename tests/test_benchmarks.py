"""The benchmarks as commands: what they print where they can measure, and what they say where they cannot."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from commands import run_module
from conftest import ROOT

from benchmarks import aot, digest, hlo

# As the compilers write them. For a GPU: a gradient by cuDNN, a product, what takes a slice and what updates one, and a
# loop. For a TPU: S(1) is the chip's own memory, which a copy in the background fills.
GPU_PROGRAM, TPU_PROGRAM = ((ROOT / "tests" / "programs" / f"{name}.hlo").read_text() for name in ("gpu", "tpu"))
CUDA = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
LIBTPU = importlib.util.find_spec("libtpu") is not None


def last_line(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gpu_says_that_there_is_none():
    done = run_module("benchmarks.gpu")
    assert last_line(done)["gpu"] is None
    assert "no GPU here" in done.stdout


def test_kernels_of_a_gpu_program():
    convolution, taken, product, put = hlo.kernels(GPU_PROGRAM)
    assert convolution.bytes == 2 * 128 * (4 + 6) + 2 * 9 * 4 * 6
    assert convolution.operations == {"bf16": 2 * 128 * 9 * 4 * 6}
    assert taken.bytes == 2 * 4 * 32 + 4  # the slice, not all 100 rows
    assert put.bytes == 2 * 4 * 32 + 4
    assert (product.times, product.bytes, product.operations) == (4, 4 * (32 + 16 + 32), {"highest": 2 * 32 * 4})
    assert (taken.operations, put.operations) == ({}, {})


def test_kernels_of_a_tpu_program():
    kernels = hlo.kernels(TPU_PROGRAM)
    size = 4 * 64 * 128
    assert [(k.is_copy, k.bytes, k.cycles) for k in kernels] == [(True, size, 0), (False, 0, 300), (False, size, 200)]


def test_kernels_of_what_is_compiled_here():
    """The matrix product is found, and the loop's body counted as often as it runs."""
    x = jnp.ones((16, 32))
    loop = jax.jit(lambda x, k: jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ k), x))
    kernels = hlo.kernels(loop.lower(x, jnp.ones((32, 32))).compile().as_text())
    assert sum(k.times * sum(k.operations.values()) for k in kernels) == 3 * 2 * 16 * 32 * 32
    assert all(k.bytes < 10 * x.size * 4 for k in kernels)


def test_the_model_adds_up_kernels_and_groups_them_by_module():
    class Program:
        def __init__(self, text):
            self.as_text = lambda: text

    gpu = aot.GPUS["h100"]
    found = aot.expected(Program(GPU_PROGRAM), gpu)
    assert found["kernels"] == 7
    assert found["ms"] == pytest.approx(7 * aot.LAUNCH * 1e3, rel=0.01)  # they do nearly nothing
    assert {group["module"]: group["kernels"] for group in found["groups"]} == {
        "Generator up_block conv": 4,
        "Discriminator stage conv, gradient": 1,
        "adam": 1,
        "copies": 1,
    }
    large = hlo.Kernel("", 1, False, int(3.352e12), {"bf16": 1e12}, 0)
    assert gpu.seconds(large) == pytest.approx(1, rel=1e-3)  # the bytes of a second take longer than the products
    assert aot.expected(Program(TPU_PROGRAM), aot.TPUS["v5e"])["ms"] == pytest.approx(500 / 1.5e6, rel=1e-3)


def test_hours_are_of_all_images_with_r1_now_and_then():
    ms = {"step": 100, "step with R1": 160}
    assert aot.hours(36_000, 15, 0.5, ms) == pytest.approx(36_000 * 0.5 * 0.104 / 3600)


@pytest.mark.parametrize(("name", "installed"), [("h100", CUDA), ("v5e:2x2", LIBTPU)])
def test_aot_compiles_for_what_is_not_there(name, installed):
    """Or says what to install."""
    done = run_module("benchmarks.aot", f"--target={name}", "--config=configs/gaussians.py:smoke", "--batch=8")
    if not installed:
        assert done.returncode == 2
        assert f"error: no compiler for {name} (pip install" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        pytest.skip(f"{name}: no compiler is installed")
    found = last_line(done)
    assert [row["program"] for row in found["programs"]] == list(aot.PROGRAMS)
    for row in found["programs"]:
        assert all(value > 0 for key, value in row.items() if key not in ("program", "groups", "gflop", "of_peak")), row
    assert found["hours_of_training"] > 0


def test_operations_run_in_their_plain_form_one_by_one():
    found = last_line(
        run_module(
            *("benchmarks.step", "--config=configs/gaussians.py:smoke", "--batch=8", "--runs=1"),
            *("--only=sampling", "--reference=adam,conv"),
        )
    )
    assert found["reference"] == "adam,conv" and list(found["programs"]) == ["sampling"]


def test_a_mistake_is_one_sentence():
    for mistake, right in (
        ("--batch=x", "--batch=x must be an integer"),
        ("--config.model.dtype=half", "it is float32 or bfloat16"),
        ("--reference=cov", "no operation cov"),
    ):
        done = run_module("benchmarks.step", mistake)
        assert done.returncode == 2
        assert right in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_digest_is_of_what_is_computed():
    """Not of how it is divided into functions, nor of what nobody uses."""

    def of(function):
        return digest.Graph(jax.jit(function).lower(jnp.ones(3), jnp.ones(3)).compiler_ir("stablehlo")).results()

    product = jax.jit(lambda x, y: x * y)
    plain = of(lambda x, y: jnp.sin(x * y) + x)
    assert of(lambda x, y: (x + jnp.sin(product(y, x)), jnp.cos(y))[0]) == plain
    for other in (lambda x, y: jnp.sin(x * y) + y, lambda x, y: jnp.cos(x * y) + x, lambda x, y: jnp.sin(x - y) + x):
        assert of(other) != plain


@pytest.mark.slow
def test_step_measures_all_programs():
    # Wide enough that random numbers, 2 % of the work of sampling with the smoke variant's 8 channels, do not count.
    flags = ("--config=configs/digits.py:smoke", "--config.generator.nf=32", "--batch=4", "--runs=1")
    found = last_line(run_module("benchmarks.step", *flags))
    assert list(found["programs"]) == ["step", "step with R1", "D", "D with R1", "G", "forward", "sampling"]
    for row in found["programs"].values():
        assert all(value > 0 for value in row.values()), row
    # A step is little more than its two phases, and sampling calls G once for each of three steps.
    gflop = {name: row["gflop"] for name, row in found["programs"].items()}
    assert gflop["step"] == pytest.approx(gflop["D"] + gflop["G"], rel=0.05)
    assert gflop["sampling"] == pytest.approx(3 * gflop["forward"], rel=0.01)


@pytest.mark.slow
def test_scaling_has_one_average_for_each_network():
    found = last_line(run_module("benchmarks.scaling", "--config=configs/digits.py:smoke", "--batch=32"))
    for row in found["layouts"]:
        devices = row["processes"] * row["devices_each"]
        if devices > 1:
            assert row["collectives"] == 2, row
            assert row["bytes"] == pytest.approx(sum(row["gradient_bytes"].values()), rel=0.01)
        else:
            assert row["collectives"] == 0
    work = {row["processes"] * row["devices_each"]: row["gflop_a_device"] for row in found["layouts"]}
    assert work[8] < 0.2 * work[1]


@pytest.mark.parametrize(
    "part, num, key", [("features", 300, "manifolds_s"), ("photos", 1, "photo_ms"), ("files", 64, "file_ms")]
)
def test_what_surrounds_the_step(part, num, key):
    done = run_module("benchmarks.around", f"--only={part}", f"--num={num}")
    assert last_line(done)[key] > 0
