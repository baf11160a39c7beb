"""Pendulum-v1 in JAX (Gymnasium's equations and numbers)."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Continuous, Spec
from experiments.envs.repeat import repeat_action
from search.model import Environment, TimeStep

GRAVITY = 10.0
MASS = 1.0
LENGTH = 1.0
SECONDS = 0.05
MAX_TORQUE = 2.0
MAX_SPEED = 8.0


class PendulumState(NamedTuple):
  """The pendulum's angle and speed, and the number of simulator steps.

  Attributes:
    angle: float32 scalar, radians, 0 upright.
    speed: float32 scalar, radians per second.
    steps: int32 scalar, simulator steps so far.
  """

  angle: chex.Array
  speed: chex.Array
  steps: chex.Array


def make_pendulum(max_steps: int = 200, action_repeat: int = 1) -> Environment:
  """Swing a pendulum up and hold it there.

  Observations are float32 `[3]` (cosine, sine, angular speed); actions are
  torques float32 `[1]` in [-2, 2], clipped. The reward of a simulator step is
  -(angle^2 + 0.1 speed^2 + 0.001 torque^2) in the state before it, with the
  angle in [-pi, pi): 0 at best, -16.3 at worst. A decision is `action_repeat`
  steps. Episodes never terminate; they are truncated after `max_steps` steps.

  Raises:
    ValueError: `max_steps` or `action_repeat` below 1.
  """
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: must be at least 1')

  def time_step(state, reward, is_first):
    angle = state.angle
    return TimeStep(
      observation=jnp.stack([jnp.cos(angle), jnp.sin(angle), state.speed]),
      reward=jnp.float32(reward),
      discount=jnp.float32(1),
      is_first=jnp.asarray(is_first),
      truncated=state.steps >= max_steps,
    )

  def reset(key):
    high = jnp.array([math.pi, 1.0])
    angle, speed = jax.random.uniform(key, (2,), minval=-high, maxval=high)
    state = PendulumState(angle, speed, jnp.int32(0))
    return state, time_step(state, 0, True)

  def step(state, action, key):
    del key
    torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
    angle = _wrap(state.angle)
    cost = angle**2 + 0.1 * state.speed**2 + 0.001 * torque**2
    # A rod about its end: inertia m l^2 / 3, its weight at half its length.
    rate = 1.5 * GRAVITY / LENGTH * jnp.sin(angle)
    rate += 3 / (MASS * LENGTH**2) * torque
    speed = jnp.clip(state.speed + SECONDS * rate, -MAX_SPEED, MAX_SPEED)
    # Wrapped, so that float32 keeps its precision over many turns.
    angle = _wrap(angle + SECONDS * speed)
    state = PendulumState(angle, speed, state.steps + 1)
    return state, time_step(state, -cost, False)

  bound = np.full((1,), MAX_TORQUE, np.float32)
  spec = Spec(
    ArraySpec((3,), np.float32),
    Continuous((1,), -bound, bound),
    name='Pendulum',
  )
  return repeat_action(Environment(reset, step, spec), action_repeat)


def _wrap(angle):
  return (angle + math.pi) % (2 * math.pi) - math.pi
