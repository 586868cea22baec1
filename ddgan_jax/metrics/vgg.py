"""The VGG16 network of improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, Section 3).

Simonyan and Zisserman (arXiv 1409.1556), configuration D of torchvision, with the preprocessing of torch-fidelity's
'vgg16', whose features tests compare. The weights are torchvision's file `FILE`, `VGG16_Weights.IMAGENET1K_V1`.
torchvision trained them from scratch. Precision and recall are therefore comparable with torch-fidelity's, and only
roughly with those of papers that use the weights of Kynkaanniemi et al. By the convention of torch.hub, the name of the
file ends with the first digits of its SHA-256; `SHA256` is the published one.
"""

import jax
import numpy as np
from flax import linen as nn

from ddgan_jax.metrics import weights
from ddgan_jax.metrics.inception import pixels

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
FILE = "vgg16-397923af.pth"
SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
SIZE = 224
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (features, convolutions), each followed by a pool
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in units of 255


class VGG16(nn.Module):
    """uint8 images [B, H, W, 1 or 3] of any size -> features [B, 4096] at least 0: the second dense layer, after ReLU.

    Images are resized to 224 x 224 as TensorFlow 1 did. Raises UserError for images of another shape or type.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST
        mean, deviation = (255 * np.asarray(values) for values in (MEAN, DEVIATION))
        x = (pixels(images, SIZE) - mean.astype(np.float32)) / deviation.astype(np.float32)
        number = 0  # torchvision numbers convolutions, ReLUs and pools consecutively
        for features, convolutions in STAGES:
            for _ in range(convolutions):
                x = nn.relu(nn.Conv(features, (3, 3), precision=precision, name=f"features.{number}")(x))
                number += 2
            x = nn.max_pool(x, (2, 2), (2, 2))
            number += 1
        x = x.reshape(x.shape[0], -1)
        for name in ("classifier.0", "classifier.3"):
            x = nn.relu(nn.Dense(4096, precision=precision, name=name)(x))
        return x


def params(state_dict: weights.StateDict) -> weights.Params:
    """Parameters of `VGG16` from the state dict in `FILE`, whose last layer, the classes, is not used.

    Raises UserError that names the first array that is missing or has another shape.
    """
    found: weights.Params = {}
    for layer, shape in weights.shapes(VGG16()).items():
        kernel = weights.kernel(state_dict, f"{layer}.weight", shape["kernel"], FILE)
        if layer == "classifier.0":  # PyTorch flattens (channels, height, width), Flax (height, width, channels)
            kernel = kernel.reshape(512, 7, 7, -1).transpose(1, 2, 0, 3).reshape(shape["kernel"])
        bias = weights.array(state_dict, f"{layer}.bias", shape["bias"], FILE)
        found[layer] = {"kernel": kernel, "bias": bias}
    return jax.tree.map(lambda value: np.ascontiguousarray(value, np.float32), found)
