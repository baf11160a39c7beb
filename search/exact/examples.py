"""Worked examples of approximation in value space, as arrays and operators.

From Bertsekas 2022, "Lessons from AlphaZero for optimal, model predictive, and
adaptive control" [book], with its numbers where it prints them and instances
of our own where it does not. Costs are minimised: values are costs, and the
rewards of processes are negative.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from search.exact import bellman
from search.exact.bellman import MDP

Operator = Callable[[chex.Array], chex.Array]


def two_states() -> MDP:
  """Two states, controls u (0) and v (1), discount 0.9 [book, 3.1.1]."""
  transition = np.array([[[0.3, 0.7], [0.6, 0.4]], [[0.4, 0.6], [0.9, 0.1]]])
  cost = np.array([[[3, 10], [7, 5]], [[0, 6], [3, 12]]])
  return _process(transition, cost, 0.9)


def continuous_control(value: chex.Array) -> chex.Array:
  """The u that attains `continuous_bellman`'s minimum at `[2]`: `[2]`.

  Each is a probability, as `continuous_bellman` says.
  """
  stay, leave = jnp.array([3.0, 9.0]), jnp.array([15.0, 1.0])
  slope = 0.9 * (value[0] - value[1])
  return jnp.clip((2 * leave - slope) / (2 * (stay + leave)), 0, 1)


def continuous_bellman(value: chex.Array) -> chex.Array:
  """T on costs `[2]` of two states with continuous control: `[2]`.

  [book, 3.1.2]. u in [0, 1] is the probability of state 1 next, 1 - u of
  state 2; a step in state 1 costs `5 + 3 u^2 + 15 (1 - u)^2` and in state 2
  `3 + 9 u^2 + (1 - u)^2`; discount 0.9.
  """
  u = continuous_control(value)
  cost = jnp.array([5.0, 3.0]) + jnp.array([3.0, 9.0]) * u**2
  cost += jnp.array([15.0, 1.0]) * (1 - u) ** 2
  return cost + 0.9 * (u * value[0] + (1 - u) * value[1])


def blackmailer(value: chex.Array) -> chex.Array:
  """T on the cost `[]` of a blackmailer's victim, who pays: `[]`.

  [book, 3.9]. A demand mu in (0, 1] earns mu and is refused for ever with
  probability `mu^2`: `T_mu J = -mu + (1 - mu^2) J`. Demands that shrink for
  ever earn without bound, so J* is minus infinity, T has no fixed point, and
  Newton's step halves mu for ever.
  """
  # From -1/2 down the best demand, -1 / (2 J), is at most 1.
  low = jnp.minimum(value, -0.5)
  return jnp.where(value <= -0.5, low + 1 / (4 * low), -1.0)


def matrix_game(cost: chex.Array) -> chex.Array:
  """The value of a game `[2, 2]`, `[]`: rows minimise, columns maximise."""
  low = jnp.max(jnp.min(cost, axis=0))
  high = jnp.min(jnp.max(cost, axis=1))
  (a, b), (c, d) = cost
  # Where no pure pair is a saddle the divisor is not 0.
  mixed = low < high
  divisor = jnp.where(mixed, a + d - b - c, 1)
  return jnp.where(mixed, (a * d - b * c) / divisor, high)


class MarkovGame(NamedTuple):
  """A zero-sum game of one state that ends by chance, discount 0.95.

  Attributes:
    cost: float `[2, 2]`, what the rows' player pays.
    survival: float `[2, 2]`, probability that it goes on.
  """

  cost: chex.Array
  survival: chex.Array


def markov_bellman(game: MarkovGame, value: chex.Array) -> chex.Array:
  """T on the cost `[]` of a Markov game, `[]`: neither concave nor convex."""
  return matrix_game(game.cost + 0.95 * game.survival * value)


def cycling_game() -> MarkovGame:
  """One in which Newton's method, that is policy iteration, cycles."""
  return MarkovGame(
    np.array([[8.0, 10.0], [-6.0, -5.0]]),
    np.array([[0.6605, 0.7598], [0.1467, 0.8703]]),
  )


def random_games(seed: int, number: int) -> MarkovGame:
  """Whole costs from -10 to 10, survival uniform; fields `[number, 2, 2]`."""
  rng = np.random.default_rng(seed)
  return MarkovGame(
    rng.integers(-10, 11, (number, 2, 2)).astype(float),
    rng.random((number, 2, 2)),
  )


def newton_iterates(
  operator: Operator, value: chex.Array, number: int
) -> chex.Array:
  """Newton's iterates for `J = TJ`, the first one first.

  Args:
    operator: T.
    value: J, where to start, `[...]`.
    number: of steps.

  Returns:
    `[number + 1, ...]`.
  """

  def step(value, _):
    return bellman.newton(operator, value), value

  return jax.lax.scan(step, value, length=number + 1)[1]


def inventory() -> tuple[MDP, MDP]:
  """A stock of 0 to 30 goods, the process and its certainty equivalent.

  0 to 7 goods are ordered and come at once, then 0, 1, 3 or 8 are asked for
  (with probabilities .2, .4, .2, .2; the mean, 2.6, is 3 for the certain one).
  An order costs 4 and 1 each, holding 0.5 each, what lacks 12 each; discount
  0.95. An instance of our own.
  """
  demands, chances = np.array([0, 1, 3, 8]), np.array([0.2, 0.4, 0.2, 0.2])
  build = lambda demands, chances: _process(*_stock(demands, chances), 0.95)
  return build(demands, chances), build(np.array([3]), np.ones(1))


def _stock(demands, chances):
  """Transitions `[31, 8, 31]` and costs `[31, 8, 1]` of `inventory`."""
  size = 31
  stock, order = np.arange(size)[:, None], np.arange(8)
  full = np.minimum(stock + order, size - 1)[..., None] - demands
  left, lack = np.maximum(full, 0), np.maximum(-full, 0)
  transition = np.einsum('sacn,c->san', np.eye(size)[left], chances)
  cost = 4 * (order > 0) + order + (0.5 * left + 12 * lack) @ chances
  return transition, cost[..., None]


class Agents(NamedTuple):
  """Several agents that choose together.

  Attributes:
    process: its actions are joint choices, in C order of the agents'.
    shape: how many choices each agent has.
    base: base policy, int `[S]`, a joint choice.
  """

  process: MDP
  shape: tuple[int, ...]
  base: np.ndarray


def agents(seed: int) -> Agents:
  """4 agents of 3 choices, 40 states, random; discount 0.95."""
  rng = np.random.default_rng(seed)
  shape, size = (3,) * 4, 40
  number = int(np.prod(shape))
  # Few next states are likely: what is chosen matters.
  transition = rng.exponential(size=(size, number, size)) ** 3
  transition /= transition.sum(-1, keepdims=True)
  cost = 10 * rng.random((size, number, 1))
  return Agents(
    _process(transition, cost, 0.95), shape, rng.integers(number, size=size)
  )


def agent_by_agent(problem: Agents) -> chex.Array:
  """Rollout in which each agent chooses in turn: actions int `[S]`.

  Agent i minimises over its own choice, those before it having chosen and
  those after it playing the base policy: `sum(shape)` evaluations a state
  instead of `prod(shape)` (Bertsekas 2021, "Multiagent reinforcement learning:
  rollout and policy iteration").
  """
  process, shape, base = problem
  size = base.shape[0]
  policy = jax.nn.one_hot(
    base, process.reward.shape[1], dtype=process.reward.dtype
  )
  q = bellman.action_value(process, policy).reshape(size, *shape)
  chosen: list = list(np.unravel_index(base, shape))
  state = np.arange(size)
  for agent in range(len(shape)):
    at = (state, *chosen[:agent], slice(None), *chosen[agent + 1 :])
    chosen[agent] = jnp.argmax(q[at], axis=-1)
  return jnp.ravel_multi_index(tuple(chosen), shape, mode='clip')


def _process(transition, cost, discount):
  """An MDP of costs `[S, A, next or 1]`, that starts anywhere."""
  size = transition.shape[0]
  return MDP(
    transition,
    -np.sum(transition * cost, axis=-1),
    np.float64(discount),
    np.full(size, 1 / size),
  )
