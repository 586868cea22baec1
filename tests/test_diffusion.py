"""Schedules, forward process and posterior: against the golden numbers, and against Bayes' rule."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden

from ddgan_jax.errors import UserError
from ddgan_jax.method.diffusion import Schedule, q_sample, q_sample_pair, sample_posterior

SETS = {"vp": ("vp", 0.1, 20.0), "geo": ("geometric", 0.01, 0.99), "geo_wide": ("geometric", 1e-4, 0.999)}


@pytest.mark.golden
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SETS)
def test_schedule_equals_reference(name, steps):
    golden = Golden("schedules")
    settings = json.loads(str(golden["settings"]))[name]
    kind, beta_min, beta_max = SETS[name]
    assert (settings["use_geometric"], settings["beta_min"], settings["beta_max"]) == (kind != "vp", beta_min, beta_max)
    s = Schedule.create(steps, kind, beta_min, beta_max)
    assert s.num_steps == steps
    # The reference keeps more coefficients than the method needs; they all follow from those kept here.
    abar = s.alphas_cumprod
    ours = {
        "diffusion/a_s": s.a_s,
        "diffusion/sigmas": s.sigmas,
        "diffusion/betas": s.betas,
        "diffusion/a_s_cum": s.a_s_cum,
        "diffusion/sigmas_cum": s.sigmas_cum,
        "diffusion/a_s_prev": np.append(s.a_s[:-1], 1),
        "posterior/betas": s.betas[1:],
        "posterior/alphas": 1 - s.betas[1:],
        "posterior/alphas_cumprod": abar,
        "posterior/alphas_cumprod_prev": np.append(1, abar[:-1]),
        "posterior/posterior_variance": s.posterior_variance,
        "posterior/sqrt_alphas_cumprod": np.sqrt(abar),
        "posterior/sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "posterior/sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior/posterior_mean_coef1": s.posterior_mean_coef1,
        "posterior/posterior_mean_coef2": s.posterior_mean_coef2,
        "posterior/posterior_log_variance_clipped": np.log(np.maximum(s.posterior_variance, 1e-20)),
        "time_schedule": 1e-3 + (1 - 1e-3) * np.arange(steps + 1) / steps,
    }
    expected = golden.below(f"{name}_T{steps}/")
    assert set(ours) == set(expected)
    for key, value in expected.items():
        # One-ulp differences are amplified by a square root near 0, and by 1/abar where abar is small.
        tolerance = 1e-5 if "sigmas_cum" in key else 1e-6
        np.testing.assert_allclose(ours[key], value, rtol=tolerance, atol=tolerance, err_msg=key)
    assert s.a_s_cum[0] == 1 and s.sigmas_cum[0] == 0 and s.posterior_variance[0] == 0


@pytest.mark.golden
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["vp", "geo"])
def test_draws_equal_reference(name, steps):
    golden, prefix = Golden("posterior"), f"{name}_T{steps}/"
    s = Schedule.create(steps, *SETS[name])
    x0, t = golden[prefix + "x0"], golden.ints(prefix + "t")
    q = {k: v for k, v in golden.below(prefix + "q_sample/").items()}
    np.testing.assert_allclose(q_sample(s, x0, jnp.int32(q["t"]), q["noise"]), q["x_t"], atol=1e-6)
    pair = golden.below(prefix + "pairs/")
    x_t, x_tp1 = q_sample_pair(s, x0, t, pair["noise_t"], pair["noise_tp1"])
    np.testing.assert_allclose(x_t, pair["x_t"], atol=1e-6)
    np.testing.assert_allclose(x_tp1, pair["x_tp1"], atol=1e-6)
    posterior = golden.below(prefix + "posterior/")
    out = np.asarray(sample_posterior(s, posterior["x_0"], posterior["x_t"], t, posterior["noise"]))
    np.testing.assert_allclose(out[t > 0], posterior["out"][t > 0], atol=1e-6)
    # At t = 0 the reference multiplies x_0 by a coefficient that rounding leaves up to 1.5e-6 short of 1.
    np.testing.assert_array_equal(out[t == 0], posterior["x_0"][t == 0])
    np.testing.assert_allclose(s.posterior_mean_coef1[0] * out[t == 0], posterior["out"][t == 0], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 1000])
@pytest.mark.parametrize("name", SETS)
def test_posterior_is_bayes_rule(name, steps):
    """q(x_t | x_{t+1}, x_0) is the product of q(x_t | x_0) and q(x_{t+1} | x_t), both Gaussian in x_t (float64)."""
    s = Schedule.create(steps, *SETS[name])
    for t in range(1, steps, max(steps // 8, 1)):
        beta, abar_t = float(s.betas[t + 1]), np.prod(1 - s.betas[1 : t + 1], dtype=np.float64)
        precision = 1 / (1 - abar_t) + (1 - beta) / beta
        # float32 knows 1 - abar only to half a unit in the last place of 1.
        rtol = 1e-5 + 2**-23 / (1 - abar_t)
        np.testing.assert_allclose(s.posterior_variance[t], 1 / precision, rtol=rtol)
        np.testing.assert_allclose(s.posterior_mean_coef1[t], abar_t**0.5 / (1 - abar_t) / precision, rtol=rtol)
        np.testing.assert_allclose(s.posterior_mean_coef2[t], (1 - beta) ** 0.5 / beta / precision, rtol=rtol)


def test_index_of_t():
    """t = 0 is the last step of denoising, x_1 -> x_0, and gives x_0 exactly; T is the first, from pure noise."""
    s = Schedule.create(4)
    x = jax.random.normal(jax.random.key(0), (3, 4, 8))
    zero = jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(sample_posterior(s, x[0], x[1], zero, x[2]), x[0])
    np.testing.assert_array_equal(q_sample(s, x[0], zero, x[1]), x[0])
    assert float(s.a_s_cum[4]) < 0.01 and float(s.sigmas_cum[4]) > 0.9999
    x_t, x_tp1 = q_sample_pair(s, x[0], zero, x[1], x[2])
    np.testing.assert_array_equal(x_t, x[0])
    np.testing.assert_allclose(x_tp1, s.a_s[1] * x[0] + s.sigmas[1] * x[2], rtol=1e-6)


def test_one_step():
    """T = 1: the posterior is x_0 whatever the noise, so a sample is G(x_1, 0, z); x_1 is (nearly) noise alone."""
    s = Schedule.create(1)
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    np.testing.assert_array_equal(sample_posterior(s, x[0], x[1], jnp.zeros(5, jnp.int32), x[2]), x[0])
    assert s.posterior_variance.shape == (1,) and s.a_s[1] < 0.01


@pytest.mark.parametrize("name", SETS)
def test_moments_of_pairs(name):
    """x_{t+1} of a pair has the moments of q(x_{t+1} | x_0), and the two correlate as one path must."""
    s, n = Schedule.create(4, *SETS[name]), 200_000
    noise = jax.random.normal(jax.random.key(1), (2, n))
    for t in range(4):
        x_t, x_tp1 = q_sample_pair(s, jnp.full(n, 0.7), jnp.full(n, t), noise[0], noise[1])
        np.testing.assert_allclose(jnp.mean(x_tp1), s.a_s_cum[t + 1] * 0.7, atol=0.01)
        np.testing.assert_allclose(jnp.std(x_tp1), s.sigmas_cum[t + 1], atol=0.01)
        covariance = jnp.mean((x_t - x_t.mean()) * (x_tp1 - x_tp1.mean()))
        np.testing.assert_allclose(covariance, s.a_s[t + 1] * s.sigmas_cum[t] ** 2, atol=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        (0,),
        (-3,),
        (4, "geometric"),  # 0.1 and 20 give negative alphas
        (4, "geometric", 0.01, 1.0),
        (4, "geometric", 0.0, 0.9),
        (4, "geometric", 0.9, 0.01),
        (4, "vp", 0.1, -20.0),
        (4, "vp", 0.0, 0.0),
        (4, "vp", float("nan"), 20.0),
        (4, "vp", 0.1, 1e9),
        (10**7, "vp"),  # betas that vanish in float32
        (4, "cosine"),
    ],
)
def test_refused_settings(arguments):
    with pytest.raises(UserError, match=r"steps|kind|diffusion"):
        Schedule.create(*arguments)
