"""Audits of data: planted faults are found, models have not seen the row they judge."""

import csv
import pathlib
import shutil

import numpy as np
import pytest
import scipy.stats

from molt_jax import commands, train
from molt_jax.data import duplicates
from molt_jax.evaluation import data_faults, out_of_fold
from molt_jax.evaluation.out_of_fold import Examples, OutOfFold
from molt_jax.methods.parts.kernel_ridge import GAMMA


def make(count=300, classes=4, *, seed=0):
  """Examples whose image and text each show their class and more that they have in common."""
  rng = np.random.default_rng(seed)
  label_n = rng.integers(0, classes, count)
  common_nd = np.eye(classes)[label_n] * 2 + rng.normal(0, 1, (count, classes))
  pooled = {}
  for modality, tokens in (('image', 2), ('text', 3)):
    mixed = common_nd @ rng.normal(0, 1, (classes, tokens * 6)) + rng.normal(
      0, 0.3, (count, tokens * 6)
    )
    pooled[modality] = (mixed.reshape(count, 1, tokens, 6).astype(np.float16),)
  return pooled, label_n


def examples_of(pooled, label_n, classes=4, *, labelled_n=None, seed=0):
  labelled_n = np.ones(len(label_n), bool) if labelled_n is None else labelled_n
  target_nk = np.eye(classes)[label_n] * labelled_n[:, None]
  fold_n = out_of_fold.folds(np.arange(len(label_n)), 5, seed)
  return Examples(pooled, np.ones((len(label_n), 2), bool), target_nk, labelled_n, fold_n, False)


def auroc(suspects, kind, planted_n):
  """By ranks, of the scores of a kind."""
  score_n = np.full(len(planted_n), -np.inf)
  for suspect in suspects:
    if suspect.kind == kind:
      score_n[suspect.row] = suspect.score
  rank_n, count = scipy.stats.rankdata(score_n), planted_n.sum()
  above = rank_n[planted_n].sum() - count * (count + 1) / 2
  return above / (count * (len(planted_n) - count))


def test_answers_are_those_of_kernel_ridge_regression_without_the_fold():
  pooled, label_n = make(60)
  examples = examples_of({'image': pooled['image']}, label_n)
  models, rows = OutOfFold(examples), np.arange(60)
  landmarks = models._among(rows)
  feature_nm = models._features({'image': 1.0}, rows, landmarks)
  known = examples.target_nk.astype(np.float32), examples.labelled_n, examples.fold_n
  (found_nk,) = out_of_fold._without_folds(feature_nm, *known, (0.3,))
  x_nc = pooled['image'][0].reshape(60, -1).astype(np.float64)
  x_nc = (x_nc - x_nc.mean(axis=0)) / (x_nc.std(axis=0) + 1e-3 + 1e-3 * np.abs(x_nc.mean(axis=0)))
  kernel_nn = np.exp(-GAMMA * ((x_nc[:, None] - x_nc[None]) ** 2).mean(axis=-1))
  for fold in range(5):
    held, seen = examples.fold_n == fold, examples.fold_n != fold
    offset_k = examples.target_nk[seen].mean(axis=0)
    left = kernel_nn[np.ix_(seen, seen)] + 0.3 * np.eye(seen.sum())
    dual = np.linalg.solve(left, examples.target_nk[seen] - offset_k)
    wanted = kernel_nn[np.ix_(held, seen)] @ dual + offset_k
    assert found_nk[held] == pytest.approx(wanted, abs=2e-3)


def test_labels_of_a_fold_say_nothing_to_its_own_answers():
  """Without features an answer is the mean of the other folds' labels."""
  fold_n, label_n = np.arange(60) % 5, np.arange(60) % 2
  label_n[::20] = 2  # All in the first fold.
  target_nk, labelled_n = np.eye(3, dtype=np.float32)[label_n], np.arange(60) != 7
  known = target_nk, labelled_n, fold_n
  (found_nk,) = out_of_fold._without_folds(np.zeros((60, 4), np.float32), *known, (0.3,))
  for fold in range(5):
    wanted_k = target_nk[labelled_n & (fold_n != fold)].mean(axis=0)
    held = fold_n == fold
    np.testing.assert_allclose(found_nk[held], np.tile(wanted_k, (held.sum(), 1)), atol=1e-6)
  assert found_nk[0, 2] == 0


def test_planted_faults_are_found():
  pooled, label_n = make()
  rng = np.random.default_rng(1)
  torn, wrong, outlying, unknown = np.split(rng.permutation(300)[:50], [15, 30, 35])
  text = pooled['text'][0].copy()
  text[torn] = text[np.roll(torn, 1)]
  image = pooled['image'][0].copy()
  image[outlying] += rng.normal(0, 30, (5, *image.shape[1:])).astype(np.float16)
  given_n = label_n.copy()
  given_n[wrong] = (given_n[wrong] + rng.integers(1, 4, len(wrong))) % 4
  labelled_n = ~np.isin(np.arange(300), unknown)
  examples = examples_of({'image': (image,), 'text': (text,)}, given_n, labelled_n=labelled_n)
  suspects, p_vnk = data_faults.find(examples)
  assert p_vnk.sum(axis=2) == pytest.approx(1, abs=1e-5)
  is_wrong_n, is_torn_n = (np.isin(np.arange(300), rows) for rows in (wrong, torn))
  assert auroc(suspects, 'label', is_wrong_n) > 0.97
  assert auroc(suspects, 'pair', is_torn_n) > 0.9
  clean_n = ~np.isin(np.arange(300), np.concatenate([torn, wrong, outlying]))
  alarms = {(x.kind, x.row) for x in suspects if x.suspected}
  for kind in ('label', 'pair'):
    assert sum((kind, row) in alarms for row in np.flatnonzero(clean_n)) < 0.05 * clean_n.sum()
  assert {row for kind, row in alarms if kind == 'outlier'} >= set(outlying.tolist())
  guessed = [x for x in suspects if x.kind == 'unlabelled']
  assert {x.row for x in guessed} == set(unknown.tolist())
  assert np.mean([x.guess == label_n[x.row] for x in guessed]) > 0.8


def test_labels_of_rows_that_can_have_several_are_judged_one_by_one():
  p_nk = np.array([[0.9, 0.02, 0.5], [0.6, 0.4, 0.01]], np.float32)
  true_nk = np.array([[1, 1, 0], [1, 0, 0]], float)
  fold_n, both = np.zeros(2, int), np.ones((2, 2), bool)
  examples = Examples({}, both, true_nk, np.ones(2, bool), fold_n, True)
  first, second = data_faults.labels(p_nk, examples)
  assert (first.row, first.guess, first.suspected) == (0, 1, True)
  assert first.score == pytest.approx(np.log(0.98 / 0.02), rel=1e-4)
  assert (second.row, second.suspected) == (1, False)


@pytest.fixture(scope='module')
def run(tmp_path_factory, make_tiny_config, tiny_table) -> pathlib.Path:
  """A run on data with duplicates and a row without a label."""
  root = tmp_path_factory.mktemp('audited')
  shutil.copytree(tiny_table, root / 'data')
  lines = (root / 'data/train.csv').read_text().splitlines()
  lines[3] = lines[3].rpartition(',')[0] + ','
  (root / 'data/train.csv').write_text('\n'.join(lines) + '\n')
  shutil.copy(root / 'data/images/train_8.png', root / 'data/images/copy.png')
  with open(root / 'data/test.csv', 'a') as file:
    file.write('images/copy.png,"A blue square: number 8",blue\n')
    file.write('images/copy.png,"<b>another</b> text",blue\n')
  config = make_tiny_config()
  config.dataset.path, config.train.epochs = str(root / 'data'), 0.5
  train.train(config, root / 'run')
  return root / 'run'


def test_a_run_is_audited_on_one_page(run, capsys):
  assert commands.main(['audit', f'--workdir={run}', '--folds=3']) == 0
  assert capsys.readouterr().out.strip() == str(run / 'audit.html')
  with open(run / 'audit.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  twins = {(x['kind'], x['split'], x['row'], x['like']) for x in rows if x['like']}
  assert ('same example', 'test', 'test.csv:16', 'train.csv:10') in twins
  assert ('same image', 'test', 'test.csv:17', 'train.csv:10') in twins
  (guess,) = [x for x in rows if x['kind'] == 'unlabelled']
  assert guess['row'] == 'train.csv:4' and guess['guess'] in ('red', 'green', 'blue')
  page = (run / 'audit.html').read_text()
  assert '<b>another' not in page and '&lt;b&gt;another&lt;/b&gt; text' in page
  assert page.count('<article') >= 3 and '<script' not in page


class _Texts:
  """A source of texts alone."""

  def __init__(self, *texts):
    self._texts = texts

  def __len__(self):
    return len(self._texts)

  def read(self, n, *, image):
    return {'text': self._texts[n]}


def test_the_same_text_in_two_splits_is_named_unless_it_is_a_phrase():
  train_texts = _Texts('One.', 'two', 'what is it?', 'what is it?', 'what is it?', None)
  splits = {'test': _Texts('three', 'ONE', 'what is it'), 'train': train_texts}
  found = duplicates.find(splits, similar=False)
  across = [x for x in found if x.split != x.other_split]
  assert ('example', 'test', 1, 'train', 0) in across
