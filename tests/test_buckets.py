"""A bucket in the place of a folder: every mode, a killed save, damage, refused writes; without TensorFlow."""

import json
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from buckets import bucket  # noqa: F401
from commands import POINTS, ROOT, command, ends, run, run_python, start_group, succeed
from test_data import PHOTOS

from ddgan_jax.errors import UserError
from ddgan_jax.storage import checkpoint, paths

NO_TENSORFLOW = "--config.log.tensorboard=False"


@pytest.fixture(scope="module")
def trained(bucket, cache):  # noqa: F811
    """A run of 8 steps in the bucket, and the same one in a folder."""
    workdir = f"{bucket.url}/run"
    result = succeed(POINTS, f"--workdir={workdir}", NO_TENSORFLOW, cache, env=bucket.env)
    assert f"see {workdir}/samples/final.png" in result.stdout
    return workdir


READ = """
from ddgan_jax.storage import checkpoint
import numpy as np
arrays = checkpoint.read(checkpoint.find(sys.argv[1]))[0]
np.savez(sys.argv[2], **{name.replace("/", "|"): array for name, array in arrays.items()})
"""


def arrays_of(bucket, workdir, out):  # noqa: F811
    bucket.python(READ, workdir, out)
    with np.load(out) as arrays:
        return dict(arrays)


def assert_same_runs(bucket, workdir, other, tmp_path):  # noqa: F811
    ours, theirs = (arrays_of(bucket, folder, tmp_path / f"{i}.npz") for i, folder in enumerate((workdir, other)))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


FIND = "from ddgan_jax.storage import checkpoint; print(checkpoint.find(sys.argv[1]))"


def test_what_a_run_leaves(bucket, trained, cache, tmp_path):  # noqa: F811
    """The files of a local run, the same numbers, and nothing on the machine."""
    names = {name.removeprefix(f"{trained}/") for name in bucket.files("run")}
    assert {"config.json", "metrics.jsonl", "results.json", "curves.png", "samples/final.png"} <= names
    assert any(name.startswith("checkpoints/8/") for name in names) and not (ROOT / "gs:").exists()
    succeed(POINTS, f"--workdir={tmp_path}/run", NO_TENSORFLOW, cache)
    assert_same_runs(bucket, trained, f"{tmp_path}/run", tmp_path)
    lines = bucket.python("print(epath.Path(sys.argv[1]).read_text())", f"{trained}/metrics.jsonl").split("\n")
    assert [json.loads(line)["step"] for line in lines if line] == [2, 4, 6, 8]


@pytest.mark.slow
def test_every_mode_reads_and_writes_there(bucket, trained, cache, tmp_path):  # noqa: F811
    """With TensorFlow out of the way, in a process that may not import it."""
    out = f"{bucket.url}/out"
    script = """
import main
for name in ("tensorflow", "tensorflow_datasets", "clu"): sys.modules[name] = None
sys.argv = ["main.py", *sys.argv[1:]]
sys.exit(main.main())
"""
    for arguments, made in (
        (["--mode=sample", "--num_samples=100", f"--out={out}/x.npz"], "out/x.npz"),
        (["--mode=sample", f"--out={out}/x.png", f"--trajectory={out}/t.gif"], "out/t.gif"),
        (["--mode=vary", "--t=1", f"--out={out}/v.png"], "out/v.png"),
        (["--mode=interpolate", f"--out={out}/i.npz"], "out/i.npz"),
        (["--mode=export"], "run/model.safetensors"),
        (["--mode=evaluate", "--num_samples=200"], "run/evaluation/8/results.json"),
        (["--mode=evaluate", f"--samples={out}/x.npz", f"--out={out}/judged"], "out/judged/results.json"),
    ):
        bucket.python(script, POINTS, f"--workdir={trained}", cache, *arguments)
        assert f"{bucket.url}/{made}" in bucket.files(made.rpartition("/")[0]), arguments
    result = succeed(
        POINTS, f"--config.train.init_from={trained}", f"--workdir={tmp_path}", NO_TENSORFLOW, env=bucket.env
    )
    assert f"the networks are those of {trained}/checkpoints/8" in result.stdout


@pytest.mark.slow
def test_programs_are_kept_there(bucket, tmp_path):  # noqa: F811
    """Written by process 0, as for a pod whose hosts share no disk; the other hosts read them."""
    env = bucket.env | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    arguments = POINTS, NO_TENSORFLOW, "--config.train.num_steps=1", f"--compilation_cache={bucket.url}/programs"
    for start, hits in ((0, False), (1, True)):
        result = succeed(*arguments, f"--workdir={tmp_path / str(start)}", env=env)
        assert ("Persistent compilation cache hit" in result.stderr) == hits, result.stderr[-2000:]
    assert any(name.endswith("-cache") for name in bucket.contents("programs/"))


@pytest.mark.slow
def test_a_save_that_is_killed_is_no_checkpoint(bucket, trained, cache, tmp_path):  # noqa: F811
    """Killed between the first file of the checkpoint of step 8 and its last; the run goes on from 4, to the end."""
    workdir = f"{bucket.url}/killed"
    arguments = POINTS, f"--workdir={workdir}", NO_TENSORFLOW, cache
    argv, options = command(*arguments, env=os.environ | bucket.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(argv, **options) as process:
        for line in process.stdout:
            if re.match(r"step 4/", line):
                bucket.be("slow")
                break
        for _ in range(600):
            begun = [name for name in bucket.files("killed/checkpoints") if "/checkpoints/8/" in name]
            if begun:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
    bucket.be()
    left = bucket.files("killed/checkpoints")
    assert begun and f"{workdir}/checkpoints/8/commit_success.txt" not in left
    assert bucket.python(FIND, workdir).split() == [f"{workdir}/checkpoints/4"]
    assert "resuming from step 4" in succeed(*arguments, env=bucket.env).stdout
    assert_same_runs(bucket, workdir, trained, tmp_path)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(bucket, trained, cache, tmp_path):  # noqa: F811
    """It is moved to `damaged`, file by file, and the run goes on from the one before, to the same end."""
    workdir = f"{bucket.url}/damaged"
    arguments = POINTS, f"--workdir={workdir}", NO_TENSORFLOW, cache
    succeed(*arguments, env=bucket.env)
    bucket.python(
        "[epath.Path(sys.argv[1], name).write_bytes(b'') for name in ('ema/manifest.ocdbt', 'ema/_METADATA')]",
        f"{workdir}/checkpoints/8",
    )
    result = succeed(*arguments, env=bucket.env)
    assert f"it is moved to {workdir}/damaged/8" in result.stdout
    assert "resuming from step 4" in result.stdout and f"{workdir}/damaged/8/_CHECKPOINT_METADATA" in bucket.files(
        "damaged"
    )
    assert_same_runs(bucket, workdir, trained, tmp_path)


def test_data_is_read_from_there(bucket, cache, tmp_path):  # noqa: F811
    """A tfds dataset in a bucket, without TensorFlow."""
    script = """
import pathlib
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import sources
from ddgan_jax.storage import paths
here = sources.open_data(DataConfig("photos", dir=sys.argv[1], image_size=16))
for file in pathlib.Path(sys.argv[1]).rglob("*"):
    if file.is_file():
        paths.write(f"{sys.argv[2]}/{file.relative_to(sys.argv[1])}", file.read_bytes())
there = sources.open_data(DataConfig("photos", dir=sys.argv[2], image_size=16))
assert (here.images == there.images).all() and (here.labels() == there.labels()).all()
print(len(there.images), "tensorflow" in sys.modules)
"""
    run_python(PHOTOS, tmp_path / "data", "array_record")
    assert bucket.python(script, tmp_path / "data", f"{bucket.url}/data").split()[-2:] == ["12", "False"]


def test_the_best_is_found_there(bucket, cache, tmp_path):  # noqa: F811
    workdir = f"{bucket.url}/best"
    every = ["--config.eval.every=4", "--config.checkpoint.keep=1"]
    result = succeed(POINTS, f"--workdir={workdir}", NO_TENSORFLOW, cache, *every, env=bucket.env)
    assert "step 4 is the best so far" in result.stdout
    out = f"--out={tmp_path}/x.npz"
    result = succeed(POINTS, "--mode=sample", f"--checkpoint={workdir}/best", out, cache, env=bucket.env)
    assert "sample of step" in result.stdout


@pytest.mark.slow
def test_a_bucket_that_refuses_writes_loses_nothing(bucket, trained, cache, tmp_path):  # noqa: F811
    workdir = f"{bucket.url}/refused"
    arguments = POINTS, f"--workdir={workdir}", NO_TENSORFLOW, cache
    argv, options = command(
        *arguments,
        "--config.train.num_steps=100000",
        "--config.checkpoint.every=100",
        "--config.log.samples_every=0",
        env=os.environ | bucket.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with subprocess.Popen(argv, **options) as process:
        for line in process.stdout:
            if re.match(r"step 150/", line):
                while f"{workdir}/checkpoints/100/commit_success.txt" not in bucket.files("refused"):
                    time.sleep(0.1)
                bucket.be("refuse")
                break
        _, errors = process.communicate(timeout=300)
    result = run(*arguments, "--mode=sample", env=bucket.env)  # while it refuses
    bucket.be()
    stopped = [line for line in errors.splitlines() if line.startswith("stopped: ")]
    assert process.returncode == 1 and len(stopped) == 1 and workdir in stopped[0], errors
    assert result.returncode == 1 and f"stopped: {workdir}/sample.png cannot be written: Forb" in result.stderr.replace(
        "[Errno None] ", ""
    )
    # None of ours: what TensorStore was writing may still complain, in its own threads, that nobody listens.
    assert not re.search(r'File ".*(ddgan_jax/|main\.py)', errors + result.stderr), errors + result.stderr
    step = int(bucket.python(FIND, workdir).strip().rpartition("/")[2])
    assert step >= 100
    result = succeed(*arguments, f"--config.train.num_steps={step + 4}", env=bucket.env)
    assert f"resuming from step {step}" in result.stdout


def test_a_fault_waits_for_the_save_before_it(bucket, cache):  # noqa: F811
    script = """
from ddgan_jax.errors import Fault
from ddgan_jax.commands import train
def fail(run, file): raise Fault("no picture")
train.save_samples = fail
"""
    workdir = f"{bucket.url}/waits"
    bucket.be("slow")
    every = "--config.log.samples_every=4", "--config.checkpoint.every=4"
    group = start_group(1, POINTS, f"--workdir={workdir}", NO_TENSORFLOW, cache, *every, script=script, env=bucket.env)
    code, output = ends(group)[0]
    bucket.be()
    assert code == 1 and "stopped: no picture" in output, output
    assert f"{workdir}/checkpoints/4/commit_success.txt" in bucket.files("waits")


def test_paths():
    for given, message in (
        ("https://a/b", "paths are local or gs://bucket/name, not https://"),
        ("gs:/b/run", "a path in a bucket is gs://bucket/name"),
        ("gs://", "a path in a bucket is gs://bucket/name"),
    ):
        with pytest.raises(UserError, match=message):
            paths.path(given)
    assert str(paths.path("gs://b/run") / "x") == "gs://b/run/x"
    assert not str(paths.path("~/x")).startswith("~")
    assert paths.cache_dir("data") == "data" and not paths.is_remote(paths.cache_dir("gs://b/data"))


def test_a_folder_that_is_only_called_like_a_step_is_no_checkpoint(tmp_path):
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        checkpoint.find(str(tmp_path))


def test_an_atomic_write_leaves_the_old_or_the_new(tmp_path):
    path = tmp_path / "new" / "x.json"
    paths.write(path, "old")

    def half(file):
        file.write(b"ha")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        paths.write(path, half)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.json"]
    paths.write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["x.json"]


EVENTS = """
from clu import metric_writers
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from ddgan_jax.config.settings import LogConfig
from ddgan_jax.storage import log, paths
run, written, write = log.Log(paths.path(sys.argv[1]), {}, LogConfig(tensorboard=True), 0), [], paths.write
paths.write = lambda file, content: written.append((str(file), len(content))) or write(file, content)
for step in range(1, 301):
    run.scalars(step, {f"loss_{i}": 0.5 for i in range(20)})
    if step % 100 == 0:
        run.flush()
run.close()
steps = []
for i, name in enumerate(paths.names(f"{sys.argv[1]}/tensorboard")):
    file = f"{sys.argv[2]}/{i}"
    open(file, "wb").write(paths.read(f"{sys.argv[1]}/tensorboard/{name}"))
    steps += [event.step for event in EventFileLoader(file).Load() if event.summary.value and event.step]
print(len(steps), sorted(set(steps)) == list(range(1, 301)), sum(n for file, n in written if "/tensorboard/" in file))
"""


def test_tensorboard_uploads_each_event_once(bucket, tmp_path):  # noqa: F811
    """In parts, one for each flush and one for the end, which together hold every step."""
    pytest.importorskip("clu")
    steps, whole, num_bytes = bucket.python(EVENTS, f"{bucket.url}/events", tmp_path).split()[-3:]
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert (steps, whole) == ("6000", "True") and len(sizes) == 4
    assert int(num_bytes) == sum(sizes)
