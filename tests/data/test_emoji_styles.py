"""The tool that draws OpenMoji's training emoji in other hands: what it matches, what it never
draws, what it refuses.
"""

import csv
import importlib.util
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from molt_jax.data.published import openmoji
from molt_jax.data.sources import Dataset

pytest.importorskip('resvg_py')
TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'emoji_styles.py'


@pytest.fixture(scope='module')
def tool():
  spec = importlib.util.spec_from_file_location('emoji_styles', TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def square(color):
  return f'<rect x="0" y="0" width="10" height="10" fill="{color}"/>'


def write_archive(path, *, icons, aliases=None, chars=None):
  """An archive as npm packs an Iconify collection."""
  files = {
    'info.json': {
      'name': path.stem,
      'author': {'name': 'Somebody', 'url': 'https://example.org'},
      'license': {'title': 'MIT'},
    },
    'icons.json': {
      'width': 10,
      'height': 10,
      'icons': {name: {'body': body} for name, body in icons.items()},
      'aliases': aliases or {},
    },
  }
  files |= {'chars.json': chars} if chars else {}
  with tarfile.open(path, 'w:gz') as tar:
    for name, content in files.items():
      data = json.dumps(content).encode()
      info = tarfile.TarInfo(f'package/{name}')
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


class Emoji:
  """A split of emoji, as `Source` has it."""

  def __init__(self, *rows):
    self._rows = rows
    self.ids, self.labels = [row[0] for row in rows], [row[2] for row in rows]
    self.present = np.ones((len(rows), 2), bool)

  def __len__(self):
    return len(self.ids)

  def read(self, index, *, image):
    name, text, label = self._rows[index]
    return {
      'id': name,
      'image': openmoji.render(
        svg_string=(
          f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">{square("white")}</svg>'
        )
      ),
      'text': text,
      'label': np.int64(label),
    }


@pytest.fixture
def archives(tmp_path):
  folder = tmp_path / 'archives'
  folder.mkdir()
  write_archive(
    folder / 'iconify-json-red-1.2.3.tgz',
    icons={'cat': square('red'), 'flag': square('red'), 'dog': square('red')},
    aliases={'cat-too': {'parent': 'cat'}, 'cat-turned': {'parent': 'cat', 'hFlip': True}},
    chars={
      '1f431': 'cat',
      '1f3f4-200d-2620': 'flag',
      '1f436': 'dog',
      '1f63a': 'cat-too',
      '1f63b': 'cat-turned',
    },
  )
  write_archive(
    folder / 'iconify-json-blue-0.1.0.tgz', icons={'cat': square('blue'), 'unknown': square('blue')}
  )
  return folder


@pytest.fixture
def emoji(monkeypatch):
  splits = {
    'train': Emoji(
      ('1F431', 'cat face', 0),
      ('1F3F4-200D-2620-FE0F', 'pirate flag', 1),
      ('1F63A', 'grinning cat', 0),
      ('1F63B', 'cat in love', 0),
    ),
    'validation': Emoji(('1F436', 'dog face', 0)),
    'test': Emoji(('1F415', 'dog', 0)),
  }
  monkeypatch.setattr(openmoji, 'prepare', lambda folder: folder)
  monkeypatch.setattr(
    openmoji, 'open_prepared', lambda folder: Dataset('openmoji', ('animal', 'flag'), False, splits)
  )


def rows(folder, split):
  with (folder / f'{split}.csv').open(encoding='utf-8', newline='') as file:
    return list(csv.DictReader(file))


def test_training_emoji_are_drawn_in_each_hand_that_has_them_and_no_other_emoji(
  tool, archives, emoji, tmp_path
):
  assert tool.main([f'--archives={archives}', f'--out={tmp_path / "out"}']) == 0
  train = {row['image']: (row['text'], row['label']) for row in rows(tmp_path / 'out', 'train')}
  assert train == {
    'images/openmoji/1F431.png': ('cat face', 'animal'),
    'images/blue/1F431.png': ('cat face', 'animal'),
    'images/red/1F431.png': ('cat face', 'animal'),
    'images/openmoji/1F3F4-200D-2620-FE0F.png': ('pirate flag', 'flag'),
    'images/red/1F3F4-200D-2620-FE0F.png': (
      'pirate flag',
      'flag',
    ),  # The variation selector does not count.
    'images/openmoji/1F63A.png': ('grinning cat', 'animal'),
    'images/red/1F63A.png': ('grinning cat', 'animal'),  # An alias.
    'images/openmoji/1F63B.png': ('cat in love', 'animal'),
  }  # A drawing turned around is none of its own.
  assert [row['image'] for row in rows(tmp_path / 'out', 'validation')] == [
    'images/openmoji/1F436.png'
  ]  # Though 'red' has a dog.
  assert [row['image'] for row in rows(tmp_path / 'out', 'test')] == ['images/openmoji/1F415.png']
  pixels = {
    hand: np.asarray(Image.open(tmp_path / 'out' / 'images' / hand / '1F431.png'))[64, 64].tolist()
    for hand in ('red', 'blue')
  }
  assert pixels == {'red': [255, 0, 0], 'blue': [0, 0, 255]}
  assert (tmp_path / 'out' / 'LICENSES.md').read_text(encoding='utf-8').count('| MIT |') == 2


def test_icons_go_to_train_with_their_names_and_no_label(tool, archives, emoji, tmp_path):
  icons = tmp_path / 'icons'
  icons.mkdir()
  names = ('house-bold-24', 'Dog-Face-outline', 'pirate-flag', 'route-66', 'bold', 'dog-faces')
  write_archive(icons / 'iconify-json-any-1.2.3.tgz', icons={name: square('red') for name in names})
  write_archive(
    icons / 'iconify-json-ph-1.2.3.tgz',
    icons={name: square('blue') for name in ('house', 'house-fill', 'house-thin', 'dog-duotone')},
  )
  assert tool.main([f'--archives={archives}', f'--icons={icons}', f'--out={tmp_path / "out"}']) == 0
  train = [tuple(row.values()) for row in rows(tmp_path / 'out', 'train')]
  assert [row[0].split('/')[1] for row in train].index(
    'any'
  ) == 8  # After the eight drawings of emoji.
  assert train[8:] == [
    ('images/any/house-bold-24.png', 'house', ''),
    ('images/any/pirate-flag.png', 'pirate flag', ''),  # A name of train.
    ('images/any/route-66.png', 'route', ''),
    ('images/any/bold.png', 'bold', ''),
    ('images/any/dog-faces.png', 'dog faces', ''),
    ('images/ph/house-fill.png', 'house', ''),
  ]  # One rendering of a thing; 'dog' and 'dog face' are emoji of test and validation.
  assert len(rows(tmp_path / 'out', 'validation')) == len(rows(tmp_path / 'out', 'test')) == 1
  assert (tmp_path / 'out' / 'LICENSES.md').read_text(encoding='utf-8').count('| MIT |') == 4


def test_mistakes_are_one_line(tool, archives, emoji, tmp_path, capsys):
  def complaint(**flags):
    assert tool.main([f'--{name}={value}' for name, value in flags.items()]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]

  (tmp_path / 'empty').mkdir()
  assert 'no *.tgz' in complaint(archives=tmp_path / 'empty', out=tmp_path / 'out')
  assert '--icons: no *.tgz' in complaint(
    archives=archives, icons=tmp_path / 'empty', out=tmp_path / 'out'
  )
  assert 'exists' in complaint(archives=archives, out=tmp_path / 'empty')
  with tarfile.open(tmp_path / 'empty' / 'other-1.0.0.tgz', 'w:gz'):
    pass
  assert 'is no Iconify collection' in complaint(archives=tmp_path / 'empty', out=tmp_path / 'out')
  (tmp_path / 'empty' / 'other-1.0.0.tgz').write_bytes(b'no archive')
  assert 'other-1.0.0.tgz' in complaint(archives=tmp_path / 'empty', out=tmp_path / 'out')
