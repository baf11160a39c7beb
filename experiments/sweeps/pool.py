"""Runs rows of a sweep as processes, on this machine or a pool's."""

import collections
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.files import tables, writing
from experiments.report import terminal
from experiments.runtime import children, signals
from experiments.sweeps import halving as sweep_halving
from experiments.sweeps import rows
from experiments.sweeps.plan import Row
from experiments.sweeps.rows import Job

# Seconds in which a row that was asked to stop saves.
_PATIENCE = 120.0


class Limits(NamedTuple):
  """What a row may take.

  Attributes:
    minutes: of one process; None for any.
    gigabytes: of memory, with all that it starts; None for any.
  """

  minutes: float | None = None
  gigabytes: float | None = None


class Ended(NamedTuple):
  """How a process of a row ended.

  Attributes:
    code: `Popen.returncode`; None if its machine was lost.
    why: what ended it, if that was a limit, a stop or the machine's loss.
    is_final: whether it is not to be tried again.
  """

  code: int | None
  seconds: float
  why: str = ''
  is_final: bool = False


class Pool(NamedTuple):
  """Machines that run a sweep's rows.

  Attributes:
    choose: `(avoid) -> name` of a machine with room for a row, None if none
      has; one of the names in `avoid` only if there are no others.
    start: `(name, job) -> None`, starts its process there.
    ended: `() -> [(job, Ended)]`, those since the last call.
    close: `() -> None`, stops all jobs that still run.
  """

  choose: Callable[[frozenset[str]], str | None]
  start: Callable[[str, Job], None]
  ended: Callable[[], list[tuple[Job, Ended]]]
  close: Callable[[], None]


def attend(
  command: Sequence[str], log: str, stop: str, limits: Limits, **options: Any
) -> Ended:
  """Runs a process to its end, or to its limits, with options of `Popen`.

  Args:
    log: file that its output is added to.
    stop: a file; once it is there, the process is asked to save and leave.
  """
  begin, deadline, why, is_final = time.monotonic(), None, '', False
  with writing.open_append(log) as output:
    child = children.start(
      command, stdout=output, stderr=subprocess.STDOUT, **options
    )
  looks = 0
  try:
    while child.poll() is None:
      now, looks = time.monotonic(), looks + 1
      if deadline is not None and now > deadline:
        children.send(child, signal.SIGKILL)
      if not why and writing.is_there(stop):
        why = 'stopped'
      elif not why and limits.minutes and now - begin > 60 * limits.minutes:
        why, is_final = f'row_minutes={limits.minutes:g}: took longer', True
      if why and deadline is None:
        children.send(child, signal.SIGTERM)
        deadline = now + _PATIENCE
      # Reading /proc takes time.
      if limits.gigabytes and looks % 5 == 0:
        used = children.memory(child.pid) / 1e9
        if used > limits.gigabytes:
          why, is_final = f'row_gb={limits.gigabytes:g}: took {used:.3g}', True
          # Saving would need more.
          children.send(child, signal.SIGKILL)
      time.sleep(0.1)
  finally:
    if child.poll() is None:
      children.kill(child)
  seconds = time.monotonic() - begin
  return Ended(child.returncode, seconds, why, is_final)


def local(at_once: int, limits: Limits) -> Pool:
  """This machine, with room for `at_once` rows."""
  results: queue.SimpleQueue = queue.SimpleQueue()
  running: dict[Row, Job] = {}

  def attend_to(job: Job) -> None:
    command = rows.train_command(job.arguments)
    try:
      ended = attend(command, str(job.log), str(job.stop), limits)
    except Exception as error:  # a disk that is full
      ended = Ended(None, 0.0, str(error))
    results.put((job, ended))

  def start(name: str, job: Job) -> None:
    running[job.row] = job
    threading.Thread(target=attend_to, args=(job,), daemon=True).start()

  def ended() -> list[tuple[Job, Ended]]:
    found = []
    while not results.empty():
      found.append(results.get())
      del running[found[-1][0].row]
    return found

  def close() -> None:
    for job in running.values():
      writing.write_text(job.stop, '')
    while running:
      ended()
      time.sleep(0.05)

  name = socket.gethostname()
  room = lambda avoid: name if len(running) < at_once else None
  return Pool(room, start, ended, close)


class Tried(NamedTuple):
  """A row that waits or runs, and its earlier attempts."""

  job: Job
  attempts: int = 0
  avoid: frozenset[str] = frozenset()
  where: str = ''


def run(
  todo: Sequence[Job],
  pool: Pool,
  *,
  retries: int,
  stopping: Callable[[], bool],
  report: Callable[[int], None],
  halving: sweep_halving.Halving | None = None,
) -> dict[Row, str]:
  """Runs rows that have not ended; returns why rows failed.

  A process that dies is resumed from its last checkpoint by a new one,
  `retries` times, on another machine if there is one; a mistake (exit code 2)
  is not tried again. `stopping` is polled: True asks the processes to save, and
  leaves. `report` is called with the number of rows that have ended.
  """
  waiting = collections.deque(Tried(j) for j in todo if not rows.has_ended(j))
  running: dict[Row, Tried] = {}
  failed: dict[Row, str] = {}
  halved: dict[Row, str] = {}
  ended, asked = len(todo) - len(waiting), False
  decided: set[tuple[Row, int]] = set()
  curves = _Curves(todo)
  try:
    while running or (waiting and not stopping()):
      while waiting and not stopping():
        where = pool.choose(waiting[0].avoid)
        if where is None:
          break
        tried = waiting.popleft()._replace(where=where)
        running[tried.job.row] = tried
        _start(pool, tried)
      if stopping() and not asked:
        asked = True
        for tried in running.values():
          writing.write_text(tried.job.stop, '')
      if halving is not None and not asked:
        curves.look()
        for job in (tried.job for tried in running.values()):
          if job.row in halved or not curves.has_news(job.row):
            continue
          why = sweep_halving.is_poor(
            halving, job.row, curves.known, job.updates, decided
          )
          if why:
            halved[job.row] = why
            writing.write_text(job.stop, '')
      for job, how in pool.ended():
        tried = running.pop(job.row)
        again = tried.attempts < retries and not asked
        state, reason = judge(how, again, halved.get(job.row, ''))
        rows.end_try(job, how.seconds, state, reason)
        job.stop.unlink(missing_ok=True)
        if state == 'again':
          terminal.say(
            f'{job.folder.name}: {reason} on {tried.where}; tried again, '
            f'{retries - tried.attempts - 1} more times after that'
          )
          avoid = tried.avoid | {tried.where}
          waiting.append(Tried(job, tried.attempts + 1, avoid))
          continue
        if state == 'failed':
          failed[job.row] = f'{reason}, {rows.last_words(job)}'
        if state != 'stopped':
          ended += 1
          report(ended)
      time.sleep(0.1)
  finally:
    pool.close()
  return failed


def judge(how: Ended, again: bool, poor: str) -> tuple[str, str]:
  """What becomes of a row whose process has ended: `Try.state`, and why.

  Args:
    again: whether it may be tried again.
    poor: why it was halved; '' if it was not.
  """
  # A row that was stopped has another code.
  if how.code == 0:
    return 'done', ''
  reason = how.why
  if not reason:
    assert how.code is not None
    reason = signals.explain(how.code)
  if how.why == 'stopped':
    return ('halved', poor) if poor else ('stopped', reason)
  if how.is_final or how.code == 2 or not again:
    return 'failed', reason
  return 'again', reason


def _start(pool: Pool, tried: Tried) -> None:
  job = tried.job
  job.folder.parent.mkdir(parents=True, exist_ok=True)
  job.stop.unlink(missing_ok=True)
  rows.begin_try(job, tried.where)
  pool.start(tried.where, job)


class _Curves:
  """The metrics of all rows, also of earlier processes."""

  def __init__(self, todo: Sequence[Job]):
    self._paths = {job.row: job.folder / 'metrics.csv' for job in todo}
    self._read: dict[Row, tuple[int, int]] = {}
    self._news: set[Row] = set()
    self.known: dict[Row, sweep_halving.Curve] = {}

  def look(self) -> None:
    """Reads what has changed."""
    for row, path in self._paths.items():
      try:
        found = path.stat()
      except OSError:
        continue
      stamp = found.st_mtime_ns, found.st_size
      if self._read.get(row) != stamp:
        self._read[row] = stamp
        self.known[row] = tables.read_numbers(path)
        self._news.add(row)

  def has_news(self, row: Row) -> bool:
    """Whether a row's metrics have changed since the last call."""
    is_new = row in self._news and bool(self.known[row])
    self._news.discard(row)
    return is_new
