"""Class-conditional models: labels from the data through networks, step and sampler to the evaluation."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_python, succeed
from test_model import grow, workdir_of
from test_parallel import run_with_devices

import ddgan_jax
from ddgan_jax.commands import demo_page, figures, generate
from ddgan_jax.config import presets
from ddgan_jax.config.settings import DataConfig, as_dict
from ddgan_jax.data.batches import batches, match_label_frequencies
from ddgan_jax.data.resolve import labels_of
from ddgan_jax.data.sources import Data, open_data
from ddgan_jax.errors import UserError
from ddgan_jax.method import train_step
from ddgan_jax.method.build import build, init_state
from ddgan_jax.model.classes import index_of, parse_label
from ddgan_jax.networks.discriminator import Discriminator, preset
from ddgan_jax.networks.generator import Generator
from ddgan_jax.storage import checkpoint, manager, safetensors

CONDITIONAL = ("--config=configs/digits.py:smoke", "--config.data.name=digits", "--config.model.num_classes=10")


def test_the_discriminator_adds_a_projection_of_the_class():
    """logit(x, y) - logit(x, y') = <v_y - v_y', h>: linear in the class vectors, and nothing else knows the class."""
    net = Discriminator(ngf=4, t_emb_dim=8, num_classes=3, **preset(8))
    x, t, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 8, 1)), jnp.zeros(8, jnp.int32), jnp.arange(8) % 3
    params = jax.jit(lambda k: net.init(k, x[0], t, x[1], y)["params"])(jax.random.key(1))
    vectors = params["class"]["embedding"]
    logits = jax.jit(lambda v, y: net.apply({"params": params | {"class": {"embedding": v}}}, x[0], t, x[1], y))
    plain = dataclasses.replace(net, num_classes=0)
    without = {name: value for name, value in params.items() if name != "class"}
    unconditional = jax.jit(lambda p: plain.apply({"params": p}, x[0], t, x[1]))(without)
    np.testing.assert_allclose(logits(0 * vectors, y), unconditional, atol=1e-6)
    part = logits(vectors, y) - unconditional
    assert np.abs(part).min() > 0
    np.testing.assert_allclose(logits(2 * vectors, y) - unconditional, 2 * part, rtol=1e-4, atol=1e-6)
    only = vectors.at[1:].set(0)
    np.testing.assert_allclose(logits(only, y) - unconditional, np.where(y == 0, part, 0), atol=1e-6)


def test_the_generator_adds_the_class_to_z_emb():
    net = Generator(
        nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), nz=4, z_emb_dim=8, n_mlp=1, num_classes=3
    )
    x, t, z = jnp.ones((6, 8, 8, 3)), jnp.zeros(6, jnp.int32), jnp.ones((6, 4))
    y = jnp.array([0, 1, 2, 0, 1, 2])
    params = grow(jax.jit(lambda k: net.init(k, x, t, z, None, y)["params"])(jax.random.key(0)))
    run_ = jax.jit(lambda p, y: net.apply({"params": p}, x, t, z, None, y))
    images = run_(params, y)
    np.testing.assert_allclose(images[:3], images[3:], atol=1e-5)
    assert min(float(np.abs(images[i] - images[j]).max()) for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-3
    plain = dataclasses.replace(net, num_classes=0)
    without = {name: value for name, value in params.items() if name != "class"}
    zero = params | {"class": jax.tree.map(jnp.zeros_like, params["class"])}
    np.testing.assert_allclose(run_(zero, y), plain.apply({"params": without}, x, t, z), atol=1e-5)


TOY = """
import jax, jax.numpy as jnp, numpy as np, optax
from ddgan_jax.devices import parallel
from ddgan_jax.method import state as state_lib, train_step
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.losses import Losses
from ddgan_jax.method.sampling import Denoiser

schedule = Schedule.create(1)
method = train_step.Method(
    denoiser=Denoiser(lambda params, x, t, z, y: params[y][:, None] + 0 * x, None, schedule, (1,), nz=1),
    init_disc=None,
    disc=lambda params, x_t, t, x_tp1, y, axis_name=None: params[y] * x_t[:, 0],
    losses=Losses(schedule, r1_gamma=0.0), optimizer=optax.identity(),
    lr_g=state_lib.constant_schedule(1.0), lr_d=state_lib.constant_schedule(1.0),
    ema_decay=0.0, batch_size=16,
)
start = state_lib.create(jnp.zeros(5), jnp.array([0.0, 0.0, 0.0, 1.0, 0.0]), method.optimizer)
images = (1.0 + np.arange(16.0, dtype=np.float32))[:, None]
labels = (np.arange(16) % 3).astype(np.int32)
"""


def test_labels_reach_both_networks_in_both_phases():
    """In closed form: D(x, y) = w_y x and G = v_y, from w = v = 0, T = 1, so that the real x_t is x_0.

    D's gradient in w_y is -mean over the batch of [label = y] x_0 / 2, since the fake x_t is 0; G's step then follows
    sigmoid(0) w_y. The class that is in no example (3) stays, and so does its generator.
    """
    scope = {}
    exec(TOY, scope)
    method, images, labels = scope["method"], scope["images"], scope["labels"]
    state, _ = jax.jit(train_step.make_train_step(method, 0, False))(scope["start"], (images, labels))
    expected = np.array([images[labels == y].sum() / 16 / 2 for y in range(5)])
    np.testing.assert_allclose(state.disc_params, np.add(expected, [0, 0, 0, 1, 0]), rtol=1e-5)
    share = np.bincount(labels, minlength=5) / 16
    np.testing.assert_allclose(state.gen_params, share * expected / 2, rtol=1e-5)


def test_labels_follow_their_images_onto_four_devices():
    script = (
        TOY
        + """
assert jax.device_count() == 4
one = jax.jit(train_step.make_train_step(method, 0, True))(start, (images, labels))
step = train_step.make_train_step(method, 0, True, parallel.AXIS)
state, batch = parallel.replicate(start), parallel.split((images, labels))
four = parallel.compile_steps([step], state, batch)[0].result()(state, batch)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one[0], four[0])
print("same")
"""
    )
    assert run_with_devices(script, 4).split()[-1] == "same"


def test_batches_keep_images_and_labels_together():
    images = np.arange(10, dtype=np.uint8)[:, None]
    how = dict(global_batch=4, seed=3, start_step=2, process_index=1, process_count=2)
    stream, plain = batches(images, labels=np.arange(10) * 7, **how), batches(images, **how)
    for _ in range(6):
        found, labels = next(stream)
        np.testing.assert_array_equal(found[:, 0] * 7, labels)
        np.testing.assert_array_equal(found, next(plain))


def test_samples_to_be_judged_are_of_the_classes_of_the_real_ones():
    labels = np.array([5] * 30 + [2] * 10, np.int32)
    np.testing.assert_array_equal(np.bincount(match_label_frequencies(labels, 80)), 2 * np.bincount(labels))
    assert match_label_frequencies(None, 80) is None


def test_the_number_of_classes_is_that_of_the_data(refused, tmp_path):
    digits = open_data(DataConfig("digits"))
    np.testing.assert_array_equal(labels_of(digits, 10, "digits"), digits.labels())
    assert labels_of(digits, 0, "digits") is None
    for data, count, message in (
        (digits, 9, "model.num_classes=9, but dataset digits has 10 classes"),
        (Data(digits.images), 10, "model.num_classes=10, but dataset x has no labels"),
    ):
        with pytest.raises(UserError, match=message):
            labels_of(data, count, "digits" if data is digits else "x")
    assert "has no labels" in refused(*CONDITIONAL, "--config.data.name=synthetic", f"--workdir={tmp_path}")


# --- A model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return workdir_of(tmp_path_factory.mktemp("conditional"), num_classes=3)


@pytest.fixture(scope="module")
def model(workdir):
    return ddgan_jax.load(str(workdir))


def test_a_label_for_all_for_each_or_for_none(model):
    """Sample i of class c is the same however it is asked for."""
    images = {c: model.sample(7, seed=2, label=c) for c in range(3)}
    assert min(np.abs(images[a].astype(int) - images[b]).max() for a, b in ((0, 1), (1, 2), (0, 2))) > 3
    mixed = [2, 2, 0, 1, 0, 1, 1]
    np.testing.assert_array_equal(
        model.sample(7, seed=2, label=mixed), np.stack([images[c][i] for i, c in enumerate(mixed)])
    )
    np.testing.assert_array_equal(model.sample(7, seed=2), np.stack([images[i % 3][i] for i in range(7)]))
    # sample.batch_size is 8: three chunks, the last of them not full
    whole = model.sample(19, seed=2, label=np.arange(19) % 2)
    np.testing.assert_array_equal(whole[:7], model.sample(7, seed=2, label=np.arange(7) % 2))


GREY = np.full((8, 8, 1), 99, np.uint8)
JOBS = [
    lambda m, c: m.sample(2, label=c),
    lambda m, c: m.trajectory(2, label=c).x_t[0],
    lambda m, c: m.vary(2, 3, label=c)[1],
    lambda m, c: m.vary(2, 3, GREY, label=c)[1],
    lambda m, c: m.edit(GREY, 4, 2, label=c),
    lambda m, c: m.inpaint(GREY, np.zeros((8, 8)), 2, label=c),
    lambda m, c: m.interpolate(2, label=c),
]


@pytest.mark.parametrize("job", JOBS)
def test_every_job_knows_the_label_and_its_name(model, job):
    """A name may stand alone, and in lists and arrays; an integer remains an index."""
    named, expected = dataclasses.replace(model, classes=("ant", "Zebra", "1")), job(model, 1)
    np.testing.assert_array_equal(job(model, 1), expected)
    assert not np.array_equal(job(model, 2), expected)
    for label in (1, "Zebra", np.str_("Zebra"), ["Zebra", 1], np.array(["Zebra", "Zebra"]), np.array("Zebra")):
        np.testing.assert_array_equal(job(named, label), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.sample(2, label=3), "label=3 must be a class of this model, 0 to 2, or 2 of them"),
        (lambda m: m.sample(2, label=-1), "label=-1 must be a class"),
        (lambda m: m.sample(2, label=[0, 1, 2]), r"label=\[0, 1, 2\] must be a class of this model, 0 to 2, or 2 of"),
        (lambda m: m.sample(2, label=0.5), "label=0.5 must be a class"),
        (lambda m: m.vary(2, 1), "these images are of one class: choose it, label=0 to 2"),
        (lambda m: m.interpolate(2), "these images are of one class"),
        (lambda m: generate.export(m, "x.pth"), "the reference has no class-conditional networks"),
    ],
)
def test_wrong_use(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_an_unconditional_model_takes_no_label(tmp_path):
    with pytest.raises(UserError, match="label=1: this model is unconditional"):
        ddgan_jax.load(str(workdir_of(tmp_path))).sample(2, label=1)


def test_an_old_checkpoint_has_no_field_for_classes(tmp_path):
    config = as_dict(presets.get("digits:smoke"))
    del config["model"]["num_classes"]
    checkpoints = manager.Checkpoints(str(tmp_path))
    checkpoints.save(1, jax.jit(lambda: init_state(build(config), 0))(), config)
    checkpoints.close()
    assert ddgan_jax.load(str(tmp_path)).sample(2).shape == (2, 8, 8, 1)


def test_the_exported_sampler_takes_labels(model, tmp_path):
    generate.export(model, str(tmp_path / "sampler.bin"))
    script = f"""
import sys
sys.modules["ddgan_jax"] = None
import jax.export, numpy as np
sampler = jax.export.deserialize(open({str(tmp_path / "sampler.bin")!r}, "rb").read())
images = sampler.call(np.uint32(4), np.arange(4, dtype=np.int32), np.array([2, 0, 1, 1], np.int32))
np.save({str(tmp_path / "x.npy")!r}, images)
"""
    run_python(script)
    np.testing.assert_allclose(
        np.load(tmp_path / "x.npy"), model.trajectory(4, 4, label=[2, 0, 1, 1]).x_t[0], atol=1e-5
    )


NAMES = ("ant", "Zebra", "1", "\udce9", "ant hill")  # the fourth as the name of a folder that is not UTF-8


def test_a_class_by_its_name(model):
    """A label that is neither a name nor an index of a class is refused, and the error lists the names."""
    named = dataclasses.replace(model, classes=("ant", "Zebra", "1"))
    assert model.classes == ("0", "1", "2") and model.num_classes == 3
    np.testing.assert_array_equal(named.sample(3, label=["1", "ant", "Zebra"]), named.sample(3, label=[2, 0, 1]))
    for label, message in (
        ("zebra", "label='zebra' is no class of this model: did you mean 'Zebra'?"),
        (["ant", "bee"], "label='bee' is no class of this model: they are 'ant', 'Zebra', '1'"),
        ([["ant"]], "must be a class of this model, 0 to 2, or 2 of them"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            named.sample(2, label=label)
    many = dataclasses.replace(model, classes=[f"class {i}" for i in range(4)])  # of another number of classes
    assert many.classes == ("0", "1", "2")


def test_a_label_as_text():
    """A name before an index; what is neither is an error of the model."""
    texts = {"ant": 0, "1": 2, "4": 4, "0": 0, "-1": -1, "12": 12, "ants": "ants", "": "", "9" * 5000: "9" * 5000}
    assert {text: parse_label(text, NAMES) for text in texts} == texts
    assert parse_label("", ("", "cat")) == 0
    with pytest.raises(UserError, match=r"they are 'c0', .*, 'c19', \.\.\.$"):
        index_of("x" * 5000, [f"c{i}" for i in range(30)])


def test_names_of_classes_belong_to_the_model(tmp_path):
    """From the record beside a checkpoint into a file and back; without them the names are numbers."""
    model = ddgan_jax.load(str(workdir_of(tmp_path / "run", num_classes=5, of_job={"data": {"classes": NAMES}})))
    assert model.classes == NAMES
    model.save(tmp_path / "x.safetensors", about={"summary": "insects"})
    again = ddgan_jax.load(tmp_path / "x.safetensors")
    assert again.classes == NAMES and again.about == {"summary": "insects"}
    assert json.loads(safetensors.metadata(tmp_path / "x.safetensors")["classes"]) == list(NAMES)
    assert demo_page.class_choices(again)[2:4] == [("1", "2"), ("\\udce9", "3")]
    assert demo_page.class_choices(dataclasses.replace(again, classes=("", *NAMES[1:])))[0] == ("0", "0")
    plain = ddgan_jax.load(str(workdir_of(tmp_path / "plain", of_job={"data": {"count": 0}})))
    assert plain.classes == ()
    plain.save(tmp_path / "x.safetensors")
    assert "classes" not in safetensors.metadata(tmp_path / "x.safetensors")


@pytest.mark.parametrize("classes", [None, "ants and bees", "[" * 100_000, '{"a": 1}', "[1, 2, 3]", '["ant"]'])
def test_a_file_without_names_of_classes(model, tmp_path, classes):
    """Such files are of earlier versions, and may hold any text as further metadata."""
    about = {} if classes is None else {"classes": classes}
    arrays = checkpoint.flatten(model.params)
    safetensors.write(tmp_path / "old.safetensors", arrays, as_dict(model.config), 7, about)
    old = ddgan_jax.load(tmp_path / "old.safetensors")
    assert old.classes == ("0", "1", "2")
    np.testing.assert_array_equal(old.sample(3, label="2"), model.sample(3, label=2))


def test_a_histogram_shows_the_names_of_classes(tmp_path, monkeypatch):
    shown, save_figure = [], figures.save_figure

    def saved(figure, path):
        figure.canvas.draw()
        shown.append([text.get_text() for text in figure.axes[0].get_xticklabels()])
        save_figure(figure, path)

    monkeypatch.setattr(figures, "save_figure", saved)
    figures.histogram(np.arange(5), tmp_path / "modes.png", names=(*NAMES[:4], "a$b$c"))
    figures.histogram(np.arange(3), tmp_path / "modes.png", names=NAMES)  # of other classes
    figures.histogram(np.arange(60), tmp_path / "modes.png", names=tuple(map(str, range(60))))
    assert shown == [["ant", "Zebra", "1", "\\udce9", r"a\$b\$c"], ["0", "1", "2"], []]


@pytest.mark.slow
def test_as_commands(refused, tmp_path):
    """Trained, evaluated while and after, resumed, and sampled with --label; wrong labels are one sentence."""
    options = (*CONDITIONAL, f"--workdir={tmp_path}")
    assert "class-conditional on 10 classes" in succeed(*options, "--config.eval.every=4").stdout
    assert '"eval/label_agreement"' in (tmp_path / "metrics.jsonl").read_text()
    assert "label_agreement" in succeed(*options, "--mode=evaluate").stdout
    succeed(*options, "--mode=sample", "--label=3", "--num_samples=5", f"--out={tmp_path}/x.npz")
    images = ddgan_jax.load(str(tmp_path)).sample(5, label=3)
    assert np.abs(np.load(tmp_path / "x.npz")["images"].astype(int) - images).max() <= 1
    for label, message in (
        ("12", "label=12 must be a class of this model, 0 to 9"),
        ("ten", "label='ten' is no class"),
    ):
        assert message in refused(*options, "--mode=edit", f"--label={label}", "--image=docs/stroke.png")
