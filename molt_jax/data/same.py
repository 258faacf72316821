"""Which rows are the same thing: equal texts, equal images, groups of rows that share either."""

import collections
import hashlib
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence

from molt_jax.data import addresses, pictures

# A text or image of more rows than this share of them is a phrase or a placeholder, and no thing.
MOST_SHARED = 0.05
MOST_JOINED = 0.1  # Of the rows, in one group.


def text_key(text: str) -> str:
  """Returns what two texts share that differ only in case, Unicode form, blanks and punctuation."""
  folded = unicodedata.normalize('NFKC', text).casefold()
  words = ''.join(character if character.isalnum() else ' ' for character in folded).split()
  return ' '.join(words) or ' '.join(folded.split())


def image_keys(images: Sequence[pictures.Images]) -> list[tuple[Hashable, ...]]:
  """Returns for the images of each row what is equal for images of one content.

  Only images whose sizes and beginnings are equal are read. An address is known by itself.
  """
  distinct = dict.fromkeys(image for of_row in images for image in pictures.each(of_row))
  sizes = {}
  for image in distinct:
    if not isinstance(image, addresses.Address):
      sizes[image] = pictures.number(image)
  alike = _repeated(sizes)
  heads = {image: (sizes[image], _head(image)) for image in alike}
  keys: dict[pictures.Image, Hashable] = {image: image for image in distinct}
  for image in _repeated(heads):
    keys[image] = _digest(image)
  return [tuple(keys[image] for image in pictures.each(of_row)) for of_row in images]


def _repeated(values: Mapping[pictures.Image, Hashable]) -> list[pictures.Image]:
  """Returns the images whose value another one has too."""
  count = collections.Counter(values.values())
  return [image for image, value in values.items() if count[value] > 1]


_HEAD_BYTES = 4096  # Which two image files of one size rarely share.


def _head(image: pictures.Image) -> bytes | None:
  if not isinstance(image, str):
    return None
  try:
    with open(image, 'rb') as file:
      return hashlib.blake2b(file.read(_HEAD_BYTES), digest_size=16).digest()
  except OSError:
    return None


def _digest(image: pictures.Image) -> Hashable:
  try:
    return hashlib.blake2b(pictures.read(image), digest_size=16).digest()
  except OSError:  # It cannot be read: it is like no other.
    return image


def groups(
  keys: Mapping[str, Sequence[tuple[Hashable, ...]]],
) -> tuple[list[int], list[str]]:
  """Joins rows that share a key of some kind.

  Keys that more than MOST_SHARED of the rows share, and more than two, join nothing. A kind joins
  nothing where it would make one group of more than MOST_JOINED of the rows, and more than five:
  questions that are asked of many images, say.

  Args:
    keys: kind (text, image) -> the keys of each row.

  Returns:
    (the number of each row's group, the kinds that joined rows).
  """
  for kinds in _choices(list(keys)):
    numbers = _joined([keys[kind] for kind in kinds])
    largest = max(collections.Counter(numbers).values(), default=0)
    if largest <= max(5, MOST_JOINED * len(numbers)):
      return numbers, kinds
  return list(range(max((len(of_kind) for of_kind in keys.values()), default=0))), []


def _choices(kinds: Sequence[str]) -> list[list[str]]:
  return [list(kinds), *([kind] for kind in reversed(kinds))]


def _joined(keys: Sequence[Sequence[tuple[Hashable, ...]]]) -> list[int]:
  count = len(keys[0])
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


def _shared(keys: Iterable[tuple[Hashable, ...]]) -> list[list[int]]:
  rows = collections.defaultdict(list)
  for row, of_row in enumerate(keys):
    for key in of_row:
      rows[key].append(row)
  return [found for found in rows.values() if len(found) > 1]
