"""Kernel ridge regression in a run: fitted once, weighed at each validation, restored bit for
bit.
"""

import json

import numpy as np
import pytest

from molt_jax import evaluate, train
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.evaluation import trained
from molt_jax.features.frozen import load_frozen
from molt_jax.training import ridge_fit
from molt_jax.training.assembly import assemble


@pytest.fixture(scope='module')
def make_config(make_tiny_config, tmp_path_factory):
  store = tmp_path_factory.mktemp('store')

  def make():
    config = make_tiny_config()
    config.features.store, config.features.dtype = str(store), 'float32'
    config.ridge.landmarks, config.molt.cells = -1, 2
    config.train.epochs, config.train.eval_every = 0.5, 3
    return config

  return make


@pytest.fixture(scope='module')
def run(make_config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('ridge') / 'run'
  train.train(make_config(), workdir)
  return workdir


def test_a_run_says_how_many_landmarks_it_has_and_keeps_them(run):
  config = CLASSIFIER.from_json((run / 'config.json').read_text())
  assert config.ridge.landmarks == 48
  ridge = trained.open(run).variables()['statistics']['ridge']
  assert np.all(np.asarray(ridge['temperature_v']) > 0)
  # Class token and four cells of each picture.
  assert ridge['image']['cells_landmarks_mlnd'].shape[:3] == (48, 1, 5)


def test_colours_are_told_from_pictures_alone(run):
  results = json.loads((run / 'evaluation.json').read_text())['results']
  assert results['text_absent']['accuracy'] > 0.9


def test_evaluation_repeats_the_runs_scores(run):
  before = json.loads((run / 'evaluation.json').read_text())['results']
  evaluate.run(run)
  after = json.loads((run / 'evaluation.json').read_text())['results']
  assert after == before


def test_a_run_that_failed_at_its_first_step_goes_on_as_if_it_had_not(
  run, make_config, tmp_path, monkeypatch, same_run
):
  fitted = []
  fit = ridge_fit.RidgeFit.fit

  def fit_and_count(self, *arguments):
    fitted.append(1)
    return fit(self, *arguments)

  monkeypatch.setattr(ridge_fit.RidgeFit, 'fit', fit_and_count)
  validate = train.ClassifierTrainer.validate

  def fail_at_six(self, state, monitor):
    if int(state.step) == 6:
      self.checkpoints.close()  # That of step 3 is written.
      raise KeyboardInterrupt
    return validate(self, state, monitor)

  with monkeypatch.context() as patch:
    patch.setattr(train.ClassifierTrainer, 'validate', fail_at_six)
    with pytest.raises(KeyboardInterrupt):
      train.train(make_config(), tmp_path / 'run')
  train.train(make_config(), tmp_path / 'run')
  assert len(fitted) == 1
  same_run(run, tmp_path / 'run')


def test_beside_a_trained_tower_it_is_fitted_to_the_states_of_now(
  make_config, tmp_path, monkeypatch
):
  config, kept = make_config(), {}
  config.features.store = ''  # Live: stored states are those below what is trained.
  config.backbones.image.trainable, config.train.epochs = '.*', 0.25
  finish = train.ClassifierTrainer.finish

  def keep(self):
    kept['fit'], kept['frozen'] = self._ridge.fit, self.frozen
    return finish(self)

  monkeypatch.setattr(train.ClassifierTrainer, 'finish', keep)
  train.train(config, tmp_path / 'run')
  variables = trained.open(tmp_path / 'run').variables()
  own, wanted = variables['statistics'], kept['fit'](variables, kept['frozen'])
  begun = kept['fit'](_with_untrained_tower(variables, config), kept['frozen'])
  landmarks, now, first = (
    np.asarray(x['ridge']['image']['cells_landmarks_mlnd'], np.float32)
    for x in (own, wanted, begun)
  )
  np.testing.assert_allclose(landmarks, now, atol=1e-3)
  assert np.abs(landmarks - first).max() > 0.02


def _with_untrained_tower(variables, config):
  assembly = assemble(config)
  method = assembly.method
  frozen = load_frozen(config, assembly.mesh, method.reads)
  return method.start(variables, frozen)


def test_only_labelled_examples_are_fitted_to(make_config):
  config = make_config()

  class Rows:
    ids = ('a', 'b', 'c')
    labels = (0, -1, 2)

  rows = ridge_fit._labelled(Rows(), 10, config)
  assert sorted(rows) == [0, 2]
  assert len(ridge_fit._labelled(Rows(), 1, config)) == 1
