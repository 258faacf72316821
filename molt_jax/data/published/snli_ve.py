"""SNLI-VE (Xie et al. 2019): does the image entail the hypothesis, contradict it, or neither?
565,286 hypotheses on the 31,783 images of Flickr30k.

The text is the hypothesis (`sentence2`) alone. `sentence1` is a caption of the image: whoever feeds
it has another, easier task.

About 9 % of labels are wrong, most of them neutral. With `dataset.snli_ve.neutral=relabelled` those
of validation and test are replaced by the ones that were collected anew for e-SNLI-VE (Kayser et
al. 2021: 1,665 and 1,631 differ), from its esnlive_dev.csv and esnlive_test.csv beside the .jsonl
files.
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

CLASSES = ('entailment', 'neutral', 'contradiction')
PUBLISHED = {'train': 529527, 'validation': 17858, 'test': 17901, 'classes': 3}
_FILES = {'train': 'train', 'validation': 'dev', 'test': 'test'}
# Where the .jsonl files lie below the folder, and where the images.
_TEXTS = ('', 'snli_ve', 'SNLI-VE', 'data', 'annotations')
_IMAGES = (
  'flickr30k_images',
  'flickr30k_images/flickr30k_images',
  'Flickr30K/flickr30k_images',
  'Flickr30k/flickr30k_images',
  'flickr30k/flickr30k_images',
  'flickr30k-images',
  'Flickr30K',
  'Flickr30k',
  'flickr30k/images',
  'flickr30k',
  'images',
  'Images',
)


@dataclasses.dataclass
class Pairs(layout.Folder):
  """`texts` holds snli_ve_*.jsonl (and esnlive_*.csv if relabelled), `images` ID.jpg or None."""

  texts: pathlib.Path
  images: pathlib.Path | None
  relabelled: bool

  class_names = CLASSES

  def __post_init__(self):
    relabelled = ('validation', 'test') if self.relabelled else ()
    new = [self._new_labels_file(split) for split in relabelled]
    if missing := [file.name for file in new if not file.is_file()]:
      raise UserError(
        f"config.dataset.snli_ve.neutral: 'relabelled' needs {' and '.join(missing)} of "
        f"e-SNLI-VE in {self.texts}; or give 'original'"
      )
    self.index_files = [*(self._file(split) for split in _FILES), *new]

  def _file(self, split: str) -> pathlib.Path:
    return self.texts / f'snli_ve_{_FILES[split]}.jsonl'

  def _new_labels_file(self, split: str) -> pathlib.Path:
    return self.texts / f'esnlive_{_FILES[split]}.csv'

  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    found, file = self.begin(split), self._file(split)
    new_labels, replaced = self._new_labels(split, found), 0
    for number, record in layout.json_lines(file):
      if isinstance(record, LeftOut):
        yield record
        continue
      found.row = f'{file.name}:{number}'
      try:
        row, was_replaced = self._row(record, found, new_labels)
      except cells.CellError as error:
        row, was_replaced = LeftOut(found.row, str(error)), False
      replaced += was_replaced
      yield row
    if self.relabelled:
      self.notes[f'{split} labels replaced'] = replaced

  def _row(
    self, record: Mapping[str, Any], found: findings.Findings, new_labels: Mapping[str, str]
  ) -> tuple[Row | LeftOut, bool]:
    """Returns a row, and whether its label is another one than the file's."""
    given = record.get('pairID')
    name = found.row if given is None else found.require('id', given)
    text = found.require('text', record.get('sentence2'))
    old = found.require('label', record.get('gold_label'))
    label = new_labels.get(name, old)
    if label is None or 'sentence2' not in record:
      return LeftOut(name, 'without gold_label or sentence2'), False
    if label not in CLASSES:
      return LeftOut(name, f'gold label {cells.shown(label)}'), False
    image = record.get('Flickr30K_ID')
    stem = None if cells.is_null(image) else found.require('id', image).removesuffix('.jpg')
    path = os.path.join(self.images, f'{stem}.jpg') if stem and self.images else None
    return Row(name, path, text, (CLASSES.index(label),)), label != old

  def _new_labels(self, split: str, found: findings.Findings) -> dict[str, str]:
    if not self.relabelled or split == 'train':
      return {}
    file = self._new_labels_file(split)
    labels, places, size = {}, [], 0
    for number, row in layout.csv_rows(file):
      if number == 1:
        size = len(row)
        if row.count('pairID') != 1 or row.count('gold_label') != 1:
          raise UserError(
            f'config.dataset.path: {file} is not a CSV file with one column pairID '
            'and one gold_label; copy it again'
          )
        places = [row.index('pairID'), row.index('gold_label')]
      elif row:
        found.row = f'{file.name}:{number}'
        try:
          if len(row) != size:
            raise cells.CellError('row', f'of {len(row)} cells, the header has {size}', 'mend it')
          label = found.require('label', row[places[1]])
          name = found.require('id', row[places[0]])
        except cells.CellError as error:
          raise UserError(f'config.dataset.path: {file} row {number}: {error}') from error
        if labels.setdefault(name, label) != label:
          found.remark(cells.TWICE, name)
        labels[name] = label
    return labels


class SnliVe(FolderBuilder):
  """TFDS builder of SNLI-VE."""

  name = 'snli_ve'
  LAYOUTS = (
    'snli_ve_{train,dev,test}.jsonl beside flickr30k_images/ID.jpg (or '
    'Flickr30K/flickr30k_images/ID.jpg)'
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Make the .jsonl files as https://github.com/necla-ml/SNLI-VE says; ask for the images at '
    'https://shannon.cs.illinois.edu/DenotationGraph; '
    f'expected: {LAYOUTS}.'
  )
  DESCRIPTION = (
    'Visual entailment: an image as the premise, a hypothesis, and their relation (Xie '
    'et al. 2019, "Visual Entailment").'
  )
  HOMEPAGE = 'https://github.com/necla-ml/SNLI-VE'

  @classmethod
  def open(
    cls, folder: pathlib.Path, choices: Mapping[str, str], *, images: bool = True
  ) -> Pairs | None:
    texts = next(
      (
        folder / name
        for name in _TEXTS
        if all((folder / name / f'snli_ve_{file}.jsonl').is_file() for file in _FILES.values())
      ),
      None,
    )
    shown = None
    if images:
      shown = next((folder / name for name in _IMAGES if _holds_images(folder / name)), None)
    if texts is None or (images and shown is None):
      return None
    return Pairs(texts, shown, choices['neutral'] == 'relabelled')

  @classmethod
  def published(cls, choices: Mapping[str, str]) -> dict[str, int]:
    return PUBLISHED


def _holds_images(folder: pathlib.Path) -> bool:
  return folder.is_dir() and any(entry.name.endswith('.jpg') for entry in os.scandir(folder))


def load(config: Any) -> Dataset:
  """Opens SNLI-VE; see `folder.load`."""
  return prepare.load(SnliVe, config)
