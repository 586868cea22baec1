"""One training step: D, then G against the new D, then the moving average (Section 3.2, Appendix).

`prepare` turns a batch into x_0, labels and random keys; `draw` makes the random numbers of a phase from its keys;
`update` is a pure function of the state and the two phases; `make_train_step` joins them for one replica. The step:

    1.  t, x_t, x_{t+1} real; x0_hat = G(x_{t+1}, t, z); fake x_t ~ q(x_t | x_{t+1}, x0_hat); step of D on L_D [+ R1]
    2.  new t, x_{t+1}, z, posterior noise for the same x_0; step of G on L_G
    3.  ema = decay ema + (1 - decay) G

with the losses of `losses.py`, whose options change the pairs and losses of the same step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ddgan_jax.devices import parallel
from ddgan_jax.method.losses import Losses, PerExample, Phase, PhaseNoise
from ddgan_jax.method.sampling import Denoiser, bind
from ddgan_jax.method.state import Params, StepSchedule, TrainState, apply_gradients, update_ema
from ddgan_jax.networks import ops

Batch = Array | tuple[Array, Array]  # images [B, *d], or (images, labels [B])
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything that a training step needs beside the state, a batch and a seed."""

    denoiser: Denoiser
    disc: Callable[..., Any]  # (params, x_t, t, x_{t+1}[, y=labels][, axis_name=...]) -> logits [B]
    init_disc: Callable[[Array], Any]  # key -> parameters
    losses: Losses  # with the schedule of the diffusion
    optimizer: optax.GradientTransformation
    lr_g: StepSchedule  # learning rate
    lr_d: StepSchedule
    ema_decay: float
    batch_size: int  # of all devices together
    flip: bool = False  # mirror half of the images
    dropout: bool = False  # whether the generator takes dropout keys
    accumulate: int = 1  # parts of a batch that are processed one after the other, to save memory


def make_train_step(
    method: Method, seed: int, with_r1: bool, axis_name: str | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function step(state, batch) -> (state, metrics) of one replica.

    With `axis_name`, gradients and metrics are averaged over the replicas of that axis. Metrics are float32 scalars,
    except those whose name ends in `_by_t`: these are [T], sums over the batch by t divided by its size, so that a
    loss by t is `*_loss_by_t` divided by `*_count_by_t`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        x0, labels, d_keys, g_keys = prepare(method, batch, seed, state.step, axis_name)
        d_phase = Phase(x0, draw(method, d_keys), labels, axis_name)
        g_phase = Phase(x0, draw(method, g_keys), labels, axis_name)
        return update(method, state, d_phase, g_phase, with_r1)

    return step


def prepare(
    method: Method, batch: Batch, seed: int, step: Array, axis_name: str | None = None
) -> tuple[Array, Array | None, Array, Array]:
    """(x_0 [B, *d], labels [B] or None, keys [B] of D's phase, keys [B] of G's phase) of this replica's batch.

    uint8 images are scaled to [-1, 1] and half of them mirrored if the method says so; points are multiplied by the
    denoiser's scale.
    """
    images, labels = batch if isinstance(batch, tuple) else (batch, None)
    x0 = to_x0(images, method.denoiser.scale)
    flip_keys, d_keys, g_keys = step_keys(seed, step, parallel.global_indices(x0.shape[0], axis_name))
    if method.flip:
        x0 = jnp.where(jax.vmap(jax.random.bernoulli)(flip_keys)[:, None, None, None], x0[:, :, ::-1], x0)
    return x0, labels, d_keys, g_keys


def to_x0(images: Array, scale: float = 1.0) -> Array:
    """uint8 images [B, H, W, C] -> float32 in [-1, 1]; points [B, d] -> `scale` times the points."""
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images * scale


def step_keys(seed: int, step: Array | int, indices: Array) -> tuple[Array, Array, Array]:
    """Random keys [B] of a training step for mirroring, D's phase and G's phase.

    `indices` [B] are those of the examples in the global batch. The keys of an example depend on (seed, step, index)
    alone.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda k: tuple(jax.random.split(k, 3)))(parallel.example_keys(key, indices))


def draw(method: Method, keys: Array) -> PhaseNoise:
    """All random numbers of a phase, one example per key [B]."""
    shape = method.denoiser.image_shape

    def one(key: Array) -> PhaseNoise:
        t_key, t_noise_key, tp1_noise_key, z_key, posterior_key, dropout_key = jax.random.split(key, 6)
        return PhaseNoise(
            t=jax.random.randint(t_key, (), 0, method.losses.schedule.num_steps),
            noise_t=jax.random.normal(t_noise_key, shape),
            noise_tp1=jax.random.normal(tp1_noise_key, shape),
            z=jax.random.normal(z_key, (method.denoiser.nz,)),
            noise_posterior=jax.random.normal(posterior_key, shape),
            dropout_keys=dropout_key if method.dropout else None,
        )

    return jax.vmap(one)(keys)


def update(
    method: Method, state: TrainState, d_phase: Phase, g_phase: Phase, with_r1: bool
) -> tuple[TrainState, Metrics]:
    """The step as a pure function of the state and its two phases, whose x_0 is scaled and mirrored already."""
    metrics: Metrics = {}
    if method.losses.has_discriminator:
        state, metrics = update_d(method, state, d_phase, with_r1)
    state, g_metrics = update_g(method, state, g_phase)
    return state, metrics | g_metrics


def update_d(method: Method, state: TrainState, phase: Phase, with_r1: bool) -> tuple[TrainState, Metrics]:
    """Part 1 of the step: the state with the new D, and its metrics."""
    grads, values = d_gradients(method, state, phase, with_r1)
    metrics = _metrics("d", values, phase.noise.t, method)
    grads, metrics = parallel.mean((grads, metrics), phase.axis_name)
    lr_d = method.lr_d(state.step)
    disc_params, disc_opt = apply_gradients(method.optimizer, grads, state.disc_opt, state.disc_params, lr_d)
    disc_params = ops.row_major(disc_params)  # updated in place, before G's phase changes their layout
    return state.replace(disc_params=disc_params, disc_opt=disc_opt), metrics | {"lr_d": lr_d}


def update_g(method: Method, state: TrainState, phase: Phase) -> tuple[TrainState, Metrics]:
    """Parts 2 and 3 of the step: the state with the new G and its moving average, and G's metrics."""
    grads, values = g_gradients(method, state, phase)
    metrics = _metrics("g", values, phase.noise.t, method)
    grads, metrics = parallel.mean((grads, metrics), phase.axis_name)
    lr_g = method.lr_g(state.step)
    gen_params, gen_opt = apply_gradients(method.optimizer, grads, state.gen_opt, state.gen_params, lr_g)
    state = state.replace(
        step=state.step + 1,
        gen_params=gen_params,
        gen_opt=gen_opt,
        ema_params=update_ema(state.ema_params, gen_params, state.step, method.ema_decay),
    )
    return state, metrics | {"lr_g": lr_g}


def d_gradients(method: Method, state: TrainState, phase: Phase, with_r1: bool) -> tuple[Params, PerExample]:
    """Gradients of the discriminator's parameters, and its values per example. G's gradients are not computed."""

    def gradients(phase: Phase) -> tuple[Params, PerExample]:
        pairs, _ = method.losses.make_pairs(bind(method.denoiser.gen, state.gen_params, phase.labels), phase)

        def loss(params: Params) -> tuple[Array, PerExample]:
            disc = bind(method.disc, params, phase.labels, phase.axis_name)
            return method.losses.d_loss(disc, pairs, phase, with_r1)

        return jax.grad(loss, has_aux=True)(state.disc_params)

    return parallel.accumulate(gradients, phase, method.accumulate)


def g_gradients(method: Method, state: TrainState, phase: Phase) -> tuple[Params, PerExample]:
    """Gradients of the generator's parameters through D, and its values per example. D's are not computed."""

    def gradients(phase: Phase) -> tuple[Params, PerExample]:
        disc = bind(method.disc, state.disc_params, phase.labels, phase.axis_name)

        def loss(params: Params) -> tuple[Array, PerExample]:
            pairs, x0_hat = method.losses.make_pairs(bind(method.denoiser.gen, params, phase.labels), phase)
            return method.losses.g_loss(disc, pairs, x0_hat, phase, state.step)

        return jax.grad(loss, has_aux=True)(state.gen_params)

    return parallel.accumulate(gradients, phase, method.accumulate)


def _metrics(network: str, values: PerExample, t: Array, method: Method) -> Metrics:
    """Means of the values per example, and the loss of `network` ('d' or 'g') by t."""

    def by_t(x: Array) -> Array:
        """Sums [T] of x [B] by t, divided by B. The ratio of two of them may be taken after averaging over batches."""
        return jnp.zeros(method.losses.schedule.num_steps).at[t].add(x) / x.shape[0]

    loss = values[f"{network}_loss"]
    means = {name: jnp.mean(value) for name, value in values.items() if name != "g_fake"}
    return means | {f"{network}_loss_by_t": by_t(loss), f"{network}_count_by_t": by_t(jnp.ones_like(loss))}
