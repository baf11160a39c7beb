"""Executes notebooks and writes them as Markdown with figures.

python -m experiments.notebook compose             # docs/notebooks/compose.md
python -m experiments.notebook compose --tiny      # seconds, runs/notebooks/
python -m experiments.notebook compose --set=NUM_SEEDS=8

A notebook is a jupytext percent file, `experiments/notebooks/NAME.py`, whose
first cell is prose that begins with the title. The cell with
`tags=["parameters"]` assigns literals. The first is `TINY = False`, on which
the sizes depend, as in `NUM_SEEDS = 4 if TINY else 32`. The heading of a cell
that draws describes the figure, `alt="Return against updates"`. The Markdown
shows figures and printed text, but not the value of a cell's last expression.
"""

import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.notebooks import execute
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks


def define_flags() -> None:
  """The flags of `python -m experiments.notebook [NAME ...]`."""
  from absl import flags

  flags.DEFINE_bool(
    'tiny', False, 'use tiny sizes, as tests do; the same as --set=TINY=True'
  )
  flags.DEFINE_multi_string(
    'set', [], 'PARAMETER=VALUE of the notebook, repeatable'
  )
  flags.DEFINE_string(
    'out',
    None,
    'the folder for the Markdown; docs/notebooks if left out, or '
    'runs/notebooks if a parameter is set',
  )
  flags.DEFINE_bool(
    'check',
    False,
    'check that the Markdown matches the notebook, without executing it',
  )


def main(asked: Sequence[str]) -> None:
  """Executes the named notebooks, or all if none is named."""
  from absl import flags

  values: Mapping[str, Any] = flags.FLAGS.flag_values_dict()
  assignments = [*(['TINY=True'] if values['tiny'] else []), *values['set']]
  changed = execute.ROOT / 'runs' / 'notebooks'
  out = pathlib.Path(
    values['out'] or (changed if assignments else execute.DOCS)
  )
  configs.check_place('out', out, folder=True)
  if values['check']:
    flag_checks.refuse(['set', 'tiny'], 'with --check')
  for name in asked:  # Refuses wrong names before the first takes minutes.
    execute.code(name, assignments)
  for name in asked or execute.names():
    if values['check']:
      execute.check(name, out)
      continue
    start = time.perf_counter()
    path = execute.write(name, execute.execute(name, assignments), out)
    print(f'results: {path}, {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  # The flags come after the names.
  split = next(
    (i for i, x in enumerate(sys.argv[1:], 1) if x.startswith('-')),
    len(sys.argv),
  )
  chosen, sys.argv = sys.argv[1:split], sys.argv[:1] + sys.argv[split:]
  define_flags()
  configs.run_main(lambda: main(chosen))
