"""Splits in the notation of tfds: 'train', 'train[:1000]', 'train[80%:]'."""

import re
from collections.abc import Mapping

from ddgan_jax.errors import UserError


def find(split: str, sizes: Mapping[str, int], owner: str) -> tuple[str, slice]:
    """Returns the name and the slice that `split` means, where `sizes` maps each name to its number of examples.

    Raises UserError, which names the `owner` of the splits, if there is no such split or the slice is empty.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match or match[1] not in sizes:
        raise UserError(
            f"{owner} has no split {split!r}: it is {' or '.join(map(repr, sizes))} or a part such as 'train[:90%]'"
        )
    size = sizes[match[1]]

    def index(text: str | None, default: int) -> int:
        if text is None:
            return default
        found = round(int(text[:-1]) / 100 * size) if text.endswith("%") else int(text)
        if found > size:
            raise UserError(
                f"the split {split!r} ends beyond the {size:,} examples of {owner}: choose a smaller part, or "
                f"data.split={match[1]} for all"
            )
        return found

    part = slice(index(match[2], 0), index(match[3], size))
    check_not_empty(split, size, part, owner)
    return match[1], part


def check_not_empty(split: str, size: int, part: slice, owner: str) -> None:
    """Raises UserError if a slice of `size` examples is empty or reversed."""
    if not range(size)[part]:
        raise UserError(f"the split {split!r} holds none of the {size:,} examples of {owner}: choose a larger part")
