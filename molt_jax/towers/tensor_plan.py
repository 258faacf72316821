"""Which tensors of a tower's files make which of our parameters, and the way back."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from molt_jax.errors import UserError
from molt_jax.towers.base import Family
from molt_jax.towers.tensors import Transform
from molt_jax.towers.tower_files import WEIGHT_TYPES, TowerFiles

MOST_NAMED = 40  # Unfit tensors in one error.


class Row(NamedTuple):
  """What makes one parameter.

  Attributes:
    names: Hugging Face tensors; of a parameter of the layers, one a layer.
    shape: of each.
    transform: how each becomes ours.
  """

  names: list[str]
  shape: tuple[int, ...]
  transform: Transform


Plan = dict[str, Row]  # By the path of the parameter.


def upper_layers(boxed: Any, family: Family, first_layer: int) -> Any:
  """Returns a tower's abstract parameters (boxed) from a layer on: without what `embed` reads and
  without the layers below.
  """
  if not first_layer:
    return boxed

  def cut(x):
    return jax.ShapeDtypeStruct((x.shape[0] - first_layer, *x.shape[1:]), x.dtype)

  kept = {name: x for name, x in boxed.items() if name not in family.inputs}
  return kept | {'layers': jax.tree.map(cut, kept['layers'])}


def above(plan: Plan, wanted: Mapping[str, Any], first_layer: int) -> Plan:
  """Returns the part of a plan that makes these parameters, of layers from one on."""
  found = {path: row for path, row in plan.items() if path in wanted}
  for path, row in found.items():
    if path.startswith('layers/'):
      found[path] = row._replace(names=row.names[first_layer:])
  return found


def flat(tree: Any) -> dict[str, Any]:
  """Returns path, joined by /, -> leaf."""
  return traverse_util.flatten_dict(tree, sep='/')


def make(
  files: TowerFiles, wanted: dict[str, jax.ShapeDtypeStruct], *, complete: bool = True
) -> Plan:
  """Returns which tensors of the files make our parameters.

  Args:
    files: what there is.
    wanted: our parameters.
    complete: whether every tensor must be there, and no other.

  Raises:
    UserError: names every tensor that is missing, unknown or of the wrong shape or type.
  """
  plan, wrong = _sources(files, wanted), []
  if files.shapes is None:
    return plan
  for names, expected, _ in plan.values():
    wrong += [
      f'{n} has shape {files.shapes[n]} instead of {expected}'
      for n in names
      if files.shapes.get(n, expected) != expected
    ]
    wrong += [
      f'{n} has type {files.types[n]} instead of {", ".join(WEIGHT_TYPES)}'
      for n in names
      if n in files.types
    ]
  used = {n for names, _, _ in plan.values() for n in names}
  missing = sorted(used - set(files.shapes))
  others = [n for n in set(files.shapes) - used if math.prod(files.shapes[n])]
  unknown = sorted(n for n in others if not re.fullmatch(files.family.ignored, n))
  faults = []
  for fault, names in (('missing', missing), ('unknown', unknown)):
    if names and complete:
      faults.append(f'{fault}: {", ".join(_by_layer(names))}')
  faults += wrong[:MOST_NAMED] + [f'{len(wrong) - MOST_NAMED} more'] * (len(wrong) > MOST_NAMED)
  if faults:
    raise UserError(
      f'{files.identity["path"]}: the tensors do not fit the configuration ({files.architecture}); '
      + '; '.join(faults)
    )
  return plan


def _sources(files: TowerFiles, wanted: dict[str, jax.ShapeDtypeStruct]) -> Plan:
  """What `make` returns, of tensors that may not be there."""
  family, found = files.family, {}
  for template, (path, stored) in family.tensors.items():
    if path not in wanted:
      continue
    transform = stored
    if path in family.resampled:
      transform = family.resampled[path](stored, files.architecture)
    shape = wanted[path].shape
    stacked = path.startswith('layers/')
    names = [template.format(i) for i in range(shape[0])] if stacked else [template]
    expected = transform.source_shape(shape[1:] if stacked else shape)
    found[path] = Row(names, expected, transform)
  return found


def hugging_face_tensors(params: Any, family: Family) -> dict[str, np.ndarray]:
  """The way back from `load_tower`: Hugging Face tensor name -> tensor, in Hugging Face's
  orientation and without a prefix.

  Args:
    params: a tower's parameters, unboxed, not quantised.
    family: of the tower.
  """
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
  out = {}
  for template, (path, transform) in family.tensors.items():
    if path in flat:
      for layer, w in enumerate(flat[path] if path.startswith('layers/') else flat[path][None]):
        out[template.format(layer)] = np.ascontiguousarray(
          transform.restore(w, transform.source_shape(w.shape))
        )
  return out


def _by_layer(names: list[str]) -> list[str]:
  """Joins names that differ in the layer only: 'layers.*.x (4)'."""
  counts = Counter(re.sub(r'\d+', '*', n, count=1) for n in names)
  return [n if count == 1 else f'{n} ({count})' for n, count in counts.items()]
