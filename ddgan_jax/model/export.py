"""Samplers that need neither this package nor Flax: weights and all T steps in one file, for jax or for ONNX."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from ddgan_jax.errors import UserError
from ddgan_jax.method.sampling import Denoiser, bind, denoise_once
from ddgan_jax.model.sampler import posterior_of, sample, to_images
from ddgan_jax.networks import ops


def for_jax(denoiser: Denoiser, params: Any, posterior: str = "gaussian") -> bytes:
    """The sampler as `jax.export` serializes it, for a CPU, GPU or TPU.

    `jax.export.deserialize(data).call(seed, indices)` with uint32 [] and int32 [B], any B, returns the samples of
    these indices: float32 [B, H, W, C] (see below), or points. A class-conditional sampler is called with
    (seed, indices, labels), where labels are int32 [B]. Its `fun_name` contains the version of jax that wrote it. Older
    versions may refuse the file; jax promises to read it for six months.

    Images are in [-1, 1] if the generator ends in a tanh. Otherwise, as of every one that predicts x_t or the noise,
    clip them.
    """

    def sampler(seed: jax.Array, indices: jax.Array, y: Any = None) -> jax.Array:
        return _images_or_points(denoiser, sample(denoiser, posterior, params, seed, indices, y))

    sampler.__name__ = f"sampler of jax {jax.__version__}"
    (b,) = jax.export.symbolic_shape("b")
    each = jax.ShapeDtypeStruct((b,), jnp.int32)
    arguments = jax.ShapeDtypeStruct((), jnp.uint32), each, *([each] if denoiser.num_classes else [])
    # jax does not promise the stability of this custom call, which is its own.
    layout = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    export = jax.export.export(jax.jit(sampler), platforms=("cpu", "cuda", "tpu"), disabled_checks=[layout])
    return bytes(export(*arguments).serialize())


def for_onnx(denoiser: Denoiser, params: Any, posterior: str = "gaussian", classes: Sequence[str] = ()) -> bytes:
    """The sampler as an ONNX model, whose inputs are its noise, each from N(0, 1), with any batch size B.

    Inputs: `x_T` float32 [B, H, W, C] (points: [B, d]), `z` [T, B, nz] if G has a latent, `noise` [T, B, H, W, C] of
    the Gaussian posterior (absent if G outputs x_t), and for a class-conditional model `labels` int32 [B]. Output:
    `x_0` float32 [B, H, W, C], as of `for_jax`, or points. The metadata `classes` are a JSON list of the names of the
    `classes`, if there are any.

    Raises:
        UserError: jax2onnx is not installed.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError("an ONNX file is written by jax2onnx: pip install 'ddgan_jax[onnx]'") from error
    T = denoiser.schedule.num_steps
    (B,) = jax.export.symbolic_shape("B")
    inputs = {"x_T": jax.ShapeDtypeStruct((B, *denoiser.image_shape), jnp.float32)}
    if denoiser.nz:
        inputs["z"] = jax.ShapeDtypeStruct((T, B, denoiser.nz), jnp.float32)
    if posterior == "gaussian" and not denoiser.predicts_x_t:
        inputs["noise"] = jax.ShapeDtypeStruct((T, B, *denoiser.image_shape), jnp.float32)
    if denoiser.num_classes:
        inputs["labels"] = jax.ShapeDtypeStruct((B,), jnp.int32)

    def sampler(*values: jax.Array) -> jax.Array:
        given = dict(zip(inputs, values, strict=True))
        gen, follows = bind(denoiser.gen, params, given.get("labels")), posterior_of(denoiser, posterior)

        def step(x: jax.Array, now: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            z = now["z"] if "z" in now else x.reshape(x.shape[0], -1)[:, :0]
            noise = now.get("noise", jnp.zeros(()))
            return denoise_once(gen, denoiser.schedule, x, now["t"], z, noise, follows).x_t, None

        # From T-1 down to 0, as a forward scan: the converter does not support reverse scans.
        by_step = {name: given[name][::-1] for name in ("z", "noise") if name in given}
        x = jax.lax.scan(step, given["x_T"], {"t": jnp.arange(T)[::-1], **by_step})[0]
        return _images_or_points(denoiser, x)

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about every value without a type
    with ops.portable():
        model = to_onnx(
            sampler, list(inputs.values()), model_name="sampler", input_names=list(inputs), output_names=["x_0"]
        )
    if classes:
        model.metadata_props.add(key="classes", value=json.dumps(classes))
    return bytes(model.SerializeToString())


def _images_or_points(denoiser: Denoiser, x0: jax.Array) -> jax.Array:
    return x0 if len(denoiser.image_shape) == 3 else to_images(denoiser, x0)
