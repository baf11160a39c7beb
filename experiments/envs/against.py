"""A game against an opponent as an environment of positions.

The agent plays one side, drawn at the reset; the opponent answers inside
`step`. Observations are those of `self_play`, so agents that were trained by
self-play can be evaluated here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.envs.self_play import random_action, self_play
from search.model import Environment, Game, TimeStep

# `(position, key) -> action`, which must be legal.
Opponent = Callable[[Any, chex.PRNGKey], chex.Array]


class AgainstState(NamedTuple):
  """A position and the agent's side.

  Attributes:
    side: int32 scalar, the number of the agent's player.
  """

  position: Any
  side: chex.Array


def random_opponent(game: Game) -> Opponent:
  """Draws a legal action uniformly; any action if the game is over."""

  return functools.partial(random_action, game)


def against(game: Game, opponent: str | Opponent = 'random') -> Environment:
  """An environment in which the agent plays against an opponent.

  Rewards are the agent's: the opponent's are subtracted. The agent is to move
  at every time step except the last. The spec is that of `self_play(game)`
  under another name.

  Raises:
    ValueError: the opponent is neither `'random'` nor a function.
  """
  if opponent == 'random':
    opponent = random_opponent(game)
  if not callable(opponent):
    raise ValueError(f"opponent={opponent!r}: must be 'random' or a function")
  answer = opponent

  def time_step(state, reward, goes_on, is_first):
    invalid = None
    if game.invalid_actions is not None:
      invalid = game.invalid_actions(state.position)
    return TimeStep(
      observation=state.position,
      reward=reward,
      discount=goes_on.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=jnp.asarray(False),
      invalid_actions=invalid,
    )

  def answered(state, reward, goes_on, key):
    """Lets the opponent move as long as it is its turn."""

    def is_its_turn(carry):
      position, _, goes_on, _ = carry
      return goes_on & (game.player(position) != state.side)

    def move(carry):
      position, reward, _, key = carry
      key, choice_key, move_key = jax.random.split(key, 3)
      move = game.step(position, answer(position, choice_key), move_key)
      return move.state, reward - move.reward, move.discount != 0, key

    start = state.position, reward, goes_on, key
    position, reward, goes_on, _ = jax.lax.while_loop(is_its_turn, move, start)
    return state._replace(position=position), reward, goes_on

  def reset(key):
    side_key, init_key, move_key = jax.random.split(key, 3)
    side = jax.random.bernoulli(side_key).astype(jnp.int32)
    state = AgainstState(game.init(init_key), side)
    start = jnp.float32(0), jnp.asarray(True)
    state, reward, goes_on = answered(state, *start, move_key)
    return state, time_step(state, jnp.zeros_like(reward), goes_on, True)

  def step(state, action, key):
    own_key, their_key = jax.random.split(key)
    move = game.step(state.position, action, own_key)
    state, reward, goes_on = answered(
      state._replace(position=move.state),
      jnp.asarray(move.reward, jnp.float32),
      move.discount != 0,
      their_key,
    )
    return state, time_step(state, reward, goes_on, False)

  spec = self_play(game).spec._replace(
    name=f'{game.spec.name} against an opponent'
  )
  return Environment(reset, step, spec)
