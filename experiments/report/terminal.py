"""What launchers print: what begins, tables, the results and what comes next.

Standard output is for people; progress goes to standard error.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from experiments.files.errors import shown

# Width of a table in a file or a pipe.
_WIDTH = 120
# Longest line or cell.
_LONGEST = 4000


def say(*lines: str, file: TextIO | None = None) -> None:
  """Prints lines (without line ends); names from files in them are escaped."""
  text = '\n'.join(shown(line, _LONGEST) for line in lines)
  print(text, file=file, flush=True)


def device() -> str:
  """The devices that JAX computes on: `2 x cpu (cpu)`."""
  import jax

  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})'


def begin(what: str, *lines: str, compiles: bool = True) -> None:
  """Prints what is about to be done, and on which device programs compile."""
  lines = (what, *lines)
  if compiles:
    lines = (*lines, f'{device()}; compiling: the first numbers take a while')
  say(*lines)


def counted(number: int, what: str) -> str:
  """`1 run`, `2 runs`."""
  return f'{number:,} {what}{"" if number == 1 else "s"}'


def interval(mean: float, low: float, high: float, form: str = '.3f') -> str:
  """`0.5 [0.2, 0.8]`; the mean only if there is no interval (one seed)."""
  if math.isnan(low) or math.isnan(high):
    return f'{mean:{form}}'
  return f'{mean:{form}} [{low:{form}}, {high:{form}}]'


def parameters(params: object) -> str:
  """The size of networks (or of their shapes): `12,345 parameters`."""
  import jax
  import numpy as np

  size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  return f'{size:,} parameters'


def print_table(
  columns: Sequence[str],
  rows: Sequence[Sequence[str]],
  title: str | None = None,
  left: int = 0,
) -> None:
  """Prints a table of texts, its first `left` columns aligned left."""
  from rich.table import Table
  from rich.text import Text

  # Brackets in names are not markup.
  text = lambda cell, style='': Text(shown(cell, _LONGEST), style)
  table = Table(title=None if title is None else text(title, 'table.title'))
  for i, column in enumerate(columns):
    table.add_column(
      text(column), justify='left' if i < left else 'right', overflow='fold'
    )
  for row in rows:
    table.add_row(*map(text, row))
  show(table)


def show(renderable: object) -> None:
  """Prints something of rich's, 120 columns wide without a terminal."""
  from rich.console import Console

  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  Console(width=None if known else _WIDTH).print(renderable)


def end(results: str, *commands: str) -> None:
  """Prints the results' files and shell commands to try next."""
  lines = [f'results: {results}']
  for i, command in enumerate(commands):
    lines.append(f'{"next: " if not i else "      "}{command}')
  say(*lines)


def ticker(
  what: str,
  total: int | None = None,
  every_seconds: float = 10.0,
  clock: Callable[[], float] = time.monotonic,
) -> Callable[[int], None]:
  """`(count) -> None`, which prints how far something is to standard error.

  It prints at most one line every few seconds.
  """
  last = clock()

  def tick(count: int) -> None:
    nonlocal last
    if clock() - last >= every_seconds:
      last = clock()
      whole = '' if total is None else f' of {total:,}'
      say(f'{what} {count:,}{whole}', file=sys.stderr)

  return tick
