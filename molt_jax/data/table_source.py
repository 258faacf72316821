"""A split of a table."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from molt_jax.data import pictures
from molt_jax.data.sources import text_number
from molt_jax.data.tables.rows import Row


@dataclasses.dataclass(frozen=True)
class TableSource:
  """A split of a table; a `Source`. Images are opened when they are asked for."""

  rows: tuple[Row, ...]
  labels: tuple[Any, ...]

  @functools.cached_property
  def ids(self) -> list[str]:
    return [row.id for row in self.rows]

  @functools.cached_property
  def present(self) -> np.ndarray:
    return np.array(
      [(row.image is not None, row.text is not None) for row in self.rows], bool
    ).reshape(-1, 2)

  @functools.cached_property
  def contents(self) -> np.ndarray:
    """See `Source`; of an image file the size, which takes no reading."""
    found = []
    numbers: dict[Any, int] = {}
    for row in self.rows:
      for image in pictures.each(row.image):
        if image not in numbers:
          numbers[image] = pictures.number(image)
      of_image = functools.reduce(_mixed, (numbers[image] for image in pictures.each(row.image)), 0)
      found.append((of_image, text_number(row.text)))
    return np.array(found, np.int64).reshape(-1, 2)

  @functools.cached_property
  def most_images(self) -> int:
    """See `Source`."""
    return max((len(pictures.each(row.image)) for row in self.rows), default=1) or 1

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """See `Source.read`."""
    row = self.rows[index]
    example = {'id': row.id, 'image': None, 'text': row.text, 'label': self.labels[index]}
    images = pictures.each(row.image) if image else ()
    if len(images) == 1:
      example['image'] = pictures.read(images[0])
    elif images:
      example |= _read_several(images)
    return example


def _mixed(number: int, other: int) -> int:
  """Returns a number that changes with either, and with their order; the other one if one is 0."""
  return (31 * number + other) % (1 << 62)


def _read_several(images: Sequence[pictures.Image]) -> dict[str, Any]:
  """Returns what `Source.read` has of several images; those that cannot be read are left out.

  Raises:
    OSError: none can be.
  """
  found, lost = [], []
  for place, image in enumerate(images):
    try:
      found.append(pictures.read(image))
    except OSError as error:
      lost.append(f'image {place + 1}: {error.strerror or error}')
      if len(lost) == len(images):
        raise
  return {'image': found[0], 'images': found, 'lost': lost}
