"""What a sweep found: CSVs, a table, a figure, the best setting."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.files import tables
from experiments.report import style, terminal
from experiments.runtime import config as configs
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps.plan import Plan, Row


class Result(NamedTuple):
  """What became of one row.

  Attributes:
    status: `done`; `nan`, its numbers are not finite any more; `failed`, its
      process ended too often; `halved`, it was among the poor ones.
    curve: rows of metrics with `step`, in order.
    final: the last of each metric, of the trained agent.
  """

  status: str
  curve: list[dict[str, float]]
  final: dict[str, float]


class Summary(NamedTuple):
  """One setting over its seeds.

  Attributes:
    setting: its number.
    iqm: interquartile mean of the final metric; NaN if no seed has one.
    low: of its 95% bootstrap interval over seeds.
    high: likewise.
    seeds: how many have the metric.
    lost: how many do not (NaN, failed, halved); they are in no aggregate.
  """

  setting: int
  iqm: float
  low: float
  high: float
  mean: float
  seeds: int
  lost: int


def from_curve(
  curve: list[dict[str, float]],
  status: str = 'done',
  final: Mapping[str, float] | None = None,
) -> Result:
  """A result whose final metrics are the last ones, or those that are given."""
  last: dict[str, float] = {}
  for point in curve:
    last |= point
  if status == 'nan':
    # Not the metrics from before it diverged.
    last = {n: x for n, x in curve[-1].items() if math.isfinite(x)}
  return Result(status, curve, last | dict(final or {}))


def summarise(
  plan: Plan, results: Mapping[Row, Result], metric: str
) -> list[Summary]:
  """Settings that have results: fewest lost seeds first, then the best IQM."""
  import numpy as np

  from experiments.report.statistics import bootstrap_interval, iqm

  found = []
  for setting in range(len(plan.settings)):
    own = [r for row, r in results.items() if row.setting == setting]
    if not own:
      continue
    # Rows that ended early have learned for less time than the others.
    values = [
      math.nan if r.status == 'halved' else r.final.get(metric, math.nan)
      for r in own
    ]
    known = [v for v in values if math.isfinite(v)]
    centre = low = high = mean = math.nan
    if known:
      centre, mean = iqm(known), float(np.mean(known))
      low, high = bootstrap_interval([known], lambda s: iqm(s[0]))
    lost = len(own) - len(known)
    found.append(
      Summary(setting, centre, float(low), float(high), mean, len(known), lost)
    )
  worst = lambda x: -math.inf if math.isnan(x) else x
  return sorted(found, key=lambda s: (s.lost, -worst(s.iqm)))


def write(
  plan: Plan,
  results: Mapping[Row, Result],
  metric: str,
  workdir: pathlib.Path,
  left: Sequence[Row] = (),
) -> list[Summary]:
  """Writes sweep.csv, curves.csv, summary.csv and sweep.png.

  A higher `metric`, a column of the curves, is better; only sweep.csv names the
  rows that are `left`. Returns `summarise`.

  Raises:
    UserError: no result has the metric.
  """
  known = sorted({n for r in results.values() for n in r.final})
  if any(r.status == 'done' for r in results.values()) and metric not in known:
    raise configs.UserError(
      f'metric={metric}: no row has it; there are {", ".join(known)}'
    )
  table, curves = [], []
  table_of = {row: Result('left', [], {}) for row in left} | dict(results)
  for row, result in sorted(table_of.items()):
    tag = dict(zip(plan.fields, plan.settings[row.setting]))
    tag |= {'seed': row.seed}
    table.append(tag | _final(result, metric) | {'status': result.status})
    curves += [tag | point for point in result.curve]
  tables.write_rows(workdir / 'sweep.csv', table)
  tables.write_rows(workdir / 'curves.csv', curves)
  summaries = summarise(plan, results, metric)
  tables.write_rows(
    workdir / 'summary.csv',
    [
      dict(zip(plan.fields, plan.settings[s.setting]))
      | {'metric': metric}
      | {n: x for n, x in s._asdict().items() if n != 'setting'}
      for s in summaries
    ],
  )
  if any(s.seeds for s in summaries):
    figure(plan, summaries, metric, workdir / 'sweep.png')
  return summaries


def _final(result: Result, metric: str) -> dict[str, float]:
  """Final metrics with and without search, and the mean over training.

  `final_return` is of a launcher's own episodes at its end; one program has
  none.
  """
  names = dict.fromkeys((metric, 'eval_return', 'network_return'))
  if 'final_return' in result.final:
    names['final_return'] = None
  found = {n: result.final.get(n, math.nan) for n in names}
  seen = [point[metric] for point in result.curve if metric in point]
  mean = sum(seen) / len(seen) if seen else math.nan
  found |= {f'{metric}_mean': mean}
  # The most of any row of metrics; see `experiments.build.support`.
  for name in ('value_clipped', 'reward_clipped'):
    shares = [point[name] for point in result.curve if name in point]
    found |= {name: max(shares)} if shares else {}
  return found


def label(plan: Plan, setting: int) -> str:
  """A setting in words, `learning_rate=1e-3 num_simulations=4`."""
  return ' '.join(plan.assignments(setting)) or plan.preset


def figure(
  plan: Plan, summaries: Sequence[Summary], metric: str, path: pathlib.Path
) -> None:
  """Draws the IQM of every setting with its interval.

  A single field of numbers is an axis, logarithmic if it was drawn so or spans
  a factor of ten; else the 30 best settings are listed.
  """
  shown = [s for s in summaries if s.seeds]
  xs = _numbers(plan, shown)
  words = f'{metric.replace("_", " ")} (IQM, 95% interval)'
  bars: dict[str, Any] = {'color': style.BLUE, 'capsize': 3, 'marker': 'o'}
  if xs is not None:
    pairs = sorted(zip(xs, shown))
    xs, shown = [x for x, _ in pairs], [s for _, s in pairs]
    drawing = style.figure(5.6, 4.0)
    axes = drawing.subplots()
    axes.errorbar(xs, [s.iqm for s in shown], yerr=_bars(shown), **bars)
    wide = min(xs) > 0 and max(xs) >= 10 * min(xs)
    if plan.fields[0] in plan.logarithmic or wide:
      axes.set_xscale('log')
    axes.set_xlabel(plan.fields[0].replace('_', ' '))
    axes.set_ylabel(words)
  else:
    shown = shown[:30][::-1]
    drawing = style.figure(7.0, 1.2 + 0.28 * len(shown))
    axes = drawing.subplots()
    ys = range(len(shown))
    centres = [s.iqm for s in shown]
    axes.errorbar(centres, ys, xerr=_bars(shown), ls='none', **bars)
    axes.set_yticks(ys, [label(plan, s.setting) for s in shown], fontsize=8)
    axes.set_xlabel(words)
  style.save(drawing, path, grid='both')


def _bars(shown: Sequence[Summary]) -> list[list[float]]:
  # Rounding must not make a length negative.
  below = [max(s.iqm - s.low, 0.0) for s in shown]
  return [below, [max(s.high - s.iqm, 0.0) for s in shown]]


def _numbers(plan: Plan, shown: Sequence[Summary]) -> list[float] | None:
  """Values of the only field that is swept, if they are numbers."""
  if len(plan.fields) != 1 or len(shown) < 2:
    return None
  try:
    return [float(plan.settings[s.setting][0]) for s in shown]
  except ValueError:
    return None


def show(
  plan: Plan,
  summaries: Sequence[Summary],
  metric: str,
  workdir: pathlib.Path,
) -> None:
  """Prints the ten best settings and how to train the best one alone."""
  terminal.print_table(
    (*plan.fields, 'IQM', 'interval', 'mean', 'seeds', 'lost'),
    [
      (
        *plan.settings[s.setting],
        f'{s.iqm:.3f}',
        f'{s.low:.3f} to {s.high:.3f}',
        f'{s.mean:.3f}',
        str(s.seeds),
        str(s.lost),
      )
      for s in summaries[:10]
    ],
    f'{metric}: IQM and 95% interval over seeds',
  )
  if len(summaries) > 10:
    print(f'and {len(summaries) - 10} settings below these')
  alone = []
  if summaries and summaries[0].seeds:
    best = sweep_plan.Row(summaries[0].setting, 0)
    terminal.say(
      f'best: {label(plan, best.setting)}; the next command trains it alone'
    )
    alone = [command(plan, best)]
  terminal.end(
    f'{workdir}/summary.csv, sweep.csv, curves.csv, sweep.png', *alone
  )


def command(plan: Plan, row: Row) -> str:
  """The shell command that trains a row alone."""
  import shlex

  return shlex.join(['python', '-m', 'experiments.train', *plan.arguments(row)])
