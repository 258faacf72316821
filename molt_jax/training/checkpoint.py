"""Orbax checkpoints: trainable state, data iterator, and what they belong to (config, towers, class
names, data), with a checksum of every array.

A CRC-32 finds every burst of up to 32 wrong bits and any other damage but for one in 4e9. It guards
against damage and not against forgery, and costs 0.15 to 1 s a gigabyte.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from molt_jax.errors import UserError
from molt_jax.runtime import console, processes
from molt_jax.training import saving
from molt_jax.training.train_state import TrainState

LATEST, BEST = 'latest', 'best'
ITEMS = ('model', 'optimizer', 'data', 'meta')
META_KEYS = {'config': dict, 'backbones': dict, 'class_names': list, 'step': int}
NO_SCORE = -1.0  # Less than any score.


class Checkpoints:
  """The checkpoints of one run, `DIR/checkpoints/{latest,best}/STEP/`.

  A step holds four items: `model` (parameters and statistics, all that evaluation reads),
  `optimizer` (step, moments, the CCA estimator's memory), `data` (the position of the iterator) and
  `meta` (config, tower identities, class names, fingerprint of the data, validation score, and the
  checksums of the other three and of itself).
  """

  def __init__(self, workdir: pathlib.Path):
    self.workdir = workdir
    self._folder = workdir / 'checkpoints'
    self._managers: dict[str, ocp.CheckpointManager] = {}
    self._sealed: tuple[int, dict[str, Any]] | None = None
    self._anew: int | None = None

  def prepare(self) -> None:
    """Gets ready to save; until then nothing is written.

    Raises:
      UserError: the folders of the checkpoints cannot be used.
    """
    with saving.explained(self._folder):
      self._managers = {kind: _manager(self.workdir, kind) for kind in (LATEST, BEST)}
      manager, step = self._managers[BEST], self._anew
      for later in [found for found in manager.all_steps() if step is not None and found > step]:
        manager.delete(later)  # Orbax saves no step before one that is there.

  def meta(self) -> dict[str, Any]:
    """Returns what the checkpoint that training goes on from belongs to; {} where there is none.

    Raises:
      UserError: it is damaged.
    """
    folder = self._resumed()
    if folder and folder.parent.name != LATEST:
      console.log(f'{folder.parents[1] / LATEST} holds no checkpoint; {folder} is gone on from')
    return read_meta(folder) if folder else {}

  def best_score(self) -> float:
    """Returns the best validation score so far.

    Raises:
      UserError: the best checkpoint is damaged.
    """
    folder = find(self.workdir, (BEST,)) if self._anew is None else None
    score = read_meta(folder).get('score') if folder else None
    return NO_SCORE if score is None else score

  def save(self, state: TrainState, iterator: Any, meta: dict[str, Any], *, kind: str) -> None:
    """Starts saving; returns as soon as the arrays are copied off the devices.

    Whole or absent: Orbax renames when all is written.

    Raises:
      UserError: the state is not finite; nothing is saved.
    """
    step = int(state.step)
    manager = self._managers[kind]
    # Written before a kill that lost the steps up to here: they came out the same, bit for bit.
    if step in manager.all_steps():
      return
    items = _items(state)
    if self._sealed is None or self._sealed[0] != step:
      self.check_finite(state)
      self._sealed = step, {name: checksums(tree) for name, tree in items.items()}
    position = iterator.get_state()  # The same in every process, however many there are.
    sums = {**self._sealed[1], 'data': _checksum_json(position)}
    with saving.explained(self._folder):
      manager.save(
        step,
        args=ocp.args.Composite(
          model=ocp.args.StandardSave(items['model']),
          optimizer=ocp.args.StandardSave(items['optimizer']),
          data=ocp.args.JsonSave(position),
          meta=ocp.args.JsonSave(seal({**meta, 'checksums': sums})),
        ),
      )

  def check(self) -> None:
    """Raises UserError if a save that has ended since went wrong; does not wait."""
    with saving.explained(self._folder):
      for manager in self._managers.values():
        if not manager.is_saving_in_progress():
          manager.wait_until_finished()

  def check_finite(self, state: TrainState) -> None:
    """Raises UserError unless all numbers of the state are finite; all processes call it."""
    name = _not_finite(_items(state))
    if name:
      raise UserError(
        f'the state after step {int(state.step)} is not finite ({name}) and is not saved; the '
        f'last good one is in {self._folder}; lower config.optimizer.learning_rate or set '
        'config.optimizer.clip_norm'
      )

  def restore(self, state: TrainState) -> tuple[TrainState, Any]:
    """Returns the state to go on from, in the shardings of `state`, and the iterator's position.

    Raises:
      UserError: the checkpoint is damaged.
    """
    folder = self._resumed()
    meta = read_meta(folder)
    items = _items(state)
    out = {name: restore_item(folder, meta, name, abstract(tree)) for name, tree in items.items()}
    position = _read_json(folder, 'data')
    expected = meta.get('checksums', {}).get('data')
    if expected is not None and _checksum_json(position) != expected:
      raise damaged(folder, 'the position of the data is not what was saved')
    restored = TrainState(**out['model'], **out['optimizer'], seed=state.seed)
    if int(restored.step) != meta['step']:
      raise damaged(folder, f'its state is of step {int(restored.step)}')
    return restored, position

  def move(self, iterator: Any, position: Any) -> None:
    """Moves the data iterator to a restored position."""
    with _library(self._resumed(), 'the position of the data'):
      iterator.set_state(position)

  def score_anew(self, step: int) -> None:
    """Forgets the scores so far, which are of other data; training goes on at `step`."""
    self._anew = step

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: it cannot be written.
    """
    with saving.explained(self._folder), contextlib.ExitStack() as stack:
      for manager in self._managers.values():
        stack.callback(manager.close)

  def _resumed(self) -> pathlib.Path | None:
    return find(self.workdir, (LATEST, BEST))


def _manager(workdir: pathlib.Path, kind: str) -> ocp.CheckpointManager:
  # Both kinds may save the same step at once: without names of their own, one's processes could
  # pass the other's barriers and wait for ever.
  named = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=1, cleanup_tmp_directories=True, multiprocessing_options=named
  )
  folder = (workdir / 'checkpoints' / kind).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _silent():
      return ocp.CheckpointManager(folder, options=options, item_names=ITEMS)
  except OSError as error:
    raise UserError(
      f'--workdir: {folder} cannot be used for checkpoints: {error.strerror}'
    ) from error


def _items(state: TrainState) -> dict[str, Any]:
  return {
    'model': {'params': state.params, 'statistics': state.statistics},
    'optimizer': {'step': state.step, 'opt_state': state.opt_state, 'cca': state.cca},
  }


def abstract(tree: Any) -> Any:
  """Returns shapes, types and shardings of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


# ---- Checksums -----------------------------------------------------------------------------------


def checksums(tree: Any) -> dict[str, str]:
  """Returns 'TYPE[SHAPE] CRC' of each array of a tree, by its path; all processes call it together.

  The CRC-32 is of the whole array's bytes in C order, however it lies on devices.
  """
  return {name: f'{_kind(x)} {zlib.crc32(_bytes(x)):08x}' for name, x in _named(tree)}


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `meta` with the checksum of all of it."""
  return {**meta, 'checksum': _checksum_json(meta)}


def _checksum_json(content: Any) -> str:
  return f'{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}'


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), x


def _kind(x: Any) -> str:
  return f'{np.dtype(x.dtype).name}[{",".join(map(str, x.shape))}]'


def _bytes(x: Any) -> np.ndarray:
  return np.ascontiguousarray(processes.fetch(x)).reshape(-1).view(np.uint8)


def _not_finite(tree: Any) -> str:
  """Returns the name of an array with a number that is not finite; '' where there is none."""
  for name, x in _named(tree):
    if jax.dtypes.issubdtype(x.dtype, np.inexact) and not np.isfinite(processes.fetch(x)).all():
      return name
  return ''


# ---- Reading -------------------------------------------------------------------------------------


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
  meta = _read_json(folder, 'meta')
  if not isinstance(meta, dict):
    raise damaged(folder, 'meta is no JSON object')
  expected = meta.pop('checksum', None)
  if expected is None and 'checksums' not in meta:
    console.log(f'{folder} is of an older version and has no checksums: it is read unchecked')
  elif _checksum_json(meta) != expected:
    raise damaged(folder, 'meta is not what was saved')
  wrong = [key for key, kind in META_KEYS.items() if not isinstance(meta.get(key), kind)]
  if wrong:
    raise damaged(folder, f'meta lacks {wrong[0]}')
  if meta['step'] != int(folder.name):
    raise damaged(folder, f'it is of step {meta["step"]}')
  return meta


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
  with _library(folder, item):
    out = _read(folder, **{item: ocp.args.StandardRestore(tree, **how)})
  if expected is not None:
    found = checksums(out)
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
      raise damaged(folder, f'{item}: {wrong[0]} is not what was saved')
  name = _not_finite(out)
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
  wanted = {name: _kind(x) for name, x in _named(tree)}
  wrong = sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name))
  if wrong:
    raise UserError(
      f'--workdir: the checkpoint {folder} has {saved.get(wrong[0], "nothing")} as {wrong[0]}, '
      f'and this version makes {wanted.get(wrong[0], "nothing")} of its config; use the version '
      'that it was trained with, or train anew'
    )


def _read_json(folder: pathlib.Path, item: str) -> Any:
  with _library(folder, item):
    return _read(folder, **{item: ocp.args.JsonRestore()})


def _read(folder: pathlib.Path, **item: Any) -> Any:
  """Restores one item and touches nothing: a training run may be writing beside it."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.Composite(**item))[next(iter(item))]


@contextlib.contextmanager
def _library(folder: pathlib.Path, item: str) -> Iterator[None]:
  """Makes one line of all that Orbax and TensorStore raise and log while they read."""
  try:
    with _silent():
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


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Keeps Orbax from logging, at length, what it also raises."""
  _ignore_stragglers()
  disabled = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(disabled)


def _ignore_stragglers() -> None:
  """Keeps reads that Orbax abandons after the first one failed from printing their tracebacks.

  They end later, in threads of TensorStore or with the event loop, where nobody can catch them.
  """
  before = sys.unraisablehook
  if getattr(before, 'is_ours', False):
    return

  def hook(unraisable):
    code = getattr(unraisable.object, 'cr_code', None)
    abandoned = code is not None and 'orbax' in code.co_filename
    if not abandoned and str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  hook.is_ours = True
  sys.unraisablehook = hook
  logging.getLogger('asyncio').addFilter(
    lambda record: 'TensorStore' not in str(record.exc_info and record.exc_info[1])
  )
