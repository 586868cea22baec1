"""Where trained models are, and how they are read: workdirs, checkpoints, files, the Hub, and the bundled models."""

import json
import os
import pathlib
from typing import Any

import jax

from ddgan_jax.config.settings import Config, read
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError, is_missing, reason_of
from ddgan_jax.method import build
from ddgan_jax.model.card import measures_in, without_private
from ddgan_jax.model.checks import as_path
from ddgan_jax.model.classes import names_of, read_names
from ddgan_jax.model.model import Model
from ddgan_jax.storage import checkpoint, hub, paths, safetensors
from ddgan_jax.storage.torch import arguments, convert, files

PRETRAINED = pathlib.Path(__file__).parent / "pretrained"


def _bundled() -> dict[str, pathlib.Path]:
    return {file.stem: file for file in sorted(PRETRAINED.glob("*.safetensors"))}


def models() -> dict[str, str]:
    """The bundled models: {the name that `load` accepts: a summary}."""
    return {name: safetensors.metadata(file).get("summary", "") for name, file in _bundled().items()}


def file_of(path: str) -> str | None:
    """The file of a model in one file, on the Hub or of a bundled model; None if `path` names a folder.

    Raises:
        UserError: `path` names neither a folder nor a model.
    """
    if hub.is_hub(path):
        hub.parse(path)
        return path
    path = os.path.expanduser(path)
    if path.endswith((".pth", ".safetensors")):
        return path
    bundled = _bundled()
    # `--mode=sample --out=digits` makes a folder of images, which has the name of a bundled model.
    is_folder = paths.exists(path) and (path not in bundled or paths.exists(f"{path}/checkpoints"))
    if "/" in path or is_folder:
        return None
    if path not in bundled:
        raise UserError(f"there is no {path}: name a workdir, a checkpoint, a file, or one of {', '.join(bundled)}")
    return str(bundled[path])


def default_output(path: str, name: str) -> str:
    """The default path of the result `name` of the model in `path`.

    The result is written into the model's workdir or folder, or next to its file. Results of a checkpoint in
    WORKDIR/checkpoints go into WORKDIR, because the checkpoint's own folder is deleted with it. Those of a model of
    the Hub go into the current folder.
    """
    if hub.is_hub(path):
        return f"{hub.local_name(path)}.{name}"
    if file_of(path) is not None:
        return f"{os.path.splitext(path)[0]}.{name}"
    found = processes.broadcast_from_primary(lambda: str(checkpoint.absolute(checkpoint.find(path))))
    folder = paths.path(found).parent
    return str((folder.parent if folder.name == "checkpoints" else paths.path(path)) / name)


def _read(file: str) -> tuple[safetensors.Arrays, dict[str, Any], int, dict[str, str]]:
    """The content of a file of `file_of`, which may be on the Hub, as `safetensors.read` returns it."""
    return hub.read(file) if hub.is_hub(file) else safetensors.read(file)


def load(path: str | os.PathLike, config: Any = None, **hints: Any) -> Model:
    """The model in a workdir, a checkpoint, a .safetensors file, or a `.pth` file of the PyTorch reference.

    `path` may also be the name of one of `models()`, or `hf://OWNER/NAME` on the Hugging Face Hub (`storage.hub`). A
    `netG_*.pth` contains only weights: pass the `config` of its training, such as `presets.get("cifar10")`, or as hints
    what differs from the reference's defaults, such as `image_size=32` or `nf=64` (`storage.torch.arguments`). Other
    models contain their configuration, and `config` has no effect.

    Raises:
        UserError: there is no model, hints are missing or contradict the weights, or the model needs none.
        Fault: the model is damaged or cannot be read.
    """
    path, about, trained_on, classes = as_path(path), dict[str, str](), None, None
    file = file_of(path)
    if hints and not path.endswith(".pth"):
        raise UserError(f"{path} contains its configuration: leave {', '.join(hints)} out, which .pth files need")
    if path.endswith(".pth"):
        given = None if config is None else read(config)
        found = processes.broadcast_from_primary(lambda: files.read(path, given, **hints))
        arguments.check_equal(found.settings, found.config, ("diffusion",), path)
        assumed = [name for name in ("num_steps", "beta_min", "beta_max") if f"diffusion.{name}" not in found.settings]
        if assumed and given is None:
            values = ", ".join(f"{name}={getattr(found.config.diffusion, name)}" for name in assumed)
            processes.say(f"note: {path} holds no diffusion: the reference's defaults are assumed, {values}")
        return Model(found.ema_params or found.gen_params, build.denoiser(found.config), found.config, 0)
    if file:
        if file != path and paths.exists(path):
            processes.say(f"note: {path} is the bundled model: the folder of this name has no checkpoints")
        arrays, saved_config, step, about = processes.broadcast_from_primary(lambda: _read(file))
        params, classes = checkpoint.nested(arrays), read_names(about)
    else:
        params, metadata, step = processes.broadcast_from_primary(lambda: checkpoint.restore_ema(path))
        saved_config, trained_on = metadata["config"], (metadata.get("of_job") or {}).get("data")
        classes = (trained_on or {}).get("classes")
    c = read(saved_config)
    if file:
        c = without_private(c)  # which may be somebody else's
    else:
        about = processes.broadcast_from_primary(lambda: _evaluated(path, step, c))
    denoiser = build.denoiser(c)
    checkpoint.check_like(params, jax.eval_shape(denoiser.init_gen, jax.random.key(0)), f"the checkpoint in {path}")
    return Model(params, denoiser, c, step, about, trained_on, names_of(classes, denoiser.num_classes))


def _evaluated(path: str, step: int, c: Config) -> dict[str, str]:
    """`Model.about` of a checkpoint: its measures, if `--mode=evaluate` has written them."""
    file = paths.path(path)
    try:
        folder = paths.path(checkpoint.absolute(checkpoint.find(path))).parent
        file = (folder.parent if folder.name == "checkpoints" else file) / "evaluation" / str(step) / "results.json"
        found = measures_in(json.loads(paths.read(file)), c)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        if not is_missing(error):
            processes.say(f"note: the model is loaded without its measures: {file} cannot be read: {reason_of(error)}")
        return {}
    return {"measures": json.dumps(found)} if found else {}


def config_of(path: str) -> Config:
    """The configuration of the training of a workdir, a checkpoint, or a model in a file, on the Hub or bundled.

    Raises:
        UserError: there is no model.
        Fault: the model is damaged or cannot be read.
    """
    if file := file_of(path):
        return without_private(read(_read(file)[1]))
    found = checkpoint.find(path)
    try:
        return read(checkpoint.metadata_of(found)["config"])
    except (ValueError, KeyError) as error:
        raise checkpoint.Damaged(f"the checkpoint {found} is damaged: {error}") from error


def check_is_there(path: str) -> None:
    """Raises UserError if `path` names no model on this machine or in a bucket; one on the Hub is not looked up."""
    file = file_of(path)
    if not file:
        checkpoint.find(path)
    elif not hub.is_hub(file) and not paths.exists(file):
        raise UserError(f"there is no {file}: name a workdir, a checkpoint or a file")


def load_initial_networks(c: Config, like: Any) -> tuple[str, Any, Any]:
    """The networks that `train.init_from` of `c` names, in the tree of the state `like`.

    Returns their path, the generator's moving average, and the discriminator, None if there is none.

    Raises:
        UserError: there are no networks, or their architecture is not that of `c`.
        Fault: the networks are damaged or cannot be read.
    """
    path = c.train.init_from or ""
    file = file_of(path)
    if not file:
        folder = checkpoint.find(path)
        arrays, metadata = checkpoint.read(folder)
        state = checkpoint.unflatten(arrays, like, f"the checkpoint {folder} of train.init_from")
        _check_fields(c, read(metadata["config"]), str(folder), ("diffusion.", "generator.", "discriminator."))
        return str(folder), state.ema_params, state.disc_params
    if file.endswith(".pth"):
        found = files.read(path, c)
        disc_params = convert.from_state_dict(found.disc_arrays, like.disc_params) if found.disc_arrays else None
        return path, found.ema_params or found.gen_params, disc_params
    model = load(path)
    checkpoint.check_like(model.params, like.gen_params, f"{path} of train.init_from")
    _check_fields(c, model.config, file, ("diffusion.", "generator."))
    return file, model.params, None


def _check_fields(c: Config, trained: Config, path: str, networks: tuple[str, ...]) -> None:
    """Raises UserError if the networks in `path` were trained with other fields, which their shapes need not show.

    Those are compared whose names begin as one of `networks`.
    """
    ours, theirs = build.network_fields(c), build.network_fields(trained)
    for name, value in ours.items():
        if name.startswith(networks) and value != theirs[name]:
            raise UserError(
                f"train.init_from={path} was trained with {name}={theirs[name]}, and this configuration has {value}: "
                f"set --config.{name}={theirs[name]}"
            )
