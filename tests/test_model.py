"""What a trained model makes: variants, edits, fillings, ways between samples; from Python and as commands."""

import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import shutil
import signal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from commands import ROOT, python, run_python, succeed
from conftest import GOLDEN
from PIL import Image

import ddgan_jax
from ddgan_jax.commands import cli, figures, generate, outputs
from ddgan_jax.config import presets
from ddgan_jax.config.settings import SampleConfig, as_dict
from ddgan_jax.data import decoding
from ddgan_jax.devices import processes
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method import editing, sampling
from ddgan_jax.method.build import build, init_state
from ddgan_jax.method.diffusion import Schedule, deterministic_posterior, q_sample
from ddgan_jax.model.inputs import as_image
from ddgan_jax.model.loading import PRETRAINED, default_output
from ddgan_jax.model.model import to_x0
from ddgan_jax.storage import checkpoint, manager, paths
from ddgan_jax.storage import safetensors as own_format


def grow(params):
    """Random weights: at the start of training the last layer is near zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def workdir_of(folder, num_steps=4, name="digits", num_classes=0, of_job=None):
    """A workdir of a tiny generator with weights that matter."""

    c = as_dict(presets.get(f"{name}:smoke"))
    c["diffusion"]["num_steps"] = num_steps
    c["model"]["num_classes"] = num_classes
    state = jax.jit(lambda: init_state(build(c), 0))()
    checkpoints = manager.Checkpoints(str(folder))
    params = state.ema_params if c["model"]["network"] == "mlp" else grow(state.ema_params)  # an MLP's matter at once
    checkpoints.save(7, state.replace(ema_params=params), c, of_job)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return workdir_of(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(workdir):
    return ddgan_jax.load(str(workdir))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)


@pytest.mark.parametrize("path", [None, 5, b"digits"])
def test_a_path_is_text(model, path):
    for function in (ddgan_jax.load, model.save):
        with pytest.raises(UserError, match=f"path={path!r} must be text or a path, such as 'runs/digits'"):
            function(path)


def test_loading_needs_nothing_but_the_checkpoint(model, workdir):
    assert model.step == 7 and model.num_steps == 4
    images = model.sample(5, seed=3)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 10
    np.testing.assert_array_equal(images, model.sample(5, seed=3))
    np.testing.assert_array_equal(images[:2], model.sample(2, seed=3))
    assert model.sampler()._draw is model.sampler()._draw, "it would be compiled again"
    assert not np.array_equal(images, model.sample(5, seed=4))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ddgan_jax.lode  # noqa: B018


@pytest.mark.parametrize("posterior", ["gaussian", "deterministic"])
def test_trajectories_end_in_the_samples(model, posterior):
    steps = model.trajectory(6, 2, posterior)
    assert steps.x_t.shape == (4, 6, 8, 8, 1)
    samples = model.sample(6, 2, posterior)
    assert (
        np.abs(np.asarray(model.to_images(steps.x_t[0])).astype(int) - samples).max() <= 1
    )  # two programs round apart


def test_the_deterministic_posterior():
    """Equation (6): with x_0 known the noise stays as it is, so that x_{t+1} leads to x_t = q_sample of that noise."""
    schedule = Schedule.create(4)
    x0, noise = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 1))
    t = jnp.array([0, 1, 2, 3])
    x_tp1 = q_sample(schedule, x0, t + 1, noise)
    found = deterministic_posterior(schedule, x0, x_tp1, t, jnp.full_like(x0, jnp.nan))
    np.testing.assert_allclose(found, q_sample(schedule, x0, t, noise), atol=2e-5)
    np.testing.assert_array_equal(found[0], x0[0])


def test_deterministic_samples_do_not_see_the_posteriors_noise(model):
    gen = lambda x, t, z: model.denoiser.gen(model.params, x, t, z)  # noqa: E731
    noise = sampling.draw_noise(jax.random.key(0), jnp.arange(3), 4, (8, 8, 1), model.denoiser.nz)
    other = noise.replace(posterior=noise.posterior + 1)
    run = jax.jit(lambda n: sampling.denoise(gen, model.denoiser.schedule, n, deterministic_posterior).x_t[0])
    np.testing.assert_array_equal(run(noise), run(other))


@pytest.mark.parametrize("num_steps, t", [(4, 3), (4, 0), (1, 0)])
def test_vary(model, tmp_path, image, num_steps, t):
    """z alone makes the difference; the noisy input is that of the sample, or of the image."""
    model = model if num_steps == 4 else ddgan_jax.load(str(workdir_of(tmp_path, num_steps)))
    x_tp1, images = model.vary(6, t, seed=5)
    np.testing.assert_allclose(x_tp1, model.trajectory(1, 5).x_tp1[t, 0], atol=1e-5)
    assert images.shape == (6, 8, 8, 1) and len(np.unique(images.reshape(6, -1), axis=0)) == 6
    other, more = model.vary(9, t, seed=5)
    np.testing.assert_array_equal(other, x_tp1)
    np.testing.assert_array_equal(more[:6], images)
    noisy, _ = model.vary(2, t, image)
    expected = q_sample(model.denoiser.schedule, to_x0(image[None]), jnp.array([t + 1]), jnp.zeros((1, 8, 8, 1)))[0]
    assert np.abs(noisy - expected).mean() < 1.2 * model.denoiser.schedule.sigmas_cum[t + 1]


def test_edit(model, image):
    np.testing.assert_array_equal(model.edit(image, 0, 3), np.stack([image] * 3))
    distances = []
    for start_step in (1, 4):
        images = model.edit(image, start_step, 5)
        assert images.shape == (5, 8, 8, 1) and len(np.unique(images.reshape(5, -1), axis=0)) == 5
        distances.append(np.abs(images.astype(float) - image).mean())
    np.testing.assert_array_equal(images[:2], model.edit(image, 4, 2))


def test_variants_come_in_batches(model, image):
    """Variant i does not depend on the batch that it is computed in."""
    settings = model.config.sample
    small = dataclasses.replace(
        model, config=dataclasses.replace(model.config, sample=dataclasses.replace(settings, batch_size=3))
    )
    known = np.arange(64).reshape(8, 8) < 20
    for compute in (
        lambda m: m.edit(image, 2, 8, seed=1),
        lambda m: m.inpaint(image, known, 8, rounds=2, seed=1),
        lambda m: m.vary(8, 1, seed=1)[1],
        lambda m: m.vary(8, 1, image, seed=1)[1],
        lambda m: m.interpolate(8, seed=1),
        lambda m: m.trajectory(8, seed=1).x_t[0],
    ):
        np.testing.assert_allclose(compute(small).astype(float), compute(model), atol=1)  # two programs round apart


def test_edit_keeps_the_more_the_earlier_it_starts():
    """A perfect generator returns the image; one that believes what it sees leaves the noise of the start."""
    schedule, image = Schedule.create(4), jnp.ones((2000, 2))
    noise = sampling.draw_noise(jax.random.key(0), jnp.arange(2000), 4, (2,), 1)
    perfect = lambda x, t, z: jnp.ones_like(x)  # noqa: E731
    levels = jnp.asarray(schedule.a_s_cum)
    off = lambda x, t, z: x / levels[t + 1][:, None]  # noqa: E731
    for start_step in range(5):
        np.testing.assert_allclose(editing.edit(perfect, schedule, image, start_step, noise), 1, atol=1e-6)
    first = editing.edit(off, schedule, image, 1, noise)
    np.testing.assert_allclose(first.mean(), 1, atol=0.05)
    np.testing.assert_allclose(first.std(), schedule.sigmas_cum[1] / schedule.a_s_cum[1], rtol=0.05)


@pytest.mark.parametrize("rounds", [1, 3])
def test_inpaint_keeps_what_is_known(model, image, rounds):
    known = np.zeros((8, 8), bool)
    known[:, :4] = True
    images = model.inpaint(image, known, 5, rounds)
    np.testing.assert_array_equal(images[:, :, :4], np.stack([image[:, :4]] * 5))
    assert len(np.unique(images[:, :, 4:].reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(images[:2], model.inpaint(image, known, 2, rounds))
    np.testing.assert_array_equal(model.inpaint(image, np.ones((8, 8)), 1, rounds)[0], image)


def test_inpaint_calls_every_step_as_often_as_there_are_rounds():
    schedule, seen = Schedule.create(3), []

    def gen(x, t, z):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return jnp.zeros_like(x)

    x, known = jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1))
    jax.block_until_ready(editing.inpaint(gen, schedule, x, known, jax.random.key(0), jnp.arange(1), 1, rounds=2))
    jax.effects_barrier()
    assert seen == [2, 2, 1, 1, 0]


def test_interpolation(model):
    images = model.interpolate(7, 3, 5, seed=1)
    samples = model.sample(6, 1)
    assert images.shape == (7, 8, 8, 1)
    for image, i in ((images[0], 3), (images[-1], 5)):
        assert np.abs(image.astype(int) - samples[i]).max() <= 1
    assert len(np.unique(images.reshape(7, -1), axis=0)) == 7


def test_the_middle_of_an_interpolation_is_as_long_as_its_ends():
    a, b = (sampling.draw_noise(jax.random.key(0), jnp.array([i]), 2, (30, 30, 1), 400) for i in (0, 1))
    mixed = editing.interpolate(a, b, jnp.array([0.0, 0.5, 1.0]))
    assert mixed.x_T.shape == (3, 30, 30, 1) and mixed.z.shape == (2, 3, 400)
    np.testing.assert_allclose(mixed.z[:, 0], a.z[:, 0], atol=1e-5)
    np.testing.assert_allclose(mixed.x_T[2], b.x_T[0], atol=1e-5)
    for array in (mixed.x_T[1], mixed.z[0, 1], mixed.posterior[1, 1]):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(array**2)), 1, atol=0.1)


@pytest.mark.parametrize(
    "x, y, case",
    [
        ((3.0, 0.1), (-0.2, -0.0), "almost opposite"),
        ((2.0, 0.0), (-1.0, 0.0), "opposite"),
        ((0.0, 0.0), (1.0, 2.0), "one at the origin"),
        ((0.0, 0.0), (0.0, 0.0), "both at the origin"),
        ((1.0, 2.0), (1.0, 2.0), "equal"),
        ((4.0, 0.0), (0.0, 1.0), "at a right angle"),
        ((0.5,), (-0.3,), "on a line"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_draws_of_different_length_stay_between_them(x, y, case):
    """In few dimensions the draws of two samples may have any lengths, and any angle."""
    a, b = (sampling.Noise(x_T=v[None], z=v[None, None], posterior=v[None, None]) for v in map(jnp.array, (x, y)))
    share = jnp.linspace(0, 1, 21)
    mixed = editing.interpolate(a, b, share)
    for found in (mixed.x_T, mixed.z[0], mixed.posterior[0]):
        np.testing.assert_allclose(found[jnp.array([0, -1])], [x, y], atol=1e-6)
        lengths, ends = jnp.linalg.norm(found, axis=1), jnp.array([jnp.linalg.norm(jnp.array(v)) for v in (x, y)])
        assert jnp.all(lengths <= (1 - share) * ends[0] + share * ends[1] + 1e-3)
    if case == "at a right angle":
        np.testing.assert_allclose(mixed.x_T[10], [2.5 * 0.5**0.5] * 2, rtol=1e-5)


def test_draws_of_equal_length_are_mixed_as_shoemake_does():
    x, y = (v / jnp.linalg.norm(v) for v in jax.random.normal(jax.random.key(0), (2, 1, 3000)))
    a, b = (sampling.Noise(x_T=50 * v, z=v[None], posterior=v[None]) for v in (x, y))
    w, angle = jnp.linspace(0, 1, 7)[:, None], jnp.arccos(jnp.sum(x * y))
    expected = (jnp.sin((1 - w) * angle) * x + jnp.sin(w * angle) * y) / jnp.sin(angle)
    mixed = editing.interpolate(a, b, w[:, 0])
    np.testing.assert_allclose(mixed.x_T, 50 * expected, atol=1e-4)
    np.testing.assert_allclose(mixed.z[0], expected, atol=2e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m.sample(0), "num=0 must be an integer from 1 to 2147483648"),
        (lambda m, x: m.sample(2.0), "num=2.0 must be an integer from 1"),
        (lambda m, x: m.sample("2"), "num='2' must be an integer from 1"),
        (lambda m, x: m.trajectory(True), "num=True must be an integer from 1"),
        (lambda m, x: m.trajectory(2, first=2**31 - 1), "first=2147483647 must be an integer from 0 to 2147483646"),
        (lambda m, x: m.trajectory(1, first=-1), "first=-1 must be an integer from 0"),
        (lambda m, x: m.vary(1, 1.0), "t=1.0 must be a step of this model, an integer from 0 to 3"),
        (lambda m, x: m.vary(1, 1, index=2**31), "index=2147483648 must be an integer from 0 to 2147483647"),
        (lambda m, x: m.edit(x, 1.5), "start_step=1.5 must be a step of this model, an integer from 0 to 4"),
        (lambda m, x: m.edit(x, 1, 10**30), f"num_variants={10**30} must be an integer from 1"),
        (lambda m, x: m.edit([[1], [1, 2]], 1), "image is no array"),
        (lambda m, x: m.inpaint(x, x[..., 0], 1, 1.0), "rounds=1.0 must be an integer from 1 to 10000"),
        (lambda m, x: m.inpaint(x, [[1], [1, 2]]), "known is no array"),
        (lambda m, x: m.interpolate(3, 0, 9_999_999_999), "last=9999999999 must be an integer from 0 to 2147483647"),
        (lambda m, x: m.sample(1, posterior=["gaussian"]), r"posterior=\['gaussian'\] is not supported"),
        (lambda m, x: m.save("x.safetensors", about={"step": "1"}), "about has 'step': '1', and must be text by names"),
        (lambda m, x: m.save("x.safetensors", about={"fid": 1.0}), "about has 'fid': 1.0, and must be text"),
        (lambda m, x: m.save("x.safetensors", about={"classes": "[]"}), "about has 'classes': .*, and must be text by"),
        (lambda m, x: m.save("x.safetensors", about=[1]), r"about=\[1\] must be a dict of texts by name"),
        (lambda m, x: m.sample(1, seed=-1), "seed=-1 must be an integer from 0 to 4294967295"),
        (lambda m, x: m.edit(x, 1, seed=2**32), "seed=4294967296 must be an integer from 0 to 4294967295"),
        (lambda m, x: m.interpolate(2, seed=0.5), "seed=0.5 must be an integer from 0 to 4294967295"),
        (lambda m, x: m.sample(1, posterior="ddim"), "posterior='ddim' is not supported: it is gaussian or deter"),
        (lambda m, x: m.vary(1, 4), "t=4 must be a step of this model, an integer from 0 to 3"),
        (lambda m, x: m.edit(x, 0, seed=-1), "seed=-1 must be an integer from 0"),
        (lambda m, x: m.edit(x, 0, posterior="ddim"), "posterior='ddim' is not supported"),
        (lambda m, x: m.edit(x, 5), "start_step=5 must be a step of this model, an integer from 0 to 4"),
        (
            lambda m, x: m.edit(x[:0], 1),
            r"the image is uint8 \[0, 8, 1\]: it must be \[H, W\], or \[H, W, C\] with 1, 3 or",
        ),
        (lambda m, x: m.edit(x[None], 1), r"the image is uint8 \[1, 8, 8, 1\]: it must be \[H, W\]"),
        (lambda m, x: m.edit(x.repeat(2, -1), 1), r"the image is uint8 \[8, 8, 2\]: it must be"),
        (
            lambda m, x: m.edit(x / 255, 1),
            r"image is float64 \[8, 8, 1\]: convert .* \(255 \* image\).round\(\).astype",
        ),
        (
            lambda m, x: m.edit(x.tolist(), 1),
            r"the image is int64 \[8, 8, 1\]: convert .* with image.astype\('uint8'\)",
        ),
        (lambda m, x: m.edit("none.png", 1), "image=none.png cannot be read: No such file"),
        (
            lambda m, x: m.vary(1, 1, "README.md"),
            "image=README.md cannot be read: it is not an image that Pillow can read",
        ),
        (lambda m, x: m.inpaint(x, x), r"known is uint8 \[8, 8, 1\], and must be finite numbers \[H, W\]: True where"),
        (lambda m, x: m.inpaint(x, np.full((8, 8), np.nan)), "known is float64 .*, and must be finite numbers"),
        (lambda m, x: m.inpaint(x, [["False"] * 8] * 8), "known is <U5 .*, and must be finite numbers"),
        (lambda m, x: m.inpaint(x, np.full((8, 8), None)), "known is object .*, and must be finite numbers"),
        (lambda m, x: m.inpaint(x, "m.png"), "known is an array .*: pass an image, white elsewhere, as mask"),
        (
            lambda m, x: m.inpaint(x),
            "pass either known, which is True where .* is kept, or mask, white where it is filled",
        ),
        (lambda m, x: m.inpaint(x, x[..., 0], mask=x), "pass either known"),
        (
            lambda m, x: m.inpaint(x, mask=x * 0),
            r"mask marks nothing: it must be white \(255\) where the image is to be",
        ),
        (lambda m, x: m.inpaint(x, mask=x / 255), r"the mask is float64 \[8, 8, 1\]: convert"),
        (lambda m, x: m.inpaint(x, mask="none.png"), "mask=none.png cannot be read: No such file"),
        (lambda m, x: m.inpaint(x, x[..., 0], rounds=0), "rounds=0 must be an integer from 1"),
        (lambda m, x: m.interpolate(1), "num=1 must be an integer from 2"),
    ],
)
def test_wrong_use(model, image, call, message):
    with pytest.raises(UserError, match=message):
        call(model, image)


def test_weights_that_float16_cannot_hold(model, tmp_path):
    wide = dataclasses.replace(model, params=jax.tree.map(lambda x: 1e6 * x, model.params))
    with pytest.raises(UserError, match=r"half=True: .* has numbers that float16 cannot hold: save them in full"):
        wide.save(tmp_path / "x.safetensors", half=True)
    assert not list(tmp_path.iterdir())


def test_integers_of_numpy_and_jax_are_integers(model, image):
    for integer in (np.int8, np.uint64, jnp.int32, np.array):
        n = integer(2)
        np.testing.assert_array_equal(model.sample(n, seed=n), model.sample(2, seed=2))
        np.testing.assert_array_equal(model.edit(image, n, n), model.edit(image, 2, 2))


def test_samples_are_written_while_they_are_generated(model, tmp_path, monkeypatch):
    """Memory holds a few chunks. The images are those of `Model.sample`, and a fault leaves no incomplete array."""
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, sample=SampleConfig(batch_size=8)))
    expected = small.sample(30, seed=3)
    monkeypatch.setattr(small.__class__, "sample", lambda *_, **__: pytest.fail("all at once"))
    generate.sample(small, str(tmp_path / "x.npz"), 30, seed=3)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["images"], expected)
    generate.sample(small, str(tmp_path / "x"), 30, seed=3)
    names = [outputs.file_name(i) for i in range(30)]
    assert sorted(os.listdir(tmp_path / "x")) == names
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x" / name)), image[..., 0])
    written, save_sample = [], outputs._save_sample

    def full(image, path):
        written.append(path)
        if len(written) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_sample(image, path)

    monkeypatch.setattr(outputs, "_save_sample", full)
    with pytest.raises(OSError, match="No space left"):
        generate.sample(small, str(tmp_path / "y"), 200, seed=3)
    assert len(written) < 100
    monkeypatch.setattr(paths.os, "fsync", lambda _: full(None, None) or pytest.fail("written"))
    written[:] = range(19)
    with pytest.raises(OSError, match=r"x cannot be written: TimeoutError"), paths.writing(tmp_path / "x"):
        raise TimeoutError
    with pytest.raises(OSError, match=r"y.npz cannot be written: No space left"):
        generate.sample(small, str(tmp_path / "y.npz"), 30, seed=3)
    assert sorted(os.listdir(tmp_path)) == ["x", "x.npz", "y"]


def test_more_than_the_memory_holds_is_refused_before_the_work(model, image, monkeypatch, tmp_path):
    monkeypatch.setattr("ddgan_jax.model.checks.free_memory", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"num=10000 needs at least 0.0 GiB .* are free: ask for at most 7812"):
        model.sample(10_000)
    assert len(model.edit(image, 0, 7_812)) == 7_812
    for call in (lambda: model.edit(image, 1, 10_000), lambda: model.vary(10_000, 1), lambda: model.trajectory(1_000)):
        with pytest.raises(UserError, match="are free: ask for at most"):
            call()
    with pytest.raises(UserError, match=r"--num_samples=1000 needs .* ask for at most 27"):  # of a grid
        generate.sample(model, str(tmp_path / "x.png"), 1_000, seed=0)


# --- As commands --------------------------------------------------------------------------------------------------


def save(path, image):
    Image.fromarray(image.squeeze()).save(path)
    return str(path)


def test_masks(model, tmp_path):
    """White is the hole, in any channel; transparent parts are black, and not white as in photos."""
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:4] = 255  # white, painted on a transparent layer
    red = np.dstack([half, 0 * half, 0 * half])
    deep = half.astype(np.uint16) * 257
    for i, mask in enumerate((half, layer, red, deep, np.dstack([half, half]))):
        hole = generate.read_mask(model, save(tmp_path / f"{i}.png", mask))
        np.testing.assert_array_equal(hole, half > 0)
    for name, mask in (("nothing", half // 255), ("everything", half * 0 + 255)):
        with pytest.raises(UserError, match=f"marks {name}: it must be white"):
            generate.read_mask(model, save(tmp_path / "m.png", mask))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A file of 40x32 px that is to be turned by 90 degrees, and its upright pixels [40, 32, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    exif, file = Image.Exif(), tmp_path_factory.mktemp("photo") / "photo.png"
    exif[0x0112] = 8
    Image.fromarray(pixels).save(file, exif=exif)
    return file, np.rot90(pixels)


def test_an_image_in_any_form_is_the_same(model, photo, tmp_path):
    """Upright, the central square, resized: as for the command, which decodes as the training data is decoded."""
    file, pixels = photo
    generate.generate(
        "edit", model, str(tmp_path / "x.npz"), image=str(file), start_step=1, num=2, seed=3, posterior="gaussian"
    )
    expected, resized = np.load(tmp_path / "x.npz")["images"], generate.read_image(model, str(file))
    np.testing.assert_array_equal(resized, decoding.fit(Image.fromarray(pixels[4:36]), 8, 1))
    opaque = np.dstack([pixels, np.full((40, 32), 255, np.uint8)])
    with Image.open(file) as opened:
        for image in (str(file), file, opened, pixels, opaque, resized, resized[..., 0], jnp.asarray(pixels)):
            np.testing.assert_array_equal(model.edit(image, 1, 2, seed=3), expected)
        np.testing.assert_array_equal(model.vary(2, 1, opened)[1], model.vary(2, 1, resized)[1])
    assert model.edit(np.zeros((20, 9), np.uint8), 0).max() == 0
    given = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    assert as_image(given, (8, 8, 1)) is given
    four = np.zeros((8, 8, 4), np.uint8)
    assert as_image(four, (8, 8, 4)) is four
    with pytest.raises(UserError, match=r"image must be a uint8 array \[8, 8, 4\]: no image file has the 4 channels"):
        as_image(file, (8, 8, 4))
    with pytest.raises(UserError, match="image cannot be read: it is damaged"):  # Pillow decodes it when it is used
        model.edit(Image.open(io.BytesIO(file.read_bytes()[:2000])), 1)


def test_a_mask_in_any_form_is_the_same(model, photo, tmp_path):
    """White, or True, is filled in; `known` is its complement. Any size, and transparent parts are kept."""
    hole = np.zeros((40, 32), bool)
    hole[:22, 10:] = True
    white = np.uint8(255) * hole
    layer = np.dstack([np.full((40, 32, 3), 255, np.uint8), white])
    path = save(tmp_path / "m.png", white)
    expected = model.inpaint(photo[0], ~generate.read_mask(model, path), 2)
    assert 0 < (expected != model.edit(photo[0], 0)).mean() < 0.7
    for mask in (path, tmp_path / "m.png", Image.fromarray(white), white, white[..., None], layer, hole):
        np.testing.assert_array_equal(model.inpaint(photo[0], mask=mask, num_variants=2), expected)
    for known in (~hole, 1.0 * ~hole, (~hole).tolist()):
        np.testing.assert_array_equal(model.inpaint(photo[0], known, 2), expected)
    small = generate.read_mask(model, path)
    np.testing.assert_array_equal(model.inpaint(photo[0], mask=small, num_variants=2), expected)
    np.testing.assert_array_equal(model.inpaint(photo[0], np.ones((40, 32)))[0], model.edit(photo[0], 0)[0])


@pytest.mark.parametrize("d", [1, 2, 3])
def test_points_of_any_dimension_are_drawn(d):
    image = figures.as_image(np.random.default_rng(0).standard_normal((50, d)).astype(np.float32))
    assert image.ndim == 3 and image.dtype == np.uint8 and image.std() > 1


@pytest.mark.parametrize("d", [1, 2, 3])
def test_points_of_an_animation_have_the_same_axes(d):
    """A point that moves is drawn at another place, also in frames that hold nothing else."""
    frames = figures.as_frames(np.linspace(0, 1, 3)[:, None, None] * np.ones((3, 1, d)))
    assert len({frame.tobytes() for frame in frames}) == 3 and len({frame.shape for frame in frames}) == 1
    blue = [(frame[..., 2].astype(int) - frame[..., 0] > 60).nonzero()[1].mean() for frame in frames]
    assert blue[0] < blue[1] - 100 and blue[1] < blue[2] - 100


def test_few_points_are_seen_beside_their_input(tmp_path):
    """Sixteen cover more than a thousandth of the image, and the input is a mark of another colour."""
    points = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    outputs.save_with_input(points[0], points[1:], str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as written:
        drawn = np.asarray(written).astype(int)
    blue, red = (((drawn[..., i] - drawn[..., 2 - i]) > 60).mean() for i in (2, 0))
    assert 0.001 < blue < 0.05 and 0.0002 < red < 0.005
    assert figures.scatter(np.zeros((9, 1)), np.ones(1)).std() > 1


def test_the_jobs_write_what_they_say(model, tmp_path, image):
    """A grid of the input and its variants, arrays of the variants alone, animations."""
    picture = save(tmp_path / "x.png", np.repeat(np.repeat(image, 5, 0), 7, 1))  # not the model's size
    mask = save(tmp_path / "m.png", np.repeat(np.uint8(255 * np.eye(8)), 5, 0))
    common = dict(seed=0, posterior="gaussian")
    jobs = {
        "sample": dict(num=9, trajectory=str(tmp_path / "trajectory.gif")) | common,
        "vary": dict(num=5, seed=0, t=None, image=""),
        "edit": dict(num=5, image=picture, start_step=None) | common,
        "inpaint": dict(num=5, image=picture, mask=mask, rounds=2) | common,
        "interpolate": dict(num=5, samples=["0", "3"]) | common,
    }
    for mode, options in jobs.items():
        for kind in (".png", ".npz"):
            generate.generate(mode, model, str(tmp_path / f"{mode}{kind}"), **options)
        with np.load(tmp_path / f"{mode}.npz") as arrays:
            assert arrays["images"].shape == (options["num"], 8, 8, 1), mode
        with Image.open(tmp_path / f"{mode}.png") as grid:
            assert min(grid.size) > 60
    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert animation.n_frames in (8, 9)  # x_4, a guess at each step and what came of it; the last two are one
    generate.generate("interpolate", model, str(tmp_path / "i.gif"), **jobs["interpolate"])
    with Image.open(tmp_path / "i.gif") as animation:
        assert animation.size == (192, 192) and animation.n_frames == 8
        small = np.asarray(animation.convert("L"))[::24, ::24]
        np.testing.assert_array_equal(animation.convert("L"), small.repeat(24, 0).repeat(24, 1))
        np.testing.assert_array_equal(small, model.interpolate(5, 0, 3)[0, ..., 0])
    generate.generate(
        "sample", model, str(tmp_path / "many"), **(jobs["sample"] | {"trajectory": str(tmp_path / "t.png")})
    )
    assert len(list((tmp_path / "many").glob("*.png"))) == 9 and (tmp_path / "t.png").exists()
    for file, expected in zip(sorted((tmp_path / "many").iterdir()), model.sample(9), strict=True):
        with Image.open(file) as written:
            assert written.mode == "L", "grey images are not of three colours"
            np.testing.assert_array_equal(np.asarray(written), expected[..., 0])


@pytest.mark.parametrize(
    "mode, options", [("sample", {}), ("interpolate", {"samples": ["0", "3"]}), ("edit", {"start_step": 1})]
)
def test_a_directory_with_other_images_is_refused(mode, options, model, tmp_path):
    """An evaluation of the directory would count them; images that are written again are no others."""
    if mode == "edit":
        generate.save(model.sample(1), tmp_path / "grid.png")
        options = options | {"image": str(tmp_path / "grid.png")}
    options, out = options | dict(seed=0, posterior="gaussian"), tmp_path / "many"
    for num in (2, 3, 3):
        generate.generate(mode, model, str(out), num=num, **options)
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"many holds other images, such as 000002.png: name an empty directory"):
        generate.generate(mode, model, str(out), num=2, **options)
    (out / "000002.png").rename(out / "photo.JPG")
    with pytest.raises(UserError, match=r"such as photo\.JPG"):
        generate.generate(mode, model, str(out), num=9, **options)
    assert len(list(out.iterdir())) == 4


def test_of_many_steps_a_few_are_drawn(tmp_path, model):
    """Evenly, from x_T to x_0; with T <= 8 all of them."""
    assert generate.shown_steps(model) == [3, 2, 1, 0]
    many = ddgan_jax.load(str(workdir_of(tmp_path / "run", num_steps=300)))
    shown = generate.shown_steps(many)
    assert len(shown) == 8 and shown[0] == 299 and shown[-1] == 0 and set(-np.diff(shown)) <= {42, 43}
    frames, steps = generate.denoising_frames(many, 2), many.trajectory(2)
    assert len(frames) == 17
    for i, t in enumerate(shown):
        np.testing.assert_array_equal(frames[2 * i], many.to_images(steps.x_tp1[t]))
        np.testing.assert_array_equal(frames[2 * i + 1], many.to_images(steps.x0_hat[t]))
    np.testing.assert_array_equal(frames[-1], many.to_images(steps.x_t[0]))
    for kind in ("png", "gif"):
        generate.draw_trajectory(many, str(tmp_path / f"t.{kind}"), 2)
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width < 2_500
    with Image.open(tmp_path / "t.gif") as animation:
        assert animation.n_frames <= 17


def test_home_is_home(model, tmp_path, monkeypatch):
    """A ~ that no shell has replaced, as in --out='~/x.png', is the user's folder in every path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save("~/own.safetensors")
    assert (tmp_path / "own.safetensors").exists()
    assert ddgan_jax.load("~/own.safetensors").step == model.step
    names = dict(checkpoint="own.safetensors", out="x.png", trajectory="t.png", compilation_cache="cache")
    succeed("--mode=sample", "--num_samples=2", *(f"--{flag}=~/{name}" for flag, name in names.items()))
    assert {"x.png", "t.png", "cache"} <= {file.name for file in tmp_path.iterdir()}
    assert generate.read_image(model, "~/x.png").shape == (8, 8, 1)  # as --image and --mask
    assert not (ROOT / "~").exists()


def test_a_model_is_shown_in_one_line(model):
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert repr(model) == f"Model(synthetic, 8x8x1, T=4, step 7, {size:,} parameters)"
    assert repr(ddgan_jax.load("gaussians")).startswith("Model(gaussians, points [2], T=4, step 20,000, ")
    assert ", 8x8x1, 10 classes, T=3, step 7,500, " in repr(ddgan_jax.load("digits_conditional"))


def test_the_version_is_that_of_the_package_or_the_checkout(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"ddgan_jax": "9.8.7"}.get)
    assert ddgan_jax.__version__ == "9.8.7"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert f'\nversion = "{ddgan_jax.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_results_of_a_numbered_checkpoint_go_into_its_workdir(workdir, tmp_path, monkeypatch):
    """The folder of a checkpoint is deleted with it; one without a workdir is all that there is."""
    workdir = shutil.copytree(workdir, tmp_path / "run")
    paths.write(workdir / "best.json", '{"step": 7, "measure": "fid", "value": 1.0}')
    for name in ("", "/", "/checkpoints", "/checkpoints/", "/checkpoints/7", "/checkpoints/7/", "/best"):
        assert default_output(f"{workdir}{name}", "x.png") == f"{workdir}/x.png", name
    monkeypatch.chdir(workdir / "checkpoints")
    assert default_output("7", "x.png") == str((workdir / "x.png").resolve())
    shutil.copytree(workdir / "checkpoints" / "7", tmp_path / "own" / "7")
    for name in ("own", "own/7"):
        assert default_output(f"{tmp_path}/{name}", "x.png") == f"{tmp_path}/{name}/x.png"
    assert default_output("a/b.pth", "x.png") == "a/b.x.png" and default_output("digits", "x.png") == "digits.x.png"


def test_only_unfinished_files_of_our_own_are_removed(tmp_path):
    """Hidden temporary files of the user stay, and so do folders that are named as ours."""
    stay = {
        ".mine.tmp",
        ".config.json.x1.tmp",
        "a.12.tmp",
        ".12.tmp",
        ".x.npz.77.tmp",
    }  # another command may write x.npz
    for name in stay | {".config.json.4321.tmp"}:
        (tmp_path / name).touch()
    (tmp_path / ".best.json.12.tmp").mkdir()
    paths.remove_unfinished(tmp_path, r"config\.json|best\.json")
    paths.remove_unfinished(tmp_path / "missing", "config")
    assert {file.name for file in tmp_path.iterdir()} == stay | {".best.json.12.tmp"}


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "")]
)
def test_output_that_cannot_be_written_is_dropped(error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    stream = cli.PatientStream(Gone())
    assert stream.write("text") == 4
    stream.flush()
    assert not stream.isatty()


def test_a_move_replaces_files_and_folders(tmp_path):
    for name in ("old", "new"):
        paths.write(tmp_path / name / "x", name)
        paths.write(tmp_path / f"{name}.txt", name)
    paths.move(tmp_path / "old", tmp_path / "new")
    paths.move(tmp_path / "old.txt", tmp_path / "new.txt")
    assert sorted(os.listdir(tmp_path)) == ["new", "new.txt"]
    assert (tmp_path / "new" / "x").read_text() == (tmp_path / "new.txt").read_text() == "old"


def test_two_writers_with_one_process_id_spoil_nothing(tmp_path, monkeypatch):
    """In two containers, the main process has the same id, 1."""
    replace = os.replace

    def interrupted(source, target):
        monkeypatch.setattr(os, "replace", replace)
        paths.write(tmp_path / "x", b"BBBB")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    paths.write(tmp_path / "x", b"AAAA")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"AAAA"]


@pytest.mark.parametrize("arguments", ["--mode=sample --num_samples=4", "--mode=export"])
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_does_no_harm(workdir, tmp_path, arguments, closed):
    out = f"--out={tmp_path / 'x'}{'.safetensors' if 'export' in arguments else '.npz'}"
    argv = ["main.py", f"--workdir={workdir}", *arguments.split(), out]
    child = python(f"import sys; sys.{closed} = None; sys.argv = {argv}; import main; sys.exit(main.main())")
    child.communicate(timeout=120)
    assert child.returncode == 0 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "mode, seconds, code, number",
    [
        ("sample", 1, 130, signal.SIGINT),
        ("sample", 10, 130, signal.SIGINT),
        ("train", 2, 75, signal.SIGINT),
        ("train", 2, 75, signal.SIGTERM),
        ("train", 2, 75, signal.SIGUSR1),
    ],
)
def test_a_signal_has_no_traceback(workdir, tmp_path, mode, seconds, code, number):
    """While modules are imported, and while it samples; a training that has not begun can be started again."""
    more = ["--num_samples=500000", f"--out={tmp_path}/out"] if mode == "sample" else []
    workdir = workdir if more else tmp_path / "run"
    script = f"""
import os, runpy, signal, sys, threading
threading.Timer({seconds}, os.kill, (os.getpid(), {int(number)})).start()
sys.argv = ["main.py", "--mode={mode}", "--workdir={workdir}"] + {more}
runpy.run_path("main.py", run_name="__main__")
"""
    child = python(script)
    output, errors = child.communicate(timeout=120)
    assert child.returncode in (code, -number) and "Traceback" not in errors, output + errors
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_signal_leaves_no_unfinished_files(tmp_path):
    """Nor do threads begin others while the process ends."""
    child = python(f"""
import contextlib, itertools, os, signal, threading
from absl import flags
from ddgan_jax.commands import cli
from ddgan_jax.storage import paths
flags.FLAGS(["main.py", "--mode=sample"])
signal.signal(signal.SIGINT, cli.exit_on_signal)
def write(i):
    with contextlib.suppress(OSError):  # its file is removed before it is renamed
        for number in itertools.count():
            paths.write(f"{tmp_path}/{{i}}_{{number % 50}}", b"A", sync=False)
for i in range(8):
    threading.Thread(target=write, args=(i,), daemon=True).start()
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
signal.pause()
""")
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 130 and "Traceback" not in errors, output + errors
    written = {path.name for path in tmp_path.iterdir()}
    assert written and not [name for name in written if name.endswith(".tmp")]


def test_names_that_are_not_utf8_are_printed(monkeypatch):
    """As escapes, in messages and errors, also where the streams are strict."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8", "strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(cli.sys, name, stream)

    def fail(argv):
        print("reading caf\udce9")
        raise UserError("there is no caf\udce9")

    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(cli.signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(processes, "exit_process", lambda *arguments, **options: None)
    assert cli.main() == 2
    for name, expected in (("stdout", rb"reading caf\udce9"), ("stderr", rb"error: there is no caf\udce9")):
        streams[name].flush()
        assert streams[name].buffer.getvalue().strip() == expected


@pytest.mark.parametrize(
    "error, message",
    [
        ("MemoryError('Unable to allocate 9 GiB')", "stopped: there is not enough memory: Unable to allocate 9 GiB"),
        ("RuntimeError('RESOURCE_EXHAUSTED: of a device')", "stopped: there is not enough memory: RESOURCE"),
    ],
)
def test_no_memory_is_one_sentence(error, message):
    child = python(f"""
import sys
from ddgan_jax.commands import cli
def fail(argv):
    raise {error}
cli.run = fail
sys.exit(cli.main())
""")
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 1 and message in errors and "Traceback" not in errors, output + errors


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return ddgan_jax.load(str(workdir_of(tmp_path_factory.mktemp("points"), name="gaussians")))


def test_points(points, tmp_path):
    model, options = points, dict(num=50, seed=0, posterior="gaussian", trajectory=str(tmp_path / "t.png"))
    generate.generate("sample", model, str(tmp_path / "x.png"), **options)
    generate.generate("vary", model, str(tmp_path / "v.png"), num=50, seed=0, t=3, image="")
    assert model.vary(50, 3)[1].dtype == np.float32 and (tmp_path / "t.png").exists()
    for kind in ("png", "gif", "npz"):
        out = str(tmp_path / f"i.{kind}")
        generate.generate("interpolate", model, out, num=5, samples=["0", "1"], seed=0, posterior="gaussian")
    for image, message in (
        ("x.png", "this model makes points, and has no images to work on"),
        (np.zeros(2), r"the point is float64 \[2\], but the model's are float32 \[2\]"),
        (np.array([0, np.nan], np.float32), "the point holds NaN or infinity"),
    ):
        with pytest.raises(UserError, match=message):
            model.edit(image, 1)
    with pytest.raises(UserError, match="this model makes points, and has no images to fill in"):
        model.inpaint(np.zeros(2, np.float32), mask="m.png")
    with pytest.raises(UserError, match="this model makes points"):
        generate.generate(
            "edit", model, str(tmp_path / "e.png"), num=1, image="x.png", start_step=1, seed=0, posterior=""
        )


def test_points_of_another_scale(points):
    """What comes in and out is in the units of the data; the trajectory is in those of the diffusion."""
    model, scale = points, points.denoiser.scale
    assert scale > 1
    steps, samples = model.trajectory(5), model.sample(5)
    np.testing.assert_allclose(steps.x_t[0] / scale, samples, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.to_images(steps.x_t), steps.x_t / scale, rtol=1e-6)  # of all steps at once
    point = np.array([2.0, -4.0], np.float32)
    np.testing.assert_array_equal(model.edit(point, 0, 2), [point, point])
    noisy, _ = model.vary(1, 0, point)
    a, s = model.denoiser.schedule.a_s_cum[1], model.denoiser.schedule.sigmas_cum[1]
    assert np.abs(noisy - scale * a * point).max() < 5 * s
    exported = jax.export.deserialize(bytearray(model.export()))
    np.testing.assert_allclose(exported.call(np.uint32(0), np.arange(5, dtype=np.int32)), samples, rtol=1e-4, atol=1e-4)


def test_an_exported_sampler_needs_jax_alone(model, workdir, tmp_path):
    """In a process that cannot import this package, nor flax; any number of samples, by their indices."""
    result = succeed("--mode=export", f"--workdir={workdir}", f"--out={tmp_path}/sampler.bin")
    assert f"written by jax {jax.__version__}" in result.stdout
    script = f"""
import sys
sys.modules["ddgan_jax"] = sys.modules["flax"] = None
import jax.export, numpy as np
sampler = jax.export.deserialize(open({str(tmp_path / "sampler.bin")!r}, "rb").read())
assert set(sampler.platforms) == {{"cpu", "cuda", "tpu"}}
assert sampler.fun_name == "sampler of jax {jax.__version__}"
for count in (5, 3):
    images = sampler.call(np.uint32(4), np.arange(count, dtype=np.int32))
    np.save({str(tmp_path)!r} + f"/{{count}}.npy", images)
"""
    run_python(script)
    expected = model.trajectory(5, seed=4).x_t[0]
    for count in (5, 3):
        np.testing.assert_allclose(np.load(tmp_path / f"{count}.npy"), expected[:count], atol=1e-5)


def test_weights_for_the_reference(model, workdir, tmp_path):
    """A .pth written here holds the reference's names and, read again, the same bits."""
    succeed("--mode=export", f"--workdir={workdir}", f"--out={tmp_path}/netG.pth")
    again = ddgan_jax.load(str(tmp_path / "netG.pth"), model.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, jax.tree.map(np.asarray, model.params))
    np.testing.assert_array_equal(again.sample(3), model.sample(3))


def test_one_file(model, workdir, tmp_path):
    """Written by the command and read again, from Python and by commands: the same bits; results go beside it."""
    succeed("--mode=export", f"--workdir={workdir}", f"--out={tmp_path}/own.safetensors")
    again = ddgan_jax.load(tmp_path / "own.safetensors")
    assert (again.step, again.config) == (model.step, model.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, jax.tree.map(np.asarray, model.params))
    succeed("--mode=sample", f"--checkpoint={tmp_path}/own.safetensors", "--num_samples=3")
    assert (tmp_path / "own.sample.png").exists()
    model.save(tmp_path / "half.safetensors", half=True, about={"summary": "eights"})
    half = ddgan_jax.load(tmp_path / "half.safetensors")
    assert half.about == {"summary": "eights"}
    full, halved = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("own", "half"))
    assert halved < 0.7 * full
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(half.params), strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, ours, rtol=2**-11, atol=1e-7)
    with pytest.raises(UserError, match=r"x.bin must end in .safetensors"):
        model.save("x.bin")


def test_the_models_that_come_along():
    """At most 9 MB together; each has the command and measures of results.json, and no path of a computer."""
    names = list(ddgan_jax.models())
    files = [PRETRAINED / f"{name}.safetensors" for name in names]
    assert sum(file.stat().st_size for file in files) <= 9e6
    results = json.loads((ROOT / "docs" / "results" / "pretrained" / "results.json").read_text())["models"]
    assert sorted(results) == names and {"digits", "digits_conditional"} <= set(names)
    for name, file in zip(names, files, strict=True):
        model = ddgan_jax.load(name)
        told = model.about | json.loads(model.about["measures"]) | {"step": model.step, "bytes": file.stat().st_size}
        assert {key: told[key] for key in results[name] if key != "train_seconds"} == {
            key: value for key, value in results[name].items() if key != "train_seconds"
        }
        assert model.config.data.dir is None and "/" not in (model.config.data.path or "")
        samples = model.sample(8).astype(np.float32)
        assert np.isfinite(samples).all() and samples.std() > 1
    assert ddgan_jax.models()["digits"] == results["digits"]["summary"]
    for name in ("digitz", "x" * 5000):  # the latter is too long for a file
        with pytest.raises(UserError, match=rf"there is no {name}: name .* or one of cifar10_small, digits, "):
            ddgan_jax.load(name)


def test_one_file_that_is_damaged_or_foreign(model, tmp_path):
    """Any byte that is missing or wrong is one sentence; so is a file of somebody else."""
    model.save(tmp_path / "own.safetensors")
    content = (tmp_path / "own.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    start = 8 + int.from_bytes(content[:8], "little")
    flips = [0, 7, 8, start // 2, start - 1, start, (start + len(content)) // 2, len(content) - 1]
    cases = [b"", content[:4], content[:start], content[:-1], content + b"0", b"x" * 100, content[::-1]]
    cases += [content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :] for i in flips]
    for case in cases:
        bad.write_bytes(case)
        with pytest.raises((Fault, UserError), match=r"bad.safetensors (is damaged|was not written by ddgan_jax)"):
            ddgan_jax.load(bad)
    safetensors.numpy.save_file({"x": np.zeros(3)}, bad)
    with pytest.raises(UserError, match="was not written by ddgan_jax"):
        ddgan_jax.load(bad)
    header = b'{"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}'
    bad.write_bytes(len(header).to_bytes(8, "little") + header + b"00")
    with pytest.raises(UserError, match="was not written by ddgan_jax: it contains numbers of type 'BF16'"):
        ddgan_jax.load(bad)
    with pytest.raises(UserError, match=r"none\.safetensors cannot be read"):
        ddgan_jax.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (FileNotFoundError("bucket/x"), UserError, "cannot be read: bucket/x"),
        (OSError(errno.ENOTDIR, "Not a directory"), UserError, "cannot be read: Not a directory"),
        (OSError(errno.EIO, "Input/output error"), Fault, "cannot be read: Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), Fault, "cannot be read: Permission denied"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Fault, "cannot be read: Cannot allocate memory"),
        (OSError("HttpError: 503"), Fault, "cannot be read: HttpError: 503"),
        (MemoryError(), Fault, "cannot be read: not enough memory"),
    ],
    ids=repr,
)
def test_a_read_that_fails_is_neither_damage_nor_the_users_error(monkeypatch, model, error, kind, message):
    """Of a disk, a bucket, permissions or memory; a file that is not there is the user's error."""

    def fail(file):
        raise error

    monkeypatch.setattr(generate.paths, "read", fail)
    monkeypatch.setattr(generate.paths, "size_of", lambda file: 9)
    for read in (lambda: ddgan_jax.load("x.safetensors"), lambda: generate.read_image(model, "x.png")):
        with pytest.raises(kind, match=message):
            read()


@pytest.mark.parametrize(
    "kind, message", [("pipe", "not a regular file"), ("device", "not a regular file"), ("large", "larger than 1 GiB")]
)
def test_an_image_that_is_no_file_of_a_bounded_size(model, tmp_path, kind, message):
    """It is refused unread: a pipe blocks, and the memory would hold a device or zeros behind an image."""
    file, link = tmp_path / "x.png", tmp_path / "link.png"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes((ROOT / "docs" / "mnist.png").read_bytes())
        os.truncate(file, 3 * 2**30)
    link.symlink_to(file)
    for read, flag in ((generate.read_image, "--image"), (generate.read_mask, "--mask")):
        with pytest.raises(UserError, match=f"^{flag}=.*link.png cannot be read: it is {message}"):
            read(model, str(link))
    link.unlink()
    link.symlink_to(ROOT / "docs" / "mnist.png")
    assert generate.read_image(model, str(link)).shape == model.denoiser.image_shape


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mode=export", "--out=x.pt"], "must end in .safetensors (the generator in one file), in .bin"),
        (["--mode=export", "--out=x.safetensors", "--posterior=deterministic"], "=deterministic does nothing"),
        (["--mode=export", "--out=x.onnx"], "written by jax2onnx: pip install 'ddgan_jax[onnx]'"),
        (["--mode=edit"], "name an image with --image=PATH"),
        (["--mode=edit", "--image=nothing.png"], "--image=nothing.png cannot be read"),
        (["--mode=inpaint", f"--image={ROOT / 'docs' / 'mnist.png'}"], "name an image with --mask=PATH"),
        (["--mode=edit", f"--image={ROOT / 'README.md'}"], "it is not an image"),
        (["--mode=vary", "--t=9"], "t=9 must be a step of this model, an integer from 0 to 3"),
        (["--mode=interpolate", "--between=3"], "--between=3 must be two samples, such as 0,1"),
        (["--mode=interpolate", "--between=²,1"], "--between=²,1 must be two samples, such as 0,1, each from 0 to"),
        (["--mode=interpolate", "--between=3000000000,1"], "--between=3000000000,1 must be two samples"),
        (["--mode=sample", "--num_samples=2000000000"], "--num_samples=2000000000 needs at least"),
        (["--mode=sample", "--num_samples=3000000000", "--out=x.npz"], "=3000000000 must be an integer from 1"),
        (["--mode=demo", "--port=99999"], "--port=99999 must be an integer from 1 to 65535"),
        (["--mode=sample", "--trajectory=x.mp4"], "must end in .png (a grid), in .gif (an animation)"),
        (["--mode=sample", "--out=x.gif"], "must end in .png (a grid), in .npz (an array) or name a directory"),
        (["--mode=sample", "--posterior=mean"], "gaussian"),
        (["--mode=sample", "--out=x.png", "--trajectory=x.png"], "--trajectory=x.png is --out, or a file in it: name"),
        (["--mode=sample", "--out=x", "--trajectory=y/../x/000000.png"], "000000.png is --out, or a file in it: name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands_are_one_sentence(refused, workdir, arguments, message):
    assert message in refused(f"--workdir={workdir}", *arguments)


def test_a_checkpoint_of_the_reference(tmp_path):
    """The moving average of a run; weights alone need hints, and one that names the size of the images."""
    import lzma

    for name in ("content.pth", "netG_1.pth"):
        (tmp_path / name).write_bytes(lzma.decompress((GOLDEN / "checkpoint" / f"{name}.xz").read_bytes()))
    run = ddgan_jax.load(str(tmp_path / "content.pth"))
    assert run.num_steps == 4 and run.sample(3).shape == (3, 16, 16, 3)
    hints = dict(num_steps=4, image_size=16, skip_rescale=True, tanh=True, centered=True)
    hints |= dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, nz=8, z_emb_dim=16, n_mlp=2)
    weights = ddgan_jax.load(str(tmp_path / "netG_1.pth"), **hints)
    np.testing.assert_array_equal(run.sample(3, seed=2), weights.sample(3, seed=2))  # netG_1 holds the moving average
    with pytest.raises(UserError, match="the weights do not show"):
        ddgan_jax.load(str(tmp_path / "netG_1.pth"))


def test_a_folder_of_samples_does_not_hide_a_bundled_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert ddgan_jax.load("digits").step > 0
    assert "note: digits is the bundled model: the folder of this name has no checkpoints" in capsys.readouterr().out
    (tmp_path / "digits" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        ddgan_jax.load("digits")


@pytest.mark.parametrize("metadata", [{"config": "{"}, {"config": "[" * 200_000}, {"step": "x"}, {"step": "9" * 5_000}])
def test_metadata_that_cannot_be_read(model, tmp_path, metadata):
    """With a right checksum, as somebody may forge it."""
    arrays = checkpoint.flatten(model.params)
    found = {"config": json.dumps(as_dict(model.config)), "step": "7"} | metadata
    found["checksum"] = own_format._checksum(arrays, found)
    file = tmp_path / "forged.safetensors"
    file.write_bytes(safetensors.numpy.save(arrays, found))
    with pytest.raises(UserError, match=r"forged.safetensors was not written by ddgan_jax: its configuration or step"):
        ddgan_jax.load(file)
    with pytest.raises(UserError, match="null character"):
        ddgan_jax.load("a\0b")


def test_a_file_with_null_for_metadata(tmp_path):
    header = b'{"__metadata__":null}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"m.safetensors was not written by ddgan_jax: it has no configuration"):
        ddgan_jax.load(tmp_path / "m.safetensors")


def test_hints_are_for_pth_files():
    with pytest.raises(UserError, match=r"digits contains its configuration: leave num_steps, nf out"):
        ddgan_jax.load("digits", num_steps=99, nf=3)
