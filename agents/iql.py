"""IQL: implicit Q-learning, which evaluates no action outside the data.

A state's value is an upper expectile of the values of the data's actions there,
the critics regress onto it, and the policy imitates the data, weighted by the
exponential of the advantage (Kostrikov et al. 2021):

  J_V  = mean |tau - 1(u < 0)| u^2,  u = min_i qbar_i(s, a) - v(s)    (eq. 5)
  J_pi = -mean min(exp(beta (min_i qbar_i(s, a) - v(s))), c) log pi(a|s)  (7)
  J_Q  = sum_i mean (r + gamma d v(s') - q_i(s, a))^2                 (eq. 6)

In this order, each with the v that the first step left; the targets move last.
An update draws no random numbers.

Departures and choices:

* The policy is the official code's: the mean `tanh` of the network's output in
  the unit box, a normal around it that is not squashed, with one standard
  deviation for all states; draws outside the box are clipped.
* The code's dropout (0.1 on Adroit) and its scaling of rewards (a matter of
  the data) are left out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import actor_critic, optim, ranges
from agents.core import losses as terms
from agents.core.actor_critic import State
from agents.core.types import Agent, Info, Spec, Transition, as_vectors
from networks.actor_critic import Gaussian, Squash, v_network
from networks.mlp import Network
from search.rows import draw

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Config:
  """IQL's hyper-parameters; defaults are the paper's for locomotion.

  Attributes:
    hidden_sizes: widths of the layers of policy, critics and value.
    layer_norm: whether the critics' and the value's layers are normalised.
    normalise: whether observations are normalised, by `spec.statistics`.
    gamma: discount per decision.
    policy_rate: Adam's initial learning rate for the policy.
    critic_rate: Adam's learning rate for the critics and the value.
    target_rate: share of the new critics that enters the targets per update.
    expectile: tau, in (0, 1); 0.9 in the paper's mazes.
    temperature: beta, how sharply the weights rise; 10 in the mazes.
    max_weight: c, the largest weight.
    cosine: whether the policy's rate falls to 0 along a cosine.
    total_updates: number of updates over which it falls; follows from --steps.
  """

  hidden_sizes: tuple[int, ...] = (256, 256)
  layer_norm: bool = False
  normalise: bool = False
  gamma: float = 0.99
  policy_rate: float = 3e-4
  critic_rate: float = 3e-4
  target_rate: float = 0.005
  expectile: float = 0.7
  temperature: float = 3.0
  max_weight: float = 100.0
  cosine: bool = True
  total_updates: int = 1_000_000

  def __post_init__(self):
    actor_critic.check(self)
    ranges.at_least(self, 1, 'total_updates')
    ranges.at_least(self, 0, 'temperature')
    ranges.within(self, 0, 1, 'expectile', ends='()')
    ranges.above(self, 0, 'max_weight')


class Params(NamedTuple):
  """What is trained; acting needs only the policy.

  Attributes:
    policy: of `networks.policy`.
    critic: of `networks.critic`, leaves `[2, ...]`.
    value: of `networks.value`.
  """

  policy: Any
  critic: Any
  value: Any


class Networks(NamedTuple):
  """What the agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`, its mean
      before the tanh, its standard deviation that of actions in the unit box.
    critic: `apply(params, observation, action) -> float32 [2, B]`.
    value: `apply(params, observation) -> float32 [B]`.
    box: the actions' bounds.
  """

  policy: Network
  critic: Network
  value: Network
  box: Squash


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    value: `(target_q - v, expectile) -> [B]`.
    policy: `(log_prob, advantage, temperature, max_weight) -> [B]`.
    critic: `(q_tm1, r_t, discount_t, v_t) -> [B]` of one critic.
  """

  value: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  critic: Callable[..., chex.Array]


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  policy, critic, box = actor_critic.make_networks(
    config,
    spec,
    'iql',
    std='free',
    # The official code's bounds of its logarithm, -5 and 2.
    min_std=math.exp(-5),
    max_std=math.exp(2),
  )
  size, _, statistics = as_vectors(spec, 'iql', config.normalise)
  norm = 'layer' if config.layer_norm else 'none'
  value = v_network(size, config.hidden_sizes, norm=norm, statistics=statistics)
  return Networks(policy, critic, value, box)


def make_losses() -> Losses:
  """The terms of the module's docstring."""

  def policy(log_prob, advantage, temperature, max_weight):
    weight = jnp.minimum(jnp.exp(temperature * advantage), max_weight)
    return -jax.lax.stop_gradient(weight) * log_prob

  return Losses(terms.expectile, policy, terms.squared_error)


def log_prob(gaussian: Gaussian, unit: chex.Array) -> chex.Array:
  """Log-density `[B]` of actions `[B, D]` in the unit box.

  The distribution is a normal around `tanh(gaussian.mean)`; its samples are not
  squashed.
  """
  z = (unit - jnp.tanh(gaussian.mean)) / gaussian.std
  each = -0.5 * jnp.square(z) - jnp.log(gaussian.std) - _HALF_LOG_TAU
  return jnp.sum(each, -1)


def cosine_adam(
  rate: chex.Numeric, total_updates: int
) -> optax.GradientTransformation:
  """Adam whose rate falls from `rate` (may be traced) to 0 along a cosine."""

  def schedule(count):
    count = jnp.asarray(count, jnp.result_type(float))
    progress = jnp.minimum(count / total_updates, 1.0)
    return -rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

  return optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(schedule))


def make_objectives(
  config: Config, networks: Networks, losses: Losses
) -> Params:
  """What the parts minimise, each differentiated in its first argument.

  Returns:
    `Params` of `(value, target_q [B], batch)`, `(policy, advantage [B], batch)`
    and `(critic, v_t [B], batch)`, each `-> (loss, metrics)`.
  """
  policy_net, critic_net, value_net, box = networks

  def value_loss(value, target_q, batch):
    v = value_net.apply(value, batch.o_tm1)
    total = jnp.mean(losses.value(target_q - v, config.expectile))
    return total, {'loss_value': total, 'value': jnp.mean(v)}

  def policy_loss(policy, advantage, batch):
    gaussian = policy_net.apply(policy, batch.o_tm1)
    each = log_prob(gaussian, box.to_unit(batch.a_tm1))
    rows = losses.policy(each, advantage, config.temperature, config.max_weight)
    total = jnp.mean(rows)
    return total, {
      'loss_policy': total,
      'log_prob': jnp.mean(each),
      'std': jnp.mean(gaussian.std),
    }

  def critic_loss(critic, v_t, batch):
    q = critic_net.apply(critic, batch.o_tm1, batch.a_tm1)
    discount = config.gamma * batch.discount_t
    rows = jax.vmap(lambda q: losses.critic(q, batch.r_t, discount, v_t))(q)
    total = jnp.sum(jnp.mean(rows, -1))
    return total, {'loss_critic': total}

  return Params(policy_loss, critic_loss, value_loss)


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
    An `Agent` whose batches are `Transition`s; its update ignores the key.
  """
  del spec
  policy_net, critic_net, value_net, box = networks
  policy_optimiser = optim.adam(config.policy_rate)
  if config.cosine:
    policy_optimiser = cosine_adam(config.policy_rate, config.total_updates)
  adam = optim.adam(config.critic_rate)
  optimisers = Params(policy_optimiser, adam, adam)
  objectives = make_objectives(config, networks, losses)
  step = optim.minimise_each(objectives, optimisers, reduce)

  def init(key) -> State:
    keys = jax.random.split(key, 3)
    params = Params(*(n.init(k) for n, k in zip(networks[:3], keys)))
    return State(params, params.critic, optim.init(optimisers, params))

  def act(params, key, timestep):
    gaussian = policy_net.apply(params.policy, timestep.observation)
    noise = draw(jax.random.normal, key, gaussian.mean.shape)
    unit = jnp.tanh(gaussian.mean) + gaussian.std * noise
    return box.from_unit(jnp.clip(unit, -1.0, 1.0)), {}

  def least(critic, batch):
    return jnp.min(critic_net.apply(critic, batch.o_tm1, batch.a_tm1), 0)

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    del key
    old, opt = state.params, state.opt_state
    target_q = least(state.target_critic, batch)
    value = step.value(old.value, opt.value, target_q, batch)
    advantage = target_q - value_net.apply(value.params, batch.o_tm1)
    policy = step.policy(old.policy, opt.policy, advantage, batch)
    v_t = value_net.apply(value.params, batch.o_t)
    critic = step.critic(old.critic, opt.critic, v_t, batch)
    metrics = {
      **value.aux,
      **policy.aux,
      **critic.aux,
      **optim.norms(value=value, policy=policy, critic=critic),
      'advantage': jnp.mean(advantage),
    }
    parts = Params(policy, critic, value)
    state = actor_critic.advance(state, parts, config.target_rate)
    return state, Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here: the slow copy is not at hand.
    del key
    target_q = least(params.critic, batch)
    advantage = target_q - value_net.apply(params.value, batch.o_tm1)
    _, value_info = objectives.value(params.value, target_q, batch)
    _, policy_info = objectives.policy(params.policy, advantage, batch)
    v_t = value_net.apply(params.value, batch.o_t)
    _, critic_info = objectives.critic(params.critic, v_t, batch)
    return value_info | policy_info | critic_info

  _, exploit = actor_critic.acting(policy_net, box)
  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
