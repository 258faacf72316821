"""Image files as bytes: which are read, how they are opened, what is refused before it is decoded.

A file is opened by the parsers of FORMATS and no others: some of Pillow's start programs
(Ghostscript for EPS) or read formats that no data set of pictures means. Work and memory are
bounded by the constants below, whatever a file declares. Threads may call all of it at once.
"""

import contextlib
import ctypes
import errno
import importlib
import io
import logging
import os
import pathlib
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

# An image of more pixels is refused before it is decoded: as RGB it would take 200 MB, whatever the
# size of its file.
MAX_PIXELS = 1 << 26
# As many bytes as MAX_PIXELS take uncompressed with four channels; a larger file is not even read.
MAX_FILE_BYTES = 1 << 28
# Each scan of a progressive JPEG goes over all pixels and may be some bytes long: this many pixels
# take a few seconds. At MAX_PIXELS it leaves 128 scans, where a usual file has 10.
MAX_SCANNED_PIXELS = 1 << 33
# Pillow joins EXIF segments in quadratic time: a million of them, 11 MB, took 43 seconds.
MAX_EXIF_SEGMENTS = 64
# Numbers in one tag of a TIFF file; Pillow makes objects of each. A tile or a strip needs one.
MAX_TAG_NUMBERS = 1 << 18
# Pieces of PNG and (large) JPEG files; Pillow takes microseconds and up to 100 bytes for each.
MAX_PARTS = 1 << 16
# Smaller files are not searched for either, which takes time too.
_MEDIUM, _LARGE = 1 << 20, 1 << 23
MAX_ICON_PICTURES = 64
MAX_REASON = 200

_PLUGINS = ('Jpeg', 'Mpo', 'Png', 'WebP', 'Gif', 'Bmp', 'Tiff', 'Ppm', 'Avif', 'Ico')
_TOO_LARGE = f'a file of more than {MAX_FILE_BYTES >> 20} MB'
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


def one_line(text: str, most: int = MAX_REASON) -> str:
  """Returns text fit for a terminal: in one line, unprintable characters escaped, cut to `most`."""
  shown = ' '.join(text[: 4 * most].split())
  shown = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in shown)
  return shown if len(shown) <= most else shown[: most - 3] + '...'


class DecodeError(ValueError):
  """An image that cannot be used; the message says why, in one line (`one_line`)."""

  def __init__(self, reason: str):
    super().__init__(one_line(reason))


# ---- Reading -------------------------------------------------------------------------------------

_KINDS = (
  (stat.S_ISDIR, 'a folder, not a file'),
  (stat.S_ISFIFO, 'a pipe, not a file'),
  (stat.S_ISSOCK, 'a socket, not a file'),
  (stat.S_ISCHR, 'a device, not a file'),
  (stat.S_ISBLK, 'a device, not a file'),
)


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
      data += file.read(MAX_FILE_BYTES) or b''
  if len(data) > MAX_FILE_BYTES:
    raise OSError(errno.EFBIG, _TOO_LARGE)
  return data


def _check_regular(status: os.stat_result) -> None:
  for is_kind, words in _KINDS:
    if is_kind(status.st_mode):
      raise OSError(errno.EINVAL, words)
  if status.st_size > MAX_FILE_BYTES:
    raise OSError(errno.EFBIG, _TOO_LARGE)


# ---- Opening -------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
  """Opens an image file for the block, not yet decoded; what goes wrong inside is a DecodeError.

  Raises:
    DecodeError: empty, damaged, of another format than FORMATS, or larger than the bounds.
  """
  with faults():
    _bound_bytes(data)
    try:
      image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
      raise DecodeError(_unidentified(data)) from error
    with image:
      bound_pixels(image.size)
      _bound_scans(image, data)
      yield image
      if image.format == 'PNG' and _may_lack_rows(image):
        _check_whole(data)


@contextlib.contextmanager
def faults() -> Iterator[None]:
  """What goes wrong in the block is a DecodeError."""
  try:
    yield
  except DecodeError:
    raise
  except Image.DecompressionBombError as error:
    raise DecodeError(f'more than {MAX_PIXELS} pixels') from error
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


# ---- Bounds --------------------------------------------------------------------------------------


def bound_pixels(size: tuple[int, int]) -> None:
  """Raises DecodeError for an image without pixels or with more than MAX_PIXELS."""
  width, height = size
  if width < 1 or height < 1:
    raise DecodeError(f'{width} x {height} pixels, so none')
  if width * height > MAX_PIXELS:
    raise DecodeError(f'{width} x {height} pixels, more than {MAX_PIXELS}')


def _bound_bytes(data: bytes) -> None:
  """Refuses what Pillow would spend on before it can be asked for the size."""
  if not data:
    raise DecodeError('the file is empty')
  if len(data) > MAX_FILE_BYTES:
    raise DecodeError(_TOO_LARGE)
  for start, bound in _BOUND.items():
    if data.startswith(start):
      bound(data)


def _bound_scans(image: Image.Image, data: bytes) -> None:
  if image.info.get('progressive'):
    scans = data.count(b'\xff\xda')
    if scans * image.width * image.height > MAX_SCANNED_PIXELS:
      raise DecodeError(f'{scans} scans of {image.width} x {image.height} pixels')


def _bound_jpeg(data: bytes) -> None:
  if len(data) > _MEDIUM and (count := data.count(b'Exif\0\0')) > MAX_EXIF_SEGMENTS:
    raise DecodeError(f'{count} EXIF segments')
  if len(data) > _LARGE:  # Pixels have no such bytes.
    count = sum(1 for _ in re.finditer(rb'\xff[\xe0-\xef\xfe]', data))
    if count > MAX_PARTS:
      raise DecodeError(f'{count} segments')


def _bound_png(data: bytes | memoryview) -> None:
  for count, (name, body, checksum) in enumerate(_chunks(data)):
    if count == MAX_PARTS:
      raise DecodeError(f'more than {MAX_PARTS} chunks')
    if name == b'IDAT' and zlib.crc32(body, zlib.crc32(name)) != checksum:  # Pillow does not look.
      raise DecodeError('pixels that do not match their checksum')


def _chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, memoryview, int]]:
  """Yields (name, content, checksum) of the chunks of a PNG file."""
  view, at = memoryview(data), 8
  while at + 12 <= len(data):
    end = at + 8 + int.from_bytes(view[at : at + 4])
    yield bytes(view[at + 4 : at + 8]), view[at + 8 : end], int.from_bytes(view[end : end + 4])
    at = end + 4


def _may_lack_rows(image: Image.Image) -> bool:
  """Whether one of the last two rows of a PNG file is all zero, as what Pillow has not written."""
  if image.tile:
    return False  # It was not decoded.
  return bool(image.info.get('interlace')) or any(
    _is_zero(image, row) for row in range(max(0, image.height - 2), image.height)
  )


def _is_zero(image: Image.Image, row: int) -> bool:
  last = image.getpixel((image.width - 1, row))
  if any(last) if isinstance(last, tuple) else last:  # Quick, and nearly always enough.
    return False
  return not np.asarray(image.crop((0, row, image.width, row + 1))).any()


# Of an interlaced PNG file: first column, first row, step between columns, step between rows.
_PASSES = (
  (0, 0, 8, 8),
  (4, 0, 8, 8),
  (0, 4, 4, 8),
  (2, 0, 4, 4),
  (0, 2, 2, 4),
  (1, 0, 2, 2),
  (0, 1, 1, 2),
)


def _check_whole(data: bytes | memoryview) -> None:
  """Raises DecodeError where a PNG file has too few pixels; to Pillow the rest is zero."""
  width, height, bits, kind, _, _, interlaced = struct.unpack('>IIBBBBB', data[16:29])
  bits *= {2: 3, 4: 2, 6: 4}.get(kind, 1)
  needed = 0
  for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
    columns, rows = -((left - width) // right), -((top - height) // down)
    needed += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
  inflate, found = zlib.decompressobj(), 0
  for name, body, _ in _chunks(data):
    while name == b'IDAT' and body and found < needed:
      found += len(inflate.decompress(body, 1 << 20))
      body = inflate.unconsumed_tail
  if found < needed:
    raise DecodeError(f'{found} of the {needed} bytes that its pixels take')


def _bound_webp(data: bytes) -> None:
  """Pillow allocates the canvas of a WebP file when it opens it."""
  kind, header = data[12:16], data[20:30]
  if kind == b'VP8X' and len(header) == 10:
    bound_pixels(tuple(1 + int.from_bytes(header[i : i + 3], 'little') for i in (4, 7)))
  elif kind == b'VP8L' and len(header) >= 5:
    bits = int.from_bytes(header[1:5], 'little')
    bound_pixels((1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)))
  elif kind == b'VP8 ' and len(header) == 10:
    bound_pixels(tuple(0x3FFF & number for number in struct.unpack('<2H', header[6:])))


def _bound_icon(data: bytes) -> None:
  """Pillow decodes one picture of an icon when it opens it; each has a header of its own."""
  count, pixels = int.from_bytes(data[4:6], 'little'), 0
  if count > MAX_ICON_PICTURES:
    raise DecodeError(f'an icon of {count} pictures')
  for entry in range(count):
    where = int.from_bytes(data[18 + 16 * entry : 22 + 16 * entry], 'little')
    head = data[where : where + 24]
    if len(head) < 24:
      continue
    if head.startswith(b'\x89PNG'):
      size = struct.unpack('>2I', head[16:])
    else:  # A bitmap's header; that of OS/2 has 12 bytes.
      old = head.startswith(b'\x0c\0\0\0')
      size = struct.unpack('<2H', head[4:8]) if old else struct.unpack('<2i', head[4:12])
    pixels += abs(size[0] * size[1])
    bound_pixels((abs(size[0]), abs(size[1])))
    bound_pixels((1, pixels))  # All of them together, too.
    if head.startswith(b'\x89PNG'):
      picture = memoryview(data)[where:]
      _bound_png(picture)
      _check_whole(picture)


# Type of a TIFF tag -> bytes a number. Of types 1, 2 and 7, Pillow keeps the bytes.
_NUMBER_BYTES = {
  3: 2,
  4: 4,
  5: 8,
  6: 1,
  8: 2,
  9: 4,
  10: 8,
  11: 4,
  12: 8,
  13: 4,
  16: 8,
  17: 8,
  18: 8,
}
_TAGS_OF_TAGS = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability.


def _bound_tiff(data: bytes) -> None:
  """Pillow makes objects of the numbers in tags, and does so anew of bytes that tags share."""
  order, big = '<' if data[0] == 0x49 else '>', data[2:3] == b'+'
  start, count, entry = (
    order + code for code in (('QQ', 'Q', 'HHQQ') if big else ('4xI', 'H', 'HHII'))
  )
  unread, seen, total = [struct.unpack_from(start, data.ljust(24))[-1]], set(), 0
  while unread:
    at = unread.pop()
    if at in seen or at + 8 > len(data):
      continue
    seen.add(at)
    (number,) = struct.unpack_from(count, data, at)
    if number > MAX_PARTS:
      raise DecodeError(f'a TIFF file of {number} tags')
    at += struct.calcsize(count)
    number = min(number, (len(data) - at) // struct.calcsize(entry))
    entries = data[at : at + number * struct.calcsize(entry)]
    for tag, kind, numbers, value in struct.iter_unpack(entry, entries):
      size = numbers * _NUMBER_BYTES.get(kind, 1)
      if size > len(data):
        continue  # Pillow passes over it.
      total += size
      if kind in _NUMBER_BYTES and numbers > MAX_TAG_NUMBERS or total > len(data) + (1 << 16):
        raise DecodeError(f'a TIFF tag of {numbers} numbers, or tags that share their bytes')
      if tag in _TAGS_OF_TAGS:
        unread.append(value)


_BOUND = {
  b'\x89PNG': _bound_png,
  b'\xff\xd8\xff': _bound_jpeg,
  b'RIFF': _bound_webp,
  b'\0\0\1\0': _bound_icon,
  b'II': _bound_tiff,
  b'MM': _bound_tiff,
}
