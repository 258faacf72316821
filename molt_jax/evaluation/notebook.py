"""What a notebook shows of answers and scores, which are dicts and lists as any other: tables."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from molt_jax.data import modalities
from molt_jax.runtime import terminal

_MOST_ROWS = 20


class Answer(dict):
  """What `predict` returns of one example."""

  def _repr_html_(self) -> str:
    had = ' and '.join(m for m in modalities.MODALITIES if self.get(m)) or 'nothing'
    rows = [(x['label'], f'{100 * x["probability"]:.1f} %') for x in self.get('labels', ())]
    return table(('label', 'probability'), rows, f'from {had}' + _error(self))


class Answers(list):
  """What `predict` returns of several."""

  def _repr_html_(self) -> str:
    rows = []
    for number, answer in enumerate(self[:_MOST_ROWS]):
      best = answer['labels'][0] if answer['labels'] else {'label': '', 'probability': 0.0}
      had = ' and '.join(m for m in modalities.MODALITIES if answer.get(m))
      chance = f'{100 * best["probability"]:.1f} %' if answer['labels'] else ''
      rows.append((number, best['label'], chance, had + _error(answer)))
    more = f'{len(self):,} examples' if len(self) > _MOST_ROWS else ''
    return table(('', 'label', 'probability', 'from'), rows, more)


class Scores(dict):
  """The content of evaluation.json."""

  def _repr_html_(self) -> str:
    return scores_table(self)


def _error(answer: Mapping[str, Any]) -> str:
  return f' ({answer["error"]})' if 'error' in answer else ''


def scores_table(evaluation: Mapping[str, Any]) -> str:
  """Returns the scores of an evaluation as a table, in percent."""
  results = evaluation['results']
  names = [n for n in ('accuracy', 'f1_micro', 'f1_macro', 'auroc') if _has(results, n)]
  rows = []
  for name, scores in results.items():
    cells = [f'{100 * scores[n]:.1f}' if n in scores else '-' for n in names]
    rows.append((modalities.in_words(name), scores['num_examples'], *cells))
  head = ('', 'examples', *(name.replace('_', ' ') for name in names))
  return table(head, rows, f'{evaluation["split"]} split, in percent')


def _has(results: Mapping[str, Mapping[str, Any]], name: str) -> bool:
  return any(name in scores for scores in results.values())


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = '') -> str:
  """Returns an HTML table; every cell is text, whatever it holds."""
  lines = [f'<caption>{_text(caption)}</caption>'] if caption else []
  lines.append('<tr>' + ''.join(f'<th>{_text(cell)}</th>' for cell in head) + '</tr>')
  for row in rows:
    lines.append('<tr>' + ''.join(f'<td>{_text(cell)}</td>' for cell in row) + '</tr>')
  return f'<table>{"".join(lines)}</table>'


def _text(cell: Any) -> str:
  return html.escape(terminal.clean(str(cell)))
