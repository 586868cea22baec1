"""Types of the settings: the values that a number or a list may have, with the text of the error for others."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np


class Range(NamedTuple):
    """A condition on a value, and its description in an error message."""

    holds: Callable[[Any], bool]
    text: str


def at_most(largest: int) -> Range:
    """The range of integers up to `largest`."""
    return Range(lambda n: n <= largest, f"an integer of at most {largest}")


Positive = Annotated[int, Range(lambda n: n >= 1, "an integer of at least 1"), at_most(2**31 - 1)]
TwoOrMore = Annotated[int, Range(lambda n: n >= 2, "an integer of at least 2")]
Count = Annotated[int, Range(lambda n: n >= 0, "an integer of at least 0"), at_most(2**31 - 1)]
ImageSize = Annotated[Positive, at_most(4096)]  # px
Width = Annotated[Positive, at_most(16_384)]
Latents = Annotated[Count, at_most(16_384)]
Layers = Annotated[Count, at_most(1_000)]
Blocks = Annotated[Positive, at_most(1_000)]
Octaves = Annotated[Layers, at_most(31)]

PositiveFloat = Annotated[float, Range(lambda x: x > 0, "a number above 0")]
Scale = Annotated[float, Range(lambda x: 1e-9 <= x <= 1e9, "a number from 1e-9 to 1e9")]
Weight = Annotated[float, Range(lambda x: x >= 0, "a number of at least 0")]
Fraction = Annotated[float, Range(lambda x: 0 <= x <= 1, "a number from 0 to 1")]
Below1 = Annotated[float, Range(lambda x: 0 <= x < 1, "a number of at least 0 and below 1")]
MAX_FLOAT = float(np.finfo(np.float32).max)  # networks compute in float32

MAX_SEED = 2**32 - 1  # jax.random.key takes 32 bits
SEEDS = Range(lambda n: 0 <= n <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")

Positives = Annotated[
    Sequence[int], Range(lambda ns: all(type(n) is int and 1 <= n < 2**31 for n in ns), "integers of at least 1")
]


def _is_kernel(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) for value in values) and 0 < abs(sum(values)) < math.inf


# A filter is divided by the sum of its kernel.
Kernel = Annotated[Sequence[float], Range(_is_kernel, "numbers whose sum is not 0")]

_FEATURES = re.compile(r"inception|classifier|points|[^\W\d][\w.]*:[^\W\d][\w.]*")
FeatureNetwork = Annotated[
    str, Range(lambda name: bool(_FEATURES.fullmatch(name)), "inception, classifier, points, or module:function")
]
