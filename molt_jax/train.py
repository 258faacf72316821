"""Trains a robust classifier: `python -m molt_jax.train --config=configs/quickstart.py
--workdir=DIR`.

DIR holds config.json (resolved), metrics.jsonl, events/ (TensorBoard), checkpoints/{latest,best}/
and, at the end, evaluation.json, run.json (data, device, seconds, memory) and what
`molt_jax/evaluation/records.py` describes. The same command goes on where a run stopped, bit for
bit.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from molt_jax import evaluate
from molt_jax.config import schema as config_lib
from molt_jax.data import datasets, missing, pipeline
from molt_jax.data.sources import UNLABELLED, Dataset, Source, classes_of
from molt_jax.evaluation import records
from molt_jax.evaluation.diagnostics import MAX_PAIRS, PairDiagnostics
from molt_jax.evaluation.recorder import PredictionRecorder
from molt_jax.features import extract, store
from molt_jax.methods import model as model_lib
from molt_jax.methods.parts.inputs import STRATEGIES
from molt_jax.objectives import cross_entropy
from molt_jax.runtime import cli, processes, sharding
from molt_jax.training import checkpoint, imputation_fit, loop, runs, train_state
from molt_jax.training import step as step_lib


def train(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, data_changed: bool = False
) -> dict[str, Any]:
  """Trains (or goes on training) in `workdir`, then evaluates the test split with each modality
  absent.

  Args:
    config: a validated config.
    workdir: the run's folder; made if need be.
    data_changed: go on with data that have changed since the checkpoint; refused otherwise.

  Returns:
    The content of evaluation.json.

  Raises:
    UserError: a mistake of the user's, or a loss that is not finite.
    loop.Interrupted: SIGTERM or SIGINT; the state is saved.
  """
  with loop.working_in(config, pathlib.Path(workdir)) as workdir:
    if config.features.store:
      store.make_root(config.features.store)
    return _train(config, workdir, data_changed)


def _train(config, workdir, data_changed):
  mesh = sharding.make_mesh(config)
  for name, parts in (('train', config.train.accumulate), ('eval', 1)):
    sharding.check_batch_size(f'{name}.batch_size', config[name].batch_size, mesh, parts=parts)
  towers = model_lib.describe_towers(config)
  with processes.leader_first('data set'):
    data = datasets.load_dataset(config)
  checkpoints = checkpoint.Checkpoints(workdir)
  saved = checkpoints.meta()
  data = runs.go_on(saved, config, towers, data, checkpoints=checkpoints, data_changed=data_changed)
  model = model_lib.make_model(config, towers, num_classes=len(data.class_names))
  preprocess = model_lib.make_preprocess(config, towers, num_classes=len(data.class_names))
  meta = runs.new_meta(config, towers, data)
  plan = loop.Plan(config, len(data.splits['train']))
  tx = train_state.make_optimizer(config, plan.total)
  estimator = step_lib.make_cca_estimator(config, mesh)
  init_cca = functools.partial(estimator.init, model.num_taps, config.molt.width)
  state = train_state.create(model.init, tx, init_cca, seed=config.seed, mesh=mesh)
  introduce(config, data, towers, state, plan)
  state, position = checkpoints.restore(state) if saved else (state, None)
  kept = {
    split: protocol(config, source, split)
    for split, source in data.splits.items()
    if split != 'test'
  }
  wanted = {
    split: (source, kept.get(split, source.present)) for split, source in data.splits.items()
  }
  frozen, stored = extract.open_taps(
    config, wanted, model=model, towers=towers, preprocess=preprocess, mesh=mesh
  )
  source = data.splits['train']
  iterator = _iterator(config, mesh, source, preprocess, kept['train'], stored['train'])
  if saved:
    checkpoints.move(iterator, position)
    cli.say(f'going on from step {int(state.step)} of {plan.total} in {workdir}')
  run = _Run(
    config,
    workdir,
    mesh,
    data,
    checkpoints,
    meta,
    plan,
    model=model,
    tx=tx,
    estimator=estimator,
    preprocess=preprocess,
    frozen=frozen,
    stored=stored,
    class_weight_k=class_weights(config, data),
  )
  if processes.leads():
    loop.claim_workdir(config, workdir)
  facts = {
    'examples': {split: len(source) for split, source in data.splits.items()},
    'parameters': train_state.count(state.params),
  }
  with loop.accounted(workdir, facts, step=int(state.step)):
    run.run(state, iterator)
    record = run.test()
  for line in processes.lines_of_all(preprocess.report.line()):
    cli.say(line)
  return record


def _iterator(config, mesh, source, preprocess, present, stored):
  return pipeline.train_iterator(
    source,
    preprocess,
    batch_size=config.train.batch_size,
    seed=config.seed,
    present=present,
    stored=stored,
    pack=sharding.packing(config, mesh, parts=config.train.accumulate),
    num_threads=config.input.num_threads,
    prefetch=config.input.prefetch,
    **sharding.data_shard(mesh),
  )


class _Run(loop.Loop):
  """A run of the head."""

  title, unit = 'training', 'steps'

  def __init__(
    self,
    config,
    workdir,
    mesh,
    data,
    checkpoints,
    meta,
    plan,
    *,
    model,
    tx,
    estimator,
    preprocess,
    frozen,
    stored,
    class_weight_k,
  ):
    super().__init__(config, workdir, mesh, data, checkpoints, meta, plan)
    self.model, self.estimator, self.preprocess, self.frozen, self.stored, self.class_weight_k = (
      model,
      estimator,
      preprocess,
      frozen,
      stored,
      class_weight_k,
    )
    frozen_config = ml_collections.FrozenConfigDict(config)
    self.step_fn = jax.jit(
      functools.partial(
        step_lib.train_step, model=model, tx=tx, estimator=estimator, config=frozen_config
      ),
      donate_argnums=0,
    )
    self.eval_fn = evaluate.make_eval_step(model)
    self.translation_fit = None
    if STRATEGIES[config.missing.strategy].translates:
      source = data.splits['train']
      self.translation_fit = imputation_fit.TranslationFit(
        model,
        source,
        preprocess,
        present=protocol(config, source, 'train'),
        stored=stored['train'],
        config=config,
        mesh=mesh,
      )
    validation = data.splits['validation']
    kept = evaluate.absences(evaluate.absence_names(config), len(validation))
    allowed = protocol(config, validation, 'validation')
    self.conditions = {name: keep & allowed for name, keep in kept.items()}

  def step(self, state, batch):
    return self.step_fn(state, self.frozen, batch, self.class_weight_k)

  def refresh(self, state):
    if not self.translation_fit:
      return state
    return state.replace(statistics=self.translation_fit(_variables(state), self.frozen))

  def validate(self, state, watch):
    pairs = PairDiagnostics()
    results = self._evaluate(
      _variables(state),
      self.data.splits['validation'],
      self.stored['validation'],
      self.conditions,
      title='validating',
      observers=[pairs],
    )
    multi_label = self.config.dataset.multi_label
    score = evaluate.score(results, multi_label=multi_label)
    diagnostics = pairs.compute(self.estimator, state.cca, ridge=self.config.cca.ridge)
    record = results | ({} if score is None else {'score': score}) | {'pairs': diagnostics}
    return record, evaluate.describe_score(results, multi_label=multi_label)

  def test(self):
    """Scores the test split with the selected checkpoint and each modality absent; writes
    evaluation.json and what a report shows.
    """
    done = runs.open_run(self.workdir)
    meta = done.meta
    source = self.data.splits['test']
    conditions = evaluate.absences(evaluate.absence_names(self.config), len(source))
    variables = runs.restore_variables(done, self.model.init, self.mesh)
    pairs, recorder = (
      PairDiagnostics(),
      PredictionRecorder(
        source, self.data.class_names, list(conditions), multi_label=self.config.dataset.multi_label
      ),
    )
    results = self._evaluate(
      variables,
      source,
      self.stored['test'],
      conditions,
      title='evaluating test',
      observers=[pairs, recorder],
    )
    self._record_pairs(variables, pairs, meta['step'])
    data = runs.compare(done, 'test', self.meta['data']['test'])
    return evaluate.publish(
      self.workdir, split='test', results=results, meta=meta, recorder=recorder, data=data
    )

  def _record_pairs(self, variables, pairs, step):
    """Writes pairs.npz: the pairs of the test split beside up to MAX_PAIRS of the training
    split.
    """
    if pairs.pairs is None:
      return
    source, stored = imputation_fit.complete_pairs(
      self.data.splits['train'],
      self.stored['train'],
      protocol(self.config, self.data.splits['train'], 'train'),
      limit=MAX_PAIRS,
      seed=self.config.seed,
      name='pairs',
    )
    training, everything = (
      PairDiagnostics(),
      evaluate.absences(evaluate.absence_names(self.config), len(source)),
    )
    if len(source):
      self._evaluate(
        variables, source, stored, everything, title='reading training pairs', observers=[training]
      )
    shown = pairs.picture(
      training,
      batch_size=self.config.train.batch_size,
      ridge=self.config.cca.ridge,
      split='test',
      step=step,
      layer_weights_l=variables['params'].get('layer_weights'),
    )
    if shown and processes.leads():
      shown.save(self.workdir / records.PAIRS)

  def _evaluate(self, variables, source, stored, conditions, **how):
    return evaluate.evaluate(
      self.model,
      variables,
      self.frozen,
      source,
      self.preprocess,
      conditions,
      config=self.config,
      mesh=self.mesh,
      step=self.eval_fn,
      stored=stored,
      **how,
    )


def _variables(state):
  return {'params': state.params, 'statistics': state.statistics}


def protocol(config: ml_collections.ConfigDict, source: Source, split: str) -> np.ndarray:
  """Returns bool[N, 2], the modalities that the missing-rate protocol leaves to each row."""
  c = config.missing
  rate, kind = (c.train_rate, c.train_type) if split == 'train' else (c.eval_rate, c.eval_type)
  return missing.present_table(
    source.ids, rate=rate, kind=kind, seed=config.seed, split=split, natural=source.present
  )


def class_weights(config: ml_collections.ConfigDict, data: Dataset) -> np.ndarray | None:
  """Returns float32[K] from the training split's class counts, or None."""
  if config.loss.class_weights == 'none':
    return None
  labels = data.splits['train'].labels
  count_k = np.bincount(
    [k for label in labels for k in classes_of(label)], minlength=len(data.class_names)
  )
  if config.dataset.multi_label:
    return cross_entropy.balanced_positive_weights(count_k, num_examples=len(labels))
  return cross_entropy.balanced_class_weights(count_k)


def introduce(config, data, towers, state, plan) -> None:
  """Says in a few lines what is about to be trained."""
  sizes = ', '.join(f'{len(source)} {name}{_gaps(source)}' for name, source in data.splits.items())
  cli.say(f'data: {data.name}, {sizes}, {len(data.class_names)} classes')
  for modality, tower in towers.items():
    note = (
      ' (RANDOM weights: nothing was learned before)'
      if tower.identity['path'].startswith('random:')
      else ''
    )
    cli.say(

        f'{modality} tower: {tower.identity["path"]}, {tower.config.num_layers} layers, width '
        f'{tower.config.hidden_size}, frozen{note}'

    )
  cli.say(

      f'head: {config.method}, {train_state.count(state.params):,} parameters; {plan.total} steps '
      'of '
      f'{config.train.batch_size}'

  )


def _gaps(source: Source) -> str:
  """Says how many rows lack a modality or their label by nature; nothing where none does."""
  image_n, text_n = source.present.T
  counts = {
    'both': image_n & text_n,
    'image only': image_n & ~text_n,
    'text only': text_n & ~image_n,
  }
  said = (
    [] if counts['both'].all() else [f'{np.sum(has_n)} {name}' for name, has_n in counts.items()]
  )
  unlabelled = sum(label == UNLABELLED for label in source.labels)
  said += [f'{unlabelled} without a label'] if unlabelled else []
  return f' ({", ".join(said)})' if said else ''


FLAGS = (
  cli.Flag('config', 'preset, e.g. configs/quickstart.py', required=True),
  cli.Flag('workdir', 'folder of the run', required=True),
  cli.Flag('data_changed', 'go on with data that have changed since the checkpoint', switch=True),
)


@cli.command
def main(argv: Sequence[str]) -> int | None:
  """Command line of the module. Exit code 0: done; 2: a mistake of the user's; 130 or 143: stopped
  by a signal, saved.
  """
  purpose = 'Train a robust image+text classifier on frozen towers.'
  flags, overrides = cli.parse('molt_jax.train', purpose, FLAGS, argv)
  config = config_lib.load_config(flags.config, overrides)
  processes.join()
  workdir, data_changed = pathlib.Path(flags.workdir), flags.data_changed
  return loop.exit_code(lambda: train(config, workdir, data_changed=data_changed))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
