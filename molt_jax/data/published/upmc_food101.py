"""UPMC-Food101 (Wang et al. 2015): pictures of dishes with the titles or the pages they were found
on, 101 classes.

Titles and pages are different tasks (pages name the dish again and again), so
`dataset.upmc_food101.text` says which, and every result does. `title` is what people can still get:
two CSV files *without a header*, FILE,TITLE,CLASS, of 67,972 and 22,716 rows. The paper's 67,971
and 22,715 are these after a reader took the first row for a header. `page` leaves out pictures
without a page, as others do (65,085 and 21,683 remain in Zou et al. 2023, "UniS-MMC").

There is no official validation split: `dataset.validation_fraction` of train is set aside by seed.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from molt_jax.data import cells
from molt_jax.data.published import layout, prepare
from molt_jax.data.published.builder import FolderBuilder
from molt_jax.data.published.layout import LeftOut, Row
from molt_jax.data.sources import Dataset

PUBLISHED = {'title': {'train': 67972, 'test': 22716}, 'page': {'train': 65085, 'test': 21683}}
SPLITS = ('train', 'test')
# Some numbers have a dash: cheese_plate_717-2.jpg.
_IMAGE = re.compile(r'.+_[\d-]+\.(jpe?g|png)', re.IGNORECASE)
_FLAT = ('image', 'images')


@dataclasses.dataclass
class Titles(layout.Folder):
  """`texts` holds the two CSV files, `flat` all images.

  None: they are in root/images/SPLIT/CLASS. Without `images`, none are.
  """

  root: pathlib.Path
  texts: pathlib.Path
  flat: pathlib.Path | None
  images: bool = True

  splits = SPLITS

  def __post_init__(self):
    self.index_files = [self.texts / f'{split}_titles.csv' for split in SPLITS]
    rows = [row for split in SPLITS for row in self._rows(split)]
    self.class_names = sorted({row.label for row in rows if isinstance(row, _Title)})

  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    index = {name: k for k, name in enumerate(self.class_names)}
    for row in self._rows(split):
      if isinstance(row, LeftOut):
        yield row
      else:
        folder = self.flat or self.root / 'images' / split / row.folder
        image = os.path.join(folder, row.name) if self.images else None
        yield Row(row.name, image, row.text, (index[row.label],))

  def _rows(self, split: str) -> Iterator['_Title | LeftOut']:
    found, file = self.begin(split), self.texts / f'{split}_titles.csv'
    for number, row in layout.csv_rows(file):
      found.row = f'{file.name}:{number}'
      if len(row) != 3 or not _IMAGE.fullmatch(row[0].strip()):
        yield LeftOut(found.row, 'not FILE,TITLE,CLASS')
        continue
      try:
        name, text, label = map(found.require, ('image', 'text', 'label'), row)
      except cells.CellError as error:
        yield LeftOut(found.row, str(error))
        continue
      if label is None:
        yield LeftOut(found.row, 'no class')
      else:
        yield _Title(name, text, label, row[2].strip())


class _Title(NamedTuple):
  """A row of a titles file; `folder` is the class as it is written."""

  name: str
  text: str | None
  label: str
  folder: str


@dataclasses.dataclass
class Pages(layout.Folder):
  """root/images/SPLIT/CLASS/*.jpg with root/texts_txt/CLASS/*.txt."""

  root: pathlib.Path

  splits = SPLITS
  index_files = ()

  def __post_init__(self):
    self.class_names = sorted(
      {
        path.name
        for split in SPLITS
        for path in (self.root / 'images' / split).iterdir()
        if path.is_dir()
      }
    )

  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    found = self.begin(split)
    for k, label in enumerate(self.class_names):
      folder = self.root / 'images' / split / label
      for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if not _IMAGE.fullmatch(name):
          yield LeftOut(name, 'not the name of an image')
          continue
        page = self.root / 'texts_txt' / label / (name.rpartition('.')[0] + '.txt')
        found.row = name
        if page.is_file():
          text = found.require('text', page.read_text('utf-8', errors='replace'))
          yield Row(name, os.path.join(folder, name), text, (k,))
        else:
          yield LeftOut(name, 'no page', by_rule=True)


class UpmcFood101(FolderBuilder):
  """TFDS builder of UPMC-Food101."""

  name = 'upmc_food101'
  LAYOUTS = (
    'images/{train,test}/CLASS/CLASS_NUMBER.jpg (or image/CLASS_NUMBER.jpg) with '
    'texts/{train,test}_titles.csv for text=title, with '
    'texts_txt/CLASS/CLASS_NUMBER.txt for text=page'
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f'Unpack https://www.kaggle.com/datasets/gianmarco96/upmcfood101; expected: {LAYOUTS}.'
  )
  DESCRIPTION = (
    'Pictures of dishes with titles or texts of the pages they were found on (Wang et '
    'al. 2015, "Recipe recognition ...").'
  )
  HOMEPAGE = 'https://www.kaggle.com/datasets/gianmarco96/upmcfood101'

  @classmethod
  def open(
    cls, folder: pathlib.Path, choices: Mapping[str, str], *, images: bool = True
  ) -> Titles | Pages | None:
    nested = all((folder / 'images' / split).is_dir() for split in SPLITS)
    if choices['text'] == 'page':
      return Pages(folder) if nested and (folder / 'texts_txt').is_dir() else None
    flat = None
    if not nested:
      flat = next((folder / name for name in _FLAT if (folder / name).is_dir()), None)
    for texts in (folder / 'texts', folder / 'text', folder):
      here = nested or flat or not images
      if here and all((texts / f'{split}_titles.csv').is_file() for split in SPLITS):
        return Titles(folder, texts, flat, images)
    return None

  @classmethod
  def published(cls, choices: Mapping[str, str]) -> dict[str, int]:
    return {**PUBLISHED[choices['text']], 'classes': 101}


def load(config: Any) -> Dataset:
  """Opens UPMC-Food101; see `folder.load`."""
  return prepare.load(UpmcFood101, config)
