"""What a pair of an image and a text tower is worth, measured on their features alone: numpy arrays
in, numbers out, whatever made the features.

Zero-shot classification and retrieval (Radford et al. 2021), linear probes, modality gap (Liang et
al. 2022), alignment and uniformity (Wang and Isola 2020). Features of a pair are brought to unit
length first. Ties count against: an item ranks behind every wrong one that scores as high.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
from PIL import Image

from molt_jax.errors import UserError
from molt_jax.objectives.cca.diagnostics import modality_gap

TOP = (1, 3, 5)
RECALL_AT = (1, 5, 10)
TEMPLATES = ('{}', 'a picture of {}', 'a drawing of {}', 'an image of {}')
# Inverse strengths of the probe's penalty that validation chooses from.
STRENGTHS = tuple(10.0**e for e in range(-5, 3))
# Weaker penalties take longer to fit and overfit more: after so many in a row that are no better,
# the rest is not tried.
PATIENCE = 2
BLOCK_ROWS = 1024


def evaluate_pair(
  image_nc: np.ndarray,
  text_mc: np.ndarray,
  *,
  image_of_text: Sequence[int] | None = None,
  texts: Sequence[str] | None = None,
  labels: Sequence[int] | None = None,
  class_prompts_kpc: np.ndarray | None = None,
) -> dict[str, Any]:
  """Scores the embeddings of one split.

  Args:
    image_nc: [N, C], N images.
    text_mc: [M, C], M texts; an image can have several, or none.
    image_of_text: [M], the row of each text's image; None: text m belongs to image m.
    texts: the M texts themselves, so that equal ones are known as equal; None: all differ.
    labels: [N] classes of the images, for zero-shot classification.
    class_prompts_kpc: [K, P, C], embeddings of P prompts of each class; see `class_prompts`.

  Returns:
    {'image_to_text': {'R@1': ..}, 'text_to_image': {..}, 'modality_gap': .., 'alignment': ..,
    'uniformity_image': .., 'uniformity_text': ..}, with labels and prompts also 'zero_shot':
    {'top1': ..}. Shares lie in [0, 1].

    What the rows do not determine is left out: retrieval of fewer than two images with a text, gap
    and alignment without a pair, uniformity of fewer than two rows, zero-shot classification
    without an image of a known class or with fewer than two classes.
  """
  image_of_text = np.arange(len(text_mc)) if image_of_text is None else image_of_text
  image_of_text = np.asarray(image_of_text, int)
  results = {}
  if len(np.unique(image_of_text)) >= 2:
    results |= retrieval(image_nc, text_mc, image_of_text=image_of_text, texts=texts)
  if len(text_mc):
    paired_mc = np.asarray(image_nc)[image_of_text]
    results['modality_gap'] = float(modality_gap(jnp.asarray(paired_mc), jnp.asarray(text_mc)))
    results['alignment'] = alignment(paired_mc, text_mc)
  for name, rows in (('image', image_nc), ('text', text_mc)):
    if len(rows) >= 2:
      results[f'uniformity_{name}'] = uniformity(rows)
  if labels is not None and class_prompts_kpc is not None and len(class_prompts_kpc) >= 2:
    top = zero_shot(image_nc, labels, class_prompts_kpc)
    results |= {'zero_shot': top} if top else {}
  return results


# Zero-shot classification.


def class_prompts(
  class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> list[list[str]]:
  """Returns P prompts of each of K classes: each template with the class's name, its - and _ as
  spaces, in the place of {}.

  Raises:
    UserError: no template, or one without {}.
  """
  wrong = [template for template in templates if template.count('{}') != 1]
  if wrong or not templates:
    raise UserError(
      f'templates: {(wrong or [""])[0]!r} is not legal; give prompts with one {{}} for the class '
      f'name, such as "a picture of {{}}"'
    )
  return [
    [template.replace('{}', name.replace('-', ' ').replace('_', ' ')) for template in templates]
    for name in class_names
  ]


def zero_shot(
  image_nc: np.ndarray, labels: Sequence[int], class_prompts_kpc: np.ndarray
) -> dict[str, float]:
  """Top-1, 3 and 5 accuracy of the class whose prompts are nearest; a class is the mean of its
  prompts' unit vectors (ensembling).

  Images of a negative label, which is none, do not count; {} where there is no other.

  Raises:
    UserError: fewer than two classes.
  """
  if len(class_prompts_kpc) < 2:
    raise UserError(
      f'zero-shot: {len(class_prompts_kpc)} class(es) leave nothing to choose; give a data set '
      'of two classes or more'
    )
  class_kc = normalise(normalise(class_prompts_kpc).mean(axis=1))
  labelled_n = np.asarray(labels) >= 0
  if not labelled_n.any():
    return {}
  scores_nk, labels = normalise(image_nc[labelled_n]) @ class_kc.T, np.asarray(labels)[labelled_n]
  true_n = scores_nk[np.arange(len(labels)), labels]
  rank_n = np.sum(scores_nk >= true_n[:, None], axis=1) - 1
  return {f'top{k}': float(np.mean(rank_n < k)) for k in TOP}


# Retrieval.


def retrieval(
  image_nc: np.ndarray,
  text_mc: np.ndarray,
  *,
  image_of_text: Sequence[int] | None = None,
  texts: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
  """R@1, 5 and 10 both ways: the share of queries with at least one right item among the k best.

  Right for an image is each of its own texts and every text equal to one of them, whichever image
  that came from; right for a text is every image that has an equal text. So data with the same
  caption on many images does not punish a model for not telling apart what is the same. Images
  without a text take no part. Arguments as in `evaluate_pair`.

  Raises:
    UserError: fewer than two images with a text.
  """
  used, image_of_text = np.unique(
    np.arange(len(text_mc)) if image_of_text is None else image_of_text, return_inverse=True
  )
  if len(used) < 2:
    raise UserError(
      f'retrieval: {len(used)} image(s) with a text leave nothing to choose; give two or more'
    )
  image_nc, text_mc = normalise(np.asarray(image_nc)[used]), normalise(text_mc)
  kind_m = (
    np.arange(len(text_mc))
    if texts is None
    else np.unique(np.asarray(texts, object).astype(str), return_inverse=True)[1].reshape(-1)
  )
  best_m = np.full(len(text_mc), -np.inf)
  for scores_bm, right_bm, _ in _blocks(image_nc, text_mc, image_of_text, kind_m):
    best_m = np.maximum(best_m, np.max(scores_bm, axis=0, where=right_bm, initial=-np.inf))
  rank_m, rank_n = np.zeros(len(text_mc), int), np.zeros(len(image_nc), int)
  for scores_bm, right_bm, rows in _blocks(image_nc, text_mc, image_of_text, kind_m):
    rank_m += np.sum(~right_bm & (scores_bm >= best_m[None, :]), axis=0)
    best_b = np.max(scores_bm, axis=1, where=right_bm, initial=-np.inf)
    rank_n[rows] = np.sum(~right_bm & (scores_bm >= best_b[:, None]), axis=1)
  ranks = {'image_to_text': rank_n, 'text_to_image': rank_m}
  return {
    way: {f'R@{k}': float(np.mean(rank < k)) for k in RECALL_AT} for way, rank in ranks.items()
  }


def _blocks(
  image_nc, text_mc, image_of_text, kind_m
) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
  """Yields (scores [b, M], right [b, M], rows) of a few images after the other."""
  for start in range(0, len(image_nc), BLOCK_ROWS):
    rows = slice(start, min(start + BLOCK_ROWS, len(image_nc)))
    has_bk = np.zeros((rows.stop - start, kind_m.max() + 1), bool)
    own_m = (image_of_text >= start) & (image_of_text < rows.stop)
    has_bk[image_of_text[own_m] - start, kind_m[own_m]] = True
    yield image_nc[rows] @ text_mc.T, has_bk[:, kind_m], rows


# The shape of the common space.


def normalise(x: np.ndarray) -> np.ndarray:
  """Rows (last axis) at unit length, float32; a row of zeros stays zeros.

  Raises:
    UserError: a row is not finite, or too long for float32. Nothing ranks above or below NaN, so
      that such rows would seem to find everything.
  """
  x = np.asarray(x, np.float32)
  with np.errstate(over='ignore'):  # A length that overflows is refused in the next line.
    length = np.linalg.norm(x, axis=-1, keepdims=True)
  _check_finite(length)
  return x / np.where(length > 0, length, 1)


def _check_finite(value_n: np.ndarray) -> None:
  if not np.all(np.isfinite(value_n)):
    wrong = int(np.sum(~np.isfinite(value_n)))
    raise UserError(
      f'{wrong} of {value_n.size} features are not finite: the weights of a tower are damaged; '
      'export or download them again'
    )


def alignment(x_nc: np.ndarray, y_nc: np.ndarray) -> float:
  """Mean squared distance of the pairs (row n of both) on the unit sphere, in [0, 4]; 0 is
  perfect.
  """
  return float(np.mean(np.sum((normalise(x_nc) - normalise(y_nc)) ** 2, axis=1)))


def uniformity(x_nc: np.ndarray, *, sharpness: float = 2.0) -> float:
  """log of the mean over n != m of exp(-sharpness ||x_n - x_m||^2) on the unit sphere; lower is
  more evenly spread, 0 is collapsed.
  """
  x_nc = normalise(x_nc).astype(np.float64)
  total = sum(
    np.sum(np.exp(2 * sharpness * (np.minimum(x_nc[start : start + BLOCK_ROWS] @ x_nc.T, 1) - 1)))
    for start in range(0, len(x_nc), BLOCK_ROWS)
  )
  own = np.sum(np.exp(2 * sharpness * (np.minimum(np.sum(x_nc**2, axis=1), 1) - 1)))
  return float(np.log((total - own) / (len(x_nc) * (len(x_nc) - 1))))


# Linear probes.


def linear_probe(
  features: Mapping[str, np.ndarray],
  labels: Mapping[str, Sequence[int]],
  *,
  strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
  """Accuracy of multinomial logistic regression on frozen features.

  Fitted on 'train' with features standardised by its means and deviations, for each C in
  `strengths` in ascending order, until `PATIENCE` in a row are no better; C as scikit-learn's
  LogisticRegression defines it: C sum_n cross-entropy_n + ||W||^2 / 2, biases free. The C of the
  highest accuracy on 'validation' counts (the smaller of equals); it is not refitted with
  validation. Rows of a negative label, which is none, are left out. Deterministic.

  Args:
    features: split -> [N, D]; 'train', 'validation' and whatever else is to be scored.
    labels: split -> [N] classes.

  Returns:
    {'C': .., 'accuracy': {split: ..}, 'validation_by_C': {C: ..}}; a split without a known label
    has no accuracy.

  Raises:
    UserError: fewer than two classes in train, no validation rows, or features that are not finite.
  """
  labels = {split: np.asarray(y, np.int32) for split, y in labels.items()}
  features = {split: np.asarray(x_nd)[labels[split] >= 0] for split, x_nd in features.items()}
  labels = {split: y[y >= 0] for split, y in labels.items()}
  if len(np.unique(labels['train'])) < 2 or not len(labels['validation']):
    raise UserError(
      f'linear probe: {len(np.unique(labels["train"]))} class(es) in train and '
      f'{len(labels["validation"])} validation rows; '
      'give at least two classes and one row'
    )
  for x_nd in features.values():
    _check_finite(x_nd)
  mean_d, deviation_d = (
    features['train'].mean(axis=0, dtype=np.float64),
    features['train'].std(axis=0, dtype=np.float64),
  )
  scale_d = 1 / np.where(deviation_d > 1e-6 * deviation_d.max(), deviation_d, np.inf)
  rows = {split: ((x_nd - mean_d) * scale_d).astype(np.float32) for split, x_nd in features.items()}
  num_classes = 1 + max(int(y.max()) for y in labels.values() if len(y))

  def score(weight_dk, split):
    return float(
      np.mean(np.argmax(rows[split] @ weight_dk[:-1] + weight_dk[-1:], axis=1) == labels[split])
    )

  best, by_strength, weight_dk = None, {}, np.zeros((rows['train'].shape[1] + 1, num_classes))
  train, no_better = (jnp.asarray(rows['train']), jnp.asarray(labels['train'])), 0
  for strength in sorted(strengths):
    # From the solution of the stronger penalty before.
    weight_dk = _fit(*train, strength, weight_dk)
    by_strength[strength] = score(weight_dk, 'validation')
    if best is None or by_strength[strength] > by_strength[best[0]]:
      best, no_better = (strength, weight_dk), 0
    else:
      no_better += 1
    if no_better == PATIENCE:
      break
  accuracy = {split: score(best[1], split) for split in rows if len(labels[split])}
  return {'C': best[0], 'accuracy': accuracy, 'validation_by_C': by_strength}


def _fit(x_nd, label_n, strength, start_dk):
  """L-BFGS; the last row of the weights [D + 1, K] is the bias."""

  def loss(flat):
    value, gradient = _probe_loss(
      jnp.asarray(flat.reshape(start_dk.shape), jnp.float32),
      x_nd,
      label_n,
      1 / (strength * len(label_n)),
    )
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
  """Features without a tower: RGB images of any size, resized to `size` x `size`; float32[N, 3
  size^2] in [0, 1].
  """
  # The gap bounds the memory for sides of more than 2,048 times `size`; others come out the same.
  how = {'resample': Image.Resampling.BILINEAR, 'reducing_gap': 1024}
  resized = (image.resize((size, size), **how) for image in images)
  rows = [np.asarray(image, np.float32).ravel() / 255 for image in resized]
  return np.stack(rows) if rows else np.zeros((0, 3 * size**2), np.float32)


def principal_components(
  features: Mapping[str, np.ndarray], components: int = 128
) -> dict[str, np.ndarray]:
  """Projects every split [N, D] on the leading principal components of 'train', at most as many as
  it has rows or columns.
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
