"""Executes notebooks and writes them as Markdown with their figures.

python -m experiments.notebook compose             # docs/notebooks/compose.md
python -m experiments.notebook compose --tiny      # seconds, runs/notebooks/
python -m experiments.notebook compose --set=NUM_SEEDS=8

A notebook is a percent file of jupytext's, `experiments/notebooks/NAME.py`,
whose first cell is prose that begins with its title. The cell with
`tags=["parameters"]` assigns literals, first of all `TINY = False`; sizes
depend on it, `NUM_SEEDS = 4 if TINY else 32`. A cell that draws says in its
heading what is to be seen, `alt="Return against updates"`. Shown are figures
and what is printed, and not the value of a last expression.
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
    'tiny', False, 'sizes of a test: the same as --set=TINY=True'
  )
  flags.DEFINE_multi_string('set', [], 'PARAMETER=value, of the notebook')
  flags.DEFINE_string(
    'out',
    None,
    'folder of the Markdown; docs/notebooks if left out, or runs/notebooks '
    'where parameters are set',
  )
  flags.DEFINE_bool(
    'check', False, 'execute nothing: is the Markdown that of the notebook?'
  )


def main(asked: Sequence[str]) -> None:
  """Executes the notebooks that are asked for, or all of them."""
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
  for name in asked:  # before the first one takes minutes
    execute.code(name, assignments)
  for name in asked or execute.names():
    if values['check']:
      execute.check(name, out)
      continue
    start = time.perf_counter()
    path = execute.write(name, execute.execute(name, assignments), out)
    print(f'results: {path}, {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  # The flags come behind the names.
  split = next(
    (i for i, x in enumerate(sys.argv[1:], 1) if x.startswith('-')),
    len(sys.argv),
  )
  chosen, sys.argv = sys.argv[1:split], sys.argv[:1] + sys.argv[split:]
  define_flags()
  configs.run_main(lambda: main(chosen))
