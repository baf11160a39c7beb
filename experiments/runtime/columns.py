"""Columns of a replay on the host: where the items of one array are kept.

A column has `T` rows of `E` streams, `[T, E, ...]`. It is a numpy array, or one
of the classes below in its place, which keep images: compressed on the host, or
in the memory of a device.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np

# What is copied at once between a device and the host when rows are saved or
# loaded, and the most that a file of them has, in bytes.
_CHUNK = 1 << 24
_FILE = 1 << 28


class ZlibColumn:
  """A `[T, E, ...]` array whose `[T, E]` items are kept compressed.

  Level 1: frames of Atari shrink to 1/5 - 1/40, at 0.1 - 0.3 ms a frame.
  """

  def __init__(self, shape: tuple[int, ...], dtype: Any):
    self.shape, self.dtype = shape, np.dtype(dtype)
    empty = zlib.compress(bytes(self._item_size()), 1)
    self.blobs = np.full(shape[:2], empty, object)

  def _item_size(self) -> int:
    return int(np.prod(self.shape[2:])) * self.dtype.itemsize

  def __setitem__(self, slot: int, items: np.ndarray) -> None:
    for e, item in enumerate(np.asarray(items, self.dtype)):
      self.blobs[slot, e] = zlib.compress(item.tobytes(), 1)

  def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    blobs = self.blobs[index]
    data = b''.join(zlib.decompress(blob) for blob in blobs.flat)
    return np.frombuffer(data, self.dtype).reshape(
      *blobs.shape, *self.shape[2:]
    )

  @property
  def nbytes(self) -> int:
    """Bytes of the compressed items."""
    return sum(len(blob) for blob in self.blobs.flat)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('ring', 'index'),
  meta_fields=('shape',),
)
@dataclasses.dataclass(frozen=True)
class Picked:
  """Items of a `DeviceColumn`, for a compiled program to gather there.

  Attributes:
    ring: uint8 `[T * E, P]`.
    index: int32 `[...]`, rows of it.
    shape: of an item, of P bytes.
  """

  ring: chex.Array
  index: chex.Array
  shape: tuple[int, ...]

  def items(self) -> chex.Array:
    """The items, uint8 `[..., *shape]`."""
    found = self.ring.at[self.index].get(mode='promise_in_bounds')
    return found.reshape(*self.index.shape, *self.shape)


def gathered(tree: Any) -> Any:
  """A tree with the items of each `Picked`; in a compiled program."""
  is_picked = lambda x: isinstance(x, Picked)
  one = lambda x: x.items() if is_picked(x) else x
  return jax.tree.map(one, tree, is_leaf=is_picked)


class DeviceColumn:
  """A uint8 `[T, E, ...]` array in the memory of a device.

  An item is a row of bytes there, because compilers for accelerators fill up an
  array's last two axes. A write is one compiled call, in place, which the host
  does not wait for.

  Attributes:
    ring: uint8 `[T * E, P]`; a write replaces it.
  """

  def __init__(self, shape: tuple[int, ...], device: Any):
    self.shape, self.dtype = shape, np.dtype(np.uint8)
    number, size = shape[0] * shape[1], int(np.prod(shape[2:]))
    self.ring = _zeros(number, size, device)
    self._chunk = min(max(_CHUNK // size, shape[1]), number)

  def __setitem__(self, slot: int, items: np.ndarray) -> None:
    # A copy: the simulators may use the array's memory again.
    rows = np.array(items, np.uint8).reshape(self.shape[1], -1)
    self.ring = _write(self.ring, slot * self.shape[1], rows)

  def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> Picked:
    slots, streams = index
    places = np.asarray(slots * self.shape[1] + streams, np.int32)
    return Picked(self.ring, places, self.shape[2:])

  @property
  def nbytes(self) -> int:
    """Bytes on the device."""
    return self.ring.nbytes

  def read(self, start: int, stop: int) -> np.ndarray:
    """Copies the rows `start` to `stop - 1` to the host, `[rows, E, ...]`."""
    streams = self.shape[1]
    first, last = start * streams, stop * streams
    rows = np.empty((last - first, self.ring.shape[1]), np.uint8)
    for place in range(first, last, self._chunk):
      own = rows[place - first : place - first + self._chunk]
      begin = min(place, len(self.ring) - self._chunk)
      found = np.asarray(_read(self.ring, begin, self._chunk))
      own[:] = found[place - begin : place - begin + len(own)]
    return rows.reshape(stop - start, *self.shape[1:])

  def fill(self, start: int, items: np.ndarray) -> None:
    """Copies rows `[rows, E, ...]` to the device, from row `start` on."""
    rows = items.reshape(len(items) * self.shape[1], -1)
    first = start * self.shape[1]
    for place in range(first, first + len(rows), self._chunk):
      own = rows[place - first : place - first + self._chunk]
      begin = min(place, len(self.ring) - self._chunk)
      if len(own) < self._chunk or begin < place:  # with its neighbours
        around = np.array(_read(self.ring, begin, self._chunk))
        around[place - begin : place - begin + len(own)] = own
        own = around
      self.ring = _write(self.ring, begin, own)


def _zeros(number: int, size: int, device: Any) -> jax.Array:
  where = jax.sharding.SingleDeviceSharding(device)
  make = jax.jit(
    lambda: jax.numpy.zeros((number, size), np.uint8), out_shardings=where
  )
  return make()


@functools.partial(jax.jit, donate_argnums=0)
def _write(ring, start, rows):
  return jax.lax.dynamic_update_slice_in_dim(ring, rows, start, 0)


@functools.partial(jax.jit, static_argnums=2)
def _read(ring, start, number):
  return jax.lax.dynamic_slice_in_dim(ring, start, number, 0)


Column = np.ndarray | ZlibColumn | DeviceColumn


def make(
  shape: tuple[int, ...], dtype: Any, compress: bool, device: Any
) -> Column:
  """An empty column; `compress` and `device` are for images `[T, E, H, W, C]`.

  Args:
    dtype: images are uint8.
    device: where images are kept; None for the host.
  """
  dtype = np.dtype(dtype)
  if is_image(shape[2:], dtype):
    if device is not None:
      return DeviceColumn(shape, device)
    if compress:
      return ZlibColumn(shape, dtype)
  return np.zeros(shape, dtype)


def is_image(shape: tuple[int, ...], dtype: Any) -> bool:
  """Whether items of a shape and dtype are images."""
  return len(shape) == 3 and np.dtype(dtype) == np.uint8


def most_rows(column: Column) -> int:
  """How many rows a file should have, at most."""
  if not isinstance(column, DeviceColumn):
    return column.shape[0]  # It is written without a copy.
  return max(_FILE * column.shape[0] // column.nbytes, 1)


def packed(
  name: str, column: Column, start: int, stop: int
) -> dict[str, np.ndarray]:
  """The rows `start` to `stop - 1` as named arrays to be written.

  Returns:
    `[rows, E, ...]`, compressed ones as bytes uint8 `[bytes]` and their sizes
    int64 `[rows, E]`.
  """
  if isinstance(column, DeviceColumn):
    return {name: column.read(start, stop)}
  if isinstance(column, ZlibColumn):
    blobs = column.blobs[start:stop]
    sizes = np.vectorize(len, otypes=[np.int64])(blobs)
    data = np.frombuffer(b''.join(blobs.flat), np.uint8)
    return {name: data, f'{name}:sizes': sizes}
  return {name: column[start:stop]}


def expected(name: str, column: Column, rows: int) -> dict[str, Any]:
  """What so many rows are when they are read, see `files.arrays.read`."""
  if isinstance(column, ZlibColumn):
    sizes = np.int64, (rows, column.shape[1])
    return {name: (np.uint8, (None,)), f'{name}:sizes': sizes}
  return {name: (column.dtype, (rows, *column.shape[1:]))}


def restore(
  name: str,
  column: Column,
  start: int,
  found: Mapping[str, np.ndarray],
  skip: int,
) -> None:
  """Writes rows that were read, but the first `skip`, from row `start` on.

  Args:
    found: of a file, as `packed` returns them, `[rows, E, ...]`.

  Raises:
    ValueError: compressed items are not as long as their sizes say.
  """
  items = found[name]
  if isinstance(column, DeviceColumn):
    column.fill(start, items[skip:])
    return
  if not isinstance(column, ZlibColumn):
    column[start : start + len(items) - skip] = items[skip:]
    return
  sizes = found[f'{name}:sizes']
  ends = np.cumsum(sizes.reshape(-1))
  if (sizes < 0).any() or ends[-1] != len(items):
    raise ValueError(f'{name} is cut short')
  blobs = np.empty(sizes.size, object)
  for i, (end, n) in enumerate(zip(ends, sizes.reshape(-1))):
    blobs[i] = items[end - n : end].tobytes()
  kept = blobs.reshape(sizes.shape)[skip:]
  column.blobs[start : start + len(kept)] = kept
