"""From which probability on a label is given, where an example can have several: one half, or what
makes micro F1 greatest on validation, for each missing pattern (`eval.threshold`).

Where labels are rare, that is less than one half: the best threshold is half of the F1 that it
reaches (Lipton et al. 2014).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from molt_jax.data.modalities import PATTERNS
from molt_jax.methods.parts.interface import Output
from molt_jax.runtime import processes

HALF = (0.5,) * len(PATTERNS)


def of_run(meta: Mapping[str, Any]) -> Sequence[float]:
  """Returns the threshold of each row of PATTERNS that a checkpoint was saved with."""
  return meta.get('thresholds') or HALF


def of_examples(thresholds: Sequence[float], present: np.ndarray) -> np.ndarray:
  """Returns the threshold of each example, float[...].

  Args:
    thresholds: one for each row of PATTERNS.
    present: bool[..., 2], the modalities that the examples have.
  """
  found = np.full(present.shape[:-1], 0.5)
  for pattern_m, threshold in zip(PATTERNS, thresholds, strict=True):
    found[(present == pattern_m).all(axis=-1)] = threshold
  return found


def best(p_m: np.ndarray, true_m: np.ndarray) -> float:
  """Returns the threshold above which labels are given that makes micro F1 greatest; one half where
  no label is true.

  Args:
    p_m: probabilities, of all labels of all examples.
    true_m: bool, whether the example has the label.
  """
  if not true_m.any():
    return 0.5
  order = np.argsort(-p_m, kind='stable')
  sorted_m, hits_m = p_m[order], np.cumsum(true_m[order])
  f1_m = 2 * hits_m / (np.arange(1, len(p_m) + 1) + true_m.sum())
  following_m = np.append(sorted_m[1:], 0.0)
  # Equal probabilities are given together.
  f1_m = np.where(sorted_m > following_m, f1_m, -1.0)
  last = int(f1_m.argmax())
  # It has a finite logit.
  return float(np.clip((sorted_m[last] + following_m[last]) / 2, 1e-6, 1 - 1e-6))


class Fit:
  """Finds thresholds while validation is scored; an `Observer`."""

  def __init__(self):
    self._found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in PATTERNS]

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """See `Observer`."""
    weight_b, present_bm, keep_bcm, label_bk = (
      processes.fetch(batch[name]) for name in ('weight', 'present', 'keep', 'label')
    )
    logits_cbk = processes.fetch(out_c.logits_bk).astype(np.float64)
    p_cbk = 1 / (1 + np.exp(-np.clip(logits_cbk, -700, 700)))
    left_cbm = present_bm[None] & np.moveaxis(keep_bcm, 1, 0)
    for found, pattern_m in zip(self._found, PATTERNS, strict=True):
      rows_cb = (left_cbm == pattern_m).all(axis=-1) & (weight_b > 0)
      true_cbk = np.broadcast_to(label_bk[None] > 0.5, p_cbk.shape)
      found.append((p_cbk[rows_cb].ravel(), true_cbk[rows_cb].ravel()))

  def compute(self) -> list[float]:
    """Returns the threshold of each row of PATTERNS."""
    thresholds = []
    for found in self._found:
      p_m = np.concatenate([np.zeros(0), *(p for p, _ in found)])
      true_m = np.concatenate([np.zeros(0, bool), *(true for _, true in found)])
      thresholds.append(best(p_m, true_m))
    return thresholds
