"""The checkpoint of a program of a sweep: all rows' carries and curves.

It leaves out what rows share, the data set, and the rows that are repeated to
fill the devices: a resumed sweep may have others.
"""

import pathlib
import shutil
from typing import Any, NamedTuple

from experiments.runtime import config as configs
from experiments.runtime import run_config
from experiments.sweeps.program import Program


class Point(NamedTuple):
  """All rows after a number of updates, `step`.

  `metrics` maps names to float `[R]`, NaN for a row without; `finite` is 1 if
  all that was averaged is finite.
  """

  step: int
  metrics: dict[str, Any]


def forget(folder: pathlib.Path) -> None:
  """Deletes the checkpoints of a program whose results are written."""
  shutil.rmtree(folder / 'checkpoints', ignore_errors=True)


def identity(program: Program) -> dict[str, Any]:
  """What distinguishes a program's checkpoints from another one's."""
  about = program.experiment.as_dict()
  # As for a single run: the data set may have moved.
  about |= {'dataset': '', 'seed': program.seeds, 'rows': program.values}
  about |= {'paths': program.paths}
  return {'seed': program.seeds, 'settings': run_config.digest(about)}


class _History(NamedTuple):
  """A checkpoint's record of its points' steps and metrics' names."""

  steps: list[int]
  names: list[str]
  phase: int


def _history(extra: dict[str, Any], phases: int) -> _History:
  """A checkpoint's `extra`, as `save` wrote it."""
  import msgspec

  try:
    found = msgspec.convert([extra.get(n) for n in _History._fields], _History)
  except msgspec.ValidationError as error:
    raise configs.UserError(f'the checkpoint is damaged: {error}') from error
  if not (found.steps and 0 <= found.phase < phases):
    raise configs.UserError('the checkpoint is damaged: it has no such phase')
  return found


def _own_parts(axes, source):
  """A source's state without what all rows share."""
  import jax

  return jax.tree.map(
    lambda axis, part: None if axis is None else part,
    axes,
    source,
    is_leaf=lambda axis: axis is None,
  )


def shared_part(axes, source):
  """What all rows share of a source's state: the data set, or None."""
  import jax

  axes, tree = jax.tree.flatten(axes, is_leaf=lambda axis: axis is None)
  parts = zip(axes, tree.flatten_up_to(source))
  return next((part for axis, part in parts if axis is None), None)


def _take(carry, index):
  """Some rows of a carry without shared parts; the step is shared."""
  import jax

  rows = jax.tree.map(lambda x: x[index], (carry.agent, carry.source))
  return carry._replace(agent=rows[0], source=rows[1])


def acted(keeper) -> int | None:
  """The saved number of updates when acting ended, if it had."""
  found = keeper.peek()
  return None if found is None else found[1].get('acted')


def save(keeper, axes, carry, points, count, number, acted) -> None:
  """Saves the rows of a program after an update that has a point.

  The carry's leaves are `[R, ...]`, of which `count` are real rows and the rest
  copies; `axes` are the carry's, see `program.Functions`; `number` is the
  phase's index; `acted` counts updates until acting ended, None before that.
  """
  import jax
  import numpy as np

  names = list(dict.fromkeys(n for p in points for n in p.metrics))
  none = np.full(count, np.nan)
  history = [[p.metrics.get(n, none) for n in names] for p in points]
  carry = carry._replace(source=_own_parts(axes.source, carry.source))
  if jax.tree.leaves(carry.agent)[0].shape[0] > count:
    # It may resume with another number of devices.
    carry = jax.jit(lambda carry: _take(carry, slice(count)))(carry)
  keeper.save(
    points[-1].step,
    {'carry': carry, 'history': np.asarray(history, np.float64)},
    {
      'steps': [p.step for p in points],
      'names': names,
      'phase': number,
      'acted': acted,
    },
  )


def restore(keeper, phases, values, seeds, count, mesh):
  """The carry, the points so far and the phase's number, or None.

  Phases are from `program.compiled`; values of the traced fields are float32
  `[R, F]`, seeds uint32 `[R]`; `count` is as for `save`.

  Raises:
    UserError: the checkpoint is damaged.
  """
  import jax
  import numpy as np

  from experiments.runtime import loop
  from experiments.runtime import mesh as meshes

  found = keeper.peek()
  if found is None:
    return None
  steps, names, number = _history(found[1], len(phases))
  axes = phases[number].axes

  def fresh(values, seeds, shared):
    carry = phases[0].init(values, seeds, shared)
    for phase in phases[1 : number + 1]:
      assert phase.enter is not None
      carry = phase.enter(values, carry._replace(source=None), shared)
    own = _own_parts(axes.source, carry.source)
    return _take(carry._replace(source=own), slice(count))

  shared = phases[0].load()
  template = jax.eval_shape(fresh, values, seeds, shared)
  history = np.zeros((len(steps), len(names), count))
  saved, _ = keeper.restore({'carry': template, 'history': history})
  rows = meshes.split(mesh)
  spread = jax.jit(
    lambda carry: _take(carry, np.arange(len(seeds)) % count),
    out_shardings=loop.Carry(rows, rows, meshes.replicated(mesh)),
  )
  points = [
    Point(step, dict(zip(names, columns)))
    for step, columns in zip(steps, saved['history'])
  ]
  carry = spread(saved['carry'])
  whole = jax.tree.map(
    lambda axis, part: shared if axis is None else part,
    axes.source,
    carry.source,
    is_leaf=lambda axis: axis is None,
  )
  return carry._replace(source=whole), points, number
