"""What a data set was recorded in is what its learner is evaluated in."""

import dataclasses
import gc
import json
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from experiments import build
from experiments.build import dataset, saved
from experiments.data import minari_files
from experiments.data.open import open_dataset
from experiments.envs import recorded
from experiments.files.errors import UserError
from experiments.runtime import run_config

pytest.importorskip('h5py')
_ID = 'RecordedReach-v0'


class Reach(gymnasium.Env):
  """Go to a goal in the plane; the reward is minus the distance."""

  def __init__(self, order='position,goal', speed=0.3):
    box = lambda: spaces.Box(-9, 9, (2,), np.float64)
    # Keywords keep their order, a dictionary would be sorted.
    self.observation_space = spaces.Dict(**{k: box() for k in order.split(',')})
    self.action_space = spaces.Box(-1, 1, (2,), np.float32)
    self.speed = speed

  def _look(self):
    seen = {'position': self._at.copy(), 'goal': self._goal.copy()}
    return {k: seen[k] for k in self.observation_space.spaces}

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self._at, self._goal = np.zeros(2), self.np_random.uniform(1, 2, 2)
    return self._look(), {}

  def step(self, action):
    self._at = self._at + self.speed * np.clip(action, -1, 1)
    far = float(np.abs(self._at - self._goal).sum())
    return self._look(), -far, False, False, {}


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('MINARI_DATASETS_PATH', str(tmp_path))
  gymnasium.register(_ID, entry_point=Reach)
  yield tmp_path
  gymnasium.registry.pop(_ID, None)


@pytest.fixture
def minari():
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('minari')


def record(minari, wrap=lambda env: env, limit=5, **kwargs):
  """A data set of a simple rule, named by `me/reach-v0`."""
  # As text, which a data set's `env_spec` can hold.
  gymnasium.registry[_ID].entry_point = f'{__name__}:Reach'
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    made = gymnasium.make(_ID, max_episode_steps=limit, **kwargs)
    env = minari.DataCollector(wrap(made))
    for seed in range(4):
      env.reset(seed=seed)
      for _ in range(limit):
        env.step(np.float32([0.5, 1]))
    env.create_dataset(
      dataset_id='me/reach-v0',
      author='x',
      author_email='x',
      code_permalink='x',
      algorithm_name='rule',
    )
    # Its folder is cleaned up here, where its warning is expected.
    del env
    gc.collect()


def described(env=None, settings=()):
  return build.describe(
    'bc_small', dataset='me/reach-v0', env=env, steps=2000, settings=settings
  )


def first_step(experiment):
  """Observation after a reset and after a step; steps of an episode."""
  env = build.make_env(experiment, training=False, num_envs=1)
  simulator = env.start(0)
  begin = simulator.reset().observation[0]
  action = np.float32([[0.5, 1]])
  timestep, _ = simulator.step(action)
  seen, steps = timestep.observation[0], 1
  while not timestep.is_last()[0]:
    timestep, _ = simulator.step(action)
    steps += 1
  simulator.close()
  return begin, seen, steps


def test_arguments_limit_and_wrappers_are_made_again(minari, home):
  wrap = lambda env: gymnasium.wrappers.StickyAction(env, 0.0)
  record(minari, wrap, limit=7, speed=0.1, order='position,goal')
  experiment = described()
  assert experiment.env_name == f'gymnasium:{_ID}'
  found = recorded.decode(experiment.env.recorded)
  assert found.kwargs == {'speed': 0.1, 'order': 'position,goal'}
  assert [w.name for w in found.wrappers] == ['StickyAction']
  begin, seen, steps = first_step(experiment)
  assert steps == 7
  # The position comes first, and moves by the recorded speed.
  np.testing.assert_allclose(seen[:2] - begin[:2], [0.05, 0.1], rtol=1e-5)
  np.testing.assert_array_equal(seen[2:], begin[2:])
  assert dataset.notes(experiment) == ()


@pytest.mark.parametrize('order', ['position,goal', 'goal,position'])
def test_the_data_and_the_simulator_have_the_same_columns(order, minari, home):
  record(minari, order=order)
  data = open_dataset('me/reach-v0')
  moving = slice(0, 2) if order == 'position,goal' else slice(2, 4)
  begins = data.observation[[0, 5, 10, 15]]
  assert (begins[:, moving] == 0).all()
  begin, _, _ = first_step(described())
  assert (begin[moving] == 0).all() and np.count_nonzero(begin) == 2


def test_a_simulator_of_another_order_follows_the_data(minari, home):
  record(minari, order='position,goal')
  other = 'RecordedReachOther-v0'
  gymnasium.register(
    other,
    entry_point=Reach,
    kwargs={'order': 'goal,position'},
    max_episode_steps=3,
  )
  try:
    experiment = described(env=f'gymnasium:{other}')
    begin, _, steps = first_step(experiment)
  finally:
    gymnasium.registry.pop(other)
  assert (begin[:2] == 0).all() and (begin[2:] > 0).all() and steps == 3
  (note,) = dataset.notes(experiment)
  assert 'was recorded in RecordedReach-v0' in note
  assert 'position, goal in this order' in note and '\n' not in note


def test_parts_that_are_not_there_are_named(minari, home):
  record(minari)
  experiment = described(env='gymnasium:CartPole-v1')
  spec = build.make_env(experiment, training=False, num_envs=1).spec
  with pytest.raises(UserError, match='CartPole-v1: its action has shape'):
    dataset.spec_of(dataset.opened('me/reach-v0'), spec)


def test_without_its_simulator_a_set_is_trained_on_even_so(minari, home):
  record(minari)
  gymnasium.registry.pop(_ID)
  experiment = described()
  assert experiment.env_name == ''
  (note,) = dataset.notes(experiment)
  assert 'trained without an environment' in note and '--env=NAME' in note
  assert '\n' not in note


def test_a_run_is_played_as_it_was_without_its_data(minari, home, tmp_path):
  record(minari, limit=7, speed=0.1)
  experiment = described()
  run_config.write_run_config(tmp_path / 'run', experiment.as_dict(), 'cpu')
  (home / 'me').rename(home / 'gone')
  again = saved.load_experiment(str(tmp_path / 'run'))
  assert again.env == experiment.env and again.env_name == experiment.env_name
  assert first_step(again)[2] == 7


def test_what_is_not_made_again_is_said(minari, home):
  wrap = lambda env: gymnasium.wrappers.NormalizeReward(env)
  record(minari, wrap)
  (note,) = dataset.notes(described())
  assert 'recorded with the wrapper NormalizeReward, which' in note
  assert '--env=gymnasium:MODULE:ID' in note


def test_the_users_own_options_count_first(minari, home):
  record(minari, limit=7, speed=0.1)
  options = ('env.options=speed=0.5,max_episode_steps=2',)
  begin, seen, steps = first_step(described(settings=options))
  assert steps == 2
  np.testing.assert_allclose(seen[:2] - begin[:2], [0.25, 0.5], rtol=1e-5)
  experiment = described(settings=('env.recorded=none', *options))
  assert experiment.env.recorded == 'none'
  assert first_step(experiment)[2] == 2


def test_the_environment_to_evaluate_in_counts_first(minari, home):
  record(minari, limit=7, speed=0.1)
  file = home / 'me/reach-v0/data/metadata.json'
  content = json.loads(file.read_text())
  spec = {**json.loads(content['env_spec']), 'max_episode_steps': 4}
  file.write_text(json.dumps({**content, 'eval_env_spec': json.dumps(spec)}))
  assert first_step(described())[2] == 4


def test_without_a_limit_episodes_are_as_long_as_the_longest(minari, home):
  record(minari, limit=6)
  file = home / 'me/reach-v0/data/metadata.json'
  content = json.loads(file.read_text())
  spec = {**json.loads(content['env_spec']), 'max_episode_steps': None}
  file.write_text(json.dumps({**content, 'env_spec': json.dumps(spec)}))
  assert first_step(described())[2] == 6


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'id': 'os:system'}, 'names a module'),
    ({'kwargs': {'xml_file': 'x'}}, 'not paths or modules'),
    ({'kwargs': {'a': [{'b': '/etc/passwd'}]}}, 'not paths or modules'),
    ({'wrappers': (('RecordVideo', {}),)}, 'the wrapper RecordVideo is unk'),
    ({'wrappers': (('TimeLimit', {'a': 'os:x'}),)}, 'not paths or modules'),
    ({'max_episode_steps': 0}, 'max_episode_steps=0: must be at least 1'),
  ],
)
def test_what_a_file_may_not_decide_is_refused(changes, message):
  wrong = dataclasses.replace(recorded.NOTHING, **changes)
  with pytest.raises(UserError, match=message) as error:
    recorded.decode(recorded.encode(wrong))
  assert '\n' not in str(error.value)


def test_a_spec_that_names_code_is_refused(minari, home):
  record(minari)
  file = home / 'me/reach-v0/data/metadata.json'
  content = json.loads(file.read_text())
  spec = json.loads(content['env_spec'])
  spec['id'] = f'antigravity:{_ID}'
  file.write_text(json.dumps({**content, 'env_spec': json.dumps(spec)}))
  assert minari_files.load(home / 'me/reach-v0').about.env.count(':') == 2
  with pytest.raises(UserError, match='names code'):
    described()
