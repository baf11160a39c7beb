"""What a run keeps in its folder, and how it comes back from there."""

import pathlib
from typing import Any


class Keeper:
  """The checkpoints in a run's folder.

  `checkpoints` holds the whole carry and `replay` the rows of a host's replay;
  `final`, `early` and `best` hold parameters on their own, so that a player
  need not read a replay.

  Attributes:
    decisions: taken so far; saved, so that a resumed run counts on.
  """

  def __init__(self, experiment, source, workdir: pathlib.Path, key):
    from experiments.runtime import checkpoint

    self._source, self._key = source, key
    self._replay = workdir / 'replay'
    self._latest = checkpoint.open(
      workdir / 'checkpoints', keep=experiment.run.keep_checkpoints
    )
    self._params = {
      name: checkpoint.open(workdir / name, keep=1)
      for name in ('final', 'early')
      if name == 'final' or experiment.run.early_update
    }
    self._best = None
    if experiment.run.evaluate_every:
      self._best = checkpoint.best(workdir / 'best')
    self._facts: list[dict] = []
    self._most = experiment.run.keep_checkpoints + 1
    self.decisions = 0.0

  def save(self, carry) -> None:
    """Saves the carry and the newest parameters."""
    step = int(carry.step)
    extra: dict[str, Any] = {'phase': 0, 'decisions': self.decisions}
    arrays = carry.source
    if self._source.save is not None:
      arrays, extra['source'] = self._source.save(carry.source, self._replay)
    self._latest.save(step, carry._replace(source=arrays), extra)
    self._params['final'].save(step, carry.agent.params, {})
    if self._source.prune is not None:
      self._facts = [*self._facts, extra['source']][-self._most :]
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
    """The saved carry in the place of a fresh one, or None."""
    from experiments.runtime import loop

    found = self._latest.peek()
    if found is None:
      return None
    _, extra = found
    source = self._source
    template = carry
    if source.template is not None:
      template = carry._replace(source=source.template())
    restored = self._latest.restore(template)
    assert restored is not None
    carry, extra = restored
    self.decisions = extra['decisions']
    if source.load is not None:
      state = source.load(
        carry.source, extra['source'], self._replay, loop.source_key(self._key)
      )
      self._facts = [extra['source']]
      carry = carry._replace(source=state)
    return carry

  def close(self) -> None:
    """Waits for what is being written."""
    self._latest.close()
    for keeper in self._params.values():
      keeper.close()
    if self._best is not None:
      self._best.close()
