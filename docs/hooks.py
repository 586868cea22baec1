"""MkDocs hooks: equations become MathML, and the CONTRIBUTING.md of the repository root becomes a page."""

import html
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

CONTRIBUTING = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"
# As pymdownx.arithmatex marks $...$ and $$...$$
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Add CONTRIBUTING.md as contributing.md."""
    files.append(File.generated(config, "contributing.md", abs_src_path=str(CONTRIBUTING)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between CONTRIBUTING.md and docs/, which are right in a checkout, as they are on the site."""
    if page.file.src_uri == "contributing.md":
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../CONTRIBUTING.md", "](contributing.md")


def on_page_content(content, page, config, files):
    """Typeset equations as MathML, which browsers draw without a script."""

    def typeset(match):
        tag, kind, latex = match.groups()
        display = "block" if kind == "[" else "inline"
        return f'<{tag} class="arithmatex">{convert(html.unescape(latex), display=display)}</{tag}>'

    return EQUATION.sub(typeset, content)
