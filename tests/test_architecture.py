"""The house rules.

A subpackage imports only from those below it, only `networks/ops` and `devices/compiler.py` know how a device runs an
operation, and the method needs neither TensorFlow nor configs.
"""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Packages that CORE, the subpackages below `model`, does without. `config.presets` needs ml_collections.
NOT_IN_CORE = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "torch")
CORE = (
    "errors",
    "config.settings",
    "config.check",
    "config.types",
    "devices",
    "networks",
    "method",
    "storage",
    "data",
    "metrics",
)
# Platforms, layouts, custom gradients and options of compilers
OF_OPS = (
    "platform_dependent|custom_vjp|custom_jvp|optimization_barrier|default_backend|set_xla_metadata|"
    r"with_layout_constraint|compiler_options|xla_(cpu|gpu|tpu|backend|llvm)_\w+"
)
FILES = sorted((ROOT / "ddgan_jax").rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT / "ddgan_jax").with_suffix("").parts).removesuffix(".__init__")


def test_imports_go_down():
    """The order of the subpackages is in pyproject.toml."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    result = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if not module_of(path).startswith(("networks.ops", "devices.compiler"))],
    ids=module_of,
)
def test_only_ops_knows_how_a_device_runs_an_operation(path):
    text = path.read_text()
    assert not re.findall(OF_OPS, text.replace("compiler.compiler_options", ""))
    if path.parent.name == "networks":
        assert not re.findall(r"\b[CGT]PUs?\b|\b(cpu|cuda|gpu|tpu)\b", text)


def test_core_imports_nothing_heavy():
    """CORE imports in a process that has no TensorFlow, tfds, clu, ml_collections or torch."""
    core = [m for m in map(module_of, FILES) if m.startswith(CORE)]
    assert len(core) >= 40
    blocked = f"import sys\nfor name in {NOT_IN_CORE!r}: sys.modules[name] = None\n"
    script = blocked + "\n".join(f"import ddgan_jax.{module}" for module in core)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
