"""Image files of all kinds with the RGB pixels that they mean, by the formats' definitions.

MEANT: kind -> function of a NumPy generator: (file, uint8[H, W, 3], largest difference allowed).
UNUSABLE: kind -> function of a NumPy generator: a file that does not determine its pixels.
"""

import functools
import io

import numpy as np
from PIL import Image, features

from fuzzing import _image_files as files

WHITE = 255


def _size(rng):
  return int(rng.integers(1, 23)), int(rng.integers(1, 23))


def _noise(rng, channels, bits=8):
  return rng.integers(0, 1 << bits, (*_size(rng), channels))


def _eight(pixels_hwc, bits):
  """Brings numbers of `bits` to 8: the upper ones of many, all levels of few."""
  return pixels_hwc >> bits - 8 if bits >= 8 else pixels_hwc * 255 // ((1 << bits) - 1)


def _rgb(pixels_hwc):
  return np.broadcast_to(pixels_hwc, (*pixels_hwc.shape[:2], 3)).astype(np.uint8)


def _white_under(pixels_hwc, alpha_hw1):
  """Lays colours on white."""
  alpha_hw1 = alpha_hw1 / 255
  return _rgb(np.rint(pixels_hwc * alpha_hw1 + WHITE * (1 - alpha_hw1)))


def _saved(image, kind, **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


# ---- PNG -----------------------------------------------------------------------------------------


def _png(rng, *, bits, colour_type, keyed=False):
  channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
  pixels_hwc = _noise(rng, channels, bits)
  eight_hwc, chunks = _eight(pixels_hwc, bits), []
  if keyed:  # A colour that is there, and one of 16 bits that equals it in one byte alone.
    key_c = pixels_hwc[0, 0]
    if bits == 16:
      pixels_hwc[-1, -1] = key_c ^ rng.choice([1, 256])
      eight_hwc = _eight(pixels_hwc, bits)
    chunks = [(b'tRNS', key_c.astype('>u2').tobytes())]
    same_hw = (pixels_hwc == pixels_hwc[0, 0]).all(-1)
    rgb_hwc = np.where(same_hw[..., None], WHITE, _rgb(eight_hwc))
  elif colour_type >= 4:
    rgb_hwc = _white_under(eight_hwc[..., :-1], eight_hwc[..., -1:])
  else:
    rgb_hwc = _rgb(eight_hwc)
  data = files.png(pixels_hwc, bits, colour_type, chunks=chunks, interlaced=rng.random() < 0.3)
  return data, rgb_hwc, 1 if colour_type >= 4 else 0


def _png_palette(rng, *, bits, transparent=False):
  index_hw1 = _noise(rng, 1, bits)
  palette_kc = rng.integers(0, 256, (1 << bits, 3))
  alpha_k1 = rng.integers(0, 256, (1 << bits, 1))
  chunks = [(b'PLTE', palette_kc.astype(np.uint8).tobytes())]
  if not transparent:
    return files.png(index_hw1, bits, 3, chunks=chunks), _rgb(palette_kc[index_hw1[..., 0]]), 0
  chunks.append((b'tRNS', alpha_k1.astype(np.uint8).tobytes()))
  rgb_hwc = _white_under(palette_kc[index_hw1[..., 0]], alpha_k1[index_hw1[..., 0]])
  return files.png(index_hw1, bits, 3, chunks=chunks), rgb_hwc, 1


# ---- TIFF ----------------------------------------------------------------------------------------

# Photometric interpretations.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INDEX, _INKS, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_EXTRA = 338


def _layout(rng, *, order=None):
  layout = {'compression': int(rng.choice([1, 8])), 'order': order or str(rng.choice(['<', '>']))}
  return layout | [{}, {'rows': int(rng.integers(1, 9))}, {'tile': 16}][rng.integers(3)]


def _tiff_grey(rng, *, bits, photometric=_BLACK_IS_ZERO, **layout):
  pixels_hw1 = _noise(rng, 1, bits)
  eight_hw1 = _eight(pixels_hw1, bits)
  rgb_hwc = _rgb(eight_hw1 if photometric else 255 - eight_hw1)
  return files.tiff(pixels_hw1, bits, photometric, **_layout(rng) | layout), rgb_hwc, 0


def _tiff_float(rng, *, photometric=_BLACK_IS_ZERO):
  pixels_hw1 = rng.random((*_size(rng), 1)).astype(np.float32)
  levels_hw1 = np.rint(255.0 * (pixels_hw1 if photometric else 1 - pixels_hw1))
  return (
    files.tiff(pixels_hw1, 32, photometric, number='f', **_layout(rng, order='<')),
    _rgb(levels_hw1),
    1,
  )


def _tiff_colours(rng, *, bits, channels=3, extra=(), apart=False):
  pixels_hwc = _noise(rng, channels, bits)
  eight_hwc = _eight(pixels_hwc, bits)
  tags = {_EXTRA: extra} if extra else {}
  rgb_hwc = _rgb(eight_hwc[..., :3])
  if extra == (2,):
    rgb_hwc = _white_under(eight_hwc[..., :3], eight_hwc[..., 3:])
  if extra == (1,):  # Colours are multiplied by alpha, so no larger.
    pixels_hwc[..., :3] = np.minimum(pixels_hwc[..., :3], pixels_hwc[..., 3:])
    eight_hwc = _eight(pixels_hwc, bits)
    rgb_hwc = _rgb(eight_hwc[..., :3] + WHITE - eight_hwc[..., 3:])
  data = files.tiff(pixels_hwc, bits, _RGB, tags=tags, planar=2 if apart else 1, **_layout(rng))
  return data, rgb_hwc, 2 if extra else 0


def _tiff_grey_alpha(rng, *, extra):
  pixels_hwc = _noise(rng, 2)
  if extra == 1:
    pixels_hwc[..., :1] = np.minimum(pixels_hwc[..., :1], pixels_hwc[..., 1:])
    rgb_hwc = _rgb(pixels_hwc[..., :1] + WHITE - pixels_hwc[..., 1:])
  else:
    rgb_hwc = _white_under(pixels_hwc[..., :1], pixels_hwc[..., 1:])
  return (
    files.tiff(pixels_hwc, 8, _BLACK_IS_ZERO, tags={_EXTRA: [extra]}, **_layout(rng)),
    rgb_hwc,
    2,
  )


def _tiff_palette(rng, *, bits):
  index_hw1 = _noise(rng, 1, bits)
  palette_kc = rng.integers(0, 65536, (1 << bits, 3))
  palette_kc[0, 0] = 65535  # So that it is seen to have 16 bits.
  data = files.tiff(
    index_hw1, bits, _INDEX, tags={320: palette_kc.T.ravel().tolist()}, **_layout(rng)
  )
  return data, _rgb(palette_kc[index_hw1[..., 0]] >> 8), 0


def _tiff_inks(rng, *, bits):
  inks_hwc = _noise(rng, 4, bits)
  return files.tiff(inks_hwc, bits, _INKS, **_layout(rng)), _from_inks(_eight(inks_hwc, bits)), 1


def _from_inks(inks_hwc):
  return _rgb(np.rint((255 - inks_hwc[..., :3]) * (255 - inks_hwc[..., 3:]) / 255))


def _tiff_ycbcr(rng):
  rgb_hwc = _noise(rng, 3)
  r, g, b = np.moveaxis(rgb_hwc, -1, 0).astype(float)
  y = 0.299 * r + 0.587 * g + 0.114 * b
  ycbcr_hwc = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], axis=-1)
  data = files.tiff(
    np.clip(np.rint(ycbcr_hwc), 0, 255).astype(int), 8, _YCBCR, tags={530: (1, 1)}, **_layout(rng)
  )
  return data, _rgb(rgb_hwc), 3


def _tiff_lab(rng):
  lab_hwc = _noise(rng, 3) // 2 + [64, -64, -64]  # L* is 100 at 255.
  return (
    files.tiff(lab_hwc % 256, 8, _LAB, **_layout(rng)),
    _from_lab(lab_hwc * [100 / 255, 1, 1]),
    3,
  )


def _from_lab(lab_hwc):
  """CIE L*a*b* of white D50 to sRGB, by way of XYZ adapted to D65 with Bradford's matrix."""
  y = (lab_hwc[..., 0] + 16) / 116
  f = np.stack([y + lab_hwc[..., 1] / 500, y, y - lab_hwc[..., 2] / 200], axis=-1)
  xyz_hwc = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1, 0.82521]
  to_rgb = [
    [3.13385, -1.61687, -0.49061],
    [-0.97877, 1.91614, 0.03345],
    [0.07195, -0.22899, 1.40524],
  ]
  linear_hwc = np.clip(xyz_hwc @ np.array(to_rgb).T, 0, 1)
  x = np.where(linear_hwc <= 0.0031308, 12.92 * linear_hwc, 1.055 * linear_hwc ** (1 / 2.4) - 0.055)
  return _rgb(np.rint(255 * x))


# ---- Others --------------------------------------------------------------------------------------


def _bmp_palette(rng, *, bits, in_icon=False):
  index_hw1, palette_kc = _noise(rng, 1, bits), rng.integers(0, 256, (1 << bits, 3))
  data = files.bmp(index_hw1, bits, palette_kc=palette_kc, top_down=rng.random() < 0.5)
  return data, _rgb(palette_kc[index_hw1[..., 0]]), 0


def _bmp_bits(rng, *, bits, widths, masked=False):
  """Colours of `widths` bits, blue lowest; a fourth is alpha."""
  parts = [rng.integers(0, 1 << width, _size_of) for _size_of in [_size(rng)] for width in widths]
  value_hw, shift, masks = 0, 0, []
  for part_hw, width in zip(parts, widths, strict=True):
    value_hw = value_hw | part_hw << shift
    masks.append((1 << width) - 1 << shift)
    shift += width
  blue, green, red = (
    part_hw * 255 / ((1 << width) - 1) for part_hw, width in zip(parts[:3], widths, strict=False)
  )
  rgb_hwc = np.stack([red, green, blue], axis=-1)
  rgb_hwc = (
    _white_under(rgb_hwc, parts[3][..., None]) if len(widths) == 4 else _rgb(np.rint(rgb_hwc))
  )
  masks = [masks[2], masks[1], masks[0], *masks[3:]] if masked else []
  return (
    files.bmp(value_hw[..., None], bits, masks=masks, top_down=rng.random() < 0.5),
    rgb_hwc,
    1 if bits != 16 else 8,
  )


def _gif(rng, *, transparent=False, screen=False):
  index_hw, palette_kc = _noise(rng, 1, 4)[..., 0], rng.integers(0, 256, (16, 3))
  key = int(index_hw[0, 0]) if transparent else None
  rgb_hwc = _rgb(palette_kc[index_hw])
  if transparent:
    rgb_hwc = np.where((index_hw == key)[..., None], WHITE, rgb_hwc)
  if not screen:
    return files.gif(index_hw, palette_kc, transparent=key), rgb_hwc, 0
  left, top, right, bottom = rng.integers(0, 5, 4).tolist()
  wide, high = left + index_hw.shape[1] + right, top + index_hw.shape[0] + bottom
  data = files.gif(index_hw, palette_kc, transparent=key, screen=(wide, high), corner=(left, top))
  return data, np.pad(rgb_hwc, ((top, bottom), (left, right), (0, 0)), constant_values=WHITE), 0


def _pnm(rng, *, channels, most):
  pixels_hwc = rng.integers(0, most + 1, (*_size(rng), channels))
  rgb_hwc = _rgb(pixels_hwc * 255 // most if most > 255 else np.rint(pixels_hwc * 255 / most))
  return files.pnm(pixels_hwc, most, plain=rng.random() < 0.5), rgb_hwc, 1


def _pfm(rng):
  pixels_hw = rng.random(_size(rng)).astype(np.float32)
  return (
    files.pfm(pixels_hw, str(rng.choice(['<', '>']))),
    _rgb(np.rint(255.0 * pixels_hw[..., None])),
    1,
  )


def _seen(pixels_hwc):
  """Makes one pixel opaque: an icon without any is refused."""
  pixels_hwc[0, 0, -1] = 255
  return pixels_hwc


def _ico_png(rng):
  pixels_hwc = _seen(_noise(rng, 4))
  small_hwc = rng.integers(0, 256, (1, 1, 4))
  if pixels_hwc.size == small_hwc.size:  # The largest counts, and there is none.
    small_hwc = pixels_hwc
  pictures = [(p.shape[1], p.shape[0], 32, files.png(p, 8, 6)) for p in (small_hwc, pixels_hwc)]
  return files.ico(*pictures), _white_under(pixels_hwc[..., :3], pixels_hwc[..., 3:]), 1


def _ico_bitmap(rng):
  pixels_hwc = _seen(_noise(rng, 4))
  value_hw = pixels_hwc @ [1 << 16, 1 << 8, 1, 1 << 24]
  height, width, _ = pixels_hwc.shape
  mask = bytes(height * (-(-width // 32) * 4))
  data = files.bmp(value_hw[..., None], 32, in_icon=True) + mask
  return (
    files.ico((width, height, 32, data)),
    _white_under(pixels_hwc[..., :3], pixels_hwc[..., 3:]),
    1,
  )


def _ico_masked(rng, *, bits):
  """A palette, or colours of 24 bits, and a mask that is 1 where the icon is transparent."""
  mask_hw1 = _noise(rng, 1, 1)
  mask_hw1[0, 0] = 0
  height, width, _ = mask_hw1.shape
  lines = [files.packed(row.ravel(), 1) for row in mask_hw1[::-1]]
  mask = b''.join(line + bytes(-len(line) % 4) for line in lines)
  palette_kc = rng.integers(0, 256, (1 << min(bits, 8), 3))
  value_hw = rng.integers(0, 1 << bits, (height, width))
  if bits == 24:
    rgb_hwc, palette_kc = value_hw[..., None] >> np.array([16, 8, 0]) & 255, None
  else:
    rgb_hwc = palette_kc[value_hw]
  data = files.bmp(value_hw[..., None], bits, palette_kc=palette_kc, in_icon=True) + mask
  return files.ico((width, height, bits, data)), np.where(mask_hw1 == 1, WHITE, rgb_hwc), 0


def _bmp_alpha_unused(rng):
  rgb_hwc = _noise(rng, 3)
  value_hw1 = (rgb_hwc @ [1 << 16, 1 << 8, 1])[..., None]
  return files.bmp(value_hw1, 32, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)), rgb_hwc, 0


def _smooth(rng):
  """Colours that lossy formats keep nearly as they are."""
  corner_22c = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
  height, width = int(rng.integers(16, 49)), int(rng.integers(16, 49))
  return np.asarray(Image.fromarray(corner_22c).resize((width, height), Image.Resampling.BILINEAR))


def _lossy(rng, *, kind, mode='RGB', tolerance, **options):
  image = Image.fromarray(_smooth(rng)).convert(mode)
  if mode == 'CMYK':
    return _saved(image, kind, **options), _from_inks(np.asarray(image).astype(int)), tolerance
  return _saved(image, kind, **options), _rgb(np.asarray(image.convert('RGB'))), tolerance


def _webp(rng, *, mode):
  pixels_hwc = _noise(rng, len(mode)).astype(np.uint8)
  data = _saved(Image.fromarray(pixels_hwc), 'WEBP', lossless=True, exact=True)
  if mode == 'RGB':
    return data, _rgb(pixels_hwc), 0
  return data, _white_under(pixels_hwc[..., :3], pixels_hwc[..., 3:]), 1


_UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: x.swapaxes(0, 1)[:, ::-1],
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: x.swapaxes(0, 1)[::-1],
}


def _turned(rng, *, kind):
  orientation = int(rng.integers(1, 9))
  pixels_hwc = _noise(rng, 3).astype(np.uint8)
  metadata = files.exif(orientation)
  if kind == 'PNG':
    data = files.png(pixels_hwc, 8, 2, chunks=[(b'eXIf', metadata)])
  elif kind == 'TIFF':
    data = files.tiff(pixels_hwc, 8, _RGB, tags={274: [orientation]}, **_layout(rng))
  else:
    data = _saved(
      Image.fromarray(pixels_hwc),
      kind,
      exif=b'Exif\0\0' + metadata,
      **{'WEBP': {'lossless': True}}.get(kind, {}),
    )
  if kind in ('JPEG', 'MPO', 'AVIF'):
    with Image.open(io.BytesIO(data), formats=('JPEG', 'AVIF')) as image:  # As it is stored.
      pixels_hwc = np.asarray(image)
  return data, _UPRIGHT[orientation](pixels_hwc), 0


MEANT = {
  **{
    f'png grey {bits}': functools.partial(_png, bits=bits, colour_type=0)
    for bits in (1, 2, 4, 8, 16)
  },
  **{
    f'png grey {bits} keyed': functools.partial(_png, bits=bits, colour_type=0, keyed=True)
    for bits in (1, 2, 4, 8, 16)
  },
  **{f'png rgb {bits}': functools.partial(_png, bits=bits, colour_type=2) for bits in (8, 16)},
  **{
    f'png rgb {bits} keyed': functools.partial(_png, bits=bits, colour_type=2, keyed=True)
    for bits in (8, 16)
  },
  **{
    f'png grey alpha {bits}': functools.partial(_png, bits=bits, colour_type=4) for bits in (8, 16)
  },
  **{
    f'png rgb alpha {bits}': functools.partial(_png, bits=bits, colour_type=6) for bits in (8, 16)
  },
  **{f'png palette {bits}': functools.partial(_png_palette, bits=bits) for bits in (1, 2, 4, 8)},
  **{
    f'png palette {bits} alpha': functools.partial(_png_palette, bits=bits, transparent=True)
    for bits in (1, 2, 4, 8)
  },
  **{f'tiff grey {bits}': functools.partial(_tiff_grey, bits=bits) for bits in (1, 2, 4, 8, 16)},
  **{
    f'tiff grey {bits} white is 0': functools.partial(_tiff_grey, bits=bits, photometric=0)
    for bits in (1, 2, 4, 8)
  },
  'tiff grey 12': functools.partial(_tiff_grey, bits=12, order='<', compression=1),
  'tiff grey 16 white is 0': functools.partial(_tiff_grey, bits=16, photometric=0, order='<'),
  'tiff float': _tiff_float,
  'tiff float white is 0': functools.partial(_tiff_float, photometric=0),
  **{f'tiff rgb {bits}': functools.partial(_tiff_colours, bits=bits) for bits in (8, 16)},
  'tiff rgb 8 apart': functools.partial(_tiff_colours, bits=8, apart=True),
  **{
    f'tiff rgb {bits} and one more': functools.partial(
      _tiff_colours, bits=bits, channels=4, extra=(0,)
    )
    for bits in (8, 16)
  },
  **{
    f'tiff rgb {bits} times alpha': functools.partial(
      _tiff_colours, bits=bits, channels=4, extra=(1,)
    )
    for bits in (8, 16)
  },
  **{
    f'tiff rgb {bits} alpha': functools.partial(_tiff_colours, bits=bits, channels=4, extra=(2,))
    for bits in (8, 16)
  },
  'tiff grey times alpha': functools.partial(_tiff_grey_alpha, extra=1),
  'tiff grey alpha': functools.partial(_tiff_grey_alpha, extra=2),
  **{f'tiff palette {bits}': functools.partial(_tiff_palette, bits=bits) for bits in (1, 2, 4, 8)},
  **{f'tiff cmyk {bits}': functools.partial(_tiff_inks, bits=bits) for bits in (8, 16)},
  'tiff ycbcr': _tiff_ycbcr,
  'tiff lab': _tiff_lab,
  **{f'bmp palette {bits}': functools.partial(_bmp_palette, bits=bits) for bits in (1, 4, 8)},
  'bmp 16': functools.partial(_bmp_bits, bits=16, widths=(5, 5, 5)),
  'bmp 16 masks': functools.partial(_bmp_bits, bits=16, widths=(5, 6, 5), masked=True),
  'bmp 24': functools.partial(_bmp_bits, bits=24, widths=(8, 8, 8)),
  'bmp 32': functools.partial(_bmp_bits, bits=32, widths=(8, 8, 8)),
  'bmp 32 alpha unused': _bmp_alpha_unused,
  'bmp 32 alpha': functools.partial(_bmp_bits, bits=32, widths=(8, 8, 8, 8), masked=True),
  'gif': _gif,
  'gif keyed': functools.partial(_gif, transparent=True),
  'gif on a screen': functools.partial(_gif, screen=True),
  'gif keyed on a screen': functools.partial(_gif, transparent=True, screen=True),
  **{
    f'pgm {most}': functools.partial(_pnm, channels=1, most=most)
    for most in (1, 7, 255, 1000, 65535)
  },
  **{
    f'ppm {most}': functools.partial(_pnm, channels=3, most=most) for most in (7, 255, 1000, 65535)
  },
  'pfm': _pfm,
  'ico png': _ico_png,
  'ico bitmap': _ico_bitmap,
  **{f'ico masked {bits}': functools.partial(_ico_masked, bits=bits) for bits in (1, 4, 8, 24)},
  'webp rgb': functools.partial(_webp, mode='RGB'),
  'webp rgba': functools.partial(_webp, mode='RGBA'),
  'jpeg rgb': functools.partial(_lossy, kind='JPEG', quality=95, subsampling=0, tolerance=16),
  'jpeg progressive': functools.partial(
    _lossy, kind='JPEG', quality=95, subsampling=0, progressive=True, tolerance=16
  ),
  'jpeg grey': functools.partial(_lossy, kind='JPEG', mode='L', quality=95, tolerance=16),
  'jpeg cmyk of Adobe': functools.partial(
    _lossy, kind='JPEG', mode='CMYK', quality=95, subsampling=0, tolerance=24
  ),
  **{
    f'{kind} turned'.lower(): functools.partial(_turned, kind=kind)
    for kind in ('JPEG', 'MPO', 'PNG', 'WEBP', 'TIFF')
  },
}


if 'avif' in features.get_supported():  # Pillow 11.3.
  MEANT['avif'] = functools.partial(
    _lossy, kind='AVIF', quality=100, subsampling='4:4:4', tolerance=8
  )
  MEANT['avif turned'] = functools.partial(_turned, kind='AVIF')
# Pillow 11 and 12 refuse them.
NEW = ('tiff rgb 8 and one more', 'tiff rgb 16 and one more', 'tiff grey times alpha', 'tiff ycbcr')


# ---- Unusable ------------------------------------------------------------------------------------


def _integers(rng, *, bits, number, high):
  pixels_hw1 = np.linspace(0, high, 64).astype(np.int64).reshape(8, 8, 1)
  return files.tiff(pixels_hw1, bits, _BLACK_IS_ZERO, number=number, order='<')


def _floats(rng, *, low=0.0, high=1.0, bits=32):
  pixels_x = np.linspace(low, 1.0, 64)
  pixels_x[40] = high
  return files.tiff(pixels_x.reshape(8, 8, 1), bits, _BLACK_IS_ZERO, number='f')


def _big_floats(rng):
  return files.tiff(rng.random((8, 8, 1)), 32, _BLACK_IS_ZERO, number='f', order='>', compression=8)


def _apart(rng, *, bits, photometric, channels, **tags):
  return files.tiff(
    rng.integers(0, 1 << bits, (8, 8, channels)),
    bits,
    photometric,
    planar=2,
    tags={int(name[1:]): values for name, values in tags.items()},
  )


def _beyond_the_palette(rng, *, kind):
  index_hw1, palette_kc = np.full((4, 4, 1), 9), rng.integers(0, 256, (4, 3))
  if kind == 'png':
    return files.png(index_hw1, 8, 3, chunks=[(b'PLTE', palette_kc.astype(np.uint8).tobytes())])
  return files.gif(index_hw1[..., 0], palette_kc)


def _jpeg_inks(rng):
  image = Image.fromarray(_smooth(rng)).convert('CMYK')
  return files.jpeg_without(_saved(image, 'JPEG', quality=95), 0xEE)


def _ico_without_alpha(rng):
  data = files.bmp(rng.integers(0, 1 << 24, (8, 8, 1)), 32, in_icon=True) + bytes(8 * 4)
  return files.ico((8, 8, 32, data))


def _without_strips(rng):
  """Says that its strips have 4 rows, and has the first of two."""
  data = bytearray(files.tiff(rng.integers(0, 256, (8, 8, 1)), 8, _BLACK_IS_ZERO))
  at = int.from_bytes(data[4:8], 'little') + 2
  while int.from_bytes(data[at : at + 2], 'little') != 278:
    at += 12
  data[at + 8 : at + 12] = (4).to_bytes(4, 'little')
  return bytes(data)


def _grey_tiff(rng, photometric, **options):
  return files.tiff(
    rng.integers(0, 256, (8, 8, options.pop('channels', 1))), 8, photometric, **options
  )


UNUSABLE = {
  'integers to 255': functools.partial(_integers, bits=32, number='u', high=255),
  'integers to 65535': functools.partial(_integers, bits=32, number='u', high=65535),
  'integers to the full': functools.partial(_integers, bits=32, number='u', high=2**32 - 1),
  'signed integers of 32 bits': functools.partial(_integers, bits=32, number='i', high=255),
  'signed integers of 16 bits': functools.partial(_integers, bits=16, number='i', high=255),
  'signed integers of 8 bits': functools.partial(_integers, bits=8, number='i', high=100),
  'floats to 255': functools.partial(_floats, high=255),
  'floats to 65535': functools.partial(_floats, high=65535),
  'floats from -1': functools.partial(_floats, low=-1.0),
  'floats with NaN': functools.partial(_floats, high=np.nan),
  'floats with infinity': functools.partial(_floats, high=np.inf),
  'floats of 16 bits': functools.partial(_floats, bits=16),
  'floats of 64 bits': functools.partial(_floats, bits=64),
  'big-endian floats, compressed': _big_floats,
  'pfm scaled': lambda rng: files.pfm(rng.random((4, 4)), scale=2.0),
  'pfm to 255': lambda rng: files.pfm(255 * rng.random((4, 4)) + 2),
  'colours of 16 bits apart': functools.partial(_apart, bits=16, photometric=_RGB, channels=3),
  'alpha apart': functools.partial(_apart, bits=8, photometric=_RGB, channels=4),
  'grey and alpha apart': functools.partial(
    _apart, bits=8, photometric=_BLACK_IS_ZERO, channels=2, _338=(2,)
  ),
  'lab apart': functools.partial(_apart, bits=8, photometric=_LAB, channels=3),
  'no photometric interpretation': functools.partial(_grey_tiff, photometric=None),
  'ycbcr of fewer colours': functools.partial(_grey_tiff, photometric=_YCBCR, channels=3),
  'other inks': functools.partial(_grey_tiff, photometric=_INKS, channels=4, tags={332: [2]}),
  'palette of 8 bits': functools.partial(
    _grey_tiff, photometric=_INDEX, tags={320: range(256)} | {320: [*range(256)] * 3}
  ),
  'a strip too few': _without_strips,
  'beyond a palette, png': functools.partial(_beyond_the_palette, kind='png'),
  'beyond a palette, gif': functools.partial(_beyond_the_palette, kind='gif'),
  'cmyk jpeg of nobody': _jpeg_inks,
  'an icon without alpha': _ico_without_alpha,
}
