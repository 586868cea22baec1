"""What the site needs beside docs/: CONTRIBUTING.md, which stands in the root, where GitHub shows it, as a page."""

import pathlib

from mkdocs.structure.files import File

CONTRIBUTING = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"


def on_files(files, config):
    """Add CONTRIBUTING.md as contributing.md."""
    files.append(File.generated(config, "contributing.md", abs_src_path=str(CONTRIBUTING)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between CONTRIBUTING.md and docs/, which are right in a checkout, as they are on the site."""
    if page.file.src_uri == "contributing.md":
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../CONTRIBUTING.md", "](contributing.md")
