"""How fast the data arrives: `python -m benchmarks.data`, a minute or two on 2 cores; one JSON line at the end.

Three rates in images a second, medians of several runs after a first one that does not count; 2 and 3 take turns, since
a machine's speed changes with what else it does, and their ratio is the median of the ratios of neighbours:

1. CIFAR-size uint8 images in batches of 256 from memory, ready on the host, and placed on the device;
2. 256x256 JPEGs from array_record, decoded as they are read, against
3. what Pillow alone decodes of the same JPEGs from memory, with a thread on every core.
"""

import concurrent.futures
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import PIL

from benchmarks import measure
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data.batches import batches
from ddgan_jax.data.sources import open_data
from ddgan_jax.devices import parallel
from ddgan_jax.storage.dashboards import quiet

RUNS = 5
CIFAR = (50_000, 32, 32, 3)
NUM_JPEGS, SIDE, QUALITY = 1_000, 256, 95


def rate(run: Callable[[], int]) -> float:
    """Images a second of `run`, which returns how many it handled."""
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def median_rate(run: Callable[[], int]) -> float:
    """The same, of several runs after one that does not count."""
    return statistics.median([rate(run) for _ in range(RUNS + 1)][1:])


def stream(images, batch_size: int) -> Iterator[np.ndarray]:
    """The batches that a training run of one process sees."""
    return batches(images, global_batch=batch_size, seed=0, start_step=0, process_index=0, process_count=1)


def take(source: Iterator, num_batches: int) -> int:
    """Draw batches; returns how many images they hold."""
    return sum(np.prod(next(source).shape[:-3]) for _ in range(num_batches))


def jpegs() -> list[bytes]:
    """Smooth random pictures with a little noise, about 35 kB each, as photographs of that size have."""
    from PIL import Image

    rng, files = np.random.default_rng(0), []
    for _ in range(NUM_JPEGS):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(small) + rng.normal(0, 8, (SIDE, SIDE, 3))
        file = io.BytesIO()
        Image.fromarray(np.uint8(np.clip(noisy, 0, 255))).save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    return files


def write(files: list[bytes], folder: str) -> None:
    """The JPEGs as a tfds dataset 'photos' in array_record."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    class Photos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(SIDE, SIDE, 3), dtype=tf.uint8, encoding_format="jpeg")
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": image}))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, content in enumerate(files):
                yield i, {"image": io.BytesIO(content)}

    tfds.disable_progress_bar()
    Photos(data_dir=folder).download_and_prepare(file_format="array_record")


def pillow(files: list[bytes]) -> int:
    """Decode all files, with a thread on every core."""
    from PIL import Image

    def decode(content: bytes) -> int:
        return np.asarray(Image.open(io.BytesIO(content))).size

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, files))
    return len(files)


def main() -> None:
    """Measure and print."""
    cifar = np.random.default_rng(0).integers(0, 256, CIFAR, np.uint8)
    host, device = stream(cifar, 256), parallel.prefetch(stream(cifar, 256))
    rates = {
        "memory": median_rate(lambda: take(host, 400)),
        "memory_to_device": median_rate(lambda: take(device, 400)),
    }
    files = jpegs()
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            write(files, folder)
        photos = stream(open_data(DataConfig("photos", dir=folder, in_memory_mib=0)).images, 32)
        ours, theirs, shares = [], [rate(lambda: pillow(files))], []
        for _ in range(2 * RUNS):
            take(photos, 8)  # what was made while the others ran
            ours.append(rate(lambda: take(photos, NUM_JPEGS // 32)))
            time.sleep(0.5)  # until it has stopped working ahead
            theirs.append(rate(lambda: pillow(files)))
            shares.append(2 * ours[-1] / (theirs[-1] + theirs[-2]))
        rates |= {"array_record": statistics.median(ours), "pillow": statistics.median(theirs)}
        share = statistics.median(shares)
    size = np.mean([len(file) for file in files]) / 1024
    print(
        f"32x32 from memory, batches of 256: {rates['memory']:,.0f} images/s on the host, "
        f"{rates['memory_to_device']:,.0f} placed on {jax.devices()[0].device_kind}\n"
        f"256x256 JPEGs of {size:.0f} KiB from array_record: {rates['array_record']:,.0f} images/s, {share:.0%} of "
        f"what Pillow decodes alone ({rates['pillow']:,.0f})"
    )
    found = {name: round(rate) for name, rate in rates.items()}
    measure.print_line(found | {"share_of_pillow": round(share, 3), "pillow_version": PIL.__version__})


if __name__ == "__main__":
    main()
