"""What an image tower wants to see, from preprocessor_config.json or processor_config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import Place
from molt_jax.towers import keys, preprocessing_keys


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """RGB in [0, 1], resized and cropped to `size` x `size`, minus `mean`, over `std`.

  Attributes:
    size: side in pixels of what the tower reads.
    mean: of each channel.
    std: of each channel.
    resample: a `PIL.Image.Resampling` value (3 = bicubic).
    resize: 'crop' brings the shortest side to `scaled` and crops the centre; 'squash' brings both
      sides to `scaled`, whatever the picture's proportions, and crops the centre.
    scaled: side in pixels before the centre is cropped, at least `size`; 0: `size`.
    rounded: whether resized pixels are rounded to 256 levels.
  """

  size: int
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  resample: int = 3
  resize: str = 'crop'
  scaled: int = 0
  rounded: bool = True

  def at(self, size: int) -> 'ImageSpec':
    """Returns the same for a tower that reads another size: as much of the picture, scaled."""
    scaled = self.scaled and (2 * self.scaled * size + self.size) // (2 * self.size)
    return dataclasses.replace(self, size=size, scaled=scaled)

  def content(self) -> dict[str, Any]:
    """What identifies it; what earlier versions did not have is left out where it says nothing."""
    content = dataclasses.asdict(self)
    for name, usual in (('scaled', 0), ('rounded', True)):
      if content[name] == usual:
        del content[name]
    return content


# What processors do where their file is silent; a lone number for `size` is both sides or the
# shortest one.
_HALVES = [0.5, 0.5, 0.5]
_CLIP: dict[str, Any] = {
  'resample': 3,
  'image_mean': list(ImageSpec.mean),
  'image_std': list(ImageSpec.std),
  'do_rescale': True,
  'rescale_factor': 1 / 255,
  'do_normalize': True,
  'do_center_crop': True,
  'default_to_square': False,
}
_SQUASHING = {
  **_CLIP,
  'resample': 2,
  'image_mean': _HALVES,
  'image_std': _HALVES,
  'do_center_crop': False,
  'default_to_square': True,
}
IMAGENET = {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
DEFAULTS = {
  'CLIP': _CLIP,
  'Bit': _CLIP,
  'Siglip': {**_SQUASHING, 'resample': 3, 'default_to_square': False},
  'ViT': _SQUASHING,
  'DINOv3ViT': {**_SQUASHING, **IMAGENET},
}
# Of towers that read images of any size: what their processors make where their file is silent.
SIDES = {'Bit': 224, 'DINOv3ViT': 224}
# Processors that rescale before they resize, so that nothing is rounded in between.
RESCALE_FIRST = ('DINOv3ViT',)


def read(
  directory: Place,
  image_size: int,
  *,
  usual: Mapping[str, Any] | None = None,
  any_size: bool = False,
) -> ImageSpec:
  """Reads what a directory says of its images.

  Args:
    directory: of a Hugging Face model.
    image_size: side of the images of the tower's pretraining.
    usual: what the file is taken to say where it is not there; of it, 'image_processor_type' is
      the processor of a file that names none.
    any_size: whether images of another side are legal.

  Raises:
    UserError: a key is unknown, something is not implemented, or the images have another size.
  """
  usual = usual or {}
  if (file := directory / 'preprocessor_config.json').exists():
    found = files.read_json(file)
  elif (file := directory / 'processor_config.json').exists():
    whole = files.read_json(file)
    keys.check(whole, preprocessing_keys.PROCESSOR, str(file))
    found = whole.get('image_processor', {})
  else:
    return spec(usual, image_size, str(directory))
  keys.check(found, preprocessing_keys.PREPROCESSOR, str(file))
  if not (found.get('image_processor_type') or found.get('feature_extractor_type')):
    named = {'image_processor_type': usual.get('image_processor_type')}
    found = {**found, **named}
  asked = spec(found, SIDES.get(_processor(found), image_size), str(file))
  check_size(asked, image_size, any_size, str(file))
  return asked


def check_size(asked: ImageSpec, image_size: int, any_size: bool, where: str) -> None:
  """Raises UserError where images have another side than the tower reads (`any_size`: it reads
  them all); `where` names what asks for them.
  """
  if asked.size != image_size and not any_size:
    raise UserError(
      f'{where} asks for images of {asked.size} pixels, the tower reads {image_size} (square); '
      f'give config.backbones.image.resolution = {asked.size}, and positions are resampled, or '
      f'{image_size}'
    )


def spec(found: Mapping[str, Any], image_size: int, where: str) -> ImageSpec:
  """Returns what a preprocessor_config.json asks for.

  Args:
    found: its content, of which the keys are known.
    image_size: side of the images where it says none.
    where: names it in errors.

  Raises:
    UserError: it asks for what is not implemented.
  """
  processor = _processor(found)
  usual = DEFAULTS[processor]
  square = {'height': image_size, 'width': image_size}
  c = {'size': {'shortest_edge': image_size} if usual['do_center_crop'] else square}
  c |= {**usual, **found}
  if c['do_center_crop'] is None and usual['do_center_crop']:
    raise UserError(
      f'{where} has do_center_crop = null, which is false in transformers 4 and true in 5; '
      f'write which of the two is meant'
    )
  scaled, resize = _scaled(c, where)
  size = _cropped(c, image_size, where) if c['do_center_crop'] else scaled
  if size > scaled:
    raise UserError(
      f'{where} has crop_size = {size} and size = {scaled}, so that pictures would get a black '
      'border, which is not implemented; implemented: a crop of at most size'
    )
  mean, std = _affine(c)
  scaled = 0 if scaled == size else scaled
  rounded = processor not in RESCALE_FIRST
  return ImageSpec(size, mean, std, c['resample'], resize, scaled, rounded)


def _processor(found: Mapping[str, Any]) -> str:
  """Returns the key of DEFAULTS that a file names; CLIP's where it names none."""
  name = found.get('image_processor_type') or found.get('feature_extractor_type') or 'CLIP'
  return next(key for key in DEFAULTS if name.startswith(key))


def _scaled(c: Mapping[str, Any], where: str) -> tuple[int, str]:
  """Returns the side that pictures are resized to, and how: 'crop' or 'squash'."""
  size = _as_sides(c['size'], c['default_to_square'])
  if size.keys() == {'shortest_edge'}:
    if not c['do_center_crop']:
      raise UserError(
        f'{where} resizes the shortest side (size = {files.shown(size)}) and crops nothing; '
        f'implemented: do_center_crop = true, or size = {{"height": ..., "width": ...}}'
      )
    return size['shortest_edge'], 'crop'
  return _square(size, 'size', where), 'squash'


def _cropped(c: Mapping[str, Any], image_size: int, where: str) -> int:
  """Returns the side of the crop."""
  return _square(_as_sides(c.get('crop_size') or image_size, True), 'crop_size', where)


def _square(sides: Mapping[str, int], key: str, where: str) -> int:
  if sides.keys() != {'height', 'width'} or sides['height'] != sides['width']:
    raise UserError(
      f'{where} has {key} = {files.shown(sides)}; implemented: one number, or '
      f'{{"height": ..., "width": ...}} of a square'
    )
  return sides['height']


def _affine(c: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and standard deviation that pixels in [0, 1] are normalised by."""
  mean, std = c['image_mean'], c['image_std']
  if not c['do_normalize']:
    mean, std = [0.0] * 3, [1.0] * 3
  factor = c['rescale_factor'] if c['do_rescale'] else 1.0
  if abs(factor - 1 / 255) < 1e-9:
    return tuple(mean), tuple(std)
  return tuple(m / (255 * factor) for m in mean), tuple(s / (255 * factor) for s in std)


def _as_sides(size: int | Mapping[str, int], square: bool | None) -> Mapping[str, int]:
  if isinstance(size, Mapping):
    return size
  return {'height': size, 'width': size} if square else {'shortest_edge': size}
