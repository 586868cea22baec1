"""Training and evaluation from Python, on the arrays, files and labels that a program has."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ddgan_jax.commands import train as training
from ddgan_jax.commands.checks import check_classes
from ddgan_jax.config import presets
from ddgan_jax.config.settings import Config, as_dict, read
from ddgan_jax.data.arrays import Range, are_names, as_data, as_names
from ddgan_jax.data.batches import match_label_frequencies
from ddgan_jax.data.resolve import labels_of
from ddgan_jax.data.sources import IN_PYTHON, Data, inspect
from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics.evaluator import Results, measure, open_evaluator
from ddgan_jax.metrics.features import open_real_images
from ddgan_jax.model.checks import as_integer, as_seed
from ddgan_jax.model.classes import LISTED
from ddgan_jax.model.loading import load
from ddgan_jax.model.model import MAX_INDEX, Model


@contextlib.contextmanager
def _errors_of_python() -> Iterator[None]:
    """A context whose errors name arguments, which a program passes, and not flags."""
    try:
        yield
    except (UserError, Fault) as error:
        raise type(error)(presets.as_arguments(str(error))) from error


@_errors_of_python()
def train(
    images: Any = None,
    labels: Any = None,
    *former: Any,
    workdir: str | os.PathLike = "",
    preset: Any = None,
    classes: Sequence[str] = (),
    value_range: Range | None = None,
    image_size: int | None = None,
    restart: bool = False,
    **fields: Any,
) -> Model:
    """Trains a model, or resumes its training, and returns it.

    Args:
        images: Images or points in one of the forms of `data.arrays.as_data`; the folder, zip or LMDB that a text
            names; or None for the dataset of `preset`.
        labels: Classes of the images, which make the model class-conditional: integers or names.
        *former: Nothing: a former version took (config, workdir, data), for which an error names the present form.
        workdir: Folder of the run. The same call again continues an interrupted training there.
        preset: Name of a configuration, such as "image_folder:small", or a configuration. By default it is chosen for
            the images and the device, and printed; without images it is "mnist".
        classes: Names of the classes by index, for `labels` only.
        value_range: The numbers that stand for black and white, for images that are not uint8, such as (0, 1).
        image_size: Side in pixels to which images are cropped and resized.
        restart: Whether an earlier run in `workdir` is moved aside.
        **fields: Fields of the configuration, with two underscores for the dot: `train__num_steps=5_000`. With images
            in memory, `eval__at_end` has no effect: call `evaluate`.

    Returns:
        The model of the last checkpoint; `load(f"{workdir}/best")` is that of the best one, if the training evaluates.

    Raises:
        UserError: the images, labels or fields are invalid, or do not fit together; nothing is written then.
        Fault: a disk or a device failed, or a loss is not finite.
        Interrupted: Ctrl-C or SIGTERM, with the step saved; the same call continues. It is not an `Exception`.
    """
    if isinstance(labels, str | os.PathLike):
        raise UserError(
            f"train(config, workdir, data) is now train(data, preset=config, workdir={os.fspath(labels)!r}), or "
            "ddgan_jax.commands.train.train(config, workdir, data), which returns the state"
        )
    if former or not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
        raise UserError("name the folder of the run, and other arguments: train(images, labels, workdir='runs/mine')")
    data, shape, with_classes = None, None, labels is not None or bool(as_names(classes))
    is_path = isinstance(images, str | os.PathLike)
    if value_range is not None and (images is None or is_path or isinstance(images, Data)):
        raise UserError(f"value_range={value_range} is for arrays: leave it out")
    if image_size and (images is None or is_path):
        fields = {"data__image_size": image_size} | fields
    if is_path:
        if with_classes:
            raise UserError(
                "the classes of a folder are its subfolders: leave labels and classes out, and set model__num_classes"
            )
        fields = {"data__path": os.fspath(images)} | fields
    elif images is not None:
        for name in sorted({field.replace("__", ".") for field in fields} & {"data.name", "data.path", "data.split"}):
            raise UserError(f"{name} names other images than those that are passed: leave out one of the two")
        data = as_data(images, labels, classes, value_range, image_size)
        shape = tuple(data.images.shape[1:])
        if image_size and len(shape) == 1:
            raise UserError(f"image_size={image_size} is for images, and these are points: leave it out")
    elif with_classes:
        raise UserError("labels and classes are those of images: pass images too, or leave them out")
    if preset is None and images is not None:
        preset = _default_preset(shape, fields)
        say(f"configuration: preset={preset!r}")
    config = as_dict(presets.get(preset or presets.DEFAULT) if isinstance(preset or "", str) else preset)
    if data is not None:
        config = _for_data(config, data, conditional=labels is not None)
    training.train(_with_fields(config, fields), os.fspath(workdir), data, restart, refuse_other_data=True)
    return load(workdir)


def _default_preset(shape: tuple[int, ...] | None, fields: dict[str, Any]) -> str:
    """The configuration for examples of a shape, None for the folder of images in `fields`, on the present device."""
    if shape is not None and len(shape) == 1:
        return "gaussians"
    if jax.devices()[0].platform == "cpu":
        return "image_folder:small" if shape is None or shape[0] >= 16 else "digits"
    side = shape[0] if shape else inspect(_with_fields(as_dict(presets.get("image_folder")), fields).data).shape[0]
    return "image_folder:large" if side >= 128 else "image_folder"


def _for_data(config: dict[str, Any], data: Data, conditional: bool) -> dict[str, Any]:
    """A configuration for examples that a program has."""
    shape = data.images.shape[1:]
    size = {"image_size": shape[0], "channels": shape[2]} if len(shape) == 3 else {"channels": shape[0]}
    config |= {"data": config["data"] | {"name": IN_PYTHON, "path": None, "split": "train", **size}}
    if conditional:
        config |= {"model": config["model"] | {"num_classes": len(data.classes)}}
    if len(shape) == 1:
        config |= {"model": config["model"] | {"data_std": float(data.images.std())}}
    evaluates = config["eval"]["features"] != "points" and (data.labels or config["eval"]["features"] != "classifier")
    if not evaluates:
        config |= {"eval": config["eval"] | {"every": 0}}
    return config


def _with_fields(config: dict[str, Any], fields: dict[str, Any]) -> Config:
    """A configuration with other fields: {"train__lr_g": 1e-4}. Raises UserError for unknown or invalid ones."""
    for name, value in fields.items():
        group, *rest = name.replace("__", ".").split(".")
        if rest and not isinstance(config.get(group), dict):
            raise UserError(f"there is no setting {group}.{'.'.join(rest)}: its group is one of {', '.join(config)}")
        config = config | {group: config[group] | {".".join(rest): value} if rest else value}
    return read(config)


@_errors_of_python()
def evaluate(
    samples: Any,
    real: Any = None,
    labels: Any = None,
    *,
    num_samples: int = 0,
    seed: int = 0,
    value_range: Range | None = None,
    image_size: int | None = None,
    **fields: Any,
) -> Results:
    """Measures samples against real images: distances, precision, recall, density, coverage and modes.

    Args:
        samples: A `Model`, which generates them, or images in one of the forms of `data.arrays.as_data`.
        real: The real images, in one of these forms; None for the dataset of the model's training.
        labels: Classes of the real images, which `eval__features="classifier"` needs: integers, or names of a
            class-conditional model's `classes`.
        num_samples: Number of samples that a model generates; 0 stands for its `config.eval.num_samples`.
        seed: Seed of a model's samples.
        value_range: The numbers that stand for black and white in arrays that are not uint8.
        image_size: Side in pixels to which the images are cropped and resized; by default that of the model.
        **fields: Fields of the configuration, such as `eval__features="inception"`. The default features are those of
            the model's configuration; for two sets of images "classifier", which needs `labels`.

    Returns:
        The measures by name (docs/evaluation.md), such as `classifier_frechet`, `precision` and `recall`, and what they
        were measured with, such as `features` and `num_samples`.

    Raises:
        UserError: an argument is invalid, the images or classes do not compare, or weights or labels are missing.
        Fault: a disk or a device failed.
    """
    model = samples if isinstance(samples, Model) else None
    seed, num_samples = as_seed(seed), as_integer("num_samples", num_samples, 0, MAX_INDEX + 1)
    if num_samples and not model:
        raise UserError(f"num_samples={num_samples} is for a model, which generates them: pass as many images instead")
    config = as_dict(model.config if model else presets.get("digits"))
    shape = model.denoiser.image_shape if model else ()
    size = image_size or (shape[0] if len(shape) == 3 else None)
    data = None
    if real is not None:
        data = _real_images(model, real, labels, value_range, size)
        config = _for_data(config, data, conditional=False)
    elif not model:
        raise UserError("samples need real images to be compared with: evaluate(samples, real)")
    elif labels is not None:
        raise UserError("labels are those of real images: pass both, evaluate(model, real, labels), or neither")
    c = _with_fields(config, fields)
    data = data or (None if c.eval.features == "points" else open_real_images(c))
    if model:
        count = num_samples or c.eval.num_samples
        chosen = _sample_labels(model, data, c.data.name, count)
        chunks: Any = model.sampler().chunks(model.params, seed, count, chosen)
    else:
        images = as_data(samples, None, (), value_range, size).images
        count, chosen = len(images), None
        chunks = (images[i : i + 256] for i in range(0, count, 256))
    evaluator = open_evaluator(c, data, count)
    result = measure(evaluator, chunks, count, "sampling" if model else "reading", chosen, nearest=True)
    found = {"features": c.eval.features} | evaluator.about | (result.results if result else {})
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}


def _real_images(model: Model | None, real: Any, labels: Any, value_range: Range | None, size: int | None) -> Data:
    """The real images of an evaluation. Labels that are names get the indices of the classes of the model."""
    names = model.classes if model and are_names(labels) else ()
    if model and labels is not None and not names and not all(map(str.isdecimal, model.classes)):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(model.classes[:LISTED]))
        say(f"note: labels that are integers are indices of the model's classes: {listed}")
    data = as_data(real, labels, names, value_range, size)
    if len(data.images.shape) == 2:
        raise UserError(
            f"the real data are points {list(data.images.shape)}, and points are compared with the 25 Gaussians "
            "alone: evaluate(model) of a model of data.name=gaussians"
        )
    return data


def _sample_labels(model: Model, data: Data | None, name: str, count: int) -> np.ndarray | None:
    """Classes of a model's samples: as frequent as in dataset `name`, or equally frequent if that has no labels."""
    if not (data and data.labels and model.num_classes):
        return model.labels(None, count)
    check_classes(model, data)
    return match_label_frequencies(labels_of(data, model.num_classes, name), count)
