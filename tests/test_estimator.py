"""`MoltClassifier` has scikit-learn's habits."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

import molt_jax
from molt_jax.config import resolved
from molt_jax.errors import UserError

WORDS = ('rot', 'blau', 'weiß')


@pytest.fixture(scope='module')
def data():
  """(X, y): texts that name the class, a gap; classes are numbers."""
  y = np.arange(48) % 3 + 5
  texts = [f'{WORDS[k - 5]} {n}' for n, k in enumerate(y)]
  texts[7] = None
  return pd.DataFrame({'title': texts, 'price': 1.5}, index=range(100, 148)), y


@pytest.fixture(scope='module')
def estimator(make_tiny_config, tmp_path_factory):
  """One of tiny towers that trains for some steps."""
  config = make_tiny_config()
  config.train.epochs, config.dataset.modalities = 0.5, 'text'
  config.missing.views, config.missing.distill_weight = False, 0.0  # A smaller program.
  root = tmp_path_factory.mktemp('estimator')
  (root / 'tiny.py').write_text(
    'import json\nfrom molt_jax.config.classifier import CLASSIFIER\n\n'
    f'def get_config():\n  return CLASSIFIER.from_dict(json.loads({resolved.to_json(config)!r}))\n'
  )
  how = {'text': 'title', 'preset': str(root / 'tiny.py'), 'workdir': root / 'runs'}
  return molt_jax.MoltClassifier(**how)


def test_it_has_scikit_learns_habits(estimator, data):
  x, y = data
  assert is_classifier(estimator) and clone(estimator).get_params() == estimator.get_params()
  with pytest.raises(NotFittedError):
    estimator.predict(x)
  fitted = clone(estimator).fit(x, y)
  assert fitted.classes_.tolist() == [5, 6, 7] and fitted.classes_.dtype == y.dtype
  p_nk = fitted.predict_proba(x)
  assert p_nk.shape == (48, 3) and p_nk.sum(axis=1) == pytest.approx(1)
  assert p_nk[7] == pytest.approx([1 / 3] * 3)  # It has nothing to classify.
  assert np.array_equal(fitted.predict(x), fitted.classes_[p_nk.argmax(axis=1)])
  assert fitted.score(x, y) == np.mean(fitted.predict(x) == y)
  again = pickle.loads(pickle.dumps(fitted))
  assert np.array_equal(again.predict_proba(x), p_nk)
  assert len(list(estimator.workdir.iterdir())) == 1


@pytest.mark.slow
def test_clones_are_trained_in_folders_of_their_own(estimator, data, tmp_path):
  one = clone(estimator).set_params(workdir=tmp_path)
  scores = cross_val_score(one, *data, cv=2)
  assert scores.shape == (2,) and np.isfinite(scores).all()
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
  ('x', 'y', 'says'),
  [
    (np.zeros((2, 3)), [1, 2], 'X is an array'),
    (pd.DataFrame({'title': ['a', 'b']}), [1], r'y has the shape \[1\], X 2 rows'),
    (pd.DataFrame({'title': ['a', 'b']}), ['x', ' '], r'y\[1\] is empty'),
    (pd.DataFrame({'title': ['a', 'b']}), ['x', 'nan'], r'y\[1\]: label is a word'),
  ],
)
def test_a_mistake_is_one_line(estimator, x, y, says):
  with pytest.raises(UserError, match=says) as error:
    clone(estimator).fit(x, y)
  assert '\n' not in str(error.value)
