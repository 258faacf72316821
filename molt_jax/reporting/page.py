"""The page: one self-contained HTML file, a function a section.

Every string of a run's files goes through `safe`; pictures are those that `checked.picture` knows.
"""

from collections.abc import Callable, Mapping, Sequence

from molt_jax.data.modalities import LABELS
from molt_jax.reporting.document import Page, percent, safe, whole
from molt_jax.reporting.runs import Run
from molt_jax.reporting.sections.curves import training
from molt_jax.reporting.sections.pooled import gap, layer_weights, spectrum
from molt_jax.reporting.sections.predictions import calibration, classes, mistakes, sets
from molt_jax.reporting.sections.results import headline, robustness
from molt_jax.reporting.sections.setup import setup


def render(runs: Sequence[Run]) -> str:
  """Returns the whole page."""
  page = Page(runs)
  sections = {}
  for name, (title, make) in SECTIONS.items():
    if body := make(page):
      sections[name] = title, body
  title = ', '.join(run.name for run in runs)
  return whole(title, 'molt_jax run report', _abstract(page), sections)


def _abstract(page: Page) -> str:
  """What was scored, on what; of one run its scores as well."""
  run = page.runs[0]
  split, names = safe(run.evaluation['split']), {r.config.dataset.name for r in page.runs}
  data = safe(', '.join(sorted(names))) if names != {'table'} else 'a table of your own'
  classes = f', {len(run.predictions.class_names)} classes' if run.predictions else ''
  count = f'{len(page.runs)} runs' if len(page.runs) > 1 else 'One classifier'
  text = (
    f'{count} on two frozen towers, scored on the {split} split of {data} '
    f'({run.evaluation["num_examples"]:,} examples{classes}), with everything there and with each '
    'modality absent. An absent modality is never fed: its tower is not run.'
  )
  return f'<p class="abstract">{text}</p>' + (_tiles(run) if len(page.runs) == 1 else '')


def _tiles(run: Run) -> str:
  """The headline scores, a tile a condition."""
  tiles = []
  for name in run.conditions:
    score, error = run.score(name), run.error(name)
    value, note = '–', 'no example'
    if score is not None:
      value = f'{percent(score)}<small> %</small>'
      note = '' if error is None else f'± {196 * error:.1f}'
    tiles.append(
      f'<div class="tile {name}"><b>{value}</b><span>{LABELS[name]}</span><i>{note}</i></div>'
    )
  return f'<div class="tiles">{"".join(tiles)}</div>'


SECTIONS: Mapping[str, tuple[str, Callable[[Page], str]]] = {
  'headline': ('Results', headline),
  'robustness': ('Missing modalities', robustness),
  'training': ('Training', training),
  'spectrum': ('Canonical correlations', spectrum),
  'layers': ('Layer weights M', layer_weights),
  'gap': ('Modality gap', gap),
  'classes': ('Classes', classes),
  'calibration': ('Calibration', calibration),
  'sets': ('Prediction sets', sets),
  'mistakes': ('Worst mistakes', mistakes),
  'setup': ('Set-up', setup),
}
