"""How far a run that acts may go: so many decisions, then further updates.

Updates are paced by rows (`sources.Pace`), so that the number of updates that
N decisions are due depends on the lengths of episodes. A run therefore counts
as it goes on. It never needs to look at each update: `Budget.stop` is an update
until which it cannot have taken more than N. Where the run ends is thus the
same whatever its intervals are.
"""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.runtime.sources import Pace


class Budget:
  """The decisions of one run; it changes as they are taken.

  Attributes:
    taken: decisions so far; float `[R]` of several runs in one program, which
      share their updates: the one with the fewest decides.
    acted: updates after which acting was over; None while it goes on.
  """

  def __init__(self, pace: Pace, extra_updates: int = 0):
    """The budget of a fresh run.

    Args:
      pace: of all environments together, with `max_decisions`.
      extra_updates: that follow when acting is over.
    """
    assert pace.max_decisions is not None
    self._pace, self._most = pace, pace.max_decisions
    self._extra = extra_updates
    self.taken: Any = 0.0
    self.acted: int | None = None

  def add(self, decisions: Any) -> None:
    """Counts decisions, float scalar or `[R]`."""
    self.taken = self.taken + np.asarray(decisions, np.float64)

  def stop(self, step: int) -> int:
    """The update up to which the run may go before it counts again.

    Args:
      step: updates made, of which `taken` is the count.

    Returns:
      A larger number, or where all is done `step`.
    """
    if self.acted is None:
      left = self._most - int(np.min(self.taken))
      reach = self._pace.reach(step, left)
      if reach > step:
        return reach
      self.acted = step
    return max(self.acted + self._extra, step)

  def is_spent(self, rows: Iterable[tuple[int, float]]) -> bool:
    """Whether a run that left these rows of metrics has ended.

    Args:
      rows: updates and decisions so far, in order; one is where acting ended.
    """
    budget, step = copy.copy(self), 0
    for step, budget.taken in rows:
      if budget.acted is None:
        budget.stop(step)
    return budget.stop(step) == step
