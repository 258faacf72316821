"""The missing-modality protocol: which examples lack their image or their text for good.

Column 0 of a `present` table is the image, column 1 the text, as everywhere in the library.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

_COLUMN = {'image': 0, 'text': 1}


def _digest(example_id: str, key: bytes) -> bytes:
  return hashlib.blake2b(example_id.encode('utf-8', 'surrogatepass'), digest_size=16, key=key).digest()


def hash_order(ids: Sequence[str], *, seed: int, name: str) -> list[int]:
  """Returns the positions of `ids` in the order of a keyed hash of each id, which their own order does not influence.

  Args:
    ids: unique strings.
    seed: root of the stream.
    name: of the stream; two names give unrelated orders.

  Raises:
    ValueError: an id occurs twice.
  """
  if len(set(ids)) < len(ids):
    raise ValueError('example ids must be unique')
  key = hashlib.blake2b(f'{seed}/{name}'.encode(), digest_size=32).digest()
  digests = [_digest(x, key) for x in ids]
  return sorted(range(len(ids)), key=digests.__getitem__)


def present_table(
    ids: Sequence[str], *, rate: float, kind: str, seed: int, split: str, natural: np.ndarray | None = None) -> np.ndarray:
  """Draws the rows that lack a modality, by the field's standard protocol (rate eta; text, image or both).

  A row is hit by the rank of a keyed hash of its id, so the table is a pure function of (seed, split, set of ids): the order of the rows, the
  batch size, the number of workers and a resume do not matter, and a row hit at one rate is hit in the same way at every higher rate.

  The rate counts the complete rows: round(rate * number of complete rows) of them lose one modality. A row that is incomplete by nature is
  neither counted nor touched, so that no row ever loses its only modality.

  Args:
    ids: unique names of the N examples.
    rate: eta, the share of the complete rows that lose a modality, in [0, 1].
    kind: 'text' or 'image', what they lose; 'both': of those rows one half loses its text, the other its image, never both (an odd row loses text).
    seed: root of the draw.
    split: name of the split; each has its own draw.
    natural: bool[N, 2], what the rows have by nature (`Source.present`); None: all are complete.

  Returns:
    bool[N, 2]
  """
  present_nm = np.ones((len(ids), 2), bool) if natural is None else np.array(natural, bool)
  complete = present_nm.all(axis=1)
  ranked = [n for n in hash_order(ids, seed=seed, name=f'missing/{split}') if complete[n]]
  affected = ranked[:int(np.floor(rate * len(ranked) + 0.5))]
  if kind == 'both':
    present_nm[affected[0::2], _COLUMN['text']] = False
    present_nm[affected[1::2], _COLUMN['image']] = False
  else:
    present_nm[affected, _COLUMN[kind]] = False
  return present_nm
