"""Random models as tables, for the tests of searches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np


class Tables(NamedTuple):
  """A deterministic model of `S` states and `A` actions, all numpy.

  Attributes:
    child: int32 `[S, A]`, the next state.
    reward: `[S, A]`.
    discount: `[S, A]`.
    logits: `[S, A]`, -inf where an action is invalid.
    value: `[S]`.
  """

  child: np.ndarray
  reward: np.ndarray
  discount: np.ndarray
  logits: np.ndarray
  value: np.ndarray


def random_tables(
  seed, *, num_states=200, num_actions=4, scale=1.0, invalid=0.0, dtype='f4'
):
  """Tables with some terminal edges and a share of invalid actions."""
  rng = np.random.default_rng(seed)
  shape = (num_states, num_actions)
  logits = 2 * rng.normal(size=shape)
  mask = rng.random(shape) < invalid
  mask[np.arange(num_states), rng.integers(num_actions, size=num_states)] = 0
  return Tables(
    child=rng.integers(num_states, size=shape).astype('i4'),
    # To take an invalid action even once shows everywhere.
    reward=np.where(mask, 1e6, scale * rng.normal(size=shape)).astype(dtype),
    discount=np.where(rng.random(shape) < 0.1, 0, 0.97).astype(dtype),
    logits=np.where(mask, -np.inf, logits).astype(dtype),
    value=(scale * rng.normal(size=num_states)).astype(dtype),
  )


def make_root(tables, states):
  """A root at each of `states [B]`; its embedding is the state."""
  logits = jnp.asarray(tables.logits)[states]
  return mctx.RootFnOutput(
    prior_logits=jnp.maximum(logits, jnp.finfo(logits.dtype).min),
    value=jnp.asarray(tables.value)[states],
    embedding=states,
  )


def recurrent_fn(tables, key, action, state):
  """mctx's `recurrent_fn` with the tables as params."""
  del key
  child = tables.child[state, action]
  output = mctx.RecurrentFnOutput(
    reward=tables.reward[state, action],
    discount=tables.discount[state, action],
    prior_logits=tables.logits[child],
    value=tables.value[child],
  )
  return output, child


def noisy_recurrent_fn(tables, key, action, state):
  """The same with a reward that depends on the key."""
  output, child = recurrent_fn(tables, key, action, state)
  noise = jax.random.normal(key, output.reward.shape)
  return output.replace(reward=output.reward + noise), child
