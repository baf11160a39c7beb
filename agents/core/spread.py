"""How far apart the latents of a batch are, and a loss that keeps them apart.

A consistency loss is at its floor, too, where all states have one latent. What
its value does not show, the spread does.

Axes: `N` rows, `F` features.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

# Features beyond it are mixed, so that a mesh exchanges 16 KiB for a rank.
_DIRECTIONS = 64


def mean_cosine(x: chex.Array) -> chex.Array:
  """The mean cosine of all pairs of different rows.

  Args:
    x: float32 `[N, F]`.

  Returns:
    A float32 scalar: 1 where all rows point in one direction; 0 for one row.
  """
  chex.assert_rank(x, 2)
  n = x.shape[0]
  if n < 2:
    return jnp.zeros(())
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  total = jnp.sum(x / jnp.maximum(norm, 1e-8), axis=0)
  return (jnp.sum(total * total) - n) / (n * (n - 1))


def effective_rank(x: chex.Array) -> chex.Array:
  """In how many directions rows differ: `(sum_i l_i)^2 / sum_i l_i^2`.

  `l` are the eigenvalues of the rows' covariance. The ratio, known as their
  participation ratio, needs no decomposition, which would be the slowest part
  of an update on an accelerator.

  Args:
    x: float32 `[N, F]`. Features beyond 64 are mixed into 64 by fixed signs.

  Returns:
    A float32 scalar from 1 to `min(N - 1, F, 64)`, or 0 where all rows are
    equal.
  """
  chex.assert_rank(x, 2)
  if x.shape[1] > _DIRECTIONS:
    shape = (x.shape[1], _DIRECTIONS)
    x = x @ jax.random.rademacher(jax.random.key(0), shape, x.dtype)
  x = x - jnp.mean(x, axis=0, keepdims=True)
  # By the largest entry first: its square may be too small for float32.
  x = x / jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)
  covariance = x.T @ x
  trace = jnp.trace(covariance)
  return trace**2 / jnp.maximum(jnp.sum(covariance * covariance), 1e-30)


def metrics(name: str, x: chex.Array) -> dict[str, chex.Array]:
  """`NAME_cosine` and `NAME_rank` of rows `[N, ...]`, without gradients."""
  x = jax.lax.stop_gradient(x)
  x = x.reshape(x.shape[0], -1).astype(jnp.float32)
  return {f'{name}_cosine': mean_cosine(x), f'{name}_rank': effective_rank(x)}


def variance_hinge(x: chex.Array, least: Any = 1.0) -> chex.Array:
  """`mean_f max(0, least - sqrt(Var_n x_nf + 1e-4))`, over the batch.

  Args:
    x: float32 `[N, F]`.
    least: standard deviation that is asked of each feature.

  Returns:
    A float32 scalar, 0 where every feature spreads enough.

  Source: VICReg (Bardes, Ponce and LeCun 2022), equations 1 and 2.
  """
  chex.assert_rank(x, 2)
  unbiased = int(x.shape[0] > 1)
  deviation = jnp.sqrt(jnp.var(x, axis=0, ddof=unbiased) + 1e-4)
  return jnp.mean(jax.nn.relu(least - deviation))
