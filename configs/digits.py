"""Handwritten digits of 8x8 pixels from scikit-learn, which train in minutes on a CPU.

Variants: '' (our recipe, minutes on 2 CPU cores), 'long' (the same for about an hour of one core), 'conditional' (on
the ten classes, for `--label`), 'paper' (the paper's losses and noise), 'smoke' (synthetic data, under a minute).
"""

from ml_collections import ConfigDict

from ddgan_jax.config import presets
from ddgan_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """Networks small enough to train on a laptop in minutes."""
    config = presets.defaults()
    config.data.update(name="digits", image_size=8, channels=1, flip=False)  # mirrored digits are not digits
    config.generator.update(
        nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), nz=32, z_emb_dim=64, n_mlp=2
    )
    config.discriminator.update(ngf=12, t_emb_dim=64)
    # R1 and D's learning rate have a large effect. With the paper's losses, Frechet distances (tests/test_digits.py)
    # after 2,000 and about 4,000 steps were 8.7 and 5 with r1_gamma 0.02 (the paper's for CIFAR-10) and lr_d 1e-3, and
    # 6 and 2 to 3.5 with the values below, in trials of one or two seeds.
    config.train.update(
        num_steps=4500,
        batch_size=32,
        lr_g=1e-3,
        lr_d=2e-3,
        steps_per_epoch=1,  # learning rates change every step
        ema_decay=0.997,
        r1_gamma=0.5,
        r1_every=10,
    )
    if variant != "paper":
        presets.fast(config)
        config.diffusion.num_steps = 3
        config.discriminator.ngf = 8
        config.train.num_steps = 7500
    config.checkpoint.update(every=500, keep=3, keep_period=0)
    config.log.update(every=50, samples_every=500)
    config.eval.update(features="classifier", num_samples=1797, batch_size=256)
    if variant == "long":
        config.train.update(num_steps=30_000, ema_decay=0.999)
        config.checkpoint.every = config.log.samples_every = 2_500
    elif variant == "conditional":
        config.model.num_classes = 10
    elif variant == "smoke":
        presets.smoke(config)
    elif variant not in ("", "paper"):
        raise UserError(f"unknown variant {variant!r}: digits has '', 'long', 'conditional', 'paper' and 'smoke'")
    return config
