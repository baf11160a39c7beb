"""Losses of the MuZero family by hand, bad configs, specs that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import exact_jit
from conformance import AGENTS
from searching_cases import (
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
  ez,
  make_batch,
  mz,
  sampled,
  shaken,
  without_ends,
)
from small_agents import make_agent
from trees import assert_close, assert_equal

from agents.core import planning
from agents.core.types import (
  Continuous,
)
from networks import heads


def test_horizon_follows_the_age_only_with_the_correction(key):
  for correct, want in ((True, 1.5), (False, 2.0)):
    module, config, spec = ez(dynamic_horizon=correct)
    agent = make_agent(module, config, spec)
    state = agent.init(key)
    batch = make_batch(config, spec)
    got = jax.jit(agent.evaluate)(state.params, batch, key)
    assert got['horizon'] == want


@pytest.mark.parametrize('which', ['muzero', 'efficientzero', 'sampled_muzero'])
def test_a_term_can_be_replaced(which, key):
  module, config, spec, *_ = AGENTS[which]
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
    module, config, spec, *_ = AGENTS[which]
    agent = make_agent(module, config, spec)
    state = shaken(jax.jit(agent.init)(key))
    batch = make_batch(config, spec)._replace(sample=None)
    got = jax.jit(agent.evaluate)(state.params, batch, key)
    want = got['loss_policy'] + 0.25 * got['loss_value'] + got['loss_reward']
    if which == 'efficientzero':
      want += 2.0 * got['loss_consistency']
    np.testing.assert_allclose(got['loss'], want / K, rtol=1e-5)


def test_sampled_loss_is_the_weighted_sum_of_its_terms(key):
  module, config, spec, *_ = AGENTS['sampled_efficientzero']
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
    module, config, spec, *_ = AGENTS[which]
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
  module, config, spec, *_ = AGENTS[which]
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
    module, config, spec, *_ = AGENTS[which]
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
  module, config, spec, *_ = AGENTS[which]
  # Wide enough that no head is deaf to the LSTM.
  network = dataclasses.replace(NETWORK, lstm_size=16, head_hidden=(32,))
  config = dataclasses.replace(config, prefix_horizon=horizon, network=network)
  # The learner's predictions themselves, in the place of a loss.
  predicted = lambda logits, target: heads.from_logits(logits)
  agent = make_agent(module, config, spec, terms={'reward': predicted})
  assert agent.model is not None and agent.evaluate is not None
  batch = make_batch(config, spec)
  # No ends: every action is the batch's and every step is trained.
  batch = without_ends(batch)
  timestep = batch.experience.timestep
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


def test_a_sweep_vmaps_over_floats_of_the_config(key):
  module, config, spec, *_ = AGENTS['efficientzero']
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
  assert_close(row(got.params, 1), alone.params, rtol=1e-4)
  # The optimiser sees no statistics: neither its rate nor its decay matter.
  statistics = got.params.statistics
  assert jax.tree.leaves(statistics)
  assert_close(row(statistics, 0), row(statistics, 2), rtol=1e-6)
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
  for which in ('muzero', 'efficientzero'):
    module, config, spec, *_ = AGENTS[which]
    with pytest.raises(ValueError, match=r'discrete actions; Arm .*\(2,\)'):
      module.make_networks(config, spec._replace(action=box, name='Arm'))
    two = {'a': spec.observation, 'b': spec.observation}
    with pytest.raises(ValueError, match='one observation array; Two'):
      module.make_networks(config, spec._replace(observation=two, name='Two'))

  module, config, spec, *_ = AGENTS['sampled_muzero']
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
