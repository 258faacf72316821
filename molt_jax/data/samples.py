"""What a file says of its pixels that Pillow's mode does not.

Read before the pixels are loaded: Pillow forgets some of it then.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import bounds, formats
from molt_jax.data.decode_error import DecodeError
from molt_jax.data.modes import ADVICE, RULES, Samples


def read_samples(image: Image.Image) -> Samples:
  """Reads what `to_rgb` has to know beside the mode.

  Raises:
    DecodeError: its format or mode is not read, or its file does not determine its colours.
  """
  if image.format not in (None, 'MPO', *formats.FORMATS):
    raise DecodeError(formats.not_read(image.format))
  if image.mode not in RULES:
    raise DecodeError(f'pixels of mode {image.mode}; {ADVICE}')
  boxes = {tile[1] for tile in getattr(image, 'tile', ()) if tile[1]}
  if boxes and image.format != 'GIF':
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if covered < image.width * image.height:
      raise DecodeError(f'the file has {covered} of {image.width} x {image.height} pixels')
  read = _READERS.get(image.format)
  return read(image) if read else Samples()


def _jpeg(image: Image.Image) -> Samples:
  if image.mode == 'CMYK' and 'adobe_transform' not in image.info:
    raise DecodeError(
      'a CMYK JPEG file that does not say whether its inks are inverted; save it as RGB'
    )
  return Samples()


def _gif(image: Image.Image) -> Samples:
  return Samples(box=image.tile[0][1] if image.tile else None)


def _ppm(image: Image.Image) -> Samples:
  if image.info.get('scale', 1) != 1:
    raise DecodeError(f'float pixels to be scaled by {image.info["scale"]}; {ADVICE}')
  return Samples(bits=16)


def _png(image: Image.Image) -> Samples:
  """Mends transparent colours.

  Pillow scales pixels of 2 and 4 bits, but not the one that is transparent, and compares one byte
  of two where colours have 16 bits.
  """
  key = image.info.get('transparency')
  raw = image.tile[0][3] if image.tile else None
  bits = {'1': 1, 'L;2': 2, 'L;4': 4}.get(raw)
  if bits and isinstance(key, int):
    most = (1 << bits) - 1
    # Some versions of Pillow scale that of 1 bit.
    return Samples(transparent=(min(key, most) if bits == 1 else key & most) * 255 // most)
  if image.mode == 'RGB' and isinstance(key, tuple):
    if raw == 'RGB;16B':
      return Samples(transparent=key, low_hwc=_low_bytes(image))
    if max(key) > 255 and not raw:
      raise DecodeError(f'a transparent colour of 16 bits in pixels of 8; {ADVICE}')
  return Samples()


def _low_bytes(image: Image.Image) -> np.ndarray:
  """Decodes a PNG file of 16-bit colours a second time, as if the other byte came first."""
  position = image.fp.tell()
  image.fp.seek(0)
  with Image.open(io.BytesIO(image.fp.read()), formats=('PNG',)) as low:
    low.tile = [(*low.tile[0][:3], 'RGB;16L')]
    low_hwc = np.array(low)
  image.fp.seek(position)
  return low_hwc


_WIDTH_OF_TILE, _LENGTH_OF_TILE = 322, 323
_BITS, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _COLOUR_MAP = 258, 262, 266, 277, 284, 320
_INK_SET, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 332, 338, 339, 530
_YCBCR = 6


def _tiff(image: Image.Image) -> Samples:
  """Refuses what Pillow (11 to 13) reads wrongly or takes for granted; the table says what."""

  def tag(number: int, *default: int) -> tuple[Any, ...]:
    value = image.tag_v2.get(number, default)
    return value if isinstance(value, tuple) else (value,)

  compression = image.info.get('compression', '')
  photometric = tag(_PHOTOMETRIC)
  apart = tag(_PLANAR, 1) == (2,) and tag(_SAMPLES, 1) != (1,)
  simple = (
    set(tag(_BITS, 1)) == {8}
    and tag(_FILL_ORDER, 1) == (1,)
    and (image.mode in ('RGB', 'CMYK') or (image.mode == 'RGBA' and tag(_EXTRA_SAMPLES) == (2,)))
  )
  tile_pixels = int(np.prod(tag(_WIDTH_OF_TILE, 1) + tag(_LENGTH_OF_TILE, 1), dtype=object))
  colours = tag(_COLOUR_MAP) if image.mode == 'P' else ()
  for refused, what in (
    (
      not photometric and compression not in ('group3', 'group4', 'tiff_ccitt'),
      'no word on whether 0 is black',
    ),
    (2 in tag(_SAMPLE_FORMAT, 1), 'signed integers'),
    (apart and not simple, f'channels stored apart, mode {image.mode}'),
    (
      photometric == (_YCBCR,)
      and compression == 'raw'
      and (image.mode, tag(_SUBSAMPLING, 2, 2)) != ('YCbCr', (1, 1)),
      'YCbCr that is not compressed',
    ),
    (image.mode == 'CMYK' and tag(_INK_SET, 1) != (1,), 'inks other than CMYK'),
    (
      image.mode == 'F' and image.tag_v2.prefix == b'MM' and compression != 'raw',
      'compressed big-endian floats',
    ),
    (0 < max(colours, default=0) < 256, 'a palette of 8 bits where there must be 16'),
    (tile_pixels > bounds.MAX_PIXELS, f'tiles of {tile_pixels} pixels'),
  ):
    if refused:
      raise DecodeError(f'a TIFF file with {what}; {ADVICE}')
  return Samples(
    bits=tag(_BITS, 1)[0] if image.mode.startswith('I;16') else None,
    white_is_zero=photometric == (0,),
  )


_READERS: Mapping[str, Callable[[Image.Image], Samples]] = {
  'JPEG': _jpeg,
  'MPO': _jpeg,
  'GIF': _gif,
  'PPM': _ppm,
  'PNG': _png,
  'TIFF': _tiff,
}
