"""How much memory a run needs, from its compiled programs, before it runs.

What stays in memory follows from shapes; what a program needs on top is the
compiler's analysis of the run's programs, over its mesh. Evaluations and the
making of the first state are left out.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments import build
from experiments.build import capacity, programs
from experiments.files.errors import shown
from experiments.runtime import compile_targets, compiled

# What jax's error for want of memory begins with.
FULL = 'RESOURCE_EXHAUSTED'
_COPIES = 'copies that act'
# The settings that change what a program needs.
_CHANGES = {
  'act': ('num_envs',),
  'frames': ('batch_size', 'frames_on'),
  'update': ('batch_size', 'rollout_batch'),
  'refresh': ('reanalyze_chunk', 'batch_size'),
  'interval': ('batch_size', 'reanalyze_chunk', 'num_envs'),
}


class Need(NamedTuple):
  """Something that takes memory.

  Attributes:
    fields: `name=value` of the settings that change it.
    device: bytes on each device; infinite if the compiler gives up.
    host: bytes on each host.
    stays: False if it is free again when a program ends; only the largest such
      need counts.
  """

  what: str
  fields: tuple[str, ...]
  device: float
  host: float = 0.0
  stays: bool = True


class Plan(NamedTuple):
  """The memory of a phase of a run.

  Attributes:
    machine: its devices, for people.
    has: bytes of each device; 0 if unknown, or if they are the host's.
    host_has: bytes of each host; 0 if unknown.
    on_host: devices whose memory is the host's.
  """

  phase: str
  rows: tuple[Need, ...]
  machine: str
  has: int
  host_has: int
  on_host: int = 0

  @property
  def counted(self) -> list[Need]:
    """The rows that are in memory at once, largest first."""
    passing = [row for row in self.rows if not row.stays]
    largest = max(passing, key=lambda row: row.device, default=None)
    some = [row for row in self.rows if row.stays or row is largest]
    return sorted(some, key=lambda row: -max(row.device, row.host))

  @property
  def device(self) -> float:
    """Bytes that a device must have."""
    return sum(row.device for row in self.counted)

  @property
  def host(self) -> float:
    """Bytes that a host must have, its devices' included if they are its."""
    on_host = self.on_host * self.device if self.on_host else 0.0
    return on_host + sum(row.host for row in self.rows)


def of_phase(
  experiment: build.Experiment,
  layout: build.Layout,
  phase: tuple[str, Any, Any, Any],
  target: compile_targets.Target | None = None,
) -> Plan:
  """Compiles a phase's programs, and adds up what they and the run need.

  Args:
    layout: its devices need not be there.
    phase: from `programs.phases`.
    target: the machine, if it is not this one.
  """
  import jax

  (name, agent, source, spec), mesh, sharding = phase, layout.mesh, None
  if mesh.size > 1:
    sharding = build.state_sharding(experiment, agent, mesh)
  rows = _kept(experiment, layout, agent, source, spec, sharding)
  held = sum(row.device for row in rows if row.stays and row.what != _COPIES)
  wanted = ['frames', 'update', 'refresh']
  if source is not None and source.is_pure:
    wanted = ['interval']
  elif source is None and not layout.acting:
    wanted.append('act')
  in_parallel = experiment.run.acting == 'asynchronous'
  arguments = (experiment, agent, source, spec, mesh, '', sharding)
  for program in programs.of_agent(*arguments):
    if (part := program.part) not in wanted:
      continue
    found, size, code = _compiled(program), math.inf, 0
    if found is not None:
      size, code = found.temporaries + found.results, found.code
      if part in ('update', 'interval'):
        # Compilers for accelerators fill arrays up to whole tiles.
        rows.append(
          Need('padding and keys', (), max(found.arguments - held, 0.0))
        )
    rows.append(Need(f'code of {part}', (), code))
    stays = part == 'act' and in_parallel
    fields = settings(experiment, *_CHANGES[part])
    rows.append(Need(f'program {part}', fields, size, 0.0, stays))
  first = mesh.devices.flat[0]
  machine = f'{mesh.size} x {first.device_kind}'
  some = tuple(row for row in rows if row.device or row.host)
  if target is not None:
    return Plan(name, some, machine, compile_targets.usable(target), 0)
  host = capacity.machine_memory()
  if first.platform != 'cpu':
    return Plan(name, some, machine, capacity.device_memory() or 0, host)
  own = [d for d in mesh.devices.flat if d in jax.local_devices()]
  return Plan(name, some, machine, 0, host, len(own))


def _compiled(program: programs.Program) -> compiled.Memory | None:
  """A program's memory; None if its compiler finds that it cannot fit."""
  import jax

  try:
    return compiled.memory(program.trace().lower().compile())
  except jax.errors.JaxRuntimeError as error:
    if FULL not in str(error):
      raise
    return None


def _kept(experiment, layout, agent, source, spec, sharding) -> list[Need]:
  """What is in memory whatever is computed."""
  import jax
  import numpy as np

  from experiments.runtime import loop
  from experiments.runtime import mesh as meshes

  mesh, whole = layout.mesh, meshes.replicated(layout.mesh)
  state = jax.eval_shape(agent.init, jax.random.key(0))
  total = _shards(state, sharding or whole)
  params = _shards(state.params, sharding.params if sharding else whole)
  network = (f'network={experiment.agent_name}',)
  rows = [
    Need('parameters', network, params),
    Need('optimiser and other state', network, total - params),
  ]
  batch = programs.batch_of(experiment, agent, source, spec)
  batch = Need(
    'batch',
    settings(experiment, 'batch_size'),
    _shards(batch, meshes.split(mesh)),
  )
  if source is not None and source.is_pure:
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry = jax.eval_shape(lambda key: loop.init(agent, source, key), key)
    where = meshes.carry_sharding(mesh, source).source
    # The batch is part of the interval.
    batch = batch._replace(what='batch, in the interval', stays=False)
    return [*rows, *_pure(experiment, carry.source, where), batch]
  rows.append(batch)
  if source is not None:
    data = jax.tree.leaves(experiment.material.rows(experiment))
    # Files that are mapped may be larger than memory.
    held = sum(x.nbytes for x in data if not isinstance(x, np.memmap))
    return [*rows, Need('data', _data(experiment), 0.0, held)]
  if experiment.run.acting == 'asynchronous' and not layout.acting:
    # The next copy is made before the last one goes.
    copies = 2 * layout.parts / mesh.size * params
    rows.append(Need(_COPIES, network, copies))
  processes = len({d.process_index for d in mesh.devices.flat})
  held, frames = capacity.host_replay(experiment, agent, spec)
  fields = settings(experiment, 'replay_capacity')
  rows.append(Need('replay', fields, 0.0, held / processes))
  if frames:
    # Of the device with most parts.
    frames *= -(-layout.parts // mesh.size) / layout.parts
    fields += settings(experiment, 'frames_on')
    rows.append(Need('frames of the replay', fields, frames))
  return rows


def _pure(experiment, state, where) -> Iterator[Need]:
  """The state of a pure source, divided over the devices or whole on each."""
  size, replay = _shards(state, where), getattr(state, 'replay', None)
  if not experiment.material.acts:
    yield Need('data', _data(experiment), size)
    return
  kept = 0.0 if replay is None else _shards(replay, where)
  yield Need('replay', settings(experiment, 'replay_capacity'), kept)
  yield Need('environments', settings(experiment, 'num_envs'), size - kept)


def _data(experiment) -> tuple[str, ...]:
  material, path = experiment.material, shown(experiment.where, 60)
  more = settings(experiment, *material.sizes)
  return (f'{material.flag}={path}', *more)


def _shards(tree: Any, shardings: Any) -> float:
  """Bytes of arrays on each device, by a prefix tree of their shardings."""
  import jax

  def one(sharding, part):
    return sum(
      math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(part)
    )

  return float(sum(jax.tree.leaves(jax.tree.map(one, shardings, tree))))


def settings(experiment: build.Experiment, *names: str) -> tuple[str, ...]:
  """`name=value` of those settings that the experiment has."""
  sections = (experiment.config, experiment.env, experiment.run)
  return tuple(
    f'{name}={getattr(section, name)}'
    for name in names
    for section in sections
    if hasattr(section, name)
  )
