"""F1 from counts: the rules of every place that reports it."""

import numpy as np


def class_f1(
  true_positive_k: np.ndarray, false_positive_k: np.ndarray, false_negative_k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (F1 of each class, bool[K], whether it occurs among truths or predictions).

  Where it does not, F1 is 0.
  """
  hits_k = 2 * np.asarray(true_positive_k, np.int64)
  all_k = hits_k + false_positive_k + false_negative_k
  return hits_k / np.maximum(all_k, 1), all_k > 0


def scores(
  true_positive_k: np.ndarray,
  false_positive_k: np.ndarray,
  false_negative_k: np.ndarray,
  support_k: np.ndarray,
  *,
  multi_label: bool,
) -> dict[str, float]:
  """Returns f1_micro, f1_macro and f1_weighted, as scikit-learn's `f1_score(zero_division=0)`.

  Multi-label: macro F1 averages all classes, as in published numbers. Single label: those that
  occur among truths or predictions. {} where no example carries or is given any label.

  Args:
    true_positive_k, false_positive_k, false_negative_k: integers [K].
    support_k: integers [K], examples that truly carry each label.
    multi_label: whether an example can have several labels.
  """
  counts = true_positive_k, false_positive_k, false_negative_k
  f1_k, occurs_k = class_f1(*counts)
  if not occurs_k.any():
    return {}
  hits, wrong = 2 * np.sum(true_positive_k), np.sum(false_positive_k) + np.sum(false_negative_k)
  averaged_k = np.ones(len(f1_k), bool) if multi_label else occurs_k
  return {
    'f1_micro': float(hits / (hits + wrong)),
    'f1_macro': float(f1_k[averaged_k].mean()),
    # Without a truth every F1 is 0, however it is weighed.
    'f1_weighted': float(np.sum(f1_k * support_k) / max(np.sum(support_k), 1)),
  }


def counts(true_nk: np.ndarray, predicted_nk: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns (true positives, false positives, false negatives), int[K] each, of bool[N, K]."""
  return (
    np.sum(true_nk & predicted_nk, axis=0),
    np.sum(~true_nk & predicted_nk, axis=0),
    np.sum(true_nk & ~predicted_nk, axis=0),
  )
