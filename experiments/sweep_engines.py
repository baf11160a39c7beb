"""Where the rows of a sweep run: in one program, in processes, on Ray.

Every engine keeps what it has finished in the sweep's folder and leaves it
alone afterwards, so that the same command goes on where the last one ended.

- `vmapped`: `programs/NNN` holds `program.json` (its rows and what is traced),
  checkpoints while it runs, `curves.csv` when it has finished.
- `processes` and `on_ray`: `rows/sNNN_seedN` is a folder of
  `experiments.train`; `timing.csv` says that it has finished.
"""

import collections
import importlib
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import sweep_plan, sweep_program, sweep_results
from experiments.files import writing
from experiments.runtime import config as configs
from experiments.sweep_plan import Plan, Row
from experiments.sweep_results import Result

Report = Callable[[int, dict[str, float]], None]


class Part(NamedTuple):
  """One program of a sweep, as its folder says.

  Attributes:
    folder: `programs/NNN`.
    rows: what it trains.
    traced: paths of the fields that are traced.
  """

  folder: pathlib.Path
  rows: tuple[Row, ...]
  traced: tuple[str, ...]


def parts(
  plan: Plan, rows: Sequence[Row], workdir: pathlib.Path, max_rows: int
) -> list[Part]:
  """Divides rows into programs; those that there are already stay.

  Rows whose settings differ in a field that cannot be traced go to different
  programs. Nothing is compiled, and no folder made.

  Args:
    plan: the sweep, on a pure-JAX environment.
    rows: of it.
    workdir: the sweep's folder.
    max_rows: of one program.
  """
  found = []
  for path in sorted((workdir / 'programs').glob('*/program.json')):
    saved = json.loads(path.read_text(encoding='utf-8'))
    members = tuple(Row(*row) for row in saved['rows'])
    if set(members) & set(rows):
      found.append(Part(path.parent, members, tuple(saved['traced'])))
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

  # Traced is what is a float everywhere and is taken as a tracer by the first
  # of those that agree in all else.
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
  """Runs programs one after the other, each over all devices.

  Args:
    plan: the sweep.
    todo: from `parts`; what has finished is left out.
    checkpoint_minutes: between checkpoints, at least.
    stopping: polled; True saves and leaves.
    report: `(updates done in this call, means over rows)`.
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
    points = sweep_program.run(
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
    sweep_program.forget(part.folder)


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


def _write_program(part: Part, points: Sequence[sweep_program.Point]) -> None:
  rows = []
  for i, row in enumerate(part.rows):
    for point in points:
      known = {n: float(x[i]) for n, x in point.metrics.items()}
      known = {n: x for n, x in known.items() if math.isfinite(x)}
      rows.append({**row._asdict(), 'step': point.step, **known})
  sweep_results.write_csv(part.folder / 'curves.csv', rows)


def read_parts(todo: Sequence[Part], rows: Sequence[Row]) -> dict[Row, Result]:
  """Results of what has finished, of the rows that are asked for."""
  results = {}
  for part in filter(finished, todo):
    curves = collections.defaultdict(list)
    for line in sweep_results.read_curve(part.folder / 'curves.csv'):
      row = Row(int(line.pop('setting')), int(line.pop('seed')))
      curves[row].append(line)
    for row, curve in curves.items():
      is_fine = all(line.pop('finite') for line in curve)
      status = 'done' if is_fine else 'nan'
      results[row] = sweep_results.from_curve(curve, status)
  return {row: results[row] for row in rows if row in results}


class Job(NamedTuple):
  """A row as a process.

  Attributes:
    row: which.
    folder: its own, absolute.
    arguments: of `experiments.train`.
    updates: after which it is complete; planned where it acts.
    budget: of its decisions; None where it learns from data.
  """

  row: Row
  folder: pathlib.Path
  arguments: tuple[str, ...]
  updates: int
  budget: Any = None


# What a row leaves that the sweep reads.
_FILES = ('config.json', 'metrics.csv', 'evaluation.csv')


def jobs(plan: Plan, rows: Sequence[Row], workdir: pathlib.Path) -> list[Job]:
  """Rows as commands."""
  made = []
  for row in rows:
    folder = (workdir / 'rows' / f's{row.setting:03}_seed{row.seed}').resolve()
    own = _closing(plan, row)
    arguments = (*own.arguments(row), f'--workdir={folder}')
    experiment = own.describe(row)
    budget = experiment.budget if experiment.ends_by_decisions else None
    made.append(Job(row, folder, arguments, experiment.updates, budget))
  return made


def _closing(plan: Plan, row: Row) -> Plan:
  """The plan whose rows end with 0 simulations and with the agent's own."""
  search = getattr(plan.describe(row).config, 'search', None)
  budget = search.num_simulations if search is not None else 0
  last = (f'final_simulations={budget or ""}', 'early_update=0')
  return plan._replace(fixed=(*plan.fixed, *last))


def has_ended(job: Job) -> bool:
  """Whether the row of a job has finished."""
  return (job.folder / 'timing.csv').exists()


def _is_complete(job: Job) -> bool:
  """Whether it was not merely asked to stop: then it ends well, too."""
  curve = sweep_results.read_curve(job.folder / 'metrics.csv')
  if job.budget is None:
    return (curve[-1]['step'] if curve else 0) >= job.updates
  return job.budget.is_spent(
    [(int(row['step']), row['decisions']) for row in curve]
  )


def _finish(job: Job, seconds: float) -> None:
  text = f'wall_seconds\n{seconds:.1f}\n'
  writing.write_text(job.folder / 'timing.csv', text)


def _train_command(arguments: Sequence[str]) -> list[str]:
  return [sys.executable, '-m', 'experiments.train', *arguments]


def processes(
  todo: Sequence[Job],
  *,
  at_once: int,
  retries: int,
  stopping: Callable[[], bool],
  report: Callable[[int], None],
) -> dict[Row, str]:
  """Runs rows as processes of this machine; what has finished is left out.

  A process that dies goes on from its last checkpoint in a new one; a mistake
  (exit code 2) is not tried again.

  Args:
    todo: from `jobs`.
    at_once: processes at the same time.
    retries: new attempts for each row.
    stopping: polled; True asks the processes to save, and leaves.
    report: called with the number of rows that have ended.

  Returns:
    What went wrong with the rows that failed.
  """
  waiting = collections.deque((j, 0) for j in todo if not has_ended(j))
  running: dict[subprocess.Popen, tuple[Job, int, float]] = {}
  failed: dict[Row, str] = {}
  ended, asked = len(todo) - len(waiting), False
  try:
    while running or (waiting and not stopping()):
      while waiting and len(running) < at_once and not stopping():
        job, attempt = waiting.popleft()
        running[_start(job)] = job, attempt, time.monotonic()
      if stopping() and not asked:
        asked = True
        for process in running:
          process.terminate()
      for process in [p for p in running if p.poll() is not None]:
        job, attempt, start = running.pop(process)
        if asked:
          continue
        code = process.returncode
        if code == 0 and _is_complete(job):
          _finish(job, time.monotonic() - start)
        elif code == 2 or attempt >= retries:
          failed[job.row] = f'exit code {code}, {_last_words(_log(job))}'
        else:
          waiting.append((job, attempt + 1))
          continue
        ended += 1
        report(ended)
      time.sleep(0.1)
  finally:
    for process in running:
      process.kill()
      process.wait()
  return failed


def _log(job: Job) -> pathlib.Path:
  return job.folder.parent / f'{job.folder.name}.log'


def _last_words(log: pathlib.Path) -> str:
  text = log.read_text(encoding='utf-8', errors='replace').strip()
  return f'{text.rpartition(chr(10))[2]} (see {log})'


def _start(job: Job) -> subprocess.Popen:
  job.folder.parent.mkdir(parents=True, exist_ok=True)
  with _log(job).open('a', encoding='utf-8') as output:
    return subprocess.Popen(
      _train_command(job.arguments),
      stdout=output,
      stderr=subprocess.STDOUT,
    )


def train_here(plan: Plan, row: Row, folder: str) -> dict[str, str]:
  """Trains one row in the process that this is called in, as a Ray task.

  Args:
    plan: the sweep.
    row: of it.
    folder: the row's. If all machines share it, a row that is tried again goes
      on from its checkpoint.

  Returns:
    The texts of its CSVs and of its config by name: the folder may be on
    another machine than who asks.

  Raises:
    UserError: see `experiments.train.run`.
  """
  from experiments import train

  train.use_compilation_cache()
  workdir = pathlib.Path(folder)
  train.run(_closing(plan, row).describe(row), workdir)
  paths = [workdir / name for name in _FILES]
  return {p.name: p.read_text('utf-8') for p in paths if p.exists()}


def on_ray(
  plan: Plan,
  todo: Sequence[Job],
  *,
  address: str | None,
  retries: int,
  cpus: float,
  gpus: float,
  stopping: Callable[[], bool],
  report: Callable[[int], None],
) -> dict[Row, str]:
  """Runs rows as tasks of a Ray cluster; what has finished is left out.

  The suite must be installed on every machine. Ray places the tasks; a row
  whose worker or machine dies is submitted again.

  Args:
    plan: the sweep.
    todo: from `jobs`.
    address: of the cluster; None finds a running one or starts one here.
    retries: new attempts for each row.
    cpus: that a row needs.
    gpus: that a row needs.
    stopping: polled; True cancels the tasks and leaves.
    report: called with the number of rows that have ended.

  Returns:
    What went wrong with the rows that failed.

  Raises:
    UserError: Ray is not installed, or there is no cluster.
  """
  try:
    # By name, for a checker of types without it.
    ray = importlib.import_module('ray')
    exceptions = importlib.import_module('ray.exceptions')
  except ImportError as error:
    raise configs.UserError(
      'engine=ray needs Ray: pip install "ray>=2.50"'
    ) from error
  try:
    ray.init(address=address or None, log_to_driver=False)
  except (ConnectionError, ValueError, RuntimeError) as error:
    raise configs.UserError(f'ray_address={address}: {error}') from error
  # A fresh process for each row, which goes on elsewhere as we decide.
  placed = {'num_cpus': cpus, 'num_gpus': gpus, 'max_retries': 0}
  task = ray.remote(max_calls=1, **placed)(train_here)
  submit = lambda job: task.remote(plan, job.row, str(job.folder))
  left = [job for job in todo if not has_ended(job)]
  start = time.monotonic()
  running: dict[Any, tuple[Job, int]] = {submit(j): (j, 0) for j in left}
  failed: dict[Row, str] = {}
  ended = len(todo) - len(left)
  try:
    while running and not stopping():
      ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
      for reference in ready:
        job, attempt = running.pop(reference)
        reason, is_mistake = 'stopped', False
        try:
          _receive(job, ray.get(reference))
        except exceptions.RayError as error:
          cause = getattr(error, 'cause', None) or error
          reason = f'{type(cause).__name__}: {cause}'.splitlines()[0]
          is_mistake = isinstance(cause, configs.UserError)
        else:
          if _is_complete(job):
            reason = ''
            _finish(job, time.monotonic() - start)
        if reason and not is_mistake and attempt < retries:
          running[submit(job)] = job, attempt + 1
          continue
        if reason:
          failed[job.row] = reason
        ended += 1
        report(ended)
    for reference in running:
      ray.cancel(reference, force=True)
  finally:
    ray.shutdown()
  return failed


def _receive(job: Job, files: Mapping[str, str]) -> None:
  job.folder.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    writing.write_text(job.folder / name, text)


def read_jobs(
  todo: Sequence[Job], failed: Mapping[Row, str]
) -> dict[Row, Result]:
  """Results of what has finished, and of what failed."""
  results = {}
  for job in todo:
    if has_ended(job):
      results[job.row] = _read_job(job)
    elif job.row in failed:
      results[job.row] = Result('failed', [], {})
  return results


def _read_job(job: Job) -> Result:
  curve = sweep_results.read_curve(job.folder / 'metrics.csv')
  if not math.isfinite(curve[-1].get('loss', 0.0)):
    return sweep_results.from_curve(curve, 'nan')
  final = {}
  with (job.folder / 'config.json').open(encoding='utf-8') as file:
    agent = json.load(file)['agent']
  # Who does not search plays with 0 simulations.
  search = agent.get('search', {}).get('num_simulations', 0)
  for row in _read_evaluation(job.folder / 'evaluation.csv'):
    if 'return_mean' not in row:
      final |= {n: float(x) for n, x in row.items() if n.startswith('held_')}
      continue
    played = float(row['return_mean'])
    if int(row['simulations']) == 0:
      final['network_return'] = played
    if int(row['simulations']) == search:
      final['eval_return'] = played
  return sweep_results.from_curve(curve, 'done', final)


def _read_evaluation(path: pathlib.Path) -> list[dict[str, str]]:
  import csv

  if not path.exists():
    return []
  with path.open(newline='', encoding='utf-8') as file:
    return [r for r in csv.DictReader(file) if r['checkpoint'] == 'final']
