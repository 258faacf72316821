"""Classification metrics as sums and counts, AUROC, which is neither.

Sums and counts add up over batches, shards and hosts to the numbers of the whole split.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from molt_jax.evaluation import f1
from molt_jax.objectives.cross_entropy import sigmoid_cross_entropy, softmax_cross_entropy
from molt_jax.runtime import processes


@struct.dataclass
class ClassificationMetrics:
  """Running sums over examples; `update` can run under jit with the sums on the device.

  Attributes:
    true_positive_k, false_positive_k, false_negative_k: int32[K].
    support_k: int32[K], examples that truly carry each label.
    correct: int32, examples whose label (multi-label: whole label set) is right.
    samples_f1_sum: float32, sum of each example's F1 between predicted and true label set.
    count: int32, examples of non-zero weight.
    loss_sum, weight_sum: float32, cross-entropy without class weights, and its weight.
    multi_label: whether labels are [B, K] of zeros and ones; static.
  """

  true_positive_k: jax.Array
  false_positive_k: jax.Array
  false_negative_k: jax.Array
  support_k: jax.Array
  correct: jax.Array
  samples_f1_sum: jax.Array
  count: jax.Array
  loss_sum: jax.Array
  weight_sum: jax.Array
  multi_label: bool = struct.field(pytree_node=False)

  @classmethod
  def empty(cls, *, num_classes: int, multi_label: bool) -> 'ClassificationMetrics':
    """The metrics of no example."""
    per_class = {
      f'{name}_k': jnp.zeros(num_classes, jnp.int32)
      for name in ('true_positive', 'false_positive', 'false_negative', 'support')
    }
    counts = {name: jnp.zeros((), jnp.int32) for name in ('correct', 'count')}
    sums = {
      name: jnp.zeros((), jnp.float32) for name in ('samples_f1_sum', 'loss_sum', 'weight_sum')
    }
    return cls(**per_class, **counts, **sums, multi_label=multi_label)

  def update(
    self,
    logits_bk: jax.Array,
    label: jax.Array,
    weight_b: jax.Array,
    least_b: jax.Array | float = 0.0,
  ) -> 'ClassificationMetrics':
    """Adds a batch.

    Args:
      logits_bk: [B, K]. Prediction: the largest; multi-label: those above `least_b`.
      label: integers [B]; multi-label: [B, K] of zeros and ones.
      weight_b: [B]; examples of weight zero do not count.
      least_b: [B] or a number, logits of thresholds; 0 is a probability of one half.
    """
    live_b1 = weight_b[:, None] > 0
    loss = sigmoid_cross_entropy if self.multi_label else softmax_cross_entropy
    loss_sum, weight_sum = loss(logits_bk, label, weight_b=weight_b)
    if self.multi_label:
      true_bk, predicted_bk = label == 1, logits_bk > jnp.reshape(least_b, (-1, 1))
    else:
      class_1k = jnp.arange(logits_bk.shape[-1])[None, :]
      true_bk = label[:, None] == class_1k
      predicted_bk = jnp.argmax(logits_bk, axis=-1)[:, None] == class_1k
    true_bk, predicted_bk = true_bk & live_b1, predicted_bk & live_b1
    hit_b = jnp.sum(true_bk & predicted_bk, axis=-1)
    size_b = jnp.sum(true_bk, axis=-1) + jnp.sum(predicted_bk, axis=-1)
    return self.merge(
      ClassificationMetrics(
        true_positive_k=jnp.sum(true_bk & predicted_bk, axis=0, dtype=jnp.int32),
        false_positive_k=jnp.sum(~true_bk & predicted_bk, axis=0, dtype=jnp.int32),
        false_negative_k=jnp.sum(true_bk & ~predicted_bk, axis=0, dtype=jnp.int32),
        support_k=jnp.sum(true_bk, axis=0, dtype=jnp.int32),
        correct=jnp.sum(jnp.all(true_bk == predicted_bk, axis=-1) & live_b1[:, 0], dtype=jnp.int32),
        samples_f1_sum=jnp.sum(2 * hit_b / jnp.maximum(size_b, 1)),
        count=jnp.sum(live_b1, dtype=jnp.int32),
        loss_sum=loss_sum,
        weight_sum=weight_sum,
        multi_label=self.multi_label,
      )
    )

  def merge(self, other: 'ClassificationMetrics') -> 'ClassificationMetrics':
    """The metrics of both sets of examples together."""
    return jax.tree.map(jnp.add, self, other)

  def compute(self) -> dict[str, float]:
    """Accuracy, F1 and loss; a score that the examples do not determine is left out.

    As scikit-learn's `accuracy_score` and `f1_score(..., zero_division=0)`. Multi-label: accuracy
    is that of whole label sets; macro F1 averages all classes, samples F1 all examples, and where
    neither truth nor prediction has anything the F1 of that class or example counts as 0, as in
    published numbers. Single label: macro F1 averages the classes that occur among truths or
    predictions, and samples F1 is the accuracy (the F1 of two sets of one label each is 1 or 0).

    Without an example there is no score at all. Where no example carries or is given any label,
    there is no F1: scikit-learn's `zero_division=nan` says nan in the same cases.
    """
    m = jax.device_get(self)
    if not m.count:
      return {}
    scores = {'accuracy': float(m.correct / m.count)}
    counts = m.true_positive_k, m.false_positive_k, m.false_negative_k, m.support_k
    if found := f1.scores(*counts, multi_label=self.multi_label):
      scores |= {
        'f1_micro': found['f1_micro'],
        'f1_macro': found['f1_macro'],
        'f1_samples': float(m.samples_f1_sum.astype(np.float64) / m.count),
        'f1_weighted': found['f1_weighted'],
      }
    if m.weight_sum > 0:
      scores['loss'] = float(m.loss_sum.astype(np.float64) / m.weight_sum)
    return scores


def auroc(score_nk: np.ndarray, true_nk: np.ndarray) -> float | None:
  """Area under the ROC curve, averaged over the classes that some examples have and some have not.

  None where there is no such class. As scikit-learn's `roc_auc_score(..., average='macro')` over
  those classes; ties count half.

  Args:
    score_nk: [N, K], larger for more likely. Of one class against the others these are
      probabilities, of labels on their own logits do.
    true_nk: bool[N, K].
  """
  positive_k, count = true_nk.sum(axis=0), len(true_nk)
  defined_k = (positive_k > 0) & (positive_k < count)
  if not defined_k.any():
    return None
  true_nk, positive_k = true_nk[:, defined_k], positive_k[defined_k].astype(np.float64)
  import scipy.stats  # Which takes a third of a second, and a prediction has no use for it.

  rank_nk = scipy.stats.rankdata(score_nk[:, defined_k], axis=0)
  # Pairs of a positive above a negative (Mann and Whitney).
  above_k = (rank_nk * true_nk).sum(axis=0) - positive_k * (positive_k + 1) / 2
  return float(np.mean(above_k / (positive_k * (count - positive_k))))


class Ranking:
  """Collects the scores of an evaluation under C conditions for AUROC.

  Of two classes, or of the labels of a multi-label data set.
  """

  def __init__(self, *, multi_label: bool):
    self._multi_label = multi_label
    self._batches: list[tuple[jax.Array, ...]] = []

  def observe(self, logits_cbk: jax.Array, label: jax.Array, weight_cb: jax.Array) -> None:
    """Adds a batch; examples of weight zero do not count. Nothing is fetched from devices."""
    self._batches.append((logits_cbk, label, weight_cb))

  def compute(self) -> list[float | None]:
    """Returns the AUROC of each condition that saw a batch; all processes call it together."""
    if not self._batches:
      return []
    logits, labels, weights = (
      [processes.fetch(x) for x in column] for column in zip(*self._batches, strict=True)
    )
    logits_cnk, weight_cn = np.concatenate(logits, axis=1), np.concatenate(weights, axis=1)
    label = np.concatenate(labels)
    if self._multi_label:
      score_cnk, true_nk = logits_cnk, label == 1
    else:
      score_cnk, true_nk = np.diff(logits_cnk, axis=-1), label[:, None] == 1
    return [
      auroc(score_nk[weight_n > 0], true_nk[weight_n > 0])
      for score_nk, weight_n in zip(score_cnk, weight_cn, strict=True)
    ]
