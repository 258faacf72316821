"""What image and text brought to the answers of a run: `python -m molt_jax.explain --workdir=DIR`.

Writes explain.html, one page that opens from disk; explain.json, what holds over the split and by
class; explain.csv, a line for each labelled example: its true label, the log-probability of that
with everything and by each modality alone, and what each brought (`evaluation/contributions.py`).
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('explain', sys.argv[1:]))

import argparse
import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from molt_jax import predict
from molt_jax.config import resolved
from molt_jax.data.modalities import CONDITIONS, KEPT
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.evaluation import calibration, contributions, harm, scoring, trained
from molt_jax.evaluation.contributions import Explained
from molt_jax.evaluation.recorder import PredictionRecorder, exhibit
from molt_jax.evaluation.records import Predictions
from molt_jax.features import opening
from molt_jax.reporting import explained
from molt_jax.runtime import atomic, console, logbook, terminal
from molt_jax.training import workdir as workdirs


def run(
  workdir: pathlib.Path,
  *,
  split: str = 'test',
  table: str | None = None,
  occlude: int = 6,
  out: str | pathlib.Path | None = None,
) -> dict[str, Any]:
  """Explains the answers to a split; writes the page, what it shows, and a line an example.

  Args:
    workdir: the run's folder.
    split: train, validation or test.
    table: another table with labels, in the place of a split.
    occlude: examples of the page whose words and regions are weighed.
    out: the page, by default explain.html in the run's folder or beside its file; the other files
      are beside it.

  Returns:
    `contributions.summary`, with 'by_class'.

  Raises:
    UserError: no run there, or one of a single modality; data or page are not as they must be.
  """
  page = pathlib.Path(out) if out else _page_of(workdir)
  opened = _open(workdir)
  source, _ = _split(opened, split, table)
  check_out(page)
  recorder = answer(opened, source, 'explaining')
  facts = {'step': opened.meta['step'], 'config_hash': '', 'seed': 0, 'data': ''}
  predictions = recorder.predictions(split=split, **facts)
  found = contributions.explain(predictions, calibration.of_run(opened).prior_k)
  rows = dict.fromkeys(row for of_kind in explained.chosen(found).values() for row in of_kind)
  places = {row: int(recorder.rows[found.rows[row]]) for row in rows}
  content = explained.Content(
    name=opened.workdir.name,
    split=split if table is None else pathlib.Path(table).name,
    found=found,
    predictions=predictions,
    shown={row: exhibit(source, place) for row, place in places.items()},
    parts=_parts(opened.workdir, source, {row: places[row] for row in list(rows)[:occlude]}),
  )
  result = contributions.summary(found)
  result['by_class'] = contributions.by_class(found, predictions)
  atomic.write(page, explained.render(content))
  atomic.write(page.with_suffix('.json'), logbook.to_json(result, indent=2) + '\n')
  atomic.write(page.with_suffix('.csv'), _as_csv(found, predictions))
  for one in harm.found(predictions):
    console.log(one.line())
  return result


def _page_of(workdir: pathlib.Path) -> pathlib.Path:
  """Returns where the page of a run, or of a file of molt export, is written by default."""
  return (workdir.parent if workdir.is_file() else workdir) / 'explain.html'


def _open(workdir: pathlib.Path) -> trained.Trained:
  """Opens a run on images and texts."""
  opened = trained.open(workdir)
  if len(resolved.modalities(opened.config)) < 2:
    raise UserError(
      f'--workdir: the run in {str(workdir)!r} knows {opened.config.dataset.modalities}s alone: '
      'there is nothing to part; give a run on images and texts'
    )
  return opened


def _split(run: trained.Trained, split: str, table: str | None) -> tuple[Source, Any]:
  return trained.open_split(run, split) if table is None else trained.open_other(run, table)


def check_out(page: pathlib.Path) -> None:
  """Raises UserError unless a page can be written there."""
  if not page.parent.is_dir() or page.is_dir():
    raise UserError(
      f'--out: {str(page)!r} is not a file in an existing folder; give the path of an HTML file'
    )
  workdirs.try_out(page.parent, flag='--out')


def answer(opened: trained.Trained, source: Source, title: str) -> PredictionRecorder:
  """Answers examples under all three missing patterns in one pass; towers run once."""
  conditions = scoring.conditions_of(KEPT, len(source))
  modalities = scoring.needed(conditions, source)
  opened.check_towers(modalities)
  wanted = {'examples': (source, source.present)}
  frozen, stored = opening.open_features(opened.assembly.extraction, wanted, modalities)
  multi_label = opened.config.dataset.multi_label
  names = opened.class_names
  recorder = PredictionRecorder(source, names, CONDITIONS, multi_label=multi_label)
  how = {'stored': stored['examples'], 'title': title, 'observers': [recorder]}
  scoring.Scorer(opened.assembly)(opened.variables(), frozen, source, conditions, **how)
  return recorder


def _parts(workdir: pathlib.Path, source: Source, places: dict[int, int]) -> dict[int, Any]:
  """Returns row -> weights of the words and regions of its example, for its likeliest label."""
  if not places:
    return {}
  console.log(f'words and regions of {len(places)} examples are taken away one by one')
  model, found = predict.load(workdir), {}
  for row, place in places.items():
    example = source.read(place, image=True)
    image = example['image'] if isinstance(example['image'], bytes) else None
    given = {'image': image, 'text': example['text'], 'errors': 'row'}
    found[row] = model.predict(**given, explain='parts').get('explanation', {})
  return found


def _as_csv(found: Explained, predictions: Predictions) -> str:
  """A line an example."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  names = ('both', 'image', 'text')
  head = [f'log_p_{name}' for name in names] + ['log_prior', 'image_share', 'text_share']
  writer.writerow(['row', *head, *(f'right_{name}' for name in names)])
  for n, row in enumerate(found.rows):
    numbers = [*found.value_vn[:, n], found.nothing_n[n], *found.share_nm[n]]
    cells = ['' if number != number else f'{number:.6g}' for number in numbers]
    writer.writerow([predictions.ids[row], *cells, *map(int, found.right_vn[:, n])])
  return file.getvalue()


def command(flags: argparse.Namespace) -> None:
  """The work of the command: prints the page's path."""
  folder = pathlib.Path(flags.workdir)
  page = pathlib.Path(flags.out) if flags.out else _page_of(folder)
  run(folder, split=flags.split, table=flags.table, occlude=flags.occlude, out=page)
  print(terminal.clean(page))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('explain', argv)
