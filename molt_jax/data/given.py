"""Images and texts as a caller has them in Python: one, or several in whatever holds several."""

import itertools
import numbers
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import PIL.Image

from molt_jax.data import cells, findings, formats, imagefiles, transforms
from molt_jax.errors import UserError
from molt_jax.runtime import console


def read_inputs(
  image: Any, text: Any, lost: dict[int, str] | None = None
) -> tuple[list[tuple[Any, str | None]], bool]:
  """Reads what `predict` was given.

  Args:
    image: one image, or several.
    text: one text, or several.
    lost: where given, what cannot be used is absent, and (place -> why) is put here.

  Returns:
    (image, text) of each example, as `cells.read` returns them, and whether there were several.

  Raises:
    UserError: one line on what is wrong, with the place in the list.
  """
  images, texts = _several('image', image), _several('text', text)
  many = images is not None or texts is not None
  if images is not None and texts is not None and len(images) != len(texts):
    raise UserError(
      f'predict: {len(images)} images and {len(texts)} texts; give lists of equal length'
    )
  count = len(images if images is not None else texts) if many else 1
  images = [image] * count if images is None else images
  texts = [text] * count if texts is None else texts
  found = findings.Findings(_where)
  pairs = []
  if lost is not None:
    images = _mended('image', images, lost)
    texts = _mended('text', texts, lost)
  for number, (one_image, one_text) in enumerate(zip(images, texts, strict=True)):
    found.row = number if many else None
    pairs.append((found.read('image', one_image), found.read('text', one_text)))
  found.check()
  remarks = found.remarks()
  for number, (one_image, one_text) in enumerate(pairs):
    if one_image is None and one_text is None and lost is None:
      where = f' (example {number})' if many else ''
      hint = ' (a word such as nan is absent too)' if remarks else ''
      raise UserError(f'predict: both image and text are absent{where}{hint}; give at least one')
  for line in remarks:
    console.log(line)
  return pairs, many


def _mended(column: str, values: Sequence[Any], lost: dict[int, str]) -> list[Any]:
  """Returns cells of a column, None where one is refused, with the reasons in `lost`."""
  mended = []
  for number, value in enumerate(values):
    try:
      cells.read(column, value)
    except cells.CellError as error:
      lost.setdefault(number, str(error))
      value = None
    mended.append(value)
  return mended


def _where(column: str, numbers: Sequence[int | None]) -> str:
  return f'predict: {findings.some([place(column, number) for number in numbers])}'


def place(column: str, number: int | None) -> str:
  return column if number is None else f'{column}[{number}]'


def _several(column: str, value: Any) -> list[Any] | None:
  """Returns the items of a batch, None where the value is one image or one text.

  Raises:
    UserError: it is neither: what it holds has no order, or is not what the column takes.
  """
  if isinstance(value, list | tuple):
    return list(value)
  if value is None or isinstance(value, _SINGLE):
    return None
  if isinstance(value, Mapping | Set) or hasattr(value, 'read') or hasattr(value, 'columns'):
    raise UserError(f'predict: {column} is {cells.describe(value)}: {_REMEDIES[column]}')
  if hasattr(value, '__array__'):
    return _items(column, value)
  if isinstance(value, Sequence | Iterator):
    items = list(itertools.islice(value, _MOST_ITEMS + 1))
    if len(items) > _MOST_ITEMS:
      raise UserError(
        f'predict: {column} has more than {_MOST_ITEMS:,} items, perhaps no end: give them in parts'
      )
    return items
  return None


_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, PIL.Image.Image, numbers.Number)
_MOST_ITEMS = 1 << 22
_REMEDIES = {
  'image': 'give a path, the bytes of a file, a PIL image, a uint8 array, or a list of these',
  'text': 'give a string, or a list of strings such as one column of a table',
}


def _items(column: str, value: Any) -> list[Any] | None:
  """Returns the items of an array of strings or objects; an array of numbers may be an image."""
  try:
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
  except Exception:  # Whatever an object of another library raises.
    return None
  # Floating point numbers are what a column is made of that has nothing but gaps.
  if array.ndim != 1 or (column == 'image' and array.dtype.kind not in 'OUTf'):
    return None
  return array.tolist()


def decoded(image: str | bytes, name: str) -> PIL.Image.Image:
  """Opens an image that is a path or the content of a file.

  Raises:
    UserError: one line on what is wrong with it.
  """
  if isinstance(image, str):
    name = f'{name} {cells.shown(image, most=cells.MOST_PATH)}'
    if why := imagefiles.why_no_file(image):
      raise UserError(f'predict: {name} cannot be opened ({why}): {_path_remedy(image)}')
  try:
    return transforms.decode(formats.read_file(image) if isinstance(image, str) else image)
  except OSError as error:
    why = error.strerror or str(error)
    raise UserError(f'predict: {name} cannot be opened ({why}): {_path_remedy(image)}') from error
  except transforms.DecodeError as error:
    raise UserError(
      f'predict: {name} cannot be decoded ({error}): save it again, as PNG or JPEG for instance'
    ) from error


def _path_remedy(path: str) -> str:
  if imagefiles.looks_like_address(path):
    return 'addresses are not read; save the image as a file'
  if not pathlib.PurePath(path).suffix:
    return 'give the path of an image file; a text goes by its name, text=...'
  return 'give the path of an image file'
