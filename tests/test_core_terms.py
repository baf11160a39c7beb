"""Targets, losses, optimisers and augmentation by hand-computed numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.core import augment, losses, optim, targets

NO = [False] * 8


def n_step(r, discount, cut, v, horizon, n, gamma=0.5):
  return targets.n_step_values(
    jnp.float32(r),
    jnp.float32(discount),
    jnp.array(cut),
    jnp.float32(v),
    horizon,
    gamma=gamma,
    max_horizon=n,
  )


def test_n_step_values_bootstrap_once():
  r = [9, 1, 2, 3, 4, 5]  # r[k] is received on arriving at step k
  v = [10, 20, 30, 40, 50, 60]
  got = n_step(r, [1] * 6, NO[:6], v, 2, 2)
  # z_0 = r_1 + r_2 / 2 + v_2 / 4, and so on.
  np.testing.assert_array_equal(got, [9.5, 13.5, 17.5, 21.5])


def test_n_step_values_stop_at_termination():
  got = n_step([0, 1, 2, 4, 8, 16], [1, 1, 0, 1, 1, 1], NO[:6], [64] * 6, 3, 3)
  # Neither what follows the end nor its value is counted.
  np.testing.assert_array_equal(got[:2], [1 + 2 / 2, 2])


def test_n_step_values_bootstrap_where_truncated():
  cut = [False, False, True, False, False, False]
  v = [0, 0, 64, 1000, 1000, 1000]
  got = n_step([0, 1, 2, 4, 8, 16], [1] * 6, cut, v, 3, 3)
  np.testing.assert_array_equal(got[:2], [1 + 2 / 2 + 64 / 4, 2 + 64 / 2])


def test_n_step_values_of_a_terminal_step_that_is_cut_too():
  got = n_step([0, 1, 2], [1, 0, 1], [False, True, False], [64] * 3, 2, 2)
  np.testing.assert_array_equal(got, [1])


def test_n_step_values_take_a_traced_horizon():
  r, v = [0, 1, 2, 4, 8], [16, 32, 64, 128, 256]
  f = jax.jit(
    lambda horizon: n_step(r, [1] * 5, NO[:5], v, horizon, 3)[0],
  )
  np.testing.assert_array_equal(
    [f(1), f(2), f(3)],
    [1 + 32 / 2, 1 + 2 / 2 + 64 / 4, 1 + 2 / 2 + 4 / 4 + 128 / 8],
  )


def test_n_step_values_against_a_plain_loop():
  rng = np.random.default_rng(0)
  length, n, gamma = 12, 4, 0.9
  f = jax.jit(
    functools.partial(targets.n_step_values, gamma=gamma, max_horizon=n)
  )
  for _ in range(30):
    r, v = rng.normal(size=(2, length))
    end = rng.random(length)
    discount, cut = (end > 0.15).astype(float), end > 0.8
    horizon = int(rng.integers(1, n + 1))
    want = []
    for k in range(length - n):
      z = 0.0
      for i in range(1, n + 1):
        z += gamma ** (i - 1) * r[k + i]
        if discount[k + i] == 0:
          break
        if cut[k + i] or i == horizon:
          z += gamma**i * v[k + i]
          break
      want.append(z)
    got = f(
      jnp.float32(r), jnp.float32(discount), jnp.array(cut), jnp.float32(v),
      horizon,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def unrolled(discount, cut, valid, horizon=2):
  return targets.unroll_targets(
    jnp.float32([7, 1, 2, 4, 8, 16]),
    jnp.float32(discount),
    jnp.array(cut),
    jnp.array(valid),
    jnp.float32([64] * 6),
    horizon,
    gamma=0.5,
    unroll_steps=3,
    max_horizon=2,
  )


def test_unroll_targets_inside_an_episode():
  got = unrolled([1] * 6, NO[:6], [True] * 6)
  np.testing.assert_array_equal(got.value, [18, 20, 24, 32])
  np.testing.assert_array_equal(got.reward[1:], [1, 2, 4])
  np.testing.assert_array_equal(got.reward_mask, [0, 1, 1, 1])
  for mask in (got.value_mask, got.policy_mask, got.observation_mask):
    np.testing.assert_array_equal(mask, [1, 1, 1, 1])


def test_unroll_targets_absorb_behind_a_termination():
  valid = [True, True, True, False, False, False]
  got = unrolled([1, 1, 0, 1, 1, 1], NO[:6], valid)
  np.testing.assert_array_equal(got.value, [2, 2, 0, 0])
  np.testing.assert_array_equal(got.reward[1:], [1, 2, 0])
  np.testing.assert_array_equal(got.value_mask, [1, 1, 1, 1])
  np.testing.assert_array_equal(got.reward_mask, [0, 1, 1, 1])
  np.testing.assert_array_equal(got.policy_mask, [1, 1, 0, 0])
  np.testing.assert_array_equal(got.observation_mask, [1, 1, 1, 0])


def test_unroll_targets_know_nothing_behind_a_truncation():
  cut = [False, False, True, False, False, False]
  valid = [True, True, True, False, False, False]
  got = unrolled([1] * 6, cut, valid)
  np.testing.assert_array_equal(got.value[:2], [1 + 1 + 16, 2 + 32])
  np.testing.assert_array_equal(got.reward[1:3], [1, 2])
  np.testing.assert_array_equal(got.value_mask, [1, 1, 0, 0])
  np.testing.assert_array_equal(got.reward_mask, [0, 1, 1, 0])
  np.testing.assert_array_equal(got.policy_mask, [1, 1, 0, 0])
  np.testing.assert_array_equal(got.observation_mask, [1, 1, 1, 0])


def test_unroll_targets_ignore_the_next_episodes_end():
  # Truncated at step 1; the next episode terminates inside the window.
  cut = [False, True, False, False, False, False]
  valid = [True, True, False, False, False, False]
  got = unrolled([1, 1, 1, 0, 1, 1], cut, valid)
  np.testing.assert_array_equal(got.value_mask, [1, 0, 0, 0])
  np.testing.assert_array_equal(got.reward_mask, [0, 1, 0, 0])


def test_unroll_targets_refuse_a_short_window():
  x = jnp.zeros(5)
  with pytest.raises(ValueError, match=r'5 steps.*= 6'):
    targets.unroll_targets(
      x, x, x > 0, x > 0, x, 1, gamma=1, unroll_steps=3, max_horizon=2
    )


def test_value_prefixes_start_anew():
  reward = jnp.float32([99, 1, 2, 4, 8, 16])
  for every, want in (
    (1, [0, 1, 2, 4, 8, 16]),
    (2, [0, 1, 3, 4, 12, 16]),
    (3, [0, 1, 3, 7, 8, 24]),
    (5, [0, 1, 3, 7, 15, 31]),
    (9, [0, 1, 3, 7, 15, 31]),
  ):
    got = targets.value_prefixes(reward, every)
    np.testing.assert_array_equal(got, want)


def test_off_policy_horizon_of_the_paper():
  ages = [0, 29_999, 30_000, 59_999, 60_000, 89_999, 90_000, 100_000]
  f = functools.partial(targets.off_policy_horizon, max_horizon=5)
  got = f(jnp.float32(ages), total_decisions=100_000)
  np.testing.assert_array_equal(got, [5, 5, 4, 4, 3, 3, 2, 2])
  assert got.dtype == jnp.int32
  # Never below one step.
  assert f(jnp.float32([1e6]), total_decisions=100_000) == 1


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.float32([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 3
  labels = jnp.float32([[0, 1, 0], [0.5, 0, 0.5]])
  got = losses.cross_entropy(logits, labels)
  want = [-np.log(0.25), -(np.log(0.1) + np.log(0.8)) / 2]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  gradient = jax.grad(lambda y: losses.cross_entropy(logits, y).sum())(labels)
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_sampled_kl_by_hand():
  weights = jnp.float32(
    [[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0.75, 0.25, 0, 0]]
  )
  pi = np.float32([[0.5, 0.25, 0.25, 0.9], [0.2, 0.1, 0.1, 0.6], [2, 4, 1, 1]])
  log_probs = jnp.log(pi)
  got = losses.sampled_kl(log_probs, weights)
  want = [0, np.log(5), 0.75 * np.log(0.75 / 2) + 0.25 * np.log(0.25 / 4)]
  # The last row has densities, and so is negative.
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  gradient = jax.grad(lambda *x: losses.sampled_kl(*x).sum(), argnums=(0, 1))
  by_policy, by_weights = gradient(log_probs, weights)
  np.testing.assert_array_equal(by_policy, -weights)
  np.testing.assert_array_equal(by_weights, np.zeros((3, 4)))


def test_sampled_kl_ignores_what_spare_slots_hold():
  weights = jnp.float32([[0.5, 0.5, 0, 0]])
  log_probs = jnp.float32([[-1, -2, -np.inf, np.nan]])
  got = losses.sampled_kl(log_probs, weights)
  np.testing.assert_allclose(got, [1.5 - np.log(2)], rtol=1e-6)
  gradient = jax.grad(lambda x: losses.sampled_kl(x, weights)[0])(log_probs)
  np.testing.assert_array_equal(gradient, [[-0.5, -0.5, 0, 0]])


def test_negative_cosine_by_hand():
  p = jnp.float32([[3, 4], [1, 0], [1, 1], [0, 0]])
  z = jnp.float32([[6, 8], [0, 2], [-5, -5], [1, 0]])
  got = losses.negative_cosine(p, z)
  np.testing.assert_allclose(got, [-1, 0, 1, 0], atol=1e-6)
  gradient = lambda i: jax.grad(
    lambda *a: losses.negative_cosine(*a).sum(), argnums=i
  )(p, z)
  np.testing.assert_array_equal(gradient(1), np.zeros((4, 2)))
  # Also at zero it is finite, and nonzero where the angle can be changed.
  assert np.isfinite(gradient(0)).all()
  np.testing.assert_allclose(gradient(0)[1], [0, -1], atol=1e-6)


def test_masked_mean():
  x = jnp.float32([[1, 2], [3, 100]])
  assert losses.masked_mean(x, jnp.float32([[1, 1], [1, 0]])) == 2
  assert losses.masked_mean(x, jnp.zeros((2, 2))) == 0


def test_schedule_of_the_paper():
  f = optim.warmup_step_decay(0.2, warmup_steps=1000, decay_every=100_000)
  counts = [0, 499, 999, 1000, 100_999, 101_000, 200_999, 201_000]
  want = [0.0002, 0.1, 0.2, 0.2, 0.2, 0.02, 0.02, 0.002]
  np.testing.assert_allclose([f(c) for c in counts], want, rtol=1e-5)


def test_schedule_without_warmup_or_decay():
  f = optim.warmup_step_decay(0.3, warmup_steps=0)
  np.testing.assert_allclose([f(0), f(10**6)], [0.3, 0.3], rtol=1e-6)


def test_schedule_takes_traced_floats():
  def rate(peak, decay):
    f = optim.warmup_step_decay(
      peak, warmup_steps=2, decay_every=4, decay_rate=decay
    )
    return jnp.stack([f(0), f(1), f(6), f(10)])

  got = jax.jit(jax.vmap(rate))(jnp.float32([1, 2]), jnp.float32([0.5, 0.1]))
  want = [[0.5, 1, 0.5, 0.25], [1, 2, 0.2, 0.02]]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sgd_is_clip_then_decay_then_momentum():
  rng = np.random.default_rng(1)
  params = {'a': rng.normal(size=(3, 2)), 'b': rng.normal(size=4)}
  gradients = [
    {k: scale * rng.normal(size=v.shape) for k, v in params.items()}
    for scale in (0.1, 10, 1, 0.01)
  ]
  rate, momentum, decay, bound = 0.1, 0.9, 0.05, 1.5
  optimiser = optim.sgd(
    lambda _: rate, momentum=momentum, weight_decay=decay, max_norm=bound
  )
  as_jax = lambda tree: jax.tree.map(jnp.float32, tree)
  ours, state = as_jax(params), optimiser.init(as_jax(params))
  buffers = {k: np.zeros_like(v) for k, v in params.items()}
  clipped = []
  for g in gradients:
    updates, state = optimiser.update(as_jax(g), state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    # torch: clip_grad_norm_, then g + decay p, then the buffer, then the step.
    norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
    clipped.append(norm > bound)
    for k in params:
      step = g[k] * min(1, bound / norm) + decay * params[k]
      buffers[k] = momentum * buffers[k] + step
      params[k] = params[k] - rate * buffers[k]
  assert set(clipped) == {True, False}
  for k in params:
    np.testing.assert_allclose(ours[k], params[k], rtol=1e-5, atol=1e-6)


def test_adamw_first_step_and_decoupled_decay():
  optimiser = optim.adamw(lambda _: 0.1, weight_decay=0.5, max_norm=1e9)
  params = jnp.float32([2.0, -4.0])
  updates, _ = optimiser.update(
    jnp.float32([3.0, -0.01]), optimiser.init(params), params
  )
  # Adam's first step is the gradient's sign.
  np.testing.assert_allclose(updates, [-0.1 - 0.1, 0.1 + 0.2], rtol=1e-4)


def test_adamw_clips_what_it_averages():
  optimiser = optim.adamw(lambda _: 0.1, weight_decay=0.0, max_norm=1.0)
  params = jnp.zeros(2)
  state = optimiser.init(params)
  for gradient in ([3.0, 4.0], [0.6, 0.8]):
    updates, state = optimiser.update(jnp.float32(gradient), state, params)
    # Both are (0.6, 0.8) once clipped, so that both steps are the same.
    np.testing.assert_allclose(updates, [-0.1, -0.1], rtol=1e-4)


def test_minimise_takes_one_step_and_reduces_the_gradient():
  optimiser = optim.sgd(lambda _: 0.5, momentum=0, weight_decay=0, max_norm=1e9)
  loss = lambda p, x: (jnp.sum(p * p) * x, {'p': p})
  double = lambda tree: jax.tree.map(lambda g: 2 * g, tree)
  params = jnp.float32([3.0, 4.0])
  for reduce, factor in ((None, 1), (double, 2)):
    step = optim.minimise(loss, optimiser, *([reduce] if reduce else []))
    new, _, aux, norm = step(params, optimiser.init(params), 0.5)
    assert norm == 5 * factor
    np.testing.assert_array_equal(new, params - 0.5 * factor * params)
    np.testing.assert_array_equal(aux['p'], params)


def test_scale_gradient_keeps_the_value():
  f = lambda x: jnp.sum(optim.scale_gradient({'x': x}, 0.25)['x'] ** 2)
  value, gradient = jax.value_and_grad(f)(jnp.float32([1.0, -3.0]))
  assert value == 10
  np.testing.assert_array_equal(gradient, [0.5, -1.5])


def test_periodic_copies_at_multiples():
  new, old = {'a': jnp.ones(2)}, {'a': jnp.zeros(2)}
  got = [optim.periodic(new, old, jnp.int32(s), 3)['a'][0] for s in range(1, 7)]
  assert got == [0, 0, 1, 0, 0, 1]


def test_random_shift_is_a_crop_of_the_padded_image(key):
  num, pad = 64, 2
  images = np.random.default_rng(0).integers(0, 256, (num, 5, 6, 3))
  images = images.astype(np.uint8)
  got = jax.jit(augment.random_shift, static_argnums=2)(key, images, pad)
  assert got.dtype == jnp.uint8
  padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode='edge')
  seen = set()
  for image, around in zip(np.asarray(got), padded):
    places = [
      (i, j)
      for i in range(2 * pad + 1)
      for j in range(2 * pad + 1)
      if (around[i : i + 5, j : j + 6] == image).all()
    ]
    assert len(places) == 1
    seen |= set(places)
  # Both axes move, up to the padding on either side.
  assert {i for i, _ in seen} == {j for _, j in seen} == set(range(5))


def test_random_intensity_scales_whole_images(key):
  images = jnp.asarray(
    np.random.default_rng(0).uniform(0.5, 1, (2000, 2, 2, 1)), jnp.float32
  )
  got = augment.random_intensity(key, images)
  factor = np.asarray(got / images)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    factor, np.broadcast_to(factor[:, :1, :1], factor.shape), rtol=1e-6
  )
  each = factor[:, 0, 0, 0]
  assert 0.9 - 1e-6 <= each.min() < 0.91
  assert 1.09 < each.max() <= 1.1 + 1e-6
  # A clipped normal: 4.6% lie at the bounds, the deviation is 0.95 * 0.05.
  assert 0.03 < np.mean(np.abs(each - 1) > 0.0999) < 0.06
  assert 0.045 < each.std() < 0.05


def test_observations_change_large_images_alone(key):
  rng = np.random.default_rng(0)
  small = jnp.asarray(rng.integers(0, 256, (2, 3, 10, 5, 1)), jnp.uint8)
  vectors = jnp.asarray(rng.normal(size=(2, 3, 40)), jnp.float32)
  for same in (small, vectors):
    got = augment.observations(key, same)
    assert got.dtype == same.dtype
    np.testing.assert_array_equal(got, same)

  # Every image of every window has its own shift and its own factor.
  images = np.full((2, 3, 32, 32, 1), 51, np.uint8)
  images[:, :, 16, 16] = 204
  got = np.asarray(jax.jit(augment.observations)(key, jnp.asarray(images)))
  assert got.shape == images.shape and got.dtype == np.float32
  places, factors = set(), set()
  for image in got.reshape(6, 32, 32):
    y, x = np.unravel_index(image.argmax(), image.shape)
    factor = image[y, x] / 0.8
    assert abs(y - 16) <= 4 and abs(x - 16) <= 4 and 0.9 <= factor <= 1.1
    want = np.full((32, 32), 0.2 * factor)
    want[y, x] = 0.8 * factor
    np.testing.assert_allclose(image, want, rtol=1e-5)
    places.add((y, x))
    factors.add(round(float(factor), 5))
  assert len(places) > 3 and len(factors) > 3
  # Floats are taken as they are.
  floats = np.asarray(augment.observations(key, jnp.float32(images)))
  np.testing.assert_allclose(floats, got * 255, rtol=1e-5)


def test_lowest_takes_the_smallest_and_shares_its_gradient_at_ties():
  q = jnp.asarray([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
  np.testing.assert_array_equal(losses.lowest(q), [1.0, 1.0, 3.0])
  gradient = jax.grad(lambda x: jnp.sum(losses.lowest(x)))(q)
  np.testing.assert_array_equal(gradient, [[1, 0, 0.5], [0, 1, 0.5]])
