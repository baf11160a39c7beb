"""EfficientZero: a latent model, searched, from little data (Ye 2021).

The model is a representation `s_0 = H(o_0)`, dynamics `s_k = G(s_{k-1}, a)`,
a policy and value `P, V(s_k)`, and a *value prefix*: an LSTM that predicts the
sum of rewards since its last reset, of which one reward is the difference of
two. It is trained on windows of replayed experience by

  L = sum_k  1 * CE(prefix_k, x_k) + 1/4 * CE(v_k, z_k) + 1 * CE(p_k, pi_k)
      + 2 * negative_cosine(q(proj(s_k)), sg(proj(H(o_k))))        (eq. 2, 6)

where `pi` are visit counts of a search made again with target parameters
(99% of them, MuZero Reanalyze), and `z` is an n-step return whose horizon
shrinks with the age of the data and whose bootstrap is the root value of a
fresh search (off-policy correction, eq. 4 and 5).

Each ingredient is one field of `Config` and can be switched off alone.

On which side we came down where paper, official code and good sense differ:

* The tree resets the prefix per element and at the right edge; the official
  trees do not (see `search/value_prefix.py`).
* The gradient is halved at the entrance of the dynamics (MuZero, Appendix G);
  the official code halves it behind the heads, which also halves theirs.
* The bootstrap is re-searched, as the paper says; official default: it is not.
* Priorities are on with 0.6 and 0.4 -> 1, as the paper says; official default:
  off.
* Ends: states behind a termination are absorbing and trained to value and
  reward 0, as in MuZero, because the tree walks there; the official code masks
  them. States behind a truncation, and ends of stored blocks, are never taken
  for terminal (the official code bootstraps with 0 near the end of a block).
* Actions behind an episode's end are uniformly random, as in the official
  code.
* Batch statistics of the unrolled consistency targets are updated together,
  `K` steps in one pass; the official code runs them one by one.
* The first decisions, before any update, come from searching the untrained
  network; the official code acts at random. The target parameters lag by up to
  `target_period` updates, the official ones by one to two periods.
* New rows get the largest priority seen so far, from 1 upwards.
* The share that is searched again is counted in eighths of a batch, so that
  devices that share the batch search alike: 99% are all of it.
* Acting uses the newest parameters that the source hands over; the official
  self-play workers fetch them every 100 updates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import augment, optim, planning, ranges, targets
from agents.core import losses as terms
from agents.core.types import Agent, Discrete, Info, Spec, Trajectory
from agents.core.unroll import (
  Params,
  consistency,
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
  """EfficientZero's hyper-parameters; defaults are the paper's for Atari.

  Attributes:
    network: sizes and kinds of the networks.
    search: the search when acting and when reanalysing.
    gamma: discount a decision (0.997 a frame, 4 frames a decision).
    unroll_steps: K, steps that the model is unrolled in training.
    td_steps: n, the longest bootstrap horizon.
    value_prefix: predict sums of rewards by an LSTM instead of rewards.
    prefix_horizon: steps between resets of that LSTM.
    consistency: train latent states towards those of the true successors.
    off_policy_correction: horizon by age of data, bootstrap from a fresh
      search; without it a fixed horizon and the target network's value.
    off_policy_fraction: tau, the share of all decisions that costs one step.
    reanalyze_fraction: share of policy targets searched again, in eighths.
    reanalyze_chunk: roots searched at once, to bound memory; 0 for all.
    augmentation: random shift and intensity of image observations with sides
      of 32 pixels or more; a board is not shifted.
    reward_weight: of the reward or prefix loss.
    value_weight: of the value loss.
    policy_weight: of the policy loss.
    consistency_weight: of the consistency loss.
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
    total_decisions: of the whole run, for the off-policy horizon; follows from
      --steps.
  """

  network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
  search: planning.SearchConfig = dataclasses.field(
    default_factory=planning.SearchConfig
  )
  gamma: float = 0.997**4
  unroll_steps: int = 5
  td_steps: int = 5
  value_prefix: bool = True
  prefix_horizon: int = 5
  consistency: bool = True
  off_policy_correction: bool = True
  off_policy_fraction: float = 0.3
  reanalyze_fraction: float = 0.99
  reanalyze_chunk: int = 0
  augmentation: bool = True
  reward_weight: float = 1.0
  value_weight: float = 0.25
  policy_weight: float = 1.0
  consistency_weight: float = 2.0
  optimiser: Literal['sgd', 'adam'] = 'sgd'
  learning_rate: float = 0.2
  warmup_updates: int = 1000
  decay_every: int = 100_000
  decay_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 1e-4
  max_gradient_norm: float = 5.0
  target_period: int = 200
  total_updates: int = 120_000
  total_decisions: int = 100_000

  def __post_init__(self):
    ranges.at_least(
      self, 1, 'unroll_steps', 'td_steps', 'prefix_horizon', 'target_period'
    )
    ranges.at_least(self, 1, 'total_updates', 'total_decisions')
    weights = ('reward_weight', 'value_weight', 'policy_weight')
    ranges.at_least(self, 0, *weights, 'consistency_weight')
    ranges.at_least(self, 0, *optim.SCHEDULE_FIELDS, 'reanalyze_chunk')
    ranges.within(self, 0, 1, 'gamma', 'reanalyze_fraction', 'momentum')
    ranges.above(self, 0, 'off_policy_fraction')
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
    reward: `(logits [B, N], target [B]) -> [B]`, of rewards or prefixes.
    consistency: `(prediction [B, P], target [B, P]) -> [B]`.
  """

  policy: Callable[[chex.Array, chex.Array], chex.Array]
  value: Callable[[chex.Array, chex.Array], chex.Array]
  reward: Callable[[chex.Array, chex.Array], chex.Array]
  consistency: Callable[[chex.Array, chex.Array], chex.Array]


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
      f'efficientzero needs discrete actions; {spec.name} has actions of shape '
      f'{spec.action.shape}: set env.action_bins where they are continuous, or '
      'take another agent'
    )
  if not hasattr(spec.observation, 'shape'):
    raise ValueError(
      f'efficientzero needs one observation array; {spec.name} has a '
      f'{type(spec.observation).__name__}; agent=alphazero takes positions'
    )
  reward = 'value_prefix' if config.value_prefix else 'reward'
  network = dataclasses.replace(config.network, reward=reward)
  return muzero_networks.make(
    network, spec.observation, spec.action.num_actions, reduce
  )


def make_losses() -> Losses:
  """The paper's terms: cross-entropies of two-hot scalars, SimSiam's cosine."""

  def scalar(logits, target):
    labels = heads.to_two_hot(target, logits.shape[-1])
    return terms.cross_entropy(logits, labels)

  return Losses(
    policy=terms.cross_entropy,
    value=scalar,
    reward=scalar,
    consistency=terms.negative_cosine,
  )


def make_optimiser(config: Config) -> optax.GradientTransformation:
  """The optimiser that a config names."""
  schedule = optim.warmup_step_decay(
    config.learning_rate,
    warmup_steps=config.warmup_updates,
    decay_every=config.decay_every,
    decay_rate=config.decay_rate,
  )
  if config.optimiser == 'adam':
    return optim.adamw(
      schedule,
      weight_decay=config.weight_decay,
      max_norm=config.max_gradient_norm,
    )
  return optim.sgd(
    schedule,
    momentum=config.momentum,
    weight_decay=config.weight_decay,
    max_norm=config.max_gradient_norm,
  )


def make_model(config: Config, networks: MuZeroNetworks):
  """The learned model, for planners."""
  horizon = config.prefix_horizon if config.value_prefix else None
  return learned_model(networks, gamma=config.gamma, prefix_horizon=horizon)


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
  model = make_model(config, networks)
  search = planning.make_search(config.search)
  optimiser = make_optimiser(config)
  unrolled = config.unroll_steps
  head = slice(0, unrolled + 1)

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
    policy = extras['search_policy']
    if config.off_policy_correction:
      output = planning.research(
        search, model, params, key, timestep, config.reanalyze_chunk
      )
      value = output.value
      policy = fresh.put(policy, fresh.take(output.action_weights))
    else:
      flat = flatten_steps(timestep)
      value = model.root(params, flat, key).value.reshape(size, -1)
      if fresh.count:
        roots = fresh.take(jax.tree.map(lambda x: x[:, head], timestep))
        output = planning.research(
          search, model, params, key, roots, config.reanalyze_chunk
        )
        weights = fresh.put(policy[:, head], output.action_weights)
        policy = policy.at[:, head].set(weights)
    extras = extras | {'search_policy': policy, 'search_value': value}
    return batch._replace(experience=batch.experience._replace(extras=extras))

  def make_targets(batch: Trajectory):
    timestep = batch.experience.timestep
    age = jnp.zeros(timestep.reward.shape[0])
    if batch.sample is not None and config.off_policy_correction:
      age = batch.sample.age
    horizon = targets.off_policy_horizon(
      age,
      max_horizon=config.td_steps,
      total_decisions=config.total_decisions,
      fraction=config.off_policy_fraction,
    )

    def one(r, discount, truncated, valid, value, horizon):
      target = targets.unroll_targets(
        r,
        discount,
        truncated,
        valid,
        value,
        horizon,
        gamma=config.gamma,
        unroll_steps=unrolled,
        max_horizon=config.td_steps,
      )
      if config.value_prefix:
        prefix = targets.value_prefixes(target.reward, config.prefix_horizon)
        target = target._replace(reward=prefix)
      return target

    return jax.vmap(one)(
      timestep.reward,
      timestep.discount,
      timestep.truncated,
      batch.valid,
      batch.experience.extras['search_value'],
      horizon,
    ), horizon

  def loss(network, statistics, batch: Trajectory, key, train=True):
    action_key, image_key = jax.random.split(key)
    target, horizon = make_targets(batch)
    observation = batch.experience.timestep.observation[:, head]
    if train and config.augmentation:
      observation = augment.observations(image_key, observation)
    decided = target.policy_mask[:, :unrolled] > 0
    action = batch.experience.action[:, :unrolled]
    random = jax.random.randint(action_key, action.shape, 0, num_actions)
    action = jnp.where(decided, action, random)

    statistics = networks.listen(statistics, mixture.gate_key(key))
    state, statistics = networks.represent(
      network, statistics, observation[:, 0], train
    )
    out = unroll(
      networks,
      network,
      statistics,
      state,
      action,
      train=train,
      reset_every=config.prefix_horizon if config.value_prefix else None,
    )
    statistics = out.statistics
    by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), target)
    rows = jax.vmap  # over the unrolled steps
    pi = batch.experience.extras['search_policy'][:, head]
    policy = rows(losses.policy)(out.policy_logits, jnp.swapaxes(pi, 0, 1))
    value = rows(losses.value)(out.value_logits, by_step.value)
    reward = rows(losses.reward)(out.reward_logits, by_step.reward[1:])
    terms_ = {
      'policy': policy * by_step.policy_mask,
      'value': value * by_step.value_mask,
      'reward': reward * by_step.reward_mask[1:],
    }
    if config.consistency:
      similarity, statistics = consistency(
        networks,
        losses.consistency,
        network,
        statistics,
        out.states,
        observation[:, 1:],
        train,
      )
      terms_['consistency'] = similarity * by_step.observation_mask[1:]

    weights = {
      'policy': config.policy_weight,
      'value': config.value_weight,
      'reward': config.reward_weight,
      'consistency': config.consistency_weight,
    }
    by_row = sum(weights[name] * jnp.sum(x, 0) for name, x in terms_.items())
    importance = (
      jnp.ones_like(by_row) if batch.sample is None else batch.sample.weight
    )
    total = jnp.mean(importance * by_row) / unrolled
    statistics, aux = networks.told(statistics)
    if aux is not None:
      total += aux.loss
    bins = out.value_logits.shape[-1], out.reward_logits.shape[-1]
    predicted = heads.from_logits(out.value_logits[0])
    entropy = -jnp.sum(jax.scipy.special.xlogy(pi[:, 0], pi[:, 0]), -1)
    metrics = {f'loss_{k}': jnp.mean(jnp.sum(x, 0)) for k, x in terms_.items()}
    metrics |= {
      'loss': total,
      'value': jnp.mean(predicted),
      'value_target': jnp.mean(target.value[:, 0]),
      'target_entropy': jnp.mean(entropy),
      'horizon': jnp.mean(horizon.astype(jnp.float32)),
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
    statistics = reduce(statistics)
    count = params.step + 1
    params = Params(network, statistics, count)
    target_params = optim.periodic(
      params, state.target_params, count, config.target_period
    )
    metrics = reduce(info.metrics | {'gradient_norm': norm})
    state = State(params, target_params, opt_state)
    return state, Info(metrics, info.priorities)

  def evaluate(params, batch, key):
    _, (_, info) = loss(params.network, params.statistics, batch, key, False)
    return info.metrics

  return Agent(
    init=init,
    act=act,
    update=update,
    refresh=refresh,
    model=model,
    evaluate=evaluate,
  )
