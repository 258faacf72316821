"""preprocessor_config.json: pixels as Hugging Face's processors make them, or a refusal by name."""

import json

import numpy as np
import pytest
from optional_torch import needs_torch, torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from molt_jax.data import transforms
from molt_jax.errors import UserError
from molt_jax.towers import preprocessing

SIZE = 20
WHOLE = {
  'image_processor_type': 'CLIPImageProcessor',
  'do_resize': True,
  'size': {'shortest_edge': SIZE},
  'resample': 3,
  'do_center_crop': True,
  'crop_size': {'height': SIZE, 'width': SIZE},
  'do_rescale': True,
  'rescale_factor': 0.00392156862745098,
  'do_normalize': True,
  'image_mean': [0.5, 0.4, 0.3],
  'image_std': [0.2, 0.3, 0.25],
  'do_convert_rgb': True,
}
SQUARE = {'height': SIZE, 'width': SIZE}


def read(tmp_path, name='preprocessor_config.json', any_size=False, **content):
  (tmp_path / name).write_text(json.dumps(content))
  return preprocessing.read(tmp_path, SIZE, any_size=any_size)


def pixels(spec, image):
  return transforms.preprocess_image(
    image,
    size=spec.size,
    mean=spec.mean,
    std=spec.std,
    resize=spec.resize,
    resample=spec.resample,
    scaled=spec.scaled,
    rounded=spec.rounded,
  )


def noise(width, height):
  raw = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(raw)


PROCESSORS = {
  'CLIP': CLIPImageProcessorPil,
  'Bit': BitImageProcessorPil,
  'Siglip': SiglipImageProcessorPil,
  'ViT': ViTImageProcessorPil,
}
CHANGES = {
  **{f'resample {i}': ('CLIP', {'resample': i}) for i in range(6)},
  'numbers': ('CLIP', {'size': SIZE, 'crop_size': SIZE}),
  'squash, no crop': ('CLIP', {'size': SQUARE, 'do_center_crop': False}),
  'squash, crop of all': ('CLIP', {'size': SQUARE}),
  'squash, bilinear': ('CLIP', {'size': SQUARE, 'do_center_crop': False, 'resample': 2}),
  'square by default': ('CLIP', {'size': SIZE, 'default_to_square': True, 'do_center_crop': False}),
  'crop of a larger one': ('CLIP', {'size': {'shortest_edge': 27}}),
  'squash, crop of a larger one': ('CLIP', {'size': {'height': 24, 'width': 24}}),
  'do_rescale': ('CLIP', {'do_rescale': False}),
  'rescale_factor': ('CLIP', {'rescale_factor': 1 / 127.5}),
  'do_normalize': ('CLIP', {'do_normalize': False}),
  'neither': ('CLIP', {'do_rescale': False, 'do_normalize': False}),
  'DINOv2': (
    'Bit',
    {'size': {'shortest_edge': 23}, 'crop_size': SQUARE, 'image_mean': [0.485, 0.456, 0.406]},
  ),
  'SigLIP': ('Siglip', {'size': SQUARE}),
  'ViT, its own filter and colours': ('ViT', {'size': SQUARE}),
  'ViT, a number': ('ViT', {'size': SIZE, 'resample': 3}),
}


@pytest.mark.parametrize('width, height', [(37, 64), (64, 31), (20, 20), (9, 50)])
@pytest.mark.parametrize('name', CHANGES)
def test_pixels_are_those_of_hugging_face(tmp_path, name, width, height):
  family, changes = CHANGES[name]
  told = dict(WHOLE, **changes) if family == 'CLIP' else dict(changes)
  processor = PROCESSORS[family](**{k: v for k, v in told.items() if k != 'image_processor_type'})
  image = noise(width, height)
  expected_chw = processor(image, return_tensors='np')['pixel_values'][0]
  spec = read(tmp_path, **{**told, 'image_processor_type': f'{family}ImageProcessor'})
  atol = 2e-6 * max(1.0, float(expected_chw.max()) / 5)  # Some are not rescaled.
  np.testing.assert_allclose(
    pixels(spec, image), expected_chw.transpose(1, 2, 0), atol=atol, rtol=0
  )


@needs_torch
@pytest.mark.parametrize('width, height', [(37, 64), (64, 31), (9, 50)])
@pytest.mark.parametrize('crop', [{}, {'do_center_crop': True, 'crop_size': 16}])
def test_what_is_rescaled_first_is_not_rounded(tmp_path, width, height, crop):
  """DINOv3's processor, whose own code needs torchvision: PyTorch resizes as it does."""
  image = noise(width, height)
  told = {'image_processor_type': 'DINOv3ViTImageProcessorFast', 'size': SQUARE, **crop}
  spec = read(tmp_path, any_size=True, **told)
  pixels_chw = torch.tensor(np.asarray(image).transpose(2, 0, 1)[None] / 255.0)
  resized = torch.nn.functional.interpolate(
    pixels_chw, size=(SIZE, SIZE), mode='bilinear', antialias=True
  )
  expected_hwc = (resized[0].permute(1, 2, 0).numpy() - spec.mean) / spec.std
  if crop:
    expected_hwc = expected_hwc[2:-2, 2:-2]
  assert spec.mean == (0.485, 0.456, 0.406)
  np.testing.assert_allclose(pixels(spec, image), expected_hwc, atol=1e-5, rtol=0)


def test_a_processor_without_sizes_or_without_a_name(tmp_path):
  usual = {'image_processor_type': 'BitImageProcessor', 'image_mean': [0.1, 0.2, 0.3]}
  assert preprocessing.read(tmp_path, SIZE, usual=usual).mean == (0.1, 0.2, 0.3)
  (tmp_path / 'preprocessor_config.json').write_text('{}')
  found = preprocessing.read(tmp_path, SIZE, usual=usual, any_size=True)
  assert (found.size, found.scaled, found.mean) == (224, 0, preprocessing.ImageSpec.mean)
  siglip = preprocessing.read(
    tmp_path, SIZE, usual={'image_processor_type': 'SiglipImageProcessor'}
  )
  assert (siglip.size, siglip.resize, siglip.mean) == (SIZE, 'squash', (0.5, 0.5, 0.5))


def test_another_resolution_sees_as_much_of_the_picture(tmp_path):
  spec = read(tmp_path, **{**WHOLE, 'size': {'shortest_edge': 25}})
  half = spec.at(SIZE // 2)
  assert (half.size, half.scaled, half.resize) == (10, 13, 'crop')
  assert spec.at(SIZE) == spec
  assert 'scaled' not in preprocessing.ImageSpec(SIZE).content()
  assert preprocessing.ImageSpec(SIZE, scaled=24, rounded=False).content()['rounded'] is False


def test_squashing_and_filters_change_pixels(tmp_path):
  image = noise(64, 31)
  made = [
    pixels(read(tmp_path, **{**WHOLE, **changes}), image)
    for changes in ({}, {'size': SQUARE}, *({'resample': i} for i in (0, 1, 2, 4, 5)))
  ]
  for i, one in enumerate(made):
    assert not any(np.array_equal(one, other) for other in made[:i])


def test_the_newer_file_and_no_file_at_all(tmp_path):
  assert preprocessing.read(tmp_path, SIZE) == preprocessing.ImageSpec(SIZE)
  found = read(tmp_path, 'processor_config.json', image_processor={**WHOLE, 'resample': 1})
  assert found == preprocessing.ImageSpec(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), 1)


REFUSED = {
  'do_resize null': ({'do_resize': None}, 'do_resize = None.*implemented: true'),
  'do_resize false': ({'do_resize': False}, 'do_resize = False'),
  'do_rescale null': ({'do_rescale': None}, 'do_rescale = None'),
  'do_normalize': ({'do_normalize': 0}, 'do_normalize = 0'),
  'do_center_crop null': ({'do_center_crop': None}, 'do_center_crop = null'),
  'no crop': ({'do_center_crop': False}, 'crops nothing'),
  'rescale_factor': ({'rescale_factor': 0}, 'rescale_factor = 0,'),
  'resample 6': ({'resample': 6}, r'resample = 6.*0 .nearest.*5 .Hamming'),
  'resample text': ({'resample': 'bicubic'}, "resample = 'bicubic'"),
  'resample null': ({'resample': None}, 'resample = None'),
  'resample true': ({'resample': True}, 'resample = True'),
  'two means': ({'image_mean': [0.5, 0.5]}, 'image_mean.*three numbers'),
  'one mean': ({'image_mean': 0.5}, 'image_mean = 0.5'),
  'NaN': ({'image_mean': [0.5, 0.5, float('nan')]}, 'image_mean'),
  'zero': ({'image_std': [0.5, 0.0, 0.5]}, 'image_std.*three positive'),
  'negative': ({'image_std': [0.5, -1, 0.5]}, 'image_std'),
  'texts': ({'image_std': ['a', 'b', 'c']}, 'image_std'),
  'another size': ({'size': 24, 'crop_size': 24}, 'of 24 pixels.*reads 20.*resolution = 24'),
  'a crop with a border': ({'crop_size': 24}, 'crop_size = 24 and size = 20.*border'),
  'no square': ({'size': {'height': 20, 'width': 40}}, 'size = .*40.*of a square'),
  'crop of no square': ({'crop_size': {'height': 20, 'width': 10}}, 'crop_size = .*10.*square'),
  'crop by its shortest edge': ({'crop_size': {'shortest_edge': 20}}, 'crop_size'),
  'longest edge': ({'size': {'longest_edge': 20}}, 'size.*implemented'),
  'a size of nothing': ({'size': {}}, 'size'),
  'a size of text': ({'size': '20'}, "size = '20'"),
  'a list': ({'size': [20, 20]}, r'size = \[20, 20\]'),
  'zero pixels': ({'size': 0}, 'size = 0'),
  'an unknown key': ({'do_sharpen': True}, "'do_sharpen', unknown here"),
  'another processor': ({'image_processor_type': 'BlipImageProcessor'}, 'BlipImageProcessor'),
  'padding': ({'do_pad': True}, 'do_pad = True'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, name):
  changes, says = REFUSED[name]
  with pytest.raises(UserError, match=says) as error:
    read(tmp_path, **{**WHOLE, **changes})
  assert '\n' not in str(error.value) and 'preprocessor_config.json' in str(error.value)


PUBLISHED = {
  'openai/clip-vit-base-patch32': {
    'crop_size': SIZE,
    'do_center_crop': True,
    'do_normalize': True,
    'do_resize': True,
    'feature_extractor_type': 'CLIPFeatureExtractor',
    'resample': 3,
    'size': SIZE,
    'image_mean': [0.48145466, 0.4578275, 0.40821073],
    'image_std': [0.26862954, 0.26130258, 0.27577711],
  },
  'facebook/dinov2-small, sizes aside': {
    'crop_size': SQUARE,
    'do_center_crop': True,
    'do_convert_rgb': True,
    'do_normalize': True,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': [0.485, 0.456, 0.406],
    'image_processor_type': 'BitImageProcessor',
    'image_std': [0.229, 0.224, 0.225],
    'resample': 3,
    'rescale_factor': 0.00392156862745098,
    'size': {'shortest_edge': 23},
  },
  'google/siglip-base-patch16-224, sizes aside': {
    'do_normalize': True,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': [0.5, 0.5, 0.5],
    'image_processor_type': 'SiglipImageProcessor',
    'image_std': [0.5, 0.5, 0.5],
    'processor_class': 'SiglipProcessor',
    'resample': 3,
    'rescale_factor': 0.00392156862745098,
    'size': SQUARE,
  },
  'facebook/dinov3-vits16, sizes aside': {
    'crop_size': None,
    'data_format': 'channels_first',
    'default_to_square': True,
    'device': None,
    'disable_grouping': None,
    'do_center_crop': None,
    'do_convert_rgb': None,
    'do_normalize': True,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': [0.485, 0.456, 0.406],
    'image_processor_type': 'DINOv3ViTImageProcessorFast',
    'image_std': [0.229, 0.224, 0.225],
    'input_data_format': None,
    'resample': 2,
    'rescale_factor': 0.00392156862745098,
    'return_tensors': None,
    'size': SQUARE,
  },
  'a fast processor of transformers 4': {
    'crop_size': None,
    'data_format': 'channels_first',
    'default_to_square': True,
    'device': None,
    'disable_grouping': None,
    'do_center_crop': None,
    'do_convert_rgb': None,
    'do_normalize': True,
    'do_pad': None,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': [0.5, 0.5, 0.5],
    'image_processor_type': 'ViTImageProcessorFast',
    'image_std': [0.5, 0.5, 0.5],
    'input_data_format': None,
    'pad_size': None,
    'resample': 2,
    'rescale_factor': 0.00392156862745098,
    'return_tensors': None,
    'size': SQUARE,
  },
}


# Family in the name -> (filter, how it resizes, side before the crop, rounded).
ASKED = {
  'clip': (3, 'crop', 0, True),
  'dinov2': (3, 'crop', 23, True),
  'siglip': (3, 'squash', 0, True),
  'dinov3': (2, 'squash', 0, False),
  'fast': (2, 'squash', 0, True),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_files_open(tmp_path, name):
  spec = read(tmp_path, **PUBLISHED[name])
  expected = next(row for family, row in ASKED.items() if family in name)
  assert (spec.resample, spec.resize, spec.scaled, spec.rounded) == expected
