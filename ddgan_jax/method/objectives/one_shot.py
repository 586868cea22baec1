"""A GAN that makes x_0 of pure noise at once, for comparison (Section 5.2): diffusion is left with D.

D tells real x_0 from G(x_T, 0, z) after both were diffused to x_t, which augments its images, and is shown no x_{t+1}.
"""

import dataclasses

import jax.numpy as jnp

from ddgan_jax.method.diffusion import q_sample
from ddgan_jax.method.objectives import Context, Pairs
from ddgan_jax.method.objectives.ddgan import DDGAN


@dataclasses.dataclass(frozen=True)
class OneShot(DDGAN):
    """The paper's losses, of other pairs."""

    at_once = True

    def pairs(self, c: Context) -> Pairs:
        """x_t of real x_0 and of G(x_T, 0, z); in the place of x_{t+1} zeros."""
        x0_hat = c.generate(c.draws.noise_tp1, jnp.zeros_like(c.draws.t), c.draws.z)
        x_t = q_sample(c.schedule, c.x0, c.draws.t, c.draws.noise_t)
        fake_x_t = q_sample(c.schedule, x0_hat, c.draws.t, c.draws.noise_posterior)
        return Pairs(x_t, fake_x_t, jnp.zeros_like(x_t), x0_hat)
