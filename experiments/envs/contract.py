"""What a user's Gymnasium environment must give back, checked at each call.

Whatever breaks the contract ends as one line: which environment, which call,
what came back, what would be right. A number that is not finite is named where
it enters, not by what becomes of the loss. The exception of the user's own
code is the line's cause; launchers show its traceback when asked to.

Taken as they are: rewards and ends as arrays of one element, observations as
lists, floats of another precision, integers for floats.
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

# Beyond its space by so many times its width is no matter of rounding.
_FAR = 10.0


class SimulatorError(UserError):
  """A user's environment raised, or returned what it must not."""


class Wrong(Exception):
  """What came back, and what would be right."""


def call(env: str, what: str, remedy: str, function: Callable, *args, **kwargs):
  """Calls a user's code.

  Args:
    env: name of the environment, as its flag has it.
    what: the call, for the message.
    remedy: what would be right; shown where the call itself does not fit, so
      that the exception arose outside of the user's code.
    function: what to call, with the arguments that follow.

  Returns:
    What the function returns.

  Raises:
    SimulatorError: it raised, or asked the process to exit.
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
  """Whether an exception arose elsewhere than in Gymnasium and here."""
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
    Wrong: it is not `(observation, info)`, or does not fit the space.
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
    Wrong: they are not five, or one does not fit.
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
  """What a value is, in a few words, whatever it is."""
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
      f'returned {described(value)} as {what}, which is no array; must hold '
      'numbers'
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
  """A copy of an observation, which the environment may go on writing to.

  Args:
    value: what came back.
    space: a space that `host.observation_codec` takes.
    what: for the message.

  Returns:
    An array, or a dict or tuple of arrays as in the space.

  Raises:
    Wrong: another structure, shape or kind of numbers than the space's, or
      numbers that are not finite.
  """
  kind = host.kind_of(space)
  if kind == 'Dict':
    lacks = [k for k in space.spaces if not _has(value, k)]
    if lacks:
      raise Wrong(
        f'returned {described(value)} as {what}; must be a dict with '
        f'{lacks[0]!r}, as its space says'
      )
    return {
      k: checked_observation(value[k], part, f'{what}[{k!r}]')
      for k, part in space.spaces.items()
    }
  if kind == 'Tuple':
    if not _is_row(value, len(space.spaces)):
      raise Wrong(
        f'returned {described(value)} as {what}; must be a tuple of '
        f'{len(space.spaces)}, as its space says'
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
      f'returned {what} of shape {array.shape}; must be {shape}, as its space '
      'says'
    )
  if space.dtype == np.uint8 != array.dtype:
    # The cast would cut fractions off and wrap what is too large.
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
  """Refuses numbers that are not finite, of many copies stepped at once.

  Args:
    env: name of the environment, for the message.
    call: of the simulator.
    **rows: by what they are, pytrees of arrays `[E, ...]`.

  Raises:
    SimulatorError: one of a copy is not finite in float32.
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
      f'to {high}, as its space says'
    )
  return array.reshape(())


def far_outside(value: Any, space: Any) -> str:
  """How a checked observation leaves its space by far; '' if it does not."""
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
  return f'{value[at]:g} is outside of [{low[at]:g}, {high[at]:g}]'


def _as_float64(x):
  return np.asarray(x, np.float64)


def note(text: str) -> None:
  """Tells the user something that stops nothing."""
  print(f'note: {text}', file=sys.stderr, flush=True)
