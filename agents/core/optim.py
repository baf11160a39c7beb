"""Optimisers and one optimiser step.

Schedules are written here and not taken from optax, whose own refuse traced
hyper-parameters, and a sweep vmaps over those.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

# A `NamedTuple` of what an agent's parts have, one field each.
Parts = TypeVar('Parts', bound=Any)

# Of a `Config` whose learning rate is `warmup_step_decay`'s: all 0 or more.
SCHEDULE_FIELDS = (
  'learning_rate',
  'warmup_updates',
  'decay_every',
  'decay_rate',
  'weight_decay',
)


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


def warmup_inverse_sqrt(
  peak: chex.Numeric, *, warmup_steps: int
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then as one over the root of the step.

  Args:
    peak: learning rate after the warm-up; may be traced.
    warmup_steps: updates of warm-up; 0 is as 1.

  Returns:
    `(count) -> float32` learning rate.

  Source: Shazeer 2017, Appendix C.1.
  """
  warmup = max(warmup_steps, 1)

  def schedule(count):
    step = jnp.asarray(count, jnp.float32) + 1.0
    return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

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
  """Adam with decoupled weight decay, after a global clip."""
  return optax.chain(
    optax.clip_by_global_norm(max_norm),
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(schedule),
  )


def from_config(
  config: Any, kind: Literal['sgd', 'adam']
) -> optax.GradientTransformation:
  """The optimiser of a config whose learning rate is `warmup_step_decay`'s.

  Args:
    config: with `SCHEDULE_FIELDS` and `max_gradient_norm`, and `momentum` for
      SGD.
    kind: `sgd` with momentum, or `adam` with decoupled weight decay.
  """
  schedule = warmup_step_decay(
    config.learning_rate,
    warmup_steps=config.warmup_updates,
    decay_every=config.decay_every,
    decay_rate=config.decay_rate,
  )
  shared = {
    'weight_decay': config.weight_decay,
    'max_norm': config.max_gradient_norm,
  }
  if kind == 'adam':
    return adamw(schedule, **shared)
  return sgd(schedule, momentum=config.momentum, **shared)


class Step(NamedTuple):
  """What an optimiser's step leaves.

  Attributes:
    params: the parameters after it.
    opt_state: the optimiser's state after it.
    aux: what the loss returned in addition to its value.
    norm: float32 scalar, of the gradient before any clipping.
  """

  params: Any
  opt_state: Any
  aux: Any
  norm: chex.Array


def minimise(
  loss: Callable[..., tuple[chex.Array, Any]],
  optimiser: optax.GradientTransformation,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., Step]:
  """One optimiser step on `loss(params, *args) -> (scalar, aux)`.

  Args:
    loss: the loss, differentiated in its first argument.
    optimiser: an optax transformation.
    reduce: the mean over devices where a caller runs one step on several; the
      identity otherwise.

  Returns:
    `(params, opt_state, *args) -> Step`.
  """

  def step(params, opt_state, *args):
    gradients, aux = jax.grad(loss, has_aux=True)(params, *args)
    gradients = reduce(gradients)
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return Step(params, opt_state, aux, norm)

  return step


def init(optimisers: Parts, params: Any) -> Parts:
  """The optimisers' states, a part of `params` each.

  Args:
    optimisers: a `NamedTuple` of them; None for a part that is not trained.
    params: a `NamedTuple` of as many parts or more, in the same order.

  Returns:
    The states, in the same `NamedTuple` as the optimisers.
  """
  states = (
    None if optimiser is None else optimiser.init(part)
    for optimiser, part in zip(optimisers, params)
  )
  return type(optimisers)(*states)


def minimise_each(
  losses: Any, optimisers: Any, reduce: Callable[[Any], Any]
) -> Any:
  """Calls `minimise` on each pair of loss and optimiser.

  The result is a `NamedTuple` of the optimisers' type.
  """
  pairs = zip(losses, optimisers)
  return type(optimisers)(*(minimise(*pair, reduce) for pair in pairs))


def norms(**steps: Step) -> dict[str, chex.Array]:
  """Metrics `gradient_norm_NAME`, float32 scalars, of steps by name."""
  return {f'gradient_norm_{name}': x.norm for name, x in steps.items()}


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


class FactoredState(NamedTuple):
  """State of `scale_by_factored_adam`.

  Attributes:
    count: int32 scalar, updates so far.
    rows: means of squares over the last axis, `[..., M]`, of each leaf.
    columns: over the last but one, `[..., N]`.
  """

  count: chex.Array
  rows: Any
  columns: Any


def scale_by_factored_adam(
  decay: chex.Numeric = 0.999, epsilon: chex.Numeric = 1e-8
) -> optax.GradientTransformation:
  """Adam without a first moment, its second one factored.

  Of matrices `[..., M, N]` the second moment is the outer product of its means
  over columns and over rows, divided by the mean of either: `M + N` numbers
  instead of `M N` twice.

  Args:
    decay: Adam's second one.
    epsilon: added to the root.

  Raises:
    ValueError: a parameter has less than two axes.

  Source: Shazeer 2017, Appendix D.
  """

  def init(params):
    for leaf in jax.tree.leaves(params):
      if leaf.ndim < 2:
        raise ValueError(
          f'optimiser=factored: needs matrices, found a parameter of shape '
          f'{leaf.shape}'
        )
    zeros = lambda axis: jax.tree.map(
      lambda x: jnp.zeros_like(x.mean(axis)), params
    )
    return FactoredState(jnp.zeros((), jnp.int32), zeros(-1), zeros(-2))

  def update(updates, state, params=None):
    del params
    count = state.count + 1
    average = lambda axis: (
      lambda old, g: decay * old + (1 - decay) * jnp.mean(jnp.square(g), axis)
    )
    rows = jax.tree.map(average(-1), state.rows, updates)
    columns = jax.tree.map(average(-2), state.columns, updates)
    correction = 1 - decay ** count.astype(jnp.float32)

    def scaled(g, row, column):
      mean = jnp.mean(row, -1, keepdims=True)[..., None]
      # An expert that got nothing has no moment, and no gradient.
      mean = jnp.maximum(mean, jnp.finfo(g.dtype).tiny)
      second = row[..., None] * (column[..., None, :] / mean) / correction
      return g / (jnp.sqrt(second) + epsilon)

    scaled_ = jax.tree.map(scaled, updates, rows, columns)
    return scaled_, FactoredState(count, rows, columns)

  return optax.GradientTransformation(init, update)


def project_kernels(
  params: Any, radius: chex.Numeric, stacked: bool = False
) -> Any:
  """Projects each layer's matrix onto the Frobenius ball.

  It becomes `W min(1, radius / |W|)`. Other parameters, such as biases, are
  unchanged. The matrices of a mixture's experts are in one leaf under
  `experts`; each counts as a layer.

  Args:
    params: a network's parameters, its matrices named `kernel`.
    radius: radius of the ball, above 0; may be traced.
    stacked: whether the first axis counts members of an ensemble, each of
      which is projected on its own.

  Source: ATAC (Cheng et al. 2022), Algorithm 2; official code,
  `l2_projection`.
  """

  def one(path, x):
    square = matrix_squares(path, x, stacked)
    if square is None:
      return x
    # Where it is small enough nothing changes, not by a rounding error either.
    outside = square > radius**2
    norm = jnp.sqrt(jnp.where(outside, square, 1.0))
    return x * jnp.where(outside, radius / norm, 1.0)

  return jax.tree_util.tree_map_with_path(one, params)


def matrix_squares(path: Any, x: chex.Array, stacked: bool) -> Any:
  """Squared Frobenius norms of the matrices in a leaf.

  Args:
    path: of the leaf, as `jax.tree_util` has it.
    x: the leaf, `[..., inputs, outputs]` or a convolution's kernel.
    stacked: see `project_kernels`.

  Returns:
    As `x`, of size 1 along a matrix's own axes; None where the leaf is not a
    `kernel`.
  """
  names = [getattr(entry, 'key', None) for entry in path]
  if names[-1] != 'kernel':
    return None
  first = stacked + ('experts' in names)
  axes = tuple(range(first, x.ndim))
  return jnp.sum(jnp.square(x), axis=axes, keepdims=True)


def periodic(new: Any, old: Any, step: chex.Array, period: int) -> Any:
  """`new` where `step` is a multiple of `period`, else `old`, leaves `[...]`.

  Args:
    new: pytree of arrays `[...]`.
    old: pytree of arrays `[...]`.
    step: int32 scalar.
    period: at least 1.
  """
  due = step % period == 0
  return jax.tree.map(lambda n, o: jnp.where(due, n, o), new, old)
