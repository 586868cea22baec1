"""Folders, zips and LMDBs of images: every mode and size of image, and every kind of error."""

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import types
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from commands import contents, python, succeed
from conftest import preset_with
from etils import epath
from PIL import Image, ImageFile, ImageOps

from ddgan_jax.commands.progress import expected_time
from ddgan_jax.commands.train import train
from ddgan_jax.config.settings import DataConfig, read
from ddgan_jax.data import archives, copies, decoding, headers, prepared, preparing, resolve
from ddgan_jax.data import folder as folders
from ddgan_jax.data.resolve import resolve_from_data
from ddgan_jax.data.sources import Data, inspect, open_data
from ddgan_jax.devices import processes
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method.build import build
from ddgan_jax.metrics.evaluator import open_evaluator
from ddgan_jax.storage import downloads, paths


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def encoded(image, kind="PNG", **options):
    """The content of a file; `kind` is a format of Pillow."""
    buffer = io.BytesIO()
    save_options = {"lossless": True} | options if kind == "WEBP" else options
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **save_options)
    return buffer.getvalue()


def photos(folder, names, width=8, height=8):
    """Writes files of these names, or of this number, the i-th of which is noise of the seed i."""
    for i, name in enumerate([f"{i:02d}.png" for i in range(names)] if isinstance(names, int) else names):
        save(folder / name, noise(width, height, i))
    return folder


def open_folder(path, cache, size=None, channels=None, max_bad_share=0.01):
    images, labels, classes = prepared.open_folder(str(path), size, channels, str(cache), max_bad_share)
    return np.asarray(images), labels, classes


def inspect_files(path, cache, size=None, channels=None):
    """Returns the number of images, their shape and the classes, from headers alone."""
    return tuple(prepared.inspect(str(path), size, channels, str(cache)))


def png(width, height, bits, colour_type, pixels, further=()):
    """The content of a PNG file with any header, which may be wrong."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), *further, (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*content) for content in chunks)


def test_images_are_returned_unchanged_with_their_classes(tmp_path):
    photos(tmp_path / "in", (f"{'cat' if i % 2 else 'ant'}/deep/{i}.png" for i in range(6)))
    images, labels, classes = open_folder(tmp_path / "in", tmp_path / "cache")
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8 and classes == ["ant", "cat"]
    assert list(labels) == [0, 0, 0, 1, 1, 1]
    for image, i in zip(images, (0, 2, 4, 1, 3, 5), strict=True):
        np.testing.assert_array_equal(image, noise(8, 8, i))


def test_a_second_start_reads_the_copy_and_a_change_makes_a_new_one(tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.png", noise(8, 8))
    first = open_folder(tmp_path / "in", tmp_path / "cache")[0]
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "prepare", lambda *_: pytest.fail("decoded again"))
        np.testing.assert_array_equal(open_folder(tmp_path / "in", tmp_path / "cache")[0], first)
    save(tmp_path / "in" / "a.png", noise(8, 8, 1), compress_level=0)
    np.testing.assert_array_equal(open_folder(tmp_path / "in", tmp_path / "cache")[0][0], noise(8, 8, 1))
    assert open_folder(tmp_path / "in", tmp_path / "cache", size=4)[0].shape == (1, 4, 4, 3)


@pytest.mark.parametrize("kind", ["folder", "lmdb"])
def test_two_sets_of_equal_names_sizes_and_times_have_two_copies(tmp_path, kind):
    """Uncompressed files with different content can have equal names, sizes and times, for instance after unpacking."""
    for i, part in enumerate(("one", "two")):
        files = {f"{name}.bmp": encoded(noise(8, 8, name + 9 * i), "BMP") for name in range(3)} | {"bad.bmp": b"bad"}
        (tmp_path / part / "in").mkdir(parents=True)
        if kind == "lmdb":
            write_lmdb(tmp_path / part / "in", files)
        for name, content in files.items() if kind == "folder" else ():
            (tmp_path / part / "in" / name).write_bytes(content)
        for file in (tmp_path / part / "in").iterdir():
            os.utime(file, (1, 1))
        images = open_folder(tmp_path / part / "in", tmp_path / "cache", max_bad_share=0.5)[0]
        np.testing.assert_array_equal(images, [noise(8, 8, name + 9 * i) for name in range(3)])


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
    """The largest power of two not above the median shorter side, and at most 256, unless a size is set."""
    for i, (width, height) in enumerate(sizes):
        save(tmp_path / "in" / f"{i}.png", noise(width, height))
    seen = inspect_files(tmp_path / "in", tmp_path / "cache")
    assert seen == (len(sizes), (expected, expected, 3), [""])
    for size in (expected, 512 if expected == 256 else 4):
        found = open_folder(tmp_path / "in", tmp_path / "cache", size=None if size == expected else size)[0]
        assert found.shape == (len(sizes), size, size, 3)


def test_inspection_decodes_nothing_and_its_result_is_kept(tmp_path, monkeypatch):
    """It reads headers alone, including those behind a long comment and those of files with damaged pixels."""
    for i in range(4):
        save(tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg", noise(70, 300, i), comment=b"x" * 60_000 * (i % 2))
    save(tmp_path / "in" / "a" / "long.jpg", noise(70, 300), icc_profile=b"x" * 200_000)
    (tmp_path / "in" / "cut.jpg").write_bytes(encoded(noise(64, 64), "JPEG")[:-400])
    (tmp_path / "in" / "text.png").write_text("I am not an image")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    seen = inspect_files(tmp_path / "in", tmp_path / "cache")
    assert seen == (6, (64, 64, 3), ["", "a", "b"])
    assert not [path for path in (tmp_path / "cache" / "image_folder").iterdir() if path.is_dir()]
    monkeypatch.setattr(headers, "read_header", lambda *_: pytest.fail("read again"))
    assert inspect_files(tmp_path / "in", tmp_path / "cache", 32, 1) == (6, (32, 32, 1), ["", "a", "b"])


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
    """An image with the single grey value 200 keeps it in every mode; transparent parts become white."""
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
    elif mode == "F":  # no supported file format has this mode
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


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert (decoding.decode(animation, 16, 3) == (255, 0, 0)).all()


def exif_of(orientation):
    """EXIF metadata as a camera writes it."""
    exif = Image.Exif()
    exif.update({0x0112: orientation, 0x010F: "maker", 0x0110: "model", 0x011A: 72.0, 0x0132: "2020:01:01 00:00:00"})
    exif.get_ifd(0x8769).update({0x829A: 0.01, 0x927C: b"note" * 9})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(10))
def test_every_exif_orientation(orientation):
    """For valid metadata, the result equals that of Pillow's own function."""
    content = encoded(noise(12, 8), exif=exif_of(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decoding.open_image(content), expected)
    np.testing.assert_array_equal(decoding.decode(content, 8, 3), decoding.fit(expected, 8, 3))


def test_malformed_exif_costs_the_metadata_and_not_the_photo():
    """The orientation is used beside a tag whose type does not match its value. Random changes never raise an error."""
    good = exif_of(6)
    maker = good.index(struct.pack(">HH", 0x010F, 2))
    wrong = good[: maker + 2] + struct.pack(">H", 5) + good[maker + 4 :]  # text that is declared a fraction
    rng = np.random.default_rng(0)
    for i in range(300):
        exif = bytearray(wrong if i < 3 else good)
        for _ in range(0 if i < 3 else rng.integers(1, 5)):
            at = int(rng.integers(6, len(exif) - 2))
            exif[at : at + 2] = (b"\0\5", b"\xff\xff", b"\0\0", rng.bytes(2))[rng.integers(4)]
        content = encoded(Image.new("L", (12, 8), 200), ("JPEG", "PNG", "WEBP")[i % 3], exif=bytes(exif))
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of corrupt EXIF
            assert decoding.read_header(content)[0] == 8
            image = decoding.open_image(content)
        assert image.size == (8, 12) if i < 3 else set(image.size) == {8, 12}, exif
        assert np.abs(np.asarray(image).astype(int) - 200).max() < 5


def png_of(bits, values, hidden=None):
    """A grey PNG of two equal rows with `bits` bits per value, in which the value `hidden` is transparent."""
    row = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    transparent = () if hidden is None else ((b"tRNS", struct.pack(">H", hidden)),)
    return png(len(values), 2, bits, 0, (b"\0" + row) * 2, transparent)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_every_depth(bits):
    """Values are scaled by the depth of the file, not by the largest value. The transparent value becomes white."""
    most = 2**bits - 1
    values = np.arange(8) * 100 if bits == 16 else np.arange(8) % (most + 1)
    scaled = np.round(values * 255 / most)
    for hidden in (None, *values[:4]):
        image = decoding.to_eight_bits(decoding.open_image(png_of(bits, values, hidden)))
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image)[0], np.where(values == hidden, 255, scaled))


@pytest.mark.parametrize("shape, size", [((1020, 1000), 16), ((999, 1313), 32), ((960, 960), 16)])
def test_a_large_image_keeps_its_geometry(monkeypatch, shape, size):
    """Blocks are averaged first, of which the last may be cut. It equals a plain resize to 5 of 255 levels here."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    content = encoded((127 + 100 * np.sin(x / 70) * np.cos(y / 50)).astype(np.uint8))
    plain = decoding.decode(content, size, 1).astype(int)
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1)
    assert np.abs(decoding.decode(content, size, 1) - plain).max() <= 5


def test_a_large_image_with_a_transparent_value_is_white_there(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1)
    content = encoded(np.tile(np.uint8([0, 0, 50, 50]), (64, 16)), transparency=0)
    assert np.abs(decoding.decode(content, 2, 1).astype(int) - (255 + 50) / 2).max() < 5  # 25 with black


def test_bad_files_are_skipped_and_listed(tmp_path, capsys):
    folder = photos(tmp_path / "in", (f"good {i} é.png" for i in range(20)))
    (folder / "cut.jpg").write_bytes(encoded(noise(64, 64), "JPEG")[:-400])
    (folder / "text.png").write_text("I am not an image")
    (folder / "zero.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, 8, 2, b""))
    save(folder / "dot.png", noise(1, 1))
    secret = tmp_path / "secret.png"
    save(secret, noise(8, 8))
    (folder / "link.png").symlink_to(secret)
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.png").symlink_to(folder / "missing.png")
    with pytest.raises(UserError, match=r"7 of 28 files .* That is more than none: remove them, or allow"):
        open_folder(folder, tmp_path / "cache", max_bad_share=0)
    images, labels, classes = open_folder(folder, tmp_path / "cache", max_bad_share=0.5)
    assert images.shape == (20, 8, 8, 3) and len(labels) == 20 and classes == [""]
    assert "8 of 28 files" in capsys.readouterr().out
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
        "loop": "a link to a folder",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], reasons[name]


@pytest.mark.parametrize("bad, share, allowed", [(10, 0.01, True), (11, 0.01, False), (11, 0.2, True), (1, 0.0, False)])
@pytest.mark.parametrize("size", [None, 8])
def test_how_many_files_may_be_bad(tmp_path, monkeypatch, capsys, bad, share, allowed, size):
    """Ten, or a fraction. The others are not decoded, whether the headers are read before or not."""
    photos(tmp_path / "in", (f"z{i:02d}.png" for i in range(60)))
    for i in range(bad):
        (tmp_path / "in" / f"a{i:02d}.png").write_bytes(b"no image")
    decoded = count_decoded(monkeypatch)
    monkeypatch.setattr(folders, "WINDOW", 1)
    if allowed:
        assert len(open_folder(tmp_path / "in", tmp_path / "cache", size, 3, share)[0]) == 60
        assert f"{bad} of {60 + bad} files in {tmp_path}/in were skipped" in capsys.readouterr().out
        return
    message = f"{bad} of .* files .*config.data.max_bad_share={0.16 if bad > 10 else 0.02}"
    with pytest.raises(UserError, match=message) as error:
        open_folder(tmp_path / "in", tmp_path / "cache", size, 3, share)
    assert len(decoded) <= bad
    flag = float(str(error.value).rpartition("=")[2])
    assert len(open_folder(tmp_path / "in", tmp_path / "cache", size, 3, flag)[0]) == 60


@pytest.mark.parametrize("kind", ["heic", "avif"])
def test_photos_of_phones(tmp_path, monkeypatch, kind):
    """HEIC is read by pillow-heif, which turns it upright. Without it, the reason names the package."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48], image[:32, 48:] = (200, 30, 30), (30, 30, 200)
    save(tmp_path / "in" / f"1.{kind}", image, format="HEIF" if kind == "heic" else "AVIF", quality=90)
    save(tmp_path / "in" / "2.png", image)
    found, expected = open_folder(tmp_path / "in", tmp_path / "cache", 32, 3)[0].astype(int)
    assert np.abs(found - expected).mean() < 6
    assert inspect_files(tmp_path / "in", tmp_path / "cache") == (2, (64, 64, 3), [""])
    monkeypatch.setattr(decoding, "readable_formats", lambda: ("JPEG", "PNG"))
    package = {"heic": "pip install pillow-heif", "avif": "pip install -U pillow"}[kind]
    with pytest.raises(ValueError, match=package):
        decoding.decode((tmp_path / "in" / f"1.{kind}").read_bytes(), 32, 3)


def test_a_format_that_becomes_readable(tmp_path, monkeypatch):
    """Photos that a missing package had made unreadable are read once it is installed."""
    photos(tmp_path / "in", [f"{i}.{kind}" for i in range(12) for kind in ("png", "webp")])
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "readable_formats", lambda: ("PNG",))
        patch.setattr(folders, "readable_formats", lambda: ("PNG",))
        with pytest.raises(UserError, match="11 of 24 files"):
            open_folder(tmp_path / "in", tmp_path / "cache", 8, 3)
        assert len(open_folder(tmp_path / "in", tmp_path / "cache", 8, 3, 0.5)[0]) == 12
    assert len(open_folder(tmp_path / "in", tmp_path / "cache", 8, 3)[0]) == 24
    assert inspect_files(tmp_path / "in", tmp_path / "cache")[0] == 24


def test_a_class_that_is_a_link_to_a_folder_is_skipped_and_listed(tmp_path):
    """It is not a class, even if its files are images. A hidden link is ignored, like any hidden folder."""
    save(tmp_path / "elsewhere" / "x.png", noise(8, 8))
    photos(tmp_path / "in", ("ant/a.png", "bee/b.png"))
    for name in ("cat", "bee/deep", ".hidden"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"2 of 4 files .*the first, bee/deep: it is a link to a folder"):
        open_folder(tmp_path / "in", tmp_path / "cache", max_bad_share=0)
    images, _, classes = open_folder(tmp_path / "in", tmp_path / "cache", max_bad_share=0.5)
    assert len(images) == 2 and classes == ["ant", "bee"]
    assert inspect_files(tmp_path / "in", tmp_path / "cache")[::2] == (2, ["ant", "bee"])
    shutil.rmtree(tmp_path / "in" / "ant")
    shutil.rmtree(tmp_path / "in" / "bee")
    with pytest.raises(UserError, match=r"1 of 1 files .*: it is a link to a folder"):
        open_folder(tmp_path / "in", tmp_path / "cache")


def test_names_in_a_zip(tmp_path):
    """Backslashes are read as slashes, the last entry with a name counts, and '..' is not a class."""
    names = ["a\\x.png", "b\\deep\\y.PNG", "a/z.png", "a/z.png", "./b/x.png", "../evil.png", "/x.png"]
    names += ["__MACOSX/a/x.png", "a/.hidden.png", "notes.txt"]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for i, name in enumerate(names):  # zipfile warns of the duplicate
            file.writestr(name, encoded(noise(8, 8, i)))
    with pytest.raises(UserError, match=r"2 of 6 files .*: its name points outside the zip"):
        open_folder(tmp_path / "in.zip", tmp_path / "cache", max_bad_share=0)
    assert inspect_files(tmp_path / "in.zip", tmp_path / "cache")[::2] == (4, ["a", "b"])
    images, labels, classes = open_folder(tmp_path / "in.zip", tmp_path / "cache", max_bad_share=0.5)
    assert [classes[label] for label in labels] == ["a", "a", "b", "b"]
    for image, i in zip(images, (0, 3, 1, 4), strict=True):  # a/x, a/z, b/deep/y, b/x
        np.testing.assert_array_equal(image, noise(8, 8, i))
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("packed", ["STORED", "DEFLATED", "BZIP2", "LZMA", "encrypted"])
def test_entries_of_a_zip_that_are_damaged_or_encrypted(tmp_path, packed):
    """They are skipped with a reason, whatever the compression."""
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w", getattr(zipfile, f"ZIP_{packed}", zipfile.ZIP_STORED)) as file:
        for i in range(3):
            file.writestr(f"{i}.png", encoded(noise(8, 8, i), "BMP"))
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("1.png")
    data = bytearray(path.read_bytes())
    if packed == "encrypted":
        entry = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)  # the second entry of the directory
        data[entry + 8] |= 1
        data[info.header_offset + 6] |= 1
    else:
        start = info.header_offset + 30 + len(info.filename)
        data[start + 12 : start + info.compress_size] = b"\x55" * (info.compress_size - 12)
    path.write_bytes(data)
    images, _, _ = open_folder(path, tmp_path / "cache", max_bad_share=0.5)
    assert len(images) == 2
    (skipped,) = (json.loads(file.read_text()) for file in (tmp_path / "cache").rglob("skipped.json"))
    assert skipped.keys() == {"1.png"} and skipped["1.png"]
    for kept in (0, 9, len(data) // 2, len(data) - 9):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=r"is neither a folder nor a zip file .*, or a zip that is damaged"):
            open_folder(path, tmp_path / "cache")


def test_a_zip_whose_directory_cannot_be_read(tmp_path, monkeypatch):
    """zipfile reports a failed read of it as a file that is not a zip. It is a Fault, after retries."""
    path, fault = a_set(tmp_path, "zip"), OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(zipfile, "_EndRecData", lambda _: (_ for _ in ()).throw(fault))
    with pytest.raises(Fault, match=r"data.path=.*in.zip cannot be read: .*Input/output error"):
        open_folder(path, tmp_path / "cache")


@pytest.mark.parametrize(
    "path, files, message",
    [
        ("in", {}, "does not exist"),
        ("in", {"in/.hidden/a.png": b""}, "no image in"),
        ("in", {"in/notes.txt": b"text"}, "no image in"),
        ("in.zip", {"in.zip": b"no zip"}, "neither a folder nor a zip"),
        ("in", {"in/data.mdb": b"no database" * 1000}, "cannot be read as an LMDB"),
        ("in", dict.fromkeys(("in/a.png", "in/b.png"), encoded(noise(1, 1))), r"2 of 2 files .*a.png: 1x1 pixels"),
        ("in", {"in/a.png": encoded(noise(8, 8)), "cache": b"no folder"}, "cannot be written to .*; set data.dir"),
        ("https://example.org/photos.zip", {}, "paths are local or gs://bucket/name, not https://"),
    ],
)
def test_sets_that_cannot_be_opened(tmp_path, path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_folder(path if "://" in path else tmp_path / path, tmp_path / "cache")


def write_lmdb(path, values):
    import lmdb

    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)


def test_an_lmdb_as_lsun_is_published(tmp_path):
    """The WebP values are read in the order of their keys, and nothing is written beside them. Splits work."""
    folder = tmp_path / "data" / "lsun" / "church_outdoor_train_lmdb"
    folder.mkdir(parents=True)
    write_lmdb(folder, {f"{i:040x}": encoded(noise(12, 8, i), "WEBP") for i in range(8)} | {"f": b"no image"})
    (folder / "lock.mdb").unlink()
    images, labels, classes = open_folder(folder, tmp_path / "cache", max_bad_share=0.2)
    assert images.shape == (8, 8, 8, 3) and not labels.any() and classes == [""]
    for i in range(8):
        np.testing.assert_array_equal(images[i], noise(12, 8, i)[:, 2:10])
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]
    data = open_data(DataConfig("lsun_church", "train[:5]", str(tmp_path / "data"), max_bad_share=0.2))
    np.testing.assert_array_equal(data.images, images[:5])
    assert data.labels is None


def test_lmdb_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").touch()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="run `pip install lmdb`"):
        open_folder(tmp_path, tmp_path / "cache")


def test_classes_are_those_of_images(tmp_path, capsys):
    """A folder whose files are all bad is no class, and a note counts images outside of the folders."""
    photos(tmp_path / "in", ("cat/1.png", "dog/2.png", "stray.png"))
    (tmp_path / "in" / "bad").mkdir()
    (tmp_path / "in" / "bad" / "0.png").write_bytes(b"x")
    data = open_data(data_config(tmp_path, max_bad_share=0.5))
    assert data.classes == ("", "cat", "dog") and sorted(data.labels()) == [0, 1, 2]
    assert "note: 1 images are in no folder of a class" in capsys.readouterr().out


def data_config(tmp_path, **fields):
    """The folder `in`, whose copies are below `cache`."""
    return DataConfig("image_folder", dir=str(tmp_path / "cache"), path=str(tmp_path / "in"), **fields)


def test_a_copy_without_its_description_is_made_again(tmp_path):
    path = photos(tmp_path / "in", 1)
    before = open_folder(path, tmp_path / "cache")[0]
    (lost,) = (tmp_path / "cache" / "image_folder").glob("*/dataset.json")
    lost.unlink()
    np.testing.assert_array_equal(open_folder(path, tmp_path / "cache")[0], before)


def test_a_link_whose_file_changes_is_read_again(tmp_path):
    path = photos(tmp_path / "in", [".store/a.png", *(f"b{i:02d}.png" for i in range(40))])
    (path / "a.png").symlink_to(".store/a.png")
    before = open_folder(path, tmp_path / "cache")[0]
    save(path / ".store" / "a.png", noise(8, 8, 99))
    os.utime(path / ".store" / "a.png", (1, 1))
    assert (open_folder(path, tmp_path / "cache")[0][0] != before[0]).any()


def test_splits_and_labels(tmp_path):
    photos(tmp_path / "in", (f"{'cat' if i > 6 else 'ant'}/{i}.png" for i in range(10)))
    whole = open_data(data_config(tmp_path))
    assert whole.classes == ("ant", "cat") and list(whole.labels()) == [0] * 7 + [1] * 3
    for split, part in (("train[:3]", slice(3)), ("train[80%:]", slice(8, 10)), ("train[2:50%]", slice(2, 5))):
        data = open_data(data_config(tmp_path, split=split))
        np.testing.assert_array_equal(data.images, whole.images[part])
        np.testing.assert_array_equal(data.labels(), whole.labels()[part])
    for fields, message in (
        ({"split": "train[80%:50%]"}, r"'train\[80%:50%\]' holds none of the 10 examples of a folder of images"),
        ({"split": "train[:11]"}, "ends beyond the 10 examples of a folder of images"),
        ({"split": "train[:500%]"}, "ends beyond the 10 examples of a folder of images"),
        *(({"split": split}, "has no split") for split in ("test", "train[:", "train[a:]")),
        *(({"channels": n}, f"data.channels={n} is not supported: images are decoded in 1") for n in (2, 4)),
    ):
        for opens in (open_data, inspect):
            with pytest.raises(UserError, match=message):
                opens(data_config(tmp_path, **fields))


def test_a_split_beyond_the_files_is_refused_before_they_are_decoded(tmp_path):
    photos(tmp_path / "in", (f"{i}.png" for i in range(10)))
    with pytest.raises(
        UserError, match=r"beyond the 10 examples .*: choose a smaller part, or data.split=train for all"
    ):
        open_data(data_config(tmp_path, split="train[:27000]", image_size=8, channels=3))
    assert not list(tmp_path.rglob("dataset.json"))


@pytest.mark.parametrize(
    "split, missing",
    [
        ("train", None),
        ("train[1:13]", None),
        ("train[:70%]", "2 of 7 classes ('f', 'g')"),
        ("train[13:]", "6 of 7 classes ('a', 'b', 'c', 'd', 'e', ...)"),
    ],
)
def test_a_split_that_lacks_classes_is_noted(tmp_path, capsys, monkeypatch, split, missing):
    """A part is cut from files that are sorted by class. Process 0 prints the classes without an image in it."""
    photos(tmp_path / "in", (f"{'abcdefg'[i // 2]}/{i}.png" for i in range(14)))
    c = data_config(tmp_path, split=split)
    data, note = open_data(c), f"note: the split '{split}' has no image of {missing}: it is cut from the files"
    assert len(data.classes) == 7
    out = capsys.readouterr().out
    assert note in out if missing else "note" not in out
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    open_data(c)
    assert "note" not in capsys.readouterr().out


OPEN = """
import os, pathlib, signal, sys, time
from ddgan_jax.data import prepared, preparing
preparing.BLOCK_SECONDS = 0.1
decode, seen = preparing.decode, []
def counted(*arguments):
    seen.append(1)
    if len(seen) == 20 and sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)  # long enough for the other process to start
    return decode(*arguments)
preparing.decode = counted
images = prepared.open_folder(sys.argv[1], None, None, sys.argv[2])[0]
print(images.shape, int(images[...].sum()), len(seen))
"""


def test_two_at_once_and_one_that_was_killed(tmp_path):
    """An incomplete copy is continued, and the second of two processes waits for the copy of the first."""
    total = sum(int(noise(64, 64, i).sum()) for i in range(50))
    folder, cache = photos(tmp_path / "in", 50, 64, 64), tmp_path / "cache" / "image_folder"
    killed = python(OPEN, folder, cache.parent, "killed")
    _, err = killed.communicate(timeout=60)
    assert killed.returncode == -9, err
    assert [path.name.split(".")[0] for path in cache.iterdir() if path.is_dir()] == ["incomplete"]
    children = [python(OPEN, folder, cache.parent, "whole") for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    found = sorted(out.splitlines()[-1] for out, _ in outputs)
    (rest,) = (int(line.split()[-1]) for line in found if not line.endswith(" 0"))
    assert 30 <= rest < 50, outputs
    assert found == [f"(50, 64, 64, 3) {total} {n}" for n in (0, rest)], outputs
    assert sum(f", {50 - rest} of them already decoded" in out for out, _ in outputs) == 1
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    assert not copy.name.startswith("incomplete")


# --- Settings that follow from the dataset -------------------------------------------------------------------------


def settings_of(path, variant="paper", **fields):
    """The configuration for a folder whose copies are beside it, with `fields` such as data__image_size=8."""
    where = dict(data__path=str(path), data__dir=str(path.parent / "cache"))
    return read(preset_with(f"image_folder:{variant}", **where, **fields))


@pytest.mark.parametrize(
    "variant, pixels, fields, message",
    [
        ("paper", 24, {"data__image_size": 2048}, "8 to 1024 px, not 2048"),
        ("paper", 24, {"data__image_size": 12}, "data.image_size=12 does not halve 3 times"),
        ("paper", 24, {"data__image_size": 12, "data__channels": 3}, "data.image_size=12 does not halve 3 times"),
        ("paper", 24, {"data__image_size": 4, "generator__ch_mult": (1, 2)}, "8 to 1024 px, not 4"),
        ("paper", 7, {"generator__ch_mult": (1, 2)}, "8 to 1024 px, not 4"),
        ("large", 24, {}, "data.image_size=16 does not halve 5 times"),
        ("small", 24, {"data__image_size": 30}, "data.image_size=30 does not halve 1 times, .* model.patch_size=4"),
    ],
)
def test_a_size_that_no_network_takes_is_refused_before_anything_is_decoded(
    tmp_path, monkeypatch, variant, pixels, fields, message
):
    save(tmp_path / "in" / "a.png", noise(pixels, pixels))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=message):
        train(settings_of(tmp_path / "in", variant, **fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "size, num_images, devices, batch, steps",
    [
        (32, 10, 1, 8, 50_000),
        (32, 10, 8, 8, 50_000),
        (64, 300, 1, 32, 50_000),
        (64, 300, 8, 32, 50_000),
        (64, 2_000, 1, 64, 56_250),
        (64, 2_000, 8, 64, 56_250),
        (64, 2_000, 3, 60, 60_000),
        (64, 2_000, 128, 128, 50_000),
        (32, 50_000, 1, 256, 351_562),  # the paper's CIFAR-10: 351,000 steps of 256
        (32, 50_000, 8, 256, 351_562),
        (256, 27_000, 1, 32, 675_000),  # 800 epochs, as the paper's CelebA-HQ
        (256, 50_000, 8, 32, 1_250_000),
        (256, 1_000_000, 1, 32, 1_875_000),
        (32, 1_000_000, 1, 256, 351_562),
        (32, 1_000_000, 8, 256, 351_562),
        (512, 50_000, 1, 16, 2_500_000),
    ],
)
def test_batch_size_and_steps_follow_from_the_number_of_images(size, num_images, devices, batch, steps):
    config = preset_with(f"image_folder:{'large' if size > 64 else 'paper'}", data__image_size=size, data__channels=3)
    resolved, (note,) = resolve.choose(read(config), num_images, False, devices)
    assert (resolved.train.batch_size, resolved.train.num_steps) == (batch, steps)
    assert batch % 4 == 0 and batch % devices == 0
    assert resolved.train.steps_per_epoch == max(num_images // batch, 1)
    assert resolved.checkpoint.every == resolved.log.samples_every
    assert 1_000 <= resolved.checkpoint.every <= 5_000 and 50_000 % resolved.checkpoint.every == 0
    assert f"{num_images:,} images: {size} px, batch {batch}, {steps:,} steps (" in note
    again, notes = resolve.choose(resolved, num_images, False, devices)
    assert again == resolved and notes == []
    build(resolved)


def test_the_batch_size_with_accumulation():
    """Each part of a device's batch holds whole groups of four."""
    assert [resolve.batch_size(2_000, 64, devices, 4) for devices in (1, 2, 3, 8)] == [64, 64, 48, 128]


def test_notes_on_what_was_chosen_and_flags_that_override_it():
    config = preset_with("image_folder", data__image_size=64)
    assert resolve.choose(read(config), 2_000, False, 1)[1] == [
        "2,000 images: 64 px, batch 64, 56,250 steps (1,800 epochs), chosen for this number of images; "
        "--config.train.num_steps and --config.train.batch_size override them"
    ]
    config.train.batch_size, config.checkpoint.every = 16, 7
    resolved, (note,) = resolve.choose(read(config), 2_000, False, 1)
    assert resolved.train.num_steps == 225_000 and resolved.train.steps_per_epoch == 125
    assert resolved.checkpoint.every == 7 and resolved.log.samples_every == 2_500
    assert note.endswith("--config.train.num_steps overrides it")
    config.train.update(num_steps=1_000, steps_per_epoch=1)
    resolved, notes = resolve.choose(read(config), 2_000, False, 1)
    assert resolved.train == read(config).train and notes == [] and resolved.log.samples_every == 500


def test_settings_are_resolved_from_a_split_and_are_the_same_when_resolved_again(tmp_path):
    config = settings_of(photos(tmp_path / "in", 40, 20, 17), data__split="train[:50%]")
    resolved, (note,) = resolve_from_data(config)
    assert note.startswith("20 images: 16 px, batch 16, 50,000 steps (40,000 epochs)")
    assert (resolved.data.image_size, resolved.data.channels) == (16, 3)
    assert resolve_from_data(config)[0] == resolved
    images = open_data(resolved.data).images
    assert images.shape == (20, 16, 16, 3) and resolve_from_data(config)[0] == resolved
    given = resolve_from_data(settings_of(tmp_path / "in"), Data(images))[0]
    assert given.train == resolved.train and given.data.image_size == 16


def test_settings_are_resolved_from_other_datasets_too():
    """Computed images and points are inspected. A dataset from which no setting follows is not."""
    unset = dict(train__num_steps=None, train__batch_size=None, train__steps_per_epoch=None)
    for name, size in (("cifar10:smoke", 8), ("gaussians:smoke", 1)):
        resolved, (note,) = resolve_from_data(read(preset_with(name, **unset)))
        assert resolved.train.num_steps >= 50_000 and resolved.train.batch_size <= 256
        assert resolved.data.image_size == size and ("px" in note) == (size == 8)
    config = read(preset_with("cifar10"))  # whose data is missing
    assert resolve_from_data(config) == (config, [])


@pytest.mark.parametrize("variant", ["paper", "large", "small"])
def test_a_flat_folder_cannot_be_evaluated_by_its_classes(tmp_path, variant):
    """Training skips the evaluation with a note, and an explicit evaluation raises an error."""
    config = settings_of(photos(tmp_path / "in", 4, 64, 64), variant, eval__every=10, eval__features="classifier")
    resolved, notes = resolve_from_data(config)
    assert resolved.eval.every == 0
    assert notes[-1].startswith("no evaluation while training: eval.features=classifier learns the classes")
    with pytest.raises(UserError, match=r"eval.features=classifier needs labels, and data.name=image_folder has none"):
        open_evaluator(resolved)
    (tmp_path / "in" / "ant").mkdir()
    (tmp_path / "in" / "00.png").rename(tmp_path / "in" / "ant" / "0.png")
    assert resolve_from_data(config)[0].eval.every == 10


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "large", "small"])
def test_every_variant_trains_on_a_flat_folder(tmp_path, variant):
    photos(tmp_path / "in", 12, 40, 33)
    small = ["generator.nf=8", "generator.num_res_blocks=1", "generator.nz=8", "discriminator.ngf=8"]
    some = ["train.num_steps=4", "checkpoint.every=2", "sample.grid=4", "log.tensorboard=False"]
    where = [f"data.path={tmp_path}/in", f"data.dir={tmp_path}/cache"]
    flags = [f"--config.{flag}" for flag in (*small, *some, *where)]
    for _ in range(2):
        result = succeed(f"--config=configs/image_folder.py:{variant}", f"--workdir={tmp_path}/run", *flags)
        assert ("no evaluation while training" in result.stdout) == (variant == "small")
    assert "is at step 4, and train.num_steps is 4: nothing is left to train" in result.stdout
    notes = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert len(notes) == (variant == "small")  # its classifier needs classes
    assert all("--mode=evaluate cannot run yet: eval.features=classifier" in note for note in notes)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["train"]["batch_size"] == (32 if variant == "small" else 8) and kept["data"]["image_size"] == 32
    assert (tmp_path / "run" / "samples" / "final.png").exists()
    succeed("--mode=sample", f"--workdir={tmp_path}/run", "--num_samples=3", f"--out={tmp_path}/x.npz")
    assert np.load(tmp_path / "x.npz")["images"].shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    "seconds, steps, expected",
    [
        (0.2133, 56_250, "about 3 h 20 min for 56,250 steps"),
        (0.001, 7_000, "about 1 min for 7,000 steps"),
        (1.0, 351_562, "about 4 d 1 h for 351,562 steps"),
        (1.0, 5_399, "about 1 h 30 min for 5,399 steps"),
    ],
)
def test_expected_time(seconds, steps, expected):
    assert expected_time(seconds, steps) == expected


# --- Remote paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a//x.png"])
def test_a_name_in_a_bucket_that_is_no_path_below_it(monkeypatch, name):
    """Joined to the folder, the first would be a file on this host."""
    monkeypatch.setattr(paths, "files_below", lambda _: {name: (9, ""), "b/y.png": (9, "")})
    bucket = folders.Folder(epath.Path("gs://bucket/photos"))
    for size in (9, None):
        with pytest.raises(ValueError, match="its name is not a path below the folder"):
            bucket.read(name, size)
    assert bucket.classes() == ["b"]


# --- Reads that fail -----------------------------------------------------------------------------------------------

FAULTS = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),  # it was listed a moment ago
    TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    MemoryError(),
]


def fail_on(monkeypatch, where, name, fault, part):
    """Makes `where`.`name` raise `fault` if `part` is in its arguments."""
    call = getattr(where, name)

    def failing(*arguments, **options):
        if any(part in str(argument) for argument in arguments):
            raise fault
        return call(*arguments, **options)

    monkeypatch.setattr(where, name, failing)


def a_set(tmp_path, kind):
    """A dataset of two classes with three images each, stored as `kind`."""
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(6)]
    photos(tmp_path / "in", names)
    if kind == "folder":
        return tmp_path / "in"
    if kind == "lmdb":
        write_lmdb(tmp_path / "lmdb", {name: (tmp_path / "in" / name).read_bytes() for name in names})
        return tmp_path / "lmdb"
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for name in names:
            file.write(tmp_path / "in" / name, name)
    return tmp_path / "in.zip"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("call", ["read_start", "read", "zip", "lmdb"])
def test_a_read_that_fails_is_no_reason_to_skip_a_file(tmp_path, monkeypatch, call, fault):
    """It raises Fault with the cause and leaves no complete copy. The next start works as if nothing had happened."""
    kind = call if call in ("zip", "lmdb") else "folder"
    path, cache = a_set(tmp_path, kind), tmp_path / "cache"
    with monkeypatch.context() as patch:
        if kind == "folder":
            fail_on(patch, paths, call, fault, "3.png")
        elif kind == "zip":
            fail_on(patch, zipfile.ZipFile, "open", fault, "3.png")
        else:
            fail_on(patch, archives.Lmdb, "read", fault, "3.png")
        with pytest.raises(Fault, match=f"3.png cannot be read: {type(fault).__name__}.*; run the same command again"):
            open_folder(path, cache, max_bad_share=1.0, size=8, channels=3 if call != "read_start" else None)
    assert not list(cache.rglob("dataset.json"))
    images, labels, classes = open_folder(path, cache)
    assert len(images) == 6 and classes == ["a", "b"] and sorted(labels) == [0, 0, 0, 1, 1, 1]


def test_a_file_that_is_read_incompletely(tmp_path, monkeypatch):
    path = a_set(tmp_path, "folder")
    monkeypatch.setattr(paths, "read", lambda file: pathlib.Path(file).read_bytes()[:-9])
    with pytest.raises(Fault, match=r"0.png cannot be read: OSError: .* bytes of .* were read, but it has"):
        open_folder(path, tmp_path / "cache", max_bad_share=1.0)


@pytest.mark.parametrize("fault", FAULTS[:-1], ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(
    "kind, where, call, part",
    [
        ("folder", os, "scandir", "in/b"),
        ("folder", os, "lstat", "3.png"),
        ("zip", pathlib.Path, "open", "in.zip"),
        ("zip", folders, "Zip", "in.zip"),
        ("lmdb", subprocess, "run", "lmdb"),
        ("folder", os, "open", "images.0.bin"),
        ("folder", paths, "read", "dataset.json"),
        ("folder", paths, "read", "skipped.json"),
    ],
)
def test_a_set_that_cannot_be_read(tmp_path, monkeypatch, kind, where, call, part, fault):
    """A failed listing, for instance, does not result in a smaller dataset, and the copy stays unchanged."""
    path, cache = a_set(tmp_path, kind), tmp_path / "cache"
    expected = open_folder(path, cache)[0]
    if kind == "lmdb":  # a copy is opened without it
        shutil.rmtree(next(cache.rglob("dataset.json")).parent)
    before = contents(cache)
    with monkeypatch.context() as patch:
        fail_on(patch, where, call, fault, part)
        with pytest.raises(Fault, match=r"data.path=.* cannot be read: .*; run the same command again") as error:
            open_folder(path, cache)
    assert str(fault) in str(error.value) and contents(cache) == before
    np.testing.assert_array_equal(open_folder(path, cache)[0], expected)


@pytest.mark.parametrize(
    "name, content",
    [
        ("dataset.json", b"{"),
        ("dataset.json", b"{}"),
        ("dataset.json", b"[1]"),
        ("dataset.json", b'{"shape": [8, 8, 3], "classes": ["a", "b"], "images": 7, "parts": 1}'),
        ("dataset.json", b'{"shape": [8, 9, 3], "classes": ["a", "b"], "images": 6, "parts": 1}'),
        ("dataset.json", b'{"shape": [8, 8, 3], "classes": ["a", "b"], "images": 6, "parts": 0}'),
        ("index.npz", b"PK"),
        ("index.npz", b""),
        ("skipped.json", b"\xff"),
        ("images.0.bin", b"too few"),
        ("images.0.bin", b""),
    ],
)
def test_a_copy_that_is_damaged(tmp_path, name, content):
    path, cache = a_set(tmp_path, "folder"), tmp_path / "cache"
    open_folder(path, cache)
    (file,) = cache.rglob(name)
    file.write_bytes(content)
    before = contents(cache)
    with pytest.raises(Fault, match=r"the copy .* is damaged .*: remove it, and run the same command again"):
        open_folder(path, cache)
    assert contents(cache) == before


def test_a_byte_of_a_copy_that_has_changed(tmp_path):
    """The other images can be read. Reading the changed one raises an error that names the file and the remedy."""
    path, cache = a_set(tmp_path, "folder"), tmp_path / "cache"
    images = prepared.open_folder(str(path), 8, 3, str(cache))[0]
    expected, (file,) = images[...], cache.rglob("images.0.bin")
    content = bytearray(file.read_bytes())
    content[3 * 8 * 8 * 3 + 5] ^= 1
    file.write_bytes(content)
    others = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(images[others], expected[others])
    np.testing.assert_array_equal(images[4:][[0, 1]], expected[4:])
    message = f"image 3 in {file} has changed since it was written: remove the folder {file.parent}, and run the same"
    for reads in (lambda: images[3], lambda: images[2:5][[1]], lambda: images[::3], lambda: np.asarray(images)):
        with pytest.raises(Fault, match=message):
            reads()


@pytest.mark.parametrize("content", ["", "{", "{}", "null", "[]", '{"images": 1, "side": "x", "grey": 0}'])
def test_a_damaged_result_of_an_inspection(tmp_path, content):
    """The headers are read again."""
    path, cache = a_set(tmp_path, "folder"), tmp_path / "cache"
    seen = inspect_files(path, cache)
    (file,) = cache.rglob("*.json")
    before = file.read_text()
    file.write_text(content)
    assert inspect_files(path, cache) == seen and file.read_text() == before


def test_an_lmdb_on_a_disk_that_fails(tmp_path, monkeypatch):
    """The process that verifies the structure fails, as for a damaged file, but then the file itself cannot be read."""
    path = a_set(tmp_path, "lmdb")
    failed = subprocess.CompletedProcess([], -7, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="cannot be read as an LMDB: it is damaged, or not an LMDB"):
        open_folder(path, tmp_path / "cache")
    fail_on(monkeypatch, pathlib.Path, "open", FAULTS[0], "data.mdb")
    with pytest.raises(Fault, match=r"cannot be read: .*Input/output error"):
        open_folder(path, tmp_path / "cache")


def test_an_lmdb_whose_pages_lead_to_each_other(tmp_path, monkeypatch):
    """More entries than the file has room for are not walked; a key that occurs twice is refused."""
    path = a_set(tmp_path, "lmdb")
    monkeypatch.setattr(archives, "LEAST_ENTRY", 10**6)
    with pytest.raises(UserError, match="cannot be read as an LMDB: it has more entries than its file has room for"):
        open_folder(path, tmp_path / "cache")
    monkeypatch.undo()

    class Twice:
        """A database whose two pages are the same."""

        def begin(self):
            cursor = types.SimpleNamespace(iternext=lambda values: iter([b"a", b"b", b"a", b"b"]))
            return contextlib.nullcontext(types.SimpleNamespace(cursor=lambda: cursor))

    monkeypatch.setattr(archives.Lmdb, "_environment", Twice())
    with pytest.raises(UserError, match="has a key twice: it is damaged, or has several values for a key"):
        open_folder(path, tmp_path / "cache")


@pytest.mark.parametrize(
    "reason, call, times",
    [
        ("lmdb.Error: data.mdb: Input/output error", None, 1),
        ("lmdb.InvalidError: MDB_INVALID: File is not an LMDB file", None, 2),  # of a header that was read in part
        ("lmdb.Error: data.mdb: Input/output error", "open", 1),
        ("", "open", 2),
        ("", "stat", 2),
    ],
)
def test_an_lmdb_on_a_disk_that_fails_for_a_moment(tmp_path, monkeypatch, reason, call, times):
    path, run, left = a_set(tmp_path, "lmdb"), subprocess.run, [times]
    expected = open_folder(path, tmp_path / "expected")[0]

    def walk(*arguments, **options):
        left[0] -= 1
        return subprocess.CompletedProcess([], 1, stderr=reason) if left[0] >= 0 else run(*arguments, **options)

    if reason:
        monkeypatch.setattr(subprocess, "run", walk)
    if call:
        fails, found = [times], getattr(pathlib.Path, call)

        def fail(self, *arguments, **options):
            if self.name == "data.mdb" and fails[0]:
                fails[0] -= 1
                raise FAULTS[0]
            return found(self, *arguments, **options)

        monkeypatch.setattr(pathlib.Path, call, fail)
    np.testing.assert_array_equal(open_folder(path, tmp_path / "cache")[0], expected)
    assert left[0] < 0 or not reason


def test_a_run_or_an_evaluation_below_the_folder_is_no_data(tmp_path):
    """A run in the folder of its own photos must not train on its grids of samples; locally and in a bucket."""
    path = a_set(tmp_path, "folder")
    for folder, mark in (
        ("runs/x", "metrics.jsonl"),
        ("a/evaluation", "results.json"),
        ("new", "first_checkpoint.json"),
    ):
        save(path / folder / "samples" / "final.png", noise(8, 8, 9))
        save(path / folder / "samples.png", noise(8, 8, 9))
        (path / folder / mark).touch()
    (path / "b" / "results.json").touch()  # of the user
    with folders.open_files(str(path)) as files:
        assert len(files.names) == 6 and {name.split("/")[0] for name in files.names} == {"a", "b"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(downloads.fcntl, "flock", fail)
    assert len(open_folder(a_set(tmp_path, "folder"), tmp_path / "cache")[0]) == 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(orientation, mode, monkeypatch):
    """The pixels are nearly those of the whole image, scaled: at 8 px a pixel stands for 62 x 62, with steep edges."""
    y, x = np.mgrid[0:500, 0:700]
    image = np.stack([128 + 100 * np.sin(x / 37 + y / 80), 120 + 90 * np.sin(y / 33), x * 255 / 700], -1)
    image[100:250, 200:330] = 200, 30, 60
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.uint8(image)).convert(mode), "jpeg", quality=95, exif=exif)
    for size, difference in ((8, 2.0), (32, 0.6)):
        found = decoding.decode(content, size, 3).astype(int)
        assert decoding._draft(decoding._open(content), size) == {8: 8, 32: 4}[size]
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_draft", lambda *_: 0)
            expected = decoding.decode(content, size, 3)
        assert np.abs(found - expected).mean() < difference and np.abs(found - expected).max() < 16
    assert decoding._draft(decoding._open(content), 100) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_large_jpegs_become_tiny(size):
    """libjpeg rounds the sides of a reduced image up, to more than an eighth of 97 px."""
    assert decoding.decode(encoded(noise(97, 97), "jpeg"), size, 3).shape == (size, size, 3)


# --- Room for the copy ---------------------------------------------------------------------------------------------


def test_the_disk_space_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    path, cache = a_set(tmp_path, "folder"), tmp_path / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20))
    monkeypatch.setattr(preparing, "decode", lambda *_: pytest.fail("decoded"))
    message = rf"the copy of .* at 512 px takes 5 MiB, and {cache}/image_folder has 1 MiB free: .* set data.dir"
    with pytest.raises(Fault, match=message):
        open_folder(path, cache, 512, 3)


def test_a_disk_that_fills_up_while_the_copy_is_written(tmp_path, monkeypatch):
    """A one-line error is raised. What was decoded remains, and the next run continues there."""
    path, cache = a_set(tmp_path, "folder"), tmp_path / "cache"
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        fail_on(patch, os, "fsync", full, "")
        with pytest.raises(Fault, match=r"cannot be written to .*No space left on device.*; set data.dir"):
            open_folder(path, cache)
    assert not list(cache.rglob("dataset.json"))
    assert len(open_folder(path, cache)[0]) == 6


def test_a_copy_is_indexed_like_an_array(tmp_path, monkeypatch):
    """A read that returns fewer bytes than requested is continued, and one that fails raises OSError."""
    expected = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
    (tmp_path / "images.0.bin").write_bytes(expected.tobytes())
    checksums = np.array([zlib.crc32(image) for image in expected])
    index = prepared.Index(np.zeros(7, int), np.arange(7), checksums)
    images = prepared.PreparedImages([tmp_path / "images.0.bin"], (4, 4, 3), index)
    assert len(images) == 7 and images.dtype == np.uint8 and images.shape == expected.shape
    whole, fault = os.pread, OSError(errno.EIO, "I/O error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda file, size, start: whole(file, min(size, 5), start))
        for indices in (
            3,
            -1,
            [6, 0, 0],
            slice(2, 5),
            slice(None, None, 2),
            np.array([[1], [2]]),
            expected[:, 0, 0, 0] > 99,
        ):
            np.testing.assert_array_equal(np.asarray(images[indices]), expected[indices])
        np.testing.assert_array_equal(images[2:6][1:3][[0, 1]], expected[[3, 4]])
    with monkeypatch.context() as patch:
        patch.setenv("DDGAN_RETRY_SECONDS", "0")
        patch.setattr(os, "pread", lambda file, size, start: (_ for _ in ()).throw(fault))
        with pytest.raises(OSError, match="I/O error"):
            images[[0]]
    with pytest.raises(ValueError, match="too short for 8 images"):
        prepared.PreparedImages(
            [tmp_path / "images.0.bin"], (4, 4, 3), prepared.Index(np.zeros(8, int), np.arange(8), np.zeros(8))
        )


# --- Copies that continue, grow and are named ----------------------------------------------------------------------


def count_decoded(monkeypatch):
    """A list that every decoded image is added to."""
    decode, decoded = preparing.decode, []
    monkeypatch.setattr(preparing, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    return decoded


@pytest.mark.parametrize(
    "end, rest",
    [
        *(("no line", 4), ("half a line", 5), ("no pixels", 5), ("no file of pixels", 21), ("garbage first", 21)),
        ("one more file", 22),
    ],
)
def test_a_preparation_continues_where_it_ended(tmp_path, monkeypatch, end, rest):
    """At the last block whose pixels and line are complete; from the start if the folder has changed since."""
    path, cache = tmp_path / "in", tmp_path / "cache"
    photos(path, (f"{'ab'[i % 2]}/{i:02d}.png" for i in range(20)))
    (path / "a" / "05.png").write_bytes(b"no image")
    monkeypatch.setattr(preparing, "BLOCK_SECONDS", 0)
    with monkeypatch.context() as patch:
        fail_on(patch, paths, "read", OSError(errno.EIO, "Input/output error"), "b/13.png")
        with pytest.raises(Fault, match=r"b/13.png cannot be read"):
            open_folder(path, cache, max_bad_share=1)
    (log,) = cache.rglob("progress.jsonl")
    pixels, lines = log.with_name("images.0.bin"), log.read_bytes()
    if end == "half a line":
        log.write_bytes(lines[:-9])
    elif end == "no pixels":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif end == "no file of pixels":
        pixels.unlink()
    elif end == "garbage first":
        log.write_bytes(b"\xff\n" + lines)
    elif end == "one more file":
        save(path / "c" / "new.png", noise(8, 8, 99))
    decoded = count_decoded(monkeypatch)
    images, labels, classes = open_folder(path, cache, max_bad_share=1)
    more = [noise(8, 8, 99)] if end == "one more file" else []
    assert len(decoded) == rest
    np.testing.assert_array_equal(images, [noise(8, 8, i) for i in [*range(0, 20, 2), *range(1, 20, 2)]] + more)
    assert classes == ["a", "b", "c"][: 2 + len(more)] and list(labels) == [0] * 10 + [1] * 10 + [2] * len(more)
    assert "05.png" in next(cache.rglob("skipped.json")).read_text()
    assert len(list(cache.rglob("progress.jsonl"))) == len(more)  # of the folder as it was


def test_a_preparation_that_is_interrupted_twice(tmp_path, monkeypatch):
    """In the middle of a line of its log, and later once more."""
    path, cache = photos(tmp_path / "in", 20), tmp_path / "cache"
    monkeypatch.setattr(preparing, "BLOCK_SECONDS", 0)
    for stops, cut in (("09.png", 9), ("15.png", 0)):
        with monkeypatch.context() as patch:
            fail_on(patch, paths, "read", OSError(errno.EIO, "Input/output error"), stops)
            with pytest.raises(Fault, match=r".png cannot be read"):
                open_folder(path, cache)
        (log,) = cache.rglob("progress.jsonl")
        log.write_bytes(log.read_bytes()[: -cut or None])
    decoded = count_decoded(monkeypatch)
    images = open_folder(path, cache)[0]
    assert len(decoded) == 5
    np.testing.assert_array_equal(images, [noise(8, 8, i) for i in range(20)])


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_that_grows_costs_what_is_new(tmp_path, monkeypatch, capsys, links):
    """Its copy shares the pixels of the earlier copy, and stays when that one is removed."""
    monkeypatch.setattr(preparing, "COMPARED", 4)
    if not links:
        fail_on(monkeypatch, os, "link", OSError(errno.EPERM, "Operation not permitted"), "")
    path, cache = tmp_path / "in", tmp_path / "cache"
    photos(path / "b", 40)
    (path / "b" / "bad.png").write_bytes(b"no image")
    open_folder(path, cache, max_bad_share=0.5)
    decoded, read_headers = count_decoded(monkeypatch), []
    header = headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda content: read_headers.append(1) or header(content))
    save(path / "a" / "new.png", noise(8, 8, 99))
    (path / "b" / "07.png").unlink()
    save(path / "b" / "09.png", noise(9, 9, 9))  # another size, so that its key differs
    capsys.readouterr()
    images, labels, classes = open_folder(path, cache, max_bad_share=0.5)
    assert len(decoded) == 4 + 2 + 1 and len(read_headers) == 2 + 1  # those compared, what is new, bad.png again
    assert "preparing the 41 files" in (out := capsys.readouterr().out) and ", 38 of them shared with in-" in out
    expected = [99, *range(7), 8, *range(10, 40)]
    np.testing.assert_array_equal(np.delete(images, 9, axis=0), [noise(8, 8, i) for i in expected])
    assert classes == ["a", "b"] and list(labels) == [0] + [1] * 39
    (first, second) = sorted(cache.rglob("dataset.json"), key=lambda file: len(list(file.parent.iterdir())))
    assert (second.parent / "images.0.bin").stat().st_nlink == 1 + links
    shutil.rmtree(first.parent)
    np.testing.assert_array_equal(open_folder(path, cache, max_bad_share=0.5)[0], images)


@pytest.mark.parametrize("change", ["content", "damage", "damaged pixels", "most are gone"])
def test_an_earlier_copy_that_is_not_shared(tmp_path, monkeypatch, change):
    """Files whose content changed and whose times did not, and copies that are damaged or mostly unused."""
    path, cache = tmp_path / "in", tmp_path / "cache"
    for i in range(9):
        (path / "x").mkdir(parents=True, exist_ok=True)
        (path / "x" / f"{i}.bmp").write_bytes(encoded(noise(8, 8, i), "BMP"))
        os.utime(path / "x" / f"{i}.bmp", (1, 1))
    open_folder(path, cache)
    decoded, kept = count_decoded(monkeypatch), range(9)
    if change == "content":
        (path / "x" / "4.bmp").write_bytes(encoded(noise(8, 8, 44), "BMP"))
        os.utime(path / "x" / "4.bmp", (1, 1))
    elif change == "damage":
        next(cache.rglob("index.npz")).write_bytes(b"")
    elif change == "damaged pixels":
        (pixels,) = cache.rglob("images.0.bin")
        pixels.write_bytes(pixels.read_bytes()[:-1] + b"\0\1"[pixels.read_bytes()[-1] == 0 :][:1])
    else:
        kept = range(6, 9)
        for i in range(6):
            (path / "x" / f"{i}.bmp").unlink()
    save(path / "y" / "new.png", noise(8, 8, 99))
    images = open_folder(path, cache)[0]
    expected = [noise(8, 8, 44 if change == "content" and i == 4 else i) for i in kept] + [noise(8, 8, 99)]
    np.testing.assert_array_equal(images, expected)
    assert len(decoded) >= len(kept) + 1


def test_a_copy_is_named_as_the_data(tmp_path):
    """It needs neither the original images nor a place for copies."""
    path = a_set(tmp_path, "folder")
    expected, labels, classes = open_folder(path, tmp_path / "cache")
    shutil.copytree(next(tmp_path.rglob("dataset.json")).parent, tmp_path / "moved")
    shutil.rmtree(path)
    shutil.rmtree(tmp_path / "cache")
    c = DataConfig("image_folder", dir=str(tmp_path / "none"), path=str(tmp_path / "moved"))
    data = open_data(c)
    np.testing.assert_array_equal(data.images, expected)
    assert list(data.labels()) == list(labels) and list(data.classes) == classes
    assert inspect(c) == (6, (8, 8, 3), True)
    for opens in (open_data, inspect):
        with pytest.raises(UserError, match=r"is a prepared copy of images 8x8x3, not of data.image_size=16"):
            opens(DataConfig("image_folder", image_size=16, path=str(tmp_path / "moved")))
    (tmp_path / "moved" / "index.npz").write_bytes(b"")
    for opens in (open_data, inspect):
        with pytest.raises(Fault, match=r"the copy .* is damaged"):
            opens(c)


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb"])
def test_a_set_is_listed_once(tmp_path, monkeypatch, kind):
    """By a command that inspects it and opens it, and afterwards it is listed again. An LMDB is not even opened."""
    path, opened = a_set(tmp_path, kind), []
    c = DataConfig("image_folder", dir=str(tmp_path / "cache"), path=str(path))
    expected = open_data(c).images[...]
    open_files = folders._open
    monkeypatch.setattr(folders, "_open", lambda name: opened.append(1) or open_files(name))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("the LMDB was read"))
    with folders.listed_once():
        assert inspect(c).num_examples == 6
        np.testing.assert_array_equal(open_data(c).images, expected)
    assert len(opened) == 1
    inspect(c)
    assert len(opened) == 2


def test_folders_whose_names_have_dots_are_told_apart(tmp_path):
    for name, count, side in (("photos.v1.0", 3, 16), ("photos.v1.1", 5, 32)):
        photos(tmp_path / name, count, side, side)
        for _ in range(2):
            assert inspect_files(tmp_path / name, tmp_path / "cache") == (count, (side, side, 3), [""])


def test_a_folder_with_a_long_name(tmp_path):
    photos(tmp_path / ("x" * 240), 2)
    assert len(open_folder(tmp_path / ("x" * 240), tmp_path / "cache")[0]) == 2


def test_a_copy_that_cannot_be_read_is_not_old(tmp_path, monkeypatch, capsys):
    photos(tmp_path / "in", 2)
    open_folder(tmp_path / "in", tmp_path / "cache")
    with monkeypatch.context() as patch:
        fail_on(patch, paths, "read", OSError(errno.EIO, "Input/output error"), "dataset.json")
        assert copies.main([f"--dir={tmp_path}/cache", "--remove_old"]) == 0
    assert "dataset.json cannot be read: OSError: " in (said := capsys.readouterr().out) and "no old copies" in said
    name = next(tmp_path.rglob("dataset.json")).parent.name
    fail_on(monkeypatch, shutil, "rmtree", OSError(errno.EACCES, "Permission denied"), name)
    assert copies.main([f"--dir={tmp_path}/cache", f"--remove={name}"]) == 1
    assert "cannot be removed: PermissionError: " in capsys.readouterr().out


def test_the_working_directory_is_not_taken_for_the_data(tmp_path, monkeypatch):
    photos(tmp_path / "in", 2)
    open_folder(tmp_path / "in", tmp_path / "cache")
    monkeypatch.chdir(next(tmp_path.rglob("dataset.json")).parent)
    with pytest.raises(UserError, match=r"data\.path='' does not exist"):
        open_data(DataConfig("image_folder", path=""))


def test_data_dir_is_a_path(tmp_path):
    with pytest.raises(UserError, match="paths are local or gs://bucket/name, not s3://"):
        open_data(DataConfig("image_folder", path=str(photos(tmp_path, 2)), dir="s3://bucket/data"))


def test_old_copies_are_listed_and_removed(tmp_path, capsys):
    path, cache = tmp_path / "in", tmp_path / "cache"
    for i in range(3):  # three states of the folder
        save(path / f"{i}.png", noise(32, 32, i))
        open_folder(path, cache)
        open_folder(path, cache, size=16)
    (cache / "image_folder" / "incomplete.in-0").mkdir()

    def command(*arguments):
        capsys.readouterr()
        code = copies.main([f"--dir={cache}", *arguments])
        return code, capsys.readouterr()

    code, said = command()
    lines = said.out.splitlines()
    assert code == 0 and len(lines) == 8 and sum(line.endswith("  old") for line in lines) == 5
    assert f"3 images: {path} at 32x32x3" in said.out and "--remove_old frees" in lines[-1]
    with downloads.locked(cache / "image_folder" / "in-0"):
        assert sum("another process is making it" in line for line in command("--remove_old")[1].out.splitlines()) == 1
    assert command("--remove_old")[0] == 0
    assert len(list(cache.rglob("dataset.json"))) == 2 and not list(cache.rglob("incomplete.*"))
    for size in (None, 16):
        assert len(open_folder(path, cache, size=size)[0]) == 3
    code, said = command("--remove=other")
    assert code == 2 and said.err == f"error: there is no copy other in {cache}/image_folder\n"
    name = next(cache.rglob("dataset.json")).parent.name
    assert command(f"--remove={name}")[0] == 0 and len(list(cache.rglob("dataset.json"))) == 1
    assert command("--remove_old")[1].out.endswith("\nthere are no old copies\n")
    assert copies.main([f"--dir={tmp_path}/none"]) == 0
