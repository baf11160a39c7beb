"""Turns continuous actions into a grid of bins: large discrete action sets."""

from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from agents.core.types import Discrete, Spec, check_bounds
from experiments.envs import host
from search.model import Environment

Env = TypeVar('Env', Environment, host.HostEnvironment)


def discretise(env: Env, num_bins: int) -> Env:
  """Divides each dimension of the actions into equally spaced values.

  These are `num_bins` from the low bound to the high. The `D` dimensions of
  `Continuous` actions are the components of their shape in C order; the actions
  become `Discrete(num_bins**D, factors=(num_bins,) * D)`, the joint index in C
  order, in which the last dimension changes fastest.

  Raises:
    ValueError: the actions are discrete already or not bounded, `num_bins` is
      not an integer of at least 2, or the joint index exceeds int32.
  """
  values = _bin_values(env.spec, num_bins)
  shape = values.shape[:-1]
  values = values.reshape(-1, num_bins)
  size = len(values)
  factors = (num_bins,) * size
  spec = env.spec._replace(action=Discrete(num_bins**size, factors))
  if isinstance(env, Environment):

    def step(state, action, key):
      bins = jnp.stack(jnp.unravel_index(action, factors))
      action = jnp.asarray(values)[jnp.arange(size), bins]
      return env.step(state, action.reshape(shape), key)

    return env._replace(step=step, spec=spec)

  def start(seed):
    simulator = env.start(seed)

    def step(action):
      action = host.check_action(action, spec, env.num_envs)
      bins = np.stack(np.unravel_index(action, factors), axis=-1)
      action = values[np.arange(size), bins]
      return simulator.step(action.reshape(env.num_envs, *shape))

    return simulator._replace(step=step)

  return env._replace(spec=spec, start=start)


def _bin_values(spec: Spec, num_bins: int) -> np.ndarray:
  """The values, float32 `[*shape, num_bins]`; raises like `discretise`."""
  if isinstance(spec.action, Discrete):
    raise ValueError(
      f'{spec.name}: num_bins={num_bins} needs continuous actions, but its '
      f'{spec.action.num_actions} actions are discrete; leave it out'
    )
  check_bounds(spec)
  if not isinstance(num_bins, int) or num_bins < 2:
    raise ValueError(
      f'{spec.name}: num_bins={num_bins!r} must be an integer of at least 2'
    )
  low, high = spec.action.low, spec.action.high
  if num_bins**low.size >= 2**31:
    raise ValueError(
      f'{spec.name}: num_bins={num_bins} in {low.size} dimensions make '
      f'{num_bins**low.size:.3g} joint actions, more than int32 holds; must be '
      f'at most {_most_bins(low.size)}'
    )
  return np.linspace(low, high, num_bins, axis=-1, dtype=np.float32)


def _most_bins(size: int) -> int:
  most = 2
  while (most + 1) ** size < 2**31:
    most += 1
  return most
