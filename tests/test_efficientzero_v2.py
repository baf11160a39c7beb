"""EfficientZero V2: its targets, candidates, searches and losses, by hand."""

import dataclasses
import re

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_tables import Tables, make_root, random_tables, recurrent_fn
from searching_cases import (
  BOX,
  END,
  TERMINATED,
  TRUNCATED,
  VECTOR,
  WIDE,
  A,
  B,
  K,
  N,
  make_batch,
  replace_extras,
  shaken,
  v2,
)
from test_agents_shared import PLAIN, drawn, windows

from agents import efficientzero_v2
from agents.core import latent, planning, sampling
from agents.core.latent import Outputs
from agents.core.targets import UnrollTargets
from agents.core.types import ArraySpec, Continuous
from agents.core.unroll import Unrolled
from networks import actions, muzero
from networks.muzero import NetworkConfig
from search import policies, proposals, sampled

ONE = np.ones(1, np.float32)
LINE = BOX._replace(action=Continuous((1,), -ONE, ONE))
TARGETS = efficientzero_v2.Config(
  gamma=0.5,
  unroll_steps=2,
  td_steps=2,
  mixed_after=0.4,
  fresh_fraction=0.2,
  reanalyze_fraction=1.0,
  total_updates=100,
  total_decisions=100,
)
NETWORK_VALUE = jnp.float32([[0, 16, 32, 64, 128]])
SEARCHED = jnp.float32([[3, 5, 7, 0, 0]])
# r_1 + r_2 / 2 + v_2 / 4 and so on, by the network's values.
RETURNS, FOUND = [10, 20, 40], [3, 5, 7]


def reanalysed(age, reward=PLAIN):
  batch = windows(*reward, None if age is None else drawn(age))
  return replace_extras(
    batch, search_value=SEARCHED, network_value=NETWORK_VALUE
  )


@pytest.mark.parametrize(
  ('step', 'age', 'value'),
  [
    (0, 1e6, RETURNS),
    (39, 1e6, RETURNS),
    (40, 0, RETURNS),
    (40, 19, RETURNS),
    (40, 20, FOUND),
    (99, 99, FOUND),
    # What was not drawn from a replay is fresh.
    (99, None, RETURNS),
  ],
)
def test_value_targets_are_mixed_by_hand(step, age, value):
  targets, metrics = efficientzero_v2.make_targets(
    TARGETS, reanalysed(age), jnp.int32(step)
  )
  np.testing.assert_array_equal(targets.value, [value])
  np.testing.assert_array_equal(targets.reward, [[9, 1, 2]])
  assert metrics['searched_share'] == (value == FOUND)
  np.testing.assert_allclose(metrics['search_gap'], (7 + 15 + 33) / 3)


def test_no_search_gives_a_value_where_an_episode_has_ended():
  # It terminates at step 1, where the state is absorbing.
  reward, _, cut, _, value = PLAIN
  window = (reward, [1, 0, 1, 1, 1], cut, [1, 1, 0, 0, 0], value)
  targets, _ = efficientzero_v2.make_targets(
    TARGETS, reanalysed(99, window), jnp.int32(99)
  )
  np.testing.assert_array_equal(targets.value, [[3, 0, 0]])
  np.testing.assert_array_equal(targets.value_mask, [[1, 1, 1]])


def test_rows_that_are_not_searched_again_keep_their_returns():
  eight = jax.tree.map(lambda x: jnp.repeat(x, 8, 0), reanalysed(99))
  config = dataclasses.replace(TARGETS, reanalyze_fraction=0.25)
  targets, metrics = efficientzero_v2.make_targets(config, eight, jnp.int32(99))
  np.testing.assert_array_equal(targets.value, [FOUND] * 2 + [RETURNS] * 6)
  assert metrics['searched_share'] == 0.25
  # Other rows have the value of a search of long ago.
  found = eight.experience.extras['search_value'].at[2:].set(1e6)
  _, metrics = efficientzero_v2.make_targets(
    config, replace_extras(eight, search_value=found), jnp.int32(99)
  )
  np.testing.assert_allclose(metrics['search_gap'], (7 + 15 + 33) / 3)
  # Without reanalysis all values are those of acting, for returns as well.
  extras = dict(eight.experience.extras)
  del extras['network_value']
  experience = eight.experience._replace(extras=extras)
  targets, _ = efficientzero_v2.make_targets(
    config, eight._replace(experience=experience), jnp.int32(0)
  )
  # 1 + 2 / 2 + 7 / 4, 2 + 4 / 2, 4 + 8 / 2.
  np.testing.assert_array_equal(targets.value, [[3.75, 4, 8]] * 8)


def test_an_update_takes_the_targets_of_its_step(key):
  # Heads start at zero, so that errors are the targets themselves.
  built = conformance.built('efficientzero_v2')
  late = built.state.params._replace(step=jnp.int32(50_000))
  state = built.state._replace(params=late)
  batch = make_batch(built.config, built.spec, seed=3)
  _, info = built.update(state, batch, key)
  x = jax.tree.map(np.asarray, batch)
  r, v = x.experience.timestep.reward, x.experience.extras['search_value']
  gamma, want = built.config.gamma, []
  for b, age in enumerate([0, 29, 30, 90]):
    z = v[b, 0]
    if age < 20:
      z = r[b, 1] + gamma * r[b, 2] + gamma**N * v[b, N]
    want.append(z)
  np.testing.assert_allclose(info.priorities, np.abs(want), rtol=1e-4)
  assert info.metrics['searched_share'] == 0.75


def test_importance_weights_have_a_least_value():
  batch = reanalysed(0)
  got = latent.with_least_weight(batch, 0.1).sample.weight
  np.testing.assert_array_equal(got, [1.0])
  small = batch.sample._replace(weight=jnp.float32([0.01]))
  got = latent.with_least_weight(batch._replace(sample=small), 0.1)
  np.testing.assert_allclose(got.sample.weight, [0.1])
  fresh = batch._replace(sample=None)
  assert latent.with_least_weight(fresh, 0.1) is fresh


# Candidates.


def test_wide_candidates_have_three_times_the_deviation(key):
  family = actions.tanh_gaussian(np.float32([-1]), np.float32([1]))
  draws = jnp.float32([[0.5], [-1.0], [0.25], [-0.5]])[None]
  parameters = jnp.zeros((1, 2))  # mean 0, deviation 1
  wide = proposals.Wide(2)
  got = proposals.propose(key, family, parameters, 4, draws=draws, wide=wide)
  want = np.tanh([0.5, -1.0, 3 * 0.25, 3 * -0.5])
  np.testing.assert_allclose(got.actions[0, :, 0], want, rtol=1e-5)
  # All weigh alike, whatever they were drawn from.
  np.testing.assert_array_equal(jax.nn.softmax(got.logits), [[0.25] * 4])
  assert not got.is_spare.any()
  narrow = proposals.propose(key, family, parameters, 4, draws=draws)
  np.testing.assert_array_equal(narrow.actions[:, :2], got.actions[:, :2])
  assert (narrow.actions[:, 2:] != got.actions[:, 2:]).all()


def test_draws_of_one_action_add_their_weights(key):
  family = actions.flat(3)
  same = family._replace(sample=lambda draws, _: jnp.int32([[2, 0]]))
  many = family._replace(
    sample=lambda draws, _: jnp.int32([[2, 0, 2, 2]])[:, : draws.shape[1]]
  )
  wide = proposals.Wide(1)
  got = proposals.propose(key, many, jnp.zeros((1, 3)), 4, wide=wide)
  np.testing.assert_allclose(
    jax.nn.softmax(got.logits), [[0.75, 0.25, 0, 0]], rtol=1e-6
  )
  np.testing.assert_array_equal(got.is_spare, [[False, False, True, True]])
  more = proposals.pad(proposals.propose(key, same, jnp.zeros((1, 3)), 2), 2)
  np.testing.assert_array_equal(more.actions, [[2, 0, 2, 2]])
  np.testing.assert_array_equal(more.is_spare, [[False, False, True, True]])
  np.testing.assert_array_equal(jax.nn.softmax(more.logits), [[0.5, 0.5, 0, 0]])


def test_nodes_below_the_root_have_fewer_actions(key):
  tables = random_tables(1, num_actions=12)
  wide = proposals.Wide(3)
  output = sampled.search(
    jax.tree.map(jnp.asarray, tables),
    key,
    make_root(tables, jnp.arange(16)),
    recurrent_fn,
    40,
    distribution=actions.flat(12),
    num_samples=5,
    wide=wide,
    leaf_samples=2,
    rule=policies.gumbel,
    evaluate_root=False,
  )
  visits = np.asarray(output.search_tree.children_visits)
  assert visits.shape == (16, 41, 5)
  assert (visits[:, 0].sum(-1) == 40).all()
  assert (visits[:, 1:, 2:] == 0).all()
  assert (visits[:, 1:, 1] > 0).any()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'wide': proposals.Wide(4)},
      'wide_samples=4: must be from 0 to num_samples=3',
    ),
    ({'wide': proposals.Wide(1, 0)}, 'wide_temperature.*above 0'),
    ({'leaf_samples': 4}, 'leaf_samples=4: must be from 1 to'),
    ({'leaf_samples': 0}, 'leaf_samples=0: must be from 1 to'),
    (
      {'wide': proposals.Wide(1), 'replacement': False},
      'replacement=False: excludes wide_samples=1',
    ),
  ],
)
def test_bad_candidates_are_refused(changes, message, key):
  tables = random_tables(1, num_actions=6)
  with pytest.raises(ValueError, match=message) as caught:
    sampled.search(
      jax.tree.map(jnp.asarray, tables),
      key,
      make_root(tables, jnp.arange(2)),
      recurrent_fn,
      4,
      distribution=actions.flat(6),
      num_samples=3,
      **changes,
    )
  assert '\n' not in str(caught.value)


def test_configs_refuse_candidates_that_nothing_chooses():
  message = 'max_considered=4: .*take num_samples=5, or wide_samples=0'
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(WIDE, max_considered=4, num_simulations=8)
  # All that are searched are considered, and other rules do not halve.
  dataclasses.replace(WIDE, max_considered=4)
  dataclasses.replace(WIDE, max_considered=4, num_simulations=8, rule='puct')
  with pytest.raises(ValueError, match=re.escape('wide_samples=6')):
    dataclasses.replace(WIDE, wide_samples=6)


# The search.


def all_of(count):
  """Every action is a candidate, in order, with one probability each."""
  each = jnp.arange(count, dtype=jnp.int32)
  return actions.flat(count)._replace(
    sample=lambda draws, _: jnp.broadcast_to(
      each[: draws.shape[1]], draws.shape[:2]
    ),
    temper=lambda parameters, _: parameters,
  )


def test_all_candidates_give_the_search_of_a_uniform_policy(key):
  tables = random_tables(2)
  config = dataclasses.replace(
    WIDE, num_simulations=24, num_samples=4, wide_samples=4, leaf_samples=0
  )
  uniform = tables._replace(logits=np.zeros_like(tables.logits))
  states = jnp.arange(16)

  def both(tables, uniform, key):
    root = make_root(tables, states)
    ours = planning.make_search(config, all_of(4))(
      tables, key, root, recurrent_fn
    )
    theirs = policies.gumbel(
      uniform,
      key,
      make_root(uniform, states),
      recurrent_fn,
      24,
      gumbel_scale=0.0,
    )
    return ours, theirs

  args = jax.tree.map(jnp.asarray, (tables, uniform))
  ours, theirs = jax.jit(both)(*args, key)
  for name in ('children_visits', 'children_index', 'node_values'):
    np.testing.assert_array_equal(
      getattr(ours.search_tree, name), getattr(theirs.search_tree, name)
    )
  np.testing.assert_array_equal(ours.action, theirs.action)
  np.testing.assert_allclose(
    ours.action_weights, theirs.action_weights, rtol=1e-5, atol=1e-7
  )


def bandit(qvalues):
  shape = (1, len(qvalues))
  return Tables(
    child=np.zeros(shape, np.int32),
    reward=np.float32([qvalues]),
    discount=np.zeros(shape, np.float32),
    logits=np.zeros(shape, np.float32),
    value=np.float32([1.0]),
  )


def test_halving_policy_and_value_by_hand(key):
  # Four candidates once, then the better two, of two phases of 4 simulations.
  qvalues = np.float32([0.0, 3.0, 4.0, 1.0])
  tables = bandit(qvalues)
  config = dataclasses.replace(
    WIDE, num_simulations=8, num_samples=4, wide_samples=4
  )
  search = planning.make_search(config, all_of(4))
  output = search(
    jax.tree.map(jnp.asarray, tables),
    key,
    make_root(tables, jnp.zeros(1, jnp.int32)),
    recurrent_fn,
  )
  visits = output.search_tree.children_visits[0, 0]
  np.testing.assert_array_equal(visits, [1, 3, 3, 1])
  sigma = (50 + 3) * 0.1 * (qvalues - 0) / (4 - 0)
  want = np.exp(sigma) / np.exp(sigma).sum()
  np.testing.assert_allclose(output.action_weights, [want], rtol=1e-5)
  assert output.action == 2
  # The search's value: the network's, and what each simulation found.
  found = (1.0 + 0 + 3 * 3 + 3 * 4 + 1) / 9
  np.testing.assert_allclose(output.value, [found], rtol=1e-6)
  best = planning.best_only(search)
  output = best(
    jax.tree.map(jnp.asarray, tables),
    key,
    make_root(tables, jnp.zeros(1, jnp.int32)),
    recurrent_fn,
  )
  np.testing.assert_array_equal(output.action_weights, [[0, 0, 1, 0]])


def test_the_best_action_has_all_weight():
  def found(action, sampled_actions=None):
    weights = jnp.full((2, 3), 1 / 3)
    output = policies.PolicyOutput(
      jnp.asarray(action), weights, jnp.zeros(2), None, sampled_actions
    )
    return planning.best_only(lambda: output)().action_weights

  np.testing.assert_array_equal(found([2, 0]), [[0, 0, 1], [1, 0, 0]])
  # Of equal candidates the first one counts.
  sets = jnp.float32([[[1, 2], [1, 3], [1, 3]], [[4, 5], [6, 7], [4, 5]]])
  action = jnp.float32([[1, 3], [4, 5]])
  np.testing.assert_array_equal(found(action, sets), [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
  ('spec', 'choice', 'is_best'),
  [
    (VECTOR, 'auto', False),
    (BOX, 'auto', True),
    (
      BOX._replace(action=Continuous((1,), BOX.action.low[:1], np.ones(1))),
      'auto',
      False,
    ),
    (BOX, 'improved', False),
    (VECTOR, 'best', True),
  ],
)
def test_which_target_a_policy_has(spec, choice, is_best):
  _, config, _ = v2(spec, policy_target=choice)
  assert efficientzero_v2.takes_best(config, spec) == is_best


def test_the_best_actions_of_a_box_are_the_targets(key):
  for name, is_best in (('', True), (' image', False)):
    built = conformance.built(f'efficientzero_v2{name}')
    fresh = built.refresh(shaken(built.state), built.batch, 0, key)
    weights = np.asarray(fresh.experience.extras['search_policy'])
    searched = weights[: B // 2, : K + 1].max(-1)
    assert (searched == 1).all() == is_best


# Losses.


def outputs(logits):
  """What a policy's terms read of the networks."""
  nothing = jnp.zeros(())
  model = Unrolled(logits, nothing, nothing, nothing, None)
  return Outputs(model, None, nothing, None)


def masks(mask):
  ones = jnp.ones_like(mask)
  return UnrollTargets(ones, ones, ones, ones, mask, ones)


def test_enumerated_policies_losses_by_hand(key):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(K + 1, B, A)).astype(np.float32)
  _, config, spec = v2(VECTOR)
  batch = make_batch(config, spec)
  mask = np.ones((B, K + 1), np.float32)
  mask[[TERMINATED, TRUNCATED], END:] = 0
  found, metrics = sampling.policy_terms(
    config,
    efficientzero_v2.make_losses(),
    sampling.family(config, spec),
    outputs(jnp.asarray(logits)),
    masks(jnp.asarray(mask)),
    batch,
    key,
  )
  p = np.exp(np.float64(logits))
  p /= p.sum(-1, keepdims=True)
  w = np.swapaxes(np.float64(batch.experience.extras['search_policy']), 0, 1)
  w = w[: K + 1]
  want = (w * np.log(w / p)).sum(-1) * mask.T
  np.testing.assert_allclose(found['policy'], want, rtol=1e-4, atol=1e-6)
  entropy = -(p * np.log(p)).sum(-1) * mask.T
  np.testing.assert_allclose(found['entropy'], -entropy, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['entropy'], entropy.sum() / mask.sum(), rtol=1e-5
  )


def test_the_best_actions_loss_is_minus_its_log_density(key):
  # Equation 7 of the paper: the other candidates do not matter.
  _, config, spec = v2(BOX)
  batch = make_batch(config, spec)
  chosen = jax.nn.one_hot(jnp.zeros((B, K + N + 1), int), 5)
  batch = replace_extras(batch, search_policy=chosen)
  logits = jnp.zeros((K + 1, B, 4))  # mean 0, deviation 1
  found, _ = sampling.policy_terms(
    config,
    efficientzero_v2.make_losses(),
    sampling.family(config, spec),
    outputs(logits),
    masks(jnp.ones((B, K + 1))),
    batch,
    key,
  )
  a = np.float64(batch.experience.extras['sampled_actions'])[:, : K + 1, 0]
  low, high = np.float64(spec.action.low), np.float64(spec.action.high)
  u = np.arctanh(2 * (a - low) / (high - low) - 1)
  normal = -0.5 * u**2 - 0.5 * np.log(2 * np.pi)
  want = -(normal - np.log1p(-(np.tanh(u) ** 2))).sum(-1)
  np.testing.assert_allclose(found['policy'], want.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', conformance.SEARCHING)
def test_loss_is_the_weighted_sum_of_its_terms(name, key):
  if 'v2' not in name:
    return
  built = conformance.built(name)
  # As sharp as a search's policy, so that no term is too small to see.
  batch = built.batch._replace(
    sample=built.batch.sample._replace(weight=jnp.ones(B))
  )
  got = built.evaluate(shaken(built.state).params, batch, key)
  want = got['loss_policy'] + 0.25 * got['loss_value'] + got['loss_reward']
  want += 2.0 * got['loss_consistency'] + 0.05 * got['loss_entropy']
  np.testing.assert_allclose(got['loss'], want / K, rtol=1e-5)


# The network.


def test_embedded_actions_keep_their_size(key):
  # A layer norm of one component alone would leave its sign.
  config = NetworkConfig(
    torso='vector',
    latent_size=6,
    blocks=0,
    norm='none',
    reward='reward',
    value_bins=3,
    reward_bins=3,
    projector=(2,),
    predictor=(2,),
    head_hidden=(),
    action_embedding=8,
  )
  networks = muzero.make(config, ArraySpec((4,)), 1, policy_size=2)
  params, stats = networks.init(key)
  state = jnp.zeros((3, 6))
  action = jnp.float32([[0.2], [0.8], [-0.2]])
  after, _ = networks.dynamics(params, stats, state, action, False)
  assert jnp.abs(after[0] - after[1]).max() > 0.05
  assert jnp.abs(after[0] - after[2]).max() > 0.05
  kernel = params['embed']['kernel']
  assert kernel.shape == (2, 8)
  embedded = np.asarray(action) @ np.asarray(kernel[:1]) + np.asarray(kernel[1])
  embedded -= embedded.mean(-1, keepdims=True)
  embedded /= np.sqrt(embedded.var(-1, keepdims=True) + 1e-5)
  joined = np.maximum(embedded, 0) @ np.asarray(params['action']['kernel'])
  np.testing.assert_allclose(after, np.maximum(joined, 0), atol=1e-5)


def test_embedded_actions_of_an_image_latent_are_all_different(key):
  config = NetworkConfig(
    torso='image',
    channels=2,
    blocks=0,
    norm='none',
    reward='reward',
    value_bins=3,
    reward_bins=3,
    projector=(2,),
    predictor=(2,),
    head_hidden=(),
    head_channels=1,
    action_embedding=8,
  )
  networks = muzero.make(config, ArraySpec((4, 3, 1)), 3)
  params, stats = networks.init(key)
  state = jnp.zeros((3, 4, 3, 2))
  after, _ = networks.dynamics(params, stats, state, jnp.arange(3), False)
  for i, j in ((0, 1), (1, 2), (0, 2)):
    assert jnp.abs(after[i] - after[j]).max() > 1e-3


def test_floats_may_be_traced(key):
  # What a sweep does; a share of rows is a shape.
  module, config, spec = v2()
  names = [
    field.name
    for field in dataclasses.fields(config)
    if isinstance(getattr(config, field.name), float)
    and field.name != 'reanalyze_fraction'
  ]
  values = {x: jnp.full(2, getattr(config, x)) for x in names}
  batch = make_batch(config, spec)

  def one(values, wide_temperature):
    swept = dataclasses.replace(
      config,
      **values,
      search=dataclasses.replace(WIDE, wide_temperature=wide_temperature),
    )
    networks = module.make_networks(swept, spec)
    agent = module.make(swept, networks, module.make_losses(), spec)
    state = agent.init(key)
    fresh = agent.refresh(state, batch, 0, key)
    return agent.update(state, fresh, key)[1].priorities

  shape = jax.eval_shape(jax.vmap(one), values, jnp.float32([4, 9])).shape
  assert shape == (2, B)
