"""Dispatch: tokens to their experts and back, by one function.

`apply` runs any expert, a pure function of one expert's parameters and of
rows, each of which it treats on its own. All backends give the same numbers
(`capacity` where nothing overflows):

  loop      exact and dropless: `networks.expert_loop` on sorted pairs.
  ragged    exact: `networks.ragged` on sorted pairs, for experts that have a
            grouped form. A kernel on TPU; on CPU and H100 (jax 0.10.2) it
            computes every expert on every row.
  capacity  static shapes: every expert has places for `capacity_factor` times
            its even share, in the order of the tokens; pairs beyond that are
            dropped, and counted.
  dense     every expert on every token: a reference, and the fastest for few
            small experts.

`auto` asks the device's compiler whether it groups the rows of an expert that
has a grouped form: `ragged` if it does, `loop` elsewhere. Plans by expert and
soft ones need no sorting and have one way only, dense over an expert's own
places.

Axes: see `networks.routing`; `N` pairs of a token and an expert, `B` rows of
a block, `O` outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from networks import expert_loop, ragged
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
      returns for rows after the last group is ignored. None where there is no
      such form.
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
    work = functools.partial(expert_loop.grouped, expert.apply, block)
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
  # Rows after the last group belong to no expert.
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
