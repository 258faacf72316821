"""Predictions: classes, calibration and the worst mistakes."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.data.modalities import LABELS, PATTERNS
from molt_jax.evaluation.records import Predictions
from molt_jax.reporting import checked, figures
from molt_jax.reporting.document import (
  Page,
  beside,
  for_each_run,
  name_where_several,
  not_recorded,
  not_recorded_of,
  safe,
)
from molt_jax.reporting.runs import Run
from molt_jax.reporting.svg import WIDTH, name_of

# Classes of a confusion matrix; with more, F1 of the most frequent MAX_CLASSES and the most
# frequent confusions.
MAX_MATRIX = 20
MAX_CLASSES, MAX_CONFUSIONS = 30, 12
PROMISES = (
  0.5,
  0.6,
  0.7,
  0.8,
  0.85,
  0.9,
  0.95,
  0.98,
)  # Coverages of prediction sets that are drawn.


def classes(page: Page) -> str:
  """Confusion matrices of few classes; of many, F1 of the most frequent and the confusions."""
  return for_each_run(page, _classes)


def _classes(page: Page, run: Run) -> str:
  p = run.predictions
  conditions = [name for name in p.conditions if p.scores(name)['num_examples']]
  if not conditions:
    return '<p class="none">Nothing to show: no example to score.</p>'
  if not p.multi_label and len(p.class_names) <= MAX_MATRIX:
    return _matrices(page, run, conditions)
  support_k = p.support()
  order = [k for k in np.argsort(-support_k, kind='stable') if support_k[k]]
  if not order:
    return '<p class="none">Nothing to show: no example carries a label.</p>'
  f1 = {LABELS[name]: p.class_f1(name) for name in conditions}
  rows = []
  for k in order[:MAX_CLASSES]:
    label = f'{name_of(p.class_names[k])} ({support_k[k]})'
    rows.append((label, {name: f1_k[k] for name, f1_k in f1.items()}))
  dots, height = figures.class_dots(rows, x='F1'), 60 + 17 * len(rows)
  drawn = page.draw(dots, f'{run.name}: F1 by class', height=height)
  shown = 'each class'
  if len(rows) < len(order):
    shown = f'the {len(rows)} most frequent of {len(order)} classes'
  body = page.figure([drawn], f'F1 of {shown}, with the number of examples that carry it.')
  return body if p.multi_label else beside(body, _confusions(page, p))


def _matrices(page: Page, run: Run, conditions: Sequence[str]) -> str:
  """A confusion matrix a condition."""
  p = run.predictions
  size = max(WIDTH, 24 * len(p.class_names) + 110)
  drawn = []
  for name in conditions:
    matrix = figures.confusion(p.confusion(name), p.class_names, title=LABELS[name])
    label = f'{run.name}: confusion matrix, {LABELS[name]}'
    drawn.append(page.draw(matrix, label, width=size, height=size))
  return page.figure(
    drawn,
    'Confusion matrices: rows are truths, the shade is the share of the row, numbers are '
    'examples; blue is right.',
  )


def _confusions(page: Page, p: Predictions) -> str:
  condition = p.conditions[0]
  support_k = p.support(condition)
  rows = [
    [safe(p.class_names[t]), safe(p.class_names[q]), str(count), str(support_k[t])]
    for t, q, count in p.confusions(condition)[:MAX_CONFUSIONS]
  ]
  caption = f'The most frequent confusions, {LABELS[condition]}.'
  return page.table(['true', 'taken for', 'times', 'of'], rows, caption) if rows else ''


def calibration(page: Page) -> str:
  """Whether a confidence is a frequency."""
  drawn = []
  for run in page.runs:
    if run.predictions and run.predictions.counted_cn.any():
      title = name_where_several(page, run)
      graph = figures.reliability(run.predictions, LABELS, title=title)
      drawn.append(page.draw(graph, f'{run.name}: reliability', height=280))
  if not drawn:
    return not_recorded(page, 'evaluate --workdir=DIR')
  return page.figure(
    drawn,
    'Reliability: examples are sorted into ten equal bins of confidence. On the diagonal a '
    'prediction of 70 % is right in 70 % of the cases; below it the classifier is too sure of '
    'itself. ECE: mean distance from the diagonal over examples.',
  )


def sets(page: Page) -> str:
  """Whether prediction sets hold the truth as often as they promise, and how large they are."""
  parts = []
  for run in page.runs:
    if run.predictions and run.calibration and run.predictions.counted_cn.any():
      parts.append(page.for_run(run, _sets(page, run)))
  return ''.join(parts)


def _sets(page: Page, run: Run) -> str:
  p = run.predictions
  if list(p.class_names) != list(run.calibration.class_names):
    return ''
  curves = {'coverage': {}, 'size': {}}
  rules = [run.calibration.rule(level) for level in PROMISES]
  for c, name in enumerate(p.conditions):
    rows = np.flatnonzero(p.counted_cn[c])
    if not len(rows):
      continue
    true_nk = (
      p.label[rows] if p.multi_label else p.label[rows, None] == np.arange(len(p.class_names))
    )
    left_nm = p.present_nm[rows] & np.array(PATTERNS[tuple(LABELS).index(name)])
    members_lnk = [rule.members(p.probability_cnk[c, rows], left_nm) for rule in rules]
    shares = [100 * _held(members_nk, true_nk) for members_nk in members_lnk]
    sizes = [members_nk.sum(axis=1).mean() for members_nk in members_lnk]
    promised = [100 * level for level in PROMISES]
    curves['coverage'][LABELS[name]] = promised, shares
    curves['size'][LABELS[name]] = promised, sizes
  ideal = {'as promised': ([100 * PROMISES[0], 100 * PROMISES[-1]],) * 2}
  title = name_where_several(page, run)
  drawn = [
    page.draw(
      figures.curves(curves['coverage'] | ideal, title=title, x='promised, %', y='held, %'),
      f'{run.name}: how often sets hold the truth, by what they promise',
    ),
    page.draw(
      figures.curves(curves['size'], title=title, x='promised, %', y='labels a set', marker=True),
      f'{run.name}: labels in a set, by what it promises',
    ),
  ]
  return page.figure(drawn, _about_sets(run))


def _held(members_nk: np.ndarray, true_nk: np.ndarray) -> float:
  """Mean share of an example's labels that its set has; NaN where no example has one."""
  truths_n = true_nk.sum(axis=1)
  held_n = (members_nk & true_nk).sum(axis=1)[truths_n > 0] / truths_n[truths_n > 0]
  return float(held_n.mean()) if len(held_n) else np.nan


def _about_sets(run: Run) -> str:
  counts = run.calibration.counts()
  found = zip(('complete', 'image only', 'text only'), counts, strict=True)
  known = ', '.join(f'{count:,} {name}' for name, count in found if count)
  chosen = ' and '.join(run.calibration.chosen)
  note = f' The same examples chose {safe(chosen)}, which favours them a little.' if chosen else ''
  return (
    'Prediction sets, conformal: labels that hold the true one as often as promised, with a '
    f'threshold for each missing pattern from validation examples ({known}).{note} No set is '
    'empty, so a model that is right more often than is promised is above the line.'
  )


def mistakes(page: Page) -> str:
  """The worst mistakes under each absence."""
  return for_each_run(page, lambda page, run: _mistakes(run))


def _mistakes(run: Run) -> str:
  if not run.mistakes:
    return not_recorded_of(run)
  parts = []
  for name, rows in run.mistakes['conditions'].items():
    c = run.predictions.conditions.index(name)
    counted_n = run.predictions.counted_cn[c]
    wrong = int(np.sum(counted_n & ~run.predictions.right_cn[c]))
    count = int(counted_n.sum())
    caption = f'{wrong:,} mistakes of {count:,}' if count else 'no example'
    cards = ''.join(_card(run, name, row) for row in rows)
    parts.append(
      f'<h4>{LABELS[name].capitalize()} <small>{caption}</small></h4>'
      f'<div class="cards">{cards}</div>'
    )
  parts.append(
    '<p class="caption">The mistakes of the greatest cross-entropy. What is crossed out was there, '
    'and was not fed.</p>'
  )
  return ''.join(parts)


def _card(run: Run, condition: str, row: int) -> str:
  """One mistake: the example, and the probabilities of the likeliest and of the true classes."""
  p, example = run.predictions, run.mistakes['examples'][str(row)]
  probability_k = p.probability_cnk[p.conditions.index(condition), row]
  true = set(np.flatnonzero(p.label[row])) if p.multi_label else {int(p.label[row])}
  likeliest = np.argsort(-probability_k, kind='stable')[:3].tolist()
  classes = dict.fromkeys([*likeliest, *sorted(true)[:MAX_CLASSES]])
  bars = ''.join(
    f'<li class="{"true" if k in true else "wrong"}"><span>{safe(p.class_names[k])}</span>'
    f'<b>{_probability(probability_k[k])}</b>'
    f'<i style="width:{100 * float(probability_k[k]):.1f}%"></i></li>'
    for k in classes
  )
  shown = f'<div class="shown">{_image(example, condition)}{_text(example, condition)}</div>'
  return f'<article class="card">{shown}<ol>{bars}</ol></article>'


def _probability(value: float) -> str:
  if value < 0.001:
    return '&lt; 0.1 %'
  return f'{100 * value:.{0 if value >= 0.01 else 1}f} %'


def _image(example: Mapping[str, Any], condition: str) -> str:
  if not example['image']:
    return '<div class="blank">no image</div>'
  url = checked.picture(example['image'])
  if url is None:
    return '<div class="blank">left out: not a small PNG, JPEG or WebP picture</div>'
  gone = ' class="gone"' if condition == 'image_absent' else ''
  picture = f'<img{gone} src="{html.escape(url)}" alt="example {safe(example["id"])}">'
  return f'<div class="thumb"{gone and " data-absent"}>{picture}</div>'


def _text(example: Mapping[str, Any], condition: str) -> str:
  if not example['text']:
    return '<p class="none">no text</p>'
  text = safe(' '.join(example['text'].split()))
  return f'<p><s>{text}</s></p>' if condition == 'text_absent' else f'<p>{text}</p>'
