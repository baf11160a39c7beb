"""The arrays of a checkpoint's step, through orbax; all we ask of it.

One handler serves the whole process: what `Checkpointer` starts for each save
(an event loop, its thread, its descriptors) is never there. A folder is shown
to orbax under an alias, for in a path it takes `*`, `?`, `[` and a backslash
for something else. zarr's metadata is compared with what
is expected before tensorstore sees it: it allocates what these files say, and
some of them end the process.
"""

import contextlib
import functools
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.files import reading
from experiments.files.errors import UserError, shown
from experiments.runtime.integrity import Damaged


def save(folder: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays; all processes call it together, if there are several.

  Args:
    folder: empty.
    arrays: numpy's, which the first process writes, and jax's, of which each
      process writes its own shards.

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
  folder: pathlib.Path, wanted: Mapping[str, Any], check: bool = True
) -> dict[str, Any]:
  """Reads some arrays.

  Args:
    folder: of `save`.
    wanted: by name, a numpy array or a `jax.ShapeDtypeStruct` with a sharding:
      shape, dtype and where it goes.
    check: whether zarr's metadata are files of their own; the releases before
      wrote a database, in which they are not.

  Returns:
    Arrays of the same kinds by name.

  Raises:
    Damaged: they are not there, or others are.
  """
  import jax
  import orbax.checkpoint as ocp

  for name, x in wanted.items() if check else ():
    _check(folder / name / '.zarray', np.dtype(x.dtype), tuple(x.shape))
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


@functools.cache
def _handler() -> Any:
  import orbax.checkpoint as ocp

  logging.getLogger('absl').addFilter(_is_news)
  # Plain files: their metadata can be looked at.
  return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)


def _is_news(record: logging.LogRecord) -> bool:
  """Drops what orbax logs of what it then raises."""
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
  """What orbax, tensorstore or numpy say, as one line."""
  return shown(' '.join(str(error).split()) or type(error).__name__)


def _check(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
  """Compares an array's metadata with what is expected."""
  where = shown(path)
  try:
    found = reading.read_json(path, limit=1 << 20)
  except UserError as error:
    raise Damaged(str(error)) from error
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
    raise Damaged(f'{where}: its chunks, filters or compressor are not ours')
