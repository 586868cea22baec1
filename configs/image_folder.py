"""Your own images: `--config=configs/image_folder.py --config.data.path=PATH`: a folder, a zip or an LMDB.

Variants: 'paper' (the networks of CIFAR-10, for 32 to 64 px), 'large' (of CelebA-HQ, for 128 px and more), 'fast'
(those of 'paper', by our recipe), 'small' (at 32 px, by our recipe, for two to three hours on a CPU core; evaluated in
a classifier's features during training, if there is one folder per class), 'smoke'.
"""

from ml_collections import ConfigDict

from ddgan_jax.config import presets


def get_config(variant: str = "paper") -> ConfigDict:
    """Image size, batch size and number of steps are resolved from the images, unless flags set them."""
    config = presets.get("celeba_hq_256") if variant == "large" else presets.defaults()
    config.data.update(name="image_folder", split="train", image_size=None, channels=None)
    config.train.update(num_steps=None, batch_size=None, steps_per_epoch=None)  # see ddgan_jax/data/resolve.py
    config.checkpoint.every = config.log.samples_every = None
    config.eval.update(every=0, at_end=False)  # networks of ImageNet may not suit your images
    if variant == "large":
        config.diffusion.num_steps = 4
        return config
    if variant == "small":
        config.data.image_size = 32
        presets.small(config)
        presets.longer(config)
        config.diffusion.num_steps = 4
        config.train.num_steps = 42_000  # whatever the number of images: two to three hours on a CPU core
        config.log.samples_every = 2_000
        config.eval.update(features="classifier", num_samples=10_000, reference_samples=10_000, manifold_samples=5_000)
        config.eval.update(every=3_000, online_samples=2_000)
        return config
    return presets.apply_variant(config, variant, "large", "small")
