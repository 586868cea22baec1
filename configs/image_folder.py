"""Your own images: `--config=configs/image_folder.py --config.data.path=DIR`, a folder or a zip.

Variants: 'paper' (the networks of CIFAR-10, for 32 to 64 px), 'large' (of CelebA-HQ, for 128 and 256 px), 'small'
(for 32 px and hours on 2 CPU cores; judged in a classifier's features, so of one folder a class), 'smoke'.
"""

from ml_collections import ConfigDict

from configs.celeba_hq_256 import get_config as celeba
from configs.cifar10 import apply_variant
from configs.cifar10 import get_config as cifar10


def get_config(variant: str = "paper") -> ConfigDict:
    """Size and channels are those of the images unless `--config.data.image_size` and `.channels` name others."""
    config = celeba() if variant == "large" else cifar10()
    config.data.update(name="image_folder", image_size=0, channels=0)
    if variant == "large":
        config.diffusion.num_steps = 4
        return config
    if variant == "small":
        config.generator.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, nz=64, z_emb_dim=128, n_mlp=3)
        config.discriminator.update(ngf=16, t_emb_dim=128)
        config.train.update(num_steps=10_000, batch_size=32, lr_g=5e-4, lr_d=5e-4, steps_per_epoch=1, ema_decay=0.999)
        config.train.update(r1_gamma=0.05, r1_every=10)
        config.checkpoint.update(every=500, keep_period=0)
        config.log.update(every=50, samples_every=500)
        config.eval.update(features="classifier", num_samples=10_000, reference_samples=10_000, manifold_samples=5_000)
        config.eval.update(every=1_000, online_samples=2_000)
        return config
    return apply_variant(config, variant)
