"""What G and D minimise. The paper's is `ddgan`; the others are for comparison, or wrap one of these three.

An objective is a frozen dataclass with

    pairs(c)                     -> Pairs: what D is shown, made of real x_0 and of G
    d_loss(c, pairs, with_r1)    -> (scalar, parts): of D, where the objective has one
    g_loss(c, pairs)             -> (scalar, parts): of G

`c` is the phase of a step that it is asked for, a Context. Parts are numbers for every example, [b], by the name of the
metric that their mean is. A new objective is a file here, a line in `build.OBJECTIVES`, and a test.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from flax import struct
from jax import Array

from ddgan_jax.method.diffusion import Schedule

Parts = dict[str, Array]
Gen = Callable[..., Array]  # (x_{t+1}, t, z) -> x0_hat, with its parameters bound
Disc = Callable[[Array, Array, Array], Array]  # (x_t, t, x_{t+1}) -> logits [b], with its parameters bound


class PhaseDraws(struct.PyTreeNode):
    """The random numbers of one phase (D's or G's) for b examples of shape d."""

    t: Array  # [b] int32, uniform over 0..T-1
    noise_t: Array  # [b, *d] goes into x_t
    noise_tp1: Array  # [b, *d] goes into x_{t+1}
    z: Array  # [b, nz]
    noise_posterior: Array  # [b, *d] goes into the fake x_t
    dropout_keys: Array | None = None  # [b], where the generator has dropout


class Pairs(NamedTuple):
    """What D is shown, [b, *d] each: a real and a fake x_t with the x_{t+1} of both; and what G made of it."""

    x_t: Array
    fake_x_t: Array
    x_tp1: Array
    x0_hat: Array


@dataclasses.dataclass(frozen=True)
class Context:
    """One phase of a step, for the b examples of a replica or of a part of its batch."""

    gen: Gen
    disc: Disc
    schedule: Schedule
    x0: Array  # [b, *d] in [-1, 1]
    draws: PhaseDraws
    step: Array  # [] int32, training steps done

    def generate(self, x_tp1: Array, t: Array, z: Array) -> Array:
        """x0_hat [b, *d], with this phase's dropout."""
        keys = () if self.draws.dropout_keys is None else (self.draws.dropout_keys,)
        return self.gen(x_tp1, t, z, *keys)


class Objective:
    """See above. What most objectives are is the default."""

    @property
    def trains_disc(self) -> bool:
        """Is there a D?"""
        return True

    @property
    def at_once(self) -> bool:
        """Does G make x_0 of pure noise, in one step?"""
        return False

    def pairs(self, c: Context) -> Pairs:
        """What D is shown."""
        raise NotImplementedError

    def d_loss(self, c: Context, pairs: Pairs, with_r1: bool) -> tuple[Array, Parts]:
        """Of D, with R1 where that is due."""
        raise NotImplementedError

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Array, Parts]:
        """Of G."""
        raise NotImplementedError


class Wrapped(Objective):
    """An objective that adds to `base`, and is otherwise as that is."""

    base: Objective

    @property
    def trains_disc(self) -> bool:
        return self.base.trains_disc

    @property
    def at_once(self) -> bool:
        return self.base.at_once

    def pairs(self, c: Context) -> Pairs:
        return self.base.pairs(c)

    def d_loss(self, c: Context, pairs: Pairs, with_r1: bool) -> tuple[Array, Parts]:
        return self.base.d_loss(c, pairs, with_r1)

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Array, Parts]:
        return self.base.g_loss(c, pairs)
