"""A run's settings: every field with its type, its range, its default and the source of that.

A `Config` is made once, by `read`, from what a file of `configs/` returns or from the JSON beside a checkpoint. The
defaults are the paper's for CIFAR-10, "(paper)" says where it gives the value and "(released code)" where only its
implementation does. `None` means "not set"; where a field may be None, 0 and '' are read as None, since a command line
cannot say None, and checkpoints from before had no None.
"""

import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np

from ddgan_jax.errors import UserError

Number = TypeVar("Number", int, float)


class Range(NamedTuple):
    """What a number must be, and how an error says it."""

    holds: Callable[[Any], bool]
    text: str


def _at_most(most: int) -> Range:
    return Range(lambda n: n <= most, f"an integer of at most {most}")


Positive = Annotated[int, Range(lambda n: n >= 1, "an integer of at least 1"), _at_most(2**31 - 1)]
Count = Annotated[int, Range(lambda n: n >= 0, "an integer of at least 0"), _at_most(2**31 - 1)]
TwoOrMore = Annotated[int, Range(lambda n: n >= 2, "an integer of at least 2")]
Width = Annotated[Positive, _at_most(16_384)]
Latents = Annotated[Count, _at_most(16_384)]
Layers = Annotated[Count, _at_most(1_000)]
Blocks = Annotated[Positive, _at_most(1_000)]
PositiveFloat = Annotated[float, Range(lambda x: x > 0, "a number above 0")]
Scale = Annotated[float, Range(lambda x: 1e-9 <= x <= 1e9, "a number from 1e-9 to 1e9")]
Weight = Annotated[float, Range(lambda x: x >= 0, "a number of at least 0")]
Share = Annotated[float, Range(lambda x: 0 <= x <= 1, "a number from 0 to 1")]
Below1 = Annotated[float, Range(lambda x: 0 <= x < 1, "a number of at least 0 and below 1")]

MAX_SEED = 2**32 - 1  # what 32 unsigned bits hold
SEEDS = Range(lambda n: 0 <= n <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")
Positives = Annotated[
    Sequence[int], Range(lambda ns: all(type(n) is int and 1 <= n < 2**31 for n in ns), "integers of at least 1")
]


def _is_kernel(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) for value in values) and 0 < abs(sum(values)) < math.inf


Kernel = Annotated[Sequence[float], Range(_is_kernel, "numbers whose sum is not 0")]  # which they are divided by
Octaves = Annotated[Layers, _at_most(31)]
LARGEST = float(np.finfo(np.float32).max)  # what networks compute with


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Dataset of images, or of points."""

    name: str = "cifar10"  # a dataset of tfds, or one listed in docs/data.md
    split: str = "train"  # the split, or a part of it: 'train[:90%]'
    dir: str | None = None  # of tfds and prepared copies; None: TFDS_DATA_DIR or ~/tensorflow_datasets
    image_size: Annotated[Positive, _at_most(4096)] | None = None  # None: from the dataset; from a folder, at most 256
    channels: Annotated[Positive, _at_most(64)] | None = None  # None: from the dataset
    path: str | None = None  # for 'image_folder' and 'lsun_church': a folder, zip or LMDB; also gs://
    max_bad_share: Share = 0.01  # fraction of the files in `path` that may be skipped as damaged
    in_memory_mib: Count = 2048  # MiB; a larger dataset is decoded while it is read, not at the start
    flip: bool = True  # mirror half of the images (released code)
    scale: Scale = 1.0  # for points: x_0 = scale * data, with unchanged noise


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule, the arguments of `Schedule.create`."""

    num_steps: Annotated[Positive, _at_most(100_000)] = 4  # T, the denoising steps (paper)
    kind: Literal["vp", "geometric"] = "vp"  # variance-preserving noise (paper), or geometric
    beta_min: PositiveFloat = 0.1  # smallest noise (paper)
    beta_max: PositiveFloat | None = 20.0  # largest noise (paper); None: resolved from the image size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings of both networks."""

    network: Literal["unet", "mlp"] = "unet"  # 'unet' for images, 'mlp' (fully connected) for points
    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and dense layers
    patch_size: Positive = 1  # side of the square of pixels that the networks take as one position (paper: 1)
    data_std: Scale | None = None  # for points: standard deviation that normalises the networks' input
    num_classes: Count = 0  # above 0: class-conditional networks (not in the paper)
    remat: bool = False  # recompute G's blocks in the backward pass: less memory, about a third more work


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimizers, and length of the training."""

    init_from: str | None = None  # workdir, checkpoint or .pth file that initializes the networks of a new run
    num_steps: Positive | None = 351_000  # 1800 epochs (paper) of 195 steps; None: resolved from the dataset
    batch_size: Positive | None = 256  # of all devices together: 4 GPUs x 64 (paper); None: resolved from the dataset
    accumulate: Positive = 1  # parts of a device's batch, computed one after another to save memory
    lr_g: Weight = 1.6e-4  # learning rate of the generator (paper)
    lr_d: Weight = 1.25e-4  # learning rate of the discriminator (paper)
    lr_decay: bool = True  # cosine decay to lr_min (paper)
    lr_decay_steps: Positive | None = None  # length of the decay, constant afterwards; None: num_steps (paper)
    lr_min: Weight = 1e-5  # final learning rate (released code)
    lr_min_d: PositiveFloat | None = None  # final rate of the discriminator; None: lr_min (released code)
    steps_per_epoch: Positive | None = 195  # steps between changes of the rates (released code); None: an epoch
    adam_b1: Below1 = 0.5  # decay of the first moment (paper)
    adam_b2: Below1 = 0.9  # decay of the second moment (paper)
    r1_gamma: Weight = 0.02  # coefficient of R1 (paper)
    r1_every: Positive = 15  # steps between applications of R1, lazy regularization (paper)
    ema_decay: Share = 0.9999  # of the moving average of G's weights (paper)
    noise_seed: Count = 0  # above 0: different noise, to pass a step whose loss is not finite


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Additions to the paper's losses, off by default."""

    shown: Literal["x_t", "x_0"] = "x_t"  # the discriminator's input besides x_{t+1} (paper: x_t)
    reconstruction: Weight = 0.0  # weight of the SNR-weighted squared error of x_0 in the generator's loss
    reconstruction_end: Weight | None = None  # final value of that weight, by a cosine; None: constant weight


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, and how many of them are kept."""

    every: Positive | None = 5_000  # steps between checkpoints; None: about a fiftieth of the training
    keep: Positive = 3  # number of last checkpoints that are kept
    keep_period: Count = 50_000  # also keep every multiple of this permanently; 0: none


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Metrics and grids of samples."""

    every: Positive = 100  # steps between records of metrics
    tensorboard: bool | None = None  # write TensorBoard files; None: if clu is installed
    wandb: str | None = None  # project of Weights & Biases that also gets the metrics
    samples_every: Count | None = 5_000  # steps between grids; None: about a fiftieth of the training; 0: no grid


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling."""

    batch_size: Positive = 64  # samples per device and batch; halved if memory runs out
    grid: Annotated[Positive, _at_most(65_536)] = 64  # samples in a grid


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of samples."""

    features: Literal["inception", "classifier", "points"] = "inception"  # 'classifier' is for small images
    num_samples: TwoOrMore = 50_000  # samples that are evaluated (paper)
    reference_samples: Positive | None = None  # real images to compare with; None: all
    reference_statistics: str | None = None  # .npz file with mu and sigma of real images, for FID
    manifold_samples: Positive = 50_000  # largest number of samples, and of real images, for precision and recall
    k: Positive = 3  # nearest neighbours in precision and recall (Kynkäänniemi et al. 2019)
    batch_size: Positive = 64  # images per device and batch of a feature network
    inception_weights: str | None = None  # None: pt_inception-2015-12-05-6726825d.pth in data.dir
    vgg_weights: str | None = None  # None: vgg16-397923af.pth in data.dir
    every: Count = 0  # steps between evaluations during training; 0: none
    online_samples: TwoOrMore = 1_000  # samples per evaluation during training


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: Annotated[int, SEEDS] = 0  # seed of weights, noise, and the order of the images
    objective: Literal["adversarial", "gaussian", "one_shot"] = "adversarial"  # (paper); 'gaussian' and 'one_shot'
    # are baselines: squared error of x_0 without a discriminator, and a one-step GAN that discriminates diffused images
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    model: ModelConfig = ModelConfig()
    generator: Mapping[str, Any] = field(  # Fields of `Generator`, or of `PointGenerator` for points
        default_factory=lambda: {
            "nf": 128,  # initial channels (paper)
            "ch_mult": (1, 2, 2, 2),  # channel multipliers (paper)
            "num_res_blocks": 2,  # residual blocks per resolution (paper)
            "attn_resolutions": (16,),  # resolutions with attention, in pixels (paper)
            "nz": 100,  # dimension of z; 0: no z (paper)
            "z_emb_dim": 256,  # width of the mapping of z (paper)
            "n_mlp": 4,  # layers of the mapping of z (paper)
            "dropout": 0.0,  # dropout rate (released code)
        }
    )
    discriminator: Mapping[str, Any] = field(  # Fields of `Discriminator`, or of `PointDiscriminator`
        default_factory=lambda: {
            "ngf": 64,  # initial channels; the number of stages follows from the image size (released code)
            "t_emb_dim": 256,  # width of the embedding of t (released code)
        }
    )
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self) -> None:
        _check_together(self)


REMOVED = {  # settings that are gone, which checkpoints from before still name, and what switched them off
    "train.d_lead": 0.0,
    "loss.generator": "nonsaturating",
    "loss.mismatched": 0.0,
    "loss.moment": 0.0,
    "loss.projections": 1_000,
    "loss.kappa": 50.0,
}


def read(config: Any) -> Config:
    """The Config in an ml_collections.ConfigDict or in nested dicts, such as JSON's; fields that it lacks are defaults.

    Raises UserError that names a field and what it must be, or settings that do not go together.
    """
    if isinstance(config, Config):
        return config
    return _read(Config, _plain(config), "")


def as_dict(config: Any) -> dict[str, Any]:
    """What `read` reads, as nested plain dicts with every field, as JSON has them: tuples are lists."""
    return _lists(dataclasses.asdict(read(config)))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {'train.batch_size': 32}."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def chosen(value: Number | None, name: str) -> Number:
    """A number that is set, or was chosen for the data by `data.resolve.resolve_from_data`. UserError if it is None."""
    if value is None:
        raise UserError(f"{name} is not set, and nothing chose it for the data: name a number")
    return value


def beta_max_for(image_size: int) -> float:
    """The noise that hides an image of this size, and no more: 6 at 8 px, 12 at 32 px, and the paper's 20 at 256 px.

    The mean of size^2 pixels is to be as well hidden at any size: size^2 abar_T = 1.8^2, and -ln abar_T is about half
    of this number.
    """
    return float(max(round(4 * math.log(image_size / 1.8)), 1))


def fields_of(cls: type, given: Mapping[str, Any], prefix: str, but: Sequence[str] = ()) -> dict[str, Any]:
    """The checked fields of a dataclass in `given`, those named in `but` not among them.

    UserError that names the field `prefix` + name and what it must be.
    """
    annotations = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls) if f.name not in but]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"{prefix or 'it '}has {', '.join(known)}"
            raise UserError(f"there is no setting {prefix}{name}: {hint}")
    return {name: _checked(value, annotations[name], prefix + name) for name, value in given.items()}


def optional(annotation: Any) -> Any:
    """X of the annotation `X | None`, and None of every other."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return None
    (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    return inner


# --- Reading --------------------------------------------------------------------------------------------------------


def _read(cls: Any, given: Any, prefix: str) -> Any:
    """A dataclass from a dict: groups first, then the rest."""
    if not isinstance(given, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the configuration'} is {given!r}, and must be a group of settings")
    groups = {f.name: f.type for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)}
    read_ = {name: _read(groups[name], value, f"{prefix}{name}.") for name, value in given.items() if name in groups}
    rest = {name: value for name, value in given.items() if name not in groups}
    for name in [name for name in rest if prefix + name in REMOVED]:
        if (value := rest.pop(name)) != REMOVED[prefix + name]:
            warnings.warn(f"{prefix}{name}={value!r} is ignored: this setting is gone", stacklevel=2)
    return cls(**read_, **fields_of(cls, rest, prefix))


def _plain(value: Any, name: str = "") -> Any:
    """ConfigDicts as dicts, their references as what they stand for, lists as tuples, NumPy's numbers as Python's.

    UserError where a reference stands for nothing.
    """
    if hasattr(value, "has_cycle"):  # an ml_collections.FieldReference
        try:
            value = value.get()
        except Exception as error:  # ml_collections' own, or that of an operation which the reference stands for
            raise UserError(f"{name} has no value: {error}") from error
    if hasattr(value, "items"):
        items = value.items(preserve_field_references=True) if hasattr(value, "get_ref") else value.items()
        return {key: _plain(item, f"{name}.{key}".lstrip(".")) for key, item in items}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_plain(item, name) for item in value)
    huge = type(value) is int and value.bit_length() > 1_000  # no float has so many, and Python writes no long ones
    return math.copysign(math.inf, value > 0 or -1) if huge else value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _holds(annotation: Any, value: Any) -> bool:
    """Is there a range in the annotation, and is the value in it?"""
    ranges = typing.get_args(annotation)[1:]
    return bool(ranges) and all(allowed.holds(value) for allowed in ranges)


def _checked(value: Any, annotation: Any, name: str, or_none: str = "") -> Any:
    """The value of a field, an int as a float where that is asked for. UserError unless it is what it must be."""
    if (inner := optional(annotation)) is not None:
        zero = value == 0 and value is not False  # on the command line None, if it is no value
        if value is None or value == "" or (zero and not _holds(inner, value)):
            return None
        return _checked(value, inner, name, ", or None")
    ranges: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *rest = typing.get_args(annotation)
        ranges = tuple(rest)
    known = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    if known and value not in known:
        raise UserError(f"{name}={value!r} is not supported: it is {', '.join(known[:-1])} or {known[-1]}")
    wanted = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
    if annotation is float and type(value) is int:
        value = float(value)
    text = (ranges[0].text if ranges else wanted.get(annotation, "a list")) + or_none
    if typing.get_origin(annotation) is Mapping and not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}, and must be a group of settings")
    is_list = typing.get_origin(annotation) is Sequence
    fits = isinstance(value, tuple) if is_list else annotation not in wanted or type(value) is annotation
    if not fits:
        raise UserError(f"{name}={value!r:.100} must be {text}")
    if isinstance(value, float) and not abs(value) <= LARGEST:
        raise UserError(f"{name}={value!r} must be {text}, and at most {LARGEST:.1e} in size")
    for allowed in reversed(ranges):  # the narrowest first
        if not allowed.holds(value):
            raise UserError(f"{name}={value!r} must be {allowed.text}{or_none}")
    return value


# --- What does not go together --------------------------------------------------------------------------------------


def _check_together(c: Config) -> None:
    """UserError where two settings exclude each other."""
    points = c.model.network == "mlp"
    if c.data.scale != 1 and not points:
        raise UserError(f"data.scale={c.data.scale} is for points: images are in [-1, 1], leave it at 1.0")
    if points and c.data.flip:
        raise UserError("data.flip=True mirrors images, and points are none: set it to False")
    if points and c.model.num_classes:
        raise UserError(f"model.num_classes={c.model.num_classes}: networks for points are unconditional, set it to 0")
    if points and c.model.patch_size > 1:
        raise UserError(f"model.patch_size={c.model.patch_size}: points have no pixels to make patches of, set it to 1")
    if points and c.diffusion.beta_max is None:
        raise UserError("diffusion.beta_max=None is chosen for a size of images, and points have none: name a number")
    if c.loss.reconstruction_end and not c.loss.reconstruction:
        raise UserError(
            f"loss.reconstruction_end={c.loss.reconstruction_end} is where loss.reconstruction falls to, which is 0: "
            "set that above 0, or this to None"
        )
    for name, off in {"shown": "x_t", "reconstruction": 0, "reconstruction_end": None}.items():
        if getattr(c.loss, name) != off and c.objective != "adversarial":
            raise UserError(f"loss.{name} is for objective='adversarial', not {c.objective!r}: set it to {off!r}")
