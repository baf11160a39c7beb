"""Commands by the words that start them, here or in processes of their own."""

import csv
import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from experiments import study

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = sorted(
  path.stem
  for path in (ROOT / 'experiments').glob('*.py')
  if 'configs.run_main(' in path.read_text() and path.stem != 'study'
)
# A table of runs, and each study with flags of its own.
STUDIES = ['study catch', *(f'study {name}' for name in study.OWN)]
LAUNCHERS = [*COMMANDS, *STUDIES]
# What is compiled here need not be compiled again there.
ENVIRONMENT = dict(
  os.environ,
  JAX_PLATFORMS='cpu',
  JAX_COMPILATION_CACHE_DIR=str(ROOT / '.jax_cache'),
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.3',
)


def find(words: Sequence[str]) -> tuple[str, Any, list[str]]:
  """The name of a command, what has its `define_flags` and `main`, the rest.

  Args:
    words: as after `python -m experiments.`, split.
  """
  if words[0] == 'study':
    return ' '.join(words[:2]), study.find(words[1]), list(words[2:])
  command = importlib.import_module(f'experiments.{words[0]}')
  return words[0], command, list(words[1:])


def command(words: str, *flags: str) -> list[str]:
  """What starts a command in a process of its own."""
  return [sys.executable, '-m', *f'experiments.{words}'.split(), *flags]


def launch(
  words: str, *flags: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess:
  """Runs a command to its end, with more variables in its environment."""
  done = subprocess.run(
    command(words, *flags),
    cwd=ROOT,
    env=ENVIRONMENT | variables,
    capture_output=True,
    text=True,
    timeout=600,
  )
  if check:
    assert done.returncode == 0, done.stdout + done.stderr
  return done


def refused(words: str, *flags: str, **variables: str) -> str:
  """The one line of an error with which a command ends in its process."""
  done = launch(words, *flags, check=False, **variables)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  return done.stderr


def read_csv(path) -> list[dict[str, str]]:
  """The rows of a table by their columns' names."""
  with open(path, newline='') as file:
    return list(csv.DictReader(file))
