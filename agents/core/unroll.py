"""Leaves that every agent with a learned latent model shares.

Axes: `B` batch, `K` unrolled steps, `A` actions, `N` bins.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from agents.core import losses, optim
from agents.core.targets import UnrollTargets
from networks import heads
from networks.muzero import MuZeroNetworks
from search import value_prefix
from search.model import Model, TimeStep


class Params(NamedTuple):
  """What an acting learned model needs; the `params` of the MuZero family.

  Attributes:
    network: trained parameters.
    statistics: running batch statistics, not seen by the optimiser.
    step: int32 scalar, number of updates so far (the temperature of acting
      depends on it).
  """

  network: Any
  statistics: Any
  step: chex.Array


class Unrolled(NamedTuple):
  """Outputs of a model unrolled over `K` actions.

  Attributes:
    policy_logits: float32 `[K + 1, B, A]`.
    value_logits: float32 `[K + 1, B, N]`.
    reward_logits: float32 `[K, B, N]`, of arriving at steps 1 to K.
    states: float32 `[K, B, ...]`, latent states 1 to K.
    statistics: batch statistics after the unroll.
  """

  policy_logits: chex.Array
  value_logits: chex.Array
  reward_logits: chex.Array
  states: chex.Array
  statistics: Any


def unroll(
  networks: MuZeroNetworks,
  params: Any,
  statistics: Any,
  state: chex.Array,
  action: chex.Array,
  *,
  train: bool,
  reset_every: int | None = None,
  gradient_scale: float = 0.5,
) -> Unrolled:
  """Unrolls the dynamics from `state` over given actions.

  The gradient into each dynamics step is scaled on the dynamics' side only,
  so that a step's own heads train it in full (MuZero, Appendix G; the
  official EfficientZero code halves those too).

  Args:
    networks: the functions.
    params: their parameters.
    statistics: their batch statistics.
    state: `[B, ...]`, the represented first observation.
    action: int32 `[B, K]`, or `[B, K, ...]` as `networks.dynamics` takes them.
    train: whether batch statistics are used and updated.
    reset_every: steps between resets of the value prefix's recurrent state;
      None where rewards are predicted one by one.
    gradient_scale: factor on the gradient into each dynamics step.

  Returns:
    `Unrolled`.

  Source: MuZero (Schrittwieser 2020), Appendix G.
  """
  policy_0, value_0, statistics = networks.predict(
    params, statistics, state, train
  )
  initial = networks.initial_carry(state.shape[0])
  steps = jnp.arange(action.shape[1])
  reset = steps % (reset_every or 1) == 0

  def body(scanned, xs):
    state_tm1, carry, statistics = scanned
    action_tm1, reset_tm1 = xs
    carry = jax.tree.map(
      lambda fresh, old: jnp.where(reset_tm1, fresh, old), initial, carry
    )
    state_tm1 = optim.scale_gradient(state_tm1, gradient_scale)
    state_t, statistics = networks.dynamics(
      params, statistics, state_tm1, action_tm1, train
    )
    reward, carry, statistics = networks.reward(
      params, statistics, state_tm1, action_tm1, state_t, carry, train
    )
    policy, value, statistics = networks.predict(
      params, statistics, state_t, train
    )
    return (state_t, carry, statistics), (policy, value, reward, state_t)

  (_, _, statistics), (policy, value, reward, states) = jax.lax.scan(
    body, (state, initial, statistics), (jnp.swapaxes(action, 0, 1), reset)
  )
  return Unrolled(
    policy_logits=jnp.concatenate([policy_0[None], policy]),
    value_logits=jnp.concatenate([value_0[None], value]),
    reward_logits=reward,
    states=states,
    statistics=statistics,
  )


def support_metrics(
  target: UnrollTargets, value_bins: int, reward_bins: int
) -> dict[str, chex.Array]:
  """How much of the heads' targets lies outside their supports.

  Args:
    target: of `B` windows, leaves `[B, K + 1]`.
    value_bins: of the value head.
    reward_bins: of the head of rewards or their prefixes.

  Returns:
    float32 scalars: `value_clipped` and `reward_clipped`, the shares of
    targets (rewards or their prefixes) beyond the support, and
    `value_largest` and `reward_largest`, the largest magnitudes in raw units.
  """
  found = {}
  for name, scalar, mask, bins in (
    ('value', target.value, target.value_mask, value_bins),
    # Entry 0 is not trained towards.
    ('reward', target.reward[:, 1:], target.reward_mask[:, 1:], reward_bins),
  ):
    is_beyond = heads.beyond(scalar, bins).astype(jnp.float32)
    found[f'{name}_clipped'] = losses.masked_mean(is_beyond, mask)
    found[f'{name}_largest'] = jnp.max(jnp.abs(scalar) * mask)
  return found


class Comparison(NamedTuple):
  """Imagined states, compared with those of the observations that followed.

  Attributes:
    loss: float32 `[K, B]`.
    imagined: float32 `[B * K, P]`, their projections.
    true: float32 `[B * K, P]`, those of the observations.
  """

  loss: chex.Array
  imagined: chex.Array
  true: chex.Array


def consistency(
  networks: MuZeroNetworks,
  similarity: Any,
  params: Any,
  statistics: Any,
  states: chex.Array,
  successors: chex.Array,
  train: bool,
) -> tuple[Comparison, Any]:
  """Compares imagined states with those of the observations that followed.

  Args:
    networks: the functions.
    similarity: `(prediction [N, P], target [N, P]) -> [N]`, a loss.
    params: their parameters.
    statistics: their batch statistics.
    states: `[K, B, ...]`, imagined.
    successors: `[B, K, ...]`, observations.
    train: whether batch statistics are used and updated.

  Returns:
    The comparison, and the statistics.

  Source: EfficientZero (Ye 2021), equation 2.
  """
  # A row's steps stay together, so that a batch on several devices is compared
  # without moving.
  swap = lambda x: jnp.swapaxes(x, 0, 1)
  true_states, statistics = networks.represent(
    params, statistics, flatten_steps(successors), train
  )
  true, statistics = networks.project(params, statistics, true_states, train)
  imagined, statistics = networks.project(
    params, statistics, flatten_steps(swap(states)), train
  )
  ours, statistics = networks.predict_projection(
    params, statistics, imagined, train
  )
  loss = swap(unflatten_steps(similarity(ours, true), states.shape[1]))
  return Comparison(loss, imagined, true), statistics


def learned_model(
  networks: MuZeroNetworks,
  *,
  gamma: chex.Numeric,
  prefix_horizon: int | None = None,
  distribution: Any = None,
) -> Model:
  """The `Model` of a learned latent model, for any planner.

  Args:
    networks: the functions; `params` of the model are `Params`.
    gamma: the model's constant discount. The model knows no termination:
      states after it are trained towards value and reward 0.
    prefix_horizon: steps between resets of the value prefix; None where
      rewards are predicted one by one.
    distribution: of the actions, where the policy head outputs its
      parameters; None where it outputs logits of enumerated actions.

  Returns:
    `Model` whose values are in raw units.
  """

  def root(params, timestep: TimeStep, key):
    del key
    state, _ = networks.represent(
      params.network, params.statistics, timestep.observation, False
    )
    prior_logits, value, _ = networks.predict(
      params.network, params.statistics, state, False
    )
    embedding = state
    if prefix_horizon is not None:
      carry = networks.initial_carry(state.shape[0])
      embedding = value_prefix.root_embedding(state, carry)
    return mctx.RootFnOutput(
      prior_logits=prior_logits,
      value=heads.from_logits(value),
      embedding=embedding,
    )

  advance = functools.partial(_advance, networks)

  def plain_step(params, key, action, state):
    del key
    reward, prior_logits, value, next_state, _ = advance(
      params, action, state, networks.initial_carry(action.shape[0])
    )
    output = mctx.RecurrentFnOutput(
      reward=reward,
      discount=jnp.full_like(reward, gamma),
      prior_logits=prior_logits,
      value=value,
    )
    return output, next_state

  def prefix_step(params, key, action, state, carry):
    del key
    prefix, prior_logits, value, next_state, carry = advance(
      params, action, state, carry
    )
    return value_prefix.PrefixStep(
      prefix=prefix,
      discount=jnp.full_like(prefix, gamma),
      prior_logits=prior_logits,
      value=value,
      state=next_state,
      carry=carry,
    )

  if prefix_horizon is None:
    return Model(root=root, step=plain_step, distribution=distribution)
  step = value_prefix.recurrent_fn(prefix_step, prefix_horizon)
  return Model(root=root, step=step, distribution=distribution)


def _advance(networks: MuZeroNetworks, params, action, state, carry):
  network, statistics = params.network, params.statistics
  next_state, _ = networks.dynamics(network, statistics, state, action, False)
  reward, carry, _ = networks.reward(
    network, statistics, state, action, next_state, carry, False
  )
  prior_logits, value, _ = networks.predict(
    network, statistics, next_state, False
  )
  reward, value = heads.from_logits(reward), heads.from_logits(value)
  return reward, prior_logits, value, next_state, carry


def flatten_steps(tree: Any) -> Any:
  """Merges the two leading axes of every leaf, `[B, L, ...] -> [B * L, ...]`.

  A row's first axis varies slowest.
  """
  return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), tree)


def unflatten_steps(tree: Any, batch: int) -> Any:
  """The inverse of `flatten_steps`, `[B * L, ...] -> [B, L, ...]`."""
  return jax.tree.map(lambda x: x.reshape((batch, -1) + x.shape[1:]), tree)


def visit_temperature(
  step: chex.Array,
  total_updates: chex.Numeric,
) -> chex.Array:
  """Temperature of acting: 1, then 1/2 and 1/4 from 50% and 75% of training.

  Args:
    step: int32 scalar, updates so far.
    total_updates: updates of the whole run.

  Returns:
    float32 scalar.

  Source: MuZero (Schrittwieser 2020), Appendix D.
  """
  progress = step / total_updates
  late = jnp.where(progress < 0.75, 0.5, 0.25)
  return jnp.where(progress < 0.5, 1.0, late).astype(jnp.float32)
