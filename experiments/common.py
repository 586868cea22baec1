"""What the experiments share: runs of main.py, and results on disk."""

import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


def machine() -> str:
    """The processor, and the versions that decide about rounding."""
    import jax

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, jax {jax.__version__}"


def main(*flags: str) -> None:
    """Run main.py with these flags, its output shown. SystemExit if it fails."""
    code = subprocess.run([sys.executable, "main.py", *flags], cwd=ROOT).returncode
    if code:
        raise SystemExit(f"main.py {' '.join(flags)} ended with exit code {code}")


def train_and_judge(workdir: pathlib.Path, *flags: str) -> dict[str, Any]:
    """Train in `workdir` (or go on there) and evaluate: the results of both. What is finished is not done again."""
    done = workdir / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    main(*flags, f"--workdir={workdir}")
    main(*flags, f"--workdir={workdir}", "--mode=evaluate", f"--out={workdir}/evaluation")
    trained, judged = (json.loads((workdir / name).read_text()) for name in ("results.json", "evaluation/results.json"))
    found = {"flags": list(flags), "steps": trained["step"], "train_seconds": trained["seconds"], "machine": machine()}
    found["judged"] = {k: v for k, v in judged.items() if k not in ("checkpoint", "samples", "data", "networks")}
    done.write_text(json.dumps(found, indent=2) + "\n")
    return found


def finish(file: str, results: dict[str, Any]) -> None:
    """Write the results of the experiment in `file`, and draw its figure and table."""
    name = pathlib.Path(file).stem
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"machine": machine()} | results, indent=2) + "\n")
    print(show(name))


def show(name: str) -> str:
    """Draw figure.png and table.md of an experiment from its results.json; returns them as a section of Markdown."""
    module, folder = importlib.import_module(f"experiments.{name}"), RESULTS / name
    results = json.loads((folder / "results.json").read_text())
    table = module.table(results)
    (folder / "table.md").write_text(table + "\n")
    module.draw_figure(results, folder / "figure.png")
    about = (module.__doc__ or name).split(".")[0]
    command = f"`python -m experiments.{name}`, {results['machine']}"
    return "\n\n".join([f"## {about}", command, table, f"![{about}]({name}/figure.png)"])
