"""AlphaZero: a network that learns from a search in the true rules.

A network gives a policy p and a value v of a position. In self-play a search
with both finds a better policy pi, the game ends with z as the player to move
sees it, and the network follows (Silver 2018, equation 1):

  l = (z - v)^2 - pi^T log p + c |theta|^2.

With `sampled` the search chooses among K sampled actions at every node, and p
is projected on them (Hubert 2021, section 5): Sampled AlphaZero, for games of
many moves.

Departures and choices:

* The search is Gumbel AlphaZero's (Danihelka 2022): with few simulations its
  target still improves the policy; it needs no Dirichlet noise, and its own
  noise is the exploration. `rule=puct` is the paper's.
* z is a lambda-return over the values that the searches found; with
  `td_lambda=1`, the default, it is the outcome, wherever the game ends within
  `td_steps`.
* Acting uses the newest network: there is no match that a new one has to win
  (as in the paper, unlike AlphaGo Zero).
* The policy's term is the KL divergence, which differs by a constant; it is 0
  where nothing is left to learn. Illegal actions are masked.
* With Adam the decay c is decoupled; with SGD it joins the gradient, so that c
  is half of it.
* Moves are drawn at one temperature throughout (AlphaGo Zero's falls to 0
  after 30 moves), and boards are not turned or mirrored.
* The first positions of a game are in fewer windows than others, by a factor
  of up to `positions`: they are in every game.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import losses as terms
from agents.core import optim, planning, ranges
from agents.core.types import Agent, Discrete, Info, Spec, Trajectory
from agents.core.unroll import flatten_steps
from networks import actions, policy_value
from networks.mlp import Network
from networks.policy_value import NetworkConfig
from search import proposals
from search.model import Game, exact

# What an illegal action's logit is: no probability, and finite.
_MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class Config:
  """AlphaZero's hyper-parameters.

  Attributes:
    network: sizes and kind of the network.
    search: the search when acting; `num_samples` is K where `sampled`.
    sampled: search among K sampled actions at every node.
    temperature: of the moves drawn by visit counts; Gumbel's rule has its own.
    positions: of a window that are trained on, from its first.
    td_steps: positions after each of them that its return may use.
    td_lambda: 1 for the outcome of the game, less to trust the searches'
      values on the way there.
    value_weight: of the value loss.
    optimiser: `adam`, or `sgd` with momentum, the paper's.
    learning_rate: its peak.
    warmup_updates: linear warm-up.
    decay_every: updates between decays of the learning rate; 0 for none.
    decay_rate: the factor of each.
    momentum: of SGD.
    weight_decay: c, of SGD (in the gradient) or Adam (decoupled).
    max_gradient_norm: gradients are clipped to it.
  """

  network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
  search: planning.SearchConfig = dataclasses.field(
    default_factory=lambda: planning.SearchConfig(
      rule='gumbel', num_simulations=16
    )
  )
  sampled: bool = False
  temperature: float = 1.0
  positions: int = 8
  td_steps: int = 64
  td_lambda: float = 1.0
  value_weight: float = 1.0
  optimiser: Literal['sgd', 'adam'] = 'adam'
  learning_rate: float = 1e-3
  warmup_updates: int = 100
  decay_every: int = 0
  decay_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 1e-4
  max_gradient_norm: float = 5.0

  def __post_init__(self):
    ranges.at_least(self, 1, 'positions', 'td_steps')
    ranges.at_least(self, 0, 'temperature', 'value_weight')
    ranges.at_least(self, 0, *optim.SCHEDULE_FIELDS)
    ranges.within(self, 0, 1, 'td_lambda', 'momentum')
    ranges.above(self, 0, 'max_gradient_norm', finite=False)
    if self.search.rule == 'efficientzero':
      raise ValueError(
        'rule=efficientzero: is for one player; take gumbel or puct'
      )

  @property
  def window(self) -> int:
    """Steps that a replayed window must have."""
    return self.positions + self.td_steps


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: of the network, handed to actors.
    opt_state: the optimiser's.
  """

  params: Any
  opt_state: optax.OptState


class Losses(NamedTuple):
  """The terms, each of `[N]` positions; replace one with `losses._replace`.

  Attributes:
    policy: `(log_probs [N, K], weights [N, K]) -> [N]`, of the actions that
      the search chose among: all, or the sampled ones.
    value: `(value [N], target [N]) -> [N]`.
  """

  policy: Callable[[chex.Array, chex.Array], chex.Array]
  value: Callable[[chex.Array, chex.Array], chex.Array]


def make_networks(config: Config, spec: Spec, reduce: Any = None) -> Network:
  """The network for a spec; it has no statistics, so `reduce` is not needed.

  Raises:
    ValueError: the environment has no exact rules, its actions cannot be
      enumerated, or K actions cannot be drawn.
  """
  del reduce
  if spec.game is None:
    raise ValueError(
      f'alphazero needs exact rules, and {spec.name} has none: take '
      'env=self_play:connect_four, self_play:tic_tac_toe or self_play:othello; '
      'agent=muzero needs no rules'
    )
  action = spec.action
  if not isinstance(action, Discrete) or spec.game.candidates is not None:
    raise ValueError(
      f'alphazero needs actions that can be enumerated; {spec.name} lists '
      'candidates'
    )
  if config.sampled:
    proposals.check(
      actions.flat(action.num_actions),
      config.search.num_samples,
      config.search.replacement,
    )
  return policy_value.make(
    config.network, spec.game.spec.observation, action.num_actions
  )


def make_losses() -> Losses:
  """The paper's terms."""
  return Losses(
    policy=terms.sampled_kl,
    value=lambda value, target: jnp.square(target - value),
  )


def game_returns(
  reward: chex.Array,
  discount: chex.Array,
  truncated: chex.Array,
  player: chex.Array,
  value: chex.Array,
  td_lambda: chex.Numeric,
) -> chex.Array:
  """lambda-returns of a game of two, each as its own player to move sees it.

  `z_k = r_{k+1} + s_{k+1} ((1 - lambda) v_{k+1} + lambda z_{k+1})`, where
  `s_{k+1}` is 0 if the game ended there, 1 if the same player moves again and
  -1 if the other one does. At the last step, and where an episode was cut, z
  is the value itself.

  Args:
    reward: float32 `[L]`, received on arriving by the player that moved.
    discount: float32 `[L]`, 0 at an end, else 1.
    truncated: bool `[L]`, the episode was cut here.
    player: int32 `[L]`, the player to move.
    value: float32 `[L]`, as that player sees it.
    td_lambda: lambda, in [0, 1]; may be traced.

  Returns:
    float32 `[L]`, meaningless where a game is over.
  """
  chex.assert_rank([reward, discount, truncated, player, value], 1)
  sign = jnp.where(player[1:] == player[:-1], 1.0, -1.0) * discount[1:]

  def back(later, step):
    reward, sign, value, next_value, cut = step
    ahead = (1 - td_lambda) * next_value + td_lambda * later
    now = jnp.where(cut, value, reward + sign * ahead)
    return now, now

  steps = (reward[1:], sign, value[:-1], value[1:], truncated[:-1])
  _, returns = jax.lax.scan(back, value[-1], steps, reverse=True)
  return jnp.append(returns, value[-1])


def make_targets(config: Config, game: Game, batch: Trajectory) -> chex.Array:
  """Returns of the positions that are trained on, float32 `[B, positions]`."""
  timestep = batch.experience.timestep
  returns = jax.vmap(game_returns, (0, 0, 0, 0, 0, None))(
    timestep.reward,
    timestep.discount,
    timestep.truncated,
    jax.vmap(jax.vmap(game.player))(timestep.observation),
    batch.experience.extras['search_value'],
    config.td_lambda,
  )
  return returns[:, : config.positions]


def make_loss(
  config: Config, networks: Network, losses: Losses, game: Game
) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
  """The whole loss, `(params, batch) -> (loss, metrics)`."""

  def loss(params, batch: Trajectory):
    target = make_targets(config, game, batch).reshape(-1)
    first = jax.tree.map(lambda x: x[:, : config.positions], batch.experience)
    mask = batch.valid[:, : config.positions] & ~first.timestep.is_last()
    weight = mask.astype(jnp.float32)
    if batch.sample is not None:
      weight *= batch.sample.weight[:, None]
    mask, weight = mask.reshape(-1).astype(jnp.float32), weight.reshape(-1)
    rows = flatten_steps(first)
    observation = jax.vmap(game.observe)(rows.timestep.observation)
    logits, value = networks.apply(params, observation)
    invalid = rows.timestep.invalid_actions
    if invalid is not None:
      logits = jnp.where(invalid, _MASKED, logits)
    log_probs = jax.nn.log_softmax(logits)
    chosen, weights = log_probs, rows.extras['search_policy']
    if config.sampled:
      among = rows.extras['sampled_actions']
      chosen = jnp.take_along_axis(log_probs, among, axis=-1)
    count = jnp.maximum(jnp.sum(mask), 1.0)
    mean = lambda x: jnp.sum(weight * x) / count
    policy_loss = mean(losses.policy(chosen, weights))
    value_loss = mean(losses.value(value, target))
    total = policy_loss + config.value_weight * value_loss
    entropy = -jnp.sum(jax.scipy.special.xlogy(weights, weights), -1)
    metrics = {
      'loss': total,
      'loss_policy': policy_loss,
      'loss_value': value_loss,
      'value': terms.masked_mean(value, mask),
      'value_target': terms.masked_mean(target, mask),
      'target_entropy': terms.masked_mean(entropy, mask),
    }
    return total, metrics

  return loss


def make(
  config: Config,
  networks: Network,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the environment, with its `game`.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Trajectory`s of `config.window` steps, their
    observations positions, with `extras` `search_policy [B, L, A]` and
    `search_value [B, L]`; where `sampled`, `search_policy [B, L, K]` and
    `sampled_actions [B, L, K]`.
  """
  game = spec.game
  assert game is not None and isinstance(spec.action, Discrete)
  family = actions.flat(spec.action.num_actions) if config.sampled else None
  model = exact(game, networks.apply)._replace(distribution=family)
  search = planning.make_search(config.search, family)
  optimiser = optim.from_config(config, config.optimiser)
  loss = make_loss(config, networks, losses, game)
  step = optim.minimise(loss, optimiser, reduce)

  def init(key) -> State:
    params = networks.init(key)
    return State(params, optimiser.init(params))

  def act(params, key, timestep):
    temperature = config.temperature
    return planning.decide(search, model, params, key, timestep, temperature)

  def update(state: State, batch: Trajectory, key) -> tuple[State, Info]:
    del key
    params, opt_state, metrics, norm = step(
      state.params, state.opt_state, batch
    )
    metrics = reduce(metrics | {'gradient_norm': norm})
    return State(params, opt_state), Info(metrics)

  def evaluate(params, batch, key):
    del key
    return loss(params, batch)[1]

  return Agent(
    init=init, act=act, update=update, model=model, evaluate=evaluate
  )
