"""Distances between sets of features [N, D], computed in float64.

    (1)  Frechet   |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})        Heusel et al. 2017, equation 6
    (2)  kernel    MMD^2 with k(x, y) = (x.y / D + 1)^3, unbiased              Binkowski et al. 2018
    (3)  score     exp(E_x KL(p(c|x) || E_x p(c|x)))                           Salimans et al. 2016, Section 4

With the pool features of Inception v3 (D = 2048), (1) is FID and (2) is KID; with its logits, (3) is the Inception
score. The expectation of (1) depends on the number of samples, so it is comparable only at equal numbers.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ddgan_jax.errors import UserError
from ddgan_jax.metrics import npz
from ddgan_jax.storage import paths

ROWS = 1024  # rows that are processed at a time, so that no copy of a whole set is made


def check_features(x: ArrayLike, what: str, at_least: int = 1) -> np.ndarray:
    """`x` as an array of numbers [N, D]; an array is not copied.

    Raises UserError, which names it as `what`, unless it is real, two-dimensional, finite, and has `at_least` rows.
    """
    try:
        x = np.asarray(x)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{what} must be an array [N, D], not lists of different lengths") from error
    if x.dtype.kind == "V" and x.dtype.names is None:  # bfloat16, which NumPy does not know
        x = x.astype(np.float32)
    if x.dtype.kind not in "biuf":
        raise UserError(f"{what} must be real numbers, not {x.dtype}")
    if x.ndim != 2 or x.shape[1] < 1:
        raise UserError(f"{what} must be an array [N, D], one row a sample, not of shape {list(x.shape)}")
    if len(x) < at_least:
        raise UserError(f"{what} hold {len(x)} samples; at least {at_least} are needed")
    for start in range(0, len(x), ROWS):
        bad = np.flatnonzero(~np.isfinite(x[start : start + ROWS]).all(axis=1))
        if len(bad):
            raise UserError(f"{what} must be finite, but sample {start + bad[0]} holds NaN or infinity")
    return x


def check_same_width(x: np.ndarray, y: np.ndarray) -> None:
    """Raise UserError unless x [N, D] and y [M, D] have the same D."""
    if x.shape[1] != y.shape[1]:
        raise UserError(f"both sets need features of the same width, not {x.shape[1]} and {y.shape[1]}")


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a set of features, float64; (1) depends on nothing else."""

    mu: np.ndarray  # [D]
    sigma: np.ndarray  # [D, D], divided by the number of samples - 1


def moments(chunks: Iterable[ArrayLike]) -> Moments:
    """Mean and covariance of features that come in chunks [n, D]; the chunks' sizes affect only rounding.

    The pairwise update of Chan, Golub and LeVeque (1979): deviations are from the mean of their chunk, so nothing
    cancels where means are large. Raises UserError for fewer than 2 samples, NaN, infinity, different widths, or
    features so large that their squares are not finite.
    """
    mu, sigma, count = np.zeros(0), np.zeros((0, 0)), 0
    for chunk in chunks:
        x = check_features(chunk, "features").astype(np.float64)
        if count and len(mu) != x.shape[1]:
            raise UserError(f"this chunk has {x.shape[1]} features a sample; the ones before it have {len(mu)}")
        with np.errstate(over="ignore", invalid="ignore"):
            mu, sigma = _updated(mu, sigma, count, x)
        if not np.isfinite(sigma).all():
            raise UserError(
                f"features reach {np.abs(chunk).max():.3g}, and their squares are out of the range of float64: "
                "scale them"
            )
        count += len(x)
    if count < 2:
        raise UserError(f"a covariance needs at least 2 samples, not {count}")
    return Moments(mu, sigma)


def moments_of(features: np.ndarray) -> Moments:
    """`moments` of features [N, D] in memory."""
    return moments(features[i : i + ROWS] for i in range(0, len(features), ROWS))


def _updated(mu: np.ndarray, sigma: np.ndarray, count: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of `count` samples and of float64 [n, D], which is overwritten."""
    n, mean = len(x), x.mean(axis=0)
    x -= mean
    if not count:
        return mean, x.T @ x / max(n - 1, 1)
    total = count + n
    shift = mean - mu
    # The shift enters as one more deviation, so the sum is a Gram matrix and stays exactly symmetric.
    x = np.concatenate([x, np.sqrt(count * n / total) * shift[None]])
    scatter = x.T @ x
    scatter += sigma * (count - 1)
    return mu + shift * (n / total), scatter / (total - 1)


def save_moments(path: str | os.PathLike, values: Moments, network: str = "") -> None:
    """Write `mu` and `sigma` as an npz, the format of published statistics; `path` should end in .npz.

    `network` identifies the feature network, for example by the `fingerprint` of a Network; `load_moments` compares it.
    """
    paths.write(paths.path(path), lambda file: write_moments(file, values, network))


def write_moments(file: IO[bytes], values: Moments, network: str = "") -> None:
    """`save_moments` into an open binary file."""
    np.savez(file, mu=values.mu, sigma=values.sigma, network=network)


def load_moments(path: str | os.PathLike, width: int | None = None, network: str = "") -> Moments:
    """Read an npz with `mu` [D] and `sigma` [D, D]; other arrays in it are ignored.

    Raises UserError if the file or an array is missing, an array has the wrong shape or type, a number is not finite,
    sigma is not symmetric, D is not `width`, or the file records another `network`; published files record none. Fault
    if the file cannot be read.
    """
    arrays = npz.read_npz(path, ("mu", "sigma", "network"))
    for name in ("mu", "sigma"):
        if name not in arrays:
            raise UserError(f"{path} has no array {name!r}: statistics are the arrays mu [D] and sigma [D, D]")
    mu, sigma, made_by = arrays["mu"], arrays["sigma"], str(arrays.get("network", ""))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not {mu.dtype.kind, sigma.dtype.kind} <= set("biuf"):
        raise UserError(
            f"{path} must hold numbers mu [D] and sigma [D, D], not {mu.dtype} {list(mu.shape)} and "
            f"{sigma.dtype} {list(sigma.shape)}"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if width is not None and len(mu) != width:
        raise UserError(
            f"{path} is of features of width {len(mu)}, and {width} is needed: name statistics of that network"
        )
    if network and made_by not in ("", network):
        raise UserError(f"{path} is of features of the network {made_by[:40]}, and those of {network} are needed")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds NaN or infinity: compute the statistics again")
    if np.abs(sigma - sigma.T).max(initial=0) > 1e-4 * np.abs(sigma).max(initial=0):
        raise UserError(
            f"{path} holds a sigma that is not symmetric, so it is no covariance: compute the statistics again"
        )
    return Moments(mu, sigma)


def frechet_distance(a: Moments, b: Moments) -> float:
    """(1), at least 0, in squared units of the features.

    With S_a = V V^T, the trace of (S_a S_b)^{1/2} equals that of (V^T S_b V)^{1/2}, a symmetric matrix. V has a column
    for each eigenvalue of S_a above rounding errors, so singular covariances, of fewer samples than features, need no
    special treatment. Raises UserError where the widths differ, or the distance is out of the range of float64.
    """
    if a.mu.shape != b.mu.shape:
        raise UserError(f"both moments need features of the same width, not {len(a.mu)} and {len(b.mu)}")
    # Dividing by a unit keeps products of covariances within float64; a power of four rounds neither them nor roots.
    largest = max(a.sigma.max(initial=0), b.sigma.max(initial=0))
    unit = 4.0 ** np.ceil(np.log2(largest) / 2) if largest > 0 else 1.0
    of_a, of_b = a.sigma / unit, b.sigma / unit
    values, vectors = np.linalg.eigh(of_a)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    root = vectors[:, kept] * np.sqrt(values[kept])
    product = np.linalg.eigvalsh(root.T @ of_b @ root)
    trace = np.trace(of_a) + np.trace(of_b) - 2 * np.sum(np.sqrt(np.maximum(product, 0)))
    with np.errstate(over="ignore"):
        distance = float(np.sum((a.mu - b.mu) ** 2) + trace * unit)
    if not np.isfinite(distance):
        raise UserError("the Frechet distance of these features is out of the range of float64: scale them")
    return max(0.0, distance)


class KernelDistance(NamedTuple):
    """(2) over blocks of samples."""

    mean: float  # unbiased, so it may be slightly negative
    std: float  # over the blocks (divided by their number); 0 for one block
    blocks: int
    block_size: int  # samples of each set in a block


def _kernel_mean(x: np.ndarray, y: np.ndarray | None = None) -> float:
    """Mean of k(x_i, y_j) over all pairs, or of k(x_i, x_j) over those with i != j."""
    other = x if y is None else y
    total = 0.0
    for start in range(0, len(x), ROWS):
        total += np.sum((x[start : start + ROWS] @ other.T / x.shape[1] + 1) ** 3)
    if y is not None:
        return total / (len(x) * len(y))
    diagonal = np.sum((np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3)
    return (total - diagonal) / (len(x) * (len(x) - 1))


def kernel_distance(x: ArrayLike, y: ArrayLike, block_size: int = 1000, seed: int = 0) -> KernelDistance:
    """(2) between x [N, D] and y [M, D]: mean and spread over disjoint blocks of `block_size` samples of each set.

    Each set is permuted by `seed` and cut into consecutive blocks; samples that fill no block are left out. If a set
    has fewer than `block_size` samples, there is one block of the size of the smaller set. The block size affects the
    spread but not the expectation. Raises UserError for fewer than 2 samples, NaN, infinity, different widths, or
    features so large that the kernel is not finite.
    """
    x, y = check_features(x, "the first features", 2), check_features(y, "the second features", 2)
    check_same_width(x, y)
    if seed < 0:
        raise UserError(f"the seed of the kernel distance must be at least 0, not seed={seed}")
    if block_size < 2:
        raise UserError(f"a block of the kernel distance needs at least 2 samples, not block_size={block_size}")
    smaller = min(len(x), len(y))
    size = min(block_size, smaller)
    blocks = smaller // size
    rng = np.random.default_rng(seed)
    order_x, order_y = rng.permutation(len(x)), rng.permutation(len(y))
    values = []
    for start in range(0, blocks * size, size):
        a, b = (s[order[start : start + size]].astype(np.float64) for s, order in ((x, order_x), (y, order_y)))
        with np.errstate(over="ignore", invalid="ignore"):
            values.append(_kernel_mean(a) + _kernel_mean(b) - 2 * _kernel_mean(a, b))
    if not np.isfinite(values).all():
        largest = max(np.abs(x).max(), np.abs(y).max())
        raise UserError(f"features reach {largest:.3g}, and their kernel is out of the range of float64: scale them")
    return KernelDistance(float(np.mean(values)), float(np.std(values)), blocks, size)


class InceptionScore(NamedTuple):
    """(3) over splits."""

    mean: float  # 1 (all predictions equal) to C (certain, and all classes equally often)
    std: float  # over the splits (divided by their number)


def inception_score(logits: ArrayLike, splits: int = 10) -> InceptionScore:
    """(3) of logits or log-probabilities [N, C]: mean and spread over consecutive splits of the samples.

    Samples that are sorted by class must be shuffled first. Raises UserError for fewer samples than splits, NaN or
    infinity.
    """
    if splits < 1:
        raise UserError(f"the Inception score needs at least 1 split, not splits={splits}")
    logits = check_features(logits, "logits", splits)
    n, scores = len(logits), []
    for i in range(splits):
        x = logits[i * n // splits : (i + 1) * n // splits].astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        x -= np.log(np.sum(np.exp(x), axis=1, keepdims=True))
        p = np.exp(x)
        marginal = p.mean(axis=0)
        entropy = -np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1)))
        scores.append(np.exp(np.mean(np.sum(p * x, axis=1)) + entropy))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
