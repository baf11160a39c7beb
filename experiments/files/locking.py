"""Locks a folder for one writer."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from experiments.files import writing
from experiments.files.errors import UserError, shown

_NAME = '.lock'


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
  """Locks a folder, created if necessary, for this process.

  The lock is the operating system's (`flock`), so a killed process leaves none;
  `.lock` names the process that holds it. On a file system without such locks,
  nothing is locked.

  Raises:
    UserError: another process holds the lock, or the folder is not writable.
  """
  path = pathlib.Path(folder) / _NAME
  with writing.writing(folder):
    path.parent.mkdir(parents=True, exist_ok=True)
  with writing.open_append(path) as file:
    # Child processes, such as simulators, must not keep the lock.
    forget = _closing(file.fileno())
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        raise UserError(
          f'{shown(folder)}: another run writes there{_holder(path)}; wait '
          'until it ends, or take another folder'
        ) from error
      if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        raise
    try:
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
      file.flush()
      yield
    finally:
      forget()


def _holder(path: pathlib.Path) -> str:
  from experiments.files import reading

  try:
    text = reading.read_text(path, limit=1000).strip()
  except UserError:
    return ''
  return f' ({shown(text)})' if text else ''


_OPEN: set[int] = set()


def _closing(handle: int):
  """Makes children that are forked without exec close a descriptor."""
  _OPEN.add(handle)
  return lambda: _OPEN.discard(handle)


def _in_child() -> None:
  for handle in _OPEN:
    with contextlib.suppress(OSError):
      os.close(handle)
  _OPEN.clear()


os.register_at_fork(after_in_child=_in_child)
