"""Image files as bytes: which are read, how they are opened, what is refused before it is decoded.

A file is opened by the parsers of FORMATS and no others: some of Pillow's start programs
(Ghostscript for EPS) or read formats that no data set of pictures means. Work and memory are
bounded by `bounds`, whatever a file declares. Threads may call all of it at once.
"""

import contextlib
import ctypes
import errno
import importlib
import io
import logging
import os
import pathlib
import stat
import warnings
from collections.abc import Iterator, Sequence

from PIL import Image

from molt_jax.data import bounds
from molt_jax.data.decode_error import DecodeError

_PLUGINS = ('Jpeg', 'Mpo', 'Png', 'WebP', 'Gif', 'Bmp', 'Tiff', 'Ppm', 'Avif', 'Ico')
_NO_IMAGE = 'not an image, or of an unknown format'
_ADVICE = 'convert it to PNG or JPEG'
# Position, bytes, what such a file is: what often stands in the place of an image.
_OTHERS = (
  (0, b'version https://git-lfs', 'a Git LFS pointer in the place of the file: run git lfs pull'),
  (0, b'%PDF', f'a PDF file: {_ADVICE}'),
  (0, b'<?xml', f'an XML file, perhaps SVG: {_ADVICE}'),
  (0, b'<svg', f'an SVG file: {_ADVICE}'),
  (0, b'<!DOCTYPE', 'a web page in the place of an image: download it again'),
  (0, b'<html', 'a web page in the place of an image: download it again'),
  (4, b'ftyphei', f'a HEIC file: {_ADVICE}'),
  (4, b'ftypmif1', f'a HEIF file: {_ADVICE}'),
)
_KINDS = (
  (stat.S_ISDIR, 'a folder, not a file'),
  (stat.S_ISFIFO, 'a pipe, not a file'),
  (stat.S_ISSOCK, 'a socket, not a file'),
  (stat.S_ISCHR, 'a device, not a file'),
  (stat.S_ISBLK, 'a device, not a file'),
)


def _register() -> tuple[str, ...]:
  """Imports Pillow's plugins of the formats that are read; returns those that this Pillow has."""
  names = []
  for plugin in _PLUGINS:
    with contextlib.suppress(ImportError):  # AVIF came with Pillow 11.3.
      importlib.import_module(f'PIL.{plugin}ImagePlugin')
      names.append(plugin.upper())
  return tuple(name for name in names if name in Image.OPEN)  # JPEG's plugin opens MPO too.


def _silence() -> None:
  """Keeps Pillow and libtiff from writing about damaged files to stderr; what matters is raised."""
  warnings.filterwarnings('ignore', module=r'PIL\.')
  logging.getLogger('PIL').setLevel(logging.CRITICAL)
  package = pathlib.Path(Image.__file__).parent
  # Wheels carry libtiff with them; it is loaded already, so that this finds Pillow's own.
  for library in (*package.parent.glob('pillow.libs/libtiff*'), *package.glob('.dylibs/libtiff*')):
    with contextlib.suppress(OSError, AttributeError):
      ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


FORMATS = _register()
_silence()


def read_file(path: str | os.PathLike) -> bytes:
  """Reads an image file; waits for nobody, and takes no more memory than MAX_FILE_BYTES.

  Raises:
    OSError: it cannot be read, is no regular file or has more than MAX_FILE_BYTES; `strerror` says
      which.
  """
  try:
    path = os.fspath(path)  # Of a number, os.stat makes a file that is open.
    _check_regular(os.stat(path))  # Opening is enough to start some devices.
    # The path may be another file by now, and opening a pipe would wait for somebody to write.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
  except (TypeError, ValueError) as error:  # A null byte, or a surrogate that no file name has.
    raise OSError(errno.EINVAL, 'not a path') from error
  with open(descriptor, 'rb') as file:
    status = os.fstat(descriptor)
    _check_regular(status)
    data = file.read(status.st_size + 1) or b''
    if len(data) > status.st_size:  # It grows, or is of /proc, where sizes are 0.
      data += file.read(bounds.MAX_FILE_BYTES) or b''
  if len(data) > bounds.MAX_FILE_BYTES:
    raise OSError(errno.EFBIG, bounds.TOO_LARGE)
  return data


def _check_regular(status: os.stat_result) -> None:
  for is_kind, words in _KINDS:
    if is_kind(status.st_mode):
      raise OSError(errno.EINVAL, words)
  if status.st_size > bounds.MAX_FILE_BYTES:
    raise OSError(errno.EFBIG, bounds.TOO_LARGE)


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
  """Opens an image file for the block, not yet decoded; what goes wrong inside is a DecodeError.

  Raises:
    DecodeError: empty, damaged, of another format than FORMATS, or larger than the bounds.
  """
  with faults():
    bounds.bound_bytes(data)
    try:
      image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
      raise DecodeError(_unidentified(data)) from error
    with image:
      bounds.bound_pixels(image.size)
      bounds.bound_scans(image, data)
      yield image
      if image.format == 'PNG' and bounds.may_lack_rows(image):
        bounds.check_whole(data)


@contextlib.contextmanager
def faults() -> Iterator[None]:
  """What goes wrong in the block is a DecodeError."""
  try:
    yield
  except DecodeError:
    raise
  except Image.DecompressionBombError as error:
    raise DecodeError(f'more than {bounds.MAX_PIXELS} pixels') from error
  except MemoryError as error:
    raise DecodeError('there is not enough memory to decode it') from error
  # Pillow's parsers raise a dozen types on broken bytes (OSError, SyntaxError, struct.error, ...).
  except Exception as error:
    raise DecodeError(str(error) or type(error).__name__) from error


def _unidentified(data: bytes) -> str:
  """Says of a file that Pillow did not open what it may be."""
  for position, start, words in _OTHERS:
    if data[position : position + len(start)].lower() == start.lower():
      return words
  name = _format_of(data[:16], FORMATS)
  if name:
    return f'it cannot be read as {name}{_why_not(name, data)}'
  Image.init()  # Knows the other formats by their first bytes; none of them is opened.
  name = _format_of(data[:16], Image.ID)
  return not_read(name) if name else _NO_IMAGE


def not_read(name: str) -> str:
  """Returns the reason for a file of a format that is not in FORMATS."""
  return f'a file of the format {name}, which is not read: {_ADVICE}'


def _format_of(start: bytes, names: Sequence[str]) -> str | None:
  for name in names:
    accept = Image.OPEN[name][1]
    with contextlib.suppress(Exception):  # They were written for files of their own kind.
      if accept and accept(start):
        return name
  return None


def _why_not(name: str, data: bytes) -> str:
  """Returns the parser's own words, which `Image.open` drops, in brackets."""
  try:
    Image.OPEN[name][0](io.BytesIO(data), '').close()
  except Exception as error:
    return f' ({error})' if str(error) else ''
  return ''
