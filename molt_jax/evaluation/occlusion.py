"""Words and image regions that an answer rests on, by occlusion (Zeiler and Fergus 2014): each is
taken away in turn, and what the log-probability of the label loses by that is its weight.

Every part costs a prediction, towers included: words + SIDE x SIDE regions an example.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 4  # Regions along a side of an image.
MOST_WORDS = 40  # Of a text; those behind are not taken away.


class Variant(NamedTuple):
  """An example without one of its parts.

  Attributes:
    image, text: what is left of it.
    part: number of the word, or of the region, row by row.
    modality: of the part.
  """

  image: Image.Image | None
  text: str | None
  part: int
  modality: str


def variants(image: Image.Image | np.ndarray | None, text: str | None) -> list[Variant]:
  """Returns an example without each of its regions and words in turn.

  A region takes the mean colour of the image. A word is what stands between blanks; the only word
  of a text is not taken away, as the text would be missing then.
  """
  found = []
  if image is not None:
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    found += [Variant(part, text, n, 'image') for n, part in enumerate(_without_regions(image))]
  words = (text or '').split()
  for n in range(len(words_of(text or ''))):
    found.append(Variant(image, ' '.join(words[:n] + words[n + 1 :]), n, 'text'))
  return found


def _without_regions(image: Image.Image) -> list[Image.Image]:
  pixels = np.asarray(image.convert('RGB'))
  mean = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
  height, width = pixels.shape[:2]
  found = []
  for row in range(SIDE):
    for column in range(SIDE):
      part = pixels.copy()
      part[_span(row, height), _span(column, width)] = mean
      found.append(Image.fromarray(part))
  return found


def _span(n: int, size: int) -> slice:
  return slice(n * size // SIDE, (n + 1) * size // SIDE)


def words_of(text: str) -> list[str]:
  """Returns the words that are taken away, in their order."""
  words = text.split()
  return words[:MOST_WORDS] if len(words) > 1 else []


def weights(variants: Sequence[Variant], weight_n: Sequence[float], text: str | None) -> dict:
  """Returns {'words': [{'word', 'weight'}, ...], 'regions': rows of weights}, as far as an example
  has them.

  Args:
    variants: as `variants` returned them.
    weight_n: what the log-probability of the label loses in each.
    text: of the example.
  """
  of = {modality: [] for modality in ('image', 'text')}
  for variant, weight in zip(variants, weight_n, strict=True):
    of[variant.modality].append(weight)
  found = {}
  if text is not None:
    words = zip(words_of(text), of['text'], strict=True)
    found['words'] = [{'word': word, 'weight': weight} for word, weight in words]
  if of['image']:
    found['regions'] = np.reshape(of['image'], (SIDE, SIDE)).tolist()
  return found
