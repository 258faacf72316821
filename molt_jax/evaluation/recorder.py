"""Each example's prediction, collected while a split is evaluated, and the worst mistakes."""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from molt_jax.data import decode_report, examples, transforms
from molt_jax.data.sources import Source
from molt_jax.evaluation import records
from molt_jax.methods.parts.interface import Output
from molt_jax.runtime import processes

MAX_PROBABILITIES = 8_000_000  # Kept of a split, 32 MB; examples beyond it are thinned out evenly.
NUM_MISTAKES = 6  # A condition.
THUMBNAIL = 112  # Pixels of the longer side.
MAX_TEXT = 280  # Characters.


class PredictionRecorder:
  """Collects each example's probabilities under the first conditions, then writes them."""

  def __init__(
    self,
    source: Source,
    class_names: Sequence[str],
    conditions: Sequence[str],
    *,
    multi_label: bool,
    thresholds: Sequence[float] = (),
  ):
    """Gets ready for the N examples of a split; those beyond MAX_PROBABILITIES are thinned out.

    Args:
      source: the split.
      class_names: K names.
      conditions: names in `modalities.CONDITIONS`; the first that the evaluation goes through.
      multi_label: how to read logits.
      thresholds: see `records.Predictions`.
    """
    self._thresholds = list(thresholds) if multi_label else []
    num_rows = max(1, min(len(source), MAX_PROBABILITIES // (len(conditions) * len(class_names))))
    self._rows = np.unique(np.linspace(0, len(source) - 1, num_rows).astype(int))
    self._slot = np.full(len(source), -1)
    self._slot[self._rows] = np.arange(len(self._rows))
    self._source, self._class_names = source, class_names
    self._conditions, self._multi_label = list(conditions), multi_label
    self._logits_cnk = np.zeros((len(conditions), len(self._rows), len(class_names)), np.float32)
    self._counted_cn = np.zeros((len(conditions), len(self._rows)), bool)

  @property
  def rows(self) -> np.ndarray:
    """int[n], the examples of the split that are collected."""
    return self._rows

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """See `Observer`."""
    count = len(self._conditions)
    index_b, weight_b, present_bm, keep_bcm, label = (
      processes.fetch(batch[name]) for name in ('index', 'weight', 'present', 'keep', 'label')
    )
    logits_cbk = processes.fetch(out_c.logits_bk[:count])
    slot_b = np.where(weight_b > 0, self._slot[index_b], -1)  # Padding has weight 0.
    kept_b, slot_b = slot_b >= 0, slot_b[slot_b >= 0]
    self._logits_cnk[:, slot_b] = logits_cbk[:, kept_b]
    labelled_b1 = np.all(label.reshape(len(label), -1) >= 0, axis=1, keepdims=True)
    counted_bc = (present_bm[:, None] & keep_bcm[:, :count]).any(axis=-1) & labelled_b1
    self._counted_cn[:, slot_b] = counted_bc[kept_b].T

  def predictions(
    self, *, split: str, step: int, config_hash: str, seed: int, data: str
  ) -> records.Predictions:
    """Returns what was collected; `data` is the digest of the data's fingerprint."""
    rows = self._rows.tolist()
    log = _log_probabilities(self._logits_cnk.astype(np.float64), self._multi_label)
    if self._multi_label:
      label = self._label_sets(rows)
    else:
      label = np.array([self._source.labels[row] for row in rows])
    return records.Predictions(
      split=split,
      step=step,
      config_hash=config_hash,
      seed=seed,
      data=data,
      of=len(self._source),
      conditions=self._conditions,
      class_names=list(self._class_names),
      ids=[self._source.ids[row] for row in rows],
      label=label,
      present_nm=np.asarray(self._source.present)[rows],
      counted_cn=self._counted_cn,
      probability_cnk=np.exp(log).astype(np.float32),
      loss_cn=self._loss(log, label).astype(np.float32),
      thresholds=self._thresholds,
    )

  def write(
    self, workdir: pathlib.Path, *, split: str, step: int, config_hash: str, seed: int, data: str
  ) -> records.Predictions:
    """Writes predictions.npz and mistakes.json; arguments are those of `predictions`.

    Returns:
      What is in the first.
    """
    rows = self._rows.tolist()
    facts = {'split': split, 'step': step, 'config_hash': config_hash, 'seed': seed, 'data': data}
    predictions = self.predictions(**facts)
    predictions.save(workdir / records.PREDICTIONS)
    worst = {name: predictions.worst(name, NUM_MISTAKES) for name in self._conditions}
    shown = sorted({n for of_condition in worst.values() for n in of_condition})
    shown_as = {str(n): exhibit(self._source, rows[n]) for n in shown}
    records.write_mistakes(
      workdir,
      {'split': split, 'step': step, 'data': data, 'conditions': worst, 'examples': shown_as},
    )
    return predictions

  def _label_sets(self, rows: Sequence[int]) -> np.ndarray:
    true_nk = np.zeros((len(rows), len(self._class_names)), bool)
    for n, row in enumerate(rows):
      true_nk[n, list(self._source.labels[row])] = True
    return true_nk

  def _loss(self, log: np.ndarray, label: np.ndarray) -> np.ndarray:
    if not self._multi_label:
      return -np.take_along_axis(log, label[None, :, None], axis=-1)[..., 0]
    log_not = _log_probabilities(-self._logits_cnk.astype(np.float64), multi_label=True)
    return -np.where(label[None], log, log_not).mean(axis=-1)


def _log_probabilities(logits_cnk: np.ndarray, multi_label: bool) -> np.ndarray:
  """Log of softmax or sigmoid."""
  if multi_label:
    return logits_cnk - np.logaddexp(0, logits_cnk)
  return logits_cnk - np.logaddexp.reduce(logits_cnk, axis=-1, keepdims=True)


def exhibit(source: Source, row: int) -> dict[str, str | None]:
  """Returns {'id', 'text', 'image'} of an example: a shortened text, a thumbnail as a data URL;
  None where absent. What cannot be read is left out, and was counted when it was scored.
  """
  report = decode_report.DecodeReport()
  example = examples.read_example(source, row, image=True, report=report)
  text = example['text']
  if text and len(text) > MAX_TEXT:
    text = text[:MAX_TEXT].rstrip() + ' ...'
  return {
    'id': example['id'],
    'text': text,
    'image': example['image'] and _thumbnail(example['image']),
  }


def _thumbnail(content: bytes) -> str | None:
  try:
    image = transforms.decode(content)
  except transforms.DecodeError:
    return None
  image.thumbnail((THUMBNAIL, THUMBNAIL))
  buffer = io.BytesIO()
  image.save(buffer, 'WEBP', quality=80)
  return 'data:image/webp;base64,' + base64.b64encode(buffer.getvalue()).decode()
