"""Checks before a training or an evaluation: the data is that of the run or the model, and the memory suffices."""

import math
import os
from typing import Any

import jax

from ddgan_jax.data.sketch import difference
from ddgan_jax.data.sources import Data
from ddgan_jax.devices.processes import say
from ddgan_jax.errors import UserError
from ddgan_jax.method.state import num_bytes
from ddgan_jax.method.train_step import Method
from ddgan_jax.model.model import Model
from ddgan_jax.storage.paths import Path


def check_data(before: dict[str, Any] | None, now: dict[str, Any], path: Path, refuse: bool) -> None:
    """Compares the sketch of the data with that of the checkpoint.

    Where they differ, raises UserError if `refuse`, else prints a note. Raises UserError if the classes differ: their
    numbers would stand for other classes than in the run so far.
    """
    classes = (before or {}).get("classes")
    if classes and now.get("classes", classes) != classes:
        raise UserError(
            f"--workdir={path} holds a run on the classes {', '.join(classes)}, and those of the data are "
            f"{', '.join(now['classes'])}: name another --workdir, or pass --restart"
        )
    found = difference(before, now)
    if found and refuse:
        raise UserError(
            f"--workdir={path} holds a run on other data ({found}): name another --workdir "
            f"(--config.train.init_from={path} starts it from the networks of this run), or pass --restart"
        )
    if found:
        say(f"note: the data is not that of the start of the run: {found}")


def check_classes(model: Model, data: Data) -> None:
    """Raises UserError if the model and the data name their classes, and the names or their order differ.

    The numbers of the model's classes would stand for other classes of the data. Names that are only numbers, such as
    those of integer labels, are not compared.
    """
    trained, found = tuple(model.classes), tuple(data.classes)
    named = all(any(not name.isdecimal() for name in names) for names in (trained, found))
    if named and data.labels and trained != found:
        raise UserError(
            f"the model was trained on the classes {', '.join(trained)}, and those of the data are "
            f"{', '.join(found)}: evaluate it on data of the same classes, in the same order"
        )


def check_memory(method: Method, shapes: Any) -> None:
    """Raises UserError if the state, or a batch, is larger than the memory of a device."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    memory = limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    batch = 4 * math.prod((method.batch_size // jax.device_count(), *method.denoiser.image_shape))
    widths = "generator.nf and discriminator.ngf, or width and depth"
    for size, what, lower in (
        (num_bytes(shapes), "the state of networks of this size", widths),
        (batch, f"a batch of {method.batch_size:,}", "train.batch_size"),
    ):
        if size > memory:
            raise UserError(
                f"{what} takes {size / 2**30:,.0f} GiB, of {memory / 2**30:,.0f} GiB of memory: lower {lower}"
            )
