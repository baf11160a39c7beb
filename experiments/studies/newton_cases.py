"""The numbers of the rows and figures of `experiments.studies.newton`.

In float64: inside `jax.enable_x64(True)`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from search.exact import bellman, examples, riccati

# a, b, q, r of the book's two scalar systems.
MILD, STEEP = (1.0, 2.0, 1.0, 0.5), (2.0, 2.0, 1.0, 5.0)
# Base policy of truncated rollout in the latter, and numbers of its steps.
BASE, STEPS = -0.6, (0, 1, 2, 4, 8, 16, 32)
# One terminal cost from each of the intervals that K_s <= K* <= K_mu bound.
STARTS = {'I': 0.5, 'II': 2.0, 'III': 6.0, 'IV': 20.0}


def system(which: tuple[float, float, Any, Any]) -> Any:
  """A `search.exact.riccati.System` of a, b, q and r."""
  return riccati.System(*which)


def policy_curve(policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Costs of policies, and of lookahead on them, relative to K*.

  Args:
    policies: L of `MILD`, float64 `[n]`.

  Returns:
    `K_L - K*` and `K_L~ - K*`, float64 `[n]` each.
  """
  of = system(MILD)
  cost = np.asarray(riccati.policy_cost(of, policies))
  ahead = riccati.policy_cost(of, riccati.gain(of, cost))
  best = float(riccati.optimal(of))
  return cost - best, np.asarray(ahead) - best


def rollout_errors(start: float, depth: int = 1) -> np.ndarray:
  """`K_L~ - K*` in `STEEP` after rollouts of `STEPS` steps from K~, `[m]`."""
  of = system(STEEP)
  cost = lambda m: riccati.lookahead_cost(of, np.asarray(start), depth, BASE, m)
  return np.array([cost(m) for m in STEPS]) - float(riccati.optimal(of))


def replanned(b: Any, r: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Costs when b and r of `MILD` change (broadcast) and the base policy stays.

  Returns:
    Optimal, of the old policy, and of one step of Newton's method from it, each
    of the shape of `b` and `r`.
  """
  of, nominal = system((MILD[0], b, MILD[2], r)), system(MILD)
  old = riccati.gain(nominal, riccati.optimal(nominal))
  cost = riccati.policy_cost(of, old)
  ahead = riccati.policy_cost(of, riccati.gain(of, cost))
  return np.asarray(riccati.optimal(of)), np.asarray(cost), np.asarray(ahead)


def sensitivity(start: np.ndarray, width: float) -> np.ndarray:
  """Mean `|K_L1 - K_L2|` in `MILD` if K2 is uniform around K1.

  Args:
    start: `K1 - K*`, `[n]`.
    width: of the interval on each side.

  Returns:
    `[n]`, by quadrature; inf if some K2 is unstable.
  """
  of = system(MILD)
  first = start[:, None] + float(riccati.optimal(of))
  # Midpoints of equal parts.
  second = first + width * ((2 * np.arange(1000) + 1) / 1000 - 1)[None]
  cost = lambda k: np.asarray(riccati.policy_cost(of, riccati.gain(of, k)))
  return np.mean(np.abs(cost(second) - cost(first)), axis=1)


def approximate(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Approximate policy iteration in `STEEP`: errors that never go away.

  Args:
    delta: `[n]`, the error of each evaluation; all are low, the worse sign.

  Returns:
    Limits of `K_mu - K*`, the loss of the policies, and of `|K - K*|`, the
    errors of their evaluations, `[n]` each.
  """
  of = system(STEEP)
  best = float(riccati.optimal(of))
  cost = value = best + 0 * delta
  for _ in range(60):
    cost = np.asarray(riccati.policy_cost(of, riccati.gain(of, value)))
    value = cost - delta
  return cost - best, np.abs(value - best)


def newton_errors(which: tuple, start: float, number: int) -> np.ndarray:
  """`|K_k - K*|` of a scalar system's policy iteration, `[number + 1]`."""
  of = system(which)
  costs = [np.asarray(start)]
  for _ in range(number):
    costs.append(np.asarray(riccati.lookahead_cost(of, costs[-1], 1)))
  return np.abs(np.array(costs) - float(riccati.optimal(of)))


class Stability(NamedTuple):
  """Lookahead in random systems of two dimensions, counted.

  Attributes:
    fulfil: starts K~ with `F(K~) <= K~`.
    fulfil_unstable: of these, with an unstable lookahead policy.
    others: the other starts; `K~ >= K*` holds for all.
    others_unstable: of these, with one.
  """

  fulfil: int
  fulfil_unstable: int
  others: int
  others_unstable: int


def stability(seed: int, number: int) -> Stability:
  """Draws `number` systems `[2, 2]` with one control, from K* + random PSD."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal((number, *shape))

  def one(of, more):
    cost = riccati.optimal(of) + more
    spare = cost - riccati.riccati(of, cost)
    return spare, riccati.is_stable(of, riccati.gain(of, cost))

  drawn = riccati.System(
    normal(2, 2),
    normal(2, 1),
    _square(normal(2, 2)) + 0.1 * np.eye(2),
    0.1 + _square(normal(1, 1)),
  )
  spare, stable = jax.jit(jax.vmap(one))(drawn, _square(normal(2, 2)))
  fulfil = np.linalg.eigvalsh(np.asarray(spare)).min(1) >= 0
  unstable = ~np.asarray(stable)
  counts = fulfil, fulfil & unstable, ~fulfil, ~fulfil & unstable
  return Stability(*(int(x.sum()) for x in counts))


class Certainty(NamedTuple):
  """`max_x (J_mu - J*)` in the inventory, for lookahead of 1 to `l` steps.

  Attributes:
    exact: float64 `[l]`, every step plans with chance.
    after_first: float64 `[l]`, only the first one does.
    throughout: float64 `[l]`, none does.
  """

  exact: np.ndarray
  after_first: np.ndarray
  throughout: np.ndarray


@functools.cache
def certainty_equivalence(depth: int) -> Certainty:
  """Lookahead in `examples.inventory` up to `depth` steps, J~ = 0."""
  true, certain = examples.inventory()
  best = bellman.optimal(true)[1]

  @jax.jit
  def errors(first, later):
    starts = bellman.value_iteration(later, jnp.zeros_like(best), depth - 1)
    policies = jax.vmap(functools.partial(bellman.greedy, first))(starts)
    values = jax.vmap(functools.partial(bellman.policy_value, true))(policies)
    return jnp.max(jnp.abs(best[None] - values), axis=-1)

  pairs = (true, true), (true, certain), (certain, certain)
  return Certainty(*(np.asarray(errors(*pair)) for pair in pairs))


class InTurn(NamedTuple):
  """Rollout for several agents: `max_x (J_mu - J*)`, and what is gained.

  Attributes:
    base: of the base policy.
    joint: of minimising over all joint choices.
    in_turn: of one agent after the other.
    least_gain: of the latter two over the base policy, in any state.
  """

  base: float
  joint: float
  in_turn: float
  least_gain: float


def in_turn(seed: int) -> InTurn:
  """Both kinds of rollout in `search.exact.examples.agents`."""
  problem = examples.agents(seed)

  @jax.jit
  def compute(process):
    hot = lambda action: jax.nn.one_hot(
      action, process.reward.shape[1], dtype=process.reward.dtype
    )
    value = functools.partial(bellman.policy_value, process)
    best, old = bellman.optimal(process)[1], value(hot(problem.base))
    joint = value(bellman.greedy(process, old))
    turns = value(
      hot(examples.agent_by_agent(problem._replace(process=process)))
    )
    lost = lambda value: jnp.max(best - value)
    gain = jnp.min(jnp.minimum(joint, turns) - old)
    return lost(old), lost(joint), lost(turns), gain

  return InTurn(*map(float, compute(problem.process)))


def games(seed: int, number: int, steps: int) -> np.ndarray:
  """Newton's iterates in random Markov games, `[number, steps + 1]`."""

  def iterates(game):
    operator = functools.partial(examples.markov_bellman, game)
    return examples.newton_iterates(operator, jnp.zeros(()), steps)

  drawn = examples.random_games(seed, number)
  return np.asarray(jax.jit(jax.vmap(iterates))(drawn))


@functools.cache
def cycle(steps: int) -> tuple[np.ndarray, float]:
  """Newton's iterates in the game that cycles, `[steps + 1]`, and its J*."""
  operator = functools.partial(examples.markov_bellman, examples.cycling_game())
  zero = jnp.zeros(())
  iterates = examples.newton_iterates(operator, zero, steps)
  best = jax.lax.fori_loop(0, 1000, lambda _, value: operator(value), zero)
  return np.asarray(iterates), float(best)


def identities(seed: int, number: int) -> tuple[float, float]:
  """Newton's step by autodiff against the lookahead policy's cost.

  `number` processes of 20 states and 4 actions, and as many systems of 4 state
  variables and 2 controls.

  Returns:
    Largest differences: absolute in processes, relative in systems.
  """

  def tabular(mdp, value):
    played = bellman.policy_value(mdp, bellman.greedy(mdp, value))
    return abs(bellman.newton_step(mdp, value) - played).max()

  def linear_quadratic(of, more):
    # Above K_mu of a stable policy lookahead is stable.
    cost = 1.1 * riccati.optimal(of) + more
    played = riccati.policy_cost(of, riccati.gain(of, cost))
    return abs(riccati.newton(of, cost) - played).max() / abs(played).max()

  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal((number, *shape))
  likely = rng.exponential(size=(number, 20, 4, 20)) ** 2
  process = bellman.MDP(
    likely / likely.sum(-1, keepdims=True),
    rng.random((number, 20, 4)),
    np.full(number, 0.95),
    np.full((number, 20), 1 / 20),
  )
  quadratic = riccati.System(
    normal(4, 4) / 2,
    normal(4, 2),
    _square(normal(4, 4)) + np.eye(4),
    _square(normal(2, 2)) + np.eye(2),
  )
  worst = lambda one, *args: float(jax.jit(jax.vmap(one))(*args).max())
  return (
    worst(tabular, process, 10 * normal(20)),
    worst(linear_quadratic, quadratic, 0.01 * _square(normal(4, 4))),
  )


def _square(x):
  """`x x'`, positive semidefinite, of `[..., N, N]`."""
  return x @ np.swapaxes(x, -1, -2)
