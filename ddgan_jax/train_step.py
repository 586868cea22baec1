"""One training step: D, then G against the new D, then the moving average (Section 3.2, Appendix).

`draw` makes all random numbers of a step, `update` is a pure function of them, and `make_train_step` joins the two
for one replica. The step, on a batch of real x_0:

    1.  t, x_t, x_{t+1} real; x0_hat = G(x_{t+1}, t, z); fake x_t ~ q(x_t | x_{t+1}, x0_hat); step of D on (1) [+ (2)]
    2.  new t, x_{t+1}, z, posterior draw on the same x_0; step of G on (3)
    3.  ema = decay ema + (1 - decay) G

where (1) to (3) are the losses of losses.py. Two other objectives, for comparison (Section 5.2): with 'gaussian' step 1
is left out, and step 2 is on (5); with 'one_shot' G makes x_0 of pure noise at once, and diffusion is left with D, as
its augmentation: it tells real x_0 from G(x_T, 0, z) after both were diffused to x_t, and is shown no x_{t+1}. And
options, which are not in the paper either: with `mismatched` step 1 is on (1') instead of (1) (`mismatched_pair`); with
`moment` step 2 is on (6) too; with `d_lead` step 2 is the longer, the further D is ahead (`pace_of_g`).
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

from ddgan_jax import losses, parallel
from ddgan_jax.diffusion import Schedule, q_sample, q_sample_pair, sample_posterior
from ddgan_jax.state import Params, TrainState, apply_gradients, tree_norm, update_ema

Metrics = dict[str, Array]

OBJECTIVES = ("adversarial", "gaussian", "one_shot")


class PhaseDraws(struct.PyTreeNode):
    """The random numbers of one phase (D's or G's) for B examples of shape d."""

    t: Array  # [B] int32, uniform over 0..T-1
    noise_t: Array  # [B, *d] goes into x_t
    noise_tp1: Array  # [B, *d] goes into x_{t+1}
    z: Array  # [B, nz]
    noise_posterior: Array  # [B, *d] goes into the fake x_t
    dropout_keys: Array | None = None  # [B], where the generator has dropout


class Draws(struct.PyTreeNode):
    """The random numbers of a step."""

    flip: Array  # [B] bool, mirror the image?
    d: PhaseDraws
    g: PhaseDraws
    path_key: Array | None = None  # [] for the projections of (4), which belong to the batch


def draw(key: Array, indices: Array, num_steps: int, image_shape: tuple[int, ...], nz: int, dropout: bool) -> Draws:
    """All random numbers of a step for the examples `indices` [B] of the global batch, from (key, index) alone."""

    def phase(key: Array) -> PhaseDraws:
        t_key, t_noise_key, tp1_noise_key, z_key, posterior_key, dropout_key = jax.random.split(key, 6)
        return PhaseDraws(
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


@dataclasses.dataclass(frozen=True)
class Method:
    """What a step is made of: the networks as callables, the schedule, and the constants of training."""

    gen: Callable[..., Any]  # (params, x_{t+1}, t, z[, dropout_keys][, y=labels]) -> x0_hat
    disc: Callable[..., Any]  # (params, x_t, t, x_{t+1}[, y=labels][, axis_name=...]) -> logits [B]
    schedule: Schedule
    optimizer: optax.GradientTransformation
    lr_g: Callable[[Array], Array]  # step -> learning rate
    lr_d: Callable[[Array], Array]
    nz: int
    r1_gamma: float
    ema_decay: float
    flip: bool = False  # mirror half of the images
    dropout: bool = False  # does gen take dropout keys?
    objective: str = "adversarial"  # one of OBJECTIVES
    paths: losses.Paths | None = None  # train G by (4) instead of (3)
    accumulate: int = 1  # parts of a batch that are taken one after the other, for the memory of one
    scale: float = 1.0  # x_0 = scale * data, for points
    mismatched: float = 0.0  # weight of the mismatched pairs in D's loss; 0: none
    moment: float = 0.0  # weight of (6) in G's loss; 0: without
    d_lead: float = 0.0  # nats that D's loss must be below 2 ln 2 for G's whole learning rate; 0: always whole


def to_x0(images: Array, scale: float = 1.0) -> Array:
    """uint8 images [B, H, W, C] -> float32 in [-1, 1]; points [B, d] times `scale`."""
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images * scale


def bind(
    network: Callable[..., Any], params: Params, y: Array | None = None, axis_name: str | None = None
) -> Callable[..., Any]:
    """A network of a Method with its parameters, the labels [B] of its examples if it is conditional, and for D, which
    compares examples, the name of the axis of the replicas that they lie on."""
    given = {"y": y, "axis_name": axis_name}
    return partial(network, params, **{name: value for name, value in given.items() if value is not None})


def fake_pair(
    method: Method, gen_params: Params, x0: Array, draws: PhaseDraws, y: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(real x_t, fake x_t, x_{t+1}) from real x_0 [B, *d], what D is shown, and G's x0_hat."""
    if method.objective == "one_shot":
        x0_hat = _generate(method, gen_params, draws.noise_tp1, jnp.zeros_like(draws.t), draws, y)
        x_t, fake_x_t = (
            q_sample(method.schedule, x, draws.t, noise)
            for x, noise in ((x0, draws.noise_t), (x0_hat, draws.noise_posterior))
        )
        return x_t, fake_x_t, jnp.zeros_like(x_t), x0_hat
    x_t, x_tp1, x0_hat = predict(method, gen_params, x0, draws, y)
    return x_t, sample_posterior(method.schedule, x0_hat, x_tp1, draws.t, draws.noise_posterior), x_tp1, x0_hat


def predict(
    method: Method, gen_params: Params, x0: Array, draws: PhaseDraws, y: Array | None = None
) -> tuple[Array, Array, Array]:
    """(x_t, x_{t+1}, G's x0_hat) from real x_0 [B, *d]."""
    x_t, x_tp1 = q_sample_pair(method.schedule, x0, draws.t, draws.noise_t, draws.noise_tp1)
    return x_t, x_tp1, _generate(method, gen_params, x_tp1, draws.t, draws, y)


def _generate(method: Method, gen_params: Params, x_tp1: Array, t: Array, draws: PhaseDraws, y: Array | None) -> Array:
    keys = () if draws.dropout_keys is None else (draws.dropout_keys,)
    return bind(method.gen, gen_params, y)(x_tp1, t, draws.z, *keys)


def mismatched_pair(method: Method, other_x0: Array, x_tp1: Array, draws: PhaseDraws) -> tuple[Array, Array]:
    """(x_t', w) of (1'): x_t' ~ q(x_t | x_{t+1}, x_0') [B, *d] with the x_0' of another example, and its weight [B].

    The weight is 0 at t = T - 1, whose x_{t+1} is noise: it belongs to every image.
    """
    x_t = sample_posterior(method.schedule, other_x0, x_tp1, draws.t, draws.noise_posterior)
    return x_t, method.mismatched * (draws.t < method.schedule.num_steps - 1)


def in_parts(
    gradients: Callable[[Any], tuple[Params, losses.Parts]], examples: Any, num: int
) -> tuple[Params, losses.Parts]:
    """`gradients(examples)` -> (gradients of a mean, parts [B]) from `num` equal parts of them, one after the other.

    `examples` is a tree of arrays [B, ...], or None. The results are those of the whole to rounding, in the memory that
    one part takes.
    """
    if num == 1:
        return gradients(examples)
    split = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), examples)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split))[0]

    def add(total: Params, part: Any) -> tuple[Params, losses.Parts]:
        found, parts = gradients(part)
        return jax.tree.map(jnp.add, total, found), parts

    total, parts = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), split)
    return jax.tree.map(lambda g: g / num, total), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


def d_gradients(
    method: Method,
    state: TrainState,
    x0: Array,
    draws: PhaseDraws,
    with_r1: bool,
    y: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Params, losses.Parts]:
    """Phase 1: gradients of D's parameters, and the parts of its loss."""
    r1_gamma = method.r1_gamma if with_r1 else None
    with_mismatched = method.mismatched and method.schedule.num_steps > 1
    before = parallel.previous(x0, axis_name) if with_mismatched else None

    def gradients(examples: Any) -> tuple[Params, losses.Parts]:
        x0, draws, y, before = examples
        x_t, fake_x_t, x_tp1, _ = fake_pair(method, state.gen_params, x0, draws, y)
        mismatched = None if before is None else mismatched_pair(method, before, x_tp1, draws)

        def loss(params: Params) -> tuple[Array, losses.Parts]:
            disc = bind(method.disc, params, y, axis_name)
            return losses.d_loss(disc, x_t, draws.t, x_tp1, fake_x_t, r1_gamma, mismatched)

        return jax.grad(loss, has_aux=True)(state.disc_params)

    return in_parts(gradients, (x0, draws, y, before), method.accumulate)


def g_gradients(
    method: Method,
    state: TrainState,
    x0: Array,
    draws: PhaseDraws,
    y: Array | None = None,
    path_key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Params, losses.Parts]:
    """Phase 2: gradients of G's parameters through D, whose own get none, and the parts of its loss."""
    before = parallel.previous(draws.z, axis_name) if method.moment else None

    def gradients(examples: Any) -> tuple[Params, losses.Parts]:
        x0, draws, y, before = examples

        def loss(params: Params) -> tuple[Array, losses.Parts]:
            if method.objective == "gaussian":
                return losses.squared_error(x0, predict(method, params, x0, draws, y)[2])
            x_t, fake_x_t, x_tp1, x0_hat = fake_pair(method, params, x0, draws, y)
            disc = bind(method.disc, state.disc_params, y, axis_name)
            if method.paths is None:
                total, parts = losses.g_loss(disc, fake_x_t, draws.t, x_tp1)
            else:
                assert path_key is not None
                gather = partial(parallel.gather, axis_name=axis_name)
                total, parts = losses.rpsw_loss(disc, x_t, draws.t, x_tp1, fake_x_t, path_key, method.paths, gather)
            if before is not None:
                other_x0_hat = _generate(method, params, x_tp1, draws.t, draws.replace(z=before), y)
                moment, moment_parts = losses.moment_reconstruction(x0, x0_hat, other_x0_hat)
                total, parts = total + method.moment * moment, parts | moment_parts
            return total, parts

        return jax.grad(loss, has_aux=True)(state.gen_params)

    return in_parts(gradients, (x0, draws, y, before), method.accumulate)


def update_d(
    method: Method,
    state: TrainState,
    x0: Array,
    draws: PhaseDraws,
    with_r1: bool,
    axis_name: str | None = None,
    y: Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Phase 1 of `update`: the state with the new D."""
    grads, parts = d_gradients(method, state, x0, draws, with_r1, y, axis_name)
    metrics = {
        "d_loss": jnp.mean(parts["real_loss"] + parts["fake_loss"]),
        "d_real": jnp.mean(parts["real"]),
        "d_fake": jnp.mean(parts["fake"]),
        "d_loss_by_t": _sum_by_t(parts["real_loss"] + parts["fake_loss"], draws.t, method),
        "d_count_by_t": _sum_by_t(jnp.ones_like(parts["real"]), draws.t, method),
    }
    if "mismatched_loss" in parts:
        metrics["d_mismatched"] = jnp.mean(parts["mismatched_loss"])
        metrics["d_loss_of_pairs"] = 2 * jnp.mean(jax.nn.softplus(parts["fake"] - parts["real"]))
    if with_r1:
        metrics["r1"] = method.r1_gamma / 2 * jnp.mean(parts["grad_norm_sq"])
    grads, metrics = parallel.mean((grads, metrics), axis_name)
    lr_d = method.lr_d(state.step)
    disc_params, disc_opt = apply_gradients(method.optimizer, grads, state.disc_opt, state.disc_params, lr_d)
    metrics |= {"d_grad_norm": tree_norm(grads), "d_param_norm": tree_norm(disc_params), "lr_d": lr_d}
    return state.replace(disc_params=disc_params, disc_opt=disc_opt), metrics


def update_g(
    method: Method,
    state: TrainState,
    x0: Array,
    draws: PhaseDraws,
    axis_name: str | None = None,
    y: Array | None = None,
    path_key: Array | None = None,
    pace: Array | float = 1.0,
) -> tuple[TrainState, Metrics]:
    """Phases 2 and 3 of `update`: the state with the new G, `pace` times the learning rate, and its moving average,
    one step on."""
    grads, parts = g_gradients(method, state, x0, draws, y, path_key, axis_name)
    metrics = {
        "g_loss": jnp.mean(parts["fake_loss"]),
        "g_loss_by_t": _sum_by_t(parts["fake_loss"], draws.t, method),
        "g_count_by_t": _sum_by_t(jnp.ones_like(parts["fake_loss"]), draws.t, method),
    }
    if "moment_error" in parts:
        metrics["g_moment_error"] = jnp.mean(parts["moment_error"])
    grads, metrics = parallel.mean((grads, metrics), axis_name)
    lr_g = method.lr_g(state.step) * pace
    gen_params, gen_opt = apply_gradients(method.optimizer, grads, state.gen_opt, state.gen_params, lr_g)
    metrics |= {"g_grad_norm": tree_norm(grads), "g_param_norm": tree_norm(gen_params), "lr_g": lr_g}
    state = state.replace(
        step=state.step + 1,
        gen_params=gen_params,
        gen_opt=gen_opt,
        ema_params=update_ema(state.ema_params, gen_params, state.step, method.ema_decay),
    )
    return state, metrics


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
    pace: Array | float = 1.0
    if method.objective != "gaussian":
        state, metrics = update_d(method, state, x0, draws.d, with_r1, axis_name, y)
        if method.d_lead:
            pace = pace_of_g(metrics.get("d_loss_of_pairs", metrics["d_loss"]), method.d_lead)
    state, g_metrics = update_g(method, state, x0, draws.g, axis_name, y, draws.path_key, pace)
    return state, metrics | g_metrics


def pace_of_g(d_loss: Array, d_lead: float) -> Array:
    """The share of its learning rate that G moves at: 1 where D's loss is `d_lead` below that of guessing, 0 above it.

    Not in the paper. A discriminator that guesses, with loss 2 ln 2, tells G nothing, and once it is there it stays for
    a thousand steps; while it waits for D, G does not drift. Mismatched pairs lower the logits of real and fake x_t
    alike, by as much as log(1 + w), which is no lost lead: with them `d_loss` is 2 E[softplus(l_fake - l_real)], in
    which only the difference counts. It is 2 ln 2 for guessing as well.
    """
    return jnp.clip((2 * jnp.log(2.0) - d_loss) / d_lead, 0, 1)


def _sum_by_t(values: Array, t: Array, method: Method) -> Array:
    """[B] values summed apart for every t, over B: [T]. The ratio of two such sums is a mean that averages rightly."""
    return jnp.zeros(method.schedule.num_steps).at[t].add(values) / values.shape[0]


def step_draws(method: Method, seed: int, step: Array, x0: Array, axis_name: str | None = None) -> Draws:
    """The random numbers of training step `step` for this replica's x_0 [B, *d], from the seed and the step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    indices = parallel.global_indices(x0.shape[0], axis_name)
    draws = draw(key, indices, method.schedule.num_steps, x0.shape[1:], method.nz, method.dropout)
    if method.paths is not None:
        draws = draws.replace(path_key=jax.random.fold_in(key, 2**31 - 1))  # no example has this index
    return draws


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
