"""Experts divided over devices: tokens travel, parameters stay.

Data parallelism gives every device `T / n` tokens, and with them ever smaller
batches to ever more experts. Here a device holds `E / n` experts, the only
copy of them, and gets the tokens of all devices for them: an expert works on
the `k * T / E` tokens that it would have on one device (Shazeer 2017, section
3.1). A row is sent to the device that has its expert and comes back, each by
one `all_to_all`. Gates, loads and balance losses are computed outside, by the
program of the whole batch, and so are of all devices.

With a hierarchy whose groups lie whole on a device, a token travels once for
each chosen group and comes back summed (`bundle`): the first level of the
hierarchy chooses devices, the second works on one.

Shapes are static, so a device has room for as many rows from another one as
there may ever be: as much as if all tokens went everywhere. `capacity` has
room for `capacity_factor` times the even share instead, and drops what does
not fit.

Experts that are whole on every device work there on the tokens that lie there
(over an axis called `rows`), and nothing travels but their gradients.

The mesh is the one that is set where the program is traced, as
`runtime.mesh.compile_update` does; without one there is one device. Not built:
`ragged_all_to_all`, which would send no empty rows; XLA has it on accelerators
only.

Axes: see `networks.routing`; `n` devices, `R` rows that a device sends, `C`
of them at most to each device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from networks import dispatch, ragged
from networks.routing import ByToken, Plan

# Of a mesh whose devices share the tokens and each have all experts.
ROWS = 'rows'


def devices(axis: str | None) -> int:
  """Devices along an axis of the mesh around; 1 where there is none.

  Where the program is one device's own already (inside `shard_map`) it counts
  as none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  if axis is None or kinds.get(axis) != AxisType.Auto:
    return 1
  return mesh.shape[axis]


def apply(
  plan: Plan,
  x: jax.Array,
  params: Any,
  expert: dispatch.Expert,
  *,
  axis: str | None,
  bundle: int = 1,
  backend: dispatch.Backend = 'auto',
  capacity_factor: float = 1.25,
  block: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """`dispatch.apply` with experts and tokens divided over a mesh's axis.

  On one device, and for plans by expert and soft ones, it is just that; the
  latter are products of arrays, which the compiler divides by itself. So is
  `capacity` of whole experts, whose places are those of all tokens together.

  Args:
    plan: from a router, of all tokens. The experts of a token differ.
    x: float `[T, D]`, tokens of all devices; any T.
    params: of all experts, leaves `[E, ...]`, expert i on device `i * n // E`;
      all of them on each device where the mesh has an axis `rows` instead.
    expert: what they compute; it closes over no traced array.
    axis: its name; None for one device.
    bundle: places side by side in `plan.expert [T, K]` whose experts share a
      device; they travel together. A pair that does not lie with the others of
      its bundle is dropped.
    backend: of the work on each device, see `networks.dispatch`. `capacity`
      also limits the rows between two devices.
    capacity_factor: of `capacity`.
    block: of `loop`; 0 chooses by the even share.

  Returns:
    `[T, O]`, and the share of pairs that were dropped, float32 scalar, of all
    devices.

  Raises:
    ValueError: n does not divide E, or bundle not K, or a bundle has more
      experts than a device; and as `dispatch.apply`.
  """
  number, n = dispatch.num_experts(params), devices(axis)
  options = {'backend': backend, 'capacity_factor': capacity_factor}
  if isinstance(plan, ByToken) and devices(ROWS) > 1 and backend != 'capacity':
    return _where_they_lie(plan, x, params, expert, block, backend)
  if n == 1 or not isinstance(plan, ByToken):
    return dispatch.apply(plan, x, params, expert, block=block, **options)
  (tokens, places), own = plan.expert.shape, number // n
  if number % n:
    raise ValueError(f'experts={number}: must be a multiple of the {n} devices')
  if places % bundle:
    raise ValueError(f'bundle={bundle}: must divide the {places} places')
  if bundle > own:
    raise ValueError(
      f'bundle={bundle}: must be at most the {own} experts of a device'
    )
  block = block or ragged.block_size(tokens * places, number)
  rows = PartitionSpec(axis)
  y, worked = jax.shard_map(
    functools.partial(_on_device, expert, axis, n, bundle, options, block),
    in_specs=rows,
    out_specs=rows,
    axis_names={axis},
    # Everything is divided, so that nothing is summed over devices by itself.
    check_vma=False,
  )(*_spread(plan, x, number, n), params)
  real = jnp.sum(plan.expert < number)
  return y[:tokens], (real - jnp.sum(worked)) / jnp.maximum(real, 1)


def _where_they_lie(plan, x, params, expert, block, backend):
  """Each device's tokens through experts that it has all of."""
  rows, whole = PartitionSpec(ROWS), PartitionSpec()

  def here(chosen, gate, x, params):
    plan = ByToken(chosen, gate)
    return dispatch.apply(plan, x, params, expert, backend=backend, block=block)

  y, dropped = jax.shard_map(
    here,
    in_specs=(rows, rows, rows, whole),
    out_specs=(rows, whole),
    axis_names={ROWS},
    # Nothing is dropped anywhere, and gradients of what is whole are summed.
    check_vma=False,
  )(*_spread(plan, x, dispatch.num_experts(params), devices(ROWS)), params)
  return y[: x.shape[0]], dropped


def _spread(plan, x, number, n):
  """Choices, gates and tokens, filled up to a multiple of n devices.

  What is too few is filled up with tokens without experts.
  """
  pad = lambda a, value: jnp.pad(
    a, ((0, -a.shape[0] % n), (0, 0)), constant_values=value
  )
  return pad(plan.expert, number), pad(plan.gate, 0), pad(x, 0)


def _on_device(
  expert, axis, n, bundle, options, block, chosen, gate, x, params
):
  """One device's tokens out and back, others' tokens through its experts."""
  (tokens, places), features = chosen.shape, x.shape[1]
  own = dispatch.num_experts(params)
  trips = places // bundle
  room = tokens * min(trips, own // bundle)
  if options['backend'] == 'capacity':
    even = options['capacity_factor'] * tokens * trips / n
    room = min(dispatch.places(even), room)
    # As many places of an expert as on one device, whatever the room is.
    options = options | {'capacity_factor': even / room}
  chosen = chosen.reshape(-1, bundle)
  # An empty place has expert E, of device n, which does not exist.
  there = jnp.min(chosen // own, axis=1, keepdims=True)
  is_mine = (chosen // own == there) & (there < n)
  local = jnp.where(is_mine, chosen % own, own)
  place, source = _places(there[:, 0], n, room)

  # Numbers of experts travel as floats, exact up to 2^24; 0 is no expert, for
  # that is what an empty row has.
  code = (local + 1) % (own + 1)
  repeated = jnp.broadcast_to(x[:, None], (tokens, trips, features))
  packets = jnp.concatenate(
    [
      repeated.reshape(-1, features),
      gate.reshape(-1, bundle),
      code.astype(jnp.float32),
    ],
    axis=1,
  )
  send = functools.partial(
    jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
  )
  packets = send(_move(packets, source, place))
  rows, gate, code = jnp.split(packets, [features, features + bundle], axis=1)
  local = code.astype(jnp.int32) - 1
  local = jnp.where(local < 0, own, local)
  y, dropped = dispatch.apply(
    ByToken(local, gate),
    rows.astype(x.dtype),
    params,
    expert,
    block=block,
    **options,
  )
  worked = jnp.round(jnp.sum(local < own) * (1 - dropped))
  y = _move(send(y), place, source)
  return y.reshape(tokens, trips, -1).sum(1), worked[None]


def _places(there, n, room):
  """Where `R` rows go and where `n * C` places come from; out of bounds: none.

  Rows to one device stay in order; those beyond its room have no place.
  """
  mine = jax.nn.one_hot(there, n, dtype=jnp.int32)
  rank = jnp.sum((jnp.cumsum(mine, axis=0) - 1) * mine, axis=1)
  fits = (there < n) & (rank < room)
  place = jnp.where(fits, there * room + rank, n * room)
  source = jnp.full((n * room,), there.size, jnp.int32)
  number = jnp.arange(there.size, dtype=jnp.int32)
  return place, source.at[place].set(number, mode='drop')


@jax.custom_vjp
def _move(x, source, place):
  """Rows `source` of x, 0 out of bounds; its gradient is a gather too.

  `place` is where x's rows have gone, out of bounds for those that have not.
  """
  del place
  return x.at[source].get(mode='fill', fill_value=0)


_move.defvjp(
  lambda x, source, place: (_move(x, source, place), place),
  lambda place, g: (g.at[place].get(mode='fill', fill_value=0), None, None),
)
