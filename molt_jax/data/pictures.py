"""Images that are no files of their own: at an address, or in a cell of a table.

An image of a row is a path (str) or a `Picture`. Nothing is read before it is asked for; all of it
can be pickled, and several threads may read at once.
"""

import dataclasses
import errno
import functools
import io
import os
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from molt_jax.data import formats, transforms
from molt_jax.data.decode_error import DecodeError


class Picture:
  """An image that is no file of its own."""

  def read(self) -> bytes:
    """Returns the content of an image file.

    Raises:
      OSError: it cannot be had; `strerror` says why.
    """
    raise NotImplementedError

  def number(self) -> int:
    """Returns a number that changes with the image, as far as is known without reading it."""
    raise NotImplementedError


Image = str | Picture  # A string is the path of a file.
# Of a row: none, one, or a tuple of two or more.
Images = Image | tuple[Image, ...] | None


def each(images: Images) -> tuple[Image, ...]:
  """Returns the images of a row."""
  if images is None:
    return ()
  return images if isinstance(images, tuple) else (images,)


def one_or_several(images: Sequence[Image]) -> Images:
  """Returns images as those of a row."""
  if len(images) < 2:
    return images[0] if images else None
  return tuple(images)


def read(image: Image) -> bytes:
  """Returns the content of the file of an image.

  Raises:
    OSError: it cannot be had; `strerror` says why.
  """
  return formats.read_file(image) if isinstance(image, str) else image.read()


def number(image: Image) -> int:
  """Returns a number that changes with the image, for `Source.contents`."""
  if not isinstance(image, str):
    return 1 + image.number()
  try:
    return 1 + os.stat(image).st_size
  except OSError:  # It went away since it was checked.
    return -1


@dataclasses.dataclass(frozen=True)
class Bytes(Picture):
  """An image in memory: the content of its file."""

  content: bytes

  def read(self) -> bytes:
    """See `Picture`."""
    return self.content

  def number(self) -> int:
    """See `Picture`."""
    return zlib.crc32(self.content)


@dataclasses.dataclass(frozen=True)
class Unusable(Picture):
  """An image in memory whose pixels do not say what they mean."""

  why: str

  def read(self) -> bytes:
    """See `Picture`."""
    raise OSError(errno.EINVAL, self.why)

  def number(self) -> int:
    """See `Picture`."""
    return zlib.crc32(self.why.encode())


def in_memory(value: bytes | PIL.Image.Image | np.ndarray) -> Picture:
  """Returns a value that `cells.read` took for an image; pixels become a PNG file."""
  if isinstance(value, bytes):
    return Bytes(value)
  try:
    image = PIL.Image.fromarray(value) if isinstance(value, np.ndarray) else value
    rgb = transforms.as_rgb(image)
  except DecodeError as error:
    return Unusable(str(error))
  content = io.BytesIO()
  rgb.save(content, 'PNG', compress_level=1)
  return Bytes(content.getvalue())


# ---- Cells of Parquet and Arrow files ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell(Picture):
  """An image whose bytes are in a cell of a Parquet or Arrow file.

  Attributes:
    file: its path.
    column: name of the column.
    row: number of the row, from 0.
    item: place in the cell where that is a list.
    length: bytes of the image.
  """

  file: str
  column: str
  row: int
  item: int | None
  length: int

  def read(self) -> bytes:
    """See `Picture`."""
    cell = _column(self.file, self.column).cell(self.row)
    if self.item is not None:
      cell = cell[self.item]
    return cell['bytes'] if isinstance(cell, dict) else cell

  def number(self) -> int:
    """See `Picture`."""
    return self.length


class _Column:
  """A column of images of a file.

  An Arrow file is mapped into memory; of a Parquet file the groups of rows that were read last are
  kept.
  """

  def __init__(self, file: str, column: str):
    from molt_jax.data.tables import arrow_files

    self._lock = threading.Lock()
    self._file, self._name = arrow_files.open_file(file), column
    self._read = functools.lru_cache(maxsize=2)(self._read)

  def _read(self, group: int) -> Any:
    return self._file.group(group, [self._name]).column(0)

  def cell(self, row: int) -> Any:
    """Returns the value of a cell."""
    group, place = self._file.find(row)
    with self._lock:  # A group that several threads ask for is read once.
      column = self._read(group)
    return column[place].as_py()


@functools.lru_cache(maxsize=64)
def _column(file: str, column: str) -> _Column:
  return _Column(file, column)
