"""Perfect play of Connect Four, as an opponent and for judging players.

python -m experiments.study connect_four_positions --positions=300

writes positions in which a move can lose the game's value, with the value of
every move. The solver is bitbully (`pip install 'outplay[opponents]'`, AGPL);
scoring a player on saved positions does not need it.

Axes: `P` positions.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import reading, tables
from experiments.files.errors import UserError
from experiments.playing.players import Player

_RESULTS = pathlib.Path(__file__).parents[1] / 'results'
POSITIONS = _RESULTS / 'connect_four_judged.csv'
COLUMNS = 7


class Judged(NamedTuple):
  """Positions and the value of every move in them.

  Attributes:
    moves: from the empty board to each position, a string of digits.
    value: float64 `[P, 7]`, 1 won, 0 drawn, -1 lost for the player to move; NaN
      where the column is full.
    score: float64 `[P, 7]`, the solver's score, which is higher for an earlier
      win and a later loss.
  """

  moves: tuple[str, ...]
  value: np.ndarray
  score: np.ndarray


class Verdict(NamedTuple):
  """A player's results on judged positions.

  Attributes:
    kept: share of positions in which its move kept the game's value.
    optimal: share in which no other move wins earlier or loses later.
    chance: `kept` of a player that takes a random legal move.
  """

  kept: float
  kept_se: float
  optimal: float
  chance: float


def read(path: pathlib.Path = POSITIONS) -> Judged:
  """Reads judged positions.

  Raises:
    UserError: the file is missing.
  """
  columns = [f'score_{c}' for c in range(COLUMNS)]
  try:
    rows = tables.read_csv(path, ['moves', *columns])[1]
  except reading.Missing as error:
    raise UserError(
      f'{path}: does not exist; write it with python -m experiments.study '
      'connect_four_positions'
    ) from error
  with tables.reading_cells(path):
    score = np.asarray(
      [[float(row[name] or 'nan') for name in columns] for row in rows]
    )
  return Judged(tuple(row['moves'] for row in rows), np.sign(score), score)


def positions(moves: Sequence[str]) -> Any:
  """The positions after moves from the empty board, a `Board` of `[P, ...]`."""
  import jax
  import jax.numpy as jnp

  from experiments.envs import connect_four

  longest = max(map(len, moves))
  # A column outside the board adds no stone; such steps are discarded below.
  padded = [[int(c) for c in m] + [-1] * (longest - len(m)) for m in moves]

  def replay(columns, length):
    def one(i, board):
      after = connect_four.play(board, columns[i])
      return jax.tree.map(
        lambda a, b: jnp.where(i < length, a, b), after, board
      )

    return jax.lax.fori_loop(0, longest, one, connect_four.new_board())

  lengths = jnp.asarray([len(m) for m in moves])
  return jax.jit(jax.vmap(replay))(jnp.asarray(padded), lengths)


def judge(action: np.ndarray, judged: Judged) -> Verdict:
  """Compares a player's moves, int `[P]`, with the values of all moves."""
  rows = np.arange(len(judged.moves))
  best = np.nanmax(judged.value, axis=1)
  kept = judged.value[rows, action] == best
  optimal = judged.score[rows, action] == np.nanmax(judged.score, axis=1)
  keeps = (judged.value == best[:, None]).sum(1)
  legal = np.isfinite(judged.value).sum(1)
  return Verdict(
    kept=float(kept.mean()),
    kept_se=float(np.sqrt(kept.mean() * (1 - kept.mean()) / len(kept))),
    optimal=float(optimal.mean()),
    chance=float(np.mean(keeps / legal)),
  )


def solver() -> Player:
  """A perfect player; of several best moves it takes the most central.

  Raises:
    UserError: the solver is not installed.
  """
  bully, board_type = solver_library()
  known: dict[bytes, int] = {}

  def decide(params, key, timestep):
    from search.model import PolicyOutput

    del params, key
    stones = np.asarray(timestep.observation.stones)
    player = np.asarray(timestep.observation.player)
    invalid = np.asarray(timestep.invalid_actions)
    actions = np.zeros(len(stones), np.int32)
    for row, position in enumerate(stones):
      mark = position.tobytes() + bytes([player[row]])
      if mark not in known:
        known[mark] = _best(bully, board_type, position, invalid[row])
      actions[row] = known[mark]
    zeros = np.zeros(len(stones), np.float32)
    return PolicyOutput(actions, zeros[:, None], zeros)

  return Player('solver', decide, None, 0)


def solver_library() -> tuple[Any, Any]:
  """The solver and its board type.

  Raises:
    UserError: it is not installed.
  """
  try:
    import bitbully  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise UserError(
      "solver: needs bitbully; run pip install 'outplay[opponents]'"
    ) from error
  return bitbully.BitBully(), bitbully.Board


def _best(bully, board_type, stones, invalid) -> int:
  """The best column on a board, uint8 `[2, 7]`; 0 if the game is over."""
  cells = (stones[:, :, None] >> np.arange(6)) & 1
  # Its boards are rows from the top, with 1 for the player that moved first.
  array = (cells[0] + 2 * cells[1]).T[::-1]
  board = board_type(array.tolist())
  if board.is_game_over():
    return 0
  scores = bully.score_all_moves(board)
  legal = [c for c in scores if not invalid[c]]
  return max(legal, key=lambda c: (scores[c], -abs(c - COLUMNS // 2), -c))
