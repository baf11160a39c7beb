"""Simulators on the host: their interface and the functions they share.

Axes: `E` parallel environments. All arrays are numpy arrays.

Time: a `TimeStep` is that of `search.model`. After a time step with `is_last()`
the next call of `step` ignores that environment's action and returns the first
time step of its next episode (reward 0, discount 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from agents.core.types import ArraySpec, Continuous, Discrete, Spec
from experiments.files.errors import shown
from search.model import TimeStep


class EpisodeStats(NamedTuple):
  """The true games that ended at this step, even if the agent sees lives.

  Attributes:
    finished: bool `[E]`, whether the game ended (not merely a life).
    returns: float64 `[E]`, undiscounted sum of the game's unclipped rewards; 0
      where not finished.
    lengths: int64 `[E]`, the game's decisions; 0 where not finished.
  """

  finished: np.ndarray
  returns: np.ndarray
  lengths: np.ndarray


class Simulator(NamedTuple):
  """`E` running environments.

  Attributes:
    reset: `() -> TimeStep`, begins new episodes in all environments.
    step: `(action [E, ...]) -> (TimeStep, EpisodeStats)`. Raises ValueError
      on an action of the wrong shape, dtype or range.
    close: `() -> None`, frees threads and memory.
  """

  reset: Callable[[], TimeStep]
  step: Callable[[np.ndarray], tuple[TimeStep, EpisodeStats]]
  close: Callable[[], None]


class HostEnvironment(NamedTuple):
  """A recipe for simulators.

  Attributes:
    spec: what an agent must know.
    num_envs: `E`.
    start: `(seed) -> Simulator`, starts a simulator. The same seed gives the
      same stream; different seeds, even neighbours, give unrelated streams.
  """

  spec: Spec
  num_envs: int
  start: Callable[[int], Simulator]


def side_by_side(env: HostEnvironment, copies: int) -> HostEnvironment:
  """`copies * E` environments; each group of `E` has the same episodes."""

  def start(seed):
    simulators = [env.start(seed) for _ in range(copies)]
    join = lambda *parts: np.concatenate([np.asarray(x) for x in parts])

    def reset():
      return jax.tree.map(join, *(s.reset() for s in simulators))

    def step(action):
      shares = np.split(np.asarray(action), copies)
      stepped = [s.step(share) for s, share in zip(simulators, shares)]
      return jax.tree.map(join, *stepped)

    def close():
      for simulator in simulators:
        simulator.close()

    return Simulator(reset, step, close)

  return HostEnvironment(env.spec, copies * env.num_envs, start)


def env_seeds(seed: int, num_envs: int) -> list[int]:
  """`E` distinct seeds in `[0, 2**31)`, unrelated to those of nearby `seed`s.

  Raises:
    ValueError: `seed` is negative or not an integer.
  """
  if not isinstance(seed, int | np.integer) or seed < 0:
    raise ValueError(f'seed={seed!r}: must be an integer of at least 0')
  # Twice as many as needed, so that rare duplicates can be skipped.
  words = np.random.SeedSequence(int(seed)).generate_state(2 * num_envs) >> 1
  return list(dict.fromkeys(words.tolist()))[:num_envs]


def check_num_envs(num_envs: int) -> None:
  """Refuses a number of environments.

  Raises:
    ValueError: `num_envs` is not an integer of at least 1.
  """
  if not isinstance(num_envs, int | np.integer) or num_envs < 1:
    raise ValueError(f'num_envs={num_envs!r}: must be an integer of at least 1')


def check_action(action: Any, spec: Spec, num_envs: int) -> np.ndarray:
  """Checks an action and converts it for a simulator.

  On a bad action, simulators in C++ abort the process or silently read past
  their tables.

  Args:
    action: integers `[E]` for `Discrete`, floats `[E, *shape]` for
      `Continuous`.

  Returns:
    int32 `[E]`, or float32 `[E, *shape]` clipped to the bounds, which the
    action may exceed only by rounding (1e-5 of the range).

  Raises:
    ValueError: the shape, the dtype or a number is invalid.
  """
  action = np.asarray(action)
  kind = spec.action
  shape = (num_envs,) + (() if isinstance(kind, Discrete) else kind.shape)
  if action.shape != shape:
    raise ValueError(
      f'{spec.name}: action has shape {action.shape}, must be {shape}'
    )
  if isinstance(kind, Discrete):
    if action.dtype.kind not in 'iu':
      raise ValueError(
        f'{spec.name}: action has dtype {action.dtype}, must be integer'
      )
    bad = (action < 0) | (action >= kind.num_actions)
    if bad.any():
      raise ValueError(
        f'{spec.name}: action {action[bad][0]} is out of range, must be in '
        f'[0, {kind.num_actions})'
      )
    return action.astype(np.int32)
  if action.dtype.kind not in 'fiu':
    raise ValueError(
      f'{spec.name}: action has dtype {action.dtype}, must be float'
    )
  if not np.isfinite(action).all():
    raise ValueError(f'{spec.name}: action is not finite')
  bounded = np.isfinite(kind.high) & np.isfinite(kind.low)
  slack = 1e-5 * np.subtract(
    kind.high, kind.low, where=bounded, out=np.zeros_like(kind.low)
  )
  bad = (action < kind.low - slack) | (action > kind.high + slack)
  if bad.any():
    raise ValueError(
      f'{spec.name}: action {action[bad][0]:g} is out of bounds, must be in '
      f'[{np.min(kind.low):g}, {np.max(kind.high):g}]'
    )
  return np.clip(action, kind.low, kind.high).astype(np.float32)


def kind_of(space: Any) -> str:
  """The name of the Gymnasium space class of a space, or of its base class."""
  names = [c.__name__ for c in type(space).__mro__]
  return next((n for n in names if n in _KINDS), names[0])


_KINDS = ('Discrete', 'Box', 'Dict', 'Tuple', 'MultiBinary', 'MultiDiscrete')


def action_spec(space: Any, name: str) -> Discrete | Continuous:
  """The `Discrete` or `Continuous` of a Gymnasium action space.

  Raises:
    ValueError: the space is neither `Discrete` nor a `Box` of floats.
  """
  kind = kind_of(space)
  if kind == 'Discrete':
    return Discrete(int(space.n))
  if kind == 'Box' and np.issubdtype(space.dtype, np.floating):
    with np.errstate(over='ignore'):  # Beyond float32 is unbounded.
      low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return Continuous(tuple(space.shape), low, high)
  raise ValueError(
    f'{name}: action space {space} is not supported, must be Discrete or a '
    'Box of floats'
  )


def observation_codec(
  space: Any, name: str, channels: str | None = None
) -> tuple[ArraySpec, Callable[[Any], np.ndarray]]:
  """Converts observations of a Gymnasium space to one array.

  Images (rank 3, and rank 2 without an axis of length 1) get their channels
  last; uint8 stays uint8, and other types become float32. Vectors become
  float32, integers become one-hot, and a dict or tuple of vectors becomes their
  concatenation in the space's order.

  Args:
    channels: the axis of the channels in an image of rank 3, `first` or `last`;
      None means last, as is usual in Gymnasium, except for shapes that can only
      have their channels first (`has_channels_first`).

  Returns:
    The `ArraySpec` of one observation, and the function that converts
    observations with a leading `E`.

  Raises:
    ValueError: the space is not supported (images in a dict or tuple, rank
      above 3, text, ...), or `channels` is invalid.
  """
  if channels not in (None, 'first', 'last'):
    raise ValueError(f'{name}: channels={channels!r} must be first or last')
  kind = kind_of(space)
  if kind == 'Discrete':
    eye, start = np.eye(int(space.n), dtype=np.float32), int(space.start)
    return (
      ArraySpec((int(space.n),), np.float32),
      lambda x: eye[np.asarray(x).reshape(-1) - start],
    )
  if kind in ('Dict', 'Tuple'):
    return _joined_codec(space, kind, name, channels)
  if kind not in ('Box', 'MultiBinary', 'MultiDiscrete'):
    raise ValueError(
      f'{name}: observation space {shown(space)} is not supported; must be '
      'Box, Discrete, MultiBinary, MultiDiscrete, or a Dict or Tuple of them'
    )
  shape = tuple(space.shape)
  dtype = np.uint8 if space.dtype == np.uint8 else np.float32
  if len(shape) > 3:
    raise ValueError(
      f'{name}: observations of shape {shape} are not supported; must be of '
      'rank 3 or less'
    )
  if len(shape) == 3:
    if channels is None and has_channels_first(shape, dtype):
      channels = 'first'
    if channels == 'first':
      shape = (*shape[1:], shape[0])
      return ArraySpec(shape, dtype), lambda x: np.ascontiguousarray(
        np.moveaxis(np.asarray(x, dtype), 1, -1)
      )
  elif len(shape) == 2 and 1 not in shape:
    shape = (*shape, 1)
  else:
    shape, dtype = (int(np.prod(shape, dtype=int)),), np.float32
  return ArraySpec(shape, dtype), lambda x: np.asarray(x, dtype).reshape(
    -1, *shape
  )


def has_channels_first(shape: tuple[int, ...], dtype: Any) -> bool:
  """Whether `[c, h, w]` can only be an image with its channels first.

  The first axis must be at most a quarter of the others. To distinguish images
  from boards with planes, the other axes must be 32 or more, or the first must
  be 1, 3 or 4 channels of uint8.

  >>> has_channels_first((12, 84, 84), np.uint8)
  True
  >>> has_channels_first((7, 7, 20), np.float32)
  False
  """
  first, *others = shape
  if 4 * first > min(others):
    return False
  return min(others) >= 32 or (first in (1, 3, 4) and dtype == np.uint8)


def _joined_codec(space, kind, name, channels):
  items = space.spaces
  keys = list(items) if kind == 'Dict' else list(range(len(items)))
  for key in keys:
    if kind_of(items[key]) not in _KINDS:
      raise ValueError(
        f'{name}: observation space at {key!r} is {shown(items[key], 40)}, '
        'which is not supported; leave it out, for example with '
        'gymnasium.wrappers.FilterObservation'
      )
  if len(keys) == 1:
    part, convert = observation_codec(items[keys[0]], name, channels)
    return part, lambda x: convert(x[keys[0]])
  parts = [_part_codec(items[k], name, channels) for k in keys]
  if any(len(part.shape) != 1 for part, _ in parts):
    raise ValueError(
      f'{name}: observation space {shown(space)} combines an image with other '
      'parts; wrap the environment to return one array'
    )
  size = sum(part.shape[0] for part, _ in parts)
  return ArraySpec((size,), np.float32), lambda x: np.concatenate(
    [convert(x[k]) for k, (_, convert) in zip(keys, parts)], axis=-1
  )


def _part_codec(space, name, channels=None):
  """The codec of one part of several; a float matrix is flat, not an image."""
  is_box = kind_of(space) == 'Box'
  if is_box and len(space.shape) < 3 and space.dtype != np.uint8:
    size = int(np.prod(space.shape, dtype=int))
    return ArraySpec((size,), np.float32), lambda x: np.asarray(
      x, np.float32
    ).reshape(-1, size)
  return observation_codec(space, name, channels)


def columns(space: Any, name: str) -> tuple[tuple[str, int], ...]:
  """The parts of a dict or tuple in the array of `observation_codec`.

  Name (`outer/inner`) and size of each part, in order; () for a space that is a
  single array.

  Raises:
    ValueError: the space is not supported by `observation_codec`.
  """
  kind = kind_of(space)
  if kind not in ('Dict', 'Tuple'):
    return ()
  items = space.spaces
  found: list[tuple[str, int]] = []
  for key in list(items) if kind == 'Dict' else range(len(items)):
    inner = columns(items[key], name)
    if inner:
      found += [(f'{key}/{part}', size) for part, size in inner]
    else:
      part, _ = _part_codec(items[key], name)
      found.append((str(key), int(np.prod(part.shape, dtype=int))))
  return tuple(found)


def in_order(
  ours: tuple[tuple[str, int], ...],
  wanted: tuple[tuple[str, int], ...],
  name: str,
) -> np.ndarray:
  """The index of each wanted part's numbers among ours, int `[F]`.

  Both are from `columns`.

  Raises:
    ValueError: the parts differ.

  >>> in_order((('a', 1), ('b', 2)), (('b', 2), ('a', 1)), 'x').tolist()
  [1, 2, 0]
  """
  if sorted(ours) != sorted(wanted):
    listed = lambda parts: ', '.join(f'{part} ({size})' for part, size in parts)
    raise ValueError(
      f'env={name}: its observations have the parts {shown(listed(ours))}, but '
      f'those of the data {shown(listed(wanted))}; use '
      "--set=env.recorded=none to keep the environment's order"
    )
  starts = np.cumsum([0, *(size for _, size in ours)])
  begins = {part: start for (part, _), start in zip(ours, starts)}
  return np.concatenate(
    [np.arange(begins[part], begins[part] + size) for part, size in wanted]
  )


def stacked(observation: ArraySpec, frame_stack: int, name: str) -> ArraySpec:
  """The spec of `frame_stack` frames along the last axis.

  Raises:
    ValueError: `frame_stack` is not an integer of at least 1.
  """
  if not isinstance(frame_stack, int) or frame_stack < 1:
    raise ValueError(
      f'{name}: frame_stack={frame_stack!r} must be an integer of at least 1'
    )
  *rest, channels = observation.shape
  return observation._replace(shape=(*rest, channels * frame_stack))


def push_frame(
  stack: np.ndarray | None,
  frame: np.ndarray,
  is_first: np.ndarray,
  frame_stack: int,
) -> np.ndarray:
  """The newest stack: oldest frame first, along the last axis.

  A first step's stack repeats its frame, as in MuZero and EfficientZero, so no
  frame from before the start of an episode (or of a life, where a lost life
  ends an episode) leaks into it.

  Args:
    stack: `[E, ..., frame_stack * c]`, the previous stack; None at the start.
    frame: `[E, ..., c]`.
    is_first: bool `[E]`.

  Returns:
    `[E, ..., frame_stack * c]`, a new array.
  """
  if frame_stack == 1:
    return frame
  repeated = np.tile(frame, (1,) * (frame.ndim - 1) + (frame_stack,))
  if stack is None or is_first.all():
    return repeated
  shifted = np.concatenate([stack[..., frame.shape[-1] :], frame], axis=-1)
  if is_first.any():
    shifted[is_first] = repeated[is_first]
  return shifted


class Tally:
  """Adds up true returns and lengths of `E` running games."""

  def __init__(self, num_envs: int):
    self._returns = np.zeros(num_envs, np.float64)
    self._lengths = np.zeros(num_envs, np.int64)

  def add(self, reward, is_first, finished) -> EpisodeStats:
    """Counts one step; returns the stats of the games that ended.

    Args:
      reward: float `[E]`, unclipped; ignored at a first step.
      is_first: bool `[E]`, whether the step was an episode's first.
      finished: bool `[E]`, whether the game ended.
    """
    self._returns += np.where(is_first, 0.0, reward)
    self._lengths += ~is_first
    stats = EpisodeStats(
      finished.copy(),
      np.where(finished, self._returns, 0.0),
      np.where(finished, self._lengths, 0),
    )
    self._returns[finished] = 0.0
    self._lengths[finished] = 0
    return stats
