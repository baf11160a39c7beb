"""What studies share: cells that are run once, and noted at once.

A cell is a command with a folder and a log of its own, or a row of a CSV that
grows row by row. A signal stops the study, and the same command resumes it.
`main` runs the tables of `studies.table`:

  python -m experiments.study catch

Every run is `python -m experiments.train` in a folder of its own. After each
run the study's CSVs are written again.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables, writing
from experiments.files.errors import shown
from experiments.report import curves as curve_figures
from experiments.report import terminal
from experiments.runtime import children, signals
from experiments.runtime import config as configs
from experiments.studies import table

Stopping = Callable[[], bool]


class Ended(NamedTuple):
  """How a command ended.

  Attributes:
    code: its `Popen.returncode`.
    cpu_seconds: of it and what it started; None if it never began.
  """

  code: int
  wall_seconds: float
  cpu_seconds: float | None


def run_command(
  module: str,
  arguments: Sequence[str],
  workdir: pathlib.Path,
  stopping: Stopping,
  **options: Any,
) -> Ended:
  """Runs `experiments.MODULE` and appends its output to `WORKDIR.log`.

  Args:
    arguments: its flags, but for `--workdir`.
    stopping: polled; True asks the command to save and to leave.
    **options: of `subprocess.Popen`.
  """
  workdir.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, '-m', f'experiments.{module}', *arguments]
  start = time.perf_counter()
  with writing.open_append(log_of(workdir)) as output:
    code, usage = children.run(
      [*command, f'--workdir={workdir}'],
      stopping,
      stdout=output,
      stderr=subprocess.STDOUT,
      **options,
    )
  cpu = None if usage is None else usage.ru_utime + usage.ru_stime
  return Ended(code, time.perf_counter() - start, cpu)


def log_of(workdir: pathlib.Path) -> pathlib.Path:
  """The log of a command by its folder."""
  return workdir.parent / f'{workdir.name}.log'


def run_all(
  what: str,
  cells: Sequence[Callable[[Stopping], bool]],
  at_once: int,
  after: Callable[[], None],
) -> int | None:
  """Runs cells, several at a time; a signal stops them with their state saved.

  Args:
    what: the cells are, in the plural.
    cells: each takes `stopping` and returns whether it has finished.

  Returns:
    How many did not finish; None if a signal has stopped the study.
  """
  failed = 0
  with (
    signals.graceful_exit() as stopping,
    concurrent.futures.ThreadPoolExecutor(at_once) as pool,
  ):
    futures = [pool.submit(cell, stopping) for cell in cells]
    for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
      failed += not future.result()
      after()
      if not stopping():
        print(f'{done} of {len(cells)} {what}', flush=True)
    if stopping():
      print(f'{failed} {what} are left; the same command resumes from here')
      return None
  return failed


def missing(
  rows: Iterable[Any], fields: Sequence[str], cells: Iterable[Hashable]
) -> list[Any]:
  """The cells, tuples of these fields, that no NamedTuple in `rows` has."""
  done = {tuple(getattr(row, name) for name in fields) for row in rows}
  return [cell for cell in cells if cell not in done]


def fill(
  path: pathlib.Path,
  rows: list[Any],
  cells: Sequence[Any],
  measure: Callable[..., Any],
  digits: int,
) -> None:
  """Measures cells from `missing`, adding rows and writing the CSV after each.

  `measure` makes the row of a cell's parts; floats have `digits` significant
  digits.
  """
  for number, cell in enumerate(cells, start=1):
    words = ', '.join(str(part) for part in cell)
    terminal.say(f'{number} of {len(cells)}: {words}')
    rows.append(measure(*cell))
    tables.write_records(path, rows, digits)


def finished(
  folder: str | os.PathLike, pattern: str
) -> dict[tuple[int, ...], str]:
  """Folders of finished runs, sorted by the numbers in their names.

  `pattern` matches a whole name; its groups are integers.
  """
  folder = pathlib.Path(folder)
  matching = (re.fullmatch(pattern, path.name) for path in folder.glob('*/'))
  found = {
    tuple(map(int, match.groups())): str(folder / match[0])
    for match in matching
    # Written last: parameters are there before the end.
    if match and (folder / match[0] / 'evaluation.csv').exists()
  }
  return dict(sorted(found.items()))


# Studies that are a table of training runs.


def workdir_of(run: table.Run, folder: pathlib.Path) -> pathlib.Path:
  """The folder of a run, inside the study's folder of runs."""
  return folder / f'{run.variant}_s{run.seed}'


def run_one(
  study: table.Study,
  run: table.Run,
  folder: pathlib.Path,
  stopping: Stopping = lambda: False,
) -> bool:
  """Runs or resumes one run; whether it finished.

  `folder` is that of all runs; `stopping` is polled: True stops the run with a
  checkpoint, or lets none begin.
  """
  workdir = workdir_of(run, folder)
  timing = workdir / 'timing.csv'
  if timing.exists():
    return True
  if stopping():
    return False
  environment = dict(os.environ)
  with tempfile.TemporaryDirectory() as empty:
    if study.cold:
      environment['JAX_COMPILATION_CACHE_DIR'] = empty
    arguments = [*run.arguments, f'--seed={run.seed}']
    ended = run_command('train', arguments, workdir, stopping, env=environment)
  if ended.code:
    if not stopping():
      why = signals.explain(ended.code)
      log = log_of(workdir)
      # A refusal is one line, the last one.
      lines = log.read_text(errors='replace').splitlines() or ['']
      said = f': {shown(lines[-1])}' if ended.code == 2 else ''
      terminal.say(f'{workdir} failed: {why}, see {log}{said}', file=sys.stderr)
    return False
  seconds = f'{ended.wall_seconds:.1f},{ended.cpu_seconds or 0.0:.1f}'
  writing.write_text(timing, f'wall_seconds,cpu_seconds\n{seconds}\n')
  return True


def collect(
  name: str, study: table.Study, folder: pathlib.Path, results: pathlib.Path
) -> None:
  """Writes `NAME_{evaluation,curves,timing,held_out}.csv`."""
  kinds = ('evaluation', 'timing', 'held_out')
  found = {kind: [] for kind in (*kinds, 'curves')}
  for run in study.runs:
    workdir = workdir_of(run, folder)
    if not (workdir / 'timing.csv').exists():
      continue
    tag = {'variant': run.variant, 'seed': run.seed}
    for kind in kinds:
      rows = tables.read_rows(workdir / f'{kind}.csv')
      found[kind] += [tag | row for row in rows]
    for row in tables.read_rows(workdir / 'metrics.csv'):
      kept = {n: row[n] for n in study.curves if row.get(n)}
      if len(kept) > 1:
        found['curves'].append(tag | {'step': row['step']} | kept)
  for kind, rows in found.items():
    if rows:
      tables.write_rows(results / f'{name}_{kind}.csv', rows)


def _lines(curves: pathlib.Path, column: str) -> dict:
  """`{variant: Curve}` of a column of a curves' CSV."""
  runs: dict[str, dict[str, list]] = {}
  for row in tables.read_rows(curves):
    if row.get(column):
      seeds = runs.setdefault(row['variant'], {})
      point = float(row.get('decisions') or row['step']), float(row[column])
      seeds.setdefault(row['seed'], []).append(point)
  lines = {
    variant: curve_figures.mean_curve(
      [tuple(np.transpose(points)) for points in seeds.values()]
    )
    for variant, seeds in runs.items()
  }
  return {name: line for name, line in lines.items() if line is not None}


def draw(
  curves: pathlib.Path, out: pathlib.Path, columns: Sequence[str]
) -> None:
  """Draws a panel for each of `columns`, with a line for each variant."""
  panels = {column: _lines(curves, column) for column in columns}
  acts = any(row.get('decisions') for row in tables.read_rows(curves))
  curve_figures.curves_figure(panels, out, x='decisions' if acts else 'step')


def draw_with_muzero(curves: pathlib.Path, out: pathlib.Path) -> None:
  """Draws SAC and Sampled MuZero, with search and without, a panel per task.

  Sampled MuZero's curves are in `TASK_curves.csv` in the same folder.
  """
  panels = {}
  for task, line in _lines(curves, 'eval_return').items():
    path = curves.with_name(f'{task}_curves.csv')
    others = {
      f'Sampled MuZero, {words}, {variant}': curve
      for column, words in (
        ('eval_return', 'with search'),
        ('network_return', 'network alone'),
      )
      for variant, curve in _lines(path, column).items()
      if variant == 'gaussian_k20'
    }
    panels[f'return, {task}'] = {'SAC': line, **others}
  curve_figures.curves_figure(panels, out, x='decisions')


def main(name: str) -> None:
  """Runs a study of the table as the flags say.

  Raises:
    SystemExit: with 1, if runs failed.
  """
  from absl import flags

  values = flags.FLAGS
  make, seeds = table.STUDIES[name]
  study = make(values.seeds or seeds)
  folder = pathlib.Path(values.folder) / name
  results = pathlib.Path(values.results)
  for field in ('folder', 'results'):
    configs.check_place(field, getattr(values, field), folder=True)
  terminal.begin(
    f'{len(study.runs)} runs, {values.at_once} at a time, each by '
    'python -m experiments.train',
    f'folders and logs: {folder}',
    compiles=False,
  )

  def train(run: table.Run) -> Callable[[Stopping], bool]:
    return lambda stopping: run_one(study, run, folder, stopping)

  failed = run_all(
    'runs',
    [train(run) for run in study.runs],
    values.at_once,
    lambda: collect(name, study, folder, results),
  )
  if failed is None:
    return
  if failed == len(study.runs):  # Nothing was measured.
    raise SystemExit(1)
  others = ('held_perplexity', 'cv_load')
  drawn = [n for n in study.curves if n.endswith('_return') or n in others]
  curves = results / f'{name}_curves.csv'
  if curves.exists() and drawn:
    out = curves.with_suffix('.png')
    if study.with_muzero:
      draw_with_muzero(curves, out)
    else:
      draw(curves, out, drawn)
    terminal.say(f'figure: {out}')
  terminal.end(
    f'{results}/{name}_*.csv',
    f"python -m experiments.plots --workdirs='{folder}/*' --out=curves.png",
  )
  if failed:
    raise SystemExit(1)


def define_flags() -> None:
  """Flags of `python -m experiments.study NAME` for studies of the table."""
  from absl import flags

  flags.DEFINE_integer(
    'seeds', 0, "number of seeds; 0 for the study's own", 0, 10_000
  )
  flags.DEFINE_integer('at_once', 1, 'runs at the same time', 1, 1_024)
  flags.DEFINE_string(
    'folder', 'runs/studies', 'the folder that the runs are kept in'
  )
  define_results()


def define_results() -> None:
  """The flag of the folder for a study's CSVs and figures."""
  from absl import flags

  flags.DEFINE_string(
    'results', 'experiments/results', 'the folder for CSVs and figures'
  )
