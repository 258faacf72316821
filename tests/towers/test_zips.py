"""Towers in zip files: what is read equals the unzipped folder; damages and traps are one line."""

import io
import json
import pathlib
import stat
import sys
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from molt_jax.errors import UserError
from molt_jax.runtime import zipped
from molt_jax.towers import files, loading, shards

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))
from fuzzing import zips as made

sys.path.remove(str(pathlib.Path(__file__).parents[2] / 'tools'))


@pytest.fixture(scope='module')
def text_dir(hf, tmp_path_factory):
  return pathlib.Path(hf.save(hf.llama(), tmp_path_factory.mktemp('text')))


@pytest.fixture(scope='module')
def image_dir(hf, tmp_path_factory):
  return pathlib.Path(hf.save(hf.clip(), tmp_path_factory.mktemp('image')))


def pack(directory, path, *, method=zipfile.ZIP_DEFLATED, inside=''):
  """Zips a folder, as people do: with the folder itself, or without."""
  with zipfile.ZipFile(path, 'w', method) as archive:
    if inside:
      archive.mkdir(inside)
    for file in sorted(directory.iterdir()):
      archive.write(file, f'{inside}/{file.name}' if inside else file.name)
  return str(path)


@pytest.mark.parametrize('inside', ['', 'model'])
@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_the_folder_that_it_holds(text_dir, tmp_path, method, inside):
  path = pack(text_dir, tmp_path / 'tower.zip', method=method, inside=inside)
  ours = files.open_files(path, modality='text')
  whole = files.open_files(str(text_dir), modality='text')
  assert ours.identity['sha256'] == whole.identity['sha256']  # So a feature store serves both.
  assert ours.architecture == whole.architecture and ours.shapes == whole.shapes
  for name, shape in whole.shapes.items():
    np.testing.assert_array_equal(ours.read(name, shape), whole.read(name, shape))
  text = 'red apple red'
  assert ours.tokenizer().encode(text, 5) == whole.tokenizer().encode(text, 5) == [1, 2, 1]


def test_a_tower_in_a_zip_is_loaded_with_its_preprocessing(image_dir, tmp_path):
  spec = {'image_mean': [0.5, 0.4, 0.3], 'resample': 2, 'size': 20, 'crop_size': 20}
  (tmp_path / 'unzipped').mkdir()
  for file in image_dir.iterdir():
    (tmp_path / 'unzipped' / file.name).write_bytes(file.read_bytes())
  (tmp_path / 'unzipped' / 'preprocessor_config.json').write_text(json.dumps(spec))
  path = pack(tmp_path / 'unzipped', tmp_path / 'tower.zip')
  tower = loading.load_tower(path, modality='image', dtype='float32', attention='xla')
  assert tower.preprocess.mean == (0.5, 0.4, 0.3) and tower.preprocess.resample == 2
  expected = safetensors.numpy.load_file(image_dir / 'model.safetensors')
  np.testing.assert_array_equal(
    tower.params['position_embedding'], expected['embeddings.position_embedding.weight']
  )


def test_shards_are_read_in_a_zip(text_dir, tmp_path):
  tensors = safetensors.numpy.load_file(text_dir / 'model.safetensors')
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'config.json').write_bytes((text_dir / 'config.json').read_bytes())
  names, weight_map = sorted(tensors), {}
  for i, half in enumerate((names[::2], names[1::2])):
    file = f'model-{i}.safetensors'
    safetensors.numpy.save_file({n: tensors[n] for n in half}, folder / file)
    weight_map |= dict.fromkeys(half, file)
  (folder / shards.INDEX).write_text(json.dumps({'weight_map': weight_map}))
  opened = files.open_files(pack(folder, tmp_path / 'tower.zip'), modality='text')
  for name in names:
    np.testing.assert_array_equal(opened.read(name, tensors[name].shape), tensors[name])


def test_other_types_are_read_as_the_library_reads_them(tmp_path):
  values = {
    kind: np.arange(6).reshape(2, 3).astype(kind)
    for kind in ('float16', 'float64', 'bool', 'int8', 'uint16', 'int32', 'uint64')
  }
  (tmp_path / 'm.zip').write_bytes(made.pack(safetensors.numpy.save(values)))
  found = made.read(tmp_path / 'm.zip')
  assert found.keys() == values.keys()
  for name, value in values.items():
    np.testing.assert_array_equal(found[name], value)
    assert found[name].dtype == value.dtype


def test_blocks_of_rows_are_read_alone(tmp_path):
  value = np.arange(24, dtype=np.float32).reshape(6, 4)
  (tmp_path / 'm.zip').write_bytes(made.pack(safetensors.numpy.save({'x': value})))
  tensor = shards.find(zipped.folder(tmp_path / 'm.zip'))['x']
  blocks = [tensor.block(i, 3).read() for i in range(3)]
  np.testing.assert_array_equal(np.stack(blocks), value.reshape(3, 2, 4))


# ---- Traps ---------------------------------------------------------------------------------------


def archive(*members, method=zipfile.ZIP_DEFLATED):
  """A zip of (name or ZipInfo, content)."""
  out = io.BytesIO()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # A name twice.
    with zipfile.ZipFile(out, 'w', method) as file:
      for name, content in members:
        file.writestr(name, content)
  return out.getvalue()


def link(name):
  info = zipfile.ZipInfo(name)
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  return info


def encrypted(content):
  """The archive with the flag of encryption in both its headers."""
  raw = bytearray(content)
  raw[raw.index(b'PK\3\4') + 6] |= 1
  raw[raw.index(b'PK\1\2') + 8] |= 1
  return bytes(raw)


def promising(size):
  """An archive whose list promises another size than there is."""
  raw = bytearray(archive(('config.json', '{}' + ' ' * 98)))
  at = raw.index(b'PK\1\2') + 24
  raw[at : at + 4] = size.to_bytes(4, 'little')
  return bytes(raw)


CONFIG = ('config.json', '{}')
TRAPS = {
  'a path outside': (archive(('../x', b''), CONFIG), "'../x' lies outside"),
  'a path within that leaves': (archive(('a/../../x', b''), CONFIG), 'lies outside'),
  'an absolute path': (archive(('/etc/x', b''), CONFIG), "'/etc/x' lies outside"),
  'a drive': (archive(('C:/x', b''), CONFIG), "'C:/x' lies outside"),
  'a backslash': (archive(('a\\x', b''), CONFIG), 'lies outside'),
  'a line break': (archive(('a\nx', b''), CONFIG), 'lies outside'),
  'a NUL': (archive(CONFIG).replace(b'config.json', b'config\0json'), 'lies outside'),
  'a link': (archive((link('model.safetensors'), b'/etc/passwd'), CONFIG), 'is a link'),
  'a member twice': (archive(CONFIG, CONFIG), "the member 'config.json' twice"),
  'encrypted': (encrypted(archive(CONFIG)), "'config.json' is encrypted"),
  'another compression': (archive(CONFIG, method=zipfile.ZIP_LZMA), 'by method 14; implemented'),
  'many members': (archive(*((f'{i}', b'') for i in range(10_001))), 'has 10001 members, more'),
  'a promise of less': (promising(50), 'config.json cannot be read .Bad CRC'),
  'a promise without end': (promising(2**32 - 1), 'bytes, more than|damaged'),
  'a bomb': (archive(('config.json', b' ' * (1 << 27))), 'has 134217728 bytes, more than the'),
  'cut': (archive(CONFIG)[:-10], 'is no zip, or damaged'),
  'words': (b'hello', 'is no zip, or damaged'),
  'empty': (b'', 'is empty'),
  'a Git LFS pointer': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
  'no members': (archive(), 'holds 0 folders with a config.json.*it is empty'),
  'no model': (archive(('a.txt', b'x')), 'holds 0 folders with a config.json.*: a.txt'),
  'two models': (archive(('a/config.json', '{}'), ('b/config.json', '{}')), 'holds 2 folders'),
  'an OpenCLIP model without weights': (
    archive(('m/open_clip_config.json', '{}')),
    'm/open_clip_config.json has',
  ),
  'no weights': (archive(CONFIG, ('x.bin', b'')), 'holds only pickled weights .x.bin.'),
  'an empty config': (archive(('config.json', b'')), 'config.json is empty'),
  'other bytes': (
    archive(('config.json', '{"a": 1}'), method=zipfile.ZIP_STORED).replace(b'"a"', b'"b"'),
    'config.json cannot be read .Bad CRC',
  ),
}


@pytest.mark.parametrize('name', TRAPS)
def test_traps_are_one_line(tmp_path, name):
  raw, says = TRAPS[name]
  (tmp_path / 'tower.zip').write_bytes(raw)
  with pytest.raises(UserError, match=says) as error:
    files.open_files(str(tmp_path / 'tower.zip'), modality='text')
  assert str(error.value).isprintable() and 'tower.zip' in str(error.value)


def test_a_large_compressed_member_is_not_unpacked_in_memory(text_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(zipped, 'MAX_UNPACKED_BYTES', 1000)
  stored = pack(text_dir, tmp_path / 'stored.zip', method=zipfile.ZIP_STORED)
  files.open_files(stored, modality='text')
  with pytest.raises(UserError, match='more than the 1000 that are unpacked in memory: unzip it'):
    files.open_files(pack(text_dir, tmp_path / 'packed.zip'), modality='text')


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_changes_while_it_is_read_is_one_line(text_dir, tmp_path, method):
  path = pathlib.Path(pack(text_dir, tmp_path / 'tower.zip', method=method))
  opened = files.open_files(str(path), modality='text')
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(UserError, match='model.safetensors cannot be read') as error:
    for name, shape in opened.shapes.items():
      opened.read(name, shape)
  assert '\n' not in str(error.value)


def test_a_tokenizer_that_another_library_reads_is_asked_to_be_unzipped(text_dir, tmp_path):
  folder = tmp_path / 'folder'
  folder.mkdir()
  for name in ('config.json', 'model.safetensors'):
    (folder / name).write_bytes((text_dir / name).read_bytes())
  (folder / 'tokenizer.model').write_bytes(b'x')
  opened = files.open_files(pack(folder, tmp_path / 'tower.zip'), modality='text')
  with pytest.raises(UserError, match='tokenizer.model is not read in a zip: unzip it'):
    opened.tokenizer()


def test_generated_zips_are_refused_in_one_line_or_read_as_the_library_reads_them(fuzz):
  outcomes = fuzz('zips', count=300)['outcomes']
  assert min(outcomes[kind] for kind in ('refused', 'identical')) > 10
