"""The configurations: the paper's networks exactly, and (slow) a smoke run of each."""

import math

import jax
import numpy as np
import pytest
from commands import run_python, succeed
from conftest import preset_with

from ddgan_jax.config import presets
from ddgan_jax.config.settings import as_dict, read
from ddgan_jax.data import resolve
from ddgan_jax.method.build import build, notes_on_levels

CONFIGS = presets.names()


def get_config(name, *variant):
    return presets.get(":".join((name, *variant)))


@pytest.mark.parametrize(
    "name, generator, discriminator",
    [
        ("cifar10", 48_432_515, 12_741_633),
        ("stacked_mnist", 48_432_515, 12_741_633),
        ("celeba_hq_256", 39_726_979, 27_737_217),
        ("lsun_church_256", 39_726_979, 27_737_217),
    ],
)
def test_the_networks_are_the_papers(name, generator, discriminator):
    """The parameter counts of the released networks."""
    method = build(get_config(name))
    for init, count in ((method.denoiser.init_gen, generator), (method.init_disc, discriminator)):
        shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
        assert sum(math.prod(leaf.shape) for leaf in shapes) == count


@pytest.mark.parametrize("name, epochs", [("cifar10", 1_800), ("celeba_hq_256", 800), ("lsun_church_256", 500)])
def test_the_trainings_are_the_papers_epochs(name, epochs):
    train = get_config(name).train
    assert train.num_steps == epochs * train.steps_per_epoch


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_differs_from_the_documented_one_in_values_only(name):
    """All have the fields of cifar10.py, so that every field is explained there.

    Networks for points have their own, and a D of patches its stages.
    """
    ours, documented = as_dict(get_config(name)), as_dict(get_config("cifar10"))
    own = {"seed"} | ({"generator", "discriminator"} if ours["model"]["network"] == "mlp" else set())
    own |= {"discriminator"} if ours["model"]["patch_size"] > 1 else set()
    assert {group: set(fields) for group, fields in ours.items() if group not in own} == {
        group: set(fields) for group, fields in documented.items() if group not in own
    }
    assert as_dict(get_config(name, "smoke"))["data"]["name"] in ("synthetic", "gaussians")
    with pytest.raises(ValueError, match="unknown variant 'tiny'"):
        get_config(name, "tiny")


@pytest.mark.parametrize("size, patch, noted", [(64, 1, False), (128, 1, False), (256, 2, False), (256, 1, True)])
def test_levels_that_do_not_suit_the_image_size(size, patch, noted):
    config = preset_with("image_folder", data__image_size=size, data__channels=3, model__patch_size=patch)
    assert notes_on_levels(read(config)) == noted * [
        "note: at 256 px, the generator's 4 levels end at 32x32 positions and take much memory: add levels to "
        "generator.ch_mult, as configs/image_folder.py:large has, or set a smaller data.image_size",
        "note: generator.attn_resolutions has no effect at 16: the levels of this network are 256, 128, 64, 32",
    ]


@pytest.mark.parametrize(
    "name", ["cifar10", "celeba_hq_256", "lsun_church_256", "stacked_mnist", "digits", "gaussians"]
)
def test_levels_of_the_presets(name):
    config = preset_with(name) if name == "gaussians" else preset_with(name, data__channels=3)
    if config.data.image_size is None and name != "gaussians":
        config.data.image_size = 32
    assert notes_on_levels(read(config)) == []


def test_the_error_names_the_variants_that_there_are():
    with pytest.raises(ValueError, match="one of paper, small, mnist_5k, fast, smoke"):
        get_config("stacked_mnist", "tiny")


def test_the_recipe_of_the_digits_is_not_the_papers():
    """Nor is it with more steps or classes; 'paper' has none of it."""
    of = {variant: as_dict(get_config("digits", variant)) for variant in ("", "conditional", "paper", "long")}
    documented = as_dict(get_config("cifar10"))
    for variant, config in of.items():
        ours = variant != "paper"
        assert (config["loss"] == documented["loss"]) is not ours
        assert (config["diffusion"] == documented["diffusion"]) is not ours
        assert config["loss"]["discriminator_input"] == ("x_0" if ours else "x_t")


def test_the_default_is_mnist_by_class():
    """'unconditional' differs in the number of classes alone."""
    assert presets.DEFAULT == "mnist" and get_config("mnist").data.name == "mnist_5k"
    by_class, without = (as_dict(get_config("mnist", variant)) for variant in ("", "unconditional"))
    assert by_class["model"].pop("num_classes") == 10 and without["model"].pop("num_classes") == 0
    assert by_class == without


@pytest.mark.parametrize("name, beta_max", [("cifar10", 12), ("celeba_hq_256", 20), ("image_folder", None)])
def test_the_recipe_of_the_other_presets(name, beta_max):
    """The losses of the digits, no more noise than the size asks for, and a D that goes on learning."""
    fast, paper, digits = get_config(name, "fast"), get_config(name), get_config("digits")
    assert fast.loss == digits.loss and fast.diffusion.beta_max == beta_max
    assert fast.train.lr_min_d == paper.train.lr_d / 2 and paper.train.lr_min_d is None
    assert fast.generator == paper.generator and fast.diffusion.num_steps == paper.diffusion.num_steps


@pytest.mark.parametrize("size, beta_max", [(8, 6), (32, 12), (64, 14), (256, 20)])
def test_the_noise_of_the_recipe_is_chosen_for_the_size_of_a_folders_images(size, beta_max):
    config = preset_with("image_folder:fast", data__image_size=size, data__channels=3)
    assert resolve.choose(read(config), 2_000, False, 1)[0].diffusion.beta_max == beta_max
    config.diffusion.beta_max = 9.0
    assert resolve.choose(read(config), 2_000, False, 1)[0].diffusion.beta_max == 9


def test_each_network_has_its_own_floor_of_the_learning_rate_and_stays_there():
    """Cosines, so that half way is the mean of both ends; a run of more steps than the decay is constant afterwards."""
    config = get_config("cifar10", "smoke")
    config.train.update(lr_g=6e-5, lr_d=3e-4, lr_min=2e-5, lr_min_d=1e-4, lr_decay_steps=100, steps_per_epoch=1)
    method = build(config)
    rates = [[float(rate(np.int32(step))) for step in (0, 50, 100, 1_000)] for rate in (method.lr_g, method.lr_d)]
    np.testing.assert_allclose(rates, [[6e-5, 4e-5, 2e-5, 2e-5], [3e-4, 2e-4, 1e-4, 1e-4]], rtol=1e-6)


def test_the_decay_of_a_checkpoint_that_knows_one_floor_is_as_it_was():
    """Both networks fall to lr_min in num_steps."""
    old = as_dict(get_config("cifar10", "smoke"))
    del old["train"]["lr_decay_steps"], old["train"]["lr_min_d"]
    method = build(old)
    rates = [[float(rate(np.int32(step))) for step in (0, 4, 8)] for rate in (method.lr_g, method.lr_d)]
    np.testing.assert_allclose(rates, [[1.6e-4, 8.5e-5, 1e-5], [1.25e-4, 6.75e-5, 1e-5]], rtol=1e-6)


def test_flags_set_optional_fields_to_none():
    """The last flag of a field counts, also where the preset has a number. A required field refuses None."""
    script = """if True:
        import sys
        from absl import flags
        from ddgan_jax.config import presets
        presets.read_flags(sys.argv, "mnist")
        c = flags.FLAGS.config
        print(c.loss.reconstruction_end, c.train.lr_min_d, c.data.path, c.train.num_steps)"""
    small = "--config=stacked_mnist:small"
    none = [f"--config.{field}=None" for field in ("loss.reconstruction_end", "train.lr_min_d")]
    none += ["--config.data.path", "None"]
    steps = ("--config.train.num_steps", "3", "-config.train.num_steps=None")
    assert run_python(script, small, *none, "--config.log.tensorboard", *steps) == "None None None None\n"
    assert run_python(script, small, *steps[2:], *steps[:2], "--noconfig.log.tensorboard") == "3.0 0.001 None 3\n"
    with pytest.raises(AssertionError, match=r"--config\.seed=None must be an integer"):
        run_python(script, "--config.seed=None")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_smoke(name, tmp_path):
    succeed(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}")
    assert (tmp_path / "checkpoints" / "8").exists() and (tmp_path / "samples" / "final.png").exists()


def test_a_folder_of_the_same_name_hides_no_preset(tmp_path, monkeypatch):
    """As one with the images of CIFAR-10, which the presets are made of; a file configs/digits.py goes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "digits").mkdir()
    assert presets.get("digits:long").train.num_steps == 30_000
    (tmp_path / "configs").mkdir()
    mine = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'mine': True})\n"
    (tmp_path / "configs" / "digits.py").write_text(mine)
    assert presets.get("configs/digits.py").mine
