"""Reading a dataclass from nested dicts: every field is checked against its type, and against the others."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from ddgan_jax.config.types import MAX_FLOAT
from ddgan_jax.errors import UserError

TEXTS = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


def from_dict(cls: Any, given: Any, prefix: str = "") -> Any:
    """An instance of the dataclass `cls`, whose fields may be dataclasses; missing fields have their defaults.

    Raises UserError for unknown fields and invalid values, which it names as `prefix` + field.
    """
    if not isinstance(given, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the configuration'} is {given!r}, and must be a group of settings")
    groups = {f.name: f.type for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)}
    read = {name: from_dict(groups[name], value, f"{prefix}{name}.") for name, value in given.items() if name in groups}
    rest = {name: value for name, value in given.items() if name not in groups}
    return cls(**read, **checked_fields(cls, rest, prefix))


def checked_fields(cls: type, given: Mapping[str, Any], prefix: str, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """The values in `given`, checked as fields of the dataclass `cls`; those in `exclude` count as unknown.

    Raises UserError that names the field as `prefix` + its name and says what it must be.
    """
    annotations = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls) if f.name not in exclude]
    group = prefix.rstrip(".") or "the configuration"
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"{group} has {', '.join(known)}"
            raise UserError(f"there is no setting {prefix}{name}: {hint}")
    return {name: checked(value, annotations[name], prefix + name) for name, value in given.items()}


def checked(value: Any, annotation: Any, name: str, or_none: str = "") -> Any:
    """The value of the field `name`, with integers converted to floats for float fields.

    0 and '' mean None for an optional field, unless they are values in its range. Raises UserError for a value that
    does not fit the annotation; `or_none` is appended to what the message says would fit.
    """
    if (inner := optional(annotation)) is not None:
        zero = value == 0 and value is not False
        if value is None or value == "" or (zero and not _in_range(inner, value)):
            return None
        return checked(value, inner, name, ", or None")
    ranges: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *rest = typing.get_args(annotation)
        ranges = tuple(rest)
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    if choices and value not in choices:
        raise UserError(f"{name}={value!r} is not supported: it is {', '.join(choices[:-1])} or {choices[-1]}")
    if annotation is float and type(value) is int:
        value = float(value)
    text = (ranges[0].text if ranges else TEXTS.get(annotation, "a list")) + or_none
    if typing.get_origin(annotation) is Mapping and not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}, and must be a group of settings")
    is_list = typing.get_origin(annotation) is Sequence
    fits = isinstance(value, tuple) if is_list else annotation not in TEXTS or type(value) is annotation
    if not fits:
        raise UserError(f"{name}={value!r:.100} must be {text}")
    if isinstance(value, float) and not abs(value) <= MAX_FLOAT:
        raise UserError(f"{name}={value!r} must be {text}, and at most {MAX_FLOAT:.1e} in size")
    for allowed in reversed(ranges):  # the narrowest one first
        if not allowed.holds(value):
            raise UserError(f"{name}={value!r} must be {allowed.text}{or_none}")
    return value


def _in_range(annotation: Any, value: Any) -> bool:
    """Whether the annotation has ranges and the value is in all of them."""
    ranges = typing.get_args(annotation)[1:]
    return bool(ranges) and all(allowed.holds(value) for allowed in ranges)


def optional(annotation: Any) -> Any:
    """The type X of an annotation `X | None`; None for any other annotation."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return None
    (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    return inner


def to_plain(value: Any, name: str = "") -> Any:
    """A ConfigDict or JSON value with plain types: dicts, tuples, and Python's numbers for NumPy's.

    References are replaced by their values. Raises UserError, which names the field, for one without a value.
    """
    if hasattr(value, "has_cycle"):  # an ml_collections.FieldReference, recognized without importing that package
        try:
            value = value.get()
        except Exception as error:  # whatever the operations of the reference raise
            raise UserError(f"{name} has no value ({error}): set --config.{name}=VALUE") from error
    if hasattr(value, "items"):
        items = value.items(preserve_field_references=True) if hasattr(value, "get_ref") else value.items()
        return {key: to_plain(item, f"{name}.{key}".lstrip(".")) for key, item in items}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(to_plain(item, name) for item in value)
    huge = type(value) is int and value.bit_length() > 1_000  # no float is that large, and Python refuses to print it
    return math.copysign(math.inf, value > 0 or -1) if huge else value


def to_lists(value: Any) -> Any:
    """Nested dicts with tuples replaced by lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: to_lists(item) for key, item in value.items()}
    return [to_lists(item) for item in value] if isinstance(value, list | tuple) else value


def check_together(c: Any) -> None:
    """Raises UserError for settings of a Config that exclude each other."""
    points = c.model.network == "mlp"
    if c.data.scale != 1 and not points:
        raise UserError(f"data.scale={c.data.scale} is for points: images are in [-1, 1], leave it at 1.0")
    if points and c.data.flip:
        raise UserError("data.flip=True mirrors images, and points are none: set it to False")
    if points and c.model.num_classes:
        raise UserError(f"model.num_classes={c.model.num_classes}: networks for points are unconditional, set it to 0")
    if points and c.model.patch_size > 1:
        raise UserError(f"model.patch_size={c.model.patch_size}: points have no pixels to make patches of, set it to 1")
    if points and c.diffusion.beta_max is None:
        raise UserError("diffusion.beta_max=None is chosen for an image size, and points have none: give a number")
    if c.loss.reconstruction_end and not c.loss.reconstruction:
        raise UserError(
            f"loss.reconstruction_end={c.loss.reconstruction_end} is the final value of loss.reconstruction, which is "
            "0: set that above 0, or this to None"
        )
    if c.diffusion.predicts != "x_0":
        _check_ablation(c)
    for name, off in {"discriminator_input": "x_t", "reconstruction": 0, "reconstruction_end": None}.items():
        if getattr(c.loss, name) != off and c.objective != "adversarial":
            raise UserError(f"loss.{name} is for objective='adversarial', not {c.objective!r}: set it to {off!r}")


def _check_ablation(c: Any) -> None:
    """Raises UserError for settings that exclude a generator of x_t or of noise."""
    given = f"diffusion.predicts={c.diffusion.predicts!r}"
    if c.objective == "one_shot":
        raise UserError(f"{given} is for objective='adversarial', not 'one_shot': set it to 'x_0'")
    if c.generator.get("tanh"):
        raise UserError(f"{given} needs outputs without bounds: leave generator.tanh out, or set it to False")
    if c.diffusion.predicts == "noise":
        return
    if c.objective == "gaussian":
        raise UserError(f"{given} is for objective='adversarial', not 'gaussian': set it to 'x_0' or 'noise'")
    if c.loss.discriminator_input == "x_0" or c.loss.reconstruction:
        raise UserError(
            f"{given} leaves no prediction of x_0: set loss.discriminator_input to 'x_t', loss.reconstruction to 0, "
            "and loss.reconstruction_end to None"
        )
