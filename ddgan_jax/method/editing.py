"""Uses of a trained generator beside sampling:

vary         many x0_hat for one x_{t+1}, which differ in z alone: the multimodal denoising distribution (Figure 8)
edit         x_s ~ q(x_s | image), then the steps s-1..0: strokes become images (Section 5.4)
inpaint      sampling in which the known part of every x_t is drawn from q(x_t | image) (after Lugmayr et al. 2022)
interpolate  the noise of two samples, mixed on a great circle
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddgan_jax.devices.parallel import example_keys
from ddgan_jax.method.diffusion import Schedule, q_sample, q_step, sample_posterior
from ddgan_jax.method.sampling import Gen, Noise, Posterior, denoise, draw_noise


def vary(gen: Gen, x_tp1: Float[Array, "*d"], t: int, z: Float[Array, "b nz"]) -> Float[Array, "b *d"]:
    """x0_hat for one x_{t+1} and every z: samples of p_theta(x_0 | x_{t+1}), t in 0..T-1 (Figure 8).

    Of a generator that outputs x_t, samples of p_theta(x_t | x_{t+1}).
    """
    many = jnp.broadcast_to(x_tp1, (len(z), *x_tp1.shape))
    return gen(many, jnp.full(len(z), t), z)


def edit(
    gen: Gen,
    schedule: Schedule,
    image: Float[Array, "b *d"],
    start_step: int,
    noise: Noise,
    posterior: Posterior = sample_posterior,
) -> Float[Array, "b *d"]:
    """Images [B, *d] diffused to x_s, s = `start_step` in 0..T, and denoised again; s = 0 returns them unchanged."""
    if start_step == 0:
        return image
    x_s = q_sample(schedule, image, jnp.full(len(image), start_step), noise.x_T)
    part = Noise(x_T=x_s, z=noise.z[:start_step], posterior=noise.posterior[:start_step])
    return denoise(gen, schedule, part, posterior).x_t[0]


def inpaint(
    gen: Gen,
    schedule: Schedule,
    image: Float[Array, "b *d"],
    known: Float[Array, "b *d"],
    key: Array,
    indices: Int[Array, "b"],
    nz: int,
    rounds: int = 1,
    posterior: Posterior = sample_posterior,
) -> Float[Array, "b *d"]:
    """Fills in images [B, *d] where the mask `known` is 0; where it is 1 they are unchanged.

    After each step, the known part of x_t is drawn from q(x_t | image), equation (2). Every step except the last is
    repeated `rounds` times, with a new x_{t+1} drawn from x_t in between, which makes the two parts consistent
    (RePaint, Lugmayr et al. 2022, Section 4.2).
    """
    shape = image.shape[1:]

    def draw(key: Array) -> tuple[Array, ...]:
        z_key, *keys = jax.random.split(key, 4)
        return jax.random.normal(z_key, (nz,)), *(jax.random.normal(k, shape) for k in keys)

    def step(x_tp1: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        k, r = inputs
        t = jnp.full(len(image), k)
        keys = example_keys(jax.random.fold_in(key, k * rounds + r), indices)
        z, posterior_noise, known_noise, noise_again = jax.vmap(draw)(keys)
        x_t = posterior(schedule, gen(x_tp1, t, z), x_tp1, t, posterior_noise)
        x_t = known * q_sample(schedule, image, t, known_noise) + (1 - known) * x_t
        return jnp.where(r == 0, x_t, q_step(schedule, x_t, t, noise_again)), None

    # The rounds of a step count down to 0. The last step, k = 0, has a single round.
    order = [(k, r) for k in range(schedule.num_steps - 1, -1, -1) for r in range(rounds - 1 if k else 0, -1, -1)]
    x_T = draw_noise(key, indices, 1, shape, nz).x_T
    return jax.lax.scan(step, x_T, tuple(jnp.array(order).T))[0]


def interpolate(a: Noise, b: Noise, fraction: Float[Array, "b"]) -> Noise:
    """Noise between that of samples a and b (B = 1 each), at `fraction` in 0..1 of the way on a great circle.

    x_T, z and the posterior noise are interpolated spherically (Shoemake 1985), since their mixtures along a line would
    be shorter than the noise that the generator was trained on. Lengths are interpolated linearly, because those of the
    two ends differ in few dimensions.
    """

    def slerp(x: Array, y: Array, batch_axis: int) -> Array:
        axes = tuple(range(batch_axis + 1, x.ndim))
        length_x, length_y = (jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True)) for v in (x, y))
        x, y = (v / jnp.maximum(length, 1e-30) for v, length in ((x, length_x), (y, length_y)))
        cosine = jnp.sum(x * y, axis=axes, keepdims=True)
        angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
        w = fraction.reshape(-1, *(1,) * len(axes))
        direction = (jnp.sin((1 - w) * angle) * x + jnp.sin(w * angle) * y) / jnp.sin(angle)
        return ((1 - w) * length_x + w * length_y) * direction

    return Noise(x_T=slerp(a.x_T, b.x_T, 0), z=slerp(a.z, b.z, 1), posterior=slerp(a.posterior, b.posterior, 1))
