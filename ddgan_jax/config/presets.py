"""Presets of `configs/` by name, their flags, and the parts they are made of, as ml_collections' ConfigDicts.

    config = presets.get("digits:long")  # configs/digits.py, get_config("long")
    config.train.batch_size = 64

`configs/` lies beside the package in a checkout, and inside it in an installation.
"""

import dataclasses
import importlib.util
import os
import pathlib
import sys
import typing
from typing import Annotated, Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from ddgan_jax import errors
from ddgan_jax.config.check import optional
from ddgan_jax.config.settings import RENAMED, Config, beta_max_for
from ddgan_jax.errors import UserError

_HERE = pathlib.Path(__file__).parent.parent
FOLDER = next((folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE)


def names() -> list[str]:
    """Names of the presets, without their variants."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def find(name: str) -> str:
    """FILE.py:VARIANT of a preset such as `digits`, `digits:long` or `configs/digits.py:long`; other names unchanged.

    A file configs/digits.py in the working directory takes precedence over the preset.
    """
    path, colon, variant = name.partition(":")
    preset = FOLDER / pathlib.Path(path).with_suffix(".py").name
    ours = path == preset.stem or (path == f"configs/{preset.name}" and not os.path.exists(path))
    return f"{preset}{colon}{variant}" if ours and preset.exists() else name


def _existing(name: str) -> str:
    """`find(name)`. Raises UserError if there is no such file."""
    found = find(name)
    path = found.partition(":")[0]
    if not path.endswith(".py") or not os.path.exists(path):
        raise UserError(f"there is no configuration {name!r}: it is one of {', '.join(names())}, or a file")
    return found


def get(name: str) -> ConfigDict:
    """The configuration that `--config=NAME` selects. Raises UserError if there is none."""
    path, _, variant = _existing(name).partition(":")
    spec = importlib.util.spec_from_file_location(f"_config_{pathlib.Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.get_config(*([variant] if variant else []))


def read_flags(argv: list[str], default: str) -> list[str]:
    """Parses a command line into absl's FLAGS, with `--config` as a preset or file; returns the arguments that are no
    flags.

    `--config=digits:long` means `--config=configs/digits.py:long`. Raises UserError for invalid flags.
    """
    argv = with_current_names([_with_preset(*pair) for pair in zip(["", *argv], argv, strict=False)])
    sys.argv = argv  # config_flags looks there for the flags of the configuration's fields
    with errors.of_flags():
        config_flags.DEFINE_config_file("config", find(default), "A preset or a file, with :VARIANT.")
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.lock()  # the file runs at this first use, and its exceptions belong here
    return rest


def name_of_flag() -> str:
    """Name of the configuration that `read_flags` read: 'digits', or 'digits-long' for a variant."""
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return f"{pathlib.Path(path).stem}-{variant}" if variant else pathlib.Path(path).stem


def with_current_names(argv: list[str]) -> list[str]:
    """The arguments with `--config.GROUP.FIELD` of renamed fields under their present names."""
    present = {f"--config.{old}": f"--config.{new}" for old, new in RENAMED.items()}
    parts = (argument.partition("=") for argument in argv)
    return ["".join((present.get(name, name), equals, value)) for name, equals, value in parts]


def _with_preset(before: str, argument: str) -> str:
    """The argument with the file of a preset, if it is the value of `--config`; `before` is the one before it."""
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config") and equals:
        return f"{name}={_existing(value)}"
    return _existing(argument) if before in ("--config", "-config") else argument


def defaults() -> ConfigDict:
    """Every field with its default, the paper's for CIFAR-10, as a ConfigDict whose fields are also flags."""
    return _config_dict(Config())


def _config_dict(group: Any) -> ConfigDict:
    config = ConfigDict()
    annotations = typing.get_type_hints(type(group), include_extras=True)
    for field in dataclasses.fields(group):
        value, annotation = getattr(group, field.name), annotations[field.name]
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif inner := optional(annotation):  # a flag needs the type even if the value is None
            kind = typing.get_args(inner)[0] if typing.get_origin(inner) is Annotated else inner
            value = FieldReference(value, field_type=kind)
        config[field.name] = ConfigDict(value) if isinstance(value, dict) else value
    return config


# --- Variants -------------------------------------------------------------------------------------------------------


def apply_variant(config: ConfigDict, variant: str, *own: str) -> ConfigDict:
    """Applies a variant: unchanged ('paper'), our recipe ('fast') or tiny ('smoke').

    `own` are variants that the preset's file applies itself, for the error message.
    """
    if variant == "smoke":
        smoke(config)
    elif variant == "fast":
        fast(config)
    elif variant != "paper":
        raise ValueError(f"unknown variant {variant!r}: it is one of {', '.join(('paper', *own, 'fast', 'smoke'))}")
    return config


def fast(config: ConfigDict) -> None:
    """Our recipe: on the digits, a third of the Frechet distance of the paper's after the same time (docs/claims.md).

    D sees x_0 instead of x_t, which at large t is mostly posterior noise. G's loss has a squared error of x_0. D's
    learning rate decays only to a half. x_T has just enough noise to hide an image of this size, so that no step
    denoises noise alone.
    """
    config.loss.update(discriminator_input="x_0", reconstruction=2.5)
    config.train.lr_min_d = config.train.lr_d / 2
    size = config.data.image_size
    config.diffusion.beta_max = beta_max_for(size) if size else None


def small(config: ConfigDict) -> None:
    """Our recipe for images of 32 px, with networks that a CPU core trains in an hour (docs/claims.md)."""
    fast(config)
    # The squared error is a mean over 48 times as many numbers as for the digits, whose weight is 2.5.
    config.loss.reconstruction = 30.0
    config.diffusion.num_steps = 3
    config.model.patch_size = 4  # 8x8 positions instead of 32x32 make wide networks cheap
    config.generator.update(nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
    config.generator.update(nz=64, z_emb_dim=128, n_mlp=3)
    config.discriminator.update(ngf=16, start=1, stages=((2, False), (4, True)), t_emb_dim=128, product=True)
    config.train.update(lr_g=1e-3, lr_d=2e-3, lr_min=1e-4, lr_min_d=1e-3, r1_gamma=16.0, r1_every=10)
    config.train.update(num_steps=21_000, batch_size=32, ema_decay=0.999, steps_per_epoch=1)
    config.checkpoint.update(every=1_000, keep_period=0)
    config.log.update(every=50, samples_every=1_000)


def smoke(config: ConfigDict) -> None:
    """Shrinks any configuration to tiny networks and synthetic data: the same code in under a minute on a CPU."""
    config.data.update(name="synthetic", image_size=8, channels=config.data.channels or 3)
    config.generator.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), nz=8, z_emb_dim=16, n_mlp=1)
    config.discriminator.update(ngf=8, t_emb_dim=16)
    config.train.update(num_steps=8, batch_size=16, steps_per_epoch=2, r1_every=3)
    config.checkpoint.update(every=4, keep=2, keep_period=0)
    config.log.update(every=2, samples_every=4)
    config.sample.update(batch_size=8, grid=16)
    config.eval.update(num_samples=64, manifold_samples=64, batch_size=16, online_samples=32)
