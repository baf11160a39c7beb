"""Processes of a launcher: they get its signals once, and die with it.

Each leads a group of its own, so that Ctrl-C reaches it only through the
launcher: a second signal would end it before it has saved.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Asks Linux to kill it with its parent, then becomes the program. Not by
# `preexec_fn`: jax warns of forks in a process of many threads.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # it has not died meanwhile
  os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
  """Starts a process in a group of its own, with options of `Popen`.

  If the launcher is killed, the kernel kills it (Linux). The thread that starts
  it must not end before it does.
  """
  tied = []
  if sys.platform == 'linux':
    tied = [sys.executable, '-IS', '-c', _TIED, str(os.getpid())]
  return subprocess.Popen(
    [*tied, *command], stdin=subprocess.DEVNULL, process_group=0, **options
  )


def run(
  command: Sequence[str], stopping: Callable[[], bool], **options: Any
) -> tuple[int, Any]:
  """Runs a process to its end, with options of `Popen`.

  If `stopping` is True, the process gets SIGTERM, saves and leaves, or is not
  begun, with SIGTERM's code. Returns `Popen.returncode` and
  `resource.getrusage`, None if there was no process.
  """
  if stopping():
    return 128 + signal.SIGTERM, None
  child, asked = start(command, **options), False
  try:
    while True:
      pid, status, usage = os.wait4(child.pid, os.WNOHANG)
      if pid:
        child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode, usage
      if stopping() and not asked:
        asked = True
        send(child, signal.SIGTERM)
      time.sleep(0.05)
  finally:
    if child.returncode is None:
      kill(child)


def send(child: subprocess.Popen, signum: int) -> None:
  """Sends a signal to all of a child's group, if it has not ended."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(child.pid, signum)


def kill(child: subprocess.Popen) -> None:
  """Kills a child and all that it has started, and waits for it."""
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
