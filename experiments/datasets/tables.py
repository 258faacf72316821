"""Data sets that are there in another form: as tables, and OpenMoji as this library prepares it."""

import csv
import hashlib
import html
import io
import pathlib
import re
import shutil

from PIL import Image

from molt_jax.data import transforms
from molt_jax.data.published import openmoji

from . import folders

VALIDATION_SHARE = 0.1


def read(path: pathlib.Path) -> list[dict[str, str]]:
  """Returns the rows of a CSV file."""
  with path.open(encoding='utf-8-sig', newline='') as stream:
    return list(csv.DictReader(stream))


def hold_out(source: pathlib.Path, folder: pathlib.Path) -> str:
  """Writes a table of train and test anew with a validation split: a tenth of the training
  pictures, by a hash of their names, with all their rows.

  Returns:
    The counts, one line.
  """
  rows = {'train': [], 'validation': [], 'test': read(source / 'test.csv')}
  for row in read(source / 'train.csv'):
    digest = hashlib.sha256(row['image'].encode()).digest()
    share = int.from_bytes(digest[:8], 'big') / 2**64
    rows['validation' if share < VALIDATION_SHARE else 'train'].append(row)
  half = folder.with_name(f'{folder.name}.part')
  shutil.rmtree(half, ignore_errors=True)
  shutil.copytree(source, half)
  for name, own in rows.items():
    with (half / f'{name}.csv').open('w', encoding='utf-8', newline='') as stream:
      table = csv.DictWriter(stream, ('image', 'text', 'label'), extrasaction='ignore')
      table.writeheader()
      table.writerows(own)
  half.rename(folder)
  return ', '.join(f'{len(own)} {name}' for name, own in rows.items())


def shop(source: pathlib.Path) -> list[folders.Example]:
  """Returns the products of products.csv (title, description, photo, category); what cannot be
  read of a photo is absent, mark-up is taken out of texts.
  """
  examples = []
  for row in read(source / 'products.csv'):
    texts = filter(None, (_plain(row['title']), _plain(row['description'])))
    text = '. '.join(texts)
    image = _photo(source / row['photo']) if row['photo'] else None
    if row['category'] and (text or image is not None):
      examples.append(folders.Example(row['sku'], image, text, row['category'], row['sku']))
  return examples


def _plain(text):
  return ' '.join(html.unescape(re.sub('<[^>]*>', ' ', text)).split())


def _photo(path):
  try:
    return transforms.decode(path.read_bytes())
  except (OSError, ValueError):
    return None


def emoji(data_dir: str = '~/.cache/molt_jax/datasets') -> list[folders.Example]:
  """Returns OpenMoji, with its own splits."""
  data = openmoji.open_prepared(openmoji.prepare(data_dir))
  examples = []
  for split, source in data.splits.items():
    for n in range(len(source)):
      row = source[n]
      image = Image.open(io.BytesIO(row['image']), formats=['PNG', 'JPEG'])
      label = data.class_names[row['label']]
      examples.append(folders.Example(row['id'], image, row['text'], label, row['id'], split))
  return examples
