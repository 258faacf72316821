"""What a data set is to the rest of the library: named splits with random access to undecoded
examples.
"""

import contextlib
import dataclasses
import functools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from molt_jax.errors import UserError

UNLABELLED = -1  # In place of a class index: the example's label is not known.


class Source(Protocol):
  """One split: random access, thread-safe, picklable.

  Nothing is decoded and no image file is read before it is asked for.

  Attributes:
    ids: names of the N examples, unique within the data set.
    labels: class indices, an int an example (`UNLABELLED` where there is none), or a sorted tuple
      of ints where the data set is multi-label.
    present: bool[N, 2], what the example naturally has; column 0 = image, column 1 = text. Never
      False in both.
    contents: optional; int64[N, 2], numbers that change with the image and with the text, as far as
      that is known without reading images (0 where absent). The fingerprint of the data reads them.
    most_images: optional; images of the example that has most of them. Default: one.
  """

  ids: Sequence[str]
  labels: Sequence[Any]
  present: np.ndarray

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the example of that index.

    {'id': str, 'image': bytes of the file or None, 'text': str or None, 'label': int or tuple of
    ints}. Of several images 'image' is the first, 'images' has all that can be read, and 'lost'
    says why the others cannot.
    """

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """Returns the same as `self[index]`; with `image=False` its image is None and is not read."""


def classes_of(label: int | tuple[int, ...]) -> tuple[int, ...]:
  """Returns the class indices in a label of either kind; none where it is unlabelled."""
  if isinstance(label, tuple):
    return label
  return () if label == UNLABELLED else (label,)


def images_of(example: Mapping[str, Any]) -> list[bytes]:
  """Returns the images of an example that `Source.read` returned."""
  if 'images' in example:
    return example['images']
  return [] if example['image'] is None else [example['image']]


def text_number(text: str | None) -> int:
  """Returns a number that changes with the text, for `Source.contents`; 0 where it is absent."""
  return 0 if text is None else 1 + zlib.crc32(text.encode('utf-8', 'surrogatepass'))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A classification data set.

  `splits` has 'train', 'validation' and 'test'; a label is an index into `class_names`. `aside`:
  (file, row, reason) of each row that is not used since it is odd.
  """

  name: str
  class_names: tuple[str, ...]
  multi_label: bool
  splits: dict[str, Source]
  aside: tuple[tuple[str, Any, str], ...] = ()


@contextlib.contextmanager
def reading_prepared(folder: str | os.PathLike) -> Iterator[None]:
  """Turns what goes wrong with the files of a prepared data set into UserError."""
  try:
    yield
  except (UserError, MemoryError):
    raise
  except Exception as error:  # TFDS, array_record and NumPy raise a dozen types on damaged files.
    raise UserError(
      f'config.dataset.data_dir: {folder} is damaged ({type(error).__name__}): '
      'remove that folder, and it is prepared anew'
    ) from error


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A split of a prepared TFDS builder.

  Its features are id, image, text and label (one class index).
  """

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
        kept = {key: example[key] for key in ('id', 'text', 'label')}
        captions.append({**kept, 'image': 1 + zlib.crc32(example['image'])})
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

  @functools.cached_property
  def contents(self) -> np.ndarray:
    numbers = [(x['image'], text_number(x['text'].decode())) for x in self._captions]
    return np.array(numbers, np.int64).reshape(-1, 2) * self.present

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    with reading_prepared(self.builder_dir):
      x = self._examples[index]
    return {
      'id': x['id'].decode(),
      'image': bytes(x['image']) if image else None,
      'text': x['text'].decode() or None,
      'label': int(x['label']),
    }


# ---- Labels by name ------------------------------------------------------------------------------

_SHOWN = 5  # Labels, and examples of each, that an error names.


@dataclasses.dataclass(frozen=True)
class Wrapped:
  """A source that stands on another; a `Source` for those that say how a row is read.

  Attributes:
    source: the other.
  """

  source: Source

  @property
  def ids(self) -> Sequence[str]:
    return self.source.ids

  @property
  def present(self) -> np.ndarray:
    return self.source.present

  @property
  def most_images(self) -> int:
    return getattr(self.source, 'most_images', 1)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index, image=True)


@dataclasses.dataclass(frozen=True)
class Relabelled(Wrapped):
  """A source with other labels."""

  labels: Sequence[Any]

  @property
  def contents(self) -> np.ndarray | None:
    return getattr(self.source, 'contents', None)

  def read(self, index: int, *, image: bool) -> dict[str, Any]:
    """See `Source.read`."""
    return {**self.source.read(index, image=image), 'label': self.labels[index]}


def relabel(data: Dataset, class_names: Sequence[str], *, where: str) -> Dataset:
  """Maps the labels of a data set by name onto the classes that a model knows.

  Args:
    data: its labels are indices into its own class names.
    class_names: what the labels of the result index.
    where: names the data in an error.

  Raises:
    UserError: an example has a label that is not among the class names.
  """
  if tuple(data.class_names) == tuple(class_names):
    return data
  position = {name: k for k, name in enumerate(class_names)}
  index_k = [position.get(name) for name in data.class_names]
  splits = {}
  for split, source in data.splits.items():
    _check_known(source, split, data.class_names, index_k, class_names, where)
    splits[split] = Relabelled(source, [_mapped(label, index_k) for label in source.labels])
  return dataclasses.replace(data, class_names=tuple(class_names), splits=splits)


def _mapped(label: int | tuple[int, ...], index_k: Sequence[int | None]) -> int | tuple[int, ...]:
  if isinstance(label, tuple):
    return tuple(sorted(index_k[k] for k in label))
  return UNLABELLED if label == UNLABELLED else index_k[label]


def _check_known(source, split, own_names, index_k, class_names, where) -> None:
  unknown: dict[str, list[str]] = {}
  for example_id, label in zip(source.ids, source.labels, strict=True):
    for k in classes_of(label):
      if index_k[k] is None:
        unknown.setdefault(own_names[k], []).append(example_id)
  if unknown:
    shown = [f'{name!r} ({some(ids)})' for name, ids in unknown.items()]
    raise UserError(
      f'{where}: the {split} split has labels that this run does not know: {some(shown)}; it '
      f'knows {len(class_names)} classes: {some(list(map(repr, class_names)))}; correct the '
      'labels, or train a run on these data'
    )


def some(words: Sequence[str]) -> str:
  """Joins the first few words and says how many more there are."""
  more = f' and {len(words) - _SHOWN} more' if len(words) > _SHOWN else ''
  return ', '.join(words[:_SHOWN]) + more
