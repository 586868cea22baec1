"""The notebook: with a checkpoint from a bucket; and whole, in clean environments that it furnishes itself."""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from buckets import bucket  # noqa: F401
from commands import ROOT
from environments import ENVIRONMENTS, here, interpreter, of_day

NOTEBOOK = ROOT / "colab" / "ddgan_jax.ipynb"
PICTURES = {"samples", "samples_of_a_class", "trajectory", "vary", "edit", "trained", "shapes"}


def cells():
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def check_results(folder, pictures=PICTURES):
    """Grids that people look at, and a zip with them and 100 single pictures."""
    assert {path.stem for path in (folder / "ddgan_jax_results").glob("*.png")} == pictures
    with zipfile.ZipFile(folder / "ddgan_jax_images.zip") as archive:
        names = set(archive.namelist())
    assert {f"{name}.png" for name in pictures} | {f"{i:06d}.png" for i in range(100)} == names


def test_it_is_committed_with_the_outputs_of_its_cells():
    """In order, without a fault, with nothing of the machine that ran it; CONTRIBUTING.md says how they are made."""
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(PICTURES)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(tmp|root|home|work)\b", "".join("".join(output.get("text", "")) for output in outputs))
    assert NOTEBOOK.stat().st_size < 500_000


def run_cells(code, folder, env):
    """Run code of cells in a plain process, in `folder`."""
    command = [sys.executable, "-c", "\n".join(code)]
    env = os.environ | env
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_a_checkpoint_from_a_bucket(tmp_path, bucket):  # noqa: F811
    """For an unconditional model that lies in a bucket and is read from there, without installing and training."""
    env = bucket.env | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    save = f"from test_model import workdir_of\nworkdir_of('{bucket.url}/notebook')"
    result = run_cells([save], tmp_path, env)
    assert result.returncode == 0, result.stderr
    code = ["import pathlib, subprocess, sys", *(cell for cell in cells()[1:] if "train(" not in cell)]
    code[1] = code[1].replace('MODEL = "mnist"', f'MODEL = "{bucket.url}/notebook/"')
    result = run_cells(code, tmp_path, env)
    assert result.returncode == 0, result.stderr
    assert f"{bucket.url}/notebook/: images of 8x8x1 in 4 network calls, no classes" in result.stdout
    check_results(tmp_path, PICTURES - {"trained", "shapes"})


def test_it_asks_for_the_project(tmp_path):
    """Outside of a checkout, as in Colab, the first cell ends in a sentence before anything is installed."""
    result = run_cells(cells()[:1], tmp_path, {})
    assert "Stop: Set SOURCE" in result.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_it_tells_what_does_not_fit(tmp_path):
    """A project that needs a JAX that is not installed is refused; JAX is not replaced."""
    wheel = tmp_path / "ddgan_jax-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        about = "Metadata-Version: 2.1\nName: ddgan_jax\nVersion: 9\nRequires-Dist: jax>=99\n"
        archive.writestr("ddgan_jax-9.dist-info/METADATA", about)
        archive.writestr(
            "ddgan_jax-9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("ddgan_jax-9.dist-info/RECORD", "")
    code = cells()[0].replace('SOURCE = ""', f'SOURCE = "{wheel}"')
    result = run_cells([code], tmp_path, {"PIP_NO_INDEX": "1"})
    assert "Stop: The project does not fit" in result.stderr.strip().splitlines()[-1]
    assert "ddgan-jax" in result.stdout and "jax>=99" in result.stdout


def test_one_environment_a_day():
    """Both in two days whatever the machine has, all on Sundays, never none."""
    monday = datetime.date(2026, 8, 3)
    days = [monday + datetime.timedelta(i) for i in range(7)]
    both = ["colab", "newest"]
    assert [of_day(day, both) for day in days[:2]] == [["newest"], ["colab"]]
    assert of_day(days[6], both) == of_day(monday, both, everything=True) == both
    for found in (["colab"], ["newest"], ["present"]):
        assert all(of_day(day, found) == found for day in days)


def test_what_is_installed_is_what_requirements_name():
    """The package, installed for the notebook, asks for a part of requirements.txt, at the same versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["project"]["dependencies"]) <= set((ROOT / "requirements.txt").read_text().split("\n"))
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "ddgan_jax").rglob("*.py")}
    packages = {name.replace(".", "/") for name in project["tool"]["setuptools"]["packages"]}
    assert packages == folders | {"ddgan_jax/configs"}


EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1] + "/ddgan_jax.ipynb", 4)
where = {"metadata": {"path": sys.argv[1]}}
nbclient.NotebookClient(notebook, timeout=1200, kernel_name="clean", resources=where).execute()
nbformat.write(notebook, sys.argv[1] + "/done.ipynb")
"""


USE_AFTERWARDS = """
import sys, flax, jax, numpy as np, ddgan_jax
model = ddgan_jax.load(sys.argv[1])
call = jax.export.deserialize(bytearray(model.export())).call
images = np.asarray(model.to_images(call(np.uint32(3), np.arange(10, dtype=np.int32), np.arange(10, dtype=np.int32))))
assert np.abs(images.astype(int) - model.sample(10, seed=3)).max() <= 1
print(jax.__version__, flax.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_whole_notebook(tmp_path, name):
    """A clean kernel of the environment: the notebook installs, shows a model that comes along, and trains one."""
    environment = ENVIRONMENTS[name]
    base = interpreter(environment.python)
    if base is None:
        pytest.skip(f"there is no python{environment.python} on PATH, nor among pyenv's versions")
    if name == "present" and name not in here():
        pytest.skip(f"there is an interpreter for: {', '.join(here())}")
    for part in ("ddgan_jax", "configs", "colab"):
        shutil.copytree(ROOT / part, tmp_path / "project" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path / "project" / part)
    folder = tmp_path / "project" / "colab"
    python = tmp_path / "venv" / "bin" / "python"
    env = os.environ | {"JUPYTER_PATH": str(tmp_path / "venv" / "share" / "jupyter")}
    env.pop("XLA_FLAGS", None)  # the tests' flags; the environment's XLA may not know them

    def run(*command):
        result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def installed():
        return set(run(python, "-m", "pip", "list", "--format=freeze").lower().split())

    run(base, "-m", "venv", str(tmp_path / "venv"))
    run(python, "-m", "pip", "install", "--quiet", *environment.preinstalled)
    run(python, "-m", "ipykernel", "install", "--prefix", str(tmp_path / "venv"), "--name", "clean")
    before = installed()
    result = subprocess.run([sys.executable, "-c", EXECUTE, str(folder)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    after = installed()
    assert before <= after, f"replaced: {before - after}"
    names = {line.partition("==")[0].replace("-", "_") for line in after}
    assert {"ddgan_jax", "flax", "gcsfs"} <= names
    assert not names & {"tensorflow", "tensorflow_cpu", "tensorboard", "clu", "torch"}
    outputs = [o for cell in json.loads((folder / "done.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(PICTURES)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "finished 2000 steps" in text and "images of 32x32x1 in 3 network calls, 10 classes" in text
    check_results(folder)
    versions = run(python, "-c", USE_AFTERWARDS, folder / "ddgan_jax_results" / "mnist").split()[-2:]
    if name == "colab":
        assert versions == ["0.7.2", "0.11.2"]
    results = json.loads((folder / "ddgan_jax_results" / "mnist" / "results.json").read_text())
    print(f"trained in {results['seconds']} s, jax {versions[0]}, flax {versions[1]}\n" + " ".join(sorted(after)))
