"""A data set in memory and a tokenizer of letters, for the tests of this room."""

import io

import numpy as np
import pytest
from PIL import Image

from molt_jax.data import examples

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)


class MemorySource:
  """Examples in memory that remembers which images were asked for."""

  def __init__(self, images, texts, labels):
    self.images, self.texts, self.labels = images, texts, labels
    self.ids = [f'e{n}' for n in range(len(labels))]
    self.present = np.array(
      [(i is not None, t is not None) for i, t in zip(images, texts, strict=True)], bool
    ).reshape(-1, 2)
    self.read_images = set()

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return self.read(index, image=True)

  def read(self, index, *, image):
    if image and self.images[index] is not None:
      self.read_images.add(index)
    return {
      'id': self.ids[index],
      'image': self.images[index] if image else None,
      'text': self.texts[index],
      'label': self.labels[index],
    }


def png(color, size=(9, 7)):
  buffer = io.BytesIO()
  Image.new('RGB', size, color).save(buffer, 'PNG')
  return buffer.getvalue()


@pytest.fixture
def make_source():
  def make(n, **replace):
    columns = {
      'images': [png((k % 256, 3 * k % 256, 90)) for k in range(n)],
      'texts': [f'text {k}' for k in range(n)],
      'labels': [k % 3 for k in range(n)],
    }
    return MemorySource(**(columns | replace))

  return make


@pytest.fixture
def make_preprocess():
  def make(**replace):
    fields = {
      'image_size': 8,
      'mean': MEAN,
      'std': STD,
      'resize': 'crop',
      'encode': lambda text, length: [ord(c) for c in text][:length],
      'pad_id': 7,
      'max_tokens': 6,
      'num_classes': 3,
      'multi_label': False,
    }
    return examples.Preprocess(**(fields | replace))

  return make
