"""EfficientZero V2: one agent for all actions and observations (Wang 2024).

EfficientZero's model (`agents/efficientzero.py`) for discrete and continuous
actions, images and vectors, searched by Gumbel MuZero's rule. Candidates at the
root are all actions of a discrete set, or else K drawn ones, a part of them
from a flattened policy. The loss is

  L = sum_k  CE(r_k, u_k) + 1/4 * CE(v_k, z_k) + KL(w_k || p_k) - c * H(p_k)
      + lambda * negative_cosine(q(proj(s_k)), sg(proj(H(o_k))))

with `w` the search's improved policy, or for actions of several components its
best action alone (Gumbel MuZero's simple loss). The value's target is mixed,

  z = n-step return, bootstrapped by the target network,
      early in training (update < T_1) and for fresh data (age < T_2);
  z = V_S, the mean of the root's network value and of the estimates of all
      simulations (search-based value estimation), otherwise.

The paper's text was not at hand beyond its first page: numbers are those of
its official code (config/exp), from whose DM-Control states the defaults come.

Departures and choices:

* `value_weight` is half of the official 0.5, whose loss has another factor 1/2.
* T_1 and T_2 are shares of the run's updates and decisions, and not counts.
* Qs are rescaled node by node and an unvisited action's Q starts from the
  network's value, as in Gumbel MuZero and mctx; officially by the whole tree,
  and from the node's mean. The prefix is reset as in `search/value_prefix.py`.
* Below the root spare slots count as unvisited actions where Qs are rescaled.
* Actions that are played without exploring are searched with the policy's mode.
* Values are not clipped at 0 from below, as officially on DM-Control.
* Bins stand at the integers after the transform h; the official 51 bins for
  DM-Control divide h(-299) ... h(299) (values) and h(-2) ... h(2) (rewards).
  `reward_scale` makes up for it.
* The entropy bonus is for discrete actions, too (officially for none), and
  estimated from fewer draws (officially 1,024).
* Embedded actions enter by a layer of their own, discrete ones as one-hot
  vectors (officially as the plane a / |A|); the rest of the network is the one
  of `agents/efficientzero.py`. Adam's weight decay is decoupled.
* Rows that are not searched again (officially none) keep the n-step return.
  Without any reanalysis the values are those of the searches when acting.
* Ends of episodes, gradients, projections, priorities of new rows and acting
  are those of `agents/efficientzero.py`.
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
from agents.core.targets import UnrollTargets, is_searched
from agents.core.types import (
  Agent,
  Continuous,
  Info,
  Spec,
  Trajectory,
)
from networks.muzero import MuZeroNetworks, NetworkConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """EfficientZero V2's hyper-parameters; defaults are for DM-Control's states.

  Attributes:
    network: sizes and kinds of the networks.
    search: the search when acting and when reanalysing.
    policy: `auto` enumerates discrete actions and is `gaussian` for continuous
      ones; otherwise as for Sampled MuZero.
    policy_target: the search's `improved` policy or its `best` action; `auto`
      takes the latter for continuous actions of several components.
    bins: values a dimension of a factored policy over continuous actions.
    min_std: least standard deviation of a Gaussian before its squashing.
    init_std: the one that it starts with.
    gamma: discount per decision.
    unroll_steps: K, steps that the model is unrolled in training.
    td_steps: n, the bootstrap horizon.
    mixed_after: T_1, the share of all updates before which no search's value is
      a target; 1 for never.
    fresh_fraction: T_2, the share of all decisions that data counts as fresh.
    value_prefix: predict sums of rewards by an LSTM instead of rewards.
    prefix_horizon: steps between resets of that LSTM.
    consistency: train latent states towards those of the true successors.
    reanalyze_fraction: share of rows searched again, in eighths.
    reanalyze_chunk: roots searched at once, to bound memory; 0 for all.
    augmentation: random shift and intensity of image observations with sides
      of 32 pixels or more.
    min_importance: importance weights are at least that.
    reward_scale: rewards are multiplied by it before they are learned from.
    reward_weight: of the reward or prefix loss.
    value_weight: of the value loss.
    policy_weight: of the policy loss.
    consistency_weight: lambda.
    variance_weight: of `spread.variance_hinge` of the projections; 0 for none.
    entropy_weight: c.
    entropy_samples: draws that a Gaussian's entropy is estimated from.
    optimiser: `sgd` with momentum, or `adam`.
    learning_rate: its peak.
    warmup_updates: linear warm-up.
    decay_every: updates between decays of the learning rate; 0 for none.
    decay_rate: the factor of each.
    momentum: of SGD.
    weight_decay: of SGD (in the gradient) or Adam (decoupled).
    max_gradient_norm: gradients are clipped to it.
    target_period: updates between copies to the target parameters.
    total_updates: while it acts, for T_1; follows from --steps.
    total_decisions: of the whole run, for T_2; follows from --steps.
  """

  network: NetworkConfig = dataclasses.field(
    default_factory=lambda: NetworkConfig(
      latent='vector',
      latent_size=128,
      blocks=2,
      head_hidden=(256, 256),
      projector=(512, 512, 128),
      action_embedding=64,
      norm='layer',
    )
  )
  search: planning.SearchConfig = dataclasses.field(
    default_factory=lambda: planning.SearchConfig(
      rule='gumbel',
      num_simulations=32,
      dirichlet_fraction=0.0,
      num_samples=16,
      wide_samples=12,
      leaf_samples=2,
      evaluate_root=False,
    )
  )
  policy: Literal['auto', 'gaussian', 'factored', 'flat'] = 'auto'
  policy_target: Literal['auto', 'improved', 'best'] = 'auto'
  bins: int = 7
  min_std: float = 0.1
  init_std: float = 1.0
  gamma: float = 0.997**2
  unroll_steps: int = 5
  td_steps: int = 5
  mixed_after: float = 0.4
  fresh_fraction: float = 0.2
  value_prefix: bool = False
  prefix_horizon: int = 5
  consistency: bool = True
  reanalyze_fraction: float = 1.0
  reanalyze_chunk: int = 0
  augmentation: bool = True
  min_importance: float = 0.1
  reward_scale: float = 1.0
  reward_weight: float = 1.0
  value_weight: float = 0.25
  policy_weight: float = 1.0
  consistency_weight: float = 2.0
  variance_weight: float = 0.0
  entropy_weight: float = 5e-2
  entropy_samples: int = 16
  optimiser: Literal['sgd', 'adam'] = 'adam'
  learning_rate: float = 3e-4
  warmup_updates: int = 1000
  decay_every: int = 0
  decay_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 2e-5
  max_gradient_norm: float = 5.0
  target_period: int = 200
  total_updates: int = 100_000
  total_decisions: int = 100_000

  def __post_init__(self):
    latent.check(self)
    lengths = ('prefix_horizon', 'total_decisions')
    ranges.at_least(self, 1, *lengths, 'entropy_samples', 'bins')
    weights = ('reward', 'policy', 'consistency', 'variance', 'entropy')
    ranges.at_least(self, 0, *(f'{name}_weight' for name in weights))
    shares = ('mixed_after', 'fresh_fraction', 'min_importance', 'momentum')
    ranges.within(self, 0, 1, *shares)
    ranges.above(self, 0, 'min_std', 'init_std', 'reward_scale')

  @property
  def window(self) -> int:
    """Steps that a replayed window must have."""
    return self.unroll_steps + self.td_steps + 1


def takes_best(config: Config, spec: Spec) -> bool:
  """Whether the policy's target is the best action alone."""
  if config.policy_target != 'auto':
    return config.policy_target == 'best'
  action = spec.action
  return isinstance(action, Continuous) and action.low.size > 1


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Callable[[Any], Any] | None = None,
) -> MuZeroNetworks:
  """The networks for a spec.

  `reduce` is the mean over devices of batch statistics, where one update runs
  on several by `pmap`.

  Raises:
    ValueError: as `sampling.family`, or if observations are not one array.
  """
  family = sampling.family(config, spec)
  network = efficient.network_config(config)
  return sampling.make_networks(
    network, spec, 'efficientzero_v2', family, reduce
  )


def make_losses() -> Losses:
  """The paper's terms; all policies as log-probabilities of the candidates."""
  scalar, cosine = terms.two_hot_cross_entropy, terms.negative_cosine
  return Losses(terms.sampled_kl, scalar, scalar, cosine)


def make_targets(
  config: Config, batch: Trajectory, step: chex.Array
) -> tuple[UnrollTargets, dict[str, chex.Array]]:
  """Mixed value targets, and rewards or their prefixes.

  Args:
    config: hyper-parameters.
    batch: windows, with `search_value [B, L]` in `extras`, and `network_value
      [B, L]` where they were reanalysed. Those that were not drawn from a
      replay are fresh.
    step: int32 scalar, updates so far.

  Returns:
    `UnrollTargets` with leaves `[B, K + 1]`, and metrics: the share of rows
    whose values are the search's, and how far the two targets are apart where
    there was a fresh search.

  Source: EfficientZero V2 (Wang 2024), section 4.3.
  """
  extras, drawn = batch.experience.extras, batch.sample
  found = extras['search_value']
  network = extras.get('network_value', found)
  reward = config.reward_scale * batch.experience.timestep.reward
  returns = latent.replace(batch, search_value=network)
  target = latent.make_targets(config, returns, config.td_steps, reward)
  age = jnp.zeros_like(found[:, 0]) if drawn is None else drawn.age
  is_old = is_searched(
    step,
    age,
    after=config.mixed_after * config.total_updates,
    fresh=config.fresh_fraction * config.total_decisions,
  )
  has_search = jnp.ones_like(is_old)
  if 'network_value' in extras:
    rows = planning.share(config.reanalyze_fraction, len(found))
    has_search = rows.mask(len(found))
  is_old &= has_search
  decides = target.policy_mask > 0
  searched = jnp.where(decides, found[:, : decides.shape[1]], target.value)
  apart = jnp.abs(searched - target.value)
  metrics = {
    'searched_share': jnp.mean(is_old.astype(jnp.float32)),
    'search_gap': terms.masked_mean(
      apart, target.policy_mask * has_search[:, None]
    ),
  }
  value = jnp.where(is_old[:, None], searched, target.value)
  return efficient.with_prefixes(config, target._replace(value=value)), metrics


def make_loss(
  config: Config, networks: MuZeroNetworks, losses: Losses, spec: Spec
) -> Callable[..., tuple[chex.Array, tuple[Any, Info]]]:
  """The whole loss.

  Returns:
    `(params, statistics, (batch, *make_targets), key, train=True) -> (loss,
    (statistics, Info))`.
  """
  family = sampling.family(config, spec)

  def loss(params, statistics, batch_and_targets, key, train=True):
    batch, target, metrics = batch_and_targets
    action_key, image_key, entropy_key = jax.random.split(key, 3)
    draw = functools.partial(sampling.any_actions, family, spec, action_key)
    action = latent.unrolled_actions(batch, target, draw)
    args = (config, networks, losses, params, statistics, batch)
    out = efficient.forward(*args, action, key, image_key, train=train)
    found, entropy = sampling.policy_terms(
      config, losses, family, out, target, batch, entropy_key
    )
    found |= latent.model_terms(losses, out, target)
    return latent.account(
      config, found, batch, out, target, **metrics, **entropy
    )

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
    `extras` `search_policy [B, L, S]`, `search_value [B, L]`, and where actions
    are drawn `sampled_actions [B, L, S, ...]`.
  """
  family = sampling.family(config, spec)
  model = efficient.make_model(config, networks, family)
  search = planning.make_search(config.search, family)
  if takes_best(config, spec):
    search = planning.best_only(search)
  optimiser = optim.from_config(config, config.optimiser)
  loss = make_loss(config, networks, losses, spec)
  minimise = optim.minimise(loss, optimiser, reduce)

  def init(key) -> State:
    return latent.init(networks, optimiser, key)

  def act(params, key, timestep):
    return planning.decide(search, model, params, key, timestep, 1.0)

  def refresh(state: State, batch: Trajectory, step, key) -> Trajectory:
    del step
    params = state.target_params
    batch = latent.re_value(model, params, key, batch, 'network_value')
    args = (config, search, model, params, key, batch)
    return latent.re_search(*args, values=True)

  def prepared(params, batch: Trajectory) -> Any:
    batch = latent.with_least_weight(batch, config.min_importance)
    return batch, *make_targets(config, batch, params.step)

  def update(state: State, batch: Trajectory, key) -> tuple[State, Info]:
    params = state.params
    args = (params.statistics, prepared(params, batch), key)
    out = minimise(params.network, state.opt_state, *args)
    return latent.advance(state, out, config.target_period, reduce)

  def evaluate(params, batch: Trajectory, key):
    return latent.evaluate(loss, params, prepared(params, batch), key)

  return Agent(init, act, update, refresh, model, evaluate)
