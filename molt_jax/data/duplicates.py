"""Examples that are the same thing, across the splits of a data set and within each."""

import collections
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from molt_jax.data import checks, near_images, same
from molt_jax.data.sources import Source
from molt_jax.runtime import console

ORDER = ('train', 'validation', 'test')
Keys = tuple[Hashable, ...]  # Of an example: what it shares with those that are the same.


class Duplicate(NamedTuple):
  """An example that another one before it has too.

  Attributes:
    kind: 'example': image and text, or all that there is; across splits also 'image', 'text',
      and 'similar image': nearly the same picture (`near_images`).
    split, row: of the example.
    other_split, other_row: of the first like it.
  """

  kind: str
  split: str
  row: int
  other_split: str
  other_row: int


def find(splits: Mapping[str, Source], *, similar: bool = True) -> list[Duplicate]:
  """Returns the duplicates of all splits.

  Texts are the same but for case, blanks and punctuation, images byte for byte. A text or an image
  that more than `same.MOST_SHARED` of a split's rows share is a phrase or a placeholder and names
  no duplicate by itself.

  Args:
    splits: name -> examples; names are those of ORDER.
    similar: whether pictures are decoded to find those that are nearly the same.
  """
  names = [name for name in ORDER if name in splits]
  images = checks.image_keys({name: splits[name] for name in names})
  texts = {name: _text_keys(splits[name]) for name in names}
  both = {name: _both(images[name], texts[name]) for name in names}
  found = list(_repeated('example', both, names))
  named = {(x.split, x.row) for x in found}
  for kind, keys in (('image', images), ('text', texts)):
    new = [x for x in _repeated(kind, keys, names) if x.split != x.other_split]
    found += [x for x in new if (x.split, x.row) not in named]
    named |= {(x.split, x.row) for x in new}
  if similar:
    found += [x for x in _similar(splits, names) if (x.split, x.row) not in named]
  return found


def _text_keys(source: Source) -> list[Keys]:
  found: list[Keys] = []
  for n in range(len(source)):
    text = source.read(n, image=False)['text']
    found.append(() if text is None else (same.text_key(text),))
  return found


def _both(images: Sequence[Keys], texts: Sequence[Keys]) -> list[Keys]:
  pairs = zip(images, texts, strict=True)
  return [() if pair == ((), ()) else (pair,) for pair in pairs]


def _repeated(
  kind: str, keys: Mapping[str, Sequence[Keys]], names: Sequence[str]
) -> Iterator[Duplicate]:
  first: dict[Hashable, tuple[str, int]] = {}
  shared = {name: _phrases(keys[name]) if kind != 'example' else set() for name in names}
  for name in names:
    for row, of_row in enumerate(keys[name]):
      own = [key for key in of_row if not any(key in phrases for phrases in shared.values())]
      known = [first[key] for key in own if key in first]
      if known:
        yield Duplicate(kind, name, row, *known[0])
      for key in own:
        first.setdefault(key, (name, row))


def _phrases(keys: Sequence[Keys]) -> set[Hashable]:
  most = max(2, same.MOST_SHARED * len(keys))
  counts = collections.Counter(key for of_row in keys for key in set(of_row))
  return {key for key, count in counts.items() if count > most}


def _similar(splits: Mapping[str, Source], names: Sequence[str]) -> Iterator[Duplicate]:
  """Pictures that are nearly those of a split before."""
  total = sum(len(splits[name]) for name in names)
  with console.progress('comparing images', total, 'images') as bar:
    found = {name: near_images.hashes(splits[name], len(splits[name]), bar) for name in names}
  places = {name: {row_id: n for n, row_id in enumerate(splits[name].ids)} for name in names}
  for k, name in enumerate(names):
    ids, bits_nb = found[name]
    for other in names[:k]:
      other_ids, other_nb = found[other]
      if not len(bits_nb) or not len(other_nb):
        continue
      for row_id, near in zip(ids, near_images.nearest(bits_nb, other_nb), strict=True):
        if near >= 0:
          pair = other, places[other][other_ids[near]]
          yield Duplicate('similar image', name, places[name][row_id], *pair)
