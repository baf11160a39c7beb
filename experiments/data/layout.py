"""The layout of all data sets: rows of transitions and a description.

Axes: `N` transitions, in the order in which they were taken, episode after
episode; `E` episodes. A row contains its own next observation, so no row needs
the one after it. Time limits are `truncated`, never `terminated`: values are
bootstrapped from their next observations.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.core.types import ArraySpec, Continuous, Spec
from experiments.files.errors import UserError, shown

# Actions may exceed their bounds by this much, because of rounding to float32.
BOUNDS_TOLERANCE = 1e-5
_CHUNK = 1 << 16
_CUT = 'cut_episodes'


class About(NamedTuple):
  """The description of a data set.

  Attributes:
    name: the name in messages and results.
    env: envpool's name of the simulator; '' if there is none.
    action_low: lower bounds, float32 `[...]`, an action's shape.
    action_high: upper bounds, float32 `[...]`.
    ref_min: mean return of a random policy (score 0); None if unknown.
    ref_max: mean return of an expert (score 100); None if unknown.
    source: the acting policy and the origin of the file, in words.
    extra: any further JSON values.
  """

  name: str
  env: str
  action_low: np.ndarray
  action_high: np.ndarray
  ref_min: float | None = None
  ref_max: float | None = None
  source: str = ''
  extra: dict[str, Any] = {}  # noqa: RUF012 nobody writes into it.


class Dataset(NamedTuple):
  """Transitions of whole episodes, the last of which may be unfinished.

  numpy arrays or memory maps.

  Attributes:
    observation: float32 or uint8 `[N, ...]`.
    action: float32 `[N, ...]`.
    reward: float32 `[N]`.
    next_observation: float32 or uint8 `[N, ...]`, the true next one, also where
      the episode ends.
    terminated: bool `[N]`.
    truncated: bool `[N]`, whether the episode was truncated here; never True
      together with `terminated`.
    episode: int32 `[N]`, 0, 1, ...
  """

  observation: np.ndarray
  action: np.ndarray
  reward: np.ndarray
  next_observation: np.ndarray
  terminated: np.ndarray
  truncated: np.ndarray
  episode: np.ndarray
  about: About


KEYS = Dataset._fields[:-1]


def make(
  observation: np.ndarray,
  action: np.ndarray,
  reward: np.ndarray,
  next_observation: np.ndarray,
  terminated: np.ndarray,
  truncated: np.ndarray,
  about: About,
) -> Dataset:
  """Makes a data set from arrays of any float or bool type.

  Episodes are numbered. A row with both flags has terminated.

  Args:
    observation: `[N, ...]`; uint8 is kept, other types become float32.
    action: `[N, ...]`.
    reward: `[N]`.
    next_observation: `[N, ...]`.
    terminated: `[N]`.
    truncated: `[N]`.
  """
  terminated = np.asarray(terminated, bool)
  truncated = np.asarray(truncated, bool) & ~terminated
  return Dataset(
    observation=_as_observation(observation),
    action=np.asarray(action, np.float32),
    reward=np.asarray(reward, np.float32),
    next_observation=_as_observation(next_observation),
    terminated=terminated,
    truncated=truncated,
    episode=number_episodes(terminated | truncated),
    about=about,
  )


def number_episodes(ended: np.ndarray) -> np.ndarray:
  """The numbers of episodes, int32 `[N]`, from bool `[N]` marks of last rows.

  >>> number_episodes(np.array([False, True, False, False, True])).tolist()
  [0, 0, 1, 1, 1]
  """
  before = np.concatenate([[0], np.asarray(ended)[:-1]])[: len(ended)]
  return np.cumsum(before, dtype=np.int32)


def check(dataset: Dataset, file: str) -> Dataset:
  """Checks a data set, named `file` in messages, and returns it.

  Every row is read once, in pieces, so memory maps need no memory.

  Raises:
    ValueError: a wrong type, shape or length, a number that is not finite, an
      action out of bounds, both flags on one row, or episodes that are not
      numbered in order. It names the file, the key and the first bad row.
  """
  _check_types(dataset, file)
  about = dataset.about
  low = about.action_low - BOUNDS_TOLERANCE
  high = about.action_high + BOUNDS_TOLERANCE
  for start in range(0, len(dataset.reward), _CHUNK):
    rows = slice(start, start + _CHUNK)
    for key in ('observation', 'action', 'reward', 'next_observation'):
      value = np.asarray(getattr(dataset, key)[rows])
      if value.dtype != np.uint8:
        bad = ~np.isfinite(value)
        _refuse(bad, value, start, file, key, 'must be finite')
    action = np.asarray(dataset.action[rows])
    _refuse(
      (action < low) | (action > high),
      action,
      start,
      file,
      'action',
      f'is outside the bounds {_span(about)}',
    )
  both = dataset.terminated & dataset.truncated
  _refuse(
    both,
    dataset.truncated,
    0,
    file,
    'truncated',
    'but so is terminated: clear truncated in terminal rows',
  )
  want = number_episodes(dataset.terminated | dataset.truncated)
  _refuse(
    dataset.episode != want,
    dataset.episode,
    0,
    file,
    'episode',
    'must start at 0 and be one more after each row that is terminated or '
    'truncated, and after no other',
  )
  _check_about(dataset, file)
  return dataset


def bounds(value: Any, where: str) -> np.ndarray:
  """Reads action bounds from JSON's nested lists of numbers, float32 `[...]`.

  Raises:
    UserError: the value is anything else, has no regular shape, or has a NaN.
  """
  try:
    # Objects at first, because numpy would parse numbers from text.
    plain = np.array(value, object)
    if not all(type(x) in (int, float) for x in plain.flat):
      raise UserError('contains a value that is not a number')
    with np.errstate(over='ignore'):  # Beyond float32 is unbounded.
      found = plain.astype(np.float64).astype(np.float32)
  except (ValueError, TypeError, OverflowError) as error:
    raise UserError(
      f'{shown(where)} must be nested lists with a number for each component '
      f'of an action: {shown(error, 80)}'
    ) from error
  if np.isnan(found).any():
    raise UserError(f'{shown(where)} is nan, must be a number')
  return found


def _check_about(dataset, file):
  """Checks the other fields of `About`, which may come from a file."""
  about, extra = dataset.about, dataset.about.extra
  for key in ('action_low', 'action_high'):
    if not np.size(getattr(about, key)):
      raise UserError(
        f'{file}: {key} is empty: an action must have at least one number'
      )
  if (about.action_low > about.action_high).any():
    raise UserError(
      f'{file}: action_low {about.action_low.tolist()} must be at most '
      f'action_high {about.action_high.tolist()}'
    )
  for key in ('ref_min', 'ref_max'):
    value = getattr(about, key)
    if value is not None and not np.isfinite(value):
      raise UserError(f'{file}: {key} is {value}, must be finite')
  options = extra.get('options', [])
  if not isinstance(options, list | tuple) or not all(
    isinstance(option, str) for option in options
  ):
    raise UserError(
      f'{file}: options is {shown(options, 60)}, must be a list of name=value'
    )
  cut, episodes = extra.get(_CUT, []), int(dataset.episode[-1]) + 1
  if not isinstance(cut, list | tuple) or not all(
    type(i) is int and 0 <= i < episodes for i in cut
  ):
    raise UserError(
      f'{file}: {_CUT} is {shown(cut, 60)}, must be a list of episodes below '
      f'{episodes}'
    )


def _check_types(dataset, file):
  for key in KEYS:
    if not getattr(dataset, key).ndim:
      raise UserError(f'{file}: {key} is a single number, must be rows')
  n = len(dataset.reward)
  if not n:
    raise UserError(f'{file}: reward has no rows')
  for key in ('observation', 'action'):
    shape = getattr(dataset, key).shape[1:]
    if 0 in shape:
      raise UserError(
        f'{file}: {key} has rows of shape {shape}: must have at least one '
        'number'
      )
  dtypes = {'terminated': bool, 'truncated': bool, 'episode': np.int32}
  for key in KEYS:
    value = getattr(dataset, key)
    want = (np.dtype(dtypes.get(key, np.float32)),)
    if key.endswith('observation'):
      want += (np.dtype(np.uint8),)
    if value.dtype not in want:
      names = ' or '.join(map(str, want))
      raise UserError(f'{file}: {key} is {value.dtype}, must be {names}')
    if len(value) != n:
      raise UserError(
        f'{file}: {key} has {len(value)} rows, reward has {n}: must be equal'
      )
  about = dataset.about
  shapes = {
    'next_observation': dataset.observation.shape[1:],
    'action': np.shape(about.action_low),
    **dict.fromkeys(('reward', 'terminated', 'truncated', 'episode'), ()),
  }
  for key, shape in shapes.items():
    got = getattr(dataset, key).shape[1:]
    if got != shape:
      raise UserError(f'{file}: {key} has rows of shape {got}, must be {shape}')
  if np.shape(about.action_low) != np.shape(about.action_high):
    raise UserError(
      f'{file}: action_high has shape {np.shape(about.action_high)}, '
      f'action_low {np.shape(about.action_low)}: must be equal'
    )
  if dataset.observation.dtype != dataset.next_observation.dtype:
    raise UserError(
      f'{file}: next_observation is {dataset.next_observation.dtype}, '
      f'observation {dataset.observation.dtype}: must be equal'
    )


def _refuse(bad, value, start, file, key, what):
  if bad.any():
    where = tuple(np.argwhere(bad)[0])
    raise UserError(
      f'{file}: {key} in row {start + where[0]} is {value[where]}, {what}'
    )


def _span(about):
  low, high = np.ravel(about.action_low), np.ravel(about.action_high)
  if (low == low[0]).all() and (high == high[0]).all():
    return f'[{low[0]:g}, {high[0]:g}]'
  return f'{low.tolist()} to {high.tolist()}'


def first_rows(dataset: Dataset) -> np.ndarray:
  """The first row of each episode, int `[E]`."""
  return np.flatnonzero(np.diff(dataset.episode, prepend=-1))


def initial_observations(dataset: Dataset) -> np.ndarray:
  """The first observation of each episode, `[E, ...]`."""
  return np.asarray(dataset.observation[first_rows(dataset)])


def is_finished(dataset: Dataset) -> bool:
  """Whether the last episode ends with the last row."""
  return bool(dataset.terminated[-1] or dataset.truncated[-1])


def returns(dataset: Dataset) -> np.ndarray:
  """Undiscounted returns of whole episodes, float64 `[E]`.

  Unfinished episodes are left out: the last one, and those that `concatenate`
  has truncated, which are listed in `about.extra['cut_episodes']`.
  """
  reward = np.asarray(dataset.reward, np.float64)
  sums = np.bincount(dataset.episode, reward)
  whole = np.ones(len(sums), bool)
  whole[-1] = is_finished(dataset)
  whole[list(dataset.about.extra.get(_CUT, ()))] = False
  return sums[whole]


def concatenate(datasets: Sequence[Dataset], about: About) -> Dataset:
  """Concatenates the rows of several data sets.

  An unfinished last episode is truncated if other rows follow, and listed in
  `about.extra['cut_episodes']`.

  Raises:
    ValueError: there is no data set, or observations or actions differ in
      shape.
  """
  if not datasets:
    raise UserError('concatenate: needs at least one data set')
  for key in ('observation', 'action'):
    shapes = {getattr(d, key).shape[1:] for d in datasets}
    if len(shapes) > 1:
      raise UserError(f'concatenate: {key} has rows of shapes {shapes}')
  columns = {k: np.concatenate([getattr(d, k) for d in datasets]) for k in KEYS}
  ends = np.cumsum([len(d.reward) for d in datasets])[:-1] - 1
  columns['truncated'][ends] |= ~columns['terminated'][ends]
  del columns['episode']
  cut, before = [], 0
  for dataset in datasets:
    cut += [before + i for i in dataset.about.extra.get(_CUT, ())]
    before += int(dataset.episode[-1]) + 1
    if dataset is not datasets[-1] and not is_finished(dataset):
      cut.append(before - 1)
  extra = {n: x for n, x in about.extra.items() if n != _CUT}
  about = about._replace(extra=extra | ({_CUT: cut} if cut else {}))
  return make(**columns, about=about)


def spec(dataset: Dataset) -> Spec:
  """The spec of the environment, with statistics of the observations.

  These are mean and standard deviation, float32 `[F]`, of the flattened
  observations; frames (uint8) have none.
  """
  about, shape = dataset.about, dataset.observation.shape[1:]
  return Spec(
    observation=ArraySpec(shape, dataset.observation.dtype.type),
    action=Continuous(
      dataset.action.shape[1:], about.action_low, about.action_high
    ),
    name=about.name,
    statistics=_statistics(dataset.observation),
  )


def _statistics(observation):
  if observation.dtype == np.uint8:
    return None
  n = len(observation)
  mean = np.asarray(sum(c.sum(0) for c in _chunks(observation))) / n
  squares = (np.square(c - mean).sum(0) for c in _chunks(observation))
  std = np.sqrt(np.asarray(sum(squares)) / n)
  return mean.astype(np.float32), std.astype(np.float32)


def _chunks(observation) -> Iterator[np.ndarray]:
  """Rows as float64 `[up to _CHUNK, F]`."""
  for start in range(0, len(observation), _CHUNK):
    rows = np.asarray(observation[start : start + _CHUNK], np.float64)
    yield rows.reshape(len(rows), -1)


def normalised_score(about: About, returns: Any) -> Any:
  """Normalised scores `100 (R - min) / (max - min)` of returns of any shape.

  Raises:
    ValueError: the data set lacks reference returns, or `min` is not below
      `max`.

  Source: D4RL (Fu et al. 2020), section 4.
  """
  low, high = about.ref_min, about.ref_max
  if low is None or high is None:
    raise UserError(
      f'{about.name}: ref_min={low}, ref_max={high}: a normalised score needs '
      'both numbers; report returns instead'
    )
  if not low < high:
    raise UserError(
      f'{about.name}: ref_min={low:g} must be below ref_max={high:g}'
    )
  return 100 * (returns - low) / (high - low)


def _as_observation(x):
  x = np.asarray(x)
  return x if x.dtype == np.uint8 else np.asarray(x, np.float32)
