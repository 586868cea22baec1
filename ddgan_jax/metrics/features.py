"""Feature networks, and what they make of images: Inception and VGG16 from published weights, or our own classifier.

Files lie in `data.dir`; what is trained or computed once is kept in `data.dir`/evaluation, under fingerprints of the
images and of the network.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import Config
from ddgan_jax.data import sources
from ddgan_jax.data.batches import order
from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics import classifier, inception, vgg, weights
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.paths import Path
from ddgan_jax.storage.torch import files

LEAST_ACCURACY = {"mnist": 0.985, "mnist_5k": 0.97}  # below it, counts of modes mean nothing


class Network(NamedTuple):
    """A feature network on the devices of this process."""

    name: str
    apply: Callable[[Any, Any], Any]  # (params, uint8 [devices, b, H, W, C]) -> (features [.., D], logits [.., K])
    params: Any
    fingerprint: str


class Features(NamedTuple):
    """What a network makes of a set: float32 [N, D] and [N, K]."""

    features: np.ndarray
    logits: np.ndarray


def _network(name: str, apply: Callable[[Any, Any], Any], params: Any) -> Network:
    digest = hashlib.sha256(name.encode())
    for path, leaf in sorted(checkpoint.flatten(params).items()):
        digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    on_devices = parallel.replicate_local(params)
    return Network(name, parallel.map_local(apply, (None, 0)), on_devices, digest.hexdigest()[:16])


def extract(
    networks: Sequence[Network], chunks: Iterable[np.ndarray], batch_size: int, total: int, what: str = ""
) -> list[Features]:
    """What every network makes of `total` uint8 images that come in chunks [n, H, W, C], in one pass over them.

    Where several processes share the work, a chunk is this process's part of a round (`parallel.rounds`), and each of
    them gets the features of all. A progress bar is named `what`; without a name there is none.
    """
    found: list[list[Features]] = [[] for _ in networks]
    done = 0
    with tqdm(total=total, desc=what, unit="img", disable=None if what and processes.is_primary() else True) as bar:
        for chunk in chunks:
            for network, parts in zip(networks, found, strict=True):
                rows = processes.gather_rows(_apply(network, chunk, batch_size))
                parts.append(Features(*(x[: total - done] for x in rows)))
            bar.update(len(found[0][-1].features))
            done += len(found[0][-1].features)
    return [Features(*(np.concatenate(x) for x in zip(*parts, strict=True))) for parts in found]


def _apply(network: Network, images: np.ndarray, batch_size: int) -> Features:
    """What a network makes of images [n, H, W, C], `batch_size` at once on each device of this process."""
    devices, parts = jax.local_device_count(), []
    for start in range(0, len(images), batch_size * devices):
        batch = images[start : start + batch_size * devices]
        whole = np.resize(batch, (batch_size * devices, *batch.shape[1:]))  # the last one is filled up
        made = network.apply(network.params, whole.reshape(devices, batch_size, *batch.shape[1:]))
        parts.append([np.asarray(x).reshape(devices * batch_size, *x.shape[2:])[: len(batch)] for x in made])
    return Features(*(np.concatenate(x) for x in zip(*parts, strict=True)))


# --- Which networks --------------------------------------------------------------------------------------------------


def _find_weights(setting: str, given: str | None, module: Any, folder: str) -> str:
    """The file of a published network: the one that the configuration names, or that in its usual place."""
    path = given or os.path.join(folder, module.FILE)
    if not paths.exists(paths.path(path)):
        raise UserError(
            f"evaluation needs {module.FILE} (SHA-256 {module.SHA256}; its source is named in "
            f"{module.__name__.replace('.', '/')}.py): put it in {folder}, or name it with eval.{setting}; "
            f"{path} does not exist"
        )
    return path


def _read_weights(path: str, module: Any) -> dict[str, np.ndarray]:
    """The state dict in a published file."""
    content = weights.content(path)
    if os.path.basename(path).endswith(f"-{module.SHA256[:8]}.pth"):
        digest = hashlib.sha256(content).hexdigest()
        if digest != module.SHA256:
            raise UserError(f"{path} is damaged: its SHA-256 is {digest}, not {module.SHA256}")
    return weights.parse(content, path) if path.endswith(".npz") else files.parse(content, path)


def published_networks(c: Config, manifolds: bool = True) -> list[Network]:
    """Inception, and for `manifolds` VGG16 if its weights are there. UserError without Inception's."""
    folder = sources.directory(c.data.dir)

    def find(setting: str, module: Any) -> str:
        return processes.from_primary(lambda: _find_weights(setting, getattr(c.eval, setting), module, folder))

    path = find("inception_weights", inception)
    state = processes.from_primary(lambda: _read_weights(path, inception))
    net = inception.Inception()
    networks = [_network("Inception 2015-12-05", lambda p, x: net.apply({"params": p}, x), inception.params(state))]
    if not manifolds:
        return networks
    try:
        path = find("vgg_weights", vgg)
    except UserError as error:  # the file is not there; one that is damaged or cannot be read is not passed over
        if c.eval.vgg_weights:
            raise
        if processes.is_primary():
            print(f"without precision and recall: {error}", flush=True)
        return networks
    state, other = processes.from_primary(lambda: _read_weights(path, vgg)), vgg.VGG16()

    def apply(params: Any, images: Any) -> Any:
        features: Any = other.apply({"params": params}, images)
        return features, features[:, :0]

    return [*networks, _network("VGG16", apply, vgg.params(state))]


def own_network(c: Config, data: sources.Data) -> tuple[Network, dict[str, Any]]:
    """The project's classifier of this data, trained or read from its cache; and what is known of it.

    UserError if the data has no labels; Fault if a classifier of digits is not good enough to count modes by.
    """
    name, size = c.data.name, data.images.shape[1]
    stacked = name.startswith("stacked_")
    base = name.removeprefix("stacked_")
    if stacked:
        digits = dataclasses.replace(c.data, name=base, image_size=None, channels=1)
        parts = [dataclasses.replace(digits, split=split) for split in ("train", "test")]
        train, test = processes.everywhere(lambda: [sources.open_data(part) for part in parts])
        assert train.labels and test.labels
        x, test_x = (sources.pad(part.images, size) for part in (train, test))
        y, test_y = train.labels(), test.labels()
        count = 10
    elif data.labels is None:
        raise UserError(f"eval.features=classifier needs labels, and {name} has none: choose eval.features=inception")
    else:
        labels, chosen = data.labels(), order(len(data.images), 0, 0)
        held_out, rest = np.split(chosen, [len(chosen) // 5])
        x, y, test_x, test_y = data.images[rest], labels[rest], data.images[held_out], labels[held_out]
        count = len(data.classes) or int(labels.max()) + 1
    known = sources.fingerprint(f"{base} {count}", sources.fingerprint("", "", y), x)
    path = cache(c, "classifier", known, f"{size}.npz")
    net = classifier.Classifier(count)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x[:1])["params"]

    def make() -> Any:
        params = cached(path, lambda: checkpoint.unflatten(weights.read(str(path)), shapes, str(path)))
        if params is None:
            params = classifier.train(x, y, count, lambda steps: tqdm(steps, f"classifier of {base}", disable=None))
            keep(path, lambda file: np.savez(file, **checkpoint.flatten(params)))  # type: ignore[arg-type]
        return jax.device_get(params)

    params = processes.from_primary(make)
    share = classifier.accuracy(params, test_x, test_y)
    if share < LEAST_ACCURACY.get(base, 0):
        raise Fault(
            f"the classifier of {base} is right on {share:.1%} of its test images, and {LEAST_ACCURACY[base]:.1%} is "
            f"needed: remove {path} and try again"
        )

    def forward(params: Any, images: jax.Array) -> Any:
        return net.apply({"params": params}, images)

    def of_channels(params: Any, images: jax.Array) -> Any:
        """Features [B, C 64] and logits [B, C, 10] of the channels, each a digit."""
        b, h, w, c = images.shape
        apart = images.transpose(0, 3, 1, 2).reshape(b * c, h, w, 1)
        features, logits = forward(params, apart)
        return features.reshape(b, -1), logits.reshape(b, c, -1)

    about = {"classifier_test_accuracy": share, "classifier_test_images": len(test_x)}
    return _network(f"classifier of {base}", of_channels if stacked else forward, params), about


# --- Caches -------------------------------------------------------------------------------------------------------


def cache(c: Config, *names: str) -> Path:
    """Where something computed for these names is kept."""
    return Path(paths.cache_dir(sources.directory(c.data.dir)), "evaluation", "-".join(names))


def cached(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`; None where nothing is kept, or where that is damaged or cannot be read, which is printed.

    It is then computed and kept again: what is kept under a name follows from the name, so that nothing is lost.
    """
    try:
        return read() if path.exists() else None
    except (UserError, Fault, OSError) as error:
        print(f"note: {error}; it is computed again", flush=True)
        return None


def keep(path: Path, write: Callable[[Any], None]) -> None:
    """Keep a file; a cache that cannot be written is only slower."""
    try:
        paths.write(path, write)
    except OSError as error:
        print(f"note: {error}; it will be computed again", flush=True)
