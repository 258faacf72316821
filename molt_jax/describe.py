"""Looks at a data set before anything is trained: `python -m molt_jax.describe
--config=configs/mm_imdb.py --config.dataset.path=FOLDER`.

Prints a table and writes describe.json and contact_sheet.png: counts, what examples have, class
balance, lengths of texts in words and in the text tower's tokens, sizes and formats of images, how
often the name of an example's class stands in its text (the leak that people argue about), and
pictures with their texts. Counts are of all examples; lengths, sizes and the leak are of `--sample`
evenly spaced ones a split.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  sys.exit(commands.run('describe', sys.argv[1:]))

import argparse
import collections
import contextlib
import functools
import importlib.util
import io
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
import rich.table
import rich.text
from PIL import Image, ImageDraw, ImageFont, ImageOps

from molt_jax import errors
from molt_jax.config import resolved
from molt_jax.data import datasets, decode_report, examples, transforms
from molt_jax.data import formats as formats_lib
from molt_jax.data.sources import Dataset, Source, classes_of
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console, logbook, terminal
from molt_jax.towers import files as files_lib

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
MANY = 1 << 30  # More tokens than any text has.
# Of the contact sheet: pixels, and columns.
_CELL, _LINE, _LINES, _COLUMNS, _MARGIN = 224, 15, 5, 6, 8


def describe(
  dataset: Dataset,
  *,
  encode: Callable[[str, int], Sequence[int]] | None,
  max_tokens: int,
  sample: int,
) -> dict[str, Any]:
  """Measures a data set.

  Args:
    dataset: as `datasets.load_dataset` opens it.
    encode: the text tower's tokenizer, (text, most tokens) -> ids; None: lengths are in words
      alone.
    max_tokens: T, what training keeps of a text.
    sample: examples a split whose texts and images are looked at.

  Returns:
    what describe.json holds.
  """
  splits = {}
  with console.progress(
    'looking at examples',
    sum(min(sample, len(source)) for source in dataset.splits.values()),
    'examples',
  ) as bar:
    for split, source in dataset.splits.items():
      splits[split] = _presence(source) | _sampled(dataset, source, encode, max_tokens, sample, bar)
  counts = {split: _class_counts(dataset, source) for split, source in dataset.splits.items()}
  classes = {
    name: {split: int(count_k[k]) for split, count_k in counts.items()}
    for k, name in enumerate(dataset.class_names)
  }
  return {
    'dataset': dataset.name,
    'multi_label': dataset.multi_label,
    'splits': splits,
    'classes': classes,
  }


def _presence(source: Source) -> dict[str, int]:
  image_n, text_n = source.present.T
  values = {
    'examples': len(source),
    'both': image_n & text_n,
    'image_only': image_n & ~text_n,
    'text_only': ~image_n & text_n,
  }
  unlabelled = sum(not classes_of(label) for label in source.labels)
  return {name: int(np.sum(value)) for name, value in values.items()} | {
    'without_label': unlabelled
  }


def _class_counts(dataset: Dataset, source: Source) -> np.ndarray:
  labels = [k for label in source.labels for k in classes_of(label)]
  return np.bincount(np.array(labels, int), minlength=len(dataset.class_names))


def evenly(count: int, most: int) -> list[int]:
  """Returns at most `most` positions, evenly spaced over `count`."""
  return [int((k + 0.5) * count / min(count, most)) for k in range(min(count, most))]


def _sampled(dataset, source, encode, max_tokens, sample, bar) -> dict[str, Any]:
  words, tokens, sizes, formats, named = [], [], [], collections.Counter(), []
  report = decode_report.DecodeReport()
  for n in evenly(len(source), sample):
    bar.advance()
    example = examples.read_example(source, n, image=True, report=report)
    if example['text'] is not None:
      words.append(len(example['text'].split()))
      tokens += [len(encode(example['text'], MANY))] if encode else []
      named.append(
        names_a_class(
          example['text'], [dataset.class_names[k] for k in classes_of(example['label'])]
        )
      )
    if example['image'] is not None:
      formats[_look(example, report, sizes)] += 1
  return {
    'sampled': min(sample, len(source)),
    'words': _percentiles(words),
    'tokens': _percentiles(tokens),
    'longer_than_max_tokens': float(np.mean(np.array(tokens) > max_tokens)) if tokens else None,
    'class_named_in_text': float(np.mean(named)) if named else None,
    'image_width': _percentiles([width for width, _ in sizes]),
    'image_height': _percentiles([height for _, height in sizes]),
    'image_formats': dict(formats.most_common()),
    'unusable': report.line(),
  }


def _look(example, report, sizes) -> str:
  """Returns the format of an image and adds its size; 'unusable' where it does not decode, which is
  reported.
  """
  try:
    transforms.check(example['image'])
    with formats_lib.opened(example['image']) as image:
      sizes.append(image.size)
      return f'{image.format} {image.mode}'
  except transforms.DecodeError as error:
    report.add(example['id'], 'image', str(error))
    return 'unusable'


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
  return {str(p): float(np.percentile(values, p)) for p in PERCENTILES} if len(values) else None


def names_a_class(text: str, names: Sequence[str]) -> bool:
  """Whether one of the names stands in the text, as whole words; case and punctuation do not count
  (apple_pie is in 'Best Apple-Pie!').
  """
  spaced = f' {_spaced(text)} '
  return any(f' {_spaced(name)} ' in spaced for name in names)


def _spaced(text: str) -> str:
  return ' '.join(re.findall(r'[^\W_]+', text.casefold()))


# ---- The contact sheet ---------------------------------------------------------------------------


def contact_sheet(dataset: Dataset, split: str, count: int) -> Image.Image:
  """Draws evenly spaced examples of a split: the picture, its classes, the beginning of its
  text.
  """
  source = dataset.splits[split]
  rows = evenly(len(source), count)
  columns = min(_COLUMNS, len(rows))
  height = _CELL + _LINES * _LINE + _MARGIN
  sheet = Image.new(
    'RGB',
    (columns * (_CELL + _MARGIN) + _MARGIN, -(-len(rows) // columns) * height + _MARGIN),
    'white',
  )
  for cell, n in enumerate(rows):
    corner = _MARGIN + cell % columns * (_CELL + _MARGIN), _MARGIN + cell // columns * height
    example = examples.read_example(source, n, image=True, report=decode_report.DecodeReport())
    names = ', '.join(dataset.class_names[k] for k in classes_of(example['label'])) or '(no label)'
    _draw(sheet, corner, example, names)
  return sheet


def _draw(sheet, corner, example, names) -> None:
  left, top = corner
  draw, font = ImageDraw.Draw(sheet), _font()
  try:
    strip = transforms.cut_strip(transforms.decode(example['image'] or b''))
    picture = ImageOps.contain(strip, (_CELL, _CELL))
    sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
  except transforms.DecodeError as error:
    draw.rectangle((left, top, left + _CELL, top + _CELL), outline='grey')
    draw.text(
      (left + 6, top + _CELL // 2),
      'no image' if example['image'] is None else f'unusable: {error}'[:36],
      'grey',
      font,
    )
  text = terminal.clean(' '.join((example['text'] or '(no text)').split()), 1_000)
  names = terminal.clean(names, 1_000)
  for line, (words, colour) in enumerate(
    [(names, 'firebrick'), *((part, 'black') for part in _wrapped(text, draw, font))][:_LINES]
  ):
    draw.text(
      (left, top + _CELL + 2 + line * _LINE), next(_wrapped(words, draw, font), ''), colour, font
    )


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
  """DejaVu Sans, from the system or from matplotlib, has most alphabets; Pillow's own font has no
  accents even.
  """
  matplotlib = importlib.util.find_spec('matplotlib')
  folder = (
    pathlib.Path(matplotlib.origin).parent / 'mpl-data/fonts/ttf' if matplotlib else pathlib.Path()
  )
  for file in ('DejaVuSans.ttf', str(folder / 'DejaVuSans.ttf')):
    with contextlib.suppress(OSError):
      return ImageFont.truetype(file, 11)
  return ImageFont.load_default(12)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> Iterator[str]:
  """Yields the lines of a text that fit a cell; a word that is too long, and a script without
  spaces, are cut.
  """
  line = ''
  for character in text[:1000]:
    if draw.textlength(line + character, font) > _CELL:
      head, space, tail = line.rpartition(' ')
      yield head if space else line
      line = tail if space else ''
    line += character
  yield line


# ---- The command ---------------------------------------------------------------------------------


def print_tables(report: dict[str, Any]) -> None:
  """Prints one column a split, then the classes by frequency in train."""
  splits = report['splits']
  title = terminal.clean(f'{report["dataset"]}, {len(report["classes"])} classes')
  table = rich.table.Table('', *splits, title=rich.text.Text(title))
  for name in ('examples', 'both', 'image_only', 'text_only', 'without_label', 'sampled'):
    table.add_row(name.replace('_', ' '), *(f'{split[name]:,}' for split in splits.values()))
  for name in ('words', 'tokens', 'image_width', 'image_height'):
    table.add_row(
      name.replace('_', ' ') + ' (5, 50, 95, 100 %)',
      *(_four(split[name]) for split in splits.values()),
    )
  for name in ('longer_than_max_tokens', 'class_named_in_text'):
    table.add_row(
      name.replace('_', ' '),
      *('-' if split[name] is None else f'{100 * split[name]:.1f} %' for split in splits.values()),
    )
  formats = {
    split: ', '.join(f'{count:,} {name}' for name, count in values['image_formats'].items())
    for split, values in splits.items()
  }
  table.add_row('image formats', *(text or '-' for text in formats.values()))
  terminal.print_table(table)
  classes = rich.table.Table('class', *splits, title='examples a class')
  by_frequency = sorted(report['classes'].items(), key=lambda item: -item[1]['train'])
  for name, counts in by_frequency:
    shares = [_share(counts[split], splits[split]['examples']) for split in splits]
    classes.add_row(rich.text.Text(terminal.clean(name, 60)), *shares)
  terminal.print_table(classes)


def _share(count: int, of: int) -> str:
  return f'{count:,} ({100 * count / of:.1f} %)' if of else f'{count:,}'


def _four(percentiles: dict[str, float] | None) -> str:
  return (
    '-'
    if percentiles is None
    else ', '.join(f'{percentiles[p]:.0f}' for p in ('5', '50', '95', '100'))
  )


def run(
  config: ml_collections.ConfigDict, out: pathlib.Path, *, sample: int, sheet: int
) -> dict[str, Any]:
  """Describes the data set of a config, writes describe.json and contact_sheet.png into `out`,
  prints the tables; returns describe.json's content.

  Raises:
    UserError: the data set's files are not as they must be, or `out` cannot be written.
  """
  failed = f'--out: {str(out)!r} cannot be written'
  with errors.explained(failed):
    out.mkdir(parents=True, exist_ok=True)
  atomic.try_out(out, tried=failed)
  dataset = datasets.load_dataset(config)
  encode = _tokenizer(config)
  report = {
    'config': {'dataset': config.dataset.to_dict(), 'seed': config.seed},
    'text_tower': config.backbones.text.path if encode else None,
    'max_tokens': config.text.max_tokens,
    **describe(dataset, encode=encode, max_tokens=config.text.max_tokens, sample=sample),
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
  console.log(f'written: {out / "describe.json"}, {out / "contact_sheet.png"}')
  return report


def _tokenizer(config: ml_collections.ConfigDict) -> Callable[[str, int], Sequence[int]] | None:
  """Returns the text tower's tokenizer; None, which is said, where the tower is not here: the data
  can be looked at without it.
  """
  if 'text' not in resolved.modalities(config):
    return None
  try:
    return files_lib.open_files(config.backbones.text.path, kind='text').tokenizer().encode
  except UserError as error:
    console.log(f'texts are measured in words alone: {error}')
    return None


def command(flags: argparse.Namespace) -> None:
  """The work of the command."""
  out = pathlib.Path(flags.out or f'describe/{flags.config.dataset.name}')
  run(flags.config, out, sample=flags.sample, sheet=flags.sheet)


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('describe', argv)
