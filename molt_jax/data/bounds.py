"""What an image file may ask for, whatever it declares: checked before Pillow spends on it."""

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from molt_jax.data.decode_error import DecodeError

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
TOO_LARGE = f'a file of more than {MAX_FILE_BYTES >> 20} MB'


def bound_pixels(size: tuple[int, int]) -> None:
  """Raises DecodeError for an image without pixels or with more than MAX_PIXELS."""
  width, height = size
  if width < 1 or height < 1:
    raise DecodeError(f'{width} x {height} pixels, so none')
  if width * height > MAX_PIXELS:
    raise DecodeError(f'{width} x {height} pixels, more than {MAX_PIXELS}')


def bound_bytes(data: bytes) -> None:
  """Refuses what Pillow would spend on before it can be asked for the size."""
  if not data:
    raise DecodeError('the file is empty')
  if len(data) > MAX_FILE_BYTES:
    raise DecodeError(TOO_LARGE)
  for start, bound in _BOUND.items():
    if data.startswith(start):
      bound(data)


def bound_scans(image: Image.Image, data: bytes) -> None:
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


def may_lack_rows(image: Image.Image) -> bool:
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


def check_whole(data: bytes | memoryview) -> None:
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
      check_whole(picture)


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
  codes = ('QQ', 'Q', 'HHQQ') if big else ('4xI', 'H', 'HHII')
  start, count, entry = (order + code for code in codes)
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
