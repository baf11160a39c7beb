"""Numerics of `networks.actions`: categoricals in float32, indices, hashes.

Axes: `B` batch, `K` sampled actions, `F` independent categoricals, `n` the
largest of them; `sizes` are theirs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# The logit of what has no probability.
MASKED = np.finfo(np.float32).min
MAX_INT = np.iinfo(np.int32).max
# Up to so many bins all are compared with.
_COMPARE_ALL = 64


def is_masked(logits):
  """Which logits `[...]` stand for no probability, bool `[...]`."""
  return logits <= MASKED / 2


def safe_log(probs):
  """Logarithms of probabilities `[...]`, finite at 0, `[...]`."""
  return jnp.log(jnp.maximum(probs, np.finfo(np.float32).tiny))


def inverse_softplus(x):
  """The y with `softplus(y) = x`, for positive x `[...]`: `[...]`."""
  return x + jnp.log(-jnp.expm1(-x))


def log1mexp(x):
  """`log(1 - exp(-x))` for positive x `[...]`, small or large: `[...]`."""
  small = x < math.log(2)
  near = jnp.log(-jnp.expm1(-jnp.where(small, x, 1.0)))
  far = jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, x)))
  return jnp.where(small, near, far)


def log_slope(x):
  """`log(1 - tanh(x)^2)` of x `[...]`, without cancellation: `[...]`."""
  return 2 * (math.log(2) - x - jax.nn.softplus(-2 * x))


def split_logits(sizes, parameters):
  """`[..., P]` to `[..., F, n]`, shorter factors padded by masked logits."""
  leading, longest = parameters.shape[:-1], max(sizes)
  if len(set(sizes)) == 1:
    return parameters.reshape(*leading, len(sizes), longest)
  column, size = np.arange(longest)[None], np.asarray(sizes)[:, None]
  start = np.cumsum((0, *sizes[:-1]))[:, None]
  logits = parameters[..., start + np.minimum(column, size - 1)]
  return jnp.where(
    jnp.broadcast_to(column < size, logits.shape), logits, MASKED
  )


def pick(table, digits):
  """Entries of a table `[B, F, n]` at digits int32 `[B, K, F]`: `[B, K, F]`."""
  index = digits.swapaxes(1, 2)
  return jnp.take_along_axis(table, index, -1).swapaxes(1, 2)


def invert_cdf(probs, uniforms):
  """Samples by inverting the CDF.

  Returns the bin of `probs [B, F, n]` that each of `uniforms [B, K, F]` falls
  into, int32 `[B, K, F]`.
  """
  bins, uniforms = probs.shape[-1], uniforms.swapaxes(1, 2)
  if bins <= _COMPARE_ALL:
    total = running_sum(probs)
    target = uniforms * total[..., -1:]
    return first_above(probs, total, target).swapaxes(1, 2)
  # Many bins: first which block of about sqrt(n) of them, then which in it.
  width = math.isqrt(bins - 1) + 1
  pad = -bins % width
  blocks = jnp.pad(probs, ((0, 0), (0, 0), (0, pad)))
  blocks = blocks.reshape(*probs.shape[:2], -1, width)
  mass = blocks.sum(-1)
  total = running_sum(mass)
  target = uniforms * total[..., -1:]
  block = first_above(mass, total, target)
  rest = target - jnp.take_along_axis(total - mass, block, -1)
  row = jnp.take_along_axis(blocks, block[..., None], 2)
  place = first_above(row, running_sum(row), rest[..., None])[..., 0]
  return (block * width + place).swapaxes(1, 2)


def running_sum(x):
  """Cumulative sum over a short last axis `[..., n]`, `[..., n]`.

  As a product, for XLA's is slow.
  """
  ones = np.tri(x.shape[-1], dtype=np.float32).T
  return jnp.dot(x, ones, precision='highest')


def first_above(probs, total, target):
  """First of `n` with probability whose total exceeds each target, int32.

  A sum may rise or fall by a rounding error where a probability is zero;
  neither makes that one possible.

  Args:
    probs: `[..., n]`.
    total: `[..., n]`, its running sum.
    target: `[..., K]`.

  Returns:
    int32 `[..., K]`.
  """
  index = np.arange(probs.shape[-1], dtype=np.int32)[:, None]
  index = jnp.broadcast_to(index, (*probs.shape, 1))
  is_possible = probs[..., None] > 0
  is_above = is_possible & (total[..., None] > target[..., None, :])
  first = jnp.min(jnp.where(is_above, index, MAX_INT), -2)
  return jnp.minimum(first, jnp.max(jnp.where(is_possible, index, 0), -2))


def dirichlet(keys, logits, alpha):
  """Dirichlet(alpha) weights for logits `[B, F, n]`, `[B, F, n]`.

  `keys` is `[B]`, one a row. Masked logits get none.
  """
  draw = lambda key: jax.random.loggamma(key, alpha, logits.shape[1:])
  log_gamma = jax.vmap(draw)(keys)
  return jax.nn.softmax(jnp.where(is_masked(logits), MASKED, log_gamma))


def ravel(sizes, digits):
  """Digits int32 `[..., F]` to joint indices int32 `[...]` in C order."""
  strides = np.cumprod((1, *sizes[:0:-1]), dtype=np.int64)[::-1]
  strides = jnp.broadcast_to(strides.astype(np.int32), digits.shape)
  return (digits * strides).sum(-1, dtype=jnp.int32)


def unravel(sizes, actions):
  """Joint indices int32 `[...]` in C order to digits int32 `[..., F]`."""
  digits = jnp.unravel_index(actions.astype(jnp.int32), sizes)
  return jnp.stack(digits, -1)


def one_hots(sizes, actions):
  """Joint indices int32 `[...]` to one-hot vectors, side by side, `[..., P]`.

  One vector a factor.
  """
  digits = unravel(sizes, actions)
  hot = [jax.nn.one_hot(digits[..., i], n) for i, n in enumerate(sizes)]
  return jnp.concatenate(hot, -1)


def hash_bits(x):
  """Hashes numbers `[..., D]` to int32 `[...]`; 0 and -0 are equal."""
  if x.dtype != jnp.int32:
    x = jnp.where(x == 0, 0, x).astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # Each number is mixed with its own place, so that places do not commute.
  place = mix(jnp.arange(1, x.shape[-1] + 1, dtype=jnp.uint32))
  mixed = mix(bits ^ jnp.broadcast_to(place, bits.shape))
  mixed = mix(mixed.sum(-1, dtype=jnp.uint32))
  return jax.lax.bitcast_convert_type(mixed, jnp.int32)


def mix(x):
  """The finaliser of MurmurHash3, of uint32 `[...]`: uint32 `[...]`.

  A bijection that spreads bits.
  """
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
