"""How much memory is left, to refuse what would not fit before it is read."""

import contextlib
import os
import pathlib

_GROUP = pathlib.Path('/sys/fs/cgroup')
# Where nothing tells: what any machine that trains has.
_USUAL = 4 << 30


def available() -> int:
  """Bytes that this process can still take without pushing others out."""
  found = []
  with contextlib.suppress(OSError, ValueError, IndexError):
    about = pathlib.Path('/proc/meminfo').read_text(encoding='ascii')
    line = about.partition('MemAvailable:')[2]
    found.append(int(line.split()[0]) << 10)
  if not found:
    with contextlib.suppress(OSError, ValueError, AttributeError):
      pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
      found.append(pages // 2)
  # A container may have less than its machine; 'max' is no number.
  with contextlib.suppress(OSError, ValueError):
    number = lambda name: int((_GROUP / name).read_text(encoding='ascii'))
    found.append(max(number('memory.max') - number('memory.current'), 0))
  return min(found, default=_USUAL)


def room_for_data() -> int:
  """Bytes that a file may declare its arrays to have.

  Reading takes up to four times as much: the arrays, their joined columns,
  and next observations.
  """
  return available() // 4
