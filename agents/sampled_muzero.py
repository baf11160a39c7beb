"""Sampled MuZero: MuZero over sampled actions (Hubert 2021).

The model is MuZero's: a representation `s_0 = h(o_0)`, dynamics `s_k =
g(s_{k-1}, a)`, rewards, and a policy and value `pi, v(s_k)`. What differs is
that pi is a distribution from which the search draws K actions at every node
(`search/sampled.py`), and that it is trained on those actions alone:

  L = sum_k  KL(w_k || pi_k) + 1/4 * CE(v_k, z_k) + CE(r_k, u_k)
      - c * H(pi_k)

with `w` the visit distribution over the root's K actions (the correction
beta_hat / beta has entered it through the priors). A policy is a tanh-Gaussian,
one categorical a dimension, or one categorical over all actions; the last two
also for discrete sets far too large to search. With Reanalyze the actions are
drawn again with target parameters, and searched again.

EfficientZero's value prefix, consistency loss and off-policy correction (Ye
2021; `dynamic_horizon` and `searched_values`) can be switched on one by one:
all together make Sampled EfficientZero.

Departures and choices:

* Those of the search are in `search/sampled.py`.
* The loss has KL in place of the cross-entropy, which differs by a constant:
  zero means that the policy is the search's on these actions. For densities it
  may be negative.
* Adam, and networks of the config; the paper's sizes for continuous control
  are not known to us.
* Gradients, ends of episodes, targets and priorities are those of
  `agents/efficientzero.py`; by default the horizon is fixed and the bootstrap
  is the target network's value.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from agents.core import efficient, latent, optim, planning, ranges, sampling
from agents.core import losses as terms
from agents.core.latent import Losses, State
from agents.core.types import (
  Agent,
  Info,
  Spec,
  Trajectory,
)
from agents.core.unroll import visit_temperature
from networks.actions import ActionDistribution
from networks.muzero import MuZeroNetworks, NetworkConfig


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
    gamma: discount per decision.
    unroll_steps: steps that the model is unrolled in training.
    td_steps: n, the longest bootstrap horizon.
    value_prefix: predict sums of rewards by an LSTM instead of rewards.
    prefix_horizon: steps between resets of that LSTM.
    consistency: train latent states towards those of the true successors.
    dynamic_horizon: shorten the bootstrap horizon with the age of the data.
    searched_values: bootstrap from the root values of a fresh search of all
      steps; otherwise from the target network's values, and only the steps with
      a policy target are searched again.
    off_policy_fraction: share of all decisions that costs one step.
    reanalyze_fraction: share of policy targets searched again, in eighths.
    reanalyze_chunk: roots searched at once, to bound memory; 0 for all. Each
      has `num_samples` states when its actions are evaluated.
    augmentation: random shift and intensity of image observations with sides
      of 32 pixels or more.
    reward_scale: rewards are multiplied by it before they are learned from.
      Bins stand at the integers: where rewards are much smaller than 1, the
      differences between actions are lost in the noise of the heads.
    reward_weight: of the reward or prefix loss.
    value_weight: of the value loss.
    policy_weight: of the policy loss.
    consistency_weight: of the consistency loss.
    variance_weight: of `spread.variance_hinge` of the projections, which keeps
      the latents of a batch apart; 0 leaves that to `projection_norm`.
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
  dynamic_horizon: bool = False
  searched_values: bool = False
  off_policy_fraction: float = 0.3
  reanalyze_fraction: float = 1.0
  reanalyze_chunk: int = 0
  augmentation: bool = True
  reward_scale: float = 1.0
  reward_weight: float = 1.0
  value_weight: float = 0.25
  policy_weight: float = 1.0
  consistency_weight: float = 2.0
  variance_weight: float = 0.0
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
    latent.check(self)
    counts = ('prefix_horizon', 'total_decisions', 'entropy_samples', 'bins')
    ranges.at_least(self, 1, *counts)
    weights = ('reward_weight', 'policy_weight')
    weights += ('consistency_weight', 'variance_weight')
    ranges.at_least(self, 0, *weights, 'entropy_weight', 'temperature')
    scales = ('min_std', 'init_std', 'reward_scale')
    ranges.above(self, 0, *scales, 'off_policy_fraction')

  @property
  def window(self) -> int:
    """Steps that a replayed window must have."""
    return self.unroll_steps + self.td_steps + 1


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Callable[[Any], Any] | None = None,
) -> MuZeroNetworks:
  """The networks for a spec; their dynamics take the environment's actions.

  `reduce` is the mean over devices of batch statistics, where one update runs
  on several by `pmap`.

  Raises:
    ValueError: as `sampling.make_distribution`, or if observations are not one
      array.
  """
  distribution = sampling.make_distribution(config, spec)
  network = efficient.network_config(config)
  return sampling.make_networks(
    network, spec, 'sampled_muzero', distribution, reduce
  )


def make_losses() -> Losses:
  """The paper's terms; SimSiam's cosine for the consistency."""
  scalar = terms.two_hot_cross_entropy
  return Losses(terms.sampled_kl, scalar, scalar, terms.negative_cosine)


def make_loss(
  config: Config,
  networks: MuZeroNetworks,
  losses: Losses,
  spec: Spec,
  distribution: ActionDistribution,
) -> Callable[..., tuple[chex.Array, tuple[Any, Info]]]:
  """The weighted sum of all loss terms, as one function.

  Returns:
    `(params, statistics, batch, key, train=True) -> (loss, (statistics,
    Info))`.
  """

  def loss(params, statistics, batch: Trajectory, key, train=True):
    action_key, image_key, entropy_key = jax.random.split(key, 3)
    reward = config.reward_scale * batch.experience.timestep.reward
    target, horizon = efficient.make_targets(config, batch, reward)
    any_actions = functools.partial(
      sampling.any_actions, distribution, spec, action_key
    )
    action = latent.unrolled_actions(batch, target, any_actions)
    args = (config, networks, losses, params, statistics, batch)
    out = efficient.forward(*args, action, key, image_key, train=train)
    policy, metrics = sampling.policy_terms(
      config, losses, distribution, out, target, batch, entropy_key
    )
    found = policy | latent.model_terms(losses, out, target)
    metrics['horizon'] = jnp.mean(horizon.astype(jnp.float32))
    return latent.account(config, found, batch, out, target, **metrics)

  return loss


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
  distribution = sampling.make_distribution(config, spec)
  model = efficient.make_model(config, networks, distribution)
  search = planning.make_search(config.search, distribution)
  optimiser = optim.from_config(config, 'adam')
  loss = make_loss(config, networks, losses, spec, distribution)
  step = optim.minimise(loss, optimiser, reduce)

  def init(key) -> State:
    return latent.init(networks, optimiser, key)

  def act(params, key, timestep):
    cooling = visit_temperature(params.step, config.total_updates)
    temperature = config.temperature * cooling
    return planning.decide(search, model, params, key, timestep, temperature)

  def update(state: State, batch: Trajectory, key) -> tuple[State, Info]:
    params = state.params
    out = step(params.network, state.opt_state, params.statistics, batch, key)
    return latent.advance(state, out, config.target_period, reduce)

  refresh = functools.partial(efficient.reanalyze, config, search, model)
  evaluate = functools.partial(latent.evaluate, loss)
  return Agent(init, act, update, refresh, model, evaluate)
