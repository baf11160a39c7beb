"""Acrobot-v1 in JAX (Sutton 1996, the book's equations; Gymnasium's numbers).

Two links of mass 1 kg, length 1 m and moment of inertia 1 kg m^2, each with
its centre of mass in its middle; the joint between them is driven.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Environment, TimeStep

GRAVITY = 9.8
MASS = 1.0
LENGTH = 1.0
CENTRE = 0.5
INERTIA = 1.0
SECONDS = 0.2
MAX_SPEED_1 = 4 * math.pi
MAX_SPEED_2 = 9 * math.pi
HEIGHT = 1.0


class AcrobotState(NamedTuple):
  """The links' angles and velocities, and the number of decisions.

  Attributes:
    physics: float32 `[4]`, the first link's angle (rad, 0 hanging), the
      second's relative to it, then their velocities (rad/s).
    steps: int32 scalar, decisions so far.
  """

  physics: chex.Array
  steps: chex.Array


def make_acrobot(max_steps: int = 500) -> Environment:
  """Swing the tip one link's length above the pivot.

  Actions are torques of -1, 0 or 1 N m at the middle joint for 0.2 s (one
  fourth-order Runge-Kutta step). The reward is -1 per decision, and 0 for the
  one that reaches the goal and terminates the episode. Observations are float32
  `[6]`: cosine and sine of each angle, then both velocities, within 4 pi and 9
  pi rad/s. The initial state is uniform in [-0.1, 0.1]^4. Other episodes are
  truncated after `max_steps` decisions.

  Raises:
    ValueError: `max_steps` below 1.
  """
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: must be at least 1')

  def time_step(state, is_first):
    angle_1, angle_2, speed_1, speed_2 = state.physics
    there = -jnp.cos(angle_1) - jnp.cos(angle_1 + angle_2) > HEIGHT
    cosines_sines = [
      f(angle) for angle in (angle_1, angle_2) for f in (jnp.cos, jnp.sin)
    ]
    return TimeStep(
      observation=jnp.stack([*cosines_sines, speed_1, speed_2]),
      reward=jnp.float32(0) if is_first else there.astype(jnp.float32) - 1,
      discount=1.0 - there.astype(jnp.float32),
      is_first=jnp.asarray(is_first),
      truncated=(state.steps >= max_steps) & ~there,
    )

  def reset(key):
    physics = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    state = AcrobotState(physics, jnp.int32(0))
    return state, time_step(state, True)

  def step(state, action, key):
    del key
    torque = jnp.float32(action) - 1
    x = state.physics
    k1 = _derivative(x, torque)
    k2 = _derivative(x + SECONDS / 2 * k1, torque)
    k3 = _derivative(x + SECONDS / 2 * k2, torque)
    k4 = _derivative(x + SECONDS * k3, torque)
    x = x + SECONDS / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    angles = (x[:2] + math.pi) % (2 * math.pi) - math.pi
    limit = jnp.array([MAX_SPEED_1, MAX_SPEED_2])
    physics = jnp.concatenate([angles, jnp.clip(x[2:], -limit, limit)])
    state = AcrobotState(physics, state.steps + 1)
    return state, time_step(state, False)

  spec = Spec(ArraySpec((6,), np.float32), Discrete(3), name='Acrobot')
  return Environment(reset, step, spec)


def _derivative(physics, torque):
  """Time derivative of the physics, `[4]` (Sutton and Barto's equations)."""
  angle_1, angle_2, speed_1, speed_2 = physics
  sin, cos = jnp.sin(angle_2), jnp.cos(angle_2)
  arm = MASS * LENGTH * CENTRE
  d2 = MASS * CENTRE**2 + arm * cos + INERTIA
  d1 = d2 + MASS * (CENTRE**2 + LENGTH**2) + arm * cos + INERTIA
  phi2 = MASS * CENTRE * GRAVITY * jnp.sin(angle_1 + angle_2)
  phi1 = (
    -arm * speed_2 * (speed_2 + 2 * speed_1) * sin
    + MASS * (CENTRE + LENGTH) * GRAVITY * jnp.sin(angle_1)
    + phi2
  )
  rate_2 = (torque + d2 / d1 * phi1 - arm * speed_1**2 * sin - phi2) / (
    MASS * CENTRE**2 + INERTIA - d2**2 / d1
  )
  rate_1 = -(d2 * rate_2 + phi1) / d1
  return jnp.stack([speed_1, speed_2, rate_1, rate_2])
