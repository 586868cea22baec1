"""The notebook: its cells with a checkpoint from a bucket; and whole, in an environment that it furnishes itself."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from commands import ROOT
from test_model import workdir_of

NOTEBOOK = ROOT / "colab" / "ddgan_jax.ipynb"
PICTURES = {"samples", "samples_of_a_class", "trajectory", "vary", "edit"}


def cells():
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def check_results(folder):
    """Grids that people look at, and a zip with them and 100 single pictures."""
    assert {path.stem for path in (folder / "ddgan_jax_results").glob("*.png")} == PICTURES
    with zipfile.ZipFile(folder / "ddgan_jax_images.zip") as archive:
        names = set(archive.namelist())
    assert {f"{name}.png" for name in PICTURES} | {f"{i:06d}.png" for i in range(100)} == names


def test_it_is_committed_without_output():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_a_checkpoint_from_a_bucket(tmp_path):
    """All cells but the first, for an unconditional model; `gcloud` is a stand-in that copies from a folder."""
    bucket, tools = tmp_path / "bucket", tmp_path / "tools"
    workdir_of(bucket / "run")
    tools.mkdir()
    copy = f'#!/bin/sh\ntest "$1 $2 $3" = "storage cp --recursive" && cp -r "{bucket}/${{4#gs://bucket/}}" "$5"\n'
    (tools / "gcloud").write_text(copy)
    (tools / "gcloud").chmod(0o755)
    script = ["import pathlib, subprocess, sys", *cells()[1:]]
    script[1] = script[1].replace('CHECKPOINT = ""', 'CHECKPOINT = "gs://bucket/run/"')
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(script)]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "step 7: images of 8x8x1 in 4 network calls, no classes" in result.stdout
    check_results(tmp_path)


def test_what_is_installed_is_what_requirements_name():
    """The package, installed for the notebook, asks for a part of requirements.txt, at the same versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["project"]["dependencies"]) <= set((ROOT / "requirements.txt").read_text().split("\n"))
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "ddgan_jax").rglob("*.py")}
    assert {name.replace(".", "/") for name in project["tool"]["setuptools"]["packages"]} == folders | {"configs"}


EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1] + "/ddgan_jax.ipynb", 4)
where = {"metadata": {"path": sys.argv[1]}}
nbclient.NotebookClient(notebook, timeout=1200, kernel_name="clean", resources=where).execute()
nbformat.write(notebook, sys.argv[1] + "/done.ipynb")
"""


@pytest.mark.slow
def test_the_whole_notebook_in_an_environment_of_its_own(tmp_path):
    """A clean kernel, with nothing but ipykernel: the notebook installs, trains on the digits and shows everything."""
    for part in ("ddgan_jax", "configs", "colab"):
        shutil.copytree(ROOT / part, tmp_path / "project" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path / "project" / part)
    folder = tmp_path / "project" / "colab"
    python = tmp_path / "venv" / "bin" / "python"
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(python, "-m", "pip", "install", "--quiet", "ipykernel")
    run(python, "-m", "ipykernel", "install", "--prefix", str(tmp_path / "venv"), "--name", "clean")
    env = os.environ | {"JUPYTER_PATH": str(tmp_path / "venv" / "share" / "jupyter")}
    env.pop("XLA_FLAGS", None)
    result = subprocess.run([sys.executable, "-c", EXECUTE, str(folder)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    installed = run(python, "-m", "pip", "list").lower()
    assert "ddgan" in installed and "flax" in installed
    for name in ("tensorflow", "tensorboard", "clu ", "torch"):
        assert name not in installed
    outputs = [o for cell in json.loads((folder / "done.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(PICTURES)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "finished 1000 steps" in text and "images of 8x8x1 in 4 network calls, 10 classes" in text
    check_results(folder)
    results = json.loads((folder / "ddgan_jax_results" / "digits" / "results.json").read_text())
    print(f"trained in {results['seconds']} s")
