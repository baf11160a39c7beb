"""Reads Minari's spaces, stored as JSON, and their observations."""

import functools
import math
from typing import Any

import numpy as np

from experiments.data import hdf5, layout
from experiments.files import reading
from experiments.files.errors import UserError, shown

_DTYPES = frozenset(
  (
    *('bool', 'int8', 'int16', 'int32', 'int64', 'float16', 'float32'),
    *('uint8', 'uint16', 'uint32', 'uint64', 'float64'),
  )
)
# The most numbers in an observation.
_LARGEST = 1 << 24


def read(text: str, where: str) -> Any:
  """Reads a `gymnasium.Space` of observations, with parts in the text's order.

  The text is from Minari's `serialize_space`; `where` names file and key.

  Raises:
    UserError: the text is not a space, or the space is not supported.
  """
  return _space(reading.decode_json(text, dict[str, Any], where), where)


def _space(plain: Any, where: str) -> Any:
  from gymnasium import spaces

  if not isinstance(plain, dict):
    raise UserError(f'{shown(where)} is {shown(plain, 40)}, must be a space')
  kind = plain.get('type')
  if kind == 'Box':
    shape = _whole(plain.get('shape'), where, 'shape')
    _check_size(math.prod(shape), where)
    dtype = plain.get('dtype', 'float32')
    if not isinstance(dtype, str) or dtype not in _DTYPES:
      raise UserError(
        f'{shown(where)}: dtype is {shown(repr(dtype), 40)}, must be one of '
        f'{", ".join(sorted(_DTYPES))}'
      )
    return spaces.Box(0, 1, shape, np.dtype(dtype).type)
  if kind == 'Discrete':
    (n,) = _whole([plain.get('n')], where, 'n')
    start = plain.get('start', 0)
    if type(start) is not int or abs(start) >= 1 << 62:
      raise UserError(f'{shown(where)}: start must be a whole number')
    _check_size(n, where)
    return spaces.Discrete(n, start=start)
  if kind == 'MultiDiscrete':
    numbers = np.array(plain.get('nvec'), object)
    _whole(numbers.ravel().tolist(), where, 'nvec')
    return spaces.MultiDiscrete(numbers.astype(np.int64))
  if kind == 'MultiBinary':
    n = plain.get('n')
    shape = _whole(n if isinstance(n, list) else [n], where, 'n')
    _check_size(math.prod(shape), where)
    return spaces.MultiBinary(shape if isinstance(n, list) else shape[0])
  inner = plain.get('subspaces')
  if kind == 'Dict' and isinstance(inner, dict) and inner:
    for key in inner:
      if not key or key == '.' or '/' in key:
        raise UserError(
          f'{shown(where)}: a part is named {shown(repr(key), 40)}; rename it'
        )
    # Pairs keep their order; gymnasium would sort a dictionary.
    parts = [(k, _space(part, f'{where}: {k}')) for k, part in inner.items()]
    return spaces.Dict(parts)
  if kind == 'Tuple' and isinstance(inner, list) and inner:
    return spaces.Tuple(
      [_space(part, f'{where}: {i}') for i, part in enumerate(inner)]
    )
  raise UserError(
    f'{shown(where)} is {shown(kind, 40)}, must be Box, Discrete, '
    'MultiDiscrete, MultiBinary, or a Dict or Tuple of these'
  )


def _whole(values: Any, where: str, key: str) -> tuple[int, ...]:
  if not isinstance(values, list) or not all(
    type(n) is int and 0 < n < 1 << 31 for n in values
  ):
    raise UserError(
      f'{shown(where)}: {key} is {shown(values, 60)}, must be whole numbers '
      'of at least 1'
    )
  return tuple(values)


def _check_size(size: int, where: str) -> None:
  if size > _LARGEST:
    raise UserError(
      f'{shown(where)}: has {size:,} numbers, must be at most {_LARGEST:,}'
    )


def read_bounds(text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
  """Reads the bounds of a Box of actions, float32 `[...]`; see `read`.

  Raises:
    UserError: the text is not a Box.
  """
  plain = reading.decode_json(text, dict[str, Any], where)
  if plain.get('type') != 'Box':
    raise UserError(
      f'{shown(where)} is {shown(plain.get("type"), 40)}, must be Box'
    )
  shape = _whole(plain.get('shape'), where, 'shape')
  found = []
  for key in ('low', 'high'):
    bound = layout.bounds(plain.get(key), f'{where}: {key}')
    if bound.size != math.prod(shape):
      raise UserError(
        f'{shown(where)}: {key} has {bound.size} numbers, must have '
        f'{math.prod(shape)} by its shape'
      )
    found.append(bound.reshape(shape))
  return found[0], found[1]


def read_rows(reader: hdf5.Reader, key: str, space: Any, where: str) -> Any:
  """Reads the rows of a space: an array, or a dict or tuple of arrays.

  Raises:
    UserError: an array is missing or does not fit the space.
  """
  kind = type(space).__name__
  if kind == 'Dict':
    return {
      name: read_rows(reader, f'{key}/{name}', part, where)
      for name, part in space.spaces.items()
    }
  if kind == 'Tuple':
    return tuple(
      read_rows(reader, f'{key}/_index_{i}', part, where)
      for i, part in enumerate(space.spaces)
    )
  rows = reader.read(key)
  if kind == 'Discrete' and rows.ndim == 2 and rows.shape[1] == 1:
    rows = rows[:, 0]
  shape = () if kind == 'Discrete' else space.shape
  if rows.ndim < 1 or rows.shape[1:] != shape:
    raise UserError(
      f'{where}: {shown(key)} has rows of shape {rows.shape[1:]}, must be '
      f'{shape} by observation_space'
    )
  if kind == 'Discrete':
    bad = (rows < space.start) | (rows >= space.start + space.n)
    if rows.dtype.kind not in 'iu' or bad.any():
      raise UserError(
        f'{where}: {shown(key)} must be whole numbers from {space.start} to '
        f'{space.start + space.n - 1}'
      )
  return rows


def lengths(rows: Any) -> list[int]:
  """The numbers of rows in all arrays of `read_rows`."""
  if isinstance(rows, dict):
    rows = tuple(rows.values())
  if isinstance(rows, tuple):
    return [n for part in rows for n in lengths(part)]
  return [len(rows)]


def laid_out(space: Any, where: str):
  """Converts rows to one array, as for the simulator's observations.

  Returns:
    The number of numbers in a row, and the function from the result of
    `read_rows`, arrays of `[T, ...]`, to one array `[T, ...]`.

  Raises:
    UserError: an image is combined with other parts, or has a rank above 3.
  """
  from experiments.envs import host

  try:
    spec, convert = host.observation_codec(space, where)
  except ValueError as error:
    raise UserError(shown(error, 400)) from error
  return math.prod(spec.shape), functools.partial(_converted, convert)


def _converted(convert, rows):
  # Numbers beyond float32 become infinite and are refused later.
  with np.errstate(over='ignore'):
    return convert(rows)
