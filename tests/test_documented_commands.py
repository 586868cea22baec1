"""The blocks of commands and of Python in README and docs run as written, with small networks and few steps."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROGRAMS

import ddgan_jax

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(
    r"(\.venv/bin/)?(python|pip|git|gcloud|tfds|wandb|export|for|DATA|#!|JAX_)"
)  # other blocks are output
# What is left out, by words of a block, and why
LEFT_OUT = {
    "pip install|^JAX_": "changes the environment",
    "gcloud|google.colab|gs://|SBATCH": "needs a cluster or an account",
    "wandb sweep": "needs an account",
    "curl|git clone|load_dataset|hf://OWNER": "downloads",
    "tfds build|configs/(cifar10|celeba|lsun|stacked)|checkpoints/.step": "needs data that is downloaded",
    r"netG_1200.pth|content.pth": "needs weights of the reference, which tests/test_torch.py makes",
    "-m (benchmarks|experiments|pytest)": "takes long, and has tests of its own",
    "image_size=512": "takes long on a CPU",
    "onnxruntime": "tests/test_deployment.py has it in an environment of its own",
}
SMALL = {
    "generator.nf": 8,
    "generator.num_res_blocks": 1,
    "discriminator.ngf": 4,
    "train.batch_size": 8,
    "eval.online_samples": 64,
}
FLAGS = " ".join(f"'--config.{name}={value!r}'" for name, value in SMALL.items())
# The classifier of an evaluation takes minutes to train: a worse one does here.
JUDGE = """
import runpy, sys
from ddgan_jax.metrics import classifier, feature_networks
classifier.STEPS, feature_networks.MIN_ACCURACY = 20, dict.fromkeys(feature_networks.MIN_ACCURACY, 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# A `python` whose trainings are small; those that name a number of steps continue an earlier one.
SMALLER = f"""#!/bin/sh
case "$*" in
  main.py*--mode=evaluate*) set -- -c "{JUDGE}" "$@" ;;
  main.py*--mode=*) ;;
  main.py*train.num_steps=*) set -- "$@" {FLAGS} --config.train.num_steps=8 ;;
  main.py*) set -- "$@" {FLAGS} --config.train.num_steps=4 ;;
esac
exec {sys.executable} "$@"
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and text of each block of a page that runs here."""
    found = BLOCK.findall(PAGES[page].read_text())
    found = [(language, text) for language, text in found if language == "python" or COMMANDS.match(text)]
    return [block for block in found if not any(re.search(words, block[1]) for words in LEFT_OUT)]


def test_every_reason_to_leave_a_block_out_is_needed():
    text = "\n".join(block for page in PAGES.values() for _, block in BLOCK.findall(page.read_text()))
    assert [words for words in LEFT_OUT if not re.search(words, text, re.MULTILINE)] == []


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with what the pages name: a trained run, photos, a mask, features of one's own, and a `python`."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("documented")
    shutil.copy(ROOT / "main.py", folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SMALLER)
    python.chmod(0o755)
    rng = np.random.default_rng(0)
    for i in range(24):
        photo = Image.fromarray(rng.integers(0, 256, (36, 48, 3), np.uint8))
        (folder / "PHOTOS" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        photo.save(folder / "PHOTOS" / ("cat", "dog")[i % 2] / f"{i}.jpg")
    photo.save(folder / "photo.jpg")
    mask = np.zeros((36, 48), np.uint8)
    mask[:18] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "latents.npy", rng.standard_normal((16, 32, 32, 4), np.float32))
    features = [text for _, text in BLOCK.findall(PAGES["docs/evaluation.md"].read_text()) if "def thumbnails" in text]
    (folder / "my_features.py").write_text(features[0])
    run(folder, "python main.py --config=configs/mnist.py --workdir=runs/mnist")
    return folder


def run(folder: pathlib.Path, text: str) -> None:
    """Runs a block of commands in `folder`, with its `python`."""
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    env |= {"TFDS_DATA_DIR": str(folder / "data"), "WANDB_MODE": "offline", "JAX_COMPILATION_CACHE_DIR": PROGRAMS}
    done = subprocess.run(["bash", "-ec", text], cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_run_as_written(page, elsewhere, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(elsewhere, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "data"))
    small = {name.replace(".", "__"): value for name, value in SMALL.items()} | {"train__num_steps": 4}
    train = ddgan_jax.train
    monkeypatch.setattr(ddgan_jax, "train", lambda *data, **given: train(*data, **small | given))
    rng = np.random.default_rng(0)
    digit = rng.integers(0, 256, (8, 8, 1), np.uint8)
    names = {"array": digit, "known": np.arange(8)[:, None] < np.full(8, 4), "images": None, "labels": None}
    if page == "docs/train.md":
        names |= {"images": rng.integers(0, 256, (64, 8, 8), np.uint8), "labels": ["zebra", "ape"] * 32}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        else:
            run(folder, text.replace("num_samples=50000", "num_samples=1000"))  # minutes otherwise
