"""The names of the reference and ours as tables: rows (key in the reference, path here, layout in the reference).

Rows come in the order of the reference's state dicts. It numbers the layers of its generator, `all_modules.N`, in the
order of the forward pass. A layout names axes: o(ut), i(n), h and w of a 3x3 kernel, x and y of a 1x1 kernel; here they
are always in the order of `AXES`. Tables are made for arrays named as in one column: 0 the reference's, 1 ours.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError

Row = tuple[str, str, str]
Layer = tuple[str, str, str]  # (name in the reference, name here, kind)
Arrays = Mapping[str, Any]

AXES = "hwxyio"
KINDS = {
    "conv": (("weight", "kernel", "oihw"), ("bias", "bias", "o")),
    "conv 1x1": (("weight", "kernel", "oixy"), ("bias", "bias", "o")),
    "conv 1x1, no bias": (("weight", "kernel", "oixy"),),
    "dense": (("weight", "kernel", "oi"), ("bias", "bias", "o")),
    "nin": (("W", "kernel", "io"), ("b", "bias", "o")),  # a dense layer on the channels
    "norm": (("weight", "scale", "o"), ("bias", "bias", "o")),
}
NORM, CONV, DENSE = ([("", "", kind)] for kind in ("norm", "conv", "dense"))
COMBINE, FIR, NAIVE = [("Conv_0", "", "conv 1x1")], [("Conv2d_0", "fir_conv", "conv")], [("Conv_0", "conv", "conv")]
ATTENTION = [("GroupNorm_0", "norm", "norm"), ("NIN_0", "q", "nin"), ("NIN_1", "k", "nin"), ("NIN_2", "v", "nin")]
ATTENTION += [("NIN_3", "out", "nin")]
STAGE = [("conv1.0", "conv_0", "conv"), ("conv2.0", "conv_1", "conv"), ("dense_t1", "time", "dense")]
STAGE += [("skip.0", "shortcut", "conv 1x1, no bias")]
# The fields of a Generator that change the names of its layers, besides their numbers.
CHOICES = {
    "resblock_type": ("biggan", "biggan_oneadagn", "ddpm"),
    "conditional": (True, False),
    "progressive": ("none", "output_skip"),
    "progressive_input": ("none", "input_skip", "residual"),
}
FOURIER = "the Fourier time embedding is not supported: the reference cannot train it (log 0 at t = 0)"


def rows(layers: Iterable[Layer], key: str = "", path: str = "") -> list[Row]:
    """The rows of layers that are below `key` in the reference and below `path` here."""
    return [
        (".".join(filter(None, (key, theirs, array))), "/".join(filter(None, (path, ours, leaf))), layout)
        for theirs, ours, kind in layers
        for array, leaf, layout in KINDS[kind]
    ]


def here(layout: str) -> str:
    """The layout here of an array that has this layout in the reference."""
    return "".join(sorted(layout, key=AXES.index))


def _misfit(table: Iterable[Row], arrays: Arrays, column: int) -> str:
    """What arrays have that keeps them from being those of a table; '' if they are."""
    layouts = {row[column]: here(row[2]) if column else row[2] for row in table}
    if different := layouts.keys() ^ arrays.keys():
        return f"{'an unknown' if min(different) in arrays else 'no'} array {min(different)!r}"
    sizes = {"h": 3, "w": 3, "x": 1, "y": 1}
    for name, layout in layouts.items():
        shape = np.shape(arrays[name])
        fits = (size == sizes.get(axis, size) > 0 for axis, size in zip(layout, shape, strict=False))
        if len(layout) != len(shape) or not all(fits):
            return f"{name!r} in the shape {shape}"
    return ""


def discriminator(arrays: Arrays, column: int) -> list[Row]:
    """The table of a discriminator; UserError unless the arrays are exactly those of one."""
    table = rows([("t_embed.main.0", "time_0", "dense"), ("t_embed.main.2", "time_1", "dense")])
    table += rows([("start_conv", "conv_in", "conv 1x1")])
    for i in range(sum(name.endswith(("skip.0.weight", "shortcut/kernel")) for name in arrays)):
        table += rows(STAGE, f"conv{i + 1}", f"stage_{i}")
    table += rows([("final_conv", "conv_out", "conv"), ("end_linear", "out", "dense")])
    if misfit := _misfit(table, arrays, column):
        raise UserError(f"this is no state dict of a DDGAN discriminator: it has {misfit}")
    return table


def generator(arrays: Arrays, column: int) -> tuple[list[Row], dict[str, Any]]:
    """The table of a generator, and the fields that names tell; UserError unless the arrays are exactly those of one."""
    if "all_modules.0.W" in arrays:
        raise UserError(FOURIER)
    num_blocks = sum(name.endswith((".Conv_1.weight", "/conv_1/kernel")) for name in arrays)
    num_dense = max(sum(name.startswith("z_") and name.endswith(("weight", "kernel")) for name in arrays), 1)
    misfit = "other layers than down, middle, up, or not all of their arrays"
    for levels, *choice in itertools.product(range(num_blocks // 3, 0, -1), *CHOICES.values()):
        fields: dict[str, Any] = dict(zip(CHOICES, choice, strict=True))
        # Two blocks are in the middle; all but 'ddpm' resample by blocks, one down and one up between two levels.
        others = 2 if fields["resblock_type"] == "ddpm" else 2 * levels
        fields["num_res_blocks"] = (num_blocks - others - levels) // (2 * levels)
        try:
            table = _modules(arrays, column, levels, **fields)
        except LookupError:
            continue
        table += rows((f"z_transform.{2 * i + 1}", f"z_{i}", "dense") for i in range(num_dense))
        misfit = _misfit(table, arrays, column)
        if not misfit:
            return table, fields | {"n_mlp": num_dense - 1}
    raise UserError(f"this is no state dict of a DDGAN generator: it has {misfit}")


def _block(resblock_type: str, *shortcut: Layer) -> list[Layer]:
    plain, adaptive = ("GroupNorm_1", "norm_1", "norm"), ("GroupNorm_1.style", "norm_1/style", "dense")
    return [
        ("GroupNorm_0.style", "norm_0/style", "dense"),
        ("Conv_0", "conv_0", "conv"),
        ("Dense_0", "time", "dense"),
        plain if resblock_type == "biggan_oneadagn" else adaptive,
        ("Conv_1", "conv_1", "conv"),
        *shortcut,
    ]


def _modules(
    arrays: Arrays,
    column: int,
    levels: int,
    num_res_blocks: int,
    resblock_type: str,
    conditional: bool,
    progressive: str,
    progressive_input: str,
) -> list[Row]:
    """The rows of the reference's all_modules, in the order of the forward pass; LookupError if arrays are not there."""
    ddpm = resblock_type == "ddpm"
    equal = _block(resblock_type)
    wider = _block(resblock_type, ("NIN_0", "shortcut", "nin") if ddpm else ("Conv_2", "shortcut", "conv 1x1"))
    resample = (FIR, NAIVE, []) if ddpm else (wider,)
    layers: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        layer = name.partition("/")[0] if column else ".".join(name.split(".")[:2])
        layers.setdefault(layer, {})[name] = value
    taken: list[list[Row]] = []
    attention = set()

    def take(name: str, *variants: list[Layer], optional: bool = False) -> bool:
        place = (f"all_modules.{len(taken)}", name)
        for new in (rows(variant, *place) for variant in variants):
            if not _misfit(new, layers.get(place[column], {}), column):
                taken.append(new)
                return True
        if not optional:
            raise LookupError(name)
        return False

    if conditional:
        take("time_0", DENSE)
        take("time_1", DENSE)
    take("conv_in", CONV)
    for level in range(levels):
        for i in range(num_res_blocks):
            take(f"down_{level}_block_{i}", equal, *[wider] * (i == 0))
            if (i == 0 or level in attention) and take(f"down_{level}_attn_{i}", ATTENTION, optional=i == 0):
                attention.add(level)
        if level < levels - 1:
            take(f"down_{level}_resample", *resample)
            if progressive_input == "input_skip":
                take(f"down_{level}_combine", COMBINE)
            elif progressive_input == "residual":
                take(f"down_{level}_pyramid", FIR, NAIVE)
    take("mid_block_0", equal)
    take("mid_attn", ATTENTION)
    take("mid_block_1", equal)
    for level in reversed(range(levels)):
        for i in range(num_res_blocks + 1):
            take(f"up_{level}_block_{i}", wider)  # by the skip
        if level in attention:
            take(f"up_{level}_attn", ATTENTION)
        if progressive == "output_skip":
            take(f"up_{level}_image_norm", NORM)
            take(f"up_{level}_image_conv", CONV)
        if level > 0:
            take(f"up_{level}_resample", *resample)
    if progressive == "none":
        take("out_norm", NORM)
        take("out_conv", CONV)
    return [row for new in taken for row in new]
