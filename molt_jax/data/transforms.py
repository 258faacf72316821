"""From bytes to arrays, with numpy and Pillow alone. Pixels come out as Hugging Face's CLIP image processor makes them."""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

# An image of more pixels is refused before it is decoded: as RGB it would take 200 MB, whatever the size of its file.
MAX_PIXELS = 1 << 26
# A longer strip is cut (centred) to this aspect ratio before it is resized, since resizing keeps the ratio and would blow it up.
MAX_ASPECT = 64

_SIXTEEN_BIT = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N')


class DecodeError(ValueError):
  """An image that cannot be used; the message says why."""


def decode(data: bytes) -> Image.Image:
  """Decodes the first frame of an image file to RGB, upright by its EXIF orientation, transparency laid on white.

  Raises:
    DecodeError: empty, truncated, of an unknown format, or of more than MAX_PIXELS pixels.
  """
  with _opened(data) as image:
    return as_rgb(image)


def check(data: bytes) -> None:
  """Raises DecodeError where `decode` would; cheaper, since a JPEG is read to its end but decoded at its smallest scale."""
  with _opened(data) as image:
    _bound_pixels(image)
    image.draft(None, (1, 1))
    image.load()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
  """Opens an image file for the block; what goes wrong inside is a DecodeError."""
  if not data:
    raise DecodeError('the file is empty')
  try:
    with Image.open(io.BytesIO(data)) as image:
      yield image
  except DecodeError:
    raise
  except Image.UnidentifiedImageError as error:
    raise DecodeError('not an image, or of an unknown format') from error
  except Image.DecompressionBombError as error:
    raise DecodeError(f'more than {MAX_PIXELS} pixels') from error
  except Exception as error:  # Pillow's parsers raise a dozen types on broken bytes (OSError, SyntaxError, struct.error, ...).
    raise DecodeError(_reason(error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
  """Returns an opened image as `decode` does: RGB, upright, transparency on white, 16-bit grey scaled to 8 (Pillow would clip it to white).

  Raises:
    DecodeError: its pixels cannot be read or are more than MAX_PIXELS.
  """
  _bound_pixels(image)
  try:
    image.load()
    return _to_rgb(_upright(image))
  except Exception as error:  # As in `_opened`.
    raise DecodeError(_reason(error)) from error


def _bound_pixels(image: Image.Image) -> None:
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise DecodeError(f'{width} x {height} pixels, more than {MAX_PIXELS}')


def _reason(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # Broken metadata must not cost a good picture.
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode in _SIXTEEN_BIT:
    grey = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8
    return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
  if image.has_transparency_data:
    rgba = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba).convert('RGB')
  return image.convert('RGB')


def preprocess_image(
    image: Image.Image, *, size: int, mean: Sequence[float], std: Sequence[float], resize: str,
    resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
  """Resizes, rescales by 1/255 and normalises an RGB image.

  Args:
    image: RGB, any size.
    size: side of the square that comes out.
    mean: of each channel, in [0, 1].
    std: of each channel.
    resize: 'crop' brings the shortest side to `size` and crops the centre, as Hugging Face's CLIPImageProcessor does; 'letterbox' brings
      the longest side to `size` and pads with the mean, which is zero after normalisation;
      'squash' brings both sides to `size`.
    resample: a `PIL.Image.Resampling` value.

  Returns:
    float32[size, size, 3]
  """
  pixels_hwc = np.asarray(_RESIZE[resize](image, size, resample))
  height, width, _ = pixels_hwc.shape
  scale, offset = (np.tile(row, width) for row in _affine(tuple(mean), tuple(std)))
  # One row of all pixels' channels at a time: four times as fast as broadcasting over a last axis of three.
  values_hx = pixels_hwc.reshape(height, width * 3) * scale
  values_hx += offset
  values_hwc = values_hx.reshape(height, width, 3)
  if height == width == size:
    return values_hwc
  out_hwc = np.zeros((size, size, 3), np.float32)
  top, left = (size - height) // 2, (size - width) // 2
  out_hwc[top:top + height, left:left + width] = values_hwc
  return out_hwc


@functools.lru_cache(maxsize=8)
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32[3] scale and offset with x * scale + offset = (x / 255 - mean) / std."""
  mean_c, std_c = np.asarray(mean, np.float64), np.asarray(std, np.float64)
  return (1 / (255 * std_c)).astype(np.float32), (-mean_c / std_c).astype(np.float32)


def _crop(image: Image.Image, size: int, resample: int) -> Image.Image:
  image = _bound_aspect(image)
  width, height = (size if side == min(image.size) else int(size * side / min(image.size)) for side in image.size)
  left, top = (width - size) // 2, (height - size) // 2
  return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _fit(image: Image.Image, size: int, resample: int) -> Image.Image:
  longest = max(image.size)
  return image.resize(tuple(max(1, round(size * side / longest)) for side in image.size), resample)


def _squash(image: Image.Image, size: int, resample: int) -> Image.Image:
  return image.resize((size, size), resample)


_RESIZE = {'crop': _crop, 'letterbox': _fit, 'squash': _squash}


def _bound_aspect(image: Image.Image) -> Image.Image:
  limit = MAX_ASPECT * min(image.size)
  if max(image.size) <= limit:
    return image
  width, height = (min(side, limit) for side in image.size)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def pad_tokens(ids: Sequence[int], *, max_tokens: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts and right-pads token ids; returns (int32[max_tokens], bool[max_tokens] True on real tokens)."""
  ids = list(ids)[:max_tokens]
  tokens_t = np.full(max_tokens, pad_id, np.int32)
  tokens_t[:len(ids)] = ids
  return tokens_t, np.arange(max_tokens) < len(ids)
