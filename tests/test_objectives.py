"""The losses of the objectives in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddgan_jax.config import presets
from ddgan_jax.method.build import build
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.objectives import Context, Pairs, PhaseDraws, ddgan, gaussian, reconstruction


def quadratic(weights):
    """D(x_t, t, x_{t+1}) = sum w x_t^2 + 3 sum x_{t+1} + t, whose gradient in x_t is 2 w x_t."""
    return lambda x_t, t, x_tp1: jnp.sum(weights * x_t**2, axis=(1, 2, 3)) + 3 * jnp.sum(x_tp1, axis=(1, 2, 3)) + t


def test_squared_error_is_a_mean_over_all_numbers():
    x0, x0_hat = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [3.0, 1.0]])
    loss, parts = gaussian.squared_error(x0, x0_hat)
    np.testing.assert_allclose(parts["g_loss"], [2, 5])
    assert loss == 3.5


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(0), 3)
    real, fake, x_tp1 = (jax.random.normal(key, (8, 4, 4, 3)) / 4 for key in keys)
    return real, fake, x_tp1, jnp.arange(8) % 4


def test_r1_of_a_quadratic(batch):
    """gamma/2 mean ||2 w x||^2, and its derivative in w: gamma mean 4 w x^2. x_{t+1} does not count."""
    real, _, x_tp1, t = batch
    w = jnp.linspace(0.5, 2, 48).reshape(4, 4, 3)
    (penalty, parts), grad = jax.value_and_grad(
        lambda w: ddgan.r1_penalty(quadratic(w), real, t, x_tp1, gamma=0.3), has_aux=True
    )(w)
    norm_sq = jnp.sum((2 * w * real) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(parts["grad_norm_sq"], norm_sq, rtol=1e-5)
    np.testing.assert_allclose(penalty, 0.15 * jnp.mean(norm_sq), rtol=1e-5)
    np.testing.assert_allclose(grad, 0.3 * jnp.mean(4 * w * real**2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(parts["logits"], quadratic(w)(real, t, x_tp1), rtol=1e-6)


def test_r1_where_d_is_flat(batch):
    """A norm would have the gradient NaN here."""
    real, _, x_tp1, t = batch
    penalty, grad = jax.value_and_grad(lambda w: ddgan.r1_penalty(quadratic(w), real, t, x_tp1, 1.0)[0])(jnp.zeros(()))
    assert penalty == 0 and grad == 0


def test_losses_are_cross_entropies(batch):
    """At the optimum of a D that knows nothing the losses are log 2 each; the gradients are those of -log sigmoid."""
    real, fake, x_tp1, t = batch
    nothing = lambda x_t, t, x_tp1: jnp.zeros(x_t.shape[0]) * jnp.sum(x_t)  # noqa: E731
    np.testing.assert_allclose(ddgan.d_loss(nothing, real, t, x_tp1, fake)[0], 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(ddgan.g_loss(nothing, fake, t, x_tp1)[0], np.log(2), rtol=1e-6)
    disc = quadratic(jnp.float32(1.0))
    loss, parts = ddgan.d_loss(disc, real, t, x_tp1, fake)
    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))  # noqa: E731
    expected = -np.mean(np.log(sigmoid(parts["d_real"]))) - np.mean(np.log(1 - sigmoid(parts["d_fake"])))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss, parts = ddgan.g_loss(disc, fake, t, x_tp1)
    np.testing.assert_allclose(loss, -np.mean(np.log(sigmoid(parts["g_fake"]))), rtol=1e-5)
    with_r1, parts = ddgan.d_loss(disc, real, t, x_tp1, fake, r1_gamma=2.0)
    np.testing.assert_allclose(with_r1 - ddgan.d_loss(disc, real, t, x_tp1, fake)[0], jnp.mean(parts["r1"]), rtol=1e-5)


def test_the_best_d_weighs_real_pairs_against_fake_ones():
    """Of examples at three places, with shares p and p_g, its logit is log(p / p_g)."""
    at = lambda *counts: jnp.repeat(jnp.arange(3), jnp.array(counts))  # noqa: E731
    real, fake, t = at(5, 2, 3), at(3, 6, 1), jnp.zeros(10, jnp.int32)
    loss = lambda logits: ddgan.d_loss(lambda x_t, t, x_tp1: logits[x_t], real, t, real, fake)[0]  # noqa: E731
    best = jnp.log(jnp.array([5 / 3, 2 / 6, 3 / 1]))
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-7)
    assert jnp.abs(jax.grad(loss)(best + 0.5)).max() > 0.01


def test_where_gradients_flow(batch):
    """D's loss sends none into the fake; G's does."""
    real, fake, x_tp1, t = batch
    disc = quadratic(jnp.float32(1.0))
    assert not jax.grad(lambda f: ddgan.d_loss(disc, real, t, x_tp1, f, 1.0)[0])(fake).any()
    assert jax.grad(lambda f: ddgan.g_loss(disc, f, t, x_tp1)[0])(fake).all()


def test_losses_stay_finite_for_confident_discriminators(batch):
    real, fake, x_tp1, t = batch
    sure = lambda x_t, t, x_tp1: 1e4 * jnp.sign(jnp.mean(x_t, axis=(1, 2, 3)))  # noqa: E731
    assert jnp.isfinite(ddgan.d_loss(sure, real, t, x_tp1, fake)[0])
    assert jnp.isfinite(ddgan.g_loss(sure, fake, t, x_tp1)[0])


def test_the_reconstruction_is_the_likelihood_of_the_noisy_image():
    """SNR ||x_0 - x0_hat||^2 / d is ||sqrt(abar) (x_0 - x0_hat)||^2 / (1 - abar) / d, and falls with the noise."""
    schedule, t = Schedule.create(4), jnp.arange(4)
    x0, x0_hat = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    loss, parts = reconstruction.weighted_error(schedule, x0, x0_hat, t)
    apart = schedule.a_s_cum[1:, None, None] * (x0 - x0_hat) / schedule.sigmas_cum[1:, None, None]
    np.testing.assert_allclose(parts["g_squared_error"], np.mean(np.square(apart), axis=(1, 2)), rtol=1e-4)
    assert loss == pytest.approx(np.mean(np.square(apart)), rel=1e-4)
    one = reconstruction.weighted_error(schedule, jnp.ones((4, 2)), jnp.zeros((4, 2)), t)[1]["g_squared_error"]
    assert (np.diff(one) < 0).all()


def test_the_weight_of_the_reconstruction_is_that_of_the_step():
    schedule = Schedule.create(2)
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    draws = PhaseDraws(jnp.zeros(4, jnp.int32), *[x[2]] * 2, jnp.zeros((4, 1)), x[2])
    c = Context(None, lambda x_t, t, x_tp1: x_t.sum(-1), schedule, x[0], draws, jnp.int32(6))
    pairs = Pairs(x[0], x[1], x[2], x[1])
    alone, error = (
        ddgan.DDGAN(0.0).g_loss(c, pairs)[0],
        reconstruction.weighted_error(schedule, x[0], x[1], draws.t)[0],
    )
    loss, _ = reconstruction.Reconstruction(ddgan.DDGAN(0.0), lambda step: step / 2).g_loss(c, pairs)
    assert float(loss - alone) == pytest.approx(3 * float(error), rel=1e-4)


def gaussians(reconstruction, end, **train):
    config = presets.get("gaussians:smoke")
    config.loss.update(reconstruction=reconstruction, reconstruction_end=end)
    config.train.update(num_steps=8, **train)
    return build(config).method


@pytest.mark.parametrize("train", [{}, {"lr_min": 5e-4}, {"lr_decay": False}, {"lr_g": 0.0}])
@pytest.mark.parametrize("end, weights", [(None, [5, 5, 5, 5]), (0.0, [5, 2.5, 0, 0]), (10.0, [5, 7.5, 10, 10])])
def test_the_reconstruction_falls_to_its_end_whatever_the_learning_rate(end, weights, train):
    """At its start, in the middle, at its end and afterwards."""
    weight = gaussians(5.0, end, **train).objective.weight
    np.testing.assert_allclose([weight(jnp.int32(step)) for step in (0, 4, 8, 9)], weights, atol=1e-6)


def test_the_reconstruction_falls_as_long_as_the_learning_rate_and_as_often():
    method = gaussians(1e-3, 1e-5, lr_g=1e-3, lr_min=1e-5, lr_decay_steps=6, steps_per_epoch=2)
    steps = [jnp.int32(step) for step in range(10)]
    np.testing.assert_array_equal([method.objective.weight(s) for s in steps], [method.lr_g(s) for s in steps])


def test_the_weight_of_stacked_mnist_is_the_one_that_was_measured():
    """It was 3 + 97 lr / lr_0 of a learning rate that fell to a tenth."""
    config = presets.get("stacked_mnist:mnist_5k")
    method, steps = build(config).method, np.linspace(0, config.train.num_steps, 11).astype(np.int32)
    measured = [3 + 97 * method.lr_g(step) / config.train.lr_g for step in steps]
    np.testing.assert_allclose([method.objective.weight(step) for step in steps], measured, rtol=1e-6)


def test_a_generator_that_does_not_learn_keeps_its_numbers():
    """With a learning rate of 0 and a reconstruction."""
    config = presets.get("gaussians:smoke")
    config.loss.reconstruction = 2.5
    config.train.lr_g = 0.0
    built = build(config)
    state, metrics = jax.jit(built.step(False, None))(built.init_state(), jnp.ones((16, 2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, state.gen_params, built.init_state().gen_params)
