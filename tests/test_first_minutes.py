"""What a person sees in the first minutes: commands, progress, names, harm, notebooks."""

import time

import numpy as np
import pytest
import scipy.stats

from molt_jax import commands
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import modalities
from molt_jax.evaluation import harm, notebook, records
from molt_jax.runtime import console
from molt_jax.training import announcing


def test_molt_alone_says_what_there_is_and_how_to_begin(capsys):
  assert commands.main([]) == 0
  out = capsys.readouterr().out
  assert 'molt fit products.csv --workdir=' in out and 'when one of them is missing' in out
  assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
  ('used', 'flags'),
  [
    ('image,text', "--image=photo.jpg --text='some words'"),
    ('text', "--text='some words'"),
    ('image', '--image=photo.jpg'),
  ],
)
def test_a_run_ends_with_commands_that_can_be_pasted(used, flags, tmp_path):
  config = CLASSIFIER.load('quickstart', {'dataset.modalities': used})
  _, evaluate, predict, report = announcing.what_next(config, tmp_path / 'a run')
  folder = f"--workdir='{tmp_path / 'a run'}'"
  assert predict.strip() == f'molt predict {folder} {flags}'
  assert report.strip() == f'molt report {folder}'
  assert ('--missing_rate' in evaluate) == (',' in used)


# ---- Progress ------------------------------------------------------------------------------------


def test_what_is_done_first_is_not_in_the_rate_and_compiling_is_said(monkeypatch, capsys):
  now = [time.monotonic() + 1000.0]
  monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
  monkeypatch.setattr(console, 'COMPILE_SECONDS', 0.0)
  with console.progress('training', 100, 'steps', compiles=True) as bar:
    until = time.monotonic() + 5
    while 'compiling' not in (said := capsys.readouterr().err) and time.monotonic() < until:
      time.sleep(0.01)
    assert said == 'training: compiling, once\n'
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    bar.advance(1)
    assert capsys.readouterr().err == 'training: 1/100 steps\n'
    now[0] += 10.0
    bar.advance(20)
    assert 'training: 21/100 steps, 2 steps/s, 0:39 left' in capsys.readouterr().err
    now[0] += 70.0
    bar.exclude(60.0)
    bar.advance(20)
    assert '41/100 steps, 2 steps/s, 0:29 left' in capsys.readouterr().err


def test_a_bar_that_is_soon_begun_says_nothing_of_compiling(monkeypatch, capsys):
  monkeypatch.setattr(console, 'COMPILE_SECONDS', 0.05)
  with console.progress('training', 100, 'steps', compiles=True) as bar:
    bar.advance(1)
  time.sleep(0.1)
  assert capsys.readouterr().err == ''


# ---- Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('none_absent', 'complete'),
    ('text_absent', 'without text'),
    ('missing_text_0.3', '30 % without text'),
    ('missing_both_0.7', '70 % without text or image'),
  ],
)
def test_conditions_have_names_that_people_read(name, words):
  assert modalities.in_words(name) == words


# ---- Harm ----------------------------------------------------------------------------------------


def _predictions(right_cn, present_nm):
  count = len(present_nm)
  label = np.zeros(count, np.int32)
  p_cn = np.where(right_cn, 0.9, 0.1)
  keep = {'none_absent': [1, 1], 'text_absent': [1, 0], 'image_absent': [0, 1]}
  counted_cn = np.array([(present_nm & np.array(kept, bool)).any(axis=1) for kept in keep.values()])
  return records.Predictions(
    split='test',
    step=1,
    config_hash='',
    seed=0,
    of=count,
    conditions=list(keep),
    class_names=['a', 'b'],
    ids=[str(n) for n in range(count)],
    label=label,
    present_nm=present_nm,
    counted_cn=counted_cn,
    probability_cnk=np.stack([p_cn, 1 - p_cn], axis=-1).astype(np.float32),
    loss_cn=np.zeros((3, count), np.float32),
  )


def test_a_modality_that_does_harm_is_pointed_out_with_its_counts():
  rng = np.random.default_rng(0)
  present_nm = np.ones((60, 2), bool)
  present_nm[51:] = rng.permutation([[True, False]] * 5 + [[False, True]] * 4)
  both, text = np.ones(60, bool), np.ones(60, bool)
  both[:9], text[9:12] = (
    False,
    False,
  )  # Text alone is right 9 times where both are not; 3 times not.
  (one,) = harm.found(_predictions(np.stack([both, both, text]), present_nm))
  assert one[:4] == ('image', 51, 9, 3)
  assert one.p == pytest.approx(scipy.stats.binomtest(3, 12).pvalue)
  assert one.line() == (
    'the image may do harm: of 51 complete examples, 9 are right by the text alone and wrong by '
    'both, 3 the other way round (McNemar p = 0.15, which chance may explain)'
  )
  assert harm.found(_predictions(np.stack([both, both, both]), present_nm)) == []
  unread = _predictions(np.stack([both, both, text]), present_nm)
  unread.counted_cn[1, 20:25] = False  # Their images are there and cannot be read.
  (one,) = harm.found(unread)
  assert one[:4] == ('image', 46, 9, 3)


@pytest.mark.parametrize(('lost', 'won'), [(1, 0), (5, 5), (30, 9), (200, 131), (40_000, 40_500)])
def test_mcnemar_is_the_test_of_a_fair_coin(lost, won):
  assert harm.mcnemar(lost, won) == pytest.approx(scipy.stats.binomtest(won, lost + won).pvalue)


# ---- Notebooks -----------------------------------------------------------------------------------


def test_a_notebook_shows_tables_in_which_all_is_text():
  answer = notebook.Answer(
    labels=[{'label': '<b>x</b>', 'probability': 0.75}], image=False, text=True
  )
  assert answer == dict(answer) and '&lt;b&gt;x' in answer._repr_html_()
  assert '75.0 %' in answer._repr_html_() and 'from text' in answer._repr_html_()
  empty = notebook.Answer(labels=[], image=False, text=False, error='broken')
  shown = notebook.Answers([answer] * 30 + [empty])._repr_html_()
  assert shown.count('<tr>') == 21 and '31 examples' in shown
  assert '(broken)' in notebook.Answers([empty])._repr_html_()
  scores = {'num_examples': 5, 'accuracy': 0.5}
  evaluation = {
    'split': 'test',
    'results': {'none_absent': scores, 'text_absent': {'num_examples': 0}},
  }
  shown = notebook.Scores(evaluation)._repr_html_()
  assert 'complete</td><td>5</td><td>50.0' in shown and 'without text</td><td>0</td><td>-' in shown
