"""Dungeon Crawl Stone Soup: tiles of monsters and equipment with long descriptions; the label is
the folder of the tile.
"""

import collections
import pathlib
import re

from PIL import Image

from . import folders, packages

NAME = 'crawl'
LICENCE = 'GPL-2+ (texts), public domain (tiles)'
README = """
crawl: tiles of monsters and equipment of the game Dungeon Crawl Stone Soup with the game's own
descriptions (a few sentences); the label is the folder of the tile: animals, demons, undead,
weapon ... Folders of 20 described tiles at least.
From the upstream archive of Debian's source package crawl 2:0.28.0-1.1 (https://crawl.develz.org):
texts GPL-2 or later, tiles public domain (CC0 or RLTiles). Tiles of 32 x 32 pixels, or somewhat
more, enlarged four times on white without smoothing.
Splits: tiles of one description (variants of one monster, three of one at most) stay together.
"""
ENLARGED = 4
MOST_VARIANTS = 3  # A dozen pictures of one shrub would be most of a class in one split.
FOLDERS = ('mon', 'item')


def build(cache: pathlib.Path) -> tuple[list[folders.Example], str]:
  """Returns the examples, and the text of the licence."""
  package = packages.debian_source(
    'crawl',
    'crawl_0.28.0.orig.tar.xz',
    '5a6be168f8888b84bdb199184ca20bd8636f77ba7e9e0124ebee8850092f2f47',
    cache,
  )
  source = next(package.glob('stone_soup-*'))
  texts = _descriptions(source / 'source/dat/descript')
  tiles = source / 'source/rltiles'
  examples, variants = [], collections.Counter()
  for kind in FOLDERS:
    for path in sorted((tiles / kind).rglob('*.png')):
      where = path.relative_to(tiles)
      text = texts.get(_key(path.stem)) or texts.get(_key(re.sub(r'\d+$', '', path.stem)))
      variants[text] += 1
      if text and len(where.parts) > 2 and variants[text] <= MOST_VARIANTS:
        name = '_'.join(where.with_suffix('').parts)
        examples.append(folders.Example(name, _enlarged(path), text, where.parts[1], text))
  licence = (source / 'LICENSE').read_text() + '\n' + (tiles / 'license.txt').read_text()
  return folders.frequent(examples, 20, 400), licence


def _descriptions(folder):
  """Returns key -> description; entries stand between lines of %%%%, the key in the first line."""
  found = {}
  for file in ('monsters.txt', 'items.txt', 'unrand.txt'):
    for block in (folder / file).read_text(encoding='utf-8').split('%%%%'):
      lines = [line for line in block.splitlines() if not line.startswith('#')]
      name, _, text = '\n'.join(lines).strip().partition('\n')
      # Braces are code of the game, angles its references.
      if text.strip() and '{{' not in text and not text.strip().startswith('<'):
        found[_key(name)] = ' '.join(text.split())
  return found


def _key(name):
  return re.sub('[^a-z0-9]', '', name.lower())


def _enlarged(path):
  image = Image.open(path, formats=['PNG']).convert('RGBA')
  size = [ENLARGED * side for side in image.size]
  return image.resize(size, Image.Resampling.NEAREST)
