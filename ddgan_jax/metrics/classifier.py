"""The project's own classifier: which digit is it? Its hidden layer is the feature space of small images.

Inception features mean nothing for grey digits of 8 or 28 px, so their Frechet distance and precision and recall are
taken in these features; such numbers are never called FID. It is trained where it is needed, in a minute or so on a
CPU, always to the same weights on the same machine.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

FEATURES = 64
STEPS, BATCH, RATE = 2_000, 64, 2e-3


class Classifier(nn.Module):
    """uint8 [B, S, S, C] -> (features [B, 64] after a ReLU, logits [B, num_classes]); halves the image down to 4 px."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = images.astype(jnp.float32) / 127.5 - 1
        while True:
            h = nn.relu(nn.Conv(min(64, max(16, 512 // h.shape[1])), (3, 3))(h))  # the wider, the smaller the image
            if h.shape[1] <= 4:
                break
            h = nn.max_pool(h, (2, 2), (2, 2))
        features = nn.relu(nn.Dense(FEATURES)(h.reshape(h.shape[0], -1)))
        return features, nn.Dense(self.num_classes)(features)


def _shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Every image [B, S, S, C] moved by up to S // 14 px; its edge is repeated."""
    reach = images.shape[1] // 14
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * reach + 1)
    crop = lambda image, offset: jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:])  # noqa: E731
    return jax.vmap(crop)(padded, offsets)


def train(
    images: Any, labels: np.ndarray, num_classes: int, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Any:
    """Parameters of a classifier trained on uint8 `images` [N, S, S, C] with `labels` [N] in 0..num_classes-1.

    2,000 steps of 64 images with Adam, the learning rate falling as a cosine; deterministic. `progress` goes around the
    step numbers.
    """
    model, optimizer = Classifier(num_classes), optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    key = jax.random.key(0)

    @jax.jit
    def step(params: Any, state: Any, i: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            outputs: Any = model.apply({"params": params}, _shifted(x, jax.random.fold_in(key, i)))
            return optax.softmax_cross_entropy_with_integer_labels(outputs[1], y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(key, images[np.arange(1)])["params"]
    state = jax.jit(optimizer.init)(params)
    rng = np.random.RandomState(0)
    for i in progress(range(STEPS)):
        chosen = rng.randint(0, len(images), BATCH)
        params, state = step(params, state, i, images[chosen], labels[chosen])
    return params


def accuracy(params: Any, images: Any, labels: np.ndarray) -> float:
    """The share of `images` [N, S, S, C] whose most likely class is their label."""
    model = Classifier(params["Dense_1"]["bias"].shape[0])

    @jax.jit
    def classify(x: jax.Array) -> jax.Array:
        outputs: Any = model.apply({"params": params}, x)
        return outputs[1].argmax(-1)

    right = 0
    for start in range(0, len(images), 500):
        part = np.arange(start, min(start + 500, len(images)))
        right += int((np.asarray(classify(images[part])) == labels[part]).sum())
    return right / len(images)
