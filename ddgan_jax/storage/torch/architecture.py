"""The fields of the Generator or Discriminator that a state dict of the reference belongs to.

Arrays tell most of them; `generator_config` asks for the rest by name.
"""

from collections.abc import Mapping
from typing import Any

from ddgan_jax.errors import UserError
from ddgan_jax.storage.torch import convert, names
from ddgan_jax.storage.torch.convert import Params, StateDict

# What arrays do not tell, or not always, with the reference's defaults.
UNTOLD = {"fir": True, "skip_rescale": True, "tanh": True, "centered": True, "image_size": 32}
_TYPES = {name: type(value) for name, value in UNTOLD.items()} | {"attn_resolutions": tuple, "fir_kernel": tuple}
_ALIASES = {"num_channels": "image_channels", "num_channels_dae": "nf"}
# Fields that make no difference to some arrays, and flags of the reference: all those of a run can be passed as hints.
_UNCHECKED = frozenset(
    "dropout fir fir_kernel image_size progressive progressive_combine progressive_input resamp_with_conv "
    "batch_size beta1 beta2 beta_max beta_min dataset ema_decay embedding_type exp fourier_scale lazy_reg local_rank "
    "lr_d lr_g master_address ngf no_lr_decay node_rank num_epoch num_proc_node num_process_per_node num_timesteps "
    "r1_gamma resume save_ckpt_every save_content save_content_every seed t_emb_dim use_ema use_geometric "
    "world_size".split()
)


def fields_of(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Hints under the names of our fields, lists as tuples; UserError for a wrong type."""
    fields: dict[str, Any] = {}
    for name, value in hints.items():
        if name == "embedding_type" and value != "positional":
            raise UserError(names.FOURIER)
        field, value = ("tanh", not value) if name == "not_use_tanh" else (_ALIASES.get(name, str(name)), value)
        fields[field] = tuple(value) if isinstance(value, list) else value
        if not isinstance(fields[field], _TYPES.get(field, object)):
            raise UserError(f"the hint {field}={value!r} must be a {_TYPES[field].__name__}")
    return fields


def generator_config(state_dict: StateDict, /, **hints: Any) -> dict[str, Any]:
    """The fields of the Generator that a state dict belongs to.

    `hints` tell what arrays do not, under the names of the Generator's fields or of the reference's flags:
    `image_size`, if levels have attention; `fir`, unless a layer tells it; `skip_rescale`, `tanh`, `centered`. All
    flags of a run may be passed, or all fields of a Generator but dtype, num_classes, patch_size and remat. Raises
    UserError that names the hints which are missing, unknown, or contradict the arrays.
    """
    given, arrays = fields_of(hints), convert.arrays_of(state_dict)
    table, fields = names.generator(arrays, 0)
    params = convert.to_ours(table, arrays)
    config = _told(params, fields)
    if config["nz"] == 1 and given.get("nz") == 0:
        config["nz"] = 0  # a generator without z has the layer all the same, for a constant zero
    levels = range(len(config["ch_mult"]))
    with_attention = [level for level in levels if f"down_{level}_attn_0" in params]

    unneeded = {"fir": "fir" in config or len(levels) == 1, "image_size": not with_attention}
    untold = [name for name in UNTOLD if not unneeded.get(name)]
    if missing := [name for name in untold if name not in given]:
        example = ", ".join(f"{name}={UNTOLD[name]}" for name in missing)
        raise UserError(
            f"the arrays do not tell {', '.join(missing)}: name them as hints, for instance {example}, or name the "
            "--config of their training"
        )
    config |= {name: given[name] for name in untold if name != "image_size"}
    sizes = [given["image_size"] >> level for level in levels] if "image_size" in given else []
    config["attn_resolutions"] = tuple(sizes[level] for level in with_attention)

    for name, value in given.items():
        if name == "attn_resolutions":  # those that no level has do not matter
            value = tuple(size for size in sizes if size in value)
        if name in config and value != config[name]:
            raise UserError(f"the hint {name}={given[name]} contradicts the arrays, which say {config[name]}")
        if name not in _UNCHECKED | config.keys():
            raise UserError(f"unknown hint {name!r}: hints are fields of Generator, image_size, or reference flags")
    return config | {name: given[name] for name in ("dropout", "fir_kernel") if name in given}


def _told(params: Params, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that arrays tell, from parameters and from what their names tell; without those of no effect."""
    *_, image_channels, nf = params["conv_in"]["kernel"].shape
    nz, z_emb_dim = params["z_0"]["kernel"].shape
    levels = sum(name.startswith("down_") and name.endswith("_block_0") for name in params)
    first = [params[f"down_{level}_block_0"]["conv_0"]["kernel"].shape for level in range(levels)]
    if any(shape[3] % nf for shape in first):
        raise UserError(
            f"levels of {[shape[3] for shape in first]} channels are no multiples of the first layer's {nf}"
        )
    ch_mult = tuple(shape[3] // nf for shape in first)
    config = dict(fields, image_channels=image_channels, nf=nf, ch_mult=ch_mult, nz=nz, z_emb_dim=z_emb_dim)
    if levels == 1:
        return {name: value for name, value in config.items() if not name.startswith("progressive")}
    if config["progressive_input"] == "input_skip":
        config["progressive_combine"] = "cat" if first[1][2] > first[0][3] else "sum"
    if config["resblock_type"] == "ddpm":
        config["resamp_with_conv"] = "down_0_resample" in params
    for layer in (params.get("down_0_resample", {}), params.get("down_0_pyramid", {})):
        if "fir_conv" in layer or "conv" in layer:
            config["fir"] = "fir_conv" in layer
    return config


def discriminator_config(state_dict: StateDict) -> dict[str, Any]:
    """The fields of the Discriminator that a state dict belongs to, the reference's small or large; else UserError.

    Arrays do not tell where the image is halved; the numbers of stages tell the two apart.
    """
    params = convert.discriminator_params(state_dict)
    start = params["conv_in"]["kernel"].shape[3]  # both start with 2 ngf
    widths = [params[f"stage_{i}"]["conv_1"]["kernel"].shape[3] for i in range(len(params) - 5)]  # five are no stages
    factors, small, large = tuple(2 * width / start for width in widths), (2, 4, 8, 8), (4, 8, 8, 8, 8, 8)
    if factors not in (small, large):
        raise UserError(f"a discriminator of {widths} channels is neither the reference's small nor its large one")
    stages = tuple((factor, factors == large or i > 0) for i, factor in enumerate(factors))
    t_emb_dim = params["time_0"]["kernel"].shape[0]
    return dict(ngf=start // 2, start=2, stages=stages, t_emb_dim=t_emb_dim, zero_final=factors == small)
