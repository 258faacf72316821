"""Writes captions for a small CLIP from the emoji of `tools/emoji_styles.py`: names, and sentences
with the names of classes, as captions of the web have such words.

  python experiments/emoji_captions.py --styles=FOLDER --to=FOLDER [--without=openmoji]

The new folder has tables alone; their pictures are in --styles (`dataset.table.image_folder`). By a
hash of its path, the text of a picture is its emoji's name (half of them), 'a photo of a CLASS:
NAME.' or 'a photo of a CLASS.' --without: the hand whose drawings are left out of train.
"""

import csv
import io
import pathlib
import zlib

import grid
from absl import flags

from molt_jax.errors import UserError
from molt_jax.runtime import atomic, files

STYLES = flags.DEFINE_string('styles', '', 'What tools/emoji_styles.py wrote.')
TO = flags.DEFINE_string('to', '', 'Folder to write the tables to; must not be there yet.')
WITHOUT = flags.DEFINE_string('without', '', 'Hand to leave out, a folder of images/.')
CAPTIONS = ('{text}', '{text}', 'a photo of a {label}: {text}.', 'a photo of a {label}.')


def caption(row):
  """The text of a picture."""
  kind = zlib.crc32(row['image'].encode()) % len(CAPTIONS)
  return CAPTIONS[kind].format(**row)


def main():
  styles, folder = pathlib.Path(STYLES.value), pathlib.Path(TO.value)
  if not (styles / 'train.csv').is_file():
    raise UserError(f'--styles: no train.csv in {STYLES.value!r}; give what emoji_styles.py wrote')
  if not TO.value or folder.exists():
    raise UserError(f'--to: {TO.value!r} is not legal; give a folder that is not there yet')
  if WITHOUT.value and not (styles / 'images' / WITHOUT.value).is_dir():
    hands = files.listed(sorted(hand.name for hand in (styles / 'images').iterdir()))
    raise UserError(f'--without: no hand {WITHOUT.value!r}; give one of {hands}')
  folder.mkdir(parents=True)
  for split in ('train', 'validation', 'test'):
    with (styles / f'{split}.csv').open(encoding='utf-8') as stream:
      rows = list(csv.DictReader(stream))
    if split == 'train' and WITHOUT.value:
      rows = [row for row in rows if not row['image'].startswith(f'images/{WITHOUT.value}/')]
    lines = io.StringIO(newline='')
    written = csv.DictWriter(lines, ('image', 'text', 'label'))
    written.writeheader()
    written.writerows({**row, 'text': caption(row)} for row in rows)
    atomic.write(folder / f'{split}.csv', lines.getvalue())
    print(f'{split}: {len(rows)} captions')


if __name__ == '__main__':
  grid.start(main)
