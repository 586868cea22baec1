"""Hostile files of every kind that is read: they raise a one-line error, or are read as what they contain.

The interpreter does not crash, no program from a file runs, nothing outside is read or written, and each file takes at
most 2 GB and 10 s.
"""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ddgan_jax.data import prepared
from ddgan_jax.errors import Fault, UserError

ENV = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent.parent)}
COUNTS = {  # cases with --full; other runs have a 50th of them
    "jpeg": 700,
    "png": 900,
    "webp": 500,
    "gif": 300,
    "bmp": 400,
    "npz": 500,
    "zip": 300,
    "lmdb": 300,
    "pth": 500,
    "safetensors": 500,
    "settings": 1000,
    "checkpoint": 200,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_files(kind, full, count, tmp_path):
    cases = COUNTS[kind] if full else max(10, COUNTS[kind] // 50)
    script = pathlib.Path(__file__).with_name("attacks.py")
    command = [sys.executable, "-W", "ignore", script, kind, "0", str(cases), tmp_path / "inside" / "folder"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600, env=ENV)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["tried"] == cases and found["refused"] > 0
    assert found["slowest"] < 10 and found["mib"] < 2048, found
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    count(cases=cases, refused=found["refused"], slowest=found["slowest"], mib=found["mib"])


def png_of(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A small file that unpacks to many pixels."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    row = b"\0" * (1 + width * channels * bits // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BOMBS = {"rgb": (9999, 9999, 8, 2), "rgba": (9999, 9999, 8, 6), "grey16": (9999, 9999, 16, 0), "large": (40000, 40000)}

READ = """
import resource, sys, time
from ddgan_jax.data import prepared
from ddgan_jax.errors import Fault, UserError
start = time.process_time()
try:
    print(prepared.open_folder(sys.argv[1], 32, None, sys.argv[2], 1.0)[0].shape)
except UserError as error:
    print(error)
peak = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(int(max(peak) / 1024), time.process_time() - start)
"""


def read(path, cache) -> tuple[str, int, float]:
    """Reads a folder or zip in a process of its own: its last line of output, peak memory in MiB, processor seconds."""
    command = [sys.executable, "-W", "ignore", "-c", READ, path, cache]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)
    assert ended.returncode == 0, ended.stderr
    *said, numbers = ended.stdout.strip().splitlines()
    return said[-1], int(numbers.split()[0]), float(numbers.split()[1])


@pytest.mark.parametrize("packed", ["folder", "zip"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb, packed, count, tmp_path):
    """Four files of less than a megabyte each that unpack to the limit, or beyond it."""
    content = (
        png_of(*BOMBS[bomb])
        if bomb != "large"
        else png_of(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", 40000, 40000))
    )
    assert len(content) < 2**20
    (tmp_path / "bombs").mkdir()
    with zipfile.ZipFile(tmp_path / "bombs.zip", "w") as file:
        for i in range(4):
            (tmp_path / "bombs" / f"{i}.png").write_bytes(content)
            file.writestr(f"{i}.png", content)
    said, mib, seconds = read(tmp_path / ("bombs.zip" if packed == "zip" else "bombs"), tmp_path / "cache")
    assert mib < 2048 and seconds < 40, (said, mib, seconds)
    assert ("4 of 4 files" in said) == (bomb == "large"), said
    count(cases=1, mib=mib)


def test_a_zip_bomb(count, tmp_path):
    """A gigabyte of zeros with the name of an image, and a zip directory with a wrong size for it."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file, file.open("x.bmp", "w") as inside:
        for _ in range(1500):
            inside.write(b"\0" * 2**20)
    lies = (tmp_path / "x.zip").read_bytes()
    size = struct.pack("<I", 1500 * 2**20)
    assert lies.count(size) >= 1
    (tmp_path / "y.zip").write_bytes(lies.replace(size, struct.pack("<I", 1000)))
    for name in ("x.zip", "y.zip"):
        said, mib, seconds = read(tmp_path / name, tmp_path / "cache")
        assert "1 of 1 files" in said and mib < 2048 and seconds < 10, (said, mib, seconds)
    count(cases=2)


def test_what_is_no_file(count, tmp_path):
    """Pipes, devices, folders and links with names of images. Reading never blocks or leaves the folder."""
    outside, folder = tmp_path / "outside.png", tmp_path / "folder"
    Image.new("RGB", (8, 8)).save(outside)
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "outside.png").symlink_to(outside)
    (folder / "password.png").symlink_to("/etc/passwd")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "down").mkdir()
    (folder / "down" / "round").symlink_to(folder)
    (folder / "folder.png").mkdir()
    if os.getuid() == 0:
        os.mknod(folder / "device.png", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    said, mib, seconds = read(folder, tmp_path / "cache")
    assert said == "(3, 32, 32, 3)" and seconds < 10 and mib < 1024, (said, mib, seconds)
    skipped = json.loads(next((tmp_path / "cache").rglob("skipped.json")).read_text())
    assert skipped.keys() >= {"pipe.png", "outside.png", "password.png", "zero.png", "loop.png"}
    count(cases=len(skipped))


def test_programs_in_names_and_formats(count, tmp_path):
    """Formats for which Pillow would run a program, and names that contain commands, are skipped."""
    ran = tmp_path / "it_ran"
    folder = tmp_path / "folder"
    folder.mkdir()
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch {ran}) (w) file\nshowpage\n"
    (folder / "a.png").write_text(script)
    (folder / f"$(touch {ran.name}).png").write_bytes(b"x")
    (folder / "b.png").write_bytes(b"#!/bin/sh\ntouch it_ran\n")
    with pytest.raises(UserError, match="3 of 3 files"):
        prepared.open_folder(str(folder), 8, 3, str(tmp_path / "cache"), 1.0)
    assert not ran.exists()
    count(cases=3)


def test_an_array_that_claims_too_much(count, tmp_path):
    """The header of an .npy is a few bytes, and may claim any shape."""
    from ddgan_jax.metrics import npz

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", buffer.getvalue())
    with pytest.raises(Fault, match=r"x.npz cannot be read: not enough memory"):
        npz.read_npz(str(tmp_path / "x.npz"))
    count(cases=1)
