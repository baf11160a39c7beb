"""One table of checks that every agent passes; `conformance` has the agents."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import exact_jit
from conformance import (
  AGENTS,
  BOX,
  END,
  HIGH,
  JOINT,
  LOW,
  NETWORK,
  SAMPLES,
  TERMINATED,
  TRUNCATED,
  VECTOR,
  A,
  B,
  K,
  N,
  assert_close,
  assert_equal,
  ez,
  is_sampled,
  make_agent,
  make_batch,
  mz,
  replace_extras,
  replace_timestep,
  sampled,
  shaken,
)

from agents.core import planning
from agents.core.types import (
  Agent,
  Continuous,
  Spec,
  Trajectory,
)
from networks import heads


class Built(NamedTuple):
  """An agent with its compiled functions and an update's inputs."""

  config: Any
  spec: Spec
  agent: Agent
  state: Any
  batch: Trajectory
  update: Callable
  evaluate: Callable
  refresh: Callable | None
  traces: list[int]


@pytest.fixture(scope='module', params=AGENTS)
def built(request):
  module, config, spec = AGENTS[request.param]
  agent = make_agent(module, config, spec)
  traces = [0]

  def update(state, batch, key):
    traces[0] += 1
    return agent.update(state, batch, key)

  return Built(
    config=config,
    spec=spec,
    agent=agent,
    state=jax.jit(agent.init)(jax.random.key(1)),
    batch=make_batch(config, spec),
    update=jax.jit(update),
    evaluate=jax.jit(agent.evaluate),
    refresh=agent.refresh and jax.jit(agent.refresh),
    traces=traces,
  )


def weights_by_action(config, spec, extras):
  """Search weights `[B, num_actions]` of an enumerated set."""
  weights = np.asarray(extras['search_policy'])
  if not is_sampled(config):
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
  if is_sampled(built.config):
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


def test_update_is_stable_and_traced_once(built, key):
  state, before = built.state, built.traces[0]
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for count in range(1, 4):
    old = state
    state, info = built.update(state, built.batch, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert state.params.step == count
    for name, x in info.metrics.items():
      assert x.shape == () and x.dtype == jnp.float32, name
      assert np.isfinite(x), name
    assert info.priorities.shape == (B,)
    wanted = state.params if count % 3 == 0 else old.target_params
    assert_equal(state.target_params, wanted)
  assert built.traces[0] - before <= 1
  assert built.update(state, built.batch, key) and built.traces[0] == 1


def test_update_lowers_the_loss(built, key):
  # The same batch over and over: everything but noise can be learned.
  before = built.evaluate(built.state.params, built.batch, key)
  state = built.state
  for i in range(20):
    state, _ = built.update(state, built.batch, jax.random.fold_in(key, i))
  after = built.evaluate(state.params, built.batch, key)
  assert after['loss'] < before['loss'] - 0.1


# Both are slow and the same code in all variants of an agent.
one_of_each = pytest.mark.parametrize(
  'built', ['muzero', 'efficientzero', 'sampled_muzero'], indirect=True
)


@one_of_each
@pytest.mark.slow
def test_jit_equals_eager(built, key):
  state = shaken(built.state)
  assert_close(
    built.update(state, built.batch, key),
    built.agent.update(state, built.batch, key),
    tolerance=1e-4,
  )


@one_of_each
def test_vmap_over_seeds_equals_a_loop(built, key):
  states = [shaken(built.state, seed) for seed in (0, 7)]
  keys = jax.random.split(key)
  stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  together = jax.jit(jax.vmap(built.agent.update, in_axes=(0, None, 0)))
  got = together(stack(*states), built.batch, keys)
  alone = [built.update(s, built.batch, k) for s, k in zip(states, keys)]
  assert_close(got, stack(*alone), tolerance=1e-4)


def first_targets(built, batch):
  """The value targets of step 0, by hand; windows are as `make_batch` says."""
  x = jax.tree.map(np.asarray, batch)
  reward = x.experience.timestep.reward
  value = x.experience.extras['search_value']
  dynamic = getattr(built.config, 'off_policy_correction', False)
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
  if built.config.network.norm == 'batch':
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
  difference = np.abs(got['search_value'] - root.value.reshape(B, -1))
  if getattr(built.config, 'off_policy_correction', False):
    assert (difference > 1e-3).mean() > 0.5
  else:
    np.testing.assert_allclose(difference, np.zeros((B, K + N + 1)), atol=1e-5)


def test_reanalysis_draws_actions_again(built, key):
  if not is_sampled(built.config):
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


# From here on: single agents.


def test_horizon_follows_the_age_only_with_the_correction(key):
  for correct, want in ((True, 1.5), (False, 2.0)):
    module, config, spec = ez(off_policy_correction=correct)
    agent = make_agent(module, config, spec)
    state = agent.init(key)
    batch = make_batch(config, spec)
    got = jax.jit(agent.evaluate)(state.params, batch, key)
    assert got['horizon'] == want


@pytest.mark.parametrize('which', ['muzero', 'efficientzero', 'sampled_muzero'])
def test_a_term_can_be_replaced(which, key):
  module, config, spec = AGENTS[which]
  batch = make_batch(config, spec)
  constant = lambda logits, target: jnp.full(target.shape[:1], 2.0)
  metrics = []
  for changes in ({}, {'policy': constant}):
    agent = make_agent(module, config, spec, terms=changes)
    state = shaken(jax.jit(agent.init)(key))
    metrics.append(exact_jit(agent.evaluate)(state.params, batch, key))
  old, new = metrics
  # Decisions in the windows: all four steps, or the two before an end.
  assert new['loss_policy'] == 2.0 * (4 + 2 + 2 + 4) / B
  for name in ('loss_value', 'loss_reward'):
    assert new[name] == old[name]
  assert new['loss'] != old['loss']


def test_loss_is_the_weighted_sum_of_its_terms(key):
  for which in ('muzero', 'efficientzero'):
    module, config, spec = AGENTS[which]
    agent = make_agent(module, config, spec)
    state = shaken(jax.jit(agent.init)(key))
    batch = make_batch(config, spec)._replace(sample=None)
    got = jax.jit(agent.evaluate)(state.params, batch, key)
    want = got['loss_policy'] + 0.25 * got['loss_value'] + got['loss_reward']
    if which == 'efficientzero':
      want += 2.0 * got['loss_consistency']
    np.testing.assert_allclose(got['loss'], want / K, rtol=1e-5)


def test_sampled_loss_is_the_weighted_sum_of_its_terms(key):
  module, config, spec = AGENTS['sampled_efficientzero']
  config = dataclasses.replace(config, entropy_weight=0.25)
  agent = make_agent(module, config, spec)
  state = shaken(jax.jit(agent.init)(key))
  batch = make_batch(config, spec)._replace(sample=None)
  got = jax.jit(agent.evaluate)(state.params, batch, key)
  want = got['loss_policy'] + 0.25 * got['loss_value'] + got['loss_reward']
  want += 2.0 * got['loss_consistency'] + 0.25 * got['loss_entropy']
  np.testing.assert_allclose(got['loss'], want / K, rtol=1e-5)
  # The bonus is a loss of minus the entropy of each decision's policy.
  decisions = 4 + 2 + 2 + 4
  np.testing.assert_allclose(
    got['loss_entropy'], -got['entropy'] * decisions / B, rtol=1e-5
  )


def test_untrained_sampled_policies_by_hand(key):
  # A head at zero is uniform over 3 * 3 bins; a Gaussian has mean 0, std 1.
  decisions = 4 + 2 + 2 + 4
  for which in ('sampled_efficientzero', 'sampled_muzero'):
    module, config, spec = AGENTS[which]
    agent = make_agent(module, config, spec)
    batch = make_batch(config, spec)
    params = jax.jit(agent.init)(key).params
    got = jax.jit(agent.evaluate)(params, batch, key)
    x = jax.tree.map(lambda x: np.float64(x[:, : K + 1]), batch.experience)
    w, a = x.extras['search_policy'], x.extras['sampled_actions']
    if which == 'sampled_muzero':
      u = np.arctanh(2 * (a - LOW) / np.float64(HIGH - LOW) - 1)
      normal = -0.5 * u**2 - 0.5 * np.log(2 * np.pi)
      log_probs = (normal - np.log1p(-(np.tanh(u) ** 2))).sum(-1)
    else:
      log_probs = np.full(w.shape, -np.log(9))
      np.testing.assert_allclose(got['entropy'], np.log(9), rtol=1e-5)
    each = (w * (np.log(w) - log_probs)).sum(-1)
    # Two windows end at step 2, where nothing was decided.
    each[[TERMINATED, TRUNCATED], END:] = 0
    assert np.count_nonzero(each) == decisions
    np.testing.assert_allclose(got['loss_policy'], each.sum() / B, rtol=1e-4)


def test_sampled_policy_loss_by_hand_along_the_unroll(key):
  module, config, spec = sampled(unroll_steps=1)
  agent = make_agent(module, config, spec)
  params = shaken(jax.jit(agent.init)(key)).params
  batch = make_batch(config, spec)

  @jax.jit
  def heads(params):
    timestep = jax.tree.map(lambda x: x[:, 0], batch.experience.timestep)
    root = agent.model.root(params, timestep, key)
    action = batch.experience.action[:, 0]
    step, _ = agent.model.step(params, key, action, root.embedding)
    return root.prior_logits, step.prior_logits

  x = batch.experience.extras
  total = 0.0
  for i, logits in enumerate(heads(params)):
    mean, raw = np.split(np.float64(logits), 2, -1)
    mean = 5 * np.tanh(mean / 5)
    std = 0.1 + np.log1p(np.exp(raw + np.log(np.expm1(0.9))))
    a = np.float64(x['sampled_actions'][:, i])
    u = np.arctanh(2 * (a - LOW) / np.float64(HIGH - LOW) - 1)
    z = (u - mean[:, None]) / std[:, None]
    normal = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(std)[:, None]
    log_probs = (normal - np.log1p(-(np.tanh(u) ** 2))).sum(-1)
    w = np.float64(x['search_policy'][:, i])
    total += (w * (np.log(w) - log_probs)).sum()
  got = jax.jit(agent.evaluate)(params, batch, key)['loss_policy']
  np.testing.assert_allclose(got, total / B, rtol=1e-4)


@pytest.mark.parametrize('which', ['sampled_muzero', 'sampled_efficientzero'])
def test_an_entropy_bonus_keeps_entropy(which, key):
  module, config, spec = AGENTS[which]
  batch = make_batch(config, spec)

  @jax.jit
  @jax.vmap
  def entropy(weight):
    swept = dataclasses.replace(config, entropy_weight=weight)
    agent = make_agent(module, swept, spec)
    step = lambda state, k: (agent.update(state, batch, k)[0], None)
    state, _ = jax.lax.scan(step, agent.init(key), jax.random.split(key, 15))
    return agent.evaluate(state.params, batch, key)['entropy']

  none, some, much = entropy(jnp.float32([0, 1, 10]))
  assert none + 0.02 < some < much


def test_untrained_losses_by_hand(key):
  # Heads start at zero: all predictions are uniform.
  for which in ('muzero', 'efficientzero'):
    module, config, spec = AGENTS[which]
    agent = make_agent(module, config, spec)
    params = jax.jit(agent.init)(key).params
    batch = make_batch(config, spec)
    got = jax.jit(agent.evaluate)(params, batch, key)
    policies, values, rewards = 4 + 2 + 2 + 4, 4 + 4 + 2 + 4, 3 + 3 + 2 + 3
    for name, count, size in (
      ('policy', policies, A),
      ('value', values, 11),
      ('reward', rewards, 11),
    ):
      np.testing.assert_allclose(
        got[f'loss_{name}'], count * np.log(size) / B, rtol=1e-5
      )


@pytest.mark.parametrize('horizon', [1, 2, 3])
@pytest.mark.parametrize('which', ['efficientzero', 'sampled_efficientzero'])
def test_the_learner_resets_the_prefix_where_the_planner_does(
  which, horizon, key
):
  module, config, spec = AGENTS[which]
  # Wide enough that no head is deaf to the LSTM.
  network = dataclasses.replace(NETWORK, lstm_size=16, head_hidden=(32,))
  config = dataclasses.replace(config, prefix_horizon=horizon, network=network)
  # The learner's predictions themselves, in the place of a loss.
  predicted = lambda logits, target: heads.from_logits(logits)
  agent = make_agent(module, config, spec, terms={'reward': predicted})
  assert agent.model is not None and agent.evaluate is not None
  batch = make_batch(config, spec)
  timestep = batch.experience.timestep
  # No ends: every action is the batch's and every step is trained.
  timestep = timestep._replace(
    discount=jnp.ones_like(timestep.discount),
    truncated=jnp.zeros_like(timestep.truncated),
  )
  batch = batch._replace(
    experience=batch.experience._replace(timestep=timestep),
    valid=jnp.ones_like(batch.valid),
  )
  params = shaken(jax.jit(agent.init)(key)).params
  got = jax.jit(agent.evaluate)(params, batch, key)['loss_reward']
  root = jax.tree.map(lambda x: x[:, 0], timestep)
  embedding = jax.jit(agent.model.root)(params, root, key).embedding
  step, prefix, want = jax.jit(agent.model.step), 0.0, 0.0
  for k in range(config.unroll_steps):
    action = batch.experience.action[:, k]
    output, embedding = step(params, key, action, embedding)
    # The planner's rewards are differences of the prefix since a reset.
    prefix = output.reward + (0.0 if k % horizon == 0 else prefix)
    want += prefix
  assert jnp.std(want) > 0.1
  np.testing.assert_allclose(got, jnp.mean(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('which', AGENTS)
def test_the_key_of_init_draws_the_network(which):
  module, config, spec = AGENTS[which]
  agent = make_agent(module, config, spec)
  init = jax.jit(lambda seed: agent.init(jax.random.key(seed)).params.network)
  first, same, other = init(0), init(0), init(1)
  assert_equal(first, same)
  drawn = lambda tree: [x for x in jax.tree.leaves(tree) if x.std() > 0]
  assert drawn(first)
  for a, b in zip(drawn(first), drawn(other), strict=True):
    assert not np.array_equal(a, b)


def test_a_sweep_vmaps_over_floats_of_the_config(key):
  module, config, spec = AGENTS['efficientzero']
  batch = make_batch(config, spec)
  state = shaken(jax.jit(make_agent(module, config, spec).init)(key))

  @jax.jit
  @jax.vmap
  def update(learning_rate, weight_decay):
    swept = dataclasses.replace(
      config, learning_rate=learning_rate, weight_decay=weight_decay
    )
    return make_agent(module, swept, spec).update(state, batch, key)[0]

  got = update(jnp.float32([0, 0.1, 0.1]), jnp.float32([9, 1e-4, 9]))
  row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  assert_equal(row(got.params.network, 0), state.params.network)
  agent = make_agent(module, config, spec)
  alone, _ = jax.jit(agent.update)(state, batch, key)
  assert_close(row(got.params, 1), alone.params, tolerance=1e-4)
  # The optimiser sees no statistics: neither its rate nor its decay matter.
  statistics = got.params.statistics
  assert jax.tree.leaves(statistics)
  assert_close(row(statistics, 0), row(statistics, 2), tolerance=1e-6)
  moved = jax.tree.map(
    lambda new, old: bool((new != old).any()),
    row(statistics, 0),
    state.params.statistics,
  )
  assert all(jax.tree.leaves(moved))


def test_bad_arguments_are_refused():
  for make in (mz, ez, sampled):
    for name, value in (
      ('gamma', 1.5),
      ('unroll_steps', 0),
      ('td_steps', 0),
      ('target_period', 0),
      ('reanalyze_fraction', -0.1),
    ):
      with pytest.raises(ValueError, match=f'{name}={value}'):
        make(**{name: value})
  with pytest.raises(ValueError, match='prefix_horizon=0'):
    ez(prefix_horizon=0)
  for changes in (
    {'num_simulations': -1},
    {'dirichlet_alpha': 0.0},
    {'dirichlet_fraction': 1.5},
  ):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
      planning.SearchConfig(**changes)


def test_environments_that_do_not_fit_are_refused():
  box = Continuous((2,), -np.ones(2, np.float32), np.ones(2, np.float32))
  for module, config, spec in (AGENTS['muzero'], AGENTS['efficientzero']):
    with pytest.raises(ValueError, match=r'discrete actions; Arm .*\(2,\)'):
      module.make_networks(config, spec._replace(action=box, name='Arm'))
    two = {'a': spec.observation, 'b': spec.observation}
    with pytest.raises(ValueError, match='one observation array; Two'):
      module.make_networks(config, spec._replace(observation=two, name='Two'))

  module, config, spec = AGENTS['sampled_muzero']
  two = {'a': spec.observation, 'b': spec.observation}
  with pytest.raises(ValueError, match='one observation array; Two'):
    module.make_networks(config, spec._replace(observation=two, name='Two'))


def bounds(low, high):
  action = Continuous((2,), np.float32([-1, low]), np.float32([1, high]))
  return BOX._replace(action=action, name='Arm')


@pytest.mark.parametrize(
  ('spec', 'changes', 'message'),
  [
    (bounds(-np.inf, 1), {}, 'Arm: action bound low=-inf must be finite'),
    (bounds(0, np.inf), {}, 'Arm: action bound high=inf must be finite'),
    (bounds(np.nan, 1), {}, 'Arm: action bound low=nan must be finite'),
    (bounds(0, np.nan), {'policy': 'factored'}, 'high=nan must be finite'),
    (bounds(2, 2), {}, 'low=2 must be below high=2'),
    (BOX, {'policy': 'flat'}, r'policy=flat: .*continuous.*\(2,\); use gauss'),
    (VECTOR, {}, 'policy=gaussian: .* 3 discrete actions; use flat'),
    (VECTOR, {'policy': 'factored'}, 'policy=factored: the 3 .* use flat'),
    (JOINT, {'policy': 'factored'}, 'policy=factored: .* masks actions'),
    (BOX, {'policy': 'factored', 'bins': 1}, 'bins=1: must be at least 2'),
    (
      BOX,
      {'search': dataclasses.replace(SAMPLES, replacement=False)},
      'replacement=False: needs a flat categorical',
    ),
    (
      VECTOR,
      {
        'policy': 'flat',
        'search': dataclasses.replace(SAMPLES, replacement=False),
      },
      'num_samples=5: without replacement at most the 3 actions',
    ),
  ],
)
def test_policies_that_do_not_fit_are_refused(spec, changes, message):
  module, config, _ = sampled(**changes)
  with pytest.raises(ValueError, match=message) as caught:
    module.make_networks(config, spec)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('name', 'value'),
  [('num_samples', 0), ('sample_temperature', 0), ('dirichlet_fraction', 2)],
)
def test_bad_searches_over_samples_are_refused(name, value):
  with pytest.raises(ValueError, match=f'{name}={value}'):
    dataclasses.replace(SAMPLES, **{name: value})
