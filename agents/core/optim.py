"""Optimisers and one optimiser step.

Schedules are written here and not taken from optax, whose own refuse traced
hyper-parameters, and a sweep vmaps over those.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def warmup_step_decay(
  peak: chex.Numeric,
  *,
  warmup_steps: int,
  decay_every: int = 0,
  decay_rate: chex.Numeric = 0.1,
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then a factor after every `decay_every`.

  Args:
    peak: learning rate after the warm-up; may be traced.
    warmup_steps: updates of warm-up; 0 for none.
    decay_every: updates between decays, counted from the warm-up's end; 0 for
      no decay.
    decay_rate: the factor.

  Returns:
    `(count) -> float32` learning rate.

  Source: EfficientZero (Ye 2021), Table 6, and its official code.
  """

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum((count + 1.0) / max(warmup_steps, 1), 1.0)
    if not decay_every:
      return peak * warm
    drops = jnp.floor(jnp.maximum(count - warmup_steps, 0.0) / decay_every)
    return peak * warm * decay_rate**drops

  return schedule


def sgd(
  schedule: optax.Schedule,
  *,
  momentum: chex.Numeric,
  weight_decay: chex.Numeric,
  max_norm: chex.Numeric,
) -> optax.GradientTransformation:
  """SGD with momentum; the weight decay joins the gradient, as in PyTorch.

  The order is clip, decay, momentum. optax's `sgd` has no decay.
  """
  return optax.chain(
    optax.clip_by_global_norm(max_norm),
    optax.add_decayed_weights(weight_decay),
    optax.trace(decay=momentum),
    optax.scale_by_learning_rate(schedule),
  )


def adamw(
  schedule: optax.Schedule,
  *,
  weight_decay: chex.Numeric,
  max_norm: chex.Numeric,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay behind a global clip."""
  return optax.chain(
    optax.clip_by_global_norm(max_norm),
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(schedule),
  )


def minimise(
  loss: Callable[..., tuple[chex.Array, Any]],
  optimiser: optax.GradientTransformation,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., tuple[Any, Any, Any, chex.Array]]:
  """One optimiser step on `loss(params, *args) -> (scalar, aux)`.

  Args:
    loss: the loss, differentiated in its first argument.
    optimiser: an optax transformation.
    reduce: the mean over devices where a caller runs one step on several; the
      identity otherwise.

  Returns:
    `(params, opt_state, *args) -> (params, opt_state, aux, gradient_norm)`.
  """

  def step(params, opt_state, *args):
    gradients, aux = jax.grad(loss, has_aux=True)(params, *args)
    gradients = reduce(gradients)
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, aux, norm

  return step


def scale_gradient(x: Any, factor: float) -> Any:
  """The identity whose gradient is multiplied by `factor`, on a pytree."""

  def one(leaf):
    return leaf * factor + jax.lax.stop_gradient(leaf) * (1.0 - factor)

  return jax.tree.map(one, x)


def track(new: Any, old: Any, rate: chex.Numeric) -> Any:
  """`rate new + (1 - rate) old`, on a pytree; `rate` may be traced."""
  return jax.tree.map(lambda n, o: rate * n + (1.0 - rate) * o, new, old)


def adam(rate: chex.Numeric) -> optax.GradientTransformation:
  """Adam with a constant learning rate, which may be traced."""
  return optax.chain(optax.scale_by_adam(), optax.scale(-rate))


def project_kernels(
  params: Any, radius: chex.Numeric, stacked: bool = False
) -> Any:
  """Each layer's matrix onto the Frobenius ball: `W min(1, radius / |W|)`.

  Biases and all else stay.

  Args:
    params: of a network, its matrices named `kernel`.
    radius: of the ball, above 0; may be traced.
    stacked: whether the first axis counts members of an ensemble, each of
      which is projected on its own.

  Source: ATAC (Cheng et al. 2022), Algorithm 2; official code,
  `l2_projection`.
  """

  def one(path, x):
    if getattr(path[-1], 'key', None) != 'kernel':
      return x
    axes = tuple(range(1 if stacked else 0, x.ndim))
    square = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    # Where it is small enough nothing changes, not by a rounding error either.
    outside = square > radius**2
    norm = jnp.sqrt(jnp.where(outside, square, 1.0))
    return x * jnp.where(outside, radius / norm, 1.0)

  return jax.tree_util.tree_map_with_path(one, params)


def periodic(new: Any, old: Any, step: chex.Array, period: int) -> Any:
  """`new` where `step` is a multiple of `period`, else `old`, on a pytree."""
  due = step % period == 0
  return jax.tree.map(lambda n, o: jnp.where(due, n, o), new, old)
