"""README and docs: links, flags, fields and files exist, tables are current, and the API pages are complete."""

import ast
import inspect
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from ddgan_jax.config import presets
from ddgan_jax.data import digits, sources
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.networks.discriminator import Discriminator
from ddgan_jax.networks.generator import Generator
from experiments import fields, report

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
# Flags of the other commands here, and of other programs. Those of XLA begin with xla_.
OTHER_FLAGS = set(
    "at_once seconds path batch largest only seeds reference target "  # experiments, benchmarks
    "full record remove_old dir "  # tests, the list of copies
    "help file_format manual_dir logdir strict inplace "  # any command, tfds, TensorBoard, mkdocs, jupyter
    "accelerator-type command python recurse spot version worker zone "  # gcloud, uv
    "project private "  # wandb, hf
    "gpus-per-node gpus-per-task nodes ntasks-per-node open-mode requeue signal time".split()  # SLURM
)
# Words that follow `config.` without being fields: modules, and suffixes of files
NO_FIELDS = {"json", "md", "py", "settings", "types", "check", "presets", "presets.get"}
API = {
    name: path
    for path in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", path.read_text(), re.MULTILINE)
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ddgan_jax").rglob("*.py"))
}


def test_the_readme_is_short_and_has_the_two_commands():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 150
    for requirements, command in (("requirements.txt", "main.py"), ("requirements-dev.txt", "-m pytest -n 2")):
        block = f".venv/bin/pip install -r {requirements} && .venv/bin/python {command}"
        assert f"```\npython3 -m venv .venv && {block}\n```" in text


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    """A link to code leads to a source file, and may name what it defines: docs/hooks.py links the API on the site."""
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert target.parent.name != "api", f"{page}: {link} is empty in a checkout, link the source file"
            if anchor and target.suffix == ".py":
                assert re.search(rf"(class|def) {anchor.rpartition('.')[2]}\b", target.read_text()), f"{page}: {link}"
            elif anchor:
                assert anchor in report.anchors(target.read_text()), f"{page}: {link}"


def known_flags() -> set[str]:
    """Flags of main.py, except the fields of a configuration."""
    files = [ROOT / "ddgan_jax" / name for name in ("commands/cli.py", "config/presets.py")]
    calls = (node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    defined = (call.args[0] for call in calls if ast.unparse(call.func).partition(".DEFINE_")[1] and call.args)
    return {name.value for name in defined if isinstance(name, ast.Constant)}


def known_fields() -> set[str]:
    """Fields of all configurations ('train', 'train.lr_g', ...), and the other arguments of networks and schedule."""

    def fields(config, prefix=""):
        for name, value in config.items():
            yield prefix + name
            if hasattr(value, "items"):
                yield from fields(value, f"{prefix}{name}.")

    found = set()
    for name in presets.names():
        found |= set(fields(presets.get(name)))
    for group, made in (("generator", Generator), ("discriminator", Discriminator), ("diffusion", Schedule.create)):
        found |= {f"{group}.{name}" for name in inspect.signature(made).parameters}
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_flags_and_fields_exist(page):
    flags = set(re.findall(r"(?<![\w-])--(?!config\.)([a-zA-Z][\w-]*)", TEXTS[page]))
    unknown = {name for name in flags - known_flags() - OTHER_FLAGS if not name.startswith("xla_")}
    assert not unknown, f"{page}: --{', --'.join(unknown)}"
    named = set(re.findall(r"\bconfig\.([a-z]\w*(?:\.[a-z]\w*)?)", TEXTS[page])) - NO_FIELDS
    assert named <= known_fields(), f"{page}: config.{', config.'.join(named - known_fields())}"


@pytest.mark.parametrize("page", TEXTS)
def test_named_files_and_variants_exist(page):
    """Paths in the folders of the project, the variants of configurations, and modules after `python -m`."""
    folders = "ddgan_jax|configs|tests|experiments|benchmarks|colab|docs"
    for name, variant in re.findall(rf"(?<![\w/.])((?:{folders})/[\w/]+\.\w+)(?::(\w+))?", TEXTS[page]):
        assert (ROOT / name).exists(), f"{page}: {name}"
        if variant and name.startswith("configs/"):
            presets.get(f"{name}:{variant}")
    for name in re.findall(r"python -m ((?:ddgan_jax|experiments|benchmarks)(?:\.\w+)+)", TEXTS[page]):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), f"{page}: {name}"


def test_the_table_of_presets_matches_the_configurations():
    rows = re.findall(r"^\| `(configs/\S+)` \|.*", TEXTS["docs/configuration.md"], re.MULTILINE)
    assert {row.partition(":")[0] for row in rows} == {f"configs/{name}.py" for name in presets.names()}
    for line in TEXTS["docs/configuration.md"].splitlines():
        if not line.startswith("| `configs/"):
            continue
        name, _, steps_of_denoising, batch, steps, _ = (cell.strip() for cell in line.strip("|").split("|"))
        config = presets.get(name.strip("`"))
        written = [
            None if cell == "chosen" else int(cell.replace(",", "")) for cell in (steps_of_denoising, batch, steps)
        ]
        assert written == [config.diffusion.num_steps, config.train.batch_size, config.train.num_steps], name


def test_the_table_of_datasets_has_every_dataset():
    column = re.findall(r"^\| (`\w[^|]*) \|", TEXTS["docs/data.md"].partition("## Your own images")[0], re.MULTILINE)
    written = {name for cell in column for name in re.findall(r"`([\w/]+)`", cell)}
    of_presets = {presets.get(name).data.name for name in presets.names()}
    assert written >= {*digits.READERS, *sources.FOLDERS, "stacked_mnist_5k", *of_presets}


def test_a_field_without_a_comment_is_refused():
    with pytest.raises(ValueError, match="width needs a comment that explains it"):
        fields.row("width", ast.Constant(1, lineno=1, end_lineno=1), "integer")


def test_tables_are_current():
    """Every table stands on one page, as `python -m experiments.report` writes it."""
    tables = report.tables()
    for page in report.PAGES:
        assert page.read_text() == report.fill(page, tables), f"{page}: run `python -m experiments.report`"
    marked = [name for text in TEXTS.values() for name in report.MARKED.findall(text)]
    assert sorted(marked) == sorted(tables)


def test_every_public_name_is_on_a_page_of_the_api():
    """A page documents a module, or a package with all its modules. `ddgan_jax` itself is on the index page."""
    assert set(API) <= set(MODULES), f"not in the package: {set(API) - set(MODULES)}"
    packages = tuple(f"{name}." for name in API if name != "ddgan_jax")
    for module, path in MODULES.items():
        public = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        assert not public or module in API or module.startswith(packages), (
            f"docs/api lacks {module}.{public[0]}: add `::: {module}`, or its package, to a page there"
        )


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        name = str(path.relative_to(ROOT / "docs"))
        assert re.search(rf"[ :-] {re.escape(name)}$", navigation, re.MULTILINE), name


@pytest.mark.parametrize(
    "system, machine, expected",
    [
        ("linux", "x86_64", "tensorflow-cpu"),
        ("linux", "aarch64", "tensorflow"),
        ("darwin", "arm64", "tensorflow"),
        ("win32", "AMD64", "tensorflow-cpu"),
    ],
)
def test_every_machine_has_a_tensorflow_with_wheels(system, machine, expected):
    """tensorflow-cpu has no wheels for Arm."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    for lines in ((ROOT / "requirements.txt").read_text().splitlines(), project):
        found = [Requirement(line) for line in lines if line.startswith(("tensorflow>", "tensorflow-cpu"))]
        machine_of = {"sys_platform": system, "platform_machine": machine}
        assert [one.name for one in found if one.marker and one.marker.evaluate(machine_of)] == [expected]
