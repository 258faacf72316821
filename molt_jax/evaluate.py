"""Evaluates a run with each modality absent: `python -m molt_jax.evaluate --workdir=DIR`."""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  sys.exit(commands.run('evaluate', sys.argv[1:]))

import argparse
import functools
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import missing, pipeline
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.evaluation.diagnostics import Observer, PredictionRecorder
from molt_jax.evaluation.metrics import ClassificationMetrics, Ranking
from molt_jax.features import extract
from molt_jax.methods import model as model_lib
from molt_jax.methods.parts.interface import HeadOutput
from molt_jax.runtime import atomic, console, logbook, processes, sharding, terminal
from molt_jax.training import runs
from molt_jax.training import workdir as workdir_lib

# What each named absence keeps: columns image, text.
KEPT = {'none': (True, True), 'text': (True, False), 'image': (False, True)}
ROWS = ('both', 'image_only', 'text_only')  # What a row that counts can have.
COLUMNS = ('accuracy', 'f1_micro', 'f1_macro', 'f1_samples', 'f1_weighted', 'auroc', 'loss')
REPEATED = ('f1_micro', 'f1_samples')  # The same as accuracy where an example has one label.
LIBRARIES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def absence_names(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the names in KEPT that leave something to a run with these `dataset.modalities`."""
  used = np.isin(model_lib.MODALITIES, resolved.modalities(config))
  return [name for name, keep in KEPT.items() if np.any(used & keep)]


def absences(names: Iterable[str], num_examples: int) -> dict[str, np.ndarray]:
  """Returns condition name -> bool[N, 2], the modalities that each example keeps."""
  return {f'{name}_absent': np.tile(np.array(KEPT[name]), (num_examples, 1)) for name in names}


def eval_step(
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  totals: tuple[ClassificationMetrics, jax.Array],
  *,
  model: model_lib.Model,
) -> tuple[tuple[ClassificationMetrics, jax.Array], HeadOutput, jax.Array]:
  """Adds one batch to the totals (metrics; int32[conditions, 3], rows of each kind of ROWS), one
  for each condition of batch['keep'] bool[B, conditions, 2].

  The towers run once, the head once a condition. A row that a condition leaves with nothing has
  weight 0 there, and one without a label everywhere. Returns the new totals, the head's output with
  a leading axis of conditions, and the weights [conditions, B].
  """
  metrics_c, rows_cr = totals
  taps = model.taps(frozen, batch)
  present_cbm = batch['present'][None] & jnp.swapaxes(batch['keep'], 0, 1)
  out_c = jax.lax.map(lambda present_bm: model.classify(variables, taps, present_bm), present_cbm)
  label = batch['label']
  labelled_b = label >= 0 if label.ndim == 1 else jnp.ones(len(label), bool)
  weight_cb = (batch['weight'] * labelled_b)[None] * jnp.any(present_cbm, axis=-1)
  # One logit that is not finite makes the loss NaN, which `evaluate` refuses: left alone, it could
  # go unnoticed (minus infinity for a class that is not the true one changes no loss).
  finite_cb1 = jnp.all(jnp.isfinite(out_c.logits_bk), axis=-1, keepdims=True)
  logits_cbk = jnp.where(finite_cb1, out_c.logits_bk, jnp.nan)
  metrics_c = jax.vmap(lambda total, logits_bk, weight_b: total.update(logits_bk, label, weight_b))(
    metrics_c, logits_cbk, weight_cb
  )
  image_cb, text_cb = jnp.moveaxis(present_cbm & (weight_cb > 0)[:, :, None], -1, 0)
  kinds_rcb = jnp.stack([image_cb & text_cb, image_cb & ~text_cb, text_cb & ~image_cb])
  rows_cr += jnp.sum(kinds_rcb, axis=-1, dtype=jnp.int32).T
  return (metrics_c, rows_cr), out_c, weight_cb


def evaluate(
  model: model_lib.Model,
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
  source: Source,
  preprocess: pipeline.Preprocess,
  conditions: Mapping[str, np.ndarray],
  *,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  title: str = 'evaluating',
  step=None,
  stored: Mapping[str, pipeline.StoredTaps] | None = None,
  observers: Sequence[Observer] = (),
) -> dict[str, dict[str, float]]:
  """Scores `source` under every condition in one pass.

  Args:
    model: the classifier.
    variables: the head's 'params' and 'statistics'.
    frozen: tower parameters by modality; None for one that no condition keeps.
    source: the examples.
    preprocess: how an example becomes arrays.
    conditions: name -> bool[N, 2], the modalities that each example keeps (columns image, text).
    config: reads eval.batch_size, input.*, dataset.multi_label.
    mesh: where to compute.
    title: what the progress bar says.
    step: a jitted `eval_step`, to compile once for many calls.
    stored: the source's taps by modality, in the place of images, texts and towers.
    observers: look at each batch too.

  Returns:
    name -> num_examples, and of these: both, image_only, text_only; then, as far as the examples
    determine them, accuracy, f1_micro, f1_macro, f1_samples, f1_weighted, loss, and auroc where the
    data are multi-label or of two classes and examples of both kinds are there. A condition without
    an example has counts alone.

  Raises:
    UserError: the answers are not finite.
  """
  keep_ncm = np.stack(list(conditions.values()), axis=1)
  step = step or make_eval_step(model)
  empty = ClassificationMetrics.empty(
    num_classes=preprocess.num_classes, multi_label=config.dataset.multi_label
  )
  start = (empty, np.zeros(len(ROWS), np.int32))
  totals = jax.device_put(
    jax.tree.map(lambda x: np.zeros((len(conditions), *x.shape), x.dtype), start),
    sharding.replicated(mesh),
  )
  batches = pipeline.eval_batches(
    source,
    preprocess,
    batch_size=config.eval.batch_size,
    present=keep_ncm.any(axis=1),
    stored=stored,
    pack=sharding.packing(config, mesh),
    num_threads=config.input.num_threads,
    prefetch=config.input.prefetch,
    **sharding.data_shard(mesh),
  )
  ranking = (
    Ranking(multi_label=config.dataset.multi_label)
    if config.dataset.multi_label or preprocess.num_classes == 2
    else None
  )
  with console.progress(title, len(source), 'examples') as bar:
    for batch in batches:
      batch['keep'] = keep_ncm[batch['index']]  # Padding has index -1 and weight 0.
      batch = sharding.put_batch(batch, mesh)
      totals, out_c, weight_cb = step(variables, frozen, batch, totals)
      if ranking:
        ranking.observe(out_c.logits_bk, batch['label'], weight_cb)
      for observer in observers:
        observer.observe(batch, out_c)
      bar.advance(min(config.eval.batch_size, len(source) - bar.done))
  return _results(jax.device_get(totals), list(conditions), ranking)


def _results(totals, names, ranking) -> dict[str, dict[str, float]]:
  """Condition -> scores and counts."""
  results = {}
  for c, name in enumerate(names):
    total, rows_r = jax.tree.map(lambda x, c=c: x[c], totals)
    rows = dict(zip(ROWS, rows_r.tolist(), strict=True))
    results[name] = total.compute() | {'num_examples': int(total.count)} | rows
  _check_finite(results)
  areas = ranking.compute() if ranking else []
  for name, area in zip(names, areas, strict=False):  # None where no batch came.
    results[name] |= {} if area is None else {'auroc': area}
  return results


def _check_finite(scores: Mapping[str, Mapping[str, float]]) -> None:
  """A loss that is not finite says that some answer is not: no score of such answers is one."""
  for name, result in scores.items():
    if not math.isfinite(result.get('loss', 0.0)):
      raise UserError(
        f'{name.replace("_", " ")}: outputs of the model are not finite, and no score is made of '
        'them; the weights of the head or of a tower (config.backbones) are damaged, or a lower '
        'optimizer.learning_rate is needed'
      )


def make_eval_step(model: model_lib.Model):
  """Returns the jitted `eval_step` of a model."""
  return jax.jit(functools.partial(eval_step, model=model))


def score(results: Mapping[str, Mapping[str, float]], *, multi_label: bool) -> float | None:
  """Returns what the best checkpoint is chosen by: accuracy (micro F1 when multi-label), mean over
  the conditions that have it; None where none has.
  """
  key = headline(multi_label)
  found = [result[key] for result in results.values() if key in result]
  return float(np.mean(found)) if found else None


def headline(multi_label: bool) -> str:
  """Returns the key of the score that stands for all."""
  return 'f1_micro' if multi_label else 'accuracy'


def describe_score(results: Mapping[str, Mapping[str, float]], *, multi_label: bool) -> str:
  """Says what `score` is the mean of, and which conditions have nothing to score."""
  key = headline(multi_label)
  names = {True: [], False: []}
  for name, result in results.items():
    names[key in result].append(name.replace('_', ' '))
  said = [f'{key.replace("_", " ")}, mean over {", ".join(names[True])}'] if names[True] else []
  without = f'no example to score with {", ".join(names[False])}' if names[False] else ''
  return '; '.join([*said, *([without] if without else [])])


def needed(conditions: Mapping[str, np.ndarray], source: Source) -> list[str]:
  """Returns the modalities that some condition keeps for some example that has it."""
  used = np.any([(keep & source.present).any(axis=0) for keep in conditions.values()], axis=0)
  return [modality for modality, use in zip(model_lib.MODALITIES, used, strict=True) if use]


def write(
  workdir: pathlib.Path,
  *,
  split: str,
  results: Mapping[str, Any],
  meta: Mapping[str, Any],
  data: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes `evaluation.json`; `data` is the split's fingerprint (`trained.open_split`).

  Results already there for the same checkpoint, split and data are kept beside the new ones.
  """
  path = workdir / 'evaluation.json'
  config = CLASSIFIER.from_json(json.dumps(meta['config']))
  record = {
    'split': split,
    'num_examples': data['examples'],
    'step': meta['step'],
    'results': dict(results),
    'config_hash': resolved.config_hash(config),
    'dataset': _data(config),
    'data': dict(data),
    'backbones': meta['backbones'],
    'versions': {name: importlib.metadata.version(name) for name in LIBRARIES},
  }
  old = logbook.kept(path)
  same = ('split', 'step', 'config_hash', 'backbones', 'data')
  if all(old.get(key) == record[key] for key in same) and isinstance(old.get('results'), dict):
    record['results'] = old['results'] | record['results']
  if processes.leads():
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
  names = [name.replace('_', ' ') for name in results]
  counts = [', '.join(_counted(result)) for result in results.values()]
  columns = {'condition': names, 'examples': counts} | cells
  shown = {name.replace('_', ' '): column for name, column in columns.items()}
  terminal.print_columns(shown, title)


def _cell(result, name) -> str:
  if name not in result:
    return '-'
  return f'{result[name]:.3f}' if name == 'loss' else f'{100 * result[name]:.1f}'


def _counted(result) -> list[str]:
  """['4 image only', '5 text only'], the kinds of rows that there are."""
  counts = {name.replace('_', ' '): result[name] for name in ROWS}
  return [f'{count} {name}' for name, count in counts.items() if count] or ['0']


def command(flags: argparse.Namespace) -> None:
  """The work of the command."""
  processes.join()
  run(
    pathlib.Path(flags.workdir),
    split=flags.split,
    absent=flags.absent,
    missing_rates=flags.missing_rate,
    missing_types=flags.missing_type,
  )


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('evaluate', argv)


def run(
  workdir: pathlib.Path,
  *,
  split: str = 'test',
  absent: Collection[str] | None = None,
  missing_rates: Collection[float] = (),
  missing_types: Collection[str] = ('both',),
) -> dict[str, Any]:
  """Evaluates the run in `workdir` in one pass, prints the table, writes `evaluation.json` and
  returns its content.

  Args:
    workdir: the run's folder.
    split: train, validation or test.
    absent: names in KEPT; default: all that leave something to the run.
    missing_rates: one more condition for each of these and of missing_types, 'missing_TYPE_RATE',
      see `missing.present_table`.
    missing_types: 'text', 'image' or 'both'.

  Raises:
    UserError: no run there, an unknown split, a condition that is unknown or leaves the run with
      nothing, a tower that has changed.
  """
  _check_choice('--split', split, ('train', 'validation', 'test'))
  for kind in missing_types:
    _check_choice('--missing_type', kind, ('text', 'image', 'both'))
  for name in absent or ():
    _check_choice('--absent', name, KEPT)
  if processes.leads() and workdir.is_dir():
    workdir_lib.try_out(workdir)
  opened = runs.open_run(workdir)
  config, meta = opened.config, opened.meta
  absent = absence_names(config) if absent is None else absent
  _check_left(config, absent, missing_rates)
  mesh = sharding.make_mesh(config)
  sharding.check_batch_size('eval.batch_size', config.eval.batch_size, mesh)
  source, data = runs.open_split(opened, split)
  conditions = absences(absent, len(source))
  conditions |= {
    f'missing_{kind}_{rate:g}': missing.present_table(
      source.ids, rate=rate, kind=kind, seed=config.seed, split=split, natural=source.present
    )
    for kind in missing_types
    for rate in missing_rates
  }
  if not conditions:
    raise UserError('--absent: empty; give none, text, image or a --missing_rate')
  towers = model_lib.describe_towers(config)
  modalities = needed(conditions, source)
  model_lib.check_same_towers(meta['backbones'], towers, modalities)
  num_classes = len(meta['class_names'])
  model = model_lib.make_model(config, towers, num_classes=num_classes)
  preprocess = model_lib.make_preprocess(config, towers, num_classes=num_classes)
  variables = runs.restore_variables(opened, model.init, mesh)
  wanted = {split: (source, np.any(list(conditions.values()), axis=0))}
  frozen, stored = extract.open_taps(
    config,
    wanted,
    model=model,
    towers=towers,
    preprocess=preprocess,
    mesh=mesh,
    modalities=modalities,
  )
  recorder = None
  if list(absent) == absence_names(
    config
  ):  # A part of the conditions leaves an earlier record of all as it is.
    recorder = PredictionRecorder(
      source,
      meta['class_names'],
      [f'{name}_absent' for name in absent],
      multi_label=config.dataset.multi_label,
    )
  results = evaluate(
    model,
    variables,
    frozen,
    source,
    preprocess,
    conditions,
    config=config,
    mesh=mesh,
    title=f'evaluating {split}',
    stored=stored[split],
    observers=[recorder] if recorder else [],
  )
  for line in processes.lines_of_all(preprocess.report.line()):
    console.log(line)
  return publish(workdir, split=split, results=results, meta=meta, recorder=recorder, data=data)


def publish(
  workdir: pathlib.Path,
  *,
  split: str,
  results: Mapping[str, Any],
  meta: Mapping[str, Any],
  recorder: PredictionRecorder | None,
  data: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes `evaluation.json` and what the recorder has, prints the new results as a table, returns
  the content of the first.
  """
  record = write(workdir, split=split, results=results, meta=meta, data=data)
  if processes.leads():
    if recorder:
      recorder.write(
        workdir,
        split=split,
        step=meta['step'],
        config_hash=record['config_hash'],
        seed=meta['config']['seed'],
        data=data['digest'],
      )
    title = f'{split} split, {data["examples"]} examples, checkpoint of step {meta["step"]}'
    print_table(results, title)
  return record


def _check_left(
  config: ml_collections.ConfigDict, absent: Collection[str], missing_rates: Collection[float]
) -> None:
  """Raises UserError where a specialist would be left with nothing, or has nothing to lose."""
  legal, this_run = (
    absence_names(config),
    f'a run with config.dataset.modalities={config.dataset.modalities!r}',
  )
  for name in absent:
    if name not in legal:
      raise UserError(f'--absent: {name!r} leaves nothing to {this_run}; give {" or ".join(legal)}')
  if missing_rates and len(resolved.modalities(config)) < 2:
    raise UserError(f'--missing_rate: {this_run} has no second modality to lose; leave it out')


def _check_choice(flag: str, value: str, legal: Collection[str]) -> None:
  if value not in legal:
    raise UserError(f'{flag}: {value!r} is not legal; give one of {", ".join(legal)}')
