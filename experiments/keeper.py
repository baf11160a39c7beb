"""What a run keeps in its folder, and how it comes back from there."""

import contextlib
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.runtime import config as configs


class Saved(NamedTuple):
  """What a run's newest checkpoint tells before it is read.

  Attributes:
    parts: that its experience was begun with; 0 if nothing is saved.
    phase: which of the run's phases it belongs to.
  """

  parts: int = 0
  phase: int = 0


def peek(workdir: pathlib.Path) -> Saved:
  """Of the run in a folder; all 0 if nothing is saved."""
  from experiments.runtime import checkpoint

  if not (workdir / 'checkpoints').is_dir():
    return Saved()
  saved = checkpoint.open(workdir / 'checkpoints', read_only=True)
  try:
    found = saved.peek()
  finally:
    saved.close()
  if found is None:
    return Saved()
  _, extra = found
  return Saved(extra.get('parts', 1), extra.get('phase', 0))


class Keeper:
  """The checkpoints in a run's folder.

  `checkpoints` holds the whole carry and `replay` the rows of a host's replay;
  `final`, `early` and `best` hold parameters on their own, so that a player
  need not read a replay.

  Attributes:
    decisions: taken so far; saved, so that a resumed run counts on.
    budget: of the decisions; None where the run ends by its updates.
    phase: which one's carry is kept.
  """

  def __init__(self, experiment, source, parts: int, workdir, key, phase=0):
    from experiments.runtime import checkpoint

    self.enter(phase, source)
    self._key = key
    self._replay = workdir / 'replay'
    self._latest = checkpoint.open(
      workdir / 'checkpoints', keep=experiment.run.keep_checkpoints
    )
    self._params = {
      name: checkpoint.open(workdir / name, keep=1)
      for name in ('final', 'early')
      if name == 'final'
      or 0 < experiment.run.early_update <= experiment.updates
    }
    self._best = None
    if experiment.run.evaluate_every:
      self._best = checkpoint.best(workdir / 'best')
    self._facts: list[dict] = []
    self._most = experiment.run.keep_checkpoints + 1
    self.decisions, self.budget = 0.0, None
    if experiment.ends_by_decisions:
      self.budget = experiment.budget
    self._parts = parts

  def enter(self, phase: int, source) -> None:
    """From here on a phase's carry is kept, whose source this is."""
    self.phase, self._source = phase, source

  def save(self, carry) -> None:
    """Saves the carry and the newest parameters."""
    from experiments.runtime import integrity

    step = int(carry.step)
    extra: dict[str, Any] = {
      'phase': self.phase,
      'decisions': self.decisions,
      'parts': self._parts,
    }
    if self.budget is not None:
      extra['acted'] = self.budget.acted
    arrays = carry.source
    if self._source.save is not None:
      carry = carry._replace(step=np.asarray(step, np.int32))
      with integrity.saving(step, self._replay):
        arrays, extra['source'] = self._source.save(
          carry.source, self._replay, step
        )
    self._latest.save(step, carry._replace(source=arrays), extra)
    final = self._params['final']
    # Counted: a run that lost its newest checkpoint comes to a step again.
    number = final.latest_step()
    number = 0 if number is None else number + 1
    final.save(number, carry.agent.params, {'step': step})
    if self._source.prune is not None:
      self._facts = [*self._facts, extra['source']][-self._most :]
      # After a resume older steps may still be there.
      if len(self._facts) == self._most:
        self._source.prune(self._replay, self._facts)

  def save_early(self, step: int, agent_state) -> None:
    """Keeps the parameters to compare with at the end, if the run asks."""
    if 'early' in self._params:
      self._params['early'].save(step, agent_state.params, {})

  def save_best(self, step: int, metric: float, agent_state) -> None:
    """Keeps the parameters if their evaluation is the best so far."""
    if self._best is not None:
      self._best.save(step, metric, agent_state.params)

  def restore(self, carry):
    """The saved carry in the place of a fresh one, or None.

    Where the rows beside a checkpoint are damaged the one before it is taken.
    """
    from experiments.runtime import distributed, loop

    source, template = self._source, carry
    if source.template is not None:
      # The step is the host's own; all processes have the same.
      step = np.zeros((), np.int32)
      template = carry._replace(source=source.template(), step=step)
    key = loop.source_key(self._key)
    while True:
      restored = self._latest.restore(template)
      if restored is None:
        return None
      carry, extra = restored
      assert extra.get('phase', 0) == self.phase, 'a carry of another phase'
      self.decisions = extra['decisions']
      if self.budget is not None:
        self.budget.taken = self.decisions
        self.budget.acted = extra.get('acted')
      if source.load is None:
        return carry
      state, trouble = None, ''
      try:
        state = source.load(carry.source, extra['source'], self._replay, key)
      except configs.UserError:  # not damage
        raise
      except ValueError as error:  # rows that are gone or garbled
        trouble = str(error)
      # One process's rows may be damaged; all must go back together.
      bad = distributed.sum_over_processes({'bad': float(bool(trouble))})
      if not bad['bad']:
        self._facts = [extra['source']]
        return carry._replace(source=state)
      if state is not None and source.close is not None:
        source.close(state)
      self._latest.reject(trouble or 'the rows of another process are')

  def close(self) -> None:
    """Waits for what is being written."""
    # All are closed even if one fails.
    with contextlib.ExitStack() as stack:
      for keeper in (self._latest, *self._params.values(), self._best):
        if keeper is not None:
          stack.callback(keeper.close)
