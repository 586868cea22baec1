"""The modes that use a trained model: they write its images as files, animations and arrays.

`options` are those of the method of Model of the same name: `seed`, `posterior`, `label`.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.commands.outputs import check_out, into, save, save_with_input
from ddgan_jax.config.settings import as_dict, flat, read
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError
from ddgan_jax.model.checks import as_seed
from ddgan_jax.model.inputs import as_hole, as_image
from ddgan_jax.model.model import MAX_INDEX, Model
from ddgan_jax.networks.ops import FIR_KERNEL
from ddgan_jax.storage import paths
from ddgan_jax.storage.torch import convert, files

MAX_STEPS = 8  # of a trajectory that are drawn; the paper's models have no more


def sample(model: Model, out: str, num: int, trajectory: str = "", **options: Any) -> None:
    """Write samples 0..num-1 and, into the .png or .gif `trajectory`, the denoising of the first of them."""
    check_out(out, ".png", ".npz", *_directory(model), num=num)
    if trajectory:
        check_out(trajectory, ".png", ".gif", flag="--trajectory")
        target, folder = (os.path.realpath(paths.path(path)) for path in (trajectory, out))
        if pathlib.Path(target).is_relative_to(folder):
            raise UserError(f"--trajectory={trajectory} is --out, or a file in it: name another file")
    size = model.denoiser.image_shape[0] if _has_images(model) else 0
    each = 3 * 3 * max(size, figures.MIN_SIDE) ** 2 if size else 0  # of a grid
    each = each if out.endswith(".png") else 16  # of a file, which is written in chunks: an index and a label
    processes.run_on_all(lambda: model.check_count("--num_samples", num, each=each))
    processes.assert_equal_across_processes({"--num_samples": num, **options})
    # In each step the other processes wait for process 0: JAX aborts it some minutes after they end.
    if out.endswith(".png"):
        images = model.sample(num, progress=True, **options)
        processes.run_on_primary(lambda: save(images, out))
    else:
        save_in_chunks(model, out, num, **options)
    if trajectory:
        count = min(num, 8 if _has_images(model) else 4096)
        processes.run_on_primary(lambda: draw_trajectory(model, trajectory, count, **options))


def save_in_chunks(
    model: Model, out: str, num: int, seed: int = 0, posterior: str = "gaussian", label: Any = None
) -> None:
    """Writes the samples 0..num-1 into a directory or an .npz while they are generated: memory holds some chunks."""
    labels = model.labels(label, num)
    chunks = model.sampler(posterior).gathered(model.params, as_seed(seed), num, labels, progress=True)
    with contextlib.ExitStack() as stack:
        shape, dtype = (num, *model.denoiser.image_shape), np.uint8 if _has_images(model) else np.float32
        add = processes.run_on_primary(lambda: stack.enter_context(into(out, shape, dtype)))
        for chunk in chunks:
            processes.run_on_primary(functools.partial(add or (lambda _: None), chunk))
        processes.run_on_primary(stack.close)


def draw_trajectory(model: Model, out: str, num: int, **options: Any) -> None:
    """Write the denoising of the samples 0..num-1 into a .png or .gif."""
    frames = denoising_frames(model, num, **options)
    if out.endswith(".gif"):
        figures.save_gif(paths.path(out), figures.as_frames(frames))
    else:
        names = [f"$x_{{{t + 1}}}$" for t in shown_steps(model)] + ["$x_0$"]
        outputs = [f"$\\hat x_{{{predicted_step(model, t)}}}$ from $x_{{{t + 1}}}$" for t in shown_steps(model)]
        figures.trajectory(np.array(frames[::2]), np.array(frames[1::2]), names, outputs, paths.path(out))


def shown_steps(model: Model) -> list[int]:
    """The t of the drawn steps x_{t+1} -> x_t, descending: all, or MAX_STEPS at even distances from T-1 to 0."""
    T = model.num_steps
    return [round(t) for t in np.linspace(T - 1, 0, min(T, MAX_STEPS))]


def predicted_step(model: Model, t: int) -> int:
    """The index k of the generator's output x_k at t: t if it predicts x_t, else 0."""
    return t if model.denoiser.predicts_x_t else 0


def denoising_frames(model: Model, num: int, **options: Any) -> list[np.ndarray]:
    """The images or points x_T, x0_hat, x_{T-1}, x0_hat, ..., x_0 of `num` samples, at the `shown_steps`.

    `options` are those of `Model.trajectory`.
    """
    steps, frames = model.trajectory(num, **options), []
    for t in shown_steps(model):
        frames += [steps.x_tp1[t], steps.x0_hat[t]]
    return [np.asarray(model.to_images(frame)) for frame in [*frames, steps.x_t[0]]]


def vary(model: Model, out: str, num: int, t: int | None, image: str, **options: Any) -> None:
    """Write one x_{t+1}, then `num` images that the generator sees in it, which differ only in z. t: T-1 by default."""
    check_out(out, ".png", ".npz")
    t = model.num_steps - 1 if t is None else t
    x_tp1, images = model.vary(num, t, read_image(model, image) if image else None, **options)
    save_with_input(np.asarray(model.to_images(x_tp1[None])[0]), images, out)


def default_start_step(model: Model) -> int:
    """The step at which an edit starts by default: T / 2 rounded down, at least 1."""
    return max(1, model.num_steps // 2)


def note_classes(model: Model, label: Any = None, **options: Any) -> None:
    """Reports that the variants of an image are of all classes, where no `label` chooses one."""
    if model.num_classes and label is None:
        processes.say(f"note: the variants take the {model.num_classes} classes in turn; --label chooses one")


def edit(model: Model, out: str, image: str, start_step: int | None, num: int, **options: Any) -> None:
    """Write the image, then `num` variants of it from step `start_step`."""
    check_out(out, ".png", ".npz", *_directory(model), num=num)
    start_step = default_start_step(model) if start_step is None else start_step
    given = read_image(model, image)
    note_classes(model, **options)
    save_with_input(given, model.edit(given, start_step, num, **options), out)


def inpaint(model: Model, out: str, image: str, mask: str, num: int, rounds: int, **options: Any) -> None:
    """Write the image with its hole in grey, then `num` variants that fill it in."""
    check_out(out, ".png", ".npz", *_directory(model), num=num)
    given, hole = read_image(model, image), read_mask(model, mask)
    note_classes(model, **options)
    images = model.inpaint(given, ~hole, num, rounds, **options)
    save_with_input(np.where(hole[..., None], np.uint8(127), given), images, out)


def interpolate(model: Model, out: str, num: int, samples: Sequence[str], **options: Any) -> None:
    """Write `num` images from one sample to another, as a strip, an animation, an array or numbered files."""
    check_out(out, ".png", ".gif", ".npz", *_directory(model), num=num)
    valid = [re.fullmatch(r"[0-9]{1,10}", index) and int(index) <= MAX_INDEX for index in samples]
    if len(samples) != 2 or not all(valid):
        raise UserError(f"--between={','.join(samples)} must be two samples, such as 0,1, each from 0 to {MAX_INDEX}")
    images = model.interpolate(num, int(samples[0]), int(samples[1]), **options)
    if out.endswith(".png") and _has_images(model):
        figures.save_image(paths.path(out), figures.grid(images, columns=num))
    else:
        save(np.concatenate([images, images[-2:0:-1]]) if out.endswith(".gif") else images, out)


def export(model: Model, out: str, posterior: str = "gaussian") -> None:
    """Write the generator (.safetensors, .pth for the reference) or the sampler (.bin for jax, .onnx) as one file."""
    check_out(out, ".safetensors", ".bin", ".onnx", ".pth")
    if posterior != "gaussian" and out.endswith((".safetensors", ".pth")):
        raise UserError(f"--posterior={posterior} does nothing for weights, --out={out}: it is for .bin and .onnx")
    if out.endswith(".bin"):
        paths.write(paths.path(out), model.export(posterior))
        print(f"written by jax {jax.__version__}; this and later versions read it, older ones may not")
    elif out.endswith(".onnx"):
        paths.write(paths.path(out), model.export_onnx(posterior))
    elif out.endswith(".safetensors"):
        model.save(out)
    else:
        check_for_the_reference(model, out)
        files.save(out, convert.to_state_dict(model.params))
        diffusion = model.config.diffusion
        print(
            f"a .pth contains only weights: the reference also needs T={model.num_steps}, the {diffusion.kind} "
            f"schedule, beta_min={diffusion.beta_min} and beta_max={diffusion.beta_max}"
        )


def check_for_the_reference(model: Model, out: str) -> None:
    """Raises UserError unless the reference has a generator that gives the same samples with the weights in `out`."""
    patch, fields, predicts = model.config.model.patch_size, model.config.generator, model.config.diffusion.predicts
    kernel = tuple(fields.get("fir_kernel", FIR_KERNEL)) if fields.get("fir", True) else FIR_KERNEL
    lacking = {
        "networks for points": not _has_images(model),
        f"generator of {predicts} (diffusion.predicts={predicts})": predicts != "x_0",
        "class-conditional networks": model.num_classes > 0,
        f"networks that work on patches (model.patch_size={patch})": patch > 1,
        "networks without a latent z (generator.nz=0)": model.denoiser.nz == 0,
        f"filter other than {FIR_KERNEL} (generator.fir_kernel={kernel})": kernel != FIR_KERNEL,
    }
    for what, found in lacking.items():
        if found:
            raise UserError(f"--out={out}: the reference has no {what}; write a .safetensors or a .bin")


def read_image(model: Model, path: str) -> np.ndarray:
    """The file of --image, cropped and resized to the size of the model's images, uint8 [H, W, C]."""
    if not _has_images(model):
        raise UserError("this model makes points, and has no images to work on")
    return as_image(_given("--image", path), model.denoiser.image_shape, "--image")


def read_mask(model: Model, path: str) -> np.ndarray:
    """The hole of the file of --mask, bool [H, W]. Raises UserError if it is empty, or is the whole image."""
    return as_hole(_given("--mask", path), model.denoiser.image_shape[0], "--mask")


def _given(flag: str, path: str) -> str:
    """The path of a flag. Raises UserError if there is none."""
    if not path:
        raise UserError(f"name an image with {flag}=PATH")
    return path


def _directory(model: Model) -> list[str]:
    """The kind of `--out` that is a directory, if an image file can represent the model's images."""
    return [""] if _has_images(model) and model.denoiser.image_shape[2] in (1, 3) else []


def _has_images(model: Model) -> bool:
    return len(model.denoiser.image_shape) == 3


def with_flags(model: Model, config: Any, names: Sequence[str]) -> Model:
    """The model with the fields `names` of `config` that samples depend on; a note for others that differ from its own.

    A model has the configuration of its training. The size of a batch may be chosen.
    """
    c = read(config)
    given, own = flat(as_dict(c)), flat(as_dict(model.config))
    for name in names:
        if name != "sample.batch_size" and given.get(name) != own.get(name):
            processes.say(f"note: --config.{name}={given.get(name)} has no effect: the model has {own.get(name)}")
    chosen = c.sample if "sample.batch_size" in names else model.config.sample
    own_sample = dataclasses.replace(model.config.sample, batch_size=chosen.batch_size)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, sample=own_sample))


def generate(mode: str, model: Model, out: str, **options: Any) -> None:
    """Run a mode of MODES, and print how long it took."""
    start = time.time()
    MODES[mode](model, out, **options)
    processes.say(f"{mode} of step {model.step} written to {out} in {time.time() - start:.1f} s")


MODES: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (sample, vary, edit, inpaint, interpolate, export)
}
