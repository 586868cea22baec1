"""Measures start-up, evaluation, photo decoding and sample writing: everything around the training step.

    python -m benchmarks.around                                 minutes on 2 cores; one JSON line at the end
    python -m benchmarks.around --only=features --num=10000     one part, smaller

| part | measures |
|---|---|
| start | seconds to the first step of the digits, without and with the programs of an earlier run |
| features | seconds of precision, recall, density, coverage, Frechet and kernel distance, 50,000 x 2,048 features |
| photos | milliseconds to decode a JPEG of 12 megapixels to 256 px |
| files | milliseconds to write an image of 256 px into a directory of samples |

Commands run in processes of their own. Nothing else should run on the computer.
"""

import argparse
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from ddgan_jax.commands import outputs
from ddgan_jax.data import decoding
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
    "files": (files, 640),
}


def main() -> None:
    """Measure the parts, and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument(
        "--num", type=int, help="features, photos or files; default: " + str({k: v[1] for k, v in PARTS.items()})
    )
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
