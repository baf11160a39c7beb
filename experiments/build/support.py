"""Warns of targets beyond what the value and reward heads can represent.

The heads are categorical over a bounded support, and targets beyond it are
clipped: they look the same as its end.
"""

from collections.abc import Mapping
from typing import Any

# Share of an interval's targets; single ones do no harm.
_SHARE = 0.01


def warning(experiment: Any, metrics: Mapping[str, float]) -> str | None:
  """One line if more than 1% of some targets are clipped, else None.

  `metrics` are a row, see `agents.core.unroll.support_metrics`.
  """
  from networks import heads

  parts, remedy = [], []
  for name in ('value', 'reward'):
    share = metrics.get(f'{name}_clipped', 0.0)
    if not share > _SHARE:
      continue
    bins = getattr(experiment.config.network, f'{name}_bins')
    # The means over an interval of each batch's largest.
    seen = metrics[f'{name}_largest']
    need = max(heads.bins_for(seen), bins + 2)
    parts.append(
      f'{share:.0%} of the {name} targets are beyond the support, which ends '
      f'at {heads.support_end(bins):.4g} ({name}_bins={bins}); up to about '
      f'{seen:.4g} were seen'
    )
    remedy.append(f'--set={name}_bins={need}')
  if not parts:
    return None
  return f'note: {"; ".join(parts)}. They are clipped: take {" ".join(remedy)}'


def worst(curve: list[dict[str, float]]) -> dict[str, float]:
  """The row of a curve that clips most; {} for an empty one."""
  share = lambda row: max(
    row.get('value_clipped', 0.0), row.get('reward_clipped', 0.0)
  )
  return max(curve, key=share, default={})
