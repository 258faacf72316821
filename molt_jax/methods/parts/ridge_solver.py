"""Solves the kernel ridge regression of `kernel_ridge` on the host, and chooses what it leaves open
(groups, mixture, ridge, temperature) by the log loss of examples that were not fitted to
(`ridge_judging`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.methods.parts import ridge_judging
from molt_jax.methods.parts.ridge_judging import Verdict
from molt_jax.methods.parts.ridge_kernels import Examples, Groups, ModalityKernels, mixture

RIDGES = tuple(float(x) for x in 10.0 ** np.arange(-2.5, 0.6, 0.5))
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # Of the text in the kernel of complete examples.
# Groups and mixtures are chosen with so many landmarks at most, as it takes a tenth of the time.
_CHOOSING = 1024
# Fewer examples decide nothing: neither is a regression fitted to, nor weighed by so few.
LEAST = 10
_JITTER = 1e-5


class Solution(NamedTuple):
  """A regression, and how it answers examples that it was not fitted to."""

  dual_mk: np.ndarray
  verdict: Verdict


def _best(found: Sequence[tuple[Any, Solution]]) -> tuple[Any, Solution]:
  """Returns what has the least log loss: accuracy on a few hundred examples is luck."""
  return min(found, key=lambda pair: pair[1].verdict.loss)


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
    features = tuple(
      _solve_lower(base_mm, kernel.T) for kernel in (problem.kernel_nm, problem.kernel_hm)
    )
    sides = _halves(features[0].T, ridge_judging.with_ones(problem.target_nk))
    tried = [self._try(problem, features, sides, ridge) for ridge in ridges]
    best = min(tried, key=lambda tried: tried.verdict.loss)
    from_shares = ridge_judging.from_shares(best.judged, problem.target_nk, self._multi_label)
    verdict = min(best.verdict, from_shares, key=lambda verdict: verdict.loss)
    weight_mk = scipy.linalg.solve_triangular(best.factor_mm, best.half_mk, lower=True, trans=1)
    dual_mk = np.zeros((self._count, weight_mk.shape[1]), np.float32)
    dual_mk[problem.landmarks] = scipy.linalg.solve_triangular(
      base_mm, weight_mk, lower=True, trans=1
    )
    return best.ridge, Solution(dual_mk, verdict)

  def _try(self, problem, features, sides, ridge) -> '_Tried':
    """One ridge; features: [M, N] of training examples, [M, H] of those held out."""
    feature_mn, feature_mh = features
    gram_mm, right_mj = sides
    mean_k = problem.target_nk.mean(axis=0)
    factor_mm = _raised_cholesky(gram_mm, ridge)
    half_mj = scipy.linalg.solve_triangular(factor_mm, right_mj, lower=True)
    half_mk = half_mj[:, :-1] - half_mj[:, -1:] * mean_k
    half_mb = _solve_lower(factor_mm, feature_mn[:, : ridge_judging.MOST_LEFT_OUT])
    judged = [ridge_judging.left_out(half_mb, half_mj, problem.target_nk)]
    if feature_mh.shape[1]:
      change_hk = _solve_lower(factor_mm, feature_mh).T @ half_mk
      judged.append(ridge_judging.held_out(change_hk, problem.target_hk, problem.target_nk))
    verdict = ridge_judging.from_mean(judged, mean_k, self._multi_label)
    return _Tried(ridge, factor_mm, half_mk, judged, verdict)


class _Tried(NamedTuple):
  """A ridge r: L of L L' = F'F + r I, L^-1 F' centred targets, and how it was judged."""

  ridge: float
  factor_mm: np.ndarray
  half_mk: np.ndarray
  judged: list[ridge_judging.Judged]
  verdict: Verdict


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
    found['offset_vk'][pattern] = solution.verdict.offset_k
    found['share_vm'][pattern] = shares[pattern]
    found['temperature_v'][pattern] = solution.verdict.temperature
    found['head_weight_v'][pattern] = 0.5
  return found | {modality: own.variables(landmarks) for modality, own in kernels.items()}
