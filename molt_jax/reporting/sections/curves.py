"""Training: loss, validation scores and canonical correlations over steps."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from molt_jax.data.modalities import LABELS
from molt_jax.reporting import figures
from molt_jax.reporting.document import Page, Series, metric_name, number_of, series_of
from molt_jax.reporting.runs import Run
from molt_jax.reporting.svg import SMALL

# By `eval.select`.
CHECKPOINTS = {
  'best': 'the checkpoint of the best mean validation score over the absences',
  'latest': 'the latest checkpoint',
}
# The parts of the training loss: key in the log -> label.
LOSSES = {
  'loss': 'loss',
  'loss_ce': 'cross-entropy',
  'loss_distill': 'distillation',
  'loss_cca': 'CCA',
}


def training(page: Page) -> str:
  """Loss, validation scores, canonical correlations over steps."""
  runs = [run for run in page.runs if run.lines('train')]
  if not runs:
    return ''
  graphs = [figures.curves(_losses(runs), title='training loss', x='step', y='loss')]
  for title, series in _scores(runs).items():
    y = f'{metric_name(runs[0])}, %'
    graphs.append(figures.curves(series, title=title, x='step', y=y, marker=True))
  graphs += _correlation_curves(runs)
  size = SMALL if len(graphs) % 4 == 0 else {}
  return page.figure(
    [page.draw(graph, 'a curve over training steps', **size) for graph in graphs],
    f'Logged while training. Evaluated is {_evaluated(runs)}. Canonical correlations are means '
    'over the directions that L_CCA compares: of its own estimate, and held out, on validation '
    'pairs along directions fitted in training.',
  )


def _losses(runs: Sequence[Run]) -> dict[str, Series]:
  """The loss of each run; of one run its parts."""
  if len(runs) > 1:
    return {run.name: series_of(run.lines('train'), 'loss') for run in runs}
  lines = runs[0].lines('train')
  logged = {key: label for key, label in LOSSES.items() if any(key in line for line in lines)}
  return {label: series_of(lines, key) for key, label in logged.items()}


def _scores(runs: Sequence[Run]) -> dict[str, dict[str, Series]]:
  """Title of a graph -> label -> validation scores; a graph a condition, of one run one graph."""
  curves = {}
  for name, label in LABELS.items():
    found = {run.name: _validation(run, name) for run in runs}
    curves[label] = {run: curve for run, curve in found.items() if curve}
  if len(runs) > 1:
    return {f'validation, {label}': series for label, series in curves.items() if series}
  return {'validation': {label: series[runs[0].name] for label, series in curves.items() if series}}


def _evaluated(runs: Sequence[Run]) -> str:
  """Which checkpoints are evaluated."""
  parts = []
  for select, what in CHECKPOINTS.items():
    steps = [str(run.evaluation['step']) for run in runs if run.config.eval.select == select]
    if steps:
      parts.append(f'{what} (step {", ".join(steps)})')
  return ' and '.join(parts)


def _layers(values: Sequence[Any]) -> np.ndarray:
  """A number a layer."""
  return np.array([number_of(value) for value in values])


def _validation(run: Run, name: str) -> Series | None:
  lines = [line for line in run.lines('validation') if run.metric in line.get(name, ())]
  scores = [100 * number_of(line[name][run.metric]) for line in lines]
  return ([line['step'] for line in lines], scores) if lines else None


def _of_loss(line: dict[str, Any]) -> Any:
  return line.get('cca_correlation')


def _held_out(line: dict[str, Any]) -> Any:
  return line.get('pairs', {}).get('held_out_correlation')


def _correlation_curves(runs: Sequence[Run]) -> Iterator[Callable[[Any], None]]:
  """Drawings of the mean canonical correlations that were logged."""
  for title, kind, get in (
    ('correlation, of the loss', 'train', _of_loss),
    ('correlation, held out', 'validation', _held_out),
  ):
    series = {}
    for run in runs:
      lines = [(line['step'], _layers(get(line))) for line in run.lines(kind) if get(line)]
      if lines:
        series |= _by_layer(lines) if len(runs) == 1 else {run.name: _over_layers(lines)}
    values = [value for _, y in series.values() for value in y if np.isfinite(value)]
    if values:
      ylim = min(0.0, *values) - 0.03, 1.03
      yield figures.curves(series, title=title, x='step', y='mean correlation', ylim=ylim)


def _by_layer(lines: Sequence[tuple[int, np.ndarray]]) -> dict[str, Series]:
  """One curve a layer, of (step, a number a layer)."""
  count = min(len(value_l) for _, value_l in lines)
  steps = [step for step, _ in lines]
  return {f'layer {i + 1}': (steps, [value_l[i] for _, value_l in lines]) for i in range(count)}


def _over_layers(lines: Sequence[tuple[int, np.ndarray]]) -> Series:
  """The mean over the layers that have a number."""
  finite = [(step, value_l[np.isfinite(value_l)]) for step, value_l in lines]
  finite = [(step, value_l.mean()) for step, value_l in finite if len(value_l)]
  return [step for step, _ in finite], [value for _, value in finite]
