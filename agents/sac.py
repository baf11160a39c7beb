"""SAC: soft actor-critic with a learned temperature.

Twin critics regress onto a soft backup, the policy climbs their minimum, and
the temperature keeps the policy's entropy at a target (Haarnoja et al. 2018,
"Soft Actor-Critic Algorithms and Applications", Algorithm 1):

  y   = r + gamma d (min_i qbar_i(s', a') - alpha log pi(a'|s')), a' ~ pi(s')
  J_Q = sum_i mean (q_i(s, a) - y)^2                              (equation 5)
  J_pi = mean alpha log pi(a~|s) - min_i q_i(s, a~), a~ ~ pi(s)   (equation 9)
  J_alpha = mean -alpha (log pi(a~|s) + target entropy)          (equation 18)

In this order, each step seeing the parameters that the one before it made; the
temperature's has the entropy of the policy before its step, with the same a~.

Departures and choices:

* No factor 1/2 in J_Q, which Adam does not see.
* Log-densities are with respect to actions scaled to `[-1, 1]^D`, so that a
  target entropy of -D means the same in every environment.
* `residual_weight` below 1 mixes each critic's own residual error into J_Q
  (DQRA of ATAC, `losses.double_q_residual`); in the residual the critic's own
  soft value at the next state replaces the target's.
* Optional normalisation of observations by a data set's statistics, and of
  the critics' hidden layers: neither is SAC's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import losses as terms
from agents.core import optim, ranges
from agents.core.types import (
  Agent,
  Continuous,
  Info,
  Spec,
  Transition,
  as_vectors,
)
from networks import actor_critic
from networks.actor_critic import Squash
from networks.mlp import Network
from search.rows import draw


@dataclasses.dataclass(frozen=True)
class Config:
  """SAC's hyper-parameters; defaults are the paper's.

  Attributes:
    hidden_sizes: widths of the layers of policy and critics.
    layer_norm: whether the critics' hidden layers are normalised.
    normalise: whether observations are, by `spec.statistics`.
    gamma: discount a decision.
    policy_rate: Adam's, of the policy.
    critic_rate: of the critics.
    temperature_rate: of the temperature's logarithm.
    target_rate: share of the new critics in the targets, an update.
    init_temperature: alpha at first.
    target_entropy: in nats over the unit box; None for -D.
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
    ranges.at_least(self, 1, 'hidden_sizes')
    for name in ('gamma', 'target_rate', 'residual_weight'):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f'{name}={value}: must be within [0, 1]')
    for name in ('policy_rate', 'critic_rate', 'temperature_rate'):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise ValueError(f'{name}={value}: must be 0 or more')
    value = self.init_temperature
    if isinstance(value, (int, float)) and not 0 < value < math.inf:
      raise ValueError(f'init_temperature={value}: must be above 0')
    value = self.target_entropy
    if isinstance(value, (int, float)) and not math.isfinite(value):
      raise ValueError(f'target_entropy={value}: must be finite')


class Params(NamedTuple):
  """What is trained; acting needs the policy alone.

  Attributes:
    policy: of `networks.policy`.
    critic: of `networks.critic`, leaves `[2, ...]`.
    log_temperature: float32 scalar, log alpha.
  """

  policy: Any
  critic: Any
  log_temperature: chex.Array


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: newest parameters, handed to actors.
    target_critic: the critics' slow copy.
    opt_state: the optimisers' states, of the parts of `params`.
  """

  params: Params
  target_critic: Any
  opt_state: Params


class Networks(NamedTuple):
  """What the agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`.
    critic: `apply(params, observation, action) -> float32 [2, B]`.
    box: squashes Gaussians into the actions' bounds.
  """

  policy: Network
  critic: Network
  box: Squash


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


class Noise(NamedTuple):
  """All random numbers of an update, standard normal.

  Attributes:
    tm1: float32 `[B, D]`, of new actions at the batch's observations.
    t: float32 `[B, D]`, of actions at the next observations.
  """

  tm1: chex.Array
  t: chex.Array


def draw_noise(key: chex.PRNGKey, action: chex.Array) -> Noise:
  """The noise of an update with `key` on actions `[B, D]`."""
  shape = action.shape
  return Noise(*(jax.random.normal(k, shape) for k in jax.random.split(key)))


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Callable[[Any], Any] | None = None,
) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  size, action, statistics = as_vectors(spec, 'sac', config.normalise)
  policy = actor_critic.gaussian_policy(
    size, action.shape[0], config.hidden_sizes, statistics=statistics
  )
  critic = actor_critic.q_ensemble(
    size,
    action.low,
    action.high,
    config.hidden_sizes,
    norm='layer' if config.layer_norm else 'none',
    statistics=statistics,
  )
  return Networks(policy, critic, actor_critic.squash(action.low, action.high))


def make_losses() -> Losses:
  """The terms of the module's docstring."""

  def policy(log_prob, q, temperature):
    return temperature * log_prob - q

  def temperature(log_temperature, log_prob, target_entropy):
    return -jnp.exp(log_temperature) * (log_prob + target_entropy)

  return Losses(terms.double_q_residual, policy, temperature)


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
  assert isinstance(spec.action, Continuous)
  policy_net, critic_net, box = networks
  target_entropy = config.target_entropy
  if target_entropy is None:
    target_entropy = -float(spec.action.shape[0])
  weight = config.residual_weight
  # A tracer may be anything; a plain 1 spares the critics a pass.
  has_residual = not (isinstance(weight, (int, float)) and weight == 1)
  optimisers = Params(
    optim.adam(config.policy_rate),
    optim.adam(config.critic_rate),
    optim.adam(config.temperature_rate),
  )

  def init(key) -> State:
    policy_key, critic_key = jax.random.split(key)
    params = Params(
      policy_net.init(policy_key),
      critic_net.init(critic_key),
      jnp.log(jnp.asarray(config.init_temperature, jnp.float32)),
    )
    opt_state = Params(*(o.init(p) for o, p in zip(optimisers, params)))
    return State(params, params.critic, opt_state)

  def act(params, key, timestep):
    gaussian = policy_net.apply(params.policy, timestep.observation)
    noise = draw(jax.random.normal, key, gaussian.mean.shape)
    action, _ = box.sample(noise, gaussian)
    return action, {}

  def exploit(params, key, timestep):
    del key
    gaussian = policy_net.apply(params.policy, timestep.observation)
    return box.mode(gaussian), {}

  def critic_loss(critic, target_critic, policy, temperature, batch, noise):
    gaussian = policy_net.apply(policy, batch.o_t)
    action, log_prob = box.sample(noise, gaussian)
    bonus = -temperature * log_prob
    target_q = critic_net.apply(target_critic, batch.o_t, action)
    target_v = jnp.min(target_q, 0) + bonus
    q = critic_net.apply(critic, batch.o_tm1, batch.a_tm1)
    v = jnp.broadcast_to(jax.lax.stop_gradient(target_v)[None], q.shape)
    if has_residual:
      own_q = critic_net.apply(critic, batch.o_t, action)
      v = own_q + jnp.broadcast_to(bonus[None], q.shape)
    discount = config.gamma * batch.discount_t

    def one(q, v):
      return losses.critic(q, batch.r_t, discount, target_v, v, weight)

    total = jnp.sum(jnp.mean(jax.vmap(one)(q, v), -1))
    return total, {
      'loss_critic': total,
      'value': jnp.mean(q),
      'value_target': jnp.mean(batch.r_t + discount * target_v),
    }

  def policy_loss(policy, critic, temperature, batch, noise):
    gaussian = policy_net.apply(policy, batch.o_tm1)
    action, log_prob = box.sample(noise, gaussian)
    q = terms.lowest(critic_net.apply(critic, batch.o_tm1, action))
    total = jnp.mean(losses.policy(log_prob, q, temperature))
    metrics = {'loss_policy': total, 'entropy': -jnp.mean(log_prob)}
    return total, (metrics, log_prob)

  def temperature_loss(log_temperature, log_prob):
    rows = losses.temperature(log_temperature, log_prob, target_entropy)
    total = jnp.mean(rows)
    return total, {'loss_temperature': total}

  policy_step, critic_step, temperature_step = (
    optim.minimise(loss, optimiser, reduce)
    for loss, optimiser in zip(
      (policy_loss, critic_loss, temperature_loss), optimisers
    )
  )

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = draw_noise(key, batch.a_tm1)
    params, opt_state = state.params, state.opt_state
    temperature = jnp.exp(params.log_temperature)
    critic, critic_opt, critic_info, critic_norm = critic_step(
      params.critic,
      opt_state.critic,
      state.target_critic,
      params.policy,
      temperature,
      batch,
      noise.t,
    )
    policy, policy_opt, (policy_info, log_prob), policy_norm = policy_step(
      params.policy, opt_state.policy, critic, temperature, batch, noise.tm1
    )
    log_temperature, temperature_opt, temperature_info, _ = temperature_step(
      params.log_temperature, opt_state.log_temperature, log_prob
    )
    metrics = {
      **critic_info,
      **policy_info,
      **temperature_info,
      'temperature': temperature,
      'gradient_norm_critic': critic_norm,
      'gradient_norm_policy': policy_norm,
    }
    state = State(
      Params(policy, critic, log_temperature),
      optim.track(critic, state.target_critic, config.target_rate),
      Params(policy_opt, critic_opt, temperature_opt),
    )
    return state, Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here: the slow copy is not at hand.
    noise = draw_noise(key, batch.a_tm1)
    temperature = jnp.exp(params.log_temperature)
    _, critic_info = critic_loss(
      params.critic, params.critic, params.policy, temperature, batch, noise.t
    )
    _, (policy_info, _) = policy_loss(
      params.policy, params.critic, temperature, batch, noise.tm1
    )
    return critic_info | policy_info

  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
