"""Checkpoints of the reference: real files, round trips, and files that must not be trusted."""

import errno
import functools
import lzma
import pickle
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_module
from conftest import GOLDEN, REQUIRED, Golden

import ddgan_jax
from ddgan_jax.commands import generate
from ddgan_jax.config import presets
from ddgan_jax.config import settings as config
from ddgan_jax.config.settings import as_dict
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method import build
from ddgan_jax.model.model import Model
from ddgan_jax.networks.discriminator import Discriminator
from ddgan_jax.storage.torch import arguments, convert, files

torch = pytest.importorskip("torch")
SMALL = dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, nz=8, z_emb_dim=16, n_mlp=2)  # the network in tests/golden
HINTS = dict(image_size=16, skip_rescale=True, tanh=True, centered=True, **SMALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The reference's own files, unpacked."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in (GOLDEN / "checkpoint").glob("*.pth.xz"):
        (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return folder


def outputs(golden, found, params):
    gen = build.denoiser(found.config).gen
    return np.asarray(gen(params, golden.nhwc("x"), golden.ints("t"), golden["z"])).transpose(0, 3, 1, 2)


@pytest.mark.golden
def test_real_checkpoints(checkpoint):
    golden = Golden("checkpoint/expected")
    found = files.read(str(checkpoint / "netG_1.pth"), **HINTS)
    np.testing.assert_allclose(outputs(golden, found, found.gen_params), golden["out_netG_1_ema"], atol=2e-5)

    run = files.read(str(checkpoint / "content.pth"))  # contains its arguments, needs no hints
    assert run.config.generator == found.config.generator
    assert run.settings["diffusion.num_steps"] == 4
    np.testing.assert_allclose(outputs(golden, run, run.gen_params), golden["out_content_netG"], atol=2e-5)
    np.testing.assert_allclose(outputs(golden, run, run.ema_params), golden["out_netG_1_ema"], atol=2e-5)
    disc = Discriminator(**run.config.discriminator)
    inputs = golden.nhwc("x_prev"), golden.ints("t"), golden.nhwc("x")
    params = convert.from_state_dict(run.disc_arrays, shapes_of(disc, *inputs))
    # Two images are one group of the minibatch stddev, strided or not.
    logits = jax.jit(lambda p: disc.apply({"params": p}, *inputs))(params)
    np.testing.assert_allclose(logits, golden["out_content_netD"][:, 0], atol=2e-5)


def shapes_of(network, *inputs):
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


@pytest.mark.golden
def test_round_trip_through_a_file(checkpoint, tmp_path):
    """import -> export -> import is the identity, and the exported file is the imported one: keys, order, bits."""
    content, run = files.load(str(checkpoint / "content.pth")), files.read(str(checkpoint / "content.pth"))
    x = jnp.zeros((4, 16, 16, 3))
    disc_like = shapes_of(Discriminator(**run.config.discriminator), x, jnp.zeros(4, jnp.int32), x)
    for original, like in (
        (files.load(str(checkpoint / "netG_1.pth")), run.gen_params),
        (content["netG_dict"], run.gen_params),
        (content["netD_dict"], disc_like),
    ):
        params = convert.from_state_dict(original, like)
        files.save(str(tmp_path / "again.pth"), convert.to_state_dict(params))
        again = files.load(str(tmp_path / "again.pth"))
        assert list(again) == list(original)
        for key, value in original.items():
            assert again[key].dtype == value.dtype and again[key].tobytes() == value.tobytes(), key
        jax.tree.map(np.testing.assert_array_equal, convert.from_state_dict(again, like), params)


def state_dict():
    return {k: v.copy() for k, v in Golden("generator_01_default32").below("sd/").items()}


def like():
    """The shapes of the generator that `state_dict` belongs to."""
    return Golden("generator_01_default32").generator()[1]


def config_of(**hints):
    return arguments.config_of(arguments.settings_of_hints(hints))


def test_hints_that_are_missing_are_named():
    with pytest.raises(UserError, match=r"do not show skip_rescale, tanh, centered, image_size.*skip_rescale=True"):
        config_of()
    with pytest.raises(UserError, match="do not show tanh"):
        config_of(image_size=32, skip_rescale=True, centered=True)
    assert config_of(**REQUIRED).generator["nf"] == 128, "the reference's default"


def test_names_of_the_reference_and_of_this_project_are_hints():
    theirs = dict(
        num_channels_dae=8, not_use_tanh=True, num_timesteps=2, num_channels=1, use_geometric=True, beta_max=0.9
    )
    ours = dict(nf=8, tanh=False, num_steps=2, image_channels=1)
    hints = {name: value for name, value in HINTS.items() if name != "tanh"}
    theirs, ours = config_of(**(hints | theirs)), config_of(**(hints | ours))
    assert theirs.generator == ours.generator and theirs.data == ours.data
    assert (theirs.diffusion.num_steps, theirs.diffusion.kind) == (ours.diffusion.num_steps, "geometric")


@pytest.mark.parametrize(
    "hints, message",
    [
        (dict(image_size="32"), "data.image_size='32' must be an integer"),
        (dict(attn_resolutions=16), "generator.attn_resolutions=16 must be"),
        (dict(ch_mult=2), "generator.ch_mult=2 must be"),
        (dict(path=1), "unknown hint 'path'"),
        (dict(num_timesteps=4, num_steps=2), "num_timesteps=4 and num_steps=2 are the same setting"),
        (dict(imagesize=32), "unknown hint 'imagesize'"),
        (dict(embedding_type="fourier"), "Fourier"),
        (dict(nf=64), "all_modules.0.weight .time_0/kernel. is .8, 32., not .64, 256."),
        (dict(fir=False), "all_modules.7.Conv2d_0.weight is|all_modules.*Conv_0.weight is missing"),
        (dict(attn_resolutions=[8]), "all_modules"),
        (dict(progressive_input="none", fir=None), "generator.fir=None must be"),
    ],
    ids=str,
)
def test_hints_that_do_not_fit(checkpoint, hints, message):
    with pytest.raises(UserError, match=message):
        files.read(str(checkpoint / "netG_1.pth"), **(HINTS | hints))


def test_fir_is_asked_for_where_no_array_shows_it(tmp_path):
    small = dict(HINTS, progressive_input="input_skip")
    config = config_of(**small)
    shapes = jax.eval_shape(build.denoiser(config).init_gen, jax.random.key(0))
    files.save(
        str(tmp_path / "netG.pth"),
        convert.to_state_dict(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)),
    )
    with pytest.raises(UserError, match="do not show fir: add the hints of their training, such as fir=True"):
        files.read(str(tmp_path / "netG.pth"), **small)
    assert not files.read(str(tmp_path / "netG.pth"), fir=False, **small).config.generator["fir"]


@pytest.mark.golden
def test_hints_may_not_contradict_the_arguments_of_a_run(checkpoint):
    path = str(checkpoint / "content.pth")
    assert files.read(path, **HINTS).config == files.read(path).config
    for name in HINTS:
        with pytest.raises(UserError, match=f"was trained with .*{name}=.*, but a hint is"):
            files.read(path, **(HINTS | {name: 8 if name == "image_size" else False}))


@pytest.mark.golden
def test_a_configuration_may_not_contradict_a_run(checkpoint):
    """Its T and betas were ignored, and those of the configuration sampled from."""
    path, c = str(checkpoint / "content.pth"), as_dict({})
    c["data"] |= dict(image_size=16, channels=3)
    c["generator"] |= dict(nf=8, n_mlp=2, ch_mult=(1, 2), num_res_blocks=1, nz=8, z_emb_dim=16)
    assert ddgan_jax.load(path, c).num_steps == 4
    for other in (dict(num_steps=2, beta_max=6.0), dict(beta_max=0.9, kind="geometric"), dict(beta_min=0.2)):
        with pytest.raises(UserError, match=r"was trained with diffusion\..* in the configuration: set ") as error:
            ddgan_jax.load(path, c | {"diffusion": c["diffusion"] | other})
        for name in other:
            assert f"--config.diffusion.{name}={c['diffusion'][name]}" in str(error.value)
    with pytest.raises(
        UserError, match=r"generator\.nf=8, not 16 as in the configuration: set --config\.generator\.nf=8"
    ):
        ddgan_jax.load(path, c | {"generator": c["generator"] | {"nf": 16}})
    with pytest.raises(UserError, match=r"was trained with diffusion\.num_steps=8, not 4"):
        ddgan_jax.load(str(checkpoint / "netG_1.pth"), c, num_steps=8)
    with pytest.raises(UserError, match=r"was trained with diffusion\.num_steps=4, but a hint is 8"):
        ddgan_jax.load(path, num_steps=8)


def test_other_parameters_are_not_exported():
    params = like()
    for other in (params | {"class": {"embedding": np.zeros((10, 32))}}, {"dense_0": params["z_0"]}):
        with pytest.raises(UserError, match="the reference's networks have no layer"):
            convert.to_state_dict(other)


def changed(**changes):
    sd = state_dict()
    for key, value in changes.items():
        sd.pop(key.replace("__", "."), None)
        if value is not None:
            sd[key.replace("__", ".")] = value
    return sd


@pytest.mark.parametrize(
    "sd",
    [
        {},
        {"weight": np.zeros(3)},
        changed(all_modules__2__weight=None),
        changed(all_modules__3__Conv_1__bias=None),
        changed(all_modules__99__weight=np.zeros((3, 3))),
        changed(all_modules__0__W=np.zeros(16), all_modules__0__weight=None, all_modules__0__bias=None),
        changed(z_transform__1__weight=None),
        changed(z_transform__2__weight=np.zeros((3, 3), np.float32)),
        changed(all_modules__2__weight="text"),
        changed(all_modules__3__Conv_0__weight=np.zeros(32, np.float32)),
        changed(all_modules__2__bias=np.zeros(32)),  # float64
        Golden("discriminator_small").below("sd/"),
    ],
    ids=lambda sd: str(len(sd)),
)
def test_other_state_dicts_are_refused_as_generators(sd):
    with pytest.raises(UserError) as error:
        convert.from_state_dict(sd, like())
    assert "\n" not in str(error.value)


def test_other_state_dicts_are_refused_as_discriminators():
    golden = Golden("discriminator_small")
    shapes, sd = golden.discriminator()[1], golden.below("sd/")
    with pytest.raises(UserError, match=r"do not fit: t_embed\.main\.0\.weight is missing"):
        convert.from_state_dict(state_dict(), shapes)
    sd.pop("end_linear.weight"), sd.pop("end_linear.bias")
    with pytest.raises(UserError, match=r"end_linear\.weight is missing"):
        convert.from_state_dict(sd, shapes)


class Attack:
    def __reduce__(self):
        return print, ("this must never be printed",)


def broken_files(folder, good):
    """{name: path} of files that are no checkpoint, or more than one."""
    data = good.read_bytes()
    paths = {}

    def write(name, content):
        paths[name] = folder / f"{name}.pth"
        paths[name].write_bytes(content) if isinstance(content, bytes) else torch.save(content, paths[name])

    write("empty", b"")
    write("text", b"not a checkpoint\n" * 20)
    for part in (10, len(data) // 2, len(data) - 40):
        write(f"truncated_{part}", data[:part])
    write("flipped", data[:1500] + bytes(b ^ 255 for b in data[1500:1800]) + data[1800:])
    write("pickle", pickle.dumps(Attack()))
    write("attack", {"a": torch.zeros(2), "b": Attack()})
    write("attack_in_arguments", {"netG_dict": {}, "args": Namespace(x=Attack())})
    write("whole_module", torch.nn.Linear(2, 2))
    write("not_a_dict", [1, 2, 3])
    write("tensor", torch.zeros(3))
    write("sparse", {"a": torch.eye(3).to_sparse()})
    write("keys", {(1, 2): torch.zeros(2)})
    write("number_for_a_network", {"netG_dict": 5})
    write("list_of_arguments", {"netG_dict": {}, "args": [1]})
    write("not_numbers", {"all_modules.0.weight": "text"})
    write("other_network", OrderedDict(torch.nn.Conv2d(3, 3, 3).state_dict()))
    paths["archive"] = folder / "archive.pth"
    with zipfile.ZipFile(paths["archive"], "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Attack(), protocol=2))
        archive.writestr("archive/version", "3\n")
    paths["directory"] = folder
    paths["missing"] = folder / "nothing.pth"
    return paths


def test_bad_files_are_refused_in_one_sentence(checkpoint, tmp_path, capfd):
    paths = broken_files(tmp_path, checkpoint / "netG_1.pth")
    for name, path in paths.items():
        assert files.main([str(path), *(f"{k}={v}" for k, v in HINTS.items())]) == 2, name
        out, err = capfd.readouterr()
        assert "never be printed" not in out + err, name
        assert err.startswith("error: ") and err.count("\n") == 1 and not out, f"{name}: {err}"
        if name.startswith("attack"):
            assert "refused" in err and "print" in err, f"{name}: {err}"


@pytest.mark.parametrize("command", ["", "python -m ddgan_jax.storage.torch.files"])
@pytest.mark.parametrize(
    "where, error, message",
    [
        ("read", OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error"),
        ("load", MemoryError(), "cannot be read: not enough memory"),
        ("load", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "cannot be read: not enough memory"),
    ],
    ids=["disk", "memory", "memory of torch"],
)
def test_a_read_that_fails_is_no_damage(checkpoint, monkeypatch, capsys, where, error, message, command):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*((files.paths, "read") if where == "read" else (torch, "load")), fail)
    if command:
        assert files.main([str(checkpoint / "content.pth")]) == 1
        assert message in capsys.readouterr().err
    else:
        with pytest.raises(Fault, match=message):
            files.load(str(checkpoint / "content.pth"))


def test_command(checkpoint):
    """As a user runs it: what is in the file, and the licence; no arguments, or too few, is code 2."""

    run = functools.partial(run_module, "ddgan_jax.storage.torch.files")
    result = run(checkpoint / "netG_1.pth", *(f"{k}={v}" for k, v in HINTS.items()))
    assert result.returncode == 0 and "nf=8" in result.stdout and "licence" in result.stdout
    result = run(checkpoint / "content.pth")
    assert result.returncode == 0 and "ngf=2, " in result.stdout and "a moving average" in result.stdout
    for argv, message in (
        ([], "usage"),
        ([checkpoint / "netG_1.pth"], "such as skip_rescale=True tanh=True centered=True image_size=32; main.py takes"),
        (["x.pth"], "no file x.pth|cannot be read"),
    ):
        result = run(*argv)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert any(part in result.stderr for part in message.split("|"))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (lambda: files.load("x.pth"), lambda: files.save("x.pth", {})):
        with pytest.raises(UserError, match="pip install torch"):
            call()
    assert convert.from_state_dict(state_dict(), like())["conv_in"]["bias"].shape == (32,)  # needs no torch


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=dict(num_classes=3)), "no class-conditional networks"),
        (dict(model=dict(patch_size=2)), r"no networks that work on patches \(model.patch_size=2\)"),
        (dict(generator=dict(nz=0)), r"no networks without a latent z \(generator.nz=0\)"),
        (
            dict(generator=dict(fir_kernel=(1, 2, 1))),
            r"no filter other than .*fir_kernel=\(1, 2, 1\)\)",
        ),
        (dict(model=dict(network="mlp"), generator=None), "no networks for points"),
        ({}, ""),
    ],
    ids=str,
)
def test_what_the_reference_cannot_run_is_not_exported(tmp_path, capsys, changes, message):
    """It would be read again as another generator, without a word."""
    c = as_dict(presets.get("gaussians:smoke" if "network" in changes.get("model", {}) else "digits:smoke"))
    for group, fields in changes.items():
        c[group] |= fields or {}
    denoiser = build.denoiser(c)
    model = Model(jax.jit(denoiser.init_gen)(jax.random.key(0)), denoiser, config.read(c), 0)
    out = tmp_path / "netG.pth"
    if message:
        with pytest.raises(UserError, match=f"the reference has {message}; write a"):
            generate.export(model, str(out))
        assert not out.exists()
    else:
        generate.export(model, str(out))
        assert f"T={model.num_steps}, the vp schedule, beta_min=0.1 and beta_max=" in capsys.readouterr().out


def test_the_diffusion_that_is_assumed_is_reported(checkpoint, capsys):
    """A netG_*.pth holds none, and the samples depend on it."""
    path = str(checkpoint / "netG_1.pth")
    ddgan_jax.load(path, **HINTS)
    assert "defaults are assumed, num_steps=4, beta_min=0.1, beta_max=20.0" in capsys.readouterr().out
    ddgan_jax.load(path, **HINTS, num_steps=2, beta_min=0.1, beta_max=20.0)
    assert not capsys.readouterr().out
