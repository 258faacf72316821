"""How the answers of head and regressions are weighed against each other."""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

# Of head and regressions in their product.
HEAD_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
EXPERT_WEIGHTS = (0.0, 0.25, 0.5, 1.0)


def log_loss(logits_bk: np.ndarray, target_bk: np.ndarray, multi_label: bool) -> float:
  """Returns the mean cross-entropy of logits, softmax's or, for several labels, sigmoid's."""
  if multi_label:
    return float((np.logaddexp(0, logits_bk) - target_bk * logits_bk).mean())
  return float(-(target_bk * log_softmax(logits_bk, axis=1)).sum(axis=1).mean())


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
  head_bk = head_bk if multi_label else log_softmax(head_bk, axis=1)
  grids = [HEAD_WEIGHTS, *(EXPERT_WEIGHTS if able else (0.0,) for able in able_v)]
  found = []
  for head_weight, *weight_v in itertools.product(*grids):
    if any(weight_v):
      mixed_bk = head_weight * head_bk + np.einsum('v,bvk->bk', weight_v, expert_bvk)
      found.append((log_loss(mixed_bk, target_bk, multi_label), head_weight, weight_v))
  _, head_weight, weight_v = min(found)
  return head_weight, np.asarray(weight_v, np.float32)
