"""G's x0_hat is also held to x_0 by squared error, the more so the less noise there is. Not in the paper.

    L_G' = L_G + weight E[ SNR_{t+1} ||x_0 - x0_hat||^2 / d ],    SNR_k = abar_k / (1 - abar_k)

With little noise x_{t+1} nearly says what x_0 is, so that its mean is a sharp image, which squared error finds much
sooner than D's gradients do. With much noise the mean would be a blur, and the term next to nothing. The weight by the
signal-to-noise ratio is that of the likelihood of x_{t+1} given x_0: ||sqrt(abar) (x_0 - x0_hat)||^2 / (1 - abar).

The weight is a function of the training step, so that it can fall. Squared error then teaches G first what it can, and
the end is the game with D, which a large weight would hold back; some of it keeps the modes' shares.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.objectives import Context, Objective, Pairs, Parts, Wrapped
from ddgan_jax.method.state import OfStep


@dataclasses.dataclass(frozen=True)
class Reconstruction(Wrapped):
    """`base`, with the loss above for G."""

    base: Objective
    weight: OfStep

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Array, Parts]:
        """The loss above, with part `g_squared_error`."""
        loss, parts = self.base.g_loss(c, pairs)
        error, error_parts = weighted_error(c.schedule, c.x0, pairs.x0_hat, c.draws.t)
        return loss + self.weight(c.step) * error, parts | error_parts


def weighted_error(
    schedule: Schedule, x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"], t: Int[Array, "b"]
) -> tuple[Float[Array, ""], Parts]:
    """The added loss, without its weight, and its terms as part `g_squared_error` [b]."""
    snr = jnp.asarray(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))[t]
    error = snr * jnp.mean(jnp.square(x0 - x0_hat), axis=tuple(range(1, x0.ndim)))
    return jnp.mean(error), {"g_squared_error": error}
