"""The losses in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import preset_with

from ddgan_jax.config import presets
from ddgan_jax.method.build import build, init_state
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.method.losses import (
    Losses,
    Pairs,
    Phase,
    PhaseNoise,
    adversarial_d_loss,
    adversarial_g_loss,
    r1_penalty,
    squared_error,
    weighted_error,
)
from ddgan_jax.method.train_step import make_train_step


def quadratic(weights):
    """D(x_t, t, x_{t+1}) = sum w x_t^2 + 3 sum x_{t+1} + t, whose gradient in x_t is 2 w x_t."""
    return lambda x_t, t, x_tp1: jnp.sum(weights * x_t**2, axis=(1, 2, 3)) + 3 * jnp.sum(x_tp1, axis=(1, 2, 3)) + t


def test_squared_error_is_a_mean_over_all_numbers():
    x0, x0_hat = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [3.0, 1.0]])
    loss, parts = squared_error(x0, x0_hat)
    np.testing.assert_allclose(parts["g_loss"], [2, 5])
    assert loss == 3.5


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(0), 3)
    return Pairs(*(jax.random.normal(key, (8, 4, 4, 3)) / 4 for key in keys)), jnp.arange(8) % 4


def test_r1_of_a_quadratic(batch):
    """gamma/2 mean ||2 w x||^2, and its derivative in w: gamma mean 4 w x^2. x_{t+1} does not count."""
    (real, _, x_tp1), t = batch
    w = jnp.linspace(0.5, 2, 48).reshape(4, 4, 3)
    (penalty, parts), grad = jax.value_and_grad(
        lambda w: r1_penalty(quadratic(w), real, t, x_tp1, gamma=0.3), has_aux=True
    )(w)
    norm_sq = jnp.sum((2 * w * real) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(parts["grad_norm_sq"], norm_sq, rtol=1e-5)
    np.testing.assert_allclose(penalty, 0.15 * jnp.mean(norm_sq), rtol=1e-5)
    np.testing.assert_allclose(grad, 0.3 * jnp.mean(4 * w * real**2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(parts["logits"], quadratic(w)(real, t, x_tp1), rtol=1e-6)


def test_r1_where_d_is_flat(batch):
    """A norm would have the gradient NaN here."""
    (real, _, x_tp1), t = batch
    penalty, grad = jax.value_and_grad(lambda w: r1_penalty(quadratic(w), real, t, x_tp1, 1.0)[0])(jnp.zeros(()))
    assert penalty == 0 and grad == 0


def test_losses_are_cross_entropies(batch):
    """At the optimum of a D that knows nothing the losses are log 2 each; the gradients are those of -log sigmoid."""
    pairs, t = batch
    nothing = lambda x_t, t, x_tp1: jnp.zeros(x_t.shape[0]) * jnp.sum(x_t)  # noqa: E731
    np.testing.assert_allclose(adversarial_d_loss(nothing, pairs, t)[0], 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(adversarial_g_loss(nothing, pairs, t)[0], np.log(2), rtol=1e-6)
    disc = quadratic(jnp.float32(1.0))
    loss, parts = adversarial_d_loss(disc, pairs, t)
    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))  # noqa: E731
    expected = -np.mean(np.log(sigmoid(parts["d_real"]))) - np.mean(np.log(1 - sigmoid(parts["d_fake"])))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss, parts = adversarial_g_loss(disc, pairs, t)
    np.testing.assert_allclose(loss, -np.mean(np.log(sigmoid(parts["g_fake"]))), rtol=1e-5)
    with_r1, parts = adversarial_d_loss(disc, pairs, t, r1_gamma=2.0)
    np.testing.assert_allclose(with_r1 - adversarial_d_loss(disc, pairs, t)[0], jnp.mean(parts["r1"]), rtol=1e-5)


def test_the_best_d_weighs_real_pairs_against_fake_ones():
    """Of examples at three places, with shares p and p_g, its logit is log(p / p_g)."""
    at = lambda *counts: jnp.repeat(jnp.arange(3), jnp.array(counts))  # noqa: E731
    real, fake, t = at(5, 2, 3), at(3, 6, 1), jnp.zeros(10, jnp.int32)
    pairs = Pairs(real, fake, real)
    loss = lambda logits: adversarial_d_loss(lambda x, t, _: logits[x], pairs, t)[0]  # noqa: E731
    best = jnp.log(jnp.array([5 / 3, 2 / 6, 3 / 1]))
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-7)
    assert jnp.abs(jax.grad(loss)(best + 0.5)).max() > 0.01


def test_where_gradients_flow(batch):
    """D's loss sends none into the fake; G's does."""
    pairs, t = batch
    disc = quadratic(jnp.float32(1.0))
    assert not jax.grad(lambda f: adversarial_d_loss(disc, pairs._replace(fake=f), t, 1.0)[0])(pairs.fake).any()
    assert jax.grad(lambda f: adversarial_g_loss(disc, pairs._replace(fake=f), t)[0])(pairs.fake).all()


def test_losses_stay_finite_for_confident_discriminators(batch):
    pairs, t = batch
    sure = lambda x_t, t, x_tp1: 1e4 * jnp.sign(jnp.mean(x_t, axis=(1, 2, 3)))  # noqa: E731
    assert jnp.isfinite(adversarial_d_loss(sure, pairs, t)[0])
    assert jnp.isfinite(adversarial_g_loss(sure, pairs, t)[0])


def test_the_reconstruction_is_the_likelihood_of_the_noisy_image():
    """SNR ||x_0 - x0_hat||^2 / d is ||sqrt(abar) (x_0 - x0_hat)||^2 / (1 - abar) / d, and falls with the noise."""
    schedule, t = Schedule.create(4), jnp.arange(4)
    x0, x0_hat = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    loss, parts = weighted_error(schedule, x0, x0_hat, t)
    apart = schedule.a_s_cum[1:, None, None] * (x0 - x0_hat) / schedule.sigmas_cum[1:, None, None]
    np.testing.assert_allclose(parts["g_squared_error"], np.mean(np.square(apart), axis=(1, 2)), rtol=1e-4)
    assert loss == pytest.approx(np.mean(np.square(apart)), rel=1e-4)
    one = weighted_error(schedule, jnp.ones((4, 2)), jnp.zeros((4, 2)), t)[1]["g_squared_error"]
    assert (np.diff(one) < 0).all()


def test_the_weight_of_the_reconstruction_is_that_of_the_step():
    schedule = Schedule.create(2)
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    noise = PhaseNoise(jnp.zeros(4, jnp.int32), *[x[2]] * 2, jnp.zeros((4, 1)), x[2])
    args = lambda x_t, t, x_tp1: x_t.sum(-1), Pairs(*x), x[1], Phase(x[0], noise), jnp.int32(6)
    (alone, _), (loss, _) = (
        Losses(schedule, r1_gamma=0.0, reconstruction=weight).g_loss(*args) for weight in (None, lambda step: step / 2)
    )
    error = weighted_error(schedule, x[0], x[1], noise.t)[0]
    assert float(loss - alone) == pytest.approx(3 * float(error), rel=1e-4)


def gaussians(reconstruction, end, **train):
    fields = {f"train__{name}": value for name, value in ({"num_steps": 8} | train).items()}
    return build(
        preset_with("gaussians:smoke", loss__reconstruction=reconstruction, loss__reconstruction_end=end, **fields)
    )


@pytest.mark.parametrize("train", [{}, {"lr_min": 5e-4}, {"lr_decay": False}, {"lr_g": 0.0}])
@pytest.mark.parametrize("end, weights", [(None, [5, 5, 5, 5]), (0.0, [5, 2.5, 0, 0]), (10.0, [5, 7.5, 10, 10])])
def test_the_reconstruction_falls_to_its_end_whatever_the_learning_rate(end, weights, train):
    """At its start, in the middle, at its end and afterwards."""
    weight = gaussians(5.0, end, **train).losses.reconstruction
    np.testing.assert_allclose([weight(jnp.int32(step)) for step in (0, 4, 8, 9)], weights, atol=1e-6)


def test_the_reconstruction_falls_as_long_as_the_learning_rate_and_as_often():
    method = gaussians(1e-3, 1e-5, lr_g=1e-3, lr_min=1e-5, lr_decay_steps=6, steps_per_epoch=2)
    steps = [jnp.int32(step) for step in range(10)]
    np.testing.assert_array_equal([method.losses.reconstruction(s) for s in steps], [method.lr_g(s) for s in steps])


def test_the_weight_of_stacked_mnist_is_the_one_that_was_measured():
    """It was 3 + 97 lr / lr_0 of a learning rate that fell to a tenth."""
    config = presets.get("stacked_mnist:mnist_5k")
    method, steps = build(config), np.linspace(0, config.train.num_steps, 11).astype(np.int32)
    measured = [3 + 97 * method.lr_g(step) / config.train.lr_g for step in steps]
    np.testing.assert_allclose([method.losses.reconstruction(step) for step in steps], measured, rtol=1e-6)


def test_a_generator_that_does_not_learn_keeps_its_numbers():
    """With a learning rate of 0 and a reconstruction."""
    method = build(preset_with("gaussians:smoke", loss__reconstruction=2.5, train__lr_g=0.0))
    start = jax.jit(lambda: init_state(method, 0))()
    state, metrics = jax.jit(make_train_step(method, 0, False))(start, jnp.ones((16, 2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, state.gen_params, start.gen_params)
