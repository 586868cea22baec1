"""The reference's checkpoint files, read and written: `netG_*.pth`, `content.pth`. All of this needs PyTorch.

A pickle can run any program: `load` builds nothing but tensors and plain values from it, and refuses the rest.

    python -m ddgan_jax.storage.torch.files netG_1200.pth image_size=32 skip_rescale=True ...  # what is in a file?
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

import numpy as np
from flax import traverse_util

from ddgan_jax.errors import Fault, UserError, of_a_file
from ddgan_jax.storage import paths
from ddgan_jax.storage.torch import architecture, convert
from ddgan_jax.storage.torch.convert import Params, StateDict

LICENCE_NOTE = "Imported weights keep their licence: those that NVIDIA released may not be used commercially."


def _torch() -> Any:
    """PyTorch, or a UserError that says how to get it."""
    try:
        import torch
    except ImportError:
        raise UserError("a .pth file can only be read or written with PyTorch: pip install torch") from None
    return torch


def load(path: str) -> dict[str, Any]:
    """The content of a `.pth` file: a state dict (`netG_*.pth`) or a whole run (`content.pth`).

    Tensors come as numpy arrays, the arguments of the run as a dict. Raises UserError if PyTorch is missing, or if
    the file is missing, damaged, or holds anything but tensors and plain values; Fault if it cannot be read.
    """
    _torch()
    with of_a_file(path):
        data = paths.read(paths.path(path))
    return parse(data, path)


def parse(data: bytes, path: str) -> dict[str, Any]:
    """`load` of the bytes of the file `path`."""
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
            if "allocate memory" in str(error):  # torch has no type for it
                raise MemoryError from error
            raise UserError(f"{path} is damaged, or no PyTorch file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict or a run of the reference")
    return content


def _plain(value: Any, path: str) -> Any:
    """Tensors to numpy, a Namespace to a dict; a value of any other kind is refused."""
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
    raise UserError(f"{path} is refused: it holds a {type(value).__name__}, neither a tensor nor a plain value")


def save(path: str, state_dict: StateDict) -> None:
    """Write a state dict as the reference does (`netG_*.pth`): keys prefixed with 'module.'. Needs PyTorch."""
    torch = _torch()
    tensors = {f"module.{key}": torch.from_numpy(np.array(value)) for key, value in state_dict.items()}
    paths.write(paths.path(path), lambda file: torch.save(tensors, file))


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a `.pth` file of the reference holds, in this project's terms; None for what it does not hold."""

    generator: dict[str, Any]  # the fields of a Generator
    gen_params: Params
    ema_params: Params | None = None
    discriminator: dict[str, Any] | None = None  # the fields of a Discriminator
    disc_params: Params | None = None
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # the flags of the run


def read(path: str, /, **hints: Any) -> Reference:
    """Load and convert a `netG_*.pth`, with `hints` as for `generator_config`, or a `content.pth`, which has its flags.

    Raises UserError as `load` and `generator_config` do, and if hints contradict the flags.
    """
    content = load(path)
    if "netG_dict" not in content:
        return Reference(architecture.generator_config(content, **hints), convert.generator_params(content))
    parts = [content.get(name, {}) for name in ("args", "netG_dict", "netD_dict", "optimizerG")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} is damaged: a part of the run is no dict")
    args, netG, netD, optimizer = parts
    # The moving average lies in the optimizer's state, by the position of the parameter.
    moments = optimizer.get("state", {})
    entries = moments.items() if isinstance(moments, dict) else ()
    ema = {i: entry["ema"] for i, entry in entries if isinstance(entry, dict) and "ema" in entry}
    averaged = {key: ema.get(i, value) for i, (key, value) in enumerate(netG.items())}
    flags, given = architecture.fields_of(args), architecture.fields_of(hints)
    for name in flags.keys() & given.keys():
        if flags[name] != given[name]:
            raise UserError(f"the hint {name}={given[name]} contradicts the run in {path}, which says {flags[name]}")
    return Reference(
        architecture.generator_config(netG, **(flags | given)),
        convert.generator_params(netG),
        convert.generator_params(averaged) if ema else None,
        architecture.discriminator_config(netD) if netD else None,
        convert.discriminator_params(netD) if netD else None,
        args,
    )


def main(argv: Sequence[str]) -> int:
    """Print what a `.pth` file holds. Returns the exit code: 2 if it cannot be used, 1 if it cannot be read."""
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
    networks = [("Generator", found.generator, found.gen_params)]
    if found.discriminator and found.disc_params:
        networks.append(("Discriminator", found.discriminator, found.disc_params))
    for network, fields, params in networks:
        count = sum(value.size for value in traverse_util.flatten_dict(params).values())
        print(f"{network}({', '.join(f'{name}={value!r}' for name, value in fields.items())})\n  {count:,} parameters")
    print(f"moving average {'included' if found.ema_params else 'not apart'}\n{LICENCE_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
