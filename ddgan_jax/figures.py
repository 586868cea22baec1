"""Pictures, drawn from files and host arrays: they can be redrawn without an accelerator."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def grid(images: np.ndarray, columns: int | None = None, min_side: int = 64, gap: int = 2) -> np.ndarray:
    """uint8 [N, H, W, C] -> one image [H', W', 3]: each enlarged by a whole factor to `min_side` px, gaps between."""
    n, height, width, channels = images.shape
    scale = max(1, -(-min_side // max(height, width)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    images = images[..., :3] if channels >= 3 else images[..., :1].repeat(3, axis=-1)
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows, gap = -(-n // columns), gap * max(1, scale // 2)
    h, w = height * scale + gap, width * scale + gap
    canvas = np.full((rows * h + gap, columns * w + gap, 3), 64, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        canvas[y * h + gap : y * h + h, x * w + gap : x * w + w] = image
    return canvas


def scatter(points: np.ndarray) -> np.ndarray:
    """float32 points [N, 2] -> a picture of them, uint8 [H, W, 3]."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 6), constrained_layout=True)
    axis.plot(points[:, 0], points[:, 1], ".", markersize=2, alpha=0.5)
    axis.set(aspect="equal", title=f"{len(points):,} points")
    axis.grid(alpha=0.3)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return picture


def picture(samples: np.ndarray) -> np.ndarray:
    """uint8 images [N, H, W, C] as a grid, or points [N, 2] as a scatter plot: uint8 [H', W', 3]."""
    return scatter(samples) if samples.ndim == 2 else grid(samples)


def _pyplot() -> Any:
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_image(path: pathlib.Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as the file type that the name says."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def curves(metrics: pathlib.Path, path: pathlib.Path) -> None:
    """Draw the curves of a metrics.jsonl: losses, logits, losses by t, R1, norms of gradients and parameters."""
    plt = _pyplot()
    records = read_metrics(metrics)
    panels: Sequence[tuple[str, Sequence[str]]] = (
        ("losses", ("d_loss", "g_loss")),
        ("mean logits", ("d_real", "d_fake")),
        ("loss of D by t", [k for k in sorted(records[-1]) if k.startswith("d_loss_t")] if records else []),
        ("loss of G by t", [k for k in sorted(records[-1]) if k.startswith("g_loss_t")] if records else []),
        ("gradient norms, R1", ("d_grad_norm", "g_grad_norm", "r1")),
        ("parameter norms", ("d_param_norm", "g_param_norm")),
    )
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        if title.startswith("gradient"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
