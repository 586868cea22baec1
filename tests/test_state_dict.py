"""State dicts read without PyTorch: equal to what PyTorch saved, and nothing else is read."""

import argparse
import collections
import contextlib
import io
import os
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import refuses

from ddgan_jax.errors import UserError
from ddgan_jax.storage.torch import state_dict


def saved(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_without_torch(zipped):
    """Also views, shared numbers, parameters, scalars and empty arrays."""
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "plain": torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)),
        "transposed": base.reshape(4, 6).T,
        "part": base[5:9],
        "expanded": torch.full((1, 1), 3.5).expand(5, 7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.float16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for content in (tensors, collections.OrderedDict(tensors), network.state_dict()):
        found = state_dict.parse(saved(content, zipped), "x.pth")
        assert found.keys() == content.keys()
        for name, tensor in content.items():
            np.testing.assert_array_equal(found[name], tensor.detach().numpy(), err_msg=name)
            assert found[name].dtype == tensor.detach().numpy().dtype


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/hostile",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content, reason",
    [
        ({"a": Hostile()}, r"it holds \w+\.system"),
        ({"a": argparse.Namespace()}, "it holds argparse.Namespace"),
        ({"a": 1}, "it is not a state dict"),
        (torch.ones(2), "it is not a state dict"),
        ({"a": torch.ones(2, dtype=torch.bfloat16)}, "it holds torch.BFloat16Storage"),
    ],
)
def test_other_content_is_refused(content, reason, zipped):
    with refuses(rf"x.pth is damaged, or no file of arrays by PyTorch \({reason}"):
        state_dict.parse(saved(content, zipped), "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_state_dict_is_refused_or_unchanged(zipped):
    content = saved({"a": torch.arange(100, dtype=torch.float32), "b": torch.ones(3)}, zipped)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        damaged = damaged[: rng.integers(len(content))] if rng.random() < 0.3 else damaged
        with contextlib.suppress(UserError):
            found = state_dict.parse(bytes(damaged), "x.pth")
            assert all(isinstance(array, np.ndarray) for array in found.values())


def test_a_view_beyond_its_numbers_is_refused():
    storage = state_dict._Storage(np.dtype("<f4"), "0", 4)
    for view in (
        (1, (4,), (1,)),
        (0, (2, 2), (3, 2)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), ()),
        (0, (2.0,), (1,)),
    ):
        with pytest.raises(ValueError, match="it holds an array"):
            state_dict._array(state_dict._View(storage, *view), bytes(16))


def pickled(pickle: bytes, zipped: bool) -> bytes:
    """A file whose first pickle is this one."""
    if not zipped:
        return pickle
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickle)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}(N" + b"2\x86" * 60 + b"Nu.",  # a nested tuple as a key, whose hash takes 2^60 steps
        b"\x80\x02}(Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Nu.",  # the same without a duplicate
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 2^56 bytes
    ],
)
def test_a_pickle_that_takes_forever(content, zipped):
    start = time.monotonic()
    with refuses("x.pth is damaged, or no file of arrays by PyTorch"):
        state_dict.parse(pickled(content, zipped), "x.pth")
    assert time.monotonic() - start < 5


def test_an_archive_that_explodes():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**8))
    with refuses(r"\(it is compressed\)"):
        state_dict.parse(file.getvalue(), "x.pth")


def test_a_storage_is_read_once():
    base = torch.zeros(1_000_000)
    found = state_dict.parse(saved({str(i): base[i:] for i in range(60)}), "x.pth")
    assert len({array.__array_interface__["data"][0] - 4 * i for i, array in enumerate(found.values())}) == 1
