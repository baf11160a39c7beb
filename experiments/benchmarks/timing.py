"""Measuring in turns, and what was measured as a table and as CSV."""

import concurrent.futures
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables


def one_core() -> None:
  """Keeps this process on the last of its cores."""
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def process(initializer: Callable, *args: Any):
  """A process of its own, set up before its first use of jax."""
  return concurrent.futures.ProcessPoolExecutor(
    1,
    multiprocessing.get_context('spawn'),
    initializer=initializer,
    initargs=args,
  )


class Timing(NamedTuple):
  """Seconds a call.

  Attributes:
    wall: float64 `[R]`, one entry a repeat.
    cpu: float64 `[R]`, of the process.
  """

  wall: np.ndarray
  cpu: np.ndarray


class Row(NamedTuple):
  """One line of the results.

  Attributes:
    what: `search`, `learner`, `acting`, `seeds`, `devices`, `memory` or
      `roofline`.
    name: what was measured.
    setting: its sizes.
    unit: of the next numbers.
    median: over repeats, by wall second where it is a speed.
    low: the slowest repeat.
    high: the fastest repeat.
    per_cpu_second: median by CPU second.
    ratio: median over the baseline's median, by wall second.
    ratio_cpu: the same by CPU second.
    note: what it is compared with, and what was checked.
  """

  what: str
  name: str
  setting: str
  unit: str
  median: float
  low: float
  high: float
  per_cpu_second: float
  ratio: float = math.nan
  ratio_cpu: float = math.nan
  note: str = ''


class Sizes(NamedTuple):
  """How much is measured.

  Attributes:
    repeats: of everything.
    least_seconds: calls are repeated until one measurement takes as long.
    batch: roots.
    actions: of the table model.
    simulations: a search.
    deep: simulations of the deep searches.
    embeddings: float32 numbers in an embedding, besides the state.
    matmul: rows of the square matrices of the peak.
    steps: steps of a simulator in one measurement.
    updates: updates in one measurement of waiting.
  """

  repeats: int = 9
  least_seconds: float = 0.3
  batch: int = 64
  actions: int = 6
  simulations: int = 50
  deep: tuple[int, ...] = (200, 800)
  embeddings: tuple[int, ...] = (0, 3328)
  matmul: int = 2048
  steps: int = 200
  updates: int = 100


QUICK = Sizes(
  least_seconds=0.0,
  batch=4,
  simulations=8,
  deep=(12,),
  embeddings=(0,),
  matmul=64,
  steps=5,
  updates=4,
)


def interleaved(
  tasks: Mapping[str, Callable[[], Any]],
  repeats: int,
  least_seconds: float = 0.0,
  clocks: Sequence[Callable[[], float]] = (
    time.perf_counter,
    time.process_time,
  ),
) -> dict[str, Timing]:
  """Times tasks in turns, so that a change of load meets all of them.

  Args:
    tasks: each is called once before (which compiles), and must not return
      before its work is done.
    repeats: rounds.
    least_seconds: a task is called so often in a row that a measurement
      takes about as long.
    clocks: wall and CPU time, in seconds.

  Returns:
    Seconds a call for each task.
  """
  calls = {}
  for name, task in tasks.items():
    task()
    calls[name] = 1
    if least_seconds:
      start = clocks[0]()
      task()
      calls[name] = max(math.ceil(least_seconds / (clocks[0]() - start)), 1)
  seconds = {name: [] for name in tasks}
  for _ in range(repeats):
    for name, task in tasks.items():
      start = [clock() for clock in clocks]
      for _ in range(calls[name]):
        task()
      taken = [clock() - t for clock, t in zip(clocks, start)]
      seconds[name].append([t / calls[name] for t in taken])
  return {name: Timing(*np.asarray(s).T) for name, s in seconds.items()}


def speed_row(
  what: str,
  name: str,
  setting: str,
  unit: str,
  amount: float,
  timing: Timing,
  baseline: Timing | None = None,
  note: str = '',
) -> Row:
  """A `Row` for `amount` units a call, beside a baseline of as many."""
  speed = amount / timing.wall
  # A CPU clock may stand still over a very short measurement.
  cpu = np.median(timing.cpu)
  ratios = (math.nan, math.nan)
  if baseline is not None:
    ratios = (
      float(np.median(speed) / np.median(amount / baseline.wall)),
      float(np.median(baseline.cpu) / cpu) if cpu else math.nan,
    )
  return Row(
    what,
    name,
    setting,
    unit,
    float(np.median(speed)),
    float(speed.min()),
    float(speed.max()),
    float(amount / cpu) if cpu else math.nan,
    *ratios,
    note,
  )


def machine() -> dict[str, str]:
  """What the numbers depend on, for the results' last columns."""
  import jax

  packages = ('jax', 'jaxlib', 'mctx', 'envpool', 'numpy')
  versions = [f'{p} {importlib.metadata.version(p)}' for p in packages]
  device = jax.devices()[0]
  return {
    'machine': f'{platform.machine()}, {_processor()}, {device.device_kind}',
    'threads': str(len(os.sched_getaffinity(0)))
    if hasattr(os, 'sched_getaffinity')
    else str(os.cpu_count()),
    'load': f'{os.getloadavg()[0]:.1f}',
    'versions': ', '.join([f'python {platform.python_version()}', *versions]),
    'compile': 'not in',
  }


def _processor() -> str:
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except OSError:
    return platform.processor()
  names = [li for li in text.splitlines() if li.startswith('model name')]
  return names[0].partition(':')[2].strip() if names else platform.processor()


def write_rows(path: Any, rows: Sequence[Row], about: dict[str, str]) -> None:
  """Writes the results, atomically; each line says on what machine."""
  lines: list[list[Any]] = [[*Row._fields, *about]]
  for row in rows:
    lines.append([*('' if x != x else x for x in row), *about.values()])
  tables.write_lines(pathlib.Path(path), lines, digits=6)


def print_rows(rows: Sequence[Row]) -> None:
  """A table for people, for each setting and unit."""
  from rich.table import Table

  from experiments.report import terminal

  groups: dict[str, list[Row]] = {}
  for row in rows:
    title = f'{row.what}: {row.unit}, {row.setting}'
    groups.setdefault(title, []).append(row)
  for title, group in groups.items():
    notes: dict[str, list[str]] = {}
    for row in group:
      notes.setdefault(row.note, []).append(row.name)
    lines = [f'{", ".join(n)}: {note}' for note, n in notes.items() if note]
    table = Table(title=title, caption='\n'.join(lines), caption_justify='left')
    table.add_column('', overflow='fold')
    for column in ('median', 'min', 'max', 'by CPU s', 'ratio', 'CPU'):
      table.add_column(column, justify='right', no_wrap=True)
    for row in group:
      table.add_row(row.name, *map(short, row[4:10]))
    terminal.show(table)


def short(number: float) -> str:
  """Three digits: 0.0712, 84.8, 84.8k, 1.26M; nothing for NaN."""
  if math.isnan(number):
    return ''
  size, letter = 1.0, ''
  for larger, its in ((1e3, 'k'), (1e6, 'M')):
    # What would be rounded up to the next size is of the next size.
    if abs(number) >= 0.9995 * larger:
      size, letter = larger, its
  digits = f'{number / size:#.3g}' if letter else f'{number:.3g}'
  return digits.rstrip('.') + letter
