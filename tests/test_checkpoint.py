"""Checkpoints: nothing is lost, nothing broken is believed, and sampling needs neither data nor TensorFlow."""

import asyncio
import errno
import gc
import json
import os
import pathlib
import shutil
import tarfile
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from commands import contents, python, run_python

import ddgan_jax
from ddgan_jax.commands.train import train
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method import state
from ddgan_jax.storage import buckets, checkpoint, manager, paths
from ddgan_jax.storage import workdir as workdir_files

CONFIG = {"seed": 3, "generator": {"ch_mult": [1, 2]}}


def tiny_state(step=0):
    params = {"layer": {"kernel": np.full((3, 2), step, np.float32), "bias": np.arange(2, dtype=np.float32) - step}}
    made = jax.jit(lambda g, d: state.create(g, d, optax.scale_by_adam(0.5, 0.9)))(params, {"disc": np.float32(step)})
    return made.replace(step=jnp.int32(step), ema_params=jax.tree.map(lambda x: x + 10, params))


def save(folder, values, keep):
    """Saves a checkpoint for each step of {step: a measure, or None}; returns the steps that were the best so far."""
    checkpoints, best = manager.Checkpoints(str(folder), keep=keep), []
    for step, value in values.items():
        checkpoints.save(step, tiny_state(step), CONFIG)
        if value is not None and checkpoints.update_best(step, "fid", value):
            best.append(step)
    checkpoints.close()
    return best


@pytest.fixture
def workdir(tmp_path):
    """Three checkpoints: steps 1, 2 and 3."""
    save(tmp_path, dict.fromkeys((1, 2, 3)), keep=3)
    return tmp_path


@pytest.fixture
def no_retries(monkeypatch):
    """Reads that fail are tried once."""
    monkeypatch.setenv("DDGAN_RETRY_SECONDS", "0")


def restore(workdir):
    checkpoints = manager.Checkpoints(str(workdir))
    said, before = [], checkpoint.finished(workdir / "checkpoints")
    restored = checkpoints.restore_latest(jax.eval_shape(tiny_state))[0]
    assert checkpoint.finished(workdir / "checkpoints") == before
    checkpoints.set_damaged_aside(said.append)
    return restored, said


def test_round_trip(workdir):
    restored, said = restore(workdir)
    assert not said and jax.tree.structure(restored) == jax.tree.structure(tiny_state(3))
    jax.tree.map(np.testing.assert_array_equal, restored, tiny_state(3))
    ema, metadata, step = checkpoint.restore_ema(str(workdir))
    jax.tree.map(np.testing.assert_array_equal, ema, tiny_state(3).ema_params)
    assert metadata["config"] == CONFIG and step == 3
    for path in (workdir / "checkpoints", workdir / "checkpoints" / "2"):
        assert checkpoint.restore_ema(str(path))[2] == (2 if path.name == "2" else 3)


def test_keeps_the_last_and_every_mth(tmp_path):
    checkpoints = manager.Checkpoints(str(tmp_path), keep=2, keep_period=4)
    for step in range(1, 10):
        checkpoints.save(step, tiny_state(step), CONFIG)
        checkpoints.save(step, tiny_state(step), CONFIG)  # again is nothing new
    checkpoints.close()
    assert manager.Checkpoints(str(tmp_path)).steps() == [4, 8, 9]


def test_the_best_stays_and_has_a_name(tmp_path):
    """Smaller is better, NaN is never; another measure starts anew."""
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(f"{tmp_path}/best")
    assert save(tmp_path, {1: np.nan, 2: 3.0, 3: 2.0, 4: 2.0, 5: 7.0, 6: np.nan}, keep=1) == [2, 3]
    again = manager.Checkpoints(str(tmp_path), keep=1)  # as after a resume
    assert again.steps() == [3, 6] and not again.update_best(6, "fid", 2.5)
    assert checkpoint.restore_ema(f"{tmp_path}/best")[2] == 3 and checkpoint.restore_ema(str(tmp_path))[2] == 6
    assert again.update_best(6, "recall", 9.0) and checkpoint.find(f"{tmp_path}/best").name == "6"


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def half_delete(folder):
    shutil.rmtree(folder / "state")


def flip_bits(folder):
    target = largest_file(folder / "ema")
    target.write_bytes(bytes(255 - b for b in target.read_bytes()))


@pytest.mark.parametrize("damage", [truncate, empty, half_delete, flip_bits], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_set_aside(workdir, damage):
    damage(workdir / "checkpoints" / "3")
    restored, said = restore(workdir)
    assert int(restored.step) == 2 and (workdir / "damaged" / "3").exists()
    assert len(said) == 1 and "is damaged" in said[0] and "continues from an earlier checkpoint" in said[0]
    checkpoints = manager.Checkpoints(str(workdir))
    checkpoints.save(3, tiny_state(3), CONFIG)  # the step can be saved again
    checkpoints.close()
    assert int(restore(workdir)[0].step) == 3


def test_reads_that_nobody_asks_for_are_silent(workdir, caplog):
    """Where one array is unreadable, its Fault is the answer; what the reads of the others come to is not logged."""
    restore(workdir)
    loop = asyncio.new_event_loop()
    for reason in ('DATA_LOSS: Error opening "zarr" driver [tensorstore_spec=...]', "of somebody else"):
        loop.create_future().set_exception(ValueError(reason))
    gc.collect()
    loop.close()
    assert len(caplog.records) == 1 and "of somebody else" in caplog.text


def test_where_all_are_damaged_nothing_is_moved(workdir):
    for step in (1, 2, 3):
        empty(workdir / "checkpoints" / str(step))
    before = contents(workdir)
    with pytest.raises(Fault, match=r"no checkpoint in .* is valid, and none was moved: .*/3 is damaged"):
        restore(workdir)
    assert contents(workdir) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), PermissionError(13, "denied"), MemoryError("none")])
def test_a_read_that_fails_is_no_damage(workdir, monkeypatch, no_retries, error):
    """Every read of an array fails: in Orbax with any exception, in the copy that is tried next with the cause."""

    def fail(*arguments, **options):
        raise error

    before = contents(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", fail if isinstance(error, MemoryError) else lambda *a, **k: {}["x"])
        patch.setattr(type(paths.path("x")), "read_bytes", fail)
        with pytest.raises(OSError, match=r"I/O error|denied|cannot be read: MemoryError"):
            restore(workdir)
    assert contents(workdir) == before and int(restore(workdir)[0].step) == 3


def test_a_read_that_fails_once_is_tried_again(workdir, monkeypatch):
    original, failed = ocp.Checkpointer.restore, []

    def fail_once(self, *arguments, **options):
        if not failed:
            failed.append(True)
            raise ValueError("Error reading local file")
        return original(self, *arguments, **options)

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail_once)
    restored, said = restore(workdir)
    assert failed and int(restored.step) == 3 and not said and not (workdir / "damaged").exists()


def test_a_folder_that_cannot_be_listed_has_no_unknown_checkpoints(workdir, monkeypatch, no_retries):
    """pathlib, epath and Orbax take a folder that they cannot look at for a missing one."""

    def fail(path, *arguments, **options):
        raise OSError(errno.EIO, "I/O error", str(path))

    for name in ("stat", "listdir"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="I/O error"):
            patch.setattr(os, name, fail)
            checkpoint.find(str(workdir))
    monkeypatch.setattr(ocp.CheckpointManager, "all_steps", lambda self: [])
    with pytest.raises(OSError, match=r"the checkpoint .*/3 is not seen by Orbax"):
        manager.Checkpoints(str(workdir))
    monkeypatch.setattr(paths, "read", lambda file: fail(file))
    with pytest.raises(OSError, match="I/O error"):
        manager.Checkpoints(str(workdir))


@pytest.mark.parametrize("loss", ["damaged", "missing"])
def test_the_best_is_kept_where_its_mark_cannot_be_read(loss, tmp_path, monkeypatch, no_retries):
    save(tmp_path, {1: 2.0, 2: 3.0}, keep=1)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(paths.path("x")), "read_bytes", lambda path: os.read(-1, 1))
        with pytest.raises(OSError):
            manager.Checkpoints(str(tmp_path), keep=1)
        with pytest.raises(OSError):
            checkpoint.find(f"{tmp_path}/best")
    assert contents(tmp_path) == before
    if loss == "damaged":
        (tmp_path / "best.json").write_text('{"step": 2, "mea')
    else:
        (tmp_path / "best.json").unlink()
    again = manager.Checkpoints(str(tmp_path), keep=1)
    again.restore_latest(jax.eval_shape(tiny_state))
    again.prune()
    assert again.steps() == [1, 2]  # until the records of the run tell which is the best
    records = [{"step": 1, "fid": 2.0}, {"step": 2, "fid": 3.0}, {"step": 9, "fid": 1.0}, {"step": 2}]
    records += [{"step": 2, "fid": 0.5, "yardstick": "of another network"}]  # which does not compare
    again.find_best("fid", "of this network", lambda: records)
    assert checkpoint.find(f"{tmp_path}/best").name == "1"
    again.save(3, tiny_state(3), CONFIG)
    again.close()
    assert again.steps() == [1, 3]


def test_a_best_checkpoint_that_was_deleted_is_found_again_among_the_others(tmp_path):
    values = {1: 2.0, 2: 1.0, 3: 3.0}
    save(tmp_path, values, keep=9)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    records = [{"step": step, "fid": value} for step, value in values.items()]
    for deleted, best in ((None, "1"), ("1", "3")):
        if deleted:
            shutil.rmtree(tmp_path / "checkpoints" / deleted)
        again = manager.Checkpoints(str(tmp_path), keep=9)
        again.find_best("fid", "", lambda: records)
        again.close()
        assert checkpoint.find(f"{tmp_path}/best").name == best


def test_distances_by_another_yardstick_do_not_compare(tmp_path):
    """Such as those of a classifier that was trained anew, on more images."""
    checkpoints = manager.Checkpoints(str(tmp_path), keep=9)
    for step, yardstick, value, best in (
        (1, "", 5.0, 1),
        (2, "a", 7.0, 1),
        (3, "b", 4.0, 3),
        (4, "c", 6.0, 4),
        (5, "c", 6.5, 4),
        (6, "b", 4.5, 3),  # which is still the best by this one
        (7, "c", 5.5, 7),
    ):
        checkpoints.save(step, tiny_state(step), CONFIG)
        checkpoints.update_best(step, "fid", value, yardstick)
        assert checkpoint.find(f"{tmp_path}/best").name == str(best), step
    checkpoints.close()
    b = {"step": 3, "measure": "fid", "value": 4.0, "yardstick": "b"}
    assert checkpoint.best(tmp_path)["earlier"] == [b]
    checkpoints = manager.Checkpoints(str(tmp_path), keep=9)
    checkpoints.save(8, tiny_state(8), CONFIG)
    checkpoints.close()
    again = manager.Checkpoints(str(tmp_path), keep=1)
    again.prune()
    assert again.steps() == [3, 7, 8]  # the best by an earlier yardstick, the best, and the last
    again.forget_best_after(3)
    again.find_best("fid", "c", lambda: [{"step": 8, "fid": 6.5, "yardstick": "c"}])
    again.prune()
    again.close()
    assert again.steps() == [3, 8] and checkpoint.best(tmp_path)["earlier"] == [b]


def test_an_older_best_json_keeps_the_best_by_earlier_yardsticks(tmp_path):
    """It names their steps alone."""
    save(tmp_path, dict.fromkeys((1, 2, 3)), keep=9)
    older = {"step": 2, "measure": "fid", "value": 5.0, "yardstick": "b", "earlier": [1]}
    (tmp_path / "best.json").write_text(json.dumps(checkpoint.sealed(older)))
    again = manager.Checkpoints(str(tmp_path), keep=1)
    assert not again.update_best(3, "fid", 6.0, "b")
    assert not again.update_best(3, "fid", float("inf"), "d")
    assert again.update_best(3, "fid", 4.0, "b")
    again.close()
    assert again.steps() == [1, 3] and checkpoint.best(tmp_path)["earlier"] == [{"step": 1}]


def test_another_architecture_is_told(workdir):
    layer = {"kernel": np.zeros((3, 5), np.float32), "bias": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match=r"another architecture.*params/layer/kernel is float32\[3, 2\].*\[3, 5\] here"):
        manager.Checkpoints(str(workdir)).restore_latest(tiny_state().replace(gen_params={"layer": layer}))
    with pytest.raises(UserError, match="only in the configuration"):
        checkpoint.unflatten({}, {"a": np.zeros(1)})


def test_restore_ema_needs_no_data_libraries(workdir):
    script = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "torch"): sys.modules[name] = None
from ddgan_jax.storage.checkpoint import restore_ema
print(restore_ema(sys.argv[1])[2])
"""
    assert run_python(script, workdir).split()[-1] == "3"


def test_a_full_disk_is_one_sentence_and_loses_nothing(workdir):
    """Files may not grow beyond a megabyte, as on a disk with no more room; the state is 16 MB of noise."""
    script = """
import resource, sys
import numpy as np
from ddgan_jax.storage.manager import Checkpoints
from ddgan_jax.errors import Fault
from ddgan_jax.storage import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
checkpoints = Checkpoints(sys.argv[1], keep=5)
try:
    noise = np.random.default_rng(0).random(4_000_000, np.float32)
    checkpoints.save(4, {"ema_params": {"x": noise}, "step": np.int32(4)}, {})
    checkpoints.close()
except Fault as error:
    print("FAULT", error)
"""
    output, errors = python(script, workdir).communicate(timeout=240)
    faults = [line for line in output.splitlines() if line.startswith("FAULT")]
    assert len(faults) == 1 and "the one of step 3 is intact" in faults[0], output + errors
    assert int(restore(workdir)[0].step) == 3


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_and_samples_as_it_did(tmp_path):
    """`old_run.tar.xz`: a checkpoint of step 4, from before settings had a `None`, and what that version made of it.

    On the machine that wrote it, the numbers are the same to the bit; another processor may round differently.
    """
    with tarfile.open(pathlib.Path(__file__).parent / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    end, samples = np.load(tmp_path / "end.npz"), np.load(tmp_path / "samples.npz")["images"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["lr_decay_steps"] == 0 and config["data"]["dir"] == ""
    state_ = train(config, str(tmp_path))
    for path, array in checkpoint.flatten(state_).items():
        np.testing.assert_allclose(array, end[path], rtol=1e-3, atol=2e-6, err_msg=path)
    drawn = ddgan_jax.load(tmp_path / "checkpoints" / "8").sample(len(samples))
    assert np.abs(drawn.astype(int) - samples).max() <= 1


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_retries_have_an_end(seconds, tmp_path, monkeypatch):
    monkeypatch.setenv("DDGAN_RETRY_SECONDS", seconds)
    with pytest.raises(UserError, match=f"DDGAN_RETRY_SECONDS={seconds} must be a number of seconds"):
        paths.read(tmp_path / "x")


def test_slow_reads_are_retried(tmp_path, monkeypatch):
    """Also where one attempt takes longer than all retries may."""
    monkeypatch.setattr(buckets, "DISK_RETRY_SECONDS", 0.0)
    outcomes = [OSError(errno.EIO, "Input/output error"), OSError(errno.EIO, "Input/output error"), b"content"]

    def action():
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    assert paths.retry(tmp_path / "x", action) == b"content"


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_called_damaged(workdir, monkeypatch):
    """A training run deletes its old checkpoints while another command reads them."""
    found = checkpoint.find

    def find(path):
        directory = found(path)
        if directory.name == "2":
            shutil.rmtree(directory)
        return directory

    monkeypatch.setattr(checkpoint, "find", find)
    with pytest.raises(FileNotFoundError, match="deleted meanwhile"):
        checkpoint.read(workdir / "checkpoints" / "9")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        checkpoint.restore_ema(str(workdir / "checkpoints" / "2"))
    shutil.rmtree(workdir / "checkpoints" / "3")
    directories = iter([workdir / "checkpoints" / "3", workdir / "checkpoints" / "1", workdir / "checkpoints" / "1"])
    monkeypatch.setattr(checkpoint, "find", lambda path: next(directories))
    assert checkpoint.restore_ema(str(workdir))[2] == 1


def test_a_restart_that_is_killed_continues_in_the_same_folder(tmp_path, monkeypatch):
    for name in ("checkpoints/4/x", "best.json", "samples/a.png", "metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    move, moved = paths.move, []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(source)
        move(source, target)

    monkeypatch.setattr(paths, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        workdir_files.move_aside(tmp_path)
    monkeypatch.setattr(paths, "move", move)
    assert workdir_files.move_aside(tmp_path) == tmp_path / "before-1" and workdir_files.move_aside(tmp_path) is None
    assert (tmp_path / "before-1" / "checkpoints" / "4" / "x").exists() and os.listdir(tmp_path) == ["before-1"]
    (tmp_path / "config.json").write_text("of a run that was killed before its first checkpoint")
    (tmp_path / "metrics.jsonl").write_text("")
    assert workdir_files.move_aside(tmp_path) == tmp_path / "before-2"


def test_checkpoints_behind_a_relative_link_are_moved_aside(tmp_path):
    (tmp_path / "large_disk" / "4").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("../large_disk")
    workdir_files.move_aside(paths.path(tmp_path / "run"))
    assert (tmp_path / "run" / "before-1" / "checkpoints" / "4").is_dir()
    (tmp_path / "file").touch()
    paths.move(tmp_path / "run" / "before-1" / "checkpoints", tmp_path / "file")  # as a rename would replace it
    assert (tmp_path / "file" / "4").is_dir()


def test_an_empty_folder_of_a_checkpoint_is_set_aside(workdir):
    """An interrupted deletion leaves an empty folder. Names such as 0003 or ² are not those of checkpoints."""
    (workdir / "checkpoints" / "12").mkdir()
    for name in ("0003", "²"):
        (workdir / "checkpoints" / name).mkdir()
    restored, said = restore(workdir)
    assert int(restored.step) == 3 and "is damaged (it is empty)" in said[0]
    assert (workdir / "damaged" / "12").exists() and checkpoint.finished(workdir / "checkpoints") == [1, 2, 3]


def test_a_lack_of_threads_is_a_lack_of_memory(workdir, monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(checkpoint, "_restore", fail)
    with pytest.raises(OSError, match="cannot be read: RuntimeError: can't start new thread"):
        restore(workdir)


@pytest.mark.parametrize("content", ["5", "null", "[1]", '{"value": 1}', "{"])
def test_a_best_json_of_another_form_is_damaged(workdir, content):
    (workdir / "best.json").write_text(content)
    with pytest.raises(checkpoint.Damaged, match=r"best.json is damaged"):
        checkpoint.find(str(workdir / "best"))
    assert manager.Checkpoints(str(workdir)).steps() == [1, 2, 3]


@pytest.mark.parametrize("number, kind", [(errno.EIO, Fault), (errno.ENOSPC, Fault), (errno.EACCES, UserError)])
def test_a_workdir_that_fails_is_no_user_error(tmp_path, monkeypatch, number, kind):
    """Another --workdir is the remedy for a path that is not permitted, but not for a disk that fails."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(paths.path("x")), "mkdir", fail)
    with pytest.raises(kind, match=r"--workdir=.* cannot be used: .*" + os.strerror(number)), ExitStack() as held:
        workdir_files.lock(paths.path(tmp_path / "new"), held)
