"""Sampled MuZero: MuZero over sampled actions (Hubert 2021).

The model is MuZero's: a representation `s_0 = h(o_0)`, dynamics `s_k =
g(s_{k-1}, a)`, rewards, and a policy and value `pi, v(s_k)`. What differs is
that pi is a distribution from which the search draws K actions at every node
(`search/sampled.py`), and that it is trained on those alone:

  L = sum_k  KL(w_k || pi_k) + 1/4 * CE(v_k, z_k) + CE(r_k, u_k)
      - c * H(pi_k)

with `w` the visit distribution over the root's K actions (the correction
beta_hat / beta has entered it through the priors). A policy is a tanh-Gaussian,
one categorical a dimension, or one categorical over all actions; the last two
also for discrete sets far too large to search. With Reanalyze the actions are
drawn again with target parameters, and searched again.

EfficientZero's value prefix, consistency loss and off-policy correction (Ye
2021) are a field each: all three make Sampled EfficientZero.

Departures and choices:

* What `search/sampled.py` says of the search.
* The loss has KL in place of the cross-entropy, the same but for a constant,
  so that zero means that the policy is the search's on these actions. For
  densities it may be negative.
* Adam, and networks of the config; the paper's sizes for continuous control
  are not known to us.
* Gradients, ends of episodes, targets, priorities: as agents/efficientzero.py
  says, without the off-policy correction with a fixed horizon and the target
  network's value.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import augment, optim, planning, ranges, targets
from agents.core import losses as terms
from agents.core.types import (
  Agent,
  Continuous,
  Info,
  Spec,
  Trajectory,
  check_bounds,
)
from agents.core.unroll import (
  Params,
  consistency,
  flatten_steps,
  learned_model,
  support_metrics,
  unroll,
  visit_temperature,
)
from networks import actions, heads, mixture
from networks import muzero as muzero_networks
from networks.actions import ActionDistribution
from networks.muzero import MuZeroNetworks, NetworkConfig
from search import sampled


@dataclasses.dataclass(frozen=True)
class Config:
  """Sampled MuZero's hyper-parameters.

  K = 20 and 50 simulations are what public implementations take for
  continuous control; the paper's own numbers are not known to us.

  Attributes:
    network: sizes and kinds of the networks.
    search: the search when acting and when reanalysing; `num_samples` is K.
    policy: `gaussian` for continuous actions; `factored`, one categorical a
      dimension (over `bins` values if continuous) or a factor; `flat`, one
      categorical over all actions of a discrete set.
    bins: values a dimension of a factored policy over continuous actions.
    min_std: least standard deviation of a Gaussian before its squashing.
    init_std: the one that it starts with.
    gamma: discount a decision.
    unroll_steps: steps that the model is unrolled in training.
    td_steps: n, the longest bootstrap horizon.
    value_prefix: predict sums of rewards by an LSTM instead of rewards.
    prefix_horizon: steps between resets of that LSTM.
    consistency: train latent states towards those of the true successors.
    off_policy_correction: horizon by age of data, bootstrap from a fresh
      search; without it a fixed horizon and the target network's value.
    off_policy_fraction: share of all decisions that costs one step.
    reanalyze_fraction: share of policy targets searched again, in eighths.
    reanalyze_chunk: roots searched at once, to bound memory; 0 for all. Each
      has `num_samples` states when its actions are evaluated.
    augmentation: random shift and intensity of image observations with sides
      of 32 pixels or more.
    reward_scale: rewards are multiplied by it before anything is learned from
      them. Bins stand at the integers: where rewards are a small part of one,
      what actions differ by is lost in the noise of the heads.
    reward_weight: of the reward or prefix loss.
    value_weight: of the value loss.
    policy_weight: of the policy loss.
    consistency_weight: of the consistency loss.
    entropy_weight: of the entropy bonus; 0 for none.
    entropy_samples: draws that a Gaussian's entropy is estimated from.
    learning_rate: Adam's peak.
    warmup_updates: linear warm-up.
    decay_every: updates between decays of the learning rate; 0 for none.
    decay_rate: the factor of each.
    weight_decay: decoupled.
    max_gradient_norm: gradients are clipped to it.
    target_period: updates between copies to the target parameters.
    temperature: of acting at first; it falls to a half of it and a quarter.
    total_updates: while it acts, for the temperature; follows from --steps.
    total_decisions: of the whole run, for the off-policy horizon; follows from
      --steps.
  """

  network: NetworkConfig = dataclasses.field(
    default_factory=lambda: NetworkConfig(state_norm=True)
  )
  search: planning.SearchConfig = dataclasses.field(
    default_factory=lambda: planning.SearchConfig(rule='puct')
  )
  policy: Literal['gaussian', 'factored', 'flat'] = 'gaussian'
  bins: int = 7
  min_std: float = 0.1
  init_std: float = 1.0
  gamma: float = 0.99
  unroll_steps: int = 5
  td_steps: int = 5
  value_prefix: bool = False
  prefix_horizon: int = 5
  consistency: bool = False
  off_policy_correction: bool = False
  off_policy_fraction: float = 0.3
  reanalyze_fraction: float = 1.0
  reanalyze_chunk: int = 0
  augmentation: bool = True
  reward_scale: float = 1.0
  reward_weight: float = 1.0
  value_weight: float = 0.25
  policy_weight: float = 1.0
  consistency_weight: float = 2.0
  entropy_weight: float = 5e-3
  entropy_samples: int = 16
  learning_rate: float = 1e-3
  warmup_updates: int = 1000
  decay_every: int = 0
  decay_rate: float = 0.1
  weight_decay: float = 1e-4
  max_gradient_norm: float = 5.0
  target_period: int = 200
  temperature: float = 1.0
  total_updates: int = 100_000
  total_decisions: int = 100_000

  def __post_init__(self):
    ranges.at_least(
      self, 1, 'unroll_steps', 'td_steps', 'prefix_horizon', 'target_period'
    )
    ranges.at_least(self, 1, 'entropy_samples', 'total_updates')
    ranges.at_least(self, 1, 'total_decisions', 'bins')
    weights = ('reward_weight', 'value_weight', 'policy_weight')
    ranges.at_least(self, 0, *weights, 'consistency_weight', 'entropy_weight')
    ranges.at_least(self, 0, *optim.SCHEDULE_FIELDS, 'temperature')
    ranges.at_least(self, 0, 'reanalyze_chunk')
    ranges.within(self, 0, 1, 'gamma', 'reanalyze_fraction')
    ranges.above(self, 0, 'off_policy_fraction')
    ranges.above(self, 0, 'max_gradient_norm', finite=False)
    ranges.above(self, 0, 'min_std', 'init_std', 'reward_scale')

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
    policy: `(log_probs [B, K], weights [B, K]) -> [B]`, of sampled actions.
    value: `(logits [B, N], target [B]) -> [B]`, target in raw units.
    reward: `(logits [B, N], target [B]) -> [B]`, of rewards or prefixes.
    consistency: `(prediction [B, P], target [B, P]) -> [B]`.
  """

  policy: Callable[[chex.Array, chex.Array], chex.Array]
  value: Callable[[chex.Array, chex.Array], chex.Array]
  reward: Callable[[chex.Array, chex.Array], chex.Array]
  consistency: Callable[[chex.Array, chex.Array], chex.Array]


def make_distribution(config: Config, spec: Spec) -> ActionDistribution:
  """The family of policies for a spec.

  Raises:
    ValueError: if the policy does not fit the actions, their bounds are not
      finite, or K actions cannot be drawn from it.
  """
  action, name = spec.action, spec.name
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
  sampled.check(
    distribution, config.search.num_samples, config.search.replacement
  )
  return distribution


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Callable[[Any], Any] | None = None,
) -> MuZeroNetworks:
  """The networks for a spec; their dynamics take the environment's actions.

  `reduce` is the mean over devices of batch statistics, where one update runs
  on several by `pmap`.

  Raises:
    ValueError: as `make_distribution`, or if observations are not one array.
  """
  if not hasattr(spec.observation, 'shape'):
    raise ValueError(
      f'sampled_muzero needs one observation array; {spec.name} has a '
      f'{type(spec.observation).__name__}; agent=alphazero takes positions'
    )
  distribution = make_distribution(config, spec)
  reward = 'value_prefix' if config.value_prefix else 'reward'
  networks = muzero_networks.make(
    dataclasses.replace(config.network, reward=reward),
    spec.observation,
    distribution.encoded_size,
    reduce,
    policy_size=distribution.num_parameters,
  )

  def dynamics(params, statistics, state, action, train):
    encoded = distribution.encode(action)
    return networks.dynamics(params, statistics, state, encoded, train)

  return networks._replace(dynamics=dynamics)


def make_losses() -> Losses:
  """The paper's terms; SimSiam's cosine for the consistency."""

  def scalar(logits, target):
    labels = heads.to_two_hot(target, logits.shape[-1])
    return terms.cross_entropy(logits, labels)

  return Losses(
    policy=terms.sampled_kl,
    value=scalar,
    reward=scalar,
    consistency=terms.negative_cosine,
  )


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
    `extras` `search_policy [B, L, K]`, `sampled_actions [B, L, K, ...]` and
    `search_value [B, L]`.
  """
  distribution = make_distribution(config, spec)
  model = learned_model(
    networks,
    gamma=config.gamma,
    prefix_horizon=config.prefix_horizon if config.value_prefix else None,
    distribution=distribution,
  )
  search = planning.make_search(config.search, distribution)
  optimiser = optim.adamw(
    optim.warmup_step_decay(
      config.learning_rate,
      warmup_steps=config.warmup_updates,
      decay_every=config.decay_every,
      decay_rate=config.decay_rate,
    ),
    weight_decay=config.weight_decay,
    max_norm=config.max_gradient_norm,
  )
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
      temperature=config.temperature
      * visit_temperature(params.step, config.total_updates),
    )
    extras = {
      'search_policy': output.action_weights,
      'search_value': output.value,
      'sampled_actions': output.sampled_actions,
    }
    return output.action, extras

  def refresh(state: State, batch: Trajectory, step, key) -> Trajectory:
    del step
    timestep, extras = batch.experience.timestep, batch.experience.extras
    params, size = state.target_params, timestep.reward.shape[0]
    fresh = planning.share(config.reanalyze_fraction, size)
    policy, chosen = extras['search_policy'], extras['sampled_actions']
    if config.off_policy_correction:
      output = planning.research(
        search, model, params, key, timestep, config.reanalyze_chunk
      )
      value, steps = output.value, slice(None)
      output = fresh.take(output)
    else:
      flat = flatten_steps(timestep)
      value = model.root(params, flat, key).value.reshape(size, -1)
      steps = head
      if fresh.count:
        roots = fresh.take(jax.tree.map(lambda x: x[:, head], timestep))
        output = planning.research(
          search, model, params, key, roots, config.reanalyze_chunk
        )
    if fresh.count:
      put = lambda x, new: x.at[:, steps].set(fresh.put(x[:, steps], new))
      policy = put(policy, output.action_weights)
      chosen = put(chosen, output.sampled_actions)
    extras = extras | {
      'search_policy': policy,
      'sampled_actions': chosen,
      'search_value': value,
    }
    return batch._replace(experience=batch.experience._replace(extras=extras))

  def make_targets(batch: Trajectory):
    timestep = batch.experience.timestep
    horizon = jnp.full(timestep.reward.shape[:1], config.td_steps)
    if config.off_policy_correction and batch.sample is not None:
      horizon = targets.off_policy_horizon(
        batch.sample.age,
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
      config.reward_scale * timestep.reward,
      timestep.discount,
      timestep.truncated,
      batch.valid,
      batch.experience.extras['search_value'],
      horizon,
    ), horizon

  def any_action(key, shape):
    # Behind an episode's end any action must lead to the absorbing state.
    zeros = jnp.zeros((shape[0], distribution.num_parameters))
    return distribution.sample(distribution.draw(key, shape), zeros)

  def policy_terms(logits, batch: Trajectory, key):
    # [K + 1, B]: the divergence from the search, and the policy's entropy.
    by_step = lambda x: jnp.swapaxes(x[:, head], 0, 1)
    extras = batch.experience.extras
    log_probs = jax.vmap(distribution.log_prob)(
      logits, by_step(extras['sampled_actions'])
    )
    divergence = jax.vmap(losses.policy)(
      log_probs, by_step(extras['search_policy'])
    )
    draws = distribution.draw(key, (*logits.shape[:2], config.entropy_samples))
    return divergence, jax.vmap(distribution.entropy)(draws, logits)

  def loss(network, statistics, batch: Trajectory, key, train=True):
    action_key, image_key, entropy_key = jax.random.split(key, 3)
    target, horizon = make_targets(batch)
    observation = batch.experience.timestep.observation[:, head]
    if train and config.augmentation:
      observation = augment.observations(image_key, observation)
    action = batch.experience.action[:, :unrolled]
    decided = target.policy_mask[:, :unrolled] > 0
    decided = decided.reshape(decided.shape + (1,) * (action.ndim - 2))
    random = any_action(action_key, action.shape[:2])
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
    policy, entropy = policy_terms(out.policy_logits, batch, entropy_key)
    value = rows(losses.value)(out.value_logits, by_step.value)
    reward = rows(losses.reward)(out.reward_logits, by_step.reward[1:])
    terms_ = {
      'policy': policy * by_step.policy_mask,
      'value': value * by_step.value_mask,
      'reward': reward * by_step.reward_mask[1:],
      'entropy': -entropy * by_step.policy_mask,
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
      'entropy': config.entropy_weight,
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
    pi = batch.experience.extras['search_policy'][:, 0]
    metrics = {f'loss_{k}': jnp.mean(jnp.sum(x, 0)) for k, x in terms_.items()}
    metrics |= {
      'loss': total,
      'value': jnp.mean(predicted),
      'value_target': jnp.mean(target.value[:, 0]),
      'entropy': terms.masked_mean(entropy, by_step.policy_mask),
      'target_entropy': -jnp.mean(
        jnp.sum(jax.scipy.special.xlogy(pi, pi), axis=-1)
      ),
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
