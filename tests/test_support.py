"""What lies beyond the support of value and reward heads is said."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import efficientzero, efficientzero_v2, muzero, sampled_muzero
from agents.core.types import (
  ArraySpec,
  Continuous,
  Discrete,
  Experience,
  Spec,
  Trajectory,
)
from experiments import build
from experiments.build import environment, support
from experiments.files import tables
from experiments.training import run
from networks import heads
from networks.muzero import NetworkConfig
from search.model import Environment, TimeStep

NETWORK: dict[str, Any] = {
  'torso': 'vector',
  'latent_size': 8,
  'blocks': 0,
  'norm': 'layer',
  'head_hidden': (8,),
  'value_bins': 21,
  'reward_bins': 21,
}
DISCRETE = Discrete(2)
CONTINUOUS = Continuous((1,), -np.ones(1), np.ones(1))
END = heads.support_end(21)


@pytest.mark.parametrize('bins', [3, 21, 51, 601])
def test_the_support_ends_where_two_hot_saturates(bins):
  end = heads.support_end(bins)
  inside, outside = jnp.float32([0.99 * end, 1.01 * end])
  back = lambda x: heads.from_logits(jnp.log(heads.to_two_hot(x, bins)))
  np.testing.assert_allclose(back(inside), inside, rtol=1e-3)
  np.testing.assert_allclose(back(outside), end, rtol=1e-3)
  both = jnp.float32([0, inside, -inside, end, -end, outside, -outside])
  assert heads.beyond(both, bins).tolist() == [False] * 5 + [True] * 2
  assert heads.bins_for(end) == bins
  more = heads.bins_for(1.01 * end)
  assert heads.support_end(more - 2) < 1.01 * end <= heads.support_end(more)


def episode(rewards, action):
  """One window `[1, L]` of an episode that ends with the last reward."""
  count = len(rewards)
  discount = jnp.ones(count).at[-1].set(0.0)[None]
  timestep = TimeStep(
    observation=jnp.zeros((1, count, 2)),
    reward=jnp.float32(rewards)[None],
    discount=discount,
    is_first=jnp.arange(count)[None] == 0,
    truncated=jnp.zeros((1, count), bool),
  )
  extras = {
    'search_policy': jnp.full((1, count, 2), 0.5),
    'search_value': jnp.zeros((1, count)),
    'sampled_actions': jnp.zeros((1, count, 2, 1)),
  }
  return Trajectory(
    Experience(timestep, action, extras), jnp.ones((1, count), bool), None
  )


def metrics_of(module, rewards, **changes):
  """Metrics of an update towards an episode's rewards."""
  kind = CONTINUOUS if module is sampled_muzero else DISCRETE
  config = module.Config(
    network=NetworkConfig(**NETWORK),
    unroll_steps=2,
    td_steps=2,
    gamma=0.5,
    **changes,
  )
  spec = Spec(ArraySpec((2,), np.float32), kind, name='given')
  networks = module.make_networks(config, spec)
  agent = module.make(config, networks, module.make_losses(), spec)
  shape = (1, len(rewards), *getattr(kind, 'shape', ()))
  action = jnp.zeros(shape, jnp.float32 if shape[2:] else jnp.int32)
  state = jax.jit(agent.init)(jax.random.key(0))
  _, info = agent.update(state, episode(rewards, action), jax.random.key(1))
  return {name: float(x) for name, x in info.metrics.items()}


PLAIN = {'consistency': False, 'value_prefix': False}
PREFIX = {'consistency': False, 'value_prefix': True}
AGENTS = [
  (muzero, {}, False),
  (efficientzero, PLAIN | {'augmentation': False}, False),
  (efficientzero, PREFIX | {'augmentation': False}, True),
  (sampled_muzero, PLAIN | {'augmentation': False}, False),
  (efficientzero_v2, PLAIN | {'augmentation': False}, False),
]


@pytest.mark.parametrize('module,changes,prefix', AGENTS)
def test_every_agent_counts_what_its_heads_cut_off(module, changes, prefix):
  # Steps 0 to 2 are trained; the last but one row is not yet the end.
  rewards = [0.0, 100.0, 100.0, 0.0, 0.0]
  found = metrics_of(module, rewards, **changes)
  # Values: 100 + 50, 100, 0; rewards: 100, 100, or their sums 100, 200.
  assert found['value_clipped'] == pytest.approx(1 / 3)
  assert found['value_largest'] == pytest.approx(150)
  assert found['reward_clipped'] == pytest.approx(0.5 if prefix else 0)
  assert found['reward_largest'] == pytest.approx(200 if prefix else 100)
  within = metrics_of(module, [0.0, 50.0, -50.0, 0.0, 0.0], **changes)
  assert within['value_clipped'] == within['reward_clipped'] == 0


def test_the_line_names_the_bound_the_value_and_the_field():
  settings = ('reward_bins=21', 'value_bins=601')
  experiment = build.describe('muzero_catch', settings=settings)
  row = {'value_clipped': 0.0, 'value_largest': 900.0}
  row |= {'reward_clipped': 0.5, 'reward_largest': 900.0}
  line = support.warning(experiment, row)
  assert line is not None and '\n' not in line
  for words in ('50% of the reward', '117.4', '900', '--set=reward_bins=61'):
    assert words in line
  assert 'value_bins' not in line
  # What it tells to set is a setting, and is enough.
  (setting,) = re.findall(r'--set=(\S+)', line)
  better = build.describe('muzero_catch', settings=(*settings, setting))
  assert heads.support_end(better.config.network.reward_bins) > 900
  assert support.warning(experiment, row | {'reward_clipped': 0.009}) is None
  assert support.warning(experiment, {'loss': 1.0}) is None


def test_the_worst_row_of_a_curve_is_told_of():
  rows = [{'loss': 1.0}, {'reward_clipped': 0.3}, {'value_clipped': 0.2}]
  assert support.worst(rows) == rows[1]
  assert support.worst([]) == {}


def arms(scale):
  """A bandit: one decision, and the end."""

  def timestep(t, reward, first):
    return TimeStep(
      observation=jnp.array([1.0, t.astype(jnp.float32)]),
      reward=reward,
      discount=1.0 - t,
      is_first=jnp.asarray(first),
      truncated=jnp.asarray(False),
    )

  rewards = scale * jnp.array([3.0, 9.0])
  reset = lambda key: (
    jnp.int32(0),
    timestep(jnp.int32(0), jnp.float32(0), True),
  )
  step = lambda t, action, key: (t + 1, timestep(t + 1, rewards[action], False))
  spec = Spec(ArraySpec((2,), np.float32), DISCRETE, name='arms')
  return Environment(reset, step, spec)


@pytest.mark.parametrize('scale', [1.0, 100.0])
def test_a_run_says_it_once(scale, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(
    environment, 'make_env', lambda *args, **named: arms(scale)
  )
  settings = [
    'value_bins=601',
    'blocks=0',
    'head_hidden=8',
    'latent_size=8',
    'torso=vector',
    'num_simulations=2',
    'env.num_envs=4',
    'warmup_decisions=60',
    'batch_size=8',
    'unroll_steps=2',
    'td_steps=2',
    'reanalyze_fraction=0',
    'log_every=5',
    'devices=1',
    'checkpoint_every=100',
    'early_update=0',
    'final_episodes=0',
  ]
  experiment = build.describe(
    'muzero_catch', env='jax:catch', steps=122, settings=settings
  )
  run.run(experiment, tmp_path)
  lines = [s for s in capsys.readouterr().out.splitlines() if 'support' in s]
  assert len(lines) == (scale > 1)
  if lines:
    assert 'reward targets' in lines[0] and 'to about 900' in lines[0]
  # Every second time step is an episode's end: 31 rows of decisions, and the
  # 30 between them, of which 15 are there before the first update.
  _, rows = tables.read_csv(tmp_path / 'metrics.csv')
  assert float(rows[-1]['decisions']) == 124
  assert int(rows[-1]['step']) == 61 - 15 + 1
