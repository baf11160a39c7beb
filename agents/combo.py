"""COMBO: conservative model-based policy optimisation.

A model is learned first (`agents/dynamics.py`). Then the policy is rolled out
in it, h steps from states of the data, and CQL learns from both, its critics
held down where the model leads and up on the data (Yu et al. 2021, equations
2 and 3):

  J_Q = f E_real (q_i - y)^2 + (1 - f) E_model (q_i - y)^2, summed over i
        + w (E_states [log int exp q_i(s, .)] - E_real q_i(s, a))
  y   = r + gamma d min_i qbar_i(s', a'),  a' ~ pi(s')

`f` is `real_fraction`, the states are the model's or both kinds, f and 1 - f;
policy and temperature are SAC's, on both kinds. With f = 1 it is CQL, the
order of its steps included.

Departures and choices:

* The penalty pushes down CQL's soft maximum at the states (the paper's Appendix
  B and the public codes) and not the policy's own value (text of equation 2).
* Kinds are weighted by f and 1 - f, however many rows of each a batch has.
* A rollout that ends starts again at its first state: all its rows are valid.
* The paper picks w, h and the states by the regulariser's value; here they are
  settings, whose defaults fit most of its tasks.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import (
  actor_critic,
  conservative,
  dynamics,
  optim,
  ranges,
  rollout,
)
from agents.core.actor_critic import State
from agents.core.conservative import Losses
from agents.core.rollout import ModelParams
from agents.core.types import (
  Agent,
  Continuous,
  Info,
  Mixed,
  Phase,
  Spec,
  Transition,
)
from networks import actions
from networks.actor_critic import Squash
from networks.ensemble import Ensemble, Known
from networks.mlp import Network


@dataclasses.dataclass(frozen=True)
class Config:
  """COMBO's hyper-parameters; defaults are the paper's and the public codes'.

  Attributes:
    hidden_sizes: widths of the layers of policy and critics.
    layer_norm: whether the critics' hidden layers are normalised.
    normalise: whether observations are normalised, by `spec.statistics`.
    gamma: discount per decision.
    policy_rate: Adam's learning rate for the policy.
    critic_rate: Adam's learning rate for the critics.
    temperature_rate: Adam's learning rate for the temperature's logarithm.
    target_rate: share of the new critics that enters the targets per update.
    init_temperature: initial value of alpha.
    target_entropy: target of the entropy, in nats over the unit box; None for
      -D.
    deterministic_backup: whether targets leave out the entropy.
    penalty: w, the weight of the penalty.
    num_samples: number of actions of each kind in the penalty.
    penalty_states: where values are pushed down: states of both kinds
      (`mixed`) or the model's alone.
    real_fraction: f, the share of real transitions.
    rollouts: the actions of rollouts: the policy's, or uniform.
    rollout_length: h, the number of steps of a rollout.
    rollout_batch: number of rollouts begun per update.
    model_capacity: number of imagined transitions kept; a multiple of
      `rollout_length * rollout_batch`.
    model_updates: number of updates of the model before the policy learns.
    model: hyper-parameters of the model.
  """

  hidden_sizes: tuple[int, ...] = (256, 256, 256)
  layer_norm: bool = False
  normalise: bool = False
  gamma: float = 0.99
  policy_rate: float = 1e-4
  critic_rate: float = 3e-4
  temperature_rate: float = 1e-4
  target_rate: float = 0.005
  init_temperature: float = 1.0
  target_entropy: float | None = None
  deterministic_backup: bool = True
  penalty: float = 5.0
  num_samples: int = 10
  penalty_states: Literal['mixed', 'model'] = 'mixed'
  real_fraction: float = 0.5
  rollouts: Literal['policy', 'uniform'] = 'policy'
  rollout_length: int = 5
  rollout_batch: int = 50
  model_capacity: int = 1_250_000
  model_updates: int = 100_000
  model: dynamics.Config = dataclasses.field(default_factory=dynamics.Config)

  def __post_init__(self):
    actor_critic.check_soft(self)
    counts = ('num_samples', 'rollout_length', 'rollout_batch')
    ranges.at_least(self, 1, *counts, 'model_capacity', 'model_updates')
    ranges.one_of(self, 'penalty_states', 'rollouts')
    ranges.within(self, 0, 1, 'real_fraction')
    ranges.at_least(self, 0, 'penalty')


class Params(NamedTuple):
  """What acting and planning need; all but the model is trained.

  Attributes:
    policy: of `networks.policy`.
    critic: of `networks.critic`, leaves `[2, ...]`.
    log_temperature: float32 scalar, log alpha.
    model: the ensemble of the first phase and its elites.
  """

  policy: Any
  critic: Any
  log_temperature: chex.Array
  model: ModelParams


class ModelPhase(NamedTuple):
  """State of the phase that learns the model, in which the policy waits.

  Attributes:
    model: state of the dynamics agent.
    policy: what the next phase begins with, but for its model.
  """

  model: dynamics.State
  policy: State

  @property
  def params(self) -> ModelParams:
    """The model's."""
    return self.model.params


class Networks(NamedTuple):
  """What the agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`.
    critic: `apply(params, observation, action) -> float32 [2, B]`.
    box: squashes Gaussians into the actions' bounds.
    model: the ensemble.
  """

  policy: Network
  critic: Network
  box: Squash
  model: Ensemble


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Any = None,
  *,
  known: Known | None = None,
) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  `known` takes the place of rewards or terminations that the ensemble predicts.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  parts = actor_critic.make_networks(config, spec, 'combo')
  return Networks(
    *parts, dynamics.make_networks(config.model, spec, known=known)
  )


make_losses = conservative.make_losses


def make_critic_loss(
  config: Config, networks: Networks, losses: Losses
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """J_Q.

  Returns:
    `(critic, target_critic, params, rows, weights, noise) -> (loss, metrics)`,
    rows and weights as `join` returns them.
  """

  def loss(critic, target_critic, params: Params, rows, weights, noise):
    errors = conservative.critic_errors(
      config, networks, losses, critic, target_critic, params, rows, noise
    )
    mean = lambda x, weight: jnp.sum(
      x * jnp.broadcast_to(weight[None], x.shape), -1
    )
    real = mean(errors.q, weights.real)
    gap = mean(errors.high, weights.states) - real
    bellman = jnp.sum(mean(errors.squares, weights.rows))
    total = bellman + config.penalty * jnp.sum(gap)
    metrics = {
      'loss_critic': total,
      'loss_bellman': bellman,
      'gap': jnp.mean(gap),
      'value': jnp.mean(real),
      'value_model': jnp.mean(mean(errors.q, weights.model)),
      'value_target': jnp.sum(errors.target * weights.rows),
    }
    return total, metrics

  return loss


def make(
  config: Config,
  networks: Networks,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent of the second phase: its model is given and stays.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Mixed`, with either kind possibly empty. The
    random numbers of an update are `conservative.draw_noise(key, actions,
    config.num_samples)`, rows as `join` orders them. Its `model` expects
    `Params`: the ensemble, with the policy for a prior and the critics' least
    value.
  """
  optimisers = actor_critic.make_optimisers(config)
  parts = (config, networks, losses)
  critic_loss = make_critic_loss(*parts)
  objectives = actor_critic.make_objectives(*parts, spec, critic_loss)
  step = optim.minimise_each(objectives, optimisers, reduce)

  def init(key) -> State:
    learned = actor_critic.init(config, networks, key)
    model = networks.model.init(jax.random.fold_in(key, 2))
    elites = jnp.arange(config.model.elites, dtype=jnp.int32)
    params = Params(*learned, ModelParams(model, elites))
    return State(params, params.critic, optim.init(optimisers, params))

  def update(state: State, batch: Mixed, key) -> tuple[State, Info]:
    rows, weights = join(config, batch)
    noise = conservative.draw_noise(key, rows.a_tm1, config.num_samples)
    old = state.params
    seen = (state.target_critic, old, rows, weights, noise)
    critic = step.critic(old.critic, state.opt_state.critic, *seen)
    soft = (rows.o_tm1, noise.tm1, weights.rows)
    policy, temperature, metrics = actor_critic.soft_steps(
      step, state, critic, *soft
    )
    stepped = actor_critic.Params(policy, critic, temperature)
    new = actor_critic.advance(state, stepped, config.target_rate)
    params = old._replace(**new.params._asdict())
    return new._replace(params=params), Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here, and a real batch is all there is.
    batch = batch if isinstance(batch, Mixed) else Mixed(batch, batch)
    rows, weights = join(config, batch)
    noise = conservative.draw_noise(key, rows.a_tm1, config.num_samples)
    alpha = jnp.exp(params.log_temperature)
    _, critic_info = critic_loss(
      params.critic, params.critic, params, rows, weights, noise
    )
    seen = (params.critic, alpha, rows.o_tm1, noise.tm1, weights.rows)
    _, (policy_info, _) = objectives.policy(params.policy, *seen)
    return critic_info | policy_info

  act, exploit = actor_critic.acting(networks.policy, networks.box)
  model = make_model(config, networks, spec)
  return Agent(
    init, act, update, model=model, evaluate=evaluate, exploit=exploit
  )


class Weights(NamedTuple):
  """Weights of rows in a loss; each sums to 1 (or to 0).

  Attributes:
    rows: float32 `[B]`, in what is learned from both kinds.
    states: float32 `[B]`, where values are pushed down.
    real: float32 `[B]`, the real ones alone.
    model: float32 `[B]`, the imagined ones alone.
  """

  rows: chex.Array
  states: chex.Array
  real: chex.Array
  model: chex.Array


def join(config: Config, batch: Mixed) -> tuple[Transition, Weights]:
  """Both kinds of a batch as one, and their weights.

  Both kinds are cut into G groups, as many as divide both evenly, and each
  group has its real rows first: rows on one device stay there. If one kind has
  no rows, the other has all the weight.
  """
  sizes = [x.r_t.shape[0] for x in batch]
  groups = math.gcd(*sizes)
  fields = ('o_tm1', 'a_tm1', 'r_t', 'discount_t', 'o_t')
  apart = lambda x: x.reshape(groups, -1, *x.shape[1:])
  both = lambda a, b: jnp.concatenate([apart(a), apart(b.astype(a.dtype))], 1)
  rows = Transition(
    *(
      jax.tree.map(
        lambda a, b: both(a, b).reshape(-1, *a.shape[1:]),
        *(getattr(x, name) for x in batch),
      )
      for name in fields
    )
  )
  share = config.real_fraction if all(sizes) else float(sizes[0] > 0)
  of_group = jnp.arange(sum(sizes)) % (sum(sizes) // groups)
  is_real = of_group < sizes[0] // groups
  real = is_real / max(sizes[0], 1)
  model = ~is_real / max(sizes[1], 1)
  mixed = share * real + (1.0 - share) * model
  states = model if config.penalty_states == 'model' else mixed
  return rows, Weights(mixed, states, real, model)


def make_imagine(
  config: Config, networks: Networks
) -> Callable[[State, Any, chex.PRNGKey], Transition]:
  """Rollouts of a state's policy in its model.

  Returns:
    `(state, observation [M, ...], key) -> Transition` of `[h M]` rows, all of
    them valid, as `rollout.imagine` returns them.
  """

  def imagine(state: State, observation, key) -> Transition:
    def policy(observation, key):
      gaussian = networks.policy.apply(state.params.policy, observation)
      if config.rollouts == 'uniform':
        unit = jax.random.uniform(key, gaussian.mean.shape, minval=-1.0)
        return networks.box.from_unit(unit)
      noise = jax.random.normal(key, gaussian.mean.shape)
      return networks.box.sample(noise, gaussian)[0]

    return rollout.imagine(
      networks.model,
      state.params.model,
      policy,
      observation,
      key,
      config.rollout_length,
    )

  return imagine


def make_model(config: Config, networks: Networks, spec: Spec):
  """What planners plan in, `search.model.Model` over `Params`.

  Its prior is the policy, the standard deviation at least 1e-3, the mean
  within 5 before the squashing; its value the critics' least at the mode.
  """
  assert isinstance(spec.action, Continuous)
  floor = 1e-3
  distribution = actions.tanh_gaussian(
    spec.action.low, spec.action.high, min_std=floor
  )
  inverse_softplus = lambda x: x + jnp.log(-jnp.expm1(-x))

  def prior(params, observation):
    mean, std = networks.policy.apply(params.policy, observation)
    # What `tanh_gaussian` does to a head's outputs, backwards.
    mean = 5.0 * jnp.arctanh(jnp.clip(mean / 5.0, -0.999, 0.999))
    shift = inverse_softplus(jnp.float32(1.0 - floor))
    raw = inverse_softplus(jnp.maximum(std - floor, 1e-6)) - shift
    return jnp.concatenate([mean, raw], -1)

  def value(params, observation):
    gaussian = networks.policy.apply(params.policy, observation)
    action = networks.box.mode(gaussian)
    return jnp.min(networks.critic.apply(params.critic, observation, action), 0)

  return rollout.planning_model(
    networks.model,
    lambda params: params.model,
    distribution,
    gamma=config.gamma,
    prior=prior,
    value=value,
  )


def make_phases(
  config: Config,
  networks: Networks,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Phase, Phase]:
  """The model's phase and the policy's.

  In the first, batches are `Transition`s and the policy stays as it was
  initialised. The second takes over the model and its elites without their
  optimiser, and its batches are `Mixed`.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment.
    reduce: the mean over devices, where one update runs on several.
  """
  agent = make(config, networks, losses, spec, reduce)
  learner = dynamics.make(
    config.model, networks.model, dynamics.make_losses(), spec, reduce
  )

  def init(key) -> ModelPhase:
    model_key, policy_key = jax.random.split(key)
    return ModelPhase(learner.init(model_key), agent.init(policy_key))

  def update(state: ModelPhase, batch: Transition, key):
    model, info = learner.update(state.model, batch, key)
    return state._replace(model=model), info

  def transfer(state: ModelPhase) -> State:
    params = state.policy.params._replace(model=state.params)
    return state.policy._replace(params=params)

  first = learner._replace(init=init, update=update)
  return (
    Phase('model', first, config.model_updates),
    Phase('policy', agent, None, transfer, make_imagine(config, networks)),
  )
