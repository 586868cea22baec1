"""StackedMNIST: three random digits in the three channels of a 32 px image, 1,000 modes. Variants: 'paper', 'smoke'.

The paper gives the networks (those of CIFAR-10) and not the training; everything else is chosen as for CIFAR-10.
"""

from ml_collections import ConfigDict

from configs.cifar10 import get_config as cifar10
from configs.cifar10 import smoke


def get_config(variant: str = "paper") -> ConfigDict:
    """The networks of the paper: 1,000 modes, KL 0.071."""
    config = cifar10()
    config.data.update(name="stacked_mnist", flip=False)
    if variant == "smoke":
        smoke(config)
    elif variant != "paper":
        raise ValueError(f"unknown variant {variant!r}: it is 'paper' or 'smoke'")
    return config
