r"""Points that players of backgammon lose a turn, as GNU Backgammon sees it.

python -m experiments.study equity --workdir=runs/td \
  --players=lookahead=1,lookahead=2

The table is that of Tesauro and Galperin 1996 (Table 3): turns with contact and
a choice, what the best choice is worth and what the player's is. gnubg looks
`--plies` beyond each choice. It also judges pubeval and a random player.
"""

import pathlib
from typing import Any, NamedTuple

from experiments import build
from experiments.build import saved
from experiments.files import tables
from experiments.playing import arena, gnubg
from experiments.report import statistics, terminal
from experiments.runtime import config as configs

# Turns decided on together.
_BATCH = 8


class Lost(NamedTuple):
  """What a player loses a turn: a line of equity.csv.

  Attributes:
    loss: expected points lost a turn.
    less: loss of the first player less this one's, in the same turns.
    less_se: standard error of that difference.
  """

  player: str
  positions: int
  loss: float
  loss_se: float
  less: float
  less_se: float


def judged_turns(positions: int, plies: int) -> list[Any]:
  """Turns, always the same, and the worth of each choice, `gnubg.Judged`.

  `positions` are at least 2, `plies` the judge's.

  Raises:
    UserError: gnubg-nn is not installed.
  """
  from rich.progress import track

  boards, dice = gnubg.contact_positions(positions, seed=1)
  found = []
  for i in track(range(positions), description='gnubg judges'):
    found += gnubg.judge(boards[i : i + 1], dice[i : i + 1], plies)
  return found


def compare(name: str, losses: Any, first: Any) -> Lost:
  """Compares a player's `gnubg.Loss` with another's in the same turns."""
  less = first.each - losses.each
  loss = losses.mean, losses.standard_error
  return Lost(name, len(less), *loss, *statistics.mean_error(less))


def planned(player: Any) -> Any:
  """A `players.Player` as a `gnubg.Player`, a few turns at a time."""
  return gnubg.planned(
    lambda key, timestep: player.decide(player.params, key, timestep).action,
    _BATCH,
  )


def main() -> None:
  """Judges as the flags say.

  Raises:
    UserError: the run is not one of backgammon.
  """
  from absl import flags

  values = flags.FLAGS
  with configs.user_errors():
    if values.out:
      configs.check_place('out', values.out)
    players = _players(values)
    terminal.begin(
      f'gnubg, {values.plies} plies deep, judges {values.positions} turns of '
      f'{", ".join(players)}'
    )
    turns = judged_turns(values.positions, values.plies)
    losses = {n: gnubg.equity_loss(p, turns) for n, p in players.items()}
  first = next(iter(losses.values()))
  rows = [compare(name, each, first) for name, each in losses.items()]
  terminal.print_table(
    ('player', 'points lost a turn', 'less than the first'),
    [
      (
        row.player,
        f'{row.loss:.4f} ± {row.loss_se:.4f}',
        f'{row.less:+.4f} ± {row.less_se:.4f}',
      )
      for row in rows
    ],
  )
  out = pathlib.Path(values.out or f'{values.workdir}/equity.csv')
  tables.write_records(out, rows, digits=5)
  terminal.end(
    str(out), f'python -m experiments.play --workdir={values.workdir} --human'
  )


def _players(values) -> dict[str, Any]:
  """The players that the flags name, pubeval and a random one."""
  experiment = saved.load_experiment(values.workdir)
  game = build.make_env(experiment, training=False, num_envs=1).spec.game
  if game is None or game.spec.name != 'backgammon':
    raise configs.UserError(
      f'workdir={values.workdir}: plays {experiment.env_name}, must be '
      'backgammon'
    )

  find = lambda name: planned(
    arena.make_player(name, values.workdir, experiment, game)
  )
  named = {name: find(name) for name in values.players}
  return named | {'pubeval': gnubg.pubeval(), 'random': gnubg.random_player}


def define_flags() -> None:
  """The flags of `python -m experiments.study equity`."""
  from absl import flags

  flags.DEFINE_string('workdir', None, 'the folder of a run', required=True)
  flags.DEFINE_list(
    'players', ['lookahead=1', 'lookahead=2'], 'the players that are judged'
  )
  flags.DEFINE_integer('positions', 200, 'judged turns', 2, 1_000_000)
  flags.DEFINE_integer('plies', 1, 'plies that gnubg looks ahead', 0, 7)
  flags.DEFINE_string('out', None, 'the CSV; WORKDIR/equity.csv if left out')
