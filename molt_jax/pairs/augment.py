"""Augmentation for pretraining, with numpy and Pillow alone: random crop, flip and mild colour for
images, word deletion and swap for texts.

Every draw comes from a generator of (seed, epoch, example id, view), so it is the same on any
machine, with any batch size, and after a resume.
"""

import dataclasses
import hashlib

import numpy as np
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclasses.dataclass(frozen=True)
class ImageAugmentation:
  """How an image is varied.

  Attributes:
    min_area: smallest share of the image's area that a crop keeps, in (0, 1]; 1 keeps the aspect
      ratio and the whole square in the middle.
    max_aspect: largest ratio of width to height of a crop, and of height to width, >= 1.
    flip: chance of a horizontal flip.
    color: brightness, contrast and saturation are each multiplied by a number in [1 - color, 1 +
      color].
  """

  min_area: float
  max_aspect: float
  flip: float
  color: float


@dataclasses.dataclass(frozen=True)
class TextAugmentation:
  """Random deletion and swap of words (Wei and Zou 2019, "EDA", without its synonyms).

  Attributes:
    delete: chance that a word is left out; at least one word stays.
    swap: chance that a word changes places with another one.
  """

  delete: float
  swap: float

  @property
  def changes(self) -> bool:
    """Whether a text can come out different at all."""
    return self.delete > 0 or self.swap > 0


def generator(seed: int, epoch: int, example_id: str, view: str) -> np.random.Generator:
  """Returns the generator of one example in one epoch; `view` tells its draws apart (image, text,
  the second view of each).
  """
  digest = hashlib.blake2b(
    f'{seed}/{epoch}/{view}/{example_id}'.encode('utf-8', 'surrogatepass'), digest_size=16
  ).digest()
  return np.random.default_rng(int.from_bytes(digest, 'little'))


def augment_image(
  image: Image.Image,
  how: ImageAugmentation,
  rng: np.random.Generator,
  *,
  size: int,
  resample: int = Image.Resampling.BICUBIC,
) -> Image.Image:
  """Returns a random crop of an RGB image, of `size` x `size`, perhaps flipped, colours varied."""
  crop = image.resize((size, size), resample, box=crop_box(image.size, how, rng))
  if rng.random() < how.flip:
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  for enhancer, factor in zip(
    _ENHANCERS, rng.uniform(1 - how.color, 1 + how.color, len(_ENHANCERS)), strict=True
  ):
    if how.color:
      crop = enhancer(crop).enhance(factor)
  return crop


def crop_box(
  size: tuple[int, int], how: ImageAugmentation, rng: np.random.Generator
) -> tuple[float, float, float, float]:
  """Draws (left, top, right, bottom), inside an image of (width, height).

  The largest centred square counts as area 1, so that min_area = 1 and max_aspect = 1 give the
  square that evaluation sees, or cuts further where the tower's file says so. Crops of more area
  than fits are clipped to the image.
  """
  width, height = size
  side = min(width, height)
  area = rng.uniform(how.min_area, 1.0)
  stretch = np.exp(rng.uniform(-0.5, 0.5) * np.log(how.max_aspect))
  crop_width, crop_height = (
    min(side * np.sqrt(area) * stretch, width),
    min(side * np.sqrt(area) / stretch, height),
  )
  # At full area the crop is the centred one: the room to move in is that of a square of area 1, not
  # of the whole picture.
  room_x, room_y = max(side - crop_width, 0.0), max(side - crop_height, 0.0)
  left = np.clip((width - side) / 2 + rng.uniform(0, 1) * room_x, 0, width - crop_width)
  top = np.clip((height - side) / 2 + rng.uniform(0, 1) * room_y, 0, height - crop_height)
  return float(left), float(top), float(left + crop_width), float(top + crop_height)


def augment_text(text: str, how: TextAugmentation, rng: np.random.Generator) -> str:
  """Returns the text with words left out and swapped at random; whitespace between words comes out
  as one space if anything can change.
  """
  words = text.split()
  if not how.changes or len(words) < 2:
    return text
  keep = rng.random(len(words)) >= how.delete
  keep[rng.integers(len(words))] |= not keep.any()
  words = [word for word, kept in zip(words, keep, strict=True) if kept]
  for i in range(len(words)):
    if rng.random() < how.swap:
      j = int(rng.integers(len(words)))
      words[i], words[j] = words[j], words[i]
  return ' '.join(words)
