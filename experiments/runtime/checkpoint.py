"""Checkpoints: whole carries, asynchronous and atomic.

A step is written to a temporary folder and renamed when it is complete, so a
kill leaves the steps before it as they were. Each step holds

- `leaves`: the carry's arrays, written and read by orbax, small ones in packs;
- `local_PPPP.bin`: what process P alone had, see `files.arrays`;
- `manifest.json`: see `integrity.Manifest`.

`integrity` checks a folder when it is opened: a damaged newest step is set
aside as `N.corrupt` and the one before it taken. The first step of a run is
read back at once. A template gives the tree's structure, and is checked before
any array is read.

With several processes, `jax.Array`s are saved by all together, numpy arrays by
the first, and what one process alone has as `local`.
"""

import dataclasses
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from experiments.files import arrays as files
from experiments.files import writing
from experiments.files.arrays import Stored
from experiments.files.errors import UserError, shown
from experiments.runtime import integrity, orbax_arrays
from experiments.runtime.integrity import Leaf, Local, Manifest


class Checkpoints(NamedTuple):
  """The checkpoints of one folder.

  Attributes:
    save: `(step, carry, extra=None, local=None, rows=None) -> None`, waits for
      the save before, starts writing and returns as soon as the carry may be
      changed or donated. `extra` is a JSON dictionary; `local` maps names to
      `(arrays, facts)` of this process; `rows` maps files outside the
      checkpoints to their `Stored`. An existing step stays.
    peek: `() -> (step, extra)` of the latest step, or None.
    restore: `(template, inside='') -> (carry, extra)` of the latest step, or
      None. `template` has the structure of the carry, or of the part whose
      paths begin with `inside`; its leaves, arrays or `jax.ShapeDtypeStruct`s,
      say what is wanted: numpy arrays, or `jax.Array`s with their sharding.
    restore_local: `({name: template}) -> {name: (arrays, facts)}` of the latest
      step, whichever process saved them.
    latest_step: `() -> int` or None. All that reads waits for the last save.
    reject: `(why) -> None`, sets the latest step aside, with a printed line,
      because its owner's other files are damaged. All processes call it.
    wait: `() -> None`, until the last save is complete; raises its error.
    close: `() -> None`, waits and releases the folder.
  """

  save: Callable[..., None]
  peek: Callable[[], tuple[int, dict[str, Any]] | None]
  restore: Callable[..., tuple[Any, dict[str, Any]] | None]
  restore_local: Callable[..., dict[str, tuple[Any, dict[str, Any]]]]
  latest_step: Callable[[], int | None]
  reject: Callable[[str], None]
  wait: Callable[[], None]
  close: Callable[[], None]


def open(
  directory: str | os.PathLike,
  keep: int = 2,
  read_only: bool = False,
  *,
  run: Mapping[str, Any] | None = None,
  check_rows: bool = True,
  pool: futures.Executor | None = None,
) -> Checkpoints:
  """Opens a folder of checkpoints, which one process may write.

  Prints one line for each damaged step that it skips.

  Args:
    keep: number of the latest steps that stay.
    read_only: for a reader while another process writes: makes no folder and
      leaves unfinished steps.
    run: the run's identity, JSON types; steps of another run count as damaged.
      None accepts all.
    check_rows: whether a step whose rows are missing is damaged.
    pool: executor with one thread, which writes; folders that share it are
      written in the order of their saves. None starts one.

  Raises:
    UserError: `keep` below 1, nothing to read, or a link; `reject` finds no
      step before; `restore` has a template of another structure, shape or
      dtype; `save` has a leaf that is not an array, number, string or bytes;
      from all, for the save before: the disk is full or refuses (the steps
      before are whole).
    Damaged: from all that reads: every step is damaged; a new save sets them
      aside.
    Foreign: from all that reads: written by another release or program.
  """
  if keep < 1:
    raise UserError(f'keep={keep}: must be at least 1')
  root = integrity.place(directory)
  if read_only and not root.is_dir():
    raise UserError(f'no checkpoints in {shown(root)}')
  settled = integrity.settle(root, read_only, run, check_rows)
  newest, folder, steps = settled.step, settled.folder, settled.steps
  hopeless, own_pool, known = settled.hopeless, None, None
  if not read_only:
    with writing.writing(root):
      root.mkdir(parents=True, exist_ok=True)
    if integrity.is_first():
      integrity.tidy(root)
  pending: futures.Future | None = None
  tested = False  # whether a step was read back

  def wait() -> None:
    nonlocal pending
    last, pending = pending, None
    if last is not None:
      last.result()

  def latest_step() -> int | None:
    wait()
    if hopeless:
      raise integrity.Damaged(hopeless)
    return newest

  def save(
    step: int,
    carry: Any,
    extra: dict[str, Any] | None = None,
    local: Mapping[str, tuple[Any, dict[str, Any]]] | None = None,
    rows: Mapping[str, Stored] | None = None,
  ) -> None:
    nonlocal hopeless, own_pool, pending
    wait()
    if step in steps:
      return
    if hopeless and integrity.is_first():
      integrity.set_all_aside(root)
    hopeless = None
    # What the writer's thread gets is a copy: nothing changes it any more.
    numbered, local_contents = {}, {}
    leaves = _pack(carry, numbered)
    contents, packs = orbax_arrays.packed(numbered)
    manifest = Manifest(
      integrity.SCHEMA,
      step,
      None if run is None else dict(run),
      json.loads(json.dumps(extra or {})),
      leaves,
      {
        name: Local(_file(), _pack(arrays, local_contents, name), facts)
        for name, (arrays, facts) in (local or {}).items()
      },
      files={},
      rows=dict(rows or {}),
      packs=packs,
    )
    [token] = integrity.agreed([secrets.randbits(59)])
    if _processes() > 1:
      # Together, hence in the main thread.
      write(manifest, contents, local_contents, token)
      return
    if own_pool is None:
      own_pool = pool or futures.ThreadPoolExecutor(1, 'checkpoints')
    pending = own_pool.submit(write, manifest, contents, local_contents, token)

  def write(manifest: Manifest, contents: Any, local: Any, token: int):
    nonlocal newest, folder, known, tested
    step = manifest.step
    update = manifest.extra.get('step', step)
    whole = newest if update == step else None
    with integrity.saving(update, root, whole):
      _write_step(root, manifest, contents, local, token, test=not tested)
    tested = True
    newest, folder, known = step, root / str(step), None
    steps.append(step)
    steps.sort(reverse=True)
    while len(steps) > keep:
      old = steps.pop()
      if integrity.is_first():
        integrity.forget(root, old)

  def close() -> None:
    try:
      wait()
    finally:
      if own_pool is not None and own_pool is not pool:
        own_pool.shutdown()

  def opened() -> tuple[pathlib.Path, Manifest] | None:
    nonlocal known
    if latest_step() is None:
      return None
    assert folder is not None
    if known is None:
      known = integrity.read_manifest(folder)
    return folder, known

  def peek() -> tuple[int, dict[str, Any]] | None:
    found = opened()
    return None if found is None else (found[1].step, found[1].extra)

  def restore(
    template: Any, inside: str = ''
  ) -> tuple[Any, dict[str, Any]] | None:
    found = opened()
    if found is None:
      return None
    where, manifest = found
    numbers, leaves = [], []
    for i, leaf in enumerate(manifest.leaves):
      if leaf.path.startswith(inside):
        numbers.append(str(i))
        path = leaf.path.removeprefix(inside)
        leaves.append(dataclasses.replace(leaf, path=path))

    def read(wanted):
      arrays = orbax_arrays.load(
        where / integrity.LEAVES,
        {numbers[int(name)]: x for name, x in wanted.items()},
        manifest.packs,
        check=manifest.schema > 1,
      )
      return {name: arrays[numbers[int(name)]] for name in wanted}

    return _restore(where, leaves, template, read), manifest.extra

  def restore_local(
    templates: Mapping[str, Any],
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    found = opened()
    assert found is not None, 'nothing is saved'
    back = {}
    for name, template in templates.items():
      own = found[1].local.get(name)
      if own is None:
        raise integrity.Damaged(f'it has no {shown(name)}')
      part = files.mapped(found[0] / own.file)
      read = lambda wanted, name=name, part=part: {
        i: np.array(part(f'{name}/{i}', x.dtype, x.shape))
        for i, x in wanted.items()
      }
      back[name] = _restore(found[0], own.leaves, template, read), own.facts
    return back

  def reject(why: str) -> None:
    nonlocal settled, newest, folder, known, steps
    step = latest_step()
    assert step is not None and folder is not None
    if not steps[1:]:
      raise UserError(
        f'the only checkpoint in {shown(root)}, step {step}, is damaged '
        f'({why}): restore it from a copy, or delete the run to start over'
      )
    if integrity.is_first():
      aside = integrity.set_aside(folder)
      integrity.tell(folder, why, aside, steps[1])
    settled = integrity.settle(root, False, run, check_rows, below=step)
    if settled.step is None:
      raise integrity.Damaged(settled.hopeless or f'{shown(root)} is empty')
    newest, folder, steps = settled.step, settled.folder, settled.steps
    known = None

  return Checkpoints(
    save, peek, restore, restore_local, latest_step, reject, wait, close
  )


def _processes() -> int:
  import jax

  return jax.process_count()


def _write_step(
  root: pathlib.Path,
  manifest: Manifest,
  contents: Mapping[str, Any],
  local: Mapping[str, Any],
  token: int,
  test: bool,
) -> None:
  """Writes a step; all processes together, if there are several."""
  import jax

  number, count = jax.process_index(), jax.process_count()
  folder = integrity.unfinished(root, manifest.step, token)

  def write() -> None:
    if local:
      files.write(folder / _file(), local)
    if count > 1:
      integrity.seal(folder, manifest, f'process_{number:04}.json')
    if contents:
      orbax_arrays.save(folder / integrity.LEAVES, contents)

  def finish() -> None:
    whole = manifest
    if count > 1:
      names = [f'process_{k:04}.json' for k in range(count)]
      whole = _merged([integrity.read_manifest(folder, n) for n in names])
      for name in names:
        (folder / name).unlink()
    written = {
      path.relative_to(folder).as_posix(): files.stored(path)
      for path in sorted(folder.rglob('*'))
      if not path.is_dir()
    }
    integrity.seal(folder, dataclasses.replace(whole, files=written))
    integrity.finish(root, folder, whole.step)

  try:
    _together(integrity.begin, root, folder, first_only=True)
    _together(write)
    _together(finish, first_only=True)
    if test:
      _together(_read_back, root / str(manifest.step), contents)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _together(function: Callable, *args: Any, first_only: bool = False) -> None:
  """Calls a function in all processes, or the first; all fail if one does."""
  trouble: Exception | None = None
  if integrity.is_first() or not first_only:
    try:
      function(*args)
    except Exception as error:
      trouble = error
  if _processes() > 1:
    from experiments.runtime import distributed

    failed = distributed.sum_over_processes({'failed': trouble is not None})
    if failed['failed'] and trouble is None:
      raise UserError('another process could not save its checkpoint')
  if trouble is not None:
    raise trouble


def _merged(manifests: Sequence[Manifest]) -> Manifest:
  """The manifests of all processes as one."""
  joined = lambda name: {
    k: v for one in manifests for k, v in getattr(one, name).items()
  }
  return dataclasses.replace(
    manifests[0], local=joined('local'), rows=joined('rows')
  )


def _read_back(folder: pathlib.Path, contents: Mapping[str, Any]) -> None:
  """Refuses a place that does not give back what was written to it."""
  import jax

  try:
    integrity.check(folder, integrity.read_manifest(folder))
    wanted = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      if isinstance(x, jax.Array)
      else np.empty(x.shape, x.dtype)
      for name, x in contents.items()
    }
    found = {}
    if wanted:
      found = orbax_arrays.load(folder / integrity.LEAVES, wanted, {})
    for name, x in found.items():
      if isinstance(x, np.ndarray) and x.tobytes() != contents[name].tobytes():
        raise integrity.Damaged(f'array {name} has changed')
  except integrity.Damaged as error:
    raise UserError(
      f'{shown(folder)}: was written but cannot be read back ({error}); take '
      'a folder on another disk'
    ) from error


class Best(NamedTuple):
  """The best by a metric, besides the latest.

  Attributes:
    save: `(step, metric, params, extra=None) -> bool`, keeps `params` if
      `metric` exceeds all before (never if it is NaN); whether it did.
    metric: `() -> float`, of the best, or None.
    restore: `(template) -> (params, extra)`, or None; `extra` has `step` and
      `metric` in it.
  """

  save: Callable[..., bool]
  metric: Callable[[], float | None]
  restore: Callable[[Any], tuple[Any, dict[str, Any]] | None]
  close: Callable[[], None]


def best(
  directory: str | os.PathLike, read_only: bool = False, **options: Any
) -> Best:
  """Opens a folder that holds the best parameters so far; see `open`.

  Raises:
    Damaged: `read_only`, and it is damaged.
  """
  checkpoints = open(directory, keep=1, read_only=read_only, **options)

  def metric() -> float | None:
    found = checkpoints.peek()
    if found is None:
      return None
    if not isinstance(found[1].get('metric'), float):
      raise integrity.Damaged(f'{shown(directory)}: metric is not a number')
    return found[1]['metric']

  lost = False
  try:
    held = metric()
  except integrity.Damaged as error:
    if read_only:
      raise
    print(
      f'note: {shown(error, 1000)}; the next best takes its place', flush=True
    )
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


def _describe(path: str, leaf: Any) -> Leaf:
  """What is written of one leaf: path, dtype, shape, perhaps the value."""
  if _is_value(leaf):
    return Leaf(path, f'python {type(leaf).__name__}', (), leaf)
  if isinstance(leaf, bytes):
    return Leaf(path, 'bytes', (len(leaf),))
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
  return Leaf(path, str(dtype), tuple(leaf.shape))


def _file() -> str:
  """Where this process's own arrays are, in a step's folder."""
  import jax

  return f'local_{jax.process_index():04}.bin'


def _pack(
  tree: Any, contents: dict[str, Any], local: str | None = None
) -> tuple[Leaf, ...]:
  """Describes all leaves; `contents` gets copies of the arrays, by name.

  Several processes write the carry at once, uncopied. `local` names what this
  process alone has; it is None for the carry.
  """
  import jax

  leaves = []
  for i, (path, leaf) in enumerate(zip(*_flatten(tree)[:2])):
    entry = _describe(path, leaf)
    leaves.append(entry)
    if _is_value(leaf) or 0 in entry.shape:
      continue
    if _is_key(leaf):
      leaf = jax.random.key_data(leaf)
    elif isinstance(leaf, bytes):
      leaf = np.frombuffer(leaf, np.uint8)
    if local is not None:
      contents[f'{local}/{i}'] = np.array(leaf)
    elif isinstance(leaf, jax.Array) and _processes() > 1:
      contents[str(i)] = leaf
    else:
      contents[str(i)] = np.array(leaf)
  return tuple(leaves)


def _differences(saved: Sequence[Leaf], template: Any) -> list[str]:
  """How a template differs from the saved leaves, one phrase each."""

  def text(entry):
    # Bytes may have changed their length, as numbers their value.
    if entry.dtype.startswith(('python', 'bytes')):
      return shown(entry.dtype)
    return f'{shown(entry.dtype)}{list(entry.shape)}'

  here = {e.path: e for e in map(_describe, *_flatten(template)[:2])}
  there = {entry.path: entry for entry in saved}
  found = []
  for path in sorted(here.keys() | there.keys()):
    name = shown(path) or 'it'
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


def _restore(
  folder: pathlib.Path,
  saved: Sequence[Leaf],
  template: Any,
  read: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:
  """A tree of the template's structure from what is saved of it.

  `read` gives the arrays that are wanted, by their number in `saved`.
  """
  differences = _differences(saved, template)
  if differences:
    more = len(differences) - 3
    raise UserError(
      f'the checkpoint {shown(folder)} does not fit this run: '
      + '; '.join(differences[:3])
      + (f'; and {more} more' if more > 0 else '')
      + '; another agent, network or release has written it'
    )
  # By path: a NamedTuple may have had its fields in another order.
  numbers = {entry.path: (str(i), entry) for i, entry in enumerate(saved)}
  paths, leaves, tree = _flatten(template)
  slots = [(*numbers[path], leaf) for path, leaf in zip(paths, leaves)]
  wanted = {
    name: _wanted(entry, leaf)
    for name, entry, leaf in slots
    if not (_is_value(leaf) or 0 in entry.shape)
  }
  found = read(wanted) if wanted else {}
  return tree.unflatten(
    [_unpack(entry, leaf, found.get(name)) for name, entry, leaf in slots]
  )


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


def _wanted(entry: Leaf, leaf: Any) -> Any:
  """What is to be read: a numpy array unless a sharding is asked for."""
  import jax

  if isinstance(leaf, bytes):
    return np.empty(entry.shape, np.uint8)
  raw = _raw(leaf)
  sharding = _sharding(raw)
  if sharding is None:
    return np.empty(raw.shape, raw.dtype)
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _unpack(entry: Leaf, leaf: Any, array: Any) -> Any:
  """One leaf, of the kind that the template has there."""
  import jax
  import jax.numpy as jnp

  if _is_value(leaf):
    if type(entry.value) is not type(leaf):
      raise UserError(
        f'the checkpoint has {shown(entry.path)}={shown(entry.value)}: must '
        f'be of type {type(leaf).__name__}'
      )
    return entry.value
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
