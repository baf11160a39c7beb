"""Evaluation: whole episodes, the same number from every environment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_equal

from agents.core import planning
from agents.core.types import Agent, ArraySpec, Continuous, Discrete, Spec
from agents.core.unroll import Params, learned_model
from experiments import build
from experiments.envs.catch import make_catch
from experiments.envs.envpool import make_envpool
from experiments.envs.host import EpisodeStats, HostEnvironment, Simulator
from experiments.runtime import evaluate
from networks import muzero
from networks.muzero import NetworkConfig
from search import rows
from search.model import Environment, TimeStep


def catcher(params, key, timestep):
  """Moves the paddle under the ball; `params` is added to its goal."""
  picture = timestep.observation[..., 0]
  ball = jnp.argmax(picture[:, :-1].any(1), -1)
  paddle = jnp.argmax(picture[:, -1], -1)
  goal = ball + params
  return (1 + jnp.sign(goal - paddle)).astype(jnp.int32)


play = jax.jit(catcher)


def uneven_env():
  """Episodes of 1 decision with return 1, and of 5 with return 10."""
  lengths, returns = np.array([1, 5]), np.array([1.0, 10.0])

  def start(seed):
    t = np.zeros(2, int)

    def time_step():
      return TimeStep(
        observation=t[:, None].astype(np.float32),
        reward=np.zeros(2, np.float32),  # clipped for the agent
        discount=(t < lengths).astype(np.float32),
        is_first=t == 0,
        truncated=np.zeros(2, bool),
      )

    def step(action):
      t[:] = np.where(t == lengths, 0, t + 1)
      done = t == lengths
      return time_step(), EpisodeStats(done, done * returns, done * lengths)

    return Simulator(time_step, step, lambda: None)

  spec = Spec(ArraySpec((1,), np.float32), Discrete(2))
  return HostEnvironment(spec, 2, start)


def test_short_episodes_count_no_more_than_long_ones(key):
  noop = lambda params, key, timestep: np.zeros(2, np.int32)
  for wanted, each in ((6, 3), (5, 3), (1, 1)):
    got = evaluate.on_host(
      uneven_env(), noop, None, key=key, num_episodes=wanted, seed=0
    )
    np.testing.assert_array_equal(got.returns, [1.0] * each + [10.0] * each)
    np.testing.assert_array_equal(got.lengths, [1] * each + [5] * each)


def test_an_episode_without_end_is_cut_and_said_so(key, capsys):
  noop = lambda params, key, timestep: np.zeros(2, np.int32)
  play = lambda bound: evaluate.on_host(
    uneven_env(), noop, None, key=key, num_episodes=4, seed=0, max_steps=bound
  )
  # The copy that is cut plays no other episode.
  got = play(4)
  np.testing.assert_array_equal(got.lengths, [1, 1, 4])
  np.testing.assert_array_equal(got.returns, [1, 1, 0])
  assert '1 of 3 episodes did not end within 4 dec' in capsys.readouterr().out
  np.testing.assert_array_equal(play(5).lengths, [1, 1, 5, 5])
  assert not capsys.readouterr().out


def test_summary():
  got = evaluate.Episodes(np.array([1.0, 3.0]), np.array([4, 6])).summary()
  assert got == {'eval_return': 2, 'eval_return_se': 1, 'eval_length': 5}
  one = evaluate.Episodes(np.array([2.0]), np.array([4])).summary()
  assert one == {'eval_return': 2, 'eval_return_se': 0, 'eval_length': 4}


def as_host(env, num_envs):
  """A pure environment as a host's, drawn as `on_device` draws it."""
  step_all = jax.jit(jax.vmap(env.step))

  def start(seed):
    reset_key, _ = jax.random.split(jax.random.key(seed))
    keys = jax.random.split(reset_key, num_envs)
    state, timestep = jax.vmap(env.reset)(keys)
    returns, t = np.zeros(num_envs), 0

    def step(action):
      nonlocal state, t
      state, timestep = step_all(state, action, keys)
      returns[:] += timestep.reward
      t += 1
      done = np.asarray(timestep.is_last())
      return timestep, EpisodeStats(done, done * returns, done * t)

    return Simulator(lambda: timestep, step, lambda: None)

  return HostEnvironment(env.spec, num_envs, start)


def test_device_and_host_play_the_same_episodes():
  env, num = make_catch(), 16
  for offset, best in ((0, True), (1, False)):
    key = jax.random.key(3)
    device = evaluate.on_device(env, catcher, offset, key=key, num_episodes=num)
    host = evaluate.on_host(
      as_host(env, num), play, offset, key=key, num_episodes=num, seed=3
    )
    np.testing.assert_array_equal(device.returns, host.returns)
    np.testing.assert_array_equal(device.lengths, host.lengths)
    np.testing.assert_array_equal(device.lengths, [9] * num)
    assert (device.returns.dtype, device.lengths.dtype) == (
      np.float64,
      np.int64,
    )
    # One beside the ball it only catches in the last column, at the wall.
    assert set(device.returns) == ({1.0} if best else {1.0, -1.0})


def test_envpools_catch_is_played_like_ours():
  env = make_envpool('Catch-v0', 4)
  columns, returns = [], []

  def watched(params, key, timestep):
    if timestep.is_first[0]:
      columns.extend(timestep.observation[:, 0, :, 0].argmax(-1))
    return play(params, key, timestep)

  for offset in (0, 1):
    columns.clear()
    got = evaluate.on_host(
      env, watched, offset, key=jax.random.key(0), num_episodes=20, seed=1
    )
    np.testing.assert_array_equal(got.lengths, [9] * 20)
    by_env = np.reshape(columns, (-1, 4))[:5].T.reshape(-1)
    caught = by_env == 4 if offset else np.ones(20, bool)
    np.testing.assert_array_equal(got.returns, np.where(caught, 1.0, -1.0))
    returns.append(got.returns.mean())
  assert returns[0] == 1.0 > returns[1]


def test_devices_share_the_episodes(key):
  # It draws its actions, and so does the environment its balls.
  env, devices = make_catch(), jax.devices()
  assert len(devices) == 2

  @jax.jit
  def chance(params, key, timestep):
    draw = lambda key, shape: jax.random.randint(key, shape, 0, params)
    return rows.draw(draw, key, timestep.reward.shape)

  played = lambda **kw: evaluate.on_device(env, chance, 3, key=key, **kw)
  one = played(num_episodes=12)
  two = played(num_episodes=12, devices=devices)
  assert set(one.returns) == {1.0, -1.0}
  assert_equal(two, one)
  # What cannot be shared equally is not.
  odd = played(num_episodes=7, devices=devices)
  assert odd.returns.shape == (7,)


def test_episodes_on_the_device_are_cut(key):
  got = evaluate.on_device(
    make_catch(), catcher, 0, key=key, num_episodes=3, max_steps=5
  )
  np.testing.assert_array_equal(got.lengths, [5] * 3)
  np.testing.assert_array_equal(got.returns, [0.0] * 3)


def test_continuous_actions_on_the_device(key):
  # The spec of such an environment holds arrays, which cannot be hashed.
  bound = np.ones(1, np.float32)

  def timestep(reward, discount, first):
    return TimeStep(
      jnp.zeros(1), reward, discount, jnp.asarray(first), jnp.asarray(False)
    )

  env = Environment(
    reset=lambda key: (0.0, timestep(jnp.zeros(()), jnp.ones(()), True)),
    step=lambda s, a, key: (s, timestep(a[0], jnp.zeros(()), False)),
    spec=Spec(ArraySpec((1,)), Continuous((1,), -bound, bound)),
  )
  act = lambda params, key, timestep: jnp.full((3, 1), params)
  got = evaluate.on_device(env, act, 0.25, key=key, num_episodes=3)
  np.testing.assert_array_equal(got.returns, [0.25] * 3)


def test_player_plans_with_a_model(key):
  config = NetworkConfig(
    torso='vector', latent_size=4, blocks=0, norm='none', reward='reward',
    value_bins=5, reward_bins=5, projector=(2,), predictor=(2,),
  )  # fmt: skip
  spec = make_catch().spec
  networks = muzero.make(config, spec.observation, 3)
  params = Params(*jax.jit(networks.init)(key), jnp.int32(0))
  search = planning.SearchConfig(num_simulations=0)
  planner = planning.make_planner(search, evaluate=True)
  player = evaluate.player(planner, learned_model(networks, gamma=0.9))
  got = evaluate.on_device(
    make_catch(), player, params, key=key, num_episodes=8
  )
  # Heads start at zero: of equal actions the first is taken, left, and only
  # balls in the first column are caught.
  reset_key, _ = jax.random.split(key)
  _, first = jax.vmap(make_catch().reset)(jax.random.split(reset_key, 8))
  column = first.observation[:, 0, :, 0].argmax(-1)
  np.testing.assert_array_equal(got.returns, np.where(column == 0, 1, -1))


@pytest.mark.parametrize('env', ['Catch-v0', 'jax:catch'])
def test_a_run_says_how_long_an_episode_may_be(env):
  rest = lambda params, key, timestep: (jnp.ones_like(timestep.reward, int), {})
  agent = Agent(lambda key: None, None, lambda *_: None)._replace(exploit=rest)
  lengths = []
  for most in (0, 4):
    settings = [f'evaluate_decisions={most}', 'evaluate_episodes=3']
    experiment = build.describe('muzero_catch', env=env, settings=settings)
    found = experiment.material.evaluate(experiment, agent)({}, 5)
    lengths.append(found['eval_length'])
  assert lengths == [9, 4]
