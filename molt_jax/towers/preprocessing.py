"""What an image tower wants to see, from preprocessor_config.json or processor_config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import Place
from molt_jax.towers import keys


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """RGB in [0, 1], resized to `size` x `size`, minus `mean`, over `std`.

  Attributes:
    size: side in pixels.
    mean: of each channel.
    std: of each channel.
    resample: a `PIL.Image.Resampling` value (3 = bicubic).
    resize: 'crop' brings the shortest side to `size` and crops the centre; 'squash' brings both
      sides to `size`, whatever the picture's proportions.
  """

  size: int
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  resample: int = 3
  resize: str = 'crop'


# What processors do where their file is silent; a lone number for `size` is both sides or the
# shortest one.
_HALVES = [0.5, 0.5, 0.5]
_CLIP: dict[str, Any] = {
  'resample': 3,
  'image_mean': list(ImageSpec.mean),
  'image_std': list(ImageSpec.std),
  'do_center_crop': True,
  'default_to_square': False,
}
DEFAULTS = {
  'CLIP': _CLIP,
  'Siglip': {
    'resample': 3,
    'image_mean': _HALVES,
    'image_std': _HALVES,
    'do_center_crop': False,
    'default_to_square': False,
  },
  'ViT': {
    'resample': 2,
    'image_mean': _HALVES,
    'image_std': _HALVES,
    'do_center_crop': False,
    'default_to_square': True,
  },
}


def read(directory: Place, image_size: int) -> ImageSpec:
  """Reads what a directory says of its images; CLIP's own values where it says nothing.

  Args:
    directory: of a Hugging Face model.
    image_size: side of the images that the tower reads.

  Raises:
    UserError: a key is unknown, something is not implemented, or the images have another size.
  """
  if (file := directory / 'preprocessor_config.json').exists():
    found = files.read_json(file)
  elif (file := directory / 'processor_config.json').exists():
    whole = files.read_json(file)
    keys.check(whole, keys.PROCESSOR, str(file))
    found = whole.get('image_processor', {})
  else:
    return ImageSpec(image_size)
  keys.check(found, keys.PREPROCESSOR, str(file))
  return _spec(found, image_size, str(file))


def _spec(found: Mapping[str, Any], image_size: int, where: str) -> ImageSpec:
  name = found.get('image_processor_type') or found.get('feature_extractor_type') or 'CLIP'
  default = next(d for family, d in DEFAULTS.items() if name.startswith(family))
  c = {**default, **found}
  if c['do_center_crop'] is None and default['do_center_crop']:
    raise UserError(
      f'{where} has do_center_crop = null, which is false in transformers 4 and true in 5; '
      f'write which of the two is meant'
    )
  size = _as_sides(c.get('size', image_size), c['default_to_square'])
  if size.keys() == {'shortest_edge'} and not c['do_center_crop']:
    raise UserError(
      f'{where} resizes the shortest side (size = {files.shown(size)}) and crops nothing; '
      f'implemented: do_center_crop = true, or size = {{"height": ..., "width": ...}}'
    )
  crop = {'height': image_size, 'width': image_size}
  if c['do_center_crop']:
    crop = _as_sides(c.get('crop_size') or image_size, True)
  if crop.keys() != {'height', 'width'}:
    raise UserError(
      f'{where} has crop_size = {files.shown(crop)}; implemented: one number, or '
      f'{{"height": ..., "width": ...}}'
    )
  sides = {*size.values(), *crop.values()}
  if sides != {image_size}:
    raise UserError(
      f'{where} asks for images of {sorted(sides)} pixels, the tower reads {image_size} '
      f'(square); another size or a crop of a larger image is not implemented'
    )
  resize = 'crop' if 'shortest_edge' in size else 'squash'
  return ImageSpec(image_size, tuple(c['image_mean']), tuple(c['image_std']), c['resample'], resize)


def _as_sides(size: int | Mapping[str, int], square: bool | None) -> Mapping[str, int]:
  if isinstance(size, Mapping):
    return size
  return {'height': size, 'width': size} if square else {'shortest_edge': size}
