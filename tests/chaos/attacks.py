"""Hostile files, read one after the other in a process with little memory: `python attacks.py KIND SEED COUNT FOLDER`.

Prints JSON: how many were `tried` and `refused`, the seconds of the slowest, the peak of memory in MiB. Anything but a
sentence (UserError, Fault, and ValueError from the decoder of one image) ends it with a traceback.
"""

import io
import json
import pathlib
import pickle
import random
import resource
import shutil
import sys
import time
import zipfile

import numpy as np
from PIL import Image

from ddgan_jax.commands import sample_files
from ddgan_jax.config import presets
from ddgan_jax.config import settings as config
from ddgan_jax.data import archives, decoding, prepared
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method import build
from ddgan_jax.metrics import distances
from ddgan_jax.metrics.npz import read_npz
from ddgan_jax.model import loading
from ddgan_jax.storage import checkpoint, manager
from ddgan_jax.storage.torch import files

MOST_MEMORY, MOST_SECONDS = 4 * 2**30, 10  # what may be asked for, which is more than what may be used
JUNK = [None, True, -1, 0, 1, 10**9, 10**30, 1e308, -0.5, "", "x", "../x", [], [0], {}, {"a": 1}, [[1]], "9" * 400]


def picture(form: str, mode: str = "RGB", size: int = 24) -> bytes:
    rng, file = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).convert(mode)
    more = {"save_all": True, "append_images": [image]} if form == "GIF" else {}
    if form in ("JPEG", "PNG", "WEBP"):
        more["exif"] = Image.Exif()
        more["exif"].update({0x0112: 6, 0x0110: "model", 0x011A: 72.0, 0x0132: "2020:01:01 00:00:00"})
    image.save(file, form, **more)
    return file.getvalue()


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, doubled, or set to what lengths and counts overflow with."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else min(rng.randrange(256), len(data) - 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        elif kind == 2:
            data[at:] = data[at:][: rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            data[at : at + 8] = rng.randbytes(8)
        else:
            del data[at : at + rng.randrange(1, 32)]
        data = data or bytearray(b"x")
    return bytes(data)


def look_and_decode(content: bytes, rng: random.Random) -> None:
    try:
        decoding.read_header(content[: archives.EXCERPT_BYTES])
    finally:
        assert decoding.fit(decoding.open_image(content), 32, rng.choice((1, 3))).shape[:2] == (32, 32)


def images(*pictures: bytes):
    def attack(rng: random.Random, folder: pathlib.Path) -> None:
        look_and_decode(mutated(rng.choice(pictures), rng), rng)

    return attack


def npz(rng: random.Random, folder: pathlib.Path) -> None:
    buffer = io.BytesIO()
    what = rng.randrange(3)
    if what == 0:
        np.savez(buffer, images=np.zeros((4, 8, 8, 3), np.uint8))
    elif what == 1:
        np.savez_compressed(buffer, mu=np.zeros(4), sigma=np.eye(4))
    else:
        np.savez(buffer, a=np.array([pickled(folder)], object))
    file = folder / "x.npz"
    file.write_bytes(mutated(buffer.getvalue(), rng) if rng.random() < 0.95 else buffer.getvalue())
    read = rng.choice((samples_of, distances.load_moments, read_npz))
    read(str(file))


def samples_of(path: str) -> None:
    for _ in sample_files.file_samples(path, 0)[0]:
        pass


class Runs:
    """A pickle of it runs a program when it is read."""

    def __init__(self, file: pathlib.Path):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def pickled(folder: pathlib.Path) -> Runs:
    return Runs(folder / "it_ran")


def a_zip(rng: random.Random, folder: pathlib.Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
        for i in range(3):
            name = rng.choice((f"a/{i}.png", f"../{i}.png", f"/tmp/{i}.png", f"..\\{i}.png", f"b/é{i}.jpg"))
            file.writestr(name, picture("PNG"))
        if rng.random() < 0.1:
            file.writestr("bomb.bmp", b"\0" * 2**28)
    (folder / "x.zip").write_bytes(mutated(buffer.getvalue(), rng) if rng.random() < 0.9 else buffer.getvalue())
    shutil.rmtree(folder / "cache", ignore_errors=True)
    prepared.open_folder(str(folder / "x.zip"), rng.choice((None, 8)), None, str(folder / "cache"), 1.0)


def an_lmdb(rng: random.Random, folder: pathlib.Path) -> None:
    import lmdb

    good = folder / "good"
    if not good.exists():
        with lmdb.open(str(good), map_size=2**20) as environment, environment.begin(write=True) as transaction:
            for i in range(40):
                transaction.put(f"{i:05d}".encode(), picture("WEBP", size=32))
    (folder / "x").mkdir(exist_ok=True)
    (folder / "x" / "data.mdb").write_bytes(mutated((good / "data.mdb").read_bytes(), rng))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    prepared.open_folder(str(folder / "x"), 8, 3, str(folder / "cache"), 1.0)


def a_pth(rng: random.Random, folder: pathlib.Path) -> None:
    import torch

    good, file = folder / "good.pth", folder / "x.pth"
    if not good.exists():
        torch.save({f"module.all_modules.{i}.weight": torch.zeros(4, 4) for i in range(6)}, good)
    if rng.random() < 0.1:
        content = {"netG_dict": {"a": torch.zeros(2)}, "args": pickled(folder)}
        torch.save(content, file) if rng.random() < 0.5 else file.write_bytes(pickle.dumps(content["args"]))
    else:
        file.write_bytes(mutated(good.read_bytes(), rng))
    files.read(str(file), image_size=32)


def a_safetensors(rng: random.Random, folder: pathlib.Path) -> None:
    good = loading.file_of("gaussians")
    (folder / "x.safetensors").write_bytes(mutated(pathlib.Path(good).read_bytes(), rng))
    loading.load(str(folder / "x.safetensors"))


def settings(rng: random.Random, folder: pathlib.Path) -> None:
    """As a checkpoint or a file of a model has them."""
    told = config.as_dict(presets.get(f"{rng.choice(presets.names())}:smoke"))
    for _ in range(rng.choice((1, 2, 5))):
        group = told
        while True:
            name = rng.choice(list(group))
            if not isinstance(group[name], dict) or not group[name] or rng.random() < 0.2:
                break
            group = group[name]
        group[name] = rng.choice(JUNK)
    build.denoiser(config.read(json.loads(json.dumps(told))))


def a_checkpoint(rng: random.Random, folder: pathlib.Path) -> None:
    """Its JSON, with a checksum that fits."""
    good = folder / "good"
    if not good.exists():
        arrays = {"step": np.int32(3), "ema_params": {"w": np.zeros((2, 2), np.float32)}}
        checkpoints = manager.Checkpoints(str(good))
        checkpoints.save(3, arrays, config.as_dict(config.Config()))
        checkpoints.close()
    copy = folder / "x"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    file = copy / "checkpoints" / "3" / "config" / "metadata"
    if rng.random() < 0.5:
        file.write_bytes(mutated(file.read_bytes(), rng))
    else:
        told = json.loads(file.read_text())
        del told["checksum"]
        name = rng.choice(list(told))
        told[name] = rng.choice(JUNK)
        file.write_text(json.dumps(told))
    _, metadata, _ = checkpoint.restore_ema(str(copy))
    config.read(metadata["config"])


KINDS = {
    "jpeg": images(picture("JPEG"), picture("JPEG", "L"), picture("JPEG", "CMYK")),
    "png": images(*(picture("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16"))),
    "webp": images(picture("WEBP"), picture("WEBP", "RGBA")),
    "gif": images(picture("GIF", "P")),
    "bmp": images(picture("BMP"), picture("BMP", "P")),
    "npz": npz,
    "zip": a_zip,
    "lmdb": an_lmdb,
    "pth": a_pth,
    "safetensors": a_safetensors,
    "settings": settings,
    "checkpoint": a_checkpoint,
}


def main(kind: str, seed: str, count: str, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    place, attack, refused, slowest = pathlib.Path(folder), KINDS[kind], 0, 0.0
    place.mkdir(parents=True, exist_ok=True)
    for i in range(int(count)):
        rng, start = random.Random(f"{seed} {i}"), time.perf_counter()
        print(kind, seed, i, file=sys.stderr, flush=True)  # the last line names the case, whatever happens
        try:
            attack(rng, place)
        except (UserError, Fault):
            refused += 1
        except ValueError:  # of a single image
            if kind not in ("jpeg", "png", "webp", "gif", "bmp"):
                raise
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert not (place / "it_ran").exists(), "code from a file was run"
    print(json.dumps({"tried": int(count), "refused": refused, "slowest": slowest, "mib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
