"""What is collected while a split is evaluated, beside its scores: the pooled pairs (h_i, h_t), and
each example's prediction.
"""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from molt_jax.data import decode_report, examples, transforms
from molt_jax.data.sources import Source
from molt_jax.evaluation import records
from molt_jax.methods.parts.interface import HeadOutput
from molt_jax.objectives.cca import diagnostics, loss
from molt_jax.objectives.cca.estimators import CCAEstimator
from molt_jax.runtime import processes

MAX_PAIRS = 1024  # Pairs looked at; enough for two digits, and megabytes at the widest.
MIN_PAIRS = 3  # Of two, any correlation is 1 or -1.
HELD_OUT = ('held_out_correlation', 'held_out_top_correlation')
MAX_PLANE = 150  # Pairs drawn in the plane.
NUM_SHOWN = 16  # Canonical correlations a layer.
MAX_PROBABILITIES = 8_000_000  # Kept of a split, 32 MB; examples beyond it are thinned out evenly.
NUM_MISTAKES = 6  # A condition.
THUMBNAIL = 112  # Pixels of the longer side.
MAX_TEXT = 280  # Characters.


class Observer(Protocol):
  """Looks at each batch of an evaluation; all processes call it together."""

  def observe(self, batch: Mapping[str, jax.Array], out_c: HeadOutput) -> None:
    """Takes a batch as `evaluate.eval_step` does, and the head's output with a leading axis of
    conditions.
    """


class PairDiagnostics:
  """Collects the pooled pairs of the rows that are complete in the first condition, then measures
  them.
  """

  def __init__(self):
    self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

  def observe(self, batch: Mapping[str, jax.Array], out_c: HeadOutput) -> None:
    """See `Observer`; ignored where the method pools no pairs, or once there are MAX_PAIRS."""
    if (
      out_c.pooled_image_lbc is not None
      and sum(x_lnc.shape[1] for x_lnc, _ in self._pairs) < MAX_PAIRS
    ):
      complete_b = processes.fetch(
        (batch['weight'] > 0) & jnp.all(batch['present'] & batch['keep'][:, 0], axis=-1)
      )
      image_lbc, text_lbc = (
        processes.fetch(x_clbc[0])[:, complete_b]
        for x_clbc in (out_c.pooled_image_lbc, out_c.pooled_text_lbc)
      )
      self._pairs.append((image_lbc, text_lbc))

  @property
  def pairs(self) -> tuple[np.ndarray, np.ndarray] | None:
    """(h_i, h_t) of all rows seen, float32[L, n, C] each; None where there is none."""
    if not any(x_lnc.shape[1] for x_lnc, _ in self._pairs):
      return None
    return tuple(np.concatenate(views, axis=1) for views in zip(*self._pairs, strict=True))

  def compute(self, estimator: CCAEstimator, state: Any, *, ridge: float) -> dict[str, list[float]]:
    """Returns name -> one number a layer, null for a layer that has none; {} without pairs.

    modality_gap and, of MIN_PAIRS or more, effective_rank_image and effective_rank_text: of the
    pairs seen. With an estimator that has a past of more pairs than directions also correlation and
    top_correlation (mean and largest canonical correlation of the training pairs it stands for),
    and, of MIN_PAIRS or more that are not all alike, held_out_correlation and
    held_out_top_correlation: those of the pairs seen here, along the directions fitted there.

    Args:
      estimator: of the canonical correlations.
      state: its state after training so far.
      ridge: `config.cca.ridge`.
    """
    if self.pairs is None:
      return {}
    values = jax.device_get(_of_pairs(*self.pairs))
    enough = self.pairs[0].shape[1] >= MIN_PAIRS
    past = estimator.past(state := jax.device_get(state))
    # Centred, n pairs have n - 1 correlations; the rest of k would be none.
    if past and float(np.sum(past[2])) > past[0].shape[2]:
      projections = state['projection_x_ldk'], state['projection_y_ldk']
      found = jax.device_get(_against_past(past, projections, self.pairs, ridge))
      rank_l = np.minimum(values['effective_rank_image'], values['effective_rank_text'])
      for name in HELD_OUT:  # Along no direction does a view of one point vary.
        found[name] = np.where(rank_l > 0, found[name], np.nan)
      values |= {name: x_l for name, x_l in found.items() if enough or name not in HELD_OUT}
    shown = {name: x_l for name, x_l in values.items() if enough or 'rank' not in name}
    return {name: [_or_none(x) for x in value_l] for name, value_l in shown.items()}

  def picture(
    self,
    training: 'PairDiagnostics',
    *,
    batch_size: int,
    ridge: float,
    layer_weights_l: np.ndarray | None,
    split: str,
    step: int,
  ) -> records.Pairs | None:
    """Returns what a report shows of the pairs; None where there are too few, here or in training.

    Args:
      training: pairs of the training split, encoded by the same head.
      batch_size: pairs of one training batch.
      ridge: `config.cca.ridge`.
      layer_weights_l: the learned M; None: not learned.
      split, step: what the pairs here are of.
    """
    both = self.pairs, training.pairs
    if any(pairs is None or pairs[0].shape[1] < MIN_PAIRS for pairs in both):
      return None
    (x_lnc, y_lnc), (x_lmc, y_lmc) = self.pairs, training.pairs
    count = min(NUM_SHOWN, x_lnc.shape[2], x_lmc.shape[1] - 1)
    spectra = zip(
      *(
        _spectra(*layer, ridge, count=count, batch=min(batch_size, x_lmc.shape[1]))
        for layer in zip(x_lnc, y_lnc, x_lmc, y_lmc, strict=True)
      ),
      strict=True,
    )
    batch_lk, fitted_lk, held_out_lk = (np.stack(x_k) for x_k in spectra)
    planes, shares = zip(
      *(_plane(x_nc, y_nc) for x_nc, y_nc in zip(x_lnc, y_lnc, strict=True)), strict=True
    )
    return records.Pairs(
      split=split,
      step=step,
      num_fitted=x_lmc.shape[1],
      num_batch=min(batch_size, x_lmc.shape[1]),
      plane_lnmp=np.stack(planes).astype(np.float32),
      share_l=np.array(shares),
      gap_l=np.asarray(_of_pairs(x_lnc, y_lnc)['modality_gap']),
      batch_lk=batch_lk,
      fitted_lk=fitted_lk,
      held_out_lk=held_out_lk,
      layer_weights_l=np.ones(len(x_lnc))
      if layer_weights_l is None
      else np.asarray(layer_weights_l),
    )


def _or_none(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


@jax.jit
def _of_pairs(x_lnc, y_lnc) -> dict[str, Any]:
  return lax.map(
    lambda pair: {
      'effective_rank_image': diagnostics.effective_rank(pair[0]),
      'effective_rank_text': diagnostics.effective_rank(pair[1]),
      'modality_gap': diagnostics.modality_gap(*pair),
    },
    (x_lnc, y_lnc),
  )


@jax.jit
def _against_past(past, projections, pairs, ridge) -> dict[str, Any]:
  x_lpk, y_lpk, weight_p = past

  def one_layer(layer):
    x_pk, y_pk, projection_x_dk, projection_y_dk, x_nc, y_nc = layer
    directions = diagnostics.fit_directions(x_pk, y_pk, weight_n=weight_p, ridge=ridge)
    held_out_k = diagnostics.held_out_correlations(
      directions, x_nc @ projection_x_dk, y_nc @ projection_y_dk
    )
    spectrum_k = loss.canonical_correlations(x_pk, y_pk, weight_n=weight_p, ridge=ridge)
    return {
      'correlation': spectrum_k.mean(),
      'top_correlation': spectrum_k.max(),
      'held_out_correlation': held_out_k.mean(),
      'held_out_top_correlation': held_out_k.max(),
    }

  return lax.map(one_layer, (x_lpk, y_lpk, *projections, *pairs))


def _spectra(x_nc, y_nc, x_mc, y_mc, ridge, *, count, batch):
  """One layer's (batch [k], fitted [k], held out [k]); m are training pairs, n those that are
  measured.
  """
  batch_k = np.asarray(loss.canonical_correlations(x_mc[:batch], y_mc[:batch], ridge=ridge))[
    : min(count, batch - 1)
  ]
  axes_x_ck, axes_y_ck = (_principal_axes(view_mc, count) for view_mc in (x_mc, y_mc))
  fitted = x_mc @ axes_x_ck, y_mc @ axes_y_ck
  held_out_k = diagnostics.held_out_correlations(
    diagnostics.fit_directions(*fitted, ridge=ridge), x_nc @ axes_x_ck, y_nc @ axes_y_ck
  )
  pad = count - len(batch_k)  # Centred, n pairs have n - 1 correlations.
  return (
    np.pad(batch_k, (0, pad), constant_values=np.nan),
    np.asarray(loss.canonical_correlations(*fitted, ridge=ridge)),
    np.asarray(held_out_k),
  )


def _principal_axes(view_nc, count):
  """Leading principal axes as columns, [C, count]."""
  return np.linalg.svd(view_nc - view_nc.mean(axis=0, keepdims=True), full_matrices=False)[2][
    :count
  ].T


def _plane(x_nc, y_nc):
  """(MAX_PLANE pairs of unit vectors on the two leading principal axes of both views together [n,
  2, 2], share of the variance shown).
  """
  both_nmc = np.stack([x_nc, y_nc], axis=1)
  both_nmc = both_nmc / np.maximum(
    np.linalg.norm(both_nmc, axis=-1, keepdims=True), np.finfo(np.float32).tiny
  )
  centred_jc = both_nmc.reshape(-1, both_nmc.shape[-1])
  centred_jc = centred_jc - centred_jc.mean(axis=0, keepdims=True)
  _, s_k, axes_kc = np.linalg.svd(centred_jc, full_matrices=False)
  shown = np.unique(np.linspace(0, len(x_nc) - 1, MAX_PLANE).astype(int))
  plane_nmp = (centred_jc @ axes_kc[:2].T).reshape(len(x_nc), 2, 2)[shown]
  return plane_nmp, float(np.sum(s_k[:2] ** 2) / max(np.sum(s_k**2), np.finfo(np.float32).tiny))


class PredictionRecorder:
  """Collects each example's probabilities under the first conditions of an evaluation, then writes
  them.
  """

  def __init__(
    self,
    source: Source,
    class_names: Sequence[str],
    conditions: Sequence[str],
    *,
    multi_label: bool,
  ):
    """Gets ready for the N examples of a split; those beyond MAX_PROBABILITIES are thinned out.

    Args:
      source: the split.
      class_names: K names.
      conditions: names in `modalities.CONDITIONS`; the first that the evaluation goes through.
      multi_label: how to read logits.
    """
    num_rows = max(1, min(len(source), MAX_PROBABILITIES // (len(conditions) * len(class_names))))
    self._rows = np.unique(np.linspace(0, len(source) - 1, num_rows).astype(int))
    self._slot = np.full(len(source), -1)
    self._slot[self._rows] = np.arange(len(self._rows))
    self._source, self._class_names, self._conditions, self._multi_label = (
      source,
      class_names,
      list(conditions),
      multi_label,
    )
    self._logits_cnk = np.zeros((len(conditions), len(self._rows), len(class_names)), np.float32)
    self._counted_cn = np.zeros((len(conditions), len(self._rows)), bool)

  def observe(self, batch: Mapping[str, jax.Array], out_c: HeadOutput) -> None:
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

  def write(
    self, workdir: pathlib.Path, *, split: str, step: int, config_hash: str, seed: int, data: str
  ) -> None:
    """Writes predictions.npz and mistakes.json; `data` is the digest of the data's fingerprint."""
    rows, log = (
      self._rows.tolist(),
      _log_probabilities(self._logits_cnk.astype(np.float64), self._multi_label),
    )
    label = (
      np.array([self._source.labels[row] for row in rows])
      if not self._multi_label
      else self._label_sets(rows)
    )
    predictions = records.Predictions(
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
    )
    predictions.save(workdir / records.PREDICTIONS)
    worst = {name: predictions.worst(name, NUM_MISTAKES) for name in self._conditions}
    shown = sorted({n for of_condition in worst.values() for n in of_condition})
    examples = {str(n): _exhibit(self._read(rows[n])) for n in shown}
    records.write_mistakes(
      workdir,
      {'split': split, 'step': step, 'data': data, 'conditions': worst, 'examples': examples},
    )

  def _read(self, row):
    """An example; what cannot be read is left out, and was counted when it was scored."""
    return examples.read_example(self._source, row, image=True, report=decode_report.DecodeReport())

  def _label_sets(self, rows):
    true_nk = np.zeros((len(rows), len(self._class_names)), bool)
    for n, row in enumerate(rows):
      true_nk[n, list(self._source.labels[row])] = True
    return true_nk

  def _loss(self, log, label):
    if not self._multi_label:
      return -np.take_along_axis(log, label[None, :, None], axis=-1)[..., 0]
    log_not = _log_probabilities(-self._logits_cnk.astype(np.float64), multi_label=True)
    return -np.where(label[None], log, log_not).mean(axis=-1)


def _log_probabilities(logits_cnk, multi_label):
  """Log of softmax or sigmoid."""
  normaliser = (
    np.logaddexp(0, logits_cnk)
    if multi_label
    else np.logaddexp.reduce(logits_cnk, axis=-1, keepdims=True)
  )
  return logits_cnk - normaliser


def _exhibit(example):
  """{'id', 'text', 'image'}: a shortened text, a thumbnail as a data URL; None where there is
  none.
  """
  text = example['text']
  if text and len(text) > MAX_TEXT:
    text = text[:MAX_TEXT].rstrip() + ' ...'
  return {
    'id': example['id'],
    'text': text,
    'image': example['image'] and _thumbnail(example['image']),
  }


def _thumbnail(content):
  try:
    image = transforms.decode(content)
  except transforms.DecodeError:
    return None
  image.thumbnail((THUMBNAIL, THUMBNAIL))
  buffer = io.BytesIO()
  image.save(buffer, 'WEBP', quality=80)
  return 'data:image/webp;base64,' + base64.b64encode(buffer.getvalue()).decode()
