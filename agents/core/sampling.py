"""Policies over actions that a search draws, for agents that learn a model.

Axes: `B` windows, `L` their steps, `K` unrolled steps; an action set has `S`
sampled actions, or all `A` where they are enumerated.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from agents.core import latent
from agents.core import losses as terms
from agents.core.latent import Losses, Outputs
from agents.core.targets import UnrollTargets
from agents.core.types import (
  Continuous,
  Discrete,
  Spec,
  Trajectory,
  as_array,
  as_discrete,
  check_bounds,
)
from networks import actions
from networks import muzero as muzero_networks
from networks.actions import ActionDistribution
from networks.muzero import MuZeroNetworks, NetworkConfig
from search import proposals


def family(config: Any, spec: Spec) -> ActionDistribution | None:
  """`make_distribution`, also of the policy `auto`.

  That is None for discrete actions, which are enumerated, and a Gaussian for
  continuous ones.

  Raises:
    ValueError: as `make_distribution`.
  """
  if config.policy != 'auto':
    return make_distribution(config, spec)
  if not isinstance(spec.action, Continuous):
    return None
  return make_distribution(dataclasses.replace(config, policy='gaussian'), spec)


def make_distribution(config: Any, spec: Spec) -> ActionDistribution:
  """The family of policies for a spec.

  Args:
    config: with `policy` (`gaussian`, `factored` or `flat`), `bins`, `min_std`,
      `init_std` and `search`.
    spec: of the environment.

  Raises:
    ValueError: if the policy does not fit the actions, their bounds are not
      finite, or K actions cannot be drawn from it.
  """
  action, name = spec.action, spec.name
  if not isinstance(action, Continuous | Discrete):
    raise ValueError(
      f'policy={config.policy}: {name} lists its actions anew at each step; '
      'needs discrete or continuous ones'
    )
  if isinstance(action, Continuous):
    check_bounds(spec)
    if config.policy == 'flat':
      raise ValueError(
        f'policy=flat: {name} has continuous actions of shape {action.shape}; '
        'use gaussian or factored, or divide them by env.action_bins'
      )
    if config.policy == 'gaussian':
      distribution = actions.tanh_gaussian(
        action.low,
        action.high,
        min_std=config.min_std,
        init_std=config.init_std,
      )
    else:
      distribution = actions.factored_bins(action.low, action.high, config.bins)
  elif config.policy == 'gaussian':
    raise ValueError(
      f'policy=gaussian: {name} has {action.num_actions} discrete actions; '
      'use flat, or factored where an action is made of several choices'
    )
  elif config.policy == 'factored':
    if not action.factors:
      raise ValueError(
        f'policy=factored: the {action.num_actions} actions of {name} are not '
        'made of several choices; use flat'
      )
    if math.prod(action.factors) != action.num_actions:
      raise ValueError(
        f'{name}: factors={action.factors} make {math.prod(action.factors)} '
        f'actions, must make {action.num_actions}'
      )
    distribution = actions.factored_index(action.factors)
  else:
    distribution = actions.flat(action.num_actions, action.factors)
  if spec.masks_actions and distribution.mask is None:
    raise ValueError(
      f'policy={config.policy}: {name} masks actions, which only a flat policy '
      'can take'
    )
  search = config.search
  wide = proposals.Wide(search.wide_samples, search.wide_temperature)
  proposals.check(distribution, search.num_samples, search.replacement, wide)
  return distribution


def make_networks(
  network: NetworkConfig,
  spec: Spec,
  agent: str,
  distribution: ActionDistribution | None,
  reduce: Callable[[Any], Any] | None = None,
) -> MuZeroNetworks:
  """Networks whose dynamics take the environment's actions, whatever they are.

  Args:
    network: sizes.
    spec: of the environment.
    agent: its name, for the message of an error.
    distribution: of the policy; None for a logit an action.
    reduce: as in `networks.muzero.make`.

  Raises:
    ValueError: if observations are not one array, or actions not enumerated
      without a distribution.
  """
  observation = as_array(spec, agent)
  if distribution is None:
    num_actions = as_discrete(spec, agent).num_actions
    return muzero_networks.make(network, observation, num_actions, reduce)
  networks = muzero_networks.make(
    network,
    observation,
    distribution.encoded_size,
    reduce,
    policy_size=distribution.num_parameters,
  )

  def dynamics(params, statistics, state, action, train):
    encoded = distribution.encode(action)
    return networks.dynamics(params, statistics, state, encoded, train)

  return networks._replace(dynamics=dynamics)


def any_actions(
  distribution: ActionDistribution | None,
  spec: Spec,
  key: chex.PRNGKey,
  recorded: chex.Array,
) -> chex.Array:
  """Actions of an untrained policy, which are spread over the whole set.

  Args:
    distribution: of the policy; None for enumerated actions.
    spec: of the environment.
    key: consumed.
    recorded: `[B, K, ...]`, as many actions as are wanted.

  Returns:
    `[B, K, ...]`.

  Source: MuZero (Schrittwieser 2020), Appendix G, trains with random actions
  after an episode's end.
  """
  shape = recorded.shape[:2]
  if distribution is None:
    count = as_discrete(spec, 'an enumerated policy').num_actions
    return jax.random.randint(key, shape, 0, count)
  zeros = jnp.zeros((shape[0], distribution.num_parameters))
  return distribution.sample(distribution.draw(key, shape), zeros)


def policy_terms(
  config: Any,
  losses: Losses,
  distribution: ActionDistribution | None,
  out: Outputs,
  target: UnrollTargets,
  batch: Trajectory,
  key: chex.PRNGKey,
) -> tuple[dict[str, chex.Array], dict[str, chex.Array]]:
  """The losses of the policy, masked: against the search, and its entropy.

  Args:
    config: with `entropy_samples`, that a density's entropy is estimated from.
    losses: of which `policy` is taken, `(log_probs [B, S], weights [B, S])`.
    distribution: of the policy; None where the head has a logit an action.
    out: of the networks.
    target: leaves `[B, K + 1]`.
    batch: windows, with `search_policy [B, L, S]` and, with a distribution,
      `sampled_actions [B, L, S, ...]` in `extras`.
    key: of the draws that the entropy is estimated from.

  Returns:
    `policy` and `entropy` (negative), float32 `[K + 1, B]`; and as a metric the
    mean entropy.

  Source: Sampled MuZero (Hubert 2021), section 5.
  """
  logits, extras = out.model.policy_logits, batch.experience.extras
  head = lambda name: latent.by_step(extras[name][:, : logits.shape[0]])
  if distribution is None:
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
  else:
    over_steps = jax.vmap
    log_probs = over_steps(distribution.log_prob)(
      logits, head('sampled_actions')
    )
    shape = (*logits.shape[:2], config.entropy_samples)
    draws = distribution.draw(key, shape)
    entropy = over_steps(distribution.entropy)(draws, logits)
  policy = jax.vmap(losses.policy)(log_probs, head('search_policy'))
  mask = latent.by_step(target.policy_mask)
  found = {'policy': policy * mask, 'entropy': -entropy * mask}
  return found, {'entropy': terms.masked_mean(entropy, mask)}
