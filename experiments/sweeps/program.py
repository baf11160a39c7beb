"""Many rows of a sweep as one compiled program.

The agent, its source and its players are made inside `vmap`, with traced floats
in their configs, so that rows differ in their seed and in any float that need
not be known while compiling. Rows are divided over the devices, which do not
communicate; the step is shared. A row has the numbers of the same seed alone on
one device (`--set=parts=1`), up to rounding.

Axes: `R` rows, `F` traced fields, `E` episodes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import build
from experiments.build.material import Measure
from experiments.sweeps import plan


class Program(NamedTuple):
  """What one compiled program trains: an experiment with `R` seeds.

  `paths` are `F` traced fields (`plan.find_path`), `values` `R` lists of `F`
  floats for them.
  """

  experiment: build.Experiment
  paths: tuple[str, ...]
  values: list[list[float]]
  seeds: list[int]


class Functions(NamedTuple):
  """A phase of one row, or of all of them, as functions that may be traced.

  Attributes:
    end: update at which the phase ends; planned if it ends by its decisions.
    init: `(values [F], seed, shared) -> carry`; `shared` is from `load`.
    enter: `(values, carry, shared) -> carry`, from the phase before's without
      its source; None in the first.
    interval: `(values, carry, seed, num_steps) -> (carry, means, counts)`, see
      `loop.compile_interval`.
    measure: `build.material.Measure` whose functions take `values` in place of
      experiment and agent; None if nothing is measured.
    load: `() -> ` rows of the data set that all rows share, or None; of
      `compiled`, on all devices. `init` and `enter` then donate it: the carry
      holds it from there on.
    axes: of the carry, see `Source.axes`.
    rest: `(carry) -> carry` that takes no more rows, of one row or of all; None
      where no updates follow the last decision.
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

  `paths` are fields whose values replace the experiment's.
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

  Also, for each phase, where it ends and the axes of its source.
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
  """The float fields that may be traced; found by tracing, without compiling.

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
    # A text is cut before there is a program.
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

  Each device runs its rows on its own. `interval` donates the carry. The mesh's
  size must divide the number of rows.
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
