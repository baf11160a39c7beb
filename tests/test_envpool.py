"""envpool behind our contract: ends, true returns, seeds, refusals."""

import envpool
import numpy as np
import pytest

from agents.core.types import ArraySpec, Continuous, Discrete
from experiments.envs import contract
from experiments.envs import envpool as ours


def play(simulator, actions):
  """`[t]` lists of time steps and statistics; the first has none."""
  steps, stats = [simulator.reset()], [None]
  for action in actions:
    timestep, stat = simulator.step(action)
    steps.append(timestep)
    stats.append(stat)
  simulator.close()
  return steps, stats


def column(steps, name):
  return np.stack([getattr(t, name) for t in steps])


@pytest.fixture(scope='module')
def breakout():
  """Random play under the training protocol, beside the plain game."""
  rng = np.random.default_rng(0)
  actions = rng.integers(4, size=(700, 2)).astype(np.int32)
  options = {'img_height': 24, 'img_width': 24}
  env = ours.make_envpool('Breakout-v5', 2, **options)
  seeds = [11, 12]
  steps, stats = play(env.start(5), actions)
  return env, actions, steps, stats, seeds


def test_falling_terminates_and_the_limit_truncates():
  env = ours.make_envpool('CartPole-v1', 2, max_episode_steps=20)
  # Pushing left falls within 12 steps; alternating stands for 20.
  actions = [np.array([0, t % 2]) for t in range(45)]
  steps, stats = play(env.start(0), actions)
  first, discount = column(steps, 'is_first'), column(steps, 'discount')
  truncated, reward = column(steps, 'truncated'), column(steps, 'reward')
  assert first[0].all()
  assert not truncated[:, 0].any()
  assert (discount[:, 0] == 0).any()
  assert (discount[:, 1] == 1).all()
  np.testing.assert_array_equal(np.flatnonzero(truncated[:, 1]), [20, 41])
  last = truncated | (discount == 0)
  # What follows a last step is a first step without reward.
  np.testing.assert_array_equal(first[1:], last[:-1])
  np.testing.assert_array_equal(reward == 0, first)
  lengths = [s.lengths for s in stats[1:]]
  np.testing.assert_array_equal(column(stats[1:], 'finished'), last[1:])
  np.testing.assert_array_equal(column(stats[1:], 'returns'), lengths)
  assert lengths[19][1] == lengths[40][1] == 20


def test_the_action_after_an_end_is_ignored():
  env = ours.make_envpool('CartPole-v1', 1, max_episode_steps=5)
  runs = [
    play(
      env.start(0),
      [np.array([ignored if t == 5 else t % 2]) for t in range(12)],
    )[0]
    for ignored in (0, 1)
  ]
  assert runs[0][6].is_first.all()
  np.testing.assert_array_equal(
    column(runs[0], 'observation'), column(runs[1], 'observation')
  )


def test_lives_end_episodes_and_rewards_are_clipped_in_training(breakout):
  _, _, steps, stats, _ = breakout
  first, discount = column(steps, 'is_first'), column(steps, 'discount')
  last = column(steps, 'discount') == 0
  assert not column(steps, 'truncated').any()
  np.testing.assert_array_equal(first[1:], last[:-1])
  finished = column(stats[1:], 'finished')
  # Five lives a game: four of five ends are not the game's.
  assert finished.sum() >= 4
  assert 4 * finished.sum() < (discount == 0).sum() <= 5 * finished.sum() + 8
  assert (last[1:] | ~finished).all()
  assert set(np.unique(column(steps, 'reward'))) <= {0.0, 1.0}


def test_true_returns_are_those_of_the_plain_game(breakout):
  _env, actions, steps, stats, _ = breakout
  # The same seeds and actions, envpool's raw rewards added up by hand.
  from experiments.envs import host

  pool = envpool.make_gymnasium(
    'Breakout-v5',
    num_envs=2,
    num_threads=1,
    seed=host.env_seeds(5, 2),
    stack_num=1,
    **{
      **ours.ATARI_100K,
      'img_height': 24,
      'img_width': 24,
      'episodic_life': True,
    },
  )
  pool.reset()
  want, total, lengths = [], np.zeros(2), np.zeros(2, int)
  for t, action in enumerate(actions):
    _, reward, _, cut, info = pool.step(action)
    total += reward
    lengths += ~steps[t + 1].is_first
    for e in np.flatnonzero((info['terminated'] > 0) | cut):
      want.append((t, e, total[e], lengths[e]))
      total[e] = lengths[e] = 0
  got = [
    (t, e, s.returns[e], s.lengths[e])
    for t, s in enumerate(stats[1:])
    for e in np.flatnonzero(s.finished)
  ]
  assert got == want
  assert len({r for _, _, r, _ in got}) > 1
  pool.close()


def test_evaluation_plays_whole_unclipped_games():
  rng = np.random.default_rng(1)
  env = ours.make_envpool(
    'Breakout-v5', 2, training=False, img_height=24, img_width=24
  )
  actions = rng.integers(4, size=(500, 2))
  steps, stats = play(env.start(1), actions)
  last = column(steps, 'discount') == 0
  finished = column(stats[1:], 'finished')
  np.testing.assert_array_equal(last[1:], finished)
  assert finished.any()
  # Between two ends, what was shown adds up to the true return.
  for e in range(2):
    start = 0
    for t in np.flatnonzero(finished[:, e]) + 1:
      shown = sum(s.reward[e] for s in steps[start : t + 1])
      assert shown == stats[t].returns[e]
      start = t + 1


def test_the_end_of_a_game_at_the_limit_is_an_end():
  # Found by play: where this game ends of itself.
  options = {'img_height': 24, 'img_width': 24, 'training': False}
  rng = np.random.default_rng(1)
  actions = rng.integers(4, size=(500, 1))
  env = ours.make_envpool('Breakout-v5', 1, **options)
  steps, _ = play(env.start(1), actions)
  end = int(np.flatnonzero(column(steps, 'discount')[:, 0] == 0)[0])
  for limit, discount, truncated in ((end, 0, False), (end - 1, 1, True)):
    env = ours.make_envpool(
      'Breakout-v5', 1, max_episode_steps=limit, **options
    )
    steps, stats = play(env.start(1), actions[: limit + 2])
    assert steps[limit].discount == discount
    assert steps[limit].truncated == truncated
    assert steps[limit + 1].is_first.all()
    finished = [bool(s.finished[0]) for s in stats[1:]]
    assert finished == [t == limit for t in range(1, limit + 3)]


def test_stacks_are_envpools_but_start_anew_after_a_life(breakout):
  _env, actions, steps, _, _ = breakout
  from experiments.envs import host

  pool = envpool.make_gymnasium(
    'Breakout-v5',
    num_envs=2,
    num_threads=1,
    seed=host.env_seeds(5, 2),
    stack_num=4,
    **{
      **ours.ATARI_100K,
      'img_height': 24,
      'img_width': 24,
      'episodic_life': True,
    },
  )
  theirs, info = pool.reset()
  since = np.full(2, 9)  # Steps since a life was lost.
  lives, carried = info['lives'], 0
  for t, step in enumerate(steps):
    if t:
      theirs, _, _, _, info = pool.step(actions[t - 1])
    since += 1
    since[step.is_first & (t > 0) & (info['lives'] <= lives)] = 0
    lives = info['lives']
    got, want = step.observation, theirs.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(got[..., -3:], want[..., -3:])
    same = (got == want).all(axis=(1, 2, 3))
    assert same[since >= 3].all()
    carried += (~same).sum()
    for e in np.flatnonzero(step.is_first):
      np.testing.assert_array_equal(got[e], np.tile(want[e, ..., -3:], 4))
  assert carried > 0
  pool.close()


@pytest.mark.parametrize('part', ['observation', 'reward'])
def test_numbers_that_are_not_finite_are_named_where_they_enter(
  part, monkeypatch
):
  plain = ours._step_pool

  def broken(*args):
    result = plain(*args)
    array = result[0] if part == 'observation' else result[1]
    array[1] = np.inf
    return result

  monkeypatch.setattr(ours, '_step_pool', broken)
  simulator = ours.make_envpool('CartPole-v1', 2).start(0)
  simulator.reset()
  message = rf'env=CartPole-v1: step\(action\) of copy 1 .* {part} with inf'
  with pytest.raises(contract.SimulatorError, match=message):
    simulator.step(np.zeros(2, np.int32))
  simulator.close()


def test_seeds_repeat_and_neighbours_do_not_overlap():
  env = ours.make_envpool('CartPole-v1', 8)

  def first(seed, threads=1):
    env = ours.make_envpool('CartPole-v1', 8, num_threads=threads)
    simulator = env.start(seed)
    observation = simulator.reset().observation
    simulator.close()
    return observation

  np.testing.assert_array_equal(first(0), first(0, threads=2))
  rows = np.concatenate([first(seed) for seed in range(4)])
  assert len(np.unique(rows, axis=0)) == 32
  simulator = env.start(0)
  again = simulator.reset().observation
  assert (again != simulator.reset().observation).any()
  simulator.close()


def test_specs():
  spec = ours.make_envpool('PongNoFrameskip-v4', 1).spec
  assert spec.observation == ArraySpec((96, 96, 12), np.uint8)
  assert (spec.action, spec.frame_stack) == (Discrete(6), 4)
  assert spec.name == 'Pong-v5'
  spec = ours.make_envpool('ALE/Pong-v5', 1, **ours.ATARI_GRAY).spec
  assert spec.observation == ArraySpec((84, 84, 4), np.uint8)
  spec = ours.make_envpool('Catch-v0', 1).spec
  assert spec.observation == ArraySpec((10, 5, 1), np.float32)
  spec = ours.make_envpool('FrozenLake-v1', 1).spec
  assert spec.observation == ArraySpec((16,), np.float32)
  assert ours.make_envpool('Play2048-v1', 1).spec.masks_actions


@pytest.mark.parametrize('name', ['HopperHop-v1', 'Hopper-v4', 'Play2048-v1'])
def test_observations_are_as_the_spec_says(name):
  env = ours.make_envpool(name, 2)
  if isinstance(env.spec.action, Continuous):
    action = np.zeros((2, *env.spec.action.shape), np.float32)
    np.testing.assert_array_equal(env.spec.action.high, 1)
  else:
    action = np.zeros(2, np.int32)
  steps, _ = play(env.start(0), [action] * 2)
  for timestep in steps:
    got, spec = timestep.observation, env.spec.observation
    assert (got.shape, got.dtype) == ((2, *spec.shape), spec.dtype)
    assert timestep.reward.dtype == timestep.discount.dtype == np.float32
    assert timestep.is_first.dtype == timestep.truncated.dtype == bool
    if env.spec.masks_actions:
      assert timestep.invalid_actions.shape == (2, 4)
      assert not timestep.invalid_actions.all(axis=1).any()
  assert (steps[0].observation[0] != steps[0].observation[1]).any()


@pytest.mark.parametrize(
  'action, message',
  [
    (np.zeros(3, int), r'shape \(3,\), must be \(2,\)'),
    (np.zeros((2, 1), int), r'shape \(2, 1\)'),
    (np.zeros(2), 'dtype float64, must be integer'),
    (np.array([0, 2]), r'action 2 is out of range, must be in \[0, 2\)'),
    (np.array([-1, 0]), 'action -1 is out of range'),
  ],
)
def test_bad_discrete_actions_are_refused(action, message):
  simulator = ours.make_envpool('CartPole-v1', 2).start(0)
  simulator.reset()
  with pytest.raises(ValueError, match=f'CartPole-v1: .*{message}'):
    simulator.step(action)
  simulator.close()


@pytest.mark.parametrize(
  'action, message',
  [
    (np.zeros((2, 3)), r'shape \(2, 3\), must be \(2, 1\)'),
    (np.full((2, 1), np.nan), 'not finite'),
    (
      np.full((2, 1), 2.1),
      r'action 2.1 is out of bounds, must be in \[-2, 2\]',
    ),
    (np.zeros((2, 1), bool), 'dtype bool'),
  ],
)
def test_bad_continuous_actions_are_refused(action, message):
  simulator = ours.make_envpool('Pendulum-v1', 2).start(0)
  simulator.reset()
  with pytest.raises(ValueError, match=f'Pendulum-v1: .*{message}'):
    simulator.step(action)
  # Rounding passes, clipped.
  simulator.step(np.full((2, 1), 2 + 1e-6, np.float32))
  simulator.close()


@pytest.mark.parametrize(
  'arguments, options, message',
  [
    (('Pogn-v5', 1), {}, 'nearest: .*Pong-v5'),
    (('BreakotNoFrameskip-v4', 1), {}, 'nearest: .*Breakout-v5'),
    (('TicTacToe-v1', 1), {}, '2 players'),
    (('Pong', 0), {}, 'num_envs=0'),
    (('Pong', 1), {'noop_max': 0}, 'noop_max=0'),
    (('Pong', 1), {'frame_skip': 0}, 'frame_skip=0'),
    (('Pong', 1), {'frame_stack': 0}, 'frame_stack=0'),
    (('Pong', 1), {'repeat_action_probability': 2}, r'=2 must be in \[0, 1\]'),
    (('Pong', 1), {'stack_num': 4}, 'use num_envs, frame_stack'),
    (('Pong', 1), {'nop_max': 4}, 'unknown option nop_max; .*noop_max'),
    (('CartPole-v1', 1), {'noop_max': 4}, 'unknown option noop_max'),
    (('MiniGrid-Empty-5x5-v0', 1), {}, 'image with other'),
  ],
)
def test_bad_settings_are_refused(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    ours.make_envpool(*arguments, **options)
