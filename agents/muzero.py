"""MuZero with Reanalyze: planning in a learned latent model.

A representation `s_0 = h(o_0)`, dynamics `r_k, s_k = g(s_{k-1}, a)` and
predictions `p_k, v_k = f(s_k)` are unrolled over replayed actions and trained
by (Schrittwieser 2020, equation 1)

  L = sum_k  CE(p_k, pi_k) + 1/4 * CE(v_k, z_k) + CE(r_k, u_k)

with `pi` the visit counts of a search, `z` an n-step return, `u` the reward;
value and reward are categorical over a support, after the signed hyperbolic
transform, with two-hot targets (Appendix F). With Reanalyze (Appendix H) a
share of the policy targets is searched again with target parameters, and the
value is bootstrapped from the target network.

Departures and choices:

* `z` uses a fixed horizon and one bootstrap. After a termination states are
  absorbing with value and reward 0 (Appendix G); after a truncation nothing is
  trained.
* Gradients into the dynamics are halved at its entrance and the whole loss is
  divided by K (Appendix G scales each unrolled head by 1/K and leaves step 0
  whole).
* Values are scaled by the range of each node's children, as in mctx, and not
  of the whole tree.
* Priorities have the exponents of the run's settings (0.6, and 0.4 rising to 1
  for the weights).
* The official network is a 16-block ResNet; ours is the one of
  `NetworkConfig`, by default EfficientZero's, so that the two agents differ in
  their targets and not in size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax

from agents.core import latent, optim, planning, ranges
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
from agents.core.unroll import learned_model, visit_temperature
from networks import muzero as muzero_networks
from networks.muzero import MuZeroNetworks, NetworkConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """MuZero's hyper-parameters; defaults are those of MuZero Reanalyze.

  Attributes:
    network: sizes and kinds of the networks.
    search: the search when acting and when reanalysing.
    gamma: discount per decision.
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
    latent.check(self)
    ranges.within(self, 0, 1, 'momentum')

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
  action, observation = as_discrete(spec, 'muzero'), as_array(spec, 'muzero')
  network = dataclasses.replace(config.network, reward='reward')
  return muzero_networks.make(network, observation, action.num_actions, reduce)


def make_losses() -> Losses:
  """Cross-entropies, the scalars as two-hot distributions."""
  scalar = terms.two_hot_cross_entropy
  return Losses(policy=terms.cross_entropy, value=scalar, reward=scalar)


def make_loss(
  config: Config, networks: MuZeroNetworks, losses: Losses, spec: Spec
) -> Callable[..., tuple[chex.Array, tuple[Any, Info]]]:
  """The whole loss.

  Returns:
    `(params, statistics, batch, key, train=True) -> (loss, (statistics,
    Info))`.
  """
  num_actions = as_discrete(spec, 'muzero').num_actions
  head = slice(0, config.unroll_steps + 1)

  def loss(params, statistics, batch: Trajectory, key, train=True):
    target = latent.make_targets(config, batch, config.td_steps)
    draw = lambda x: jax.random.randint(key, x.shape, 0, num_actions)
    action = latent.unrolled_actions(batch, target, draw)
    observation = batch.experience.timestep.observation
    out = latent.forward(
      networks, params, statistics, observation, action, key, train=train
    )
    pi = latent.by_step(batch.experience.extras['search_policy'][:, head])
    policy = jax.vmap(losses.policy)(out.model.policy_logits, pi)
    found = {
      'policy': policy * latent.by_step(target.policy_mask),
      **latent.model_terms(losses, out, target),
    }
    return latent.account(config, found, batch, out, target)

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
  model = learned_model(networks, gamma=config.gamma)
  search = planning.make_search(config.search)
  optimiser = optim.from_config(config, config.optimiser)
  loss = make_loss(config, networks, losses, spec)
  step = optim.minimise(loss, optimiser, reduce)

  def init(key) -> State:
    return latent.init(networks, optimiser, key)

  def act(params, key, timestep):
    temperature = visit_temperature(params.step, config.total_updates)
    return planning.decide(search, model, params, key, timestep, temperature)

  def refresh(state: State, batch: Trajectory, step, key) -> Trajectory:
    del step
    if config.reanalyze_values:
      batch = latent.re_value(model, state.target_params, key, batch)
    params = state.target_params
    return latent.re_search(config, search, model, params, key, batch)

  def update(state: State, batch: Trajectory, key) -> tuple[State, Info]:
    params = state.params
    out = step(params.network, state.opt_state, params.statistics, batch, key)
    return latent.advance(state, out, config.target_period, reduce)

  refreshes = config.reanalyze_fraction > 0 or config.reanalyze_values
  return Agent(
    init=init,
    act=act,
    update=update,
    refresh=refresh if refreshes else None,
    model=model,
    evaluate=functools.partial(latent.evaluate, loss),
  )
