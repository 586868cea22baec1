"""The state of a training run as arrays, its optimizer, learning rates and moving average.

Randomness, data order and learning rates are functions of the training step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ddgan_jax.networks import ops

Params = Any
StepSchedule = Callable[[jax.Array], jax.Array]  # number of finished training steps [] int32 -> float32 []


class TrainState(struct.PyTreeNode):
    """Everything that a run needs to resume, as arrays. Optimizer states hold the moments and their step count."""

    step: jax.Array  # [] int32, number of finished training steps
    gen_params: Params
    disc_params: Params
    ema_params: Params  # exponential moving average of gen_params, used for sampling
    gen_opt: optax.OptState
    disc_opt: optax.OptState


def cosine_schedule(base: float, steps_per_epoch: int, num_epochs: int, eta_min: float = 1e-5) -> StepSchedule:
    """A cosine from `base` to `eta_min` over `num_epochs`, and `eta_min` afterwards.

    It is constant within an epoch, as the reference's learning rate. With steps_per_epoch=1 it changes every step.
    """

    def learning_rate(step: jax.Array) -> jax.Array:
        epoch = jnp.minimum(step // steps_per_epoch, num_epochs).astype(jnp.float32)
        return eta_min + (base - eta_min) * (1 + jnp.cos(jnp.pi * epoch / num_epochs)) / 2

    return learning_rate


def constant_schedule(base: float) -> StepSchedule:
    """`base` at every step."""
    return lambda step: jnp.float32(base)


def create(gen_params: Params, disc_params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Call it under jit: arrays made eagerly would be shared between fields."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        gen_params=gen_params,
        disc_params=disc_params,
        ema_params=jax.tree.map(jnp.copy, gen_params),
        gen_opt=optimizer.init(gen_params),
        disc_opt=optimizer.init(disc_params),
    )


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Params, opt_state: optax.OptState, params: Params, lr: jax.Array
) -> tuple[Params, optax.OptState]:
    """(parameters, optimizer state) after one step of `optimizer` with learning rate `lr`."""
    directions, opt_state = optimizer.update(ops.row_major(grads), opt_state, params)
    return jax.tree.map(lambda p, d: p - lr * d, params, directions), opt_state


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """decay * ema + (1 - decay) * params; at step 0, the params after the first step instead of an average with the
    initial ones, as in the reference."""
    keep = jnp.where(step == 0, 0.0, decay)
    return jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, ema, params)


@jax.jit
def norms(state: TrainState) -> dict[str, jax.Array]:
    """Euclidean norms of all parameters, and of Adam's first moments as smoothed gradients, for the log.

    They are computed outside the step: for hundreds of arrays they would be a sixth of its kernels.
    """
    return {
        "d_grad_norm": optax.tree.norm(state.disc_opt.mu),
        "d_param_norm": optax.tree.norm(state.disc_params),
        "g_grad_norm": optax.tree.norm(state.gen_opt.mu),
        "g_param_norm": optax.tree.norm(state.gen_params),
    }


def num_bytes(shapes: Any) -> int:
    """Total size in bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
