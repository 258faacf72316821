"""Five examples that a file is tried with: three complete, one of an image alone, one of a text
alone; all of one kind for a model that reads one modality.

They are made up unless a split is named: data of the run leave the machine with the file only
where that is asked for.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from molt_jax.data import transforms
from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import Source, images_of
from molt_jax.errors import UserError

Pair = tuple[bytes | None, str | None]
# Whether each of the examples has (image, text).
PATTERNS = ((True, True), (True, True), (True, True), (True, False), (False, True))
SIDE = 96  # Pixels of a made-up image.
MOST_SIDE = 512  # Larger pictures of a split are made smaller.


def made_up(class_names: Sequence[str], modalities: Sequence[str]) -> list[Pair]:
  """Returns examples of drawn images and of texts that name a class, the same each time."""
  pairs = []
  for number, _ in enumerate(PATTERNS):
    name = class_names[number * len(class_names) // len(PATTERNS)]
    pairs.append(_pair(number, _drawn(number), f'{name}, number {number}', modalities))
  return pairs


def of_split(source: Source, modalities: Sequence[str]) -> list[Pair]:
  """Returns examples spread over a split, of those that have what is used.

  Images are written anew, at most MOST_SIDE pixels wide and high, without what their files say
  beside (place, camera).

  Raises:
    UserError: fewer examples than are wanted can be used.
  """
  used = [m in modalities for m in MODALITIES]
  complete = np.flatnonzero((source.present | ~np.array(used)).all(axis=1))
  pairs = []
  for index in complete[_order(len(complete))]:
    example = source.read(int(index), image=used[0])
    images = images_of(example) if used[0] else []
    try:
      image = _small(transforms.decode(images[0])) if images else None
    except transforms.DecodeError:
      continue
    if used[0] == (image is not None) and (not used[1] or example['text'].strip()):
      pairs.append(_pair(len(pairs), image, example['text'], modalities))
    if len(pairs) == len(PATTERNS):
      return pairs
  raise UserError(
    f'--examples: {len(pairs)} examples of this split have all that the model reads, and '
    f'{len(PATTERNS)} are wanted; give another split, or none, and examples are made up'
  )


def _order(count: int) -> np.ndarray:
  """Positions, those that are spread evenly first."""
  first = np.linspace(0, count - 1, min(count, len(PATTERNS))).astype(int)
  return np.concatenate([first, np.setdiff1d(np.arange(count), first)]).astype(int)


def _pair(number: int, image: bytes | None, text: str, modalities: Sequence[str]) -> Pair:
  with_image, with_text = PATTERNS[number]
  if len(modalities) == 1:
    with_image, with_text = ('image' in modalities), ('text' in modalities)
  return (image if with_image else None), (text if with_text else None)


def _drawn(number: int) -> bytes:
  """A picture of smooth colours with a disc."""
  y_hw, x_hw = np.mgrid[0:SIDE, 0:SIDE] / SIDE
  channels = [x_hw, y_hw, (x_hw + y_hw * (number + 1)) % 1]
  disc_hw = (x_hw - 0.5) ** 2 + (y_hw - 0.5) ** 2 < (0.15 + 0.05 * number) ** 2
  picture_hwc = np.stack(channels[number % 3 :] + channels[: number % 3], axis=-1)
  picture_hwc = np.where(disc_hw[..., None], 1 - picture_hwc, picture_hwc)
  return _png(Image.fromarray(np.round(255 * picture_hwc).astype(np.uint8)))


def _small(image: Image.Image) -> bytes:
  image = image.copy()
  image.thumbnail((MOST_SIDE, MOST_SIDE))
  return _png(image)


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'PNG')
  return file.getvalue()
