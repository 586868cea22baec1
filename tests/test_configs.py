"""The configurations: the paper's networks exactly, and (slow) a smoke run of each."""

import importlib
import math

import jax
import pytest
from commands import ROOT, run

from ddgan_jax.build import as_dict, build

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def get_config(name, *variant):
    return importlib.import_module(f"configs.{name}").get_config(*variant)


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
    built = build(get_config(name))
    for init, count in ((built.init_gen, generator), (built.init_disc, discriminator)):
        shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
        assert sum(math.prod(leaf.shape) for leaf in shapes) == count


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_differs_from_the_documented_one_in_values_only(name):
    """All have the fields of cifar10.py, so that every field is explained there; networks for points have their own."""
    ours, documented = as_dict(get_config(name)), as_dict(get_config("cifar10"))
    own = {"seed"} | ({"generator", "discriminator"} if ours["model"]["network"] == "mlp" else set())
    assert {group: set(fields) for group, fields in ours.items() if group not in own} == {
        group: set(fields) for group, fields in documented.items() if group not in own
    }
    assert as_dict(get_config(name, "smoke"))["data"]["name"] in ("synthetic", "gaussians")
    with pytest.raises(ValueError, match="unknown variant 'tiny'"):
        get_config(name, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_smoke(name, tmp_path):
    result = run(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoints" / "8").exists() and (tmp_path / "samples" / "final.png").exists()
