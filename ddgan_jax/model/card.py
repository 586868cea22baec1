"""A model card: README.md beside a .safetensors file, in the format of the Hugging Face Hub.

The card describes what the model knows: its data, classes, size and T, and the settings of its training that differ
from the defaults. Measures, the licence and the name of the repository are the caller's.
"""

import json
import numbers
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax

from ddgan_jax.config.settings import Config, as_dict, flat
from ddgan_jax.errors import UserError, of_a_file
from ddgan_jax.storage import hub, paths

FIELDS = ("measures", "license", "repository")
RECIPE = ("data", "diffusion", "model", "generator", "discriminator", "train", "loss")  # groups that affect the weights
MEASURES = (
    *("fid", "kid", "inception_score", "classifier_frechet", "frechet_distance", "kernel_distance", "precision"),
    *("recall", "density", "coverage", "modes", "of_modes", "kl", "high_quality", "total_variation"),
)
PATHS = (  # fields of the configuration that contain paths
    *("data.dir", "data.path", "train.init_from"),
    *("eval.reference_statistics", "eval.inception_weights", "eval.vgg_weights"),
)
MAX_CLASSES = 20  # that are listed
TAGS = ("ddgan_jax", "jax", "gan", "diffusion", "denoising-diffusion-gan")
PAPER = "[Tackling the Generative Learning Trilemma with Denoising Diffusion GANs](https://arxiv.org/abs/2112.07804)"


def write_card(model: Any, path: str, given: bool | Mapping[str, Any]) -> None:
    """Write README.md beside the .safetensors file `path`, unless `given`, the `card` of `Model.save`, is False.

    Raises:
        UserError: `given` is invalid, or there is a README.md that this function did not write or that was changed.
        OSError: the file cannot be written.
    """
    if given is False:
        return
    fields = _checked(given)
    file = paths.path(path)
    readme = file.parent / "README.md"
    with of_a_file(str(readme)):
        if paths.exists(readme) and not _is_ours(paths.read(readme).decode(errors="replace")):
            raise UserError(f"{readme} was not written by `save`, or was changed since: move it, or leave card out")
    text = _front_matter(model, fields) + _text(model, file.name, fields)
    paths.write(readme, text + _mark(text))


def without_private(c: Config) -> Config:
    """The configuration without paths and names of the place of the training, for a file that may be shared."""
    for group, field in (name.split(".") for name in (*PATHS, "log.wandb")):
        c = replace(c, **{group: replace(getattr(c, group), **{field: None})})
    return replace(c, eval=replace(c.eval, features=Config().eval.features)) if ":" in c.eval.features else c


def measures_in(results: Any, c: Config) -> dict[str, float]:
    """The measures among `results` of an evaluation, and the number of samples.

    There are none if it had other features or other data than the training, which a card would not show.
    """
    found = results if isinstance(results, dict) else {}
    data = f"{c.data.name} {c.data.split}"
    if found.get("features") != c.eval.features or ":" in c.eval.features or found.get("data", data) != data:
        return {}
    if "trained_on_other_data" in found:
        return {}
    return {name: found[name] for name in (*MEASURES, "num_samples") if isinstance(found.get(name), numbers.Real)}


def _checked(given: bool | Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a card. Raises UserError unless they have known names and valid values."""
    fields = {} if given is True else given
    if not isinstance(fields, Mapping) or not set(fields) <= set(FIELDS):
        raise UserError(f"card={given!r:.200} must be True, or a dict of {', '.join(FIELDS)}")
    if not isinstance(fields.get("measures", {}), Mapping):
        raise UserError(f"card: measures={fields['measures']!r:.200} must be a dict of numbers by name")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(fields.get("license", "mit"))):
        raise UserError(f"card: license={fields['license']!r:.200} must be a name of the Hub, such as 'apache-2.0'")
    repository = fields.get("repository", "OWNER/NAME")
    if hub.parse(f"hf://{repository}")[0] != repository:
        raise UserError(f"card: repository={repository!r} must be 'OWNER/NAME'")
    return fields


def _mark(text: str) -> str:
    """The end of a card with this text, by which `_is_ours` recognizes it."""
    checksum = f"{zlib.crc32(text.encode()):08x}"
    return f"\n<!-- written by ddgan_jax, {checksum}: a later save replaces this file unless it was changed -->\n"


def _is_ours(content: str) -> bool:
    """Whether `write_card` wrote this content."""
    text, found, _ = content.rpartition("\n<!-- written by ddgan_jax, ")
    return bool(found) and content == text + _mark(text)


def _front_matter(model: Any, fields: Mapping[str, Any]) -> str:
    """The card's metadata, in YAML."""
    lines = ["library_name: ddgan_jax"]
    if len(model.denoiser.image_shape) == 3:
        lines += ["pipeline_tag: unconditional-image-generation"]
    if "license" in fields:
        lines += [f"license: {fields['license']}"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in TAGS), "---", "", ""])


def _text(model: Any, file: str, fields: Mapping[str, Any]) -> str:
    """The card's text, in Markdown, for the model in `file`."""
    measures, recipe = _measures(model, fields), _recipe(model.config)
    licence = "The owner of the weights has named no licence: add it as `license` at the top of this file."
    if "license" in fields:
        licence = f"The weights have the licence `{fields['license']}`."
    sections = [
        f"# Denoising Diffusion GAN of {_code(model.config.data.name)}",
        *([_plain(model.about["summary"])] if "summary" in model.about else []),
        f"A generator in {model.num_steps} denoising steps: {PAPER} (Xiao, Kreis and Vahdat, ICLR 2022), trained with "
        "`ddgan_jax`, an implementation in JAX and Flax. The weights are the moving average of the training.",
        _table(("", ""), _facts(model)),
        "## Use",
        'Install `ddgan_jax` with `pip install ".[hub]"` in its checkout.',
        _example(model, file, fields),
        *(["## Measures", _table(("measure", "value"), measures)] if measures else []),
        "## Recipe",
        "Settings of the training that differ from the defaults, which are the paper's for CIFAR-10:",
        _table(("field", "value"), recipe),
        "## Licence",
        f"{licence} `ddgan_jax` has the licence Apache-2.0. The terms of the training data apply as well.",
        "## Limits",
        "Samples resemble the training data, with its gaps and biases, and may repeat single examples of it. Nothing "
        "is claimed about their quality beyond measures in this card, nor that the model is fit for a purpose.",
    ]
    return "\n\n".join(sections) + "\n"


def _example(model: Any, file: str, fields: Mapping[str, Any]) -> str:
    """The lines of Python that load the model and sample."""
    shape = model.denoiser.image_shape
    result, kind = ("images", "uint8") if len(shape) == 3 else ("points", "float32")
    name = fields.get("repository", "OWNER/NAME") + ("" if file == hub.DEFAULT_FILE else f"/{file}")
    return f"""```python
import ddgan_jax

model = ddgan_jax.load("hf://{name}")
{result} = model.sample(64, seed=0)  # {kind} {[64, *shape]}
```"""


def _facts(model: Any) -> list[tuple[str, str]]:
    """Facts about the model: (name, value)."""
    shape, names = model.denoiser.image_shape, ", ".join(map(_code, model.classes[:MAX_CLASSES]))
    listed = f"{model.num_classes:,}: {names}{', ...' * (model.num_classes > MAX_CLASSES)}"
    size = ("image size", "{1}x{0}, channels: {2}".format(*shape)) if len(shape) == 3 else ("point", f"{list(shape)}")
    return [
        ("data", f"{_code(model.config.data.name)}, split {_code(model.config.data.split)}"),
        ("classes", listed if model.num_classes else "none, the model is unconditional"),
        size,
        ("denoising steps T", f"{model.num_steps}"),
        ("training steps", f"{model.step:,}"),
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,}"),
    ]


def _measures(model: Any, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers among the caller's measures, or those that the file of the model contained."""
    try:
        measures = fields["measures"] if "measures" in fields else json.loads(model.about.get("measures", "{}"))
    except (ValueError, RecursionError):  # text of another program by this name
        return []
    items = measures.items() if isinstance(measures, Mapping) else ()
    found = [(n, v) for n, v in items if isinstance(v, numbers.Real) and not isinstance(v, bool)]
    return [
        (_code(name), f"{value:,}" if isinstance(value, numbers.Integral) else f"{float(value):.4g}")
        for name, value in found
    ]


def _recipe(c: Config) -> list[tuple[str, str]]:
    """The fields of the training that differ from the defaults; paths are left out, since the card is public."""
    ours, defaults = flat(as_dict(c)), flat(as_dict(Config()))
    changed = {name: ours[name] for name in ours if ours[name] != defaults.get(name)}
    named = [name for name in changed if name.partition(".")[0] in RECIPE or "." not in name]
    return [(_code(name), "a path" if name in PATHS else _code(changed[name])) for name in named]


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {first} | {second} |" for first, second in [header, ("---", "---"), *rows])


def _plain(value: Any) -> str:
    """A value on one line, without characters that Markdown or HTML would interpret."""
    return re.sub(r"[`|<>\[\]\\]", "", " ".join(str(value).split()))


def _code(value: Any) -> str:
    """A value as code."""
    return f"`{re.sub('[`|]', '', ' '.join(str(value).split()))}`"
