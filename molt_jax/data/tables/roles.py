"""Which columns of a table are what: as given, or guessed from their names and first cells.

Guessed are only columns; nothing of a cell is. The guess is shown and kept, so that it can be put
right by naming the columns.
"""

import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import cells, findings, pictures
from molt_jax.data.likeness import likeness
from molt_jax.data.tables.layout import IMAGES, SPLIT_WORDS
from molt_jax.data.tables.records import Malformed, Records
from molt_jax.errors import UserError

SAMPLE_ROWS = 1000
# Names that say what a column is, as `likeness` makes them, the likeliest first.
_IMAGE_NAMES = ('image', 'img', 'picture', 'photo', 'imagepath', 'filename', 'imageurl')
_LABEL_NAMES = (
  'label',
  'labels',
  'class',
  'classname',
  'category',
  'categories',
  'target',
  'genre',
  'genres',
  'tag',
  'tags',
  'topic',
  'sentiment',
  'y',
)
_TEXT_NAMES = (
  'text',
  'title',
  'name',
  'productname',
  'caption',
  'description',
  'headline',
  'subject',
  'summary',
  'abstract',
  'body',
  'content',
  'sentence',
  'question',
  'review',
  'comment',
  'tweet',
  'plot',
  'details',
  'keywords',
)
_SPLIT_NAMES = ('split', 'subset', 'partition', 'set')
_TEXT_WORDS = 3.0  # Words a cell of a column that is text whatever its name.
_MOST_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Roles:
  """Columns by what they are.

  Attributes:
    image: columns of images; empty: there are none.
    text: columns of text, which become one text in this order; empty: there are none.
    label: the column of labels.
    split: the column that says which split a row is in; '': none.
    several: whether cells of the label are lists.
    guessed: the roles that were not given.
    unused: the other columns.
  """

  image: tuple[str, ...]
  text: tuple[str, ...]
  label: str
  split: str
  several: bool
  guessed: tuple[str, ...]
  unused: tuple[str, ...]


def assign(
  records: Records,
  *,
  image: Sequence[str] | None,
  text: Sequence[str] | None,
  label: str | None,
  split: str | None,
  others: Sequence[str] = (),
) -> Roles:
  """Finds out which columns are what.

  Args:
    records: of the file whose rows are train.
    image: as given; None: to be guessed.
    text: as given; None: to be guessed.
    label: as given; None: to be guessed.
    split: as given, '' for none; None: to be guessed.
    others: columns that have another use.

  Raises:
    UserError: a column that was given is not there, or the label cannot be guessed.
  """
  sample = _sample(records)
  given = {'image': image, 'text': text, 'label': label, 'split': split}
  for role, columns in given.items():
    for column in [columns] if isinstance(columns, str) else columns or ():
      check_there(records, column, f'--{role}')
  taken = set(others) | {*(image or ()), *(text or ()), label, split}
  if image is None:
    image = _guess_image(sample, taken)
    taken |= set(image)
  if split is None:
    split = _guess_split(sample, taken)
    taken.add(split)
  if label is None:
    label = _guess_label(records, sample, taken)
    taken.add(label)
    _check_header(records, sample[label], label)
  if text is None:
    text = _guess_text(sample, taken)
  used = {*image, *text, label, split, *others}
  return Roles(
    image=tuple(image),
    text=tuple(text),
    label=label,
    split=split,
    several=any(isinstance(value, list) for value in sample.get(label, ())),
    guessed=tuple(role for role, columns in given.items() if columns is None),
    unused=tuple(column for column in records.columns if column not in used),
  )


def _check_header(records: Records, values: Sequence[Any], label: str) -> None:
  """Raises UserError where the first line may be a row, and no names."""
  if label in values or any(map(_looks_like_image, records.columns)):
    first = findings.some([cells.shown(column) for column in records.columns])
    raise UserError(
      f'{records.name}: its first line has {first}, which look like cells: put a line above it '
      'that names the columns'
    )


def check_there(records: Records, column: str, flag: str) -> None:
  """Raises UserError where a file has no column of that name."""
  if not column or column in records.columns:
    return
  near = difflib.get_close_matches(column, records.columns, n=1)
  near = [name for name in records.columns if likeness(name) == likeness(column)] or near
  hint = f'did you mean {cells.shown(near[0])}? It has' if near else 'it has'
  raise UserError(
    f'{flag}: {records.name} has no column {cells.shown(column)}; {hint} '
    f'{findings.some([cells.plain(name) for name in records.columns], most=20)}'
  )


def _sample(records: Records) -> dict[str, list[Any]]:
  """Returns what the first cells of each column hold that are not empty."""
  columns = [name for name in dict.fromkeys(records.columns) if name]
  if not columns:
    raise UserError(f'{records.name} is empty: its first line names the columns')
  found: dict[str, list[Any]] = {column: [] for column in columns}
  for _, row in itertools.islice(records.read(columns), SAMPLE_ROWS):
    if isinstance(row, Malformed):
      continue
    for column, value in row.items():
      if not _is_empty(value):
        found[column].append(value)
  if not any(found.values()):
    raise UserError(f'{records.name} has no rows, or all of them are empty')
  return found


def _is_empty(value: Any) -> bool:
  if isinstance(value, str):
    return not value.strip() or cells.is_null_word(value)
  return cells.is_null(value)


def _key(column: str) -> str:
  return re.sub(r'[^a-z0-9]', '', column.casefold())


def _by_name(names: Sequence[str], columns: Sequence[str]) -> list[str]:
  """Returns the columns that have one of the names, in the order of the names."""
  return [column for name in names for column in columns if _key(column) == name]


# ---- Images --------------------------------------------------------------------------------------


def _looks_like_image(value: Any) -> bool:
  if isinstance(value, str):
    path = value.strip().partition('?')[0].lower()
    return path.endswith(IMAGES) and len(path.splitlines()) == 1
  if isinstance(value, list):
    return bool(value) and all(_looks_like_image(item) for item in value)
  kinds = (pictures.Picture, bytes, os.PathLike, Image.Image, np.ndarray)
  return isinstance(value, kinds)


def _guess_image(sample: Mapping[str, Sequence[Any]], taken: set[str]) -> tuple[str, ...]:
  free = [column for column in sample if column not in taken and sample[column]]
  images = []
  for column in free:
    values = sample[column]
    if values and sum(map(_looks_like_image, values)) >= len(values) / 2:
      images.append(column)
  found = _by_name(_IMAGE_NAMES, images) or images or _by_name(_IMAGE_NAMES[:5], free)
  return tuple(found[:1])


# ---- Labels, splits, texts -----------------------------------------------------------------------


def _guess_split(sample: Mapping[str, Sequence[Any]], taken: set[str]) -> str:
  free = [name for name in sample if name not in taken]
  for column in _by_name(_SPLIT_NAMES, free):
    if _splits_in(sample[column]):
      return column
  for column in free:  # Whatever its name: some rows are of train, others are not.
    found = _splits_in(sample[column])
    if 'train' in found and len(found) > 1:
      return column
  return ''


def _splits_in(values: Sequence[Any]) -> set[str]:
  """Returns the splits that the values name, none where one of them names none."""
  words = {str(value).strip().lower() for value in values}
  return {SPLIT_WORDS[word] for word in words} if words <= set(SPLIT_WORDS) else set()


def _guess_label(records: Records, sample: Mapping[str, Sequence[Any]], taken: set[str]) -> str:
  free = [column for column in sample if column not in taken]
  if named := _by_name(_LABEL_NAMES, free):
    return named[0]
  few = [column for column in free if _may_be_classes(sample[column])]
  if len(few) == 1:
    return few[0]
  why = 'none is called so, and '
  why += f'{" and ".join(map(cells.shown, few[:4]))} may be it' if few else 'none has few values'
  raise UserError(
    f'{records.name}: which column is the label? ({why}); give --label=COLUMN, one of '
    f'{findings.some([cells.plain(name) for name in free], most=20)}'
  )


def _may_be_classes(values: Sequence[Any]) -> bool:
  if not values or not all(isinstance(value, str | bool | int) for value in values):
    return False
  count = len({str(value).strip() for value in values})
  words = np.mean([len(str(value).split()) for value in values])
  return 2 <= count <= min(_MOST_CLASSES, max(2, len(values) // 5)) and words < _TEXT_WORDS


def _guess_text(sample: Mapping[str, Sequence[Any]], taken: set[str]) -> tuple[str, ...]:
  found = []
  for column, values in sample.items():
    if column in taken or not values:
      continue
    # Other cells than strings are refused with their rows, which says more than no text would.
    if _key(column) in _TEXT_NAMES and not all(isinstance(x, int | float) for x in values):
      found.append(column)
    elif all(isinstance(value, str) for value in values):
      words = np.mean([len(value.split()) for value in values])
      if words >= _TEXT_WORDS and not any(map(_looks_like_image, values)):
        found.append(column)
  return tuple(found)
