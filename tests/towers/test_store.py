"""The feature store by itself: what comes back, what is noticed, what is refused."""

import hashlib
import json
import os
import pathlib
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molt_jax.errors import UserError
from molt_jax.features import store as store_lib
from molt_jax.features.store import FeatureStore, key_of

SPEC = {'modality': 'text', 'tower': 'ab' * 32, 'states': [2, 3]}


def _arrays(count, seed=0, width=5):
  rng = np.random.default_rng(seed)
  return {
    key_of(bytes([n, seed])): rng.normal(size=(2, 1 + n % 4, width)).astype(np.float32)
    for n in range(count)
  }


def _write(directory, arrays, dtype='float32', spec=SPEC):
  kept = FeatureStore(directory, spec, dtype)
  for key, x in arrays.items():
    kept.add(key, x)
  kept.flush()
  return kept


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_what_was_added_comes_back_from_a_new_process_s_view(tmp_path, dtype):
  arrays = _arrays(9)
  _write(tmp_path / 'store', arrays, dtype)
  again = FeatureStore(tmp_path / 'store', SPEC, dtype)
  assert len(again) == 9 and all(key in again for key in arrays) and key_of(b'else') not in again
  for key, x in arrays.items():
    got = again.read(key)
    if dtype == 'float32':
      np.testing.assert_array_equal(got, x)
    elif dtype == 'bfloat16':
      assert got.dtype == ml_dtypes.bfloat16
      np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16))
    else:
      scale = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True) / 127
      np.testing.assert_allclose(got, np.rint(x / scale) * scale, rtol=1e-6)
      assert (np.abs(got - x) <= scale * 0.5001).all()


@pytest.mark.filterwarnings('error')
def test_int8_of_zero_is_zero_and_what_is_not_finite_stays_so(tmp_path):
  x = np.zeros((1, 3, 4), np.float32)
  x[0, 1, 2], x[0, 2, 0] = np.inf, np.nan
  got = _write(tmp_path, {key_of(b'x'): x}, 'int8').read(key_of(b'x'))
  assert (
    not got[0, 0].any() and not np.isfinite(got[0, 1]).all() and not np.isfinite(got[0, 2]).all()
  )


@pytest.mark.parametrize('dtype', store_lib.CODECS)
def test_shards_are_safetensors_files_that_anybody_can_open_and_as_large_as_promised(
  tmp_path, dtype
):
  arrays = _arrays(4)
  kept = _write(tmp_path, arrays, dtype)
  (path,) = kept.folder.glob('*.safetensors')
  with safetensors.safe_open(path, framework='np') as file:
    assert set(file.keys()) == set(arrays)
    assert set(json.loads(file.metadata()['crc32'])) == set(arrays)
  assert kept.stored_bytes == sum(kept.codec.stored_bytes(*x.shape) for x in arrays.values())
  assert json.loads((kept.folder / 'spec.json').read_text()) == {
    **SPEC,
    'format': store_lib.FORMAT,
    'dtype': dtype,
  }


def test_another_tower_preprocessing_type_or_format_finds_nothing(tmp_path, monkeypatch):
  arrays = _arrays(3)
  _write(tmp_path, arrays)
  for change in ({'tower': 'cd' * 32}, {'states': [1, 2, 3]}, {'modality': 'image'}, {'new': 1}):
    assert len(FeatureStore(tmp_path, SPEC | change, 'float32')) == 0
  assert len(FeatureStore(tmp_path, SPEC, 'int8')) == 0
  monkeypatch.setattr(store_lib, 'FORMAT', store_lib.FORMAT + 1)
  assert len(FeatureStore(tmp_path, SPEC, 'float32')) == 0


@pytest.fixture(scope='module')
def small_store(tmp_path_factory):
  """(folder, arrays): two shards and spec.json."""
  directory = tmp_path_factory.mktemp('small') / 'store'
  arrays = _arrays(3), _arrays(2, seed=1)
  for part in arrays:
    _write(directory, part)
  assert len(list(directory.glob('*/*'))) == 3
  return directory, arrays[0] | arrays[1]


def _read_all(directory, keys):
  kept = FeatureStore(directory, SPEC, 'float32')
  return {key: kept.read(key) for key in keys}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_any_file_is_noticed_and_the_file_named(small_store, data):
  directory, arrays = small_store
  path = data.draw(st.sampled_from(sorted(directory.glob('*/*'))))
  content = path.read_bytes()
  place, flip = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
  try:
    path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
    with pytest.raises(UserError, match='is damaged') as error:
      _read_all(directory, arrays)
  finally:
    path.write_bytes(content)
  assert (
    str(error.value).startswith(f'{path} is damaged')
    and 'delete it' in str(error.value)
    and '\n' not in str(error.value)
  )
  assert {key: x.tobytes() for key, x in _read_all(directory, arrays).items()} == {
    key: x.tobytes() for key, x in arrays.items()
  }


@pytest.mark.parametrize(
  'change',
  [
    lambda c: c[:-1],
    lambda c: c[: len(c) // 2],
    lambda c: c[:3],
    lambda c: b'',
    lambda c: c + b'\0',
    lambda c: c[::-1],
  ],
)
def test_a_file_cut_short_or_grown_is_noticed(small_store, tmp_path, change):
  directory, arrays = small_store
  shutil.copytree(directory, tmp_path / 'store')
  for path in sorted((tmp_path / 'store').glob('*/*')):
    content = path.read_bytes()
    path.write_bytes(change(content))
    with pytest.raises(UserError, match='is damaged'):
      _read_all(tmp_path / 'store', arrays)
    path.write_bytes(content)


def test_a_damaged_file_that_is_deleted_is_written_anew(small_store, tmp_path):
  directory, arrays = small_store
  shutil.copytree(directory, tmp_path / 'store')
  for path in (tmp_path / 'store').glob('*/*'):
    path.unlink()
    kept = _write(tmp_path / 'store', arrays)
    assert all(np.array_equal(kept.read(key), x) for key, x in arrays.items())


def test_a_shard_that_vanishes_while_it_is_used_is_one_line(tmp_path):
  arrays = _arrays(1)
  kept = _write(tmp_path, arrays)
  for path in kept.folder.glob('*.safetensors'):
    path.unlink()
  with pytest.raises(UserError, match=r'can no longer be read .* start again'):
    kept.read(next(iter(arrays)))


def test_what_is_there_is_not_written_again_and_the_same_shard_twice_is_one(tmp_path):
  arrays = _arrays(5)
  one, two = FeatureStore(tmp_path, SPEC, 'float32'), FeatureStore(tmp_path, SPEC, 'float32')
  for kept in (one, two):
    for key, x in arrays.items():
      kept.add(key, x)
  one.flush()
  two.flush()
  assert len(list(one.folder.glob('*.safetensors'))) == 1 and len(two) == 5
  more = _arrays(7)
  _write(tmp_path, more)
  names = [
    json.loads(p.read_bytes()[8 : 8 + int.from_bytes(p.read_bytes()[:8], 'little')])
    for p in one.folder.glob('*.safetensors')
  ]
  assert sorted(len(n) - 1 for n in names) == [2, 5]
  one.refresh()
  assert len(one) == 7


def test_a_shard_is_written_when_it_is_large_or_old_enough(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib, 'SHARD_BYTES', 200)
  kept = FeatureStore(tmp_path, SPEC, 'float32')
  for key, x in _arrays(12).items():
    kept.add(key, x)
  kept.flush()
  sizes = [path.stat().st_size for path in kept.folder.glob('*.safetensors')]
  assert len(sizes) > 3 and len(kept) == 12


def test_of_two_entries_of_one_key_the_older_is_served(tmp_path):
  key = key_of(b'x')
  for value, when in ((1.0, 200), (2.0, 100), (3.0, 300)):
    kept = _write(tmp_path / str(value), {key: np.full((1, 1, 2), value, np.float32)})
    (path,) = kept.folder.glob('*.safetensors')
    target = tmp_path / 'store' / kept.folder.name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
    os.utime(target / path.name, (when, when))
  assert FeatureStore(tmp_path / 'store', SPEC, 'float32').read(key).tolist() == [[[2.0, 2.0]]]


def test_temporary_files_are_ignored_and_old_ones_removed(tmp_path):
  kept = _write(tmp_path, _arrays(2))
  # Of processes of another machine.
  new, old = (kept.folder / f'.tmp-00000000-1-{name}' for name in ('abc', 'def'))
  for path in (new, old):
    path.write_bytes(b'half a shard')
  os.utime(old, (1, 1))
  assert len(FeatureStore(tmp_path, SPEC, 'float32')) == 2
  assert new.exists() and not old.exists()


def test_a_folder_of_something_else_a_file_and_a_forbidden_place_are_refused_in_one_line(tmp_path):
  (tmp_path / 'photos').mkdir()
  (tmp_path / 'photos' / 'beach.jpg').write_bytes(b'x')
  (tmp_path / 'file').write_text('x')
  for directory, words in (
    (tmp_path / 'photos', 'is no feature store, it holds beach.jpg'),
    (tmp_path / 'file', 'cannot be used'),
    (pathlib.Path('/proc/nothing/here'), 'cannot be used'),
  ):
    with pytest.raises(UserError, match=words) as error:
      FeatureStore(directory, SPEC, 'float32')
    assert str(error.value).startswith('config.features.store: ') and '\n' not in str(error.value)
  assert sorted(p.name for p in (tmp_path / 'photos').iterdir()) == ['beach.jpg']


def test_a_disk_that_is_full_is_one_line_and_leaves_no_temporary_file(tmp_path, monkeypatch):
  kept = FeatureStore(tmp_path, SPEC, 'float32')
  kept.add(key_of(b'x'), np.zeros((1, 1, 1), np.float32))

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match='cannot be written .No space left on device.; make room'):
    kept.flush()
  assert [p.name for p in kept.folder.iterdir()] == ['spec.json']


def test_threads_read_while_another_store_writes(tmp_path):
  first, second = _arrays(20), _arrays(20, seed=1)
  kept = _write(tmp_path, first)
  wrong = []

  def reader():
    for _ in range(30):
      wrong.extend(key for key, x in first.items() if not np.array_equal(kept.read(key), x))

  threads = [threading.Thread(target=reader) for _ in range(4)]
  for thread in threads:
    thread.start()
  for key, x in second.items():
    _write(tmp_path, {key: x})
    kept.refresh()
  for thread in threads:
    thread.join()
  assert wrong == [] and all(np.array_equal(kept.read(key), x) for key, x in second.items())


def test_keys_are_sha256():
  assert key_of(b'abc') == hashlib.sha256(b'abc').hexdigest()
