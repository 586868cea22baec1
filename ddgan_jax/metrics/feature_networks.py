"""The feature networks of `eval.features`: Inception and VGG16 with published weights, or the project's classifier."""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import Config
from ddgan_jax.data import digits, sources
from ddgan_jax.data.batches import epoch_permutation
from ddgan_jax.devices import processes
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics import classifier, distances, inception, npz, vgg
from ddgan_jax.metrics.checks import check_gaussians, check_settings, check_sizes
from ddgan_jax.metrics.custom_features import custom_network
from ddgan_jax.metrics.features import Network, cache_path, on_devices, read_cached, write_cached
from ddgan_jax.storage import checkpoint, downloads, paths
from ddgan_jax.storage.torch import state_dict

WEIGHTS = {"inception_weights": inception, "vgg_weights": vgg}  # the modules, by the fields that name their files
MIN_ACCURACY = {"mnist": 0.99, "mnist_5k": 0.98}  # on test images; a worse classifier miscounts modes


def check_can_evaluate(c: Config, data: sources.Data) -> None:
    """Raises UserError if `--mode=evaluate` cannot compare with `data`: weights, labels or images are missing."""
    check_settings(c)
    if c.eval.features == "points":
        check_gaussians(c, data)
        return
    if c.eval.features == "inception":
        if c.eval.inception_weights or not c.eval.download:
            weights_files(c, manifolds=False)
    elif c.eval.features == "classifier" and not c.data.name.startswith("stacked_"):
        _check_labels(c, data)
    check_sizes(c, len(data.images), c.eval.num_samples, manifolds=c.eval.features != "inception")


def check_last_evaluation(c: Config, data: sources.Data, opened: bool) -> None:
    """Raises UserError or Fault if an evaluation at the end of a training could not work, after downloads.

    `opened`: whether the feature networks were opened for evaluations during the training.
    """
    check_can_evaluate(c, data)
    if ":" in c.eval.features and not opened:
        processes.run_on_all(lambda: custom_network(c.eval.features, data.images))
    if c.eval.features == "inception":
        _, of_vgg = weights_files(c, manifolds=True) if opened else check_weights(c)
        check_sizes(c, len(data.images), c.eval.num_samples, manifolds=bool(of_vgg))
    if file := c.eval.reference_statistics:
        processes.run_on_primary(lambda: distances.load_moments(file, inception.FEATURES))


def check_weights(c: Config) -> tuple[str, str]:
    """The `weights_files` of Inception and VGG16, after reading them. Raises as `published_networks`."""
    files = weights_files(c, manifolds=True)

    def read() -> None:
        for file, module in zip(files, WEIGHTS.values(), strict=True):
            if file:
                module.params(_read_weights_here(file, module))

    processes.run_on_primary(read)
    return files


def published_networks(c: Config, manifolds: bool = True) -> list[Network]:
    """Inception and, for `manifolds`, VGG16, downloaded if `eval.download` allows it.

    Raises UserError without the weights of Inception, and Fault if weights cannot be downloaded. VGG16 is left out if
    its weights are missing and downloads are switched off.
    """
    file, of_vgg = weights_files(c, manifolds)
    params = inception.params(_read_weights(file, inception))
    net = inception.Inception()
    networks = [on_devices("Inception 2015-12-05", lambda p, x: net.apply({"params": p}, x), params)]
    if not of_vgg:
        return networks
    other = vgg.VGG16()

    def apply(params: Any, images: Any) -> Any:
        features: Any = other.apply({"params": params}, images)
        return features, features[:, :0]

    return [*networks, on_devices("VGG16", apply, vgg.params(_read_weights(of_vgg, vgg)))]


def weights_files(c: Config, manifolds: bool) -> tuple[str, str]:
    """The files with the weights of Inception and, for `manifolds`, of VGG16; '' for VGG16 without them.

    A file is the one that `eval.<setting>` names, or FILE in `data.dir`, or in the folder of downloads. Process 0
    downloads what is missing. Raises as `published_networks`.
    """
    return processes.broadcast_from_primary(lambda: _find_weights(c, manifolds))


def _find_weights(c: Config, manifolds: bool) -> tuple[str, str]:
    folder = sources.directory(c.data.dir)
    files, missing = {"vgg_weights": ""}, []
    for setting, module in WEIGHTS.items() if manifolds else [("inception_weights", inception)]:
        named, kept = getattr(c.eval, setting), str(downloads.folder() / module.FILE)
        candidates = [named] if named else [os.path.join(folder, module.FILE), kept]
        files[setting] = next((file for file in candidates if paths.exists(paths.path(file))), "")
        if named and not files[setting]:
            raise UserError(f"--config.eval.{setting}={named} does not exist: {_where(folder, module)}")
        if not files[setting]:
            missing.append(module)
            files[setting] = kept if c.eval.download else ""
    needs = f"evaluation needs {' and '.join(_where(folder, module) for module in missing)}"
    if c.eval.download:
        try:
            for module in missing:
                downloads.fetch(module.URL, downloads.folder() / module.FILE, module.SHA256)
        except Fault as error:
            without = ", or pass --config.eval.download=False to do without it" * (missing == [vgg])
            elsewhere = "run the same command with --mode=prepare on a host with internet and the same home folder"
            raise Fault(f"{error}: {elsewhere}{without}; {needs}") from error
    elif not files["inception_weights"]:
        raise UserError(f"{needs}: leave --config.eval.download at True, or put them there")
    elif missing:
        processes.say(f"without precision and recall: {needs}")
    return files["inception_weights"], files["vgg_weights"]


def _where(folder: str, module: Any) -> str:
    """A file of published weights, its checksum, and the folder for it."""
    return f"{module.FILE} (SHA-256 {module.SHA256}, from {module.URL}) in {folder}"


def _read_weights(path: str, module: Any) -> dict[str, np.ndarray]:
    """The arrays in a file of published weights, which process 0 reads and verifies."""
    return processes.broadcast_from_primary(lambda: _read_weights_here(path, module))


def _read_weights_here(path: str, module: Any) -> dict[str, np.ndarray]:
    """The arrays in a file of published weights. Raises UserError if it is damaged."""
    content = npz.read_bytes(path)
    if os.path.basename(path).endswith(f"-{module.SHA256[:8]}.pth"):
        digest = hashlib.sha256(content).hexdigest()
        if digest != module.SHA256:
            raise UserError(
                f"{path} is damaged: its SHA-256 is {digest}, not {module.SHA256}; copy it again, or remove it to have "
                "it downloaded (eval.download=True)"
            )
    return npz.parse_npz(content, path) if path.endswith(".npz") else state_dict.parse(content, path)


def classifier_network(c: Config, data: sources.Data) -> tuple[Network, dict[str, Any]]:
    """The project's classifier of `data`, trained or read from its cache, and its accuracy as entries of results.json.

    Raises UserError if the data has no labels; Fault if a classifier of digits is too inaccurate to count modes.
    """
    name, size = c.data.name, data.images.shape[1]
    base = name.removeprefix("stacked_")
    x, y, test_x, test_y, count = _classifier_data(c, data)
    images = sources.fingerprint(x, f"{base} {count} {classifier.num_steps(size)}", sources.fingerprint(y))
    path = cache_path(c, "classifier", images, f"{size}.npz")
    net = classifier.Classifier(count)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x[:1])["params"]

    def read_or_train() -> Any:
        params = read_cached(path, lambda: checkpoint.unflatten(npz.read_npz(path), shapes, str(path)))
        if params is None:
            processes.say(f"training a classifier of {base} for evaluations, which is kept for the next start")
            params = classifier.train(x, y, count, lambda steps: tqdm(steps, f"classifier of {base}", disable=None))
            write_cached(path, lambda file: np.savez(file, **checkpoint.flatten(params)))  # type: ignore[arg-type]
        return jax.device_get(params)

    params = processes.broadcast_from_primary(read_or_train)
    accuracy = classifier.accuracy(params, test_x, test_y)
    if accuracy < MIN_ACCURACY.get(base, 0):
        raise Fault(
            f"the classifier of {base} is right on {accuracy:.1%} of its test images, and {MIN_ACCURACY[base]:.1%} is "
            f"needed: remove {path} and try again"
        )

    def apply(params: Any, images: jax.Array) -> Any:
        return net.apply({"params": params}, images)

    def apply_to_channels(params: Any, images: jax.Array) -> Any:
        """Features [B, C 64] and logits [B, C, 10] of images whose C channels are digits."""
        b, h, w, c = images.shape
        digits = images.transpose(0, 3, 1, 2).reshape(b * c, h, w, 1)
        features, logits = apply(params, digits)
        return features.reshape(b, -1), logits.reshape(b, c, -1)

    about = {"classifier_test_accuracy": accuracy, "classifier_test_images": len(test_x)}
    return on_devices(f"classifier of {base}", apply if base == name else apply_to_channels, params), about


def _classifier_data(c: Config, data: sources.Data) -> tuple[Any, np.ndarray, Any, np.ndarray, int]:
    """Training images and labels, test images and labels, and the number of classes.

    The splits 'train' and 'test' for MNIST, as single digits if they are stacked; otherwise `data`, of which a fifth is
    held out.
    """
    base = c.data.name.removeprefix("stacked_")
    if base in digits.MNIST:
        single = dataclasses.replace(c.data, name=base, image_size=None, channels=1)
        parts = [dataclasses.replace(single, split=split) for split in ("train", "test")]
        train, test = processes.run_on_all(lambda: [sources.open_data(part) for part in parts])
        assert train.labels and test.labels
        size = data.images.shape[1]  # of padded digits
        x, test_x = (digits.pad(part.images[np.arange(len(part.images))], size) for part in (train, test))
        return x, train.labels(), test_x, test.labels(), 10
    _check_labels(c, data)
    assert data.labels
    labels, shuffled = data.labels(), epoch_permutation(len(data.images), 0, 0)
    held_out, rest = np.split(shuffled, [len(shuffled) // 5])
    count = len(data.classes) or int(labels.max()) + 1
    return data.images[rest], labels[rest], data.images[held_out], labels[held_out], count


def _check_labels(c: Config, data: sources.Data) -> None:
    if data.labels is None:
        raise UserError(
            f"eval.features=classifier needs labels, and data.name={c.data.name} has none: "
            "set --config.eval.features=inception"
        )
