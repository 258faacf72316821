"""The step numbers of a run."""

import math

import ml_collections


class StepSchedule:
  """Total steps, and when validation and saving are due.

  Attributes:
    per_epoch: steps of an epoch, a fraction.
    total: steps of the run.
    cooling_from: the step from which the learning rate falls for want of a gain, see `stopping`; 0:
      none so far.
  """

  def __init__(self, config: ml_collections.ConfigDict, num_examples: int):
    self.per_epoch = num_examples / config.train.batch_size
    asked = max(1, math.ceil(config.train.epochs * self.per_epoch))
    self.total = max(asked, config.train.get('least_steps', 0))
    # Small data are gone through more often, and are not validated more often for it.
    usual = round(self.per_epoch * self.total / asked)
    self.cooling_from = 0
    self._eval_every = config.train.eval_every or max(1, usual)
    self._save_every = config.train.save_every or self._eval_every

  def validate_at(self, step: int) -> bool:
    """Whether to validate after so many steps."""
    return step == self.total or step % self._eval_every == 0

  def save_at(self, step: int) -> bool:
    """Whether to save after so many steps."""
    return step == self.total or step % self._save_every == 0
