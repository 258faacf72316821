"""The loop of a run: restored state -> [validate -> save -> next batch -> step -> log]."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from molt_jax.runtime import console, logbook, lost, processes, sharding
from molt_jax.runtime.signals import Interrupted, stop_on_signals
from molt_jax.training import checkpoint_files
from molt_jax.training.assembly import Assembly
from molt_jax.training.checkpoint import Checkpoints
from molt_jax.training.monitor import IN_FLIGHT, StepMonitor
from molt_jax.training.schedule import StepSchedule
from molt_jax.training.train_state import TrainState

OUT_OF_TIME = 1  # Where a signal's number may be, and less than any that is listened to.


@dataclasses.dataclass
class Loop:
  """Everything that stays the same from step to step.

  Attributes:
    assembly: what the config turned into.
    workdir: the run's folder.
    checkpoints: of the run.
    meta: what they belong to.
    schedule: the step numbers.
    learning_rate: of each step.
    step: (state, batch) -> (new state, metrics).
    validate: (state, monitor) -> (record to log, what its 'score' is); a split that determines no
      score has none, and is never the best.
    refresh: state -> state with what is fitted anew before each validation.
    stopping: (state, score) -> state, after each validation, where it may begin the end of the run.
    title, unit: of the progress bar.
    units_per_step: of the progress bar.
    deadline: of `time.monotonic`, after which training ends, once it has gone through the data.
  """

  assembly: Assembly
  workdir: pathlib.Path
  checkpoints: Checkpoints
  meta: Mapping[str, Any]
  schedule: StepSchedule
  learning_rate: optax.Schedule
  step: Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
  validate: Callable[[TrainState, StepMonitor], tuple[dict[str, Any], str]]
  refresh: Callable[[TrainState], TrainState]
  stopping: Callable[[TrainState, float | None], TrainState] | None
  title: str
  unit: str
  units_per_step: int = 1
  deadline: float = math.inf

  def run(self, state: TrainState, iterator: Any) -> TrainState:
    """Trains to the end; the order of its parts makes resuming exact. Returns the last state.

    Raises:
      Interrupted: SIGTERM or SIGINT; the state is saved.
      UserError: a loss that is not finite.
    """
    self.checkpoints.prepare()
    self._best = self.checkpoints.best_score()
    schedule, start = self.schedule, int(state.step)
    step = start
    lost.tell_step(self._saved_step)
    log, monitor = self._open_log(start)
    validations = 0
    agree = processes.Agreement(self.assembly.mesh, delay=IN_FLIGHT)
    count = self.units_per_step
    with stop_on_signals() as stop, self._progress(start, count) as shown:
      while True:
        asked = agree(stop() or self._out_of_time(step))
        due = schedule.validate_at(step) or schedule.save_at(step) or asked
        if step > start and due:
          monitor.drain()
          began = time.monotonic()
          state = self._validate_and_save(state, iterator, log, monitor, step, asked)
          monitor.restart_clock()
          if validations == 0:  # It compiles, and later ones do not.
            shown.exclude(time.monotonic() - began)
          validations += 1
        if step >= schedule.total:  # More where the data became fewer.
          break
        if asked == OUT_OF_TIME:
          console.log(f'the time is up: training ends at step {step} of {schedule.total}')
          break
        if asked:
          self._stop(step, asked)
        self.checkpoints.check()
        batch = sharding.put_batch(next(iterator), self.assembly.mesh)
        state, metrics = self.step(state, batch)
        step += 1
        monitor.dispatched(step, metrics, batch['index'])
        epoch = f'epoch {step / schedule.per_epoch:.1f}'
        shown.advance(count, f'{epoch}, {monitor.note}' if monitor.note else epoch)
    log.close()
    self.checkpoints.close()
    processes.wait('checkpoints written')
    return state

  def _progress(self, start: int, count: int) -> Any:
    """Returns the context of a progress bar that counts `count` a step."""
    total, done = self.schedule.total * count, start * count
    return console.progress(self.title, total, self.unit, done=done, compiles=True)

  def _open_log(self, start: int) -> tuple[logbook.Logbook, StepMonitor]:
    is_main = processes.is_main()
    log = logbook.Logbook(self.workdir, step=start) if is_main else logbook.NoLogbook()
    ids = self.assembly.data.splits['train'].ids
    monitor = StepMonitor(
      self.assembly.config, self.workdir, self.schedule, self.learning_rate, log, ids
    )
    return log, monitor

  def _stop(self, step: int, number: int) -> None:
    self.checkpoints.close()
    total = self.schedule.total
    message = f'stopped at step {step} of {total}, saved; the same command goes on from here'
    raise Interrupted(message, number)

  def _saved_step(self) -> int | None:
    """Returns the step that the same command would go on from, None before the first save."""
    saved = (self.workdir / 'checkpoints' / checkpoint_files.LATEST).glob('*')
    return max((int(path.name) for path in saved if path.name.isdecimal()), default=None)

  def _out_of_time(self, step: int) -> int:
    late = time.monotonic() >= self.deadline and step >= self.schedule.per_epoch
    return OUT_OF_TIME if late else 0

  def _validate_and_save(self, state, iterator, log, monitor, step, asked) -> TrainState:
    best = False
    self.checkpoints.check_finite(state)
    if self.schedule.validate_at(step) or asked == OUT_OF_TIME:
      state = self.refresh(state)
      record, score_is = self.validate(state, monitor)
      score = record.get('score')
      log.write('validation', step, record)
      value = 'no validation score' if score is None else f'validation score {score:.4f}'
      console.log(f'step {step}/{self.schedule.total}: {value} ({score_is})')
      if self.stopping and self.schedule.validate_at(step):
        state = self.stopping(state, score)
      best = score is not None and score > self._best
      self._best = score if best else self._best
      self.meta = {**self.meta, 'score': score}
      if 'thresholds' in record:
        self.meta = {**self.meta, 'thresholds': record['thresholds']}
    meta = {**self.meta, 'step': step}
    if best:
      self.checkpoints.save(state, iterator, meta, kind=checkpoint_files.BEST)
    if best or asked or self.schedule.save_at(step):
      self.checkpoints.save(state, iterator, meta, kind=checkpoint_files.LATEST)
    return state
