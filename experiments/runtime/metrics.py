"""Where a run's numbers go: a CSV file, TensorBoard, wandb, the terminal."""

import contextlib
import csv
import hashlib
import importlib
import io
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from experiments.files import reading, tables
from experiments.files.errors import UserError, shown
from experiments.files.writing import open_append, write_text, writing


class Writer(NamedTuple):
  """Something that takes rows of numbers.

  Attributes:
    write: `(step, row) -> None`; `row` maps names to scalars (Python's, numpy's
      or 0-d arrays) or to short strings.
    digest: `() -> str`, of the rows so far, or None.
  """

  write: Callable[[int, Mapping[str, Any]], None]
  close: Callable[[], None]
  digest: Callable[[], str] | None = None


def tee(*writers: Writer) -> Writer:
  """Hands every row to all writers, in order."""

  def write(step: int, row: Mapping[str, Any]) -> None:
    for writer in writers:
      writer.write(step, row)

  def close() -> None:
    # All are closed even if one fails.
    with contextlib.ExitStack() as stack:
      for writer in writers:
        stack.callback(writer.close)

  return Writer(write, close)


def csv_writer(
  path: str | os.PathLike, resume_step: int | None = None, must_be: str = ''
) -> Writer:
  """Appends rows to a CSV file whose first column is `step`.

  Its folder must exist. A new name gets a column at the end (the file is
  rewritten atomically), blank in earlier rows. Rows are flushed when `write`
  returns.

  Args:
    resume_step: where a resumed run continues. Later rows, of the future that
      was lost, are removed. None starts a new file.
    must_be: the digest of the rows up to there, '' if unknown; a line is
      printed if they have another one.

  Raises:
    UserError: the file to be continued is damaged.
  """
  path = pathlib.Path(path)
  columns, rows = ['step'], []
  if resume_step is not None and os.path.lexists(path):
    columns, rows = _read(path, resume_step)
  sums = hashlib.sha256()
  for row in rows:
    sums.update(_known(row))
  if must_be and must_be != sums.hexdigest():
    print(
      f'note: {shown(path)} is not what it was at update {resume_step}: rows '
      'are missing or changed; restore the file from a copy to have the whole '
      'curve',
      flush=True,
    )
  write_text(path, _csv_text(columns, rows))

  def write(step: int, row: Mapping[str, Any]) -> None:
    nonlocal columns
    cells = {'step': str(int(step))} | {k: _cell(v) for k, v in row.items()}
    new = [name for name in cells if name not in columns]
    if new:
      columns = columns + new
      write_text(path, _csv_text(columns, _read(path)[1]))
    with open_append(path) as file, writing(path):
      line = _csv_line(cells.get(name, '') for name in columns)
      file.write(line.encode('utf-8'))
    sums.update(_known(cells))

  return Writer(write, lambda: None, sums.hexdigest)


def _known(row: Mapping[str, str]) -> bytes:
  """A row as it is whatever columns are added to the file."""
  return repr(sorted((n, x) for n, x in row.items() if x)).encode()


def last_step(path: str | os.PathLike) -> int:
  """The step of the last row that `csv_writer` wrote, 0 if there is none.

  Raises:
    UserError: the file is damaged.
  """
  if not os.path.lexists(path):
    return 0
  rows = _read(pathlib.Path(path))[1]
  return int(rows[-1]['step']) if rows else 0


def _read(
  path: pathlib.Path, last: int | None = None
) -> tuple[list[str], list[dict[str, str]]]:
  """Columns and rows up to a step, each step once, in order.

  Drops what a kill left half-written or a second run wrote again.
  """
  try:
    header, rows = tables.read_csv(path)
    if header[:1] != ['step']:
      header, rows = ['step', *header[1:]], [r | {'step': ''} for r in rows]
    by_step = {int(row['step']): row for row in rows}
  except ValueError as error:
    raise UserError(
      f'{error}; or move {shown(path)} away, then the same command resumes'
      if isinstance(error, UserError)
      else f'{shown(path)}: is damaged, step is missing or not a number '
      f'({shown(error)}); repair it or move it away, then the same command '
      'resumes'
    ) from error
  rows = [by_step[n] for n in sorted(by_step) if last is None or n <= last]
  if last is not None:
    # The lost future may have brought columns of its own.
    header = ['step'] + [
      name for name in header[1:] if any(row.get(name) for row in rows)
    ]
  return header, rows


def _csv_text(columns: list[str], rows: list[dict[str, str]]) -> str:
  lines = [_csv_line(row.get(name, '') for name in columns) for row in rows]
  return _csv_line(columns) + ''.join(lines)


def _csv_line(cells: Any) -> str:
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator='\n').writerow(cells)
  return buffer.getvalue()


def _scalar(value: Any) -> Any:
  return value.item() if hasattr(value, 'item') else value


def _cell(value: Any) -> str:
  value = _scalar(value)
  # 9 digits tell any two float32 apart.
  return f'{value:.9g}' if isinstance(value, float) else str(value)


def check_installed(tensorboard: bool, wandb: str) -> None:
  """Refuses early if a package of the writers below is not installed.

  Raises:
    UserError: says how to install it.
  """
  if tensorboard:
    _extra('tensorboardX', 'tensorboard')
  if wandb:
    _extra('wandb', 'wandb')


def _extra(package: str, extra: str) -> Any:
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise UserError(
      f'{extra}: needs {package}: pip install "outplay[{extra}]"'
    ) from error


def tensorboard_writer(
  directory: str | os.PathLike, resume_step: int | None = None
) -> Writer:
  """Writes scalars for TensorBoard; strings are left out.

  TensorBoard hides what lies after `resume_step`, see `csv_writer`.

  Raises:
    UserError: tensorboardX is not installed.
  """
  board = _extra('tensorboardX', 'tensorboard')
  purge = None if resume_step is None else resume_step + 1
  summary = board.SummaryWriter(str(directory), purge_step=purge)

  def write(step: int, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
      value = _scalar(value)
      if not isinstance(value, str):
        summary.add_scalar(name, value, int(step))
    summary.flush()

  return Writer(write, summary.close)


_WANDB_ID = 'wandb_id.txt'


def wandb_writer(
  workdir: str | os.PathLike,
  project: str,
  config: Mapping[str, Any],
  resume_step: int | None = None,
) -> Writer:
  """Writes scalars to a run of Weights & Biases; strings are left out.

  WANDB_MODE and its other variables are respected. `wandb_id.txt` keeps the
  run's id, so that a resumed run continues it. What a killed run logged after
  its checkpoint stays, for wandb's steps only grow: rows up to there are left
  out. Off-line each start has its own folder under `wandb`, with the same id.

  Args:
    config: the settings that wandb shows.
    resume_step: where a resumed run continues; None begins a new run.

  Raises:
    UserError: wandb is not installed, or does not start (no key, no network).
  """
  wandb = _extra('wandb', 'wandb')
  workdir = pathlib.Path(workdir)
  kept = workdir / _WANDB_ID
  known = resume_step is not None and os.path.lexists(kept)
  identity = reading.read_text(kept, limit=1000).strip() if known else None
  try:
    run = wandb.init(
      project=project,
      dir=str(workdir),
      id=identity or secrets.token_hex(4),
      name=workdir.name,
      config=dict(config),
      resume='allow',
      # The terminal is ours.
      settings=wandb.Settings(console='off'),
    )
  except (wandb.errors.Error, ValueError) as error:
    raise UserError(
      f'wandb={project}: {error}; see `wandb login`, or set WANDB_MODE=offline'
    ) from error
  write_text(kept, f'{run.id}\n')

  def write(step: int, row: Mapping[str, Any]) -> None:
    if int(step) >= run.step:
      numbers = {name: _scalar(value) for name, value in row.items()}
      run.log(
        {n: x for n, x in numbers.items() if not isinstance(x, str)},
        step=int(step),
      )

  return Writer(write, run.finish)


class _Pace(NamedTuple):
  """How far a run is, in words: most important first."""

  done: str
  left: str = ''
  speed: str = ''
  numbers: tuple[str, ...] = ()


def progress(
  total: int,
  start: int = 0,
  columns: Sequence[str] = (),
  every_seconds: float = 10.0,
  stream: TextIO | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> Writer:
  """Shows how far a run is: steps, time left, steps/s and chosen numbers.

  On a terminal a live bar, where numbers that find no room in a line are left
  out; else a line at the first row, at most one every `every_seconds`, and one
  at the last step. Speed is since the first row, which leaves compiling out.
  The numbers are `columns`, with their last known values, or the first four of
  the last row.
  """
  terminal = sys.stderr if stream is None else stream
  known: dict[str, Any] = {}
  first: tuple[int, float] | None = None

  def pace(step: int, row: Mapping[str, Any]) -> _Pace:
    nonlocal first, known
    now = clock()
    first = first or (step, now)
    fresh = {k: v for k, v in row.items() if not isinstance(v, str)}
    known = known | fresh if columns else fresh
    names = columns or list(fresh)[:4]
    numbers = [f'{n} {float(known[n]):.4g}' for n in names if n in known]
    found = _Pace(_done(step, total), numbers=tuple(numbers))
    if step <= first[0] or now <= first[1]:
      return found
    speed = (step - first[0]) / (now - first[1])
    left = _clock_text(int(max(total - step, 0) / speed))
    return found._replace(left=f'{left} left', speed=f'{speed:.3g} steps/s')

  if terminal.isatty():
    return _live(total, start, pace, terminal)
  last_line: float | None = None

  def write(step: int, row: Mapping[str, Any]) -> None:
    nonlocal last_line
    found = pace(step, row)
    now = clock()
    due = last_line is None or now - last_line >= every_seconds
    if due or step >= total:
      last_line = now
      parts = [f'step {found.done}', *found.numbers, found.speed, found.left]
      print('  '.join(filter(None, parts)), file=terminal, flush=True)

  return Writer(write, lambda: None)


def _done(step: int, total: int) -> str:
  return f'{step}/{total}  {step / max(total, 1):.0%}'


def _clock_text(seconds: int) -> str:
  minutes, seconds = divmod(seconds, 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
  )


def _live(
  total: int,
  start: int,
  pace: Callable[[int, Mapping[str, Any]], _Pace],
  stream: TextIO,
) -> Writer:
  from rich.console import Console
  from rich.progress import BarColumn, Progress, TextColumn

  console = Console(file=stream)
  drawn = BarColumn()
  bar = Progress(
    # Numbers are not markup.
    TextColumn('{task.fields[done]}', markup=False),
    drawn,
    TextColumn('{task.description}', markup=False),
    console=console,
    refresh_per_second=4,
  )

  def fitted(found: _Pace) -> str:
    """The parts that fit behind the bar."""
    # A terminal may change its width at any time.
    drawn.bar_width = 24 if console.width >= 100 else console.width // 8
    room = console.width - len(found.done) - drawn.bar_width - 2
    text = ''
    for part in filter(None, (found.left, found.speed, *found.numbers)):
      longer = f'{text}  {part}' if text else part
      if len(longer) > room:
        break
      text = longer
    return text

  begun = _Pace(_done(start, total), 'compiling')
  task = bar.add_task(
    fitted(begun), total=total, completed=start, done=begun.done
  )
  bar.start()

  def write(step: int, row: Mapping[str, Any]) -> None:
    found = pace(step, row)
    bar.update(task, completed=step, description=fitted(found), done=found.done)

  return Writer(write, bar.stop)
