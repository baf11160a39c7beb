"""CQL: conservative Q-learning, SAC on a data set with a pessimistic critic.

SAC's critics with a penalty that pushes down a soft maximum over all actions
and pushes up what the data did (Kumar et al. 2020, equation 4, CQL(H)):

  J_Q = sum_i mean (q_i(s, a) - y)^2
        + w mean [log int exp q_i(s, .) - q_i(s, a)]
  y   = r + gamma d min_i qbar_i(s', a'),  a' ~ pi(s')

The integral is over the unit box `[-1, 1]^D`, by importance sampling with n
uniform actions, n of the policy at s and n of the policy at s' (Appendix F).
With a threshold tau the weight w is a Lagrange multiplier (equation 30):

  J_w = -w mean_i [log int exp q_i(s, .) - q_i(s, a) - tau]

Policy and temperature are SAC's. In this order: critics, multiplier (with the
critics before their step), policy, temperature; each with what the step before
it made.

Departures and choices:

* No factor 1/2 in the squared error, as in the official code.
* The soft maximum is the integral itself; the official code leaves out the
  division by 3n and so means `tau - log 3n` by a threshold tau of ours. The
  multiplier's gap is not multiplied by `penalty`: that is where it starts.
* The critics step first, as in our SAC: the official code steps the policy
  first. It also imitates the data for the first 40,000 policy updates, which
  is left out.
* `deterministic_backup=False` gives SAC's y with the entropy in it. Then
  `penalty=0` is SAC.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import conservative, optim, ranges
from agents.core import losses as terms
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

# Beyond it the official code holds the multiplier.
_MAX_LOG_MULTIPLIER = math.log(1e6)


@dataclasses.dataclass(frozen=True)
class Config:
  """CQL's hyper-parameters; defaults are the paper's and the official code's.

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
    deterministic_backup: whether targets leave out the entropy.
    penalty: w, the weight of the penalty; where it starts if it is learned.
    num_samples: n, actions of each kind that the penalty looks at.
    gap_target: tau, what the gap may be before w grows; None for a fixed w.
    multiplier_rate: of w's logarithm.
  """

  hidden_sizes: tuple[int, ...] = (256, 256, 256)
  layer_norm: bool = False
  normalise: bool = False
  gamma: float = 0.99
  policy_rate: float = 3e-5
  critic_rate: float = 3e-4
  temperature_rate: float = 3e-5
  target_rate: float = 0.005
  init_temperature: float = 1.0
  target_entropy: float | None = None
  deterministic_backup: bool = True
  penalty: float = 5.0
  num_samples: int = 10
  gap_target: float | None = None
  multiplier_rate: float = 3e-4

  def __post_init__(self):
    ranges.at_least(self, 1, 'hidden_sizes')
    if self.num_samples < 1:
      raise ValueError(f'num_samples={self.num_samples}: must be 1 or more')
    for name in ('gamma', 'target_rate'):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f'{name}={value}: must be within [0, 1]')
    rates = ('policy_rate', 'critic_rate', 'temperature_rate')
    for name in (*rates, 'multiplier_rate', 'penalty'):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise ValueError(f'{name}={value}: must be 0 or more')
    value = self.init_temperature
    if isinstance(value, (int, float)) and not 0 < value < math.inf:
      raise ValueError(f'init_temperature={value}: must be above 0')
    for name in ('target_entropy', 'gap_target'):
      value = getattr(self, name)
      if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f'{name}={value}: must be finite')
    value = self.penalty
    is_zero = isinstance(value, (int, float)) and value == 0
    if self.gap_target is not None and is_zero:
      raise ValueError('penalty=0: must be above 0 where gap_target is set')


class Params(NamedTuple):
  """What is trained; acting needs the policy alone.

  Attributes:
    policy: of `networks.policy`.
    critic: of `networks.critic`, leaves `[2, ...]`.
    log_temperature: float32 scalar, log alpha.
    log_multiplier: float32 scalar, log w; None where w is fixed.
  """

  policy: Any
  critic: Any
  log_temperature: chex.Array
  log_multiplier: chex.Array | None


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
    critic: `(q_tm1, r_t, discount_t, target_v_t) -> [B]` of one critic.
    soft_maximum: `(q [B, S], log_densities [B, S]) -> [B]` of one critic, what
      the penalty pushes down.
    policy: `(log_prob, q, temperature) -> [B]`, `q` the least of the critics'.
    temperature: `(log_temperature, log_prob, target_entropy) -> [B]`.
  """

  critic: Callable[..., chex.Array]
  soft_maximum: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  temperature: Callable[..., chex.Array]


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
  size, action, statistics = as_vectors(spec, 'cql', config.normalise)
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

  def critic(q_tm1, r_t, discount_t, target_v_t):
    target = jax.lax.stop_gradient(r_t + discount_t * target_v_t)
    return jnp.square(q_tm1 - target)

  def policy(log_prob, q, temperature):
    return temperature * log_prob - q

  def temperature(log_temperature, log_prob, target_entropy):
    return -jnp.exp(log_temperature) * (log_prob + target_entropy)

  return Losses(critic, conservative.soft_maximum, policy, temperature)


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
    are `conservative.draw_noise(key, batch.a_tm1, config.num_samples)`.
  """
  assert isinstance(spec.action, Continuous)
  policy_net, critic_net, box = networks
  target_entropy = config.target_entropy
  if target_entropy is None:
    target_entropy = -float(spec.action.shape[0])
  is_learned = config.gap_target is not None
  policy_opt = optim.adam(config.policy_rate)
  critic_opt = optim.adam(config.critic_rate)
  temperature_opt = optim.adam(config.temperature_rate)
  multiplier_opt = optim.adam(config.multiplier_rate)

  def init(key) -> State:
    policy_key, critic_key = jax.random.split(key)
    logarithm = lambda x: jnp.log(jnp.asarray(x, jnp.float32))
    params = Params(
      policy_net.init(policy_key),
      critic_net.init(critic_key),
      logarithm(config.init_temperature),
      logarithm(config.penalty) if is_learned else None,
    )
    opt_state = Params(
      policy_opt.init(params.policy),
      critic_opt.init(params.critic),
      temperature_opt.init(params.log_temperature),
      jax.tree.map(multiplier_opt.init, params.log_multiplier),
    )
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

  def multiplier(log_multiplier):
    if log_multiplier is None:
      return config.penalty
    return jnp.exp(jnp.minimum(log_multiplier, _MAX_LOG_MULTIPLIER))

  def critic_loss(critic, target_critic, params: Params, batch, noise):
    gaussian_tm1 = policy_net.apply(params.policy, batch.o_tm1)
    gaussian_t = policy_net.apply(params.policy, batch.o_t)
    action, log_prob = box.sample(noise.t, gaussian_t)
    target_v = jnp.min(critic_net.apply(target_critic, batch.o_t, action), 0)
    if not config.deterministic_backup:
      target_v += -jnp.exp(params.log_temperature) * log_prob
    q = critic_net.apply(critic, batch.o_tm1, batch.a_tm1)
    discount = config.gamma * batch.discount_t
    squares = jax.vmap(
      lambda q: losses.critic(q, batch.r_t, discount, target_v)
    )(q)
    drawn, densities = conservative.candidates(
      box, gaussian_tm1, gaussian_t, noise
    )
    every = conservative.q_values(critic_net.apply, critic, batch.o_tm1, drawn)
    high = jax.vmap(lambda q: losses.soft_maximum(q, densities))(every)
    gap = jnp.mean(high - q, -1)
    bellman = jnp.sum(jnp.mean(squares, -1))
    total = bellman + multiplier(params.log_multiplier) * jnp.sum(gap)
    metrics = {
      'loss_critic': total,
      'loss_bellman': bellman,
      'gap': jnp.mean(gap),
      'value': jnp.mean(q),
      'value_target': jnp.mean(batch.r_t + discount * target_v),
    }
    return total, metrics

  def multiplier_loss(log_multiplier, gap):
    return -multiplier(log_multiplier) * (gap - config.gap_target), None

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

  critic_step = optim.minimise(critic_loss, critic_opt, reduce)
  multiplier_step = optim.minimise(multiplier_loss, multiplier_opt, reduce)
  policy_step = optim.minimise(policy_loss, policy_opt, reduce)
  temperature_step = optim.minimise(temperature_loss, temperature_opt, reduce)

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = conservative.draw_noise(key, batch.a_tm1, config.num_samples)
    old, opt = state.params, state.opt_state
    temperature = jnp.exp(old.log_temperature)
    critic, critic_state, critic_info, critic_norm = critic_step(
      old.critic, opt.critic, state.target_critic, old, batch, noise
    )
    log_multiplier, multiplier_state = old.log_multiplier, opt.log_multiplier
    if is_learned:
      log_multiplier, multiplier_state, _, _ = multiplier_step(
        log_multiplier, multiplier_state, critic_info['gap']
      )
    policy, policy_state, (policy_info, log_prob), policy_norm = policy_step(
      old.policy, opt.policy, critic, temperature, batch, noise.tm1
    )
    log_temperature, temperature_state, temperature_info, _ = temperature_step(
      old.log_temperature, opt.log_temperature, log_prob
    )
    weight = multiplier(old.log_multiplier)
    metrics = {
      **critic_info,
      **policy_info,
      **temperature_info,
      'temperature': temperature,
      'penalty': jnp.asarray(weight, jnp.float32),
      'gradient_norm_critic': critic_norm,
      'gradient_norm_policy': policy_norm,
    }
    params = Params(policy, critic, log_temperature, log_multiplier)
    state = State(
      params,
      optim.track(critic, state.target_critic, config.target_rate),
      Params(policy_state, critic_state, temperature_state, multiplier_state),
    )
    return state, Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here: the slow copy is not at hand.
    noise = conservative.draw_noise(key, batch.a_tm1, config.num_samples)
    temperature = jnp.exp(params.log_temperature)
    _, critic_info = critic_loss(
      params.critic, params.critic, params, batch, noise
    )
    _, (policy_info, _) = policy_loss(
      params.policy, params.critic, temperature, batch, noise.tm1
    )
    return critic_info | policy_info

  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
