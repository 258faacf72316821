"""Images: valid files of known pixels, unusable, damaged and random ones, and images in memory.

What decodes is right where it is known, to the tolerance of its format; all else is a DecodeError
(of `predict`, a UserError) of one line. Nothing is written to stderr.
"""

import contextlib
import os
import struct
import zlib

import numpy as np
import PIL
from PIL import Image

from fuzzing import _image_files, _pictures
from molt_jax.data import bounds, examples, formats, transforms
from molt_jax.errors import UserError

PREPROCESS = {
  resize: examples.Preprocess(
    image_size=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    resize=resize,
    encode=lambda text, most: [],
    pad_id=0,
    max_tokens=1,
    num_classes=2,
    multi_label=False,
  )
  for resize in ('crop', 'letterbox')
}
MAGIC = (
  b'\xff\xd8\xff\xe0',
  _image_files.PNG_SIGNATURE,
  b'GIF89a',
  b'BM',
  b'II*\0',
  b'MM\0*',
  b'II+\0',
  b'P6\n',
  b'P3 ',
  b'Pf\n',
  b'RIFF\0\0\0\0WEBPVP8X',
  b'\0\0\1\0\1\0',
  b'\0\0\0\x1cftypavif',
  b'%!PS',
  b'8BPS',
)
# All modes of Pillow, and what they hold.
MODES = {
  '1': 1,
  'L': 1,
  'P': 1,
  'LA': 2,
  'La': 2,
  'PA': 2,
  'RGB': 3,
  'YCbCr': 3,
  'HSV': 3,
  'LAB': 3,
  'RGBA': 4,
  'RGBa': 4,
  'RGBX': 4,
  'CMYK': 4,
  'I;16': 2,
  'I;16B': 2,
  'I;16L': 2,
  'I': 4,
  'F': 4,
}


def trial(rng: np.random.Generator, folder) -> dict[str, int]:
  """Makes an image or a file, uses it, and returns what came of it."""
  kinds = {_meant: 0.3, _unusable: 0.05, _damaged: 0.45, _noise: 0.05, _in_memory: 0.15}
  kind = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
  with _silent(folder / 'stderr'):
    outcome = kind(rng, folder)
  return {f'{kind.__name__[1:]}: {outcome}': 1}


@contextlib.contextmanager
def _silent(path):
  """Raises if anything, C code included, writes to stderr in the block."""
  kept, file = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT)
  os.dup2(file, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(file)
  if written := path.read_bytes():
    raise AssertionError(f'written to stderr: {written[:300]!r}')


def _meant(rng, folder):
  name = str(rng.choice(list(_pictures.MEANT)))
  data, rgb_hwc, tolerance = _pictures.MEANT[name](rng)
  (folder / 'file').write_bytes(data)
  try:
    got_hwc = np.asarray(transforms.decode(formats.read_file(folder / 'file')))
  except transforms.DecodeError:
    if name in _pictures.NEW and int(PIL.__version__.split('.')[0]) < 13:
      return 'refused by an old Pillow'
    raise
  if got_hwc.shape != rgb_hwc.shape:
    raise AssertionError(f'{name}: {got_hwc.shape} in the place of {rgb_hwc.shape}')
  if (worst := np.abs(got_hwc.astype(int) - rgb_hwc).max()) > tolerance:
    raise AssertionError(f'{name}: off by {worst}')
  _used(data)
  return 'right'


def _unusable(rng, folder):
  name = str(rng.choice(list(_pictures.UNUSABLE)))
  if _used(_pictures.UNUSABLE[name](rng)):
    raise AssertionError(f'{name}: decoded')
  return 'refused'


def _damaged(rng, folder):
  data = _file(rng)
  for _ in range(rng.integers(1, 4)):
    data = DAMAGE[rng.integers(len(DAMAGE))](data, rng)
  if rng.random() < 0.7:
    data = _with_checksums(data)
  return 'used' if _used(data) else 'refused'


def _noise(rng, folder):
  start = MAGIC[rng.integers(len(MAGIC))] if rng.random() < 0.9 else b''
  return 'used' if _used(start + rng.bytes(int(rng.integers(0, 400)))) else 'refused'


def _in_memory(rng, folder):
  mode = str(rng.choice(list(MODES)))
  width, height = (int(2 ** rng.uniform(0, 10)) for _ in range(2))
  height = min(height, 4096 // width + 1)
  row = -(-width // 8) if mode == '1' else width * MODES[mode]
  data = rng.bytes(row * height)
  if mode == 'F' and rng.random() < 0.5:
    data = rng.random((height, width), np.float32).tobytes()
  image = Image.frombytes(mode, (width, height), data)
  if mode in ('P', 'PA') and rng.random() < 0.8:
    image.putpalette(rng.bytes(int(rng.choice([3, 48, 768]))))
  if rng.random() < 0.3:
    choices = (0, 255, 65535, (1, 2, 3), (1, 2, 300), rng.bytes(5), -1, 1e30, 'x', None, [])
    image.info['transparency'] = choices[rng.integers(len(choices))]
  if rng.random() < 0.1:
    image.info['exif'] = rng.bytes(40)
  try:
    for preprocess in PREPROCESS.values():
      _check_array(examples.single_example(preprocess, image=image)['image'])
  except UserError as error:
    _check_line(error)
    return f'{mode} refused'
  return f'{mode} used'


def _file(rng):
  if rng.random() < 0.1:
    return _pictures.UNUSABLE[str(rng.choice(list(_pictures.UNUSABLE)))](rng)
  return _pictures.MEANT[str(rng.choice(list(_pictures.MEANT)))](rng)[0]


def _used(data):
  """Returns whether a file decodes; checks what comes out, a picture or one line."""
  try:
    image = transforms.decode(data)
  except transforms.DecodeError as error:
    _check_line(error)
    image = None
  try:
    transforms.check(data)
    checked = True
  except transforms.DecodeError as error:
    _check_line(error)
    checked = False
  if checked != (image is not None):
    raise AssertionError(f'check says {checked}, decode {not checked}')
  if image is None:
    return False
  if image.mode != 'RGB' or not 1 <= image.width * image.height <= bounds.MAX_PIXELS:
    raise AssertionError(f'{image.mode} {image.size}')
  for preprocess in PREPROCESS.values():
    _check_array(examples.pixels(image, preprocess))
  return True


def _check_array(image_hwc):
  if image_hwc.shape != (8, 8, 3) or not np.isfinite(image_hwc).all():
    raise AssertionError(f'{image_hwc.shape}, finite: {np.isfinite(image_hwc).all()}')


def _check_line(error):
  line = str(error)
  if not line or not line.isprintable() or len(line) > 400:
    raise AssertionError(f'not one line for a terminal: {line!r}')


# ---- Damage --------------------------------------------------------------------------------------


def _flip(data, rng):
  spoiled = bytearray(data)
  for _ in range(rng.integers(1, 9)):
    spoiled[rng.integers(len(spoiled))] = rng.integers(256)
  return bytes(spoiled)


def _cut(data, rng):
  return data[: rng.integers(len(data) + 1)] or data


def _put_number(data, rng):
  """Writes a number that is often a limit where a header may have a size, a count or a position."""
  number = (0, 1, 255, 256, 65535, 70_000, 2**24, 2**31 - 1, 2**32 - 1, 2**63)[rng.integers(10)]
  order, kind = '<>'[rng.integers(2)], 'HIQ'[rng.integers(3)]
  part = struct.pack(order + kind, number % 2 ** {'H': 16, 'I': 32, 'Q': 64}[kind])
  at = int(rng.integers(min(len(data), 200 if rng.random() < 0.8 else len(data))))
  return data[:at] + part + data[at + len(part) :]


def _repeat(data, rng):
  left, right = sorted(rng.integers(0, len(data) + 1, 2).tolist())
  return data[:right] + data[left:right] * int(rng.integers(1, 5)) + data[right:]


def _remove(data, rng):
  left = int(rng.integers(len(data)))
  return data[:left] + data[left + int(rng.integers(1, 40)) :] or data


def _splice(data, rng):
  other = _file(rng)
  return data[: rng.integers(1, len(data) + 1)] + other[rng.integers(len(other)) :]


DAMAGE = (_flip, _cut, _put_number, _put_number, _repeat, _remove, _splice)


def _with_checksums(data):
  """Corrects the checksums of a PNG file; with wrong ones the rest is not looked at."""
  if not data.startswith(_image_files.PNG_SIGNATURE):
    return data
  at, mended = 8, bytearray(data)
  while at + 12 <= len(mended):
    end = at + 8 + int.from_bytes(mended[at : at + 4])
    if end + 4 > len(mended):
      break
    mended[end : end + 4] = zlib.crc32(mended[at + 4 : end]).to_bytes(4)
    at = end + 4
  return bytes(mended)
