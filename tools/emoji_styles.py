"""Draws the emoji of OpenMoji's training split in other hands as well, and other icons: more
pictures for `python -m molt_jax.pretrain`.

  npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat
  @iconify-json/fluent-emoji @iconify-json/noto-v1 \\
    @iconify-json/emojione
  python tools/emoji_styles.py --archives=. [--icons=ICONS] --out=FOLDER

FOLDER gets the own-data layout: train.csv (OpenMoji's training split, and each of its emoji in
every collection that has it), validation.csv and test.csv (OpenMoji alone), images/. No emoji of
the validation and test splits is drawn in any style, so a tower that is pretrained on FOLDER has
not seen them. A collection is an archive of Iconify: SVG drawings with names; those without a table
of code points are matched by the names that the others give to the same code points. ICONS is a
folder with more archives, of icons: each drawing in them becomes a row of train.csv with its name
and an empty label, unless its name is that of an emoji of validation or test; the same thing by
another name stays. LICENSES.md lists the collections, their authors and licences.
"""

import csv
import io
import itertools
import json
import pathlib
import re
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molt_jax.data.published import openmoji
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

FLAGS = (
  Flag('archives', 'folder of the *.tgz archives', required=True),
  Flag('icons', 'folder of *.tgz archives of icons; empty: none', default=''),
  Flag('out', 'folder to write; it must not exist', required=True),
  Flag('data_dir', 'folder of prepared data sets', default='~/.cache/molt_jax/datasets'),
)
COLUMNS = ('image', 'text', 'label')
FILES = (
  'package/info.json',
  'package/icons.json',
  'package/chars.json',
)  # Of an archive; the last one may be missing.
# Collection -> which of its drawings are taken, where it has several of a thing; of others, all.
ICONS = {
  'fluent-color': r'-(24|48)$',
  'healthicons': r'^(?!.*(outline|negative|24px))',
  'meteocons': r'(?<!-fill)$',
  'ph': r'-(fill|duotone)$',
  'solar': r'-bold-duotone$',
}
# Words at the end of an icon's name that tell how it is drawn, not what it is; so do numbers there.
STYLES = frozenset(
  (
    'outline',
    'negative',
    '24px',
    'fill',
    'bold',
    'duotone',
    'flat',
    'linear',
    'line',
    'thin',
    'light',
    'broken',
    'colored',
  )
)


def code_points(name: str) -> str:
  """'1F3F4-200D-2620-FE0F' -> '1f3f4-200d-2620': the variation selector is written or not, as an
  author pleases.
  """
  return '-'.join(point for point in name.lower().split('-') if point != 'fe0f')


class Collection:
  """Drawings of one hand: `info` (name, author, license), `names` {code points: name},
  `svg(name)`.
  """

  def __init__(self, archive: pathlib.Path, flag: str):
    try:
      with tarfile.open(archive) as tar:
        files = {
          member.name: json.load(tar.extractfile(member)) for member in tar if member.name in FILES
        }
    except (tarfile.TarError, OSError, ValueError) as error:
      raise UserError(
        f'{flag}: {str(archive)!r} cannot be read ({str(error).splitlines()[0]}); run npm pack '
        'again'
      ) from None
    if not set(FILES[:2]) <= set(files):
      raise UserError(
        f'{flag}: {str(archive)!r} is no Iconify collection ({", ".join(FILES[:2])} are not in '
        'it); give archives of npm pack'
      )
    self.info, self._icons, chars = (files.get(name, {}) for name in FILES)
    self.names = {code_points(points): name for points, name in chars.items() if self._find(name)}

  def _find(self, name: str) -> Mapping[str, Any]:
    """The drawing of this name; {} where there is none, or where it is another one turned
    around.
    """
    alias = self._icons.get('aliases', {}).get(name)
    if alias is None:
      return self._icons['icons'].get(name, {})
    return self._find(alias['parent']) if set(alias) <= {'parent', 'hidden'} else {}

  def match_names(self, known: Mapping[str, str]) -> None:
    """Fills `names` from {name: code points} of other collections."""
    self.names = self.names or {points: name for name, points in known.items() if self._find(name)}

  def drawings(self, pattern: str) -> list[str]:
    """Names that match, in the collection's order, without those that it hides."""
    return [
      name
      for name, icon in self._icons['icons'].items()
      if re.search(pattern, name) and not icon.get('hidden')
    ]

  def svg(self, name: str) -> str:
    drawing = self._find(name)
    width, height = (drawing.get(side, self._icons.get(side, 16)) for side in ('width', 'height'))
    return (
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} '
      f'{height}">{drawing["body"]}</svg>'
    )


def read_collections(folder: str, flag: str) -> dict[str, Collection]:
  """Returns {name of the archive without version: collection}, in the order of the names of the
  archives.
  """
  archives = sorted(pathlib.Path(folder).expanduser().glob('*.tgz'))
  if not archives:
    raise UserError(
      f'{flag}: no *.tgz in {folder!r}; run npm pack there (see the head of this file)'
    )
  return {
    archive.stem.rpartition('-')[0].removeprefix('iconify-json-'): Collection(archive, flag)
    for archive in archives
  }


def read_hands(folder: str) -> dict[str, Collection]:
  """Returns the collections of emoji, each with its table of code points."""
  found = read_collections(folder, '--archives')
  known = {
    name: points for collection in found.values() for points, name in collection.names.items()
  }
  for collection in found.values():
    collection.match_names(known)
  return found


def write_split(
  folder: pathlib.Path, split: str, rows: Iterable[tuple[str, bytes, str, str]]
) -> int:
  """Writes (name of the picture, PNG, text, label) rows; returns their number."""
  table, count = io.StringIO(), 0
  writer = csv.writer(table)
  writer.writerow(COLUMNS)
  for name, png, text, label in rows:
    path = folder / 'images' / f'{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    writer.writerow([path.relative_to(folder).as_posix(), text, label])
    count += 1
  (folder / f'{split}.csv').write_text(table.getvalue(), encoding='utf-8')
  return count


def rows_of(
  source: Source, class_names: Sequence[str], collections: Mapping[str, Collection]
) -> Iterable[tuple[str, bytes, str, str]]:
  """Yields the rows of a split of OpenMoji, each followed by its other drawings."""
  with console.progress('drawing', len(source), 'emoji') as bar:
    for index, emoji in enumerate(source.ids):
      example = source.read(index, image=True)
      row = example['text'], class_names[int(example['label'])]
      yield f'openmoji/{emoji}', example['image'], *row
      for style, collection in collections.items():
        if name := collection.names.get(code_points(emoji)):
          yield f'{style}/{emoji}', openmoji.render(svg_string=collection.svg(name)), *row
      bar.advance()


def rows_of_icons(
  collections: Mapping[str, Collection], left_out: frozenset[str]
) -> Iterable[tuple[str, bytes, str, str]]:
  """Yields a row without label of each drawing whose text, as `plain` has it, is not in
  `left_out`.
  """
  chosen = [
    (style, name)
    for style, collection in collections.items()
    for name in collection.drawings(ICONS.get(style, ''))
  ]
  with console.progress('drawing', len(chosen), 'icons') as bar:
    for style, name in chosen:
      if plain(text := described(name)) not in left_out:
        yield f'{style}/{name}', openmoji.render(svg_string=collections[style].svg(name)), text, ''
      bar.advance()


def described(name: str) -> str:
  """'cat-face-bold-24' -> 'cat face'."""
  words = name.split('-')
  while len(words) > 1 and (words[-1] in STYLES or words[-1].isdigit()):
    words.pop()
  return ' '.join(words)


def plain(text: str) -> str:
  """A text as names are compared: lower case, letters and digits alone."""
  return ' '.join(re.findall('[a-z0-9]+', text.lower()))


def names_held_out(splits: Mapping[str, Source]) -> frozenset[str]:
  """Names of emoji of validation and test that no emoji of train has."""
  names = {
    split: {plain(source.read(i, image=False)['text']) for i in range(len(source))}
    for split, source in splits.items()
  }
  return frozenset(
    set().union(*(own for split, own in names.items() if split != 'train')) - names['train']
  )


def licenses(collections: Mapping[str, Collection]) -> str:
  lines = [
    openmoji.ATTRIBUTION,
    '',
    '| collection | author | licence | source |',
    '|---|---|---|---|',
  ]
  for info in (collection.info for collection in collections.values()):
    lines.append(
      f'| {info["name"]} | {info["author"]["name"]} | {info["license"]["title"]} | '
      f'{info["author"].get("url", "")} |'
    )
  return '\n'.join(lines) + '\n'


@command
def main(argv: Sequence[str]) -> None:
  flags, _ = parse(
    'python tools/emoji_styles.py',
    'Draw the emoji of OpenMoji in other hands as well.',
    FLAGS,
    argv,
  )
  out = pathlib.Path(flags.out).expanduser()
  if out.exists():
    raise UserError(f'--out: {str(out)!r} exists; give a new folder')
  hands, icons = (
    read_hands(flags.archives),
    read_collections(flags.icons, '--icons') if flags.icons else {},
  )
  data = openmoji.open_prepared(openmoji.prepare(flags.data_dir))
  partial = out.with_name(out.name + '.partial')
  for split, source in data.splits.items():
    rows = rows_of(source, data.class_names, hands if split == 'train' else {})
    more = rows_of_icons(icons, names_held_out(data.splits)) if split == 'train' and icons else ()
    console.log(
      f'{split}: {write_split(partial, split, itertools.chain(rows, more))} pictures, '
      f'{len(source)} emoji'
    )
  atomic.write(partial / 'LICENSES.md', licenses({**hands, **icons}))
  partial.rename(out)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
