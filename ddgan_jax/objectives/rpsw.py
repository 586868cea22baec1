"""G by sliced Wasserstein distances along random paths, in the place of the paper's loss. Not in the paper.

Nguyen, Zhang, Le and Ho, "Sliced Wasserstein with Random-Path Projecting Directions", ICML 2024. With X the rows
(x_t, l_real), Y the rows (fake x_t, l_fake), and X1, X2, Y1, Y2 the halves of the batch, an energy distance:

    L_G = SW(X1, Y1) + SW(X2, Y2) - SW(X1, X2) - SW(Y1, Y2)
    SW(X, Y) = E_theta[ W_2^2(theta X, theta Y) ],    theta ~ PowerSpherical(x - y, kappa),  x from X, y from Y
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ddgan_jax import parallel
from ddgan_jax.objectives import Context, Disc, Objective, Pairs, Parts, Wrapped


class Paths(NamedTuple):
    """The projections."""

    num: int = 1000  # directions for each distance
    kappa: float = 50.0  # their concentration about the path; 0 is the uniform distribution of plain slicing


@dataclasses.dataclass(frozen=True)
class Rpsw(Wrapped):
    """`base`, with the loss above for G in the place of its own."""

    base: Objective
    paths: Paths

    whole_batch = True

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Array, Parts]:
        """The loss above, of the rows of all replicas."""
        assert c.key is not None
        gather = functools.partial(parallel.gather, axis_name=c.axis_name)
        x_t, fake_x_t, x_tp1, _ = pairs
        return rpsw_loss(c.disc, x_t, c.draws.t, x_tp1, fake_x_t, c.key, self.paths, gather)


def path_directions(key: Array, x: Float[Array, "n d"], y: Float[Array, "m d"], paths: Paths) -> Float[Array, "L d"]:
    """Unit vectors about the differences of random pairs, with the power spherical density ~ (1 + mu . theta)^kappa.

    Sampled as De Cao and Aziz ("The Power Spherical distribution", 2020) do: t = mu . theta from a beta distribution,
    the rest uniform about mu. No gradient flows into them.
    """
    x, y, d = jax.lax.stop_gradient(x), jax.lax.stop_gradient(y), x.shape[1]
    x_key, y_key, t_key, rest_key = jax.random.split(key, 4)
    mu = x[jax.random.randint(x_key, (paths.num,), 0, len(x))] - y[jax.random.randint(y_key, (paths.num,), 0, len(y))]
    normal = lambda v: v / jnp.maximum(jnp.linalg.norm(v, axis=1, keepdims=True), 1e-12)  # noqa: E731
    mu = normal(mu)
    t = 2 * jax.random.beta(t_key, (d - 1) / 2 + paths.kappa, (d - 1) / 2, (paths.num, 1)) - 1
    rest = jax.random.normal(rest_key, (paths.num, d))
    rest = normal(rest - jnp.sum(rest * mu, axis=1, keepdims=True) * mu)
    return t * mu + jnp.sqrt(jnp.maximum(1 - t**2, 0)) * rest


def sliced_wasserstein(x: Float[Array, "n d"], y: Float[Array, "n d"], theta: Float[Array, "L d"]) -> Float[Array, ""]:
    """The mean over the directions of W_2^2 between the projections: of two sorted sets of n numbers."""
    return jnp.mean(jnp.square(jnp.sort(x @ theta.T, axis=0) - jnp.sort(y @ theta.T, axis=0)))


def rpsw_loss(
    disc: Disc,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_tp1: Float[Array, "b *d"],
    fake_x_t: Float[Array, "b *d"],
    key: Array,
    paths: Paths,
    gather: Callable[[Array], Array] = lambda rows: rows,
) -> tuple[Float[Array, ""], Parts]:
    """The loss above for an even batch, with parts `g_fake`, the logits, and `g_loss`, the loss itself for each.

    All four distances are of half a batch, so that they are equally biased, and the loss is 0 on average where the two
    distributions agree. `gather` joins the rows of all devices, so that they are those of the whole batch.
    """

    def rows(x: Array, logits: Array) -> Array:
        return gather(jnp.concatenate([x.reshape(len(x), -1), logits[:, None]], axis=1).astype(jnp.float32))

    def distance(key: Array, a: Array, b: Array) -> Array:
        return sliced_wasserstein(a, b, path_directions(key, a, b, paths))

    fake = disc(fake_x_t, t, x_tp1)
    x, y = rows(x_t, disc(x_t, t, x_tp1)), rows(fake_x_t, fake)
    (x1, x2), (y1, y2) = jnp.split(x, 2), jnp.split(y, 2)
    keys = jax.random.split(key, 4)
    loss = distance(keys[0], x1, y1) + distance(keys[1], x2, y2) - distance(keys[2], x1, x2) - distance(keys[3], y1, y2)
    return loss, {"g_fake": fake, "g_loss": jnp.full(len(fake), loss)}
