"""Checkpoints: checksums of every array, whatever the sharding; damage is refused in one line."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molt_jax.errors import UserError
from molt_jax.training import checkpoint, checkpoint_files, checksums, train_state

META = {
  'config': {'seed': 0},
  'backbones': {},
  'class_names': ['a', 'b'],
  'data': {},
  'score': 0.5,
  'step': 3,
}


class Iterator:
  """Stands for a data iterator."""

  def __init__(self, position=0):
    self.position = {'next_index': position}

  def get_state(self):
    return self.position

  def set_state(self, position):
    self.position = position


def make_state(step=3, sharding=None, seed=0):
  """A small state with all kinds of leaves: matrices, scalars, a bfloat16 array, an empty one."""
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(32, 16)).astype(np.float32)  # Too large to be kept within an index.
  params = {
    'dense': {'kernel': kernel, 'bias': np.zeros(16, np.float32)},
    'half': jnp.asarray(rng.normal(size=(4,)), jnp.bfloat16),
  }
  state = train_state.TrainState(
    step=np.int32(step),
    params=params,
    statistics={'count': np.int32(7)},
    opt_state=optax.adam(1e-3).init(params),
    cca={'moments': rng.normal(size=(2, 8, 8))},
    seed=np.uint32(0),
  )
  return jax.device_put(jax.tree.map(jnp.asarray, state), sharding or jax.devices()[0])


def save(workdir, *states, kinds=(checkpoint_files.LATEST,), position=5):
  checkpoints = checkpoint.Checkpoints(workdir)
  checkpoints.prepare()
  for state in states:
    for kind in kinds:
      checkpoints.save(state, Iterator(position), {**META, 'step': int(state.step)}, kind=kind)
  checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with a latest checkpoint of step 3 and a best one of step 2."""
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir, make_state(2, seed=1), kinds=(checkpoint_files.BEST,))
  save(workdir, make_state(3))
  return workdir


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'run'))


def leaves(tree):
  named = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  return {name: (x.dtype, x.shape, np.asarray(x).tobytes()) for name, x in named.items()}


def restore(workdir, state=None):
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    assert checkpoints.meta()
    return checkpoints.restore(make_state() if state is None else state)
  finally:
    checkpoints.close()


def load(workdir):
  meta, restore_model = checkpoint_files.load_model(workdir, 'latest')
  state = make_state()
  tree = {'params': state.params, 'statistics': state.statistics}
  return meta, restore_model(checkpoint_files.abstract(tree))


def latest(workdir):
  return workdir / 'checkpoints' / 'latest' / '3'


def mesh_of(shape):
  return jax.make_mesh(shape, ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)


SHARDINGS = {
  'rows': lambda x: jax.P('data') if x.ndim and x.shape[0] % 4 == 0 else jax.P(),
  'replicated': lambda x: jax.P(),
}


@pytest.mark.parametrize('before', SHARDINGS)
@pytest.mark.parametrize('after', SHARDINGS)
def test_a_state_comes_back_in_any_sharding_and_has_the_same_checksums(tmp_path, before, after):
  mesh = mesh_of((4, 1))
  one = make_state()
  placed = {
    name: jax.tree.map(
      lambda x, spec=spec: jax.device_put(x, jax.NamedSharding(mesh, spec(x))), one
    )
    for name, spec in SHARDINGS.items()
  }
  assert checksums.of_arrays(placed[before]) == checksums.of_arrays(one)
  save(tmp_path, placed[before])
  restored, position = restore(tmp_path, placed[after])
  assert leaves(restored) == leaves(one) and position == {'next_index': 5}
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
    lambda x: x.sharding, placed[after]
  )


def test_checksums_tell_values_types_and_shapes_apart():
  x = np.arange(6, dtype=np.float32)
  other = [x.reshape(2, 3), x.view(np.int32), np.nextafter(x, 9), x[::-1], x.astype(np.float16)]
  sums = [checksums.of_arrays({'x': y})['x'] for y in (x, *other)]
  assert len(set(sums)) == len(sums)
  assert checksums.of_arrays({'x': x.reshape(2, 3)}) == checksums.of_arrays(
    {'x': np.asfortranarray(x.reshape(2, 3))}
  )


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(saved, tmp_path):
  rng = np.random.default_rng(0)
  expected = leaves(restore(saved)[0]), restore(saved)[1], load(saved)[0]
  files = [path.relative_to(saved) for path in sorted(latest(saved).rglob('*')) if path.is_file()]
  outcomes = []
  for number in range(60):
    workdir = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
    path = workdir / files[number % len(files)]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    try:
      state, position = restore(workdir)
      assert (leaves(state), position, load(workdir)[0]) == expected, path
      outcomes.append('harmless')
    except UserError as error:
      _assert_says_what_to_do(error, workdir)
      outcomes.append('noticed')
  assert outcomes.count('noticed') > 10


def _assert_says_what_to_do(error, workdir):
  line = str(error)
  assert '\n' not in line and f'{latest(workdir)} is damaged' in line
  assert f'delete it: {workdir / "checkpoints" / "best" / "2"} is then used' in line
  assert 'tensorstore' not in line.lower() and 'orbax' not in line.lower()


def _data_file(workdir):
  """The largest of them."""
  files = latest(workdir).glob('model/ocdbt.process_0/d/*')
  return max(files, key=lambda path: path.stat().st_size)


def _edit_meta(workdir, **changes):
  path = latest(workdir) / 'meta' / 'metadata'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
  'no data': lambda d: shutil.rmtree(latest(d) / 'model' / 'ocdbt.process_0'),
  'one data file lost': lambda d: _data_file(d).unlink(),
  'one data file cut': lambda d: _data_file(d).write_bytes(_data_file(d).read_bytes()[:99]),
  'one data file empty': lambda d: _data_file(d).write_bytes(b''),
  'no manifest': lambda d: (latest(d) / 'model' / 'manifest.ocdbt').unlink(),
  'no model': lambda d: shutil.rmtree(latest(d) / 'model'),
  'structure no JSON': lambda d: (latest(d) / 'model' / '_METADATA').write_text('{'),
  'no meta': lambda d: shutil.rmtree(latest(d) / 'meta'),
  'meta cut': lambda d: (latest(d) / 'meta' / 'metadata').write_text('{"config": {'),
  'meta no object': lambda d: (latest(d) / 'meta' / 'metadata').write_text('[1]'),
  'other classes': lambda d: _edit_meta(d, class_names=['a', 'c']),
  'other sums': lambda d: _edit_meta(d, checksums={}),
  'empty': lambda d: [shutil.rmtree(path) for path in latest(d).iterdir() if path.is_dir()],
  'another step': lambda d: latest(d).rename(latest(d).with_name('4')),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('entry', [restore, load])
def test_damage_is_one_line(copy, damage, entry):
  DAMAGES[damage](copy)
  words = r'the checkpoint \S+ is damaged \(.+\); delete it: \S+ is then used'
  with pytest.raises(UserError, match=words) as error:
    entry(copy)
  assert '\n' not in str(error.value)


DAMAGES_OF_TRAINING = {
  'position': lambda d: (latest(d) / 'data' / 'metadata').write_text('{"next_index": 6}'),
  'no position': lambda d: shutil.rmtree(latest(d) / 'data'),
  'no optimizer': lambda d: shutil.rmtree(latest(d) / 'optimizer'),
}


@pytest.mark.parametrize('damage', DAMAGES_OF_TRAINING)
def test_damage_of_what_training_alone_needs_stops_training_alone(copy, damage):
  DAMAGES_OF_TRAINING[damage](copy)
  load(copy)
  with pytest.raises(UserError, match='is damaged'):
    restore(copy)


def test_orbax_says_nothing_beside(copy, capfd):
  DAMAGES['one data file cut'](copy)
  for entry in (restore, load):
    with pytest.raises(UserError):
      entry(copy)
  assert capfd.readouterr().err == ''


def test_without_the_damaged_one_the_other_is_used_and_said(copy, capsys):
  shutil.rmtree(latest(copy))
  assert load(copy)[0]['step'] == 2
  assert 'latest holds no checkpoint; ' in capsys.readouterr().err
  state, _ = restore(copy)
  assert leaves(state) == leaves(make_state(2, seed=1))


def test_there_may_be_no_other(copy):
  shutil.rmtree(copy / 'checkpoints' / 'best')
  DAMAGES['no manifest'](copy)
  with pytest.raises(UserError, match='there is no other, so train anew'):
    load(copy)


def test_what_training_replaces_meanwhile_is_not_called_damaged(copy):
  meta, restore_model = checkpoint_files.load_model(copy, 'latest')
  shutil.rmtree(latest(copy))
  with pytest.raises(UserError, match='was replaced while it was read.*give the command again'):
    restore_model(None)


# ---- Not finite ----------------------------------------------------------------------------------


PLACES = {
  'params': lambda s, bad: s.replace(params={**s.params, 'half': s.params['half'].at[1].set(bad)}),
  'cca': lambda s, bad: s.replace(cca={'moments': s.cca['moments'].at[0, 0, 0].set(bad)}),
}


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, place, bad):
  save(tmp_path, make_state(2))
  words = f'the state after step 3 is not finite .*{place}.*learning_rate'
  with pytest.raises(UserError, match=words):
    save(tmp_path, PLACES[place](make_state(), bad))
  assert int(restore(tmp_path)[0].step) == 2


@pytest.fixture
def old(tmp_path, monkeypatch):
  """Function of a state: a folder as a version without checksums left it."""

  def make(state):
    with monkeypatch.context() as patch:
      patch.setattr(
        checksums,
        'seal',
        lambda meta: {
          key: value for key, value in meta.items() if key not in ('checksums', 'data')
        },
      )
      patch.setattr(checkpoint.Checkpoints, 'check_finite', lambda self, state: None)
      save(tmp_path, state)
    return tmp_path

  return make


def test_what_an_older_version_saved_is_read_with_a_word(old, capsys):
  workdir = old(make_state())
  assert leaves(restore(workdir)[0]) == leaves(make_state())
  said = capsys.readouterr().err
  assert 'has no checksums' in said and 'older version' in said


def test_a_run_of_a_method_that_has_changed_since_is_refused():
  folder, config = pathlib.Path('run/checkpoints/latest/5'), {'method': 'pmf'}
  for kept in ({'config': {}}, {'config': {'method': 'molt'}}, {'config': config, 'revision': 2}):
    checkpoint_files._check_revision(folder, kept)
  with pytest.raises(UserError, match="another version of the method 'pmf'.*train it anew"):
    checkpoint_files._check_revision(folder, {'config': config})


@pytest.mark.parametrize('place', PLACES)
def test_what_is_not_finite_is_not_loaded(old, place):
  workdir = old(PLACES[place](make_state(), np.nan))
  with pytest.raises(UserError, match=f'is damaged .*{place}.* is not finite'):
    restore(workdir)


def test_parameters_of_another_model_are_named(saved):
  _, restore_model = checkpoint_files.load_model(saved, 'latest')
  tree = {'params': {'dense': {'kernel': jnp.zeros((8, 17))}}, 'statistics': {}}
  words = r'has float32\[16\] as params/dense/bias, and this version makes nothing'
  with pytest.raises(UserError, match=words) as error:
    restore_model(checkpoint_files.abstract(tree))
  assert '\n' not in str(error.value)


def test_a_model_is_restored_without_knowing_it(saved):
  """As a report does, which only compares checksums."""
  _, restore_model = checkpoint_files.load_model(saved, 'latest')
  state = make_state()
  assert leaves(restore_model(None)) == leaves(
    {'params': state.params, 'statistics': state.statistics}
  )
