"""Which rows are the same thing: equal texts, equal images, groups of rows that share either."""

import collections
import hashlib
import unicodedata
from collections.abc import Hashable, Iterable, Sequence

from molt_jax.data import pictures

# A text or image of more rows than this share of them is a phrase or a placeholder, and no thing.
MOST_SHARED = 0.05


def text_key(text: str) -> str:
  """Returns what two texts share that differ only in case, Unicode form, blanks and punctuation."""
  folded = unicodedata.normalize('NFKC', text).casefold()
  words = ''.join(character if character.isalnum() else ' ' for character in folded).split()
  return ' '.join(words) or ' '.join(folded.split())


def image_keys(images: Sequence[pictures.Image | None]) -> list[Hashable]:
  """Returns what is equal for images of one content; None where there is no image.

  Only images whose sizes are equal are read. An address is known by itself.
  """
  distinct = dict.fromkeys(image for image in images if image is not None)
  sizes = {}
  for image in distinct:
    if not isinstance(image, pictures.Address):
      sizes[image] = pictures.number(image)
  count = collections.Counter(sizes.values())
  keys: dict[pictures.Image, Hashable] = {}
  for image in distinct:
    keys[image] = _digest(image) if count[sizes.get(image)] > 1 else image
  return [None if image is None else keys[image] for image in images]


def _digest(image: pictures.Image) -> Hashable:
  try:
    return hashlib.blake2b(pictures.read(image), digest_size=16).digest()
  except OSError:  # It cannot be read: it is like no other.
    return image


def groups(keys: Sequence[Sequence[Hashable]]) -> list[int]:
  """Joins rows that share a key; returns the number of each row's group.

  Keys that more than MOST_SHARED of the rows share, and more than two, join nothing.

  Args:
    keys: of each kind (text, image), the key of each row; None: it has none.
  """
  count = len(keys[0]) if keys else 0
  parent = list(range(count))

  def root(row: int) -> int:
    while parent[row] != row:
      parent[row] = parent[parent[row]]
      row = parent[row]
    return row

  for of_kind in keys:
    for rows in _shared(of_kind):
      if len(rows) <= max(2, MOST_SHARED * count):
        for row in rows[1:]:
          parent[root(row)] = root(rows[0])
  return [root(row) for row in range(count)]


def _shared(keys: Iterable[Hashable]) -> list[list[int]]:
  rows = collections.defaultdict(list)
  for row, key in enumerate(keys):
    if key is not None:
      rows[key].append(row)
  return [found for found in rows.values() if len(found) > 1]
