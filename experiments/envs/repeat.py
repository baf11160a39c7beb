"""Action repeat for pure environments."""

import jax
import jax.numpy as jnp

from search.model import Environment


def repeat_action(env: Environment, times: int) -> Environment:
  """An environment whose decisions are `times` steps of another environment.

  Rewards are summed; the other fields are the last step's. The last decision of
  an episode ends with the episode, so it may be shorter.

  Raises:
    ValueError: `times` is not an integer of at least 1.
  """
  if not isinstance(times, int) or times < 1:
    raise ValueError(
      f'{env.spec.name}: action_repeat={times!r} must be an integer of at '
      'least 1'
    )
  if times == 1:
    return env

  def step(state, action, key):
    def once(carry, key):
      _, timestep = carry
      after, new = env.step(carry[0], action, key)
      new = new._replace(reward=timestep.reward + new.reward)
      over = timestep.is_last()
      pick = lambda old, new: jnp.where(over, old, new)
      return jax.tree.map(pick, carry, (after, new)), None

    keys = jax.random.split(key, times)
    first = env.step(state, action, keys[0])
    return jax.lax.scan(once, first, keys[1:])[0]

  return env._replace(step=step)
