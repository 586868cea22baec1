"""A mixture of 25 Gaussians on a grid in the plane: the method in minutes, with modes that can be counted.

Variants: '' (the mixture), 'smoke' (a few steps).
"""

from ml_collections import ConfigDict

from ddgan_jax.config import presets
from ddgan_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """Fully connected networks, with the points scaled by 4.

    With the paper's noise levels and the grid's spacing of 2, the last step, x_1 -> x_0, would have to separate nearly
    all modes, and no later step corrects it. With a spacing of 8, the earlier steps separate them and the last one only
    sharpens them (the second table of `python -m experiments.why_gaussian_fails`). `octaves` give the networks inputs
    fine enough for modes that are 40 times narrower than their distance.
    """
    config = presets.defaults()
    config.data.update(name="gaussians", image_size=1, channels=2, flip=False, scale=4.0)
    config.model.update(network="mlp", data_std=2.83)
    # Fields of PointGenerator and PointDiscriminator
    config.generator = ConfigDict({"nz": 2, "width": 128, "depth": 4, "t_emb_dim": 32, "octaves": 4})
    config.discriminator = ConfigDict({"width": 128, "depth": 4, "t_emb_dim": 32, "octaves": 4})
    config.train.update(
        num_steps=20_000, batch_size=256, lr_g=1e-3, lr_d=1e-3, lr_min_d=5e-4, steps_per_epoch=1, r1_every=1
    )
    # Little R1 and no moving average keep the width of the modes: G's use of z drifts during training, so averaging its
    # weights narrows the modes. In a trial, their width was 0.029 with the average and 0.046 without it, where
    # exact samples have 0.049.
    config.train.update(r1_gamma=0.003, ema_decay=0.0)
    config.checkpoint.update(every=5_000, keep_period=0)
    config.log.update(every=100, samples_every=2_000)
    config.sample.update(batch_size=4096, grid=4096)
    config.eval.update(features="points", num_samples=20_000, online_samples=5_000)
    if variant == "smoke":
        config.train.update(num_steps=8, batch_size=16)
        config.checkpoint.update(every=4, keep=2)
        config.log.update(every=2, samples_every=4)
    elif variant:
        raise UserError(f"unknown variant {variant!r}: gaussians has '' and 'smoke'")
    return config
