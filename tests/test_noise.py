"""Noise of the experiments: drawn by (seed, id), clipped at both ends, of the size it says."""

import io
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

EXPERIMENTS = str(pathlib.Path(__file__).parents[1] / 'experiments')


@pytest.fixture(scope='module')
def noise():
  """The module `experiments/noise.py`."""
  sys.path.insert(0, EXPERIMENTS)
  import noise

  sys.path.remove(EXPERIMENTS)
  return noise


class Rows:
  """A thousand equal examples."""

  def __init__(self, ids, value=128):
    self.ids, self.labels = ids, [0] * len(ids)
    self.present = np.ones((len(ids), 2), bool)
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, 'PNG')
    self.file = file.getvalue()

  def __len__(self):
    return len(self.ids)

  def read(self, index, *, image):
    text = 'one red square of ten small words is painted here'
    return {
      'id': self.ids[index],
      'image': self.file if image else None,
      'text': text,
      'label': self.labels[index],
    }


def pixels(row):
  return np.asarray(Image.open(io.BytesIO(row['image']))).astype(int)


def rows_of(noise, level, kind, ids, value=128):
  split = noise.Noisy(Rows(ids, value), noise.Noise(level, **noise.KINDS[kind]))
  return [split[n] for n in range(len(split))]


def test_noise_depends_on_the_id_alone(noise):
  ids = [f'row {n}' for n in range(40)]
  first = rows_of(noise, 10, 'pixels and words', ids)
  again = rows_of(noise, 10, 'pixels and words', ids[::-1])[::-1]
  assert first == again
  assert len({row['image'] for row in first}) > 15
  assert rows_of(noise, 0, 'pixels and words', ids) == [
    Rows(ids).read(n, image=True) for n in range(40)
  ]


def test_half_of_the_images_have_gaussian_noise_of_that_size(noise):
  rows = rows_of(noise, 5, 'pixels', [f'{n}' for n in range(400)])
  values = np.stack([pixels(row) for row in rows]) - 128
  changed = [set(np.unique(x)) - {0, -128, 127} != set() for x in values]
  assert abs(np.mean(changed) - 0.5) < 0.08
  noisy = values[changed]
  assert np.all(noisy == noisy[..., :1])  # Alike in the three channels.
  assert abs(noisy.std() - 50) < 2 and abs(noisy.mean()) < 2
  salted = [not c and x.any() for c, x in zip(changed, values, strict=True)]
  assert 0 < np.mean(salted) < 0.07


def test_pixels_are_clipped_at_both_ends(noise):
  for value in (0, 255):
    rows = rows_of(noise, 10, 'pixels', [f'{n}' for n in range(30)], value)
    noisy = np.stack([pixels(row) for row in rows])
    away = np.abs(noisy - value)
    # Without clipping half of the noise would come out at the other end.
    assert np.mean(away > 250) < 0.01 and away.max() > 100


def test_words_and_letters_are_lost_at_their_rates(noise):
  ids = [f'{n}' for n in range(400)]
  clean = Rows(ids).read(0, image=False)['text']
  for kind, level, rate in (('words', 5, 0.5), ('words', 10, 1.0), ('letters', 10, 0.5)):
    texts = [row['text'] for row in rows_of(noise, level, kind, ids)]
    split = str.split if kind == 'words' else list
    lost = np.array([[a != b for a, b in zip(split(t), split(clean), strict=True)] for t in texts])
    hit = lost.any(axis=1)
    assert abs(hit.mean() - 0.5) < 0.08
    letters = np.array([c.isalpha() for c in clean]) if kind == 'letters' else slice(None)
    # One letter in 26 becomes itself.
    assert abs(lost[hit][:, letters].mean() - rate) < 0.04


def test_what_is_no_image_stays(noise):
  added = noise.Noise(10, pixels=True, text='')
  assert all(added.image(f'{n}', b'no image') == b'no image' for n in range(5))
