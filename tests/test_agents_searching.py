"""One table of checks that every agent of the MuZero family passes."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import SEARCHING
from searching_cases import (
  END,
  TERMINATED,
  TRUNCATED,
  A,
  B,
  K,
  N,
  is_sampled,
  make_batch,
  replace_extras,
  replace_timestep,
  shaken,
)
from trees import assert_equal

from agents.core.types import (
  Continuous,
)


@pytest.fixture(params=SEARCHING)
def built(request):
  return conformance.built(request.param)


def weights_by_action(config, spec, extras):
  """Search weights `[B, num_actions]` of an enumerated set."""
  weights = np.asarray(extras['search_policy'])
  if not is_sampled(config, spec):
    return weights
  each = jax.nn.one_hot(extras['sampled_actions'], spec.action.num_actions)
  return (weights[..., None] * np.asarray(each)).sum(-2)


def test_actions_are_legal(built, key):
  timestep = jax.tree.map(lambda x: x[:, 0], built.batch.experience.timestep)
  spec, mask = built.spec.action, timestep.invalid_actions
  if mask is not None:
    mask = jnp.array([[0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0]], bool)
    mask = jnp.tile(mask, (1, spec.num_actions // A))
    timestep = timestep._replace(invalid_actions=mask)
  is_real = isinstance(spec, Continuous)
  shape, slots = (spec.shape if is_real else ()), A
  names = {'search_policy', 'search_value'}
  if is_sampled(built.config, built.spec):
    slots = built.config.search.num_samples
    names |= {'sampled_actions'}
  act = jax.jit(built.agent.act)
  params = shaken(built.state).params
  seen = set()
  for i in range(8):
    action, extras = act(params, jax.random.fold_in(key, i), timestep)
    assert action.shape == (B, *shape)
    assert action.dtype == (jnp.float32 if is_real else jnp.int32)
    assert set(extras) == names
    weights, value = extras['search_policy'], extras['search_value']
    assert (weights.shape, weights.dtype) == ((B, slots), jnp.float32)
    assert (value.shape, value.dtype) == ((B,), jnp.float32)
    np.testing.assert_allclose(weights.sum(-1), np.ones(B), rtol=1e-5)
    assert np.isfinite(value).all()
    low, high = (spec.low, spec.high) if is_real else (0, spec.num_actions - 1)
    for x in (action, extras.get('sampled_actions', action)):
      x = np.asarray(x)
      assert (x >= low).all() and (x <= high).all()
    if 'sampled_actions' in extras:
      drawn = np.asarray(extras['sampled_actions'])
      assert drawn.shape == (B, slots, *shape) and drawn.dtype == action.dtype
      is_chosen = (drawn == np.asarray(action)[:, None]).reshape(B, slots, -1)
      assert (is_chosen.all(-1) & (np.asarray(weights) > 0)).any(-1).all()
    if mask is not None:
      assert not mask[np.arange(B), action].any()
      by_action = weights_by_action(built.config, built.spec, extras)
      assert (by_action[np.asarray(mask)] == 0).all()
    seen.add(np.asarray(action[0]).tobytes())
  assert len(seen) > 1  # it explores


def test_updates_are_counted_and_targets_follow(built, key):
  state = built.state
  for count in range(1, 4):
    old = state
    state, _ = built.update(state, built.batch, key)
    assert state.params.step == count
    wanted = state.params if count % 3 == 0 else old.target_params
    assert_equal(state.target_params, wanted)


def test_update_lowers_the_loss(built, key):
  # The same batch over and over: everything but noise can be learned.
  before = built.evaluate(built.state.params, built.batch, key)
  state = built.state
  for i in range(20):
    state, _ = built.update(state, built.batch, jax.random.fold_in(key, i))
  after = built.evaluate(state.params, built.batch, key)
  assert after['loss'] < before['loss'] - 0.1


def first_targets(built, batch):
  """The value targets of step 0, by hand; windows are as `make_batch` says."""
  x = jax.tree.map(np.asarray, batch)
  reward = x.experience.timestep.reward
  value = x.experience.extras['search_value']
  dynamic = getattr(built.config, 'dynamic_horizon', False)
  targets = []
  for b, horizon in enumerate([2, 2, 1, 1] if dynamic else [2] * B):
    z = sum(built.config.gamma**i * reward[b, i + 1] for i in range(horizon))
    if not (b == TERMINATED and horizon == END):
      z += built.config.gamma**horizon * value[b, horizon]
    targets.append(z)
  return np.array(targets)


def test_priorities_are_errors_of_the_first_value(built, key):
  # Heads start at zero, so that the value does, too.
  _, info = built.update(built.state, built.batch, key)
  z = first_targets(built, built.batch)
  np.testing.assert_allclose(info.priorities, np.abs(z), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(info.metrics['value_target'], z.mean(), rtol=1e-4)
  # Any value: errors move with the target, one to one.
  state, far = shaken(built.state), 1000.0
  reward = built.batch.experience.timestep.reward.at[:, 1].add(far)
  moved = replace_timestep(built.batch, reward=reward)
  _, info = built.update(state, built.batch, key)
  _, later = built.update(state, moved, key)
  value = np.asarray(z + far - later.priorities)
  np.testing.assert_allclose(info.priorities, np.abs(value - z), atol=1e-3)
  np.testing.assert_allclose(info.metrics['value'], value.mean(), atol=1e-3)


def test_importance_weights_enter_linearly(built, key):
  params = shaken(built.state).params

  def loss(weight):
    sample = built.batch.sample._replace(weight=jnp.float32(weight))
    batch = built.batch._replace(sample=sample)
    return float(built.evaluate(params, batch, key)['loss'])

  rows = [loss(row) for row in np.eye(B)]
  assert len({round(x, 4) for x in rows}) == B
  weight = [1.0, 0.5, 0.25, 2.0]
  np.testing.assert_allclose(loss(weight), np.dot(rows, weight), rtol=1e-4)
  silent = built.batch.sample._replace(weight=jnp.zeros(B))
  batch = built.batch._replace(sample=silent)
  _, info = built.update(shaken(built.state), batch, key)
  assert info.metrics['gradient_norm'] == 0


def overwritten(batch, config, spec):
  """Other contents behind the ends of episodes."""
  other = make_batch(config, spec, seed=9)

  def replace(old, new):
    mask = batch.valid.reshape(batch.valid.shape + (1,) * (old.ndim - 2))
    return jnp.where(mask, old, new)

  return batch._replace(
    experience=jax.tree.map(replace, batch.experience, other.experience)
  )


def test_rows_behind_an_end_do_not_matter(built, key):
  batch = overwritten(built.batch, built.config, built.spec)
  params = shaken(built.state).params
  assert_equal(
    built.evaluate(params, batch, key),
    built.evaluate(params, built.batch, key),
  )
  network = built.config.network
  if 'batch' in (network.norm, network.projection_norm):
    return  # its moments are of all rows
  assert_equal(
    built.update(shaken(built.state), batch, key),
    built.update(shaken(built.state), built.batch, key),
  )


def test_truncations_bootstrap_and_terminations_do_not(built, key):
  state = built.state
  value = built.batch.experience.extras['search_value']
  value = value.at[:, END].add(10.0)
  # All horizons reach the end.
  sample = built.batch.sample._replace(age=jnp.zeros(B))
  batch = built.batch._replace(sample=sample)
  _, old = built.update(state, batch, key)
  changed = replace_extras(batch, search_value=value)
  _, new = built.update(state, changed, key)
  delta = np.asarray(new.priorities - old.priorities)
  assert delta[TERMINATED] == 0
  assert (np.delete(delta, TERMINATED) != 0).all()
  # A cut does not become an end in what follows it.
  discount = batch.experience.timestep.discount
  ended = replace_timestep(changed, discount=discount.at[TRUNCATED, END].set(0))
  _, without = built.update(state, ended, key)
  z = new.metrics['value_target'] - without.metrics['value_target']
  lost = built.config.gamma**END * value[TRUNCATED, END] / B
  np.testing.assert_allclose(z, lost, rtol=1e-3, atol=1e-5)


def test_refresh_changes_targets_alone(built, key):
  if built.refresh is None:
    assert built.config.reanalyze_fraction == 0
    return
  state = shaken(built.state)
  fresh = built.refresh(state, built.batch, 0, key)
  names = set(fresh.experience.extras)
  zero = {name: jnp.zeros(()) for name in names}
  assert_equal(
    replace_extras(fresh, **zero), replace_extras(built.batch, **zero)
  )

  # It reads the target parameters, and nothing else of the state.
  other = state._replace(params=shaken(state, 5).params)
  assert_equal(built.refresh(other, built.batch, 0, key), fresh)
  other = state._replace(target_params=shaken(state, 5).target_params)
  extras = built.refresh(other, built.batch, 0, key).experience.extras
  name = 'search_value'
  assert (extras[name] != fresh.experience.extras[name]).any()


def test_refresh_searches_its_fraction(built, key):
  if built.refresh is None:
    return
  state = shaken(built.state)
  fresh = built.refresh(state, built.batch, 0, key).experience.extras
  policy = fresh['search_policy'][:, : K + 1]
  stored = built.batch.experience.extras['search_policy'][:, : K + 1]
  searched = round(built.config.reanalyze_fraction * B)
  changed = np.asarray((policy != stored).any(-1))
  np.testing.assert_array_equal(changed[searched:], False)
  assert changed[:searched].all()
  np.testing.assert_allclose(policy.sum(-1), np.ones((B, K + 1)), rtol=1e-5)
  if built.spec.masks_actions:
    mask = built.batch.experience.timestep.invalid_actions[:searched, : K + 1]
    by_action = weights_by_action(built.config, built.spec, fresh)
    assert (by_action[:searched, : K + 1][np.asarray(mask)] == 0).all()


def test_values_come_from_the_target_network_or_a_search(built, key):
  if built.refresh is None:
    return
  state = shaken(built.state)
  timestep = built.batch.experience.timestep
  got = built.refresh(state, built.batch, 0, key).experience.extras
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), timestep)
  root = jax.jit(built.agent.model.root)(state.target_params, flat, key)
  name = 'network_value' if 'network_value' in got else 'search_value'
  difference = np.abs(got[name] - root.value.reshape(B, -1))
  if name == 'network_value':
    old = built.batch.experience.extras['search_value']
    changed = np.asarray(got['search_value'] != old)
    searched = round(built.config.reanalyze_fraction * B)
    want = np.zeros_like(changed)
    want[:searched, : K + 1] = True
    np.testing.assert_array_equal(changed, want)
    # Values of searches, and not the network's.
    apart = np.abs(got['search_value'] - got[name])[:searched, : K + 1]
    assert (apart > 1e-3).mean() > 0.5
  if getattr(built.config, 'searched_values', False):
    assert (difference > 1e-3).mean() > 0.5
  else:
    np.testing.assert_allclose(difference, np.zeros((B, K + N + 1)), atol=1e-5)


def test_reanalysis_draws_actions_again(built, key):
  if not is_sampled(built.config, built.spec):
    return
  state, batch = shaken(built.state), built.batch
  one, two = (
    built.refresh(state, batch, 0, jax.random.fold_in(key, i)).experience.extras
    for i in range(2)
  )
  searched = round(built.config.reanalyze_fraction * B)
  steps = K + 1
  stored = batch.experience.extras['sampled_actions']
  for new, old in ((one, stored), (two, stored), (one, two)):
    new = new['sampled_actions']
    old = old if old is stored else old['sampled_actions']
    differs = np.asarray(new != old).reshape(*new.shape[:2], -1).any(-1)
    assert not differs[searched:].any()
    if searched:
      # Where few actions are valid, distinct ones are the same again.
      least = 0.9 if built.config.search.replacement else 0.5
      assert differs[:searched, :steps].mean() > least
  again = built.refresh(state, batch, 0, jax.random.fold_in(key, 0))
  assert_equal(again.experience.extras, one)
