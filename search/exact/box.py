"""Convex quadratic programs in a box, by an interior-point method.

Axis: `N` variables. One program: `vmap` it. Meant for some dozens of variables
and float64; exact to rounding however ill-conditioned, where a projected
gradient would need as many steps as the condition number.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from search.exact import linear as equations

# A third of them suffices as a rule.
_MAX_STEPS = 60
# Of the way to the nearest bound.
_STAY_INSIDE = 0.995


class _Point(NamedTuple):
  """Primal `x`, its distance `u = 1 - x` and multipliers of both bounds."""

  x: chex.Array
  u: chex.Array
  low: chex.Array
  high: chex.Array


def solve(quadratic: chex.Array, linear: chex.Array) -> chex.Array:
  """The x in `[0, 1]^N` that minimises `x Q x / 2 + c x`, `[N]`.

  Mehrotra's predictor-corrector (Nocedal and Wright 2006, algorithm 16.4). It
  stops where the complementarity is down to rounding, or where rounding
  leaves no step: `gap` says how good any point is.

  Args:
    quadratic: Q, `[N, N]`, symmetric and positive semi-definite.
    linear: c, `[N]`.
  """
  dtype = linear.dtype
  scale = jnp.maximum(jnp.max(jnp.abs(quadratic)), jnp.max(jnp.abs(linear)))
  scale = jnp.maximum(scale, jnp.finfo(dtype).tiny)
  quadratic, linear = quadratic / scale, linear / scale
  tolerance = 10 * jnp.finfo(dtype).eps

  def residual(p):
    return quadratic @ p.x + linear - p.low + p.high

  def unfinished(carry):
    step, point, is_stuck = carry
    far = jnp.maximum(
      _complementarity(point), jnp.max(jnp.abs(residual(point)))
    )
    return (step < _MAX_STEPS) & (far > tolerance) & ~is_stuck

  def improve(carry):
    step, point, _ = carry
    following = _newton(quadratic, residual(point), point)
    fine = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in following]))
    point = jax.tree.map(
      lambda new, old: jnp.where(fine, new, old), following, point
    )
    return step + 1, point, ~fine

  half, one = jnp.full_like(linear, 0.5), jnp.ones_like(linear)
  start = 0, _Point(half, half, one, one), jnp.asarray(False)
  _, point, _ = jax.lax.while_loop(unfinished, improve, start)
  return jnp.clip(point.x, 0, 1)


def gap(gradient: chex.Array, x: chex.Array, high: chex.Numeric) -> chex.Array:
  """How far a point of `[0, high]^N` is from the minimum at most, `[]`.

  `max_y gradient . (x - y)` over the box: convexity makes it an upper bound
  for any convex objective with this gradient at x (Jaggi 2013, equation 2).

  Args:
    gradient: at x, `[N]`.
    x: within the box, `[N]`.
    high: its upper bound.
  """
  return jnp.sum(jnp.maximum(gradient * x, gradient * (x - high)))


def _complementarity(p: _Point) -> chex.Array:
  return (p.x @ p.low + p.u @ p.high) / (2 * p.x.size)


def _newton(quadratic, residual, p):
  """One predictor-corrector step."""
  matrix = quadratic + jnp.diag(p.low / p.x + p.high / p.u)
  inverted = equations.inverse(matrix)

  def direction(low, high):
    """Solves for x.low -> low and u.high -> high, both products `[N]`."""
    low, high = low / p.x - p.low, high / p.u - p.high
    dx = equations.solve_with(matrix, inverted, low - high - residual)
    ratio = lambda z, x: z * dx / x
    return _Point(dx, -dx, low - ratio(p.low, p.x), high + ratio(p.high, p.u))

  def longest(d):
    """The step to the nearest bound, at most 1."""
    x, dx = jnp.concatenate(p), jnp.concatenate(d)
    shrinks = dx < 0
    return jnp.min(jnp.where(shrinks, -x / jnp.where(shrinks, dx, -1), 1))

  moved = lambda d, length: jax.tree.map(lambda a, b: a + length * b, p, d)
  zero = jnp.zeros_like(p.x)
  guess = direction(zero, zero)
  now = _complementarity(p)
  then = _complementarity(moved(guess, longest(guess)))
  target = now * (then / now) ** 3
  step = direction(target - guess.x * guess.low, target - guess.u * guess.high)
  return moved(step, _STAY_INSIDE * longest(step))
