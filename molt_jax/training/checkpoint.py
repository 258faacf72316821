"""Orbax checkpoints: trainable state, data iterator, and what they belong to (config, towers, class
names, data), with a checksum of every array. `checkpoint_files` reads them.
"""

import contextlib
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from molt_jax.errors import UserError
from molt_jax.runtime import console
from molt_jax.training import checkpoint_files, checksums, orbax_noise
from molt_jax.training.checkpoint_files import BEST, LATEST
from molt_jax.training.train_state import TrainState

ITEMS = ('model', 'optimizer', 'data', 'meta')
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
    with orbax_noise.explained(self._folder):
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
    return checkpoint_files.read_meta(folder) if folder else {}

  def best_score(self) -> float:
    """Returns the best validation score so far.

    Raises:
      UserError: the best checkpoint is damaged.
    """
    folder = checkpoint_files.find(self.workdir, (BEST,)) if self._anew is None else None
    score = checkpoint_files.read_meta(folder).get('score') if folder else None
    return NO_SCORE if score is None else score

  def save(self, state: TrainState, iterator: Any, meta: dict[str, Any], *, kind: str) -> None:
    """Starts saving; returns as soon as the arrays are copied off the devices.

    Whole or absent: Orbax renames when all is written.

    Raises:
      UserError: the state is not finite; nothing is checkpoint_files.
    """
    step = int(state.step)
    manager = self._managers[kind]
    # Written before a kill that lost the steps up to here: they came out the same, bit for bit.
    if step in manager.all_steps():
      return
    items = _items(state)
    if self._sealed is None or self._sealed[0] != step:
      self.check_finite(state)
      self._sealed = step, {name: checksums.of_arrays(tree) for name, tree in items.items()}
    position = iterator.get_state()  # The same in every process, however many there are.
    sums = {**self._sealed[1], 'data': checksums.of_json(position)}
    with orbax_noise.explained(self._folder):
      manager.save(
        step,
        args=ocp.args.Composite(
          model=ocp.args.StandardSave(items['model']),
          optimizer=ocp.args.StandardSave(items['optimizer']),
          data=ocp.args.JsonSave(position),
          meta=ocp.args.JsonSave(checksums.seal({**meta, 'checksums': sums})),
        ),
      )

  def check(self) -> None:
    """Raises UserError if a save that has ended since went wrong; does not wait."""
    with orbax_noise.explained(self._folder):
      for manager in self._managers.values():
        if not manager.is_saving_in_progress():
          manager.wait_until_finished()

  def check_finite(self, state: TrainState) -> None:
    """Raises UserError unless all numbers of the state are finite; all processes call it."""
    name = checksums.not_finite(_items(state))
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
    meta = checkpoint_files.read_meta(folder)
    items = _items(state)
    out = {
      name: checkpoint_files.restore_item(folder, meta, name, checkpoint_files.abstract(tree))
      for name, tree in items.items()
    }
    position = checkpoint_files.read_json(folder, 'data')
    expected = meta.get('checksums', {}).get('data')
    if expected is not None and checksums.of_json(position) != expected:
      raise checkpoint_files.damaged(folder, 'the position of the data is not what was saved')
    restored = TrainState(**out['model'], **out['optimizer'], seed=state.seed)
    if int(restored.step) != meta['step']:
      raise checkpoint_files.damaged(folder, f'its state is of step {int(restored.step)}')
    return restored, position

  def move(self, iterator: Any, position: Any) -> None:
    """Moves the data iterator to a restored position."""
    with checkpoint_files.explained(self._resumed(), 'the position of the data'):
      iterator.set_state(position)

  def score_anew(self, step: int) -> None:
    """Forgets the scores so far, which are of other data; training goes on at `step`."""
    self._anew = step

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: it cannot be written.
    """
    with orbax_noise.explained(self._folder), contextlib.ExitStack() as stack:
      for manager in self._managers.values():
        stack.callback(manager.close)

  def _resumed(self) -> pathlib.Path | None:
    return checkpoint_files.find(self.workdir, (LATEST, BEST))


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
    with orbax_noise.silent():
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
