"""Checkpoints: whole carries, asynchronous and atomic, on orbax's v1.

A step is written to a temporary folder and renamed when it is complete: a
kill at any moment leaves the steps before it as they were. Each step holds

- `meta/data.json`: the schema's version, one line for each leaf of the carry
  (path, dtype, shape; the value itself of Python numbers and strings) and the
  caller's `extra`, readable without knowing the carry;
- `leaves`: the arrays;
- `meta/sums.json`: size and CRC-32 of every file of these two.

The sums are checked when a folder is opened, for orbax itself notices neither
a changed byte of an array nor every missing file. A newest step that is
damaged is set aside as `N.corrupt` and the one before it taken.

The tree's structure comes from a template on restoring, leaf by leaf checked
against what was saved. That also lets leaves through that orbax refuses:
numpy scalars, bytes, zero-size arrays, empty containers.

With several processes, `jax.Array`s are saved by all of them together, numpy
arrays by the first alone: what is local to a host needs a folder a host. The
first process alone checks for damage, and tells the others which step it is.
"""

import json
import logging
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.files.errors import UserError, shown
from experiments.runtime import integrity

SCHEMA = 1


class Checkpoints(NamedTuple):
  """The checkpoints of one folder.

  Attributes:
    save: `(step, carry, extra=None) -> None`, starts writing and returns as
      soon as the carry may be changed or donated; waits for the save before.
      `extra` is a JSON dictionary. A step that is already there is left alone.
    peek: `() -> (step, extra)` of the latest step, or None: what is needed to
      build the template (the phase's number).
    restore: `(template) -> (carry, extra)` of the latest step, or None.
      `template` has the carry's structure; its leaves are arrays or
      `jax.ShapeDtypeStruct`s and say what is wanted back: numpy arrays, or
      `jax.Array`s with their sharding.
    latest_step: `() -> int` or None. Like all that reads, it waits for the
      save before.
    reject: `(why) -> None`, sets the latest step aside, with a printed line,
      for what its owner keeps beside it is damaged. All processes call it.
    wait: `() -> None`, until the last save is complete; raises what it met.
    close: `() -> None`, waits and lets go of the folder.
  """

  save: Callable[..., None]
  peek: Callable[[], tuple[int, dict[str, Any]] | None]
  restore: Callable[[Any], tuple[Any, dict[str, Any]] | None]
  latest_step: Callable[[], int | None]
  reject: Callable[[str], None]
  wait: Callable[[], None]
  close: Callable[[], None]


def open(
  directory: str | os.PathLike, keep: int = 2, read_only: bool = False
) -> Checkpoints:
  """Opens a folder of checkpoints, which one process may write.

  Args:
    directory: made where it is missing.
    keep: how many of the latest steps stay.
    read_only: for a reader beside a running writer: makes no folder and does
      not tidy up unfinished steps, which are the writer's.

  Prints one line for each damaged step that it passes over.

  Raises:
    UserError: `keep` below 1, or nothing to read.
    Damaged: (from `restore`, `peek`, `latest_step`) every step is damaged;
      they are set aside if something is saved nevertheless.
    UserError: (from `reject`) there is no step before it.
    UserError: (from `restore`, `peek`) written by a newer release or by
      another program; (from `restore`) a template of another structure,
      shape or dtype; (from `save`) a leaf that is no array, number, string
      or bytes.
    UserError: (from all, for the save before) it could not be written: the
      disk is full or refuses. The steps before it are whole.
  """
  if keep < 1:
    raise UserError(f'keep is {keep}, must be at least 1')
  root = pathlib.Path(directory).resolve()
  if read_only and not root.is_dir():
    raise UserError(f'no checkpoints in {root}')
  from orbax.checkpoint import v1 as ocp

  logging.getLogger('absl').addFilter(integrity.is_news)
  newest, hopeless = integrity.settle(root, read_only)
  training: Any = ocp.training  # its own types do not fit each other
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='meta')
  context = ocp.Context()
  context.checkpointables.registry = registry
  writing: int | None = None
  # Called by the writing thread when all is written, before the renaming.
  context.async_options.post_finalization_callback = lambda: integrity.seal(
    root, writing
  )
  keeper = training.Checkpointer(
    root,
    context=context,
    preservation_policy=training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=not read_only,
  )

  def wait() -> None:
    with integrity.saving(writing, root):
      keeper.wait()

  def latest_step() -> int | None:
    wait()  # a step being written counts as there, but cannot be read
    if hopeless:
      raise integrity.Damaged(hopeless)
    if read_only:
      return newest  # damaged ones are still in their place
    return keeper.latest.step if keeper.latest else None

  def save(step: int, carry: Any, extra: dict[str, Any] | None = None) -> None:
    import jax

    nonlocal hopeless, writing
    wait()
    if hopeless:
      integrity.set_aside(root)
      keeper.reload()
      hopeless = None
    if any(saved.step == step for saved in keeper.checkpoints):
      return
    entries, arrays = _pack(carry)
    meta = {'schema': SCHEMA, 'extra': extra or {}, 'leaves': entries}
    # A round trip: the writer's thread must not see later changes.
    items = {'meta': json.loads(json.dumps(meta))}
    if arrays:  # orbax fails on an empty tree
      items['leaves'] = arrays
    writing = step
    with integrity.saving(step, root):
      keeper.save_checkpointables_async(step, items, force=True)
      if jax.process_count() > 1:
        # orbax names its barriers by the step, whatever the folder: of two
        # saves on their way at once one would meet the other's.
        keeper.wait()

  def close() -> None:
    with integrity.saving(writing, root):
      keeper.close()

  def read_meta(step: int) -> dict[str, Any]:
    where = f'the checkpoint {root}/{step}'
    try:
      meta = keeper.load_checkpointables(step, {'meta': None})['meta']
      schema = int(meta['schema'])
    except (KeyError, TypeError, FileNotFoundError) as error:
      raise UserError(f'{where} was not written by Outplay') from error
    if schema > SCHEMA:
      raise UserError(
        f'{where} has schema {schema}, this release reads up to {SCHEMA}: '
        'use the release that wrote it, or a newer one'
      )
    return meta

  def peek() -> tuple[int, dict[str, Any]] | None:
    step = latest_step()
    return None if step is None else (step, read_meta(step)['extra'])

  def restore(template: Any) -> tuple[Any, dict[str, Any]] | None:
    step = latest_step()
    if step is None:
      return None
    meta = read_meta(step)
    differences = _differences(meta['leaves'], template)
    if differences:
      more = len(differences) - 3
      raise UserError(
        f'the checkpoint {root}/{step} does not fit this run: '
        + '; '.join(differences[:3])
        + (f'; and {more} more' if more > 0 else '')
        + '; another agent, network or release has written it'
      )
    slots = _slots(meta['leaves'], template)
    wanted = {s.number: _wanted(s) for s in slots if s.is_stored()}
    arrays = {}
    if wanted:
      arrays = keeper.load_checkpointables(step, {'leaves': wanted})['leaves']
    leaves = [_unpack(slot, arrays) for slot in slots]
    carry = _flatten(template)[2].unflatten(leaves)
    return carry, meta['extra']

  def reject(why: str) -> None:
    step = latest_step()
    assert step is not None
    older = [saved.step for saved in keeper.checkpoints if saved.step < step]
    if not older:
      raise UserError(
        f'the only checkpoint in {root}, step {step}, is damaged ({why}): put '
        'back a copy of it, or delete the run to begin it anew'
      )
    integrity.set_aside(root, step)
    keeper.reload()
    if integrity.is_first():
      print(
        f'note: the checkpoint {shown(root)}/{step} is damaged ({shown(why)}): '
        f'it is set aside as {step}.corrupt, step {max(older)} is taken',
        flush=True,
      )

  return Checkpoints(save, peek, restore, latest_step, reject, wait, close)


class Best(NamedTuple):
  """The best by a metric, beside the latest.

  Attributes:
    save: `(step, metric, params, extra=None) -> bool`, keeps `params` if
      `metric` exceeds all before it (never if it is NaN); whether it did.
    metric: `() -> float`, of the best, or None.
    restore: `(template) -> (params, extra)`, or None; `extra` has `step` and
      `metric` in it.
    close: `() -> None`.
  """

  save: Callable[..., bool]
  metric: Callable[[], float | None]
  restore: Callable[[Any], tuple[Any, dict[str, Any]] | None]
  close: Callable[[], None]


def best(directory: str | os.PathLike, read_only: bool = False) -> Best:
  """Opens a folder that holds the best parameters so far; see `open`."""
  checkpoints = open(directory, keep=1, read_only=read_only)

  def metric() -> float | None:
    found = checkpoints.peek()
    return None if found is None else found[1]['metric']

  lost = False
  try:
    held = metric()
  except integrity.Damaged as error:
    if read_only:
      raise
    print(f'note: {shown(error)}; the next best takes its place', flush=True)
    held, lost = None, True

  def save(
    step: int, metric: float, params: Any, extra: dict[str, Any] | None = None
  ) -> bool:
    nonlocal held, lost
    metric = float(metric)
    if math.isnan(metric) or (held is not None and metric <= held):
      return False
    # Counted, not named by the step: a run that was killed may come to an
    # earlier step than the best one of its lost future.
    number = None if lost else checkpoints.latest_step()
    checkpoints.save(
      0 if number is None else number + 1,
      params,
      {**(extra or {}), 'step': int(step), 'metric': metric},
    )
    held, lost = metric, False
    return True

  return Best(save, lambda: held, checkpoints.restore, checkpoints.close)


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
  import jax

  leaves, treedef = jax.tree.flatten_with_path(tree)
  paths = [jax.tree_util.keystr(path) for path, _ in leaves]
  return paths, [leaf for _, leaf in leaves], treedef


def _is_key(leaf: Any) -> bool:
  import jax

  return hasattr(leaf, 'dtype') and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _is_value(leaf: Any) -> bool:
  # numpy's float64 is a Python float too.
  return isinstance(leaf, bool | int | float | str) and not isinstance(
    leaf, np.generic
  )


def _describe(path: str, leaf: Any) -> dict[str, Any]:
  """What is written of one leaf: path, dtype, shape, perhaps the value."""
  if _is_value(leaf):
    name = f'python {type(leaf).__name__}'
    return {'path': path, 'dtype': name, 'shape': [], 'value': leaf}
  if isinstance(leaf, bytes):
    return {'path': path, 'dtype': 'bytes', 'shape': [len(leaf)]}
  dtype = getattr(leaf, 'dtype', None)
  plain = isinstance(dtype, np.dtype) and (
    not dtype.hasobject and dtype.names is None and dtype.kind not in 'USMm'
  )
  if not (plain or _is_key(leaf)):
    raise UserError(
      f'cannot save {path or "the carry"}: it is a {type(leaf).__name__}'
      + (f' of {dtype}' if dtype is not None else '')
      + ', not an array, a number, a string or bytes'
    )
  return {'path': path, 'dtype': str(dtype), 'shape': list(leaf.shape)}


def _pack(carry: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The description of all leaves, and the arrays among them by number."""
  import jax

  entries, arrays = [], {}
  for i, (path, leaf) in enumerate(zip(*_flatten(carry)[:2])):
    entries.append(_describe(path, leaf))
    if _is_value(leaf) or 0 in entries[-1]['shape']:
      continue
    if _is_key(leaf):
      leaf = jax.random.key_data(leaf)
    elif isinstance(leaf, bytes):
      leaf = np.frombuffer(leaf, np.uint8)
    elif isinstance(leaf, np.generic):
      leaf = np.asarray(leaf)
    arrays[str(i)] = leaf
  return entries, arrays


def _differences(saved: list[dict[str, Any]], template: Any) -> list[str]:
  """How a template differs from the saved leaves, one phrase each."""

  def text(entry):
    # Bytes may have changed their length, as numbers their value.
    if entry['dtype'].startswith(('python', 'bytes')):
      return entry['dtype']
    return f'{entry["dtype"]}{entry["shape"]}'

  here = {e['path']: e for e in map(_describe, *_flatten(template)[:2])}
  there = {entry['path']: entry for entry in saved}
  found = []
  for path in sorted(here.keys() | there.keys()):
    name = path or 'it'
    if path not in there:
      found.append(f'{name} is not in the checkpoint')
    elif path not in here:
      found.append(f'{name} is only in the checkpoint')
    elif text(here[path]) != text(there[path]):
      found.append(
        f'{name} is {text(there[path])} in the checkpoint, '
        f'{text(here[path])} here'
      )
  return found


class _Slot(NamedTuple):
  """One leaf of a template beside what was saved of it."""

  number: str
  entry: dict[str, Any]
  leaf: Any

  def is_stored(self) -> bool:
    return 'value' not in self.entry and 0 not in self.entry['shape']


def _slots(saved: list[dict[str, Any]], template: Any) -> list[_Slot]:
  # By path: a NamedTuple may have had its fields in another order.
  number = {entry['path']: i for i, entry in enumerate(saved)}
  return [
    _Slot(str(number[path]), saved[number[path]], leaf)
    for path, leaf in zip(*_flatten(template)[:2])
  ]


def _raw(leaf: Any) -> Any:
  """A template's leaf as it is stored: keys are stored as their data."""
  import jax

  if not _is_key(leaf):
    return leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  return jax.eval_shape(jax.random.key_data, leaf)


def _key_impl(leaf: Any) -> Any:
  """The implementation of a key, which may be a `ShapeDtypeStruct`."""
  import jax

  impl = []
  jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
  return impl[0]


def _sharding(leaf: Any) -> Any:
  """Where a template wants an array; None for numpy and the default device."""
  import jax

  if isinstance(leaf, jax.Array) and not leaf.committed:
    return None
  return getattr(leaf, 'sharding', None)


def _wanted(slot: _Slot) -> Any:
  """What orbax is to read: a numpy array unless a sharding is asked for."""
  import jax

  if isinstance(slot.leaf, bytes):
    return np.empty(slot.entry['shape'], np.uint8)
  raw = _raw(slot.leaf)
  sharding = _sharding(raw)
  if sharding is None:
    return np.empty(raw.shape, raw.dtype)
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _unpack(slot: _Slot, arrays: dict[str, Any]) -> Any:
  """One leaf, of the kind that the template has there."""
  import jax
  import jax.numpy as jnp

  if 'value' in slot.entry:
    return slot.entry['value']
  array, leaf = arrays.get(slot.number), slot.leaf
  if isinstance(leaf, bytes):
    return b'' if array is None else array.tobytes()
  raw = _raw(leaf)
  if array is None:
    array = np.zeros(raw.shape, raw.dtype)
  if isinstance(leaf, np.generic):
    return array[()]
  if isinstance(leaf, np.ndarray):
    return array
  if not isinstance(array, jax.Array):
    # A copy: what may be donated shares no memory with numpy.
    array = jnp.array(array)
    if _sharding(raw) is not None:
      array = jax.device_put(array, _sharding(raw))
  if _is_key(leaf):
    return jax.random.wrap_key_data(array, impl=_key_impl(leaf))
  return array
