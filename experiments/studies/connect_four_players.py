"""Strength of players of a game against what they spend, over training seeds.

  python -m experiments.study connect_four          # trains, resumes
  python -m experiments.study connect_four_players  # plays, resumes

Every player of `PLAYERS` is made of every seed's network. In Connect Four it
has three opponents: perfect play (the share of judged positions in which it
keeps the game's value, and games against the solver), a third party (the next
seed's network under a search), and, for a misleading score, its own network
alone. Each row is written at once.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import build
from experiments.build import saved
from experiments.files import tables
from experiments.playing import (
  arena,
  connect_four_solver,
  match,
  planners,
  players,
)
from experiments.report import statistics, style, terminal
from experiments.runtime import config as configs
from experiments.studies import runner

# Stages, rollouts and simulations, and both together.
PLAYERS = (
  'network',
  'lookahead=1',
  'lookahead=2',
  'lookahead=3',
  'rollout=4',
  'rollout=12',
  'rollout=end',
  'lookahead=2+rollout=8',
  'gumbel=8',
  'gumbel=32',
  'gumbel=64',
  'gumbel=128',
  'gumbel=256',
  'gumbel=32+rollout=8',
)
# The third party is this search with another seed's network.
THIRD = 'gumbel=32'
TITLES = {
  'judge': 'value kept in judged positions',
  'third': f"score against another seed's {THIRD}",
  'solver': 'score against perfect play',
  'network': 'score against its own network (misleads)',
}


class Strength(NamedTuple):
  """How well a player does against an opponent: a line of the CSV.

  Attributes:
    opponent: `judge`, `solver`, `third`, or `network`, its own.
    games: number of games, or of judged positions.
    score: share of points; for the judge, of positions whose value was kept.
    score_se: standard error over openings or positions.
    optimal: for the judge, the share of moves that are as good as the best.
    evaluations: of the network per decision; None for rollouts to the end.
    ms_per_decision: wall time per decision in a batch, in milliseconds.
    other: seed of the opponent's network; None without one.
    opening_plies: random moves before the games; None for the judge.
  """

  seed: int
  player: str
  opponent: str
  games: int
  score: float
  score_se: float
  optimal: float | None
  evaluations: int | None
  ms_per_decision: float
  other: int | None = None
  opening_plies: int | None = None


# The fields that identify a cell of the table.
CELL = ('opponent', 'seed', 'player')


def run(
  workdirs: Mapping[int, str],
  names: Sequence[str],
  opponents: Sequence[str],
  out: pathlib.Path,
  *,
  openings: int,
  opening_plies: int,
) -> list[Strength]:
  """Plays what has not been played yet.

  Args:
    workdirs: a finished run for each seed.
    openings: each played from both sides.
    opening_plies: random moves before a game.

  Raises:
    UserError: a run cannot be read, a name is unknown, the solver is not
      installed, or earlier rows have other settings.
  """
  rows, seeds = tables.read_records(out, Strength), list(workdirs)
  _check(rows, names, opponents, seeds, openings, opening_plies)
  own = saved.load_experiment(workdirs[seeds[0]])
  game = build.make_env(own, training=False, num_envs=1).spec.game
  if game.spec.name != 'ConnectFour' and {'judge', 'solver'} & {*opponents}:
    raise configs.UserError(
      f'opponents={",".join(opponents)}: judge and solver know only Connect '
      f'Four, and this is {game.spec.name}; take third,network'
    )
  starts = match.openings(game, openings, opening_plies)
  solver = connect_four_solver.solver() if 'solver' in opponents else None
  judged = connect_four_solver.read() if 'judge' in opponents else None
  made: dict[tuple[int, str], players.Player] = {}

  def find(seed: int, name: str) -> players.Player:
    if (seed, name) not in made:
      made[seed, name] = arena.make_player(name, workdirs[seed], own, game)
    return made[seed, name]

  def play(opponent: str, seed: int, name: str) -> Strength:
    player = find(seed, name)
    if opponent == 'judge':
      return _judged(seed, player, game, judged)
    if opponent == 'solver':
      whose, other = None, solver
    elif opponent == 'third':
      whose = _after(seeds, seed)
      other = find(whose, THIRD)
    else:
      whose, other = seed, find(seed, 'network')
    row = _met(seed, player, opponent, other, game, starts)
    return row._replace(other=whose, opening_plies=opening_plies)

  cells = [
    (opponent, seed, name)
    for opponent in opponents
    for seed in seeds
    for name in names
    if not opponent == name == 'network'
  ]
  left = runner.missing(rows, CELL, cells)
  runner.fill(out, rows, left, play, digits=5)
  return rows


def _after(seeds: Sequence[int], seed: int) -> int:
  """The seed whose network is the third party."""
  return seeds[(seeds.index(seed) + 1) % len(seeds)]


def _check(rows, names, opponents, seeds, openings, opening_plies) -> None:
  """Refuses at once what would fail only after the first rows are played."""
  for name in names:
    planners.parse(name)
  for opponent in opponents:
    if opponent not in TITLES:
      raise configs.UserError(
        f'opponents={opponent}: must be one of {", ".join(TITLES)}'
      )
  if 'third' in opponents and len(seeds) < 2:
    raise configs.UserError(
      'opponents=third: needs another seed, and there is only one run; train '
      'more'
    )
  played = 2 * openings, opening_plies
  for row in rows:
    before = row.games, row.opening_plies
    if row.opponent in opponents and row.opponent != 'judge':
      if before != played:
        raise configs.UserError(
          f'openings={openings}, opening_plies={opening_plies}: the results '
          f'hold rows of {row.games // 2} and {row.opening_plies}; take those, '
          'or another --results folder'
        )
      after = _after(seeds, row.seed)
      if row.opponent == 'third' and row.other != after:
        raise configs.UserError(
          f'opponents=third: seed {row.seed} has met seed {row.other}, and '
          f'would now meet {after}; take another --results folder'
        )


def _judged(seed, player, game, judged) -> Strength:
  import jax

  positions = connect_four_solver.positions(judged.moves)
  timestep = match.time_step(game, positions)
  output = player.decide(player.params, jax.random.key(seed), timestep)
  verdict = connect_four_solver.judge(np.asarray(output.action), judged)
  kept = len(judged.moves), verdict.kept, verdict.kept_se, verdict.optimal
  speed = match.measure(game, player, positions)
  return Strength(seed, player.name, 'judge', *kept, player.evaluations, speed)


def _met(seed, player, opponent, other, game, starts) -> Strength:
  games = match.play(game, player, other, starts, seed=seed)
  speed = match.measure(game, player, starts)
  result = match.summarise(player, other, games, speed)
  points = result.games, result.score, result.score_se, None
  return Strength(
    seed, player.name, opponent, *points, player.evaluations, speed
  )


def kind(name: str) -> str:
  """The line of the figure that a player is on."""
  if name == 'network':
    return 'network alone'
  search = 'lookahead' if 'rollout' not in name else 'rollout'
  if name.startswith('gumbel'):
    search = 'tree search' + (' over rollouts' if 'rollout' in name else '')
  return search


def draw(rows: Sequence[Strength], out: pathlib.Path) -> None:
  """Draws score against network evaluations, a panel for each opponent.

  Points are means over seeds, bars their standard errors.
  """
  opponents = [n for n in TITLES if any(r.opponent == n for r in rows)]
  lines = list(dict.fromkeys(kind(row.player) for row in rows))
  figure, panels = style.panels(len(opponents), 4.6, 3.8)
  for axes, opponent in zip(panels[0], opponents):
    for number, line in enumerate(lines):
      points = sorted(
        (p['evaluations'], p[opponent], p[f'{opponent}_se'], p['player'])
        for p in table([r for r in rows if r.opponent == opponent])
        if kind(p['player']) == line and p['evaluations'] is not None
      )
      if points:
        x, y, error, names = zip(*points)
        bars = {'marker': 'o', 'ms': 4, 'lw': 1.2, 'capsize': 2}
        colour = style.colour(number)
        axes.errorbar(x, y, error, label=line, color=colour, **bars)
        _annotate(axes, x, y, names)
    style.label(axes, TITLES[opponent], 'network evaluations a decision')
    axes.set_xscale('log')
  style.legend(figure.axes[0], fontsize=7)
  style.save(figure, out)


def _annotate(axes: Any, x, y, names) -> None:
  for at, height, name in zip(x, y, names):
    short = name.replace('lookahead=', 'l=').replace('rollout=', 'm=')
    axes.annotate(
      short.replace('gumbel=', ''),
      (at, height),
      fontsize=6,
      xytext=(3, 3),
      textcoords='offset points',
    )


def draw_search(rows: Sequence[Strength], out: pathlib.Path) -> None:
  """Draws the network alone and with tree search as bars.

  `rows` have `judge` and `third` among the opponents; bars are means and
  standard errors over seeds.
  """
  titles = {
    'judge': "moves that keep the game's value",
    'third': 'score against a third party',
  }
  figure, panels = style.panels(2, 4, 3.2)
  for axes, (opponent, title) in zip(panels[0], titles.items()):
    lines = table([r for r in rows if r.opponent == opponent])
    trees = [x for x in lines if kind(x['player']) == 'tree search']
    some = [x for x in lines if x['player'] == 'network'] + trees
    names = ['network\nalone', *(x['player'].split('=')[1] for x in trees)]
    bars = axes.bar(
      names,
      [x[opponent] for x in some],
      yerr=[x[f'{opponent}_se'] for x in some],
      color=[style.PALE] + len(trees) * [style.BLUE],
      capsize=3,
    )
    axes.bar_label(bars, fmt='%.2f', fontsize=9, padding=2)
    axes.set_ylim(0, 1)
    style.label(axes, title, 'simulations a move')
  style.save(figure, out, dpi=130)


def table(rows: Sequence[Strength]) -> list[dict[str, Any]]:
  """Means over seeds, one dict per player, with `_se` over seeds."""
  lines = []
  for name in dict.fromkeys(row.player for row in rows):
    own = [row for row in rows if row.player == name]
    line: dict[str, Any] = {'player': name}
    for opponent in dict.fromkeys(row.opponent for row in own):
      some = [row.score for row in own if row.opponent == opponent]
      line[opponent], line[f'{opponent}_se'] = statistics.mean_error(some)
    line['evaluations'] = own[0].evaluations
    lines.append(line)
  return lines


def main() -> None:
  """Plays and draws as the flags say.

  Raises:
    UserError: runs of the study are missing.
  """
  from absl import flags

  values = flags.FLAGS
  folder, results = pathlib.Path(values.folder), pathlib.Path(values.results)
  out = results / f'{values.name}_strength.csv'
  with configs.user_errors():
    configs.check_place('results', results, folder=True)
    names = rf'{re.escape(values.name)}_s(\d+)'
    found = {
      seed: path for (seed,), path in runner.finished(folder, names).items()
    }
    if not found:
      raise configs.UserError(
        f'folder={folder}: no finished runs {values.name}_s* (with an '
        f'evaluation.csv); train them with python -m '
        f'experiments.study {values.name}'
      )
    terminal.begin(
      f'{len(found)} runs of {folder}: {", ".join(values.players)} against '
      f'{", ".join(values.opponents)}, {2 * values.openings} games each'
    )
    rows = run(
      found,
      values.players,
      values.opponents,
      out,
      openings=values.openings,
      opening_plies=values.opening_plies,
    )
  draw(rows, out.with_suffix('.png'))
  if {'judge', 'third'} <= {row.opponent for row in rows}:
    draw_search(rows, out.with_name(out.stem + '_search.png'))
  shown = []
  opponents = list(dict.fromkeys(r.opponent for r in rows))
  for line in table(rows):
    cells = [
      f'{line[n]:.3f} ± {line[n + "_se"]:.3f}' if n in line else ''
      for n in opponents
    ]
    count = line['evaluations']
    shown.append((line['player'], '' if count is None else str(count), *cells))
  terminal.print_table(('player', 'evaluations', *opponents), shown)
  terminal.end(
    f'{out}, {out.with_suffix(".png")}',
    f'python -m experiments.play --workdir={next(iter(found.values()))} '
    '--human --players=gumbel=64',
  )


def define_flags() -> None:
  """The flags of `python -m experiments.study connect_four_players`."""
  from absl import flags

  flags.DEFINE_string('name', 'connect_four', 'the study that trained the runs')
  flags.DEFINE_string(
    'folder', 'runs/studies/connect_four', 'the folder of its runs'
  )
  flags.DEFINE_list('players', list(PLAYERS), 'the players that are measured')
  flags.DEFINE_list(
    'opponents',
    ['judge', 'third', 'solver', 'network'],
    'what the players are measured against',
  )
  flags.DEFINE_integer(
    'openings', 64, 'openings, each played from both sides', 1, 1_000_000
  )
  flags.DEFINE_integer(
    'opening_plies', 4, 'random moves before a game', 0, 10_000
  )
  runner.define_results()
