"""G's mean over z is held where squared error would have it, not its spread. Not in the paper.

The moment reconstruction of Lee, Ha and Kim ("Harmonizing Maximum Likelihood with GANs for Multimodal Conditional
Generation", ICLR 2019), by independent z, z', here that of the example before:

    L_G' = L_G + weight E[ (x_0 - G(x_{t+1}, t, z)) . (x_0 - G(x_{t+1}, t, z')) / d ]
         = L_G + weight E[ ||E[x_0 | x_{t+1}] - E_z[G(x_{t+1}, t, z)]||^2 / d ] + what G has no part in
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ddgan_jax.objectives import Context, Objective, Pairs, Parts, Wrapped


@dataclasses.dataclass(frozen=True)
class Moment(Wrapped):
    """`base`, with the loss above for G."""

    base: Objective
    weight: float

    looks_back = True

    def g_loss(self, c: Context, pairs: Pairs) -> tuple[Array, Parts]:
        """The loss above, with part `g_moment_error`."""
        loss, parts = self.base.g_loss(c, pairs)
        assert c.before is not None
        other = c.generate(pairs.x_tp1, c.draws.t, c.before.z)
        moment, moment_parts = moment_reconstruction(c.x0, pairs.x0_hat, other)
        return loss + self.weight * moment, parts | moment_parts


def moment_reconstruction(
    x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"], other_x0_hat: Float[Array, "b *d"]
) -> tuple[Float[Array, ""], Parts]:
    """The added loss for G's x_0 of one z and of another, with part `g_moment_error` [b], its terms, which may be
    negative.

    No gradient flows into the second x_0, which saves a backward pass; the loss is doubled, as half the gradient is
    missing.
    """
    error = jnp.mean((x0 - x0_hat) * (x0 - jax.lax.stop_gradient(other_x0_hat)), axis=tuple(range(1, x0.ndim)))
    return 2 * jnp.mean(error), {"g_moment_error": error}
