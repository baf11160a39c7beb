"""Random positions of Connect Four, judged by a perfect solver.

python -m experiments.study connect_four_positions --positions=300
"""

import pathlib

import numpy as np

from experiments.files import tables
from experiments.playing import connect_four_solver
from experiments.report import terminal
from experiments.runtime import config as configs


def make_positions(number: int, seed: int = 0) -> connect_four_solver.Judged:
  """Random positions in which at least one legal move errs.

  8 to 26 random moves lead to each.

  Raises:
    UserError: the solver is not installed.
  """
  bully, board_type = connect_four_solver.solver_library()
  tick = terminal.ticker('position', number)
  rng = np.random.default_rng(seed)
  found: dict[str, list[float]] = {}
  while len(found) < number:
    board, moves = board_type(), ''
    for _ in range(rng.integers(8, 27)):
      moves += str(rng.choice(list(board.legal_moves())))
      board.play(int(moves[-1]))
      if board.is_game_over():
        break
    if board.is_game_over() or moves in found:
      continue
    scores = bully.score_all_moves(board)
    if len(set(np.sign(list(scores.values())))) > 1:
      found[moves] = [
        scores.get(c, np.nan) for c in range(connect_four_solver.COLUMNS)
      ]
      tick(len(found))
  score = np.asarray(list(found.values()), float)
  return connect_four_solver.Judged(tuple(found), np.sign(score), score)


def define_flags() -> None:
  """The flags of `python -m experiments.study connect_four_positions`."""
  from absl import flags

  flags.DEFINE_integer('positions', 300, 'number of positions', 1, 1_000_000)
  flags.DEFINE_integer(
    'seed', 0, 'seed of the moves that lead to them', 0, configs.MAX_SEED
  )
  flags.DEFINE_string('out', str(connect_four_solver.POSITIONS), 'the CSV')


def main() -> None:
  """Writes judged positions as the flags say.

  Raises:
    UserError: flags that do not fit together.
  """
  from absl import flags

  values = flags.FLAGS
  configs.check_place('out', values.out)
  connect_four_solver.solver_library()
  terminal.begin(
    f'{values.positions} positions of Connect Four, solved', compiles=False
  )
  with configs.user_errors():
    judged = make_positions(values.positions, values.seed)
  columns = [f'score_{c}' for c in range(connect_four_solver.COLUMNS)]
  lines = [
    [moves, *(None if np.isnan(x) else int(x) for x in scores)]
    for moves, scores in zip(judged.moves, judged.score)
  ]
  tables.write_lines(pathlib.Path(values.out), [['moves', *columns], *lines])
  terminal.end(values.out, 'python -m experiments.study connect_four_players')
