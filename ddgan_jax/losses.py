"""The adversarial losses of the denoising steps (Section 3.2 of the paper).

For a real pair (x_t, x_{t+1}) of the forward process and a fake x_t drawn from the posterior given the generator's
x_0, with l = D(x_t, t, x_{t+1}) the logit and softplus(-l) = -log sigmoid(l):

    1.  L_D = E[softplus(-l_real)] + E[softplus(l_fake)]
    2.  R1  = gamma/2 E[ ||grad_{x_t} l_real||^2 ]        the gradient is of x_t only, not of x_{t+1}
    3.  L_G = E[softplus(-l_fake)]                        non-saturating

With examples x_t' of the posterior given another image's x_0, which are likely by themselves but do not belong to
x_{t+1}, D learns to compare its two images, as the matching-aware discriminator of Reed et al. ("Generative Adversarial
Text to Image Synthesis", ICML 2016) does an image and its caption. With weights w [B]:

    1'. L_D = (1) + E[w softplus(l_mismatched)]

In the place of (3), sliced Wasserstein distances along random paths (Nguyen, Zhang, Le and Ho, "Sliced Wasserstein
with Random-Path Projecting Directions", ICML 2024). With X the rows (x_t, l_real), Y the rows (fake x_t, l_fake), and
X1, X2, Y1, Y2 the halves of the batch, an energy distance:

    4.  L_G = SW(X1, Y1) + SW(X2, Y2) - SW(X1, X2) - SW(Y1, Y2)
        SW(X, Y) = E_theta[ W_2^2(theta X, theta Y) ],    theta ~ PowerSpherical(x - y, kappa),  x from X, y from Y

In the place of all three, what Gaussian denoising is trained by (the paper's baseline, its equation 2):

    5.  L = E[ ||x_0 - G(x_{t+1}, t, z)||^2 / d ]         whose optimum is the mean of x_0 given x_{t+1}

Added to (3) or (4), the moment reconstruction of Lee, Ha and Kim ("Harmonizing Maximum Likelihood with GANs for
Multimodal Conditional Generation", ICLR 2019), which holds the mean of G over z, not its spread, by independent z, z':

    6.  L = E[ (x_0 - G(x_{t+1}, t, z)) . (x_0 - G(x_{t+1}, t, z')) / d ]
          = E[ ||E[x_0 | x_{t+1}] - E_z[G(x_{t+1}, t, z)]||^2 / d ] + what G has no part in

`disc` is a callable (x_t, t, x_{t+1}) -> logits [B] with its parameters bound. Every function returns a scalar
and a dict of its parts, one number an example.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Disc = Callable[[Array, Array, Array], Array]
Parts = dict[str, Array]


def r1_penalty(
    disc: Disc, x_t: Float[Array, "b *d"], t: Int[Array, "b"], x_tp1: Float[Array, "b *d"], gamma: float
) -> tuple[Float[Array, ""], Parts]:
    """(2) on real pairs, with parts `logits` and `grad_norm_sq`, both [B]; one forward pass serves both.

    The gradient is that of the batch's summed logits, so the examples of a minibatch-stddev group share it.
    Squared, never as a norm: the gradient of a norm is NaN where D is flat, as at its initialisation.
    """
    logits, pullback = jax.vjp(lambda x: disc(x, t, x_tp1), x_t)
    (gradient,) = pullback(jnp.ones_like(logits))
    norm_sq = jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=tuple(range(1, gradient.ndim)))
    return gamma / 2 * jnp.mean(norm_sq), {"logits": logits, "grad_norm_sq": norm_sq}


def d_loss(
    disc: Disc,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_tp1: Float[Array, "b *d"],
    fake_x_t: Float[Array, "b *d"],
    r1_gamma: float | None = None,
    mismatched: tuple[Float[Array, "b *d"], Float[Array, "b"]] | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """(1), or (1') with `mismatched` (x_t', w), plus (2) unless `r1_gamma` is None. No gradient flows into the fake.

    Parts, all [B]: the logits `real` and `fake`, the losses `real_loss` and `fake_loss`, with R1 `grad_norm_sq`, and
    `mismatched_loss`, weighted, of mismatched pairs.
    """
    parts = {}
    penalty = jnp.float32(0)
    if r1_gamma is None:
        real = disc(x_t, t, x_tp1)
    else:
        penalty, r1_parts = r1_penalty(disc, x_t, t, x_tp1, r1_gamma)
        real = r1_parts["logits"]
        parts["grad_norm_sq"] = r1_parts["grad_norm_sq"]
    fake = disc(jax.lax.stop_gradient(fake_x_t), t, x_tp1)
    parts |= {"real": real, "fake": fake, "real_loss": jax.nn.softplus(-real), "fake_loss": jax.nn.softplus(fake)}
    loss = jnp.mean(parts["real_loss"]) + jnp.mean(parts["fake_loss"]) + penalty
    if mismatched is not None:
        other_x_t, weight = mismatched
        parts["mismatched_loss"] = weight * jax.nn.softplus(disc(other_x_t, t, x_tp1))
        loss += jnp.mean(parts["mismatched_loss"])
    return loss, parts


def g_loss(
    disc: Disc, fake_x_t: Float[Array, "b *d"], t: Int[Array, "b"], x_tp1: Float[Array, "b *d"]
) -> tuple[Float[Array, ""], Parts]:
    """(3), with parts `fake` (logits) and `fake_loss`, both [B]."""
    fake = disc(fake_x_t, t, x_tp1)
    loss = jax.nn.softplus(-fake)
    return jnp.mean(loss), {"fake": fake, "fake_loss": loss}


class Paths(NamedTuple):
    """The projections of (4)."""

    num: int = 1000  # directions for each distance
    kappa: float = 50.0  # their concentration about the path; 0 is the uniform distribution of plain slicing


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
    """(4) for an even batch, with parts `fake` (logits) and `fake_loss` (the loss itself, for every example), both [B].

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
    return loss, {"fake": fake, "fake_loss": jnp.full(len(fake), loss)}


def squared_error(x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"]) -> tuple[Float[Array, ""], Parts]:
    """(5), with part `fake_loss` [B]."""
    loss = jnp.mean(jnp.square(x0 - x0_hat), axis=tuple(range(1, x0.ndim)))
    return jnp.mean(loss), {"fake_loss": loss}


def moment_reconstruction(
    x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"], other_x0_hat: Float[Array, "b *d"]
) -> tuple[Float[Array, ""], Parts]:
    """(6) for G's x_0 of one z and of another, with part `moment_error` [B], its terms, which may be negative.

    No gradient flows into the second x_0, which saves a backward pass; the loss is twice (6), as half the gradient is
    missing.
    """
    error = jnp.mean((x0 - x0_hat) * (x0 - jax.lax.stop_gradient(other_x0_hat)), axis=tuple(range(1, x0.ndim)))
    return 2 * jnp.mean(error), {"moment_error": error}
