"""Training that ends where validation has ceased to gain (`train.patience`).

The score of a few hundred validation examples goes up and down by luck, so neither a single score
nor the best of many decides. What is compared is the mean of the last SMOOTHED scores, and a gain
is more than a standard error of one score above what it was at the last gain: sqrt(s (1 - s) / n)
for n examples, that of an accuracy s. After `train.patience` validations without a gain the
learning rate goes to zero in a straight line over a fifth of the steps so far, and training ends:
with a checkpoint that has settled, as that of a run of full length has.

All that decides is in the state of the optimiser. So a run that was stopped and goes on ends at the
same step.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from molt_jax.runtime import console, processes
from molt_jax.training.schedule import StepSchedule

SMOOTHED = 3
_BELOW_ALL = -1.0  # A score that any other is above.


class Patience(NamedTuple):
  """What is known of validation.

  Attributes:
    count: int32, updates so far.
    began: int32, after how many updates the rate began to fall; 0: it has not.
    seen: int32, validations with a score.
    waited: int32, of them, those since the last gain.
    recent: float32[SMOOTHED], the last scores, the newest last.
    reference: float32, their mean at the last gain.
  """

  count: Any
  began: Any
  seen: Any
  waited: Any
  recent: Any
  reference: Any


def cooling(began: Any) -> Any:
  """Returns over how many steps the rate falls that began to fall after so many."""
  return began // 5 + 1


def scale_by_patience() -> optax.GradientTransformation:
  """Returns the last part of an optimiser: updates as they are until the rate falls."""

  def init(params):
    del params
    counts = [jnp.zeros((), jnp.int32) for _ in range(4)]
    return Patience(*counts, jnp.zeros(SMOOTHED), jnp.asarray(_BELOW_ALL))

  def update(updates, state, params=None):
    del params
    scale = share(state.began, state.count)
    updates = jax.tree.map(lambda x: x * scale.astype(x.dtype), updates)
    return updates, state._replace(count=state.count + 1)

  return optax.GradientTransformation(init, update)


def share(began: Any, count: Any) -> jax.Array:
  """Returns the share of the learning rate that the update after `count` others has."""
  length = cooling(began)
  left = jnp.clip((began + length - count) / length, 0.0, 1.0)
  return jnp.where(began > 0, left, 1.0)


def after(known: Patience, score: float, *, patience: int, examples: int) -> Patience:
  """Returns what is known after one more validation, on the host.

  Args:
    known: before it, NumPy values.
    score: from 0 to 1.
    patience: validations without a gain that are waited for.
    examples: of the validation split.
  """
  seen = known.seen + 1
  recent = np.append(known.recent[1:], np.float32(score))
  mean = float(recent[-min(seen, SMOOTHED) :].mean())
  reference = float(known.reference)
  error = math.sqrt(max(reference * (1 - reference), 0.0) / examples)
  if mean > reference + error:
    return known._replace(seen=seen, recent=recent, waited=0, reference=mean)
  waited = known.waited + 1
  began = known.count if waited >= patience else 0
  return known._replace(seen=seen, recent=recent, waited=waited, began=began)


class Stopping:
  """Decides after each validation whether the end of a run begins."""

  def __init__(self, patience: int, examples: int, schedule: StepSchedule):
    """Args: see `after`; the schedule's end is moved."""
    self._how = {'patience': patience, 'examples': max(examples, 1)}
    self._schedule = schedule

  def __call__(self, state: Any, score: float | None) -> Any:
    """Returns the training state after a validation with this score, None: without one."""
    old = found(state)
    known = jax.device_get(old)
    if score is None or known.began > 0:
      return state
    new = processes.of_main(after(known, score, **self._how))
    placed = jax.tree.map(lambda x, like: jax.device_put(_like(x, like), like.sharding), new, old)
    opt_state = jax.tree.map(
      lambda x: placed if _is_patience(x) else x, state.opt_state, is_leaf=_is_patience
    )
    self.move_end(int(new.began))
    if new.began > 0:
      console.log(
        f'validation has gained nothing beyond chance {int(new.waited)} times: the learning rate '
        f'goes to zero, and training ends at step {self._schedule.total}'
      )
    return state.replace(opt_state=opt_state)

  def resumed(self, state: Any) -> None:
    """Moves the end of a run whose rate had begun to fall when it was stopped."""
    self.move_end(int(jax.device_get(found(state).began)))

  def move_end(self, began: int) -> None:
    """Moves the end of the run to where the rate is zero."""
    if began:
      self._schedule.cooling_from = began
      self._schedule.total = min(self._schedule.total, began + cooling(began))


def _like(x: Any, like: jax.Array) -> np.ndarray:
  return np.asarray(x, like.dtype)


def found(state: Any) -> Patience:
  """Returns what a training state knows of validation."""
  leaves = jax.tree.leaves(state.opt_state, is_leaf=_is_patience)
  return next(x for x in leaves if _is_patience(x))


def _is_patience(x: Any) -> bool:
  return isinstance(x, Patience)
