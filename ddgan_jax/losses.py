"""The adversarial losses of the denoising steps (Section 3.2 of the paper).

For a real pair (x_t, x_{t+1}) of the forward process and a fake x_t drawn from the posterior given the generator's
x_0, with l = D(x_t, t, x_{t+1}) the logit and softplus(-l) = -log sigmoid(l):

    1.  L_D = E[softplus(-l_real)] + E[softplus(l_fake)]
    2.  R1  = gamma/2 E[ ||grad_{x_t} l_real||^2 ]        the gradient is of x_t only, not of x_{t+1}
    3.  L_G = E[softplus(-l_fake)]                        non-saturating

`disc` is a callable (x_t, t, x_{t+1}) -> logits [B] with its parameters bound. Every function returns a scalar
and a dict of its parts, one number an example.
"""

from collections.abc import Callable

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
) -> tuple[Float[Array, ""], Parts]:
    """(1), plus (2) unless `r1_gamma` is None. No gradient flows into the fake.

    Parts, all [B]: the logits `real` and `fake`, the losses `real_loss` and `fake_loss`, and with R1 `grad_norm_sq`.
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
    return jnp.mean(parts["real_loss"]) + jnp.mean(parts["fake_loss"]) + penalty, parts


def g_loss(
    disc: Disc, fake_x_t: Float[Array, "b *d"], t: Int[Array, "b"], x_tp1: Float[Array, "b *d"]
) -> tuple[Float[Array, ""], Parts]:
    """(3), with parts `fake` (logits) and `fake_loss`, both [B]."""
    fake = disc(fake_x_t, t, x_tp1)
    loss = jax.nn.softplus(-fake)
    return jnp.mean(loss), {"fake": fake, "fake_loss": loss}
