"""JSON: one object a line (.jsonl), or one list of objects (.json)."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from molt_jax.data import textfiles
from molt_jax.data.tables import csv_files
from molt_jax.data.tables.records import Cells, Malformed, Records
from molt_jax.errors import UserError

_OBJECT = '{"image": ..., "text": ..., "label": ...}'


def open_json(file: pathlib.Path, name: str, dialect: csv_files.Dialect) -> Records:
  """Opens a file of JSON objects; a key that is in some row may be left out of others.

  Raises:
    UserError: it cannot be read; or, unless the dialect is lenient, a row is no object.
  """
  dialect, remarks = csv_files.with_encoding(file, name, dialect)
  parse = _parsed_list if _is_list(file, name, dialect) else _parsed_lines
  rows: list[tuple[int, dict[str, Any] | Malformed]] = []
  columns: dict[str, None] = {}
  for number, record in parse(file, name, dialect):
    if isinstance(record, Malformed) and not dialect.lenient:
      raise UserError(f'{name} row {number} {record}')
    if not isinstance(record, Malformed):
      columns.update(dict.fromkeys(record))
    rows.append((number, record))

  def read(wanted: Sequence[str]) -> Iterator[tuple[int, Cells | Malformed]]:
    for number, record in rows:
      if not isinstance(record, Malformed):
        record = {column: record.get(column) for column in wanted}
      yield number, record

  folder = str(file.parent.resolve())
  return Records(name, folder, tuple(columns), read, ('JSON',), tuple(remarks))


def _is_list(file: pathlib.Path, name: str, dialect: csv_files.Dialect) -> bool:
  if textfiles.kind_of(file) != '.json':
    return False
  how = {'encoding': dialect.encoding, 'errors': dialect.errors}
  with textfiles.opened(file, name, **how) as stream:
    return stream.read(1000).lstrip().startswith('[')


def _parsed_lines(file, name, dialect) -> Iterator[tuple[int, dict[str, Any] | Malformed]]:
  """Yields (row number, object) of JSON lines; blank lines are skipped."""
  how = {'encoding': dialect.encoding, 'errors': dialect.errors}
  for number, line in textfiles.lines(file, name=name, **how):
    try:
      record = textfiles.parse_json(line)
    except textfiles.NotJson as error:
      yield number, Malformed(f'is not valid JSON ({error}): write one object a line')
      continue
    yield number, _checked(record)


def _parsed_list(file, name, dialect) -> Iterator[tuple[int, dict[str, Any] | Malformed]]:
  how = {'encoding': dialect.encoding, 'errors': dialect.errors}
  text = ''.join(line for _, line in textfiles.lines(file, name=name, **how))
  try:
    records = textfiles.parse_json(text)
  except textfiles.NotJson as error:
    raise UserError(
      f'{name} is not valid JSON ({error}): write a list of objects, or one object a line'
    ) from error
  for number, record in enumerate(records, start=1):
    yield number, _checked(record)


def _checked(record: Any) -> dict[str, Any] | Malformed:
  if isinstance(record, dict):
    return record
  return Malformed(f'is not a JSON object: write {_OBJECT}')
