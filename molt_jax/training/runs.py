"""The one way to open a finished run, and data for it.

A run is what its checkpoint says it is: config.json is compared with the config that the checkpoint
was trained with, arrays with their checksums, towers with their identities, and labels are mapped
by name onto the checkpoint's classes.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.schema import Schema
from molt_jax.data import datasets, fingerprint, sources
from molt_jax.data.sources import Dataset, Source
from molt_jax.errors import UserError
from molt_jax.methods import model as model_lib
from molt_jax.runtime import console, logbook, sharding
from molt_jax.training import checkpoint

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
  'dataset.data_dir',
  'dataset.allow_count_mismatch',
  'eval.batch_size',
  'eval.select',
)
# Of a finished run, whose scores need not be those of training to the last bit.
FREE_IN_USE = (
  *FREE_ON_RESUME,
  'backbones.image.path',
  'backbones.text.path',
  'backbones.attention',
  'features.store',
  'input.text_store',
  'input.cache',
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that has a checkpoint.

  Attributes:
    workdir: its folder.
    config: of config.json, which may say otherwise than the checkpoint where things are.
    meta: what the checkpoint belongs to, see `checkpoint.Checkpoints`.
    restore: abstract tree -> {'params', 'statistics'}, checked.
  """

  workdir: pathlib.Path
  config: ml_collections.ConfigDict
  meta: Mapping[str, Any]
  restore: Callable[[Any], Any]

  @property
  def class_names(self) -> list[str]:
    return self.meta['class_names']


def open_run(workdir: str | pathlib.Path, *, schema: Schema = CLASSIFIER) -> Run:
  """Opens the run in a folder; `schema` is that of the command that trained it.

  Raises:
    UserError: no run there, a damaged one, or a config.json that is not the checkpoint's.
  """
  workdir = pathlib.Path(workdir)
  config = schema.read_run(workdir)
  meta, restore = checkpoint.load_model(workdir, config.eval.select)
  changed = _other_fields(meta, config, FREE_IN_USE, schema)
  if changed:
    raise UserError(
      f'--workdir: {workdir / "config.json"} is not what the checkpoint of step {meta["step"]} '
      f'was trained with ({"; ".join(changed)}, checkpoint -> config.json); give it back these '
      'values, or train a run with the others'
    )
  return Run(workdir, config, meta, restore)


def _other_fields(meta, config, free, schema) -> list[str]:
  """Returns `name: checkpoint's -> config's` of each field that differs and is not free to."""
  try:
    saved = schema.from_dict(meta['config'])
  except UserError as error:
    raise UserError(
      f'--workdir: the config of the checkpoint of step {meta["step"]} is not one of this '
      f'command and version ({error}); use the version that it was trained with'
    ) from error
  lines = resolved.differences(saved, config)
  return [line for line in lines if line.split(':')[0] not in free]


def restore_variables(
  run: Run, init: Callable[[jax.Array], Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Restores what was trained onto every device of the mesh.

  Args:
    run: where from.
    init: key -> the variables of the model (boxed); only their shapes matter.
    mesh: where to.

  Raises:
    UserError: the checkpoint is damaged, or not of this model.
  """
  shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
  shapes = {'params': shapes['params'], 'statistics': shapes.get('statistics', {})}
  whole = sharding.replicated(mesh)
  return run.restore(
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
  )


def verify(run: Run) -> None:
  """Reads the arrays of a run's model to compare them with their checksums.

  Raises:
    UserError: they are damaged.
  """
  run.restore(None)


# ---- Data ----------------------------------------------------------------------------------------


def open_split(run: Run, split: str) -> tuple[Source, dict[str, Any]]:
  """Opens a split of the run's data set, labelled by the run's classes.

  Returns:
    (the split, its fingerprint with 'as_in_training': whether it is that of training, None where
    the checkpoint does not know).

  Raises:
    UserError: the data cannot be read, or have a label that the run does not know.
  """
  data = datasets.load_split(run.config, split)
  data = sources.relabel(data, run.class_names, where=_where(run.config))
  source = data.splits[split]
  return source, compare(run, split, fingerprint.of(source, data.class_names))


def _where(config: ml_collections.ConfigDict) -> str:
  return f'config.dataset.path: {config.dataset.path or config.dataset.name!r}'


def fingerprints(data: Dataset) -> dict[str, dict[str, Any]]:
  """Returns the fingerprint of each split."""
  return {split: fingerprint.of(source, data.class_names) for split, source in data.splits.items()}


def compare(run: Run, split: str, found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a fingerprint with 'as_in_training', as `open_split` does; logs where that is false."""
  known = run.meta.get('data', {}).get(split)
  changed = known and fingerprint.changes(known, found)
  if changed:
    console.log(f'the {split} split has changed since training: {changed}')
  return {**found, 'as_in_training': None if known is None else not changed}


# ---- Going on ------------------------------------------------------------------------------------


def new_meta(
  config: ml_collections.ConfigDict, towers: Mapping[str, Any], data: Dataset
) -> dict[str, Any]:
  """Returns what the checkpoints of a run belong to, before its first step."""
  return {
    'config': config.to_dict(),
    'backbones': model_lib.identities(towers),
    'class_names': list(data.class_names),
    'data': fingerprints(data),
    'score': None,
    'step': 0,
  }


def go_on(
  saved: Mapping[str, Any],
  config: ml_collections.ConfigDict,
  towers: Mapping[str, Any],
  data: Dataset,
  *,
  checkpoints: checkpoint.Checkpoints,
  data_changed: bool,
  schema: Schema = CLASSIFIER,
) -> Dataset:
  """Checks that a checkpoint can be gone on from, and returns the data labelled by its classes.

  Args:
    saved: what the checkpoint belongs to; {}: there is none, and nothing to check.
    config: of the command.
    towers: their descriptions.
    data: as they are now.
    checkpoints: of the run.
    data_changed: whether training goes on with data that have changed.
    schema: of the command.

  Raises:
    UserError: the checkpoint is of another config, towers or classes, the data have changed and
      that is not allowed, or the log is damaged.
  """
  if not saved:
    return data
  logbook.read(checkpoints.workdir)  # It will be gone on with, too.
  fields = _other_fields(saved, config, FREE_ON_RESUME, schema)
  if fields:
    raise UserError(
      f'--workdir: the checkpoint of step {saved["step"]} was trained with another config '
      f'({"; ".join(fields)}); give that config, or another folder'
    )
  model_lib.check_same_towers(saved['backbones'], towers)
  mapped = sources.relabel(data, saved['class_names'], where=_where(config))
  changed = _changes(saved, data, mapped)
  how = '; '.join(f'{split}: {text}' for split, text in changed.items())
  if changed and not data_changed:
    raise UserError(
      f'{_where(config)}: the data have changed since step {saved["step"]} ({how}); give the '
      'data it was trained on, or go on with these by --data_changed'
    )
  if changed:
    console.log(f'the data have changed since step {saved["step"]} ({how}); going on with these')
  if 'validation' in changed:
    checkpoints.score_anew(saved['step'])
  return mapped


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
