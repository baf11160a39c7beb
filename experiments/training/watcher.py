"""What is measured of an agent while it trains, besides its losses."""

import dataclasses
import functools
import pathlib
from typing import Any

from experiments import build
from experiments.build import collapse, support
from experiments.files import tables

# Decisions a copy; a game of Atari is cut after 3,000 while training.
_OVERDUE = 3_000


class HeldOut:
  """Windows that are never trained on, from the untrained network's play.

  While training their targets stay as recorded, so that figures of different
  times compare; for policy and value these are the untrained search's. At the
  end the trained agent searches them again, and both networks are measured by
  its targets.
  """

  def __init__(self, experiment: build.Experiment, agent, agent_state):
    import jax

    # On the host a replay takes memory only for the rows that it has.
    settings = dataclasses.replace(
      experiment.run,
      batch_size=experiment.run.hold_out,
      acting='synchronous',
      frames_on='host',
    )
    apart = experiment._replace(run=settings)
    env = build.make_env(experiment, training=True)
    source = build.make_source(apart, env, agent._replace(refresh=None))
    self._key = jax.random.fold_in(jax.random.key(experiment.seed), 2**31 - 2)
    state = source.init(self._key)
    state, self._batch, _ = source.next(state, agent_state, 0, self._key)
    source.close(state)
    self._agent, self._untrained = agent, agent_state.params
    self._losses = jax.jit(agent.evaluate)

  def losses(self, params, batch=None) -> dict[str, float]:
    """Metrics `held_...` of parameters on the recorded or other targets."""
    from experiments.runtime import mesh

    batch = self._batch if batch is None else batch
    found = self._losses(mesh.local(params), batch, self._key)
    return {f'held_{name}': float(value) for name, value in found.items()}

  def compare(self, agent_state, path: pathlib.Path, write=True) -> None:
    """Writes the losses of both networks on the trained agent's targets."""
    import jax

    from experiments.runtime import mesh

    refresh = self._agent.refresh or (lambda state, batch, step, key: batch)
    agent_state = mesh.local(agent_state)
    batch = jax.jit(refresh)(agent_state, self._batch, 0, self._key)
    rows = {
      'untrained': self.losses(self._untrained, batch),
      'trained': self.losses(agent_state.params, batch),
    }
    if write:
      lines = [[network, *row.values()] for network, row in rows.items()]
      tables.write_lines(path, [['network', *rows['trained']], *lines], 6)


class Watcher:
  """What is written and measured during a run.

  Attributes:
    waited: seconds that the learner waited for experience.
    held_out: windows that are never trained on, or None.
  """

  def __init__(self, experiment, trainer, keeper, writer, begin, key):
    from experiments.runtime import loop, watch

    self._experiment, self._keeper, self._writer = experiment, keeper, writer
    self._several = len(trainer.stages) > 1
    self._unsaid = {
      'support': lambda row, step: support.warning(experiment, row),
      'collapse': functools.partial(collapse.warning, experiment),
    }
    self._compiled_since, self.waited = watch.compilations(), 0.0
    self._unended = 0.0
    self.enter(trainer.stages[keeper.phase])
    self.held_out = None
    if experiment.run.hold_out:
      agent = trainer.stages[0].agent
      untrained = loop.init_agent(agent, key)
      self.held_out = HeldOut(experiment, agent, untrained)
      if not begin:
        writer.write(0, self.held_out.losses(untrained.params))

  def enter(self, stage: Any) -> None:
    """Measures this phase's agent from now on."""
    self._stage = stage
    material = self._experiment.material
    self._evaluator = material.evaluate(self._experiment, stage.agent)

  def log(self, step: int, row: dict[str, float]) -> None:
    """Writes a row of metrics."""
    from experiments.runtime import distributed

    keeper = self._keeper
    for kind, warning in list(self._unsaid.items()):
      line = warning(row, step) if distributed.is_main() else None
      if line is not None:
        del self._unsaid[kind]
        print(f'{line} (update {step:,})', flush=True)
    keeper.decisions += row.get('decisions', 0.0)
    self.waited += row.get('wait_seconds', 0.0)
    row |= {'compiled': self._compiled_since()}
    self._look_for_ends(row)
    if self._experiment.material.acts:
      row |= {'decisions': keeper.decisions}
    if self._several:
      row |= {'phase': float(keeper.phase)}
    self._writer.write(step, row)

  def _look_for_ends(self, row) -> None:
    """Prints a note once if no episode has ended for too long."""
    if row.get('episodes') or self._unended is None:
      self._unended = None
      return
    self._unended += row.get('decisions', 0.0)
    copies, steps = self._experiment.env.num_envs, self._experiment.steps
    if self._unended >= min(_OVERDUE * copies, steps / 2) > 0:
      print(
        f'note: env={self._experiment.env_name}: no episode has ended in '
        f'{self._unended:,.0f} decisions of {copies} copies; an environment '
        'without an end needs a limit: --set=env.options=max_episode_steps=N '
        'gives one to those of Gymnasium',
        flush=True,
      )
      self._unended = None

  def measure(self, step: int, agent_state, path: pathlib.Path) -> None:
    """Writes an agent's evaluation; all processes call it."""
    from experiments.runtime import distributed

    found = {}
    if self._evaluator is not None:
      found = distributed.of_main(self._evaluator(agent_state.params, step))
    if distributed.is_main():
      lines = [['step', *found], [step, *found.values()]]
      tables.write_lines(path, lines, digits=9)

  def evaluate(self, step: int, agent_state) -> dict[str, float]:
    """Measures an agent where that is due."""
    from experiments.runtime import distributed

    settings, found = self._experiment.run, {}
    if settings.early_update and step == settings.early_update:
      self._keeper.save_early(step, agent_state)
    if self.held_out is not None and step % settings.hold_out_every == 0:
      found |= self.held_out.losses(agent_state.params)
    every = settings.evaluate_every
    if self._evaluator is not None and every and step % every == 0:
      # All play the same episodes; one's figures decide for all.
      found |= distributed.of_main(self._evaluator(agent_state.params, step))
      metric = found[self._experiment.material.metric]
      self._keeper.save_best(step, metric, agent_state)
    return found
