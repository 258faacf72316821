"""Pictures that are nearly the same: resized, or compressed anew.

Two are where, of 256 comparisons of the brightness of neighbours on a grid of 16 x 17 (a difference
hash), at most 10 differ.
"""

from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import formats, transforms
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.examples import read_example
from molt_jax.data.sources import Source
from molt_jax.data.summary import evenly
from molt_jax.runtime import console

# Side of the grid of differences of brightness; bits that two nearly equal pictures differ in at
# most; bits of either value that a picture has at least: in a blank one there is nothing to tell.
_SIDE, _MOST_BITS, _LEAST_BITS = 16, 10, 24


def hashes(source: Source, sample: int, bar: console.Progress) -> tuple[list[str], np.ndarray]:
  """Returns (ids, bool[N, 256]) of the images that are looked at and are not blank."""
  ids, bits = [], []
  for n in evenly(len(source), sample):
    bar.advance()
    if not source.present[n, 0]:
      continue
    example = read_example(source, n, image=True, report=DecodeReport())
    found = None if example['image'] is None else difference_hash(example['image'])
    if found is not None and _LEAST_BITS <= found.sum() <= found.size - _LEAST_BITS:
      ids.append(example['id'])
      bits.append(found)
  return ids, np.array(bits, bool).reshape(len(bits), _SIDE**2)


def difference_hash(data: bytes) -> np.ndarray | None:
  """Returns bool[256], whether each cell of a grid is brighter than its left neighbour.

  None: the image cannot be decoded.
  """
  try:
    with formats.opened(data) as image:
      image.draft('RGB', (8 * _SIDE, 8 * _SIDE))  # A JPEG is decoded at a fraction of its size.
      rgb = transforms.as_rgb(image)
  except transforms.DecodeError:
    return None
  grey = rgb.convert('L').resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
  value_hw = np.asarray(grey, np.int16)
  return (value_hw[:, 1:] > value_hw[:, :-1]).ravel()


def nearest(bits_nb: np.ndarray, of_mb: np.ndarray) -> list[int]:
  """Returns the place of the nearest of `of_mb`, -1 where it is not near."""
  signs_nb, signs_mb = (np.where(bits, 1, -1).astype(np.float32) for bits in (bits_nb, of_mb))
  places: list[Any] = []
  for start in range(0, len(signs_nb), 512):
    # Of +1 and -1, a product is the bits that agree less those that differ.
    differing_nm = (signs_mb.shape[1] - signs_nb[start : start + 512] @ signs_mb.T) / 2
    place_n = differing_nm.argmin(axis=1)
    near_n = differing_nm[np.arange(len(place_n)), place_n] <= _MOST_BITS
    places += np.where(near_n, place_n, -1).tolist()
  return places
