"""Settings that follow from the dataset: its size, and the batch size and number of steps for its number of images.

They are a pure function of the configuration and of facts about the dataset, so a resumed run finds the same numbers.
"""

import hashlib
import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ddgan_jax.config.settings import Config, as_dict, beta_max_for, flat
from ddgan_jax.data import sources
from ddgan_jax.errors import UserError
from ddgan_jax.networks.discriminator import STDDEV_GROUP

# The paper's training: 1,800 epochs of 50,000 images for CIFAR-10 at 32 px; at 256 px, 800 epochs of 27,000 images for
# CelebA-HQ and 500 epochs of 120,000 for LSUN Church.
EPOCHS, MAX_IMAGES = 1_800, 90_000_000
LARGE_SIZE, EPOCHS_LARGE, MAX_IMAGES_LARGE = 64, 800, 60_000_000  # for images above LARGE_SIZE px
# Five times the memory of the generator's moving average (ema_decay = 0.9999), after which it has forgotten the initial
# weights. With a few hundred images this means more epochs than in the paper.
MIN_STEPS = 50_000
# The paper's batches are 256 at 32 px and 32 to 64 at 256 px: the product of batch and size is about constant.
BATCH_TIMES_SIZE, MAX_BATCH = 8_192, 256
MIN_BATCH = 32  # the paper's smallest; with few images, MIN_STEPS alone would allow less
SAVES = 50  # the number of checkpoints and grids of samples in a run, unless their intervals are set
SAVE_INTERVALS = (500, 1_000, 2_500, 5_000)  # steps; each divides checkpoint.keep_period


def resolve_from_data(c: Config, data: sources.Data | None = None) -> tuple[Config, list[str]]:
    """Returns the configuration with every setting that follows from the dataset, and notes on what was chosen.

    The dataset is inspected, not decoded, so that invalid combinations are refused before the work begins. `data`
    replaces the dataset that `config.data` names. Raises UserError if the dataset is missing or does not fit.
    """
    if not needs_data(c):
        return c, []
    info = sources.inspect(c.data) if data is None else data.info
    if len(info.shape) == 3:
        size, channels = c.data.image_size or info.shape[0], c.data.channels or info.shape[2]
        c = replace(c, data=replace(c.data, image_size=size, channels=channels))
    return choose(c, info.num_examples, info.labelled, jax.device_count())


def needs_data(c: Config) -> bool:
    """Whether any setting depends on the dataset."""
    return not has_all_numbers(c) or bool(why_not_evaluated(c, labelled=False))


def has_all_numbers(c: Config) -> bool:
    """Whether no number is left to be chosen for the dataset."""
    train = c.train
    numbers = c.data.image_size, c.data.channels, train.num_steps, train.batch_size, train.steps_per_epoch
    return None not in (*numbers, c.diffusion.beta_max, c.checkpoint.every, c.log.samples_every)


def choose(c: Config, num_images: int, labelled: bool, devices: int) -> tuple[Config, list[str]]:
    """Returns the configuration with a value for each of these settings that is None, and notes on what was chosen.

    The settings are `train.num_steps`, `train.batch_size`, `train.steps_per_epoch`, `checkpoint.every`,
    `log.samples_every` and `diffusion.beta_max`. `c` already has the size of the images. Evaluation during training is
    switched off if the dataset has no labels that it needs, or channels that it cannot read.
    """
    size, count = c.data.image_size or 1, max(num_images, 1)
    batch = c.train.batch_size or batch_size(count, size, devices, c.train.accumulate)
    steps = c.train.num_steps or num_steps(count, size, batch)
    interval = max((n for n in SAVE_INTERVALS if n * SAVES <= steps), default=SAVE_INTERVALS[0])
    notes = []
    if names := [name for name in ("num_steps", "batch_size") if getattr(c.train, name) is None]:
        epochs = steps * batch / count
        flags = " and ".join(f"--config.train.{name}" for name in names)
        notes.append(
            f"{num_images:,} images: {f'{size} px, ' if size > 1 else ''}batch {batch}, "
            f"{steps:,} steps ({epochs:,.{0 if epochs >= 10 else 1}f} epochs), chosen for this number of "
            f"images; {flags} {'override them' if len(names) > 1 else 'overrides it'}"
        )
    per_epoch = c.train.steps_per_epoch or max(count // batch, 1)
    chosen = replace(
        c,
        train=replace(c.train, num_steps=steps, batch_size=batch, steps_per_epoch=per_epoch),
        diffusion=replace(c.diffusion, beta_max=c.diffusion.beta_max or beta_max_for(size)),
        checkpoint=replace(c.checkpoint, every=c.checkpoint.every or interval),
        log=replace(c.log, samples_every=interval if c.log.samples_every is None else c.log.samples_every),
    )
    if reason := why_not_evaluated(c, labelled):
        chosen = replace(chosen, eval=replace(c.eval, every=0, at_end=False))
        notes.append(f"no evaluation while training: {reason}")
    return chosen, notes


def total_images(num_images: int, image_size: int) -> int:
    """The number of images, with repetitions, in a run: as many epochs as in the paper, up to its total number."""
    large = image_size > LARGE_SIZE
    return min(num_images * (EPOCHS_LARGE if large else EPOCHS), MAX_IMAGES_LARGE if large else MAX_IMAGES)


def batch_size(num_images: int, image_size: int, devices: int, accumulate: int = 1) -> int:
    """The largest power of two that allows MIN_STEPS steps, or 32 if that is more.

    At most the paper's batch size and the number of images. Rounded to a multiple, at least one, of what `check_batch`
    requires.
    """
    enough = max(total_images(num_images, image_size) // MIN_STEPS, MIN_BATCH)
    papers = min(BATCH_TIMES_SIZE // max(image_size, 1), MAX_BATCH)
    largest = 2 ** int(math.log2(max(min(enough, papers, num_images), 1)))
    unit = devices * accumulate * STDDEV_GROUP if accumulate > 1 else math.lcm(STDDEV_GROUP, devices)
    return max(largest // unit, 1) * unit


def num_steps(num_images: int, image_size: int, batch: int) -> int:
    """The number of steps for `total_images`, at least MIN_STEPS."""
    return max(total_images(num_images, image_size) // batch, MIN_STEPS)


def check_batch(batch_size: int, accumulate: int = 1) -> int:
    """Returns the batch size per device.

    Raises UserError unless the global batch divides by the number of devices and into groups of four, which may span
    neighbouring devices, and each of the `accumulate` parts of a device's batch holds whole groups.
    """
    devices = jax.device_count()
    count = f"{devices} device{'s' * (devices > 1)}"
    if batch_size < devices:
        raise UserError(
            f"train.batch_size={batch_size} is smaller than the {count}: choose a multiple of "
            f"{math.lcm(devices, STDDEV_GROUP)}, or make at most {batch_size} devices visible"
        )
    per_device, rest = divmod(batch_size, devices)
    if rest or (batch_size > STDDEV_GROUP and batch_size % STDDEV_GROUP):
        raise UserError(
            f"train.batch_size={batch_size} does not divide by {count} and into groups of {STDDEV_GROUP} images, "
            f"which the discriminator compares: choose a multiple of {math.lcm(devices, STDDEV_GROUP)}"
        )
    if accumulate > 1 and per_device % (accumulate * STDDEV_GROUP):
        valid = [n for n in range(1, per_device + 1) if per_device % (n * STDDEV_GROUP) == 0] or [1]
        raise UserError(
            f"train.accumulate={accumulate} does not cut the {per_device} images of a device into equal parts of whole "
            f"groups of {STDDEV_GROUP}: choose {' or '.join(map(str, valid))}"
        )
    return per_device


def why_not_evaluated(c: Config, labelled: bool) -> str:
    """The reason why samples cannot be evaluated while training on this dataset, or ''."""
    name, channels = c.data.name, c.data.channels or 3
    if c.eval.features == "inception" and (c.eval.every or c.eval.at_end) and channels not in (1, 3):
        return f"eval.features=inception takes images with 1 or 3 channels, and those of {name} have {channels}"
    if not c.eval.every or c.eval.features != "classifier" or labelled or name.startswith("stacked_"):
        return ""  # StackedMNIST is evaluated with a classifier of its single digits
    return (
        f"eval.features=classifier learns the classes of the images, and {name} has none; put the images of each class "
        "into a folder of its own, or set eval.features=inception"
    )


def labels_of(data: sources.Data, num_classes: int, name: str) -> np.ndarray | None:
    """Returns the labels int32 [N] of dataset `name` for a model of `num_classes`, or None for 0 classes.

    Raises UserError unless the dataset has this number of classes.
    """
    if not num_classes:
        return None
    if data.labels is None:
        raise UserError(f"model.num_classes={num_classes}, but dataset {name} has no labels: set it to 0")
    if num_classes != len(data.classes):
        raise UserError(
            f"model.num_classes={num_classes}, but dataset {name} has {len(data.classes)} classes: set it to that"
        )
    return data.labels()


def facts(c: Config, data: sources.Data | None) -> dict[str, Any]:
    """Values that all processes of a run must share: the configuration, the dataset, the versions and the devices."""
    local = ("data.dir", "data.path")  # each host may have its copy elsewhere
    found = {f"config.{name}": value for name, value in flat(as_dict(c)).items() if name not in local}
    if data:
        found["the data"] = f"{len(data.images):,} examples, {data.fingerprint}"
    if data and data.labels and (c.model.num_classes or c.eval.features == "classifier"):
        found["the labels"] = hashlib.sha256(np.ascontiguousarray(data.labels()).tobytes()).hexdigest()[:16]
    return found | {"jax": jax.__version__, "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"}
