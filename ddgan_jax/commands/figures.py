"""Figures, drawn from files and host arrays, so that they can be redrawn without an accelerator."""

import gc
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddgan_jax.commands import health
from ddgan_jax.storage import paths
from ddgan_jax.storage.log import read_metrics
from ddgan_jax.storage.paths import Given

MAX_POINTS = 500  # of a curve; a panel has no more pixels, and the memory does not grow with the run
MAX_MARKED = 8  # findings that are named below the curves
MIN_SIDE = 64  # px, of an image in a grid
LARGE_SIDE = 192  # px, of an image that is shown alone: in an animation, or on the page


def grid(images: np.ndarray, columns: int | None = None, min_side: int = MIN_SIDE, gap: int = 2) -> np.ndarray:
    """uint8 [N, H, W, C] -> one image [H', W', 3]: each enlarged by an integer to at least `min_side` px, with gaps."""
    before, images = images.shape[1], enlarged(images, min_side)
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows, gap = -(-n // columns), gap * max(1, height // before // 2)
    h, w = height + gap, width + gap
    canvas = np.full((rows * h + gap, columns * w + gap, 3), 64, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        canvas[y * h + gap : y * h + h, x * w + gap : x * w + w] = image
    return canvas


def enlarged(images: np.ndarray, min_side: int = LARGE_SIDE) -> np.ndarray:
    """uint8 [N, H, W, C] as RGB, each pixel repeated until a side has at least `min_side` px, without gaps."""
    scale = max(1, -(-min_side // max(images.shape[1:3])))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


def scatter(points: np.ndarray, given: np.ndarray | None = None, among: np.ndarray | None = None) -> np.ndarray:
    """A plot of points [N, d], uint8 [H, W, 3]: the first two coordinates, or a histogram for d = 1.

    The point `given` [d] is marked as the input. Fewer points are drawn larger, so that they are seen. The axes are
    those of all points `among` which these are, [M, d].
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 6), constrained_layout=True)
    d = points.shape[1]
    if d == 1:
        axis.hist(points[:, 0], bins=100)
    else:
        size = np.clip(40 / np.sqrt(len(points)), 2, 12)
        axis.plot(points[:, 0], points[:, 1], ".", markersize=size, alpha=0.5)
        axis.set_aspect("equal")
    if given is not None:
        axis.plot(given[0], given[1] if d > 1 else 0, "x", color="tab:red", markersize=10, label="the input")
        axis.legend()
    axis.set(title=f"{len(points):,} points" + (f", coordinates 1 and 2 of {d}" if d > 2 else ""))
    if among is not None:
        low, high = among.min(axis=0), among.max(axis=0)
        margin = 0.05 * (high - low).max() + 1e-6
        axis.set_xlim(low[0] - margin, high[0] + margin)
        if d > 1:
            axis.set_ylim(low[1] - margin, high[1] + margin)
    axis.grid(alpha=0.3)
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return image


def printable(name: str) -> str:
    """A name of a file or class, which need not be UTF-8, with escapes in place of what cannot be encoded."""
    return name.encode("utf-8", "backslashreplace").decode()


def histogram(counts: np.ndarray, path: Given, grid: bool = False, names: Sequence[str] = ()) -> None:
    """Draw the number of samples of each mode, int [K]: as bars, sorted if K > 50, or as a square if `grid`.

    Up to 50 bars have the `names` [K] of the classes, or else their indices.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 5) if grid else (9, 4), constrained_layout=True)
    present = f"{int((counts > 0).sum())} of {len(counts)} modes"
    if grid:
        side = round(len(counts) ** 0.5)
        square = counts.reshape(side, side).T
        image = axis.imshow(square, origin="lower", cmap="viridis", vmin=0)
        for (y, x), count in np.ndenumerate(square):
            axis.text(
                x, y, f"{count:,}", ha="center", va="center", color="white" if count < counts.max() / 2 else "black"
            )
        figure.colorbar(image, label="high-quality samples")
        axis.set(title=f"{present}, by their place in the plane", xticks=[], yticks=[])
    else:
        many = len(counts) > 50
        values = np.sort(counts)[::-1] if many else counts
        axis.bar(np.arange(len(counts)), values, width=1 if many else 0.8)
        ticks = [] if many else list(names) if len(names) == len(counts) else [str(i) for i in range(len(counts))]
        # A dollar sign would start a formula; long names overlap unless they are upright.
        axis.set_xticks(range(len(ticks)), [printable(name[:24]).replace("$", r"\$") for name in ticks])
        axis.tick_params("x", rotation=90 if max(map(len, ticks), default=0) > 4 else 0)
        axis.axhline(counts.mean(), color="black", linewidth=1, linestyle="--", label="equal fractions")
        axis.set(title=present, xlabel="modes, the most frequent first" if many else "class", ylabel="samples")
        axis.legend()
    save_figure(figure, path)


def manifolds(
    real: np.ndarray, fake: np.ndarray, recalled: np.ndarray, inside: np.ndarray, path: Given, max_points: int = 2000
) -> None:
    """Draw features real [N, D] and fake [M, D] on the two principal axes of the real ones.

    `recalled` bool [N] marks real features in the manifold of the fake ones (recall), `inside` bool [M] fake features
    in the manifold of the real ones (precision). At most `max_points` of each are drawn.
    """
    plt = pyplot()
    centred = real.astype(np.float64) - real.mean(axis=0, dtype=np.float64)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.5), constrained_layout=True, sharex=True, sharey=True)
    for axis, what, x, held, words in (
        (panels[0], "precision", fake, inside, ("samples among the real ones", "samples outside")),
        (panels[1], "recall", real, recalled, ("real images among the samples", "real images that are missed")),
    ):
        points = (x[:max_points] - real.mean(axis=0)) @ axes
        other = ((real if what == "precision" else fake)[:max_points] - real.mean(axis=0)) @ axes
        axis.plot(
            *other.T, ".", color="lightgrey", markersize=3, label="real images" if what == "precision" else "samples"
        )
        for flag, colour, word in zip((True, False), ("tab:green", "tab:red"), words, strict=True):
            axis.plot(*points[held[:max_points] == flag].T, ".", color=colour, markersize=3, label=word)
        axis.set(title=f"{what} {held.mean():.3f}", xlabel="first principal axis", ylabel="second")
        axis.legend(markerscale=3, fontsize=8)
    save_figure(figure, path)


def neighbours(samples: np.ndarray, nearest: np.ndarray, distance: np.ndarray, path: Given) -> None:
    """Draw uint8 samples [N, H, W, C] above their nearest training images, with their distances [N].

    The first half of the samples are those closest to a training image, the second half are arbitrary samples.
    """
    plt = pyplot()
    half = -(-len(samples) // 2)
    figure, panels = plt.subplots(4, half, figsize=(1.5 * half, 7), constrained_layout=True, squeeze=False)
    for axis in panels.flat:
        axis.axis("off")
    for i, pair in enumerate(zip(samples, nearest, strict=True)):
        row, column = divmod(i, half)
        for k, image in enumerate(pair):
            panels[2 * row + k, column].imshow(
                image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255
            )
        panels[2 * row + 1, column].set_title(f"{distance[i]:.3g}", fontsize=8)
    words = "samples above their nearest training images, with the distance in feature space"
    figure.suptitle(f"{words}; first the closest of all, then any", fontsize=10)
    save_figure(figure, path)


def as_image(samples: np.ndarray) -> np.ndarray:
    """uint8 images [N, H, W, C] as a grid, or points [N, 2] as a scatter plot: uint8 [H', W', 3]."""
    return scatter(samples) if samples.ndim == 2 else grid(samples)


def as_frames(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images or points as in `as_image`, as frames of an animation or panels: all points have the same axes."""
    among = np.concatenate(frames) if frames[0].ndim == 2 else None
    return [grid(frame) if among is None else scatter(frame, among=among) for frame in frames]


def pyplot() -> Any:
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure: Any, path: Given) -> None:
    """Write a Matplotlib figure and close it."""
    paths.write(path, lambda file: figure.savefig(file, dpi=100, format=_format(path)))
    pyplot().close(figure)
    gc.collect()  # the parts of a figure refer to each other, which would keep megabytes until a collection


def save_image(path: Given, image: np.ndarray, sync: bool = True, **options: Any) -> None:
    """Write uint8 [H, W, 3] or grey [H, W, 1], in the format that the file's name ends in.

    `sync` is that of `paths.write`, and `options` are Pillow's for the format.
    """
    from PIL import Image

    image = image[..., 0] if image.shape[-1] == 1 else image
    paths.write(path, lambda file: Image.fromarray(image).save(file, format=_format(path), **options), sync)


def _format(path: Given) -> str:
    return os.fspath(path).rpartition(".")[2]


def save_gif(path: Given, frames: Sequence[np.ndarray], milliseconds: int = 400) -> None:
    """Write uint8 images [H, W, 3] of one size as an animation that repeats."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = dict(save_all=True, append_images=rest, duration=milliseconds, loop=0)
    paths.write(path, lambda file: first.save(file, format="gif", **options))


def trajectory(x: np.ndarray, x0_hat: np.ndarray, names: Sequence[str], outputs: Sequence[str], path: Given) -> None:
    """Draw x_T, ..., x_0 [T+1, N, ...], titled `names`, above the T `outputs` x0_hat [T, N, ...], in columns."""
    plt = pyplot()
    height = 1.0 if x.ndim == 3 else -(-x.shape[1] // 2) * x.shape[2] / (2 * x.shape[3])  # of a panel, by its width
    figure, panels = plt.subplots(2, len(x), figsize=(2.2 * len(x), 4.4 * height + 0.8), constrained_layout=True)
    drawn = as_frames([*x, *x0_hat]) if x.ndim == 3 else [grid(images, columns=2) for images in (*x, *x0_hat)]
    for row, many, titles in zip(panels, (drawn[: len(x)], drawn[len(x) :]), (names, outputs), strict=True):
        for i, axis in enumerate(row):
            axis.axis("off")
            if i < len(many):
                axis.imshow(many[i])
                axis.set_title(titles[i])
    save_figure(figure, path)


def _by_t(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    """The metrics of the records whose names are `name` and a number t, such as 'd_loss_t0', in the order of t."""
    found = {key.removeprefix(name) for record in records for key in record if key.startswith(name)}
    return [f"{name}{t}" for t in sorted(int(t) for t in found if t.isdecimal())]


def curves(metrics: Given, path: Given) -> None:
    """Draw a metrics.jsonl: losses, logits, losses by t, R1, norms of gradients and parameters, and evaluations.

    Dotted lines mark where a finding began (`commands.health`); they are named below the panels.
    """
    plt = pyplot()
    records = read_metrics(metrics, at_most=MAX_POINTS)
    panels: list[tuple[str, Sequence[str]]] = [
        ("losses", ("d_loss", "g_loss", "g_squared_error")),
        ("mean logits", ("d_real", "d_fake")),
        ("loss of D by t", _by_t(records, "d_loss_t")),
        ("loss of G by t", _by_t(records, "g_loss_t")),
        ("gradient norms, R1", ("d_grad_norm", "g_grad_norm", "r1")),
        ("parameter norms", ("d_param_norm", "g_param_norm")),
    ]
    evaluated = sorted({name for record in records for name in record if name.startswith("eval/")})
    distances = [name for name in evaluated if name.endswith(("frechet", "/fid", "variation", "/frechet_distance"))]
    fractions = [name for name in evaluated if name.endswith(("/precision", "/recall", "/coverage", "/high_quality"))]
    panels += [("evaluation: distances", distances), ("evaluation: fractions", fractions)] if evaluated else []
    beginnings = health.begun(read_metrics(metrics))  # all records: findings compare each with its neighbours
    figure, axes = plt.subplots(2, len(panels) // 2, figsize=(2.5 * len(panels), 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.T.flat, panels, strict=True):
        for step in sorted({step for step, _ in beginnings}):
            axis.axvline(step, color="tab:red", linewidth=0.8, linestyle=":", zorder=0)
        for name in names:
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        if title.startswith("gradient"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    if beginnings:
        names = [f"{step:,} {name}" for step, name in beginnings[-MAX_MARKED:]]
        figure.supxlabel(f"findings, dotted: {', '.join(names)}", fontsize=8, color="tab:red")
    save_figure(figure, path)
