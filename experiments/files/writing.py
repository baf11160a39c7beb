"""Writes files atomically and without following links."""

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from experiments.files.errors import UserError, shown
from experiments.files.reading import check_regular


def remedy(code: int | None) -> str:
  """The remedy for a refusal to write, by its `errno` if that is known."""
  if code in (errno.EACCES, errno.EPERM, errno.EROFS):
    return 'let this user write there'
  if code in (errno.EMFILE, errno.ENFILE):
    return 'allow more open files (ulimit -n)'
  return 'make room'


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns an `OSError` in the block into a `UserError` with a remedy.

  Raises:
    UserError: the block raised an `OSError`.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {shown(path)}: {error.strerror or shown(error)}; '
      f'{remedy(error.errno)}, '
      'then the same command resumes from the last checkpoint'
    ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Opens a file that replaces `path` when the block ends without an error.

  The file is written in the same folder, created if necessary, under a random
  name, flushed to the disk and renamed. If the process is killed before that,
  the old file stays.

  Raises:
    UserError: `path` is a link, folder or device, or the disk refused.
  """
  path = pathlib.Path(path)
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(path)
    unfinished = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.tmp')
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(unfinished, flags, 0o666)
    try:
      with os.fdopen(handle, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(unfinished, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(unfinished)
      raise
    flush_folder(path.parent)


def check_replaceable(path: str | os.PathLike) -> None:
  """Refuses a path of anything but a regular file or nothing.

  Raises:
    UserError: the path is a link, folder, FIFO, socket or device.
  """
  with contextlib.suppress(FileNotFoundError):
    check_regular(path, os.lstat(path))


def flush_folder(folder: str | os.PathLike) -> None:
  """Flushes a folder, so that renamed files survive a loss of power."""
  handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  try:
    # Some network file systems do not support this.
    with contextlib.suppress(OSError):
      os.fsync(handle)
  finally:
    os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file atomically, like `replacing`."""
  write_bytes(path, text.encode('utf-8'))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file atomically, like `replacing`."""
  with replacing(path) as file:
    file.write(content)


def write_figure(figure: Any, path: str | os.PathLike, dpi: int = 160) -> None:
  """Writes a matplotlib figure atomically, like `replacing`.

  The suffix is the format, PNG if there is none.

  Raises:
    UserError: matplotlib does not know the format, or the disk refused.
  """
  kind = pathlib.Path(path).suffix.removeprefix('.') or 'png'
  if kind not in figure.canvas.get_supported_filetypes():
    raise UserError(
      f'{shown(path)}: unknown format {shown(kind)}; must be png, pdf or svg'
    )
  with replacing(path) as file:
    figure.savefig(file, format=kind, dpi=dpi)


def open_append(path: str | os.PathLike) -> BinaryIO:
  """Opens a regular file to append bytes; creates it if necessary.

  Raises:
    UserError: the path is a link, FIFO or device, or the disk refused.
  """
  path = pathlib.Path(path)
  flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
  with writing(path):
    check_replaceable(path)
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
      os.close(handle)
      check_replaceable(path)
    return os.fdopen(handle, 'ab')


def is_there(path: str | os.PathLike) -> bool:
  """Whether a file exists, even on a network file system.

  Listing the folder makes an NFS client refresh its cache.
  """
  with contextlib.suppress(OSError):
    return os.path.basename(path) in os.listdir(os.path.dirname(path) or '.')
  return False
