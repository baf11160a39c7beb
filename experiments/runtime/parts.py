"""Experience in parts, so that devices and processes hold and sample their own.

A run has a fixed number of parts. Each has a share of the environments, of the
replay's capacity and of the batch, its own keys and its own folder. What a part
does depends on its number alone, so other devices or processes give the same
numbers.

On the host, processes get equal consecutive blocks: of N parts, process p of P
holds p N / P to (p + 1) N / P - 1. Learning devices share a process's parts
likewise, acting devices round robin. A run may resume with any number of
processes that divides its parts, if all can read its folder. Pure parts are
stacked along a leading axis that is split over the devices.

In expectation the parts give what one replay of everything gives: a row's
importance weight carries its part's total priority (`agents.core.replay`'s
`scale`), and ages count the decisions of all parts. New rows get the largest
priority of their own part. A batch's rows come part by part.

Axes: `N` parts, `B` windows of a batch.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from agents.core.replay import joined_weights
from agents.core.types import Info, Sample, Trajectory
from experiments.files import arrays, reading
from experiments.files.errors import UserError
from experiments.runtime import keys, replay
from experiments.runtime import mesh as meshes
from experiments.runtime.integrity import Damaged
from experiments.runtime.persistence import Held, Persistence
from experiments.runtime.sources import Measures, Source


def choose(wanted: int, saved: int, sizes: dict[str, int], mesh: Mesh) -> int:
  """How many parts a run has.

  It is `wanted` by the user or `saved` in the run's checkpoint, each 0 for
  none, or else the largest number up to the mesh's devices that divides all
  sizes, given by field, and is a multiple of the processes.

  Raises:
    ValueError: it does not divide, or differs from what is saved.
  """
  processes = len({d.process_index for d in mesh.devices})
  if wanted and saved and wanted != saved:
    raise ValueError(
      f'parts={wanted}: this run was begun with parts={saved}; leave it out, '
      'or begin a new run in another folder'
    )
  number = wanted or saved
  if not number:
    fitting = [
      n
      for n in range(processes, mesh.size + 1, processes)
      if not any(size % n for size in sizes.values())
    ]
    number = max(fitting, default=processes)
  for name, size in sizes.items():
    if size % number:
      raise ValueError(
        f'{name}={size}: must be a multiple of the {number} parts that '
        f'{processes} processes share'
        if processes > 1
        else f'{name}={size}: must be a multiple of parts={number}'
      )
  if number % processes:
    raise ValueError(
      f'parts={number}: {processes} processes cannot share them equally; take '
      'a number of processes that divides it'
    )
  return number


def held(number: int) -> range:
  """The parts that this process holds."""
  share = number // jax.process_count()
  first = jax.process_index() * share
  return range(first, first + share)


def homes(number: int, mesh: Mesh) -> list[Any]:
  """The devices that the windows of this process's parts go to, in order."""
  devices, count = meshes.local_devices(mesh), len(held(number))
  return [devices[i * len(devices) // count] for i in range(count)]


def part_key(key: Any, part: Any, number: int) -> Any:
  """A part's key; a single part has the run's own."""
  return key if number == 1 else keys.fold_in(key, part)


class _Acting:
  """What acting sees of an agent's state, on one device when it looks."""

  def __init__(self, agent_state: Any):
    self._state = agent_state

  @functools.cached_property
  def params(self) -> Any:
    return meshes.local(self._state.params)


class _Only(NamedTuple):
  """What the feedback of a part sees of its windows."""

  sample: Sample


class State(NamedTuple):
  """State of `hosted`: of each part of this process, and its last `Sample`.

  Attributes:
    pending: `drawn` and the priorities of the update that the parts have not
      been given yet; None after a restart.
  """

  parts: list[Any]
  drawn: list[Sample]
  pending: tuple[list[Sample], Any] | None = None


def hosted(
  parts: Sequence[Source], number: int, mesh: Mesh, batch_size: int
) -> Source:
  """Parts on the host as one source of global batches of `Trajectory`s.

  `parts` are those that this process holds of `number` (N), in order, each with
  windows of `batch_size / number`. Batches are split over the mesh, part by
  part; counts are this process's.

  The parts get the priorities of an update one update late, or at a restart,
  which comes before each save: to read them at once is to wait for the device,
  which would then wait for its next batch.

  Raises:
    ValueError: a batch that the devices cannot share.
  """
  if batch_size % mesh.size:
    raise ValueError(
      f'batch_size={batch_size}: must be a multiple of the {mesh.size} devices'
    )
  numbers = held(number)
  home = homes(number, mesh)
  joined = _join(mesh, number)
  # Of the whole batch, the same on all processes.
  age = jax.jit(jnp.mean, out_shardings=meshes.replicated(mesh))

  def keys_of(key):
    return [part_key(key, k, number) for k in numbers]

  def init(key):
    states = [part.init(k) for part, k in zip(parts, keys_of(key))]
    return State(states, [])

  def next_(state: State, agent_state, step, key):
    acting = _Acting(agent_state)
    states, batches, measures = [], [], []
    for part, old, device, k in zip(parts, state.parts, home, keys_of(key)):
      with jax.default_device(device):
        new, batch, measured = part.next(old, acting, step, k)
      states.append(new)
      batches.append(batch)
      measures.append(measured)
    drawn = [batch.sample for batch in batches]
    state = State(states, drawn, state.pending)
    batch, measured = joined(batches), _together(measures)
    if number > 1 and batch.sample is not None:
      measured.gauges['replay_age'] = age(batch.sample.age)
    return state, batch, measured

  def feedback(state: State, batch, info):
    del batch
    if info.priorities is None:
      return state
    return heard(state)._replace(pending=(state.drawn, info.priorities))

  def heard(state: State) -> State:
    if state.pending is None:
      return state
    samples, priorities = state.pending
    priorities = np.asarray(priorities)
    size = batch_size // number
    states = []
    for k, part, old, drawn in zip(numbers, parts, state.parts, samples):
      own = Info({}, priorities[k * size : (k + 1) * size])
      states.append(part.feedback(old, _Only(drawn), own))
    return State(states, state.drawn)

  def save(state: State, directory, step):
    saved = {}
    for k, part, old in zip(numbers, parts, state.parts):
      assert part.kept is not None
      folder = _folder(directory, k)
      saved[folder.name] = part.kept.save(old, folder, step)
    return Held(saved), {'parts': number}

  def load(arrays: Held, facts, directory, key):
    del facts
    states = []
    for k, part, part_key in zip(numbers, parts, keys_of(key)):
      assert part.kept is not None
      folder = _folder(directory, k)
      saved, own = arrays.parts[folder.name]
      states.append(part.kept.load(saved, own, folder, part_key))
    return State(states, [])

  def template():
    found = {}
    for k, part in zip(numbers, parts):
      assert part.kept is not None
      found[_folder('', k).name] = part.kept.template(), {}
    return Held(found)

  def prune(directory, rows):
    for k, part in zip(numbers, parts):
      folder = _folder(directory, k)
      own = [
        {
          name.removeprefix(f'{folder.name}/'): must_be
          for name, must_be in some.items()
          if name.startswith(f'{folder.name}/')
        }
        for some in rows
      ]
      kept = part.kept
      if kept is not None and kept.prune is not None:
        kept.prune(folder, own)

  def restart(state: State, step):
    state = heard(state)
    states = [part.restart(old, step) for part, old in zip(parts, state.parts)]
    return State(states, state.drawn)

  def close(state: State):
    for part, old in zip(parts, state.parts):
      part.close(old)

  def rest(state: State):
    states = [
      old if part.rest is None else part.rest(old)
      for part, old in zip(parts, state.parts)
    ]
    return state._replace(parts=states)

  return Source(
    init,
    next_,
    feedback,
    lambda: None,
    is_pure=False,
    kept=Persistence(save, load, template, prune, restart, close),
    rest=rest if parts[0].rest is not None else None,
    derives=all(part.derives for part in parts),
  )


def _join(mesh: Mesh, number: int) -> Callable[[list[Trajectory]], Trajectory]:
  """Puts the parts' windows together, split over the mesh."""
  rows = meshes.split(mesh)
  devices = meshes.local_devices(mesh)
  weigh = jax.jit(lambda drawn: _weigh(drawn, number), out_shardings=rows)

  def spread(*leaves):
    size, left = divmod(len(leaves), len(devices))
    if left:  # more devices than parts, or an uneven deal
      whole = np.concatenate([np.asarray(x) for x in leaves])
      pieces = np.split(whole, len(devices))
    elif size == 1:
      pieces = leaves
    else:
      pieces = [
        _concatenated(some, device)
        for some, device in zip(_groups(leaves, size), devices)
      ]
    shape = (leaves[0].shape[0] * number, *leaves[0].shape[1:])
    pieces = [jax.device_put(x, d) for x, d in zip(pieces, devices)]
    return jax.make_array_from_single_device_arrays(shape, rows, pieces)

  def join(batches: list[Trajectory]) -> Trajectory:
    batch = batches[0]
    assert batch.sample is not None
    if number == 1 and mesh.size == 1:
      return batch._replace(sample=batch.sample._replace(scale=None))
    batch = jax.tree.map(spread, *batches)
    return batch._replace(sample=weigh(batch.sample))

  return join


def _concatenated(some: Sequence[Any], device: Any) -> Any:
  if all(isinstance(x, np.ndarray) for x in some):
    return np.concatenate(some)
  return jnp.concatenate([jax.device_put(x, device) for x in some])


def _groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  return [items[i : i + size] for i in range(0, len(items), size)]


def _weigh(drawn: Sample, number: int) -> Sample:
  if number == 1:
    return drawn._replace(scale=None)
  # A part has seen its share of the decisions.
  return joined_weights(drawn._replace(age=drawn.age * number))


def _together(measures: list[Measures]) -> Measures:
  """Sums of the counts and means of the gauges."""
  if len(measures) == 1:
    return measures[0]
  counts: dict[str, float] = {}
  gauges: dict[str, list[float]] = {}
  for measured in measures:
    for name, value in measured.counts.items():
      counts[name] = counts.get(name, 0.0) + float(value)
    for name, value in measured.gauges.items():
      gauges.setdefault(name, []).append(float(value))
  means = {name: sum(xs) / len(xs) for name, xs in gauges.items()}
  return Measures(counts, means)


def _folder(directory, part: int) -> pathlib.Path:
  return pathlib.Path(directory) / f'part_{part:04d}'


def read_old(directory: Any, step: int, templates: dict[str, Any]) -> Held:
  """Parts as releases before `Held` saved them, in files of their own.

  Raises:
    Damaged: a part is missing or not as it was written.
  """
  found = {}
  for name, template in templates.items():
    paths, tree = jax.tree_util.tree_flatten_with_path(template)
    expected: dict[str, Any] = {
      jax.tree_util.keystr(path): (x.dtype, x.shape) for path, x in paths
    }
    path = pathlib.Path(directory) / name / f'state_{step:012d}.npz'
    facts = {'facts': (np.dtype(np.uint8), None)}
    try:
      saved = arrays.read_npz(path, expected | facts)
      known = reading.decode_json(
        saved.pop('facts').tobytes(), dict[str, Any], str(path)
      )
    except UserError as error:
      raise Damaged(str(error)) from error
    known['rows'] = replay.files_of(known['replay'])
    leaves = [saved[keystr] for keystr in expected]
    found[name] = jax.tree_util.tree_unflatten(tree, leaves), known
  return Held(found)


def stacked(part: Source, number: int, mesh: Mesh) -> Source:
  """`number` (N) pure parts as one pure source of global `Trajectory`s.

  All leaves of its state are `[N, ...]`, to be split over the mesh; a part
  needs no other device.

  Raises:
    ValueError: the devices cannot share the parts equally.
  """
  if number % mesh.size:
    raise ValueError(
      f'parts={number}: must be a multiple of the {mesh.size} devices that the '
      f'environment is compiled for; take devices={math.gcd(number, mesh.size)}'
    )
  rows, whole = PartitionSpec(meshes.AXIS), PartitionSpec()

  def everywhere(function, *in_specs):
    # Nothing is differentiated here, and no value is the same on all devices.
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=rows,
      check_vma=False,
    )

  def init(key):
    keys = jax.vmap(lambda k: part_key(key, k, number))(jnp.arange(number))
    return jax.vmap(part.init)(keys)

  def next_(state, agent_state, step, key):
    def some(state, numbers, agent_state, step, key):
      one = lambda s, k: part.next(
        s, agent_state, step, part_key(key, k, number)
      )
      return jax.vmap(one)(state, numbers)

    state, batch, measures = everywhere(some, rows, rows, whole, whole, whole)(
      state, jnp.arange(number), agent_state, step, key
    )
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    batch = batch._replace(sample=_weigh(batch.sample, number))
    batch = jax.lax.with_sharding_constraint(batch, meshes.split(mesh))
    counts = jax.tree.map(lambda x: jnp.sum(x, 0), measures.counts)
    gauges = jax.tree.map(lambda x: jnp.mean(x, 0), measures.gauges)
    gauges['replay_age'] = jnp.mean(batch.sample.age)
    return state, batch, Measures(counts, gauges)

  def feedback(state, batch, info):
    def some(state, sample, priorities):
      one = lambda s, drawn, p: part.feedback(s, _Only(drawn), Info({}, p))
      return jax.vmap(one)(state, sample, priorities)

    apart = lambda x: x.reshape(number, -1, *x.shape[1:])
    sample, priorities = jax.tree.map(apart, (batch.sample, info.priorities))
    return everywhere(some, rows, rows, rows)(state, sample, priorities)

  return Source(
    init, next_, feedback, lambda: None, is_pure=True, rest=part.rest
  )
