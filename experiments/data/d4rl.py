"""Reads D4RL's hdf5 files (Fu et al. 2020) from this machine.

A file has flat arrays: `observations`, `actions`, `rewards`, `terminals`, and
usually `timeouts` and `next_observations`. Missing arrays are filled in if
possible, and refused otherwise:

- Without `timeouts` (files of v0), episodes are truncated after the task's
  number of steps; unknown tasks are refused.
- Without `next_observations`, the next row has the next observation. A terminal
  row gets its own (values are never bootstrapped from it, but a dynamics model
  must not learn from it). A row at a time limit is dropped and the row before
  it truncated, so the return lacks the last reward; an unfinished last row is
  dropped, too.
- A row with both flags has terminated.
- Some files (antmaze) continue after the goal and set `terminals` in each row
  until the time limit: the episode ends with the first such row, and the others
  are dropped. With `next_observations`, their observations distinguish them
  from episodes of one step.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.data import d4rl_names, hdf5, layout
from experiments.files.errors import UserError, shown


def load(path: str | pathlib.Path, max_steps: int | None = None):
  """Reads a file into a `layout.Dataset` with action bounds [-1, 1].

  A name that starts with a task's name determines the reference scores, the
  time limit and the simulator; `max_steps` is the time limit of other tasks
  without `timeouts`.

  Raises:
    ValueError: h5py is not installed, a key is missing, damaged or of a wrong
      shape, or the rows are not a valid data set.

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
  where, name = shown(path), d4rl_names.name_of(path.stem)
  task = d4rl_names.task_of(name) or d4rl_names.Task(None, None, None)
  with hdf5.open_file(path, follow=True) as file:
    reader = hdf5.Reader(file, path)
    column = lambda key, many: _column(reader, key, where, many)
    observation, action = (column(k, True) for k in ('observations', 'actions'))
    reward, terminal = (column(k, False) for k in ('rewards', 'terminals'))
    terminal = _flags(terminal, 'terminals', where)
    if reader.has('timeouts'):
      timeout = _flags(column('timeouts', False), 'timeouts', where)
    else:
      timeout = _timeouts(terminal, max_steps or task.steps, where)
    following = None
    if reader.has('next_observations'):
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
      raise UserError(
        f'{where}: {key} has {length} rows, rewards has {len(reward)}: must be '
        'equal'
      )
  if not len(reward):
    raise UserError(f'{where}: rewards has no rows')
  if following is not None and following.shape != observation.shape:
    raise UserError(
      f'{where}: next_observations has shape {following.shape}, observations '
      f'{observation.shape}: must be equal'
    )
  repeated = _repeated(observation, terminal, timeout, following)
  kept = ~repeated if repeated.any() else slice(None)
  terminal, timeout = terminal[kept], (timeout & ~terminal)[kept]
  start = observation[kept], action[kept], reward[kept]
  if following is None:
    rows = _build_next(*start, terminal, timeout)
  else:
    rows = *start, following[kept], terminal, timeout
  ones = np.ones(action.shape[1:], np.float32)
  extra: dict[str, Any] = {
    'next_observations': 'built' if following is None else 'stored'
  }
  if repeated.any():
    extra['repeated_terminals'] = int(repeated.sum())
  about = layout.About(
    name=shown(name, 100),
    env=task.env,
    action_low=-ones,
    action_high=ones,
    ref_min=task.ref_min,
    ref_max=task.ref_max,
    source=f'D4RL, {shown(path.name, 100)}',
    extra=extra,
  )
  return layout.check(layout.make(*rows, about=about), where)


def _repeated(observation, terminal, timeout, following):
  """Rows that repeat the termination of the episode before them."""
  again = terminal.copy()
  again[0] = False
  # After a time limit there is a reset, whatever the flags are.
  again[1:] &= terminal[:-1] & ~timeout[:-1]
  rows = np.flatnonzero(again)
  if following is not None and len(rows):
    same = following[rows - 1] == observation[rows]
    again[rows] = same.reshape(len(rows), -1).all(-1)
  return again


def _column(reader, key, path, many):
  value = reader.read(key)
  if not many and value.ndim == 2 and value.shape[1] == 1:
    value = value[:, 0]
  if value.ndim < 2 if many else value.ndim != 1:
    want = 'a vector per row' if many else 'a number per row'
    raise UserError(f'{path}: {key} has shape {value.shape}, must be {want}')
  return value


def _flags(value, key, path):
  bad = (value != 0) & (value != 1)
  if bad.any():
    row = int(np.argmax(bad))
    raise UserError(
      f'{path}: {key} in row {row} is {value[row]}, must be 0 or 1'
    )
  return value.astype(bool)


def _timeouts(terminal, limit, path):
  """The last rows of episodes that reach `limit` steps."""
  if limit is None:
    raise UserError(
      f'{path}: timeouts is missing, and the time limit of this task is '
      'unknown; add the key, or name the file after its data set, such as '
      'hopper-medium-v2.hdf5'
    )
  timeout = np.zeros_like(terminal)
  start = 0
  for end in [*np.flatnonzero(terminal), len(terminal) - 1]:
    timeout[start + limit - 1 : end + 1 : limit] = True
    start = end + 1
  return timeout


def _build_next(observation, action, reward, terminal, timeout):
  """All columns without the rows whose next observation is unknown."""
  following = np.concatenate([observation[1:], observation[-1:]])
  following[terminal] = observation[terminal]
  unknown = timeout.copy()
  unknown[-1] |= ~terminal[-1]
  # The row before a dropped one becomes the end of its episode.
  cut = np.concatenate([unknown[1:], [False]]) & ~terminal & ~timeout
  # An unfinished last episode is not truncated.
  if not (terminal[-1] or timeout[-1]):
    cut[-2:] = False
  rows = ~unknown
  return (
    *(observation[rows], action[rows], reward[rows], following[rows]),
    *(terminal[rows], cut[rows]),
  )
