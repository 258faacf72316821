"""Draws the emoji of OpenMoji's training split in other hands as well: more pictures for `python -m molt_jax.pretrain`.

  npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji @iconify-json/noto-v1 \\
    @iconify-json/emojione
  python tools/emoji_styles.py --archives=. --out=FOLDER

FOLDER gets the own-data layout: train.csv (OpenMoji's training split, and each of its emoji in every collection that has it), validation.csv and
test.csv (OpenMoji alone), images/. No emoji of the validation and test splits is drawn in any style, so a tower that is pretrained on FOLDER has not
seen them. A collection is an archive of Iconify: SVG drawings with names; those without a table of code points are matched by the names that the
others give to the same code points. LICENSES.md lists the collections, their authors and licences.
"""

import csv
import io
import json
import pathlib
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molt_jax import cli, logbook
from molt_jax.config import UserError
from molt_jax.data.builders import openmoji
from molt_jax.data.sources import Source

FLAGS = (
    cli.Flag('archives', 'folder of the *.tgz archives', required=True),
    cli.Flag('out', 'folder to write; it must not exist', required=True),
    cli.Flag('data_dir', 'folder of prepared data sets', default='~/.cache/molt_jax/datasets'),
)
COLUMNS = ('image', 'text', 'label')
FILES = ('package/info.json', 'package/icons.json', 'package/chars.json')  # Of an archive; the last one may be missing.


def code_points(name: str) -> str:
  """'1F3F4-200D-2620-FE0F' -> '1f3f4-200d-2620': the variation selector is written or not, as an author pleases."""
  return '-'.join(point for point in name.lower().split('-') if point != 'fe0f')


class Collection:
  """Drawings of one hand: `info` (name, author, license), `names` {code points: name}, `svg(name)`."""

  def __init__(self, archive: pathlib.Path):
    try:
      with tarfile.open(archive) as tar:
        files = {member.name: json.load(tar.extractfile(member)) for member in tar if member.name in FILES}
    except (tarfile.TarError, OSError, ValueError) as error:
      raise UserError(f'--archives: {str(archive)!r} cannot be read ({str(error).splitlines()[0]}); run npm pack again') from None
    if not set(FILES[:2]) <= set(files):
      raise UserError(f'--archives: {str(archive)!r} is no Iconify collection ({", ".join(FILES[:2])} are not in it); give archives of npm pack')
    self.info, self._icons, chars = (files.get(name, {}) for name in FILES)
    self.names = {code_points(points): name for points, name in chars.items() if self._find(name)}

  def _find(self, name: str) -> Mapping[str, Any]:
    """The drawing of this name; {} where there is none, or where it is another one turned around."""
    alias = self._icons.get('aliases', {}).get(name)
    if alias is None:
      return self._icons['icons'].get(name, {})
    return self._find(alias['parent']) if set(alias) <= {'parent', 'hidden'} else {}

  def match_names(self, known: Mapping[str, str]) -> None:
    """Fills `names` from {name: code points} of other collections."""
    self.names = self.names or {points: name for name, points in known.items() if self._find(name)}

  def svg(self, name: str) -> str:
    drawing = self._find(name)
    width, height = (drawing.get(side, self._icons.get(side, 16)) for side in ('width', 'height'))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{drawing["body"]}</svg>'


def read_collections(folder: pathlib.Path) -> dict[str, Collection]:
  """Returns {name of the archive without version: collection}."""
  archives = sorted(folder.glob('*.tgz'))
  if not archives:
    raise UserError(f'--archives: no *.tgz in {str(folder)!r}; run npm pack there (see the head of this file)')
  found = {archive.stem.rpartition('-')[0].removeprefix('iconify-json-'): Collection(archive) for archive in archives}
  known = {name: points for collection in found.values() for points, name in collection.names.items()}
  for collection in found.values():
    collection.match_names(known)
  return found


def write_split(folder: pathlib.Path, split: str, rows: Iterable[tuple[str, bytes, str, str]]) -> int:
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


def rows_of(source: Source, class_names: Sequence[str], collections: Mapping[str, Collection]) -> Iterable[tuple[str, bytes, str, str]]:
  """Yields the rows of a split of OpenMoji, each followed by its other drawings."""
  with cli.progress('drawing', len(source), 'emoji') as bar:
    for index, emoji in enumerate(source.ids):
      example = source.read(index, image=True)
      row = example['text'], class_names[int(example['label'])]
      yield f'openmoji/{emoji}', example['image'], *row
      for style, collection in collections.items():
        if name := collection.names.get(code_points(emoji)):
          yield f'{style}/{emoji}', openmoji.render(svg_string=collection.svg(name)), *row
      bar.advance()


def licenses(collections: Mapping[str, Collection]) -> str:
  lines = [openmoji.ATTRIBUTION, '', '| collection | author | licence | source |', '|---|---|---|---|']
  for info in (collection.info for collection in collections.values()):
    lines.append(f'| {info["name"]} | {info["author"]["name"]} | {info["license"]["title"]} | {info["author"].get("url", "")} |')
  return '\n'.join(lines) + '\n'


@cli.command
def main(argv: Sequence[str]) -> None:
  flags, _ = cli.parse('tools.emoji_styles', 'Draw the emoji of OpenMoji in other hands as well.', FLAGS, argv)
  out = pathlib.Path(flags.out).expanduser()
  if out.exists():
    raise UserError(f'--out: {str(out)!r} exists; give a new folder')
  collections = read_collections(pathlib.Path(flags.archives).expanduser())
  data = openmoji.open_prepared(openmoji.prepare(flags.data_dir))
  partial = out.with_name(out.name + '.partial')
  for split, source in data.splits.items():
    count = write_split(partial, split, rows_of(source, data.class_names, collections if split == 'train' else {}))
    cli.say(f'{split}: {count} pictures of {len(source)} emoji')
  logbook.write_atomically(partial / 'LICENSES.md', licenses(collections))
  partial.rename(out)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
