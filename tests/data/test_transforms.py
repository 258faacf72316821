"""Decoding of odd and broken files; pixels against Hugging Face's PIL-based CLIP image
processor.
"""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from molt_jax.data import transforms

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def save(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def noise(width, height, mode='RGB', seed=0):
  image = Image.fromarray(
    np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  )
  return image.convert(mode)


@pytest.mark.parametrize('size', [32, 224])
@pytest.mark.parametrize(
  'width,height', [(127, 192), (640, 480), (50, 61), (224, 224), (33, 20), (1, 1), (1200, 31)]
)
def test_crop_matches_hugging_face(size, width, height):
  image = noise(width, height)
  processor = CLIPImageProcessorPil(
    size={'shortest_edge': size}, crop_size={'height': size, 'width': size}
  )
  want_chw = processor(image, return_tensors='np')['pixel_values'][0]
  got_hwc = transforms.preprocess_image(
    image, size=size, mean=CLIP_MEAN, std=CLIP_STD, resize='crop'
  )
  assert got_hwc.shape == (size, size, 3) and got_hwc.dtype == np.float32
  np.testing.assert_allclose(got_hwc, want_chw.transpose(1, 2, 0), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
  'mode,kind',
  [
    ('RGB', 'PNG'),
    ('L', 'PNG'),
    ('P', 'PNG'),
    ('1', 'PNG'),
    ('RGB', 'JPEG'),
    ('L', 'JPEG'),
    ('RGB', 'WEBP'),
    ('P', 'GIF'),
  ],
)
def test_files_match_hugging_face(mode, kind):
  data = save(noise(70, 45, mode), kind)
  processor = CLIPImageProcessorPil(
    size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}
  )
  want_chw = processor(Image.open(io.BytesIO(data)), return_tensors='np')['pixel_values'][0]
  got_hwc = transforms.preprocess_image(
    transforms.decode(data), size=32, mean=CLIP_MEAN, std=CLIP_STD, resize='crop'
  )
  np.testing.assert_allclose(got_hwc, want_chw.transpose(1, 2, 0), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
  'width,height,rows,columns', [(40, 20, 8, 16), (20, 40, 16, 8), (16, 16, 16, 16), (300, 1, 1, 16)]
)
def test_letterbox_pads_with_the_mean(width, height, rows, columns):
  got_hwc = transforms.preprocess_image(
    Image.new('RGB', (width, height), (255, 0, 255)),
    size=16,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resize='letterbox',
  )
  filled = got_hwc.any(axis=2)
  assert (
    got_hwc.shape == (16, 16, 3)
    and filled.any(axis=1).sum() == rows
    and filled.any(axis=0).sum() == columns
  )
  np.testing.assert_allclose(
    got_hwc[filled],
    np.tile((np.array([1, 0, 1]) - CLIP_MEAN) / CLIP_STD, (rows * columns, 1)),
    rtol=1e-5,
  )


def test_a_long_strip_stays_cheap():
  strip = Image.new('RGB', (60_000, 1), (10, 20, 30))
  got_hwc = transforms.preprocess_image(
    strip, size=224, mean=(0, 0, 0), std=(1, 1, 1), resize='crop'
  )
  np.testing.assert_allclose(
    got_hwc, np.broadcast_to(np.array([10, 20, 30]) / 255, (224, 224, 3)), atol=1e-6
  )


def test_pad_tokens_cuts_and_pads():
  tokens_t, mask_t = transforms.pad_tokens([5, 6], max_tokens=4, pad_id=9)
  assert (
    tokens_t.tolist() == [5, 6, 9, 9]
    and mask_t.tolist() == [True, True, False, False]
    and tokens_t.dtype == np.int32
  )
  tokens_t, mask_t = transforms.pad_tokens([1, 2, 3, 4, 5], max_tokens=4, pad_id=9)
  assert tokens_t.tolist() == [1, 2, 3, 4] and mask_t.all()


def test_cmyk():
  data = save(Image.new('CMYK', (4, 4), (255, 0, 0, 0)), 'JPEG', quality=95)
  red, green, blue = transforms.decode(data).getpixel((1, 1))
  assert red < 20 and green > 200 and blue > 200


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparency_is_laid_on_white(mode):
  rgba = Image.new('RGBA', (2, 1), (0, 0, 0, 255))
  rgba.putpixel((1, 0), (0, 0, 0, 0))
  assert list(np.asarray(transforms.as_rgb(rgba.convert(mode)))[0].mean(axis=-1)) == [0, 255]


def test_palette_with_a_transparent_colour():
  image = Image.new('P', (2, 1), 0)
  image.putpalette([10, 20, 30, 200, 0, 0])
  image.putpixel((1, 0), 1)
  decoded = transforms.decode(save(image, 'PNG', transparency=1))
  assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize('kind', ['GIF', 'PNG', 'WEBP'])
def test_the_first_frame_of_an_animation(kind):
  frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
  red, _, blue = transforms.decode(
    save(frames[0], kind, save_all=True, append_images=frames[1:])
  ).getpixel((3, 3))
  assert red > 200 and blue < 50


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_sixteen_bit_grey_keeps_its_range(kind):
  levels = np.array([[0, 256 * 64, 256 * 128, 65535]], np.uint16)
  decoded = transforms.decode(save(Image.fromarray(levels), kind))
  assert np.asarray(decoded)[0, :, 0].tolist() == [0, 64, 128, 255]


def test_exif_orientation():
  image = Image.new('RGB', (3, 2), 'white')
  exif = Image.Exif()
  exif[0x0112] = 6
  assert transforms.decode(save(image, 'JPEG', exif=exif)).size == (2, 3)


def test_broken_exif_does_not_cost_the_picture():
  data = save(Image.new('RGB', (3, 2), 'white'), 'JPEG', exif=b'Exif\0\0' + b'\xff' * 40)
  assert transforms.decode(data).size == (3, 2)


def chunk(name, body):
  return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def bomb(width, height):
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


JPEG = save(noise(64, 64), 'JPEG')
BROKEN = {
  'empty': b'',
  'text': b'hello, world',
  'truncated jpeg': JPEG[: len(JPEG) // 2],
  'header only': JPEG[:20],
  'truncated png': save(noise(64, 64), 'PNG')[:3000],
  'truncated webp': save(noise(64, 64), 'WEBP')[:200],
  'truncated gif': save(noise(64, 64, 'P'), 'GIF')[:800],
  'no data in png': save(noise(8, 8), 'PNG').replace(b'IDAT', b'IDAX'),
  'bomb': bomb(12_000, 12_000),
  'huge bomb': bomb(60_000, 60_000),
  'no pixels': bomb(0, 5),
}
FORMATS = [
  ('RGB', 'PNG'),
  ('RGB', 'JPEG'),
  ('P', 'GIF'),
  ('RGB', 'WEBP'),
  ('RGB', 'TIFF'),
  ('RGB', 'BMP'),
]


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_image_is_a_decode_error_of_one_line(name):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    with pytest.raises(transforms.DecodeError) as error:
      transforms.decode(BROKEN[name])
  assert str(error.value) and '\n' not in str(error.value)


def test_random_damage_never_raises_anything_else():
  rng = np.random.default_rng(0)
  files = [save(noise(24, 24, mode), kind) for mode, kind in FORMATS]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for trial in range(600):
      data = bytearray(files[trial % len(files)])
      for _ in range(int(rng.integers(1, 6))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
      try:
        image = transforms.decode(
          bytes(data[: int(rng.integers(1, len(data) + 1))]) if trial % 2 else bytes(data)
        )
        assert image.mode == 'RGB'
      except transforms.DecodeError:
        pass
