"""Whether a modality does harm: where one alone is right, and both together are not."""

from typing import NamedTuple

import scipy.special

from molt_jax.data.modalities import COLUMN, CONDITIONS, KEPT, condition
from molt_jax.evaluation.records import Predictions


class Harm(NamedTuple):
  """What a modality does to complete examples.

  Attributes:
    modality: that may do harm.
    count: complete examples, whose images could be read.
    lost: of these, right by the other one alone, and wrong by both.
    won: wrong by the other one alone, and right by both.
    p: of as uneven a split or more, were each as likely (McNemar 1947, exact and two-sided).
  """

  modality: str
  count: int
  lost: int
  won: int
  p: float

  def line(self) -> str:
    """Returns a sentence for the user."""
    (other,) = [modality for modality in COLUMN if modality != self.modality]
    chance = ', which chance may explain' if self.p >= 0.05 else ''
    return (
      f'the {self.modality} may do harm: of {self.count:,} complete examples, {self.lost:,} are '
      f'right by the {other} alone and wrong by both, {self.won:,} the other way round '
      f'(McNemar p = {self.p:.2g}{chance})'
    )


def found(predictions: Predictions) -> list[Harm]:
  """Returns the modalities that lose more complete examples than they win."""
  if not set(CONDITIONS) <= set(predictions.conditions):
    return []
  right = dict(zip(predictions.conditions, predictions.right_cn, strict=True))
  both, harms = condition('none'), []
  complete_n = predictions.read_nm.all(axis=1)
  for modality in KEPT.keys() - {'none'}:
    alone = condition(modality)
    lost = int((complete_n & right[alone] & ~right[both]).sum())
    won = int((complete_n & ~right[alone] & right[both]).sum())
    if lost > won:
      harms.append(Harm(modality, int(complete_n.sum()), lost, won, mcnemar(lost, won)))
  return sorted(harms, key=lambda harm: harm.p)


def mcnemar(lost: int, won: int) -> float:
  """Returns the exact two-sided p-value of McNemar's test: that of a fair coin's."""
  tail = scipy.special.bdtr(min(lost, won), lost + won, 0.5)
  return min(1.0, 2 * float(tail))
