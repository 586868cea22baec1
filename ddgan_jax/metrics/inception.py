"""The Inception-v3 network of FID, KID and the Inception Score: TensorFlow's "2015-12-05", in its PyTorch port.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), with the differences of
the 2015 graph: average pools ignore padding, the last block has a max pool, and the input is resized as TensorFlow 1
does. Scores are comparable only between copies of this network with the same preprocessing; tests compare it with
torch-fidelity's.

The weights are the file `FILE`: from the project pytorch-fid on GitHub, release "fid_weights", or from torch-fidelity,
release v0.2.0, where its name starts with "weights-" instead of "pt_". By the convention of torch.hub, the name ends
with the first digits of the file's SHA-256; `SHA256` is the published one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ddgan_jax.errors import UserError
from ddgan_jax.metrics import weights

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE, FEATURES = 299, 2048
BATCH_NORM_EPSILON = 1e-3


def rgb(images: jax.Array) -> jax.Array:
    """Images [B, H, W, 3]: grey ones, [B, H, W] or [B, H, W, 1], are repeated. UserError for other shapes."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"feature networks take images [B, H, W, 3] or grey [B, H, W, 1], not of shape {images.shape}")
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


def resize(x: jax.Array, size: int) -> jax.Array:
    """Float [B, H, W, C] -> [B, size, size, C] as TensorFlow 1's resize_bilinear: output n reads input n H / size.

    As in the 2015 graph, without half-pixel centres, aligned corners, or smoothing before downsampling.
    """
    for axis in (2, 1):
        length = x.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = place.astype(np.int32)
        weight = (place - low.astype(np.float32)).reshape((-1, 1) if axis == 2 else (-1, 1, 1))
        # Two gathered neighbours round as the original does; a matrix product would not.
        first, second = (jnp.take(x, np.minimum(low + i, length - 1), axis=axis) for i in (0, 1))
        x = first + (second - first) * weight
    return x


def pixels(images: jax.Array, size: int) -> jax.Array:
    """uint8 [B, H, W, 1 or 3] of any size -> float32 [B, size, size, 3] in 0..255. UserError for other arrays."""
    if images.dtype != jnp.uint8:
        raise UserError(f"feature networks take uint8 images in 0..255, not {images.dtype}: scale and round them first")
    return resize(rgb(images).astype(jnp.float32), size)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with bias, then ReLU; batch norm is folded into it when weights are converted."""

    features: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: str = "SAME"


# A list is a chain, a mapping a set of branches whose outputs are concatenated along the channels, a function a pool.
# The keys on the path to a layer form its name, here and in the weights; a chain of several convolutions numbers them.
Step = Conv | Callable[[jax.Array], jax.Array] | Sequence["Step"] | Mapping[str, "Step"]


def halve(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, (H - 1) // 2, (W - 1) // 2, C], the maximum of 3x3 pixels."""
    return nn.max_pool(x, (3, 3), (2, 2))


def largest(x: jax.Array) -> jax.Array:
    """The maximum of each pixel of [B, H, W, C] and its neighbours."""
    return nn.max_pool(x, (3, 3), padding="SAME")


def average(x: jax.Array) -> jax.Array:
    """The mean of each pixel of [B, H, W, C] and those of its neighbours that are inside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _mixed_5(pooled: int) -> Step:
    return {
        ".branch1x1": Conv(64),
        ".branch5x5": [Conv(48), Conv(64, 5, 5)],
        ".branch3x3dbl": [Conv(64), Conv(96, 3, 3), Conv(96, 3, 3)],
        ".branch_pool": [average, Conv(pooled)],
    }


def _mixed_6(inner: int) -> Step:
    return {
        ".branch1x1": Conv(192),
        ".branch7x7": [Conv(inner), Conv(inner, 1, 7), Conv(192, 7, 1)],
        ".branch7x7dbl": [Conv(inner), Conv(inner, 7, 1), Conv(inner, 1, 7), Conv(inner, 7, 1), Conv(192, 1, 7)],
        ".branch_pool": [average, Conv(192)],
    }


def _mixed_7(pool: Callable[[jax.Array], jax.Array]) -> Step:
    both: Step = {"a": Conv(384, 1, 3), "b": Conv(384, 3, 1)}
    return {
        ".branch1x1": Conv(320),
        ".branch3x3": [Conv(384), both],
        ".branch3x3dbl": [Conv(448), Conv(384, 3, 3), both],
        ".branch_pool": [pool, Conv(192)],
    }


TABLE: Mapping[str, Step] = {
    "Conv2d_1a_3x3": Conv(32, 3, 3, 2, "VALID"),
    "Conv2d_2a_3x3": Conv(32, 3, 3, 1, "VALID"),
    "Conv2d_2b_3x3": Conv(64, 3, 3),
    "MaxPool_1": halve,  # 73 x 73 pixels
    "Conv2d_3b_1x1": Conv(80),
    "Conv2d_4a_3x3": Conv(192, 3, 3, 1, "VALID"),
    "MaxPool_2": halve,  # 35 x 35
    "Mixed_5b": _mixed_5(32),
    "Mixed_5c": _mixed_5(64),
    "Mixed_5d": _mixed_5(64),
    "Mixed_6a": {  # 17 x 17
        ".branch3x3": Conv(384, 3, 3, 2, "VALID"),
        ".branch3x3dbl": [Conv(64), Conv(96, 3, 3), Conv(96, 3, 3, 2, "VALID")],
        ".branch_pool": halve,
    },
    "Mixed_6b": _mixed_6(128),
    "Mixed_6c": _mixed_6(160),
    "Mixed_6d": _mixed_6(160),
    "Mixed_6e": _mixed_6(192),
    "Mixed_7a": {  # 8 x 8
        ".branch3x3": [Conv(192), Conv(320, 3, 3, 2, "VALID")],
        ".branch7x7x3": [Conv(192), Conv(192, 1, 7), Conv(192, 7, 1), Conv(192, 3, 3, 2, "VALID")],
        ".branch_pool": halve,
    },
    "Mixed_7b": _mixed_7(average),
    "Mixed_7c": _mixed_7(largest),
}


def _apply(step: Step, name: str, x: jax.Array) -> jax.Array:
    """Apply one step of the table inside a compact module, which owns the convolutions."""
    if isinstance(step, Conv):
        size = (step.height, step.width)
        layer = nn.Conv(step.features, size, step.stride, step.padding, precision=jax.lax.Precision.HIGHEST, name=name)
        return nn.relu(layer(x))
    if isinstance(step, Mapping):
        return jnp.concatenate([_apply(branch, name + key, x) for key, branch in step.items()], axis=-1)
    if isinstance(step, Sequence):
        several, number = sum(not callable(part) for part in step) > 1, 0
        for part in step:
            number += not callable(part)
            x = _apply(part, f"{name}_{number}" if several else name, x)
        return x
    return step(x)


class Inception(nn.Module):
    """uint8 images [B, H, W, 1 or 3] of any size -> (pool features [B, 2048], logits [B, 1008]), float32.

    The features, of FID and KID, are means over the last 8 x 8 pixels, at least 0. The logits lack the bias of the last
    layer, as the Inception Score requires (Salimans et al., and torch-fidelity's default, 'logits_unbiased'). Raises
    UserError for images of another shape or type.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = (pixels(images, SIZE) - 128) / 128
        for name, step in TABLE.items():
            x = _apply(step, name, x)
        features = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(features)
        return features, logits


def params(state_dict: weights.StateDict) -> weights.Params:
    """Parameters of `Inception` from the state dict in `FILE`, batch norm folded into the convolutions in float64.

    Other entries are ignored. Raises UserError that names the first array that is missing or has another shape.
    """
    found: weights.Params = {}
    for layer, shape in weights.shapes(Inception()).items():
        if layer == "fc":
            found[layer] = {"kernel": weights.kernel(state_dict, "fc.weight", shape["kernel"], FILE)}
            continue
        kernel = weights.kernel(state_dict, f"{layer}.conv.weight", shape["kernel"], FILE)
        gain, bias, mean, variance = (
            weights.array(state_dict, f"{layer}.bn.{leaf}", shape["bias"], FILE).astype(np.float64)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(variance + BATCH_NORM_EPSILON)
        found[layer] = {"kernel": kernel * scale, "bias": bias - mean * scale}
    return jax.tree.map(lambda value: np.ascontiguousarray(value, np.float32), found)
