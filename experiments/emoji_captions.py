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

from absl import app, flags

from molt_jax.runtime import atomic

STYLES = flags.DEFINE_string('styles', None, 'What tools/emoji_styles.py wrote.', required=True)
TO = flags.DEFINE_string('to', None, 'Folder to write the tables to.', required=True)
WITHOUT = flags.DEFINE_string('without', '', 'Hand to leave out, a folder of images/.')
CAPTIONS = ('{text}', '{text}', 'a photo of a {label}: {text}.', 'a photo of a {label}.')


def caption(row):
  """The text of a picture."""
  kind = zlib.crc32(row['image'].encode()) % len(CAPTIONS)
  return CAPTIONS[kind].format(**row)


def main(_):
  folder = pathlib.Path(TO.value)
  folder.mkdir(parents=True)
  for split in ('train', 'validation', 'test'):
    with (pathlib.Path(STYLES.value) / f'{split}.csv').open(encoding='utf-8') as stream:
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
  app.run(main)
