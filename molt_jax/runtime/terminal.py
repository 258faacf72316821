"""What is printed for people: strings of files without what a terminal would obey, and tables that
never cut a number.
"""

import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.measure
import rich.table
import rich.text

FULL_WIDTH = 130  # Columns of what is not a terminal.
# Control characters, formats (among them those that turn the direction of what follows), halves of
# surrogate pairs, line and paragraph separators.
_OBEYED = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
_JOINERS = '\u200c\u200d'  # Of Persian and Indic scripts, and of emoji: they change nothing else.


def clean(text: str, most: int | None = None) -> str:
  """Returns the text in one line: what a terminal or a page would obey rather than show is spelled
  out, as \\n or \\x1b, and what is longer than `most` characters ends in …
  """
  text = str(text)
  if most is not None and len(text) > most:
    text = text[: most - 1] + '…'
  if text.isprintable():  # Nearly always.
    return text
  return ''.join(_spelled(c) if _is_obeyed(c) else c for c in text)


def json_line(value: Any) -> str:
  """Returns a value as JSON in one line: readable, with what a terminal would obey escaped."""
  text = json.dumps(value, ensure_ascii=False)
  if text.isprintable():
    return text
  return ''.join(json.dumps(c)[1:-1] if _is_obeyed(c) else c for c in text)


def _is_obeyed(character: str) -> bool:
  if character in _JOINERS:
    return False
  return unicodedata.category(character) in _OBEYED or _is_noncharacter(ord(character))


def _is_noncharacter(point: int) -> bool:
  return point & 0xFFFE == 0xFFFE or 0xFDD0 <= point <= 0xFDEF


def _spelled(character: str) -> str:
  return character.encode('unicode_escape').decode('ascii')


def console() -> rich.console.Console:
  """Returns the console of stdout, as wide as the terminal is."""
  width = None if sys.stdout.isatty() else FULL_WIDTH
  return rich.console.Console(width=width, force_jupyter=False)


def print_columns(columns: Mapping[str, Sequence[str]], title: str) -> None:
  """Prints a table whose first column names the rows.

  Where it is wider than the terminal, headings and cells are broken at blanks and after commas;
  columns that do not fit even so go into a further table below. No cell is ever cut.
  """
  screen = console()
  shown = {clean(head): [clean(cell) for cell in cells] for head, cells in columns.items()}
  if _width(screen, _table(shown, title)) > screen.width:
    shown = {
      head.replace(' ', '\n'): [cell.replace(', ', ',\n') for cell in cells]
      for head, cells in shown.items()
    }
  for part in _parts(screen, shown):
    print_table(_table(part, title))


def print_table(table: rich.table.Table) -> None:
  """Prints a table as wide as it is: a terminal that is narrower wraps its lines."""
  screen = console()
  wide = max(screen.width, _width(screen, table))
  rich.console.Console(width=wide, force_jupyter=False).print(table)


def _parts(screen, columns) -> Iterator[dict[str, Sequence[str]]]:
  """Yields as many columns as fit beside the first, and so on."""
  (first, names), *rest = columns.items()
  part = {first: names}
  for head, cells in rest:
    if len(part) > 1 and _width(screen, _table(part | {head: cells})) > screen.width:
      yield part
      part = {first: names}
    part |= {head: cells}
  yield part


def _table(columns, title=None) -> rich.table.Table:
  table = rich.table.Table(title=None if title is None else rich.text.Text(clean(title)))
  for number, head in enumerate(columns):
    justify = 'right' if number else 'left'
    table.add_column(rich.text.Text(head), justify=justify, no_wrap=True)
  for row in zip(*columns.values(), strict=True):
    table.add_row(*map(rich.text.Text, row))
  return table


def _width(screen, table) -> int:
  """The columns that the table takes where nothing is cut."""
  wide = screen.options.update(max_width=100_000, width=100_000)
  return rich.measure.Measurement.get(screen, wide, table).maximum
