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

Shapes are static, so a device has a fixed room for rows from another one,
`room_factor` times the even share. That does not grow with the number of
devices, as the worst case does (all rows to one device). Rows that find no room
are sent in a further round of two all-to-alls, and so on until all have been
worked on: nothing is dropped, and the numbers are those of one device. How many
rounds it takes is known before the first (one number that all devices agree
on), and reported. The gradient goes through the first round as usual; that of
further rounds, which are rare, computes them again. `capacity` has room for
`capacity_factor` times the even share, one round, and drops what does not fit.

Experts that are whole on every device work there on the tokens that lie there
(over an axis called `rows`), and nothing travels but their gradients.

The mesh is the one that is set where the program is traced, as
`runtime.mesh.compile_update` does; without one there is one device. Not built:
`ragged_all_to_all`, which would send no empty rows; XLA has it on accelerators
only, and what it receives needs room for the worst case or rounds, too.

Axes: see `networks.routing`; `n` devices, `R` rows that a device sends, `C`
of them at most to each device in a round.
"""

import functools
from typing import Any, NamedTuple

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
  room_factor: float = 2.0,
  block: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    room_factor: rows from one device to another in a round over the even share,
      of all backends but `capacity`. More of it means fewer rounds where tokens
      are spread unevenly, and more empty rows where they are not.
    block: of `loop`; 0 chooses by the even share.

  Returns:
    `[T, O]`; the share of pairs that were dropped, float32 scalar; the number
    of rounds in which tokens were exchanged, 0 where they were not, float32
    scalar. Both are of all devices.

  Raises:
    ValueError: n does not divide E, or bundle not K, or a bundle has more
      experts than a device; and as `dispatch.apply`.
  """
  number, n = dispatch.num_experts(params), devices(axis)
  options = {'backend': backend, 'capacity_factor': capacity_factor}
  if isinstance(plan, ByToken) and devices(ROWS) > 1 and backend != 'capacity':
    found = _where_they_lie(plan, x, params, expert, block, backend)
    return *found, jnp.zeros(())
  if n == 1 or not isinstance(plan, ByToken):
    found = dispatch.apply(plan, x, params, expert, block=block, **options)
    return *found, jnp.zeros(())
  (tokens, places), own = plan.expert.shape, number // n
  if number % n:
    raise ValueError(f'experts={number}: must be a multiple of the {n} devices')
  if places % bundle:
    raise ValueError(f'bundle={bundle}: must divide the {places} places')
  if bundle > own:
    raise ValueError(
      f'bundle={bundle}: must be at most the {own} experts of a device'
    )
  options['block'] = block or ragged.block_size(tokens * places, number)
  factor = capacity_factor if backend == 'capacity' else room_factor
  each, trips = -(-tokens // n), places // bundle
  even = factor * each * trips / n
  most = each * min(trips, own // bundle)
  room = min(max(dispatch.places(even), 1), most)
  # As many places of an expert as on one device, whatever the room is.
  options['capacity_factor'] = even / room
  assert axis is not None
  exchange = _Exchange(axis, n, own, bundle, room, most)
  rows = PartitionSpec(axis)
  y, worked, rounds = jax.shard_map(
    functools.partial(_on_device, expert, exchange, options),
    in_specs=rows,
    out_specs=(rows, rows, PartitionSpec()),
    axis_names={axis},
    # What is differentiated is divided: nothing is summed over devices by
    # itself.
    check_vma=False,
  )(*_spread(plan, x, number, n), params)
  real = jnp.sum(plan.expert < number)
  dropped = (real - jnp.sum(worked)) / jnp.maximum(real, 1)
  return y[:tokens], dropped, rounds


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


class _Exchange(NamedTuple):
  """Sizes of an exchange, which are known when it is compiled.

  Attributes:
    axis: of the mesh.
    devices: n.
    own: experts of a device.
    bundle: places of a token that travel together.
    room: C.
    most: rows from one device to another in the worst case.
  """

  axis: str
  devices: int
  own: int
  bundle: int
  room: int
  most: int


class _Rows(NamedTuple):
  """A device's rows by the device that they go to.

  Attributes:
    there: int32 `[R]`, that device; n where it has none.
    rank: int32 `[R]`, place among the rows to it.
    order: int32 `[R]`, rows sorted by device.
    start: int32 `[n]`, first in this order.
    size: int32 `[n]`, how many.
  """

  there: jax.Array
  rank: jax.Array
  order: jax.Array
  start: jax.Array
  size: jax.Array


def _on_device(expert, exchange, options, chosen, gate, x, params):
  """One device's tokens out and back, others' tokens through its experts.

  Returns:
    `[T / n, O]`; how many pairs were worked on, `[1]`, to be summed over
    devices; and the number of rounds, the same on all. Both float32.
  """
  tokens, own = x.shape[0], exchange.own
  chosen = chosen.reshape(-1, exchange.bundle)
  # An empty place has expert E, of device n, which does not exist.
  there = jnp.min(chosen // own, axis=1, keepdims=True)
  is_mine = (chosen // own == there) & (there < exchange.devices)
  local = jnp.where(is_mine, chosen % own, own)
  rows = _sort(there[:, 0], exchange.devices)
  gate = gate.reshape(-1, exchange.bundle)
  args = rows, local, gate, x, params
  rounds, one = jnp.ones(()), _round(expert, exchange, options)
  if options['backend'] == 'capacity':
    y, worked = one(0, *args)
  else:
    worked = jnp.sum(is_mine)
    if exchange.room < exchange.most:
      rounds = -(-jnp.max(rows.size) // exchange.room)
      rounds = jnp.maximum(jax.lax.pmax(rounds, exchange.axis), 1)
      y = _rounds(one)(rounds, *args)
    else:
      y, _ = one(0, *args)
  y = y.reshape(tokens, -1, y.shape[1]).sum(1)
  return y, worked.astype(jnp.float32)[None], rounds.astype(jnp.float32)


def _rounds(one):
  """The sum of so many rounds, as a function with its own gradient.

  What the first one needs for its gradient is kept. The others are computed
  again: they are rare, and to keep what they need would take the room of the
  worst case.
  """

  @jax.custom_vjp
  def run(rounds, rows, local, *inputs):
    return forward(rounds, rows, local, *inputs)[0]

  def forward(rounds, rows, local, *inputs):
    output = lambda i, *inputs: one(i, rows, local, *inputs)[0]
    y, pull = jax.vjp(functools.partial(output, 0), *inputs)
    more = lambda i, y: y + output(i, *inputs)
    y = jax.lax.fori_loop(1, rounds, more, y)
    return y, (pull, rounds, rows, local, inputs)

  def backward(residuals, g):
    first, rounds, rows, local, inputs = residuals

    def more(i, total):
      output = lambda *inputs: one(i, rows, local, *inputs)[0]
      _, pull = jax.vjp(output, *inputs)
      return jax.tree.map(jnp.add, total, pull(g))

    return None, None, None, *jax.lax.fori_loop(1, rounds, more, first(g))

  run.defvjp(forward, backward)
  return run


def _round(expert, exchange, options):
  """A round as a function: its rows to their experts and back.

  Returns:
    `(number of the round, rows, local, gate, x, params) -> ` `[R, O]`, 0 for
    rows of other rounds, and how many pairs this device's experts worked on.
  """
  axis, _, own, bundle, room, _ = exchange
  send = functools.partial(
    jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
  )

  def one(turn, rows, local, gate, x, params):
    place, source = _places(rows, room, turn)
    tokens, features = x.shape
    trips = local.shape[0] // tokens
    repeated = jnp.broadcast_to(x[:, None], (tokens, trips, features))
    # Numbers of experts travel as floats, exact up to 2^24; 0 is no expert, for
    # that is what an empty row has.
    code = ((local + 1) % (own + 1)).astype(jnp.float32)
    packets = [repeated.reshape(-1, features), gate, code]
    packets = send(_move(jnp.concatenate(packets, axis=1), source, place))
    sent, gate, code = jnp.split(packets, [features, features + bundle], axis=1)
    local = code.astype(jnp.int32) - 1
    local = jnp.where(local < 0, own, local)
    y, dropped = dispatch.apply(
      ByToken(local, gate), sent.astype(x.dtype), params, expert, **options
    )
    worked = jnp.round(jnp.sum(local < own) * (1 - dropped))
    return _move(send(y), place, source), worked

  return one


def _sort(there, n):
  """Rows `[R]` by device, as `_Rows`."""
  order = jnp.argsort(there, stable=True)
  size = jnp.zeros((n,), jnp.int32).at[there].add(1, mode='drop')
  start = jnp.cumsum(size) - size
  first = jnp.append(start, jnp.sum(size))[there]
  return _Rows(there, jnp.argsort(order) - first, order, start, size)


def _places(rows, room, turn):
  """Where `R` rows go and where `n * C` places come from; out of bounds: none.

  Rows to one device stay in order; a round has the next C of them.
  """
  n, number = rows.size.shape[0], rows.there.shape[0]
  rank = rows.rank - turn * room
  fits = (rows.there < n) & (rank >= 0) & (rank < room)
  place = jnp.where(fits, rows.there * room + rank, n * room)
  wanted = turn * room + jnp.broadcast_to(jnp.arange(room)[None], (n, room))
  source = rows.order.at[rows.start[:, None] + wanted].get(mode='clip')
  source = jnp.where(wanted < rows.size[:, None], source, number)
  return place, source.reshape(-1)


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
