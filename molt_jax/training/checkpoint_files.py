"""Checkpoints on disk: where they are, what they belong to, and their arrays, checked."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from molt_jax.config.methods import METHODS
from molt_jax.errors import UserError
from molt_jax.runtime import console
from molt_jax.training import checksums, orbax_noise

LATEST, BEST = 'latest', 'best'
META_KEYS = {'config': dict, 'backbones': dict, 'class_names': list, 'step': int}


def abstract(tree: Any) -> Any:
  """Returns shapes, types and shardings of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def find(workdir: pathlib.Path, kinds: Sequence[str]) -> pathlib.Path | None:
  """Returns the folder of the newest step of the first of these kinds that has one."""
  found = (_steps(workdir, kind) for kind in kinds)
  return next((steps[-1] for steps in found if steps), None)


def _steps(workdir: pathlib.Path, kind: str) -> list[pathlib.Path]:
  """Returns the folders of one kind, the newest last."""
  folder = (workdir / 'checkpoints' / kind).absolute()
  try:
    entries = list(folder.iterdir()) if folder.is_dir() else []
  except OSError as error:
    raise UserError(f'--workdir: {folder} cannot be read: {error.strerror}') from error
  steps = [path for path in entries if path.name.isdecimal() and path.is_dir()]
  return sorted(steps, key=lambda path: int(path.name))


def damaged(folder: pathlib.Path, reason: str) -> UserError:
  """Returns the error that a checkpoint cannot be trusted, with what to do."""
  workdir, kind = folder.parents[2], folder.parent.name
  *older, newest = [None, *_steps(workdir, kind)]
  if newest != folder:
    return UserError(
      f'--workdir: the checkpoint {folder} was replaced while it was read, by training that goes '
      'on beside; give the command again'
    )
  other = (older and older[-1]) or find(workdir, [k for k in (LATEST, BEST) if k != kind])
  left = f'{other} is then used' if other else 'there is no other, so train anew'
  return UserError(f'--workdir: the checkpoint {folder} is damaged ({reason}); delete it: {left}')


def load_model(workdir: pathlib.Path, select: str) -> tuple[dict[str, Any], Any]:
  """Opens a run for evaluation: returns (meta, `restore(abstract) -> {'params', 'statistics'}`).

  Args:
    workdir: the run's folder.
    select: 'best' or 'latest'; the other one is taken where it is not there (a run that was never
      validated has only the latest).

  Raises:
    UserError: no run or no checkpoint there, or a damaged one.
  """
  other = {BEST: LATEST, LATEST: BEST}[select]
  folder = find(workdir, (select, other))
  if folder is None:
    raise UserError(
      f'--workdir: no checkpoint in {str(workdir)!r}; give the --workdir of a run of '
      'python -m molt_jax.train'
    )
  meta = read_meta(folder)
  if folder.parent.name != select and meta.get('score') is not None:
    console.log(f'{workdir / "checkpoints" / select} holds no checkpoint; {folder} is used')
  return meta, lambda tree: restore_item(folder, meta, 'model', tree)


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what the checkpoint in a folder belongs to.

  Raises:
    UserError: it is damaged.
  """
  meta = read_json(folder, 'meta')
  if not isinstance(meta, dict):
    raise damaged(folder, 'meta is no JSON object')
  expected = meta.pop('checksum', None)
  if expected is None and 'checksums' not in meta:
    console.log(f'{folder} is of an older version and has no checksums: it is read unchecked')
  elif checksums.of_json(meta) != expected:
    raise damaged(folder, 'meta is not what was saved')
  wrong = [key for key, kind in META_KEYS.items() if not isinstance(meta.get(key), kind)]
  if wrong:
    raise damaged(folder, f'meta lacks {wrong[0]}')
  if meta['step'] != int(folder.name):
    raise damaged(folder, f'it is of step {meta["step"]}')
  _check_revision(folder, meta)
  return meta


def _check_revision(folder: pathlib.Path, meta: Mapping[str, Any]) -> None:
  """Raises UserError where the method reads what was learned otherwise than it did then."""
  method = str(meta['config'].get('method'))  # A run of pretraining has none.
  if method in METHODS and meta.get('revision', 1) != METHODS[method].revision:
    raise UserError(
      f'--workdir: the checkpoint {folder} is of another version of the method {method!r}, which '
      'would answer differently: train it anew, or use the version of molt_jax that trained it'
    )


def restore_item(folder: pathlib.Path, meta: Mapping[str, Any], item: str, tree: Any) -> Any:
  """Restores the arrays of an item in the shapes, types and shardings of `tree` and checks them.

  Without a tree (None) the model comes as it was saved, on one device.

  Raises:
    UserError: they are damaged, not finite, or not those that `tree` asks for.
  """
  expected = meta.get('checksums', {}).get(item)
  one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if expected is not None and tree is None:
    tree = _saved_model(expected, one_device)
  if expected is not None:
    _check_fits(folder, expected, tree)
  how = {'fallback_sharding': one_device} if tree is None else {}
  with explained(folder, item):
    out = _read(folder, **{item: ocp.args.StandardRestore(tree, **how)})
  if expected is not None:
    found = checksums.of_arrays(out)
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
      raise damaged(folder, f'{item}: {wrong[0]} is not what was saved')
  name = checksums.not_finite(out)
  if name:
    raise damaged(folder, f'{item}: {name} is not finite')
  return out


def _saved_model(expected: Mapping[str, str], sharding: jax.sharding.Sharding) -> dict[str, Any]:
  """Returns the abstract tree of a saved model, by the names of its checksums."""
  tree = {'params': {}, 'statistics': {}}
  for name, text in expected.items():
    *parents, leaf = name.split('/')
    kind, _, dimensions = text.split()[0].rstrip(']').partition('[')
    shape = tuple(map(int, filter(None, dimensions.split(','))))
    inner = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
    inner[leaf] = jax.ShapeDtypeStruct(shape, np.dtype(kind), sharding=sharding)
  return tree


def _check_fits(folder: pathlib.Path, expected: Mapping[str, str], tree: Any) -> None:
  """Raises UserError unless the checkpoint holds the arrays that the model wants."""
  saved = {name: text.split()[0] for name, text in expected.items()}
  wanted = {name: checksums.kind(x) for name, x in checksums.named(tree)}
  wrong = sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name))
  if wrong:
    raise UserError(
      f'--workdir: the checkpoint {folder} has {saved.get(wrong[0], "nothing")} as {wrong[0]}, '
      f'and this version makes {wanted.get(wrong[0], "nothing")} of its config; use the version '
      'that it was trained with, or train anew'
    )


def read_json(folder: pathlib.Path, item: str) -> Any:
  """Returns an item that is JSON.

  Raises:
    UserError: it is damaged.
  """
  with explained(folder, item):
    return _read(folder, **{item: ocp.args.JsonRestore()})


def _read(folder: pathlib.Path, **item: Any) -> Any:
  """Restores one item and touches nothing: a training run may be writing beside it."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.Composite(**item))[next(iter(item))]


@contextlib.contextmanager
def explained(folder: pathlib.Path, item: str) -> Iterator[None]:
  """Makes one line of all that Orbax and TensorStore raise and log while they read."""
  try:
    with orbax_noise.silent():
      yield
  except Exception as error:  # Of any type: files that are damaged lead anywhere.
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      raise UserError(
        f'--workdir: not enough memory for {item} of the checkpoint {folder}'
      ) from error
    locked = [path for path in folder.rglob('*') if not os.access(path, os.R_OK)]
    if locked:
      raise UserError(f'--workdir: {locked[0]} cannot be read: permission denied') from error
    raise damaged(folder, f'{item} cannot be read') from error
