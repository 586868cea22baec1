"""StackedMNIST: three random digits in the three channels of a 32 px image, 1,000 modes. Variants: 'paper', 'smoke'.

The paper gives the networks (those of CIFAR-10) and not the training; everything else is chosen as for CIFAR-10.
"""

from ml_collections import ConfigDict

from configs.cifar10 import apply_variant
from configs.cifar10 import get_config as cifar10


def get_config(variant: str = "paper") -> ConfigDict:
    """The networks of the paper: 1,000 modes, KL 0.071."""
    config = cifar10()
    config.data.update(name="stacked_mnist", flip=False)
    return apply_variant(config, variant)
