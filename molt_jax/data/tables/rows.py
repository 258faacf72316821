"""Rows of a table: cells of named columns become an image, a text and labels, or the row is odd.

An odd row has a cell that is refused, nothing to classify, or no label where it needs one. Either
the first kind of odd row is an error with its rows, or they are set aside, each with its reason.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from molt_jax.data import cells, findings, imagefiles, pictures
from molt_jax.data.tables import row_values
from molt_jax.data.tables.columns import chosen_columns
from molt_jax.data.tables.records import Malformed, Records
from molt_jax.data.tables.spec import Spec
from molt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table.

  Attributes:
    id: FILE:ROW.
    image: see `pictures.Images`; paths are absolute.
    text: None: absent.
    labels: names.
    split: what its column of splits says; '': nothing.
    group: what its column of groups says; '': nothing.
  """

  id: str
  image: pictures.Images
  text: str | None
  labels: tuple[str, ...]
  split: str = ''
  group: str = ''


class Aside(NamedTuple):
  """A row that is not used, and why."""

  file: str
  row: Any
  reason: str


def aside_as_csv(aside: Iterable[Aside]) -> str:
  """Returns odd rows as a CSV file."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(Aside._fields)
  writer.writerows(aside)
  return text.getvalue()


class Rows(NamedTuple):
  """What was read of one file.

  Attributes:
    rows: those that are used.
    remarks: what the user should know of how they were read, a line each.
    aside: the others.
    lost: id of a row -> why its image is taken as absent.
  """

  rows: list[Row]
  remarks: list[str]
  aside: list[Aside]
  lost: dict[str, str]


def read_rows(records: Records, spec: Spec, *, unlabelled: bool, needs_label: bool = True) -> Rows:
  """Reads and checks one file.

  Args:
    records: the file.
    spec: how it is read.
    unlabelled: whether rows may have no label.
    needs_label: whether the column of labels must be there.

  Raises:
    UserError: a column is not there, there are no rows, or, unless odd rows are set aside, a row
      is odd; a kind of mistake is reported with the first rows that have it. If most rows are odd
      or most images are not there, they are not set aside.
  """
  columns = chosen_columns(records, spec, needs_label)
  reader = _Reader(records, spec, columns, needs_label)
  for number, cells_of_row in records.read(columns):
    reader.take(number, cells_of_row)
  return reader.finish(unlabelled=unlabelled or not needs_label)


class _Reader:
  """Gathers the rows of one file."""

  def __init__(self, records: Records, spec: Spec, columns: Sequence[str], needs_label: bool):
    self._records, self._spec, self._needs_label = records, spec, needs_label
    self._found = findings.Findings(functools.partial(_where, records.name), spec.null_words)
    self._image = [name for name in spec.image if name in columns]
    self._text = [name for name in spec.text if name in columns]
    self._folder = spec.image_folder or records.folder
    self._has_label = spec.label in columns
    self._numbers: list[Any] = []
    self._rows: dict[Any, Row] = {}
    self._named: dict[Any, dict[str, str]] = {}  # Row -> path of an image -> as the file has it.
    self._odd: dict[Any, str] = {}

  def take(self, number: Any, cells_of_row: Mapping[str, Any] | Malformed) -> None:
    """Reads a row."""
    self._numbers.append(number)
    if isinstance(cells_of_row, Malformed):
      if not self._spec.lenient:
        raise UserError(f'{self._records.name} row {number}: {cells_of_row}')
      self._odd[number] = str(cells_of_row)
      return
    spec, found = self._spec, self._found
    found.row = number
    labels = ()
    if self._has_label:
      value = cells_of_row[spec.label]
      labels = found.read_labels(value, several=spec.multi_label, name=spec.label)
    self._rows[number] = Row(
      f'{self._records.name}:{number}',
      self._read_image(number, cells_of_row),
      self._read_text(cells_of_row),
      labels,
      _word(cells_of_row, spec.split),
      _word(cells_of_row, spec.group),
    )

  def _read_text(self, cells_of_row: Mapping[str, Any]) -> str | None:
    parts = [self._found.read('text', cells_of_row[name], name) for name in self._text]
    return row_values.joined([part for part in parts if part is not None])

  def _read_image(self, number: Any, cells_of_row: Mapping[str, Any]) -> pictures.Images:
    found = []
    for name in self._image:
      for item in row_values.items_of(cells_of_row[name]):
        value = self._found.read('image', item, name)
        if value is None:
          continue
        image = row_values.as_image(value, self._folder, self._spec.cache)
        if isinstance(image, str):
          self._named.setdefault(number, {})[image] = value
        found.append(image)
    return pictures.one_or_several(found)

  def finish(self, *, unlabelled: bool) -> Rows:
    """Returns what was read; see `read_rows`."""
    records, spec, found = self._records, self._spec, self._found
    if not self._numbers:
      label = [spec.label] if self._needs_label else []
      raise UserError(
        f'{records.name} has no rows: it needs the columns '
        f'{", ".join((*spec.image, *spec.text, *label))} and at least one row'
      )
    remarks = [*records.remarks, *found.remarks()]
    if not spec.lenient:
      found.check()
      self._check_complete(unlabelled, remarks)
      self._check_images()
      return Rows(list(self._rows.values()), remarks, [], {})
    lost = self._lose_images(remarks)
    self._odd |= found.refused()
    none = [n for n, row in self._rows.items() if not row.labels and n not in self._odd]
    if spec.multi_label and self._has_label and none:
      rows = findings.rows_in_words(none)
      remarks.append(f'{records.name} {rows}: {spec.label} is empty: taken as none of the labels')
    for reason, numbers in self._incomplete(unlabelled).items():
      for number in numbers:
        gone = lost.get(self._rows[number].id)
        also = f' (its image is not there: {gone})' if gone and 'image' in reason else ''
        self._odd.setdefault(number, reason + also)
    self._check_most_are_good()
    rows = [row for number, row in self._rows.items() if number not in self._odd]
    aside = [
      Aside(records.name, number, self._odd[number])
      for number in self._numbers
      if number in self._odd
    ]
    return Rows(rows, remarks, aside, lost)

  # Odd rows.

  def _incomplete(self, unlabelled: bool) -> dict[str, list[Any]]:
    """Returns the rows that have nothing to classify, or no label where they need one, by why."""
    both = 'both image and text are empty'
    if len(self._spec.modalities) == 1 and not (self._image and self._text):
      both = f'{self._spec.modalities[0]} is empty'
    empty = [n for n, row in self._rows.items() if row.image is None and row.text is None]
    blank = [n for n, row in self._rows.items() if not row.labels]
    if self._spec.multi_label and self._spec.lenient or not self._has_label:
      blank = []  # None of the labels.
    elif unlabelled and not self._spec.multi_label and len(blank) < len(self._rows):
      blank = []
    return {both: empty, f'{self._spec.label} is empty': blank}

  def _check_complete(self, unlabelled: bool, remarks: Sequence[str]) -> None:
    for reason, numbers in self._incomplete(unlabelled).items():
      if not numbers:
        continue
      hint, remedy = '', 'fill it in or remove the row'
      if not reason.startswith(self._spec.label):
        remedy = 'fill one in or remove the row'
        hint = ' (a word such as nan is an empty cell)' if _any_word(remarks) else ''
      rows = findings.rows_in_words(numbers)
      raise UserError(f'{self._records.name} {rows}: {reason}{hint}; {remedy}')

  def _check_most_are_good(self) -> None:
    count = len(self._odd)
    total = len(self._numbers)
    if 2 * count <= total:
      return
    by_reason: dict[str, list[Any]] = {}
    for number, reason in self._odd.items():
      by_reason.setdefault(reason, []).append(number)
    reason, numbers = max(by_reason.items(), key=lambda item: len(item[1]))
    raise UserError(
      f'{self._records.name}: {count:,} of {total:,} rows cannot be used; '
      f'{findings.rows_in_words(numbers)}: {reason}'
    )

  # Images that are not there.

  def _gone(self) -> list[tuple[Any, str, str]]:
    """Returns (row, path of an image, why) of images that are no files."""
    if 'image' not in self._spec.modalities:
      return []
    why = {}
    for path in {path for paths in self._named.values() for path in paths}:
      why[path] = imagefiles.why_no_file(path)
    return [
      (number, path, why[path])
      for number, paths in self._named.items()
      for path in paths
      if why[path]
    ]

  def _check_images(self) -> None:
    gone = self._gone()
    for missing in (True, False):
      named = [
        f'row {number} {cells.plain(self._named[number][path])}'
        + ('' if missing else f' ({reason})')
        for number, path, reason in gone
        if (reason == imagefiles.NO_FILE) is missing
      ]
      what = 'image files do not exist' if missing else 'images are not files'
      if named:
        raise UserError(
          f'{self._records.name}: {len(named)} {what}: {findings.some(named)}; {self._remedy()}'
        )

  def _remedy(self) -> str:
    if any(name.startswith('data:') for paths in self._named.values() for name in paths.values()):
      return 'data: addresses are not read: save the images as files'
    return f'paths are relative to {self._folder}'

  def _lose_images(self, remarks: list[str]) -> dict[str, str]:
    """Takes images that are not there as absent; returns row id -> why."""
    gone = self._gone()
    if not gone:
      return {}
    named = [
      f'row {number} {cells.plain(self._named[number][path])} ({why})' for number, path, why in gone
    ]
    total = sum(map(len, self._named.values()))
    what = f'{self._records.name}: {len(gone):,} of {total:,} images are not there'
    if 2 * len(gone) > total:
      raise UserError(
        f'{what}: {findings.some(named)}; {self._remedy()}, or to what --image_folder says'
      )
    remarks.append(f'{what}, taken as absent: {findings.some(named)}')
    lost = {}
    for number, path, why in gone:
      row = self._rows[number]
      left = [image for image in pictures.each(row.image) if image != path]
      self._rows[number] = dataclasses.replace(row, image=pictures.one_or_several(left))
      lost[row.id] = f'{self._named[number][path]}: {why}'
    return lost


def _word(cells_of_row: Mapping[str, Any], column: str) -> str:
  """Returns what a cell of splits or groups says; '' where it is empty."""
  value = cells_of_row.get(column) if column else None
  return '' if value is None or cells.is_null(value) else str(value).strip()


def _where(name: str, column: str, numbers: Sequence[Any]) -> str:
  return f'{name} {findings.rows_in_words(numbers)}: {column}'


def _any_word(remarks: Iterable[str]) -> bool:
  return any('nothing' in line for line in remarks)
