"""Runs whose method reads the names of classes: answers, other classes, and the few-shot
protocols.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

import molt_jax
from molt_jax import evaluate, train
from molt_jax.data import shots
from molt_jax.errors import UserError
from molt_jax.runtime import sharding, signals

ROOT = pathlib.Path(__file__).parents[1]
IMAGE = np.full((20, 20, 3), (200, 30, 30), np.uint8)
PAIR = {'text': 'random:clip-text-tiny', 'image': 'random:clip-vit-tiny'}


def make_config(config, method, steps):
  for modality, path in PAIR.items():
    config.backbones[modality].path = path
  config.method, config.train.epochs = method, steps / 12
  config.mmrlpp.width, config.mmrlpp.num_tokens = 8, 2
  return config


@pytest.fixture(scope='module')
def run(tiny_table, tmp_path_factory):
  """Two steps of CoOp, from a feature store."""
  root = tmp_path_factory.mktemp('named')
  config = {
    **{f'backbones.{modality}.path': path for modality, path in PAIR.items()},
    'backbones.dtype': 'float32',
    'coop.num_tokens': 2,
    'features.store': root / 'store',
    'mesh.data': 1,
    'text.max_tokens': 12,
    'train.epochs': 2 / 12,
    'train.batch_size': 4,
    'eval.batch_size': 8,
  }
  molt_jax.fit(str(tiny_table), workdir=root / 'run', method='coop', config=config)
  return root / 'run'


def probabilities(answer):
  return {found['label']: found['probability'] for found in answer['labels']}


def test_an_image_alone_is_compared_with_names_by_the_text_tower(run):
  model = molt_jax.load(run)
  found = [model.predict(image=IMAGE), model.predict(text='a red square')]
  both = model.predict(image=IMAGE, text='a red square')
  for answer in (*found, both):
    assert sum(probabilities(answer).values()) == pytest.approx(1, abs=1e-4)
  scores = evaluate.run(run)['results']
  assert scores['text_absent']['num_examples'] > 0


def test_other_classes_are_told_apart_by_their_names(run):
  known = molt_jax.load(run)
  assert known.class_names == ['blue', 'green', 'red']
  same = molt_jax.load(run, class_names=['red', 'blue', 'green'])
  expected = probabilities(known.predict(image=IMAGE))
  assert probabilities(same.predict(image=IMAGE)) == pytest.approx(expected, abs=1e-5)
  other = molt_jax.load(run, class_names=['a sea', 'a hill', 'a tree', 'a lake'])
  assert set(probabilities(other.predict(image=IMAGE))) == {'a sea', 'a hill', 'a tree', 'a lake'}
  with pytest.raises(UserError, match='give two names or more, each once'):
    molt_jax.load(run, class_names=['red', 'red'])
  with pytest.raises(UserError, match='not on class_names'):
    other.predict(image=IMAGE, coverage=0.9)
  with pytest.raises(UserError, match='give one'):
    molt_jax.fit([], workdir='unused', method='coop', config={'method': 'molt'})


# ---- Protocols -----------------------------------------------------------------------------------


def test_few_shots_are_so_many_of_each_class_and_fewer_are_among_more():
  rng = np.random.default_rng(0)
  labels = [int(k) for k in rng.integers(-1, 4, 60)]
  ids = [f'row {n}' for n in range(60)]
  drawn = {count: shots.draw(ids, labels, count, seed=1) for count in (1, 4, 99)}
  for count, rows in drawn.items():
    of_each = np.bincount([labels[n] for n in rows], minlength=4)
    expected = [min(count, labels.count(k)) for k in range(4)]
    np.testing.assert_array_equal(of_each, expected)
  assert set(drawn[1]) < set(drawn[4]) < set(drawn[99])
  assert shots.draw(ids, labels, 4, seed=2) != drawn[4]
  order = rng.permutation(60)
  shuffled = shots.draw([ids[n] for n in order], [labels[n] for n in order], 4, seed=1)
  assert sorted(order[n] for n in shuffled) == drawn[4]


def test_the_first_half_of_the_classes_is_trained_on():
  assert shots.base_and_novel(5) == (range(3), range(3, 5))
  assert shots.base_and_novel(4) == (range(2), range(2, 4))
  assert shots.of_classes([0, 3, 2, -1, 3], range(2, 4)) == [1, 2, 4]
  assert shots.harmonic_mean(0.8, 0.4) == pytest.approx(0.5333, abs=1e-4)
  assert shots.harmonic_mean(0.8, 0.0) == 0


@pytest.mark.slow  # Several trainings in a process of their own.
def test_the_protocols_run_from_end_to_end(tmp_path):
  from PIL import Image

  data, rng = tmp_path / 'data', np.random.default_rng(0)
  (data / 'images').mkdir(parents=True)
  for split, count in (('train', 16), ('validation', 8), ('test', 12)):
    lines = ['image,text,label']
    for n in range(count):
      name = ('black', 'grey', 'silver', 'white')[n % 4]
      grey = rng.normal(80 * (n % 4), 10, (16, 16, 3)).clip(0, 255).astype(np.uint8)
      Image.fromarray(grey).save(data / 'images' / f'{split}_{n}.png')
      lines.append(f'images/{split}_{n}.png,number {n},{name}')
    (data / f'{split}.csv').write_text('\n'.join(lines) + '\n')
  fields = {
    **{f'backbones.{modality}.path': path for modality, path in PAIR.items()},
    'features.store': '',
    'mesh.data': 1,
    'train.epochs': 1,
    'train.batch_size': 4,
    'eval.batch_size': 4,
    'mmrlpp.num_tokens': 2,
  }
  command = [sys.executable, 'experiments/few_shot.py', f'--data=grey={data}', '--shots=1,2']
  command += ['--methods=zero-shot|^coop|mmrlpp']
  command += [f'--set={name}={value}' for name, value in fields.items()]
  command += ['--seeds=1', f'--runs={tmp_path / "runs"}', f'--out={tmp_path / "out"}']
  flags = {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'out' / 'few_shot.json').read_text())
  methods = {'zero-shot', 'coop', 'mmrlpp'}
  for count in ('1', '2'):
    assert set(found['few_shot'][count]['grey']) == methods
  for by_seed in found['base_to_novel']['grey'].values():
    assert 0 <= by_seed['1']['test'] <= 1
    assert 0 <= by_seed['1']['novel'] <= 1
  report = (tmp_path / 'out' / 'few_shot.md').read_text()
  assert '| zero-shot | 0 |' in report


@pytest.mark.slow  # Two trainings; the states that names have in it are of the checkpoint too.
def test_a_run_with_names_that_was_stopped_goes_on_bit_for_bit(
  tiny_config, tmp_path, monkeypatch, same_run
):
  config = make_config(tiny_config, 'mmrlpp', 3)
  train.train(config, tmp_path / 'whole')
  put, batches = sharding.put_batch, []

  def put_and_stop(batch, mesh):
    batches.append(1)
    if len(batches) == 2:
      signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', put_and_stop)
  with pytest.raises(signals.Interrupted, match='step 2 of 3'):
    train.train(config, tmp_path / 'run')
  monkeypatch.undo()
  train.train(config, tmp_path / 'run')
  same_run(tmp_path / 'whole', tmp_path / 'run')
