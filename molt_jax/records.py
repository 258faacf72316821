"""What an evaluation leaves beside its scores, and what follows from it without a model: predictions, pooled pairs, pictures of mistakes.

DIR/predictions.npz  each example's probabilities under each absence        (`Predictions`; of the split and step that it names)
DIR/mistakes.json    the worst mistakes under each absence, with thumbnails (of the same)
DIR/pairs.npz        the pooled pairs (h_i, h_t) in the plane, their canonical correlations, the learned M (`Pairs`; written by training)

Rows do not influence each other, so every missing rate follows from the three absences: `missing_rate` gives `evaluate --missing_rate`'s numbers.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from molt_jax import atomic
from molt_jax.data import missing

PREDICTIONS, PAIRS, MISTAKES = 'predictions.npz', 'pairs.npz', 'mistakes.json'
CONDITIONS = ('none_absent', 'text_absent', 'image_absent')


class _Saved:
  """A dataclass of arrays and JSON values in one npz file."""

  def save(self, path: pathlib.Path) -> None:
    """Writes the file, whole or not at all."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in values.items() if name not in arrays}
    coded = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    with atomic.writing(path) as file:
      np.savez_compressed(file, json=coded, **arrays)

  @classmethod
  def load(cls, path: pathlib.Path) -> Self | None:
    """Reads the file; None where there is none."""
    if not path.exists():
      return None
    with np.load(path) as saved:
      values = {name: saved[name] for name in saved.files if name != 'json'}
      return cls(**json.loads(saved['json'].tobytes()), **values)


@dataclasses.dataclass(frozen=True)
class Predictions(_Saved):
  """Each example's prediction under each absence (C conditions, N examples, K classes).

  Attributes:
    split, step, config_hash, seed: what was evaluated; the seed of the missing-rate protocol.
    of: examples of the split; N is less where a large split was thinned out.
    conditions: C names of CONDITIONS.
    class_names: K names.
    ids: N names.
    label: int32[N]; multi-label: bool[N, K].
    present_nm: bool[N, 2], what the examples have by nature (image, text).
    counted_cn: bool[C, N], whether the condition leaves the example anything; the rest is undefined where not.
    probability_cnk: float32[C, N, K], softmax; multi-label: sigmoid.
    loss_cn: float32[C, N], cross-entropy; multi-label: mean over classes.
  """

  split: str
  step: int
  config_hash: str
  seed: int
  of: int
  conditions: Sequence[str]
  class_names: Sequence[str]
  ids: Sequence[str]
  label: np.ndarray
  present_nm: np.ndarray
  counted_cn: np.ndarray
  probability_cnk: np.ndarray
  loss_cn: np.ndarray

  @property
  def multi_label(self) -> bool:
    return self.label.ndim == 2

  @property
  def right_cn(self) -> np.ndarray:
    """bool[C, N], whether the label, or the whole label set, is right."""
    predicted = self.predicted
    return (predicted == self.label[None]).all(axis=-1) if self.multi_label else predicted == self.label[None]

  @property
  def predicted(self) -> np.ndarray:
    """int[C, N], the likeliest class; multi-label: bool[C, N, K], those above one half."""
    return self.probability_cnk > 0.5 if self.multi_label else self.probability_cnk.argmax(axis=-1)

  def scores(self, condition: str) -> dict[str, float]:
    """Returns accuracy, f1_micro, f1_macro and num_examples of one condition, as `ClassificationMetrics` defines them."""
    c = self.conditions.index(condition)
    return self._scores(np.full(len(self.ids), c))

  def missing_rate(self, rate: float, kind: str) -> dict[str, float]:
    """Returns the scores when that share of the complete rows loses `kind` ('text', 'image', or half of them each: 'both').

    Args:
      rate: eta, 0 to 1.
      kind: 'text', 'image' or 'both'; see `missing.present_table`.

    Raises:
      ValueError: a condition is not among `conditions`: a specialist has no second modality to lose.
    """
    drawn_nm = missing.present_table(self.ids, rate=rate, kind=kind, seed=self.seed, split=self.split, natural=self.present_nm)
    lost_nm = self.present_nm & ~drawn_nm
    none, text, image = (self.conditions.index(name) for name in CONDITIONS)
    return self._scores(np.select([lost_nm[:, 1], lost_nm[:, 0]], [text, image], none))

  def _scores(self, condition_n):
    rows = np.arange(len(self.ids))
    counted_n = self.counted_cn[condition_n, rows]
    true_nk, predicted_nk = self._one_hot(self.label)[counted_n], self._one_hot(self.predicted[condition_n, rows])[counted_n]
    f1_k, seen_k = _f1(true_nk, predicted_nk)
    hits, wrong = 2 * np.sum(true_nk & predicted_nk), np.sum(true_nk ^ predicted_nk)
    averaged_k = np.ones_like(seen_k) if self.multi_label else seen_k
    return {
        'accuracy': float(np.mean(self.right_cn[condition_n, rows][counted_n])) if counted_n.any() else 0.0,
        'f1_micro': float(hits / max(hits + wrong, 1)), 'f1_macro': float(f1_k[averaged_k].mean()) if averaged_k.any() else 0.0,
        'num_examples': int(counted_n.sum())}

  def influence(self, condition: str) -> np.ndarray:
    """Returns float[N] whose mean is 0 and whose standard error is that of the headline score (accuracy; multi-label: micro F1).

    Micro F1 is a ratio of two means over examples, which this linearises; with one label an example it is whether it is right, minus the accuracy.
    Rows that do not count are zero. The difference of two runs on the same examples has the standard error of the difference of these.
    """
    c = self.conditions.index(condition)
    true_nk, predicted_nk = self._one_hot(self.label), self._one_hot(self.predicted[c])
    counted_n = self.counted_cn[c]
    hits_n, all_n = (np.where(counted_n, x_n, 0) for x_n in (
        2 * np.sum(true_nk & predicted_nk, axis=1), np.sum(true_nk, axis=1) + np.sum(predicted_nk, axis=1)))
    score = hits_n.sum() / max(all_n.sum(), 1)
    return (hits_n - score * all_n) * (len(counted_n) / max(all_n.sum(), 1))

  def class_f1(self, condition: str) -> np.ndarray:
    """Returns float[K]."""
    c = self.conditions.index(condition)
    counted_n = self.counted_cn[c]
    return _f1(self._one_hot(self.label)[counted_n], self._one_hot(self.predicted[c])[counted_n])[0]

  def support(self) -> np.ndarray:
    """Returns int[K], examples that truly carry each label."""
    return self._one_hot(self.label).sum(axis=0)

  def confusion(self, condition: str) -> np.ndarray:
    """Returns int[K, K], true by predicted; single label only."""
    c = self.conditions.index(condition)
    counted_n = self.counted_cn[c]
    matrix_kk = np.zeros((len(self.class_names),) * 2, int)
    np.add.at(matrix_kk, (self.label[counted_n], self.predicted[c][counted_n]), 1)
    return matrix_kk

  def calibration(self, condition: str, *, bins: int = 10) -> dict[str, Any]:
    """Returns reliability over equal bins and the expected calibration error (Naeini et al. 2015; Guo et al. 2017).

    Single label: the likeliest class, its probability and whether it is right. Multi-label: every class of every example, its probability and
    whether the example carries it.

    Returns:
      {'confidence': mean of each bin that holds something, 'accuracy': .., 'count': .., 'ece': number}
    """
    c = self.conditions.index(condition)
    probability_nk, counted_n = self.probability_cnk[c], self.counted_cn[c]
    confidence, right = (probability_nk, self.label) if self.multi_label else (probability_nk.max(axis=-1), self.right_cn[c])
    confidence, right = confidence[counted_n].ravel().astype(float), right[counted_n].ravel().astype(float)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    held = count > 0
    means = {name: np.bincount(bin_of, x, bins)[held] / count[held] for name, x in (('confidence', confidence), ('accuracy', right))}
    error = float(np.sum(count[held] * np.abs(means['confidence'] - means['accuracy'])) / max(count.sum(), 1))
    return {**means, 'count': count[held], 'ece': error}

  def worst(self, condition: str, count: int) -> list[int]:
    """Returns the rows of the mistakes with the greatest cross-entropy, greatest first."""
    c = self.conditions.index(condition)
    wrong = np.flatnonzero(self.counted_cn[c] & ~self.right_cn[c])
    return wrong[np.argsort(-self.loss_cn[c, wrong], kind='stable')][:count].tolist()

  def _one_hot(self, label):
    return label if self.multi_label else label[:, None] == np.arange(len(self.class_names))[None, :]


def _f1(true_nk, predicted_nk):
  """(F1 [K], zero where a class occurs nowhere; whether it occurs among truths or predictions [K])."""
  hits_k, wrong_k = 2 * np.sum(true_nk & predicted_nk, axis=0), np.sum(true_nk ^ predicted_nk, axis=0)
  return hits_k / np.maximum(hits_k + wrong_k, 1), hits_k + wrong_k > 0


@dataclasses.dataclass(frozen=True)
class Pairs(_Saved):
  """The pooled pairs (h_i, h_t) of a trained head (L layers, n pairs of the split, k directions).

  Attributes:
    split, step: of the pairs shown.
    num_fitted: training pairs that the directions were fitted on.
    num_batch: pairs of one training batch.
    plane_lnmp: float32[L, n, 2, 2], image and text vector, brought to unit length, on the two leading principal axes of both together.
    share_l: [L], share of the variance that these axes show.
    gap_l: [L], distance of the centroids of the unit vectors (all pairs seen, not the n alone).
    batch_lk: [L, k], leading canonical correlations of one training batch, over all directions.
    fitted_lk: [L, k], of the training pairs, over the k leading principal axes of each view.
    held_out_lk: [L, k], the same directions on the pairs of the split.
    layer_weights_l: [L], the learned M; ones where it is not learned.
  """

  split: str
  step: int
  num_fitted: int
  num_batch: int
  plane_lnmp: np.ndarray
  share_l: np.ndarray
  gap_l: np.ndarray
  batch_lk: np.ndarray
  fitted_lk: np.ndarray
  held_out_lk: np.ndarray
  layer_weights_l: np.ndarray


def write_mistakes(workdir: pathlib.Path, mistakes: Mapping[str, Any]) -> None:
  """Writes mistakes.json: {'split', 'step', 'conditions': condition -> rows, worst first, 'examples': row -> {'id', 'text', 'image'}}."""
  atomic.write(workdir / MISTAKES, json.dumps(mistakes, ensure_ascii=False) + '\n')
