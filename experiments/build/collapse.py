"""Says that the latents of different states have become one."""

from collections.abc import Mapping
from typing import Any

# Where pairs of states are this much alike, their differences are rounding.
_COSINE = 0.999
# Untrained networks may begin there.
_UPDATES = 500


def warning(
  experiment: Any, metrics: Mapping[str, float], step: int
) -> str | None:
  """One line if all states have one latent or one projection, else None.

  Args:
    experiment: from `build.describe`.
    metrics: a row; see `agents.core.spread.metrics`.
    step: updates so far.
  """
  if step < _UPDATES:
    return None
  found = {
    name: metrics[f'{name}_cosine']
    for name in ('latent', 'projection')
    if metrics.get(f'{name}_cosine', 0.0) > _COSINE
  }
  if not found:
    return None
  fields = ['observation_scale', 'norm']
  if 'projection' in found:
    fields.insert(0, 'projection_norm')
  network = experiment.config.network
  remedies = [
    f'--set=network.{field}=batch'
    for field in fields
    if getattr(network, field) != 'batch'
  ]
  if not remedies and 'projection' in found:
    remedies = ['--set=variance_weight=1']
  seen = ', '.join(
    f'{name}_cosine={value:.5f}' for name, value in found.items()
  )
  line = f'note: {seen}: all states look the same to the network'
  return f'{line}; try {" or ".join(remedies)}' if remedies else line
