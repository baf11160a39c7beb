"""Leaves of EfficientZero, for agents that add them to `agents/core/latent.py`.

Value prefix, consistency, off-policy correction and augmentation, each of which
a config may leave out (Ye 2021).

Axes: `B` windows, `L` their steps, `K` unrolled steps.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from agents.core import augment, latent, planning, targets
from agents.core.latent import Losses, Outputs, State
from agents.core.planning import Searcher
from agents.core.targets import UnrollTargets
from agents.core.types import Trajectory
from agents.core.unroll import learned_model
from networks.muzero import MuZeroNetworks, NetworkConfig
from search.model import Model


def network_config(config: Any) -> NetworkConfig:
  """`config.network` with the reward head that `config.value_prefix` needs."""
  reward = 'value_prefix' if config.value_prefix else 'reward'
  return dataclasses.replace(config.network, reward=reward)


def make_model(
  config: Any, networks: MuZeroNetworks, distribution: Any = None
) -> Model:
  """The learned model, for planners.

  Args:
    config: with `gamma`, `value_prefix` and `prefix_horizon`.
    networks: the functions.
    distribution: of actions that are drawn; None where they are enumerated.
  """
  return learned_model(
    networks,
    gamma=config.gamma,
    prefix_horizon=config.prefix_horizon if config.value_prefix else None,
    distribution=distribution,
  )


def reanalyze(
  config: Any,
  search: Searcher,
  model: Model,
  state: State,
  batch: Trajectory,
  step: Any,
  key: chex.PRNGKey,
) -> Trajectory:
  """New targets for old data.

  With `searched_values` all steps are searched again and their values are the
  search's; otherwise their values are the network's. A share of the rows gets
  new policy targets.

  Args:
    config: as `latent.re_search` needs it, and with `searched_values`.
    search: from `planning.make_search`.
    model: to search in.
    state: whose target parameters are searched with.
    batch: windows, with `extras` as `planning.decide` returns them.
    step: of the run; not used.
    key: consumed.

  Source: EfficientZero (Ye 2021), section 4.3 and equation 4.
  """
  del step
  params = state.target_params
  if not config.searched_values:
    batch = latent.re_value(model, params, key, batch)
    return latent.re_search(config, search, model, params, key, batch)
  timestep = batch.experience.timestep
  rows = planning.share(config.reanalyze_fraction, timestep.reward.shape[0])
  output = planning.re_search(
    search, model, params, key, timestep, config.reanalyze_chunk
  )
  found = {'search_value': output.value}
  if rows.count:
    found |= latent.searched(batch, rows, rows.take(output), slice(None))
  return latent.replace(batch, **found)


def make_targets(
  config: Any, batch: Trajectory, reward: Any = None
) -> tuple[UnrollTargets, Any]:
  """Prefixes for targets, and horizons by the age of the data.

  Args:
    config: as `latent.make_targets` needs it, and with `value_prefix`,
      `prefix_horizon`, `dynamic_horizon`, `off_policy_fraction` and
      `total_decisions`.
    batch: windows, with `search_value [B, L]` in `extras`. Those that were not
      drawn from a replay are new.
    reward: float32 `[B, L]`; None for the batch's own.

  Returns:
    `UnrollTargets` with leaves `[B, K + 1]`, their rewards sums since the last
    reset where the value prefix is on; and the horizons, int32 `[B]`.

  Source: EfficientZero (Ye 2021), section 4.2 and equation 5.
  """
  horizon = jnp.full(batch.valid.shape[:1], config.td_steps, jnp.int32)
  if batch.sample is not None and config.dynamic_horizon:
    horizon = targets.off_policy_horizon(
      batch.sample.age,
      max_horizon=config.td_steps,
      total_decisions=config.total_decisions,
      fraction=config.off_policy_fraction,
    )
  target = latent.make_targets(config, batch, horizon, reward)
  return with_prefixes(config, target), horizon


def with_prefixes(config: Any, target: UnrollTargets) -> UnrollTargets:
  """Targets whose rewards are sums since the last reset, if they are learned.

  Args:
    config: with `value_prefix` and `prefix_horizon`.
    target: leaves `[B, K + 1]`.

  Source: EfficientZero (Ye 2021), section 4.2.
  """
  if not config.value_prefix:
    return target
  sums = lambda x: targets.value_prefixes(x, config.prefix_horizon)
  return target._replace(reward=jax.vmap(sums)(target.reward))


def forward(
  config: Any,
  networks: MuZeroNetworks,
  losses: Losses,
  params: Any,
  statistics: Any,
  batch: Trajectory,
  action: Any,
  key: chex.PRNGKey,
  image_key: chex.PRNGKey,
  *,
  train: bool,
) -> Outputs:
  """`latent.forward` with value prefix, consistency and augmentation.

  Args:
    config: with `unroll_steps`, `augmentation`, `value_prefix`,
      `prefix_horizon` and `consistency`.
    networks: the functions.
    losses: of which `consistency` is taken.
    params: of the networks.
    statistics: of the networks.
    batch: `B` windows.
    action: `[B, K, ...]`.
    key: of the loss.
    image_key: of the augmentation.
    train: as in `latent.forward`; also whether observations are augmented.

  Source: EfficientZero (Ye 2021), sections 4.1 and 4.2.
  """
  observation = batch.experience.timestep.observation
  observation = observation[:, : config.unroll_steps + 1]
  if train and config.augmentation:
    observation = augment.observations(image_key, observation)
  return latent.forward(
    networks,
    params,
    statistics,
    observation,
    action,
    key,
    train=train,
    reset_every=config.prefix_horizon if config.value_prefix else None,
    similarity=losses.consistency if config.consistency else None,
  )
