"""What a data set is to the rest of the library: named splits with random access to undecoded examples."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from molt_jax.config import UserError

UNLABELLED = -1  # In place of a class index: the example's label is not known.


class Source(Protocol):
  """One split. Random access, thread-safe, picklable; nothing is decoded and no image file is read before it is asked for.

  Attributes:
    ids: names of the N examples, unique within the data set.
    labels: class indices, an int an example (`UNLABELLED` where there is none), or a sorted tuple of ints where the data set is multi-label.
    present: bool[N, 2], what the example naturally has; column 0 = image, column 1 = text. Never False in both.
  """

  ids: Sequence[str]
  labels: Sequence[Any]
  present: np.ndarray

  def __len__(self) -> int:
    ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'id': str, 'image': bytes of the file or None, 'text': str or None, 'label': int or tuple of ints}."""

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """Returns the same as `self[index]`; with `image=False` its image is None and is not read."""


def classes_of(label: int | tuple[int, ...]) -> tuple[int, ...]:
  """Returns the class indices in a label of either kind; none where it is unlabelled."""
  if isinstance(label, tuple):
    return label
  return () if label == UNLABELLED else (label,)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A classification data set: `splits` has 'train', 'validation' and 'test'; a label is an index into `class_names`."""

  name: str
  class_names: tuple[str, ...]
  multi_label: bool
  splits: dict[str, Source]


@contextlib.contextmanager
def reading_prepared(folder: str | os.PathLike) -> Iterator[None]:
  """Turns what goes wrong with the files of a prepared data set into UserError."""
  try:
    yield
  except (UserError, MemoryError):
    raise
  except Exception as error:  # TFDS, array_record and NumPy raise a dozen types on damaged files.
    raise UserError(f'config.dataset.data_dir: {folder} is damaged ({type(error).__name__}): '
                    'remove that folder, and it is prepared anew') from error


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A split of a prepared TFDS builder whose features are id, image, text and label (one class index)."""

  builder_dir: str
  split: str

  def __reduce__(self):
    return TfdsSource, (self.builder_dir, self.split)

  @functools.cached_property
  def _examples(self) -> Sequence[dict[str, Any]]:
    import tensorflow_datasets as tfds
    with reading_prepared(self.builder_dir):
      builder = tfds.builder_from_directory(self.builder_dir)
      return builder.as_data_source(self.split, decoders={'image': tfds.decode.SkipDecoding()})

  @functools.cached_property
  def _captions(self) -> list[dict[str, Any]]:
    captions = []
    with reading_prepared(self.builder_dir):
      for position in range(len(self._examples)):
        example = self._examples[position]
        captions.append({key: example[key] for key in ('id', 'text', 'label')})
    return captions

  @functools.cached_property
  def ids(self) -> list[str]:
    return [x['id'].decode() for x in self._captions]

  @functools.cached_property
  def labels(self) -> list[int]:
    return [int(x['label']) for x in self._captions]

  @functools.cached_property
  def present(self) -> np.ndarray:
    return np.array([(True, bool(x['text'].strip())) for x in self._captions], bool).reshape(-1, 2)

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    with reading_prepared(self.builder_dir):
      x = self._examples[index]
    return {'id': x['id'].decode(), 'image': bytes(x['image']) if image else None, 'text': x['text'].decode() or None, 'label': int(x['label'])}
