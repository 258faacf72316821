"""Images that are no files of their own: at an address, or in a cell of a table.

An image of a row is a path (str) or a `Picture`. Nothing is read before it is asked for; all of it
can be pickled, and several threads may read at once.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import io
import os
import pathlib
import re
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from molt_jax import errors
from molt_jax.data import bounds, formats, transforms
from molt_jax.data.decode_error import DecodeError
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console

SECONDS = 30  # That a server may take for one image.
THREADS = 16  # That fetch images.
ATTEMPTS = 64  # Images of which one at least must be there.


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


# ---- Addresses -----------------------------------------------------------------------------------


def is_address(text: str) -> bool:
  """Whether a string is a URL."""
  return re.match(r'[A-Za-z][A-Za-z0-9+.-]+://', text) is not None


@dataclasses.dataclass(frozen=True)
class Address(Picture):
  """An image at a URL that fsspec opens; fetched once and kept in a folder.

  Attributes:
    url: where it is.
    cache: folder that keeps what was fetched.
  """

  url: str
  cache: str

  @property
  def path(self) -> pathlib.Path:
    """Where it is kept."""
    return pathlib.Path(self.cache) / hashlib.sha256(self.url.encode()).hexdigest()

  def read(self) -> bytes:
    """See `Picture`. What could not be fetched is not tried again by this process."""
    if self.path.exists():
      return formats.read_file(self.path)
    if self.url in _failed:
      raise OSError(errno.EIO, _failed[self.url])
    try:
      content = _fetched(self.url)
    except OSError as error:
      _failed[self.url] = error.strerror or str(error)
      raise
    atomic.write(self.path, content)
    return content

  def number(self) -> int:
    """See `Picture`."""
    return zlib.crc32(self.url.encode())


@functools.cache
def _file_system(protocol: str) -> Any:
  """Returns the file system of a protocol.

  Raises:
    UserError: fsspec does not know it, or lacks a package for it.
  """
  import fsspec  # Where no image has an address, it need not be imported.

  options = {}
  if protocol in ('http', 'https'):
    import aiohttp

    options['client_kwargs'] = {'timeout': aiohttp.ClientTimeout(total=SECONDS)}
  try:
    return fsspec.filesystem(protocol, **options)
  except (ImportError, ValueError) as error:
    why = ' '.join(str(error).split())
    raise UserError(
      f'images at addresses {protocol}:// cannot be fetched ({why}): install what is missing, or '
      'save the images as files'
    ) from error


def check_protocol(url: str) -> None:
  """Raises UserError where addresses of this kind cannot be fetched here at all."""
  _file_system(url.partition('://')[0].lower())


_failed: dict[str, str] = {}  # Address -> why it could not be fetched.


def fetch(images: Sequence[Address]) -> None:
  """Fetches what is not kept yet, several at once; what fails is found again when it is read.

  Raises:
    UserError: the folder cannot be written, or none of the first ones can be fetched.
  """
  wanted = [image for image in dict.fromkeys(images) if not image.path.exists()]
  if not wanted:
    return
  for url in {image.url.partition('://')[0].lower(): image.url for image in wanted}.values():
    check_protocol(url)
  folder = pathlib.Path(wanted[0].cache)
  with errors.explained(f'images that are fetched cannot be kept in {str(folder)!r}'):
    folder.mkdir(parents=True, exist_ok=True)
  with (
    console.progress('fetching images', len(wanted), 'images') as bar,
    concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
  ):
    whys = []
    for first in range(0, len(wanted), ATTEMPTS):
      for why in pool.map(_why_not, wanted[first : first + ATTEMPTS]):
        bar.advance()
        whys += [why] if why else []
      if first == 0 and len(whys) == min(ATTEMPTS, len(wanted)) > 1:
        raise UserError(
          f'none of the first {len(whys)} images can be fetched ({wanted[0].url}: {whys[0]}): is '
          'the network there? Or save the images as files'
        )


def _why_not(image: Address) -> str:
  try:
    image.read()
  except OSError as error:
    return error.strerror or str(error)
  return ''


def _fetched(url: str) -> bytes:
  try:
    with _file_system(url.partition('://')[0].lower()).open(url, 'rb') as file:
      content = file.read(bounds.MAX_FILE_BYTES + 1)
  except (OSError, UserError):
    raise
  # Libraries of the protocols raise what they like: aiohttp's errors, botocore's, TimeoutError.
  except Exception as error:
    why = ' '.join(str(error).split()) or type(error).__name__
    raise OSError(errno.EIO, f'it cannot be fetched: {why}') from error
  if len(content) > bounds.MAX_FILE_BYTES:
    raise OSError(errno.EFBIG, bounds.TOO_LARGE)
  return content


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
