"""The arrays of a PyTorch state dict, read without PyTorch: published weights of feature networks.

Two formats are read: the zip archive that PyTorch has written since version 1.6, and the sequence of pickles before it.
A pickle can run any program. Here it builds only dicts and descriptions of arrays, and everything else is refused.
"""

import collections
import functools
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ddgan_jax.errors import UserError

DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
}
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format


def parse(content: bytes, path: str) -> dict[str, np.ndarray]:
    """The arrays by name in the content of the `.pth` file `path`. The arrays are views of `content`, or of its parts.

    Raises UserError if the content is damaged, is not a state dict, or contains anything but numbers.
    """
    try:
        found, data_of = _from_zip(content) if content.startswith(b"PK") else _from_pickles(content)
        if not isinstance(found, dict) or not all(isinstance(view, _View) for view in found.values()):
            raise ValueError("it is not a state dict")
        return {str(name): _array(view, data_of(view.storage)) for name, view in found.items()}
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles and archives fail in many ways; the bytes have been read
        raise UserError(f"{path} is damaged, or no file of arrays by PyTorch ({error}): copy it again") from error


class _Storage(NamedTuple):
    """The numbers that some arrays are views of."""

    dtype: np.dtype
    key: str
    size: int


class _View(NamedTuple):
    """An array as a view of a storage; offset and strides count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    """The replacement of torch._utils._rebuild_tensor_v2."""
    return _View(storage, offset, tuple(shape), tuple(strides))


def _empty_dict(*arguments: Any) -> collections.OrderedDict:
    """The replacement of collections.OrderedDict, which PyTorch calls without arguments."""
    if arguments:
        raise pickle.UnpicklingError("it holds a dict with arguments")
    return collections.OrderedDict()


def _set_items(unpickler: Any, items: list[Any]) -> None:
    """Adds keys and values to the last dict. Hashing a nested tuple could take forever, so the keys are text."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"it holds a dict with a key that is a {type(key).__name__}")
        unpickler.stack[-1][key] = value


# The instructions of a pickle that PyTorch writes for a state dict
CODES = (
    *("PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE EMPTY_DICT EMPTY_LIST").split(),
    *("EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS GLOBAL REDUCE BUILD BINPERSID").split(),
    *("BINPUT LONG_BINPUT BINGET LONG_BINGET").split(),
)


_BYTES = [getattr(pickle, code)[0] for code in CODES]
_INSTRUCTIONS = {byte: pickle._Unpickler.dispatch[byte] for byte in _BYTES} | {  # type: ignore[attr-defined]
    pickle.SETITEM[0]: lambda self: _set_items(self, [self.stack.pop(-2), self.stack.pop()]),
    pickle.SETITEMS[0]: lambda self: _set_items(self, self.pop_mark()),
}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Builds dicts and `_View`s alone, and collects the storages by their keys.

    This is the unpickler in Python: the one in C allocates whatever sizes a damaged file declares.
    """

    dispatch: ClassVar = _INSTRUCTIONS

    def __init__(self, file: Any, storages: dict[str, _Storage]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda view, *_: view
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid[:5]
        valid = kind == "storage" and isinstance(dtype, np.dtype) and isinstance(key, str)
        if not valid or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("it holds an object that is no array")
        return self._storages.setdefault(key, _Storage(dtype, key, int(size)))


DataOf = Callable[[_Storage], Any]  # the bytes of a storage


def _from_zip(content: bytes) -> tuple[Any, DataOf]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
    folder = name.partition("/")[0]

    @functools.cache  # several arrays may be views of one storage
    def read(name: str) -> bytes:
        entry = archive.getinfo(f"{folder}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:  # PyTorch never compresses, and an archive may explode
            raise ValueError("it is compressed")
        return archive.read(entry)

    if f"{folder}/byteorder" in archive.namelist() and read("byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    return _Unpickler(io.BytesIO(read("data.pkl")), {}).load(), lambda storage: read(f"data/{storage.key}")


def _from_pickles(content: bytes) -> tuple[Any, DataOf]:
    file, storages = io.BytesIO(content), dict[str, _Storage]()
    magic, _version, _system, found, keys = (_Unpickler(file, storages).load() for _ in range(5))
    if magic != MAGIC:
        raise ValueError("it does not begin as such a file does")
    places, position = {}, file.tell()
    for key in keys:  # the length, and the numbers
        places[key] = position + 8
        position += 8 + storages[key].size * storages[key].dtype.itemsize
    return found, lambda storage: memoryview(content)[places[storage.key] :]


def _array(view: _View, data: Any) -> np.ndarray:
    dtype, _, size = view.storage
    numbers = np.frombuffer(data, dtype, size)
    sizes = (view.offset, *view.shape, *view.strides)
    if len(view.shape) != len(view.strides) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise ValueError("it holds an array of an impossible shape")
    if math.prod(view.shape) == 0:
        return np.zeros(view.shape, dtype)
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    if last >= size:
        raise ValueError("it holds an array that is longer than its numbers")
    strides = [stride * dtype.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(numbers[view.offset :], view.shape, strides, writeable=False)
