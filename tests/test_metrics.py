"""Metrics against scikit-learn, with padding, unseen classes, empty label sets and any split into
batches.
"""

import jax
import numpy as np
import pytest
from optional_torch import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from molt_jax.evaluation.metrics import ClassificationMetrics, Ranking, auroc


def accumulate(logits_nk, label, *, multi_label, weight_n=None, batch_size=7):
  """Runs all rows through a jitted update, the last batch padded with NaN rows of weight zero."""
  n, k = logits_nk.shape
  weight_n = np.ones(n) if weight_n is None else weight_n
  pad = -n % batch_size
  logits_nk = np.concatenate([logits_nk, np.full((pad, k), np.nan)]).astype(np.float32)
  label = np.concatenate([label, np.ones((pad, *label.shape[1:]), label.dtype)])
  weight_n = np.concatenate([weight_n, np.zeros(pad)]).astype(np.float32)
  metrics, update = (
    ClassificationMetrics.empty(num_classes=k, multi_label=multi_label),
    jax.jit(ClassificationMetrics.update),
  )
  for i in range(0, n + pad, batch_size):
    rows = slice(i, i + batch_size)
    metrics = update(metrics, logits_nk[rows], label[rows], weight_n[rows])
  return metrics


def expected(truth, predicted, multi_label):
  """scikit-learn's scores; without those that its `zero_division=nan` says are not determined."""

  def f1(average):
    if np.isnan(f1_score(truth, predicted, average=average, zero_division=np.nan)):
      return None
    return f1_score(truth, predicted, average=average, zero_division=0)

  scores = {
    'accuracy': accuracy_score(truth, predicted),
    'f1_micro': f1('micro'),
    'f1_macro': f1('macro'),
    'f1_samples': f1('samples') if multi_label else accuracy_score(truth, predicted),
    'f1_weighted': f1('weighted'),
  }
  return {name: value for name, value in scores.items() if value is not None}


def assert_equals(metrics, reference, loss):
  computed = metrics.compute()
  assert list(computed) == [*reference, 'loss']
  np.testing.assert_allclose(
    [computed[name] for name in reference], list(reference.values()), rtol=1e-6, atol=1e-12
  )
  np.testing.assert_allclose(computed['loss'], loss, rtol=1e-5)


@pytest.mark.parametrize('n, k', [(1, 3), (50, 3), (60, 40)])
@pytest.mark.parametrize('seed', range(3))
def test_single_label_equals_scikit_learn(n, k, seed):
  rng = np.random.default_rng(seed)
  logits_nk, label_n = rng.normal(size=(n, k)), rng.integers(0, max(k - 1, 1), n)
  logits_nk[np.arange(n), label_n] += 1
  loss = torch.nn.functional.cross_entropy(torch.tensor(logits_nk), torch.tensor(label_n)).item()
  assert_equals(
    accumulate(logits_nk, label_n, multi_label=False),
    expected(label_n, logits_nk.argmax(1), False),
    loss,
  )


@pytest.mark.parametrize('n, k, rate', [(1, 3, 0.5), (50, 4, 0.3), (40, 6, 0.05), (10, 3, 0.0)])
@pytest.mark.parametrize('seed', range(3))
def test_multi_label_equals_scikit_learn(n, k, rate, seed):
  rng = np.random.default_rng(seed)
  logits_nk, label_nk = rng.normal(size=(n, k)) - 1, (rng.random((n, k)) < rate).astype(np.int32)
  loss = torch.nn.functional.binary_cross_entropy_with_logits(
    torch.tensor(logits_nk), torch.tensor(label_nk, dtype=torch.float64)
  ).item()
  assert_equals(
    accumulate(logits_nk, label_nk, multi_label=True),
    expected(label_nk, (logits_nk > 0).astype(int), True),
    loss,
  )


@pytest.mark.parametrize('multi_label', [False, True])
def test_rows_of_weight_zero_do_not_count_and_batches_add_up(multi_label):
  rng = np.random.default_rng(0)
  logits_nk, keep_n = rng.normal(size=(30, 4)), rng.random(30) < 0.6
  label = rng.integers(0, 2, (30, 4)) if multi_label else rng.integers(0, 4, 30)
  masked = accumulate(
    logits_nk, label, multi_label=multi_label, weight_n=keep_n.astype(np.float32)
  ).compute()
  chosen = [
    accumulate(logits_nk[keep_n][part], label[keep_n][part], multi_label=multi_label, batch_size=5)
    for part in (slice(9), slice(9, None))
  ]
  assert masked == pytest.approx(chosen[0].merge(chosen[1]).compute(), rel=1e-6)


@pytest.mark.parametrize('multi_label', [False, True])
def test_no_example_gives_no_score(multi_label):
  empty = ClassificationMetrics.empty(num_classes=3, multi_label=multi_label)
  assert empty.compute() == {}
  label = np.ones((4, 3), int) if multi_label else np.ones(4, int)
  without = accumulate(np.zeros((4, 3)), label, multi_label=multi_label, weight_n=np.zeros(4))
  assert without.compute() == {}


# Truths and predictions of three examples and two classes; whether there is an F1 at all.
NOTHING, SOMETHING = np.zeros((3, 2), int), np.array([[0, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize(
  ('truth', 'predicted', 'there'),
  [
    (NOTHING, NOTHING, False),
    (NOTHING, SOMETHING, True),
    (SOMETHING, NOTHING, True),
    (SOMETHING, SOMETHING, True),
  ],
)
def test_label_sets_without_any_label_have_no_f1(truth, predicted, there):
  computed = accumulate(np.where(predicted, 3.0, -3.0), truth, multi_label=True).compute()
  reference = expected(truth, predicted, True)
  assert {name: computed[name] for name in reference} == pytest.approx(reference)
  assert set(computed) == {*reference, 'loss'} and ('f1_macro' in computed) == there
  assert ('f1_weighted' in computed) == there


def test_nothing_in_nothing_out_of_a_ranking():
  ranking = Ranking(multi_label=False)
  assert ranking.compute() == []
  ranking.observe(np.zeros((2, 4, 2)), np.array([0, 1, 0, 1]), np.array([[0] * 4, [1, 0, 1, 0]]))
  assert ranking.compute() == [None, None]  # No example; examples of one class.


def expected_auroc(score_nk, true_nk):
  """scikit-learn's, class by class, where it is defined."""
  areas = [
    roc_auc_score(true_nk[:, k], score_nk[:, k])
    for k in range(true_nk.shape[1])
    if 0 < true_nk[:, k].sum() < len(true_nk)
  ]
  return pytest.approx(np.mean(areas), rel=1e-9) if areas else None


@pytest.mark.parametrize(
  'n, k, rate', [(1, 3, 0.5), (50, 4, 0.3), (40, 6, 0.05), (10, 3, 0.0), (10, 3, 1.0)]
)
@pytest.mark.parametrize('seed', range(3))
def test_auroc_of_labels_equals_scikit_learn(n, k, rate, seed):
  rng = np.random.default_rng(seed)
  score_nk, true_nk = (
    rng.normal(size=(n, k)).round(1),
    rng.random((n, k)) < rate,
  )  # Rounded: there are ties.
  assert auroc(score_nk, true_nk) == expected_auroc(score_nk, true_nk)
  if n == 50:
    assert auroc(score_nk, true_nk) == pytest.approx(
      roc_auc_score(true_nk, score_nk, average='macro'), rel=1e-9
    )


@pytest.mark.parametrize('k', [3, 20])
def test_auroc_of_classes_equals_scikit_learn(k):
  rng = np.random.default_rng(0)
  label_n, logits_nk = (
    rng.integers(0, k - (k > 3), 60),
    rng.normal(size=(60, k)),
  )  # Of 20 classes the last is unseen.
  probability_nk = np.exp(logits_nk) / np.exp(logits_nk).sum(axis=1, keepdims=True)
  true_nk = label_n[:, None] == np.arange(k)
  assert auroc(probability_nk, true_nk) == expected_auroc(probability_nk, true_nk)
  if k == 3:
    assert auroc(probability_nk, true_nk) == pytest.approx(
      roc_auc_score(label_n, probability_nk, multi_class='ovr'), rel=1e-9
    )


@pytest.mark.parametrize('multi_label', [False, True])
def test_a_ranking_is_that_of_all_batches_and_of_the_rows_that_count(multi_label):
  rng = np.random.default_rng(0)
  logits_cnk, weight_cn = (
    rng.normal(size=(2, 30, 4 if multi_label else 2)),
    (rng.random((2, 30)) < 0.7).astype(np.float32),
  )
  label = rng.integers(0, 2, (30, 4) if multi_label else 30)
  ranking = Ranking(multi_label=multi_label)
  for part in (slice(12), slice(12, 30)):
    ranking.observe(logits_cnk[:, part], label[part], weight_cn[:, part])
  wanted = []
  for logits_nk, weight_n in zip(logits_cnk, weight_cn, strict=True):
    live = weight_n > 0
    wanted.append(
      roc_auc_score(
        label[live], logits_nk[live] if multi_label else logits_nk[live, 1] - logits_nk[live, 0]
      )
    )
  assert ranking.compute() == pytest.approx(wanted, rel=1e-9)
