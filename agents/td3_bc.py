"""TD3+BC: TD3 with a term that keeps the policy near a data set's actions.

A deterministic policy pi and twin critics (Fujimoto and Gu 2021, "A Minimalist
Approach to Offline Reinforcement Learning", equations 2 to 5, on TD3 of
Fujimoto et al. 2018, Algorithm 1):

  a' = clip(pibar(s') + clip(0.2 eps, -0.5, 0.5), -1, 1)
  y  = r + gamma d min_i qbar_i(s', a')
  J_Q  = sum_i mean (q_i(s, a) - y)^2
  J_pi = mean (pi(s) - a)^2 - lambda mean q_1(s, pi(s)),
  lambda = alpha / mean |q_1(s, pi(s))|, without a gradient

in actions of the unit box. Policy and targets move once in `policy_delay`
updates, after the critics. Without `behaviour_cloning`, J_pi is
`-mean q_1(s, pi(s))` and the agent is TD3.

Departures and choices:

* The policy's step is computed in every update and kept in those that are due:
  one program serves every step, and seeds side by side. It costs about a
  quarter more than skipping it.
* `residual_weight` below 1 mixes each critic's own residual error into J_Q
  (DQRA of ATAC, `losses.double_q_residual`), at the same smoothed action.
* The mean |q_1| is that of the whole batch on all devices.
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
  Info,
  Spec,
  Transition,
  as_vectors,
)
from networks import actor_critic
from networks.actor_critic import Squash
from networks.mlp import Network
from search.rows import draw

# The least mean |q| that is divided by: critics may be exactly zero.
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Config:
  """TD3+BC's hyper-parameters; defaults are the paper's.

  Attributes:
    hidden_sizes: widths of the layers of policy and critics.
    layer_norm: whether the critics' hidden layers are normalised.
    normalise: whether observations are, by `spec.statistics`.
    behaviour_cloning: whether the policy's loss has the second term and
      lambda; without them this is TD3.
    alpha: how much the critic counts against the data.
    gamma: discount a decision.
    policy_rate: Adam's, of the policy.
    critic_rate: of the critics.
    target_rate: share of the new parameters in the targets, a policy update.
    policy_delay: critics' updates a policy update.
    target_noise: deviation of the target action's noise, in the unit box.
    target_noise_clip: its largest size.
    exploration_noise: deviation of the noise when acting, in the unit box.
    residual_weight: weight of the temporal difference in the critics' loss, 1
      for it alone; the rest is the residual error's.
  """

  hidden_sizes: tuple[int, ...] = (256, 256)
  layer_norm: bool = False
  normalise: bool = True
  behaviour_cloning: bool = True
  alpha: float = 2.5
  gamma: float = 0.99
  policy_rate: float = 3e-4
  critic_rate: float = 3e-4
  target_rate: float = 0.005
  policy_delay: int = 2
  target_noise: float = 0.2
  target_noise_clip: float = 0.5
  exploration_noise: float = 0.1
  residual_weight: float = 1.0

  def __post_init__(self):
    ranges.at_least(self, 1, 'hidden_sizes')
    if self.policy_delay < 1:
      raise ValueError(f'policy_delay={self.policy_delay}: must be 1 or more')
    for name in ('gamma', 'target_rate', 'residual_weight'):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f'{name}={value}: must be within [0, 1]')
    for name in (
      'alpha',
      'policy_rate',
      'critic_rate',
      'target_noise',
      'target_noise_clip',
      'exploration_noise',
    ):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise ValueError(f'{name}={value}: must be 0 or more')


class Params(NamedTuple):
  """What is trained; acting needs the policy alone.

  Attributes:
    policy: of `networks.policy`.
    critic: of `networks.critic`, leaves `[2, ...]`.
  """

  policy: Any
  critic: Any


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: newest parameters, handed to actors.
    target_params: their slow copy.
    opt_state: the optimisers' states, of the parts of `params`.
    step: int32 scalar, updates so far.
  """

  params: Params
  target_params: Params
  opt_state: Params
  step: chex.Array


class Networks(NamedTuple):
  """What the agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`, of which only
      the mean is used.
    critic: `apply(params, observation, action) -> float32 [2, B]`.
    box: squashes into the actions' bounds.
  """

  policy: Network
  critic: Network
  box: Squash


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    critic: `(q_tm1, r_t, discount_t, target_q_t, q_t, residual_weight) -> [B]`
      of one critic, `target_q_t` the least of the targets'.
    policy: `(q, weight) -> [B]`, `q` the first critic's, `weight` lambda.
    cloning: `(action [B, D], what was done [B, D]) -> [B]`, in the unit box.
  """

  critic: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  cloning: Callable[..., chex.Array]


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
  size, action, statistics = as_vectors(spec, 'td3_bc', config.normalise)
  policy = actor_critic.gaussian_policy(
    size,
    action.shape[0],
    config.hidden_sizes,
    std='free',
    statistics=statistics,
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

  def policy(q, weight):
    return -weight * q

  def cloning(action, done):
    return jnp.mean(jnp.square(action - done), -1)

  return Losses(terms.double_q_residual, policy, cloning)


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
    spec: of the environment; not needed beyond the networks.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Transition`s. The noise of an update, of the
    target actions, is `normal(key, [B, D])`.
  """
  del spec
  policy_net, critic_net, box = networks
  weight = config.residual_weight
  # A tracer may be anything; a plain 1 spares the critics a pass.
  has_residual = not (isinstance(weight, (int, float)) and weight == 1)
  policy_optimiser = optim.adam(config.policy_rate)
  critic_optimiser = optim.adam(config.critic_rate)

  def init(key) -> State:
    policy_key, critic_key = jax.random.split(key)
    params = Params(policy_net.init(policy_key), critic_net.init(critic_key))
    opt_state = Params(
      policy_optimiser.init(params.policy),
      critic_optimiser.init(params.critic),
    )
    return State(params, params, opt_state, jnp.zeros((), jnp.int32))

  def choose(policy, observation):
    return box.mode(policy_net.apply(policy, observation))

  def perturb(action, noise):
    unit = jnp.clip(box.to_unit(action) + noise, -1.0, 1.0)
    return box.from_unit(unit)

  def exploit(params, key, timestep):
    del key
    return choose(params.policy, timestep.observation), {}

  def act(params, key, timestep):
    action = choose(params.policy, timestep.observation)
    noise = draw(jax.random.normal, key, action.shape)
    return perturb(action, config.exploration_noise * noise), {}

  def critic_loss(critic, target_params, batch, noise):
    limit = config.target_noise_clip
    noise = jnp.clip(config.target_noise * noise, -limit, limit)
    action = perturb(choose(target_params.policy, batch.o_t), noise)
    target_q = critic_net.apply(target_params.critic, batch.o_t, action)
    target_q = jnp.min(target_q, 0)
    q_tm1 = critic_net.apply(critic, batch.o_tm1, batch.a_tm1)
    q_t = jnp.broadcast_to(jax.lax.stop_gradient(target_q)[None], q_tm1.shape)
    if has_residual:
      q_t = critic_net.apply(critic, batch.o_t, action)
    discount = config.gamma * batch.discount_t

    def one(q_tm1, q_t):
      return losses.critic(q_tm1, batch.r_t, discount, target_q, q_t, weight)

    total = jnp.sum(jnp.mean(jax.vmap(one)(q_tm1, q_t), -1))
    return total, {
      'loss_critic': total,
      'value': jnp.mean(q_tm1),
      'value_target': jnp.mean(batch.r_t + discount * target_q),
    }

  def policy_loss(policy, critic, batch, over_devices=reduce):
    action = choose(policy, batch.o_tm1)
    first = actor_critic.member(critic, 0)
    q = critic_net.apply(first, batch.o_tm1, action)[0]
    unit, done = box.to_unit(action), box.to_unit(batch.a_tm1)
    cloning = jnp.mean(losses.cloning(unit, done))
    metrics = {'squared_error': cloning}
    if not config.behaviour_cloning:
      total = jnp.mean(losses.policy(q, 1.0))
      return total, metrics | {'loss_policy': total}
    size = over_devices(jnp.mean(jnp.abs(jax.lax.stop_gradient(q))))
    scale = config.alpha / jnp.maximum(size, _EPSILON)
    total = jnp.mean(losses.policy(q, scale)) + cloning
    return total, metrics | {'loss_policy': total, 'lambda': scale}

  critic_step = optim.minimise(critic_loss, critic_optimiser, reduce)
  policy_step = optim.minimise(policy_loss, policy_optimiser, reduce)

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = jax.random.normal(key, batch.a_tm1.shape)
    params, opt_state = state.params, state.opt_state
    critic, critic_opt, critic_info, critic_norm = critic_step(
      params.critic, opt_state.critic, state.target_params, batch, noise
    )
    policy, policy_opt, policy_info, policy_norm = policy_step(
      params.policy, opt_state.policy, critic, batch
    )
    new = Params(policy, critic)
    targets = optim.track(new, state.target_params, config.target_rate)
    step = state.step + 1
    policy, policy_opt, targets = optim.periodic(
      (policy, policy_opt, targets),
      (params.policy, opt_state.policy, state.target_params),
      step,
      config.policy_delay,
    )
    norms = {
      'gradient_norm_critic': critic_norm,
      'gradient_norm_policy': policy_norm,
    }
    metrics = reduce(critic_info | policy_info | norms)
    params, opt_state = Params(policy, critic), Params(policy_opt, critic_opt)
    return State(params, targets, opt_state, step), Info(metrics)

  def evaluate(params, batch, key):
    # The parameters are their own targets here: the copy is not at hand.
    noise = jax.random.normal(key, batch.a_tm1.shape)
    _, critic_info = critic_loss(params.critic, params, batch, noise)
    _, policy_info = policy_loss(
      params.policy, params.critic, batch, lambda x: x
    )
    return critic_info | policy_info

  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
