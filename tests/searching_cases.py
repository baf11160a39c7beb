"""Small agents that search over unrolled models, and batches for them.

A batch has four windows: a plain one, one that terminates at step 2, one that
is truncated at step 2, and a plain one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from trees import shake

from agents import efficientzero, efficientzero_v2, muzero, sampled_muzero
from agents.core import planning
from agents.core.types import (
  ArraySpec,
  Continuous,
  Discrete,
  Experience,
  Sample,
  Spec,
  Trajectory,
)
from networks.muzero import NetworkConfig
from search.model import TimeStep

B, A, K, N, TERMINATED, TRUNCATED = 4, 3, 3, 2, 1, 2
END = 2  # where those two windows end

VECTOR = Spec(ArraySpec((4,), np.float32), Discrete(A), masks_actions=True)
IMAGE = Spec(ArraySpec((6, 5, 2), np.uint8), Discrete(A))
LOW, HIGH = np.float32([-2, 0.5]), np.float32([-1, 3])
BOX = Spec(ArraySpec((4,), np.float32), Continuous((2,), LOW, HIGH))
JOINT = VECTOR._replace(action=Discrete(9, factors=(3, 3)))
NETWORK = NetworkConfig(
  torso='vector',
  latent_size=8,
  blocks=0,
  norm='layer',
  projection_norm='layer',
  lstm_size=4,
  value_bins=11,
  reward_bins=11,
  projector=(6, 6),
  predictor=(4,),
  head_hidden=(6,),
)
BATCH_NORM = dataclasses.replace(NETWORK, norm='batch', projection_norm='batch')
SMALL_IMAGE = dataclasses.replace(
  BATCH_NORM, torso='image', channels=4, head_channels=2
)
SHARED = {
  'network': NETWORK,
  'search': planning.SearchConfig(num_simulations=4),
  'gamma': 0.9,
  'unroll_steps': K,
  'td_steps': N,
  'reanalyze_fraction': 0.5,
  'learning_rate': 0.1,
  'warmup_updates': 0,
  'target_period': 3,
}


def mz(**changes):
  config = muzero.Config(**{**SHARED, **changes})
  return muzero, config, VECTOR


def ez(spec=VECTOR, **changes):
  off_policy = {'total_decisions': 100, 'prefix_horizon': 2}
  config = efficientzero.Config(**{**SHARED, **off_policy, **changes})
  return efficientzero, config, spec


def sampled(spec=BOX, **changes):
  own = {
    'search': dataclasses.replace(SAMPLES, rule='puct'),
    'learning_rate': 0.03,
    'total_decisions': 100,
    'prefix_horizon': 2,
    'entropy_samples': 4,
  }
  config = sampled_muzero.Config(**{**SHARED, **own, **changes})
  return sampled_muzero, config, spec


def v2(spec=BOX, **changes):
  """Without a least importance weight, so that weights enter linearly."""
  own = {
    'search': WIDE,
    'network': dataclasses.replace(NETWORK, action_embedding=3),
    'learning_rate': 0.03,
    'total_decisions': 100,
    'prefix_horizon': 2,
    'entropy_samples': 4,
    'min_importance': 0.0,
  }
  config = efficientzero_v2.Config(**{**SHARED, **own, **changes})
  return efficientzero_v2, config, spec


SAMPLES = planning.SearchConfig(num_simulations=4, num_samples=5)
WIDE = planning.SearchConfig(
  rule='gumbel',
  num_simulations=4,
  dirichlet_fraction=0.0,
  num_samples=5,
  wide_samples=3,
  leaf_samples=2,
  evaluate_root=False,
)


def is_sampled(config, spec):
  """Whether a search draws the actions that it chooses among."""
  policy = getattr(config, 'policy', None)
  if policy == 'auto':
    return isinstance(spec.action, Continuous)
  return policy is not None


def make_observation(spec, rng, *leading):
  shape = (*leading, *spec.observation.shape)
  if spec.observation.dtype == np.uint8:
    return jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make_actions(config, spec, rng, *leading):
  """Actions `[*leading, ...]` that the agent could have taken."""
  if not isinstance(spec.action, Continuous):
    drawn = rng.integers(0, spec.action.num_actions, leading)
    return jnp.asarray(drawn, jnp.int32)
  size = spec.action.low.size
  share = rng.random((*leading, size))
  if config.policy == 'factored':
    share = rng.integers(0, config.bins, (*leading, size)) / (config.bins - 1)
  low, high = spec.action.low, spec.action.high
  return jnp.asarray(low + (high - low) * share, jnp.float32)


def make_batch(config, spec, seed=0):
  length = config.window
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  valid = np.ones((B, length), bool)
  valid[[TERMINATED, TRUNCATED], END + 1 :] = False
  discount = np.ones((B, length), np.float32)
  discount[TERMINATED, END] = 0
  truncated = np.zeros((B, length), bool)
  truncated[TRUNCATED, END] = True
  is_first = np.zeros((B, length), bool)
  is_first[[TERMINATED, TRUNCATED], END + 1] = True
  invalid = None
  if spec.masks_actions:
    invalid = rng.random((B, length, spec.action.num_actions)) < 0.3
    invalid[..., 0] = False
    invalid = jnp.asarray(invalid)
  timestep = TimeStep(
    observation=make_observation(spec, rng, B, length),
    reward=normal(B, length),
    discount=jnp.asarray(discount),
    is_first=jnp.asarray(is_first),
    truncated=jnp.asarray(truncated),
    invalid_actions=invalid,
  )
  slots = config.search.num_samples if is_sampled(config, spec) else A
  extras = {
    'search_policy': jax.nn.softmax(normal(B, length, slots)),
    'search_value': normal(B, length),
  }
  action = make_actions(config, spec, rng, B, length)
  if is_sampled(config, spec):
    drawn = make_actions(config, spec, rng, B, length, slots)
    extras['sampled_actions'] = drawn
  sample = Sample(
    index=jnp.arange(B, dtype=jnp.int32),
    generation=jnp.ones(B, jnp.int32),
    weight=jnp.float32([1.0, 0.5, 0.25, 0.75]),
    age=jnp.float32([0, 29, 30, 90]),  # horizons 2, 2, 1, 1
  )
  experience = Experience(timestep, action, extras)
  return Trajectory(experience, jnp.asarray(valid), sample)


def shaken(state, seed=0):
  change = lambda params, i: params._replace(
    network=shake(params.network, seed + i)
  )
  return state._replace(
    params=change(state.params, 0), target_params=change(state.target_params, 1)
  )


def replace_experience(batch, **changes):
  return batch._replace(experience=batch.experience._replace(**changes))


def replace_timestep(batch, **changes):
  timestep = batch.experience.timestep._replace(**changes)
  return replace_experience(batch, timestep=timestep)


def replace_extras(batch, **changes):
  return replace_experience(batch, extras=batch.experience.extras | changes)


def without_ends(batch):
  """Windows of one long episode."""
  timestep = batch.experience.timestep
  batch = replace_timestep(
    batch,
    discount=jnp.ones_like(timestep.discount),
    truncated=jnp.zeros_like(timestep.truncated),
  )
  # No ages either: all horizons are N.
  return batch._replace(valid=jnp.ones_like(batch.valid), sample=None)
