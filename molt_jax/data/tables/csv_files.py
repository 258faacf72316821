"""CSV files with any separator and encoding.

The csv module of Python reads them: it keeps rows as they are numbered by a spreadsheet, and says
where a quote is wrong, which pyarrow's reader repairs silently.
"""

import codecs
import csv
import io
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from molt_jax.data import textfiles
from molt_jax.data.cell_values import VISIBLE, shown
from molt_jax.data.tables.records import Cells, Malformed, Records
from molt_jax.errors import UserError

SEPARATORS = ',;\t|'
_WORDS = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'bars'}
_SAMPLE_BYTES = 1 << 16
_SAMPLE_ROWS = 50


class Dialect(NamedTuple):
  """How a text file is written.

  Attributes:
    separator: of cells; '' before it was looked for.
    encoding: a name that Python knows; '' before it was looked for.
    lenient: whether what is odd in one row is that row's alone.
    errors: what is done with bytes that are not of the encoding, as `open` has it.
  """

  separator: str = ''
  encoding: str = ''
  lenient: bool = False
  errors: str = 'strict'


def open_csv(file: pathlib.Path, name: str, dialect: Dialect) -> Records:
  """Opens a CSV file; its first line names the columns.

  Args:
    file: where it is.
    name: what it is called in messages.
    dialect: what is known of it.

  Raises:
    UserError: it cannot be read, or has no columns.
  """
  dialect, remarks = with_encoding(file, name, dialect)
  head = _head(file, name, dialect)
  skipped = 0
  if head.startswith('sep=') and not dialect.separator:  # A line that spreadsheets write.
    dialect, skipped = dialect._replace(separator=head[4]), 1
  if not dialect.separator:
    dialect = dialect._replace(separator=_separator(file, head))
  header = _header(file, name, dialect, skipped)
  notes = [f'separated by {_WORDS.get(dialect.separator, repr(dialect.separator))}']
  notes.append('UTF-8' if dialect.encoding == 'utf-8-sig' else dialect.encoding)

  def read(columns: Sequence[str]) -> Iterator[tuple[int, Cells | Malformed]]:
    return _rows(file, name, dialect, header, columns, skipped + 1)

  folder = str(file.parent.resolve())
  return Records(name, folder, tuple(header), read, tuple(notes), tuple(remarks))


def _header(file: pathlib.Path, name: str, dialect: Dialect, skipped: int) -> list[str]:
  rows = _csv_rows(file, name, dialect)
  for _, row in itertools.islice(rows, skipped, None):
    if not row:
      raise UserError(f'{name} begins with a blank line: its first line names the columns')
    return [cell.strip() for cell in row]
  return []


def _csv_rows(file, name, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
  return textfiles.csv_rows(
    file,
    name=name,
    separator=dialect.separator,
    encoding=dialect.encoding,
    errors=dialect.errors,
  )


def _rows(file, name, dialect, header, columns, before) -> Iterator[tuple[int, Cells | Malformed]]:
  """Yields (row number, cells); blank lines are skipped."""
  places = {column: header.index(column) for column in columns}
  for number, row in itertools.islice(_csv_rows(file, name, dialect), before, None):
    if not row:
      continue
    if dialect.lenient and not VISIBLE.search(''.join(row[len(header) :])):
      row = row[: len(header)]  # Spreadsheets end rows in empty cells.
    if len(row) == len(header):
      yield number, {column: row[place] for column, place in places.items()}
      continue
    why = f'has {len(row)} cells, the header {len(header)}'
    remedy = 'put a text with commas or line breaks in double quotes'
    if not dialect.lenient:
      raise UserError(f'{name} row {number} {why}: {remedy}')
    yield number, Malformed(f'{why}: {remedy}')


# ---- What is found by looking --------------------------------------------------------------------


def _head(file: pathlib.Path, name: str, dialect: Dialect) -> str:
  how = {'encoding': dialect.encoding, 'errors': 'replace', 'newline': ''}
  with textfiles.opened(file, name, **how) as stream:
    return stream.read(_SAMPLE_BYTES)


def _separator(file: pathlib.Path, head: str) -> str:
  """Returns the separator that gives the first line several cells, and further lines as many."""
  if textfiles.kind_of(file) in ('.tsv', '.tab'):
    return '\t'
  best, most = ',', (0.0, 0)
  for separator in SEPARATORS:
    lines = csv.reader(io.StringIO(head, newline=''), delimiter=separator)
    try:
      rows = [row for row in itertools.islice(lines, _SAMPLE_ROWS) if row]
    except csv.Error:
      continue
    columns = len(rows[0]) if rows else 0
    if columns < 2:
      continue
    alike = sum(len(row) == columns for row in rows) / len(rows)
    if (round(alike, 1), columns) > most:
      best, most = separator, (round(alike, 1), columns)
  return best


_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
)


def with_encoding(file: pathlib.Path, name: str, dialect: Dialect) -> tuple[Dialect, list[str]]:
  """Finds the encoding of a text file.

  Its byte order mark says it, or else it is UTF-8. Where it is neither and the dialect is lenient,
  a few damaged bytes among good UTF-8 are replaced, and anything else is read as Windows-1252.

  Returns:
    (the dialect with an encoding, what the user should know of it, a line each).

  Raises:
    UserError: no such file, or no such encoding.
  """
  if dialect.encoding:
    try:
      codecs.lookup(dialect.encoding)
    except LookupError as error:
      raise UserError(
        f'{name}: no encoding {dialect.encoding!r}; give one that Python knows, such as utf-8, '
        'cp1252 or utf-16-le'
      ) from error
    return dialect, []
  with textfiles.opened(file, name, mode='rb') as stream:
    head = stream.read(4)
    for mark, encoding in _MARKS:
      if head.startswith(mark):
        return dialect._replace(encoding=encoding), []
    dialect = dialect._replace(encoding='utf-8-sig')
    if not dialect.lenient:  # Reading will say where it is not UTF-8.
      return dialect, []
    content = head + stream.read()
  try:
    content.decode('utf-8')
    return dialect, []
  except UnicodeDecodeError as error:
    return _not_utf8(content, name, dialect, error.start)


def _not_utf8(content: bytes, name: str, dialect: Dialect, at: int) -> tuple[Dialect, list[str]]:
  text = content.decode('utf-8', 'surrogateescape')
  damaged = sum('\udc80' <= character <= '\udcff' for character in text)
  good = sum(character > '\x7f' for character in text) - damaged
  line = content.count(b'\n', 0, at) + 1
  if good > damaged:
    remark = f'{name}: {damaged:,} bytes are not UTF-8, the first in line {line}: read as U+FFFD'
    return dialect._replace(errors='replace'), [remark]
  try:
    text = content.decode('cp1252')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{name} is not UTF-8 (byte {at}, in line {line}), and not Windows-1252 either: give its '
      'encoding (--encoding=...), or save it as UTF-8'
    ) from error
  words = (word for word in text.split() if not word.isascii())
  remark = (
    f'{name} is not UTF-8 (line {line}): read as Windows-1252, for example '
    f'{shown(next(words), most=30)}; if that is wrong, give --encoding=...'
  )
  return dialect._replace(encoding='cp1252'), [remark]
