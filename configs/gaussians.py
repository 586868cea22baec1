"""The mixture of 25 Gaussians on a grid, 2-D points: the method in minutes, and its modes can be counted.

Variants: '' (the mixture), 'smoke' (a few steps).
"""

from ml_collections import ConfigDict

from ddgan_jax.config import presets


def get_config(variant: str = "") -> ConfigDict:
    """Fully connected networks, and the points four times as large as they come.

    With the paper's noise levels and a spacing of 2 nearly all modes of the denoising distribution are left to the last
    step, x_1 -> x_0, which nothing corrects; with a spacing of 8 they are told apart in the steps before, and the last
    one only sharpens them (the second table of `python -m experiments.why_gaussian_fails`). `octaves` let the networks
    see the modes, 40 times narrower than their distance, as sharply as they are.
    """
    config = presets.get("cifar10")
    config.data.update(name="gaussians", image_size=1, channels=2, flip=False, scale=4.0)
    config.model.update(network="mlp", data_std=2.83)
    # The fields of PointGenerator and PointDiscriminator
    config.generator = ConfigDict({"nz": 2, "width": 128, "depth": 4, "t_emb_dim": 32, "octaves": 4})
    config.discriminator = ConfigDict({"width": 128, "depth": 4, "t_emb_dim": 32, "octaves": 4})
    config.train.update(
        num_steps=20_000, batch_size=256, lr_g=1e-3, lr_d=1e-3, lr_min_d=5e-4, steps_per_epoch=1, r1_every=1
    )
    # The modes keep their width with little R1 and without a moving average: z turns while G follows D, and the average
    # of maps that are turned against each other is narrow (0.029 of 0.049, where G itself has 0.046)
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
        raise ValueError(f"unknown variant {variant!r}: gaussians has '' and 'smoke'")
    return config
