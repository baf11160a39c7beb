"""The one way to read a file that somebody else may have written.

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

# Settings, facts and tables are far smaller.
MAX_BYTES = 64 << 20
# Python's own decoders recurse; nothing that we write nests as deep.
_MAX_DEPTH = 64
# What stands in a checkout in the place of a large file that was not fetched.
_POINTERS = {
  b'version https://git-lfs': ('Git LFS', 'git lfs pull'),
  b'/annex/objects/': ('git-annex', 'git annex get'),
}


def open_file(
  path: str | os.PathLike, *, limit: int | None = None, follow: bool = False
) -> BinaryIO:
  """Opens a regular file to read bytes.

  Args:
    path: of the file.
    limit: bytes at most; None for any size, where the caller reads in pieces
      or checks what the file declares.
    follow: whether the path itself may be a link, as a path that the user
      typed may be. Files within a folder must not be links.

  Raises:
    Missing: nothing is there.
    UserError: a link, folder, FIFO or device; too large; not readable; the
      pointer of Git LFS or git-annex that stands for the file.
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
    # Another file may have taken its place since.
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
  """Refuses what is not a regular file.

  Args:
    path: for the message.
    found: of `os.stat` or `os.lstat`.

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
  """Refuses a folder that holds anything but regular files and folders.

  The folder itself may be a link. For what libraries read by themselves.

  Raises:
    Missing: there is no such folder.
    UserError: a link, FIFO, socket or device is in it, or it cannot be read.
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
  """A regular file's bytes.

  Args:
    path: of the file.
    limit: bytes at most.
    follow: whether the path itself may be a link.

  Raises:
    UserError: see `open_file`.
  """
  with open_file(path, limit=limit, follow=follow) as file:
    try:
      # A file that grows while it is read is not read without end.
      content = file.read(limit + 1)
    except (OSError, MemoryError) as error:
      raise UserError(f'{shown(path)}: cannot be read: {error}') from error
  if len(content) > limit:
    raise UserError(f'{shown(path)}: must be at most {limit:,} bytes')
  return content


def read_text(
  path: str | os.PathLike, *, limit: int = MAX_BYTES, follow: bool = False
) -> str:
  """A regular UTF-8 file's text.

  Raises:
    UserError: as `open_file`, or it is not UTF-8, or it holds NUL bytes.
  """
  content = read_bytes(path, limit=limit, follow=follow)
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{shown(path)}: is not UTF-8 text (byte {error.start}); copy it back'
    ) from error
  if '\0' in text:
    raise UserError(f'{shown(path)}: is binary, must be text; copy it back')
  return text


def read_json(
  path: str | os.PathLike,
  kind: type[T] | Any = dict[str, Any],
  *,
  limit: int = MAX_BYTES,
) -> T | Any:
  """A JSON file as the type that its reader expects.

  Args:
    path: of the file.
    kind: what `msgspec` converts to: a frozen dataclass (unknown fields are
      passed over), a `dict[str, float]` and so on.
    limit: bytes at most.

  Raises:
    Missing: no such file.
    UserError: as `open_file`; not JSON; nested too deeply; a field that is
      missing or of a wrong type, which the line names.
  """
  return decode_json(read_bytes(path, limit=limit), kind, str(path))


def decode_json(content: bytes | str, kind: Any, where: str) -> Any:
  """JSON text as a type; see `read_json`.

  Args:
    content: JSON.
    kind: what to decode into.
    where: what the text is called in messages, a file and a key say.

  Raises:
    UserError: see `read_json`.

  >>> decode_json('{"seed": 3}', dict[str, int], 'config.json')
  {'seed': 3}
  """
  import msgspec

  where = shown(where)
  if isinstance(content, str):
    content = content.encode('utf-8', 'surrogatepass')
  _check_depth(content, where)
  try:
    # Unlike msgspec's own decoder it knows the Infinity of unbounded spaces.
    plain = json.loads(content)
  except ValueError as error:
    raise UserError(
      f'{where} is not JSON: {shown(error)}; copy it back'
    ) from error
  try:
    return msgspec.convert(plain, kind)
  except msgspec.ValidationError as error:
    raise UserError(f'{where}: {shown(error)}; copy it back') from error


def _check_depth(content: bytes, where: str) -> None:
  """Refuses nesting that readers further down would recurse into."""
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
          f'{where}: nests more than {_MAX_DEPTH} levels deep; copy it back'
        )
    elif byte in b']}':
      depth -= 1
