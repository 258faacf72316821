"""Spreadsheets of Excel and OpenDocument: the first sheet that has cells, as the CSV file of it.

A cell is the text that stands in it: a number its digits, a date in ISO 8601, a formula the value
that was saved with it. Rows are numbered as the spreadsheet numbers them.
"""

import datetime
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from molt_jax.data.cell_values import VISIBLE
from molt_jax.data.tables.csv_files import Dialect
from molt_jax.data.tables.records import Cells, Records
from molt_jax.errors import UserError
from molt_jax.runtime import files, zipped

SUFFIXES = ('.xlsx', '.xlsm', '.xlsb', '.xls', '.ods')
# Where the two kinds of archives have the pictures that lie on a sheet.
_PICTURES = ('xl/media/', 'Pictures/')


def open_spreadsheet(file: pathlib.Path, name: str, dialect: Dialect) -> Records:
  """Opens a spreadsheet; the first row that has cells names the columns.

  Raises:
    UserError: it cannot be read.
  """
  del dialect
  sheet, rows, others = _first_sheet(file, name)
  filled = [n for n, row in enumerate(rows) if _is_filled(row)]
  header = _header(rows, filled)

  def read(columns: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    places = {column: header.index(column) for column in columns}
    for n in filled[1:]:
      yield n + 1, {column: rows[n][place] for column, place in places.items()}

  remarks = []
  if others:
    names = ', '.join(map(repr, others[:3]))
    remarks.append(
      f'{name}: sheet {sheet!r} is read, not {names}: put the one you mean in front, or save it as '
      'CSV'
    )
  if _has_pictures(file):
    remarks.append(
      f'{name}: pictures that lie on a sheet are not read: save them as files, and give their '
      'paths in a column'
    )
  folder = str(file.parent.resolve())
  return Records(name, folder, tuple(header), read, (f'sheet {sheet!r}',), tuple(remarks))


def _first_sheet(file: pathlib.Path, name: str) -> tuple[str, list[list[str]], list[str]]:
  """Returns (name of the sheet, its rows, names of further sheets that have cells)."""
  found: list[tuple[str, list[list[str]]]] = []
  for sheet, cells in _sheets(file, name):
    rows = [[_text(cell) for cell in row] for row in cells]
    if any(map(_is_filled, rows)):
      found.append((sheet, rows))
  if not found:
    raise UserError(f'{name} has no sheet with cells: give one with a row of names and rows')
  return *found[0], [sheet for sheet, _ in found[1:]]


def _sheets(file: pathlib.Path, name: str) -> list[tuple[str, list[list[Any]]]]:
  """Returns (name, cells) of each sheet that is shown."""
  # Whoever reads other tables need not wait for it.
  import python_calamine as calamine

  try:
    with calamine.CalamineWorkbook.from_path(str(file)) as book:
      return [
        (sheet.name, book.get_sheet_by_name(sheet.name).to_python(skip_empty_area=False))
        for sheet in book.sheets_metadata
        if sheet.visible == calamine.SheetVisibleEnum.Visible
        and sheet.typ == calamine.SheetTypeEnum.WorkSheet
      ]
  except calamine.PasswordError as error:
    raise UserError(f'{name} is protected by a password: save it without one') from error
  except (calamine.CalamineError, OSError, ValueError) as error:
    raise UserError(
      f'{name} cannot be read as a spreadsheet ({files.reason(error)}): save it again, or as CSV'
    ) from error


def _header(rows: list[list[str]], filled: list[int]) -> list[str]:
  """Returns the names of the columns, up to the last one that has any cell."""
  width = 1 + max(n for row in filled for n, cell in enumerate(rows[row]) if VISIBLE.search(cell))
  return [cell.strip() for cell in rows[filled[0]][:width]]


def _is_filled(row: Sequence[str]) -> bool:
  return VISIBLE.search(''.join(row)) is not None


def _text(cell: Any) -> str:
  """Returns what a spreadsheet writes of a cell into a CSV file."""
  if isinstance(cell, bool):
    return str(cell).upper()
  if isinstance(cell, float):  # As all numbers are, to the 15 digits that a spreadsheet keeps.
    return f'{cell:.15g}'
  if isinstance(cell, datetime.datetime):
    return cell.isoformat(' ')
  return cell.isoformat() if isinstance(cell, datetime.date | datetime.time) else str(cell)


def _has_pictures(file: pathlib.Path) -> bool:
  try:
    members = zipped.folder(file).members
  except UserError:
    return False  # .xls is no zip, and of another that is odd the sheet could be read.
  return any(name.startswith(_PICTURES) for name in members)
