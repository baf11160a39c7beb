"""How an ensemble of dynamics is trained: the agent `dynamics`, COMBO's model.

`agents/dynamics.py` describes it.

Axes: `B` batch, `E` members, `F` numbers in an observation.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import optim, ranges, rollout
from agents.core.rollout import ModelParams
from agents.core.types import (
  Agent,
  Continuous,
  Info,
  Spec,
  Transition,
  check_bounds,
)
from networks import actions, ensemble
from networks.actor_critic import flatten
from networks.ensemble import Ensemble, Known, Prediction


@dataclasses.dataclass(frozen=True)
class Config:
  """The ensemble's hyper-parameters; defaults are those of MOPO and COMBO.

  Attributes:
    widths: of the hidden layers of each member that predict the change.
    outcome_widths: of those that predict the reward, and of those that predict
      the termination; see `networks.ensemble`.
    activation: activation of the hidden layers.
    members: E, the number of networks in the ensemble.
    elites: number of members that predict: those with the lowest held-out loss.
    learning_rate: Adam's learning rate.
    weight_decay: weight of half the sum of squares of all matrices.
    bound_weight: weight of the distance between the bounds of the log-variance.
    termination_weight: weight of the cross-entropy of termination.
    held_out: share of the rows that are never trained on.
    held_out_decay: decay per update of the running mean of held-out losses.
    planning_gamma: discount per decision; only planners in the ensemble use it.
  """

  widths: tuple[int, ...] = (200, 200, 200, 200)
  outcome_widths: tuple[int, ...] = (200, 200)
  activation: Literal['silu', 'relu'] = 'silu'
  members: int = 7
  elites: int = 5
  learning_rate: float = 1e-3
  weight_decay: float = 7.5e-5
  bound_weight: float = 0.01
  termination_weight: float = 1.0
  held_out: float = 0.1
  held_out_decay: float = 0.99
  planning_gamma: float = 0.99

  def __post_init__(self):
    ranges.at_least(self, 1, 'widths', 'outcome_widths')
    if not 1 <= self.elites <= self.members:
      raise ValueError(
        f'elites={self.elites}: must be within [1, members={self.members}]'
      )
    rates = ('learning_rate', 'weight_decay', 'bound_weight')
    ranges.at_least(self, 0, *rates, 'termination_weight')
    ranges.within(self, 0, 1, 'held_out', 'held_out_decay', ends='[)')
    ranges.within(self, 0, 1, 'planning_gamma')


class EndSums(NamedTuple):
  """Sums over rows that go on, and over rows that end.

  Attributes:
    rows: float32 `[2]`, how many they are.
    end: float32 `[2]`, of the chance of an end that the elites predict.
    reward: float32 `[2]`, of the absolute error of the reward they expect.
  """

  rows: chex.Array
  end: chex.Array
  reward: chex.Array


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: the ensemble and which of its members are elites.
    opt_state: the optimiser's.
    loss_sum: float32 `[E]`, held-out losses so far, decayed.
    rows: float32 scalar, how many they are of.
    end_sums: of held-out rows so far, decayed alike; see `EndSums`.
  """

  params: ModelParams
  opt_state: Any
  loss_sum: chex.Array
  rows: chex.Array
  end_sums: EndSums


class Losses(NamedTuple):
  """The terms, each of `[E, B]`; replace one with `losses._replace`.

  Attributes:
    likelihood: `(mean [E, B, F + 1], log_std, target [B, F + 1]) -> [E, B]`,
      of the change and of the reward.
    termination: `(logit [E, B], ended [B]) -> [E, B]`.
  """

  likelihood: Callable[..., chex.Array]
  termination: Callable[..., chex.Array]


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Any = None,
  *,
  known: Known | None = None,
) -> Ensemble:
  """The ensemble for a spec, which scales by its statistics if it has some.

  `known` takes the place of rewards or terminations that it would predict.

  Raises:
    ValueError: if the actions are not vectors within finite bounds.
  """
  del reduce
  action = spec.action
  if not isinstance(action, Continuous) or len(action.shape) != 1:
    raise ValueError(
      f'dynamics needs vectors of continuous actions; {spec.name} has {action}'
    )
  check_bounds(spec)
  leaves = jax.tree.leaves(
    spec.observation, is_leaf=lambda x: hasattr(x, 'dtype')
  )
  return ensemble.make(
    sum(math.prod(leaf.shape) for leaf in leaves),
    action.low,
    action.high,
    config.widths,
    outcome_sizes=config.outcome_widths,
    members=config.members,
    activation=config.activation,
    statistics=spec.statistics,
    known=known,
  )


def make_losses() -> Losses:
  """The Gaussian likelihood and a cross-entropy."""

  def likelihood(mean, log_std, target):
    target = jnp.broadcast_to(target[None], mean.shape)
    z = (target - mean) * jnp.exp(-log_std)
    return jnp.mean(jnp.square(z) + 2.0 * log_std, -1)

  def termination(logit, ended):
    ended = jnp.broadcast_to(ended[None], logit.shape)
    return jax.nn.softplus(logit) - ended * logit

  return Losses(likelihood, termination)


def _errors(
  config: Config, networks: Ensemble, losses: Losses, network, batch
) -> tuple[chex.Array, Prediction, chex.Array]:
  """Losses `[E, B]`, predictions, and the error of each mean."""
  out = networks.apply(network, batch.o_tm1, batch.a_tm1)
  change = flatten(batch.o_t) - flatten(batch.o_tm1)
  target = jnp.concatenate([change, batch.r_t[:, None]], -1)
  # The reward is learned by the one of its two normals that was the case.
  case = (batch.discount_t == 0).astype(jnp.int32)[None, :, None]
  of_case = lambda x: jnp.take_along_axis(
    x, jnp.broadcast_to(case, (*x.shape[:-1], 1)), -1
  )
  mean = jnp.concatenate([out.mean, of_case(out.reward)], -1)
  log_std = jnp.concatenate([out.log_std, of_case(out.reward_log_std)], -1)
  likelihood = losses.likelihood(mean, log_std, target)
  ended = losses.termination(out.logit, 1.0 - batch.discount_t)
  missed = mean - jnp.broadcast_to(target[None], mean.shape)
  return likelihood + config.termination_weight * ended, out, missed


def _split(config: Config, batch) -> tuple[chex.Array, chex.Array]:
  """Each member's bootstrap weights `[E, B]`, and which rows are held out."""
  rows = jnp.concatenate(
    [
      flatten(batch.o_tm1),
      batch.a_tm1,
      batch.r_t[:, None],
      flatten(batch.o_t),
    ],
    -1,
  )
  uniforms = ensemble.row_uniforms(rows, config.members + 1)
  is_held_out = (uniforms[0] < config.held_out).astype(batch.r_t.dtype)
  return ensemble.poisson(uniforms[1:]), is_held_out


def make_loss(
  config: Config, networks: Ensemble, losses: Losses
) -> Callable[..., tuple[chex.Array, tuple[dict[str, chex.Array], Any]]]:
  """The whole loss.

  Returns:
    `(params, batch, weights [E, B], is_held_out [B]) -> (loss, (metrics, (sums
    of held-out losses [E], predictions)))`.
  """

  def loss(network, batch, weights, is_held_out):
    each, out, missed = _errors(config, networks, losses, network, batch)
    trained = jnp.broadcast_to((1.0 - is_held_out)[None], each.shape)
    trained = weights * trained / (1.0 - config.held_out)
    fit = jnp.mean(each * trained, -1)
    squares = jax.tree_util.tree_map_with_path(
      lambda path, x: (
        jnp.sum(jnp.square(x)) if path[-1].key == 'kernel' else 0.0
      ),
      network['layers'],
    )
    decay = 0.5 * sum(jax.tree.leaves(squares))
    bounds = jnp.sum(networks.bounds(network))
    total = jnp.sum(fit) + config.weight_decay * decay
    total += config.bound_weight * bounds
    metrics = {
      'loss': total,
      'loss_fit': jnp.mean(fit),
      'squared_error': jnp.mean(jnp.square(missed)),
      'std': jnp.mean(jnp.exp(out.log_std)),
    }
    held_out = jnp.broadcast_to(is_held_out[None], each.shape)
    return total, (metrics, (jnp.sum(each * held_out, -1), out))

  return loss


def _end_sums(out: Prediction, batch: Transition, mask: chex.Array) -> EndSums:
  """What members predict of steps that go on and of steps that end.

  Args:
    out: of some members.
    batch: `B` rows.
    mask: float32 `[B]`, 0 for rows that do not count.
  """
  chance = jnp.mean(out.cases()[..., 1], 0)
  error = jnp.abs(jnp.mean(out.expected_reward(), 0) - batch.r_t)
  ends = (batch.discount_t == 0).astype(mask.dtype)
  cases = jnp.stack([mask * (1 - ends), mask * ends])
  per_case = lambda x: jnp.sum(cases * x[None], -1)
  return EndSums(jnp.sum(cases, -1), per_case(chance), per_case(error))


def _end_metrics(sums: EndSums) -> dict[str, chex.Array]:
  """Metrics of steps that end; 0 where there were none.

  Returns:
    float32 scalars: `end_share`, of rows that end; `end_chance`, of an end that
    is predicted for them; `end_chance_else`, for others; and
    `end_reward_error`, of the reward of those that end.
  """
  mean = lambda x, i: x[i] / jnp.maximum(sums.rows[i], 1e-6)
  return {
    'end_share': sums.rows[1] / jnp.maximum(jnp.sum(sums.rows), 1e-6),
    'end_chance': mean(sums.end, 1),
    'end_chance_else': mean(sums.end, 0),
    'end_reward_error': mean(sums.reward, 1),
  }


def make(
  config: Config,
  networks: Ensemble,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent, which only learns.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` without `act` whose batches are `Transition`s; its update
    ignores the key. Its `model` expects `ModelParams`, has a broad prior over
    actions and values of 0. `evaluate` has each member's loss.
  """
  assert isinstance(spec.action, Continuous)
  optimiser = optim.adam(config.learning_rate)
  distribution = actions.tanh_gaussian(spec.action.low, spec.action.high)

  def init(key) -> State:
    network = networks.init(key)
    params = ModelParams(network, jnp.arange(config.elites, dtype=jnp.int32))
    return State(
      params,
      optimiser.init(network),
      jnp.zeros((config.members,)),
      jnp.zeros(()),
      EndSums(*(jnp.zeros((2,)) for _ in EndSums._fields)),
    )

  loss = make_loss(config, networks, losses)
  fit_step = optim.minimise(loss, optimiser, reduce)

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    del key
    weights, is_held_out = _split(config, batch)
    network, opt_state, (metrics, (held_out, out)), norm = fit_step(
      state.params.network, state.opt_state, batch, weights, is_held_out
    )
    by_elites = Prediction(*(x[state.params.elites] for x in out))
    found = (
      held_out,
      jnp.sum(is_held_out),
      _end_sums(by_elites, batch, is_held_out),
    )
    loss_sum, rows, ends = jax.tree.map(
      lambda old, new: config.held_out_decay * old + new,
      (state.loss_sum, state.rows, state.end_sums),
      reduce(found),
    )
    elites = jnp.argsort(loss_sum)[: config.elites].astype(jnp.int32)
    by_elites = loss_sum[elites] / jnp.maximum(rows, 1e-6)
    metrics = reduce(metrics | {'gradient_norm': norm}) | {
      'held_out_loss': jnp.mean(by_elites),
      'held_out_worst': jnp.max(loss_sum) / jnp.maximum(rows, 1e-6),
    }
    metrics |= _end_metrics(ends)
    params = ModelParams(network, elites)
    return State(params, opt_state, loss_sum, rows, ends), Info(metrics)

  def evaluate(params: ModelParams, batch, key):
    del key
    each, out, _ = _errors(config, networks, losses, params.network, batch)
    each = jnp.mean(each, -1)
    by_member = {f'loss_{i}': each[i] for i in range(config.members)}
    elites = Prediction(*(x[params.elites] for x in out))
    ends = _end_metrics(_end_sums(elites, batch, jnp.ones_like(batch.r_t)))
    return by_member | {'loss': jnp.mean(each[params.elites])} | ends

  model = rollout.planning_model(
    networks, lambda params: params, distribution, gamma=config.planning_gamma
  )
  return Agent(init, None, update, model=model, evaluate=evaluate)
