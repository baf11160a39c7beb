"""The one way to read and write a CSV file."""

import contextlib
import csv
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from experiments.files import reading, writing
from experiments.files.errors import UserError, shown

# What we write has tens; a file of more keys would show them all in a message.
_MAX_COLUMNS = 4096

Record = TypeVar('Record')


def read_csv(
  path: str | os.PathLike,
  columns: Sequence[str] = (),
  *,
  follow: bool = False,
) -> tuple[list[str], list[dict[str, str]]]:
  """Columns and rows of a CSV file, all text.

  A last line without its end, as a killed process leaves it, is dropped, and
  so are empty lines.

  Args:
    path: of the file.
    columns: that it must have.
    follow: whether the path itself may be a link.

  Raises:
    Missing: there is no such file.
    UserError: it is no CSV file, its lines are of different lengths, or it
      lacks a column.
  """
  return parse_csv(reading.read_text(path, follow=follow), path, columns)


def read_rows(
  path: str | os.PathLike, columns: Sequence[str] = ()
) -> list[dict[str, str]]:
  """Rows of a CSV file, none where there is no file; see `read_csv`.

  Args:
    path: of the file.
    columns: that it must have, if it is there.

  Raises:
    UserError: see `read_csv`.
  """
  try:
    return read_csv(path, columns)[1]
  except reading.Missing:
    return []


def read_records(path: str | os.PathLike, kind: type[Record]) -> list[Record]:
  """Rows of a CSV file as NamedTuples, none where there is no file.

  Args:
    path: of the file.
    kind: the NamedTuple; its fields are the columns, their types those of the
      cells, and None stands for an empty cell.

  Raises:
    UserError: see `read_csv`; a cell is not of its type.
  """
  fields: Sequence[str] = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
  rows = read_rows(path, fields)
  with reading_cells(path):
    return [
      msgspec.convert(
        [row[name] or None for name in fields], kind, strict=False
      )
      for row in rows
    ]


def read_numbers(path: str | os.PathLike) -> list[dict[str, float]]:
  """Rows of a CSV file of numbers without the blank cells; see `read_rows`.

  Args:
    path: of the file.

  Raises:
    UserError: see `read_csv` and `numbers`.
  """
  return [numbers(row, path) for row in read_rows(path)]


def parse_csv(
  text: str, path: str | os.PathLike, columns: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
  """Columns and rows of a CSV file's text; see `read_csv`.

  Args:
    text: the file's.
    path: for messages.
    columns: that it must have.

  Raises:
    UserError: see `read_csv`.

  >>> parse_csv('step,loss\\n1,2.5\\n2,', 'metrics.csv')
  (['step', 'loss'], [{'step': '1', 'loss': '2.5'}])
  """
  where = shown(path)
  complete = text[: text.rfind('\n') + 1]
  reader = csv.reader(io.StringIO(complete))
  try:
    lines = [(reader.line_num, line) for line in reader if line]
  except csv.Error as error:
    raise UserError(
      f'{where}: line {reader.line_num}: is no CSV ({error}); copy it back'
    ) from error
  head = lines[0][1] if lines else []
  if len(head) > _MAX_COLUMNS:
    raise UserError(
      f'{where}: {len(head):,} columns, must be at most {_MAX_COLUMNS:,}'
    )
  missing = [name for name in columns if name not in head]
  if missing:
    known = shown(', '.join(head) or 'none', 120)
    raise UserError(
      f'{where}: has no column {shown(missing[0])}; there are {known}'
    )
  rows = []
  for number, line in lines[1:]:
    if len(line) != len(head):
      raise UserError(
        f'{where}: line {number}: {len(line)} cells, must be {len(head)}; '
        'copy it back'
      )
    rows.append(dict(zip(head, line)))
  return head, rows


def numbers(
  row: Mapping[str, str], path: str | os.PathLike
) -> dict[str, float]:
  """The cells of a row of numbers that are not blank.

  Args:
    row: of `read_csv`.
    path: for the message.

  Raises:
    UserError: one is no number.
  """
  found = {}
  for name, cell in row.items():
    try:
      if cell:
        found[name] = float(cell)
    except ValueError as error:
      raise UserError(
        f'{shown(path)}: {shown(name)}={shown(cell)}: must be a number; copy '
        'it back'
      ) from error
  return found


@contextlib.contextmanager
def reading_cells(path: str | os.PathLike) -> Iterator[None]:
  """Makes a cell that is no number one line for people.

  Args:
    path: of the CSV file whose cells the block converts.

  Raises:
    UserError: the block met a `ValueError` or a column that is not there.
  """
  try:
    yield
  except (KeyError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'{shown(path)}: is damaged ({shown(error)}); copy it back'
    ) from error


def write_lines(
  path: str | os.PathLike,
  lines: Iterable[Sequence[Any]],
  digits: int | None = None,
) -> None:
  """Writes a whole table as CSV, atomically.

  Args:
    path: of the file; its folder is made.
    lines: of cells, the heads first; None is an empty cell.
    digits: significant ones of floats; None writes them whole.
  """

  def cell(x):
    return f'{x:.{digits}g}' if digits and isinstance(x, float) else x

  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerows([cell(x) for x in line] for line in lines)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  writing.write_text(path, text.getvalue())


def write_rows(
  path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]
) -> None:
  """Writes rows under all their columns, atomically; floats with 9 digits.

  Args:
    path: of the file; its folder is made.
    rows: name to cell; a cell that a row lacks is empty.
  """
  columns = list(dict.fromkeys(name for row in rows for name in row))
  lines = ([row.get(name) for name in columns] for row in rows)
  write_lines(path, [columns, *lines], digits=9)


def write_records(
  path: str | os.PathLike, rows: Sequence[Any], digits: int | None = None
) -> None:
  """Writes NamedTuples of one kind, at least one, with a column a field.

  Args:
    path: of the file; its folder is made.
    rows: the NamedTuples; None is an empty cell.
    digits: significant ones of floats; None writes them whole.
  """
  write_lines(path, [rows[0]._fields, *rows], digits)
