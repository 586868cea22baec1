"""main.py, a module, or a few lines of Python, in a process of its own; and comparisons of what runs leave."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from ddgan_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = "--config=configs/digits.py:smoke"
POINTS = "--config=configs/gaussians.py:smoke"
PARTS = 12  # of the longest tests in chaos/, so that each can be repeated by itself


def command(*arguments, **options):
    """Arguments and options for subprocess that run main.py in the root of the project."""
    return [sys.executable, "main.py", *map(str, arguments)], dict(cwd=ROOT, text=True) | options


def run(*arguments, env=None):
    """Run main.py to its end; never raises for an exit code."""
    argv, options = command(*arguments)
    return subprocess.run(argv, **options, capture_output=True, env=os.environ | (env or {}), timeout=1800)


def succeed(*arguments, env=None):
    """Run main.py, which must end with exit code 0."""
    result = run(*arguments, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def run_module(name, *arguments):
    """Run `python -m name` in the root of the project to its end; never raises for an exit code."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def python(script: str, *arguments, env=None) -> subprocess.Popen:
    """Start lines of Python in the root of the project."""
    command, env = [sys.executable, "-c", script, *map(str, arguments)], os.environ | (env or {})
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_python(script: str, *arguments, env=None) -> str:
    """Run lines of Python, which must end with exit code 0; returns their standard output."""
    child = python(script, *arguments, env=env)
    output, errors = child.communicate(timeout=240)
    assert child.returncode == 0, output + errors
    return output


def contents(folder) -> dict[str, bytes]:
    """{path below the folder: content} of all its files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def final(workdir):
    """The arrays of the last checkpoint."""
    return checkpoint.read(checkpoint.find(str(workdir)))[0]


def assert_same(workdir, other):
    """The last checkpoints are equal to the bit."""
    ours, theirs = final(workdir), final(other)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


def assert_close(workdir, other):
    """The last checkpoints are equal up to rounding, see assert_arrays_close."""
    assert_arrays_close(final(workdir), final(other))


def assert_arrays_close(ours, theirs):
    """{path: array} of two checkpoints are finite and equal to 1e-5; Adam's moments, to 1e-4 of their largest.

    The gradient of D's last bias is a difference of means of sigmoids, and as exact as these, however small it is.
    """
    assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
    for path, array in ours.items():
        assert array.shape == theirs[path].shape and np.isfinite(theirs[path]).all(), path
        tolerance = 1e-4 * np.abs(theirs[path]).max() if "_opt/" in path else 1e-5
        if path.startswith("disc_opt/") and path.endswith("/out/bias"):
            tolerance = 1e-7
        np.testing.assert_allclose(array, theirs[path], rtol=0, atol=tolerance, err_msg=path)


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def with_devices(count, env=os.environ):
    """Variables of a process with so many CPU devices, which compiles as this one does."""
    flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start_group(count, *arguments, devices=1, own=None, script="", env=None, python=sys.executable):
    """Start main.py in `count` processes that are joined over loopback, with so many CPU devices each.

    `own` are further arguments of single ones, {index: [...]}; `script`, lines of Python, runs before in each; `env`
    are further variables of all; `python` is the interpreter.
    """
    address, started = f"127.0.0.1:{free_port()}", []
    for index in range(count):
        group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        env_of = os.environ | (env or {}) | (group if count > 1 else {})
        env_of |= with_devices(devices, env_of)
        argv, options = command(*arguments, *(own or {}).get(index, []), env=env_of)
        argv[0] = str(python)
        if script:
            argv[1:2] = ["-c", f"{script}\nimport sys, main\nsys.argv[0] = 'main.py'\nsys.exit(main.main())"]
        started.append(subprocess.Popen(argv, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return started


def ends(processes, timeout=900):
    """[(exit code, output)] of started processes."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def all_succeed(processes):
    """The outputs of started processes, which must end with exit code 0."""
    codes, outputs = zip(*ends(processes), strict=True)
    assert not any(codes), "\n\n".join(outputs)
    return outputs


def read_until(process, text):
    """Read the output of a process up to a line with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed:\n{''.join(lines)}")
