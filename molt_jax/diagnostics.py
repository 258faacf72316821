"""What the pooled pairs (h_i, h_t) look like on validation: correlations along directions fitted in training, effective rank, modality gap."""

from typing import Any

import jax
import numpy as np
from jax import lax

from molt_jax import processes
from molt_jax.modules.interface import HeadOutput
from molt_jax.objectives import cca, cca_diagnostics
from molt_jax.objectives.cca_estimators import CCAEstimator

MAX_PAIRS = 1024  # Pairs looked at; enough for two digits, and megabytes at the widest.


class PairDiagnostics:
  """Collects the pooled pairs of complete rows during an evaluation, then measures them."""

  def __init__(self):
    self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

  def observe(self, out: HeadOutput, complete_b: jax.Array) -> None:
    """Takes the complete rows of a batch, until there are MAX_PAIRS.

    Args:
      out: the head's output; ignored where the method pools no pairs.
      complete_b: bool[B], rows that count and have both modalities; like `out` of the batch of all processes.
    """
    if out.pooled_image_lbc is not None and sum(x_lnc.shape[1] for x_lnc, _ in self._pairs) < MAX_PAIRS:
      complete_b = processes.fetch(complete_b)
      self._pairs.append((processes.fetch(out.pooled_image_lbc)[:, complete_b], processes.fetch(out.pooled_text_lbc)[:, complete_b]))

  def compute(self, estimator: CCAEstimator, state: Any, *, ridge: float) -> dict[str, list[float]]:
    """Returns name -> one number a layer; {} without pairs.

    effective_rank_image, effective_rank_text, modality_gap: of the pairs seen. With an estimator that has a past also correlation and
    top_correlation (mean and largest canonical correlation of the training pairs it stands for), and held_out_correlation and
    held_out_top_correlation: those of the pairs seen here, along the directions fitted there.

    Args:
      estimator: of the canonical correlations.
      state: its state after training so far.
      ridge: `config.cca.ridge`.
    """
    if not self._pairs or not any(x_lnc.shape[1] for x_lnc, _ in self._pairs):
      return {}
    pairs = tuple(np.concatenate(views, axis=1) for views in zip(*self._pairs, strict=True))
    values = _of_pairs(*pairs)
    past = estimator.past(state := jax.device_get(state))
    if past:
      values |= _against_past(past, (state['projection_x_ldk'], state['projection_y_ldk']), pairs, ridge)
    return {name: np.asarray(value_l).tolist() for name, value_l in values.items()}


@jax.jit
def _of_pairs(x_lnc, y_lnc) -> dict[str, Any]:
  return lax.map(lambda pair: {
      'effective_rank_image': cca_diagnostics.effective_rank(pair[0]), 'effective_rank_text': cca_diagnostics.effective_rank(pair[1]),
      'modality_gap': cca_diagnostics.modality_gap(*pair)}, (x_lnc, y_lnc))


@jax.jit
def _against_past(past, projections, pairs, ridge) -> dict[str, Any]:
  x_lpk, y_lpk, weight_p = past

  def one_layer(layer):
    x_pk, y_pk, projection_x_dk, projection_y_dk, x_nc, y_nc = layer
    directions = cca_diagnostics.fit_directions(x_pk, y_pk, weight_n=weight_p, ridge=ridge)
    held_out_k = cca_diagnostics.held_out_correlations(directions, x_nc @ projection_x_dk, y_nc @ projection_y_dk)
    spectrum_k = cca.canonical_correlations(x_pk, y_pk, weight_n=weight_p, ridge=ridge)
    return {
        'correlation': spectrum_k.mean(), 'top_correlation': spectrum_k.max(),
        'held_out_correlation': held_out_k.mean(), 'held_out_top_correlation': held_out_k.max()}
  return lax.map(one_layer, (x_lpk, y_lpk, *projections, *pairs))
