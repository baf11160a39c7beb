"""MountainCar-v0 in JAX (Moore 1990; Gymnasium's equations and numbers)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Environment, TimeStep

FORCE = 0.001
GRAVITY = 0.0025
MIN_POSITION = -1.2
MAX_POSITION = 0.6
MAX_SPEED = 0.07
GOAL = 0.5


class MountainCarState(NamedTuple):
  """The car's position and velocity, and the number of decisions.

  Attributes:
    position: float32 scalar; the valley's bottom is at -pi / 6.
    velocity: float32 scalar, change of the position per decision.
    steps: int32 scalar, decisions so far.
  """

  position: chex.Array
  velocity: chex.Array
  steps: chex.Array


def make_mountain_car(max_steps: int = 200) -> Environment:
  """Rock a weak car out of a valley: reward -1 at every decision.

  Actions push left (0), not at all (1) or right (2). The wall on the left stops
  the car; the flag on the right terminates the episode. Observations are
  float32 `[2]`, position in [-1.2, 0.6] and velocity in [-0.07, 0.07]. The car
  starts at rest at a position uniform in [-0.6, -0.4]. Other episodes are
  truncated after `max_steps` decisions.

  Raises:
    ValueError: `max_steps` below 1.
  """
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: must be at least 1')

  def time_step(state, is_first):
    there = (state.position >= GOAL) & (state.velocity >= 0)
    return TimeStep(
      observation=jnp.stack([state.position, state.velocity]),
      reward=jnp.float32(0 if is_first else -1),
      discount=1.0 - there.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=(state.steps >= max_steps) & ~there,
    )

  def reset(key):
    position = jax.random.uniform(key, minval=-0.6, maxval=-0.4)
    state = MountainCarState(position, jnp.float32(0), jnp.int32(0))
    return state, time_step(state, True)

  def step(state, action, key):
    del key
    push = FORCE * (jnp.float32(action) - 1)
    velocity = state.velocity + push - GRAVITY * jnp.cos(3 * state.position)
    velocity = jnp.clip(velocity, -MAX_SPEED, MAX_SPEED)
    position = state.position + velocity
    velocity = jnp.where(
      position <= MIN_POSITION, jnp.maximum(velocity, 0), velocity
    )
    position = jnp.clip(position, MIN_POSITION, MAX_POSITION)
    state = MountainCarState(position, velocity, state.steps + 1)
    return state, time_step(state, False)

  spec = Spec(ArraySpec((2,), np.float32), Discrete(3), name='MountainCar')
  return Environment(reset, step, spec)
