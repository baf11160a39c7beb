"""A point mass in many dimensions that is pushed to a target; our own task."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Continuous, Spec
from search.model import Environment, TimeStep

SECONDS = 0.1
GAIN = 4.0
SHARPNESS = 4.0
CONTROL_COST = 0.05


class PointMassState(NamedTuple):
  """The mass's position and velocity, its target and the number of decisions.

  Attributes:
    position: float32 `[D]`.
    velocity: float32 `[D]`.
    target: float32 `[D]`.
    steps: int32 scalar, decisions so far.
  """

  position: chex.Array
  velocity: chex.Array
  target: chex.Array
  steps: chex.Array


def make_point_mass(dimensions: int = 2, max_steps: int = 50) -> Environment:
  """Push a frictionless point in the box [-1, 1]^D to a target and stop there.

  Actions are float32 `[D]` in [-1, 1], clipped: accelerations of at most 4 per
  second squared, held for 0.1 s. A wall stops the velocity against it. Start
  and target are uniform in [-1, 1]^D, and the start is at rest. The reward
  exp(-4 |position - target|^2) (1 - 0.05 mean(action^2)), in (0, 1], is high
  only if all dimensions are right, which is ever rarer under a random policy as
  D grows. Observations are float32 `[3 D]`: position, velocity, target.
  Episodes never terminate; they are truncated after `max_steps` decisions.
  `discretise` makes large discrete action sets of it: 7 bins in 4 dimensions
  are 2,401 actions.

  Raises:
    ValueError: `dimensions` or `max_steps` below 1.
  """
  if dimensions < 1 or max_steps < 1:
    raise ValueError(
      f'dimensions={dimensions}, max_steps={max_steps}: both must be at least 1'
    )

  def time_step(state, reward, is_first):
    return TimeStep(
      observation=jnp.concatenate(
        [state.position, state.velocity, state.target]
      ),
      reward=jnp.float32(reward),
      discount=jnp.float32(1),
      is_first=jnp.asarray(is_first),
      truncated=state.steps >= max_steps,
    )

  def reset(key):
    position, target = jax.random.uniform(
      key, (2, dimensions), minval=-1.0, maxval=1.0
    )
    rest = jnp.zeros(dimensions)
    state = PointMassState(position, rest, target, jnp.int32(0))
    return state, time_step(state, 0, True)

  def step(state, action, key):
    del key
    action = jnp.clip(action, -1, 1)
    velocity = state.velocity + SECONDS * GAIN * action
    position = state.position + SECONDS * velocity
    velocity = jnp.where(jnp.abs(position) > 1, 0.0, velocity)
    position = jnp.clip(position, -1, 1)
    state = PointMassState(position, velocity, state.target, state.steps + 1)
    distance = jnp.sum((position - state.target) ** 2)
    cost = CONTROL_COST * jnp.mean(action**2)
    reward = jnp.exp(-SHARPNESS * distance) * (1 - cost)
    return state, time_step(state, reward, False)

  one = np.ones((dimensions,), np.float32)
  spec = Spec(
    ArraySpec((3 * dimensions,), np.float32),
    Continuous((dimensions,), -one, one),
    name='PointMass',
  )
  return Environment(reset, step, spec)
