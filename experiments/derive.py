"""Writes a data set anew as a table of one's own, with few labels or with noise, for experiments on
what a loss is good for.

  python experiments/derive.py --data=openmoji --to=FOLDER [--labelled=0.1] [--pixel_noise=0]
  [--letter_noise=0] [--seed=0]

--labelled: share of the training rows that keep their label, drawn by a hash of their ids, one of
each class at least; the others' cells are empty. --pixel_noise: standard deviation of Gaussian
noise on every colour channel, where black is 0 and white 1. --letter_noise: chance that a character
of a text is replaced by a random letter. Noise is on all three splits, labels are taken away from
train alone.
"""

import csv
import io
import pathlib
import shutil
import string

import grid
import numpy as np
from absl import flags
from PIL import Image

from molt_jax.data import datasets, missing, transforms
from molt_jax.data.sources import classes_of
from molt_jax.errors import UserError
from molt_jax.runtime import console

TO = flags.DEFINE_string('to', '', 'Folder of the new table; must not be there yet.')
LABELLED = flags.DEFINE_float(
  'labelled', 1.0, 'Share of the training rows that keep their label.', lower_bound=0, upper_bound=1
)
PIXEL_NOISE = flags.DEFINE_float(
  'pixel_noise', 0.0, 'Standard deviation, of colours from 0 to 1.', lower_bound=0
)
LETTER_NOISE = flags.DEFINE_float(
  'letter_noise', 0.0, 'Share of characters replaced.', lower_bound=0, upper_bound=1
)
SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')


def noisy_picture(encoded, rng):
  """Returns a PNG of the picture on white, every channel with Gaussian noise."""
  picture = transforms.decode(encoded)
  noisy = np.asarray(picture, np.float32) + 255 * PIXEL_NOISE.value * rng.standard_normal(
    (*picture.size[::-1], 3), np.float32
  )
  stream = io.BytesIO()
  Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8)).save(stream, 'png')
  return stream.getvalue()


def noisy_text(text, rng):
  hit = rng.random(len(text)) < LETTER_NOISE.value
  letters = rng.choice(list(string.ascii_lowercase), len(text))
  return ''.join(letter if h else old for old, letter, h in zip(text, letters, hit, strict=True))


def labelled(source):
  """Returns the rows that keep their label: a share of all, and at least one of each class."""
  order = [
    n
    for n in missing.hash_order(source.ids, seed=SEED.value, name='labelled')
    if classes_of(source.labels[n])
  ]
  first = dict(reversed([(source.labels[n], n) for n in order]))
  rest = [n for n in order if n != first[source.labels[n]]]
  return {*first.values(), *rest[: max(0, round(LABELLED.value * len(source)) - len(first))]}


def write(source, split, class_names, folder, bar):
  """Writes SPLIT.csv and its pictures."""
  known = labelled(source) if split == 'train' else range(len(source))
  with (folder / f'{split}.csv').open('w', encoding='utf-8', newline='') as stream:
    rows = csv.writer(stream)
    rows.writerow(('image', 'text', 'label'))
    for n in range(len(source)):
      example, rng = source[n], np.random.default_rng((SEED.value, len(split), n))
      name = ''
      if example['image'] is not None:
        name = f'images/{split}_{n}'
        (folder / name).write_bytes(
          noisy_picture(example['image'], rng) if PIXEL_NOISE.value else example['image']
        )
      text = noisy_text(example['text'] or '', rng)
      rows.writerow((name, text, class_names[example['label']] if n in known else ''))
      bar.advance()


def main():
  folder = pathlib.Path(TO.value)
  if not TO.value or folder.exists():
    raise UserError(f'--to: {TO.value!r} is not legal; give a folder that is not there yet')
  if len(grid.DATA.value) > 1:
    raise UserError('--data: give one data set')
  data = datasets.load_dataset(grid.make_config(grid.DATA.value[0], {}, SEED.value))
  if data.multi_label:
    raise UserError(f'--data: {data.name} has several labels a row, which this does not know')
  half = folder.with_name(f'{folder.name}.part')
  shutil.rmtree(half, ignore_errors=True)
  (half / 'images').mkdir(parents=True)
  with console.progress('writing', sum(map(len, data.splits.values())), 'rows') as bar:
    for split, source in data.splits.items():
      write(source, split, data.class_names, half, bar)
  half.rename(folder)


if __name__ == '__main__':
  grid.start(main)
