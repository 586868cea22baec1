"""The diffusion: its schedule, its forward process and the posterior of one step (Sections 2 and 3).

The forward process has few, large steps. With x_0 an image in [-1, 1] and alpha_k = 1 - beta_k,

    (1)  q(x_k | x_{k-1}) = N(sqrt(alpha_k) x_{k-1}, beta_k I),                        k = 1..T
    (2)  q(x_k | x_0)     = N(sqrt(abar_k) x_0, (1 - abar_k) I),       abar_k = alpha_1 ... alpha_k
    (3)  q(x_{k-1} | x_k, x_0) = N(mu_k(x_0, x_k), v_k I),   v_k = beta_k (1 - abar_{k-1}) / (1 - abar_k)
         mu_k = [beta_k sqrt(abar_{k-1}) x_0 + (1 - abar_{k-1}) sqrt(alpha_k) x_k] / (1 - abar_k)

The betas discretise a continuous process whose signal level is abar(s) = 1 - var(s), 0 <= s <= 1:

    (4)  beta_k = 1 - abar(s_k) / abar(s_{k-1}),    s_k = eps + (1 - eps) k / T,    eps = 1e-3
    (5)  'vp':        var(s) = 1 - exp(2 l(s)),   l(s) = -s^2 (beta_max - beta_min) / 4 - s beta_min / 2
         'geometric': var(s) = beta_min (beta_max / beta_min)^s

A deterministic step with the same marginals (2), an alternative to sampling from (3) (DDIM with eta = 0, Song et al.
2021):

    (6)  x_{k-1} = sqrt(abar_{k-1}) x_0 + sqrt(1 - abar_{k-1}) (x_k - sqrt(abar_k) x_0) / sqrt(1 - abar_k)

From the noise in x_k, which the generator may output instead of x_0 (an ablation of the paper, Table 2), (2) gives x_0:

    (7)  x_0 = (x_k - sqrt(1 - abar_k) noise) / sqrt(abar_k)

t is 0-based in the whole project, 0..T-1, and denotes the step between x_t and x_{t+1}: the generator's input is
(x_{t+1}, t), the discriminator's (x_t, t, x_{t+1}). t = 0 is the last denoising step, x_1 -> x_0. Only `q_sample`
accepts t = T, because x_T exists although no step begins there.

The arithmetic follows the reference implementation: (4) and abar in float64, everything else in float32. In float64
throughout, the coefficients would differ by 1e-7 with T = 4 and by up to 6e-5 with T = 1000, where beta is small.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddgan_jax.errors import UserError

EPS = 1e-3  # the time s_0 at which the discretisation starts; abar(s_0) is taken as 1


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The coefficients of (1) to (3) as float32 NumPy arrays, made by `Schedule.create`.

    The first five are indexed by k = 0..T, where k = 0 means "no noise"; the last four by t = 0..T-1.
    """

    betas: np.ndarray  # [T+1] beta_k; 1e-8 at k = 0
    a_s: np.ndarray  # [T+1] sqrt(alpha_k)
    sigmas: np.ndarray  # [T+1] sqrt(beta_k)
    a_s_cum: np.ndarray  # [T+1] sqrt(abar_k); exactly 1 at k = 0
    sigmas_cum: np.ndarray  # [T+1] sqrt(1 - abar_k); exactly 0 at k = 0
    alphas_cumprod: np.ndarray  # [T] abar_{t+1}
    posterior_mean_coef1: np.ndarray  # [T] the factor of x_0 in mu_{t+1}
    posterior_mean_coef2: np.ndarray  # [T] the factor of x_{t+1} in mu_{t+1}
    posterior_variance: np.ndarray  # [T] v_{t+1}; exactly 0 at t = 0

    @property
    def num_steps(self) -> int:
        """Number T of denoising steps."""
        return self.posterior_variance.shape[0]

    @staticmethod
    def create(num_steps: int, kind: str = "vp", beta_min: float = 0.1, beta_max: float = 20.0) -> "Schedule":
        """The process `kind` ('vp' or 'geometric'), discretised into `num_steps` >= 1 steps by (4) and (5).

        The paper uses 'vp' with 0.1 and 20 (Appendix). Raises UserError if some beta is not between 0 and 1, as in a
        geometric schedule with beta_max >= 1.
        """
        if num_steps < 1:
            raise UserError(f"a diffusion needs at least 1 step, not num_steps={num_steps}")
        s = EPS + (1 - EPS) * np.arange(num_steps + 1, dtype=np.float64) / num_steps
        with np.errstate(all="ignore"):  # invalid settings are detected below, by their betas
            if kind == "vp":
                variance = -np.expm1(2 * (-(s**2) * (beta_max - beta_min) / 4 - s * beta_min / 2))
            elif kind == "geometric":
                variance = beta_min * np.power(np.float64(beta_max) / beta_min, s)
            else:
                raise UserError(f"unknown schedule kind {kind!r}: it is 'vp' or 'geometric'")
            abar = 1 - variance
            betas = (1 - abar[1:] / abar[:-1]).astype(np.float32)
            fields = _coefficients(betas)
        if not (np.all((betas > 0) & (betas < 1)) and all(np.isfinite(field).all() for field in fields.values())):
            raise UserError(
                f"the {kind} schedule with beta_min={beta_min}, beta_max={beta_max} and {num_steps} steps is not a "
                "diffusion: every beta must be between 0 and 1 (try 0.1 and 20 for 'vp', 0.01 and 0.99 for 'geometric')"
            )
        return Schedule(**fields)


def _coefficients(betas: np.ndarray) -> dict[str, np.ndarray]:
    """All fields of a Schedule from beta_1..beta_T, float32."""
    one = np.float32(1)
    alphas = one - betas
    abar = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
    abar_prev = np.concatenate([[one], abar[:-1]]).astype(np.float32)
    # The step k = 0 adds no noise: 1 - 1e-8 rounds to 1 in float32.
    betas_0 = np.concatenate([[np.float32(1e-8)], betas]).astype(np.float32)
    a_s = np.sqrt(one - betas_0)
    a_s_cum = np.cumprod(a_s, dtype=np.float32)
    return {
        "betas": betas_0,
        "a_s": a_s,
        "sigmas": np.sqrt(betas_0),
        "a_s_cum": a_s_cum,
        "sigmas_cum": np.sqrt(one - a_s_cum**2),
        "alphas_cumprod": abar,
        "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (one - abar),
        "posterior_mean_coef2": (one - abar_prev) * np.sqrt(alphas) / (one - abar),
        "posterior_variance": betas * (one - abar_prev) / (one - abar),
    }


Posterior = Callable[[Schedule, Array, Array, Array, Array], Array]  # (schedule, x0, x_{t+1}, t, noise) -> x_t


def _at(coefficients: np.ndarray, t: Int[Array, "b"], x: Array) -> Array:
    """coefficients[t], shaped to multiply the batch x."""
    return jnp.asarray(coefficients)[t].reshape(t.shape + (1,) * (x.ndim - 1))


def q_sample(
    schedule: Schedule, x0: Float[Array, "b *d"], t: Int[Array, "b"], noise: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """x_t from x_0, equation (2), with `noise` ~ N(0, I) and t in 0..T (t = 0 returns x_0, t = T pure noise)."""
    return _at(schedule.a_s_cum, t, x0) * x0 + _at(schedule.sigmas_cum, t, x0) * noise


def q_sample_pair(
    schedule: Schedule,
    x0: Float[Array, "b *d"],
    t: Int[Array, "b"],
    noise_t: Float[Array, "b *d"],
    noise_tp1: Float[Array, "b *d"],
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """(x_t, x_{t+1}) of one forward path, equations (2) and (1), t in 0..T-1: D's real pair."""
    x_t = q_sample(schedule, x0, t, noise_t)
    return x_t, q_step(schedule, x_t, t, noise_tp1)


def q_step(
    schedule: Schedule, x_t: Float[Array, "b *d"], t: Int[Array, "b"], noise: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """x_{t+1} from x_t, equation (1), t in 0..T-1."""
    return _at(schedule.a_s, t + 1, x_t) * x_t + _at(schedule.sigmas, t + 1, x_t) * noise


def sample_posterior(
    schedule: Schedule,
    x0: Float[Array, "b *d"],
    x_tp1: Float[Array, "b *d"],
    t: Int[Array, "b"],
    noise: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x_t ~ q(x_t | x_{t+1}, x_0), equation (3), t in 0..T-1; exactly x_0 at t = 0.

    With x_0 the generator's prediction this is the paper's p_theta(x_{t-1} | x_t) (Section 3.2).
    """
    mean = _at(schedule.posterior_mean_coef1, t, x0) * x0 + _at(schedule.posterior_mean_coef2, t, x0) * x_tp1
    x_t = mean + _at(np.sqrt(schedule.posterior_variance), t, x0) * noise
    return jnp.where(t.reshape(t.shape + (1,) * (x0.ndim - 1)) == 0, x0, x_t)


def deterministic_posterior(
    schedule: Schedule,
    x0: Float[Array, "b *d"],
    x_tp1: Float[Array, "b *d"],
    t: Int[Array, "b"],
    noise: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x_t by the deterministic step (6), t in 0..T-1; exactly x_0 at t = 0. `noise` is ignored.

    An alternative to `sample_posterior` for the same generator: the noise between x_0 and x_{t+1} is kept, scaled to
    the level of x_t.
    """
    del noise
    direction = (x_tp1 - _at(schedule.a_s_cum, t + 1, x0) * x0) / _at(schedule.sigmas_cum, t + 1, x0)
    return _at(schedule.a_s_cum, t, x0) * x0 + _at(schedule.sigmas_cum, t, x0) * direction


def x0_from_noise(
    schedule: Schedule, noise: Float[Array, "b *d"], x_tp1: Float[Array, "b *d"], t: Int[Array, "b"]
) -> Float[Array, "b *d"]:
    """x_0 from the noise in x_{t+1}, equation (7), t in 0..T-1."""
    return (x_tp1 - _at(schedule.sigmas_cum, t + 1, noise) * noise) / _at(schedule.a_s_cum, t + 1, noise)


def no_posterior(
    schedule: Schedule,
    x_t: Float[Array, "b *d"],
    x_tp1: Float[Array, "b *d"],
    t: Int[Array, "b"],
    noise: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """`x_t`, in place of a posterior, for a generator that outputs it (direct denoising, an ablation of the paper)."""
    del schedule, x_tp1, t, noise
    return x_t
