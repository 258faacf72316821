"""What a pair of an image and a text tower is worth, measured on their features alone: numpy arrays
in, numbers out, whatever made the features.

Zero-shot classification and retrieval (Radford et al. 2021), modality gap (Liang et al. 2022),
alignment and uniformity (Wang and Isola 2020). Features of a pair are brought to unit length first.
Ties count against: an item ranks behind every wrong one that scores as high.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special

from molt_jax.errors import UserError
from molt_jax.objectives.cca.diagnostics import modality_gap

TOP = (1, 3, 5)
RECALL_AT = (1, 5, 10)
TEMPLATES = ('{}', 'a picture of {}', 'a drawing of {}', 'an image of {}')
BLOCK_ROWS = 1024


def evaluate_pair(
  image_nc: np.ndarray,
  text_mc: np.ndarray,
  *,
  image_of_text: Sequence[int] | None = None,
  texts: Sequence[str] | None = None,
  labels: Sequence[int] | None = None,
  class_prompts_kpc: np.ndarray | None = None,
  sigmoid: tuple[float, float] | None = None,
) -> dict[str, Any]:
  """Scores the embeddings of one split.

  Args:
    image_nc: [N, C], N images.
    text_mc: [M, C], M texts; an image can have several, or none.
    image_of_text: [M], the row of each text's image; None: text m belongs to image m.
    texts: the M texts themselves, so that equal ones are known as equal; None: all differ.
    labels: [N] classes of the images, for zero-shot classification.
    class_prompts_kpc: [K, P, C], embeddings of P prompts of each class; see `class_prompts`.
    sigmoid: (scale, bias) of towers whose sigmoid of scale * cosine + bias is the probability that
      image and text belong together.

  Returns:
    {'image_to_text': {'R@1': ..}, 'text_to_image': {..}, 'modality_gap': .., 'alignment': ..,
    'uniformity_image': .., 'uniformity_text': ..}, with labels and prompts also 'zero_shot':
    {'top1': ..}, with `sigmoid` 'match_probability': {'right pairs': .., 'wrong pairs': ..}. Shares
    lie in [0, 1].

    What the rows do not determine is left out: retrieval of fewer than two images with a text, gap
    and alignment without a pair, uniformity of fewer than two rows, zero-shot classification
    without an image of a known class or with fewer than two classes.
  """
  image_of_text = np.arange(len(text_mc)) if image_of_text is None else np.array(image_of_text, int)
  results = {}
  if len(np.unique(image_of_text)) >= 2:
    how = {'image_of_text': image_of_text, 'texts': texts}
    results |= retrieval(image_nc, text_mc, **how)
    if sigmoid is not None:
      results['match_probability'] = match_probability(image_nc, text_mc, *sigmoid, **how)
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


def class_prompts(
  class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> list[list[str]]:
  """Returns P prompts of each of K classes: each template with the class's name in place of {}.

  Its - and _ are spaces.

  Raises:
    UserError: no template, or one without {}.
  """
  wrong = [template for template in templates if template.count('{}') != 1]
  if wrong or not templates:
    raise UserError(
      f'templates: {(wrong or [""])[0]!r} is not legal; give prompts with one {{}} for the class '
      f'name, such as "a picture of {{}}"'
    )
  prompts = []
  for name in class_names:
    words = name.replace('-', ' ').replace('_', ' ')
    prompts.append([template.replace('{}', words) for template in templates])
  return prompts


def zero_shot(
  image_nc: np.ndarray, labels: Sequence[int], class_prompts_kpc: np.ndarray
) -> dict[str, float]:
  """Top-1, 3 and 5 accuracy of the class whose prompts are nearest.

  A class is the mean of its prompts' unit vectors (ensembling). Images of a negative label, which
  is none, do not count; {} where there is no other.

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
  image_nc, *of_texts = _with_a_text(image_nc, text_mc, image_of_text, texts)
  text_mc = of_texts[0]
  best_m = np.full(len(text_mc), -np.inf)
  for scores_bm, right_bm, _ in _blocks(image_nc, *of_texts):
    best_m = np.maximum(best_m, np.max(scores_bm, axis=0, where=right_bm, initial=-np.inf))
  rank_m, rank_n = np.zeros(len(text_mc), int), np.zeros(len(image_nc), int)
  for scores_bm, right_bm, rows in _blocks(image_nc, *of_texts):
    rank_m += np.sum(~right_bm & (scores_bm >= best_m[None, :]), axis=0)
    best_b = np.max(scores_bm, axis=1, where=right_bm, initial=-np.inf)
    rank_n[rows] = np.sum(~right_bm & (scores_bm >= best_b[:, None]), axis=1)
  ranks = {'image_to_text': rank_n, 'text_to_image': rank_m}
  return {
    way: {f'R@{k}': float(np.mean(rank < k)) for k in RECALL_AT} for way, rank in ranks.items()
  }


def match_probability(
  image_nc: np.ndarray,
  text_mc: np.ndarray,
  scale: float,
  bias: float,
  *,
  image_of_text: Sequence[int] | None = None,
  texts: Sequence[str] | None = None,
) -> dict[str, float]:
  """The mean probability that image and text belong together, of pairs that do and of all others.

  It is the sigmoid of scale * cosine + bias (Zhai et al. 2023). Which pairs are right is as in
  `retrieval`.
  """
  image_nc, *of_texts = _with_a_text(image_nc, text_mc, image_of_text, texts)
  sums, counts = np.zeros(2), np.zeros(2)
  for scores_bm, right_bm, _ in _blocks(image_nc, *of_texts):
    probability_bm = scipy.special.expit(scale * scores_bm.astype(np.float64) + bias)
    for side, chosen_bm in enumerate((right_bm, ~right_bm)):
      sums[side] += probability_bm.sum(where=chosen_bm)
      counts[side] += chosen_bm.sum()
  means = sums / np.maximum(counts, 1)
  return {'right pairs': float(means[0]), 'wrong pairs': float(means[1])}


def _with_a_text(image_nc, text_mc, image_of_text, texts) -> tuple[np.ndarray, ...]:
  """Returns the images that have a text and the texts, both of unit length, the row of each text's
  image among them, and which texts are equal, int[M].

  Raises:
    UserError: fewer than two images with a text.
  """
  if image_of_text is None:
    image_of_text = np.arange(len(text_mc))
  used, image_of_text = np.unique(image_of_text, return_inverse=True)
  if len(used) < 2:
    raise UserError(
      f'retrieval: {len(used)} image(s) with a text leave nothing to choose; give two or more'
    )
  kind_m = np.arange(len(text_mc))
  if texts is not None:
    _, kind_m = np.unique(np.asarray(texts, object).astype(str), return_inverse=True)
    kind_m = kind_m.reshape(-1)
  return normalise(np.asarray(image_nc)[used]), normalise(text_mc), image_of_text, kind_m


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


def normalise(x: np.ndarray) -> np.ndarray:
  """Rows (last axis) at unit length, float32; a row of zeros stays zeros.

  Raises:
    UserError: a row is not finite, or too long for float32. Nothing ranks above or below NaN, so
      that such rows would seem to find everything.
  """
  x = np.asarray(x, np.float32)
  with np.errstate(over='ignore'):  # A length that overflows is refused in the next line.
    length = np.linalg.norm(x, axis=-1, keepdims=True)
  check_finite(length)
  return x / np.where(length > 0, length, 1)


def check_finite(value_n: np.ndarray) -> None:
  """Raises UserError where a feature is not finite."""
  if not np.all(np.isfinite(value_n)):
    wrong = int(np.sum(~np.isfinite(value_n)))
    raise UserError(
      f'{wrong} of {value_n.size} features are not finite: the weights of a tower are damaged; '
      'export or download them again'
    )


def alignment(x_nc: np.ndarray, y_nc: np.ndarray) -> float:
  """Mean squared distance of the pairs (row n of both) on the unit sphere, in [0, 4]."""
  return float(np.mean(np.sum((normalise(x_nc) - normalise(y_nc)) ** 2, axis=1)))


def uniformity(x_nc: np.ndarray, *, sharpness: float = 2.0) -> float:
  """log of the mean over n != m of exp(-sharpness ||x_n - x_m||^2) on the unit sphere.

  Lower is more evenly spread, 0 is collapsed.
  """
  x_nc = normalise(x_nc).astype(np.float64)
  total = sum(
    np.sum(np.exp(2 * sharpness * (np.minimum(x_nc[start : start + BLOCK_ROWS] @ x_nc.T, 1) - 1)))
    for start in range(0, len(x_nc), BLOCK_ROWS)
  )
  own = np.sum(np.exp(2 * sharpness * (np.minimum(np.sum(x_nc**2, axis=1), 1) - 1)))
  return float(np.log((total - own) / (len(x_nc) * (len(x_nc) - 1))))
