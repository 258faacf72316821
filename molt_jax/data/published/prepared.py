"""A prepared data set as a `Source`, and the files it consists of."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from molt_jax.data.sources import reading_prepared

IMAGES = 'images.array_record'
ROWS = 'rows.npz'
COLUMNS = {
  'ids': None,
  'labels': np.int16,
  'label_counts': np.int16,
  'images': np.int32,
  'texts': bool,
}
# Of what is prepared by this version and later ones: numbers that change with image and text.
CONTENTS = {'image_numbers': np.int64, 'text_numbers': np.int64}


@dataclasses.dataclass(frozen=True)
class PreparedSource:
  """A split of a prepared data set; a `Source`.

  Ids, labels and presence come from the table beside it, so no example is read for them.
  """

  folder: str
  split: str
  multi_label: bool

  def __reduce__(self):
    return PreparedSource, (self.folder, self.split, self.multi_label)

  @functools.cached_property
  def _table(self) -> dict[str, np.ndarray]:
    with reading_prepared(self.folder), np.load(pathlib.Path(self.folder) / ROWS) as table:
      if fault := table.zip.testzip():  # Reads all of it, and compares it with its CRC-32.
        raise ValueError(fault)
      names = [name for name in COLUMNS | CONTENTS if f'{self.split}_{name}' in table]
      return {name: table[f'{self.split}_{name}'] for name in names}

  @functools.cached_property
  def _rows(self) -> Sequence[dict[str, Any]]:
    with reading_prepared(self.folder):
      return tfds.builder_from_directory(self.folder).as_data_source(self.split)

  @functools.cached_property
  def _images(self) -> Sequence[bytes]:
    with reading_prepared(self.folder):
      file = str(pathlib.Path(self.folder) / IMAGES)
      return array_record_data_source.ArrayRecordDataSource([file])

  @functools.cached_property
  def ids(self) -> list[str]:
    return [name.decode() for name in self._table['ids'].tolist()]

  @functools.cached_property
  def labels(self) -> list[Any]:
    flat, ends = self._table['labels'].tolist(), np.cumsum(self._table['label_counts']).tolist()
    if not self.multi_label:
      return flat
    return [tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

  @functools.cached_property
  def present(self) -> np.ndarray:
    return np.stack([self._table['images'] >= 0, self._table['texts']], axis=1)

  @functools.cached_property
  def contents(self) -> np.ndarray | None:
    """See `Source`; None where an older version prepared the data."""
    columns = [self._table.get(name) for name in CONTENTS]
    return None if columns[0] is None else np.stack(columns, axis=1)

  def __len__(self) -> int:
    return len(self._table['ids'])

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    number = int(self._table['images'][index])
    with reading_prepared(self.folder):
      data = self._images[number] if image and number >= 0 else None
      text = self._rows[index]['text'].decode() if self._table['texts'][index] else None
    return {'id': self.ids[index], 'image': data, 'text': text, 'label': self.labels[index]}
