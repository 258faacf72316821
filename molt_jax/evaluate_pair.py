"""Evaluates a pair of towers: `python -m molt_jax.evaluate_pair --workdir=DIR`, of a run that
pretrained one or, with `--pair=MODEL --table=FOLDER`, of a published CLIP or SigLIP.

Zero-shot classification, retrieval both ways, the shape of the common space, and linear probes on
the frozen image tower beside probes that need no tower (raw pixels, their principal components).
See `pairs/retrieval.py` for what each number means. One JSON file, one table.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('evaluate_pair', sys.argv[1:]))

import argparse
import importlib.metadata
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import rich.table
import rich.text

from molt_jax import errors, pretrain
from molt_jax.config import resolved
from molt_jax.config.json_files import read_json
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.data import datasets, fingerprint
from molt_jax.data.sources import Dataset
from molt_jax.errors import UserError
from molt_jax.evaluation import trained
from molt_jax.pairs import in_use, published, retrieval
from molt_jax.pairs.scoring import PROBES, SPLITS, evaluate_examples, left_out, read_dataset
from molt_jax.runtime import atomic, console, logbook, sharding, terminal
from molt_jax.training import workdir as workdir_lib
from molt_jax.training.assembly import make_preprocess

LIBRARIES = ('jax', 'flax', 'optax', 'numpy', 'scipy')


def open_dataset(config: Any, table: str = '') -> Dataset:
  """Opens the run's data set, or the own-data folder `table` in its place."""
  if table:
    config = config.copy_and_resolve_references()
    for name, value in (('dataset.name', 'table'), ('dataset.path', table)):
      resolved.set_field(config, name, value)
  return datasets.load_dataset(config)


def print_table(results: Mapping[str, Any], title: str) -> None:
  """Prints the scores of one split, shares in percent."""
  table = rich.table.Table(title=rich.text.Text(terminal.clean(title)), show_header=False)
  for column in range(3):
    table.add_column(justify='left' if column < 2 else 'right', no_wrap=True)
  for group, values in results.items():
    if isinstance(values, Mapping):
      for name, value in values.items():
        share = value['accuracy'] if isinstance(value, Mapping) else value
        table.add_row(group.replace('_', ' '), name, f'{100 * share:.1f} %')
    else:
      table.add_row(
        group.replace('_', ' '), '', f'{values:.3f}' if isinstance(values, float) else str(values)
      )
  terminal.print_table(table)


def command(flags: argparse.Namespace) -> None:
  """The work of the command."""
  run(
    pathlib.Path(flags.workdir),
    split=flags.split,
    table=flags.table,
    templates=flags.templates,
    probes=flags.probes,
    published_pair=(flags.pair, flags.dtype) if flags.pair else None,
  )


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('evaluate_pair', argv)


class _Opened(NamedTuple):
  """A pair, what it is scored on, and what the record says of both.

  Attributes:
    pair: the towers.
    dataset: what they are scored on.
    data: fingerprint of the split.
    facts: of the pair: the step of its run, or what was published.
  """

  pair: in_use.TowerPair
  dataset: Dataset
  data: Mapping[str, Any]
  facts: Mapping[str, Any]


def run(
  workdir: pathlib.Path,
  *,
  split: str = 'test',
  table: str = '',
  templates: Sequence[str] = retrieval.TEMPLATES,
  probes: Collection[str] = tuple(PROBES),
  published_pair: tuple[str, str] | None = None,
) -> dict[str, Any]:
  """Evaluates the pair in `workdir`, prints the table, writes `pair_evaluation.json` and returns
  its content.

  The file holds one record for each (data set, split); the others are kept as they are.

  Args:
    workdir: of a run of pretraining or, with a published pair, where the file is written.
    split: to score.
    table: an own-data folder in the place of the run's data.
    templates: prompts with {} for the class name.
    probes: names in `PROBES`.
    published_pair: (Hugging Face directory or hub id of a whole model, type of computation).

  Raises:
    UserError: no run there, an unknown split or probe, unusable templates, a split without images,
      no pair of towers.
  """
  _check(split, templates, probes)
  path = workdir / 'pair_evaluation.json'
  if published_pair is not None:
    _make_folder(workdir)
  elif workdir.is_dir():
    workdir_lib.try_out(workdir)
  kept = _written(path)
  if published_pair is None:
    opened = _open_run(workdir, split, table)
  else:
    opened = _open_published(*published_pair, split, table)
  results = _score(opened.pair, opened.dataset, split, templates, probes)
  kept[f'{opened.dataset.name}/{split}'] = {
    'dataset': opened.dataset.name,
    'split': split,
    'data': opened.data,
    'templates': list(templates),
    'results': results,
    **opened.facts,
    'versions': {name: importlib.metadata.version(name) for name in LIBRARIES},
  }
  atomic.write(path, logbook.to_json(kept, indent=2) + '\n')
  return kept[f'{opened.dataset.name}/{split}']


def _open_run(workdir: pathlib.Path, split: str, table: str) -> _Opened:
  opened = pretrain.open_run(workdir)
  pair = pretrain.make_pair(opened)
  dataset = open_dataset(opened.config, table)
  data = fingerprint.of(dataset.splits[split], dataset.class_names)
  if not table:
    data = trained.compare(opened, split, data)
  return _Opened(pair, dataset, data, {'step': opened.meta['step']})


def _open_published(path: str, dtype: str, split: str, table: str) -> _Opened:
  towers = published.describe(path)
  config = PRETRAINING.default()
  config.text.max_tokens = towers['text'].config.max_positions
  mesh = sharding.make_mesh(config)
  dataset = open_dataset(config, table)
  pair, variables = published.load(path, towers, mesh, dtype)
  preprocess = make_preprocess(config, towers, num_classes=len(dataset.class_names))
  pair = in_use.TowerPair(pair, variables, preprocess, config.eval.batch_size, mesh)
  data = fingerprint.of(dataset.splits[split], dataset.class_names)
  return _Opened(pair, dataset, data, {'pair': dict(towers['image'].identity)})


def _make_folder(folder: pathlib.Path) -> None:
  """Makes the folder for the scores of a published pair; a run's own are kept apart."""
  if (folder / 'config.json').exists():
    raise UserError(
      f'--workdir: {str(folder)!r} holds a run; give another folder for the scores of --pair'
    )
  with errors.explained(f'--workdir: {str(folder)!r} cannot be made'):
    folder.mkdir(parents=True, exist_ok=True)
  workdir_lib.try_out(folder)


def _score(
  pair: in_use.TowerPair,
  dataset: Dataset,
  split: str,
  templates: Sequence[str],
  probes: Collection[str],
) -> dict[str, Any]:
  """Scores a split, logs what has no score, prints the table."""
  if dataset.multi_label:
    console.log(
      'several labels an example: zero-shot classification and linear probes are left out'
    )
    probes = ()
  examples = read_dataset(dataset, SPLITS if probes else (split,))
  class_names = None if dataset.multi_label else dataset.class_names
  if not examples[split].images:
    raise UserError(f'--split: no image of {dataset.name}, {split}, can be read; there is no score')
  results = evaluate_examples(
    pair, examples, class_names, splits=[split], templates=templates, probes=probes
  )[split]
  for message in left_out(results, labelled=class_names is not None, probes=probes):
    console.log(message)
  print_table(results, f'{dataset.name}, {split} split')
  return results


def _check(split: str, templates: Sequence[str], probes: Collection[str]) -> None:
  for flag, names, legal in (('--split', [split], SPLITS), ('--probes', probes, tuple(PROBES))):
    for name in names:
      if name not in legal:
        raise UserError(f'{flag}: {name!r} is not legal; give one of {", ".join(legal)}')
  retrieval.class_prompts([], templates)


def _written(path: pathlib.Path) -> dict[str, Any]:
  """Returns the records of earlier evaluations."""
  if not path.exists():
    return {}
  remedy = 'delete it, and its scores are computed again'
  kept = read_json(path, remedy)
  if not isinstance(kept, dict):
    raise UserError(f'{path} is damaged (no JSON object); {remedy}')
  return kept
