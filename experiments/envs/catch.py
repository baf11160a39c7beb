"""Catch in JAX: bsuite's falling ball (Osband et al. 2020, catch.py)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Environment, TimeStep


class CatchState(NamedTuple):
  """The places of ball and paddle; the paddle moves in the bottom row.

  Attributes:
    ball_row: int32 scalar.
    ball_column: int32 scalar.
    paddle_column: int32 scalar.
  """

  ball_row: chex.Array
  ball_column: chex.Array
  paddle_column: chex.Array


def make_catch(rows: int = 10, columns: int = 5) -> Environment:
  """Catch a ball that falls from a random column.

  An episode has `rows - 1` decisions (0 left, 1 stay, 2 right) and ends with
  reward 1 (caught) or -1 (missed). Observations are float32
  `[rows, columns, 1]`, 1 at the ball and at the paddle.

  Raises:
    ValueError: `rows` below 2 or `columns` below 1.
  """
  if rows < 2 or columns < 1:
    raise ValueError(
      f'rows={rows}, columns={columns}: need at least 2 rows and 1 column'
    )

  def time_step(state, is_first):
    row, column = jnp.indices((rows, columns))
    ball = (row == state.ball_row) & (column == state.ball_column)
    paddle = (row == rows - 1) & (column == state.paddle_column)
    landed = state.ball_row == rows - 1
    caught = state.ball_column == state.paddle_column
    return TimeStep(
      observation=(ball | paddle).astype(jnp.float32)[..., None],
      reward=jnp.where(landed, jnp.where(caught, 1.0, -1.0), 0.0),
      discount=1.0 - landed.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=jnp.asarray(False),
    )

  def reset(key):
    column = jax.random.randint(key, (), 0, columns)
    state = CatchState(jnp.int32(0), column, jnp.int32(columns // 2))
    return state, time_step(state, True)

  def step(state, action, key):
    del key
    state = CatchState(
      state.ball_row + 1,
      state.ball_column,
      jnp.clip(state.paddle_column + action - 1, 0, columns - 1).astype(
        jnp.int32
      ),
    )
    return state, time_step(state, False)

  spec = Spec(ArraySpec((rows, columns, 1), np.float32), Discrete(3))
  return Environment(reset, step, spec._replace(name='Catch'))
