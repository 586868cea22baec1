"""What a configuration leaves to the data: the batch and the number of steps for so many images of such a size.

A pure function of the settings and what is known of the data, so that a run that goes on finds the same numbers.
"""

import dataclasses
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

# What the paper trains in all: CIFAR-10, 32 px, 1,800 epochs of 50,000 images; at 256 px CelebA-HQ, 800 epochs of
# 27,000, and LSUN Church, 500 epochs of 120,000.
EPOCHS, MOST_IMAGES = 1_800, 90_000_000
LARGE, EPOCHS_LARGE, MOST_IMAGES_LARGE = 64, 800, 60_000_000  # of images above LARGE px
# Five times what the moving average of the generator (ema_decay = 0.9999) remembers: it has forgotten the weights that
# it began with. A few hundred images are shown more often for it.
LEAST_STEPS = 50_000
# The paper's batches are 256 at 32 px and 32 to 64 at 256 px: their product with the size is about this.
BATCH_TIMES_SIZE, MOST_BATCH = 8_192, 256
LEAST_BATCH = 32  # for few images, which LEAST_STEPS alone would give a smaller one; the paper's smallest
SAVES = 50  # checkpoints and grids of samples in a run, where they are not named
SAVE_EVERY = (500, 1_000, 2_500, 5_000)  # steps between two; each divides checkpoint.keep_period


def needs_data(c: Config) -> bool:
    """Is there anything that depends on the data? Else nobody needs to look at it."""
    train = c.train
    numbers = c.data.image_size, c.data.channels, train.num_steps, train.batch_size, train.steps_per_epoch
    more = c.diffusion.beta_max, c.checkpoint.every, c.log.samples_every
    return None in (*numbers, *more) or bool(why_not_evaluated(c, labelled=False))


def choose(c: Config, num_images: int, labelled: bool, devices: int) -> tuple[Config, list[str]]:
    """The settings with everything chosen that they leave to the data, and what to say about it, a sentence each.

    `c` has the image size of the data. `train.num_steps`, `train.batch_size`, `train.steps_per_epoch`,
    `checkpoint.every`, `log.samples_every` and `diffusion.beta_max` are chosen where they are None. Evaluation while
    training is left out where the data has not what it needs.
    """
    size, count, said = c.data.image_size or 1, max(num_images, 1), []
    batch = c.train.batch_size or batch_size(count, size, devices, c.train.accumulate)
    steps = c.train.num_steps or num_steps(count, size, batch)
    often = max((n for n in SAVE_EVERY if n * SAVES <= steps), default=SAVE_EVERY[0])
    if names := [name for name in ("num_steps", "batch_size") if getattr(c.train, name) is None]:
        epochs = steps * batch / count
        flags = " and ".join(f"--config.train.{name}" for name in names)
        said.append(
            f"{num_images:,} images: {f'{size} px, ' if size > 1 else ''}batch {batch}, "
            f"{steps:,} steps ({epochs:,.{0 if epochs >= 10 else 1}f} epochs), chosen for this number of "
            f"images; {flags} name{'s' * (len(names) == 1)} {'another' if len(names) == 1 else 'others'}"
        )
    chosen = replace(
        c,
        train=replace(
            c.train,
            num_steps=steps,
            batch_size=batch,
            steps_per_epoch=c.train.steps_per_epoch or max(count // batch, 1),
        ),
        diffusion=replace(c.diffusion, beta_max=c.diffusion.beta_max or beta_max_for(size)),
        checkpoint=replace(c.checkpoint, every=c.checkpoint.every or often),
        log=replace(c.log, samples_every=often if c.log.samples_every is None else c.log.samples_every),
    )
    if why := why_not_evaluated(c, labelled):
        chosen = replace(chosen, eval=replace(c.eval, every=0))
        said.append(f"no evaluation while training: {why}")
    return chosen, said


def images_in_all(num_images: int, image_size: int) -> int:
    """As many epochs as the paper's, and no more images than it shows."""
    large = image_size > LARGE
    return min(num_images * (EPOCHS_LARGE if large else EPOCHS), MOST_IMAGES_LARGE if large else MOST_IMAGES)


def batch_size(num_images: int, image_size: int, devices: int, accumulate: int = 1) -> int:
    """The largest power of two that leaves LEAST_STEPS, but at least 32; at most the paper's, and no more than there
    are images. A multiple of what `build.check_batch` asks for, so at least that."""
    enough = max(images_in_all(num_images, image_size) // LEAST_STEPS, LEAST_BATCH)
    papers = min(BATCH_TIMES_SIZE // max(image_size, 1), MOST_BATCH)
    largest = 2 ** int(math.log2(max(min(enough, papers, num_images), 1)))
    unit = devices * accumulate * STDDEV_GROUP if accumulate > 1 else math.lcm(STDDEV_GROUP, devices)
    return max(largest // unit, 1) * unit


def num_steps(num_images: int, image_size: int, batch: int) -> int:
    """The steps that show `images_in_all`, and at least LEAST_STEPS."""
    return max(images_in_all(num_images, image_size) // batch, LEAST_STEPS)


def why_not_evaluated(c: Config, labelled: bool) -> str:
    """Why samples cannot be judged while training on this data, or ''."""
    name = c.data.name
    if not c.eval.every or c.eval.features != "classifier" or labelled or name.startswith("stacked_"):
        return ""  # StackedMNIST is judged by the digits that it is made of
    return (
        f"eval.features=classifier learns the classes of the images, and {name} has none; put the images of each class "
        "into a folder of its own, or set eval.features=inception"
    )


def resolve_from_data(c: Config, data: sources.Data | None = None) -> tuple[Config, list[str]]:
    """The settings of a run with everything that they leave to the data, and what to say about it, a sentence each.

    The data is looked at, not decoded, so that `build` can refuse what does not go together before the work begins;
    `data` is used instead of what `config.data` names. UserError if the data is not there or does not fit.
    """
    if not needs_data(c):
        return c, []
    if data is None:
        seen = sources.look(c.data)
    else:
        seen = sources.Look(len(data.images), tuple(data.images.shape[1:]), data.labels is not None)
    if len(seen.shape) == 3:
        size, channels = c.data.image_size or seen.shape[0], c.data.channels or seen.shape[2]
        c = dataclasses.replace(c, data=dataclasses.replace(c.data, image_size=size, channels=channels))
    return choose(c, seen.num_examples, seen.labelled, jax.device_count())


def labels_of(data: sources.Data, num_classes: int, name: str) -> np.ndarray | None:
    """The labels [N] int32 of the set `name` for a model of `num_classes`, or None for 0.

    UserError unless it has so many classes.
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
    """Facts that must be equal in all processes of a job: the configuration, the data, the versions, the devices."""
    local = ("data.dir", "data.path")  # where a host has its copy
    found = {f"config.{name}": value for name, value in flat(as_dict(c)).items() if name not in local}
    if data:
        found["the data"] = f"{len(data.images):,} examples, {data.fingerprint}"
    if data and data.labels and (c.model.num_classes or c.eval.features == "classifier"):
        found["the labels"] = hashlib.sha256(np.ascontiguousarray(data.labels()).tobytes()).hexdigest()[:16]
    return found | {"jax": jax.__version__, "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"}


def check_batch(batch_size: int, accumulate: int = 1) -> int:
    """The batch of one device; UserError unless the global batch divides by the devices and into groups of four.

    A group may lie on neighbouring devices. Of the `accumulate` parts of a device's batch each must hold whole groups.
    """
    devices = jax.device_count()
    several = f"{devices} device{'s' * (devices > 1)}"
    if batch_size < devices:
        raise UserError(
            f"train.batch_size={batch_size} is smaller than the {several}: choose a multiple of "
            f"{math.lcm(devices, STDDEV_GROUP)}, or show the program no more than {batch_size} devices"
        )
    per_device, rest = divmod(batch_size, devices)
    if rest or (batch_size > STDDEV_GROUP and batch_size % STDDEV_GROUP):
        raise UserError(
            f"train.batch_size={batch_size} does not divide by {several} and into groups of {STDDEV_GROUP} images, "
            f"which the discriminator compares: choose a multiple of {math.lcm(devices, STDDEV_GROUP)}"
        )
    if accumulate > 1 and per_device % (accumulate * STDDEV_GROUP):
        most = [n for n in range(1, per_device + 1) if per_device % (n * STDDEV_GROUP) == 0]
        raise UserError(
            f"train.accumulate={accumulate} does not cut the {per_device} images of a device into equal parts of whole "
            f"groups of {STDDEV_GROUP}: choose {' or '.join(map(str, most)) if most else 1}"
        )
    return per_device
