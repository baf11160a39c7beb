"""Which prediction meets which target, and what a config's fields reach.

A slice that is off by one leaves all shapes, masks and untrained losses as
they are. Here products of prediction and target take the place of the losses,
and the walk along the unroll, by the networks themselves, is the test's own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS
from searching_cases import NETWORK, K, N, make_batch, shaken, without_ends
from small_agents import make_agent

from agents import alphazero, efficientzero, muzero, sampled_muzero
from agents.core import optim, sampling
from networks import heads

SCALE, RESET = 3.0, 2


def product(logits, target):
  return heads.from_logits(logits) * target


def weighted(scores, weights):
  return jnp.sum(scores * weights, -1)


def compared(prediction, target):
  # Not the same with the two exchanged.
  return jnp.sum(prediction * jnp.square(target), -1)


def walk(networks, params, observation, action, resets):
  """Predictions at steps 0 to K, and projections at 1 to K, by hand."""
  network, stats, _ = params
  project = lambda state: networks.project(network, stats, state, False)[0]
  represent = lambda x: networks.represent(network, stats, x, False)[0]
  state = represent(observation[:, 0])
  first = carry = networks.initial_carry(state.shape[0])
  policies, values, rewards, pairs = [], [], [0.0], []
  for k in range(K + 1):
    if k > 0:
      old = state
      if resets and (k - 1) % RESET == 0:
        carry = first
      a = action[:, k - 1]
      state, _ = networks.dynamics(network, stats, old, a, False)
      reward, carry, _ = networks.reward(
        network, stats, old, a, state, carry, False
      )
      rewards.append(heads.from_logits(reward))
      ours, _ = networks.predict_projection(
        network, stats, project(state), False
      )
      pairs.append((ours, project(represent(observation[:, k]))))
    policy, value, _ = networks.predict(network, stats, state, False)
    policies.append(policy)
    values.append(heads.from_logits(value))
  return policies, values, rewards, pairs


@pytest.mark.parametrize(
  'which', ['muzero', 'efficientzero', 'sampled_efficientzero']
)
def test_predictions_meet_the_targets_of_their_step(which, key):
  module, config, spec, *_ = AGENTS[which]
  config = dataclasses.replace(config, network=NETWORK)
  scale, terms = 1.0, {'policy': weighted, 'value': product, 'reward': product}
  has_prefix = module is not muzero
  if module is sampled_muzero:
    config, scale = dataclasses.replace(config, reward_scale=SCALE), SCALE
  if has_prefix:
    assert config.prefix_horizon == RESET
    terms['consistency'] = compared
  networks = module.make_networks(config, spec)
  losses = module.make_losses()._replace(**terms)
  agent = module.make(config, networks, losses, spec)
  batch = without_ends(make_batch(config, spec))
  params = shaken(jax.jit(agent.init)(key)).params
  timestep, action = batch.experience.timestep, batch.experience.action

  @jax.jit
  def by_hand(params):
    first = jax.tree.map(lambda x: x[:, 0], timestep)
    root = agent.model.root(params, first, key)
    step, _ = agent.model.step(params, key, action[:, 0], root.embedding)
    found = walk(networks, params, timestep.observation, action, has_prefix)
    return found, step.discount

  (policies, values, rewards, pairs), discount = by_hand(params)
  np.testing.assert_allclose(discount, config.gamma, rtol=1e-6)
  extras = batch.experience.extras
  r, v = scale * timestep.reward, extras['search_value']
  want = dict.fromkeys(terms, 0.0)
  prefix = 0.0
  for k in range(K + 1):
    scores = policies[k]
    if module is sampled_muzero:
      family = sampling.make_distribution(config, spec)
      scores = family.log_prob(scores, extras['sampled_actions'][:, k])
    want['policy'] += weighted(scores, extras['search_policy'][:, k])
    z = sum(config.gamma**i * r[:, k + 1 + i] for i in range(N))
    want['value'] += values[k] * (z + config.gamma**N * v[:, k + N])
    if k > 0:
      starts = not has_prefix or (k - 1) % RESET == 0
      prefix = r[:, k] + (0.0 if starts else prefix)
      want['reward'] += rewards[k] * prefix
      if has_prefix:
        want['consistency'] += compared(*pairs[k - 1])
  got = jax.jit(agent.evaluate)(params, batch, key)
  for name, rows in want.items():
    assert jnp.std(rows) > 1e-3, name
    np.testing.assert_allclose(
      got[f'loss_{name}'], jnp.mean(rows), rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize('which', ['muzero', 'efficientzero'])
def test_acting_is_colder_late_in_training(which, key):
  module, config, spec, *_ = AGENTS[which]
  agent = make_agent(module, dataclasses.replace(config, network=NETWORK), spec)
  params = shaken(jax.jit(agent.init)(key)).params
  timestep = make_batch(config, spec).experience.timestep
  rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), timestep)
  act = jax.jit(jax.vmap(agent.act, (None, 0, None)))
  keys = jax.random.split(key, 8)

  def greedy(step):
    """How often the action that was searched most is taken."""
    action, extras = act(params._replace(step=jnp.int32(step)), keys, rows)
    weight = extras['search_policy']
    taken = jnp.take_along_axis(weight, action[..., None], -1)[..., 0]
    return jnp.mean(taken == weight.max(-1))

  assert greedy(0) + 0.03 < greedy(config.total_updates)


@pytest.mark.parametrize('module', [muzero, efficientzero, alphazero])
def test_the_optimiser_is_the_configs(module):
  config = module.Config(
    optimiser='sgd',
    learning_rate=0.5,
    warmup_updates=0,
    momentum=0.5,
    weight_decay=0.25,
    max_gradient_norm=1.0,
  )
  optimiser = optim.from_config(config, config.optimiser)
  params = jnp.float32([2.0, 0.0])
  state = optimiser.init(params)
  # (0.6, 0.8) once clipped, (1.1, 0.8) with the decay.
  for factor in (1.0, 1.5):
    updates, state = optimiser.update(jnp.float32([3.0, 4.0]), state, params)
    np.testing.assert_allclose(
      updates, [-0.55 * factor, -0.4 * factor], rtol=1e-6
    )
