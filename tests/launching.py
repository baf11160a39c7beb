"""Commands by the words that start them, for tests that run them in-process."""

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import study

_EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent / 'experiments'
COMMANDS = sorted(
  path.stem
  for path in _EXPERIMENTS.glob('*.py')
  if 'configs.run_main(' in path.read_text() and path.stem != 'study'
)
# A table of runs, and each study with flags of its own.
STUDIES = ['study catch', *(f'study {name}' for name in study.OWN)]
LAUNCHERS = [*COMMANDS, *STUDIES]


def find(words: Sequence[str]) -> tuple[str, Any, list[str]]:
  """The name of a command, what has its `define_flags` and `main`, the rest.

  Args:
    words: as after `python -m experiments.`, split.
  """
  if words[0] == 'study':
    return ' '.join(words[:2]), study.find(words[1]), list(words[2:])
  command = importlib.import_module(f'experiments.{words[0]}')
  return words[0], command, list(words[1:])
