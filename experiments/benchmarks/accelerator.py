"""A first look at an accelerator, in minutes.

    python -m experiments.benchmark --suite=accelerator --out=card.csv

The most important figures come first: searches, EfficientZero's learner, many
seeds in one program, mixtures, acting. Groups of rows are measured in a process
of their own (`benchmarks.accelerator_groups`). One that takes longer than its
limit is killed, one that dies or runs out of memory is left out, and a new
process goes on with the next; each group is in the CSV as soon as it is
measured. The same command goes on where it was: groups that are in the CSV with
the same device and versions are not measured again.
"""

import contextlib
import json
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks import timing
from experiments.benchmarks.timing import Measurement
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import children
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks

COMMAND = (sys.executable, '-m', 'experiments.benchmarks.accelerator_groups')
COLUMNS = ('group', *Measurement._fields, 'machine', 'versions')
# The unit of a row that says why a group was not measured.
MISSING = 'not measured'
# Until a process knows its device, which takes seconds on an idle machine.
_START = 300.0


def launch(values: Any) -> None:
  """Measures as the flags of `experiments.benchmark` say.

  Raises:
    UserError: a flag is wrong, or no process could begin.
  """
  if len(values.suite) > 1:
    raise UserError(
      'suite=accelerator: writes a CSV with other columns; run it without '
      'other suites'
    )
  flag_checks.refuse(
    ['target', 'rows', 'programs', 'compilers', 'seeds', 'preset', 'set'],
    'on this suite',
  )
  configs.check_place('out', values.out)
  terminal.begin(
    'a first look at this accelerator, the most important figures first',
    compiles=False,
  )
  run(pathlib.Path(values.out), values.quick, values.repeats)
  terminal.end(values.out)


class _Child:
  """A process that measures, and says what it has found."""

  def __init__(self, asked: dict[str, Any]):
    # Open until `close`.
    self._stderr = tempfile.TemporaryFile('w+')  # noqa: SIM115
    self._process = children.start(
      [*COMMAND, json.dumps(asked)],
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      text=True,
    )
    self._messages: queue.Queue = queue.Queue()
    self._reader = threading.Thread(target=self._read)
    self._reader.start()

  def _read(self):
    assert self._process.stdout is not None
    for text in self._process.stdout:
      if text.startswith('{'):
        with contextlib.suppress(ValueError):
          self._messages.put(json.loads(text))
    self._messages.put(None)

  def listen(self, until: float) -> dict[str, Any] | None:
    """Waits for a message; None if the process has ended.

    Args:
      until: of `time.monotonic`.

    Raises:
      queue.Empty: there was none until then.
    """
    return self._messages.get(timeout=max(until - time.monotonic(), 0.0))

  def last_words(self) -> str:
    """The last line of what a process that has ended wrote of its errors."""
    self._stderr.seek(0)
    lines = self._stderr.read().strip().splitlines()
    return lines[-1][:200] if lines else 'no message'

  def close(self) -> None:
    """Kills it, if it has not ended."""
    children.kill(self._process)
    self._reader.join()
    assert self._process.stdout is not None
    self._process.stdout.close()
    self._stderr.close()


def run(
  out: pathlib.Path, quick: bool = False, repeats: int = 5
) -> list[dict[str, Any]]:
  """Measures all groups that are not in the CSV, in the time that there is.

  Args:
    out: the CSV, made or added to.
    quick: tiny sizes.
    repeats: of each measurement, at most.

  Returns:
    The CSV's rows.

  Raises:
    UserError: the CSV has other columns, or no process could begin.
  """
  rows: list[dict[str, Any]] = [
    row for row in tables.read_rows(out, COLUMNS) if row['unit'] != MISSING
  ]
  left_out: list[str] = []
  asked = {'quick': quick, 'repeats': repeats, 'left_out': left_out}
  begun = time.monotonic()
  while True:
    done = {(row['group'], row['machine'], row['versions']) for row in rows}
    child = _Child(asked | {'done': sorted(done)})
    with contextlib.closing(child):
      group, reason = _follow(child, rows, out, begun)
    if not group:
      return rows
    print(f'{group}: {reason}', flush=True)
    left_out.append(group)


def _follow(child, rows, out, begun) -> tuple[str, str]:
  """Writes what a process finds until it ends or is late.

  Returns the group that it was at and what came of it, or '' if there is no
  more to do.
  """
  about, group, limit = {}, '', _START
  until = ends = time.monotonic() + limit

  def add(measured: Sequence[Measurement]) -> None:
    rows.extend(
      {'group': group} | row._asdict() | {c: about[c] for c in COLUMNS[-2:]}
      for row in measured
    )
    lines = ([_cell(row[c]) for c in COLUMNS] for row in rows)
    tables.write_lines(out, [COLUMNS, *lines], digits=6)

  try:
    while (message := child.listen(until)) is not None:
      now = time.monotonic()
      if 'about' in message:
        about = message['about']
        ends = begun + message['seconds']
        print(', '.join(f'{n}: {x}' for n, x in about.items()), flush=True)
      elif 'begin' in message:
        group, limit = message['begin'], message['limit']
        until = min(now + limit, ends)
        print(
          f'[{message["number"]} of {message["groups"]}, {now - begun:.0f} of '
          f'{ends - begun:.0f} s] {group}: at most {limit:.0f} s',
          flush=True,
        )
      elif 'rows' in message:
        measured = [Measurement(*row) for row in message['rows']]
        add(measured)
        timing.print_rows(measured)
      elif 'failed' in message:
        add([_missing(group, message['failed'])])
        print(f'{group}: {message["failed"]}', flush=True)
      else:
        return '', ''
    reason = f'its process ended: {child.last_words()}'
  except queue.Empty:
    if about and time.monotonic() >= ends:
      print('no time is left; the same command goes on', flush=True)
      return '', ''
    reason = f'took longer than its {limit:.0f} s'
  if not group:
    raise UserError(f'suite=accelerator: {reason}')
  add([_missing(group, reason)])
  return group, reason


def _cell(value: Any) -> Any:
  """Nothing for NaN, as in the other suites' tables."""
  return '' if value != value else value


def _missing(group: str, reason: str) -> Measurement:
  row = timing.failed('accelerator', group, '', MISSING, reason)
  return row._replace(note=reason)
