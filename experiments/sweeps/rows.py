"""Rows of a sweep that are processes: their folders, tries and results.

`rows/sNNN_seedN` is a folder of `experiments.train`, finished if it has a
`timing.csv`. `sNNN_seedN.log` has its processes' output, and
`sNNN_seedN.tries.csv` a line for each of them.
"""

import datetime
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.files import reading, tables, writing
from experiments.sweeps import results as sweep_results
from experiments.sweeps.plan import Plan, Row
from experiments.sweeps.results import Result


class Job(NamedTuple):
  """A row as a process, with its absolute folder and its flags.

  `updates` are planned; a row that acts ends by its decisions.
  """

  row: Row
  folder: pathlib.Path
  arguments: tuple[str, ...]
  updates: int

  @property
  def log(self) -> pathlib.Path:
    """The output of its processes."""
    return self.folder.parent / f'{self.folder.name}.log'

  @property
  def stop(self) -> pathlib.Path:
    """Asks its process to save and leave, on whichever machine it runs."""
    return self.folder.parent / f'{self.folder.name}.stop'

  @property
  def tries(self) -> pathlib.Path:
    """A line for each of its processes."""
    return self.folder.parent / f'{self.folder.name}.tries.csv'


class Try(NamedTuple):
  """One process of a row.

  Attributes:
    number: from 1.
    where: the machine.
    began: UTC, ISO 8601.
    seconds: that the process took; '' while it runs.
    state: `running`; `done`; `again`, it died and is tried again; `failed`;
      `stopped`, with the sweep; `halved`, it was among the poor ones.
    reason: why it is not `done`.
  """

  number: str
  where: str
  began: str
  seconds: str
  state: str
  reason: str


def folder_of(workdir: pathlib.Path, row: Row) -> pathlib.Path:
  """A row's folder, absolute."""
  return (workdir / 'rows' / f's{row.setting:03}_seed{row.seed}').resolve()


def jobs(plan: Plan, rows: Sequence[Row], workdir: pathlib.Path) -> list[Job]:
  """Rows as commands."""
  made = []
  for row in rows:
    folder = folder_of(workdir, row)
    own = _closing(plan, row)
    arguments = (*own.arguments(row), '--measure', f'--workdir={folder}')
    made.append(Job(row, folder, arguments, own.describe(row).updates))
  return made


def _closing(plan: Plan, row: Row) -> Plan:
  """The plan whose rows end with 0 simulations and with the agent's own."""
  search = getattr(plan.describe(row).config, 'search', None)
  budget = search.num_simulations if search is not None else 0
  last = (f'final_simulations={budget or ""}', 'early_update=0')
  return plan._replace(fixed=(*plan.fixed, *last))


def train_command(arguments: Sequence[str]) -> list[str]:
  """What trains a row on this machine."""
  return [sys.executable, '-m', 'experiments.train', *arguments]


def read_tries(job: Job) -> list[Try]:
  """All processes that a row has had."""
  found = tables.read_rows(job.tries)
  return [Try(*(row.get(name) or '' for name in Try._fields)) for row in found]


def begin_try(job: Job, where: str) -> None:
  """Notes that a process of a row begins."""
  tries = read_tries(job)
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  tries.append(Try(str(len(tries) + 1), where, now, '', 'running', ''))
  tables.write_records(job.tries, tries)


def end_try(job: Job, seconds: float, state: str, reason: str) -> None:
  """Notes how the last process of a row ended."""
  *before, last = read_tries(job)
  last = last._replace(
    seconds=f'{seconds:.1f}', state=state, reason=' '.join(reason.split())
  )
  tables.write_records(job.tries, [*before, last])
  if state == 'done':
    # All its processes, and not the wait for one.
    total = sum(float(t.seconds or 0) for t in (*before, last))
    text = f'wall_seconds\n{total:.1f}\n'
    writing.write_text(job.folder / 'timing.csv', text)


def has_ended(job: Job) -> bool:
  """Whether the row of a job has finished or was halved."""
  return (job.folder / 'timing.csv').exists() or is_halved(job)


def is_halved(job: Job) -> bool:
  """Whether the row of a job was ended for being among the poor ones."""
  tries = read_tries(job)
  return bool(tries) and tries[-1].state == 'halved'


def updates_done(job: Job) -> int:
  """The update of a row's last line of metrics."""
  curve = tables.read_numbers(job.folder / 'metrics.csv')
  return int(curve[-1]['step']) if curve else 0


def last_words(job: Job) -> str:
  """The last line of a row's log, and its path."""
  text = ''
  if job.log.exists():
    with reading.open_file(job.log) as file:
      file.seek(max(job.log.stat().st_size - 4096, 0))
      text = file.read().decode(errors='replace').strip()
  return f'{text.rpartition(chr(10))[2]} (see {job.log})'


def read(todo: Sequence[Job], failed: Mapping[Row, str]) -> dict[Row, Result]:
  """Results of rows that have finished, were halved or failed."""
  results = {}
  for job in todo:
    if is_halved(job):
      curve = tables.read_numbers(job.folder / 'metrics.csv')
      results[job.row] = sweep_results.from_curve(curve, 'halved')
    elif has_ended(job):
      results[job.row] = _read_one(job)
    elif job.row in failed:
      results[job.row] = Result('failed', [], {})
  return results


def _read_one(job: Job) -> Result:
  curve = tables.read_numbers(job.folder / 'metrics.csv')
  if curve and not math.isfinite(curve[-1].get('loss', 0.0)):
    return sweep_results.from_curve(curve, 'nan')
  # What one program measures at its end, in the same episodes.
  measured = tables.read_numbers(job.folder / 'measured.csv')
  final = dict(measured[-1]) if measured else {}
  final.pop('step', None)
  # The launcher's own play at the end: another number of other episodes.
  for row in tables.read_rows(job.folder / 'evaluation.csv'):
    if row.get('checkpoint') == 'final' and row.get('return_mean'):
      final['final_return'] = float(row['return_mean'])
  return sweep_results.from_curve(curve, 'done', final)
