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
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import build, sweep_plan


class Program(NamedTuple):
  """What one compiled program trains.

  Attributes:
    experiment: of every row, but for what is traced.
    paths: of the `F` traced fields, see `sweep_plan.find_path`.
    values: `R` lists of `F` floats.
    seeds: `R` seeds.
  """

  experiment: build.Experiment
  paths: tuple[str, ...]
  values: list[list[float]]
  seeds: list[int]


class Functions(NamedTuple):
  """One row, or all of them, as functions that may be traced.

  Attributes:
    init: `(values [F], seed) -> carry`.
    interval: `(values, carry, seed, num_steps) -> (carry, means, counts)`, see
      `loop.compile_interval`.
    evaluate: `(values, params, seed, step) -> {prefix: (returns [E], lengths
      [E])}`, whole episodes with search (`eval`) and without (`network`).
  """

  init: Callable[..., Any]
  interval: Callable[..., Any]
  evaluate: Callable[..., Any]


def row_functions(
  experiment: build.Experiment, paths: Sequence[str]
) -> Functions:
  """The functions of one row.

  Args:
    experiment: on a pure-JAX environment; its seed is not looked at.
    paths: of the fields that take the place of its own.
  """
  import jax

  from agents.core import planning
  from experiments.runtime import evaluate as playing
  from experiments.runtime import loop
  from search.model import Environment

  env = build.make_env(experiment, training=True)
  stage = build.make_env(experiment, training=False)
  assert isinstance(stage, Environment)

  def made(values):
    own = experiment
    for path, value in zip(paths, values):
      own = sweep_plan.put(own, path, value)
    agent = build.make_agent(own, env.spec)
    return own, agent, build.make_source(own, env, agent)

  def init(values, seed):
    _, agent, source = made(values)
    return loop.init(agent, source, jax.random.key(seed))

  def interval(values, carry, seed, num_steps):
    _, agent, source = made(values)
    run = loop.compile_interval(agent, source)
    return run(carry, jax.random.key(seed), num_steps)

  def evaluate(values, params, seed, step):
    own, agent, _ = made(values)
    key = jax.random.fold_in(jax.random.key(seed), step)
    alone = sweep_plan.put(own, 'agent.search.num_simulations', 0)
    found = {}
    for prefix, player in (('eval', own), ('network', alone)):
      planner = planning.make_planner(player.config.search, evaluate=True)

      def play(params, key, timestep, planner=planner):
        return planner(agent.model, params, key, timestep).action

      found[prefix] = playing.device_episodes(
        stage.reset,
        stage.step,
        play,
        experiment.run.evaluate_episodes,
        10_000,
        params,
        key,
      )
    return found

  return Functions(init, interval, evaluate)


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
    functions = row_functions(experiment, tried)

    def everything(values, seed):
      carry = functions.init(values, seed)
      carry, *_ = functions.interval(values, carry, seed, 1)
      return functions.evaluate(values, carry.agent.params, seed, 0)

    floats = jax.ShapeDtypeStruct((len(tried),), jnp.float32)
    jax.eval_shape(everything, floats, jax.ShapeDtypeStruct((), jnp.uint32))

  def works(tried):
    # What a tracer raises: concretization errors are TypeErrors, a traced
    # slice is an IndexError, a config may say ValueError.
    try:
      trace(tried)
    except (TypeError, ValueError, IndexError, AttributeError):
      return False
    return True

  floats = tuple(
    p for p in paths if type(sweep_plan.get(experiment, p)) is float
  )
  if floats and works(floats):
    return floats
  trace(())
  if len(floats) < 2:
    return ()
  return tuple(path for path in floats if works((path,)))


def compiled(functions: Functions, mesh: Any) -> Functions:
  """The functions over all rows, divided over the mesh's `data` axis.

  Each device runs its rows on its own. `interval` donates the carry.

  Args:
    functions: from `row_functions`.
    mesh: from `runtime.mesh.make_mesh`; its size divides the number of rows.
  """
  import jax
  from jax.sharding import PartitionSpec

  from experiments.runtime import loop
  from experiments.runtime import mesh as meshes

  carry = loop.Carry(0, 0, None)

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

  return Functions(
    init=over_rows(functions.init, (0, 0), carry),
    interval=over_rows(
      functions.interval, (0, carry, 0, None), (carry, 0, 0), donate_argnums=1
    ),
    evaluate=over_rows(functions.evaluate, (0, 0, 0, None), 0),
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
  end, where it always evaluates.

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

  settings, updates = program.experiment.run, program.experiment.updates
  count = len(program.seeds)
  # Rows are repeated to fill the devices.
  spread = np.arange(-(-count // mesh.size) * mesh.size) % count
  values = np.asarray(program.values, np.float32).reshape(count, -1)[spread]
  seeds = np.asarray(program.seeds, np.uint32)[spread]
  functions = compiled(row_functions(program.experiment, program.paths), mesh)
  intervals = loop.Intervals(
    log=settings.log_every, evaluate=settings.evaluate_every
  )
  keeper = checkpoint.open(folder / 'checkpoints')
  try:
    restored = _restore(keeper, functions.init, values, seeds, count, mesh)
    carry, points = restored or (functions.init(values, seeds), [])
    done = points[-1].step if points else 0
    saved = time.monotonic()
    while done < updates:
      due = intervals.next_stop(done, updates) - done
      carry, *measured = functions.interval(values, carry, seeds, np.int32(due))
      done += due
      means, counts = jax.device_get(measured)
      metrics = _measured(means, counts, count)
      is_due = settings.evaluate_every and done % settings.evaluate_every == 0
      if is_due or done == updates:
        played = functions.evaluate(
          values, carry.agent.params, seeds, np.int32(done)
        )
        metrics |= _played(jax.device_get(played), metrics['finite'])
      _add_up(metrics, points, 'decisions')
      points.append(Point(done, metrics))
      report(done, _means(metrics))
      late = time.monotonic() - saved >= checkpoint_seconds
      if done < updates and (late or stopping()):
        _save(keeper, carry, points, count)
        saved = time.monotonic()
      if done < updates and stopping():
        return None
  finally:
    keeper.close()
  return points


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


def _played(played, finite) -> dict[str, Any]:
  """Summaries by row; what a network of NaNs played counts as NaN."""
  import numpy as np

  from experiments.runtime.evaluate import Episodes

  found = {}
  for prefix, (returns, lengths) in played.items():
    summaries = [
      Episodes(np.asarray(r, np.float64), np.asarray(n, np.int64)).summary()
      for r, n in zip(returns, lengths[: len(finite)])
    ]
    for name in summaries[0]:
      column = np.array([summary[name] for summary in summaries])
      own = name.replace('eval', prefix, 1)
      found[own] = np.where(finite > 0, column, np.nan)
  return found


def _add_up(metrics, points, name) -> None:
  if points and name in metrics:
    metrics[name] = metrics[name] + points[-1].metrics[name]


def _means(metrics) -> dict[str, float]:
  import numpy as np

  known = {n: x[np.isfinite(x)] for n, x in metrics.items()}
  return {n: float(np.mean(x)) for n, x in known.items() if len(x)}


def _take(carry, index):
  """Some rows of a carry; the step is shared."""
  import jax

  rows = jax.tree.map(lambda x: x[index], (carry.agent, carry.source))
  return carry._replace(agent=rows[0], source=rows[1])


def _save(keeper, carry, points, count) -> None:
  import jax
  import numpy as np

  names = list(dict.fromkeys(n for p in points for n in p.metrics))
  none = np.full(count, np.nan)
  history = [[p.metrics.get(n, none) for n in names] for p in points]
  if jax.tree.leaves(carry.agent)[0].shape[0] > count:
    # Whoever goes on may have another number of devices.
    carry = jax.jit(lambda carry: _take(carry, slice(count)))(carry)
  keeper.save(
    points[-1].step,
    {'carry': carry, 'history': np.asarray(history, np.float64)},
    {'steps': [p.step for p in points], 'names': names},
  )


def _restore(keeper, init, values, seeds, count, mesh):
  """The carry and the points so far, or None."""
  import jax
  import numpy as np

  from experiments.runtime import loop
  from experiments.runtime import mesh as meshes

  found = keeper.peek()
  if found is None:
    return None
  steps, names = found[1]['steps'], found[1]['names']
  template = jax.eval_shape(
    lambda values, seeds: _take(init(values, seeds), slice(count)),
    values,
    seeds,
  )
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
  return spread(saved['carry']), points
