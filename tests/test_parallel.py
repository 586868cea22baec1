"""The same numbers on one device and on four, in a process of its own that has four."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import POINTS, run, succeed, with_devices

from ddgan_jax.config import presets
from ddgan_jax.data import resolve
from ddgan_jax.devices import compiler, parallel, processes
from ddgan_jax.errors import UserError
from ddgan_jax.method.build import build, init_state
from ddgan_jax.method.train_step import make_train_step

SCRIPT = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from test_generator import random_params
from test_train_step import method_of
from ddgan_jax.devices import parallel
from ddgan_jax.method import state as state_lib, train_step as ts
from ddgan_jax.storage.torch import convert
from ddgan_jax.networks.discriminator import Discriminator, minibatch_stddev, preset
from ddgan_jax.networks.generator import Generator
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.losses import Losses

assert jax.device_count() == 4
generator = Generator(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), nz=6, z_emb_dim=8, n_mlp=1,
                      image_channels=1, dropout=0.1)
disc = Discriminator(ngf=4, t_emb_dim=8, **preset(8))
method = method_of(generator, disc, (8, 8, 1), flip=True, dropout=True, losses=Losses(Schedule.create(4), 1.0))
x, t = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32)
d_params = jax.jit(lambda k: disc.init(k, x, t, x)["params"])(jax.random.key(1))
make = jax.jit(lambda g, d: state_lib.create(g, d, method.optimizer))
images = np.random.default_rng(0).integers(0, 256, (3, 16, 8, 8, 1), np.uint8)

def train(step_of, state, place):
    step = step_of(True)
    for i in range(3):
        state, metrics = step(state, place(images[i]))
    return state, metrics

one, one_metrics = train(
    lambda r1: jax.jit(ts.make_train_step(method, 0, r1)), make(random_params(generator, 8), d_params), lambda x: x
)
four, four_metrics = train(
    lambda r1: parallel.map_step(ts.make_train_step(method, 0, r1, parallel.AXIS)),
    parallel.replicate(make(random_params(generator, 8), d_params)),
    parallel.split,
)
assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(four))
worst = {}
for name in ("gen_params", "ema_params", "disc_params"):
    a, b = (convert.to_state_dict(jax.tree.map(np.asarray, getattr(s, name))) for s in (one, four))
    worst[name] = max(float(np.abs(a[k] - b[k]).max()) for k in a)
first = random_params(generator, 8)["z_0"]["kernel"]
worst["moved"] = float(np.abs(one.gen_params["z_0"]["kernel"] - first).max())
worst["metrics"] = max(float(np.abs(a - b).max()) for a, b in zip(
    jax.tree.leaves(one_metrics), jax.tree.leaves(four_metrics), strict=True))

largest = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

# Where four neighbours lie on several devices (of 3 images each), D exchanges what it compares; and a batch taken in
# parts gives what the whole one gives.
generator = Generator(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), nz=6, z_emb_dim=8, n_mlp=1,
                      image_channels=1)
disc = Discriminator(ngf=4, t_emb_dim=8, **preset(8))
x, t = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32)
d_params = jax.jit(lambda k: disc.init(k, x, t, x)["params"])(jax.random.key(1))
make = jax.jit(lambda g, d: state_lib.create(g, d, method.optimizer))
for name, size, parts, options in (
    ("straddle", 12, 1, {"discriminator_input": "x_0", "reconstruction": state_lib.constant_schedule(2.0)}),
    ("parts", 32, 2, {}),
):
    method = method_of(generator, disc, (8, 8, 1), losses=Losses(Schedule.create(4), 1.0, **options))
    images = np.random.default_rng(0).integers(0, 256, (3, size, 8, 8, 1), np.uint8)
    one, one_metrics = train(
        lambda r1: jax.jit(ts.make_train_step(method, 0, r1)), make(random_params(generator, 8), d_params), lambda x: x
    )
    split = dataclasses.replace(method, accumulate=parts)
    four, four_metrics = train(
        lambda r1: parallel.map_step(ts.make_train_step(split, 0, r1, parallel.AXIS)),
        parallel.replicate(make(random_params(generator, 8), d_params)), parallel.split,
    )
    moved = make(random_params(generator, 8), d_params)
    worst[name] = max(largest(getattr(one, n), jax.tree.map(np.asarray, getattr(four, n)))
                      for n in ("gen_params", "disc_params"))
    worst[f"{name}_moved"] = min(largest(getattr(one, n), getattr(moved, n)) for n in ("gen_params", "disc_params"))
    worst[f"{name}_metrics"] = largest(one_metrics, jax.tree.map(np.asarray, four_metrics))

# Groups of four on four devices of b images each: the feature, its gradient and that of its gradient.
def penalty(x, axis_name=None):
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(minibatch_stddev(x, axis_name)[..., -1])))(x)
    return jnp.sum(jnp.square(gradient))
worst["stddev"] = 0.0
for b in (1, 2, 3, 5, 6, 8):
    x = np.random.default_rng(b).normal(size=(4 * b, 2, 2, 3)).astype(np.float32)
    ours = jax.pmap(lambda x: (minibatch_stddev(x, "batch"), jax.grad(penalty)(x, "batch")), axis_name="batch")(
        x.reshape(4, b, 2, 2, 3))
    theirs = minibatch_stddev(x), jax.grad(penalty)(x)
    ours = [np.asarray(a).reshape(c.shape) for a, c in zip(ours, theirs, strict=True)]
    worst["stddev"] = max(worst["stddev"], largest(list(theirs), ours))
print(json.dumps(worst))
"""


def run_with_devices(script: str, devices: int) -> str:
    """The standard output of a Python script in a process with that many CPU devices."""
    tests = pathlib.Path(__file__).parent
    env = os.environ | with_devices(devices) | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_one_replica_equals_four():
    worst = json.loads(run_with_devices(SCRIPT, 4).splitlines()[-1])
    assert worst["moved"] > 1e-4
    assert worst["gen_params"] < 1e-5 and worst["ema_params"] < 1e-5 and worst["disc_params"] < 1e-5
    assert worst["metrics"] < 1e-3 and worst["stddev"] < 1e-5
    for name in ("straddle", "parts"):
        assert worst[f"{name}_moved"] > 1e-4 and worst[name] < 1e-5, name
        assert worst[f"{name}_metrics"] < 1e-3, name


@pytest.mark.parametrize(
    "batch, accumulate, devices, message",
    [
        (256, 1, 256, ""),
        (64, 1, 64, ""),
        (32, 1, 8, ""),
        (24, 1, 4, ""),
        (4, 1, 4, ""),
        (32, 4, 2, ""),
        (3, 1, 1, ""),
        (64, 1, 256, "train.batch_size=64 is smaller than the 256 devices: choose a multiple of 256, or make"),
        (6, 1, 1, "does not divide by 1 device and into groups of 4 images, .*: choose a multiple of 4"),
        (36, 1, 8, "does not divide by 8 devices and into groups of 4 images, .*: choose a multiple of 8"),
        (32, 3, 2, "train.accumulate=3 does not cut the 16 images of a device .*: choose 1 or 2 or 4"),
        (8, 2, 8, "train.accumulate=2 does not cut the 1 images of a device into equal parts .*: choose 1"),
    ],
)
def test_batches_that_devices_can_share(batch, accumulate, devices, message, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    if not message:
        assert resolve.check_batch(batch, accumulate) == batch // devices
        return
    with pytest.raises(UserError, match=message):
        resolve.check_batch(batch, accumulate)


def test_the_new_state_takes_the_place_of_the_old_one():
    """Two states at a time would cost CIFAR-10's step another 0.9 GB on every device."""
    method = build(presets.get("gaussians:smoke"))
    state = jax.eval_shape(lambda: init_state(method, 0))
    points = jax.ShapeDtypeStruct((1, method.batch_size, 2), np.float32)
    memory = (
        parallel.map_step(make_train_step(method, 0, True, parallel.AXIS))
        .lower(state, points)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_rounds_cover_every_item_once(monkeypatch):
    """Of 3 processes with one device each: their parts, put one after the other, are the items in order."""
    monkeypatch.setattr(processes, "num_processes", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(processes, "process_index", lambda index=index: index)
        shares.append(list(parallel.work_chunks(50, 4)))
    items = []
    for parts in zip(*shares, strict=True):
        together = np.concatenate([indices for indices, _ in parts])
        items += list(together[: parts[0][1]])
        assert len(together) == 12 and len({count for _, count in parts}) == 1
    assert items == list(range(50))


def test_facts_that_differ_are_named(monkeypatch):
    facts = {"config.seed": 0, "the data": "1,797 examples, abc"}
    monkeypatch.setattr(processes, "exchange", lambda mine: [mine, mine | {"the data": "1,797 examples, abd"}])
    with pytest.raises(UserError, match=r"the data is 1,797 examples, abc in process 0 and .* abd in process 1"):
        processes.assert_equal_across_processes(facts)
    monkeypatch.setattr(processes, "exchange", lambda mine: [mine, dict(mine)])
    processes.assert_equal_across_processes(facts)


@pytest.mark.slow
def test_entries_of_the_compilation_cache_that_were_cut_short_are_replaced(tmp_path):
    """At the next start; JAX alone would report them for ever."""
    cache, env = tmp_path / "cache", {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = POINTS, "--config.log.tensorboard=False", f"--compilation_cache={cache}", "--config.train.num_steps=1"
    assert run(*arguments, f"--workdir={tmp_path / '0'}", env=env).returncode == 0
    sizes = {file: file.stat().st_size for file in cache.glob("*-cache")}
    for file in list(sizes)[1:]:
        file.write_bytes(file.read_bytes()[: sizes[file] // 2])
    list(sizes)[1].write_bytes(b"")
    (cache / "gone-cache").symlink_to(cache / "nothing")  # as an entry that is removed while all are checked
    for start, notes in (1, len(sizes) - 1), (2, 0):
        result = succeed(*arguments, f"--workdir={tmp_path / str(start)}", env=env)
        assert "Error reading" not in result.stderr
        assert result.stdout.count("is truncated, and is removed") == notes
        assert sizes.keys() == set(cache.glob("*-cache")) - {cache / "gone-cache"} and all(
            file.stat().st_size > 0.9 * sizes[file] for file in sizes
        )


@pytest.mark.parametrize(
    "flags, options",
    [
        ("", {"xla_backend_optimization_level": 1}),
        ("--xla_force_host_platform_device_count=2", {"xla_backend_optimization_level": 1}),
        ("--xla_backend_optimization_level=0 --xla_dump_to=x", {}),
    ],
)
def test_a_level_that_the_user_names_is_kept(flags, options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert compiler.compiler_options() == options


def test_programs_are_kept_where_only_the_user_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiler.default_cache()
    assert folder.parent == tmp_path / "ddgan_jax" / "programs" and folder.stat().st_mode & 0o777 == 0o700
    assert compiler.default_cache() == folder
    for part in (folder, folder.parent):
        part.chmod(0o770)
        assert compiler.default_cache() is None
        part.chmod(0o700)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.default_cache() is None


def test_the_programs_that_were_read_least_recently_are_removed(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (100 - age, 50 + age))
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")  # as a file that another process removes meanwhile
    compiler.remove_oldest(tmp_path, limit=25)
    (tmp_path / "gone").unlink()
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.slow
def test_commands_keep_their_programs(tmp_path):
    """Compiled as for users, with the compiler's options for a training step."""
    env = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path / "home"), "XLA_FLAGS": ""}
    for flag, kept in (("--compilation_cache=", False), (f"--compilation_cache={tmp_path / 'own'}", False), ("", True)):
        arguments = POINTS, "--config.train.num_steps=1", "--config.log.tensorboard=False", *filter(None, [flag])
        succeed(*arguments, f"--workdir={tmp_path / str(kept)}", "--restart", env=env)
        assert bool(list((tmp_path / "home").rglob("*-cache"))) == kept
    assert list((tmp_path / "own").glob("*-cache"))


def test_prefetch_changes_neither_order_nor_content():
    taken = []

    def stream():
        for i in range(5):
            taken.append(i)
            yield np.full((4, 2), i, np.uint8)

    for i, batch in enumerate(parallel.prefetch(stream(), ahead=2)):
        assert batch.shape == (1, 4, 2) and (np.asarray(batch) == i).all()
        assert taken[-1] == min(i + 2, 4), "two more are on their way"
    assert i == 4
