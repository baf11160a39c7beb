"""Finds the folders of runs, groups them and reads their numbers."""

import collections
import glob
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables
from experiments.files.errors import Missing, UserError
from experiments.runtime import run_config

Path = str | os.PathLike

# These follow from --steps and do not distinguish groups.
_DERIVED = ('agent.total_updates', 'agent.total_decisions')


class Run(NamedTuple):
  """A run's folder, with the label of its group.

  `method` is the label without the environment, for tables over games.
  """

  workdir: pathlib.Path
  label: str
  env: str
  method: str
  seed: int


def find_runs(workdirs: Iterable[Path]) -> list[Run]:
  """Finds runs in folders or patterns, and groups those that differ in seed.

  A label says how the group differs from the others: preset, agent and
  environment if they differ, and each setting that most groups with these three
  do not have.

  Raises:
    UserError: no such folder, or two folders with the same run.
  """
  found = []
  for pattern in map(str, workdirs):
    matches = sorted(glob.glob(pattern))
    folders = [f for f in matches if (pathlib.Path(f) / 'config.json').exists()]
    if not folders:
      reason = "holds no run's config.json" if matches else 'there is none'
      raise UserError(
        f'workdirs={pattern}: {reason}; name folders of experiments.train'
      )
    found += folders
  if not found:
    raise UserError("workdirs: name at least one run's folder")
  unique = {os.path.realpath(f): pathlib.Path(f) for f in found}
  settings = [_settings(folder) for folder in unique.values()]
  labels = _labels([own for own, _ in settings])
  methods = _labels([own | {'env_name': ''} for own, _ in settings])
  runs, taken = [], {}
  for folder, (own, seed), label, method in zip(
    unique.values(), settings, labels, methods
  ):
    before = taken.setdefault((label, seed), folder)
    if before != folder:
      raise UserError(
        f'workdirs: {before} and {folder} hold the same run, seed {seed}'
      )
    runs.append(Run(folder, label, str(own['env_name']), method, seed))
  return runs


def _settings(folder: pathlib.Path) -> tuple[dict[str, Any], int]:
  """The settings that make a run's group, flat, and its seed."""
  saved = run_config.read_run_config(folder)
  flat = {}

  def add(prefix, tree):
    for name, value in tree.items():
      if isinstance(value, dict):
        add(f'{prefix}{name}.', value)
      else:
        flat[prefix + name] = value

  try:
    seed = int(saved.pop('seed'))
    saved.pop('made_with', None)
    add('', saved)
    _head(flat)
  except KeyError as error:
    raise UserError(f'{folder}/config.json has no {error}') from error
  except (TypeError, ValueError) as error:
    raise UserError(
      f'{folder}/config.json: seed is not a number ({error}); restore the '
      'file from a copy'
    ) from error
  return {n: v for n, v in flat.items() if n not in _DERIVED}, seed


def _head(settings: Mapping[str, Any]) -> tuple[str, str, str]:
  return tuple(settings[n] for n in ('name', 'agent_name', 'env_name'))


def _labels(runs: list[dict[str, Any]]) -> list[str]:
  """A label for each run's settings; equal settings have equal ones."""
  heads = [_head(s) for s in runs]
  # The preset is always shown, agent and environment where they differ.
  shown = [0] + [i for i in (1, 2) if len({h[i] for h in heads}) > 1]
  labels = []
  for own, head in zip(runs, heads):
    alike = [s for s, h in zip(runs, heads) if h == head]
    groups = list({repr(sorted(s.items())): s for s in alike}.values())
    parts = [head[i] for i in shown if i == 0 or head[i] != head[0]]
    for name, value in own.items():
      counts = collections.Counter(repr(s.get(name)) for s in groups)
      most = counts.most_common()
      is_usual = most[0][0] == repr(value)
      if len(most) > 1 and (not is_usual or most[0][1] == most[1][1]):
        parts.append(f'{name.rpartition(".")[2]}={_text(value)}')
    labels.append(', '.join(p for p in parts if p))
  return labels


def _text(value: Any) -> str:
  if isinstance(value, list):
    return ','.join(map(_text, value)) or 'none'
  return str(value).lower() if isinstance(value, bool | None) else str(value)


def read_column(workdir: Path, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
  """Two columns of metrics.csv where both have numbers, float64 `[T]` each.

  Raises:
    UserError: no such file or column, or no numbers in it.
  """
  path = pathlib.Path(workdir) / 'metrics.csv'
  try:
    rows = tables.read_csv(path, (x, y), follow=True)[1]
  except Missing as error:
    raise UserError(f'{path}: is missing; has the run begun?') from error
  pairs = [(row[x], row[y]) for row in rows if row[x] and row[y]]
  try:
    values = np.asarray(pairs, np.float64).reshape(-1, 2)
  except ValueError as error:
    raise UserError(
      f'{path}: {x} or {y} is not a number ({error}); restore the file from a '
      'copy'
    ) from error
  values = values[np.isfinite(values).all(axis=1)]
  if not len(values):
    raise UserError(f'{path} has no row yet with {x} and {y}')
  return values[:, 0], values[:, 1]
