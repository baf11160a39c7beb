"""What a run prints about itself."""

import pathlib
from typing import Any

from experiments import build
from experiments.report import terminal


def planned(experiment: build.Experiment) -> str:
  """How many updates a run is to have, as text."""
  about = 'about ' if experiment.material.acts else ''
  return f'{about}{experiment.updates:,}'


def announce(
  experiment: build.Experiment, trainer: Any, workdir: pathlib.Path
) -> None:
  """Prints what is about to be trained, on what."""
  import jax

  from experiments.runtime import distributed

  layout, agent = trainer.layout, trainer.stages[-1].agent
  state = jax.eval_shape(agent.init, jax.random.key(0))
  material = experiment.material
  about = material.describe(experiment, trainer.spec)
  _, processes = distributed.process()
  deal = f'{layout.mesh.size} learn'
  if layout.acting:
    deal += f', {len(layout.acting) * processes} act'
  length = (
    f'{experiment.steps:,} decisions, about {experiment.updates:,} updates'
  )
  shares = ' of environments and replay'
  first = f'{experiment.run.warmup_decisions:,} time steps before the first'
  first = f'compiling, then {first} update: the first numbers take a while'
  if not material.acts:
    parts = [f'{s.name} to {s.end or 0:,}' for s in trainer.stages]
    length = f'{experiment.updates:,} updates ({", ".join(parts)})'
    shares, first = '', 'compiling: the first numbers take a while'
  for line in about.before:
    terminal.say(line)
  terminal.say(
    f'{experiment.agent_name} on {about.what}',
    *about.after,
    f'{terminal.parameters(state.params)}, {length} of '
    f'{experiment.run.batch_size} rows, seed {experiment.seed}',
    f'{terminal.device()}, '
    f'{processes} process{"es" if processes > 1 else ""}: {deal}, '
    f'{layout.parts} part{"s" if layout.parts > 1 else ""}{shares}',
    f'folder: {workdir}',
    first,
  )


def tell_work(waited: float, seconds: float) -> None:
  """Prints the memory used and how long the learner waited, in seconds.

  `waited` is of all processes, `seconds` the run's.
  """
  from experiments.runtime import distributed, watch

  peaks = watch.peak_memory().items()
  used = ', '.join(f'{x / 1e9:.2f} GB of the {name}' for name, x in peaks)
  # Every process has waited for its own actors.
  share = waited / distributed.process()[1] / max(seconds, 1e-9)
  print(f'waited for experience: {share:.1%} of the time; memory: {used}')
