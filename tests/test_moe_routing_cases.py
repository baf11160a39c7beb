"""Routers where they are not smooth, special cases, pruning, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_moe_routing import (
  E,
  G,
  T,
  _compiled,
  _dense,
  _dense_by_expert,
  _draw,
  _float32,
  _softmax,
  act,
  biased,
  choose,
  flat,
  nested,
  train,
)
from trees import assert_equal

from networks import balance, routing

# What is not smooth: no noise, ties, zeros, empty groups.


def _slope_sum(result):
  plan = result.plan
  weights = jnp.arange(1.0, 1 + plan.gate.shape[1])[None]
  return (weights * plan.gate).sum() + sum(result.losses.values())


def _slopes(clean, std, noise, keep):
  """Gradients of two levels with noise, and of one without."""

  def noisy(clean, std):
    first = tuple(x[:, :G] for x in (clean, std, noise))
    second = tuple(x.reshape(-1, G, E // G) for x in (clean, std, noise))
    return _slope_sum(routing.hierarchical(first, second, 2, 1, keep))

  def silent(clean):
    return _slope_sum(routing.noisy_top_k(clean, None, None, 2, keep))

  return jax.grad(noisy, (0, 1))(clean, std), jax.grad(silent)(clean)


def test_gradients_are_finite():
  slopes = _compiled(_slopes)
  clean, std, noise = _float32(*_draw(T, E))
  zero, everyone = np.zeros((T, E), np.float32), np.ones(E, bool)
  cases = {
    'drawn': (clean, std, noise, everyone),
    'zeros': (zero, zero, zero, everyone),
    'zero logits': (zero, std, noise, everyone),
    'ties': (np.round(clean), std, zero, everyone),
    'hardly noise': (clean, np.float32(1e-30) * std, noise, everyone),
    'far apart': (1e4 * clean, 1e-5 * std, noise, everyone),
    'no more than k': (clean, std, noise, np.arange(E) < 2),
    'fewer than k': (clean, std, noise, np.arange(E) < 1),
    'no one': (clean, std, noise, np.zeros(E, bool)),
  }
  for name, args in cases.items():
    for leaf in jax.tree.leaves(slopes(*args)):
      assert np.isfinite(leaf).all(), name


def test_zero_logits_share_evenly():
  zero = np.zeros((T, E), np.float32)
  result = flat(zero, None, None, 2)
  np.testing.assert_allclose(result.plan.gate, 1 / 2)
  np.testing.assert_array_equal(result.count, T * (np.arange(E) < 2))


def test_an_empty_group_keeps_its_load_and_gradient():
  clean, std, noise = _float32(*_draw(T, G))
  clean[:, 2] = -3
  inner = _float32(*_draw(T, G, 2))

  def load(clean):
    result = routing.hierarchical((clean, std, 0 * noise), inner, 1, 1)
    return result.load.reshape(G, 2)[2].sum(), result

  run = _compiled(jax.value_and_grad(load, has_aux=True))
  (total, result), slope = run(clean)
  assert result.count.reshape(G, 2)[2].sum() == 0
  alone = flat(clean, std, 0 * noise, 1)
  assert total == pytest.approx(float(alone.load[2]), rel=1e-5)
  assert (slope[:, 2] > 0).all()


# One router is another's special case.


def test_hierarchical_with_one_group_or_groups_of_one_is_flat():
  clean, std, noise = _float32(*_draw(T, E))
  # One expert that nobody chooses: its load is equal too.
  clean[:, 1] -= 9
  scores = (clean, std, noise)
  want = flat(*scores, 2)
  assert want.count[1] == 0
  one = np.ones((T, 1), np.float32)
  grouped = jax.tree.map(lambda x: x[:, None], scores)
  single = nested((one, one, one), grouped, 1, 2)
  alone = jax.tree.map(lambda x: x[..., None], scores)
  ones = nested(scores, alone, 2, 1)
  for result in (single, ones):
    np.testing.assert_array_equal(result.plan.expert, want.plan.expert)
    np.testing.assert_array_equal(result.count, want.count)
    for name in ('importance', 'load'):
      got = getattr(result, name), result.losses[name]
      expected = getattr(want, name), want.losses[name]
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected
      )
    np.testing.assert_allclose(result.plan.gate, want.plan.gate, rtol=1e-6)


def test_experts_of_one_group_are_adjacent():
  first, second = _draw(T, G), _draw(T, G, 4, seed=1)
  plan = nested(_float32(*first), _float32(*second), 2, 3).plan
  group = plan.expert.reshape(T, 2, 3) // 4
  np.testing.assert_array_equal(group, np.repeat(group[..., :1], 3, -1))
  assert (group[:, 0] != group[:, 1]).all()


def test_all_experts_are_the_dense_mixture():
  clean, std, noise = _float32(*_draw(T, E))
  result = flat(clean, std, noise, E)
  dense = [_softmax(row) for row in clean + std * noise]
  np.testing.assert_allclose(_dense(result.plan, E), dense, rtol=1e-6)
  np.testing.assert_array_equal(result.load, np.full(E, T))
  plan = act(clean, np.zeros(E, np.float32)).plan
  dense = [_softmax(row) for row in clean]
  np.testing.assert_allclose(_dense(plan, E), dense, rtol=1e-6)


def test_permuted_experts_permute_everything():
  clean, std, noise = _float32(*_draw(T, E))
  order = np.random.default_rng(0).permutation(E)
  thresholds, bias = _float32(
    np.linspace(0.1, 0.4, E), np.linspace(-0.2, 0.2, E)
  )
  mixed = [x[..., order] for x in (clean, std, noise, thresholds, bias)]

  def routers(clean, std, noise, thresholds, bias):
    return (
      flat(clean, std, noise, 2),
      act(clean, thresholds, limit=None),
      biased(clean, bias, 3),
      train(clean, thresholds, k=2),
      choose(clean, capacity_factor=2),
    )

  def gates(plan):
    if isinstance(plan, routing.ByToken):
      return _dense(plan, E)
    return _dense_by_expert(plan, T)

  before = routers(clean, std, noise, thresholds, bias)
  for a, b in zip(before, routers(*mixed)):
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)
    close(gates(a.plan)[:, order], gates(b.plan))
    for name in ('importance', 'load', 'count'):
      close(getattr(a, name)[order], getattr(b, name))
    jax.tree.map(close, a.losses, b.losses)


def test_a_batch_of_one_equals_the_row():
  clean, std, noise = _float32(*_draw(T, E))
  groups = _float32(*_draw(T, G)), _float32(*_draw(T, G, 4, seed=1))
  thresholds, bias = _float32(np.full(E, 0.3), np.linspace(-0.2, 0.2, E))

  def plans(rows):
    a = clean[rows], std[rows], noise[rows]
    return (
      flat(*a, 2).plan,
      nested(*jax.tree.map(lambda x: x[rows], groups), 2, 3).plan,
      act(a[0], thresholds, limit=None).plan,
      biased(a[0], bias, 3).plan,
    )

  row = jax.tree.map(lambda x: x[5:6], plans(slice(None)))
  assert_equal(plans(slice(5, 6)), row)


# What is learned without a loss on gates.


def test_learned_thresholds_choose_as_many_as_experts_do():
  rows, k = 600, 2
  m = k * rows / E
  offset = np.linspace(-1, 1, E)
  batch, fresh = _float32(
    _draw(rows, E)[0] + offset, _draw(rows, E, seed=1)[0] + offset
  )

  def loss(thresholds):
    return routing.balanced(batch, thresholds, k).losses['threshold']

  def step(thresholds, rate):
    value, slope = jax.value_and_grad(loss)(thresholds)
    return thresholds - rate * slope, value

  rates = np.geomspace(0.3, 1e-4, 300, dtype=np.float32)
  learn = _compiled(lambda start: jax.lax.scan(step, start, rates))
  thresholds, losses = learn(np.zeros(E, np.float32))
  assert losses[-1] < 1e-4 * losses[0]
  seen = act(batch, thresholds, limit=None).count
  np.testing.assert_allclose(seen, m, atol=2)
  # Two samples of the same binomial differ by sqrt(2) deviations.
  deviation = math.sqrt(2 * rows * k / E * (1 - k / E))
  unseen = act(fresh, thresholds, limit=None).count
  np.testing.assert_allclose(unseen, m, atol=4 * deviation)


def test_bias_balances_without_a_loss():
  rows, k = 256, 2
  logits = jnp.float32(_draw(rows, E)[0] + np.linspace(-2, 2, E))

  def step(bias, rate):
    count = routing.biased_top_k(logits, bias, k).count
    return balance.update_bias(bias, count, rate), count

  rates = np.geomspace(0.05, 1e-4, 200, dtype=np.float32)
  learn = _compiled(lambda start: jax.lax.scan(step, start, rates))
  _, counts = learn(np.zeros(E, np.float32))
  mean = rows * k / E
  assert counts[0].max() > 1.8 * mean
  assert counts[0].min() < 0.3 * mean
  np.testing.assert_allclose(counts[-1], mean, atol=0.02 * mean)


def test_bias_by_hand():
  bias, count = _float32(np.zeros(4), [1, 2, 6, 3])
  stepped = balance.update_bias(bias, count, 0.5)
  np.testing.assert_array_equal(stepped, [0.5, 0.5, -0.5, 0])
  keep = np.array([False, True, True, True])
  stepped = balance.update_bias(bias, count, 0.5, keep)
  np.testing.assert_array_equal(stepped[1:], [0.5, -0.5, 0.5])


# Pruning.


def test_prune_keeps_what_is_above_the_floor():
  # The mean is 2, the floor is 1.
  keep = balance.prune(jnp.float32([4, 0.4, 1, 2.6]), 0.5, k=3)
  np.testing.assert_array_equal(keep, [True, False, True, True])
  with pytest.raises(ValueError, match=r'floor=0\.5: would keep 1 of 3.*k=2'):
    balance.prune(np.array([9, 0.1, 0.2]), 0.5, k=2)


def test_pruned_experts_are_never_chosen_and_others_do_not_notice():
  clean, std, noise = _float32(*_draw(200, E))
  everyone = np.ones(E, bool)
  keep = np.array([True, True, False, True, False, True])
  bias = np.float32(np.linspace(-0.2, 0.2, E))
  routers = (
    lambda keep: flat(clean, std, noise, 2, keep=keep),
    lambda keep: biased(clean, bias, 2, keep=keep),
  )
  for router in routers:
    before, after = router(everyone), router(keep)
    gone = ~keep[before.plan.expert]
    same = ~gone.any(1)
    assert 20 < same.sum() < 180
    assert keep[after.plan.expert].all()
    np.testing.assert_array_equal(after.count[~keep], 0)
    np.testing.assert_array_equal(after.load[~keep], 0)
    for a, b in zip(before.plan, after.plan):
      np.testing.assert_array_equal(a[same], b[same])
    # Places that nobody may fill stay empty.
    alone = router(np.arange(E) == 1).plan
    np.testing.assert_array_equal(alone.expert, np.tile([1, E], (200, 1)))
    want = np.tile([1, 0], (200, 1))
    np.testing.assert_allclose(alone.gate, want, rtol=1e-6)


def test_a_compacted_layer_gives_the_same():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(T, 4)), rng.normal(size=(4, E))
  params = {'kernel': rng.normal(size=(E, 4, 5)), 'bias': rng.normal(size=E)}
  x, kernel, params = jax.tree.map(np.float32, (x, kernel, params))
  _, std, noise = _float32(*_draw(T, E))
  keep = np.array([True, True, False, True, False, True])
  large = flat(x @ kernel, std, noise, 2, keep=keep)
  narrow = balance.compact((kernel, std, noise), keep, axis=-1)
  small = flat(x @ narrow[0], *narrow[1:], 2)
  fewer = jax.device_get(balance.compact(params, keep))
  assert fewer['kernel'].shape == (4, 4, 5)

  def output(plan, params):
    chosen = jax.tree.map(lambda leaf: leaf[plan.expert], params)
    each = np.einsum('td,tkdo->tko', x, chosen['kernel'])
    each += chosen['bias'][..., None]
    return np.einsum('tk,tko->to', plan.gate, each)

  np.testing.assert_array_equal(
    np.flatnonzero(keep)[small.plan.expert], large.plan.expert
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(output(small.plan, fewer), output(large.plan, params))
  close(small.load, large.load[keep])
  jax.tree.map(close, small.losses, large.losses)


def test_pruning_in_groups():
  # Without noise.
  first = *_float32(*_draw(T, G))[:2], None
  second = *_float32(*_draw(T, G, 2, seed=1))[:2], None
  # The last group goes, and one expert of the first.
  keep = np.array([False, True, True, True, False, False])
  before = nested(first, second, 1, 1, keep=np.ones(6, bool))
  after = nested(first, second, 1, 1, keep=keep)
  same = keep[before.plan.expert].all(1)
  assert 0 < same.sum() < T
  assert keep[after.plan.expert].all()
  for result in (before, after):
    np.testing.assert_array_equal(result.load, result.count)
    want = np.bincount(result.plan.expert.ravel(), minlength=6)
    np.testing.assert_array_equal(result.count, want)
  for a, b in zip(before.plan, after.plan):
    np.testing.assert_array_equal(a[same], b[same])
  # What nobody may fill stays empty.
  nobody = nested(first, second, 1, 1, keep=np.zeros(6, bool)).plan
  np.testing.assert_array_equal(nobody.expert, np.full((T, 1), 6))
  np.testing.assert_array_equal(nobody.gate, np.zeros((T, 1)))


# Bad input.

LOGITS = np.zeros((4, 6), np.float32)
PAIR = np.zeros((4, 3, 2), np.float32)
GROUPS = (LOGITS[:, :3], None, None)
SIX = np.zeros(6, np.float32)
ONE = np.arange(6) < 1


@pytest.mark.parametrize(
  ('call', 'match'),
  [
    (lambda: routing.noisy_top_k(LOGITS, None, None, 7), 'k=7: .* 1 to 6'),
    (lambda: routing.noisy_top_k(LOGITS, None, None, 0), 'k=0: .* 1 to 6'),
    (lambda: routing.noisy_top_k(LOGITS, None, LOGITS, 2), 'std: None, but'),
    (
      lambda: routing.noisy_top_k(LOGITS, LOGITS[:2], LOGITS, 2),
      r'std: \(2, 6\), must be as logits: \(4, 6\)',
    ),
    (
      lambda: routing.noisy_top_k(LOGITS, None, None, 2, ONE),
      'keep: leaves 1 experts; must be at least 2',
    ),
    (
      lambda: routing.noisy_top_k(LOGITS, None, None, 2, ONE[:3]),
      r'keep: \(3,\), must be one an expert: \(6,\)',
    ),
    (
      lambda: routing.hierarchical(GROUPS, (PAIR, None, None), 4, 1),
      'k_primary=4: must be from 1 to 3',
    ),
    (
      lambda: routing.hierarchical(GROUPS, (PAIR, None, None), 2, 3),
      'k_secondary=3: must be from 1 to 2',
    ),
    (
      lambda: routing.hierarchical(GROUPS, (PAIR[:, :2], None, None), 2, 1),
      r'secondary: \(4, 2, 2\), must be .*: 4, 3, any',
    ),
    (
      lambda: routing.hierarchical(GROUPS, (PAIR, None, None), 2, 1, ONE),
      r'keep: leaves \[1, 0, 0\] experts per group; .* at least 1,',
    ),
    (lambda: routing.balanced(LOGITS, SIX[:3], 3), r'thresholds: \(3,\)'),
    (lambda: routing.thresholded(LOGITS, SIX, 7), 'limit=7: .* 1 to 6'),
    (lambda: routing.expert_choice(LOGITS, 0.0), r'capacity_factor=0\.0'),
    (lambda: routing.expert_choice(LOGITS, 7), 'at most .* experts, 6'),
    (
      lambda: jax.jit(routing.expert_choice)(LOGITS, 2.0),
      'capacity_factor=.*: sets a shape, must be a number',
    ),
    (lambda: routing.biased_top_k(LOGITS, SIX[:2], 2), r'bias: \(2,\)'),
    (
      lambda: balance.compact({'a': {'b': PAIR}}, ONE),
      r"params\['a'\]\['b'\]: 4 entries along axis 0, must be 6",
    ),
  ],
)
def test_bad_input_is_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call()
