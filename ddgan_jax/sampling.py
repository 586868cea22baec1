"""Sampling: T calls of the generator, each followed by a draw from the posterior (Section 3.2).

    x_T ~ N(0, I);  for t = T-1..0:  z ~ N(0, I),  x0_hat = G(x_{t+1}, t, z),  x_t ~ q(x_t | x_{t+1}, x0_hat)

`gen` is a callable (x_{t+1}, t, z) -> x0_hat with its parameters bound. Image i depends on (key, i) alone, never
on the batch that it is drawn in.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from ddgan_jax.diffusion import Schedule, sample_posterior
from ddgan_jax.parallel import example_keys

Gen = Callable[[Array, Array, Array], Array]


class Noise(struct.PyTreeNode):
    """The random draws of a batch of samples; entry t of the last two is used in the step x_{t+1} -> x_t."""

    x_T: Float[Array, "b *d"]
    z: Float[Array, "T b nz"]
    posterior: Float[Array, "T b *d"]


class Trajectory(struct.PyTreeNode):
    """Every step of a batch of samples, entry t of the step x_{t+1} -> x_t; x_t[0] is the sample."""

    x_tp1: Float[Array, "T b *d"]  # what the generator saw
    x0_hat: Float[Array, "T b *d"]  # what it predicted
    x_t: Float[Array, "T b *d"]  # the posterior's draw


def draw_noise(key: Array, indices: Int[Array, "b"], num_steps: int, image_shape: Sequence[int], nz: int) -> Noise:
    """The draws of the samples with these `indices`, each from (key, index) alone."""

    def one(key: Array) -> Noise:
        x_key, z_key, posterior_key = jax.random.split(key, 3)
        return Noise(
            x_T=jax.random.normal(x_key, tuple(image_shape)),
            z=jax.random.normal(z_key, (num_steps, nz)),
            posterior=jax.random.normal(posterior_key, (num_steps, *image_shape)),
        )

    return jax.vmap(one, out_axes=Noise(x_T=0, z=1, posterior=1))(example_keys(key, indices))  # type: ignore[arg-type]


def denoise(gen: Gen, schedule: Schedule, noise: Noise) -> Trajectory:
    """Run the T steps on given draws."""

    def step(x_tp1: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Trajectory]:
        t, z, posterior_noise = inputs
        t = jnp.full(x_tp1.shape[:1], t)
        x0_hat = gen(x_tp1, t, z)
        x_t = sample_posterior(schedule, x0_hat, x_tp1, t, posterior_noise)
        return x_t, Trajectory(x_tp1=x_tp1, x0_hat=x0_hat, x_t=x_t)

    steps = jnp.arange(schedule.num_steps)
    return jax.lax.scan(step, noise.x_T, (steps, noise.z, noise.posterior), reverse=True)[1]


def sample_trajectory(
    gen: Gen, schedule: Schedule, key: Array, indices: Int[Array, "b"], image_shape: Sequence[int], nz: int
) -> Trajectory:
    """The samples with these `indices`, every step of them."""
    return denoise(gen, schedule, draw_noise(key, indices, schedule.num_steps, image_shape, nz))


def sample(
    gen: Gen, schedule: Schedule, key: Array, indices: Int[Array, "b"], image_shape: Sequence[int], nz: int
) -> Float[Array, "b *d"]:
    """The samples x_0 with these `indices`, [B, *image_shape] in [-1, 1] if the generator ends in a tanh."""
    return sample_trajectory(gen, schedule, key, indices, image_shape, nz).x_t[0]
