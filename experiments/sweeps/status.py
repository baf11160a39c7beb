"""What a sweep is doing, read from its folder: `sweep --status`."""

import dataclasses
import json
import os
import pathlib
import time
from collections import Counter
from typing import NamedTuple

from experiments.files import reading, writing
from experiments.files.errors import Missing, UserError, shown
from experiments.report import terminal
from experiments.sweeps import engines, results
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import rows as sweep_rows
from experiments.sweeps.plan import Plan, Row


@dataclasses.dataclass(frozen=True)
class _Saved:
  """A sweep's `config.json`: the fields of `Plan`, and the kind of engine."""

  preset: str
  fields: tuple[str, ...]
  settings: tuple[tuple[str, ...], ...]
  engine: str
  agent: str | None = None
  env: str | None = None
  steps: int | None = None
  fixed: tuple[str, ...] = ()
  logarithmic: tuple[str, ...] = ()
  dataset: str | None = None


@dataclasses.dataclass(frozen=True)
class _Asked:
  """A sweep's `rows.json`.

  Attributes:
    seeds: that it was last asked for.
    updates: of a row, for each setting; agents need not be imported for it.
  """

  seeds: int
  updates: tuple[int, ...]


class Line(NamedTuple):
  """One row of a sweep.

  Attributes:
    name: the setting and the seed in words.
    state: of its last try, or `waiting`.
    number: of the try, '' before the first.
    updates: done and all, `40/120`.
    heard: how long ago its process last wrote something.
    log: its file, in the sweep's folder.
    reason: why it is not done.
  """

  name: str
  state: str
  where: str
  number: str
  updates: str
  heard: str
  log: str
  reason: str


def note_rows(workdir: pathlib.Path, plan: Plan, seeds: int) -> None:
  """Writes how many rows a sweep was asked for, and how long they are."""
  updates = [
    plan.describe(Row(i, 0)).updates for i in range(len(plan.settings))
  ]
  text = json.dumps({'seeds': seeds, 'updates': updates}) + '\n'
  writing.write_text(workdir / 'rows.json', text)


def _read_plan(workdir: pathlib.Path) -> tuple[Plan, str, _Asked]:
  try:
    saved = reading.read_json(workdir / 'config.json', _Saved)
    asked = reading.read_json(workdir / 'rows.json', _Asked)
  except Missing as error:
    raise UserError(
      f"workdir={shown(workdir)}: is not a sweep's folder ({error}); name the "
      '--workdir of python -m experiments.sweep'
    ) from error
  plan = Plan(*(getattr(saved, name) for name in Plan._fields))
  if len(asked.updates) != len(plan.settings):
    raise UserError(
      f'{shown(workdir / "rows.json")}: has {len(asked.updates)} settings, '
      f'config.json {len(plan.settings)}; restore both files from a copy'
    )
  return plan, saved.engine, asked


def read(workdir: pathlib.Path) -> list[Line]:
  """A line for each row.

  Raises:
    UserError: not a sweep's folder, or a file in it cannot be read.
  """
  plan, engine, asked = _read_plan(workdir)
  rows = sweep_plan.rows(plan, asked.seeds)
  if engine == 'vmap':
    return _of_programs(plan, rows, workdir, asked)
  return [
    _of_job(
      plan,
      sweep_rows.Job(
        row, sweep_rows.folder_of(workdir, row), (), asked.updates[row.setting]
      ),
    )
    for row in rows
  ]


def _of_job(plan: Plan, job: sweep_rows.Job) -> Line:
  tries = sweep_rows.read_tries(job)
  last = tries[-1] if tries else None
  state = last.state if last else 'waiting'
  if state == 'again':
    state = 'waiting'
  if (job.folder / 'timing.csv').exists():
    state = 'done'
  return Line(
    _name(plan, job.row),
    state,
    last.where if last else '',
    last.number if last else '',
    f'{sweep_rows.updates_done(job):,}/{job.updates:,}',
    _age(job.log) if state == 'running' else '',
    os.path.relpath(job.log, job.log.parents[1]) if last else '',
    last.reason if last else '',
  )


def _of_programs(
  plan: Plan, rows: list[Row], workdir: pathlib.Path, asked: _Asked
) -> list[Line]:
  found = {}
  for path in sorted((workdir / 'programs').glob('*/program.json')):
    saved = reading.read_json(path, engines.Saved)
    done = (path.parent / 'curves.csv').exists()
    steps = [
      int(p.name)
      for p in (path.parent / 'checkpoints').glob('*')
      if p.name.isascii() and p.name.isdecimal()
    ]
    for row in set(saved.rows) & set(rows):
      updates = asked.updates[row.setting]
      at = updates if done else max(steps, default=0)
      found[row] = Line(
        _name(plan, row),
        'done' if done else 'begun',
        path.parent.name,
        '',
        f'{at:,}/{updates:,}',
        '',
        '',
        '',
      )
  blank = ('waiting', '', '', '', '', '', '')
  return [found.get(row) or Line(_name(plan, row), *blank) for row in rows]


def show(workdir: pathlib.Path) -> None:
  """Prints which row is where, and what is left."""
  lines = read(workdir)
  terminal.print_table(
    ('row', 'state', 'where', 'try', 'updates', 'last word', 'log', 'why'),
    [tuple(map(shown, line)) for line in lines],
    f'{shown(workdir)}',
    left=3,
  )
  counts = Counter(line.state for line in lines)
  said = ', '.join(f'{n} {state}' for state, n in counts.most_common())
  left = sum(line.state not in ('done', 'halved') for line in lines)
  print(f'{len(lines)} rows: {said}; {left} left')


def _name(plan: Plan, row: Row) -> str:
  return f'{results.label(plan, row.setting)} seed={row.seed}'


def _age(log: pathlib.Path) -> str:
  try:
    seconds = max(time.time() - log.stat().st_mtime, 0)
  except OSError:
    return ''
  if seconds < 120:
    return f'{seconds:.0f} s ago'
  return f'{seconds / 60:.0f} min ago'
