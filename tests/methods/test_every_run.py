"""Whole runs of every method of the table: trained by `molt_jax.fit`, scored, asked, reported on;
stopped between steps, they go on bit for bit.
"""

import json
import signal

import numpy as np
import pytest

import molt_jax
from molt_jax import evaluate, report, train
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.methods import METHODS
from molt_jax.runtime import sharding, signals

IMAGE = np.full((20, 20, 3), (200, 30, 30), np.uint8)
EXAMPLES = {'both': {'image': IMAGE, 'text': 'a red square'}, 'image': {'image': IMAGE}}
EXAMPLES['text'] = {'text': 'a red square'}
STEPS = 4
FIELDS = {
  'backbones.text.path': 'random:llama-tiny',
  'backbones.image.path': 'random:clip-vit-tiny',
  'backbones.image.resolution': 0,
  'backbones.dtype': 'float32',
  'compute_dtype': 'float32',
  'features.store': '',
  'mesh.data': 1,
  'text.max_tokens': 12,
  'text.padding': 'max_tokens',
  'train.batch_size': 4,
  'eval.batch_size': 8,
  'train.epochs': STEPS / 12,
  'train.least_steps': 0,
  'train.eval_every': 2,
  'train.log_every': 1,
  'molt.layers': '-2:',
  'molt.width': 8,
  'ridge.landmarks': 0,
  'classifier.hidden': 8,
  'cca.num_directions': 4,
  'prototypes.width': 8,
  'huse.width': 8,
  'albef.width': 8,
  'albef.space': 8,
  'albef.num_layers': 1,
  'albef.queue': 12,
  'mmrl.width': 8,
  'mmrlpp.width': 8,
  'pmf.hidden': 8,
  'pmf.num_layers': 1,
  'maple.num_layers': 2,
  'coop.num_tokens': 2,
  'cocoop.num_tokens': 2,
  'prompt_fuse.num_tokens': 2,
  'mmbt.cells': 2,
  'map.num_layers': 1,
  'dcp.num_layers': 2,
  'dcp.num_tokens': 2,
}
# A text tower that shares a space with the image tower, for methods that need class names.
PAIR = {'backbones.text.path': 'random:clip-text-tiny'}
# The others are alike in what a run of theirs keeps: parameters and moments.
DAILY = ('albef', 'knn')


def fields_of(name):
  return FIELDS | {'method': name} | (PAIR if METHODS[name].names == 'must' else {})


CASES = [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in METHODS]


@pytest.fixture(scope='module', params=CASES)
def run(request, tiny_table, tmp_path_factory):
  """(method, folder, predictor) of a run of four steps."""
  folder = tmp_path_factory.mktemp('runs') / request.param
  config = {k: v for k, v in fields_of(request.param).items() if k != 'method'}
  model = molt_jax.fit(str(tiny_table), workdir=folder, method=request.param, config=config)
  return request.param, folder, model


def test_it_is_scored_asked_and_reported_on(run):
  name, folder, model = run
  answers = {given: model.predict(**example) for given, example in EXAMPLES.items()}
  for answer in answers.values():
    p = {found['label']: found['probability'] for found in answer['labels']}
    assert set(p) == {'red', 'green', 'blue'} and sum(p.values()) == pytest.approx(1, abs=1e-4)
  assert [answer['image'] for answer in answers.values()] == [True, True, False]
  before = train.records.Predictions.load(folder / train.records.PREDICTIONS)
  assert np.isfinite(before.probability_cnk).all()
  results = evaluate.run(folder)['results']
  counts = [results[f'{what}_absent']['num_examples'] for what in ('none', 'text', 'image')]
  assert counts == [14, 12, 13] and CLASSIFIER.read_run(folder).method == name
  assert report.main([f'--workdir={folder}']) == 0
  assert name in (folder / 'report.html').read_text(encoding='utf-8')


def test_stopped_between_steps_it_goes_on_bit_for_bit(run, tmp_path, monkeypatch, same_run):
  name, whole, _ = run
  if not json.loads((whole / 'run.json').read_text())['parameters']:
    pytest.skip('a run of one step')
  put, steps = sharding.put_batch, []

  def put_and_stop(batch, mesh):
    steps.append(1)
    if len(steps) == 3:
      signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  config = CLASSIFIER.read_run(whole)
  monkeypatch.setattr(sharding, 'put_batch', put_and_stop)
  with pytest.raises(signals.Interrupted, match=f'step 3 of {STEPS}'):
    train.train(config, tmp_path / name)
  monkeypatch.undo()
  train.train(config, tmp_path / name)
  same_run(whole, tmp_path / name)
