"""BC: behaviour cloning, by maximum likelihood or by least squares.

  likelihood:  L = mean -log pi(a|s)
  squared:     L = mean (tanh(mean(s)) - a)^2

over the actions of a data set, scaled to the unit box. With
`min_entropy` the likelihood is raised among the policies of at least that
entropy, as in ATAC's warm start (Cheng et al. 2022, official code):

  L = (mean -log pi(a|s) + alpha mean log pi(a~|s)) / max(alpha, 1), a~ ~ pi(s)
  L_alpha = log alpha (mean -log pi(a~|s) - min_entropy)

the temperature being stepped first, with the same draws a~. A likelihood
without such a floor has no bound where a data set's policy is deterministic.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import actor_critic, optim, ranges
from agents.core.types import Agent, Info, Spec, Transition, as_vectors
from networks.actor_critic import Squash, gaussian_policy, squash
from networks.mlp import Network


@dataclasses.dataclass(frozen=True)
class Config:
  """Behaviour cloning's hyper-parameters.

  Attributes:
    hidden_sizes: widths of the policy's layers.
    layer_norm: whether they are normalised.
    normalise: whether observations are normalised, by `spec.statistics`.
    loss: `likelihood`, a stochastic policy; `squared`, a deterministic one.
    min_entropy: least entropy of the policy, in nats over the unit box (-D is
      usual); None for no floor. Of `likelihood` only.
    policy_rate: Adam's learning rate for the policy.
    temperature_rate: Adam's learning rate for the temperature's logarithm.
    init_temperature: initial value of alpha.
  """

  hidden_sizes: tuple[int, ...] = (256, 256)
  layer_norm: bool = False
  normalise: bool = False
  loss: Literal['likelihood', 'squared'] = 'likelihood'
  min_entropy: float | None = None
  policy_rate: float = 3e-4
  temperature_rate: float = 3e-4
  init_temperature: float = 1.0

  def __post_init__(self):
    ranges.at_least(self, 1, 'hidden_sizes')
    ranges.one_of(self, 'loss')
    ranges.at_least(self, 0, 'policy_rate', 'temperature_rate')
    ranges.above(self, 0, 'init_temperature')
    if self.min_entropy is not None and self.loss == 'squared':
      raise ValueError(
        f'min_entropy={self.min_entropy}: must be None where loss=squared, '
        'whose policy is deterministic'
      )
    ranges.finite(self, 'min_entropy')


class Params(NamedTuple):
  """What is trained; acting needs only the policy.

  Attributes:
    policy: of `networks.policy`.
    log_temperature: float32 scalar, log alpha; fixed without a floor.
  """

  policy: Any
  log_temperature: chex.Array


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: newest parameters, handed to actors.
    opt_state: the optimisers' states, of the parts of `params`.
  """

  params: Params
  opt_state: Params


class Networks(NamedTuple):
  """What the agent is made of.

  Attributes:
    policy: `apply(params, observation) -> Gaussian` of `[B, D]`.
    box: squashes Gaussians into the actions' bounds.
  """

  policy: Network
  box: Squash


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    likelihood: `(log_prob of the recorded action) -> [B]`.
    squared: `(action [B, D], recorded action [B, D]) -> [B]`, in the unit box.
    temperature: `(log_temperature, log_prob of a draw, min_entropy) -> [B]`.
  """

  likelihood: Callable[..., chex.Array]
  squared: Callable[..., chex.Array]
  temperature: Callable[..., chex.Array]


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  size, action, statistics = as_vectors(spec, 'bc', config.normalise)
  policy = gaussian_policy(
    size,
    action.shape[0],
    config.hidden_sizes,
    std='free' if config.loss == 'squared' else 'state',
    norm='layer' if config.layer_norm else 'none',
    statistics=statistics,
  )
  return Networks(policy, squash(action.low, action.high))


def make_losses() -> Losses:
  """The terms of the module's docstring."""

  def likelihood(log_prob):
    return -log_prob

  def squared(action, done):
    return jnp.mean(jnp.square(action - done), -1)

  def temperature(log_temperature, log_prob, min_entropy):
    return log_temperature * (-log_prob - min_entropy)

  return Losses(likelihood, squared, temperature)


def make_objectives(
  config: Config, networks: Networks, losses: Losses
) -> tuple[Callable, Callable]:
  """What the parts minimise, each differentiated in its first argument.

  Returns:
    `(policy, log_temperature, batch, noise [B, D])` and
    `(log_temperature, policy, batch, noise [B, D])`, each `-> (loss, metrics)`.
  """
  network, box = networks

  def policy_loss(policy, log_temperature, batch, noise):
    gaussian = network.apply(policy, batch.o_tm1)
    unit = box.to_unit(box.mode(gaussian))
    error = jnp.mean(losses.squared(unit, box.to_unit(batch.a_tm1)))
    metrics = {'squared_error': error}
    if config.loss == 'squared':
      return error, metrics | {'loss_policy': error}
    log_prob = box.log_prob(gaussian, batch.a_tm1)
    total = jnp.mean(losses.likelihood(log_prob))
    _, drawn = box.sample(noise, gaussian)
    metrics |= {'log_likelihood': jnp.mean(log_prob)}
    metrics |= {'entropy': -jnp.mean(drawn)}
    if config.min_entropy is not None:
      temperature = jnp.exp(log_temperature)
      total = total + temperature * jnp.mean(drawn)
      # As ATAC's sums: the larger weight is 1, which keeps the step's size.
      total = total / jnp.maximum(temperature, 1.0)
      metrics |= {'temperature': temperature}
    return total, metrics | {'loss_policy': total}

  def temperature_loss(log_temperature, policy, batch, noise):
    _, drawn = box.sample(noise, network.apply(policy, batch.o_tm1))
    rows = losses.temperature(log_temperature, drawn, config.min_entropy)
    return jnp.mean(rows), {}

  return policy_loss, temperature_loss


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
    An `Agent` whose batches are `Transition`s, of which it reads observations
    and actions. The noise of an update, for the draws that the entropy is
    estimated from, is `normal(key, [B, D])`.
  """
  del spec
  network, box = networks
  optimisers = Params(
    optim.adam(config.policy_rate), optim.adam(config.temperature_rate)
  )
  objectives = make_objectives(config, networks, losses)
  step = optim.minimise_each(objectives, optimisers, reduce)
  act, exploit = actor_critic.acting(network, box)

  def init(key) -> State:
    log_temperature = actor_critic.logarithm(config.init_temperature)
    params = Params(network.init(key), log_temperature)
    return State(params, optim.init(optimisers, params))

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = jax.random.normal(key, batch.a_tm1.shape)
    (policy, log_temperature), opt = state.params, state.opt_state
    temperature_opt = opt.log_temperature
    if config.min_entropy is not None:
      log_temperature, temperature_opt, _, _ = step.log_temperature(
        log_temperature, temperature_opt, policy, batch, noise
      )
    policy, policy_opt, metrics, norm = step.policy(
      policy, opt.policy, log_temperature, batch, noise
    )
    metrics = reduce(metrics | {'gradient_norm': norm})
    params = Params(policy, log_temperature)
    return State(params, Params(policy_opt, temperature_opt)), Info(metrics)

  def evaluate(params, batch, key):
    noise = jax.random.normal(key, batch.a_tm1.shape)
    return objectives[0](*params, batch, noise)[1]

  return Agent(
    init=init,
    # The deviations of a deterministic policy are never trained.
    act=exploit if config.loss == 'squared' else act,
    update=update,
    evaluate=evaluate,
    exploit=exploit,
  )
