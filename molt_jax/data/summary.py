"""What a data set holds: counts, lengths, sizes, and how often a text names its class."""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from molt_jax.data import formats, transforms
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.examples import read_example
from molt_jax.data.sources import Dataset, Source, classes_of, images_of
from molt_jax.runtime import console

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
MANY = 1 << 30  # More tokens than any text has.


def describe(
  dataset: Dataset,
  *,
  encode: Callable[[str, int], Sequence[int]] | None,
  max_tokens: int,
  sample: int,
) -> dict[str, Any]:
  """Measures a data set.

  Args:
    dataset: as `datasets.load_dataset` opens it.
    encode: the text tower's tokenizer, (text, most tokens) -> ids; None: lengths are in words
      alone.
    max_tokens: T, what training keeps of a text.
    sample: examples a split whose texts and images are looked at.

  Returns:
    what describe.json holds.
  """
  splits = {}
  total = sum(min(sample, len(source)) for source in dataset.splits.values())
  with console.progress('looking at examples', total, 'examples') as bar:
    for split, source in dataset.splits.items():
      looked = _sampled(source, dataset.class_names, encode, max_tokens, sample, bar)
      splits[split] = _presence(source) | looked
  counts = {split: _class_counts(dataset, source) for split, source in dataset.splits.items()}
  classes = {}
  for k, name in enumerate(dataset.class_names):
    classes[name] = {split: int(count_k[k]) for split, count_k in counts.items()}
  return {
    'dataset': dataset.name,
    'multi_label': dataset.multi_label,
    'splits': splits,
    'classes': classes,
  }


def _presence(source: Source) -> dict[str, int]:
  image_n, text_n = source.present.T
  values = {
    'examples': len(source),
    'both': image_n & text_n,
    'image_only': image_n & ~text_n,
    'text_only': ~image_n & text_n,
  }
  counts = {name: int(np.sum(value)) for name, value in values.items()}
  counts['without_label'] = sum(not classes_of(label) for label in source.labels)
  return counts


def _class_counts(dataset: Dataset, source: Source) -> np.ndarray:
  labels = [k for label in source.labels for k in classes_of(label)]
  return np.bincount(np.array(labels, int), minlength=len(dataset.class_names))


def evenly(count: int, most: int) -> list[int]:
  """Returns at most `most` positions, evenly spaced over `count`."""
  return [int((k + 0.5) * count / min(count, most)) for k in range(min(count, most))]


def _sampled(
  source: Source,
  class_names: Sequence[str],
  encode: Callable[[str, int], Sequence[int]] | None,
  max_tokens: int,
  sample: int,
  bar: console.Progress,
) -> dict[str, Any]:
  """What describe.json holds of the examples of a split that are looked at."""
  words, tokens, sizes, found_formats, named = [], [], [], collections.Counter(), []
  report = DecodeReport()
  for n in evenly(len(source), sample):
    bar.advance()
    example = read_example(source, n, image=True, report=report)
    if example['text'] is not None:
      words.append(len(example['text'].split()))
      tokens += [len(encode(example['text'], MANY))] if encode else []
      names = [class_names[k] for k in classes_of(example['label'])]
      named.append(names_a_class(example['text'], names))
    for image in images_of(example):
      found_formats[_look(example['id'], image, report, sizes)] += 1
  return {
    'sampled': min(sample, len(source)),
    'words': _percentiles(words),
    'tokens': _percentiles(tokens),
    'longer_than_max_tokens': float(np.mean(np.array(tokens) > max_tokens)) if tokens else None,
    'class_named_in_text': float(np.mean(named)) if named else None,
    'image_width': _percentiles([width for width, _ in sizes]),
    'image_height': _percentiles([height for _, height in sizes]),
    'image_formats': dict(found_formats.most_common()),
    'unusable': report.line(),
  }


def _look(example_id: str, data: bytes, report: DecodeReport, sizes: list[tuple[int, int]]) -> str:
  """Returns the format of an image and adds its size; 'unusable', and reported, if damaged."""
  try:
    transforms.check(data)
    with formats.opened(data) as image:
      sizes.append(image.size)
      return f'{image.format} {image.mode}'
  except transforms.DecodeError as error:
    report.add(example_id, 'image', str(error))
    return 'unusable'


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
  return {str(p): float(np.percentile(values, p)) for p in PERCENTILES} if len(values) else None


def names_a_class(text: str, names: Sequence[str]) -> bool:
  """Whether one of the names stands in the text, as whole words.

  Case and punctuation do not count: apple_pie is in 'Best Apple-Pie!'.
  """
  spaced = f' {_spaced(text)} '
  return any(f' {_spaced(name)} ' in spaced for name in names)


def _spaced(text: str) -> str:
  return ' '.join(re.findall(r'[^\W_]+', text.casefold()))
