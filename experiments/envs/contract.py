"""Checks each call of a user's Gymnasium environment.

A violation becomes an error of one line: the environment, the call, what it
returned, what would be right. Numbers that are not finite are refused where
they enter. An exception of the user's own code is the error's cause; launchers
show its traceback on request. Accepted are rewards and flags as arrays of one
element, observations as lists, floats of another precision, and integers for
floats.
"""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.envs import host
from experiments.files.errors import UserError, shown

RESET = 'reset(*, seed=None, options=None) must return (observation, info)'
STEP = (
  'step(action) must return (observation, reward, terminated, truncated, info)'
)

# An observation this many widths outside its space is not a rounding error.
_FAR = 10.0


class SimulatorError(UserError):
  """A user's environment raised, or returned something invalid."""


class Wrong(Exception):
  """An invalid result: what was returned and what would be right."""


def call(env: str, what: str, remedy: str, function: Callable, *args, **kwargs):
  """Calls a user's code.

  Args:
    env: the environment's name, as in its flag.
    what: the call, for the message.
    remedy: what would be right; shown if the call itself was wrong and the
      exception arose outside the user's code.

  Raises:
    SimulatorError: the function raised an exception or tried to exit.
  """
  try:
    return function(*args, **kwargs)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    text = shown(' '.join(str(error).split()).rstrip('.'))
    if _in_their_code(error):
      text += '; OUTPLAY_TRACEBACK=1 shows where'
    elif remedy:
      text += f'; {remedy}'
    raise SimulatorError(
      f'env={env}: {what} raised {type(error).__name__}: {text}'
    ) from error


def _in_their_code(error: BaseException) -> bool:
  """Whether an exception arose outside of Gymnasium and of this package."""
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  if trace is None or isinstance(error, SyntaxError):
    return True
  name = trace.tb_frame.f_code.co_filename
  path = pathlib.Path(name)
  ours = path.parent == pathlib.Path(__file__).parent
  return not (ours or 'gymnasium' in path.parts or name.startswith('<frozen'))


def checked_reset(result: Any, space: Any) -> Any:
  """The observation of a reset, checked and copied.

  Raises:
    Wrong: the result is not `(observation, info)` or does not fit the space.
  """
  if not _is_row(result, 2):
    raise Wrong(f'returned {described(result)}; {RESET}')
  observation, info = result
  if not isinstance(info, Mapping):
    raise Wrong(f'returned {described(info)} as info; {RESET}, info a dict')
  return checked_observation(observation, space)


def checked_step(result: Any, space: Any) -> tuple[Any, float, bool, bool]:
  """Observation, reward, terminated and truncated of a step, checked.

  Raises:
    Wrong: the result is not a tuple of five, or one of them is invalid.
  """
  if not _is_row(result, 5):
    raise Wrong(f'returned {described(result)}; {STEP}')
  observation, reward, terminated, truncated, info = result
  if not isinstance(info, Mapping):
    raise Wrong(f'returned {described(info)} as info; must be a dict')
  return (
    checked_observation(observation, space),
    _reward(reward),
    _flag(terminated, 'terminated'),
    _flag(truncated, 'truncated'),
  )


def _is_row(result, length) -> bool:
  return isinstance(result, tuple | list) and len(result) == length


def described(value: Any) -> str:
  """A short description of any value."""
  if isinstance(value, tuple | list):
    return f'{type(value).__name__} of {len(value)} values'
  if isinstance(value, np.ndarray):
    return f'array of {value.dtype} {value.shape}'
  if value is None or isinstance(value, str | bool | int | float):
    return shown(repr(value), 40)
  return shown(type(value).__name__, 40)


def _array(value, what) -> np.ndarray:
  try:
    array = np.asarray(value)
  except Exception as error:  # Ragged, or its own `__array__` failed.
    raise Wrong(
      f'returned {described(value)} as {what}, which is not an array; must '
      'hold numbers'
    ) from error
  if array.dtype.kind not in 'biuf':
    raise Wrong(f'returned {described(value)} as {what}; must hold numbers')
  return array


def _reward(value) -> float:
  array = _array(value, 'reward')
  if array.size != 1:
    raise Wrong(f'returned {described(value)} as reward; must be one number')
  reward = float(array.reshape(()))
  if not np.isfinite(_as_float32(reward)):
    raise Wrong(f'returned the reward {reward}; must be finite in float32')
  return reward


def _flag(value, what) -> bool:
  array = _array(value, what)
  one = array.size == 1 and array.dtype.kind in 'biu'
  if not one or array.reshape(()) not in (0, 1):
    raise Wrong(f'returned {described(value)} as {what}; must be True or False')
  return bool(array.reshape(()))


def _as_float32(x):
  with np.errstate(over='ignore'):
    return np.asarray(x, np.float32)


def checked_observation(
  value: Any, space: Any, what: str = 'observation'
) -> Any:
  """Checks and copies an observation, whose memory the environment may reuse.

  The space is one that `host.observation_codec` takes; the result is an array,
  or a dict or tuple of arrays as in the space.

  Raises:
    Wrong: its structure, shape or kind of numbers differs from the space's, or
      a number is not finite.
  """
  kind = host.kind_of(space)
  if kind == 'Dict':
    lacks = [k for k in space.spaces if not _has(value, k)]
    if lacks:
      raise Wrong(
        f'returned {described(value)} as {what}; must be a dict with '
        f'{lacks[0]!r}, as in its space'
      )
    return {
      k: checked_observation(value[k], part, f'{what}[{k!r}]')
      for k, part in space.spaces.items()
    }
  if kind == 'Tuple':
    if not _is_row(value, len(space.spaces)):
      raise Wrong(
        f'returned {described(value)} as {what}; must be a tuple of '
        f'{len(space.spaces)}, as in its space'
      )
    return tuple(
      checked_observation(x, part, f'{what}[{i}]')
      for i, (x, part) in enumerate(zip(value, space.spaces))
    )
  array = np.array(_array(value, what))
  if kind == 'Discrete':
    return _one_of(array, value, space, what)
  shape = tuple(space.shape)
  if array.shape != shape:
    raise Wrong(
      f'returned {what} of shape {array.shape}; must be {shape}, as in its '
      'space'
    )
  if space.dtype == np.uint8 != array.dtype:
    # The cast would truncate fractions and wrap large numbers.
    if array.dtype.kind == 'f':
      raise Wrong(f'returned {what} of {array.dtype}; must be uint8')
    if array.size and not 0 <= array.min() <= array.max() <= 255:
      raise Wrong(
        f'returned {what} from {array.min()} to {array.max()}; must be in '
        '[0, 255], as uint8 is'
      )
  if array.dtype.kind == 'f':
    finite = np.isfinite(_as_float32(array))
    if not finite.all():
      place = [int(i) for i in np.argwhere(~finite)[0]]
      raise Wrong(
        f'returned {what} with {array[~finite][0]} at {place}; must be finite '
        'in float32'
      )
  return array


def check_finite(env: str, call: str, **rows: Any) -> None:
  """Refuses numbers that are not finite in the results of many copies.

  `rows` are the results by name, pytrees of arrays `[E, ...]`.

  Raises:
    SimulatorError: a number is not finite in float32.
  """
  for what, tree in rows.items():
    for leaf in jax.tree.leaves(tree):
      array = np.asarray(leaf)
      if array.dtype.kind != 'f':
        continue
      finite = np.isfinite(_as_float32(array))
      if not finite.all():
        copy = int(np.argwhere(~finite)[0][0])
        raise SimulatorError(
          f'env={env}: {call} of copy {copy} returned {what} with '
          f'{array[~finite][0]}; must be finite in float32'
        )


def _has(value, key) -> bool:
  return isinstance(value, Mapping) and key in value


def _one_of(array, value, space, what):
  low, high = int(space.start), int(space.start) + int(space.n) - 1
  whole = array.size == 1 and array.dtype.kind in 'biu'
  if not whole or not low <= array.reshape(()) <= high:
    raise Wrong(
      f'returned {described(value)} as {what}; must be an integer from {low} '
      f'to {high}, as in its space'
    )
  return array.reshape(())


def far_outside(value: Any, space: Any) -> str:
  """Describes how an observation is far outside its space; '' if it is not."""
  kind = host.kind_of(space)
  if kind in ('Dict', 'Tuple'):
    items = space.spaces
    keys = items if kind == 'Dict' else range(len(items))
    return next(
      filter(None, (far_outside(value[k], items[k]) for k in keys)), ''
    )
  if kind != 'Box' or space.dtype.kind != 'f' or not value.size:
    return ''
  low, high = (_as_float64(x) for x in (space.low, space.high))
  with np.errstate(invalid='ignore', over='ignore'):
    width = np.where(np.isfinite(high - low), high - low, np.inf)
    excess = np.maximum(low - value, value - high)
    far = (excess > _FAR * width) & np.isfinite(width)
  if not far.any():
    return ''
  at = tuple(np.argwhere(far)[0])
  return f'{value[at]:g} is outside [{low[at]:g}, {high[at]:g}]'


def _as_float64(x):
  return np.asarray(x, np.float64)


def note(text: str) -> None:
  """Prints a note that does not stop the run."""
  print(f'note: {text}', file=sys.stderr, flush=True)
