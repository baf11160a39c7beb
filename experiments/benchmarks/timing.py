"""Measuring in turns; measurements as a table and as CSV."""

import concurrent.futures
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def on_one_core(
  measure: Callable[..., Iterable[list[Any]]], *args: Any
) -> Iterator[list[Any]]:
  """Measures here on an accelerator, else in a process of one CPU core.

  With more cores a program spends a varying share of its CPU time waiting for
  work, and ratios say little. `measure`, of a module's top level, returns or
  yields lists of `Measurement`; a process yields a single list, its settings
  marked.
  """
  import jax

  if jax.default_backend() != 'cpu' or not hasattr(os, 'sched_setaffinity'):
    yield from measure(*args)
    return
  # The number of threads is fixed by the first use of jax.
  with process(one_core) as pool:
    rows = pool.submit(_together, measure, *args).result()
  yield [row._replace(setting=f'{row.setting}, one core') for row in rows]


def _together(measure: Callable, *args: Any) -> list[Any]:
  return [row for some in measure(*args) for row in some]


class Timing(NamedTuple):
  """Seconds a call.

  Attributes:
    wall: float64 `[R]`, one entry a repeat.
    cpu: float64 `[R]`, of the process.
  """

  wall: np.ndarray
  cpu: np.ndarray


class Measurement(NamedTuple):
  """What was measured of one thing: a line of the results.

  Attributes:
    what: `search`, `learner`, `acting`, `frames`, `seeds`, `devices`, `memory`,
      `transfer` or `roofline`.
    unit: of the next numbers.
    median: over repeats; of a speed, by wall second.
    low: the slowest repeat.
    high: the fastest repeat.
    ratio: median over the baseline's median, by wall second.
    ratio_cpu: the same by CPU second.
    note: the baseline of the ratios, and what was checked.
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


def once(
  what: str, name: str, setting: str, unit: str, number: float, note: str = ''
) -> Measurement:
  """A number that was measured once, and is not a speed."""
  each = number, number, number, math.nan
  return Measurement(what, name, setting, unit, *each, note=note)


def failed(
  what: str, name: str, setting: str, unit: str, reason: str
) -> Measurement:
  """A speed that could not be measured."""
  return once(what, name, setting, unit, math.nan, f'failed: {reason}')


def prepared(
  makers: Mapping[str, Callable[[], Callable[[], Any]]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
  """Makes tasks at the same time, for most of making one is compiling.

  Each task is then called once. Returns the tasks, and why the others could not
  be made or called, in one line each.
  """

  def attempt(function):
    try:
      return function(), ''
    except Exception as error:
      text = ' '.join(str(error).split()) or type(error).__name__
      return None, text[:200]

  # Beyond a few cores a compiler's threads are in each other's way.
  with concurrent.futures.ThreadPoolExecutor(min(len(makers), 8)) as pool:
    made = dict(zip(makers, pool.map(attempt, makers.values())))
  tasks, refused = {}, {}
  for name, (task, reason) in made.items():
    reason = reason or attempt(task)[1]
    if reason:
      refused[name] = reason
    else:
      tasks[name] = task
  return tasks, refused


def scaled(timing: Timing, factor: float) -> Timing:
  """The seconds times a factor."""
  return Timing(timing.wall * factor, timing.cpu * factor)


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

  Each is called once first, to compile, and must return only when its work is
  done; it is then repeated until a measurement takes about `least_seconds`. The
  clocks are wall and CPU time. Returns seconds a call for each task.
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
) -> Measurement:
  """The speed of `amount` units a call, and its ratio to a baseline's."""
  speed = amount / timing.wall
  # A CPU clock may stand still over a very short measurement.
  cpu = np.median(timing.cpu)
  ratios = (math.nan, math.nan)
  if baseline is not None:
    ratios = (
      float(np.median(speed) / np.median(amount / baseline.wall)),
      float(np.median(baseline.cpu) / cpu) if cpu else math.nan,
    )
  return Measurement(
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
  """What the numbers depend on, in the last columns of the results."""
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


def write_rows(
  path: Any, rows: Sequence[Measurement], about: dict[str, str]
) -> None:
  """Writes the results with the machine in each line, atomically."""
  lines: list[list[Any]] = [[*Measurement._fields, *about]]
  for row in rows:
    lines.append([*('' if x != x else x for x in row), *about.values()])
  tables.write_lines(pathlib.Path(path), lines, digits=6)


def print_rows(rows: Sequence[Measurement]) -> None:
  """Prints a table for each setting and unit."""
  from rich.table import Table

  from experiments.report import terminal

  groups: dict[str, list[Measurement]] = {}
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
    # A number that is rounded up to the next size takes its letter.
    if abs(number) >= 0.9995 * larger:
      size, letter = larger, its
  digits = f'{number / size:#.3g}' if letter else f'{number:.3g}'
  return digits.rstrip('.') + letter
