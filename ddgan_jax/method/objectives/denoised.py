"""D is shown x_0 itself, not a noisy x_t. Not in the paper.

D tells the pairs (x_0, x_{t+1}) from (x0_hat, x_{t+1}), given t. Where it cannot, the fake x_t are right too, as they
are drawn from the same posterior: a divergence between pairs with x_t is at most that between the pairs with x_0 (the
data processing inequality). D also sees what the posterior's noise would hide, and learns from every t what an image
looks like.
"""

import dataclasses

from ddgan_jax.method.objectives import Context, Objective, Pairs, Wrapped


@dataclasses.dataclass(frozen=True)
class Denoised(Wrapped):
    """The losses of `base`, of x_0 and x0_hat."""

    base: Objective

    def pairs(self, c: Context) -> Pairs:
        """Real x_0 and x0_hat, with the x_{t+1} of both."""
        pairs = self.base.pairs(c)
        return pairs._replace(x_t=c.x0, fake_x_t=pairs.x0_hat)
