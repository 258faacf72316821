"""The pooled pairs (h_i, h_t), collected while a split is evaluated, and what they look like."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from molt_jax.evaluation import records
from molt_jax.methods.parts.interface import Output
from molt_jax.objectives.cca import diagnostics, loss
from molt_jax.objectives.cca.estimators import CCAEstimator
from molt_jax.runtime import compiling, processes

MAX_PAIRS = 1024  # Pairs looked at; enough for two digits, and megabytes at the widest.
MIN_PAIRS = 3  # Of two, any correlation is 1 or -1.
HELD_OUT = ('held_out_correlation', 'held_out_top_correlation')
MAX_PLANE = 150  # Pairs drawn in the plane.
NUM_SHOWN = 16  # Canonical correlations a layer.


class Observer(Protocol):
  """Looks at each batch of an evaluation; all processes call it together."""

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """Takes a batch as `evaluate.eval_step` does, and the head's output, conditions first."""


class PairDiagnostics:
  """Collects the pooled pairs that are complete in the first condition, and measures them."""

  def __init__(self):
    self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

  def observe(self, batch: Mapping[str, jax.Array], out_c: Output) -> None:
    """See `Observer`; ignored where the method pools no pairs, or once there are MAX_PAIRS."""
    count = sum(x_lnc.shape[1] for x_lnc, _ in self._pairs)
    if out_c.pooled_image_lbc is None or count >= MAX_PAIRS:
      return
    is_complete_b = jnp.all(batch['present'] & batch['keep'][:, 0], axis=-1)
    complete_b = processes.fetch((batch['weight'] > 0) & is_complete_b)
    image_lbc, text_lbc = (
      processes.fetch(x_clbc[0])[:, complete_b]
      for x_clbc in (out_c.pooled_image_lbc, out_c.pooled_text_lbc)
    )
    self._pairs.append((image_lbc, text_lbc))

  @property
  def pairs(self) -> tuple[np.ndarray, np.ndarray] | None:
    """(h_i, h_t) of all examples seen, float32[L, n, C] each; None where there is none."""
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
    past = jax.device_get(_past_of(estimator)(state := jax.device_get(state)))
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
    batch_size = min(batch_size, x_lmc.shape[1])
    count = min(NUM_SHOWN, x_lnc.shape[2], x_lmc.shape[1] - 1)
    layers = zip(x_lnc, y_lnc, x_lmc, y_lmc, strict=True)
    spectra = [_spectra(*layer, ridge, count=count, batch=batch_size) for layer in layers]
    batch_lk, fitted_lk, held_out_lk = (np.stack(x_k) for x_k in zip(*spectra, strict=True))
    planes, shares = zip(*map(_plane, x_lnc, y_lnc), strict=True)
    if layer_weights_l is None:
      layer_weights_l = np.ones(len(x_lnc))
    return records.Pairs(
      split=split,
      step=step,
      num_fitted=x_lmc.shape[1],
      num_batch=batch_size,
      plane_lnmp=np.stack(planes).astype(np.float32),
      share_l=np.array(shares),
      gap_l=np.asarray(_of_pairs(x_lnc, y_lnc)['modality_gap']),
      batch_lk=batch_lk,
      fitted_lk=fitted_lk,
      held_out_lk=held_out_lk,
      layer_weights_l=np.asarray(layer_weights_l),
    )


def _or_none(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


@functools.lru_cache(maxsize=4)
def _past_of(estimator: CCAEstimator) -> Callable[[Any], Any]:
  """`estimator.past`, compiled once for all validations of a run."""
  return compiling.jit_once(estimator.past)


@compiling.jit_once
def _of_pairs(x_lnc, y_lnc) -> dict[str, Any]:
  return lax.map(
    lambda pair: {
      'effective_rank_image': diagnostics.effective_rank(pair[0]),
      'effective_rank_text': diagnostics.effective_rank(pair[1]),
      'modality_gap': diagnostics.modality_gap(*pair),
    },
    (x_lnc, y_lnc),
  )


@compiling.jit_once
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
  """One layer's (batch [k], fitted [k], held out [k]); m are training pairs, n those measured."""
  axes_x_ck, axes_y_ck = (_principal_axes(view_mc, count) for view_mc in (x_mc, y_mc))
  fitted = x_mc @ axes_x_ck, y_mc @ axes_y_ck
  held_out = x_nc @ axes_x_ck, y_nc @ axes_y_ck
  found = _correlations((x_mc[:batch], y_mc[:batch]), fitted, held_out, ridge)
  batch_k, fitted_k, held_out_k = jax.device_get(found)
  batch_k = batch_k[: min(count, batch - 1)]
  pad = count - len(batch_k)  # Centred, n pairs have n - 1 correlations.
  return np.pad(batch_k, (0, pad), constant_values=np.nan), fitted_k, held_out_k


@compiling.jit_once
def _correlations(batch, fitted, held_out, ridge):
  """Canonical correlations of a batch, of what directions are fitted to, and along these of what
  is held out.
  """
  directions = diagnostics.fit_directions(*fitted, ridge=ridge)
  return (
    loss.canonical_correlations(*batch, ridge=ridge),
    loss.canonical_correlations(*fitted, ridge=ridge),
    diagnostics.held_out_correlations(directions, *held_out),
  )


def _principal_axes(view_nc, count):
  """Leading principal axes as columns, [C, count]."""
  centred_nc = view_nc - view_nc.mean(axis=0, keepdims=True)
  _, _, axes_kc = np.linalg.svd(centred_nc, full_matrices=False)
  return axes_kc[:count].T


def _plane(x_nc, y_nc):
  """Unit vectors on the two leading principal axes of both views together.

  Returns:
    (MAX_PLANE pairs [n, 2, 2], share of the variance shown)
  """
  both_nmc = np.stack([x_nc, y_nc], axis=1)
  norm_nm1 = np.linalg.norm(both_nmc, axis=-1, keepdims=True)
  both_nmc = both_nmc / np.maximum(norm_nm1, np.finfo(np.float32).tiny)
  centred_jc = both_nmc.reshape(-1, both_nmc.shape[-1])
  centred_jc = centred_jc - centred_jc.mean(axis=0, keepdims=True)
  _, s_k, axes_kc = np.linalg.svd(centred_jc, full_matrices=False)
  shown = np.unique(np.linspace(0, len(x_nc) - 1, MAX_PLANE).astype(int))
  plane_nmp = (centred_jc @ axes_kc[:2].T).reshape(len(x_nc), 2, 2)[shown]
  return plane_nmp, float(np.sum(s_k[:2] ** 2) / max(np.sum(s_k**2), np.finfo(np.float32).tiny))
