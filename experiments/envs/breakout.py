"""MinAtar's Breakout in JAX, written from its rules (Young and Tian 2019)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Environment, TimeStep

SIZE = 10
BOTTOM = SIZE - 1
# Three rows of bricks below an empty one.
WALL = np.zeros((SIZE, SIZE), bool)
WALL[1:4] = True


class BreakoutState(NamedTuple):
  """A state; rows count down from the top, columns from the left.

  Attributes:
    paddle: int32 scalar, the paddle's column in the bottom row.
    ball: int32 `[2]`, row and column of the ball.
    velocity: int32 `[2]`, -1 or 1 each, cells per decision.
    trail: int32 `[2]`, row and column of the ball one decision ago.
    bricks: bool `[10, 10]`, whether a cell has a brick.
    inside: bool scalar, whether the ball touched a brick at the last decision;
      it breaks no other brick until a decision without a touch.
    lost: bool scalar, whether the ball passed the paddle.
    action: int32 scalar, the last action that was carried out.
    steps: int32 scalar, decisions so far.
  """

  paddle: chex.Array
  ball: chex.Array
  velocity: chex.Array
  trail: chex.Array
  bricks: chex.Array
  inside: chex.Array
  lost: chex.Array
  action: chex.Array
  steps: chex.Array


def make_breakout(sticky: float = 0.1, max_steps: int = 1000) -> Environment:
  """Break bricks with a ball and a paddle of one cell: reward 1 per brick.

  Observations are float32 `[10, 10, 4]`, 0 or 1: paddle, ball, trail (the ball
  one decision ago, which shows its direction), bricks. Actions are 0 stay, 1
  left and 2 right, the only ones of MinAtar's six that have an effect here. The
  episode terminates when the ball is lost. When no brick is left, a new wall
  appears as soon as the ball reaches the bottom row, even if lost.

  Args:
    sticky: probability in [0, 1) that the previous action (0 at first) is
      repeated; the default is the paper's.
    max_steps: decisions until an episode is truncated, unless the ball is lost
      just then; MinAtar has no limit, but a good player would play for ever.

  Raises:
    ValueError: `sticky` outside [0, 1), `max_steps` below 1.
  """
  if not 0 <= sticky < 1:
    raise ValueError(f'sticky={sticky}: must be a probability below 1')
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: must be at least 1')

  def time_step(state, reward, is_first):
    paddle = _cell(BOTTOM, state.paddle)
    channels = [paddle, _cell(*state.ball), _cell(*state.trail), state.bricks]
    return TimeStep(
      observation=jnp.stack(channels, axis=-1).astype(jnp.float32),
      reward=jnp.float32(reward),
      discount=1.0 - state.lost.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=(state.steps >= max_steps) & ~state.lost,
    )

  def reset(key):
    right = jax.random.bernoulli(key)
    ball = jnp.where(right, jnp.int32([3, BOTTOM]), jnp.int32([3, 0]))
    state = BreakoutState(
      paddle=jnp.int32(4),
      ball=ball,
      velocity=jnp.where(right, jnp.int32([1, -1]), jnp.int32([1, 1])),
      trail=ball,
      bricks=jnp.asarray(WALL),
      inside=jnp.asarray(False),
      lost=jnp.asarray(False),
      action=jnp.int32(0),
      steps=jnp.int32(0),
    )
    return state, time_step(state, 0, True)

  def step(state, action, key):
    action = jnp.int32(action)
    if sticky:
      repeat = jax.random.bernoulli(key, sticky)
      action = jnp.where(repeat, state.action, action)
    state, reward = _move(state, action)
    return state, time_step(state, reward, False)

  spec = Spec(ArraySpec((SIZE, SIZE, 4), np.float32), Discrete(3))
  return Environment(reset, step, spec._replace(name='Breakout'))


def _cell(row, column):
  """bool `[10, 10]`, True at one cell; all False outside the board."""
  cells = jnp.arange(SIZE)
  return (cells == row)[:, None] & (cells == column)[None]


def _move(state, action):
  """The paddle's move, then the ball's: `(state, bricks broken)`."""
  move = (action == 2).astype(jnp.int32) - (action == 1)
  paddle = jnp.clip(state.paddle + move, 0, SIZE - 1)
  down, right = state.velocity
  old_row, old_column = state.ball
  row, column = state.ball + state.velocity

  # A wall turns the ball in the cell before it, so that it slides along it for
  # one decision; other surfaces are judged from there.
  side = (column < 0) | (column >= SIZE)
  column = jnp.clip(column, 0, SIZE - 1)
  ceiling = row < 0
  row = jnp.maximum(row, 0)

  touched = state.bricks & _cell(row, column)
  inside = touched.any()
  broken = inside & ~state.inside
  bottom = row == BOTTOM
  # The paddle may be below the ball or, as its near edge, where it is going.
  below = bottom & (old_column == paddle)
  edge = bottom & ~below & (column == paddle)

  bounced = broken | below | edge
  bricks = state.bricks & ~(touched & broken)
  renewed = bottom & ~state.bricks.any()
  state = BreakoutState(
    paddle=paddle,
    ball=jnp.stack([jnp.where(bounced, old_row, row), column]),
    velocity=jnp.stack(
      [
        jnp.where(ceiling | bounced, -down, down),
        jnp.where(side ^ edge, -right, right),
      ]
    ),
    trail=state.ball,
    bricks=jnp.where(renewed, WALL, bricks),
    inside=inside,
    lost=bottom & ~(below | edge),
    action=action,
    steps=state.steps + 1,
  )
  return state, broken
