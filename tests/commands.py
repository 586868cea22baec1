"""main.py in a process of its own, as a user runs it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = "--config=configs/digits.py:smoke"


def command(*arguments, **options):
    """Arguments and options for subprocess that run main.py in the root of the project."""
    return [sys.executable, "main.py", *map(str, arguments)], dict(cwd=ROOT, text=True) | options


def run(*arguments, env=None):
    """Run main.py to its end; never raises for an exit code."""
    argv, options = command(*arguments)
    return subprocess.run(argv, **options, capture_output=True, env=os.environ | (env or {}), timeout=1800)
