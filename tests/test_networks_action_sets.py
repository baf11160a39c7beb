"""Distributions over large sets of actions."""

# ruff: noqa: F811 (fixtures of the other half are imported)

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_networks_actions import (  # noqa: F401
  JOINT,
  UNIT,
  _compiled,
  _keys,
  _logits,
  bins,
  gaussian,
  joint,
  product,
)

from networks import actions

# Large sets


def test_masked_actions_are_impossible(joint):
  parameters = _logits(2, JOINT)
  invalid = np.random.default_rng(0).random((2, JOINT)) < 0.5
  masked = joint.mask(parameters, invalid)
  everything = np.tile(np.arange(JOINT, dtype=np.int32), (2, 1))
  keep = np.where(invalid, 0, np.exp(parameters, dtype=np.float64))
  want = keep / keep.sum(1, keepdims=True)
  mixed_noise = joint.noise(_keys(jax.random.key(1), masked), masked, 0.3)[:, 0]
  assert not np.asarray(mixed_noise)[invalid].any()
  for logits, probs in [
    (masked, want),
    (joint.temper(masked, 2.0), np.sqrt(want)),
    (joint.temper(masked, 0.25), want**4),
  ]:
    log_probs = np.asarray(joint.log_prob(logits, everything))
    assert np.isfinite(log_probs).all()
    probs = probs / probs.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_probs), probs, rtol=1e-4, atol=1e-37)
  noise = joint.noise(_keys(jax.random.key(1), masked), masked, 0.3)
  mixed = joint.log_prob(joint.mixture(masked, noise, 0.25), everything)
  np.testing.assert_allclose(
    np.exp(mixed), 0.75 * want + 0.25 * noise[:, 0], rtol=1e-4, atol=1e-37
  )
  remasked = joint.mixture(masked, noise, 0.25)
  assert (np.asarray(remasked)[invalid] < -1e38).all()
  entropy = joint.entropy(None, masked)
  oracle = stats.entropy(want, axis=1)
  np.testing.assert_allclose(entropy, oracle, rtol=1e-5)
  gradient = jax.grad(
    lambda p: joint.log_prob(p, everything).sum() + joint.entropy(None, p).sum()
  )(masked)
  assert np.isfinite(gradient).all()


def test_noise_of_zero_weight_has_a_finite_log(joint, gaussian):
  noise = np.zeros((1, 1, JOINT), np.float32)
  noise[..., 3] = 1
  got = joint.noise_log_prob(noise, np.int32([[3, 4]]))
  np.testing.assert_allclose(got, [[0, np.log(2.0**-126)]], rtol=1e-6)
  noise = np.zeros((1, 2, 7), np.float32)
  noise[..., 0] = 1
  got = gaussian.noise_log_prob(noise, np.float32([[[2, 10]]]))
  assert np.isfinite(got).all() and got < -150


def test_distinct_actions_weigh_without_bias():
  family = _compiled(actions.flat(6))
  logits = np.float32([[2.0, 0.5, 0.0, -1.0, -3.0, 1.0]])
  values = np.float32([1.0, -2.0, 4.0, 10.0, 50.0, 0.0])
  probs = np.exp(logits[0]) / np.exp(logits[0]).sum()

  @jax.jit
  def estimates(keys):
    draw = lambda key: family.distinct(
      _keys(key, jnp.asarray(logits)), jnp.asarray(logits), 3
    )
    chosen, log_inclusion = jax.vmap(draw)(keys)
    log_p = jax.vmap(lambda a: family.log_prob(logits, a))(chosen)
    weights = jnp.exp(log_p - log_inclusion)
    payoff = jnp.asarray(values)[chosen]
    return chosen[:, 0], (weights * payoff).sum((1, 2)), log_inclusion

  keys = jax.random.split(jax.random.key(0), 50_000)
  chosen, estimate, log_inclusion = map(np.asarray, estimates(keys))
  assert (np.diff(chosen, axis=1) > 0).all()
  assert (log_inclusion <= 0).all() and np.isfinite(log_inclusion).all()
  error = estimate.std() / math.sqrt(len(keys))
  assert abs(estimate.mean() - probs @ values) < 4 * error
  # Without the weights it is far off: the test can tell.
  plain = (probs * values)[chosen].sum(1)
  assert abs(plain.mean() - probs @ values) > 20 * error


def test_distinct_actions_at_the_ends():
  family = _compiled(actions.flat(5))
  logits = _logits(2, 5)
  everything, log_inclusion = family.distinct(
    _keys(jax.random.key(0), logits), logits, 5
  )
  np.testing.assert_array_equal(everything, [range(5)] * 2)
  np.testing.assert_array_equal(log_inclusion, np.zeros((2, 5)))
  # Fewer valid actions than asked for: all of them are there for certain.
  masked = family.mask(logits, np.array([[1, 0, 1, 0, 1]] * 2, bool))
  for seed in range(5):
    chosen, log_inclusion = family.distinct(
      _keys(jax.random.key(seed), masked), masked, 3
    )
    assert all({1, 3} < set(row) for row in np.asarray(chosen))
    np.testing.assert_array_equal(log_inclusion, np.zeros((2, 3)))
    log_probs = np.asarray(family.log_prob(masked, chosen))
    assert ((log_probs < -80).sum(1) == 1).all()
  # A sure action beside almost impossible ones: finite, and sure.
  logits = np.float32([[0, -60, -60, -60, -70]])
  chosen, log_inclusion = family.distinct(
    _keys(jax.random.key(0), logits), logits, 2
  )
  assert chosen[0, 0] == 0 and log_inclusion[0, 0] == 0
  assert -30 < log_inclusion[0, 1] < 0


def test_only_flat_sets_are_enumerated(gaussian, bins, product):
  for family in (gaussian, bins, product):
    assert (family.mask, family.mixture, family.distinct) == (None,) * 3
  assert gaussian.num_actions is None


@pytest.mark.slow
def test_vmap_equals_a_loop(gaussian, bins, product, joint):
  for family in (gaussian, bins, product, joint):

    def everything(key, parameters, family=family):
      draws = family.draw(key, (2, 3))
      samples = family.sample(draws, parameters)
      noise = family.noise(_keys(key, parameters), parameters, 0.4)
      return (
        samples,
        family.log_prob(family.temper(parameters, 2.0), samples),
        family.noise_log_prob(
          noise, family.noise_sample(_keys(key, noise), noise, 3)
        ),
        family.identity(samples),
        family.encode(samples),
        family.entropy(draws, parameters),
        family.mode(parameters),
      )

    keys = jax.random.split(jax.random.key(0), 2)
    parameters = _logits(4, family.num_parameters).reshape(2, 2, -1)
    got = jax.jit(jax.vmap(everything))(keys, parameters)
    alone = jax.jit(everything)
    want = [alone(*args) for args in zip(keys, parameters)]
    for index, leaf in enumerate(got):
      # Samples may differ in the last bit, and then their hashes do.
      if index == 3 and family is gaussian:
        continue
      stacked = jnp.stack([row[index] for row in want])
      assert leaf.dtype == stacked.dtype
      np.testing.assert_allclose(leaf, stacked, rtol=1e-4, atol=1e-5)


# Bad input

ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda f: f([0, np.nan], ONE), 'low=nan, high=1.0 in component 1: must'),
    (lambda f: f(-ONE, [1, np.inf]), 'component 1: unbounded, but this family'),
    (lambda f: f(-3e38 * ONE, 3e38 * ONE), 'component 0: unbounded'),
    (
      lambda f: f([-1, 1], ONE),
      'low=1.0, high=1.0 in component 1: low must be',
    ),
    (lambda f: f(-ONE[:1], ONE), r'low has shape \(1,\), high \(2,\): must be'),
    (lambda f: f(ONE[:0], ONE[:0]), r'low has shape \(0,\): needs a component'),
  ],
)
def test_bad_bounds_are_refused(build, message):
  for family in (
    actions.tanh_gaussian,
    lambda low, high: actions.factored_bins(low, high, 3),
  ):
    with pytest.raises(ValueError, match=message):
      build(family)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (
      lambda: actions.tanh_gaussian(*UNIT, min_std=0.0),
      'min_std=0.0: must be positive',
    ),
    (
      lambda: actions.tanh_gaussian(*UNIT, min_std=math.nan),
      'min_std=nan: must be positive',
    ),
    (
      lambda: actions.tanh_gaussian(*UNIT, init_std=0.1),
      'init_std=0.1: must be greater than min_std=0.1',
    ),
    (
      lambda: actions.tanh_gaussian(*UNIT, noise_bins=0),
      'noise_bins=0: must be at least 1',
    ),
    (
      lambda: actions.factored_bins(*UNIT, 1),
      'num_bins=1: must be at least 2',
    ),
    (
      lambda: actions.factored_index(()),
      r'factors=\(\): needs sizes of at least 1',
    ),
    (
      lambda: actions.factored_index((3, 0)),
      r'factors=\(3, 0\): needs sizes of at least 1',
    ),
    (
      lambda: actions.factored_index((7,) * 12),
      '13841287201 joint actions do not fit int32',
    ),
    (lambda: actions.flat(0), 'num_actions=0: must be at least 1'),
    (
      lambda: actions.flat(6, (2, 2)),
      r'factors=\(2, 2\): their product must be num_actions=6',
    ),
    (
      lambda: actions.flat(3).distinct(None, np.zeros((1, 3)), 4),
      r'K=4: must be in \[1, 3\]',
    ),
    (
      lambda: actions.flat(3).distinct(None, np.zeros((1, 3)), 0),
      r'K=0: must be in \[1, 3\]',
    ),
  ],
)
def test_bad_families_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    build()
