"""Small versions of the files that a paper's preset downloads: CIFAR-10 of 120 images, and random weights."""

import hashlib
import io
import json
import tarfile
from typing import Any

import numpy as np
import torch

from ddgan_jax.metrics import inception, vgg, weights

ARCHIVE = "cifar-10-binary.tar.gz"

# Lines that run before main.py, and replace the sums of the published files by those in the environment.
SCRIPT = """
import json, os
from ddgan_jax.metrics import inception, vgg
sums = json.loads(os.environ["SUMS"])
for module in (inception, vgg):
    module.SHA256 = sums[module.FILE][0]
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import cifar
(url, info), = cifar.Cifar10.url_infos.items()
checksum, size = sums[info.filename]
cifar.Cifar10.url_infos = {url: type(info)(tfds.core.utils.Size(size), checksum, info.filename)}
"""


def files() -> dict[str, bytes]:
    """The content of each file by the path of a mirror."""
    return {
        f"/{ARCHIVE}": cifar10(20),
        f"/{inception.FILE}": saved(inception_state()),
        f"/{vgg.FILE}": saved(vgg_state()),
    }


def sums(files: dict[str, bytes]) -> str:
    """SUMS for `SCRIPT`."""
    return json.dumps(
        {path[1:]: (hashlib.sha256(content).hexdigest(), len(content)) for path, content in files.items()}
    )


def cifar10(images: int) -> bytes:
    """The archive of CIFAR-10 with so many images in each of its six files."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    parts = {name: b"" for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")}
    for name in parts:
        records = rng.integers(0, 256, (images, 3073), np.uint8)
        records[:, 0] = np.arange(images) % 10
        parts[name] = records.tobytes()
    parts["batches.meta.txt"] = "\n".join(
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    ).encode()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def saved(state: dict[str, Any]) -> bytes:
    """A state dict in the format of the published files, which are older than PyTorch 1.6."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def arrays(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict as NumPy arrays, for an .npz."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def inception_state() -> dict[str, torch.Tensor]:
    """Random weights of Inception under the published names."""
    generator, state = torch.Generator().manual_seed(0), {}
    for layer, leaves in weights.shapes(inception.Inception()).items():
        *sizes, fan_in, out = leaves["kernel"]
        shape, scale = (out, fan_in, *sizes), (2 / (fan_in * np.prod(sizes))) ** 0.5
        kernel = torch.randn(shape, generator=generator) * scale
        if layer == "fc":
            state["fc.weight"] = kernel
            continue
        state[f"{layer}.conv.weight"] = kernel
        for leaf, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            state[f"{layer}.bn.{leaf}"] = torch.full((out,), float(value))
    return state


def vgg_state() -> dict[str, torch.Tensor]:
    """Random weights of VGG16 under the published names. Those of dense layers are views of few numbers."""
    generator, state = torch.Generator().manual_seed(1), {}
    for layer, leaves in weights.shapes(vgg.VGG16()).items():
        *sizes, fan_in, out = leaves["kernel"]
        scale = (2 / (fan_in * np.prod(sizes))) ** 0.5
        shape = (out, fan_in, *sizes) if sizes else (1, fan_in)
        kernel = torch.randn(shape, generator=generator) * scale
        state[f"{layer}.weight"] = kernel if sizes else kernel.expand(out, fan_in)
        state[f"{layer}.bias"] = torch.randn(out, generator=generator) * 0.1
    return state
