"""The phases of a run, ready to run: agents, sources, compiled updates."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import build
from experiments.training.keeper import Saved


class Stage(NamedTuple):
  """A phase, ready to run.

  Attributes:
    end: the run's update at which it ends; None if it ends by its decisions.
    update: compiled over the devices; None if the loop compiles.
    interval: likewise, for a pure source.
    sharding: of the agent's state over the devices; None replicates it.
  """

  name: str
  agent: Any
  source: Any
  end: int | None
  transfer: Callable | None = None
  update: Callable | None = None
  interval: Callable | None = None
  sharding: Any = None


class Trainer(NamedTuple):
  """The parts of a run, once its devices and processes have their roles.

  `spec` is the environment's, as its agents got it.
  """

  stages: tuple[Stage, ...]
  spec: Any
  layout: build.Layout


def make(
  experiment: build.Experiment, saved: Saved, asked: Callable[[], bool]
) -> Trainer:
  """Everything that a run needs; nothing is compiled yet.

  `saved` is of the newest checkpoint; `asked` says whether to stop.

  Raises:
    ValueError: agent, environment, data set and devices do not fit.
  """
  from experiments.runtime import distributed

  # One process alone need not vote, and may leave while it fills its replay.
  alone = distributed.process()[1] == 1
  stopping = asked if alone else lambda: False
  material = experiment.material
  if not (material.acts or alone):
    raise ValueError(
      f'distributed: learning from --{material.flag} runs in one process only; '
      'leave --distributed out'
    )
  layout = build.make_layout(experiment, saved.parts)
  opened = material.open(experiment, layout.parts)
  stages, end = [], 0
  for i, phase in enumerate(build.make_phases(experiment, opened.spec)):
    source = opened.make_source(experiment, phase, layout, stopping)
    stage = Stage(phase.name, phase.agent, source, None, phase.transfer)
    if not material.acts:
      end = experiment.updates if phase.updates is None else end + phase.updates
      stage = stage._replace(end=end)
    stages.append(_over_devices(experiment, stage, opened.spec, layout.mesh, i))
  return Trainer(tuple(stages), opened.spec, layout)


def _over_devices(experiment, stage: Stage, spec, devices, number) -> Stage:
  """The stage with what several devices, or `pmap`, need compiled."""
  from experiments.runtime import mesh, updates

  how = experiment.run.parallel
  if devices.size == 1 and how != 'pmap':
    return stage
  sharding = build.state_sharding(experiment, stage.agent, devices)
  stage = stage._replace(sharding=sharding)
  if stage.source.is_pure:
    if how == 'pmap':
      raise ValueError(
        f'parallel=pmap: {experiment.where} is compiled into one program with '
        'the agent; take parallel=jit'
      )
    interval = mesh.compile_interval(
      stage.agent, stage.source, devices, sharding
    )
    return stage._replace(interval=interval)
  reduce = mesh.pmean if how == 'pmap' else None
  learner = build.make_phases(experiment, spec, reduce)[number].agent
  learner = learner._replace(update=updates.packed(learner.update))
  update = mesh.compile_update(learner, devices, how, sharding)
  return stage._replace(update=update)


def enter(stage: Stage, carry):
  """The carry of a phase from that of the phase before."""
  import jax

  assert stage.transfer is not None and stage.source.fill is not None
  # A compiled function's leaves share no buffers: they can be donated.
  state = jax.jit(stage.transfer, out_shardings=stage.sharding)(carry.agent)
  # The phase before drew from the data alone, which stays where it is.
  return carry._replace(agent=state, source=stage.source.fill(carry.source))
