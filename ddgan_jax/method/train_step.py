"""One training step: D, then G against the new D, then the moving average (Section 3.2, Appendix).

`draw` makes all random numbers of a step, `update` is a pure function of them, and `make_train_step` joins the two
for one replica. The step, on a batch of real x_0:

    1.  t, x_t, x_{t+1} real; x0_hat = G(x_{t+1}, t, z); fake x_t ~ q(x_t | x_{t+1}, x0_hat); step of D on L_D [+ R1]
    2.  new t, x_{t+1}, z, posterior draw on the same x_0; step of G on L_G
    3.  ema = decay ema + (1 - decay) G

with the losses of `losses.py`, whose options make other pairs and losses in the same step.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from ddgan_jax.devices import parallel
from ddgan_jax.method.losses import Losses, PerExample, Phase, PhaseNoise
from ddgan_jax.method.state import OfStep, Params, TrainState, apply_gradients, update_ema
from ddgan_jax.networks import ops

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a step is made of: the networks as callables, the losses, and the constants of training."""

    gen: Callable[..., Any]  # (params, x_{t+1}, t, z[, dropout_keys][, y=labels]) -> x0_hat
    disc: Callable[..., Any]  # (params, x_t, t, x_{t+1}[, y=labels][, axis_name=...]) -> logits [B]
    losses: Losses
    optimizer: optax.GradientTransformation
    lr_g: OfStep  # learning rate
    lr_d: OfStep
    nz: int
    ema_decay: float
    flip: bool = False  # mirror half of the images
    dropout: bool = False  # does gen take dropout keys?
    accumulate: int = 1  # parts of a batch that are taken one after the other, for the memory of one
    scale: float = 1.0  # x_0 = scale * data, for points


class Draws(struct.PyTreeNode):
    """The random numbers of a step."""

    flip: Array  # [B] bool, mirror the image?
    d: PhaseNoise
    g: PhaseNoise


def draw(key: Array, indices: Array, num_steps: int, image_shape: tuple[int, ...], nz: int, dropout: bool) -> Draws:
    """All random numbers of a step for the examples `indices` [B] of the global batch, from (key, index) alone."""

    def phase(key: Array) -> PhaseNoise:
        t_key, t_noise_key, tp1_noise_key, z_key, posterior_key, dropout_key = jax.random.split(key, 6)
        return PhaseNoise(
            t=jax.random.randint(t_key, (), 0, num_steps),
            noise_t=jax.random.normal(t_noise_key, image_shape),
            noise_tp1=jax.random.normal(tp1_noise_key, image_shape),
            z=jax.random.normal(z_key, (nz,)),
            noise_posterior=jax.random.normal(posterior_key, image_shape),
            dropout_keys=dropout_key if dropout else None,
        )

    def one(key: Array) -> Draws:
        flip_key, d_key, g_key = jax.random.split(key, 3)
        return Draws(flip=jax.random.bernoulli(flip_key), d=phase(d_key), g=phase(g_key))

    return jax.vmap(one)(parallel.example_keys(key, indices))


def step_draws(method: Method, seed: int, step: Array, x0: Array, axis_name: str | None = None) -> Draws:
    """The random numbers of training step `step` for this replica's x_0 [B, *d], from the seed and the step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    indices = parallel.global_indices(x0.shape[0], axis_name)
    return draw(key, indices, method.losses.schedule.num_steps, x0.shape[1:], method.nz, method.dropout)


def make_train_step(
    method: Method, seed: int, with_r1: bool, axis_name: str | None = None
) -> Callable[[TrainState, Array | tuple[Array, Array]], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), for one replica; a batch is images [B, *d], or (images, labels [B]).

    uint8 images are scaled to [-1, 1], points by `method.scale`. With `axis_name` the gradients and metrics
    are averaged over the replicas that share it. Metrics are float32 scalars, but for those that end in `_by_t`: [T]
    sums over a batch divided by its size (divide a loss by its count).
    """

    def step(state: TrainState, batch: Array | tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        images, y = batch if isinstance(batch, tuple) else (batch, None)
        x0 = to_x0(images, method.scale)
        draws = step_draws(method, seed, state.step, x0, axis_name)
        if method.flip:
            x0 = jnp.where(draws.flip[:, None, None, None], x0[:, :, ::-1], x0)
        return update(method, state, x0, draws, with_r1, axis_name, y)

    return step


def to_x0(images: Array, scale: float = 1.0) -> Array:
    """uint8 images [B, H, W, C] -> float32 in [-1, 1]; points [B, d] times `scale`."""
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images * scale


def update(
    method: Method,
    state: TrainState,
    x0: Array,
    draws: Draws,
    with_r1: bool,
    axis_name: str | None = None,
    y: Array | None = None,
) -> tuple[TrainState, Metrics]:
    """The step as a pure function of real x_0 [B, *d] in [-1, 1] (already mirrored), their labels and the draws."""
    metrics: Metrics = {}
    if method.losses.has_discriminator:
        state, metrics = update_d(method, state, Phase(x0, draws.d, y, axis_name), with_r1)
    state, g_metrics = update_g(method, state, Phase(x0, draws.g, y, axis_name))
    return state, metrics | g_metrics


def update_d(method: Method, state: TrainState, phase: Phase, with_r1: bool) -> tuple[TrainState, Metrics]:
    """Part 1 of the step: the state with the new D, and its metrics."""
    grads, values = d_gradients(method, state, phase, with_r1)
    metrics = _metrics("d", values, phase.noise.t, method)
    grads, metrics = parallel.mean((grads, metrics), phase.axis_name)
    lr_d = method.lr_d(state.step)
    disc_params, disc_opt = apply_gradients(method.optimizer, grads, state.disc_opt, state.disc_params, lr_d)
    disc_params = ops.row_major(disc_params)  # written in place, before G's phase turns them around
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
        pairs, _ = method.losses.make_pairs(bind(method.gen, state.gen_params, phase.labels), phase)

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
            pairs, x0_hat = method.losses.make_pairs(bind(method.gen, params, phase.labels), phase)
            return method.losses.g_loss(disc, pairs, x0_hat, phase, state.step)

        return jax.grad(loss, has_aux=True)(state.gen_params)

    return parallel.accumulate(gradients, phase, method.accumulate)


def bind(
    network: Callable[..., Any], params: Params, y: Array | None = None, axis_name: str | None = None
) -> Callable[..., Any]:
    """A network of a Method with its parameters, the labels [B] of its examples if it is conditional, and for D, which
    compares examples, the name of the axis of the replicas that they lie on."""
    given = {"y": y, "axis_name": axis_name}
    return partial(network, params, **{name: value for name, value in given.items() if value is not None})


def _metrics(network: str, values: PerExample, t: Array, method: Method) -> Metrics:
    """Means of the values per example, and the loss of `network` ('d' or 'g') by t."""

    def by_t(x: Array) -> Array:
        """Sums [T] of x [B] by t, divided by B. The ratio of two of them may be taken after averaging over batches."""
        return jnp.zeros(method.losses.schedule.num_steps).at[t].add(x) / x.shape[0]

    loss = values[f"{network}_loss"]
    means = {name: jnp.mean(value) for name, value in values.items() if name != "g_fake"}
    return means | {f"{network}_loss_by_t": by_t(loss), f"{network}_count_by_t": by_t(jnp.ones_like(loss))}
