"""What else a trained generator can do than sample, all from the same draws (`Noise`):

vary         many x0_hat of one x_{t+1}, by z alone: the multimodal denoising distribution (Figure 8)
edit         x_s ~ q(x_s | image), then the steps s-1..0: strokes become images (Section 5.4)
inpaint      after every step the known part of x_t is drawn from q(x_t | image) (after Lugmayr et al. 2022)
interpolate  the draws of two samples, mixed on a great circle
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddgan_jax.devices.parallel import example_keys
from ddgan_jax.method.diffusion import Schedule, q_sample, q_step, sample_posterior
from ddgan_jax.method.sampling import Gen, Noise, Posterior, denoise, draw_noise


def vary(gen: Gen, x_tp1: Float[Array, "*d"], t: int, z: Float[Array, "b nz"]) -> Float[Array, "b *d"]:
    """x0_hat of one x_{t+1} for every z: draws from p_theta(x_0 | x_{t+1}), t in 0..T-1 (Figure 8)."""
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
    """Images [B, *d] diffused to x_s, s = `start_step` in 0..T, and denoised again; s = 0 returns them as they are."""
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
    """Fill in images [B, *d] where the mask `known` is 0; where it is 1 they come back as they are.

    After each step the known part of x_t is drawn from q(x_t | image), equation (2). With `rounds` > 1 every step but
    the last is taken so many times, x_{t+1} being drawn again from x_t in between, which lets the two parts agree
    (Lugmayr et al. 2022, RePaint, Section 4.2).
    """
    shape = image.shape[1:]

    def draws(key: Array) -> tuple[Array, ...]:
        z_key, *keys = jax.random.split(key, 4)
        return jax.random.normal(z_key, (nz,)), *(jax.random.normal(k, shape) for k in keys)

    def step(x_tp1: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        k, r = inputs
        t = jnp.full(len(image), k)
        keys = example_keys(jax.random.fold_in(key, k * rounds + r), indices)
        z, posterior_noise, known_noise, noise_again = jax.vmap(draws)(keys)
        x_t = posterior(schedule, gen(x_tp1, t, z), x_tp1, t, posterior_noise)
        x_t = known * q_sample(schedule, image, t, known_noise) + (1 - known) * x_t
        return jnp.where(r == 0, x_t, q_step(schedule, x_t, t, noise_again)), None

    # Rounds are counted down to 0; the last step has one.
    order = [(k, r) for k in range(schedule.num_steps - 1, -1, -1) for r in range(rounds - 1 if k else 0, -1, -1)]
    x_T = draw_noise(key, indices, 1, shape, nz).x_T
    return jax.lax.scan(step, x_T, tuple(jnp.array(order).T))[0]


def interpolate(a: Noise, b: Noise, share: Float[Array, "b"]) -> Noise:
    """Draws between those of two samples (B = 1 each): x_T, z and posterior noise on the great circle, share in 0..1.

    On the sphere, since mixtures along a line are shorter than what the generator was trained on (Shoemake 1985).
    Directions turn along the circle, and lengths change evenly: in few dimensions those of the two ends differ.
    """

    def slerp(x: Array, y: Array, batch_axis: int) -> Array:
        axes = tuple(range(batch_axis + 1, x.ndim))
        length_x, length_y = (jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True)) for v in (x, y))
        x, y = (v / jnp.maximum(length, 1e-30) for v, length in ((x, length_x), (y, length_y)))
        cosine = jnp.sum(x * y, axis=axes, keepdims=True)
        angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
        w = share.reshape(-1, *(1,) * len(axes))
        direction = (jnp.sin((1 - w) * angle) * x + jnp.sin(w * angle) * y) / jnp.sin(angle)
        return ((1 - w) * length_x + w * length_y) * direction

    return Noise(x_T=slerp(a.x_T, b.x_T, 0), z=slerp(a.z, b.z, 1), posterior=slerp(a.posterior, b.posterior, 1))
