"""The rows of each split of a table, from its files or from the column that says it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from molt_jax.data import findings
from molt_jax.data.tables import layout
from molt_jax.data.tables.rows import Aside, Row, read_rows
from molt_jax.data.tables.spec import Spec
from molt_jax.errors import UserError


@dataclasses.dataclass
class Read:
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


def read_splits(config: Any, spec: Spec, wanted: Sequence[str]) -> Read:
  """Reads the files of some splits, and that of train where the splits are parts of it."""
  files = _files(config, spec)
  read = Read(files)
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


def _part_by_column(read: Read, spec: Spec) -> None:
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
