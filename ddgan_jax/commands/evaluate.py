"""The command `evaluate`: measures of a checkpoint, or of samples in a file or folder; see metrics/evaluator.py."""

import itertools
import json
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.commands.checks import check_classes
from ddgan_jax.commands.sample_files import Samples, as_grey, file_samples
from ddgan_jax.config import presets
from ddgan_jax.config.settings import Config, read
from ddgan_jax.data.batches import match_label_frequencies
from ddgan_jax.data.folder import listed_once
from ddgan_jax.data.resolve import facts, labels_of
from ddgan_jax.data.sketch import difference, sketch_of
from ddgan_jax.data.sources import Data, open_data
from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import UserError
from ddgan_jax.metrics.evaluator import EvaluationResult, Evaluator, Results, measure, open_evaluator
from ddgan_jax.metrics.features import open_real_images
from ddgan_jax.model.loading import config_of, default_output, file_of, load
from ddgan_jax.model.model import Model
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.log import as_json
from ddgan_jax.storage.paths import Path

# The paper's results by preset, printed beside those of at least PAPER_SAMPLES, since FID depends on their number. The
# paper's recall is of other weights of VGG16.
PAPER = {
    "cifar10": {"fid": 3.75, "inception_score": 9.63, "recall": 0.57},
    "celeba_hq_256": {"fid": 7.64, "recall": 0.36},
    "lsun_church_256": {"fid": 5.25, "recall": 0.36},
    "stacked_mnist": {"modes": 1_000, "kl": 0.071},
}
PAPER_SAMPLES = 25_000


@listed_once()
def evaluate(config: Any, path: str, samples: str = "", out: str = "", num_samples: int = 0, seed: int = 0) -> Results:
    """Evaluate the checkpoint or workdir `path`, or the `samples` of a file or folder, against `config.data`.

    Without a `config`, that of the training of `path` is used, also for `samples`. `num_samples` 0 stands for
    `config.eval.num_samples`, or for all `samples`. Writes results.json and figures into the folder `out`; the default
    is WORKDIR/evaluation/STEP, with -seed-N for another `seed` than 0, or a folder beside the file of a model or of
    samples. Returns the results; {} in all processes except the first, which alone evaluates `samples`.

    Raises UserError where `config` is of other data than the checkpoint, or where a checkpoint's own configuration
    would run a Python function of `eval.features`.
    """
    path, samples, out = map(os.fspath, (path, samples, out))
    if samples and processes.num_processes() > 1:
        return processes.run_on_primary(lambda: evaluate(config, path, samples, out, num_samples, seed)) or {}
    start, explicit = time.time(), None if config is None else read(config)
    timing: Results = {}
    if samples:
        if not (explicit or path):
            raise UserError(f"name the real images that {samples} is compared with: config=presets.get('cifar10')")
        c = explicit or _trusted(config_of(path), path)
        folder, workdir = f"{samples.rstrip('/')}.evaluation", ""
        chunks, count, labels, about = file_samples(samples, num_samples)
        data = _open_data(c, count, seed)
    else:
        found, workdir, folder = _find(path, seed)
        model = load(found, explicit)
        c = processes.run_on_all(lambda: _match_data(explicit or _trusted(model.config, path), model.config, path))
        count = num_samples or c.eval.num_samples
        data = _open_data(c, count, seed)
        sampler = Sampler(model.denoiser, c.sample.batch_size)
        chunks, count, labels, about = model_samples(model, sampler, data, count, seed)
        about = {"checkpoint": found} | about
        if other := processes.broadcast_from_primary(lambda: _other_data(c, model, data)):
            about |= {"trained_on_other_data": other}
    if data:
        about |= {"data_fingerprint": data.fingerprint}
    target = paths.path(out or processes.broadcast_from_primary(lambda: without_other_results(folder, c, count, data)))
    processes.run_on_all(lambda: _check_target(target, samples))
    evaluator = open_evaluator(c, data, count)
    if evaluator.data.images.shape[-1] == 1:
        chunks = as_grey(chunks)
    result = measure(evaluator, chunks, count, "reading" if samples else "sampling", labels, nearest=True)
    if not samples:
        batch = min(count, 100, c.sample.batch_size * jax.device_count())
        timing = {"sampling": time_sampling(sampler, model.params, seed, batch, model.num_steps)}

    def write() -> Results:
        assert result  # process 0 has the measures
        results = about | {"features": c.eval.features} | evaluator.about | result.results | timing
        results["seconds"] = round(time.time() - start, 1)
        if paths.exists(target / "results.json"):  # figures of an earlier evaluation
            for name in ("curves.png", "modes.png", "manifold.png", "neighbours.png"):
                (target / name).unlink(missing_ok=True)
        paths.write(target / "results.json", as_json(results, indent=2) + "\n")
        papers = papers_results(c)
        compared = papers if count >= PAPER_SAMPLES else {}
        for name, value in results.items():
            print(f"  {name:<46} {_readable(value)}" + (f"   (paper: {compared[name]})" if name in compared else ""))
        if papers and not compared:
            print(
                f"note: the paper's results are shown beside those of at least {PAPER_SAMPLES:,} samples, not {count:,}"
            )
        print(f"written to {target / 'results.json'} (docs/evaluation.md explains them); drawing figures", flush=True)
        draw_figures(evaluator, result, target, workdir)
        print(f"figures are in {target}", flush=True)
        return results

    return processes.run_on_primary(write) or {}


def _find(path: str, seed: int) -> tuple[str, str, str]:
    """The model file or the one checkpoint that `path` names, its workdir or '', and the default folder of results.

    The checkpoint is looked up once: a training that is running may add and remove others meanwhile.
    """
    suffix = f"-seed-{seed}" if seed else ""
    if file_of(path):
        return path, "", default_output(path, f"evaluation{suffix}")
    found = paths.path(processes.broadcast_from_primary(lambda: str(checkpoint.absolute(checkpoint.find(path)))))
    workdir = found.parent.parent if found.parent.name == "checkpoints" else paths.path(path)
    return str(found), str(workdir), str(workdir / "evaluation" / f"{found.name}{suffix}")


def without_other_results(folder: str, c: Config, count: int, data: Data | None = None) -> str:
    """`folder`, or the first of folder-2, folder-3, ... that does not hold the results of another evaluation."""
    for number in itertools.count(1):
        found = folder if number == 1 else f"{folder}-{number}"
        file = paths.path(found) / "results.json"
        if not paths.exists(file) or _is_of(file, c, count, data):
            return found
    raise AssertionError("unreachable")


def _is_of(file: Path, c: Config, count: int, data: Data | None) -> bool:
    """Whether a results.json is of `count` samples, measured and compared as `c` says, with `data` if it is given."""
    ours = {"num_samples": count, "features": c.eval.features, "data": f"{c.data.name} {c.data.split}"}
    ours |= {"data_fingerprint": data.fingerprint} if data else {}
    try:
        theirs = json.loads(paths.read(file))
    except ValueError:  # of a file that is not JSON: it is not of this evaluation
        return False
    same = isinstance(theirs, dict) and theirs.get("reference_statistics") == c.eval.reference_statistics
    return same and all(theirs.get(name, value) == value for name, value in ours.items())


def _trusted(c: Config, path: str) -> Config:
    """The configuration of a checkpoint or file.

    Raises UserError if its evaluation would run a Python function, or needs a path, which files do not contain.
    """
    if ":" in (code := c.eval.features):
        raise UserError(
            f"the configuration in {path} names the Python function {code}, and a checkpoint cannot run code: "
            f"add --config=NAME of the training and --config.eval.features={code}"
        )
    if file_of(path) and c.data.name == "image_folder" and not c.data.path:
        raise UserError(
            f"{path} was trained on a folder of images, whose path a file does not contain: add --config=NAME of the "
            "training and --config.data.path=FOLDER"
        )
    return c


def _match_data(c: Config, trained: Config, path: str) -> Config:
    """`c` with the image size of the checkpoint's training. UserError unless both are of the same data."""
    ours, theirs = c.data, trained.data
    sizes = ((ours.image_size, theirs.image_size), (ours.channels, theirs.channels))
    if ours.name != theirs.name or any(mine not in (None, other) for mine, other in sizes):
        sets = (f"{data.name} {data.image_size} px, {data.channels} channels" for data in (theirs, ours))
        raise UserError(
            "the checkpoint in {} is of {}, but --config is of {}: name the --config of its training".format(
                path, *sets
            )
        )
    return replace(c, data=replace(ours, image_size=theirs.image_size, channels=theirs.channels))


def _other_data(c: Config, model: Model, data: Data | None) -> str:
    """How the data differs from that of the training of a model, though its configuration is the same; or ''.

    A model that was trained on an array has the configuration of a preset. Prints a note if the data differs.
    """
    if not model.trained_on or replace(c.data, path=None, dir=None) != replace(model.config.data, path=None, dir=None):
        return ""
    found = difference(model.trained_on, sketch_of(data or open_data(c.data)))
    if found:
        print(f"note: the model was not trained on this data, with which it is compared: {found}", flush=True)
    return found


def _check_target(folder: Path, samples: str) -> None:
    """Raises UserError if the folder of the results is a workdir, which has a results.json, or that of the samples."""
    if samples and checkpoint.absolute(folder).is_relative_to(checkpoint.absolute(paths.path(samples))):
        raise UserError(f"--out={folder} is in the folder of the samples, and figures are no samples: name another")
    if paths.exists(folder / "metrics.jsonl"):
        raise UserError(f"--out={folder} is the workdir of a run, whose results.json stays: name another folder")


def _open_data(c: Config, count: int, seed: int) -> Data | None:
    """The real images; None for points. UserError unless all processes have the same data, settings and flags."""
    data = None if c.eval.features == "points" else open_real_images(c)
    if processes.num_processes() > 1:
        processes.assert_equal_across_processes(facts(c, data) | {"--num_samples": count, "--sample_seed": seed})
    return data


def papers_results(c: Config) -> dict[str, float]:
    """The paper's results by measure, if `c` has the data and the features of one of its presets; else {}."""
    of = lambda c: (c.data.name, c.data.split, c.data.image_size, c.eval.features)  # noqa: E731
    return next((results for name, results in PAPER.items() if of(read(presets.get(name))) == of(c)), {})


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def model_samples(model: Model, sampler: Sampler, data: Data | None, count: int, seed: int) -> Samples:
    """Samples 0..count-1 of `seed`; of a class-conditional model, with classes as frequent as in `data`.

    Raises UserError if the data has other classes than the model.
    """
    labels = None
    if data:
        check_classes(model, data)
        labels = match_label_frequencies(labels_of(data, model.num_classes, model.config.data.name), count)
    return sampler.chunks(model.params, seed, count, labels), count, labels, {"step": model.step, "seed": seed}


def time_sampling(draw: Sampler, params: Any, seed: int, batch: int, num_steps: int) -> Results:
    """Seconds for 100 samples: the median of 5 batches, after one that is not counted.

    A batch takes the noise, `num_steps` network calls, and the transfer of the images to the host; the weights are on
    the devices before.
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


def draw_figures(evaluator: Evaluator, result: EvaluationResult, folder: Path, workdir: str) -> None:
    """Draw the samples, curves, modes, manifolds, and the samples beside their nearest training images."""
    figures.save_image(folder / "samples.png", figures.as_image(result.samples[: 64 if evaluator.networks else None]))
    if workdir and paths.exists(metrics := paths.path(workdir) / "metrics.jsonl"):
        figures.curves(metrics, folder / "curves.png")
    if result.histogram is not None:
        names = evaluator.data.classes if evaluator.networks else ()
        figures.histogram(result.histogram, folder / "modes.png", grid=not evaluator.networks, names=names)
    if found := result.manifolds:
        real = evaluator.real[-1].features[evaluator.manifold_indices]
        fake = result.features[-1].features
        fake = fake[evaluator.compared(len(fake))]
        figures.manifolds(real, fake, found.recalled, found.balls > 0, folder / "manifold.png")
    if result.neighbours is not None:
        index, distance = result.neighbours
        closest = np.argsort(distance, kind="stable")[:8]
        chosen = np.concatenate([closest, np.arange(len(closest))])
        near = evaluator.data.images[evaluator.reference[index[chosen]]]
        figures.neighbours(result.samples[chosen], near, distance[chosen], folder / "neighbours.png")
