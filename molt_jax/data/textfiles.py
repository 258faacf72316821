"""Text files that say which examples there are: CSV, JSON, and JSON a line.

They are in UTF-8 unless told otherwise, perhaps compressed (.gz), and read line by line. Every
mistake in them is one line that names the file and the place. `name` is what a file is called in
messages.
"""

import contextlib
import csv
import gzip
import json
import os
import pathlib
import threading
import zlib
from collections.abc import Iterator
from typing import Any

from molt_jax.errors import UserError

# The csv module refuses cells of more than 131,072 characters unless told otherwise; its C code
# holds the limit in a long, which has 32 bits on some machines.
_LONGEST_CELL = (1 << 31) - 1
COMPRESSED = '.gz'
UTF8 = 'utf-8-sig'  # With or without a byte order mark.
# What a file begins with that is not UTF-8. UTF-32 comes first: it begins like UTF-16.
_MARKS = (
  (b'\xff\xfe\x00\x00', 'UTF-32'),
  (b'\x00\x00\xfe\xff', 'UTF-32'),
  (b'\xff\xfe', 'UTF-16'),
  (b'\xfe\xff', 'UTF-16'),
)


class NotJson(ValueError):
  """A text that is not the JSON it should be; the message says why."""


def csv_rows(
  file: pathlib.Path,
  *,
  name: str,
  strict: bool = True,
  separator: str = ',',
  encoding: str = UTF8,
  errors: str = 'strict',
) -> Iterator[tuple[int, list[str]]]:
  """Yields (row number, cells) of a CSV file as in RFC 4180; a blank line is a row without cells.

  Args:
    file: where it is.
    name: what it is called in messages.
    strict: whether a quote inside a cell without quotes is refused.
    separator: of cells.
    encoding: default: UTF-8, with or without a byte order mark.
    errors: what is done with bytes that are not of the encoding, as `open` has it.

  Raises:
    UserError: it is no CSV file in that encoding, or cannot be read.
  """
  number = 0
  how = {'newline': '', 'encoding': encoding, 'errors': errors}
  with opened(file, name, **how) as stream, _LONG_CELLS:
    try:
      rows = csv.reader(stream, strict=strict, delimiter=separator)
      for number, cells in enumerate(rows, start=1):
        if number == 1:
          _check_is_text(name, ''.join(cells))
        yield number, cells
    except csv.Error as error:
      raise UserError(
        f'{name} is not a valid CSV file (row {number + 1}: {error}): check its quotes'
      ) from error


def lines(
  file: pathlib.Path, *, name: str, encoding: str = UTF8, errors: str = 'strict'
) -> Iterator[tuple[int, str]]:
  """Yields (line number, line) of a text file; blank lines are skipped.

  Arguments are those of `csv_rows`.

  Raises:
    UserError: it is not of that encoding, or cannot be read.
  """
  with opened(file, name, encoding=encoding, errors=errors) as stream:
    for number, line in enumerate(stream, start=1):
      if number == 1:
        _check_is_text(name, line)
      if line.strip():
        yield number, line


def parse_json(text: str | bytes) -> Any:
  """Returns what a JSON text says; of an object, each key once.

  Raises:
    NotJson: it is no JSON, is nested too deeply, has a number of too many digits, or is an object
      that has a key twice: which of the two values counts would be a guess.
  """
  try:
    value = json.loads(text, object_pairs_hook=_object)
  except json.JSONDecodeError as error:
    line = f'line {error.lineno}, ' if error.lineno > 1 else ''
    raise NotJson(f'{error.msg} at {line}column {error.colno}') from error
  except RecursionError as error:
    raise NotJson('lists or objects inside each other too deeply') from error
  except UnicodeDecodeError as error:
    raise NotJson(f'byte {error.start} is not UTF-8') from error
  except ValueError as error:  # Python bounds the digits of a whole number.
    raise NotJson('a number of too many digits') from error
  if isinstance(value, _KeyTwice):
    raise NotJson(f'the key {value.key[:60]!r} is there twice')
  return value


class _KeyTwice(dict):
  """An object that has a key twice. Deep inside what nobody reads, that is no mistake."""

  key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) == len(pairs):
    return made
  seen = set()
  twice = _KeyTwice(made)
  twice.key = next(key for key, _ in pairs if key in seen or seen.add(key))
  return twice


def kind_of(file: pathlib.Path) -> str:
  """Returns the suffix that says what a file holds, in small letters, compressed or not."""
  is_compressed = file.suffix.lower() == COMPRESSED
  return (file.with_suffix('') if is_compressed else file).suffix.lower()


@contextlib.contextmanager
def opened(file: pathlib.Path, name: str, **how: Any) -> Iterator[Any]:
  """Opens a file as `open` does, or what is compressed in it; what goes wrong, in the block too, is
  a UserError.
  """
  try:
    if not os.path.isfile(file):  # A pipe would be waited for without end.
      raise UserError(f'{name} is not a file that can be read: give a regular file')
    with _open(file, **how) as stream:
      yield stream
  except UnicodeDecodeError as error:
    if how.get('encoding') == UTF8:
      raise UserError(f'{name} {_why_not_utf8(file)}') from error
    raise UserError(
      f'{name} is not {how["encoding"]} (byte {error.start} of a part of it): give its encoding'
    ) from error
  except UnicodeError as error:  # UTF-16 and UTF-32 of an odd number of bytes, for instance.
    raise UserError(f'{name} is not {how["encoding"]} ({error}): give its encoding') from error
  except (EOFError, zlib.error) as error:
    raise UserError(f'{name} is damaged ({error}): compress it again') from error
  except OSError as error:
    raise UserError(f'{name} cannot be read: {error.strerror or error}') from error


def _open(file: pathlib.Path, *, mode: str = 'rt', **how: Any) -> Any:
  return (gzip.open if file.suffix.lower() == COMPRESSED else open)(file, mode, **how)


def _why_not_utf8(file: pathlib.Path) -> str:
  with _open(file, mode='rb') as stream:
    head = stream.read(4)
    for mark, encoding in _MARKS:
      if head.startswith(mark):
        return f'is {encoding}, not UTF-8: save it as UTF-8'
    stream.seek(0)
    offset = 0
    for number, line in enumerate(stream, start=1):
      try:
        line.decode('utf-8')
      except UnicodeDecodeError as error:
        return (
          f'is not UTF-8 (byte {offset + error.start}) in line {number}: save it as UTF-8 '
          '(in a spreadsheet: "CSV UTF-8")'
        )
      offset += len(line)
  return 'is not UTF-8: save it as UTF-8'


def _check_is_text(name: str, first: str) -> None:
  if '\0' in first:
    raise UserError(
      f'{name} has zero bytes in its first line: it is UTF-16, or no text at all; save it as '
      'UTF-8, or give its encoding (utf-16-le, perhaps)'
    )


class _LongCells:
  """Lets cells of a CSV file have any length while one is read.

  The limit is the whole process's, and several threads may read: the last one to end puts it back.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._readers, self._before = 0, 0

  def __enter__(self):
    with self._lock:
      if not self._readers:
        self._before = csv.field_size_limit(_LONGEST_CELL)
      self._readers += 1

  def __exit__(self, *error):
    with self._lock:
      self._readers -= 1
      if not self._readers:
        csv.field_size_limit(self._before)


_LONG_CELLS = _LongCells()
