"""Begins a run with what another run has learned (`--init_from=RUN`): parameters and statistics of
the hidden states; classes are mapped by name, and those that the other run does not know begin
fresh. What is fitted in closed form, or made of the classes' names, is made anew.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from molt_jax.config import resolved
from molt_jax.data import findings
from molt_jax.errors import UserError
from molt_jax.features import frozen
from molt_jax.methods.base import Method, make_method
from molt_jax.methods.head import RIDGE
from molt_jax.runtime import console
from molt_jax.training import checkpoint_files, resuming
from molt_jax.training.assembly import Assembly

# Fields that say what parameters mean, beside those of the method's own section.
_SHAPING = (
  'method',
  'dataset.modalities',
  'missing.strategy',
  'backbones.image.trainable',
  'backbones.text.trainable',
)
_SECTIONS = ('fusion.', 'classifier.')
_FREE = ('classifier.dropout',)


@dataclasses.dataclass(frozen=True)
class WarmStart:
  """Another run, fit to begin one with.

  Attributes:
    folder: of the other run.
    step: of its checkpoint.
    class_names: its classes.
    restore: () -> {'params', 'statistics'}, checked.
  """

  folder: pathlib.Path
  step: int
  class_names: Sequence[str]
  restore: Callable[[], Any]

  def __call__(self, assembly: Assembly, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first variables of a run with what the other one has learned.

    Args:
      assembly: of the new run.
      variables: its own first ones; they say where arrays lie.

    Raises:
      UserError: an array of the other run has another shape.
    """
    left_out = _left_out(assembly.method)
    own, others = _flat(variables, left_out), _flat(self.restore(), left_out)
    axes = _class_axes(assembly)
    known_k = np.array([name in self.class_names for name in assembly.class_names], bool)
    known = [name for name in assembly.class_names if name in self.class_names]
    old_k = [self.class_names.index(name) for name in known]
    strange = sorted(set(own) ^ set(others))
    if strange:
      raise self._refusal(strange[0])
    mixed = {}
    for name, x in own.items():
      axis, other = axes.get(name), np.asarray(others[name])
      if axis is None:
        mixed[name] = other
      else:
        mixed[name] = np.moveaxis(np.array(x), axis, 0)
        mixed[name][known_k] = np.moveaxis(other, axis, 0)[old_k]
        mixed[name] = np.moveaxis(mixed[name], 0, axis)
      if mixed[name].shape != x.shape:
        raise self._refusal(name)
    placed = {n: jax.device_put(x.astype(own[n].dtype), own[n].sharding) for n, x in mixed.items()}
    self._say(assembly.class_names)
    return _merged(variables, placed)

  def _refusal(self, name: str) -> UserError:
    return UserError(
      f'--init_from: the run in {str(self.folder)!r} has another array {name} than this config '
      'makes; give the fields of its config.json, or leave --init_from out'
    )

  def _say(self, class_names: Sequence[str]) -> None:
    fresh = [repr(name) for name in class_names if name not in self.class_names]
    known = len(class_names) - len(fresh)
    new = f', {len(fresh)} begin fresh: {findings.some(fresh)}' if fresh else ''
    console.log(
      f'begins with what {self.folder} had learned at step {self.step}: it knows {known} of '
      f'{len(class_names)} classes{new}'
    )


def open(folder: str | pathlib.Path, assembly: Assembly) -> WarmStart:
  """Opens the run to begin with.

  Args:
    folder: of a run of the same command.
    assembly: of the new run.

  Raises:
    UserError: no run there or a damaged one, one of another method or head, or one on other towers.
  """
  folder, config = pathlib.Path(folder).expanduser(), assembly.config
  try:
    theirs = resuming.schema_of(config).read_run(folder)
    meta, restore = checkpoint_files.load_model(folder, theirs.eval.select)
  except UserError as error:
    raise UserError(f'--init_from: {str(error).removeprefix("--workdir: ")}') from error
  sections = (f'{config.method}.', *_SECTIONS)
  changed = []
  for line in resolved.differences(theirs, config):
    name = line.split(':')[0]
    if name in _SHAPING or (name.startswith(sections) and name not in _FREE):
      changed.append(line)
  if changed:
    raise UserError(
      f'--init_from: the run in {str(folder)!r} has another head ({"; ".join(changed)}, that run '
      '-> this one); give its values, or leave --init_from out'
    )
  try:
    frozen.check_same_towers(meta['backbones'], assembly.towers)
  except UserError as error:
    raise UserError(f'--init_from: {str(folder)!r}: {error}') from error
  return WarmStart(folder, meta['step'], meta['class_names'], lambda: restore(None))


def _left_out(method: Method) -> set[str]:
  """Returns the statistics that a run makes itself: in closed form, or of its classes' names."""
  return {RIDGE, *method.closed_form, *method.of_names}


def _flat(variables: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
  """Returns what is taken over, by its path."""
  statistics = {k: v for k, v in variables.get('statistics', {}).items() if k not in left_out}
  tree = {'params': variables['params'], 'statistics': statistics}
  return traverse_util.flatten_dict(tree, sep='/')


def _merged(variables: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
  nested = traverse_util.unflatten_dict(dict(flat), sep='/')
  statistics = {**variables.get('statistics', {}), **nested.get('statistics', {})}
  return {**variables, 'params': nested['params'], 'statistics': statistics}


def _class_axes(assembly: Assembly) -> dict[str, int]:
  """Returns the axis of each array that has one entry a class: the one that grows by a class."""
  names = assembly.class_names
  more = make_method(
    assembly.config, assembly.towers, num_classes=len(names) + 1, class_names=(*names, ' ')
  )
  shapes = []
  for method in (assembly.method, more):
    found = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
    flat = _flat(found, _left_out(method))
    shapes.append({name: x.shape for name, x in flat.items()})
  axes = {}
  for name, shape in shapes[0].items():
    grown = [a for a, b in enumerate(shapes[1][name]) if b != shape[a]]
    if grown:
      axes[name] = grown[0]
  return axes
