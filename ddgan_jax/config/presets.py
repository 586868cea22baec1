"""Presets of `configs/` by name, their flags, and the parts they are made of, as ml_collections' ConfigDicts.

    config = presets.get("digits:long")  # configs/digits.py, get_config("long")
    config.train.batch_size = 64

`configs/` lies beside the package in a checkout, and inside it in an installation.
"""

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import traceback
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from ddgan_jax import errors
from ddgan_jax.config.check import optional
from ddgan_jax.config.settings import RENAMED, Config, as_dict, beta_max_for, flat, read
from ddgan_jax.errors import UserError

DEFAULT = "mnist"  # the preset of `main.py` without --config
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
    preset = FOLDER / f"{pathlib.Path(path).stem}.py"
    ours = path == preset.stem or (path == f"configs/{preset.name}" and not os.path.exists(path))
    return f"{preset}{colon}{variant}" if ours and preset.exists() else name


def get(name: str) -> ConfigDict:
    """The configuration that `--config=NAME` selects: of a preset, a Python file, or the config.json of a run.

    Raises UserError if there is none, or if the file cannot be used.
    """
    path, colon, variant = find(name).partition(":")
    if not path.endswith((".py", ".json")) or not os.path.isfile(path):
        raise UserError(f"there is no configuration {name!r}: it is one of {', '.join(names())}, a .py or a .json file")
    try:
        if path.endswith(".json"):
            given = json.loads(pathlib.Path(path).read_bytes())
            if colon:
                raise UserError(f"a .json has no variants: leave :{variant} out")
            return _config_dict(read(given))
        return _from_python(path, *([variant] if colon and variant else []))
    except UserError as error:
        raise UserError(f"configuration {name}: {error}") from error
    except Exception as error:  # whatever the file raises
        raise UserError(f"configuration {name} cannot be used: {_described(error, path)}") from error


def _from_python(path: str, *variant: str) -> ConfigDict:
    """The configuration from `get_config` of a Python file.

    Raises UserError if there is no such function or it returns another type, and whatever the file itself raises.
    """
    spec = importlib.util.spec_from_file_location(f"_config_{pathlib.Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            "the file has no function get_config: define one that starts from presets.get('digits') and returns it"
        )
    try:
        inspect.signature(get_config).bind(*variant)
    except TypeError:
        raise UserError(
            f"get_config takes no variant: leave :{variant[0]} out, or define get_config(variant='')"
            if variant
            else "get_config needs a variant: write --config=FILE.py:VARIANT"
        ) from None
    config = get_config(*variant)
    if not isinstance(config, ConfigDict):
        found = type(config).__name__
        raise UserError(f"get_config returns a value of type {found}, not a ConfigDict such as presets.get('digits')")
    return config


def _described(error: Exception, path: str) -> str:
    """An error that a configuration file raised, with the line of the file if it is known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {what}" + (f" (line {line})" if line else "")


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The last value of a flag in a command line, as --flag=value or --flag value; None without one."""
    found = None
    for argument, after in itertools.zip_longest(argv, argv[1:]):
        name, equals, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            found = value if equals else after or ""
    return found


def read_flags(argv: list[str], default: str) -> list[str]:
    """Parses a command line into absl's FLAGS, with `--config` as a preset or file; returns the arguments that are no
    flags.

    `--config=digits:long` means `--config=configs/digits.py:long`. Raises UserError for invalid flags.
    """
    with errors.of_flags():
        argv = with_current_names(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
    name = value_of("config", argv)
    config = get(default if name is None else name)
    rest: list[str] = []
    is_value = False
    for argument in argv:
        of_config = argument.partition("=")[0] in ("--config", "-config")
        if argument == "None" and rest and "=" not in rest[-1] and _field_of(rest[-1]):
            rest[-1] += "=None"
        elif not of_config and not is_value:
            rest.append(argument)
        is_value = of_config and "=" not in argument
    given, is_none = [], {}  # absl refuses None for a number, and reads it as a text: the last flags that say so
    for argument in rest:
        none = argument.endswith("=None") and _is_optional(_field_of(argument))
        if path := _field_of(argument):
            _check_field(path, config)
            is_none[path] = none
        if not none:
            given.append(argument)
    with errors.of_flags():
        config_flags.DEFINE_config_dict("config", config, "The configuration.", sys_argv=given)
        others = flags.FLAGS(given)
        for path in (path for path, none in is_none.items() if none):
            group, _, field = path.rpartition(".")
            (flags.FLAGS.config[group] if group else flags.FLAGS.config)[field] = None
    return others


def _check_field(path: str, config: ConfigDict) -> None:
    """Raises UserError unless the configuration has a field such as 'train.batch_size'."""
    fields = list(flat(config.to_dict()))
    if path in fields:
        return
    if of_group := [name for name in fields if name.startswith(f"{path}.")]:
        raise UserError(f"--config.{path} is a group of fields: set each of them, as with --config.{of_group[0]}=VALUE")
    near = difflib.get_close_matches(path, fields, 1, 0.75)
    hint = f"did you mean --config.{near[0]}?" if near else "docs/configuration.md lists them; set others in a file"
    raise UserError(f"there is no flag --config.{path}: {hint}")


def _field_of(argument: str) -> str:
    """'train.num_steps' of '--config.train.num_steps=3'; '' for other arguments."""
    found = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    return found[1] if found else ""


def _is_optional(path: str) -> bool:
    """Whether a field such as 'train.num_steps' may be None."""
    group, _, field = path.rpartition(".")
    cls = type(getattr(Config(), group, None)) if group else Config
    return optional(typing.get_type_hints(cls, include_extras=True).get(field)) is not None


@functools.cache
def _field() -> re.Pattern:
    """A pattern of the names of fields in a message."""
    names = "|".join(re.escape(name) for name in flat(as_dict(Config())) if "." in name)
    return re.compile(rf"(?<![\w./-])({names})(?![\w.])")


def as_flags(message: str) -> str:
    """A message of Python code as one of a command: --config.data.path for data.path, and --label for label."""
    message = _field().sub(r"--config.\1", message)
    return re.sub(r"(?<![\w./-])(label|posterior|rounds|start_step|t)=", r"--\1=", message)


def as_arguments(message: str) -> str:
    """A message of a command as one of Python code: train__lr_g for --config.train.lr_g, and restart=True."""
    message = _field().sub(lambda found: found[1].replace(".", "__"), message.replace("--config.", ""))
    return re.sub(r"(?<![\w/-])--(?=[a-z])", "", message.replace("--restart", "restart=True"))


def name_of(config: str) -> str:
    """The name of the run of a `--config`: 'digits', 'digits-long' with a variant, 'a' for runs/a/config.json."""
    path, _, variant = config.partition(":")
    file = pathlib.Path(path)
    if file.name == "config.json":
        return file.absolute().parent.name or "config"
    return f"{file.stem}-{variant}" if variant else file.stem


def with_current_names(argv: list[str]) -> list[str]:
    """The arguments with `--config.GROUP.FIELD` of renamed fields under their present names."""
    present = {f"--config.{old}": f"--config.{new}" for old, new in RENAMED.items()}
    parts = (argument.partition("=") for argument in argv)
    return ["".join((present.get(name, name), equals, value)) for name, equals, value in parts]


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
        raise UserError(f"unknown variant {variant!r}: it is one of {', '.join(('paper', *own, 'fast', 'smoke'))}")
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


def longer(config: ConfigDict) -> None:
    """`small` for two hours of a CPU core and more: other networks, which end sharper (docs/claims.md)."""
    config.generator.update(nf=48, ch_mult=(1, 1))
    config.discriminator.update(start=4, stages=((2, False), (4, True), (4, False)))
    config.train.ema_decay = 0.9995


def smoke(config: ConfigDict) -> None:
    """Shrinks any configuration to tiny networks and synthetic data: the same code in under a minute on a CPU."""
    config.data.update(name="synthetic", split="train", image_size=8, channels=config.data.channels or 3)
    config.model.patch_size = 1
    config.generator.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), nz=8, z_emb_dim=16, n_mlp=1)
    config.discriminator.update(ngf=8, t_emb_dim=16)
    config.train.update(num_steps=8, batch_size=16, steps_per_epoch=2, r1_every=3)
    config.checkpoint.update(every=4, keep=2, keep_period=0)
    config.log.update(every=2, samples_every=4)
    config.sample.update(batch_size=8, grid=16)
    config.eval.update(num_samples=64, manifold_samples=64, batch_size=16, every=0, online_samples=32, at_end=False)
