"""Your own data: one table, or a folder of them, with columns of images, texts and labels.

`tables/layout.py` says which files are read and which splits they are, `tables/rows.py` how their
columns (`dataset.table` of the config) become images, texts and labels, `cells.py` what a cell may
hold. An empty cell is an absent modality, and in train, unless `dataset.multi_label`, an unknown
label: such a row takes part in L_CCA and in the statistics of hidden states alone.

Rows are numbered as a spreadsheet numbers them: the header of a CSV file is row 1; in a .jsonl file
the first line is row 1; in Parquet and Arrow files the first row is 0. The id of an example is
`FILE:ROW`. Classes are ordered by name. What is taken in a way that the user may not mean (a word
for nothing as an absent cell, classes that differ by case alone) is one line each time the table is
loaded.

Where no file and no column says which rows are for test or validation, they are held out, see
`tables/holding_out.py`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from molt_jax.data import addresses, pictures
from molt_jax.data.sources import UNLABELLED, Dataset
from molt_jax.data.table_source import TableSource
from molt_jax.data.tables import holding_out, layout
from molt_jax.data.tables.classes import check_classes, class_names_of, split_seen
from molt_jax.data.tables.reading import Read, read_splits
from molt_jax.data.tables.rows import Row
from molt_jax.data.tables.spec import Spec, spec_of
from molt_jax.errors import UserError
from molt_jax.runtime import console

_MOST_CLASSES = 20  # That are not asked about however few rows there are.
_SHOWN = 5  # Rows that are set aside, on screen.


def load(config: Any) -> Dataset:
  """Reads and checks the table `dataset.path`; says what may be meant otherwise than it is read.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  spec = spec_of(config)
  read = read_splits(config, spec, layout.SPLITS)
  name, labelled = read.names['train'], [row for row in read.splits['train'] if row.labels]
  class_names = class_names_of(name, labelled)
  if spec.lenient and len(class_names) > max(_MOST_CLASSES, len(labelled) / 2):
    raise UserError(
      f'{name}: {spec.label} has {len(class_names):,} different values in {len(labelled):,} rows: '
      'is it the column of labels? Name another (molt fit: --label=COLUMN)'
    )
  read.remarks += check_classes(name, labelled, spec.multi_label)
  _drop_unseen(read, class_names, spec)
  holding_out.hold_out(read, config, spec)
  return _dataset(read, class_names, config, spec)


def load_split(config: Any, split: str, class_names: Sequence[str] | None = None) -> Dataset:
  """Reads and checks one split for a model that is trained: its classes are those that occur in it.

  Other files are not looked at, except that of train where the split is a part of it.

  Args:
    config: the whole configuration.
    split: train, validation or test.
    class_names: those that the model knows: rows with others are set aside where odd rows are.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  spec = spec_of(config)
  read = read_splits(config, spec, (split,))
  if 'train' in read.splits:
    holding_out.hold_out(read, config, spec)
  read.splits = {split: read.splits[split]}
  return _for_model(read, class_names, config, spec)


def load_other(
  config: Any, path: str | os.PathLike, class_names: Sequence[str] | None = None
) -> Dataset:
  """Reads another table as a test split; its columns are called as those of the run's data.

  Args:
    config: of the run.
    path: a file, or a folder whose rows of test are read if it says which they are, else all.
    class_names: those that the model knows: rows with others are set aside where odd rows are.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  spec = dataclasses.replace(spec_of(config), split='', group='')
  files = layout.find(path, spec.dialect)
  read = Read({})
  read.take('test', files.get('test') or files['train'], spec)
  return _for_model(read, class_names, config, spec)


def _drop_unseen(read: Read, class_names: Sequence[str], spec: Spec) -> None:
  """Sets rows aside whose labels train does not have; raises UserError where none are."""
  for split in read.splits:
    rows, aside = split_seen(
      read.names[split], read.splits[split], class_names, lenient=spec.lenient
    )
    read.splits[split] = rows
    read.aside += aside


def _for_model(read: Read, class_names, config: Any, spec: Spec) -> Dataset:
  """Returns what was read for a model that is trained."""
  if class_names is not None and spec.lenient:
    _drop_unseen(read, class_names, spec)
  (rows,) = read.splits.values()
  occurring = tuple(sorted({label for row in rows for label in row.labels}))
  return _dataset(read, occurring, config, spec)


def _dataset(read: Read, class_names: Sequence[str], config: Any, spec: Spec) -> Dataset:
  for line in read.remarks:
    console.log(line)
  if read.aside:
    shown = [f'{x.file} row {x.row}: {x.reason}' for x in read.aside[:_SHOWN]]
    more = len(read.aside) - len(shown)
    shown += [f'and {more:,} more'] if more else []
    count = len(read.aside)
    console.log(f'set aside: {count:,} odd row{"s" if count > 1 else ""}: {"; ".join(shown)}')
  if 'image' in spec.modalities:
    images = [
      image for rows in read.splits.values() for row in rows for image in pictures.each(row.image)
    ]
    addresses.fetch([image for image in images if isinstance(image, addresses.Address)])
  path = pathlib.Path(os.path.expanduser(config.dataset.path)).resolve()
  splits = [split for split in layout.SPLITS if split in read.splits]
  return Dataset(
    name=path.stem if path.is_file() else path.name,
    class_names=tuple(class_names),
    multi_label=spec.multi_label,
    splits={split: _source(read.splits[split], class_names, spec) for split in splits},
    aside=tuple(read.aside),
  )


def _source(rows: Sequence[Row], class_names: Sequence[str], spec: Spec) -> TableSource:
  index = {name: k for k, name in enumerate(class_names)}
  labels = [tuple(index[name] for name in row.labels) for row in rows]
  if not spec.multi_label:
    labels = [label[0] if label else UNLABELLED for label in labels]
  return TableSource(tuple(rows), tuple(labels))
