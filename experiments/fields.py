"""The tables of every configuration field in docs/configuration.md, from the dataclasses of config/settings.py.

A field's allowed values and default are those of its dataclass, and its meaning is the comment beside it.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing
from typing import Any, Literal

from ddgan_jax.config import settings

SOURCE = inspect.getsource(settings)
CLASSES = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef)}
COMMENTS = {
    token.start[0]: token
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    if token.type == tokenize.COMMENT
}
NAMES = {int: "integer", float: "number", bool: "True or False", str: "text"}


def table() -> str:
    """Markdown: a section for each group of fields, with a row for each field."""
    ungrouped, sections = [], []
    for node, annotation in fields(settings.Config):
        name = name_of(node)
        if dataclasses.is_dataclass(annotation):
            rows = [row(name_of(field), field.value, allowed(kind)) for field, kind in fields(annotation)]
            sections.append(section(f"config.{name}", annotation.__doc__ or "", rows))
        elif found := [part for part in ast.walk(node) if isinstance(part, ast.Dict)]:
            entries = zip(found[0].keys, found[0].values, strict=True)
            rows = [row(ast.literal_eval(key), value, allowed(type(ast.literal_eval(value)))) for key, value in entries]
            sections.append(section(f"config.{name}", meaning(node.lineno), rows))
        else:
            ungrouped.append(row(name, node.value, allowed(annotation)))
    return "\n\n".join([section("config", "", ungrouped), *sections])


def fields(cls: type) -> list[tuple[ast.AnnAssign, Any]]:
    """The fields of a dataclass, as they stand in the source, with their annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    nodes = [node for node in CLASSES[cls.__name__].body if isinstance(node, ast.AnnAssign)]
    return [(node, hints[name_of(node)]) for node in nodes]


def name_of(node: ast.AnnAssign) -> str:
    """The name of a field."""
    return ast.unparse(node.target)


def section(name: str, about: str, rows: list[str]) -> str:
    """A heading, a sentence about the group, and its table."""
    sentence = about.rstrip(".") + "." if about else ""
    lines = ["| field | allowed | default | meaning |", "|---|---|---|---|", *rows]
    return "\n\n".join(filter(None, (f"### `{name}`", sentence, "\n".join(lines))))


def row(name: str, default: ast.expr, values: str) -> str:
    """A line of a table, with the comment beside the default. Raises ValueError for a field without a comment."""
    if not meaning(default.end_lineno):
        raise ValueError(f"line {default.end_lineno} of config/settings.py: {name} needs a comment that explains it")
    source = ast.get_source_segment(SOURCE, default)
    given = re.sub(r"(?<=\d)_", "", source or "").strip("\"'")  # as a flag has it: 5_000 is 5000
    cells = (f"`{name}`", values, f"`{given}`", meaning(default.end_lineno))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def meaning(line: int) -> str:
    """The comment at the end of a line, with the lines of comment alone that follow it."""
    texts = []
    while line in COMMENTS and (not texts or not COMMENTS[line].line[: COMMENTS[line].start[1]].strip()):
        texts.append(COMMENTS[line].string.lstrip("# "))
        line += 1
    return " ".join(texts)


def allowed(annotation: Any) -> str:
    """The values that an annotation allows, in words."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return ", or ".join(
            allowed(kind) if kind is not types.NoneType else "None" for kind in typing.get_args(annotation)
        )
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if not (ranges := getattr(annotation, "__metadata__", ())):
        return NAMES.get(annotation, "list")
    first, last = ranges[0].text, ranges[-1].text
    narrower = f", {last.removeprefix('an integer of ')}" if first != last and not last.endswith(str(2**31 - 1)) else ""
    return first.removeprefix("an ").removeprefix("a ") + narrower
