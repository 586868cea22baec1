"""The names of the reference and ours as tables: rows (key in the reference, path here, layout in the reference).

Rows come in the order of the reference's state dicts, which number the layers of a generator, `all_modules.N`, in the
order of the forward pass. A layout names axes: o(ut), i(n), O for an input as wide as the output, h and w of a
3x3 kernel, x and y of a 1x1 kernel; here they are always in the order of `AXES`.
Arrays are named as in one column of the rows: 0 the reference's, 1 ours.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError

Row = tuple[str, str, str]
Layer = tuple[str, str, str]  # (name in the reference, name here, kind)
Arrays = Mapping[str, Any]

AXES, SIZES = "hwxyiOo", {"h": 3, "w": 3, "x": 1, "y": 1}
WEIGHT, BIAS = ("weight", "kernel"), ("bias", "bias", "o")
KINDS: dict[str, tuple[Row, ...]] = {
    "conv": ((*WEIGHT, "oihw"), BIAS),
    "conv 1x1": ((*WEIGHT, "oixy"), BIAS),
    "conv 1x1, same width": ((*WEIGHT, "oOxy"), BIAS),
    "conv 1x1, no bias": ((*WEIGHT, "oixy"),),
    "dense": ((*WEIGHT, "oi"), BIAS),
    "nin": (("W", "kernel", "io"), ("b", "bias", "o")),  # a dense layer on the channels
    "norm": (("weight", "scale", "o"), BIAS),
}
NORM, CONV, DENSE = ([("", "", kind)] for kind in ("norm", "conv", "dense"))
COMBINE, FIR, NAIVE = [("Conv_0", "", "conv 1x1")], [("Conv2d_0", "fir_conv", "conv")], [("Conv_0", "conv", "conv")]
ATTENTION = [("GroupNorm_0", "norm", "norm"), ("NIN_0", "q", "nin"), ("NIN_1", "k", "nin"), ("NIN_2", "v", "nin")]
ATTENTION += [("NIN_3", "out", "nin")]
STAGE = [("conv1.0", "conv_0", "conv"), ("conv2.0", "conv_1", "conv"), ("dense_t1", "time", "dense")]
STAGE += [("skip.0", "shortcut", "conv 1x1, no bias")]
# The fields of a Generator that change the names of its layers, besides their numbers.
CHOICES: dict[str, tuple[Any, ...]] = {
    "resblock_type": ("biggan", "biggan_oneadagn", "ddpm"),
    "conditional": (True, False),
    "progressive": ("none", "output_skip"),
    "progressive_input": ("none", "input_skip", "residual"),
}
FOURIER = "the Fourier time embedding is not supported: the reference cannot train it (log 0 at t = 0)"
MISFIT = "this is no state dict of a DDGAN {}: {!r} is missing, unknown, or of a wrong shape"


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


def _misfit(table: Iterable[Row], arrays: Arrays, column: int) -> str | None:
    """The name of an array that is missing, unknown, or of a wrong shape; None if the arrays are those of the table."""
    layouts = {row[column]: here(row[2]) if column else row[2] for row in table}
    for name in sorted(layouts.keys() | arrays.keys()):
        layout, shape = layouts.get(name), np.shape(arrays.get(name, ()))
        if layout is None or len(layout) != len(shape):
            return name
        sizes = dict(SIZES)
        if any(size != sizes.setdefault(axis.lower(), size or 1) for axis, size in zip(layout, shape, strict=True)):
            return name
    return None


def discriminator(arrays: Arrays, column: int) -> list[Row]:
    """The table of a discriminator; UserError unless the arrays are exactly those of one."""
    table = rows([("t_embed.main.0", "time_0", "dense"), ("t_embed.main.2", "time_1", "dense")])
    table += rows([("start_conv", "conv_in", "conv 1x1")])
    for i in range(sum(name.endswith(("skip.0.weight", "shortcut/kernel")) for name in arrays)):
        table += rows(STAGE, f"conv{i + 1}", f"stage_{i}")
    table += rows([("final_conv", "conv_out", "conv"), ("end_linear", "out", "dense")])
    if (misfit := _misfit(table, arrays, column)) is not None:
        raise UserError(MISFIT.format("discriminator", misfit))
    return table


def generator(arrays: Arrays, column: int) -> tuple[list[Row], dict[str, Any]]:
    """The table of a generator and the fields that names tell; UserError unless the arrays are exactly those of one."""
    if "all_modules.0.W" in arrays:
        raise UserError(FOURIER)
    layers: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        layer = name.partition("/")[0] if column else ".".join(name.split(".")[:2])
        layers.setdefault(layer, {})[name] = value
    num_blocks = sum(name.endswith((".Conv_1.weight", "/conv_1/kernel")) for name in arrays)
    num_dense = max(sum(name.startswith("z_") for name in layers), 1)
    z = rows((f"z_transform.{2 * i + 1}", f"z_{i}", "dense") for i in range(num_dense))
    furthest: tuple[int, str | None] = (0, "all_modules")
    choices = [dict(zip(CHOICES, choice, strict=True)) for choice in itertools.product(*CHOICES.values())]
    # Most levels first: with fewer, blocks that resample could pass for others.
    for levels, fields in itertools.product(range(num_blocks // 3, 0, -1), choices):
        # Two blocks are in the middle; all but 'ddpm' resample by blocks, one down and one up between two levels.
        others = 2 if fields["resblock_type"] == "ddpm" else 2 * levels
        num_res_blocks = (num_blocks - others - levels) // (2 * levels)
        if num_res_blocks < 1:
            continue
        try:
            table = _modules(layers, column, levels, num_res_blocks, fields) + z
        except LookupError as error:
            furthest = max(furthest, error.args)
            continue
        furthest = (len(arrays), _misfit(table, arrays, column))
        if furthest[1] is None:
            return table, fields | {"num_res_blocks": num_res_blocks, "n_mlp": num_dense - 1}
    raise UserError(MISFIT.format("generator", furthest[1]))


def _modules(
    layers: Mapping[str, Arrays], column: int, levels: int, num_res_blocks: int, fields: Mapping[str, Any]
) -> list[Row]:
    """The rows of all_modules, from arrays by layer; LookupError (number, name) of the first that is not there."""
    plain, ddpm = fields["resblock_type"] == "biggan_oneadagn", fields["resblock_type"] == "ddpm"
    equal = [
        ("GroupNorm_0.style", "norm_0/style", "dense"),
        ("Conv_0", "conv_0", "conv"),
        ("Dense_0", "time", "dense"),
        ("GroupNorm_1", "norm_1", "norm") if plain else ("GroupNorm_1.style", "norm_1/style", "dense"),
        ("Conv_1", "conv_1", "conv"),
    ]
    wider = [*equal, ("NIN_0", "shortcut", "nin") if ddpm else ("Conv_2", "shortcut", "conv 1x1")]
    resample = (FIR, NAIVE, []) if ddpm else ([*equal, ("Conv_2", "shortcut", "conv 1x1, same width")],)
    taken: list[list[Row]] = []
    attention = set()

    def take(name: str, *variants: list[Layer], optional: bool = False) -> bool:
        place = (f"all_modules.{len(taken)}", name)
        for new in (rows(variant, *place) for variant in variants):
            if _misfit(new, layers.get(place[column], {}), column) is None:
                taken.append(new)
                return True
        if not optional:
            raise LookupError(len(taken), place[column])
        return False

    if fields["conditional"]:
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
            if fields["progressive_input"] == "input_skip":
                take(f"down_{level}_combine", COMBINE)
            elif fields["progressive_input"] == "residual":
                take(f"down_{level}_pyramid", FIR, NAIVE)
    take("mid_block_0", equal)
    take("mid_attn", ATTENTION)
    take("mid_block_1", equal)
    for level in reversed(range(levels)):
        for i in range(num_res_blocks + 1):
            take(f"up_{level}_block_{i}", wider)  # by the skip
        if level in attention:
            take(f"up_{level}_attn", ATTENTION)
        if fields["progressive"] == "output_skip":
            take(f"up_{level}_image_norm", NORM)
            take(f"up_{level}_image_conv", CONV)
        if level > 0:
            take(f"up_{level}_resample", *resample)
    if fields["progressive"] == "none":
        take("out_norm", NORM)
        take("out_conv", CONV)
    return [row for new in taken for row in new]
