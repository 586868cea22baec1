"""Features of images: their extraction on every device, and the caches in `data.dir`/evaluation."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import Config
from ddgan_jax.data import sources
from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics import npz
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

    `batch_size` images at a time on each device. Where several processes share the work, a chunk is this process's part
    (`parallel.work_chunks`), and every process gets the features of all images. `progress` names a progress bar;
    without a name there is none.
    """
    found: list[list[Features]] = [[] for _ in networks]
    done = 0
    with tqdm(
        total=total, desc=progress, unit="img", disable=None if progress and processes.is_primary() else True
    ) as bar:
        for chunk in chunks:
            for network, parts in zip(networks, found, strict=True):
                rows = processes.gather_rows(_apply(network, chunk, batch_size * jax.local_device_count()))
                parts.append(Features(*(x[: total - done] for x in rows)))
            bar.update(len(found[0][-1].features))
            done += len(found[0][-1].features)
    return [Features(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]


def _apply(network: Network, images: np.ndarray, batch_size: int) -> Features:
    """The features of images [n, H, W, C], `batch_size` at a time."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        full = np.resize(batch, (batch_size, *batch.shape[1:]))  # the last batch is padded: one compiled shape
        parts.append([x[: len(batch)] for x in network.apply(full)])
    return Features(*map(np.concatenate, zip(*parts, strict=True)))


def reference_features(c: Config, data: sources.Data, reference: np.ndarray, network: Network) -> Features:
    """Features of the real images at the indices `reference`, in process 0; other processes may get empty arrays.

    All devices compute them once; afterwards they are read from the cache.
    """
    empty = Features(np.zeros((0, 0)), np.zeros((0, 0)))
    if not len(reference):
        return empty
    # The name of a folder's copy depends on the size and time of every file, even where not every image is hashed.
    copy = os.path.basename(os.path.dirname(getattr(data.images, "filename", None) or ""))
    images = hashlib.sha256(f"{c.data.name} {copy} {c.data.split} {data.fingerprint}".encode()).hexdigest()[:16]
    path = cache_path(c, "features", images, network.fingerprint, f"{len(reference)}.npz")
    cached = read_cached(path, lambda: Features(**npz.read_npz(path))) if processes.is_primary() else None
    if cached is not None and len(cached.features) != len(reference):
        cached = None
    if not processes.broadcast_from_primary(lambda: cached is None):
        return cached or empty
    chunks = (data.images[reference[indices]] for indices, _ in parallel.work_chunks(len(reference), c.eval.batch_size))
    found = extract([network], chunks, c.eval.batch_size, len(reference), f"real images in {network.name}")[0]
    processes.run_on_primary(lambda: write_cached(path, lambda file: np.savez(file, **found._asdict())))
    return found


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
