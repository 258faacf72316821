"""What the pixels of an opened image mean: one rule for each of Pillow's modes, to 8-bit RGB.

  1, L, RGB          as they are
  P, PA              through the palette; an index outside of it is refused
  LA, La, RGBA, RGBa laid on white by their alpha, as is a transparent colour of 1, L, P, RGB, I;16
  RGBX               without the fourth channel
  CMYK               (255 - ink) (255 - black) / 255; of JPEG files only those with Adobe's marker,
                     since the others do not say whether their inks are inverted
  YCbCr, HSV, LAB    converted by Pillow and littleCMS; LAB is CIE L*a*b* of white D50
  I;16 and its kin   the upper 8 of the bits, as Pillow takes them of 16-bit colours: this undoes
                     the scaling of 8 bits by 256 and 257; a transparent value is compared in full
  I                  of a PPM file, where 65535 is white, as I;16; other 32-bit integers are
                     refused, since nothing says what white is
  F                  values in [0, 1], as floats are by convention, times 255 and rounded; refused
                     where any lies outside, since white must not be each picture's brightest pixel
  any other          refused

Where a TIFF file says that 0 is white, it is. TIFF files that Pillow reads wrongly without a word
are refused (`samples`), and so is a file that has a part of its pixels alone. What the first frame
of a GIF leaves free is white. Alpha that is 0 everywhere in a BMP file is none; such an icon is
refused. Colour profiles, gamma and chromaticities are not applied.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from molt_jax.data.decode_error import DecodeError

Box = tuple[int, int, int, int]
ADVICE = 'save it with 8 bits, as PNG or JPEG'


class Samples(NamedTuple):
  """What a file says of its pixels that Pillow's mode does not.

  Attributes:
    bits: of a grey value; None: not known.
    white_is_zero: and Pillow does not turn the values round.
    transparent: the colour that is transparent, in the numbers of Pillow's mode; None: as
      `image.info` has it.
    low_hwc: uint8[H, W, 3], the lower bytes of 16-bit colours, where `transparent` is one.
    box: (left, top, right, bottom), the only part that the file has pixels for; None: all.
  """

  bits: int | None = None
  white_is_zero: bool = False
  transparent: int | tuple[int, ...] | None = None
  low_hwc: np.ndarray | None = None
  box: Box | None = None


def to_rgb(image: Image.Image, samples: Samples) -> Image.Image:
  """Returns a loaded image as RGB, by the rule of its mode.

  Raises:
    DecodeError: its pixels do not determine its colours.
  """
  rgb = RULES[image.mode](image, samples)
  if samples.box and samples.box != (0, 0, *image.size):
    free, rgb = rgb, Image.new('RGB', image.size, 'white')
    rgb.paste(free.crop(samples.box), samples.box)
  return rgb


def _plain(image: Image.Image, samples: Samples) -> Image.Image:
  return image.convert('RGB')


def _lab(image: Image.Image, samples: Samples) -> Image.Image:
  """Without the table of 33 levels that littleCMS makes by default, which is off by up to 41."""
  lab, rgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
  exactly = ImageCms.Flags.NOOPTIMIZE
  return ImageCms.buildTransform(lab, rgb, 'LAB', 'RGB', flags=exactly).apply(image)


def _on_white(image: Image.Image, samples: Samples) -> Image.Image:
  rgba = image.convert('RGBA')
  if image.format in ('BMP', 'ICO') and rgba.getextrema()[3][1] == 0:
    if image.format == 'ICO':  # Its mask would be the one that counts; Pillow does not read it.
      raise DecodeError(f'an icon without alpha; {ADVICE}')
    return rgba.convert('RGB')
  return Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba).convert('RGB')


def _grey_on_white(image: Image.Image, samples: Samples) -> Image.Image:
  return _on_white(image.convert('LA'), samples)


def _keyed(image: Image.Image, samples: Samples) -> Image.Image:
  """One colour may be transparent."""
  if 'transparency' not in image.info:
    return image.convert('RGB')
  if samples.transparent is not None:
    image = image.copy()
    image.info['transparency'] = samples.transparent
  return _on_white(image, samples)


def _rgb(image: Image.Image, samples: Samples) -> Image.Image:
  if samples.low_hwc is None:
    return _keyed(image, samples)
  high_hwc, key_c = np.array(image), np.array(samples.transparent)
  high_hwc[(high_hwc == key_c >> 8).all(-1) & (samples.low_hwc == key_c & 255).all(-1)] = 255
  return Image.fromarray(high_hwc)


def _palette(image: Image.Image, samples: Samples) -> Image.Image:
  colours = len(image.palette.palette) // len(image.palette.mode) if image.palette else 0
  if colours < 256:
    index_hw = np.asarray(image.getchannel(0) if image.mode == 'PA' else image)
    if index_hw.max() >= colours:
      beyond = index_hw[index_hw >= colours]
      # Some programs take an index beyond the palette for what is transparent.
      if (beyond != image.info.get('transparency')).any():
        raise DecodeError(f'a palette of {colours} colours, and pixels beyond it')
  return _on_white(image, samples) if image.has_transparency_data else image.convert('RGB')


def _integers(image: Image.Image, samples: Samples) -> Image.Image:
  if samples.bits is None:
    raise DecodeError(f'32-bit integer pixels, which do not say what white is; {ADVICE}')
  return _sixteen_bits(image, samples)


def _sixteen_bits(image: Image.Image, samples: Samples) -> Image.Image:
  value_hw = np.asarray(image)
  grey_hw = (value_hw >> (samples.bits or 16) - 8).astype(np.uint8)
  if samples.white_is_zero:
    grey_hw = 255 - grey_hw
  if isinstance(key := image.info.get('transparency'), int):
    grey_hw[value_hw == key] = 255
  return Image.fromarray(grey_hw).convert('RGB')


def _floats(image: Image.Image, samples: Samples) -> Image.Image:
  value_hw = np.asarray(image)
  low, high = value_hw.min(), value_hw.max()
  if not (low >= 0 and high <= 1):  # NaN is neither.
    raise DecodeError(f'float pixels from {low:g} to {high:g}, where [0, 1] is meant; {ADVICE}')
  grey_hw = np.rint(value_hw * np.float32(255)).astype(np.uint8)
  return Image.fromarray(255 - grey_hw if samples.white_is_zero else grey_hw).convert('RGB')


RULES: Mapping[str, Callable[[Image.Image, Samples], Image.Image]] = {
  '1': _keyed,
  'L': _keyed,
  'RGB': _rgb,
  'P': _palette,
  'PA': _palette,
  'LA': _on_white,
  'La': _grey_on_white,
  'RGBA': _on_white,
  'RGBa': _on_white,
  'RGBX': _plain,
  'CMYK': _plain,
  'YCbCr': _plain,
  'HSV': _plain,
  'LAB': _lab,
  'I;16': _sixteen_bits,
  'I;16B': _sixteen_bits,
  'I;16L': _sixteen_bits,
  'I;16N': _sixteen_bits,
  'I': _integers,
  'F': _floats,
}
