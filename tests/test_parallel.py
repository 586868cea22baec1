"""The same numbers on one device and on four, in a process of its own that has four."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from ddgan_jax import parallel

SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from test_generator import random_params
from test_train_step import method_of
from ddgan_jax import losses, parallel, state as state_lib, torch_weights as tw, train_step as ts
from ddgan_jax.models.discriminator import Discriminator, preset
from ddgan_jax.models.generator import Generator
from ddgan_jax.models.mlp import PointDiscriminator, PointGenerator

assert jax.device_count() == 4
generator = Generator(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), nz=6, z_emb_dim=8, n_mlp=1,
                      image_channels=1, dropout=0.1)
disc = Discriminator(ngf=4, t_emb_dim=8, **preset(8))
method = method_of(generator, disc, flip=True, dropout=True, r1_gamma=1.0)
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
for name, export in (("gen_params", tw.generator_state_dict), ("ema_params", tw.generator_state_dict),
                     ("disc_params", tw.discriminator_state_dict)):
    a, b = (export(jax.tree.map(np.asarray, getattr(s, name))) for s in (one, four))
    worst[name] = max(float(np.abs(a[k] - b[k]).max()) for k in a)
first = random_params(generator, 8)["z_0"]["kernel"]
worst["moved"] = float(np.abs(one.gen_params["z_0"]["kernel"] - first).max())
worst["metrics"] = max(float(np.abs(a - b).max()) for a, b in zip(
    jax.tree.leaves(one_metrics), jax.tree.leaves(four_metrics), strict=True))

# What one example takes of others (sliced Wasserstein distances, the image and the z before) is of the global batch.
generator, disc = PointGenerator(width=16, depth=1), PointDiscriminator(width=16, depth=1)
method = method_of(generator, disc, paths=losses.Paths(64, 5.0), mismatched=0.5, moment=0.5)
x, z = jnp.zeros((4, 2)), jnp.zeros((4, generator.nz))
params = generator.init(jax.random.key(2), x, t, z)["params"], disc.init(jax.random.key(3), x, t, x)["params"]
images = np.random.default_rng(1).normal(size=(3, 16, 2)).astype(np.float32)
make = jax.jit(lambda: state_lib.create(*params, method.optimizer))
one, _ = train(lambda r1: jax.jit(ts.make_train_step(method, 0, r1)), make(), lambda x: x)
four, _ = train(
    lambda r1: parallel.map_step(ts.make_train_step(method, 0, r1, parallel.AXIS)),
    parallel.replicate(make()), parallel.split,
)
largest = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
worst["paths"] = largest(one.gen_params, jax.tree.map(np.asarray, four.gen_params))
worst["paths_moved"] = largest(one.gen_params, params[0])
worst["mismatched"] = largest(one.disc_params, jax.tree.map(np.asarray, four.disc_params))
worst["mismatched_moved"] = largest(one.disc_params, params[1])
print(json.dumps(worst))
"""


def run_with_devices(script: str, devices: int) -> str:
    """The standard output of a Python script in a process with that many CPU devices."""
    tests = pathlib.Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
    }
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_one_replica_equals_four():
    worst = json.loads(run_with_devices(SCRIPT, 4).splitlines()[-1])
    assert worst["moved"] > 1e-4
    assert worst["gen_params"] < 1e-5 and worst["ema_params"] < 1e-5 and worst["disc_params"] < 1e-5
    assert worst["metrics"] < 1e-3
    for name in ("paths", "mismatched"):
        assert worst[f"{name}_moved"] > 1e-4 and worst[name] < 1e-5


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
