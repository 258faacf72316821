"""Tabler Icons: line drawings with tags; the label is their category."""

import collections
import json
import pathlib
import re

from . import drawings, folders, packages

NAME = 'tabler_icons'
LICENCE = 'MIT'
README = """
tabler_icons: icons of Tabler with their tags as text and their category as the label; categories of
40 icons at least, 400 of one at most, drawn by a hash of their names. Words of the category's own
name and 'logo' are taken out of the tags.
From the npm package @tabler/icons 3.52.0 (https://tabler.io/icons, Pawel Kuna), MIT. Outlines
rendered by resvg on white, 224 x 224 pixels.
Splits: icons of one base (the first word of the name: heart, heart-off, heart-plus; two words where
a tenth of a category begins alike, as brand-github) stay together.
"""


def build(cache: pathlib.Path) -> tuple[list[folders.Example], str]:
  """Returns the examples, and the text of the licence."""
  package = packages.npm(
    '@tabler/icons',
    '3.52.0',
    'tabler-icons-3.52.0.tgz',
    '626620c7d42afd2f294fba167ce4653b5cb946336d186b4991c70b700e5616af',
    cache,
  )
  icons = json.loads((package / 'icons.json').read_text())
  base = _bases({name: icon['category'] for name, icon in icons.items()})
  examples = []
  for name, icon in sorted(icons.items()):
    text = ', '.join(_tags(icon))
    if text and 'outline' in icon['styles']:
      path = package / 'icons/outline' / f'{name}.svg'
      examples.append(folders.Example(name, path, text, icon['category'], base[name]))
  chosen = folders.frequent(examples, 40, 400)
  drawn = [
    folders.Example(e.name, drawings.render(e.image), e.text, e.label, e.group) for e in chosen
  ]
  return drawn, (package / 'LICENSE').read_text()


def _bases(category):
  """Returns name -> base, of name -> category."""
  size = collections.Counter(category.values())
  first = {name: name.split('-')[0] for name in category}
  alike = collections.Counter((own, first[name]) for name, own in category.items())
  return {
    name: first[name] if alike[own, first[name]] < 0.1 * size[own] else _two_words(name)
    for name, own in category.items()
  }


def _two_words(name):
  return '-'.join(name.split('-')[:2])


def _tags(icon):
  """Returns the tags without those that hold a word of the category's name, singular or plural."""
  own = {_stem(word) for word in re.findall('[a-z]+', icon['category'].lower())} | {'logo'}
  for tag in icon['tags']:
    tag = str(tag).replace('-', ' ')
    if not own & {_stem(word) for word in re.findall('[a-z]+', tag.lower())}:
      yield tag


def _stem(word):
  return word.removesuffix('s')
