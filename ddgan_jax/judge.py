"""What samples are measured by: real images and feature networks, opened once, and the measures of the paper.

    FID, KID, Inception Score             in the features of Inception        } eval.features = 'inception'
    precision, recall, density, coverage  in those of VGG16                   }
    distances and precision, recall, ...  in those of our classifier            eval.features = 'classifier'
    modes and KL                          of StackedMNIST, by that classifier; of the 25 Gaussians ('points')

A distance in the features of our own classifier is never called FID. What is computed of the real images is kept in
`data.dir`/evaluation, under fingerprints of the images and of the network.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax import parallel
from ddgan_jax.build import as_dict, open_data
from ddgan_jax.data import sources
from ddgan_jax.data.batches import order
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics import classifier, distances, inception, manifold, modes, vgg, weights
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.paths import Path
from ddgan_jax.torch import files as torch_files

KEPT = 2_000  # samples that are compared with their nearest training images
KID_BLOCK = 1_000
LEAST_ACCURACY = {"mnist": 0.985, "mnist_5k": 0.97}  # below it, counts of modes mean nothing
# The result that says which checkpoint is best; the smaller, the better.
RANKED_BY = {"inception": "fid", "classifier": "classifier_frechet", "points": "total_variation"}

Results = dict[str, Any]


# --- Feature networks ---------------------------------------------------------------------------------------------


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
    with tqdm(total=total, desc=what, unit="img", disable=None if what and parallel.is_primary() else True) as bar:
        for chunk in chunks:
            for network, parts in zip(networks, found, strict=True):
                rows = parallel.gather_rows(_apply(network, chunk, batch_size))
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


def _find_weights(setting: str, given: str, module: Any, folder: str) -> str:
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
    if os.path.basename(path).endswith(f"-{module.SHA256[:8]}.pth"):
        digest = hashlib.sha256(paths.read(paths.path(path))).hexdigest()
        if digest != module.SHA256:
            raise UserError(f"{path} is damaged: its SHA-256 is {digest}, not {module.SHA256}")
    return weights.read(path) if path.endswith(".npz") else torch_files.load(path)


def _published_networks(c: dict[str, Any]) -> list[Network]:
    """Inception, and VGG16 if its weights are there."""
    folder, given = sources.directory(c["data"]["dir"]), c["eval"]

    def find(setting: str, module: Any) -> str:
        return parallel.from_primary(lambda: _find_weights(setting, given[setting], module, folder))

    path = find("inception_weights", inception)
    state = parallel.from_primary(lambda: _read_weights(path, inception))
    net = inception.Inception()
    networks = [_network("Inception 2015-12-05", lambda p, x: net.apply({"params": p}, x), inception.params(state))]
    try:
        path = find("vgg_weights", vgg)
    except UserError as error:
        if given["vgg_weights"]:
            raise
        if parallel.is_primary():
            print(f"without precision and recall: {error}", flush=True)
        return networks
    state, other = parallel.from_primary(lambda: _read_weights(path, vgg)), vgg.VGG16()

    def apply(params: Any, images: Any) -> Any:
        features: Any = other.apply({"params": params}, images)
        return features, features[:, :0]

    return [*networks, _network("VGG16", apply, vgg.params(state))]


def _own_network(c: dict[str, Any], data: sources.Data) -> tuple[Network, Results]:
    """The project's classifier of this data, trained or read from its cache; and what is known of it."""
    name, size = c["data"]["name"], c["data"]["image_size"]
    stacked = name.startswith("stacked_")
    base = name.removeprefix("stacked_")
    if stacked:
        digits = c["data"] | {"name": base, "image_size": 0, "channels": 1}
        train, test = (open_data({"data": digits | {"split": split}}) for split in ("train", "test"))
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
        count = len(data.classes)
    path = _cache(c, "classifier", sources.fingerprint(base, "", x), f"{size}.npz")
    net = classifier.Classifier(count)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x[:1])["params"]

    def make() -> Any:
        params = _cached(path, lambda: checkpoint.unflatten(weights.read(str(path)), shapes))
        if params is None:
            params = classifier.train(x, y, count, lambda steps: tqdm(steps, f"classifier of {base}", disable=None))
            _write(path, lambda file: np.savez(file, **checkpoint.flatten(params)))  # type: ignore[arg-type]
        return jax.device_get(params)

    params = parallel.from_primary(make)
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


def _cache(c: dict[str, Any], *names: str) -> Path:
    return Path(paths.cache_dir(sources.directory(c["data"]["dir"])), "evaluation", "-".join(names))


def _cached(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`, or None where nothing was kept or it is damaged."""
    try:
        return read() if path.exists() else None
    except (UserError, ValueError, OSError, EOFError):
        return None


def _write(path: Path, write: Callable[[Any], None]) -> None:
    """Keep a file; a cache that cannot be written is only slower."""
    try:
        paths.write(path, write)
    except OSError as error:
        print(f"note: {error}; it will be computed again", flush=True)


# --- The judge ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """What is real, opened once: the measures compare samples with it."""

    config: dict[str, Any]
    data: sources.Data
    reference: np.ndarray  # indices of the real images that samples are compared with
    networks: list[Network]  # the first is for distances, the last for manifolds
    real: list[Features]  # of each network
    about: Results  # what is known of all this

    @functools.cached_property
    def moments(self) -> distances.Moments:
        """Of the real images in the first network's features, or those that others published."""
        published = self.config["eval"]["reference_statistics"]
        if published and self.config["eval"]["features"] == "inception":
            return distances.load_moments(published, self.real[0].features.shape[1])
        return distances.moments(_slices(self.real[0].features))

    @functools.cached_property
    def shown(self) -> np.ndarray:
        """Indices into `reference` of the real images that precision and recall are of."""
        return np.sort(order(len(self.reference), 1, 0)[: self.config["eval"]["manifold_samples"]])

    @functools.cached_property
    def radii(self) -> np.ndarray:
        """The radii of their manifold."""
        return manifold.radii(self.real[-1].features[self.shown], self.config["eval"]["k"])


def open_judge(config: Any, data: sources.Data | None = None) -> Judge:
    """Open the real images of `config.data` and the feature networks of `config.eval`.

    UserError for weights, labels or images that are not there.
    """
    c = as_dict(config)
    e = c["eval"]
    if e["features"] not in RANKED_BY:
        raise UserError(f"eval.features={e['features']!r} is not supported: it is {', '.join(RANKED_BY)}")
    if e["features"] == "points":
        return Judge(c, sources.Data(np.zeros((0, 2), np.float32)), np.zeros(0, int), [], [], {})
    data = data or open_data(c)
    about: Results = {"data": f"{c['data']['name']} {c['data']['split']}"}
    if e["features"] == "inception":
        networks = _published_networks(c)
    else:
        network, known = _own_network(c, data)
        networks, about = [network], about | known
    count = min(e["reference_samples"] or len(data.images), len(data.images))
    reference = np.sort(order(len(data.images), 0, 0)[:count])
    real = [_real_features(c, data, reference, network) for network in networks]
    about |= {"real_images": count, "networks": [network.name for network in networks]}
    return Judge(c, data, reference, networks, real, about)


def _real_features(c: dict[str, Any], data: sources.Data, reference: np.ndarray, network: Network) -> Features:
    """Computed once by all devices, then read from the cache of process 0; in the others nothing is kept of it."""
    name, split, batch_size = c["data"]["name"], c["data"]["split"], c["eval"]["batch_size"]
    print_of = sources.fingerprint(name, split, data.images)
    path = _cache(c, "features", print_of, network.fingerprint, f"{len(reference)}.npz")
    kept = _cached(path, lambda: Features(**weights.read(str(path)))) if parallel.is_primary() else None
    if kept is not None and len(kept.features) != len(reference):
        kept = None
    if not parallel.from_primary(lambda: kept is None):
        return kept or Features(np.zeros((0, 0)), np.zeros((0, 0)))
    chunks = (data.images[reference[indices]] for indices, _ in parallel.rounds(len(reference), batch_size))
    features = extract([network], chunks, batch_size, len(reference), f"real images in {network.name}")[0]
    if parallel.is_primary():
        _write(path, lambda file: np.savez(file, **features._asdict()))
    return features


@dataclasses.dataclass(frozen=True)
class Judged:
    """The numbers of a set of samples, and what figures are made of."""

    results: Results
    samples: np.ndarray  # the first KEPT
    features: list[Features]
    manifolds: manifold.Manifold | None = None
    shown: np.ndarray | None = None  # indices into `reference` of the real samples of `manifolds`
    histogram: np.ndarray | None = None
    neighbours: tuple[np.ndarray, np.ndarray] | None = None  # of `samples`: index into `reference`, distance


def judge(
    j: Judge, chunks: Iterable[np.ndarray], total: int, what: str = "", labels: np.ndarray | None = None
) -> Judged | None:
    """Measure `total` samples that come in chunks [n, ...], in the rounds of `parallel.rounds` if several processes do.

    Only process 0 measures; the others give it features, and get None.

    `what` names the progress bar; without it, while training, there are none, and no nearest neighbours either.
    `labels` [total] are the classes that the samples were asked for; the classifier says how many are of them.

    Raises UserError for too few of them, or another type or shape than the real ones.
    """
    e = j.config["eval"]
    kept: list[np.ndarray] = []

    def seen() -> Iterator[np.ndarray]:
        for chunk in chunks:
            if j.networks and (chunk.dtype != np.uint8 or chunk.shape[1:] != j.data.images.shape[1:]):
                raise UserError(
                    f"the samples are {chunk.dtype} {list(chunk.shape[1:])}, but the real images of "
                    f"{j.config['data']['name']} are uint8 {list(j.data.images.shape[1:])}"
                )
            if not j.networks or sum(map(len, kept)) < KEPT:
                kept.append(parallel.gather_rows(chunk))
            yield chunk

    if not j.networks:
        for _ in seen():
            pass
        points = np.concatenate(kept)[:total]
        if not parallel.is_primary():
            return None
        report = modes.gaussian_report(points, sources.GRID_SIDE, sources.GRID_SPACING, sources.GRID_STD)
        share = report.histogram / len(points)
        results: Results = {"modes": report.modes, "of_modes": len(share), "high_quality": report.high_quality}
        results |= {"kl": report.kl, "total_variation": (abs(share - 1 / len(share)).sum() + 1 - share.sum()) / 2}
        return Judged(results | {"num_samples": len(points)}, points, [], histogram=report.histogram)

    fake = extract(j.networks, seen(), e["batch_size"], total, what)
    if not parallel.is_primary():
        return None
    count = len(fake[0].features)
    samples = np.concatenate(kept)[: min(KEPT, count)]
    results = {"num_samples": count}
    moments = j.moments, distances.moments(_slices(fake[0].features))
    histogram = None
    if e["features"] == "inception":
        results["fid"] = distances.frechet_distance(*moments)
        kid = distances.kernel_distance(j.real[0].features, fake[0].features, KID_BLOCK)
        results |= {"kid": kid.mean, "kid_std": kid.std, "kid_blocks": kid.blocks, "kid_block_size": kid.block_size}
        score = distances.inception_score(fake[0].logits)
        results |= {"inception_score": score.mean, "inception_score_std": score.std}
    else:
        results["classifier_frechet"] = distances.frechet_distance(*moments)
        found_labels = fake[0].logits.argmax(-1)
        if found_labels.ndim == 2:  # three digits
            found_labels = modes.stacked_labels(found_labels)
        if labels is not None:
            results["label_agreement"] = float(np.mean(found_labels == labels[:count]))
        report_ = modes.mode_report(found_labels, len(j.data.classes))
        histogram = report_.histogram
        results |= {"modes": report_.modes, "of_modes": len(histogram), "kl": report_.kl}
        results |= {"smallest_share": histogram.min() / count, "largest_share": histogram.max() / count}
    judged = Judged(results, samples, fake, histogram=histogram)
    if e["features"] == "inception" and len(j.networks) == 1:
        return judged

    limit = e["manifold_samples"]
    real, shown, bar = j.real[-1].features, j.shown, _bar("precision and recall" if what else "")
    fakes = fake[-1].features[:limit]
    found = manifold.precision_recall(real[shown], fakes, e["k"], progress=bar, real_radii=j.radii)
    results |= {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}
    results |= {"manifold_real": len(shown), "manifold_fake": min(limit, count), "k": e["k"]}
    judged = dataclasses.replace(judged, manifolds=found, shown=shown)
    if not what:
        return judged
    bar = _bar("nearest training images")
    neighbours = manifold.nearest(fake[-1].features[: len(samples)], real, progress=bar)
    apart = manifold.nearest_other(real, progress=bar)
    results |= {
        "nearest_training_distance": float(np.median(neighbours[1])),
        "nearest_training_distance_of_training_images": float(np.median(apart)),
    }
    return dataclasses.replace(judged, neighbours=neighbours)


def _bar(what: str) -> Callable[[Iterable[int]], Iterable[int]]:
    return lambda blocks: tqdm(blocks, what, leave=False, disable=None if what else True)


def _slices(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[i : i + 1024] for i in range(0, len(x), 1024))
