"""Solves the kernel ridge regression of `kernel_ridge` on the host, and chooses what it leaves open
(groups, mixture, ridge, temperature) by the log loss of examples held out.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.methods.parts.kernel_ridge import KERNELS, MEAN

RIDGES = tuple(float(x) for x in 10.0 ** np.arange(-2.5, 0.6, 0.5))
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # Of the text in the kernel of complete examples.
TEMPERATURES = tuple(float(x) for x in 2.0 ** np.arange(0, 6.1, 0.5))
# Of head and regressions in their product.
HEAD_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
EXPERT_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
# Groups and mixtures are chosen with so many landmarks at most, as it takes a tenth of the time.
_CHOOSING = 1024
# Fewer examples decide nothing: neither is a regression fitted to, nor chosen by so few.
LEAST = 10
_LEAST_STD = 1e-3
_JITTER = 1e-5


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples in a random order.

  Attributes:
    pooled: modality -> group -> [B, L, N, D].
    present_bm: bool[B, 2].
    target_bk: float32[B, K] of zeros and ones.
  """

  pooled: Mapping[str, Mapping[str, np.ndarray]]
  present_bm: np.ndarray
  target_bk: np.ndarray

  def take(self, rows: np.ndarray) -> 'Examples':
    """Returns some of the examples."""
    pooled = {m: {g: x[rows] for g, x in groups.items()} for m, groups in self.pooled.items()}
    return Examples(pooled, self.present_bm[rows], self.target_bk[rows])

  def having(self, pattern_m: np.ndarray) -> np.ndarray:
    """Returns the rows of the examples that have the modalities of a pattern."""
    return np.flatnonzero(self.present_bm[:, pattern_m].all(axis=1))


class Solution(NamedTuple):
  """A regression, and the log loss of its answers to examples held out, at its best temperature."""

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
    held: to choose by; where a pattern has too few of them, every fifth training example is.
    landmarks: M of the variables; unused ones weigh nothing.
    multi_label: whether an example can have several labels.
    kernel: a key of `kernel_ridge.KERNELS`.

  Returns:
    Variables as `kernel_ridge.empty` makes them; None where no pattern has enough examples.
  """
  count = min(landmarks, len(training.target_bk))
  kernels = {m: _ModalityKernels(m, training, held, count, kernel) for m in training.pooled}
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
    mixtures = {share: functools.partial(_mixture, *pair, share) for share in SHARES}
    share, ridge = solver.choose(0, mixtures)
    shares[0] = (1 - share, share)
    chosen[0] = solver.solve(0, _mixture(*pair, share, count), ridge)
  return _packed(kernels, chosen, shares, landmarks) if chosen else None


class Groups(NamedTuple):
  """How a modality's kernel is made of groups.

  Attributes:
    mean_weight, cells_weight: of the two groups.
    state: whose cells are compared.
    lowest: the lowest hidden state whose means are compared, of those that the head reads.
    only_mean: the first and the last token are not compared beside the mean.
  """

  mean_weight: float
  cells_weight: float
  state: int = 0
  lowest: int = 0
  only_mean: bool = False


class _ModalityKernels:
  """Kernels of one modality's examples (training, then held) with the landmarks."""

  def __init__(self, modality: str, training: Examples, held: Examples, count: int, kernel: str):
    self._kernel = KERNELS[kernel]
    own = training.having(np.array(MODALITIES) == modality)
    self.choice, self.chosen = Groups(1.0, 0.0), None
    self._spaces, self._inputs = {}, {}
    for group, x_blnd in training.pooled[modality].items():
      self._spaces[group] = space(x_blnd[own] if len(own) else x_blnd)
      self._inputs[group] = (x_blnd, held.pooled[modality][group])
    self._count = count
    self._num_states = training.pooled[modality]['cells'].shape[1]
    # One token without a place: both groups would be the same.
    self._has_cells = training.pooled[modality]['cells'].shape[2] > 1

  @property
  def means(self) -> list[Groups]:
    """The groups of means that may be compared: of all hidden states or of the upper half, with or
    without other tokens beside the mean.
    """
    lowest = sorted({0, self._num_states // 2})
    choices = itertools.product(lowest, (False, True))
    return [Groups(1.0, 0.0, lowest=state, only_mean=alone) for state, alone in choices]

  @property
  def cells(self) -> list[Groups]:
    """The groups of cells that may be compared; none where there is one cell, since both groups
    would be the same.
    """
    return [Groups(0.0, 1.0, state) for state in range(self._num_states if self._has_cells else 0)]

  def kernels(self, choice: Groups, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernels of training and held examples with `count` landmarks, float32[B, M]."""
    weights = {'mean': choice.mean_weight, 'cells': choice.cells_weight}
    found = [(w, self._kernels(group, choice, count)) for group, w in weights.items() if w]
    return tuple(sum(w * pair[k] for w, pair in found) for k in range(2))

  def _kernels(self, group: str, choice: Groups, count: int) -> tuple[np.ndarray, np.ndarray]:
    flat = []
    for x_blnd in self._inputs[group]:
      z_blnd = self._standardised(group, choice, x_blnd)
      flat.append(z_blnd.reshape(len(z_blnd), -1))
    landmarks_mc = flat[0][:count]
    return tuple(self._kernel(x_bc, landmarks_mc) for x_bc in flat)

  def _standardised(self, group: str, choice: Groups, x_blnd: np.ndarray) -> np.ndarray:
    mean_lnd, scale_lnd, rows = self._space_of(group, choice)
    return (x_blnd[:, rows].astype(np.float32) - mean_lnd) * scale_lnd

  def _space_of(self, group: str, choice: Groups) -> tuple[np.ndarray, np.ndarray, slice]:
    """Mean and scale of the hidden states of a group, and which they are. What is not compared has
    the scale zero, and the rest weighs as much more.
    """
    mean_lnd, scale_lnd = self._spaces[group]
    if group == 'cells':
      rows = slice(choice.state, choice.state + 1)
      return mean_lnd[rows], scale_lnd[rows], rows
    compared_lnd = np.zeros_like(scale_lnd)
    compared_lnd[choice.lowest :, [MEAN] if choice.only_mean else slice(None)] = 1
    scale_lnd = scale_lnd * compared_lnd / np.sqrt(compared_lnd.mean())
    return mean_lnd, scale_lnd.astype(np.float32), slice(None)

  def variables(self, landmarks: int) -> dict[str, np.ndarray]:
    """Returns the modality's variables, as `kernel_ridge.empty` makes them."""
    choice = self.choice
    weights = np.array([choice.mean_weight, choice.cells_weight], np.float32)
    found = {'state': np.int32(choice.state), 'group_weight': weights}
    for group, (x_blnd, _) in self._inputs.items():
      z_mlnd = self._standardised(group, choice, x_blnd[: self._count])
      padding = np.zeros((landmarks - len(z_mlnd), *z_mlnd.shape[1:]), np.float32)
      mean_lnd, scale_lnd, _ = self._space_of(group, choice)
      found |= {
        f'{group}_mean_lnd': mean_lnd,
        f'{group}_scale_lnd': scale_lnd,
        f'{group}_landmarks_mlnd': np.concatenate([z_mlnd, padding]).astype(np.float16),
      }
    return found


def space(x_blnd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and inverse standard deviation over the first axis of training examples, float32."""
  mean_lnd = x_blnd.mean(axis=0, dtype=np.float64)
  square_lnd = np.zeros_like(mean_lnd)
  for rows in np.array_split(x_blnd, max(len(x_blnd) // 256, 1)):
    square_lnd += np.square(rows - mean_lnd).sum(axis=0)
  deviation_lnd = np.sqrt(square_lnd / max(len(x_blnd), 1))
  scale_lnd = 1 / (deviation_lnd + _LEAST_STD + 1e-3 * np.abs(mean_lnd))
  return mean_lnd.astype(np.float32), scale_lnd.astype(np.float32)


def _mixture(image, text, share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (1 - share) of the image's kernels + share of the text's, with `count` landmarks."""
  pairs = zip(image, text, strict=True)
  return tuple((1 - share) * a[:, :count] + share * b[:, :count] for a, b in pairs)


class _Solver:
  """Ridge regressions for missing patterns."""

  def __init__(self, training: Examples, held: Examples, count: int, multi_label: bool):
    self._training, self._held = training, held
    self._count, self._multi_label = count, multi_label

  def has_enough(self, pattern: int) -> bool:
    """Whether training examples of a pattern are enough to fit to."""
    rows = self._training.having(PATTERNS[pattern])
    return np.sum(rows < self._count) >= LEAST

  def choose_groups(self, pattern: int, own: _ModalityKernels) -> tuple[Groups, float]:
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

  def _candidates(self, own: _ModalityKernels, choices: Sequence[Groups]) -> dict[Groups, Callable]:
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
    factor_mm = _factor(problem.gram_mm)
    feature_nm, feature_hm = (
      _solve_lower(factor_mm, kernel.T).T for kernel in (problem.kernel_nm, problem.kernel_hm)
    )
    offset_k = problem.target_nk.mean(axis=0)
    fitted = ~problem.held_out_n
    halves = _halves(feature_nm[fitted], problem.target_nk[fitted] - offset_k)
    found = []
    for ridge in ridges:
      answer_hk = feature_hm @ _ridge_solution(*halves, ridge) + offset_k
      found.append((ridge, self._judged(answer_hk, problem.target_hk)))
    ridge, solution = _best(found)
    if problem.held_out_n.any():  # What was chosen by is fitted to in the end.
      halves = _halves(feature_nm, problem.target_nk - offset_k)
    weight_mk = _ridge_solution(*halves, ridge)
    dual_mk = np.zeros((self._count, weight_mk.shape[1]), np.float32)
    dual_mk[problem.landmarks] = scipy.linalg.solve_triangular(
      factor_mm, weight_mk, lower=True, trans=1
    )
    return ridge, solution._replace(dual_mk=dual_mk, offset_k=offset_k)

  def _judged(self, answer_hk: np.ndarray, target_hk: np.ndarray) -> Solution:
    """A solution without its coefficients."""
    if self._multi_label:
      answer_hk = answer_hk - 0.5
    loss, temperature = min(
      (log_loss(t * answer_hk, target_hk, self._multi_label), t) for t in TEMPERATURES
    )
    none = np.zeros(0, np.float32)
    return Solution(none, none, temperature, loss)


class _Problem(NamedTuple):
  """One regression: landmarks (their rows), kernels and targets of fitted and held examples; which
  of the fitted are held out, too, where no others are.
  """

  landmarks: np.ndarray
  gram_mm: np.ndarray
  kernel_nm: np.ndarray
  kernel_hm: np.ndarray
  target_nk: np.ndarray
  target_hk: np.ndarray
  held_out_n: np.ndarray


def _problem(training, held, pattern_m, kernels) -> _Problem:
  count = kernels[0].shape[1]
  rows, held_rows = training.having(pattern_m), held.having(pattern_m)
  landmarks = rows[rows < count]
  kernel_nm = kernels[0][np.ix_(rows, landmarks)]
  target_nk = training.target_bk[rows]
  held_out_n = np.zeros(len(rows), bool)
  kernel_hm, target_hk = kernels[1][np.ix_(held_rows, landmarks)], held.target_bk[held_rows]
  if len(held_rows) < LEAST:
    held_out_n = np.arange(len(rows)) % 5 == 0
    kernel_hm, target_hk = kernel_nm[held_out_n], target_nk[held_out_n]
  gram_mm = kernel_nm[rows < count]
  return _Problem(landmarks, gram_mm, kernel_nm, kernel_hm, target_nk, target_hk, held_out_n)


def _factor(gram_mm: np.ndarray) -> np.ndarray:
  """Cholesky factor of the landmarks' kernel, lower, float64."""
  gram_mm = gram_mm.astype(np.float64)
  gram_mm[np.diag_indices(len(gram_mm))] += _JITTER
  return scipy.linalg.cholesky(gram_mm, lower=True, overwrite_a=True, check_finite=False)


def _solve_lower(factor_mm: np.ndarray, x_mn: np.ndarray) -> np.ndarray:
  x_mn = x_mn.astype(np.float32)
  factor_mm = factor_mm.astype(np.float32)
  return scipy.linalg.solve_triangular(factor_mm, x_mn, lower=True, check_finite=False)


def _halves(feature_nm: np.ndarray, target_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both sides of the normal equations."""
  gram_mm, right_mk = feature_nm.T @ feature_nm, feature_nm.T @ target_nk
  return gram_mm.astype(np.float64), right_mk.astype(np.float64)


def _ridge_solution(gram_mm: np.ndarray, right_mk: np.ndarray, ridge: float) -> np.ndarray:
  gram_mm = gram_mm.copy()
  gram_mm[np.diag_indices(len(gram_mm))] += ridge
  factor = scipy.linalg.cho_factor(gram_mm, lower=True, overwrite_a=True, check_finite=False)
  return scipy.linalg.cho_solve(factor, right_mk, check_finite=False)


def log_loss(logits_bk: np.ndarray, target_bk: np.ndarray, multi_label: bool) -> float:
  """Returns the mean cross-entropy of logits, softmax's or, for several labels, sigmoid's."""
  if multi_label:
    centred_bk = logits_bk
    loss_bk = np.logaddexp(0, centred_bk) - target_bk * centred_bk
    return float(loss_bk.mean())
  return float(-(target_bk * log_softmax(logits_bk)).sum(axis=1).mean())


def log_softmax(x_bk: np.ndarray) -> np.ndarray:
  """Returns log-probabilities."""
  x_bk = x_bk - x_bk.max(axis=1, keepdims=True)
  return x_bk - np.log(np.exp(x_bk).sum(axis=1, keepdims=True))


def calibrate(
  head_bk: np.ndarray,
  expert_bvk: np.ndarray,
  target_bk: np.ndarray,
  able_v: Sequence[bool],
  *,
  multi_label: bool,
) -> tuple[float, np.ndarray]:
  """Returns the weights of `kernel_ridge.combine` with the least log loss: the head's, and those of
  the regressions, float32[V].

  Args:
    head_bk: the head's logits of examples held out.
    expert_bvk: what the regressions make of them, `kernel_ridge.experts`.
    target_bk: their labels.
    able_v: which regressions answer examples of this pattern.
    multi_label: whether an example can have several labels.
  """
  head_bk = head_bk if multi_label else log_softmax(head_bk)
  grids = [HEAD_WEIGHTS, *(EXPERT_WEIGHTS if able else (0.0,) for able in able_v)]
  found = []
  for head_weight, *weight_v in itertools.product(*grids):
    if any(weight_v):
      mixed_bk = head_weight * head_bk + np.einsum('v,bvk->bk', weight_v, expert_bvk)
      found.append((log_loss(mixed_bk, target_bk, multi_label), head_weight, weight_v))
  _, head_weight, weight_v = min(found)
  return head_weight, np.asarray(weight_v, np.float32)


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
