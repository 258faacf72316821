"""What each modality brought to an answer.

A model that answers with any of its modalities missing can be asked what it would have said
without each. With v(S) = log p(label | the modalities S), and v of none the log of the label's
share in training (its prior), the exact Shapley values (Shapley 1953) of the two modalities are

  image: ((v(image) - v(none)) + (v(both) - v(text))) / 2,   text likewise.

They sum to v(both) - v(none). Where one modality is there, all of that is its own. They are in
nats: 0.69 doubles the odds of a label against what is given up for it, and below zero a modality
spoke against it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.evaluation.harm import mcnemar
from molt_jax.evaluation.records import Predictions

LEAST = 1e-38  # Of a probability: smaller ones are zero in float32.


def shares(value_vn: np.ndarray, nothing_n: np.ndarray, present_nm: np.ndarray) -> np.ndarray:
  """Returns float64[N, 2], what image and text brought to each example, in nats.

  Args:
    value_vn: float[3, N], v of both, of the image alone, of the text alone; those of modalities
      that an example lacks are not read.
    nothing_n: float[N], v of none.
    present_nm: bool[N, 2], what the examples have.
  """
  present_nm = np.asarray(present_nm, bool)
  complete_n = present_nm.all(axis=1)
  both_n, *alone = np.asarray(value_vn, np.float64)
  found_nm = np.zeros((len(complete_n), len(MODALITIES)))
  for m in range(len(MODALITIES)):
    first_n, last_n = alone[m] - nothing_n, both_n - alone[1 - m]
    only_n = present_nm[:, m] & ~complete_n
    found_nm[complete_n, m] = ((first_n + last_n) / 2)[complete_n]
    found_nm[only_n, m] = first_n[only_n]
  return found_nm


def log_likelihood(p_nk: np.ndarray, true_nk: np.ndarray, *, multi_label: bool) -> np.ndarray:
  """Returns float64[N], the log-probability of the label or, where there can be several, of the
  whole set of labels, each of which is there or not by itself.

  Args:
    p_nk: of each class.
    true_nk: bool[N, K], the labels.
    multi_label: whether there can be several.
  """
  log_nk = np.log(np.maximum(p_nk.astype(np.float64), LEAST))
  if not multi_label:
    return np.where(true_nk, log_nk, 0.0).sum(axis=1)
  log_not_nk = np.log(np.maximum(1.0 - p_nk.astype(np.float64), LEAST))
  return np.where(true_nk, log_nk, log_not_nk).sum(axis=1)


class Explained(NamedTuple):
  """What each modality brought to the true labels of a split's labelled examples (N of them).

  Attributes:
    rows: int[N], their places in the predictions.
    value_vn: float64[3, N], log-probability of the truth with everything, of the image alone, of
      the text alone; NaN where an example lacks what is asked for.
    nothing_n: float64[N], by the prior.
    share_nm: float64[N, 2].
    right_vn: bool[3, N], whether the answer is right; False where there is none.
    complete_n: bool[N], whether the example has both modalities.
  """

  rows: np.ndarray
  value_vn: np.ndarray
  nothing_n: np.ndarray
  share_nm: np.ndarray
  right_vn: np.ndarray
  complete_n: np.ndarray


def explain(predictions: Predictions, prior_k: np.ndarray) -> Explained:
  """Explains the answers to a split.

  Args:
    predictions: under all three of `modalities.CONDITIONS`, in their order.
    prior_k: float[K], the share of each class in training.
  """
  p, multi_label = predictions, predictions.multi_label
  labelled_n = np.ones(len(p.ids), bool) if multi_label else p.label >= 0
  rows = np.flatnonzero(labelled_n & p.read_nm.any(axis=1))
  label, k = p.label[rows], len(p.class_names)
  true_nk = label if multi_label else label[:, None] == np.arange(k)
  present_nm = p.read_nm[rows]
  there_vn = np.stack([present_nm.any(axis=1), *present_nm.T])
  value_vn = np.stack(
    [log_likelihood(p_nk[rows], true_nk, multi_label=multi_label) for p_nk in p.probability_cnk]
  )
  nothing_n = log_likelihood(
    np.broadcast_to(prior_k, true_nk.shape), true_nk, multi_label=multi_label
  )
  return Explained(
    rows=rows,
    value_vn=np.where(there_vn, value_vn, np.nan),
    nothing_n=nothing_n,
    share_nm=shares(value_vn, nothing_n, present_nm),
    right_vn=p.right_cn[:, rows] & there_vn,
    complete_n=present_nm.all(axis=1),
  )


def summary(found: Explained) -> dict[str, Any]:
  """Returns what holds over the complete examples.

  {'complete': how many there are; 'accuracy': {'both', 'image', 'text'}, of these; 'share': mean
  of image and text; 'image': {'helps': examples that are right with it and not without, 'hurts':
  the other way round, 'p': McNemar's}; 'text': likewise}; the last three are left out where there
  is no such example.
  """
  of = found.complete_n
  count = int(of.sum())
  if not count:
    return {'complete': 0}
  both_n, *alone = found.right_vn[:, of]
  accuracy = {'both': float(both_n.mean())}
  result: dict[str, Any] = {'complete': count, 'accuracy': accuracy, 'share': {}}
  for m, modality in enumerate(MODALITIES):
    without_n = alone[1 - m]
    helps, hurts = int((both_n & ~without_n).sum()), int((without_n & ~both_n).sum())
    accuracy[modality] = float(alone[m].mean())
    result['share'][modality] = float(found.share_nm[of, m].mean())
    result[modality] = {'helps': helps, 'hurts': hurts, 'p': mcnemar(helps, hurts)}
  return result


def by_class(found: Explained, predictions: Predictions) -> dict[str, dict[str, Any]]:
  """Returns class -> `summary` of the complete examples that carry it, the most frequent first."""
  label = predictions.label[found.rows]
  names: Sequence[str] = predictions.class_names
  true_nk = label if predictions.multi_label else label[:, None] == np.arange(len(names))
  order = np.argsort(-(true_nk & found.complete_n[:, None]).sum(axis=0), kind='stable')
  parts = {}
  for k in order:
    own = found._replace(complete_n=found.complete_n & true_nk[:, k])
    if own.complete_n.any():
      parts[names[k]] = summary(own)
  return parts
