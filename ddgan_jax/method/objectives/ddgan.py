"""The paper's objective: an adversarial loss for each denoising step (Section 3.2).

For a real pair (x_t, x_{t+1}) of the forward process, and a fake x_t drawn from the posterior given the generator's
x_0, with l = D(x_t, t, x_{t+1}) the logit and softplus(-l) = -log sigmoid(l):

    1.  L_D = E[softplus(-l_real)] + E[softplus(l_fake)]
    2.  R1  = gamma/2 E[ ||grad_{x_t} l_real||^2 ]        the gradient is of x_t only, not of x_{t+1}
    3.  L_G = E[softplus(-l_fake)]                        non-saturating
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ddgan_jax.method.diffusion import q_sample_pair, sample_posterior
from ddgan_jax.method.objectives import Context, Disc, Objective, Pairs, Parts


@dataclasses.dataclass(frozen=True)
class DDGAN(Objective):
    """The losses (1) to (3) of the pairs that one denoising step gives."""

    r1_gamma: float

    def pairs(self, c: Context) -> Pairs:
        """Real x_t, x_{t+1} ~ q(x_t, x_{t+1} | x_0); x0_hat = G(x_{t+1}, t, z); fake x_t ~ q(x_t | x_{t+1}, x0_hat)."""
        x_t, x_tp1 = q_sample_pair(c.schedule, c.x0, c.draws.t, c.draws.noise_t, c.draws.noise_tp1)
        x0_hat = c.generate(x_tp1, c.draws.t, c.draws.z)
        fake_x_t = sample_posterior(c.schedule, x0_hat, x_tp1, c.draws.t, c.draws.noise_posterior)
        return Pairs(x_t, fake_x_t, x_tp1, x0_hat)

    def d_loss(self, c: Context, pairs: Pairs, with_r1: bool) -> tuple[Float[Array, ""], Parts]:
        """(1), plus (2) if R1 is due."""
        x_t, fake_x_t, x_tp1, _ = pairs
        return d_loss(c.disc, x_t, c.draws.t, x_tp1, fake_x_t, self.r1_gamma if with_r1 else None)

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Float[Array, ""], Parts]:
        """(3)."""
        return g_loss(c.disc, pairs.fake_x_t, c.draws.t, pairs.x_tp1)


def d_loss(
    disc: Disc,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_tp1: Float[Array, "b *d"],
    fake_x_t: Float[Array, "b *d"],
    r1_gamma: float | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """(1), plus (2) unless `r1_gamma` is None. No gradient flows into the fake.

    Parts: the logits `d_real` and `d_fake`, the loss `d_loss` without R1, and with it `r1`.
    """
    parts, penalty = {}, jnp.float32(0)
    if r1_gamma is None:
        real = disc(x_t, t, x_tp1)
    else:
        penalty, r1_parts = r1_penalty(disc, x_t, t, x_tp1, r1_gamma)
        real = r1_parts["logits"]
        parts["r1"] = r1_gamma / 2 * r1_parts["grad_norm_sq"]
    fake = disc(jax.lax.stop_gradient(fake_x_t), t, x_tp1)
    real_loss, fake_loss = jax.nn.softplus(-real), jax.nn.softplus(fake)
    loss = jnp.mean(real_loss) + jnp.mean(fake_loss) + penalty
    return loss, parts | {"d_loss": real_loss + fake_loss, "d_real": real, "d_fake": fake}


def r1_penalty(
    disc: Disc, x_t: Float[Array, "b *d"], t: Int[Array, "b"], x_tp1: Float[Array, "b *d"], gamma: float
) -> tuple[Float[Array, ""], Parts]:
    """(2) on real pairs, with parts `logits` and `grad_norm_sq`, both [b]; one forward pass serves both.

    The gradient is that of the batch's summed logits, so the examples of a minibatch-stddev group share it.
    Squared, never as a norm: the gradient of a norm is NaN where D is flat, as at its initialisation.
    """
    logits, pullback = jax.vjp(lambda x: disc(x, t, x_tp1), x_t)
    (gradient,) = pullback(jnp.ones_like(logits))
    norm_sq = jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=tuple(range(1, gradient.ndim)))
    return gamma / 2 * jnp.mean(norm_sq), {"logits": logits, "grad_norm_sq": norm_sq}


def g_loss(
    disc: Disc, fake_x_t: Float[Array, "b *d"], t: Int[Array, "b"], x_tp1: Float[Array, "b *d"]
) -> tuple[Float[Array, ""], Parts]:
    """(3), with parts `g_fake`, the logits, and `g_loss`."""
    fake = disc(fake_x_t, t, x_tp1)
    loss = jax.nn.softplus(-fake)
    return jnp.mean(loss), {"g_fake": fake, "g_loss": loss}
