"""Self-play as an environment: the agent moves for all sides.

Time steps contain the position itself, because the agent plans with the rules
(`search.model.exact`) and applies its networks to `game.observe(position)`.
A replay of positions is also smaller.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec
from search.model import Environment, Game, TimeStep


def random_action(game: Game, state: Any, key: chex.PRNGKey) -> chex.Array:
  """Draws a legal action uniformly; any action if the game is over.

  It is an int32 scalar, or one of the game's candidates `[...]`.
  """
  if game.candidates is None:
    assert game.invalid_actions is not None
    valid = ~game.invalid_actions(state)
    actions = jnp.arange(valid.shape[0], dtype=jnp.int32)
  else:
    actions = game.candidates(state)
    flat = actions.reshape(actions.shape[0], -1)
    # Unused rows repeat the first candidate.
    again = (flat == flat[:1]).all(-1)
    valid = ~again | (jnp.arange(flat.shape[0]) == 0)
  noise = jax.random.uniform(key, valid.shape)
  return actions[jnp.argmax(noise + valid)]


def self_play(game: Game, opening_plies: int = 0) -> Environment:
  """An environment in which the agent plays all sides of a game.

  A time step's observation is the position (a pytree), its reward is that of
  the player that moved *into* the position, and its discount is 0 if the game
  is over, else 1. The player to move is `game.player(observation)`.

  Args:
    opening_plies: games begin after a uniformly drawn number of random moves up
      to this one, so that a policy that has become deterministic still visits
      other positions; an opening that ends the game is discarded.

  Raises:
    ValueError: `opening_plies` is negative.
  """
  if opening_plies < 0:
    raise ValueError(f'opening_plies={opening_plies}: must be 0 or more')

  def time_step(state, reward, discount, is_first):
    invalid = None
    if game.invalid_actions is not None:
      invalid = game.invalid_actions(state)
    return TimeStep(
      observation=state,
      reward=jnp.asarray(reward, jnp.float32),
      discount=jnp.abs(jnp.asarray(discount, jnp.float32)),
      is_first=jnp.asarray(is_first),
      truncated=jnp.asarray(False),
      invalid_actions=invalid,
    )

  def opened(start, key):
    """The position after an opening; the start if the opening ends the game."""
    count_key, key = jax.random.split(key)
    count = jax.random.randint(count_key, (), 0, opening_plies + 1)

    def move(number, carry):
      state, goes_on = carry
      action_key, step_key = jax.random.split(jax.random.fold_in(key, number))
      action = random_action(game, state, action_key)
      after = game.step(state, action, step_key)
      return after.state, goes_on & (after.discount != 0)

    begin = start, jnp.asarray(True)
    state, goes_on = jax.lax.fori_loop(0, count, move, begin)
    return jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), state, start)

  def reset(key):
    init_key, opening_key = jax.random.split(key)
    state = game.init(init_key)
    if opening_plies:
      state = opened(state, opening_key)
    return state, time_step(state, 0.0, 1.0, True)

  def step(state, action, key):
    move = game.step(state, action, key)
    return move.state, time_step(move.state, move.reward, move.discount, False)

  shapes = jax.eval_shape(game.init, jax.random.key(0))
  observation = jax.tree.map(
    lambda x: ArraySpec(x.shape, np.dtype(x.dtype)), shapes
  )
  spec = game.spec._replace(
    observation=observation,
    masks_actions=game.invalid_actions is not None,
    name=f'{game.spec.name} against itself',
    game=game,
  )
  return Environment(reset, step, spec)
