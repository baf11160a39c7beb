"""Processes that a launcher starts: they get its signals once, and die with it.

Each leads a group of its own, so that a terminal's Ctrl-C reaches it through
the launcher alone: a second signal would end it before it has saved.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
  """Starts a process in a group of its own; see `subprocess.Popen`.

  When the launcher itself is killed, the kernel kills it (Linux). The thread
  that starts it must not end before it does.

  Args:
    command: program and arguments.
    **options: of `Popen`.
  """
  return subprocess.Popen(
    command,
    stdin=subprocess.DEVNULL,
    process_group=0,
    preexec_fn=_die_with_parent(),
    **options,
  )


def send(child: subprocess.Popen, signum: int) -> None:
  """Sends a signal to all of a child's group; nothing where it has ended."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(child.pid, signum)


def kill(child: subprocess.Popen) -> None:
  """Ends a child and all that it has started, and waits for it."""
  send(child, signal.SIGKILL)
  child.wait()


def memory(pid: int) -> int:
  """Bytes of memory that a process and its descendants hold; 0 if unknown."""
  total, left = 0, [pid]
  while left:
    one = left.pop()
    with contextlib.suppress(OSError, ValueError, IndexError):
      with open(f'/proc/{one}/statm', encoding='ascii') as file:
        total += int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
      with open(f'/proc/{one}/task/{one}/children', encoding='ascii') as file:
        left += map(int, file.read().split())
  return total


def _die_with_parent() -> Callable[[], None] | None:
  """What a child runs before its program: Linux kills it with its parent."""
  if sys.platform != 'linux':
    return None
  prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

  def before_program() -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
      os._exit(1)

  return before_program
