"""What a run keeps in its folder, and how it is restored."""

import contextlib
import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from experiments.files import locking
from experiments.files.errors import UserError, shown
from experiments.runtime import run_config


@dataclasses.dataclass(frozen=True)
class Saved:
  """What a run's newest checkpoint says before it is read.

  Attributes:
    parts: of its experience; 0 if nothing is saved.
    phase: which of the run's phases it belongs to.
    source: facts of the experience, see `Persistence.save`.
    metrics: digest of the rows of metrics.csv by then, '' if none is kept.
    acted: after which update acting was over, see `budget.Budget`.
  """

  parts: int = 0
  phase: int = 0
  decisions: float = 0.0
  source: dict[str, Any] = dataclasses.field(default_factory=dict)
  metrics: str = ''
  acted: int | None = None

  @classmethod
  def read(cls, extra: dict[str, Any]) -> 'Saved':
    """From a checkpoint's `extra`.

    Raises:
      Damaged: other fields or types.
    """
    import msgspec

    from experiments.runtime import integrity

    try:
      return msgspec.convert({'parts': 1} | extra, cls)
    except msgspec.ValidationError as error:
      raise integrity.Damaged(f'extra: {error}') from error


def peek(workdir: pathlib.Path) -> Saved:
  """What is `Saved` in a folder; all 0 if nothing is.

  Raises:
    UserError: the run cannot continue from what is saved.
  """
  from experiments.runtime import checkpoint

  if not (workdir / 'checkpoints').is_dir():
    return Saved()
  saved = checkpoint.open(
    workdir / 'checkpoints',
    read_only=True,
    run=run_config.read_identity(workdir),
  )
  try:
    found = saved.peek()
  finally:
    saved.close()
  return Saved() if found is None else Saved.read(found[1])


@contextlib.contextmanager
def alone(workdir: pathlib.Path, is_new: bool = False) -> Iterator[None]:
  """Holds a run's folder, which it makes, against other runs.

  All processes call it. `is_new`: no run may have begun there meanwhile.

  Raises:
    UserError: another run holds it, or has begun there.
  """
  from experiments.runtime import distributed

  trouble: UserError | None = None
  with contextlib.ExitStack() as stack:
    if distributed.is_main():
      try:
        stack.enter_context(locking.locked(workdir))
        if is_new and os.path.lexists(workdir / 'config.json'):
          raise UserError(
            f'workdir={shown(workdir)}: another run has just begun there; take '
            'another folder, or start the command again'
          )
      except UserError as error:
        trouble = error
    failed = distributed.of_main({'failed': float(trouble is not None)})
    if failed['failed']:
      words = f'workdir={shown(workdir)}: process 0 cannot use it'
      raise UserError(trouble or words) from trouble
    yield


class Keeper:
  """The checkpoints in a run's folder.

  `checkpoints` holds the whole carry and `replay` the rows of a host's replay;
  `final`, `early` and `best` hold parameters alone, so that a player need not
  read a replay. One thread writes them, in the order of their saves.

  Attributes:
    decisions: taken so far; saved, so that a resumed run counts on.
    budget: of decisions; None if a number of updates ends the run.
    phase: number of the phase whose carry is saved.
    metrics: of the checkpoint that was restored, see `Saved`.
    digest: `() -> str`, of the rows of metrics.csv so far.
  """

  def __init__(self, experiment, source, parts: int, workdir, key, phase=0):
    from experiments.runtime import checkpoint, integrity

    self.enter(phase, source)
    self._key, self._workdir, self._settings = key, workdir, experiment.run
    self._replay = integrity.place(workdir / 'replay')
    self._pool = futures.ThreadPoolExecutor(1, 'checkpoints')
    options = {'run': run_config.read_identity(workdir), 'pool': self._pool}
    self._latest = checkpoint.open(
      workdir / 'checkpoints', keep=experiment.run.keep_checkpoints, **options
    )
    self._params = {
      name: checkpoint.open(workdir / name, keep=1, **options)
      for name in ('final', 'early')
      if name == 'final'
      or 0 < experiment.run.early_update <= experiment.updates
    }
    self._best = None
    if experiment.run.evaluate_every:
      self._best = checkpoint.best(workdir / 'best', **options)
    self._rows: list[dict] = []
    self._most = experiment.run.keep_checkpoints + 1
    self.decisions, self.metrics = 0.0, ''
    self.budget = experiment.budget
    self.digest: Callable[[], str] = lambda: ''
    self._parts = parts

  def enter(self, phase: int, source) -> None:
    """Saves the carry of this phase from now on."""
    self.phase, self._source = phase, source
    self._persistence = source.kept

  def save(self, carry) -> None:
    """Saves the carry and the newest parameters."""
    from experiments.runtime import integrity
    from experiments.runtime.persistence import Held

    step = int(carry.step)
    arrays, facts, parts, rows = carry.source, {}, {}, {}
    kept = self._persistence
    if kept is not None:
      carry = carry._replace(step=np.asarray(step, np.int32))
      # Waits for the save before, which may yet fail.
      newest = self._latest.latest_step()
      with integrity.saving(step, self._replay, newest):
        arrays, facts = kept.save(carry.source, self._replay, step)
      if isinstance(arrays, Held):
        arrays, parts, rows = {}, arrays.parts, arrays.rows()
    extra = Saved(
      self._parts,
      self.phase,
      self.decisions,
      facts,
      self.digest(),
      None if self.budget is None else self.budget.acted,
    )
    self._latest.save(
      step,
      carry._replace(source=arrays),
      dataclasses.asdict(extra),
      parts,
      {f'{self._replay.name}/{name}': one for name, one in rows.items()},
    )
    self._save_final(step, carry.agent.params)
    if kept is not None and kept.prune is not None:
      self._rows = [*self._rows, rows][-self._most :]
      # After a resume, older steps may still be there.
      if len(self._rows) == self._most:
        kept.prune(self._replay, self._rows)

  def _save_final(self, step: int, params) -> None:
    from experiments.runtime import integrity

    final = self._params['final']
    # Counted: a run that lost its newest checkpoint repeats a step.
    try:
      number = final.latest_step()
    except integrity.Damaged:
      number = None
    final.save(0 if number is None else number + 1, params, {'step': step})

  def save_early(self, step: int, agent_state) -> None:
    """Saves the parameters to compare with at the end, if the run asks."""
    if 'early' in self._params:
      self._params['early'].save(step, agent_state.params, {})

  def save_best(self, step: int, metric: float, agent_state) -> None:
    """Saves the parameters if their evaluation is the best so far."""
    if self._best is not None:
      self._best.save(step, metric, agent_state.params)

  def restore(self, carry):
    """The newest saved carry, or None if nothing was saved.

    If a checkpoint or its replay rows are damaged, the one before is used.
    Parameters in `final` that differ from the checkpoint's are replaced.

    Raises:
      UserError: no checkpoint is whole, or none is left of a run that had one.
    """
    from experiments.runtime import distributed

    while True:
      if self._latest.latest_step() is None:
        self._check_lost()
        return None
      restored, trouble = None, ''
      try:
        restored = self._load(carry)
      except _damages() as error:
        trouble = _line(error)
      # One process's rows may be damaged; all must go back together.
      bad = distributed.sum_over_processes({'bad': float(bool(trouble))})
      if not bad['bad']:
        break
      if restored is not None:
        self._source.close(restored.source)
      self._latest.reject(trouble or 'the rows of another process are')
    assert restored is not None
    self._mend_final(restored)
    return restored

  def _load(self, carry):
    from experiments.runtime import integrity, loop
    from experiments.runtime.parts import read_old
    from experiments.runtime.persistence import Held

    kept, template = self._persistence, carry
    parts = {}
    if kept is not None:
      arrays = kept.template()
      if isinstance(arrays, Held):
        parts = {name: one for name, (one, _) in arrays.parts.items()}
        arrays = {}
      # The step is the host's own; all processes have the same.
      step = np.zeros((), np.int32)
      template = carry._replace(source=arrays, step=step)
    found = self._latest.restore(template)
    assert found is not None
    carry, saved = found[0], Saved.read(found[1])
    if saved.phase != self.phase:
      raise UserError(
        f'checkpoints: the newest whole one is of phase {saved.phase}, a '
        f'damaged one of phase {self.phase}: the same command resumes there'
      )
    bad = loop.not_finite(carry.agent.params)
    if bad:
      raise integrity.Damaged(f'the parameters {bad[0]} are not finite')
    if kept is not None:
      arrays, rows = carry.source, {}
      if parts:
        old = saved.source.get('step')
        if isinstance(old, int):
          arrays = read_old(self._replay, old, parts)
        else:
          arrays = Held(self._latest.restore_local(parts))
        rows = arrays.rows()
      key = loop.source_key(self._key)
      state = kept.load(arrays, saved.source, self._replay, key)
      carry, self._rows = carry._replace(source=state), [rows]
    self.decisions, self.metrics = saved.decisions, saved.metrics
    if self.budget is not None:
      self.budget.taken, self.budget.acted = saved.decisions, saved.acted
    return carry

  def _mend_final(self, carry) -> None:
    """Replaces a `final` that is damaged or of a lost future."""
    from experiments.runtime import distributed, integrity

    step, why, final = int(carry.step), '', self._params['final']
    try:
      found = final.peek()
      if found is None or found[1].get('step') != step:
        why = 'it is not of this update'
    except integrity.Damaged as error:
      why = str(error)
    if why:
      if distributed.is_main():
        print(f'note: final is made again from update {step} ({why})')
      self._save_final(step, carry.agent.params)

  def _check_lost(self) -> None:
    """Refuses to start over a run that has lost its checkpoints.

    A run killed before its first checkpoint has no `final` either, because
    that is written later.
    """
    from experiments.runtime import distributed, integrity, metrics

    try:
      had = self._params['final'].latest_step() is not None
    except integrity.Damaged:
      had = True
    last = metrics.last_step(self._workdir / 'metrics.csv')
    every = self._settings.checkpoint_every
    if had or (every and last >= 2 * every):
      raise UserError(
        f'{shown(self._workdir / "checkpoints")}: holds no checkpoint, but the '
        f'run had reached update {last}: restore one from a copy, or delete '
        'the run to start over'
      )
    if last and distributed.is_main():
      print(
        f'note: the run was stopped at update {last}, before its first '
        'checkpoint: it starts over'
      )

  def close(self) -> None:
    """Waits for what is being written."""
    # All are closed even if one fails.
    with contextlib.ExitStack() as stack:
      stack.callback(self._pool.shutdown)
      for keeper in (self._latest, *self._params.values(), self._best):
        if keeper is not None:
          stack.callback(keeper.close)


def _damages() -> tuple[type[Exception], ...]:
  """What reading a damaged checkpoint may raise."""
  from experiments.runtime import integrity

  # Of facts and arrays whose sums were forged.
  forged = (KeyError, TypeError, IndexError, OverflowError, zlib.error)
  return (integrity.Damaged, *forged)


def _line(error: Exception) -> str:
  return shown(' '.join(f'{error}'.split())) or type(error).__name__
