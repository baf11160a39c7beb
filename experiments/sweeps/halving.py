"""Poor rows end early: asynchronous successive halving.

Li et al. 2020, "A system for massively parallel hyperparameter tuning", in the
variant that stops rows instead of promoting them: at rungs of `first`, `factor
* first`, ... updates a row continues only if it is among the best `1 / factor`
of those that have reached the rung so far. The first rows of a rung continue.
Every row counts by itself, whatever its seed. Everything is read from the rows'
metrics, so a resumed sweep decides alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.sweeps.plan import Row

Curve = Sequence[Mapping[str, float]]


class Halving(NamedTuple):
  """The rule: one in `factor`, at least 2, continues.

  `first` are the first rung's updates; a higher `metric` is better.
  """

  factor: int
  first: int
  metric: str

  def rungs(self, updates: int) -> list[int]:
    """Updates at which a row of `updates` is compared; never at its end."""
    found, rung = [], self.first
    while rung < updates:
      found.append(rung)
      rung *= self.factor
    return found


def value_at(curve: Curve, metric: str, rung: int) -> float | None:
  """A row's metric as soon as it is known at or after a rung; else None."""
  for point in curve:
    if point['step'] >= rung and metric in point:
      return point[metric]
  return None


def is_poor(
  halving: Halving,
  row: Row,
  curves: Mapping[Row, Curve],
  updates: int,
  decided: set[tuple[Row, int]],
) -> str:
  """Why a row is ended now; '' if it continues.

  `curves` are those of all rows that have begun; `decided` are rungs that rows
  have passed, which are not decided again; new ones are added.
  """
  for rung in halving.rungs(updates):
    own = value_at(curves[row], halving.metric, rung)
    if own is None:
      return ''
    if (row, rung) in decided:
      continue
    known = [value_at(c, halving.metric, rung) for c in curves.values()]
    others = sorted((-math.inf if math.isnan(v) else v)
                    for v in known if v is not None)  # fmt: skip
    kept = max(len(others) // halving.factor, 1)
    cutoff = others[-kept] if len(others) >= halving.factor else -math.inf
    if math.isnan(own) or own < cutoff:
      return (
        f'{halving.metric}={own:.6g} after {rung} updates: below the best '
        f'{kept} of {len(others)}'
      )
    decided.add((row, rung))
  return ''
