"""main.py, a module, or a few lines of Python, in a process of its own."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = "--config=configs/digits.py:smoke"
POINTS = "--config=configs/gaussians.py:smoke"


def command(*arguments, **options):
    """Arguments and options for subprocess that run main.py in the root of the project."""
    return [sys.executable, "main.py", *map(str, arguments)], dict(cwd=ROOT, text=True) | options


def run(*arguments, env=None):
    """Run main.py to its end; never raises for an exit code."""
    argv, options = command(*arguments)
    return subprocess.run(argv, **options, capture_output=True, env=os.environ | (env or {}), timeout=1800)


def run_module(name, *arguments):
    """Run `python -m name` in the root of the project to its end; never raises for an exit code."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def python(script: str, *arguments) -> subprocess.Popen:
    """Start lines of Python in the root of the project."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
