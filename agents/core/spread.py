"""How far apart the latents of a batch are, and a loss that keeps them apart.

A consistency loss is at its floor, too, where all states have one latent. What
its value does not show, the spread does.

Axes: `N` rows, `F` features.
"""

import chex
import jax
import jax.numpy as jnp

# Features beyond it are mixed, so that a mesh exchanges 16 KiB for a rank.
_DIRECTIONS = 64


def mean_cosine(x: chex.Array, mask: chex.Array) -> chex.Array:
  """The mean cosine of all pairs of different rows.

  Args:
    x: float32 `[N, F]`.
    mask: float32 `[N]`, 0 for rows that do not count.

  Returns:
    A float32 scalar: 1 where all rows point in one direction; 0 where fewer
    than two rows count.
  """
  chex.assert_rank([x, mask], [2, 1])
  n = jnp.sum(mask)
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1))
  unit = x * (mask / jnp.maximum(norm, 1e-8))[:, None]
  total = jnp.sum(unit, axis=0)
  own = jnp.sum(unit * unit)
  return (jnp.sum(total * total) - own) / jnp.maximum(n * (n - 1), 1)


def effective_rank(x: chex.Array, mask: chex.Array) -> chex.Array:
  """In how many directions rows differ: `(sum_i l_i)^2 / sum_i l_i^2`.

  `l` are the eigenvalues of the rows' covariance. The ratio, known as their
  participation ratio, needs no decomposition, which would be the slowest part
  of an update on an accelerator.

  Args:
    x: float32 `[N, F]`. Features beyond 64 are mixed into 64 by fixed signs.
    mask: float32 `[N]`, 0 for rows that do not count.

  Returns:
    A float32 scalar from 1 to `min(N - 1, F, 64)`, or 0 where all rows are
    equal.
  """
  chex.assert_rank([x, mask], [2, 1])
  if x.shape[1] > _DIRECTIONS:
    shape = (x.shape[1], _DIRECTIONS)
    x = x @ jax.random.rademacher(jax.random.key(0), shape, x.dtype)
  x = _centred(x, mask)
  # By the largest entry first: its square may be too small for float32.
  x = x / jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)
  covariance = x.T @ x
  trace = jnp.trace(covariance)
  return trace**2 / jnp.maximum(jnp.sum(covariance * covariance), 1e-30)


def metrics(
  name: str, x: chex.Array, mask: chex.Array
) -> dict[str, chex.Array]:
  """The mean cosine and the effective rank, without gradients.

  Args:
    name: of what is measured.
    x: float32 `[N, F]`.
    mask: float32 `[N]`, 0 for rows that do not count.

  Returns:
    float32 scalars `NAME_cosine` and `NAME_rank`.
  """
  x = jax.lax.stop_gradient(x)
  return {
    f'{name}_cosine': mean_cosine(x, mask),
    f'{name}_rank': effective_rank(x, mask),
  }


def variance_hinge(x: chex.Array, mask: chex.Array) -> chex.Array:
  """`mean_f max(0, 1 - sqrt(Var_n x_nf + 1e-4))`, over the batch.

  Args:
    x: float32 `[N, F]`.
    mask: float32 `[N]`, 0 for rows that do not count.

  Returns:
    A float32 scalar, 0 where every feature has a deviation of at least 1.

  Source: VICReg (Bardes, Ponce and LeCun 2022), equations 1 and 2.
  """
  chex.assert_rank([x, mask], [2, 1])
  squares = jnp.sum(_centred(x, mask) ** 2, axis=0)
  deviation = jnp.sqrt(squares / jnp.maximum(jnp.sum(mask) - 1, 1) + 1e-4)
  return jnp.mean(jax.nn.relu(1 - deviation))


def _centred(x, mask):
  """Rows less their mean, and zeros for those that do not count."""
  mask = mask[:, None]
  mean = jnp.sum(x * mask, axis=0) / jnp.maximum(jnp.sum(mask), 1)
  return (x - mean[None]) * mask
