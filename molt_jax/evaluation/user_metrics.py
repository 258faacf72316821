"""Scores of a user's choice, by scikit-learn's names: `evaluate --metrics=balanced_accuracy,...`.

They are scikit-learn's own scorers, asked about a classifier that knows its answers by heart. It is
imported here alone, and only where a metric is asked for.
"""

import difflib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from molt_jax.data.modalities import in_words
from molt_jax.errors import UserError
from molt_jax.evaluation.thresholds import HALF, of_examples
from molt_jax.methods.parts.interface import Output
from molt_jax.runtime import console, processes

# How the names of scikit-learn's scores of classifiers begin; others are of regression, clusters.
_OF_CLASSIFIERS = (
  'accuracy',
  'average_precision',
  'balanced_accuracy',
  'd2_brier_score',
  'd2_log_loss_score',
  'f1',
  'jaccard',
  'matthews_corrcoef',
  'neg_brier_score',
  'neg_log_loss',
  'precision',
  'recall',
  'roc_auc',
  'top_k_accuracy',
)


def check(names: Collection[str]) -> None:
  """Raises UserError unless scikit-learn is there and has scores of classifiers by these names."""
  if not names:
    return
  try:
    from sklearn.metrics import get_scorer_names
  except ImportError as error:
    raise UserError(
      "--metrics: scikit-learn is not installed: pip install 'molt_jax[sklearn]'"
    ) from error
  known = [name for name in get_scorer_names() if name.startswith(_OF_CLASSIFIERS)]
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=3)
      hint = f'did you mean {" or ".join(near)}?' if near else f'give some of {", ".join(known)}'
      raise UserError(f'--metrics: {name!r} is no score of classifiers in scikit-learn; {hint}')


class Collector:
  """Collects the answers of an evaluation; an `Observer`."""

  def __init__(
    self, conditions: Sequence[str], *, multi_label: bool, thresholds: Sequence[float] = HALF
  ):
    self._conditions, self._multi_label = list(conditions), multi_label
    self._thresholds = thresholds
    self._batches: list[tuple[np.ndarray, ...]] = []

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """See `Observer`."""
    weight_b, present_bm, keep_bcm, label = (
      processes.fetch(batch[name]) for name in ('weight', 'present', 'keep', 'label')
    )
    labelled_b1 = np.all(label.reshape(len(label), -1) >= 0, axis=1, keepdims=True)
    counted_bc = (present_bm[:, None] & keep_bcm).any(axis=-1) & labelled_b1
    counted_bc &= weight_b[:, None] > 0
    p_bc = of_examples(self._thresholds, present_bm[:, None] & keep_bcm)
    logits_cbk = processes.fetch(out_c.logits_bk)
    self._batches.append((logits_cbk, label, counted_bc, np.log(p_bc / (1 - p_bc))))

  def compute(self, names: Collection[str]) -> dict[str, dict[str, float]]:
    """Returns condition -> score -> value; one that the examples do not determine is left out, and
    why is logged.
    """
    if not self._batches:
      return {}
    logits, labels, counted, least = zip(*self._batches, strict=True)
    least_nc = np.concatenate(least)
    logits_cnk = np.concatenate(logits, axis=1)
    label, counted_nc = np.concatenate(labels), np.concatenate(counted)
    found: dict[str, dict[str, float]] = {}
    undetermined: dict[tuple[str, str], list[str]] = {}
    for c, condition in enumerate(self._conditions):
      rows = counted_nc[:, c]
      found[condition] = {}
      for name in names if rows.any() else ():
        least_n = least_nc[rows, c] if self._multi_label else None
        value, why = _score(name, logits_cnk[c][rows], label[rows], least_n)
        if value is None:
          undetermined.setdefault((name, why), []).append(condition)
        else:
          found[condition][name] = value
    for (name, why), conditions in undetermined.items():
      shown = ', '.join(map(in_words, conditions))
      console.log(f'--metrics: {name} has no value for {shown}: {why}')
    return found


def _score(
  name: str, logits_nk: np.ndarray, label: np.ndarray, least_n: np.ndarray | None
) -> tuple[float | None, str]:
  """Returns (the score, '') or (None, why there is none).

  `least_n`: above which logits labels are given, where an example can have several.
  """
  from sklearn.metrics import get_scorer

  model = _known_by_heart(logits_nk.astype(np.float64), least_n)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Of classes that are never predicted, for instance.
    try:
      value = float(get_scorer(name)(model, np.arange(len(label))[:, None], label))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
      return None, ' '.join(str(error).split())[:200]
  return (value, '') if np.isfinite(value) else (None, 'it is not finite')


def _known_by_heart(logits_nk: np.ndarray, least_n: np.ndarray | None) -> Any:
  """Returns a fitted classifier in scikit-learn's sense; its examples are rows of the logits."""
  from sklearn.base import BaseEstimator, ClassifierMixin

  class ByHeart(ClassifierMixin, BaseEstimator):
    classes_ = np.arange(logits_nk.shape[1])

    def __sklearn_is_fitted__(self) -> bool:
      return True

    def predict(self, rows: np.ndarray) -> np.ndarray:
      found_nk = logits_nk[rows[:, 0]]
      if least_n is None:
        return found_nk.argmax(axis=1)
      return (found_nk > least_n[rows[:, 0], None]).astype(int)

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
      found_nk = logits_nk[rows[:, 0]]
      if least_n is not None:
        return 1 / (1 + np.exp(-found_nk))
      shifted_nk = np.exp(found_nk - found_nk.max(axis=1, keepdims=True))
      return shifted_nk / shifted_nk.sum(axis=1, keepdims=True)

  return ByHeart()
