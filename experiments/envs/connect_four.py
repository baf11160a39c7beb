"""Connect Four in JAX: the rules, and the game against an opponent.

The rules are pure functions of a `Board`; `game` packs them for search and
self-play. A column is a word of six bits whose lowest bit is the lowest cell.
Stones fill a column from below, so the next free cell is the union of both
players' words plus 1, and lines cannot wrap around an edge.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Environment, Game, Move, TimeStep

ROWS = 6
COLUMNS = 7
FULL = 2**ROWS - 1

_SPEC = Spec(
  ArraySpec((ROWS, COLUMNS, 2), np.float32),
  Discrete(COLUMNS),
  masks_actions=True,
  name='ConnectFour',
)


class Board(NamedTuple):
  """A position.

  Attributes:
    stones: uint8 `[2, 7]`, the columns of the player that began and of the
      other; bit `r` is the cell `r` above the lowest.
    player: int32 scalar, 0 or 1, the player to move.
  """

  stones: chex.Array
  player: chex.Array


def new_board() -> Board:
  """The empty board; player 0 is to move."""
  return Board(jnp.zeros((2, COLUMNS), jnp.uint8), jnp.int32(0))


def legal(board: Board) -> chex.Array:
  """Columns that are not full, bool `[7]`, even if the game is over."""
  return (board.stones[0] | board.stones[1]) != FULL


def play(board: Board, column: chex.Array) -> Board:
  """Drops a stone of the player to move and passes the turn.

  No stone drops into a full column or outside the board. Whether the game is
  over is not checked.

  Args:
    column: int32 scalar, from the left.
  """
  # In a full column this is the bit above the top, which the mask clears.
  free = ((board.stones[0] | board.stones[1]) + 1) & FULL
  drop = jnp.where(jnp.arange(COLUMNS) == column, free, 0).astype(jnp.uint8)
  mover = jnp.arange(2) == board.player
  return Board(
    board.stones | jnp.where(mover[:, None], drop[None], 0).astype(jnp.uint8),
    1 - board.player,
  )


def winner(board: Board) -> chex.Array:
  """The player with four in a line: int32 scalar, 0 or 1, -1 for nobody."""
  x = board.stones
  a, b, c, d = (x[:, i : i + COLUMNS - 3] for i in range(4))
  across = (
    (a & b & c & d)
    | (a & (b >> 1) & (c >> 2) & (d >> 3))
    | ((a >> 3) & (b >> 2) & (c >> 1) & d)
  )
  up = x & (x >> 1) & (x >> 2) & (x >> 3)
  won = (across != 0).any(-1) | (up != 0).any(-1)
  return jnp.where(won[0], 0, jnp.where(won[1], 1, -1)).astype(jnp.int32)


def is_over(board: Board) -> chex.Array:
  """Whether a player has won or the board is full (a draw), bool scalar."""
  return (winner(board) >= 0) | ~legal(board).any()


def observe(board: Board, side: chex.Array) -> chex.Array:
  """The board from one side's (int32 scalar, 0 or 1) view.

  Returns:
    float32 `[6, 7, 2]`, the top row first: 1 at the side's own stones in
    channel 0, and at the opponent's in channel 1.
  """
  stones = jnp.where(side == 0, board.stones, board.stones[::-1])
  shifts = jnp.arange(ROWS - 1, -1, -1, dtype=jnp.uint8)
  cells = (stones.T[None] >> shifts[:, None, None]) & 1
  return cells.astype(jnp.float32)


def random_column(board: Board, key: chex.PRNGKey) -> chex.Array:
  """Draws a legal column uniformly, int32 scalar; any if the board is full."""
  noise = jax.random.uniform(key, (COLUMNS,))
  return jnp.argmax(noise + legal(board)).astype(jnp.int32)


def game() -> Game:
  """The rules for planners; a position is a `Board`.

  The first player with four in a line gets reward 1. Observations are those of
  `observe` from the view of the player to move.
  """

  def step(board, action, key):
    del key
    over = is_over(board)
    after = _select(over, board, play(board, action))
    won = ~over & (winner(after) >= 0)
    ended = over | is_over(after)
    return Move(
      state=after,
      reward=won.astype(jnp.float32),
      discount=ended.astype(jnp.float32) - 1.0,
    )

  return Game(
    init=lambda key: new_board(),
    step=step,
    observe=lambda board: observe(board, board.player),
    invalid_actions=lambda board: ~legal(board) & ~is_over(board),
    player=lambda board: board.player,
    spec=_SPEC,
  )


class ConnectFourState(NamedTuple):
  """A position and the agent's side.

  Attributes:
    side: int32 scalar, the number of the agent's player.
  """

  board: Board
  side: chex.Array


def make_connect_four(
  opponent: str | Callable[[Board, chex.PRNGKey], chex.Array] = 'random',
) -> Environment:
  """Connect Four against an opponent that answers inside `step`.

  The player to begin is drawn at the reset; if it is the opponent, it has
  already moved. The reward comes at the end: 1 won, -1 lost, 0 drawn. Full
  columns are `invalid_actions`; choosing one loses at once. Observations are
  those of `observe`; on the last time step no action is marked invalid. The
  opponent is `'random'` for uniformly drawn legal columns, or a function
  `(board, key) -> column`, which must be legal.

  Raises:
    ValueError: any other name.
  """
  if opponent == 'random':
    opponent = random_column
  if not callable(opponent):
    raise ValueError(f"opponent={opponent!r}: must be 'random' or a function")
  answer = opponent

  def time_step(state, foul, is_first):
    won = winner(state.board)
    lost = foul | (won == 1 - state.side)
    over = foul | is_over(state.board)
    return TimeStep(
      observation=observe(state.board, state.side),
      reward=(won == state.side).astype(jnp.float32) - lost,
      discount=1.0 - over.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=jnp.asarray(False),
      invalid_actions=~legal(state.board) & ~over,
    )

  def reset(key):
    side_key, move_key = jax.random.split(key)
    side = jax.random.bernoulli(side_key).astype(jnp.int32)
    board = new_board()
    answered = play(board, answer(board, move_key))
    state = ConnectFourState(_select(side == 1, answered, board), side)
    return state, time_step(state, jnp.asarray(False), True)

  def step(state, action, key):
    is_legal = (legal(state.board) & (jnp.arange(COLUMNS) == action)).any()
    board = play(state.board, action)
    answered = play(board, answer(board, key))
    board = _select(is_over(board) | ~is_legal, board, answered)
    state = ConnectFourState(board, state.side)
    return state, time_step(state, ~is_legal, False)

  return Environment(reset, step, _SPEC)


def _select(condition, yes, no):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
