"""Prediction sets: several labels that hold the true one as often as promised, under each missing
pattern.

Split conformal prediction (Vovk et al. 2005) on validation examples: each has a score, great where
its true label is improbable. Of n scores of one missing pattern the ceil((n + 1) coverage)-th
smallest is the threshold, and a set has every label whose score is not above it. If the examples to
come are drawn as those of validation were, and are exchangeable with them, their sets hold the true
label with probability `coverage` or more, whatever the model. Each missing pattern has a threshold
of its own, as a model without its text is wrong more often.

  threshold   score 1 - p of the label (Sadinle et al. 2019): the smallest sets on average
  adaptive    score the sum of the probabilities of likelier labels (Romano et al. 2020, without
              their random draw): larger sets for hard examples, smaller for easy ones

The likeliest label has the score 0 in both, so no set is empty. Where a model is right more often
than is promised, its sets are that one label, and hold the truth as often as it is right.

Where an example can have several labels, each label has its own threshold: of the examples that
carry a label, at least `coverage` have it in their set. A label that too few validation examples
carry for that has the threshold which bounds the mean share of an example's labels that its set
lacks (conformal risk control, Angelopoulos et al. 2022).

This module needs NumPy alone.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from molt_jax.data.modalities import PATTERNS
from molt_jax.errors import UserError
from molt_jax.runtime.npz import Saved, are_strings, is_array, wrong_values

KINDS = ('threshold', 'adaptive')
# Of scores: equal examples in other batches are answered alike but for rounding.
TOLERANCE = 1e-6
EVERY_LABEL = math.inf  # A threshold that leaves nothing out: too few examples to promise more by.


@dataclasses.dataclass(frozen=True)
class Calibration(Saved):
  """What a run knows of its validation examples, to make sets by, and of its training labels.

  An entry m is an example under one missing pattern with one of its true labels.

  Attributes:
    checkpoint: digest of the arrays of the checkpoint that answered.
    class_names: K names.
    multi_label: whether an example can have several labels.
    chosen: what else was chosen by the same examples, in words.
    prior_k: float64[K], the share of each class among the labels of training.
    pattern_m: int[M], row of PATTERNS.
    example_m: int[M], number of the example.
    label_m: int[M], its true label.
    probability_m: float[M], of that label.
    before_m: float[M], the sum of the probabilities of the likelier labels; one label alone.
  """

  checkpoint: str
  class_names: Sequence[str]
  multi_label: bool
  chosen: Sequence[str]
  prior_k: np.ndarray
  pattern_m: np.ndarray
  example_m: np.ndarray
  label_m: np.ndarray
  probability_m: np.ndarray
  before_m: np.ndarray

  def _faults(self) -> Iterator[str]:
    yield from wrong_values(self, {'checkpoint': str, 'multi_label': bool})
    for name in ('class_names', 'chosen'):
      if not are_strings(getattr(self, name)):
        yield f'{name}: not a list of strings'
    k, m = len(self.class_names), len(self.pattern_m)
    if not is_array(self.prior_k, 'f', k) or not np.all((self.prior_k > 0) & (self.prior_k < 1)):
      yield f'prior_k: not {k} shares'
    for name, most in (('pattern_m', len(PATTERNS)), ('label_m', k), ('example_m', 1 << 53)):
      value = getattr(self, name)
      if not is_array(value, 'iu', m) or not np.all((value >= 0) & (value < most)):
        yield f'{name}: not {m} whole numbers below {most}'
    for name in ('probability_m', 'before_m'):
      value = getattr(self, name)
      if not is_array(value, 'f', m) or not np.all((value >= 0) & (value <= 1 + 1e-6)):
        yield f'{name}: not {m} probabilities'

  def counts(self) -> list[int]:
    """Returns the validation examples of each missing pattern."""
    return [len(np.unique(self.example_m[self.pattern_m == v])) for v in range(len(PATTERNS))]

  def rule(self, coverage: float, kind: str = 'threshold') -> 'SetRule':
    """Returns what makes sets that hold the truth with this probability.

    Args:
      coverage: above 0 and below 1.
      kind: 'threshold' or 'adaptive'.

    Raises:
      UserError: an argument is not legal, or adaptive sets of several labels are asked for.
    """
    check(coverage, kind)
    if self.multi_label and kind != 'threshold':
      raise UserError(
        'adaptive: sets of this run have a threshold a label, as an example can have several; '
        'leave it out'
      )
    if self.multi_label:
      threshold_vk = np.stack([self._of_labels(v, coverage) for v in range(len(PATTERNS))])
      return SetRule(coverage, kind, self.multi_label, threshold_vk)
    score_m = _scores(self.probability_m, self.before_m, kind)
    found = [quantile(score_m[self.pattern_m == v], coverage) for v in range(len(PATTERNS))]
    threshold_vk = np.repeat(np.array(found)[:, None], len(self.class_names), axis=1)
    return SetRule(coverage, kind, self.multi_label, threshold_vk)

  def _of_labels(self, pattern: int, coverage: float) -> np.ndarray:
    """Returns the threshold of each label under a missing pattern, of 1 - p, float64[K]."""
    own_m = self.pattern_m == pattern
    score_m, label_m = 1.0 - self.probability_m[own_m].astype(np.float64), self.label_m[own_m]
    everyone = risk_threshold(score_m, self.example_m[own_m], coverage)
    found_k = np.full(len(self.class_names), everyone)
    for label in np.unique(label_m):
      threshold = quantile(score_m[label_m == label], coverage)
      if threshold != EVERY_LABEL:
        found_k[label] = threshold
    return found_k


@dataclasses.dataclass(frozen=True)
class SetRule:
  """Makes prediction sets of probabilities.

  Attributes:
    coverage: how often a set holds the true label.
    kind: of the scores.
    multi_label: whether an example can have several labels.
    threshold_vk: float64[V, K], by missing pattern (rows of PATTERNS) and label.
  """

  coverage: float
  kind: str
  multi_label: bool
  threshold_vk: np.ndarray

  def members(self, probability_nk: np.ndarray, present_nm: np.ndarray) -> np.ndarray:
    """Returns bool[N, K], the labels in the set of each example.

    Args:
      probability_nk: float[N, K], of a softmax, or each label's own; NaN: an example without an
        answer, whose set is empty.
      present_nm: bool[N, 2], the modalities that were there (image, text).
    """
    pattern_n = pattern_of(present_nm)
    answered_n = np.isfinite(probability_nk).all(axis=1) & (pattern_n >= 0)
    p_nk = np.where(answered_n[:, None], probability_nk, 0.0).astype(np.float64)
    score_nk = self._label_scores(p_nk)
    return (score_nk <= self.threshold_vk[pattern_n] + TOLERANCE) & answered_n[:, None]

  def _label_scores(self, p_nk: np.ndarray) -> np.ndarray:
    """Returns float64[N, K], the score that each label would have if it were the true one."""
    if self.kind == 'adaptive':
      return likelier(p_nk)
    score_nk = 1.0 - p_nk
    if not self.multi_label:
      np.put_along_axis(score_nk, p_nk.argmax(axis=1)[:, None], 0.0, axis=1)
    return score_nk


def names_in(p_k: np.ndarray, in_k: np.ndarray, class_names: Sequence[str]) -> list[str]:
  """Returns the names of the labels in a set, bool[K], the likeliest first."""
  order = np.argsort(-p_k, kind='stable')
  return [class_names[k] for k in order if in_k[k]]


def options(flags: Any) -> dict[str, Any] | None:
  """Returns what flags say of sets, as arguments of `Calibration.rule`; None: none are wanted."""
  if flags.coverage is None:
    return None
  return {'coverage': flags.coverage, 'kind': 'adaptive' if flags.adaptive else 'threshold'}


def check(coverage: Any, kind: str = 'threshold') -> None:
  """Raises UserError unless sets can be asked for in this way."""
  is_number = isinstance(coverage, int | float | np.floating) and not isinstance(coverage, bool)
  if not is_number or not 0 < coverage < 1:
    raise UserError(f'coverage: {str(coverage)!r} is not legal; give a number between 0 and 1')
  if kind not in KINDS:
    raise UserError(f'kind of sets: {kind!r} is not legal; give one of {", ".join(KINDS)}')


def pattern_of(present_nm: np.ndarray) -> np.ndarray:
  """Returns int[N], the row of PATTERNS of each example; -1 where nothing is there."""
  same_nv = (np.asarray(present_nm, bool)[:, None] == PATTERNS[None]).all(axis=-1)
  return np.where(same_nv.any(axis=1), same_nv.argmax(axis=1), -1)


def likelier(p_nk: np.ndarray) -> np.ndarray:
  """Returns float64[N, K], the sum of the probabilities of the labels that are likelier than each;
  of equal ones the first is the likelier.
  """
  order_nk = np.argsort(-p_nk, axis=1, kind='stable')
  sorted_nk = np.take_along_axis(p_nk, order_nk, axis=1).astype(np.float64)
  before_nk = np.cumsum(sorted_nk, axis=1) - sorted_nk
  before_nk[:, 0] = 0.0
  found_nk = np.empty_like(before_nk)
  np.put_along_axis(found_nk, order_nk, np.clip(before_nk, 0.0, 1.0), axis=1)
  return found_nk


def _scores(p: np.ndarray, before: np.ndarray, kind: str) -> np.ndarray:
  """Scores of labels with these probabilities; 0 of the likeliest, before which nothing comes."""
  if kind == 'adaptive':
    return before.astype(np.float64)
  return np.where(before == 0, 0.0, 1.0 - p.astype(np.float64))


def quantile(score_n: np.ndarray, coverage: float) -> float:
  """Returns the ceil((n + 1) coverage)-th smallest of n scores; EVERY_LABEL where there are not so
  many.
  """
  rank = math.ceil((len(score_n) + 1) * coverage - 1e-9)
  if rank > len(score_n):
    return EVERY_LABEL
  return float(np.partition(score_n, rank - 1)[rank - 1])


def risk_threshold(score_m: np.ndarray, example_m: np.ndarray, coverage: float) -> float:
  """Returns the least threshold that bounds the mean share of an example's true labels whose score
  is above it: (lacking + 1) / (n + 1) <= 1 - coverage, for n examples.

  Args:
    score_m: of the true labels.
    example_m: whose they are.
    coverage: as above.
  """
  _, place_m, count = np.unique(example_m, return_inverse=True, return_counts=True)
  order = np.argsort(-score_m, kind='stable')  # Those that a falling threshold loses first.
  lost_m = np.cumsum(1.0 / count[place_m[order]])
  allowed = (1 - coverage) * (len(count) + 1) - 1
  kept = int(np.searchsorted(lost_m, allowed + 1e-9, side='right'))
  if allowed < 0 or kept >= len(score_m):
    return EVERY_LABEL if allowed < 0 else 0.0
  return float(score_m[order[kept]])
