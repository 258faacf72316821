"""Your own data: a folder of images with train.csv, validation.csv (optional), test.csv, or .jsonl.

Columns: `image` (path relative to the file, may be empty), `text` (may be empty), `label` (several
joined by `|` when `dataset.multi_label`; a list in .jsonl works too). An empty cell is an absent
modality, and in train.csv, unless `dataset.multi_label`, an unknown label: such a row takes part in
L_CCA and in the statistics of the taps alone. Other columns are ignored. CSV as in RFC 4180, with a
header line, in UTF-8. What else a cell may hold, and what becomes of it, is in `cells.py`.

Rows are numbered as a spreadsheet numbers them: the header of a CSV file is row 1; in a .jsonl file
the first line is row 1. The id of an example is `FILE:ROW`. Classes are ordered by name. What is
taken in a way that the user may not mean (a word for nothing as an absent cell, classes that differ
by case alone) is one line each time the table is loaded.
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data import cells, findings, formats, imagefiles, textfiles
from molt_jax.data.sources import UNLABELLED, Dataset, text_number
from molt_jax.data.splits import set_aside
from molt_jax.errors import UserError
from molt_jax.runtime import console

COLUMNS = ('image', 'text', 'label')
_FORMATS = ('.csv', '.jsonl')
_MOST_COLUMNS = 12  # That a message lists.


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table. `image` is an absolute path; None: absent. `labels` are names."""

  id: str
  image: str | None
  text: str | None
  labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TableSource:
  """A split of a table; a `Source`. Image files are opened when they are asked for."""

  rows: tuple[Row, ...]
  labels: tuple[Any, ...]

  @functools.cached_property
  def ids(self) -> list[str]:
    return [row.id for row in self.rows]

  @functools.cached_property
  def present(self) -> np.ndarray:
    return np.array(
      [(row.image is not None, row.text is not None) for row in self.rows], bool
    ).reshape(-1, 2)

  @functools.cached_property
  def contents(self) -> np.ndarray:
    """See `Source`; of an image file the size, which takes no reading."""
    sizes = {path: _size(path) for path in {row.image for row in self.rows}}
    numbers = [(sizes[row.image], text_number(row.text)) for row in self.rows]
    return np.array(numbers, np.int64).reshape(-1, 2)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    row = self.rows[index]
    data = formats.read_file(row.image) if image and row.image is not None else None
    return {'id': row.id, 'image': data, 'text': row.text, 'label': self.labels[index]}


def _size(path: str | None) -> int:
  try:
    return 0 if path is None else 1 + os.stat(path).st_size
  except OSError:  # It went away since it was checked.
    return -1


def load(config: Any) -> Dataset:
  """Reads and checks the folder `dataset.path`; says what may be meant otherwise than it is read.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  folder, multi_label = _folder(config), config.dataset.multi_label
  names = ('train', 'validation', 'test')
  files = {split: _find(folder, split, required=split != 'validation') for split in names}
  read = {
    split: _read_table(file, multi_label, unlabelled=split == 'train')
    for split, file in files.items()
    if file
  }
  tables = {split: rows for split, (rows, _) in read.items()}
  class_names = _class_names(files['train'], tables['train'])
  remarks = [line for _, lines in read.values() for line in lines]
  remarks += _check_classes(files['train'], tables['train'], multi_label)
  for split in ('validation', 'test'):
    if split in tables:
      _check_seen(files[split], tables[split], class_names)
  if 'validation' not in tables:
    tables['train'], tables['validation'] = split_off(
      tables['train'], fraction=config.dataset.validation_fraction, seed=config.seed
    )
    if not tables['validation']:
      raise UserError(
        f'{files["train"].name} is too small to set a validation split aside: '
        'add rows or a validation.csv'
      )
  for line in remarks:
    console.log(line)
  splits = {split: _source(tables[split], class_names, multi_label) for split in names}
  return Dataset(
    name=folder.resolve().name, class_names=class_names, multi_label=multi_label, splits=splits
  )


def load_split(config: Any, split: str) -> Dataset:
  """Reads and checks one split for a model that is trained: its classes are those that occur in it.

  Other files are not looked at, except that of train where validation is set aside from it.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  folder, multi_label = _folder(config), config.dataset.multi_label
  own_validation = _find(folder, 'validation', required=False)
  parts = split != 'test' and not own_validation
  file = _find(folder, 'train' if parts else split, required=True)
  rows, remarks = _read_table(file, multi_label, unlabelled=file.stem == 'train')
  for line in remarks:
    console.log(line)
  if parts:
    rest, aside = split_off(rows, fraction=config.dataset.validation_fraction, seed=config.seed)
    rows = aside if split == 'validation' else rest
  class_names = tuple(sorted({label for row in rows for label in row.labels}))
  source = _source(rows, class_names, multi_label)
  return Dataset(folder.resolve().name, class_names, multi_label, {split: source})


def _folder(config: Any) -> pathlib.Path:
  folder = pathlib.Path(os.path.expanduser(config.dataset.path))
  if not config.dataset.path or not os.path.isdir(folder):
    raise UserError(
      f'dataset.path {config.dataset.path!r} is not a folder: '
      'give the folder that holds train.csv and test.csv'
    )
  return folder


def split_off(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
  """Sets a share of the labelled rows aside, stratified (`splits.set_aside`); returns (rest,
  aside), in their order.
  """
  labelled = [row for row in rows if row.labels]
  aside = {
    labelled[n].id
    for n in set_aside(
      [row.id for row in labelled], [row.labels for row in labelled], fraction=fraction, seed=seed
    )
  }
  return [row for row in rows if row.id not in aside], [row for row in rows if row.id in aside]


def _source(rows: Sequence[Row], class_names: Sequence[str], multi_label: bool) -> TableSource:
  index = {name: k for k, name in enumerate(class_names)}
  labels = [tuple(index[name] for name in row.labels) for row in rows]
  return TableSource(
    tuple(rows),
    tuple(labels if multi_label else (label[0] if label else UNLABELLED for label in labels)),
  )


def _find(folder: pathlib.Path, split: str, *, required: bool) -> pathlib.Path | None:
  files = [folder / (split + suffix) for suffix in _FORMATS]
  found = [file for file in files if os.path.isfile(file)]
  if len(found) > 1:
    raise UserError(f'{folder} has both {found[0].name} and {found[1].name}: keep one of them')
  if required and not found:
    raise UserError(f'{folder} has no {split}.csv and no {split}.jsonl: add one of them')
  return found[0] if found else None


# ---- Reading a file ------------------------------------------------------------------------------


def _read_table(
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
  likeness = [(cells.likeness(name.strip()), name) for name in found]
  for column in COLUMNS:
    alike = [name for key, name in likeness if key == column]
    if len(alike) > 1:
      names = ', '.join(map(cells.shown, alike))
      raise UserError(
        f'{file.name} has the column {column} {len(alike)} times ({names}): '
        'which one counts? Rename or remove the others'
      )
  missing = [name for name in COLUMNS if name not in found]
  if missing:
    more = f' and {len(found) - _MOST_COLUMNS} more' if len(found) > _MOST_COLUMNS else ''
    has = ', '.join(map(cells.plain, found[:_MOST_COLUMNS])) + more
    raise UserError(
      f'{file.name} lacks the column {", ".join(missing)} (it has {has}): '
      f'{_columns_remedy(missing, likeness)}'
    )


def _columns_remedy(missing: Sequence[str], likeness: Sequence[tuple[Any, str]]) -> str:
  near = [cells.shown(name) for key, name in likeness if key in missing]
  if near:
    return f'is it {", ".join(near)}? Name it {", ".join(missing)}'
  names = [name for _, name in likeness]
  separator = next((mark for mark in ';\t|' if len(names) == 1 and mark in names[0]), None)
  if separator:
    return f'its cells are separated by {separator!r}; save it with commas'
  return f'its columns must be {", ".join(COLUMNS)}'


# ---- What the rows say together ------------------------------------------------------------------


def _class_names(file: pathlib.Path, rows: Iterable[Row]) -> tuple[str, ...]:
  names = tuple(sorted({label for row in rows for label in row.labels}))
  if len(names) < 2:
    raise UserError(
      f'{file.name} has one class only, {names[0]!r}: a classifier needs at least two'
    )
  return names


def _check_classes(file: pathlib.Path, rows: Iterable[Row], multi_label: bool) -> list[str]:
  """Returns a line for each way in which classes may not be what is meant.

  Names that differ by case alone are not refused: Co and CO are two things to a chemist.

  Raises:
    UserError: a class is several others, joined.
  """
  count = collections.Counter(label for row in rows for label in row.labels)
  alike = [
    ' and '.join(_counted(name, count) for name in group)
    for group in cells.lookalikes(sorted(count))
  ]
  words = [_counted(name, count) for name in sorted(count) if cells.is_null_word(name)]
  joined = _joined(file, count, multi_label)
  remedy = (
    'give each label by itself, joined by |'
    if multi_label
    else 'set dataset.multi_label=True if | joins labels'
  )
  kinds = (
    (alike, 'labels that look alike are different classes', 'write them alike if they are one'),
    (words, 'a word that may mean nothing is a class', 'leave the label empty if there is none'),
    (joined, 'what may be several labels is one class', remedy),
  )
  return [
    f'{file.name}: {what}: {findings.some(names)}; {hint}' for names, what, hint in kinds if names
  ]


def _joined(file: pathlib.Path, count: Mapping[str, int], multi_label: bool) -> list[str]:
  """Returns the classes whose names may be lists; one that is a list of others is refused."""
  marks = ',;' if multi_label else '|'
  named = []
  for name in sorted(count):
    mark = next((mark for mark in marks if mark in name), None)
    if mark is None:
      continue
    parts = [part.strip() for part in name.split(mark) if part.strip()]
    known = [part for part in parts if part in count]
    if known and (mark == '|' or len(known) == len(parts)):
      remedy = (
        'join labels by |'
        if multi_label
        else 'set dataset.multi_label=True, or give the class a name without |'
      )
      raise UserError(
        f'{file.name}: the label {_counted(name, count)} is several labels, '
        f'{findings.some([repr(part) for part in known])} among them: {remedy}'
      )
    named.append(_counted(name, count))
  return named


def _counted(name: str, count: Mapping[str, int]) -> str:
  return f'{cells.shown(name)} ({count[name]:,} row{"s" if count[name] > 1 else ""})'


def _check_seen(file: pathlib.Path, rows: Iterable[Row], class_names: Sequence[str]) -> None:
  known = set(class_names)
  unseen = [(row.id, label) for row in rows for label in row.labels if label not in known]
  if unseen:
    near = {cells.likeness(name): name for name in class_names}
    words = []
    for row_id, label in unseen:
      like = near.get(cells.likeness(label))
      hint = f', train has {like!r}' if like else ''
      words.append(f'{cells.shown(label)} (row {row_id.rpartition(":")[2]}{hint})')
    raise UserError(
      f'{file.name}: labels that train does not have: {findings.some(words)}; '
      'correct them, or add such rows to train'
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
