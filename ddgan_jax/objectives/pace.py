"""G waits for D: its learning rate follows how far D is ahead. Not in the paper."""

import jax.numpy as jnp
from jax import Array


def pace_of_g(metrics: dict[str, Array], d_lead: float) -> Array:
    """The share of its learning rate that G moves at: 1 where D's loss is `d_lead` below that of guessing, 0 above it.

    A discriminator that guesses, with loss 2 ln 2, tells G nothing, and once it is there it stays for a thousand steps;
    while it waits for D, G does not drift. Mismatched pairs lower the logits of real and fake x_t alike, by as much as
    log(1 + w), which is no lost lead: with them the loss is 2 E[softplus(l_fake - l_real)], in which only the
    difference counts. It is 2 ln 2 for guessing as well.
    """
    d_loss = metrics.get("d_loss_of_pairs", metrics["d_loss"])
    return jnp.clip((2 * jnp.log(2.0) - d_loss) / d_lead, 0, 1)
