"""Judges a regression of `ridge_solver` by examples that it was not fitted to: which offset and
temperature make probabilities of its answers, and their log loss.

Judged by are examples held out, of which there may be few, and training examples, each left out in
turn, which count as 32 more and no more than that: where groups were held out, they are easier than
others. Of a regression with features f, ridge r and A = (F'F + r I)^-1, the answer to training
example i without it is y_i - (y_i - f_i' A F' y) / (1 - f_i' A f_i) (Allen 1974, "The relationship
between variable selection and data augmentation and a method for prediction").
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from molt_jax.methods.parts.ridge_calibration import log_loss

TEMPERATURES = tuple(float(x) for x in 2.0 ** np.arange(0, 6.1, 0.5))
# Of so many training examples at most the answer without them is judged.
MOST_LEFT_OUT = 512
# Where the shares of the classes are the offset, a temperature may also say "heed nothing else".
_COOL = tuple(float(x) for x in 2.0 ** np.arange(-4, 0, 1.0))
# Training examples left out count as so many held out.
_COUNT_AS = 32
# Of 1 - f_i' A f_i: what remains for the other examples to say.
_LEAST_OTHER = 1e-4


class Verdict(NamedTuple):
  """How a regression answers best, softmax(temperature (change + offset)), and its log loss."""

  loss: float
  temperature: float
  offset_k: np.ndarray


class Judged(NamedTuple):
  """Answers of a regression to examples that it was not fitted to.

  Attributes:
    change_bk: the answers less the mean.
    target_bk: the labels.
    count_bk, total: training examples of each class, and of all, that it was fitted to.
    weight: of their mean loss.
  """

  change_bk: np.ndarray
  target_bk: np.ndarray
  count_bk: np.ndarray
  total: int
  weight: float

  @property
  def mean_bk(self) -> np.ndarray:
    """Mean of the targets that it was fitted to."""
    return self.count_bk / self.total


def held_out(change_hk: np.ndarray, target_hk: np.ndarray, target_nk: np.ndarray) -> Judged:
  """Returns answers to examples held out, with their labels; target_nk: of training examples."""
  count_k = target_nk.sum(axis=0, dtype=np.float64)
  return Judged(change_hk, target_hk, count_k, len(target_nk), len(change_hk))


def left_out(half_mb: np.ndarray, half_mj: np.ndarray, target_nk: np.ndarray) -> Judged:
  """Returns answers to the first B training examples, each without it.

  Args:
    half_mb: L^-1 f of these examples, with L L' = F'F + r I.
    half_mj: L^-1 F' [targets, ones].
    target_nk: of all training examples.
  """
  target_bj = with_ones(target_nk[: half_mb.shape[1]])
  others_b = np.maximum(1 - np.square(half_mb).sum(axis=0), _LEAST_OTHER)
  answer_bj = target_bj - (target_bj - half_mb.T @ half_mj) / others_b[:, None]
  total = len(target_nk) - 1
  count_bk = target_nk.sum(axis=0, dtype=np.float64) - target_bj[:, :-1]
  # The targets are centred, by the mean without the example.
  change_bk = answer_bj[:, :-1] - answer_bj[:, -1:] * count_bk / total
  return Judged(change_bk, target_bj[:, :-1], count_bk, total, _COUNT_AS)


def with_ones(target_nk: np.ndarray) -> np.ndarray:
  """Returns targets beside a column of ones, whose regression says what centring them changes."""
  return np.concatenate([target_nk, np.ones((len(target_nk), 1), target_nk.dtype)], axis=1)


def from_mean(judged: Sequence[Judged], offset_k: np.ndarray, multi_label: bool) -> Verdict:
  """Returns the best verdict whose offset is the mean of the targets."""
  middle = 0.5 if multi_label else 0.0
  loss, temperature = min(
    (_loss([(t * (x.change_bk + x.mean_bk - middle), x) for x in judged], multi_label), t)
    for t in TEMPERATURES
  )
  return Verdict(loss, temperature, offset_k)


def from_shares(judged: Sequence[Judged], target_nk: np.ndarray, multi_label: bool) -> Verdict:
  """Returns the best verdict whose probabilities are the shares of the classes where the kernels
  tell nothing: softmax of a mean of one-hot labels is something else, so a modality that is noise
  would otherwise be wrong about those, too.
  """
  pairs = [(x, _log_shares(x.count_bk, x.total, multi_label)) for x in judged]
  loss, temperature = min(
    (_loss([(t * x.change_bk + shares_bk, x) for x, shares_bk in pairs], multi_label), t)
    for t in (*_COOL, *TEMPERATURES)
  )
  count_k = target_nk.sum(axis=0, dtype=np.float64)
  shares_k = _log_shares(count_k, len(target_nk), multi_label)
  # `kernel_ridge.experts` multiplies answers, of several labels less 0.5, with the temperature.
  offset_k = shares_k / temperature + (0.5 if multi_label else 0.0)
  return Verdict(loss, temperature, offset_k)


def _log_shares(count_k: np.ndarray, total: int, multi_label: bool) -> np.ndarray:
  """Logits of the shares of the classes, [.., K]."""
  classes = 2 if multi_label else count_k.shape[-1]
  share_k = (count_k + 1) / (total + classes)
  return np.log(share_k) - (np.log1p(-share_k) if multi_label else 0.0)


def _loss(answers: Sequence[tuple[np.ndarray, Judged]], multi_label: bool) -> float:
  losses = [log_loss(z, x.target_bk, multi_label) for z, x in answers]
  return float(np.average(losses, weights=[x.weight for _, x in answers]))
