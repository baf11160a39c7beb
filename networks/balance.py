"""How balanced a mixture of experts is, what to add to a loss, what to prune.

Axes: see `networks.routing`. Arrays may have a further axis where a router has
two levels; losses are float32 scalars, not yet weighted.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Deviations up to this count as no noise: their squares stay representable.
_NO_NOISE = 1e-6


def cv_squared(x: jax.Array, keep: Any = None) -> jax.Array:
  """Squared coefficient of variation: variance over squared mean.

  Why this is what one minimises, and not the variance, an entropy or the
  largest share: with `s = sum(x)` it is `E * sum((x / s)^2) - 1`, so

  - only shares matter. A batch twice as large, or another k, changes neither
    the loss nor what its weight means: one weight (0.1 or 0.01 in the paper)
    serves them all. The variance would grow with the batch squared.
  - it does not push the total: being scale-free, its gradient is orthogonal
    to `x`. What one expert loses the others win, and the layer's task loss
    alone decides how much there is to share.
  - its gradient, `2 E / s^2 * (x - sum(x^2) / s)`, is zero exactly at balance
    and grows steadily with an expert's surplus. That of the largest share
    moves one expert only and jumps; that of an entropy is infinite where an
    expert gets nothing, which is where training starts to go wrong.
  - it has a scale: 0 is balance, E - 1 is one expert with everything, and
    balance is the only minimum, of a convex function of the shares.

  Args:
    x: float `[E]`, importance or load.
    keep: bool `[E]`, experts that were not pruned; None: all. The others do
      not count.

  Returns:
    float scalar. 0 where no expert gets anything.

  Source: Shazeer 2017, equations 7 and 11; population variance and the 1e-10
  as its authors' code has them.

  >>> [cv_squared(jnp.array(x)).item() for x in ([2.0, 2, 2], [6.0, 0, 0])]
  [0.0, 2.0]
  """
  chex.assert_rank(x, 1)
  mean = jnp.mean(x, where=keep)
  return jnp.var(x, where=keep) / (mean**2 + 1e-10)


def importance(expert: jax.Array, gate: jax.Array, experts: int) -> jax.Array:
  """Sums of gates over tokens, differentiable (Shazeer 2017, equation 6).

  Args:
    expert: int32 `[T, K]`; E where a place is empty.
    gate: float `[T, K]`.
    experts: E.

  Returns:
    float `[E]`.
  """
  return jnp.zeros((experts,), gate.dtype).at[expert].add(gate, mode='drop')


def count(expert: jax.Array, experts: int) -> jax.Array:
  """How many tokens each expert gets; `importance` of gates that are 1.

  Args:
    expert: int32 `[T, K]`; E where a place is empty.
    experts: E.

  Returns:
    float32 `[E]`.
  """
  return importance(expert, jnp.ones(expert.shape, jnp.float32), experts)


def chosen(noisy: jax.Array, k: int) -> jax.Array:
  """Which experts are among the k highest.

  Of equals the first are chosen, as by `jax.lax.top_k`; -inf never is.

  Args:
    noisy: float `[..., E]`.
    k: from 1 to E.

  Returns:
    bool `[..., E]`.
  """
  index = jax.lax.top_k(noisy, k)[1]
  is_chosen = jax.nn.one_hot(index, noisy.shape[-1], dtype=bool).any(-2)
  return is_chosen & (noisy > -jnp.inf)


def chance(
  clean: jax.Array, noisy: jax.Array, std: jax.Array | None, k: int
) -> jax.Array:
  """P(x, i): that an expert is chosen, were its own noise drawn again.

  `Phi((clean_i - kth_excluding(noisy, k, i)) / std_i)`, where
  `kth_excluding` is the k-th highest of the others' noisy logits. In the mean
  over noise the sum over experts is k. Differentiable in all three arrays.

  Where there is nothing to draw it is 1 for the chosen and 0 for the others,
  without gradient: `std` None or at most 1e-6, or no more than k experts to
  choose from.

  Args:
    clean: float `[..., E]`, logits.
    noisy: float `[..., E]`, with the noise that was drawn; -inf where an
      expert must not be chosen.
    std: float `[..., E]`, deviation of the noise, or None.
    k: from 1 to E.

  Returns:
    float `[..., E]`, in [0, 1].

  Source: Shazeer 2017, equations 8 and 9.
  """
  chex.assert_equal_shape([clean, noisy])
  is_chosen = chosen(noisy, k)
  if std is None or k == noisy.shape[-1]:
    return is_chosen.astype(clean.dtype)
  chex.assert_equal_shape([clean, std])
  top = jax.lax.top_k(noisy, k + 1)[0]
  # Without one of the k highest, the k-th of the rest is the next one.
  threshold = jnp.where(is_chosen, top[..., k:], top[..., k - 1 : k])
  is_open = jnp.isfinite(noisy) & jnp.isfinite(threshold) & (std > _NO_NOISE)
  # Both sides of a `where` are differentiated: neither may be infinite.
  distance = jnp.where(is_open, clean - threshold, 0)
  spread = jnp.where(is_open, std, 1)
  smooth = jax.scipy.special.ndtr(distance / spread)
  return jnp.where(is_open, smooth, is_chosen.astype(clean.dtype))


def smooth_load(
  clean: jax.Array, noisy: jax.Array, std: jax.Array | None, k: int
) -> jax.Array:
  """Expected tokens of each expert (Shazeer 2017, equation 10).

  Counts where there is no noise. See `chance`.

  Args:
    clean, noisy, std: float `[T, E]`.
    k: from 1 to E.

  Returns:
    float `[E]`.
  """
  return chance(clean, noisy, std, k).sum(0)


def z_loss(logits: jax.Array) -> jax.Array:
  """Mean of `logsumexp(logits)^2`: keeps logits where float32 is exact.

  Args:
    logits: float `[..., E]`; -inf does not count, a row of them counts as 0.

  Returns:
    float scalar.

  Source: Zoph 2022, arXiv 2202.08906, equation 5.
  """
  is_empty = jnp.isneginf(logits).all(-1)
  # The gradient of a logarithm of zero would be NaN, selected or not.
  logits = jnp.where(is_empty[..., None], 0, logits)
  total = jnp.where(is_empty, 0, jax.nn.logsumexp(logits, axis=-1))
  return jnp.mean(total**2)


def update_bias(
  bias: jax.Array, count: jax.Array, rate: float, keep: Any = None
) -> jax.Array:
  """One step of `routing.biased_top_k`'s bias: up where tokens are too few.

  `bias + rate * sign(mean(count) - count)`, outside of any optimiser.

  Args:
    bias: float32 `[E]`.
    count: float32 `[E]`, `routing.Routing.count` of the last batch, over all
      devices.
    rate: step, 1e-3 in the paper.
    keep: bool `[E]`, experts that were not pruned; the others have no part in
      the mean.

  Returns:
    float32 `[E]`.

  Source: Wang 2024, arXiv 2408.15664, algorithm 1.
  """
  chex.assert_rank([bias, count], 1)
  chex.assert_equal_shape([bias, count])
  return bias + rate * jnp.sign(jnp.mean(count, where=keep) - count)


def prune(load: Any, floor: float, k: int = 1) -> np.ndarray:
  """Which experts to keep: those whose load does not stay under a floor.

  A decision on the host, between updates: it needs numbers, no tracers. What
  it returns is `keep` of a router, and once it is final, of `compact`. Load is
  to be a running mean, since a batch may leave out a good expert by chance;
  pruned experts get nothing, and so stay pruned.

  Args:
    load: `[E]`, running mean of `Routing.count` or `load`, in any unit.
    floor: as a share of the mean load: 0.1 prunes an expert with less than a
      tenth of its even share.
    k: experts of a token.

  Returns:
    bool `[E]`.

  Raises:
    ValueError: fewer than k experts would be kept.
  """
  load = np.asarray(load)
  chex.assert_rank(load, 1)
  keep = load >= floor * load.mean()
  if keep.sum() < k:
    raise ValueError(
      f'floor={floor}: would keep {keep.sum()} of {load.size} experts, must '
      f'keep k={k} at least'
    )
  return keep


def compact(params: Any, keep: Any, axis: int = 0) -> Any:
  """Parameters of a smaller layer, without the pruned experts.

  For experts with `axis=0`, for a flat gate's columns (and the selection bias)
  with `axis=-1`; for an optimiser's moments as for their parameters. The
  smaller layer's output is that of the larger one with `keep`.

  Args:
    params: leaves of size E along `axis`.
    keep: bool `[E]`, no tracer.
    axis: that of the experts.

  Returns:
    The same tree, leaves of size `sum(keep)` along `axis`.

  Raises:
    ValueError: a leaf is of another size.
  """
  (kept,) = np.nonzero(np.asarray(keep))
  experts = np.size(keep)

  def take(path, leaf):
    if leaf.shape[axis] != experts:
      raise ValueError(
        f'params{jax.tree_util.keystr(path)}: {leaf.shape[axis]} entries along '
        f'axis {axis}, must be {experts}, as keep has'
      )
    return jnp.take(leaf, kept, axis=axis)

  return jax.tree_util.tree_map_with_path(take, params)
