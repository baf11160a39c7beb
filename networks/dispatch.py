"""Dispatch: tokens to their experts and back, by one function.

`apply` runs any expert, a pure function of one expert's parameters and of
rows, each of which it treats on its own. All backends give the same numbers
(`capacity` where nothing overflows):

  loop      exact and dropless. Pairs are sorted by expert; one expert after
            the other works through its rows block by block, as many as there
            are. The gradient is a second such loop, which computes the experts'
            activations again instead of keeping them (Shazeer 2017, Appendix
            D). Under vmap (seeds of a sweep) the batch joins the experts:
            S * E experts on S * T tokens.
  ragged    exact: `networks.ragged` on sorted pairs, for experts that say how
            they are grouped. A kernel on TPU; on CPU and H100 (jax 0.10.2) it
            computes every expert on every row.
  capacity  static shapes: every expert has places for `capacity_factor` times
            its even share, in the order of the tokens; pairs beyond that are
            dropped, and counted.
  dense     every expert on every token: a reference, and the fastest for few
            small experts.

`auto` is `ragged` for experts with a grouped form where the device's compiler
groups it, which is asked and not assumed, and `loop` elsewhere.
Plans by expert and soft ones need no sorting and have one way only, dense over
an expert's own places.

Axes: see `networks.routing`; `N` pairs of a token and an expert, `B` rows of
a block, `O` outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from networks import ragged
from networks.routing import ByExpert, Mixture, Plan

Backend = Literal['auto', 'loop', 'ragged', 'capacity', 'dense']
BACKENDS = ('auto', 'loop', 'ragged', 'capacity', 'dense')


class Expert(NamedTuple):
  """What works on tokens.

  Attributes:
    apply: `(params of one expert, rows [B, D]) -> [B, O]`, each row on its
      own.
    grouped: `(params [E, ...], rows [N, D], sizes int32 [E]) -> [N, O]`, the
      same for rows that are sorted by expert, `sizes` of them each; what it
      returns for rows behind the last group does not matter. None where there
      is no such form.
  """

  apply: Callable[[Any, jax.Array], jax.Array]
  grouped: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None


def apply(
  plan: Plan,
  x: jax.Array,
  params: Any,
  expert: Expert,
  *,
  backend: Backend = 'auto',
  capacity_factor: float = 1.25,
  block: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """The gated sum of experts for every token (Shazeer 2017, equation 1).

  Args:
    plan: from a router.
    x: float `[T, D]`, tokens.
    params: of all experts, leaves `[E, ...]`.
    expert: what they compute.
    backend: see the module's docstring.
    capacity_factor: of `capacity`.
    block: rows of a block of `loop`; 0 chooses by the even share.

  Returns:
    `[T, O]`, and the share of pairs that were dropped, float32 scalar.

  Raises:
    ValueError: an unknown backend, or `ragged` for an expert without a
      grouped form.
  """
  if backend not in BACKENDS:
    raise ValueError(
      f'backend={backend!r}: must be one of {", ".join(BACKENDS)}'
    )
  if backend == 'ragged' and expert.grouped is None:
    raise ValueError(
      "backend='ragged': this expert has no grouped form; take 'loop'"
    )
  nothing = jnp.zeros(())
  if isinstance(plan, Mixture):
    return _mixed(plan, x, params, expert), nothing
  if isinstance(plan, ByExpert):
    return _chosen(plan, x, params, expert), nothing
  if backend == 'dense':
    return _dense(plan, x, params, expert), nothing
  if backend == 'capacity':
    return _capacity(plan, x, params, expert, capacity_factor)
  if backend == 'auto':
    backend = exact_backend(expert)
  number = num_experts(params)
  if backend == 'loop':
    block = block or ragged.block_size(plan.expert.size, number)
    work = functools.partial(grouped_loop, expert.apply, block)
  else:
    assert expert.grouped is not None
    work = expert.grouped
  return _sorted(plan, x, params, work), nothing


def exact_backend(expert: Expert, device: Any = None) -> Backend:
  """What `auto` takes on a device: `ragged` where that is grouped, or `loop`.

  Args:
    expert: what is to be computed.
    device: None for the default one; its compiler is asked, once.
  """
  platform = jax.default_backend() if device is None else device.platform
  if platform == 'cpu' or expert.grouped is None:
    return 'loop'
  return 'ragged' if ragged.is_grouped(device) else 'loop'


def places(even: float) -> int:
  """A capacity, rounded up, less a hair for errors of rounding."""
  return math.ceil(even - 1e-6)


def num_experts(params: Any) -> int:
  """E, from the experts' parameters."""
  return jax.tree.leaves(params)[0].shape[0]


def _dense(plan, x, params, expert):
  tokens, number = x.shape[0], num_experts(params)
  row = jnp.arange(tokens)[:, None]
  gates = jnp.zeros((tokens, number), plan.gate.dtype)
  # Empty places have expert E, which is out of bounds.
  gates = gates.at[row, plan.expert].add(plan.gate, mode='drop')
  each = jax.vmap(expert.apply, (0, None))(params, x)
  return jnp.einsum('te,eto->to', gates, each)


def _mixed(plan, x, params, expert):
  rows = jnp.einsum('tes,td->esd', plan.dispatch, x)
  each = jax.vmap(expert.apply)(params, rows)
  return jnp.einsum('tes,eso->to', plan.combine, each)


def _chosen(plan, x, params, expert):
  each = jax.vmap(expert.apply)(params, x[plan.token])
  weighted = each * plan.gate[..., None]
  y = jnp.zeros((x.shape[0], each.shape[-1]), weighted.dtype)
  return y.at[plan.token].add(weighted)


def _capacity(plan, x, params, expert, factor):
  tokens, number = x.shape[0], num_experts(params)
  chosen = plan.expert.reshape(-1)
  capacity = min(places(factor * chosen.size / number), tokens)
  order = jnp.argsort(chosen, stable=True)
  sizes = _sizes(chosen, number)
  rank = jnp.arange(chosen.size) - (jnp.cumsum(sizes) - sizes)[chosen[order]]
  place = jnp.zeros_like(chosen).at[order].set(rank)
  fits = (place < capacity) & (chosen < number)
  # What does not fit is sent out of bounds.
  place = jnp.where(fits, place, capacity)
  token = jnp.repeat(jnp.arange(tokens), plan.expert.shape[1])
  # Empty places hold a token and not zeros, where an expert's gradient may not
  # be finite.
  rows = jnp.broadcast_to(x[0], (number, capacity, x.shape[1]))
  rows = rows.at[chosen, place].set(x[token], mode='drop')
  each = jax.vmap(expert.apply)(params, rows)
  pairs = each.at[chosen, place].get(mode='fill', fill_value=0)
  pairs = pairs.reshape(*plan.expert.shape, -1)
  y = jnp.einsum('tk,tko->to', plan.gate, pairs)
  real = jnp.sum(chosen < number)
  return y, (real - jnp.sum(fits)) / jnp.maximum(real, 1)


def _sorted(plan, x, params, work):
  chosen, pairs = plan.expert.reshape(-1), plan.expert.shape[1]
  order = jnp.argsort(chosen, stable=True)
  inverse = jnp.argsort(order)
  sizes = _sizes(chosen, num_experts(params))
  tokens, features = x.shape
  repeated = jnp.broadcast_to(x[:, None], (tokens, pairs, features))
  rows = _permute(repeated.reshape(-1, features), order, inverse)
  outputs = work(params, rows, sizes)
  # Rows behind the last group are of no one.
  real = jnp.arange(chosen.size) < jnp.sum(sizes)
  outputs = jnp.where(real[:, None], outputs, 0)
  outputs = _permute(outputs, inverse, order)
  outputs = outputs.reshape(tokens, pairs, -1)
  return jnp.einsum('tk,tko->to', plan.gate, outputs)


def _sizes(chosen, number):
  ones = jnp.ones(chosen.shape, jnp.int32)
  return jnp.zeros((number,), jnp.int32).at[chosen].add(ones, mode='drop')


@jax.custom_vjp
def _permute(x, order, inverse):
  """`x[order]`, whose gradient is a gather too: scattering is slow on CPU."""
  del inverse
  return x[order]


_permute.defvjp(
  lambda x, order, inverse: (x[order], inverse),
  lambda inverse, g: (g[inverse], None, None),
)


def grouped_loop(
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
    `[N, O]`; what lies behind the last group means nothing.
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
