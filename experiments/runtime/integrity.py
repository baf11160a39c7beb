"""Whether checkpoints are whole, and what happens where they are not.

A step's folder holds, beside what the checkpoint wrote, the size and the
CRC-32 of every file. They are written before the folder gets its final name,
so that a step either has them or is not there.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator

import numpy as np

from experiments.files.errors import UserError, shown


class Damaged(UserError):
  """Every checkpoint of a folder is damaged."""


# Errors of the operating system that are no fault of the program.
_REFUSALS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
)


@contextlib.contextmanager
def saving(step: int | None, folder: str | os.PathLike) -> Iterator[None]:
  """Makes the disk's refusal to take a checkpoint one line for people.

  Args:
    step: of the checkpoint.
    folder: where it was to be.

  Raises:
    UserError: the block met a full disk, or another refusal of the operating
      system, in Python or within orbax.
  """
  try:
    yield
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    code = getattr(error, 'errno', None)
    if code is None:  # tensorstore's
      found = re.search(r"os_error_code='(\d+)'", str(error))
      code = int(found[1]) if found else None
    if code not in _REFUSALS:
      raise
    raise UserError(
      f'cannot save the checkpoint at update {step} into {folder}: '
      f'{os.strerror(code)}; the one before it is whole: make room, then the '
      'same command goes on from there'
    ) from error


def is_news(record: logging.LogRecord) -> bool:
  """Drops the tracebacks that orbax logs of what it then raises."""
  return not (record.exc_info and 'orbax' in record.pathname)


def _steps(root: pathlib.Path) -> list[int]:
  """Steps that were written to the end, the newest first."""
  found = root.iterdir() if root.is_dir() else ()
  return sorted((int(p.name) for p in found if p.name.isdigit()), reverse=True)


def _sums(folder: pathlib.Path) -> dict[str, list[int]]:
  """Size and CRC-32 of each file that reading a step needs."""
  found = {}
  for part in ('meta', 'leaves'):
    for path in sorted((folder / part).rglob('*')):
      # Orbax rewrites its marks while it finishes a step.
      if not path.is_file() or path.name in ('commit_success.txt', 'sums.json'):
        continue
      size = crc = 0
      with path.open('rb') as file:
        while block := file.read(1 << 20):
          size, crc = size + len(block), zlib.crc32(block, crc)
      found[path.relative_to(folder).as_posix()] = [size, crc]
  return found


def seal(root: pathlib.Path, step: int | None) -> None:
  """Adds the sums to a step that is written but not yet renamed."""
  for folder in root.glob(f'{step}.orbax-checkpoint-tmp*'):
    with (folder / 'meta' / 'sums.json').open('w') as file:
      json.dump(_sums(folder), file)
      file.flush()
      os.fsync(file.fileno())


def _damage(folder: pathlib.Path) -> str | None:
  """What is wrong with a step's files, or None."""
  meta = folder / 'meta'
  if not meta.is_dir():
    # What another program wrote is for `peek` to refuse.
    others = {path.name for path in folder.iterdir()} - {'leaves'}
    return None if any((folder / n).is_dir() for n in others) else 'no meta/'
  for path in (meta / 'data.json', meta / 'sums.json'):
    # Steps of older releases have no sums.
    if path.name == 'data.json' or path.exists():
      try:
        content = json.loads(path.read_text(encoding='utf-8'))
      except FileNotFoundError:
        return f'meta/{path.name} is missing'
      except ValueError:
        return f'meta/{path.name} is garbled'
      if not isinstance(content, dict):
        return f'meta/{path.name} is garbled'
  if not (meta / 'sums.json').exists():
    return None
  try:
    found = _sums(folder)
  except FileNotFoundError:
    return 'it is being deleted'
  for name, (size, crc) in content.items():
    if name not in found:
      return f'{name} is missing'
    if found[name][0] != size:
      return f'{name} has {found[name][0]} bytes instead of {size}'
    if found[name][1] != crc:
      return f'{name} is garbled'
  return None


def _set_aside(root: pathlib.Path, steps: list[int]) -> None:
  for step in steps:
    aside = root / f'{step}.corrupt'
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(root / str(step), aside)


def _agreed(values: list[int]) -> list[int]:
  """The first process's numbers, in every process."""
  import jax

  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils

  return multihost_utils.broadcast_one_to_all(np.array(values)).tolist()


def is_first() -> bool:
  """Whether this process is the one that renames and prints."""
  import jax

  return jax.process_index() == 0


def set_aside(root: pathlib.Path, step: int | None = None) -> None:
  """Renames a step, or every one, to `N.corrupt`; all processes call it."""
  if is_first():
    _set_aside(root, _steps(root) if step is None else [step])
  _agreed([0])  # nobody goes on before it is done


def settle(
  root: pathlib.Path, read_only: bool = False
) -> tuple[int | None, str | None]:
  """Finds the newest step that is whole, and sets newer ones aside.

  Prints one line for each of them. All processes call it, unless `read_only`.

  Args:
    root: the folder of the steps.
    read_only: leave them where they are.

  Returns:
    The step, None where there is none; and what to tell the user where there
    are only damaged ones, else None. Those stay in their place: the next run
    must not begin anew unasked.
  """
  damaged: dict[int, str] = {}
  newest = -1
  if read_only or is_first():
    for step in _steps(root):
      why = _damage(root / str(step))
      if why is None:
        newest = step
        break
      damaged[step] = why
    if newest >= 0 and not read_only:
      _set_aside(root, list(damaged))
    for step, why in damaged.items() if newest >= 0 else ():
      done = '' if read_only else f'it is set aside as {step}.corrupt, '
      print(
        f'note: the checkpoint {shown(root)}/{step} is damaged ({shown(why)}): '
        f'{done}step {newest} is taken',
        flush=True,
      )
  count = len(damaged)
  if not read_only:
    newest, count = _agreed([newest, count])
  if newest >= 0:
    return newest, None
  if not count:
    return None, None
  reasons = ', '.join(f'step {step}: {why}' for step, why in damaged.items())
  return None, (
    f'no checkpoint in {root} is whole ({reasons or "see process 0"}): put '
    'back a copy of one, or delete the run to begin it anew'
  )
