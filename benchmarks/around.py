"""Measures start-up, evaluation, photo decoding and sample writing: everything around the training step.

    python -m benchmarks.around                                 minutes on 2 cores; one JSON line at the end
    python -m benchmarks.around --only=features --num=10000     one part, smaller

| part | measures |
|---|---|
| start | seconds to the first step of the digits, without and with the programs of an earlier run |
| features | seconds of precision, recall, density, coverage, Frechet and kernel distance, 50,000 x 2,048 features |
| photos | milliseconds to decode a JPEG of 12 megapixels to 256 px |
| folder | seconds to open a folder of 100,000 small PNGs: first, again, with 1 % more files, and its copy by name |
| copy | images of 256 px per second from a prepared copy that is not in the cache of the file system, in 2 threads |
| files | milliseconds to write an image of 256 px into a directory of samples |

Commands run in processes of their own. Nothing else should run on the computer.
"""

import argparse
import collections
import concurrent.futures
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable

import numpy as np

from ddgan_jax.commands import outputs
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import decoding, sources
from ddgan_jax.data.folder import listed_once
from ddgan_jax.data.prepared import Index, PreparedImages
from ddgan_jax.metrics import distances, manifold

ROOT = pathlib.Path(__file__).parent.parent


def first_steps(num: int) -> dict[str, float]:
    """Seconds to the first step, cold and warm, as the command prints them."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            command = [sys.executable, "main.py", f"--workdir={folder}/{name}", "--config.train.num_steps=1"]
            env = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            match = re.search(r"step 1 done, ([0-9.]+) s", done.stdout)
            found[f"{name}_s"] = float(match[1]) if match else float("nan")
    return found


def features(num: int, width: int = 2_048) -> dict[str, float]:
    """Seconds of all measures of `num` samples against as many real images."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((20, width), np.float32)
    sets = [np.tanh(s * rng.standard_normal((num, 20), np.float32) @ mix) for s in (1.0, 0.9)]
    real, fake = (x + 0.1 * rng.standard_normal((num, width), np.float32) for x in sets)
    start = time.perf_counter()
    manifold.precision_recall(real, fake)
    middle = time.perf_counter()
    a, b = (distances.moments(x[i : i + 1024] for i in range(0, num, 1024)) for x in (real, fake))
    distances.frechet_distance(a, b)
    distances.kernel_distance(real, fake)
    return {"manifolds_s": middle - start, "distances_s": time.perf_counter() - middle, "num": num, "width": width}


def photos(num: int) -> dict[str, float]:
    """Milliseconds to decode one photo in one thread."""
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:3000, 0:4000]
    image = np.stack([128 + 100 * np.sin(x / 97 + y / 210), 120 + 90 * np.sin(y / 33), x / 16], -1)
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(image + 6 * rng.normal(size=image.shape), 0, 255))).save(file, "jpeg", quality=90)
    start = time.perf_counter()
    for _ in range(num):
        decoding.decode(file.getvalue(), 256, 3)
    return {"photo_ms": 1e3 * (time.perf_counter() - start) / num}


def folder(num: int) -> dict[str, float]:
    """Seconds until a folder of `num` files is open."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "png")
    with tempfile.TemporaryDirectory() as where:
        images = pathlib.Path(where) / "images"

        def add(start: int, end: int) -> None:
            for i in range(start, end):
                target = images / f"{i % 10}" / f"{i:07d}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.getvalue())

        def opening(path: str) -> float:
            start, c = time.perf_counter(), DataConfig("image_folder", dir=f"{where}/data", path=path)
            with listed_once():
                info, data = sources.inspect(c), sources.open_data(c)
            assert info.num_examples == len(data.images)
            return time.perf_counter() - start

        add(0, num)
        found = {"first_s": opening(str(images)), "again_s": opening(str(images))}
        add(num, num + num // 100)
        found["grown_s"] = opening(str(images))
        newest = max(pathlib.Path(where).rglob("dataset.json"), key=os.path.getmtime).parent
        return found | {"copy_s": opening(str(newest))}


def copy(num: int) -> dict[str, float]:
    """Images per second."""
    size, batch = 256 * 256 * 3, 32
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    with tempfile.TemporaryDirectory() as where:
        file = pathlib.Path(where) / "images.0.bin"
        with file.open("wb") as opened:
            for _ in range(num):
                opened.write(pixels.data)
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        index = Index(np.zeros(num, int), np.arange(num), np.full(num, zlib.crc32(pixels.data)))
        images = PreparedImages([file], (256, 256, 3), index)
        order = np.random.default_rng(1).permutation(num)[: num // batch * batch].reshape(-1, batch)
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            collections.deque(pool.map(images.__getitem__, order), maxlen=0)
        return {"copy_images_per_s": order.size / (time.perf_counter() - start)}


def files(num: int) -> dict[str, float]:
    """Milliseconds to write one image."""
    rng = np.random.default_rng(0)
    image = np.cumsum(np.cumsum(rng.normal(size=(256, 256, 3)), 0), 1)
    image = 235 * (image - image.min()) / np.ptp(image) + 2 * rng.normal(size=image.shape)
    chunk = np.repeat(np.uint8(np.clip(image, 0, 255))[None], 64, axis=0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with outputs.into_directory(folder) as add:
            for _ in range(num // 64):
                add(chunk)
        return {"file_ms": 1e3 * (time.perf_counter() - start) / (num // 64 * 64)}


PARTS: dict[str, tuple[Callable[[int], dict[str, float]], int]] = {
    "start": (first_steps, 1),
    "features": (features, 50_000),
    "photos": (photos, 20),
    "folder": (folder, 100_000),
    "copy": (copy, 10_000),
    "files": (files, 640),
}


def main() -> None:
    """Measure the parts, and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--num", type=int, help="size of a part; default: " + str({k: v[1] for k, v in PARTS.items()}))
    flags = parser.parse_args()
    found: dict[str, float] = {}
    for name, (measure, num) in PARTS.items():
        if flags.only in (None, name):
            row = {key: round(value, 2) for key, value in measure(flags.num or num).items()}
            print(name, row, flush=True)
            found |= row
    print(json.dumps(found))


if __name__ == "__main__":
    main()
