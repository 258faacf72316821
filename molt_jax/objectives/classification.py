"""Cross-entropies as (sum, weight) pairs, so that shards, steps and padded rows add up to the exact mean.

A row of weight zero contributes nothing, to the gradient either, whatever its logits and labels hold (NaN included).
"""

import jax
import jax.numpy as jnp
import numpy as np


def softmax_cross_entropy(
    logits_bk: jax.Array, label_b: jax.Array, *, weight_b: jax.Array, class_weight_k: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Single-label loss, -log softmax(logits)[label].

  Args:
    logits_bk: [B, K].
    label_b: integers [B] from 0 to K - 1.
    weight_b: [B], zero for padding rows.
    class_weight_k: [K]; multiplies the weight of each row by that of its class (so loss_sum / weight_sum is the weighted mean that
      PyTorch's `cross_entropy(weight=...)` returns).

  Returns:
    (loss_sum, weight_sum), float32 scalars.
  """
  live_b = weight_b > 0
  logits_bk = jnp.where(live_b[:, None], logits_bk, 0).astype(jnp.float32)
  label_b = jnp.where(live_b, label_b, 0).astype(jnp.int32)
  weight_b = weight_b.astype(jnp.float32)
  if class_weight_k is not None:
    weight_b = weight_b * jnp.take(class_weight_k.astype(jnp.float32), label_b)
  loss_b = -jnp.take_along_axis(jax.nn.log_softmax(logits_bk), label_b[:, None], axis=-1)[:, 0]
  return jnp.sum(loss_b * weight_b), jnp.sum(weight_b)


def sigmoid_cross_entropy(
    logits_bk: jax.Array, label_bk: jax.Array, *, weight_b: jax.Array, positive_weight_k: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Multi-label loss, the mean over classes of -[p y log s(z) + (1 - y) log s(-z)], s the logistic function, p the positive weight.

  Args:
    logits_bk: [B, K].
    label_bk: [B, K] of zeros and ones.
    weight_b: [B], zero for padding rows.
    positive_weight_k: [K], one if not given.

  Returns:
    (loss_sum, weight_sum), float32 scalars.
  """
  live_b1 = weight_b[:, None] > 0
  logits_bk = jnp.where(live_b1, logits_bk, 0).astype(jnp.float32)
  label_bk = jnp.where(live_b1, label_bk, 0).astype(jnp.float32)
  weight_b = weight_b.astype(jnp.float32)
  positive_bk = label_bk * jax.nn.log_sigmoid(logits_bk)
  if positive_weight_k is not None:
    positive_bk = positive_bk * positive_weight_k[None, :].astype(jnp.float32)
  loss_b = -jnp.mean(positive_bk + (1 - label_bk) * jax.nn.log_sigmoid(-logits_bk), axis=-1)
  return jnp.sum(loss_b * weight_b), jnp.sum(weight_b)


def balanced_class_weights(count_k: np.ndarray) -> np.ndarray:
  """Weights inverse to class frequency for `softmax_cross_entropy`: n / (classes seen * count); one for a class never seen.

  count_k: [K], training examples of each class. Returns float32[K]; their mean over the training examples is one.
  """
  count_k = np.asarray(count_k, np.float64)
  share_k = count_k.sum() / max((count_k > 0).sum(), 1)
  return np.where(count_k > 0, share_k / np.maximum(count_k, 1), 1).astype(np.float32)


def balanced_positive_weights(count_k: np.ndarray, *, num_examples: int) -> np.ndarray:
  """Negatives over positives of each class for `sigmoid_cross_entropy`; one for a class never seen or always there.

  count_k: [K], training examples that carry each label. Returns float32[K].
  """
  count_k = np.asarray(count_k, np.float64)
  mixed_k = (count_k > 0) & (count_k < num_examples)
  return np.where(mixed_k, (num_examples - count_k) / np.maximum(count_k, 1), 1).astype(np.float32)
