"""Solves the kernel ridge regression of `kernel_ridge` on the host, and chooses what it leaves open
(groups, mixture, ridge, temperature).

They are chosen by the log loss of examples held out, of which there may be few, and of training
examples, each left out in turn, which count as 32 more and no more than that: where groups were
held out, they are easier than others. Of a regression with features f, ridge r and
A = (F'F + r I)^-1, the answer to training example i without it is
y_i - (y_i - f_i' A F' y) / (1 - f_i' A f_i) (Allen 1974, "The relationship between variable
selection and data augmentation and a method for prediction").
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.methods.parts.ridge_calibration import log_loss
from molt_jax.methods.parts.ridge_kernels import Examples, Groups, ModalityKernels, mixture

RIDGES = tuple(float(x) for x in 10.0 ** np.arange(-2.5, 0.6, 0.5))
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # Of the text in the kernel of complete examples.
TEMPERATURES = tuple(float(x) for x in 2.0 ** np.arange(0, 6.1, 0.5))
# Where the shares of the classes are the offset, a temperature may also say "heed nothing else".
_COOL = tuple(float(x) for x in 2.0 ** np.arange(-4, 0, 1.0))
# Groups and mixtures are chosen with so many landmarks at most, as it takes a tenth of the time.
_CHOOSING = 1024
# Of so many training examples at most the answer without them is judged, and counts as so many
# examples held out.
_LEFT_OUT, _COUNT_AS = 512, 32
# Fewer examples decide nothing: neither is a regression fitted to, nor weighed by so few.
LEAST = 10
_JITTER = 1e-5
# Of 1 - f_i' A f_i: what remains for the other examples to say.
_LEAST_OTHER = 1e-4


class Solution(NamedTuple):
  """A regression, and the log loss of its answers to examples that it was not fitted to, at its
  best temperature.
  """

  dual_mk: np.ndarray
  offset_k: np.ndarray
  temperature: float
  loss: float


def _best(found: Sequence[tuple[Any, Solution]]) -> tuple[Any, Solution]:
  """Returns what has the least log loss: accuracy on a few hundred examples is luck."""
  return min(found, key=lambda pair: pair[1].loss)


def fit(
  training: Examples, held: Examples, *, landmarks: int, multi_label: bool, kernel: str = 'rbf'
) -> dict[str, Any] | None:
  """Fits a regression.

  Args:
    training: to fit to; the first are the landmarks.
    held: to choose by, beside the training examples, each left out in turn.
    landmarks: M of the variables; unused ones weigh nothing.
    multi_label: whether an example can have several labels.
    kernel: a key of `kernel_ridge.KERNELS`.

  Returns:
    Variables as `kernel_ridge.empty` makes them; None where no pattern has enough examples.
  """
  count = min(landmarks, len(training.target_bk))
  kernels = {m: ModalityKernels(m, training, held, count, kernel) for m in training.pooled}
  solver = _Solver(training, held, count, multi_label)
  chosen: dict[int, Solution] = {}
  for modality, own in kernels.items():
    pattern = 1 + MODALITIES.index(modality)
    if solver.has_enough(pattern):
      own.choice, ridge = solver.choose_groups(pattern, own)
      own.chosen = own.kernels(own.choice, count)
      chosen[pattern] = solver.solve(pattern, own.chosen, ridge)
  shares = {1: (1.0, 0.0), 2: (0.0, 1.0)}
  if len(chosen) == 2 and solver.has_enough(0):
    pair = [kernels[modality].chosen for modality in MODALITIES]
    mixtures = {share: functools.partial(mixture, *pair, share) for share in SHARES}
    share, ridge = solver.choose(0, mixtures)
    shares[0] = (1 - share, share)
    chosen[0] = solver.solve(0, mixture(*pair, share, count), ridge)
  return _packed(kernels, chosen, shares, landmarks) if chosen else None


class _Solver:
  """Ridge regressions for missing patterns."""

  def __init__(self, training: Examples, held: Examples, count: int, multi_label: bool):
    self._training, self._held = training, held
    self._count, self._multi_label = count, multi_label

  def has_enough(self, pattern: int) -> bool:
    """Whether training examples of a pattern are enough to fit to."""
    rows = self._training.having(PATTERNS[pattern])
    return np.sum(rows < self._count) >= LEAST

  def choose_groups(self, pattern: int, own: ModalityKernels) -> tuple[Groups, float]:
    """Returns the best of means, cells of one state, and both at equal weight; and its ridge."""
    means = self._candidates(own, own.means)
    mean, ridge = self.choose(pattern, means)
    if not own.cells:
      return mean, ridge
    cells = self._candidates(own, own.cells)
    best = self.choose(pattern, cells)[0]
    joint = mean._replace(mean_weight=0.5, cells_weight=0.5, state=best.state)
    both = self._candidates(own, [joint])
    return self.choose(pattern, {mean: means[mean], best: cells[best]} | both)

  def _candidates(self, own: ModalityKernels, choices: Sequence[Groups]) -> dict[Groups, Callable]:
    return {choice: functools.partial(own.kernels, choice) for choice in choices}

  def choose(self, pattern: int, candidates: Mapping[Any, Callable]) -> tuple[Any, float]:
    """Returns (name, ridge) of the best candidate; each returns its kernels with so many
    landmarks.
    """
    count, found = min(self._count, _CHOOSING), []
    for name, kernels in candidates.items():
      ridge, solution = self._solve(pattern, kernels(count), RIDGES)
      found.append(((name, ridge), solution))
    return _best(found)[0]

  def solve(self, pattern: int, kernels: tuple[np.ndarray, np.ndarray], ridge: float) -> Solution:
    """Returns the regression of one pattern, with all landmarks, and about this ridge."""
    if self._count <= _CHOOSING:
      return self._solve(pattern, kernels, (ridge,))[1]
    near = RIDGES.index(ridge)
    return self._solve(pattern, kernels, RIDGES[max(near - 1, 0) : near + 2])[1]

  def _solve(self, pattern, kernels, ridges) -> tuple[float, Solution]:
    """Returns the best of these ridges, and its solution."""
    problem = _problem(self._training, self._held, PATTERNS[pattern], kernels)
    base_mm = _factor(problem.gram_mm)
    feature_nm, feature_hm = (
      _solve_lower(base_mm, kernel.T).T for kernel in (problem.kernel_nm, problem.kernel_hm)
    )
    offset_k = problem.target_nk.mean(axis=0)
    gram_mm, right_mj = _halves(feature_nm, _with_ones(problem.target_nk))
    found = []
    for ridge in ridges:
      factor_mm = _raised_cholesky(gram_mm, ridge)
      half_mj = scipy.linalg.solve_triangular(factor_mm, right_mj, lower=True)
      half_mk = half_mj[:, :-1] - half_mj[:, -1:] * offset_k
      change_hk = _solve_lower(factor_mm, feature_hm.T).T @ half_mk
      judged = [_left_out(factor_mm, half_mj, feature_nm[:_LEFT_OUT], problem.target_nk)]
      if len(change_hk):
        judged.append(_held_out(change_hk, problem))
      found.append(((ridge, factor_mm, half_mk, judged), self._from_mean(judged, offset_k)))
    (ridge, factor_mm, half_mk, judged), solution = _best(found)
    from_shares = self._from_shares(judged, problem.target_nk)
    if from_shares.loss < solution.loss:
      solution = from_shares
    weight_mk = scipy.linalg.solve_triangular(factor_mm, half_mk, lower=True, trans=1)
    dual_mk = np.zeros((self._count, weight_mk.shape[1]), np.float32)
    dual_mk[problem.landmarks] = scipy.linalg.solve_triangular(
      base_mm, weight_mk, lower=True, trans=1
    )
    return ridge, solution._replace(dual_mk=dual_mk)

  def _from_mean(self, judged: Sequence['_Judged'], offset_k: np.ndarray) -> Solution:
    """A solution without its coefficients."""
    middle = 0.5 if self._multi_label else 0.0
    loss, temperature = min(
      (self._loss([(t * (x.change_bk + x.mean_bk - middle), x) for x in judged]), t)
      for t in TEMPERATURES
    )
    return Solution(np.zeros(0, np.float32), offset_k, temperature, loss)

  def _from_shares(self, judged: Sequence['_Judged'], target_nk: np.ndarray) -> Solution:
    """A solution, without its coefficients, whose probabilities are the shares of the classes where
    the kernels tell nothing: softmax of a mean of one-hot labels is something else, so a modality
    that is noise would otherwise be wrong about those, too.
    """
    pairs = [(x, self._log_shares(x.count_bk, x.total)) for x in judged]
    loss, temperature = min(
      (self._loss([(t * x.change_bk + shares_bk, x) for x, shares_bk in pairs]), t)
      for t in (*_COOL, *TEMPERATURES)
    )
    shares_k = self._log_shares(target_nk.sum(axis=0, dtype=np.float64), len(target_nk))
    # `kernel_ridge.experts` multiplies answers, of several labels less 0.5, with the temperature.
    offset_k = shares_k / temperature + (0.5 if self._multi_label else 0.0)
    return Solution(np.zeros(0, np.float32), offset_k, temperature, loss)

  def _log_shares(self, count_k: np.ndarray, total: int) -> np.ndarray:
    """Logits of the shares of the classes, [.., K]."""
    classes = 2 if self._multi_label else count_k.shape[-1]
    share_k = (count_k + 1) / (total + classes)
    return np.log(share_k) - (np.log1p(-share_k) if self._multi_label else 0.0)

  def _loss(self, answers: Sequence[tuple[np.ndarray, '_Judged']]) -> float:
    losses = [log_loss(z, x.target_bk, self._multi_label) for z, x in answers]
    return float(np.average(losses, weights=[x.weight for _, x in answers]))


class _Judged(NamedTuple):
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


def _held_out(change_hk: np.ndarray, problem: '_Problem') -> _Judged:
  count_k = problem.target_nk.sum(axis=0, dtype=np.float64)
  own = len(problem.target_nk), len(change_hk)
  return _Judged(change_hk, problem.target_hk, count_k, *own)


def _left_out(factor_mm, half_mj, feature_bm, target_nk) -> _Judged:
  """Of the first training examples, each answered without it.

  Args:
    factor_mm: L of L L' = F'F + r I.
    half_mj: L^-1 F' [targets, ones].
    feature_bm: their features.
    target_nk: of all training examples.
  """
  half_mb = _solve_lower(factor_mm, feature_bm.T)
  target_bj = _with_ones(target_nk[: len(feature_bm)])
  others_b = np.maximum(1 - np.square(half_mb).sum(axis=0), _LEAST_OTHER)
  answer_bj = target_bj - (target_bj - half_mb.T @ half_mj) / others_b[:, None]
  total = len(target_nk) - 1
  count_bk = target_nk.sum(axis=0, dtype=np.float64) - target_bj[:, :-1]
  # The targets are centred, by the mean without the example.
  change_bk = answer_bj[:, :-1] - answer_bj[:, -1:] * count_bk / total
  return _Judged(change_bk, target_bj[:, :-1], count_bk, total, _COUNT_AS)


def _with_ones(target_nk: np.ndarray) -> np.ndarray:
  return np.concatenate([target_nk, np.ones((len(target_nk), 1), target_nk.dtype)], axis=1)


class _Problem(NamedTuple):
  """One regression: landmarks (their rows), kernels and targets of training and held examples."""

  landmarks: np.ndarray
  gram_mm: np.ndarray
  kernel_nm: np.ndarray
  kernel_hm: np.ndarray
  target_nk: np.ndarray
  target_hk: np.ndarray


def _problem(training, held, pattern_m, kernels) -> _Problem:
  count = kernels[0].shape[1]
  rows, held_rows = training.having(pattern_m), held.having(pattern_m)
  landmarks = rows[rows < count]
  kernel_nm = kernels[0][np.ix_(rows, landmarks)]
  kernel_hm = kernels[1][np.ix_(held_rows, landmarks)]
  targets = training.target_bk[rows], held.target_bk[held_rows]
  return _Problem(landmarks, kernel_nm[rows < count], kernel_nm, kernel_hm, *targets)


def _factor(gram_mm: np.ndarray) -> np.ndarray:
  """Cholesky factor of the landmarks' kernel, lower, float64."""
  return _raised_cholesky(gram_mm.astype(np.float64), _JITTER)


def _raised_cholesky(a_mm: np.ndarray, least: float) -> np.ndarray:
  """Returns lower L with L L' = A + r I, where r is the first of least, 10 least, 100 least, .. for
  which there is one: what float32 has left of a kernel of landmarks that are alike can have
  eigenvalues below zero.
  """
  for r in least * 10.0 ** np.arange(6):
    raised_mm = a_mm.copy()
    raised_mm[np.diag_indices(len(a_mm))] += r
    l_mm, failed_at = scipy.linalg.lapack.dpotrf(raised_mm, lower=True, overwrite_a=True)
    if not failed_at:
      return l_mm
  raise FloatingPointError(f'no Cholesky factor of a kernel, even with {r:g} on its diagonal')


def _solve_lower(factor_mm: np.ndarray, x_mn: np.ndarray) -> np.ndarray:
  x_mn = x_mn.astype(np.float32)
  factor_mm = factor_mm.astype(np.float32)
  return scipy.linalg.solve_triangular(factor_mm, x_mn, lower=True, check_finite=False)


def _halves(feature_nm: np.ndarray, target_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both sides of the normal equations."""
  gram_mm, right_mk = feature_nm.T @ feature_nm, feature_nm.T @ target_nk
  return gram_mm.astype(np.float64), right_mk.astype(np.float64)


def _packed(kernels, chosen: Mapping[int, Solution], shares, landmarks: int) -> dict[str, Any]:
  """Returns the variables; a pattern without a solution answers nothing."""
  num_classes = next(iter(chosen.values())).dual_mk.shape[1]
  patterns = len(PATTERNS)
  found: dict[str, Any] = {
    'dual_vmk': np.zeros((patterns, landmarks, num_classes), np.float32),
    'offset_vk': np.zeros((patterns, num_classes), np.float32),
    'share_vm': np.zeros((patterns, len(MODALITIES)), np.float32),
    'temperature_v': np.zeros((patterns,), np.float32),
    'weight_vv': np.eye(patterns, dtype=np.float32),
    'head_weight_v': np.ones((patterns,), np.float32),
  }
  for pattern, solution in chosen.items():
    found['dual_vmk'][pattern, : len(solution.dual_mk)] = solution.dual_mk
    found['offset_vk'][pattern] = solution.offset_k
    found['share_vm'][pattern] = shares[pattern]
    found['temperature_v'][pattern] = solution.temperature
    found['head_weight_v'][pattern] = 0.5
  return found | {modality: own.variables(landmarks) for modality, own in kernels.items()}
