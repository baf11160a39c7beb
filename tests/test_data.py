"""Data sets: the layout, our files, and names. Readers: test_data_formats."""

import json
import sys

import numpy as np
import pytest

from experiments.data import layout, npz
from experiments.data.open import open_dataset
from experiments.files.errors import UserError


def about(**fields):
  one = np.ones(1, np.float32)
  return layout.About('toy-v0', 'Toy-v1', -one, 2 * one, **fields)


def toy(**changes):
  """Three episodes of 2, 3 and 1 steps: terminated, cut, unfinished."""
  columns = {
    'observation': np.arange(12.0).reshape(6, 2),
    'action': np.linspace(-1, 2, 6)[:, None],
    'reward': np.array([1, 2, 3, 4, 5, 6]),
    'next_observation': np.arange(12.0).reshape(6, 2) + 100,
    'terminated': [0, 1, 0, 0, 0, 0],
    'truncated': [0, 0, 0, 0, 1, 0],
    'about': about(ref_min=-10.0, ref_max=30.0, extra={'k': [1, 2]}),
  }
  return layout.make(**{**columns, **changes})


def assert_same(a, b):
  for key in layout.KEYS:
    x, y = getattr(a, key), getattr(b, key)
    np.testing.assert_array_equal(x, y, err_msg=key, strict=True)
  assert a.about._replace(action_low=0, action_high=0) == b.about._replace(
    action_low=0, action_high=0
  )
  np.testing.assert_array_equal(a.about.action_low, b.about.action_low)
  np.testing.assert_array_equal(a.about.action_high, b.about.action_high)


def test_make_numbers_episodes_and_settles_types():
  data = toy(truncated=[0, 1, 0, 0, 1, 0])
  assert data.episode.tolist() == [0, 0, 1, 1, 1, 2]
  # Both flags: it has terminated.
  assert data.truncated.tolist() == [False] * 4 + [True, False]
  dtypes = [getattr(data, key).dtype.name for key in layout.KEYS]
  assert dtypes == ['float32'] * 4 + ['bool', 'bool', 'int32']
  frames = np.zeros((6, 4), np.uint8)
  assert toy(observation=frames).observation.dtype == np.uint8
  assert layout.check(data, 'x') is data


def test_returns_leave_out_an_unfinished_last_episode():
  assert layout.returns(toy()).tolist() == [3, 12]
  whole = toy(terminated=[0, 1, 0, 0, 0, 1])
  assert layout.returns(whole).tolist() == [3, 12, 6]


def test_initial_observations():
  want = [[0, 1], [4, 5], [10, 11]]
  assert layout.initial_observations(toy()).tolist() == want


def test_concatenate_cuts_what_is_open_in_between():
  both = layout.concatenate([toy(), toy()], about())
  layout.check(both, 'both')
  assert both.truncated.tolist() == [False] * 4 + [True] * 2 + [
    *([False] * 4),
    True,
    False,
  ]
  # The episode that was open between the two does not count as whole.
  assert both.about.extra['cut_episodes'] == [2]
  assert layout.returns(both).tolist() == [3, 12, 3, 12]
  assert both.terminated.sum() == 2
  wide = toy(action=np.zeros((6, 2)))
  with pytest.raises(ValueError, match='concatenate: action has rows of shape'):
    layout.concatenate([toy(), wide], about())
  with pytest.raises(ValueError, match='at least one'):
    layout.concatenate([], about())


def test_spec_has_bounds_and_statistics(monkeypatch):
  # Several pieces, the last one short.
  monkeypatch.setattr(layout, '_CHUNK', 4)
  spec = layout.spec(toy())
  assert spec.observation == ((2,), np.float32)
  assert spec.action.shape == (1,)
  assert (spec.action.low, spec.action.high) == (-1, 2)
  mean, std = spec.statistics
  np.testing.assert_allclose(mean, [5, 6])
  np.testing.assert_allclose(std, np.std([0, 2, 4, 6, 8, 10]), rtol=1e-6)
  frames = np.zeros((6, 4), np.uint8)
  spec = layout.spec(toy(observation=frames, next_observation=frames))
  assert spec.statistics is None


def test_normalised_score():
  scores = layout.normalised_score(toy().about, np.array([-10, 30, 10, 50.0]))
  assert scores.tolist() == [0, 100, 50, 150]
  with pytest.raises(ValueError, match='ref_min=None'):
    layout.normalised_score(about(ref_max=1.0), 0.0)
  with pytest.raises(ValueError, match='must be below ref_max=1'):
    layout.normalised_score(about(ref_min=1.0, ref_max=1.0), 0.0)


def changed(key, row, value):
  column = np.array(getattr(toy(), key))
  column[row] = value
  return toy()._replace(**{key: column})


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    (changed('observation', (3, 1), np.nan), 'observation in row 3 is nan'),
    (
      changed('next_observation', 5, np.inf),
      'next_observation in row 5 is inf',
    ),
    (changed('reward', 2, np.nan), 'reward in row 2 is nan, must be finite'),
    (changed('action', 4, 2.5), r'action in row 4 is 2.5, .* \[-1, 2\]'),
    (changed('action', 0, -1.1), 'action in row 0 is -1.1'),
    (changed('truncated', 1, True), 'truncated in row 1 is True, but so is t'),
    (changed('episode', 0, 1), 'episode in row 0 is 1, must start at 0'),
    (changed('episode', slice(3, None), 2), 'episode in row 3 is 2'),
    (changed('terminated', 3, True), 'episode in row 4 is 1'),
    (toy()._replace(reward=np.zeros(6)), 'reward is float64, must be float32'),
    (
      toy()._replace(terminated=np.zeros(6, np.int32)),
      'terminated is int32, must be bool',
    ),
    (
      toy()._replace(observation=np.zeros((6, 2), np.int16)),
      'observation is int16, must be float32 or uint8',
    ),
    (
      toy()._replace(next_observation=np.zeros((6, 2), np.uint8)),
      'next_observation is uint8, observation float32',
    ),
    (
      toy()._replace(action=np.zeros((5, 1), np.float32)),
      'action has 5 rows, reward has 6',
    ),
    (
      toy()._replace(action=np.zeros((6, 2), np.float32)),
      r'action has rows of shape \(2,\), must be \(1,\)',
    ),
    (
      toy()._replace(next_observation=np.zeros((6, 3), np.float32)),
      'next_observation has rows of shape',
    ),
    (
      toy()._replace(
        about=about()._replace(action_high=np.ones(2, np.float32))
      ),
      'action_high has shape',
    ),
    (toy()._replace(reward=np.zeros(0, np.float32)), 'reward has no rows'),
  ],
)
def test_what_is_wrong_is_named(wrong, message, monkeypatch):
  for chunk in (2, 100):
    monkeypatch.setattr(layout, '_CHUNK', chunk)
    with pytest.raises(ValueError, match=f'^some.file: {message}') as error:
      layout.check(wrong, 'some.file')
    assert '\n' not in str(error.value)


def test_actions_may_leave_their_bounds_by_rounding():
  layout.check(changed('action', 4, 2 + 9e-6), 'x')
  with pytest.raises(ValueError, match='outside the bounds'):
    layout.check(changed('action', 4, 2 + 2e-5), 'x')


@pytest.mark.parametrize('name', ['set', 'set.npz'])
def test_our_files_come_back(name, tmp_path):
  path = tmp_path / 'deep' / name
  npz.save(toy(), path)
  assert_same(npz.load(path), toy())
  assert_same(open_dataset(str(path)), toy())
  assert [p.name for p in path.parent.iterdir()] == [name]
  with pytest.raises(ValueError, match='exists already'):
    npz.save(toy(), path)


def test_a_folder_opens_as_read_only_memory_maps(tmp_path):
  npz.save(toy(), tmp_path / 'set')
  data = npz.load(tmp_path / 'set')
  for key in layout.KEYS:
    column = getattr(data, key)
    assert isinstance(column, np.memmap) and not column.flags.writeable, key
  assert layout.returns(data).tolist() == [3, 12]


@pytest.mark.parametrize('name', ['set', 'set.npz'])
def test_saving_that_fails_leaves_nothing(name, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='reward in row 2'):
    npz.save(changed('reward', 2, np.nan), tmp_path / name)

  def full(*args, **kwargs):
    raise OSError(28, 'no space left')

  monkeypatch.setattr(np, 'save', full)
  monkeypatch.setattr(np, 'savez_compressed', full)
  with pytest.raises(UserError, match='no space left; make room'):
    npz.save(toy(), tmp_path / name)
  assert list(tmp_path.iterdir()) == []


def tear(path, share=0.6):
  raw = path.read_bytes()
  path.write_bytes(raw[: int(len(raw) * share)])


def test_a_torn_folder_names_file_and_key(tmp_path):
  path = tmp_path / 'set'
  npz.save(toy(), path)
  for key in ('action', 'reward'):
    whole = (path / f'{key}.npy').read_bytes()
    for share in (0, 0.3, 0.95):
      tear(path / f'{key}.npy', share)
      with pytest.raises(ValueError, match=f'{path}: {key} is truncated'):
        npz.load(path)
      (path / f'{key}.npy').write_bytes(whole)
  (path / 'reward.npy').unlink()
  with pytest.raises(ValueError, match=f'{path}: reward is missing'):
    npz.load(path)


def test_a_damaged_about_is_refused(tmp_path):
  path = tmp_path / 'set'
  npz.save(toy(), path)
  file = path / 'about.json'
  fields = json.loads(file.read_text())
  for text, message in (
    (file.read_text()[:30], 'about is not JSON'),
    ('[]', 'about: Expected `object`, got `array`'),
    (json.dumps({**fields, 'version': 2}), 'version 2, must be 1'),
    (
      json.dumps({**fields, 'colour': 'red'}),
      'about has an unknown field colour',
    ),
    (json.dumps({'version': 1}), 'about: .*missing required field `name`'),
  ):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
      npz.load(path)
  file.unlink()
  with pytest.raises(
    ValueError, match='not a data set, because it has neither about'
  ):
    open_dataset(path)


def test_a_damaged_npz_names_file_and_key(tmp_path):
  path = tmp_path / 'set.npz'
  npz.save(toy(), path)
  whole = path.read_bytes()
  tear(path)
  with pytest.raises(ValueError, match=f'{path}: archive is truncated'):
    npz.load(path)
  # One wrong byte within a member's data.
  at = whole.index(b'reward.npy') + 40
  path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
  with pytest.raises(ValueError, match=f'{path}: reward is truncated'):
    npz.load(path)
  np.savez(path.with_name('other.npz'), reward=np.zeros(3))
  with pytest.raises(ValueError, match='about is missing'):
    npz.load(path.with_name('other.npz'))
  with path.open('wb') as file:
    np.save(file, np.zeros(3))
  with pytest.raises(ValueError, match=r'archive is truncated.*single array'):
    npz.load(path)


def test_names_that_are_not_there_say_what_to_fetch(tmp_path, monkeypatch):
  monkeypatch.setenv('D4RL_DATASET_DIR', str(tmp_path / 'd4rl'))
  monkeypatch.setenv('MINARI_DATASETS_PATH', str(tmp_path / 'minari'))
  for name, message in (
    (
      'hopper-medium-replay-v2',
      f'{tmp_path}/d4rl/hopper_medium_replay-v2.hdf5 is missing; fetch '
      'http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/'
      'hopper_medium_replay-v2.hdf5',
    ),
    ('pen-human-v1', 'hand_dapg_v1/pen-human-v1.hdf5 and put it there'),
    ('mujoco/hopper/medium-v0', 'minari download mujoco/hopper/medium-v0'),
    (
      'hopper-medum-v2',
      'looks like a D4RL name .* nearest are hopper-medium-v2',
    ),
    ('antmaze-umaze-v2', 'fetch http.*multigoal_False_sparse_fixed.hdf5 and'),
    ('maze2d-large-v1', 'fetch http.*maze2d/maze2d-large-sparse-v1.hdf5 and'),
    ('kitchen-mixed-v0', 'fetch http.*kettle_bottomburner_light-v0.hdf5 and'),
    ('kitchen-all-v0', 'looks like a D4RL name .* nearest are kitchen-'),
    ('pointmaze-v0', 'minari download pointmaze-v0'),
    ('no/such/folder', 'no such path or name; must be a folder'),
    ('', 'not a data set'),
  ):
    with pytest.raises(ValueError, match=message) as error:
      open_dataset(name)
    assert '\n' not in str(error.value)
  (tmp_path / 'notes.txt').write_text('')
  with pytest.raises(ValueError, match='not a data set; must be'):
    open_dataset(tmp_path / 'notes.txt')


def test_without_h5py_one_line_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'h5py', None)
  (tmp_path / 'a.hdf5').write_bytes(b'')
  with pytest.raises(ValueError, match=r"pip install 'outplay\[hdf5\]'"):
    open_dataset(tmp_path / 'a.hdf5')
