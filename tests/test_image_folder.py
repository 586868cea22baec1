"""Folders and zips of images as people have them: every mode, every size, and everything that can be wrong."""

import io
import json
import pathlib
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
from commands import python
from PIL import Image, ImageFile

from ddgan_jax.data import decoding, image_folder
from ddgan_jax.data.sources import open_data
from ddgan_jax.errors import UserError


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def open_folder(path, cache, size=0, channels=0, max_bad_share=0.01):
    return image_folder.open_folder(str(path), size, channels, str(cache), max_bad_share)


def bomb():
    """A PNG whose header claims 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_images_come_back_as_they_are_with_their_classes(tmp_path):
    for i in range(6):
        save(tmp_path / "in" / ("cat" if i % 2 else "ant") / "deep" / f"{i}.png", noise(8, 8, i))
    images, labels, classes = open_folder(tmp_path / "in", tmp_path / "cache")
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8 and classes == ["ant", "cat"]
    assert list(labels) == [0, 0, 0, 1, 1, 1]
    for image, i in zip(images, (0, 2, 4, 1, 3, 5), strict=True):
        np.testing.assert_array_equal(image, noise(8, 8, i))


def test_a_second_start_reads_the_copy_and_a_change_makes_a_new_one(tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.png", noise(8, 8))
    first = open_folder(tmp_path / "in", tmp_path / "cache")[0]
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "_prepare", lambda *_: pytest.fail("decoded again"))
        np.testing.assert_array_equal(open_folder(tmp_path / "in", tmp_path / "cache")[0], first)
    save(tmp_path / "in" / "a.png", noise(8, 8, 1), compress_level=0)
    np.testing.assert_array_equal(open_folder(tmp_path / "in", tmp_path / "cache")[0][0], noise(8, 8, 1))
    assert open_folder(tmp_path / "in", tmp_path / "cache", size=4)[0].shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([(40, 40), (36, 50), (500, 41)], 32),
        ([(8, 8)], 8),
        ([(64, 100), (9, 9), (70, 64)], 64),
        ([(255, 300)], 128),
        ([(700, 600)], 256),
    ],
)
def test_size_from_the_images(tmp_path, sizes, expected):
    """The largest power of two not above the median shorter side, and at most 256."""
    for i, (width, height) in enumerate(sizes):
        save(tmp_path / "in" / f"{i}.png", noise(width, height))
    seen = image_folder.look(str(tmp_path / "in"), 0, 0, str(tmp_path / "cache"))
    assert seen == (len(sizes), expected, 3, [""])
    assert open_folder(tmp_path / "in", tmp_path / "cache")[0].shape == (len(sizes), expected, expected, 3)


def test_a_larger_size_is_asked_for(tmp_path):
    save(tmp_path / "in" / "a.png", noise(520, 530))
    assert open_folder(tmp_path / "in", tmp_path / "cache", size=512)[0].shape == (1, 512, 512, 3)


def test_looking_decodes_nothing_and_is_remembered(tmp_path, monkeypatch):
    """Headers alone: also those behind a long comment, and of files whose pixels are damaged."""
    for i in range(4):
        save(tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg", noise(70, 300, i), comment=b"x" * 60_000 * (i % 2))
    save(tmp_path / "in" / "a" / "long.jpg", noise(70, 300), icc_profile=b"x" * 200_000)
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG")
    (tmp_path / "in" / "cut.jpg").write_bytes(buffer.getvalue()[:-400])
    (tmp_path / "in" / "text.png").write_text("I am not an image")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    seen = image_folder.look(str(tmp_path / "in"), 0, 0, str(tmp_path / "cache"))
    assert seen == (6, 64, 3, ["", "a", "b"])
    assert not [path for path in (tmp_path / "cache" / "image_folder").iterdir() if path.is_dir()]
    monkeypatch.setattr(image_folder, "look_at", lambda *_: pytest.fail("looked again"))
    assert image_folder.look(str(tmp_path / "in"), 32, 1, str(tmp_path / "cache")) == (6, 32, 1, ["", "a", "b"])


def test_no_file_is_an_image(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, noise(1, 1))
    with pytest.raises(UserError, match=r"2 of 2 files in .* were skipped \(the first, a.png: 1x1 pixels are too few"):
        open_folder(tmp_path / "in", tmp_path / "cache")


def test_the_centre_is_cut_out_and_shrunk_without_aliasing(tmp_path):
    left_and_right = np.zeros((32, 96, 3), np.uint8)
    left_and_right[:, :32], left_and_right[:, 64:] = 255, 255
    left_and_right[:, 32:64] = 10
    save(tmp_path / "in" / "wide.png", left_and_right)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # at half the size, nearest neighbours would show only black or only white
    save(tmp_path / "in" / "stripes.png", stripes)
    images = open_folder(tmp_path / "in", tmp_path / "cache", size=16)[0]
    assert np.abs(images[0, :, 2:-2].astype(int) - 127).max() <= 3
    assert (images[1] == 10).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F", "palette alpha"]
)
def test_every_mode(tmp_path, mode):
    """A picture of one grey, 200, in any mode is that grey; what is transparent is white."""
    grey = Image.new("L", (8, 8), 200)
    name = "x.png"
    if mode == "1":
        image, expected = Image.new("1", (8, 8), 1), 255
    elif mode == "I;16":
        image, expected = Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)), 200
    elif mode == "I":
        image = Image.fromarray(np.full((8, 8), 200 * 257, np.int32))
        np.testing.assert_array_equal(decoding.to_eight_bits(image), np.full((8, 8), 200))
        return
    elif mode == "RGBA" or mode == "LA":
        image = grey.convert(mode)
        image.putalpha(0)
        expected = 255
    elif mode == "palette alpha":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.info["transparency"] = 1
        expected = 255
    elif mode in ("CMYK", "YCbCr"):
        image, expected, name = grey.convert("RGB").convert(mode), 200, "x.jpg"
    elif mode == "F":  # no file type that is read here holds these two
        np.testing.assert_array_equal(decoding.to_eight_bits(grey.convert("F")), np.full((8, 8), 200))
        return
    else:
        image, expected = grey.convert(mode), 200
    save(tmp_path / "in" / name, image)
    images = open_folder(tmp_path / "in", tmp_path / "cache", channels=3)[0]
    assert np.abs(images.astype(int) - expected).max() <= 2, images[0, 0, 0]


def test_grey_and_colour(tmp_path):
    save(tmp_path / "grey" / "a.png", noise(8, 8)[..., 0])
    assert open_folder(tmp_path / "grey", tmp_path / "cache")[0].shape == (1, 8, 8, 1)
    save(tmp_path / "grey" / "b.png", noise(8, 8))
    assert open_folder(tmp_path / "grey", tmp_path / "cache")[0].shape == (2, 8, 8, 3)
    assert open_folder(tmp_path / "grey", tmp_path / "cache", channels=1)[0].shape == (2, 8, 8, 1)


def test_exif_orientation_and_the_first_frame(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    save(tmp_path / "in" / "a.png", image, exif=exif)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    save(tmp_path / "in" / "b.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    images = open_folder(tmp_path / "in", tmp_path / "cache")[0]
    assert (images[0, :8] == 0).all() and (images[0, 8:] == 255).all()
    assert (images[1] == (255, 0, 0)).all()


def test_bad_files_are_skipped_and_listed(tmp_path, capsys):
    folder = tmp_path / "in"
    for i in range(20):
        save(folder / f"good {i} é.png", noise(8, 8, i))
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[:-400])
    (folder / "text.png").write_text("I am not an image")
    (folder / "zero.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bomb())
    save(folder / "dot.png", noise(1, 1))
    secret = tmp_path / "secret.png"
    save(secret, noise(8, 8))
    (folder / "link.png").symlink_to(secret)
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.png").symlink_to(folder / "missing.png")
    with pytest.raises(UserError, match=r"7 of 27 files .* more than data.max_bad_share=0.01 allows"):
        open_folder(folder, tmp_path / "cache")
    images, labels, classes = open_folder(folder, tmp_path / "cache", max_bad_share=0.5)
    assert images.shape == (20, 8, 8, 3) and len(labels) == 20 and classes == [""]
    assert "7 of 27 files" in capsys.readouterr().out
    (report,) = (tmp_path / "cache" / "image_folder").glob("*/skipped.json")
    reasons = json.loads(report.read_text())
    expected = {
        "cut.jpg": "damaged",
        "text.png": "not an image",
        "zero.png": "empty",
        "bomb.png": "claims more than",
        "dot.png": "too few",
        "link.png": "outside the folder",
        "nowhere.png": "No such file",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], reasons[name]


def test_an_unreadable_file(tmp_path, monkeypatch):
    """By a refusing read, since a test may run as the superuser, who may read everything."""
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, noise(8, 8))
    read = pathlib.Path.read_bytes

    def refuse(path):
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    assert len(open_folder(tmp_path / "in", tmp_path / "cache", max_bad_share=0.5)[0]) == 1


def test_a_zip(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for name in ("a/x.png", "a/y.png", "b/z.PNG", "__MACOSX/a/x.png", "a/.hidden.png", "notes.txt", "../evil.png"):
            file.writestr(name, buffer.getvalue())
    with pytest.raises(UserError, match=r"1 of 4 files .* points outside the zip"):
        open_folder(tmp_path / "in.zip", tmp_path / "cache")
    images, labels, classes = open_folder(tmp_path / "in.zip", tmp_path / "cache", max_bad_share=0.3)
    assert images.shape == (3, 8, 8, 3) and [classes[label] for label in labels] == ["a", "a", "b"]
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("content", [None, "", "text"])
def test_a_folder_without_images(tmp_path, content):
    path = tmp_path / "in"
    if content is not None:
        path.mkdir()
    if content:
        (path / "notes.txt").write_text(content)
    with pytest.raises(UserError, match="does not exist" if content is None else "no image in"):
        open_folder(path, tmp_path / "cache")
    (tmp_path / "file.zip").write_text("no zip")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        open_folder(tmp_path / "file.zip", tmp_path / "cache")


def write_lmdb(path, values):
    import lmdb

    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)


def encoded(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def test_an_lmdb_as_lsun_is_published(tmp_path):
    """Keys in order, WebP values; nothing is written beside them, and the released code's part is a split."""
    folder = tmp_path / "data" / "lsun" / "church_outdoor_train_lmdb"
    folder.mkdir(parents=True)
    write_lmdb(folder, {f"{i:040x}": encoded(noise(12, 8, i), "WEBP") for i in range(8)} | {"f": b"no image"})
    (folder / "lock.mdb").unlink()
    images, labels, classes = open_folder(folder, tmp_path / "cache", max_bad_share=0.2)
    assert images.shape == (8, 8, 8, 3) and not labels.any() and classes == [""]
    for i in range(8):
        np.testing.assert_array_equal(images[i], noise(12, 8, i)[:, 2:10])
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]
    data = open_data("lsun_church", "train[:5]", str(tmp_path / "data"), max_bad_share=0.2)
    np.testing.assert_array_equal(data.images, images[:5])
    assert data.labels is None


def test_an_lmdb_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be read as an LMDB"):
        open_folder(tmp_path, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="run `pip install lmdb`"):
        open_folder(tmp_path, tmp_path / "cache")


def test_splits_and_labels(tmp_path):
    for i in range(10):
        save(tmp_path / "in" / ("cat" if i > 6 else "ant") / f"{i}.png", noise(8, 8, i))
    whole = open_data("image_folder", dir=str(tmp_path), path=str(tmp_path / "in"))
    assert whole.classes == ("ant", "cat") and list(whole.labels()) == [0] * 7 + [1] * 3
    for split, part in (("train[:3]", slice(3)), ("train[80%:]", slice(8, 10)), ("train[2:50%]", slice(2, 5))):
        data = open_data("image_folder", split, str(tmp_path), path=str(tmp_path / "in"))
        np.testing.assert_array_equal(data.images, whole.images[part])
        np.testing.assert_array_equal(data.labels(), whole.labels()[part])
    for split in ("test", "train[:", "train[a:]"):
        with pytest.raises(UserError, match="has no split"):
            open_data("image_folder", split, str(tmp_path), path=str(tmp_path / "in"))


OPEN = """
import os, pathlib, signal, sys, time
from ddgan_jax.data import image_folder
fit, seen = image_folder.fit, []
def counted(*arguments):
    seen.append(1)
    if len(seen) == 20 and sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)  # long enough for the other process to come
    return fit(*arguments)
image_folder.fit = counted
images = image_folder.open_folder(sys.argv[1], 0, 0, sys.argv[2])[0]
print(images.shape, int(images.sum()), len(seen))
"""


def test_two_at_once_and_one_that_was_killed(tmp_path):
    """What a killed process left is not believed but removed; the second of two waits for the copy of the first."""
    for i in range(50):
        save(tmp_path / "in" / f"{i}.png", noise(64, 64, i))
    total = sum(int(noise(64, 64, i).sum()) for i in range(50))
    folder, cache = tmp_path / "in", tmp_path / "cache" / "image_folder"
    killed = python(OPEN, folder, cache.parent, "killed")
    _, err = killed.communicate(timeout=60)
    assert killed.returncode == -9, err
    assert [path.name.split(".")[0] for path in cache.iterdir() if path.is_dir()] == ["incomplete"]
    children = [python(OPEN, folder, cache.parent, "whole") for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    found = sorted(out.splitlines()[-1] for out, _ in outputs)
    assert found == [f"(50, 64, 64, 3) {total} {n}" for n in (0, 50)], outputs
    assert sum("preparing the 50 files" in out and f"in {cache}/" in out for out, _ in outputs) == 1
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    assert not copy.name.startswith("incomplete")


def test_no_room_for_the_copy(tmp_path):
    save(tmp_path / "in" / "a.png", noise(8, 8))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written to .*; set data.dir"):
        open_folder(tmp_path / "in", tmp_path / "cache")
