"""Answers to training examples by models that have not seen them, and what their image says of
their text: kernel ridge regression on pooled hidden states, solved in closed form without each fold
in turn.

A radial kernel on standardised channels compares examples with at most LANDMARKS of them (Nystroem,
Williams and Seeger 2001); that of complete examples is a mixture of both modalities'. Mixture,
ridge and temperature are those of the least log loss of the answers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.methods.parts.kernel_ridge import GAMMA, MEAN, rbf
from molt_jax.methods.parts.ridge_calibration import log_loss

LANDMARKS = 1024
RIDGES = (0.03, 0.1, 0.3, 1.0)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # Of the text in the kernel of complete examples.
TEMPERATURES = tuple(float(x) for x in 2.0 ** np.arange(0, 6.1, 0.5))
COMPONENTS = 64  # Of one modality that the other is asked for.
NEIGHBOUR = 5
LEAST = 10  # Labelled examples of a pattern, below which it has no answers.
_JITTER = 1e-5
_LEAST_STD = 1e-3


class Examples(NamedTuple):
  """Examples to answer.

  Attributes:
    pooled: modality -> arrays float[N, L, T, D], see `pooled_states`; their kernels are averaged.
    present_nm: bool[N, 2].
    target_nk: float[N, K] of zeros and ones.
    labelled_n: bool[N], whose target is known.
    fold_n: int[N], the fold of each; examples that are the same thing are in one.
    multi_label: whether an example can have several labels.
  """

  pooled: Mapping[str, Sequence[np.ndarray]]
  present_nm: np.ndarray
  target_nk: np.ndarray
  labelled_n: np.ndarray
  fold_n: np.ndarray
  multi_label: bool


def folds(groups: Sequence[int], count: int, seed: int) -> np.ndarray:
  """Returns int[N], the fold of each example, so that a group is in one fold."""
  _, group_n = np.unique(np.asarray(groups), return_inverse=True)
  order = np.random.default_rng(seed).permutation(group_n.max(initial=-1) + 1)
  return order[group_n] % count


class OutOfFold:
  """Models of all examples without each fold in turn."""

  def __init__(self, examples: Examples, *, seed: int = 0):
    """Gets ready.

    Args:
      examples: those with a label are learned from, all are answered.
      seed: of the choice of landmarks.
    """
    self._examples = examples
    self._order = np.random.default_rng(seed).permutation(len(examples.labelled_n))
    self._kernels = {}
    for modality, arrays in examples.pooled.items():
      own_n = examples.present_nm[:, MODALITIES.index(modality)]
      self._kernels[modality] = [_Kernel(x_nltd, own_n, self._order) for x_nltd in arrays]

  def answers(self) -> np.ndarray:
    """Returns float32[V, N, K], the probabilities of each example under each missing pattern; NaN
    where it lacks a modality of the pattern, or too few examples have a label.
    """
    examples = self._examples
    found = np.full((len(PATTERNS), *examples.target_nk.shape), np.nan, np.float32)
    for v, pattern_m in enumerate(PATTERNS):
      names = [m for m, wanted in zip(MODALITIES, pattern_m, strict=True) if wanted]
      rows = np.flatnonzero(examples.present_nm[:, pattern_m].all(axis=1))
      enough = examples.labelled_n[rows].sum() >= LEAST
      if enough and all(name in self._kernels for name in names):
        found[v, rows] = self._answers_of(names, rows)
    return found

  def _answers_of(self, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Returns the answers to the examples that have these modalities, float32[n, K]."""
    examples = self._examples
    labelled_n, fold_n = examples.labelled_n[rows], examples.fold_n[rows]
    landmarks = self._among(rows[labelled_n])
    target_nk = examples.target_nk[rows].astype(np.float32)
    known = target_nk, labelled_n, fold_n
    found = []
    for shares in [(1.0,)] if len(names) == 1 else [(1 - text, text) for text in SHARES]:
      mixture = dict(zip(names, shares, strict=True))
      answer_rnk = _without_folds(self._features(mixture, rows, landmarks), *known, RIDGES)
      found.append(_best(answer_rnk, target_nk, labelled_n, multi_label=examples.multi_label))
    return min(found, key=lambda pair: pair[0])[1]

  def _among(self, rows: np.ndarray) -> np.ndarray:
    """Returns the landmarks among these rows."""
    own_n = np.zeros(len(self._order), bool)
    own_n[rows] = True
    return self._order[own_n[self._order]][:LANDMARKS]

  def _kernel(self, mixture: Mapping[str, float], rows, landmarks) -> np.ndarray:
    """Returns float32[n, M], each modality's kernel times its share."""
    total = 0.0
    for name, share in mixture.items():
      own = self._kernels[name]
      total = total + share / len(own) * sum(kernel(rows, landmarks) for kernel in own)
    return total

  def _features(self, mixture: Mapping[str, float], rows, landmarks) -> np.ndarray:
    """Returns float32[n, M], whose products are the kernel in the span of the landmarks."""
    kernel_nm = self._kernel(mixture, rows, landmarks)
    gram_mm = self._kernel(mixture, landmarks, landmarks)
    gram_mm = gram_mm.astype(np.float64)
    gram_mm[np.diag_indices(len(gram_mm))] += _JITTER
    factor_mm = scipy.linalg.cholesky(gram_mm, lower=True, overwrite_a=True, check_finite=False)
    factor_mm = factor_mm.astype(np.float32)
    how = {'lower': True, 'check_finite': False}
    return scipy.linalg.solve_triangular(factor_mm, kernel_nm.T, **how).T

  def guessed(self, known: str, other: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns what one modality says of the other, by regression of leading principal components
    of the other's last state.

    Args:
      known: the modality that is looked at.
      other: the one that is guessed.
      rows: n examples that have both.

    Returns:
      (guesses, what is there), unit vectors float32[n, d].
    """
    last_nd = self._examples.pooled[other][0][rows, -1, MEAN].astype(np.float32)
    target_nd = _components(last_nd, min(COMPONENTS, len(rows) // 4, last_nd.shape[1]))
    everyone = np.ones(len(rows), bool)
    feature_nm = self._features({known: 1.0}, rows, self._among(rows))
    fold_n = self._examples.fold_n[rows]
    (guess_nd,) = _without_folds(feature_nm, target_nd, everyone, fold_n, (RIDGES[-1],))
    return _unit(guess_nd), _unit(target_nd)

  def distances(self, modality: str, rows: np.ndarray) -> np.ndarray:
    """Returns float32[n], the mean squared distance of standardised channels to the NEIGHBOUR-th
    nearest of the landmarks, itself left out.
    """
    landmarks = self._among(rows)
    kernel_nm = self._kernels[modality][0](rows, landmarks)
    distance_nm = -np.log(np.maximum(kernel_nm, 1e-30)) / GAMMA
    distance_nm[rows[:, None] == landmarks[None]] = np.inf
    near = min(NEIGHBOUR, max(len(landmarks) - 1, 1)) - 1
    return np.partition(distance_nm, near, axis=1)[:, near]


def _components(x_nd: np.ndarray, count: int) -> np.ndarray:
  """Returns float32[N, count], leading principal components at unit variance."""
  centred_nd = (x_nd - x_nd.mean(axis=0)) / (x_nd.std(axis=0) + _LEAST_STD)
  cross_dd = (centred_nd.T @ centred_nd).astype(np.float64)
  width = len(cross_dd)
  _, axes_dc = scipy.linalg.eigh(cross_dd, subset_by_index=[width - count, width - 1])
  found_nc = centred_nd @ axes_dc.astype(np.float32)
  return found_nc / (found_nc.std(axis=0) + 1e-6)


def _unit(x_nd: np.ndarray) -> np.ndarray:
  return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)


class _Kernel:
  """The kernel of one modality, with the last landmarks that were asked for kept."""

  def __init__(self, x_nltd: np.ndarray, own_n: np.ndarray, order: np.ndarray):
    x_nc = x_nltd.reshape(len(x_nltd), -1)
    self._kept: tuple[bytes, np.ndarray] | None = None
    own = order[own_n[order]][: 4 * LANDMARKS]  # Enough to standardise by.
    seen = x_nc[own].astype(np.float32)
    self._mean_c = seen.mean(axis=0) if len(own) else np.zeros(x_nc.shape[1], np.float32)
    deviation_c = seen.std(axis=0) if len(own) else np.ones(x_nc.shape[1], np.float32)
    self._scale_c = 1 / (deviation_c + _LEAST_STD + 1e-3 * np.abs(self._mean_c))
    self._x_nc = x_nc

  def standardised(self, rows: np.ndarray) -> np.ndarray:
    """Returns float32[n, C]."""
    return (self._x_nc[rows].astype(np.float32) - self._mean_c) * self._scale_c

  def __call__(self, rows: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Returns float32[n, M]."""
    key = landmarks.tobytes() + rows.tobytes()
    if self._kept is None or self._kept[0] != key:
      z_mc = self.standardised(landmarks)
      parts = np.array_split(rows, max(len(rows) // 2048, 1))
      kernel_nm = np.concatenate([rbf(self.standardised(part), z_mc) for part in parts])
      if len(rows) == len(landmarks):  # Of the landmarks themselves: asked for once.
        return kernel_nm
      self._kept = key, kernel_nm
    return self._kept[1]


def _without_folds(feature_nm, target_nk, labelled_n, fold_n, ridges) -> np.ndarray:
  """Returns float32[ridges, n, K], the answers without each fold: regression of targets less the
  mean of those that it is fitted to.
  """
  parts = {}
  for fold in np.unique(fold_n):
    own_n = labelled_n & (fold_n == fold)
    parts[fold] = _Sums.of(feature_nm[own_n], target_nk[own_n])
  whole = _Sums(*(sum(sums) for sums in zip(*parts.values(), strict=True)))
  found = np.zeros((len(ridges), *target_nk.shape), np.float32)
  for fold, own in parts.items():
    held, left = fold_n == fold, _Sums(*(x - y for x, y in zip(whole, own, strict=True)))
    mean_k = left.target_k / max(left.count, 1)
    right_mk = left.product_mk - np.outer(left.feature_m, mean_k)
    for r, ridge in enumerate(ridges):
      left_mm = left.gram_mm + ridge * np.eye(len(left.gram_mm))
      factor = scipy.linalg.cho_factor(left_mm, lower=True, overwrite_a=True, check_finite=False)
      weight_mk = scipy.linalg.cho_solve(factor, right_mk, check_finite=False)
      found[r, held] = feature_nm[held] @ weight_mk.astype(np.float32) + mean_k
  return found


class _Sums(NamedTuple):
  """Of labelled examples, what a regression is solved from, float64."""

  count: int
  feature_m: np.ndarray
  target_k: np.ndarray
  gram_mm: np.ndarray
  product_mk: np.ndarray

  @classmethod
  def of(cls, feature_nm: np.ndarray, target_nk: np.ndarray) -> '_Sums':
    sums = (x.sum(axis=0, dtype=np.float64) for x in (feature_nm, target_nk))
    products = (feature_nm.T @ x for x in (feature_nm, target_nk))
    return cls(len(feature_nm), *sums, *(x.astype(np.float64) for x in products))


def _best(answer_rnk, target_nk, labelled_n, *, multi_label: bool) -> tuple[float, np.ndarray]:
  """Returns the least log loss over ridges and temperatures, and its probabilities."""
  known_nk, found = target_nk[labelled_n], []
  for r, answer_nk in enumerate(answer_rnk - (0.5 if multi_label else 0.0)):
    for t in TEMPERATURES:
      found.append((log_loss(t * answer_nk[labelled_n], known_nk, multi_label), r, t))
  loss, r, t = min(found)
  answer_nk = answer_rnk[r].astype(np.float64)
  if multi_label:
    return loss, (1 / (1 + np.exp(-t * (answer_nk - 0.5)))).astype(np.float32)
  return loss, scipy.special.softmax(t * answer_nk, axis=1).astype(np.float32)
