"""From a configuration to its Method: networks, losses, optimizer and learning rates.

`denoiser` builds only what sampling needs, `build` everything that training needs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from ddgan_jax.config.check import checked_fields
from ddgan_jax.config.settings import Config, read, required
from ddgan_jax.errors import UserError
from ddgan_jax.method import state
from ddgan_jax.method.diffusion import Schedule, no_posterior, sample_posterior, x0_from_noise
from ddgan_jax.method.losses import Losses
from ddgan_jax.method.sampling import Denoiser
from ddgan_jax.method.train_step import Method
from ddgan_jax.networks.discriminator import Discriminator, preset
from ddgan_jax.networks.generator import Generator
from ddgan_jax.networks.mlp import PointDiscriminator, PointGenerator

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DEEPEST = 16  # positions a side at the generator's last level; the paper's networks have 4 and 8


# --- A generator ----------------------------------------------------------------------------------------------------


def denoiser(config: Any) -> Denoiser:
    """The generator that `config` describes, without anything that only training needs.

    Raises UserError for settings that exclude each other, or if the image size or the channels are not set.
    """
    c = read(config)
    generator, shape, diffusion = generator_of(c), _shape(c), _diffusion(c)
    x, t, z = jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32), jnp.zeros((1, generator.nz))
    labels = {"y": t} if c.model.num_classes else {}

    @jax.jit
    def gen(params: Any, x_tp1: Array, t: Array, *args: Array, **labels: Array) -> Any:
        output = generator.apply({"params": params}, x_tp1, t, *args, **labels)
        return x0_from_noise(diffusion, output, x_tp1, t) if c.diffusion.predicts == "noise" else output

    return Denoiser(
        gen=gen,
        init_gen=lambda key: generator.init(key, x, t, z, **labels)["params"],
        schedule=Schedule.create(1) if c.objective == "one_shot" else diffusion,
        image_shape=shape,
        nz=generator.nz,
        num_classes=c.model.num_classes,
        scale=c.data.scale,
        predicts_x_t=c.diffusion.predicts == "x_t",
    )


def _diffusion(c: Config) -> Schedule:
    d = c.diffusion
    return Schedule.create(d.num_steps, d.kind, d.beta_min, required(d.beta_max, "diffusion.beta_max"))


def _shape(c: Config) -> tuple[int, ...]:
    channels = required(c.data.channels, "data.channels")
    if c.model.network == "mlp":
        return (channels,)
    size = required(c.data.image_size, "data.image_size")
    return size, size, channels


def generator_of(c: Config) -> Any:
    """The generator's module: the paper's U-Net for images, fully connected for points.

    Raises UserError for invalid fields, or an image size that the levels do not divide.
    """
    common = {"dtype": DTYPES[c.model.dtype]}
    given = _network_fields(PointGenerator if c.model.network == "mlp" else Generator, c.generator, "generator.")
    if c.model.network == "mlp":
        return PointGenerator(dim=_shape(c)[0], levels=_levels(c), **common, **given)
    (size, _, channels), patch = _shape(c), c.model.patch_size
    halvings = len(given.get("ch_mult", Generator.ch_mult)) - 1
    if size % (part := patch * 2**halvings):
        raise UserError(
            f"data.image_size={size} does not halve {halvings} times, as the {halvings + 1} levels of "
            f"generator.ch_mult need{f' with model.patch_size={patch}' if patch > 1 else ''}: choose a multiple of "
            f"{part}, or fewer levels"
        )
    common |= {"num_classes": c.model.num_classes, "patch_size": patch, "image_channels": channels}
    given = {"tanh": c.diffusion.predicts == "x_0"} | given
    return Generator(remat=c.model.remat, **common, **given)


def notes_on_levels(c: Config) -> list[str]:
    """Notes where the levels of the U-Net do not suit the image size: too few, or not those that attention names."""
    generator = generator_of(c)
    if not isinstance(generator, Generator):
        return []
    size = _shape(c)[0]
    levels = [size // c.model.patch_size // 2**i for i in range(len(generator.ch_mult))]
    notes = []
    if levels[-1] > DEEPEST:
        notes.append(
            f"note: at {size} px, the generator's {len(levels)} levels end at {levels[-1]}x{levels[-1]} positions and "
            "take much memory: add levels to generator.ch_mult, as configs/image_folder.py:large has, or set a smaller "
            "data.image_size"
        )
    if missed := [str(resolution) for resolution in generator.attn_resolutions if resolution not in levels]:
        at, has = ", ".join(missed), ", ".join(map(str, levels))
        notes.append(f"note: generator.attn_resolutions has no effect at {at}: the levels of this network are {has}")
    return notes


def _discriminator(c: Config) -> Any:
    """The discriminator's module. Raises UserError for invalid fields."""
    common = {"dtype": DTYPES[c.model.dtype]}
    if c.model.network == "mlp":
        given = _network_fields(PointDiscriminator, c.discriminator, "discriminator.")
        return PointDiscriminator(levels=_levels(c), **common, **given)
    given = _network_fields(Discriminator, c.discriminator, "discriminator.")
    common |= {"num_classes": c.model.num_classes, "patch_size": c.model.patch_size}
    return Discriminator(**common, **(preset(_shape(c)[0] // c.model.patch_size) | given))


# Fields of the networks that other groups of the configuration set, and flax's own
_NOT_IN_GROUP = ("parent", "name", "dtype", "image_channels", "num_classes", "patch_size", "remat", "dim", "levels")


def _network_fields(network: type[nn.Module], given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return checked_fields(network, given, prefix, _NOT_IN_GROUP)


def network_fields(c: Config) -> dict[str, Any]:
    """The fields of both networks with their defaults, as 'generator.nf', and what the generator predicts.

    A trained network must keep them. Precision, recomputation and dropout may change: they are no property of the
    trained parameters.
    """
    free = ("parent", "name", "dtype", "remat", "dropout")
    return {"diffusion.predicts": c.diffusion.predicts} | {
        f"{group}.{field.name}": getattr(module, field.name)
        for group, module in (("generator", generator_of(c)), ("discriminator", _discriminator(c)))
        for field in dataclasses.fields(module)
        if field.name not in free
    }


def _levels(c: Config) -> tuple[float, ...]:
    """Standard deviations of x_0, ..., x_T for points with standard deviation `model.data_std`; () if it is not set."""
    if c.model.data_std is None:
        return ()
    schedule, std = _diffusion(c), c.model.data_std * c.data.scale
    return tuple(np.sqrt(schedule.a_s_cum**2 * std**2 + schedule.sigmas_cum**2).tolist())


# --- Training -------------------------------------------------------------------------------------------------------


def build(config: Any) -> Method:
    """The training method that `config` describes. Raises UserError for settings that exclude each other."""
    c = read(config)
    train, generates, discriminator = c.train, denoiser(c), _discriminator(c)
    num_steps = required(train.num_steps, "train.num_steps")
    per_epoch = required(train.steps_per_epoch, "train.steps_per_epoch")
    epochs = -(-(train.lr_decay_steps or num_steps) // per_epoch)

    def decaying(start: float, end: float) -> state.StepSchedule:
        return state.cosine_schedule(start, per_epoch, epochs, end)

    def rate(base: float, floor: float) -> state.StepSchedule:
        return decaying(base, min(floor, base)) if train.lr_decay else state.constant_schedule(base)

    x, t = jnp.zeros((1, *generates.image_shape)), jnp.zeros(1, jnp.int32)
    labels = {"y": t} if generates.num_classes else {}
    return Method(
        denoiser=generates,
        disc=jax.jit(
            lambda params, *args, **more: discriminator.apply({"params": params}, *args, **more),
            static_argnames="axis_name",
        ),
        init_disc=lambda key: discriminator.init(key, x, t, x, **labels)["params"],
        losses=_losses(c, decaying),
        optimizer=optax.scale_by_adam(train.adam_b1, train.adam_b2),
        lr_g=rate(train.lr_g, train.lr_min),
        lr_d=rate(train.lr_d, train.lr_min_d or train.lr_min),
        ema_decay=train.ema_decay,
        batch_size=required(train.batch_size, "train.batch_size"),
        flip=c.data.flip,
        dropout=c.generator.get("dropout", 0) > 0,
        accumulate=train.accumulate,
    )


def init_state(method: Method, seed: int) -> state.TrainState:
    """The state before the first step, which depends on the seed alone. Call it under jit."""
    gen_key, disc_key = jax.random.split(jax.random.key(seed))
    return state.create(method.denoiser.init_gen(gen_key), method.init_disc(disc_key), method.optimizer)


def noise_seed(c: Config) -> int:
    """The seed of the training steps' noise: `seed`, or a function of it and of `train.noise_seed` if that is not 0."""
    if not c.train.noise_seed:
        return c.seed
    return int(np.random.SeedSequence((c.seed, c.train.noise_seed)).generate_state(1)[0])


def _losses(c: Config, decaying: Callable[[float, float], state.StepSchedule]) -> Losses:
    """The selected losses; `decaying` makes a weight that decays as the learning rates do."""
    weight, end = c.loss.reconstruction, c.loss.reconstruction_end
    return Losses(
        schedule=_diffusion(c),
        r1_gamma=c.train.r1_gamma,
        objective=c.objective,
        discriminator_input=c.loss.discriminator_input,
        posterior=no_posterior if c.diffusion.predicts == "x_t" else sample_posterior,
        reconstruction=(state.constant_schedule(weight) if end is None else decaying(weight, end)) if weight else None,
    )
