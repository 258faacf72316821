"""Training and evaluation from the feature store: as live, without towers; filling: once,
resumable, several at once, damage noticed.
"""

import json
import multiprocessing
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest

from molt_jax import evaluate, train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import pipeline
from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.features import frozen as frozen_towers
from molt_jax.features import hidden_states, opening
from molt_jax.features import store as store_lib
from molt_jax.runtime import logbook, sharding
from molt_jax.runtime.signals import Interrupted
from molt_jax.towers import loading
from molt_jax.training.assembly import assemble


def _six_steps(make_tiny_config, store='', dtype='float32'):
  config = make_tiny_config()
  config.train.epochs, config.train.eval_every, config.train.log_every = 0.5, 3, 1
  config.missing.views, config.missing.distill_weight = False, 0.0  # A smaller program.
  config.features.store, config.features.dtype, config.text.padding = str(store), dtype, 'packed'
  return config


@pytest.fixture(scope='session')
def live_run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """The folder of a run of six steps without a store."""
  workdir = tmp_path_factory.mktemp('live') / 'run'
  train.train(_six_steps(make_tiny_config), workdir)
  return workdir


@pytest.fixture(scope='session')
def store_run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """The folder of the same run with a float32 store, which it filled."""
  root = tmp_path_factory.mktemp('stored')
  train.train(_six_steps(make_tiny_config, root / 'store'), root / 'run')
  return root / 'run'


@pytest.fixture(scope='session')
def full_store(store_run) -> pathlib.Path:
  """A float32 store with all of the tiny table; not to be changed."""
  return store_run.parent / 'store'


@pytest.fixture
def six_steps(make_tiny_config, full_store):
  """Returns a function: a config of six steps from a store (default: the full one)."""
  return lambda store=full_store, dtype='float32': _six_steps(make_tiny_config, store, dtype)


def _open(config):
  """Fills the store of `config` with all splits; returns (assembly, stored)."""
  assembly = assemble(config)
  wanted = {name: (source, source.present) for name, source in assembly.data.splits.items()}
  _, stored = opening.open_features(assembly.extraction, wanted)
  return assembly, stored


@pytest.fixture
def no_tower(monkeypatch):
  """Loading a tower is an error."""

  def explode(*args, **kwargs):
    raise AssertionError('a tower was loaded')

  monkeypatch.setattr(loading, 'load_params', explode)


def _losses(workdir):
  return np.array(
    [
      [line['loss'], line['loss_ce'], line['grad_norm']]
      for line in logbook.read(workdir)
      if line['kind'] == 'train'
    ]
  )


def _results(workdir):
  return json.loads((workdir / 'evaluation.json').read_text())['results']


# ---- As live -------------------------------------------------------------------------------------


def test_a_run_from_the_store_is_the_live_run(live_run, store_run):
  np.testing.assert_allclose(_losses(store_run)[:, 0], _losses(live_run)[:, 0], rtol=0, atol=1e-6)
  np.testing.assert_allclose(_losses(store_run), _losses(live_run), rtol=1e-5, atol=1e-6)
  for name, result in _results(live_run).items():
    assert _results(store_run)[name] == pytest.approx(result, rel=1e-5, abs=1e-6), name


def test_sigterm_and_resume_from_a_full_store_bit_for_bit_and_no_tower_is_loaded(
  store_run, six_steps, no_tower, tmp_path, monkeypatch, same_run
):
  put, steps = sharding.put_batch, []

  def put_and_stop(batch, mesh):
    steps.append(1)
    if len(steps) == 2:
      signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  with monkeypatch.context() as patch:
    patch.setattr(sharding, 'put_batch', put_and_stop)
    with pytest.raises(Interrupted, match='step 2 of 6'):
      train.train(six_steps(), tmp_path / 'run')
  train.train(six_steps(), tmp_path / 'run')
  same_run(store_run, tmp_path / 'run')


def test_stored_states_are_live_states_on_every_valid_token(six_steps):
  config = six_steps()
  assembly, stored = _open(config)
  source, preprocess = assembly.data.splits['train'], assembly.preprocess
  live = next(iter(pipeline.eval_batches(source, preprocess, pipeline.Batching(batch_size=48))))
  ours = next(
    iter(
      pipeline.eval_batches(
        source, preprocess, pipeline.Batching(batch_size=48), stored=stored['train']
      )
    )
  )
  for name in ('present', 'token_mask', 'label', 'weight', 'index'):
    np.testing.assert_array_equal(live[name], ours[name])
  assert not {'image', 'tokens'} & set(ours)
  method = assembly.method
  frozen = frozen_towers.load_frozen(config, assembly.mesh, method.reads)
  states = {modality: reads.states for modality, reads in method.reads.items()}
  a = hidden_states.extract(method.modules, frozen, live, states)
  b = method.features({}, ours)
  has_image, mask = live['present'][:, 0], np.asarray(a.text_mask_bt)
  np.testing.assert_array_equal(mask, b.text_mask_bt)
  np.testing.assert_allclose(
    np.asarray(a.image_lbid)[:, has_image],
    np.asarray(b.image_lbid)[:, has_image],
    rtol=0,
    atol=2e-5,
  )
  np.testing.assert_allclose(
    np.asarray(a.text_lbtd)[:, mask], np.asarray(b.text_lbtd)[:, mask], rtol=0, atol=2e-5
  )
  assert (
    not np.asarray(b.image_lbid)[:, ~has_image].any()
    and not np.asarray(b.text_lbtd)[:, ~mask].any()
  )


def test_the_order_and_the_protocol_of_training_are_those_of_live_training(six_steps):
  assembly, stored = _open(six_steps())
  source, preprocess = assembly.data.splits['train'], assembly.preprocess
  keep = np.tile([[True, True], [False, True], [True, False]], (16, 1))

  def batches(**how):
    iterator = pipeline.train_iterator(
      source, preprocess, pipeline.Batching(batch_size=7), seed=3, present=keep, **how
    )
    return [next(iterator) for _ in range(9)]

  for live, ours in zip(batches(), batches(stored=stored['train']), strict=True):
    for name in ('present', 'token_mask', 'label', 'weight', 'index'):
      np.testing.assert_array_equal(live[name], ours[name])
    assert (
      not ours['image_states'][~live['present'][:, 0]].any()
      and not ours['text_states'][~live['present'][:, 1]].any()
    )


@pytest.mark.parametrize('dtype, bound', [('bfloat16', 2**-8), ('int8', 0.5 / 127)])
def test_smaller_types_stay_near(six_steps, tmp_path, dtype, bound):
  exact = _open(six_steps())[1]
  small = _open(six_steps(tmp_path / 'store', dtype))[1]
  for modality in MODALITIES:
    one, two = exact['train'][modality], small['train'][modality]
    for (key,) in filter(None, one.keys):
      x, y = one.read(key), np.asarray(two.read(key), np.float32)
      assert (np.abs(x - y) <= bound * np.abs(x).max(axis=-1, keepdims=True) * 1.001).all()


def test_training_from_int8_stays_near(six_steps, live_run, tmp_path):
  train.train(six_steps(tmp_path / 'store', 'int8'), tmp_path / 'run')
  np.testing.assert_allclose(
    _losses(tmp_path / 'run')[:, 0], _losses(live_run)[:, 0], rtol=0, atol=0.02
  )


# ---- Filling -------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
  """The keys of all inputs that were computed, and the towers that were loaded."""
  calls = {'rows': [], 'loaded': []}
  add, load = store_lib.FeatureStore.add, frozen_towers.load_frozen

  def add_and_count(self, key, x):
    calls['rows'].append(key)
    return add(self, key, x)

  def load_and_count(config, mesh, reads, modalities=MODALITIES, **how):
    calls['loaded'] += modalities
    return load(config, mesh, reads, modalities, **how)

  monkeypatch.setattr(store_lib.FeatureStore, 'add', add_and_count)
  monkeypatch.setattr(frozen_towers, 'load_frozen', load_and_count)
  return calls


def test_each_input_is_computed_once_and_what_is_absent_not_at_all(
  make_tiny_config, tiny_table, tmp_path, counted
):
  table = tmp_path / 'table'
  shutil.copytree(tiny_table, table)
  for split in (
    'train',
    'validation',
    'test',
  ):  # Every row shares one of two images, twelve rows one text.
    lines = (table / f'{split}.csv').read_text().splitlines()
    rows = [line.split(',') for line in lines[1:]]
    rows = [[f'images/train_{i % 2}.png' if row[0] else '', *row[1:]] for i, row in enumerate(rows)]
    for row in rows[:4]:
      row[1:-1] = ['the same']
    (table / f'{split}.csv').write_text('\n'.join([lines[0], *map(','.join, rows)]) + '\n')
  config = _six_steps(make_tiny_config, tmp_path / 'store')
  config.dataset.path = str(table)
  assembly, _ = _open(config)
  splits = assembly.data.splits.values()
  examples = [source[i] for source in splits for i in range(len(source))]
  texts = {tuple(assembly.preprocess.encode(x['text'], 12)) for x in examples if x['text']}
  assert len(counted['rows']) == len(set(counted['rows'])) == 2 + len(texts)
  assert counted['loaded'] == ['image', 'text']
  _open(config)
  assert len(counted['rows']) == 2 + len(texts) and counted['loaded'] == ['image', 'text']


def test_more_layers_other_towers_and_other_preprocessing_share_nothing_texts_share_all(
  six_steps, full_store, tmp_path, counted
):
  shutil.copytree(full_store, tmp_path / 'store')
  config = six_steps(tmp_path / 'store')
  config.image.resize = 'letterbox'
  _open(config)
  assert counted['loaded'] == ['image']
  config.molt.layers = '-1:'
  _open(config)
  assert counted['loaded'] == ['image', 'image', 'text']
  counted['loaded'].clear()
  config = six_steps(tmp_path / 'store')
  config.text.max_tokens = 9  # Texts that are cut are other texts, shorter ones are the same.
  before = len(counted['rows'])
  _open(config)
  assert counted['loaded'] == ['text'] and len(counted['rows']) > before
  config.text.max_tokens = 64
  config.seed, config.molt.width, config.missing.train_rate = 5, 8, 0.5
  _open(six_steps(tmp_path / 'store'))
  assert counted['loaded'] == ['text']


def test_evaluation_fills_what_it_needs_and_no_more(store_run, tmp_path, counted, monkeypatch):
  shutil.copytree(store_run, tmp_path / 'run')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  config['features']['store'] = str(tmp_path / 'store')
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  from molt_jax.data import transforms

  def explode(*args, **kwargs):
    raise AssertionError('decoded')

  monkeypatch.setattr(transforms, 'decode', explode)
  before = _results(tmp_path / 'run')
  assert evaluate.main([f'--workdir={tmp_path / "run"}', '--absent=image']) == 0
  assert counted['loaded'] == ['text']
  assert _results(tmp_path / 'run')['image_absent'] == pytest.approx(
    before['image_absent'], rel=1e-5
  )


def test_unusable_images_are_reported_and_absent_as_in_live_training(
  make_tiny_config, tiny_table, tmp_path, counted, capsys
):
  table = tmp_path / 'table'
  shutil.copytree(tiny_table, table)
  (table / 'images' / 'train_2.png').write_bytes(b'no picture')
  (table / 'images' / 'train_3.png').write_bytes(
    (table / 'images' / 'train_4.png').read_bytes()[:60]
  )
  configs = [_six_steps(make_tiny_config), _six_steps(make_tiny_config, tmp_path / 'store')]
  batches, lines = [], []
  for config in configs:
    config.dataset.path = str(table)
    assembly, stored = _open(config)
    source, preprocess = assembly.data.splits['train'], assembly.preprocess
    batches.append(
      list(
        pipeline.eval_batches(
          source, preprocess, pipeline.Batching(batch_size=8), stored=stored['train']
        )
      )
    )
    lines.append(sorted(preprocess.report.line().split(': ', 1)[1].split(', train')))
  assert len(lines[0]) == 2 and preprocess.report.counts() == {'image': 2}
  assert {part.removeprefix('train') for part in lines[0]} == {
    part.removeprefix('train') for part in lines[1]
  }
  for live, ours in zip(*batches, strict=True):
    np.testing.assert_array_equal(live['present'], ours['present'])
  counted['loaded'].clear()
  capsys.readouterr()
  _open(configs[1])  # They are tried again, which takes no tower.
  assert counted['loaded'] == [] and 'are there' in capsys.readouterr().err


def test_the_size_is_said_before_and_is_right_and_a_disk_too_small_is_refused(
  six_steps, tmp_path, capsys, monkeypatch
):
  _open(six_steps(tmp_path / 'store', 'int8'))
  said = [
    line
    for line in capsys.readouterr().err.splitlines()
    if 'go through the tower once and take' in line
  ]
  promised = sum(float(line.split('take ')[1].split(' MB')[0]) for line in said)
  tensors = 0
  for path in (tmp_path / 'store').glob('*/*.safetensors'):
    content = path.read_bytes()
    tensors += len(content) - 8 - int.from_bytes(content[:8], 'little')
  assert len(said) == 2 and promised == pytest.approx(tensors / 1e6, abs=0.11)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 9, 1))
  with pytest.raises(UserError, match=r'config.features.store: .* free.*features.dtype=int8'):
    _open(six_steps(tmp_path / 'other'))


def _fill_slowly(config_json, pause):
  """Fills in a process of its own, a shard a batch."""
  store_lib.SHARD_SECONDS = 0.0
  add = store_lib.FeatureStore.add

  def slow(self, key, x):
    time.sleep(pause)
    add(self, key, x)

  store_lib.FeatureStore.add = slow
  _open(CLASSIFIER.from_json(config_json))


@pytest.fixture(scope='module')
def processes():
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['molt_jax.train'])
  return context


def _same_content(config_one, config_two):
  one, two = _open(config_one)[1], _open(config_two)[1]
  for split in one:
    for modality in MODALITIES:
      assert one[split][modality].keys == two[split][modality].keys
      for (key,) in filter(None, one[split][modality].keys):
        np.testing.assert_allclose(
          one[split][modality].read(key), two[split][modality].read(key), rtol=0, atol=2e-5
        )


def test_a_kill_loses_nothing_that_was_written(six_steps, tmp_path, processes, counted):
  config = six_steps(tmp_path / 'store')
  process = processes.Process(target=_fill_slowly, args=(resolved.to_json(config), 0.02))
  process.start()
  while process.is_alive() and len(list((tmp_path / 'store').glob('*/*.safetensors'))) < 20:
    time.sleep(0.005)
  process.kill()
  process.join()
  assert process.exitcode == -signal.SIGKILL
  left = len(list((tmp_path / 'store').glob('*/*.safetensors')))
  _same_content(config, six_steps())
  total = len(_keys(_open(config)[1]))
  assert left >= 20 and len(counted['rows']) == total - left


def _keys(stored):
  return {
    (modality, key)
    for states in stored.values()
    for modality, x in states.items()
    for keys in x.keys
    for key in keys
  }


def test_two_processes_fill_one_store_together(six_steps, tmp_path, processes, counted):
  config = six_steps(tmp_path / 'store')
  both = [
    processes.Process(target=_fill_slowly, args=(resolved.to_json(config), 0.01)) for _ in range(2)
  ]
  for process in both:
    process.start()
  for process in both:
    process.join()
  assert [process.exitcode for process in both] == [0, 0]
  _same_content(config, six_steps())
  assert counted['rows'] == [] and not list((tmp_path / 'store').glob('*/.tmp-*'))


def test_damage_stops_training_before_it_is_trained_on_and_names_the_file(
  six_steps, full_store, tmp_path
):
  for n, path in enumerate(sorted(full_store.glob('*/*.safetensors'))):
    shutil.copytree(full_store, tmp_path / f'store{n}')
    damaged = tmp_path / f'store{n}' / path.relative_to(full_store)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assembly, stored = _open(six_steps(tmp_path / f'store{n}'))
    splits, preprocess = assembly.data.splits, assembly.preprocess
    iterator = pipeline.train_iterator(
      splits['train'], preprocess, pipeline.Batching(batch_size=48), seed=0, stored=stored['train']
    )
    other = pipeline.eval_batches(
      splits['test'], preprocess, pipeline.Batching(batch_size=14), stored=stored['test']
    )
    with pytest.raises(UserError, match='is damaged') as error:
      next(iterator)
      list(other)
    assert str(error.value).startswith(f'{damaged} is damaged') and 'delete it' in str(error.value)
    damaged.unlink()
    _same_content(six_steps(tmp_path / f'store{n}'), six_steps())
