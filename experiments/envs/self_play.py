"""A game against oneself as an environment: every mover is the agent.

Time steps carry the position itself, for the agent plans in the rules
(`search.model.exact`) and shows its networks what `game.observe` makes of it;
a replay that keeps positions is small, too.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec
from search.model import Environment, Game, TimeStep


def random_action(game: Game, state: Any, key: chex.PRNGKey) -> chex.Array:
  """A legal action, all alike; any where the game is over.

  Args:
    game: the rules.
    state: a position.
    key: consumed.

  Returns:
    int32 scalar, or one of the game's candidates `[...]`.
  """
  if game.candidates is None:
    assert game.invalid_actions is not None
    valid = ~game.invalid_actions(state)
    actions = jnp.arange(valid.shape[0], dtype=jnp.int32)
  else:
    actions = game.candidates(state)
    flat = actions.reshape(actions.shape[0], -1)
    # Behind the last one the first is repeated.
    again = (flat == flat[:1]).all(-1)
    valid = ~again | (jnp.arange(flat.shape[0]) == 0)
  noise = jax.random.uniform(key, valid.shape)
  return actions[jnp.argmax(noise + valid)]


def self_play(game: Game, opening_plies: int = 0) -> Environment:
  """The environment in which an agent plays all sides of a game.

  Of a time step the observation is the position (a pytree), the reward is what
  whoever moved *into* it got, `discount` is 0 where the game is over, else 1.
  Who moves, and so the sign of what follows, is `game.player(observation)`.

  Args:
    game: the rules.
    opening_plies: games begin after up to so many random moves, any number
      alike, so that players that have become sure of theirs still see other
      positions; an opening that ends its game is thrown away for the start.

  Returns:
    An unbatched `Environment`; its `spec.game` is the game.

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
    """The position after an opening, or the start."""
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
