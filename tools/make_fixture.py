"""Writes a miniature of a published data set, as it is unpacked: `python tools/make_fixture.py
--dataset=mm_imdb --out=DIR [--layout=official]`.

For tests, and for a dry run before the download is there: fields, names and folders are the
official ones, pictures and texts are made up. On purpose there are JPEG files of odd kinds
(progressive, grey, CMYK, rotated by EXIF, PNG by another name, one cut short), texts in several
scripts with commas, quotes and line breaks, and here and there an image that is missing, a text
that is empty, an id that comes twice and a record that is damaged. Its counts are of course not the
published ones: prepare it with --allow_count_mismatch.
"""

import csv
import io
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from molt_jax.config.fields import at_least
from molt_jax.errors import UserError
from molt_jax.runtime import console
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

COLOURS = ((200, 40, 40), (40, 170, 60), (50, 70, 210), (220, 190, 40))
PHRASES = (
  'naïve café, jalapeño & crème brûlée',
  '東京の夜、静かな雨',
  'Съешь же ещё этих булок',
  'he said: "go", and left',
  'one line\nand another, then\r\na third',
  'emoji 🍕🎬 and a tab\there',
  '<p>an HTML paragraph</p>',
  'plain words only',
)
FLAGS = (
  Flag('dataset', 'mm_imdb, upmc_food101, snli_ve or hateful_memes', required=True),
  Flag('out', 'new or empty folder to write it to', required=True),
  Flag('layout', 'which of the layouts in use; default: the first'),
  Flag(
    'examples',
    'training examples; validation and test get half as many each',
    24,
    type=int,
    rule=at_least(9),
  ),
  Flag('seed', 'of pictures and sizes', 0, type=int, rule=at_least(0)),
)


# ---- Pictures and texts --------------------------------------------------------------------------


class Studio:
  """Makes pictures in the colour of their class and texts that name it, from one seed."""

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)
    self._count = 0

  def text(self, words: str) -> str:
    """Returns a text with `words` in it."""
    return (
      f'{words}, {PHRASES[int(self._rng.integers(len(PHRASES)))]} no. '
      f'{int(self._rng.integers(1000))}'
    )

  def picture(self, kind: int) -> bytes:
    """Returns an image file in the colour of class `kind`; each is of the next kind of file."""
    height, width = (int(side) for side in self._rng.integers(24, 64, 2))
    pixels = np.clip(
      np.array(COLOURS[kind % len(COLOURS)]) + self._rng.normal(0, 25, (height, width, 3)), 0, 255
    )
    formats = (_jpeg, _jpeg, _progressive, _grey, _cmyk, _rotated, _png, _jpeg)
    self._count += 1
    return formats[self._count % len(formats)](Image.fromarray(pixels.astype(np.uint8)))


def _save(image: Image.Image, kind: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def _jpeg(image):
  return _save(image, 'JPEG', quality=88)


def _progressive(image):
  return _save(image, 'JPEG', progressive=True)


def _grey(image):
  return _save(image.convert('L'), 'JPEG')


def _cmyk(image):
  return _save(image.convert('CMYK'), 'JPEG')


def _rotated(image):
  exif = Image.Exif()
  exif[0x0112] = 6
  return _save(image.transpose(Image.Transpose.ROTATE_90), 'JPEG', exif=exif)


def _png(image):
  return _save(image, 'PNG')


def _write(path: pathlib.Path, data: bytes | str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data.encode() if isinstance(data, str) else data)


def _write_pictures(studio: Studio, files: Sequence[tuple[pathlib.Path, int]]) -> None:
  """Writes the picture of each (path, class), but for the third, which is missing, and the fourth,
  which is cut short.
  """
  for number, (path, kind) in enumerate(files):
    data = studio.picture(kind)
    if number != 2:
      _write(path, data[: len(data) // 2] if number == 3 else data)


def _sizes(examples: int) -> dict[str, int]:
  return {'train': examples, 'dev': max(4, examples // 2), 'test': max(4, examples // 2)}


def _json_lines(records: Sequence[object]) -> str:
  return ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records)


# ---- Data sets -----------------------------------------------------------------------------------


def mm_imdb(
  out: pathlib.Path, studio: Studio, examples: int, *, split: str, records: str, posters: str
) -> None:
  """The third training movie has no poster, the fifth no plot, the sixth no record, the seventh is
  News; the first is listed twice.
  """
  genres = ('Drama', 'Comedy', 'Horror', 'Western')
  splits, files = {}, []
  for name, size in _sizes(examples).items():
    splits[name] = ids = [f'{1000 * (len(splits) + 1) + 7 * n:07d}' for n in range(size)]
    for n, movie in enumerate(ids):
      kind = n % 4
      files.append((out / posters / f'{movie}.jpeg', kind))
      plots = [
        studio.text(f'a {genres[kind].lower()} movie'),
        studio.text('short'),
        studio.text(f'a long and {genres[kind].lower()} story ' * 3),
      ]
      tags = [genres[kind], *(['Family'] if n % 3 == 0 else []), *(['News'] if n == 6 else [])]
      record = {
        'title': studio.text('Title'),
        'year': 1950 + n,
        'genres': tags,
        'plot': [] if n == 4 else plots[: 1 + n % 3],
        **({'plot outline': 'In short: ' + plots[0]} if n % 2 else {}),
        'cover': 'http://example.org',
      }
      if name != 'train' or n != 5:
        _write(out / records / f'{movie}.json', json.dumps(record))
  splits['train'] = [*splits['train'], splits['train'][0]]
  _write_pictures(studio, files)
  _write(out / split, json.dumps(splits))


def upmc_food101(
  out: pathlib.Path, studio: Studio, examples: int, *, texts: str, flat: bool
) -> None:
  """The third training image is missing, the fifth title is empty; a page is missing for the sixth;
  one number has a dash.
  """
  classes = ('apple_pie', 'cheese_plate', 'pizza')
  files = []
  for split, size in (('train', examples), ('test', max(4, examples // 2))):
    rows = []
    for n in range(size):
      kind = n % 3
      name = f'{classes[kind]}_{n + (1000 if split == "test" else 0)}{"-2" if n == 1 else ""}'
      words = classes[kind].replace('_', ' ') if n % 4 else 'a recipe'
      files.append(
        (
          out / 'image' / f'{name}.jpg'
          if flat
          else out / 'images' / split / classes[kind] / f'{name}.jpg',
          kind,
        )
      )
      rows.append((f'{name}.jpg', '' if n == 4 else studio.text(words), classes[kind]))
      if texts == 'pages' and n != 5:
        _write(
          out / 'texts_txt' / classes[kind] / f'{name}.txt',
          '\n'.join(studio.text(words) for _ in range(20)).encode('utf-8') + b' caf\xe9',
        )
    if texts == 'titles':
      buffer = io.StringIO()
      csv.writer(buffer).writerows(rows)
      _write(out / 'texts' / f'{split}_titles.csv', buffer.getvalue())
  _write_pictures(studio, files)


def snli_ve(
  out: pathlib.Path, studio: Studio, examples: int, *, images: str, suffix: str, relabelled: bool
) -> None:
  """Three hypotheses an image; the third image is missing; one row has no gold label, one pair
  comes twice.
  """
  labels = ('entailment', 'neutral', 'contradiction')
  files = []
  for name, size in _sizes(examples).items():
    records = []
    for n in range(size):
      picture = f'{100000 * len(files) + 17 if n % 3 == 0 else int(files[-1][0].stem)}'
      if n % 3 == 0:
        files.append((out / images / f'{picture}.jpg', n))
      label = labels[n % 3]
      records.append(
        {
          'annotator_labels': [label] * 5,
          'captionID': f'{picture}.jpg#0',
          'gold_label': '-' if name == 'train' and n == 7 else label,
          'pairID': f'{picture}.jpg#{n % 5}r1{label[0]}',
          'sentence1': 'THE CAPTION, which must not be read',
          'sentence1_parse': '(ROOT)',
          'sentence2': studio.text(f'there is {("certainly", "perhaps", "never")[n % 3]} a man'),
          'Flickr30K_ID': picture + suffix,
        }
      )
    _write(
      out / f'snli_ve_{name}.jsonl',
      _json_lines([*records, records[0]] if name == 'train' else records),
    )
    if relabelled and name != 'train':
      buffer = io.StringIO()
      writer = csv.writer(buffer)
      writer.writerow(['', 'pairID', 'Flickr30kID', 'hypothesis', 'gold_label', 'explanation'])
      neutral = [record for record in records if record['gold_label'] == 'neutral']
      writer.writerows(
        (n, r['pairID'], r['Flickr30K_ID'], r['sentence2'], labels[n % 3], 'because, well')
        for n, r in enumerate(neutral)
      )
      _write(out / f'esnlive_{name}.csv', buffer.getvalue())
  _write_pictures(studio, files)


def hateful_memes(
  out: pathlib.Path, studio: Studio, examples: int, *, folder: str, dev: str
) -> None:
  """The third image is missing, the fifth text is empty, one id comes twice; test.jsonl has no
  labels, test_seen.jsonl does.
  """
  files, number = [], 1230
  for name, size in {
    'train': examples,
    dev: max(4, examples // 2),
    'test_seen': max(4, examples // 2),
  }.items():
    records = []
    for n in range(size):
      number += 1
      files.append((out / folder / 'img' / f'{number:05d}.png', n % 2))
      words = ('what a lovely day', 'look how awful they are')[n % 2]
      records.append(
        {
          'id': number,
          'img': f'img/{number:05d}.png',
          'label': n % 2,
          'text': '' if n == 4 else studio.text(words),
        }
      )
    _write(
      out / folder / f'{name}.jsonl',
      _json_lines([*records, records[0]] if name == 'train' else records),
    )
  _write(
    out / folder / 'test.jsonl',
    _json_lines([{k: v for k, v in record.items() if k != 'label'} for record in records]),
  )
  _write_pictures(studio, files)


# Data set -> layout -> how it is written. The first layout is the official one.
FIXTURES: dict[str, dict[str, tuple[Callable[..., None], dict[str, object]]]] = {
  'mm_imdb': {
    'official': (
      mm_imdb,
      {'split': 'mmimdb/split.json', 'records': 'mmimdb/dataset', 'posters': 'mmimdb/dataset'},
    ),
    'images_labels': (mm_imdb, {'split': 'split.json', 'records': 'labels', 'posters': 'images'}),
    'image_meta_data': (
      mm_imdb,
      {'split': 'meta_data/split.json', 'records': 'meta_data', 'posters': 'image'},
    ),
  },
  'upmc_food101': {
    'titles': (upmc_food101, {'texts': 'titles', 'flat': False}),
    'pages': (upmc_food101, {'texts': 'pages', 'flat': False}),
    'flat': (upmc_food101, {'texts': 'titles', 'flat': True}),
  },
  'snli_ve': {
    'flickr30k_images': (snli_ve, {'images': 'flickr30k_images', 'suffix': '', 'relabelled': True}),
    'Flickr30K': (
      snli_ve,
      {'images': 'Flickr30K/flickr30k_images', 'suffix': '.jpg', 'relabelled': False},
    ),
  },
  'hateful_memes': {
    'root': (hateful_memes, {'folder': '.', 'dev': 'dev_seen'}),
    'data': (hateful_memes, {'folder': 'data', 'dev': 'dev'}),
  },
}


def make(
  dataset: str, out: pathlib.Path, *, layout: str | None = None, examples: int = 24, seed: int = 0
) -> None:
  """Writes the miniature.

  Raises:
    UserError: an unknown data set or layout, too few examples, or a folder that is not empty.
  """
  if dataset not in FIXTURES:
    raise UserError(f'--dataset: {dataset!r} is not legal; give one of {", ".join(FIXTURES)}')
  layouts = FIXTURES[dataset]
  layout = layout or next(iter(layouts))
  if layout not in layouts:
    raise UserError(
      f'--layout: {layout!r} is not one of {dataset}; give one of {", ".join(layouts)}'
    )
  if examples < 9:
    raise UserError(f'--examples: {examples} is too few for all that is odd; give at least 9')
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'--out: {str(out)!r} is there and not an empty folder; give another one')
  write, options = layouts[layout]
  try:
    write(out, Studio(seed), examples, **options)
  except OSError as error:
    raise UserError(f'--out: {str(out)!r} cannot be written: {error.strerror}') from error


@command
def main(argv: Sequence[str]) -> None:
  """Command line of the tool."""
  flags, _ = parse(
    'python tools/make_fixture.py',
    'Write a miniature of a published data set, as it is unpacked.',
    FLAGS,
    argv,
  )
  make(
    flags.dataset,
    pathlib.Path(flags.out),
    layout=flags.layout,
    examples=flags.examples,
    seed=flags.seed,
  )
  console.log(f'a miniature {flags.dataset} is in {flags.out}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
