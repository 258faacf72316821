"""Prediction sets, what each modality brought, and audits, of a run."""

import csv
import itertools
import json
import math
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import molt_jax
from molt_jax import commands, evaluate, predict, report, train
from molt_jax.data.modalities import PATTERNS
from molt_jax.errors import UserError
from molt_jax.evaluation import calibration, contributions, harm, prediction_sets, records, trained
from molt_jax.evaluation.prediction_sets import Calibration

EVERY = np.ones(2, bool)


# ---- Thresholds ---------------------------------------------------------------------------------


def make(p_nk, label_n, *, pattern=0, names=None, multi_label=False):
  """A calibration of examples of one missing pattern."""
  if multi_label:
    row_m, label_m = np.nonzero(label_n)
    before_m = np.zeros(len(row_m))
  else:
    row_m, label_m = np.arange(len(p_nk)), label_n
    before_m = prediction_sets.likelier(p_nk)[row_m, label_m]
  return Calibration(
    checkpoint='x',
    class_names=names or [f'c{k}' for k in range(p_nk.shape[1])],
    multi_label=multi_label,
    chosen=[],
    prior_k=np.full(p_nk.shape[1], 0.1),
    pattern_m=np.full(len(row_m), pattern, np.int8),
    example_m=row_m.astype(np.int32),
    label_m=label_m.astype(np.int32),
    probability_m=p_nk[row_m, label_m],
    before_m=before_m,
  )


def draw(rng, count, classes=8, *, strength=1.5):
  """Probabilities of a model that is right about half of the time, and labels."""
  label_n = rng.integers(0, classes, count)
  logits_nk = rng.normal(0, 1, (count, classes))
  logits_nk[np.arange(count), label_n] += strength
  p_nk = np.exp(2 * logits_nk)
  return p_nk / p_nk.sum(axis=1, keepdims=True), label_n


@pytest.mark.parametrize('kind', prediction_sets.KINDS)
def test_a_set_is_what_the_sorted_scores_of_one_example_at_a_time_say(kind):
  rng = np.random.default_rng(0)
  p_nk, label_n = draw(rng, 57)
  rule = make(p_nk, label_n).rule(0.8, kind)

  def score(p_k, k):
    ranked = sorted(range(len(p_k)), key=lambda j: -p_k[j])
    likelier = ranked[: ranked.index(k)]
    mass = math.fsum(p_k[j] for j in likelier)
    return 0.0 if not likelier else mass if kind == 'adaptive' else 1 - p_k[k]

  known = sorted(score(p_k, k) for p_k, k in zip(p_nk, label_n, strict=True))
  threshold = known[math.ceil(58 * 0.8) - 1]
  new_nk, _ = draw(rng, 20)
  found_nk = rule.members(new_nk, np.tile(EVERY, (20, 1)))
  wanted_nk = [[score(p_k, k) <= threshold + 1e-12 for k in range(8)] for p_k in new_nk]
  assert found_nk.tolist() == wanted_nk and found_nk.any(axis=1).all()


@pytest.mark.parametrize('kind', prediction_sets.KINDS)
def test_sets_hold_the_truth_as_often_as_promised(kind):
  """The mean over draws of calibration and test examples, each of 200; its error is 0.3 %."""
  rng, shares = np.random.default_rng(1), []
  for _ in range(150):
    known, new = draw(rng, 200), draw(rng, 200)
    members_nk = make(*known).rule(0.9, kind).members(new[0], np.tile(EVERY, (200, 1)))
    shares.append(members_nk[np.arange(200), new[1]].mean())
  assert 0.89 < np.mean(shares) < 0.915


def test_each_missing_pattern_has_its_threshold_and_too_few_examples_exclude_nothing():
  rng = np.random.default_rng(2)
  strong, weak = make(*draw(rng, 300, strength=3)), make(*draw(rng, 300, strength=0.2), pattern=1)
  names = ('pattern_m', 'example_m', 'label_m', 'probability_m', 'before_m')
  both = {name: np.concatenate([getattr(x, name) for x in (strong, weak)]) for name in names}
  rule = Calibration('x', strong.class_names, False, [], strong.prior_k, **both).rule(0.9)
  p_nk, _ = draw(rng, 50)
  sizes = [rule.members(p_nk, np.tile(keep, (50, 1))).sum(axis=1) for keep in PATTERNS]
  assert (sizes[0] <= sizes[1]).all() and sizes[0].mean() + 1 < sizes[1].mean()
  assert (sizes[2] == 8).all()  # No text-only example is known.
  # Of eight examples, the worst is no bound for nine in ten; of nine it is.
  p_nk, label_n = draw(rng, 9)
  for count, least in ((8, True), (9, False)):
    threshold = make(p_nk[:count], label_n[:count]).rule(0.9).threshold_vk[0, 0]
    assert (threshold == prediction_sets.EVERY_LABEL) == least
  nothing = rule.members(np.full((1, 8), np.nan), np.zeros((1, 2), bool))
  assert not nothing.any()


def test_labels_of_which_there_are_enough_each_keep_the_promise_and_the_rest_share_one():
  rng = np.random.default_rng(3)
  held_k, true_k, shares = np.zeros(4), np.zeros(4), []
  for _ in range(120):
    true_nk = rng.random((500, 4)) < np.array([0.3, 0.2, 0.4, 0.005])
    p_nk = 1 / (1 + np.exp(-rng.normal(np.where(true_nk, [2.0, 0.5, 1.0, 0.0], -1.0), 1.0)))
    rule = make(p_nk[:250], true_nk[:250], multi_label=True).rule(0.9)
    members_nk, new_nk = rule.members(p_nk[250:], np.tile(EVERY, (250, 1))), true_nk[250:]
    held_k += (members_nk & new_nk).sum(axis=0)
    true_k += new_nk.sum(axis=0)
  assert ((held_k / true_k)[:3] > 0.89).all() and ((held_k / true_k)[:3] < 0.925).all()
  # One threshold for all bounds the mean share of an example's labels that its set lacks.
  for _ in range(200):
    example_m, score_m = np.arange(400) // 2, rng.random(400) ** 2
    threshold = prediction_sets.risk_threshold(score_m, example_m, 0.9)
    lacking = (score_m.reshape(-1, 2) > threshold).mean(axis=1).sum()
    assert (lacking + 1) / 201 <= 0.1 + 1e-9
    below = (score_m.reshape(-1, 2) >= threshold).mean(axis=1).sum()
    assert (below + 1) / 201 > 0.1
    shares.append(threshold)
  assert min(shares) > 0.7
  assert prediction_sets.risk_threshold(np.zeros(4), np.arange(4), 0.9) == math.inf


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    ({'coverage': 1.0}, "coverage: '1.0' is not legal; give a number between 0 and 1"),
    ({'coverage': True}, "coverage: 'True' is not legal"),
    ({'coverage': 0.9, 'kind': 'best'}, "kind of sets: 'best' is not legal"),
    ({'coverage': 0.9, 'kind': 'adaptive'}, 'an example can have several'),
  ],
)
def test_what_is_no_promise_is_one_line(how, words):
  known = make(np.full((3, 2), 0.5), np.ones((3, 2), bool), multi_label=True)
  with pytest.raises(UserError, match=words):
    known.rule(**how)


# ---- Of a run -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """A run of a few steps, whose programs other tests share."""
  config = make_tiny_config()
  config.train.epochs = 0.5
  workdir = tmp_path_factory.mktemp('answered') / 'run'
  train.train(config, workdir)
  return workdir


@pytest.fixture(scope='module')
def model(run):
  return molt_jax.load(run)


def test_training_calibrates_and_another_checkpoint_does_so_anew(run, tmp_path, capsys):
  written = Calibration.load(run / calibration.CALIBRATION)
  opened = trained.open(run)
  assert written.checkpoint == calibration.checkpoint_digest(opened.meta)
  # 12 validation examples, of which one has no image and one no text.
  assert written.counts() == [10, 11, 11]
  labels = [16, 16, 16]  # Of training.
  assert written.prior_k == pytest.approx((np.array(labels) + 1) / 51)
  copy = shutil.copytree(run, tmp_path / 'copy')
  stale = Calibration.load(copy / calibration.CALIBRATION)
  object.__setattr__(stale, 'checkpoint', 'of another')
  stale.save(copy / calibration.CALIBRATION)
  again = molt_jax.load(copy).calibration
  assert (
    'is of another checkpoint: validation examples are answered anew' in capsys.readouterr().err
  )
  for name in ('pattern_m', 'example_m', 'label_m'):
    assert np.array_equal(getattr(again, name), getattr(written, name))
  assert again.probability_m == pytest.approx(written.probability_m, abs=1e-6)
  assert Calibration.load(copy / calibration.CALIBRATION).checkpoint == written.checkpoint


def test_predictions_have_sets(run, model, tmp_path, capsys):
  texts = ['a red square', 'the blue one', 'x']
  rule = model.calibration.rule(0.8)
  answers = model.predict(text=texts, top_k=3, coverage=0.8)
  for answer in answers:
    assert answer['coverage'] == 0.8 and answer['labels'][0]['label'] == answer['set'][0]
    p = {x['label']: x['probability'] for x in answer['labels']}
    p_1k = np.array([[p[name] for name in model.class_names]])
    (in_k,) = rule.members(p_1k, np.array([[False, True]]))
    assert set(answer['set']) == {
      n for n, there in zip(model.class_names, in_k, strict=True) if there
    }
  table = tmp_path / 'new.csv'
  table.write_text('text\n' + '\n'.join([*texts, '""']) + '\n')
  out = tmp_path / 'scored.csv'
  argv = [f'--workdir={run}', f'--table={table}', f'--out={out}', '--coverage=0.8']
  assert commands.main(['predict', *argv]) == 0
  with open(out, newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['set'] for row in rows] == ['|'.join(x['set']) for x in answers] + ['']
  assert [row['set_size'] for row in rows] == [str(len(x['set'])) for x in answers] + ['']
  model.predict_table(table, tmp_path / 'scored.parquet', coverage=0.8, adaptive=True)
  capsys.readouterr()
  assert commands.main(['predict', f'--workdir={run}', '--text=x', '--adaptive']) == 2
  assert 'error: --adaptive: it goes with --coverage' in capsys.readouterr().err


def test_an_evaluation_counts_sets_as_the_recorded_predictions_do(run, capsys):
  assert evaluate.main([f'--workdir={run}', '--coverage=0.7']) == 0
  assert 'threshold sets that promise 70 %' in capsys.readouterr().out
  results = json.loads((run / 'evaluation.json').read_text())['results']
  p = records.Predictions.load(run / records.PREDICTIONS)
  rule = Calibration.load(run / calibration.CALIBRATION).rule(0.7)
  for c, name in enumerate(p.conditions):
    rows = np.flatnonzero(p.counted_cn[c])
    members_nk = rule.members(p.probability_cnk[c, rows], p.present_nm[rows] & PATTERNS[c])
    held_n = members_nk[np.arange(len(rows)), p.label[rows]]
    found = results[name]['prediction_sets']
    assert found['coverage'] == pytest.approx(held_n.mean())
    assert found['mean_size'] == pytest.approx(members_nk.sum(axis=1).mean())
    of_classes = sum(x['examples'] * x['coverage'] for x in found['by_class'].values())
    assert of_classes == pytest.approx(held_n.sum())
  page = report.write([run]).read_text()
  assert '<h2>Prediction sets</h2>' in page
  assert 'from validation examples (10 complete, 11 image only, 11 text only)' in page


# ---- What each modality brought -----------------------------------------------------------------


def test_shares_are_the_mean_over_both_orders_and_sum_to_the_whole():
  rng = np.random.default_rng(4)
  value_vn, nothing_n = np.log(rng.random((3, 40))), np.log(rng.random(40))
  present_nm = PATTERNS[rng.integers(0, 3, 40)]
  found_nm = contributions.shares(value_vn, nothing_n, present_nm)
  for n, there in enumerate(present_nm):
    game = {(): nothing_n[n], (0,): value_vn[1, n], (1,): value_vn[2, n], (0, 1): value_vn[0, n]}
    players = [m for m in range(2) if there[m]]
    wanted = np.zeros(2)
    orders = list(itertools.permutations(players))
    for order in orders:
      for place, m in enumerate(order):
        before = tuple(sorted(order[:place]))
        wanted[m] += (game[tuple(sorted((*before, m)))] - game[before]) / len(orders)
    assert found_nm[n] == pytest.approx(wanted, abs=1e-12)
    assert found_nm[n].sum() == pytest.approx(game[tuple(players)] - nothing_n[n], abs=1e-12)


def test_a_label_that_hangs_on_the_text_is_the_text_s(make_predictions):
  """An exact posterior: the image says nothing, so that its answer is the prior."""
  rng, k = np.random.default_rng(5), 5
  p = make_predictions(classes=k, rows=90)
  prior_k = np.arange(1, k + 1) / 15
  text_nk = rng.dirichlet(np.full(k, 0.3), 90).astype(np.float32) * 0.98 + 0.004
  p.probability_cnk[:] = np.stack([text_nk, np.broadcast_to(prior_k, (90, k)), text_nk])
  found = contributions.explain(p, prior_k)
  share_nm = found.share_nm[found.complete_n]
  assert np.abs(share_nm[:, 1]).sum() > 0.95 * np.abs(share_nm).sum()
  result = contributions.summary(found)
  assert result['image']['helps'] == result['image']['hurts'] == 0
  assert sum(x['complete'] for x in contributions.by_class(found, p).values()) == result['complete']


def test_a_modality_that_hurts_is_named_with_its_rows(make_predictions):
  p = make_predictions(classes=2, rows=60)
  right_n, k = p.label[:, None] == np.arange(2), np.arange(60)
  both_n, text_n = k % 4 > 0, k % 12 != 8  # Text alone is right more often.
  for c, is_right_n in enumerate((both_n, both_n, text_n)):
    p.probability_cnk[c] = np.where(right_n == is_right_n[:, None], 0.8, 0.2)
  found = contributions.explain(p, np.array([0.5, 0.5]))
  result = contributions.summary(found)
  of = found.complete_n
  helps, hurts = (both_n & ~text_n)[of].sum(), (text_n & ~both_n)[of].sum()
  assert result['image'] == {
    'helps': helps,
    'hurts': hurts,
    'p': pytest.approx(result['image']['p']),
  }
  test = scipy.stats.binomtest(int(min(helps, hurts)), int(helps + hurts))
  assert result['image']['p'] == pytest.approx(test.pvalue)
  assert [(x.modality, x.won, x.lost) for x in harm.found(p)] == [('image', helps, hurts)]


def test_an_answer_is_explained_in_the_same_pass(run, model, tmp_path, monkeypatch, capsys):
  picture = tmp_path / 'red.png'
  Image.new('RGB', (20, 20), (200, 30, 30)).save(picture)
  given = {'image': [picture, None, picture], 'text': ['a red square', 'a red square', None]}
  plain, passes = model.predict(**given, top_k=3), []
  forward, inside = model._forward._of_patterns, model._forward
  monkeypatch.setattr(inside, '_of_patterns', lambda *x: (passes.append(1), forward(*x))[1])
  monkeypatch.setattr(inside, '_plain', None)
  answers = model.predict(**given, top_k=3, explain=True)
  assert passes == [1]
  monkeypatch.undo()
  for answer, same, modality in zip(answers, plain, ('both', 'text', 'image'), strict=True):
    found = answer.pop('explanation')
    for one, other in zip(answer['labels'], same['labels'], strict=True):
      assert one['label'] == other['label']
      assert one['probability'] == pytest.approx(other['probability'], abs=2e-6)
    assert found['label'] == answer['labels'][0]['label']
    whole = np.log(found['both']) - np.log(found['prior'])
    assert sum(found['shares'].values()) == pytest.approx(whole, abs=1e-5)
    if modality != 'both':
      missing = {'text': 'image', 'image': 'text'}[modality]
      assert found[missing] is None and found['shares'][missing] == 0
      assert found[modality] == pytest.approx(found['both'], abs=1e-6)
  argv = [f'--workdir={run}', f'--image={picture}', '--text=a red square', '--explain', '--occlude']
  assert commands.main(['predict', *argv]) == 0
  found = json.loads(capsys.readouterr().out)['explanation']
  assert [x['word'] for x in found['words']] == ['a', 'red', 'square']
  assert np.shape(found['regions']) == (4, 4)
  without = model.predict(image=picture, text='a square', top_k=3)['labels']
  p = next(x['probability'] for x in without if x['label'] == found['label'])
  assert found['words'][1]['weight'] == pytest.approx(np.log(found['both'] / p), abs=1e-4)
  assert predict.main([f'--workdir={run}', '--text=x', '--occlude']) == 2
  assert 'error: --occlude: it goes with --explain' in capsys.readouterr().err


def test_a_split_is_explained_on_one_page(run, tiny_table, tmp_path):
  text = (
    (tiny_table / 'test.csv').read_text().replace('a red square', '<script>red</script> one', 1)
  )
  table = tiny_table / 'hostile.csv'
  table.write_text(text)
  page = tmp_path / 'why.html'
  argv = [f'--workdir={run}', f'--table={table}', '--occlude=2', f'--out={page}']
  assert commands.main(['explain', *argv]) == 0
  shown = page.read_text()
  assert '<script' not in shown and '&lt;script&gt;' in shown and 'class="regions"' in shown
  found = json.loads((tmp_path / 'why.json').read_text())
  assert found['complete'] == 11
  with open(tmp_path / 'why.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 14
  complete = [row for row in rows if row['log_p_image'] and row['log_p_text']]
  for row in complete:
    whole = float(row['log_p_both']) - float(row['log_prior'])
    assert float(row['image_share']) + float(row['text_share']) == pytest.approx(whole, abs=1e-4)
  for name in ('both', 'image', 'text'):
    right = sum(int(row[f'right_{name}']) for row in complete)
    assert found['accuracy'][name] == pytest.approx(right / 11)


class _Output(NamedTuple):
  logits_bk: np.ndarray


def test_sets_of_several_labels_are_counted_label_by_label():
  rng = np.random.default_rng(6)
  label = (rng.random((40, 3)) < 0.4).astype(np.float32)
  logits_cbk = rng.normal(4 * label - 2, 1.0, (3, 40, 3))
  keep_bcm = np.broadcast_to(PATTERNS[None], (40, 3, 2))
  present = np.ones((40, 2), bool)
  present[3, 0] = present[5, 1] = False
  weight = np.ones(40)
  weight[39] = 0  # Padding.
  index = np.arange(40)
  batch = {'label': label, 'keep': keep_bcm, 'present': present, 'weight': weight, 'index': index}
  names = [f'{name}_absent' for name in ('none', 'text', 'image')]
  entries = calibration._Entries(names, multi_label=True)
  entries.observe(batch, _Output(logits_cbk))
  arrays = entries.arrays()
  assert arrays['example_m'].max() == 38 and set(arrays['pattern_m']) == {0, 1, 2}
  complete = arrays['pattern_m'] == 0
  assert not np.isin(arrays['example_m'][complete], (3, 5)).any()
  prior_k = calibration.prior([(0,), (0, 2), ()], 3, multi_label=True)
  assert prior_k == pytest.approx(np.array([3, 1, 2]) / 5)
  known = Calibration('x', ['a', 'b', 'c'], True, [], prior_k, **arrays)
  assert not list(known._faults())
  rule = known.rule(0.7)
  counts = calibration.SetScores(rule, names, ['a', 'b', 'c'])
  counts.observe(batch, _Output(logits_cbk))
  for c, found in enumerate(counts.results().values()):
    rows = np.flatnonzero((present & PATTERNS[c]).any(axis=1) & (weight > 0))
    p_nk = 1 / (1 + np.exp(-logits_cbk[c, rows]))
    members_nk = rule.members(p_nk, present[rows] & PATTERNS[c])
    true_nk = label[rows] > 0
    some_n = true_nk.any(axis=1)
    held_n = (members_nk & true_nk)[some_n].sum(axis=1) / true_nk[some_n].sum(axis=1)
    assert found['coverage'] == pytest.approx(held_n.mean())
    for k, name in enumerate('abc'):
      of_class = found['by_class'][name]
      assert of_class['examples'] == true_nk[:, k].sum()
      assert of_class['coverage'] == pytest.approx(members_nk[true_nk[:, k], k].mean())
