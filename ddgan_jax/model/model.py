"""A trained model from Python: `model = ddgan_jax.load(path)`, then `images = model.sample(64, seed=0)`.

Sample and variant i depend on (seed, i) alone, not on the number of samples, the batch size or the number of devices.
Without labels, sample i of a class-conditional model has class i modulo the number of classes. No data are read.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax.config.settings import Config, as_dict
from ddgan_jax.errors import UserError
from ddgan_jax.method import build, editing, sampling
from ddgan_jax.method.diffusion import q_sample
from ddgan_jax.method.sampling import Denoiser, bind
from ddgan_jax.method.train_step import to_x0
from ddgan_jax.model import export
from ddgan_jax.model.card import without_private, write_card
from ddgan_jax.model.checks import as_count, as_half, as_integer, as_path, as_posterior, as_seed, check_about
from ddgan_jax.model.classes import labels_of, names_of
from ddgan_jax.model.inputs import as_input, as_known
from ddgan_jax.model.sampler import Sampler, in_batches, noise_of, posterior_of, rows, to_images
from ddgan_jax.storage import checkpoint, paths, safetensors

MAX_INDEX = 2**31 - 1  # of a sample: indices are int32
MAX_ROUNDS = 10_000  # of inpainting


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    function: Callable, denoiser: Denoiser, posterior: str, static: tuple, params: Any, y: Any, *inputs: Any
) -> Any:
    """function(gen, denoiser, posterior, *static, *inputs), compiled once for a model, `static`, and shapes."""
    return function(bind(denoiser.gen, params, y), denoiser, posterior_of(denoiser, posterior), *static, *inputs)


def _trajectory(gen: Any, denoiser: Denoiser, posterior: Any, noise: sampling.Noise) -> sampling.Trajectory:
    return sampling.denoise(gen, denoiser.schedule, noise, posterior)


def _vary(gen: Any, denoiser: Denoiser, posterior: Any, x_tp1: jax.Array, t: Any, z: jax.Array) -> jax.Array:
    return to_images(denoiser, editing.vary(gen, x_tp1, t, z))


def _edit(gen: Any, denoiser: Denoiser, posterior: Any, start_step: int, x0: jax.Array, noise: Any) -> jax.Array:
    return to_images(denoiser, editing.edit(gen, denoiser.schedule, x0, start_step, noise, posterior))


def _inpaint(
    gen: Any, denoiser: Denoiser, posterior: Any, rounds: int, x0: jax.Array, known: Any, seed: Any, indices: Any
) -> jax.Array:
    key, schedule, nz = jax.random.key(seed), denoiser.schedule, denoiser.nz
    x = editing.inpaint(gen, schedule, x0, known, key, indices, nz, rounds, posterior)
    return to_images(denoiser, x)


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A generator's moving average, with the configuration of its training.

    Results are uint8 images [N, H, W, C], or float32 points [N, d]. Steps of a chain are float32 in about [-1, 1],
    which `to_images` converts. Seeds are integers from 0 to 2^32 - 1. In all methods, `posterior` is 'gaussian' (the
    paper's) or 'deterministic', which gives the same image for the same x_T and z. `label`, for class-conditional
    models only, is a class for all images, or a list of one for each: a name of `classes`, such as "cat", or an index,
    such as 1. `image` is a path, a Pillow image, or a uint8 array [H, W] or [H, W, C]; as training data, it is turned
    upright, cropped to its central square and resized, except for an array of exactly the model's shape. A model of
    points takes float32 [d]. Methods raise UserError for an invalid argument, or a result that exceeds the memory.
    """

    params: Any
    denoiser: Denoiser
    config: Config  # defaults where a `.pth` file does not contain it
    step: int
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further metadata of a .safetensors file
    trained_on: dict[str, Any] | None = None  # a sketch of the training data; None for files and old checkpoints
    classes: tuple[str, ...] = ()  # names, by index: '0', '1', ... if they are unknown; () if it is unconditional

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", names_of(self.classes, self.num_classes))

    def __repr__(self) -> str:
        shape, size = self.denoiser.image_shape, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        kind = "x".join(map(str, shape)) if len(shape) == 3 else f"points {list(shape)}"
        classes = f", {self.num_classes:,} classes" * (self.num_classes > 0)
        about = f"{self.config.data.name}, {kind}{classes}, T={self.num_steps}, step {self.step:,}"
        return f"Model({about}, {size:,} parameters)"

    @property
    def num_steps(self) -> int:
        """T, the network calls of a sample."""
        return self.denoiser.schedule.num_steps

    @property
    def num_classes(self) -> int:
        """The number of `classes`; 0 if the model is unconditional."""
        return self.denoiser.num_classes

    def sampler(self, posterior: str = "gaussian") -> Sampler:
        """A sampler with batches of config.sample.batch_size on every device."""
        return Sampler(self.denoiser, self.config.sample.batch_size, as_posterior(posterior, self.denoiser))

    def sample(
        self, num: int, seed: int = 0, posterior: str = "gaussian", label: Any = None, progress: bool = False
    ) -> np.ndarray:
        """Samples 0..num-1 of `seed`, [num, ...]; `progress` shows a bar."""
        num = self.check_count("num", num)
        return self.sampler(posterior)(self.params, as_seed(seed), num, self.labels(label, num), progress)

    def trajectory(
        self, num: int, seed: int = 0, posterior: str = "gaussian", label: Any = None, first: int = 0
    ) -> sampling.Trajectory:
        """Every step of `num` samples from `first` on, float32 [T, num, ...]: x_{t+1}, x0_hat, x_t; x_t[0] is x_0."""
        num = self.check_count("num", num, each=12 * self.num_steps * math.prod(self.denoiser.image_shape))
        first = as_integer("first", first, 0, MAX_INDEX + 1 - num)
        y = self.labels(label, num, first=first)

        def run(i: np.ndarray) -> Any:
            return self._run(_trajectory, posterior, (), rows(y, i), self._noise(seed, first + i))

        return in_batches(run, num, self.config.sample.batch_size, axis=1)

    def vary(
        self, num: int, t: int, image: Any = None, seed: int = 0, label: int | str | None = None, index: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images that the generator sees in one x_{t+1}, which differ only in z: Figure 8 of the paper.

        Returns x_{t+1}, float32 [H, W, C] or [d], in the units of `trajectory`, and `num` samples of x_0 (of x_t, if G
        predicts that), uint8 or points. x_{t+1} is a step of sample `index` of `seed`, or `image` diffused to it; t in
        0..T-1.
        """
        num, t = self.check_count("num", num), self._checked_step("t", t, self.num_steps - 1)
        index = as_integer("index", index, 0, MAX_INDEX)
        y = self.labels(label, num, one=True)
        if image is None:
            label = None if y is None else y[0]  # `y` may have a class for each image
            x_tp1 = self.trajectory(1, seed, label=label, first=index).x_tp1[t, 0]
        else:
            x0 = self._to_x0(as_input(image, self.denoiser.image_shape)[None])
            x_tp1 = q_sample(self.denoiser.schedule, x0, jnp.full(1, t + 1), self._noise(seed, np.arange(1)).x_T)[0]

        def run(i: np.ndarray) -> Any:
            return self._run(_vary, "gaussian", (), rows(y, i), x_tp1, jnp.int32(t), self._noise(seed, i).z[t])

        return np.asarray(x_tp1), in_batches(run, num, self.config.sample.batch_size)

    def edit(
        self,
        image: Any,
        start_step: int,
        num_variants: int = 1,
        seed: int = 0,
        posterior: str = "gaussian",
        label: Any = None,
    ) -> np.ndarray:
        """`num_variants` of one image, uint8: diffused to x_s, s = `start_step` in 0..T, and denoised again.

        A stroke painting becomes an image. A larger s changes it more; s = 0 returns the image.
        """
        num = self.check_count("num_variants", num_variants)
        start_step = self._checked_step("start_step", start_step, self.num_steps)
        image, y = as_input(image, self.denoiser.image_shape), self.labels(label, num)
        seed, posterior = as_seed(seed), as_posterior(posterior, self.denoiser)
        if not start_step:
            return np.repeat(image[None], num, axis=0)

        def run(i: np.ndarray) -> Any:
            x0 = self._to_x0(np.repeat(image[None], len(i), axis=0))
            return self._run(_edit, posterior, (start_step,), rows(y, i), x0, self._noise(seed, i))

        return in_batches(run, num, self.config.sample.batch_size)

    def inpaint(
        self,
        image: Any,
        known: Any = None,
        num_variants: int = 1,
        rounds: int = 1,
        seed: int = 0,
        posterior: str = "gaussian",
        label: Any = None,
        mask: Any = None,
    ) -> np.ndarray:
        """`num_variants` of one image, uint8, with a part that is filled in.

        Pass either `known`, an array [H, W] that is True where the image is kept, or `mask`, which is white, or True,
        where it is filled in: a path, a Pillow image or an array. Both may have any size, and are cropped and resized
        as the image is. More `rounds` per step match the two parts better, and multiply the time.
        """
        num = self.check_count("num_variants", num_variants)
        rounds, image = as_integer("rounds", rounds, 1, MAX_ROUNDS), as_input(image, self.denoiser.image_shape)
        if image.ndim != 3:
            raise UserError("this model makes points, and has no images to fill in")
        known = as_known(known, mask, image.shape[0])
        y, seed = self.labels(label, num), jnp.uint32(as_seed(seed))

        def run(i: np.ndarray) -> Any:
            images = np.repeat(image[None], len(i), axis=0)
            mask = jnp.broadcast_to(known[None, ..., None], images.shape).astype(jnp.float32)
            return self._run(_inpaint, posterior, (rounds,), rows(y, i), self._to_x0(images), mask, seed, i)

        return np.where(known[None, ..., None], image, in_batches(run, num, self.config.sample.batch_size))

    def interpolate(
        self,
        num: int,
        first: int = 0,
        last: int = 1,
        seed: int = 0,
        posterior: str = "gaussian",
        label: int | str | None = None,
    ) -> np.ndarray:
        """`num` images from sample `first` to `last` of `seed`, uint8 [num, ...]: their noise, mixed on a sphere."""
        num = self.check_count("num", num, least=2)  # the two ends
        y, ends = self.labels(label, num, one=True), {"first": first, "last": last}
        a, b = (self._noise(seed, np.array([as_integer(name, i, 0, MAX_INDEX)])) for name, i in ends.items())
        weights = jnp.linspace(0, 1, num)

        def run(i: np.ndarray) -> Any:
            noise = editing.interpolate(a, b, weights[i])
            return self.to_images(self._run(_trajectory, posterior, (), rows(y, i), noise).x_t[0])

        return in_batches(run, num, self.config.sample.batch_size)

    def to_images(self, x: Any) -> jax.Array:
        """Steps of a chain, float32 [..., H, W, C] or [..., d], as uint8 images or as points in the data's units."""
        return to_images(self.denoiser, x)

    def export(self, posterior: str = "gaussian") -> bytes:
        """The sampler, weights included, for jax alone on a CPU, GPU or TPU: see `export.for_jax`.

        The labels of a class-conditional sampler are indices of `classes`, whose names the file does not contain.
        """
        return export.for_jax(self.denoiser, self.params, as_posterior(posterior, self.denoiser))

    def export_onnx(self, posterior: str = "gaussian") -> bytes:
        """The sampler, weights included, for an ONNX runtime, computing in float32: see `export.for_onnx`.

        The labels of a class-conditional sampler are indices of `classes`, whose names the file has as metadata.
        """
        network = dataclasses.replace(self.config.model, dtype="float32")  # runtimes have few bfloat16 operations
        denoiser = build.denoiser(dataclasses.replace(self.config, model=network))
        return export.for_onnx(denoiser, self.params, as_posterior(posterior, self.denoiser), self.classes)

    def save(
        self, path: str | os.PathLike, half: bool = False, about: Mapping[str, str] | None = None, card: Any = False
    ) -> None:
        """Write a .safetensors file that `load` reads: the weights, as float16 if `half`, and their configuration.

        The metadata `classes` of a class-conditional model are a JSON list of their names. `about` is further metadata,
        which `load` returns as `Model.about`. `card` also writes README.md, a model card, beside the file: True, or a
        dict of any of `measures` ({name: number}), `license` and `repository` ('OWNER/NAME'). The configuration in the
        file contains no paths.

        Raises:
            UserError: an argument is invalid, float16 is too narrow, or `card` would replace another README.md.
            OSError: a file cannot be written.
        """
        if not as_path(path).endswith(".safetensors"):
            raise UserError(f"{path} must end in .safetensors")
        check_about(about or {})
        arrays = {n: as_half(n, a) if half else a for n, a in checkpoint.flatten(self.params).items()}
        write_card(self, as_path(path), card)
        further = {**self.about, **(about or {})} | ({"classes": json.dumps(self.classes)} if self.classes else {})
        safetensors.write(paths.path(path), arrays, as_dict(without_private(self.config)), self.step, further)

    def labels(self, label: Any, num: int, one: bool = False, first: int = 0) -> np.ndarray | None:
        """Labels [num] of the samples from `first` on; None for an unconditional model.

        Without `label` the samples take all classes in turn; if `one`, `label` is required.
        """
        return labels_of(label, self.classes, num, one, first)

    def check_count(self, name: str, value: Any, least: int = 1, each: int = 0) -> int:
        """A number of images as a Python integer; `name` is the argument's or the flag's.

        Raises UserError unless it is an integer of at least `least` whose images fit into the free memory, with at
        least `each` bytes for one: by default its pixels twice, in a batch and in the result.
        """
        shape = self.denoiser.image_shape
        bytes_each = max(each, 2 * math.prod(shape) * (1 if len(shape) == 3 else 4))
        return as_count(name, value, least, MAX_INDEX + 1, bytes_each)

    def _checked_step(self, name: str, value: Any, high: int) -> int:
        return as_integer(name, value, 0, high, f"a step of this model, an integer from 0 to {high}")

    def _noise(self, seed: int, indices: np.ndarray) -> sampling.Noise:
        return noise_of(self.denoiser, jnp.uint32(as_seed(seed)), jnp.asarray(indices))

    def _to_x0(self, images: np.ndarray) -> jax.Array:
        return to_x0(jnp.asarray(images), self.denoiser.scale)

    def _run(self, function: Callable, posterior: str, static: tuple, y: Any, *inputs: Any) -> Any:
        return _run(function, self.denoiser, as_posterior(posterior, self.denoiser), static, self.params, y, *inputs)
