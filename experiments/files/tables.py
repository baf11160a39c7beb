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

  An incomplete last line, which a killed process may leave, and empty lines are
  dropped. The file must have `columns`; `follow` allows a link.

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

  Raises:
    UserError: the file cannot be read by `read_csv`.
  """
  try:
    return read_csv(path, columns)[1]
  except reading.Missing:
    return []


def read_records(path: str | os.PathLike, kind: type[Record]) -> list[Record]:
  """Reads rows of a CSV file as NamedTuples; none if there is no file.

  The fields of `kind` are the columns, with the types of their cells; an empty
  cell is None.

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

  Raises:
    UserError: the file cannot be read by `read_rows`, or a cell is not a
      number.
  """
  return [numbers(row, path) for row in read_rows(path)]


def parse_csv(
  text: str, path: str | os.PathLike, columns: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
  r"""Parses the text of a CSV file into columns and rows, like `read_csv`.

  Raises:
    UserError: the text is not CSV, its lines differ in length, or it lacks a
      column.

  >>> parse_csv('step,loss\n1,2.5\n2,', 'metrics.csv')
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
  """The numbers in a row from `read_csv`, without empty cells.

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
        f'{shown(path)}: {shown(name)}={shown(cell)}: must be a number; '
        'restore the file from a copy'
      ) from error
  return found


@contextlib.contextmanager
def reading_cells(path: str | os.PathLike) -> Iterator[None]:
  """Turns an error in converting a file's cells into a `UserError`.

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
  """Writes a whole table as CSV, atomically, creating its folder.

  Args:
    lines: rows of cells, the column names first; None is an empty cell.
    digits: significant digits of floats; None writes all.
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
  """Writes rows under all their columns, like `write_lines` with 9 digits."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  lines = ([row.get(name) for name in columns] for row in rows)
  write_lines(path, [columns, *lines], digits=9)


def write_records(
  path: str | os.PathLike, rows: Sequence[Any], digits: int | None = None
) -> None:
  """Writes NamedTuples of one kind, at least one, like `write_lines`."""
  write_lines(path, [rows[0]._fields, *rows], digits)
