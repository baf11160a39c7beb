"""CartPole-v1 in JAX (Barto, Sutton and Anderson 1983; Gymnasium's numbers)."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Environment, TimeStep

GRAVITY = 9.8
CART_MASS = 1.0
POLE_MASS = 0.1
TOTAL_MASS = CART_MASS + POLE_MASS
HALF_LENGTH = 0.5
FORCE = 10.0
SECONDS = 0.02
MAX_ANGLE = 12 * math.pi / 180
MAX_POSITION = 2.4


class CartPoleState(NamedTuple):
  """The physics of cart and pole, and the number of decisions.

  Attributes:
    physics: float32 `[4]`, position (m), velocity (m/s), angle (rad), its
      velocity (rad/s).
    steps: int32 scalar, decisions so far.
  """

  physics: chex.Array
  steps: chex.Array


def make_cartpole(max_steps: int = 500) -> Environment:
  """Balance a pole: reward 1 per decision until the pole falls.

  Observations are the physics, float32 `[4]`; action 0 pushes left, 1 right.
  An episode is truncated after `max_steps` decisions if the pole has not
  fallen.

  Raises:
    ValueError: `max_steps` below 1.
  """
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: must be at least 1')

  def time_step(state, is_first):
    fallen = (jnp.abs(state.physics[0]) > MAX_POSITION) | (
      jnp.abs(state.physics[2]) > MAX_ANGLE
    )
    return TimeStep(
      observation=state.physics,
      reward=jnp.float32(0 if is_first else 1),
      discount=1.0 - fallen.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=(state.steps >= max_steps) & ~fallen,
    )

  def reset(key):
    physics = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    state = CartPoleState(physics, jnp.int32(0))
    return state, time_step(state, True)

  def step(state, action, key):
    del key
    _, v, angle, spin = state.physics
    force = jnp.where(action == 1, FORCE, -FORCE)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force + POLE_MASS * HALF_LENGTH * spin**2 * sin) / TOTAL_MASS
    spin_rate = (GRAVITY * sin - cos * push) / (
      HALF_LENGTH * (4 / 3 - POLE_MASS * cos**2 / TOTAL_MASS)
    )
    v_rate = push - POLE_MASS * HALF_LENGTH * spin_rate * cos / TOTAL_MASS
    # Explicit Euler: positions move by the old velocities.
    delta = jnp.stack([v, v_rate, spin, spin_rate])
    state = CartPoleState(state.physics + SECONDS * delta, state.steps + 1)
    return state, time_step(state, False)

  spec = Spec(ArraySpec((4,), np.float32), Discrete(2), name='CartPole')
  return Environment(reset, step, spec)
