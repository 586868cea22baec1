"""What a configuration leaves to the data: the batch and the number of steps for so many images of such a size.

A pure function of the settings and what is known of the data, so that a run that goes on finds the same numbers.
"""

import math
from dataclasses import replace

from ddgan_jax.config import Config
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


def leaves_open(c: Config) -> bool:
    """Is there anything that depends on the data? Else nobody needs to look at it."""
    train = c.train
    numbers = c.data.image_size, c.data.channels, train.num_steps, train.batch_size, train.steps_per_epoch
    more = c.diffusion.beta_max, c.checkpoint.every, c.log.samples_every
    return None in (*numbers, *more) or bool(why_not_judged(c, labelled=False))


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
        diffusion=replace(c.diffusion, beta_max=c.diffusion.beta_max or beta_max(size)),
        checkpoint=replace(c.checkpoint, every=c.checkpoint.every or often),
        log=replace(c.log, samples_every=often if c.log.samples_every is None else c.log.samples_every),
    )
    if why := why_not_judged(c, labelled):
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


def beta_max(image_size: int) -> float:
    """The noise that hides an image of this size, and no more: 6 at 8 px, 12 at 32 px, and the paper's 20 at 256 px.

    The mean of size^2 pixels is to be as well hidden at any size: size^2 abar_T = 1.8^2, and -ln abar_T is about half
    of this number.
    """
    return float(max(round(4 * math.log(image_size / 1.8)), 1))


def why_not_judged(c: Config, labelled: bool) -> str:
    """Why samples cannot be judged while training on this data, or ''."""
    name = c.data.name
    if not c.eval.every or c.eval.features != "classifier" or labelled or name.startswith("stacked_"):
        return ""  # StackedMNIST is judged by the digits that it is made of
    return (
        f"eval.features=classifier learns the classes of the images, and {name} has none; put the images of each class "
        "into a folder of its own, or set eval.features=inception"
    )


def expected_time(seconds_per_step: float, steps: int) -> str:
    """'about 3 h 20 min for 56,250 steps'."""
    minutes = round(seconds_per_step * steps / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        text = f"{days} d {hours} h"
    elif hours:
        text = f"{hours} h {minutes % 60} min"
    else:
        text = f"{max(minutes, 1)} min"
    return f"about {text} for {steps:,} steps"
