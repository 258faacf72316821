"""From bytes to arrays, with numpy and Pillow alone. Pixels come out as Hugging Face's CLIP image
processor makes them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import bounds, formats, modes
from molt_jax.data.decode_error import DecodeError as DecodeError
from molt_jax.data.samples import read_samples

# Version of what `decode` makes of a file; features are stored under it.
DECODING = 2
# A longer strip is cut (centred) to this aspect ratio before it is resized, since resizing keeps
# the ratio and would blow it up.
MAX_ASPECT = 64
# A side that shrinks by more than 2 * MAX_SHRINK is averaged down to MAX_SHRINK times its new size
# first: the weights of a bicubic filter take 32 bytes a pixel of it. Other images come out the
# same.
MAX_SHRINK = 1024
# Metadata of more bytes is left alone: what is in them is read number by number.
_MAX_EXIF_BYTES = 1 << 20
_ORIENTATION = 0x0112
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> Image.Image:
  """Decodes the first frame of an image file to 8-bit RGB, upright by its EXIF orientation.

  `formats.FORMATS` lists the formats, `modes` the rule for each kind of pixels.

  Raises:
    DecodeError: empty, damaged, of another format, of pixels that have no rule, or larger than the
      bounds in `formats`.
  """
  with formats.opened(data) as image:
    return as_rgb(image)


def check(data: bytes) -> None:
  """Raises DecodeError where `decode` would.

  Cheaper, since a JPEG is read to its end but decoded at its smallest scale.
  """
  with formats.opened(data) as image:
    image.draft(None, (1, 1))
    as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
  """Returns an opened image as `decode` does, by the same rules.

  Raises:
    DecodeError: as in `decode`.
  """
  with formats.faults():
    bounds.bound_pixels(image.size)
    samples = read_samples(image)
    image.load()
    bounds.bound_pixels(image.size)  # Some formats know their size for certain only now.
    rgb = modes.to_rgb(image, samples)
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
  try:
    if len(image.info.get('exif') or b'') <= _MAX_EXIF_BYTES:
      return int(image.getexif().get(_ORIENTATION, 1))
  except Exception:  # Broken metadata must not cost a good picture.
    pass
  return None


def preprocess_image(
  image: Image.Image,
  *,
  size: int,
  mean: Sequence[float],
  std: Sequence[float],
  **how: Any,
) -> np.ndarray:
  """Resizes, rescales by 1/255 and normalises an RGB image.

  Args:
    image: RGB, any size.
    size: side of the square that comes out.
    mean: of each channel, in [0, 1].
    std: of each channel.
    **how: resize, resample, scaled and rounded, see `resized_pixels`.

  Returns:
    float32[size, size, 3]
  """
  pixels_hwc = resized_pixels(image, size, **how)
  height, width, _ = pixels_hwc.shape
  scale, offset = (np.tile(row, width) for row in affine(tuple(mean), tuple(std)))
  # One row of all pixels' channels at a time: four times as fast as broadcasting over a last axis
  # of three.
  values_hx = pixels_hwc.reshape(height, width * 3) * scale
  values_hx += offset
  values_hwc = values_hx.reshape(height, width, 3)
  if height == width == size:
    return values_hwc
  out_hwc = np.zeros((size, size, 3), np.float32)
  top, left = (size - height) // 2, (size - width) // 2
  out_hwc[top : top + height, left : left + width] = values_hwc
  return out_hwc


def resized_pixels(
  image: Image.Image,
  size: int,
  *,
  resize: str,
  resample: int = Image.Resampling.BICUBIC,
  scaled: int = 0,
  rounded: bool = True,
) -> np.ndarray:
  """Resizes an RGB image, and crops its centre.

  Args:
    image: RGB, any size.
    size: side of the square that comes out.
    resize: 'crop' brings the shortest side to `scaled` and crops the centre, as Hugging Face's
      CLIPImageProcessor does; 'squash' brings both sides to `scaled` and crops the centre;
      'letterbox' brings the longest side to `size`; `preprocess_image` pads it with the mean,
      which is zero after normalisation.
    resample: a `PIL.Image.Resampling` value.
    scaled: side before the centre is cropped; 0: `size`.
    rounded: whether resized pixels are rounded to 8 bits.

  Returns:
    uint8[H, W, 3], or float32 where they are not rounded, from 0 to 255; H and W are `size`, but
    for 'letterbox', which leaves one of them smaller.
  """
  place = functools.partial(_RESIZE[resize], size=size, scaled=scaled or size, resample=resample)
  if rounded:
    return np.asarray(place(image))
  # Only a picture of one channel can hold floats.
  channels = [np.asarray(place(channel.convert('F'))) for channel in image.split()]
  return np.stack(channels, axis=-1)


@functools.lru_cache(maxsize=8)
def affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32[3] scale and offset with x * scale + offset = (x / 255 - mean) / std."""
  mean_c, std_c = np.asarray(mean, np.float64), np.asarray(std, np.float64)
  return (1 / (255 * std_c)).astype(np.float32), (-mean_c / std_c).astype(np.float32)


def _crop(image: Image.Image, size: int, scaled: int, resample: int) -> Image.Image:
  image = cut_strip(image)
  short = min(image.size)
  sides = tuple(scaled if side == short else int(scaled * side / short) for side in image.size)
  return _center(resized(image, sides, resample), size)


def _center(image: Image.Image, size: int) -> Image.Image:
  left, top = ((side - size) // 2 for side in image.size)
  return image.crop((left, top, left + size, top + size))


def _fit(image: Image.Image, size: int, scaled: int, resample: int) -> Image.Image:
  del scaled
  longest = max(image.size)
  fitted = tuple(max(1, round(size * side / longest)) for side in image.size)
  return resized(image, fitted, resample)


def _squash(image: Image.Image, size: int, scaled: int, resample: int) -> Image.Image:
  return _center(resized(image, (scaled, scaled), resample), size)


_RESIZE = {'crop': _crop, 'letterbox': _fit, 'squash': _squash}


def resized(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
  """Resizes an image to (width, height) in bounded memory (see MAX_SHRINK)."""
  return image.resize(size, resample, reducing_gap=MAX_SHRINK)


def cut_strip(image: Image.Image) -> Image.Image:
  """Cuts an image (centred) to the aspect ratio MAX_ASPECT if it is longer."""
  limit = MAX_ASPECT * min(image.size)
  if max(image.size) <= limit:
    return image
  width, height = (min(side, limit) for side in image.size)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def pad_tokens(
  ids: Sequence[int], *, max_tokens: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts and right-pads token ids.

  Returns (int32[max_tokens], bool[max_tokens] True on real tokens).
  """
  ids = list(ids)[:max_tokens]
  tokens_t = np.full(max_tokens, pad_id, np.int32)
  tokens_t[: len(ids)] = ids
  return tokens_t, np.arange(max_tokens) < len(ids)
