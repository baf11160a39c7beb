"""The arrays of a checkpoint's step, through orbax.

One handler serves the whole process, without what `Checkpointer` starts for
each save (an event loop, its thread, its descriptors). Folders have an alias
for orbax, because it interprets `*`, `?`, `[` and backslashes in paths. zarr's
metadata is checked before tensorstore sees it, which allocates what these files
say, and some of them end the process.

Each array is two files, which are created, flushed and deleted one by one, so
small numpy leaves are written together as a few arrays of bytes, packs.
"""

import asyncio
import contextlib
import functools
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.files import reading
from experiments.files.errors import UserError, shown
from experiments.runtime.integrity import Damaged, Place

# Bytes of a pack at most, a multiple of `_ALIGNED`, and of an array that goes
# into one. Packs are compressed and written at the same time.
_PACK = 8 << 20
_SMALL = 1 << 20
# So that an array of any dtype is aligned in a pack.
_ALIGNED = 64


def packed(
  arrays: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Place]]:
  """Puts small numpy arrays together.

  Returns what to `save`, and the places of arrays in packs; no other array's
  name begins with `pack`.
  """
  alone, places, packs = {}, {}, []
  size = 0  # of the last pack
  for name, x in arrays.items():
    if not isinstance(x, np.ndarray) or x.nbytes > _SMALL:
      alone[name] = x
      continue
    if not packs or size + x.nbytes > _PACK:
      packs.append([])
      size = 0
    places[name] = Place(f'pack{len(packs) - 1}', size)
    padding = -x.nbytes % _ALIGNED
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    packs[-1] += [flat, np.zeros(padding, np.uint8)]
    size += x.nbytes + padding
  joined = {f'pack{i}': np.concatenate(parts) for i, parts in enumerate(packs)}
  return alone | joined, places


def save(folder: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays; all processes call it together.

  The first process writes numpy's, each process its own shards of jax's.

  Raises:
    OSError: the disk refuses.
    UserError: orbax does.
  """
  import orbax.checkpoint as ocp

  try:
    with _alias(folder) as path:
      _handler().save(path, args=ocp.args.PyTreeSave(dict(arrays)))
  except Exception as error:
    # tensorstore has the operating system's errors in its text.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(found[1]) if found else getattr(error, 'errno', None)
    if code is not None:
      raise OSError(code, os.strerror(code)) from error
    raise UserError(f'{shown(folder)}: {_said(error)}') from error


def load(
  folder: pathlib.Path,
  wanted: Mapping[str, Any],
  places: Mapping[str, Place],
  check: bool = True,
) -> dict[str, Any]:
  """Reads some arrays.

  Args:
    wanted: by name, a numpy array or a `jax.ShapeDtypeStruct` with a sharding:
      shape, dtype and where it goes.
    places: of those that are in packs.
    check: whether zarr's metadata are files of their own; earlier releases
      wrote a database instead.

  Raises:
    Damaged: they are not there, or others are.
  """
  sizes: dict[str, int] = {}
  for name in wanted:
    if name in places:
      pack = places[name].pack
      sizes[pack] = sizes.get(pack) or _size_of_pack(folder, pack)
  alone = {name: x for name, x in wanted.items() if name not in places}
  alone |= {pack: np.empty(size, np.uint8) for pack, size in sizes.items()}
  for name, x in alone.items() if check else ():
    _check(folder / name / '.zarray', np.dtype(x.dtype), tuple(x.shape))
  found = _load(folder, alone)
  return {
    name: _part(folder, found[places[name].pack], places[name], x)
    if name in places
    else found[name]
    for name, x in wanted.items()
  }


def _load(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Reads arrays that are there, as orbax does."""
  import jax
  import orbax.checkpoint as ocp

  arguments = {
    name: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding)
    if isinstance(x, jax.ShapeDtypeStruct)
    else ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
    for name, x in wanted.items()
  }
  try:
    with _alias(folder) as path:
      return _handler().restore(
        path,
        args=ocp.args.PyTreeRestore(
          item=dict(wanted), restore_args=arguments, partial_restore=True
        ),
      )
  except Exception as error:
    raise Damaged(f'{shown(folder)}: {_said(error)}') from error


def _size_of_pack(folder: pathlib.Path, pack: str) -> int:
  """Bytes of a pack, as its metadata says."""
  path = folder / pack / '.zarray'
  if not re.fullmatch(r'pack[0-9]{1,9}', pack, re.ASCII):
    raise Damaged(f'{shown(path)}: is not the name of a pack')
  shape = _metadata(path).get('shape')
  if not (
    isinstance(shape, list)
    and len(shape) == 1
    and type(shape[0]) is int
    and 0 < shape[0] <= _PACK
  ):
    raise Damaged(f'{shown(path)}: is not a pack of arrays')
  return shape[0]


def _part(folder: pathlib.Path, pack: Any, place: Place, wanted: Any) -> Any:
  """An array out of a pack, a copy."""
  import jax

  dtype, shape = np.dtype(wanted.dtype), tuple(wanted.shape)
  end = place.offset + dtype.itemsize * math.prod(shape)
  is_there = 0 <= place.offset <= end <= len(pack)
  if not is_there or place.offset % _ALIGNED:
    raise Damaged(
      f'{shown(folder / place.pack)}: has no {dtype}{list(shape)} at byte '
      f'{place.offset}'
    )
  x = pack[place.offset : end].copy().view(dtype).reshape(shape)
  if isinstance(wanted, jax.ShapeDtypeStruct):
    return jax.make_array_from_callback(
      shape, wanted.sharding, lambda index: x[index]
    )
  return x


@functools.cache
def _handler() -> Any:
  import orbax.checkpoint as ocp
  from orbax.checkpoint._src import asyncio_utils

  asyncio_utils._run_sync_via_new_loop = _run_to_the_end
  logging.getLogger('absl').addFilter(_is_news)
  # Plain files: their metadata can be looked at.
  return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)


def _run_to_the_end(work: Coroutine[Any, Any, Any]) -> Any:
  """Runs what orbax runs in a loop of its own, with all that it has begun.

  Orbax closes the loop as soon as one array fails, while tensorstore's threads
  continue with the others and print that the loop is closed.
  """

  async def all_of_it() -> Any:
    try:
      return await work
    finally:
      others = asyncio.all_tasks() - {asyncio.current_task()}
      await asyncio.gather(*others, return_exceptions=True)

  loop = asyncio.new_event_loop()
  try:
    return loop.run_until_complete(all_of_it())
  finally:
    loop.close()


def _is_news(record: logging.LogRecord) -> bool:
  """Drops what orbax logs before it raises it."""
  is_orbax = 'orbax' in record.pathname
  return not (is_orbax and (record.exc_info or record.levelno < logging.ERROR))


@contextlib.contextmanager
def _alias(folder: pathlib.Path) -> Iterator[Any]:
  """A path of plain letters to a folder."""
  from etils import epath

  with tempfile.TemporaryDirectory(prefix='outplay-') as place:
    path = os.path.join(place, 'leaves')
    os.symlink(folder, path)
    yield epath.Path(path)


def _said(error: Exception) -> str:
  """The message of orbax, tensorstore or numpy as one line."""
  return shown(' '.join(str(error).split()) or type(error).__name__)


def _check(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
  """Compares an array's metadata with what is expected."""
  where, found = shown(path), _metadata(path)
  name = dtype.str if dtype.kind in 'biufc' else dtype.name
  if (found.get('dtype'), found.get('shape')) != (name, list(shape)):
    raise Damaged(
      f'{where}: is {shown(found.get("dtype"))}{shown(found.get("shape"))}, '
      f'must be {name}{list(shape)}'
    )
  chunks, compressor = found.get('chunks'), found.get('compressor')
  fine = (
    isinstance(chunks, list)
    and len(chunks) == len(shape)
    and all(
      type(n) is int and 0 < n <= max(m, 1) for n, m in zip(chunks, shape)
    )
    and found.get('zarr_format') == 2
    and not found.get('filters')
    and isinstance(compressor, dict)
    and compressor.get('id') == 'zstd'
  )
  if not fine:
    raise Damaged(
      f'{where}: its chunks, filters or compressor are not those that a run '
      'writes'
    )


def _metadata(path: pathlib.Path) -> dict[str, Any]:
  try:
    return reading.read_json(path, limit=1 << 20)
  except UserError as error:
    raise Damaged(str(error)) from error
