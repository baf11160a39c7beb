"""Backgammon with and without planning, over training seeds and sizes.

  python -m experiments.study backgammon          # trains, resumes
  python -m experiments.study backgammon_players  # plays, resumes

Every player of `--players` is made of every network and meets each of
`--opponents`: games, or `judge`, GNU Backgammon looking one ply beyond each
choice, for the points lost a turn (Tesauro and Galperin 1996, Table 3). Each
row is written at once.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import build
from experiments.build import saved
from experiments.files import tables
from experiments.playing import arena, gnubg, match, planners
from experiments.report import statistics, style, terminal
from experiments.runtime import config as configs
from experiments.studies import equity, runner

# One stage and two; the five best turns, each rolled out after each of the 21
# rolls, in four trials of four turns.
PLAYERS = ('lookahead=1', 'lookahead=2', 'rollout=4x4')
OUTSIDERS = ('pubeval', 'gnubg=0')
JUDGE = 'judge'


class Points(NamedTuple):
  """What a player wins or loses: a line of td_gammon_strength.csv.

  Attributes:
    hidden: units of the network; None without one.
    opponent: its name, or `judge`.
    games: number of games, or of judged turns.
    points: points per game; for the judge, those lost per turn.
    points_se: standard error over pairs of games, or turns.
    gain: for the judge, points saved relative to one stage in the same turns;
      else, or without a network, None.
    score: share of games won; None for the judge.
    evaluations: of the network per decision at most, had every turn as many
      boards as there are places; None for rollouts to the end and without a
      network.
    ms_per_decision: wall time per decision in a batch, in milliseconds.
    plies: plies that the judge looks ahead; None for opponents.
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


# The fields that identify a cell of the table.
CELL = ('opponent', 'hidden', 'seed', 'player')


def finished(folder: pathlib.Path) -> dict[tuple[int, ...], str]:
  """Folders of finished runs by units and seed.

  Raises:
    UserError: there are none.
  """
  found = runner.finished(folder, r'hidden_(\d+)_s(\d+)')
  if not found:
    raise configs.UserError(
      f'folder={folder}: no finished runs hidden_*_s*; train them with '
      'python -m experiments.study backgammon'
    )
  return found


class Plan(NamedTuple):
  """What is played.

  `judge` may be among the opponents; `games` are with each of them, `positions`
  the judged turns, and `plies` the judge's.
  """

  players: Sequence[str]
  opponents: Sequence[str]
  games: int
  positions: int
  plies: int


def run(
  workdirs: Mapping[tuple[int, ...], str], plan: Plan, out: pathlib.Path
) -> list[Points]:
  """Plays what has not been played yet.

  Raises:
    UserError: a run cannot be read, a name is unknown, gnubg-nn is not
      installed, or earlier rows have other settings.
  """
  rows = tables.read_records(out, Points)
  _check(rows, plan)
  cells = [
    (opponent, *key, name)
    for opponent in plan.opponents
    for key in workdirs
    for name in plan.players
  ]
  others = [(JUDGE, None, None, name) for name in OUTSIDERS]
  cells = runner.missing(rows, CELL, cells)
  arenas = _Arenas(workdirs, plan)
  for _, *key, name in cells:  # Before the first one takes minutes.
    arenas.find(tuple(key), name)
  if any(opponent == JUDGE for opponent, *_ in cells):
    arenas.listen()
    cells = runner.missing(rows, CELL, others) + cells
  runner.fill(out, rows, cells, arenas.play, digits=5)
  return rows


class _Arenas:
  """Plays rows, with what several of them share."""

  def __init__(self, workdirs, plan: Plan):
    self._workdirs, self._plan = workdirs, plan
    first = next(iter(workdirs.values()))
    own = saved.load_experiment(first)
    self._game = build.make_env(own, training=False, num_envs=1).spec.game
    if self._game is None or self._game.spec.name != 'backgammon':
      raise configs.UserError(
        f'folder: {first} plays {own.env_name}, must be backgammon'
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
    """A player, of the run of a key or, for None, without a network."""
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
      # Seeds of one size differ only in parameters, and compile once.
      first = self._decide.setdefault((key[0], name), player.decide)
      self._made[key, name] = player._replace(decide=first)
    return self._made[key, name]

  def listen(self) -> None:
    """Asks the judge about all turns."""
    self._judged = equity.judged_turns(self._plan.positions, self._plan.plies)

  def play(
    self, opponent: str, hidden: int | None, seed: int | None, name: str
  ) -> Points:
    """Plays a cell, given as `CELL`."""
    if hidden is None:
      row = outsider(self.find(None, name), self._judged)
      return row._replace(plies=self._plan.plies)
    if opponent == JUDGE:
      return self._lose((hidden, seed), name)
    return self._meet((hidden, seed), name, opponent)

  def _lose(self, key, name: str) -> Points:
    """The points that a player loses per turn."""
    player = self.find(key, name)
    if key not in self._first:
      first = self.find(key, 'lookahead=1')
      self._first[key] = _losses(first, self._judged)
    losses = _losses(player, self._judged)
    found = equity.compare(name, losses, self._first[key])
    return _points(found)._replace(
      hidden=key[0],
      seed=key[1],
      gain=found.less,
      gain_se=found.less_se,
      evaluations=player.evaluations,
      plies=self._plan.plies,
    )

  def _meet(self, key, name: str, opponent: str) -> Points:
    """The points of games against an opponent."""
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
    return Points(
      *key,
      player=name,
      opponent=opponent,
      games=result.games,
      points=result.points,
      points_se=result.points_se,
      score=result.score,
      evaluations=player.evaluations,
      ms_per_decision=speed,
    )


def outsider(player: Any, judged: Sequence[Any]) -> Points:
  """The points that a player without a network loses per turn."""
  losses = _losses(player, judged)
  return _points(equity.compare(player.name, losses, losses))


def _losses(player, judged) -> Any:
  return gnubg.equity_loss(equity.planned(player), judged)


def _points(found: equity.Lost) -> Points:
  loss = found.positions, found.loss, found.loss_se
  return Points(None, None, found.player, JUDGE, *loss)


def _check(rows: Sequence[Points], plan: Plan) -> None:
  """Refuses at once what would fail only after the first rows are played."""
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
        f'plies={plan.plies}: the results hold rows with plies={row.plies}; '
        f'set plies={row.plies}, or write to another --results folder'
      )
    if row.games != asked:
      field = 'positions' if row.opponent == JUDGE else 'games'
      raise configs.UserError(
        f'{field}={asked}: the results hold rows with {field}={row.games}; set '
        f'{field}={row.games}, or write to another --results folder'
      )


class Mean(NamedTuple):
  """A player of one size against one opponent, over seeds.

  `points_se` is over seeds; over the games if there is only one.
  """

  hidden: int | None
  player: str
  opponent: str
  points: float
  points_se: float
  seeds: int


def means(rows: Sequence[Points]) -> list[Mean]:
  """Averages over seeds."""
  groups: dict[tuple[int | None, str, str], list[Points]] = {}
  for row in rows:
    groups.setdefault((row.hidden, row.player, row.opponent), []).append(row)
  found = []
  for key, own in groups.items():
    points = [row.points for row in own]
    mean, error = statistics.mean_error(points, alone=own[0].points_se)
    found.append(Mean(*key, mean, error, len(own)))
  return found


def draw(rows: Sequence[Points], out: pathlib.Path) -> None:
  """Draws a panel for each opponent, bars for players, colours for sizes."""
  found = means(rows)
  opponents = list(dict.fromkeys(row.opponent for row in rows))
  figure, panels = style.panels(len(opponents), 4.2, 3.4)
  for axes, opponent in zip(panels[0], opponents):
    _panel(axes, [mean for mean in found if mean.opponent == opponent])
    title = f'points a game against {opponent}'
    style.label(axes, 'points lost a turn' if opponent == JUDGE else title)
  style.legend(figure.axes[0], fontsize=7)
  style.save(figure, out, dpi=140)


def _panel(axes: Any, found: Sequence[Mean]) -> None:
  """Draws bars of players with a network, and lines of those without."""
  own = [mean for mean in found if mean.hidden is not None]
  names = list(dict.fromkeys(mean.player for mean in own))
  sizes = list(dict.fromkeys(mean.hidden for mean in own))
  width = 0.8 / max(len(sizes), 1)
  for number, hidden in enumerate(sizes):
    bars = [mean for mean in own if mean.hidden == hidden]
    axes.bar(
      [names.index(m.player) + (number + 0.5) * width - 0.4 for m in bars],
      [m.points for m in bars],
      width,
      yerr=[m.points_se for m in bars],
      capsize=2,
      label=f'{hidden} units',
    )
  for number, mean in enumerate(m for m in found if m.hidden is None):
    stroke = ('--', ':')[number % 2]
    axes.axhline(mean.points, color=style.GREY, lw=1, ls=stroke)
    axes.text(
      *(0.99, mean.points, mean.player),
      fontsize=7,
      ha='right',
      va='bottom',
      transform=axes.get_yaxis_transform(),
    )
  axes.set_xticks(range(len(names)), names, fontsize=7, rotation=15)
  axes.axhline(0, color='black', lw=0.7)


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

  flags.DEFINE_string(
    'folder', 'runs/studies/backgammon', 'the folder of the runs'
  )
  flags.DEFINE_list('players', list(PLAYERS), 'the players that are measured')
  flags.DEFINE_list(
    'opponents', [JUDGE, *OUTSIDERS], 'what the players are measured against'
  )
  flags.DEFINE_integer('games', 100, 'games with each opponent', 4, 1_000_000)
  flags.DEFINE_integer('positions', 300, 'judged turns', 2, 1_000_000)
  flags.DEFINE_integer('plies', 1, 'plies that the judge looks ahead', 0, 7)
  runner.define_results()
