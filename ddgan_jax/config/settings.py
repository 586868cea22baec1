"""The settings of a run: every field with its type, its range, its default and the source of that default.

`read` makes a `Config` from what a file of `configs/` returns, or from the JSON of a checkpoint. The defaults are the
paper's for CIFAR-10: "(paper)" marks values that the paper gives, "(released code)" those that only its implementation
has. `None` means that a field is not set. For fields that may be None, 0 and '' are read as None, as in old
configurations and checkpoints.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from ddgan_jax.config.check import check_together, from_dict, to_lists, to_plain
from ddgan_jax.config.types import (
    SEEDS,
    Below1,
    Count,
    FeatureNetwork,
    Fraction,
    ImageSize,
    Positive,
    PositiveFloat,
    Scale,
    TwoOrMore,
    Weight,
    at_most,
)
from ddgan_jax.errors import UserError

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Dataset of images, or of points."""

    name: str = "cifar10"  # a dataset of tfds, or one listed in docs/data.md
    split: str = "train"  # the split, or a part of it: 'train[:90%]'
    dir: str | None = None  # folder of tfds datasets and prepared copies; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    image_size: ImageSize | None = None  # px, 8 to 1,024 for images, times model.patch_size;
    # None: resolved from the dataset, and at most 256 for a folder
    channels: Annotated[Positive, at_most(64)] | None = None  # channels of the images; None: from the dataset
    path: str | None = None  # a folder, zip or local LMDB of image_folder, lsun_church or celeb_a_hq; also at gs://
    max_bad_share: Fraction = 0.01  # fraction of the files in `path` that may be damaged; unless it is 0, 10 may
    download: bool = True  # download and prepare a dataset of tfds that is not in `dir`
    in_memory_mib: Count = 2048  # MiB; a larger dataset is decoded while it is read, not at the start
    flip: bool = True  # mirror half of the images (released code)
    scale: Scale = 1.0  # for points: x_0 = scale * data, with unchanged noise


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule, the arguments of `Schedule.create`, and what the generator predicts."""

    num_steps: Annotated[Positive, at_most(100_000)] = 4  # T, the denoising steps (paper)
    kind: Literal["vp", "geometric"] = "vp"  # variance-preserving noise (paper), or geometric
    beta_min: PositiveFloat = 0.1  # smallest noise (paper)
    beta_max: PositiveFloat | None = 20.0  # largest noise (paper); None: resolved from the image size
    predicts: Literal["x_0", "x_t", "noise"] = "x_0"  # the generator's output (paper: x_0); 'x_t' and 'noise' are its
    # ablations: the next x_t itself, without a posterior, and the noise in x_{t+1}, from which x_0 follows


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings of both networks."""

    network: Literal["unet", "mlp"] = "unet"  # 'unet' for images, 'mlp' (fully connected) for points
    dtype: Literal["float32", "bfloat16"] = "float32"  # type in which convolutions and dense layers compute
    patch_size: Positive = 1  # side of the square of pixels that the networks take as one position (paper: 1)
    data_std: Scale | None = None  # for points: standard deviation that normalises the networks' input
    num_classes: Count = 0  # above 0: class-conditional networks (not in the paper)
    remat: bool = False  # recompute G's blocks in the backward pass: less memory, about a third more work


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimizers, and length of the training."""

    init_from: str | None = None  # initial networks: a workdir, checkpoint, .pth, .safetensors, bundled model or hf://
    num_steps: Positive | None = 351_000  # 1800 epochs (paper) of 195 steps; None: resolved from the dataset
    batch_size: Positive | None = 256  # images on all devices: 4 GPUs x 64 (paper); None: resolved from the dataset
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
    ema_decay: Fraction = 0.9999  # decay of the moving average of G's weights (paper)
    noise_seed: Count = 0  # above 0: different noise, to pass a step whose loss is not finite


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Additions to the paper's losses, off by default."""

    discriminator_input: Literal["x_t", "x_0"] = "x_t"  # the discriminator's input besides x_{t+1} (paper: x_t)
    reconstruction: Weight = 0.0  # weight of the SNR-weighted squared error of x_0 in the generator's loss
    reconstruction_end: Weight | None = None  # final value of that weight, by a cosine; None: constant weight


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, and how many of them are kept."""

    every: Positive | None = 5_000  # steps between checkpoints, beside those of evaluations; None: a fiftieth of all
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
    grid: Annotated[Positive, at_most(65_536)] = 64  # samples in a grid


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of samples."""

    features: FeatureNetwork = "inception"  # 'classifier' is for small images; 'module:function' is your own code
    num_samples: TwoOrMore = 50_000  # samples that are evaluated (paper)
    reference_samples: Positive | None = None  # real images to compare with; None: all
    reference_statistics: str | None = None  # .npz file with mu and sigma of real images, for FID
    manifold_samples: Positive = 50_000  # largest number of samples, and of real images, for precision and recall
    k: Positive = 3  # nearest neighbours in precision and recall (Kynkäänniemi et al. 2019)
    batch_size: Positive = 64  # images per device and batch of a feature network
    inception_weights: str | None = None  # file; None: pt_inception-2015-12-05-6726825d.pth in data.dir, or downloaded
    vgg_weights: str | None = None  # file; None: vgg16-397923af.pth in data.dir, or downloaded
    download: bool = True  # download weights of feature networks that are in no file
    every: Count = 0  # steps between evaluations during training; 0: none
    online_samples: TwoOrMore = 1_000  # samples per evaluation during training
    at_end: bool = False  # evaluate the last checkpoint with num_samples when the training ends


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: Annotated[int, SEEDS] = 0  # seed of weights, noise, and the order of the images
    objective: Literal["adversarial", "gaussian", "one_shot"] = "adversarial"  # what is trained (paper:
    # adversarial); 'gaussian' and 'one_shot' are baselines: squared error of x_0 without a discriminator, and a
    # one-step GAN that discriminates diffused images
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
        check_together(self)


RENAMED = {"loss.shown": "loss.discriminator_input"}  # old names, which configurations, flags and checkpoints may have
REMOVED = {  # removed settings, which old checkpoints contain, with the values that switched them off
    "train.d_lead": 0.0,
    "loss.generator": "nonsaturating",
    "loss.mismatched": 0.0,
    "loss.moment": 0.0,
    "loss.projections": 1_000,
    "loss.kappa": 50.0,
}


def read(config: Any) -> Config:
    """The Config in an ml_collections.ConfigDict or in nested dicts such as JSON's; missing fields have their defaults.

    Raises UserError, which names the field and what it must be, for an invalid value or settings that exclude each
    other.
    """
    if isinstance(config, Config):
        return config
    return from_dict(Config, _migrated(to_plain(config)))


def _migrated(given: Any) -> Any:
    """Settings of earlier versions with their present names. A removed one is dropped, with a warning if it was on.

    An old name takes precedence over the new one, which every preset sets.
    """
    if not isinstance(given, dict):
        return given
    given = {name: dict(group) if isinstance(group, dict) else group for name, group in given.items()}
    for path in (*RENAMED, *REMOVED):
        group, _, name = path.partition(".")
        if not isinstance(given.get(group), dict) or name not in given[group]:
            continue
        value = given[group].pop(name)
        if path in RENAMED:
            given[group][RENAMED[path].partition(".")[2]] = value
        elif value != REMOVED[path]:
            warnings.warn(f"{path}={value!r} is ignored: this setting was removed", stacklevel=3)
    return given


def as_dict(config: Any) -> dict[str, Any]:
    """Any configuration that `read` accepts as nested dicts with every field, as JSON has them: tuples are lists."""
    return to_lists(dataclasses.asdict(read(config)))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {'train.batch_size': 32}."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def required(value: Number | None, name: str) -> Number:
    """The value of a field that must be set by now. Raises UserError if it is None.

    `data.resolve.resolve_from_data` sets the fields that depend on the dataset.
    """
    if value is None:
        raise UserError(f"{name} is not set, and nothing chose it for the data: set --config.{name}=NUMBER")
    return value


def beta_max_for(image_size: int) -> float:
    """`diffusion.beta_max` with just enough noise to hide an image: 6 at 8 px, 12 at 32 px, the paper's 20 at 256 px.

    The mean of size^2 pixels is hidden equally well at any size: size^2 abar_T = 1.8^2, and -ln abar_T is about
    beta_max / 2.
    """
    return float(max(round(4 * math.log(image_size / 1.8)), 1))
