"""Splits in the notation of tfds: 'train', 'train[:1000]', 'train[80%:]'."""

import re
from collections.abc import Mapping

from ddgan_jax.errors import UserError


def part_of(split: str, sizes: Mapping[str, int], of: str) -> tuple[str, slice]:
    """The split, of those that have `sizes`, and the slice that 'train', 'train[:1000]', 'train[80%:]', ... mean.

    They are in the language of tfds. `of` says whose splits they are, if this one is none: a UserError.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match or match[1] not in sizes:
        raise UserError(
            f"{of} has no split {split!r}: it is {' or '.join(map(repr, sizes))} or a part such as 'train[:90%]'"
        )
    size = sizes[match[1]]

    def index(text: str | None, default: int) -> int:
        if text is None:
            return default
        return round(int(text[:-1]) / 100 * size) if text.endswith("%") else int(text)

    part = slice(index(match[2], 0), index(match[3], size))
    check_part(split, size, part, of)
    return match[1], part


def check_part(split: str, size: int, part: slice, of: str) -> None:
    """UserError if a part of `size` examples is empty or reversed."""
    if not range(size)[part]:
        raise UserError(f"the split {split!r} holds none of the {size:,} examples of {of}: choose a larger part")
