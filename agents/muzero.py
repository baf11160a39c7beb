"""MuZero with Reanalyze: planning in a learned latent model.

A representation `s_0 = h(o_0)`, dynamics `r_k, s_k = g(s_{k-1}, a)` and
predictions `p_k, v_k = f(s_k)` are unrolled over replayed actions and trained
by (Schrittwieser 2020, equation 1)

  L = sum_k  CE(p_k, pi_k) + 1/4 * CE(v_k, z_k) + CE(r_k, u_k)

with `pi` the visit counts of a search, `z` an n-step return, `u` the reward;
value and reward are categorical over a two-hot support behind the signed
hyperbolic transform (Appendix F). With Reanalyze (Appendix H) a share of the
policy targets is searched again with target parameters, and the value is
bootstrapped from the target network.

Departures and choices:

* `z` uses a fixed horizon and one bootstrap. Behind a termination states are
  absorbing with value and reward 0 (Appendix G); behind a truncation nothing
  is trained.
* Gradients into the dynamics are halved at its entrance and the whole loss is
  divided by K (Appendix G scales each unrolled head by 1/K and leaves step 0
  whole).
* Values are scaled by the range of each node's children, as in mctx, and not
  of the whole tree.
* Priorities have the exponents of the run's settings (0.6, and 0.4 rising to 1
  for the weights).
* The official network is a 16-block ResNet; ours is what `NetworkConfig` says,
  by default EfficientZero's, so that the two agents differ in what they learn
  from and not in size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import losses as terms
from agents.core import optim, planning, ranges, targets
from agents.core.types import Agent, Discrete, Info, Spec, Trajectory
from agents.core.unroll import (
  Params,
  flatten_steps,
  learned_model,
  support_metrics,
  unroll,
  visit_temperature,
)
from networks import heads, mixture
from networks import muzero as muzero_networks
from networks.muzero import MuZeroNetworks, NetworkConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """MuZero's hyper-parameters; defaults are those of MuZero Reanalyze.

  Attributes:
    network: sizes and kinds of the networks.
    search: the search when acting and when reanalysing.
    gamma: discount a decision.
    unroll_steps: K, steps that the model is unrolled in training.
    td_steps: n, the bootstrap horizon.
    reanalyze_fraction: share of policy targets searched again, in eighths.
    reanalyze_values: bootstrap from the target network instead of from the
      search values stored when acting.
    reanalyze_chunk: roots searched at once, to bound memory; 0 for all.
    value_weight: of the value loss.
    optimiser: `sgd` with momentum, or `adam`.
    learning_rate: its peak.
    warmup_updates: linear warm-up.
    decay_every: updates between decays of the learning rate; 0 for none.
    decay_rate: the factor of each.
    momentum: of SGD.
    weight_decay: of SGD (in the gradient) or Adam (decoupled).
    max_gradient_norm: gradients are clipped to it.
    target_period: updates between copies to the target parameters.
    total_updates: while it acts, for the temperature; follows from --steps.
  """

  network: NetworkConfig = dataclasses.field(
    default_factory=lambda: NetworkConfig(state_norm=True)
  )
  search: planning.SearchConfig = dataclasses.field(
    default_factory=lambda: planning.SearchConfig(rule='puct')
  )
  gamma: float = 0.997
  unroll_steps: int = 5
  td_steps: int = 5
  reanalyze_fraction: float = 0.8
  reanalyze_values: bool = True
  reanalyze_chunk: int = 0
  value_weight: float = 0.25
  optimiser: Literal['sgd', 'adam'] = 'sgd'
  learning_rate: float = 0.05
  warmup_updates: int = 1000
  decay_every: int = 350_000
  decay_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 1e-4
  max_gradient_norm: float = 5.0
  target_period: int = 200
  total_updates: int = 1_000_000

  def __post_init__(self):
    ranges.at_least(self, 1, 'unroll_steps', 'td_steps', 'target_period')
    ranges.at_least(self, 1, 'total_updates')
    ranges.at_least(self, 0, 'value_weight', *optim.SCHEDULE_FIELDS)
    ranges.at_least(self, 0, 'reanalyze_chunk')
    ranges.within(self, 0, 1, 'gamma', 'reanalyze_fraction', 'momentum')
    ranges.above(self, 0, 'max_gradient_norm', finite=False)

  @property
  def window(self) -> int:
    """Steps that a replayed window must have."""
    return self.unroll_steps + self.td_steps + 1


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
    policy: `(logits [B, A], target distribution [B, A]) -> [B]`.
    value: `(logits [B, N], target [B]) -> [B]`, target in raw units.
    reward: `(logits [B, N], target [B]) -> [B]`.
  """

  policy: Callable[[chex.Array, chex.Array], chex.Array]
  value: Callable[[chex.Array, chex.Array], chex.Array]
  reward: Callable[[chex.Array, chex.Array], chex.Array]


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Callable[[Any], Any] | None = None,
) -> MuZeroNetworks:
  """The networks for a spec.

  `reduce` is the mean over devices of batch statistics, where one update runs
  on several by `pmap`.

  Raises:
    ValueError: if actions are not discrete or observations not one array.
  """
  if not isinstance(spec.action, Discrete):
    raise ValueError(
      f'muzero needs discrete actions; {spec.name} has actions of shape '
      f'{spec.action.shape}: set env.action_bins where they are continuous, or '
      'take another agent'
    )
  if not hasattr(spec.observation, 'shape'):
    raise ValueError(
      f'muzero needs one observation array; {spec.name} has a '
      f'{type(spec.observation).__name__}; agent=alphazero takes positions'
    )
  network = dataclasses.replace(config.network, reward='reward')
  return muzero_networks.make(
    network, spec.observation, spec.action.num_actions, reduce
  )


def make_losses() -> Losses:
  """Cross-entropies, the scalars as two-hot distributions."""

  def scalar(logits, target):
    labels = heads.to_two_hot(target, logits.shape[-1])
    return terms.cross_entropy(logits, labels)

  return Losses(policy=terms.cross_entropy, value=scalar, reward=scalar)


def make_optimiser(config: Config) -> optax.GradientTransformation:
  """The optimiser that a config names."""
  schedule = optim.warmup_step_decay(
    config.learning_rate,
    warmup_steps=config.warmup_updates,
    decay_every=config.decay_every,
    decay_rate=config.decay_rate,
  )
  shared = {
    'weight_decay': config.weight_decay,
    'max_norm': config.max_gradient_norm,
  }
  if config.optimiser == 'adam':
    return optim.adamw(schedule, **shared)
  return optim.sgd(schedule, momentum=config.momentum, **shared)


def make(
  config: Config,
  networks: MuZeroNetworks,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Trajectory`s of `config.window` steps with
    `extras` `search_policy [B, L, A]` and `search_value [B, L]`.
  """
  assert isinstance(spec.action, Discrete)
  num_actions = spec.action.num_actions
  model = learned_model(networks, gamma=config.gamma)
  search = planning.make_search(config.search)
  optimiser = make_optimiser(config)
  head = slice(0, config.unroll_steps + 1)

  def init(key) -> State:
    network, statistics = networks.init(key)
    params = Params(network, statistics, jnp.zeros((), jnp.int32))
    return State(params, params, optimiser.init(network))

  def act(params, key, timestep):
    root_key, search_key = jax.random.split(key)
    output = search(
      params,
      search_key,
      model.root(params, timestep, root_key),
      model.step,
      invalid_actions=timestep.invalid_actions,
      temperature=visit_temperature(params.step, config.total_updates),
    )
    extras = {
      'search_policy': output.action_weights,
      'search_value': output.value,
    }
    return output.action, extras

  def refresh(state: State, batch: Trajectory, step, key) -> Trajectory:
    del step
    timestep, extras = batch.experience.timestep, batch.experience.extras
    params, size = state.target_params, timestep.reward.shape[0]
    fresh = planning.share(config.reanalyze_fraction, size)
    if config.reanalyze_values:
      flat = flatten_steps(timestep)
      value = model.root(params, flat, key).value.reshape(size, -1)
      extras = extras | {'search_value': value}
    if fresh.count:
      roots = fresh.take(jax.tree.map(lambda x: x[:, head], timestep))
      weights = planning.research(
        search, model, params, key, roots, config.reanalyze_chunk
      ).action_weights
      policy = extras['search_policy']
      policy = policy.at[:, head].set(fresh.put(policy[:, head], weights))
      extras = extras | {'search_policy': policy}
    return batch._replace(experience=batch.experience._replace(extras=extras))

  def make_targets(batch: Trajectory):
    timestep = batch.experience.timestep
    one = functools.partial(
      targets.unroll_targets,
      horizon=config.td_steps,
      gamma=config.gamma,
      unroll_steps=config.unroll_steps,
      max_horizon=config.td_steps,
    )
    return jax.vmap(one)(
      timestep.reward,
      timestep.discount,
      timestep.truncated,
      batch.valid,
      batch.experience.extras['search_value'],
    )

  def loss(network, statistics, batch: Trajectory, key, train=True):
    target = make_targets(batch)
    action = batch.experience.action[:, : config.unroll_steps]
    random = jax.random.randint(key, action.shape, 0, num_actions)
    # Behind an episode's end any action must lead to the absorbing state.
    action = jnp.where(target.policy_mask[:, :-1] > 0, action, random)
    observation = jax.tree.map(
      lambda x: x[:, 0], batch.experience.timestep.observation
    )
    statistics = networks.listen(statistics, mixture.gate_key(key))
    state, statistics = networks.represent(
      network, statistics, observation, train
    )
    out = unroll(networks, network, statistics, state, action, train=train)

    by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), target)
    pi = batch.experience.extras['search_policy'][:, head].swapaxes(0, 1)
    over_steps = jax.vmap
    policy = over_steps(losses.policy)(out.policy_logits, pi)
    value = over_steps(losses.value)(out.value_logits, by_step.value)
    reward = over_steps(losses.reward)(out.reward_logits, by_step.reward[1:])
    policy = jnp.sum(policy * by_step.policy_mask, 0)
    value = jnp.sum(value * by_step.value_mask, 0)
    reward = jnp.sum(reward * by_step.reward_mask[1:], 0)
    by_row = policy + config.value_weight * value + reward
    weight = 1.0 if batch.sample is None else batch.sample.weight
    total = jnp.mean(weight * by_row) / config.unroll_steps
    statistics, aux = networks.told(out.statistics)
    if aux is not None:
      total += aux.loss

    bins = out.value_logits.shape[-1], out.reward_logits.shape[-1]
    predicted = heads.from_logits(out.value_logits[0])
    entropy = -jnp.sum(jax.scipy.special.xlogy(pi[0], pi[0]), -1)
    metrics = {
      'loss': total,
      'loss_policy': jnp.mean(policy),
      'loss_value': jnp.mean(value),
      'loss_reward': jnp.mean(reward),
      'value': jnp.mean(predicted),
      'value_target': jnp.mean(target.value[:, 0]),
      'target_entropy': jnp.mean(entropy),
    }
    metrics |= support_metrics(target, *bins)
    if aux is not None:
      metrics |= mixture.metrics(aux)
    priorities = jnp.abs(predicted - target.value[:, 0])
    return total, (statistics, Info(metrics, priorities))

  step = optim.minimise(loss, optimiser, reduce)

  def update(state: State, batch: Trajectory, key) -> tuple[State, Info]:
    params = state.params
    network, opt_state, (statistics, info), norm = step(
      params.network, state.opt_state, params.statistics, batch, key
    )
    count = params.step + 1
    params = Params(network, reduce(statistics), count)
    target_params = optim.periodic(
      params, state.target_params, count, config.target_period
    )
    metrics = reduce(info.metrics | {'gradient_norm': norm})
    state = State(params, target_params, opt_state)
    return state, Info(metrics, info.priorities)

  def evaluate(params, batch, key):
    _, (_, info) = loss(params.network, params.statistics, batch, key, False)
    return info.metrics

  refreshes = config.reanalyze_fraction > 0 or config.reanalyze_values
  return Agent(
    init=init,
    act=act,
    update=update,
    refresh=refresh if refreshes else None,
    model=model,
    evaluate=evaluate,
  )
