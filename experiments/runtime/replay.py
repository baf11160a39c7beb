"""Prioritised replay in the host's memory, and on disk without rewriting.

The semantics are those of `agents.core.replay` (read that first): the same
contents and key give the same windows, up to the rounding of a sum. Here the
state is mutated in place, frames may be compressed without loss, and a batch
carries each frame to the device once: stacks are built there. Or the frames lie
there already (`columns.DeviceColumn`), and a batch carries none: what is drawn,
and all else that a row has, is the host's as before.

On disk, rows are appended as immutable segments `rows_<start>_<stop>_<token>`
(row numbers, a random token). What changes, priorities and cursors, is in the
small *meta* of a checkpoint, with each segment's size and digest. A segment
that no meta names does not count, so a kill between segments and checkpoint
leaves the last checkpoint whole.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from agents.core import replay as core
from agents.core.types import Experience, Sample, Trajectory
from experiments.files import arrays, reading
from experiments.files.arrays import Stored
from experiments.files.errors import UserError
from experiments.runtime import columns, integrity, keys
from experiments.runtime.integrity import Damaged
from experiments.runtime.persistence import Persistence

VERSION = 2


class Segment(NamedTuple):
  """A file of rows `start` to `stop - 1`.

  Attributes:
    token: distinguishes it from another one of the same rows.
    size: bytes; -1 if unknown.
    digest: see `arrays.Stored`; '' if unknown, for the `.npz` of version 1.
  """

  start: int
  stop: int
  token: int
  size: int = -1
  digest: str = ''

  @property
  def name(self) -> str:
    """The file's name."""
    kind = 'bin' if self.digest else 'npz'
    return f'rows_{self.start:012d}_{self.stop:012d}_{self.token}.{kind}'


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a checkpoint holds of a replay besides its priorities."""

  version: int
  count: int
  max_priority: float
  segments: tuple[Segment, ...]


@dataclasses.dataclass
class HostReplayState:
  """A ring on the host, mutated in place.

  Attributes:
    rows: `Experience` of `[T, E, ...]`, each a `columns.Column`.
    priority: float32 `[T, E]`, abs(raw) + EPSILON; 0 before the first write.
    mass: float64 `[T, E]`, priority ** alpha; 0 on an episode's last row.
    alpha: that exponent.
    max_priority: the largest priority so far: what new rows get.
    count: rows written so far.
    segments: the files that hold rows on disk.
  """

  rows: Any
  priority: np.ndarray
  mass: np.ndarray
  alpha: float
  max_priority: float = 1.0
  count: int = 0
  segments: list[Segment] = dataclasses.field(default_factory=list)


def host_replay(
  capacity: int,
  batch_size: int,
  window: int,
  frame_stack: int = 1,
  alpha: float = 0.6,
  compress: bool = False,
  device: Any = None,
) -> core.Replay:
  """A replay in numpy arrays, for simulators on the host.

  Arguments are as in `agents.core.replay`. Images, uint8 `[H, W, C]`, may be
  kept otherwise: `compress` keeps them compressed (zlib, lossless), `device` in
  that device's memory, where their stacks are then gathered. The windows are
  the same.

  Raises:
    ValueError: an argument out of range; in `init`, a capacity too small; in
      `add`, rows of another shape.
  """
  core.check_arguments(capacity, batch_size, window, frame_stack, alpha)
  history = frame_stack - 1
  uniform = keys.Ahead(lambda key: jax.random.uniform(key, (batch_size,)))

  def init(example):
    streams = example.timestep.reward.shape[0]
    size = core.num_rows(capacity, streams, window, frame_stack)

    def column(x):
      return columns.make((size, *x.shape), x.dtype, compress, device)

    timestep = example.timestep
    frame = jax.eval_shape(
      lambda o: core.newest_frame(o, frame_stack), timestep.observation
    )
    example = example._replace(timestep=timestep._replace(observation=frame))
    return HostReplayState(
      rows=jax.tree.map(column, example),
      priority=np.zeros((size, streams), np.float32),
      mass=np.zeros((size, streams), np.float64),
      alpha=alpha,
    )

  def add(state, experience):
    timestep = experience.timestep
    frame = core.newest_frame(
      jax.tree.map(np.asarray, timestep.observation), frame_stack
    )
    experience = experience._replace(
      timestep=timestep._replace(observation=frame)
    )
    size = state.mass.shape[0]
    slot, before = state.count % size, (state.count - 1) % size

    def write(path, column, x):
      if np.shape(x) != column.shape[1:]:
        raise ValueError(
          f'{_name(path)}: shape {np.shape(x)} must be {column.shape[1:]}'
        )
      column[slot] = np.asarray(x)

    if state.count:
      _cut(state, np.array([before]), np.asarray(timestep.is_first)[None])
    jax.tree_util.tree_map_with_path(write, state.rows, experience)
    state.priority[slot] = state.max_priority
    _weigh(state, np.array([slot]))
    state.count += 1
    return state

  def eligible_mass(state):
    mass = state.mass.copy()
    size = mass.shape[0]
    newest, oldest = state.count, max(state.count - size, 0)
    mass[np.arange(max(newest - window + 1, oldest), newest) % size] = 0
    if history:
      # Rows whose history was overwritten, unless their episode starts here.
      early = np.arange(oldest, min(oldest + history, newest))
      first = state.rows.timestep.is_first[early % size]
      seen = np.logical_or.accumulate(first, axis=0)
      mass[early % size] *= seen
    return mass.reshape(-1)

  def sample(state, key, beta):
    mass = eligible_mass(state)
    cdf = np.cumsum(mass)
    if not cdf[-1] > 0:
      raise ValueError(
        f'replay: no window of {window} steps yet in {state.count} rows'
      )
    u = uniform(key).astype(np.float64)
    index = np.searchsorted(cdf, u * cdf[-1], side='right')
    size, streams = state.mass.shape
    slot, stream = index // streams, index % streams
    slots = (slot[:, None] + np.arange(-history, window)) % size
    rows = jax.tree.map(lambda x: x[slots, stream[:, None]], state.rows)
    order = _order(state.count, size, slot)
    drawn = Sample(
      index=index.astype(np.int32),
      generation=(order // size + 1).astype(np.int32),
      weight=core.weights(mass[index], float(beta)).astype(np.float32),
      scale=core.scale(mass[index], cdf[-1], float(beta)).astype(np.float32),
      age=((state.count - 1 - order) * streams).astype(np.float32),
    )
    if history or device is not None:
      experience, valid = stacked(rows, frame_stack)
      return Trajectory(experience, valid, drawn)
    ended = rows.timestep.is_last()[:, :-1]
    behind = np.logical_or.accumulate(ended, axis=1)
    valid = np.pad(~behind, ((0, 0), (1, 0)), constant_values=True)
    return Trajectory(rows, valid, drawn)

  def update(state, drawn, priorities):
    size, streams = state.mass.shape
    index, generation = np.asarray(drawn.index), np.asarray(drawn.generation)
    priorities = np.abs(np.asarray(priorities, np.float32))
    order = _order(state.count, size, index // streams)
    fresh = (order // size + 1 == generation) & np.isfinite(priorities)
    index = index[fresh]
    new = priorities[fresh] + np.float32(core.EPSILON)
    flat = state.priority.reshape(-1)
    flat[index] = 0
    np.maximum.at(flat, index, new)
    state.max_priority = float(new.max(initial=state.max_priority))
    _weigh(state, np.unique(index // streams))
    return state

  def ready(state):
    return bool((eligible_mass(state) > 0).any())

  def persistence(example):
    return Persistence(
      lambda state, directory, step: _kept(*save(state, directory)),
      lambda priority, facts, directory, key: load(
        init(example), directory, priority, facts['replay']
      ),
      lambda: init(example).priority,
      prune,
    )

  return core.Replay(init, add, sample, update, ready, False, persistence)


def _kept(priority, meta):
  return priority, {'replay': meta, 'rows': files_of(meta)}


def save(
  state: HostReplayState, directory: str | os.PathLike
) -> tuple[np.ndarray, dict[str, Any]]:
  """Writes and flushes the rows since the last save.

  Returns a copy of the priorities, float32 `[T, E]`, and the meta, JSON types.
  It changes and deletes no file (see `prune`).

  Raises:
    UserError: the disk refuses, or a link is in a file's place.
  """
  directory = integrity.place(directory)
  size = state.mass.shape[0]
  oldest = max(state.count - size, 0)
  saved = state.segments[-1].stop if state.segments else 0
  start = max(saved, oldest)
  most = min(map(columns.most_rows, jax.tree.leaves(state.rows)))
  while start < state.count:
    # Up to the ring's seam, so that what is written are views.
    stop = min(state.count, (start // size + 1) * size, start + most)
    token = int.from_bytes(os.urandom(4)) >> 1
    segment = Segment(start, stop, token, 0, 'to be known')
    stored = _write_segment(directory / segment.name, state, start, stop)
    state.segments.append(
      segment._replace(size=stored.size, digest=stored.digest)
    )
    start = stop
  state.segments = [s for s in state.segments if s.stop > oldest]
  meta = Meta(VERSION, state.count, state.max_priority, tuple(state.segments))
  return state.priority.copy(), dataclasses.asdict(meta)


def files_of(meta: Mapping[str, Any]) -> dict[str, Stored]:
  """The files that a meta names, with their sizes and digests."""
  segments = [Segment(*s) for s in meta['segments']]
  # Version 1 wrote an empty segment for none.
  return {
    s.name: Stored(s.size, s.digest) for s in segments if s.stop > s.start
  }


def load(
  state: HostReplayState,
  directory: str | os.PathLike,
  priority: np.ndarray,
  meta: Mapping[str, Any],
) -> HostReplayState:
  """The replay as it was when `save` returned these.

  Args:
    state: fresh from `init`, of the same capacity; it is filled and returned.
    priority: float32 `[T, E]`.
    meta: from `save`.

  Raises:
    UserError: another version, another shape.
    Damaged: rows are missing or not as they were written, or the numbers of the
      meta contradict each other.
  """
  import msgspec

  directory = pathlib.Path(directory)
  try:
    known = msgspec.convert(meta, Meta)
  except msgspec.ValidationError as error:
    raise Damaged(f'replay: {error}') from error
  if known.version == 1:
    kept = tuple(s for s in known.segments if s.stop > s.start)
    known = dataclasses.replace(known, version=VERSION, segments=kept)
  if known.version != VERSION:
    raise UserError(
      f'replay: version {known.version} cannot be read, must be {VERSION}'
    )
  priority = np.asarray(priority)
  if priority.shape != state.priority.shape:
    raise UserError(
      f'replay: saved with rows x streams = {priority.shape}, must be '
      f'{state.priority.shape}; use the capacity and streams that it had'
    )
  size = state.mass.shape[0]
  oldest = max(known.count - size, 0)
  _check(known, priority, size)
  state.count, state.max_priority = known.count, known.max_priority
  state.priority[:] = priority
  state.segments = list(known.segments)
  for segment in state.segments:
    _read_segment(directory, state, segment, oldest)
  # Cuts that came after their row was written to disk.
  later = np.arange(oldest + 1, state.count)
  _cut(state, (later - 1) % size, state.rows.timestep.is_first[later % size])
  _weigh(state, np.arange(oldest, state.count) % size)
  return state


def _check(meta: Meta, priority: np.ndarray, size: int) -> None:
  """Refuses numbers that no replay of `size` rows has."""
  oldest = max(meta.count - size, 0)
  if not (np.isfinite(priority) & (priority >= 0)).all():
    raise Damaged('replay: a priority is negative or not finite')
  if not 0 < meta.max_priority < np.inf:
    raise Damaged(f'replay: max_priority={meta.max_priority}: must be above 0')
  starts = [s.start for s in meta.segments]
  stops = [s.stop for s in meta.segments]
  if (
    (stops[-1:] or [0]) != [meta.count]
    or starts[1:] != stops[:-1]
    or any(b <= a for a, b in zip(starts, stops))
    or any(not 0 <= a <= oldest for a in starts[:1])
    or any(a // size != (b - 1) // size for a, b in zip(starts, stops))
  ):
    raise Damaged(f'replay: its files are not those of {meta.count} rows')


def prune(
  directory: str | os.PathLike, needed: Iterable[Mapping[str, Stored]]
) -> None:
  """Deletes the segments that no checkpoint needs, given all their `files_of`.

  Rows newer than all of those stay: a checkpoint that is being written may need
  them.
  """
  names = {name for some in needed for name in some}
  newest = max((int(name.split('_')[2]) for name in names), default=0)
  for path in pathlib.Path(directory).glob('rows_*.*'):
    start = path.name.split('_')[1]
    if path.name not in names and start.isdecimal() and int(start) < newest:
      path.unlink(missing_ok=True)
  for path in pathlib.Path(directory).glob('.rows_*.tmp'):
    path.unlink(missing_ok=True)  # of a run that was killed


@functools.partial(jax.jit, static_argnums=1)
def stacked(rows: Any, frame_stack: int) -> tuple[Experience, jax.Array]:
  """`core.to_window` of rows that were drawn, compiled.

  Args:
    rows: `Experience` of `[B, S - 1 + L, ...]`, frames on the device
      `columns.Picked`.

  Returns:
    `Experience` of `[B, L, ...]`, and which rows are valid, bool `[B, L]`.
  """
  return core.to_window(columns.gathered(rows), frame_stack)


def _order(count, size, slot):
  """Number (from 0) of the row last written to a slot."""
  return count - 1 - (count - 1 - slot) % size


def _weigh(state, slots):
  """Recomputes `mass` of some slots; no window starts at an episode's end."""
  timestep = state.rows.timestep
  last = (timestep.discount[slots] == 0) | timestep.truncated[slots]
  mass = state.priority[slots].astype(np.float64) ** state.alpha
  state.mass[slots] = np.where(last, 0.0, mass)


def _cut(state, slots, next_is_first):
  """Truncates episodes that another one follows though they did not end."""
  timestep = state.rows.timestep
  cut = next_is_first & (timestep.discount[slots] != 0)
  if cut.any():
    timestep.truncated[slots] |= cut
    _weigh(state, slots)


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _write_segment(path, state, start, stop) -> Stored:
  first = start % state.mass.shape[0]
  found = {}
  for key, column in jax.tree_util.tree_leaves_with_path(state.rows):
    last = first + stop - start
    found |= columns.packed(_name(key), column, first, last)
  return arrays.write(path, found)


def _read_segment(directory, state, segment, oldest):
  size = state.mass.shape[0]
  own = {
    _name(key): column
    for key, column in jax.tree_util.tree_leaves_with_path(state.rows)
  }
  expected: dict[str, Any] = {}
  for name, column in own.items():
    expected |= columns.expected(name, column, segment.stop - segment.start)
  must_be = Stored(segment.size, segment.digest)
  try:
    if segment.digest:
      found = arrays.read(directory / segment.name, expected, must_be)
    else:
      found = arrays.read_npz(directory / segment.name, expected)
  except reading.Missing as error:
    raise Damaged(f'replay: {segment.name} is missing') from error
  except UserError as error:
    raise Damaged(f'replay: {error}') from error
  skip = max(oldest - segment.start, 0)
  first = (segment.start + skip) % size
  for name, column in own.items():
    try:
      columns.restore(name, column, first, found, skip)
    except ValueError as error:
      raise Damaged(f'replay: {segment.name}: {error}') from error
