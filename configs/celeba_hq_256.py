"""CelebA-HQ at 256 px as in the paper: two denoising steps. Variants: 'paper', 'fast' (our recipe), 'smoke'."""

from ml_collections import ConfigDict

from ddgan_jax.config import presets


def get_config(variant: str = "paper") -> ConfigDict:
    """The paper's setting: FID 7.64, recall 0.36 with two network calls per image."""
    config = presets.get("cifar10")
    config.data.update(
        name="celeb_a_hq/256", split="train[:27000]", image_size=256
    )  # 27,000 images, as in the released code
    config.diffusion.num_steps = 2
    config.generator.update(nf=64, ch_mult=(1, 1, 2, 2, 4, 4), n_mlp=3)
    config.train.update(
        num_steps=674_400,  # 800 epochs of 843 steps
        batch_size=32,  # 8 GPUs x 4
        lr_g=2e-4,
        lr_d=1e-4,
        steps_per_epoch=843,  # 27,000 training images
        r1_gamma=2.0,
        r1_every=10,
        ema_decay=0.9999,
    )
    config.sample.update(batch_size=8, grid=16)
    return presets.apply_variant(config, variant)
