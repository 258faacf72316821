"""Encoders of image files written from the formats' definitions, for what Pillow does not write.

Pixels are [H, W, C] in the file's own numbers. No encoder compresses well.
"""

import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

# Adam7: first column, first row, step between columns, step between rows.
_PASSES = (
  (0, 0, 8, 8),
  (4, 0, 8, 8),
  (0, 4, 4, 8),
  (2, 0, 4, 4),
  (0, 2, 2, 4),
  (1, 0, 2, 2),
  (0, 1, 1, 2),
)
PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'


def packed(row_x: np.ndarray, bits: int, order: str = '>') -> bytes:
  """Packs the numbers of a row, the high bits first, filled up to whole bytes."""
  if bits % 8 == 0:
    return row_x.astype(f'{order}u{bits // 8}').tobytes()
  bit_xb = row_x.astype(np.int64)[:, None] >> np.arange(bits)[::-1] & 1
  return np.packbits(bit_xb.astype(np.uint8).ravel()).tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
  """Returns a chunk of a PNG file."""
  return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def png(
  pixels_hwc: np.ndarray,
  bits: int,
  colour_type: int,
  *,
  chunks: Sequence[tuple[bytes, bytes]] = (),
  interlaced: bool = False,
) -> bytes:
  """Returns a PNG file; `chunks` stand before the pixels."""
  height, width, _ = pixels_hwc.shape
  passes = _PASSES if interlaced else ((0, 0, 1, 1),)
  parts = (pixels_hwc[top::down, left::right] for left, top, right, down in passes)
  rows = (row for part in parts if part.size for row in part)
  data = b''.join(b'\0' + packed(row.ravel(), bits) for row in rows)
  header = struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, interlaced)
  between = b''.join(chunk(*item) for item in chunks)
  return (
    PNG_SIGNATURE
    + chunk(b'IHDR', header)
    + between
    + chunk(b'IDAT', zlib.compress(data, 1))
    + chunk(b'IEND', b'')
  )


def tiff(
  pixels_hwc: np.ndarray,
  bits: int,
  photometric: int | None,
  *,
  order: str = '<',
  number: str = 'u',
  tags: Mapping[int, Sequence[int]] = {},
  **layout: int,
) -> bytes:
  """Returns a TIFF file.

  Args:
    pixels_hwc: the pixels.
    bits: of a number.
    photometric: PhotometricInterpretation; None: not there.
    order: '<' or '>'.
    number: 'u', 'i' or 'f'.
    tags: number -> values, written as SHORT.
    layout: `planar` 2 stores channels apart, `compression` 8 deflates, `tile` is the side of tiles,
      `rows` are those of a strip.
  """
  height, width, channels = pixels_hwc.shape
  planar, compression = layout.get('planar', 1), layout.get('compression', 1)
  pieces = [
    zlib.compress(piece, 1) if compression == 8 else piece
    for piece in _pieces(pixels_hwc, bits, order, number, layout)
  ]
  starts = list(itertools.accumulate((len(piece) for piece in pieces), initial=8))
  sizes = [len(piece) for piece in pieces]
  short, long = 3, 4
  fields = {
    256: (long, [width]),
    257: (long, [height]),
    258: (short, [bits] * channels),
    259: (short, [compression]),
    277: (short, [channels]),
    284: (short, [planar]),
    339: (short, [' uif'.index(number)] * channels),
  }
  fields |= {} if photometric is None else {262: (short, [photometric])}
  if side := layout.get('tile'):
    fields |= {322: (long, [side]), 323: (long, [side])}
    fields |= {324: (long, starts[:-1]), 325: (long, sizes)}
  else:
    fields |= {278: (long, [layout.get('rows', height)])}
    fields |= {273: (long, starts[:-1]), 279: (long, sizes)}
  fields |= {tag: (short, list(values)) for tag, values in tags.items()}
  start = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}I', starts[-1])
  return start + b''.join(pieces) + _directory(fields, order, starts[-1])


def _pieces(pixels_hwc, bits, order, number, layout):
  """Yields the bytes of each strip or tile."""
  height, width, channels = pixels_hwc.shape
  planes = np.split(pixels_hwc, channels, axis=2) if layout.get('planar', 1) == 2 else [pixels_hwc]
  side = layout.get('tile')
  down, right = (side, side) if side else (layout.get('rows', height), width)
  for plane, top, left in itertools.product(planes, range(0, height, down), range(0, width, right)):
    part = plane[top : top + down, left : left + right]
    if side:
      part = np.pad(part, ((0, side - part.shape[0]), (0, side - part.shape[1]), (0, 0)))
    if number == 'u':
      yield b''.join(packed(row.ravel(), bits, order) for row in part)
    else:
      yield part.astype(f'{order}{number}{bits // 8}').tobytes()


def _directory(fields, order, start):
  after, entries, blob = start + 2 + 12 * len(fields) + 4, b'', b''
  for tag, (kind, values) in sorted(fields.items()):
    data = struct.pack(order + str(len(values)) + {3: 'H', 4: 'I'}[kind], *values)
    where = data.ljust(4, b'\0')
    if len(data) > 4:
      where = struct.pack(f'{order}I', after + len(blob))
      blob += data
    entries += struct.pack(f'{order}HHI', tag, kind, len(values)) + where
  return struct.pack(f'{order}H', len(fields)) + entries + bytes(4) + blob


def bmp(
  pixels_hwc: np.ndarray,
  bits: int,
  *,
  palette_kc: np.ndarray | None = None,
  masks: Sequence[int] = (),
  top_down: bool = False,
  in_icon: bool = False,
) -> bytes:
  """Returns a BMP file of pixels [H, W, 1]: indices, or colours in numbers of `bits`.

  Args:
    pixels_hwc: the numbers.
    bits: of each.
    palette_kc: colours of the indices.
    masks: where red, green, blue (and alpha) are in a number; none: the usual places.
    top_down: whether the first row comes first.
    in_icon: without the file's header, and with twice the height in the bitmap's.
  """
  height, width, _ = pixels_hwc.shape
  data = _bitmap_rows(pixels_hwc[..., 0] if top_down else pixels_hwc[::-1, :, 0], bits)
  kc = [] if palette_kc is None else palette_kc.tolist()
  size, high = 108 if len(masks) == 4 else 40, height * (2 if in_icon else 1)
  coded = 3 if masks else 0
  # The resolution is 2,835 pixels a metre.
  numbers = (
    size,
    width,
    -high if top_down else high,
    1,
    bits,
    coded,
    len(data),
    2835,
    2835,
    len(kc),
    0,
  )
  header = struct.pack('<IiiHHIIiiII', *numbers)
  header += b''.join(struct.pack('<I', mask) for mask in masks)
  header = header.ljust(size, b'\0') + b''.join(bytes([*colour[::-1], 0]) for colour in kc)
  if in_icon:
    return header + data
  start = 14 + len(header)
  return b'BM' + struct.pack('<IHHI', start + len(data), 0, 0, start) + header + data


def _bitmap_rows(rows_hw, bits):
  """Packs rows, each filled up to four bytes."""
  if bits == 24:
    height, width = rows_hw.shape
    bytes_hwb = rows_hw.astype('<u4', order='C').view(np.uint8).reshape(height, width, 4)
    lines = [row.tobytes() for row in bytes_hwb[..., :3]]
  else:
    lines = [packed(row, bits, '<') for row in rows_hw]
  return b''.join(line + bytes(-len(line) % 4) for line in lines)


def ico(*pictures: tuple[int, int, int, bytes]) -> bytes:
  """Returns an icon of (width, height, bits, PNG file or bitmap without the file header)."""
  where, entries = 6 + 16 * len(pictures), b''
  for width, height, bits, data in pictures:
    entries += struct.pack('<BBBBHHII', width % 256, height % 256, 0, 0, 1, bits, len(data), where)
    where += len(data)
  return (
    struct.pack('<HHH', 0, 1, len(pictures))
    + entries
    + b''.join(picture[3] for picture in pictures)
  )


def gif(
  index_hw: np.ndarray,
  palette_kc: np.ndarray,
  *,
  screen: tuple[int, int] | None = None,
  corner: tuple[int, int] = (0, 0),
  transparent: int | None = None,
) -> bytes:
  """Returns a GIF file of one frame, at `corner` (left, top) of a screen (width, height)."""
  height, width = index_hw.shape
  wide, high = screen or (width, height)
  bits = max(1, int(len(palette_kc) - 1).bit_length())
  colours = palette_kc.astype(np.uint8).tobytes().ljust(3 << bits, b'\0')
  codes = []
  for part in np.split(index_hw.ravel(), range(250, index_hw.size, 250)):
    codes += [256, *part.tolist()]  # Cleared before codes grow beyond 9 bits.
  bit_nb = np.array([*codes, 257])[:, None] >> np.arange(9) & 1
  data = np.packbits(bit_nb.astype(np.uint8).ravel(), bitorder='little').tobytes()
  blocks = b''.join(
    bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255)
  )
  control = b'' if transparent is None else bytes([0x21, 0xF9, 4, 1, 0, 0, transparent, 0])
  head = b'GIF89a' + struct.pack('<HHBBB', wide, high, 0x80 | bits - 1, 0, 0) + colours
  return (
    head
    + control
    + b','
    + struct.pack('<HHHHB', *corner, width, height, 0)
    + b'\x08'
    + blocks
    + b'\0;'
  )


def pnm(pixels_hwc: np.ndarray, most: int, *, plain: bool = False) -> bytes:
  """Returns a PGM or PPM file whose white is `most`."""
  height, width, channels = pixels_hwc.shape
  magic = {1: 2, 3: 3}[channels] + (0 if plain else 3)
  head = f'P{magic}\n# made by hand\n{width} {height}\n{most}\n'.encode()
  if plain:
    return head + '\n'.join(map(str, pixels_hwc.ravel().tolist())).encode() + b'\n'
  return head + pixels_hwc.astype('>u2' if most > 255 else np.uint8).tobytes()


def pfm(pixels_hw: np.ndarray, order: str = '<', scale: float = 1.0) -> bytes:
  """Returns a PFM file of grey floats."""
  height, width = pixels_hw.shape
  head = f'Pf\n{width} {height}\n{-scale if order == "<" else scale}\n'.encode()
  return head + pixels_hw[::-1].astype(f'{order}f4').tobytes()


def exif(orientation: int) -> bytes:
  """Returns EXIF metadata that hold an orientation alone."""
  return (
    b'II*\0\x08\0\0\0'
    + struct.pack('<H', 1)
    + struct.pack('<HHIHH', 0x0112, 3, 1, orientation, 0)
    + bytes(4)
  )


def jpeg_without(data: bytes, marker: int) -> bytes:
  """Returns a JPEG file without the segments of a marker, e.g. 0xEE, which is Adobe's."""
  at, kept = 2, data[:2]
  while data[at + 1] != 0xDA:
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
    kept += b'' if data[at + 1] == marker else data[at:end]
    at = end
  return kept + data[at:]
