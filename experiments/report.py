"""The figures and tables of the pages, from committed results: `python -m experiments.report`.

A table stands in README.md or docs/ between `<!-- table: NAME -->` and `<!-- end of table -->`. This command replaces
what is between the two comments; a test fails if it is not current.
"""

import pathlib
import re

from experiments import common, fields, reliability, trilemma

PAGES = [common.ROOT / "README.md", *sorted((common.ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)


def tables() -> dict[str, str]:
    """Every table, in Markdown, by the name that its comment has."""
    found = {name: common.table(name) for name in common.names()}
    return found | {
        "trilemma_short": trilemma.short_table(common.read_results("trilemma")),
        "commands": commands(),
        "fields": fields.table(),
        "reliability": reliability.table(),
    }


def commands() -> str:
    """The command and the machine of each experiment, with a link to its table."""
    lines = ["| experiment | command | machine |", "|---|---|---|"]
    for name in common.names():
        results = common.read_results(name)
        title = re.split("[.:?]", common.module(name).__doc__ or name)[0]
        lines.append(f"| [{title}]({section_of(name)}) | `{results['command']}` | {results['machine']} |")
    return "\n".join(lines)


def section_of(name: str) -> str:
    """The link from docs/results/README.md to the section of a page of docs/ in which a table stands."""
    for page in PAGES:
        before, marker, _ = page.read_text().partition(f"<!-- table: {name} -->")
        if marker:
            return f"../{page.relative_to(common.ROOT / 'docs')}#{anchors(before)[-1]}"
    raise LookupError(f"no page has `<!-- table: {name} -->`")


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def fill(page: pathlib.Path, found: dict[str, str]) -> str:
    """The text of a page with each marked table replaced by the one of its name in `found`."""

    def current(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n\n{found[name]}\n\n<!-- end of table -->"

    return MARKED.sub(current, page.read_text())


def write_tables() -> None:
    """Write every marked table in the pages."""
    found = tables()
    for page in PAGES:
        page.write_text(fill(page, found))


if __name__ == "__main__":
    for experiment in common.names():
        common.draw(experiment)
    write_tables()
