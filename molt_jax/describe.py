"""Looks at a data set before anything is trained: `molt describe products.csv`, `molt describe
--config=mm_imdb --config.dataset.path=FOLDER`.

Prints a table and writes describe.json and contact_sheet.png: counts, what examples have, class
balance, lengths of texts in words and in the text tower's tokens, sizes and formats of images, how
often the name of an example's class stands in its text (the leak that people argue about), and
pictures with their texts. Counts are of all examples; lengths, sizes and the leak are of `--sample`
evenly spaced ones a split. What may not be what is meant (`data/checks.py`) is a line each.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('describe', sys.argv[1:]))

import argparse
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import rich.table
import rich.text

from molt_jax import errors
from molt_jax.config import resolved
from molt_jax.data import checks, datasets, text_length
from molt_jax.data.summary import describe
from molt_jax.data.tables.as_config import configure, options_of
from molt_jax.errors import UserError
from molt_jax.reporting.contact_sheet import contact_sheet
from molt_jax.runtime import atomic, console, logbook, terminal
from molt_jax.towers.files import open_files
from molt_jax.towers.tower_files import TowerFiles


def print_tables(report: dict[str, Any]) -> None:
  """Prints one column a split, then the classes by frequency in train."""
  splits = report['splits']
  title = terminal.clean(f'{report["dataset"]}, {len(report["classes"])} classes')
  table = rich.table.Table('', *splits, title=rich.text.Text(title))
  for name in ('examples', 'both', 'image_only', 'text_only', 'without_label', 'sampled'):
    table.add_row(name.replace('_', ' '), *(f'{split[name]:,}' for split in splits.values()))
  for name in ('words', 'tokens', 'image_width', 'image_height'):
    title = name.replace('_', ' ') + ' (5, 50, 95, 100 %)'
    table.add_row(title, *(_four(split[name]) for split in splits.values()))
  for name in ('longer_than_max_tokens', 'class_named_in_text'):
    shares = [split[name] for split in splits.values()]
    cells = ['-' if share is None else f'{100 * share:.1f} %' for share in shares]
    table.add_row(name.replace('_', ' '), *cells)
  table.add_row('image formats', *(_formats(split['image_formats']) for split in splits.values()))
  terminal.print_table(table)
  classes = rich.table.Table('class', *splits, title='examples a class')
  by_frequency = sorted(report['classes'].items(), key=lambda item: -item[1]['train'])
  for name, counts in by_frequency:
    shares = [_share(counts[split], splits[split]['examples']) for split in splits]
    classes.add_row(rich.text.Text(terminal.clean(name, 60)), *shares)
  terminal.print_table(classes)


def _share(count: int, of: int) -> str:
  return f'{count:,} ({100 * count / of:.1f} %)' if of else f'{count:,}'


def _formats(counts: dict[str, int]) -> str:
  return ', '.join(f'{count:,} {name}' for name, count in counts.items()) or '-'


def _four(percentiles: dict[str, float] | None) -> str:
  if percentiles is None:
    return '-'
  return ', '.join(f'{percentiles[p]:.0f}' for p in ('5', '50', '95', '100'))


def run(
  config: ml_collections.ConfigDict, out: pathlib.Path, *, sample: int, sheet: int
) -> dict[str, Any]:
  """Writes describe.json and contact_sheet.png into `out`, prints the tables.

  Returns what describe.json holds.

  Raises:
    UserError: the data set's files are not as they must be, or `out` cannot be written.
  """
  failed = f'--out: {str(out)!r} cannot be written'
  dataset = datasets.load_dataset(config)  # Of data that are refused, no folder is left.
  with errors.explained(failed):
    out.mkdir(parents=True, exist_ok=True)
  atomic.try_out(out, tried=failed)
  tower = _text_tower(config)
  encode = tower.tokenizer().encode if tower else None
  max_tokens = config.text.max_tokens
  if tower and not max_tokens:
    most = tower.architecture.max_positions
    max_tokens = text_length.choose(dataset.splits['train'], encode, most).tokens
  report = {
    'config': {'dataset': config.dataset.to_dict(), 'seed': config.seed},
    'text_tower': config.backbones.text.path if tower else None,
    'max_tokens': max_tokens,
    **describe(dataset, encode=encode, max_tokens=max_tokens, sample=sample),
    'checks': [finding._asdict() for finding in checks.look(dataset, sample=sample)],
  }
  picture = io.BytesIO()
  contact_sheet(dataset, 'train', sheet).save(picture, 'PNG')
  described = logbook.to_json(report, indent=2, ensure_ascii=False) + '\n'
  atomic.write(out / 'describe.json', described, tried=failed)
  atomic.write(out / 'contact_sheet.png', picture.getvalue(), tried=failed)
  print_tables(report)
  for split, values in report['splits'].items():
    if values['unusable']:
      console.log(f'{split}: {values["unusable"]}')
  for finding in report['checks']:
    console.log(finding['message'])
  console.log(f'written: {out / "describe.json"}, {out / "contact_sheet.png"}')
  return report


def _text_tower(config: ml_collections.ConfigDict) -> TowerFiles | None:
  """Returns the text tower's files; None, with a message, where they are not here."""
  if 'text' not in resolved.modalities(config):
    return None
  try:
    tower = open_files(config.backbones.text.path, modality='text')
    tower.tokenizer()
    return tower
  except UserError as error:
    console.log(f'texts are measured in words alone: {error}')
    return None


def command(flags: argparse.Namespace) -> None:
  """The work of the command."""
  config, name = flags.config, flags.config.dataset.name
  if flags.table is not None:
    name = pathlib.PurePath(flags.table).stem or name
  out = pathlib.Path(flags.out or f'describe/{name}')
  if flags.table is not None:
    config, _ = configure(flags.table, options_of(flags), config, out)
  run(config, out, sample=flags.sample, sheet=flags.sheet)


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('describe', argv)
