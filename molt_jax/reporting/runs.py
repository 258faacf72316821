"""What a report reads of a run: files in its folder."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.json_files import read_json
from molt_jax.data.modalities import LABELS
from molt_jax.errors import UserError
from molt_jax.evaluation import records
from molt_jax.evaluation.prediction_sets import Calibration
from molt_jax.reporting import checked
from molt_jax.runtime import logbook


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run of `python -m molt_jax.train`.

  Attributes:
    name: short, unlike those of the runs beside it.
    folder: where it is.
    config: resolved.
    evaluation: evaluation.json.
    log: lines of metrics.jsonl.
    about: run.json; {} where it is not there.
    predictions, mistakes, pairs: see `molt_jax.evaluation.records`; None where they are not there
      or belong to another evaluation.
    calibration: what prediction sets are made by; None where it is not there or is of another
      checkpoint.
  """

  name: str
  folder: pathlib.Path
  config: ml_collections.ConfigDict
  evaluation: dict[str, Any]
  log: list[dict[str, Any]]
  about: dict[str, Any]
  predictions: records.Predictions | None
  mistakes: dict[str, Any] | None
  pairs: records.Pairs | None
  calibration: Calibration | None = None

  @property
  def metric(self) -> str:
    """Key of the headline score."""
    return 'f1_micro' if self.config.dataset.multi_label else 'accuracy'

  @property
  def conditions(self) -> list[str]:
    """The absences that were evaluated, in the order of LABELS."""
    return [name for name in LABELS if name in self.evaluation['results']]

  @property
  def is_baseline(self) -> bool:
    """Whether this is the paper's baseline: no MoLT."""
    return self.config.method == 'late_fusion'

  def score(self, condition: str, key: str | None = None) -> float | None:
    """Returns a score of a condition, by default the headline score; None where it has none."""
    result = self.evaluation['results'].get(condition, {})
    if result.get('num_examples') == 0:  # Older evaluations wrote 0 there.
      return None
    return result.get(key or self.metric)

  def error(self, condition: str) -> float | None:
    """Returns the standard error of that score over examples; None where it is unknown."""
    influence_n = self._influence(condition)
    return None if influence_n is None else _standard_error(influence_n)

  def _influence(self, condition: str) -> np.ndarray | None:
    if self.predictions is None or condition not in self.predictions.conditions:
      return None
    return self.predictions.influence(condition)

  def difference(self, other: 'Run', condition: str) -> tuple[float, float | None] | None:
    """Returns this run's score minus the other's, and its standard error.

    Paired where both saw the same examples, None where it is unknown. None where one has no score.
    """
    scores = self.score(condition), other.score(condition)
    if None in scores:
      return None
    value = scores[0] - scores[1]
    one, two = self._influence(condition), other._influence(condition)
    if one is None or two is None:
      return value, None
    if list(self.predictions.ids) == list(other.predictions.ids):
      return value, _standard_error(one - two)
    return value, float(np.hypot(_standard_error(one), _standard_error(two)))

  def lines(self, kind: str) -> list[dict[str, Any]]:
    """Returns the lines of one kind, 'train' or 'validation'."""
    return [line for line in self.log if line['kind'] == kind]


def _standard_error(influence_n):
  return float(np.std(influence_n, ddof=1) / np.sqrt(len(influence_n)))


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Opens runs, in this order.

  Raises:
    UserError: a folder holds no run of molt_jax.train, or one that is not finished; a folder is
      named twice; the data are not the same.
  """
  paths = [folder.resolve() for folder in folders]
  for path, folder in zip(paths, folders, strict=True):
    if paths.count(path) > 1:
      raise UserError(f'--workdir: {str(folder)!r} is named twice; name each run once')
  runs = [_read(folder, name) for folder, name in zip(folders, _names(paths), strict=True)]
  first = runs[0]
  for run in runs[1:]:
    classes = [r.predictions.class_names for r in (first, run) if r.predictions]
    if not _same_data(first, run) or classes[1:] not in ([], classes[:1]):
      one, other = (f'{str(r.folder)!r} is scored on {" ".join(_data(r))}' for r in (first, run))
      raise UserError(
        f'--workdir: {one}, {other}, or on other classes; give runs on the same split of one '
        'data set'
      )
  return runs


def _data(run: Run) -> tuple[str, ...]:
  return run.config.dataset.name, run.config.dataset.path, run.evaluation['split']


def _same_data(one: Run, other: Run) -> bool:
  """Whether two runs are scored on the same examples, or on what configs leave of the same."""
  digests = [run.evaluation.get('data', {}).get('digest') for run in (one, other)]
  (name, path, split), (other_name, other_path, other_split) = _data(one), _data(other)
  if (name, split) != (other_name, other_split):
    return False
  if None in digests or digests[0] == digests[1]:
    return path == other_path or None not in digests
  # Of one folder, other modalities or another seed of the validation split give other examples.
  alike = all(one.config[key] == other.config[key] for key in ('dataset', 'seed'))
  return path == other_path and not alike


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """The last parts of the paths, as many as tell them apart, less what all share at the end."""
  if len(paths) == 1:
    return [paths[0].name]
  parts = [path.parts[len(pathlib.Path(os.path.commonpath(paths)).parts) :] for path in paths]
  while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
    parts = [part[:-1] for part in parts]
  for count in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(part[-count:]) or path.name for part, path in zip(parts, paths, strict=True)]
    if len(set(names)) == len(names):
      break
  return names


def _verify(folder: pathlib.Path) -> str | None:
  """Compares config.json and the arrays of the run's checkpoint with what was saved.

  Returns:
    What stands for the checkpoint; None where there is none.
  """
  if any((folder / 'checkpoints').glob('*/[0-9]*')):
    # Imports JAX, which a page without checkpoints does without.
    from molt_jax.evaluation import calibration, trained

    run = trained.open(folder)
    trained.verify(run)
    return calibration.checkpoint_digest(run.meta)
  return None


def _calibration(folder: pathlib.Path, checkpoint: str | None) -> Calibration | None:
  """Reads calibration.npz, unless it is of another checkpoint."""
  found = Calibration.load(folder / 'calibration.npz')
  return None if found and found.checkpoint != checkpoint else found


def _read(folder: pathlib.Path, name: str) -> Run:
  evaluation_path = folder / 'evaluation.json'
  config = CLASSIFIER.read_run(folder)
  log = checked.log(folder / 'metrics.jsonl', logbook.read(folder))
  if not evaluation_path.is_file():
    raise UserError(
      f'--workdir: the run in {str(folder)!r} is not finished (evaluation.json is not there; last '
      f'logged step: {log[-1]["step"] if log else 0}); '
      f'run its train command again, or python -m molt_jax.evaluate --workdir={folder}'
    )
  evaluation = checked.evaluation(evaluation_path, _json(evaluation_path))
  if not set(LABELS) & set(evaluation['results']):
    raise UserError(
      f'--workdir: {str(evaluation_path)!r} has no result of an absence; run python -m '
      f'molt_jax.evaluate --workdir={folder}'
    )
  predictions = records.Predictions.load(folder / records.PREDICTIONS)
  pairs = records.Pairs.load(folder / records.PAIRS)
  data = evaluation.get('data', {}).get('digest', '')
  if predictions and (
    predictions.data != data
    or any(getattr(predictions, key) != evaluation[key] for key in ('split', 'step', 'config_hash'))
  ):
    predictions = None
  mistakes = _json(folder / records.MISTAKES) if predictions else None
  if mistakes is not None:
    mistakes = checked.mistakes(folder / records.MISTAKES, mistakes, predictions)
  if pairs and pairs.step != evaluation['step']:
    pairs = None
  about = _json(folder / 'run.json')
  about = {} if about is None else checked.about(folder / 'run.json', about)
  calibration = _calibration(folder, _verify(folder))
  read = predictions, mistakes, pairs, calibration
  return Run(name, folder, config, evaluation, log, about, *read)


def _json(path: pathlib.Path) -> Any:
  """Reads a file that training or evaluation wrote; None where it is not there."""
  if not path.is_file():
    return None
  return read_json(path, f'python -m molt_jax.evaluate --workdir={path.parent} writes it anew')
