"""What is read as an image file, and that it costs little whatever it declares."""

import io
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from molt_jax.data import (
  bounds,
  decode_report,
  examples,
  formats,
  pipeline,
  table,
  table_source,
  transforms,
)
from molt_jax.data.decode_error import one_line
from molt_jax.data.sources import Dataset
from molt_jax.data.summary import describe
from molt_jax.errors import UserError
from molt_jax.evaluation.recorder import PredictionRecorder
from molt_jax.features import extract
from molt_jax.features.frozen import Reads
from molt_jax.pairs import augment, probes
from molt_jax.pairs import batches as pairs
from molt_jax.reporting.contact_sheet import contact_sheet

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
from fuzzing import _image_files  # noqa: E402


def save(image, kind, **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def reason(data, function=transforms.decode):
  with pytest.raises(transforms.DecodeError) as error:
    function(data)
  return str(error.value)


# ---- Reading -------------------------------------------------------------------------------------

PNG = save(Image.new('RGB', (3, 2), (9, 8, 7)), 'PNG')


def _pipe(path):
  os.mkfifo(path)


def _socket(path):
  socket.socket(socket.AF_UNIX).bind(str(path))


def _sparse(path):
  with path.open('wb') as file:
    file.write(PNG)
    file.truncate(40 << 30)


NO_FILES = {
  'pipe': (_pipe, 'a pipe, not a file'),
  'socket': (_socket, 'a socket, not a file'),
  'device': (lambda path: path.symlink_to('/dev/zero'), 'a device, not a file'),
  'folder': (pathlib.Path.mkdir, 'a folder, not a file'),
  'sparse': (_sparse, 'a file of more than 256 MB'),
  'endless': (lambda path: path.symlink_to('/proc/self/pagemap'), '256 MB|permitted|denied|image'),
  'gone': (lambda path: None, 'No such file'),
  'loop': (lambda path: path.symlink_to(path.name), 'Too many levels'),
}


@pytest.mark.parametrize('name', NO_FILES)
def test_what_is_no_image_file_is_neither_waited_for_nor_read(
  name, tmp_path, make_preprocess, monkeypatch
):
  monkeypatch.setattr(bounds, 'MAX_FILE_BYTES', 1 << 20)
  make, says = NO_FILES[name]
  path = pathlib.Path(os.path.relpath(tmp_path)) / name  # Sockets have short names.
  make(path)
  preprocess = make_preprocess()
  with pytest.raises(UserError, match=says):
    examples.single_example(preprocess, image=path)
  rows = (table.Row('test.csv:2', str(path), 'a text', ('x',)),)
  (batch,) = pipeline.eval_batches(
    table_source.TableSource(rows, (0,)), preprocess, pipeline.Batching(batch_size=1)
  )
  assert batch['present'].tolist() == [[False, True]]
  assert preprocess.report.counts() == {'image': 1} and 'test.csv:2 (' in preprocess.report.line()


@pytest.mark.parametrize('path', ['a\0b', '\udcff' * 5000, 7, True])
def test_what_is_no_path_is_an_os_error(path):
  with pytest.raises(OSError):
    formats.read_file(path)


def test_a_file_that_grows_while_it_is_read_is_read_to_its_end(tmp_path, monkeypatch):
  (tmp_path / 'x').write_bytes(PNG)
  status = os.fstat

  def before(descriptor):
    fields = list(status(descriptor))
    fields[6] = 5  # Its size.
    return os.stat_result(fields)

  monkeypatch.setattr(os, 'fstat', before)
  assert formats.read_file(tmp_path / 'x') == PNG
  monkeypatch.setattr(bounds, 'MAX_FILE_BYTES', len(PNG) - 1)
  with pytest.raises(OSError, match='more than'):
    formats.read_file(tmp_path / 'x')


# ---- Formats -------------------------------------------------------------------------------------

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
OTHERS = {
  'EPS': EPS,
  'PSD': b'8BPS\0\1' + bytes(40),
  'PDF': b'%PDF-1.7\n',
  'Git LFS': b'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n',
  'SVG': b'<?xml version="1.0"?><svg/>',
  'web page': b'<!doctype html><html></html>',
  'HEIC': b'\0\0\0\x18ftypheic\0\0\0\0',
  'FITS': b'SIMPLE  =                    T',
  'HDF5': b'\x89HDF\r\n\x1a\n' + bytes(40),
  'WMF': b'\xd7\xcd\xc6\x9a\0\0' + bytes(40),
  'QOI': b'qoif' + bytes(20),
  'JPEG2000': b'\0\0\0\x0cjP  \r\n\x87\n' + bytes(20),
  'not an image': b'hello, world, this is a text',
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_formats_are_named_and_not_opened(name, monkeypatch):
  monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kwargs: pytest.fail('started'))
  assert name in reason(OTHERS[name]) and name in reason(OTHERS[name], transforms.check)


def test_a_file_of_another_format_that_the_user_opened_is_not_decoded(make_preprocess, monkeypatch):
  monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kwargs: pytest.fail('started'))
  with pytest.raises(UserError, match='EPS'):
    examples.single_example(make_preprocess(), image=Image.open(io.BytesIO(EPS)))


@pytest.mark.parametrize(
  'data, says',
  [
    (
      _image_files.tiff(np.zeros((4, 4, 1)), 64, 1, number='f'),
      'it cannot be read as TIFF .unknown pixel mode',
    ),
    (save(Image.new('L', (8, 8)), 'JPEG')[:20], 'it cannot be read as JPEG'),
    (PNG[:20], 'Truncated File Read'),
    (b'GIF89a', 'it cannot be read as GIF'),
  ],
)
def test_a_damaged_head_is_named(data, says):
  assert re.match(says, reason(data))


def test_no_other_place_opens_images():
  """`Image.open` tries all formats unless it is told which."""
  where = [
    f'{path.relative_to(ROOT)}: {line.strip()}'
    for folder in ('molt_jax', 'tools', 'experiments')
    for path in (ROOT / folder).rglob('*.py')
    for line in path.read_text().splitlines()
    if 'Image.open(' in line and 'formats=' not in line
  ]
  assert where == []


# ---- Bounds --------------------------------------------------------------------------------------


def _png(width, height, *chunks):
  body = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  parts = [
    (b'IHDR', body),
    *chunks,
    (b'IDAT', zlib.compress(bytes(height + 3 * width * height), 1) if width < 9 else b''),
  ]
  return _image_files.PNG_SIGNATURE + b''.join(_image_files.chunk(*part) for part in parts)


def _webp(width, height):
  data = bytearray(save(Image.new('RGB', (1, 1)), 'WEBP', lossless=True))
  at = data.index(b'VP8L') + 9
  bits = int.from_bytes(data[at : at + 4], 'little') >> 28 << 28
  data[at : at + 4] = (bits | width - 1 | height - 1 << 14).to_bytes(4, 'little')
  return bytes(data)


def _bitmap(width, height):
  return struct.pack('<IiiHHIIiiII', 40, width, height, 1, 32, 0, 0, 0, 0, 0, 0)


def _bmp(width, height):
  return b'BM' + struct.pack('<IHHI', 54, 0, 0, 54) + _bitmap(width, height)


def _gif(screen, frame):
  palette_kc = np.zeros((2, 3))
  data = bytearray(_image_files.gif(np.zeros((1, 1), int), palette_kc))
  data[6:10] = struct.pack('<HH', *screen)
  at = data.index(b',')
  data[at + 5 : at + 9] = struct.pack('<HH', *frame)
  return bytes(data)


def _tiff(replace):
  """A TIFF file of which numbers of tags are replaced: tag -> (count, value)."""
  data = bytearray(_image_files.tiff(np.zeros((8, 8, 1), int), 8, 1, compression=8, tile=16))
  at = int.from_bytes(data[4:8], 'little')
  for entry in range(at + 2, at + 2 + 12 * int.from_bytes(data[at : at + 2], 'little'), 12):
    tag = int.from_bytes(data[entry : entry + 2], 'little')
    if tag in replace:
      data[entry + 4 : entry + 12] = struct.pack('<II', *replace[tag])
  return bytes(data)


def _tiff_of_numbers(count):
  """A TIFF file that is one long list of strips."""
  entries = [
    (256, 4, 1, 10),
    (257, 4, 1, 10),
    (258, 3, 1, 8),
    (262, 3, 1, 1),
    (273, 4, count, 8),
    (279, 4, count, 8),
  ]
  head = b'II*\0' + struct.pack('<I', 8 + 4 * count) + bytes(4 * count)
  return (
    head
    + struct.pack('<H', len(entries))
    + b''.join(struct.pack('<HHII', *e) for e in entries)
    + bytes(4)
  )


def _tiff_of_shared_bytes(tags, size):
  """A TIFF file whose tags all have the same bytes."""
  needed = [
    (256, 4, 1, 1),
    (257, 4, 1, 1),
    (258, 3, 1, 8),
    (262, 3, 1, 1),
    (273, 4, 1, 8),
    (279, 4, 1, 1),
  ]
  entries = needed + [(40_000 + n, 7, size, 8) for n in range(tags)]
  head = b'II*\0' + struct.pack('<I', 8 + size) + bytes(size)
  return (
    head
    + struct.pack('<H', len(entries))
    + b''.join(struct.pack('<HHII', *e) for e in entries)
    + bytes(4)
  )


def _scans(side, count):
  data = save(Image.new('L', (side, side)), 'JPEG', progressive=True)
  start, end = data.rindex(b'\xff\xda'), data.rindex(b'\xff\xd9')
  return data[:end] + data[start:end] * count + data[end:]


def _segments(segment, count):
  data = save(Image.new('L', (8, 8)), 'JPEG')
  return data[:2] + segment * count + data[2:]


EXIF_SEGMENT = b'\xff\xe1\0\x09Exif\0\0x'
# Name -> function that makes the file, what is said of it.
BOMBS = {
  'png': (lambda: _png(60_000, 60_000), 'more than 67108864'),
  'png, not quite a bomb to Pillow': (lambda: _png(9000, 9000), '9000 x 9000 pixels'),
  'png text': (
    lambda: _png(8, 8, *[(b'zTXt', b'k\0\0' + zlib.compress(bytes(1 << 20)))] * 99),
    'text',
  ),
  'png profile': (
    lambda: _png(8, 8, (b'iCCP', b'k\0\0' + zlib.compress(bytes(1 << 26)))),
    'too large',
  ),
  'png chunks': (lambda: _png(8, 8, *[(b'tIMe', b'')] * 70_000), 'chunks'),
  'webp': (lambda: _webp(16383, 16383), '16383 x 16383 pixels'),
  'webp of fewer': (lambda: _webp(9000, 9000), '9000 x 9000 pixels'),
  'bmp': (lambda: _bmp(60_000, 60_000), 'more than 67108864'),
  'bmp upside down': (lambda: _bmp(60_000, -60_000), 'more than 67108864'),
  'icon of png': (lambda: _image_files.ico((9, 9, 32, _png(13_000, 13_000))), '13000 x 13000'),
  'second of icon': (
    lambda: _image_files.ico((9, 9, 32, PNG), (200, 200, 32, _png(13_000, 13_000))),
    '13000 x 13000',
  ),
  'icon of many': (lambda: _image_files.ico(*[(9, 9, 32, PNG)] * 65), '65 pictures'),
  'icon of many pixels': (
    lambda: _image_files.ico(*[(9, 9, 32, _bitmap(6000, 6000))] * 2),
    'more than 67108864',
  ),
  'icon of a bitmap': (lambda: _image_files.ico((9, 9, 32, _bitmap(9000, 18_000))), '9000 x 18000'),
  'gif': (lambda: _gif((65_535, 65_535), (1, 1)), 'pixels'),
  'gif of fewer': (lambda: _gif((9000, 9000), (1, 1)), '9000 x 9000 pixels'),
  'gif frame': (lambda: _gif((1, 1), (9000, 9000)), '9000 x 9000 pixels'),
  'tiff': (lambda: _tiff({256: (1, 60_000), 257: (1, 60_000)}), 'more than 67108864'),
  'tiff tile': (lambda: _tiff({322: (1, 30_000), 323: (1, 30_000)}), 'tiles of 900000000 pixels'),
  'tiff numbers': (lambda: _tiff_of_numbers(2_000_000), '2000000 numbers'),
  'tiff shared bytes': (lambda: _tiff_of_shared_bytes(5000, 1 << 20), 'share their bytes'),
  'tiff of many tags': (
    lambda: b'II+\0\x08\0\0\0' + struct.pack('<QQ', 16, 1 << 20) + bytes(20 << 10),
    '1048576 tags',
  ),
  'ppm': (lambda: b'P6 60000 60000 255\n', 'more than 67108864'),
  'pfm': (lambda: b'Pf\n60000 60000\n-1\n', 'more than 67108864'),
  'jpeg scans': (lambda: _scans(4000, 600), 'scans of 4000 x 4000'),
  'jpeg exif': (lambda: _segments(EXIF_SEGMENT, 120_000), '120000 EXIF segments'),
  'jpeg comments': (lambda: _segments(b'\xff\xfe\0\2', 2_200_000), 'segments'),
}


@pytest.mark.parametrize('name', BOMBS)
def test_a_bomb_is_refused_by_name(name):
  make, says = BOMBS[name]
  assert says in reason(make())


USE = """
import resource, sys
from molt_jax.data import transforms
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[1:]:
  data = open(path, 'rb').read()
  try:
    transforms.decode(data)
    print(path, 'was decoded')
  except transforms.DecodeError:
    pass
print(peak() - before)
"""


def test_bombs_take_little_memory_and_write_nothing(tmp_path):
  paths = []
  for n, (make, _) in enumerate(BOMBS.values()):
    paths.append(tmp_path / str(n))
    paths[-1].write_bytes(make())
  done = subprocess.run(
    [sys.executable, '-c', USE, *paths], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stderr == '' and int(done.stdout) < 100


STRIP = """
import resource
import numpy as np
from PIL import Image
from molt_jax.data import transforms
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
how = {'size': 32, 'mean': (0, 0, 0), 'std': (1, 1, 1)}
for size in ((4_000_000, 1), (1, 4_000_000)):
  strip = Image.new('RGB', size, (10, 20, 30))
  before = peak()
  for resize in ('crop', 'letterbox'):
    image_hwc = transforms.preprocess_image(strip, resize=resize, **how)
    filled_n3 = image_hwc[image_hwc.any(axis=-1)]
    want_n3 = np.tile(np.array([10, 20, 30]) / 255, (len(filled_n3), 1))
    np.testing.assert_allclose(filled_n3, want_n3, atol=1e-6)
    assert len(filled_n3) == (1024 if resize == 'crop' else 32)
  print(peak() - before)
"""


def test_a_strip_is_resized_in_little_memory():
  done = subprocess.run(
    [sys.executable, '-c', STRIP], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert max(map(int, done.stdout.split())) < 40  # The weights alone would take 128 MB.


def test_a_strip_keeps_what_is_at_its_ends_in_a_letterbox():
  pixels_hwc = np.zeros((1, 300_000, 3), np.uint8)
  pixels_hwc[:, :150_000] = 200
  image_hwc = transforms.preprocess_image(
    Image.fromarray(pixels_hwc), size=16, mean=(0, 0, 0), std=(1, 1, 1), resize='letterbox'
  )
  assert (image_hwc[7:9, :7].max(axis=0) > 0.7).all() and (image_hwc[:, 9:] < 0.05).all()


def _short(pixels_hwc, bits, colour_type, **how):
  """A PNG file with half of its bytes of pixels, in whole rows, all checksums right."""
  data = _image_files.png(pixels_hwc, bits, colour_type, **how)
  rows = zlib.decompress(data[41:-16])
  row = 1 + -(-pixels_hwc[0].size * bits // 8)
  half = _image_files.chunk(b'IDAT', zlib.compress(rows[: len(rows) // 2 // row * row]))
  return data[:33] + half + data[-12:]


@pytest.mark.parametrize('interlaced', [False, True])
@pytest.mark.parametrize(
  'bits, colour_type, channels', [(8, 2, 3), (8, 6, 4), (16, 0, 1), (2, 0, 1), (8, 4, 2), (1, 0, 1)]
)
def test_missing_rows_are_not_black(bits, colour_type, channels, interlaced):
  top = np.random.default_rng(0).integers(0, 1 << bits, (7, 5, channels))
  for rows in (7, 8):
    pixels_hwc = np.concatenate([top, np.zeros((rows - 7, 5, channels), int)])
    how = {'bits': bits, 'colour_type': colour_type, 'interlaced': interlaced}
    assert transforms.decode(_image_files.png(pixels_hwc, **how)).size == (5, rows)
    assert re.search('that its pixels take|truncated', reason(_short(pixels_hwc, **how)))
  assert 'pixels take' in reason(_image_files.ico((5, 8, 32, _short(pixels_hwc, **how))))


def test_spoiled_pixels_of_png_are_noticed():
  data = bytearray(save(Image.effect_noise((64, 64), 90), 'PNG'))
  data[len(data) // 2] ^= 1
  assert 'checksum' in reason(bytes(data))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF', 'BMP'])
def test_large_pictures_below_the_bound_still_decode(kind):
  assert transforms.decode(save(Image.new('RGB', (3000, 2000), 'red'), kind)).size == (3000, 2000)


def test_metadata_of_a_megabyte_is_not_read():
  exif = _image_files.exif(6)
  numbers = (
    b'eXIf',
    exif[:10] + struct.pack('<HHII', 0x112, 3, 1 << 20, 26) + bytes(4) + b'\6\0' * (1 << 20),
  )
  assert transforms.decode(
    _image_files.png(np.zeros((2, 5, 3), int), 8, 2, chunks=[numbers])
  ).size == (5, 2)


# ---- What is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'text, shown',
  [
    ('plain', 'plain'),
    ('two\nlines\r\n\tof it', 'two lines of it'),
    ('\x1b[31mred\x07\x00', '\\x1b[31mred\\x07\\x00'),
    ('\u202eright to left', '\\u202eright to left'),
    ('lone \ud83d half', 'lone \\ud83d half'),
    ('Brötchen 猫', 'Brötchen 猫'),
    ('x' * 500, 'x' * 197 + '...'),
    ('\x1b' * 500, ('\\x1b' * 50)[:197] + '...'),
  ],
)
def test_one_line(text, shown):
  assert one_line(text) == shown
  assert str(transforms.DecodeError(text)) == shown
  shown.encode()


def test_the_report_is_fit_for_a_terminal():
  report = decode_report.DecodeReport()
  report.add('evil\x1b]0;title\x07\n', 'image', 'bad\nchunk \x1b[2J' + 'x' * 9999)
  line = report.line()
  assert line.isprintable() and len(line) < 400 and report.counts() == {'image': 1}


def test_a_chunk_with_a_terminal_in_its_name():
  data = PNG[:33] + _image_files.chunk(b'\x1b[2J', b'')[:-1] + b'\0' + PNG[33:]
  assert reason(data).isprintable()


@pytest.mark.filterwarnings('ignore')  # pytest shows what the library does not.
def test_images_of_all_kinds_whole_and_damaged(fuzz):
  assert sum(fuzz('images', count=300)['outcomes'].values()) == 300


# ---- Wherever pictures are read ------------------------------------------------------------------


@pytest.mark.parametrize('resize', ['crop', 'letterbox'])
@pytest.mark.parametrize('size', [(200_000, 1), (1, 200_000)])
def test_a_strip_in_pretraining(make_source, make_preprocess, resize, size):
  how = augment.ImageAugmentation(min_area=1.0, max_aspect=1.0, flip=0.0, color=0.0)
  views = pairs.PairViews(
    how, augment.TextAugmentation(0.0, 0.0), {'image': 1, 'text': 1}, False, True
  )
  source = make_source(2, images=[save(Image.new('RGB', size, (250, 5, 5)), 'PNG')] * 2)
  preprocess = make_preprocess(resize=resize)
  batches = pairs.train_iterator(
    source,
    preprocess,
    views,
    pipeline.Batching(batch_size=2, num_threads=1, prefetch=1),
    seed=0,
    text_pooled_nd=None,
  )
  image_hwc = next(batches)['image'][0] * preprocess.std + preprocess.mean
  middle_nc = image_hwc[4, :] if size[1] == 1 else image_hwc[:, 4]
  assert (middle_nc[:, 0] - middle_nc[:, 2]).max() > 0.1 and np.isfinite(image_hwc).all()


def test_the_contact_sheet_takes_strips_and_unusable_files(make_source):
  strip = save(Image.new('RGB', (5000, 2), (250, 5, 5)), 'PNG')
  source = make_source(3, images=[strip, EPS, PNG])
  sheet = contact_sheet(Dataset('x', ('a', 'b', 'c'), False, {'train': source}), 'train', 3)
  assert (np.asarray(sheet) == (250, 5, 5)).all(axis=-1).sum() > 200


def test_describe_counts_what_is_unusable(make_source):
  source = make_source(3, images=[EPS, PNG, b''])
  data = Dataset('x', ('a', 'b', 'c'), False, {'train': source})
  split = describe(data, encode=None, max_tokens=4, sample=9)['splits']['train']
  assert split['image_formats'] == {'unusable': 2, 'PNG RGB': 1} and 'EPS' in split['unusable']


def test_pixels_as_features_of_a_strip():
  strip = Image.new('RGB', (200_000, 1), (255, 0, 0))
  np.testing.assert_allclose(
    probes.pixels([strip]).reshape(32, 32, 3), np.tile([1.0, 0, 0], (32, 32, 1))
  )


def test_features_of_images_that_were_decoded_otherwise_are_not_used(monkeypatch, make_preprocess):
  config = types.SimpleNamespace(backbones={'dtype': 'float32'})
  tower = types.SimpleNamespace(identity={'sha256': 'ab'})
  reads = {'image': Reads(states=(2, 3))}
  how = extract.Extraction(config, reads, {'image': tower}, {}, make_preprocess(), mesh=None)
  before = how.spec('image')
  monkeypatch.setattr(transforms, 'DECODING', transforms.DECODING + 1)
  assert how.spec('image') != before


def test_a_mistake_whose_picture_cannot_be_read_is_shown_without(tmp_path, make_source):
  class Unreadable(type(make_source(1))):
    def read(self, index, *, image):
      if image:
        raise OSError(5, 'Input/output error')
      return super().read(index, image=False)

  made = make_source(3)
  source = Unreadable(made.images, made.texts, made.labels)
  recorder = PredictionRecorder(source, 'abc', ['none_absent'], multi_label=False)
  recorder._counted_cn[:] = True  # As if each had been scored alike.
  recorder.write(tmp_path, split='test', step=1, config_hash='x', seed=0, data='x')
  examples = json.loads((tmp_path / 'mistakes.json').read_text())['examples']
  assert [example['image'] for example in examples.values()] == [None] * len(examples) and examples
