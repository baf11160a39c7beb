"""Several processes of one program on this machine, watched by a parent.

`experiments.launch` describes it.
"""

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from experiments.runtime import children as processes
from experiments.runtime import config as configs
from experiments.runtime import signals


class Exit(NamedTuple):
  """How one process ended: its number, and `Popen.returncode`."""

  process: int
  returncode: int

  def status(self) -> int:
    """As a shell has it: 128 and the signal's number for signals."""
    return self.returncode if self.returncode >= 0 else 128 - self.returncode

  def __str__(self) -> str:
    if self.returncode >= 0:
      return f'process {self.process} ended with code {self.returncode}'
    name = signals.name_of(-self.returncode)
    return f'process {self.process} was ended by {name}'

  def is_final(self) -> bool:
    """Whether another try would end alike: it was refused or stopped."""
    return self.returncode == 2 or signals.is_stop(self.returncode)


class Outcome(NamedTuple):
  """How all of them ended.

  Attributes:
    first: to fail, or else to be stopped; None if all ended with code 0.
    signal: the first signal that the parent passed on, or None.
  """

  first: Exit | None
  signal: int | None


def resolve(command: Sequence[str]) -> list[str]:
  """The command with this Python in front if it is a Python program.

  `-m module`, `script.py`, `python ...` and `python3 ...` run on the launcher's
  Python; the rest is looked up on PATH.

  Raises:
    UserError: no command, or no such program.
  """
  if not command:
    raise configs.UserError(
      'no command: put it after --, as in -- python -m experiments.train'
    )
  first, *rest = command
  if first in ('python', 'python3'):
    return [sys.executable, *rest]
  if first == '-m' or first.endswith('.py'):
    return [sys.executable, *command]
  if shutil.which(first) is None:
    raise configs.UserError(f'command {first}: no such program')
  return list(command)


def environments(
  processes: int, devices_per_process: int | None = None
) -> list[dict[str, str]]:
  """What each process's environment has in addition to the parent's."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  shared = {
    'OUTPLAY_COORDINATOR': address,
    'OUTPLAY_NUM_PROCESSES': str(processes),
    # jax's default listens to the whole network.
    'JAX_COORDINATOR_BIND_ADDRESS': address,
    'PYTHONUNBUFFERED': '1',
  }
  each = [{**shared, 'OUTPLAY_PROCESS_ID': str(i)} for i in range(processes)]
  if devices_per_process is not None:
    for i, variables in enumerate(each):
      variables['OUTPLAY_LOCAL_DEVICES'] = str(devices_per_process)
      ids = range(i * devices_per_process, (i + 1) * devices_per_process)
      variables['JAX_LOCAL_DEVICE_IDS'] = ','.join(map(str, ids))
  return each


def supervise(
  command: Sequence[str], each: Sequence[dict[str, str]], grace: float
) -> Outcome:
  """Runs one process for each environment until all have ended.

  SIGTERM and SIGINT are passed on to all, as often as they come, and waited for
  without limit: the processes save their state. Each leads a group of its own,
  so that Ctrl-C reaches it once, through the parent. If the parent is killed,
  the kernel kills them (Linux). When one fails, the others have `grace` seconds
  after SIGTERM.
  """
  # Signals and ends in the order they come: (process, returncode) or
  # (None, signal).
  events: queue.SimpleQueue = queue.SimpleQueue()

  def pass_on(signum: int, frame: object) -> None:
    signals.note(signum)
    events.put((None, signum))

  children: list[subprocess.Popen] = []
  with signals.handling(pass_on):
    try:
      return _supervise(children, command, each, grace, events)
    finally:
      for child in children:
        if child.poll() is None:
          processes.kill(child)


def _supervise(children, command, each, grace, events) -> Outcome:
  for variables in each:
    children.append(
      processes.start(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    )
  lock = threading.Lock()
  threads = [
    threading.Thread(target=target, args=(i, child, *rest), daemon=True)
    for i, child in enumerate(children)
    for target, rest in ((_print_lines, (lock,)), (_await, (events,)))
  ]
  for thread in threads:
    thread.start()
  outcome = _watch(children, events, grace)
  for thread in threads:
    thread.join(5)  # a process that has left its group may hold the pipe
  return outcome


def _watch(
  children: list[subprocess.Popen], events: queue.SimpleQueue, grace: float
) -> Outcome:
  """Waits for all; see `supervise`.

  A process that was stopped lets the others vote and save: only those still
  there after `grace` seconds are asked, too.
  """
  failed, stopped, passed_on = None, None, None
  alive = set(range(len(children)))
  asks: list[tuple[float, int]] = []  # what is sent to the rest, and when
  while alive:
    left = max(asks[0][0] - time.monotonic(), 0) if asks else None
    try:
      process, value = events.get(timeout=left)
    except queue.Empty:
      _, signum = asks.pop(0)
      for i in alive:
        processes.send(children[i], signum)
      continue
    if process is None:
      passed_on, asks = passed_on or value, [] if failed is None else asks
      for i in alive:
        processes.send(children[i], value)
      continue
    alive.discard(process)
    now = time.monotonic()
    if signals.is_stop(value):
      stopped = stopped or Exit(process, value)
      if passed_on is None and failed is None and not asks:
        asks = [
          (now + grace, signal.SIGTERM),
          (now + 2 * grace, signal.SIGKILL),
        ]
    elif value != 0 and failed is None:
      failed = Exit(process, value)
      asks = [(now + grace, signal.SIGKILL)]
      if alive:
        say(f'{failed}; stopping the others')
      for i in alive:
        processes.send(children[i], signal.SIGTERM)
  return Outcome(failed or stopped, passed_on)


def _await(
  process: int, child: subprocess.Popen, events: queue.SimpleQueue
) -> None:
  # A thread each: polling all in turn would not show which ended first.
  events.put((process, child.wait()))
  processes.send(child, signal.SIGKILL)  # what is left in its group


def _print_lines(
  process: int, child: subprocess.Popen, lock: threading.Lock
) -> None:
  prefix = f'[{process}] '.encode()
  for line in child.stdout or ():
    with lock:
      try:
        sys.stdout.buffer.write(prefix + line.rstrip(b'\n') + b'\n')
        sys.stdout.buffer.flush()
      except BrokenPipeError:  # nobody reads any more
        os.kill(os.getpid(), signal.SIGTERM)
        return


def say(text: str) -> None:
  """Prints a line of the launcher itself, on stderr."""
  print(f'launch: {text}', file=sys.stderr, flush=True)
