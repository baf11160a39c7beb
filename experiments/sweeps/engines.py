"""Rows of a sweep that are one program: how they are divided and run.

`programs/NNN` in the sweep's folder holds `program.json` (its rows and what is
traced), checkpoints while it runs, and `curves.csv` when it has finished, after
which it is left alone. `sweep_pool` runs rows that are processes.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.files import reading, tables, writing
from experiments.files.errors import UserError, shown
from experiments.sweeps import kept
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import program as sweep_program
from experiments.sweeps import results as sweep_results
from experiments.sweeps import train as sweep_train
from experiments.sweeps.plan import Plan, Row
from experiments.sweeps.results import Result

Report = Callable[[int, dict[str, float]], None]


class Part(NamedTuple):
  """One program of a sweep.

  Attributes:
    folder: `programs/NNN`.
    traced: paths of the fields that are traced.
  """

  folder: pathlib.Path
  rows: tuple[Row, ...]
  traced: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Saved:
  """A program's `program.json`: `rows` and `traced` as in `Part`."""

  rows: tuple[Row, ...]
  traced: tuple[str, ...]


def parts(
  plan: Plan, rows: Sequence[Row], workdir: pathlib.Path, max_rows: int
) -> list[Part]:
  """Divides rows of a sweep into programs of up to `max_rows`; makes nothing.

  Existing programs stay. Rows whose settings differ in a field that cannot be
  traced go to different programs.
  """
  found = []
  for path in sorted((workdir / 'programs').glob('*/program.json')):
    saved = reading.read_json(path, Saved)
    if set(saved.rows) & set(rows):
      found.append(Part(path.parent, saved.rows, saved.traced))
  taken = {row for part in found for row in part.rows}
  left = [row for row in rows if row not in taken]
  number = len(list((workdir / 'programs').glob('*')))
  for traced, members in _groups(plan, left):
    for start in range(0, len(members), max_rows):
      folder = workdir / 'programs' / f'{number:03}'
      found.append(
        Part(folder, tuple(members[start : start + max_rows]), traced)
      )
      number += 1
  return found


def _groups(plan, rows):
  """`(traced paths, rows)` of what may be one program."""
  settings = {row.setting: plan.describe(Row(row.setting, 0)) for row in rows}
  if not settings:
    return []
  first = next(iter(settings.values()))
  paths = [sweep_plan.find_path(first, name) for name in plan.fields]

  def key_of(experiment, floats):
    fixed = [p for p in paths if p not in floats]
    return tuple(repr(sweep_plan.get(experiment, p)) for p in fixed)

  # Traced are fields that are floats everywhere and that the first of the
  # settings that agree in all else takes as tracers.
  floats = [
    p
    for p in paths
    if all(type(sweep_plan.get(e, p)) is float for e in settings.values())
  ]
  alike = {}
  for number, experiment in settings.items():
    alike.setdefault(key_of(experiment, floats), []).append(number)
  groups = {}
  for numbers in alike.values():
    traced = sweep_program.traceable(settings[numbers[0]], floats)
    for number in numbers:
      key = traced, key_of(settings[number], traced)
      groups.setdefault(key, []).append(number)
  return [
    (traced, [row for row in rows if row.setting in numbers])
    for (traced, _), numbers in groups.items()
  ]


def vmapped(
  plan: Plan,
  todo: Sequence[Part],
  *,
  checkpoint_minutes: float,
  stopping: Callable[[], bool],
  report: Report,
) -> None:
  """Runs programs that have not finished, each over all devices.

  Checkpoints are at least `checkpoint_minutes` apart; `stopping` is polled:
  True saves and leaves; `report` is `(updates done in this call, means over
  rows)`.
  """
  from experiments.runtime import mesh as meshes

  mesh, before = meshes.make_mesh(), 0
  for part in todo:
    if finished(part) or stopping():
      continue
    program = program_of(plan, part)
    part.folder.mkdir(parents=True, exist_ok=True)
    saved = {'rows': part.rows, 'traced': part.traced}
    writing.write_text(part.folder / 'program.json', json.dumps(saved) + '\n')
    points = sweep_train.run(
      program,
      part.folder,
      mesh=mesh,
      checkpoint_seconds=60 * checkpoint_minutes,
      stopping=stopping,
      report=lambda step, row, before=before: report(before + step, row),
    )
    before += program.experiment.updates
    if points is None:
      return
    _write_program(part, points)
    kept.forget(part.folder)


def finished(part: Part) -> bool:
  """Whether the results of a program are written."""
  return (part.folder / 'curves.csv').exists()


def program_of(plan: Plan, part: Part) -> sweep_program.Program:
  """The program of a part."""
  experiments = [plan.describe(row) for row in part.rows]
  return sweep_program.Program(
    experiment=experiments[0],
    paths=part.traced,
    values=[
      [sweep_plan.get(e, path) for path in part.traced] for e in experiments
    ],
    seeds=[row.seed for row in part.rows],
  )


def _write_program(part: Part, points: Sequence[kept.Point]) -> None:
  rows = []
  for i, row in enumerate(part.rows):
    for point in points:
      known = {n: float(x[i]) for n, x in point.metrics.items()}
      known = {n: x for n, x in known.items() if math.isfinite(x)}
      rows.append({**row._asdict(), 'step': point.step, **known})
  tables.write_rows(part.folder / 'curves.csv', rows)


def read_parts(todo: Sequence[Part], rows: Sequence[Row]) -> dict[Row, Result]:
  """Results of finished parts, for the given rows.

  Raises:
    UserError: a curves.csv is damaged.
  """
  results = {}
  for part in filter(finished, todo):
    curves = collections.defaultdict(list)
    path = part.folder / 'curves.csv'
    for line in tables.read_numbers(path):
      if not {'setting', 'seed', 'step', 'finite'} <= line.keys():
        raise UserError(
          f'{shown(path)}: a row lacks a number for setting, seed, step or '
          'finite; restore the file from a copy'
        )
      row = Row(int(line.pop('setting')), int(line.pop('seed')))
      curves[row].append(line)
    for row, curve in curves.items():
      is_fine = all(line.pop('finite') for line in curve)
      status = 'done' if is_fine else 'nan'
      results[row] = sweep_results.from_curve(curve, status)
  return {row: results[row] for row in rows if row in results}
