"""ATAC: adversarially trained actor-critic, offline.

A Stackelberg game (Cheng et al. 2022, "Adversarially Trained Actor Critic for
Offline Reinforcement Learning", equation 1): the policy maximises its advantage
over the data's behaviour by the critics, the critics minimise it as far as
Bellman's equation lets them,

  pi maximises  L(pi, f),  f minimises  L(pi, f) + beta E(pi, f)
  L = E[f(s, pi) - f(s, a)],  E = E[((f - T^pi f)(s, a))^2]

For every beta >= 0 its solution is no worse than the behaviour, and beta = 0 is
imitation; that holds for the game, not for any schedule of steps. One
update (Algorithm 2), with the same samples a~ ~ pi(s), a' ~ pi(s') throughout:

  critics      Adam_fast on f_i(s, a~) - f_i(s, a)
               + beta (w td_i + (1 - w) residual_i), then each layer's matrix
               onto a Frobenius ball; td_i with the targets' minimum, residual_i
               with f_i(s', a') and gradients through both sides (DQRA)
  temperature  log alpha <- Adam_fast on log alpha (entropy - target)
  policy       pi <- Adam_slow on -f_j(s, a~) - alpha entropy, j one critic
  targets      fbar_i <- (1 - tau) fbar_i + tau f_i

Sums `x + weight y` are divided by the weight where it is above 1, which moves
no minimum (`normalised_sum`). Before the game, critics learn by the Bellman
term and the policy by maximum likelihood with the same entropy floor, at the
fast rate (`make_phases`); then the policy's optimiser and the temperature are
reset, while critics and targets are kept.

With `pessimism='initial'` L is E[f(s_0, pi)] over first observations (ATAC_0,
absolute pessimism), for which the guarantee for every beta does not hold.

Departures from the official code (microsoft/ATAC) and choices:

* The warm start's critics have the Bellman term whole: theirs has it times beta
  where that is below 1, which Adam sees through its epsilon only, and does not
  train them at beta = 0. So one warm start serves every beta.
* Log-densities take the slope of tanh in the form that does not cancel; theirs
  adds 1e-6. They are with respect to actions scaled to `[-1, 1]^D`.
* Weights start as everywhere here (LeCun's variance); theirs are Xavier's.
* A target entropy of 0 is 0; theirs takes it for the default.
* `entropy_mode='per_dim'` divides log-densities by D and not the default
  target, as microsoft/lightATAC does: a floor D times as loose.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import actor_critic, optim, ranges
from agents.core import losses as terms
from agents.core.actor_critic import Params, State
from agents.core.types import Agent, Info, Phase, Spec, Transition, as_vectors
from networks import mixture
from networks.actor_critic import Squash, member, q_mixture
from networks.mlp import Network
from networks.moe import Config as MixtureConfig
from networks.routers import NoisyTopK


@dataclasses.dataclass(frozen=True)
class Config:
  """ATAC's hyper-parameters; defaults are those of paper and official code.

  Attributes:
    hidden_sizes: widths of the layers of policy and critics.
    normalise: whether observations are normalised, by `spec.statistics`.
    gamma: discount per decision.
    beta: weight of the Bellman term; the paper takes the best of many a data
      set, 16 is the official code's.
    residual_weight: w, the weight of the temporal difference in the Bellman
      term, 1 for it alone; the rest is the residual error's.
    pessimism: `'relative'` to the data's actions, or of `'initial'` values
      (ATAC_0), which needs batches with `o_0`.
    radius: radius of the Frobenius ball of each of the critics' matrices.
    fast_rate: Adam's learning rate for critics and temperature, and for the
      policy in the warm start.
    slow_rate: Adam's learning rate for the policy in the game.
    target_rate: share of the new critics that enters the targets per update.
    value_clip: bounds of the targets' minimum before the backup, or None.
    actor_critic: which of the two critics the policy climbs.
    init_temperature: initial value of alpha, in each phase.
    target_entropy: target of the entropy, in nats over the unit box; None for
      -D.
    entropy_mode: log-densities as the `'sum'` over components of an action or
      as the mean, `'per_dim'`.
    min_std: the policy's least standard deviation; not to be traced.
    max_std: the largest; not to be traced.
    warm_start_updates: number of updates before the game, see `make_phases`.
    critic_moe: a mixture of experts in the critics, in the place of all hidden
      layers but the first; 0 experts for none. Its loss is counted once
      per update, over all rows of the critics' loss, with noisy gates; targets,
      policy and evaluation have those of acting. Not with `expert_choice`,
      a dropping backend or a router that needs statistics.
    critic_tokens: number of chunks that its input is cut into, each a token.
    critic_control: one expert in the place of many, with the same tokens and
      operations: the control that arXiv 2410.01930 demands.
  """

  hidden_sizes: tuple[int, ...] = (256, 256, 256)
  normalise: bool = False
  gamma: float = 0.99
  beta: float = 16.0
  residual_weight: float = 0.5
  pessimism: Literal['relative', 'initial'] = 'relative'
  radius: float = 100.0
  fast_rate: float = 5e-4
  slow_rate: float = 5e-7
  target_rate: float = 0.005
  value_clip: tuple[float, float] | None = None
  actor_critic: int = 0
  init_temperature: float = 1.0
  target_entropy: float | None = None
  entropy_mode: Literal['sum', 'per_dim'] = 'sum'
  min_std: float = 1e-5
  max_std: float = math.e**2
  warm_start_updates: int = 100_000
  critic_moe: MixtureConfig = dataclasses.field(
    default_factory=lambda: MixtureConfig(
      num_experts=0, router=NoisyTopK(k=2), hidden=128
    )
  )
  critic_tokens: int = 1
  critic_control: bool = False

  def __post_init__(self):
    ranges.at_least(self, 1, 'hidden_sizes', 'critic_tokens')
    ranges.within(self, 0, 1, 'gamma', 'residual_weight', 'target_rate')
    rates = ('fast_rate', 'slow_rate')
    ranges.at_least(self, 0, 'beta', *rates, 'warm_start_updates')
    ranges.above(self, 0, 'radius', 'min_std', 'max_std', finite=False)
    ranges.above(self, 0, 'init_temperature')
    ranges.finite(self, 'target_entropy')
    ranges.one_of(self, 'pessimism', 'entropy_mode')
    if self.actor_critic not in (0, 1):
      raise ValueError(f'actor_critic={self.actor_critic}: must be 0 or 1')
    if self.value_clip is not None:
      is_plain = all(isinstance(x, (int, float)) for x in self.value_clip)
      if is_plain and not self.value_clip[0] < self.value_clip[1]:
        raise ValueError(
          f'value_clip={self.value_clip}: the first must be below the second'
        )
    if self.critic_moe.num_experts:
      self._check_mixture()

  def _check_mixture(self):
    mixture.check(self.critic_moe, 'critic_moe', statistics=False)
    tokens, sizes = self.critic_tokens, self.hidden_sizes
    if not sizes:
      raise ValueError('hidden_sizes=(): critic_moe needs a hidden layer')
    if tokens < 1 or sizes[0] % tokens:
      raise ValueError(
        f'critic_tokens={tokens}: must divide the first of hidden_sizes, '
        f'{sizes[0]}'
      )


class Networks(NamedTuple):
  """What the agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`.
    critic: `apply(params, observation, action) -> float32 [E, B]`, E as many
      as the parameters have.
    box: squashes Gaussians into the actions' bounds.
    learn: `(params, observation, action, key) -> (q [E, B], moe.Aux)`, the
      critics with noisy gates and their mixture's losses; None without one.
  """

  policy: Network
  critic: Network
  box: Squash
  learn: Callable[..., tuple[chex.Array, Any]] | None = None


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    bellman: `(q_tm1, r_t, discount_t, target_q_t, q_t, weight) -> [B]`, of one
      critic; `weight` is w.
    pessimism: `(q_new, q_tm1) -> [B]`, of one critic at the policy's actions
      and at the data's; relative pessimism's.
    policy: `(score, log_prob, temperature) -> [B]`; the score is a critic's
      value, or in the warm start the log-density of the data's action.
    temperature: `(log_temperature, log_prob, target_entropy) -> [B]`.
  """

  bellman: Callable[..., chex.Array]
  pessimism: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  temperature: Callable[..., chex.Array]


class Noise(NamedTuple):
  """All random numbers of an update, standard normal.

  Attributes:
    tm1: float32 `[B, D]`, of new actions at the batch's observations.
    t: float32 `[B, D]`, of actions at the next observations.
    first: float32 `[B, D]`, of actions at first observations (ATAC_0 alone).
  """

  tm1: chex.Array
  t: chex.Array
  first: chex.Array


def draw_noise(key: chex.PRNGKey, action: chex.Array) -> Noise:
  """The noise of an update with `key` on actions `[B, D]`."""
  keys, shape = jax.random.split(key, 3), action.shape
  return Noise(*(jax.random.normal(k, shape) for k in keys))


def normalised_sum(
  x: chex.Array, y: chex.Array, weight: chex.Numeric
) -> chex.Array:
  """`x + weight y`, divided by `weight` where that is above 1.

  Args:
    x: float32 scalar.
    y: float32 scalar.
    weight: at least 0; may be traced.

  Returns:
    float32 scalar.

  Source: ATAC, Appendix; official code, `normalized_sum`.
  """
  return x / jnp.maximum(weight, 1.0) + y * jnp.minimum(weight, 1.0)


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, statistics
      are wanted that the spec has not, or the bounds of the standard deviation
      do not enclose 1, where it starts.
  """
  del reduce
  bounds = {'min_std': config.min_std, 'max_std': config.max_std}
  policy, critic, box = actor_critic.make_networks(
    config, spec, 'atac', **bounds
  )
  if not config.critic_moe.num_experts:
    return Networks(policy, critic, box)
  size, action, statistics = as_vectors(spec, 'atac', config.normalise)
  experts = config.critic_moe
  critics = q_mixture(
    size,
    action.low,
    action.high,
    config.hidden_sizes[0],
    mixture.control(experts) if config.critic_control else experts,
    tokens=config.critic_tokens,
    statistics=statistics,
  )
  critic = Network(critics.init, critics.apply)
  return Networks(policy, critic, box, critics.learn)


def make_losses() -> Losses:
  """The terms of the module's docstring."""

  def pessimism(q_new, q_tm1):
    return q_new - q_tm1

  def policy(score, log_prob, temperature):
    return normalised_sum(-score, log_prob, temperature)

  def temperature(log_temperature, log_prob, target_entropy):
    return -log_temperature * (log_prob + target_entropy)

  return Losses(terms.double_q_residual, pessimism, policy, temperature)


def make(
  config: Config,
  networks: Networks,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent that plays the game, without a warm start.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Transition`s. The random numbers of an update
    are `draw_noise(key, batch.a_tm1)`.

  Raises:
    ValueError: from `update`, a batch without `o_0` that ATAC_0 needs.
  """
  return _make(config, networks, losses, spec, reduce, is_game=True)


def make_phases(
  config: Config,
  networks: Networks,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Phase, Phase]:
  """The warm start and the game, whose states have one structure.

  Between them the policy's optimiser and the temperature are reset; the
  policy, the critics, their optimiser and their targets are kept.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment.
    reduce: the mean over devices, where one update runs on several.

  Raises:
    ValueError: see `make`; in an update of ATAC_0, a batch without first
      observations.
  """
  args = (config, networks, losses, spec, reduce)

  def transfer(state: State) -> State:
    fresh = _start(config, state.params.policy, state.params.critic)
    opt_state = fresh.opt_state._replace(critic=state.opt_state.critic)
    return State(fresh.params, state.target_critic, opt_state)

  warm_start, game = _make(*args, is_game=False), _make(*args, is_game=True)
  return (
    Phase('warm_start', warm_start, config.warm_start_updates),
    Phase('game', game, None, transfer),
  )


def _start(config: Config, policy: Any, critic: Any) -> State:
  """Fresh optimisers, temperature and targets around two networks."""
  temperature = actor_critic.logarithm(config.init_temperature)
  params = Params(policy, critic, temperature)
  # Adam's first state does not depend on its rate.
  optimisers = Params(*3 * [optim.adam(0.0)])
  return State(params, critic, optim.init(optimisers, params))


def _sample(config: Config, networks: Networks, policy, observation, noise):
  """Actions `[B, D]`, their log-densities `[B]` and the Gaussians."""
  gaussian = networks.policy.apply(policy, observation)
  action, log_prob = networks.box.sample(noise, gaussian)
  return action, log_prob / _divisor(config, noise), gaussian


def _divisor(config: Config, action) -> int:
  return action.shape[-1] if config.entropy_mode == 'per_dim' else 1


def _critic_inputs(
  config: Config,
  networks: Networks,
  target_critic: Any,
  policy: Any,
  action: chex.Array,
  batch: Transition,
  noise: Noise,
  *,
  is_game: bool,
) -> tuple[Any, chex.Array]:
  """What the critics' loss sees, and the targets' minimum `[B]`.

  The former are observations and actions, of each row two pairs after each
  other (in the game three): the data's, the policy's at the next observation,
  and those of the pessimism. `action` is the policy's, `[B, D]`.
  """
  sample = functools.partial(_sample, config, networks, policy)
  a_t, _, _ = sample(batch.o_t, noise.t)
  target_q_t = networks.critic.apply(target_critic, batch.o_t, a_t)
  target_q_t = jnp.min(target_q_t, 0)
  if config.value_clip is not None:
    target_q_t = jnp.clip(target_q_t, *config.value_clip)
  pairs = [(batch.o_tm1, batch.a_tm1), (batch.o_t, a_t)]
  if is_game and config.pessimism == 'relative':
    pairs.append((batch.o_tm1, action))
  elif is_game:
    if batch.o_0 is None:
      raise ValueError(
        "pessimism='initial': the batch has no first observations o_0; take "
        "a source that draws them, or pessimism='relative'"
      )
    pairs.append((batch.o_0, sample(batch.o_0, noise.first)[0]))
  # One product of three times the rows is faster than three products. Pairs of
  # one row stay together, so that rows on several devices need not move.
  together = lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:])
  return jax.tree.map(together, *pairs), target_q_t


def make_critic_loss(
  config: Config, networks: Networks, losses: Losses, *, is_game: bool
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """The critics' loss in the game, or else in the warm start.

  Returns:
    `(critic, inputs, target_q_t [B], batch, key=None) -> (loss, metrics)`, the
    key of the noise at the gates of a mixture.
  """

  def loss(critic, inputs, target_q_t, batch, key=None):
    rows, aux = batch.r_t.shape[0], None
    if networks.learn is None:
      q = networks.critic.apply(critic, *inputs)
    else:
      q, aux = networks.learn(critic, *inputs, key)
    q = q.reshape(q.shape[0], rows, -1)
    q_tm1, q_t = q[..., 0], q[..., 1]
    discount_t = config.gamma * batch.discount_t

    def bellman(weight):
      of_one = lambda q_tm1, q_t: losses.bellman(
        q_tm1, batch.r_t, discount_t, target_q_t, q_t, weight
      )
      return jax.vmap(of_one)(q_tm1, q_t)

    by_row = error = bellman(config.residual_weight)
    metrics = {
      'bellman': jnp.mean(error),
      'td_error': jnp.mean(bellman(1.0)),
      'residual': jnp.mean(bellman(0.0)),
      'value': jnp.mean(q_tm1),
      'value_target': jnp.mean(batch.r_t + discount_t * target_q_t),
    }
    if is_game:
      pessimism = q_new = q[..., 2]
      if config.pessimism == 'relative':
        pessimism = jax.vmap(losses.pessimism)(q_new, q_tm1)
      by_row = normalised_sum(pessimism, error, config.beta)
      metrics |= {
        'pessimism': jnp.mean(pessimism),
        'value_new': jnp.mean(q_new),
      }
    total = jnp.sum(jnp.mean(by_row, -1))
    if aux is not None:
      total += jnp.sum(aux.loss)
      metrics |= mixture.metrics(aux)
    return total, metrics | {'loss_critic': total}

  return loss


def make_policy_loss(
  config: Config, networks: Networks, losses: Losses, *, is_game: bool
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """The policy's loss in the game, or else in the warm start.

  Returns:
    `(policy, critic, temperature, batch, noise) -> (loss, metrics)`.
  """

  def loss(policy, critic, temperature, batch, noise):
    action, log_prob, gaussian = _sample(
      config, networks, policy, batch.o_tm1, noise.tm1
    )
    if is_game:
      one = member(critic, config.actor_critic)
      score = networks.critic.apply(one, batch.o_tm1, action)[0]
    else:
      score = networks.box.log_prob(gaussian, batch.a_tm1)
      score = score / _divisor(config, batch.a_tm1)
    total = jnp.mean(losses.policy(score, log_prob, temperature))
    name = 'policy_value' if is_game else 'log_prob'
    return total, {'loss_policy': total, name: jnp.mean(score)}

  return loss


def _make(
  config: Config,
  networks: Networks,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any],
  *,
  is_game: bool,
) -> Agent:
  """The agent of the game, or else that of the warm start."""
  target_entropy = actor_critic.target_entropy(config, spec)
  policy_rate = config.slow_rate if is_game else config.fast_rate
  fast = optim.adam(config.fast_rate)
  optimisers = Params(optim.adam(policy_rate), fast, fast)
  parts = (config, networks, losses)
  policy_loss = make_policy_loss(*parts, is_game=is_game)
  critic_loss = make_critic_loss(*parts, is_game=is_game)
  sample = functools.partial(_sample, config, networks)
  critic_inputs = functools.partial(
    _critic_inputs, config, networks, is_game=is_game
  )

  def temperature_loss(log_temperature, log_prob):
    rows = losses.temperature(log_temperature, log_prob, target_entropy)
    return jnp.mean(rows), ()

  objectives = (policy_loss, critic_loss, temperature_loss)
  step = optim.minimise_each(objectives, optimisers, reduce)

  def init(key) -> State:
    policy_key, critic_key = jax.random.split(key)
    policy = networks.policy.init(policy_key)
    return _start(config, policy, networks.critic.init(critic_key))

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = draw_noise(key, batch.a_tm1)
    old, opt = state.params, state.opt_state
    action, log_prob, _ = sample(old.policy, batch.o_tm1, noise.tm1)
    inputs, target_q_t = critic_inputs(
      state.target_critic, old.policy, action, batch, noise
    )
    gate_key = mixture.gate_key(key)
    critic = step.critic(
      old.critic, opt.critic, inputs, target_q_t, batch, gate_key
    )
    # Of the critics before the projection: above the radius where it binds.
    kernel_norm = _kernel_norm(critic.params)
    project = optim.project_kernels
    projected = project(critic.params, config.radius, stacked=True)
    critic = critic._replace(params=projected)
    temperature = step.log_temperature(
      old.log_temperature, opt.log_temperature, log_prob
    )
    alpha = jnp.exp(temperature.params)
    policy = step.policy(
      old.policy, opt.policy, critic.params, alpha, batch, noise
    )
    metrics = {
      **critic.aux,
      **policy.aux,
      **optim.norms(critic=critic, policy=policy),
      'entropy': -jnp.mean(log_prob),
      'temperature': alpha,
      'kernel_norm': kernel_norm,
    }
    stepped = Params(policy, critic, temperature)
    state = actor_critic.advance(state, stepped, config.target_rate)
    return state, Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here: the slow copy is not at hand.
    noise = draw_noise(key, batch.a_tm1)
    policy, critic, log_temperature = params
    action, log_prob, _ = sample(policy, batch.o_tm1, noise.tm1)
    inputs, target_q_t = critic_inputs(critic, policy, action, batch, noise)
    _, critic_info = critic_loss(critic, inputs, target_q_t, batch)
    _, policy_info = policy_loss(
      policy, critic, jnp.exp(log_temperature), batch, noise
    )
    entropy = -jnp.mean(log_prob)
    return critic_info | policy_info | {'entropy': entropy}

  act, exploit = actor_critic.acting(networks.policy, networks.box)
  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)


def _kernel_norm(params: Any) -> chex.Array:
  """The largest Frobenius norm of an ensemble's matrices."""
  squares = [
    optim.matrix_squares(path, x, stacked=True)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  ]
  largest = [jnp.max(x) for x in squares if x is not None]
  return jnp.sqrt(jnp.max(jnp.stack(largest)))
