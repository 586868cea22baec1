"""The commands with the oldest JAX that is allowed, one in the middle, and the newest: by one process and by two."""

import datetime
import json
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from commands import POINTS, ROOT, assert_arrays_close, ends, final, start_group
from environments import JAX, QUICKER, interpreter, jax_of_day, known_flags, parts_of_day


def test_one_version_a_day():
    days = [datetime.date(2026, 12, 1) + datetime.timedelta(i) for i in range(len(JAX))]
    assert sorted(name for day in days for name in jax_of_day(day)) == sorted(JAX)
    assert jax_of_day(days[0], everything=True) == list(JAX)


def test_the_longest_parts_run_in_four_days():
    of_ci = re.findall(r'\$parts = \*"?(.+?)"?\* \]\]', (ROOT / ".ci" / "run").read_text())
    for first in (datetime.date(2026, 12, 1), datetime.date(2026, 12, 30)):
        days = [parts_of_day(first + datetime.timedelta(days=i)) for i in range(4)]
        assert sorted(days) == [
            ["chaos"],
            ["documented commands", "deployment"],
            ["joined processes"],
            ["resumed runs"],
        ]
        assert parts_of_day(first, everything=True) == of_ci


def test_an_interpreter_gets_the_flags_that_it_knows(tmp_path):
    ignorant = tmp_path / "python"
    ignorant.write_text('#!/bin/sh\ncase "$XLA_FLAGS" in *fusion*) exit 1;; esac\n')
    ignorant.chmod(0o755)
    assert known_flags(f"--xla_a=1 {QUICKER}", str(ignorant)) == "--xla_a=1"
    ignorant.write_text("#!/bin/sh\n")
    assert known_flags(f"--xla_b=1 {QUICKER}", str(ignorant)) == f"--xla_b=1 {QUICKER}"


@pytest.fixture(params=JAX)
def python(request, tmp_path):
    """An interpreter in an environment that has this version and what the package depends on."""
    version = JAX[request.param]
    environment = tmp_path / "environment"
    subprocess.run([interpreter(version.python) or sys.executable, "-m", "venv", environment], check=True, timeout=300)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    install = [environment / "bin" / "pip", "install", "--quiet", *version.preinstalled, *needed]
    subprocess.run(install, check=True, timeout=1200)
    found = environment / "bin" / "python"
    show = "import sys, flax, jax; print(sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
    print(subprocess.run([found, "-c", show], check=True, capture_output=True, text=True, timeout=300).stdout)
    return found


@pytest.mark.slow
def test_two_processes_do_as_one(python, tmp_path):
    """Train, resume, sample and evaluate: the same checkpoints up to rounding, the same samples bit for bit."""
    flags = {"XLA_FLAGS": known_flags(os.environ["XLA_FLAGS"], str(python))}

    def run(count, *arguments):
        quiet = "--config.log.tensorboard=False", "--config.checkpoint.every=4"
        programs = f"--compilation_cache={tmp_path}/cache"
        found = ends(start_group(count, POINTS, *quiet, *arguments, programs, python=python, env=flags))
        assert not any(code for code, _ in found), "\n\n".join(output for _, output in found)
        return found[0][1]

    states, samples, results = [], [], []
    for count in (1, 2):
        workdir, out = f"--workdir={tmp_path / str(count)}", tmp_path / f"of_{count}"
        assert "finished 4 steps" in run(count, workdir, "--config.train.num_steps=4")
        output = run(count, workdir)
        assert "resuming from step 4" in output and "finished 8 steps" in output, output
        states.append(final(tmp_path / str(count)))
        trained = f"--workdir={tmp_path / '1'}"
        run(count, trained, "--mode=sample", "--num_samples=301", f"--out={out}.npz")
        samples.append(np.load(f"{out}.npz")["images"])
        run(count, trained, "--mode=evaluate", "--num_samples=500", f"--out={out}")
        results.append(json.loads((out / "results.json").read_text()))
    assert_arrays_close(*states)
    np.testing.assert_array_equal(*samples)
    for name in ("modes", "high_quality", "total_variation", "num_samples"):
        assert results[0][name] == results[1][name]
