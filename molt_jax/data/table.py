"""Your own data: a folder of images with train.csv, validation.csv (optional), test.csv, or .jsonl.

Columns: `image` (path relative to the file, may be empty), `text` (may be empty), `label` (several
joined by `|` when `dataset.multi_label`; a list in .jsonl works too). An empty cell is an absent
modality, and in train.csv, unless `dataset.multi_label`, an unknown label: such a row takes part in
L_CCA and in the statistics of hidden states alone. Other columns are ignored. CSV as in RFC 4180,
with a header line, in UTF-8. What else a cell may hold, and what becomes of it, is in `cells.py`.

Rows are numbered as a spreadsheet numbers them: the header of a CSV file is row 1; in a .jsonl file
the first line is row 1. The id of an example is `FILE:ROW`. Classes are ordered by name. What is
taken in a way that the user may not mean (a word for nothing as an absent cell, classes that differ
by case alone) is one line each time the table is loaded.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from molt_jax.data import formats
from molt_jax.data.sources import UNLABELLED, Dataset, text_number
from molt_jax.data.splits import set_aside
from molt_jax.data.table_classes import check_classes, check_seen, class_names_of
from molt_jax.data.table_files import Row, read_table
from molt_jax.errors import UserError
from molt_jax.runtime import console

_FORMATS = ('.csv', '.jsonl')


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
    split: read_table(file, multi_label, unlabelled=split == 'train')
    for split, file in files.items()
    if file
  }
  tables = {split: rows for split, (rows, _) in read.items()}
  class_names = class_names_of(files['train'], tables['train'])
  remarks = [line for _, lines in read.values() for line in lines]
  remarks += check_classes(files['train'], tables['train'], multi_label)
  for split in ('validation', 'test'):
    if split in tables:
      check_seen(files[split], tables[split], class_names)
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
  rows, remarks = read_table(file, multi_label, unlabelled=file.stem == 'train')
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
  """Sets a share of the labelled rows aside, stratified (`splits.set_aside`).

  Returns (rest, aside), in their order.
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
