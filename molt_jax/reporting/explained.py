"""The page that `molt explain` writes: what image and text brought to the answers to a split."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.evaluation import contributions, harm
from molt_jax.evaluation.contributions import Explained
from molt_jax.evaluation.records import Predictions
from molt_jax.reporting import examples
from molt_jax.reporting.document import Page, percent, safe, whole

MOST_CLASSES = 60  # Of the table.
# Of examples: title -> (modality, its share times this is sorted from above).
KINDS = {
  'Rows that the image helped most': ('image', 1),
  'Rows that the image hurt most': ('image', -1),
  'Rows that the text helped most': ('text', 1),
  'Rows that the text hurt most': ('text', -1),
}
CARDS = 6  # Of each kind.


class Content(NamedTuple):
  """What the page is made of.

  Attributes:
    name: of the run.
    split: of the examples.
    found: what each modality brought.
    predictions: whose rows `found` names.
    shown: row of `found` -> the example, `recorder.exhibit`.
    parts: row of `found` -> weights of its words and regions, `occlusion.weights`, and the label.
  """

  name: str
  split: str
  found: Explained
  predictions: Predictions
  shown: Mapping[int, Mapping[str, Any]]
  parts: Mapping[int, Mapping[str, Any]]


def chosen(found: Explained) -> dict[str, list[int]]:
  """Returns title -> the rows of `found` that the page shows, of complete examples."""
  rows = np.flatnonzero(found.complete_n)
  picked = {}
  for title, (modality, sign) in KINDS.items():
    share_n = sign * found.share_nm[rows, MODALITIES.index(modality)]
    order = np.argsort(-share_n, kind='stable')[:CARDS]
    picked[title] = [int(rows[n]) for n in order if share_n[n] > 0]
  return picked


def render(content: Content) -> str:
  """Returns the whole page."""
  page, found = Page([]), content.found
  result = contributions.summary(found)
  count = len(found.rows)
  abstract = (
    f'<p class="abstract">{count:,} labelled examples of the {safe(content.split)} split, '
    f'{result["complete"]:,} of them with image and text. Each was answered with everything, by '
    'its image alone and by its text alone. What a modality brought to the probability of the true '
    'label, against the share of that label in training, is its Shapley value in nats: +0.69 '
    'doubles the probability, below zero the modality spoke against the truth.</p>'
  )
  if not result['complete']:
    body = '<p class="none">No example has both modalities: there is nothing to part.</p>'
    sections = {'all': ('Image and text', body)}
    return whole(f'{content.name}: explained', 'molt_jax', abstract, sections, 'explain')
  sections = {
    'all': ('Image and text', _overall(page, content, result)),
    'classes': ('By class', _classes(page, content)),
    'rows': ('Rows', _rows(content)),
  }
  return whole(f'{content.name}: explained', 'molt_jax', abstract, sections, 'explain')


def _overall(page: Page, content: Content, result: Mapping[str, Any]) -> str:
  rows = []
  for modality in MODALITIES:
    of = result[modality]
    rows.append(
      [
        modality,
        percent(result['accuracy'][modality]),
        _nats(result['share'][modality]),
        f'{of["helps"]:,}',
        f'{of["hurts"]:,}',
        _p(of['p']),
      ]
    )
  head = ['', 'right alone, %', 'mean share, nats', 'rows it helps', 'rows it hurts', 'McNemar p']
  caption = (
    f'Of {result["complete"]:,} examples with both, {percent(result["accuracy"]["both"])} % are '
    'right with both. A modality helps a row that is right with it and wrong by the other alone, '
    'and hurts one the other way round; p is of the exact test that it does both equally often.'
  )
  lines = [one.line() for one in harm.found(content.predictions)]
  notes = ''.join(f'<p>{safe(line[0].upper() + line[1:], 500)}.</p>' for line in lines)
  return notes + page.table(head, rows, caption)


def _classes(page: Page, content: Content) -> str:
  parts = contributions.by_class(content.found, content.predictions)
  rows = []
  for name, result in list(parts.items())[:MOST_CLASSES]:
    accuracy = result['accuracy']
    shares = [_nats(result['share'][modality]) for modality in MODALITIES]
    changes = [f'{result[m]["helps"]} / {result[m]["hurts"]}' for m in MODALITIES]
    right = [percent(accuracy[key], 0) for key in ('both', *MODALITIES)]
    rows.append([safe(name), f'{result["complete"]:,}', *right, *shares, *changes])
  head = ['class', 'examples', 'both, %', 'image, %', 'text, %', 'image, nats', 'text, nats']
  head += ['image helps / hurts', 'text helps / hurts']
  more = f' The {MOST_CLASSES} most frequent of {len(parts)}.' if len(parts) > MOST_CLASSES else ''
  caption = f'Right with both and with each alone, mean shares, rows helped and hurt.{more}'
  return page.table(head, rows, caption)


def _rows(content: Content) -> str:
  parts = []
  for title, rows in chosen(content.found).items():
    made = [_card(content, row) for row in rows]
    body = examples.cards(made) if made else '<p class="none">None.</p>'
    parts.append(f'<h4>{title}</h4>{body}')
  if content.parts:
    parts.append(
      '<p class="caption">Words and regions: the stronger the colour, the greater the weight; blue '
      'speaks for the label that the model gives, orange against it. A weight is what its '
      'log-probability loses where the part is taken away: a word left out, a region painted in '
      'the mean colour of the picture.</p>'
    )
  return ''.join(parts)


def _card(content: Content, row: int) -> str:
  found, p = content.found, content.predictions
  n = int(found.rows[row])
  true = np.flatnonzero(p.label[n]) if p.multi_label else [p.label[n]]
  names = ', '.join(p.class_names[k] for k in true) or '(none)'
  lines = [f'<b>{safe(names)}</b>']
  for v, name in enumerate(('with both', 'image alone', 'text alone')):
    probability = float(np.exp(found.value_vn[v, row]))
    kind = 'true' if found.right_vn[v, row] else 'wrong'
    note = f'{100 * probability:.1f} %'
    if not found.right_vn[v, row] and not p.multi_label:
      note += f', says {safe(p.class_names[int(p.probability_cnk[v, n].argmax())], 40)}'
    lines.append(examples.bar(name, probability, note, kind=kind))
  prior = f'prior {100 * float(np.exp(found.nothing_n[row])):.1f} %'
  image, text = (_nats(value) for value in found.share_nm[row])
  lines.append(f'<small>{prior}; image {image}, text {text} nats</small>')
  weights = content.parts.get(row, {})
  over = _grid(weights.get('regions'))
  return examples.card(content.shown[row], lines, over=over, words=_words(weights.get('words')))


def _grid(regions: Sequence[Sequence[float]] | None) -> str:
  """Regions as a grid over the picture, the colour by weight."""
  if not regions:
    return ''
  most = max(abs(weight) for row in regions for weight in row) or 1.0
  cells = ''.join(_cell(weight, most) for row in regions for weight in row)
  return f'<div class="regions" style="--side:{len(regions)}">{cells}</div>'


def _cell(weight: float, most: float) -> str:
  sign = 'for' if weight > 0 else 'against'
  share = abs(weight) / most
  return f'<i class="{sign}" style="opacity:{0.7 * share:.2f}" title="{weight:+.2f}"></i>'


def _words(words: Sequence[Mapping[str, Any]] | None) -> str:
  """A text whose words are coloured by weight."""
  if not words:
    return ''
  most = max(abs(x['weight']) for x in words) or 1.0
  parts = []
  for x in words:
    sign = 'for' if x['weight'] > 0 else 'against'
    share = abs(x['weight']) / most
    style = f'--share:{100 * share:.0f}%'
    title = f'{x["weight"]:+.2f}'
    word = safe(x['word'], 60)
    parts.append(f'<span class="word {sign}" style="{style}" title="{title}">{word}</span>')
  return f'<p>{" ".join(parts)}</p>'


def _nats(value: float) -> str:
  return f'{value:+.2f}'.replace('-', '−')


def _p(value: float) -> str:
  return f'{value:.2f}' if value >= 0.01 else f'{value:.0e}'
