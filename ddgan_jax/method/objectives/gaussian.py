"""Gaussian denoising, the paper's baseline (its equation 2): the same generator by squared error, without D.

L = E[ ||x_0 - G(x_{t+1}, t, z)||^2 / d ]         whose optimum is the mean of x_0 given x_{t+1}
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ddgan_jax.method.diffusion import q_sample_pair
from ddgan_jax.method.objectives import Context, Objective, Pairs, Parts


@dataclasses.dataclass(frozen=True)
class Gaussian(Objective):
    """Squared error of x_0."""

    trains_disc = False

    def pairs(self, c: Context) -> Pairs:
        """No x_t is drawn given x0_hat, since nobody is shown one: x0_hat stands for it."""
        x_t, x_tp1 = q_sample_pair(c.schedule, c.x0, c.draws.t, c.draws.noise_t, c.draws.noise_tp1)
        x0_hat = c.generate(x_tp1, c.draws.t, c.draws.z)
        return Pairs(x_t, x0_hat, x_tp1, x0_hat)

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Array, Parts]:
        """The loss above."""
        return squared_error(c.x0, pairs.x0_hat)


def squared_error(x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"]) -> tuple[Float[Array, ""], Parts]:
    """The loss above, with part `g_loss` [b]."""
    loss = jnp.mean(jnp.square(x0 - x0_hat), axis=tuple(range(1, x0.ndim)))
    return jnp.mean(loss), {"g_loss": loss}
