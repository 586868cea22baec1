"""Evaluation as a user runs it: of images made elsewhere, of checkpoints, while training; and everything wrong."""

import dataclasses
import errno
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from commands import POINTS, ROOT, SMOKE, run_python, succeed, with_devices
from conftest import GOLDEN, preset_with, refuses
from PIL import Image
from published import arrays, inception_state, vgg_state
from servers import serving

from ddgan_jax.commands import evaluate, figures, generate, outputs, sample_files
from ddgan_jax.commands.train import train
from ddgan_jax.config import presets
from ddgan_jax.config.settings import DataConfig, as_dict, read
from ddgan_jax.data import sources, synthetic
from ddgan_jax.data.sources import Data, open_data
from ddgan_jax.devices import parallel
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method.build import build, init_state
from ddgan_jax.metrics import checks, classifier, evaluator, feature_networks, features, inception, npz, vgg
from ddgan_jax.model.loading import config_of, load, load_initial_networks
from ddgan_jax.storage import buckets, checkpoint, downloads, paths, safetensors

TIMES = ("seconds", "sampling")


def config(name="digits", variant="", **eval_fields):
    c = as_dict(presets.get(f"{name}:{variant}"))
    c["eval"] |= eval_fields
    return c


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(configuration, all digits): the data and the classifier are prepared once."""
    c = config(batch_size=64)
    c["data"]["dir"] = str(tmp_path_factory.mktemp("data"))
    script = "import sys; from ddgan_jax.data.sources import *; open_data(DataConfig('digits', dir=sys.argv[1]))"
    run_python(script, c["data"]["dir"])
    return c, open_data(DataConfig("digits", dir=c["data"]["dir"])).images


def save(path, images):
    np.savez(path, images=images)
    return str(path)


def of_samples(c, images, folder, **options):
    return evaluate.evaluate(c, "", save(folder / "x.npz", images), str(folder / "out"), **options)


# --- Digits -------------------------------------------------------------------------------------------------------


def test_the_training_set_itself_is_perfect(digits, tmp_path):
    c, images = digits
    results = of_samples(c, images, tmp_path)
    assert results["classifier_frechet"] == pytest.approx(0, abs=1e-3) and "fid" not in results
    assert results["precision"] == results["recall"] == results["coverage"] == 1
    assert results["num_samples"] == results["manifold_fake"] == results["real_images"] == 1797 and results["k"] == 3
    assert results["classifier_test_accuracy"] > 0.95 and results["classifier_test_images"] == 359
    assert results["modes"] == 10 and results["kl"] < 0.01
    assert results["nearest_training_distance"] == 0 < results["nearest_training_distance_of_training_images"]
    for name in ("samples", "modes", "manifold", "neighbours"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 200, name
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results, default=float))


def test_the_order_of_samples_does_not_matter(digits, tmp_path):
    """Samples of a file may be sorted by class, and precision and recall may be of some of them."""
    c, images = digits
    c = c | {"eval": c["eval"] | {"manifold_samples": 500}}
    labels = open_data(DataConfig("digits", dir=c["data"]["dir"])).labels()
    for name in ("sorted", "shuffled"):
        (tmp_path / name).mkdir()
    by_class = of_samples(c, images[np.argsort(labels, kind="stable")], tmp_path / "sorted")
    shuffled = of_samples(c, images[np.random.default_rng(0).permutation(len(images))], tmp_path / "shuffled")
    for measure in ("precision", "recall", "coverage"):
        assert abs(by_class[measure] - shuffled[measure]) < 0.05, measure


def test_the_inception_score_of_sorted_samples(monkeypatch):
    """Each split has samples of all classes: exp(H(mean) - mean H), 10 for ten equal classes that are certain."""
    logits = 50.0 * np.eye(10, dtype=np.float32)[np.repeat(np.arange(10), 100)]
    fake = features.Features(np.zeros((1_000, 4), np.float32), logits)
    monkeypatch.setattr(evaluator, "_frechet_distance", lambda *_: 0.0)
    nothing = evaluator.Evaluator(read(config()), None, np.zeros(0, int), [], [], {})
    assert evaluator._inception_measures(nothing, fake)["inception_score"] > 9


def test_worse_samples_have_worse_numbers(digits, tmp_path):
    """A few digits only: precise, but without recall. Noise: neither."""
    c, images = digits
    labels = open_data(DataConfig("digits", dir=c["data"]["dir"])).labels()
    ones = of_samples(c, images[labels == 1], tmp_path)
    noise = of_samples(c, np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8), tmp_path)
    assert ones["modes"] <= 3 and ones["precision"] == 1 and ones["recall"] < 0.3 and ones["kl"] > 2
    assert noise["precision"] < 0.1 and min(ones["classifier_frechet"], noise["classifier_frechet"]) > 10


def test_neither_batches_nor_chunks_show(digits):
    c, images = digits
    found = []
    for batch, chunk in ((64, 500), (7, 33)):
        c["eval"]["batch_size"] = batch
        chunks = (images[i : min(i + chunk, 500)] for i in range(0, 500, chunk))
        found.append(evaluator.measure(evaluator.open_evaluator(c), chunks, 500).results)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name


def test_four_devices_give_the_same_numbers(digits, tmp_path):
    """To rounding; the samples are no copies, which would lie at the very edge of balls."""
    c, images = digits
    noise = np.random.default_rng(0).integers(-30, 30, images.shape)
    mine = of_samples(c, np.clip(images + noise, 0, 255).astype(np.uint8)[::2], tmp_path)
    data = "--config=configs/digits.py", f"--config.data.dir={c['data']['dir']}"
    flags = "--mode=evaluate", *data, f"--samples={tmp_path}/x.npz"
    succeed(*flags, f"--out={tmp_path}/four", env=with_devices(4))
    theirs = json.loads((tmp_path / "four" / "results.json").read_text())
    assert theirs.keys() == mine.keys()
    for name in mine.keys() - set(TIMES):
        approximately = pytest.approx(mine[name], rel=1e-4) if isinstance(mine[name], float) else mine[name]
        assert theirs[name] == approximately, name


def test_what_is_known_of_the_real_images_is_kept(digits, tmp_path, monkeypatch):
    """A second evaluation trains and computes nothing of them; damaged files are made again."""
    c, images = digits
    first = of_samples(c, images[:300], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(feature_networks.classifier, "train", lambda *_: pytest.fail("trained again"))
        again = of_samples(c, images[:300], tmp_path)
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in first.items() if k not in TIMES}
    (kept,) = (path for path in os.scandir(f"{c['data']['dir']}/evaluation") if path.name.startswith("features"))
    with open(kept.path, "r+b") as file:
        file.truncate(100)
    assert of_samples(c, images[:300], tmp_path)["classifier_frechet"] == first["classifier_frechet"]
    assert os.path.getsize(kept.path) > 100


def test_moments_are_of_all_real_images_though_few_features_are_kept(digits, tmp_path, monkeypatch):
    c, images = digits
    first = of_samples(c, images[:300], tmp_path)
    monkeypatch.setattr(evaluator, "MAX_STORED", 200)
    for _ in range(2):  # computed, and read from the cache
        results = of_samples(c, images[:300], tmp_path)
        assert results["classifier_frechet"] == pytest.approx(first["classifier_frechet"], rel=1e-5)
        assert results["real_images"] == 1797 and results["real_images_except_for_moments"] == 200
        assert results["manifold_real"] == 200 and results["precision"] < first["precision"]


@pytest.mark.parametrize("chunks", [[8] * 10, [100, 3], [50, 64, 14], [1]])
def test_a_network_gets_full_batches_whatever_the_chunks(chunks):
    """Few large images are generated at a time; a network that gets each chunk alone would compute mostly padding."""
    images = np.arange(sum(chunks), dtype=np.uint8).reshape(-1, 1, 1, 1)
    seen = []

    def apply(batch):
        seen.append(len(batch))
        return [batch.reshape(len(batch), -1).astype(np.float32), np.zeros((len(batch), 0), np.float32)]

    network = features.Network("identity", apply, "0")
    (found,) = features.extract([network], np.split(images, np.cumsum(chunks)[:-1]), 16, len(images))
    np.testing.assert_array_equal(found.features.ravel(), images.ravel())
    assert seen == [16] * -(-len(images) // 16)


def test_the_yardstick_is_of_the_network_the_images_and_their_numbers(digits, monkeypatch):
    monkeypatch.setattr(feature_networks.classifier, "STEPS", 30)
    monkeypatch.setattr(feature_networks, "MIN_ACCURACY", {})
    c, images = digits
    labels = open_data(DataConfig("digits", dir=c["data"]["dir"])).labels()

    def yardstick(count, **eval_fields):
        data = Data(images[:count], labels[:count])
        return evaluator.open_evaluator(c | {"eval": c["eval"] | eval_fields}, data).yardstick

    assert yardstick(300) == yardstick(300) and len(yardstick(300)) == 8
    assert len({yardstick(300), yardstick(400), yardstick(300, online_samples=50)}) == 3


@pytest.mark.slow
def test_corrected_labels_train_another_classifier(digits, tmp_path, monkeypatch):
    """Also where the classes have no names."""
    monkeypatch.setattr(feature_networks.classifier, "STEPS", 300)
    _, images = digits
    c, labels = config(batch_size=64), open_data(DataConfig("digits")).labels()
    c["data"]["dir"] = str(tmp_path)
    found = []
    for given in ((labels + 1) % 10, labels):
        j = evaluator.open_evaluator(c, Data(images, lambda given=given: given))
        found.append(evaluator.measure(j, [images[:300]], 300, labels=given[:300]).results)
    assert min(results["label_agreement"] for results in found) > 0.9
    assert [results["of_modes"] for results in found] == [10, 10]


@pytest.mark.parametrize(
    ("draws", "matrix", "offset"),
    [
        ([0, 0, 0, 0, 0, 0], [[1, 0], [0, 1]], [0, 0]),
        ([0, 0, 0, 0, 1, -1], [[1, 0], [0, 1]], [2, -2]),
        ([1, 0, 0, 0, 0, 0], [[np.cos(0.15), -np.sin(0.15)], [np.sin(0.15), np.cos(0.15)]], [0, 0]),
        ([0, 1, -1, 1, 0, 0.5], [[0.85, 0.15], [0, 1.15]], [0, 1]),
    ],
)
def test_the_classifiers_distortions_are_affine_maps(draws, matrix, offset, monkeypatch):
    """About the centre, at most 2 of 28 px away; 8 px stay as they are."""
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 2), np.uint8)
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, minval: jnp.broadcast_to(jnp.array(draws), shape[::-1]).T
    )
    found = classifier._distorted(jnp.asarray(images), jax.random.key(0))
    about_centre = np.full(2, 13.5) - np.array(matrix) @ np.full(2, 13.5) + offset
    one = lambda channel: scipy.ndimage.affine_transform(channel, matrix, about_centre, order=1, mode="nearest")  # noqa: E731
    for image, distorted in zip(images.astype(np.float32), found, strict=True):
        expected = np.stack([one(image[..., c]) for c in range(2)], axis=-1)
        np.testing.assert_allclose(distorted, expected, atol=0.01)
    small = jnp.asarray(images[:, :8, :8])
    assert classifier._distorted(small, jax.random.key(0)) is small


@pytest.mark.parametrize("name", ["mnist", "stacked_mnist:mnist_5k"])
def test_the_classifier_of_mnist_is_tested_on_the_test_digits(name):
    """Padded as the images are, whatever part of the data the model is trained on."""
    c = read(presets.get(name))
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, split="train[:10%]"))
    x, y, test_x, test_y, count = feature_networks._classifier_data(c, open_data(c.data))
    assert x.shape == (4_000, 32, 32, 1) and test_x.shape == (1_000, 32, 32, 1) and count == 10
    assert np.bincount(y).tolist() == [400] * 10 and np.bincount(test_y).tolist() == [100] * 10


@pytest.mark.parametrize("hashed", [2**31, 1000])
def test_a_fingerprint_depends_on_every_image(hashed, monkeypatch):
    monkeypatch.setattr(sources, "MAX_HASHED", hashed)
    images = np.zeros((2000, 2, 2, 1), np.uint8)
    changed = images.copy()
    changed[1] = 1
    assert sources.fingerprint(images) == sources.fingerprint(images.copy())
    assert sources.fingerprint(images) != sources.fingerprint(changed)


@pytest.mark.parametrize("hashed", [2**31, 1000])
def test_features_follow_an_image_that_is_edited(hashed, tmp_path, monkeypatch):
    """Also in a folder of which not every image is hashed."""
    monkeypatch.setattr(sources, "MAX_HASHED", hashed)
    for i in range(300):
        figures.save_image(tmp_path / "in" / f"{i:03d}.png", np.full((8, 8), i % 256, np.uint8))
    c = read({"data": {"name": "image_folder", "path": str(tmp_path / "in"), "dir": str(tmp_path / "data")}})
    network = features.Network("means", lambda x: [x.mean((1, 2)), np.zeros((len(x), 1))], "0")

    def found():
        data = open_data(c.data)
        return features.reference_features(c, data, np.arange(300), network).features[:, 0].tolist()

    right = [i % 256 for i in range(300)]
    assert found() == found() == right
    figures.save_image(tmp_path / "in" / "006.png", np.full((8, 8), 77, np.uint8))  # none of 256 at equal distances
    assert found() == [*right[:6], 77, *right[7:]]


def test_a_folder_of_pictures(digits, tmp_path):
    c, images = digits
    outputs.save(images[:40], str(tmp_path / "in"))
    results = evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"))
    assert results["num_samples"] == 40 and results["precision"] == 1
    evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"), num_samples=30)
    with pytest.raises(UserError, match=r"name the real images that .*in is compared with"):
        evaluate.evaluate(None, "", str(tmp_path / "in"))
    with pytest.raises(UserError, match=r"--out=.*in is in the folder of the samples"):
        evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "in"))
    shutil.copytree(tmp_path / "in", tmp_path / "in" / "more")
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "curves.png").write_text("mine")  # no evaluation was here
    assert evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"))["num_samples"] == 80
    assert (tmp_path / "out" / "curves.png").read_text() == "mine"
    shutil.rmtree(tmp_path / "in" / "more")
    Image.new("L", (9, 8)).save(tmp_path / "in" / "wide.png")
    with pytest.raises(UserError, match="of different sizes"):
        evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"))
    (tmp_path / "in" / "wide.png").write_text("no picture")
    with pytest.raises(UserError, match=r"sample .*wide.png cannot be read: it is not an image"):
        evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"))


def test_some_of_the_samples_of_a_file_are_from_all_of_it(tmp_path):
    """Whether the file is sorted by class, or has the classes in turn."""
    for labels in (np.repeat(np.arange(10), 400), np.tile(np.arange(10), 400)):
        np.savez(tmp_path / "x.npz", labels.astype(np.float32)[:, None])
        for num in (2_000, 800, 400):
            chunks, count, _, _ = sample_files.file_samples(str(tmp_path / "x.npz"), num)
            found = np.bincount(np.concatenate(list(chunks)).ravel().astype(int), minlength=10)
            assert count == num == found.sum() and np.abs(found / num - 0.1).max() < 0.05


@pytest.mark.slow
def test_another_evaluation_of_a_step_has_a_folder_of_its_own(gaussians_run):
    """A quick look does not replace the results of many samples; the same command replaces its own."""
    folder, c = gaussians_run / "evaluation", str(gaussians_run)
    for num, made in ((500, "8"), (100, "8-2"), (500, "8"), (100, "8-2"), (200, "8-3")):
        evaluate.evaluate(None, c, num_samples=num)
        assert json.loads((folder / made / "results.json").read_text())["num_samples"] == num
    assert sorted(path.name for path in folder.iterdir()) == ["8", "8-2", "8-3"]
    (folder / "8" / "results.json").write_text("[1]")
    evaluate.evaluate(None, c, num_samples=500)
    assert (folder / "8" / "results.json").read_text() == "[1]" and (folder / "8-4" / "results.json").exists()


def test_an_evaluation_on_other_images_of_the_same_name_has_a_folder_of_its_own(tmp_path):
    """Two folders of images have the same data.name and split."""
    c, folder = read(presets.get("image_folder:smoke")), str(tmp_path / "8")
    one, other = (Data(np.full((9, 8, 8, 3), value, np.uint8)) for value in (1, 2))
    results = {"num_samples": 5, "features": c.eval.features, "data": f"{c.data.name} {c.data.split}"}
    for fingerprint, data, number in ((one, one, ""), (one, other, "-2"), (None, other, "")):
        known = {"data_fingerprint": fingerprint.fingerprint} if fingerprint else {}  # older results have none
        (tmp_path / "8").mkdir(exist_ok=True)
        (tmp_path / "8" / "results.json").write_text(json.dumps(results | known))
        assert evaluate.without_other_results(folder, c, 5, data) == folder + number


@pytest.fixture
def gaussians_run(tmp_path):
    train(presets.get("gaussians:smoke"), str(tmp_path / "run"))
    return tmp_path / "run"


def test_a_directory_of_samples_that_was_not_completed(digits, tmp_path):
    """It may hold samples of two models. The command that writes them, run again, completes it."""
    (c, images), out = digits, str(tmp_path / "x")
    outputs.save(images[:9], out)
    with pytest.raises(KeyError), outputs.into_directory(out) as add:
        add(images[9:12])
        raise KeyError
    with pytest.raises(UserError, match=r"--samples=.*x is not complete: .*Run it again, or remove .*x/.unfinished"):
        evaluate.evaluate(c, "", out, str(tmp_path / "out"))
    outputs.save(images[:9], out)
    assert evaluate.evaluate(c, "", out, str(tmp_path / "out"))["num_samples"] == 9
    with pytest.raises(UserError, match=r"--out=.*x/e is in the folder of the samples"):
        evaluate.evaluate(c, "", out, f"{out}/e")
    outputs.check_out(out, "", num=9)
    outputs.save(images[:9], f"{out}/old")
    with pytest.raises(UserError, match=r"holds other images, such as old/000000.png: name an empty directory"):
        outputs.check_out(out, "", num=9)


def test_a_folder_of_several_sets_of_samples(digits, tmp_path):
    """The figures of an evaluation of one set are no samples; a set that was not completed is refused here too."""
    (c, images), sets = digits, str(tmp_path / "sets")
    for name in ("a", "b"):
        outputs.save(images[:9], f"{sets}/{name}")
    evaluate.evaluate(c, "", f"{sets}/a")
    assert (tmp_path / "sets" / "a.evaluation" / "samples.png").exists()
    outputs.check_out(f"{sets}/a", "", num=9)
    assert sample_files.file_samples(sets, 0)[1] == 18
    (tmp_path / "sets" / "b" / outputs.UNFINISHED).touch()
    with pytest.raises(UserError, match=r"--samples=.*sets is not complete: .*or remove .*sets/b/\.unfinished"):
        sample_files.file_samples(sets, 0)
    assert sample_files.file_samples(f"{sets}/a", 0)[1] == 9


@pytest.mark.parametrize(
    "name, target, message",
    [
        ("2.png", "../outside.png", "2.png cannot be read: it is a link to a file outside the folder"),
        ("2.png", "/dev/zero", "2.png cannot be read: it is a link to a file outside the folder"),
        ("2.png", "nothing.png", "2.png cannot be read: it is a link that leads nowhere"),
        ("2.png", "2.png", "2.png cannot be read: it is a link that leads nowhere"),
        ("2.png", "pipe", "2.png cannot be read: it is not a regular file"),
        ("2.png", "large", "2.png cannot be read: it is larger than 1 GiB"),
        ("loop", ".", "loop cannot be read: it is a link to a folder, which is not followed"),
    ],
)
def test_links_and_pipes_among_samples(tmp_path, name, target, message):
    """They are refused as in data.path. A link to an image inside the folder is a sample."""
    folder = tmp_path / "in"
    for i in range(2):
        figures.save_image(folder / f"{i}.png", np.zeros((8, 8), np.uint8))
    shutil.copy(folder / "0.png", tmp_path / "outside.png")
    shutil.copy(folder / "0.png", folder / "large")
    os.truncate(folder / "large", 3 * 2**30)
    os.mkfifo(folder / "pipe")
    (folder / "3.png").symlink_to("0.png")
    (folder / "notes").symlink_to("nothing")
    assert len(next(sample_files.file_samples(str(folder), 0)[0])) == 3
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=f"^sample {folder}/{message}"):
        next(sample_files.file_samples(str(folder), 0)[0])


def test_a_folder_of_samples_is_evaluated_as_their_checkpoint(digits, tmp_path):
    """Also of the fewest that have neighbours. The pictures of grey digits may be in RGB."""
    (c, _), num = digits, 4
    model = load("digits")
    generate.save(model.sample(num), tmp_path / "in")
    found = [
        evaluate.evaluate(c, path, samples, str(tmp_path / "out"), num)
        for path, samples in (("digits", ""), ("", str(tmp_path / "in")))
    ]
    named = {*TIMES, "checkpoint", "step", "seed", "samples"}
    first, second = ({k: v for k, v in results.items() if k not in named} for results in found)
    assert first == second and first["num_samples"] == num and (tmp_path / "out" / "neighbours.png").exists()


def test_colour_is_not_taken_for_grey(digits, tmp_path):
    c, images = digits
    coloured = images[:20].repeat(3, axis=-1)
    outputs.save(coloured, str(tmp_path / "in"))
    grey = evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"))
    assert grey["nearest_training_distance"] == 0
    coloured[7, 0, 0, 1] ^= 1
    figures.save_image(tmp_path / "in" / "000007.png", coloured[7])
    with refuses("the samples are in colour, but the real images are grey"):
        evaluate.evaluate(c, "", str(tmp_path / "in"), str(tmp_path / "out"))


def test_what_is_timed():
    """Weights that lie on the devices before."""
    seen = []
    draw = lambda params, seed, batch: seen.append(params["w"])  # noqa: E731
    found = evaluate.time_sampling(draw, {"w": np.zeros(3)}, 0, 10, 4)
    assert len(seen) == 6 and all(isinstance(w, jax.Array) and w is seen[0] for w in seen)
    assert parallel.replicate_local(seen[0]) is seen[0] and found["seconds_per_100"] >= 0


# --- Points -------------------------------------------------------------------------------------------------------


def test_exact_points(tmp_path):
    points = open_data(DataConfig("gaussians")).images[:20_000]
    results = of_samples(config("gaussians"), points, tmp_path)
    assert results["modes"] == results["of_modes"] == 25 and results["kl"] < 1e-3
    assert results["high_quality"] == pytest.approx(1 - np.exp(-4.5), abs=3e-3)  # within 3 deviations in the plane
    # of the shares of 25 modes and of what lies in none: half of the sum of the differences from 1/25 (and 0)
    assert results["total_variation"] == pytest.approx(np.exp(-4.5), abs=5e-3)
    half = of_samples(config("gaussians"), points[points[:, 0] < 1], tmp_path)
    none = of_samples(config("gaussians"), np.full((9, 2), 100.0, np.float32), tmp_path)  # has no share, and so no KL
    written = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert np.isnan(none["kl"]) and written["kl"] is None and written["modes"] == 0
    assert half["modes"] == 15 and half["total_variation"] == pytest.approx(0.4, abs=0.02)


def test_while_training(tmp_path):
    """Measures go into the metrics, and the best checkpoint stays and has a name."""
    arguments = [POINTS, f"--workdir={tmp_path}", "--config.eval.every=2", "--config.eval.online_samples=200"]
    succeed(*arguments, "--config.checkpoint.keep=1", "--config.checkpoint.every=100")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {r["step"]: r["eval/total_variation"] for r in records if "eval/total_variation" in r}
    assert values.keys() == {2, 4, 6, 8} and "eval/modes" in records[-1] and "d_loss" in records[-1]
    marked = json.loads((tmp_path / "best.json").read_text())
    assert marked["step"] == min(values, key=lambda step: (round(values[step], 5), step))
    assert marked["value"] == pytest.approx(min(values.values()), rel=1e-4)
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {marked["step"], 8}
    # without --config it is that of the training
    succeed("--mode=evaluate", f"--checkpoint={tmp_path}/best", f"--out={tmp_path}/out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["step"] == marked["step"] and results["num_samples"] == 20_000
    assert results["sampling"]["network_calls"] == 4 and results["sampling"]["seconds_per_100"] > 0


# --- A function of the user ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_features(tmp_path_factory):
    """A working directory with the example of docs/evaluation.md as my_features.py."""
    folder = tmp_path_factory.mktemp("own")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)
    (folder / "my_features.py").write_text(example)
    return folder


def run_in(folder, *arguments):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_a_function_of_the_user_measures_a_checkpoint(own_features, digits):
    """In the working directory, under names that are not FID; what it makes of real images is kept."""
    flags = "--config=digits", f"--config.data.dir={digits[0]['data']['dir']}"
    flags += ("--mode=evaluate", "--checkpoint=digits", "--num_samples=100")
    result = run_in(own_features, *flags, "--config.eval.features=my_features:thumbnails")
    assert result.returncode == 0, result.stderr
    results = json.loads((own_features / "digits.evaluation" / "results.json").read_text())
    assert results["features"] == "my_features:thumbnails" == results["networks"][0]
    assert 0 < results["frechet_distance"] < 1 and abs(results["kernel_distance"]) < 0.1
    assert 0.4 < results["precision"] <= 1 and 0 < results["recall"] <= 1 and results["coverage"] > 0.1
    assert not {"fid", "kid", "classifier_frechet", "modes"} & results.keys()
    assert (own_features / "digits.evaluation" / "neighbours.png").exists()


@pytest.mark.slow
def test_a_function_of_the_user_ranks_checkpoints(own_features, digits):
    flags = f"--config.data.dir={digits[0]['data']['dir']}", "--config.data.name=digits", "--workdir=run"
    evaluation = "--config.eval.features=my_features:thumbnails", "--config.eval.online_samples=20"
    result = run_in(own_features, "--config=digits:smoke", *flags, *evaluation, "--config.eval.every=4")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (own_features / "run" / "metrics.jsonl").read_text().splitlines()]
    values = {r["step"]: r["eval/frechet_distance"] for r in records if "eval/frechet_distance" in r}
    marked = json.loads((own_features / "run" / "best.json").read_text())
    assert {r.get("yardstick") for r in records if r["step"] in values} == {marked["yardstick"]}
    assert values.keys() == {4, 8} and marked["measure"] == "eval/frechet_distance"
    assert marked["value"] == pytest.approx(min(values.values()), rel=1e-4)
    # The configuration in a checkpoint runs no code.
    result = run_in(own_features, "--mode=evaluate", "--workdir=run")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "add --config.eval.features=my_features:thumbnails" in result.stderr


FUNCTIONS = """
import numpy as np
scale = 1.0
means = lambda images: scale * images.mean((1, 2))
flat = lambda images: np.zeros(len(images))
few = lambda images: np.zeros((3, 2))
names = lambda images: np.full((len(images), 2), "a")
large = lambda images: np.full((len(images), 2), 1e300)
def fails(images): raise KeyError("a\\nb")
"""


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module:f", "there is no module no_such_module in /.* or on PYTHONPATH"),
        ("functions:f", r"eval.features=functions:f: .*functions.py has no f"),
        ("functions:scale", "is of type float, and must be a function"),
        ("functions.more:f", "functions.more cannot be imported|there is no module functions.more"),
        ("broken:f", r"broken cannot be imported: SyntaxError: .*broken.py, line 1"),
        ("needs:f", "needs cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("functions:flat", r"the features of functions:flat must be an array \[N, D\], .* not of shape \[16\]"),
        ("functions:few", r"one row an image, not of shape \[3, 2\] for 16 images"),
        ("functions:names", "the features of functions:names must be real numbers"),
        ("functions:large", "the features of functions:large must be finite"),
        ("functions:fails", r"functions:fails failed for images uint8 \[16, 8, 8, 1\]: KeyError: 'a"),
    ],
)
def test_functions_that_cannot_be(digits, tmp_path, monkeypatch, name, message):
    files = {"functions": FUNCTIONS, "broken": "def f(", "needs": "import no_such_package"}
    for module, text in files.items():
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    c, images = digits
    with refuses(message):
        evaluator.open_evaluator(c | {"eval": c["eval"] | {"features": name}}, Data(images))


def test_a_function_that_changes_is_computed_again(digits, tmp_path, monkeypatch):
    module = types.ModuleType("functions")
    exec(FUNCTIONS, vars(module))
    monkeypatch.setitem(sys.modules, "functions", module)
    c, images = digits
    c = c | {"eval": c["eval"] | {"features": "functions:means"}}
    first = evaluator.open_evaluator(c, Data(images)).real[0].features
    np.testing.assert_array_equal(first, images.mean((1, 2)).astype(np.float32))
    calls, module.means = [], lambda images, means=module.means: calls.append(len(images)) or means(images)
    assert len(evaluator.open_evaluator(c, Data(images)).real[0].features) == 1797 and calls == [16]
    module.scale = 2.0
    np.testing.assert_array_equal(evaluator.open_evaluator(c, Data(images)).real[0].features, 2 * first)


# --- Published networks, with random weights ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A configuration of made images with both networks, as npz files of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    np.savez(folder / "inception.npz", **arrays(inception_state()))
    np.savez(folder / "vgg.npz", **arrays(vgg_state()))
    c = config("cifar10", "smoke", features="inception", num_samples=12, batch_size=12, reference_samples=12)
    c["eval"] |= {"inception_weights": f"{folder}/inception.npz", "vgg_weights": f"{folder}/vgg.npz"}
    c["data"]["dir"] = str(folder / "data")
    return c


@pytest.mark.slow
def test_the_measures_of_the_paper(published, tmp_path, capsys):
    opened = evaluator.open_evaluator(published)
    assert "note: with 12 images, the measures are rough" in capsys.readouterr().out
    images = opened.data.images[opened.reference]
    assert opened.about["networks"] == ["Inception 2015-12-05", "VGG16"]
    other = evaluator.measure(opened, [images[:3] // 2, images[3:] // 2], len(images)).results
    assert other["fid"] > 1e-2 and other["kid"] > 0 and other["inception_score"] >= 1 and other["precision"] <= 1
    assert other["kid_block_size"] == other["num_samples"] == other["manifold_real"] == 12

    def with_statistics(name):
        c = published | {"eval": published["eval"] | {"reference_statistics": str(tmp_path / name)}}
        return evaluator.measure(dataclasses.replace(opened, config=read(c)), [images // 2], len(images)).results

    # statistics that somebody published, of the same images
    evaluator.distances.save_moments(tmp_path / "mine.npz", evaluator.distances.moments([opened.real[0].features]))
    assert with_statistics("mine.npz")["fid"] == pytest.approx(other["fid"], rel=1e-6)
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="of features of width 64, and 2048 is needed"):
        with_statistics("small.npz")


@pytest.mark.slow
def test_a_file_of_the_reference_is_evaluated_and_trained_from_under_its_configuration(published, tmp_path):
    """netG_1.pth holds only arrays, and a configuration supplies the rest; an error reports where they disagree."""
    for name in ("netG_1", "content"):
        packed = (GOLDEN / "checkpoint" / f"{name}.pth.xz").read_bytes()
        (tmp_path / f"{name}.pth").write_bytes(lzma.decompress(packed))
    small = dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,), nz=8, z_emb_dim=16, n_mlp=2)
    c = published | {"generator": small, "data": published["data"] | {"image_size": 16}}
    c["eval"] = published["eval"] | {"vgg_weights": None, "download": False}
    c["train"] = published["train"] | {"init_from": str(tmp_path / "netG_1.pth")}
    results = evaluate.evaluate(c, c["train"]["init_from"], num_samples=12)
    assert results["checkpoint"] == c["train"]["init_from"] and results["step"] == 0 and results["fid"] > 0
    assert (tmp_path / "netG_1.evaluation" / "samples.png").exists()
    with pytest.raises(UserError, match=r"the weights do not fit: all_modules\.\d+\.weight"):
        evaluate.evaluate(c | {"generator": small | {"nf": 16}}, c["train"]["init_from"])

    def networks(name):
        """The networks that a run of the reference's discriminator begins with."""
        stages = [[2, False], [4, True], [8, True], [8, True]]
        d = {"ngf": 2, "t_emb_dim": 8, "stages": stages}
        with_it = read(c | {"discriminator": d, "train": c["train"] | {"init_from": str(tmp_path / name)}})
        return load_initial_networks(with_it, jax.eval_shape(lambda: init_state(build(with_it), 0)))[1:]

    gen, disc = networks("netG_1.pth")
    assert disc is None
    again, disc = networks("content.pth")  # with the moving average that netG_1.pth holds
    jax.tree.map(np.testing.assert_array_equal, again, gen)
    assert disc["conv_in"]["kernel"].shape == (1, 1, 6, 4)
    shapes = jax.eval_shape(lambda: init_state(build(c), 0))  # with another discriminator
    with pytest.raises(UserError, match="the weights do not fit"):
        load_initial_networks(read(c | {"train": {"init_from": str(tmp_path / "content.pth")}}), shapes)


def test_weights_that_are_not_there_or_damaged(published, tmp_path, monkeypatch):
    c = published | {"data": published["data"] | {"dir": str(tmp_path)}}
    missing = c | {"eval": c["eval"] | {"inception_weights": "", "vgg_weights": "", "download": False}}
    with pytest.raises(
        UserError, match=r"needs pt_inception-2015-12-05-6726825d.pth \(SHA-256 6726825d\w{56}, from https://"
    ) as error:
        evaluator.open_evaluator(missing)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / inception.FILE).write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"6726825d.pth is damaged: its SHA-256 is \w{64}, not 6726825d"):
        evaluator.open_evaluator(missing)
    (tmp_path / "bad.npz").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"bad.npz is damaged"):
        evaluator.open_evaluator(c | {"eval": c["eval"] | {"inception_weights": str(tmp_path / "bad.npz")}})
    with pytest.raises(UserError, match=r"the weights lack 'Conv2d_1a_3x3.conv.weight'"):
        evaluator.open_evaluator(c | {"eval": c["eval"] | {"inception_weights": c["eval"]["vgg_weights"]}})


def test_the_evaluation_at_the_end(tmp_path, capsys):
    """It is not done twice, and a smaller one of the same step does not replace it."""
    c = preset_with("gaussians:smoke", train__num_steps=2, eval__at_end=True, eval__num_samples=70)
    c.log.tensorboard = False
    train(c, tmp_path)
    folder = tmp_path / "evaluation"
    assert json.loads((folder / "2" / "results.json").read_text())["num_samples"] == 70
    capsys.readouterr()
    train(c, tmp_path)
    assert f"the evaluation of step 2 is in {folder}/2/results.json" in capsys.readouterr().out
    shutil.rmtree(folder)
    evaluate.evaluate(None, tmp_path, num_samples=50)
    for _ in range(2):
        train(c, tmp_path)
        assert [json.loads(file.read_text())["num_samples"] for file in sorted(folder.glob("*/results.json"))] == [
            50,
            70,
        ]
    assert f"the evaluation of step 2 is in {folder}/2-2/results.json" in capsys.readouterr().out


@pytest.mark.parametrize("theirs, ours", [("x.npz", None), (None, "x.npz"), ("x.npz", "y.npz"), ("x.npz", "x.npz")])
def test_an_evaluation_with_other_statistics_has_a_folder_of_its_own(theirs, ours, tmp_path):
    c = read(config("cifar10", "smoke", reference_statistics=ours))
    known = {"num_samples": 5, "features": c.eval.features, "data": f"{c.data.name} {c.data.split}"}
    known |= {"reference_statistics": theirs} if theirs else {}
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "results.json").write_text(json.dumps(known))
    assert evaluate.without_other_results(f"{tmp_path}/8", c, 5) == f"{tmp_path}/8{'-2' * (theirs != ours)}"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"features": "inception", "download": False}, "evaluation needs pt_inception"),
        ({"features": "classifier"}, "eval.features=classifier needs labels"),
        ({"features": "points"}, "eval.features=points compares samples with the 25 Gaussians"),
    ],
)
def test_training_does_not_start_where_it_could_not_end(fields, message, tmp_path):
    c = preset_with("digits:smoke", eval__at_end=True, data__dir=str(tmp_path / "data"))
    c.eval.update(fields)
    with refuses(message):
        train(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_are_downloaded(published, tmp_path, monkeypatch):
    """The files of data.dir come first, then those of earlier downloads; a fault names what is missing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "DOWNLOAD_RETRY_SECONDS", 0.1)
    fields = {"inception_weights": None, "vgg_weights": None}
    c = read(published | {"data": published["data"] | {"dir": str(tmp_path)}, "eval": published["eval"] | fields})
    with pytest.raises(Fault, match=r"inception-2015-12-05-6726825d.pth cannot be downloaded: .*refused") as error:
        feature_networks.weights_files(c, manifolds=True)
    for part in (inception.FILE, inception.SHA256, vgg.FILE, vgg.SHA256, f"in {tmp_path}"):
        assert part in str(error.value)
    kept = [str(downloads.folder() / module.FILE) for module in (inception, vgg)]
    with serving({f"/{module.FILE}": module.FILE.encode() for module in (inception, vgg)}) as server:
        monkeypatch.setenv(downloads.MIRROR, server.url)
        with pytest.raises(Fault, match="is not the published file: its SHA-256 is"):
            feature_networks.weights_files(c, manifolds=False)
        for module in (inception, vgg):
            monkeypatch.setattr(module, "SHA256", hashlib.sha256(module.FILE.encode()).hexdigest())
        assert feature_networks.weights_files(c, manifolds=False) == (kept[0], "")
        server.files.pop(f"/{vgg.FILE}")
        with pytest.raises(Fault, match=r"answers 404 .* or pass --config.eval.download=False to do without it"):
            feature_networks.weights_files(c, manifolds=True)
        server.files[f"/{vgg.FILE}"] = vgg.FILE.encode()
        assert feature_networks.weights_files(c, manifolds=True) == tuple(kept)
    assert feature_networks.weights_files(c, manifolds=True) == tuple(kept)
    (tmp_path / vgg.FILE).write_bytes(b"mine")
    assert feature_networks.weights_files(c, manifolds=True) == (kept[0], str(tmp_path / vgg.FILE))


def test_without_vgg_there_is_no_precision(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "reference_features", lambda c, data, reference, network: None)
    c = published | {"data": published["data"] | {"dir": str(tmp_path)}}
    c["eval"] = c["eval"] | {"download": False}
    found = evaluator.open_evaluator(c | {"eval": c["eval"] | {"vgg_weights": ""}})
    assert len(found.networks) == 1 and "without precision and recall: " in capsys.readouterr().out
    (tmp_path / vgg.FILE).write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"397923af.pth is damaged"):
        evaluator.open_evaluator(c | {"eval": c["eval"] | {"vgg_weights": ""}})
    with pytest.raises(UserError, match=r"none.pth does not exist: vgg16-397923af.pth \("):
        evaluator.open_evaluator(c | {"eval": c["eval"] | {"vgg_weights": "none.pth"}})


def test_published_statistics_without_the_images(published, tmp_path, capsys):
    """FID and Inception Score are measured; what needs real images is left out, and said."""
    np.savez(tmp_path / "of.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    c = published | {"data": published["data"] | {"name": "image_folder", "path": str(tmp_path / "none")}}
    c["eval"] = published["eval"] | {"reference_statistics": str(tmp_path / "of.npz")}
    for change in ({"eval": published["eval"]}, {"model": c["model"] | {"num_classes": 10}}):
        with pytest.raises(UserError, match=r"data.path=.* does not exist"):
            evaluator.open_evaluator(c | change)
    results = of_samples(c, np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8), tmp_path)
    assert "without KID, precision and recall, which need real images: data.path=" in capsys.readouterr().out
    assert results["fid"] > 1000 and results["inception_score"] >= 1 and results["real_images"] == 0
    assert not {"kid", "precision", "nearest_training_distance", "data"} & results.keys()
    assert results["reference_statistics"] == str(tmp_path / "of.npz")
    assert (tmp_path / "out" / "samples.png").exists()


def test_statistics_are_read_before_samples_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "published_networks", lambda *_, **__: [features.Network("", lambda images: [], "")])
    c = config("cifar10", "smoke", features="inception", reference_statistics=str(tmp_path / "none.npz"))
    monkeypatch.setattr(
        evaluator, "reference_features", lambda *_: features.Features(np.zeros((9, 2048)), np.zeros((9, 0)))
    )
    with pytest.raises(UserError, match=r"none.npz cannot be read"):
        evaluator.open_evaluator(c)


# --- Reads that fail ----------------------------------------------------------------------------------------------

READ_FAILURES = [
    (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error"),
    (PermissionError(errno.EACCES, "Permission denied"), "cannot be read: Permission denied"),
    (MemoryError(), "cannot be read: not enough memory"),
]


def failing(monkeypatch, error, name):
    """Reads of files that are called so fail."""
    real = paths.read

    def read(file):
        if os.path.basename(file) == name:
            raise error
        return real(file)

    monkeypatch.setattr(paths, "read", read)


@pytest.mark.parametrize("error, message", READ_FAILURES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, error, message):
    file, published = tmp_path / "x.npz", tmp_path / inception.FILE
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
    published.write_bytes(b"weights")
    outputs.save(np.zeros((2, 8, 8, 1), np.uint8), str(tmp_path / "in"))
    for path, read_ in (
        (file, npz.read_npz),
        (file, evaluator.distances.load_moments),
        (file, lambda path: sample_files.file_samples(path, 0)),
        (published, lambda path: feature_networks._read_weights(path, inception)),
        (tmp_path / "in" / "000001.png", lambda path: list(sample_files.file_samples(os.path.dirname(path), 0)[0])),
    ):
        with monkeypatch.context() as patch:
            failing(patch, error, path.name)
            with pytest.raises(Fault, match=re.escape(f"{path} {message}")):
                read_(str(path))


@pytest.mark.parametrize("error, message", READ_FAILURES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_cache_that_cannot_be_read_is_computed_again(tmp_path, monkeypatch, capsys, error, message):
    file = tmp_path / "x.npz"
    features.write_cached(file, lambda opened: np.savez(opened, a=1))
    with monkeypatch.context() as patch:
        failing(patch, error, "x.npz")
        assert features.read_cached(file, lambda: npz.read_npz(str(file))) is None
    assert capsys.readouterr().out == f"note: {file} {message}; it is computed again\n"
    assert features.read_cached(file, lambda: npz.read_npz(str(file))) == {"a": 1}
    assert features.read_cached(file, lambda: features._read_features(file)) is None
    assert capsys.readouterr().out == f"note: {file} must hold the arrays features and logits; it is computed again\n"
    assert features.read_cached(tmp_path / "none.npz", pytest.fail) is None and not capsys.readouterr().out


# --- Wrong use ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((40, 9, 9, 1), np.uint8), r"the samples are uint8 \[9, 9, 1\], but .* uint8 \[8, 8, 1\]"),
        (np.zeros((40, 8, 8, 1), np.float32), r"the samples are float32 \[8, 8, 1\]"),
        (np.full((40, 8, 8, 1), np.nan), "holds NaN"),
        (np.zeros((1, 8, 8, 1), np.uint8), "holds 1 samples, but 2 are needed"),
        (
            np.zeros((3, 8, 8, 1), np.uint8),
            "a set of 3 samples is too small to evaluate: .* of eval.k=3 needs at least 4",
        ),
        (np.zeros(40, np.uint8), r"the samples are uint8 \[\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype}{list(value.shape)}",
)
def test_samples_that_cannot_be(digits, tmp_path, array, message):
    with refuses(message):
        of_samples(digits[0], array, tmp_path)


def test_files_that_cannot_be(digits, tmp_path):
    c, images = digits
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.evaluate(c, "", str(tmp_path / "none.npz"))
    np.savez(tmp_path / "two.npz", a=images, b=images)
    with pytest.raises(UserError, match="holds 2 arrays, a, b: it must be one"):
        evaluate.evaluate(c, "", str(tmp_path / "two.npz"))
    with pytest.raises(UserError, match="holds 1797 samples, but 2000 are needed"):
        of_samples(c, images, tmp_path, num_samples=2000)


@pytest.mark.parametrize(
    "num_real, num_samples, fields, message",
    [
        (50, 0, {"online_samples": 3}, "eval.online_samples=3 is too small .* eval.k=3 needs at least 4"),
        (50, 3, {}, "a set of 3 samples is too small"),
        (3, 20, {}, "a set of 3 real images is too small .* needs at least 5"),
        (50, 20, {"reference_samples": 3}, "a set of 3 real images is too small"),
        (50, 20, {"manifold_samples": 3}, "eval.manifold_samples=3 is too small"),
        (50, 20, {"k": 20}, "a set of 20 samples is too small .* eval.k=20 needs at least 21"),
        (50, 9, {"features": "inception"}, "a set of 9 samples is too small .* 10 splits needs at least 10"),
        (50, 0, {"features": "inception", "online_samples": 2, "k": 1}, "eval.online_samples=2 .* needs at least 10"),
    ],
)
def test_an_evaluation_that_cannot_work(num_real, num_samples, fields, message):
    right = read(config())
    checks.check_sizes(right, num_real=5, num_samples=4)
    checks.check_sizes(right, num_real=5)
    with refuses(message):
        checks.check_sizes(read(config(**fields)), num_real, num_samples)


GAUSSIANS = synthetic.gaussians()
OWN, IMAGES = np.zeros((9, 2), np.float32), np.zeros((9, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    "name, fields, data, message",
    [
        ("gaussians", {}, OWN, r"not with other data \[9, 2\]: set eval.every=0"),
        ("gaussians", {}, GAUSSIANS + 1, r"not with other data \[100000, 2\]"),
        ("gaussians", {}, IMAGES, r"not with other data \[9, 8, 8, 1\]"),
        ("gaussians", {"data__name": "digits"}, None, "not with data.name=digits: set eval.every=0"),
        ("gaussians", {"data__name": "mine"}, OWN, "not with data.name=mine"),
        ("gaussians", {"eval__features": "a:f"}, GAUSSIANS, r"maps uint8 images, but .* is float32 \[100000, 2\]"),
        (
            "digits",
            {"eval__features": "fid"},
            IMAGES,
            "'fid' must be inception, classifier, points, or module:function",
        ),
        ("digits:smoke", {}, IMAGES, "needs labels, and data.name=synthetic has none"),
        ("digits", {"eval__reference_statistics": "x.npz"}, IMAGES, "=x.npz is for eval.features=inception, not class"),
    ],
)
def test_data_that_is_not_evaluated(name, fields, data, message):
    with pytest.raises(UserError, match=message):
        evaluator.open_evaluator(preset_with(name, **fields), None if data is None else Data(data))


def test_points_are_compared_with_the_gaussians():
    for same in (None, Data(GAUSSIANS)):
        evaluator.open_evaluator(config("gaussians"), same)


def test_what_is_not_measured_needs_no_samples():
    """Without VGG16 there is no precision; with published statistics there need not be real images."""
    checks.check_sizes(read(config(features="inception", k=20)), 2, 10, manifolds=False)
    checks.check_sizes(read(config(features="inception")), 0, 10, manifolds=False)


def test_training_does_not_start_for_an_evaluation_that_cannot_work(refused, tmp_path):
    fields = "--config.eval.every=4", "--config.eval.online_samples=3", "--config.data.name=digits"
    assert "eval.online_samples=3 is too small to evaluate" in refused(SMOKE, *fields, f"--workdir={tmp_path}")
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("below", ["", "/checkpoints/8", "/best"])
def test_evaluations_of_other_seeds_have_folders_of_their_own(tmp_path, below, monkeypatch):
    """Also where the step is named. The checkpoint is looked up once, since a running training may remove it."""
    (tmp_path / "checkpoints" / "8" / "ema").mkdir(parents=True)
    asked, find = [], evaluate.checkpoint.find
    monkeypatch.setattr(evaluate.checkpoint, "find", lambda path: asked.append(path) or find(path))
    (tmp_path / "best.json").write_text('{"step": 8, "measure": "eval/kl", "value": 1.0}')
    for seed, name in ((0, "8"), (3, "8-seed-3")):
        found = evaluate._find(f"{tmp_path}{below}", seed)
        assert found == (f"{tmp_path}/checkpoints/8", str(tmp_path), f"{tmp_path}/evaluation/{name}")
    assert len(asked) == 2
    assert evaluate._find("digits", 0) == ("digits", "", "digits.evaluation")
    assert evaluate._find("a/netG_9.pth", 2) == ("a/netG_9.pth", "", "a/netG_9.evaluation-seed-2")


@pytest.mark.slow
def test_stacked_digits(tmp_path):
    """Real stacked digits have all 1,000 modes, at a KL of about 999 / (2 N) and that of their triples."""
    c = config("stacked_mnist", "mnist_5k")
    c["data"]["dir"] = str(tmp_path)
    images = open_data(DataConfig("stacked_mnist_5k", "train+test", str(tmp_path), 32, 3)).images
    results = of_samples(c, images[np.arange(25_600)], tmp_path)
    assert results["classifier_test_accuracy"] >= 0.97 and results["classifier_test_images"] == 1_000
    assert results["modes"] == results["of_modes"] == 1_000 and 0.01 < results["kl"] < 0.03
    # The samples hold digits that the real images, of 'train', do not.
    assert min(results["precision"], results["recall"]) > 0.9 and results["num_samples"] == 25_600


@pytest.mark.slow
def test_a_checkpoint_twice(tmp_path, digits, refused):
    """The same seed gives the same numbers; a configuration of other data is refused."""
    c, _ = digits
    succeed(SMOKE, f"--workdir={tmp_path}", "--config.data.name=digits", f"--config.data.dir={c['data']['dir']}")
    found = []
    for _ in range(2):
        where = f"--workdir={tmp_path}", f"--config.data.dir={c['data']['dir']}"
        succeed("--mode=evaluate", *where, "--num_samples=1797")
        results = json.loads((tmp_path / "evaluation" / "8" / "results.json").read_text())
        found.append({name: value for name, value in results.items() if name not in TIMES})
    assert found[0] == found[1] and found[0]["num_samples"] == 1797
    assert (tmp_path / "evaluation" / "8" / "curves.png").exists()
    error = refused("--mode=evaluate", f"--workdir={tmp_path}", "--config=configs/cifar10.py")
    assert "is of digits 8 px, 1 channels, but --config is of cifar10 32 px" in error
    assert jax.device_count() == 1


def test_a_model_of_an_array_is_compared_with_its_preset_data_with_a_note(tmp_path, capsys):
    train(preset_with("gaussians:smoke", train__num_steps=4), str(tmp_path), Data(GAUSSIANS[:500] + np.float32(3)))
    results = evaluate.evaluate(None, str(tmp_path), num_samples=100)
    assert results["trained_on_other_data"] == "500 examples then, 100,000 now"
    assert "note: the model was not trained on this data" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is the workdir of a run, whose results.json stays"):
        evaluate.evaluate(None, str(tmp_path), num_samples=100, out=str(tmp_path))


def test_the_papers_results_are_for_its_own_evaluation():
    """They are printed only if the data, the split, the image size and the features are those of a preset."""
    assert evaluate.papers_results(read(preset_with("cifar10")))["fid"] == 3.75
    assert evaluate.papers_results(read(preset_with("celeba_hq_256")))["fid"] == 7.64
    for other in ({"eval__features": "classifier"}, {"data__split": "test"}, {"data__image_size": 64}):
        assert evaluate.papers_results(read(preset_with("cifar10", **other))) == {}


def test_a_file_does_not_say_where_to_write_or_what_to_run(tmp_path, monkeypatch):
    """It may be somebody else's: its paths and its function are ignored, in Python and by commands."""
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    model, file = load("digits"), tmp_path / "model.safetensors"
    config = as_dict(model.config)
    config["data"] |= {"dir": str(tmp_path / "victim"), "path": "secret"}
    config["eval"] |= {"features": "evil:f", "vgg_weights": "secret"}
    safetensors.write(file, checkpoint.flatten(model.params), config, 7, {})
    for found in (load(file).config, config_of(str(file))):
        assert found.data.dir is None and found.data.path is None and found.eval.vgg_weights is None
        assert found.eval.features == read({}).eval.features


def test_a_file_of_a_folder_needs_its_path(tmp_path):
    config = read(preset_with("image_folder", data__image_size=32, data__channels=3))
    with pytest.raises(UserError, match=r"add --config=NAME of the training and --config.data.path=FOLDER"):
        evaluate._trusted(config, "model.safetensors")
    assert evaluate._trusted(config, str(tmp_path)) == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eval__features": "nosuch:f"}, "there is no module nosuch"),
        ({"eval__features": "os:nosuch"}, r"os.py has no nosuch"),
        ({"eval__features": "time:nosuch"}, "eval.features=time:nosuch: time has no nosuch"),  # built in
        ({"eval__features": "inception", "eval__inception_weights": "junk.npz", "eval__download": False}, "junk.npz"),
        ({"eval__features": "classifier", "eval__k": 100}, "needs at least 101"),
    ],
)
def test_a_last_evaluation_that_cannot_work_is_refused_at_the_start(fields, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    config = read(preset_with("digits:smoke", **fields))
    data = Data(np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8), np.arange(200) % 10)
    with pytest.raises(UserError, match=message):
        feature_networks.check_last_evaluation(config, data, opened=False)
