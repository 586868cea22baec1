"""The benchmarks as commands: what they print where they can measure, and what they say where they cannot."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from commands import run_module

from benchmarks import digest


def last_line(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gpu_says_that_there_is_none():
    done = run_module("benchmarks.gpu")
    assert last_line(done)["gpu"] is None
    assert "no GPU here" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_tpu_says_what_to_install():
    done = run_module("benchmarks.tpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no compiler for v5e:4x4 (pip install libtpu)")
    assert "Traceback" not in done.stderr


def test_a_mistake_is_one_sentence():
    for mistake, right in (
        ("--batch=x", "invalid literal for int"),
        ("--config.model.dtype=half", "it is float32 or bfloat16"),
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
    found = last_line(run_module("benchmarks.step", "--config=configs/digits.py:smoke", "--batch=4", "--runs=1"))
    assert list(found["programs"]) == ["step", "step with R1", "D", "D with R1", "G", "forward", "sampling"]
    for row in found["programs"].values():
        assert all(value > 0 for value in row.values()), row
    # A step is little more than its two phases, and sampling calls G once for each of four steps.
    gflop = {name: row["gflop"] for name, row in found["programs"].items()}
    assert gflop["step"] == pytest.approx(gflop["D"] + gflop["G"], rel=0.05)
    assert gflop["sampling"] == pytest.approx(4 * gflop["forward"], rel=0.01)


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
