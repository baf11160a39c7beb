"""A game against oneself as an environment: every mover is the agent.

Time steps carry the position itself, for the agent plans in the rules
(`search.model.exact`) and shows its networks what `game.observe` makes of it;
a replay that keeps positions is small, too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec
from search.model import Environment, Game, TimeStep


def self_play(game: Game) -> Environment:
  """The environment in which an agent plays all sides of a game.

  Of a time step the observation is the position (a pytree), the reward is what
  whoever moved *into* it got, `discount` is 0 where the game is over, else 1.
  Who moves, and so the sign of what follows, is `game.player(observation)`.

  Args:
    game: the rules.

  Returns:
    An unbatched `Environment`; its `spec.game` is the game.
  """

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

  def reset(key):
    state = game.init(key)
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
