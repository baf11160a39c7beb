"""Terminal rewards: what an ensemble learns of them, and plans with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import push
import pytest
from offline_cases import make_agent

from agents import dynamics
from agents.core import rollout
from agents.core.types import ArraySpec, Continuous, Spec, Transition
from experiments import build
from experiments.build import dataset
from experiments.data import npz
from experiments.files.errors import UserError
from experiments.playing import known

BOUND = np.ones(2, np.float32)
MOMENTS = np.zeros(2, np.float32), np.full(2, 0.5, np.float32)
SPEC = Spec(
  ArraySpec((2,), 'float32'),
  Continuous((2,), -BOUND, BOUND),
  statistics=MOMENTS,
)
# As the preset's, with fewer members; rewards as they come.
CONFIG = dynamics.Config(
  widths=(64, 64), outcome_widths=(64, 64), members=2, elites=2
)


def transitions(seed):
  rows = push.make_rows(20_000, seed)
  return Transition(
    rows.observation,
    rows.action,
    rows.reward,
    1 - rows.terminated.astype(np.float32),
    rows.next_observation,
  )


@functools.cache
def learned():
  """An ensemble after 3,000 updates, and its last metrics."""
  rows = jax.tree.map(jnp.asarray, transitions(0))
  networks = dynamics.make_networks(CONFIG, SPEC)
  agent = make_agent(dynamics, CONFIG, SPEC, networks)

  def body(state, key):
    at = jax.random.randint(key, (128,), 0, rows.r_t.size)
    state, info = agent.update(state, jax.tree.map(lambda x: x[at], rows), key)
    return state, info.metrics

  @jax.jit
  def train(state, key):
    return jax.lax.scan(body, state, jax.random.split(key, 3000))

  state, metrics = train(agent.init(jax.random.key(0)), jax.random.key(1))
  return networks, state.params, jax.tree.map(lambda x: x[-1], metrics)


def test_ends_and_what_they_pay_are_learned():
  networks, params, metrics = learned()
  rows = transitions(1)
  ended = rows.discount_t == 0
  assert 0.02 < ended.mean() < 0.05
  out = jax.jit(functools.partial(rollout.expect, networks))(
    params, rows.o_tm1, rows.a_tm1
  )
  chance = 1 - np.asarray(out.discount_t)
  # In one network with the change it is 0.1, and the reward is off by 10.
  assert chance[ended].mean() > 0.5
  assert chance[~ended].mean() < 0.02
  # Of 10, in proportion to the chance.
  missed = np.abs(np.asarray(out.r_t) - rows.r_t)
  assert missed[ended].mean() < 5
  assert missed[~ended].mean() < 0.2
  # The metrics are of rows that were held out.
  np.testing.assert_allclose(
    metrics['end_chance'], chance[ended].mean(), atol=0.2
  )
  np.testing.assert_allclose(
    metrics['end_reward_error'], missed[ended].mean(), atol=2.0
  )
  assert metrics['end_chance_else'] < 0.02
  assert 0.01 < metrics['end_share'] < 0.07


def test_the_reward_of_either_case_is_exact():
  networks, params, _ = learned()
  rows = transitions(1)
  ended = rows.discount_t == 0
  out = jax.jit(networks.apply)(params.network, rows.o_tm1, rows.a_tm1)
  reward = np.asarray(out.reward)
  # Whether it ends may be in doubt; what it then pays is not.
  assert np.abs(reward[:, ended, 1] - 10).mean() < 1
  assert np.abs(reward[:, ~ended, 0] - rows.r_t[~ended]).mean() < 0.05


def test_drawn_steps_get_the_reward_of_their_end(key):
  networks, params, _ = learned()
  rows = transitions(1)
  out = jax.jit(functools.partial(rollout.predict, networks))(
    params, key, rows.o_tm1, rows.a_tm1
  )
  ended, reward = np.asarray(out.discount_t) == 0, np.asarray(out.r_t)
  assert ended.sum() > 300
  assert (reward[ended] > 8).mean() > 0.95
  assert (reward[~ended] < 1).all()


def test_a_rule_of_the_user_takes_the_place_of_what_was_learned():
  networks, params, _ = learned()
  rows = transitions(1)
  rules = known.load('', 'push:goes_to_goal', SPEC, 1.0)
  networks = networks._replace(known=rules)
  out = jax.jit(functools.partial(rollout.expect, networks))(
    params, rows.o_tm1, rows.a_tm1
  )
  ended = rows.discount_t == 0
  right = (np.asarray(out.discount_t) == 0) == ended
  assert right.mean() > 0.995
  assert set(np.unique(out.discount_t)) == {0.0, 1.0}


def test_data_are_learned_from_in_the_environment_that_they_name(tmp_path):
  npz.save(push.make_rows(60, 0), tmp_path / 'push')
  data, env = str(tmp_path / 'push'), 'gymnasium:push:Push-v0'
  experiment = build.describe('bc_small', dataset=data, env=env)
  assert experiment.env_name == env
  # What a run prints when it begins reads the data's own name again.
  assert dataset.notes(experiment) == ()
  with pytest.raises(UserError, match='code that a file names is not executed'):
    build.describe('bc_small', dataset=data)


def cost(observation, action, following):
  return jnp.sum(jnp.abs(following), -1) + 0 * action[:, 0]


def one_for_all(observation, action, following):
  return jnp.sum(following)


def test_rewards_of_a_rule_are_in_the_units_of_the_environment():
  rules = known.load('test_push:cost', '', SPEC, 0.1)
  assert rules.termination is None
  o = jnp.array([[1.0, -2.0]])
  np.testing.assert_allclose(rules.reward(o, o, o), [0.3], rtol=1e-6)


@pytest.mark.parametrize(
  'name, message',
  [
    ('push', 'must be MODULE:FUNCTION'),
    ('pushed:rule', 'importing pushed raised ModuleNotFoundError'),
    ('push:none', 'push has no function none'),
    ('push:GOAL', 'push has no function GOAL'),
    ('test_push:one_for_all', r'returned shape \(\) for a batch of 2'),
    ('push:move', r'raised TypeError'),
  ],
)
def test_a_bad_rule_is_one_line(name, message):
  with pytest.raises(UserError, match=message) as error:
    known.load('', name, SPEC, 1.0)
  assert '\n' not in str(error.value)
  assert str(error.value).startswith(f'termination_rule={name}: ')
