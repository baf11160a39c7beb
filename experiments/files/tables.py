"""Reads and writes CSV files."""

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

# Our own files have tens; a message lists all columns of a file.
_MAX_COLUMNS = 4096

Record = TypeVar('Record')


def read_csv(
  path: str | os.PathLike,
  columns: Sequence[str] = (),
  *,
  follow: bool = False,
) -> tuple[list[str], list[dict[str, str]]]:
  """Reads the columns and rows of a CSV file as text.

  An incomplete last line, which a killed process may leave, and empty lines
  are dropped.

  Args:
    path: the file's path.
    columns: the columns that it must have.
    follow: whether the path itself may be a link.

  Raises:
    Missing: the file does not exist.
    UserError: it is not a CSV file, its lines differ in length, or it lacks a
      column.
  """
  return parse_csv(reading.read_text(path, follow=follow), path, columns)


def read_rows(
  path: str | os.PathLike, columns: Sequence[str] = ()
) -> list[dict[str, str]]:
  """Reads the rows of a CSV file; none if the file does not exist.

  Args:
    path: the file's path.
    columns: the columns that the file must have, if it exists.

  Raises:
    UserError: the file cannot be read by `read_csv`.
  """
  try:
    return read_csv(path, columns)[1]
  except reading.Missing:
    return []


def read_records(path: str | os.PathLike, kind: type[Record]) -> list[Record]:
  """Reads rows of a CSV file as NamedTuples; none if there is no file.

  Args:
    path: the file's path.
    kind: the NamedTuple; its fields are the columns, with the types of their
      cells. An empty cell is None.

  Raises:
    UserError: the file cannot be read by `read_csv`, or a cell is not of its
      field's type.
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
  """Reads the rows of a CSV file of numbers, without empty cells.

  Args:
    path: the file's path; without a file there are no rows.

  Raises:
    UserError: the file cannot be read by `read_csv`, or a cell is not a number.
  """
  return [numbers(row, path) for row in read_rows(path)]


def parse_csv(
  text: str, path: str | os.PathLike, columns: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
  """Parses the text of a CSV file into columns and rows, like `read_csv`.

  Args:
    text: the file's text.
    path: the file's path, for messages.
    columns: the columns that it must have.

  Raises:
    UserError: the text is not CSV, its lines differ in length, or it lacks a
      column.

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
      f'{where}: line {reader.line_num}: is not CSV ({error}); restore the '
      'file from a copy'
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
        'restore the file from a copy'
      )
    rows.append(dict(zip(head, line)))
  return head, rows


def numbers(
  row: Mapping[str, str], path: str | os.PathLike
) -> dict[str, float]:
  """The numbers in a row, without empty cells.

  Args:
    row: a row from `read_csv`.
    path: the file's path, for the message.

  Raises:
    UserError: a cell is not a number.
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
  """Turns an error in converting cells in the block into a `UserError`.

  Args:
    path: the path of the CSV file.

  Raises:
    UserError: the block raised `ValueError` or `KeyError`.
  """
  try:
    yield
  except (KeyError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'{shown(path)}: is damaged ({shown(error)}); restore the file from a '
      'copy'
    ) from error


def write_lines(
  path: str | os.PathLike,
  lines: Iterable[Sequence[Any]],
  digits: int | None = None,
) -> None:
  """Writes a whole table as CSV, atomically.

  Args:
    path: the file's path; its folder is created if necessary.
    lines: rows of cells, the column names first; None is an empty cell.
    digits: number of significant digits of floats; None writes all.
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
    path: the file's path; its folder is created if necessary.
    rows: cells by column; missing cells are empty.
  """
  columns = list(dict.fromkeys(name for row in rows for name in row))
  lines = ([row.get(name) for name in columns] for row in rows)
  write_lines(path, [columns, *lines], digits=9)


def write_records(
  path: str | os.PathLike, rows: Sequence[Any], digits: int | None = None
) -> None:
  """Writes NamedTuples of one kind, with a column for each field.

  Args:
    path: the file's path; its folder is created if necessary.
    rows: the NamedTuples, at least one; None is an empty cell.
    digits: number of significant digits of floats; None writes all.
  """
  write_lines(path, [rows[0]._fields, *rows], digits)
