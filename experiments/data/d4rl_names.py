"""D4RL's data sets by name: their addresses and their tasks.

From D4RL's `infos.py` at 0ace16d and the time limits that it registers its
environments with.
"""

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

_HOST = 'http://rail.eecs.berkeley.edu/datasets/offline_rl'


class Task(NamedTuple):
  """One of D4RL's tasks.

  Attributes:
    ref_min: mean return of a random policy (score 0); None if unknown.
    ref_max: mean return of an expert (score 100); None if unknown.
    steps: the time limit; None if unknown.
    env: envpool's nearest simulator; its version differs from that of the data,
      a caveat when scores are compared with published ones.
  """

  ref_min: float | None
  ref_max: float | None
  steps: int | None
  env: str = ''


# By the beginning of a data set's name; the longest match counts.
TASKS = {
  'hopper': Task(-20.272305, 3234.3, 1000, 'Hopper-v4'),
  'halfcheetah': Task(-280.178953, 12135.0, 1000, 'HalfCheetah-v4'),
  'walker2d': Task(1.629008, 4592.3, 1000, 'Walker2d-v4'),
  'ant': Task(-325.6, 3879.7, 1000, 'Ant-v3'),
  'pen': Task(96.262799, 3076.8331017826877, 100),
  'hammer': Task(-274.856578, 12794.134825156867, 200),
  'door': Task(-56.512833, 2880.5693087298737, 200),
  'relocate': Task(-6.425911, 4233.877797728884, 200),
  'antmaze': Task(0.0, 1.0, 1000),
  'antmaze-umaze': Task(0.0, 1.0, 700),
  'maze2d': Task(None, None, None),
  'maze2d-open': Task(0.01, 20.66, 150),
  'maze2d-umaze': Task(23.85, 161.86, 300),
  'maze2d-medium': Task(13.13, 277.39, 600),
  'maze2d-large': Task(6.7, 273.99, 800),
  'maze2d-open-dense': Task(11.17817, 27.166538620695782, 150),
  'maze2d-umaze-dense': Task(68.537689, 193.66285642381482, 300),
  'maze2d-medium-dense': Task(44.264742, 297.4552547777125, 600),
  'maze2d-large-dense': Task(30.569041, 303.4857382709002, 800),
  'kitchen': Task(0.0, 4.0, 280),
  'flow-ring': Task(-165.22, 24.42, None),
  'flow-merge': Task(118.67993, 330.03179, None),
  'carla': Task(None, None, None),
  'minigrid': Task(None, None, None),
  'bullet': Task(None, None, None),
}
_QUALITIES = ('random', 'medium', 'expert', 'medium-replay', 'medium-expert')


def _listed() -> Iterator[tuple[str, str]]:
  """All names with the paths of their files below D4RL's folder."""
  for task in ('hopper', 'halfcheetah', 'walker2d', 'ant'):
    for quality in _QUALITIES:
      stem = f'{task}_{quality.replace("-", "_")}'
      old = stem.replace('medium_replay', 'mixed')
      if old == 'walker2d_mixed':
        old = 'walker_mixed'
      yield f'{task}-{quality}-v0', f'gym_mujoco/{old}'
    for quality in (*_QUALITIES, 'full-replay'):
      stem = f'{task}_{quality.replace("-", "_")}'
      for version in ('v1', 'v2'):
        path = f'gym_mujoco_{version}/{stem}-{version}'
        yield f'{task}-{quality}-{version}', path
  for task in ('pen', 'hammer', 'door', 'relocate'):
    for quality, stem in (
      ('human', f'{task}-v0_demos_clipped'),
      ('cloned', f'{task}-demos-v0-bc-combined'),
      ('expert', f'{task}-v0_expert_clipped'),
    ):
      yield f'{task}-{quality}-v0', f'hand_dapg/{stem}'
      yield f'{task}-{quality}-v1', f'hand_dapg_v1/{task}-{quality}-v1'
  yield from _mazes()
  for name, stem in (
    ('complete', 'mini_kitchen_microwave_kettle_light_slider'),
    ('partial', 'kitchen_microwave_kettle_light_slider'),
    ('mixed', 'kitchen_microwave_kettle_bottomburner_light'),
  ):
    yield f'kitchen-{name}-v0', f'kitchen/{stem}-v0'
  for task in ('ring', 'merge'):
    for quality, stem in (('random', 'random'), ('controller', 'idm')):
      yield f'flow-{task}-{quality}-v0', f'flow/flow-{task}-v0-{stem}'
  for name, stem in (
    ('lane', 'lane_follow'),
    ('town', 'town_subsamp'),
    ('town-full', 'town'),
  ):
    yield f'carla-{name}-v0', f'carla/carla_{stem}_flat-v0'
  yield 'minigrid-fourrooms-v0', 'minigrid/minigrid4rooms'
  yield 'minigrid-fourrooms-random-v0', 'minigrid/minigrid4rooms_random'
  for task in ('halfcheetah', 'hopper', 'ant', 'walker2d'):
    for quality in _QUALITIES:
      stem = f'{task}_{quality.replace("-", "_")}'
      yield f'bullet-{task}-{quality}-v0', f'bullet/bullet-{stem}'
  for maze in ('open', 'umaze', 'medium', 'large'):
    yield f'bullet-maze2d-{maze}-v0', f'bullet/bullet-maze2d-{maze}-sparse'


def _mazes() -> Iterator[tuple[str, str]]:
  for size, old, starts in (
    ('umaze', 'u-maze', 'False'),
    ('umaze-diverse', 'u-maze', 'True'),
    ('medium-play', 'big-maze', 'True'),
    ('medium-diverse', 'big-maze', 'True'),
    ('large-play', 'hardest-maze', 'True'),
    ('large-diverse', 'hardest-maze', 'True'),
  ):
    goals = 'True' if size.endswith('diverse') else 'False'
    end = f'noisy_multistart_{starts}_multigoal_{goals}_sparse'
    for version, stem in (
      ('v0', f'ant_maze_new/Ant_maze_{old}_{end}'),
      ('v1', f'ant_maze_v1/Ant_maze_{size.partition("-")[0]}_{end}'),
      ('v2', f'ant_maze_v2/Ant_maze_{old}_{end}_fixed'),
    ):
      yield f'antmaze-{size}-{version}', stem
  yield 'maze2d-open-v0', 'maze2d/maze2d-open-sparse'
  yield 'maze2d-open-dense-v0', 'maze2d/maze2d-open-dense'
  for maze in ('umaze', 'medium', 'large'):
    for test in ('', 'eval-'):
      stem = f'maze2d/maze2d-{test}{maze}'
      yield f'maze2d-{test}{maze}-v1', f'{stem}-sparse-v1'
      yield f'maze2d-{test}{maze}-dense-v1', f'{stem}-dense-v1'


_PATHS = dict(_listed())
_STEMS = {path.rpartition('/')[2]: name for name, path in _PATHS.items()}


def url(name: str) -> str | None:
  """Where D4RL keeps a data set, e.g. of `hopper-medium-v2`; None if unknown.

  >>> url('kitchen-mixed-v0').rpartition('/')[2]
  'kitchen_microwave_kettle_bottomburner_light-v0.hdf5'
  """
  path = _PATHS.get(name)
  return None if path is None else f'{_HOST}/{path}.hdf5'


def name_of(stem: str) -> str:
  """The data set's name, from that of its file without the ending.

  >>> name_of('walker_mixed'), name_of('maze2d-large-sparse-v1')
  ('walker2d-medium-replay-v0', 'maze2d-large-v1')
  >>> name_of('my_own')
  'my-own'
  """
  return _STEMS.get(stem) or stem.replace('_', '-')


def task_of(name: str) -> Task | None:
  """The task of a data set's name; None if it is not D4RL's."""
  parts = name.split('-')
  for length in range(len(parts), 0, -1):
    found = TASKS.get('-'.join(parts[:length]))
    if found is not None:
      return found
  return None


def nearest(name: str) -> list[str] | None:
  """The names nearest to one in D4RL's style, best first; none for others.

  >>> nearest('antmaze-umaze-v3')[0]
  'antmaze-umaze-v2'
  >>> nearest('mujoco/hopper/medium-v0')
  """
  word = name.partition('-')[0]
  ours = [known for known in _PATHS if known.partition('-')[0] == word]
  if not ours or not re.fullmatch(r'[-\w]+-v\d+', name):
    return None
  return difflib.get_close_matches(name, ours, 3, 0) or ours[:3]
