"""What a run must agree with to be gone on with or used: config, towers, classes and data."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.methods import METHODS
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.config.schema import Schema
from molt_jax.data import fingerprint, sources
from molt_jax.data.sources import Dataset
from molt_jax.errors import UserError
from molt_jax.features import frozen
from molt_jax.runtime import console, logbook
from molt_jax.training import checkpoint
from molt_jax.training.assembly import Assembly
from molt_jax.training.schedule import StepSchedule

# Fields that say where things are, and where and how fast to compute, but not what. Data are known
# by their fingerprint, towers by their identity.
FREE_ON_RESUME = (
  'platform',
  'mesh.data',
  'mesh.model',
  'text.padding',
  'input.num_threads',
  'input.prefetch',
  'dataset.path',
  'dataset.table.test_file',
  'dataset.table.validation_file',
  'dataset.table.image_folder',
  'dataset.data_dir',
  'dataset.allow_count_mismatch',
  'eval.batch_size',
  'eval.select',
)
# How long a run is: a finished one may be given more epochs.
LENGTH = ('train.epochs', 'train.least_steps')
# Of a finished run, whose scores need not be those of training to the last bit.
FREE_IN_USE = (
  *FREE_ON_RESUME,
  *LENGTH,  # Until a run that is given more has saved, its checkpoint says the old number.
  'backbones.image.path',
  'backbones.text.path',
  'backbones.attention',
  'features.store',
  'input.text_store',
  'input.cache',
)


def schema_of(config: ml_collections.ConfigDict) -> Schema:
  """Returns the schema that a config is of."""
  return PRETRAINING if 'objective' in config else CLASSIFIER


def other_fields(meta, config, free, schema) -> list[str]:
  """Returns `name: checkpoint's -> config's` of each field that differs and is not free to.

  Args:
    meta: of a checkpoint.
    config: what it is compared with.
    free: fields that may differ.
    schema: of both.
  """
  try:
    saved = schema.from_dict(meta['config'])
  except UserError as error:
    raise UserError(
      f'--workdir: the config of the checkpoint of step {meta["step"]} is not one of this '
      f'command and version ({error}); use the version that it was trained with'
    ) from error
  lines = resolved.differences(saved, config)
  return [line for line in lines if line.split(':')[0] not in free]


def has_more_epochs(
  saved: Mapping[str, Any] | ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> bool:
  """Whether a config has more epochs than that of a run, given as a dict or as a config."""
  return config.train.epochs > saved['train']['epochs']


def check_finished(
  saved: Mapping[str, Any], config: ml_collections.ConfigDict, num_examples: int
) -> None:
  """Raises UserError where a run is given more epochs before it has ended: its learning rate
  follows from their number.

  Args:
    saved: meta of the checkpoint to go on from.
    config: of the command.
    num_examples: of an epoch.
  """
  if not saved or not has_more_epochs(saved['config'], config):
    return
  if config.train.get('patience', 0):
    raise UserError(
      f'config.train.epochs: {config.train.epochs:g}, but this run ends where validation gains '
      'nothing more (config.train.patience); train another with --init_from to go on from it'
    )
  before = config.copy_and_resolve_references()
  before.train.epochs = saved['config']['train']['epochs']
  if 'least_steps' in before.train:
    before.train.least_steps = saved['config']['train'].get('least_steps', 0)
  total = StepSchedule(before, num_examples).total
  if saved['step'] < total:
    raise UserError(
      f'config.train.epochs: {config.train.epochs:g}, but the run has not ended yet (step '
      f'{saved["step"]} of {total}); give {before.train.epochs:g}, and more when it has'
    )
  console.log(f'the run had ended after {before.train.epochs:g} epochs and is given more')


def where(config: ml_collections.ConfigDict) -> str:
  return f'config.dataset.path: {config.dataset.path or config.dataset.name!r}'


def fingerprints(data: Dataset) -> dict[str, dict[str, Any]]:
  """Returns the fingerprint of each split."""
  return {split: fingerprint.of(source, data.class_names) for split, source in data.splits.items()}


def new_meta(assembly: Assembly) -> dict[str, Any]:
  """Returns what the checkpoints of a run belong to, before its first step."""
  method = METHODS.get(assembly.config.get('method'))  # Pretraining has none.
  return {
    'config': assembly.config.to_dict(),
    'revision': method.revision if method else 1,
    'backbones': frozen.identities(assembly.towers),
    'class_names': list(assembly.class_names),
    'data': fingerprints(assembly.data),
    'score': None,
    'step': 0,
  }


def resume(
  assembly: Assembly, checkpoints: checkpoint.Checkpoints, *, data_changed: bool
) -> tuple[Assembly, bool]:
  """Checks that a checkpoint can be gone on from.

  Args:
    assembly: of the command.
    checkpoints: of the run.
    data_changed: whether training goes on with data that have changed.

  Returns:
    (the assembly with its data labelled by the checkpoint's classes, True), or (it as it is, False)
    where there is no checkpoint.

  Raises:
    UserError: the checkpoint is of another config, towers or classes, the data have changed and
      that is not allowed, or the log is damaged.
  """
  saved = checkpoints.meta()
  if not saved:
    return assembly, False
  config, data = assembly.config, assembly.data
  logbook.read(checkpoints.workdir)  # It will be gone on with, too.
  free = FREE_ON_RESUME
  if has_more_epochs(saved['config'], config):
    free = (*FREE_ON_RESUME, *LENGTH)
  fields = other_fields(saved, config, free, schema_of(config))
  if fields:
    raise UserError(
      f'--workdir: the checkpoint of step {saved["step"]} was trained with another config '
      f'({"; ".join(fields)}); give that config, or another folder'
    )
  frozen.check_same_towers(saved['backbones'], assembly.towers)
  mapped = sources.relabel(data, saved['class_names'], where=where(config))
  changed = _changes(saved, data, mapped)
  how = '; '.join(f'{split}: {text}' for split, text in changed.items())
  if changed and not data_changed:
    raise UserError(
      f'{where(config)}: the data have changed since step {saved["step"]} ({how}); give the '
      'data it was trained on, or go on with these by --data_changed'
    )
  if changed:
    console.log(f'the data have changed since step {saved["step"]} ({how}); going on with these')
  if 'validation' in changed:
    checkpoints.score_anew(saved['step'])
  return assembly.with_data(mapped), True


def _changes(saved: Mapping[str, Any], data: Dataset, mapped: Dataset) -> dict[str, str]:
  """Returns how each split changed since the checkpoint, for those that did."""
  known = saved.get('data')
  if known is None:
    console.log('the checkpoint has no fingerprint of its data: an older version wrote it')
    lost = [name for name in saved['class_names'] if name not in data.class_names]
    return {'train': f'no label {sources.some(list(map(repr, lost)))}'} if lost else {}
  found = fingerprints(mapped)
  changed = {split: fingerprint.changes(known.get(split, {}), found[split]) for split in found}
  return {split: how for split, how in changed.items() if how}
