"""The project's classifier of small images, whose hidden layer is their feature space.

Inception features mean nothing for grey digits of 8 or 28 px, so the Frechet distance, precision and recall of such
images use these features, and are never called FID. The classifier is trained on first use, in minutes on a CPU, and
always to the same weights on the same machine.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.scipy.ndimage import map_coordinates

FEATURES = 64
STEPS, BATCH, RATE = 2_000, 64, 2e-3
DISTORTED = 14  # px; smaller images are not distorted


class Classifier(nn.Module):
    """uint8 [B, S, S, C] -> (features [B, 64] after a ReLU, logits [B, num_classes]); pools the image down to 4 px."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = images.astype(jnp.float32) / 127.5 - 1
        while True:
            h = nn.relu(nn.Conv(min(64, max(16, 512 // h.shape[1])), (3, 3))(h))  # smaller images get more channels
            if h.shape[1] <= 4:
                break
            h = nn.max_pool(h, (2, 2), (2, 2))
        features = nn.relu(nn.Dense(FEATURES)(h.reshape(h.shape[0], -1)))
        return features, nn.Dense(self.num_classes)(features)


def num_steps(side: int) -> int:
    """Steps of the training on images of `side` px: more if they are distorted."""
    return STEPS if side < DISTORTED else 5 * STEPS // 2


def _distorted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Images [B, S, S, C], each rotated, sheared and scaled by up to 0.15, and shifted by up to S // 14 px, at random.

    Images below 14 px are unchanged: one pixel is much of them.
    """
    count, side = images.shape[:2]
    if side < DISTORTED:
        return images
    angle, shear, *scale, down, right = jax.random.uniform(key, (6, count), minval=-1)
    cos, sin = jnp.cos(0.15 * angle), jnp.sin(0.15 * angle)
    rows = [(1 + 0.15 * scale[0]) * cos, 0.15 * shear - sin], [sin, (1 + 0.15 * scale[1]) * cos]
    matrix, shift = jnp.array(rows), side // 14 * jnp.array([down, right])  # [2, 2, B], [2, B]
    middle = (side - 1) / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(side), jnp.arange(side), indexing="ij")) - middle
    where = jnp.einsum("ijb,jhw->bihw", matrix, grid) + (shift.T + middle)[:, :, None, None]

    def one(image: jax.Array, where: jax.Array) -> jax.Array:
        channel = lambda x: map_coordinates(x, list(where), order=1, mode="nearest")  # noqa: E731
        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images.astype(jnp.float32), where)


def train(
    images: Any, labels: np.ndarray, num_classes: int, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Any:
    """Parameters of a classifier trained on uint8 `images` [N, S, S, C] with `labels` [N] in 0..num_classes-1.

    2,000 steps of 64 images, or 5,000 of distorted images from 14 px on, with Adam and a cosine learning rate;
    deterministic. `progress` wraps the step numbers, as tqdm does.
    """
    steps = num_steps(images.shape[1])
    model, optimizer = Classifier(num_classes), optax.adam(optax.cosine_decay_schedule(RATE, steps))
    key = jax.random.key(0)

    @jax.jit
    def step(params: Any, state: Any, i: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            outputs: Any = model.apply({"params": params}, _distorted(x, jax.random.fold_in(key, i)))
            return optax.softmax_cross_entropy_with_integer_labels(outputs[1], y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(key, images[np.arange(1)])["params"]
    state = jax.jit(optimizer.init)(params)
    rng = np.random.RandomState(0)
    for i in progress(range(steps)):
        chosen = rng.randint(0, len(images), BATCH)
        params, state = step(params, state, i, images[chosen], labels[chosen])
    return params


def accuracy(params: Any, images: Any, labels: np.ndarray) -> float:
    """The fraction of `images` [N, S, S, C] whose most likely class is their label."""
    model = Classifier(params["Dense_1"]["bias"].shape[0])

    @jax.jit
    def classify(x: jax.Array) -> jax.Array:
        outputs: Any = model.apply({"params": params}, x)
        return outputs[1].argmax(-1)

    correct = 0
    for start in range(0, len(images), 500):
        part = np.arange(start, min(start + 500, len(images)))
        correct += int((np.asarray(classify(images[part])) == labels[part]).sum())
    return correct / len(images)
