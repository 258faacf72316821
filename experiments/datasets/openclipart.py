"""Open Clip Art Library: drawings with titles and descriptions; the label is the folder."""

import collections
import html
import pathlib
import re

from . import drawings, folders, packages

NAME = 'openclipart'
LICENCE = 'public domain'
README = """
openclipart: drawings of the Open Clip Art Library with titles and descriptions, and the folder
they are in as the label (flags are a class of their own; geometric shapes, patterns and what was
unsorted are left out; 400 of a class at most, drawn by a hash of their names). Where a title is a
collection's (more than five files have it) the words of the file's name stand in its place.
Keywords are not used: they name the folder.
From Debian's package openclipart-svg 1:0.18+dfsg-19 (http://www.openclipart.org), dedicated to the
public domain by their authors. Rendered by resvg on white, 224 pixels wide or high.
Splits: drawings of one text or file name (but for digits) or one picture stay together.
"""
DROPPED = {'shapes', 'special', 'unsorted', 'buttons', 'logos'}
MOST_USES = 5


def build(cache: pathlib.Path) -> tuple[list[folders.Example], str]:
  """Returns the examples, and the text of the licence."""
  package = packages.debian(
    'openclipart-svg',
    'openclipart-svg_1%3a0.18+dfsg-19_all.deb',
    '989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5',
    cache,
  )
  root = package / 'usr/share/openclipart/svg'
  paths = [p for p in sorted(root.rglob('*.svg')) if p.relative_to(root).parts[0] not in DROPPED]
  titles = {path: _metadata(path, 'title') for path in paths}
  uses = collections.Counter(titles.values())
  examples = []
  for path in paths:
    where = path.relative_to(root)
    label = 'flags' if 'flags' in where.parts else where.parts[0]
    words = re.sub(r'[\W\d_]+', ' ', path.stem).strip()
    title = titles[path] if uses[titles[path]] <= MOST_USES else words
    description = _metadata(path, 'description')
    same = folders.normalised(description) == folders.normalised(title)
    text = ' '.join(filter(None, (title, '' if same else description)))
    if text:
      name = '_'.join(where.with_suffix('').parts)
      examples.append(folders.Example(name, path, text, label, f'{label} {words}'))
  drawn = _drawn(folders.frequent(examples, 40, 400))
  return folders.frequent(drawn, 40, 400), _licence(package)


def _drawn(examples):
  """Returns the examples whose drawing can be rendered, rendered; those chosen alone are."""
  for example in examples:
    image = drawings.render(example.image)
    if image is not None:
      yield folders.Example(example.name, image, example.text, example.label, example.group)


def _metadata(path, field):
  """Returns dc:title or dc:description of a drawing, one line; empty where there is none."""
  metadata = re.search('<metadata.*?</metadata>', path.read_text(errors='replace'), re.DOTALL)
  found = re.search(f'<dc:{field}>(.*?)</dc:{field}>', metadata[0] if metadata else '', re.DOTALL)
  return ' '.join(html.unescape(html.unescape(found[1])).split()) if found else ''


def _licence(package):
  return (package / 'usr/share/doc/openclipart-svg/copyright').read_text(errors='replace')
