"""Which files a table is made of, and which split each is: one file, or a folder of one kind.

one file                     its rows are train; the rest is held out, or a column says it
train.csv, test.csv, ...     a file, or several numbered ones (train-00000-of-00002), a split
saved by `datasets`          dataset_dict.json and a folder a split, or state.json and Arrow files
images in folders            CLASS/1.jpg or SPLIT/CLASS/1.jpg, or metadata.csv (.jsonl, .parquet)
                             with paths in one of its columns, in the folder or in SPLIT/
one table among others       the only file of a kind that is read
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from molt_jax.config.json_files import read_json
from molt_jax.data import textfiles
from molt_jax.data.tables import arrow_files, csv_files, json_files, spreadsheets
from molt_jax.data.tables.csv_files import Dialect
from molt_jax.data.tables.records import Cells, Records
from molt_jax.data.textfiles import COMPRESSED
from molt_jax.errors import UserError

SPLITS = ('train', 'validation', 'test')
# As people and `datasets` name them.
SPLIT_WORDS = {
  'train': 'train',
  'training': 'train',
  'validation': 'validation',
  'valid': 'validation',
  'val': 'validation',
  'dev': 'validation',
  'test': 'test',
  'testing': 'test',
  'eval': 'test',
  'evaluation': 'test',
}


def _arrow(file: pathlib.Path, name: str, dialect: Dialect) -> Records:
  del dialect
  return arrow_files.open_arrow(file, name)


_TEXTS = {
  '.csv': csv_files.open_csv,
  '.tsv': csv_files.open_csv,
  '.tab': csv_files.open_csv,
  '.txt': csv_files.open_csv,
  '.jsonl': json_files.open_json,
  '.ndjson': json_files.open_json,
  '.json': json_files.open_json,
}
OPENERS: Mapping[str, Callable[[pathlib.Path, str, Dialect], Records]] = {
  **_TEXTS,
  **{kind + COMPRESSED: opener for kind, opener in _TEXTS.items()},
  '.parquet': _arrow,
  '.arrow': _arrow,
  '.feather': _arrow,
  **dict.fromkeys(spreadsheets.SUFFIXES, spreadsheets.open_spreadsheet),
}
# In a folder these may be something else: they are read where they are named.
_OTHERS = ('.txt', '.json', '.txt.gz', '.json.gz')
_TABLES = tuple(kind for kind in OPENERS if kind not in _OTHERS)
IMAGES = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm')
IMAGES += ('.avif', '.ico')
_SHARD = re.compile(r'([a-z]+)-[0-9]{5}-of-[0-9]{5}')
_ADVICE = 'save it as CSV, JSON lines or Parquet'


class File(NamedTuple):
  """A file, or a folder of images, that is not opened yet.

  Attributes:
    name: in messages and ids.
    open: reads its columns.
  """

  name: str
  open: Callable[[], Records]


def find(path: str | os.PathLike, dialect: Dialect) -> dict[str, list[File]]:
  """Returns the files of each split that there is; 'train' where nothing says which.

  Raises:
    UserError: nothing that is read is there.
  """
  root = pathlib.Path(os.path.expanduser(path))
  if os.path.isfile(root):
    return {'train': [_file(root, root.name, dialect)]}
  if not os.path.isdir(root):
    raise UserError(
      f'{str(path)!r} is not a folder, and no file: give a table, or the folder that holds '
      'train.csv and test.csv (molt train: config.dataset.path)'
    )
  for look in (_saved_datasets, _split_files, _only_file, _image_folders):
    if found := look(root, dialect):
      return found
  raise UserError(
    f'{root} has no train.csv and no train.jsonl: add one of them, or give the path of one table '
    f'(read are {", ".join(kind for kind in _TABLES if not kind.endswith(COMPRESSED))}, text also '
    f'as {COMPRESSED}, what `datasets` saves, and folders of images named by class)'
  )


def _file(file: pathlib.Path, name: str, dialect: Dialect) -> File:
  kind = _kind(file)
  if kind not in OPENERS:
    raise UserError(f'{name} is of a kind that is not read ({kind or "no suffix"}): {_ADVICE}')
  return File(name, lambda: OPENERS[kind](file, name, dialect))


def _kind(file: pathlib.Path) -> str:
  """Returns the end of a file's name that says how it is read, such as '.csv' or '.csv.gz'."""
  kind, suffix = textfiles.kind_of(file), file.suffix.lower()
  return kind + suffix if suffix == COMPRESSED else kind


def _stem(file: pathlib.Path) -> str:
  return file.name[: len(file.name) - len(_kind(file))].lower()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  # A spreadsheet that is open somewhere lies beside a small file of that name behind '~$'.
  names = sorted(name for name in os.listdir(folder) if not name.startswith(('.', '~$')))
  return [folder / name for name in names if os.path.isfile(folder / name)]


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
  names = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
  return [folder / name for name in names if os.path.isdir(folder / name)]


# ---- train.csv, test.csv -------------------------------------------------------------------------


def _split_files(root: pathlib.Path, dialect: Dialect) -> dict[str, list[File]]:
  found = _by_split(root, root, dialect)
  if not found and (root / 'data').is_dir():  # As repositories of data sets have them.
    found = _by_split(root / 'data', root, dialect)
  return found if 'train' in found else {}


def _by_split(folder: pathlib.Path, root: pathlib.Path, dialect: Dialect) -> dict:
  files: dict[str, list[pathlib.Path]] = {}
  shards: dict[str, list[pathlib.Path]] = {}
  for file in _files(folder):
    if _kind(file) not in OPENERS:
      continue
    stem = _stem(file)
    if stem in SPLIT_WORDS:
      files.setdefault(SPLIT_WORDS[stem], []).append(file)
    elif (match := _SHARD.fullmatch(stem)) and match[1] in SPLIT_WORDS:
      shards.setdefault(SPLIT_WORDS[match[1]], []).append(file)
  for split, several in files.items():
    if len(several) + (split in shards) > 1:
      other = (several + shards.get(split, []))[1]
      raise UserError(f'{folder} has both {several[0].name} and {other.name}: keep one of them')
  return {
    split: [_file(file, file.relative_to(root).as_posix(), dialect) for file in files_of_split]
    for split, files_of_split in (files | shards).items()
  }


def _only_file(root: pathlib.Path, dialect: Dialect) -> dict[str, list[File]]:
  tables = [file for file in _files(root) if _kind(file) in _TABLES]
  if any(_stem(file) in SPLIT_WORDS for file in tables):
    return {}
  if len(tables) > 1:
    names = ', '.join(file.name for file in tables[:3])
    raise UserError(f'{root} has several tables ({names}): give the path of one of them')
  return {'train': [_file(tables[0], tables[0].name, dialect)]} if tables else {}


# ---- Saved by `datasets` -------------------------------------------------------------------------


def _saved_datasets(root: pathlib.Path, dialect: Dialect) -> dict[str, list[File]]:
  if (root / 'state.json').is_file():
    return {'train': _saved(root, root, dialect)}
  if not (root / 'dataset_dict.json').is_file():
    return {}
  names = read_json(root / 'dataset_dict.json', 'save the data set again').get('splits', [])
  found = {}
  for name in names:
    if SPLIT_WORDS.get(name) in found:
      raise UserError(f'{root} has several splits that are {SPLIT_WORDS[name]}: rename one of them')
    if name in SPLIT_WORDS:
      found[SPLIT_WORDS[name]] = _saved(root / name, root, dialect)
  if 'train' not in found:
    raise UserError(
      f'{root} has no split that is called train (it has {", ".join(names) or "none"}): name it so'
    )
  return found


def _saved(folder: pathlib.Path, root: pathlib.Path, dialect: Dialect) -> list[File]:
  state = read_json(folder / 'state.json', 'save the data set again')
  files = [folder / str(entry['filename']) for entry in state.get('_data_files', [])]
  if state.get('_indices_data_files'):
    raise UserError(
      f'{folder} was saved by an old version of `datasets`, with the order of its rows apart: load '
      'it and save it again'
    )
  return [_file(file, file.relative_to(root).as_posix(), dialect) for file in files]


# ---- Images in folders ---------------------------------------------------------------------------


def _image_folders(root: pathlib.Path, dialect: Dialect) -> dict[str, list[File]]:
  inner = _folders(root)
  if inner and all(folder.name.lower() in SPLIT_WORDS for folder in inner):
    found = {}
    for folder in inner:
      parts = _metadata(folder, root, dialect) or _classes(folder, root)
      if parts:
        found[SPLIT_WORDS[folder.name.lower()]] = parts
    return found if 'train' in found else {}
  parts = _classes(root, root)
  return {'train': parts} if parts else {}


def _metadata(folder: pathlib.Path, root: pathlib.Path, dialect: Dialect) -> list[File]:
  files = [file for file in _files(folder) if _stem(file) == 'metadata' and _kind(file) in OPENERS]
  return [_file(file, file.relative_to(root).as_posix(), dialect) for file in files[:1]]


def _classes(folder: pathlib.Path, root: pathlib.Path) -> list[File]:
  """Returns what opens a folder of one folder of images a class; empty: it is none."""
  classes = _folders(folder)
  if not any(_image_files(each) for each in classes):
    return []
  name = folder.relative_to(root).as_posix() if folder != root else root.name
  return [File(name, lambda: _open_classes(folder, name, classes))]


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
  found = sorted(folder.rglob('*'))
  return [path for path in found if path.suffix.lower() in IMAGES and path.is_file()]


def _open_classes(folder: pathlib.Path, name: str, classes: Sequence[pathlib.Path]) -> Records:
  files = [(each.name, file) for each in classes for file in _image_files(each)]

  def read(columns: Sequence[str]) -> Iterator[tuple[str, Cells]]:
    for label, file in files:
      path = file.relative_to(folder).as_posix()
      cells = {'image': path, 'label': label}
      yield path, {column: cells[column] for column in columns}

  notes = [f'{len(classes)} folders of images, each a class']
  return Records(name, str(folder.resolve()), ('image', 'label'), read, notes)
