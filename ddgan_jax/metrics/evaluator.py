"""The measures of samples against real images, which are opened once together with the feature networks.

| `eval.features` | feature networks | measures |
|---|---|---|
| `inception` | Inception | FID, KID, Inception Score |
| | VGG16 | precision, recall, density, coverage |
| `classifier` | the project's classifier | Frechet distance, precision, recall, density, coverage, modes and their KL |
| `points` | none | modes of the 25 Gaussians, their KL, total variation, fraction of high-quality points |
| `module:function` | the user's function | Frechet and kernel distance, precision, recall, density, coverage |

Only distances in the features of Inception are called FID and KID.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ddgan_jax.config.settings import Config, read
from ddgan_jax.data import sources, synthetic
from ddgan_jax.data.batches import epoch_permutation
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError
from ddgan_jax.metrics import distances, inception, manifold, modes
from ddgan_jax.metrics.checks import SCORE_SPLITS, check_gaussians, check_settings, check_sizes
from ddgan_jax.metrics.custom_features import custom_network
from ddgan_jax.metrics.feature_networks import classifier_network, published_networks
from ddgan_jax.metrics.features import (
    Features,
    Network,
    extract,
    open_real_images,
    progress_bar,
    reference_features,
    reference_moments,
)
from ddgan_jax.metrics.nearest import neighbours

MAX_STORED = 50_000  # real images whose features are kept: 0.4 GB at 2,048 features
MAX_NEIGHBOURS = 2_000  # samples whose nearest training images are searched
KID_BLOCK = 1_000
FEW = 200  # images; with fewer, the standard error of a precision near 1/2 is above 0.035
RANKED_BY = {"inception": "fid", "classifier": "classifier_frechet", "points": "total_variation"}

Results = dict[str, Any]


def ranking_measure(features: str) -> str:
    """The measure that ranks checkpoints for a value of `eval.features`; smaller is better."""
    return RANKED_BY.get(features, "frechet_distance")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Real images and feature networks, ready to be compared with samples."""

    config: Config
    data: sources.Data
    reference: np.ndarray  # indices of the real images that samples are compared with, except by moments
    networks: list[Network]  # the first is for distances, the last for manifolds
    real: list[Features]  # of the reference images, for each network
    about: Results  # entries of results.json that describe the reference
    all_moments: distances.Moments | None = None  # of more real images than `reference` has

    @functools.cached_property
    def yardstick(self) -> str:
        """A hash of what samples are compared with while training: networks, real images, and their numbers.

        Distances compare only if it is the same.
        """
        e = self.config.eval
        parts = [e.features, e.online_samples, e.reference_statistics, *(n.fingerprint for n in self.networks)]
        if self.networks:
            parts += [self.data.fingerprint, self.about.get("real_images")]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]

    @functools.cached_property
    def moments(self) -> distances.Moments:
        """Moments of the real images in the first network's features, or the published ones."""
        published = self.config.eval.reference_statistics
        if published and self.config.eval.features == "inception":
            return distances.load_moments(published, inception.FEATURES, self.networks[0].fingerprint)
        return self.all_moments or distances.moments_of(self.real[0].features)

    @functools.cached_property
    def manifold_indices(self) -> np.ndarray:
        """Indices into `reference` of the images that span the real manifold."""
        return _some(len(self.reference), self.config.eval.manifold_samples, seed=1)

    def compared(self, count: int) -> np.ndarray:
        """Indices of the samples (out of `count`) used for precision and recall."""
        return _some(count, self.config.eval.manifold_samples, seed=2)

    @functools.cached_property
    def real_neighbours(self) -> np.ndarray:
        """The squared distances [N, k] of the images of `manifold_indices` to their nearest others, ascending.

        The last are the radii of the real manifold.
        """
        return neighbours(self.real[-1].features[self.manifold_indices], k=self.config.eval.k)[1]


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationResult:
    """The measures of a set of samples, and the data of the figures."""

    results: Results
    samples: np.ndarray  # the first MAX_NEIGHBOURS; all, if they are points
    features: list[Features] = dataclasses.field(default_factory=list)  # of all samples, for each network
    manifolds: manifold.Manifold | None = None
    histogram: np.ndarray | None = None  # samples of each mode
    neighbours: tuple[np.ndarray, np.ndarray] | None = None  # of `samples`: indices into `reference`, distances


def open_evaluator(config: Any, data: sources.Data | None = None, num_samples: int = 0) -> Evaluator:
    """Open the real images of `config.data` (or use `data`) and the feature networks of `config.eval`.

    Raises UserError if weights, labels, statistics or images are missing, or if `num_samples` samples are too few to be
    evaluated; 0 stands for the number of an evaluation during training.
    """
    c = read(config)
    check_settings(c)
    if c.eval.features == "points":
        check_gaussians(c, data)
        return Evaluator(c, sources.Data(np.zeros((0, 2), np.float32)), np.zeros(0, int), [], [], {})
    data = data or open_real_images(c)
    num_real = len(data.images)
    about: Results = {"data": f"{c.data.name} {c.data.split}"} if num_real else {}
    if c.eval.features == "inception":
        networks = published_networks(c, manifolds=num_real > 0)
        check_sizes(c, num_real, num_samples, manifolds=len(networks) > 1)
    elif c.eval.features == "classifier":
        if data.labels:  # without labels, the next call reports them missing
            check_sizes(c, num_real, num_samples)
        network, accuracy = classifier_network(c, data)
        networks, about = [network], about | accuracy
    else:
        check_sizes(c, num_real, num_samples)
        networks = [processes.run_on_all(lambda: custom_network(c.eval.features, data.images))]
    count = min(c.eval.reference_samples or num_real, num_real)
    chosen = epoch_permutation(num_real, 0, 0)[:count]
    reference = np.sort(chosen[:MAX_STORED])
    real = [reference_features(c, data, reference, network) for network in networks]
    about |= {"real_images": count, "networks": [network.name for network in networks]}
    all_moments = None
    if count > MAX_STORED:
        about["real_images_except_for_moments"] = MAX_STORED
        if not c.eval.reference_statistics:
            all_moments = reference_moments(c, data, np.sort(chosen), networks[0])
    has_manifolds = c.eval.features != "inception" or len(networks) > 1
    if has_manifolds and (fewest := min(num_samples or c.eval.online_samples, count)) < FEW:
        processes.say(f"note: with {fewest} images, the measures are rough; compare them only with those of as many")
    evaluator = Evaluator(c, data, reference, networks, real, about, all_moments)
    if c.eval.features == "inception" and c.eval.reference_statistics:
        about["reference_statistics"] = c.eval.reference_statistics
        processes.run_on_primary(lambda: evaluator.moments)  # a wrong file is reported before any sample is generated
    return evaluator


def measure(
    evaluator: Evaluator,
    chunks: Iterable[np.ndarray],
    total: int,
    progress: str = "",
    labels: np.ndarray | None = None,
    nearest: bool = False,
) -> EvaluationResult | None:
    """Measure `total` samples that come in chunks [n, ...]: with several processes, in those of `parallel.work_chunks`.

    Process 0 measures; the others contribute features, wait for it, and get None. `progress` names the progress bar;
    without a name there is none. `labels` [total] are the classes of class-conditional samples, with which the
    classifier's predictions are compared. `nearest` also finds the nearest training image of each sample. Raises
    UserError for too few samples, or samples of another type or shape than the real images.
    """
    if not evaluator.networks:
        points = np.concatenate([processes.gather_rows(chunk) for chunk in chunks])[:total]
        return processes.run_on_primary(lambda: measure_points(points))
    kept: list[np.ndarray] = []

    def checked() -> Iterator[np.ndarray]:
        """The chunks, of which `kept` gets the first."""
        for chunk in chunks:
            real = evaluator.data.images
            shape = real.shape[1:] if len(real) else chunk.shape[1:]
            if chunk.dtype != np.uint8 or chunk.shape[1:] != shape:
                raise UserError(
                    f"the samples are {chunk.dtype} {list(chunk.shape[1:])}, but the real images of "
                    f"{evaluator.config.data.name} are uint8 {list(shape)}: name their data with --config=NAME"
                )
            if sum(map(len, kept)) < MAX_NEIGHBOURS:
                kept.append(processes.gather_rows(chunk))
            yield chunk

    fake = extract(evaluator.networks, checked(), evaluator.config.eval.batch_size, total, progress)
    found = (evaluator, fake, kept, progress, labels, nearest)
    return processes.run_on_primary(lambda: _measure_features(*found))


def measure_points(points: np.ndarray) -> EvaluationResult:
    """The modes of the 25 Gaussians that points [N, 2] reach, and their quality."""
    report = modes.gaussian_report(points, synthetic.GRID_SIDE, synthetic.GRID_SPACING, synthetic.GRID_STD)
    share = report.histogram / len(points)
    results: Results = {"modes": report.modes, "of_modes": len(share), "high_quality": report.high_quality}
    results |= {"kl": report.kl, "total_variation": (abs(share - 1 / len(share)).sum() + 1 - share.sum()) / 2}
    return EvaluationResult(results | {"num_samples": len(points)}, points, histogram=report.histogram)


def _measure_features(
    evaluator: Evaluator,
    fake: list[Features],
    kept: list[np.ndarray],
    progress: str,
    labels: np.ndarray | None,
    nearest: bool,
) -> EvaluationResult:
    """The measures of samples with the features `fake`; `kept` are the first of them."""
    results: Results = {"num_samples": len(fake[0].features)}
    samples = np.concatenate(kept)[: min(MAX_NEIGHBOURS, len(fake[0].features))]
    histogram = None
    if evaluator.config.eval.features == "inception":
        results |= _inception_measures(evaluator, fake[0])
        if len(evaluator.networks) == 1:  # without VGG16 there is no manifold
            return EvaluationResult(results, samples, fake)
    elif evaluator.config.eval.features == "classifier":
        measures, histogram = _classifier_measures(evaluator, fake[0], labels)
        results |= measures
    else:
        results |= {"frechet_distance": _frechet_distance(evaluator, fake[0])}
        results |= _kernel_measures(evaluator, fake[0], "kernel_distance")
    measures, manifolds = _manifold_measures(evaluator, fake[-1].features, progress)
    measured, neighbours = _neighbour_measures(evaluator, fake[-1].features[: len(samples)]) if nearest else ({}, None)
    return EvaluationResult(results | measures | measured, samples, fake, manifolds, histogram, neighbours)


def _inception_measures(evaluator: Evaluator, fake: Features) -> Results:
    """FID and Inception Score, and KID if there are real images."""
    results: Results = {"fid": _frechet_distance(evaluator, fake)}
    if len(evaluator.reference):
        results |= _kernel_measures(evaluator, fake, "kid")
    # Shuffled, since samples of a file may be sorted by class, and each split needs all of them
    score = distances.inception_score(fake.logits[epoch_permutation(len(fake.logits), 2, 0)], SCORE_SPLITS)
    return results | {"inception_score": score.mean, "inception_score_std": score.std}


def _classifier_measures(evaluator: Evaluator, fake: Features, labels: np.ndarray | None) -> tuple[Results, np.ndarray]:
    """The Frechet distance in the classifier's features and the measures of modes, and the histogram of modes."""
    results: Results = {"classifier_frechet": _frechet_distance(evaluator, fake)}
    found, count = fake.logits.argmax(-1), fake.logits.shape[-1]
    if found.ndim == 2:  # three digits
        found, count = found @ (100, 10, 1), 1_000
    if labels is not None:
        results["label_agreement"] = float(np.mean(found == labels[: len(found)]))
    report = modes.mode_report(found, count)
    results |= {"modes": report.modes, "of_modes": len(report.histogram), "kl": report.kl}
    shares = report.histogram / len(found)
    return results | {"smallest_share": shares.min(), "largest_share": shares.max()}, report.histogram


def _manifold_measures(evaluator: Evaluator, fake: np.ndarray, progress: str) -> tuple[Results, manifold.Manifold]:
    """Precision, recall, density and coverage of features [N, D], and the manifolds."""
    e, chosen = evaluator.config.eval, evaluator.manifold_indices
    real, compared = evaluator.real[-1].features[chosen], fake[evaluator.compared(len(fake))]
    bar = progress_bar("precision and recall" if progress else "")
    found = manifold.precision_recall(real, compared, e.k, progress=bar, real_radii=evaluator.real_neighbours[:, -1])
    results: Results = {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}
    return results | {"manifold_real": len(real), "manifold_fake": len(compared), "k": e.k}, found


def _neighbour_measures(evaluator: Evaluator, fake: np.ndarray) -> tuple[Results, tuple[np.ndarray, np.ndarray]]:
    """The distances of features [N, D] to their nearest training images, and (indices into `reference`, distances)."""
    real, bar = evaluator.real[-1].features, progress_bar("nearest training images")
    indices, squared = neighbours(fake, real, progress=bar)
    of_all = len(evaluator.manifold_indices) == len(real)  # the same search
    among_real = evaluator.real_neighbours if of_all else neighbours(real, progress=bar)[1]
    nearest, among_real = np.sqrt(squared[:, 0]), np.sqrt(among_real[:, 0])
    results: Results = {
        "nearest_training_distance": float(np.median(nearest)),
        "nearest_training_distance_of_training_images": float(np.median(among_real)),
    }
    return results, (indices[:, 0], nearest)


def _frechet_distance(evaluator: Evaluator, fake: Features) -> float:
    return distances.frechet_distance(evaluator.moments, distances.moments_of(fake.features))


def _kernel_measures(evaluator: Evaluator, fake: Features, name: str) -> Results:
    found = distances.kernel_distance(evaluator.real[0].features, fake.features, KID_BLOCK)
    of_blocks = {f"{name}_std": found.std, f"{name}_blocks": found.blocks, f"{name}_block_size": found.block_size}
    return {name: found.mean} | of_blocks


def _some(count: int, most: int, seed: int) -> np.ndarray:
    """Up to `most` of the indices 0..count-1, ascending: the same random choice each time."""
    return np.sort(epoch_permutation(count, seed, 0)[:most])
