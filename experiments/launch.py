"""Several processes of one program on this machine, watched by a parent.

`python -m experiments.launch --processes=2 -- python -m experiments.train ...`

Every line of a process is printed behind its number. When one fails, the
others are stopped, and the one that failed first is named. Running the same
command again resumes, as it does for one process.
"""

import contextlib
import ctypes
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.runtime import config as configs

_PR_SET_PDEATHSIG = 1


class Exit(NamedTuple):
  """How one process ended: its number, and `Popen.returncode`."""

  process: int
  returncode: int

  def status(self) -> int:
    """As a shell says it: 128 and the signal's number for signals."""
    return self.returncode if self.returncode >= 0 else 128 - self.returncode

  def __str__(self) -> str:
    if self.returncode >= 0:
      return f'process {self.process} ended with code {self.returncode}'
    name = signal.Signals(-self.returncode).name
    return f'process {self.process} was ended by {name}'


class Outcome(NamedTuple):
  """How all of them ended.

  Attributes:
    first: the first process that failed; None if all ended with code 0.
    signal: the first signal that the parent has passed on, or None.
  """

  first: Exit | None
  signal: int | None


def define_flags() -> None:
  """The flags of `python -m experiments.launch`."""
  from absl import flags

  flags.DEFINE_integer('processes', 2, 'how many', 1)
  flags.DEFINE_integer(
    'devices_per_process',
    None,
    'virtual devices on the CPU; on GPUs how many each process sees; all if '
    'left out',
    1,
  )
  flags.DEFINE_integer(
    'restarts', 0, 'how often a failed run is started again', 0
  )
  flags.DEFINE_float(
    'grace', 10, 'seconds from SIGTERM to SIGKILL once a process has failed', 0
  )


def main(command: Sequence[str]) -> None:
  """Runs a command as the flags say; exits with the first failure's code.

  Raises:
    SystemExit: with the first failure's code, where a process failed.
  """
  from absl import flags

  values = flags.FLAGS
  command = resolve(command)
  _say(f'{values.processes} processes; lines of process i begin with [i]')
  for left in range(values.restarts, -1, -1):
    outcome = supervise(
      command,
      environments(values.processes, values.devices_per_process),
      values.grace,
    )
    if outcome.first is None:
      return
    _say(f'{outcome.first}; it was the first of {values.processes}')
    if outcome.signal is not None or not left:
      raise SystemExit(outcome.first.status())
    _say(f'starting again, {left - 1} restarts left')


def resolve(command: Sequence[str]) -> list[str]:
  """The command with this Python in front, where it is a Python program.

  `-m module`, `script.py`, `python ...` and `python3 ...` run on the Python
  that runs the launcher; all else is looked up on PATH.

  Raises:
    UserError: no command, or no such program.
  """
  if not command:
    raise configs.UserError(
      'no command: put it behind --, as in -- python -m experiments.train'
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
  """What each process finds in its environment besides the parent's own."""
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

  SIGTERM and SIGINT are passed on to all, as often as they come, and waited
  for without limit: the processes save their state. Each process leads a
  group of its own, so that a terminal's Ctrl-C reaches it once, through the
  parent. When the parent itself is killed, the kernel kills them (Linux).

  Args:
    command: program and arguments.
    each: variables added to the environment, one dictionary a process.
    grace: seconds that the others have after SIGTERM when one has failed.
  """
  # Signals and deaths in the order in which they come: (process, returncode),
  # (None, signal).
  events: queue.SimpleQueue = queue.SimpleQueue()
  handler = lambda signum, frame: events.put((None, signum))
  signals = (signal.SIGTERM, signal.SIGINT)
  before = [signal.signal(signum, handler) for signum in signals]
  children: list[subprocess.Popen] = []
  try:
    die_with_parent = _die_with_parent()
    for variables in each:
      children.append(
        subprocess.Popen(
          command,
          env={**os.environ, **variables},
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          process_group=0,
          preexec_fn=die_with_parent,
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
  finally:
    for child in children:
      if child.poll() is None:
        _send(child, signal.SIGKILL)
        child.wait()
    for signum, old in zip(signals, before):
      signal.signal(signum, old)


def _watch(
  children: list[subprocess.Popen], events: queue.SimpleQueue, grace: float
) -> Outcome:
  first, passed_on, deadline = None, None, None
  alive = set(range(len(children)))
  while alive:
    left = None if deadline is None else max(deadline - time.monotonic(), 0)
    try:
      process, value = events.get(timeout=left)
    except queue.Empty:
      deadline = None
      for i in alive:
        _send(children[i], signal.SIGKILL)
      continue
    if process is None:
      passed_on = passed_on or value
      for i in alive:
        _send(children[i], value)
      continue
    alive.discard(process)
    if value != 0 and first is None:
      first = Exit(process, value)
      deadline = time.monotonic() + grace
      if alive:
        _say(f'{first}; stopping the others')
      for i in alive:
        _send(children[i], signal.SIGTERM)
  return Outcome(first, passed_on)


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


def _await(
  process: int, child: subprocess.Popen, events: queue.SimpleQueue
) -> None:
  # A thread each: polling all in turn would not tell who was the first.
  events.put((process, child.wait()))
  _send(child, signal.SIGKILL)  # what it has left behind in its group


def _send(child: subprocess.Popen, signum: int) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(child.pid, signum)


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


def _say(text: str) -> None:
  print(f'launch: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  split = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
  sys.argv, rest = sys.argv[:split], sys.argv[split + 1 :]
  define_flags()
  configs.run_main(lambda: main(rest))
