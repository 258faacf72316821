"""Your own data: a folder with train.csv, validation.csv (optional), test.csv, or .jsonl, and image files.

Columns: `image` (path relative to the file, may be empty), `text` (may be empty), `label` (several joined by `|` when `dataset.multi_label`; a
list in .jsonl works too). An empty cell is an absent modality, and in train.csv, unless `dataset.multi_label`, an unknown label: such a row takes
part in L_CCA and in the statistics of the taps alone. Other columns are ignored. CSV as in RFC 4180, with a header line, in UTF-8.

Rows are numbered as a spreadsheet numbers them: the header of a CSV file is row 1; in a .jsonl file the first line is row 1. The id of an
example is `FILE:ROW`. Classes are ordered by name.
"""

import csv
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from molt_jax.config import UserError
from molt_jax.data.sources import UNLABELLED, Dataset, text_number
from molt_jax.data.splits import set_aside

COLUMNS = ('image', 'text', 'label')
_FORMATS = ('.csv', '.jsonl')
_SHOWN = 5


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
    return np.array([(row.image is not None, row.text is not None) for row in self.rows], bool).reshape(-1, 2)

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
    data = pathlib.Path(row.image).read_bytes() if image and row.image is not None else None
    return {'id': row.id, 'image': data, 'text': row.text, 'label': self.labels[index]}


def _size(path: str | None) -> int:
  try:
    return 0 if path is None else 1 + os.stat(path).st_size
  except OSError:  # It went away since it was checked.
    return -1


def load(config: Any) -> Dataset:
  """Reads and checks the folder `dataset.path`.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  folder, multi_label = _folder(config), config.dataset.multi_label
  files = {split: _find(folder, split, required=split != 'validation') for split in ('train', 'validation', 'test')}
  tables = {split: _read_table(file, multi_label, unlabelled=split == 'train') for split, file in files.items() if file}
  class_names = _class_names(files['train'], tables['train'])
  for split in ('validation', 'test'):
    if split in tables:
      _check_seen(files[split], tables[split], class_names)
  if 'validation' not in tables:
    tables['train'], tables['validation'] = split_off(tables['train'], fraction=config.dataset.validation_fraction, seed=config.seed)
    if not tables['validation']:
      raise UserError(f'{files["train"].name} is too small to set a validation split aside: add rows or a validation.csv')
  splits = {split: _source(tables[split], class_names, multi_label) for split in ('train', 'validation', 'test')}
  return Dataset(name=folder.resolve().name, class_names=class_names, multi_label=multi_label, splits=splits)


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
  rows = _read_table(file, multi_label, unlabelled=file.stem == 'train')
  if parts:
    rest, aside = split_off(rows, fraction=config.dataset.validation_fraction, seed=config.seed)
    rows = aside if split == 'validation' else rest
  class_names = tuple(sorted({label for row in rows for label in row.labels}))
  source = _source(rows, class_names, multi_label)
  return Dataset(folder.resolve().name, class_names, multi_label, {split: source})


def _folder(config: Any) -> pathlib.Path:
  folder = pathlib.Path(config.dataset.path).expanduser()
  if not config.dataset.path or not folder.is_dir():
    raise UserError(
        f'dataset.path {config.dataset.path!r} is not a folder: give the folder that holds '
        'train.csv and test.csv')
  return folder


def split_off(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
  """Sets a share of the labelled rows aside, stratified (`splits.set_aside`); returns (rest, aside), in their order."""
  labelled = [row for row in rows if row.labels]
  aside = {labelled[n].id for n in set_aside([row.id for row in labelled], [row.labels for row in labelled], fraction=fraction, seed=seed)}
  return [row for row in rows if row.id not in aside], [row for row in rows if row.id in aside]


def _source(rows: Sequence[Row], class_names: Sequence[str], multi_label: bool) -> TableSource:
  index = {name: k for k, name in enumerate(class_names)}
  labels = [tuple(index[name] for name in row.labels) for row in rows]
  return TableSource(tuple(rows), tuple(labels if multi_label else (label[0] if label else UNLABELLED for label in labels)))


def _find(folder: pathlib.Path, split: str, *, required: bool) -> pathlib.Path | None:
  found = [folder / (split + suffix) for suffix in _FORMATS if (folder / (split + suffix)).is_file()]
  if len(found) > 1:
    raise UserError(f'{folder} has both {found[0].name} and {found[1].name}: keep one of them')
  if required and not found:
    raise UserError(f'{folder} has no {split}.csv and no {split}.jsonl: add one of them')
  return found[0] if found else None


def _read_table(file: pathlib.Path, multi_label: bool, *, unlabelled: bool) -> list[Row]:
  """Reads and checks one file; every kind of mistake is reported with the first rows that have it. `unlabelled`: rows may have no label."""
  records = list(_READERS[file.suffix](file))
  if not records:
    raise UserError(f'{file.name} has no rows: it needs the columns {", ".join(COLUMNS)} and at least one row')
  rows, numbers = [], []
  for number, record in records:
    image, text = _cell(record.get('image')), _cell(record.get('text'))
    path = os.path.join(file.parent.resolve(), image.strip()) if image else None
    rows.append(Row(f'{file.name}:{number}', path, text, _labels(file, number, record.get('label'), multi_label)))
    numbers.append(number)
  empty = [number for number, row in zip(numbers, rows, strict=True) if row.image is None and row.text is None]
  if empty:
    raise UserError(f'{file.name} {_rows(empty)}: both image and text are empty; fill one in or remove the row')
  blank = [number for number, row in zip(numbers, rows, strict=True) if not row.labels]
  if blank and (multi_label or not unlabelled or len(blank) == len(rows)):
    raise UserError(f'{file.name} {_rows(blank)}: label is empty; fill it in or remove the row')
  _check_images(file, numbers, rows)
  return rows


def _read_csv(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (row number, {column: cell}); blank lines are skipped."""
  try:
    with open(file, encoding='utf-8-sig', newline='') as stream:
      lines = enumerate(csv.reader(stream, strict=True), start=1)
      _, header = next(lines, (1, []))
      header = [name.strip() for name in header]
      if header:
        _check_columns(file, header)
      for number, cells in lines:
        if cells and len(cells) != len(header):
          raise UserError(f'{file.name} row {number} has {len(cells)} cells, the header {len(header)}: put a text with commas in double quotes')
        if cells:
          yield number, dict(zip(header, cells, strict=True))
  except UnicodeDecodeError as error:
    raise UserError(f'{file.name} is not UTF-8 (byte {error.start}): save it as UTF-8') from error
  except csv.Error as error:
    raise UserError(f'{file.name} is not a valid CSV file ({error}): check its quotes') from error


def _read_jsonl(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (row number, object); blank lines are skipped. A key that is in some row may be left out of others."""
  records = []
  try:
    with open(file, encoding='utf-8-sig') as stream:
      for number, line in enumerate(stream, start=1):
        if line.strip():
          records.append((number, json.loads(line)))
          if not isinstance(records[-1][1], dict):
            raise UserError(f'{file.name} row {number} is not a JSON object: write {{"image": ..., "text": ..., "label": ...}}')
  except UnicodeDecodeError as error:
    raise UserError(f'{file.name} is not UTF-8 (byte {error.start}): save it as UTF-8') from error
  except json.JSONDecodeError as error:
    raise UserError(f'{file.name} row {number} is not valid JSON ({error.msg} at column {error.colno}): write one object a line') from error
  if records:
    _check_columns(file, list(dict.fromkeys(key for _, record in records for key in record)))
  yield from records


_READERS = {'.csv': _read_csv, '.jsonl': _read_jsonl}


def _cell(value: Any) -> str | None:
  """Returns a cell's text; None when it is blank."""
  text = '' if value is None else str(value)
  return text if text.strip() else None


def _labels(file: pathlib.Path, number: int, value: Any, multi_label: bool) -> tuple[str, ...]:
  """Returns the label names of a row, sorted and without repetition; empty when there is none."""
  if isinstance(value, list) and not multi_label:
    raise UserError(f'{file.name} row {number}: label is a list; give one label, or set dataset.multi_label=True')
  parts = value if isinstance(value, list) else (_cell(value) or '').split('|') if multi_label else [value]
  return tuple(sorted({str(part).strip() for part in parts if _cell(part)}))


def _class_names(file: pathlib.Path, rows: Iterable[Row]) -> tuple[str, ...]:
  names = tuple(sorted({label for row in rows for label in row.labels}))
  if len(names) < 2:
    raise UserError(f'{file.name} has one class only, {names[0]!r}: a classifier needs at least two')
  return names


def _check_columns(file: pathlib.Path, found: Sequence[str]) -> None:
  missing = [name for name in COLUMNS if name not in found]
  if missing:
    raise UserError(f'{file.name} lacks the column {", ".join(missing)} (it has {", ".join(found)}): its columns must be {", ".join(COLUMNS)}')


def _check_images(file: pathlib.Path, numbers: Sequence[int], rows: Sequence[Row]) -> None:
  exists = {path: os.path.isfile(path) for path in {row.image for row in rows if row.image}}
  missing = [(number, row.image) for number, row in zip(numbers, rows, strict=True) if row.image and not exists[row.image]]
  if missing:
    first = ', '.join(f'row {number} {os.path.relpath(path, file.parent)}' for number, path in missing[:_SHOWN])
    more = f' and {len(missing) - _SHOWN} more' if len(missing) > _SHOWN else ''
    raise UserError(f'{file.name}: {len(missing)} image files do not exist: {first}{more}; paths are relative to {file.parent}')


def _check_seen(file: pathlib.Path, rows: Iterable[Row], class_names: Sequence[str]) -> None:
  unseen = [(row.id, label) for row in rows for label in row.labels if label not in class_names]
  if unseen:
    first = ', '.join(f'{label!r} (row {row_id.rpartition(":")[2]})' for row_id, label in unseen[:_SHOWN])
    more = f' and {len(unseen) - _SHOWN} more' if len(unseen) > _SHOWN else ''
    raise UserError(f'{file.name}: labels that train does not have: {first}{more}; correct them, or add such rows to train')


def _rows(numbers: Sequence[int]) -> str:
  shown = ', '.join(map(str, numbers[:_SHOWN]))
  more = f' and {len(numbers) - _SHOWN} more' if len(numbers) > _SHOWN else ''
  return f'row{"s" if len(numbers) > 1 else ""} {shown}{more}'
