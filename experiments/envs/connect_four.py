"""Connect Four in JAX: the rules, and the game against an opponent.

The rules are pure functions of a `Board`; `game` is what search and self-play
take. A column
is a word of six bits, its lowest cell the lowest bit: stones fill a column
from below, so the next free cell is `stones of both + 1`, and since no line
leaves its words nothing can wrap around the edges.
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
    stones: uint8 `[2, 7]`, the columns of the player who began and of the
      other one; bit `r` is the cell `r` above the lowest.
    player: int32 scalar, 0 or 1, whose move it is.
  """

  stones: chex.Array
  player: chex.Array


def new_board() -> Board:
  """The empty board; player 0 is to move."""
  return Board(jnp.zeros((2, COLUMNS), jnp.uint8), jnp.int32(0))


def legal(board: Board) -> chex.Array:
  """Columns that are not full, bool `[7]`; it does not ask for a winner."""
  return (board.stones[0] | board.stones[1]) != FULL


def play(board: Board, column: chex.Array) -> Board:
  """Drops a stone of the player to move; the other one is next.

  Nothing drops into a full column, or one outside the board. Whether the game
  was over before is not asked.

  Args:
    board: the position.
    column: int32 scalar, from the left.
  """
  # Of a full column this is the bit above it, which the mask takes away.
  free = ((board.stones[0] | board.stones[1]) + 1) & FULL
  drop = jnp.where(jnp.arange(COLUMNS) == column, free, 0).astype(jnp.uint8)
  mover = jnp.arange(2) == board.player
  return Board(
    board.stones | jnp.where(mover[:, None], drop[None], 0).astype(jnp.uint8),
    1 - board.player,
  )


def winner(board: Board) -> chex.Array:
  """Who has four in a line: int32 scalar, 0 or 1, and -1 for nobody."""
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
  """Whether somebody has won or the board is full (a draw), bool scalar."""
  return (winner(board) >= 0) | ~legal(board).any()


def observe(board: Board, side: chex.Array) -> chex.Array:
  """The board as a side sees it.

  Args:
    board: the position.
    side: int32 scalar, 0 or 1.

  Returns:
    float32 `[6, 7, 2]`, the top row first: 1 at one's own stones in channel 0,
    at the other one's in channel 1.
  """
  stones = jnp.where(side == 0, board.stones, board.stones[::-1])
  shifts = jnp.arange(ROWS - 1, -1, -1, dtype=jnp.uint8)
  cells = (stones.T[None] >> shifts[:, None, None]) & 1
  return cells.astype(jnp.float32)


def random_column(board: Board, key: chex.PRNGKey) -> chex.Array:
  """A legal column, all alike: int32 scalar. Any one if the board is full."""
  noise = jax.random.uniform(key, (COLUMNS,))
  return jnp.argmax(noise + legal(board)).astype(jnp.int32)


def game() -> Game:
  """The rules for planners; a position is a `Board`.

  Whoever has four in a line gets 1. Observations are those of `observe`, as
  the player to move sees them.
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
  """A position, and whose side the agent is on.

  Attributes:
    board: the position.
    side: int32 scalar, which of its players the agent is.
  """

  board: Board
  side: chex.Array


def make_connect_four(
  opponent: str | Callable[[Board, chex.PRNGKey], chex.Array] = 'random',
) -> Environment:
  """Connect Four against an opponent that answers inside `step`.

  Who begins is drawn at the reset; the opponent, if it does, has moved
  already. The reward comes at the end: 1 won, -1 lost, 0 drawn. A full column
  may not be chosen (`invalid_actions`); whoever does so loses at once.
  Observations are those of `observe`; on the last time step no action is
  marked invalid, since none is carried out.

  Args:
    opponent: `'random'` for legal columns, all alike, or a function `(board,
      key) -> column`, which must be legal.

  Raises:
    ValueError: another name.
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
