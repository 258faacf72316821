"""Rows of a table: cells of named columns become an image, a text and labels, or the row is odd.

An odd row has a cell that is refused, nothing to classify, or no label where it needs one. Either
the first kind of odd row is an error with its rows, or they are set aside, each with its reason.
"""

import csv
import dataclasses
import functools
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from molt_jax.config.resolved import modalities
from molt_jax.data import cells, findings, imagefiles, pictures
from molt_jax.data.likeness import likeness
from molt_jax.data.tables.csv_files import Dialect
from molt_jax.data.tables.records import Malformed, Records
from molt_jax.errors import UserError

_MOST_COLUMNS = 12  # That a message lists.
_END = '.!?…:;,'  # A text that ends so is followed by a blank alone.


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


@dataclasses.dataclass(frozen=True)
class Spec:
  """How the rows of a table are read: the fields `dataset.table` of a config, and what goes with
  them.

  Attributes:
    image: columns of images.
    text: columns of text.
    label: the column of labels.
    split: the column that says which split a row is in; '': none does.
    group: the column whose equal values stay in one split; '': none.
    modalities: those that are used; columns of others need not be there.
    multi_label: whether a row can have several labels.
    lenient: whether odd rows are set aside.
    null_words: what stands for nothing; empty: `cells.NULL_WORDS`.
    image_folder: what paths of images are relative to; '': the folder of the file.
    cache: folder for images that are fetched.
    dialect: how text files are written.
  """

  image: tuple[str, ...]
  text: tuple[str, ...]
  label: str
  split: str
  group: str
  modalities: tuple[str, ...]
  multi_label: bool
  lenient: bool
  null_words: frozenset[str]
  image_folder: str
  cache: str
  dialect: Dialect


def spec_of(config: Any) -> Spec:
  """Returns how a config says that a table is read."""
  c = config.dataset.table
  lenient = c.odd_rows == 'set_aside'
  return Spec(
    image=listed(c.image),
    text=listed(c.text),
    label=c.label,
    split=c.split,
    group=c.group,
    modalities=modalities(config),
    multi_label=config.dataset.multi_label,
    lenient=lenient,
    null_words=frozenset(listed(c.null_words)),
    image_folder=c.image_folder,
    cache=os.path.join(os.path.expanduser(config.dataset.data_dir), 'images'),
    dialect=Dialect(c.separator, c.encoding, lenient),
  )


def listed(words: str) -> tuple[str, ...]:
  """Returns the parts of what is joined by commas."""
  return tuple(word.strip() for word in words.split(',') if word.strip())


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
  columns = _columns(records, spec, needs_label)
  reader = _Reader(records, spec, columns)
  for number, cells_of_row in records.read(columns):
    reader.take(number, cells_of_row)
  return reader.finish(unlabelled=unlabelled or not needs_label)


class _Reader:
  """Gathers the rows of one file."""

  def __init__(self, records: Records, spec: Spec, columns: Sequence[str]):
    self._records, self._spec = records, spec
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
    return joined([part for part in parts if part is not None])

  def _read_image(self, number: Any, cells_of_row: Mapping[str, Any]) -> pictures.Images:
    found = []
    for name in self._image:
      for item in items_of(cells_of_row[name]):
        value = self._found.read('image', item, name)
        if value is None:
          continue
        image = as_image(value, self._folder, self._spec.cache)
        if isinstance(image, str):
          self._named.setdefault(number, {})[image] = value
        found.append(image)
    return pictures.one_or_several(found)

  def finish(self, *, unlabelled: bool) -> Rows:
    """Returns what was read; see `read_rows`."""
    records, spec, found = self._records, self._spec, self._found
    if not self._numbers:
      raise UserError(
        f'{records.name} has no rows: it needs the columns '
        f'{", ".join((*spec.image, *spec.text, spec.label))} and at least one row'
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


def items_of(value: Any) -> list[Any]:
  """Returns the items of a cell of images: a list's, or those of 'a.jpg|b.jpg'."""
  if isinstance(value, list | tuple):
    return list(value)
  return value.split('|') if isinstance(value, str) else [value]


def joined(parts: Sequence[str]) -> str | None:
  """Returns texts of several columns as one: 'a title. a description'; None: there is none.

  One text alone stays as it is. Others are trimmed, and joined by a full stop unless the one
  before ends in punctuation.
  """
  if len(parts) < 2:
    return parts[0] if parts else None
  text = ''
  for part in map(str.strip, parts):
    text += part if not text else f' {part}' if text[-1] in _END else f'. {part}'
  return text


def as_image(value: Any, folder: str, cache: str) -> pictures.Image:
  """Returns what a cell of images holds as an image of a row.

  Args:
    value: as `cells.read` returns it, not None.
    folder: what paths are relative to.
    cache: folder that keeps what is fetched.
  """
  if isinstance(value, str) and pictures.is_address(value):
    return pictures.Address(value, cache)
  if isinstance(value, str):
    path = os.path.join(folder, value)
    if '\\' in value and not os.path.exists(path):  # Written on Windows.
      path = os.path.join(folder, value.replace('\\', '/'))
    return path
  if isinstance(value, pictures.Picture):
    return value
  return pictures.in_memory(value)


def _word(cells_of_row: Mapping[str, Any], column: str) -> str:
  """Returns what a cell of splits or groups says; '' where it is empty."""
  value = cells_of_row.get(column) if column else None
  return '' if value is None or cells.is_null(value) else str(value).strip()


def _where(name: str, column: str, numbers: Sequence[Any]) -> str:
  return f'{name} {findings.rows_in_words(numbers)}: {column}'


def _any_word(remarks: Iterable[str]) -> bool:
  return any('nothing' in line for line in remarks)


# ---- Columns -------------------------------------------------------------------------------------


def _columns(records: Records, spec: Spec, needs_label: bool) -> list[str]:
  """Returns the columns to read.

  Raises:
    UserError: one is not there, or might be one of several.
  """
  needed = []
  optional = []
  for modality, names in (('image', spec.image), ('text', spec.text)):
    (needed if modality in spec.modalities else optional).extend(names)
  (needed if needs_label else optional).append(spec.label)
  needed += [name for name in (spec.split, spec.group) if name and needs_label]
  alike = [(likeness(name.strip()), name) for name in records.columns]
  _check_once(records, [*needed, *optional], alike)
  missing = [name for name in needed if name not in records.columns]
  if missing and records.columns:
    raise _lacks(records, missing, needed, alike)
  return [name for name in (*needed, *optional) if name in records.columns]


def _check_once(records: Records, columns: Sequence[str], alike: Sequence[tuple[Any, str]]) -> None:
  for column in columns:
    same = [name for key, name in alike if key == likeness(column)]
    if len(same) > 1:
      names = ', '.join(map(cells.shown, same))
      raise UserError(
        f'{records.name} has the column {column} {len(same)} times ({names}): '
        'which one counts? Rename or remove the others'
      )


def _lacks(
  records: Records,
  missing: Sequence[str],
  needed: Sequence[str],
  alike: Sequence[tuple[Any, str]],
) -> UserError:
  names = records.columns
  more = f' and {len(names) - _MOST_COLUMNS} more' if len(names) > _MOST_COLUMNS else ''
  has = ', '.join(map(cells.plain, names[:_MOST_COLUMNS])) + more
  wanted = [likeness(name) for name in missing]
  near = [cells.shown(name) for key, name in alike if key in wanted]
  remedy = f'its columns must be {", ".join(needed)}, or name them by dataset.table, or molt fit'
  if near:
    remedy = f'is it {", ".join(near)}? Name it {", ".join(missing)}'
  return UserError(f'{records.name} lacks the column {", ".join(missing)} (it has {has}): {remedy}')
