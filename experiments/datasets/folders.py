"""Folders of image+text tables: examples are grouped, split and written, the same everywhere."""

import csv
import dataclasses
import hashlib
import io
import pathlib
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from scipy import sparse
from sklearn.model_selection import StratifiedGroupKFold

# Of 20 folds 13 are for training, 3 for validation and 4 for the test.
NUM_FOLDS = 20
FOLDS = {'test': range(4), 'validation': range(4, 7), 'train': range(7, NUM_FOLDS)}
SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Example:
  """One row of a table.

  Attributes:
    name: its file's name, without the extension.
    image: a picture, of any mode; it is laid on white. None where it is absent.
    text: '' where it is absent.
    label: its class.
    group: whatever may not stand on both sides of a split, such as a series of one drawing.
    split: where it belongs; '' is drawn.
  """

  name: str
  image: Image.Image | None
  text: str
  label: str
  group: str
  split: str = ''


def png(image: Image.Image, side: int = 224) -> bytes:
  """Returns a PNG file of `image` on white, its longer side `side` pixels at most."""
  rgba = image.convert('RGBA')
  rgba.thumbnail((side, side), Image.Resampling.LANCZOS)
  white = Image.new('RGBA', rgba.size, 'white')
  stream = io.BytesIO()
  Image.alpha_composite(white, rgba).convert('RGB').save(stream, 'PNG')
  return stream.getvalue()


def normalised(text: str) -> str:
  """Returns the letters of a text, without case, accents, digits and punctuation."""
  folded = unicodedata.normalize('NFKD', text).casefold()
  return ' '.join(re.findall(r'[^\W\d_]+', ''.join(c for c in folded if not _combines(c)))) or text


def _combines(character: str) -> bool:
  return bool(unicodedata.combining(character))


def groups_of(keys: Sequence[Iterable[str]]) -> np.ndarray:
  """Numbers the connected components of examples that share a key.

  Args:
    keys: of each example.

  Returns:
    int[N], one number an example.
  """
  column: dict[str, int] = {}
  pairs = [(n, column.setdefault(key, len(column))) for n, own in enumerate(keys) for key in own]
  rows, columns = np.array(pairs).T
  size = len(keys) + len(column)
  graph = sparse.coo_array((np.ones(len(rows)), (rows, columns + len(keys))), shape=(size, size))
  _, component = sparse.csgraph.connected_components(graph, directed=False)
  return component[: len(keys)]


def split(labels: Sequence[str], groups: np.ndarray, *, seed: int = 0) -> np.ndarray:
  """Returns the split of each example, str[N]: stratified by class, groups stay together."""
  folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
  fold = np.zeros(len(labels), int)
  for number, (_, held_out) in enumerate(folds.split(labels, labels, groups)):
    fold[held_out] = number
  return np.array([next(s for s in FOLDS if f in FOLDS[s]) for f in fold])


def frequent(examples: Iterable[Example], minimum: int, maximum: int) -> list[Example]:
  """Drops classes of fewer than `minimum` examples; keeps `maximum` of each, by a hash of names."""
  by_class: dict[str, list[Example]] = {}
  for example in examples:
    by_class.setdefault(example.label, []).append(example)
  kept = []
  for _, own in sorted(by_class.items()):
    own.sort(key=lambda e: hashlib.sha256(e.name.encode()).hexdigest())
    if len(own) >= minimum:
      kept.extend(own[:maximum])
  return sorted(kept, key=lambda e: e.name)


def write(examples: Iterable[Example], folder: pathlib.Path, readme: str, licence: str) -> str:
  """Writes train.csv, validation.csv, test.csv, images/, README and LICENSE.

  A picture that comes twice with one text and label is written once; examples of one group, text
  (but for digits) or picture are in one split, unless they say themselves in which they are.

  Args:
    examples: some 20 of each class at least, or all with a split.
    folder: must not be there yet.
    readme: provenance; the counts are added.
    licence: the text of the licence.

  Returns:
    The counts, one line.

  Raises:
    ValueError: a split would have no example of a class.
  """
  unique = _unique(examples)
  labels = [e.label for e, _ in unique]
  where = np.array([e.split for e, _ in unique])
  if not all(where):
    where = split(labels, groups_of([_keys(e, file) for e, file in unique]))
  for name in SPLITS:
    lacking = set(labels) - {labels[n] for n in np.flatnonzero(where == name)}
    if lacking:
      raise ValueError(f'{name} has no example of {", ".join(sorted(lacking))}: groups too large')
  half = folder.with_name(f'{folder.name}.part')
  shutil.rmtree(half, ignore_errors=True)
  (half / 'images').mkdir(parents=True)
  for name in SPLITS:
    _write_split([unique[n] for n in np.flatnonzero(where == name)], half, name)
  sizes = ', '.join(f'{np.sum(where == s)} {s}' for s in SPLITS)
  counts = f'{len(unique)} examples ({sizes}), {len(set(labels))} classes'
  (half / 'README').write_text(f'{readme.strip()}\n\n{counts}.\n', encoding='utf-8')
  (half / 'LICENSE').write_text(licence, encoding='utf-8')
  half.rename(folder)
  return counts


def redraw(source: pathlib.Path, folder: pathlib.Path, *, seed: int) -> None:
  """Writes a folder of `write` anew, its examples drawn to other splits of the same shares;
  examples of one text or picture are in one split.

  Args:
    source: the folder.
    folder: must not be there yet.
    seed: of the draw.
  """
  rows = []
  for name in SPLITS:
    with (source / f'{name}.csv').open(encoding='utf-8', newline='') as stream:
      rows.extend(csv.DictReader(stream))
  files = [(source / row['image']).read_bytes() if row['image'] else None for row in rows]
  keys = [_shown(row['text'], file) for row, file in zip(rows, files, strict=True)]
  where = split([row['label'] for row in rows], groups_of(keys), seed=seed)
  half = folder.with_name(f'{folder.name}.part')
  shutil.rmtree(half, ignore_errors=True)
  shutil.copytree(source / 'images', half / 'images')
  for name in SPLITS:
    with (half / f'{name}.csv').open('w', encoding='utf-8', newline='') as stream:
      table = csv.DictWriter(stream, ('image', 'text', 'label'))
      table.writeheader()
      table.writerows(rows[n] for n in np.flatnonzero(where == name))
  half.rename(folder)


def _unique(examples):
  """Returns [(example, PNG file or None)], each picture with a text and a label once."""
  found = {}
  for example in examples:
    file = None if example.image is None else png(example.image)
    found.setdefault((file, example.text, example.label, example.split), (example, file))
  return list(found.values())


def _keys(example, file):
  return [f'group {example.group}', *_shown(example.text, file)]


def _shown(text, file):
  keys = [f'text {normalised(text)}'] if text else []
  return keys + ([f'picture {hashlib.sha256(file).hexdigest()}'] if file else [])


def _write_split(rows, folder, name):
  with (folder / f'{name}.csv').open('w', encoding='utf-8', newline='') as stream:
    table = csv.writer(stream)
    table.writerow(('image', 'text', 'label'))
    for example, file in rows:
      path = f'images/{example.name}.png' if file else ''
      if file:
        (folder / path).write_bytes(file)
      table.writerow((path, example.text, example.label))
