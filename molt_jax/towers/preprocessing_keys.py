"""Closed lists of the keys of preprocessor_config.json and its like (see `keys`)."""

from collections.abc import Iterable

from molt_jax.config.fields import Rule
from molt_jax.towers.keys import (
  FLAG,
  OBJECT,
  PIXELS,
  Table,
  is_number,
  is_whole,
  neutral,
  number,
  only,
  or_null,
)

# In words, since null is false in transformers 4 and the default of true in 5.
ALWAYS = Rule('true', lambda v: v is True)
THREE = Rule(
  'a list of three numbers',
  lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_number, v)),
)
THREE_POSITIVE = Rule(
  'a list of three positive numbers', lambda v: THREE.holds(v) and min(v) > 1e-6
)
RESAMPLING = Rule(
  '0 (nearest), 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (Hamming)',
  lambda v: is_whole(v) and 0 <= v <= 5,
)
SIDES = ('shortest_edge', 'height', 'width')
SIZE = Rule(
  'one number, {"shortest_edge": ...} or {"height": ..., "width": ...}',
  lambda v: (
    PIXELS.holds(v)
    or isinstance(v, dict)
    and bool(v)
    and set(v) <= set(SIDES)
    and all(map(PIXELS.holds, v.values()))
  ),
)
PROCESSORS = ('CLIP', 'Bit', 'Siglip', 'ViT', 'DINOv3ViT')


def _processor_names() -> Iterable[str]:
  for family in PROCESSORS:
    for end in ('ImageProcessor', 'ImageProcessorFast', 'FeatureExtractor'):
      yield family + end


PREPROCESSOR: Table = {
  'image_processor_type': or_null(only(*_processor_names())),
  'feature_extractor_type': or_null(only(*_processor_names())),
  'do_resize': ALWAYS,
  'do_rescale': FLAG,
  'do_normalize': FLAG,
  'do_center_crop': or_null(FLAG),
  'size': SIZE,
  'crop_size': or_null(SIZE),
  'resample': RESAMPLING,
  'rescale_factor': number(1e-6, 1e6),
  'image_mean': THREE,
  'image_std': THREE_POSITIVE,
  'default_to_square': or_null(FLAG),
  'do_pad': only(False, None),
  'use_square_size': only(False, None),
  'do_flip_channel_order': only(False, None),
  'do_reduce_labels': only(False, None),
  'reducing_gap': only(None),
  **neutral(
    'processor_class',
    'do_convert_rgb',
    'pad_size',
    'data_format',
    'input_data_format',
    'device',
    'return_tensors',
    'disable_grouping',
    'image_seq_length',
    '_valid_processor_keys',
    'auto_map',
    'transformers_version',
  ),
}
PROCESSOR: Table = {
  'image_processor': OBJECT,
  **neutral('processor_class', 'auto_map', 'tokenizer'),
}
