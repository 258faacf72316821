"""Evaluates a run with each modality absent: `python -m molt_jax.evaluate --workdir=DIR`."""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('evaluate', sys.argv[1:]))

import argparse
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from molt_jax.config import resolved
from molt_jax.data import missing
from molt_jax.data.modalities import KEPT
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.evaluation import (
  calibration,
  prediction_sets,
  results,
  scoring,
  thresholds,
  trained,
  user_metrics,
)
from molt_jax.evaluation.diagnostics import Observer
from molt_jax.evaluation.recorder import PredictionRecorder
from molt_jax.features import opening
from molt_jax.runtime import console, processes
from molt_jax.training import workdir as workdirs
from molt_jax.training.assembly import check_batch_sizes


def run(
  workdir: pathlib.Path,
  *,
  split: str = 'test',
  absent: Collection[str] | None = None,
  missing_rates: Collection[float] = (),
  missing_types: Collection[str] = ('both',),
  table: str | None = None,
  also: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Evaluates the run in `workdir` in one pass, prints the scores, writes `evaluation.json` (of
  another table NAME.csv `evaluation_NAME.json`) and returns its content.

  Args:
    workdir: the run's folder, or a file of molt export, which needs a table: scores are then
      written beside it.
    split: train, validation or test.
    absent: names in KEPT; default: all that leave something to the run.
    missing_rates: one more condition for each of these and of missing_types, 'missing_TYPE_RATE',
      see `missing.present_table`.
    missing_types: 'text', 'image' or 'both'.
    table: another table with labels, in the place of a split; missing rates draw its examples as
      those of `split`.
    also: what is scored beside: 'metrics', scikit-learn's names, and 'sets', the 'coverage' and
      'kind' of prediction sets (`prediction_sets.Calibration.rule`).

  Raises:
    UserError: no run there, an unknown split, a condition that is unknown or leaves the run with
      nothing, a tower that has changed.
  """
  _check_choices('--split', [split], ('train', 'validation', 'test'))
  _check_choices('--missing_type', missing_types, ('text', 'image', 'both'))
  _check_choices('--absent', absent or (), KEPT)
  user_metrics.check((also or {}).get('metrics', ()))
  if processes.is_main() and workdir.is_dir():
    workdirs.try_out(workdir)
  run = trained.open(workdir)
  check_batch_sizes(run.config, run.assembly.mesh, ('eval',))
  every = scoring.missing_names(run.config)
  names = every if absent is None else list(absent)
  _check_left(run.config, names, missing_rates)
  source, data = trained.open_split(run, split) if table is None else trained.open_other(run, table)
  conditions = scoring.conditions_of(names, len(source))
  conditions |= _rates(run.config, source, split, missing_rates, missing_types)
  if not conditions:
    raise UserError('--absent: empty; give none, text, image or a --missing_rate')
  # A part leaves an earlier record of all as it is, and so does another table.
  recorder = _recorder(run, source, names) if names == every and table is None else None
  extra = _Extra(run, list(conditions), **(also or {}))
  observers = [recorder] if recorder else []
  scores = _score(run, source, conditions, [*observers, *extra.observers], split)
  found = {'results': scores, 'metrics': extra.metrics()}
  extra.add_sets(scores, split if table is None else table)
  how = {'found': found, 'meta': run.meta, 'recorder': recorder, 'data': data}
  if table is None:
    return results.publish(workdir, split=split, **how)
  path = pathlib.Path(table)
  folder, name = workdir, f'evaluation_{path.stem}.json'
  if workdir.is_file():
    folder, name = workdir.parent, f'{workdir.stem}_{name}'
  return results.publish(folder, split=path.name, **how, name=name)


class _Extra:
  """What is scored beside: metrics by scikit-learn's names, prediction sets."""

  def __init__(
    self,
    run: trained.Trained,
    conditions: Sequence[str],
    *,
    metrics: Collection[str] = (),
    sets: Mapping[str, Any] | None = None,
  ):
    multi_label = run.config.dataset.multi_label
    self._names, self._collector, self._sets = metrics, None, None
    if metrics:
      how = {'multi_label': multi_label, 'thresholds': thresholds.of_run(run.meta)}
      self._collector = user_metrics.Collector(conditions, **how)
    if sets:
      rule = calibration.of_run(run).rule(**sets)
      self._sets = calibration.SetScores(rule, conditions, run.class_names)

  @property
  def observers(self) -> list[Observer]:
    return [observer for observer in (self._collector, self._sets) if observer]

  def metrics(self) -> dict[str, dict[str, float]]:
    """Returns condition -> metric -> value."""
    return self._collector.compute(self._names) if self._collector else {}

  def add_sets(self, scores: dict[str, Any], where: str) -> None:
    """Adds what came of prediction sets to the scores of each condition, and prints it."""
    if not self._sets:
      return
    found = self._sets.results()
    for name, of_sets in found.items():
      scores[name]['prediction_sets'] = of_sets
    is_split = where in ('train', 'validation', 'test')
    results.print_sets(found, f'{where} split' if is_split else where)
    if where == 'validation':
      console.log('thresholds come from the validation split: there, sets keep any promise')


def _recorder(run: trained.Trained, source: Source, names: Collection[str]) -> PredictionRecorder:
  return PredictionRecorder(
    source,
    run.class_names,
    list(scoring.conditions_of(names, 0)),
    multi_label=run.config.dataset.multi_label,
    thresholds=thresholds.of_run(run.meta),
  )


def _score(
  run: trained.Trained,
  source: Source,
  conditions: Mapping[str, np.ndarray],
  observers: Sequence[Observer],
  split: str,
) -> dict[str, dict[str, float]]:
  """Scores a split under its conditions; logs what could not be read."""
  modalities = scoring.needed(conditions, source)
  run.check_towers(modalities)
  variables = run.variables()
  wanted = {split: (source, np.any(list(conditions.values()), axis=0))}
  frozen, stored = opening.open_features(run.assembly.extraction, wanted, modalities)
  scores = scoring.Scorer(run.assembly, thresholds.of_run(run.meta))(
    variables,
    frozen,
    source,
    conditions,
    stored=stored[split],
    title=f'evaluating {split}',
    observers=observers,
  )
  for line in processes.lines_of_all(run.assembly.preprocess.report.line()):
    console.log(line)
  return scores


def _rates(
  config: ml_collections.ConfigDict,
  source: Source,
  split: str,
  rates: Collection[float],
  kinds: Collection[str],
) -> Mapping[str, np.ndarray]:
  """Returns a condition for each missing rate and type."""
  conditions = {}
  for kind in kinds:
    for rate in rates:
      conditions[f'missing_{kind}_{rate:g}'] = missing.present_table(
        source.ids, rate=rate, kind=kind, seed=config.seed, split=split, present=source.present
      )
  return conditions


def _check_left(
  config: ml_collections.ConfigDict, absent: Collection[str], missing_rates: Collection[float]
) -> None:
  """Raises UserError where a unimodal model would be left with nothing, or has nothing to lose."""
  legal, this_run = (
    scoring.missing_names(config),
    f'a run with config.dataset.modalities={config.dataset.modalities!r}',
  )
  for name in absent:
    if name not in legal:
      raise UserError(f'--absent: {name!r} leaves nothing to {this_run}; give {" or ".join(legal)}')
  if missing_rates and len(resolved.modalities(config)) < 2:
    raise UserError(f'--missing_rate: {this_run} has no second modality to lose; leave it out')


def _check_choices(flag: str, values: Collection[str], legal: Collection[str]) -> None:
  for value in values:
    if value not in legal:
      raise UserError(f'{flag}: {value!r} is not legal; give one of {", ".join(legal)}')


def command(flags: argparse.Namespace) -> int | None:
  """The work of the command."""
  processes.join()
  run(
    pathlib.Path(flags.workdir),
    split=flags.split,
    absent=flags.absent,
    missing_rates=flags.missing_rate,
    missing_types=flags.missing_type,
    table=flags.table,
    also={'metrics': flags.metrics, 'sets': prediction_sets.options(flags)},
  )


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('evaluate', argv)
