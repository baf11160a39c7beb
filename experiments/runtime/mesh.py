"""Learner steps over several devices, of one process or of many.

No agent contains a collective. `jit` (the default): a batch is split over the
mesh's `data` axis, the state is replicated (a mixture's experts may be divided:
`state_sharding`), and the compiler inserts the sums; one device and several
give the same numbers up to rounding, batch statistics included. A mesh is set
where the program is traced, for `networks.expert_parallel` to find. `pmap`:
each device runs `update` on its own rows, and the means that a `reduce` of
`agent.make` takes (gradients, statistics, metrics) make the parameters agree; a
BatchNorm's statistics are those of all devices only if its network was made
with the same `reduce`. There keys are folded with the device's index, so
it equals one device only for updates without random numbers.

Work row by row (searching, acting, whole episodes of an evaluation) is mapped
over the devices (`by_rows`) instead of being left to the partitioner: a loop
that ends with its last row would ask all devices at every iteration.

Every process calls the same functions in the same order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  use_abstract_mesh,
)

from agents.core.types import Agent, Info
from experiments.runtime import keys, loop
from experiments.runtime.sources import Source
from search import rows as search_rows

AXIS = 'data'
How = Literal['jit', 'pmap']


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with one axis, `data`, over all or given devices.

  They are ordered by process, so that a process holds consecutive rows of a
  batch; `jax.make_mesh` may order them otherwise.
  """
  devices = list(jax.devices() if devices is None else devices)
  devices.sort(key=lambda device: (device.process_index, device.id))
  return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def pmean(tree: Any) -> Any:
  """The mean over devices: `reduce` of `agent.make` where `how` is pmap."""
  return jax.lax.pmean(tree, AXIS)


def local_devices(mesh: Mesh) -> list[Any]:
  """The mesh's devices that belong to this process, in order."""
  return [d for d in mesh.devices if d.process_index == jax.process_index()]


def local(tree: Any) -> Any:
  """A tree as arrays of one device of this process, divided ones gathered.

  For what acts on its own: a program over arrays of all processes must be run
  by all together, and so must this if some array is divided.
  """

  def one(x):
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
      return x
    where = x.sharding
    if isinstance(where, NamedSharding) and not where.is_fully_replicated:
      x = _gather(where.mesh)(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = jax.random.key_data(x).addressable_data(0)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return x.addressable_data(0)

  return jax.tree.map(one, tree)


@functools.cache
def _gather(mesh):
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def split(mesh: Mesh) -> NamedSharding:
  """Rows divided over the mesh."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_sharding(state: Any, mesh: Mesh) -> Any:
  """Shardings of an agent's state that divide its experts over the mesh.

  Arrays below a dictionary's key `experts` (parameters, their targets and
  moments) are `split` if the number of devices divides their first axis; the
  rest is `replicated`. Shapes from `jax.eval_shape(agent.init, key)` will do.
  """

  def one(path, leaf):
    names = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
    divides = leaf.shape and leaf.shape[0] % mesh.size == 0
    return split(mesh) if 'experts' in names and divides else replicated(mesh)

  return jax.tree.map_with_path(one, state)


def _under(mesh, state_sharding, function):
  """`function` traced with a mesh set, for `networks.expert_parallel`.

  A divided state's experts find the mesh itself, whole ones that of `rows`.
  """
  around = mesh if state_sharding is not None else _of_rows(mesh)

  @functools.wraps(function)
  def traced(*args):
    with use_abstract_mesh(around.abstract_mesh):
      return function(*args)

  return function if mesh.size == 1 else traced


def _of_rows(mesh):
  """The same devices along an axis with the name of `search.rows`."""
  kinds = (AxisType.Auto,)
  return Mesh(mesh.devices, (search_rows.AXIS,), axis_types=kinds)


def compile_update(
  agent: Agent, mesh: Mesh, how: How = 'jit', state_sharding: Any = None
) -> Callable:
  """`agent.update` compiled over a mesh, its state donated.

  Args:
    agent: for `pmap`, made with `reduce=pmean`.
    how: see the module's docstring.
    state_sharding: a prefix of the state's tree, from the function of that
      name; None replicates it. `jit` only.

  Returns:
    `(state, batch, key) -> (state, info)`; leaves of the batch are split along
    their first axis, which the number of devices must divide, and the key may
    be a `keys.Derived`.

  Raises:
    ValueError: another `how`; a sharded state or several processes with `pmap`;
      by the returned function, a batch that does not divide.
  """
  if how not in ('jit', 'pmap'):
    raise ValueError(f"how={how!r}: must be 'jit' or 'pmap'")
  if how == 'pmap' and state_sharding is not None:
    raise ValueError('state_sharding: experts over devices need how=jit')
  if how == 'pmap' and jax.process_count() > 1:
    raise ValueError(
      'how=pmap: works in one process only, and there are '
      f'{jax.process_count()}; take how=jit'
    )
  compiled = (
    _jitted(agent, mesh, state_sharding)
    if how == 'jit'
    else _pmapped(agent, mesh)
  )

  def update(state, batch, key):
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % mesh.size:
      raise ValueError(
        f'batch_size={size}: must be a multiple of the {mesh.size} devices'
      )
    return compiled(state, batch, key)

  return update


def jit_update(agent: Agent, mesh: Mesh, state_sharding: Any = None) -> Any:
  """What `compile_update` compiles by `jit`; it can also be lowered.

  The batch must be split over the mesh, or on the host.
  """
  whole, rows = replicated(mesh), split(mesh)
  state = whole if state_sharding is None else state_sharding
  return jax.jit(
    keys.derived(_under(mesh, state_sharding, agent.update)),
    donate_argnums=0,
    in_shardings=(state, rows, whole),
    out_shardings=(state, whole),
  )


def _jitted(agent, mesh, state_sharding):
  rows, compiled = split(mesh), jit_update(agent, mesh, state_sharding)

  def update(state, batch, key):
    # A batch that a program over the mesh has made (reanalysis) lies
    # elsewhere, and jit would refuse to move it.
    return compiled(state, jax.device_put(batch, rows), key)

  return update


def _pmapped(agent, mesh):
  def one(state, batch, key):
    key = jax.random.fold_in(keys.typed(key), jax.lax.axis_index(AXIS))
    state, info = agent.update(state, batch, key)
    return state, info.metrics, info.priorities

  compiled = jax.pmap(
    one,
    axis_name=AXIS,
    in_axes=(None, 0, None),
    out_axes=(None, None, 0),
    devices=list(mesh.devices),
    donate_argnums=0,
  )

  def update(state, batch, key):
    rows = lambda x: x.reshape(mesh.size, -1, *x.shape[1:])
    state, metrics, priorities = compiled(state, jax.tree.map(rows, batch), key)
    if priorities is not None:
      priorities = priorities.reshape(-1)
    return state, Info(metrics, priorities)

  return update


def by_rows(function: Callable, mesh: Mesh, which: Sequence[int]) -> Callable:
  """A function of rows, over rows that are split over a mesh.

  Each device calls it for its own rows, with the random numbers that they would
  have on one device (`search.rows`), so a tree's loop ends when its own rows
  are done. Each row of the results must follow from the same row of the
  arguments, the whole arguments, and what `search.rows` draws. `which`
  arguments have rows along their first axis, as all results do; the others are
  whole on each device.
  """
  whole, rows = PartitionSpec(), PartitionSpec(search_rows.AXIS)

  @functools.wraps(function)
  def everywhere(*args):
    specs = tuple(rows if i in which else whole for i in range(len(args)))
    mapped = jax.shard_map(
      function,
      mesh=_of_rows(mesh),
      in_specs=specs,
      out_specs=rows,
      # Nothing is differentiated here.
      check_vma=False,
    )
    return mapped(*args)

  return everywhere


def compile_refresh(
  agent: Agent, mesh: Mesh, state_sharding: Any = None
) -> Callable:
  """`agent.refresh` compiled over a mesh, the batch split.

  With a replicated state rows are searched where they lie (`by_rows`); a state
  whose experts are divided is left to the partitioner. The key may be a
  `keys.Derived`.
  """
  assert agent.refresh is not None
  whole, rows = replicated(mesh), split(mesh)
  if state_sharding is None:
    state, refresh = whole, by_rows(agent.refresh, mesh, (1,))
  else:
    state = state_sharding
    refresh = _under(mesh, state_sharding, agent.refresh)
  return jax.jit(
    keys.derived(refresh),
    in_shardings=(state, rows, whole, whole),
    out_shardings=rows,
  )


def init(
  agent: Agent, source: Source, key: Any, mesh: Mesh, state_sharding: Any = None
) -> loop.Carry:
  """`loop.init` over a mesh: the agent whole everywhere, a pure source split.

  On several devices a pure source must come from `parts.stacked`: all leaves of
  its state have the parts in front. Parameters are drawn as on one device.
  """
  carry = carry_sharding(mesh, source, state_sharding)
  return loop.init(agent, source, key, carry)


def carry_sharding(mesh: Mesh, source: Source, state: Any = None) -> loop.Carry:
  """Where the parts of a pure source's carry lie, a prefix of its tree."""
  whole = replicated(mesh)
  # On one device a source need not be stacked; a data set is whole everywhere.
  parted = mesh.size > 1 and source.axes == 0
  return loop.Carry(
    whole if state is None else state, split(mesh) if parted else whole, whole
  )


def compile_interval(
  agent: Agent, source: Source, mesh: Mesh, state_sharding: Any = None
) -> Callable:
  """`loop.watched_interval` of a pure source over a mesh, its carry donated."""
  whole = replicated(mesh)
  carry = carry_sharding(mesh, source, state_sharding)
  interval = loop.watched_interval(agent, source)
  # What a source has split knows its mesh, and no other may be set around it.
  if state_sharding is not None:
    interval = _under(mesh, state_sharding, interval)
  return jax.jit(
    interval,
    donate_argnums=0,
    in_shardings=(carry, whole, whole),
    out_shardings=(carry, whole, whole, whole),
  )
