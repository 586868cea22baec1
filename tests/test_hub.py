"""Models of the Hugging Face Hub, from a server on loopback, and the model cards that describe them."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from commands import ROOT, all_succeed, start_group
from hub_server import COMMIT, Hub
from huggingface_hub import ModelCard, constants
from test_model import workdir_of

import ddgan_jax
from ddgan_jax.config import presets
from ddgan_jax.config.settings import read
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method.build import build, init_state
from ddgan_jax.model import loading
from ddgan_jax.storage import hub

DIGITS = (loading.PRETRAINED / "digits.safetensors").read_bytes()
NAME = "hf://me/digits"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with the digits, and an empty cache."""
    server = Hub({"model.safetensors": DIGITS, "README.md": b"digits"})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of huggingface_hub between two attempts
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


def test_load(server, tmp_path):
    """The second load takes the file from the cache."""
    bundled = ddgan_jax.load("digits")
    for _ in range(2):
        model = ddgan_jax.load(NAME)
        assert (repr(model), model.config, model.about) == (repr(bundled), bundled.config, bundled.about)
    jax.tree.map(np.testing.assert_array_equal, model.params, bundled.params)
    assert server.downloads() == ["/me/digits/resolve/main/model.safetensors"]
    assert loading.config_of(NAME) == bundled.config
    assert os.listdir(tmp_path) == ["cache"]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", COMMIT])
def test_a_revision(server, revision):
    ddgan_jax.load(f"{NAME}@{revision}")
    assert server.downloads() == [f"/me/digits/resolve/{revision.replace('/', '%2F')}/model.safetensors"]


def test_the_file(server):
    """The only .safetensors file, model.safetensors, or the one that is named."""
    server.files = {"half.safetensors": DIGITS, "weights.bin": b""}
    assert pathlib.Path(hub.download(NAME)).name == "half.safetensors"
    server.files = {"a.safetensors": b"", "model.safetensors": DIGITS, "sub/b.safetensors": DIGITS}
    assert pathlib.Path(hub.download(NAME)).name == "model.safetensors"
    assert hub.download(f"{NAME}@v1/sub/b.safetensors").endswith(f"{COMMIT}/sub/b.safetensors")
    ddgan_jax.load(f"{NAME}/sub/b.safetensors")


@pytest.mark.parametrize(
    "path, expected",
    [
        (NAME, "digits.sample.png"),
        (f"{NAME}@v1", "digits.sample.png"),
        (f"{NAME}@v1/model.safetensors", "digits.model.sample.png"),
        (f"{NAME}/sub/half.safetensors", "digits.half.sample.png"),
    ],
)
def test_results_are_written_into_the_current_folder(path, expected):
    assert loading.default_output(path, "sample.png") == expected


@pytest.mark.parametrize(
    "path",
    [
        "hf://", "hf://digits", "hf:/me/digits", "hf://me/", "hf:///digits", "hf://me/digits@", "hf://me/digits/", "hf://me/..",
        "hf://../digits", "hf://me/digits@../..", "hf://me/dig its", "hf://me/digits/model", "hf://me/model.safetensors",
        "hf://me/digits/../x.safetensors", "hf://me/digits//x.safetensors", "hf://me/digits/a\\b.safetensors",
        "hf://me/digits/C:x.safetensors", "hf://me/digits/\x1b.safetensors", "hf://me/a--b", "hf://datasets/me/digits",
    ],
)  # fmt: skip
def test_malformed_names(server, path):
    with pytest.raises(UserError, match=r"names no model of the Hub"):
        ddgan_jax.load(path)
    assert not any("me/" in path for _, path, _ in server.requests)


@pytest.mark.parametrize("path", [f"{NAME}/netG.pth", f"{NAME}@v1/weights.bin", "hf://me/model.pth", f"{NAME}/a.pkl"])
def test_only_safetensors(server, path):
    for use in (ddgan_jax.load, loading.config_of, lambda path: loading.default_output(path, "x")):
        with pytest.raises(UserError, match=r"only \.safetensors files are read from the Hub.*pickle"):
            use(path)


def answer(status, kind="revision", **headers):
    """A change of a server: it answers requests with an error."""
    return lambda server: server.errors.update({kind: (status, {k.replace("_", "-"): v for k, v in headers.items()})})


def files(*names, **more):
    """A change of a server: the names of its files, which are empty."""
    return lambda server: vars(server).update(files=dict.fromkeys(names, b""), **more)


def redirect(path):
    """A change of a server: it redirects downloads to another host, which is the same computer."""
    return lambda server: vars(server).update(location=f"http://localhost:{server.port}{path}")


@pytest.mark.parametrize(
    "change, path, message",
    [
        (files("a.safetensors"), "hf://me/other", "there is no model me/other, or it is private: .*`hf auth login`"),
        (files("a.safetensors"), f"{NAME}@v2", "me/digits has no revision v2"),
        (files("b.safetensors"), f"{NAME}/a.safetensors", "no such file; the repository has b.safetensors"),
        (files("b.safetensors", "a.safetensors"), NAME, "has several models: .*a.safetensors, b.safetensors"),
        (
            files(*(f"{i}.safetensors" for i in range(10, 50))),
            NAME,
            r"one of 10.safetensors, .*29.safetensors, \.\.\.$",
        ),
        (files("README.md"), NAME, "has no .safetensors file: `Model.save`"),
        (files("pytorch_model.bin"), NAME, "has no .safetensors file, only pytorch_model.bin, and a pickle can run"),
        (files("netG.pth"), f"{NAME}/a.safetensors", "has no .safetensors file, only netG.pth"),
        (files("../../x.safetensors", "/etc/x.safetensors"), NAME, "has no .safetensors file: `Model.save`"),
        (files("\x1b[2Jx.safetensors", "a\\..\\x.safetensors"), NAME, "has no .safetensors file: `Model.save`"),
        (files("a.safetensors", sizes={"a.safetensors": 2**40}), NAME, "has 1,024.0 GiB, and at most 4 GiB are read"),
        (answer(401, X_Error_Message="Invalid credentials in Authorization header"), NAME, "HF_TOKEN"),
        (answer(403), NAME, "is not accessible .*: log in with `hf auth login` or set HF_TOKEN"),
        (answer(403, "resolve", X_Error_Code="GatedRepo"), NAME, "is gated: accept the conditions .* HF_TOKEN"),
    ],
)
def test_refusals(server, tmp_path, change, path, message):
    """One line, before anything is written outside the cache, and without a download."""
    change(server)
    with pytest.raises(UserError, match=message) as caught:
        ddgan_jax.load(path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert not server.downloads() and set(os.listdir(tmp_path)) <= {"cache"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda server: server.close(), "cannot be downloaded: ConnectError"),
        (answer(503), "cannot be downloaded: HfHubHTTPError"),
        (answer(200), "cannot be downloaded: JSONDecodeError"),
        (files("a.safetensors", sizes={"a.safetensors": None}), "the Hub does not report its size"),
        (files("a.safetensors", sizes={"a.safetensors": "x"}), "cannot be downloaded: TypeError"),
        (lambda server: server.cut.update(dict.fromkeys(range(9), 0)), "cannot be downloaded: RemoteProtocolError"),
        (redirect("/cdn/README.md"), "cannot be downloaded: .*Consistency check"),
        (lambda server: server.files.update({"model.safetensors": DIGITS[:-9]}), "is damaged.*`hf cache rm model/me"),
        (lambda server: server.files.update({"model.safetensors": b"x"}), "is damaged, or no safetensors file"),
    ],
)  # fmt: skip
def test_faults(server, tmp_path, change, message):
    change(server)
    with pytest.raises(Fault, match=message) as caught:
        ddgan_jax.load(NAME)
    assert "\n" not in str(caught.value) and set(os.listdir(tmp_path)) <= {"cache"}


def test_a_redirection_gets_no_token(server, monkeypatch):
    """The Hub redirects large files to other hosts."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    redirect("/cdn/model.safetensors")(server)
    ddgan_jax.load(NAME)
    sent = [(path.startswith("/cdn/"), "hf_secret" in str(headers)) for _, path, headers in server.requests]
    assert (True, False) in sent and (False, True) in sent and (True, True) not in sent


def test_a_closed_connection(server):
    """The download is tried again: by huggingface_hub, or in early versions by the next load."""
    server.cut = {1: 100_000}
    with contextlib.suppress(Fault):
        ddgan_jax.load(NAME)
    ddgan_jax.load(NAME)
    assert len(server.downloads()) == 2


def test_a_redirection_to_a_file(server, tmp_path):
    """The scheme is not supported; early versions of huggingface_hub ask the Hub for this path."""
    (tmp_path / "secret.safetensors").write_bytes(DIGITS)
    server.location = f"file://{tmp_path}/secret.safetensors"
    with pytest.raises((Fault, UserError)):
        ddgan_jax.load(NAME)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_without_a_network(server, monkeypatch, capsys):
    """The copy in the cache is used: with a note, or silently in the offline mode."""
    server.files["b.safetensors"] = DIGITS
    ddgan_jax.load(NAME)
    server.close()
    ddgan_jax.load(NAME)
    ddgan_jax.load(f"{NAME}@main/model.safetensors")
    assert capsys.readouterr().out.count("Connection refused; the copy in the cache is used\n") == 2
    with pytest.raises(Fault, match="v1 cannot be downloaded: ConnectError"):
        ddgan_jax.load(f"{NAME}@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ddgan_jax.load(NAME)
    ddgan_jax.load(f"{NAME}@{COMMIT}")
    assert not capsys.readouterr().out
    for path in (f"{NAME}@v1", f"{NAME}/b.safetensors", "hf://me/other"):
        with pytest.raises(UserError, match="is not in the cache, and HF_HUB_OFFLINE is set"):
            ddgan_jax.load(path)
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(UserError, match="is not in the cache"):
        ddgan_jax.load(NAME)


def test_a_file_of_another_program(server):
    server.files["model.safetensors"] = safetensors.numpy.save({"weight": np.zeros(3)}, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^{NAME}: .*was not written by ddgan_jax"):
        ddgan_jax.load(NAME)


def test_a_file_that_is_larger_than_declared(server, monkeypatch):
    monkeypatch.setattr(hub, "MAX_BYTES", 1000)
    server.sizes["model.safetensors"] = 1000
    with pytest.raises(UserError, match="GiB are read from the Hub"):
        ddgan_jax.load(NAME)


def test_without_huggingface_hub(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub: run `pip install huggingface_hub`"):
        ddgan_jax.load(NAME)


def test_init_from(server):
    config = presets.get("digits")
    config.train.init_from = NAME
    c = read(config)
    like = jax.eval_shape(lambda: init_state(build(c), 0))
    where, gen_params, disc_params = loading.load_initial_networks(c, like)
    assert (where, disc_params) == (NAME, None)
    jax.tree.map(np.testing.assert_array_equal, gen_params, ddgan_jax.load("digits").params)


def environment(server, cache):
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}


def test_a_command(server, tmp_path):
    """Its result is in the current folder, and an error is one line."""
    flags = ["--mode=sample", "--num_samples=4", f"--checkpoint={NAME}"]
    env = os.environ | environment(server, tmp_path / "home")
    command = [sys.executable, "-m", "ddgan_jax", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["digits.sample.png", "home"]


@pytest.mark.slow
def test_processes(server, tmp_path):
    """Process 0 downloads."""
    flags = ["--mode=sample", "--num_samples=4", f"--checkpoint={NAME}", f"--out={tmp_path / 'samples.npz'}"]
    all_succeed(start_group(2, *flags, env=environment(server, tmp_path / "home")))
    assert len(server.downloads()) == 1
    assert len([path for _, path, _ in server.requests if path.startswith("/api/models/")]) == 1


# --- Model cards ------------------------------------------------------------------------------------------------


def test_a_card(tmp_path):
    """The Hub's own reader accepts its metadata."""
    model = ddgan_jax.load("digits_conditional")
    given = {"measures": {"fid": 3.14159, "modes": np.int64(10), "data": "x"}, "license": "mit", "repository": "me/a"}
    model.save(tmp_path / "model.safetensors", card=given)
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "ddgan_jax" and card.data.license == "mit"
    assert card.data.pipeline_tag == "unconditional-image-generation" and "ddgan_jax" in card.data.tags
    for line in (
        "# Denoising Diffusion GAN of `digits`",
        "handwritten digits by class, 8x8",
        "| classes | 10: `0`, `1`, `2`, `3`, `4`, `5`, `6`, `7`, `8`, `9` |",
        "| image size | 8x8, channels: 1 |",
        "| denoising steps T | 3 |",
        "| training steps | 7,500 |",
        'model = ddgan_jax.load("hf://me/a")',
        "images = model.sample(64, seed=0)  # uint8 [64, 8, 8, 1]",
        "| `fid` | 3.142 |",
        "| `modes` | 10 |",
        "| `train.lr_d` | `0.002` |",
        "| `generator.ch_mult` | `[1, 2]` |",
    ):
        assert f"\n{line}\n" in card.text, line
    assert "`data` |" not in card.text and "checkpoint.every" not in card.text and "train.lr_decay" not in card.text
    assert "The weights have the licence `mit`." in card.text


def test_a_card_by_default(tmp_path):
    """Measures in the file, no licence, points, the file's name, and no path of the training."""
    model = ddgan_jax.load("gaussians")
    data = dataclasses.replace(model.config.data, path="/home/me/photos", name="a`|<b>\n# x")
    train = dataclasses.replace(model.config.train, init_from="/home/me/run")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data, train=train))
    model.save(tmp_path / "half.safetensors", half=True, card=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None and card.data.pipeline_tag is None
    assert "| `high_quality` | 0.985 |" in card.text and 'load("hf://OWNER/NAME/half.safetensors")' in card.text
    assert "/home/me" not in card.text and "| `data.path` | a path |" in card.text
    assert "GAN of `a<b> # x`\n" in card.text and "# float32 [64, 2]" in card.text
    model.save(tmp_path / "none" / "model.safetensors")
    assert os.listdir(tmp_path / "none") == ["model.safetensors"]


def test_a_card_of_a_checkpoint(tmp_path):
    """It has the measures of `--mode=evaluate`, if there are any, and neither it nor the file contains a path."""
    run, private = workdir_of(tmp_path / "run"), str(tmp_path)
    file = tmp_path / "shared" / "model.safetensors"
    evaluated = run / "evaluation" / "7" / "results.json"
    evaluated.parent.mkdir(parents=True)
    other = {"features": "classifier", "data": "digits train", "fid": 1.0}  # the run's data are synthetic
    with_other_data = {"features": "classifier", "fid": 1.0, "trained_on_other_data": "100 images"}
    other_features = {"features": "inception", "fid": 1.0}
    found = [json.dumps(results) for results in (other, with_other_data, other_features)]
    for content in ("[1, 2", "[" * 100_000, "[1, 2]", '{"features": "classifier", "fid": "low"}', *found):
        evaluated.write_text(content)
        assert ddgan_jax.load(run).about == {}, content
    evaluated.write_text('{"step": 7, "features": "classifier", "fid": 3.14159, "num_samples": 50000, "seconds": 7}')
    for path in (run, run / "checkpoints" / "7"):
        model = ddgan_jax.load(path)
        data = dataclasses.replace(model.config.data, path=private, dir=private)
        evaluation = dataclasses.replace(model.config.eval, vgg_weights=private)
        records = dataclasses.replace(model.config.log, wandb=private)
        config = dataclasses.replace(model.config, data=data, eval=evaluation, log=records)
        given = dataclasses.replace(model, config=config)
        given.save(file, card=True)
        card = (file.parent / "README.md").read_text()
        assert "| `fid` | 3.142 |\n| `num_samples` | 50,000 |\n\n" in card and "seconds" not in card
        assert private not in card and private.encode() not in file.read_bytes()
        assert ddgan_jax.load(file).config == model.config
    own = dataclasses.replace(model.config.eval, features="acme.metrics:f")
    dataclasses.replace(model, config=dataclasses.replace(model.config, eval=own)).save(file)
    assert b"acme" not in file.read_bytes()


def test_a_card_replaces_only_its_own(tmp_path):
    model, readme = ddgan_jax.load("digits"), tmp_path / "README.md"
    model.save(tmp_path / "model.safetensors", card=True)
    model.save(tmp_path / "model.safetensors", card={"license": "mit"})
    (tmp_path / "model.safetensors").unlink()
    for content in (readme.read_text() + "Mine.\n", "My model" + readme.read_text(), "", "Mine."):
        readme.write_text(content)
        with pytest.raises(UserError, match=r"README.md was not written by `save`, or was changed since"):
            model.save(tmp_path / "model.safetensors", card=True)
        assert readme.read_text() == content and os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize(
    "card, message",
    [
        ("yes", "must be True, or a dict of measures, license, repository"),
        ({"fid": 3}, "must be True, or a dict of measures, license, repository"),
        ({"measures": 3.1}, "must be a dict of numbers by name"),
        ({"license": "mit\nlibrary_name: x"}, "license=.*must be a name of the Hub"),
        ({"repository": "me"}, "hf://me names no model of the Hub"),
        ({"repository": "me/a@v1"}, "repository='me/a@v1' must be 'OWNER/NAME'"),
    ],
)
def test_invalid_cards(tmp_path, card, message):
    with pytest.raises(UserError, match=message):
        ddgan_jax.load("gaussians").save(tmp_path / "model.safetensors", card=card)
    assert not os.listdir(tmp_path)
