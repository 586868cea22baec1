"""Shared parts of the experiments: runs of main.py, results on disk, and the command line."""

import argparse
import contextlib
import importlib
import json
import math
import os
import pathlib
import queue
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

import ddgan_jax
from ddgan_jax.commands import figures
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage.log import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
SEEDS = (0, 1, 2)


def machine() -> str:
    """Processor and jax version, which determine rounding."""
    import jax

    from benchmarks.measure import cpu

    return f"{os.cpu_count()} cores of {cpu()}, jax {jax.__version__}"


def main(*flags: str, output: pathlib.Path | None = None) -> None:
    """Run main.py with these flags; its output is shown, or appended to the file `output`.

    Raises: Fault if the command fails.
    """
    with output.open("a") if output else contextlib.nullcontext() as to:
        code = subprocess.run([sys.executable, "main.py", *flags], cwd=ROOT, stdout=to, stderr=to).returncode
    if code:
        where = f", see {output}" if output else ""
        raise Fault(f"main.py {' '.join(flags)} ended with exit code {code}{where}")


def train_and_evaluate(workdir: pathlib.Path, *flags: str, quiet: bool = False) -> dict[str, Any]:
    """Train in `workdir`, or resume there, and evaluate. Returns the results of both; a finished run is not repeated.

    Raises: Fault if the run there had other flags, since methods are numbered by their place in the experiment.
    """
    if found := finished(workdir, flags):
        return found
    output = workdir / "output.txt" if quiet else None
    main(*flags, f"--workdir={workdir}", output=output)
    main(*flags, f"--workdir={workdir}", "--mode=evaluate", f"--out={workdir}/evaluation", output=output)
    trained, judged = (json.loads((workdir / name).read_text()) for name in ("results.json", "evaluation/results.json"))
    found = {"steps": trained["step"], "train_seconds": trained["seconds"], "machine": machine()}
    found["judged"] = {k: v for k, v in judged.items() if k not in ("checkpoint", "samples", "data", "networks")}
    records = read_metrics(workdir / "metrics.jsonl")
    found["images_per_second"] = statistics.median(record["images_per_second"] for record in records)
    if way := [evaluated(record) for record in records if any(name.startswith("eval/") for name in record)]:
        found["on_the_way"] = way
    return keep_measured(workdir, flags, found)


def finished(workdir: pathlib.Path, flags: Sequence[str]) -> dict[str, Any]:
    """What `keep_measured` wrote in `workdir`; empty if there is nothing, and the run of these flags begins there.

    Raises: Fault if a run of other flags began in `workdir`.
    """
    file = workdir / "measured.json"
    if not file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        keep_measured(workdir, flags, {})
    found = json.loads(file.read_text())
    if found["flags"] != list(flags):
        raise Fault(f"{workdir} holds a run of {shlex.join(found['flags'])}: move it away, or delete it")
    return found if len(found) > 1 else {}


def keep_measured(workdir: pathlib.Path, flags: Sequence[str], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Write what was measured in a run, and its `flags`, for `finished`. Returns both."""
    found = {"flags": list(flags)} | measured
    (workdir / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def evaluated(record: dict[str, Any]) -> dict[str, float]:
    """The step and the measures of an evaluation during training, under the names of the final evaluation."""
    return {name.removeprefix("eval/"): v for name, v in record.items() if name.startswith("eval/") or name == "step"}


def flags_of(fields: Mapping[str, Any]) -> list[str]:
    """The flags that set these fields of the configuration."""
    return [f"--config.{field}={value}" for field, value in fields.items()]


def own_cores() -> list[int]:
    """The numbers of the cores of this process; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_all(jobs: Mapping[pathlib.Path, Sequence[str]], at_once: int) -> list[dict[str, Any]]:
    """`train_and_evaluate` for every workdir and its flags, `at_once` at a time. Returns the results in order.

    Each run has an equal part of the cores, and its seconds are those on that part. Small networks leave most of a
    second core idle, so two runs on one core each finish sooner than two runs one after the other. If several run at a
    time, their output is in WORKDIR/output.txt.
    """
    cores: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    ours = own_cores()
    for i in range(at_once):
        cores.put(ours[i::at_once])

    def one(workdir: pathlib.Path, flags: Sequence[str]) -> dict[str, Any]:
        share = cores.get()
        try:
            if share and at_once > 1:
                os.sched_setaffinity(0, share)  # Child processes inherit the affinity of this thread
            return train_and_evaluate(workdir, *flags, quiet=at_once > 1)
        finally:
            cores.put(share)

    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(one, *job) for job in jobs.items()]
        try:
            return [run.result() for run in tqdm(runs, unit="run", desc="experiment")]
        except BaseException:  # Also for Ctrl-C: otherwise the waiting runs would start
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sweep(
    name: str,
    common_flags: Sequence[str],
    methods: Mapping[str, Sequence[str]],
    at_once: int,
    cases: Sequence[tuple[str, int]] | None = None,
    last: str = "",
) -> list[dict[str, Any]]:
    """`run_all` of every method (a name and its flags) with every seed. Returns results with `method` and `seed`.

    `cases` lists the methods and seeds to run, if they are not all. Those of the method `last`, which starts from the
    weights of another, begin when all others have ended, and are at the end of the results.
    """
    if cases is None:  # the first seed of all methods comes first
        cases = [(method, seed) for seed in SEEDS for method in methods]
    first, then = [case for case in cases if case[0] != last], [case for case in cases if case[0] == last]
    found = [
        run
        for part in (first, then)
        for run in run_all(dict(job(name, common_flags, methods, *case) for case in part), at_once)
    ]
    return [{"method": method, "seed": seed} | run for (method, seed), run in zip(first + then, found, strict=True)]


def job(
    name: str, common_flags: Sequence[str], methods: Mapping[str, Sequence[str]], method: str, seed: int
) -> tuple[pathlib.Path, list[str]]:
    """Workdir and flags of one training of `sweep`."""
    return workdir(name, methods, method, seed), [*common_flags, f"--config.seed={seed}", *methods[method]]


def workdir(name: str, methods: Mapping[str, Sequence[str]], method: str, seed: int) -> pathlib.Path:
    """Workdir of a method and a seed in the experiment `name`."""
    return ROOT / "runs" / "experiments" / name / f"{list(methods).index(method)}_seed{seed}"


def samples(
    name: str, methods: Mapping[str, Sequence[str]], num: int, chosen: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """`num` samples of the first seed of every method, or of those in `chosen`."""
    workdirs = {method: workdir(name, methods, method, SEEDS[0]) for method in chosen or methods}
    return {method: ddgan_jax.load(str(path)).sample(num) for method, path in workdirs.items()}


def keep_samples(name: str, methods: Mapping[str, Sequence[str]], num: int, chosen: Collection[str]) -> None:
    """Keep `num` samples of the first seed of the methods `chosen`, beside the committed ones of other methods."""
    images = samples(name, methods, num, chosen)
    if name in names():
        with np.load(RESULTS / name / "samples.npz") as before:
            images = {method: before[method] for method in before.files} | images
    keep(name, "samples", images)


def with_committed(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These runs, and the committed ones of other methods or seeds."""
    ours = {(run["method"], run["seed"]) for run in runs}
    committed = read_results(name)["runs"] if name in names() else []
    return runs + [run for run in committed if (run["method"], run["seed"]) not in ours]


def keep(name: str, file: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays that the figure of the experiment `name` shows, as `file`.npz beside its results."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{file}.npz", **arrays)


def draw_samples(figure: Any, folder: pathlib.Path, methods: Collection[str], columns: int = 0) -> None:
    """Draw the kept samples of the methods in a Matplotlib figure, in one row or in `columns`, two methods a line."""
    with np.load(folder / "samples.npz") as arrays:
        methods = [method for method in methods if method in arrays]
        axes = figure.subplots(-(-len(methods) // 2), 2)
        for axis in axes.flat:
            axis.axis("off")
        for axis, method in zip(axes.flat, methods, strict=False):  # an odd number leaves one empty
            axis.imshow(figures.grid(arrays[method], columns=columns or len(arrays[method])))
            axis.set_title(method, fontsize=9)


def of_method(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The runs of one method, ordered by seed."""
    return sorted((run for run in results["runs"] if run["method"] == method), key=lambda run: run["seed"])


def trained(results: dict[str, Any], methods: Iterable[str]) -> list[str]:
    """Those of the methods that have results."""
    return [method for method in methods if of_method(results, method)]


def measure(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    """A function that formats one result of an evaluation, for `method_table`; one that is not finite is None there."""
    return lambda judged: format(math.nan if judged[name] is None else judged[name], form)


def method_table(
    results: dict[str, Any], methods: Iterable[str], measures: Mapping[str, Callable[[dict[str, Any]], str]]
) -> str:
    """Markdown with a row for each method and every seed in each cell.

    `measures` maps a heading to a function of the evaluation's results.
    """
    columns = {heading: lambda run, measure=measure: measure(run["judged"]) for heading, measure in measures.items()}
    columns["training, s"] = lambda run: f"{run['train_seconds']:.0f}"
    columns["sampling 100, s"] = lambda run: f"{run['judged']['sampling']['seconds_per_100']:.2g}"
    lines = [f"| method | network calls | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for method in methods:
        runs = of_method(results, method)
        cells = [", ".join(column(run) for run in runs) for column in columns.values()]
        lines.append(f"| {method} | {runs[0]['judged']['sampling']['network_calls']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(
    file: str,
    experiment: Callable[[argparse.Namespace], dict[str, Any]],
    trains: bool = False,
    methods: Collection[str] = (),
    seeds: Collection[int] = (),
    **options: str,
) -> None:
    """The command line of the experiment in `file`: writes results.json, its figure, and the tables in the pages.

    `trains` adds `--at_once`; `methods` are those that `--only` may name, `seeds` those that `--seeds` may. `options`
    maps the names of other required arguments to their help.
    """
    name = pathlib.Path(file).stem
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}")
    if trains:
        parser.add_argument("--at_once", type=int, default=1, help="runs at a time, each on an equal part of the cores")
    if methods:
        parser.add_argument("--only", nargs="+", choices=list(methods), metavar="METHOD", help="these methods alone")
    if seeds:
        parser.add_argument("--seeds", nargs="+", type=int, choices=seeds, help="these seeds alone")
    for option, meaning in options.items():
        parser.add_argument(f"--{option}", required=True, help=meaning)
    args = parser.parse_args()
    for repeated in ("only", "seeds"):
        if values := getattr(args, repeated, None):
            setattr(args, repeated, list(dict.fromkeys(values)))
    if trains and not 1 <= args.at_once <= (most := len(own_cores()) or os.cpu_count() or 1):
        parser.error(f"--at_once={args.at_once} must be from 1 to {most}, the number of cores")
    try:
        results = experiment(args)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    except Fault as error:
        raise SystemExit(str(error)) from error
    command = shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])
    if name in names() and any(getattr(args, repeated, None) for repeated in ("only", "seeds")):  # beside earlier runs
        command = "; ".join(dict.fromkeys([*read_results(name)["command"].split("; "), command]))
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(
        json.dumps({"command": command, "machine": machine()} | results, indent=2) + "\n"
    )
    from experiments import report  # here, since it imports this module

    draw(name)
    report.write_tables()
    print(table(name))


def names() -> list[str]:
    """The experiments that have committed results."""
    return sorted(path.parent.name for path in RESULTS.glob("*/results.json"))


def module(name: str) -> Any:
    """The module of an experiment."""
    return importlib.import_module(f"experiments.{name}")


def table(name: str) -> str:
    """The table of an experiment, in Markdown, from its results.json."""
    return module(name).table(read_results(name))


def draw(name: str) -> None:
    """Draw figure.png of an experiment from its results.json."""
    module(name).draw_figure(read_results(name), RESULTS / name / "figure.png")


def read_results(name: str) -> dict[str, Any]:
    """The results.json of an experiment."""
    return json.loads((RESULTS / name / "results.json").read_text())
