"""The command as a user runs it: wrong use, and (slow) training, interruption, resumption, sampling."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from commands import (
    POINTS,
    ROOT,
    SMOKE,
    all_succeed,
    assert_close,
    assert_same,
    command,
    contents,
    ends,
    final,
    python,
    run,
    run_python,
    start_group,
    succeed,
    with_devices,
)
from conftest import preset_with

from ddgan_jax.commands import checks, figures, progress, setup
from ddgan_jax.commands import train as train_module
from ddgan_jax.commands.signals import Interrupt
from ddgan_jax.commands.train import train
from ddgan_jax.config import presets
from ddgan_jax.config.settings import LogConfig, as_dict, read
from ddgan_jax.data.sketch import difference, sketch_of
from ddgan_jax.data.sources import Data, open_data
from ddgan_jax.errors import Fault, Interrupted, UserError
from ddgan_jax.method.build import build, init_state, noise_seed
from ddgan_jax.networks.generator import Generator
from ddgan_jax.storage import checkpoint, log, paths
from ddgan_jax.storage.workdir import lock as lock_workdir

points = functools.partial(preset_with, "gaussians:smoke")
EVALUATED = dict(eval__every=4, eval__online_samples=16)


def test_help():
    """It names every flag, and trains nothing."""
    result = succeed("--help")
    assert not result.stderr
    for flag in "config workdir mode checkpoint num_samples start_step compilation_cache".split():
        assert f"--{flag}" in result.stdout, flag
    # `true` is gone when the help comes; `head` would be too, most times
    cut = subprocess.run(
        f"{sys.executable} main.py --help | true", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert not cut.stderr


def test_points(refused, tmp_path):
    """The mixture of Gaussians through the same loop; its pictures are scatter plots, its samples float32."""
    result = succeed(POINTS, f"--workdir={tmp_path}")
    assert "100,000 examples of 2" in result.stdout and (tmp_path / "samples" / "final.png").exists()
    succeed(POINTS, "--mode=sample", f"--workdir={tmp_path}", "--num_samples=5000", f"--out={tmp_path}/x.npz")
    points = np.load(tmp_path / "x.npz")["images"]
    assert points.shape == (5000, 2) and points.dtype == np.float32 and np.isfinite(points).all()
    error = refused(POINTS, "--mode=sample", f"--workdir={tmp_path}", f"--out={tmp_path}/folder")
    assert "must end in .png (a grid), in .npz (an array)" in error


@pytest.mark.slow
def test_a_run_begins_with_the_networks_of_another(refused, tmp_path):
    """The moving average of its G, and its D; with learning rates of 0 they are still there at the end."""
    still = [f"--config.train.{name}=0.0" for name in ("lr_g", "lr_d", "lr_min")]
    for name, flags in (
        ("a", ["--config.train.ema_decay=0.9"]),
        ("b", [f"--config.train.init_from={tmp_path}/a", *still]),
    ):
        result = succeed(POINTS, f"--workdir={tmp_path}/{name}", *flags)
    assert f"the networks are those of {tmp_path}/a/checkpoints/8" in result.stdout
    a, b = (checkpoint.read(checkpoint.find(str(tmp_path / name)))[0] for name in ("a", "b"))
    for key in a:
        network, _, path = key.partition("/")
        if network.endswith("_params"):
            theirs = f"ema_params/{path}" if network == "gen_params" else key
            np.testing.assert_array_equal(b[key], a[theirs], key)
    assert any(np.any(a[key] != a[key.replace("ema", "gen")]) for key in a if key.startswith("ema_params"))
    deeper = POINTS, f"--config.train.init_from={tmp_path}/a", "--config.generator.depth=9"
    assert "of --config.train.init_from is of another architecture" in refused(*deeper, f"--workdir={tmp_path}/c")


def test_networks_of_another_function_are_refused(points_run, tmp_path):
    """Fields of the networks that leave the shapes of their parameters as they are."""
    for config, message in (
        (points(train__init_from=str(points_run), model__data_std=9.0), "trained with generator.levels=.*, and this"),
        (
            preset_with("digits", train__init_from="digits", generator__skip_rescale=False),
            r"skip_rescale=True, and .* False: set --config.generator.skip_rescale=True",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train(config, str(tmp_path / "run"))
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "name, content", [("config.json", "{}"), ("config.json", "x"), ("metrics.jsonl", '{"step": 1}')]
)
def test_files_of_another_program_stay(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"has a {name} that is not of a run: name another --workdir"):
        train(points(), str(tmp_path))
    assert (tmp_path / name).read_text() == content
    train(points(), str(tmp_path), restart=True)
    assert (tmp_path / "before-1" / name).read_text() == content


def test_it_says_what_it_does(tmp_path, capsys, monkeypatch):
    """What comes and where the pictures are, what it waits for, what to try next; curves with every grid of samples."""
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda metrics, path: drawn.append(len(log.read_metrics(metrics))))
    train(points(), str(tmp_path))
    assert drawn == [2, 4]  # records: at step 4, and at the end
    lines = capsys.readouterr().out.splitlines()
    expected = [
        f"8 steps to train; images every 4 steps: {tmp_path}/samples and {tmp_path}/curves.png",
        "compiling the training step: ",
        "the step is ready after ",
        "step 1 done, ",
        "finished 8 steps in ",
        "next: ",
    ]
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in expected]
    assert places == sorted(places)
    commands = json.loads((tmp_path / "results.json").read_text())["next"]
    assert [line.split(": ")[-1].strip() for line in lines[places[-1] :]] == commands
    modes = ("sample", "evaluate", "demo")
    assert [command.partition(" --")[2] for command in commands] == [f"mode={m} --workdir={tmp_path}" for m in modes]


def test_large_networks_are_noted(capsys, monkeypatch):
    """On a CPU, that they take days; elsewhere, that bfloat16 is faster, unless it is set."""
    fields = dict(train__num_steps=1, train__batch_size=4, train__steps_per_epoch=1)
    data, gpu = Data(np.zeros((4, 32, 32, 3), np.uint8)), types.SimpleNamespace(platform="gpu", device_kind="H100")
    for name, noted in (("image_folder", True), ("image_folder:small", False)):
        method = build(preset_with(name, data__image_size=32, data__channels=3, **fields))
        shapes = jax.eval_shape(lambda method=method: init_state(method, 0))
        progress.overview(method, shapes, 4, data, "float32")
        assert ("train for days on a CPU; configs/image_folder.py:small" in capsys.readouterr().out) == noted
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: [gpu])
            for dtype in ("float32", "bfloat16"):
                progress.overview(method, shapes, 4, data, dtype)
                expected = noted and dtype == "float32"
                output = capsys.readouterr().out
                assert ("note: --config.model.dtype=bfloat16 is 1.9 times as fast" in output) == expected
            old = types.SimpleNamespace(platform="gpu", device_kind="T4", compute_capability="7.5")
            patch.setattr(jax, "devices", lambda old=old: [old])
            progress.overview(method, shapes, 4, data, "float32")
            assert "bfloat16" not in capsys.readouterr().out


WITH_WANDB = """
import sys
import numpy as np
from ddgan_jax.config.settings import LogConfig
from ddgan_jax.storage import log, paths
for step in (0, 2):
    run = log.Log(paths.path(sys.argv[1]), {"seed": 0}, LogConfig(tensorboard=False, wandb="probe"), step)
    run.scalars(step + 2, {"d_loss": 1.0})
    run.image(step + 2, "samples", np.zeros((4, 4, 3), np.uint8))
    run.close()
"""


def test_weights_and_biases(tmp_path):
    """Offline: a run that was resumed is the same one there, with its pictures; without wandb it is one sentence."""
    out = run_python(WITH_WANDB, tmp_path, env={"WANDB_MODE": "offline"})
    synced = re.findall("W&B was offline: `wandb sync (.*)` uploads the run", out)
    assert len(synced) == 2 and all(list(pathlib.Path(folder).glob("run-*.wandb")) for folder in synced), out
    name = (tmp_path / "wandb_id.txt").read_text()
    found = list((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert found and all(b"d_loss" in file.read_bytes() for file in found)
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))) == 2
    assert [record["step"] for record in log.read_metrics(tmp_path / "metrics.jsonl")] == [2, 4]
    child = python(f"import sys\nsys.modules['wandb'] = None\n{WITH_WANDB}", tmp_path)
    assert "UserError: log.wandb=probe needs wandb: run `pip install wandb`" in child.communicate(timeout=120)[1]


@pytest.mark.parametrize("count, at_most, steps", [(7, None, range(1, 8)), (7, 3, [1, 4, 7]), (6, 3, [2, 4, 6])])
def test_some_of_the_records(tmp_path, count, at_most, steps):
    """Evenly chosen, with the last; none that has an evaluation is left out."""
    lines = [json.dumps({"step": step, "d_loss": 1.0}) for step in range(1, count + 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [record["step"] for record in log.read_metrics(tmp_path / "metrics.jsonl", at_most)] == list(steps)
    lines[2] = json.dumps({"step": 3, "eval/fid": 5.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [r["step"] for r in log.read_metrics(tmp_path / "metrics.jsonl", at_most)] == sorted({*steps, 3})


@pytest.mark.parametrize("written", ["null", "NaN"])
def test_a_record_that_is_not_finite(tmp_path, written):
    """It is valid JSON; it is drawn, resumed from and no best one; a log with NaN, as written before, is no other."""
    settings = LogConfig(tensorboard=False)
    records = log.Log(tmp_path, {}, settings, 0)
    records.scalars(1, {"d_loss": 0.5, "eval/kl": np.nan})
    records.scalars(2, {"d_loss": 0.4, "eval/kl": -np.inf, "eval/fid": np.float32(np.inf), "seconds": 3.0})
    records.close()
    file = tmp_path / "metrics.jsonl"
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert lines[0] == {"step": 1, "d_loss": 0.5, "eval/kl": None} and lines[1]["eval/fid"] is None
    file.write_text(file.read_text().replace("null", written))
    assert log.read_metrics(file) == lines
    figures.curves(file, tmp_path / "curves.png")
    again = log.Log(tmp_path, {}, settings, 2)
    assert again.last == {"step": 2, "d_loss": 0.4, "seconds": 3.0} and again.checksum == records.checksum
    again.close()
    assert "NaN" not in file.read_text()


WITH_TENSORBOARD = """
import gc, random, sys
from ddgan_jax.config.settings import LogConfig
from ddgan_jax.storage import log, paths
run, blocks = log.Log(paths.path(sys.argv[1]), {}, LogConfig(tensorboard=True), 0), []
for step in range(1, 1001):
    run.scalars(step, {f"loss_{i}": random.random() for i in range(20)})
    if step % 500 == 0:
        run.flush()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
run.close()
print(blocks[1] - blocks[0])
"""


def test_tensorflow_is_not_imported_before_the_first_record(tmp_path):
    """Its import takes as long as all else before the first step, if programs are cached."""
    pytest.importorskip("clu")
    script = (
        "import pathlib, sys\n"
        "from ddgan_jax.config.settings import LogConfig\n"
        "from ddgan_jax.storage.log import Log\n"
        "log = Log(pathlib.Path(sys.argv[1]), {}, LogConfig(), 0)\n"
        "assert not {'clu', 'tensorflow', 'tensorboard'} & set(sys.modules)\n"
        "log.scalars(2, {'d_loss': 1.0})\n"
        "log.close()"
    )
    _, errors = python(script, tmp_path).communicate(timeout=300)
    assert not errors, errors
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_broken_tensorflow_ends_no_training(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise ImportError("libtensorflow is of another version")

    pytest.importorskip("clu")
    monkeypatch.setattr("ddgan_jax.storage.log.TensorBoard", broken)
    of_run = log.Log(tmp_path, {}, LogConfig(), 0)
    for step in (2, 4):
        of_run.scalars(step, {"d_loss": 1.0})
    of_run.close()
    assert capsys.readouterr().out.count("no events for TensorBoard are written: libtensorflow") == 1
    assert len(log.read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.slow
def test_tensorboard_keeps_no_numbers_in_memory(tmp_path):
    """Of 10,000, each of which would be a block of memory or more."""
    pytest.importorskip("clu")
    assert int(run_python(WITH_TENSORBOARD, tmp_path).split()[-1]) < 2_000


@pytest.mark.slow
def test_the_seconds_of_a_run_are_those_of_all_its_parts(tmp_path):
    """A run that goes on counts on; one that had finished keeps its results."""
    ends = []
    for steps in (4, 8, 8):
        started = time.time()
        succeed(POINTS, f"--workdir={tmp_path}", f"--config.train.num_steps={steps}")
        ends.append((json.loads((tmp_path / "results.json").read_text()), time.time() - started))
    (first, _), (second, part), third = ends
    assert (first["step"], second["step"], second["resumed_from"]) == (4, 8, 4)
    assert first["seconds"] < second["seconds"] < first["seconds"] + part
    assert third[0] == second
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[-1] < second["seconds"]


def test_a_loss_that_is_not_finite_is_named():
    window = [
        {"d_loss": np.float32(1), "g_loss": np.float32(2)},
        {"d_loss": np.float32(1), "g_loss": np.float32("nan")},
    ]
    with pytest.raises(Fault, match="g_loss is not finite at step 11: the checkpoint of step 8 is valid"):
        progress.check_finite(10, window, lambda: 8)
    progress.check_finite(10, window[:1], lambda: 8)


def test_summary_of_losses_by_t():
    """Means over the examples of each t, whatever the window; a t that did not occur is left out."""
    window = [
        {"d_loss_by_t": np.array([1.0, 0.0, 0]), "d_count_by_t": np.array([0.5, 0.5, 0])},
        {"d_loss_by_t": np.array([0.0, 3.0, 0]), "d_count_by_t": np.array([0.0, 1.0, 0])},
    ]
    window = [w | {"g_loss_by_t": w["d_loss_by_t"], "g_count_by_t": w["d_count_by_t"], "d_loss": 2.0} for w in window]
    assert progress.summarise(window) == {
        "d_loss": 2.0,
        "d_loss_t0": 2.0,
        "d_loss_t1": 2.0,
        "g_loss_t0": 2.0,
        "g_loss_t1": 2.0,
    }


# --- Slow: each start compiles for a minute or so, once; then a cache serves ------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    """A run of 24 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    succeed(SMOKE, f"--workdir={workdir}", "--config.train.num_steps=24", cache)
    return workdir


@pytest.mark.slow
def test_a_run_leaves_what_it_should(unbroken):
    for name in ("config.json", "metrics.jsonl", "results.json", "curves.png", "samples/final.png", "checkpoints/24"):
        assert (unbroken / name).exists(), name
    records = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(2, 25, 2))
    expected = "d_loss g_loss d_real d_fake r1 d_grad_norm g_grad_norm d_param_norm g_param_norm images_per_second"
    assert set(expected.split()) <= set(records[-1]) | set(records[-2])
    assert list((unbroken / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name
)
def test_interrupted_and_resumed_is_bit_identical(number, unbroken, cache, tmp_path):
    arguments = SMOKE, f"--workdir={tmp_path}", "--config.train.num_steps=24", cache
    argv, options = command(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(argv, **options) as process:
        for line in process.stdout:
            match = re.match(r"step (\d+)/", line)
            if match and int(match[1]) >= 8:  # steps 9 to 11 lie between the checkpoints of 8 and 12
                process.send_signal(number)
                break
        output = process.stdout.read()
        code = process.wait()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 75 and f"{number.name}: saved step" in output and "finished" not in output, output
    assert not (tmp_path / "results.json").exists()
    assert "resuming from step" in succeed(*arguments).stdout
    assert_same(tmp_path, unbroken)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 24


def test_signals(tmp_path):
    """The first is noted, or ends what can be ended at once; the second counts a second later."""
    with Interrupt() as interrupt:
        with interrupt.held():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)  # at once: the same signal, from a launcher that sends it twice
            assert interrupt.signal == "SIGUSR1"
    with Interrupt() as interrupt, pytest.raises(Interrupted, match="SIGINT: nothing was lost"):
        os.kill(os.getpid(), signal.SIGINT)
    with Interrupt() as interrupt:

        class Swallows:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)

        Swallows()
        with pytest.raises(Interrupted, match="SIGTERM: nothing was lost"), interrupt.held():
            raise AssertionError("it goes on")
    script = """
import os, signal, time
from ddgan_jax.commands.signals import Interrupt
with Interrupt() as interrupt, interrupt.held():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    with python(script) as process:
        assert process.wait(timeout=60) == -signal.SIGTERM


SLOW_INITIALIZATION = """
import time
from etils import epy
from ddgan_jax.devices import compiler
in_background, futures = compiler.in_background, []
def slow(function):
    futures.append(in_background(lambda: (time.sleep(8), function())[1]))
    return futures[-1]
compiler.in_background = slow
lazy_imports = epy.lazy_imports
def checked(**options):
    assert all(future.done() for future in futures), "a thread's imports would fail"
    return lazy_imports(**options)
epy.lazy_imports = checked
"""


@pytest.mark.slow
def test_nothing_makes_imports_lazy_while_a_thread_traces(tmp_path):
    """etils.epy.lazy_imports, which grain uses, replaces `import` in all threads; JAX imports while it traces."""
    (output,) = all_succeed(
        start_group(1, POINTS, f"--workdir={tmp_path}", "--config.train.num_steps=1", script=SLOW_INITIALIZATION)
    )
    assert "final.png" in output


def test_a_signal_before_the_first_step_ends_at_once(tmp_path):
    argv, options = command(POINTS, f"--workdir={tmp_path}", "--interrupted_exit_code=42", stdout=subprocess.PIPE)
    with subprocess.Popen(argv, **options) as process:
        for line in process.stdout:
            if "examples of 2" in line:  # then it compiles for seconds
                break
        start = time.time()
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait() == 42 and "SIGTERM: nothing was lost" in output and time.time() - start < 2, output


@pytest.mark.slow
def test_a_nan_stops_the_run(cache, tmp_path):
    """An absurd learning rate blows the networks up: the run names step and quantity, and saves nothing of it."""
    result = run(SMOKE, f"--workdir={tmp_path}", "--config.train.lr_g=1e38", "--config.train.lr_d=1e38")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(r"stopped: \w+ is not finite at step \d+: there is no checkpoint yet", result.stderr), (
        result.stderr
    )
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_samples_do_not_depend_on_batch_or_devices(unbroken, tmp_path):
    images = {}
    for batch, devices in ((7, 1), (32, 1), (100, 1), (25, 4)):
        out = tmp_path / f"{batch}_{devices}.npz"
        script = f"""
import numpy as np
from ddgan_jax.model.loading import load
from ddgan_jax.model.sampler import Sampler
model = load({str(unbroken)!r})
np.savez({str(out)!r}, images=Sampler(model.denoiser, {batch})(model.params, 0, 100))
"""
        env = os.environ | with_devices(devices) | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, check=True, timeout=600)
        images[batch] = np.load(out)["images"]
        assert images[batch].shape == (100, 8, 8, 1) and images[batch].dtype == np.uint8
    for other in images.values():  # rounding to uint8 can turn a difference of 1e-7 into one
        assert np.abs(other.astype(int) - images[7]).max() <= 1


# The learning rates of the paper: a step of Adam in an element whose gradient is near zero is a step of its rounding,
# and in steps of 1e-3, as the digits take, one such element came to differ by 1.02e-5.
CIFAR10 = "--config=configs/cifar10.py:smoke"
LAYOUTS = {"1 device": (1, 1), "4 devices": (1, 4), "2 processes of 2": (2, 2)}  # (processes, devices of each)


def start_layout(layout, workdir, *arguments):
    """Start the command in every process of a layout, joined over the loopback."""
    count, devices = LAYOUTS[layout]
    return start_group(count, CIFAR10, f"--workdir={workdir}", *arguments, devices=devices)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, cache):
    """A whole run of eight steps, with a checkpoint at four, for every layout."""
    workdirs = {layout: tmp_path_factory.mktemp("layout") for layout in LAYOUTS}
    for layout, workdir in workdirs.items():
        outputs = all_succeed(start_layout(layout, workdir, cache))
        count, devices = LAYOUTS[layout]
        assert f"{count} processes x {devices} devices x {16 // count // devices}" in outputs[0]
        assert not any("finished" in output or "step 1" in output for output in outputs[1:])  # only process 0 speaks
    return workdirs


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_devices_and_processes_agree(layouts, layout):
    assert_close(layouts[layout], layouts["1 device"])


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_a_checkpoint_resumes_on_any_layout(layouts, source, target, cache, tmp_path):
    if source == target:
        pytest.skip("the same layout: tested above, bit for bit")
    shutil.copytree(layouts[source] / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    assert "resuming from step 4" in all_succeed(start_layout(target, tmp_path, cache))[0]
    assert_close(tmp_path, layouts["1 device"])


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(layouts, tmp_path):
    """Only process 0 reads the checkpoint, which is of another architecture: the other must not wait for ever."""
    shutil.copytree(layouts["1 device"] / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    start = time.time()
    started = start_layout("2 processes of 2", tmp_path, "--config.generator.nf=16")
    (code, output), (other_code, _) = ends(started)
    assert code == 2 and "error: the checkpoint of step 4" in output and "Traceback" not in output, output
    assert other_code != 0 and time.time() - start < 120


# --- What a workdir holds is never lost -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    """A finished run on points; a test takes a copy."""
    workdir = tmp_path_factory.mktemp("points")
    train(points(), str(workdir))
    return workdir


@pytest.fixture
def workdir(points_run, tmp_path):
    """A copy of that run."""
    return shutil.copytree(points_run, tmp_path / "copy")


def test_another_configuration_leaves_a_workdir_as_it_was(points_run, workdir):
    wider = points(generator__width=32)
    for config, reason in (
        (presets.get("digits:smoke"), "holds a run with data.name=gaussians"),
        (wider, "holds a run with generator.width=128"),
    ):
        with pytest.raises(UserError, match=rf"{reason}.*name another --workdir, or move that run aside"):
            train(config, workdir)
        assert contents(workdir) == contents(points_run)
    assert int(train(wider, workdir, restart=True).step) == 8
    assert contents(workdir / "before-1") == contents(points_run) and (workdir / "checkpoints" / "8").exists()


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(points_run, tmp_path):
    for name in ("metrics.jsonl", "results.json", "first_checkpoint.json"):
        workdir = tmp_path / name
        workdir.mkdir()
        shutil.copy(points_run / name, workdir)
        if name == "metrics.jsonl":  # of a run that was killed after its second save had begun
            (workdir / name).write_text('{"step": 9}\n')
        with pytest.raises(UserError, match=r"are gone, though .* put them back into .* with --restart"):
            train(points(), str(workdir))
        assert (workdir / name).exists() and not (workdir / "config.json").exists()


def test_what_was_chosen_at_the_start_belongs_to_the_run(points_run):
    """On another number of devices, or for more images, other values would be chosen."""
    before = as_dict(points(train__batch_size=24, log__samples_every=0))
    unset = dict(train__batch_size=None, train__num_steps=None, log__samples_every=None)
    c = read(points(train__lr_g=0.5, **unset))
    begun = setup.as_begun(c, before, "runs/x")
    assert (begun.train.batch_size, begun.train.num_steps, begun.log.samples_every) == (24, 8, 0)
    assert begun.train.lr_g == 0.5 and setup.as_begun(c, None, "runs/x") == c
    assert setup.as_begun(read(points(train__batch_size=32)), before, "runs/x").train.batch_size == 32
    assert checkpoint.config_of(points_run) == as_dict(points())
    assert checkpoint.config_of(points_run / "nothing") is None


def test_an_evaluation_that_fails_ends_nothing(points_run, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise MemoryError("no memory for 5,000 samples")

    monkeypatch.setattr(train_module, "measure", fail)
    train(points(**EVALUATED), str(tmp_path))
    said = capsys.readouterr().out
    assert "the evaluation at step 4 failed, and training continues: no memory for 5,000 samples" in said
    assert checkpoint.finished(tmp_path / "checkpoints") == [4, 8]
    ours, theirs = (log.read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, points_run))
    for record in (*ours, *theirs):
        del record["seconds"], record["images_per_second"]
    assert ours == theirs


@pytest.mark.slow
def test_the_checkpoint_is_saved_before_the_evaluation(tmp_path, monkeypatch):
    """A process that dies in the evaluation has saved its step, which it evaluates when it is started again."""

    class Killed(Exception):
        pass

    def die(run, interrupt):
        run.files.checkpoints.wait()
        raise Killed

    config = points(**EVALUATED)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate_samples", die)
        with pytest.raises(Killed):
            train(config, str(tmp_path / "killed"))
    assert checkpoint.finished(tmp_path / "killed" / "checkpoints") == [4]
    assert log.read_metrics(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] == 2
    for name in ("killed", "whole"):
        train(config, str(tmp_path / name))
    assert_same(tmp_path / "killed", tmp_path / "whole")
    ours, theirs = (log.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole"))
    assert [record["step"] for record in ours] == [2, 4, 6, 8]
    assert [record.get("eval/modes") for record in ours] == [record.get("eval/modes") for record in theirs]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """Also where a signal asks for the save, on a step without a record."""
    monkeypatch.setattr(train_module, "norms", lambda state: {"g_param_norm": np.float32("nan")})
    with pytest.raises(Fault, match=r"g_param_norm is not finite at step 3: there is no checkpoint yet; lower"):
        train(points(log__every=4), str(tmp_path))
    assert not checkpoint.finished(tmp_path / "checkpoints")


def test_other_noise_from_a_checkpoint(points_run, workdir):
    """`noise_seed` changes the steps, and neither the networks at the start nor the order of the data."""
    config = points(train__noise_seed=1)
    assert noise_seed(read(points())) == 0 != noise_seed(read(config))
    shutil.rmtree(workdir / "checkpoints" / "8")
    train(config, workdir)
    ours, theirs = final(workdir), final(points_run)
    assert ours["step"] == theirs["step"] and any(np.any(ours[name] != theirs[name]) for name in ours)


def test_every_configuration_has_its_own_workdir(tmp_path):
    """In a folder without runs, since the README's first command leaves one where the tests run."""
    for flags_, name in (([], "mnist"), ([POINTS], "gaussians-smoke"), (["--config=stacked_mnist"], "stacked_mnist")):
        argv = [sys.executable, str(ROOT / "main.py"), *flags_, "--mode=sample"]
        result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert result.returncode == 2 and f"there is no checkpoint in runs/{name}:" in result.stderr, result.stderr


def test_one_training_in_a_workdir_at_a_time(tmp_path):
    with contextlib.ExitStack() as lock:
        lock_workdir(paths.path(tmp_path), lock)
        with pytest.raises(UserError, match="another process trains in --workdir"):
            train(points(), str(tmp_path))
    assert not list(tmp_path.iterdir())
    with contextlib.ExitStack() as lock:
        lock_workdir(paths.path(tmp_path), lock)


@pytest.mark.parametrize(
    "name, message",
    [
        ("runs [v2]/run", "below which no checkpoint can be written"),
        ("a\\b/run", "below which no checkpoint can be written"),
        ("x.pth", "has the name of a file of weights"),
        ("bad\udcff", "is not valid UTF-8"),
        ("", r"--workdir=.* is also data.path, the folder of the images: name another --workdir"),
    ],
)
def test_names_that_cannot_be_a_workdir(tmp_path, name, message):
    config = (
        points() if name else preset_with("image_folder:smoke", data__name="image_folder", data__path=str(tmp_path))
    )
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_other_data_or_noise_in_a_workdir(workdir):
    """The names of the data are equal; and networks know the diffusion that they were trained with."""
    own = Data(np.float32(open_data(read(points()).data).images * 1.5))
    for num_steps in (12, 16):
        train(points(train__num_steps=num_steps), workdir, own)  # an array is given on purpose: a note
    before = contents(workdir)
    for fields, message in (
        ({}, r"holds a run on other data \(\d+ of 64 examples that are compared differ\)"),
        # which the shapes of the parameters would reveal, too
        ({"generator__depth": 5}, r"with generator.depth=\d, and this configuration has 5"),
        ({"diffusion__num_steps": 8}, r"with diffusion.num_steps=4, and this configuration has 8"),
    ):
        with pytest.raises(UserError, match=message):  # a command that is refused deletes nothing
            train(points(train__num_steps=20, checkpoint__keep=1, **fields), workdir)
    assert contents(workdir) == before


def test_images_that_are_turned_or_recoloured_are_other_data():
    """Their means are the same, and older sketches hold nothing else. Another decoder changes quarters a little."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(20, 236, (100, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    images = np.uint8(coarse + rng.integers(-9, 10, coarse.shape))
    before = sketch_of(Data(images))
    others = [images[:, ::-1], images[:, :, ::-1], images.swapaxes(1, 2), images[..., ::-1], np.roll(images, 8, (1, 2))]
    for other in others:
        assert "of 64 examples that are compared differ" in difference(
            before, sketch_of(Data(np.ascontiguousarray(other)))
        )
    again = np.uint8(images.astype(int) + rng.integers(-2, 3, images.shape))
    assert difference(before, sketch_of(Data(again))) == ""
    older = {name: value for name, value in before.items() if name != "quarters"}
    assert difference(older, sketch_of(Data(images[:, ::-1].copy()))) == ""
    points = rng.standard_normal((100, 2)).astype(np.float32)
    assert difference(sketch_of(Data(points)), sketch_of(Data(points))) == ""
    assert difference(sketch_of(Data(points)), sketch_of(Data(points[:, ::-1].copy()))) != ""


def test_other_labels_in_a_workdir(tmp_path, capsys):
    """With other labels of the same images, networks would learn swapped classes. Older sketches hold no labels."""
    data = Data(np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 0, 0, 1, 1, 1]))
    before = sketch_of(data, data.labels())
    for now, refused in ((sketch_of(data, 1 - data.labels()), True), (before, False)):
        with (
            pytest.raises(UserError, match=r"other data \(the labels differ\)") if refused else contextlib.nullcontext()
        ):
            checks.check_data(before, now, tmp_path, refuse=True)
        checks.check_data(before, now, tmp_path, refuse=False)
        assert ("the labels differ" in capsys.readouterr().out) == refused
    checks.check_data({k: v for k, v in before.items() if k != "labels"}, before, tmp_path, refuse=True)
    assert "labels" not in sketch_of(data, None)
    renamed = sketch_of(Data(data.images, data.labels(), ("b", "c")), data.labels())
    for refuse in (True, False):
        with pytest.raises(UserError, match=r"holds a run on the classes 0, 1, and those of the data are b, c"):
            checks.check_data(before, renamed, tmp_path, refuse)
    checks.check_data({k: v for k, v in before.items() if k != "classes"}, renamed, tmp_path, refuse=True)


def test_the_workdir_of_another_run_is_refused_before_a_download(workdir):
    config = presets.get("stacked_mnist:small")
    config.data.dir = "/proc/none"
    with pytest.raises(UserError, match=r"data\.name=gaussians, and this configuration has stacked_mnist"):
        train(config, workdir)


def test_a_refused_restart_moves_nothing(points_run, workdir, monkeypatch):
    """Such as by networks that are not there, or by a dashboard that does not accept the run."""
    with pytest.raises(UserError, match="no checkpoint in"):
        train(points(train__init_from=str(workdir / "nothing")), workdir, restart=True)

    def refuse(*_):
        raise UserError("no key")

    monkeypatch.setattr(setup, "Log", refuse)
    with pytest.raises(UserError, match="no key"):
        train(points(), workdir, restart=True)
    assert contents(workdir) == contents(points_run) and not (workdir / "before-1").exists()


def test_the_workdir_may_be_a_path(workdir, capsys):
    train(points(), workdir)
    assert f"--workdir={workdir}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data is a ndarray: wrap the array, Data\(images\)"):
        train(points(), workdir, np.zeros((4, 2), np.float32))


def test_a_resumed_run_keeps_what_it_was_started_to_keep(tmp_path, capsys):
    """A command that leaves keep and keep_period out deletes nothing that an earlier one asked to keep."""
    fields = dict(eval__every=0, checkpoint__every=2, checkpoint__keep=1)
    train(points(train__num_steps=16, checkpoint__keep_period=4, **fields), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "8", "12", "16"}
    assert (tmp_path / "results.json").exists()
    train(points(train__num_steps=18, checkpoint__keep_period=0, **fields), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "8", "12", "16", "18"}
    assert "note: checkpoint.keep_period is 4, which keeps what " in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["checkpoint"]["keep_period"] == 4
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 18


def test_another_period_keeps_what_the_first_one_kept():
    """Also where it is the default of a preset, which a command leaves out."""
    config = presets.get("cifar10:smoke")
    config.checkpoint.keep_period = 20_000
    before = as_dict(read(config))
    for period, kept in ((50_000, 10_000), (40_000, 20_000), (10_000, 10_000), (0, 20_000)):
        config.checkpoint.keep_period = period
        assert setup.as_begun(read(config), before, "runs/x").checkpoint.keep_period == kept


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 1_000])
def test_ctrl_c_in_a_pipe_saves_the_step(tmp_path, every):
    """The terminal sends it to all processes of a pipe, so that `| tee log` is gone when the step is saved."""
    fields = "--config.train.num_steps=100000", f"--config.log.every={every}", "--config.eval.every=0"
    arguments, options = command(POINTS, *fields, f"--workdir={tmp_path}")
    with subprocess.Popen(arguments, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while "done" not in child.stdout.readline():
            pass
        child.stdout.close()
        child.send_signal(signal.SIGINT)
        child.wait(timeout=120)
        errors = child.stderr.read()
    assert child.returncode == 75 and "Traceback" not in errors and list((tmp_path / "checkpoints").iterdir()), errors


def test_a_signal_in_the_last_step_leaves_the_evaluation_for_later(workdir, monkeypatch):
    config = points(eval__at_end=True, eval__num_samples=50)
    monkeypatch.setattr(train_module.processes, "exchange", lambda mine: ["SIGTERM"])
    with pytest.raises(Interrupted, match=r"SIGTERM: saved step 8 in .*; run the same command to evaluate it"):
        train(config, workdir)
    assert not (workdir / "evaluation").exists()
    monkeypatch.undo()
    train(config, workdir)
    assert (workdir / "evaluation" / "8" / "results.json").exists()


def test_an_ignored_signal_stays_ignored():
    """A shell ignores SIGINT for a command that a script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.signal and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_results_of_an_earlier_end_are_removed_when_the_run_goes_on(workdir, monkeypatch):
    assert (workdir / "results.json").exists()
    monkeypatch.setattr(train_module, "loop", lambda run, interrupt: train_module.STOPPED)
    monkeypatch.setattr(train_module.processes, "exchange", lambda mine: ["SIGTERM"])
    with pytest.raises(Interrupted):
        train(points(train__num_steps=10**6), workdir)
    assert not (workdir / "results.json").exists()


def test_a_kill_at_the_last_step_leaves_no_old_checkpoint(tmp_path):
    """Orbax deletes an old checkpoint after a new one is complete, and the process may be killed between the two."""
    config = points(eval__every=0, checkpoint__every=2, checkpoint__keep=1)
    checkpoints, copied = tmp_path / "run" / "checkpoints", tmp_path / "2"
    for config.train.num_steps in (2, 4):
        train(config, tmp_path / "run")
        if not copied.exists():
            shutil.copytree(checkpoints / "2", copied)
    shutil.copytree(copied, checkpoints / "2")
    train(config, tmp_path / "run")
    assert checkpoint.finished(checkpoints) == [2, 4]  # a finished run stays as it is
    (tmp_path / "run" / "results.json").unlink()
    train(config, tmp_path / "run")
    assert checkpoint.finished(checkpoints) == [4]


@pytest.mark.parametrize(
    "name, field, value",
    [
        *(
            ("digits", f"generator.{name}", not getattr(Generator, name))
            for name in ("skip_rescale", "tanh", "centered")
        ),
        ("gaussians", "objective", "one_shot"),
    ],
)
def test_other_functions_of_parameters_of_the_same_shapes_in_a_workdir(name, field, value):
    """The schedule of sampling depends on the objective. Dropout and the seed may change."""
    before, other = as_dict(preset_with(name)), {"seed": 3} if name == "gaussians" else {"generator__dropout": 0.1}
    assert setup.as_begun(read(preset_with(name, **other)), before, "runs/x") == read(preset_with(name, **other))
    with pytest.raises(UserError, match=rf"runs/x holds a run with {field}=.*, and this configuration has {value}"):
        setup.as_begun(read(preset_with(name, **{field.replace(".", "__"): value})), before, "runs/x")


def test_a_command_that_trains_nothing_writes_no_configuration(points_run, workdir):
    train(points(seed=7, checkpoint__keep=1), workdir)
    assert (workdir / "config.json").read_bytes() == (points_run / "config.json").read_bytes()
    assert checkpoint.finished(workdir / "checkpoints") == checkpoint.finished(points_run / "checkpoints")


def test_a_signal_in_a_restore_waits_for_its_end(points_run, workdir, monkeypatch):
    """In the middle of it, an exception would be taken for damage."""
    original = checkpoint._restore

    def slow(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "_restore", slow)
    with pytest.raises(Interrupted, match="SIGTERM: nothing was lost"):
        train(points(), workdir)
    assert contents(workdir) == contents(points_run)
    with pytest.raises(Interrupted):  # no Exception, which code that reads takes for a fault of its own
        with contextlib.suppress(Exception), Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_the_best_of_a_run_that_has_gone_back(tmp_path):
    def values_and_best():
        records = log.read_metrics(tmp_path / "metrics.jsonl")
        values = {r["step"]: r["eval/total_variation"] for r in records if "eval/total_variation" in r}
        return values, json.loads((tmp_path / "best.json").read_text())

    train(points(**EVALUATED), str(tmp_path))
    values, best = values_and_best()
    assert values.keys() == {4, 8} and best["step"] == 8 and values[8] < values[4]
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    train(points(train__lr_g=1e-7, **EVALUATED), str(tmp_path))
    values, best = values_and_best()
    assert best["value"] == min(values.values()) == values[best["step"]]
