"""Groups of runs as curves, as return against search, and as Atari scores."""

import collections
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import atari_scores, style
from experiments.report.runs import Path, Run, find_runs, read_column
from experiments.report.statistics import bootstrap_interval, mean_interval
from experiments.runtime import run_config


class Curve(NamedTuple):
  """A group's mean over its seeds.

  Attributes:
    x: float64 `[P]`, a grid over the part that all of its runs have.
    mean: float64 `[P]`.
    low: float64 `[P]`, of the 95% bootstrap interval over seeds.
    high: float64 `[P]`.
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  runs: int


def learning_curves(
  workdirs: Iterable[Path],
  *,
  x: str = 'decisions',
  y: str = 'episode_return',
  smooth: int = 1,
  points: int = 200,
) -> dict[str, Curve]:
  """Curves of groups of runs, label -> `Curve`, over a grid of `points`.

  Args:
    workdirs: folders, or patterns of them.
    x: a column of metrics.csv: `decisions`, or `step` for updates; likewise y.
    smooth: rows in the moving average that ends at each row.

  Raises:
    UserError: see `find_runs`, `read_column`; runs that do not overlap.
  """
  if smooth < 1:
    raise UserError(f'smooth={smooth}: must be at least 1')
  groups = collections.defaultdict(list)
  for run in find_runs(workdirs):
    groups[run.label].append(read_column(run.workdir, x, y))
  curves = {}
  for label, columns in groups.items():
    smoothed = [(xs, _smoothed(ys, smooth)) for xs, ys in columns]
    curve = mean_curve(smoothed, points=points)
    if curve is None:
      raise UserError(f'{label}: its runs have no {x} in common')
    curves[label] = curve
  return curves


def mean_curve(
  columns: Sequence[tuple[np.ndarray, np.ndarray]], *, points: int = 200
) -> Curve | None:
  """The mean of several runs over the part that they have in common.

  Columns are `(xs [N], ys [N])` of each run, xs `[N]` rising. The curve has a
  grid of `points` and a bootstrapped 95% interval; it is None if nothing is
  common.
  """
  start = max(xs[0] for xs, _ in columns)
  end = min(xs[-1] for xs, _ in columns)
  if end < start:
    return None
  grid = np.linspace(start, end, points if end > start else 1)
  values = np.stack([np.interp(grid, xs, ys) for xs, ys in columns])
  low, high = bootstrap_interval([values], lambda s: np.mean(s[0], axis=0))
  return Curve(grid, np.mean(values, 0), low, high, len(values))


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
  """Mean of the last `width` values, of fewer at the start."""
  sums = np.cumsum(np.concatenate([[0.0], values]))
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - width, 0)
  return (sums[ends] - sums[starts]) / (ends - starts)


def curves_figure(
  curves: Mapping[str, Mapping[str, Curve]], path: Path, *, x: str
) -> None:
  """Draws `{y: {label: Curve}}`, one panel for each y, and saves it.

  Raises:
    UserError: the file cannot be written.
  """
  figure, panels = style.panels(len(curves), 5.6, 4.0)
  for axes, (y, groups) in zip(panels[0], curves.items()):
    for i, (label, curve) in enumerate(groups.items()):
      colour = style.colour(i)
      text = f'{label} ({curve.runs} seed{"s" if curve.runs > 1 else ""})'
      # More curves than colours differ in their strokes.
      stroke = ('-', '--', ':')[i // len(style.COLOURS) % 3]
      axes.plot(curve.x, curve.mean, stroke, color=colour, lw=1.8, label=text)
      if curve.runs > 1:
        axes.fill_between(
          curve.x, curve.low, curve.high, color=colour, alpha=0.2, lw=0
        )
    words = 'updates' if x == 'step' else x.replace('_', ' ')
    axes.set(xlabel=words, ylabel=y.replace('_', ' '))
    # Many groups would hide the curves.
    style.legend(axes, below=len(groups) > 3, ncols=1, fontsize=8)
  style.save(figure, path)


def one_panel(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, Curve]:
  """`{y: {label: Curve}}` as one set of curves, with y in the labels."""
  words = {'eval_return': 'with search', 'network_return': 'network alone'}
  return {
    f'{label}, {words.get(y, y)}': curve
    for y, groups in curves.items()
    for label, curve in groups.items()
  }


def write_curves(
  curves: Mapping[str, Mapping[str, Curve]], path: Path, *, x: str
) -> None:
  """Writes what is plotted as CSV: one line a point."""
  lines = [('y', 'group', 'runs', x, 'mean', 'low', 'high')]
  for y, groups in curves.items():
    for label, curve in groups.items():
      lines += [
        (y, label, curve.runs, *(f'{v:.9g}' for v in point))
        for point in zip(curve.x, curve.mean, curve.low, curve.high)
      ]
  tables.write_lines(path, lines)


class Pooled(NamedTuple):
  """A line of evaluation.csv, pooled over the seeds of a group.

  Attributes:
    planner: the search's rule, or `network`.
    simulations: a decision; 0 is the network alone.
    return_mean: mean over seeds, with a 95% interval (Student's).
    gain_mean: mean over seeds of search minus network alone, same run, with a
      95% interval, paired by seed.
  """

  group: str
  checkpoint: str
  planner: str
  simulations: int
  seeds: int
  return_mean: float
  return_low: float
  return_high: float
  gain_mean: float
  gain_low: float
  gain_high: float


def aggregate_evaluations(
  workdirs: Iterable[Path], name: str = 'evaluation.csv'
) -> list[Pooled]:
  """Pools the final evaluations over seeds, to see what search adds.

  There is a row for each group, checkpoint, planner and budget, over the seeds
  that have it. Intervals are NaN for one seed.

  Raises:
    UserError: see `find_runs`; a run without the file or its network's row.
  """
  returns = collections.defaultdict(list)
  gains = collections.defaultdict(list)
  for run in find_runs(workdirs):
    path = run.workdir / name
    rows = _evaluation_rows(path)
    alone = {r['checkpoint']: r['mean'] for r in rows if not r['simulations']}
    for row in rows:
      if row['checkpoint'] not in alone:
        raise UserError(
          f'{path}: checkpoint {row["checkpoint"]} has no row of 0 simulations'
        )
      what = (row['checkpoint'], row['planner'], row['simulations'])
      returns[run.label, *what].append(row['mean'])
      gains[run.label, *what].append(row['mean'] - alone[row['checkpoint']])
  pooled = []
  for what, values in returns.items():
    return_low, return_high = mean_interval(values)
    gain_low, gain_high = mean_interval(gains[what])
    pooled.append(
      Pooled(
        *what,
        seeds=len(values),
        return_mean=float(np.mean(values)),
        return_low=return_low,
        return_high=return_high,
        gain_mean=float(np.mean(gains[what])),
        gain_low=gain_low,
        gain_high=gain_high,
      )
    )
  return pooled


def _evaluation_rows(source: Any) -> list[dict[str, Any]]:
  """Rows of evaluation.csv (a path, or its rows) as plain numbers."""
  where = 'rows'
  if isinstance(source, str | os.PathLike):
    where = str(source)
    source = tables.read_csv(source, follow=True)[1]
  plain = []
  for row in source:
    row = row._asdict() if hasattr(row, '_asdict') else row
    is_pooled = 'seeds' in row
    try:
      mean = float(row['return_mean'])
      half = 0 if is_pooled else 1.96 * float(row['return_se'])
      plain.append(
        {
          'checkpoint': row['checkpoint'],
          'planner': row['planner'],
          'simulations': int(row['simulations']),
          'mean': mean,
          'low': float(row['return_low']) if is_pooled else mean - half,
          'high': float(row['return_high']) if is_pooled else mean + half,
          'count': int(row['seeds' if is_pooled else 'episodes']),
          'over': 'seeds' if is_pooled else 'episodes',
        }
      )
    except (KeyError, ValueError) as error:
      raise UserError(f'{where}: not as play writes it: {error}') from error
  if not plain:
    raise UserError(f'{where}: no rows')
  return plain


def budget_figure(
  evaluation: Any, path: Path, *, title: str | None = None
) -> None:
  """Draws return against simulations a decision, a line a checkpoint.

  The network alone (0 simulations) is the leftmost point and the dashed line.
  Bars are 95% intervals: over episodes, or over seeds for `Pooled` rows.

  Args:
    evaluation: evaluation.csv, its rows, or `Pooled` rows of one group.
    title: None takes agent, environment and seed of the config.json next to the
      CSV.

  Raises:
    UserError: no such file, or columns missing.
  """
  rows = _evaluation_rows(evaluation)
  config = {}
  if isinstance(evaluation, str | os.PathLike):
    workdir = pathlib.Path(evaluation).parent
    if (workdir / 'config.json').exists():
      config = run_config.read_run_config(workdir)
  if title is None and config:
    title = (
      f'{config["agent_name"]} on {config["env_name"]}, seed {config["seed"]}'
    )
  figure = style.figure(6.4, 4.6)
  axes = figure.subplots()
  budgets = sorted({r['simulations'] for r in rows})
  least = min([n for n in budgets if n] or [4])
  place = lambda n: math.log2(n) if n else math.log2(least) - 1.6
  _draw_budget_lines(axes, rows, place, config)
  axes.set_xticks(
    [place(n) for n in budgets], [str(n or 'network\nalone') for n in budgets]
  )
  axes.set_xlabel('search simulations a decision')
  axes.set_ylabel('return of an episode')
  axes.set_title(title or 'What search adds to the trained network')
  counts = sorted({r['count'] for r in rows})
  many = '-'.join(map(str, (counts[0], counts[-1])[: len(counts)]))
  figure.legend(
    loc='outside lower center',
    ncols=2,
    frameon=False,
    fontsize=8.5,
    title=f'mean and 95% interval over {many} {rows[0]["over"]}',
    title_fontsize=8.5,
  )
  style.save(figure, path)


def _draw_budget_lines(
  axes: Any,
  rows: list[dict[str, Any]],
  place: Callable[[int], float],
  config: Mapping[str, Any],
) -> None:
  """Draws a line with bars a checkpoint and planner; levels without search."""
  drawn = []
  for checkpoint, planner in (lines := _budget_lines(rows)):
    colour = style.CHECKPOINT_COLOURS.get(checkpoint, style.colour(len(drawn)))
    line = sorted(lines[checkpoint, planner], key=lambda r: r['simulations'])
    means = np.asarray([r['mean'] for r in line])
    ends = np.asarray([(r['low'], r['high']) for r in line]).T
    axes.errorbar(
      [place(r['simulations']) for r in line],
      means,
      yerr=np.nan_to_num(np.abs(ends - means)),
      color=colour,
      # A second planner on the same checkpoint.
      ls=':' if checkpoint in drawn else '-',
      marker='o',
      ms=6,
      lw=2,
      capsize=4,
      label=_budget_label(checkpoint, planner, config),
    )
    if line[0]['simulations'] == 0 and checkpoint not in drawn:
      axes.axhline(
        means[0],
        color=colour,
        ls='--',
        lw=1.2,
        label=f'{checkpoint} network without search: {means[0]:.3g}',
        zorder=1,
      )
    drawn.append(checkpoint)


def _budget_lines(
  rows: list[dict[str, Any]],
) -> dict[tuple[str, str], list[dict[str, Any]]]:
  """Rows by checkpoint and planner; the network's row begins each line."""
  lines = collections.defaultdict(list)
  for row in rows:
    if row['simulations']:
      lines[row['checkpoint'], row['planner']].append(row)
  for row in rows:
    if not row['simulations']:
      own = [
        line for what, line in lines.items() if what[0] == row['checkpoint']
      ]
      for line in own or [lines[row['checkpoint'], row['planner']]]:
        line.append(row)
  return lines


def _budget_label(
  checkpoint: str, planner: str, config: Mapping[str, Any]
) -> str:
  label = f'{checkpoint} network'
  updates = config.get('run', {}).get('early_update')
  if checkpoint == 'early' and updates:
    label += f' (after {updates:,} updates)'
  return label if planner == 'network' else f'{label}, {planner} search'


def final_score(workdir: Path) -> float:
  """A finished run's return, of its final checkpoint with the most search.

  Without evaluation.csv it is the last `eval_return` of metrics.csv.

  Raises:
    UserError: there is neither.
  """
  path = pathlib.Path(workdir) / 'evaluation.csv'
  if path.exists():
    rows = [r for r in _evaluation_rows(path) if r['checkpoint'] == 'final']
    if rows:
      return max(rows, key=lambda r: r['simulations'])['mean']
  return float(read_column(workdir, 'step', 'eval_return')[1][-1])


def scores_by_game(runs: Iterable[Run]) -> dict[str, dict[str, list[float]]]:
  """Raw scores: method -> game -> one for each seed; Atari-100k only."""
  scores = {}
  for run in runs:
    game = atari_scores.game_of(run.env)
    if game is not None:
      games = scores.setdefault(run.method, {})
      games.setdefault(game, []).append(final_score(run.workdir))
  return scores
