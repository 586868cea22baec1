"""Weights of the PyTorch reference implementation: its checkpoints <-> the parameters of this project.

The reference numbers the layers of its generator by a running counter, `all_modules.N`, in the order in which the
forward pass meets them. `_Plan.names` follows that order over the names of this project; the keys and shapes tell
which layers there are, so parameters convert without a configuration. What arrays cannot tell (the size of the
images, whether skips are rescaled, ...) `generator_config` asks for by name.

Layouts: linear weights (out, in) and convolutions (out, in, h, w) become (in, out) and (h, w, in, out); the `W` of
"NIN" layers is (in, out) already. No value changes, so an export is bit-identical to what was imported.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError

Params = dict[str, Any]
StateDict = Mapping[str, np.ndarray]

# --- Arrays -----------------------------------------------------------------------------------------------------


def _to_flax(key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """(leaf name, array) of the array at `key` of the reference; UserError unless key and shape go together."""
    layer, _, leaf = key.rpartition(".")
    if leaf in ("bias", "b"):
        name, rank = "bias", 1
    elif "GroupNorm" in layer and not layer.endswith("style"):
        name, rank = "scale", 1
    elif leaf == "W" or re.search(r"style$|Dense|dense|z_transform|t_embed|end_linear", layer):
        name, rank = "kernel", 2
    elif re.search(r"[cC]onv|skip", layer):
        name, rank = "kernel", 4
    else:  # a layer of all_modules that has no sublayers: its shape tells what it is
        name, rank = ("scale" if value.ndim == 1 else "kernel"), value.ndim
    if leaf not in ("weight", "bias", "W", "b") or value.ndim != rank or rank not in (1, 2, 4):
        raise UserError(f"unexpected array {key!r} of shape {value.shape} in the state dict")
    if value.dtype != np.float32:
        raise UserError(f"the state dict holds {key!r} as {value.dtype}: convert it to float32 first")
    if name == "kernel" and leaf == "weight":
        value = value.transpose(2, 3, 1, 0) if rank == 4 else value.T
    return name, np.ascontiguousarray(value)


def _to_torch(leaf: str, value: np.ndarray, nin: bool) -> tuple[str, np.ndarray]:
    """The inverse of `_to_flax`; `nin` tells a NIN layer from a linear one."""
    value = np.asarray(value)
    if leaf == "bias":
        return ("b" if nin else "bias"), value
    if leaf == "kernel" and not nin:
        value = np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)
    return ("W" if nin else "weight"), value


def _put(tree: Params, path: str, leaf: str, value: np.ndarray) -> None:
    for part in filter(None, path.split("/")):
        tree = tree.setdefault(part, {})
    tree[leaf] = value


def leaves(tree: Params, path: str = "") -> dict[str, dict[str, np.ndarray]]:
    """{path of a layer: {leaf name: array}} of nested parameters."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{path}/{name}".lstrip("/"))  # type: ignore[arg-type]
        else:
            found.setdefault(path, {})[name] = value
    return found


def _bare(state_dict: StateDict) -> dict[str, np.ndarray]:
    """The state dict without the 'module.' that DistributedDataParallel puts before every key."""
    bare = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
    for key, value in bare.items():
        if not isinstance(value, np.ndarray):
            raise UserError(f"a state dict holds arrays only, but {key!r} is a {type(value).__name__}")
    return bare


def _layer_params(arrays: StateDict, table: Mapping[str, str]) -> Params:
    """The parameters of one layer from {key below the layer: array}, by a table {their sublayer: ours}."""
    params: Params = {}
    for key, value in arrays.items():
        sublayer = key.rpartition(".")[0]
        if sublayer not in table:
            raise UserError(f"unexpected array {key!r} in the state dict: no layer of its place has one")
        _put(params, table[sublayer], *_to_flax(key, value))
    return params


def _check_complete(params: Params, without_bias: Sequence[str] = ()) -> None:
    """UserError unless every layer has its weight and its bias, and every residual block its five layers."""
    for path, arrays in leaves(params).items():
        expected = 1 if path.split("/")[-1] in without_bias else 2
        if len(arrays) != expected or set(arrays) == {"bias"}:
            raise UserError(f"the state dict is incomplete: {path} has only {', '.join(arrays)}")
    for name, layer in params.items():
        if "conv_1" in layer and not {"conv_0", "time"} <= set(layer):
            raise UserError(f"the state dict is incomplete: {name} has only {', '.join(layer)}")


# --- Generator --------------------------------------------------------------------------------------------------

# Per kind of layer, {sublayer in the reference: sublayer here}, in the order of the reference's state dicts.
_SUBLAYERS: dict[str, dict[str, str]] = {
    "block": {
        "GroupNorm_0.style": "norm_0/style",
        "Conv_0": "conv_0",
        "Dense_0": "time",
        "GroupNorm_1.style": "norm_1/style",
        "GroupNorm_1": "norm_1",
        "Conv_1": "conv_1",
        "Conv_2": "shortcut",
        "NIN_0": "shortcut",
    },
    "attn": {"GroupNorm_0": "norm", "NIN_0": "q", "NIN_1": "k", "NIN_2": "v", "NIN_3": "out"},
    "resample": {"Conv2d_0": "fir_conv", "Conv_0": "conv"},
    "combine": {"Conv_0": ""},
    "plain": {"": ""},
}
# One letter a kind, so that the order of layers can be read as text; a number without parameters is a resampler.
_LETTERS = {"block": "B", "attn": "A", "resample": "R", "combine": "M"}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which layers a generator has, as far as its parameters tell."""

    num_levels: int
    num_res_blocks: int
    attn_levels: tuple[int, ...]
    conditional: bool
    input_layer: str  # '', 'combine' (input_skip) or 'pyramid' (residual)
    output_skip: bool

    def names(self) -> Iterator[tuple[str, str]]:
        """(layer, kind) of `all_modules`, in order."""
        if self.conditional:
            yield from (("time_0", "plain"), ("time_1", "plain"))
        yield "conv_in", "plain"
        for level in range(self.num_levels):
            for i in range(self.num_res_blocks):
                yield f"down_{level}_block_{i}", "block"
                if level in self.attn_levels:
                    yield f"down_{level}_attn_{i}", "attn"
            if level < self.num_levels - 1:
                yield f"down_{level}_resample", "resample"
                if self.input_layer:
                    yield f"down_{level}_{self.input_layer}", "combine" if self.input_layer == "combine" else "resample"
        yield from (("mid_block_0", "block"), ("mid_attn", "attn"), ("mid_block_1", "block"))
        for level in reversed(range(self.num_levels)):
            for i in range(self.num_res_blocks + 1):
                yield f"up_{level}_block_{i}", "block"
            if level in self.attn_levels:
                yield f"up_{level}_attn", "attn"
            if self.output_skip:
                yield from ((f"up_{level}_image_norm", "plain"), (f"up_{level}_image_conv", "plain"))
            if level > 0:
                yield f"up_{level}_resample", "resample"
        if not self.output_skip:
            yield from (("out_norm", "plain"), ("out_conv", "plain"))


def _kind(arrays: StateDict) -> str:
    """The kind of one `all_modules.N` from its keys and shapes."""
    shapes = {key: np.shape(value) for key, value in arrays.items()}
    if "NIN_3.W" in shapes:
        return "attn"
    if "Conv_1.weight" in shapes:
        shortcut = shapes.get("Conv_2.weight")
        # Only a resampling block has a shortcut convolution between equal widths: skips widen the others.
        return "resample" if shortcut and shortcut[0] == shortcut[1] else "block"
    if "Conv2d_0.weight" in shapes or "Conv_0.weight" in shapes:
        return "combine" if shapes.get("Conv_0.weight", ())[2:] == (1, 1) else "resample"
    return "plain" if shapes else "resample"


def _modules(state_dict: StateDict) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """([{key below: array} of all_modules.0, .1, ...], {key: array} of the rest), every key accounted for."""
    numbered: dict[int, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, value in _bare(state_dict).items():
        match = re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", key)
        if match:
            numbered.setdefault(int(match[1]), {})[match[2]] = value
        else:
            rest[key] = value
    return [numbered.get(n, {}) for n in range(max(numbered, default=-1) + 1)], rest


_NO_GENERATOR = "this is no state dict of a DDGAN generator"


def _plan_of_state_dict(modules: Sequence[StateDict]) -> _Plan:
    """Read the order of the kinds of layers as text: head, then levels split by resamplers."""
    kinds = [_kind(arrays) for arrays in modules]
    text = "".join(
        _LETTERS.get(kind, str(np.ndim(m.get("weight", ())))) for kind, m in zip(kinds, modules, strict=True)
    )
    if "W" in (modules[0] if modules else {}):
        raise UserError("the Fourier time embedding is not supported: the reference cannot train it (log 0 at t = 0)")
    head = re.match(r"(22)?4", text)
    segments = re.split(r"R[RM]?", text[head.end() :] if head else "")
    levels = (len(segments) + 1) // 2
    middle = segments[levels - 1]  # the last level down, the middle, the first level up
    separator = re.search(r"R([RM]?)", text)
    plan = _Plan(
        num_levels=levels,
        num_res_blocks=max((middle.count("B") - 3) // 2, 0),
        attn_levels=tuple(i for i, layers in enumerate(segments[: levels - 1]) if "A" in layers)
        + ((levels - 1,) if middle.count("A") > 1 else ()),
        conditional=bool(head and head[1]),
        input_layer={"": "", "M": "combine", "R": "pyramid"}[separator[1]] if separator else "",
        output_skip=levels > 1 and middle.endswith("14"),
    )
    if [kind for _, kind in plan.names()] != kinds:
        raise UserError(f"{_NO_GENERATOR}: its layers do not follow the order down, middle, up")
    return plan


def _plan_of_params(params: Params) -> _Plan:
    down = [re.fullmatch(r"down_(\d+)_(block|attn)_(\d+)", name) for name in params]
    found = {(m[2], int(m[1]), int(m[3])) for m in down if m}
    blocks = [(level, i) for kind, level, i in found if kind == "block"]
    return _Plan(
        num_levels=1 + max(level for level, _ in blocks),
        num_res_blocks=1 + max(i for _, i in blocks),
        attn_levels=tuple(sorted({level for kind, level, _ in found if kind == "attn"})),
        conditional="time_0" in params,
        input_layer="combine" if "down_0_combine" in params else "pyramid" if "down_0_pyramid" in params else "",
        output_skip="up_0_image_conv" in params,
    )


def generator_params(state_dict: StateDict) -> Params:
    """Parameters of a Generator from the reference's state dict, with or without 'module.' before its keys.

    Raises UserError if the keys are not those of a generator.
    """
    modules, rest = _modules(state_dict)
    plan = _plan_of_state_dict(modules)
    params = {
        name: _layer_params(arrays, _SUBLAYERS[_table(kind, arrays)])
        for (name, kind), arrays in zip(plan.names(), modules, strict=True)
        if arrays
    }
    for key, value in rest.items():
        match = re.fullmatch(r"z_transform\.(\d{1,3})\.(weight|bias)", key)
        if not match or int(match[1]) % 2 == 0:
            raise UserError(f"{_NO_GENERATOR}: unknown key {key!r}")
        _put(params, f"z_{int(match[1]) // 2}", *_to_flax(key, value))
    if not rest or any(f"z_{i}" not in params for i in range(len(rest) // 2)):
        raise UserError(f"{_NO_GENERATOR}: it lacks layers of z_transform")
    _check_complete(params)
    return params


def _table(kind: str, arrays: Mapping[str, Any]) -> str:
    """Resampling blocks are blocks in what they hold."""
    return "block" if kind == "resample" and any("Conv_1" in key or "conv_1" in key for key in arrays) else kind


def generator_state_dict(params: Params) -> dict[str, np.ndarray]:
    """The inverse of `generator_params`: keys in the reference's order, without 'module.', float32."""
    state_dict: dict[str, np.ndarray] = {}
    plan = _plan_of_params(params)
    for number, (name, kind) in enumerate(plan.names()):
        layers = leaves(params.get(name, {}))
        for theirs, ours in _SUBLAYERS[_table(kind, layers)].items():
            kernel = layers.get(ours, {}).get("kernel", ())
            nin = theirs.startswith("NIN")
            if ours not in layers or (ours == "shortcut" and nin != (np.ndim(kernel) == 2)):
                continue
            for leaf in ("kernel", "scale", "bias"):
                if leaf in layers[ours]:
                    key, value = _to_torch(leaf, layers[ours][leaf], nin)
                    state_dict[".".join(filter(None, ("all_modules", str(number), theirs, key)))] = value
    for i in range(sum(name.startswith("z_") for name in params)):
        for leaf in ("kernel", "bias"):
            key, value = _to_torch(leaf, params[f"z_{i}"][leaf], nin=False)
            state_dict[f"z_transform.{2 * i + 1}.{key}"] = value
    return state_dict


# Flags of the reference that say nothing about its generator, or nothing about this one; allowed as hints, so that
# all flags of a run can be passed.
_OTHER_FLAGS = frozenset(
    "batch_size beta1 beta2 beta_max beta_min dataset ema_decay exp fourier_scale lazy_reg local_rank lr_d lr_g "
    "master_address ngf no_lr_decay node_rank num_epoch num_proc_node num_process_per_node num_timesteps r1_gamma "
    "resume save_ckpt_every save_content save_content_every seed t_emb_dim use_ema use_geometric world_size "
    "image_size fir resamp_with_conv progressive progressive_input progressive_combine".split()
)
# What arrays never tell, with the value that the reference has unless its flags say otherwise.
_UNTOLD = {"fir": True, "skip_rescale": True, "tanh": True, "centered": True}


def generator_config(state_dict: StateDict, **hints: Any) -> dict[str, Any]:
    """The fields of the Generator that a state dict of the reference belongs to.

    Everything that keys and shapes tell is read from them. The rest comes from `hints`, under the names of the
    Generator's fields or of the reference's flags (all flags of a run may be passed): `image_size`, if there is
    attention outside the middle; `fir`, unless a layer tells it; `skip_rescale`, `tanh`, `centered`. Raises UserError
    that names the hints which are missing, unknown, or contradict the arrays.
    """
    modules, rest = _modules(state_dict)
    plan = _plan_of_state_dict(modules)
    params = generator_params(state_dict)
    hints = {{"num_channels": "image_channels", "num_channels_dae": "nf"}.get(k, k): v for k, v in hints.items()}
    if "not_use_tanh" in hints:
        hints["tanh"] = not hints.pop("not_use_tanh")
    if hints.pop("embedding_type", "positional") != "positional":
        raise UserError("the Fourier time embedding is not supported: the reference cannot train it (log 0 at t = 0)")

    def width(name: str) -> int:
        return params[name]["conv_0"]["kernel"].shape[-1]

    nf = params["conv_in"]["kernel"].shape[-1]
    resblock = params["up_0_block_0"]  # its shortcut is never missing
    ddpm = resblock["shortcut"]["kernel"].ndim == 2
    config: dict[str, Any] = {
        "image_channels": params["conv_in"]["kernel"].shape[2],
        "nf": nf,
        "ch_mult": tuple(width(f"down_{level}_block_0") // nf for level in range(plan.num_levels)),
        "num_res_blocks": plan.num_res_blocks,
        "nz": params["z_0"]["kernel"].shape[0],
        "z_emb_dim": params["z_0"]["kernel"].shape[1],
        "n_mlp": len(rest) // 2 - 1,
        "resblock_type": "ddpm" if ddpm else "biggan" if "style" in resblock["norm_1"] else "biggan_oneadagn",
        "conditional": plan.conditional,
    }
    if plan.num_levels > 1:  # with a single level these change nothing
        config["progressive"] = "output_skip" if plan.output_skip else "none"
        config["progressive_input"] = {"": "none", "combine": "input_skip", "pyramid": "residual"}[plan.input_layer]
        if plan.input_layer == "combine":
            widened = (
                params["down_1_block_0"]["conv_0"]["kernel"].shape[2] > params["down_0_combine"]["kernel"].shape[-1]
            )
            config["progressive_combine"] = "cat" if widened else "sum"
        resamplers = [params.get("down_0_pyramid", {}), params.get("down_0_resample", {}) if ddpm else {}]
        if any("fir_conv" in layer or "conv" in layer for layer in resamplers):
            config["fir"] = any("fir_conv" in layer for layer in resamplers)
        if ddpm:
            config["resamp_with_conv"] = bool(resamplers[1])

    untold: dict[str, Any] = dict(_UNTOLD)
    if "fir" in config or plan.num_levels == 1:
        untold.pop("fir")
    if plan.attn_levels:
        untold["image_size"] = 32
    missing = [name for name in untold if name not in hints]
    if missing:
        example = ", ".join(f"{name}={untold[name]}" for name in missing)
        raise UserError(f"the arrays do not tell {', '.join(missing)}: name them as hints, for instance {example}")
    config |= {name: hints[name] for name in untold if name != "image_size"}
    config["attn_resolutions"] = tuple(int(hints["image_size"]) >> level for level in plan.attn_levels)

    return config | _checked_hints(config, hints)


def _checked_hints(config: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The hints that add a field of their own; UserError for those that are unknown or contradict `config`."""
    added = {}
    for name, value in hints.items():
        if name in ("fir_kernel", "dropout"):
            added[name] = tuple(value) if name == "fir_kernel" else value
        elif name == "attn_resolutions":  # those that no level has do not matter
            sizes = (
                [int(hints["image_size"]) >> i for i in range(len(config["ch_mult"]))] if "image_size" in hints else []
            )
            if sizes and {size for size in sizes if size in value} != set(config[name]):
                raise UserError(f"the hint attn_resolutions={value} contradicts the arrays, which say {config[name]}")
        elif name in config:
            told = config[name]
            if (tuple(value) if isinstance(told, tuple) else value) != told:
                raise UserError(f"the hint {name}={value} contradicts the arrays, which say {told}")
        elif name not in _OTHER_FLAGS:
            raise UserError(
                f"unknown hint {name!r}: hints are fields of Generator, image_size, or flags of the reference"
            )
    return added


# --- Discriminator ----------------------------------------------------------------------------------------------

_DISC_LAYERS = {
    "t_embed.main.0": "time_0",
    "t_embed.main.2": "time_1",
    "start_conv": "conv_in",
    "final_conv": "conv_out",
    "end_linear": "out",
}
_STAGE_LAYERS = {"conv1.0": "conv_0", "conv2.0": "conv_1", "dense_t1": "time", "skip.0": "shortcut"}


def discriminator_params(state_dict: StateDict) -> Params:
    """Parameters of a Discriminator from the reference's state dict. Raises UserError if the keys are not a D's."""
    params: Params = {}
    for key, value in _bare(state_dict).items():
        layer = key.rpartition(".")[0]
        match = re.fullmatch(r"conv(\d{1,2})\.(.+)", layer)
        if match and match[2] in _STAGE_LAYERS:
            layer = f"stage_{int(match[1]) - 1}/{_STAGE_LAYERS[match[2]]}"
        elif layer in _DISC_LAYERS:
            layer = _DISC_LAYERS[layer]
        else:
            raise UserError(f"this is no state dict of a DDGAN discriminator: unknown key {key!r}")
        _put(params, layer, *_to_flax(key, value))
    if missing := set(_DISC_LAYERS.values()) - params.keys():
        raise UserError(f"this is no state dict of a DDGAN discriminator: it lacks {', '.join(sorted(missing))}")
    _check_complete(params, without_bias=("shortcut",))
    return params


def discriminator_state_dict(params: Params) -> dict[str, np.ndarray]:
    """The inverse of `discriminator_params`: keys in the reference's order, without 'module.', float32."""
    names = {theirs: ours for theirs, ours in _DISC_LAYERS.items() if theirs.startswith(("t_embed", "start"))}
    for i in range(sum(name.startswith("stage_") for name in params)):
        names |= {f"conv{i + 1}.{theirs}": f"stage_{i}/{ours}" for theirs, ours in _STAGE_LAYERS.items()}
    names |= {theirs: ours for theirs, ours in _DISC_LAYERS.items() if theirs not in names}
    layers = leaves(params)
    state_dict = {}
    for theirs, ours in names.items():
        for leaf in ("kernel", "bias"):
            if leaf in layers[ours]:
                key, value = _to_torch(leaf, layers[ours][leaf], nin=False)
                state_dict[f"{theirs}.{key}"] = value
    return state_dict


def discriminator_config(state_dict: StateDict) -> dict[str, Any]:
    """The fields of the Discriminator that a state dict belongs to, the reference's small or large; else UserError.

    (The arrays tell widths, not where the image is halved; the two have different numbers of stages.)
    """
    params = discriminator_params(state_dict)
    start = params["conv_in"]["kernel"].shape[-1]
    widths = [
        params[f"stage_{i}"]["conv_1"]["kernel"].shape[-1] for i in range(sum(n.startswith("stage_") for n in params))
    ]
    factors = tuple(2 * width / start for width in widths)  # both start with 2 ngf
    if factors not in ((2, 4, 8, 8), (4, 8, 8, 8, 8, 8)):
        raise UserError(
            f"a discriminator with stages of {widths} channels is neither the reference's small nor its large one"
        )
    small = len(factors) == 4
    return {
        "ngf": start // 2,
        "start": 2,
        "stages": tuple((factor, not small or i > 0) for i, factor in enumerate(factors)),
        "t_emb_dim": params["time_0"]["kernel"].shape[0],
        "zero_final": small,
    }
