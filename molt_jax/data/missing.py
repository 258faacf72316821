"""Which examples lack their image or their text for good: the missing-modality protocol, and
sources with a part of what they have.

Column 0 of a `present` table is the image, column 1 the text, as everywhere in the library.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from molt_jax.data.modalities import COLUMN
from molt_jax.data.sources import Source
from molt_jax.errors import UserError


def _digest(example_id: str, key: bytes) -> bytes:
  return hashlib.blake2b(
    example_id.encode('utf-8', 'surrogatepass'), digest_size=16, key=key
  ).digest()


def hash_order(ids: Sequence[str], *, seed: int, name: str) -> list[int]:
  """Returns the positions of `ids` in the order of a keyed hash of each id.

  Their own order does not influence it.

  Args:
    ids: unique strings.
    seed: root of the stream.
    name: of the stream; two names give unrelated orders.

  Raises:
    ValueError: an id occurs twice.
  """
  if len(set(ids)) < len(ids):
    raise ValueError('example ids must be unique')
  stream = f'{seed}/{name}'.encode('utf-8', 'surrogatepass')
  key = hashlib.blake2b(stream, digest_size=32).digest()
  digests = [_digest(x, key) for x in ids]
  return sorted(range(len(ids)), key=digests.__getitem__)


def present_table(
  ids: Sequence[str],
  *,
  rate: float,
  kind: str,
  seed: int,
  split: str,
  present: np.ndarray | None = None,
) -> np.ndarray:
  """Draws the rows that lack a modality, by the field's standard protocol.

  Rate eta; text, image or both.

  A row is hit by the rank of a keyed hash of its id, so the table is a pure function of (seed,
  split, set of ids): the order of the rows, the batch size, the number of workers and a resume do
  not matter, and a row hit at one rate is hit in the same way at every higher rate.

  The rate counts the complete rows: round(rate * number of complete rows) of them lose one
  modality. A row that is incomplete by nature is neither counted nor touched, so that no row ever
  loses its only modality.

  Args:
    ids: unique names of the N examples.
    rate: eta, the share of the complete rows that lose a modality, in [0, 1].
    kind: 'text' or 'image', what they lose; 'both': of those rows one half loses its text, the
      other its image, never both (an odd row loses text).
    seed: root of the draw.
    split: name of the split; each has its own draw.
    present: bool[N, 2], what the rows have by nature (`Source.present`); None: all are complete.

  Returns:
    bool[N, 2]
  """
  present_nm = np.ones((len(ids), 2), bool) if present is None else np.array(present, bool)
  complete = present_nm.all(axis=1)
  ranked = [n for n in hash_order(ids, seed=seed, name=f'missing/{split}') if complete[n]]
  affected = ranked[: int(np.floor(rate * len(ranked) + 0.5))]
  if kind == 'both':
    present_nm[affected[0::2], COLUMN['text']] = False
    present_nm[affected[1::2], COLUMN['image']] = False
  else:
    present_nm[affected, COLUMN[kind]] = False
  return present_nm


@dataclasses.dataclass(frozen=True)
class Part:
  """Some rows of a source, perhaps without one of their modalities; a `Source`.

  Attributes:
    source: the whole.
    rows: positions in it.
    keep: the modalities that are left (columns image, text).
  """

  source: Source
  rows: Sequence[int]
  keep: tuple[bool, bool] = (True, True)

  @functools.cached_property
  def ids(self) -> list[str]:
    return [self.source.ids[row] for row in self.rows]

  @functools.cached_property
  def labels(self) -> list[Any]:
    return [self.source.labels[row] for row in self.rows]

  @functools.cached_property
  def present(self) -> np.ndarray:
    return self.source.present[np.asarray(self.rows, int)] & np.array(self.keep)

  @functools.cached_property
  def contents(self) -> np.ndarray | None:
    contents = getattr(self.source, 'contents', None)
    return None if contents is None else contents[np.asarray(self.rows, int)] * np.array(self.keep)

  @property
  def most_images(self) -> int:
    return getattr(self.source, 'most_images', 1) if self.keep[0] else 1

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """See `Source.read`."""
    example = self.source.read(self.rows[index], image=image and self.keep[0])
    return example if self.keep[1] else {**example, 'text': None}


def only(source: Source, modality: str, *, split: str) -> Part:
  """Returns the rows that have `modality`, with nothing else.

  Raises:
    UserError: no row of the split has it.
  """
  column = COLUMN[modality]
  rows = np.flatnonzero(source.present[:, column])
  if not len(rows):
    raise UserError(
      f'config.dataset.modalities: {modality!r}, but no example of the {split} split has one; '
      'give another value'
    )
  return Part(source, tuple(rows.tolist()), keep=(column == 0, column == 1))
