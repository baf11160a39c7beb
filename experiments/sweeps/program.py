"""Many rows of a sweep as one compiled program.

The agent, its source and its players are made inside `vmap`, with traced
floats in their configs, so that rows differ in their seed and in any float
that nothing needs to know while compiling. Rows are divided over the devices,
which do not talk to each other; the step is shared. A row has the numbers of
the same seed alone on one device (`--set=parts=1`), up to rounding.

Axes: `R` rows, `F` traced fields, `E` episodes.
"""

import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import build
from experiments.build import environment
from experiments.build.material import Measure
from experiments.runtime import config as configs
from experiments.sweeps import plan


class Program(NamedTuple):
  """What one compiled program trains.

  Attributes:
    experiment: of every row, but for what is traced.
    paths: of the `F` traced fields, see `plan.find_path`.
    values: `R` lists of `F` floats.
    seeds: `R` seeds.
  """

  experiment: build.Experiment
  paths: tuple[str, ...]
  values: list[list[float]]
  seeds: list[int]


class Functions(NamedTuple):
  """A phase of one row, or of all of them, as functions that may be traced.

  Attributes:
    end: number of updates at which the phase ends; planned where it ends by
      its decisions.
    init: `(values [F], seed, shared) -> carry`; `shared` is what `load` gave.
    enter: `(values, carry, shared) -> carry`, from that of the phase before,
      without its source; None in the first.
    interval: `(values, carry, seed, num_steps) -> (carry, means, counts)`, see
      `loop.compile_interval`.
    measure: `build.material.Measure` whose functions take `values` in the place
      of experiment and agent; None where nothing is measured.
    load: `() -> ` rows of the data set that all rows share, None without; of
      `compiled`, on all devices. `init` and `enter` then donate it: the carry
      holds it from there on.
    axes: of the carry, see `Source.axes`.
    rest: `(carry) -> carry` that takes no more rows, of one row or of all;
      None where no updates follow the last decision.
  """

  end: int
  init: Callable[..., Any]
  enter: Callable[..., Any] | None
  interval: Callable[..., Any]
  measure: Measure | None
  load: Callable[[], Any]
  axes: Any
  rest: Callable[[Any], Any] | None = None


def row_functions(
  experiment: build.Experiment, paths: Sequence[str]
) -> tuple[Functions, ...]:
  """The functions of one row, for each phase.

  Args:
    experiment: on a pure-JAX environment or a data set; its seed is not
      looked at.
    paths: of the fields that take the place of its own.
  """
  import jax

  from experiments.runtime import loop

  made, ends, axes = _made(experiment, paths)
  load = lambda: jax.tree.map(
    jax.numpy.asarray, experiment.material.rows(experiment)
  )

  def functions(number):
    def init(values, seed, shared):
      _, agent, source, _ = made(values, number)
      key = jax.random.key(seed)
      if shared is None:
        return loop.init(agent, source, key)
      assert source.fill is not None
      state = loop.init_agent(agent, key)
      return loop.Carry(state, source.fill(shared), jax.numpy.int32(0))

    def enter(values, carry, shared):
      *_, source, transfer = made(values, number)
      assert transfer is not None and source.fill is not None
      state = transfer(carry.agent)
      return loop.Carry(state, source.fill(shared), carry.step)

    def interval(values, carry, seed, num_steps):
      _, agent, source, _ = made(values, number)
      run = loop.compile_interval(agent, source)
      return run(carry, jax.random.key(seed), num_steps)

    _, agent, source, _ = made(_values(experiment, paths), number)
    measure, rest = experiment.material.measure(experiment, agent), source.rest

    return Functions(
      ends[number],
      init,
      enter if number else None,
      interval,
      measure and _over_values(measure, lambda values: made(values, number)),
      load,
      loop.Carry(0, axes[number], None),
      rest and (lambda carry: carry._replace(source=rest(carry.source))),
    )

  return tuple(functions(number) for number in range(len(ends)))


def _own(experiment, paths, values):
  for path, value in zip(paths, values):
    experiment = plan.put(experiment, path, value)
  return experiment


def _made(experiment, paths):
  """`(values, phase) -> (experiment, agent, source, transfer)` of a row.

  And for each phase where it ends and the axes of its source.
  """
  opened = experiment.material.open(experiment)

  def made(values, number):
    own = _own(experiment, paths, values)
    phase = build.make_phases(own, opened.spec)[number]
    source = opened.make_source(own, phase)
    return own, phase.agent, source, phase.transfer

  ends, axes, end = [], [], 0
  for phase in build.make_phases(experiment, opened.spec):
    end = experiment.updates if phase.updates is None else end + phase.updates
    ends.append(end)
    axes.append(opened.make_source(experiment, phase).axes)
  return made, ends, axes


def _over_values(measure: Measure, made: Callable) -> Measure:
  """A measure whose functions take the values of a row's fields."""

  def over(function):
    if function is None:
      return None

    def of_values(values, *args):
      own, agent, *_ = made(values)
      return function(own, agent, *args)

    return of_values

  return measure._replace(
    evaluate=over(measure.evaluate), act=over(measure.act)
  )


def _values(experiment, paths):
  return [plan.get(experiment, path) for path in paths]


def traceable(
  experiment: build.Experiment, paths: Sequence[str]
) -> tuple[str, ...]:
  """The fields that may be traced; found by tracing, nothing is compiled.

  Args:
    experiment: on a pure-JAX environment.
    paths: of fields.

  Returns:
    Those that hold floats and that the whole program takes as tracers.

  Raises:
    ValueError: what is wrong with the experiment itself.
  """
  import jax
  import jax.numpy as jnp

  def trace(tried):
    phases = row_functions(experiment, tried)

    def everything(values, seed, shared):
      carry, played = phases[0].init(values, seed, shared), []
      for phase in phases:
        if phase.enter is not None:
          carry = phase.enter(values, carry, shared)
        carry, *_ = phase.interval(values, carry, seed, 1)
        evaluate = phase.measure and phase.measure.evaluate
        if evaluate is not None:
          played.append(evaluate(values, carry.agent.params, seed, 0))
      return played

    floats = jax.ShapeDtypeStruct((len(tried),), jnp.float32)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    jax.eval_shape(everything, floats, seed, jax.eval_shape(phases[0].load))

  def works(tried):
    # What a tracer raises: concretization errors are TypeErrors, a traced
    # slice is an IndexError, a config may say ValueError.
    try:
      trace(tried)
    except (TypeError, ValueError, IndexError, AttributeError):
      return False
    return True

  floats = tuple(
    p
    for p in paths
    # What a text is cut into is settled before there is a program.
    if type(plan.get(experiment, p)) is float and '.text.' not in p
  )
  if floats and works(floats):
    return floats
  trace(())
  if len(floats) < 2:
    return ()
  return tuple(path for path in floats if works((path,)))


def compiled(functions: Functions, mesh: Any) -> Functions:
  """A phase's functions over all rows, divided over the mesh's `data` axis.

  Each device runs its rows on its own. `interval` donates the carry.

  Args:
    functions: from `row_functions`.
    mesh: from `runtime.mesh.make_mesh`; its size divides the number of rows.
  """
  import jax
  from jax.sharding import PartitionSpec

  from experiments.runtime import mesh as meshes

  carry, load = functions.axes, functions.load
  whole = meshes.replicated(mesh)

  def over_rows(function, in_axes, out_axes, **options):
    def specs(axes):
      return jax.tree.map(
        lambda axis: PartitionSpec(*([meshes.AXIS] if axis == 0 else [])),
        axes,
        is_leaf=lambda axis: axis is None,
      )

    split = jax.shard_map(
      jax.vmap(function, in_axes=in_axes, out_axes=out_axes),
      mesh=mesh,
      in_specs=specs(in_axes),
      out_specs=specs(out_axes),
      # Nothing is summed over devices; the shared step needs no proof.
      check_vma=False,
    )
    return jax.jit(split, **options)

  measure, enter = functions.measure, functions.enter
  if measure is not None:
    evaluate, act = measure.evaluate, measure.act
    measure = measure._replace(
      evaluate=evaluate and over_rows(evaluate, (0, 0, 0, None), 0),
      act=act and over_rows(act, (0, 0, None, 0), 0),
    )
  return functions._replace(
    init=over_rows(functions.init, (0, 0, None), carry, donate_argnums=2),
    enter=enter
    and over_rows(
      enter, (0, carry._replace(source=None), None), carry, donate_argnums=2
    ),
    load=lambda: jax.device_put(load(), whole),
    interval=over_rows(
      functions.interval, (0, carry, 0, None), (carry, 0, 0), donate_argnums=1
    ),
    measure=measure,
  )


class Point(NamedTuple):
  """What is known of all rows after a number of updates.

  Attributes:
    step: updates.
    metrics: name -> float `[R]`, NaN where a row has none; `finite` is 1 where
      all that was averaged is finite.
  """

  step: int
  metrics: dict[str, Any]


def run(
  program: Program,
  folder: pathlib.Path,
  *,
  mesh: Any,
  checkpoint_seconds: float = 300.0,
  stopping: Callable[[], bool] = lambda: False,
  report: Callable[[int, dict[str, float]], None] = lambda step, row: None,
) -> list[Point] | None:
  """Trains all rows, from the folder's checkpoint if there is one.

  It halts where `experiments.train` would, to log and to evaluate, and at the
  end, where it always evaluates. Rows share their updates: where they end by
  decisions, all go on until the row with the fewest has taken them; `decisions`
  tells how many each one took.

  Args:
    program: what.
    folder: of the checkpoints.
    mesh: the devices.
    checkpoint_seconds: between checkpoints, at least.
    stopping: polled at every halt; True saves and leaves.
    report: `(step, means over rows)`.

  Returns:
    The curves; None if stopped before the end.
  """
  import jax
  import numpy as np

  from experiments.runtime import checkpoint, loop

  experiment, count = program.experiment, len(program.seeds)
  settings = experiment.run
  budget = experiment.budget
  # Rows are repeated to fill the devices.
  spread = np.arange(-(-count // mesh.size) * mesh.size) % count
  values = np.asarray(program.values, np.float32).reshape(count, -1)[spread]
  seeds = np.asarray(program.seeds, np.uint32)[spread]
  phases = [compiled(f, mesh) for f in row_functions(experiment, program.paths)]
  intervals = loop.Intervals(
    log=settings.log_every, evaluate=settings.evaluate_every
  )
  keeper = checkpoint.open(folder / 'checkpoints', run=_identity(program))
  try:
    restored = _restore(keeper, phases, values, seeds, count, mesh)
    carry, points, number = restored or (
      phases[0].init(values, seeds, phases[0].load()),
      [],
      0,
    )
    done = points[-1].step if points else 0
    if budget is not None:
      budget.acted = _acted(keeper)
    pieces: list[loop.Piece] = []

    def end():
      if budget is None:
        return phases[-1].end
      taken = [points[-1].metrics['decisions']] if points else []
      taken += [piece.counts['decisions'][:count] for piece in pieces]
      budget.taken = float(np.min(np.sum(taken, axis=0)))
      return budget.stop(done)

    saved = time.monotonic()
    while done < (limit := end()):
      if budget is None and done == phases[number].end:
        shared = _shared_part(phases[number].axes.source, carry.source)
        number += 1
        enter = phases[number].enter
        assert enter is not None
        carry = enter(values, carry._replace(source=None), shared)
      phase = phases[number]
      is_over = budget is not None and budget.acted is not None
      if is_over and phase.rest is not None:
        carry = phase.rest(carry)
      halt = intervals.next_stop(done, sys.maxsize)
      due = min(halt, limit if budget else phase.end) - done
      carry, *measured = phase.interval(values, carry, seeds, np.int32(due))
      done += due
      means, counts = jax.device_get(measured)
      pieces.append(loop.Piece(means, counts, 0.0, due))
      if budget is not None and done < halt and done < end():
        continue
      whole, pieces = loop.joined(pieces), []
      metrics = _measured(whole.means, whole.counts, count)
      is_due = settings.evaluate_every and done % settings.evaluate_every == 0
      _add_up(metrics, points, 'decisions')
      points.append(Point(done, metrics))
      ended = done == end()
      if is_due or ended:
        metrics |= _evaluated(
          experiment, phase, values, carry.agent.params, seeds, done, metrics
        )
      report(done, _means(metrics))
      late = time.monotonic() - saved >= checkpoint_seconds
      if not ended and (late or stopping()):
        acted = budget and budget.acted
        _save(keeper, phase.axes, carry, points, count, number, acted)
        saved = time.monotonic()
      if not ended and stopping():
        return None
  finally:
    keeper.close()
  return points


def _identity(program: Program) -> dict[str, Any]:
  """What tells a program's checkpoints from those of another one."""
  about = program.experiment.as_dict()
  # As of a single run: the data set may lie elsewhere by now.
  about |= {'dataset': '', 'seed': program.seeds, 'rows': program.values}
  about |= {'paths': program.paths}
  return {'seed': program.seeds, 'settings': configs.digest(about)}


class _History(NamedTuple):
  """What a checkpoint tells of a program's rows.

  Attributes:
    steps: of the points so far.
    names: of their metrics.
    phase: the carry's.
  """

  steps: list[int]
  names: list[str]
  phase: int


def _history(extra: dict[str, Any], phases: int) -> _History:
  """A checkpoint's `extra`, as `_save` wrote it.

  Raises:
    UserError: it says something else.
  """
  import msgspec

  try:
    found = msgspec.convert([extra.get(n) for n in _History._fields], _History)
  except msgspec.ValidationError as error:
    raise configs.UserError(f'the checkpoint is damaged: {error}') from error
  if not (found.steps and 0 <= found.phase < phases):
    raise configs.UserError('the checkpoint is damaged: it has no such phase')
  return found


def _evaluated(experiment, phase, values, params, seeds, step, metrics):
  """Metrics of all rows' evaluation; what NaNs have played counts as NaN."""
  import jax
  import numpy as np

  measure, finite = phase.measure, metrics['finite']
  if measure is None:
    return {}
  if measure.evaluate is not None:
    found = measure.evaluate(values, params, seeds, np.int32(step))
    found = jax.device_get(found)
  else:
    found = _on_host(experiment, measure.act, values, params, step)
  own = jax.tree.map(lambda x: np.asarray(x)[: len(finite)], found)
  return {
    name: np.where(finite > 0, column, np.nan)
    for name, column in measure.summarise(own).items()
  }


def _on_host(experiment, act, values, params, step):
  """What `Measure.evaluate` returns, on simulators beside each other."""
  import jax
  import numpy as np

  from agents.core.types import Continuous
  from experiments.envs.host import HostEnvironment, side_by_side
  from experiments.runtime import evaluate as playing

  rows, episodes = len(values), experiment.run.evaluate_episodes
  # Who plays which episode, and their number, follow from it.
  beside = min(episodes, environment.BESIDE)
  env = build.make_env(experiment, training=False, num_envs=beside)
  assert isinstance(env, HostEnvironment)
  # As `experiments.train` does, every row meets the same episodes.
  env = side_by_side(env, rows)
  kind = env.spec.action
  assert isinstance(kind, Continuous)
  shaped = lambda x: np.asarray(x).reshape(rows, -1, *x.shape[1:])
  # Who can be played without a search is one player only.
  chosen = lambda key, timestep: act(
    values, params, key, jax.tree.map(shaped, timestep)
  )

  diverged = np.zeros((rows, beside), bool)

  def play(params, key, timestep):
    del params
    (action,) = (np.asarray(a) for a in chosen(key, timestep).values())
    finite = np.isfinite(action)
    diverged[:] |= ~finite.all(tuple(range(2, action.ndim)))
    # Simulators refuse what is no number, and with it the rows that are well.
    action = np.where(finite, action, kind.low[None, None])
    return action.reshape(-1, *action.shape[2:])

  played = playing.on_host(
    env,
    play,
    params,
    key=jax.random.key(step),
    num_episodes=rows * episodes,
    seed=step,
  )
  returns = shaped(played.returns)
  bad = np.repeat(diverged, returns.shape[1] // beside, axis=1)
  returns = np.where(bad, np.nan, returns)
  return {'eval': (returns, shaped(played.lengths))}


def forget(folder: pathlib.Path) -> None:
  """Deletes the checkpoints of a program whose results are written."""
  shutil.rmtree(folder / 'checkpoints', ignore_errors=True)


def _measured(means, counts, count) -> dict[str, Any]:
  import numpy as np

  means, counts = (
    {name: np.asarray(x)[:count] for name, x in tree.items()}
    for tree in (means, counts)
  )
  finite = np.all([np.isfinite(x) for x in means.values()], axis=0)
  if 'episodes' in counts:
    # None where no episode has ended.
    ended = np.where(counts['episodes'] > 0, counts['episodes'], np.nan)
    counts['episodes'] = ended
    for name in ('return', 'length'):
      if f'{name}_sum' in counts:
        means[f'episode_{name}'] = counts.pop(f'{name}_sum') / ended
  return means | counts | {'finite': finite.astype(np.float32)}


def _add_up(metrics, points, name) -> None:
  if points and name in metrics:
    metrics[name] = metrics[name] + points[-1].metrics[name]


def _means(metrics) -> dict[str, float]:
  import numpy as np

  known = {n: x[np.isfinite(x)] for n, x in metrics.items()}
  return {n: float(np.mean(x)) for n, x in known.items() if len(x)}


def _own_parts(axes, source):
  """A source's state without what all rows share."""
  import jax

  return jax.tree.map(
    lambda axis, part: None if axis is None else part,
    axes,
    source,
    is_leaf=lambda axis: axis is None,
  )


def _shared_part(axes, source):
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


def _acted(keeper) -> int | None:
  """The updates after which acting was over when it was saved, if it was."""
  found = keeper.peek()
  return None if found is None else found[1].get('acted')


def _save(keeper, axes, carry, points, count, number, acted) -> None:
  import jax
  import numpy as np

  names = list(dict.fromkeys(n for p in points for n in p.metrics))
  none = np.full(count, np.nan)
  history = [[p.metrics.get(n, none) for n in names] for p in points]
  carry = carry._replace(source=_own_parts(axes.source, carry.source))
  if jax.tree.leaves(carry.agent)[0].shape[0] > count:
    # Whoever goes on may have another number of devices.
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


def _restore(keeper, phases, values, seeds, count, mesh):
  """The carry, the points so far and the phase's number, or None."""
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
