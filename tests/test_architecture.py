"""The house rules: a file imports only from lower ranks, only `ops` knows how a device runs an operation, and the core
needs neither TensorFlow nor configs."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Within the models, layers.py is the lower one.
RANKS = {
    0: "errors ops storage cluster processes config diffusion state parallel torch data metrics networks.layers",
    1: "objectives jobs.signals sampling storage.log storage.dashboards networks",
    2: "automatic figures train_step editing metrics.features metrics.judge",
    3: "build presets",
    4: "sampler jobs.progress",
    5: "deployment",
    6: "model",
    7: "jobs",
    8: "cli",
    9: "__main__",
}
BELOW_ALL = ("errors", "ops", "cluster", "processes", "config", "storage.paths")
RANK_OF = {module: rank for rank, modules in RANKS.items() for module in modules.split()}
NOT_IN_CORE = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections")
# Platforms, layouts, custom gradients and options of compilers, which are for `ops` alone.
OF_OPS = (
    "platform_dependent|custom_vjp|custom_jvp|optimization_barrier|default_backend|set_xla_metadata|"
    r"with_layout_constraint|compiler_options|xla_(cpu|gpu|tpu|backend|llvm)_\w+"
)
FILES = sorted(
    path
    for path in (ROOT / "ddgan_jax").rglob("*.py")
    if path.name != "__init__.py" or path.parent.name in ("ops", "objectives")  # other packages hold nothing
)


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT / "ddgan_jax").with_suffix("").parts).removesuffix(".__init__")


def rank_of(module: str) -> int:
    for name in (module, module.split(".")[0]):
        if name in RANK_OF:
            return RANK_OF[name]
    raise AssertionError(f"{module} has no rank: place it in RANKS, and in CONTRIBUTING.md")


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it, with the module itself named."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.removeprefix("ddgan_jax.") for name in names if name.startswith("ddgan_jax.")}
    known = {module_of(file) for file in FILES}
    # A name that is no module is something in one, such as `ops.FIR_KERNEL` in `ops`.
    return {name if name in known else name.rpartition(".")[0] for name in found}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    """BELOW_ALL are below everything; other files of one rank do not import each other (a folder may)."""
    module = module_of(path)
    folder = module.split(".")[0] if "." in module or module == "ops" else ""
    for imported in imports_of(path):
        same_folder = folder == imported.split(".")[0] and rank_of(imported) <= rank_of(module)
        below = rank_of(imported) < rank_of(module) or imported in BELOW_ALL
        if folder == "ops":  # below all but the errors
            below = imported == "errors"
        assert below or same_folder, f"{module} (rank {rank_of(module)}) imports {imported} (rank {rank_of(imported)})"


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path).split(".")[0] != "ops"], ids=module_of)
def test_only_ops_knows_how_a_device_runs_an_operation(path):
    assert not re.findall(OF_OPS, path.read_text())
    if path.parent.name == "networks":
        assert not re.findall(r"\b[CGT]PUs?\b|\b(cpu|cuda|gpu|tpu)\b", path.read_text())


def test_core_imports_nothing_heavy():
    """Ranks 0 to 2 import in a process that has no TensorFlow, tfds, clu or ml_collections (nor torch)."""
    core = [m for m in map(module_of, FILES) if rank_of(m) <= 2]
    assert len(core) >= 11
    blocked = f"import sys\nfor name in {(*NOT_IN_CORE, 'torch')!r}: sys.modules[name] = None\n"
    script = blocked + "\n".join(f"import ddgan_jax.{module}" for module in core)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
