"""What an evaluation leaves beside its scores, and what follows from it without a model.

  DIR/predictions.npz   each example's probabilities under each absence (`Predictions`; of the split
                        and step that it names)
  DIR/mistakes.json     the worst mistakes under each absence, with thumbnails (of the same)
  DIR/pairs.npz         the pooled pairs (h_i, h_t) in the plane, their canonical correlations, the
                        learned M (`Pairs`; written by training)

Examples do not influence each other, so every missing rate follows from the three absences:
`missing_rate` gives `evaluate --missing_rate`'s numbers.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data import missing
from molt_jax.data.modalities import COLUMN, CONDITIONS, KEPT, condition
from molt_jax.evaluation import f1, thresholds
from molt_jax.evaluation.thresholds import HALF
from molt_jax.runtime import atomic, logbook
from molt_jax.runtime.npz import Saved, are_strings, is_array, wrong_values

PREDICTIONS, PAIRS, MISTAKES = 'predictions.npz', 'pairs.npz', 'mistakes.json'
MAX_LAYERS, MAX_DIRECTIONS, MAX_POINTS = 256, 4096, 10_000  # Of pairs.


@dataclasses.dataclass(frozen=True)
class Predictions(Saved):
  """Each example's prediction under each absence (C conditions, N examples, K classes).

  Attributes:
    split, step, config_hash, seed: what was evaluated; the seed of the missing-rate protocol.
    of: examples of the split; N is less where a large split was thinned out.
    conditions: C names of CONDITIONS.
    class_names: K names.
    ids: N names.
    label: int32[N]; multi-label: bool[N, K].
    present_nm: bool[N, 2], what the examples have by nature (image, text).
    counted_cn: bool[C, N], whether the condition leaves the example anything; the rest is undefined
      where not.
    probability_cnk: float32[C, N, K], softmax; multi-label: sigmoid.
    loss_cn: float32[C, N], cross-entropy; multi-label: mean over classes.
    data: digest of the fingerprint of the split's data; '' in files of older versions.
    thresholds: above which probability labels are given, for each row of PATTERNS; empty: one half.
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
  data: str = ''
  thresholds: Sequence[float] = ()

  def _faults(self) -> Iterator[str]:
    facts = {'split': str, 'config_hash': str, 'step': int, 'seed': int, 'of': int, 'data': str}
    yield from wrong_values(self, facts)
    for name in ('conditions', 'class_names', 'ids'):
      if not are_strings(getattr(self, name)):
        yield f'{name}: not a list of strings'
    if len(self.thresholds) not in (0, len(HALF)) or not all(
      isinstance(t, float) and 0 < t < 1 for t in self.thresholds
    ):
      yield f'thresholds: not {len(HALF)} numbers between 0 and 1'
    sizes = len(self.conditions), len(self.ids), len(self.class_names)
    if not all(sizes) or not set(self.conditions) <= set(CONDITIONS):
      yield f'{sizes} conditions, ids and classes'
    if len(set(self.conditions)) < sizes[0] or len(set(self.ids)) < sizes[1]:
      yield 'a condition or an id twice'
    yield from self._wrong_arrays(*sizes)

  def _wrong_arrays(self, c: int, n: int, k: int) -> Iterator[str]:
    shapes = {
      'present_nm': ('b', n, 2),
      'counted_cn': ('b', c, n),
      'probability_cnk': ('f', c, n, k),
      'loss_cn': ('f', c, n),
    }
    for name, (kinds, *shape) in shapes.items():
      if not is_array(getattr(self, name), kinds, *shape):
        yield f'{name}: not an array of {shape}'
    if is_array(self.label, 'iu', n):
      if not np.all((self.label >= -1) & (self.label < k)):
        yield f'label: not from -1 to {k - 1}'
      if np.any(self.counted_cn & (self.label < 0)):
        yield 'counted_cn: an example without a label counts'
    elif not is_array(self.label, 'b', n, k):
      yield f'label: neither int[{n}] nor bool[{n}, {k}]'
    p_mk, loss_m = self.probability_cnk[self.counted_cn], self.loss_cn[self.counted_cn]
    if not np.all((p_mk >= 0) & (p_mk <= 1)) or not np.all(np.isfinite(loss_m)):
      yield 'probability_cnk or loss_cn: no probability, or not finite'

  @property
  def multi_label(self) -> bool:
    return self.label.ndim == 2

  @property
  def read_nm(self) -> np.ndarray:
    """bool[N, 2], what of that could be read of labelled examples: an image that cannot be decoded
    leaves nothing to answer where it is alone.
    """
    read_nm = np.array(self.present_nm, bool)
    for alone, lost in (('image', 'text'), ('text', 'image')):
      if (name := condition(lost)) in self.conditions:
        read_nm[:, COLUMN[alone]] &= self.counted_cn[self.conditions.index(name)]
    return read_nm

  @property
  def right_cn(self) -> np.ndarray:
    """bool[C, N], whether the label, or the whole label set, is right."""
    predicted = self.predicted
    right = predicted == self.label[None]
    return right.all(axis=-1) if self.multi_label else right

  @property
  def predicted(self) -> np.ndarray:
    """int[C, N], the likeliest class; multi-label: bool[C, N, K], those above the threshold."""
    if not self.multi_label:
      return self.probability_cnk.argmax(axis=-1)
    kept_cm = np.array([KEPT[name.removesuffix('_absent')] for name in self.conditions], bool)
    left_cnm = self.read_nm[None] & kept_cm[:, None]
    threshold_cn = thresholds.of_examples(self.thresholds or HALF, left_cnm)
    return self.probability_cnk > threshold_cn[:, :, None]

  def scores(self, condition: str) -> dict[str, float]:
    """Returns num_examples, accuracy, f1_micro and f1_macro of one condition.

    As `ClassificationMetrics` defines them, and as far as the examples determine them.
    """
    c = self.conditions.index(condition)
    return self._scores(np.full(len(self.ids), c))

  def missing_rate(self, rate: float, kind: str) -> dict[str, float]:
    """Returns the scores when that share of the complete rows loses `kind`.

    Args:
      rate: eta, 0 to 1.
      kind: 'text', 'image' or 'both'; see `missing.present_table`.

    Raises:
      ValueError: a condition is not among `conditions`: a unimodal model has no second modality to
        lose.
    """
    drawn_nm = missing.present_table(
      self.ids, rate=rate, kind=kind, seed=self.seed, split=self.split, present=self.present_nm
    )
    lost_nm = self.present_nm & ~drawn_nm
    none, text, image = (self.conditions.index(name) for name in CONDITIONS)
    return self._scores(np.select([lost_nm[:, 1], lost_nm[:, 0]], [text, image], none))

  def _scores(self, condition_n: np.ndarray) -> dict[str, float]:
    rows = np.arange(len(self.ids))
    counted_n = self.counted_cn[condition_n, rows]
    scores = {'num_examples': int(counted_n.sum())}
    if not counted_n.any():
      return scores
    right_n = self.right_cn[condition_n, rows]
    predicted = self.predicted[condition_n, rows]
    true_nk = self._one_hot(self.label)[counted_n]
    counts = f1.counts(true_nk, self._one_hot(predicted)[counted_n])
    scores['accuracy'] = float(right_n[counted_n].mean())
    found = f1.scores(*counts, true_nk.sum(axis=0), multi_label=self.multi_label)
    return scores | {name: found[name] for name in ('f1_micro', 'f1_macro') if name in found}

  def influence(self, condition: str) -> np.ndarray | None:
    """Returns float[N] whose mean is 0 and whose standard error is that of the headline score.

    The score is the accuracy; multi-label: micro F1, a ratio of two means over examples, which this
    linearises. With one label an example it is whether it is right, minus the accuracy. Rows that
    do not count are zero. The difference of two runs on the same examples has the standard error of
    the difference of these. None where fewer than two examples count, or none has or is given a
    label: nothing varies there.
    """
    c = self.conditions.index(condition)
    true_nk, predicted_nk = self._one_hot(self.label), self._one_hot(self.predicted[c])
    counted_n = self.counted_cn[c]
    hits_n = np.where(counted_n, 2 * np.sum(true_nk & predicted_nk, axis=1), 0)
    all_n = np.where(counted_n, np.sum(true_nk, axis=1) + np.sum(predicted_nk, axis=1), 0)
    if counted_n.sum() < 2 or not all_n.any():
      return None
    score = hits_n.sum() / all_n.sum()
    return (hits_n - score * all_n) * (len(counted_n) / all_n.sum())

  def class_f1(self, condition: str) -> np.ndarray:
    """Returns float[K], NaN for a class that occurs neither among truths nor predictions."""
    c = self.conditions.index(condition)
    counted_n = self.counted_cn[c]
    true_nk, predicted_nk = self._one_hot(self.label), self._one_hot(self.predicted[c])
    f1_k, occurs_k = f1.class_f1(*f1.counts(true_nk[counted_n], predicted_nk[counted_n]))
    return np.where(occurs_k, f1_k, np.nan)

  def support(self, condition: str | None = None) -> np.ndarray:
    """Returns int[K], examples that truly carry each label; of a condition, those that count."""
    true_nk = self._one_hot(self.label)
    if condition is not None:
      true_nk = true_nk[self.counted_cn[self.conditions.index(condition)]]
    return true_nk.sum(axis=0)

  def confusion(self, condition: str) -> np.ndarray:
    """Returns int[K, K], true by predicted; single label only."""
    c = self.conditions.index(condition)
    counted_n = self.counted_cn[c]
    matrix_kk = np.zeros((len(self.class_names),) * 2, int)
    np.add.at(matrix_kk, (self.label[counted_n], self.predicted[c][counted_n]), 1)
    return matrix_kk

  def confusions(self, condition: str) -> list[tuple[int, int, int]]:
    """Returns (true, predicted, how often), the most frequent first; single label only."""
    c = self.conditions.index(condition)
    wrong_n = self.counted_cn[c] & ~self.right_cn[c]
    pairs_n2 = np.stack([self.label[wrong_n], self.predicted[c][wrong_n]], axis=1)
    found, count = np.unique(pairs_n2, axis=0, return_counts=True)
    order = np.argsort(-count, kind='stable')
    return [(*map(int, found[i]), int(count[i])) for i in order]

  def calibration(self, condition: str, *, bins: int = 10) -> dict[str, Any]:
    """Returns reliability over equal bins and the expected calibration error.

    After Naeini et al. 2015 and Guo et al. 2017.

    Single label: the likeliest class, its probability and whether it is right. Multi-label: every
    class of every example, its probability and whether the example carries it.

    Returns:
      {'confidence': mean of each bin that holds something, 'accuracy': .., 'count': .., 'ece': ..};
      without an example no 'ece'.
    """
    c = self.conditions.index(condition)
    probability_nk, counted_n = self.probability_cnk[c], self.counted_cn[c]
    confidence, right = probability_nk, self.label
    if not self.multi_label:
      confidence, right = probability_nk.max(axis=-1), self.right_cn[c]
    confidence = confidence[counted_n].ravel().astype(float)
    right = right[counted_n].ravel().astype(float)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    held = count > 0
    means = {
      name: np.bincount(bin_of, x, bins)[held] / count[held]
      for name, x in (('confidence', confidence), ('accuracy', right))
    }
    found = {**means, 'count': count[held]}
    if held.any():
      distance = np.abs(means['confidence'] - means['accuracy'])
      found['ece'] = float(np.sum(count[held] * distance) / count.sum())
    return found

  def worst(self, condition: str, count: int) -> list[int]:
    """Returns the rows of the mistakes with the greatest cross-entropy, greatest first."""
    c = self.conditions.index(condition)
    wrong = np.flatnonzero(self.counted_cn[c] & ~self.right_cn[c])
    return wrong[np.argsort(-self.loss_cn[c, wrong], kind='stable')][:count].tolist()

  def _one_hot(self, label: np.ndarray) -> np.ndarray:
    if self.multi_label:
      return label
    return label[:, None] == np.arange(len(self.class_names))[None, :]


@dataclasses.dataclass(frozen=True)
class Pairs(Saved):
  """The pooled pairs (h_i, h_t) of a trained head (L layers, n pairs of the split, k directions).

  Attributes:
    split, step: of the pairs shown.
    num_fitted: training pairs that the directions were fitted on.
    num_batch: pairs of one training batch.
    plane_lnmp: float32[L, n, 2, 2], image and text vector, brought to unit length, on the two
      leading principal axes of both together.
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

  def _faults(self) -> Iterator[str]:
    yield from wrong_values(self, {'split': str, 'step': int, 'num_fitted': int, 'num_batch': int})
    layers, points, directions = *self.plane_lnmp.shape[:2], self.held_out_lk.shape[-1]
    within = layers <= MAX_LAYERS and points <= MAX_POINTS and directions <= MAX_DIRECTIONS
    if not (within and layers and points and directions):
      yield f'{layers} layers, {points} pairs, {directions} directions'
    # Of the last three, what is not there is NaN.
    shapes = {
      'plane_lnmp': (layers, points, 2, 2),
      'share_l': (layers,),
      'gap_l': (layers,),
      'layer_weights_l': (layers,),
      'batch_lk': (layers, directions),
      'fitted_lk': (layers, directions),
      'held_out_lk': (layers, directions),
    }
    for name, shape in shapes.items():
      value = getattr(self, name)
      if not is_array(value, 'f', *shape):
        yield f'{name}: not an array of {shape}'
      value = np.nan_to_num(value, nan=0.0) if name.endswith('_lk') else value
      if not np.all(np.abs(value) < 1e6):
        yield f'{name}: not finite, or huge'


def write_mistakes(workdir: pathlib.Path, mistakes: Mapping[str, Any]) -> None:
  """Writes mistakes.json.

  {'split', 'step', 'conditions': condition -> rows, worst first, 'examples': row -> {'id', 'text',
  'image'}}
  """
  text = logbook.to_json(mistakes)  # In ASCII: a lone half of a surrogate pair has no UTF-8.
  atomic.write(workdir / MISTAKES, text + '\n')
