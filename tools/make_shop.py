"""Writes a shop's file as shops have them: `python tools/make_shop.py --out=shop`.

For the tutorial (docs/tutorial.md), and to try `molt fit` on. shop/products.csv has 300 products
with columns of its own: sku, title, description, photo, price and category (7). The pictures are
OpenMoji's (CC BY-SA 4.0) on made-up backgrounds, in nine kinds of file; the texts are made up. As
in such files, some photos and texts are not there, descriptions have HTML and quotes in them, one
photo is a web page by the name of .jpg, and one is cut short. The same seed writes the same files.
"""

import csv
import io
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from molt_jax import errors
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least
from molt_jax.data import datasets
from molt_jax.runtime import console
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

FLAGS = (
  Flag('out', 'folder to write', required=True),
  Flag('products', 'how many', 300, type=int, rule=at_least(20)),
  Flag('seed', 'of the draw', 0, type=int, rule=at_least(0)),
)
# Category -> how Unicode's subcategories of such products begin.
CATEGORIES = {
  'Clothing': ('clothing',),
  'Food': ('food-', 'drink', 'dishware'),
  'Music': ('music', 'musical-instrument', 'sound'),
  'Office': ('office', 'writing', 'mail', 'book-paper', 'money'),
  'Sports': ('sport', 'award-medal'),
  'Tools': ('tool', 'science', 'lock', 'light-video'),
  'Toys': ('game', 'animal-'),
}
KINDS = ('Classic', 'Eco', 'Premium', 'Kids', 'Original', 'Handmade', 'NEW!', '2-pack')
DESCRIPTIONS = (
  '',
  'Free shipping on orders over $35.',
  'Made in Portugal; hand wash only.',
  'Customers love it &amp; so will you.<br>Ships today.',
  'Dimensions: 12" x 8".',
  'Größe M, Farbe blau – „wie neu“.',
)
HEADER = ('sku', 'title', 'description', 'photo', 'price', 'category')
SIDE = 200
WEB_PAGE = b'<!DOCTYPE html><html><title>404 Not Found</title></html>'


def _on_background(data: bytes, rng: np.random.Generator) -> Image.Image:
  """Returns a drawing on white as a photo: smaller, on a coloured background with noise."""
  drawn = Image.open(io.BytesIO(data), formats=['PNG']).convert('RGB')
  colour_c = rng.integers(120, 250, 3)
  noisy = colour_c + rng.normal(0, 8, (SIDE, SIDE, 3))
  photo = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
  side = int(rng.integers(110, 170))
  drawn = drawn.resize((side, side))
  mask = Image.fromarray((np.asarray(drawn).min(axis=-1) < 250).astype(np.uint8) * 255)
  corner = tuple(int(x) for x in rng.integers(0, SIDE - side, 2))
  photo.paste(drawn, corner, mask)
  return photo


def _save(photo: Image.Image, stem: pathlib.Path, kind: int) -> pathlib.Path:
  """Writes a photo as one of nine kinds of file; returns its path."""
  if kind == 0:
    path = stem.with_suffix('.png')
    photo.convert('RGBA').save(path)
  elif kind == 1:
    path = stem.with_suffix('.webp')
    photo.save(path)
  elif kind == 2:
    path = stem.with_suffix('.jpg')
    photo.convert('CMYK').save(path)
  elif kind == 3:  # Upright by its EXIF orientation alone.
    path, turned = stem.with_suffix('.jpg'), photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
  elif kind == 4:
    path = stem.with_suffix('.jpg')
    photo.convert('L').save(path)
  elif kind == 5:
    path = stem.with_suffix('.JPG')
    photo.save(path, 'JPEG', progressive=True)
  elif kind == 6:
    path = stem.with_suffix('.gif')
    photo.save(path)
  elif kind == 7:  # By another name than what it is.
    path = stem.with_suffix('.jpg')
    photo.save(path, 'PNG')
  else:
    path = stem.with_suffix('.jpg')
    photo.save(path)
  return path


def make(out: pathlib.Path, *, products: int, seed: int) -> None:
  """Writes products.csv and photos/ into `out`."""
  config = CLASSIFIER.default()
  config.dataset.name = 'openmoji'
  data = datasets.load_dataset(config)
  source, rng = data.splits['train'], np.random.default_rng(seed)
  with errors.explained(f'{out} cannot be written'):
    (out / 'photos').mkdir(parents=True, exist_ok=True)
  rows = []
  for n in rng.permutation(len(source)):
    subcategory = data.class_names[source.labels[n]]
    category = next((c for c, starts in CATEGORIES.items() if subcategory.startswith(starts)), '')
    if not category:
      continue
    sku = f'SKU-{1000 + len(rows)}'
    rows.append(_product(source[int(n)], sku, category, out, rng))
    if len(rows) == products:
      break
  (out / rows[7][3]).write_bytes(WEB_PAGE)
  cut = out / rows[11][3]
  cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
  with open(out / 'products.csv', 'w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows([HEADER, *rows])
  console.log(f'{out / "products.csv"}: {len(rows)} products')


def _product(example, sku: str, category: str, out: pathlib.Path, rng) -> list[str]:
  """Returns the row of a product; its photo is written."""
  title = f'{KINDS[rng.integers(len(KINDS))]} {example["text"]}'
  description = DESCRIPTIONS[rng.integers(len(DESCRIPTIONS))]
  photo = _on_background(example['image'], rng)
  kind = int(rng.integers(18))  # Half of them are plain JPEG files.
  number = int(sku.removeprefix('SKU-')) - 1000
  missing = '' if number in (7, 11) else ('photo', 'text', *[''] * 8)[rng.integers(10)]
  path = '' if missing == 'photo' else _save(photo, out / 'photos' / sku, kind)
  relative = path and path.relative_to(out).as_posix()
  if missing == 'text':
    title = description = ''
  return [sku, title, description, relative, f'{rng.uniform(5, 100):.2f}', category]


@command
def main(argv: Sequence[str]) -> None:
  flags, _ = parse('python tools/make_shop.py', 'Write a shop to try molt fit on.', FLAGS, argv)
  make(pathlib.Path(flags.out), products=flags.products, seed=flags.seed)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
