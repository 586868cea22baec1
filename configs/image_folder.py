"""Your own images: `--config=configs/image_folder.py --config.data.path=DIR`, a folder or a zip.

Variants: 'paper' (the networks of CIFAR-10, for 32 to 64 px), 'large' (of CelebA-HQ, for 128 and 256 px), 'small'
(for 32 px and an hour or two on a CPU core; judged in a classifier's features, so of one folder a class), 'smoke'.
"""

from ml_collections import ConfigDict

from configs.celeba_hq_256 import get_config as celeba
from configs.cifar10 import apply_variant, small
from configs.cifar10 import get_config as cifar10


def get_config(variant: str = "paper") -> ConfigDict:
    """Size and channels are those of the images unless `--config.data.image_size` and `.channels` name others."""
    config = celeba() if variant == "large" else cifar10()
    config.data.update(name="image_folder", image_size=0, channels=0)
    if variant == "large":
        config.diffusion.num_steps = 4
        return config
    if variant == "small":
        small(config)
        config.eval.update(features="classifier", num_samples=10_000, reference_samples=10_000, manifold_samples=5_000)
        config.eval.update(every=1_000, online_samples=2_000)
        return config
    return apply_variant(config, variant, "large", "small")
