"""The one way to open a finished run, and data for it.

A run is what its checkpoint says it is: config.json is compared with the config that the checkpoint
was trained with, arrays with their checksums, towers with their identities, and labels are mapped
by name onto the checkpoint's classes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.resolved import set_field
from molt_jax.config.schema import Schema
from molt_jax.data import datasets, fingerprint, sources
from molt_jax.data.sources import Source
from molt_jax.data.tables import memory
from molt_jax.errors import UserError
from molt_jax.evaluation import model_file
from molt_jax.features import frozen
from molt_jax.runtime import console, logbook, sealed, sharding, zipped
from molt_jax.training import checkpoint_files, resuming
from molt_jax.training.assembly import Assembly, assemble

# Fields that say where things were, or what a machine has, and what they are in a file.
_ELSEWHERE = ('platform', 'dataset.data_dir', 'dataset.table.image_folder', 'features.store')
_ONE_DEVICE = {'mesh.data': 1, 'mesh.model': 1, 'backbones.attention': 'xla'}
# Fields that may name a table which a fit wrote to the folder of its run.
_SNAPSHOTS = ('dataset.path', 'dataset.table.test_file', 'dataset.table.validation_file')


@dataclasses.dataclass(frozen=True)
class Trained:
  """A run that has a checkpoint.

  Attributes:
    workdir: its folder, or the file that it is in.
    config: of config.json, which may say otherwise than the checkpoint where things are.
    meta: what the checkpoint belongs to, see `checkpoint.Checkpoints`.
    restore: abstract tree -> {'params', 'statistics'}, checked.
    examples: with the answers that they had, of a model in one file.
  """

  workdir: pathlib.Path
  config: ml_collections.ConfigDict
  meta: Mapping[str, Any]
  restore: Callable[[Any], Any]
  examples: tuple[model_file.Example, ...] = ()

  @property
  def class_names(self) -> list[str]:
    return self.meta['class_names']

  @property
  def folder(self) -> zipped.Place:
    """Where its files are: a folder of the disk, or of the file that it is in."""
    return sealed.open(self.workdir).top if self.workdir.is_file() else self.workdir

  @property
  def evaluation(self) -> dict[str, Any]:
    """Content of its evaluation.json; {} where there is none."""
    if not self.workdir.is_file():
      return logbook.kept(self.workdir / model_file.SCORES)
    file = sealed.open(self.workdir)
    return file.json(model_file.SCORES) if model_file.SCORES in file else {}

  @functools.cached_property
  def assembly(self) -> Assembly:
    """What the run's config turns into, with the checkpoint's classes and without data."""
    return assemble(self.config, class_names=tuple(self.class_names))

  def check_towers(self, modalities: Collection[str] | None = None) -> None:
    """Raises UserError unless the towers (that examples of these modalities need; default: all that
    are used) are those that the run was trained on.
    """
    if modalities is not None:
      modalities = frozen.needed(self.assembly.method.reads, modalities)
    frozen.check_same_towers(self.meta['backbones'], self.assembly.towers, modalities)

  def variables(self) -> dict[str, Any]:
    """Restores what was trained onto every device: {'params', 'statistics'}.

    Raises:
      UserError: the checkpoint is damaged, or not of this method.
    """
    return restore_variables(self, self.assembly.method.init, self.assembly.mesh)


def open(workdir: str | pathlib.Path, *, schema: Schema = CLASSIFIER) -> Trained:
  """Opens the run in a folder, or in a file that `molt export` wrote; `schema` is that of the
  command that trained it.

  Raises:
    UserError: no run there, a damaged one, or a config.json that is not the checkpoint's.
  """
  workdir = pathlib.Path(workdir)
  if sealed.is_one(workdir):
    found = model_file.read(workdir)
    config = portable(schema.from_dict(found.config))
    return Trained(workdir, config, found.meta, found.restore, found.examples)
  config = schema.read_run(workdir)
  for name in _SNAPSHOTS:
    if path := schema.get(config, name):
      set_field(config, name, memory.moved(path, workdir))
  meta, restore = checkpoint_files.load_model(workdir, config.eval.select)
  changed = resuming.other_fields(meta, config, resuming.FREE_IN_USE, schema)
  if changed:
    raise UserError(
      f'--workdir: {workdir / "config.json"} is not what the checkpoint of step {meta["step"]} '
      f'was trained with ({"; ".join(changed)}, checkpoint -> config.json); give it back these '
      'values, or train a run with the others'
    )
  return Trained(workdir, config, meta, restore)


def portable(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a classifier's config that says nothing of where things are beside the towers, and asks
  for one device of any kind.
  """
  config = config.copy_and_resolve_references()
  usual = CLASSIFIER.default()
  for name in _ELSEWHERE:
    set_field(config, name, CLASSIFIER.get(usual, name))
  for name, value in _ONE_DEVICE.items():
    set_field(config, name, value)
  for name in _SNAPSHOTS:
    set_field(config, name, pathlib.PurePath(CLASSIFIER.get(config, name)).name)
  return config


def restore_variables(
  run: Trained, init: Callable[[jax.Array], Any], mesh: jax.sharding.Mesh
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


def verify(run: Trained) -> None:
  """Reads the arrays of a run's model to compare them with their checksums.

  Raises:
    UserError: they are damaged.
  """
  run.restore(None)


def open_split(run: Trained, split: str) -> tuple[Source, dict[str, Any]]:
  """Opens a split of the run's data set, labelled by the run's classes.

  Returns:
    (the split, its fingerprint with 'as_in_training': whether it is that of training, None where
    the checkpoint does not know).

  Raises:
    UserError: the data cannot be read, or have a label that the run does not know; the run is a
      file of molt export.
  """
  if run.workdir.is_file():
    raise UserError(
      f"{run.workdir}: a model in one file has no data beside it; give the run's folder, or, where "
      'the command takes one, a --table with labels'
    )
  data = datasets.load_split(run.config, split, run.class_names)
  data = sources.relabel(data, run.class_names, where=resuming.where(run.config))
  source = data.splits[split]
  return source, compare(run, split, fingerprint.of(source, data.class_names))


def open_other(run: Trained, path: str) -> tuple[Source, dict[str, Any]]:
  """As `open_split`, of another table, whose columns are called as those of the run's data."""
  data = datasets.load_other(run.config, path, run.class_names)
  data = sources.relabel(data, run.class_names, where=path)
  source = data.splits['test']
  return source, {**fingerprint.of(source, data.class_names), 'as_in_training': None}


def compare(run: Trained, split: str, found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a fingerprint with 'as_in_training', as `open_split` does; logs where that is false."""
  known = run.meta.get('data', {}).get(split)
  changed = known and fingerprint.changes(known, found)
  if changed:
    console.log(f'the {split} split has changed since training: {changed}')
  return {**found, 'as_in_training': None if known is None else not changed}


def compare_split(run: Trained, split: str, source: Source) -> dict[str, Any]:
  """As `compare`, of a split that is labelled by the run's classes."""
  return compare(run, split, fingerprint.of(source, run.class_names))
