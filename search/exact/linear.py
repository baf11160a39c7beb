"""Small linear systems, many at once, in plain array operations.

`vmap` over `jnp.linalg.solve` calls LAPACK on the threads of XLA's CPU pool,
which then wait for that pool to share out the batch: with jaxlib 0.10 two such
calls at once can wait for ever. Nothing is called here, and nothing is pivoted
either, which is stable for the matrices that planning has: positive definite
or diagonally dominant by rows or columns, as `I - g P` is (Higham 2002,
theorems 9.9 and 10.3).

Axis: `N` unknowns, some dozens.
"""

import chex
import jax
import jax.numpy as jnp


def inverse(matrix: chex.Array) -> chex.Array:
  """Inverts a matrix `[N, N]` of the kinds above, by Gauss-Jordan: `[N, N]`."""

  def eliminate(k, a):
    pivot, row, column = a[k, k], a[k] / a[k, k], a[:, k]
    a = a - column[:, None] * row[None]
    a = a.at[:, k].set(-column / pivot).at[k].set(row)
    return a.at[k, k].set(1 / pivot)

  return jax.lax.fori_loop(0, matrix.shape[0], eliminate, matrix)


def solve(matrix: chex.Array, right: chex.Array) -> chex.Array:
  """The x with `matrix @ x = right`, `[N]`, refined once.

  Args:
    matrix: `[N, N]`, of the kinds above.
    right: `[N]`.
  """
  return solve_with(matrix, inverse(matrix), right)


def solve_with(
  matrix: chex.Array, inverted: chex.Array, right: chex.Array
) -> chex.Array:
  """As `solve`, of a matrix whose `inverse` is at hand, `[N]`.

  Args:
    matrix: `[N, N]`.
    inverted: `[N, N]`.
    right: `[N]`.
  """
  x = jnp.asarray(inverted @ right)
  return x + inverted @ (right - matrix @ x)
