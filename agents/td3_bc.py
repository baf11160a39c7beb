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
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import actor_critic, optim, ranges
from agents.core import losses as terms
from agents.core.actor_critic import Networks
from agents.core.types import Agent, Info, Spec, Transition
from networks.actor_critic import Squash, member
from search.rows import draw

# The least mean |q| that is divided by: critics may be exactly zero.
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Config:
  """TD3+BC's hyper-parameters; defaults are the paper's.

  Attributes:
    hidden_sizes: widths of the layers of policy and critics.
    layer_norm: whether the critics' hidden layers are normalised.
    normalise: whether observations are normalised, by `spec.statistics`.
    behaviour_cloning: whether the policy's loss has the second term and
      lambda; without them this is TD3.
    alpha: how much the critic counts against the data.
    gamma: discount per decision.
    policy_rate: Adam's learning rate for the policy.
    critic_rate: Adam's learning rate for the critics.
    target_rate: share of the new parameters that enters the targets per policy
      update.
    policy_delay: number of updates of the critics per policy update.
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
    actor_critic.check(self)
    ranges.at_least(self, 1, 'policy_delay')
    ranges.within(self, 0, 1, 'residual_weight')
    noises = ('target_noise', 'target_noise_clip', 'exploration_noise')
    ranges.at_least(self, 0, 'alpha', *noises)


class Params(NamedTuple):
  """What is trained; acting needs only the policy.

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


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    critic: `(q_tm1, r_t, discount_t, target_q_t, q_t, residual_weight) -> [B]`
      of one critic, `target_q_t` the least of the targets'.
    policy: `(q, weight) -> [B]`, `q` the first critic's, `weight` lambda.
    cloning: `(action [B, D], recorded action [B, D]) -> [B]`, in the unit box.
  """

  critic: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  cloning: Callable[..., chex.Array]


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  # Of its policy only the mean is used.
  return actor_critic.make_networks(config, spec, 'td3_bc', std='free')


def make_losses() -> Losses:
  """The terms of the module's docstring."""

  def policy(q, weight):
    return -weight * q

  def cloning(action, done):
    return jnp.mean(jnp.square(action - done), -1)

  return Losses(terms.double_q_residual, policy, cloning)


def perturb(box: Squash, action: chex.Array, noise: chex.Array) -> chex.Array:
  """Actions `[B, D]` plus noise `[B, D]` in the unit box's units: `[B, D]`."""
  return box.from_unit(jnp.clip(box.to_unit(action) + noise, -1.0, 1.0))


def make_critic_loss(
  config: Config, networks: Networks, losses: Losses
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """J_Q.

  Returns:
    `(critic, target_params, batch, noise [B, D]) -> (loss, metrics)`.
  """
  policy_net, critic_net, box = networks
  weight, limit = config.residual_weight, config.target_noise_clip

  def loss(critic, target_params: Params, batch, noise):
    noise = jnp.clip(config.target_noise * noise, -limit, limit)
    gaussian = policy_net.apply(target_params.policy, batch.o_t)
    action = perturb(box, box.mode(gaussian), noise)
    target_q = critic_net.apply(target_params.critic, batch.o_t, action)
    q_tm1, q_t = critic_net.apply(critic, batch.o_tm1, batch.a_tm1), None
    if actor_critic.has_residual(weight):
      q_t = critic_net.apply(critic, batch.o_t, action)
    discount = config.gamma * batch.discount_t
    return actor_critic.residual_loss(
      losses.critic, batch, discount, q_tm1, jnp.min(target_q, 0), q_t, weight
    )

  return loss


def make_policy_loss(
  config: Config, networks: Networks, losses: Losses
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """J_pi.

  Returns:
    `(policy, critic, batch, over_devices) -> (loss, metrics)`, the last one
    the mean over devices.
  """
  policy_net, critic_net, box = networks

  def loss(policy, critic, batch, over_devices):
    action = box.mode(policy_net.apply(policy, batch.o_tm1))
    q = critic_net.apply(member(critic, 0), batch.o_tm1, action)[0]
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
    spec: of the environment; not needed beyond the networks.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Transition`s. The noise of an update, of the
    target actions, is `normal(key, [B, D])`.
  """
  del spec
  policy_net, critic_net, box = networks
  optimisers = Params(
    optim.adam(config.policy_rate), optim.adam(config.critic_rate)
  )
  objectives = Params(
    make_policy_loss(config, networks, losses),
    make_critic_loss(config, networks, losses),
  )
  step = optim.minimise_each(objectives, optimisers, reduce)

  def init(key) -> State:
    policy_key, critic_key = jax.random.split(key)
    params = Params(policy_net.init(policy_key), critic_net.init(critic_key))
    opt_state = optim.init(optimisers, params)
    return State(params, params, opt_state, jnp.zeros((), jnp.int32))

  _, exploit = actor_critic.acting(policy_net, box)

  def act(params, key, timestep):
    action, extras = exploit(params, key, timestep)
    noise = draw(jax.random.normal, key, action.shape)
    return perturb(box, action, config.exploration_noise * noise), extras

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = jax.random.normal(key, batch.a_tm1.shape)
    old, opt = state.params, state.opt_state
    critic = step.critic(
      old.critic, opt.critic, state.target_params, batch, noise
    )
    policy = step.policy(old.policy, opt.policy, critic.params, batch, reduce)
    new = Params(policy.params, critic.params)
    targets = optim.track(new, state.target_params, config.target_rate)
    count = state.step + 1
    new_policy, policy_opt, targets = optim.periodic(
      (policy.params, policy.opt_state, targets),
      (old.policy, opt.policy, state.target_params),
      count,
      config.policy_delay,
    )
    params = Params(new_policy, critic.params)
    opt_state = Params(policy_opt, critic.opt_state)
    norms = optim.norms(critic=critic, policy=policy)
    metrics = reduce(critic.aux | policy.aux | norms)
    return State(params, targets, opt_state, count), Info(metrics)

  def evaluate(params, batch, key):
    # The parameters are their own targets here: the copy is not at hand.
    noise = jax.random.normal(key, batch.a_tm1.shape)
    policy, critic = params
    _, critic_info = objectives.critic(critic, params, batch, noise)
    _, policy_info = objectives.policy(policy, critic, batch, lambda x: x)
    return critic_info | policy_info

  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
