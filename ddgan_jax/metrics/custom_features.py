"""Features by a Python function of the user's own: `eval.features='module:function'`."""

import hashlib
import importlib
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.errors import UserError, is_out_of_memory
from ddgan_jax.metrics.distances import check_features
from ddgan_jax.metrics.features import Network

FINGERPRINT_IMAGES = 16


def custom_network(name: str, images: Any) -> Network:
    """The function `name`, 'module:function', as a feature network.

    It maps uint8 images [N, H, W, C] to features [N, D], an array of NumPy, JAX or CPU PyTorch. Its fingerprint
    consists of its name and its features of a few of the real `images`. Raises UserError if it cannot be imported or
    called, or if it returns anything else.
    """
    if images.dtype != np.uint8:
        raise UserError(f"eval.features={name} maps uint8 images, but the data is {images.dtype} {list(images.shape)}")
    function = _import(name)

    def apply(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _call(name, function, images), np.zeros((len(images), 0), np.float32)

    features, _ = apply(images[evenly_spaced(len(images), FINGERPRINT_IMAGES)])
    digest = hashlib.sha256(name.encode() + features.tobytes())
    return Network(name, apply, digest.hexdigest()[:16])


def _import(name: str) -> Callable[[np.ndarray], Any]:
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # where Python looks only if it runs a module or a script of that folder
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"eval.features={name}: there is no module {error.name} in {os.getcwd()} or on PYTHONPATH"
            ) from error
        raise UserError(f"eval.features={name}: {module_name} cannot be imported: {_one_line(error)}") from error
    try:
        function = operator.attrgetter(function_name)(module)
    except AttributeError as error:
        where = getattr(module, "__file__", None) or module_name  # built-in modules and namespaces have no file
        raise UserError(f"eval.features={name}: {where} has no {function_name}") from error
    if not callable(function):
        raise UserError(f"eval.features={name} is of type {type(function).__name__}, and must be a function")
    return function


def _call(name: str, function: Callable[[np.ndarray], Any], images: np.ndarray) -> np.ndarray:
    """The features of images, float32 [N, D]."""
    try:
        returned = np.asarray(function(images))
    except Exception as error:  # the user's code may raise anything
        if is_out_of_memory(error):
            raise
        given = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"eval.features={name} failed for images {given}: {_one_line(error)}") from error
    features = check_features(returned, f"the features of {name}")
    if len(features) != len(images):
        raise UserError(
            f"the features of {name} must be an array [N, D], one row an image, not of shape {list(features.shape)} "
            f"for {len(images)} images"
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return check_features(features.astype(np.float32), f"the features of {name}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
