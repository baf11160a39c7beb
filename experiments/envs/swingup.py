"""Cart-pole swing-up in JAX, after the DeepMind Control Suite's.

The suite's `cartpole swingup` (Tassa et al. 2018) as equations of motion: a
cart of 1 kg on a rail, a capsule of 0.1 kg hinged to it, light damping, and
MuJoCo's soft limit at the rail's ends, integrated by the same fourth-order
Runge-Kutta rule in steps of 0.01 s. It differs from MuJoCo in its float32
numbers and by MuJoCo's solver tolerances; `tests/test_envs_continuous.py`
bounds the difference.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Continuous, Spec
from experiments.envs.repeat import repeat_action
from search.model import Environment, TimeStep

GRAVITY = 9.81
CART_MASS = 1.0
POLE_MASS = 0.1
POLE_LENGTH = 1.0
POLE_RADIUS = 0.045
GEAR = 10.0
RAIL = 1.8
CART_DAMPING = 5e-4
POLE_DAMPING = 2e-6
SECONDS = 0.01
# MuJoCo's soft limit: time constant (s), smallest and largest impedance, and
# the depth (m) over which one becomes the other.
LIMIT_SECONDS = 0.08
LIMIT_IMPEDANCE = (0.9, 0.95)
LIMIT_WIDTH = 0.001


def _pole_inertia() -> float:
  """Moment of inertia of a solid capsule about its hinge, kg m^2."""
  height, radius = POLE_LENGTH, POLE_RADIUS
  tube, ball = height * radius**2, 4 / 3 * radius**3  # Volumes over pi.
  tube_mass = POLE_MASS * tube / (tube + ball)
  ball_mass = POLE_MASS - tube_mass
  about_centre = (
    tube_mass * (3 * radius**2 + height**2) / 12
    + ball_mass * (2 / 5 * radius**2)
    + ball_mass * height * (3 * radius + 2 * height) / 8
  )
  return about_centre + POLE_MASS * (height / 2) ** 2


INERTIA = _pole_inertia()
TOTAL_MASS = CART_MASS + POLE_MASS
LEVER = POLE_MASS * POLE_LENGTH / 2


class SwingupState(NamedTuple):
  """The physics of cart and pole, and the number of simulator steps.

  Attributes:
    physics: float32 `[4]`, position (m), angle (rad, 0 upright), velocity
      (m/s), angular velocity (rad/s).
    steps: int32 scalar, simulator steps so far.
  """

  physics: chex.Array
  steps: chex.Array


def make_swingup(max_steps: int = 1000, action_repeat: int = 1) -> Environment:
  """Swing a pole up by moving its cart, and balance it in the middle.

  Observations are float32 `[5]`, the suite's in its order: position, cosine and
  sine of the angle, velocity, angular velocity. Actions are float32 `[1]` in
  [-1, 1], clipped, times 10 N. The reward of a simulator step is in [0, 1], the
  product of how upright, centred, idle and slow it is after the step. The pole
  starts hanging. A decision is `action_repeat` steps. Episodes never terminate;
  they are truncated after `max_steps` steps.

  Raises:
    ValueError: `max_steps` or `action_repeat` below 1.
  """
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: must be at least 1')

  def time_step(state, reward, is_first):
    x, angle, v, spin = state.physics
    return TimeStep(
      observation=jnp.stack([x, jnp.cos(angle), jnp.sin(angle), v, spin]),
      reward=jnp.float32(reward),
      discount=jnp.float32(1),
      is_first=jnp.asarray(is_first),
      truncated=state.steps >= max_steps,
    )

  def reset(key):
    hanging = jnp.array([0.0, math.pi, 0.0, 0.0])
    physics = hanging + 0.01 * jax.random.normal(key, (4,))
    state = SwingupState(physics, jnp.int32(0))
    return state, time_step(state, 0, True)

  def step(state, action, key):
    del key
    control = jnp.clip(action[0], -1, 1)
    y, h = state.physics, SECONDS
    k1 = _rates(y, control)
    k2 = _rates(y + h / 2 * k1, control)
    k3 = _rates(y + h / 2 * k2, control)
    k4 = _rates(y + h * k3, control)
    y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    # Wrapped, so that float32 keeps its precision over many turns.
    y = y.at[1].set((y[1] + math.pi) % (2 * math.pi) - math.pi)
    state = SwingupState(y, state.steps + 1)
    return state, time_step(state, _reward(y, control), False)

  one = np.ones((1,), np.float32)
  spec = Spec(
    ArraySpec((5,), np.float32), Continuous((1,), -one, one), name='Swingup'
  )
  return repeat_action(Environment(reset, step, spec), action_repeat)


def _reward(physics, control):
  """Tassa et al. 2018: each factor is 0.1^((x / margin)^2) or a parabola."""
  x, angle, _, spin = physics
  upright = (1 + jnp.cos(angle)) / 2
  centred = (1 + 0.1 ** (x / 2) ** 2) / 2
  idle = (4 + 1 - control**2) / 5
  slow = (1 + 0.1 ** (spin / 5) ** 2) / 2
  return upright * centred * idle * slow


def _rates(physics, control):
  """Time derivative of `physics`, float32 `[4]`, under a control in [-1, 1]."""
  x, angle, v, spin = physics
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  coupling = LEVER * cos
  determinant = TOTAL_MASS * INERTIA - coupling**2
  force = GEAR * control + LEVER * spin**2 * sin - CART_DAMPING * v
  torque = LEVER * GRAVITY * sin - POLE_DAMPING * spin
  free = (INERTIA * force - coupling * torque) / determinant
  force += _limit_force(x, v, free, INERTIA / determinant)
  v_rate = (INERTIA * force - coupling * torque) / determinant
  spin_rate = (TOTAL_MASS * torque - coupling * force) / determinant
  return jnp.stack([v, spin, v_rate, spin_rate])


def _limit_force(x, v, free, mobility):
  """Force (N) of a rail's end, by MuJoCo's soft constraint for one joint.

  The end pulls the acceleration `free` towards that of a critically damped
  spring; `mobility` is the acceleration that one newton makes.
  """
  side = jnp.sign(x)
  depth = jnp.maximum(jnp.abs(x) - RAIL, 0)
  low, high = LIMIT_IMPEDANCE
  part = jnp.minimum(depth / LIMIT_WIDTH, 1)
  rise = jnp.where(part < 0.5, 2 * part**2, 1 - 2 * (1 - part) ** 2)
  impedance = low + (high - low) * rise
  spring = impedance / (high * LIMIT_SECONDS) ** 2
  damper = 2 / (high * LIMIT_SECONDS)
  target = spring * depth + damper * side * v
  # Softness is measured where the pole stands upright.
  upright = INERTIA / (TOTAL_MASS * INERTIA - LEVER**2)
  softness = (1 - impedance) / impedance * upright
  push = jnp.maximum(target + side * free, 0) / (mobility + softness)
  return jnp.where(depth > 0, -side * push, 0)
