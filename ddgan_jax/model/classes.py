"""The classes of a model: their names, and labels by name or by index."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError
from ddgan_jax.model.checks import as_array
from ddgan_jax.model.sampler import default_labels

LISTED = 20  # names in an error message


def names_of(given: Any, num_classes: int) -> tuple[str, ...]:
    """The names of `num_classes` classes: those `given`, or '0', '1', ... unless these are that many strings."""
    known = isinstance(given, (list, tuple)) and len(given) == num_classes and all(isinstance(n, str) for n in given)
    return tuple(given if known else map(str, range(num_classes)))


def read_names(about: dict[str, str]) -> list[Any] | None:
    """Removes the names of the classes from the metadata of a file and returns them; None if there are none.

    Text that is no JSON list stays: earlier versions allowed any text by this name.
    """
    try:
        found = json.loads(about.get("classes", ""))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and about.pop("classes") else None


def parse_label(text: str, classes: Sequence[str]) -> int | str:
    """A class given as text: the index of the class with this name, else the text as an index, else the text."""
    if text in classes:
        return classes.index(text)
    return int(text) if re.fullmatch(r"-?[0-9]{1,10}", text) else text


def index_of(name: str, classes: Sequence[str]) -> int:
    """The index of a class by its name. Raises UserError with close matches, or the names, for an unknown one."""
    if name in classes:
        return classes.index(name)
    by_lower = {known.lower(): known for known in classes}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]
    listed = ", ".join(map(repr, close or classes[:LISTED])) + ", ..." * (not close and len(classes) > LISTED)
    raise UserError(
        f"label={name!r} is no class of this model: " + (f"did you mean {listed}?" if close else f"they are {listed}")
    )


def as_indices(label: Any, classes: Sequence[str]) -> np.ndarray:
    """A label, or several, as an array of integers: names become indices. Raises UserError for unknown names."""
    if isinstance(label, np.ndarray) and label.dtype.kind in "UTO":
        label = label.tolist()
    if isinstance(label, str):
        label = index_of(label, classes)
    elif isinstance(label, (list, tuple)):
        label = [index_of(entry, classes) if isinstance(entry, str) else entry for entry in label]
    return as_array("label", label)


def labels_of(label: Any, classes: Sequence[str], num: int, one: bool, first: int) -> np.ndarray | None:
    """Labels int32 [num] of the samples from index `first` on; None for an unconditional model, without `classes`.

    Without a `label` they alternate between all classes. Raises UserError for a `label` that is neither a class nor
    `num` of them, or if there is none although all samples must have `one` class.
    """
    if not classes:
        if label is not None:
            raise UserError(f"label={label}: this model is unconditional, it was trained with model.num_classes=0")
        return None
    last = len(classes) - 1
    if label is None:
        if one:
            raise UserError(f"these images are of one class: choose it, label=0 to {last}")
        return default_labels(len(classes), first + np.arange(num))
    labels = as_indices(label, classes)
    fits = labels.dtype.kind in "iu" and labels.shape in ((), (num,))
    if not fits or labels.min() < 0 or labels.max() > last:
        raise UserError(f"label={label} must be a class of this model, 0 to {last}, or {num} of them")
    return np.broadcast_to(labels, num).astype(np.int32)
