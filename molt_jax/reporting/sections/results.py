"""Results: scores by condition, and by the share of examples that lack a modality."""

import numpy as np

from molt_jax.config import resolved
from molt_jax.data.modalities import LABELS
from molt_jax.reporting import figures
from molt_jax.reporting.document import (
  NO_EXAMPLE,
  Page,
  beside,
  metric_name,
  not_recorded,
  percent,
  safe,
)
from molt_jax.reporting.runs import Run
from molt_jax.reporting.svg import name_of

RATES = np.linspace(0, 1, 11)
KINDS = {'text': 'text missing', 'image': 'image missing', 'both': 'half text, half image'}


def headline(page: Page) -> str:
  """Scores by condition, against the baseline where there is one, and the same as dots."""
  runs = page.runs
  conditions = [name for name in LABELS if any(name in run.conditions for run in runs)]
  baseline = next((run for run in runs if run.is_baseline), None)
  rows = []
  for run in runs:
    kind = ' <span class="tag">baseline</span>' if run is baseline else ''
    rows.append([f'{safe(run.name)}{kind}', *(_score_cell(run, name) for name in conditions)])
    if baseline is not None and run is not baseline:
      differences = [_difference_cell(run, baseline, name) for name in conditions]
      rows.append(['<span class="sub">minus the baseline, points</span>', *differences])
  head = ['run', *(LABELS[name] for name in conditions)]
  table = page.table(head, rows, _note(runs[0], with_baseline=baseline is not None))
  if len(runs) == 1:
    return table
  points = [(name_of(run.name), _points(run)) for run in runs]
  dots = figures.dots(points, x=f'{metric_name(runs[0])}, %')
  chart = page.draw(dots, 'scores by run and absence', height=90 + 48 * len(runs))
  caption = 'The same scores; bars are 95 % intervals over examples.'
  return beside(table, page.figure([chart], caption))


def _note(run: Run, *, with_baseline: bool) -> str:
  """How the table of scores is to be read."""
  split, metric = safe(run.evaluation['split']), metric_name(run)
  note = (
    f'{metric[0].upper()}{metric[1:]} in percent on the {split} split, ± half the 95 % interval '
    'over examples; below it macro F1. Training noise is not in the interval: repeat runs with '
    'other seeds for that.'
  )
  if with_baseline:
    note += ' Differences are paired by example; bold where the interval excludes zero.'
  p = run.predictions
  if p and not p.multi_label and (support_k := p.support(p.conditions[0])).any():
    frequent = percent(support_k.max() / support_k.sum())
    note += f' Always answering the most frequent class: {frequent}.'
  return note


def _points(run: Run) -> dict[str, tuple[float, float]]:
  """Label of a condition -> (score, standard error), in percent, where there is a score."""
  scores = {name: run.score(name) for name in run.conditions}
  return {
    LABELS[name]: (100 * score, 100 * (run.error(name) or 0))
    for name, score in scores.items()
    if score is not None
  }


def _score_cell(run: Run, name: str) -> str:
  if name not in run.conditions:
    return '<span class="none">not evaluated</span>'
  score, macro, error = run.score(name), run.score(name, 'f1_macro'), run.error(name)
  if score is None:
    return NO_EXAMPLE
  interval = f' <small>± {196 * error:.1f}</small>' if error is not None else ''
  below = '' if macro is None else f'<br><small>macro F1 {percent(macro)}</small>'
  return f'<b>{percent(score)}</b>{interval}{below}'


def _difference_cell(run: Run, baseline: Run, name: str) -> str:
  difference = run.difference(baseline, name)
  if difference is None:
    return ''
  value, error = difference
  text = f'{100 * value:+.1f}'
  if error is None:
    return text
  text += f' <small>± {196 * error:.1f}</small>'
  return f'<b>{text}</b>' if abs(value) > 1.96 * error else text


def robustness(page: Page) -> str:
  """Score against the share of examples that lack a modality."""
  runs = [run for run in page.runs if _has_all_conditions(run)]
  if not runs:
    if any(len(resolved.modalities(run.config)) == 1 for run in page.runs):
      return '<p class="none">Nothing to show: one modality alone.</p>'
    return not_recorded(page, 'evaluate --workdir=DIR')
  curves = {kind: {run.name: _rate_curve(run, kind) for run in runs} for kind in KINDS}
  found = np.array([list(of_kind.values()) for of_kind in curves.values()])
  values = found[np.isfinite(found)]
  if not len(values):
    return '<p class="none">Nothing to show: no example to score.</p>'
  axes = {
    'x': 'rows that lack it, %',
    'y': f'{metric_name(runs[0])}, %',
    'marker': True,
    'ylim': (min(values) - 3, max(values) + 3),
  }
  drawn = []
  for kind, title in KINDS.items():
    series = {name: (100 * RATES, curve) for name, curve in curves[kind].items()}
    graph = figures.curves(series, title=title, **axes)
    drawn.append(page.draw(graph, f'score by missing rate, {title}'))
  return page.figure(
    drawn,
    'A growing share of the complete rows loses a modality, drawn by a hash of (seed, split, '
    "id): the field's missing-rate protocol. Rows do not influence each other, so each point is "
    'put together from the recorded predictions of every row under each absence.',
  )


def _has_all_conditions(run: Run) -> bool:
  return bool(run.predictions) and len(run.predictions.conditions) == len(LABELS)


def _rate_curve(run: Run, kind: str) -> list[float]:
  """Scores at RATES in percent; NaN where no example is left to score."""
  scores = [run.predictions.missing_rate(rate, kind) for rate in RATES]
  return [100 * score.get(run.metric, np.nan) for score in scores]
