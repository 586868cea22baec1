"""Training and evaluation from Python: arrays, tensors, lists of files and images, labels and their names."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest
from PIL import Image

import ddgan_jax
from ddgan_jax.commands import api
from ddgan_jax.commands import evaluate as evaluation
from ddgan_jax.config import presets
from ddgan_jax.config.settings import DataConfig, as_dict, read
from ddgan_jax.data import sources
from ddgan_jax.data.arrays import as_data
from ddgan_jax.data.resolve import resolve_from_data
from ddgan_jax.errors import UserError

RNG = np.random.default_rng(0)
GREY, COLOUR = (RNG.integers(0, 256, (12, 8, 8, channels), np.uint8) for channels in (1, 3))
SMOKE = dict(preset="digits:smoke", train__num_steps=2, train__batch_size=4, log__tensorboard=False)


@pytest.mark.parametrize(
    "images, options, expected",
    [
        (GREY, {}, GREY),
        (GREY[..., 0], {}, GREY),
        (COLOUR.transpose(0, 3, 1, 2), {}, COLOUR),
        (COLOUR / 255, {"value_range": (0, 1)}, COLOUR),
        (np.float32(COLOUR) / 127.5 - 1, {"value_range": (-1, 1)}, COLOUR),
        (COLOUR.astype(np.int64), {"value_range": (0, 255)}, COLOUR),
        (GREY > 127, {}, np.uint8(255) * (GREY > 127)),
        (GREY.repeat(2, 1).repeat(2, 2), {"image_size": 16}, GREY.repeat(2, 1).repeat(2, 2)),
        (list(COLOUR), {}, COLOUR),
        (list(GREY[..., 0]), {}, GREY),
        ([Image.fromarray(image) for image in COLOUR], {}, COLOUR),
        (np.concatenate([COLOUR, np.full((12, 8, 8, 1), 255, np.uint8)], -1), {}, COLOUR),
        (np.concatenate([COLOUR, np.zeros((12, 8, 8, 1), np.uint8)], -1), {}, np.full_like(COLOUR, 255)),
    ],
)
def test_forms_of_images(images, options, expected):
    found = as_data(images, **options).images
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


def test_a_range_is_rounded_as_the_images_are():
    """float32 0.1 is above 0.1."""
    images = as_data(np.float32(COLOUR) / 255 * np.float32(0.1), value_range=(0, 0.1)).images
    np.testing.assert_array_equal(images, COLOUR)


def test_a_tensor():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).copy()).float() / 255
    np.testing.assert_array_equal(as_data(tensor.requires_grad_(), value_range=(0, 1)).images, COLOUR)


def test_a_list_of_files(tmp_path):
    """Files may differ in size, and may be a column of a table."""
    for i, (width, height) in enumerate(((20, 40), (33, 17), (16, 16))):
        Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    images = as_data(files).images
    assert images.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(images[2], Image.open(files[2]))
    np.testing.assert_array_equal(as_data(np.array(list(map(str, files)), object)).images, images)
    assert as_data(files, image_size=8).images.shape == (3, 8, 8, 3)
    files[1].write_text("no image")
    with pytest.raises(UserError, match=r"image .*1.png cannot be used: it is not an image"):
        as_data(files)
    with pytest.raises(UserError, match=r"image .*none.png cannot be read: No such file"):
        as_data([tmp_path / "none.png"])


@pytest.mark.parametrize(
    "labels, classes, ids, names",
    [
        ([0, 1, 2] * 4, (), [0, 1, 2] * 4, ("0", "1", "2")),
        (["b", "a"] * 6, (), [1, 0] * 6, ("a", "b")),
        (["b", "a"] * 6, ("b", "c", "a"), [0, 2] * 6, ("b", "c", "a")),
        (np.array(["b", "a"] * 6, object), (), [1, 0] * 6, ("a", "b")),
        ([1, 0] * 6, ("x", "y"), [1, 0] * 6, ("x", "y")),
    ],
)
def test_labels(labels, classes, ids, names):
    data = as_data(GREY, labels, classes)
    assert data.labels().tolist() == ids and data.classes == names


@pytest.mark.parametrize(
    "images, options, message",
    [
        (COLOUR / 255, {}, r"the images are float64 from 0 to 1, and not uint8: pass value_range"),
        (COLOUR[..., 0] // 16, {"value_range": (0, np.nan)}, "must be the numbers of black and white"),
        (np.where(COLOUR > 9, np.nan, COLOUR), {"value_range": (0, 9)}, r"hold [0-9,]+ NaN: replace them"),
        (COLOUR.reshape(len(COLOUR), -1) / 255, {"value_range": (0, 1)}, r"holds points: images are \[N, H, W\]"),
        (COLOUR, {"value_range": (0, 1)}, r"from 0 to 255, not in value_range=\(0, 1\)"),
        (COLOUR, {"value_range": (1, 0)}, "must be the numbers of black and white"),
        (COLOUR[:, :4], {}, "the images are 4x8, and networks take squares: image_size=4 crops"),
        (COLOUR[..., :2], {}, r"1, 3 or 4 channels, but these are \[12, 8, 8, 2\]"),
        ([COLOUR[0] / 255], {}, r"an image is float64 \[8, 8, 3\]"),
        (COLOUR / 255, {"value_range": (0,)}, r"value_range=\(0,\) must be the numbers of black and white"),
        (COLOUR / 255, {"value_range": 1}, "value_range=1 must be the numbers"),
        (COLOUR / 255, {"value_range": ("a", "b")}, "value_range=.* must be the numbers"),
        (COLOUR / 255, {"value_range": (0, np.inf)}, "value_range=.* must be the numbers"),
        (COLOUR[:0] / 255, {"value_range": (0, 1)}, r"the set is empty: .* these are uint8 \[0, 8, 8, 3\]"),
        (GREY > 127, {"value_range": (2, 3)}, r"the images have values from 0 to 1, not in value_range=\(2, 3\)"),
        (COLOUR, {"image_size": 4.0}, "image_size=4.0 must be an integer"),
        (COLOUR, {"image_size": "4"}, "image_size='4' must be an integer"),
        (COLOUR, {"image_size": 10**7}, "image_size=10000000 must be an integer of at most 4096"),
        (COLOUR + 1j, {"value_range": (0, 255)}, "the images are complex128, and must be real numbers"),
        (RNG.normal(size=(9, 2)) + 1j, {}, "the images are complex128"),
        (np.ma.masked_greater(COLOUR, 9), {}, r"masked array: fill its masked values with images.filled\(0\)"),
        (np.ma.masked_greater(COLOUR / 255, 0.5), {"value_range": (0, 1)}, "masked array: fill"),
        ([np.ma.masked_greater(COLOUR[0], 9)], {}, "masked array: fill"),
        ([[1], [2, 3]], {}, "the images are no array: "),
        (GREY, {"labels": ["a"] * 12, "classes": ("b",)}, "the label 'a' is none of the classes b"),
        (GREY, {"labels": [0]}, "labels must be integers"),
        (
            GREY,
            {"labels": [0, None] * 6},
            r"labels must be integers .* object \[12\]: some are None; leave the examples",
        ),
        (GREY, {"labels": [0.0, 1.0] * 6}, r"float64 \[12\]: convert them with labels.astype\(int\)"),
        (GREY, {"labels": np.eye(3, dtype=int)[[0, 1, 2] * 4]}, r"one-hot \[12, 3\]: labels.argmax\(-1\)"),
        (GREY, {"labels": [["a", "b"]] * 12}, r"labels must be integers or names \[N\], .* these are \[12, 2\]"),
        (GREY, {"labels": [[1], [2, 3]] * 6}, "the labels are no array: "),
        (GREY, {"labels": np.ma.masked_equal([0, 1] * 6, 1)}, "the labels are a masked array"),
        (GREY, {"labels": np.ma.masked_equal(["a", "b"] * 6, "b")}, "the labels are a masked array"),
        (GREY, {"labels": [0, 1] * 6, "classes": ("a", "b", "a")}, "the name 'a' twice: pass different names"),
        (GREY, {"labels": [0, 1] * 6, "classes": (5, 6)}, r"classes=\(5, 6\) must be names"),
        (GREY, {"labels": [0, 1] * 6, "classes": "ab"}, "classes='ab' must be names"),
        (GREY, {"labels": [0, 1] * 6, "classes": 2}, "classes=2 must be names"),
        (GREY, {"classes": ("a", "b")}, r"classes=\('a', 'b'\) name the labels, and there are none"),
        (sources.Data(GREY), {"labels": [0]}, "labels are given twice"),
        (sources.Data(GREY), {"classes": ("a",)}, "classes are given twice"),
        (sources.Data(GREY), {"image_size": 4}, "image_size=4 is for arrays and lists: a Data of 8 px is not resized"),
        (np.array([], object), {}, "the set is empty"),
        (GREY[:0], {"image_size": 4}, r"the set is empty: .* these are uint8 \[0, 8, 8, 1\]"),
        (np.zeros((0, 2), np.float32), {}, r"the set is empty: .* these are \[0, 2\]"),
        (np.zeros((3, 0), np.float32), {}, r"the set is empty: .* these are \[3, 0\]"),
        ([COLOUR[0][:0]], {}, r"an image is uint8 \[0, 8, 3\]"),
        (GREY, {"labels": np.zeros((12, 0), int)}, r"one for each example, but these are \[12, 0\]"),
    ],
)
def test_what_is_refused(images, options, message):
    with pytest.raises(UserError, match=message):
        as_data(images, **options)


def test_a_model_is_trained_sampled_and_evaluated(tmp_path):
    """Class-conditional, by the names of classes; the same call continues; other images or classes are refused."""
    run, labels, named = f"{tmp_path}/run", ["b", "a", "c"] * 4, {"classes": ("c", "a", "b")} | SMOKE
    model = ddgan_jax.train(COLOUR, labels, workdir=run, **named)
    assert model.step == 2 and model.denoiser.image_shape == (8, 8, 3)
    assert model.num_classes == 3 and model.classes == ddgan_jax.load(run).classes == ("c", "a", "b")
    assert model.sample(4).shape == (4, 8, 8, 3)
    assert ddgan_jax.train(COLOUR, labels, workdir=run, **named | {"train__num_steps": 3}).step == 3
    message = rf"workdir={run} holds a run on other data .*\(train__init_from={run} starts .* restart=True"
    with pytest.raises(UserError, match=message):
        ddgan_jax.train(255 - COLOUR, labels, workdir=run, **named)
    with pytest.raises(UserError, match="holds a run on the classes c, a, b, and those of the data are b, c, w"):
        ddgan_jax.train(COLOUR, ["b", "w", "c"] * 4, workdir=run, **SMOKE)
    found = ddgan_jax.evaluate(model, COLOUR, num_samples=12, eval__features=f"{__name__}:means", eval__k=2)
    assert all(type(value) in (int, float, str, list) for value in found.values())
    assert found["num_samples"] == 12 and found["frechet_distance"] > 0 and 0 <= found["recall"] <= 1
    same = ddgan_jax.evaluate(COLOUR, COLOUR, eval__features=f"{__name__}:means", eval__k=2)
    assert abs(same["frechet_distance"]) < 1e-6 and same["precision"] == same["recall"] == 1


def means(images):
    return images.reshape(len(images), -1)[:, :6].astype(np.float32)


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def named():
    return dataclasses.replace(ddgan_jax.load("digits_conditional"), classes=NAMES)


def test_labels_that_are_names_have_the_indices_of_the_model(named):
    """Not those of their alphabetical order: the measures are those of integer labels."""
    digits, options = sources.open_data(DataConfig("digits")), dict(num_samples=100)
    names = np.array(NAMES)[digits.labels()]
    found, expected = (
        ddgan_jax.evaluate(named, digits.images, labels, **options) for labels in (names, digits.labels())
    )
    assert found["label_agreement"] > 0.8 and found == expected


@pytest.mark.parametrize("classes", [NAMES[::-1], ("naught", *NAMES[1:])])
def test_data_of_other_classes_is_not_compared(named, classes, monkeypatch):
    """From Python and on the command line."""
    digits = sources.open_data(DataConfig("digits"))
    other = sources.Data(digits.images, digits.labels(), classes)
    message = "trained on the classes zero, one, .*, nine, and those of the data are n.*: evaluate it on data of the sa"
    with pytest.raises(UserError, match=message):
        ddgan_jax.evaluate(named, other, num_samples=20)
    with pytest.raises(UserError, match=message):
        evaluation.model_samples(named, named.sampler(), other, 20, 0)
    for known in (digits, dataclasses.replace(other, classes=NAMES)):  # numbers are no names
        assert len(evaluation.model_samples(named, named.sampler(), known, 20, 0)[2]) == 20


POINTS = RNG.normal(size=(50, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (
            (GREY, ["ten"] * 12),
            {},
            "the label 'ten' is none of the classes zero, .*: labels are these names, or ",
        ),
        ((GREY,), {"seed": -1}, "seed=-1 must be an integer from 0 to 4294967295"),
        ((GREY,), {"seed": 2**33}, "seed=8589934592 must be an integer from 0"),
        ((GREY,), {"num_samples": 10.5}, "num_samples=10.5 must be an integer from 0"),
        ((GREY,), {"num_samples": -1}, "num_samples=-1 must be an integer from 0"),
        (
            (POINTS, [0, 1] * 25),
            {},
            r"the real data are points .* are compared with the 25 Gaussians",
        ),
        ((POINTS,), {}, r"the real data are points \[50, 2\]"),
        ((None, [0, 1]), {}, "labels are those of real images: pass both"),
    ],
)
def test_what_is_not_evaluated(named, arguments, options, message):
    with pytest.raises(UserError, match=message):
        ddgan_jax.evaluate(named, *arguments, **options)
    if arguments[0] is POINTS:
        with pytest.raises(UserError, match=message):
            ddgan_jax.evaluate(POINTS, *arguments)


def test_a_number_of_samples_is_for_a_model():
    with pytest.raises(UserError, match="num_samples=5 is for a model, which generates them"):
        ddgan_jax.evaluate(GREY, GREY, num_samples=5)


def test_points(tmp_path):
    points = RNG.normal(0, 3, (200, 2))
    fields = {"train__num_steps": 2, "log__tensorboard": False}
    model = ddgan_jax.train(points, workdir=tmp_path, preset="gaussians:smoke", **fields)
    assert model.sample(5).shape == (5, 2) and abs(model.config.model.data_std - points.std()) < 1e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(images=COLOUR, preset="digit"), "there is no configuration 'digit'"),
        (dict(images=COLOUR, preset="digits:smoke", train__num_step=3), "did you mean train__num_steps"),
        (dict(images=COLOUR, preset="digits:smoke", training__num_steps=3), "there is no setting training.num_steps"),
        (dict(images="photos", labels=[1]), "the classes of a folder are its subfolders"),
        (dict(images="photos", value_range=(0, 1)), r"value_range=\(0, 1\) is for arrays: leave it out"),
        (dict(preset="digits:smoke", value_range=(0, 1)), r"value_range=\(0, 1\) is for arrays: leave it out"),
        (dict(preset="digits:smoke", image_size=9), "data__image_size=9 does not halve"),
        (dict(images=RNG.normal(size=(9, 2)), image_size=9), "image_size=9 is for images, and these are points"),
        (dict(images="photos", classes=("a", "b")), "the classes of a folder are its subfolders"),
        (dict(labels=[0, 1], preset="digits:smoke"), "labels and classes are those of images: pass images too"),
        (dict(images="nowhere", preset="image_folder:small"), "data__path='nowhere' does not exist"),
        (dict(images=COLOUR[:, :6, :6], preset="digits:smoke", generator__ch_mult=(1, 2, 2)), "image_size=6 does not"),
        (dict(images=COLOUR / 255), "pass value_range"),
        (dict(images=COLOUR, data__path="photos"), "data__path names other images than those that are passed"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        ddgan_jax.train(**arguments, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_name_arguments():
    with pytest.raises(UserError, match=r"needs labels, .* set eval__features=inception"):
        ddgan_jax.evaluate(COLOUR, COLOUR, eval__features="classifier")


def test_the_older_form_names_the_new_one(tmp_path):
    config = presets.get("digits:smoke")
    with pytest.raises(UserError, match=r"is now train\(data, preset=config, workdir='x'\)"):
        ddgan_jax.train(config, "x", sources.Data(GREY))
    for workdir in ("", None, 5):
        with pytest.raises(UserError, match="name the folder of the run"):
            ddgan_jax.train(COLOUR, workdir=workdir)
    with pytest.raises(UserError, match=r"samples need real images"):
        ddgan_jax.evaluate(COLOUR)


def test_a_preset_for_the_images():
    assert api._default_preset((2,), {}) == "gaussians"
    assert api._default_preset((8, 8, 1), {}) == "digits"
    assert api._default_preset(None, {}) == api._default_preset((64, 64, 3), {}) == "image_folder:small"


def test_a_preset_for_a_folder_on_an_accelerator(tmp_path, monkeypatch):
    """By the size to which its images are resized."""
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    for side, given, preset in ((300, {}, ":large"), (300, {"data__image_size": 64}, ""), (70, {}, "")):
        folder = tmp_path / f"{side}"
        folder.mkdir(exist_ok=True)
        for i in range(4):
            Image.fromarray(RNG.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
        assert api._default_preset(None, {"data__path": str(folder)} | given) == f"image_folder{preset}"


def test_images_that_inception_cannot_read_are_trained_on_without_it():
    """Such as the four channels of latents."""
    data = sources.Data(RNG.integers(0, 256, (20, 32, 32, 4), np.uint8))
    config = read(api._for_data(as_dict(presets.get("cifar10")), data, conditional=False))
    chosen, notes = resolve_from_data(config, data)
    assert config.eval.every and config.eval.at_end and not (chosen.eval.every or chosen.eval.at_end)
    assert notes[-1].endswith("takes images with 1 or 3 channels, and those of python have 4")
    rgb = sources.Data(data.images[..., :3])
    chosen, _ = resolve_from_data(read(api._for_data(as_dict(presets.get("cifar10")), rgb, conditional=False)), rgb)
    assert chosen.eval.every and chosen.eval.at_end


@pytest.mark.slow
def test_a_folder(tmp_path):
    for i in range(12):
        file = pathlib.Path(tmp_path / "photos" / f"{i}.png")
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(COLOUR[i]).save(file)
    fields = {"data__dir": str(tmp_path / "copies"), "train__num_steps": 2, "train__batch_size": 4}
    fields |= {"data__name": "image_folder", "log__tensorboard": False}
    model = ddgan_jax.train(tmp_path / "photos", workdir=tmp_path / "run", preset="image_folder:smoke", **fields)
    assert model.denoiser.image_shape == (8, 8, 3)
