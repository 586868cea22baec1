"""Why Gaussian denoising needs small steps (Figure 2 of the paper), exactly.

    python -m experiments.why_gaussian_fails                    # seconds

For data from a mixture sum_m w_m N(c_m, s^2 I) everything is a mixture in closed form. With a = sqrt(abar_{k-1}),
v = a^2 s^2 + 1 - abar_{k-1}, and the step x_k = sqrt(alpha_k) x_{k-1} + sqrt(beta_k) noise,

    (1)  q(x_{k-1})       = sum_m w_m N(a c_m, v I)
    (2)  q(x_{k-1} | x_k) = sum_m w_m(x_k) N(mu_m(x_k), u I),      1 / u = 1 / v + alpha_k / beta_k
         mu_m(x_k) = u (a c_m / v + sqrt(alpha_k) x_k / beta_k)
         w_m(x_k)  ~ w_m N(x_k; sqrt(alpha_k) a c_m, (alpha_k v + beta_k) I)

The best Gaussian denoiser has the mean and covariance of (2). For T steps of the paper's schedule, over the steps
k = 1..T and x_k ~ q(x_k), the table has

    multimodal   the fraction of (k, x_k) for which (2) has more than one local maximum
    gap          E[ KL( q(x_{k-1} | x_k) || that Gaussian ) ] in nats, summed over the steps
"""

import argparse
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.data.synthetic import GRID_SIDE, GRID_SPACING, GRID_STD
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.metrics.modes import grid_centres
from experiments import common

STEPS = (1000, 100, 16, 8, 4, 2, 1)


class Mixture(NamedTuple):
    """sum_m weights[m] N(centres[m], std^2 I)."""

    centres: np.ndarray  # [M, d]
    weights: np.ndarray  # [..., M]
    std: float


LINE = Mixture(np.array([[-0.6], [-0.5], [0.1], [0.7]]), np.array([0.2, 0.3, 0.2, 0.3]), 0.05)
GRID = Mixture(grid_centres(GRID_SIDE, GRID_SPACING), np.full(GRID_SIDE**2, GRID_SIDE**-2.0), GRID_STD)


def log_density(x: np.ndarray, centres: np.ndarray, log_weights: np.ndarray, variance: float) -> np.ndarray:
    """log sum_m exp(log_weights[n, m]) N(x[n]; centres[n, m], variance I): x [N, d] -> [N]."""
    d = x.shape[-1]
    parts = log_weights - ((x[:, None] - centres) ** 2).sum(-1) / (2 * variance) - d / 2 * np.log(2 * np.pi * variance)
    top = parts.max(-1, keepdims=True)
    return (top + np.log(np.exp(parts - top).sum(-1, keepdims=True)))[:, 0]


def denoising(data: Mixture, schedule: Schedule, k: int, x_k: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(2) for x_k [N, d]: means [N, M, d], log weights [N, M], variance u."""
    alpha, beta = float(1 - schedule.betas[k]), float(schedule.betas[k])
    abar = float(schedule.a_s_cum[k - 1]) ** 2
    a, v = np.sqrt(abar), abar * data.std**2 + 1 - abar
    u = 1 / (1 / v + alpha / beta)
    means = u * (a * data.centres / v + np.sqrt(alpha) * x_k[:, None] / beta)
    log_w = np.log(data.weights) - ((x_k[:, None] - np.sqrt(alpha) * a * data.centres) ** 2).sum(-1) / (
        2 * (alpha * v + beta)
    )
    top = log_w.max(-1, keepdims=True)
    return means, log_w - top - np.log(np.exp(log_w - top).sum(-1, keepdims=True)), u


def draw(data: Mixture, random: np.random.Generator, num: int, schedule: Schedule, k: int) -> np.ndarray:
    """Samples x_k [num, d] of q(x_k)."""
    m = random.choice(len(data.centres), num, p=data.weights)
    x_0 = data.centres[m] + data.std * random.standard_normal((num, data.centres.shape[1]))
    return schedule.a_s_cum[k] * x_0 + schedule.sigmas_cum[k] * random.standard_normal(x_0.shape)


def count_modes(means: np.ndarray, log_weights: np.ndarray, variance: float) -> np.ndarray:
    """The number of local maxima [N] of the mixtures, found by mean shift from every component."""
    counts = np.zeros(len(means), int)
    for n in range(len(means)):
        relevant = log_weights[n] > np.log(1e-3)  # lighter components are no mode that anyone would see
        c, lw = means[n, relevant], log_weights[n, relevant]
        x = c.copy()
        for _ in range(500):
            parts = lw - ((x[:, None] - c) ** 2).sum(-1) / (2 * variance)
            w = np.exp(parts - parts.max(-1, keepdims=True))
            new = (w @ c) / w.sum(-1, keepdims=True)
            moved = np.abs(new - x).max()
            x = new
            if moved < 1e-7 * np.sqrt(variance):
                break
        found: list[np.ndarray] = []
        for point in x:
            if all(np.abs(point - other).max() > 1e-2 * np.sqrt(variance) for other in found):
                found.append(point)
        counts[n] = len(found)
    return counts


def gap(means: np.ndarray, log_weights: np.ndarray, variance: float, random: np.random.Generator, num: int) -> float:
    """E_n KL(mixture n || Gaussian of its mean and covariance), by `num` samples of each."""
    n, _, d = means.shape
    w = np.exp(log_weights)
    mean = (w[..., None] * means).sum(1)
    off = means - mean[:, None]
    covariance = np.einsum("nm,nmi,nmj->nij", w, off, off) + variance * np.eye(d)
    cumulative = np.cumsum(w, axis=1)
    which = (random.random((n, num, 1)) > cumulative[:, None, :-1]).sum(-1)
    x = np.take_along_axis(means, which[..., None], 1) + np.sqrt(variance) * random.standard_normal((n, num, d))
    total = 0.0
    inverse, (_, logdet) = np.linalg.inv(covariance), np.linalg.slogdet(covariance)
    for i in range(n):
        p = log_density(x[i], means[i][None], log_weights[i][None], variance)
        y = x[i] - mean[i]
        q = -0.5 * (np.einsum("ni,ij,nj->n", y, inverse[i], y) + logdet[i] + d * np.log(2 * np.pi))
        total += float(np.mean(p - q))
    return total / n


def measure(data: Mixture, num_steps: int, random: np.random.Generator) -> dict[int, tuple[np.ndarray, float]]:
    """Modes of 100 samples and gap of each step k; of many steps, only evenly spaced ones."""
    schedule, found = Schedule.create(num_steps), {}
    for k in np.unique(np.linspace(1, num_steps, min(num_steps, 50)).round().astype(int)).tolist():
        mixture = denoising(data, schedule, k, draw(data, random, 100, schedule, k))
        found[k] = count_modes(*mixture), gap(*mixture, random, 400)
    return found


def over_all_steps(data: Mixture, num_steps: int, random: np.random.Generator) -> dict[str, float]:
    """The multimodal fraction, the largest number of modes, and the summed gap."""
    counts, gaps = zip(*measure(data, num_steps, random).values(), strict=True)
    multimodal = float((np.array(counts) > 1).mean())
    return {"multimodal": multimodal, "most_modes": int(np.max(counts)), "gap": float(np.mean(gaps) * num_steps)}


def by_step(data: Mixture, num_steps: int, random: np.random.Generator) -> dict[str, dict[str, float]]:
    """The multimodal fraction and the gap of every step k."""
    steps = measure(data, num_steps, random).items()
    return {str(k): {"multimodal": float((counts > 1).mean()), "gap": gap_} for k, (counts, gap_) in steps}


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Compute every number of the experiment."""
    start, random = time.time(), np.random.default_rng(0)
    tables = {
        name: {str(num_steps): over_all_steps(data, num_steps, random) for num_steps in STEPS}
        for name, data in (("line", LINE), ("grid", GRID))
    }
    spacings = {}
    for scale in (1, 2, 4, 8):
        larger = Mixture(scale * GRID.centres, GRID.weights, scale * GRID.std)
        spacings[str(int(scale * GRID_SPACING))] = by_step(larger, 4, random)
    return {"seed": 0, "tables": tables, "spacings": spacings, "seconds": round(time.time() - start, 1)}


def table(results: dict[str, Any]) -> str:
    """Markdown with a table of T, and one of the spacings."""
    lines = ["| T | 1-D: multimodal | modes | KL to the best Gaussians | 25 Gaussians: multimodal | modes | KL |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for num_steps in STEPS:
        cells = [results["tables"][name][str(num_steps)] for name in ("line", "grid")]
        row = " | ".join(f"{100 * c['multimodal']:.0f} % | {c['most_modes']} | {c['gap']:.3f}" for c in cells)
        lines.append(f"| {num_steps:,} | {row} |")
    lines += [
        "",
        "T = 4, the 25 Gaussians enlarged to another spacing: the multimodal fraction and the KL of each step",
        "",
    ]
    lines += ["| spacing | x_4 -> x_3 | x_3 -> x_2 | x_2 -> x_1 | x_1 -> x_0 |", "|---|---|---|---|---|"]
    for spacing, steps in results["spacings"].items():
        cells = (steps[str(k)] for k in (4, 3, 2, 1))
        lines.append(
            f"| {spacing} | " + " | ".join(f"{100 * c['multimodal']:.0f} %, {c['gap']:.3f}" for c in cells) + " |"
        )
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the denoising distributions of one x_k half-way, for every T. They are computed, not read from `results`."""
    plt = figures.pyplot()
    shown = (1000, 100, 16, 4, 2, 1)
    figure, panels = plt.subplots(2, len(shown), figsize=(2.6 * len(shown), 5.6), constrained_layout=True)
    for column, num_steps in enumerate(shown):
        schedule, k = Schedule.create(num_steps), -(-num_steps // 2)
        axis = panels[0, column]
        means, log_w, u = denoising(LINE, schedule, k, schedule.a_s_cum[k] * np.array([[0.3]]))
        w, centres = np.exp(log_w[0]), means[0, :, 0]
        mean = w @ centres
        std = np.sqrt(w @ (centres - mean) ** 2 + u)
        x = np.linspace(mean - 4 * std, mean + 4 * std, 600)
        axis.fill_between(
            x, np.exp(log_density(x[:, None], means[:1].repeat(600, 0), log_w[:1].repeat(600, 0), u)), alpha=0.5
        )
        axis.plot(x, np.exp(-((x - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2), "k--", linewidth=1)
        axis.set(title=f"T = {num_steps:,}", yticks=[])
        axis = panels[1, column]
        random = np.random.default_rng(1)
        means, log_w, u = denoising(GRID, schedule, k, schedule.a_s_cum[k] * np.array([[0.9, 0.9]]))
        which = random.choice(25, 1500, p=np.exp(log_w[0]))
        points = means[0, which] + np.sqrt(u) * random.standard_normal((1500, 2))
        axis.plot(*points.T, ".", markersize=2, alpha=0.4)
        centre, covariance = points.mean(0), np.cov(points.T)
        angle = np.linspace(0, 2 * np.pi, 100)
        ring = centre[:, None] + 2 * np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)])
        axis.plot(*ring, "k--", linewidth=1)
        axis.set(aspect="equal")
    panels[0, 0].set_ylabel("mixture on a line")
    panels[1, 0].set_ylabel("25 Gaussians")
    figure.suptitle("q(x$_{k-1}$ | x$_k$) of the step half-way (k = T/2), and the Gaussian of its moments (dashed)")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment)
