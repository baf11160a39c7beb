"""Routing: which expert works on which token, as functions of arrays.

A router reads logits and says which expert works on which token, with what
weight (its plan), how balanced that is, and what a learner should add to its
loss. Noise is an argument: without it a router is deterministic. Nothing here
knows a network's parameters; `networks.moe` has those.

Axes, here and in `networks.dispatch` and `networks.moe`: `T` tokens, `E`
experts, `K` experts of a token, `C` tokens of an expert, `S` slots of an
expert, `G` groups of experts, `D` features.

Which routers treat each token on its own, so that a batch of one equals a row
of a batch (acting and planning need that): `noisy_top_k`, `hierarchical`,
`thresholded`, `biased_top_k`. In `expert_choice` and `balanced` the experts
choose among the tokens of a batch; `soft` mixes them.

A logit of a pruned expert counts as -inf: `keep`, of the routers in which an
expert can starve, is a bool `[E]`. Tokens that did not choose a pruned expert
keep their plan, bit by bit within one compiled function.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from networks import balance

# Logits `[T, E]` (or `[T, G, E/G]`), the deviation of their noise and the
# noise itself, of the same shape or None.
Scores = tuple[jax.Array, jax.Array | None, jax.Array | None]


class ByToken(NamedTuple):
  """Each token's experts.

  Attributes:
    expert: int32 `[T, K]`; E where the place is empty.
    gate: float32 `[T, K]`, weights in the sum; 0 where it is empty.
  """

  expert: jax.Array
  gate: jax.Array


class ByExpert(NamedTuple):
  """Each expert's tokens.

  Attributes:
    token: int32 `[E, C]`.
    gate: float32 `[E, C]`, weights in the tokens' sums; 0 where a place is
      empty.
  """

  token: jax.Array
  gate: jax.Array


class Mixture(NamedTuple):
  """Each expert's slots, which are means of tokens.

  Attributes:
    dispatch: float32 `[T, E, S]`, sums to 1 over tokens.
    combine: float32 `[T, E, S]`, sums to 1 over experts and slots.
  """

  dispatch: jax.Array
  combine: jax.Array


Plan = ByToken | ByExpert | Mixture


class Routing(NamedTuple):
  """A router's decision, and statistics of it.

  Attributes:
    plan: which expert works on which token.
    importance: float32 `[E]`, sums of gates over tokens, differentiable
      (Shazeer 2017, equation 6).
    load: float32 `[E]`, tokens that each expert gets; where there is noise its
      smooth estimate, differentiable (equation 10).
    count: float32 `[E]`, tokens that each expert really gets; no gradient.
    losses: float32 scalars by name, not yet weighted: `importance`, `load`,
      `z`, and `threshold` where there is one; 0 where a router has no use for
      one. All routers of one configuration have the same names.
  """

  plan: Plan
  importance: jax.Array
  load: jax.Array
  count: jax.Array
  losses: dict[str, jax.Array]


def noisy_top_k(
  clean: jax.Array,
  std: jax.Array | None,
  noise: jax.Array | None,
  k: int,
  keep: Any = None,
) -> Routing:
  """The k highest logits after noise, softmax over only these.

  Args:
    clean: float32 `[T, E]`, logits, `x W_g`.
    std: float32 `[T, E]`, deviation of the noise, `softplus(x W_noise)` and a
      little more; or None.
    noise: float32 `[T, E]`, standard normal, or None: deterministic.
    k: from 1 to E.
    keep: bool `[E]`, experts that were not pruned.

  Returns:
    A plan `ByToken` with K = k, the highest first. Load is smooth where there
    is noise and k < E. The z-loss is that of `clean`.

  Raises:
    ValueError: k, a shape, or too few experts to keep.

  Source: Shazeer 2017, equations 3 to 11.

  >>> found = noisy_top_k(jnp.array([[0.0, 2, 2, -1]]), None, None, k=2)
  >>> found.plan.expert.tolist(), found.plan.gate.tolist()
  ([[1, 2]], [[0.5, 0.5]])
  >>> found.count.tolist()
  [0.0, 1.0, 1.0, 0.0]
  """
  chex.assert_rank(clean, 2)
  experts = clean.shape[1]
  _check_k('k', k, experts)
  keep = _check_keep(keep, experts, k)
  clean, std, noisy = _noisy((clean, std, noise), keep)
  index, gate, is_empty = _top_k(noisy, k)
  expert = jnp.where(is_empty, experts, index)
  load = balance.smooth_load(clean, noisy, std, k)
  z = balance.z_loss(clean)
  return _by_token(expert, gate, experts, {'z': z}, load, keep)


def hierarchical(
  primary: Scores,
  secondary: Scores,
  k_primary: int,
  k_secondary: int,
  keep: Any = None,
) -> Routing:
  """Top groups, then top experts in each of them; gates multiply.

  Equation 14 divides by the tokens of a group. In a group that has none, its
  experts count as used evenly: the group's own load, and with it the gradient
  that brings it tokens again, is not lost.

  Args:
    primary: logits, deviation and noise of groups, `[T, G]`; see
      `noisy_top_k`.
    secondary: the same of the experts in each group, `[T, G, E/G]`. Expert j
      of group g is expert `g * E/G + j`.
    k_primary: groups of a token.
    k_secondary: experts of a token in each of them.
    keep: bool `[E]`, experts that were not pruned. Groups without any are
      pruned.

  Returns:
    A plan `ByToken` with K = k_primary * k_secondary, experts of one group
    side by side. The z-loss is the sum of both levels', of the second in the
    chosen groups only.

  Raises:
    ValueError: a k, a shape, or too few experts to keep in a group.

  Source: Shazeer 2017, Appendix B, equations 12 to 14.
  """
  chex.assert_rank([primary[0], secondary[0]], [2, 3])
  tokens, groups = primary[0].shape
  size = secondary[0].shape[2]
  experts = groups * size
  if secondary[0].shape[:2] != (tokens, groups):
    raise ValueError(
      f'secondary: {secondary[0].shape}, must be tokens, groups, experts of a '
      f'group: {tokens}, {groups}, any'
    )
  _check_k('k_primary', k_primary, groups)
  _check_k('k_secondary', k_secondary, size)
  kept, kept_groups = _check_groups(keep, groups, size, k_primary, k_secondary)
  clean, std, noisy = _noisy(primary, kept_groups)
  index, gate, no_group = _top_k(noisy, k_primary)
  # Only the chosen groups count from here on: [T, k_primary, E/G].
  inner_clean, inner_std, inner_noisy = jax.tree.map(
    lambda x: jnp.take_along_axis(x, index[..., None], 1),
    _noisy(secondary, kept),
  )
  member, inner_gate, no_member = _top_k(inner_noisy, k_secondary)
  is_empty = no_group[..., None] | no_member
  expert = jnp.where(is_empty, experts, index[..., None] * size + member)
  gate = jnp.where(is_empty, 0, gate[..., None] * inner_gate)

  group = jnp.where(no_group, groups, index)
  number = balance.count(group, groups)[:, None].astype(clean.dtype)
  inside = balance.chance(inner_clean, inner_noisy, inner_std, k_secondary)
  total = jnp.zeros((groups, size), clean.dtype)
  total = total.at[group].add(inside, mode='drop')
  used = jnp.ones_like(total) if kept is None else kept.astype(clean.dtype)
  even = used * (k_secondary / jnp.maximum(used.sum(1), k_secondary))[:, None]
  share = jnp.where(number > 0, total / jnp.maximum(number, 1), even)
  load = balance.smooth_load(clean, noisy, std, k_primary)[:, None] * share
  return _by_token(
    expert.reshape(tokens, -1),
    gate.reshape(tokens, -1),
    experts,
    {'z': balance.z_loss(clean) + balance.z_loss(inner_clean)},
    load.reshape(-1),
    None if keep is None else jnp.asarray(keep),
  )


def balanced(logits: jax.Array, thresholds: jax.Array, k: int) -> Routing:
  """Strictly balanced gating, for training: each expert takes its top m.

  With X = softmax(logits) and m = k * T / E, rounded up, an expert chooses the
  m tokens with the highest X in its column (18), and a token's gates are its X
  among the experts that chose it, normalised (16). Logits learn through them.

  The loss `threshold` is `sum((over - chosen) * (X - thresholds)) / T`, where
  `over` says that X is above the threshold (19) and `chosen` that the expert
  chose it. No term is negative, and all are 0 where thresholds choose what
  experts choose. Equation 20 has no `/ T`, so that its weight would mean more
  in a larger batch. X and both masks are constants in it: it is there to
  learn the thresholds, and these alone have its gradient, `(m - tokens over
  the threshold) / T`, which is zero at the right quantile of X.

  Args:
    logits: float32 `[T, E]`.
    thresholds: float32 `[E]`, of probabilities; learned.
    k: experts of a token on average.

  Returns:
    A plan `ByExpert` with C = m. A token may get no expert. Depends on the
    batch: act with `thresholded`.

  Raises:
    ValueError: k or a shape.

  Source: Shazeer 2017, Appendix F, equations 15 to 20.
  """
  chex.assert_rank([logits, thresholds], [2, 1])
  tokens, experts = logits.shape
  _check_k('k', k, experts)
  _check_size('thresholds', thresholds, experts)
  probs = jax.nn.softmax(logits)
  chosen, token = jax.lax.top_k(probs.T, -(-k * tokens // experts))
  total = jnp.zeros((tokens,), probs.dtype).at[token].add(chosen)
  gate = chosen / _positive(total)[token]
  mask = jnp.zeros_like(probs)
  mask = mask.at[token, np.arange(experts)[:, None]].set(1)
  fixed = jax.lax.stop_gradient(probs)
  over = fixed > thresholds[None]
  threshold = jnp.sum((over - mask) * (fixed - thresholds[None])) / tokens
  z = balance.z_loss(logits)
  return _by_expert(token, gate, {'z': z, 'threshold': threshold})


def thresholded(
  logits: jax.Array, thresholds: jax.Array, limit: int | None = None
) -> Routing:
  """Strictly balanced gating, for acting: experts over their thresholds.

  Args:
    logits: float32 `[T, E]`.
    thresholds: float32 `[E]`, as learned by `balanced`. No gradient.
    limit: experts of a token at most, the most probable ones; None: E.

  Returns:
    A plan `ByToken` with K = limit. Gates are normalised over what is chosen;
    a token over no threshold gets nothing. The loss `threshold` is 0.

  Raises:
    ValueError: limit or a shape.

  Source: Shazeer 2017, Appendix F, equations 16 and 19.
  """
  chex.assert_rank([logits, thresholds], [2, 1])
  experts = logits.shape[1]
  limit = experts if limit is None else limit
  _check_k('limit', limit, experts)
  _check_size('thresholds', thresholds, experts)
  probs = jax.nn.softmax(logits)
  over = jnp.where(probs > thresholds[None], probs, -1)
  chosen, expert = jax.lax.top_k(over, limit)
  is_empty = chosen < 0
  chosen = jnp.where(is_empty, 0, chosen)
  gate = chosen / _positive(chosen.sum(1, keepdims=True))
  expert = jnp.where(is_empty, experts, expert)
  losses = {'z': balance.z_loss(logits), 'threshold': jnp.zeros(())}
  return _by_token(expert, gate, experts, losses)


def expert_choice(logits: jax.Array, capacity_factor: float) -> Routing:
  """Each expert takes the tokens that want it most; nothing to balance.

  Args:
    logits: float32 `[T, E]`.
    capacity_factor: experts of a token on average, c. It sets a shape: no
      tracer.

  Returns:
    A plan `ByExpert` with C = c * T / E, rounded up; gates are softmax over
    experts as they are. A token may get no expert or all. Depends on the
    batch.

  Raises:
    ValueError: capacity_factor is a tracer or not within (0, E].

  Source: Zhou 2022, arXiv 2202.09368, section 3.2.
  """
  chex.assert_rank(logits, 2)
  tokens, experts = logits.shape
  if not isinstance(capacity_factor, int | float):
    raise ValueError(
      f'capacity_factor={capacity_factor}: sets a shape, must be a number'
    )
  if not 0 < capacity_factor <= experts:
    raise ValueError(
      f'capacity_factor={capacity_factor}: must be above 0 and at most the '
      f'number of experts, {experts}'
    )
  # Less a hair, or a rounding error would add a place: 1.1 * 100 / 10 > 11.
  capacity = math.ceil(capacity_factor * tokens / experts - 1e-6)
  gate, token = jax.lax.top_k(jax.nn.softmax(logits).T, capacity)
  return _by_expert(token, gate, {'z': balance.z_loss(logits)})


def soft(logits: jax.Array) -> Routing:
  """Soft mixture: slots are means of all tokens, tokens sums of all slots.

  Args:
    logits: float32 `[T, E, S]`, of normalised tokens and slots, if it is to be
      the paper's.

  Returns:
    A plan `Mixture`. Load is the S rows of every expert. Depends on all the
    tokens given: one state's, if states are not to mix.

  Source: Puigcerver 2024, arXiv 2308.00951, equations 1 to 3.
  """
  chex.assert_rank(logits, 3)
  tokens, experts, slots = logits.shape
  combine = jax.nn.softmax(logits, axis=(1, 2))
  rows = jnp.full((experts,), slots, jnp.float32)
  return Routing(
    Mixture(jax.nn.softmax(logits, axis=0), combine),
    combine.sum((0, 2)),
    rows,
    rows,
    _losses(z=balance.z_loss(logits.reshape(tokens, -1))),
  )


def biased_top_k(
  logits: jax.Array, bias: jax.Array, k: int, keep: Any = None
) -> Routing:
  """Top k by score plus bias, weighted by scores without it.

  A score is the sigmoid of a logit. `balance.update_bias` balances the
  experts, no loss does: the bias gets no gradient.

  Args:
    logits: float32 `[T, E]`.
    bias: float32 `[E]`.
    k: from 1 to E.
    keep: bool `[E]`, experts that were not pruned.

  Returns:
    A plan `ByToken` with K = k; gates sum to 1.

  Raises:
    ValueError: k, a shape, or too few experts to keep.

  Source: Wang 2024, arXiv 2408.15664; sigmoid and normalisation as DeepSeek-V3
  has them, arXiv 2412.19437, equations 13 to 16.
  """
  chex.assert_rank([logits, bias], [2, 1])
  experts = logits.shape[1]
  _check_k('k', k, experts)
  _check_size('bias', bias, experts)
  keep = _check_keep(keep, experts, k)
  score = jax.nn.sigmoid(logits)
  ranked, index = jax.lax.top_k(_mask(score + bias[None], keep), k)
  is_empty = jnp.isneginf(ranked)
  gate = jnp.take_along_axis(score, index, 1)
  gate = jnp.where(is_empty, 0, gate)
  gate = gate / _positive(gate.sum(1, keepdims=True))
  expert = jnp.where(is_empty, experts, index)
  z = balance.z_loss(_mask(logits, keep))
  return _by_token(expert, gate, experts, {'z': z})


def _noisy(scores, keep):
  """Logits (pruned ones -inf), deviations or None, logits with noise."""
  clean, std, noise = scores
  if noise is not None and std is None:
    raise ValueError('std: None, but there is noise; give its deviation')
  for name, x in (('std', std), ('noise', noise)):
    if x is not None and x.shape != clean.shape:
      raise ValueError(f'{name}: {x.shape}, must be as logits: {clean.shape}')
  clean = _mask(clean, keep)
  if std is None or noise is None:
    return clean, None, clean
  return clean, std, clean + std * noise


def _mask(x, keep):
  """`x [T, ...]`, -inf where `keep [...]` says so."""
  return x if keep is None else jnp.where(keep[None], x, -jnp.inf)


def _top_k(noisy, k):
  """Indices of the k highest, their softmax, and which are -inf: empty."""
  values, index = jax.lax.top_k(noisy, k)
  is_empty = jnp.isneginf(values)
  # Finite, so that a row without any has no NaN in its gradient.
  finite = jnp.where(is_empty, jnp.finfo(values.dtype).min, values)
  return index, jnp.where(is_empty, 0, jax.nn.softmax(finite)), is_empty


def _by_token(expert, gate, experts, losses, load=None, keep=None):
  """Without a load there is no loss of balance."""
  importance = balance.importance(expert, gate, experts)
  count = balance.count(expert, experts)
  if load is not None:
    losses = {
      'importance': balance.cv_squared(importance, keep),
      'load': balance.cv_squared(load, keep),
      **losses,
    }
  load = count if load is None else load
  plan = ByToken(expert, gate)
  return Routing(plan, importance, load, count, _losses(**losses))


def _by_expert(token, gate, losses):
  experts, capacity = token.shape
  count = jnp.full((experts,), capacity, jnp.float32)
  plan = ByExpert(token, gate)
  return Routing(plan, gate.sum(1), count, count, _losses(**losses))


def _losses(**losses):
  return {'importance': jnp.zeros(()), 'load': jnp.zeros(()), **losses}


def _positive(x):
  """At least the smallest normal number, to divide by."""
  return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _check_k(name, k, number):
  if not 1 <= k <= number:
    raise ValueError(f'{name}={k}: must be from 1 to {number}')


def _check_size(name, x, experts):
  if x.shape != (experts,):
    raise ValueError(f'{name}: {x.shape}, must be one an expert: ({experts},)')


def _check_keep(keep, experts, k):
  """`keep` as an array; its numbers are looked at where there are any."""
  if keep is None:
    return None
  _check_size('keep', keep, experts)
  if not isinstance(keep, Tracer) and np.sum(keep) < k:
    raise ValueError(
      f'keep: leaves {np.sum(keep)} experts; must be at least {k}'
    )
  return jnp.asarray(keep)


def _check_groups(keep, groups, size, k_primary, k_secondary):
  """`keep` as `[G, E/G]`, and which groups it leaves; both None if it is."""
  if keep is None:
    return None, None
  _check_size('keep', keep, groups * size)
  kept = keep.reshape(groups, size)
  if not isinstance(keep, Tracer):
    number = np.asarray(kept).sum(1)
    if (number > 0).sum() < k_primary or min(number[number > 0]) < k_secondary:
      raise ValueError(
        f'keep: leaves {number.tolist()} experts per group; each group must '
        f'keep none or at least {k_secondary}, and at least {k_primary} groups '
        'must keep some'
      )
  return jnp.asarray(kept), jnp.asarray(kept).any(1)
