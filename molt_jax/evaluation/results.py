"""What an evaluation leaves: evaluation.json, each example's prediction, a printed table."""

import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import modalities
from molt_jax.evaluation import harm, notebook
from molt_jax.evaluation.recorder import PredictionRecorder
from molt_jax.evaluation.scoring import CONTENTS
from molt_jax.runtime import atomic, console, logbook, processes, terminal

RECORD = 'evaluation.json'
COLUMNS = ('accuracy', 'f1_micro', 'f1_macro', 'f1_samples', 'f1_weighted', 'auroc', 'loss')
REPEATED = ('f1_micro', 'f1_samples')  # The same as accuracy where an example has one label.
LIBRARIES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def publish(
  workdir: pathlib.Path,
  *,
  split: str,
  found: Mapping[str, Mapping[str, Any]],
  meta: Mapping[str, Any],
  recorder: PredictionRecorder | None,
  data: Mapping[str, Any],
  name: str = RECORD,
) -> dict[str, Any]:
  """Writes `evaluation.json` (or a file of another name) and what the recorder has, prints the new
  results as a table, returns the content of the first; `found` as in `write`.
  """
  record = write(workdir, split=split, found=found, meta=meta, data=data, name=name)
  if processes.is_main():
    harms = []
    if recorder:
      predictions = recorder.write(
        workdir,
        split=split,
        step=meta['step'],
        config_hash=record['config_hash'],
        seed=meta['config']['seed'],
        data=data['digest'],
      )
      harms = harm.found(predictions)
    what = f'{split} split' if name == RECORD else split
    title = f'{what}, {data["examples"]} examples, checkpoint of step {meta["step"]}'
    print_table(found['results'], title)
    if any(found.get('metrics', {}).values()):
      print_chosen(found['metrics'])
    for one in harms:
      console.log(one.line())
  return notebook.Scores(record)


def write(
  workdir: pathlib.Path,
  *,
  split: str,
  found: Mapping[str, Mapping[str, Any]],
  meta: Mapping[str, Any],
  data: Mapping[str, Any],
  name: str = RECORD,
) -> dict[str, Any]:
  """Writes `evaluation.json`, or a file of another name.

  `found` has results, and metrics of the user's choice; `data` is the split's fingerprint
  (`trained.open_split`). What is already there for the same checkpoint, split and data is kept
  beside the new.
  """
  path = workdir / name
  config = CLASSIFIER.from_dict(meta['config'])
  record = {
    'split': split,
    'num_examples': data['examples'],
    'step': meta['step'],
    'results': dict(found['results']),
    'config_hash': resolved.config_hash(config),
    'dataset': _data(config),
    'data': dict(data),
    'backbones': meta['backbones'],
    'versions': {name: importlib.metadata.version(name) for name in LIBRARIES},
  }
  old = logbook.kept(path)
  same = ('split', 'step', 'config_hash', 'backbones', 'data')
  is_same = all(old.get(key) == record[key] for key in same)
  for key in ('results', 'metrics'):
    before = old.get(key)
    merged = (before if is_same and isinstance(before, dict) else {}) | dict(found.get(key, {}))
    if merged or key == 'results':
      record[key] = merged
  if processes.is_main():
    atomic.write(path, logbook.to_json(record, indent=2) + '\n')
  return record


def _data(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What the examples were, of all that changes scores."""
  mismatch = {'allow_count_mismatch': True} if config.dataset.allow_count_mismatch else {}
  return {'name': config.dataset.name, **resolved.data_choices(config), **mismatch}


def print_table(results: Mapping[str, Mapping[str, float]], title: str) -> None:
  """Prints one row a condition: how many examples had what, then scores in percent (the loss as it
  is), '-' where there is none; see `terminal.print_columns`.
  """
  scores = [name for name in COLUMNS if any(name in result for result in results.values())]
  cells = {name: [_cell(result, name) for result in results.values()] for name in scores}
  if all(cells.get(name) == cells.get('accuracy') for name in REPEATED):
    cells = {name: column for name, column in cells.items() if name not in REPEATED}
  names = [modalities.in_words(name) for name in results]
  counts = [', '.join(_counted(result)) for result in results.values()]
  columns = {'condition': names, 'examples': counts} | cells
  shown = {name.replace('_', ' '): column for name, column in columns.items()}
  terminal.print_columns(shown, title)


def print_sets(sets: Mapping[str, Mapping[str, Any]], title: str) -> None:
  """Prints one row a condition: how often prediction sets held the truth, and how large they were;
  then the classes whose sets held it least often.
  """
  rows = {'coverage': [], 'labels a set': [], 'lowest classes': []}
  for found in sets.values():
    rows['coverage'].append(f'{100 * found["coverage"]:.1f}' if 'coverage' in found else '-')
    rows['labels a set'].append(f'{found["mean_size"]:.2f}' if 'mean_size' in found else '-')
    known = [(x['coverage'], name) for name, x in found['by_class'].items() if x['examples'] >= 10]
    lowest = [f'{terminal.clean(name, 20)} {100 * share:.0f}' for share, name in sorted(known)[:2]]
    rows['lowest classes'].append(', '.join(lowest) or '-')
  names = [modalities.in_words(name) for name in sets]
  promised = next(iter(sets.values()))
  title = f'{promised["kind"]} sets that promise {100 * promised["promised"]:g} %, {title}'
  terminal.print_columns({'condition': names} | rows, title)


def print_chosen(chosen: Mapping[str, Mapping[str, float]]) -> None:
  """Prints metrics of the user's choice, one row a condition, as scikit-learn has them."""
  names = dict.fromkeys(name for scores in chosen.values() for name in scores)
  columns = {'condition': [modalities.in_words(condition) for condition in chosen]}
  for name in names:
    cells = [f'{scores[name]:.4f}' if name in scores else '-' for scores in chosen.values()]
    columns[name.replace('_', ' ')] = cells
  terminal.print_columns(columns, "scores by scikit-learn's names")


def _cell(result, name) -> str:
  if name not in result:
    return '-'
  return f'{result[name]:.3f}' if name == 'loss' else f'{100 * result[name]:.1f}'


def _counted(result) -> list[str]:
  """['4 image only', '5 text only'], the kinds of examples that there are."""
  counts = {name.replace('_', ' '): result[name] for name in CONTENTS}
  return [f'{count} {name}' for name, count in counts.items() if count] or ['0']
