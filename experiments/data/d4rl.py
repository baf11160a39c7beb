"""D4RL's hdf5 files (Fu et al. 2020), read from this machine.

Flat arrays: `observations`, `actions`, `rewards`, `terminals`, and mostly
`timeouts` and `next_observations`. What is not there is filled in, or refused
where it cannot be:

- Without `timeouts` (files of v0) an episode is cut after the task's number of
  steps; unknown tasks are refused, since time limits would otherwise look like
  steps within an episode.
- Without `next_observations` the next row is the next observation, except
  where an episode ends. A terminal row gets its own observation (nothing is
  ever bootstrapped from it, but a dynamics model must not learn from it). A
  row at a time limit is dropped, and the row before it is then the one that
  is cut; an unfinished last row is dropped too. Returns of cut episodes miss
  their last reward.
- A row with both flags has terminated.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from experiments.data import hdf5, layout


class Task(NamedTuple):
  """One of D4RL's tasks.

  Attributes:
    ref_min: mean return of a random policy (scores 0).
    ref_max: of an expert (scores 100).
    steps: the time limit.
    env: envpool's nearest simulator; its version is not that of the data, so
      that scores compare with published ones with that caveat only.
  """

  ref_min: float
  ref_max: float
  steps: int
  env: str = ''


# D4RL's infos.py at 0ace16d; the time limits of its registered environments.
TASKS = {
  'hopper': Task(-20.272305, 3234.3, 1000, 'Hopper-v4'),
  'halfcheetah': Task(-280.178953, 12135.0, 1000, 'HalfCheetah-v4'),
  'walker2d': Task(1.629008, 4592.3, 1000, 'Walker2d-v4'),
  'ant': Task(-325.6, 3879.7, 1000, 'Ant-v3'),
  'pen': Task(96.262799, 3076.8331017826877, 100),
  'hammer': Task(-274.856578, 12794.134825156867, 200),
  'door': Task(-56.512833, 2880.5693087298737, 200),
  'relocate': Task(-6.425911, 4233.877797728884, 200),
}
_QUALITIES = {
  'gym_mujoco': (
    *('random', 'medium', 'expert'),
    *('medium-replay', 'full-replay', 'medium-expert'),
  ),
  'hand_dapg': ('human', 'expert', 'cloned'),
}
_HOST = 'http://rail.eecs.berkeley.edu/datasets/offline_rl'


def url(name: str) -> str | None:
  """Where D4RL keeps a data set, e.g. of `hopper-medium-v2`; None if unknown.

  Known are its MuJoCo sets of v1 and v2 and its Adroit sets of v1.
  """
  task, _, rest = name.partition('-')
  quality, _, version = rest.rpartition('-')
  for group, tasks, versions in (
    ('gym_mujoco', ('hopper', 'halfcheetah', 'walker2d', 'ant'), ('v1', 'v2')),
    ('hand_dapg', ('pen', 'hammer', 'door', 'relocate'), ('v1',)),
  ):
    if task in tasks and version in versions and quality in _QUALITIES[group]:
      stem = f'{task}-{quality}'
      if group == 'gym_mujoco':
        stem = stem.replace('-', '_')
      return f'{_HOST}/{group}_{version}/{stem}-{version}.hdf5'
  return None


def load(path: str | pathlib.Path, max_steps: int | None = None):
  """Reads a file.

  Args:
    path: of the hdf5 file. A name that starts with a task's gives the
      reference pair, the time limit and the simulator.
    max_steps: time limit, for files without `timeouts` of other tasks.

  Returns:
    A `layout.Dataset`, actions bounded by [-1, 1] as D4RL's are.

  Raises:
    ValueError: h5py is not installed, a key is missing, torn or of a wrong
      shape, or the rows are not in order.

  >>> import tempfile, h5py
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = pathlib.Path(folder) / 'walks-v0.hdf5'
  ...   with h5py.File(file, 'w') as f:
  ...     f['observations'] = np.arange(4, dtype=np.float32)[:, None]
  ...     f['actions'] = np.zeros((4, 1), np.float32)
  ...     f['rewards'] = np.ones(4, np.float32)
  ...     f['terminals'] = np.array([0, 1, 0, 0], bool)
  ...     f['timeouts'] = np.array([0, 0, 0, 1], bool)
  ...   rows = load(file)
  >>> rows.observation.tolist(), rows.next_observation.tolist()
  ([[0.0], [1.0], [2.0]], [[1.0], [1.0], [3.0]])
  >>> rows.terminated.tolist(), rows.episode.tolist()
  ([False, True, False], [0, 0, 1])
  """
  path = pathlib.Path(path)
  task = TASKS.get(path.stem.replace('_', '-').partition('-')[0])
  with hdf5.open_file(path) as file:
    column = lambda key, many: _column(file, key, path, many)
    observation, action = (column(k, True) for k in ('observations', 'actions'))
    reward, terminal = (column(k, False) for k in ('rewards', 'terminals'))
    terminal = _flags(terminal, 'terminals', path)
    if 'timeouts' in file:
      timeout = _flags(column('timeouts', False), 'timeouts', path)
    else:
      limit = max_steps or (task.steps if task else None)
      timeout = _timeouts(terminal, limit, path)
    following = None
    if 'next_observations' in file:
      following = column('next_observations', True)
  lengths = {
    'observations': len(observation),
    'actions': len(action),
    'terminals': len(terminal),
    'timeouts': len(timeout),
    'next_observations': len(reward if following is None else following),
  }
  for key, length in lengths.items():
    if length != len(reward):
      raise ValueError(
        f'{path}: {key} has {length} rows, rewards has {len(reward)}: must be '
        'equal'
      )
  ones = np.ones(action.shape[1:], np.float32)
  about = layout.About(
    name=path.stem.replace('_', '-'),
    env=task.env if task else '',
    action_low=-ones,
    action_high=ones,
    ref_min=task.ref_min if task else None,
    ref_max=task.ref_max if task else None,
    source=f'D4RL, {path.name}',
    extra={'next_observations': 'built' if following is None else 'stored'},
  )
  timeout &= ~terminal
  if following is None:
    rows = _build_next(observation, action, reward, terminal, timeout)
  else:
    rows = observation, action, reward, following, terminal, timeout
  return layout.check(layout.make(*rows, about=about), str(path))


def _column(file, key, path, many):
  value = hdf5.read(file, key, path)
  if not many and value.ndim == 2 and value.shape[1] == 1:
    value = value[:, 0]
  if value.ndim < 2 if many else value.ndim != 1:
    want = 'a vector a row' if many else 'a number a row'
    raise ValueError(f'{path}: {key} has shape {value.shape}, must be {want}')
  return value


def _flags(value, key, path):
  bad = (value != 0) & (value != 1)
  if bad.any():
    row = int(np.argmax(bad))
    raise ValueError(f'{path}: {key} in row {row} is {value[row]}, not 0 or 1')
  return value.astype(bool)


def _timeouts(terminal, limit, path):
  """Last rows of episodes of `limit` steps that do not terminate before."""
  if limit is None:
    raise ValueError(
      f'{path}: timeouts is missing, and the time limit of this task is '
      'unknown; add the key, or name the file as D4RL does'
    )
  timeout = np.zeros_like(terminal)
  start = 0
  for end in [*np.flatnonzero(terminal), len(terminal) - 1]:
    timeout[start + limit - 1 : end + 1 : limit] = True
    start = end + 1
  return timeout


def _build_next(observation, action, reward, terminal, timeout):
  """All columns without the rows whose next observation is not known."""
  following = np.concatenate([observation[1:], observation[-1:]])
  following[terminal] = observation[terminal]
  unknown = timeout.copy()
  unknown[-1] |= ~terminal[-1]
  # The row before a dropped one ends its episode, unless it had ended there.
  cut = np.concatenate([unknown[1:], [False]]) & ~terminal & ~timeout
  # Rows at the end of an open episode are not cut, only not all there.
  if not (terminal[-1] or timeout[-1]):
    cut[-2:] = False
  rows = ~unknown
  return (
    *(observation[rows], action[rows], reward[rows], following[rows]),
    *(terminal[rows], cut[rows]),
  )
