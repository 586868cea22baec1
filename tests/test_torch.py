"""Checkpoints of the reference: real files, round trips, and files that must not be trusted."""

import dataclasses
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
from conftest import GOLDEN, Golden

import ddgan_jax
from ddgan_jax.commands import generate
from ddgan_jax.config import presets
from ddgan_jax.config import settings as config
from ddgan_jax.config.settings import as_dict
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method import build
from ddgan_jax.model.model import Model
from ddgan_jax.networks.discriminator import Discriminator
from ddgan_jax.networks.generator import Generator
from ddgan_jax.storage.torch import architecture, convert, files

torch = pytest.importorskip("torch")
HINTS = dict(image_size=16, skip_rescale=True, tanh=True, centered=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The reference's own files, unpacked."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in (GOLDEN / "checkpoint").glob("*.pth.xz"):
        (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return folder


def outputs(golden, found, params):
    generator = Generator(**found.generator)
    apply = jax.jit(lambda p: generator.apply({"params": p}, golden.nhwc("x"), golden.ints("t"), golden["z"]))
    return np.asarray(apply(params)).transpose(0, 3, 1, 2)


@pytest.mark.golden
def test_real_checkpoints(checkpoint):
    golden = Golden("checkpoint/expected")
    found = files.read(str(checkpoint / "netG_1.pth"), **HINTS)
    np.testing.assert_allclose(outputs(golden, found, found.gen_params), golden["out_netG_1_ema"], atol=2e-5)

    run = files.read(str(checkpoint / "content.pth"))  # brings its flags, needs no hints
    assert run.generator == found.generator | {"dropout": 0.0, "fir_kernel": (1, 3, 3, 1)}
    assert run.args["num_timesteps"] == 4
    np.testing.assert_allclose(outputs(golden, run, run.gen_params), golden["out_content_netG"], atol=2e-5)
    np.testing.assert_allclose(outputs(golden, run, run.ema_params), golden["out_netG_1_ema"], atol=2e-5)
    disc = Discriminator(**run.discriminator)
    # Two images are one group of the minibatch stddev, strided or not.
    logits = jax.jit(lambda p: disc.apply({"params": p}, golden.nhwc("x_prev"), golden.ints("t"), golden.nhwc("x")))
    np.testing.assert_allclose(logits(run.disc_params), golden["out_content_netD"][:, 0], atol=2e-5)


@pytest.mark.golden
def test_round_trip_through_a_file(checkpoint, tmp_path):
    """import -> export -> import is the identity, and the exported file is the imported one: keys, order, bits."""
    content = files.load(str(checkpoint / "content.pth"))
    cases = (
        (files.load(str(checkpoint / "netG_1.pth")), convert.generator_params, convert.generator_state_dict),
        (content["netG_dict"], convert.generator_params, convert.generator_state_dict),
        (content["netD_dict"], convert.discriminator_params, convert.discriminator_state_dict),
    )
    for original, read, write in cases:
        params = read(original)
        files.save(str(tmp_path / "again.pth"), write(params))
        again = files.load(str(tmp_path / "again.pth"))
        assert list(again) == list(original)
        for key, value in original.items():
            assert again[key].dtype == value.dtype and again[key].tobytes() == value.tobytes(), key
        jax.tree.map(np.testing.assert_array_equal, read(again), params)


def state_dict():
    return {k: v.copy() for k, v in Golden("generator_01_default32").below("sd/").items()}


def test_what_the_arrays_do_not_tell_is_asked_for():
    sd = state_dict()
    with pytest.raises(UserError, match=r"do not tell skip_rescale, tanh, centered, image_size.*skip_rescale=True"):
        architecture.generator_config(sd)
    with pytest.raises(UserError, match="do not tell tanh"):
        architecture.generator_config(sd, image_size=32, skip_rescale=True, centered=True)
    config = architecture.generator_config(sd, **(HINTS | dict(image_size=64, tanh=False)))
    assert config["attn_resolutions"] == (32,) and not config["tanh"]
    for hints, message in (
        (dict(nf=64), "nf=64 contradicts the arrays, which say 32"),
        (dict(num_channels_dae=64), "nf=64 contradicts"),
        (dict(ch_mult=[1, 2, 2]), "ch_mult"),
        (dict(fir=False), "fir=False contradicts"),
        (dict(attn_resolutions=[8]), r"attn_resolutions=\(8,\) contradicts the arrays, which say \(16,\)"),
        (dict(imagesize=32), "unknown hint 'imagesize'"),
        (dict(embedding_type="fourier"), "Fourier"),
    ):
        with pytest.raises(UserError, match=message):
            architecture.generator_config(sd, **(HINTS | dict(image_size=32) | hints))
    assert (
        architecture.generator_config(sd, **(HINTS | dict(image_size=32, attn_resolutions=[16], not_use_tanh=True)))[
            "tanh"
        ]
        is False
    )


def fields_of(**options):
    """All fields of a small Generator that are hints, and its state dict."""
    small = dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), nz=6, z_emb_dim=8, n_mlp=1)
    generator = Generator(**(small | options))
    inputs = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1, jnp.int32), jnp.zeros((1, generator.nz))
    shapes = jax.eval_shape(generator.init, jax.random.key(0), *inputs)["params"]
    no_hints = ("parent", "name", "dtype", "num_classes", "patch_size", "remat")
    fields = {f.name: getattr(generator, f.name) for f in dataclasses.fields(generator) if f.name not in no_hints}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return fields | {"image_size": 16}, convert.generator_state_dict(zeros)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(ch_mult=(2,), attn_resolutions=()),
        dict(nz=0, dropout=0.1, progressive="output_skip", tanh=False),
        dict(progressive_input="input_skip", progressive_combine="cat", fir=False, skip_rescale=False),
        dict(resblock_type="ddpm", resamp_with_conv=False, progressive_input="none", conditional=False),
    ],
    ids=str,
)
def test_all_fields_of_a_generator_can_be_hints(options):
    """They agree with its own arrays; one that does not is named."""
    fields, sd = fields_of(**options)
    config = architecture.generator_config(sd, **fields)
    assert config.items() <= fields.items() and config["dropout"] == fields["dropout"]
    other = dict(image_channels=1, nf=16, ch_mult=(1, 3), num_res_blocks=2, nz=7, z_emb_dim=9, n_mlp=3)
    other |= dict(resblock_type="biggan_oneadagn", conditional=not fields["conditional"])
    other |= dict(attn_resolutions=(16, 8)) if "attn_resolutions" not in options else {}
    if "progressive" in config:
        other |= dict(progressive={"none": "output_skip"}.get(fields["progressive"], "none"))
        other |= dict(progressive_input={"none": "residual"}.get(fields["progressive_input"], "none"))
    for name, value in other.items():
        with pytest.raises(UserError, match=f"the hint {name}=.* contradicts the arrays"):
            architecture.generator_config(sd, **(fields | {name: value}))


@pytest.mark.parametrize(
    "hints, message",
    [
        (dict(image_size="32"), "image_size='32' must be a int"),
        (dict(tanh="true"), "tanh='true' must be a bool"),
        (dict(attn_resolutions=16), "attn_resolutions=16 must be a tuple"),
        (dict(ch_mult=2), "ch_mult=2 contradicts the arrays"),
        (dict(path=1), "unknown hint 'path'"),
    ],
    ids=str,
)
def test_hints_that_make_no_sense(hints, message):
    with pytest.raises(UserError, match=message):
        architecture.generator_config(state_dict(), **(HINTS | hints))


@pytest.mark.golden
def test_hints_may_not_contradict_the_flags_of_a_run(checkpoint):
    path = str(checkpoint / "content.pth")
    assert files.read(path, **HINTS).generator == files.read(path).generator
    for name in HINTS:
        with pytest.raises(UserError, match=f"the hint {name}=.* contradicts the run"):
            files.read(path, **(HINTS | {name: 8 if name == "image_size" else False}))


@pytest.mark.golden
def test_a_configuration_may_not_contradict_the_diffusion_of_a_run(checkpoint):
    """Its T and betas were ignored, and those of the configuration sampled from."""
    path, c = str(checkpoint / "content.pth"), as_dict({})
    c["data"] |= dict(image_size=16, channels=3)
    c["generator"] |= dict(nf=8, n_mlp=2, ch_mult=(1, 2), num_res_blocks=1, nz=8, z_emb_dim=16)
    assert ddgan_jax.load(path, c).num_steps == 4
    for other in (dict(num_steps=2, beta_max=6.0), dict(beta_max=0.9, kind="geometric"), dict(beta_min=0.2)):
        right = " ".join(f"--config.diffusion.{name}={c['diffusion'][name]}" for name in other)
        with pytest.raises(UserError, match=f"had another diffusion .*: set {right}"):
            ddgan_jax.load(path, c | {"diffusion": c["diffusion"] | other})
    with pytest.raises(UserError, match="had another diffusion"):
        ddgan_jax.load(str(checkpoint / "netG_1.pth"), c, num_steps=8)
    with pytest.raises(UserError, match="num_timesteps=8 contradicts the run"):
        ddgan_jax.load(path, num_steps=8)


def test_other_parameters_are_not_exported():
    params = convert.generator_params(state_dict())
    for other in ({}, params | {"class": {"embedding": np.zeros((10, 32))}}, {"dense_0": params["z_0"]}):
        for export in (convert.generator_state_dict, convert.discriminator_state_dict):
            with pytest.raises(UserError, match="is missing, unknown, or of a wrong shape"):
                export(other)


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
        changed(all_modules__3__Conv_1__weight=None),
        changed(all_modules__3__Conv_1__bias=None),
        changed(all_modules__99__weight=np.zeros((3, 3))),
        changed(all_modules__3__Conv_9__weight=np.zeros((3, 3))),
        changed(all_modules__0__W=np.zeros(16), all_modules__0__weight=None, all_modules__0__bias=None),
        changed(z_transform__1__weight=None),
        changed(z_transform__2__weight=np.zeros((3, 3))),
        changed(all_modules__2__weight="text"),
        changed(all_modules__3__Conv_0__weight=np.zeros(32, np.float32)),
        changed(all_modules__3__Dense_0__bias=None),
        changed(all_modules__2__bias=np.zeros(32)),  # float64
        changed(z_transform__3__weight=None, z_transform__3__bias=None),
        Golden("discriminator_small").below("sd/"),
    ],
    ids=lambda sd: str(len(sd)),
)
def test_other_state_dicts_are_refused_as_generators(sd):
    with pytest.raises(UserError) as error:
        convert.generator_params(sd)
    assert "\n" not in str(error.value)


def test_other_state_dicts_are_refused_as_discriminators():
    with pytest.raises(UserError, match="no state dict of a DDGAN discriminator"):
        convert.discriminator_params(state_dict())
    sd = Golden("discriminator_small").below("sd/")
    sd.pop("end_linear.weight"), sd.pop("end_linear.bias")
    with pytest.raises(UserError, match=r"'end_linear\.bias' is missing"):
        convert.discriminator_params(sd)


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
    assert (
        result.returncode == 0 and "Discriminator(ngf=2" in result.stdout and "moving average included" in result.stdout
    )
    for arguments, message in (
        ([], "usage"),
        ([checkpoint / "netG_1.pth"], "do not tell"),
        (["x.pth"], "no file x.pth|cannot be read"),
    ):
        result = run(*arguments)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert any(part in result.stderr for part in message.split("|"))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (lambda: files.load("x.pth"), lambda: files.save("x.pth", {})):
        with pytest.raises(UserError, match="pip install torch"):
            call()
    assert jnp.asarray(convert.generator_params(state_dict())["conv_in"]["bias"]).shape == (
        32,
    )  # state dicts need no torch


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
