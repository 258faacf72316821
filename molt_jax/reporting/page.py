"""The page: one self-contained HTML file, a function a section.

Every string of a run's files goes through `safe`; pictures are those that `checked.picture` knows.
"""

import functools
import html
import importlib.resources
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data.modalities import LABELS
from molt_jax.reporting import checked, figures
from molt_jax.reporting.runs import Run
from molt_jax.runtime import terminal

RATES = np.linspace(0, 1, 11)
KINDS = {'text': 'text missing', 'image': 'image missing', 'both': 'half text, half image'}
# Classes of a confusion matrix; with more, F1 of the most frequent MAX_CLASSES and the most
# frequent confusions.
MAX_MATRIX = 20
MAX_CLASSES, MAX_CONFUSIONS = 30, 12
NO_EXAMPLE = '<span class="none">no example</span>'
# Nothing is fetched and nothing is run, whatever a file of a run says.
POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
  "form-action 'none'"
)
MOST_SHOWN, MOST_CONFIG = 300, 100_000  # Characters of a name, of a config.


def safe(text: Any, most: int = MOST_SHOWN) -> str:
  """Returns any text as HTML, for an element or a quoted attribute: one line, and not too long."""
  return html.escape(terminal.clean(text, most))


class Page:
  """Numbers figures and tables in the order of their making."""

  def __init__(self, runs: Sequence[Run]):
    self.runs = runs
    self._drawings = self._figures = self._tables = 0

  def draw(self, draw: Callable[[Any], None], label: str, **size: int) -> str:
    """Returns one drawing; `label` says what it shows to those who cannot see it."""
    self._drawings += 1
    drawing = figures.svg(draw, label, number=self._drawings, **size)
    return f'<div class="panel">{drawing}</div>'

  def figure(self, drawings: Sequence[str], caption: str) -> str:
    """Drawings side by side, as many as fit, under one caption; nothing without drawings."""
    if not drawings:
      return ''
    self._figures += 1
    fours = ' fours' if len(drawings) % 4 == 0 else ''
    caption = f'<figcaption><b>Figure {self._figures}.</b> {caption}</figcaption>'
    return f'<figure><div class="panels{fours}">{"".join(drawings)}</div>{caption}</figure>'

  def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose first column names the row; cells are HTML."""
    self._tables += 1
    top = ''.join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ''.join(
      f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
      for row in rows
    )
    caption = f'<p class="caption"><b>Table {self._tables}.</b> {caption}</p>'
    return (
      f'{caption}<div class="scroll" '
      f'tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )

  def for_run(self, run: Run, body: str) -> str:
    """A run's part of a section, under its name where there are several."""
    return f'<h3>{safe(run.name)}</h3>{body}' if len(self.runs) > 1 else body


def render(runs: Sequence[Run]) -> str:
  """Returns the whole page."""
  page = Page(runs)
  sections = [
    (name, title, body) for name, (title, make) in SECTIONS.items() if (body := make(page))
  ]
  links = ''.join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
  bodies = ''.join(
    f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in sections
  )
  title = safe(', '.join(run.name for run in runs), 2_000)
  style = importlib.resources.files(__package__).joinpath('style.css').read_text(encoding='utf-8')
  return (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<meta name="color-scheme" content="light dark"><title>{title} - '
    f'molt_jax</title><style>{style}</style></head>\n'
    '<body><header><p class="kicker">molt_jax run '
    f'report</p><h1>{title}</h1>{_abstract(page)}</header><nav aria-label="sections">{links}</nav>'
    f'<main>{bodies}</main><footer>Written by <code>python -m molt_jax.report</code>. The method: '
    'Sun and Song, Robust Latent Representation '
    f'Tuning for Image-text Classification (2024).</footer></body></html>\n'
  )


def percent(value: float, digits: int = 1) -> str:
  return f'{100 * value:.{digits}f}'


def metric_name(run: Run) -> str:
  return {'accuracy': 'accuracy', 'f1_micro': 'micro F1'}[run.metric]


# ---- Headline ------------------------------------------------------------------------------------


def _abstract(page):
  run = page.runs[0]
  split, names = safe(run.evaluation['split']), {r.config.dataset.name for r in page.runs}
  data = safe(', '.join(sorted(names))) if names != {'table'} else 'a table of your own'
  classes = f', {len(run.predictions.class_names)} classes' if run.predictions else ''
  count = f'{len(page.runs)} runs' if len(page.runs) > 1 else 'One classifier'
  text = (
    f'{count} on two frozen towers, scored on the {split} split of {data} '
    f'({run.evaluation["num_examples"]:,} examples{classes}), with '
    'everything there and with each modality absent. An absent modality is never fed: its tower is '
    'not run.'
  )
  return f'<p class="abstract">{text}</p>' + (_tiles(run) if len(page.runs) == 1 else '')


def _tiles(run):
  tiles = []
  for name in run.conditions:
    score, error = run.score(name), run.error(name)
    value = '–' if score is None else f'{percent(score)}<small> %</small>'
    note = 'no example' if score is None else '' if error is None else f'± {196 * error:.1f}'
    tiles.append(
      f'<div class="tile {name}"><b>{value}</b><span>{LABELS[name]}</span><i>{note}</i></div>'
    )
  return f'<div class="tiles">{"".join(tiles)}</div>'


def headline(page):
  """Scores by absence, against the baseline where there is one, and the same as dots."""
  runs = page.runs
  conditions = [name for name in LABELS if any(name in run.conditions for run in runs)]
  baseline = next((run for run in runs if run.is_baseline), None)
  rows = []
  for run in runs:
    kind = ' <span class="tag">baseline</span>' if run is baseline else ''
    rows.append([f'{safe(run.name)}{kind}', *(_score_cell(run, name) for name in conditions)])
    if baseline is not None and run is not baseline:
      rows.append(
        [
          '<span class="sub">minus the baseline, points</span>',
          *(_difference_cell(run, baseline, name) for name in conditions),
        ]
      )
  split, metric = safe(runs[0].evaluation['split']), metric_name(runs[0])
  note = (
    f'{metric[0].upper()}{metric[1:]} in percent on the {split} split, ± half the 95 % interval '
    'over examples; below it macro F1. '
    'Training noise is not in the interval: repeat runs with other seeds for that.'
  )
  if baseline is not None:
    note += ' Differences are paired by example; bold where the interval excludes zero.'
  p = runs[0].predictions
  if p and not p.multi_label and (support_k := p.support(p.conditions[0])).any():
    frequent = percent(support_k.max() / support_k.sum())
    note += f' Always answering the most frequent class: {frequent}.'
  table = page.table(['run', *(LABELS[name] for name in conditions)], rows, note)
  if len(runs) == 1:
    return table
  points = [(figures.name_of(run.name), _points(run)) for run in runs]
  chart = page.draw(
    figures.dots(points, x=f'{metric}, %'), 'scores by run and absence', height=90 + 48 * len(runs)
  )
  return _beside(
    table, page.figure([chart], 'The same scores; bars are 95 % intervals over examples.')
  )


def _points(run):
  """Label of a condition -> (score, standard error), in percent, where there is a score."""
  scores = {name: run.score(name) for name in run.conditions}
  return {
    LABELS[name]: (100 * score, 100 * (run.error(name) or 0))
    for name, score in scores.items()
    if score is not None
  }


def _beside(*parts):
  """Parts next to each other where the screen is wide enough."""
  return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _title(page, run):
  """Of a run's drawing: its name, where there are others."""
  return figures.name_of(run.name) if len(page.runs) > 1 else ''


def _score_cell(run, name):
  if name not in run.conditions:
    return '<span class="none">not evaluated</span>'
  score, macro, error = run.score(name), run.score(name, 'f1_macro'), run.error(name)
  if score is None:
    return NO_EXAMPLE
  interval = f' <small>± {196 * error:.1f}</small>' if error is not None else ''
  below = '' if macro is None else f'<br><small>macro F1 {percent(macro)}</small>'
  return f'<b>{percent(score)}</b>{interval}{below}'


def _difference_cell(run, baseline, name):
  difference = run.difference(baseline, name)
  if difference is None:
    return ''
  value, error = difference
  text = f'{100 * value:+.1f}' + (
    f' <small>± {196 * error:.1f}</small>' if error is not None else ''
  )
  return f'<b>{text}</b>' if error is not None and abs(value) > 1.96 * error else text


# ---- Curves --------------------------------------------------------------------------------------


def robustness(page):
  """Score against the share of rows that lack a modality."""
  runs = [
    run for run in page.runs if run.predictions and len(run.predictions.conditions) == len(LABELS)
  ]
  if not runs:
    alone = any(len(resolved.modalities(run.config)) == 1 for run in page.runs)
    return (
      '<p class="none">Nothing to show: one modality alone.</p>'
      if alone
      else _missing(page, 'evaluate --workdir=DIR')
    )
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
  drawn = [
    page.draw(
      figures.curves(
        {name: (100 * RATES, curve) for name, curve in curves[kind].items()}, title=title, **axes
      ),
      f'score by missing rate, {title}',
    )
    for kind, title in KINDS.items()
  ]
  return page.figure(
    drawn,
    (
      'A growing share of the complete rows loses a modality, drawn by a hash of (seed, split, '
      "id): the field's missing-rate protocol. Rows do not "
      'influence each other, so each point is put together from the recorded predictions of every '
      'row under each absence.'
    ),
  )


def _rate_curve(run, kind):
  """Scores at RATES in percent; NaN where no example is left to score."""
  scores = [run.predictions.missing_rate(rate, kind) for rate in RATES]
  return [100 * score.get(run.metric, np.nan) for score in scores]


CHECKPOINTS = {
  'best': 'the checkpoint of the best mean validation score over the absences',
  'latest': 'the latest checkpoint',
}  # By `eval.select`.


def training(page):
  """Loss, validation scores, canonical correlations over steps."""
  runs = [run for run in page.runs if run.lines('train')]
  if not runs:
    return ''
  one = len(runs) == 1
  loss = {run.name: _series(run.lines('train'), 'loss') for run in runs}
  if one:
    lines = runs[0].lines('train')
    parts = {
      'loss': 'loss',
      'loss_ce': 'cross-entropy',
      'loss_distill': 'distillation',
      'loss_cca': 'CCA',
    }
    loss = {
      label: _series(lines, key)
      for key, label in parts.items()
      if any(key in line for line in lines)
    }
  scores = {
    label: {run.name: curve for run in runs if (curve := _validation(run, name))}
    for name, label in LABELS.items()
  }
  scores = {f'validation, {label}': series for label, series in scores.items() if series}
  if one:
    scores = {
      'validation': {
        title.split(', ')[1]: curve for title, series in scores.items() for curve in series.values()
      }
    }
  graphs = [figures.curves(loss, title='training loss', x='step', y='loss')]
  graphs += [
    figures.curves(series, title=title, x='step', y=f'{metric_name(runs[0])}, %', marker=True)
    for title, series in scores.items()
  ]
  graphs += _correlation_curves(runs)
  size = figures.SMALL if len(graphs) % 4 == 0 else {}
  return page.figure(
    [page.draw(graph, 'a curve over training steps', **size) for graph in graphs],
    (
      f'Logged while training. Evaluated is {_evaluated(runs)}. Canonical correlations are means '
      'over the directions that L_CCA compares: of its own '
      'estimate, and held out, on validation pairs along directions fitted in training.'
    ),
  )


def _evaluated(runs):
  steps = {
    select: [str(run.evaluation['step']) for run in runs if run.config.eval.select == select]
    for select in CHECKPOINTS
  }
  return ' and '.join(
    f'{CHECKPOINTS[select]} (step {", ".join(found)})' for select, found in steps.items() if found
  )


def _series(lines, key):
  found = {line['step']: _number(line[key]) for line in lines if key in line}
  return list(found), list(found.values())


def _number(value):
  """The number that a log has there; NaN where it has none that can be drawn."""
  return float(value) if value is not None and checked.is_number(value) else np.nan


def _layers(values):
  """A number a layer."""
  return np.array([_number(value) for value in values])


def _validation(run, name):
  lines = [line for line in run.lines('validation') if run.metric in line.get(name, ())]
  scores = [100 * _number(line[name][run.metric]) for line in lines]
  return ([line['step'] for line in lines], scores) if lines else None


def _correlation_curves(runs):
  for title, kind, get in (
    ('correlation, of the loss', 'train', lambda line: line.get('cca_correlation')),
    (
      'correlation, held out',
      'validation',
      lambda line: line.get('pairs', {}).get('held_out_correlation'),
    ),
  ):
    found = {
      run.name: [(line['step'], _layers(get(line))) for line in run.lines(kind) if get(line)]
      for run in runs
    }
    series = {}
    for name, lines in found.items():
      if lines:
        series |= _by_layer(lines) if len(runs) == 1 else {name: _over_layers(lines)}
    values = [value for _, y in series.values() for value in y if np.isfinite(value)]
    if values:
      low = min(0.0, *values)
      yield figures.curves(
        series, title=title, x='step', y='mean correlation', ylim=(low - 0.03, 1.03)
      )


def _by_layer(lines):
  """One curve a layer, of (step, a number a layer)."""
  count = min(len(value_l) for _, value_l in lines)
  steps = [step for step, _ in lines]
  return {f'layer {i + 1}': (steps, [value_l[i] for _, value_l in lines]) for i in range(count)}


def _over_layers(lines):
  """The mean over the layers that have a number."""
  finite = [(step, value_l[np.isfinite(value_l)]) for step, value_l in lines]
  finite = [(step, value_l.mean()) for step, value_l in finite if len(value_l)]
  return [step for step, _ in finite], [value for _, value in finite]


# ---- The common space ----------------------------------------------------------------------------


def _with_pairs(page, draw, caption):
  """One figure a layer, run by run; a run whose method pools no pairs says so."""
  parts = []
  for run in page.runs:
    if run.pairs is None:
      why = (
        'late fusion has no common space'
        if run.is_baseline
        else 'no pairs are recorded (a specialist has none; training writes them)'
      )
      parts.append(page.for_run(run, f'<p class="none">Nothing to show: {why}.</p>'))
      continue
    drawn = [
      page.draw(drawing, f'{run.name}, layer {i + 1}', **figures.SMALL)
      for i, drawing in enumerate(figures.of_layers(draw, run.pairs))
    ]
    parts.append(page.for_run(run, page.figure(drawn, caption(run.pairs))))
  return ''.join(parts)


def spectrum(page):
  """Canonical correlations by layer: what one batch claims, what training pairs show, what holds on
  others.
  """
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


def gap(page):
  """The pooled pairs in the plane."""
  return _with_pairs(
    page,
    figures.plane,
    lambda pairs: (
      f'Pooled vectors of {pairs.plane_lnmp.shape[1]} {safe(pairs.split)} pairs, brought to unit '
      'length, on the two leading principal axes of both '
      f'together ({", ".join(percent(share, 0) for share in pairs.share_l)} % of the variance). A '
      'line joins the two of a pair; the gap is the '
      'distance between the centroids of the two clouds in all dimensions, from 0 to 2.'
    ),
  )


def layer_weights(page):
  """The learned M."""
  runs = [run for run in page.runs if run.pairs is not None]
  drawn = [
    page.draw(
      figures.bars(
        run.pairs.layer_weights_l, title=_title(page, run), x='layer', y='M', reference=1.0
      ),
      f'{run.name}: M by layer',
      height=190,
    )
    for run in runs
  ]
  fixed = [run.name for run in runs if not run.config.molt.layer_weights]
  note = f' Not learned in {safe(", ".join(fixed), 2_000)}.' if fixed else ''
  caption = f'Weight of each layer in H<sub>r</sub> (eq. 5). Dashed: where training starts.{note}'
  return (
    page.figure(drawn, caption)
    or '<p class="none">Nothing to show: late fusion weighs no layers.</p>'
  )


# ---- Predictions ---------------------------------------------------------------------------------


def _missing(page, command):
  return _not_recorded(', '.join(run.name for run in page.runs), command)


def _not_recorded(name, command):
  command = f'<code>python -m molt_jax.{safe(command, 2_000)}</code>'
  return f'<p class="none">Not recorded for {safe(name, 2_000)}. {command} writes it.</p>'


def _not_recorded_of(run):
  return _not_recorded(run.name, f'evaluate --workdir={shlex.quote(str(run.folder))}')


def _each(page, make):
  return ''.join(
    page.for_run(run, make(page, run) if run.predictions else _not_recorded_of(run))
    for run in page.runs
  )


def classes(page):
  """Confusion matrices of few classes; of many, F1 of the most frequent and what is taken for
  what.
  """
  return _each(page, _classes)


def _classes(page, run):
  p = run.predictions
  conditions = [name for name in p.conditions if p.scores(name)['num_examples']]
  if not conditions:
    return '<p class="none">Nothing to show: no example to score.</p>'
  if not p.multi_label and len(p.class_names) <= MAX_MATRIX:
    size = max(figures.WIDTH, 24 * len(p.class_names) + 110)
    drawn = [
      page.draw(
        figures.confusion(p.confusion(name), p.class_names, title=LABELS[name]),
        f'{run.name}: confusion matrix, {LABELS[name]}',
        width=size,
        height=size,
      )
      for name in conditions
    ]
    return page.figure(
      drawn,
      (
        'Confusion matrices: rows are truths, the shade is the share of the row, numbers are '
        'examples; blue is right.'
      ),
    )
  support_k = p.support()
  order = [k for k in np.argsort(-support_k, kind='stable') if support_k[k]]
  if not order:
    return '<p class="none">Nothing to show: no example carries a label.</p>'
  f1 = {name: p.class_f1(name) for name in conditions}
  rows = [
    (
      f'{figures.name_of(p.class_names[k])} ({support_k[k]})',
      {LABELS[name]: f1_k[k] for name, f1_k in f1.items()},
    )
    for k in order[:MAX_CLASSES]
  ]
  drawn = page.draw(
    figures.class_dots(rows, x='F1'), f'{run.name}: F1 by class', height=60 + 17 * len(rows)
  )
  shown = (
    f'the {len(rows)} most frequent of {len(order)} classes'
    if len(rows) < len(order)
    else 'each class'
  )
  body = page.figure([drawn], f'F1 of {shown}, with the number of examples that carry it.')
  return body if p.multi_label else _beside(body, _confusions(page, p))


def _confusions(page, p):
  support_k, condition = p.support(p.conditions[0]), p.conditions[0]
  rows = [
    [safe(p.class_names[t]), safe(p.class_names[q]), str(count), str(support_k[t])]
    for t, q, count in p.confusions(condition)[:MAX_CONFUSIONS]
  ]
  caption = f'The most frequent confusions, {LABELS[condition]}.'
  return page.table(['true', 'taken for', 'times', 'of'], rows, caption) if rows else ''


def calibration(page):
  """Whether a confidence is a frequency."""
  runs = [run for run in page.runs if run.predictions and run.predictions.counted_cn.any()]
  drawn = [
    page.draw(
      figures.reliability(run.predictions, LABELS, title=_title(page, run)),
      f'{run.name}: reliability',
      height=280,
    )
    for run in runs
  ]
  return page.figure(
    drawn,
    (
      'Reliability: examples are sorted into ten equal bins of confidence. On the diagonal a '
      'prediction of 70 % is right in 70 % of the cases; '
      'below it the classifier is too sure of itself. ECE: mean distance from the diagonal over '
      'examples.'
    ),
  ) or _missing(page, 'evaluate --workdir=DIR')


def mistakes(page):
  """The worst mistakes under each absence."""
  return _each(page, lambda page, run: _mistakes(run))


def _mistakes(run):
  if not run.mistakes:
    return _not_recorded_of(run)
  parts = []
  for name, rows in run.mistakes['conditions'].items():
    c = run.predictions.conditions.index(name)
    counted_n = run.predictions.counted_cn[c]
    wrong, count = int(np.sum(counted_n & ~run.predictions.right_cn[c])), int(counted_n.sum())
    said = f'{wrong:,} mistakes of {count:,}' if count else 'no example'
    cards = ''.join(_card(run, name, row) for row in rows)
    parts.append(
      f'<h4>{LABELS[name].capitalize()} <small>{said}</small></h4><div class="cards">{cards}</div>'
    )
  return ''.join(parts) + (
    '<p class="caption">The mistakes of the greatest cross-entropy. What is crossed out was there, '
    'and was not fed.</p>'
  )


def _card(run, condition, row):
  p, example = run.predictions, run.mistakes['examples'][str(row)]
  c = p.conditions.index(condition)
  probability_k = p.probability_cnk[c, row]
  true = set(np.flatnonzero(p.label[row])) if p.multi_label else {int(p.label[row])}
  shown = [*np.argsort(-probability_k, kind='stable')[:3].tolist(), *sorted(true)[:MAX_CLASSES]]
  shown = list(dict.fromkeys(shown))
  bars = ''.join(
    f'<li class="{"true" if k in true else "wrong"}"><span>{safe(p.class_names[k])}</span>'
    f'<b>{_probability(probability_k[k])}</b>'
    f'<i style="width:{100 * float(probability_k[k]):.1f}%"></i></li>'
    for k in shown
  )
  shown = _image(example, condition) + _text(example, condition)
  return f'<article class="card"><div class="shown">{shown}</div><ol>{bars}</ol></article>'


def _probability(value):
  return (
    f'{100 * value:.0f} %'
    if value >= 0.01
    else f'{100 * value:.1f} %'
    if value >= 0.001
    else '&lt; 0.1 %'
  )


def _image(example, condition):
  if not example['image']:
    return '<div class="blank">no image</div>'
  url = checked.picture(example['image'])
  if url is None:
    return '<div class="blank">left out: not a small PNG, JPEG or WebP picture</div>'
  gone = ' class="gone"' if condition == 'image_absent' else ''
  picture = f'<img{gone} src="{html.escape(url)}" alt="example {safe(example["id"])}">'
  return f'<div class="thumb"{gone and " data-absent"}>{picture}</div>'


def _text(example, condition):
  if not example['text']:
    return '<p class="none">no text</p>'
  text = safe(' '.join(example['text'].split()), MOST_SHOWN)
  return f'<p><s>{text}</s></p>' if condition == 'text_absent' else f'<p>{text}</p>'


# ---- Set-up --------------------------------------------------------------------------------------


def setup(page):
  """What was run on what: a column a run; then what was chosen other than by default, and every
  field.
  """
  rows = [[title, *(cell(run) for run in page.runs)] for title, cell in FACTS.items()]
  table = page.table(['', *(safe(run.name) for run in page.runs)], rows, 'The runs.')
  changed = {
    run.name: dict(
      line.split(': ', 1) for line in resolved.differences(CLASSIFIER.default(), run.config)
    )
    for run in page.runs
  }
  names = [
    name for name, _ in CLASSIFIER.items() if any(name in fields for fields in changed.values())
  ]
  values = [[f'<code>{name}</code>', *(_field(run, name) for run in page.runs)] for name in names]
  head = ['field', *(safe(run.name) for run in page.runs)]
  chosen = page.table(head, values, 'Fields of the config that differ from their defaults.')
  whole = ''.join(
    f'<details><summary>Every field of {safe(run.name)}</summary><pre>{_whole(run)}</pre></details>'
    for run in page.runs
  )
  return table + chosen + whole


def _field(run, name):
  return f'<code>{safe(CLASSIFIER.get(run.config, name))}</code>'


def _whole(run):
  """The config, with its line breaks."""
  text = resolved.to_json(run.config)[:MOST_CONFIG]
  return '\n'.join(safe(line, MOST_CONFIG) for line in text.split('\n'))


def _dataset(run):
  return safe(run.config.dataset.name)


def _sizes(run):
  sizes = run.about.get('examples', {})
  return safe(', '.join(f'{count:,} {split}' for split, count in sizes.items())) or '-'


def _parameters(run):
  return f'{run.about["parameters"]:,}' if 'parameters' in run.about else '-'


def _device(run):
  if 'device' not in run.about:
    return '-'
  return safe(f'{run.about.get("devices", 1)} x {run.about["device"]}')


def _seconds(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours} h {minutes:02d} min'
    if hours
    else f'{minutes} min {seconds:02d} s'
    if minutes
    else f'{seconds} s'
  )


def _time(run):
  calls = run.about.get('calls')
  if not calls:
    return '-'
  return _seconds(sum(call['seconds'] for call in calls)) + (
    f' in {len(calls)} calls' if len(calls) > 1 else ''
  )


def _peak(run, key):
  peaks = [call[key] for call in run.about.get('calls', ()) if call.get(key)]
  return f'{max(peaks) / 1e9:.2f} GB' if peaks else '-'


def _tower(run, modality):
  tower = run.evaluation['backbones'].get(modality)
  if not tower:
    return 'not used'
  sha256 = safe(tower['sha256'][:12])
  return f'<code>{safe(tower["path"])}</code><br><small>sha256 {sha256}</small>'


def _speed(run):
  _, rates = _series(run.lines('train'), 'images_per_second')
  rates = [rate for rate in rates if np.isfinite(rate)]
  return f'{np.median(rates):,.0f} examples/s' if rates else '-'


def _absence(run):
  c = run.config.missing
  trained = (
    'three views'
    if c.views
    else f'modality dropout {c.train_dropout:g}'
    if c.train_dropout
    else 'complete inputs only'
  )
  gaps = (
    f', {percent(c.train_rate, 0)} % of the training rows lack {c.train_type}'
    if c.train_rate
    else ''
  )
  return safe(f'{c.strategy}; trained on {trained}{gaps}')


def _command(run):
  command = f'python -m molt_jax.evaluate --workdir={shlex.quote(str(run.folder))}'
  return f'<code>{safe(command, 5_000)}</code>'


FACTS: Mapping[str, Callable[[Run], str]] = {
  'method': lambda run: safe(run.config.method),
  'absence': _absence,
  'data': lambda run: f'{_dataset(run)} <small>{safe(run.config.dataset.path)}</small>',
  'examples': _sizes,
  'image tower': functools.partial(_tower, modality='image'),
  'text tower': functools.partial(_tower, modality='text'),
  'trained parameters': _parameters,
  'epochs, batch': lambda run: f'{run.config.train.epochs:g}, {run.config.train.batch_size}',
  'evaluated step': lambda run: str(run.evaluation['step']),
  'seed': lambda run: str(run.config.seed),
  'device': _device,
  'time': lambda run: f'{_time(run)} <small>training and test</small>',
  'speed': _speed,
  'peak memory of the process': functools.partial(_peak, key='peak_host_bytes'),
  'peak memory of a device': functools.partial(_peak, key='peak_device_bytes'),
  'versions': lambda run: safe(', '.join(map(' '.join, run.evaluation['versions'].items()))),
  'evaluate again': _command,
}

SECTIONS: Mapping[str, tuple[str, Callable[[Page], str]]] = {
  'headline': ('Results', headline),
  'robustness': ('Missing modalities', robustness),
  'training': ('Training', training),
  'spectrum': ('Canonical correlations', spectrum),
  'layers': ('Layer weights M', layer_weights),
  'gap': ('Modality gap', gap),
  'classes': ('Classes', classes),
  'calibration': ('Calibration', calibration),
  'mistakes': ('Worst mistakes', mistakes),
  'setup': ('Set-up', setup),
}
