"""Orbax checkpoints: trainable state, data iterator, and what they belong to (config, towers, class names)."""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from molt_jax import saving
from molt_jax.config import UserError
from molt_jax.train_state import TrainState

LATEST, BEST = 'latest', 'best'
ITEMS = ('model', 'optimizer', 'data', 'meta')


class Checkpoints:
  """The checkpoints of one run, `DIR/checkpoints/{latest,best}/STEP/`.

  A step holds four items: `model` (parameters and statistics, all that evaluation reads), `optimizer` (step, moments, the CCA estimator's
  memory), `data` (the position of the data iterator) and `meta` (config, tower identities, class names, validation score).
  """

  def __init__(self, workdir: pathlib.Path):
    self._folder = workdir / 'checkpoints'
    with saving.explained(self._folder):
      self._managers = {kind: _manager(workdir, kind) for kind in (LATEST, BEST)}

  def latest_step(self) -> int | None:
    """Returns the step of the latest checkpoint, None where there is none."""
    return self._managers[LATEST].latest_step()

  def meta(self, kind: str = LATEST) -> dict[str, Any]:
    """Returns what the newest checkpoint of that kind belongs to; {} where there is none."""
    manager = self._managers[kind]
    step = manager.latest_step()
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta'] if step is not None else {}

  def save(self, state: TrainState, iterator: Any, meta: dict[str, Any], *, kind: str) -> None:
    """Starts saving; returns as soon as the arrays are copied off the devices. Whole or absent: Orbax renames when all is written."""
    step = int(state.step)
    manager = self._managers[kind]
    if step in manager.all_steps():  # Written before a kill that lost the steps up to here; those steps came out the same, bit for bit.
      return
    with saving.explained(self._folder):
      manager.save(step, args=ocp.args.Composite(
        model=ocp.args.StandardSave({'params': state.params, 'statistics': state.statistics}),
        optimizer=ocp.args.StandardSave({'step': state.step, 'opt_state': state.opt_state, 'cca': state.cca}),
        data=ocp.args.JsonSave(iterator.get_state()),  # The same in every process, however many there are.
        meta=ocp.args.JsonSave(meta)))

  def check(self) -> None:
    """Raises UserError if a save that has ended since went wrong; does not wait."""
    with saving.explained(self._folder):
      for manager in self._managers.values():
        if not manager.is_saving_in_progress():
          manager.wait_until_finished()

  def restore(self, state: TrainState, iterator: Any) -> TrainState:
    """Returns the latest state in the shardings of `state`, and moves `iterator` to where it was."""
    model = _abstract({'params': state.params, 'statistics': state.statistics})
    optimizer = _abstract({'step': state.step, 'opt_state': state.opt_state, 'cca': state.cca})
    out = self._managers[LATEST].restore(self.latest_step(), args=ocp.args.Composite(
        model=ocp.args.StandardRestore(model), optimizer=ocp.args.StandardRestore(optimizer), data=ocp.args.JsonRestore()))
    iterator.set_state(out['data'])
    return TrainState(**out['model'], **out['optimizer'], seed=state.seed)

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: it cannot be written.
    """
    with saving.explained(self._folder), contextlib.ExitStack() as stack:
      for manager in self._managers.values():
        stack.callback(manager.close)


def _manager(workdir: pathlib.Path, kind: str) -> ocp.CheckpointManager:
  # Both kinds may save the same step at once: without names of their own, one's processes could pass the other's barriers and wait for ever.
  named = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind)
  options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True, multiprocessing_options=named)
  return ocp.CheckpointManager((workdir / 'checkpoints' / kind).absolute(), options=options, item_names=ITEMS)


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _read(path: pathlib.Path, **item: Any) -> Any:
  """Restores one item of the checkpoint at `path`, and touches nothing: a training run may be writing beside it."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(path, args=ocp.args.Composite(**item))[next(iter(item))]


def _restore_model(path: pathlib.Path, abstract: Any) -> Any:
  return _read(path, model=ocp.args.StandardRestore(abstract))


def load_model(workdir: pathlib.Path, select: str) -> tuple[dict[str, Any], Any]:
  """Opens a run for evaluation: returns (meta, `restore(abstract) -> {'params', 'statistics'}`).

  Args:
    workdir: the run's folder.
    select: 'best' or 'latest'; a run that was never validated has only the latest.

  Raises:
    UserError: no run or no checkpoint there.
  """
  for kind in dict.fromkeys((select, LATEST)):
    folder = workdir / 'checkpoints' / kind
    if not folder.is_dir():
      continue
    steps = ocp.utils.checkpoint_steps(folder.absolute())
    if steps:
      path = folder.absolute() / str(max(steps))
      return _read(path, meta=ocp.args.JsonRestore()), functools.partial(_restore_model, path)
  raise UserError(f'--workdir: no checkpoint in {str(workdir)!r}; give the --workdir of a run of python -m molt_jax.train')
