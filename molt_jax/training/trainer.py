"""The set-up of a run, the same for every command that trains: what a config turns into, what the
checkpoint holds, features, data, and the loop over them.
"""

import abc
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from molt_jax.runtime import compiling, console, processes
from molt_jax.training import resuming, run_record, stopping, train_state, workdir
from molt_jax.training.assembly import Assembly, assemble
from molt_jax.training.checkpoint import Checkpoints
from molt_jax.training.loop import Loop
from molt_jax.training.monitor import StepMonitor
from molt_jax.training.schedule import StepSchedule
from molt_jax.training.step import train_step
from molt_jax.training.train_state import TrainState


class Trainer(abc.ABC):
  """One run of a command that trains; subclasses say what is particular to theirs.

  Attributes:
    title, unit: of the progress bar.
    assembly: what the config turned into.
    workdir: the run's folder.
    objective: what is minimised, see `losses`.
    frozen: modality -> parameters of its frozen tower, or None; there once features are open.
    more_facts: what run.json shall say beside.
    deadline: see `Loop`.
  """

  title: str
  unit: str
  objective: Any

  def __init__(self, config, folder: pathlib.Path, *, data_changed: bool):
    self.workdir = folder
    self.checkpoints = Checkpoints(folder)
    assembly = assemble(workdir.as_begun(config, folder))
    self.check(assembly)
    resumed = resuming.resume(assembly, self.checkpoints, data_changed=data_changed)
    self.assembly, self.is_resumed = resumed
    self.frozen: Mapping[str, Any] = {}
    self.more_facts: Mapping[str, Any] = {}
    self.deadline = math.inf
    self._stopping: stopping.Stopping | None = None

  # What is particular to a command.

  def check(self, assembly: Assembly) -> None:  # noqa: B027
    """Raises UserError where the data are not what the command needs."""

  @abc.abstractmethod
  def num_examples(self) -> int:
    """Returns the examples of an epoch."""

  @property
  def units_per_step(self) -> int:
    """Of the progress bar."""
    return 1

  @abc.abstractmethod
  def introduce(self, state: TrainState, schedule: StepSchedule) -> None:
    """Tells the user in a few lines what is about to be trained."""

  @abc.abstractmethod
  def open_features(self) -> None:
    """Loads towers or opens stored features; sets `frozen`."""

  @abc.abstractmethod
  def iterator(self) -> Any:
    """Returns the training batches, at their beginning."""

  @abc.abstractmethod
  def validate(self, state: TrainState, monitor: StepMonitor) -> tuple[dict[str, Any], str]:
    """Scores the validation split: (the record to log, what its 'score' is)."""

  def begin(self, state: TrainState) -> TrainState:
    """Returns the first state of a new run: with what comes from files, once features are open."""
    variables = {'params': state.params, 'statistics': state.statistics}
    started = self.assembly.method.start(variables, self.frozen)
    return state.replace(params=started['params'], statistics=started['statistics'])

  def refresh(self, state: TrainState) -> TrainState:
    """Returns the state with what is fitted anew before each validation."""
    return state

  def before_state(self) -> None:  # noqa: B027
    """Sets the objective, and does what the method needs before its variables are made."""

  @abc.abstractmethod
  def finish(self) -> Any:
    """Writes what comes out of the run when it has ended; returns it."""

  # What all commands do.

  def run(self) -> Any:
    """Trains, or goes on training, to the end.

    Returns:
      What `finish` does.

    Raises:
      UserError: a mistake of the user's, or a loss that is not finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    config = self.assembly.config
    if self.is_resumed and self.assembly.method.is_trained:
      resuming.check_finished(self.checkpoints.meta(), config, self.num_examples())
    schedule = StepSchedule(config, self.num_examples())
    if not self.assembly.method.is_trained:
      schedule.total = 1
    self.schedule = schedule
    if patience := config.train.get('patience', 0):
      examples = len(self.assembly.data.splits['validation'])
      self._stopping = stopping.Stopping(patience, examples, schedule)
    tx = train_state.make_optimizer(config, schedule.total)
    # Of the whole length: a run that has ceased to gain ends earlier, on the same curve.
    rate = train_state.make_schedule(config, schedule.total)
    self.before_state()
    state, iterator = self._start(tx, schedule)
    loop = self._loop(tx, rate, schedule)
    if processes.is_main():
      workdir.claim(config, self.workdir)
    with run_record.recorded(self.workdir, self._facts(state), step=int(state.step)):
      loop.run(state, iterator)
      return self.finish()

  def _start(self, tx, schedule: StepSchedule) -> tuple[TrainState, Any]:
    """Returns the state and the batches that a new run begins with, or that one goes on with."""
    state = self._new_state(tx)
    self.introduce(state, schedule)
    if not self.is_resumed:
      self.open_features()
      return self.begin(state), self.iterator()
    state, position = self.checkpoints.restore(state)
    if self._stopping:
      self._stopping.resumed(state)
    self.open_features()
    iterator = self.iterator()
    self.checkpoints.move(iterator, position)
    self._say_where(int(state.step), schedule.total)
    return state, iterator

  def _loop(self, tx, rate, schedule: StepSchedule) -> Loop:
    assembly = self.assembly
    return Loop(
      assembly=assembly,
      workdir=self.workdir,
      checkpoints=self.checkpoints,
      meta=resuming.new_meta(assembly),
      schedule=schedule,
      learning_rate=lambda count: rate(count) * stopping.share(schedule.cooling_from, count),
      step=self._step(tx),
      validate=self.validate,
      refresh=self.refresh,
      stopping=self._stopping,
      title=self.title,
      unit=self.unit,
      units_per_step=self.units_per_step,
      deadline=self.deadline,
    )

  def _say_where(self, step: int, total: int) -> None:
    if step < total:
      console.log(f'going on from step {step} of {total} in {self.workdir}')
    else:
      console.log(f'{self.workdir}: training has ended, at step {step}; it is scored')

  def _facts(self, state: TrainState) -> dict[str, Any]:
    splits = self.assembly.data.splits
    return {
      'examples': {split: len(source) for split, source in splits.items()},
      'parameters': train_state.count(state.params),
      **self.more_facts,
    }

  def _new_state(self, tx) -> TrainState:
    method, config = self.assembly.method, self.assembly.config
    init_memory = functools.partial(self.objective.init, method)
    return train_state.create(
      method.init, tx, init_memory, seed=config.seed, mesh=self.assembly.mesh
    )

  def _step(self, tx):
    step = functools.partial(
      train_step,
      method=self.assembly.method,
      objective=self.objective,
      tx=tx,
      accumulate=self.assembly.config.train.get('accumulate', 1),
    )
    compiled = compiling.jit(step, donate_argnums=0)
    return lambda state, batch: compiled(state, self.frozen, batch)
