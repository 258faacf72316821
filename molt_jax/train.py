"""Trains a robust classifier: `python -m molt_jax.train --config=configs/quickstart.py --workdir=DIR`.

DIR holds config.json (resolved), metrics.jsonl, events/ (TensorBoard), checkpoints/{latest,best}/ and, at the end, evaluation.json. The same command
goes on where a run stopped, bit for bit.
"""

import collections
import functools
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from molt_jax import checkpoint, cli, evaluate, fill, logbook, processes, sharding, train_state, translate
from molt_jax import config as config_lib
from molt_jax import model as model_lib
from molt_jax import step as step_lib
from molt_jax.config import UserError
from molt_jax.data import datasets, missing, pipeline
from molt_jax.data.sources import Dataset, Source
from molt_jax.diagnostics import PairDiagnostics
from molt_jax.modules.inputs import STRATEGIES
from molt_jax.objectives import classification

IN_FLIGHT = 2  # Steps dispatched before the oldest one's loss is looked at.


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved. Arguments: what to tell the user, the signal's number."""


# ---- The loop ------------------------------------------------------------------------------------------------------------------------


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains (or goes on training) in `workdir`, then evaluates the test split with each modality absent.

  Args:
    config: a validated config.
    workdir: the run's folder; made if need be.

  Returns:
    The content of evaluation.json.

  Raises:
    UserError: a mistake of the user's, or a loss that is not finite.
    Interrupted: SIGTERM or SIGINT; the state is saved.
  """
  workdir = check_workdir(config, pathlib.Path(workdir))
  mesh = sharding.make_mesh(config)
  for name, parts in (('train', config.train.accumulate), ('eval', 1)):
    sharding.check_batch_size(f'{name}.batch_size', config[name].batch_size, mesh, parts=parts)
  towers = model_lib.describe_towers(config)
  with processes.leader_first('data set'):
    data = datasets.load_dataset(config)
  model = model_lib.make_model(config, towers, num_classes=len(data.class_names))
  preprocess = model_lib.make_preprocess(config, towers, num_classes=len(data.class_names))
  checkpoints = checkpoint.Checkpoints(workdir)
  saved = checkpoints.meta()
  meta = {
      'config': config.to_dict(), 'backbones': model_lib.identities(towers), 'class_names': list(data.class_names), 'score': None, 'step': 0}
  if saved:
    check_same_run(saved, meta, towers)
  plan = Plan(config, len(data.splits['train']))
  tx = train_state.make_optimizer(config, plan.total)
  estimator = step_lib.make_cca_estimator(config, mesh)
  init_cca = functools.partial(estimator.init, model.num_taps, config.molt.width)
  state = train_state.create(model.init, tx, init_cca, seed=config.seed, mesh=mesh)
  introduce(config, data, towers, state, plan)
  kept = {split: protocol(config, source, split) for split, source in data.splits.items() if split != 'test'}
  wanted = {split: (source, kept.get(split, source.present)) for split, source in data.splits.items()}
  frozen, stored = fill.open_taps(config, wanted, model=model, towers=towers, preprocess=preprocess, mesh=mesh)
  iterator = pipeline.train_iterator(
      data.splits['train'], preprocess, batch_size=config.train.batch_size, seed=config.seed, present=kept['train'], stored=stored['train'],
      pad_to_longest=config.text.padding == 'longest', num_threads=config.input.num_threads, prefetch=config.input.prefetch,
      **sharding.data_shard(mesh))
  if saved:
    state = checkpoints.restore(state, iterator)
    cli.say(f'going on from step {int(state.step)} of {plan.total} in {workdir}')
  run = _Run(config, workdir, mesh, model, tx, estimator, data, preprocess, checkpoints, meta, plan, frozen, stored, class_weights(config, data))
  if processes.leads():
    claim_workdir(config, workdir)
  with stop_on_signals() as stop:
    state = run.loop(state, iterator, stop)
  checkpoints.close()
  processes.wait('checkpoints written')
  record = run.test()
  for line in processes.lines_of_all(preprocess.report.line()):
    cli.say(line)
  return record


class Plan:
  """The run's step numbers: total steps, and when validation and saving are due."""

  def __init__(self, config: ml_collections.ConfigDict, num_examples: int):
    self.per_epoch = num_examples / config.train.batch_size
    self.total = max(1, math.ceil(config.train.epochs * self.per_epoch))
    self._eval_every = config.train.eval_every or max(1, round(self.per_epoch))
    self._save_every = config.train.save_every or self._eval_every

  def validate_at(self, step: int) -> bool:
    return step == self.total or step % self._eval_every == 0

  def save_at(self, step: int) -> bool:
    return step == self.total or step % self._save_every == 0


class _Run:
  """One run: everything that stays the same from step to step."""

  def __init__(self, config, workdir, mesh, model, tx, estimator, data, preprocess, checkpoints, meta, plan, frozen, stored, class_weight_k):
    self.config, self.workdir, self.mesh, self.model, self.data, self.preprocess = config, workdir, mesh, model, data, preprocess
    self.checkpoints, self.meta, self.plan, self.class_weight_k = checkpoints, meta, plan, class_weight_k
    self.frozen, self.stored = frozen, stored
    self.estimator = estimator
    frozen_config = ml_collections.FrozenConfigDict(config)
    self.step_fn = jax.jit(functools.partial(step_lib.train_step, model=model, tx=tx, estimator=estimator, config=frozen_config), donate_argnums=0)
    self.eval_fn = evaluate.make_eval_step(model)
    self.translation_fit = None
    if STRATEGIES[config.missing.strategy].translates:
      source = data.splits['train']
      self.translation_fit = translate.TranslationFit(
          model, source, preprocess, present=protocol(config, source, 'train'), stored=stored['train'], config=config, mesh=mesh)
    self.schedule = train_state.make_schedule(config, plan.total)
    self.best = checkpoints.meta(checkpoint.BEST).get('score', -1.0)
    validation = data.splits['validation']
    kept = evaluate.absences(evaluate.absence_names(config), len(validation))
    allowed = protocol(config, validation, 'validation')
    self.conditions = {name: keep & allowed for name, keep in kept.items()}

  def loop(self, state, iterator, stop):
    """Restored state -> [validate the old state -> save -> next batch -> step -> log]; this order makes resuming exact."""
    start = step = int(state.step)
    log = logbook.Logbook(self.workdir, step=start) if processes.leads() else logbook.NoLogbook()
    agree = processes.Agreement(self.mesh, delay=IN_FLIGHT)
    watch = Watch(self, log, start)
    with cli.progress('training', self.plan.total, 'steps', done=start) as bar:
      while True:
        asked = agree(stop() or 0)
        stopping = asked and step > start
        if step > start and (self.plan.validate_at(step) or self.plan.save_at(step) or stopping):
          watch.drain()
          state = self._translate(state, step)
          self._validate_and_save(state, iterator, log, step, stopping)
          watch.restart_clock()
        if step == self.plan.total:
          break
        if asked:
          self.checkpoints.close()
          raise Interrupted(f'stopped at step {step} of {self.plan.total}, saved; the same command goes on from here', asked)
        batch = sharding.put_batch(next(iterator), self.mesh)
        state, metrics = self.step_fn(state, self.frozen, batch, self.class_weight_k)
        step += 1
        watch.dispatched(step, metrics, batch['index'])
        bar.advance(1, watch.note)
    log.close()
    return state

  def _translate(self, state, step):
    if not (self.translation_fit and self.plan.validate_at(step)):
      return state
    return state.replace(statistics=self.translation_fit({'params': state.params, 'statistics': state.statistics}, self.frozen))

  def _validate_and_save(self, state, iterator, log, step, stopping):
    best = False
    if self.plan.validate_at(step):
      pairs = PairDiagnostics()
      results = evaluate.evaluate(
          self.model, {'params': state.params, 'statistics': state.statistics}, self.frozen, self.data.splits['validation'], self.preprocess,
          self.conditions, config=self.config, mesh=self.mesh, title='validating', step=self.eval_fn,
          stored=self.stored['validation'], pairs=pairs)
      score = evaluate.score(results, multi_label=self.config.dataset.multi_label)
      log.write('validation', step, {**results, 'score': score, 'pairs': pairs.compute(self.estimator, state.cca, ridge=self.config.cca.ridge)})
      cli.say(f'step {step}/{self.plan.total}: validation score {score:.4f} (mean over {", ".join(n.replace("_", " ") for n in results)})')
      best = score > self.best
      self.best = max(score, self.best)
      self.meta = {**self.meta, 'score': score}
    meta = {**self.meta, 'step': step}
    if best:
      self.checkpoints.save(state, iterator, meta, kind=checkpoint.BEST)
    if best or stopping or self.plan.save_at(step):
      self.checkpoints.save(state, iterator, meta, kind=checkpoint.LATEST)

  def test(self):
    """Scores the test split with the selected checkpoint and each modality absent; writes evaluation.json."""
    _, meta, restore = evaluate.open_run(self.workdir)
    source = self.data.splits['test']
    conditions = evaluate.absences(evaluate.absence_names(self.config), len(source))
    results = evaluate.evaluate(
        self.model, evaluate.restore_variables(self.model, restore, self.mesh), self.frozen, source, self.preprocess, conditions,
        config=self.config, mesh=self.mesh, title='evaluating test', step=self.eval_fn, stored=self.stored['test'])
    return evaluate.publish(self.workdir, split='test', num_examples=len(source), results=results, meta=meta)


class Watch:
  """Looks at each step's loss when it has come, two steps late so that the device never waits; stops the run on one that is not finite."""

  def __init__(self, run: Any, log: logbook.Logbook, step: int):
    """`run` has config, workdir, plan, schedule (the learning rate's) and data."""
    self.run, self.log, self.note = run, log, ''
    self._flying = collections.deque()
    self.restart_clock()

  def restart_clock(self):
    self._since, self._images = None, 0

  def dispatched(self, step, metrics, index):
    self._flying.append((step, metrics, index))
    if len(self._flying) > IN_FLIGHT:
      self._land()

  def drain(self):
    while self._flying:
      self._land()

  def _land(self):
    step, metrics, index = self._flying.popleft()
    loss = float(metrics['loss'])
    if not (math.isfinite(loss) and math.isfinite(float(metrics['grad_norm']))):
      self._not_finite(step, loss, index)
    self.note = f'loss {loss:.4f}'
    self._count(len(index))
    if step % self.run.config.train.log_every == 0 or step == self.run.plan.total:
      self._write(step, jax.device_get(metrics))

  def _count(self, images):
    if self._since is None:  # The first step after a pause (compilation, validation) starts the clock and is not counted.
      self._since = time.monotonic()
    else:
      self._images += images

  def _write(self, step, metrics):
    seconds = time.monotonic() - self._since
    values = {name: value.tolist() for name, value in metrics.items()}
    values |= {'learning_rate': float(self.run.schedule(step - 1)), 'epoch': round(step / self.run.plan.per_epoch, 4)}
    if self._images:
      values['images_per_second'] = round(self._images / seconds, 2)
    self.log.write('train', step, values)
    self._since, self._images = time.monotonic(), 0

  def _not_finite(self, step, loss, index):
    ids = [self.run.data.splits['train'].ids[i] for i in processes.fetch(index)]
    path = self.run.workdir / 'not_finite.json'
    if processes.leads():
      logbook.write_atomically(path, json.dumps({'step': step, 'loss': str(loss), 'ids': ids}, indent=2) + '\n')
    raise UserError(
        f'loss {loss} at step {step} is not finite; the batch is in {path}, the last good state in checkpoints/; lower '
        f'config.optimizer.learning_rate ({self.run.config.optimizer.learning_rate}) or set config.optimizer.clip_norm')


# ---- Around the loop -----------------------------------------------------------------------------------------------------------------


def check_workdir(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, *, schema: Mapping[str, Any] = config_lib.SCHEMA) -> pathlib.Path:
  """Returns the folder unless it holds a run with another config; `schema` is that of the command."""
  path = workdir / 'config.json'
  if path.exists():
    changed = config_lib.differences(config_lib.from_json(path.read_text(encoding='utf-8'), schema), config)
    changed = [line for line in changed if line.split(':')[0] not in FREE_ON_RESUME]
    if changed:
      raise UserError(f'--workdir: {str(workdir)!r} holds a run with another config ({"; ".join(changed)}); give another folder or that config')
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'--workdir: {str(workdir)!r} is a file; give a folder')
  return workdir


def claim_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Makes the folder and writes config.json; called when nothing is left that the user could have to mend first."""
  workdir.mkdir(parents=True, exist_ok=True)
  logbook.write_atomically(workdir / 'config.json', config_lib.to_json(config) + '\n')


# Fields that say where and how fast to compute, not what: a resumed run may change them.
FREE_ON_RESUME = (
    'platform', 'mesh.data', 'mesh.model', 'text.padding', 'input.num_threads', 'input.prefetch', 'dataset.data_dir', 'eval.batch_size',
    'eval.select')


def check_same_run(saved: Mapping[str, Any], meta: Mapping[str, Any], towers: Mapping[str, Any]) -> None:
  """Raises UserError unless the checkpoint belongs to these towers and these classes."""
  model_lib.check_same_towers(saved['backbones'], towers)
  if saved['class_names'] != meta['class_names']:
    raise UserError(
        f'config.dataset: the checkpoint in --workdir knows {len(saved["class_names"])} classes, the data now has {len(meta["class_names"])} '
        'or other names; give the data it was trained on, or another --workdir')


def protocol(config: ml_collections.ConfigDict, source: Source, split: str) -> np.ndarray:
  """Returns bool[N, 2], the modalities that the missing-rate protocol leaves to each row."""
  c = config.missing
  rate, kind = (c.train_rate, c.train_type) if split == 'train' else (c.eval_rate, c.eval_type)
  return missing.present_table(source.ids, rate=rate, kind=kind, seed=config.seed, split=split, natural=source.present)


def class_weights(config: ml_collections.ConfigDict, data: Dataset) -> np.ndarray | None:
  """Returns float32[K] from the training split's class counts, or None."""
  if config.loss.class_weights == 'none':
    return None
  labels = data.splits['train'].labels
  count_k = np.bincount(np.concatenate([np.atleast_1d(label) for label in labels]).astype(int), minlength=len(data.class_names))
  if config.dataset.multi_label:
    return classification.balanced_positive_weights(count_k, num_examples=len(labels))
  return classification.balanced_class_weights(count_k)


def introduce(config, data, towers, state, plan) -> None:
  """Says in a few lines what is about to be trained."""
  sizes = ', '.join(f'{len(source)} {name}{_gaps(source)}' for name, source in data.splits.items())
  cli.say(f'data: {data.name}, {sizes}, {len(data.class_names)} classes')
  for modality, tower in towers.items():
    note = ' (RANDOM weights: nothing was learned before)' if tower.identity['path'].startswith('random:') else ''
    cli.say(f'{modality} tower: {tower.identity["path"]}, {tower.config.num_layers} layers, width {tower.config.hidden_size}, frozen{note}')
  cli.say(f'head: {config.method}, {train_state.count(state.params):,} parameters; {plan.total} steps of {config.train.batch_size}')


def _gaps(source: Source) -> str:
  """Says how many rows lack a modality by nature; nothing where none does."""
  image_n, text_n = source.present.T
  counts = {'both': image_n & text_n, 'image only': image_n & ~text_n, 'text only': text_n & ~image_n}
  return '' if counts['both'].all() else f' ({", ".join(f"{np.sum(has_n)} {name}" for name, has_n in counts.items())})'


class stop_on_signals:
  """Context in which SIGTERM and SIGINT only ask to stop; a second SIGINT stops at once."""

  def __enter__(self):
    self._asked = None
    self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    return lambda: self._asked

  def _ask(self, number, frame):
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = number

  def __exit__(self, *exc):
    for number, handler in self._old.items():
      signal.signal(number, handler)


FLAGS = (
    cli.Flag('config', 'preset, e.g. configs/quickstart.py', required=True),
    cli.Flag('workdir', 'folder of the run', required=True),
)


@cli.command
def main(argv: Sequence[str]) -> int | None:
  """Command line of the module. Exit code 0: done; 2: a mistake of the user's; 130 or 143: stopped by a signal, saved."""
  processes.join()
  flags, overrides = cli.parse('molt_jax.train', 'Train a robust image+text classifier on frozen towers.', FLAGS, argv)
  try:
    train(config_lib.load_config(flags.config, overrides), pathlib.Path(flags.workdir))
  except Interrupted as stopped:
    message, number = stopped.args
    cli.say(message)
    return 128 + number
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
