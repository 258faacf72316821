"""Predictions of a run, one at a time and many at once."""

import pathlib

import pytest

import molt_jax
from molt_jax import train


@pytest.fixture(scope='module')
def run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """A run of a few steps, whose programs other tests share."""
  config = make_tiny_config()
  config.train.epochs = 0.5
  workdir = tmp_path_factory.mktemp('predicted') / 'run'
  train.train(config, workdir)
  return workdir


@pytest.fixture(scope='module')
def model(run):
  return molt_jax.load(run)


def test_texts_are_packed_and_their_neighbours_change_nothing(run, monkeypatch):
  model, batches = molt_jax.load(run), []
  texts = ['a blue square', *map(str, range(31))]
  model.config.text.padding, model.config.eval.batch_size = 'packed', 32
  step = model._step
  monkeypatch.setattr(model, '_step', lambda *args: (batches.append(args[-1]), step(*args))[1])
  among = model.predict(text=texts, top_k=3)
  assert batches[0]['token_position'].shape == (1, 64)  # Of 32 x 12.
  model.config.text.padding = 'max_tokens'
  for n, one in ((n, model.predict(text=texts[n], top_k=3)) for n in (0, 9, 31)):
    assert [x['label'] for x in one['labels']] == [x['label'] for x in among[n]['labels']]
    wanted = [x['probability'] for x in one['labels']]
    assert [x['probability'] for x in among[n]['labels']] == pytest.approx(wanted, abs=5e-6)
