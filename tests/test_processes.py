"""Real processes, joined over loopback: every mode, and what happens when one is killed, signalled, or differs."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from commands import POINTS, SMOKE, all_succeed, assert_close, ends, free_port, python, read_until, start_group, succeed

from ddgan_jax.devices.processes import is_lost_process
from ddgan_jax.storage import checkpoint

ENDLESS = [
    "--config.train.num_steps=1000000",
    "--config.checkpoint.every=1000000",
    "--config.log.every=100000",
    "--config.log.samples_every=0",
]
QUIET = "--config.log.tensorboard=False"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The workdir of a run of one process and one device that evaluates on the way."""
    workdir = tmp_path_factory.mktemp("alone")
    succeed(POINTS, f"--workdir={workdir}", QUIET, "--config.eval.every=4", cache)
    return workdir


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_and_evaluate_as_one(alone, cache, tmp_path):
    """On-line evaluation included: process 0 alone speaks and writes, and the numbers are those of one device."""
    arguments = POINTS, f"--workdir={tmp_path}", QUIET, "--config.eval.every=4", cache
    outputs = all_succeed(start_group(2, *arguments, devices=2))
    assert "2 processes x 2 devices x 4" in outputs[0] and "finished 8 steps" in outputs[0]
    assert not any("step" in line for line in outputs[1].splitlines() if "Gloo" not in line), outputs[1]
    assert_close(tmp_path, alone)
    for a, b in zip(metrics_of(tmp_path), metrics_of(alone), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a.get("yardstick") == b.get("yardstick")
        for name in a.keys() - {"seconds", "images_per_second", "yardstick"}:
            assert (a[name] is None) == (b[name] is None), name  # a measure that is not finite
            assert a[name] is None or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("count, devices", [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_they_sample_and_evaluate_as_one_and_write_once(alone, count, devices, cache, tmp_path):
    of_one = tmp_path / "one.npz"
    out, sample = tmp_path / "many.npz", (POINTS, "--mode=sample", f"--workdir={alone}", "--num_samples=301", cache)
    succeed(*sample, f"--out={of_one}")
    outputs = all_succeed(start_group(count, *sample, f"--out={out}", devices=devices))
    assert ["sample of step 8" in output for output in outputs] == [True, *[False] * (count - 1)]
    np.testing.assert_array_equal(np.load(out)["images"], np.load(of_one)["images"])
    results = []
    for processes, folder in ((1, "a"), (count, "b")):
        judge = POINTS, "--mode=evaluate", f"--workdir={alone}", "--num_samples=500", f"--out={tmp_path / folder}"
        outputs = all_succeed(start_group(processes, *judge, cache, devices=devices))
        assert not any("written" in output for output in outputs[1:])
        results.append(json.loads((tmp_path / folder / "results.json").read_text()))
    for name in ("modes", "high_quality", "total_variation", "num_samples"):
        assert results[0][name] == results[1][name]
    assert results[1]["sampling"]["devices"] == f"{count * devices} x cpu"
    samples = POINTS, "--mode=evaluate", f"--samples={of_one}", f"--out={tmp_path / 'c'}", cache
    all_succeed(start_group(count, *samples, devices=devices))
    assert json.loads((tmp_path / "c" / "results.json").read_text())["num_samples"] == 301


@pytest.mark.slow
def test_images_are_judged_as_by_one(cache, tmp_path):
    """With a feature network and real images, which all devices share: a classifier of digits."""
    digits = [SMOKE, "--config.data.name=digits", f"--config.data.dir={tmp_path / 'data'}", QUIET, cache]
    judged = ["--config.eval.every=4", "--config.eval.features=classifier"]
    results = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        all_succeed(start_group(count, *digits, *judged, f"--workdir={workdir}"))
        all_succeed(start_group(count, *digits, "--mode=evaluate", f"--workdir={workdir}", "--num_samples=100"))
        results.append(json.loads((workdir / "evaluation" / "8" / "results.json").read_text()))
        for cached in (tmp_path / "data" / "evaluation").glob("features-*"):
            cached.unlink()  # two processes compute the real images' features again
    one, two = results
    for name in ("classifier_frechet", "precision", "recall", "density", "coverage", "kl", "modes"):
        assert one[name] == pytest.approx(two[name], rel=1e-3), name


LSUN = "--config=configs/lsun_church_256.py:smoke"


@pytest.mark.slow
def test_the_papers_batch_is_the_same_on_1_8_and_64_devices(cache, tmp_path):
    """LSUN Church's 64 images: 64, 8 and 1 a device; in the last case groups of four lie on four devices.

    After one step, with R1: D's gradients are large here, and what is rounded otherwise in one step grows in the next.
    """
    for devices in (1, 8, 64):
        arguments = LSUN, f"--workdir={tmp_path / str(devices)}", "--config.train.batch_size=64", QUIET, cache
        arguments += "--config.train.num_steps=1", "--config.train.r1_every=1"
        (output,) = all_succeed(start_group(1, *arguments, devices=devices))
        assert f"1 processes x {devices} devices x {64 // devices}" in output
        assert_close(tmp_path / str(devices), tmp_path / "1")


@pytest.mark.slow
def test_256_devices_train_the_papers_batch(cache, tmp_path):
    """CIFAR-10's 256 images, one a device."""
    cifar = ["--config=configs/cifar10.py:smoke", "--config.train.batch_size=256", "--config.train.num_steps=2"]
    (output,) = all_succeed(start_group(1, *cifar, f"--workdir={tmp_path}", QUIET, cache, devices=256))
    assert "1 processes x 256 devices x 1" in output and "finished 2 steps" in output


@pytest.mark.slow
def test_a_batch_in_parts_trains_as_the_whole_one(cache, tmp_path):
    for parts in (1, 4):
        arguments = "--config.train.batch_size=32", f"--config.train.accumulate={parts}", QUIET, cache
        succeed("--config=configs/cifar10.py:smoke", f"--workdir={tmp_path / str(parts)}", *arguments)
    assert_close(tmp_path / "4", tmp_path / "1")


@pytest.mark.slow
def test_every_other_mode_is_done_by_process_0(alone, cache, tmp_path):
    """Also where only its machine has the workdir."""
    for mode, out in (("vary", "v.png"), ("interpolate", "i.gif"), ("export", "s.bin")):
        here = [POINTS, f"--mode={mode}", f"--workdir={alone}", f"--out={tmp_path / out}", cache]
        outputs = all_succeed(start_group(2, *here, own={1: [f"--workdir={tmp_path / 'nothing'}"]}))
        assert (tmp_path / out).exists() and f"{mode} of step 8" in outputs[0] and mode not in outputs[1]
    out = f"--out={tmp_path / 's.npz'}"
    nothing = {1: [f"--workdir={tmp_path / 'nothing'}"]}
    all_succeed(start_group(2, POINTS, "--mode=sample", f"--workdir={alone}", out, cache, own=nothing))
    assert np.load(tmp_path / "s.npz")["images"].shape == (64, 2)
    samples = [POINTS, "--mode=evaluate", f"--samples={tmp_path / 's.npz'}", f"--out={tmp_path / 'judged'}"]
    all_succeed(start_group(2, *samples, cache))
    assert (tmp_path / "judged" / "results.json").exists()


def test_a_mistake_ends_all_with_one_sentence_each(cache, tmp_path):
    start = time.time()
    for code, output in ends(start_group(2, POINTS, "--mode=sample", f"--workdir={tmp_path}", cache)):
        assert code == 2 and f"error: there is no checkpoint in {tmp_path}" in output and "Traceback" not in output
    assert time.time() - start < 60


@pytest.mark.parametrize("signalled, number", [(1, signal.SIGTERM), (0, signal.SIGUSR1)])
def test_a_signal_to_one_stops_all_at_one_step_within_two_seconds(signalled, number, cache, tmp_path):
    """Whatever log.every says; the same signal twice at once is one; the run then goes on."""
    processes = start_group(2, POINTS, f"--workdir={tmp_path}", QUIET, cache, *ENDLESS)
    read_until(processes[0], "step 3 done")
    start = time.time()
    for _ in range(2):
        processes[signalled].send_signal(number)
    found = ends(processes)
    assert time.time() - start < 2 + 1.5  # 1.5 s for the interpreters to end
    saved = [line for _, output in found for line in output.splitlines() if "saved step" in line]
    assert [code for code, _ in found] == [75, 75] and len(saved) == 2 and saved[0] == saved[1]
    (step,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert saved[0] == f"{number.name}: saved step {step} in {tmp_path}; run the same command to continue"
    assert not (tmp_path / "results.json").exists() and "finished" not in found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_all(killed, cache, tmp_path):
    """The others say so, and a new start goes on from the last checkpoint."""
    arguments = POINTS, f"--workdir={tmp_path}", QUIET, cache
    processes = start_group(2, *arguments, "--config.train.num_steps=1000000", "--config.checkpoint.every=4")
    read_until(processes[0], "step 10/")
    start = time.time()
    processes[killed].kill()
    found = ends(processes)
    code, output = found[1 - killed]
    assert code not in (0, 2, 75) and time.time() - start < 150, output
    assert code < 0 or "stopped: another process of this job is gone" in output, output
    step = int(checkpoint.find(str(tmp_path)).name)
    outputs = all_succeed(start_group(2, *arguments, f"--config.train.num_steps={step + 2}"))
    assert f"resuming from step {step}" in outputs[0]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service is gone"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:23737"), True),
        (ValueError("a batch of 3 images"), False),
        (ValueError("Connection: no such setting of the bucket"), False),
        (OSError("Connection refused"), False),
    ],
)
def test_which_errors_mean_that_a_process_is_gone(error, lost, monkeypatch):
    assert not is_lost_process(error)  # it has not joined others
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert is_lost_process(error) == lost


def test_settings_and_data_that_differ_are_told_before_the_first_step(cache, tmp_path):
    own = {1: ["--config.train.lr_g=0.5"]}
    for code, output in ends(start_group(2, POINTS, f"--workdir={tmp_path}", QUIET, cache, own=own)):
        assert code == 2 and "config.train.lr_g is 0.001 in process 0 and 0.5 in process 1" in output, output
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_data_that_differs_or_is_missing_in_one_stops_all(cache, tmp_path):
    from PIL import Image

    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = np.random.default_rng(seed * 100 + i).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    folder = ["--config=configs/cifar10.py:smoke", "--config.data.name=image_folder", f"--workdir={tmp_path / 'run'}"]
    folder += [QUIET, cache, f"--config.data.path={tmp_path / 'a'}", f"--config.data.dir={tmp_path / 'copies'}"]
    for code, output in ends(start_group(2, *folder, own={1: [f"--config.data.path={tmp_path / 'b'}"]})):
        assert code == 2 and "the processes do not run the same command: the data is 20 examples" in output, output
    for code, output in ends(start_group(2, *folder, own={1: [f"--config.data.path={tmp_path / 'nothing'}"]})):
        assert code == 2 and "process 1: --config.data.path=" in output and "does not exist" in output, output


@pytest.mark.parametrize(
    "opened, message",
    [
        ("raise UserError('it is not there')", "process 1: it is not there"),
        (
            "return dataclasses.replace(data, images=data.images[::-1])",
            "do not run the same command: the data is 1,797 examples",
        ),
        (
            "return dataclasses.replace(data, labels=lambda: data.labels()[::-1])",
            "do not run the same command: the labels is ",
        ),
    ],
)
def test_an_evaluation_of_other_data_in_one_stops_all(opened, message, tmp_path):
    script = f"""
import dataclasses, os
from ddgan_jax.data import sources
from ddgan_jax.errors import UserError
open_data = sources.open_data
def other(config):
    data = open_data(config)
    {opened}
if os.environ["JAX_PROCESS_ID"] == "1":
    sources.open_data = other
"""
    arguments = "--mode=evaluate", "--checkpoint=digits", "--num_samples=20", f"--out={tmp_path}"
    for code, output in ends(start_group(2, *arguments, script=script)):
        assert code == 2 and message in output and "Traceback" not in output, output


@pytest.mark.slow
def test_a_slow_end_of_process_0_is_waited_for(cache, tmp_path):
    """It draws for 45 s, longer than a collective waits; nobody leaves before, and all end well."""
    script = """
import time
from ddgan_jax.commands import figures
from ddgan_jax.devices import parallel, processes
draw = figures.curves
def slowly(*arguments):
    time.sleep(45)
    draw(*arguments)
figures.curves = slowly
"""
    outputs = all_succeed(start_group(2, POINTS, f"--workdir={tmp_path}", QUIET, cache, script=script))
    assert "finished 8 steps" in outputs[0] and (tmp_path / "curves.png").exists()


SLOWLY = """
import time
import ddgan_jax.{module} as job
do = job.{name}
def slowly(*arguments):
    time.sleep({seconds})
    return do(*arguments)
job.{name} = slowly
"""


SLOW_END = """
import contextlib, time
from ddgan_jax.commands import generate
into = generate.into
@contextlib.contextmanager
def slowly(*arguments):
    with into(*arguments) as add:
        yield add
        time.sleep(15)
generate.into = slowly
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_process_0_writes_for_longer_than_jax_waits_at_the_end(mode, count, alone, cache, tmp_path):
    out = tmp_path / ("s.npz" if mode == "sample" else "judged")
    arguments = POINTS, f"--mode={mode}", f"--workdir={alone}", f"--out={out}", cache
    slow_figures = SLOWLY.format(module="commands.evaluate", name="draw_figures", seconds=15)
    script, env = SLOW_END if mode == "sample" else slow_figures, {"DDGAN_SHUTDOWN_TIMEOUT": "5"}
    all_succeed(start_group(count, *arguments, "--num_samples=100", script=script, env=env))
    assert out.is_file() or (out / "samples.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_process_0_measures_for_longer_than_a_collective_waits(count, alone, cache, tmp_path):
    script = SLOWLY.format(module="metrics.evaluator", name="measure_points", seconds=45)
    arguments = POINTS, "--mode=evaluate", f"--workdir={alone}", "--num_samples=100", f"--out={tmp_path}", cache
    all_succeed(start_group(count, *arguments, script=script))
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "error, others",
    [
        ("OSError(28, 'No space left on device')", "stopped: [Errno 28] No space left on device"),
        ("TypeError('a bug')", "stopped: failed with TypeError: a bug"),
    ],
)
def test_an_error_while_process_0_writes_ends_all_at_once(error, others, alone, cache, tmp_path):
    script = f"""
from ddgan_jax.commands import generate
def into(*arguments):
    raise {error}
generate.into = into
"""
    arguments = POINTS, "--mode=sample", f"--workdir={alone}", f"--out={tmp_path / 's.npz'}", cache
    first, *rest = ends(start_group(2, *arguments, script=script))
    assert first[0] == 1 and ("TypeError: a bug" in first[1] or others in first[1]), first[1]
    for code, output in rest:
        assert code == 1 and others in output and "Traceback" not in output, output


@pytest.mark.slow
def test_a_signal_ends_other_modes_too(alone, tmp_path):
    """Once joined, JAX would take SIGTERM for a service of its own, and go on."""
    script = f"""
import os
os.environ |= {{"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}}
from ddgan_jax.devices import parallel, processes
import time
processes.initialize()
print("joined", flush=True)
time.sleep(60)
"""
    process = python(script)
    assert process.stdout.readline() == "joined\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == -signal.SIGTERM
    process.communicate()


def test_the_state_is_placed_without_a_comparison(tmp_path):
    """`device_put` of many small arrays over processes takes seconds: each is compared with those of the others."""
    script = """
import time
import jax, numpy as np
from ddgan_jax.devices import parallel, processes
tree = {str(i): np.full((3, 5), i, np.float32) for i in range(1000)}
processes.initialize()
parallel.replicate({"0": tree["0"]})
start = time.time()
placed = jax.block_until_ready(parallel.replicate(tree))
assert all(x.sharding.is_fully_replicated for x in placed.values())
print(time.time() - start, flush=True)
raise SystemExit(processes.barrier())
"""
    for code, output in ends(start_group(2, script=script)):
        assert code == 0, output
        assert float(next(line for line in output.splitlines() if "Gloo" not in line)) < 3
