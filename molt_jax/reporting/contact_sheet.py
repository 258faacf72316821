"""A contact sheet: pictures of a data set with their classes and texts."""

import contextlib
import functools
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from molt_jax.data import transforms
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.examples import read_example
from molt_jax.data.sources import Dataset, classes_of
from molt_jax.data.summary import evenly
from molt_jax.runtime import terminal

# Pixels, and columns.
_CELL, _LINE, _LINES, _COLUMNS, _MARGIN = 224, 15, 5, 6, 8


def contact_sheet(dataset: Dataset, split: str, count: int) -> Image.Image:
  """Draws evenly spaced examples of a split: picture, classes, the beginning of the text."""
  source = dataset.splits[split]
  rows = evenly(len(source), count)
  columns = min(_COLUMNS, len(rows))
  height = _CELL + _LINES * _LINE + _MARGIN
  size = columns * (_CELL + _MARGIN) + _MARGIN, -(-len(rows) // columns) * height + _MARGIN
  sheet = Image.new('RGB', size, 'white')
  for cell, n in enumerate(rows):
    corner = _MARGIN + cell % columns * (_CELL + _MARGIN), _MARGIN + cell // columns * height
    example = read_example(source, n, image=True, report=DecodeReport())
    names = ', '.join(dataset.class_names[k] for k in classes_of(example['label'])) or '(no label)'
    _draw(sheet, corner, example, names)
  return sheet


def _draw(
  sheet: Image.Image, corner: tuple[int, int], example: Mapping[str, Any], names: str
) -> None:
  left, top = corner
  draw, font = ImageDraw.Draw(sheet), _font()
  try:
    strip = transforms.cut_strip(transforms.decode(example['image'] or b''))
    picture = ImageOps.contain(strip, (_CELL, _CELL))
    sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
  except transforms.DecodeError as error:
    draw.rectangle((left, top, left + _CELL, top + _CELL), outline='grey')
    why = 'no image' if example['image'] is None else f'unusable: {error}'[:36]
    draw.text((left + 6, top + _CELL // 2), why, 'grey', font)
  text = terminal.clean(' '.join((example['text'] or '(no text)').split()), 1_000)
  first = next(_wrapped(terminal.clean(names, 1_000), draw, font), '')
  for line, words in enumerate([first, *_wrapped(text, draw, font)][:_LINES]):
    place = left, top + _CELL + 2 + line * _LINE
    draw.text(place, words, 'black' if line else 'firebrick', font)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
  """DejaVu Sans, from the system or from matplotlib, has most alphabets.

  Pillow's own font has no accents even.
  """
  matplotlib, folder = importlib.util.find_spec('matplotlib'), pathlib.Path()
  if matplotlib:
    folder = pathlib.Path(matplotlib.origin).parent / 'mpl-data/fonts/ttf'
  for file in ('DejaVuSans.ttf', str(folder / 'DejaVuSans.ttf')):
    with contextlib.suppress(OSError):
      return ImageFont.truetype(file, 11)
  return ImageFont.load_default(12)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> Iterator[str]:
  """Yields the lines of a text that fit a cell; what has no space to break at is cut."""
  line = ''
  for character in text[:1000]:
    if draw.textlength(line + character, font) > _CELL:
      head, space, tail = line.rpartition(' ')
      yield head if space else line
      line = tail if space else ''
    line += character
  yield line
