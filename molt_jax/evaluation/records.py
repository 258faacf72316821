"""What an evaluation leaves beside its scores, and what follows from it without a model:
predictions, pooled pairs, pictures of mistakes.

DIR/predictions.npz  each example's probabilities under each absence        (`Predictions`; of the
split and step that it names) DIR/mistakes.json    the worst mistakes under each absence, with
thumbnails (of the same) DIR/pairs.npz        the pooled pairs (h_i, h_t) in the plane, their
canonical correlations, the learned M (`Pairs`; written by training)

Rows do not influence each other, so every missing rate follows from the three absences:
`missing_rate` gives `evaluate --missing_rate`'s numbers.
"""

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from molt_jax.data import missing
from molt_jax.data.modalities import CONDITIONS
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, logbook, terminal

PREDICTIONS, PAIRS, MISTAKES = 'predictions.npz', 'pairs.npz', 'mistakes.json'
MAX_BYTES = 1 << 30  # Of such a file unpacked; the recorder writes at most a tenth.
MAX_LAYERS, MAX_DIRECTIONS, MAX_POINTS = 256, 4096, 10_000  # Of pairs.


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads an npz file; raises exceptions of many types where it is cut or damaged."""
  with zipfile.ZipFile(path) as archive:
    size = sum(member.file_size for member in archive.infolist())
    if size > MAX_BYTES:
      raise ValueError(f'it holds {size:,} bytes, more than {MAX_BYTES:,}')
    # Read whole, so that zipfile compares each with its CRC-32 before NumPy believes a header.
    raw = {name.removesuffix('.npy'): archive.read(name) for name in archive.namelist()}
  return {name: np.load(io.BytesIO(content)) for name, content in raw.items()}


class _Saved:
  """A dataclass of arrays and JSON values in one npz file."""

  def _faults(self) -> Iterator[str]:
    """Yields the fields that are not as they are described."""
    raise NotImplementedError

  def save(self, path: pathlib.Path) -> None:
    """Writes the file, whole or not at all."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in values.items() if name not in arrays}
    coded = np.frombuffer(logbook.to_json(rest).encode(), np.uint8)
    with atomic.writing(path) as file:
      np.savez_compressed(file, json=coded, **arrays)

  @classmethod
  def load(cls, path: pathlib.Path) -> Self | None:
    """Reads the file; None where there is none.

    Raises:
      UserError: the file is damaged, or of something else.
    """
    if not path.exists():
      return None
    try:
      found = cls(**_unpacked(path))
      fault = next(found._faults(), None)
    except Exception as error:  # NumPy, zipfile and zlib raise nearly anything of a damaged file.
      fault = f'{type(error).__name__}: {error}'
    if fault:
      raise UserError(
        f'{str(path)!r} is damaged ({terminal.clean(fault, 200)}); delete it, and what it shows '
        'is left out until an evaluation (pairs: training) writes it anew'
      )
    return found


def _unpacked(path: pathlib.Path) -> dict[str, Any]:
  arrays = read_arrays(path)
  return json.loads(arrays.pop('json').tobytes()) | arrays


def _is_array(value: Any, kinds: str, *shape: int) -> bool:
  """Whether it is an array of that shape whose type is one of `kinds`, as in `dtype.kind`."""
  return isinstance(value, np.ndarray) and value.dtype.kind in kinds and value.shape == shape


def _are_strings(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _wrong_facts(record: Any, kinds: Mapping[str, type]) -> Iterator[str]:
  """Yields the fields that are not of these types; a count is an int >= 0 that JSON holds."""
  for name, kind in kinds.items():
    value = getattr(record, name)
    if type(value) is not kind or (kind is int and not 0 <= value < 1 << 53):
      yield f'{name}: {value!r}'


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
    counted_cn: bool[C, N], whether the condition leaves the example anything; the rest is undefined
      where not.
    probability_cnk: float32[C, N, K], softmax; multi-label: sigmoid.
    loss_cn: float32[C, N], cross-entropy; multi-label: mean over classes.
    data: digest of the fingerprint of the split's data; '' in files of older versions.
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

  def _faults(self) -> Iterator[str]:
    facts = {'split': str, 'config_hash': str, 'step': int, 'seed': int, 'of': int, 'data': str}
    yield from _wrong_facts(self, facts)
    for name in ('conditions', 'class_names', 'ids'):
      if not _are_strings(getattr(self, name)):
        yield f'{name}: not a list of strings'
    sizes = len(self.conditions), len(self.ids), len(self.class_names)
    if not all(sizes) or not set(self.conditions) <= set(CONDITIONS):
      yield f'{sizes} conditions, ids and classes'
    if len(set(self.conditions)) < sizes[0] or len(set(self.ids)) < sizes[1]:
      yield 'a condition or an id twice'
    yield from self._wrong_arrays(*sizes)

  def _wrong_arrays(self, c, n, k) -> Iterator[str]:
    shapes = {
      'present_nm': ('b', n, 2),
      'counted_cn': ('b', c, n),
      'probability_cnk': ('f', c, n, k),
      'loss_cn': ('f', c, n),
    }
    for name, (kinds, *shape) in shapes.items():
      if not _is_array(getattr(self, name), kinds, *shape):
        yield f'{name}: not an array of {shape}'
    if _is_array(self.label, 'iu', n):
      if not np.all((self.label >= -1) & (self.label < k)):
        yield f'label: not from -1 to {k - 1}'
      if np.any(self.counted_cn & (self.label < 0)):
        yield 'counted_cn: an example without a label counts'
    elif not _is_array(self.label, 'b', n, k):
      yield f'label: neither int[{n}] nor bool[{n}, {k}]'
    p_mk, loss_m = self.probability_cnk[self.counted_cn], self.loss_cn[self.counted_cn]
    if not np.all((p_mk >= 0) & (p_mk <= 1)) or not np.all(np.isfinite(loss_m)):
      yield 'probability_cnk or loss_cn: no probability, or not finite'

  @property
  def multi_label(self) -> bool:
    return self.label.ndim == 2

  @property
  def right_cn(self) -> np.ndarray:
    """bool[C, N], whether the label, or the whole label set, is right."""
    predicted = self.predicted
    return (
      (predicted == self.label[None]).all(axis=-1)
      if self.multi_label
      else predicted == self.label[None]
    )

  @property
  def predicted(self) -> np.ndarray:
    """int[C, N], the likeliest class; multi-label: bool[C, N, K], those above one half."""
    return self.probability_cnk > 0.5 if self.multi_label else self.probability_cnk.argmax(axis=-1)

  def scores(self, condition: str) -> dict[str, float]:
    """Returns num_examples of one condition and, as far as they determine them, accuracy, f1_micro
    and f1_macro, as `ClassificationMetrics` defines them.
    """
    c = self.conditions.index(condition)
    return self._scores(np.full(len(self.ids), c))

  def missing_rate(self, rate: float, kind: str) -> dict[str, float]:
    """Returns the scores when that share of the complete rows loses `kind` ('text', 'image', or
    half of them each: 'both').

    Args:
      rate: eta, 0 to 1.
      kind: 'text', 'image' or 'both'; see `missing.present_table`.

    Raises:
      ValueError: a condition is not among `conditions`: a specialist has no second modality to
        lose.
    """
    drawn_nm = missing.present_table(
      self.ids, rate=rate, kind=kind, seed=self.seed, split=self.split, natural=self.present_nm
    )
    lost_nm = self.present_nm & ~drawn_nm
    none, text, image = (self.conditions.index(name) for name in CONDITIONS)
    return self._scores(np.select([lost_nm[:, 1], lost_nm[:, 0]], [text, image], none))

  def _scores(self, condition_n):
    rows = np.arange(len(self.ids))
    counted_n = self.counted_cn[condition_n, rows]
    scores = {'num_examples': int(counted_n.sum())}
    if not counted_n.any():
      return scores
    right_n = self.right_cn[condition_n, rows]
    predicted = self.predicted[condition_n, rows]
    hits_k, all_k = _hits(self._one_hot(self.label)[counted_n], self._one_hot(predicted)[counted_n])
    scores['accuracy'] = float(right_n[counted_n].mean())
    if all_k.any():  # Else no example carries or is given any label.
      f1_k = hits_k / np.maximum(all_k, 1)
      averaged_k = np.ones(len(f1_k), bool) if self.multi_label else all_k > 0
      scores['f1_micro'] = float(hits_k.sum() / all_k.sum())
      scores['f1_macro'] = float(f1_k[averaged_k].mean())
    return scores

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
    one_hot = (self._one_hot(self.label)[counted_n], self._one_hot(self.predicted[c])[counted_n])
    hits_k, all_k = _hits(*one_hot)
    return np.where(all_k > 0, hits_k / np.maximum(all_k, 1), np.nan)

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
    """Returns reliability over equal bins and the expected calibration error (Naeini et al. 2015;
    Guo et al. 2017).

    Single label: the likeliest class, its probability and whether it is right. Multi-label: every
    class of every example, its probability and whether the example carries it.

    Returns:
      {'confidence': mean of each bin that holds something, 'accuracy': .., 'count': .., 'ece': ..};
      without an example no 'ece'.
    """
    c = self.conditions.index(condition)
    probability_nk, counted_n = self.probability_cnk[c], self.counted_cn[c]
    confidence, right = (
      (probability_nk, self.label)
      if self.multi_label
      else (probability_nk.max(axis=-1), self.right_cn[c])
    )
    confidence, right = (
      confidence[counted_n].ravel().astype(float),
      right[counted_n].ravel().astype(float),
    )
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

  def _one_hot(self, label):
    return (
      label if self.multi_label else label[:, None] == np.arange(len(self.class_names))[None, :]
    )


def _hits(true_nk, predicted_nk):
  """([K] twice the hits of each class, [K] its truths and predictions): F1 is their quotient."""
  hits_k = 2 * np.sum(true_nk & predicted_nk, axis=0)
  return hits_k, hits_k + np.sum(true_nk ^ predicted_nk, axis=0)


@dataclasses.dataclass(frozen=True)
class Pairs(_Saved):
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
    yield from _wrong_facts(self, {'split': str, 'step': int, 'num_fitted': int, 'num_batch': int})
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
      if not _is_array(value, 'f', *shape):
        yield f'{name}: not an array of {shape}'
      value = np.nan_to_num(value, nan=0.0) if name.endswith('_lk') else value
      if not np.all(np.abs(value) < 1e6):
        yield f'{name}: not finite, or huge'


def write_mistakes(workdir: pathlib.Path, mistakes: Mapping[str, Any]) -> None:
  """Writes mistakes.json: {'split', 'step', 'conditions': condition -> rows, worst first,
  'examples': row -> {'id', 'text', 'image'}}.
  """
  text = logbook.to_json(mistakes)  # In ASCII: a lone half of a surrogate pair has no UTF-8.
  atomic.write(workdir / MISTAKES, text + '\n')
