"""What sections are made of: escaped text, and figures and tables with their numbers.

Every string of a run's files goes through `safe`.
"""

import html
import importlib.resources
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.reporting import checked
from molt_jax.reporting.runs import Run
from molt_jax.reporting.svg import name_of, svg
from molt_jax.runtime import terminal

MOST_SHOWN = 300  # Characters of a name.
# Nothing is fetched and nothing is run, whatever a file of a run says.
POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
  "form-action 'none'"
)
NO_EXAMPLE = '<span class="none">no example</span>'


Series = tuple[list[int], list[float]]  # Steps and a number at each.


def safe(text: Any, most: int = MOST_SHOWN) -> str:
  """Returns any text as HTML, for an element or a quoted attribute: one line, and not too long."""
  return html.escape(terminal.clean(text, most))


def whole(
  title: str, kicker: str, abstract: str, sections: Mapping[str, tuple[str, str]], command='report'
) -> str:
  """Returns a page: one file that needs nothing else.

  Args:
    title: as text.
    kicker: what kind of page it is.
    abstract: HTML at the beginning.
    sections: id -> (title, HTML).
    command: that writes it.
  """
  title = safe(title, 2_000)
  links = [f'<a href="#{name}">{head}</a>' for name, (head, _) in sections.items()]
  bodies = [
    f'<section id="{name}"><h2>{head}</h2>{body}</section>'
    for name, (head, body) in sections.items()
  ]
  style = importlib.resources.files(__package__).joinpath('style.css').read_text(encoding='utf-8')
  return ''.join(
    [
      '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
      f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta name="color-scheme" content="light dark">',
      f'<title>{title} - molt_jax</title><style>{style}</style></head>\n',
      f'<body><header><p class="kicker">{kicker}</p><h1>{title}</h1>{abstract}',
      f'</header><nav aria-label="sections">{"".join(links)}</nav><main>{"".join(bodies)}</main>',
      f'<footer>Written by <code>python -m molt_jax.{command}</code>. The method: Sun and Song, ',
      'Robust Latent Representation Tuning for Image-text Classification (2024).',
      '</footer></body></html>\n',
    ]
  )


class Page:
  """Numbers figures and tables in the order of their making."""

  def __init__(self, runs: Sequence[Run]):
    self.runs = runs
    self._drawings = self._figures = self._tables = 0

  def draw(self, draw: Callable[[Any], None], label: str, **size: int) -> str:
    """Returns one drawing; `label` says what it shows to those who cannot see it."""
    self._drawings += 1
    drawing = svg(draw, label, number=self._drawings, **size)
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
    body = ''.join(_table_row(name, cells) for name, *cells in rows)
    caption = f'<p class="caption"><b>Table {self._tables}.</b> {caption}</p>'
    table = f'<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'{caption}<div class="scroll" tabindex="0">{table}</div>'

  def for_run(self, run: Run, body: str) -> str:
    """A run's part of a section, under its name where there are several."""
    return f'<h3>{safe(run.name)}</h3>{body}' if len(self.runs) > 1 else body


def _table_row(name: str, cells: Sequence[str]) -> str:
  rest = ''.join(f'<td>{cell}</td>' for cell in cells)
  return f'<tr><th scope="row">{name}</th>{rest}</tr>'


def percent(value: float, digits: int = 1) -> str:
  """A share as a number of percent."""
  return f'{100 * value:.{digits}f}'


def metric_name(run: Run) -> str:
  """The headline score as it is called in text."""
  return {'accuracy': 'accuracy', 'f1_micro': 'micro F1'}[run.metric]


def beside(*parts: str) -> str:
  """Parts next to each other where the screen is wide enough."""
  return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def name_where_several(page: Page, run: Run) -> str:
  """The run's name for a drawing; empty where there is no other run."""
  return name_of(run.name) if len(page.runs) > 1 else ''


def not_recorded(page: Page, command: str) -> str:
  """Says that no run has it, and which command writes it."""
  return _not_recorded_for(', '.join(run.name for run in page.runs), command)


def _not_recorded_for(name: str, command: str) -> str:
  command = f'<code>python -m molt_jax.{safe(command, 2_000)}</code>'
  return f'<p class="none">Not recorded for {safe(name, 2_000)}. {command} writes it.</p>'


def not_recorded_of(run: Run) -> str:
  """Says that the run does not have it, and which command writes it."""
  return _not_recorded_for(run.name, f'evaluate --workdir={shlex.quote(str(run.folder))}')


def for_each_run(page: Page, make: Callable[[Page, Run], str]) -> str:
  """One part after the other; a run without predictions says so."""
  parts = []
  for run in page.runs:
    body = make(page, run) if run.predictions else not_recorded_of(run)
    parts.append(page.for_run(run, body))
  return ''.join(parts)


def series_of(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
  """The values of one key over the steps of a log."""
  found = {line['step']: number_of(line[key]) for line in lines if key in line}
  return list(found), list(found.values())


def number_of(value: Any) -> float:
  """The number that a log has there; NaN where it has none that can be drawn."""
  return float(value) if value is not None and checked.is_number(value) else np.nan
