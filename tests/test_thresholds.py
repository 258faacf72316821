"""Thresholds of several labels: micro F1 is greatest there, for each missing pattern."""

import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from molt_jax.data.modalities import PATTERNS
from molt_jax.evaluation import prediction_files, records, table_predictions, thresholds
from molt_jax.evaluation.metrics import ClassificationMetrics


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30))
def test_no_other_threshold_has_a_greater_f1(pairs):
  p_m = np.array([(p + 1) / 10 for p, _ in pairs])
  true_m = np.array([true for _, true in pairs])
  found = thresholds.best(p_m, true_m)
  if not true_m.any():
    assert found == 0.5
    return
  score = f1_score(true_m, p_m > found, zero_division=0)
  for other in np.append(np.unique(p_m) - 1e-9, 0.999):
    assert score >= f1_score(true_m, p_m > other, zero_division=0) - 1e-12


def _multi_label(count=40, num_classes=3):
  rng = np.random.default_rng(0)
  logits_cnk = rng.normal(-1, 2, (3, count, num_classes))
  label_nk = (rng.random((count, num_classes)) < 0.2).astype(np.float32)
  present_nm = PATTERNS[rng.integers(0, 3, count)]
  keep_ncm = np.tile(PATTERNS, (count, 1, 1))
  return logits_cnk, label_nk, present_nm, keep_ncm


def test_each_missing_pattern_has_its_own():
  logits_cnk, label_nk, present_nm, keep_ncm = _multi_label()
  weight_n = np.ones(len(label_nk), np.float32)
  weight_n[-1] = 0.0
  fit = thresholds.Fit()
  batch = {'weight': weight_n, 'present': present_nm, 'keep': keep_ncm, 'label': label_nk}
  fit.observe(batch, types.SimpleNamespace(logits_bk=logits_cnk))
  found = fit.compute()
  for v, pattern_m in enumerate(PATTERNS):
    p, true = [], []
    for c in range(3):
      for n in range(len(label_nk) - 1):
        if (present_nm[n] & keep_ncm[n, c] == pattern_m).all():
          p.append(1 / (1 + np.exp(-logits_cnk[c, n])))
          true.append(label_nk[n] > 0)
    assert found[v] == thresholds.best(np.concatenate(p), np.concatenate(true))
  assert thresholds.of_run({}) == (0.5,) * 3 and thresholds.of_run({'thresholds': found}) == found


def test_scores_records_and_files_heed_them():
  logits_cnk, label_nk, present_nm, keep_ncm = _multi_label()
  present_nm = present_nm | PATTERNS[0]  # All are complete, so each condition is a pattern.
  chosen = [0.3, 0.6, 0.1]
  p_cnk = 1 / (1 + np.exp(-logits_cnk))
  predictions = records.Predictions(
    split='test',
    step=1,
    config_hash='',
    seed=0,
    of=len(label_nk),
    conditions=['none_absent', 'text_absent', 'image_absent'],
    class_names=['a', 'b', 'c'],
    ids=[str(n) for n in range(len(label_nk))],
    label=label_nk > 0,
    present_nm=present_nm,
    counted_cn=np.ones((3, len(label_nk)), bool),
    probability_cnk=p_cnk.astype(np.float32),
    loss_cn=np.zeros((3, len(label_nk)), np.float32),
    thresholds=chosen,
  )
  assert not list(predictions._faults())
  for c, name in enumerate(predictions.conditions):
    expected = f1_score(label_nk, p_cnk[c] > chosen[c], average='micro')
    assert predictions.scores(name)['f1_micro'] == pytest.approx(expected)
    least_n = np.full(len(label_nk), np.log(chosen[c] / (1 - chosen[c])), np.float32)
    total = ClassificationMetrics.empty(num_classes=3, multi_label=True).update(
      logits_cnk[c].astype(np.float32), label_nk, np.ones(len(label_nk), np.float32), least_n
    )
    assert total.compute()['f1_micro'] == pytest.approx(expected)
  # An image that cannot be read leaves a text, and the threshold of one.
  counted_cn = predictions.counted_cn.copy()
  counted_cn[1, 0] = False
  unread = dataclasses.replace(predictions, counted_cn=counted_cn)
  assert unread.read_nm[:2].tolist() == [[False, True], [True, True]]
  np.testing.assert_array_equal(unread.predicted[0, 0], predictions.probability_cnk[0, 0] > 0.1)
  np.testing.assert_array_equal(unread.predicted[0, 1:], predictions.predicted[0, 1:])
  p_nk = np.array([[0.2, 0.4, 0.7], [0.2, 0.4, 0.7], [0.2, 0.05, 0.7]], np.float32)
  part = table_predictions.Part(['1', '2', '3'], p_nk, PATTERNS, ['', '', ''])
  columns = prediction_files._columns(part, ['a', 'b', 'c'], chosen, None)
  assert columns['label'] == ['b|c', 'c', 'a|c']
  columns = prediction_files._columns(part, ['a', 'b', 'c|d'], chosen, None)
  assert columns['label'] == [r'b|c\|d', r'c\|d', r'a|c\|d']
