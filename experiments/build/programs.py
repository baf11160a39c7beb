"""The programs that are compiled: of presets, of searches, of mixtures.

Everything is made of shapes; nothing is computed. Shardings are a run's: the
agent's state whole on every device, its batch split, and what works row by row
(acting, reanalysis) mapped over the devices.
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import presets
from experiments.build import capacity
from experiments.build.agent import make_phases
from experiments.build.experiment import describe, reads_text
from experiments.build.material import Experiment, is_fresh, window_of
from experiments.build.source import Layout, state_sharding

# Rows of batch and environments on each of several devices.
ROWS = 8
PARTS = ('init', 'act', 'frames', 'update', 'refresh', 'interval')


class Program(NamedTuple):
  """A function that can be compiled.

  Attributes:
    what: `agent`, `search` or `experts`.
    name: the preset, rule or backend.
    part: one of `PARTS` for an agent; else what it is of.
    setting: its sizes, for people.
    trace: `() -> ` what `jax.jit(...).trace(...)` returns.
  """

  what: str
  name: str
  part: str
  setting: str
  trace: Callable[[], Any]


def of_preset(
  name: str,
  mesh: Any,
  rows: int,
  folder: pathlib.Path,
  settings: Sequence[str] = (),
) -> Iterator[Program]:
  """The programs of a preset's run, over a mesh with the axis `data`.

  Each device has `rows` of batch and environments; 0 stands for the preset's
  own on one device, `ROWS` on more. `folder` is for a data set or text to learn
  from, and `settings` are changes of the preset, `field=value`.

  Raises:
    ValueError: the preset cannot be made; see `build.describe`.
  """
  dataset = _material(name, folder)
  experiment = describe(name, dataset=dataset, settings=settings)
  if rows or mesh.size > 1:
    if is_fresh(experiment.config) and mesh.size > 1:
      return  # Its streams stay on one device.
    sizes = _sizes(experiment, mesh.size, rows or ROWS)
    experiment = describe(name, dataset=dataset, settings=[*settings, *sizes])
  parts = mesh.size if experiment.material.acts else 1
  found = list(phases(experiment, Layout(mesh, (), parts)))
  for label, agent, source, spec in found:
    suffix = f' ({label})' if len(found) > 1 else ''
    sharding = state_sharding(experiment, agent, mesh)
    yield from of_agent(experiment, agent, source, spec, mesh, suffix, sharding)


def _sizes(plain: Experiment, number: int, each: int) -> list[str]:
  """Settings by which so many devices have so many rows each."""
  rows = each * number
  settings = [f'batch_size={rows}', f'env.num_envs={rows}']
  if not plain.material.acts:
    if hasattr(plain.config, 'rollout_batch'):
      imagined = plain.config.rollout_length * rows
      kept = -(-plain.config.model_capacity // imagined) * imagined
      settings += [f'rollout_batch={rows}', f'model_capacity={kept}']
    return settings
  window = window_of(plain.config)
  kept = max(plain.run.replay_capacity // number, 1000) * number
  return [
    *settings,
    f'warmup_decisions={(window + 1) * rows}',
    f'replay_capacity={kept}',
  ]


def _dataset_of(name: str) -> str:
  """`text`, `data` or '': what a preset learns from besides play."""
  preset = presets.find(name)
  if preset.env:
    return ''
  return 'text' if reads_text(preset.agent) else 'data'


def _material(name: str, folder: pathlib.Path) -> str | None:
  """A small data set or text, written once; shapes alone matter."""
  from experiments.data import layout, npz

  kind = _dataset_of(name)
  if not kind:
    return None
  path = folder / f'{kind}.{"txt" if kind == "text" else "npz"}'
  if path.exists():
    return str(path)
  rng = np.random.default_rng(0)
  if kind == 'text':
    letters = rng.choice(list('abcdefghijklmnopqrstuvwxyz \n'), 500_000)
    path.write_text(''.join(letters))
    return str(path)
  # HalfCheetah's sizes.
  steps, observation, action = 2000, 17, 6
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  ends = np.arange(1, steps + 1) % 1000 == 0
  bound = np.ones(action, np.float32)
  npz.save(
    layout.make(
      normal(steps, observation),
      rng.uniform(-1, 1, (steps, action)).astype(np.float32),
      normal(steps),
      normal(steps, observation),
      np.zeros(steps, bool),
      ends,
      layout.About('made up', '', -bound, bound),
    ),
    path,
  )
  return str(path)


def phases(
  experiment: Experiment, layout: Layout
) -> Iterator[tuple[str, Any, Any, Any]]:
  """Name, agent, source and spec of each phase of a run; nothing is begun.

  The source of host simulators is None; the layout's devices need not be there.
  """
  opened = experiment.material.open(experiment, layout.parts)
  for phase in make_phases(experiment, opened.spec):
    source = None
    if not opened.on_host:
      source = opened.make_source(experiment, phase, layout)
    yield phase.name, phase.agent, source, opened.spec


def of_agent(
  experiment: Experiment,
  agent: Any,
  source: Any,
  spec: Any,
  mesh: Any,
  suffix: str = '',
  sharding: Any = None,
) -> Iterator[Program]:
  """The programs of an agent's training, over a mesh with the axis `data`.

  `source` is None for host simulators; `suffix` is added to the programs'
  names; the state is whole on each device without a `sharding`.
  """
  import jax

  from experiments.runtime import loop
  from experiments.runtime import mesh as meshes

  whole, split = meshes.replicated(mesh), meshes.split(mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(agent.init, key)
  batch = batch_of(experiment, agent, source, spec)
  envs = experiment.env.num_envs
  setting = f'batch={jax.tree.leaves(batch)[0].shape[0]}'
  program = lambda part, trace, setting: Program(
    'agent', experiment.name, part + suffix, setting, trace
  )
  yield program(
    'init',
    lambda: jax.jit(agent.init, in_shardings=whole, out_shardings=whole).trace(
      key
    ),
    '',
  )
  if agent.act is not None:
    act = agent.act
    if mesh.size > 1:
      act = meshes.by_rows(act, mesh, (2,))
    acting = (state.params, key, capacity.timestep(spec, envs))
    yield program(
      'act',
      lambda: jax.jit(
        act, in_shardings=(whole, whole, split), out_shardings=split
      ).trace(*acting),
      f'envs={envs}',
    )
  if source is None and experiment.run.frames_on == 'device':
    yield program(
      'frames', lambda: _frames(experiment, agent, spec, mesh), setting
    )
  yield program(
    'update',
    lambda: meshes.jit_update(agent, mesh, sharding).trace(state, batch, key),
    setting,
  )
  if agent.refresh is not None:
    step = jax.ShapeDtypeStruct((), np.int32)
    yield program(
      'refresh',
      lambda: meshes.compile_refresh(agent, mesh, sharding).trace(
        state, batch, step, key
      ),
      setting,
    )
  if source is not None and source.is_pure:
    carry = jax.eval_shape(lambda key: loop.init(agent, source, key), key)
    yield program(
      'interval',
      lambda: meshes.compile_interval(agent, source, mesh, sharding).trace(
        carry, key, 1
      ),
      f'{setting} envs={envs}',
    )


def _frames(experiment: Experiment, agent: Any, spec: Any, mesh: Any) -> Any:
  """What gathers and stacks a device's frames for its share of a batch."""
  import jax

  from experiments.runtime import columns, replay, sources
  from experiments.runtime import mesh as meshes

  run, stack = experiment.run, spec.frame_stack
  steps = window_of(experiment.config) + stack - 1
  drawn = (run.batch_size // mesh.size, steps)

  def rows(x):
    return jax.ShapeDtypeStruct((*drawn, *x.shape[1:]), x.dtype)

  def picked(x):
    shape = (*x.shape[1:-1], x.shape[-1] // stack)
    if not columns.is_image(shape, x.dtype):
      return jax.ShapeDtypeStruct((*drawn, *shape), x.dtype)
    ring = run.replay_capacity // mesh.size, int(np.prod(shape))
    index = jax.ShapeDtypeStruct(drawn, np.int32)
    return columns.Picked(jax.ShapeDtypeStruct(ring, x.dtype), index, shape)

  timestep = capacity.timestep(spec, experiment.env.num_envs)
  row = sources.experience_example(agent, timestep)
  seen = jax.tree.map(picked, row.timestep.observation)
  row = jax.tree.map(rows, row)
  row = row._replace(timestep=row.timestep._replace(observation=seen))
  here = meshes.replicated(meshes.make_mesh([mesh.devices.flat[0]]))
  gather = lambda rows: replay.stacked(rows, stack)
  return jax.jit(gather, in_shardings=here, out_shardings=here).trace(row)


def batch_of(experiment: Experiment, agent: Any, source: Any, spec: Any) -> Any:
  """Shapes of what an update takes, with `of_agent`'s arguments."""
  import jax

  from agents.core import replay
  from experiments.runtime import sources, transitions

  key = jax.eval_shape(lambda: jax.random.key(0))
  if source is not None and not source.is_pure:
    return source.example()
  if source is not None:
    state = jax.eval_shape(agent.init, key)
    step = jax.ShapeDtypeStruct((), np.int32)
    held = jax.eval_shape(source.init, key)
    return jax.eval_shape(source.next, held, state, step, key)[1]
  run = experiment.run
  memory = replay.device_replay(
    capacity=run.replay_capacity,
    batch_size=run.batch_size,
    window=window_of(experiment.config),
    alpha=run.replay_alpha,
  )
  timestep = capacity.timestep(spec, experiment.env.num_envs)
  row = sources.experience_example(agent, timestep)
  kept = jax.eval_shape(memory.init, row)
  batch = jax.eval_shape(memory.sample, kept, key, 1.0)
  if hasattr(experiment.config, 'window'):
    return batch
  return jax.eval_shape(transitions.to_transition, batch)
