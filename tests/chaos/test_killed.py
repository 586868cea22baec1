"""A training that is killed, at any moment and as often as it may be, ends as one that was not: bit for bit.

What is compared: the newest checkpoint, every record of metrics.jsonl but its times, best.json, which checkpoints
are kept, and every picture of samples.
"""

import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import time

import pytest
from buckets import bucket  # noqa: F401
from commands import PARTS, POINTS, command, ends, run, start_group

from ddgan_jax.storage import checkpoint

KILLS = 4  # of one life; then it may end
# Evaluates and draws on the way, and deletes old checkpoints
OFTEN = [
    "--config.checkpoint.every=2",
    "--config.checkpoint.keep=1",
    "--config.log.samples_every=2",
    "--config.eval.every=4",
    "--config.log.tensorboard=False",
]
TIMES = ("seconds", "images_per_second")

# Kills its process just before the KILL_AT-th time that it opens a file of the workdir for writing, or makes, renames
# or deletes one: the moments within a save, one by one.
AT_A_WRITE = """
import os, signal, sys
WORKDIR, AT, written = os.environ["WORKDIR"], int(os.environ["KILL_AT"]), 0
def hook(event, arguments):
    global written
    if event == "open":
        changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
    if changes and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(WORKDIR):
        written += 1
        if written == AT:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
import atexit
atexit.register(lambda: print("written", written, flush=True))
"""

# Kills its process a moment after the first file of the checkpoint of step KILL_STEP is there.
IN_A_SAVE = """
import glob, os, signal, threading, time
def watch():
    while not glob.glob(os.path.join(os.environ["WORKDIR"], "checkpoints", os.environ["KILL_STEP"] + "*")):
        time.sleep(0.0005)
    time.sleep(float(os.environ["KILL_AFTER"]))
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of small pictures, which a run prepares before it trains."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def outcome(workdir: pathlib.Path) -> dict[str, object]:
    """What two runs must have the same of."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    arrays, _ = checkpoint.read(checkpoint.find(workdir))
    found = {f"checkpoint: {name}": hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    found |= {f"samples/{path.name}": digest(path) for path in (workdir / "samples").glob("*.png")}
    found["records"] = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    found["best"] = (workdir / "best.json").read_text() if (workdir / "best.json").exists() else None
    found["kept"] = checkpoint.finished(workdir / "checkpoints")
    found["left"] = sorted(
        str(path.relative_to(workdir)) for path in workdir.rglob("*") if "tmp" in path.name or path.name == "damaged"
    )
    return found


def assert_same(workdir: pathlib.Path, unbroken: dict[str, object]) -> None:
    ours = outcome(workdir)
    assert {name for name in ours.keys() | unbroken.keys() if ours.get(name) != unbroken.get(name)} == set()


class Unbroken:
    """A run that nobody stops: what it leaves, and how long it takes when all is compiled."""

    def __init__(self, folder, *arguments):
        self.arguments = [*arguments, *OFTEN, f"--compilation_cache={folder / 'cache'}"]
        for name in ("first", "second"):
            start = time.time()
            result = run(*self.arguments, f"--workdir={folder / name}")
            assert result.returncode == 0, result.stderr
            self.seconds = time.time() - start
        self.outcome = outcome(folder / "second")
        assert outcome(folder / "first") == self.outcome


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return Unbroken(tmp_path_factory.mktemp("points"), POINTS)


def of_pictures(folder: pathlib.Path) -> list[str]:
    """Arguments of a run on a folder of pictures, which it prepares and trains a classifier for."""
    data = ["--config.data.name=image_folder", f"--config.data.path={folder}"]
    return ["--config=configs/image_folder.py:smoke", *data, "--config.eval.features=classifier"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("pictures")
    return Unbroken(folder, *of_pictures(photos), f"--config.data.dir={folder / 'data'}")


def live(start, seconds: float, rng: random.Random, number=signal.SIGKILL) -> list[str]:
    """Kill what `start` starts at random moments, KILLS times at most, then let it end; says where each kill fell."""
    fell = []
    for _ in range(KILLS):
        moment = rng.uniform(0, seconds)
        process = start()
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            output, _ = process.communicate(timeout=300)
            lines = (output or "").strip().splitlines()
            fell.append(f"{moment:.2f} s: {process.returncode}: {lines[-1][:60] if lines else 'nothing said'}")
            if process.returncode == 0:
                return fell
            continue
        assert process.returncode == 0, "it ended by itself, and not well"
        return fell
    process = start()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return fell


def starter(arguments, env=None):
    def start():
        argv, options = command(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return subprocess.Popen(argv, **options, env=os.environ | (env or {}))

    return start


@pytest.mark.lives(2, 20)
def test_at_random_moments(life, points, count, tmp_path):
    fell = live(starter([*points.arguments, f"--workdir={tmp_path}"]), points.seconds, random.Random(life))
    print(f"life {life}:", *fell, sep="\n  ")
    assert_same(tmp_path, points.outcome)
    count(kills=len(fell))


@pytest.mark.lives(1, 8)
def test_images_at_random_moments(life, pictures, count, tmp_path):
    """With data to prepare, and a classifier to train that judges."""
    data = [f"--config.data.dir={tmp_path / 'data'}"]
    start = starter([*pictures.arguments, *data, f"--workdir={tmp_path / 'run'}"])
    fell = live(start, pictures.seconds, random.Random(life))
    print(f"life {life}:", *fell, sep="\n  ")
    assert_same(tmp_path / "run", pictures.outcome)
    count(kills=len(fell))


@pytest.mark.lives(1, 12)
def test_sigterm(life, points, count, tmp_path):
    """Ends with exit code 75, or 0 where all was done."""
    start = starter([*points.arguments, f"--workdir={tmp_path}"])
    fell = live(start, points.seconds, random.Random(100 + life), signal.SIGTERM)
    print(f"life {life}:", *fell, sep="\n  ")
    early = str(-signal.SIGTERM)  # before there is anything to save, while Python still imports
    assert all(re.search(rf": (75|0|{early}): ", line) for line in fell)
    assert_same(tmp_path, points.outcome)
    count(signals=len(fell))


def hooked(script, arguments, env):
    """The exit code and the output of main.py, in a process that runs lines of Python first."""
    (ended,) = ends(start_group(1, *arguments, script=script, env=env))
    return ended


@pytest.mark.lives(1, PARTS)
def test_at_every_write(life, points, full, count, tmp_path):
    """Just before a file of the workdir is opened, made, renamed or deleted: at each of these moments, or at some."""

    def once(at):
        workdir = tmp_path / str(at)
        arguments = [*points.arguments, f"--workdir={workdir}"]
        return workdir, arguments, hooked(AT_A_WRITE, arguments, {"WORKDIR": str(workdir), "KILL_AT": str(at)})

    _, _, (code, output) = once(0)
    assert code == 0, output
    total = int(re.search(r"written (\d+)", output)[1])
    assert total > 50
    every = range(1, total + 1)
    moments = every[life::PARTS] if full else random.Random(0).sample(every, 3)
    for at in moments:
        workdir, arguments, (code, output) = once(at)
        assert code == -signal.SIGKILL, (at, output)
        result = run(*arguments)
        assert result.returncode == 0, (at, result.stdout, result.stderr)
        assert_same(workdir, points.outcome)
    count(kills=len(moments), moments=total)


@pytest.mark.lives(2, 20)
def test_in_a_save(life, points, count, tmp_path):
    """While the files of a checkpoint are written."""
    rng = random.Random(life)
    step, after = rng.choice((2, 4, 6, 8)), rng.uniform(0, 0.1)
    arguments = [*points.arguments, f"--workdir={tmp_path}"]
    env = {"WORKDIR": str(tmp_path), "KILL_STEP": str(step), "KILL_AFTER": str(after)}
    code, output = hooked(IN_A_SAVE, arguments, env)
    assert code == -signal.SIGKILL, output
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    result = run(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(tmp_path, points.outcome)
    count(kills=1, unfinished=any("tmp" in name for name in left))


@pytest.mark.lives(1, 13)
def test_in_a_bucket(life, bucket, points, count, tmp_path):  # noqa: F811
    workdir = f"{bucket.url}/life_{life}"
    bucket.be("slow")
    start = starter([*points.arguments, f"--workdir={workdir}"], bucket.env)
    fell = live(start, 2 * points.seconds, random.Random(200 + life))
    print(f"life {life}:", *fell, sep="\n  ")
    bucket.be()
    fetch = "import gcsfs; gcsfs.GCSFileSystem().get(sys.argv[1], sys.argv[2], recursive=True)"
    bucket.python(fetch, workdir, tmp_path / "run")
    assert_same(tmp_path / "run", points.outcome)
    count(kills=len(fell))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, points):
    """What two processes leave that nobody kills."""
    workdir = tmp_path_factory.mktemp("pair")
    ended = ends(start_group(2, *points.arguments, f"--workdir={workdir}"))
    assert [code for code, _ in ended] == [0, 0], ended
    return outcome(workdir)


@pytest.mark.lives(1, 17)
def test_one_of_two_processes(life, points, pair, count, tmp_path):
    """The other one notices, and ends too; together they are started again."""
    rng, fell = random.Random(300 + life), []
    arguments = [*points.arguments, f"--workdir={tmp_path}"]
    for _ in range(KILLS):
        moment, victim = rng.uniform(0, 2 * points.seconds), rng.randrange(2)
        processes = start_group(2, *arguments)
        deadline = time.time() + moment
        while time.time() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        alive = processes[victim].poll() is None
        if alive:
            processes[victim].kill()
            fell.append(f"{moment:.2f} s: process {victim}")
        codes, outputs = zip(*ends(processes, timeout=600), strict=True)
        if not alive:
            assert codes == (0, 0), outputs
            break
        assert "Traceback" not in "".join(outputs), outputs
    else:
        codes, outputs = zip(*ends(start_group(2, *arguments)), strict=True)
        assert codes == (0, 0), outputs
    print(f"life {life}:", *fell, sep="\n  ")
    assert_same(tmp_path, pair)
    count(kills=len(fell))
