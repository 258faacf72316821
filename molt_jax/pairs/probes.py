"""Linear probes of frozen features, and features to compare them with that no tower made."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
from PIL import Image

from molt_jax.errors import UserError
from molt_jax.pairs.retrieval import check_finite

# Inverse strengths of the probe's penalty that validation chooses from.
STRENGTHS = tuple(10.0**e for e in range(-5, 3))
# Weaker penalties take longer to fit and overfit more: after so many in a row that are no better,
# the rest is not tried.
PATIENCE = 2


def linear_probe(
  features: Mapping[str, np.ndarray],
  labels: Mapping[str, Sequence[int]],
  *,
  strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
  """Accuracy of multinomial logistic regression on frozen features.

  Fitted on 'train' with features standardised by its means and standard deviations, for each C in
  `strengths` in ascending order, until `PATIENCE` in a row are no better; C as scikit-learn's
  LogisticRegression defines it: C sum_n cross-entropy_n + ||W||^2 / 2, biases free. The C of the
  highest accuracy on 'validation' counts (the smaller of equals); it is not refitted with
  validation. Rows of a negative label, which is none, are left out. Deterministic.

  Args:
    features: split -> [N, D]; 'train', 'validation' and whatever else is to be scored.
    labels: split -> [N] classes.

  Returns:
    {'C': .., 'accuracy': {split: ..}, 'validation_by_C': {C: ..}}; none without labels.

  Raises:
    UserError: fewer than two classes in train, no validation rows, or features that are not finite.
  """
  labels = {split: np.asarray(y, np.int32) for split, y in labels.items()}
  features = {split: np.asarray(x_nd)[labels[split] >= 0] for split, x_nd in features.items()}
  labels = {split: y[y >= 0] for split, y in labels.items()}
  if len(np.unique(labels['train'])) < 2 or not len(labels['validation']):
    raise UserError(
      f'linear probe: {len(np.unique(labels["train"]))} class(es) in train and '
      f'{len(labels["validation"])} validation rows; give at least two classes and one row'
    )
  rows = _standardised(features)
  num_classes = 1 + max(int(y.max()) for y in labels.values() if len(y))
  train = jnp.asarray(rows['train']), jnp.asarray(labels['train'])
  best, by_strength, no_better = None, {}, 0
  weight_dk = np.zeros((rows['train'].shape[1] + 1, num_classes))
  for strength in sorted(strengths):
    # From the solution of the stronger penalty before.
    weight_dk = _fit(*train, strength, weight_dk)
    by_strength[strength] = _accuracy(weight_dk, rows['validation'], labels['validation'])
    if best is None or by_strength[strength] > by_strength[best[0]]:
      best, no_better = (strength, weight_dk), 0
    else:
      no_better += 1
    if no_better == PATIENCE:
      break
  known = [split for split in rows if len(labels[split])]
  accuracy = {split: _accuracy(best[1], rows[split], labels[split]) for split in known}
  return {'C': best[0], 'accuracy': accuracy, 'validation_by_C': by_strength}


def _standardised(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every split by the means and standard deviations of 'train'; constant columns are 0."""
  for x_nd in features.values():
    check_finite(x_nd)
  mean_d = features['train'].mean(axis=0, dtype=np.float64)
  std_d = features['train'].std(axis=0, dtype=np.float64)
  scale_d = 1 / np.where(std_d > 1e-6 * std_d.max(), std_d, np.inf)
  return {split: ((x - mean_d) * scale_d).astype(np.float32) for split, x in features.items()}


def _accuracy(weight_dk: np.ndarray, x_nd: np.ndarray, label_n: np.ndarray) -> float:
  logits_nk = x_nd @ weight_dk[:-1] + weight_dk[-1:]
  return float(np.mean(np.argmax(logits_nk, axis=1) == label_n))


def _fit(x_nd, label_n, strength, start_dk):
  """L-BFGS; the last row of the weights [D + 1, K] is the bias."""

  def loss(flat):
    weight_dk = jnp.asarray(flat.reshape(start_dk.shape), jnp.float32)
    value, gradient = _probe_loss(weight_dk, x_nd, label_n, 1 / (strength * len(label_n)))
    return float(value), np.asarray(gradient, np.float64).ravel()

  found = scipy.optimize.minimize(
    loss,
    start_dk.ravel(),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': 200, 'ftol': 1e-7, 'gtol': 1e-6},
  )
  return found.x.reshape(start_dk.shape)


@jax.jit
@jax.value_and_grad
def _probe_loss(weight_dk, x_nd, label_n, penalty):
  logits_nk = jnp.matmul(x_nd, weight_dk[:-1], precision='highest') + weight_dk[-1:]
  log_likelihood_n = jnp.take_along_axis(jax.nn.log_softmax(logits_nk), label_n[:, None], axis=1)
  return -jnp.mean(log_likelihood_n) + 0.5 * penalty * jnp.sum(weight_dk[:-1] ** 2)


def pixels(images: Sequence[Image.Image], *, size: int = 32) -> np.ndarray:
  """Features without a tower: RGB images of any size, resized to `size` x `size`.

  Returns:
    float32[N, 3 size^2] in [0, 1]
  """
  # The gap bounds the memory for sides of more than 2,048 times `size`; others come out the same.
  how = {'resample': Image.Resampling.BILINEAR, 'reducing_gap': 1024}
  resized = (image.resize((size, size), **how) for image in images)
  rows = [np.asarray(image, np.float32).ravel() / 255 for image in resized]
  return np.stack(rows) if rows else np.zeros((0, 3 * size**2), np.float32)


def principal_components(
  features: Mapping[str, np.ndarray], components: int = 128
) -> dict[str, np.ndarray]:
  """Projects every split [N, D] on the leading principal components of 'train'.

  Components are at most as many as it has rows or columns.
  """
  mean_d = features['train'].mean(axis=0)
  centred_nd = (features['train'] - mean_d).astype(np.float64)
  wide = centred_nd.shape[0] < centred_nd.shape[1]
  gram = centred_nd @ centred_nd.T if wide else centred_nd.T @ centred_nd
  count = min(components, len(gram))
  _, axes = scipy.linalg.eigh(gram, subset_by_index=(len(gram) - count, len(gram) - 1))
  axes_dk = centred_nd.T @ axes if wide else axes
  axes_dk = axes_dk[:, ::-1] / np.maximum(np.linalg.norm(axes_dk[:, ::-1], axis=0), 1e-12)
  return {split: (x_nd - mean_d) @ axes_dk.astype(np.float32) for split, x_nd in features.items()}
