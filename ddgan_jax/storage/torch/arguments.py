"""The reference's command-line arguments as settings of a configuration, such as {'generator.nf': 128}.

A run's `content.pth` contains them. For a `netG_*.pth`, which contains only weights, the user passes as hints what
differs from the reference's defaults, under the reference's names or this project's.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ddgan_jax.config.settings import Config, read
from ddgan_jax.errors import UserError
from ddgan_jax.method import build
from ddgan_jax.networks.discriminator import preset
from ddgan_jax.networks.generator import Generator

_ELSEWHERE = {"parent", "name", "dtype", "image_channels", "num_classes", "patch_size", "remat"}
GENERATOR = {f.name: f.default for f in dataclasses.fields(Generator) if f.name not in _ELSEWHERE}
SETTINGS = {  # names of hints and arguments
    **{name: f"generator.{name}" for name in GENERATOR},
    "num_channels_dae": "generator.nf",
    "image_size": "data.image_size",
    "num_channels": "data.channels",
    "image_channels": "data.channels",
    "num_timesteps": "diffusion.num_steps",
    "num_steps": "diffusion.num_steps",
    "beta_min": "diffusion.beta_min",
    "beta_max": "diffusion.beta_max",
    "ngf": "discriminator.ngf",
    "t_emb_dim": "discriminator.t_emb_dim",
}
TRANSLATED = ("not_use_tanh", "use_geometric", "dataset", "embedding_type")
# What the shapes of weights do not show; weights would be used wrongly if a default were not that of their training.
REQUIRED = ("skip_rescale", "tanh", "centered", "image_size")


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that arguments of the reference amount to; arguments that concern only training are ignored.

    Raises:
        UserError: the arguments ask for the Fourier time embedding.
    """
    if arguments.get("embedding_type", "positional") != "positional":
        raise UserError(
            f"embedding_type={arguments['embedding_type']!r} is not supported: only 'positional' is, "
            "because the reference cannot train the Fourier time embedding (log 0 at t = 0)"
        )
    settings = {SETTINGS[name]: value for name, value in arguments.items() if name in SETTINGS}
    if "not_use_tanh" in arguments:
        settings["generator.tanh"] = not arguments["not_use_tanh"]
    if "use_geometric" in arguments:
        settings["diffusion.kind"] = "geometric" if arguments["use_geometric"] else "vp"
    if "dataset" in arguments:
        small = arguments["dataset"] in ("cifar10", "stackmnist")
        settings |= {f"discriminator.{name}": value for name, value in preset(32 if small else 256).items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def settings_of_hints(hints: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a user's hints amount to. Raises UserError for an unknown hint, or two of one setting."""
    for name, value in hints.items():
        if name not in SETTINGS and name not in TRANSLATED:
            raise UserError(f"unknown hint {name!r}: hints are {', '.join([*SETTINGS, *TRANSLATED])}")
        same = [other for other in hints if SETTINGS.get(other, other) == SETTINGS.get(name)]
        if other := [f"{other}={hints[other]}" for other in same if hints[other] != value]:
            raise UserError(f"{name}={value} and {other[0]} are the same setting: leave one of them out")
    return settings_of(hints)


def config_of(settings: Mapping[str, Any], name: str = "") -> Config:
    """The configuration with these settings, and otherwise with the reference's defaults.

    Raises:
        UserError: a setting has an invalid value, or one that weights do not determine is missing.
    """
    require(REQUIRED, settings)
    groups: dict[str, dict[str, Any]] = {"data": {"name": name, "channels": 3}, "generator": dict(GENERATOR)}
    for setting, value in settings.items():
        group, _, field = setting.partition(".")
        groups.setdefault(group, {})[field] = value
    return read(groups)


def require(hints: Collection[str], settings: Mapping[str, Any]) -> None:
    """Raises UserError unless the settings of these hints are given."""
    if missing := [hint for hint in hints if SETTINGS[hint] not in settings]:
        example = " ".join(f"{hint}={GENERATOR.get(hint, 32)}" for hint in missing)
        raise UserError(
            f"the weights do not show {', '.join(missing)}: add the hints of their training, such as {example}; "
            "main.py takes --config=NAME instead"
        )


def check_equal(settings: Mapping[str, Any], config: Config, groups: Collection[str], path: str) -> None:
    """Raises UserError if, in these groups, a configuration differs from the settings that `path` was trained with."""
    network, other = build.generator_of(config), {}
    for name, value in settings.items():
        group, _, field = name.partition(".")
        ours = getattr(network if group == "generator" else getattr(config, group), field, None)
        if group in groups and value != (tuple(ours) if isinstance(ours, list) else ours):
            other[name] = value, ours
    if other:
        differences = " and ".join(f"{name}={value!r}, not {ours!r}" for name, (value, ours) in other.items())
        right = " ".join(f"--config.{name}={value}" for name, (value, _) in other.items())
        raise UserError(f"{path} was trained with {differences} as in the configuration: set {right}")
