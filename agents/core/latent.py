"""Leaves of agents that learn a latent model and search in it.

MuZero (Schrittwieser 2020) and its relatives choose from these and write out
what they do with them. `agents/core/unroll.py` has the model itself.

Axes: `B` windows, `L` their steps, `K` unrolled steps (of sampled actions, how
many), `A` actions, `N` bins, `P` numbers in a projection.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import optim, planning, ranges, spread, targets
from agents.core.optim import Step
from agents.core.planning import Searcher
from agents.core.targets import UnrollTargets
from agents.core.types import Info, Trajectory
from agents.core.unroll import (
  Comparison,
  Params,
  Unrolled,
  consistency,
  flatten_steps,
  support_metrics,
  unroll,
)
from networks import heads, mixture
from networks.moe import Aux
from networks.muzero import MuZeroNetworks
from search.model import Model, PolicyOutput

# In the order in which they are summed.
_TERMS = ('policy', 'value', 'reward', 'entropy', 'consistency')


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: newest parameters, handed to actors.
    target_params: an older copy, for reanalysis.
    opt_state: the optimiser's.
  """

  params: Params
  target_params: Params
  opt_state: optax.OptState


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    policy: `(logits [B, A], target distribution [B, A]) -> [B]`; where actions
      are sampled, `(their log_probs [B, K], weights [B, K]) -> [B]`.
    value: `(logits [B, N], target [B]) -> [B]`, target in raw units.
    reward: `(logits [B, N], target [B]) -> [B]`, of rewards or prefixes.
    consistency: `(prediction [B, P], target [B, P]) -> [B]`; None for agents
      without it.
  """

  policy: Callable[[chex.Array, chex.Array], chex.Array]
  value: Callable[[chex.Array, chex.Array], chex.Array]
  reward: Callable[[chex.Array, chex.Array], chex.Array]
  consistency: Callable[[chex.Array, chex.Array], chex.Array] | None = None


def check(config: Any) -> None:
  """Refuses values out of range of the fields that all these agents have.

  Raises:
    ValueError: names the field, its value and the range.
  """
  counts = ('unroll_steps', 'td_steps', 'target_period', 'total_updates')
  ranges.at_least(config, 1, *counts)
  ranges.at_least(config, 0, 'value_weight', 'reanalyze_chunk')
  ranges.at_least(config, 0, *optim.SCHEDULE_FIELDS)
  ranges.within(config, 0, 1, 'gamma', 'reanalyze_fraction')
  ranges.above(config, 0, 'max_gradient_norm', finite=False)


def init(
  networks: MuZeroNetworks,
  optimiser: optax.GradientTransformation,
  key: chex.PRNGKey,
) -> State:
  """The state before the first update."""
  network, statistics = networks.init(key)
  params = Params(network, statistics, jnp.zeros((), jnp.int32))
  return State(params, params, optimiser.init(network))


def advance(
  state: State, step: Step, period: int, reduce: Callable[[Any], Any]
) -> tuple[State, Info]:
  """The state after an optimiser's step, with metrics and priorities.

  Args:
    state: before the step.
    step: on a loss whose `aux` is `(batch statistics, Info)`.
    period: updates between copies to the target parameters.
    reduce: the mean over devices, where one update runs on several.
  """
  statistics, info = step.aux
  params = Params(step.params, reduce(statistics), state.params.step + 1)
  old = state.target_params
  target_params = optim.periodic(params, old, params.step, period)
  metrics = reduce(info.metrics | {'gradient_norm': step.norm})
  state = State(params, target_params, step.opt_state)
  return state, Info(metrics, info.priorities)


def evaluate(
  loss: Callable, params: Params, batch: Trajectory, key: chex.PRNGKey
) -> dict[str, Any]:
  """Metrics of a loss as it is without training."""
  _, (_, info) = loss(params.network, params.statistics, batch, key, False)
  return info.metrics


def re_search(
  config: Any,
  search: Searcher,
  model: Model,
  params: Params,
  key: chex.PRNGKey,
  batch: Trajectory,
  *,
  values: bool = False,
) -> Trajectory:
  """New policy targets for the steps that are trained on, of a share of rows.

  Args:
    config: with `unroll_steps`, `reanalyze_fraction` and `reanalyze_chunk`.
    search: from `planning.make_search`.
    model: to search in.
    params: usually the target parameters.
    key: consumed.
    batch: windows, with `extras` as `planning.decide` returns them.
    values: whether the values of these searches are kept, too.

  Returns:
    The batch with `search_policy`, `sampled_actions` where there are any, and
    `search_value` with `values`, replaced.

  Source: MuZero Reanalyze (Schrittwieser 2020), Appendix H.
  """
  timestep, steps = batch.experience.timestep, slice(0, config.unroll_steps + 1)
  rows = planning.share(config.reanalyze_fraction, timestep.reward.shape[0])
  if not rows.count:
    return batch
  roots = rows.take(jax.tree.map(lambda x: x[:, steps], timestep))
  output = planning.re_search(
    search, model, params, key, roots, config.reanalyze_chunk
  )
  return replace(batch, **searched(batch, rows, output, steps, values))


def searched(
  batch: Trajectory,
  rows: planning.Share,
  output: PolicyOutput,
  steps: slice,
  values: bool = False,
) -> dict[str, Any]:
  """Extras of a batch with what a search found for some rows and steps."""
  extras = batch.experience.extras
  found = {'search_policy': output.action_weights}
  if values:
    found['search_value'] = output.value
  if output.sampled_actions is not None:
    found['sampled_actions'] = output.sampled_actions
  put = lambda x, new: x.at[:, steps].set(rows.put(x[:, steps], new))
  return {name: put(extras[name], new) for name, new in found.items()}


def re_value(
  model: Model,
  params: Params,
  key: chex.PRNGKey,
  batch: Trajectory,
  name: str = 'search_value',
) -> Trajectory:
  """The batch with a value of its `extras` replaced by the model's own."""
  timestep = batch.experience.timestep
  value = model.root(params, flatten_steps(timestep), key).value
  value = value.reshape(timestep.reward.shape[0], -1)
  return replace(batch, **{name: value})


def replace(batch: Trajectory, **extras: Any) -> Trajectory:
  """The batch with some of its `extras` replaced."""
  extras = batch.experience.extras | extras
  return batch._replace(experience=batch.experience._replace(extras=extras))


def with_least_weight(batch: Trajectory, least: chex.Numeric) -> Trajectory:
  """The batch whose importance weights, if it was drawn, are at least that."""
  if batch.sample is None:
    return batch
  weight = jnp.maximum(batch.sample.weight, least)
  return batch._replace(sample=batch.sample._replace(weight=weight))


def make_targets(
  config: Any, batch: Trajectory, horizon: Any, reward: Any = None
) -> UnrollTargets:
  """What the unrolled model is trained towards, `B` windows of it.

  Args:
    config: with `gamma`, `unroll_steps` (K) and `td_steps`.
    batch: windows, with `search_value [B, L]` to bootstrap from in `extras`.
    horizon: of the bootstrap, int32 `[B]` or one for all.
    reward: float32 `[B, L]`; None for the batch's own.

  Returns:
    `UnrollTargets` with leaves `[B, K + 1]`.
  """
  timestep = batch.experience.timestep

  def one(*args):
    return targets.unroll_targets(
      *args,
      gamma=config.gamma,
      unroll_steps=config.unroll_steps,
      max_horizon=config.td_steps,
    )

  axes = (0, 0, 0, 0, 0, 0 if jnp.ndim(horizon) else None)
  return jax.vmap(one, axes)(
    timestep.reward if reward is None else reward,
    timestep.discount,
    timestep.truncated,
    batch.valid,
    batch.experience.extras['search_value'],
    horizon,
  )


def unrolled_actions(
  batch: Trajectory, target: UnrollTargets, draw: Callable[[Any], Any]
) -> Any:
  """The actions to unroll the model over.

  After an episode's end they are random: any action must lead to the absorbing
  state.

  Args:
    batch: `B` windows.
    target: the training targets of these windows; `policy_mask` says where an
      episode has ended.
    draw: `(recorded actions [B, K, ...]) -> random ones` of the same shape.

  Returns:
    `[B, K, ...]`.
  """
  decided = target.policy_mask[:, :-1] > 0
  action = batch.experience.action[:, : decided.shape[1]]
  decided = decided.reshape(decided.shape + (1,) * (action.ndim - 2))
  return jnp.where(decided, action, draw(action))


class Outputs(NamedTuple):
  """What a loss needs of the networks, all of it in one pass.

  Attributes:
    model: the unrolled model; its `statistics` are those after the pass.
    compared: imagined states with true ones; None without a consistency loss.
    state: float32 `[B, ...]`, represented.
    aux: of a mixture of experts, over all calls together; None without one.
  """

  model: Unrolled
  compared: Comparison | None
  state: chex.Array
  aux: Aux | None


def forward(
  networks: MuZeroNetworks,
  params: Any,
  statistics: Any,
  observation: Any,
  action: Any,
  key: chex.PRNGKey,
  *,
  train: bool,
  reset_every: int | None = None,
  similarity: Callable | None = None,
) -> Outputs:
  """Represents first observations, unrolls actions, compares the states.

  Args:
    networks: the functions.
    params: their parameters.
    statistics: their batch statistics.
    observation: `[B, K + 1, ...]`; without `similarity` only the first is
      read, and there may be any number.
    action: `[B, K, ...]`.
    key: of the loss; the noise of a mixture's gates has one of its own.
    train: whether batch statistics are used and updated, and gates are noisy.
    reset_every: of the value prefix, see `unroll`.
    similarity: the consistency loss, see `unroll.consistency`; None for none.
  """
  statistics = networks.listen(statistics, mixture.gate_key(key))
  state, statistics = networks.represent(
    params, statistics, observation[:, 0], train
  )
  model = unroll(
    networks,
    params,
    statistics,
    state,
    action,
    train=train,
    reset_every=reset_every,
  )
  statistics, compared = model.statistics, None
  if similarity is not None:
    compared, statistics = consistency(
      networks,
      similarity,
      params,
      statistics,
      model.states,
      observation[:, 1:],
      train,
    )
  statistics, aux = networks.told(statistics)
  return Outputs(model._replace(statistics=statistics), compared, state, aux)


def by_step(tree: Any) -> Any:
  """Swaps the two leading axes of every leaf, `[B, K, ...] -> [K, B, ...]`."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def model_terms(
  losses: Losses, out: Outputs, target: UnrollTargets
) -> dict[str, chex.Array]:
  """The losses of what is predicted of the environment, masked.

  Args:
    losses: of which `value` and `reward` are taken.
    out: of the networks.
    target: leaves `[B, K + 1]`.

  Returns:
    `value` float32 `[K + 1, B]`, `reward` `[K, B]`, and `consistency` `[K, B]`
    where there is one.
  """
  target, over_steps = by_step(target), jax.vmap
  value = over_steps(losses.value)(out.model.value_logits, target.value)
  reward = over_steps(losses.reward)(out.model.reward_logits, target.reward[1:])
  found = {
    'value': value * target.value_mask,
    'reward': reward * target.reward_mask[1:],
  }
  if out.compared is not None:
    found['consistency'] = out.compared.loss * target.observation_mask[1:]
  return found


def _spreads(out: Outputs, target: UnrollTargets) -> dict[str, chex.Array]:
  """How far latents and projections are apart, and the loss of it."""
  state = out.state.reshape(out.state.shape[0], -1)
  # Rows behind an episode's end count nowhere.
  found = spread.metrics('latent', state, target.observation_mask[:, 0])
  if out.compared is not None:
    mask = target.observation_mask[:, 1:].reshape(-1)
    found |= spread.metrics('projection', out.compared.true, mask)
    variance = spread.variance_hinge(out.compared.imagined, mask)
    found |= {'loss_variance': variance}
  return found


def account(
  config: Any,
  terms: Mapping[str, chex.Array],
  batch: Trajectory,
  out: Outputs,
  target: UnrollTargets,
  **metrics: chex.Array,
) -> tuple[Any, tuple[Any, Info]]:
  """The whole loss of some terms, with metrics and priorities.

  Args:
    config: with the terms' weights, a field such as `value_weight` each; a
      term without one counts in full.
    terms: float32 `[K or K + 1, B]` each, masked: `policy`, `value` and
      `reward`, and `entropy` and `consistency` where there are any.
    batch: windows; their importance weights are 1 where they are fresh.
    out: of the networks. The loss of a mixture of experts is added.
    target: leaves `[B, K + 1]`.
    **metrics: float32 scalars of an agent's own.

  Returns:
    The loss, a float32 scalar divided by K; and the batch statistics, with
    `Info` whose priorities are abs(predicted value - target) of first steps.
  """
  by_row: Any = sum(
    getattr(config, f'{name}_weight', 1.0) * jnp.sum(terms[name], 0)
    for name in _TERMS
    if name in terms
  )
  drawn = batch.sample
  importance = jnp.ones_like(by_row) if drawn is None else drawn.weight
  total = jnp.mean(importance * by_row) / out.model.states.shape[0]
  metrics |= {f'loss_{k}': jnp.mean(jnp.sum(x, 0)) for k, x in terms.items()}
  metrics |= _spreads(out, target)
  if 'loss_variance' in metrics:
    total += config.variance_weight * metrics['loss_variance']
  if out.aux is not None:
    total += out.aux.loss
    metrics |= mixture.metrics(out.aux)
  predicted = heads.from_logits(out.model.value_logits[0])
  search_policy = batch.experience.extras['search_policy'][:, 0]
  entropy = -jax.scipy.special.xlogy(search_policy, search_policy)
  metrics |= {
    'loss': total,
    'value': jnp.mean(predicted),
    'value_target': jnp.mean(target.value[:, 0]),
    'target_entropy': jnp.mean(jnp.sum(entropy, -1)),
  }
  bins = out.model.value_logits.shape[-1], out.model.reward_logits.shape[-1]
  metrics |= support_metrics(target, *bins)
  priorities = jnp.abs(predicted - target.value[:, 0])
  return total, (out.model.statistics, Info(metrics, priorities))
