"""Classifies one example: python run.py [--image=FILE] [--text=STRING], in the folder of run.py."""

import argparse
import json
import pathlib

import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers
from PIL import Image, ImageOps

HERE = pathlib.Path(__file__).parent
TYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'I8': 'int8', 'I32': 'int32', 'BOOL': 'bool'}


def pixels(path, size, resize, resample, rounded, **how):
  """Returns float32[1, size, size, 3]."""
  image = Image.open(path, formats=('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF'))
  image = ImageOps.exif_transpose(image).convert('RGB')
  scaled, near, whole = how['scaled'] or size, min(image.size), int
  if resize == 'letterbox':
    scaled, near, whole = size, max(image.size), round
  sides = [max(1, whole(scaled * side / near)) for side in image.size]
  sides = [scaled] * 2 if resize == 'squash' else sides
  channels = [c.convert('L' if rounded else 'F').resize(sides, resample) for c in image.split()]
  x_hwc = np.stack([np.asarray(c, np.float32) for c in channels], axis=-1) / 255
  x_hwc = (x_hwc - np.float32(how['mean'])) / np.float32(how['std'])
  top, left = [max(0, side - size) // 2 for side in x_hwc.shape[:2]]
  x_hwc = x_hwc[top : top + size, left : left + size]
  before = [(size - side) // 2 for side in x_hwc.shape[:2]]
  around = [(b, size - side - b) for b, side in zip(before, x_hwc.shape[:2], strict=True)]
  return np.pad(x_hwc, [*around, (0, 0)])[None]


def tokens(text, max_tokens, before, after, pad_id, empty_id, filled):
  """Returns int32[1, T] and bool[1, T], where real tokens are."""
  read = tokenizers.Tokenizer.from_file(str(HERE / 'tokenizer.json'))
  room = max(max_tokens - len(before) - len(after), 0)
  ids = before + read.encode(text, add_special_tokens=False).ids[:room] + after
  ids = ids[:max_tokens] or [empty_id]
  ids += [pad_id] * (filled - len(ids))
  padded = ids + [pad_id] * (max_tokens - len(ids))
  return np.array([padded], np.int32), np.arange(max_tokens)[None] < len(ids)


parser = argparse.ArgumentParser()
parser.add_argument('--image')
parser.add_argument('--text')
given = parser.parse_args()
about = json.loads((HERE / 'model.json').read_text('utf-8'))
arrays = [pixels(given.image, **about['image'])] if given.image else []
arrays += tokens(given.text, **about['text']) if given.text else []
both = given.image and given.text
name = 'complete' if both else 'image_only' if given.image else 'text_only'
found = safetensors.deserialize((HERE / 'weights.safetensors').read_bytes())
weights = {
  n: np.frombuffer(x['data'], jnp.dtype(TYPES[x['dtype']])).reshape(x['shape']) for n, x in found
}
program = jax.export.deserialize(bytearray((HERE / f'{name}.stablehlo').read_bytes()))
p_k = np.asarray(program.call(weights, *arrays))[0]
for k in np.argsort(-p_k)[:5]:
  print(f'{p_k[k]:.6f} {about["classes"][k]}')
