"""What a report reads of a run: files in its folder."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from molt_jax import config as config_lib
from molt_jax import logbook, records
from molt_jax.config import UserError

LABELS = {'none_absent': 'complete', 'text_absent': 'text absent', 'image_absent': 'image absent'}


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
    predictions, mistakes, pairs: see `molt_jax.records`; None where they are not there or belong to another evaluation.
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

  def score(self, condition: str) -> float:
    """Returns the headline score of a condition."""
    return self.evaluation['results'][condition][self.metric]

  def error(self, condition: str) -> float | None:
    """Returns the standard error of that score over examples; None without predictions."""
    return None if self.predictions is None else _standard_error(self.predictions.influence(condition))

  def difference(self, other: 'Run', condition: str) -> tuple[float, float | None]:
    """Returns this run's score minus the other's, and its standard error: paired where both saw the same examples, None where it is unknown."""
    value = self.score(condition) - other.score(condition)
    if self.predictions is None or other.predictions is None:
      return value, None
    one, two = self.predictions.influence(condition), other.predictions.influence(condition)
    if list(self.predictions.ids) == list(other.predictions.ids):
      return value, _standard_error(one - two)
    return value, float(np.hypot(_standard_error(one), _standard_error(two)))

  def lines(self, kind: str) -> list[dict[str, Any]]:
    """Returns the lines of one kind, 'train' or 'validation'."""
    return [line for line in self.log if line['kind'] == kind]


def _standard_error(influence_n):
  return float(np.std(influence_n, ddof=1) / np.sqrt(len(influence_n))) if len(influence_n) > 1 else 0.0


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Opens runs, in this order.

  Raises:
    UserError: a folder holds no run of molt_jax.train, or one that is not finished; a folder is named twice; the data are not the same.
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
      raise UserError(f'--workdir: {one}, {other}, or on other classes; give runs on the same split of one data set')
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
  parts = [path.parts[len(pathlib.Path(os.path.commonpath(paths)).parts):] for path in paths]
  while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
    parts = [part[:-1] for part in parts]
  for count in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(part[-count:]) or path.name for part, path in zip(parts, paths, strict=True)]
    if len(set(names)) == len(names):
      break
  return names


# ---- Files ---------------------------------------------------------------------------------------

NUMBER = (int, float)
SCORES = {f'{name}?': (*NUMBER, type(None)) for name in (
    'accuracy', 'f1_micro', 'f1_macro', 'loss', 'num_examples')}
# What the page reads of each file, as `_misfit` takes it.
EVALUATION = {
    'split': str, 'num_examples': int, 'step': (int, str), 'config_hash': str,
    'results': {...: SCORES}, 'backbones': {...: {'path': str, 'sha256': str}},
    'versions': {...: str}, 'data?': {'digest': str}}
MISTAKES = {
    'split': str, 'step': (int, str), 'conditions': {...: [int]},
    'examples': {...: {'id': str, 'text': (str, type(None)), 'image': (str, type(None))}}}
ABOUT = {
    'examples': {...: int}, 'parameters': int, 'device': str, 'devices': int,
    'calls': [{'seconds': NUMBER, ...: (*NUMBER, type(None))}]}
LINES = {
    'train': {
        'loss?': NUMBER, 'loss_ce?': NUMBER, 'loss_distill?': NUMBER, 'loss_cca?': NUMBER,
        'images_per_second?': NUMBER, 'cca_correlation?': [NUMBER]},
    'validation': {
        **{f'{name}?': SCORES for name in LABELS}, 'pairs': {'held_out_correlation?': [NUMBER]}}}


def _misfit(value: Any, shape: Any, where: str = '') -> str:
  """Returns where a JSON value has not the shape that it must have; '' where all is well.

  A shape is a type or several; [shape of each item]; {name: shape}, in which `...` stands for all
  other names (otherwise they may be anything) and a name with ? need not be there.
  """
  if isinstance(shape, list):
    if not isinstance(value, list):
      return where or 'it'
    found = (_misfit(item, shape[0], f'{where}[{n}]') for n, item in enumerate(value))
    return next(filter(None, found), '')
  if isinstance(shape, dict):
    return _misfit_of_object(value, shape, where)
  is_right = isinstance(value, shape) and not isinstance(value, bool)
  return '' if is_right else where or 'it'


def _misfit_of_object(value, shape, where) -> str:
  if not isinstance(value, dict):
    return where or 'it'
  named = {name.removesuffix('?'): inner for name, inner in shape.items() if name is not ...}
  for name, inner in named.items():
    if name not in value and f'{name}?' not in shape:
      return f'{where}.{name}'.lstrip('.')
    if name in value and (found := _misfit(value[name], inner, f'{where}.{name}'.lstrip('.'))):
      return found
  if ... in shape:
    for name in value.keys() - named.keys():
      if found := _misfit(value[name], shape[...], f'{where}.{name}'.lstrip('.')):
        return found
  return ''


def _json(path: pathlib.Path, shape: Any, remedy: str) -> Any:
  """Reads a file that training or evaluation wrote; None where it is not there."""
  if not path.is_file():
    return None
  value = config_lib.read_json(path, remedy)
  if where := _misfit(value, shape):
    raise UserError(f'{path} is damaged ({where} is not as it must be); {remedy}')
  return value


def _read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
  log = logbook.read(folder)
  for line in log:
    if where := _misfit(line, LINES.get(line['kind'], {})):
      raise UserError(
          f'{folder / "metrics.jsonl"} is damaged ({where} of the {line["kind"]} line of step '
          f'{line["step"]} is not as it must be); delete that line')
  return log


def _verify(folder: pathlib.Path) -> None:
  """Compares config.json and the arrays of the run's checkpoint with what was saved."""
  if any((folder / 'checkpoints').glob('*/[0-9]*')):
    from molt_jax import trained  # Imports JAX, which a page without checkpoints does without.
    trained.verify(trained.open_run(folder))


def _read(folder: pathlib.Path, name: str) -> Run:
  evaluation_path = folder / 'evaluation.json'
  config = config_lib.read_run(folder)
  again = f'run python -m molt_jax.evaluate --workdir={folder} again'
  log = _read_log(folder)
  if not evaluation_path.is_file():
    raise UserError(
        f'--workdir: the run in {str(folder)!r} is not finished (evaluation.json is not there; last logged step: {log[-1]["step"] if log else 0}); '
        f'run its train command again, or python -m molt_jax.evaluate --workdir={folder}')
  evaluation = _json(evaluation_path, EVALUATION, again)
  if not set(LABELS) & set(evaluation['results']):
    raise UserError(f'--workdir: {str(evaluation_path)!r} has no result of an absence; run python -m molt_jax.evaluate --workdir={folder}')
  predictions, pairs = records.Predictions.load(folder / records.PREDICTIONS), records.Pairs.load(folder / records.PAIRS)
  data = evaluation.get('data', {}).get('digest', '')
  if predictions and (predictions.data != data or any(
      getattr(predictions, key) != evaluation[key] for key in ('split', 'step', 'config_hash'))):
    predictions = None
  mistakes = _json(folder / records.MISTAKES, MISTAKES, again)
  if not (mistakes and predictions and _belong(mistakes, predictions)):
    mistakes = None
  if pairs and pairs.step != evaluation['step']:
    pairs = None
  about = _json(folder / 'run.json', ABOUT, 'delete it: the page then does without')
  _verify(folder)
  return Run(name, folder, config, evaluation, log, about or {}, predictions, mistakes, pairs)


def _belong(mistakes: dict[str, Any], predictions: records.Predictions) -> bool:
  """Whether mistakes are of these predictions."""
  identity = tuple(mistakes.get(key, '') for key in ('split', 'step', 'data'))
  rows = {str(row) for rows in mistakes['conditions'].values() for row in rows}
  known = {str(n) for n in range(len(predictions.ids))} & mistakes['examples'].keys()
  return (
      identity == (predictions.split, predictions.step, predictions.data)
      and set(mistakes['conditions']) <= set(predictions.conditions) and rows <= known)
