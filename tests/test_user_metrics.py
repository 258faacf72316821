"""Scores by scikit-learn's names are scikit-learn's."""

import sys
import types

import numpy as np
import pytest
from sklearn import metrics

from molt_jax.errors import UserError
from molt_jax.evaluation import user_metrics
from molt_jax.runtime import console


def _collected(logits_cnk, label, keep_ncm, present_nm, *, multi_label):
  """Collects in two batches, the second with an example of padding."""
  conditions = [f'c{n}' for n in range(len(logits_cnk))]
  found = user_metrics.Collector(conditions, multi_label=multi_label)
  count = len(label)
  for rows in (np.arange(count // 2), np.arange(count // 2, count)):
    batch = {
      'weight': np.ones(len(rows), np.float32),
      'present': present_nm[rows],
      'keep': keep_ncm[rows],
      'label': label[rows],
    }
    if rows[0]:
      batch['weight'][-1] = 0.0
    found.observe(batch, types.SimpleNamespace(logits_bk=logits_cnk[:, rows]))
  return found


def test_scores_of_one_label_are_scikit_learns(monkeypatch):
  rng = np.random.default_rng(0)
  logits_cnk, label = rng.normal(size=(2, 41, 3)), rng.integers(0, 3, 41)
  label[3] = -1  # Its label is not known.
  present_nm = np.ones((41, 2), bool)
  present_nm[:5, 0] = False
  keep_ncm = np.tile(np.array([[True, True], [True, False]]), (41, 1, 1))
  found = _collected(logits_cnk, label, keep_ncm, present_nm, multi_label=False)
  said = []
  monkeypatch.setattr(console, 'log', said.append)
  names = ['balanced_accuracy', 'roc_auc_ovr', 'neg_log_loss', 'top_k_accuracy', 'roc_auc']
  scores = found.compute(names)
  for c, rows in enumerate((np.r_[0:3, 4:40], np.r_[5:40])):
    logits_nk, true = logits_cnk[c, rows], label[rows]
    p_nk = np.exp(logits_nk) / np.exp(logits_nk).sum(axis=1, keepdims=True)
    expected = {
      'balanced_accuracy': metrics.balanced_accuracy_score(true, logits_nk.argmax(axis=1)),
      'roc_auc_ovr': metrics.roc_auc_score(true, p_nk, multi_class='ovr'),
      'neg_log_loss': -metrics.log_loss(true, p_nk),
      'top_k_accuracy': metrics.top_k_accuracy_score(true, p_nk, k=2),
    }
    assert scores[f'c{c}'] == pytest.approx(expected)
  assert len(said) == 1 and said[0].startswith('--metrics: roc_auc has no value for c0, c1: ')


def test_scores_of_label_sets_are_scikit_learns():
  rng = np.random.default_rng(1)
  logits_cnk = rng.normal(size=(1, 30, 4))
  label = rng.integers(0, 2, (30, 4)).astype(np.float32)
  keep_ncm, present_nm = np.ones((30, 1, 2), bool), np.ones((30, 2), bool)
  found = _collected(logits_cnk, label, keep_ncm, present_nm, multi_label=True)
  scores = found.compute(['f1_samples', 'average_precision'])['c0']
  logits_nk, true = logits_cnk[0, :29], label[:29]
  assert scores == pytest.approx(
    {
      'f1_samples': metrics.f1_score(true, logits_nk > 0, average='samples'),
      'average_precision': metrics.average_precision_score(true, logits_nk),
    }
  )


@pytest.mark.parametrize(
  ('name', 'hint'),
  [('balanced_acuracy', 'did you mean balanced_accuracy'), ('r2', 'give some of accuracy, ')],
)
def test_a_name_that_is_no_score_of_classifiers_is_one_line(name, hint):
  with pytest.raises(UserError, match=f'--metrics: {name!r} is no score of classifiers.*{hint}'):
    user_metrics.check(['accuracy', name])


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn.metrics', None)
  with pytest.raises(UserError, match=r"pip install 'molt_jax\[sklearn\]'"):
    user_metrics.check(['accuracy'])
