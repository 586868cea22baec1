"""Exported samplers where this package is not: the examples of docs/deployment.md, in environments of their own."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import ROOT
from environments import ENVIRONMENTS, known_flags
from test_model import workdir_of

import ddgan_jax
from ddgan_jax.model.sampler import default_labels, noise_of

pytestmark = pytest.mark.slow
OLDEST = [package for package in ENVIRONMENTS["colab"].preinstalled if "==" in package]  # that the package supports
CLASSES = {"plain": 0, "classes": 3}


def example(language):
    """The lines of docs/deployment.md that begin with an import of `language`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if f"import {language}" in block]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A function that makes an environment with these packages, and returns one that runs Python in it."""
    made = {}

    def make(*packages):
        if packages not in made:
            folder = tmp_path_factory.mktemp("environment")
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
            subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True, timeout=1200)
            made[packages] = folder / "bin" / "python"

        def run(cwd, *arguments):
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            env["XLA_FLAGS"] = known_flags(env["XLA_FLAGS"], str(made[packages]))
            command = [made[packages], *arguments]
            result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
            assert result.returncode == 0, result.stdout + result.stderr
            return result.stdout

        return run

    return make


@pytest.fixture(scope="module", params=CLASSES)
def model(request, tmp_path_factory):
    """A trained model, and the folder that holds it as own.safetensors."""
    folder = tmp_path_factory.mktemp(request.param)
    workdir = workdir_of(folder / "run", num_classes=CLASSES[request.param])
    found = ddgan_jax.load(str(workdir))
    found.save(folder / "own.safetensors")
    return found, folder


@pytest.mark.parametrize("writer", ["oldest", "newest"])
def test_for_jax(model, environment, writer):
    """Written with the oldest and with the newest jax, and read by the newest, which has little else."""
    found, folder = model
    own = environment(*(OLDEST if writer == "oldest" else []), str(ROOT))
    own(folder, "-m", "ddgan_jax", "--mode=export", "--checkpoint=own.safetensors", "--out=sampler.bin")
    code = example("jax.export")
    if found.num_classes:
        code = code.replace("jnp.arange(16))", "jnp.arange(16), jnp.arange(16) % 3)")
    last = "import numpy\nnumpy.save('images.npy', images)\nprint(sampler.fun_name)"
    told = environment("jax", "flatbuffers")(folder, "-c", f"{code}\n{last}")
    version = dict(package.split("==") for package in OLDEST)["jax"] if writer == "oldest" else jax.__version__
    assert told.strip() == f"sampler of jax {version}"
    np.testing.assert_allclose(np.load(folder / "images.npy"), found.trajectory(16).x_t[0], atol=1e-4)


@pytest.mark.parametrize("posterior", ["gaussian", "deterministic"])
def test_for_onnx(model, environment, posterior):
    """The example runs where nothing but an ONNX runtime is; the same draws give the same images."""
    found, folder = model
    options = ["--checkpoint=own.safetensors", "--out=sampler.onnx", f"--posterior={posterior}"]
    environment(f"{ROOT}[onnx]")(folder, "-m", "ddgan_jax", "--mode=export", *options)
    noise = noise_of(found.denoiser, np.uint32(0), np.arange(16))
    draws = {"x_T": noise.x_T, "z": noise.z, "noise": noise.posterior}
    if posterior == "deterministic":
        del draws["noise"]
    if found.num_classes:
        draws["labels"] = default_labels(3, np.arange(16))
    np.savez(folder / "draws.npz", **draws)
    code = example("onnxruntime").replace("% 10", "% 3")  # the classes of this model
    if found.num_classes:
        names = "json.loads(sampler.get_modelmeta().custom_metadata_map['classes'])"
        code += f"\nimport json\nassert {names} == ['0', '1', '2']"
    last = """
assert images.dtype == np.float32 and images.shape[0] == 16 and np.abs(images).max() <= 1, images.shape
np.save("images.npy", sampler.run(None, dict(np.load("draws.npz")))[0])"""
    environment("onnxruntime")(folder, "-c", code + last)
    expected = found.trajectory(16, posterior=posterior).x_t[0]
    np.testing.assert_allclose(np.load(folder / "images.npy"), expected, atol=1e-4)
