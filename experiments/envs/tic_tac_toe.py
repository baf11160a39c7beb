"""Tic-tac-toe in JAX: the rules as pure functions of a position."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Game, Move

SIDE = 3
CELLS = SIDE * SIDE
_ROWS = np.arange(CELLS).reshape(SIDE, SIDE)
LINES = np.stack([*_ROWS, *_ROWS.T, np.diag(_ROWS), np.diag(_ROWS[:, ::-1])])


class Board(NamedTuple):
  """A position.

  Attributes:
    stones: bool `[2, 9]`, the stones of the player that began and of the other,
      row by row.
    player: int32 scalar, 0 or 1, the player to move.
  """

  stones: chex.Array
  player: chex.Array


def has_line(stones: chex.Array) -> chex.Array:
  """Whether a player's stones, bool `[9]`, fill a line: bool scalar."""
  return stones[LINES].all(-1).any()


def is_over(board: Board) -> chex.Array:
  """Whether a player has won or the board is full, bool scalar."""
  return jax.vmap(has_line)(board.stones).any() | board.stones.any(0).all()


def game() -> Game:
  """The rules for planners: the first player to fill a line gets reward 1.

  Observations are float32 `[3, 3, 2]`: 1 at the stones of the player to move in
  channel 0, and at the opponent's in channel 1.
  """

  def step(board, action, key):
    del key
    over = is_over(board)
    mover = (jnp.arange(2) == board.player)[:, None]
    cell = (jnp.arange(CELLS) == action)[None]
    after = Board(board.stones | (mover & cell & ~over), board.player)
    won = ~over & has_line(after.stones[after.player])
    ended = over | is_over(after)
    player = jnp.where(over, board.player, 1 - board.player)
    return Move(
      state=after._replace(player=player),
      reward=won.astype(jnp.float32),
      discount=ended.astype(jnp.float32) - 1.0,
    )

  def observe(board):
    own_first = board.player == 0
    stones = jnp.where(own_first, board.stones, board.stones[::-1])
    return stones.T.reshape(SIDE, SIDE, 2).astype(jnp.float32)

  return Game(
    init=lambda key: Board(jnp.zeros((2, CELLS), bool), jnp.int32(0)),
    step=step,
    observe=observe,
    invalid_actions=lambda board: board.stones.any(0) & ~is_over(board),
    player=lambda board: board.player,
    spec=Spec(
      ArraySpec((SIDE, SIDE, 2), np.float32),
      Discrete(CELLS),
      masks_actions=True,
      name='TicTacToe',
    ),
  )
