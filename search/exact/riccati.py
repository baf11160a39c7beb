"""Linear systems with quadratic costs: Bellman's operator is Riccati's.

State `x <- a x + b u`, cost of a step `x'q x + u'r u`, no discount. What a
state costs is `x'K x`, a control is `u = L x`, and Bellman's operator on K is

  F(K) = min_L F_L(K),  F_L(K) = (a + b L)'K (a + b L) + q + L'r L,

whose root K* is the cost of the optimal policy. Costs are minimised here, so
that F is concave and each F_L a tangent above it: Newton's step from K for
`K = F(K)` is K_L, the cost of `L = gain(K)`, never below K*
(`search.exact.bellman` says why it is Newton's). Stability takes the place that
contraction has there: a policy has a cost only where `a + b L` is stable, and
is unstable where Newton's step has no meaning (Bertsekas 2022, "Lessons from
AlphaZero", chapter 4; Kleinman 1968).

Matrices are those of `N` state variables and `M` controls: K `[N, N]`
symmetric, L `[M, N]`. Scalar systems, the book's, have numbers for fields; K,
L and what is computed from them are then arrays of any one shape. For
float64, as `search.exact.bellman`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from search.exact import bellman, linear
from search.roots import check_range

# Powers of a matrix are taken up to this power of 2.
_SQUARINGS = 40


class System(NamedTuple):
  """A linear system and its cost.

  Attributes:
    a: float `[N, N]` or `[]`, what the state does by itself.
    b: float `[N, M]` or `[]`, not 0, what the control does.
    q: float `[N, N]` or `[]`, cost of the state, positive (semi)definite.
    r: float `[M, M]` or `[]`, cost of the control, positive definite.
  """

  a: chex.Numeric
  b: chex.Numeric
  q: chex.Numeric
  r: chex.Numeric


def riccati(system: System, cost: chex.Array) -> chex.Array:
  """Bellman's operator F on a cost K `[N, N]`: F(K), `[N, N]`."""
  return policy_riccati(system, gain(system, cost), cost)


def gain(system: System, cost: chex.Array) -> chex.Array:
  """The L that is best where the rest costs K: `-(r + b'K b)^-1 b'K a`.

  Args:
    system: scalar or not.
    cost: K, `[N, N]`, with `r + b'K b` positive definite.

  Returns:
    L, `[M, N]`.
  """
  a, b, _, r = system
  if _is_scalar(system):
    return -a * b * cost / (r + b * b * cost)
  return -linear.inverse(r + b.T @ cost @ b) @ b.T @ cost @ a


def policy_riccati(
  system: System, policy: chex.Array, cost: chex.Array
) -> chex.Array:
  """A policy's operator: F_L(K), one step of L and then K.

  Args:
    system: scalar or not.
    policy: L, `[M, N]`.
    cost: K, `[N, N]`.

  Returns:
    `[N, N]`.
  """
  loop = closed_loop(system, policy)
  if _is_scalar(system):
    return loop * loop * cost + system.q + system.r * policy * policy
  return loop.T @ cost @ loop + system.q + policy.T @ system.r @ policy


def closed_loop(system: System, policy: chex.Array) -> chex.Array:
  """`a + b L` of a policy L `[M, N]`: `[N, N]`.

  F's derivative at a scalar K is its square at `gain(K)`.
  """
  if _is_scalar(system):
    return system.a + system.b * policy
  return system.a + system.b @ policy


def is_stable(system: System, policy: chex.Array) -> chex.Array:
  """Whether a policy L `[M, N]` brings every state to 0, bool `[]`.

  Of a scalar system bool of L's shape.
  """
  loop = closed_loop(system, policy)
  return (jnp.abs(loop) if _is_scalar(system) else _radius(loop)) < 1


def policy_cost(system: System, policy: chex.Array) -> chex.Array:
  """What a policy L `[M, N]` costs: K_L, the root of F_L, `[N, N]`.

  All of it is inf where L is unstable.
  """
  loop = closed_loop(system, policy)
  if _is_scalar(system):
    step = system.q + system.r * policy * policy
    stable = jnp.abs(loop) < 1
    # A divisor that is never 0: derivatives pass through both branches.
    return jnp.where(stable, step / jnp.where(stable, 1 - loop**2, 1), jnp.inf)
  step = system.q + policy.T @ system.r @ policy
  total = _doubled(lambda x, power: power.T @ x @ power, loop, step)
  return jnp.where(_radius(loop) < 1, total, jnp.inf)


def newton(system: System, cost: chex.Array) -> chex.Array:
  """Newton's step for `K = F(K)`, by automatic differentiation through F.

  It is `policy_cost(system, gain(system, cost))` where that is finite, found
  another way (Bertsekas 2022, equation 4.13).

  Args:
    system: scalar or not.
    cost: K, `[N, N]`; of a matrix the policy must be stable.

  Returns:
    The next K, `[N, N]`. Of a scalar K without a stable policy it is a finite
    number that is not a cost.
  """
  operator = functools.partial(riccati, system)
  if _is_scalar(system):
    return bellman.newton(operator, jnp.asarray(cost))
  # No pivots would be needed: (I - D)^-1 is the series of D, which is stable.
  series = lambda matrix, right: _doubled(
    lambda x, power: power @ x, jnp.eye(right.shape[0]) - matrix, right
  )
  return bellman.newton(operator, cost, series)


def lookahead_cost(
  system: System,
  cost: chex.Array,
  depth: int,
  policy: chex.Array | None = None,
  num_steps: int = 0,
) -> chex.Array:
  """What lookahead, truncated rollout and a terminal cost cost when played.

  The first control of minimising over `depth` steps, then `num_steps` of a
  base policy, then K: Newton's step from `F^(depth - 1)(F_L^num_steps(K))`.
  Only the first of the steps is Newton's; the others move its start.

  Args:
    system: scalar or not.
    cost: K, `[N, N]`, the terminal cost.
    depth: l, at least 1.
    policy: base policy L, `[M, N]`; None without rollout.
    num_steps: m, at least 0.

  Returns:
    The player's cost, `[N, N]`; inf where it is unstable.

  Raises:
    ValueError: a number is too small, or there are steps without a policy.

  >>> book, zero = System(1.0, 2.0, 1.0, 0.5), jnp.zeros(())
  >>> [round(lookahead_cost(book, zero, l).item(), 3) for l in (1, 2)]
  [inf, 1.112]
  >>> round(float(optimal(book)), 3)
  1.112
  """
  check_range('depth', depth, low=1)
  check_range('num_steps', num_steps, low=0)
  if num_steps and policy is None:
    raise ValueError(
      f'num_steps={num_steps}: a rollout needs a policy; got policy=None'
    )
  for _ in range(num_steps):
    cost = policy_riccati(system, policy, cost)
  for _ in range(depth - 1):
    cost = riccati(system, cost)
  return policy_cost(system, gain(system, cost))


def optimal(system: System) -> chex.Array:
  """K*, the cost of the optimal policy, of a system that can be stabilised.

  For matrices by doubling, `K_(2k)` from `K_k`, each the cost of k steps
  (Anderson 1978); `[N, N]`, quadratically convergent.
  """
  if _is_scalar(system):
    return fixed_points(system)[0]
  a, b, q, r = system
  eye = jnp.eye(a.shape[0], dtype=a.dtype)

  def double(_, carry):
    a, g, k = carry
    w = linear.inverse(eye + g @ k)
    aw = a @ w
    return aw @ a, g + aw @ g @ a.T, k + a.T @ k @ w @ a

  start = a, b @ linear.inverse(r) @ b.T, q
  return jax.lax.fori_loop(0, _SQUARINGS, double, start)[2]


def fixed_points(system: System) -> tuple[chex.Array, chex.Array]:
  """The roots of a scalar system's F, the upper `[]` and the lower one `[]`.

  The upper one is K* and the lower one negative where `q > 0`. With `q = 0`
  and `|a| > 1` they are `r (a^2 - 1) / b^2`, the best of stable policies, and
  0, the optimal cost, not a stable policy's (section 4.8).

  Raises:
    ValueError: the system is not scalar.
  """
  _check_scalar(system)
  a, b, q, r = system
  half = (r * (a * a - 1) + b * b * q) / 2
  root = jnp.sqrt(half * half + b * b * q * r)
  # The larger in size by a sum without cancellation, the other by the product.
  large = half + jnp.where(half >= 0, root, -root)
  small = jnp.where(
    large == 0, 0, (0 - b * b * q * r) / jnp.where(large, large, 1)
  )
  upper, lower = jnp.maximum(large, small), jnp.minimum(large, small)
  return upper / b**2, lower / b**2


def stability_boundary(system: System, depth: int = 1) -> chex.Array:
  """S_l, `[]`: l-step lookahead of a scalar system is stable for K above it.

  `S_1 = (|a| - 1) r / b^2` and `F(S_(l + 1)) = S_l`; falls to the lower fixed
  point: the region of stability grows with l to all that value iteration
  converges from.

  Args:
    system: scalar.
    depth: l, at least 1.

  Raises:
    ValueError: the system is not scalar, or `depth` below 1.
  """
  _check_scalar(system)
  check_range('depth', depth, low=1)
  a, b, q, r = system
  boundary = (jnp.abs(a) - 1) * r / b**2
  for _ in range(depth - 1):
    more = boundary - q
    boundary = more * r / (a * a * r - more * b * b)
  return boundary


def newton_error(system: System, cost: chex.Array) -> chex.Array:
  """`K_L - K*` of a scalar system at K `[...]`, in closed form: `[...]`.

  L is one-step lookahead at K. The difference is
  `a^2 b^2 r^2 (K - K*)^2 / ((r + b^2 K*) ((r + b^2 K)^2 - a^2 r^2))` where
  stable, else inf: never negative, quadratic near K*, bounded far above it.

  Raises:
    ValueError: the system is not scalar.
  """
  best = fixed_points(system)[0]
  a, b, _, r = system
  spare = (r + b * b * cost) ** 2 - (a * r) ** 2
  error = (a * b * r * (cost - best)) ** 2 / (r + b * b * best)
  stable = (spare > 0) & (r + b * b * cost > 0)
  return jnp.where(stable, error / jnp.where(stable, spare, 1), jnp.inf)


def _is_scalar(system: System) -> bool:
  return jnp.ndim(system.a) == 0


def _check_scalar(system: System) -> None:
  if not _is_scalar(system):
    raise ValueError(f'system.a has shape {jnp.shape(system.a)}: must be []')


def _doubled(
  apply: Callable[[chex.Array, chex.Array], chex.Array],
  matrix: chex.Array,
  start: chex.Array,
) -> chex.Array:
  """The sum of `apply(start, matrix^k)` over all k from 0 up, if it is finite.

  Args:
    apply: linear in its first argument; twice is by the product of powers.
    matrix: `[N, N]`, with a spectral radius below 1.
    start: of any shape that `apply` takes.
  """

  def double(_, carry):
    total, power = carry
    return total + apply(total, power), power @ power

  return jax.lax.fori_loop(0, _SQUARINGS, double, (start, matrix))[0]


def _radius(matrix: chex.Array) -> chex.Array:
  """Spectral radius of `[N, N]`, `[]`: by the size of its powers (Gelfand)."""

  def square(k, carry):
    power, log_size = carry
    power = power @ power
    size = jnp.max(jnp.abs(power))
    power /= jnp.where(size > 0, size, 1)
    return power, log_size + jnp.log(size) * 0.5 ** (k + 1)

  start = matrix, jnp.zeros((), matrix.dtype)
  return jnp.exp(jax.lax.fori_loop(0, _SQUARINGS, square, start)[1])
