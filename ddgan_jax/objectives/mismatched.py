"""D also sees pairs of two images, which are not real either. Not in the paper.

The x_t' of another image is likely by itself, but does not belong to x_{t+1}: D learns to compare its two images, as
the matching-aware discriminator of Reed et al. ("Generative Adversarial Text to Image Synthesis", ICML 2016) does an
image and its caption. With x_t' of the posterior given the x_0 of the example before, and weights w [b]:

    L_D' = L_D + E[w softplus(l_mismatched)]
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ddgan_jax.diffusion import sample_posterior
from ddgan_jax.objectives import Context, Disc, Objective, Pairs, Parts, Wrapped


@dataclasses.dataclass(frozen=True)
class Mismatched(Wrapped):
    """`base`, with the loss above for D."""

    base: Objective
    weight: float

    looks_back = True

    def d_loss(self, c: Context, pairs: Pairs, with_r1: bool) -> tuple[Array, Parts]:
        """The loss above; parts `d_mismatched`, and `d_loss_of_pairs`, that of real against fake logits."""
        loss, parts = self.base.d_loss(c, pairs, with_r1)
        if c.schedule.num_steps == 1:  # x_1 is noise, and belongs to every image
            return loss, parts
        added, added_parts = mismatched_loss(c.disc, *self.pair(c, pairs.x_tp1), c.draws.t, pairs.x_tp1)
        parts["d_loss_of_pairs"] = 2 * jax.nn.softplus(parts["d_fake"] - parts["d_real"])
        return loss + added, parts | added_parts

    def pair(self, c: Context, x_tp1: Array) -> tuple[Array, Array]:
        """(x_t' [b, *d], w [b]). The weight is 0 at t = T - 1, whose x_{t+1} is noise."""
        assert c.before is not None
        x_t = sample_posterior(c.schedule, c.before.x0, x_tp1, c.draws.t, c.draws.noise_posterior)
        return x_t, self.weight * (c.draws.t < c.schedule.num_steps - 1)


def mismatched_loss(
    disc: Disc,
    other_x_t: Float[Array, "b *d"],
    weight: Float[Array, "b"],
    t: Int[Array, "b"],
    x_tp1: Float[Array, "b *d"],
) -> tuple[Float[Array, ""], Parts]:
    """The added loss, with part `d_mismatched` [b], weighted."""
    loss = weight * jax.nn.softplus(disc(other_x_t, t, x_tp1))
    return jnp.mean(loss), {"d_mismatched": loss}
