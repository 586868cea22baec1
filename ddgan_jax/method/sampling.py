"""Sampling: T calls of the generator, each followed by a sample of the posterior (Section 3.2).

    x_T ~ N(0, I);  for t = T-1..0:  z ~ N(0, I),  x0_hat = G(x_{t+1}, t, z),  x_t ~ q(x_t | x_{t+1}, x0_hat)

`gen` is a callable (x_{t+1}, t, z) -> x0_hat with its parameters bound. Sample i depends on (key, i) alone, not on its
batch. The `posterior` is `sample_posterior` (the paper's) or `deterministic_posterior`. A generator may also output
x_t, which is called x0_hat here all the same; the `posterior` is then `no_posterior`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from ddgan_jax.devices.parallel import example_keys
from ddgan_jax.method.diffusion import Posterior, Schedule, sample_posterior

Gen = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A generator with everything that sampling needs beside its parameters."""

    gen: Callable[..., Any]  # (params, x_{t+1}, t, z[, dropout_keys][, y=labels]) -> x0_hat; or x_t, see below
    init_gen: Callable[[Array], Any]  # key -> parameters
    schedule: Schedule  # for sampling: the diffusion of training, or a single step for a one-shot generator
    image_shape: tuple[int, ...]  # [H, W, C], or [d] for points
    nz: int  # dimension of the latent z
    num_classes: int = 0  # 0: unconditional
    scale: float = 1.0  # x_0 = scale * data, for points
    predicts_x_t: bool = False  # `gen` returns x_t itself: no posterior follows


def bind(
    network: Callable[..., Any], params: Any, y: Array | None = None, axis_name: str | None = None
) -> Callable[..., Any]:
    """A network with its parameters and, unless they are None, the labels [B] of its examples and the replicas' axis.

    The discriminator needs the axis, since its minibatch standard deviation compares examples across replicas.
    """
    given = {"y": y, "axis_name": axis_name}
    return partial(network, params, **{name: value for name, value in given.items() if value is not None})


class Noise(struct.PyTreeNode):
    """Random numbers of a batch of samples. Entry t of the last two belongs to the step x_{t+1} -> x_t."""

    x_T: Float[Array, "b *d"]
    z: Float[Array, "T b nz"]
    posterior: Float[Array, "T b *d"]


class Trajectory(struct.PyTreeNode):
    """All steps of a batch of samples. Entry t belongs to the step x_{t+1} -> x_t; x_t[0] is the sample."""

    x_tp1: Float[Array, "T b *d"]  # the generator's input
    x0_hat: Float[Array, "T b *d"]  # its prediction
    x_t: Float[Array, "T b *d"]  # drawn from the posterior


def draw_noise(key: Array, indices: Int[Array, "b"], num_steps: int, image_shape: Sequence[int], nz: int) -> Noise:
    """Noise of the samples with these `indices`, each from (key, index) alone."""

    def one(key: Array) -> Noise:
        x_key, z_key, posterior_key = jax.random.split(key, 3)
        return Noise(
            x_T=jax.random.normal(x_key, tuple(image_shape)),
            z=jax.random.normal(z_key, (num_steps, nz)),
            posterior=jax.random.normal(posterior_key, (num_steps, *image_shape)),
        )

    return jax.vmap(one, out_axes=Noise(x_T=0, z=1, posterior=1))(example_keys(key, indices))  # type: ignore[arg-type]


def denoise_once(
    gen: Gen,
    schedule: Schedule,
    x_tp1: Float[Array, "b *d"],
    t: Int[Array, ""],
    z: Float[Array, "b nz"],
    noise: Array,
    posterior: Posterior = sample_posterior,
) -> Trajectory:
    """The step x_{t+1} -> x_t, t in 0..T-1, with the posterior's noise [b, *d]; fields [b, *d], without the axis T."""
    steps = jnp.broadcast_to(t, x_tp1.shape[:1])
    x0_hat = gen(x_tp1, steps, z)
    return Trajectory(x_tp1=x_tp1, x0_hat=x0_hat, x_t=posterior(schedule, x0_hat, x_tp1, steps, noise))


def denoise(
    gen: Gen,
    schedule: Schedule,
    noise: Noise,
    posterior: Posterior = sample_posterior,
) -> Trajectory:
    """Runs the steps len(noise.z) - 1, ..., 0 from noise.x_T. These are all T steps for the noise of `draw_noise`."""

    def step(x_tp1: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Trajectory]:
        trajectory = denoise_once(gen, schedule, x_tp1, *inputs, posterior)
        return trajectory.x_t, trajectory

    steps = jnp.arange(len(noise.z))
    return jax.lax.scan(step, noise.x_T, (steps, noise.z, noise.posterior), reverse=True)[1]


def sample(
    denoiser: Denoiser,
    params: Any,
    key: Array,
    indices: Int[Array, "b"],
    labels: Int[Array, "b"] | None = None,
    posterior: Posterior = sample_posterior,
) -> Float[Array, "b *d"]:
    """Samples x_0 with these `indices`, [B, *d], in [-1, 1] if the generator ends in a tanh."""
    noise = draw_noise(key, indices, denoiser.schedule.num_steps, denoiser.image_shape, denoiser.nz)
    return denoise(bind(denoiser.gen, params, labels), denoiser.schedule, noise, posterior).x_t[0]
