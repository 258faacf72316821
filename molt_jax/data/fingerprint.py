"""What tells the data of a run from others: a few hashes a split, small enough for a checkpoint.

Hashed are ids, labels (by the names of their classes), which images and texts are there, and what
is known of their content without reading images (`Source.contents`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data.sources import Source, classes_of

# Of a fingerprint: what each part is called where it changed.
_PARTS = {'ids': 'ids', 'labels': 'labels', 'present': 'gaps', 'images': 'images', 'texts': 'texts'}


def of(source: Source, class_names: Sequence[str]) -> dict[str, Any]:
  """Returns what tells this split from others, in a few words of JSON.

  Labels count by the names of their classes, so another order of the classes changes nothing.

  Returns:
    'examples': how many; 'ids', 'labels', 'present', 'images', 'texts': a hash of each, in the
    order of the examples (null where it is not known); 'unordered': a hash of all but the ids,
    whatever the order; 'digest': a hash of it all.
  """
  label_n = _label_numbers(source.labels, class_names)
  present_n = np.asarray(source.present, np.int64) @ np.array([2, 1])
  contents = getattr(source, 'contents', None)
  image_n, text_n = (None, None) if contents is None else np.asarray(contents, np.int64).T
  columns = {'labels': label_n, 'present': present_n, 'images': image_n, 'texts': text_n}
  known = [column.view(np.uint64) for column in columns.values() if column is not None]
  rows_nc = np.stack(known, axis=1)
  found = {
    'examples': len(source),
    'ids': _hash(json.dumps(list(source.ids)).encode()),
    **{name: column if column is None else _hash(column) for name, column in columns.items()},
    'unordered': _hash(rows_nc[np.lexsort(rows_nc.T)]),
  }
  return {**found, 'digest': _hash(json.dumps(found, sort_keys=True).encode())}


def _label_numbers(labels: Iterable[Any], class_names: Sequence[str]) -> np.ndarray:
  """Returns a number for each label, or set of labels, that depends on names alone; 0 for none."""
  names = [name.encode('utf-8', 'surrogatepass') for name in class_names]
  number_k = [int.from_bytes(_digest(name)) for name in names]
  numbers = [sum(number_k[k] for k in classes_of(label)) % 2**63 for label in labels]
  return np.array(numbers, np.int64)


def _digest(content: bytes) -> bytes:
  return hashlib.blake2b(content, digest_size=8).digest()


def _hash(content: bytes | np.ndarray) -> str:
  content = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
  return _digest(content).hex()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """Returns in a few words how a split differs from what it was; '' where it does not.

  What one of the two does not know is not compared.
  """
  if old.get('examples') != new['examples']:
    return f'{old.get("examples")} -> {new["examples"]} examples'
  different = [
    part for part in _PARTS if None not in (old.get(part), new[part]) and old[part] != new[part]
  ]
  if different and different != ['ids'] and old.get('unordered') == new['unordered']:
    return 'the same examples in another order'
  return f'other {", ".join(_PARTS[part] for part in different)}' if different else ''
