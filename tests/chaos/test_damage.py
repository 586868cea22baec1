"""Every file of a workdir, one at a time: cut, emptied, deleted, a bit flipped, replaced by a folder.

What is done next then gives the right numbers, or ends in one sentence: no traceback, and never a wrong number.
"""

import json
import os
import pathlib
import random
import re
import shutil

import numpy as np
import pytest
from commands import PARTS, POINTS
from forks import SIGTERM, at_step
from test_killed import OFTEN, outcome

FLAGS = [POINTS, *OFTEN, "--config.checkpoint.keep=2", "--config.checkpoint.keep_period=4"]
STOP_AT_6 = at_step(5, SIGTERM)
SAMPLE = ["--mode=sample", "--num_samples=100"]
EVALUATE = ["--mode=evaluate", "--num_samples=200"]


@pytest.fixture(scope="module")
def run(forks, cache):
    """Runs main.py on a workdir."""

    def start(workdir, *arguments, before=""):
        return forks.run(*FLAGS, f"--workdir={workdir}", *arguments, cache, before=before, seconds=300)

    return start


@pytest.fixture(scope="module")
def broken_off(run, tmp_path_factory):
    """A workdir that a signal ended at step 6 of 8, sampled and evaluated there, and what is right of it."""
    folder = tmp_path_factory.mktemp("damage")
    workdir, whole = folder / "run", folder / "whole"
    ended = run(workdir, before=STOP_AT_6)
    assert ended.code == 75 and "saved step 6" in ended.output, ended
    right: dict = {"sample": {}, "evaluate": {}}
    for step in (4, 6):
        of_step = [f"--checkpoint={workdir}/checkpoints/{step}"]
        assert run(workdir, *SAMPLE, *of_step, f"--out={folder}/{step}.npz").code == 0
        assert run(workdir, *EVALUATE, *of_step, f"--out={workdir}/evaluation/{step}").code == 0
        right["sample"][step] = np.load(folder / f"{step}.npz")["images"]
        right["evaluate"][step] = numbers(workdir / "evaluation" / str(step))
    assert run(workdir, "--mode=export", f"--out={workdir}/model.safetensors").code == 0
    shutil.copytree(workdir, whole)
    ended = run(whole)
    assert ended.code == 0, ended
    right["outcome"] = outcome(whole)
    return workdir, right


def numbers(folder: pathlib.Path) -> dict:
    """Of an evaluation: its measures, without times and paths."""
    results = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("seconds", "sampling", "checkpoint")}


def damage(file: pathlib.Path, how: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    file.unlink()  # it may be a link to the file of another case
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "flipped":
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif how == "folder":
        file.mkdir()


def step_of(output: str) -> int:
    return int(re.search(r" of step (\d+)", output)[1])


def check(run, workdir, right, mode, out, file) -> str:
    """Do what `mode` says in a workdir whose `file` is damaged; returns how it ended."""
    if mode == "resume":
        ended = run(workdir)
    elif mode == "sample":
        ended = run(workdir, *SAMPLE, f"--out={out}.npz")
    elif mode == "best":
        ended = run(workdir, *SAMPLE, f"--checkpoint={workdir}/best", f"--out={out}.npz")
    elif mode == "exported":
        ended = run(workdir, *SAMPLE, f"--checkpoint={workdir}/model.safetensors", f"--out={out}.npz")
    else:
        ended = run(workdir, *EVALUATE, f"--out={out}")
    assert "Traceback" not in ended.errors, ended.errors[-1500:]
    if ended.code:
        assert ended.code in (1, 2) and len(ended.told) == 1, ended
        return "one sentence"
    if mode == "resume":
        ours = outcome(workdir)
        different = {k for k in ours.keys() | right["outcome"].keys() if ours.get(k) != right["outcome"].get(k)}
        different -= {str(file)}  # a picture, which nothing reads
        if file.name == "metrics.jsonl" and len(ours["records"]) == len(right["outcome"]["records"]):
            pairs = zip(ours["records"], right["outcome"]["records"], strict=True)
            if [theirs["step"] for mine, theirs in pairs if mine != theirs] == [6]:
                different -= {"records"}  # that of the newest checkpoint, which no checksum covers yet
        reported = "damaged" in ended.output or "cannot be read" in ended.output
        assert not different or (different <= {"records", "kept", "left", "best"} and reported), (
            different,
            ended.output,
        )
        return "reported" if reported else "right numbers"
    if mode == "evaluate":
        found = numbers(pathlib.Path(out))
        step = found["step"]
        assert found == right["evaluate"][step], (found, right["evaluate"][step])
    else:
        step = step_of(ended.output)
        images = np.load(f"{out}.npz")["images"]
        assert np.array_equal(images, right["sample"][step]), f"other images, as if of step {step}"
    newest = 4 if mode == "best" else 6
    assert step == newest or "damaged" in ended.output + ended.errors, ended
    return "right numbers" if step == newest else "reported"


@pytest.mark.lives(1, PARTS)
def test_every_file(life, run, broken_off, full, count, tmp_path):
    workdir, right = broken_off
    files = sorted(path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    assert len(files) > 40
    rng, cases = random.Random(0), []
    for file in files:
        modes = ["resume", "sample", "evaluate"]
        modes += ["best"] * ("best.json" in str(file) or "/4/" in str(file)) + ["exported"] * (".safe" in str(file))
        for how in ("cut", "emptied", "deleted", "folder", *["flipped"] * 3):
            few = rng.sample(modes, 1) if str(file).startswith(("samples", "evaluation", "curves")) else modes
            cases += [(file, how, mode) for mode in few]
    cases = cases[life::PARTS] if full else rng.sample(cases, 12)
    seen, wrong = {}, []
    for i, (file, how, mode) in enumerate(cases):
        copy = tmp_path / str(i)
        shutil.copytree(workdir, copy, copy_function=os.link if mode != "resume" else shutil.copy)
        damage(copy / file, how, rng)
        try:
            kind = check(run, copy, right, mode, tmp_path / f"out{i}", file)
            seen[kind] = seen.get(kind, 0) + 1
        except Exception as error:
            wrong.append(f"{file} {how}, {mode}: {type(error).__name__} {str(error)[:1200]}")
        shutil.rmtree(copy)
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n\n".join(wrong)
    count(cases=len(cases), **{kind.replace(" ", "_"): number for kind, number in seen.items()})
