"""Probe environments whose values are known: each needs one ability.

All four tasks share one compiled program, vmapped over the tasks: where one
fails, its name says what is broken.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_agents import make_agent

from agents import efficientzero, muzero, sampled_muzero
from agents.core import planning, replay
from agents.core.types import ArraySpec, Continuous, Discrete, Spec
from experiments.runtime import loop, sources
from experiments.runtime.sources import Pace
from networks.muzero import NetworkConfig
from search.model import Environment, TimeStep

GAMMA = 0.5
CONSTANT, DELAYED, OBSERVED, CHOSEN = range(4)
UPDATES = 300
SPEC = Spec(ArraySpec((3,), np.float32), Discrete(2), name='Probe')


def make_probe(task):
  """A probe; `task` may be traced.

  CONSTANT: one decision, reward 1. DELAYED: two decisions, reward 1 behind
  the second. OBSERVED: one decision, the reward is the sign that is observed.
  CHOSEN: one decision, action 1 gives 1 and action 0 gives -1.

  Observations are `[1, t, sign]`.
  """

  def timestep(t, sign, reward, is_first):
    last = t == jnp.where(task == DELAYED, 2, 1)
    return TimeStep(
      observation=jnp.stack([1.0, jnp.float32(t), sign]),
      reward=jnp.float32(jnp.where(last, reward, 0.0)),
      discount=1.0 - last.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=jnp.asarray(False),
    )

  def reset(key):
    sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
    sign = jnp.where(task == OBSERVED, sign, 0.0)
    return (jnp.int32(0), sign), timestep(0, sign, 0.0, True)

  def step(state, action, key):
    del key
    t, sign = state[0] + 1, state[1]
    chosen = jnp.where(action == 1, 1.0, -1.0)
    reward = jnp.stack([1.0, 1.0, sign, chosen])[task]
    return (t, sign), timestep(t, sign, reward, False)

  return Environment(reset, step, SPEC)


def small_config(module, **changes):
  network = NetworkConfig(
    latent_size=16,
    blocks=0,
    norm='layer',
    lstm_size=16,
    value_bins=5,
    reward_bins=5,
    projector=(16,),
    predictor=(16,),
    head_hidden=(16,),
  )
  return module.Config(
    network=network,
    search=planning.SearchConfig(
      rule='puct' if module is muzero else 'efficientzero', num_simulations=6
    ),
    gamma=GAMMA,
    unroll_steps=2,
    td_steps=2,
    value_weight=1.0,
    optimiser='adam',
    learning_rate=0.01,
    warmup_updates=0,
    weight_decay=0.0,
    target_period=20,
    total_updates=UPDATES,
    **changes,
  )


@functools.cache
def trained(module):
  """The agent and its parameters, one row a task."""
  changes = {'total_decisions': 10_000} if module is efficientzero else {}
  config = small_config(module, **changes)
  agent = make_agent(module, config, SPEC)
  key = jax.random.key(0)

  def source(task):
    inner = sources.from_env(make_probe(task), agent, 4)
    kept = replay.device_replay(1024, 32, config.window)
    pace = Pace(4, 64, Fraction(4))
    windows = sources.replayed(inner, kept, pace, total_updates=UPDATES)
    return sources.reanalyzed(windows, agent)

  def train(task):
    carry = loop.init(agent, source(task), key)
    carry = carry._replace(step=jnp.zeros((), jnp.int32))
    interval = loop.compile_interval(agent, source(task))
    return interval(carry, key, UPDATES)[0].agent.params

  return agent, jax.jit(jax.vmap(train))(jnp.arange(4))


def predictions(module, task, observation, actions):
  """Value, prior and the model's rewards along actions, at one observation."""
  agent, params = trained(module)
  params = jax.tree.map(lambda x: x[task], params)
  observation = jnp.float32(observation)[None]
  one = jnp.ones(1)
  timestep = TimeStep(observation, 0 * one, one, one > 0, one < 0)
  key = jax.random.key(0)

  @jax.jit
  def look(params):
    root = agent.model.root(params, timestep, key)
    embedding, rewards = root.embedding, []
    for action in actions:
      output, embedding = agent.model.step(
        params, key, jnp.int32([action]), embedding
      )
      rewards.append(output.reward[0])
    prior = jax.nn.softmax(root.prior_logits[0])
    return root.value[0], prior, jnp.stack(rewards)

  return look(params)


both = pytest.mark.parametrize('module', [muzero, efficientzero])


@pytest.mark.slow
@both
def test_a_constant_reward_is_learned(module):
  value, _, rewards = predictions(module, CONSTANT, [1, 0, 0], [0, 1])
  np.testing.assert_allclose(value, 1, atol=0.05)
  # Behind the end there is no more.
  np.testing.assert_allclose(rewards, [1, 0], atol=0.1)


@pytest.mark.parametrize(
  'module', [pytest.param(muzero, marks=pytest.mark.slow), efficientzero]
)
def test_a_delayed_reward_is_discounted(module):
  value, _, rewards = predictions(module, DELAYED, [1, 0, 0], [0, 1])
  np.testing.assert_allclose(value, GAMMA, atol=0.05)
  np.testing.assert_allclose(rewards, [0, 1], atol=0.1)
  value, _, _ = predictions(module, DELAYED, [1, 1, 0], [0])
  np.testing.assert_allclose(value, 1, atol=0.05)


@both
@pytest.mark.parametrize('sign', [-1, 1])
def test_a_reward_that_is_observed_before(module, sign):
  value, _, rewards = predictions(module, OBSERVED, [1, 0, sign], [1])
  np.testing.assert_allclose(value, sign, atol=0.1)
  np.testing.assert_allclose(rewards, [sign], atol=0.15)


@both
def test_a_better_action_is_found(module):
  for action, reward in ((0, -1), (1, 1)):
    value, prior, rewards = predictions(module, CHOSEN, [1, 0, 0], [action])
    np.testing.assert_allclose(rewards, [reward], atol=0.15)
  assert prior[1] > 0.75
  # It explores, and so earns a little less than 1.
  assert 0.6 < value < 1.05


TARGETS = (-1.0, 0.5)  # the best action where the sign is -1, and where it is 1
BOX = Spec(
  ArraySpec((2,), np.float32),
  Continuous((1,), np.float32([-1.5]), np.float32([1.5])),
  name='Target',
)


def make_target():
  """One decision of one number, the reward is minus its squared distance.

  The target depends on the sign that is observed, `[1, sign]`.
  """

  def timestep(sign, reward, is_first):
    return TimeStep(
      observation=jnp.stack([1.0, sign]),
      reward=jnp.float32(reward),
      discount=jnp.float32(is_first),
      is_first=jnp.asarray(is_first),
      truncated=jnp.asarray(False),
    )

  def reset(key):
    sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
    return sign, timestep(sign, 0.0, True)

  def step(sign, action, key):
    del key
    target = jnp.where(sign > 0, TARGETS[1], TARGETS[0])
    return sign, timestep(sign, -((action[0] - target) ** 2), False)

  return Environment(reset, step, BOX)


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['gaussian', 'factored'])
def test_a_real_action_is_found(policy):
  updates, module = 1000, sampled_muzero
  config = module.Config(
    network=NetworkConfig(
      latent_size=16,
      blocks=0,
      norm='layer',
      value_bins=11,
      reward_bins=11,
      head_hidden=(16,),
    ),
    search=planning.SearchConfig(rule='puct', num_simulations=8, num_samples=8),
    policy=policy,
    gamma=GAMMA,
    unroll_steps=1,
    td_steps=1,
    value_weight=1.0,
    learning_rate=0.01,
    warmup_updates=0,
    weight_decay=0.0,
    target_period=20,
    total_updates=updates,
  )
  agent = make_agent(module, config, BOX)
  inner = sources.from_env(make_target(), agent, 4)
  kept = replay.device_replay(1024, 32, config.window)
  windows = sources.replayed(
    inner, kept, Pace(4, 64, Fraction(4)), total_updates=updates
  )
  source = sources.reanalyzed(windows, agent)
  planner = planning.make_planner(config.search, evaluate=True)
  key = jax.random.key(0)

  def returns(params):
    # 64 episodes of each sign, with search and without noise.
    num = 64
    sign = jnp.repeat(jnp.float32([-1, 1]), num)
    one = jnp.ones(2 * num)
    timestep = TimeStep(
      jnp.stack([one, sign], -1), 0 * one, one, one > 0, one < 0
    )
    action = planner(agent.model, params, key, timestep).action[:, 0]
    target = jnp.repeat(jnp.float32(TARGETS), num)
    return -jnp.square(action - target).reshape(2, num).mean(1)

  @jax.jit
  def before_and_after(key):
    carry = loop.init(agent, source, key)
    carry = carry._replace(step=jnp.zeros((), jnp.int32))
    trained = loop.compile_interval(agent, source)(carry, key, updates)[0]
    return returns(carry.agent.params), returns(trained.agent.params)

  before, after = before_and_after(key)
  # The mode at first is the middle or an end, off by 0.5 or more.
  assert (before < -0.2).all() and (after > -0.05).all(), (before, after)
