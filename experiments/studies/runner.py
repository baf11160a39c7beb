"""Runs a table of runs, one by one or several at once, and keeps the figures.

  python -m experiments.study catch

Every run is `python -m experiments.train` in a folder of its own; a run that
has finished is not run again, one that was cut goes on. After each run the
study's CSVs are written anew under experiments/results/.
"""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from experiments.files import tables, writing
from experiments.report import terminal
from experiments.runtime import children, signals
from experiments.runtime import config as configs
from experiments.studies import table


def run_one(
  study: table.Study,
  run: table.Run,
  folder: pathlib.Path,
  stopping: Callable[[], bool] = lambda: False,
) -> bool:
  """Runs or resumes one run; whether it finished.

  Args:
    study: whose run it is.
    run: which.
    folder: of all runs.
    stopping: polled; True stops it with a checkpoint, or lets none begin.
  """
  workdir = folder / f'{run.variant}_s{run.seed}'
  timing = workdir / 'timing.csv'
  if timing.exists():
    return True
  if stopping():
    return False
  environment = dict(os.environ)
  command = [sys.executable, '-m', 'experiments.train']
  command += [*run.arguments, f'--seed={run.seed}', f'--workdir={workdir}']
  workdir.parent.mkdir(parents=True, exist_ok=True)
  log = workdir.parent / f'{workdir.name}.log'
  with (
    tempfile.TemporaryDirectory() as empty,
    writing.open_append(log) as output,
  ):
    if study.cold:
      environment['JAX_COMPILATION_CACHE_DIR'] = empty
    start = time.perf_counter()
    code, usage = children.run(
      command,
      stopping,
      env=environment,
      stdout=output,
      stderr=subprocess.STDOUT,
    )
  if code:
    if not stopping():
      what = signals.explain(code)
      terminal.say(f'{workdir} failed: {what}, see {log}', file=sys.stderr)
    return False
  seconds = time.perf_counter() - start
  cpu = usage.ru_utime + usage.ru_stime
  writing.write_text(
    timing, f'wall_seconds,cpu_seconds\n{seconds:.1f},{cpu:.1f}\n'
  )
  return True


def collect(
  name: str, study: table.Study, folder: pathlib.Path, results: pathlib.Path
) -> None:
  """Writes `NAME_{evaluation,curves,timing,held_out}.csv`."""
  evaluations, curves, timings, held = [], [], [], []
  for run in study.runs:
    workdir = folder / f'{run.variant}_s{run.seed}'
    if not (workdir / 'timing.csv').exists():
      continue
    tag = {'variant': run.variant, 'seed': run.seed}
    evaluations += [
      tag | row for row in tables.read_rows(workdir / 'evaluation.csv')
    ]
    timings += [tag | row for row in tables.read_rows(workdir / 'timing.csv')]
    held += [tag | row for row in tables.read_rows(workdir / 'held_out.csv')]
    for row in tables.read_rows(workdir / 'metrics.csv'):
      kept = {n: row[n] for n in study.curves if row.get(n)}
      if len(kept) > 1:
        curves.append(tag | {'step': row['step']} | kept)
  found = {
    'evaluation': evaluations,
    'curves': curves,
    'timing': timings,
    'held_out': held,
  }
  for kind, rows in found.items():
    if rows:
      tables.write_rows(results / f'{name}_{kind}.csv', rows)


def _lines(curves: pathlib.Path, column: str) -> dict:
  """`{variant: Curve}` of a column of a curves' CSV."""
  import numpy as np

  from experiments.report import curves as curve_figures

  runs: dict[str, dict[str, list]] = {}
  for row in tables.read_rows(curves):
    if row.get(column):
      seeds = runs.setdefault(row['variant'], {})
      x = row.get('decisions') or row['step']
      point = float(x), float(row[column])
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
  """A panel for each of `columns` of a curves' CSV, a line for each variant."""
  from experiments.report import curves as curve_figures

  panels = {column: _lines(curves, column) for column in columns}
  acts = any(row.get('decisions') for row in tables.read_rows(curves))
  curve_figures.curves_figure(panels, out, x='decisions' if acts else 'step')


def draw_beside(curves: pathlib.Path, out: pathlib.Path) -> None:
  """A panel for each task: SAC, and Sampled MuZero with search and without."""
  from experiments.report import curves as curve_figures

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

  Args:
    name: of the study.

  Raises:
    SystemExit: with 1, where runs failed.
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
  failed = 0
  with (
    signals.graceful_exit() as stopping,
    concurrent.futures.ThreadPoolExecutor(values.at_once) as pool,
  ):
    futures = [
      pool.submit(run_one, study, run, folder, stopping) for run in study.runs
    ]
    for done, future in enumerate(
      concurrent.futures.as_completed(futures), start=1
    ):
      failed += not future.result()
      collect(name, study, folder, results)
      if not stopping():
        print(f'{done} of {len(study.runs)} runs', flush=True)
    if stopping():
      print(f'{failed} runs are left; the same command goes on from here')
      return
  shown = ('held_perplexity', 'cv_load')
  returns = [n for n in study.curves if n.endswith('_return') or n in shown]
  curves = results / f'{name}_curves.csv'
  if curves.exists() and returns:
    out = results / f'{name}_curves.png'
    draw_beside(curves, out) if study.beside else draw(curves, out, returns)
    terminal.say(f'figure: {out}')
  terminal.end(
    f'{results}/{name}_*.csv',
    f"python -m experiments.plots --workdirs='{folder}/*' --out=curves.png",
  )
  if failed:
    raise SystemExit(1)


def define_flags() -> None:
  """The flags of `python -m experiments.study NAME`, of a name in the table."""
  from absl import flags

  flags.DEFINE_integer('seeds', 0, "how many; 0 for the study's own", 0, 10_000)
  flags.DEFINE_integer('at_once', 1, 'runs at the same time', 1, 1_024)
  flags.DEFINE_string('folder', 'runs/studies', 'where the runs are kept')
  flags.DEFINE_string('results', 'experiments/results', 'where the CSVs go')
