"""A run of 100,000 steps, with all that is logged, saved and evaluated: it ends as light and as fast as it began."""

import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess

import pytest
from commands import POINTS, command


def weight(pid: int) -> dict[str, int]:
    """Resident KiB, open files and threads of a process, and those of TensorStore's pool."""
    process = pathlib.Path(f"/proc/{pid}")
    threads = []
    for task in process.glob("task/*/comm"):
        with contextlib.suppress(FileNotFoundError):  # it has ended
            threads.append(task.read_text().strip())
    pool = threads.count("ts_pool_worker")
    resident = int(re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())[1])
    files = len(list((process / "fd").iterdir()))
    return {"resident": resident, "files": files, "threads": len(threads) - pool, "pool": pool}


def typical(weights: list[dict[str, int]]) -> dict[str, float]:
    """The median of each: Python collects its garbage now and then, and threads of a save may still be ending."""
    return {name: statistics.median(each[name] for each in weights) for name in weights[0]}


@pytest.mark.parametrize("tensorboard", [False, True], ids=["plain", "tensorboard"])
def test_a_long_run(tensorboard, full, count, tmp_path):
    if tensorboard:
        pytest.importorskip("clu")
    steps = 100_000 if full else 5_000
    argv, options = command(
        POINTS,
        f"--workdir={tmp_path}",
        f"--config.train.num_steps={steps}",
        f"--config.log.tensorboard={tensorboard}",
        "--config.log.every=50",
        "--config.log.samples_every=500",
        "--config.checkpoint.every=500",
        "--config.eval.every=500",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # what is freed is given back, and weighs no more: glibc has a heap for each thread, and keeps arrays in them
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    weights: dict[int, dict[str, int]] = {}
    with subprocess.Popen(argv, **options) as process:
        for line in process.stdout:
            if match := re.match(r"step (\d+)/", line):
                step = int(match[1])
                if step % 500 == 250:  # between two saves, which have threads and files of their own
                    weights[step] = weight(process.pid)
    assert process.returncode == 0
    tenth = steps // 10
    early, late = (
        typical([weights[step] for step in weights if start < step < start + tenth]) for start in (tenth, 9 * tenth)
    )
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    # a tenth of the short run is not enough to have used all that a run uses
    allowed = (
        {"resident": 1.02, "threads": 1.02, "files": 1.02} if full else {"resident": 1.15, "threads": 1.5, "files": 2}
    )
    for name, times in allowed.items():
        assert late[name] <= early[name] * times, (name, early, late)
    assert late["pool"] <= 128  # Orbax's limit of files at once: the pool grows when more are written than ever before
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == steps // 50
    speeds = [record["images_per_second"] for record in records]
    tenth = len(speeds) // 10
    first, last = statistics.median(speeds[tenth : 2 * tenth]), statistics.median(speeds[-tenth:])
    assert last > (0.8 if full else 0.4) * first, (first, last)  # neighbours make times waver
    count(steps=steps, mib=late["resident"] / 1024, growth=late["resident"] / early["resident"], speed=last / first)
