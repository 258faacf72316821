"""One file of a table, .csv or .jsonl: its columns, and rows that are complete."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from molt_jax.data import cells, findings, imagefiles, textfiles
from molt_jax.data.likeness import likeness
from molt_jax.errors import UserError

COLUMNS = ('image', 'text', 'label')
_MOST_COLUMNS = 12  # That a message lists.


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table. `image` is an absolute path; None: absent. `labels` are names."""

  id: str
  image: str | None
  text: str | None
  labels: tuple[str, ...]


def read_table(
  file: pathlib.Path, multi_label: bool, *, unlabelled: bool
) -> tuple[list[Row], list[str]]:
  """Reads and checks one file; a kind of mistake is reported with the first rows that have it.

  Args:
    file: .csv or .jsonl.
    multi_label: whether a row can have several labels.
    unlabelled: whether rows may have none.

  Returns:
    rows, and what the user should know of how they were read, a line each.
  """
  folder = file.parent.resolve()
  found = findings.Findings(functools.partial(_where, file))
  rows, numbers, images = [], [], []
  for number, record in _READERS[file.suffix](file):
    found.row = number
    image = found.read('image', record.get('image'))
    text = found.read('text', record.get('text'))
    labels = found.read_labels(record.get('label'), several=multi_label)
    path = os.path.join(folder, image) if image else None
    rows.append(Row(f'{file.name}:{number}', path, text, labels))
    numbers.append(number)
    images.append(image)
  if not rows:
    raise UserError(
      f'{file.name} has no rows: it needs the columns {", ".join(COLUMNS)} and at least one row'
    )
  found.check()
  remarks = found.remarks()
  _check_complete(file, dict(zip(numbers, rows, strict=True)), multi_label, unlabelled, remarks)
  _check_images(file, numbers, rows, images)
  return rows, remarks


def _where(file: pathlib.Path, column: str, numbers: Sequence[int]) -> str:
  return f'{file.name} {findings.rows_in_words(numbers)}: {column}'


def _check_complete(
  file: pathlib.Path,
  rows: Mapping[int, Row],
  multi_label: bool,
  unlabelled: bool,
  remarks: Sequence[str],
) -> None:
  """Raises UserError where a row has no content or lacks a label that it needs."""
  empty = [n for n, row in rows.items() if row.image is None and row.text is None]
  if empty:
    hint = ' (a word such as nan is an empty cell)' if any('nothing' in x for x in remarks) else ''
    rows_in_words = findings.rows_in_words(empty)
    raise UserError(
      f'{file.name} {rows_in_words}: both image and text are empty{hint}; '
      'fill one in or remove the row'
    )
  blank = [n for n, row in rows.items() if not row.labels]
  if blank and (multi_label or not unlabelled or len(blank) == len(rows)):
    raise UserError(
      f'{file.name} {findings.rows_in_words(blank)}: label is empty; fill it in or remove the row'
    )


def _check_images(
  file: pathlib.Path, numbers: Sequence[int], rows: Sequence[Row], images: Sequence[str | None]
) -> None:
  """Raises UserError where an image is not there, or is no regular file."""
  why = {row.image: imagefiles.why_no_file(row.image) for row in rows if row.image}
  bad = [
    (number, image, why[row.image])
    for number, row, image in zip(numbers, rows, images, strict=True)
    if row.image and why[row.image]
  ]
  for missing in (True, False):
    named = [
      f'row {number} {cells.plain(image)}' + ('' if missing else f' ({reason})')
      for number, image, reason in bad
      if (reason == imagefiles.NO_FILE) is missing
    ]
    what = 'image files do not exist' if missing else 'images are not files'
    if named:
      raise UserError(
        f'{file.name}: {len(named)} {what}: {findings.some(named)}; {_images_remedy(file, bad)}'
      )


def _images_remedy(file: pathlib.Path, bad: Sequence[tuple[int, str, str]]) -> str:
  if any(imagefiles.looks_like_address(image) for _, image, _ in bad):
    return 'addresses are not read: save the images as files'
  return f'paths are relative to {file.parent}'


def _read_csv(file: pathlib.Path) -> Iterator[tuple[int, dict[str, str]]]:
  """Yields (row number, {column: cell}); blank lines are skipped."""
  header: list[str] = []
  columns: dict[str, int] = {}
  for number, row in textfiles.csv_rows(file, name=file.name):
    if number == 1:
      header = [name.strip() for name in row]
      columns = {name: header.index(name) for name in COLUMNS if name in header}
      if not header:
        raise UserError(f'{file.name} begins with a blank line: its first line names the columns')
      _check_columns(file, header)
    elif row and len(row) != len(header):
      raise UserError(
        f'{file.name} row {number} has {len(row)} cells, the header {len(header)}: '
        'put a text with commas or line breaks in double quotes'
      )
    elif row:
      yield number, {name: row[place] for name, place in columns.items()}


def _read_jsonl(file: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
  """Returns (row number, object); blank lines are skipped.

  A key that is in some row may be left out of others.
  """
  records = []
  columns: dict[str, None] = {}
  for number, line in textfiles.lines(file, name=file.name):
    try:
      record = textfiles.parse_json(line)
    except textfiles.NotJson as error:
      raise UserError(
        f'{file.name} row {number} is not valid JSON ({error}): write one object a line'
      ) from error
    if not isinstance(record, dict):
      raise UserError(
        f'{file.name} row {number} is not a JSON object: '
        'write {"image": ..., "text": ..., "label": ...}'
      )
    columns.update(dict.fromkeys(record))
    records.append((number, {name: record[name] for name in COLUMNS if name in record}))
  if records:
    _check_columns(file, list(columns))
  return records


_READERS: dict[str, Callable[[pathlib.Path], Iterable[tuple[int, dict[str, Any]]]]] = {
  '.csv': _read_csv,
  '.jsonl': _read_jsonl,
}


def _check_columns(file: pathlib.Path, found: Sequence[str]) -> None:
  """Raises UserError where one of the columns is not there, or might be one of several."""
  alike = [(likeness(name.strip()), name) for name in found]
  for column in COLUMNS:
    same = [name for key, name in alike if key == column]
    if len(same) > 1:
      names = ', '.join(map(cells.shown, same))
      raise UserError(
        f'{file.name} has the column {column} {len(same)} times ({names}): '
        'which one counts? Rename or remove the others'
      )
  missing = [name for name in COLUMNS if name not in found]
  if missing:
    more = f' and {len(found) - _MOST_COLUMNS} more' if len(found) > _MOST_COLUMNS else ''
    has = ', '.join(map(cells.plain, found[:_MOST_COLUMNS])) + more
    raise UserError(
      f'{file.name} lacks the column {", ".join(missing)} (it has {has}): '
      f'{_columns_remedy(missing, alike)}'
    )


def _columns_remedy(missing: Sequence[str], alike: Sequence[tuple[Any, str]]) -> str:
  near = [cells.shown(name) for key, name in alike if key in missing]
  if near:
    return f'is it {", ".join(near)}? Name it {", ".join(missing)}'
  names = [name for _, name in alike]
  separator = next((mark for mark in ';\t|' if len(names) == 1 and mark in names[0]), None)
  if separator:
    return f'its cells are separated by {separator!r}; save it with commas'
  return f'its columns must be {", ".join(COLUMNS)}'
