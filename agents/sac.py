"""SAC: soft actor-critic with a learned temperature.

Twin critics regress onto a soft backup, the policy climbs their minimum, and
the temperature keeps the policy's entropy at a target (Haarnoja et al. 2018,
"Soft Actor-Critic Algorithms and Applications", Algorithm 1):

  y   = r + gamma d (min_i qbar_i(s', a') - alpha log pi(a'|s')), a' ~ pi(s')
  J_Q = sum_i mean (q_i(s, a) - y)^2                              (equation 5)
  J_pi = mean alpha log pi(a~|s) - min_i q_i(s, a~), a~ ~ pi(s)   (equation 9)
  J_alpha = mean -alpha (log pi(a~|s) + target entropy)          (equation 18)

In this order, each step with the parameters that the one before it left; the
temperature's has the entropy of the policy before its step, with the same a~.

Departures and choices:

* No factor 1/2 in J_Q, to which Adam is invariant.
* Log-densities are with respect to actions scaled to `[-1, 1]^D`, so that a
  target entropy of -D means the same in every environment.
* `residual_weight` below 1 mixes each critic's own residual error into J_Q
  (DQRA of ATAC, `losses.double_q_residual`); in the residual the critic's own
  soft value at the next state replaces the target's.
* Optional normalisation of observations by a data set's statistics, and of
  the critics' hidden layers: neither is SAC's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from agents.core import actor_critic, optim, ranges
from agents.core import losses as terms
from agents.core.actor_critic import Networks, Params, State, draw_noise
from agents.core.types import Agent, Info, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
  """SAC's hyper-parameters; defaults are the paper's.

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
    residual_weight: weight of the temporal difference in the critics' loss, 1
      for it alone; the rest is the residual error's.
  """

  hidden_sizes: tuple[int, ...] = (256, 256)
  layer_norm: bool = False
  normalise: bool = False
  gamma: float = 0.99
  policy_rate: float = 3e-4
  critic_rate: float = 3e-4
  temperature_rate: float = 3e-4
  target_rate: float = 0.005
  init_temperature: float = 1.0
  target_entropy: float | None = None
  residual_weight: float = 1.0

  def __post_init__(self):
    actor_critic.check_soft(self)
    ranges.within(self, 0, 1, 'residual_weight')


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    critic: `(q_tm1, r_t, discount_t, target_v_t, v_t, residual_weight) -> [B]`
      of one critic. Soft values: `target_v_t` of the targets' minimum, `v_t`
      of this critic.
    policy: `(log_prob, q, temperature) -> [B]`, `q` the least of the critics'.
    temperature: `(log_temperature, log_prob, target_entropy) -> [B]`.
  """

  critic: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  temperature: Callable[..., chex.Array]


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  return actor_critic.make_networks(config, spec, 'sac')


def make_losses() -> Losses:
  """The terms of the module's docstring."""
  return Losses(
    critic=terms.double_q_residual,
    policy=actor_critic.soft_policy,
    temperature=actor_critic.temperature,
  )


def make_critic_loss(
  config: Config, networks: Networks, losses: Losses
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """J_Q.

  Returns:
    `(critic, target_critic, policy, temperature, batch, noise [B, D]) ->
    (loss, metrics)`.
  """
  policy_net, critic_net, box = networks
  weight = config.residual_weight

  def loss(critic, target_critic, policy, temperature, batch, noise):
    gaussian = policy_net.apply(policy, batch.o_t)
    action, log_prob = box.sample(noise, gaussian)
    bonus = -temperature * log_prob
    target_q = critic_net.apply(target_critic, batch.o_t, action)
    target_v = jnp.min(target_q, 0) + bonus
    q, v = critic_net.apply(critic, batch.o_tm1, batch.a_tm1), None
    if actor_critic.has_residual(weight):
      own_q = critic_net.apply(critic, batch.o_t, action)
      v = own_q + jnp.broadcast_to(bonus[None], q.shape)
    discount = config.gamma * batch.discount_t
    return actor_critic.residual_loss(
      losses.critic, batch, discount, q, target_v, v, weight
    )

  return loss


def make(
  config: Config,
  networks: Networks,
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
    An `Agent` whose batches are `Transition`s. The random numbers of an update
    are `draw_noise(key, batch.a_tm1)`.
  """
  optimisers = actor_critic.make_optimisers(config)
  critic_loss = make_critic_loss(config, networks, losses)
  objectives = actor_critic.make_objectives(
    config, networks, losses, spec, critic_loss
  )
  step = optim.minimise_each(objectives, optimisers, reduce)

  def init(key) -> State:
    params = Params(*actor_critic.init(config, networks, key))
    return State(params, params.critic, optim.init(optimisers, params))

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = draw_noise(key, batch.a_tm1)
    old = state.params
    critic = step.critic(
      old.critic,
      state.opt_state.critic,
      state.target_critic,
      old.policy,
      jnp.exp(old.log_temperature),
      batch,
      noise.t,
    )
    policy, temperature, metrics = actor_critic.soft_steps(
      step, state, critic, batch.o_tm1, noise.tm1
    )
    parts = Params(policy, critic, temperature)
    state = actor_critic.advance(state, parts, config.target_rate)
    return state, Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here: the slow copy is not at hand.
    noise, critic = draw_noise(key, batch.a_tm1), params.critic
    alpha = jnp.exp(params.log_temperature)
    _, critic_info = critic_loss(
      critic, critic, params.policy, alpha, batch, noise.t
    )
    _, (policy_info, _) = objectives.policy(
      params.policy, critic, alpha, batch.o_tm1, noise.tm1
    )
    return critic_info | policy_info

  act, exploit = actor_critic.acting(networks.policy, networks.box)
  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
