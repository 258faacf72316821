"""Noise in images and texts, before they reach a tower.

The protocol is that of QMF (Zhang et al., ICML 2023), on the test split alone: with chance 1/2 an
image gets Gaussian noise of standard deviation 10 e on 0..255, the same in its three channels, else
with chance e/100 a tenth of its pixels become black or white; with chance 1/2 each word of a text
becomes "_" with chance e/10. Ours beside it: `letters`, where each letter becomes another one with
chance e/20. What an example gets is drawn by (seed, id), whatever its size, order or batch, and
pixels are clipped at both ends.
"""

import dataclasses
import hashlib
import io
import string
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import transforms
from molt_jax.data.decode_error import DecodeError
from molt_jax.data.sources import Wrapped

LEVELS = (5, 10)
SALTED = 0.1  # Share of the pixels.


@dataclasses.dataclass(frozen=True)
class Noise:
  """What is added to the examples of a split.

  Attributes:
    level: e, from 0 to 10; 0: nothing.
    pixels: whether to images.
    text: to texts: 'words', 'letters', or '' for nothing.
    seed: of the draws.
  """

  level: int
  pixels: bool
  text: str
  seed: int = 0

  def image(self, name: str, data: bytes) -> bytes:
    """Returns an image file, as PNG where noise was added; what cannot be read stays as it is.

    Args:
      name: of the example, and which of its images.
      data: of an image file.
    """
    draw = _generator(self.seed, 'image', name)
    if not self.pixels or not self.level:
      return data
    gaussian, salted = draw.random() < 0.5, draw.random() < self.level / 100
    if not gaussian and not salted:
      return data
    try:
      pixels_hwc = np.asarray(transforms.decode(data), np.float32)
    except DecodeError:
      return data
    shape = (*pixels_hwc.shape[:2], 1)
    if gaussian:
      pixels_hwc = pixels_hwc + draw.normal(0, 10 * self.level, shape)
    else:
      value_hw1 = 255.0 * draw.integers(0, 2, shape)
      pixels_hwc = np.where(draw.random(shape) < SALTED, value_hw1, pixels_hwc)
    file = io.BytesIO()
    Image.fromarray(np.clip(np.rint(pixels_hwc), 0, 255).astype(np.uint8)).save(file, 'PNG')
    return file.getvalue()

  def words(self, name: str, text: str) -> str:
    """Returns a text with words or letters replaced.

    Args:
      name: of the example.
      text: where words are replaced, one space parts them after.
    """
    draw = _generator(self.seed, 'text', name)
    if not self.text or not self.level or draw.random() >= 0.5:
      return text
    if self.text == 'words':
      lost = draw.random(len(text.split())) < self.level / 10
      pairs = zip(text.split(), lost, strict=True)
      return ' '.join('_' if gone else word for word, gone in pairs)
    lost = draw.random(len(text)) < self.level / 20
    others = draw.integers(0, 26, len(text))
    found = []
    for letter, gone, n in zip(text, lost, others, strict=True):
      other = string.ascii_lowercase[n]
      found.append(other if gone and letter.isalpha() and other != letter.lower() else letter)
    return ''.join(found)


def _generator(seed: int, what: str, name: str) -> np.random.Generator:
  content = f'{seed}/{what}/{name}'.encode('utf-8', 'surrogatepass')
  digest = hashlib.blake2b(content, digest_size=16).digest()
  return np.random.default_rng(int.from_bytes(digest, 'little'))


@dataclasses.dataclass(frozen=True)
class Noisy(Wrapped):
  """A split whose examples have noise.

  Attributes:
    noise: what is added.
  """

  noise: Noise

  @property
  def labels(self):
    return self.source.labels

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """See `Source`."""
    row = dict(self.source.read(index, image=image))
    name = self.source.ids[index]
    if row['text'] is not None:
      row['text'] = self.noise.words(name, row['text'])
    if row['image'] is not None:
      row['image'] = self.noise.image(f'{name}/0', row['image'])
    if 'images' in row:
      named = enumerate(row['images'])
      row['images'] = [self.noise.image(f'{name}/{n}', data) for n, data in named]
    return row


# What noise is in, by its name in tables.
KINDS = {
  'pixels': {'pixels': True, 'text': ''},
  'words': {'pixels': False, 'text': 'words'},
  'letters': {'pixels': False, 'text': 'letters'},
  'pixels and words': {'pixels': True, 'text': 'words'},
}
