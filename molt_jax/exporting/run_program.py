"""Classifies one example: python run.py [--image=FILE] [--text=STRING], in the folder of run.py."""

import json
import pathlib
import sys

import jax.export
import numpy as np
import tokenizers
from PIL import Image, ImageOps
from safetensors.numpy import load_file

given = {name: value for name, _, value in (word[2:].partition('=') for word in sys.argv[1:])}
program = pathlib.Path(__file__).with_name(f'{"_and_".join(sorted(given))}.stablehlo')
program.is_file() or sys.exit(f'{__doc__} There is no {program.name}.')
about = json.loads(program.with_name('model.json').read_text('utf-8'))
arrays = [load_file(program.with_name('weights.safetensors'))]
if 'image' in given:  # Laid on white, resized, and its centre laid on a square of the mean colour.
  how, size = about['image'], about['image']['size']
  image = ImageOps.exif_transpose(Image.open(given['image'], formats=how['formats']))
  image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
  near, whole = (max, round) if how['letterbox'] else (min, int)
  scaled = [max(1, whole(how['scaled'] * side / near(image.size))) for side in image.size]
  squares = [Image.new('F', (size, size), colour) for colour in how['mean']]
  for square, channel in zip(squares, image.convert('RGB').split(), strict=True):
    resized = channel.convert(how['mode']).resize(how['sides'] or scaled, how['resample'])
    square.paste(resized, [int((size - side) / 2) for side in resized.size])
  arrays.append(np.stack(squares, axis=-1)[None])
if 'text' in given:
  text = tokenizers.Tokenizer.from_file(f'{program.parent}/tokenizer.json').encode(given['text'])
  arrays += [np.array([text.ids], np.int32), np.array([text.attention_mask], bool)]
p_k = np.asarray(jax.export.deserialize(bytearray(program.read_bytes())).call(*arrays))[0]
print(*(f'{p_k[k]:.6f} {about["classes"][k]}' for k in np.argsort(-p_k)[:5]), sep='\n')
