"""Pixels of all kinds of files and of all modes of Pillow, against the formats' definitions."""

import io
import pathlib
import sys
import threading

import numpy as np
import PIL
import pytest
from PIL import Image

from molt_jax.data import examples, modes, pipeline, table_source, transforms
from molt_jax.data.tables.rows import Row
from molt_jax.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))
from fuzzing import _image_files, _pictures

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
OLD_PILLOW = int(PIL.__version__.split('.')[0]) < 13


def largest(got, want):
  got = np.asarray(got).astype(int)
  assert got.shape == want.shape
  return np.abs(got - want).max()


@pytest.mark.parametrize('name', _pictures.MEANT)
def test_pixels_are_those_that_the_file_means(name):
  if OLD_PILLOW and name in _pictures.NEW:
    pytest.skip('refused by this Pillow')
  for seed in range(4):
    data, rgb_hwc, tolerance = _pictures.MEANT[name](np.random.default_rng(seed))
    assert largest(transforms.decode(data), rgb_hwc) <= tolerance
    transforms.check(data)


@pytest.mark.parametrize('name', _pictures.UNUSABLE)
def test_pixels_that_a_file_does_not_determine_are_refused(name):
  data = _pictures.UNUSABLE[name](np.random.default_rng(0))
  for function in (transforms.decode, transforms.check):
    with pytest.raises(transforms.DecodeError) as error:
      function(data)
    assert str(error.value).isprintable() and 10 < len(str(error.value)) <= 200


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A file of each kind: (folder, name -> what it means, names that are unusable)."""
  root, meant = tmp_path_factory.mktemp('kinds'), {}
  for name, make in _pictures.MEANT.items():
    if not (OLD_PILLOW and name in _pictures.NEW):
      data, *meant[name] = make(np.random.default_rng(1))
      (root / name).write_bytes(data)
  for name, make in _pictures.UNUSABLE.items():
    (root / name).write_bytes(make(np.random.default_rng(1)))
  return root, meant, list(_pictures.UNUSABLE)


def assert_means(image_hwc, meant, preprocess):
  """The error of a pixel survives resizing (bicubic: some overshoot) and normalisation."""
  rgb_hwc, tolerance = meant
  want_hwc = examples.pixels(Image.fromarray(rgb_hwc.astype(np.uint8)), preprocess)
  assert np.abs(image_hwc - want_hwc).max() <= (2 * tolerance + 0.01) / 255 / min(preprocess.std)


@pytest.mark.parametrize('resize', ['crop', 'letterbox'])
def test_a_table_row_of_each_kind(folder, make_preprocess, resize):
  root, meant, unusable = folder
  names = [*meant, *unusable]
  rows = [Row(name, str(root / name), 'a text', ('x',)) for name in names]
  source = table_source.TableSource(tuple(rows), (0,) * len(rows))
  preprocess = make_preprocess(resize=resize)
  (batch,) = pipeline.eval_batches(source, preprocess, pipeline.Batching(batch_size=len(rows)))
  assert batch['present'][:, 0].tolist() == [True] * len(meant) + [False] * len(unusable)
  assert np.isfinite(batch['image']).all() and not batch['image'][len(meant) :].any()
  for name, image_hwc in zip(meant, batch['image'], strict=False):
    assert_means(image_hwc, meant[name], preprocess)
  assert preprocess.report.counts() == {'image': len(unusable)}
  line = preprocess.report.line()
  assert line.startswith(f'{len(unusable)} unusable images') and f'{unusable[0]} (' in line


def test_predict_takes_a_path_of_each_kind(folder, make_preprocess):
  root, meant, unusable = folder
  preprocess = make_preprocess()
  for name, what in meant.items():
    example = examples.single_example(preprocess, image=root / name)
    assert_means(example['image'], what, preprocess)
  for name in unusable:
    with pytest.raises(UserError, match='cannot be decoded') as error:
      examples.single_example(preprocess, image=str(root / name))
    assert '\n' not in str(error.value)


def test_decoding_in_threads_gives_the_same(folder):
  root, meant, unusable = folder
  files = [(root / name).read_bytes() for name in [*meant, *unusable]]

  def outcomes():
    for data in files:
      try:
        yield transforms.decode(data).tobytes()
      except transforms.DecodeError as error:
        yield str(error)

  want, got = list(outcomes()), [None] * 4

  def work(n):
    got[n] = list(outcomes())

  threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert got == [want] * 4


# ---- Images in memory ----------------------------------------------------------------------------


def pixel(mode, *values, **info):
  """An image of one row in memory."""
  image = Image.new(mode, (len(values), 1))
  for x, value in enumerate(values):
    image.putpixel((x, 0), value)
  image.info.update(info)
  return image


def palette(*indices, colours=((10, 20, 30), (200, 0, 0)), mode='P', palette_mode='RGB', **info):
  image = pixel(mode, *indices, **info)
  image.putpalette(bytes(np.ravel(colours).tolist()), palette_mode)
  return image


def from_array(values, dtype, **info):
  image = Image.fromarray(np.array([values], dtype))
  image.info.update(info)
  return image


IN_MEMORY = {
  '1': (pixel('1', 0, 255), [BLACK, WHITE]),
  'L': (pixel('L', 0, 7, 255), [BLACK, (7, 7, 7), WHITE]),
  'L keyed': (pixel('L', 0, 7, transparency=7), [BLACK, WHITE]),
  'RGB': (pixel('RGB', (1, 2, 3)), [(1, 2, 3)]),
  'RGB keyed': (pixel('RGB', (1, 2, 3), (1, 2, 4), transparency=(1, 2, 3)), [WHITE, (1, 2, 4)]),
  'LA': (pixel('LA', (0, 255), (0, 0), (0, 128)), [BLACK, WHITE, (127, 127, 127)]),
  'La': (pixel('LA', (0, 255), (0, 0)).convert('La'), [BLACK, WHITE]),
  'RGBA': (pixel('RGBA', (9, 8, 7, 255), (9, 8, 7, 0)), [(9, 8, 7), WHITE]),
  'RGBa': (pixel('RGBA', (9, 8, 7, 255), (9, 8, 7, 0)).convert('RGBa'), [(9, 8, 7), WHITE]),
  'RGBX': (pixel('RGBX', (9, 8, 7, 0)), [(9, 8, 7)]),
  'P': (palette(0, 1), [(10, 20, 30), (200, 0, 0)]),
  'P keyed': (palette(0, 1, transparency=1), [(10, 20, 30), WHITE]),
  'P keyed beyond': (palette(0, 9, transparency=9), [(10, 20, 30), WHITE]),
  'P alphas': (palette(0, 1, transparency=b'\xff\0'), [(10, 20, 30), WHITE]),
  'P of RGBA': (
    palette(0, 1, colours=((10, 20, 30, 255), (200, 0, 0, 0)), palette_mode='RGBA'),
    [(10, 20, 30), WHITE],
  ),
  'PA': (palette((0, 255), (1, 0), mode='PA'), [(10, 20, 30), WHITE]),
  'CMYK': (
    pixel('CMYK', (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)),
    [WHITE, (0, 255, 255), BLACK],
  ),
  'YCbCr': (pixel('YCbCr', (255, 128, 128), (76, 85, 255)), [WHITE, (254, 0, 0)]),
  'HSV': (pixel('HSV', (0, 255, 255), (0, 0, 128)), [(255, 0, 0), (128, 128, 128)]),
  'LAB': (pixel('LAB', (255, 128, 128), (0, 128, 128)), [WHITE, BLACK]),
  'I;16': (from_array([0, 255, 256, 65535], np.uint16), [BLACK, BLACK, (1, 1, 1), WHITE]),
  'I;16 keyed': (from_array([0, 1], np.uint16, transparency=0), [WHITE, BLACK]),
  'I;16B': (Image.frombytes('I;16B', (2, 1), b'\x80\0\xff\xff'), [(128, 128, 128), WHITE]),
  'I;16L': (Image.frombytes('I;16L', (2, 1), b'\0\x80\xff\xff'), [(128, 128, 128), WHITE]),
  'I;16N': (Image.frombytes('I;16', (1, 1), b'\xff\xff'), [WHITE]),
  'F': (from_array([0, 0.5, 1], np.float32), [BLACK, (128, 128, 128), WHITE]),
  'F black': (from_array([0, 0], np.float32), [BLACK, BLACK]),
  'F dark': (from_array([0, 0.1], np.float32), [BLACK, (26, 26, 26)]),
}
REFUSED = {
  'I': (from_array([0, 255], np.int32), 'what white is'),
  'I of 65535': (from_array([0, 65535], np.int32), 'what white is'),
  'F of 255': (from_array([0, 255], np.float32), r'from 0 to 255'),
  'F below': (from_array([-0.01, 1], np.float32), r'from -0.01 to 1'),
  'F above': (from_array([0, 1.01], np.float32), r'from 0 to 1.01'),
  'F NaN': (from_array([0, np.nan], np.float32), r'from nan to nan'),
  'F infinite': (from_array([0, np.inf], np.float32), r'from 0 to inf'),
  'P without a palette': (Image.new('P', (2, 2)), '0 colours'),
  'P beyond': (palette(0, 2), '2 colours'),
  'PA beyond': (palette((0, 255), (2, 255), mode='PA'), '2 colours'),
  'no pixels': (Image.new('RGB', (0, 4)), '0 x 4'),
  'a bomb': (Image.new('1', (8193, 8193)), 'more than'),
}


@pytest.mark.parametrize('name', IN_MEMORY)
def test_images_in_memory(name, make_preprocess):
  image, colours = IN_MEMORY[name]
  before = image.mode, dict(image.info)
  assert largest(transforms.as_rgb(image), np.array([colours])) <= (
    1 if name in ('YCbCr', 'LA') else 0
  )
  assert before == (image.mode, image.info)
  assert examples.single_example(make_preprocess(), image=image)['present'][0]


@pytest.mark.parametrize('name', REFUSED)
def test_images_in_memory_that_are_refused(name, make_preprocess):
  image, reason = REFUSED[name]
  with pytest.raises(transforms.DecodeError, match=reason):
    transforms.as_rgb(image)
  with pytest.raises(UserError, match=reason) as error:
    examples.single_example(make_preprocess(), image=image)
  assert '\n' not in str(error.value)


def test_every_mode_of_pillow_has_a_rule():
  assert set(Image.MODES) - {name for name in Image.MODES if name.startswith('BGR;')} == set(
    modes.RULES
  )


def test_a_mode_without_a_rule_is_refused_by_name(monkeypatch):
  monkeypatch.delitem(modes.RULES, 'HSV')
  with pytest.raises(transforms.DecodeError, match='mode HSV'):
    transforms.as_rgb(Image.new('HSV', (2, 2)))


def test_a_float_is_scaled_alike_whatever_else_is_in_its_picture():
  dark, light = (
    np.asarray(transforms.as_rgb(from_array([0.1, top], np.float32))) for top in (0.2, 1.0)
  )
  assert (dark[0, 0] == light[0, 0]).all()


# ---- Files that Pillow opened --------------------------------------------------------------------


def test_a_file_that_the_user_opened_counts_as_that_file(folder, make_preprocess):
  root, meant, _ = folder
  for name in ('png grey 2 keyed', 'png rgb 16 keyed', 'tiff grey 16 white is 0', 'png turned'):
    with Image.open(root / name) as image:
      assert largest(transforms.as_rgb(image), meant[name][0]) <= meant[name][1]
  with (
    Image.open(root / 'integers to 255') as image,
    pytest.raises(UserError, match='signed|white'),
  ):
    examples.single_example(make_preprocess(), image=image)


def test_two_bytes_of_a_transparent_colour_are_lost_once_pixels_are_loaded():
  data, *_ = _pictures.MEANT['png rgb 16 keyed'](np.random.default_rng(0))
  with Image.open(io.BytesIO(data)) as image:
    image.load()
    with pytest.raises(transforms.DecodeError, match='16 bits'):
      transforms.as_rgb(image)


@pytest.mark.parametrize('kind', ['TIFF', 'MPO', 'GIF', 'PNG', 'WEBP'])
def test_the_first_of_several_pictures(kind):
  frames, stream = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')], io.BytesIO()
  frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
  assert largest(transforms.decode(stream.getvalue()), np.full((8, 8, 3), (255, 0, 0))) < 8


def test_a_frame_that_leaves_a_part_of_the_picture_is_refused():
  rgb_hwc = np.full((4, 4, 3), 9)
  whole, part = (
    (b'fcTL', np.array([0, width, 4, 0, 0], '>u4').tobytes() + bytes([0, 1, 0, 1, 0, 0]))
    for width in (4, 2)
  )
  animated = b'acTL', np.array([1, 0], '>u4').tobytes()
  assert transforms.decode(_image_files.png(rgb_hwc, 8, 2, chunks=[animated, whole])).size == (4, 4)
  with pytest.raises(transforms.DecodeError, match='8 of 4 x 4 pixels'):
    transforms.decode(_image_files.png(rgb_hwc, 8, 2, chunks=[animated, part]))
