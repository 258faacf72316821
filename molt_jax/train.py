"""Trains a robust classifier: `python -m molt_jax.train --config=quickstart --workdir=DIR`.

DIR holds config.json (resolved), metrics.jsonl, events/ (TensorBoard), checkpoints/{latest,best}/
and, at the end, evaluation.json, run.json (data, device, seconds, memory) and what
`molt_jax/evaluation/records.py` describes; rows_set_aside.csv where rows of a table are odd. The
same command goes on where a run stopped, bit for bit.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('train', sys.argv[1:]))

import argparse
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from molt_jax.config.resolved import modalities
from molt_jax.data import checks, missing, pipeline
from molt_jax.data.sources import Source, classes_of
from molt_jax.data.tables.rows import aside_as_csv
from molt_jax.errors import UserError
from molt_jax.evaluation import calibration, records, results, scoring, thresholds, trained
from molt_jax.evaluation.diagnostics import MAX_PAIRS, PairDiagnostics
from molt_jax.evaluation.recorder import PredictionRecorder
from molt_jax.features import opening, store
from molt_jax.methods.parts.inputs import STRATEGIES
from molt_jax.runtime import atomic, console, logbook, processes
from molt_jax.runtime.signals import exit_code
from molt_jax.training import (
  announcing,
  fast,
  imputation_fit,
  losses,
  ridge_fit,
  search,
  warm_start,
  workdir,
)
from molt_jax.training.monitor import StepMonitor
from molt_jax.training.schedule import StepSchedule
from molt_jax.training.train_state import TrainState
from molt_jax.training.trainer import Trainer

ASIDE = 'rows_set_aside.csv'
CHECKED_IMAGES = 500  # Of each split, decoded to find those that are nearly the same.


@dataclasses.dataclass(frozen=True)
class Choices:
  """What is chosen for a run beside its config.

  Attributes:
    preset: how much is spent, one of `qualities.QUALITIES`.
    given: fields of the config that the user has set, which `preset` leaves alone.
    time_limit: seconds after which training ends, once it has gone through the data; None: none.
    init_from: folder of a run to begin with what it has learned; '': none.
  """

  preset: str = 'good'
  given: Collection[str] = ()
  time_limit: float | None = None
  init_from: str = ''


AS_IT_IS = Choices()


def choices_of(flags: argparse.Namespace) -> Choices:
  """Returns the choices that the flags of a command say."""
  return Choices(flags.preset, flags.given, flags.time_limit, flags.init_from)


def train(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  *,
  data_changed: bool = False,
  facts: Mapping[str, Any] | None = None,
  choices: Choices = AS_IT_IS,
) -> dict[str, Any]:
  """Trains (or goes on training) in `folder`, then evaluates the test split with each modality
  absent.

  Args:
    config: a validated config of a classifier.
    folder: the run's folder; made if need be.
    data_changed: go on with data that have changed since the checkpoint; refused otherwise.
    facts: what run.json shall say beside.
    choices: how much is spent, and what the run begins with.

  Returns:
    The content of evaluation.json.

  Raises:
    UserError: a mistake of the user's, or a loss that is not finite.
    Interrupted: SIGTERM or SIGINT; the state is saved.
  """
  folder, limit = pathlib.Path(folder), choices.time_limit
  deadline = math.inf if limit is None else time.monotonic() + limit

  def run(kind, config, folder, deadline):
    with workdir.working_in(config, folder) as folder:
      if config.features.store:
        store.make_root(config.features.store)
      trainer = kind(config, folder, data_changed=data_changed)
      trainer.more_facts, trainer.deadline = facts or {}, deadline
      trainer.init_from = choices.init_from
      return trainer.run()

  if choices.preset == 'fast':
    config = fast.choose(config, choices.given, begins_with=choices.init_from)
  if choices.preset == 'best':
    _check_search(config)
    trial = functools.partial(run, Trial)
    how = {'given': choices.given, 'deadline': deadline}
    config = search.Search(config, folder, trial, **how).choose()
  return run(ClassifierTrainer, config, folder, deadline)


def _check_search(config: ml_collections.ConfigDict) -> None:
  """Raises UserError where `--preset=best` would take too long, or is not for this."""
  if not config.features.store:
    raise UserError(
      '--preset=best: config.features.store is empty, so that each trial would run the towers '
      'anew; give --config.features.store=FOLDER'
    )
  if jax.process_count() > 1:
    raise UserError('--preset=best: it searches in one process; start one')


class ClassifierTrainer(Trainer):
  """A run of a classifier.

  Attributes:
    init_from: see `Choices`.
  """

  title, unit = 'training', 'steps'
  init_from = ''

  @property
  def config(self) -> ml_collections.ConfigDict:
    return self.assembly.config

  @property
  def _trains_towers(self) -> bool:
    return any(self.config.backbones[m].trainable for m in modalities(self.config))

  def num_examples(self) -> int:
    """See `Trainer`."""
    return len(self.assembly.data.splits['train'])

  def before_state(self) -> None:
    """See `Trainer`."""
    self.objective = losses.make_objective(self.assembly)
    self._warm_start = None
    if self.init_from and not self.is_resumed:
      self._warm_start = warm_start.open(self.init_from, self.assembly)

  def introduce(self, state: TrainState, schedule: StepSchedule) -> None:
    """See `Trainer`."""
    announcing.introduce(self.assembly, state, schedule)
    if self.config.dataset.name == 'table' and not self.is_resumed:
      for finding in checks.look(self.assembly.data, sample=CHECKED_IMAGES):
        console.log(f'check: {finding.message}')
    if self.assembly.data.aside and processes.is_main():
      path = self.workdir / ASIDE
      atomic.write(path, aside_as_csv(self.assembly.data.aside))
      console.log(f'odd rows that are set aside are listed in {path}')

  def open_features(self) -> None:
    """See `Trainer`."""
    splits = self.assembly.data.splits
    # Of each split, what the missing-rate protocol leaves; of the test split, what it has.
    self._left = {name: source.present for name, source in splits.items()}
    for name in ('train', 'validation'):
      self._left[name] = protocol(self.config, splits[name], name)
    wanted = {name: (source, self._left[name]) for name, source in splits.items()}
    self.frozen, self._stored = opening.open_features(self.assembly.extraction, wanted)
    self._score = scoring.Scorer(self.assembly)
    self._imputation = None
    if STRATEGIES[self.config.missing.strategy].imputes:
      self._imputation = imputation_fit.ImputationFit(
        self.assembly, splits['train'], self._left['train'], self._stored['train']
      )

    self._ridge = None
    if self.assembly.method.closed_form:
      self._ridge = ridge_fit.RidgeFit(self.assembly, self._left, self._stored)

  def iterator(self) -> Any:
    """See `Trainer`."""
    return pipeline.train_iterator(
      self.assembly.data.splits['train'],
      self.assembly.preprocess,
      self.assembly.batching('train'),
      seed=self.config.seed,
      present=self._left['train'],
      stored=self._stored['train'],
    )

  def begin(self, state: TrainState) -> TrainState:
    """See `Trainer`."""
    state = super().begin(state)
    if self._warm_start:
      found = self._warm_start(self.assembly, _variables(state))
      state = state.replace(params=found['params'], statistics=found['statistics'])
    if not self._ridge:
      return state
    return state.replace(statistics=self._ridge.fit(_variables(state), self.frozen))

  def refresh(self, state: TrainState) -> TrainState:
    """See `Trainer`."""
    if self._imputation:
      state = state.replace(statistics=self._imputation(_variables(state), self.frozen))
    if self._ridge and self.assembly.method.weighs_head:
      if self._trains_towers:  # What it was fitted to is no longer what is read.
        state = state.replace(statistics=self._ridge.fit(_variables(state), self.frozen))
      state = state.replace(statistics=self._ridge.weigh(_variables(state), self.frozen))
    return state

  def validate(self, state: TrainState, monitor: StepMonitor) -> tuple[dict[str, Any], str]:
    """See `Trainer`."""
    del monitor
    source = self.assembly.data.splits['validation']
    conditions = scoring.conditions_of(scoring.missing_names(self.config), len(source))
    conditions = {name: keep & self._left['validation'] for name, keep in conditions.items()}
    pairs, multi_label = PairDiagnostics(), self.config.dataset.multi_label
    tuned = multi_label and self.config.eval.threshold == 'validation'
    observers = [pairs, *([thresholds.Fit()] if tuned else [])]
    scores = self._score(
      _variables(state),
      self.frozen,
      source,
      conditions,
      stored=self._stored['validation'],
      title='validating',
      observers=observers,
    )
    score = scoring.score(scores, multi_label=multi_label)
    diagnostics = pairs.compute(self.objective.estimator, state.cca, ridge=self.config.cca.ridge)
    record = scores | ({} if score is None else {'score': score}) | {'pairs': diagnostics}
    if tuned:
      record['thresholds'] = observers[1].compute()
    return record, scoring.describe_score(scores, multi_label=multi_label)

  def finish(self) -> dict[str, Any]:
    """Scores the test split with the selected checkpoint and each modality absent; writes
    evaluation.json and what a report shows.
    """
    run = trained.open(self.workdir)
    source = self.assembly.data.splits['test']
    conditions = scoring.conditions_of(scoring.missing_names(self.config), len(source))
    variables = trained.restore_variables(run, self.assembly.method.init, self.assembly.mesh)
    pairs = PairDiagnostics()
    recorder = PredictionRecorder(
      source,
      self.assembly.class_names,
      list(conditions),
      multi_label=self.config.dataset.multi_label,
      thresholds=thresholds.of_run(run.meta),
    )
    self._score.thresholds = thresholds.of_run(run.meta)
    scores = self._score(
      variables,
      self.frozen,
      source,
      conditions,
      stored=self._stored['test'],
      title='evaluating test',
      observers=[pairs, recorder],
    )
    self._record_pairs(variables, pairs, run.meta['step'])
    self._calibrate(run, variables)
    data = trained.compare_split(run, 'test', source)
    record = results.publish(
      self.workdir,
      split='test',
      found={'results': scores},
      meta=run.meta,
      recorder=recorder,
      data=data,
    )
    for line in processes.lines_of_all(self.assembly.preprocess.report.line()):
      console.log(line)
    for line in announcing.what_next(self.config, self.workdir):
      console.log(line)
    return record

  def _calibrate(self, run: trained.Trained, variables: Mapping[str, Any]) -> None:
    """Writes calibration.npz, which prediction sets are made by."""
    splits, left_nm = self.assembly.data.splits, self._left['validation']
    answering = variables, self.frozen, self._stored['validation']
    validation = calibration.Validation(splits['validation'], left_nm, *answering)
    found = calibration.compute(run, self._score, validation, splits['train'].labels)
    if processes.is_main():
      found.save(self.workdir / calibration.CALIBRATION)

  def _record_pairs(self, variables: Mapping[str, Any], pairs: PairDiagnostics, step: int) -> None:
    """Writes pairs.npz: the pairs of the test split beside up to MAX_PAIRS of the training
    split.
    """
    if pairs.pairs is None:
      return
    config = self.config
    source, stored = imputation_fit.complete_pairs(
      self.assembly.data.splits['train'],
      self._stored['train'],
      self._left['train'],
      limit=MAX_PAIRS,
      seed=config.seed,
      name='pairs',
    )
    training = PairDiagnostics()
    if len(source):
      self._score(
        variables,
        self.frozen,
        source,
        scoring.conditions_of(scoring.missing_names(config), len(source)),
        stored=stored,
        title='reading training pairs',
        observers=[training],
      )
    shown = pairs.picture(
      training,
      batch_size=config.train.batch_size,
      ridge=config.cca.ridge,
      split='test',
      step=step,
      layer_weights_l=variables['params'].get('layer_weights'),
    )
    if shown and processes.is_main():
      shown.save(self.workdir / records.PAIRS)


class Trial(ClassifierTrainer):
  """A run of a search: the test split is not scored."""

  def introduce(self, state: TrainState, schedule: StepSchedule) -> None:
    """See `Trainer`; what the first trial has told is told once."""
    if self.workdir.name.startswith('00'):
      super().introduce(state, schedule)

  def finish(self) -> tuple[dict[str, Any], bool, list[int]]:
    """Returns what `search.Run` does."""
    validations = [x for x in logbook.read(self.workdir) if x['kind'] == 'validation']
    labels = self.assembly.data.splits['train'].labels
    classes = [k for label in labels for k in classes_of(label)]
    counts = np.bincount(classes, minlength=self.assembly.num_classes)
    last = validations[-1]
    ended = last['step'] >= self.schedule.total or not self.assembly.method.is_trained
    return last, ended, counts.tolist()


def _variables(state: TrainState) -> dict[str, Any]:
  return {'params': state.params, 'statistics': state.statistics}


def protocol(config: ml_collections.ConfigDict, source: Source, split: str) -> np.ndarray:
  """Returns bool[N, 2], the modalities that the missing-rate protocol leaves to each row."""
  c = config.missing
  rate, kind = (c.train_rate, c.train_type) if split == 'train' else (c.eval_rate, c.eval_type)
  return missing.present_table(
    source.ids, rate=rate, kind=kind, seed=config.seed, split=split, present=source.present
  )


def command(flags: argparse.Namespace) -> int | None:
  """The work of the command; exit code 130 or 143: stopped by a signal, saved."""
  processes.join()
  how = {'data_changed': flags.data_changed, 'choices': choices_of(flags)}
  return exit_code(lambda: train(flags.config, pathlib.Path(flags.workdir), **how))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('train', argv)
