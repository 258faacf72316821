"""Scores of a pair of towers on a data set: retrieval, zero-shot classification, and linear probes
on the image tower beside probes that need no tower.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import decode_report, transforms
from molt_jax.data.examples import read_example
from molt_jax.data.sources import Dataset, Source
from molt_jax.pairs import in_use, retrieval
from molt_jax.pairs.probes import linear_probe, pixels, principal_components
from molt_jax.runtime import console

SPLITS = ('train', 'validation', 'test')
# Last layers of the tower that a probe reads, as the heads of the classifier do by default.
MOST_STATES = 4


@dataclasses.dataclass(frozen=True)
class Examples:
  """The images of a split, decoded, with their texts (None: absent) and classes; examples without
  an image are left out.
  """

  images: list[Image.Image]
  texts: list[str | None]
  labels: list[Any]


def read_examples(
  source: Source, report: decode_report.DecodeReport, *, title: str = 'reading'
) -> Examples:
  """Reads and decodes a split; what cannot be decoded is reported and left out."""
  found = []
  with console.progress(title, len(source), 'examples', compiles=True) as bar:
    for index in np.arange(len(source)):
      if source.present[index, 0]:
        example = read_example(source, int(index), image=True, report=report)
        try:
          found.append(
            (transforms.decode(example['image'] or b''), example['text'] or None, example['label'])
          )
        except transforms.DecodeError as error:
          report.add(example['id'], 'image', str(error))
      bar.advance()
  return (
    Examples(*(list(column) for column in zip(*found, strict=True)))
    if found
    else Examples([], [], [])
  )


def read_dataset(dataset: Dataset, splits: Iterable[str] = SPLITS) -> dict[str, Examples]:
  """Reads the splits of a data set; says on stderr what could not be decoded."""
  report = decode_report.DecodeReport()
  examples = {
    split: read_examples(dataset.splits[split], report, title=f'reading {split}')
    for split in splits
  }
  if report.counts():
    console.log(report.line())
  return examples


def _each_split(features: Callable) -> Callable:
  return lambda pair, examples: {
    split: features(pair, part.images) for split, part in examples.items()
  }


def _tower_features(pair, images):
  return pair.image_features(
    images, num_layers=min(MOST_STATES, pair.model.encoder.image_tower.config.num_layers)
  )


_PIXELS = _each_split(lambda pair, images: pixels(images))
# Name -> function(pair, examples by split) -> features by split, [N, D] each.
PROBES: dict[str, Callable] = {
  'tower': _each_split(_tower_features),
  'tokens': _each_split(lambda pair, images: pair.image_tokens(images)),
  'embedding': _each_split(lambda pair, images: pair.embed_images(images)),
  'pixels': _PIXELS,
  'pca': lambda pair, examples: principal_components(_PIXELS(pair, examples)),
}


def evaluate_examples(
  pair: in_use.TowerPair,
  examples: Mapping[str, Examples],
  class_names: Sequence[str] | None,
  *,
  splits: Iterable[str] = ('test',),
  templates: Sequence[str] = retrieval.TEMPLATES,
  probes: Collection[str] = tuple(PROBES),
) -> dict[str, dict[str, Any]]:
  """Scores towers on splits of a data set.

  Args:
    pair: the towers; its image_features, embed_images and embed_texts are called.
    examples: by split; the probes read 'train' and 'validation' too.
    class_names: None leaves zero-shot classification and probes out, as for several labels an
      example. Without rows to fit or to score them on they are left out as well.
    splits: which to score.
    templates: prompts with {} for the class name.
    probes: names in `PROBES`.

  Returns:
    split -> as `retrieval.evaluate_pair`, with 'linear_probe':
    {name: {'accuracy': .., 'C': ..}}.

  Raises:
    UserError: see `retrieval_and_probes`.
  """
  prompts_kpc, features, fitted = None, {}, {}
  seen = {split: part for split, part in examples.items() if part.images}
  if class_names is not None and len(class_names) > 1:
    prompts = retrieval.class_prompts(class_names, templates)
    prompts_kpc = pair.embed_texts(sum(prompts, [])).reshape(len(prompts), len(templates), -1)
    if _can_fit(seen):
      labels = {split: part.labels for split, part in seen.items()}
      features = {name: PROBES[name](pair, seen) for name in probes}
      fitted = {name: linear_probe(features[name], labels) for name in probes}
  results = {}
  for split in splits:
    embedded = features.get('embedding', {}).get(split)
    results[split] = _pair_scores(pair, examples[split], embedded, prompts_kpc)
    found = {
      name: {'accuracy': fit['accuracy'][split], 'C': fit['C']}
      for name, fit in fitted.items()
      if split in fit['accuracy']
    }
    results[split] |= {'linear_probe': found} if found else {}
  return results


def _can_fit(examples: Mapping[str, Examples]) -> bool:
  """Whether there are two classes to tell apart in train, and a row of a class in validation."""
  known = {}
  for split in ('train', 'validation'):
    labels = examples[split].labels if split in examples else []
    known[split] = {label for label in labels if label >= 0}
  return len(known['train']) > 1 and len(known['validation']) > 0


def _pair_scores(pair, part, image_nc, prompts_kpc) -> dict[str, Any]:
  """Scores of one split; `image_nc`: its embeddings, None: not computed yet."""
  captioned = [n for n, text in enumerate(part.texts) if text]
  texts = [part.texts[n] for n in captioned]
  counts = {'num_images': len(part.images), 'num_texts': len(texts)}
  if not part.images:
    return counts
  image_nc = pair.embed_images(part.images) if image_nc is None else image_nc
  text_mc = pair.embed_texts(texts) if texts else image_nc[:0]
  return (
    retrieval.evaluate_pair(
      image_nc,
      text_mc,
      image_of_text=captioned,
      texts=texts,
      labels=None if prompts_kpc is None else part.labels,
      class_prompts_kpc=prompts_kpc,
      sigmoid=pair.sigmoid,
    )
    | counts
  )


def left_out(
  results: Mapping[str, Any], *, labelled: bool, probes: Collection[str]
) -> Iterator[str]:
  """Yields what there is no score of, and why.

  Args:
    results: of one split.
    labelled: whether classes were to be told apart.
    probes: what was asked for.
  """
  if 'image_to_text' not in results:
    yield 'no retrieval: fewer than two images with a text'
  if labelled and 'zero_shot' not in results:
    yield 'no zero-shot classification: one class alone, or no image of a known class'
  if labelled and probes and 'linear_probe' not in results:
    yield (
      'no linear probe: fewer than two classes among the images of train, or none of a known '
      'class in validation or in this split'
    )
