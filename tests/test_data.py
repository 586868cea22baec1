"""The order of the images, and what happens to data that is missing, half written, or of another format or shape."""

import itertools
import pathlib
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from ddgan_jax.data.batches import batch_indices, batches, order
from ddgan_jax.data.sources import open_images
from ddgan_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def take(images, count, start_step=0, process=0, processes=1, batch=12, seed=3):
    parts = batches(
        images, global_batch=batch, seed=seed, start_step=start_step, process_index=process, process_count=processes
    )
    return list(itertools.islice(parts, count))


def python(script: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_every_image_exactly_once_an_epoch(batch):
    n = 10
    stream = np.concatenate([batch_indices(step, n, batch, seed=5) for step in range(3 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    for e in range(3):
        np.testing.assert_array_equal(epochs[e], order(n, 5, e))


def test_order_depends_on_seed_and_epoch():
    orders = [tuple(order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order_is_the_same_in_every_version():
    """A run resumes with the same data after an upgrade of NumPy."""
    assert order(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_late_steps_do_not_overflow():
    assert batch_indices(2**40, 50_000, 4096, seed=0).shape == (4096,)


def test_batches_are_the_indexed_images():
    images = open_images("synthetic", "train", None, (4, 4, 3))
    for step, batch in enumerate(take(images, 30)):
        assert batch.dtype == np.uint8
        np.testing.assert_array_equal(batch, images[batch_indices(step, len(images), 12, 3)])


def test_resume_equals_the_unbroken_run():
    images = np.arange(10)[:, None]
    unbroken = take(images, 9)
    for k in (1, 4, 8):
        np.testing.assert_array_equal(take(images, 9 - k, start_step=k), unbroken[k:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(processes):
    points = np.random.default_rng(0).normal(size=(10, 2))
    parts = [take(points, 5, process=p, processes=processes) for p in range(processes)]
    assert parts[0][0].shape == (12 // processes, 2)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), take(points, 5))


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="12 images does not divide by 5 processes"):
        take(np.zeros((10, 2)), 1, processes=5)
    with pytest.raises(UserError, match="0 images"):
        take(np.zeros((0, 2)), 1)


def test_synthetic_is_deterministic():
    images = open_images("synthetic", "train", None, (5, 6, 3))
    assert images.shape == (256, 5, 6, 3) and images.dtype == np.uint8 and images.std() > 60
    np.testing.assert_array_equal(images, open_images("synthetic", "train", None, (5, 6, 3)))


def test_import_and_synthetic_need_no_tensorflow():
    script = """
import sys
from ddgan_jax.data import batches, sources
images = sources.open_images("synthetic", "train", None, (4, 4, 1))
loaded = {"tensorflow", "tensorflow_datasets", "clu", "ml_collections", "grain", "sklearn"} & set(sys.modules)
assert not loaded, loaded
one = dict(seed=0, start_step=0, process_index=0, process_count=1)
assert next(batches.batches(images, global_batch=8, **one)).shape == (8, 4, 4, 1)
assert "tensorflow" not in sys.modules
"""
    child = python(script)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err


OPEN_DIGITS = """
import sys
from ddgan_jax.data.sources import open_images
images = open_images("digits", "train", sys.argv[1], (8, 8, 1))
print(images.shape, int(images.sum()), "tensorflow" in sys.modules)
"""
KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from ddgan_jax.data import digits, sources
generate = digits.Digits._generate_examples
def until_half(self):
    for i, example in generate(self):
        if i == 900:
            os.kill(os.getpid(), signal.SIGKILL)
        yield i, example
digits.Digits._generate_examples = until_half
sources.open_images("digits", "train", sys.argv[1], (8, 8, 1))
"""
# Both processes have seen an empty folder when the first of them renames its copy.
AFTER_THE_OTHER = """
import pathlib, sys, time
from ddgan_jax.data import digits, sources
generate = digits.Digits._generate_examples
def together(self):
    pathlib.Path(sys.argv[1], "here." + sys.argv[2]).touch()
    while len(list(pathlib.Path(sys.argv[1]).glob("here.*"))) < 2:
        time.sleep(0.01)
    yield from generate(self)
digits.Digits._generate_examples = together
print(int(sources.open_images("digits", "train", sys.argv[1], (8, 8, 1)).sum()))
"""


def all_digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory) -> str:
    """Prepared by another process, so that this one only reads."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    child = python(OPEN_DIGITS, folder)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert out.startswith(f"preparing digits (1,797 images) into {folder}, once\n(1797, 8, 8, 1)"), out
    assert len(out.splitlines()) == 2 and not err, out + err
    return folder


def test_digits_are_those_of_sklearn(digits_dir):
    images = open_images("digits", "train", digits_dir, (8, 8, 1))
    expected = all_digits()
    assert images.dtype == np.uint8 and images.shape == expected.shape and images.max() == 255
    # tfds shuffles what it writes: compare as sorted sets of rows
    np.testing.assert_array_equal(*(np.sort(x.reshape(1797, 64).view("V64"), axis=0) for x in (images, expected)))


def test_labels_stay_with_their_images(digits_dir):
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_digits

    label_of = {image.tobytes(): label for image, label in zip(all_digits(), load_digits().target, strict=True)}
    source = tfds.data_source("digits", split="train", data_dir=digits_dir, download=False)
    assert all(label_of[source[i]["image"].tobytes()] == source[i]["label"] for i in range(100))


def test_prepared_once_and_read_without_tensorflow(digits_dir, capfd):
    files = {path: path.stat().st_mtime_ns for path in pathlib.Path(digits_dir).rglob("*")}
    open_images("digits", "train", digits_dir, (8, 8, 1))
    start = time.perf_counter()
    images = open_images("digits", "train[:50%]", digits_dir, (8, 8, 1))
    assert time.perf_counter() - start < 3 and len(images) == 898
    assert capfd.readouterr() == ("", "")
    assert files == {path: path.stat().st_mtime_ns for path in pathlib.Path(digits_dir).rglob("*")}
    child = python(OPEN_DIGITS, digits_dir)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and out.split()[-1] == "False" and not err, out + err


def test_default_data_dir_is_that_of_tfds(digits_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)
    assert len(open_images("digits", "train", None, (8, 8, 1))) == 1797


def test_killed_in_the_middle(tmp_path):
    child = python(KILLED_IN_THE_MIDDLE, str(tmp_path))
    _, err = child.communicate(timeout=60)
    assert child.returncode == -9, err
    assert list(tmp_path.rglob("incomplete.*")), "killed too early or too late to show anything"
    child = python(OPEN_DIGITS, str(tmp_path))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert out.startswith("preparing") and f"(1797, 8, 8, 1) {all_digits().sum()}" in out


def test_two_processes_prepare_at_once(tmp_path):
    children = [python(AFTER_THE_OTHER, str(tmp_path), number) for number in "12"]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        assert out.splitlines()[0].startswith("preparing") and out.split()[-1] == str(all_digits().sum())
    assert not list(tmp_path.rglob("*incomplete*"))


def test_missing_dataset_names_the_command(tmp_path):
    command = f"`tfds build cifar10 --file_format=array_record --data_dir={tmp_path}`"
    with pytest.raises(UserError) as error:
        open_images("cifar10", "train", str(tmp_path), (32, 32, 3))
    assert command in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is downloaded or made"


@pytest.mark.parametrize("name", ["no_such_dataset", "mnist/no_such_config", "cifar10:9.9.9"])
def test_unknown_dataset(tmp_path, name):
    with pytest.raises(UserError, match=f"dataset {name} is not in {tmp_path}") as error:
        open_images(name, "train", str(tmp_path), (8, 8, 1))
    assert "\n" not in str(error.value)


def test_tfrecord_names_the_conversion(tmp_path):
    script = "import sys; from ddgan_jax.data.digits import Digits; Digits(data_dir=sys.argv[1]).download_and_prepare()"
    child = python(script, str(tmp_path))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    folder = tmp_path / "digits" / "1.0.0"
    command = f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`"
    with pytest.raises(UserError, match="stored as tfrecord, not array_record") as error:
        open_images("digits", "train", str(tmp_path), (8, 8, 1))
    assert command in str(error.value)


def test_wrong_shape_and_split(digits_dir):
    with pytest.raises(UserError, match=r"\(8, 8, 1\).*\(32, 32, 3\)"):
        open_images("digits", "train", digits_dir, (32, 32, 3))
    with pytest.raises(UserError, match="no split 'test': choose train"):
        open_images("digits", "test", digits_dir, (8, 8, 1))


def test_disk_full_while_preparing(tmp_path, monkeypatch):
    def prepare(data_dir):
        raise OSError(28, "No space left on device")

    # a stand-in, because the real one takes seconds to import TensorFlow
    monkeypatch.setitem(sys.modules, "ddgan_jax.data.digits", types.SimpleNamespace(prepare=prepare))
    with pytest.raises(UserError, match=r"cannot be prepared in .*No space left on device"):
        open_images("digits", "train", str(tmp_path), (8, 8, 1))


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ddgan_jax.data.digits", None)
    with pytest.raises(UserError, match="run `pip install -r requirements"):
        open_images("digits", "train", str(tmp_path), (8, 8, 1))
