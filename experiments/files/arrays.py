"""Reads and writes named arrays in one file, atomically and with a digest.

A file has eight bytes of magic, the length of its header (uint64, little
endian), the header (JSON: name, dtype, shape and offset of each array) and the
arrays' bytes, each at a multiple of 64. It contains nothing to execute, and the
reader states the arrays that it expects, so that a file cannot make it allocate
memory.
"""

import hashlib
import io
import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from experiments.files import reading, writing
from experiments.files.errors import UserError, shown

_MAGIC = b'outplay1'
_ALIGNED = 64
_HEADER_LIMIT = 16 << 20
_BLOCK = 1 << 20


class Stored(NamedTuple):
  """A file's size in bytes and its SHA-256 in hexadecimal."""

  size: int
  digest: str


class _Entry(NamedTuple):
  """One array of a file, as its header describes it."""

  name: str
  dtype: str
  shape: tuple[int, ...]
  offset: int


def write(path: str | os.PathLike, arrays: Mapping[str, Any]) -> Stored:
  """Writes arrays, of any dtype except objects and strings, atomically.

  Raises:
    UserError: the path is a link or folder, or the disk refused.
  """
  sums = hashlib.sha256()
  size = 0
  with writing.replacing(path) as file:
    for block in _blocks(arrays):
      file.write(block)
      sums.update(block)
      size += len(block)
  return Stored(size, sums.hexdigest())


def _blocks(arrays: Mapping[str, Any]) -> Iterator[Any]:
  """A file's content, piece by piece."""
  plain = {name: np.asarray(x) for name, x in arrays.items()}
  # Offsets count from the header's end, because the header contains them.
  entries, offset = [], 0
  for name, x in plain.items():
    entries.append((name, str(x.dtype), x.shape, offset))
    offset += x.nbytes + -x.nbytes % _ALIGNED
  header = json.dumps(entries).encode()
  header += b' ' * (-(len(header) + 16) % _ALIGNED)
  yield _MAGIC + len(header).to_bytes(8, 'little') + header
  for x in plain.values():
    yield np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    yield bytes(-x.nbytes % _ALIGNED)


def stored(path: str | os.PathLike) -> Stored:
  """The size and digest of a file on the disk.

  Raises:
    UserError: the file cannot be read (`reading.open_file`).
  """
  sums, size = hashlib.sha256(), 0
  with reading.open_file(path) as file:
    try:
      while block := file.read(_BLOCK):
        size += len(block)
        sums.update(block)
    except OSError as error:
      raise UserError(
        f'{shown(path)}: cannot be read: {error.strerror}'
      ) from error
  return Stored(size, sums.hexdigest())


def crc32(path: str | os.PathLike) -> str:
  """A file's CRC-32, 8 hexadecimal digits, which older releases stored.

  Raises:
    UserError: the file cannot be read (`reading.open_file`).
  """
  checksum = 0
  with reading.open_file(path) as file:
    while block := file.read(_BLOCK):
      checksum = zlib.crc32(block, checksum)
  return f'{checksum:08x}'


def read(
  path: str | os.PathLike,
  expected: Mapping[str, tuple[Any, tuple[int | None, ...]]],
  must_be: Stored | None = None,
) -> dict[str, np.ndarray]:
  """Reads all arrays `[...]` of a file, by name.

  `expected` has dtype and shape by name, where None is any length, which the
  size of the file bounds; `must_be` is from `write`, if it is known.

  Raises:
    UserError: the file or its arrays differ from what is expected.
  """
  with reading.open_file(path) as file:
    size = os.fstat(file.fileno()).st_size
    if must_be is not None and size != must_be.size:
      raise UserError(
        f'{shown(path)}: has {size:,} bytes, must have {must_be.size:,}'
      )
    try:
      content = bytearray(size)
      if file.readinto(content) != size:  # type: ignore[attr-defined]
        raise UserError(f'{shown(path)}: changed while it was read')
    except (OSError, MemoryError) as error:
      raise UserError(f'{shown(path)}: cannot be read: {error}') from error
  digest = hashlib.sha256(content).hexdigest() if must_be else ''
  if must_be is not None and digest != must_be.digest:
    raise UserError(f'{shown(path)}: is garbled')
  entries = _header(io.BytesIO(content[: _HEADER_LIMIT + 16]), size, str(path))
  for name in entries.keys() - expected.keys():
    raise UserError(f'{shown(path)}: has {shown(name)}, which is not expected')
  view = memoryview(content)
  return {
    name: _part(view, entries, name, dtype, shape, str(path))
    for name, (dtype, shape) in expected.items()
  }


def read_npz(
  path: str | os.PathLike, expected: Mapping[str, tuple[Any, Any]]
) -> dict[str, np.ndarray]:
  """Reads the arrays `[...]` of a `.npz` file of an older release, by name.

  `expected` has dtype and shape by name; None is any length, or any shape.

  Raises:
    UserError: the file or its arrays differ from what is expected.
  """
  found = {}
  with reading.open_file(path) as file:
    try:
      with np.load(file, allow_pickle=False) as saved:
        found = {name: saved[name] for name in expected}
    except (
      OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile,
      zlib.error,
    ) as error:  # fmt: skip
      raise UserError(f'{shown(path)}: {shown(error)}') from error
  for name, (dtype, shape) in expected.items():
    x = found[name]
    fits = shape is None or (
      x.ndim == len(shape)
      and all(m is None or n == m for n, m in zip(x.shape, shape))
    )
    if x.dtype != dtype or not fits:
      raise UserError(
        f'{shown(path)}: {shown(name)} is {x.dtype}{list(x.shape)}, must be '
        f'{dtype}{shape}'
      )
  return found


def mapped(path: str | os.PathLike) -> Callable[..., np.ndarray]:
  """Maps the arrays of a file that does not change any more into memory.

  Returns `(name, dtype, shape) -> array`, read-only, which raises `UserError`
  if the array differs from what is expected.

  Raises:
    UserError: the file is not a file of arrays.
  """
  with reading.open_file(path) as file:
    size = os.fstat(file.fileno()).st_size
    entries = _header(file, size, str(path))
    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
  return lambda name, dtype, shape: _part(
    view, entries, name, dtype, shape, str(path)
  )


def _header(file: BinaryIO, size: int, where: str) -> dict[str, _Entry]:
  """The header's entries, with offsets from the beginning of the file."""
  start = file.read(16)
  length = int.from_bytes(start[8:], 'little')
  if start[:8] != _MAGIC or length > min(size - 16, _HEADER_LIMIT):
    raise UserError(
      f'{shown(where)}: is not a file of arrays; restore the file from a copy'
    )
  found = reading.decode_json(file.read(length), list[_Entry], where)
  return {e.name: e._replace(offset=e.offset + 16 + length) for e in found}


def _part(
  view: memoryview,
  entries: Mapping[str, _Entry],
  name: str,
  dtype: Any,
  shape: tuple[int | None, ...],
  where: str,
) -> np.ndarray:
  """One array from a file's bytes, checked against what is expected."""
  where, dtype = shown(where), np.dtype(dtype)
  if name not in entries:
    raise UserError(f'{where}: lacks {shown(name)}')
  entry = entries[name]
  fits = len(entry.shape) == len(shape) and all(
    n == m or (m is None and n >= 0) for n, m in zip(entry.shape, shape)
  )
  if entry.dtype != str(dtype) or not fits:
    wanted = [('any' if n is None else n) for n in shape]
    raise UserError(
      f'{where}: {shown(name)} is {shown(entry.dtype)}{list(entry.shape)}, '
      f'must be {dtype}{wanted}'
    )
  count = 1
  for n in entry.shape:
    count *= n
  end = entry.offset + count * dtype.itemsize
  if entry.offset < 0 or end > len(view):
    raise UserError(f'{where}: {shown(name)} is cut short')
  data = view[entry.offset : end]
  return np.frombuffer(data, np.uint8).view(dtype).reshape(entry.shape)
