"""What a search does at its root, before and after it, and its checks.

Axes: `B` batch, `A` actions.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from search import rows


def most_visited(summary: Any, prior: chex.Array) -> chex.Array:
  """The most visited action, ties by Q, then prior, then index, int32 `[B]`.

  Args:
    summary: `mctx.Tree.summary()`; its `visit_counts` and `qvalues` are read.
    prior: `[B, A]`.
  """
  is_best = jnp.ones_like(prior, bool)
  for x in (summary.visit_counts, summary.qvalues, prior):
    x = jnp.where(is_best, x, -jnp.inf)
    is_best &= x == jnp.max(x, axis=-1, keepdims=True)
  return jnp.argmax(is_best, axis=-1).astype(jnp.int32)


def sample(
  key: chex.PRNGKey,
  weights: chex.Array,
  best: chex.Array,
  temperature: chex.Numeric,
) -> chex.Array:
  """Draws actions by `weights ** (1 / temperature)`, int32 `[B]`.

  Args:
    key: consumed.
    weights: `[B, A]`, not negative.
    best: int32 `[B]`, the actions at temperature 0.
    temperature: at least 0; may be traced.

  Raises:
    ValueError: if `temperature` is negative.
  """
  check_range('temperature', temperature, low=0)
  logits = log_probs(weights)
  logits -= jnp.max(logits, axis=-1, keepdims=True)
  tiny = jnp.finfo(logits.dtype).tiny
  logits /= jnp.maximum(tiny, temperature)
  # As `jax.random.categorical` chooses, for the rows of this device.
  noise = rows.draw(jax.random.gumbel, key, logits.shape)
  action = jnp.argmax(noise + logits, axis=-1)
  return jnp.where(temperature == 0, best, action).astype(jnp.int32)


def dirichlet(
  key: chex.PRNGKey,
  prior: chex.Array,
  alpha: chex.Numeric,
  invalid_actions: chex.Array | None,
) -> chex.Array:
  """Symmetric Dirichlet noise over the valid actions, `[B, A]`.

  Args:
    key: consumed; one key a row is split off.
    prior: `[B, A]`, what a row without a valid action gets.
    alpha: concentration, above 0.
    invalid_actions: bool `[B, A]`, or None.
  """
  batch_size, num_actions = prior.shape
  alpha = jnp.full([num_actions], alpha, prior.dtype)
  keys = rows.split(key, batch_size)
  noise = jax.vmap(lambda key: jax.random.dirichlet(key, alpha))(keys)
  if invalid_actions is None:
    return noise
  # What is left of a Dirichlet, rescaled, is one over what is left.
  noise = jnp.where(as_bool(invalid_actions), 0, noise)
  total = jnp.sum(noise, axis=-1, keepdims=True)
  return jnp.where(total > 0, noise / jnp.where(total > 0, total, 1), prior)


def log_probs(probs: chex.Array) -> chex.Array:
  """Logarithms `[...]` of probabilities `[...]`, finite at 0."""
  return jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))


def mask_logits(
  logits: chex.Array, invalid_actions: chex.Array | None
) -> chex.Array:
  """Logits `[B, A]` with the lowest finite number at invalid actions.

  Finite, so that a row without a valid action has a softmax. Each row is
  shifted so that its highest logit is 0.

  Args:
    logits: `[B, A]`.
    invalid_actions: bool `[B, A]`; None returns the logits as they are.

  Raises:
    ValueError: if the shapes differ.
  """
  if invalid_actions is None:
    return logits
  if invalid_actions.shape != logits.shape:
    raise ValueError(
      f'invalid_actions must be [B, A] = {logits.shape}, but its shape is '
      f'{invalid_actions.shape}.'
    )
  logits -= jnp.max(logits, axis=-1, keepdims=True)
  lowest = jnp.finfo(logits.dtype).min
  return jnp.where(as_bool(invalid_actions), lowest, logits)


def as_bool(mask: chex.Array) -> chex.Array:
  """A mask `[...]` of any dtype as bool `[...]`: mctx's are ones and zeros."""
  return mask.astype(bool)


def check_range(
  name: str,
  value: Any,
  *,
  low: float | None = None,
  high: float | None = None,
  above: float | None = None,
) -> None:
  """Raises if a number that is known before tracing is out of range.

  Args:
    name: of the argument, for the message.
    value: a number to check; arrays and tracers pass.
    low: the least allowed.
    high: the largest allowed.
    above: a bound that is itself not allowed.

  Raises:
    ValueError: naming the argument, its value and the bound.
  """
  if not isinstance(value, int | float):
    return
  if low is not None and not value >= low:
    raise ValueError(f'{name} must be at least {low}, but is {value}.')
  if high is not None and not value <= high:
    raise ValueError(f'{name} must be at most {high}, but is {value}.')
  if above is not None and not value > above:
    raise ValueError(f'{name} must be above {above}, but is {value}.')


def checked_qvalues(root_qvalues: Any, root: Any) -> Any:
  """Evaluated Qs `[B, A]` or None, as they came.

  Args:
    root_qvalues: what stands at invalid actions must not count.
    root: whose `prior_logits` are `[B, A]`.

  Raises:
    ValueError: if the shapes differ.
  """
  if root_qvalues is None:
    return None
  if root_qvalues.shape != root.prior_logits.shape:
    raise ValueError(
      f'root_qvalues must be [B, A] = {root.prior_logits.shape}, but its '
      f'shape is {root_qvalues.shape}.'
    )
  return root_qvalues
