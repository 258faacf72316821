"""Records of an evaluation: no score of nothing, and no record of a damaged file."""

import dataclasses
import json
import re

import numpy as np
import pytest

from molt_jax.errors import UserError
from molt_jax.evaluation import records
from molt_jax.runtime import logbook, npz


@pytest.fixture
def record(make_predictions):
  """Function (multi_label) -> predictions; no example counts under the last condition."""

  def make(multi_label=False, **how):
    p = make_predictions(multi_label=multi_label, rows=20, **how)
    p.counted_cn[2] = False
    return p

  return make


@pytest.mark.parametrize('multi_label', [False, True])
def test_a_condition_without_examples_has_no_score(record, multi_label):
  p = record(multi_label)
  assert p.scores('image_absent') == {'num_examples': 0}
  assert p.influence('image_absent') is None
  assert np.isnan(p.class_f1('image_absent')).all()
  assert 'ece' not in p.calibration('image_absent') and p.worst('image_absent', 3) == []
  assert p.support('image_absent').sum() == 0 < p.support().sum()
  if not multi_label:
    assert p.confusion('image_absent').sum() == 0 and p.confusions('image_absent') == []
  assert p.scores('none_absent')['num_examples'] == 20 and 'ece' in p.calibration('none_absent')


def test_rows_that_lose_their_only_counted_view_leave_no_score(record):
  p = record()
  complete = p.present_nm.all(axis=1)
  p = dataclasses.replace(p, counted_cn=p.counted_cn & complete)  # The rest does not count at all.
  assert p.missing_rate(1.0, 'image') == {'num_examples': 0}
  assert p.missing_rate(0.0, 'image')['num_examples'] == complete.sum()


def test_label_sets_without_any_label_have_no_f1(record):
  p = record(True)
  nothing = dataclasses.replace(
    p, label=np.zeros_like(p.label), probability_cnk=np.zeros_like(p.probability_cnk)
  )
  assert nothing.scores('none_absent') == {'num_examples': 20, 'accuracy': 1.0}
  assert nothing.influence('none_absent') is None


def test_a_class_that_occurs_nowhere_has_no_f1(record):
  p = record()
  p = dataclasses.replace(
    p, label=np.minimum(p.label, 3), probability_cnk=p.probability_cnk * [1, 1, 1, 1, 0]
  )
  f1_k = p.class_f1('none_absent')
  assert np.isnan(f1_k[4]) and np.isfinite(f1_k[:4]).all()


def test_one_example_has_no_standard_error(record):
  p = record()
  p.counted_cn[0, 1:] = False
  assert p.scores('none_absent')['num_examples'] == 1 and p.influence('none_absent') is None


def test_confusions_are_the_matrix_in_order(record):
  p = record(classes=4)
  matrix_kk = p.confusion('none_absent')
  np.fill_diagonal(matrix_kk, 0)
  order = np.argsort(-matrix_kk, axis=None, kind='stable')
  counts = {divmod(int(i), 4): int(matrix_kk.ravel()[i]) for i in order}
  expected = [(*pair, count) for pair, count in counts.items() if count]
  assert p.confusions('none_absent') == expected


def test_what_is_saved_is_read(record, tmp_path):
  p = record(True)
  p.save(tmp_path / 'p.npz')
  again = records.Predictions.load(tmp_path / 'p.npz')
  for field in dataclasses.fields(p):
    np.testing.assert_array_equal(getattr(again, field.name), getattr(p, field.name))
  assert records.Predictions.load(tmp_path / 'nothing.npz') is None


def _with_json(content, **changes):
  return {**content, 'json': {**content['json'], **changes}}


# What is done to the content of the file: arrays by name, and 'json'.
DAMAGE = {
  'a step that is a list': lambda c: _with_json(c, step=[1]),
  'a step that is huge': lambda c: _with_json(c, step=10**40),
  'no class name': lambda c: _with_json(c, class_names=[]),
  'a class name that is a number': lambda c: _with_json(c, class_names=[1, 2, 3, 4, 5]),
  'a condition of another kind': lambda c: _with_json(c, conditions=['a', 'b', 'c']),
  'a condition twice': lambda c: _with_json(c, conditions=['none_absent'] * 3),
  'an id twice': lambda c: _with_json(c, ids=['a'] * 20),
  'a field too many': lambda c: _with_json(c, extra=1),
  'a field too few': lambda c: {k: v for k, v in c.items() if k != 'loss_cn'},
  'another shape': lambda c: {**c, 'probability_cnk': c['probability_cnk'][:, :3]},
  'another type': lambda c: {**c, 'probability_cnk': c['probability_cnk'].astype('U8')},
  'NaN': lambda c: {**c, 'probability_cnk': np.full_like(c['probability_cnk'], np.nan)},
  'more than 1': lambda c: {**c, 'probability_cnk': c['probability_cnk'] + 1},
  'a loss that is infinite': lambda c: {**c, 'loss_cn': c['loss_cn'] + np.inf},
  'a label beyond the classes': lambda c: {**c, 'label': c['label'] + 5},
  'an unlabelled row that counts': lambda c: {**c, 'label': c['label'] * 0 - 1},
  'labels of halves': lambda c: {**c, 'label': c['label'] / 2},
  'objects': lambda c: {**c, 'label': c['label'].astype(object)},
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_record_is_refused_in_one_line(record, tmp_path, damage):
  path = tmp_path / 'predictions.npz'
  record().save(path)
  with np.load(path) as saved:
    content = {name: saved[name] for name in saved.files}
  content['json'] = json.loads(content['json'].tobytes())
  content = DAMAGE[damage](content)
  content['json'] = np.frombuffer(json.dumps(content['json']).encode(), np.uint8)
  np.savez(path, **content)
  with pytest.raises(UserError, match='predictions.npz.* is damaged') as error:
    records.Predictions.load(path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('content', [b'', b'PK', b'x' * 100, b'\x93NUMPY\x01\x00'])
def test_a_file_that_is_no_record_is_refused_in_one_line(record, tmp_path, content):
  path = tmp_path / 'pairs.npz'
  path.write_bytes(content)
  with pytest.raises(UserError, match='pairs.npz.* is damaged'):
    records.Pairs.load(path)


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(record, tmp_path, monkeypatch):
  record().save(tmp_path / 'predictions.npz')
  monkeypatch.setattr(npz, 'MAX_BYTES', 1_000)
  with pytest.raises(UserError, match='more than 1,000'):
    records.Predictions.load(tmp_path / 'predictions.npz')


# ---- JSON without NaN ----------------------------------------------------------------------------


def test_json_has_no_nan():
  nan, inf = float('nan'), float('inf')
  value = {'a': nan, 'b': [1.5, inf, {'c': -inf, 'd': 2}], 'e': {'f': (nan,)}, 'g': 'NaN'}
  assert json.loads(logbook.to_json(value)) == {
    'b': [1.5, None, {'d': 2}],
    'e': {'f': [None]},
    'g': 'NaN',
  }


def test_a_log_has_no_nan_and_goes_on(tmp_path):
  log = logbook.Logbook(tmp_path, step=0)
  values = {'loss': float('nan'), 'pairs': {'gap': [0.5, float('inf')]}, 'none': {}}
  log.write('validation', 1, values)
  log.close()
  assert logbook.read(tmp_path) == [
    {'kind': 'validation', 'step': 1, 'pairs': {'gap': [0.5, None]}, 'none': {}}
  ]
  again = logbook.Logbook(tmp_path, step=1)
  again.write('train', 2, {'loss': 1.0})
  again.close()
  assert not re.search('NaN|Infinity', (tmp_path / 'metrics.jsonl').read_text())


@pytest.mark.parametrize('content', ['', 'x', '[1]', '{"a": ' * 5_000, '1' * 5_000, '"\\ud800"'])
def test_what_is_no_record_is_written_anew(tmp_path, content, capsys):
  path = tmp_path / 'evaluation.json'
  path.write_text(content)
  assert logbook.kept(path) == {} and 'written anew' in capsys.readouterr().err
  path.write_text('{"a": 1}')
  assert logbook.kept(path) == {'a': 1} and logbook.kept(tmp_path / 'nothing') == {}
