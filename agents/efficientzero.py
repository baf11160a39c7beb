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
fresh search (off-policy correction, eq. 4 and 5; a field each).

Each ingredient is one field of `Config` and can be switched off alone.

Choices, where the paper and the official code differ or could be improved:

* The tree resets the prefix per element and at the right edge; the official
  trees do not (see `search/value_prefix.py`).
* The gradient is halved at the entrance of the dynamics (MuZero, Appendix G);
  the official code halves it after the heads, which halves theirs too.
* The bootstrap is re-searched (`searched_values`), as the paper says; by the
  official default it is the target network's, while the horizon still shrinks
  with age (`dynamic_horizon`): 6 searches a window instead of 11.
* Priorities are on with 0.6 and 0.4 -> 1, as the paper says; official default:
  off.
* Ends: states after a termination are absorbing and trained to value and reward
  0, as in MuZero, because the search visits them; the official code masks them.
  States after a truncation, and ends of stored blocks, are never taken for
  terminal (the official code bootstraps with 0 near the end of a block).
* Actions after an episode's end are uniformly random, as in the official code.
* Batch statistics of the unrolled consistency targets are updated together,
  `K` steps in one pass; the official code runs them one by one.
* Projector and predictor are normalised by batch whatever `norm` is
  (`projection_norm`), and the variance of projections can be a loss of its own
  (`variance_weight`, VICReg's; 0 as in the paper).
* The first decisions, before any update, come from searching the untrained
  network; the official code acts at random. The target parameters lag by up to
  `target_period` updates, the official ones by one to two periods.
* New rows get the largest priority seen so far, from 1 upwards.
* The share that is searched again is rounded to eighths of a batch, so that
  devices that share the batch search the same rows: 99% are all of it.
* Acting uses the newest parameters that the source hands over; the official
  self-play workers fetch them every 100 updates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from agents.core import efficient, latent, optim, planning, ranges
from agents.core import losses as terms
from agents.core.latent import Losses, State
from agents.core.types import (
  Agent,
  Info,
  Spec,
  Trajectory,
  as_array,
  as_discrete,
)
from agents.core.unroll import visit_temperature
from networks import muzero as muzero_networks
from networks.muzero import MuZeroNetworks, NetworkConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """EfficientZero's hyper-parameters; defaults are the paper's for Atari.

  Attributes:
    network: sizes and kinds of the networks.
    search: the search when acting and when reanalysing.
    gamma: discount per decision (0.997 per frame, 4 frames per decision).
    unroll_steps: K, steps that the model is unrolled in training.
    td_steps: n, the longest bootstrap horizon.
    value_prefix: predict sums of rewards by an LSTM instead of rewards.
    prefix_horizon: steps between resets of that LSTM.
    consistency: train latent states towards those of the true successors.
    dynamic_horizon: shorten the bootstrap horizon with the age of the data.
    searched_values: bootstrap from the root values of a fresh search of all
      steps; otherwise from the target network's values, and only the steps with
      a policy target are searched again.
    off_policy_fraction: tau, the share of all decisions that costs one step.
    reanalyze_fraction: share of policy targets searched again, in eighths.
    reanalyze_chunk: roots searched at once, to bound memory; 0 for all.
    augmentation: random shift and intensity of image observations with sides
      of 32 pixels or more; a board is not shifted.
    reward_weight: of the reward or prefix loss.
    value_weight: of the value loss.
    policy_weight: of the policy loss.
    consistency_weight: of the consistency loss.
    variance_weight: of `spread.variance_hinge` of the projections, which keeps
      the latents of a batch apart; 0 leaves that to `projection_norm`.
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
  dynamic_horizon: bool = True
  searched_values: bool = True
  off_policy_fraction: float = 0.3
  reanalyze_fraction: float = 0.99
  reanalyze_chunk: int = 0
  augmentation: bool = True
  reward_weight: float = 1.0
  value_weight: float = 0.25
  policy_weight: float = 1.0
  consistency_weight: float = 2.0
  variance_weight: float = 0.0
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
    latent.check(self)
    ranges.at_least(self, 1, 'prefix_horizon', 'total_decisions')
    ranges.at_least(self, 0, 'reward_weight', 'policy_weight')
    ranges.at_least(self, 0, 'consistency_weight', 'variance_weight')
    ranges.within(self, 0, 1, 'momentum')
    ranges.above(self, 0, 'off_policy_fraction')

  @property
  def window(self) -> int:
    """Steps that a replayed window must have."""
    return self.unroll_steps + self.td_steps + 1


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
  action = as_discrete(spec, 'efficientzero')
  observation = as_array(spec, 'efficientzero')
  network = efficient.network_config(config)
  return muzero_networks.make(network, observation, action.num_actions, reduce)


def make_losses() -> Losses:
  """The paper's terms: cross-entropies of two-hot scalars, SimSiam's cosine."""
  return Losses(
    policy=terms.cross_entropy,
    value=terms.two_hot_cross_entropy,
    reward=terms.two_hot_cross_entropy,
    consistency=terms.negative_cosine,
  )


def make_loss(
  config: Config, networks: MuZeroNetworks, losses: Losses, spec: Spec
) -> Callable[..., tuple[chex.Array, tuple[Any, Info]]]:
  """The whole loss.

  Returns:
    `(params, statistics, batch, key, train=True) -> (loss, (statistics,
    Info))`.
  """
  num_actions = as_discrete(spec, 'efficientzero').num_actions

  def loss(params, statistics, batch: Trajectory, key, train=True):
    action_key, image_key = jax.random.split(key)
    target, horizon = efficient.make_targets(config, batch)
    draw = lambda x: jax.random.randint(action_key, x.shape, 0, num_actions)
    action = latent.unrolled_actions(batch, target, draw)
    args = (config, networks, losses, params, statistics, batch)
    out = efficient.forward(*args, action, key, image_key, train=train)
    logits = out.model.policy_logits
    pi = batch.experience.extras['search_policy'][:, : logits.shape[0]]
    policy = jax.vmap(losses.policy)(logits, latent.by_step(pi))
    found = latent.model_terms(losses, out, target)
    found['policy'] = policy * latent.by_step(target.policy_mask)
    own = {'horizon': jnp.mean(horizon.astype(jnp.float32))}
    return latent.account(config, found, batch, out, target, **own)

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
    `extras` `search_policy [B, L, A]` and `search_value [B, L]`.
  """
  model = efficient.make_model(config, networks)
  search = planning.make_search(config.search)
  optimiser = optim.from_config(config, config.optimiser)
  loss = make_loss(config, networks, losses, spec)
  step = optim.minimise(loss, optimiser, reduce)

  def init(key) -> State:
    return latent.init(networks, optimiser, key)

  def act(params, key, timestep):
    temperature = visit_temperature(params.step, config.total_updates)
    return planning.decide(search, model, params, key, timestep, temperature)

  def update(state: State, batch: Trajectory, key) -> tuple[State, Info]:
    params = state.params
    out = step(params.network, state.opt_state, params.statistics, batch, key)
    return latent.advance(state, out, config.target_period, reduce)

  refresh = functools.partial(efficient.reanalyze, config, search, model)
  evaluate = functools.partial(latent.evaluate, loss)
  return Agent(init, act, update, refresh, model, evaluate)
