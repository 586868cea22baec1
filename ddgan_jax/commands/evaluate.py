"""Evaluation as a job: the paper's measures of a checkpoint, or of images made elsewhere; see metrics/evaluator.py."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.config.settings import Config, read
from ddgan_jax.data import decoding
from ddgan_jax.data.batches import like_real
from ddgan_jax.data.resolve import facts, labels_of
from ddgan_jax.data.sources import Data
from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import UserError
from ddgan_jax.metrics import npz
from ddgan_jax.metrics.evaluator import EvaluationResult, Evaluator, Results, measure, open_evaluator, open_real_images
from ddgan_jax.model.model import beside, file_of, load
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.log import as_json
from ddgan_jax.storage.paths import Path

# --- Samples ------------------------------------------------------------------------------------------------------


def read_samples(path: str, num_samples: int) -> tuple[Iterator[np.ndarray], int]:
    """Chunks [n, ...] of the first `num_samples` samples (0: all) of an npz with one array or a folder, and how many.

    UserError if they are too few, damaged, or not all of one size; Fault if they cannot be read.
    """
    given = paths.path(path)
    folder = paths.is_dir(given)
    if folder:
        found = [given / name for name in paths.names(given)]
        files = [file for file in found if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")]
        total = len(files)
    else:
        arrays = npz.read_npz(path)
        if len(arrays) != 1:
            raise UserError(f"{path} holds {len(arrays)} arrays, {', '.join(arrays) or 'none'}: it needs to be one")
        (array,) = arrays.values()
        total = len(array) if array.ndim else 0
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path} holds NaN or infinity")
    count = num_samples or total
    if total < max(count, 2):
        raise UserError(
            f"{path} holds {total} samples, but {max(count, 2)} are needed: say how many with --num_samples"
        )
    if folder:
        return _decoded(files[:count]), count
    return (array[i : min(i + 256, count)] for i in range(0, count, 256)), count


def _decoded(files: list[Path]) -> Iterator[np.ndarray]:
    """Pictures in chunks uint8 [n, H, W, C]."""
    first = None
    for start in range(0, len(files), 64):
        chunk = []
        for file in files[start : start + 64]:
            content = npz.read_bytes(file)
            try:
                image = decoding.to_eight_bits(decoding.open_image(content))
            except ValueError as error:
                raise UserError(f"sample {file} cannot be read: {error}") from error
            chunk.append(np.asarray(image).reshape(image.height, image.width, -1))
            first = first or chunk[0].shape
            if chunk[-1].shape != first:
                raise UserError(f"the samples are of different sizes: {file} is {chunk[-1].shape}, the first {first}")
        yield np.stack(chunk)


def as_grey(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Chunks [n, H, W, 3] of grey images as [n, H, W, 1], others unchanged. UserError for images in colour."""
    for chunk in chunks:
        if chunk.ndim == 4 and chunk.shape[-1] == 3:
            if (chunk != chunk[..., :1]).any():
                raise UserError(
                    "the samples are in colour, but the real images are grey: name samples of the same data"
                )
            chunk = chunk[..., :1]
        yield chunk


def time_sampling(draw: Sampler, params: Any, seed: int, batch: int, num_steps: int) -> Results:
    """Seconds for 100 samples: the median of 5 draws of a batch after one that does not count.

    A draw is noise, T network calls and the transfer of the images to the host; the weights are on the devices before.
    """
    params, seconds = jax.block_until_ready(parallel.replicate_local(params)), []
    for _ in range(6):
        start = time.perf_counter()
        draw(params, seed, batch)
        seconds.append(time.perf_counter() - start)
    return {
        "network_calls": num_steps,
        "seconds_per_100": statistics.median(seconds[1:]) * 100 / batch,
        "batch": batch,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


# --- The job ------------------------------------------------------------------------------------------------------


def evaluate(config: Any, path: str, samples: str = "", out: str = "", num_samples: int = 0, seed: int = 0) -> Results:
    """Evaluate the checkpoint or workdir `path`, or the `samples` of a file or folder, against `config.data`.

    Without a `config`, that of the checkpoint's training is taken.
    Writes results.json and pictures into the folder `out`, by default WORKDIR/evaluation/STEP, or beside the file of a
    model. Returns the results, {} in all processes but the first.
    Raises UserError where `config` is of other data than the checkpoint.
    """
    start, explicit = time.time(), None if config is None else read(config)
    model = None if samples else load(path, explicit)
    c = explicit or (model.config if model else Config())
    count = num_samples or c.eval.num_samples
    results: Results = {"num_samples": count}
    if model is None:
        chunks, count = read_samples(samples, num_samples)
        folder = paths.path(out or f"{samples.rstrip('/')}.evaluation")
        results = {"samples": samples}
    else:
        trained, step = model.config, model.step
        c = processes.everywhere(lambda: _same_data(explicit or trained, trained, path))
        draw = Sampler(model.denoiser, c.sample.batch_size)
        folder = paths.path(out or beside(path, "evaluation" if file_of(path) else f"evaluation/{step}"))
        found = path if file_of(path) else processes.from_primary(lambda: str(checkpoint.find(path)))
        results = {"checkpoint": found, "step": step, "seed": seed}
    evaluator, labels = open_evaluator(c, _open_data(c, {"--num_samples": count, "--sample_seed": seed}), count), None
    if model:
        labels = like_real(labels_of(evaluator.data, model.num_classes, c.data.name), count)
        chunks = draw.chunks(model.params, seed, count, labels)
    elif evaluator.data.images.shape[-1] == 1:
        chunks = as_grey(chunks)
    result, speed = measure(evaluator, chunks, count, "reading" if samples else "sampling", labels), Results()
    if model:
        batch = min(count, 100, c.sample.batch_size * jax.device_count())
        speed = {"sampling": time_sampling(draw, model.params, seed, batch, model.num_steps)}

    def write() -> Results:
        assert result  # process 0 has the numbers
        found = results | {"features": c.eval.features} | evaluator.about | result.results | speed
        found["seconds"] = round(time.time() - start, 1)
        paths.write(folder / "results.json", as_json(found, indent=2) + "\n")
        draw_figures(evaluator, result, folder, path if not samples else "")
        for name, value in found.items():
            print(f"  {name:<46} {_readable(value)}")
        print(f"written to {folder}", flush=True)
        return found

    return processes.by_primary(write) or {}


def _open_data(c: Config, arguments: dict[str, Any]) -> Data | None:
    """The real images, or None for points. UserError unless all processes have the same of them and of all else."""
    data = None if c.eval.features == "points" else open_real_images(c)
    if processes.num_processes() > 1:
        processes.agree(facts(c, data) | arguments)
    return data


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _same_data(c: Config, trained: Config, path: str) -> Config:
    """The configuration with the size that the checkpoint's images have, if both are of the same data."""
    ours, theirs = c.data, trained.data
    sizes = ((ours.image_size, theirs.image_size), (ours.channels, theirs.channels))
    if ours.name != theirs.name or any(mine not in (None, other) for mine, other in sizes):
        sets = (f"{data.name} {data.image_size} px, {data.channels} channels" for data in (theirs, ours))
        raise UserError(
            "the checkpoint in {} is of {}, but --config is of {}: name the one of its training".format(path, *sets)
        )
    return replace(c, data=replace(ours, image_size=theirs.image_size, channels=theirs.channels))


def draw_figures(evaluator: Evaluator, result: EvaluationResult, folder: Path, workdir: str) -> None:
    """Pictures of what was evaluated: samples, curves, modes, the manifolds, the nearest training images."""
    figures.save_image(folder / "samples.png", figures.picture(result.samples[: 64 if evaluator.networks else None]))
    if workdir and paths.exists(metrics := paths.path(workdir) / "metrics.jsonl"):
        figures.curves(metrics, folder / "curves.png")
    if result.histogram is not None:
        figures.histogram(result.histogram, folder / "modes.png", grid=not evaluator.networks)
    if found := result.manifolds:
        real = evaluator.real[-1].features[evaluator.manifold_indices]
        fake = result.features[-1].features[: len(found.balls)]
        figures.manifolds(real, fake, found.recalled, found.balls > 0, folder / "manifold.png")
    if result.neighbours is not None:
        index, distance = result.neighbours
        closest = np.argsort(distance, kind="stable")[:8]
        chosen = np.concatenate([closest, np.arange(len(closest))])
        near = evaluator.data.images[evaluator.reference[index[chosen]]]
        figures.neighbours(result.samples[chosen], near, distance[chosen], folder / "neighbours.png")
