"""Leaves of actor-critics whose actions are vectors of real numbers.

Each agent writes out which of its parts steps when, and on what. What is called
soft here is SAC's (Haarnoja et al. 2018).

Axes: `B` batch, `D` components of an action, `E` critics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import losses as terms
from agents.core import optim, ranges
from agents.core.types import Continuous, Spec, Transition, as_vectors
from networks import actor_critic
from networks.actor_critic import Squash
from networks.mlp import Network
from search.rows import draw


class Params(NamedTuple):
  """What is trained; acting needs only the policy.

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
    params: newest parameters, handed to actors; a `NamedTuple` of an agent's
      own, with `policy` and `critic`.
    target_critic: the critics' slow copy.
    opt_state: the optimisers' states, of the trained parts of `params`.
  """

  params: Any
  target_critic: Any
  opt_state: Any


class Networks(NamedTuple):
  """What an agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`.
    critic: `apply(params, observation, action) -> float32 [2, B]`.
    box: squashes Gaussians into the actions' bounds.
  """

  policy: Network
  critic: Network
  box: Squash


class Noise(NamedTuple):
  """All random numbers of an update, standard normal.

  Attributes:
    tm1: float32 `[B, D]`, of new actions at the batch's observations.
    t: float32 `[B, D]`, of actions at the next observations.
  """

  tm1: chex.Array
  t: chex.Array


def check(config: Any) -> None:
  """Refuses values out of range of the fields that actor-critics have.

  Raises:
    ValueError: names the field, its value and the range.
  """
  ranges.at_least(config, 1, 'hidden_sizes')
  ranges.within(config, 0, 1, 'gamma', 'target_rate')
  ranges.at_least(config, 0, 'policy_rate', 'critic_rate')


def check_soft(config: Any) -> None:
  """As `check`, and for the fields of a learned temperature.

  Raises:
    ValueError: names the field, its value and the range.
  """
  check(config)
  ranges.at_least(config, 0, 'temperature_rate')
  ranges.above(config, 0, 'init_temperature')
  ranges.finite(config, 'target_entropy')


def target_entropy(config: Any, spec: Spec) -> float:
  """The config's target in nats over the unit box, -D where it has none."""
  assert isinstance(spec.action, Continuous)
  if config.target_entropy is None:
    return -float(spec.action.shape[0])
  return config.target_entropy


def draw_noise(key: chex.PRNGKey, action: chex.Array) -> Noise:
  """The noise of an update with `key` on actions `[B, D]`."""
  shape = action.shape
  return Noise(*(jax.random.normal(k, shape) for k in jax.random.split(key)))


def make_networks(
  config: Any, spec: Spec, agent: str, **policy: Any
) -> Networks:
  """A Gaussian policy and two critics for a spec.

  Args:
    config: with `hidden_sizes` and `normalise`, and with `layer_norm` where the
      critics' hidden layers may be normalised.
    spec: of the environment.
    agent: its name, for messages.
    **policy: see `networks.actor_critic.gaussian_policy`.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  size, action, statistics = as_vectors(spec, agent, config.normalise)
  return Networks(
    actor_critic.gaussian_policy(
      size,
      action.shape[0],
      config.hidden_sizes,
      statistics=statistics,
      **policy,
    ),
    actor_critic.q_ensemble(
      size,
      action.low,
      action.high,
      config.hidden_sizes,
      norm='layer' if getattr(config, 'layer_norm', False) else 'none',
      statistics=statistics,
    ),
    actor_critic.squash(action.low, action.high),
  )


def init(
  config: Any, networks: Any, key: chex.PRNGKey
) -> tuple[Any, Any, chex.Array]:
  """The first parameters of the policy and the critics, and log alpha.

  Args:
    config: with `init_temperature`.
    networks: with `policy` and `critic`.
    key: consumed.

  Returns:
    Both, and a float32 scalar.
  """
  policy_key, critic_key = jax.random.split(key)
  return (
    networks.policy.init(policy_key),
    networks.critic.init(critic_key),
    logarithm(config.init_temperature),
  )


def logarithm(x: chex.Numeric) -> chex.Array:
  """The logarithm of a hyper-parameter, a float32 scalar."""
  return jnp.log(jnp.asarray(x, jnp.float32))


def advance(state: State, parts: Any, rate: chex.Numeric) -> State:
  """The state after each part has stepped; the targets move last.

  Args:
    state: before the step.
    parts: an `optim.Step` for each trained part, in the agent's `Params`.
    rate: share of the new critics in the targets.
  """
  params = type(parts)(*(step.params for step in parts))
  opt_state = type(parts)(*(step.opt_state for step in parts))
  target = optim.track(params.critic, state.target_critic, rate)
  return State(params, target, opt_state)


def acting(policy: Network, box: Squash) -> tuple[Callable, Callable]:
  """`act` and `exploit` of an agent: a draw of its Gaussian, and its mode."""

  def act(params, key, timestep):
    gaussian = policy.apply(params.policy, timestep.observation)
    noise = draw(jax.random.normal, key, gaussian.mean.shape)
    return box.sample(noise, gaussian)[0], {}

  def exploit(params, key, timestep):
    del key
    return box.mode(policy.apply(params.policy, timestep.observation)), {}

  return act, exploit


def soft_policy(
  log_prob: chex.Array, q: chex.Array, temperature: chex.Numeric
) -> chex.Array:
  """`alpha log pi - q`, what SAC's policy minimises.

  Args:
    log_prob: float32 `[B]`, of the policy's own actions.
    q: float32 `[B]`, of the same actions, the least of the critics'.
    temperature: alpha.

  Returns:
    float32 `[B]`.

  Source: SAC (Haarnoja et al. 2018), equation 9.
  """
  return temperature * log_prob - q


def temperature(
  log_temperature: chex.Numeric,
  log_prob: chex.Array,
  target_entropy: chex.Numeric,
) -> chex.Array:
  """`-alpha (log pi + target entropy)`, what SAC's temperature minimises.

  Args:
    log_temperature: log alpha.
    log_prob: float32 `[B]`, of the policy's own actions.
    target_entropy: in nats.

  Returns:
    float32 `[B]`.

  Source: SAC (Haarnoja et al. 2018), equation 18.
  """
  return -jnp.exp(log_temperature) * (log_prob + target_entropy)


def make_objectives(
  config: Any, networks: Any, losses: Any, spec: Spec, critic_loss: Callable
) -> Any:
  """What SAC's parts minimise, the critics' being the agent's own.

  Args:
    config: with `target_entropy`.
    networks: with `policy`, `critic` and `box`.
    losses: with SAC's terms `policy` and `temperature`.
    spec: of the environment.
    critic_loss: differentiated in its first argument.

  Returns:
    `Params` of `(policy, critic, temperature, observation [B, ...], noise
    [B, D], weights=None) -> (loss, (metrics, log_prob [B]))`, of `critic_loss`,
    and of `(log_temperature, log_prob [B], weights=None) -> (loss, metrics)`.
    Weights `[B]` sum to 1; None is for equal ones.
  """
  target = target_entropy(config, spec)

  def mean(x, weights):
    return jnp.mean(x) if weights is None else jnp.sum(x * weights)

  def policy(policy, critic, temperature, observation, noise, weights=None):
    gaussian = networks.policy.apply(policy, observation)
    action, log_prob = networks.box.sample(noise, gaussian)
    q = terms.lowest(networks.critic.apply(critic, observation, action))
    total = mean(losses.policy(log_prob, q, temperature), weights)
    metrics = {'loss_policy': total, 'entropy': -mean(log_prob, weights)}
    return total, (metrics, log_prob)

  def temperature(log_temperature, log_prob, weights=None):
    rows = losses.temperature(log_temperature, log_prob, target)
    total = mean(rows, weights)
    return total, {'loss_temperature': total}

  objectives: Any = (policy, critic_loss, temperature)
  return Params(*objectives)


def make_optimisers(config: Any) -> Params:
  """Adam for the policy, the critics and the temperature, at their rates."""
  rates = (config.policy_rate, config.critic_rate, config.temperature_rate)
  return Params(*map(optim.adam, rates))


def soft_steps(
  step: Any,
  state: State,
  critic: optim.Step,
  observation: Any,
  noise: chex.Array,
  weights: chex.Array | None = None,
) -> tuple[optim.Step, optim.Step, dict[str, chex.Array]]:
  """SAC's steps of policy and temperature, which follow that of the critics.

  The temperature's sees the entropy of the policy before its step.

  Args:
    step: `optim.minimise_each` of `make_objectives`.
    state: before the update.
    critic: the critics' step, whose `aux` are metrics.
    observation: pytree `[B, ...]`.
    noise: float32 `[B, D]`, of the new actions.
    weights: float32 `[B]`, which sum to 1; None for equal ones.

  Returns:
    The policy's step, the temperature's, and metrics of all three, float32
    scalars.
  """
  old, opt = state.params, state.opt_state
  alpha = jnp.exp(old.log_temperature)
  policy = step.policy(
    old.policy, opt.policy, critic.params, alpha, observation, noise, weights
  )
  policy_info, log_prob = policy.aux
  temperature = step.log_temperature(
    old.log_temperature, opt.log_temperature, log_prob, weights
  )
  metrics = critic.aux | policy_info | temperature.aux
  metrics |= optim.norms(critic=critic, policy=policy)
  return policy, temperature, metrics | {'temperature': alpha}


def residual_loss(
  term: Callable,
  batch: Transition,
  discount: Any,
  q: Any,
  target_v: Any,
  v: Any,
  weight: chex.Numeric,
) -> tuple[Any, dict[str, Any]]:
  """Critics' loss whose term mixes in their own residual error.

  Args:
    term: `(q_tm1, r_t, discount_t, target_v_t, v_t, weight) -> [B]`, such as
      `losses.double_q_residual`.
    batch: `B` transitions.
    discount: float32 `[B]`, gamma in it.
    q: float32 `[E, B]`, of the recorded actions.
    target_v: float32 `[B]`, the targets' value at the next observations.
    v: float32 `[E, B]`, the critics' own; None where `weight` is 1, which
      spares the critics a pass.
    weight: of the temporal difference; the rest is the residual's.

  Returns:
    The sum over critics, and metrics.
  """
  if v is None:
    v = jnp.broadcast_to(jax.lax.stop_gradient(target_v)[None], q.shape)
  one = lambda q, v: term(q, batch.r_t, discount, target_v, v, weight)
  total = jnp.sum(jnp.mean(jax.vmap(one)(q, v), -1))
  return total, {
    'loss_critic': total,
    'value': jnp.mean(q),
    'value_target': jnp.mean(batch.r_t + discount * target_v),
  }


def has_residual(weight: chex.Numeric) -> bool:
  """Whether a residual's share may be above 0; a tracer may be anything."""
  return not (isinstance(weight, int | float) and weight == 1)
