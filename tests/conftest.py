"""Settings, fixtures and helpers that all tests share.

The golden arrays are NCHW with PyTorch's weight layouts; `tests/golden/README.md` says what they are.
"""

import atexit
import contextlib
import datetime
import json
import lzma
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from typing import Any

from environments import QUICKER, known_flags

# The tests spend most of their time compiling, and quick code generation takes a quarter as long.
# `XLA_FLAGS= python -m pytest` compiles as users do.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = known_flags(f"--xla_backend_optimization_level=0 {QUICKER}", sys.executable)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import forks  # noqa: F401  a fixture

from ddgan_jax.config import presets
from ddgan_jax.errors import UserError
from ddgan_jax.method import build
from ddgan_jax.networks import ops
from ddgan_jax.networks.discriminator import Discriminator
from ddgan_jax.storage.torch import arguments, convert

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
REQUIRED = dict(image_size=32, skip_rescale=True, tanh=True, centered=True)  # what weights do not show
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `pytest &` of a script: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
GENERATORS = sorted(path.stem for path in GOLDEN.glob("generator_*.npz"))


class Golden(dict):
    """The arrays of one golden file by key; `config` is its decoded JSON."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            super().__init__(arrays)
        self.config = json.loads(str(self["config"])) if "config" in self else {}

    def below(self, prefix: str) -> dict:
        """{rest of the key: array} for the keys that start with `prefix`."""
        return {key.removeprefix(prefix): value for key, value in self.items() if key.startswith(prefix)}

    def nhwc(self, key: str) -> np.ndarray:
        return self[key].transpose(0, 2, 3, 1)

    def ints(self, key: str) -> np.ndarray:
        return self[key].astype(np.int32)

    def generator(self, prefix: str = "sd/") -> tuple[Any, Any]:
        """The Generator of the reference's arguments in `config`, and the parameters in the state dict `prefix`."""
        config = arguments.config_of(arguments.settings_of(self.config))
        like = jax.eval_shape(build.denoiser(config).init_gen, jax.random.key(0))
        return build.generator_of(config), convert.from_state_dict(self.below(prefix), like)

    def discriminator(self, prefix: str = "sd/") -> tuple[Any, Any]:
        """The Discriminator of the reference's arguments, and its parameters."""
        dataset = "celeba_256" if self.config.get("kind") == "large" else "cifar10"
        config = arguments.config_of(arguments.settings_of(REQUIRED | {"dataset": dataset} | self.config))
        disc, x = Discriminator(**config.discriminator), jnp.zeros((4, *build.denoiser(config).image_shape))
        like = jax.eval_shape(disc.init, jax.random.key(0), x, jnp.zeros(4, jnp.int32), x)["params"]
        return disc, convert.from_state_dict(self.below(prefix), like)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A process that runs all tests would otherwise keep gigabytes of compiled programs."""
    yield
    jax.clear_caches()


def preset_with(name: str, **fields: Any) -> Any:
    """The configuration of a preset, with fields such as train__num_steps=8 changed."""
    config = presets.get(name)
    for field, value in fields.items():
        *group, last = field.split("__")
        (config[group[0]] if group else config)[last] = value
    return config


@contextlib.contextmanager
def refuses(message: str, kind: type[Exception] = UserError):
    """The block must raise a one-line error that matches `message`; one of the user ends without a full stop."""
    with pytest.raises(kind, match=message) as error:
        yield
    assert "\n" not in str(error.value) and (kind is not UserError or not str(error.value).endswith(".")), error.value


def golden_inventory(name: str) -> dict:
    return json.loads(lzma.decompress((GOLDEN / f"inventory_{name}.json.xz").read_bytes()))


def assert_spread(arrays: dict, expected: dict) -> None:
    """Assert that first weights have the mean, the standard deviation and the largest number of an inventory."""
    for key, stats in expected.items():
        mean, std, largest = (stats[k] for k in ("mean", "std", "absmax")) if isinstance(stats, dict) else stats
        spread = 6 / np.sqrt(arrays[key].size)  # of two independent draws
        np.testing.assert_allclose(arrays[key].std(), std, rtol=spread, atol=1e-12, err_msg=key)
        np.testing.assert_allclose(arrays[key].mean(), mean, atol=spread * max(std, 1e-12), err_msg=key)
        if arrays[key].size > 1000:
            np.testing.assert_allclose(np.abs(arrays[key]).max(), largest, rtol=0.02, err_msg=key)


def close_to_largest(actual, expected, rtol: float, what: str = "") -> None:
    """Assert |actual - expected| <= rtol max|expected|, the measure for gradients."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= rtol * scale + 1e-12, f"{what}: off by {error:.2g} where the largest is {scale:.2g}"


# All processes of this call share one cache, which is deleted at its end. A folder that the user names is kept.
if not os.environ.get("XDG_CACHE_HOME"):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ddgan_jax_cache")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
PROGRAMS = os.path.join(os.environ["XDG_CACHE_HOME"], "tests")
jax.config.update("jax_compilation_cache_dir", PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Published files, such as networks of features, are not downloaded: an address that refuses connections.
os.environ.setdefault("DDGAN_MIRROR", "http://127.0.0.1:1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of chaos/ are `chaos`."""
    for item in items:
        if item.path.parent.name == "chaos":
            item.add_marker("chaos")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `pytest -n 2`, a file's tests run in one process, which prepares what they share once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session", params=GENERATORS)
def golden_generator(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(autouse=True)
def full_precision(request):
    """Golden tests multiply float32 numbers in full on every device: a GPU rounds them to TF32, a TPU to bfloat16."""
    golden = request.node.get_closest_marker("golden")
    with jax.default_matmul_precision("highest") if golden else contextlib.nullcontext():
        yield


@pytest.fixture(params=("fast", "reference"))
def form(request):
    """Runs the test twice, with the fast operations and with the reference ones."""
    with ops.use_reference() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def refused(forks):  # noqa: F811
    """A function that runs main.py, which must end with exit code 2 and a one-line error, and returns this line."""

    def line(*arguments) -> str:
        ended = forks.run(*arguments)
        assert ended.code == 2 and ended.errors.startswith("error: ") and ended.errors.count("\n") == 1, ended
        return ended.errors

    return line


@pytest.fixture(scope="session")
def cache() -> str:
    """The flag with which commands share the compiled programs of this call."""
    return f"--compilation_cache={PROGRAMS}"


# --- tests/chaos ---------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests/chaos: all cases, which takes hours")
    parser.addoption("--record", metavar="FOLDER", help="tests/chaos: append each test's figures to FOLDER/cases.jsonl")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`lives(few, many)` repeats a test with `life` = 0, 1, ...: `few` times, or `many` with --full."""
    if marker := metafunc.definition.get_closest_marker("lives"):
        few, many = marker.args
        metafunc.parametrize("life", range(many if metafunc.config.getoption("--full") else few))


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture
def count(request):
    """A function that prints figures of the test, such as count(kills=3), to be called after its assertions.

    With --record it also appends them to cases.jsonl, from which the table of docs/reliability.md is made.
    """
    folder = request.config.getoption("--record")
    name = request.node.originalname

    def add(**figures: float) -> None:
        print({name: figures})
        if folder:
            from experiments.common import machine

            about = {"date": f"{datetime.date.today()}", "machine": machine()}
            line = {"test": name, "case": request.node.name} | figures | about
            path = pathlib.Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            with open(path / "cases.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")  # at once: processes that share the tests append whole lines

    return add
