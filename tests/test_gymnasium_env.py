"""Users' own environments: ends, spaces, seeds and actions."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from agents.core.types import ArraySpec, Continuous, Discrete
from experiments.envs import host
from experiments.envs.gymnasium import make_gymnasium


class Count(gymnasium.Env):
  """Observes the step's number; ends at 3 by action 2, is cut at 5."""

  observation_space = spaces.Box(0, 10, (2,), np.float64)
  action_space = spaces.Discrete(3)

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.t, self.start = 0, self.np_random.integers(1000)
    return np.array([0.0, self.start]), {}

  def step(self, action):
    self.t += 1
    ended, cut = self.t == 3 and action == 2, self.t == 5
    return np.array([self.t, self.start]), 0.5 * self.t, ended, cut, {}


def test_ends_and_truncations_and_the_dummy_step():
  env = make_gymnasium(Count, 2)
  assert env.spec.observation == ArraySpec((2,), np.float32)
  assert env.spec.action == Discrete(3)
  assert env.spec.name == 'Count'
  simulator = env.start(0)
  timestep = simulator.reset()
  assert timestep.is_first.all()
  seen, finished = [timestep], []
  for _ in range(6):
    timestep, stats = simulator.step(np.array([0, 2]))
    seen.append(timestep)
    finished.append(stats)
  column = lambda name: np.stack([getattr(t, name) for t in seen], 1).tolist()
  yes, no = True, False
  assert column('is_first') == [
    [yes, no, no, no, no, no, yes],
    [yes, no, no, no, yes, no, no],
  ]
  assert column('discount') == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1]]
  assert column('truncated') == [[no] * 5 + [yes, no], [no] * 7]
  assert column('reward') == [
    [0, 0.5, 1, 1.5, 2, 2.5, 0],
    [0, 0.5, 1, 1.5, 0, 0.5, 1],
  ]
  assert [t.observation[1, 0] for t in seen] == [0, 1, 2, 3, 0, 1, 2]
  assert [s.finished.tolist() for s in finished] == [
    [no, no],
    [no, no],
    [no, yes],
    [no, no],
    [yes, no],
    [no, no],
  ]
  assert finished[2].returns.tolist() == [0.0, 3.0]
  assert finished[2].lengths.tolist() == [0, 3]
  assert finished[4].returns.tolist() == [7.5, 0.0]
  assert finished[4].lengths.tolist() == [5, 0]
  simulator.close()


def test_the_same_seed_is_the_same_stream_and_neighbours_share_nothing():
  env = make_gymnasium(Count, 4)

  def starts(seed):
    simulator = env.start(seed)
    timesteps = [simulator.reset()]
    timesteps += [simulator.step(np.zeros(4, int))[0] for _ in range(6)]
    return np.stack([t.observation[:, 1] for t in timesteps])

  one, two = starts(7), starts(8)
  np.testing.assert_array_equal(one, starts(7))
  assert len(set(one[0]) | set(two[0])) >= 7
  assert (one[0] != one[-1]).any()  # A new episode starts elsewhere.


def test_env_seeds_do_not_overlap():
  seeds = [s for seed in range(50) for s in host.env_seeds(seed, 32)]
  assert len(set(seeds)) == len(seeds)
  assert 0 <= min(seeds) <= max(seeds) < 2**31
  with pytest.raises(ValueError, match='seed=-1'):
    host.env_seeds(-1, 2)


def test_frames_are_stacked_and_start_with_repeats():
  simulator = make_gymnasium(Count, 1, frame_stack=3).start(0)
  counts = [simulator.reset().observation[0, ::2].tolist()]
  for _ in range(6):
    timestep, _ = simulator.step(np.array([0]))
    counts.append(timestep.observation[0, ::2].tolist())
  assert counts == [
    [0, 0, 0],
    [0, 0, 1],
    [0, 1, 2],
    [1, 2, 3],
    [2, 3, 4],
    [3, 4, 5],
    [0, 0, 0],
  ]


def test_a_registered_id_is_played():
  env = make_gymnasium('CartPole-v1', 2, max_episode_steps=4)
  simulator = env.start(1)
  simulator.reset()
  for t in range(1, 5):
    timestep, stats = simulator.step(np.array([0, 1], np.int32))
    assert timestep.truncated.tolist() == [t == 4] * 2
    assert timestep.discount.tolist() == [1, 1]
  assert stats.returns.tolist() == [4, 4]
  with pytest.raises(ValueError, match='NoSuchEnv'):
    make_gymnasium('NoSuchEnv-v0', 1)


@pytest.mark.parametrize(
  'space, batch, spec, want',
  [
    (
      spaces.Discrete(3),
      np.array([0, 2]),
      ArraySpec((3,), np.float32),
      [[1, 0, 0], [0, 0, 1]],
    ),
    (
      spaces.Dict(b=spaces.Box(0, 9, (2,)), a=spaces.Discrete(2)),
      {'b': np.array([[1.0, 2.0]]), 'a': np.array([1])},
      ArraySpec((4,), np.float32),
      None,
    ),
    (
      spaces.Box(0, 1, (1, 2)),
      np.array([[[5.0, 6.0]]]),
      ArraySpec((2,), np.float32),
      [[5, 6]],
    ),
    (
      spaces.Box(0, 1, (2, 3)),
      np.arange(6.0).reshape(1, 2, 3),
      ArraySpec((2, 3, 1), np.float32),
      [[[[0], [1], [2]], [[3], [4], [5]]]],
    ),
    (
      spaces.Box(0, 255, (1, 4, 5), np.uint8),
      np.arange(20, dtype=np.uint8).reshape(1, 1, 4, 5),
      ArraySpec((4, 5, 1), np.uint8),
      np.arange(20).reshape(1, 4, 5, 1),
    ),
    (
      spaces.Box(0, 255, (4, 3, 2), np.uint8),
      np.arange(24, dtype=np.uint8).reshape(1, 4, 3, 2),
      ArraySpec((4, 3, 2), np.uint8),
      np.arange(24).reshape(1, 4, 3, 2),
    ),
  ],
)
def test_observations_become_one_array(space, batch, spec, want):
  got_spec, convert = host.observation_codec(space, 'x')
  assert got_spec == spec
  got = convert(batch)
  assert got.dtype == spec.dtype
  assert got.shape[1:] == spec.shape
  if isinstance(space, spaces.Dict):  # In the order of the space.
    parts = {'a': [0, 1], 'b': [1, 2]}
    want = [np.concatenate([parts[k] for k in space.spaces])]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  'shape, dtype, first',
  [
    ((7, 7, 20), np.float32, False),  # MiniGrid's planes
    ((7, 7, 3), np.uint8, False),
    ((3, 7, 7), np.uint8, False),  # A board of three rows, for all we know.
    ((4, 4, 31), np.int8, False),  # 2048
    ((8, 8, 119), np.float32, False),  # chess
    ((2, 12, 12), np.float32, False),
    ((64, 64, 3), np.uint8, False),
    ((3, 64, 64), np.uint8, True),
    ((3, 64, 64), np.float32, True),
    ((4, 84, 84), np.uint8, True),
    ((12, 84, 84), np.uint8, True),  # Four frames in colour.
    ((64, 64, 12), np.uint8, False),
    ((1, 28, 28), np.uint8, True),
  ],
)
def test_channels_are_last_but_in_unmistakable_shapes(shape, dtype, first):
  space = spaces.Box(0, 100, shape, dtype)
  x = np.random.default_rng(0).integers(0, 100, (2, *shape)).astype(dtype)
  last = np.moveaxis(x, 1, -1)
  for channels, want in ((None, last if first else x), ('first', last)):
    spec, convert = host.observation_codec(space, 'x', channels)
    assert spec.shape == want.shape[1:]
    np.testing.assert_array_equal(convert(x), want)
  np.testing.assert_array_equal(
    host.observation_codec(space, 'x', 'last')[1](x), x
  )


@pytest.mark.parametrize(
  'space',
  [
    spaces.Dict(a=spaces.Box(0, 1, (4, 4, 3)), b=spaces.Discrete(2)),
    spaces.Box(0, 1, (2, 2, 2, 2)),
    spaces.Text(5),
  ],
)
def test_observations_that_do_not_fit_are_refused(space):
  with pytest.raises(ValueError, match=r'mine: observation'):
    host.observation_codec(space, 'mine')


def test_action_spaces():
  box = host.action_spec(spaces.Box(-2, np.ones(3), (3,), np.float64), 'x')
  assert isinstance(box, Continuous)
  np.testing.assert_array_equal(box.low, [-2, -2, -2])
  assert box.high.dtype == np.float32
  with pytest.raises(ValueError, match='mine: action space MultiDiscrete'):
    host.action_spec(spaces.MultiDiscrete([2, 2]), 'mine')


def test_a_discrete_space_may_start_elsewhere():
  class Shifted(Count):
    action_space = spaces.Discrete(3, start=10)

    def step(self, action):
      _, _, *rest = super().step(action)
      return np.array([action, 0.0]), 0.0, *rest

  simulator = make_gymnasium(Shifted, 2).start(0)
  simulator.reset()
  timestep, _ = simulator.step(np.array([0, 2]))
  np.testing.assert_array_equal(timestep.observation[:, 0], [10, 12])
