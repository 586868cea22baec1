"""The parts that both networks are made of: resampling, embeddings, adaptive norms, attention, residual blocks.

Everything is NHWC. Parameters, and the statistics of norms and softmaxes, are float32 whatever `dtype` says;
`dtype` is the compute type of convolutions and dense layers. The blocks are those of NCSN++ (Song et al.,
"Score-Based Generative Modeling through SDEs", Appendix H) with a norm that the latent z modulates (Section 3.2).

FIR resampling follows upfirdn (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN"):
insert zeros (up), convolve with the kernel outer(k, k) / sum, keep every second pixel (down). The kernel is
separable and applied one axis at a time, as shifted slices (down) or as two phases without the inserted
zeros (up): depthwise convolutions cost 10 to 400 times as much on a CPU. On a TPU it is a matrix product.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn.initializers import Initializer, variance_scaling

from ddgan_jax.errors import UserError
from ddgan_jax.materialize import materialize
from ddgan_jax.models.convolution import convolve, pointwise

FIR_KERNEL = (1, 3, 3, 1)
Dtype = Any


# --- Initialisation: uniform weights, zero biases; a scale of 0 means a variance scale of 1e-10, as in NCSN++ ---


def init_avg(scale: float = 1.0) -> Initializer:
    """Variance scale / mean of fan-in and fan-out: G's convolutions, attention and time embedding."""
    return variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def init_out(scale: float = 1.0) -> Initializer:
    """Variance scale / fan-out: the layers that z feeds, and every layer of the discriminator."""
    return variance_scaling(scale or 1e-10, "fan_out", "uniform")


def embed(classes: int, features: int, dtype: Dtype, name: str, std: float) -> nn.Embed:
    """A vector [features] for every class, drawn from N(0, std^2)."""
    init = jax.nn.initializers.normal(std)
    return nn.Embed(classes, features, embedding_init=init, dtype=dtype, name=name)


def conv(features: int, size: int, dtype: Dtype, name: str, init: Initializer | None = None, **options) -> nn.Conv:
    """A size x size convolution, zero-padded to keep height and width unless `options` says otherwise."""
    if size in (1, 3) and not {"strides", "padding", "conv_general_dilated"} & set(options):
        function = pointwise if size == 1 else convolve
        options["conv_general_dilated"] = lambda x, kernel, *_, **__: function(x, kernel)
    return nn.Conv(features, (size, size), kernel_init=init or init_avg(), dtype=dtype, name=name, **options)


# --- FIR resampling ---------------------------------------------------------------------------------------------


def _taps(kernel: Sequence[float], gain: float = 1.0) -> tuple[float, ...]:
    """One axis of the normalised kernel times `gain`."""
    k = np.asarray(kernel, np.float64)
    return tuple((gain * k / k.sum()).tolist())


Terms = list[tuple[float, int]]  # of a sum: (tap, start) stands for tap * x[start + stride * n]


def _padded(x: jax.Array, sums: list[Terms], sizes: Sequence[int], stride: int) -> tuple[jax.Array, list[Terms]]:
    """x with zeros around it as far as `sums`, n = 0..size-1, reach in both axes; and the sums, of its pixels."""
    starts = [start for terms in sums for _, start in terms]
    low = max(-min(starts), 0)
    highs = (max(max(starts) + (size - 1) * stride + 1 - n, 0) for size, n in zip(sizes, x.shape[1:3], strict=True))
    widths = [(0, 0, 0), *((low, high, 0) for high in highs), (0, 0, 0)]
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
    return padded, [[(tap, start + low) for tap, start in terms] for terms in sums]


def _sums(x: jax.Array, sums: list[Terms], size: int, stride: int, axis: int) -> list[jax.Array]:
    """For each of `sums` the sum of its terms, n = 0..size-1 along `axis`."""

    def term(tap: float, start: int) -> jax.Array:
        return tap * jax.lax.slice_in_dim(x, start, start + (size - 1) * stride + 1, stride, axis)

    return [functools.reduce(operator.add, itertools.starmap(term, terms)) for terms in sums]


@dataclasses.dataclass(frozen=True)
class _Filter:
    """y[n] = sum over j of taps[j] x[start + j + stride n] along both axes, zero outside x, of these sizes (H, W)."""

    taps: tuple[float, ...]
    start: int
    stride: int
    x_sizes: tuple[int, ...]
    y_sizes: tuple[int, ...]


def _products(x: jax.Array, f: _Filter, transposed: bool = False) -> jax.Array:
    """`f`, or its transpose, of [B, H, W, C] by a matrix product for each axis: what a TPU is made for."""
    for axis, equation in enumerate(("nh,bhwc->bnwc", "nw,bhwc->bhnc")):
        n, m = np.indices((f.y_sizes[axis], f.x_sizes[axis]))
        j = m - f.start - f.stride * n
        matrix = np.where((j >= 0) & (j < len(f.taps)), np.take(f.taps, j, mode="clip"), 0)
        factor = jnp.asarray(matrix.T if transposed else matrix, x.dtype)
        x = jnp.einsum(equation, factor, x, precision=jax.lax.Precision.HIGHEST)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _filtered(x: jax.Array, f: _Filter) -> jax.Array:
    """x of `f` [B, H, W, C] -> y."""

    def shifted(x: jax.Array) -> jax.Array:
        x, sums = _padded(x, [[(tap, f.start + j) for j, tap in enumerate(f.taps)]], f.y_sizes, f.stride)
        for axis, size in zip((1, 2), f.y_sizes, strict=True):
            (x,) = _sums(x, sums, size, f.stride, axis)
        return materialize(x)

    return jax.lax.platform_dependent(x, tpu=functools.partial(_products, f=f), default=shifted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _spread(y: jax.Array, f: _Filter) -> jax.Array:
    """The transpose of `_filtered`: y of `f` [B, H, W, C] -> x. Each gradient of a filter is another filter."""
    if f.stride == 1:
        back = _Filter(f.taps[::-1], -f.start - len(f.taps) + 1, 1, f.y_sizes, f.x_sizes)
        return _filtered(y, back)

    def shifted(y: jax.Array) -> jax.Array:
        # Even and odd x: x[m] meets only the taps j of one parity, those with m = start + j + 2n.
        phases = [
            [(tap, (r - f.start - j) // 2) for j, tap in enumerate(f.taps) if (r - f.start - j) % 2 == 0]
            for r in (0, 1)
        ]
        height, width = (-(-size // 2) for size in f.x_sizes)
        y, phases = _padded(y, phases, (height, width), 1)
        rows = [jnp.stack(_sums(row, phases, width, 1, axis=2), axis=3) for row in _sums(y, phases, height, 1, axis=1)]
        x = jnp.stack(rows, axis=2)  # [B, H / 2, 2, W / 2, 2, C]
        x = x.reshape(x.shape[0], 2 * height, 2 * width, x.shape[-1])
        return materialize(x[:, : f.x_sizes[0], : f.x_sizes[1]])

    return jax.lax.platform_dependent(y, tpu=functools.partial(_products, f=f, transposed=True), default=shifted)


_filtered.defvjp(lambda x, f: (_filtered(x, f), None), lambda f, _, g: (_spread(g, f),))
_spread.defvjp(lambda y, f: (_spread(y, f), None), lambda f, _, g: (_filtered(g, f),))


def fir_filter(x: jax.Array, kernel: Sequence[float], pad: int, stride: int = 1) -> jax.Array:
    """[B, H, W, C] filtered in both axes with `pad` zeros in all an axis; every stride-th pixel is kept."""
    sizes = x.shape[1:3]
    results = tuple((size + pad - len(kernel)) // stride + 1 for size in sizes)
    taps = _taps(kernel)[::-1]  # a true convolution, written as a correlation
    return _filtered(x, _Filter(taps, -((pad + 1) // 2), stride, sizes, results))


def fir_downsample(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C], low-pass filtered."""
    return fir_filter(x, kernel, pad=len(kernel) - 2, stride=2)


def fir_upsample(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL, margin: int = 0) -> jax.Array:
    """[B, H, W, C] -> [B, 2H + 2 margin, 2W + 2 margin, C], the mean kept; `margin` keeps that much of the tails."""
    taps = _taps(kernel, gain=2)  # not flipped: the transpose does that
    before = (len(kernel) - 1) // 2 + 1 + margin  # zeros before the first pixel of the zero-inserted image
    sizes = x.shape[1:3]
    return _spread(x, _Filter(taps, before - len(taps) + 1, 2, tuple(2 * (n + margin) for n in sizes), sizes))


def resample(x: jax.Array, direction: str, fir_kernel: Sequence[float] | None) -> jax.Array:
    """Halve ('down') or double ('up') [B, H, W, C] by FIR, or by means and nearest neighbours without a kernel."""
    if direction == "down":
        return fir_downsample(x, fir_kernel) if fir_kernel else nn.avg_pool(x, (2, 2), (2, 2))
    return fir_upsample(x, fir_kernel) if fir_kernel else jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Resample(nn.Module):
    """Resampling as a layer of its own: fused with a 3x3 convolution to `features`, or plain where that is None."""

    direction: str  # 'down' or 'up'
    features: int | None = None
    fir_kernel: Sequence[float] | None = FIR_KERNEL
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.features is None:
            return resample(x, self.direction, self.fir_kernel)
        # The name tells weights trained with a FIR kernel from those without: they do not interchange.
        name = "fir_conv" if self.fir_kernel else "conv"
        if self.direction == "down":
            pad = (0, 0) if self.fir_kernel else (0, 1)  # without FIR at the right and the bottom only
            if self.fir_kernel:
                x = fir_filter(x, self.fir_kernel, pad=len(self.fir_kernel))
            return conv(self.features, 3, self.dtype, name, strides=2, padding=[pad, pad])(x)
        if self.fir_kernel:  # the convolution sees the filter's tails beyond the edge, not zeros
            return conv(self.features, 3, self.dtype, name, padding="VALID")(fir_upsample(x, self.fir_kernel, margin=1))
        return conv(self.features, 3, self.dtype, name)(resample(x, "up", None))


# --- Embeddings -------------------------------------------------------------------------------------------------


def sinusoidal_embedding(t: jax.Array, dim: int) -> jax.Array:
    """[B] integer steps -> [B, dim]: sines, then cosines, of t exp(-i ln(10000) / (half - 1)); a zero if dim is odd."""
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * -(np.log(10000.0) / max(half - 1, 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1), ((0, 0), (0, dim % 2)))


def pixel_norm(z: jax.Array) -> jax.Array:
    """[B, nz] latents scaled to a mean square of 1."""
    return z * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + 1e-8)


def leaky_relu(x: jax.Array) -> jax.Array:
    """Slope 0.2 below zero and *at* zero, where jax.nn.leaky_relu's gradient is 1: exact zeros are common in D."""
    return jnp.where(x > 0, x, 0.2 * x)


# --- Norms, attention, blocks -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool) -> jax.Array:
    """Group norm of [B, H, W, C] with min(C // 4, 32) groups, float32; gain and bias are [B, C], or [1, C] for all.

    With `silu` that follows. The backward pass keeps x and the statistics alone, and makes the rest again.
    Raises UserError where the groups do not divide the channels.
    """
    return _normalize(x, gain, bias, silu)[0]


@functools.partial(jax.jit, static_argnums=3)
def _normalize(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalize`, and at each channel the mean of its group and 1 / its standard deviation: [B, C]."""
    pixels, coarse = x.shape[1] * x.shape[2], x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    mean = _group_mean(jnp.sum(x, axis=(1, 2)), pixels)
    if coarse:  # both sums in one pass: what float32 loses in the difference is little beside the rounding of x
        variance = jnp.maximum(_group_mean(jnp.sum(jnp.square(x), axis=(1, 2)), pixels) - jnp.square(mean), 0)
    else:
        variance = _group_mean(jnp.sum(jnp.square(x - mean[:, None, None]), axis=(1, 2)), pixels)
    rstd = jax.lax.rsqrt(variance + 1e-6)
    y = _affine(x, *_scale_and_shift(gain, bias, mean, rstd))
    return materialize(jax.nn.silu(y) if silu else y), mean, rstd


@functools.partial(jax.jit, static_argnums=0)
def _normalize_gradients(silu: bool, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    """With y = gain n + bias, n = (x - mean) rstd: dx = rstd (gain g - E[gain g] - n E[gain g n]), E over the group."""
    x, gain, bias, mean, rstd = saved
    dtype, pixels = x.dtype, x.shape[1] * x.shape[2]
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))  # or XLA keeps what the forward pass made of it
    scale, shift = _scale_and_shift(gain, bias, mean, rstd)
    if silu:
        (g,) = jax.vjp(jax.nn.silu, _affine(x, scale, shift))[1](g)
    d_bias = jnp.sum(g, axis=(1, 2))
    d_gain = (jnp.sum(g * x, axis=(1, 2)) - mean * d_bias) * rstd
    along_one, along_n = _group_mean(gain * d_bias, pixels), _group_mean(gain * d_gain, pixels)
    of_x, of_one = materialize((-along_n * rstd**2, (along_n * mean * rstd - along_one) * rstd))
    dx = g * scale[:, None, None] + _affine(x, of_x, of_one)
    if len(gain) == 1:
        d_gain, d_bias = (jnp.sum(d, axis=0, keepdims=True) for d in (d_gain, d_bias))
    return dx.astype(dtype), d_gain, d_bias


def _normalize_forward(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool) -> tuple[jax.Array, Any]:
    y, mean, rstd = _normalize(x, gain, bias, silu)
    return y, (x, gain, bias, mean, rstd)


normalize.defvjp(_normalize_forward, _normalize_gradients)


def _group_mean(sums: jax.Array, pixels: int) -> jax.Array:
    """Sums of channels over the `pixels`, [B, C] -> the mean of a channel's group, at each channel: [B, C].

    By matrix products: on a CPU both reductions over part of the channels, the fastest axis, and repeats along it take
    several times as long.
    """
    channels = sums.shape[-1]
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise UserError(
            f"group norm splits channels into min(C // 4, 32) equal groups, which {channels} channels do not allow: "
            "choose nf and ch_mult so that every width is a multiple of 4 up to 128 and of 32 above"
        )
    spread = np.repeat(np.eye(groups, dtype=np.float32), channels // groups, axis=1)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(product(sums, spread.T * (groups / (channels * pixels))), spread)


def _scale_and_shift(gain: jax.Array, bias: jax.Array, mean: jax.Array, rstd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """gain (x - mean) rstd + bias is x times the one plus the other, [B, C]."""
    return materialize((gain * rstd, bias - mean * gain * rstd))


def _affine(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    return x * scale[:, None, None] + shift[:, None, None]


class GroupNorm(nn.Module):
    """`normalize` with a learned gain and bias."""

    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        gain, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        return normalize(x, gain[None], bias[None], self.silu)


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose gain and bias are a linear function of the mapped latent: (x [B,H,W,C], z_emb [B,E]) -> x."""

    silu: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z_emb: jax.Array) -> jax.Array:
        channels = x.shape[-1]

        def gains_one_biases_zero(key, shape, dtype=jnp.float32):
            return jnp.concatenate([jnp.ones(channels, dtype), jnp.zeros(channels, dtype)])

        style = nn.Dense(
            2 * channels, kernel_init=init_out(), bias_init=gains_one_biases_zero, dtype=self.dtype, name="style"
        )(z_emb)
        gain, bias = jnp.split(style.astype(jnp.float32), 2, axis=-1)
        return normalize(x, gain, bias, self.silu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def merge(x: jax.Array, h: jax.Array, rescale: bool) -> jax.Array:
    """x + h, divided by sqrt(2) to keep the variance where `rescale` is set."""
    return _rescaled(x + h, rescale)


def _rescaled(x: jax.Array, rescale: bool) -> jax.Array:
    """The sum, or its gradient: in memory only once it is divided."""
    return materialize(x / np.sqrt(2).astype(x.dtype) if rescale else x)


merge.defvjp(lambda x, h, rescale: (merge(x, h, rescale), None), lambda rescale, _, g: (_rescaled(g, rescale),) * 2)


class Keys(nn.Module):
    """The keys of attention, [N, C] -> [N, C]: a dense layer whose bias gets no gradient.

    The bias adds the same to all logits of a query, which softmax ignores. Its true gradient is therefore zero, and
    Adam would walk along the rounding noise of a computed one, another way on any other number of devices.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        kernel = self.param("kernel", init_avg(0.1), (h.shape[-1], h.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (h.shape[-1],))
        return h.astype(self.dtype) @ kernel.astype(self.dtype) + jax.lax.stop_gradient(bias).astype(self.dtype)


class Attention(nn.Module):
    """Single-head self-attention over the pixels of [B, H, W, C], with a residual connection."""

    skip_rescale: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        h = GroupNorm(name="norm")(x).reshape(-1, c)  # flat, as dense layers have their gradients without a transpose
        q, v = (nn.Dense(c, kernel_init=init_avg(0.1), dtype=self.dtype, name=name)(h) for name in ("q", "v"))
        k = Keys(self.dtype, name="k")(h)
        q, k, v = (a.reshape(b, height * width, c) for a in (q, k, v))
        logits = jnp.einsum("bqc,bkc->bqk", q * c**-0.5, k).astype(jnp.float32)
        # A softmax whose sums divide the results, [B, N, C], and not the weights, [B, N, N].
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        h = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v) / jnp.sum(weights, axis=-1, keepdims=True)
        h = h.astype(self.dtype).reshape(-1, c)
        h = nn.Dense(c, kernel_init=init_avg(0.0), dtype=self.dtype, name="out")(h)
        return merge(x, h.reshape(x.shape), self.skip_rescale)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Dropout of [B, H, W, C] with one key an example, so that masks do not depend on the batch; None keeps all."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class ResBlock(nn.Module):
    """A residual block of NCSN++: (x [B,H,W,C], t_emb [B,4nf] or None, z_emb [B,E], keys [B] or None) -> [B,H',W',F].

    `kind`: 'biggan' can resample inside the block; 'biggan_oneadagn' is the same with only its first norm
    adaptive; 'ddpm' never resamples, and its shortcut is a dense layer instead of a 1x1 convolution.
    """

    features: int
    kind: str = "biggan"
    direction: str | None = None  # 'down', 'up' or None
    fir_kernel: Sequence[float] | None = FIR_KERNEL
    skip_rescale: bool = True
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, t_emb: jax.Array | None, z_emb: jax.Array, t_emb_dim: int, keys: jax.Array | None = None
    ) -> jax.Array:
        in_features = x.shape[-1]
        h = AdaptiveGroupNorm(silu=True, dtype=self.dtype, name="norm_0")(x, z_emb).astype(self.dtype)
        if self.direction:
            h = resample(h, self.direction, self.fir_kernel)
        if self.direction == "down":
            x = resample(x, "down", self.fir_kernel)
        h = conv(self.features, 3, self.dtype, "conv_0")(h)
        # Without time conditioning the layer exists all the same, unused, as it does in released weights.
        time = nn.Dense(self.features, kernel_init=init_avg(), dtype=self.dtype, name="time")
        t_shift = time(jnp.zeros((1, t_emb_dim)) if t_emb is None else jax.nn.silu(t_emb))
        if t_emb is not None:
            h = h + t_shift[:, None, None, :]
        h = materialize(h)
        if self.kind == "biggan_oneadagn":
            h = GroupNorm(silu=True, name="norm_1")(h)
        else:
            h = AdaptiveGroupNorm(silu=True, dtype=self.dtype, name="norm_1")(h, z_emb)
        h = dropout(h.astype(self.dtype), self.dropout, keys)
        h = conv(self.features, 3, self.dtype, "conv_1", init_avg(0.0))(h)
        if self.kind == "ddpm":
            if in_features != self.features:
                x = nn.Dense(self.features, kernel_init=init_avg(0.1), dtype=self.dtype, name="shortcut")(x)
        elif self.direction == "up":

            def convolve_and_resample(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
                return resample(pointwise(x, kernel), "up", self.fir_kernel)  # in this order a quarter of the products

            # The bias comes last: the resampling's zeros around the image would take from it at the edges.
            x = conv(self.features, 1, self.dtype, "shortcut", conv_general_dilated=convolve_and_resample)(x)
        elif in_features != self.features or self.direction:
            x = conv(self.features, 1, self.dtype, "shortcut")(x)
        return merge(x, h, self.skip_rescale)
