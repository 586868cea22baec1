"""Settings: read from every source, checked field by field, and the same again from JSON."""

import dataclasses
import json
import math
import typing
import warnings

import numpy as np
import pytest
from conftest import preset_with
from ml_collections import config_dict
from test_configs import CONFIGS, get_config

from ddgan_jax.config import check, presets
from ddgan_jax.config import settings as config
from ddgan_jax.errors import UserError
from ddgan_jax.method.build import build, denoiser

DEFAULTS = config.flat(config.as_dict(config.Config()))
OF_NETWORKS = ("generator.", "discriminator.")


def fields(cls=config.Config, prefix=""):
    """(name with its group, annotation) of every field that has one of its own."""
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(annotation):
            yield from fields(annotation, f"{prefix}{name}.")
        elif name not in ("generator", "discriminator"):
            yield prefix + name, annotation


FIELDS = dict(fields())


def nested(name, value):
    """{'train': {'lr_g': value}} of 'train.lr_g'."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("name", [(name, *variant) for name in CONFIGS for variant in ((), ("smoke",))])
def test_a_configuration_is_the_same_from_a_configdict_and_from_json(name):
    read = config.read(get_config(*name))
    assert config.read(json.loads(json.dumps(config.as_dict(read)))) == read
    assert config.read(read) is read


def test_what_is_not_given_is_a_default():
    assert config.read({}) == config.Config()
    assert config.read({"train": {"lr_g": 1}}).train == config.TrainConfig(lr_g=1.0)
    assert config.read({"seed": np.int64(3)}).seed == 3


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if type(None) in typing.get_args(kind)])
def test_zero_and_nothing_mean_none_where_none_is_allowed(name):
    """As a command line says it, and as configurations of before did; but where 0 is a value of its own it is that."""
    found = [config.flat(config.as_dict(nested(name, value)))[name] for value in (0, "", None)]
    assert found == [0 if name in ("loss.reconstruction_end", "log.samples_every") else None, None, None]


def test_fields_for_text_and_numbers_that_may_be_none_are_known():
    optional = {name for name, kind in FIELDS.items() if check.optional(kind)}
    assert optional >= {"data.image_size", "train.num_steps", "train.lr_min_d", "eval.reference_samples", "data.dir"}
    assert not optional & {"eval.every", "checkpoint.keep_period", "model.num_classes", "loss.reconstruction"}


def test_settings_of_old_checkpoints_that_are_gone():
    """Those that were off are nothing to speak of; of others a warning says that they have no effect."""
    old = {"train": {"lr_g": 3e-4, "d_lead": 0.0}, "loss": {"generator": "nonsaturating", "moment": 0.0, "kappa": 50.0}}
    with warnings.catch_warnings(action="error"):
        assert config.read(old).train.lr_g == 3e-4
    with pytest.warns(UserWarning, match="loss.moment=50.0 is ignored: this setting was removed"):
        assert config.read({"loss": {"moment": 50.0}}) == config.Config()


def test_the_old_name_of_a_setting():
    """In a checkpoint's JSON, in a configuration file that changes a preset, and as a flag."""
    assert config.read({"loss": {"shown": "x_0"}}).loss == config.LossConfig(discriminator_input="x_0")
    given = get_config("digits")
    assert given.loss.discriminator_input == "x_0"
    given.loss.shown = "x_t"
    assert config.as_dict(given)["loss"]["discriminator_input"] == "x_t"
    argv = ["main.py", "--config.loss.shown=x_t", "--config.loss.shown", "x_0", "--config=digits", "--other=shown"]
    assert presets.with_current_names(argv)[1:3] == [
        "--config.loss.discriminator_input=x_t",
        "--config.loss.discriminator_input",
    ]
    assert presets.with_current_names(argv)[3:] == argv[3:]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_it_cannot_be(name):
    """One sentence that names the field; a dict or a list is never right, nor another type, nor NaN."""
    wrong = [{}, {"a": 1}, [], object(), math.nan, math.inf, 1e39, 10**400, -(10**5000), -1.5]
    wrong += [1, True, 3.5] if isinstance(DEFAULTS[name], str) or "str" in str(FIELDS[name]) else ["x", "1"]
    if "bool" in str(FIELDS[name]):
        wrong += [1, 2]
    elif not isinstance(DEFAULTS[name], str):
        wrong += [True]
    for value in wrong:
        with pytest.raises(UserError, match=rf"{name}[= ].*(must be|is not supported)"):
            config.read(nested(name, value))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("train.lr_decay_steps", -1, "train.lr_decay_steps=-1 must be an integer of at least 1, or None"),
        ("train.r1_gamma", -0.5, "train.r1_gamma=-0.5 must be a number of at least 0"),
        ("train.batch_size", 1.5, "train.batch_size=1.5 must be an integer of at least 1, or None"),
        ("train.ema_decay", 1.1, "train.ema_decay=1.1 must be a number from 0 to 1"),
        ("loss.reconstruction", -1.0, "loss.reconstruction=-1.0 must be a number of at least 0"),
        ("model.network", "cnn", "model.network='cnn' is not supported: it is unet or mlp"),
        ("seed", -1, "seed=-1 must be an integer from 0 to 4294967295"),
        ("train.lr", 1.0, "there is no setting train.lr: did you mean train.lr_g?"),
        ("training", {}, "there is no setting training: did you mean train?"),
        ("train", 3, "train is 3, and must be a group of settings"),
        ("generator.nff", 3, "there is no setting generator.nff: did you mean generator.nf?"),
        ("generator.dtype", "float32", "there is no setting generator.dtype: "),
        ("generator.nf", "wide", "generator.nf='wide' must be an integer"),
        ("generator.nz", 10**9, "generator.nz=1000000000 must be an integer of at most 16384"),
        ("generator.nf", 0, "generator.nf=0 must be an integer of at least 1"),
        ("generator.ch_mult", (1, 0), "generator.ch_mult=.1, 0. must be integers of at least 1"),
        ("generator.dropout", 1.0, "generator.dropout=1.0 must be a number of at least 0 and below 1"),
        ("generator.fir_kernel", (), r"generator.fir_kernel=\(\) must be numbers whose sum is not 0"),
        ("generator.fir_kernel", ("a",), "generator.fir_kernel=.'a',. must be numbers whose sum is not 0"),
        ("generator.fir_kernel", (1, -1), "generator.fir_kernel=.1, -1. must be numbers whose sum is not 0"),
        ("generator.fir_kernel", (1, math.nan), "generator.fir_kernel=.1, nan. must be numbers whose sum is not 0"),
        ("generator.fir_kernel", (1e308, 1e308), "generator.fir_kernel=.* must be numbers whose sum is not 0"),
        ("train.lr_g", 1e39, "train.lr_g=1e.39 must be a number of at least 0, and at most 3.4e.38 in size"),
        ("discriminator.ngf", -8, "discriminator.ngf=-8 must be an integer of at least 1"),
        ("discriminator.stages", ((2,),), "discriminator.stages=.* must be pairs of a width and True or False"),
        ("discriminator.stages", (1, 2), "discriminator.stages=.1, 2. must be pairs of a width and True or False"),
        ("model.num_classes", -1, "at least 0"),
    ],
)
def test_errors_say_what_would_be_right(name, value, message):
    given = config.as_dict(get_config("cifar10", "smoke"))
    group, _, field = name.partition(".")
    given[group] = given[group] | {field: value} if field else value
    with pytest.raises(UserError, match=message):
        build(given)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("gaussians", {"generator__depth": 0}, "generator.depth=0 must be an integer of at least 1"),
        (
            "gaussians",
            {"generator__octaves": 32},
            "generator.octaves=32 must be an integer of at most 31",
        ),  # 2^31 waves
        ("gaussians", {"model__num_classes": 2}, "networks for points are unconditional"),
        ("gaussians", {"model__patch_size": 2}, "points have no pixels"),
        ("gaussians", {"diffusion__beta_max": None}, "diffusion.beta_max=None is chosen for an image size"),
        (
            "cifar10",
            {"objective": "gaussian", "loss__reconstruction": 1.0},
            "loss.reconstruction is for objective='adversarial', not 'gaussian'",
        ),
        (
            "cifar10",
            {"objective": "one_shot", "loss__discriminator_input": "x_0"},
            "loss.discriminator_input is for objective='adversarial', not 'one_shot': set it to 'x_t'",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        build(preset_with(f"{name}:smoke", **fields))


@pytest.mark.parametrize("name", ["seed", "train.num_steps", "train.r1_every", "generator.nf", "eval.features"])
@pytest.mark.parametrize("required", [True, False])
def test_placeholders_that_nothing_filled(name, required):
    given = get_config("cifar10", "smoke")
    placeholder = config_dict.required_placeholder if required else config_dict.placeholder
    *group, field = name.split(".")
    group = given[group[0]] if group else given
    del group[field]
    group[field] = placeholder(str if name == "eval.features" else int)
    with pytest.raises(
        UserError, match=f"^{name}( has no value .*: set --config|=None (must be|is not supported)| is not set).*"
    ):
        build(given)
    group[field] = "points" if name == "eval.features" else 4
    build(given)


def test_the_value_of_a_reference_and_of_an_array():
    """References are resolved, and arrays are lists of numbers."""
    given = get_config("cifar10", "smoke")
    given.train.num_steps = 2 * given.get_oneway_ref("seed") + 6
    given.seed = 1
    assert config.read(given).train.num_steps == 8
    assert denoiser(config.as_dict(given) | {"generator": {"ch_mult": np.array([1, 2]), "nf": np.array(8)}}).nz == 100


def test_a_generator_is_built_without_what_only_training_needs():
    """Neither a discriminator nor a number of steps; training asks for them."""
    c = config.read(get_config("image_folder", "smoke"))
    c = dataclasses.replace(c, train=config.TrainConfig(num_steps=None, batch_size=None), discriminator={"no": 1})
    assert denoiser(c).image_shape == (8, 8, 3)
    with pytest.raises(UserError, match=r"no setting discriminator.no"):
        build(c)
    with pytest.raises(UserError, match=r"train.num_steps is not set, and nothing chose it for the data"):
        build(dataclasses.replace(c, discriminator={}))
