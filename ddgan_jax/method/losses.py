"""Losses of the discriminator and the generator: the paper's, two additions, and two baselines.

The paper's losses (Section 3.2) compare real pairs (x_t, x_{t+1}) of the forward process with fake ones, whose x_t is
drawn from the posterior given x0_hat = G(x_{t+1}, t, z). With the logit l = D(x_t, t, x_{t+1}), and
softplus(-l) = -log sigmoid(l):

    (1)  L_D = E[softplus(-l_real)] + E[softplus(l_fake)]
    (2)  R1  = gamma/2 E[ ||grad_{x_t} l_real||^2 ]        the gradient with respect to x_t only, not x_{t+1}
    (3)  L_G = E[softplus(-l_fake)]                        non-saturating

`discriminator_input` = 'x_0' (not in the paper): D compares (x_0, x_{t+1}) with (x0_hat, x_{t+1}). If these two have
the same distribution, so have the pairs with x_t, which come from the same posterior; a divergence between the latter
is at most that between the former (the data processing inequality). D sees what the posterior's noise would hide.

`reconstruction` (not in the paper) adds a squared error, weighted by the signal-to-noise ratio of x_{t+1}:

    (4)  L_G + weight E[ SNR_{t+1} ||x_0 - x0_hat||^2 / d ],    SNR_k = abar_k / (1 - abar_k)

It speeds up the low-noise steps, where the mean of x_0 given x_{t+1} is a sharp image. At high noise, where that mean
is blurred, its weight is close to zero. The weight is the likelihood's: ||sqrt(abar) (x_0 - x0_hat)||^2 / (1 - abar).
It may decay during training, since a large one holds back the adversarial loss at the end.

`posterior` = `no_posterior` (direct denoising, an ablation of the paper): G's output is the fake x_t itself.

`objective` = 'gaussian' is the paper's baseline (its equation 2): the same generator without a discriminator, trained
by the squared error E[ ||x_0 - x0_hat||^2 / d ], whose optimum is the mean of x_0 given x_{t+1}.

`objective` = 'one_shot' is a GAN that generates x_0 from pure noise in one step (Section 5.2): D compares real x_0 with
G(x_T, 0, z) after both were diffused to x_t. The diffusion then only augments the discriminator's inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from ddgan_jax.method.diffusion import Posterior, Schedule, q_sample, q_sample_pair, sample_posterior
from ddgan_jax.method.state import StepSchedule

PerExample = dict[str, Array]  # values [b], by the name of the metric that is their mean
Gen = Callable[..., Array]  # (x_{t+1}, t, z[, dropout_keys]) -> x0_hat, with parameters and labels bound
Disc = Callable[[Array, Array, Array], Array]  # (x_t, t, x_{t+1}) -> logits [b], with parameters and labels bound


class PhaseNoise(struct.PyTreeNode):
    """Random numbers of one phase of a step, the discriminator's or the generator's, for b examples of shape d."""

    t: Array  # [b] int32, uniform over 0..T-1
    noise_t: Array  # [b, *d], the noise in x_t
    noise_tp1: Array  # [b, *d], the noise of the step from x_t to x_{t+1}
    z: Array  # [b, nz]
    noise_posterior: Array  # [b, *d], the noise in the fake x_t
    dropout_keys: Array | None = None  # [b], if the generator has dropout


class Phase(struct.PyTreeNode):
    """Inputs of one phase of a step, beside the state, for the b examples of a replica or of a part of its batch."""

    x0: Array  # [b, *d], real, in [-1, 1] for images
    noise: PhaseNoise
    labels: Array | None = None  # [b] int32, of a class-conditional model
    axis_name: str | None = struct.field(pytree_node=False, default=None)  # of the replicas; None: only this one


class Pairs(NamedTuple):
    """Discriminator inputs: (real, condition) and (fake, condition), [b, *d] each.

    For the paper's losses these are x_t, the fake x_t, and x_{t+1}. With discriminator_input='x_0' the first two are
    x_0 and x0_hat. For 'one_shot' the condition is zero.
    """

    real: Array
    fake: Array
    condition: Array


@dataclasses.dataclass(frozen=True)
class Losses:
    """The selected losses. Their `phase` is the one whose noise made the pairs."""

    schedule: Schedule
    r1_gamma: float
    objective: str = "adversarial"  # or 'gaussian', 'one_shot'
    discriminator_input: str = "x_t"  # or 'x_0'
    reconstruction: StepSchedule | None = None  # weight in (4)
    posterior: Posterior = sample_posterior  # of the fake x_t; `no_posterior` if G outputs x_t

    @property
    def has_discriminator(self) -> bool:
        """Whether a discriminator is trained."""
        return self.objective != "gaussian"

    def make_pairs(self, gen: Gen, phase: Phase) -> tuple[Pairs, Array]:
        """Pairs for the discriminator, and G's output x0_hat [b, *d] from which the fake ones are made."""
        x0, noise, schedule = phase.x0, phase.noise, self.schedule
        dropout = () if noise.dropout_keys is None else (noise.dropout_keys,)
        if self.objective == "one_shot":
            x0_hat = gen(noise.noise_tp1, jnp.zeros_like(noise.t), noise.z, *dropout)
            real = q_sample(schedule, x0, noise.t, noise.noise_t)
            fake = q_sample(schedule, x0_hat, noise.t, noise.noise_posterior)
            return Pairs(real, fake, jnp.zeros_like(real)), x0_hat
        x_t, x_tp1 = q_sample_pair(schedule, x0, noise.t, noise.noise_t, noise.noise_tp1)
        x0_hat = gen(x_tp1, noise.t, noise.z, *dropout)
        if self.discriminator_input == "x_0":
            return Pairs(x0, x0_hat, x_tp1), x0_hat
        fake = self.posterior(schedule, x0_hat, x_tp1, noise.t, noise.noise_posterior)
        return Pairs(x_t, fake, x_tp1), x0_hat

    def d_loss(self, disc: Disc, pairs: Pairs, phase: Phase, with_r1: bool) -> tuple[Float[Array, ""], PerExample]:
        """Discriminator loss (1), plus (2) if R1 is due."""
        return adversarial_d_loss(disc, pairs, phase.noise.t, self.r1_gamma if with_r1 else None)

    def g_loss(
        self, disc: Disc, pairs: Pairs, x0_hat: Float[Array, "b *d"], phase: Phase, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], PerExample]:
        """Generator loss (3) or (4), or the squared error for 'gaussian', at a training step."""
        if self.objective == "gaussian":
            return squared_error(phase.x0, x0_hat)
        loss, values = adversarial_g_loss(disc, pairs, phase.noise.t)
        if self.reconstruction:
            error, of_error = weighted_error(self.schedule, phase.x0, x0_hat, phase.noise.t)
            loss, values = loss + self.reconstruction(step) * error, values | of_error
        return loss, values


def adversarial_d_loss(
    disc: Disc, pairs: Pairs, t: Int[Array, "b"], r1_gamma: float | None = None
) -> tuple[Float[Array, ""], PerExample]:
    """Loss (1), plus (2) unless `r1_gamma` is None. No gradient flows into the fake inputs.

    Per example: the logits `d_real` and `d_fake`, the loss `d_loss` without R1, and `r1` if it is computed.
    """
    values, penalty = {}, jnp.float32(0)
    if r1_gamma is None:
        real = disc(pairs.real, t, pairs.condition)
    else:
        penalty, of_r1 = r1_penalty(disc, pairs.real, t, pairs.condition, r1_gamma)
        real = of_r1["logits"]
        values["r1"] = r1_gamma / 2 * of_r1["grad_norm_sq"]
    fake = disc(jax.lax.stop_gradient(pairs.fake), t, pairs.condition)
    real_loss, fake_loss = jax.nn.softplus(-real), jax.nn.softplus(fake)
    loss = jnp.mean(real_loss) + jnp.mean(fake_loss) + penalty
    return loss, values | {"d_loss": real_loss + fake_loss, "d_real": real, "d_fake": fake}


def r1_penalty(
    disc: Disc, real: Float[Array, "b *d"], t: Int[Array, "b"], condition: Float[Array, "b *d"], gamma: float
) -> tuple[Float[Array, ""], PerExample]:
    """R1 (2) of real pairs; per example their `logits` and `grad_norm_sq`, from the same forward pass.

    The gradient is that of the batch's summed logits, so examples of a minibatch-stddev group contribute to each
    other's. The norm is squared without taking its root: the gradient of a norm is NaN where D is constant, as at its
    initialization.
    """
    logits, pullback = jax.vjp(lambda x: disc(x, t, condition), real)
    (gradient,) = pullback(jnp.ones_like(logits))
    norm_sq = jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=tuple(range(1, gradient.ndim)))
    return gamma / 2 * jnp.mean(norm_sq), {"logits": logits, "grad_norm_sq": norm_sq}


def adversarial_g_loss(disc: Disc, pairs: Pairs, t: Int[Array, "b"]) -> tuple[Float[Array, ""], PerExample]:
    """Loss (3); per example the logits `g_fake` and the loss `g_loss`."""
    fake = disc(pairs.fake, t, pairs.condition)
    loss = jax.nn.softplus(-fake)
    return jnp.mean(loss), {"g_fake": fake, "g_loss": loss}


def squared_error(x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"]) -> tuple[Float[Array, ""], PerExample]:
    """Loss of 'gaussian'; per example `g_loss`."""
    loss = jnp.mean(jnp.square(x0 - x0_hat), axis=tuple(range(1, x0.ndim)))
    return jnp.mean(loss), {"g_loss": loss}


def weighted_error(
    schedule: Schedule, x0: Float[Array, "b *d"], x0_hat: Float[Array, "b *d"], t: Int[Array, "b"]
) -> tuple[Float[Array, ""], PerExample]:
    """The expectation in (4), without its weight; per example `g_squared_error`."""
    snr = jnp.asarray(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))[t]
    error = snr * jnp.mean(jnp.square(x0 - x0_hat), axis=tuple(range(1, x0.ndim)))
    return jnp.mean(error), {"g_squared_error": error}
