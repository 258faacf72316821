"""What training commands share: the order of a run, its numbers, what is watched, and how it stops
and goes on.
"""

import abc
import collections
import contextlib
import json
import math
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.json_files import read_json
from molt_jax.config.schema import Schema
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console, logbook, lost, processes, sharding
from molt_jax.training import checkpoint, runs, train_state
from molt_jax.training import workdir as workdir_lib

IN_FLIGHT = 2  # Steps dispatched before the oldest one's loss is looked at.


STOPPING = {
  signal.SIGTERM: b'stopping after this step, saved\n',
  signal.SIGINT: b'stopping after this step, saved; interrupt again to stop at once, unsaved\n',
}


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved. Arguments: what to tell the user, the
  signal's number.
  """


def exit_code(run: Callable[[], Any]) -> int:
  """Runs a training command's work: 0 when it is done, 130 or 143 when a signal stopped it,
  saved.
  """
  try:
    run()
  except Interrupted as stopped:
    message, number = stopped.args
    console.log(message)
    return 128 + number
  return 0


class Plan:
  """The run's step numbers: total steps, and when validation and saving are due."""

  def __init__(self, config: ml_collections.ConfigDict, num_examples: int):
    self.per_epoch = num_examples / config.train.batch_size
    self.total = max(1, math.ceil(config.train.epochs * self.per_epoch))
    self._eval_every = config.train.eval_every or max(1, round(self.per_epoch))
    self._save_every = config.train.save_every or self._eval_every

  def validate_at(self, step: int) -> bool:
    return step == self.total or step % self._eval_every == 0

  def save_at(self, step: int) -> bool:
    return step == self.total or step % self._save_every == 0


class Loop(abc.ABC):
  """One run: everything that stays the same from step to step."""

  title: str  # Of the progress bar,
  unit: str  # and what it counts.

  def __init__(self, config, workdir, mesh, data, checkpoints, meta, plan):
    self.config, self.workdir, self.mesh, self.data = config, workdir, mesh, data
    self.checkpoints, self.meta, self.plan = checkpoints, meta, plan
    self.schedule = train_state.make_schedule(config, plan.total)
    checkpoints.prepare()
    self.best = checkpoints.best_score()

  @abc.abstractmethod
  def step(self, state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
    """One update: (the new state, metrics)."""

  @abc.abstractmethod
  def validate(self, state: Any, watch: 'Watch') -> tuple[dict[str, Any], str]:
    """Scores the validation split: (the record to log, what to say of its 'score'); a split that
    determines no score has none and is never the best.
    """

  def refresh(self, state: Any) -> Any:
    """Returns the state with what is fitted anew before each validation."""
    return state

  def run(self, state: Any, iterator: Any) -> Any:
    """Restored state -> [validate the old state -> save -> next batch -> step -> log]; this order
    makes resuming exact. Returns the last state.

    Raises:
      Interrupted: SIGTERM or SIGINT; the state is saved.
      UserError: a loss that is not finite.
    """
    start = step = int(state.step)
    lost.tell_step(self._saved_step)
    log = logbook.Logbook(self.workdir, step=start) if processes.leads() else logbook.NoLogbook()
    agree = processes.Agreement(self.mesh, delay=IN_FLIGHT)
    watch = Watch(self, log, start)
    count = self.config.train.batch_size if self.unit == 'images' else 1
    with (
      stop_on_signals() as stop,
      console.progress(self.title, self.plan.total * count, self.unit, done=start * count) as bar,
    ):
      while True:
        asked = agree(stop() or 0)
        stopping = asked and step > start
        if step > start and (self.plan.validate_at(step) or self.plan.save_at(step) or stopping):
          watch.drain()
          state = self._validate_and_save(state, iterator, log, watch, step, stopping)
          watch.restart_clock()
        if step >= self.plan.total:  # More where the data became fewer.
          break
        if asked:
          self.checkpoints.close()
          raise Interrupted(
            (
              f'stopped at step {step} of {self.plan.total}, saved; the same command goes on from '
              'here'
            ),
            asked,
          )
        self.checkpoints.check()
        batch = sharding.put_batch(next(iterator), self.mesh)
        state, metrics = self.step(state, batch)
        step += 1
        watch.dispatched(step, metrics, batch['index'])
        bar.advance(count, f'epoch {step / self.plan.per_epoch:.1f}, {watch.note}')
    log.close()
    self.checkpoints.close()
    processes.wait('checkpoints written')
    return state

  def _saved_step(self):
    """Returns the step that the same command would go on from, None before the first save."""
    saved = (self.workdir / 'checkpoints' / checkpoint.LATEST).glob('*')
    return max((int(path.name) for path in saved if path.name.isdecimal()), default=None)

  def _validate_and_save(self, state, iterator, log, watch, step, stopping):
    best = False
    self.checkpoints.check_finite(state)
    if self.plan.validate_at(step):
      state = self.refresh(state)
      record, said = self.validate(state, watch)
      score = record.get('score')
      log.write('validation', step, record)
      value = 'no validation score' if score is None else f'validation score {score:.4f}'
      console.log(f'step {step}/{self.plan.total}: {value} ({said})')
      best = score is not None and score > self.best
      self.best = score if best else self.best
      self.meta = {**self.meta, 'score': score}
    meta = {**self.meta, 'step': step}
    if best:
      self.checkpoints.save(state, iterator, meta, kind=checkpoint.BEST)
    if best or stopping or self.plan.save_at(step):
      self.checkpoints.save(state, iterator, meta, kind=checkpoint.LATEST)
    return state


class Watch:
  """Looks at each step's loss when it has come, two steps late so that the device never waits;
  stops the run on one that is not finite.
  """

  def __init__(self, run: Loop, log: logbook.Logbook, step: int):
    self.run, self.log, self.note = run, log, ''
    self._flying = collections.deque()
    self.restart_clock()

  def restart_clock(self):
    self._since = self._began = None
    self._images = self._steps = 0

  @property
  def epoch_seconds(self) -> float:
    """Seconds of an epoch at the speed since the last pause, of the steps that have landed."""
    return (time.monotonic() - self._began) / max(self._steps, 1) * self.run.plan.per_epoch

  def dispatched(self, step, metrics, index):
    self._flying.append((step, metrics, index))
    if len(self._flying) > IN_FLIGHT:
      self._land()

  def drain(self):
    while self._flying:
      self._land(timed=False)

  def _land(self, *, timed=True):
    step, metrics, index = self._flying.popleft()
    loss = float(metrics['loss'])
    if not (math.isfinite(loss) and math.isfinite(float(metrics['grad_norm']))):
      self._not_finite(step, loss, index)
    self.note = f'loss {loss:.4f}'
    self._count(len(index))
    if step % self.run.config.train.log_every == 0 or step == self.run.plan.total:
      self._write(step, jax.device_get(metrics), timed=timed)

  def _count(self, images):
    if (
      self._since is None
      # The first step after a pause (compilation, validation) starts the clock and is not counted.
    ):
      self._since = self._began = time.monotonic()
    else:
      self._images += images
      self._steps += 1

  def _write(self, step, metrics, *, timed):
    seconds = time.monotonic() - self._since
    # What could not be computed (a correlation with a past that is not there yet) is absent.
    values = {name: value.tolist() for name, value in metrics.items() if not np.isnan(value).all()}
    values |= {
      'learning_rate': float(self.run.schedule(step - 1)),
      'epoch': round(step / self.run.plan.per_epoch, 4),
    }
    if self._images and timed:  # Steps that have been waiting to be looked at take no time.
      values['images_per_second'] = round(self._images / seconds, 2)
    self.log.write('train', step, values)
    self._since, self._images = time.monotonic(), 0

  def _not_finite(self, step, loss, index):
    ids = [self.run.data.splits['train'].ids[i] for i in processes.fetch(index)]
    path = self.run.workdir / 'not_finite.json'
    if processes.leads():
      atomic.write(path, json.dumps({'step': step, 'loss': str(loss), 'ids': ids}, indent=2) + '\n')
    raise UserError(
      f'loss {loss} at step {step} is not finite; the batch is in {path}, the last good state in '
      'checkpoints/; lower '
      f'config.optimizer.learning_rate ({self.run.config.optimizer.learning_rate}) or set '
      'config.optimizer.clip_norm'
    )


# ---- Around the loop -----------------------------------------------------------------------------


@contextlib.contextmanager
def working_in(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  *,
  schema: Schema = CLASSIFIER,
) -> Iterator[pathlib.Path]:
  """Makes the folder of a run and keeps other training out of it; see `workdir_lib.held`.

  Args:
    config: of the run.
    folder: where it is.
    schema: that of the command.

  Raises:
    UserError: as `workdir_lib.held`, or the folder holds a run with another config.
  """
  with workdir_lib.held(folder) if processes.leads() else contextlib.nullcontext():
    check_workdir(config, folder, schema=schema)
    yield folder


def check_workdir(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  *,
  schema: Schema = CLASSIFIER,
) -> None:
  """Raises UserError if the folder holds a run with another config."""
  if not (folder / 'config.json').exists():
    return
  changed = resolved.differences(schema.read_run(folder), config)
  changed = [line for line in changed if line.split(':')[0] not in runs.FREE_ON_RESUME]
  if changed:
    raise UserError(
      f'--workdir: {str(folder)!r} holds a run with another config ({"; ".join(changed)}); give '
      'another folder or that config'
    )


def claim_workdir(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Writes config.json; called when nothing is left that the user could have to mend first."""
  atomic.write(folder / 'config.json', resolved.to_json(config) + '\n')


def _earlier_calls(path: pathlib.Path) -> list[Any]:
  try:
    earlier = read_json(path, 'it begins anew') if path.exists() else {'calls': []}
  except UserError as error:
    console.log(str(error))
    return []
  calls = earlier.get('calls') if isinstance(earlier, dict) else None
  return calls if isinstance(calls, list) else []


@contextlib.contextmanager
def accounted(workdir: pathlib.Path, facts: Mapping[str, Any], *, step: int) -> Iterator[None]:
  """Writes DIR/run.json after the block, however it ends: facts, device, and the seconds and peak
  memory of each call that worked on the run.

  Where the block failed and the file cannot be written, the block's error is the one that comes
  out.

  Args:
    workdir: the run's folder.
    facts: what to say of the run beside.
    step: where this call begins; what an earlier call did after it was lost, and done again.
  """
  path, start = workdir / 'run.json', time.monotonic()
  earlier = _earlier_calls(path)
  try:
    yield
  except BaseException:
    with contextlib.suppress(UserError):
      _account(path, facts, earlier, step, start)
    raise
  _account(path, facts, earlier, step, start)


def _account(path, facts, earlier, step, start) -> None:
  device = jax.local_devices()[0]
  on_device = (device.memory_stats() or {}).get('peak_bytes_in_use')  # None on a CPU.
  unit = 1 if sys.platform == 'darwin' else 1024
  call = {
    'from_step': step,
    'seconds': round(time.monotonic() - start, 1),
    'peak_device_bytes': on_device,
    'peak_host_bytes': unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  if processes.leads():
    devices = {
      'device': device.device_kind,
      'devices': jax.device_count(),
      'processes': jax.process_count(),
    }
    record = {**facts, **devices, 'calls': [*earlier, call]}
    atomic.write(path, json.dumps(record, indent=1) + '\n')


class stop_on_signals:
  """Context in which SIGTERM and SIGINT only ask to stop; a second SIGINT stops at once."""

  def __enter__(self):
    self._asked = None
    self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    return lambda: self._asked

  def _ask(self, number, frame):
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = number
    # Not by `console.log`: what the signal interrupts may be in the middle of a line of its own.
    with contextlib.suppress(OSError):
      os.write(2, STOPPING[number])

  def __exit__(self, *exc):
    for number, handler in self._old.items():
      signal.signal(number, handler)
