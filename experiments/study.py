"""Runs one of the studies that the results rest on.

python -m experiments.study                # lists them
python -m experiments.study catch          # a table of training runs
python -m experiments.study newton --out=experiments/results
"""

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.files.errors import UserError, shown
from experiments.runtime import config as configs
from experiments.studies import runner, table

# Studies with flags of their own, each a module of `experiments.studies`.
OWN = {
  'atac_game': "ATAC's game in random tables, and its inequality",
  'backgammon_players': 'how strong TD-Gammon plays with planners on top',
  'connect_four_players': 'how strong AlphaZero plays with planners on top',
  'connect_four_positions': 'random positions, judged by a perfect solver',
  'control': 'planners on top of actors and critics trained on data',
  'equity': 'points that backgammon players lose per turn',
  'newton': "the book's worked examples, recomputed",
  'offline': 'agents that learn from data sets, side by side',
  'pruning': 'lookahead with coarse later stages',
  'sampling_operators': 'the error of policy improvement from samples',
  'specialisation': 'which experts process which words',
}


class Study(NamedTuple):
  """A study as a command: its flags, and what runs it."""

  define_flags: Callable[[], None]
  main: Callable[[], None]


def find(name: str) -> Study:
  """Finds a study by its name.

  Raises:
    UserError: no study has this name.
  """
  if name in OWN:
    module = importlib.import_module(f'experiments.studies.{name}')
    return Study(module.define_flags, module.main)
  if name in table.STUDIES:
    return Study(runner.define_flags, functools.partial(runner.main, name))
  if name.startswith('-'):
    raise UserError(
      f'{shown(name)}: the name of a study must come first, as in python -m '
      'experiments.study catch'
    )
  names = sorted([*OWN, *table.STUDIES])
  close = difflib.get_close_matches(name, names, 1)
  known = f'did you mean {close[0]}? ' if close else ''
  raise UserError(
    f'study={shown(name)}: unknown; {known}must be one of {", ".join(names)}'
  )


def show() -> None:
  """Prints the names of all studies."""
  width = max(map(len, OWN))
  print('Studies with flags of their own:')
  for name, about in OWN.items():
    print(f'  {name:{width}}  {about}')
  print(f'Tables of training runs:\n  {", ".join(table.STUDIES)}')
  print('python -m experiments.study NAME --help lists the flags of a study.')


def main(argv: Sequence[str]) -> None:
  """Runs the study that the first argument names."""
  from absl import flags

  if len(argv) < 2 or argv[1] in ('--help', '-h', '--helpfull', '--helpshort'):
    show()
    return
  try:
    study = find(argv[1])
  except UserError as error:
    configs.fail(str(error), error)
  sys.argv = [argv[0], *argv[2:]]
  known = set(flags.FLAGS)
  study.define_flags()
  for name in set(flags.FLAGS) - known:
    # absl's --help lists those of the main module only.
    flags.declare_key_flag(name)
  configs.run_main(study.main)


if __name__ == '__main__':
  main(sys.argv)
