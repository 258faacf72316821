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

Where no file and no column says which rows are for test or validation, they are held out by seed,
stratified by label. Rows that share a value of `dataset.table.group` stay together; without one,
rows of one text or one image do.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data import findings, pictures, same
from molt_jax.data.sources import UNLABELLED, Dataset, text_number
from molt_jax.data.splits import set_aside
from molt_jax.data.tables import layout
from molt_jax.data.tables.classes import check_classes, class_names_of, split_seen
from molt_jax.data.tables.rows import Aside, Row, Spec, read_rows, spec_of
from molt_jax.errors import UserError
from molt_jax.runtime import console

_MOST_CLASSES = 20  # That are not asked about however few rows there are.
_SHOWN = 5  # Rows that are set aside, on screen.


@dataclasses.dataclass(frozen=True)
class TableSource:
  """A split of a table; a `Source`. Images are opened when they are asked for."""

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
    found = []
    numbers: dict[Any, int] = {}
    for row in self.rows:
      for image in pictures.each(row.image):
        if image not in numbers:
          numbers[image] = pictures.number(image)
      of_image = functools.reduce(_mixed, (numbers[image] for image in pictures.each(row.image)), 0)
      found.append((of_image, text_number(row.text)))
    return np.array(found, np.int64).reshape(-1, 2)

  @functools.cached_property
  def most_images(self) -> int:
    """See `Source`."""
    return max((len(pictures.each(row.image)) for row in self.rows), default=1) or 1

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """See `Source.read`."""
    row = self.rows[index]
    example = {'id': row.id, 'image': None, 'text': row.text, 'label': self.labels[index]}
    images = pictures.each(row.image) if image else ()
    if len(images) == 1:
      example['image'] = pictures.read(images[0])
    elif images:
      example |= _read_several(images)
    return example


def _mixed(number: int, other: int) -> int:
  """Returns a number that changes with either, and with their order; the other one if one is 0."""
  return (31 * number + other) % (1 << 62)


def _read_several(images: Sequence[pictures.Image]) -> dict[str, Any]:
  """Returns what `Source.read` has of several images; those that cannot be read are left out.

  Raises:
    OSError: none can be.
  """
  found, lost = [], []
  for place, image in enumerate(images):
    try:
      found.append(pictures.read(image))
    except OSError as error:
      lost.append(f'image {place + 1}: {error.strerror or error}')
      if len(lost) == len(images):
        raise
  return {'image': found[0], 'images': found, 'lost': lost}


# ---- Loading -------------------------------------------------------------------------------------


def load(config: Any) -> Dataset:
  """Reads and checks the table `dataset.path`; says what may be meant otherwise than it is read.

  Raises:
    UserError: one line that names the file, the row and the remedy.
  """
  spec = spec_of(config)
  read = _read_splits(config, spec, layout.SPLITS)
  name, labelled = read.names['train'], [row for row in read.splits['train'] if row.labels]
  class_names = class_names_of(name, labelled)
  if spec.lenient and len(class_names) > max(_MOST_CLASSES, len(labelled) / 2):
    raise UserError(
      f'{name}: {spec.label} has {len(class_names):,} different values in {len(labelled):,} rows: '
      'is it the column of labels? Name another (molt fit: --label=COLUMN)'
    )
  read.remarks += check_classes(name, labelled, spec.multi_label)
  _drop_unseen(read, class_names, spec)
  _hold_out(read, config, spec)
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
  read = _read_splits(config, spec, (split,))
  if 'train' in read.splits:
    _hold_out(read, config, spec)
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
  read = _Read({})
  read.take('test', files.get('test') or files['train'], spec)
  return _for_model(read, class_names, config, spec)


@dataclasses.dataclass
class _Read:
  """What was read so far.

  Attributes:
    files: of each split that has any.
    splits: the rows of each split.
    names: of its files, for messages.
    remarks: what the user should know of how they were read, a line each.
    aside: odd rows.
  """

  files: Mapping[str, Sequence[layout.File]]
  splits: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
  names: dict[str, str] = dataclasses.field(default_factory=dict)
  remarks: list[str] = dataclasses.field(default_factory=list)
  aside: list[Aside] = dataclasses.field(default_factory=list)

  def take(self, split: str, files: Sequence[layout.File], spec: Spec) -> None:
    """Reads the files of a split; rows of train may have no label."""
    self.splits[split] = []
    self.names[split] = findings.some([file.name for file in files])
    for file in files:
      found = read_rows(file.open(), spec, unlabelled=split == 'train')
      self.splits[split] += found.rows
      self.remarks += found.remarks
      self.aside += found.aside


def _read_splits(config: Any, spec: Spec, wanted: Sequence[str]) -> _Read:
  """Reads the files of some splits, and that of train where the splits are parts of it."""
  files = _files(config, spec)
  read = _Read(files)
  if 'train' in wanted or spec.split or not files.keys() >= set(wanted):
    read.take('train', files['train'], spec)
    if spec.split:
      _part_by_column(read, spec)
  for split in ('validation', 'test'):
    if split in wanted and split in files:
      read.take(split, files[split], spec)
  return read


def _files(config: Any, spec: Spec) -> dict[str, Sequence[layout.File]]:
  """Returns the files of each split that has any.

  Raises:
    UserError: there are none for train, or none for test, and no rows are to be held out for it.
  """
  c = config.dataset
  files = layout.find(c.path, spec.dialect)
  for split, path in (('validation', c.table.validation_file), ('test', c.table.test_file)):
    if path:
      files[split] = next(iter(layout.find(path, spec.dialect).values()))
  if spec.split and len(files) > 1:
    raise UserError(
      f'dataset.table.split: {spec.split!r} beside a file of {max(files)} rows: give one of them'
    )
  if 'test' not in files and not spec.split and not c.table.test_fraction:
    raise UserError(
      f'{c.path} has no test.csv and no test.jsonl: add one of them, or hold rows out by '
      'dataset.table.test_fraction'
    )
  return files


def _part_by_column(read: _Read, spec: Spec) -> None:
  """Parts the rows of one file by what the column of splits says.

  Raises:
    UserError: it says something else, or a row of test has no label, and odd rows are refused.
  """
  parts: dict[str, list[Row]] = {}
  odd = []
  for row in read.splits['train']:
    split = layout.SPLIT_WORDS.get(row.split.lower())
    if split is None:
      odd.append((row, f'{spec.split} is {row.split!r}, none of train, validation, test'))
    elif split != 'train' and not row.labels and not spec.multi_label:
      odd.append((row, f'{spec.label} is empty'))
    else:
      parts.setdefault(split, []).append(row)
  if odd and not spec.lenient or 'train' not in parts:
    row, why = odd[0]
    raise UserError(f'{row.id}: {why}; mend it, or leave dataset.table.split empty')
  read.aside += [Aside(*row.id.rsplit(':', 1), why) for row, why in odd]
  read.splits = parts
  read.names = dict.fromkeys(parts, read.names['train'])


def _drop_unseen(read: _Read, class_names: Sequence[str], spec: Spec) -> None:
  """Sets rows aside whose labels train does not have; raises UserError where none are."""
  for split in read.splits:
    rows, aside = split_seen(
      read.names[split], read.splits[split], class_names, lenient=spec.lenient
    )
    read.splits[split] = rows
    read.aside += aside


def _for_model(read: _Read, class_names, config: Any, spec: Spec) -> Dataset:
  """Returns what was read for a model that is trained."""
  if class_names is not None and spec.lenient:
    _drop_unseen(read, class_names, spec)
  (rows,) = read.splits.values()
  occurring = tuple(sorted({label for row in rows for label in row.labels}))
  return _dataset(read, occurring, config, spec)


def _dataset(read: _Read, class_names: Sequence[str], config: Any, spec: Spec) -> Dataset:
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
    pictures.fetch([image for image in images if isinstance(image, pictures.Address)])
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


# ---- Holding out ---------------------------------------------------------------------------------


def _hold_out(read: _Read, config: Any, spec: Spec) -> None:
  """Takes rows for test and validation from those of train, where nothing else says which.

  Raises:
    UserError: there are too few.
  """
  c, held_out = config.dataset, []
  for split, fraction in (
    ('test', c.table.test_fraction),
    ('validation', c.validation_fraction),
  ):
    if split in read.files or split in read.splits:
      continue
    name = read.names['train']
    if not fraction:
      raise UserError(f'{name} has no rows of {split}: set dataset.table.test_fraction')
    together, shared = _together(read.splits['train'], spec)
    how = {'fraction': fraction, 'seed': config.seed, 'name': split, 'together': together}
    read.splits['train'], read.splits[split] = split_off(read.splits['train'], **how)
    read.names[split] = name
    held_out.append(f'{len(read.splits[split]):,} for {split}')
    if not read.splits[split]:
      advice = (
        f'a {split}.csv' if len(read.files) > 1 or c.path.endswith('/') else f'a {split} file'
      )
      raise UserError(f'{name} is too small to set a {split} split aside: add rows or {advice}')
  if 'test' not in read.files and held_out:
    kept = f'; those of one {shared} stay together' if shared else ''
    read.remarks.append(
      f'{read.names["train"]}: rows are held out by seed {config.seed}, {", ".join(held_out)}{kept}'
    )


def _together(rows: Sequence[Row], spec: Spec) -> tuple[dict[str, Any], str]:
  """Returns (row id -> what is held out together with it, that in words)."""
  if spec.group:
    # A row without a group is one by itself.
    groups = {row.id: ('group', row.group) if row.group else row.id for row in rows}
    return groups, spec.group
  keys = {'text': [() if row.text is None else (same.text_key(row.text),) for row in rows]}
  if 'image' in spec.modalities:
    keys['image'] = same.image_keys([row.image for row in rows])
  numbers, kinds = same.groups(keys)
  groups = {row.id: number for row, number in zip(rows, numbers, strict=True)}
  return groups, ' or '.join(kinds)


def split_off(
  rows: Sequence[Row],
  *,
  fraction: float,
  seed: int,
  name: str = 'validation',
  together: Mapping[str, Any] | None = None,
) -> tuple[list[Row], list[Row]]:
  """Sets a share of the labelled rows aside, stratified (`splits.set_aside`).

  Args:
    rows: of train.
    fraction: of the labelled ones, in (0, 1).
    seed: root of the draw.
    name: of what is held out.
    together: row id -> what is held out together; None: each row is by itself.

  Returns:
    (rest, aside), in their order.
  """
  labelled = [row for row in rows if row.labels]
  ids, labels = [row.id for row in labelled], [row.labels for row in labelled]
  groups = None if together is None else [together[row_id] for row_id in ids]
  how = {'fraction': fraction, 'seed': seed, 'name': name, 'groups': groups}
  aside = {ids[n] for n in set_aside(ids, labels, **how)}
  return [row for row in rows if row.id not in aside], [row for row in rows if row.id in aside]
