"""Sampling: the golden chain, and that image i depends on (key, i) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden

from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.sampling import Denoiser, Noise, denoise, draw_noise, sample


def golden_noise(golden, prefix, z, noise, steps=4):
    return Noise(
        x_T=golden.nhwc(prefix + "x_T"),
        z=np.stack([golden[prefix + z.format(t)] for t in range(steps)]),
        posterior=np.stack([golden.nhwc(prefix + noise.format(t)) for t in range(steps)]),
    )


@pytest.mark.golden
def test_chain_equals_reference():
    golden = Golden("sampler")
    generator, params = golden.generator()
    schedule = Schedule.create(4)
    noise = golden_noise(golden, "", "z/t{}", "noise/t{}")
    run = jax.jit(lambda p, n: denoise(lambda *args: generator.apply({"params": p}, *args), schedule, n))
    trajectory = run(params, noise)
    for t in range(4):
        np.testing.assert_allclose(trajectory.x_tp1[t], golden.nhwc(f"x_before/t{t}"), atol=5e-5, err_msg=f"t={t}")
        np.testing.assert_allclose(trajectory.x0_hat[t], golden.nhwc(f"x0_pred/t{t}"), atol=5e-5, err_msg=f"t={t}")
    np.testing.assert_allclose(trajectory.x_t[0], golden.nhwc("x_final"), atol=5e-5)


def toy(x, t, z):
    """A cheap generator that uses everything it is given, row by row."""
    return jnp.tanh(x * (1 + t[:, None, None, None]) + jnp.sum(z, axis=1)[:, None, None, None])


def toy_denoiser(schedule, image_shape, nz):
    return Denoiser(lambda params, *args: toy(*args), None, schedule, image_shape, nz)


def test_a_sample_depends_on_its_index_alone():
    denoiser, key = toy_denoiser(Schedule.create(4), (4, 4, 2), 5), jax.random.key(3)
    draw = lambda indices: sample(denoiser, None, key, jnp.asarray(indices))  # noqa: E731
    whole = draw(np.arange(20))
    np.testing.assert_allclose(
        jnp.concatenate([draw(np.arange(a, min(a + 7, 20))) for a in (0, 7, 14)]), whole, atol=1e-6
    )
    np.testing.assert_allclose(draw([13, 2]), whole[jnp.array([13, 2])], atol=1e-6)
    assert len({float(x) for x in whole[:, 0, 0, 0]}) == 20
    assert not np.allclose(whole, sample(denoiser, None, jax.random.key(4), jnp.arange(20)))


def test_trajectory_ends_in_the_sample():
    schedule, key = Schedule.create(3), jax.random.key(0)
    trajectory = denoise(toy, schedule, draw_noise(key, jnp.arange(4), 3, (4, 4, 1), 2))
    assert trajectory.x_t.shape == (3, 4, 4, 4, 1)
    np.testing.assert_array_equal(
        trajectory.x_t[0], sample(toy_denoiser(schedule, (4, 4, 1), 2), None, key, jnp.arange(4))
    )
    np.testing.assert_array_equal(trajectory.x_t[0], trajectory.x0_hat[0])  # the last posterior is x0_hat itself
    np.testing.assert_array_equal(trajectory.x_t[1:], trajectory.x_tp1[:-1])
    np.testing.assert_array_equal(trajectory.x_tp1[2], draw_noise(key, jnp.arange(4), 3, (4, 4, 1), 2).x_T)


def test_one_step_is_the_generator_itself():
    """T = 1: a sample is G(x_1, 0, z), whatever the posterior's noise."""
    schedule, key = Schedule.create(1), jax.random.key(0)
    noise = draw_noise(key, jnp.arange(5), 1, (4, 4, 1), 2)
    np.testing.assert_allclose(
        sample(toy_denoiser(schedule, (4, 4, 1), 2), None, key, jnp.arange(5)),
        toy(noise.x_T, jnp.zeros(5, jnp.int32), noise.z[0]),
        atol=1e-6,
    )


def test_a_perfect_generator_samples_the_data():
    """If G returns x_0 = 0.5 always, then every x_t has the moments of q(x_t | x_0 = 0.5)."""
    schedule = Schedule.create(4)
    noise = draw_noise(jax.random.key(0), jnp.arange(50_000), 4, (1,), 1)
    trajectory = denoise(lambda x, t, z: jnp.full_like(x, 0.5), schedule, noise)
    for t in range(4):
        np.testing.assert_allclose(jnp.mean(trajectory.x_t[t]), 0.5 * schedule.a_s_cum[t], atol=0.02)
        np.testing.assert_allclose(jnp.std(trajectory.x_t[t]), schedule.sigmas_cum[t], atol=0.02)
