"""Hateful Memes (Kiela et al. 2020): memes and the text on them, hateful or not. Scored by AUROC.

test.jsonl of the first phase has no labels; the test split is test_seen.jsonl, the validation split
dev_seen.jsonl (the same as dev.jsonl of old).
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from molt_jax.data import cells, findings
from molt_jax.data.published import layout, prepare
from molt_jax.data.published.builder import FolderBuilder
from molt_jax.data.published.layout import LeftOut, Row
from molt_jax.data.sources import Dataset
from molt_jax.errors import UserError

CLASSES = ('not hateful', 'hateful')
PUBLISHED = {'train': 8500, 'validation': 500, 'test': 1000, 'classes': 2}
_FILES = {
  'train': ('train.jsonl',),
  'validation': ('dev_seen.jsonl', 'dev.jsonl'),
  'test': ('test_seen.jsonl',),
}


@dataclasses.dataclass
class Memes(layout.Folder):
  """The .jsonl `files` of the splits; `root` holds img/, or is not read."""

  root: pathlib.Path | None
  files: Mapping[str, pathlib.Path]

  class_names = CLASSES

  def __post_init__(self):
    self.index_files = list(self.files.values())

  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    found, file = self.begin(split), self.files[split]
    for number, record in layout.json_lines(file):
      if isinstance(record, LeftOut):
        yield record
        continue
      found.row = f'{file.name}:{number}'
      try:
        yield self._row(record, found)
      except cells.CellError as error:
        yield LeftOut(found.row, str(error))

  def _row(self, record: Mapping[str, Any], found: findings.Findings) -> Row | LeftOut:
    name = found.require('id', record.get('id')).zfill(5)
    label = found.require('label', record.get('label'))
    if label not in ('0', '1'):
      return LeftOut(name, 'no label' if label is None else f'label {cells.shown(label)}')
    image = found.require('image', record.get('img')) or f'img/{name}.png'
    path = None
    if self.root is not None:
      path = os.path.join(self.root, *pathlib.PurePosixPath(image).parts)
    return Row(name, path, found.require('text', record.get('text')), (int(label),))


class HatefulMemes(FolderBuilder):
  """TFDS builder of Hateful Memes."""

  name = 'hateful_memes'
  LAYOUTS = 'train.jsonl, dev_seen.jsonl (or dev.jsonl) and test_seen.jsonl beside img/ID.png'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the data set of the Hateful Memes challenge, with the '
    f'labels of its first test; expected: {LAYOUTS}.'
  )
  DESCRIPTION = (
    'Memes and their texts, hateful or not (Kiela et al. 2020, "The Hateful Memes Challenge").'
  )
  HOMEPAGE = 'https://hatefulmemeschallenge.com'

  @classmethod
  def open(
    cls, folder: pathlib.Path, choices: Mapping[str, str], *, images: bool = True
  ) -> Memes | None:
    files = {
      split: next((folder / name for name in names if (folder / name).is_file()), None)
      for split, names in _FILES.items()
    }
    if files['train'] and not files['test'] and (folder / 'test.jsonl').is_file():
      raise UserError(
        f'config.dataset.path: {folder} has test.jsonl, which has no labels; add '
        'test_seen.jsonl, which has them'
      )
    if not all(files.values()) or (images and not (folder / 'img').is_dir()):
      return None
    return Memes(folder if images else None, files)

  @classmethod
  def published(cls, choices: Mapping[str, str]) -> dict[str, int]:
    return PUBLISHED


def load(config: Any) -> Dataset:
  """Opens Hateful Memes; see `folder.load`."""
  return prepare.load(HatefulMemes, config)
