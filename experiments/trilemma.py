"""The trilemma: quality, coverage and speed in one figure, from the other experiments' committed results.

    python -m experiments.trilemma                              # a second

A row is the median over the seeds. For the 25 Gaussians, quality is the fraction of samples within three standard
deviations of a mode, and coverage the fraction of modes. For digits they are precision and recall; for StackedMNIST,
precision and the fraction of modes.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Collection
from typing import Any

from ddgan_jax.commands import figures
from experiments import common

QUALITY_AND_COVERAGE = {
    "gaussians": ("25 Gaussians", lambda judged: judged["high_quality"], lambda judged: judged["modes"] / 25),
    "digits": ("8x8 digits", lambda judged: judged["precision"], lambda judged: judged["recall"]),
    "stacked_mnist": ("StackedMNIST", lambda judged: judged["precision"], lambda judged: judged["modes"] / 1000),
}
SHORT = {
    ("25 Gaussians", "DDGAN, T = 4"),
    ("25 Gaussians", "DDGAN, T = 4, without Fourier features"),
    ("25 Gaussians", "one-shot GAN (T = 1)"),
    ("25 Gaussians", "one-shot GAN (T = 1), without Fourier features"),
    ("25 Gaussians", "Gaussian denoiser, T = 4"),
    ("25 Gaussians", "Gaussian denoiser, T = 1,000"),
    ("StackedMNIST", "DDGAN, T = 3, our recipe"),
    ("StackedMNIST", "one-shot GAN, T = 1"),
    ("8x8 digits", "T = 3 (our recipe)"),
    ("8x8 digits", "T = 1 (one-shot GAN)"),
    ("8x8 digits", "Gaussian denoiser, T = 4"),
    ("8x8 digits", "Gaussian denoiser, T = 100"),
}


def seconds_per_100(judged: dict[str, Any]) -> float:
    """Seconds for 100 samples."""
    return judged["sampling"]["seconds_per_100"]


def rows() -> list[dict[str, Any]]:
    """A row for each method with results: quality and coverage (0 to 1), and seconds for 100 samples."""
    found = []
    for name, (data, quality, coverage) in QUALITY_AND_COVERAGE.items():
        path = common.RESULTS / name / "results.json"
        runs = json.loads(path.read_text())["runs"] if path.exists() else []
        for method in common.module(name).METHODS:
            measures = {"quality": quality, "coverage": coverage, "seconds_per_100": seconds_per_100}
            judged = [run["judged"] for run in runs if run["method"] == method]
            middle = {name: statistics.median(map(measure, judged)) for name, measure in measures.items()}
            about = {"network_calls": judged[0]["sampling"]["network_calls"], "seeds": len(judged)}
            found.append({"data": data, "method": method} | about | middle)
    return found


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the results of the other experiments."""
    return {"rows": rows()}


def table(results: dict[str, Any], methods: Collection[tuple[str, str]] = ()) -> str:
    """Markdown with a row for each method, or only for `methods`: pairs of data and method."""
    headings = ("data", "method", "network calls", "seeds", "quality", "coverage", "sampling 100, s")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in results["rows"]:
        if not methods or (row["data"], row["method"]) in methods:
            cells = [row["data"], row["method"], f"{row['network_calls']:,}", str(row["seeds"])]
            cells += [f"{row['quality']:.2f}", f"{row['coverage']:.2f}", f"{row['seconds_per_100']:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(results: dict[str, Any]) -> str:
    """The rows of `table` that README.md shows."""
    return table(results, SHORT)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw quality against coverage, a panel for each dataset; slower sampling has a larger circle."""
    plt = figures.pyplot()
    names = list(dict.fromkeys(row["data"] for row in results["rows"]))
    figure, panels = plt.subplots(1, len(names), figsize=(7 * len(names), 7.5), layout="constrained", squeeze=False)
    for axis, name in zip(panels[0], names, strict=True):
        of_data = [row for row in results["rows"] if row["data"] == name]
        fastest = min(row["seconds_per_100"] for row in of_data)
        for i, row in enumerate(of_data):
            size, label = (
                60 * (row["seconds_per_100"] / fastest) ** 0.5,
                f"{row['method']}: {row['seconds_per_100']:.2g} s",
            )
            axis.scatter(row["coverage"], row["quality"], s=size, color=f"C{i}", alpha=0.6, label=label)
        axis.set(title=name, xlabel="coverage", ylabel="quality", xlim=(-0.05, 1.1), ylim=(-0.05, 1.1))
        legend = axis.legend(
            title="seconds for 100 samples", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2
        )
        for handle in legend.legend_handles:
            handle.set_sizes([40])
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment)
