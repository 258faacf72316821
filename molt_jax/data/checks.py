"""What in a data set may not be what is meant: looked at before anything is trained.

Nothing is changed: each finding has a count and the first rows. What two rows share is a text but
for case, blanks and punctuation (`same.text_key`), or an image byte for byte; pictures that differ
by their size or compression alone are found in a sample (`nearly_same_images`).
"""

import collections
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from molt_jax.data import findings, missing, near_images, pictures, same
from molt_jax.data.cell_values import shown
from molt_jax.data.sources import Dataset, Relabelled, Source, classes_of
from molt_jax.data.summary import names_a_class
from molt_jax.data.table_source import TableSource
from molt_jax.runtime import console

FEW_ROWS = 5  # A class of fewer rows in train can hardly be learned.
PLACEHOLDER_ROWS = 5  # An image of so many rows, or of several classes, stands for none.


class Finding(NamedTuple):
  """One kind of thing that may not be what is meant.

  Attributes:
    check: its name in describe.json.
    count: how many there are.
    examples: the first of them: ids of examples, or names of classes.
    message: a line for the user.
  """

  check: str
  count: int
  examples: tuple[str, ...]
  message: str


class _Split(NamedTuple):
  """One split, as the checks read it: of each example its name, text, classes and keys, of which
  several images have several.
  """

  ids: Sequence[str]
  texts: Sequence[str | None]
  classes: Sequence[tuple[int, ...]]
  text_keys: Sequence[str | None]
  image_keys: Sequence[tuple[Hashable, ...]]


def look(dataset: Dataset, *, sample: int) -> list[Finding]:
  """Looks at a data set.

  Args:
    dataset: all of its splits.
    sample: images per split that are decoded, to find those that are nearly the same.
  """
  keys = image_keys(dataset.splits)
  splits = {name: _read(source, keys[name]) for name, source in dataset.splits.items()}
  found = []
  for check in _CHECKS:
    found += check(splits, dataset)
  known = {key for keys in splits['train'].image_keys for key in keys}
  equal = {
    row
    for name in ('validation', 'test')
    for row, keys in zip(splits[name].ids, splits[name].image_keys, strict=True)
    if known.intersection(keys)
  }
  return found + nearly_same_images(dataset, sample, leave_out=equal)


def _read(source: Source, image_keys: Sequence[tuple[Hashable, ...]]) -> _Split:
  texts = [source.read(n, image=False)['text'] for n in range(len(source))]
  return _Split(
    list(source.ids),
    texts,
    [classes_of(label) for label in source.labels],
    [None if text is None else same.text_key(text) for text in texts],
    image_keys,
  )


def image_keys(splits: Mapping[str, Source]) -> dict[str, list[tuple[Hashable, ...]]]:
  """Returns what is equal for equal images, of each image of an example; () where there is none, or
  nothing is known of it.
  """
  images = {split: _images(source) for split, source in splits.items()}
  known = [of_row for of_split in images.values() for of_row in of_split or ()]
  keys = iter(same.image_keys(known))  # Of all splits at once: images of one size are compared.
  found = {}
  for split, source in splits.items():
    if images[split] is not None:
      found[split] = [next(keys) for _ in images[split]]
      continue
    contents = getattr(source, 'contents', None)  # Of published sets, with a hash of the image.
    numbers = [0] * len(source) if contents is None else contents[:, 0].tolist()
    found[split] = [(number,) if number else () for number in numbers]
  return found


def _images(source: Source) -> list[pictures.Images] | None:
  """Returns the images of each row of a table; None: it is none."""
  if isinstance(source, Relabelled):
    return _images(source.source)
  if isinstance(source, missing.Part):
    images = _images(source.source)
    return images and [images[row] if source.keep[0] else None for row in source.rows]
  if isinstance(source, TableSource):
    return [row.image for row in source.rows]
  return None


def _finding(check: str, examples: Sequence[str], message: str) -> Iterator[Finding]:
  """Yields a finding unless there is nothing; `{}` in the message is its first examples."""
  if examples:
    first = tuple(examples[:5])
    yield Finding(check, len(examples), first, message.format(findings.some(examples)))


# ---- The same in two splits ----------------------------------------------------------------------


def _across_splits(splits: Mapping[str, _Split], dataset: Dataset) -> Iterator[Finding]:
  """Rows of validation or test that a split before it has too."""
  del dataset
  kinds = (
    ('same_example', 'are in {} too, image and text', _both_keys),
    ('same_text', 'have a text of {}', _text_keys),
    ('same_image', 'have an image of {}', lambda split: split.image_keys),
  )
  for name, others in (('validation', ['train']), ('test', ['train', 'validation'])):
    split, named = splits[name], set()
    for check, words, keys_of in kinds:
      known = set().union(*(_things(keys_of(splits[other])) for other in others))
      twice = [
        row
        for row, keys in zip(split.ids, keys_of(split), strict=True)
        if known.intersection(keys) and row not in named
      ]
      named |= set(twice)
      count = f'{len(twice):,} of {len(split.ids):,} rows of {name}'
      message = f'{count} {words.format(" or ".join(others))}: {{}}'
      yield from _finding(f'{check}_in_{name}', twice, message)


def _text_keys(split: _Split) -> list[tuple[Hashable, ...]]:
  return [() if text is None else (text,) for text in split.text_keys]


def _both_keys(split: _Split) -> list[tuple[Hashable, ...]]:
  pairs = zip(split.text_keys, split.image_keys, strict=True)
  return [() if text is None or not images else ((text, images),) for text, images in pairs]


def _things(keys: Sequence[tuple[Hashable, ...]]) -> set[Hashable]:
  """Returns the keys that stand for one thing: no phrase, no placeholder (`same.MOST_SHARED`)."""
  most = max(2, same.MOST_SHARED * len(keys))
  counts = collections.Counter(key for of_row in keys for key in set(of_row))
  return {key for key, count in counts.items() if count <= most}


# ---- Labels --------------------------------------------------------------------------------------


def _contradictions(splits: Mapping[str, _Split], dataset: Dataset) -> Iterator[Finding]:
  """Rows of train that are the same in image and text, and not in their label."""
  del dataset
  train = splits['train']
  keys = zip(train.text_keys, train.image_keys, strict=True)
  rows = collections.defaultdict(list)
  for row, key in enumerate(keys):
    if key != (None, ()) and train.classes[row]:
      rows[key].append(row)
  odd = []
  for alike in rows.values():
    if len({train.classes[row] for row in alike}) > 1:
      odd += [train.ids[row] for row in alike]
  message = (
    f'{len(odd):,} rows of train have the image and text of another, and another label: {{}}'
  )
  yield from _finding('same_example_other_label', odd, message)


def _small_classes(splits: Mapping[str, _Split], dataset: Dataset) -> Iterator[Finding]:
  """Classes of which train has few rows, or the others none."""
  counts = {
    name: collections.Counter(k for row in split.classes for k in row)
    for name, split in splits.items()
  }
  few = [
    f'{shown(name)} ({counts["train"][k]})'
    for k, name in enumerate(dataset.class_names)
    if counts['train'][k] < FEW_ROWS
  ]
  message = f'classes of fewer than {FEW_ROWS} rows in train ({len(few)}): {{}}'
  yield from _finding('class_of_few_rows', few, message)
  none = [
    shown(name) for k, name in enumerate(dataset.class_names) if not counts.get('test', {0: 1})[k]
  ]
  message = f'classes without a row in test ({len(none)}): {{}}'
  yield from _finding('class_not_in_test', none, message)


def _named_in_text(splits: Mapping[str, _Split], dataset: Dataset) -> Iterator[Finding]:
  """Rows of train whose text has the name of their class."""
  train = splits['train']
  named = []
  for row, text in enumerate(train.texts):
    names = [dataset.class_names[k] for k in train.classes[row]]
    if text is not None and names_a_class(text, names):
      named.append(train.ids[row])
  with_text = sum(text is not None for text in train.texts)
  share = 100 * len(named) / max(with_text, 1)
  count = f'{len(named):,} of {with_text:,} texts of train ({share:.0f} %)'
  message = f'{count} have the name of their class in them: {{}}'
  yield from _finding('label_in_text', named, message)


def _placeholders(splits: Mapping[str, _Split], dataset: Dataset) -> Iterator[Finding]:
  """Images of many rows of train, or of rows of several classes."""
  del dataset
  train = splits['train']
  rows = collections.defaultdict(list)
  for row, keys in enumerate(train.image_keys):
    for key in set(keys):
      rows[key].append(row)
  repeated = []
  for alike in rows.values():
    classes = {train.classes[row] for row in alike if train.classes[row]}
    if len(alike) >= PLACEHOLDER_ROWS or len(classes) > 1:
      repeated += [train.ids[row] for row in alike]
  repeated = list(dict.fromkeys(repeated))
  message = (
    f'{len(repeated):,} rows of train share their image with {PLACEHOLDER_ROWS - 1} others or with '
    'rows of another class (does it stand for "no picture"?): {}'
  )
  yield from _finding('repeated_image', repeated, message)


_CHECKS: tuple[Callable[[Mapping[str, _Split], Dataset], Iterator[Finding]], ...] = (
  _across_splits,
  _contradictions,
  _small_classes,
  _named_in_text,
  _placeholders,
)


# ---- Pictures that are nearly the same -----------------------------------------------------------


def nearly_same_images(
  dataset: Dataset, sample: int, leave_out: Collection[str] = ()
) -> list[Finding]:
  """Finds images of validation and test that are images of train, resized or compressed anew; see
  `near_images`.

  Args:
    dataset: all of its splits.
    sample: images per split that are looked at, evenly spaced.
    leave_out: ids of examples that are named already.
  """
  total = sum(min(sample, len(source)) for source in dataset.splits.values())
  with console.progress('comparing images', total, 'images') as bar:
    found_in = {
      name: near_images.hashes(source, sample, bar) for name, source in dataset.splits.items()
    }
  found = []
  train_ids, train_nb = found_in['train']
  for name in ('validation', 'test'):
    ids, bits_nb = found_in[name]
    if not len(train_nb) or not len(bits_nb):
      continue
    near = [
      f'{row} like {train_ids[place]}'
      for row, place in zip(ids, near_images.nearest(bits_nb, train_nb), strict=True)
      if place >= 0 and row not in leave_out
    ]
    message = (
      f'{len(near):,} of {len(ids):,} images of {name} are nearly the same as one of train: '
    )
    found += _finding(f'nearly_same_image_in_{name}', near, message + '{}')
  return found
