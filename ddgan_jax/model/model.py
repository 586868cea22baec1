"""A trained model, from Python: `model = ddgan_jax.load(path)`, then `images = model.sample(64, seed=0)`.

What goes in and comes out are uint8 images [N, H, W, C], or float32 points [N, d]. Sample i depends on (seed, i)
alone, never on how many are drawn, nor on how many devices draw them. A class-conditional model takes labels; without,
sample i is of class i modulo the number of classes. Nothing here reads data, or needs TensorFlow.
"""

import contextlib
import dataclasses
import math
import operator
import os
import pathlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax.config.settings import Config, as_dict, read
from ddgan_jax.config.types import MAX_SEED
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError
from ddgan_jax.method import build, editing, sampling
from ddgan_jax.method.diffusion import q_sample
from ddgan_jax.method.sampling import Denoiser, bind
from ddgan_jax.method.train_step import to_x0
from ddgan_jax.model import export
from ddgan_jax.model.sampler import POSTERIORS, Sampler, default_labels, noise_of, to_images
from ddgan_jax.storage import checkpoint, paths, safetensors
from ddgan_jax.storage.torch import arguments, convert, files

# --- Compiled once for a model, its shapes, and the static arguments in front --------------------------------------


@partial(jax.jit, static_argnums=(0, 1))
def _trajectory(denoiser: Denoiser, posterior: str, params: Any, y: Any, noise: sampling.Noise) -> sampling.Trajectory:
    return sampling.denoise(bind(denoiser.gen, params, y), denoiser.schedule, noise, POSTERIORS[posterior])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _edit(
    denoiser: Denoiser, posterior: str, start_step: int, params: Any, y: Any, x0: jax.Array, noise: Any
) -> jax.Array:
    gen = bind(denoiser.gen, params, y)
    images = editing.edit(gen, denoiser.schedule, x0, start_step, noise, POSTERIORS[posterior])
    return to_images(images, denoiser.scale)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _inpaint(
    denoiser: Denoiser,
    posterior: str,
    rounds: int,
    params: Any,
    y: Any,
    x0: jax.Array,
    known: Any,
    seed: Any,
    indices: Any,
) -> jax.Array:
    gen, key, way = bind(denoiser.gen, params, y), jax.random.key(seed), POSTERIORS[posterior]
    x = editing.inpaint(gen, denoiser.schedule, x0, known, key, indices, denoiser.nz, rounds, way)
    return to_images(x, denoiser.scale)


@partial(jax.jit, static_argnums=0)
def _vary(denoiser: Denoiser, params: Any, y: Any, x_tp1: jax.Array, t: Any, z: jax.Array) -> jax.Array:
    return to_images(editing.vary(bind(denoiser.gen, params, y), x_tp1, t, z), denoiser.scale)


# --- The model ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator's moving average, and what its configuration describes.

    `posterior` is 'gaussian' (the paper's) or 'deterministic', the same images for the same x_T and z. `label`, for
    class-conditional models only, is a class for all images, or one for each of them.
    """

    params: Any
    denoiser: Denoiser
    config: Config  # of a `.pth`, whose training is not known, with defaults
    step: int
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what a .safetensors file tells besides

    @property
    def num_steps(self) -> int:
        """T, the network calls of a sample."""
        return self.denoiser.schedule.num_steps

    @property
    def num_classes(self) -> int:
        """How many classes `label` chooses from; 0 if the model is unconditional."""
        return self.denoiser.num_classes

    def sampler(self, posterior: str = "gaussian") -> Sampler:
        """Draws in batches of config.sample.batch_size on every device."""
        return Sampler(self.denoiser, self.config.sample.batch_size, _known(posterior))

    def sample(
        self, num: int, seed: int = 0, posterior: str = "gaussian", label: Any = None, progress: bool = False
    ) -> np.ndarray:
        """Samples 0..num-1 of `seed`, uint8 [num, H, W, C]."""
        num = self.check_count("num", num)
        return self.sampler(posterior)(self.params, _known_seed(seed), num, self.labels(label, num), progress)

    def trajectory(
        self, num: int, seed: int = 0, posterior: str = "gaussian", label: Any = None, first: int = 0
    ) -> sampling.Trajectory:
        """Every step of `num` samples from `first` on, float32 [T, num, ...]: x_{t+1}, x0_hat, x_t; x_t[0] is x_0."""
        num = self.check_count("num", num, each=12 * self.num_steps * math.prod(self.denoiser.image_shape))
        noise = self._noise(seed, _whole("first", first, 0, LAST + 1 - num) + jnp.arange(num))
        y = self.labels(label, num, first=first)
        return jax.device_get(_trajectory(self.denoiser, _known(posterior), self.params, y, noise))

    def vary(
        self, num: int, t: int, image: Any = None, seed: int = 0, label: int | None = None, index: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(x_{t+1} [H, W, C] float32, `num` draws of x_0 from it by z alone, uint8): Figure 8 of the paper.

        x_{t+1} is on the way of sample `index` of `seed`, or `image` diffused to it; t in 0..T-1.
        """
        num, t = self.check_count("num", num), self._step("t", t, self.num_steps - 1)
        index = _whole("index", index, 0, LAST)
        y = self.labels(label, num, one=True)
        noise = self._noise(seed, jnp.arange(num))
        if image is None:
            x_tp1 = self.trajectory(1, seed, label=label, first=index).x_tp1[t, 0]
        else:
            x0 = self._to_x0(self._images(image, 1))
            x_tp1 = q_sample(self.denoiser.schedule, x0, jnp.full(1, t + 1), noise.x_T[:1])[0]
        return np.asarray(x_tp1), np.asarray(_vary(self.denoiser, self.params, y, x_tp1, jnp.int32(t), noise.z[t]))

    def edit(
        self,
        image: Any,
        start_step: int,
        num_variants: int = 1,
        seed: int = 0,
        posterior: str = "gaussian",
        label: Any = None,
    ) -> np.ndarray:
        """`num_variants` of one image [H, W, C]: diffused to x_s, s = `start_step` in 0..T, and denoised again.

        A stroke painting becomes an image; the larger s, the freer. s = 0 returns the image.
        """
        num_variants = self.check_count("num_variants", num_variants)
        start_step = self._step("start_step", start_step, self.num_steps)
        images = self._images(image, num_variants)
        y = self.labels(label, num_variants)
        if not start_step:
            return images
        noise = self._noise(seed, jnp.arange(num_variants))
        return np.asarray(
            _edit(self.denoiser, _known(posterior), start_step, self.params, y, self._to_x0(images), noise)
        )

    def inpaint(
        self,
        image: Any,
        known: Any,
        num_variants: int = 1,
        rounds: int = 1,
        seed: int = 0,
        posterior: str = "gaussian",
        label: Any = None,
    ) -> np.ndarray:
        """`num_variants` of one image [H, W, C], filled in where `known` [H, W] is False; the rest stays exactly.

        More `rounds` a step let the two parts agree better, for so many times the work.
        """
        num_variants, rounds = self.check_count("num_variants", num_variants), _whole("rounds", rounds, 1, MOST_ROUNDS)
        images = self._images(image, num_variants)
        if images.ndim != 4:
            raise UserError("this model makes points, and has no images to fill in")
        known = _array("known", known).astype(bool)
        if known.shape != images.shape[1:3]:
            raise UserError(f"the mask is {list(known.shape)}, but the image is {list(images.shape[1:3])}")
        mask = jnp.broadcast_to(known[None, ..., None], images.shape).astype(jnp.float32)
        y, indices = self.labels(label, num_variants), jnp.arange(num_variants)
        x0, way = self._to_x0(images), _known(posterior)
        x = _inpaint(self.denoiser, way, rounds, self.params, y, x0, mask, jnp.uint32(_known_seed(seed)), indices)
        return np.where(known[None, ..., None], images, np.asarray(x))

    def interpolate(
        self,
        num: int,
        first: int = 0,
        last: int = 1,
        seed: int = 0,
        posterior: str = "gaussian",
        label: int | None = None,
    ) -> np.ndarray:
        """`num` images from sample `first` to `last` of `seed`, uint8 [num, ...]: their draws mixed on a sphere."""
        num = self.check_count("num", num, least=2)  # the two ends
        y, ends = self.labels(label, num, one=True), {"first": first, "last": last}
        a, b = (self._noise(seed, jnp.array([_whole(name, i, 0, LAST)])) for name, i in ends.items())
        noise = editing.interpolate(a, b, jnp.linspace(0, 1, num))
        return np.asarray(self.to_images(_trajectory(self.denoiser, _known(posterior), self.params, y, noise).x_t[0]))

    def to_images(self, x: Any) -> jax.Array:
        """A step of a trajectory [N, ...] as uint8 images, or as points."""
        return to_images(x, self.denoiser.scale)

    def _noise(self, seed: int, indices: jax.Array) -> sampling.Noise:
        return noise_of(self.denoiser, jnp.uint32(_known_seed(seed)), indices)

    def _to_x0(self, images: np.ndarray) -> jax.Array:
        return to_x0(jnp.asarray(images), self.denoiser.scale)

    def export(self, posterior: str = "gaussian") -> bytes:
        """The sampler, weights included, for jax alone on a CPU, GPU or TPU: see `export.for_jax`."""
        return export.for_jax(self.denoiser, self.params, _known(posterior))

    def export_onnx(self, posterior: str = "gaussian") -> bytes:
        """The sampler, weights included, for an ONNX runtime, computing in float32: see `export.for_onnx`."""
        network = dataclasses.replace(self.config.model, dtype="float32")  # runtimes know bfloat16 in few operations
        denoiser = build.denoiser(dataclasses.replace(self.config, model=network))
        return export.for_onnx(denoiser, self.params, _known(posterior))

    def save(self, path: str | os.PathLike, half: bool = False, about: Mapping[str, str] | None = None) -> None:
        """Write a .safetensors file that `load` reads: the weights, as float16 if `half`, with what they are.

        `about` is any text that is to be found in it again. Raises UserError if `path` does not end so; OSError if it
        cannot be written.
        """
        if not os.fspath(path).endswith(".safetensors"):
            raise UserError(f"{path} must end in .safetensors")
        for name, text in (about or {}).items():
            if not isinstance(name, str) or not isinstance(text, str) or name in safetensors.OWN:
                own = ", ".join(safetensors.OWN)
                raise UserError(f"about has {name!r}: {text!r}, and must be text by names other than {own}")
        arrays = checkpoint.flatten(self.params)
        if half:
            arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
        safetensors.write(paths.path(path), arrays, as_dict(self.config), self.step, {**self.about, **(about or {})})

    def labels(self, label: Any, num: int, one: bool = False, first: int = 0) -> np.ndarray | None:
        """Labels [num] from sample `first` on: as asked, or all classes in turn unless the images are to be of `one`.

        None for an unconditional model.
        """
        classes = self.num_classes
        if not classes:
            if label is not None:
                raise UserError(f"label={label}: this model knows no classes, it was trained with model.num_classes=0")
            return None
        if label is None:
            if one:
                raise UserError(f"these images are of one class: choose it, label=0 to {classes - 1}")
            return default_labels(classes, first + np.arange(num))
        labels = _array("label", label)
        fits = labels.dtype.kind in "iu" and labels.shape in ((), (num,))
        if not fits or labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"label={label} must be a class of this model, 0 to {classes - 1}, or {num} of them")
        return np.broadcast_to(labels, num).astype(np.int32)

    def check_count(self, name: str, value: Any, least: int = 1, each: int = 0) -> int:
        """A number of images as a Python integer; `name` is what the user calls it.

        Raises UserError unless it is an integer of at least `least` whose images fit into the free memory, with at
        least `each` bytes for one: by default its pixels twice, in a batch and in the result.
        """
        num, shape = _whole(name, value, least, LAST + 1), self.denoiser.image_shape
        need, free = num * max(each, 2 * math.prod(shape) * (1 if len(shape) == 3 else 4)), _free_memory()
        if need > free:
            raise UserError(
                f"{name}={num} needs at least {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free: "
                f"ask for at most {num * free // need}"
            )
        return num

    def _images(self, image: Any, num: int) -> np.ndarray:
        """An image [*d] `num` times, [num, *d]; UserError unless it is as the model's are."""
        array, shape = _array("image", image), self.denoiser.image_shape
        wanted = np.uint8 if len(shape) == 3 else np.float32
        if array.shape != shape or array.dtype != wanted:
            raise UserError(
                f"the image is {array.dtype} {list(array.shape)}, but the model's are {np.dtype(wanted)} {list(shape)}"
            )
        return np.repeat(array[None], num, axis=0)

    def _step(self, name: str, value: Any, high: int) -> int:
        return _whole(name, value, 0, high, f"a step of this model, an integer from 0 to {high}")


LAST = 2**31 - 1  # the last sample: indices are int32
MOST_ROUNDS = 10_000


def _known(posterior: str) -> str:
    if not isinstance(posterior, str) or posterior not in POSTERIORS:
        raise UserError(f"posterior={posterior!r} is not supported: it is {' or '.join(POSTERIORS)}")
    return posterior


def _known_seed(seed: Any) -> int:
    return _whole("seed", seed, 0, MAX_SEED)


def _whole(name: str, value: Any, low: int, high: int, text: str = "") -> int:
    """An integer of Python, numpy or jax as one of Python. UserError unless it is one from `low` to `high`."""
    with contextlib.suppress(TypeError):  # of all that is no integer
        if not isinstance(value, bool) and low <= operator.index(value) <= high:
            return operator.index(value)
    raise UserError(f"{name}={value!r} must be {text or f'an integer from {low} to {high}'}")


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # of lists of different lengths
        raise UserError(f"{name} is no array: {error}") from error


def _free_memory() -> int:
    """Bytes of memory that can still be taken, as far as the system tells: what is available, or what is allowed."""
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable: +(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),  # of a container
    ):
        with contextlib.suppress(OSError):
            bounds += [unit * int(number) for number in re.findall(pattern, pathlib.Path(file).read_text())]
    return min(bounds)


PRETRAINED = pathlib.Path(__file__).parent / "pretrained"


def _pretrained() -> dict[str, pathlib.Path]:
    return {file.stem: file for file in sorted(PRETRAINED.glob("*.safetensors"))}


def models() -> dict[str, str]:
    """The models that come with the package: what `load` takes, and what each is."""
    return {name: safetensors.about(file).get("summary", "") for name, file in _pretrained().items()}


def file_of(path: str) -> str | None:
    """The file that holds the model that `path` names, if it is one, or one of `models()`; None for a folder.

    Raises UserError for a name that is neither a folder nor a model.
    """
    path = os.path.expanduser(path)
    if path.endswith((".pth", ".safetensors")):
        return path
    if "/" in path or paths.exists(path):
        return None
    known = _pretrained()
    if path not in known:
        raise UserError(f"there is no {path}: name a workdir, a checkpoint, a file, or one of {', '.join(known)}")
    return str(known[path])


def beside(path: str, name: str) -> str:
    """Where the result `name` of a model goes by default: into its workdir or folder, or beside its file.

    Results of a checkpoint in WORKDIR/checkpoints go into WORKDIR, as its own folder is deleted with it.
    """
    if file_of(path) is not None:
        return f"{os.path.splitext(path)[0]}.{name}"
    folder = paths.path(processes.from_primary(lambda: str(checkpoint.find(path)))).parent
    return str((folder.parent if folder.name == "checkpoints" else paths.path(path)) / name)


def load(path: str | os.PathLike, config: Any = None, **hints: Any) -> Model:
    """The model in a workdir, a checkpoint, a .safetensors file, or a `.pth` file of the PyTorch reference.

    Also one of `models()`, by its name. A `netG_*.pth` contains only weights: pass the `config` of its training, or as
    hints what differs from the reference's defaults, such as `image_size=32` or `nf=64` (`storage.torch.arguments`).

    Raises:
        UserError: there is no model, or hints are missing or contradict the weights.
        Fault: the model is damaged or cannot be read.
    """
    path, about = os.fspath(path), dict[str, str]()
    if path.endswith(".pth"):
        return _load_reference(path, None if config is None else read(config), hints)
    if file := file_of(path):
        arrays, found, step, about = processes.from_primary(lambda: safetensors.read(file))
        params = checkpoint.nested(arrays)
    else:
        params, found, step = processes.from_primary(lambda: checkpoint.restore_ema(path))
    c = read(found)
    generates = build.denoiser(c)
    checkpoint.check_like(params, jax.eval_shape(generates.init_gen, jax.random.key(0)), f"the checkpoint in {path}")
    return Model(params, generates, c, step, about)


def _load_reference(path: str, config: Config | None, hints: dict[str, Any]) -> Model:
    found = processes.from_primary(lambda: files.read(path, config, **hints))
    arguments.check_equal(found.settings, found.config, ("diffusion",), path)
    return Model(found.ema_params or found.gen_params, build.denoiser(found.config), found.config, 0)


def networks_of(c: Config, like: Any) -> tuple[str, Any, Any]:
    """(where they are, the moving average of G, D or None) that `train.init_from` of `c` names, in the tree of `like`.

    UserError if there are none, or they are of another architecture than `c`'s; Fault if they are damaged.
    """
    path = c.train.init_from or ""
    file = file_of(path)
    if file and not file.endswith(".pth"):
        params = load(path).params
        checkpoint.check_like(params, like.gen_params, f"{path} of train.init_from")
        return file, params, None
    if not file:
        folder = checkpoint.find(path)
        found = checkpoint.unflatten(checkpoint.read(folder)[0], like, f"the checkpoint {folder} of train.init_from")
        return str(folder), found.ema_params, found.disc_params
    found = files.read(path, c)
    gen_params = found.ema_params or found.gen_params
    disc_params = convert.from_state_dict(found.disc_arrays, like.disc_params) if found.disc_arrays else None
    return path, gen_params, disc_params
