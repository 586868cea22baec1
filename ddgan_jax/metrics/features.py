"""Features of images: their extraction on every device, and the caches in `data.dir`/evaluation."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import Config
from ddgan_jax.data import sources
from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics import npz
from ddgan_jax.metrics.distances import Moments, load_moments, moments, write_moments
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.paths import Path


class Features(NamedTuple):
    """Outputs of a feature network for a set of images: float32 [N, D] and [N, K]."""

    features: np.ndarray
    logits: np.ndarray  # K = 0 where the network has none


class Network(NamedTuple):
    """A feature network."""

    name: str
    apply: Callable[[np.ndarray], Sequence[np.ndarray]]  # uint8 [n, H, W, C] -> ([n, D], [n, K])
    fingerprint: str  # changes with the weights, and names the cached features


def on_devices(name: str, apply: Callable[[Any, Any], Any], params: Any) -> Network:
    """The network `apply(params, images)` -> (features, logits), which splits images among this process's devices."""
    digest = hashlib.sha256(name.encode())
    for path, leaf in sorted(checkpoint.flatten(params).items()):
        digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    params, mapped = parallel.replicate_local(params), parallel.map_local(apply, (None, 0))

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = mapped(params, images.reshape(jax.local_device_count(), -1, *images.shape[1:]))
        return [np.asarray(x).reshape(len(images), *x.shape[2:]) for x in outputs]

    return Network(name, run, digest.hexdigest()[:16])


def extract(
    networks: Sequence[Network], chunks: Iterable[np.ndarray], batch_size: int, total: int, progress: str = ""
) -> list[Features]:
    """The features of `total` uint8 images by every network, in one pass over their chunks [n, H, W, C].

    `batch_size` images at a time on each device, whatever the sizes of the chunks. Where several processes share the
    work, a chunk is this process's part (`parallel.work_chunks`), and every process gets the features of all images.
    `progress` names a progress bar; without a name there is none.
    """
    parts = list(_extracted(networks, chunks, batch_size, total, progress))
    return [_joined([part[i] for part in parts]) for i in range(len(networks))]


def _extracted(
    networks: Sequence[Network], chunks: Iterable[np.ndarray], batch_size: int, total: int, progress: str
) -> Iterator[list[Features]]:
    """Yields the features of `extract` for each chunk."""
    mine: list[list[Features]] = [[] for _ in networks]  # of this process, of chunks that are not complete
    batch, done, sizes = batch_size * jax.local_device_count(), 0, collections.deque[int]()
    hidden = None if progress and processes.is_primary() else True
    # leave=None: a bar below another one, that of a training, is removed at its end
    with tqdm(total=total, desc=progress, unit="img", leave=None, disable=hidden) as bar:
        for images in _full_batches(chunks, batch, sizes):
            padded = np.resize(images, (batch, *images.shape[1:]))  # the last batch: one compiled shape
            for network, rows in zip(networks, mine, strict=True):
                rows.append(Features(*(x[: len(images)] for x in network.apply(padded))))
            while sizes and sizes[0] <= sum(len(rows.features) for rows in mine[0]):
                size, found = sizes.popleft(), []
                for rows in mine:
                    joined = _joined(rows)
                    rows[:] = [Features(*(x[size:] for x in joined))]
                    gathered = processes.gather_rows(Features(*(x[:size] for x in joined)))
                    found.append(Features(*(x[: total - done] for x in gathered)))
                bar.update(len(found[0].features))
                done += len(found[0].features)
                yield found


def progress_bar(name: str) -> Callable[[Iterable], Iterable]:
    """A function that shows a progress bar while its argument is iterated over; without a `name` there is no bar."""
    return lambda blocks: tqdm(blocks, name, leave=False, disable=None if name else True)


def _joined(parts: list[Features]) -> Features:
    return Features(*map(np.concatenate, zip(*parts, strict=True)))


def _full_batches(chunks: Iterable[np.ndarray], size: int, sizes: collections.deque[int]) -> Iterator[np.ndarray]:
    """The images of the chunks in batches of `size`; the last may be smaller. Appends the chunks' sizes to `sizes`."""
    waiting: list[np.ndarray] = []
    for chunk in chunks:
        sizes.append(len(chunk))
        waiting.append(chunk)
        if sum(map(len, waiting)) >= size:
            images = np.concatenate(waiting)
            whole = len(images) // size * size
            yield from np.split(images[:whole], whole // size)
            waiting = [images[whole:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def open_real_images(c: Config) -> sources.Data:
    """The real images; an empty set if they are missing and published statistics replace them."""
    data = dataclasses.replace(c.data, download=c.data.download and not c.eval.reference_statistics)
    try:
        processes.run_on_primary(lambda: sources.prepare(data))  # the others find what is on a shared disk
        return processes.run_on_all(lambda: sources.open_data(data))
    except UserError as error:  # the same in every process
        # A class-conditional model needs the data for the frequencies of its classes.
        if c.eval.features != "inception" or not c.eval.reference_statistics or c.model.num_classes:
            raise
        processes.say(f"without KID, precision and recall, which need real images: {error}")
        return sources.Data(np.zeros((0, 0, 0, 0), np.uint8))


def reference_features(c: Config, data: sources.Data, reference: np.ndarray, network: Network) -> Features:
    """Features of the real images at the indices `reference`, in process 0; other processes may get empty arrays.

    All devices compute them once; afterwards they are read from the cache.
    """
    empty = Features(np.zeros((0, 0)), np.zeros((0, 0)))
    if not len(reference):
        return empty
    path = _cache_of_images(c, "features", data, network, len(reference))
    cached = read_cached(path, lambda: _read_features(path)) if processes.is_primary() else None
    if cached is not None and len(cached.features) != len(reference):
        cached = None
    if not processes.broadcast_from_primary(lambda: cached is None):
        return cached or empty
    found = _joined([features for (features,) in _of_images(c, data, reference, network)])
    processes.run_on_primary(lambda: write_cached(path, lambda file: np.savez(file, **found._asdict())))
    return found


def _read_features(path: Path) -> Features:
    arrays = npz.read_npz(path, Features._fields)
    if len(arrays) < len(Features._fields):
        raise UserError(f"{path} must hold the arrays {' and '.join(Features._fields)}")
    return Features(**arrays)


def reference_moments(c: Config, data: sources.Data, reference: np.ndarray, network: Network) -> Moments:
    """Moments of the features of the real images at the indices `reference`, which are not kept; cached likewise."""
    path = _cache_of_images(c, "moments", data, network, len(reference))

    def cached() -> Moments | None:
        return read_cached(path, lambda: load_moments(path, network=network.fingerprint))

    if (found := processes.broadcast_from_primary(cached)) is None:
        found = moments(features.features for (features,) in _of_images(c, data, reference, network))
        values = found
        processes.run_on_primary(
            lambda: write_cached(path, lambda file: write_moments(file, values, network.fingerprint))
        )
    return found


def _of_images(c: Config, data: sources.Data, indices: np.ndarray, network: Network) -> Iterator[list[Features]]:
    """Extracts the features of real images on all devices of all processes."""
    chunks = (data.images[indices[some]] for some, _ in parallel.work_chunks(len(indices), c.eval.batch_size))
    return _extracted([network], chunks, c.eval.batch_size, len(indices), f"real images in {network.name}")


def _cache_of_images(c: Config, kind: str, data: sources.Data, network: Network, count: int) -> Path:
    """The cache file for `count` images of a dataset in a network."""
    # The fingerprint of a large dataset is of some images only; a folder's copy has a checksum of each.
    every = getattr(data.images, "checksum", "")
    images = hashlib.sha256(f"{c.data.name} {every} {c.data.split} {data.fingerprint}".encode()).hexdigest()[:16]
    return cache_path(c, kind, images, network.fingerprint, f"{count}.npz")


def cache_path(c: Config, *names: str) -> Path:
    """The file that caches a result which depends on nothing but `names`."""
    return Path(paths.cache_dir(sources.directory(c.data.dir)), "evaluation", "-".join(names))


def read_cached(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`, or None if there is no file, or if it is damaged or unreadable; that is printed.

    Nothing is lost then: the caller computes the result again and overwrites the file.
    """
    try:
        return read() if path.exists() else None
    except (UserError, Fault, OSError) as error:
        print(f"note: {error}; it is computed again", flush=True)
        return None


def write_cached(path: Path, write: Callable[[Any], None]) -> None:
    """Write a cache file. A failure is only printed, since it costs no more than time."""
    try:
        paths.write(path, write)
    except OSError as error:
        print(f"note: {error}; it will be computed again", flush=True)
