"""Measures free memory, so that files that do not fit are refused unread."""

import contextlib
import os
import pathlib

_GROUP = pathlib.Path('/sys/fs/cgroup')
# Assumed if the system does not report its memory.
_USUAL = 4 << 30


def available() -> int:
  """Bytes that this process can allocate without swapping."""
  found = []
  with contextlib.suppress(OSError, ValueError, IndexError):
    about = pathlib.Path('/proc/meminfo').read_text(encoding='ascii')
    line = about.partition('MemAvailable:')[2]
    found.append(int(line.split()[0]) << 10)
  if not found:
    with contextlib.suppress(OSError, ValueError, AttributeError):
      pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
      found.append(pages // 2)
  # A container may have less than its machine; 'max' is not a number.
  with contextlib.suppress(OSError, ValueError):
    number = lambda name: int((_GROUP / name).read_text(encoding='ascii'))
    found.append(max(number('memory.max') - number('memory.current'), 0))
  return min(found, default=_USUAL)


def room_for_data() -> int:
  """The most bytes that a file's arrays may have.

  Reading takes up to four times as much: the arrays, their joined columns, and
  next observations.
  """
  return available() // 4
