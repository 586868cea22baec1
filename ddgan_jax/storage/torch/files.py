"""The reference's checkpoint files `netG_*.pth` and `content.pth`. Reading and writing them needs PyTorch.

A pickle can run any program. `load` builds only tensors and plain values from it, and refuses everything else.

    python -m ddgan_jax.storage.torch.files content.pth  # prints what a file contains
"""

import argparse
import ast
import contextlib
import dataclasses
import io
import pickle
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ddgan_jax.config.settings import Config
from ddgan_jax.errors import Fault, UserError, of_a_file
from ddgan_jax.method import build
from ddgan_jax.storage import paths
from ddgan_jax.storage.torch import arguments, convert
from ddgan_jax.storage.torch.convert import Params, StateDict

LICENCE_NOTE = "Imported weights keep their licence: those that NVIDIA released may not be used commercially."


def _torch() -> Any:
    """The module `torch`. Raises UserError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError("a .pth file can only be read or written with PyTorch: pip install torch") from None
    return torch


def load(path: str) -> dict[str, Any]:
    """The content of a `.pth` file: a state dict (`netG_*.pth`) or a whole run (`content.pth`).

    Tensors become NumPy arrays, and the arguments of the run a dict.

    Raises:
        UserError: PyTorch is missing, or the file is missing, damaged, or contains more than tensors and plain values.
        Fault: the file cannot be read.
    """
    _torch()
    with of_a_file(path):
        data = paths.read(paths.path(path))
    return parse(data, path)


def parse(data: bytes, path: str) -> dict[str, Any]:
    """The content of a `.pth` file from its bytes; see `load`."""
    torch = _torch()
    with of_a_file(path):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            content = _plain(content, path)
        except (UserError, MemoryError):
            raise
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)|Trying to \w+ (?:function |class )?([\w.]+)", str(error))
            found = f"holds {next(filter(None, name.groups()))}, but" if name else "is no PyTorch file, or"
            raise UserError(f"{path} is refused: it {found} only tensors and plain values are read") from None
        except Exception as error:  # damaged archives fail in many ways inside torch; the bytes have been read
            if "allocate memory" in str(error):  # torch has no type for this error
                raise MemoryError from error
            raise UserError(f"{path} is damaged, or no PyTorch file ({type(error).__name__}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a state dict or a run: name a netG_*.pth or content.pth"
        )
    return content


def _plain(value: Any, path: str) -> Any:
    """A value with tensors as NumPy arrays and a Namespace as a dict. Raises UserError for other kinds of values."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.dtype == torch.bfloat16:
            raise UserError(
                f"{path} is refused: it holds a tensor that is no plain array ({value.dtype}, {value.layout})"
            )
        return value.detach().numpy()
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        return {key: _plain(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{path} is refused: it holds a {type(value).__name__}, but only tensors and plain values are read")


def save(path: str, state_dict: StateDict) -> None:
    """Write a state dict as a `netG_*.pth` of the reference, whose keys begin with 'module.'."""
    torch = _torch()
    tensors = {f"module.{key}": torch.from_numpy(np.array(value)) for key, value in state_dict.items()}
    paths.write(paths.path(path), lambda file: torch.save(tensors, file))


@dataclasses.dataclass(frozen=True)
class Reference:
    """The contents of a `.pth` file of the reference, as this project has them."""

    config: Config
    gen_params: Params
    ema_params: Params | None  # of a run that averages its weights
    disc_arrays: StateDict  # empty in a `netG_*.pth`
    settings: dict[str, Any]  # those that the file contains or the hints give, for instance {'generator.nf': 128}


def read(path: str, /, config: Config | None = None, **hints: Any) -> Reference:
    """The networks in a `netG_*.pth` or `content.pth`.

    The architecture is that of the run's arguments in a `content.pth`, and of `config` or the `hints` for a
    `netG_*.pth`. Without `config`, unspecified settings have the reference's defaults.

    Raises:
        UserError: as `load`; or hints are missing, unknown or invalid; or the file contradicts `config` or the hints.
        Fault: the file cannot be read.
    """
    content = load(path)
    run = content if "netG_dict" in content else {"netG_dict": content}
    args, gen_arrays, disc_arrays, optimizer = (
        run.get(name, {}) for name in ("args", "netG_dict", "netD_dict", "optimizerG")
    )
    if not all(isinstance(part, dict) for part in (args, gen_arrays, disc_arrays, optimizer)):
        raise UserError(f"{path} is damaged: a part of the run is no dict; copy or download the file again")
    settings, hinted = arguments.settings_of(args), arguments.settings_of_hints(hints)
    for name in settings.keys() & hinted.keys():
        if settings[name] != hinted[name]:
            raise UserError(
                f"{path} was trained with {name}={settings[name]!r}, but a hint is {hinted[name]!r}: leave the hint out"
            )
    settings |= hinted
    if config is not None:
        arguments.check_equal(settings, config, ("data", "generator"), path)
    used = config or arguments.config_of(settings, path)
    if (predicts := used.diffusion.predicts) != "x_0":
        raise UserError(f"{path} holds a generator of x_0, not of {predicts}: set diffusion.predicts to 'x_0'")
    like = jax.eval_shape(build.denoiser(used).init_gen, jax.random.key(0))
    if config is None and not any("fir_conv" in layer for layer in like.values()):
        arguments.require(("fir",), settings)  # no array shows whether it is on
    # The moving average is in the optimizer's state, by the position of the parameter.
    moments = optimizer.get("state", {})
    entries = moments.items() if isinstance(moments, dict) else ()
    ema = {i: entry["ema"] for i, entry in entries if isinstance(entry, dict) and "ema" in entry}
    averaged = {key: ema.get(i, value) for i, (key, value) in enumerate(gen_arrays.items())}
    return Reference(
        used,
        convert.from_state_dict(gen_arrays, like),
        convert.from_state_dict(averaged, like) if ema else None,
        disc_arrays,
        settings,
    )


def main(argv: Sequence[str]) -> int:
    """Print what a `.pth` file contains. Returns the exit code: 2 if it cannot be used, 1 if it cannot be read."""
    if not argv or any("=" not in hint for hint in argv[1:]):
        print("usage: python -m ddgan_jax.storage.torch.files FILE.pth [image_size=32 ...]", file=sys.stderr)
        return 2
    hints: dict[str, Any] = dict(hint.split("=", 1) for hint in argv[1:])
    for name, text in hints.items():
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # it is a string
            hints[name] = ast.literal_eval(text)
    try:
        found = read(argv[0], **hints)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Fault as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    gen_arrays = convert.to_state_dict(found.gen_params)
    for network, fields, arrays in (
        ("Generator", found.config.generator, gen_arrays),
        ("Discriminator", found.config.discriminator, found.disc_arrays),
    ):
        if arrays:
            shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
            print(f"{network}({shown})\n  {sum(array.size for array in arrays.values()):,} parameters")
    print(f"{'a' if found.ema_params else 'no separate'} moving average\n{LICENCE_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
