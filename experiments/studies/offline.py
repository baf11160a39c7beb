"""Runs a table of sweeps on data sets, and draws the results.

  python -m experiments.study offline --study=agents --data=data

`DATA/ENV/QUALITY` are folders of `experiments.collect`. Every cell, one agent
on one data set with all seeds in one program, is `python -m experiments.sweep`
in a folder of its own: it is run once and resumes if it was stopped. After each
cell the study's CSV and figure are written again.

  agents    all agents on all qualities, the small presets: 20,000 updates,
            ATAC 30,000 (10,000 of them warm start), COMBO 25,000 (5,000 of
            them the model); agents play their mode, the data's policy samples
  betas     ATAC from beta 0 to 64
  residual  TD3+BC with and without the DQRA loss
  hopper    the cheap agents on medium data of a larger task (--envs=hopper)
"""

import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.build import dataset as datasets
from experiments.files import reading, tables, writing
from experiments.report import statistics, style, terminal
from experiments.runtime import config as configs
from experiments.studies import runner

QUALITIES = ('random', 'medium', 'medium-replay', 'medium-expert', 'expert')


class Cell(NamedTuple):
  """One sweep of a study.

  `arguments` are of `experiments.sweep`, but for data set, seeds and folder.
  """

  agent: str
  quality: str
  arguments: tuple[str, ...]


_EVALUATION = (
  '--set=evaluate_every=5000',
  '--set=evaluate_episodes=20',
  '--set=log_every=5000',
)


def _agents() -> list[Cell]:
  # The cheap ones first.
  names = ('bc', 'td3_bc', 'iql', 'atac', 'cql', 'combo')
  return [
    Cell(name, quality, (f'--preset={name}_small', *_EVALUATION))
    for name in names
    for quality in QUALITIES
  ]


_BETAS = ('0', '0.00390625', '0.0625', '1', '4', '16', '64')


def _betas() -> list[Cell]:
  arguments = ('--preset=atac_small', f'--grid=beta={",".join(_BETAS)}')
  order = ('medium', 'random', 'expert', 'medium-replay', 'medium-expert')
  return [Cell('atac', q, (*arguments, *_EVALUATION)) for q in order]


def _residual() -> list[Cell]:
  arguments = ('--preset=td3_bc_small', '--grid=residual_weight=1,0.5')
  return [Cell('td3_bc', q, (*arguments, *_EVALUATION)) for q in QUALITIES]


def _hopper() -> list[Cell]:
  return [
    cell
    for cell in _agents()
    if cell.quality == 'medium' and cell.agent not in ('cql', 'combo')
  ]


STUDIES = {
  'agents': _agents,
  'betas': _betas,
  'residual': _residual,
  'hopper': _hopper,
}


def run_one(
  cell: Cell,
  data: pathlib.Path,
  folder: pathlib.Path,
  seeds: int,
  stopping: runner.Stopping = lambda: False,
) -> bool:
  """Runs or resumes one cell; whether it finished.

  A finished cell stays while its arguments, seeds and rows are the same; else
  the sweep itself adds seeds, or refuses. `stopping` is polled: True stops the
  sweep, or lets none begin.
  """
  workdir = folder / f'{cell.agent}_{cell.quality}'
  mark, place = workdir / 'cell.json', data / cell.quality
  wanted = {
    'arguments': list(cell.arguments),
    'seeds': seeds,
    'checksum': datasets.checksum(str(place)),
  }
  before = _read_mark(mark)
  if before.get('done') and all(before[n] == x for n, x in wanted.items()):
    return True
  workdir.mkdir(parents=True, exist_ok=True)
  own = (f'--dataset={place}', f'--seeds={seeds}', '--max_rows=128')
  code, wall, cpu = runner.run_command(
    'sweep', (*cell.arguments, *own), workdir, stopping
  )
  if cpu is None:
    return False
  spent = {'wall_seconds': wall, 'cpu_seconds': cpu}
  spent = {n: round(x + before.get(n, 0.0), 1) for n, x in spent.items()}
  done = not code and _is_whole(cell, workdir, seeds)
  content = json.dumps(wanted | spent | {'done': done}) + '\n'
  writing.write_text(mark, content)
  if not done and not stopping():
    log = runner.log_of(workdir)
    terminal.say(f'{workdir} did not finish, see {log}', file=sys.stderr)
  return done


def _is_whole(cell: Cell, workdir: pathlib.Path, seeds: int) -> bool:
  """Whether the sweep has a row for every seed of every setting."""
  path = workdir / 'sweep.csv'
  if not path.exists():
    return False
  grids = [a.partition('=')[2] for a in cell.arguments if '--grid=' in a]
  settings = math.prod(len(g.split(',')) for g in grids)
  return len(tables.read_rows(path)) >= settings * seeds


def collected(
  cells: Sequence[Cell], data: pathlib.Path, folder: pathlib.Path
) -> list[dict[str, Any]]:
  """A row a seed of every finished cell, and of the behaviour itself."""
  from experiments.data import layout

  rows, seen = [], {}
  for cell in cells:
    path = folder / f'{cell.agent}_{cell.quality}' / 'sweep.csv'
    mark = path.with_name('cell.json')
    cost = _read_mark(mark)
    if not cost.get('done'):
      continue
    if cell.quality not in seen:
      dataset = datasets.opened(str(data / cell.quality))
      returns = layout.returns(dataset)
      seen[cell.quality] = dataset.about
      mean = float(returns.mean()) if len(returns) else None
      tag = {'env': data.name, 'quality': cell.quality, 'agent': 'behaviour'}
      rows.append(tag | _scored(dataset.about, mean))
    for row in tables.read_csv(path, ['eval_return'])[1]:
      swept = {n: x for n, x in row.items() if n not in _RESULTS}
      tag = {'env': data.name, 'quality': cell.quality, 'agent': cell.agent}
      with tables.reading_cells(path):
        result = float(row['eval_return'] or 'nan')
      result = result if math.isfinite(result) else None
      rows.append(
        tag
        | swept
        | _scored(seen[cell.quality], result)
        | {'cell_cpu_seconds': cost['cpu_seconds']}
      )
  return rows


def _read_mark(path: pathlib.Path) -> dict[str, Any]:
  """What is noted about a cell; {} if it has not begun."""
  try:
    return reading.read_json(path)
  except reading.Missing:
    return {}


_RESULTS = ('eval_return', 'network_return', 'eval_return_mean', 'status')


def _scored(about, mean: float | None) -> dict[str, str]:
  if mean is None:
    return {'return': '', 'score': ''}
  score = datasets.score(about, mean)
  return {
    'return': f'{mean:.2f}',
    'score': '' if score is None else f'{score:.2f}',
  }


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """IQM of scores over seeds with a 95% bootstrap interval, a row a setting.

  `lost` counts seeds without a finite return; `worst` is the least score.
  """
  groups: dict[tuple, list[str]] = {}
  behaviour = {}
  skipped = {'seed', 'return', 'score', 'cell_cpu_seconds'}
  for row in rows:
    where = row['env'], row['quality']
    if row['agent'] == 'behaviour':
      behaviour[where] = row['score']
    else:
      key = tuple((n, x) for n, x in row.items() if n not in skipped)
      groups.setdefault(key, []).append(row['score'])
  found = []
  for key, texts in groups.items():
    own, scores = dict(key), [float(text) for text in texts if text]
    measured = dict.fromkeys(('iqm', 'low', 'high', 'mean', 'worst'), '')
    if scores:
      low, high = statistics.bootstrap_interval(
        [scores], lambda some: statistics.iqm(some[0])
      )
      measured = {
        'iqm': statistics.iqm(np.asarray(scores)),
        'low': low,
        'high': high,
        'mean': np.mean(scores),
        'worst': min(scores),
      }
      measured = {n: f'{x:.2f}' for n, x in measured.items()}
    counts = {'seeds': len(scores), 'lost': len(texts) - len(scores)}
    played = {'behaviour': behaviour[own['env'], own['quality']]}
    found.append(own | counts | measured | played)
  return found


def draw(summary: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws a panel an environment: IQMs, intervals and the behaviour's mean."""
  summary = [row for row in summary if row['iqm']]
  if not summary:
    return
  betas = any('beta' in row for row in summary)
  envs = list(dict.fromkeys(row['env'] for row in summary))
  figure, panels = style.panels(len(envs), 5.6, 3.6)
  for env, axes in zip(envs, panels[0]):
    rows = [row for row in summary if row['env'] == env]
    (_draw_betas if betas else _draw_agents)(axes, rows)
    axes.set_title(env)
    style.legend(axes, fontsize='x-small', ncols=1 if betas else 2)
  style.save(figure, path)


def _intervals(rows: Sequence[dict[str, Any]]) -> Any:
  """IQM and the ends of its interval, float64 `[3, rows]`."""
  names = ('iqm', 'low', 'high')
  return np.array([[float(row[n]) for row in rows] for n in names])


def _draw_agents(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
  """Points at each quality of data, one colour an agent or a swept value."""
  swept = 'residual_weight'
  label = lambda row: (
    f'{swept} {float(row[swept]):.3g}' if swept in row else row['agent']
  )
  lines = list(dict.fromkeys(map(label, rows)))
  kinds = [q for q in QUALITIES if any(r['quality'] == q for r in rows)]
  for i, line in enumerate(lines):
    own = [row for row in rows if label(row) == line]
    at = np.array([kinds.index(row['quality']) for row in own])
    x = at + 0.8 * ((i + 0.5) / len(lines) - 0.5)
    mean, low, high = _intervals(own)
    bars = mean - low, high - mean
    axes.errorbar(x, mean, bars, fmt='o', ms=3, lw=1, label=line)
  for k, kind in enumerate(kinds):
    own = next(r['behaviour'] for r in rows if r['quality'] == kind)
    if own:
      axes.plot([k - 0.45, k + 0.45], [float(own)] * 2, color='black', lw=1)
  axes.set_xticks(range(len(kinds)), kinds, rotation=15)
  axes.set_ylabel('score; line: the policy of the data, sampling')


def _draw_betas(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
  """A line a data set over beta; the data's own policy is dashed."""
  ticks = list(dict.fromkeys(row['beta'] for row in rows))
  for kind in QUALITIES:
    own = [row for row in rows if row['quality'] == kind]
    if not own:
      continue
    x = [ticks.index(row['beta']) for row in own]
    middle, low, high = _intervals(own)
    line, *_ = axes.plot(x, middle, marker='o', ms=3, label=kind)
    colour = line.get_color()
    axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    if own[0]['behaviour']:
      axes.axhline(float(own[0]['behaviour']), color=colour, lw=1, ls='--')
  axes.set_xticks(range(len(ticks)), [f'{float(t):.3g}' for t in ticks])
  axes.set(xlabel='β', ylabel='score; dashed: the data, sampling')


def main() -> None:
  """Runs the study that the flags name.

  Raises:
    UserError: data are missing, or a cell of the table did not finish.
  """
  from absl import flags

  values = flags.FLAGS
  everything = STUDIES[values.study]()
  known = list(dict.fromkeys(cell.agent for cell in everything))
  for agent in values.only:
    if agent not in known:
      raise configs.UserError(
        f'only={agent}: {values.study} has {", ".join(known)}'
      )
  only = values.only or known
  for field in ('folder', 'results'):
    configs.check_place(field, getattr(values, field), folder=True)
  results = pathlib.Path(values.results)
  places = [pathlib.Path(values.data) / env for env in values.envs]
  for place in places:
    if not place.is_dir():
      raise configs.UserError(
        f'data={values.data}: has no {place.name}; collect it with python -m '
        f'experiments.collect --env=ENV --out={place}'
      )
  folders = {
    place: pathlib.Path(values.folder) / values.study / place.name
    for place in places
  }

  def run(cell: Cell, place: pathlib.Path) -> Callable[[runner.Stopping], bool]:
    return lambda stopping: run_one(
      cell, place, folders[place], values.seeds, stopping
    )

  work = [
    run(cell, place)
    for cell in everything
    for place in places
    if cell.agent in only
  ]

  def write():
    rows = [
      row
      for place in places
      for row in collected(everything, place, folders[place])
    ]
    if not rows:
      return
    name = f'offline_{values.study}'
    tables.write_rows(results / f'{name}.csv', rows)
    summary = summarised(rows)
    tables.write_rows(results / f'{name}_summary.csv', summary)
    draw(summary, results / f'{name}.png')

  results.mkdir(parents=True, exist_ok=True)
  terminal.begin(
    f'{len(work)} cells of {values.seeds} seeds, {values.at_once} at a time, '
    'each by python -m experiments.sweep',
    f'folders and logs: {values.folder}',
    compiles=False,
  )
  failed = runner.run_all('cells', work, values.at_once, write)
  if failed is None:
    return
  if failed:
    raise configs.UserError(f'{failed} of {len(work)} cells did not finish')
  terminal.end(
    f'{results}/offline_{values.study}.csv and .png',
    'python -m experiments.train --preset=atac_small '
    f'--dataset={places[0]}/medium',
  )


def define_flags() -> None:
  """The flags of `python -m experiments.study offline`."""
  from absl import flags

  flags.DEFINE_enum('study', None, list(STUDIES), 'the table', required=True)
  flags.DEFINE_string('data', 'data', 'the folder of the collected data sets')
  flags.DEFINE_list(
    'envs', ['pendulum', 'double_pendulum'], 'folders in it, one a task'
  )
  flags.DEFINE_list('only', [], 'agents to train; all if left out')
  flags.DEFINE_integer('seeds', 5, 'seeds of each setting', 1, 10_000)
  flags.DEFINE_integer('at_once', 1, 'cells at the same time', 1, 1_024)
  flags.DEFINE_string('folder', 'runs/offline', 'the folder for the sweeps')
  runner.define_results()
