"""Reads files that are not trusted.

Only regular files are opened, no link within a folder is followed, sizes are
bounded before anything is read, and JSON is decoded into the type that the
caller names. Every error is one line that starts with the file.
"""

import json
import os
import pathlib
import stat
from typing import Any, BinaryIO, TypeVar

from experiments.files.errors import Missing, UserError, shown

T = TypeVar('T')

# Settings and tables are far smaller.
MAX_BYTES = 64 << 20
# Python's decoders recurse; none of our own files nests as deep.
_MAX_DEPTH = 64
# The beginnings of pointers that replace large files that were not fetched.
_POINTERS = {
  b'version https://git-lfs': ('Git LFS', 'git lfs pull'),
  b'/annex/objects/': ('git-annex', 'git annex get'),
}


def open_file(
  path: str | os.PathLike, *, limit: int | None = None, follow: bool = False
) -> BinaryIO:
  """Opens a regular file to read bytes.

  Args:
    limit: the most bytes; None for callers that read in pieces or check the
      sizes that the file declares.
    follow: whether the path itself may be a link, which is allowed for paths
      that the user typed but not for files within a folder.

  Raises:
    Missing: the file does not exist.
    UserError: the path is a link, folder, FIFO or device, or the file is too
      large, not readable, or a pointer of Git LFS or git-annex.
  """
  path = pathlib.Path(path)
  where = shown(path)
  # Without O_NONBLOCK a FIFO would wait for a writer.
  flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
  try:
    found = os.stat(path, follow_symlinks=follow)
    check_regular(path, found)
    handle = os.open(path, flags | (0 if follow else os.O_NOFOLLOW))
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Missing(f'{where}: no such file') from error
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    why = error.strerror if isinstance(error, OSError) else error
    raise UserError(f'{where}: cannot be read: {why}') from error
  try:
    # Another file may have replaced it since.
    found = os.fstat(handle)
    check_regular(path, found)
    if limit is not None and found.st_size > limit:
      raise UserError(
        f'{where}: {found.st_size:,} bytes, must be at most {limit:,}'
      )
    _check_fetched(where, os.pread(handle, 64, 0))
    return os.fdopen(handle, 'rb')
  except OSError as error:
    os.close(handle)
    raise UserError(f'{where}: cannot be read: {error.strerror}') from error
  except BaseException:
    os.close(handle)
    raise


def _check_fetched(where: str, head: bytes) -> None:
  for start, (what, command) in _POINTERS.items():
    if head.startswith(start):
      raise UserError(
        f'{where}: is a {what} pointer, not the file itself; fetch it with: '
        f'{command}'
      )


def check_regular(path: str | os.PathLike, found: os.stat_result) -> None:
  """Refuses anything but a regular file, by its `os.stat` or `os.lstat`.

  Raises:
    UserError: it is a link, a folder, a FIFO, a socket or a device.
  """
  kinds = {
    stat.S_IFLNK: 'a link; put the file itself there',
    stat.S_IFDIR: 'a folder, must be a file',
    stat.S_IFIFO: 'a FIFO, must be a file',
    stat.S_IFSOCK: 'a socket, must be a file',
    stat.S_IFCHR: 'a device, must be a file',
    stat.S_IFBLK: 'a device, must be a file',
  }
  kind = kinds.get(stat.S_IFMT(found.st_mode))
  if kind is not None:
    raise UserError(f'{shown(path)}: is {kind}')


def check_folder(folder: str | os.PathLike) -> None:
  """Refuses a folder with anything but regular files and folders in it.

  For folders that a library reads; the folder itself may be a link.

  Raises:
    Missing: the folder does not exist.
    UserError: it contains a link, FIFO, socket or device, or cannot be read.
  """
  try:
    left = [os.fspath(folder)]
    while left:
      with os.scandir(left.pop()) as entries:
        for entry in entries:
          if entry.is_dir(follow_symlinks=False):
            left.append(entry.path)
          else:
            check_regular(entry.path, entry.stat(follow_symlinks=False))
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Missing(f'{shown(error.filename)}: no such folder') from error
  except OSError as error:
    where = shown(error.filename or folder)
    raise UserError(f'{where}: cannot be read: {error.strerror}') from error


def read_bytes(
  path: str | os.PathLike, *, limit: int = MAX_BYTES, follow: bool = False
) -> bytes:
  """Reads a regular file's bytes, as `open_file` does.

  Raises:
    UserError: the file cannot be read.
  """
  with open_file(path, limit=limit, follow=follow) as file:
    try:
      # Bounded, because the file may grow while it is read.
      content = file.read(limit + 1)
    except (OSError, MemoryError) as error:
      raise UserError(f'{shown(path)}: cannot be read: {error}') from error
  if len(content) > limit:
    raise UserError(f'{shown(path)}: must be at most {limit:,} bytes')
  return content


def read_text(
  path: str | os.PathLike, *, limit: int = MAX_BYTES, follow: bool = False
) -> str:
  """Reads a regular UTF-8 file's text, as `open_file` does.

  Raises:
    UserError: the file cannot be read, is not UTF-8, or contains NUL bytes.
  """
  content = read_bytes(path, limit=limit, follow=follow)
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{shown(path)}: is not UTF-8 text (byte {error.start}); restore the '
      'file from a copy'
    ) from error
  if '\0' in text:
    raise UserError(
      f'{shown(path)}: is binary, must be text; restore the file from a copy'
    )
  return text


def read_json(
  path: str | os.PathLike,
  kind: type[T] | Any = dict[str, Any],
  *,
  limit: int = MAX_BYTES,
) -> T | Any:
  """Reads a JSON file into the type that the caller expects.

  `kind` is a type that `msgspec` converts to: a frozen dataclass (unknown
  fields are ignored), a `dict[str, float]` and so on.

  Raises:
    Missing: the file does not exist.
    UserError: the file cannot be read (`open_file`), is not JSON, nests too
      deeply, or lacks a field or has one of a wrong type.
  """
  return decode_json(read_bytes(path, limit=limit), kind, str(path))


def decode_json(content: bytes | str, kind: Any, where: str) -> Any:
  """Decodes JSON into a type, like `read_json`; `where` names it in messages.

  Raises:
    UserError: the text is not JSON or does not fit the type.

  >>> decode_json('{"seed": 3}', dict[str, int], 'config.json')
  {'seed': 3}
  """
  import msgspec

  where = shown(where)
  if isinstance(content, str):
    content = content.encode('utf-8', 'surrogatepass')
  _check_depth(content, where)
  try:
    # Unlike msgspec's decoder, it accepts the Infinity of unbounded spaces.
    plain = json.loads(content)
  except ValueError as error:
    raise UserError(
      f'{where} is not JSON: {shown(error)}; restore the file from a copy'
    ) from error
  try:
    return msgspec.convert(plain, kind)
  except msgspec.ValidationError as error:
    raise UserError(
      f'{where}: {shown(error)}; restore the file from a copy'
    ) from error


def _check_depth(content: bytes, where: str) -> None:
  """Refuses deep nesting, into which decoders would recurse."""
  if content.count(b'[') + content.count(b'{') <= _MAX_DEPTH:
    return
  depth, inside, escaped = 0, False, False
  for byte in content:
    if inside:
      inside = escaped or byte != 0x22
      escaped = not escaped and byte == 0x5C
    elif byte == 0x22:
      inside = True
    elif byte in b'[{':
      depth += 1
      if depth > _MAX_DEPTH:
        raise UserError(
          f'{where}: nests more than {_MAX_DEPTH} levels deep; restore the '
          'file from a copy'
        )
    elif byte in b']}':
      depth -= 1
