"""Output heads, and scalars as categorical distributions.

A scalar x is represented by probabilities over `n` (odd) bins at the integers
of `[-(n - 1) / 2, (n - 1) / 2]`, after the signed hyperbolic transform h
(Pohlen et al. 2018; Schrittwieser et al. 2020, App. F).
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import mlp

_EPSILON = 1e-3


def signed_hyperbolic(x: jax.Array) -> jax.Array:
  """`h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x`, `[...]` to `[...]`."""
  root = jnp.sqrt(jnp.abs(x) + 1)
  # sqrt(|x| + 1) - 1, without its cancellation near zero.
  return x / (root + 1) + _EPSILON * x


def signed_parabolic(y: jax.Array) -> jax.Array:
  """The inverse of `signed_hyperbolic`, `[...]` to `[...]`.

  With `s = sqrt(|x| + 1)`, `y = h(x)` means `0.001 s^2 + s = |y| + 1.001`. This
  solves for `s - 1`, so that nothing cancels: exactly 0 at 0, unlike the usual
  form, whose error of 1e-4 at small y in float32 needs a threshold.
  """
  magnitude = jnp.abs(y)
  slope = 1 + 2 * _EPSILON
  root = jnp.sqrt(slope**2 + 4 * _EPSILON * magnitude)
  excess = 2 * magnitude / (slope + root)
  return jnp.sign(y) * excess * (excess + 2)


def support_end(num_bins: int) -> float:
  """The largest magnitude, in raw units, that `num_bins` represent.

  >>> round(support_end(21), 1)
  117.4
  """
  return float(signed_parabolic(jnp.float32((num_bins - 1) // 2)))


def bins_for(magnitude: float) -> int:
  """The fewest bins, odd, whose support holds a magnitude in raw units.

  >>> bins_for(117.0), bins_for(900.0)
  (21, 61)
  """
  # h of a Python float.
  position = magnitude / (math.sqrt(magnitude + 1) + 1) + _EPSILON * magnitude
  return 2 * max(math.ceil(position - 1e-4), 1) + 1


def beyond(scalar: jax.Array, num_bins: int) -> jax.Array:
  """Whether `to_two_hot` clips a scalar by more than rounding.

  Args:
    scalar: float32 `[...]`, in raw units.
    num_bins: odd.

  Returns:
    bool `[...]`.
  """
  limit = (num_bins - 1) // 2
  return jnp.abs(signed_hyperbolic(scalar)) > limit * (1 + 1e-5)


def to_two_hot(scalar: jax.Array, num_bins: int) -> jax.Array:
  """Probabilities whose mean is `h(scalar)`, on the two nearest bins.

  Args:
    scalar: float32 `[...]`, in raw units; beyond the support it is clipped.
    num_bins: odd.

  Returns:
    float32 `[..., num_bins]`, sums to one.

  >>> probs = to_two_hot(jnp.array([0.0, 3.0]), num_bins=5)
  >>> [[round(p, 3) for p in row] for row in probs.tolist()]
  [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.997, 0.003]]
  >>> [round(x, 3) for x in from_logits(jnp.log(probs)).tolist()]
  [0.0, 3.0]
  """
  limit = (num_bins - 1) // 2
  bins = jnp.arange(-limit, limit + 1, dtype=jnp.float32)
  bins = bins.reshape((1,) * jnp.ndim(scalar) + (-1,))
  position = jnp.clip(signed_hyperbolic(scalar), -limit, limit)[..., None]
  return jnp.maximum(1 - jnp.abs(position - bins), 0)


def from_logits(logits: jax.Array) -> jax.Array:
  """The scalar that a categorical head predicts: `h^-1` of the mean bin.

  Args:
    logits: float32 `[..., num_bins]`, odd.

  Returns:
    float32 `[...]`, in raw units.
  """
  limit = (logits.shape[-1] - 1) // 2
  bins = jnp.arange(1, limit + 1, dtype=jnp.float32)
  bins = bins.reshape((1,) * (logits.ndim - 1) + (-1,))
  probs = jax.nn.softmax(logits)
  # Bins are paired, so that uniform logits give exactly zero; a sum and not a
  # matmul, which accelerators round.
  difference = probs[..., limit + 1 :] - probs[..., :limit][..., ::-1]
  return signed_parabolic((difference * bins).sum(-1))


class Squeeze(nn.Module):
  """A latent to features `[B, F]`: linear, normalised, rectified, flattened.

  For an image the linear map is a 1x1 convolution to `channels` (few, so that
  what follows it stays small); for a vector it keeps the width.
  """

  channels: int
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    size = self.channels if x.ndim == 4 else x.shape[-1]
    x = mlp.Linear(size, use_bias=False, dtype=self.dtype)(x)
    x = jax.nn.relu(self.norm()(x, train))
    return x.reshape(x.shape[0], -1)


class Head(nn.Module):
  """Logits `[B, outputs]`, float32, zero at first, of a latent.

  An image latent is squeezed before its hidden layers, a vector is not.
  """

  outputs: int
  channels: int = 16
  hidden: Sequence[int] = (32,)
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    style = {'norm': self.norm, 'dtype': self.dtype}
    if x.ndim == 4:
      x = Squeeze(self.channels, **style)(x, train)
    sizes = (*self.hidden, self.outputs)
    x = mlp.MLP(sizes, zero_init=True, **style)(x, train)
    return x.astype(jnp.float32)
