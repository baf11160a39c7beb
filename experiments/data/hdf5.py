"""Opens hdf5 files that are not trusted and reads their arrays.

An hdf5 file can name other files (external links, raw storage, virtual
sources), plugins (filters that are libraries) and false sizes. Only numbers
that are stored in the file itself are read, and only if they fit into memory.
"""

import math
import pathlib
import zlib
from typing import Any

import numpy as np

from experiments.data import npy
from experiments.files import memory, reading
from experiments.files.errors import UserError, shown

# zlib expands data by at most this factor (its documentation).
_INFLATES = 1032
_NAMES = 10


def open_file(
  path: pathlib.Path, mode: str = 'r', *, follow: bool = False
) -> Any:
  """Opens an `h5py.File`, which is used as a context.

  `follow` allows a link, for paths that the user typed.

  Raises:
    UserError: h5py is not installed, or the file is missing, a link, a FIFO or
      not an hdf5 file.
  """
  where = shown(path)
  if mode == 'r':
    # The hdf5 library would wait for a FIFO and follow links.
    reading.open_file(path, follow=follow).close()
  try:
    import h5py
  except ImportError as error:
    raise UserError(
      f"{where}: hdf5 needs h5py; run pip install 'outplay[hdf5]'"
    ) from error
  try:
    return h5py.File(path, mode)
  except FileNotFoundError as error:
    raise UserError(f'{where}: no such file') from error
  except (OSError, RuntimeError, ValueError) as error:
    raise UserError(
      f'{where}: truncated, or not an hdf5 file ({shown(error)}); fetch it '
      'again'
    ) from error


class Reader:
  """Reads arrays from an open file, as many as fit into memory together."""

  def __init__(self, file: Any, path: pathlib.Path):
    """Takes `open_file`'s file, and its path for messages."""
    self._file, self._where = file, shown(path)
    self._room = memory.room_for_data()
    self._declared = 0

  def has(self, key: str) -> bool:
    """Whether the file has an array or a group with a name such as `a/b`.

    Raises:
      UserError: it is a link, or damaged.
    """
    return self._find(key) is not None

  def read(self, key: str) -> np.ndarray:
    """Reads a whole array of numbers, `[...]`, by a key such as `a/b`.

    Raises:
      UserError: the array is missing, a group, a link, not numbers, damaged,
        stored in another file, or larger than memory.
    """
    import h5py

    name = shown(key)
    found = self._find(key)
    if found is None:
      raise UserError(f'{self._where}: {name} is missing{self._siblings(key)}')
    if not isinstance(found, h5py.Dataset):
      raise UserError(f'{self._where}: {name} is a group, must be an array')
    where = f'{self._where}: {name}'
    try:
      if found.dtype.kind not in 'biuf':
        raise UserError(f'{where} is {shown(found.dtype, 60)}, must be numbers')
      if found.shape is None:
        raise UserError(f'{where} is empty, must be numbers')
      _check_storage(found, where)
      self.claim(key, found.nbytes)
      _check_chunks(found, where, self._room)
      return found[()]
    except UserError:
      raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
      raise UserError(f'{where} is damaged ({shown(error)})') from error
    except MemoryError as error:
      raise UserError(
        f'{where} does not fit into memory; take a part of it'
      ) from error

  def claim(self, key: str, size: int) -> None:
    """Adds an array's bytes to those in use; refuses it if they do not fit.

    Raises:
      UserError: the sum does not fit into memory.
    """
    self._declared += size
    npy.check_room(f'{self._where}: {shown(key)}', self._declared)

  def _find(self, key: str) -> Any:
    """The object with a name, or None; links are refused."""
    import h5py

    here: Any = self._file
    for part in key.split('/'):
      try:
        if not isinstance(here, h5py.Group):
          return None
        link = here.get(part, getlink=True)
        if link is None:
          return None
        if not isinstance(link, h5py.HardLink):
          raise UserError(
            f'{self._where}: {shown(key)} is a link to '
            f'{shown(getattr(link, "filename", ""))} '
            f'{shown(getattr(link, "path", "elsewhere"))}; links are not '
            'followed; put the array itself there'
          )
        here = here[part]
      except UserError:
        raise
      except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(
          f'{self._where}: {shown(key)} is damaged ({shown(error)})'
        ) from error
    return here

  def _siblings(self, key: str) -> str:
    """Lists the names next to a missing key."""
    import h5py

    above = key.rpartition('/')[0]
    group = self._find(above) if above else self._file
    if not isinstance(group, h5py.Group):
      return ''
    names = [shown(name, 40) for name in list(group)[: _NAMES + 1]]
    more = ', ...' if len(names) > _NAMES else ''
    return f'; there are {", ".join(sorted(names)[:_NAMES])}{more}'


def _check_storage(array: Any, where: str) -> None:
  """Refuses numbers that are stored in other files, and unusual filters."""
  import h5py

  h5d, h5z = (getattr(h5py, name) for name in ('h5d', 'h5z'))

  created = array.id.get_create_plist()
  if created.get_layout() == h5d.VIRTUAL:
    raise UserError(
      f'{where} is virtual: its numbers are in other files; h5repack puts them '
      'into this one'
    )
  if created.get_external_count():
    raise UserError(
      f'{where} is in external storage: its numbers are in other files; '
      'h5repack puts them into this one'
    )
  filters = [created.get_filter(i) for i in range(created.get_nfilters())]
  packers = [h5z.FILTER_DEFLATE, h5z.FILTER_LZF]
  plain = [*packers, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32]
  for number, _, _, name in filters:
    if number not in plain:
      name = name.decode('utf-8', 'replace') or number
      raise UserError(
        f'{where} is packed with the filter {shown(name, 40)}; repack it with '
        'h5repack -f GZIP=4'
      )
  if sum(number in packers for number, *_ in filters) > 1:
    raise UserError(
      f'{where} is packed twice; repack it with h5repack -f GZIP=4'
    )


def _check_chunks(array: Any, where: str, room: int) -> None:
  """Refuses chunks that unpack to more than their declared size.

  The hdf5 library allocates whatever a chunk unpacks to. Chunks that are large
  enough to exceed memory are first unpacked here in pieces.
  """
  if array.chunks is None or not array.compression:
    return
  declared = math.prod(array.chunks) * array.dtype.itemsize
  npy.check_room(f'{where}: a chunk', declared)
  large: list[tuple[int, ...]] = []

  def look(chunk):
    if chunk.size * _INFLATES > room:
      large.append(chunk.chunk_offset)

  array.id.chunk_iter(look)
  for offset in large:
    if array.compression != 'gzip':
      raise UserError(
        f'{where}: a chunk is too large; repack it with h5repack -f GZIP=4'
      )
    _, packed = array.id.read_direct_chunk(offset)
    unpacker, size = zlib.decompressobj(), 0
    while not unpacker.eof:
      size += len(unpacker.decompress(packed, 1 << 20))
      packed = unpacker.unconsumed_tail
      # A checksum of four bytes may follow the numbers.
      if size > declared + 4:
        raise UserError(
          f'{where}: a chunk holds more than the {declared:,} bytes that it '
          'declares; fetch it again'
        )
      if not packed:
        break
