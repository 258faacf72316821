"""Each step's numbers, looked at when they have come, so that the device never waits."""

import collections
import json
import math
import pathlib
import time
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
import optax

from molt_jax.errors import UserError
from molt_jax.runtime import atomic, logbook, processes
from molt_jax.training.schedule import StepSchedule

IN_FLIGHT = 2  # Steps dispatched before the oldest one's loss is looked at.


class StepMonitor:
  """Logs steps and stops the run on a loss that is not finite.

  Attributes:
    note: the latest loss, for the progress bar.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    schedule: StepSchedule,
    learning_rate: optax.Schedule,
    log: logbook.Logbook,
    ids: Sequence[str],
  ):
    """Gets ready for a run's steps.

    Args:
      config: reads train.log_every and optimizer.
      workdir: where a batch whose loss is not finite is noted.
      schedule: the step numbers of the run.
      learning_rate: of each step.
      log: where to.
      ids: of the training examples.
    """
    self._config, self._workdir, self._schedule = config, workdir, schedule
    self._learning_rate, self._log, self._ids = learning_rate, log, ids
    self.note = ''
    self._flying = collections.deque()
    self.restart_clock()

  def restart_clock(self) -> None:
    """Begins to time anew, after a pause."""
    self._since = self._began = None
    self._images = self._steps = 0

  @property
  def epoch_seconds(self) -> float:
    """Seconds of an epoch at the speed since the last pause, of the steps that have landed."""
    each = (time.monotonic() - self._began) / max(self._steps, 1)
    return each * self._schedule.per_epoch

  def dispatched(self, step: int, metrics, index: jax.Array) -> None:
    """Takes the metrics of a step that was dispatched; looks at those of an older one."""
    self._flying.append((step, metrics, index))
    if len(self._flying) > IN_FLIGHT:
      self._land()

  def drain(self) -> None:
    """Waits for all steps that were dispatched."""
    while self._flying:
      self._land(timed=False)

  def _land(self, *, timed=True):
    step, metrics, index = self._flying.popleft()
    loss = float(metrics['loss'])
    values = {'loss': loss, 'gradient norm': float(metrics['grad_norm'])}
    if not all(map(math.isfinite, values.values())):
      self._refuse(step, values, index)
    self.note = f'loss {loss:.4f}'
    self._count(len(index))
    if step % self._config.train.log_every == 0 or step == self._schedule.total:
      self._write(step, jax.device_get(metrics), timed=timed)

  def _count(self, images):
    # The first step after a pause (compilation, validation) starts the clock and is not counted.
    if self._since is None:
      self._since = self._began = time.monotonic()
    else:
      self._images += images
      self._steps += 1

  def _write(self, step, metrics, *, timed):
    seconds = time.monotonic() - self._since
    # What could not be computed (a correlation with a past that is not there yet) is absent.
    values = {name: value.tolist() for name, value in metrics.items() if not np.isnan(value).all()}
    values['learning_rate'] = float(self._learning_rate(step - 1))
    values['epoch'] = round(step / self._schedule.per_epoch, 4)
    if self._images and timed:  # Steps that have been waiting to be looked at take no time.
      values['images_per_second'] = round(self._images / seconds, 2)
    self._log.write('train', step, values)
    self._since, self._images = time.monotonic(), 0

  def _refuse(self, step, values, index):
    ids = [self._ids[i] for i in processes.fetch(index)]
    path = self._workdir / 'not_finite.json'
    if processes.is_main():
      shown = {name: str(value) for name, value in values.items()}
      atomic.write(path, json.dumps({'step': step, **shown, 'ids': ids}, indent=2) + '\n')
    name = next(name for name, value in values.items() if not math.isfinite(value))
    rate = self._config.optimizer.learning_rate
    raise UserError(
      f'{name} {values[name]} at step {step} is not finite; the batch is in {path}, the last good '
      'state in '
      f'checkpoints/; lower config.optimizer.learning_rate ({rate}) or set '
      'config.optimizer.clip_norm'
    )
