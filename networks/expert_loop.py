"""Experts on sorted rows, one after another and block by block.

Each group of rows goes through its own parameters in as many blocks as it
fills. The gradient is a second such loop, which computes the activations again
instead of keeping them (Shazeer 2017, Appendix D). Under vmap (seeds of a
sweep) the batch joins the groups: S * E groups on S * N rows.

Axes: `N` rows sorted by group, `E` groups with parameters, `R` groups of rows
(E, or S * E under vmap), `B` rows of a block, `D` inputs, `O` outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def grouped(
  function: Callable[[Any, jax.Array], jax.Array],
  block: int,
  params: Any,
  x: jax.Array,
  sizes: jax.Array,
) -> jax.Array:
  """Each group of rows through its own parameters, block by block.

  Args:
    function: `(params of one group, rows [B, D]) -> [B, O]`, each row on its
      own. Computed again for the gradient, which is of first order only.
    block: B.
    params: leaves `[E, ...]`.
    x: `[N, D]`, sorted by group.
    sizes: int32 `[E]`, rows of each group; their sum may be below N.

  Returns:
    `[N, O]`; rows after the last group mean nothing.
  """
  owner = jnp.arange(sizes.shape[0])
  groups = _Groups(owner, jnp.cumsum(sizes) - sizes, sizes)
  return _loop(function, block)(params, groups, x)


class _Groups(NamedTuple):
  """Groups of rows, in the order of their rows.

  Attributes:
    owner: int32 `[R]`, whose parameters; several may share some.
    start: int32 `[R]`, first row.
    size: int32 `[R]`.
  """

  owner: jax.Array
  start: jax.Array
  size: jax.Array


def _loop(function, block):
  """The loop as a function with its own gradient and its own batching."""
  forward = _foldable(functools.partial(_forward, function, block))
  backward = _foldable(functools.partial(_backward, function, block))

  @jax.custom_vjp
  def run(params, groups, x):
    return forward(params, groups, x)

  def run_forward(params, groups, x):
    return forward(params, groups, x), (params, groups, x)

  def run_backward(residuals, g):
    params_bar, x_bar = backward(*residuals, g)
    return params_bar, None, x_bar

  run.defvjp(run_forward, run_backward)
  return run


def _foldable(function):
  """`function(params, groups, *rows)` under vmap as one call on more groups.

  Results have groups or rows in front, so that they unfold alike.
  """
  folded = jax.custom_batching.custom_vmap(function)

  @folded.def_vmap
  def rule(size, is_batched, params, groups, *rows):
    def whole(tree, flags):
      repeat = lambda x: jnp.broadcast_to(x[None], (size, *x.shape))
      return jax.tree.map(lambda x, b: x if b else repeat(x), tree, flags)

    def merge(tree):
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    # Parameters that all share stay as they are: groups find them by owner.
    step = 0
    if any(jax.tree.leaves(is_batched[0])):
      params = whole(params, is_batched[0])
      step = jax.tree.leaves(params)[0].shape[1]
      params = merge(params)
    groups = whole(groups, is_batched[1])
    rows = whole(rows, tuple(is_batched[2:]))
    lane = jnp.arange(size, dtype=jnp.int32)[:, None]
    length = rows[0].shape[1]
    groups = _Groups(
      groups.owner + step * lane, groups.start + length * lane, groups.size
    )
    out = folded(params, merge(groups), *merge(rows))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return folded


def _forward(function, block, params, groups, x):
  length, owned = x.shape[0], _pick(params, 0)
  # A block may reach into the next group's rows, which are written later.
  x = _pad(x, block)
  shape = jax.eval_shape(function, owned, x[:block])
  y = jnp.zeros((x.shape[0], *shape.shape[1:]), shape.dtype)
  order, occupied = _occupied(groups)

  def one(i, y):
    group = order[i]
    weights = _pick(params, groups.owner[group])

    def body(j, y):
      start = groups.start[group] + j * block
      rows = jax.lax.dynamic_slice_in_dim(x, start, block)
      return jax.lax.dynamic_update_slice_in_dim(
        y, function(weights, rows), start, 0
      )

    return jax.lax.fori_loop(0, -(-groups.size[group] // block), body, y)

  return jax.lax.fori_loop(0, occupied, one, y)[:length]


def _backward(function, block, params, groups, x, g):
  length, number = x.shape[0], groups.size.shape[0]
  x, g = _pad(x, block), jnp.pad(g, ((0, block), (0, 0)))
  params_bar = jax.tree.map(
    lambda p: jnp.zeros((number, *p.shape[1:]), p.dtype), params
  )
  order, occupied = _occupied(groups)

  def one(i, carry):
    params_bar, x_bar = carry
    group = order[i]
    weights = _pick(params, groups.owner[group])
    end = groups.start[group] + groups.size[group]

    def body(j, carry):
      weights_bar, x_bar = carry
      start = groups.start[group] + j * block
      rows, rows_bar = (
        jax.lax.dynamic_slice_in_dim(rows, start, block) for rows in (x, g)
      )
      mine = start + jnp.arange(block) < end
      rows_bar = jnp.where(mine[:, None], rows_bar, 0)
      _, pull = jax.vjp(function, weights, rows)
      more, rows_bar = pull(rows_bar)
      x_bar = jax.lax.dynamic_update_slice_in_dim(x_bar, rows_bar, start, 0)
      return jax.tree.map(jnp.add, weights_bar, more), x_bar

    zeros = jax.tree.map(jnp.zeros_like, weights)
    blocks = -(-groups.size[group] // block)
    weights_bar, x_bar = jax.lax.fori_loop(0, blocks, body, (zeros, x_bar))
    params_bar = jax.tree.map(
      lambda all_, own: all_.at[group].set(own), params_bar, weights_bar
    )
    return params_bar, x_bar

  start = (params_bar, jnp.zeros_like(x))
  params_bar, x_bar = jax.lax.fori_loop(0, occupied, one, start)
  return params_bar, x_bar[:length]


def _pad(x, block):
  # Not by zeros, where an expert's gradient may not be finite.
  return jnp.pad(x, ((0, block), (0, 0)), mode='edge')


def _occupied(groups):
  """Groups that have rows, in order and in front, and their number."""
  empty = groups.size == 0
  return jnp.argsort(empty, stable=True), jnp.sum(~empty)


def _pick(params, index):
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), params
  )
