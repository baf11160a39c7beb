"""The one way to write a file: whole or not at all, and where it was meant."""

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
  """What helps where the operating system refuses to write.

  Args:
    code: of `errno`; None where it is not known.
  """
  if code in (errno.EACCES, errno.EPERM, errno.EROFS):
    return 'let this user write there'
  if code in (errno.EMFILE, errno.ENFILE):
    return 'allow more open files (ulimit -n)'
  return 'make room'


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Makes the disk's refusal to take a file one line for people.

  Raises:
    UserError: the block met an `OSError`.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {shown(path)}: {error.strerror or shown(error)}; '
      f'{remedy(error.errno)}, '
      'then the same command goes on from the last checkpoint'
    ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file to write that takes its place once the block ends without error.

  It is written beside its place under a name that nobody can guess, flushed
  to the disk and renamed. A process that is killed meanwhile leaves the old
  file, or none.

  Args:
    path: of the file; its folder is made.

  Raises:
    UserError: a link, folder or device is in its place, or the disk refuses.
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
  """Refuses a place that holds anything but a regular file or nothing.

  Raises:
    UserError: a link, folder, FIFO, socket or device is there.
  """
  with contextlib.suppress(FileNotFoundError):
    check_regular(path, os.lstat(path))


def flush_folder(folder: str | os.PathLike) -> None:
  """Makes what was renamed in a folder last through a loss of power."""
  handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  try:
    # Some network file systems have no such call.
    with contextlib.suppress(OSError):
      os.fsync(handle)
  finally:
    os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file, its folder too, at once or not at all; see `replacing`."""
  write_bytes(path, text.encode('utf-8'))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file, its folder too, at once or not at all; see `replacing`."""
  with replacing(path) as file:
    file.write(content)


def write_figure(figure: Any, path: str | os.PathLike, dpi: int = 160) -> None:
  """Writes a figure of matplotlib at once or not at all; see `replacing`.

  Args:
    figure: `matplotlib.figure.Figure`.
    path: whose suffix is the format; PNG without one.
    dpi: dots an inch.

  Raises:
    UserError: a format that matplotlib does not know, or see `writing`.
  """
  kind = pathlib.Path(path).suffix.removeprefix('.') or 'png'
  if kind not in figure.canvas.get_supported_filetypes():
    raise UserError(
      f'{shown(path)}: figures are written as png, pdf or svg, not as '
      f'{shown(kind)}'
    )
  with replacing(path) as file:
    figure.savefig(file, format=kind, dpi=dpi)


def open_append(path: str | os.PathLike) -> BinaryIO:
  """Opens a regular file to append bytes, or makes it.

  Raises:
    UserError: a link, FIFO or device is in its place, or the disk refuses.
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
  """Whether a file is there, also where the folder is a network's.

  Looking into the folder makes a client of NFS ask its server anew.
  """
  with contextlib.suppress(OSError):
    return os.path.basename(path) in os.listdir(os.path.dirname(path) or '.')
  return False
