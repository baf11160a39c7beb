"""Plots runs: learning curves, return against search budget, Atari scores.

python -m experiments.plots --workdirs='runs/a_*,runs/b_*' --out=figure.png

Runs that differ only in their seed form a group. Intervals are 95% intervals.
"""

import pathlib

from experiments.files import tables
from experiments.report import atari_scores, style, terminal
from experiments.report import curves as curve_figures
from experiments.report.runs import find_runs
from experiments.runtime import config as configs


def define_flags() -> None:
  """The flags of `python -m experiments.plots`."""
  from absl import flags

  flags.DEFINE_list(
    'workdirs', None, "folders of runs, or glob patterns: 'runs/a_*,runs/b'"
  )
  flags.DEFINE_string(
    'out',
    'plots.png',
    'the picture; CSV files with its numbers are written next to it',
  )
  flags.DEFINE_enum(
    'x',
    'decisions',
    ['decisions', 'step'],
    'the x axis: decisions, or updates (step)',
  )
  flags.DEFINE_list(
    'y', ['episode_return'], 'columns of metrics.csv, each in its own panel'
  )
  flags.DEFINE_bool('together', False, 'draw all columns in one panel')
  flags.DEFINE_integer(
    'smooth',
    1,
    'number of rows of metrics.csv that each point is the mean of',
    1,
    1_000_000,
  )
  flags.mark_flag_as_required('workdirs')


def main() -> None:
  """Draws as the flags say."""
  from absl import flags

  values = flags.FLAGS
  style.check_picture(values.out)
  runs = find_runs(values.workdirs)
  groups = len({run.label for run in runs})
  terminal.begin(
    f'{terminal.counted(len(runs), "run")} in '
    f'{terminal.counted(groups, "group")}: {", ".join(values.y)} against '
    f'{values.x}',
    compiles=False,
  )
  curves = {
    y: curve_figures.learning_curves(
      values.workdirs, x=values.x, y=y, smooth=values.smooth
    )
    for y in values.y
  }
  out = pathlib.Path(values.out)
  panels = curves
  if values.together:
    panels = {'return of an episode': curve_figures.one_panel(curves)}
  curve_figures.curves_figure(panels, out, x=values.x)
  curve_figures.write_curves(curves, out.with_suffix('.csv'), x=values.x)
  terminal.say(f'curves: {out}, {out.with_suffix(".csv")}')
  played = [r.workdir for r in runs if (r.workdir / 'evaluation.csv').exists()]
  if played:
    _search_report(played, out)
  for i, (method, scores) in enumerate(
    sorted(curve_figures.scores_by_game(runs).items())
  ):
    table = atari_scores.score_table(scores)
    _print_table(f'{method}: human-normalised scores', table)
    tables.write_lines(
      path := out.with_name(f'{out.stem}_atari{i or ""}.csv'), table
    )
    terminal.say(f'{method}: {path}')


def _search_report(workdirs: list[pathlib.Path], out: pathlib.Path) -> None:
  """Reports the gain from search: a table, a CSV, a picture per group."""
  pooled = curve_figures.aggregate_evaluations(workdirs)
  table = [['group', 'checkpoint', 'simulations', 'seeds', 'return', 'gain']]
  for row in pooled:
    gain = terminal.interval(row.gain_mean, row.gain_low, row.gain_high, '+.3f')
    table.append(
      [
        row.group,
        row.checkpoint,
        str(row.simulations),
        str(row.seeds),
        terminal.interval(row.return_mean, row.return_low, row.return_high),
        gain if row.simulations else '',
      ]
    )
  _print_table('search against the same network without it', table)
  tables.write_lines(
    path := out.with_name(f'{out.stem}_search.csv'),
    [curve_figures.Pooled._fields, *pooled],
  )
  terminal.say(f'search: {path}')
  groups = list(dict.fromkeys(row.group for row in pooled))
  for i, group in enumerate(groups):
    rows = [row for row in pooled if row.group == group]
    figure = out.with_name(f'{out.stem}_search{i or ""}.png')
    curve_figures.budget_figure(
      rows, figure, title=f'{group}, {rows[0].seeds} seeds'
    )
    terminal.say(f'{group}: {figure}')


def _print_table(title: str, table: list[list[str]]) -> None:
  terminal.print_table(table[0], table[1:], title, left=1)


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
