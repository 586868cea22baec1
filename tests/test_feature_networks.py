"""Inception and VGG16 against torch-fidelity's: the same random weights, the same images, the same features.

The published weights are not needed: networks that agree for random weights agree for any.
"""

import dataclasses
import re
import unittest.mock
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close_to_largest

from ddgan_jax.errors import UserError
from ddgan_jax.metrics import inception, npz, vgg

torch = pytest.importorskip("torch")
pytest.importorskip("torch_fidelity")
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402

SIZES = ((32, 32), (256, 256), (299, 299), (400, 320))


@dataclasses.dataclass
class Pair:
    """Their network and ours with the same weights; `theirs` and `ours` map images to a tuple of features."""

    module: Any  # inception or vgg
    state_dict: dict[str, np.ndarray]
    theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def nchw(images: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def smooth_images(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [N, H, W, 3]: six waves a channel and a little noise."""
    rng = np.random.default_rng(seed)
    frequency = rng.normal(0, 3, (2, number, 1, 1, 3, 6))
    y, x = np.linspace(0, 1, height)[:, None, None, None], np.linspace(0, 1, width)[:, None, None]
    waves = np.cos(2 * np.pi * (frequency[0] * y + frequency[1] * x + rng.random((number, 1, 1, 3, 6))))
    values = 128 + 25 * waves.sum(-1) + rng.normal(0, 6, (number, height, width, 3))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def random_network(extractor: Callable, features: list[str]) -> Any:
    """torch-fidelity's network, with random weights in place of a file.

    He's initialisation keeps the scale of activations, and rounding is not magnified from layer to layer, as it is
    where random convolutions are normalised by their own statistics.
    """
    with unittest.mock.patch.object(torch, "load"), unittest.mock.patch.object(torch.nn.Module, "load_state_dict"):
        network = extractor("random", features, feature_extractor_weights_path="none")
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.4)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
        elif isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.normal_(0, 0.1)
    return network


@pytest.fixture(scope="module", params=["inception", "vgg"])
def pair(request) -> Pair:
    if request.param == "inception":
        theirs = random_network(FeatureExtractorInceptionV3, ["2048", "logits_unbiased"])
        module, network = inception, inception.Inception()
    else:
        theirs = random_network(FeatureExtractorVGG16, ["fc2_relu"])
        module, network = vgg, vgg.VGG16()
    # torch-fidelity calls torchvision's network 'model', the published file does not.
    state_dict = {key.removeprefix("model."): value.numpy() for key, value in theirs.state_dict().items()}
    params = jax.device_put(module.params(state_dict))
    apply = jax.jit(
        lambda params, images: network.apply({"params": params}, images),
        # Unlike elsewhere in the tests, running these takes longer than compiling them.
        compiler_options={"xla_backend_optimization_level": 3},
    )

    def of_theirs(images: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(features.numpy() for features in theirs(nchw(images)))

    def of_ours(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(features) for features in jax.tree.leaves(apply(params, images)))

    return Pair(module, state_dict, of_theirs, of_ours)


def concatenated(function: Callable, batches: list[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*map(function, batches), strict=True)]


def assert_same_features(pair: Pair, batches: list[np.ndarray]) -> None:
    """Equal to 1e-4 of the largest deviation from the mean over the images: what all images share proves nothing."""
    shapes = [(2048,), (1008,)] if pair.module is inception else [(4096,)]
    expected, actual = concatenated(pair.theirs, batches), concatenated(pair.ours, batches)
    for ours, theirs, shape in zip(actual, expected, shapes, strict=True):
        assert ours.dtype == np.float32 and ours.shape[1:] == shape
        mean = theirs.mean(0)
        # Weights with which the networks went dead, or blew up, would prove nothing either.
        assert 0.05 < np.abs(theirs - mean).max() < 50 and 0.4 < (theirs > 0).mean() < 0.95
        close_to_largest(ours - mean, theirs - mean, 1e-4)


def test_features_equal_torch_fidelity(pair):
    assert_same_features(pair, [smooth_images(2, *size, seed=seed) for seed, size in enumerate(SIZES)])


@pytest.mark.slow
def test_features_equal_torch_fidelity_on_many_images(pair):
    images = smooth_images(2000, 32, 32)
    assert_same_features(pair, np.split(images, len(images) // 50))


def test_features_do_not_depend_on_the_batch(pair):
    """To 1e-5 of the largest: another size of the batch may add up in another order."""
    images = smooth_images(2, 32, 32)
    alone = concatenated(pair.ours, [images[:1], images[1:]])
    for together, features in zip(pair.ours(images), alone, strict=True):
        close_to_largest(features, together, 1e-5)


def test_grey_images_are_their_rgb_copies(pair):
    grey = smooth_images(1, 32, 32)[..., :1]
    for features, copies in zip(pair.ours(grey), pair.ours(grey.repeat(3, axis=3)), strict=True):
        close_to_largest(features, copies, 1e-6)


def test_rgb():
    grey = smooth_images(2, 8, 9)[..., 0]
    for images in (grey, grey[..., None]):
        np.testing.assert_array_equal(inception.rgb(jnp.asarray(images)), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("size", [*SIZES, (1, 7), (299, 640)])
def test_resize(size):
    """Equal to 1e-4, where the range is 255 and a rounding of float32 is 1.5e-5."""
    images = smooth_images(1, *size)
    expected = interpolate_bilinear_2d_like_tensorflow1x(nchw(images).float(), size=(299, 299), align_corners=False)
    actual = jax.jit(inception.pixels, static_argnums=1)(images, 299)
    np.testing.assert_allclose(actual, expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((1, 8, 8, 3), np.float32), "uint8 images in 0..255, not float32"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"not of shape \(1, 8, 8, 4\)"),
        (np.zeros((8, 8), np.uint8), r"not of shape \(8, 8\)"),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(UserError, match=message):
        inception.pixels(jnp.asarray(images), 299)


def is_one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    message = str(error.value)
    return "\n" not in message and len(message) < 200 and not re.search(r"\. [A-Z]", message)


KEYS = {
    inception: ("Conv2d_1a_3x3.conv.weight", "Mixed_6e.branch7x7dbl_5.bn.running_var", "fc.weight"),
    vgg: ("classifier.0.weight",),
}


def test_wrong_weights(pair):
    for key in KEYS[pair.module]:
        right = pair.state_dict[key]
        changes = {
            "lack '{}', which {} holds with shape {}": None,
            r"hold '{}' as float32 of shape \(3, 1\); {} has floats {}": np.zeros((3, 1), np.float32),
            "hold '{}' as int64 of shape .*; {} has floats {}": np.broadcast_to(np.int64(0), right.shape),
        }
        for message, value in changes.items():
            state_dict = pair.state_dict | {key: value}
            if value is None:
                del state_dict[key]
            expected = message.format(re.escape(key), re.escape(pair.module.FILE), re.escape(str(right.shape)))
            with pytest.raises(UserError, match=expected) as error:
                pair.module.params(state_dict)
            assert is_one_line(error)
    with pytest.raises(UserError, match=re.escape(KEYS[pair.module][0])):
        pair.module.params({})


def test_what_is_not_used_may_be_missing(pair):
    """The bias of the logits and the counters of batches; the classes of VGG16, which torch-fidelity leaves out."""
    used = {key: value for key, value in pair.state_dict.items() if not re.search("^fc.bias|num_batches_tracked", key)}
    assert len(used) == (471 if pair.module is inception else 30)
    if pair.module is inception:
        pair.module.params(used)


def test_npz(tmp_path):
    arrays = {"fc.weight": np.ones((3, 2), np.float32), "a.bn.bias": np.zeros(3, np.float32)}
    np.savez(tmp_path / "weights.npz", **arrays)
    found = npz.read_npz(str(tmp_path / "weights.npz"))
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(found[key], value)


def test_wrong_npz(tmp_path):
    np.savez(tmp_path / "whole.npz", value=np.random.default_rng(0).random(1000))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "pickle.npz", value=np.array([{}], object))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(whole[:500])
    (tmp_path / "changed.npz").write_bytes(whole[:500] + b"12345678" + whole[508:])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("pickle.npz", "one.npy", "cut.npz", "changed.npz", "empty.npz", "text.npz"):
        with pytest.raises(UserError, match=rf"{name} is damaged, or no \.npz file of plain arrays") as error:
            npz.read_npz(str(tmp_path / name))
        assert is_one_line(error)
    with pytest.raises(UserError, match=r"missing\.npz cannot be read: No such file") as error:
        npz.read_npz(str(tmp_path / "missing.npz"))
    assert is_one_line(error)
