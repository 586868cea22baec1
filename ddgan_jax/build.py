"""From a configuration to networks, schedule, optimizer and step functions: the only reader of configurations.

A configuration is anything with the fields of `configs/digits.py`: an ml_collections.ConfigDict, or the nested dict
that lies beside a checkpoint. Importing this needs no ml_collections.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax import automatic, parallel, state, train_step
from ddgan_jax.data import sources
from ddgan_jax.diffusion import Schedule
from ddgan_jax.errors import UserError
from ddgan_jax.models.discriminator import STDDEV_GROUP, Discriminator, preset
from ddgan_jax.models.generator import Generator
from ddgan_jax.models.mlp import PointDiscriminator, PointGenerator
from ddgan_jax.objectives import Objective
from ddgan_jax.objectives.ddgan import DDGAN
from ddgan_jax.objectives.gaussian import Gaussian
from ddgan_jax.objectives.mismatched import Mismatched
from ddgan_jax.objectives.moment import Moment
from ddgan_jax.objectives.one_shot import OneShot
from ddgan_jax.objectives.pace import pace_of_g
from ddgan_jax.objectives.rpsw import Paths, Rpsw
from ddgan_jax.train_step import Method

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Built:
    """Everything that a configuration describes, as plain objects."""

    method: Method
    image_shape: tuple[int, ...]  # [H, W, C], or [d] for points
    init_gen: Callable[[jax.Array], Any]  # key -> parameters
    init_disc: Callable[[jax.Array], Any]
    batch_size: int  # global
    seed: int
    num_classes: int = 0  # 0: unconditional

    @property
    def schedule(self) -> Schedule:
        """The coefficients of sampling: the diffusion's, or one step for a generator that was trained for one."""
        return Schedule.create(1) if self.method.objective.at_once else self.method.schedule

    def init_state(self) -> state.TrainState:
        """The state before the first step, a function of the seed alone. Jit it."""
        gen_key, disc_key = jax.random.split(jax.random.key(self.seed))
        return state.create(self.init_gen(gen_key), self.init_disc(disc_key), self.method.optimizer)

    def step(self, with_r1: bool, axis_name: str | None = parallel.AXIS) -> Callable:
        """The training step of one replica, for `parallel.map_step`; with axis_name=None of a device by itself."""
        return train_step.make_train_step(self.method, self.seed, with_r1, axis_name)


# What checkpoints may be older than: the fields, and how it was before them.
NEW_FIELDS: dict[str, Any] = {
    "objective": "adversarial",
    "data": {"scale": 1.0},
    "model": {"num_classes": 0, "data_std": 0.0},
    "loss": {"generator": "nonsaturating", "mismatched": 0.0, "moment": 0.0},
    "train": {"lr_decay_steps": 0, "lr_min_d": 0.0, "d_lead": 0.0, "init_from": "", "accumulate": 1},
    "log": {"tensorboard": True},
}


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain dicts, with tuples as lists, as JSON would have it, and with all NEW_FIELDS."""
    plain = _plain(config)
    for name, value in NEW_FIELDS.items():
        if isinstance(value, dict):
            plain[name] = (given := plain.get(name, {})) | {k: v for k, v in value.items() if k not in given}
        else:
            plain.setdefault(name, value)
    return plain


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def open_data(config: Any) -> sources.Data:
    """The images or points that `config.data` names. UserError if they are not there or do not fit."""
    return sources.open_data(**_of_data(as_dict(config)))


def _of_data(c: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `sources.open_data` and `sources.look`."""
    return {name: value for name, value in c["data"].items() if name not in ("flip", "scale")}  # on the device


def settle(config: Any, data: sources.Data | None = None) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run with everything that they leave to the data, and what to say about it, a sentence each.

    The data is looked at, not decoded, so that `build` can refuse what does not go together before the work begins;
    `data` is used instead of what `config.data` names. UserError if the data is not there or does not fit.
    """
    c = as_dict(config)
    if not automatic.leaves_open(c):
        return c, []
    if data is None:
        seen = sources.look(**_of_data(c))
    else:
        seen = sources.Look(len(data.images), tuple(data.images.shape[1:]), data.labels is not None)
    if len(seen.shape) == 3:
        c["data"]["image_size"] = c["data"]["image_size"] or seen.shape[0]
        c["data"]["channels"] = c["data"]["channels"] or seen.shape[2]
    return automatic.choose(c, seen.num_examples, seen.labelled, jax.device_count())


def labels_of(data: sources.Data, num_classes: int, name: str) -> np.ndarray | None:
    """The labels [N] int32 of the set `name` for a model of `num_classes`, or None for 0.

    UserError unless it has so many classes.
    """
    if not num_classes:
        return None
    if data.labels is None:
        raise UserError(f"model.num_classes={num_classes}, but dataset {name} has no labels: set it to 0")
    labels = data.labels()
    classes = len(data.classes) or int(labels.max()) + 1
    if num_classes != classes:
        raise UserError(f"model.num_classes={num_classes}, but dataset {name} has {classes} classes: set it to that")
    return labels


def _unet(c: Mapping[str, Any], dtype: Any, schedule: Schedule) -> tuple[Generator, Discriminator, tuple[int, ...]]:
    """The networks of the paper, for images."""
    size, channels = c["data"]["image_size"], c["data"]["channels"]
    halvings = len(c["generator"]["ch_mult"]) - 1
    if size < 2**halvings or size % 2**halvings:
        raise UserError(
            f"data.image_size={size} does not halve {halvings} times, as the {halvings + 1} levels of "
            f"generator.ch_mult need: choose a multiple of {2**halvings}, or fewer levels"
        )
    both = {"dtype": dtype, "num_classes": c["model"]["num_classes"]}
    generator = Generator(image_channels=channels, remat=c["model"]["remat"], **both, **_tuples(c["generator"]))
    discriminator = Discriminator(**both, **(preset(size) | _tuples(c["discriminator"])))
    return generator, discriminator, (size, size, channels)


def _mlp(
    c: Mapping[str, Any], dtype: Any, schedule: Schedule
) -> tuple[PointGenerator, PointDiscriminator, tuple[int, ...]]:
    """Fully connected networks, for points."""
    if c["data"]["flip"]:
        raise UserError("data.flip=True mirrors images, and points are none: set it to False")
    if classes := c["model"]["num_classes"]:
        raise UserError(f"model.num_classes={classes}: networks for points are unconditional, set it to 0")
    dim, std = c["data"]["channels"], c["model"]["data_std"] * c["data"]["scale"]
    levels = np.sqrt(schedule.a_s_cum**2 * std**2 + schedule.sigmas_cum**2).tolist() if std else ()
    both = {"dtype": dtype, "levels": tuple(levels)}
    return PointGenerator(dim=dim, **both, **c["generator"]), PointDiscriminator(**both, **c["discriminator"]), (dim,)


NETWORKS: dict[str, Callable[..., tuple[Any, Any, tuple[int, ...]]]] = {"unet": _unet, "mlp": _mlp}


OBJECTIVES: dict[str, Callable[[float], Objective]] = {  # by R1's gamma
    "adversarial": DDGAN,
    "gaussian": lambda r1_gamma: Gaussian(),
    "one_shot": OneShot,
}


def _objective(name: str, r1_gamma: float, loss: Mapping[str, Any]) -> Objective:
    """The objective, with what the settings add to it."""
    objective = OBJECTIVES[name](r1_gamma)
    if not objective.trains_disc:
        return objective
    if loss["generator"] == "rpsw":
        objective = Rpsw(objective, Paths(loss["projections"], loss["kappa"]))
    if loss["mismatched"]:
        objective = Mismatched(objective, loss["mismatched"])
    return Moment(objective, loss["moment"]) if loss["moment"] else objective


def build(config: Any) -> Built:
    """Build what `config` describes. Raises UserError for settings that do not go together."""
    c: Mapping[str, Any] = as_dict(config)
    scale, loss, num_classes = c["data"]["scale"], c["loss"], c["model"]["num_classes"]
    for name, value, known in (
        ("model.network", c["model"]["network"], NETWORKS),
        ("model.dtype", c["model"]["dtype"], DTYPES),
        ("objective", c["objective"], OBJECTIVES),
        ("loss.generator", loss["generator"], ("nonsaturating", "rpsw")),
    ):
        if value not in known:
            raise UserError(f"{name}={value!r} is not supported: it is {' or '.join(known)}")
    if not scale > 0 or (scale != 1 and c["model"]["network"] != "mlp"):
        raise UserError(f"data.scale={scale} is for points, and above 0: images are in [-1, 1], leave it at 1.0")
    if num_classes < 0:
        raise UserError(f"model.num_classes={num_classes} must be 0, for unconditional networks, or more")
    train = c["train"]
    for name in ("num_steps", "batch_size", "accumulate", "r1_every", "steps_per_epoch"):
        if train[name] < 1:
            raise UserError(f"train.{name}={train[name]} must be at least 1")
    if train["accumulate"] > 1 and loss["generator"] == "rpsw":
        raise UserError("loss.generator='rpsw' compares the whole batch at once: set train.accumulate to 1")
    if train["d_lead"] < 0:
        raise UserError(f"train.d_lead={train['d_lead']} must be 0, to leave the learning rate alone, or more")
    if loss["mismatched"] < 0:
        raise UserError(f"loss.mismatched={loss['mismatched']} must be 0, for no mismatched pairs, or more")
    if loss["mismatched"] and c["objective"] == "one_shot":
        raise UserError("loss.mismatched is for pairs, and objective='one_shot' shows D no x_{t+1}: set it to 0")
    if loss["moment"] < 0:
        raise UserError(f"loss.moment={loss['moment']} must be 0, to leave G's mean alone, or more")
    if loss["moment"] and c["objective"] != "adversarial":
        raise UserError(f"loss.moment is for objective='adversarial', not {c['objective']!r}: set it to 0")
    if train["lr_decay_steps"] < 0:
        raise UserError(f"train.lr_decay_steps={train['lr_decay_steps']} must be 0, for train.num_steps, or more")
    schedule = Schedule.create(**c["diffusion"])
    generator, discriminator, shape = NETWORKS[c["model"]["network"]](c, DTYPES[c["model"]["dtype"]], schedule)

    def rate(base: float, own_floor: float) -> Callable[[jax.Array], jax.Array]:
        if not train["lr_decay"]:
            return state.constant_schedule(base)
        epochs = -(-(train["lr_decay_steps"] or train["num_steps"]) // train["steps_per_epoch"])
        return state.cosine_schedule(base, train["steps_per_epoch"], epochs, min(own_floor or train["lr_min"], base))

    method = Method(
        gen=jax.jit(lambda params, *args, **labels: generator.apply({"params": params}, *args, **labels)),
        disc=jax.jit(
            lambda params, *args, **more: discriminator.apply({"params": params}, *args, **more),
            static_argnames="axis_name",
        ),
        schedule=schedule,
        objective=_objective(c["objective"], train["r1_gamma"], loss),
        optimizer=state.adam(train["adam_b1"], train["adam_b2"]),
        lr_g=rate(train["lr_g"], 0.0),
        lr_d=rate(train["lr_d"], train["lr_min_d"]),
        nz=generator.nz,
        ema_decay=train["ema_decay"],
        pace=functools.partial(pace_of_g, d_lead=train["d_lead"]) if train["d_lead"] else None,
        flip=c["data"]["flip"],
        dropout=getattr(generator, "dropout", 0) > 0,
        accumulate=train["accumulate"],
        scale=scale,
    )
    x, t, z = jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32), jnp.zeros((1, generator.nz))
    labels = {"y": t} if num_classes else {}
    return Built(
        method=method,
        image_shape=shape,
        init_gen=lambda key: generator.init(key, x, t, z, **labels)["params"],
        init_disc=lambda key: discriminator.init(key, x, t, x, **labels)["params"],
        batch_size=train["batch_size"],
        seed=c["seed"],
        num_classes=num_classes,
    )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, which linen can hash."""
    return {name: _frozen(value) for name, value in fields.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def check_batch(batch_size: int, accumulate: int = 1) -> int:
    """The batch of one device; UserError unless the global batch divides by the devices and into groups of four.

    A group may lie on neighbouring devices. Of the `accumulate` parts of a device's batch each must hold whole groups.
    """
    devices = jax.device_count()
    several = f"{devices} device{'s' * (devices > 1)}"
    if batch_size < devices:
        raise UserError(
            f"train.batch_size={batch_size} is smaller than the {several}: choose a multiple of "
            f"{math.lcm(devices, STDDEV_GROUP)}, or show the program no more than {batch_size} devices"
        )
    per_device, rest = divmod(batch_size, devices)
    if rest or (batch_size > STDDEV_GROUP and batch_size % STDDEV_GROUP):
        raise UserError(
            f"train.batch_size={batch_size} does not divide by {several} and into groups of {STDDEV_GROUP} images, "
            f"which the discriminator compares: choose a multiple of {math.lcm(devices, STDDEV_GROUP)}"
        )
    if accumulate > 1 and per_device % (accumulate * STDDEV_GROUP):
        most = [n for n in range(1, per_device + 1) if per_device % (n * STDDEV_GROUP) == 0]
        raise UserError(
            f"train.accumulate={accumulate} does not cut the {per_device} images of a device into equal parts of whole "
            f"groups of {STDDEV_GROUP}: choose {' or '.join(map(str, most)) if most else 1}"
        )
    return per_device
