"""Reads NumPy files that are not trusted: `.npy` as a map, `.npz` whole.

The sizes that a file declares are compared with its size and with this
machine's memory before anything is allocated. Nothing is unpickled.
"""

import math
import os
import pathlib
import stat
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.files import memory, reading
from experiments.files.errors import UserError, shown

# numpy's own limit for headers, which are read by `ast.literal_eval`.
_HEADER_LIMIT = 10_000
# The exceptions that parsers raise on malicious text.
_DAMAGE = (
  *(OSError, ValueError, SyntaxError, TypeError, OverflowError, KeyError),
  *(EOFError, RecursionError, MemoryError, NotImplementedError, RuntimeError),
  *(zipfile.BadZipFile, zlib.error),
)
# Larger files with almost no data are truncated or malicious.
_SPARSE_FROM = 1 << 30
_SPARSE_SHARE = 0.01


class _Header(NamedTuple):
  """The header of a `.npy` file; `offset` is where its numbers begin."""

  dtype: np.dtype
  shape: tuple[int, ...]
  order: Literal['C', 'F']
  offset: int


def open_map(path: pathlib.Path, key: str) -> np.ndarray:
  """Opens the array of a `.npy` file as a read-only memory map, `[...]`.

  `key` is the array's name in messages, after the folder.

  Raises:
    Missing: the file does not exist.
    ValueError: the file is a link or not regular, damaged, sparse, or has
      pickled objects.
  """
  where = f'{shown(path.parent)}: {key}'
  with reading.open_file(path) as file:
    found = os.fstat(file.fileno())
    try:
      header = _read_header(file, found.st_size)
    except _DAMAGE as error:
      raise _damaged(where, error) from error
    _check_filled(where, found)
    if not math.prod(header.shape):
      # An empty file cannot be mapped.
      return np.zeros(header.shape, header.dtype)
    try:
      return np.memmap(
        file, header.dtype, 'r', header.offset, header.shape, header.order
      )
    except _DAMAGE as error:
      raise _damaged(where, error) from error


def _check_filled(where: str, found: os.stat_result) -> None:
  stored = getattr(found, 'st_blocks', math.inf) * 512
  if (
    stat.S_ISREG(found.st_mode)
    and found.st_size > _SPARSE_FROM
    and stored < _SPARSE_SHARE * found.st_size
  ):
    raise UserError(
      f'{where} is a sparse file: {stored:,} of its {found.st_size:,} bytes '
      'are stored; collect or copy it again'
    )


def read_archive(
  path: str | os.PathLike,
  kinds: Mapping[str, str],
  *,
  follow: bool = False,
) -> dict[str, np.ndarray]:
  """Reads the arrays `[...]` of a `.npz` file, by name.

  The file must have exactly the arrays in `kinds`, which are the allowed kinds
  of dtype, `'biuf'` for numbers; `follow` allows a link.

  Raises:
    Missing: the file does not exist.
    ValueError: the file is not regular, damaged, or has pickled objects; an
      array is missing or unexpected; or the arrays do not fit into memory.
  """
  where = shown(path)
  with reading.open_file(path, follow=follow) as file:
    try:
      if file.read(6) == b'\x93NUMPY':
        raise ValueError('a single array')
      archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
      raise _damaged(f'{where}: archive', error) from error
    members = _members(archive, where, kinds)
    found = {}
    for name, member in members.items():
      try:
        with archive.open(member) as content:
          found[name] = _read_array(content, member.file_size, kinds[name])
      except _DAMAGE as error:
        raise _damaged(f'{where}: {name}', error) from error
    return found


def _members(
  archive: zipfile.ZipFile, where: str, kinds: Mapping[str, str]
) -> dict[str, zipfile.ZipInfo]:
  found: dict[str, zipfile.ZipInfo] = {}
  for member in archive.infolist():
    name = member.filename.removesuffix('.npy')
    if name not in kinds or name in found or member.filename == name:
      raise UserError(
        f'{where}: has the member {shown(repr(member.filename), 60)}, must '
        f'have one of {", ".join(kinds)} each; write it again'
      )
    if member.flag_bits & 1 or member.compress_type not in (
      zipfile.ZIP_STORED,
      zipfile.ZIP_DEFLATED,
    ):
      raise UserError(
        f'{where}: {name} is encrypted or compressed in an unusual way; write '
        'it again with numpy.savez_compressed'
      )
    found[name] = member
  for name in kinds:
    if name not in found:
      raise UserError(f'{where}: {name} is missing')
  check_room(where, sum(member.file_size for member in found.values()))
  return found


def check_room(where: str, size: int) -> None:
  """Refuses data that do not fit into this machine's memory.

  Raises:
    UserError: the size in bytes is too large.
  """
  room = memory.room_for_data()
  if size > room:
    raise UserError(
      f'{where}: declares {size:,} bytes, must be at most {room:,} on this '
      'machine; take a part of it, or more memory'
    )


def _read_header(file: Any, size: int) -> _Header:
  """The header of a `.npy` file, checked against the file's size."""
  start = file.read(8)
  if start[:6] != b'\x93NUMPY' or start[6:7] not in (b'\x01', b'\x02', b'\x03'):
    raise ValueError('not a NumPy array')
  width = 2 if start[6] == 1 else 4
  length = int.from_bytes(file.read(width), 'little')
  most = min(_HEADER_LIMIT, size)
  if length > most:
    raise ValueError(f'a header of {length:,} bytes, must be at most {most:,}')
  text = file.read(length).decode('utf-8' if start[6] == 3 else 'latin-1')
  dtype, shape, order = _parse_header(text)
  offset = 8 + width + length
  declared = offset + math.prod(shape) * dtype.itemsize
  if declared != size:
    raise ValueError(f'{size:,} bytes, not {shown(declared, 40)}')
  return _Header(dtype, shape, order, offset)


def _parse_header(
  text: str,
) -> tuple[np.dtype, tuple[int, ...], Literal['C', 'F']]:
  import ast

  content = ast.literal_eval(text)
  if set(content) != {'descr', 'fortran_order', 'shape'}:
    raise ValueError('a header without descr, fortran_order and shape')
  shape, descr = content['shape'], content['descr']
  if not (
    isinstance(shape, tuple)
    and len(shape) <= 32
    and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
  ):
    raise ValueError(f'shape {shown(shape, 60)}, must be at most 32 sizes')
  if not isinstance(descr, str):
    raise ValueError('records, must be numbers')
  dtype = np.dtype(descr)
  if dtype.hasobject:
    raise ValueError('pickled objects, must be numbers')
  return dtype, shape, 'F' if content['fortran_order'] is True else 'C'


def _read_array(content: Any, size: int, kinds: str) -> np.ndarray:
  """The array of an archive's member, which has `size` bytes."""
  header = _read_header(content, size)
  if header.dtype.kind not in kinds:
    raise ValueError(f'{header.dtype}, must be numbers')
  # Reads no more than the header declares.
  raw = content.read(size - header.offset + 1)
  if len(raw) != size - header.offset:
    raise ValueError('cut short')
  array = np.frombuffer(raw, header.dtype)
  return array.reshape(header.shape, order=header.order)


def _damaged(where: str, error: BaseException) -> UserError:
  why = shown(' '.join(str(error).split()) or type(error).__name__)
  return UserError(
    f'{where} is truncated or damaged ({why}); collect or copy it again'
  )
