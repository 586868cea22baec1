"""Multimodal denoising made visible (Figure 8 of the paper): one noisy x_{t+1}, many z.

    python -m experiments.multimodal                            # seconds, after those of gaussians and digits

Samples of p(x_t | x_{t+1}) by networks trained on 25 Gaussians, beside the exact distribution; and on digits, the
generator's images for one x_{t+1}. The table has two measures. For the 25 Gaussians, it is the energy distance between
DRAWS samples of the model and DRAWS exact samples, in standard deviations of x_t, averaged over POINTS noisy points.
For digits, it is the standard deviation over z in grey levels of 255, as the root mean square over pixels and noisy
images. For each t, the figure shows the noisy point whose exact distribution weights its modes most uniformly.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddgan_jax
from ddgan_jax.commands import figures
from ddgan_jax.method.diffusion import sample_posterior
from ddgan_jax.model.model import Model
from experiments import common, digits, gaussians
from experiments.why_gaussian_fails import GRID, Mixture, denoising

POINTS, DRAWS, IMAGES, SHOWN = 64, 1000, 12, 300
KINDS = {
    "DDGAN": "DDGAN, T = 4",
    "without z": "DDGAN without z, T = 4",
    "Gaussian denoiser": "Gaussian denoiser, T = 4",
}
SHOWN_SEED = 3  # of the noisy points and the digit in the figure


def exact(model: Model, x_tp1: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray, float]:
    """q(x_t | x_{t+1}) of x_{t+1} [N, 2], for data at the scale of the model: means, log weights, variance."""
    scale = model.denoiser.scale
    data = Mixture(scale * GRID.centres, GRID.weights, scale * GRID.std)
    return denoising(data, model.denoiser.schedule, t + 1, x_tp1.astype(np.float64))


def exact_draws(
    means: np.ndarray, log_weights: np.ndarray, variance: float, random: np.random.Generator
) -> list[np.ndarray]:
    """DRAWS samples [DRAWS, 2] of each mixture."""
    chosen = [random.choice(len(w), DRAWS, p=np.exp(w)) for w in log_weights]
    noise = random.standard_normal((len(means), DRAWS, 2))
    return [m[c] + np.sqrt(variance) * e for m, c, e in zip(means, chosen, noise, strict=True)]


def draws(model: Model, x_tp1: np.ndarray, t: int, seed: int) -> np.ndarray:
    """DRAWS samples [DRAWS, 2] of p_theta(x_t | x_{t+1}), with new z and new posterior noise."""
    z_key, noise_key = jax.random.split(jax.random.key(seed))
    many, steps = jnp.tile(x_tp1, (DRAWS, 1)), jnp.full(DRAWS, t)
    denoiser = model.denoiser
    x0_hat = denoiser.gen(model.params, many, steps, jax.random.normal(z_key, (DRAWS, denoiser.nz)))
    return np.asarray(
        sample_posterior(denoiser.schedule, x0_hat, many, steps, jax.random.normal(noise_key, many.shape))
    )


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|), unbiased, of [N, 2] and [N, 2]; 0 below the noise."""
    apart = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1)  # noqa: E731
    n = len(x)
    within = (apart(x, x).sum() + apart(y, y).sum()) / (n * (n - 1))
    return float(np.sqrt(max(2 * apart(x, y).mean() - within, 0.0)))


def trained(of: Any, method: str, seed: int) -> Model:
    """A model of the experiment `of`, which is trained now if it has not been."""
    path, flags = common.job(of.NAME, of.FLAGS, of.METHODS, method, seed)
    common.train_and_evaluate(path, *flags)
    return ddgan_jax.load(str(path))


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Sample the models of the experiments gaussians and digits."""
    seed = common.SEEDS[0]
    arrays: dict[str, np.ndarray] = {}
    models = {kind: trained(gaussians, method, seed) for kind, method in KINDS.items()}
    first, random = models["DDGAN"], np.random.default_rng(0)
    steps, deviation = range(first.num_steps), []
    distances: dict[str, list[float]] = {kind: [] for kind in ["exact, a second sample", *KINDS]}
    noisy = first.trajectory(POINTS, SHOWN_SEED).x_tp1
    std = first.config.data.scale * first.config.model.data_std  # of x_0
    for t, x_tp1 in enumerate(noisy):
        wide = float(np.hypot(first.denoiser.schedule.a_s_cum[t] * std, first.denoiser.schedule.sigmas_cum[t]))
        deviation.append(wide)
        mixtures = exact(first, x_tp1, t)
        truth = exact_draws(*mixtures, random)
        found = {"exact, a second sample": exact_draws(*mixtures, random)}
        found |= {kind: [draws(model, x, t, i) for i, x in enumerate(x_tp1)] for kind, model in models.items()}
        for kind, sets in found.items():
            each = [energy_distance(a, b) for a, b in zip(truth, sets, strict=True)]
            distances[kind].append(float(np.mean(each)) / np.sqrt(wide))
        shown = np.argmin(np.sum(np.exp(mixtures[1]) * mixtures[1], -1))  # of the largest entropy
        arrays |= {f"points {kind} {t}": sets[shown][:SHOWN] for kind, sets in found.items()}
        arrays |= {f"points exact {t}": truth[shown][:SHOWN], f"points noisy {t}": x_tp1[shown]}

    model, spread = trained(digits, "T = 4, the paper's losses and noise", seed), []
    for t in steps:
        x_tp1, images = model.vary(IMAGES, t, seed=SHOWN_SEED)
        arrays |= {f"digits noisy {t}": x_tp1[..., 0], f"digits {t}": images[..., 0]}
        every = [model.vary(IMAGES, t, seed=i)[1].astype(np.float64).var(0, ddof=1) for i in range(POINTS)]
        spread.append(float(np.sqrt(np.mean(every))))
    smaller = {k: v if v.dtype == np.uint8 else v.astype(np.float16) for k, v in arrays.items()}
    common.keep("multimodal", "draws", smaller)
    return {"energy_distance": distances, "deviation_of_x_t": deviation, "spread_of_digits": spread}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each t."""
    kinds = list(results["energy_distance"])
    lines = [f"| t | {' | '.join(kinds)} | digits: deviation over z |", "|---|" + "---|" * (len(kinds) + 1)]
    for t, spread in enumerate(results["spread_of_digits"]):
        cells = [f"{results['energy_distance'][kind][t]:.3f}" for kind in kinds]
        lines.append(f"| {t} | {' | '.join(cells)} | {spread:.1f} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw a column for each t: the exact distribution, the models' samples, and digits from one noisy digit."""
    plt = figures.pyplot()
    kinds = ["exact", *KINDS]
    steps = list(reversed(range(len(results["spread_of_digits"]))))
    with np.load(path.parent / "draws.npz") as file:
        arrays = {name: file[name].astype(np.float32) for name in file.files}
    figure, panels = plt.subplots(len(kinds) + 1, len(steps), figsize=(13, 16), layout="constrained")
    for column, t in enumerate(steps):
        noisy = arrays[f"points noisy {t}"]
        middle = arrays[f"points exact {t}"].mean(0)
        reach = 1.4 * np.abs(np.concatenate([arrays[f"points exact {t}"], noisy[None]]) - middle).max()
        for axis, kind in zip(panels[:, column], kinds, strict=False):
            axis.plot(*arrays[f"points {kind} {t}"].T, ".", markersize=4, alpha=0.5)
            axis.plot(*noisy, "x", color="C3", markersize=10)
            axis.set(
                xlim=(middle[0] - reach, middle[0] + reach),
                ylim=(middle[1] - reach, middle[1] + reach),
                xticks=[],
                yticks=[],
                aspect="equal",
            )
            if column == 0:
                axis.set_ylabel(kind)
        panels[0, column].set_title(f"x_{t} given x_{t + 1} (cross)")
        images, axis = arrays[f"digits {t}"].reshape(3, 4, 8, 8), panels[-1, column]
        tiles = np.full((3 * 9 + 11, 4 * 9), 255.0)
        for i, j in np.ndindex(3, 4):
            tiles[11 + 9 * i : 19 + 9 * i, 9 * j : 9 * j + 8] = images[i, j]
        tiles[:8, 9:17] = np.clip((arrays[f"digits noisy {t}"] + 1) * 127.5, 0, 255)
        axis.imshow(tiles, cmap="gray", vmin=0, vmax=255)
        axis.axis("off")
        axis.set_title(f"a digit at x_{t + 1}; x0_hat for {IMAGES} z", fontsize=9)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment)
