"""The only file that knows there is more than one device.

A train step is written for one replica, with `axis_name` for its averages; `map_step` runs it on every device.
The state is replicated without a leading device axis, the batch is split along its first axis. Randomness belongs
to examples, by their index in the *global* batch, so that the numbers do not depend on how many devices share it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddgan_jax.errors import UserError

AXIS = "batch"


def map_step(step: Callable) -> Callable:
    """step(state, images) of one replica -> the same on all devices, the state donated and kept replicated."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0)


def replicate(tree: Any) -> Any:
    """Arrays of this process -> arrays on every device of every process."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec()))


def split(batch: np.ndarray) -> np.ndarray:
    """This process's part of a batch, [B, ...] -> [local devices, B / local devices, ...]; UserError if uneven."""
    n = jax.local_device_count()
    if batch.shape[0] % n:
        raise UserError(f"a batch of {batch.shape[0]} images does not divide by {n} devices: choose a multiple of {n}")
    return batch.reshape(n, batch.shape[0] // n, *batch.shape[1:])


def global_indices(batch_size: int, axis_name: str | None) -> jax.Array:
    """Inside a replica: the indices [batch_size] of its examples in the global batch."""
    replica = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return replica * batch_size + jnp.arange(batch_size)


def mean(tree: Any, axis_name: str | None) -> Any:
    """Inside a replica: the average over all replicas."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key [B] for each example, from its index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
