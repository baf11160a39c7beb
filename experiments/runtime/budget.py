"""How far a run that acts may go: a number of decisions, then more updates.

How many updates N decisions are due depends on the lengths of episodes
(`sources.Pace`), so a run counts as it goes: it cannot have taken more than N
before update `Budget.stop`. Where it ends does not depend on its intervals.
"""

from typing import Any

import numpy as np

from experiments.runtime.sources import Pace


class Budget:
  """The decisions of one run; it changes as they are taken.

  Attributes:
    taken: so far; float `[R]` of several runs in one program, which share their
      updates: the one with the fewest decides.
    acted: updates after which acting was over; None before that.
  """

  def __init__(self, pace: Pace, extra_updates: int = 0):
    """`extra_updates` follow when acting is over."""
    assert pace.max_decisions is not None
    self._pace, self._most = pace, pace.max_decisions
    self._extra = extra_updates
    self.taken: Any = 0.0
    self.acted: int | None = None

  def add(self, decisions: Any) -> None:
    """Counts decisions, float scalar or `[R]`."""
    self.taken = self.taken + np.asarray(decisions, np.float64)

  def stop(self, step: int) -> int:
    """The update after `step` up to which to go before counting again.

    It is `step` itself where all is done. `taken` must be counted at `step`.
    """
    if self.acted is None:
      left = self._most - int(np.min(self.taken))
      reach = self._pace.reach(step, left)
      if reach > step:
        return reach
      self.acted = step
    return max(self.acted + self._extra, step)
