"""What samples are measured by: real images and feature networks, opened once, and the measures of the paper.

    FID, KID, Inception Score             in the features of Inception        } eval.features = 'inception'
    precision, recall, density, coverage  in those of VGG16                   }
    distances and precision, recall, ...  in those of our classifier            eval.features = 'classifier'
    modes and KL                          of StackedMNIST, by that classifier; of the 25 Gaussians ('points')

A distance in the features of our own classifier is never called FID.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import Config, read
from ddgan_jax.data import sources
from ddgan_jax.data.batches import order
from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import UserError
from ddgan_jax.metrics import distances, inception, manifold, modes, weights
from ddgan_jax.metrics.features import Features, Network, cache, cached, extract, keep, own_network, published_networks

KEPT = 2_000  # samples that are compared with their nearest training images
KID_BLOCK, SCORE_SPLITS = 1_000, 10
# The result that says which checkpoint is best; the smaller, the better.
RANKED_BY = {"inception": "fid", "classifier": "classifier_frechet", "points": "total_variation"}

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """What is real, opened once: the measures compare samples with it."""

    config: Config
    data: sources.Data
    reference: np.ndarray  # indices of the real images that samples are compared with
    networks: list[Network]  # the first is for distances, the last for manifolds
    real: list[Features]  # of each network
    about: Results  # what is known of all this

    @functools.cached_property
    def moments(self) -> distances.Moments:
        """Of the real images in the first network's features, or those that others published."""
        published = self.config.eval.reference_statistics
        if published and self.config.eval.features == "inception":
            return distances.load_moments(published, inception.FEATURES, self.networks[0].fingerprint)
        return distances.moments(_slices(self.real[0].features))

    @functools.cached_property
    def shown(self) -> np.ndarray:
        """Indices into `reference` of the real images that precision and recall are of."""
        return np.sort(order(len(self.reference), 1, 0)[: self.config.eval.manifold_samples])

    @functools.cached_property
    def radii(self) -> np.ndarray:
        """The radii of their manifold."""
        return manifold.radii(self.real[-1].features[self.shown], self.config.eval.k)


def check(c: Config, num_real: int, num_samples: int = 0, manifolds: bool = True) -> None:
    """UserError unless there are enough samples, and real images, for the measures of `c.eval.features`.

    `num_samples` 0 means evaluations while training. `manifolds` says whether precision and recall are measured.
    """
    e = c.eval
    count, samples = num_samples or e.online_samples, f"a set of {num_samples} samples"
    if not num_samples:
        samples = f"eval.online_samples={e.online_samples}"
    reference = min(e.reference_samples or num_real, num_real)
    real = f"a set of {reference} real images"
    needs = []  # (how many there are, of what, the least that are needed, by what)
    if e.features == "inception":
        needs += [(count, samples, SCORE_SPLITS, f"the Inception Score of {SCORE_SPLITS} splits")]
        needs += [(reference, real, 2, "KID")] if num_real else []
    else:
        needs += [(num_real, real, 5, "a classifier that is tested on a fifth of them")]
    if manifolds:
        why, least = f"the precision and recall of eval.k={e.k}", e.k + 1
        needs += [(count, samples, least, why), (reference, real, least, why)]
        needs += [(e.manifold_samples, f"eval.manifold_samples={e.manifold_samples}", least, why)]
    for found, what, least, why in sorted(needs, key=lambda need: -need[2]):
        if found < least:
            raise UserError(f"{what} is too small to evaluate: {why} needs at least {least}")


def check_points(c: Config, data: sources.Data | None) -> None:
    """UserError unless samples are to be compared with the 25 Gaussians, the only points that are measured."""
    ours, given = sources.gaussians(), f"data.name={c.data.name}"
    if c.data.name == "gaussians":
        if data is None or (data.images.shape == ours.shape and np.array_equal(data.images, ours)):
            return
        given = f"other data {list(data.images.shape)}"
    raise UserError(
        f"eval.features=points compares samples with the 25 Gaussians of data.name=gaussians, not with {given}: "
        "set eval.every=0 to train without evaluations"
    )


def real_images(c: Config) -> sources.Data:
    """The real images; or none, if there are published statistics to compare with instead."""
    try:
        return processes.everywhere(lambda: sources.open_data(c.data))
    except UserError as error:  # the same in every process
        # Without the data a class-conditional model has no frequencies of classes to be sampled with.
        if c.eval.features != "inception" or not c.eval.reference_statistics or c.model.num_classes:
            raise
        if processes.is_primary():
            print(f"without KID, precision and recall, which need real images: {error}", flush=True)
        return sources.Data(np.zeros((0, 0, 0, 0), np.uint8))


def open_judge(config: Any, data: sources.Data | None = None, num_samples: int = 0) -> Judge:
    """Open the real images of `config.data` and the feature networks of `config.eval`.

    UserError for weights, labels, statistics or images that are not there, and where `num_samples` samples (0: those
    of an evaluation while training) cannot be evaluated.
    """
    c = read(config)
    if c.eval.features == "points":
        check_points(c, data)
        return Judge(c, sources.Data(np.zeros((0, 2), np.float32)), np.zeros(0, int), [], [], {})
    data = data or real_images(c)
    num_real = len(data.images)
    about: Results = {"data": f"{c.data.name} {c.data.split}"} if num_real else {}
    if c.eval.features == "inception":
        networks = published_networks(c, manifolds=num_real > 0)
        check(c, num_real, num_samples, manifolds=len(networks) > 1)
    else:
        if data.labels:  # else the next call says what is missing
            check(c, num_real, num_samples)
        network, known = own_network(c, data)
        networks, about = [network], about | known
    count = min(c.eval.reference_samples or num_real, num_real)
    reference = np.sort(order(num_real, 0, 0)[:count])
    real = [_real_features(c, data, reference, network) for network in networks]
    about |= {"real_images": count, "networks": [network.name for network in networks]}
    opened = Judge(c, data, reference, networks, real, about)
    if c.eval.features == "inception" and c.eval.reference_statistics:
        about["reference_statistics"] = c.eval.reference_statistics
        processes.by_primary(lambda: opened.moments)  # read now: a wrong file is noticed before any sample is drawn
    return opened


def _real_features(c: Config, data: sources.Data, reference: np.ndarray, network: Network) -> Features:
    """Computed once by all devices, then read from the cache of process 0; in the others nothing is kept of it."""
    if not len(reference):
        return Features(np.zeros((0, 0)), np.zeros((0, 0)))
    # The name of a folder's copy follows from the size and time of every file, also where not every image is hashed.
    copy = os.path.basename(os.path.dirname(getattr(data.images, "filename", None) or ""))
    known = hashlib.sha256(f"{c.data.name} {copy} {c.data.split} {data.fingerprint}".encode()).hexdigest()[:16]
    path = cache(c, "features", known, network.fingerprint, f"{len(reference)}.npz")
    kept = cached(path, lambda: Features(**weights.read(str(path)))) if processes.is_primary() else None
    if kept is not None and len(kept.features) != len(reference):
        kept = None
    if not processes.from_primary(lambda: kept is None):
        return kept or Features(np.zeros((0, 0)), np.zeros((0, 0)))
    chunks = (data.images[reference[indices]] for indices, _ in parallel.rounds(len(reference), c.eval.batch_size))
    features = extract([network], chunks, c.eval.batch_size, len(reference), f"real images in {network.name}")[0]
    processes.by_primary(lambda: keep(path, lambda file: np.savez(file, **features._asdict())))
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

    Only process 0 measures; the others give it features, wait for it, and get None.

    `what` names the progress bar; without it, while training, there are none, and no nearest neighbours either.
    `labels` [total] are the classes that the samples were asked for; the classifier says how many are of them.

    Raises UserError for too few of them, or another type or shape than the real ones.
    """
    if not j.networks:
        points = np.concatenate([processes.gather_rows(chunk) for chunk in chunks])[:total]
        return processes.by_primary(lambda: judge_points(points))
    kept: list[np.ndarray] = []

    def seen() -> Iterator[np.ndarray]:
        for chunk in chunks:
            shape = j.data.images.shape[1:] if len(j.data.images) else chunk.shape[1:]
            if chunk.dtype != np.uint8 or chunk.shape[1:] != shape:
                raise UserError(
                    f"the samples are {chunk.dtype} {list(chunk.shape[1:])}, but the real images of "
                    f"{j.config.data.name} are uint8 {list(shape)}"
                )
            if sum(map(len, kept)) < KEPT:
                kept.append(processes.gather_rows(chunk))
            yield chunk

    fake = extract(j.networks, seen(), j.config.eval.batch_size, total, what)
    return processes.by_primary(lambda: _measure(j, fake, kept, what, labels))


def _measure(j: Judge, fake: list[Features], kept: list[np.ndarray], what: str, labels: np.ndarray | None) -> Judged:
    """The measures of samples by their features; `kept` are chunks of at least the first KEPT samples."""
    count = len(fake[0].features)
    judged = Judged({"num_samples": count}, np.concatenate(kept)[: min(KEPT, count)], fake)
    if j.config.eval.features == "inception":
        judged.results.update(_paper_distances(j, fake[0]))
        return _manifolds(j, judged, what) if len(j.networks) > 1 else judged  # without VGG16 there is none
    results, histogram = _own_distances(j, fake[0], labels)
    judged.results.update(results)
    return _manifolds(j, dataclasses.replace(judged, histogram=histogram), what)


def judge_points(points: np.ndarray) -> Judged:
    """Which of the 25 Gaussians points [N, 2] reach, and how well."""
    report = modes.gaussian_report(points, sources.GRID_SIDE, sources.GRID_SPACING, sources.GRID_STD)
    share = report.histogram / len(points)
    results: Results = {"modes": report.modes, "of_modes": len(share), "high_quality": report.high_quality}
    results |= {"kl": report.kl, "total_variation": (abs(share - 1 / len(share)).sum() + 1 - share.sum()) / 2}
    return Judged(results | {"num_samples": len(points)}, points, [], histogram=report.histogram)


def _paper_distances(j: Judge, fake: Features) -> Results:
    """FID and Inception Score, and KID if there are real images."""
    results: Results = {"fid": distances.frechet_distance(j.moments, distances.moments(_slices(fake.features)))}
    if len(j.reference):
        kid = distances.kernel_distance(j.real[0].features, fake.features, KID_BLOCK)
        results |= {"kid": kid.mean, "kid_std": kid.std, "kid_blocks": kid.blocks, "kid_block_size": kid.block_size}
    score = distances.inception_score(fake.logits, SCORE_SPLITS)
    return results | {"inception_score": score.mean, "inception_score_std": score.std}


def _own_distances(j: Judge, fake: Features, asked: np.ndarray | None) -> tuple[Results, np.ndarray]:
    """The Frechet distance in the classifier's features, the modes, and the histogram of these."""
    results: Results = {
        "classifier_frechet": distances.frechet_distance(j.moments, distances.moments(_slices(fake.features)))
    }
    found, count = fake.logits.argmax(-1), fake.logits.shape[-1]
    if found.ndim == 2:  # three digits
        found, count = modes.stacked_labels(found), count ** found.shape[1]
    if asked is not None:
        results["label_agreement"] = float(np.mean(found == asked[: len(found)]))
    report = modes.mode_report(found, count)
    results |= {"modes": report.modes, "of_modes": len(report.histogram), "kl": report.kl}
    shares = report.histogram / len(found)
    return results | {"smallest_share": shares.min(), "largest_share": shares.max()}, report.histogram


def _manifolds(j: Judge, judged: Judged, what: str) -> Judged:
    """With precision, recall, density and coverage; and, if `what` names a progress bar, the nearest real images."""
    e, results = j.config.eval, judged.results
    real, fakes = j.real[-1].features, judged.features[-1].features
    bar = _bar("precision and recall" if what else "")
    compared = fakes[: e.manifold_samples]
    found = manifold.precision_recall(real[j.shown], compared, e.k, progress=bar, real_radii=j.radii)
    results |= {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}
    results |= {"manifold_real": len(j.shown), "manifold_fake": len(compared), "k": e.k}
    judged = dataclasses.replace(judged, manifolds=found, shown=j.shown)
    if not what:
        return judged
    bar = _bar("nearest training images")
    neighbours = manifold.nearest(fakes[: len(judged.samples)], real, progress=bar)
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
