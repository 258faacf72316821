"""MM-IMDb (Arevalo et al. 2017): posters and plots of 25,959 movies, 23 genres, several a movie.

Which text is used changes scores (`dataset.mm_imdb.text`): a movie has one to dozens of plots, and
perhaps an outline of a sentence or two. `longest` is what most report; `all` makes an example of
each plot, so that scores weigh a movie by its plots.

71 movies carry one of four genres beside the 23: News 64, Adult 4, Talk-Show 2, Reality-TV 1.
`dataset.mm_imdb.genres=all` keeps them, without that label (perhaps without any). The paper counts
15,510, 2,599 and 7,779 movies, 42, 9 and 20 fewer than the official split, which are 71: exactly
those. `genres=paper` leaves them out.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from molt_jax.data import cells, findings, formats, textfiles
from molt_jax.data.published import layout, prepare
from molt_jax.data.published.builder import FolderBuilder
from molt_jax.data.published.layout import LeftOut, Row
from molt_jax.data.sources import Dataset
from molt_jax.errors import UserError

# By frequency, as the field lists them.
GENRES = (
  'Drama',
  'Comedy',
  'Romance',
  'Thriller',
  'Crime',
  'Action',
  'Adventure',
  'Horror',
  'Documentary',
  'Mystery',
  'Sci-Fi',
  'Fantasy',
  'Family',
  'Biography',
  'War',
  'History',
  'Music',
  'Animation',
  'Musical',
  'Western',
  'Sport',
  'Short',
  'Film-Noir',
)
PUBLISHED = {
  'all': {'train': 15552, 'validation': 2608, 'test': 7799},
  'paper': {'train': 15510, 'validation': 2599, 'test': 7779},
}
TEXTS = {
  'longest': lambda plots, outline: [max(plots, key=len, default=None)],
  'outline': lambda plots, outline: [outline or next(iter(plots), None)],
  'first': lambda plots, outline: plots[:1] or [None],
  'all': lambda plots, outline: plots or [None],
}
# (split file, folder of the JSON files, folder of the posters): the official archive; two copies in
# wide use.
_LAYOUTS = (
  ('split.json', 'dataset', 'dataset'),
  ('split.json', 'labels', 'images'),
  ('split.json', 'meta_data', 'image'),
  ('meta_data/split.json', 'meta_data', 'image'),
)
_SPLIT_KEYS = {'train': ('train',), 'validation': ('dev', 'val', 'validation'), 'test': ('test',)}


@dataclasses.dataclass
class Movies(layout.Folder):
  """A folder of movies: `split` names ids, `records` has ID.json, `posters` ID.jpeg or None."""

  split: pathlib.Path
  records: pathlib.Path
  posters: pathlib.Path | None
  choices: Mapping[str, str]

  class_names = GENRES

  def __post_init__(self):
    self.index_files = [self.split]
    self._ids = self._read_split()

  def _read_split(self) -> dict[str, list[str]]:
    lists = layout.read_json(self.split)
    names = {}
    for split, keys in _SPLIT_KEYS.items():
      given = [lists[key] for key in keys if key in lists] if isinstance(lists, dict) else []
      if not given or not isinstance(given[0], list):
        raise UserError(
          f'config.dataset.path: {self.split} is not JSON with lists of ids under '
          'train, dev and test; copy it again'
        )
      try:
        names[split] = [cells.read('id', name).zfill(7) for name in given[0]]
      except cells.CellError as error:
        raise UserError(f'config.dataset.path: {self.split}, {split}: {error}') from error
    return names

  def rows(self, split: str) -> Iterator[Row | LeftOut]:
    found = self.begin(split)
    for name in self._ids[split]:
      found.row = name
      file = self.records / f'{name}.json'
      what = f'{self.records.name}/{name}.json'
      try:
        record = textfiles.parse_json(formats.read_file(file))
        texts = _texts(record, self.choices['text'], found)
        genres = cells.read_labels(record['genres'], several=True)
      except FileNotFoundError:
        yield LeftOut(name, f'no {what}')
      except (cells.CellError, textfiles.NotJson) as error:
        yield LeftOut(name, f'{what}: {error}')
      except (OSError, TypeError, AttributeError, KeyError):
        yield LeftOut(name, f'{what} is not the JSON of a movie')
      else:
        yield from self._rows(name, set(genres), texts)

  def _rows(self, name: str, genres: set[str], texts: list[str | None]) -> Iterator[Row | LeftOut]:
    if self.choices['genres'] == 'paper' and not genres.issubset(GENRES):
      yield LeftOut(name, 'a genre beside the 23', by_rule=True)
      return
    labels = tuple(k for k, genre in enumerate(GENRES) if genre in genres)
    for number, text in enumerate(texts):
      yield Row(
        f'{name}/{number}' if number else name, self._poster(name), text, labels, extra=number > 0
      )

  def _poster(self, name: str) -> str | None:
    if self.posters is None:
      return None
    paths = [os.path.join(self.posters, name + suffix) for suffix in ('.jpeg', '.jpg')]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def _texts(record: Mapping[str, Any], choice: str, found: findings.Findings) -> list[str | None]:
  plot = record.get('plot')
  plots = [found.require('text', text) for text in (plot if isinstance(plot, list) else [plot])]
  outline = found.require('text', record.get('plot outline'))
  return TEXTS[choice]([text for text in plots if text], outline and outline.strip())


class MMImdb(FolderBuilder):
  """TFDS builder of MM-IMDb."""

  name = 'mm_imdb'
  MULTI_LABEL = True
  LAYOUTS = (
    'split.json with dataset/ID.json and dataset/ID.jpeg, or labels/ID.json and '
    'images/ID.jpeg, or meta_data/ID.json and image/ID.jpeg'
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f'Unpack https://archive.org/download/mmimdb/mmimdb.tar.gz; expected: {LAYOUTS}.'
  )
  DESCRIPTION = (
    'Posters and plots of movies, with their genres (Arevalo et al. 2017, "Gated '
    'Multimodal Units for Information Fusion").'
  )
  HOMEPAGE = 'https://archive.org/details/mmimdb'

  @classmethod
  def open(
    cls, folder: pathlib.Path, choices: Mapping[str, str], *, images: bool = True
  ) -> Movies | None:
    for split, records, posters in _LAYOUTS:
      there = (folder / split).is_file() and (folder / records).is_dir()
      if there and (not images or (folder / posters).is_dir()):
        shown = folder / posters if images else None
        return Movies(folder / split, folder / records, shown, choices)
    return None

  @classmethod
  def published(cls, choices: Mapping[str, str]) -> dict[str, int]:
    return {**PUBLISHED[choices['genres']], 'classes': len(GENRES)}


def load(config: Any) -> Dataset:
  """Opens MM-IMDb; see `folder.load`."""
  return prepare.load(MMImdb, config)
