"""The frame of a command: errors for users, exit codes, places to write."""

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from experiments.files import writing
from experiments.files.errors import UserError, shown
from experiments.runtime import flags as flags_of
from experiments.runtime import signals
from experiments.runtime.flags import MAX_INT as MAX_INT

# An unknown field's line lists all fields.
_LONGEST_ERROR = 4000

# A simulator's seeds are int32, and some are counted up from the run's own.
MAX_SEED = 2_000_000_000


def fail(message: str, cause: BaseException | None = None) -> NoReturn:
  """Prints `error: message` as one line on stderr and exits with code 2.

  `OUTPLAY_TRACEBACK` in the environment shows the traceback of `cause`.

  Raises:
    SystemExit: always.
  """
  line = shown(' '.join(str(message).split()), _LONGEST_ERROR)
  print('error:', line, file=sys.stderr)
  if cause is not None and os.environ.get('OUTPLAY_TRACEBACK'):
    traceback.print_exception(cause)
  signals.set_exit_code(2)
  raise SystemExit(2)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Turns every `ValueError` in its block into a `UserError`.

  For launchers that build agents and environments from flags: these refuse bad
  input with a plain `ValueError`.

  Raises:
    UserError: in place of a `ValueError`.
  """
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error


def run_main(main: Callable[[], None]) -> None:
  """Parses absl's flags and calls a launcher's `main()`.

  A `UserError`, a wrong flag or a stray argument becomes one line and exit code
  2; other exceptions keep their traceback. An interrupted launcher exits with
  130, a terminated one with 143; see `runtime.signals`.

  Raises:
    SystemExit: with the exit code.
  """
  from absl import app, flags, logging

  def parse(argv: list[str]) -> list[str]:
    with _one_line(unread=0):  # it prints nothing but help
      return flags_of.parse(argv)

  def guarded(argv: list[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # Libraries log each file that they write.
      logging.set_verbosity(logging.WARNING)
    with _one_line():
      flags_of.check_arguments(argv)
      main()

  with signals.launcher():
    try:
      app.run(guarded, flags_parser=parse)
    except SystemExit as stop:
      if stop.code not in (None, 0):
        raise


# A shell's code for a program that SIGPIPE ended.
_NOBODY_READS = 128 + 13


@contextlib.contextmanager
def _one_line(unread: int = _NOBODY_READS) -> Iterator[None]:
  """Ends the process with code 2 and one line for a mistake of its user.

  If nobody reads its output any more (`... --help | head`), it prints no line
  and ends with `unread`, unless it was about to end.
  """
  try:
    try:
      yield
    except UserError as error:
      fail(str(error), error.__cause__)
    finally:
      sys.stdout.flush()
  except BrokenPipeError as error:
    left = error.__context__
    # Or Python would complain at the very end when it empties its buffer.
    with contextlib.suppress(OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = left.code if isinstance(left, SystemExit) else unread
    raise SystemExit(code) from None


# What the kernel shows as files: some can be written to, nothing is kept.
_KERNEL = ('/proc', '/sys', '/dev')
_KERNEL_MEMORY = '/dev/shm'
# What `files.writing` adds to a name while it writes.
_LONGEST_NAME = 255 - len('..0123456789abcdef.tmp')


def check_place(
  field: str, path: str | os.PathLike, *, folder: bool = False
) -> None:
  """Refuses a flag's path where nothing can be written; makes nothing.

  It may exist already.

  Raises:
    UserError: a folder in the place of a file, or the reverse, at the path or
      above it; a name that cannot be written or shown; the root folder or one
      of the kernel's; or no permission.
  """
  named = f'{field}={shown(path)}'
  _check_name(named, str(path), folder)
  path = pathlib.Path(path)
  above = path if folder else path.parent
  try:
    if not folder and path.is_dir():
      raise UserError(f'{named}: is a folder, must be the name of a file')
    real = pathlib.Path(os.path.realpath(path))
    if not folder and (path.is_symlink() or real.exists()):
      writing.check_replaceable(path)
    while not above.exists():
      above = above.parent
  except UserError as error:
    raise UserError(f'{named}: {error}; take another place') from error
  except OSError as error:
    raise UserError(
      f'{named}: {(error.strerror or str(error)).lower()}; take another place'
    ) from error
  if not above.is_dir():
    what = 'is' if above == path else f'{shown(above)} is'
    raise UserError(f'{named}: {what} a file, must be a folder')
  if folder and real == pathlib.Path(real.anchor):
    raise UserError(
      f'{named}: is the root of all folders; take a folder of its own'
    )
  kernel = [real.is_relative_to(place) for place in _KERNEL]
  if any(kernel) and not real.is_relative_to(_KERNEL_MEMORY):
    raise UserError(
      f'{named}: {_KERNEL[kernel.index(True)]} belongs to the kernel, '
      'nothing is kept there; take another place'
    )
  if not os.access(above, os.W_OK | os.X_OK):
    raise UserError(
      f'{named}: {shown(above)} is not writable; take another place'
    )


def _check_name(named: str, path: str, folder: bool) -> None:
  """Refuses a path that cannot be written or printed."""
  if not path.isprintable():
    raise UserError(
      f'{named}: holds characters that cannot be printed; take another name'
    )
  size = len(pathlib.Path(path).name.encode('utf-8', 'replace'))
  if not folder and size > _LONGEST_NAME:
    raise UserError(
      f'{named}: name of {size} bytes, must be at most {_LONGEST_NAME}'
    )
