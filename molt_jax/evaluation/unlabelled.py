"""A table whose rows are to be answered: none of them needs a label."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data import addresses, pictures
from molt_jax.data.likeness import likeness
from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import UNLABELLED
from molt_jax.data.table_source import TableSource
from molt_jax.data.tables import layout, memory
from molt_jax.data.tables.records import Records
from molt_jax.data.tables.rows import Row, read_rows
from molt_jax.data.tables.spec import Spec, spec_of
from molt_jax.errors import UserError
from molt_jax.runtime import console


@dataclasses.dataclass(frozen=True)
class Unlabelled:
  """A table without labels.

  Attributes:
    ids: FILE:ROW of all N rows, in their order.
    source: the rows that have something to classify.
    problems: id -> why a row, or its image, cannot be used.
  """

  ids: Sequence[str]
  source: TableSource
  problems: Mapping[str, str]

  @property
  def used(self) -> np.ndarray:
    """bool[2], the modalities that some row has."""
    return self.source.present.any(axis=0)


def open_table(
  config: Any,
  table: Any,
  *,
  image: Sequence[str] | None = None,
  text: Sequence[str] | None = None,
  image_folder: str = '',
) -> Unlabelled:
  """Opens a table for a run; no row needs a label, and a column of labels is not read.

  Args:
    config: of the run, which says what its columns are called.
    table: the path of a table, or one in memory.
    image: columns of images; None: those of the run.
    text: columns of text; None: those of the run.
    image_folder: what paths of images are relative to; '': the folder of the table.

  Raises:
    UserError: it cannot be read, has no column that the run knows, or most of its rows or images
      cannot be used.
  """
  given = {'image': image, 'text': text}
  spec = _spec(config, given, image_folder)
  ids: list[str] = []
  rows: list[Row] = []
  problems: dict[str, str] = {}
  for records in _records(table, spec):
    found = read_rows(
      _numbered(records, spec.label, ids),
      _narrowed(spec, records, given),
      unlabelled=True,
      needs_label=False,
    )
    for line in found.remarks:
      console.log(line)
    rows += found.rows
    problems |= {f'{odd.file}:{odd.row}': odd.reason for odd in found.aside}
    problems |= {name: why for name, why in found.lost.items() if name not in problems}
  images = [x for row in rows for x in pictures.each(row.image)]
  addresses.fetch([x for x in images if isinstance(x, addresses.Address)])
  labels = ((),) if spec.multi_label else (UNLABELLED,)
  return Unlabelled(ids, TableSource(tuple(rows), labels * len(rows)), problems)


def _spec(config: Any, given: Mapping[str, Sequence[str] | None], image_folder: str) -> Spec:
  """Returns how a table is read; `given` has the columns of each modality, None: the run's.

  Raises:
    UserError: columns are given of a modality that the run does not know.
  """
  spec = spec_of(config)
  columns = {}
  for modality in MODALITIES:
    own = getattr(spec, modality) if given[modality] is None else tuple(given[modality])
    columns[modality] = own if modality in spec.modalities else ()
    if given[modality] and modality not in spec.modalities:
      raise UserError(f'--{modality}: this run knows {spec.modalities[0]}s alone; leave it out')
  return dataclasses.replace(
    spec,
    **columns,
    split='',
    group='',
    lenient=True,
    image_folder=image_folder,
    dialect=spec.dialect._replace(lenient=True),
  )


def _records(table: Any, spec: Spec) -> list[Records]:
  if memory.is_table(table):
    return [memory.open_table(table, 'table')]
  files = layout.find(table, spec.dialect)
  return [file.open() for file in files.get('test') or files['train']]


def _numbered(records: Records, label: str, ids: list[str]) -> Records:
  """Returns records without labels that put the id of each row they read into `ids`."""

  def read(columns):
    for number, row in records.read(columns):
      ids.append(f'{records.name}:{number}')
      yield number, row

  columns = [name for name in records.columns if name != label]
  return dataclasses.replace(records, columns=columns, read=read)


def _narrowed(spec: Spec, records: Records, given: Mapping[str, Any]) -> Spec:
  """Leaves out a modality of which a table has no column, unless one was asked for by name or is
  spelled otherwise.
  """
  have = {likeness(name) for name in records.columns}
  left = []
  for modality in spec.modalities:
    columns = getattr(spec, modality)
    if given[modality] or any(likeness(name) in have for name in columns):
      left.append(modality)
  if not left:  # The reader says what is missing.
    return spec
  for modality in set(spec.modalities) - set(left):
    names = ' and '.join(getattr(spec, modality))
    console.log(f'{records.name} has no column {names}: no row has {modality}s')
  return dataclasses.replace(spec, modalities=tuple(left))
