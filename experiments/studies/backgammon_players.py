"""Backgammon before and after planning, over training seeds and sizes.

python -m experiments.study backgammon       # trains, resumes
python -m experiments.study backgammon_players               # plays, resumes

Every player of `--players` is made of every network, and meets everyone of
`--opponents`: `judge`, GNU Backgammon one ply deeper than its choices, which
says how many points a turn loses (Tesauro and Galperin 1996, Table 3), and
opponents whom it plays games with. A row is written as it comes.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.files import tables, writing
from experiments.playing import arena, match, planners
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.studies import equity

# One stage and two; the five best turns rolled out for each of 21 rolls, in so
# many trials each, for so many turns.
PLAYERS = ('lookahead=1', 'lookahead=2', 'rollout=4x4')
OUTSIDERS = ('pubeval', 'gnubg=0')
JUDGE = 'judge'
_RUN = re.compile(r'hidden_(\d+)_s(\d+)')


class Row(NamedTuple):
  """One line of td_gammon_strength.csv.

  Attributes:
    hidden: units of the network; None for players without.
    seed: of training.
    player: its name.
    opponent: its name, or `judge`.
    games: or judged turns.
    points: a game; for the judge those lost a turn.
    points_se: standard error over pairs of games, or turns.
    gain: for the judge, by how much less than with one stage in the same
      turns; None for opponents and players without a network.
    gain_se: its standard error.
    score: share of games won; None for the judge.
    evaluations: of the network a decision at most, had every turn as many
      boards as there are places; None for rollouts to the end and for players
      without a network.
    ms_per_decision: wall time in a batch.
    plies: of the judge; None for opponents.
  """

  hidden: int | None
  seed: int | None
  player: str
  opponent: str
  games: int
  points: float
  points_se: float
  gain: float | None = None
  gain_se: float | None = None
  score: float | None = None
  evaluations: int | None = None
  ms_per_decision: float | None = None
  plies: int | None = None


def read(path: pathlib.Path) -> list[Row]:
  """Rows that a study has written so far."""
  kinds: dict[str, Any] = dict.fromkeys(Row._fields, float)
  kinds |= dict.fromkeys(('player', 'opponent'), str)
  kinds |= dict.fromkeys(
    ('hidden', 'seed', 'games', 'evaluations', 'plies'), int
  )

  def cell(name: str, text: str) -> Any:
    return kinds[name](text) if text else None

  with tables.reading_cells(path):
    return [
      Row(**{n: cell(n, row[n]) for n in Row._fields})
      for row in tables.read_rows(path)
    ]


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes rows, atomically."""
  tables.write_lines(path, [Row._fields, *rows], digits=5)


def finished(folder: pathlib.Path) -> dict[tuple[int, int], str]:
  """Folders of finished runs by units and seed.

  Raises:
    UserError: there are none.
  """
  matching = (_RUN.fullmatch(path.name) for path in folder.glob('*/'))
  found = {
    (int(m[1]), int(m[2])): str(folder / m[0])
    for m in matching
    # Written last: parameters are there before the end.
    if m and (folder / m[0] / 'evaluation.csv').exists()
  }
  if not found:
    raise configs.UserError(
      f'folder={folder}: no finished runs hidden_*_s*; train them with '
      'python -m experiments.study backgammon'
    )
  return dict(sorted(found.items()))


class Plan(NamedTuple):
  """What is played.

  Attributes:
    players: names.
    opponents: names; `judge` is one.
    games: with each opponent.
    positions: judged turns.
    plies: of the judge.
  """

  players: Sequence[str]
  opponents: Sequence[str]
  games: int
  positions: int
  plies: int


def run(
  workdirs: Mapping[tuple[int, int], str], plan: Plan, out: pathlib.Path
) -> list[Row]:
  """Plays what has not been played yet.

  Args:
    workdirs: from `finished`.
    plan: what.
    out: the CSV.

  Raises:
    UserError: a run cannot be read, a name is unknown, gnubg-nn is not
      installed, or what has been played was played otherwise.
  """
  from rich.progress import Progress

  rows = read(out)
  _check(rows, plan)
  done = {(row.hidden, row.seed, row.player, row.opponent) for row in rows}
  missing = [
    (opponent, key, name)
    for opponent in plan.opponents
    for key in workdirs
    for name in plan.players
    if (*key, name, opponent) not in done
  ]
  arenas = _Arenas(workdirs, plan)
  for _, key, name in missing:  # before the first one takes minutes
    arenas.find(key, name)
  if any(opponent == JUDGE for opponent, _, _ in missing):
    judged = arenas.listen()
    for name in OUTSIDERS:
      if (None, None, name, JUDGE) not in done:
        row = outsider(arenas.find(None, name), judged)
        rows.append(row._replace(plies=plan.plies))
  with Progress() as bar:
    task = bar.add_task('players', total=len(missing))
    for opponent, key, name in missing:
      where = f'{key[0]} units, seed {key[1]}'
      bar.update(task, description=f'{opponent}: {where}, {name}')
      play = arenas.judge if opponent == JUDGE else arenas.meet
      rows.append(play(key, name, opponent))
      write(out, rows)
      bar.advance(task)
  return rows


class _Arenas:
  """Plays rows, with what several of them need."""

  def __init__(self, workdirs, plan: Plan):
    from experiments import build
    from experiments.build import saved

    self._workdirs, self._plan = workdirs, plan
    first = next(iter(workdirs.values()))
    own = saved.load_experiment(first)
    self._game = build.make_env(own, training=False, num_envs=1).spec.game
    if self._game is None or self._game.spec.name != 'backgammon':
      raise configs.UserError(
        f'folder: {first} plays {own.env_name}, and this is about backgammon'
      )
    self._host = arena.other_players(self._game)
    self._made: dict[Any, Any] = {}
    self._decide: dict[Any, Any] = {}
    self._judged: list[Any] = []
    self._first: dict[Any, Any] = {}
    self._speed: dict[Any, float] = {}
    self._starts: Any = None
    self._others = {n: self.find(None, n) for n in plan.opponents if n != JUDGE}

  def find(self, key, name: str) -> Any:
    """A player; of no run for those without."""
    from experiments.build import saved

    if key is None:
      found = self._host(name)
      if found is None:
        raise configs.UserError(
          f'opponents={name}: must be judge, pubeval or gnubg=PLIES'
        )
      return found
    if (key, name) not in self._made:
      workdir = self._workdirs[key]
      own = saved.load_experiment(workdir)
      player = arena.make_player(name, workdir, own, self._game, self._host)
      # Seeds of one size differ in parameters alone, and compile once.
      first = self._decide.setdefault((key[0], name), player.decide)
      self._made[key, name] = player._replace(decide=first)
    return self._made[key, name]

  def listen(self) -> Sequence[Any]:
    """Asks the judge about all turns, and remembers."""
    self._judged = equity.judged(self._plan.positions, self._plan.plies)
    return self._judged

  def judge(self, key, name: str, opponent: str) -> Row:
    """What a player loses a turn."""
    del opponent
    player = self.find(key, name)
    if key not in self._first:
      first = self.find(key, 'lookahead=1')
      self._first[key] = _losses(first, self._judged)
    losses = _losses(player, self._judged)
    found = equity.compare(name, losses, self._first[key])
    return _judged_row(found)._replace(
      hidden=key[0],
      seed=key[1],
      gain=found.less,
      gain_se=found.less_se,
      evaluations=player.evaluations,
      plies=self._plan.plies,
    )

  def meet(self, key, name: str, opponent: str) -> Row:
    """Games with an opponent."""
    player, other = self.find(key, name), self._others[opponent]
    if self._starts is None:
      self._starts = match.openings(self._game, self._plan.games // 2, 0)
    starts = self._starts
    if (key, name) not in self._speed:
      self._speed[key, name] = match.measure(self._game, player, starts)
    speed = self._speed[key, name]
    tick = terminal.ticker(f'{name} against {opponent}: move')
    games = match.play(
      self._game, player, other, starts, seed=key[1], progress=tick
    )
    result = match.summarise(player, other, games, speed)
    return Row(
      key[0],
      key[1],
      name,
      opponent,
      result.games,
      result.points,
      result.points_se,
      score=result.score,
      evaluations=player.evaluations,
      ms_per_decision=speed,
    )


def outsider(player: Any, judged: Sequence[Any]) -> Row:
  """What a player without a network loses a turn.

  Args:
    player: a `players.Player`.
    judged: from `equity.judged`.
  """
  losses = _losses(player, judged)
  return _judged_row(equity.compare(player.name, losses, losses))


def _losses(player, judged) -> Any:
  from experiments.playing import gnubg

  return gnubg.equity_loss(equity.planned(player), judged)


def _judged_row(found: equity.Row) -> Row:
  return Row(
    None,
    None,
    found.player,
    JUDGE,
    found.positions,
    found.loss,
    found.loss_se,
  )


def _check(rows: Sequence[Row], plan: Plan) -> None:
  """Refuses what would only fail after the rows before it have been played."""
  for name in plan.players:
    planners.parse(name)
  if plan.games % 2:
    raise configs.UserError(
      f'games={plan.games}: must be even, every opening is played twice'
    )
  for row in rows:
    asked = plan.positions if row.opponent == JUDGE else plan.games
    if row.opponent not in plan.opponents:
      continue
    if row.opponent == JUDGE and row.plies != plan.plies:
      raise configs.UserError(
        f'plies={plan.plies}: the results hold rows of {row.plies}; take '
        'those, or other results'
      )
    if row.games != asked:
      field = 'positions' if row.opponent == JUDGE else 'games'
      raise configs.UserError(
        f'{field}={asked}: the results hold rows of {row.games}; take those, '
        'or other results'
      )


class Mean(NamedTuple):
  """A player of one size against one opponent, over seeds.

  Attributes:
    hidden: units.
    player: its name.
    opponent: its name.
    points: mean over seeds.
    points_se: standard error over them; of the games of the one there is.
    seeds: how many.
  """

  hidden: int | None
  player: str
  opponent: str
  points: float
  points_se: float
  seeds: int


def means(rows: Sequence[Row]) -> list[Mean]:
  """Over seeds."""
  import numpy as np

  keys = dict.fromkeys((r.hidden, r.player, r.opponent) for r in rows)
  found = []
  for key in keys:
    some = [r for r in rows if (r.hidden, r.player, r.opponent) == key]
    points = [r.points for r in some]
    error = some[0].points_se
    if len(some) > 1:
      error = float(np.std(points, ddof=1) / np.sqrt(len(some)))
    found.append(Mean(*key, float(np.mean(points)), error, len(some)))
  return found


def draw(rows: Sequence[Row], out: pathlib.Path) -> None:
  """A panel for each opponent, bars for players, colours for sizes.

  Args:
    rows: of the study.
    out: a picture.
  """
  # Not pyplot: its figures are global state.
  from matplotlib.figure import Figure

  found = means(rows)
  opponents = list(dict.fromkeys(row.opponent for row in rows))
  sizes = [h for h in dict.fromkeys(m.hidden for m in found) if h is not None]
  figure = Figure((4.2 * len(opponents), 3.4), layout='constrained')
  panels = figure.subplots(1, len(opponents), squeeze=False)[0]
  for axes, opponent in zip(panels, opponents):
    some = [m for m in found if m.opponent == opponent]
    names = list(dict.fromkeys(m.player for m in some if m.hidden is not None))
    for number, hidden in enumerate(sizes):
      bars = [m for m in some if m.hidden == hidden]
      width = 0.8 / len(sizes)
      axes.bar(
        [names.index(m.player) + (number + 0.5) * width - 0.4 for m in bars],
        [m.points for m in bars],
        width,
        yerr=[m.points_se for m in bars],
        capsize=2,
        color=f'C{number}',
        label=f'{hidden} units',
      )
    for number, mean in enumerate(m for m in some if m.hidden is None):
      axes.axhline(
        mean.points, color='#888888', lw=1, ls=('--', ':')[number % 2]
      )
      axes.text(
        0.99,
        mean.points,
        mean.player,
        fontsize=7,
        ha='right',
        va='bottom',
        transform=axes.get_yaxis_transform(),
      )
    title = f'points a game against {opponent}'
    axes.set_title(
      'points lost a turn' if opponent == JUDGE else title, fontsize=9
    )
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=15)
    axes.axhline(0, color='black', lw=0.7)
    axes.spines[['top', 'right']].set_visible(False)
  figure.axes[0].legend(fontsize=7)
  writing.write_figure(figure, out, dpi=140)


def main() -> None:
  """Plays and draws as the flags say.

  Raises:
    UserError: runs of the study are missing.
  """
  from absl import flags

  values = flags.FLAGS
  results = pathlib.Path(values.results)
  out = results / 'td_gammon_strength.csv'
  plan = Plan(
    values.players,
    values.opponents,
    values.games,
    values.positions,
    values.plies,
  )
  with configs.user_errors():
    configs.check_place('results', results, folder=True)
    found = finished(pathlib.Path(values.folder))
    terminal.begin(
      f'{len(found)} runs of {values.folder}: {", ".join(plan.players)} '
      f'against {", ".join(plan.opponents)}; {plan.games} games each, '
      f'{plan.positions} judged turns'
    )
    rows = run(found, plan, out)
  draw(rows, out.with_suffix('.png'))
  terminal.print_table(
    ('units', 'player', 'opponent', 'points', 'seeds'),
    [
      (
        '' if mean.hidden is None else str(mean.hidden),
        mean.player,
        mean.opponent,
        f'{mean.points:+.4f} ± {mean.points_se:.4f}',
        str(mean.seeds),
      )
      for mean in means(rows)
    ],
  )
  terminal.end(
    f'{out}, {out.with_suffix(".png")}',
    f'python -m experiments.play --workdir={next(iter(found.values()))} '
    '--human --players=lookahead=2',
  )


def define_flags() -> None:
  """The flags of `python -m experiments.study backgammon_players`."""
  from absl import flags

  flags.DEFINE_string('folder', 'runs/studies/backgammon', 'where its runs are')
  flags.DEFINE_list('players', list(PLAYERS), 'who plays')
  flags.DEFINE_list('opponents', [JUDGE, *OUTSIDERS], 'who scores them')
  flags.DEFINE_integer('games', 100, 'with each opponent', 4, 1_000_000)
  flags.DEFINE_integer('positions', 300, 'judged turns', 2, 1_000_000)
  flags.DEFINE_integer('plies', 1, 'that the judge looks ahead', 0, 7)
  flags.DEFINE_string('results', 'experiments/results', 'where the CSV goes')
