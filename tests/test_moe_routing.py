"""Routers and balance losses: by hand, against plain loops, by resampling."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import exact_jit

from networks import balance, routing

T, E, G = 12, 6, 3


def _compiled(function, *static):
  """Compiled, and numpy comes out: every later operation is cheap."""
  run = jax.jit(function, static_argnames=static)
  return lambda *args, **kwargs: jax.device_get(run(*args, **kwargs))


flat = _compiled(routing.noisy_top_k, 'k')
nested = _compiled(routing.hierarchical, 'k_primary', 'k_secondary')
train = _compiled(routing.balanced, 'k')
act = _compiled(routing.thresholded, 'limit')
choose = _compiled(routing.expert_choice, 'capacity_factor')
soft = _compiled(routing.soft)
biased = _compiled(routing.biased_top_k, 'k')
chance = _compiled(balance.chance, 'k')


def _dense(plan, experts):
  """Gates `[T, E]` of a plan by token."""
  is_one = plan.expert[..., None] == np.arange(experts)[None, None]
  return (is_one * plan.gate[..., None]).sum(1)


def _dense_by_expert(plan, tokens):
  is_one = plan.token[..., None] == np.arange(tokens)[None, None]
  return (is_one * plan.gate[..., None]).sum(1).T


def _draw(*shape, seed=0):
  """Logits, deviations and noise, float64."""
  rng = np.random.default_rng(seed)
  clean, noise = rng.normal(size=(2, *shape))
  return clean, rng.uniform(0.3, 1.5, shape), noise


def _float32(*arrays):
  return tuple(np.float32(x) for x in arrays)


def _softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


def _normal_cdf(x):
  return (1 + math.erf(x / math.sqrt(2))) / 2


def _loop_gate(clean, std, noise, k):
  """One token's gates and chances, equations 3 to 5, 8 and 9, as written."""
  h = clean + std * noise
  number = len(h)
  top = sorted(range(number), key=lambda i: -h[i])[:k]
  gates = np.zeros(number)
  gates[top] = _softmax(h[top])
  chance = np.ones(number)
  for i in range(number):
    if k < number:
      others = sorted((h[j] for j in range(number) if j != i), reverse=True)
      chance[i] = _normal_cdf((clean[i] - others[k - 1]) / std[i])
  return gates, chance


def _loop_cv(x):
  return np.var(x) / np.mean(x) ** 2


def _loop_z(logits):
  return np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits])


def _loop_flat(clean, std, noise, k):
  rows = [_loop_gate(*row, k) for row in zip(clean, std, noise)]
  gates, chances = (np.stack(x) for x in zip(*rows))
  return gates, chances.sum(0), _loop_z(clean)


def _loop_nested(primary, secondary, k, inner_k):
  tokens, groups, size = secondary[0].shape
  gates = np.zeros((tokens, groups, size))
  inside, number = np.zeros((groups, size)), np.zeros(groups)
  total, chosen = np.zeros(groups), []
  for x in range(tokens):
    outer, chance = _loop_gate(*(a[x] for a in primary), k)
    total += chance
    for i in np.flatnonzero(outer):
      inner, inner_chance = _loop_gate(*(a[x, i] for a in secondary), inner_k)
      gates[x, i] = outer[i] * inner
      inside[i] += inner_chance
      number[i] += 1
      chosen.append(secondary[0][x, i])
  assert number.min() > 0
  load = total[:, None] * inside / number[:, None]
  z = _loop_z(primary[0]) + _loop_z(chosen)
  return gates.reshape(tokens, -1), load.reshape(-1), z


def _differences(function, args, step=1e-6):
  """Central differences of a scalar function of float64 arrays."""
  gradients = []
  for a in args:
    gradient = np.zeros_like(a)
    for i in np.ndindex(a.shape):
      kept = a[i]
      a[i] = kept + step
      up = function(*args)
      a[i] = kept - step
      gradient[i] = (up - function(*args)) / (2 * step)
      a[i] = kept
    gradients.append(gradient)
  return gradients


def _score(gates, load, importance_loss, load_loss, z, experts):
  """A scalar in which everything differentiable has a part of its own."""
  rng = np.random.default_rng(9)
  part = (rng.normal(size=gates.shape) * gates).sum()
  part += (rng.normal(size=experts) * load).sum()
  return part + 2 * importance_loss + 3 * load_loss + 0.5 * z


def _compare(router, loop, args, experts):
  """A router's outputs and gradients against a loop's, in float64."""

  def ours(*args):
    result = router(*args)
    losses = result.losses
    gates = _dense(result.plan, experts)
    parts = (losses['importance'], losses['load'], losses['z'])
    return _score(gates, result.load, *parts, experts), (gates, result)

  def theirs(*args):
    gates, load, z = loop(*args)
    losses = _loop_cv(gates.sum(0)), _loop_cv(load)
    return _score(gates, load, *losses, z, experts)

  with jax.enable_x64(True):
    both = jax.jit(jax.value_and_grad(ours, range(len(args)), has_aux=True))
    (value, (gates, result)), gradients = both(*args)
  expected, load, z = loop(*args)
  np.testing.assert_allclose(gates, expected, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(result.importance, expected.sum(0), rtol=1e-9)
  np.testing.assert_allclose(result.load, load, rtol=1e-9)
  np.testing.assert_array_equal(result.count, (expected > 0).sum(0))
  np.testing.assert_allclose(result.losses['z'], z, rtol=1e-9)
  np.testing.assert_allclose(value, theirs(*args), rtol=1e-8)
  for got, want in zip(gradients, _differences(theirs, args)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


# By hand.


def test_top_k_by_hand_without_noise():
  clean = jnp.float32([[1, 2, 0], [0, 0.5, 3]])
  result = flat(clean, None, None, 2)
  np.testing.assert_array_equal(result.plan.expert, [[1, 0], [2, 1]])
  # 1 / (1 + exp(-1)) and 1 / (1 + exp(-2.5)).
  gates = [[0.7310586, 0.2689414], [0.9241418, 0.0758582]]
  np.testing.assert_allclose(result.plan.gate, gates, rtol=1e-6)
  importance = [0.2689414, 0.8069168, 0.9241418]
  np.testing.assert_allclose(result.importance, importance, rtol=1e-6)
  np.testing.assert_array_equal(result.count, [1, 2, 1])
  np.testing.assert_array_equal(result.load, [1, 2, 1])
  # Mean 2/3, squares 0.0723295, 0.6511147, 0.8540381: 3 * 1.5774823 / 4 - 1.
  assert result.losses['importance'] == pytest.approx(0.1831117, rel=1e-5)
  # Mean 4/3, variance 2/9.
  assert result.losses['load'] == pytest.approx(1 / 8, rel=1e-6)


def test_top_k_by_hand_with_noise():
  clean = jnp.float32([[1, 2, 0], [0, 0.5, 3]])
  std = jnp.float32([[1, 1, 1], [2, 2, 2]])
  noise = jnp.float32([[0, 0, 1.5], [0.5, 0, -0.5]])
  # Noisy logits: 1, 2, 1.5 and 1, 0.5, 2.
  result = flat(clean, std, noise, 2)
  np.testing.assert_array_equal(result.plan.expert, [[1, 2], [2, 0]])
  gates = [[0.6224593, 0.3775407], [0.7310586, 0.2689414]]
  np.testing.assert_allclose(result.plan.gate, gates, rtol=1e-6)
  # Phi(-0.5), Phi(1), Phi(-1); Phi(-0.25), Phi(-0.25), Phi(1.25).
  chances = [
    [0.3085375, 0.8413447, 0.1586553],
    [0.4012937, 0.4012937, 0.8943502],
  ]
  got = chance(clean, clean + std * noise, std, 2)
  np.testing.assert_allclose(got, chances, rtol=1e-6)
  load = [0.7098312, 1.2426384, 1.0530055]
  np.testing.assert_allclose(result.load, load, rtol=1e-6)
  np.testing.assert_array_equal(result.count, [1, 1, 2])
  # 3 * (0.5038603 + 1.5441502 + 1.1088206) / 3.0054751^2 - 1.
  assert result.losses['load'] == pytest.approx(0.0484466, rel=1e-5)
  # 3 * (0.2689414^2 + 0.6224593^2 + 1.1085993^2) / 4 - 1.
  assert result.losses['importance'] == pytest.approx(0.2665831, rel=1e-6)


def test_z_loss_by_hand():
  logits = np.full((4, 2), -np.inf, np.float32)
  logits[:2] = [[0, 0], [math.log(3), 0]]
  logits[2, 0] = 2
  value, slope = _compiled(jax.value_and_grad(balance.z_loss))(logits)
  two, four = math.log(2), math.log(4)
  assert value == pytest.approx((two**2 + four**2 + 4) / 4, rel=1e-6)
  # 2 * logsumexp * softmax / 4; the row without any logit has none.
  want = [[two / 4, two / 4], [four * 3 / 8, four / 8], [1, 0], [0, 0]]
  np.testing.assert_allclose(slope, want, rtol=1e-6)


def test_coefficient_of_variation():
  both = exact_jit(jax.value_and_grad(balance.cv_squared))
  x = np.float32([3, 1, 4, 1, 5, 9])
  value, slope = both(x)
  # Their sum is 23, that of their squares 133.
  assert value == pytest.approx(6 * 133 / 23**2 - 1, rel=1e-6)
  np.testing.assert_allclose(slope, 12 / 23**2 * (x - 133 / 23), rtol=1e-5)
  assert np.vdot(x, slope) == pytest.approx(0, abs=1e-6)
  assert both(100 * x)[0] == pytest.approx(float(value), rel=1e-6)
  assert both(7 * np.float32(np.arange(E) == 2))[0] == pytest.approx(E - 1)
  assert both(0 * x)[0] == 0
  np.testing.assert_array_equal(both(0 * x + 4)[1], np.zeros(E))
  keep = np.array([True, False, True, True, False, True])
  some = _compiled(balance.cv_squared)(x, keep)
  assert some == pytest.approx(_loop_cv(x[keep]), rel=1e-6)


# Against loops.


def test_top_k_equals_a_loop_with_its_gradients():
  router = functools.partial(routing.noisy_top_k, k=2)
  _compare(router, functools.partial(_loop_flat, k=2), _draw(5, E), E)


def test_hierarchical_equals_a_loop_with_its_gradients():
  args = _draw(6, G) + _draw(6, G, 3, seed=1)

  def router(*args):
    return routing.hierarchical(args[:3], args[3:], 2, 2)

  def loop(*args):
    return _loop_nested(args[:3], args[3:], 2, 2)

  _compare(router, loop, args, 9)


def test_biased_top_k_equals_a_loop_with_its_gradients():
  logits, bias, k = _draw(T, E)[0], np.linspace(-0.3, 0.3, E), 3

  def loop(logits):
    gates = np.zeros_like(logits)
    for row, gate in zip(logits, gates):
      score = 1 / (1 + np.exp(-row))
      top = sorted(range(E), key=lambda i: -score[i] - bias[i])[:k]
      gate[top] = score[top] / score[top].sum()
    return gates

  def ours(logits):
    gates = _dense(routing.biased_top_k(logits, jnp.asarray(bias), k).plan, E)
    return _score(gates, 0.0, 0.0, 0.0, 0.0, E), gates

  with jax.enable_x64(True):
    slope, gates = jax.jit(jax.grad(ours, has_aux=True))(logits)
  np.testing.assert_allclose(gates, loop(logits), rtol=1e-9)
  (want,) = _differences(
    lambda x: _score(loop(x), 0.0, 0.0, 0.0, 0.0, E), (logits,)
  )
  np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-8)
  # It matters who has a bias.
  best = np.argsort(-logits, axis=1)[:, :k]
  assert (np.take_along_axis(np.asarray(gates), best, 1) == 0).any()


def _loop_balanced(logits, m):
  """Probabilities, masks by column (18), and gates (16)."""
  probs = np.stack([_softmax(row) for row in logits])
  mask = np.zeros_like(probs)
  for i in range(probs.shape[1]):
    mask[sorted(range(len(probs)), key=lambda j: -probs[j, i])[:m], i] = 1
  total = (probs * mask).sum(1, keepdims=True)
  return probs, mask, probs * mask / np.where(total > 0, total, 1)


def test_balanced_equals_a_loop_with_its_gradients():
  logits, k = _draw(T, E)[0], 2
  thresholds = np.linspace(0.05, 0.4, E)
  m = math.ceil(k * T / E)

  def ours(logits, thresholds):
    result = routing.balanced(logits, thresholds, k)
    gates = _dense_by_expert(result.plan, T)
    return _score(gates, 0.0, 0.0, 0.0, result.losses['threshold'], E), result

  with jax.enable_x64(True):
    both = jax.jit(jax.grad(ours, (0, 1), has_aux=True))
    slopes, result = both(logits, thresholds)
    gates = _dense_by_expert(result.plan, T)
  probs, mask, want = _loop_balanced(logits, m)
  np.testing.assert_allclose(gates, want, rtol=1e-9)
  np.testing.assert_array_equal((np.asarray(gates) > 0).sum(0), np.full(E, m))
  np.testing.assert_array_equal(result.count, np.full(E, m))
  over = probs > thresholds
  loss = ((over * 1.0 - mask) * (probs - thresholds)).sum() / T
  assert result.losses['threshold'] == pytest.approx(loss, rel=1e-9)
  # Thresholds learn from their loss only, logits from the gates only.
  np.testing.assert_allclose(slopes[1], 0.5 * (m - over.sum(0)) / T, rtol=1e-9)
  (slope,) = _differences(
    lambda x: _score(_loop_balanced(x, m)[2], 0.0, 0.0, 0.0, 0.0, E), (logits,)
  )
  np.testing.assert_allclose(slopes[0], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('limit', [None, 2])
def test_thresholded_equals_a_loop(limit):
  logits = _draw(T, E)[0]
  thresholds = np.linspace(0.1, 0.6, E)
  want = np.zeros((T, E))
  for row, gate in zip(logits, want):
    probs = _softmax(row)
    over = [i for i in range(E) if probs[i] > thresholds[i]]
    over = sorted(over, key=lambda i: -probs[i])[:limit]
    gate[over] = probs[over] / probs[over].sum()
  assert (want.sum(1) == 0).any()
  assert ((want > 0).sum(1) > 1).any()
  result = act(*_float32(logits, thresholds), limit=limit)
  np.testing.assert_allclose(_dense(result.plan, E), want, rtol=2e-6)
  np.testing.assert_array_equal(result.plan.expert == E, result.plan.gate == 0)
  np.testing.assert_array_equal(result.count, (want > 0).sum(0))
  assert set(result.losses) == set(train(logits, thresholds, k=2).losses)


@pytest.mark.parametrize(('factor', 'capacity'), [(2, 4), (1.1, 3)])
def test_expert_choice_equals_a_loop(factor, capacity):
  logits = _draw(T, E)[0]
  plan = choose(jnp.float32(logits), capacity_factor=factor).plan
  probs = np.stack([_softmax(row) for row in logits])
  for i in range(E):
    chosen = sorted(range(T), key=lambda j: -probs[j, i])[:capacity]
    np.testing.assert_array_equal(plan.token[i], chosen)
    np.testing.assert_allclose(plan.gate[i], probs[chosen, i], rtol=2e-6)


def test_expert_choice_has_no_place_too_many():
  # In floating point 1.1 * 100 / 10 is above 11.
  plan = jax.eval_shape(
    lambda x: routing.expert_choice(x, 1.1).plan, jnp.zeros((100, 10))
  )
  assert plan.token.shape == (10, 11)


def test_soft_equals_the_formula():
  logits = _draw(T, E, 2)[0]
  result = soft(jnp.float32(logits))
  dispatch, combine = np.zeros((2, T, E, 2))
  for i in np.ndindex(E, 2):
    dispatch[:, *i] = _softmax(logits[:, *i])
  for j in range(T):
    combine[j] = _softmax(logits[j])
  np.testing.assert_allclose(result.plan.dispatch, dispatch, rtol=2e-6)
  np.testing.assert_allclose(result.plan.combine, combine, rtol=2e-6)
  np.testing.assert_allclose(result.importance, combine.sum((0, 2)), rtol=2e-6)


# Noise.


@pytest.mark.parametrize('k', [1, 2])
def test_chance_against_resampled_noise(k):
  rows, number, draws = 3, 5, 20_000
  clean, std, noise = _draw(rows, number, seed=2)
  noisy = clean + std * noise
  chances = chance(*_float32(clean, noisy, std), k)
  rng = np.random.default_rng(3)
  for x, i in np.ndindex(rows, number):
    h = np.tile(noisy[x], (draws, 1))
    h[:, i] = clean[x, i] + std[x, i] * rng.normal(size=draws)
    share = (np.argsort(-h, axis=1)[:, :k] == i).any(1).mean()
    p = chances[x, i]
    deviation = math.sqrt(max(p * (1 - p), 1e-4) / draws)
    assert abs(share - p) < 4 * deviation


def test_sum_of_load_is_k_for_each_token():
  rows, k = 3000, 2
  clean, std, noise = _float32(*_draw(rows, E))
  chances = chance(clean, clean + std * noise, std, k).sum(1)
  assert abs(chances.mean() - k) < 4 * chances.std() / math.sqrt(rows)


@pytest.mark.parametrize('deviation', [0.0, 1e-4])
def test_vanishing_noise_gives_counts(deviation):
  clean, _, noise = _float32(*_draw(T, E))
  # Neighbours are 0.01 apart at least.
  clean = np.float32(np.round(clean, 1) + 0.01 * np.arange(E))
  result = flat(clean, np.full_like(clean, deviation), noise, 2)
  np.testing.assert_array_equal(result.load, result.count)
  np.testing.assert_array_equal(flat(clean, None, None, 2).load, result.count)
