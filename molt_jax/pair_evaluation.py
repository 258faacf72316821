"""Evaluates a pretrained pair of towers: `python -m molt_jax.pair_evaluation --workdir=DIR`.

Zero-shot classification, retrieval both ways, the shape of the common space, and linear probes on the frozen image tower beside probes that need no
tower (raw pixels, their principal components). See `pair_metrics` for what each number means. One JSON file, one table.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
from PIL import Image

from molt_jax import atomic, checkpoint, cli, dual, pair_metrics, pretrain
from molt_jax import config as config_lib
from molt_jax import workdir as workdir_lib
from molt_jax.config import UserError
from molt_jax.data import datasets, pipeline, transforms
from molt_jax.data.sources import Dataset, Source

SPLITS = ('train', 'validation', 'test')
TAPS = 4  # Last layers of the tower that a probe reads, as the heads of the classifier do by default.
LIBRARIES = ('jax', 'flax', 'optax', 'numpy', 'scipy')


@dataclasses.dataclass(frozen=True)
class Examples:
  """The images of a split, decoded, with their texts (None: absent) and classes; examples without an image are left out."""

  images: list[Image.Image]
  texts: list[str | None]
  labels: list[Any]


def read_examples(source: Source, report: pipeline.DecodeReport, *, title: str = 'reading') -> Examples:
  """Reads and decodes a split; what cannot be decoded is reported and left out."""
  found = []
  with cli.progress(title, len(source), 'examples') as bar:
    for index in np.arange(len(source)):
      if source.present[index, 0]:
        example = pipeline.read_example(source, int(index), image=True, report=report)
        try:
          found.append((transforms.decode(example['image'] or b''), example['text'] or None, example['label']))
        except transforms.DecodeError as error:
          report.add(example['id'], 'image', str(error))
      bar.advance()
  return Examples(*(list(column) for column in zip(*found, strict=True))) if found else Examples([], [], [])


def read_dataset(dataset: Dataset, splits: Iterable[str] = SPLITS) -> dict[str, Examples]:
  """Reads the splits of a data set; says on stderr what could not be decoded."""
  report = pipeline.DecodeReport()
  examples = {split: read_examples(dataset.splits[split], report, title=f'reading {split}') for split in splits}
  if report.counts():
    cli.say(report.line())
  return examples


def _each_split(features: Callable) -> Callable:
  return lambda pair, examples: {split: features(pair, part.images) for split, part in examples.items()}


def _tower_features(pair, images):
  return pair.image_features(images, num_layers=min(TAPS, pair.model.trained.image_tower.config.num_layers))


_PIXELS = _each_split(lambda pair, images: pair_metrics.pixels(images))
# Name -> function(pair, examples by split) -> features by split, [N, D] each.
PROBES: dict[str, Callable] = {
    'tower': _each_split(_tower_features),
    'tokens': _each_split(lambda pair, images: pair.image_tokens(images)),
    'embedding': _each_split(lambda pair, images: pair.embed_images(images)),
    'pixels': _PIXELS,
    'pca': lambda pair, examples: pair_metrics.principal_components(_PIXELS(pair, examples)),
}


def evaluate_examples(
    pair: dual.TowerPair, examples: Mapping[str, Examples], class_names: Sequence[str] | None, *, splits: Iterable[str] = ('test',),
    templates: Sequence[str] = pair_metrics.TEMPLATES, probes: Collection[str] = tuple(PROBES)) -> dict[str, dict[str, Any]]:
  """Scores towers on splits of a data set.

  Args:
    pair: the towers; its image_features, embed_images and embed_texts are called.
    examples: by split; the probes read 'train' and 'validation' too.
    class_names: None leaves zero-shot classification and probes out, as for several labels an example.
    splits: which to score.
    templates: prompts with {} for the class name.
    probes: names in `PROBES`.

  Returns:
    split -> as `pair_metrics.evaluate_pair`, with 'linear_probe': {name: {'accuracy': .., 'C': ..}}.

  Raises:
    UserError: see `pair_metrics`.
  """
  prompts_kpc, features, fitted = None, {}, {}
  if class_names is not None:
    prompts = pair_metrics.class_prompts(class_names, templates)
    prompts_kpc = pair.embed_texts(sum(prompts, [])).reshape(len(prompts), len(templates), -1)
    labels = {split: part.labels for split, part in examples.items()}
    features = {name: PROBES[name](pair, examples) for name in probes}
    fitted = {name: pair_metrics.linear_probe(features[name], labels) for name in probes}
  results = {}
  for split in splits:
    part = examples[split]
    captioned = [n for n, text in enumerate(part.texts) if text]
    texts = [part.texts[n] for n in captioned]
    image_nc = features['embedding'][split] if 'embedding' in features else pair.embed_images(part.images)
    results[split] = pair_metrics.evaluate_pair(
        image_nc, pair.embed_texts(texts), image_of_text=captioned, texts=texts,
        labels=part.labels if class_names is not None else None, class_prompts_kpc=prompts_kpc)
    results[split] |= {'num_images': len(part.images), 'num_texts': len(texts)}
    if fitted:
      results[split]['linear_probe'] = {name: {'accuracy': fit['accuracy'][split], 'C': fit['C']} for name, fit in fitted.items()}
  return results


def open_dataset(config: Any, table: str = '') -> Dataset:
  """Opens the run's data set, or the own-data folder `table` in its place."""
  if table:
    config = config.copy_and_resolve_references()
    for name, value in (('dataset.name', 'table'), ('dataset.path', table)):
      config_lib.set_field(config, name, value)
  return datasets.load_dataset(config)


def print_table(results: Mapping[str, Any], title: str) -> None:
  """Prints the scores of one split, shares in percent."""
  table = rich.table.Table(title=title, show_header=False)
  for column in range(3):
    table.add_column(justify='left' if column < 2 else 'right', no_wrap=True)
  for group, values in results.items():
    if isinstance(values, Mapping):
      for name, value in values.items():
        share = value['accuracy'] if isinstance(value, Mapping) else value
        table.add_row(group.replace('_', ' '), name, f'{100 * share:.1f} %')
    else:
      table.add_row(group.replace('_', ' '), '', f'{values:.3f}' if isinstance(values, float) else str(values))
  rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)


FLAGS = (
    cli.Flag('workdir', 'folder of a run of molt_jax.pretrain', required=True),
    cli.Flag('split', 'split to score: train, validation or test', 'test'),
    cli.Flag('table', 'another data set in the own-data layout, in the place of the one it was trained on', ''),
    cli.Flag('templates', 'prompts for zero-shot classification, {} is the class name, joined by |', '|'.join(pair_metrics.TEMPLATES)),
    cli.Flag('probes', f'comma-separated linear probes: {", ".join(PROBES)}; empty: none', ','.join(PROBES)),
)


@cli.command
def main(argv: Sequence[str]) -> None:
  """Command line of the module."""
  flags, _ = cli.parse('molt_jax.pair_evaluation', 'Evaluate a pretrained pair of an image and a text tower.', FLAGS, argv)
  run(pathlib.Path(flags.workdir), split=flags.split, table=flags.table, templates=flags.templates.split('|'),
      probes=[name for name in flags.probes.split(',') if name])


def run(
    workdir: pathlib.Path, *, split: str = 'test', table: str = '', templates: Sequence[str] = pair_metrics.TEMPLATES,
    probes: Collection[str] = tuple(PROBES)) -> dict[str, Any]:
  """Evaluates the pair in `workdir`, prints the table, writes `pair_evaluation.json` and returns its content.

  The file holds one record for each (data set, split); the others are kept as they are.

  Raises:
    UserError: no run there, an unknown split or probe, unusable templates, a data set that leaves nothing to choose.
  """
  for flag, names, legal in (('--split', [split], SPLITS), ('--probes', probes, tuple(PROBES))):
    for name in names:
      if name not in legal:
        raise UserError(f'{flag}: {name!r} is not legal; give {", ".join(legal)}')
  pair_metrics.class_prompts([], templates)
  if workdir.is_dir():
    workdir_lib.try_out(workdir)
  pair = pretrain.load_pair(workdir)
  config = config_lib.from_json((workdir / 'config.json').read_text(encoding='utf-8'), config_lib.PRETRAIN_SCHEMA)
  meta, _ = checkpoint.load_model(workdir, config.eval.select)
  dataset = open_dataset(config, table)
  if dataset.multi_label:
    cli.say('several labels an example: zero-shot classification and linear probes are left out')
    probes = ()
  examples = read_dataset(dataset, SPLITS if probes else (split,))
  class_names = None if dataset.multi_label else dataset.class_names
  results = evaluate_examples(pair, examples, class_names, splits=[split], templates=templates, probes=probes)[split]
  print_table(results, f'{dataset.name}, {split} split')
  record = {
      'dataset': dataset.name, 'split': split, 'templates': list(templates), 'results': results, 'step': meta['step'],
      'versions': {name: importlib.metadata.version(name) for name in LIBRARIES}}
  path = workdir / 'pair_evaluation.json'
  kept = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
  kept[f'{dataset.name}/{split}'] = record
  atomic.write(path, json.dumps(kept, indent=2) + '\n')
  return record


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
