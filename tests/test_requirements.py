"""The packages that README installs exist for each platform and Python that README names."""

import subprocess
import sys

import pytest
from commands import ROOT

PLATFORMS = {
    "x86_64-unknown-linux-gnu": "tensorflow-cpu==",
    "aarch64-unknown-linux-gnu": "tensorflow==",
    "aarch64-apple-darwin": "tensorflow==",
}
PURE = ("promise",)  # without wheels, and without code to compile


def resolved(platform, python, *arguments):
    """The versions that an installation would take, from wheels alone."""
    wheels = ["--only-binary=:all:", *(f"--no-binary={name}" for name in PURE)]
    options = [f"--python-platform={platform}", f"--python-version={python}", *wheels]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if "Failed to fetch" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_requirements_resolve(platform, python):
    found = resolved(platform, python, "requirements.txt")
    assert f"\n{PLATFORMS[platform]}" in found and "\njax==" in found
    core = resolved(platform, python, "pyproject.toml")
    assert "\njax==" in core and "tensorflow" not in core
