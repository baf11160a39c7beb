"""Continuous control: Gymnasium's and MuJoCo's originals, bins, bounds."""

import functools
import importlib
import subprocess
import sys
import textwrap

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.core.types import (
  ArraySpec,
  Continuous,
  Discrete,
  Spec,
  check_bounds,
)
from experiments import build
from experiments.envs import envpool as ours
from experiments.envs import gymnasium as own_gymnasium
from experiments.envs import host
from experiments.envs.discretise import discretise
from experiments.envs.make import make
from experiments.envs.pendulum import PendulumState, make_pendulum
from experiments.envs.point_mass import make_point_mass
from experiments.envs.repeat import repeat_action
from experiments.envs.swingup import SwingupState, make_swingup
from search.model import Environment, TimeStep


@pytest.fixture(scope='module')
def pendulum_step():
  return jax.jit(make_pendulum().step)


@pytest.fixture(scope='module')
def swingup_step():
  return jax.jit(jax.vmap(make_swingup().step, in_axes=(0, 0, None)))


@pytest.fixture(scope='module')
def point():
  env = make_point_mass(dimensions=3, max_steps=2)
  return env, jax.jit(env.step)


def count(max_steps, terminates_at=10**6):
  """Counts its steps; reward is the action; keys are what it is told."""

  def step(state, action, key):
    del key
    state = state + 1
    discount = 1.0 - (state == terminates_at)
    last = state >= max_steps
    return state, TimeStep(state, action, discount, jnp.array(False), last)

  spec = Spec(ArraySpec(()), Discrete(2), name='Count')
  return Environment(lambda key: None, step, spec)


# Pendulum.


def test_pendulum_moves_like_gymnasiums(pendulum_step, key):
  theirs = gymnasium.make('Pendulum-v1').unwrapped
  rng = np.random.default_rng(0)
  fastest = 0
  for _ in range(200):
    angle, speed = rng.uniform(-1, 1, 2) * [20.0, 8.5]
    action = rng.uniform(-2.5, 2.5, 1).astype(np.float32)
    speed = np.clip(speed, -8, 8)
    theirs.reset(seed=0)
    theirs.state = np.array([angle, speed])
    want, reward, ended, _, _ = theirs.step(action)
    state = PendulumState(jnp.float32(angle), jnp.float32(speed), jnp.int32(0))
    _, got = pendulum_step(state, action, key)
    np.testing.assert_allclose(got.observation, want, rtol=2e-6, atol=5e-6)
    np.testing.assert_allclose(got.reward, reward, rtol=1e-5, atol=1e-5)
    assert not ended
    assert got.discount == 1
    fastest += abs(want[2]) == 8
  assert fastest > 5  # The speed limit was met.


def test_pendulum_plays_an_episode_like_gymnasiums(pendulum_step, key):
  theirs = gymnasium.make('Pendulum-v1')
  theirs.reset(seed=3)
  angle, speed = theirs.unwrapped.state
  state = PendulumState(jnp.float32(angle), jnp.float32(speed), jnp.int32(0))
  for t in range(200):
    # Pumps energy in: the rod turns over many times.
    action = np.array([2.0 if state.speed > 0 else -2.0], np.float32)
    want, reward, _, cut, _ = theirs.step(action)
    state, got = pendulum_step(state, action, key)
    np.testing.assert_allclose(got.observation, want, atol=3e-4)
    np.testing.assert_allclose(got.reward, reward, atol=3e-3)
    assert bool(got.truncated) == cut == (t == 199)
  theirs.close()


def test_pendulum_starts_anywhere(key):
  _, timestep = jax.vmap(make_pendulum().reset)(jax.random.split(key, 512))
  cosine, sine, speed = np.asarray(timestep.observation).T
  np.testing.assert_allclose(cosine**2 + sine**2, 1, rtol=1e-5)
  angle = np.arctan2(sine, cosine)
  assert angle.min() < -3 < 3 < angle.max()
  assert speed.min() < -0.95 and speed.max() > 0.95 and abs(speed).max() <= 1
  np.testing.assert_array_equal(timestep.reward, 0)
  assert timestep.is_first.all() and not timestep.is_last().any()


# Swing-up.


@pytest.fixture(scope='module')
def suite_swingup():
  return ours.make_envpool('CartpoleSwingup-v1', 8)


@pytest.mark.parametrize('mode', ['random', 'push'])
def test_swingup_moves_like_mujocos(mode, suite_swingup, swingup_step, key):
  simulator = suite_swingup.start(0)
  want = simulator.reset()
  x, cosine, sine, v, spin = want.observation.T.astype(np.float64)
  physics = np.stack([x, np.arctan2(sine, cosine), v, spin], 1)
  state = SwingupState(jnp.float32(physics), jnp.zeros(8, jnp.int32))
  rng = np.random.default_rng(0)
  farthest = 0
  for _ in range(200):
    # Constant forces of many sizes drive carts into the ends of the rail.
    random = rng.uniform(-1, 1, (8, 1)).astype(np.float32)
    push = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    action = random if mode == 'random' else push
    want, _ = simulator.step(action)
    state, got = swingup_step(state, action, key)
    np.testing.assert_allclose(got.observation, want.observation, atol=1e-4)
    np.testing.assert_allclose(got.reward, want.reward, atol=1e-5)
    farthest = max(farthest, np.abs(want.observation[:, 0]).max())
  assert farthest > 1.8
  simulator.close()


def test_swingup_starts_hanging_like_the_suites(suite_swingup, key):
  simulator = suite_swingup.start(1)
  resets = [simulator.reset().observation for _ in range(16)]
  simulator.close()
  theirs = np.concatenate(resets)
  _, timestep = jax.vmap(make_swingup().reset)(jax.random.split(key, 128))
  observation = np.asarray(timestep.observation)
  np.testing.assert_allclose(observation[:, 1], -1, atol=1e-3)
  # Standard deviations of 128 normals: 4 standard errors are 25%.
  for column in (0, 2, 3, 4):
    np.testing.assert_allclose(observation[:, column].std(), 0.01, rtol=0.25)
    np.testing.assert_allclose(theirs[:, column].std(), 0.01, rtol=0.25)
  assert make_swingup().spec.observation == suite_swingup.spec.observation


def test_swingup_rewards_the_best_state_with_one(swingup_step, key):
  still = SwingupState(jnp.zeros((1, 4)), jnp.array([999]))
  _, got = swingup_step(still, jnp.zeros((1, 1)), key)
  np.testing.assert_array_equal(got.reward, 1)
  assert got.truncated and got.discount == 1
  # A full push costs a fifth, and moves it a little.
  _, got = swingup_step(still, jnp.full((1, 1), 3.0), key)
  np.testing.assert_allclose(got.reward, 0.8, atol=1e-3)


# Point mass.


def test_point_mass_by_hand(point, key):
  env, step = point
  state, timestep = env.reset(key)
  assert timestep.observation.shape == env.spec.observation.shape == (9,)
  assert timestep.is_first and timestep.reward == 0
  np.testing.assert_array_equal(timestep.observation[3:6], 0)
  state = state._replace(
    position=jnp.array([0.0, 0.5, 0.99]),
    velocity=jnp.array([0.0, -1.0, 1.0]),
    target=jnp.array([0.04, 0.4, 0.9]),
  )
  state, got = step(state, jnp.array([1.0, 5.0, 0.0]), key)
  # v += 0.4 a, x += 0.1 v; 5 is clipped to 1; the third runs into the wall.
  np.testing.assert_allclose(state.velocity, [0.4, -0.6, 0.0], rtol=1e-6)
  np.testing.assert_allclose(state.position, [0.04, 0.44, 1.0], rtol=1e-6)
  want = np.exp(-4 * (0.04**2 + 0.1**2)) * (1 - 0.05 * 2 / 3)
  np.testing.assert_allclose(got.reward, want, rtol=1e-5)
  assert not got.truncated and got.discount == 1
  _, got = step(state, jnp.zeros(3), key)
  assert got.truncated and got.discount == 1


def test_point_mass_needs_every_dimension(key):
  """Returns of an episode: control in all, in all but one, at random."""
  env = make_point_mass(dimensions=4)

  def play(key, gains, noise):
    def step(carry, key):
      state, observation = carry
      x, v, target = jnp.split(observation, 3)
      action = jnp.clip(gains * (2.5 * (target - x) - 1.2 * v), -1, 1)
      action += noise * jax.random.uniform(key, (4,), minval=-1, maxval=1)
      state, timestep = env.step(state, action, key)
      return (state, timestep.observation), timestep.reward

    state, timestep = env.reset(key)
    keys = jax.random.split(key, 50)
    _, rewards = jax.lax.scan(step, (state, timestep.observation), keys)
    return rewards.sum()

  play = jax.jit(jax.vmap(play, in_axes=(0, None, None)))
  keys = jax.random.split(key, 64)
  ones = jnp.ones(4)
  controlled = play(keys, ones, 0.0).mean()
  one_missing = play(keys, ones.at[2].set(0), 0.0).mean()
  random = play(keys, 0 * ones, 1.0).mean()
  assert controlled > 30
  assert one_missing < 0.65 * controlled
  assert random < 0.15 * controlled


# Action repeat.


def test_repeat_sums_rewards_and_stops_with_the_episode(key):
  for env, length, discount in ((count(5), 5, 1), (count(9, 5), 5, 0)):
    step = jax.jit(repeat_action(env, 3).step)
    state, got = step(jnp.int32(0), jnp.float32(2), key)
    assert (state, got.reward, got.is_last()) == (3, 6, False)
    state, got = step(state, jnp.float32(2), key)
    # The last decision is cut short.
    assert (state, got.reward, got.is_last()) == (length, 4, True)
    assert got.discount == discount
  assert repeat_action(env, 1) is env


@pytest.mark.parametrize('maker', [make_pendulum, make_swingup])
def test_repeated_physics_are_the_single_steps(maker, key):
  env, repeated = maker(max_steps=5), maker(max_steps=5, action_repeat=3)
  state, _ = env.reset(key)
  action = jnp.array([0.7])
  single, rewards = state, []
  step = jax.jit(env.step)
  for _ in range(5):
    single, want = step(single, action, key)
    rewards.append(want.reward)
  step = jax.jit(repeated.step)
  state, first = step(state, action, key)
  state, second = step(state, action, key)
  # Near the bottom a reward is a small difference from 1: a rounding of 1.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1.2e-7)
  close(first.reward, sum(rewards[:3]))
  close(second.reward, sum(rewards[3:]))
  np.testing.assert_allclose(second.observation, want.observation, rtol=1e-5)
  assert state.steps == 5
  assert not first.truncated and second.truncated


@pytest.mark.parametrize(
  'name, limit', [('CartpoleSwingup-v1', 10), ('CartPole-v1', 200)]
)
def test_envpool_repeats_by_single_steps(name, limit):
  """Ends amid a decision: by the limit in one, by a fall in the other."""
  single = ours.make_envpool(name, 3, max_episode_steps=limit)
  repeated = ours.make_envpool(
    name, 3, max_episode_steps=limit, action_repeat=4, num_threads=2
  )
  alone, together = single.start(1), repeated.start(1)
  want, got = alone.reset(), together.reset()
  np.testing.assert_array_equal(got.observation, want.observation)
  rng = np.random.default_rng(0)
  shape = (30, 3, *single.spec.action.shape) if limit == 10 else (30, 3)
  actions = rng.integers(2, size=shape)
  # Each environment by itself: those that wait at their ends would move on.
  logs = [[], [], []]
  ends = 0
  for action in actions:
    got, stats = together.step(action)
    for e in range(3):
      logs[e].append(
        (got.observation[e], got.reward[e], got.is_last()[e], got.discount[e])
      )
    ends += stats.finished.sum()
    assert (stats.lengths[stats.finished] >= 2).all()
  together.close()
  alone.close()
  assert ends >= 3
  for e in range(3):
    _check_alone(single, actions[:, e], logs[e], e)


def _check_alone(single, actions, log, e):
  """Plays stream `e` by single steps; the others get any action."""
  simulator = single.start(1)
  timestep = simulator.reset()
  for action, (observation, reward, is_last, discount) in zip(actions, log):
    full = np.zeros((3, *np.shape(action)), actions.dtype)
    full[e] = action
    dummy = timestep.is_last()[e]
    total = 0.0
    for _ in range(1 if dummy else 4):
      timestep, _ = simulator.step(full)
      total += timestep.reward[e]
      if timestep.is_last()[e]:
        break
    np.testing.assert_array_equal(timestep.observation[e], observation)
    np.testing.assert_allclose(total, reward, rtol=1e-6)
    assert timestep.is_last()[e] == is_last
    assert timestep.discount[e] == discount
  simulator.close()


# DeepMind Control.


def test_suite_frame_skip_is_no_action_repeat():
  """It counts physics steps, shows the last reward, leaves the limit alone."""
  action = np.full((1, 1), 0.3, np.float32)

  def play(steps, **options):
    simulator = ours.make_envpool('CartpoleSwingup-v1', 1, **options).start(3)
    simulator.reset()
    log = [simulator.step(action)[0] for _ in range(steps)]
    simulator.close()
    return log

  single = play(8)
  skipped = play(5, frame_skip=4, max_episode_steps=5)
  repeated = play(3, action_repeat=4, max_episode_steps=9)
  for log, t in ((skipped, 1), (repeated, 1)):
    np.testing.assert_array_equal(
      log[t].observation, single[4 * t + 3].observation
    )
  assert skipped[0].reward == single[3].reward
  np.testing.assert_allclose(
    repeated[0].reward, sum(s.reward for s in single[:4]), rtol=1e-6
  )
  assert [bool(s.truncated[0]) for s in skipped] == [False] * 4 + [True]
  assert [bool(s.truncated[0]) for s in repeated] == [False, False, True]
  assert skipped[4].discount == repeated[2].discount == 1


@pytest.mark.parametrize(
  'name, observation, action',
  [
    ('CartpoleSwingup-v1', 5, 1),
    ('BallInCupCatch-v1', 8, 2),
    ('ReacherEasy-v1', 6, 2),
    ('FingerSpin-v1', 12, 2),
    ('PointMassEasy-v1', 4, 2),
    ('CheetahRun-v1', 17, 6),
    ('HalfCheetah-v5', 17, 6),
    ('Hopper-v5', 11, 3),
  ],
)
def test_suite_and_mujoco_specs(name, observation, action):
  spec = ours.make_envpool(name, 1).spec
  one = np.ones(action, np.float32)
  assert spec.observation == ArraySpec((observation,), np.float32)
  assert spec.action.shape == (action,)
  np.testing.assert_array_equal(spec.action.low, -one)
  np.testing.assert_array_equal(spec.action.high, one)
  assert spec.action.low.dtype == np.float32
  check_bounds(spec)


def test_images_come_or_are_refused_but_kill_no_process(monkeypatch):
  monkeypatch.delenv('LD_PRELOAD', raising=False)
  importlib.import_module('envpool')  # Too early.
  with pytest.raises(ValueError, match='envpool was imported before'):
    ours.make_envpool('CheetahRun-v1', 1, from_pixels=True)
  program = """
    import sys
    from experiments.envs import envpool
    try:
      env = envpool.make_envpool(
        'CheetahRun-v1', 2, from_pixels=True, render_width=24,
        render_height=16, frame_stack=2
      )
    except ValueError as error:
      assert 'from_pixels=True' in str(error), error
      sys.exit(7)
    simulator = env.start(0)
    timestep = simulator.reset()
    assert timestep.observation.shape == (2, 16, 24, 6)
    assert timestep.observation.dtype == 'uint8'
    assert timestep.observation.std() > 1
    assert env.spec.observation.shape == (16, 24, 6)
  """
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)],
    capture_output=True,
    text=True,
  )
  assert done.returncode in (0, 7), done.stderr


def test_a_trial_that_dies_is_an_error(monkeypatch):
  monkeypatch.setattr(ours, '_TRIAL', 'import os; os.abort()')
  with pytest.raises(ValueError, match='from_pixels=True: images cannot be'):
    ours._try_renderer.__wrapped__()


# Bins.


def wide(name='Wide'):
  """Observes what it was told to do; two dimensions of unlike bounds."""
  action = Continuous(
    (2,), np.array([-1, 0], np.float32), np.array([1, 6], np.float32)
  )

  def step(state, action, key):
    del key
    no = jnp.array(False)
    return state, TimeStep(action, action.sum(), jnp.float32(1), no, no)

  spec = Spec(ArraySpec((2,)), action, name=name)
  return Environment(lambda key: None, step, spec)


def test_bins_of_a_pure_environment(key):
  env = discretise(wide(), 3)
  assert env.spec.action == Discrete(9, factors=(3, 3))
  step = jax.jit(jax.vmap(lambda a: env.step(0, a, key)[1].observation))
  got = step(jnp.arange(9))
  want = [[x, y] for x in (-1, 0, 1) for y in (0, 3, 6)]
  np.testing.assert_array_equal(got, want)


def test_bins_of_a_host_environment():
  continuous = ours.make_envpool('ReacherEasy-v1', 2)
  binned = discretise(continuous, 5)
  assert binned.spec.action == Discrete(25, factors=(5, 5))
  assert binned.num_envs == 2
  one, other = continuous.start(0), binned.start(0)
  one.reset(), other.reset()
  for joint in ([0, 24], [7, 13], [20, 4]):
    # By hand: 7 = 1 * 5 + 2 is bins (1, 2), values (-0.5, 0).
    value = [[-1 + 0.5 * (j // 5), -1 + 0.5 * (j % 5)] for j in joint]
    want, _ = one.step(np.array(value))
    got, _ = other.step(np.array(joint))
    np.testing.assert_array_equal(got.observation, want.observation)
    np.testing.assert_array_equal(got.reward, want.reward)
  with pytest.raises(ValueError, match=r'action 25 .* \[0, 25\)'):
    other.step(np.array([0, 25]))
  one.close(), other.close()


def test_bins_by_name_and_by_preset():
  env = make(
    'jax:point_mass', 1, training=True, options={'dimensions': 4}, action_bins=7
  )
  assert env.spec.action == Discrete(2401, factors=(7,) * 4)
  experiment = build.describe(
    'muzero_cartpole', env='jax:pendulum', settings=['env.action_bins=5']
  )
  env = build.make_env(experiment, training=True)
  assert env.spec.action == Discrete(5, factors=(5,))
  experiment = build.describe('muzero_cartpole', env='jax:pendulum')
  env = build.make_env(experiment, training=True)
  assert isinstance(env.spec.action, Continuous)
  with pytest.raises(ValueError, match='action_bins=1: must be 0 or >= 2'):
    build.describe('muzero_cartpole', settings=['env.action_bins=1'])


def with_bounds(low, high):
  action = Continuous((2,), np.float32(low), np.float32(high))
  env = wide('Mine')
  return env._replace(spec=env.spec._replace(action=action))


@pytest.mark.parametrize(
  'env, num_bins, message',
  [
    (count(3), 3, 'Count: num_bins=3 needs continuous actions, but its 2 '),
    (wide(), 1, 'Wide: num_bins=1 must be an integer of at least 2'),
    (wide(), 2.0, 'Wide: num_bins=2.0 must be an integer'),
    (
      make_point_mass(20),
      3,
      'PointMass: num_bins=3 in 20 dimensions make 3.49e.09 .* at most 2',
    ),
    (
      make_point_mass(2),
      46341,
      'num_bins=46341 in 2 dimensions .* at most 46340',
    ),
    (with_bounds([-1, -np.inf], [1, 1]), 3, 'Mine: .*low=-inf must be finite'),
    (with_bounds([-1, -1], [np.nan, 1]), 3, 'Mine: .*high=nan must be finite'),
    (with_bounds([-1, 1], [1, 1]), 3, 'Mine: .*low=1 must be below high=1'),
  ],
)
def test_bad_bins_are_refused(env, num_bins, message):
  with pytest.raises(ValueError, match=message) as error:
    discretise(env, num_bins)
  assert '\n' not in str(error.value)


# Bounds.


def test_bounds_pass_where_they_are_finite():
  check_bounds(wide().spec)
  check_bounds(count(1).spec)


@pytest.mark.parametrize('high', [np.inf, 1e300])
def test_unbounded_actions_of_a_host_environment_are_refused(high):
  class Unbounded(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, high, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
      super().reset(seed=seed)
      return np.zeros(1, np.float32), {}

    def step(self, action):
      return np.zeros(1, np.float32), 0.0, False, False, {}

  env = own_gymnasium.make_gymnasium(Unbounded, 1)
  assert isinstance(env, host.HostEnvironment)
  with pytest.raises(ValueError, match=r'Unbounded: .*high=inf must be finite'):
    check_bounds(env.spec)
  with pytest.raises(ValueError, match=r'Unbounded: .*high=inf must be finite'):
    discretise(env, 3)


@pytest.mark.parametrize(
  'maker, options, message',
  [
    (make_pendulum, {'max_steps': 0}, 'max_steps=0'),
    (make_pendulum, {'action_repeat': 0}, 'Pendulum: action_repeat=0'),
    (make_swingup, {'max_steps': 0}, 'max_steps=0'),
    (make_swingup, {'action_repeat': 1.5}, 'Swingup: action_repeat=1.5'),
    (make_point_mass, {'dimensions': 0}, 'dimensions=0'),
    (make_point_mass, {'max_steps': 0}, 'max_steps=0'),
  ],
)
def test_bad_options_are_refused(maker, options, message):
  with pytest.raises(ValueError, match=message):
    maker(**options)


def test_bad_repeats_of_envpool_are_refused():
  for times in (0, 2.0):
    with pytest.raises(ValueError, match=f'action_repeat={times} must be'):
      ours.make_envpool('CartPole-v1', 1, action_repeat=times)
