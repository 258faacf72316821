"""Stamps of Tux Paint: photographs and drawings with a line on what they show; the label is the
folder.
"""

import pathlib
import re

from PIL import Image

from . import drawings, folders, packages

NAME = 'tuxpaint_stamps'
LICENCE = 'GPL-2'
README = """
tuxpaint_stamps: 'Stamps' of Tux Paint, photographs (most) and drawings with a line on what they
show; the label is the top folder they are in. Letters of alphabets are left out.
From Debian's package tuxpaint-stamps-default 2022.06.04-1, copyright 2002-2022 Bill Kendrick and
contributors (https://tuxpaint.org), GPL-2. Pictures are laid on white, 224 pixels at most.
Splits: pictures of one description or one file name (but for digits and colours) stay together.
"""


def build(cache: pathlib.Path) -> tuple[list[folders.Example], str]:
  """Returns the examples, and the text of the licence."""
  package = packages.debian(
    'tuxpaint-stamps-default',
    'tuxpaint-stamps-default_2022.06.04-1_all.deb',
    '6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34',
    cache,
  )
  stamps = package / 'usr/share/tuxpaint/stamps'
  copyright = package / 'usr/share/doc/tuxpaint-stamps-default/copyright'
  examples = []
  for path in sorted(stamps.rglob('*.txt')):
    where = path.relative_to(stamps)
    text = path.read_text(encoding='utf-8').split('\n', 1)[0].strip()
    image = _picture(path)
    if 'alphabets' in where.parts or not text or image is None:
      continue
    name = '_'.join(where.with_suffix('').parts)
    examples.append(folders.Example(name, image, text, where.parts[0], _series(name)))
  return folders.frequent(examples, 20, 400), copyright.read_text()


def _picture(path):
  raster, vector = path.with_suffix('.png'), path.with_suffix('.svg')
  if raster.exists():
    return Image.open(raster, formats=['PNG', 'JPEG'])
  return drawings.render(vector) if vector.exists() else None


def _series(name):
  return re.sub(r'\d+|_?(red|green|blue|yellow|white|black|pink|orange|purple)(?=_|$)', '', name)
