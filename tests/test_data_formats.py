"""D4RL's hdf5 and Minari's folders, the latter against Minari itself."""

import json
import math
import warnings

import gymnasium
import numpy as np
import pytest
from test_data import assert_same, toy

from experiments.data import d4rl, layout, minari_files, npz
from experiments.data.open import open_dataset
from experiments.envs import host

h5py = pytest.importorskip('h5py')


# Ten rows: terminated at 2, cut at 5, both at 7, open to the end.
N = 10
TERMINALS = np.isin(np.arange(N), [2, 7])
TIMEOUTS = np.isin(np.arange(N), [5, 7])


def flat(**changes):
  arrays = {
    'observations': np.arange(2.0 * N, dtype=np.float32).reshape(N, 2),
    'actions': np.linspace(-1, 1, 3 * N, dtype=np.float32).reshape(N, 3),
    'rewards': np.arange(N, dtype=np.float32),
    'terminals': TERMINALS,
    'timeouts': TIMEOUTS,
    'next_observations': np.arange(2 * N).reshape(N, 2) + np.float32(0.5),
  }
  return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def write(path, arrays):
  with h5py.File(path, 'w') as file:
    for key, value in arrays.items():
      file.create_dataset(key, data=value, compression='gzip')
    # D4RL's files hold more, which is not ours to read.
    file['metadata/algorithm'] = np.bytes_('SAC')
    file['infos/qpos'] = np.zeros((N, 4))
  return path


def test_d4rl_whole(tmp_path):
  data = d4rl.load(write(tmp_path / 'hopper_medium-v2.hdf5', flat()))
  want = flat()
  np.testing.assert_array_equal(data.observation, want['observations'])
  np.testing.assert_array_equal(data.action, want['actions'])
  np.testing.assert_array_equal(data.reward, want['rewards'])
  np.testing.assert_array_equal(
    data.next_observation, want['next_observations']
  )
  assert np.flatnonzero(data.terminated).tolist() == [2, 7]
  # A time limit is no terminal; a terminal at the limit is one.
  assert np.flatnonzero(data.truncated).tolist() == [5]
  assert data.episode.tolist() == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 2
  assert layout.returns(data).tolist() == [3, 12, 13]
  about = data.about
  assert (about.name, about.env) == ('hopper-medium-v2', 'Hopper-v4')
  assert about.action_low.tolist() == [-1] * 3
  # The pair's middle.
  middle = (3234.3 - 20.272305) / 2
  np.testing.assert_allclose(layout.normalised_score(about, middle), 50)


def test_d4rl_columns_of_shape_n_1_and_float_flags(tmp_path):
  arrays = flat()
  for key in ('rewards', 'terminals', 'timeouts'):
    arrays[key] = arrays[key].astype(np.float64)[:, None]
  data = d4rl.load(write(tmp_path / 'a.hdf5', arrays))
  assert_same(
    data,
    d4rl.load(write(tmp_path / 'b.hdf5', flat()))._replace(about=data.about),
  )
  assert data.about.ref_min is None


def test_d4rl_without_next_observations(tmp_path):
  arrays = flat(next_observations=None)
  data = d4rl.load(write(tmp_path / 'a.hdf5', arrays))
  # 5, at a time limit, and 9, open, have no next row.
  kept = [0, 1, 2, 3, 4, 6, 7, 8]
  observations = flat()['observations']
  np.testing.assert_array_equal(data.observation, observations[kept])
  np.testing.assert_array_equal(data.reward, kept)
  # Terminal rows (2 and 7) have themselves.
  following = [1, 2, 2, 4, 5, 7, 7, 9]
  np.testing.assert_array_equal(data.next_observation, observations[following])
  assert data.terminated.tolist() == [i in (2, 7) for i in kept]
  assert data.truncated.tolist() == [i == 4 for i in kept]
  assert data.episode.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
  assert not layout.is_finished(data)


def test_d4rl_without_next_observations_at_the_edges(tmp_path):
  def load(terminals, timeouts):
    marks = lambda rows: np.isin(np.arange(N), rows)
    arrays = flat(
      next_observations=None,
      terminals=marks(terminals),
      timeouts=marks(timeouts),
    )
    path = tmp_path / 'x.hdf5'
    data = d4rl.load(write(path, arrays))
    path.unlink()
    rows = data.reward.astype(int)
    return rows.tolist(), rows[data.terminated], rows[data.truncated]

  # The last row is a time limit; the last row is terminal.
  rows, _, truncated = load([], [9])
  assert rows == list(range(9)) and truncated.tolist() == [8]
  rows, terminated, truncated = load([9], [])
  assert rows == list(range(N)) and terminated.tolist() == [9]
  assert truncated.size == 0
  # An episode of one cut step vanishes and cuts nothing before it.
  rows, terminated, truncated = load([3], [4, 5])
  assert rows == [0, 1, 2, 3, 6, 7, 8] and terminated.tolist() == [3]
  assert truncated.size == 0


def test_d4rl_without_timeouts_counts_steps(tmp_path):
  arrays = flat(timeouts=None, terminals=np.isin(np.arange(N), [1]))
  path = write(tmp_path / 'a.hdf5', arrays)
  # 0-1 terminates, then three steps at a time.
  data = d4rl.load(path, max_steps=3)
  assert np.flatnonzero(data.truncated).tolist() == [4, 7]
  assert data.episode.tolist() == [0] * 2 + [1] * 3 + [2] * 3 + [3] * 2
  # A terminal that comes with the limit is a terminal.
  data = d4rl.load(path, max_steps=2)
  assert np.flatnonzero(data.truncated).tolist() == [3, 5, 7, 9]
  assert np.flatnonzero(data.terminated).tolist() == [1]
  with pytest.raises(ValueError, match=f'{path}: timeouts is missing'):
    d4rl.load(path)
  data = d4rl.load(path.rename(tmp_path / 'walker2d_medium.hdf5'))
  assert not data.truncated.any()


@pytest.mark.parametrize('stored', [True, False])
def test_d4rl_repeated_terminals_are_one_end(stored, tmp_path):
  """As antmaze's: the goal is reached in row 2, the limit comes with row 5."""
  states = np.arange(N + 2, dtype=np.float32)
  # The second episode starts at 50, and ends for good in its last row.
  states[6:] += 50
  following = states[1 : N + 1].copy()
  following[5] = 6
  arrays = flat(
    observations=states[:N, None],
    next_observations=following[:, None] if stored else None,
    terminals=np.isin(np.arange(N), [2, 3, 4, 5, 9]),
    timeouts=np.isin(np.arange(N), [5]),
    rewards=np.isin(np.arange(N), [2, 3, 4, 5, 9]).astype(np.float32),
  )
  data = d4rl.load(write(tmp_path / 'antmaze-umaze-v2.hdf5', arrays))
  assert layout.returns(data).tolist() == [1, 1]
  assert data.observation[:, 0].tolist() == [0, 1, 2, 56, 57, 58, 59]
  assert np.flatnonzero(data.terminated).tolist() == [2, 6]
  assert not data.truncated.any()
  assert data.about.extra['repeated_terminals'] == 3
  assert (data.about.ref_min, data.about.ref_max) == (0, 1)


def test_d4rl_episodes_of_one_step_are_kept(tmp_path):
  # Each terminal row is followed by a reset to another observation.
  arrays = flat(terminals=np.isin(np.arange(N), [3, 4, 5]), timeouts=None)
  data = d4rl.load(write(tmp_path / 'hopper_medium-v2.hdf5', arrays))
  assert np.flatnonzero(data.terminated).tolist() == [3, 4, 5]
  assert 'repeated_terminals' not in data.about.extra


@pytest.mark.parametrize(
  ('stem', 'name', 'limit'),
  [
    ('walker_mixed', 'walker2d-medium-replay-v0', 1000),
    ('Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed',)
    + ('antmaze-umaze-v2', 700),
    ('maze2d-umaze-dense-v1', 'maze2d-umaze-dense-v1', 300),
    ('kitchen_microwave_kettle_light_slider-v0', 'kitchen-partial-v0', 280),
    ('pen-v0_demos_clipped', 'pen-human-v0', 100),
  ],
)
def test_d4rl_files_are_known_by_their_own_names(stem, name, limit, tmp_path):
  many = limit + 5
  arrays = {
    'observations': np.arange(many, dtype=np.float32)[:, None],
    'actions': np.zeros((many, 1), np.float32),
    'rewards': np.ones(many, np.float32),
    'terminals': np.zeros(many, bool),
  }
  data = d4rl.load(write(tmp_path / f'{stem}.hdf5', arrays))
  assert data.about.name == name
  # The row at the limit has no next observation, so the one before is cut.
  assert np.flatnonzero(data.truncated).tolist() == [limit - 2]


def test_d4rl_by_name(tmp_path, monkeypatch):
  monkeypatch.setenv('D4RL_DATASET_DIR', str(tmp_path))
  write(tmp_path / 'halfcheetah_medium_expert-v2.hdf5', flat())
  data = open_dataset('halfcheetah-medium-expert-v2')
  assert data.about.name == 'halfcheetah-medium-expert-v2'
  assert data.about.ref_max == 12135


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'actions': None}, 'actions is missing; there are infos, metadata, next'),
    (
      {'rewards': np.zeros((N, 2))},
      r'rewards has shape \(10, 2\), must be a n',
    ),
    ({'observations': np.zeros(N)}, r'observations has shape \(10,\), must be'),
    ({'terminals': np.full(N, 2)}, 'terminals in row 0 is 2, must be 0 or 1'),
    ({'actions': np.zeros((9, 3))}, 'actions has 9 rows, rewards has 10'),
    ({'timeouts': np.zeros(9, bool)}, 'timeouts has 9 rows, rewards has 10'),
    ({'next_observations': np.zeros((8, 2))}, 'next_observations has 8 rows'),
    ({'actions': np.full((N, 3), 1.5)}, r'action in row 0 is 1.5.*\[-1, 1\]'),
    ({'rewards': np.full(N, np.nan)}, 'reward in row 0 is nan'),
    ({'actions': np.full(N, b'a')}, r'actions is \|S1, must be numbers'),
  ],
)
def test_d4rl_damage_is_named(change, message, tmp_path):
  path = write(tmp_path / 'a.hdf5', flat(**change))
  with pytest.raises(ValueError, match=f'^{path}: {message}') as error:
    d4rl.load(path)
  assert '\n' not in str(error.value)


def test_a_torn_hdf5_is_refused(tmp_path):
  path = write(tmp_path / 'a.hdf5', flat())
  raw = path.read_bytes()
  path.write_bytes(raw[: len(raw) // 2])
  with pytest.raises(ValueError, match=f'^{path}: truncated, or not an hdf5'):
    d4rl.load(path)
  # Wrong bytes in the middle of compressed data.
  with h5py.File(tmp_path / 'b.hdf5', 'w') as file:
    for key, value in flat().items():
      file.create_dataset(key, data=value, compression='gzip')
    at = file['rewards'].id.get_chunk_info(0).byte_offset
  raw = bytearray((tmp_path / 'b.hdf5').read_bytes())
  raw[at : at + 8] = b'\xff' * 8
  (tmp_path / 'b.hdf5').write_bytes(raw)
  with pytest.raises(ValueError, match='rewards is damaged'):
    d4rl.load(tmp_path / 'b.hdf5')


# Minari.


@pytest.fixture(scope='module')
def minari():
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('minari')


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('MINARI_DATASETS_PATH', str(tmp_path))
  return tmp_path


def box(shape, low=-np.inf, high=np.inf, dtype=np.float32):
  return gymnasium.spaces.Box(low, high, shape, dtype)


def episode(steps, start, terminated, truncated, width=2):
  """An episode as Minari's writer takes it, and no number of it twice."""
  observations = np.arange((steps + 1) * width, dtype=np.float32) + start
  ends = lambda flag: [False] * (steps - 1) + [flag]
  return {
    'observations': observations.reshape(steps + 1, width),
    'actions': np.linspace(-2, 1, steps, dtype=np.float32)[:, None],
    'rewards': [float(start + i) for i in range(steps)],
    'terminations': ends(terminated),
    'truncations': ends(truncated),
  }


def written_by_minari(minari, buffers, dataset_id='outplay/toy-v0', **options):
  from minari.data_collector import EpisodeBuffer

  spaces = {
    'observation_space': box((2,)),
    'action_space': gymnasium.spaces.Box(
      np.float32([-2]), np.float32([1]), (1,)
    ),
  }
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return minari.create_dataset_from_buffers(
      dataset_id=dataset_id,
      buffer=[EpisodeBuffer(**b) for b in buffers],
      **{**spaces, **options},
    )


THREE = (
  episode(3, 0, True, False),
  episode(1, 100, False, True),
  episode(4, 200, False, False),
)


def test_what_minari_wrote_is_read(minari, home):
  written_by_minari(minari, THREE, algorithm_name='by hand')
  data = open_dataset('outplay/toy-v0')
  assert data.observation[:, 0].tolist() == [0, 2, 4, 100, 200, 202, 204, 206]
  assert data.next_observation[:, 0].tolist() == [
    *(2, 4, 6),
    102,
    *(202, 204, 206, 208),
  ]
  assert data.reward.tolist() == [0, 1, 2, 100, 200, 201, 202, 203]
  assert np.flatnonzero(data.terminated).tolist() == [2]
  assert np.flatnonzero(data.truncated).tolist() == [3]
  assert data.episode.tolist() == [0] * 3 + [1] + [2] * 4
  assert layout.returns(data).tolist() == [3, 100]
  assert data.about.name == 'outplay/toy-v0'
  assert data.about.source == 'by hand'
  assert (data.about.action_low, data.about.action_high) == (-2, 1)
  for path in ('', 'data', 'data/main_data.hdf5'):
    assert_same(open_dataset(home / 'outplay/toy-v0' / path), data)


def test_more_than_ten_episodes_keep_their_order(minari, home):
  many = [episode(1 + i % 3, 10 * i, i % 2 == 0, False) for i in range(12)]
  written_by_minari(minari, many)
  data = open_dataset('outplay/toy-v0')
  assert np.diff(data.reward).min() > 0
  # An episode that stops without a flag was cut; the last one is unfinished.
  first = layout.first_rows(data)
  ends = np.append(first[1:], len(data.reward)) - 1
  assert data.terminated[ends].tolist() == [True, False] * 6
  assert data.truncated[ends].tolist() == [False, True] * 5 + [False, False]


def test_minari_reads_what_is_written(minari, home):
  written_by_minari(minari, THREE)
  data = open_dataset('outplay/toy-v0')
  about = data.about._replace(
    name='outplay/again-v1',
    env='Toy-v1',
    ref_min=-5.0,
    ref_max=15.0,
    source='somebody',
    extra={'seed': 3},
  )
  data = data._replace(about=about)
  path = minari_files.save(data, 'outplay/again-v1')
  assert path == home / 'outplay/again-v1'
  theirs = minari.load_dataset('outplay/again-v1')
  assert theirs.total_episodes == 3 and theirs.total_steps == 8
  assert theirs.observation_space == box((2,))
  assert theirs.action_space == gymnasium.spaces.Box(-2, 1, (1,), np.float32)
  for i, (got, want) in enumerate(zip(theirs.iterate_episodes(), THREE)):
    assert got.id == i
    for key, value in want.items():
      np.testing.assert_array_equal(getattr(got, key), value, err_msg=key)
  score = minari.get_normalized_score(theirs, np.array(10.0))
  np.testing.assert_allclose(score, 0.75)
  np.testing.assert_allclose(layout.normalised_score(about, 10.0), 75)
  assert list(minari.list_local_datasets()) == [
    'outplay/again-v1',
    'outplay/toy-v0',
  ]
  assert_same(open_dataset('outplay/again-v1'), data)
  # And through our own files.
  npz.save(data, home / 'ours')
  assert_same(npz.load(home / 'ours'), data)


def test_frames_are_written_as_they_are(minari, home):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (6, 40, 40, 3), np.uint8)
  chained = np.concatenate([frames[1:], frames[:1]])
  data = toy(observation=frames, next_observation=chained)
  minari_files.save(data, 'outplay/frames-v0')
  got = next(iter(minari.load_dataset('outplay/frames-v0').iterate_episodes()))
  np.testing.assert_array_equal(got.observations, frames[:3])
  assert_same(
    open_dataset('outplay/frames-v0')._replace(about=data.about), data
  )


def test_jpeg_frames_are_refused(minari, home):
  frames = np.zeros((3, 40, 40, 3), np.uint8)
  frames[1, :20] = 255
  buffer = {**episode(2, 0, True, False), 'observations': frames}
  space = box((40, 40, 3), 0, 255, np.uint8)
  written_by_minari(minari, [buffer], observation_space=space)
  with pytest.raises(ValueError, match='are JPEG frames, which are un'):
    open_dataset('outplay/toy-v0')


@pytest.mark.parametrize('kind', ['Dict', 'Tuple'])
def test_flat_dicts_and_tuples_become_vectors(kind, minari, home):
  leaves = {
    'goal': np.arange(6.0).reshape(3, 2),
    'achieved': np.arange(3.0)[:, None] + 10,
    'state': np.arange(12.0).reshape(3, 2, 2) + 20,
  }
  spaces = {k: box(v.shape[1:], dtype=np.float64) for k, v in leaves.items()}
  if kind == 'Dict':
    space = gymnasium.spaces.Dict(spaces)
    observations = leaves
    row = lambda i: {k: v[i] for k, v in leaves.items()}
  else:
    space = gymnasium.spaces.Tuple(list(spaces.values()))
    observations = tuple(leaves.values())
    row = lambda i: tuple(v[i] for v in leaves.values())
  buffer = {**episode(2, 0, True, False), 'observations': observations}
  written_by_minari(minari, [buffer], observation_space=space)
  data = open_dataset('outplay/toy-v0')
  for i in range(2):
    flatten = lambda j: gymnasium.spaces.flatten(space, row(j))
    np.testing.assert_array_equal(data.observation[i], flatten(i))
    np.testing.assert_array_equal(data.next_observation[i], flatten(i + 1))


def test_discrete_actions_are_refused(minari, home):
  buffer = {**episode(2, 0, True, False), 'actions': np.array([0, 1])}
  discrete = gymnasium.spaces.Discrete(2)
  written_by_minari(minari, [buffer], 'outplay/d-v0', action_space=discrete)
  with pytest.raises(ValueError, match='action_space is Discrete, must be Box'):
    open_dataset('outplay/d-v0')


Box, Dict = gymnasium.spaces.Box, gymnasium.spaces.Dict


@pytest.mark.parametrize(
  'space',
  [
    Dict(position=box((2,)), goal=box((2,)), age=box((1,))),
    Dict([('z', box((2, 2))), ('a', box((3,))), ('m', box(()))]),
    Dict({'b': box((2,)), 'a': box((1,))}),
    Dict([('z', gymnasium.spaces.Discrete(3, start=2)), ('a', box((2,)))]),
    Dict([('b', Dict([('y', box((1,))), ('x', box((2,)))])), ('a', box((1,)))]),
    gymnasium.spaces.Tuple(
      [Dict(q=box((1,)), p=box((2,))), gymnasium.spaces.MultiBinary(3)]
    ),
    gymnasium.spaces.Discrete(4),
    Box(0, 255, (5, 3, 4), np.uint8),
    Box(0, 255, (3, 5, 4), np.uint8),
  ],
)
def test_columns_are_those_of_the_simulator(space, minari, home):
  """Whatever the order of names, the file's rows are what the codec gives."""
  space.seed(0)
  rows = [space.sample() for _ in range(3)]

  def stack(space, rows):
    if isinstance(space, Dict):
      parts = space.spaces.items()
      return {k: stack(part, [row[k] for row in rows]) for k, part in parts}
    if isinstance(space, gymnasium.spaces.Tuple):
      parts = enumerate(space.spaces)
      return tuple(stack(part, [row[i] for row in rows]) for i, part in parts)
    return np.stack([np.asarray(row) for row in rows])

  stacked = stack(space, rows)
  buffer = {**episode(2, 0, True, False), 'observations': stacked}
  written_by_minari(minari, [buffer], observation_space=space)
  data = open_dataset('outplay/toy-v0')
  spec, convert = host.observation_codec(space, 'x')
  want = convert(stacked)
  assert data.observation.shape[1:] == spec.shape
  np.testing.assert_array_equal(data.observation, want[:-1])
  np.testing.assert_array_equal(data.next_observation, want[1:])
  sizes = [size for _, size in host.columns(space, 'x')]
  assert sum(sizes) in (0, math.prod(spec.shape))


@pytest.fixture
def folder(home):
  """Toy rows that are chained, as a Minari folder of our own."""
  frames = np.arange(14.0).reshape(7, 2)
  data = toy(observation=frames[:-1], next_observation=frames[1:])
  return minari_files.save(data, 'outplay/toy-v0') / 'data'


def edit(folder, **fields):
  file = folder / 'metadata.json'
  metadata = {**json.loads(file.read_text()), **fields}
  metadata = {k: v for k, v in metadata.items() if v is not None}
  file.write_text(json.dumps(metadata))


def test_damaged_folders_are_named(folder):
  whole = (folder / 'metadata.json').read_text()
  for fields, message in (
    ({'total_episodes': 4}, 'main_data.hdf5: episode_3 is missing'),
    ({'total_episodes': 0}, 'total_episodes is 0, must be at least 1'),
    ({'total_episodes': None}, 'missing required field `total_episodes`'),
    ({'data_format': 'arrow'}, "data_format is 'arrow', must be 'hdf5'"),
    ({'action_space': None}, 'missing required field `action_space`'),
    ({'observation_space': '{"type"'}, 'observation_space is not JSON'),
    (
      {'observation_space': '{"type": "Box", "shape": [3]}'},
      r'rows of shape \(2,\), must be \(3,\) by observation_space',
    ),
  ):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message) as error:
      minari_files.load(folder)
    assert '\n' not in str(error.value)
    (folder / 'metadata.json').write_text(whole)
  (folder / 'metadata.json').write_text(whole[:40])
  with pytest.raises(ValueError, match=r'metadata\.json is not JSON'):
    minari_files.load(folder)
  with pytest.raises(ValueError, match='must be a Minari folder'):
    minari_files.load(folder / 'nothing')


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('rewards', None, 'episode_1/rewards is missing'),
    ('actions', np.zeros((2, 1)), 'episode_1/actions has 2 steps, rewards'),
    ('observations', np.zeros((3, 2)), 'episode_1/observations has 2 steps'),
    ('terminations', [0, 1, 0], 'episode_1 has a flag at step 1 of 3'),
    (
      'observations',
      np.zeros((4, 3)),
      r'episode_1/observations has rows of sh',
    ),
    ('observations', np.zeros(4), r'episode_1/observations has rows of shape'),
    ('rewards', [0, np.nan, 0], 'reward in row 3 is nan'),
    ('actions', np.full((3, 1), 9.0), r'action in row 2 is 9.0'),
  ],
)
def test_damaged_episodes_are_named(key, value, message, folder):
  with h5py.File(folder / 'main_data.hdf5', 'a') as file:
    del file[f'episode_1/{key}']
    if value is not None:
      file[f'episode_1/{key}'] = np.asarray(value)
  with pytest.raises(ValueError, match=f'^{folder}/main_data.hdf5: {message}'):
    minari_files.load(folder)


def test_what_minari_cannot_hold_is_refused(home):
  with pytest.raises(ValueError, match='next_observation in row 0 differs'):
    minari_files.save(toy(), 'outplay/toy-v0')
  for name in ('toy', '../toy-v0', 'a b-v0', '/toy-v0', ''):
    with pytest.raises(ValueError, match='must be like outplay/name-v0'):
      minari_files.save(toy(), name)
  assert list(home.iterdir()) == []


def test_nothing_is_overwritten_and_names_come_from_env_spec(folder):
  data = minari_files.load(folder)
  with pytest.raises(ValueError, match='exists already'):
    minari_files.save(data, 'outplay/toy-v0')
  assert data.about.env == 'Toy-v1'
  edit(folder, outplay=None, env_spec=json.dumps({'id': 'Hopper-v5'}))
  assert minari_files.load(folder).about.env == 'gymnasium:Hopper-v5'
  edit(folder, env_spec=None)
  assert minari_files.load(folder).about.env == ''
