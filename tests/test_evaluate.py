"""Evaluation and prediction of a trained run: conditions, missing rate, files, leaks, agreement
with each other, mistakes.
"""

import csv
import json
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image

import molt_jax
from molt_jax import evaluate, predict, report, train
from molt_jax.data import datasets
from molt_jax.errors import UserError
from molt_jax.evaluation import records, scoring, trained
from molt_jax.evaluation import results as results_files
from molt_jax.runtime import console, logbook
from molt_jax.towers import loading
from molt_jax.training import loop


@pytest.fixture(scope='session')
def run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """A run that has learned the colours."""
  config = make_tiny_config()
  config.train.epochs, config.train.log_every = 6.0, 24
  workdir = tmp_path_factory.mktemp('evaluated') / 'run'
  train.train(config, workdir)
  return workdir


def results(run):
  return json.loads((run / 'evaluation.json').read_text())['results']


def test_it_has_learned_in_every_condition(run):
  for name, result in results(run).items():
    assert result['accuracy'] > 0.6, name


def test_evaluating_again_gives_the_numbers_of_the_training_run(run):
  before = results(run)
  (run / 'evaluation.json').unlink()
  assert evaluate.main([f'--workdir={run}', '--absent=none']) == 0
  assert evaluate.main([f'--workdir={run}', '--absent=text,image']) == 0
  after = results(run)
  for name, result in before.items():
    assert after[name] == pytest.approx(result, rel=1e-5), name


def test_missing_rate_zero_is_none_absent_and_one_of_text_is_text_absent(run):
  for rate, kind, same in ((0, 'both', 'none_absent'), (1, 'image', 'image_absent')):
    assert (
      evaluate.main(
        [f'--workdir={run}', '--absent=', f'--missing_rate={rate}', f'--missing_type={kind}']
      )
      == 0
    )
    got = results(run)[f'missing_{kind}_{rate}']
    if rate == 0:
      assert got == pytest.approx(results(run)[same], rel=1e-5)
    else:  # The protocol never takes a row's only modality; --absent does.
      assert got['num_examples'] == 14 and got['num_examples'] >= results(run)[same]['num_examples']


def test_recorded_predictions_give_the_scores_of_every_condition(run):
  assert (
    evaluate.main([f'--workdir={run}', '--missing_rate=0.3,1', '--missing_type=text,both']) == 0
  )
  recorded, wanted = records.Predictions.load(run / records.PREDICTIONS), results(run)
  for name, result in wanted.items():
    kind, _, rate = name.removeprefix('missing_').partition('_')
    got = (
      recorded.scores(name)
      if name in recorded.conditions
      else recorded.missing_rate(float(rate), kind)
    )
    assert got == pytest.approx({key: result[key] for key in got}), name
  assert list(recorded.conditions) == list(records.CONDITIONS) and len(wanted) > 6


def test_a_run_leaves_a_report_s_material(run):
  pairs = records.Pairs.load(run / records.PAIRS)
  assert pairs.plane_lnmp.shape[::2] == (2, 2) and pairs.held_out_lk.shape == (2, 16)
  assert (
    np.all(pairs.fitted_lk <= 1)
    and np.all(np.abs(pairs.held_out_lk) <= 1 + 1e-5)
    and np.nanmin(pairs.batch_lk) > 0.9
  )  # 4 pairs.
  assert not np.all(pairs.layer_weights_l == 1)
  page = report.write([run]).read_text()
  assert 'Not recorded' not in page and 'Nothing to show' not in page


def test_predict_agrees_with_evaluate_row_by_row(run):
  predictor = molt_jax.load(run)
  source = datasets.load_dataset(predictor.config).splits['test']
  table = pathlib.Path(predictor.config.dataset.path)
  rows = [source[i] for i in range(len(source))]
  names = [
    table / f'images/test_{i}.png' if row['image'] is not None else None
    for i, row in enumerate(rows)
  ]
  answers = predictor.predict(image=names, text=[row['text'] for row in rows], top_k=1)
  right = [
    answer['labels'][0]['label'] == predictor.class_names[row['label']]
    for answer, row in zip(answers, rows, strict=True)
  ]
  assert np.mean(right) == pytest.approx(results(run)['none_absent']['accuracy'])


def test_one_image_however_it_is_given(run, tmp_path):
  predictor = molt_jax.load(run)
  picture = Image.new('RGB', (40, 40), (200, 30, 30))
  picture.save(tmp_path / 'red.png')
  answers = [
    predictor.predict(image=given)
    for given in (tmp_path / 'red.png', str(tmp_path / 'red.png'), picture, np.asarray(picture))
  ]
  assert all(answer == answers[0] for answer in answers)
  assert answers[0]['labels'][0]['label'] == 'red' and (
    answers[0]['image'],
    answers[0]['text'],
  ) == (True, False)
  assert sum(label['probability'] for label in answers[0]['labels']) == pytest.approx(1, abs=1e-4)
  assert predictor.predict(text='a green square, number 3')['labels'][0]['label'] == 'green'


def test_a_row_does_not_depend_on_its_neighbours(run):
  predictor = molt_jax.load(run)
  alone = predictor.predict(text='a blue square, number 1', top_k=3)
  among = predictor.predict(text=['a red square', 'a blue square, number 1', 'x'], top_k=3)[1]
  for one, two in zip(alone['labels'], among['labels'], strict=True):
    assert one['label'] == two['label'] and one['probability'] == pytest.approx(
      two['probability'], abs=2e-6
    )


def test_an_absent_tower_is_neither_loaded_nor_run(run, monkeypatch):
  loaded = []
  load = loading.load_params
  monkeypatch.setattr(
    loading,
    'load_params',
    lambda path, *, modality, **k: (loaded.append(modality), load(path, modality=modality, **k))[1],
  )
  assert evaluate.main([f'--workdir={run}', '--absent=text']) == 0
  assert loaded == ['image']
  predictor = molt_jax.load(run)
  predictor.predict(text='red')
  assert loaded == ['image', 'text']


def test_an_absent_image_is_not_even_decoded(run, monkeypatch):
  from molt_jax.data import transforms

  def explode(*args, **kwargs):
    raise AssertionError('decoded')

  monkeypatch.setattr(transforms, 'decode', explode)
  assert evaluate.main([f'--workdir={run}', '--absent=image']) == 0


def test_the_predict_command_prints_one_json_object(run, capsys):
  assert predict.main([f'--workdir={run}', '--text=a red square', '--top_k=2']) == 0
  answer = json.loads(capsys.readouterr().out)
  assert len(answer['labels']) == 2 and answer['text'] and not answer['image']


@pytest.mark.parametrize(
  'command, arguments, words',
  [
    (predict.main, [], ['--image and --text', 'at least one']),
    (predict.main, ['--image=/nowhere.png'], ['/nowhere.png']),
    (predict.main, ['--image=NOT_AN_IMAGE'], ['not_an_image.txt']),
    (predict.main, ['--text=x', '--top_k=0'], ['--top_k', "'0'"]),
    (predict.main, ['--txt=x'], ['did you mean --text']),
    (evaluate.main, ['--split=dev'], ["'dev'", 'validation']),
    (evaluate.main, ['--absent=txt'], ["'txt'", 'text']),
    (evaluate.main, ['--absent='], ['--absent']),
    (evaluate.main, ['--missing_rate=70'], ["'70'", '0 to 1']),
    (evaluate.main, ['--missing_rate=0.5', '--missing_type=all'], ["'all'", 'both']),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, capsys, command, arguments, words):
  (tmp_path / 'not_an_image.txt').write_text('hello')
  arguments = [a.replace('NOT_AN_IMAGE', str(tmp_path / 'not_an_image.txt')) for a in arguments]
  assert command([f'--workdir={run}', *arguments]) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1
  for word in words:
    assert word in lines[0]


@pytest.mark.parametrize('command', [evaluate.main, predict.main])
def test_no_run_there(command, tmp_path, capsys):
  extra = ['--text=x'] if command is predict.main else []
  assert command([f'--workdir={tmp_path / "nothing"}', *extra]) == 2
  assert 'no run in' in capsys.readouterr().err


def test_predict_refuses_lists_of_unequal_length_and_nothing_at_all(run):
  predictor = molt_jax.load(run)
  with pytest.raises(UserError, match='2 images and 1 texts'):
    predictor.predict(image=[None, None], text=['x'])
  with pytest.raises(UserError, match='both image and text are absent'):
    predictor.predict()
  with pytest.raises(UserError, match='both image and text are absent'):
    predictor.predict(text='  ')
  assert predictor.predict(text=[]) == []


# ---- Scores of nothing ---------------------------------------------------------------------------


NO_EXAMPLE = {'num_examples': 0, 'both': 0, 'image_only': 0, 'text_only': 0}


@pytest.fixture(scope='module')
def textless(tmp_path_factory, make_tiny_config, tiny_table):
  """(run, what it said). Validation and test have no text, a seventh of train no label."""
  table = tmp_path_factory.mktemp('textless')
  (table / 'images').symlink_to(tiny_table / 'images')
  for split in ('train', 'validation', 'test'):
    header, *rows = csv.reader((tiny_table / f'{split}.csv').open(newline=''))
    if split == 'train':
      rows = [[*row[:2], row[2] if n % 7 else ''] for n, row in enumerate(rows)]
    else:
      rows = [[row[0], '', row[2]] for row in rows if row[0]]
    with (table / f'{split}.csv').open('w', newline='') as file:
      csv.writer(file).writerows([header, *rows])
  config, said = make_tiny_config(), []
  config.dataset.path, config.train.epochs, config.train.eval_every = str(table), 0.5, 3
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(console, 'log', said.append)
    train.train(config, table / 'run')
  return table / 'run', said


def test_a_condition_without_examples_has_no_score_anywhere(textless, capsys):
  folder, said = textless
  scored = results(folder)
  assert scored['image_absent'] == NO_EXAMPLE
  validated = [line for line in logbook.read(folder) if line['kind'] == 'validation']
  for line in validated:
    assert line['image_absent'] == NO_EXAMPLE and line['pairs'] == {}
    both = [line[name]['accuracy'] for name in ('none_absent', 'text_absent')]
    assert line['score'] == pytest.approx(np.mean(both))
  lines = [line for line in said if 'validation score' in line]
  assert len(lines) == 2 and all(
    line.endswith(
      '(accuracy, mean over complete, without text; no example to score: without image)'
    )
    for line in lines
  )
  page = report.write([folder]).read_text()
  assert page.count('no example') >= 3 and not re.search(r'>[^<]*\b(nan|None)\b', page)
  assert evaluate.main([f'--workdir={folder}', '--absent=image']) == 0
  (row,) = [line for line in capsys.readouterr().out.splitlines() if 'without image' in line]
  assert re.sub(r'[^\w.-]+', ' ', row).split() == ['without', 'image', '0']
  assert results(folder) == scored
  p = records.Predictions.load(folder / records.PREDICTIONS)
  assert p.scores('image_absent') == {'num_examples': 0}
  assert p.missing_rate(1.0, 'text') == pytest.approx(p.scores('none_absent'))


def test_rows_without_a_label_are_neither_right_nor_wrong(textless, tmp_path):
  folder = shutil.copytree(textless[0], tmp_path / 'run')
  assert evaluate.main([f'--workdir={folder}', '--split=train']) == 0
  source = datasets.load_dataset(trained.open(folder).config).splits['train']
  labelled_n = np.array(source.labels) >= 0
  p = records.Predictions.load(folder / records.PREDICTIONS)
  for name, result in results(folder).items():
    kept_n = (source.present & evaluate.KEPT[name.removesuffix('_absent')]).any(axis=1)
    assert result['num_examples'] == np.sum(kept_n & labelled_n) < np.sum(kept_n)
    assert p.scores(name) == pytest.approx({key: result[key] for key in p.scores(name)})


@pytest.mark.parametrize(
  ('found', 'multi_label', 'mean', 'said'),
  [
    ({'a_b': {'accuracy': 0.5}, 'c': {'accuracy': 1.0}}, False, 0.75, 'accuracy, mean over a b, c'),
    (
      {'a': {'accuracy': 0.5}, 'c': NO_EXAMPLE},
      False,
      0.5,
      'accuracy, mean over a; no example to score: c',
    ),
    (
      {'a': {'accuracy': 0.1, 'f1_micro': 0.5}, 'c': {'accuracy': 1.0}},
      True,
      0.5,
      'f1 micro, mean over a; no example to score: c',
    ),
    ({'a': NO_EXAMPLE, 'c': NO_EXAMPLE}, False, None, 'no example to score: a, c'),
  ],
)
def test_the_validation_score_is_the_mean_of_what_has_one(found, multi_label, mean, said):
  assert scoring.score(found, multi_label=multi_label) == mean
  assert scoring.describe_score(found, multi_label=multi_label) == said


@pytest.mark.parametrize(
  ('scores', 'kept', 'best'), [([None, None], [], -1.0), ([None, 0.0, None, 0.5, 0.4], [2, 4], 0.5)]
)
def test_a_validation_without_a_score_is_never_the_best(scores, kept, best, capsys):
  saved, logged = [], []
  run = types.SimpleNamespace(
    _best=-1.0,
    meta={},
    stopping=None,
    schedule=types.SimpleNamespace(
      total=9, validate_at=lambda step: True, save_at=lambda step: False
    ),
    refresh=lambda state: state,
    checkpoints=types.SimpleNamespace(
      check_finite=lambda state: None, save=lambda *a, kind: saved.append(kind)
    ),
  )
  log = types.SimpleNamespace(write=lambda kind, step, record: logged.append(record))
  found = []
  for step, value in enumerate(scores, start=1):
    record = {} if value is None else {'score': value}
    run.validate = lambda state, watch, record=record: (record, 'of nothing')
    loop.Loop._validate_and_save(run, None, None, log, None, step, False)
    found += [step] * saved.count('best')
    saved.clear()
  assert found == kept and run._best == best and len(logged) == len(scores)
  assert 'step 1/9: no validation score (of nothing)' in capsys.readouterr().err


def test_answers_that_are_no_numbers_are_refused_and_leave_the_scores(run, monkeypatch, capsys):
  restore, before = trained.restore_variables, (run / 'evaluation.json').read_text()
  monkeypatch.setattr(
    trained, 'restore_variables', lambda *a: jax.tree.map(lambda x: x * np.nan, restore(*a))
  )
  assert evaluate.main([f'--workdir={run}']) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: complete: ') and 'not finite' in error and 'damaged' in error
  assert (run / 'evaluation.json').read_text() == before


@pytest.mark.parametrize(
  'content', ['', '{"results": 1}', '[]', '{"results": {"none_absent": NaN}}']
)
def test_a_damaged_record_of_before_is_written_anew(run, tmp_path, content):
  (tmp_path / 'evaluation.json').write_text(content)
  found = {'a': {'loss': 1.0}}
  record = results_files.write(
    tmp_path,
    split='test',
    found={'results': found},
    meta=trained.open(run).meta,
    data={'digest': 'x', 'examples': 1},
  )
  text = (tmp_path / 'evaluation.json').read_text()
  assert record['results'] == json.loads(text)['results'] == found and 'NaN' not in text
