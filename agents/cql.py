"""CQL: conservative Q-learning, SAC on a data set with a pessimistic critic.

SAC's critics with a penalty that pushes down a soft maximum over all actions
and pushes up the data's (Kumar et al. 2020, equation 4, CQL(H)):

  J_Q = sum_i mean (q_i(s, a) - y)^2
        + w mean [log int exp q_i(s, .) - q_i(s, a)]
  y   = r + gamma d min_i qbar_i(s', a'),  a' ~ pi(s')

The integral is over the unit box `[-1, 1]^D`, by importance sampling with n
uniform actions, n of the policy at s and n of the policy at s' (Appendix F).
With a threshold tau the weight w is a Lagrange multiplier (equation 30):

  J_w = -w mean_i [log int exp q_i(s, .) - q_i(s, a) - tau]

Policy and temperature are SAC's. In this order: critics, multiplier (with the
critics before their step), policy, temperature; each with the results of the
step before it.

Departures and choices:

* No factor 1/2 in the squared error, as in the official code.
* The soft maximum is the integral itself; the official code leaves out the
  division by 3n, so that a threshold tau of ours is `tau + log 3n` there. The
  multiplier's gap is not multiplied by `penalty`, the multiplier's start.
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
import jax.numpy as jnp

from agents.core import actor_critic, conservative, optim, ranges
from agents.core.actor_critic import Networks, State
from agents.core.conservative import Losses
from agents.core.types import Agent, Info, Spec, Transition

# Beyond it the official code holds the multiplier.
_MAX_LOG_MULTIPLIER = math.log(1e6)


@dataclasses.dataclass(frozen=True)
class Config:
  """CQL's hyper-parameters; defaults are the paper's and the official code's.

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
    deterministic_backup: whether targets leave out the entropy.
    penalty: w, the weight of the penalty; its initial value if w is learned.
    num_samples: n, the number of actions of each kind in the penalty.
    gap_target: tau, the gap above which w grows; None for a fixed w.
    multiplier_rate: Adam's learning rate for w's logarithm.
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
    actor_critic.check_soft(self)
    ranges.at_least(self, 1, 'num_samples')
    ranges.at_least(self, 0, 'multiplier_rate', 'penalty')
    ranges.finite(self, 'gap_target')
    is_zero = isinstance(self.penalty, int | float) and self.penalty == 0
    if self.gap_target is not None and is_zero:
      raise ValueError('penalty=0: must be above 0 where gap_target is set')


class Params(NamedTuple):
  """What is trained; acting needs only the policy.

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


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Networks:
  """The networks for a spec; `reduce` is not needed by them.

  Raises:
    ValueError: if the actions are not vectors within finite bounds, or
      statistics are wanted that the spec has not.
  """
  del reduce
  return actor_critic.make_networks(config, spec, 'cql')


make_losses = conservative.make_losses


def multiplier(config: Config, log_multiplier: chex.Array | None) -> Any:
  """w, a float32 scalar, by its logarithm; `config.penalty` where it is fixed.

  Args:
    config: hyper-parameters.
    log_multiplier: float32 scalar; None where w is not learned.
  """
  if log_multiplier is None:
    return config.penalty
  return jnp.exp(jnp.minimum(log_multiplier, _MAX_LOG_MULTIPLIER))


def make_critic_loss(
  config: Config, networks: Networks, losses: Losses
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """J_Q.

  Returns:
    `(critic, target_critic, params, batch, noise) -> (loss, metrics)`.
  """
  parts = (config, networks, losses)

  def loss(critic, target_critic, params: Params, batch, noise):
    found = conservative.critic_errors(
      *parts, critic, target_critic, params, batch, noise
    )
    gap = jnp.mean(found.high - found.q, -1)
    bellman = jnp.sum(jnp.mean(found.squares, -1))
    total = bellman + multiplier(config, params.log_multiplier) * jnp.sum(gap)
    return total, {
      'loss_critic': total,
      'loss_bellman': bellman,
      'gap': jnp.mean(gap),
      'value': jnp.mean(found.q),
      'value_target': jnp.mean(found.target),
    }

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
    are `conservative.draw_noise(key, batch.a_tm1, config.num_samples)`.
  """
  is_learned = config.gap_target is not None
  optimisers = actor_critic.make_optimisers(config)
  multiplier_optimiser = optim.adam(config.multiplier_rate)
  parts = (config, networks, losses)
  critic_loss = make_critic_loss(*parts)
  objectives = actor_critic.make_objectives(*parts, spec, critic_loss)
  step = optim.minimise_each(objectives, optimisers, reduce)

  def multiplier_loss(log_multiplier, gap):
    weight = multiplier(config, log_multiplier)
    return -weight * (gap - config.gap_target), None

  multiplier_step = optim.minimise(
    multiplier_loss, multiplier_optimiser, reduce
  )

  def init(key) -> State:
    log_multiplier = actor_critic.logarithm(config.penalty)
    params = Params(
      *actor_critic.init(config, networks, key),
      log_multiplier if is_learned else None,
    )
    opt_state = Params(
      *optim.init(optimisers, params),
      multiplier_optimiser.init(log_multiplier) if is_learned else None,
    )
    return State(params, params.critic, opt_state)

  def update(state: State, batch: Transition, key) -> tuple[State, Info]:
    noise = conservative.draw_noise(key, batch.a_tm1, config.num_samples)
    old, opt = state.params, state.opt_state
    critic = step.critic(
      old.critic, opt.critic, state.target_critic, old, batch, noise
    )
    weight = optim.Step(old.log_multiplier, opt.log_multiplier, None, None)
    if is_learned:
      weight = multiplier_step(*weight[:2], critic.aux['gap'])
    policy, temperature, metrics = actor_critic.soft_steps(
      step, state, critic, batch.o_tm1, noise.tm1
    )
    penalty = jnp.float32(multiplier(config, old.log_multiplier))
    metrics |= {'penalty': penalty}
    parts = Params(policy, critic, temperature, weight)
    state = actor_critic.advance(state, parts, config.target_rate)
    return state, Info(reduce(metrics))

  def evaluate(params, batch, key):
    # The critics are their own targets here: the slow copy is not at hand.
    noise = conservative.draw_noise(key, batch.a_tm1, config.num_samples)
    (policy, critic, log_temperature, _) = params
    _, critic_info = critic_loss(critic, critic, params, batch, noise)
    _, (policy_info, _) = objectives.policy(
      policy, critic, jnp.exp(log_temperature), batch.o_tm1, noise.tm1
    )
    return critic_info | policy_info

  act, exploit = actor_critic.acting(networks.policy, networks.box)
  return Agent(init, act, update, evaluate=evaluate, exploit=exploit)
