"""MkDocs hooks: equations become MathML, CONTRIBUTING.md a page, and links to source files links to the API."""

import html
import pathlib
import posixpath
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

DOCS = pathlib.Path(__file__).parent
CONTRIBUTING = DOCS.parent / "CONTRIBUTING.md"
# A link to a file or a folder of the package, and a name in it: ](../ddgan_jax/model/model.py#Model)
SOURCE = re.compile(r"\]\((?:\.\./)*(ddgan_jax(?:/\w+)*)(?:\.py)?(?:#([\w.]+))?\)")
API_PAGES = {
    name: f"api/{page.name}"
    for page in (DOCS / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
}
# As pymdownx.arithmatex marks $...$ and $$...$$
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Add CONTRIBUTING.md as contributing.md."""
    files.append(File.generated(config, "contributing.md", abs_src_path=str(CONTRIBUTING)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Change links that are right in a checkout: CONTRIBUTING.md is a page, and the API's pages have the source."""
    if page.file.src_uri == "contributing.md":
        markdown = markdown.replace("](docs/", "](")
    markdown = markdown.replace("](../CONTRIBUTING.md", "](contributing.md")

    def to_api(match):
        module = match[1].replace("/", ".")
        documented = max((name for name in API_PAGES if f"{module}.".startswith(f"{name}.")), key=len)
        target = posixpath.relpath(API_PAGES[documented], posixpath.dirname(page.file.src_uri) or ".")
        return f"]({target}#{'.'.join(filter(None, (module, match[2])))})"

    return SOURCE.sub(to_api, markdown)


def on_page_content(content, page, config, files):
    """Typeset equations as MathML, which browsers draw without a script."""

    def typeset(match):
        tag, kind, latex = match.groups()
        display = "block" if kind == "[" else "inline"
        return f'<{tag} class="arithmatex">{convert(html.unescape(latex), display=display)}</{tag}>'

    return EQUATION.sub(typeset, content)
