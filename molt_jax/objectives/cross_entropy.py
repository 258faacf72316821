"""Cross-entropies as (sum, weight) pairs, so that shards, steps and padding add up to the exact
mean.

An example of weight zero contributes nothing, to the gradient either, whatever its logits and
labels hold (NaN included).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from molt_jax.objectives.pairwise import in_range

# Logits beyond count as this much, so that differences, and sums over examples, stay in float32.
LARGEST_LOGIT = 1e30


def softmax_cross_entropy(
  logits_bk: jax.Array,
  label_b: jax.Array,
  *,
  weight_b: jax.Array,
  class_weight_k: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Single-label loss, -log softmax(logits)[label].

  Args:
    logits_bk: [B, K].
    label_b: integers [B] from 0 to K - 1.
    weight_b: [B], zero for padding.
    class_weight_k: [K]; multiplies the weight of each example by that of its class (so loss_sum /
      weight_sum is the weighted mean that PyTorch's `cross_entropy(weight=...)` returns).

  Returns:
    (loss_sum, weight_sum), float32 scalars.
  """
  live_b = weight_b > 0
  logits_bk = _read(logits_bk, live_b[:, None])
  label_b = jnp.where(live_b, label_b, 0).astype(jnp.int32)
  weight_b = weight_b.astype(jnp.float32)
  if class_weight_k is not None:
    weight_b = weight_b * jnp.take(class_weight_k.astype(jnp.float32), label_b)
  loss_b = -jnp.take_along_axis(jax.nn.log_softmax(logits_bk), label_b[:, None], axis=-1)[:, 0]
  return jnp.sum(loss_b * weight_b), jnp.sum(weight_b)


def sigmoid_cross_entropy(
  logits_bk: jax.Array,
  label_bk: jax.Array,
  *,
  weight_b: jax.Array,
  positive_weight_k: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Multi-label loss: mean over classes of -[p y log s(z) + (1 - y) log s(-z)].

  s is the logistic function, p the positive weight.

  Args:
    logits_bk: [B, K].
    label_bk: [B, K] of zeros and ones.
    weight_b: [B], zero for padding.
    positive_weight_k: [K], one if not given.

  Returns:
    (loss_sum, weight_sum), float32 scalars.
  """
  live_b1 = weight_b[:, None] > 0
  logits_bk = _read(logits_bk, live_b1)
  label_bk = jnp.where(live_b1, label_bk, 0).astype(jnp.float32)
  weight_b = weight_b.astype(jnp.float32)
  loss_bk = optax.sigmoid_binary_cross_entropy(logits_bk, label_bk)
  if positive_weight_k is not None:
    positive_weight_k = positive_weight_k.astype(jnp.float32)
    loss_bk = loss_bk * jnp.where(label_bk > 0, positive_weight_k[None, :], 1.0)
  return jnp.sum(jnp.mean(loss_bk, axis=-1) * weight_b), jnp.sum(weight_b)


def softmax_distillation(
  logits_bk: jax.Array, teacher_bk: jax.Array, *, weight_b: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """T^2 KL(softmax(teacher / T) || softmax(logits / T)), Hinton et al. 2015.

  No gradient reaches the teacher.

  Args:
    logits_bk: [B, K] of the student.
    teacher_bk: [B, K].
    weight_b: [B], zero for examples that do not count.
    temperature: T, from 0.01 to 100; far beyond, T^2 times rounding is no longer small.

  Returns:
    (loss_sum, weight_sum), float32 scalars.
  """
  teacher_bk, logits_bk = _softened(logits_bk, teacher_bk, weight_b, temperature)
  loss_b = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits_bk), jax.nn.log_softmax(teacher_bk)
  )
  weight_b = weight_b.astype(jnp.float32)
  return temperature**2 * jnp.sum(loss_b * weight_b), jnp.sum(weight_b)


def sigmoid_distillation(
  logits_bk: jax.Array, teacher_bk: jax.Array, *, weight_b: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """The same for independent labels.

  The mean over classes of T^2 KL between Bernoulli distributions. Arguments as
  `softmax_distillation`.
  """
  teacher_bk, logits_bk = _softened(logits_bk, teacher_bk, weight_b, temperature)

  def divergence(sign):
    log_p_bk, log_q_bk = jax.nn.log_sigmoid(sign * teacher_bk), jax.nn.log_sigmoid(sign * logits_bk)
    return jnp.exp(log_p_bk) * (log_p_bk - log_q_bk)

  loss_b = jnp.mean(divergence(1) + divergence(-1), axis=-1)
  weight_b = weight_b.astype(jnp.float32)
  return temperature**2 * jnp.sum(loss_b * weight_b), jnp.sum(weight_b)


def _softened(logits_bk, teacher_bk, weight_b, temperature):
  """(teacher / T, logits / T) in float32, examples of weight zero replaced by zeros."""
  live_b1 = weight_b[:, None] > 0
  teacher_bk = jax.lax.stop_gradient(teacher_bk)
  return tuple(_read(z_bk, live_b1) / temperature for z_bk in (teacher_bk, logits_bk))


def _read(logits_bk, live_b1):
  """Logits in float32 and in range; zeros for examples of weight zero."""
  logits_bk = jnp.where(live_b1, logits_bk, 0).astype(jnp.float32)
  return in_range(logits_bk, LARGEST_LOGIT)


class Kind(NamedTuple):
  """The losses of one kind of label.

  cross_entropy(logits, label, weight, class weights), distillation(logits, teacher, weight,
  temperature).
  """

  cross_entropy: Callable[..., tuple[jax.Array, jax.Array]]
  distillation: Callable[..., tuple[jax.Array, jax.Array]]


# By whether the data set is multi-label.
KINDS = {
  False: Kind(
    lambda z_bk, y_b, w_b, c_k: softmax_cross_entropy(z_bk, y_b, weight_b=w_b, class_weight_k=c_k),
    lambda z_bk, t_bk, w_b, t: softmax_distillation(z_bk, t_bk, weight_b=w_b, temperature=t),
  ),
  True: Kind(
    lambda z_bk, y_bk, w_b, c_k: sigmoid_cross_entropy(
      z_bk, y_bk, weight_b=w_b, positive_weight_k=c_k
    ),
    lambda z_bk, t_bk, w_b, t: sigmoid_distillation(z_bk, t_bk, weight_b=w_b, temperature=t),
  ),
}


def balanced_class_weights(count_k: np.ndarray) -> np.ndarray:
  """Weights inverse to class frequency for `softmax_cross_entropy`.

  n / (classes seen * count); one for a class never seen.

  count_k: [K], training examples of each class. Returns float32[K]; their mean over the training
  examples is one.
  """
  count_k = np.asarray(count_k, np.float64)
  share_k = count_k.sum() / max((count_k > 0).sum(), 1)
  return np.where(count_k > 0, share_k / np.maximum(count_k, 1), 1).astype(np.float32)


def balanced_positive_weights(count_k: np.ndarray, *, num_examples: int) -> np.ndarray:
  """Negatives over positives of each class for `sigmoid_cross_entropy`.

  One for a class never seen or always there.

  count_k: [K], training examples that carry each label. Returns float32[K].
  """
  count_k = np.asarray(count_k, np.float64)
  mixed_k = (count_k > 0) & (count_k < num_examples)
  return np.where(mixed_k, (num_examples - count_k) / np.maximum(count_k, 1), 1).astype(np.float32)
