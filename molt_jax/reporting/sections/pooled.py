"""The pooled features of both modalities: correlations, modality gap, weights of layers."""

from collections.abc import Callable
from typing import Any

from molt_jax.evaluation.records import Pairs
from molt_jax.reporting import figures
from molt_jax.reporting.document import Page, name_where_several, percent, safe
from molt_jax.reporting.runs import Run
from molt_jax.reporting.svg import SMALL


def spectrum(page: Page) -> str:
  """Canonical correlations by layer: of one batch, of training pairs, held out on others."""
  return _with_pairs(
    page,
    figures.spectrum,
    lambda pairs: (
      'Canonical correlations of h<sub>i</sub> and h<sub>t</sub>, layer by layer. One batch of '
      f'{pairs.num_batch} pairs over all directions is what the loss as printed sees: with fewer '
      'pairs than directions it is near 1 whatever the data. The other two are over the '
      f'{pairs.held_out_lk.shape[1]} leading principal axes of each view: of {pairs.num_fitted:,} '
      f'training pairs, and the same directions on the {safe(pairs.split)} split, which is what '
      'the two modalities have in common.'
    ),
  )


def gap(page: Page) -> str:
  """The pooled pairs in the plane."""
  return _with_pairs(page, figures.plane, _gap_caption)


def _gap_caption(pairs: Pairs) -> str:
  shares = ', '.join(percent(share, 0) for share in pairs.share_l)
  return (
    f'Pooled vectors of {pairs.plane_lnmp.shape[1]} {safe(pairs.split)} pairs, brought to unit '
    f'length, on the two leading principal axes of both together ({shares} % of the variance). A '
    'line joins the two of a pair; the gap is the distance between the centroids of the two clouds '
    'in all dimensions, from 0 to 2.'
  )


def layer_weights(page: Page) -> str:
  """The learned M."""
  runs = [run for run in page.runs if run.pairs is not None]
  if not runs:
    return '<p class="none">Nothing to show: no run here has pooled layers to weigh.</p>'
  drawn = []
  for run in runs:
    weights_l, title = run.pairs.layer_weights_l, name_where_several(page, run)
    graph = figures.bars(weights_l, title=title, x='layer', y='M', reference=1.0)
    drawn.append(page.draw(graph, f'{run.name}: M by layer', height=190))
  fixed = [run.name for run in runs if not run.config.molt.layer_weights]
  note = f' Not learned in {safe(", ".join(fixed), 2_000)}.' if fixed else ''
  caption = f'Weight of each layer in H<sub>r</sub> (eq. 5). Dashed: where training starts.{note}'
  return page.figure(drawn, caption)


def _with_pairs(page: Page, draw: Callable[..., Any], caption: Callable[[Pairs], str]) -> str:
  """One figure a layer, run by run; a run whose method pools no pairs says so."""
  parts = []
  for run in page.runs:
    if run.pairs is None:
      parts.append(page.for_run(run, f'<p class="none">Nothing to show: {_why_none(run)}.</p>'))
      continue
    drawn = [
      page.draw(drawing, f'{run.name}, layer {i + 1}', **SMALL)
      for i, drawing in enumerate(figures.of_layers(draw, run.pairs))
    ]
    parts.append(page.for_run(run, page.figure(drawn, caption(run.pairs))))
  return ''.join(parts)


def _why_none(run: Run) -> str:
  if run.config.method != 'molt':
    return f'the method {run.config.method} pools no pairs in a common space'
  return 'no pairs are recorded (a unimodal model has none; training writes them)'
