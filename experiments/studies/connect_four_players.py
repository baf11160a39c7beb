"""Strength of players of a game against what they spend, over training seeds.

python -m experiments.study connect_four           # trains, resumes
python -m experiments.study connect_four_players   # plays, resumes

Every player of `PLAYERS` is made of every seed's network. In Connect Four it
is scored by three: perfect play (the share of judged positions in which it
keeps the game's value, and games against the solver), a third party (the next
seed's network under a search), and, as the score that misleads, its own
network alone. A row is written as it comes.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.files import tables, writing
from experiments.playing import (
  arena,
  connect_four_solver,
  match,
  planners,
  players,
)
from experiments.report import terminal
from experiments.runtime import config as configs

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
# Who every player meets: a search with another seed's network.
THIRD = 'gumbel=32'


TITLES = {
  'judge': 'value kept in judged positions',
  'third': f"score against another seed's {THIRD}",
  'solver': 'score against perfect play',
  'network': 'score against its own network (misleads)',
}


class Row(NamedTuple):
  """One line of the study's CSV.

  Attributes:
    seed: of training.
    player: see `PLAYERS`.
    opponent: `judge`, `solver`, `third`, or `network`, its own.
    games: or judged positions.
    score: share of points; for the judge, of positions whose value was kept.
    score_se: standard error over openings or positions.
    optimal: for the judge, the share of moves that none is better than.
    evaluations: of the network a decision; None for rollouts to the end.
    ms_per_decision: wall time in a batch.
    other: seed of the opponent's network; None for those without one.
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


def read(path: pathlib.Path) -> list[Row]:
  """Rows that a study has written so far."""
  whole = lambda text: int(text) if text else None
  with tables.reading_cells(path):
    return [
      Row(
        int(row['seed']),
        row['player'],
        row['opponent'],
        int(row['games']),
        float(row['score']),
        float(row['score_se']),
        float(row['optimal']) if row['optimal'] else None,
        whole(row['evaluations']),
        float(row['ms_per_decision']),
        whole(row['other']),
        whole(row['opening_plies']),
      )
      for row in tables.read_rows(path)
    ]


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes rows, atomically."""
  tables.write_lines(path, [Row._fields, *rows], digits=5)


def run(
  workdirs: Mapping[int, str],
  names: Sequence[str],
  opponents: Sequence[str],
  out: pathlib.Path,
  *,
  openings: int,
  opening_plies: int,
) -> list[Row]:
  """Plays what has not been played yet.

  Args:
    workdirs: a finished run for each seed.
    names: of players.
    opponents: of `Row.opponent`.
    out: the CSV.
    openings: each played from both sides.
    opening_plies: random moves before a game.

  Raises:
    UserError: a run cannot be read, a name is unknown, the solver is not
      installed, or what has been played was played otherwise.
  """
  from rich.progress import Progress

  from experiments import build
  from experiments.build import saved

  rows, seeds = read(out), list(workdirs)
  _check(rows, names, opponents, seeds, openings, opening_plies)
  done = {(row.seed, row.player, row.opponent) for row in rows}
  own = saved.load_experiment(workdirs[seeds[0]])
  game = build.make_env(own, training=False, num_envs=1).spec.game
  if game.spec.name != 'ConnectFour' and {'judge', 'solver'} & {*opponents}:
    raise configs.UserError(
      f'opponents={",".join(opponents)}: judge and solver know Connect Four, '
      f'and this is {game.spec.name}; take third,network'
    )
  starts = match.openings(game, openings, opening_plies)
  solver = connect_four_solver.solver() if 'solver' in opponents else None
  judged = connect_four_solver.read() if 'judge' in opponents else None
  missing = [
    (opponent, seed, name)
    for opponent in opponents
    for seed in seeds
    for name in names
    if (seed, name, opponent) not in done
    and not (opponent == 'network' and name == 'network')
  ]
  with Progress() as bar:
    task = bar.add_task('players', total=len(missing))
    made: dict[tuple[int, str], players.Player] = {}

    def find(seed, name):
      if (seed, name) not in made:
        made[seed, name] = arena.make_player(name, workdirs[seed], own, game)
      return made[seed, name]

    for opponent, seed, name in missing:
      player = find(seed, name)
      bar.update(task, description=f'{opponent}: seed {seed}, {name}')
      if opponent == 'judge':
        assert judged is not None
        row = _judge(seed, player, game, judged)
      else:
        after = seeds[(seeds.index(seed) + 1) % len(seeds)]
        whose = {'solver': None, 'network': seed, 'third': after}[opponent]
        other = solver
        if whose is not None:
          other = find(whose, THIRD if opponent == 'third' else 'network')
        row = _meet(seed, player, opponent, other, game, starts)
        row = row._replace(other=whose, opening_plies=opening_plies)
      rows.append(row)
      write(out, rows)
      bar.advance(task)
  return rows


def _check(rows, names, opponents, seeds, openings, opening_plies) -> None:
  """Refuses what would only fail after the rows before it have been played."""
  for name in names:
    planners.parse(name)
  for opponent in opponents:
    if opponent not in TITLES:
      raise configs.UserError(
        f'opponents={opponent}: must be one of {", ".join(TITLES)}'
      )
  if 'third' in opponents and len(seeds) < 2:
    raise configs.UserError(
      'opponents=third: is the network of another seed, and there is one run'
    )
  played = 2 * openings, opening_plies
  for row in rows:
    before = row.games, row.opening_plies
    if row.opponent in opponents and row.opponent != 'judge':
      if before != played:
        raise configs.UserError(
          f'openings={openings}, opening_plies={opening_plies}: the results '
          f'hold rows of {row.games // 2} and {row.opening_plies}; take those, '
          'or other results'
        )
      after = seeds[(seeds.index(row.seed) + 1) % len(seeds)]
      if row.opponent == 'third' and row.other != after:
        raise configs.UserError(
          f'opponents=third: seed {row.seed} has met seed {row.other}, and of '
          f'these runs it would meet {after}; take other results'
        )


def _judge(seed, player, game, judged) -> Row:
  import jax
  import numpy as np

  positions = connect_four_solver.positions(judged.moves)
  timestep = match.time_step(game, positions)
  output = player.decide(player.params, jax.random.key(seed), timestep)
  verdict = connect_four_solver.judge(np.asarray(output.action), judged)
  return Row(
    seed,
    player.name,
    'judge',
    len(judged.moves),
    verdict.kept,
    verdict.kept_se,
    verdict.optimal,
    player.evaluations,
    match.measure(game, player, positions),
  )


def _meet(seed, player, opponent, other, game, starts) -> Row:
  games = match.play(game, player, other, starts, seed=seed)
  speed = match.measure(game, player, starts)
  result = match.summarise(player, other, games, speed)
  return Row(
    seed,
    player.name,
    opponent,
    result.games,
    result.score,
    result.score_se,
    None,
    player.evaluations,
    speed,
  )


def kind(name: str) -> str:
  """The line of the figure that a player is on."""
  if name == 'network':
    return 'network alone'
  search = 'lookahead' if 'rollout' not in name else 'rollout'
  if name.startswith('gumbel'):
    search = 'tree search' + (' over rollouts' if 'rollout' in name else '')
  return search


def draw(rows: Sequence[Row], out: pathlib.Path) -> None:
  """A panel for each opponent: score against network evaluations.

  Args:
    rows: of the study; a point is the mean over seeds, a bar its standard
      error over them.
    out: a picture.
  """
  # Not pyplot: its figures are global state.
  from matplotlib.figure import Figure

  opponents = [n for n in TITLES if any(r.opponent == n for r in rows)]
  lines = list(dict.fromkeys(kind(row.player) for row in rows))
  figure = Figure((4.6 * len(opponents), 3.8), layout='constrained')
  for axes, opponent in zip(
    figure.subplots(1, len(opponents), squeeze=False)[0], opponents
  ):
    for number, line in enumerate(lines):
      some = [r for r in rows if r.opponent == opponent]
      points = sorted(
        (p['evaluations'], p[opponent], p[f'{opponent}_se'], p['player'])
        for p in table(some)
        if kind(p['player']) == line and p['evaluations'] is not None
      )
      if not points:
        continue
      x, y, error, names = zip(*points)
      axes.errorbar(
        x,
        y,
        error,
        marker='o',
        ms=4,
        lw=1.2,
        capsize=2,
        label=line,
        color=f'C{number}',
      )
      for at, height, name in zip(x, y, names):
        short = name.replace('lookahead=', 'l=').replace('rollout=', 'm=')
        axes.annotate(
          short.replace('gumbel=', ''),
          (at, height),
          fontsize=6,
          xytext=(3, 3),
          textcoords='offset points',
        )
    axes.set(
      xscale='log',
      title=TITLES[opponent],
      xlabel='network evaluations a decision',
    )
    axes.title.set_fontsize(9)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#dddddd', lw=0.7)
  figure.axes[0].legend(fontsize=7)
  writing.write_figure(figure, out)


def draw_search(rows: Sequence[Row], out: pathlib.Path) -> None:
  """The network alone beside the same network with tree search.

  Args:
    rows: of the study, with `judge` and `third` among the opponents.
    out: a picture, with mean and standard error over seeds.
  """
  from matplotlib.figure import Figure

  panels = {
    'judge': "moves that keep the game's value",
    'third': 'score against a third party',
  }
  figure = Figure((8, 3.2), layout='constrained')
  for axes, (opponent, title) in zip(figure.subplots(1, 2), panels.items()):
    lines = table([r for r in rows if r.opponent == opponent])
    trees = [x for x in lines if kind(x['player']) == 'tree search']
    some = [x for x in lines if x['player'] == 'network'] + trees
    names = ['network\nalone', *(x['player'].split('=')[1] for x in trees)]
    bars = axes.bar(
      names,
      [x[opponent] for x in some],
      yerr=[x[f'{opponent}_se'] for x in some],
      color=['#9aa5ad'] + len(trees) * ['#1b4f8f'],
      capsize=3,
    )
    axes.bar_label(bars, fmt='%.2f', fontsize=9, padding=2)
    axes.set(ylim=(0, 1), title=title, xlabel='simulations a move')
    axes.spines[['top', 'right']].set_visible(False)
  writing.write_figure(figure, out, dpi=130)


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Means over seeds, one dict a player, with `_se` over seeds."""
  import numpy as np

  lines = []
  for name in dict.fromkeys(row.player for row in rows):
    line: dict[str, Any] = {'player': name}
    for opponent in dict.fromkeys(row.opponent for row in rows):
      some = [
        r.score for r in rows if (r.player, r.opponent) == (name, opponent)
      ]
      if some:
        line[opponent] = float(np.mean(some))
        spread = np.std(some, ddof=1) if len(some) > 1 else 0.0
        line[f'{opponent}_se'] = float(spread / np.sqrt(len(some)))
    line['evaluations'] = next(r.evaluations for r in rows if r.player == name)
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
    pattern = re.compile(rf'{re.escape(values.name)}_s(\d+)')
    matching = [pattern.fullmatch(p.name) for p in folder.glob('*/')]
    found = {
      int(m[1]): str(folder / m[0])
      for m in sorted(filter(None, matching), key=lambda m: int(m[1]))
      if (folder / m[0] / 'evaluation.csv').exists()
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

  flags.DEFINE_string('name', 'connect_four', 'the study that trained')
  flags.DEFINE_string(
    'folder', 'runs/studies/connect_four', 'where its runs are'
  )
  flags.DEFINE_list('players', list(PLAYERS), 'who plays')
  flags.DEFINE_list(
    'opponents', ['judge', 'third', 'solver', 'network'], 'who scores them'
  )
  flags.DEFINE_integer(
    'openings', 64, 'each played from both sides', 1, 1_000_000
  )
  flags.DEFINE_integer(
    'opening_plies', 4, 'random moves before a game', 0, 10_000
  )
  flags.DEFINE_string('results', 'experiments/results', 'where the CSV goes')
