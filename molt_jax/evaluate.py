"""Evaluates a run with each modality absent: `python -m molt_jax.evaluate --workdir=DIR`."""

import functools
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
import rich.table

from molt_jax import checkpoint, cli, fill, logbook, sharding
from molt_jax import config as config_lib
from molt_jax import model as model_lib
from molt_jax.config import UserError
from molt_jax.data import datasets, missing, pipeline
from molt_jax.data.sources import Source
from molt_jax.diagnostics import PairDiagnostics
from molt_jax.metrics import ClassificationMetrics
from molt_jax.modules.interface import HeadOutput

# What each named absence keeps: columns image, text.
KEPT = {'none': (True, True), 'text': (True, False), 'image': (False, True)}
COLUMNS = ('accuracy', 'f1_micro', 'f1_macro', 'f1_samples', 'f1_weighted', 'loss')
LIBRARIES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def absences(names: Iterable[str], num_examples: int) -> dict[str, np.ndarray]:
  """Returns condition name -> bool[N, 2], the modalities that each example keeps."""
  return {f'{name}_absent': np.tile(np.array(KEPT[name]), (num_examples, 1)) for name in names}


def eval_step(
    variables: Mapping[str, Any], frozen: Mapping[str, Any], batch: Mapping[str, jax.Array], totals: ClassificationMetrics, *,
    model: model_lib.Model) -> tuple[ClassificationMetrics, HeadOutput]:
  """Adds one batch to the totals, which are stacked over conditions as batch['keep'] bool[B, conditions, 2] is.

  The towers run once, the head once a condition. A row that a condition leaves with nothing has weight 0 there. Returns the new totals, and the
  head's output in the first condition.
  """
  taps = model.taps(frozen, batch)
  present_cbm = batch['present'][None] & jnp.swapaxes(batch['keep'], 0, 1)
  out_c = jax.lax.map(lambda present_bm: model.classify(variables, taps, present_bm), present_cbm)
  weight_cb = batch['weight'][None] * jnp.any(present_cbm, axis=-1)
  totals = jax.vmap(lambda total, logits_bk, weight_b: total.update(logits_bk, batch['label'], weight_b))(totals, out_c.logits_bk, weight_cb)
  return totals, jax.tree.map(lambda x: x[0], out_c)


def evaluate(
    model: model_lib.Model, variables: Mapping[str, Any], frozen: Mapping[str, Any], source: Source, preprocess: pipeline.Preprocess,
    conditions: Mapping[str, np.ndarray], *, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, title: str = 'evaluating',
    step=None, stored: Mapping[str, pipeline.StoredTaps] | None = None, pairs: PairDiagnostics | None = None) -> dict[str, dict[str, float]]:
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
    pairs: collects the pooled pairs of the first condition.

  Returns:
    name -> accuracy, f1_micro, f1_macro, f1_samples, f1_weighted, loss, num_examples.
  """
  keep_ncm = np.stack(list(conditions.values()), axis=1)
  step = step or make_eval_step(model)
  empty = ClassificationMetrics.empty(num_classes=preprocess.num_classes, multi_label=config.dataset.multi_label)
  totals = jax.device_put(jax.tree.map(lambda x: np.zeros((len(conditions), *x.shape), x.dtype), empty), sharding.replicated(mesh))
  batches = pipeline.eval_batches(
      source, preprocess, batch_size=config.eval.batch_size, present=keep_ncm.any(axis=1), stored=stored,
      num_threads=config.input.num_threads, prefetch=config.input.prefetch)
  with cli.progress(title, len(source), 'examples') as bar:
    for batch in batches:
      batch['keep'] = keep_ncm[batch['index']]  # Padding has index -1 and weight 0.
      totals, out = step(variables, frozen, sharding.put_batch(batch, mesh), totals)
      if pairs:
        pairs.observe(out, (batch['weight'] > 0) & (batch['present'] & batch['keep'][:, 0]).all(axis=-1))
      bar.advance(int(np.sum(batch['index'] >= 0)))
  totals = jax.device_get(totals)
  by_condition = {name: jax.tree.map(lambda x, c=c: x[c], totals) for c, name in enumerate(conditions)}
  return {name: {**total.compute(), 'num_examples': int(total.count)} for name, total in by_condition.items()}


def make_eval_step(model: model_lib.Model):
  """Returns the jitted `eval_step` of a model."""
  return jax.jit(functools.partial(eval_step, model=model))


def score(results: Mapping[str, Mapping[str, float]], *, multi_label: bool) -> float:
  """Returns what the best checkpoint is chosen by: accuracy (micro F1 when multi-label), mean over the conditions."""
  key = 'f1_micro' if multi_label else 'accuracy'
  return float(np.mean([result[key] for result in results.values()]))


def needed(conditions: Mapping[str, np.ndarray]) -> list[str]:
  """Returns the modalities that some condition keeps for some example."""
  used = np.any([keep.any(axis=0) for keep in conditions.values()], axis=0)
  return [modality for modality, use in zip(model_lib.MODALITIES, used, strict=True) if use]


def write(workdir: pathlib.Path, *, split: str, num_examples: int, results: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
  """Writes `evaluation.json`; results already there for the same split and checkpoint are kept beside the new ones."""
  path = workdir / 'evaluation.json'
  config = config_lib.from_json(json.dumps(meta['config']))
  record = {
      'split': split, 'num_examples': num_examples, 'step': meta['step'], 'results': dict(results), 'config_hash': config_lib.config_hash(config),
      'backbones': meta['backbones'], 'versions': {name: importlib.metadata.version(name) for name in LIBRARIES}}
  if path.exists():
    old = json.loads(path.read_text(encoding='utf-8'))
    same = ('split', 'step', 'config_hash', 'backbones')
    if all(old.get(key) == record[key] for key in same):
      record['results'] = {**old['results'], **record['results']}
  logbook.write_atomically(path, json.dumps(record, indent=2) + '\n')
  return record


def print_table(results: Mapping[str, Mapping[str, float]], title: str) -> None:
  """Prints one row a condition, in percent (the loss as it is)."""
  table = rich.table.Table(title=title)
  for name in ('condition', 'examples', *COLUMNS):
    table.add_column(name, justify='left' if name == 'condition' else 'right', no_wrap=True)
  for name, result in results.items():
    cells = [f'{result[c]:.3f}' if c == 'loss' else f'{100 * result[c]:.1f}' for c in COLUMNS]
    table.add_row(name.replace('_', ' '), str(int(result['num_examples'])), *cells)
  rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)


FLAGS = (
    cli.Flag('workdir', 'folder of a run of molt_jax.train', required=True),
    cli.Flag('split', 'split to evaluate: train, validation or test', 'test'),
    cli.Flag('absent', 'comma-separated conditions: none, text, image', 'none,text,image'),
    cli.Flag('missing_rate', 'also evaluate with this share of rows lacking a modality, 0 to 1', ''),
    cli.Flag('missing_type', 'what those rows lack: text, image or both', 'both'),
)


@cli.command
def main(argv: Sequence[str]) -> None:
  """Command line of the module."""
  flags, _ = cli.parse('molt_jax.evaluate', 'Evaluate a trained classifier with each modality absent.', FLAGS, argv)
  run(pathlib.Path(flags.workdir), split=flags.split, absent=[n for n in flags.absent.split(',') if n], missing_rate=_rate(flags.missing_rate),
      missing_type=flags.missing_type)


def run(
    workdir: pathlib.Path, *, split: str = 'test', absent: Collection[str] = ('none', 'text', 'image'), missing_rate: float | None = None,
    missing_type: str = 'both') -> dict[str, Any]:
  """Evaluates the run in `workdir`, prints the table, writes `evaluation.json` and returns its content.

  Raises:
    UserError: no run there, an unknown split or condition, a tower that has changed.
  """
  _check_choice('--split', split, ('train', 'validation', 'test'))
  _check_choice('--missing_type', missing_type, ('text', 'image', 'both'))
  for name in absent:
    _check_choice('--absent', name, KEPT)
  config, meta, restore = open_run(workdir)
  mesh = sharding.make_mesh(config)
  sharding.check_batch_size('eval.batch_size', config.eval.batch_size, mesh)
  source = datasets.load_dataset(config).splits[split]
  conditions = absences(absent, len(source))
  if missing_rate is not None:
    conditions[f'missing_{missing_type}_{missing_rate:g}'] = missing.present_table(
        source.ids, rate=missing_rate, kind=missing_type, seed=config.seed, split=split, natural=source.present)
  if not conditions:
    raise UserError('--absent: empty; give none, text, image or a --missing_rate')
  towers = model_lib.describe_towers(config)
  modalities = needed(conditions)
  model_lib.check_same_towers(meta['backbones'], towers, modalities)
  num_classes = len(meta['class_names'])
  model = model_lib.make_model(config, towers, num_classes=num_classes)
  preprocess = model_lib.make_preprocess(config, towers, num_classes=num_classes)
  variables = restore_variables(model, restore, mesh)
  wanted = {split: (source, np.any(list(conditions.values()), axis=0))}
  frozen, stored = fill.open_taps(config, wanted, model=model, towers=towers, preprocess=preprocess, mesh=mesh, modalities=modalities)
  results = evaluate(
      model, variables, frozen, source, preprocess, conditions, config=config, mesh=mesh, title=f'evaluating {split}', stored=stored[split])
  if preprocess.report.counts():
    cli.say(preprocess.report.line())
  return publish(workdir, split=split, num_examples=len(source), results=results, meta=meta)


def publish(workdir: pathlib.Path, *, split: str, num_examples: int, results: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
  """Writes `evaluation.json`, prints the new results as a table, returns the file's content."""
  record = write(workdir, split=split, num_examples=num_examples, results=results, meta=meta)
  print_table(results, f'{split} split, {num_examples} examples, checkpoint of step {meta["step"]}')
  return record


def open_run(workdir: pathlib.Path) -> tuple[ml_collections.ConfigDict, dict[str, Any], Any]:
  """Returns (config, meta, restore) of the run in `workdir`; see `checkpoint.load_model`."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'--workdir: no run in {str(workdir)!r} (config.json is not there); give the --workdir of a run of python -m molt_jax.train')
  config = config_lib.from_json(path.read_text(encoding='utf-8'))
  meta, restore = checkpoint.load_model(workdir, config.eval.select)
  return config, meta, restore


def restore_variables(model: model_lib.Model, restore: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Restores the head's variables onto the mesh."""
  boxed = jax.eval_shape(model.init, jax.random.key(0))
  boxed = {'params': boxed['params'], 'statistics': boxed.get('statistics', {})}
  shardings = sharding.param_shardings(mesh)(boxed)
  return restore(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings))


def _rate(text: str) -> float | None:
  if not text:
    return None
  try:
    rate = float(text)
  except ValueError:
    rate = -1.0
  if not 0 <= rate <= 1:
    raise UserError(f'--missing_rate: {text!r} is not legal; give a number from 0 to 1')
  return rate


def _check_choice(flag: str, value: str, legal: Collection[str]) -> None:
  if value not in legal:
    raise UserError(f'{flag}: {value!r} is not legal; give one of {", ".join(legal)}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
