"""The report of run folders whose files were written by someone else: no markup, nothing from
elsewhere, no number that is none; what is not as it must be is one line.
"""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from molt_jax import report
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.evaluation import records
from molt_jax.reporting import checked, document, figures, svg

HOSTILE = (
  '',
  '<script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>',
  "' onload='alert(1)",
  '</style></svg><script>alert(1)</script>',
  'a$\\frac{1}{x}$_^%{',
  '$',
  '_hidden #0072b2 id="x" url(#y)',
  'a\x00b\x1b[31m\n\u202e\ud800\ufffe',
  '😀 שלום',
  'x' * 10_000,
  '3.14159 font-family: a;',
)


@pytest.fixture(scope='module')
def small(hostile, tmp_path_factory):
  """A small run with one label an example."""
  folder = tmp_path_factory.mktemp('small') / 'run'
  for seed in range(20):
    shutil.rmtree(folder, ignore_errors=True)
    hostile.write_run(folder, np.random.default_rng(seed))
    if not CLASSIFIER.from_json((folder / 'config.json').read_text()).dataset.multi_label:
      return folder
  raise AssertionError('no run with one label an example')


@pytest.fixture
def run(small, tmp_path):
  """A copy of it."""
  return shutil.copytree(small, tmp_path / 'run')


def change(path, function):
  """Rewrites a JSON file, or that in an npz file."""
  if path.suffix != '.npz':
    content = json.loads(path.read_text())
    path.write_text(json.dumps(function(content) or content))
    return
  with np.load(path) as saved:
    values = {name: saved[name] for name in saved.files}
  content = json.loads(values['json'].tobytes())
  values['json'] = np.frombuffer(json.dumps(function(content) or content).encode(), np.uint8)
  np.savez(path, **values)


def put(content, keys, value):
  *path, last = keys
  for key in path:
    content = content[key]
  content[last] = value


# File -> the places of its strings that a page shows, and how a string is made fit for it.
FIELDS = {
  'split': [
    ('evaluation.json', ['split']),
    (records.PREDICTIONS, ['split']),
    ('mistakes.json', ['split']),
  ],
  'sha256': [('evaluation.json', ['backbones', 'image', 'sha256'])],
  'tower path': [('evaluation.json', ['backbones', 'text', 'path'])],
  'version': [('evaluation.json', ['versions', 'jax'])],
  'versions': [('evaluation.json', ['versions'])],
  'class name': [(records.PREDICTIONS, ['class_names', 1])],
  'id': [('mistakes.json', ['examples', 'EACH', 'id'])],
  'text': [('mistakes.json', ['examples', 'EACH', 'text'])],
  'image': [('mistakes.json', ['examples', 'EACH', 'image'])],
  'device': [('run.json', ['device'])],
  'examples': [('run.json', ['examples'])],
  'pairs split': [(records.PAIRS, ['split'])],
  'config path': [('config.json', ['dataset', 'path'])],
  'tower config': [('config.json', ['backbones', 'image', 'path'])],
}


def spoil(run, field, text):
  """Puts the text into every place of the field."""
  value = {'examples': {text: 3}, 'versions': {text: text}}.get(field, text)
  for file, keys in FIELDS[field]:

    def function(content, keys=keys):
      rows = list(content['examples']) if 'EACH' in keys else [None]
      for row in rows:
        put(content, [row if key == 'EACH' else key for key in keys], value)

    change(run / file, function)


@pytest.fixture
def quick(monkeypatch):
  """Figures are not drawn: a page then takes milliseconds."""
  monkeypatch.setattr(document, 'svg', lambda draw, label, **how: '<svg role="img"></svg>')


def is_legal(field, text):
  """A path in the config must not be empty or hold a NUL: those are other mistakes."""
  return text and '\0' not in text or field not in ('config path', 'tower config')


@pytest.mark.parametrize('text', HOSTILE)
@pytest.mark.filterwarnings('error')
def test_no_string_of_any_field_becomes_markup(hostile, run, text, quick):
  for field in FIELDS:
    if is_legal(field, text):
      folder = shutil.copytree(run, run.with_name(field))
      spoil(folder, field, text)
      hostile.check_page(report.write([folder]).read_text(encoding='utf-8'))


@pytest.mark.parametrize('first', [0, 3, 6, 9])
@pytest.mark.filterwarnings('error')
def test_a_page_with_hostile_names_everywhere_is_drawn(hostile, run, first):
  for number, field in enumerate(FIELDS):
    text = HOSTILE[(first + number) % len(HOSTILE)]
    spoil(run, field, text if is_legal(field, text) else 'x')
  change(
    run / records.PREDICTIONS,
    lambda content: content.update(class_names=list(HOSTILE[first : first + 3])),
  )
  page = report.write([run]).read_text(encoding='utf-8')
  hostile.check_page(page)
  assert page.count('<svg') > 10 and len(page) < 2_000_000


@pytest.mark.parametrize(
  'name',
  [
    '<script>alert(1)<script>',
    '"onload="x',
    '$x_{$ [red]',
    '_',
    'a\x1b[31m\n\u202e',
    '\udcff',
    "'; rm",
  ],
)
@pytest.mark.filterwarnings('error')
def test_the_name_of_a_folder_is_text_too(hostile, run, name, quick, capfd):
  folders = [shutil.copytree(run, run.with_name('good')), shutil.copytree(run, run.with_name(name))]
  hostile.check_page(report.write(folders, run / 'both.html').read_text(encoding='utf-8'))
  assert report.main([f'--workdir={folders[1]}']) == 0
  hostile.check_page((folders[1] / 'report.html').read_text(encoding='utf-8'))
  assert capfd.readouterr().out.count('\n') == 1


class Texts(html.parser.HTMLParser):
  """Collects texts, and attributes by name."""

  def __init__(self, page):
    super().__init__()
    self.texts, self.attributes = [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.attributes += attrs

  def handle_data(self, data):
    self.texts.append(data)


@pytest.mark.parametrize(
  'name', ['a$b$', '_x', '#0072b2', 'id="q"', 'font-family:a', '3.14159', '$', '<b>&']
)
@pytest.mark.filterwarnings('error')
def test_a_class_is_called_by_its_own_name_in_every_drawing(name):
  matrix = figures.confusion(np.eye(2, dtype=int), [name, 'b'], title='')
  dots = figures.class_dots([(svg.name_of(name), {'a': 0.5})], x='')
  lines = figures.curves({name: ([1], [2]), 'b': ([1], [2])}, title='', x='', y='')
  for draw, count in ((matrix, 2), (dots, 1), (lines, 1)):
    found = Texts(svg.svg(draw, name, number=1))
    assert [text.strip() for text in found.texts].count(name) == count
    assert ('aria-label', name) in found.attributes


# ---- Pictures ------------------------------------------------------------------------------------


def encoded(kind, size=(8, 6), as_kind=None):
  buffer = io.BytesIO()
  Image.new('RGB', size, 'red').save(buffer, kind)
  content = base64.b64encode(buffer.getvalue()).decode()
  return f'data:image/{as_kind or kind.lower()};base64,{content}'


@pytest.mark.parametrize(
  ('url', 'there'),
  [
    (encoded('PNG'), True),
    (encoded('JPEG'), True),
    (encoded('WEBP'), True),
    (encoded('GIF'), False),
    (encoded('PNG', as_kind='svg+xml'), False),
    (encoded('PNG', as_kind='jpeg'), False),
    (encoded('PNG', size=(2_000, 2)), False),
    (encoded('PNG')[:-40], False),
    (encoded('PNG') + '\n', False),
    (encoded('PNG').replace('data:', 'DATA:'), False),
    ('https://example.com/x.png', False),
    ('data:image/png;base64,', False),
    ('data:image/png;base64,AAAA" onerror="x', False),
    ('data:image/png;base64,' + 'A' * 1_000_000, False),
    ('data:text/html;base64,PGI+', False),
    ('x', False),
  ],
)
def test_a_picture_is_a_small_one_of_a_known_kind_or_left_out(run, quick, url, there):
  assert checked.picture(url) == (url if there else None)
  change(
    run / 'mistakes.json',
    lambda content: (
      [put(content, ['examples', row, 'image'], url) for row in content['examples']] and None
    ),
  )
  page = Texts(report.write([run]).read_text())
  sources = [value for name, value in page.attributes if name == 'src']
  assert set(sources) == ({url} if there else set())
  assert any('left out' in text for text in page.texts) == (not there)


# ---- Wrong types ---------------------------------------------------------------------------------


WRONG = (None, True, -1, 1.5, 'x', '1', [], [1], {}, {'a': 1}, float('nan'), 1e308, 10**400)
# (file, key, an example of what it may be); what else is refused, by the file and the key.
NUMBERS = [
  ('evaluation.json', ['step'], (1, 0)),
  ('evaluation.json', ['num_examples'], (1, 0)),
  ('evaluation.json', ['results', 'none_absent', 'accuracy'], (0, 0.5, 1)),
  ('run.json', ['parameters'], (1, 0)),
  ('run.json', ['devices'], (1, 0)),
  ('run.json', ['calls', 0, 'seconds'], (1, 1.5, 0)),
  ('run.json', ['calls', 0, 'peak_host_bytes'], (1, None)),
  ('mistakes.json', ['step'], (1, 0)),
  ('mistakes.json', ['conditions', 'none_absent', 0], ()),
]
TEXTS = [
  ('evaluation.json', ['split'], ('x', '1')),
  ('evaluation.json', ['config_hash'], ('x', '1')),
  ('evaluation.json', ['versions', 'jax'], ('x', '1')),
  ('evaluation.json', ['backbones', 'image', 'sha256'], ('x', '1')),
  ('run.json', ['device'], ('x', '1')),
  ('mistakes.json', ['examples', 'FIRST', 'id'], ('x', '1')),
  ('mistakes.json', ['examples', 'FIRST', 'text'], ('x', '1', None)),
]
OBJECTS = [
  ('evaluation.json', ['results'], ()),
  ('evaluation.json', ['results', 'none_absent'], ({}, {'a': 1})),
  ('evaluation.json', ['backbones'], ({},)),
  ('run.json', ['examples'], ({}, {'a': 1})),
  ('run.json', ['calls'], ([],)),
  ('mistakes.json', ['examples'], ()),
]


@pytest.mark.parametrize(
  ('file', 'keys', 'legal'), [*NUMBERS, *TEXTS, *OBJECTS], ids=lambda x: str(x)[:60]
)
def test_a_value_of_the_wrong_kind_is_named_with_its_file(run, file, keys, legal):
  original = (run / file).read_text()
  for value in WRONG:
    (run / file).write_text(original)

    def function(content, value=value):
      put(content, [min(content['examples']) if key == 'FIRST' else key for key in keys], value)

    change(run / file, function)
    if any(value is x or (type(value) is type(x) and value == x) for x in legal):
      report.read([run])
      continue
    with pytest.raises(UserError) as error:
      report.read([run])
    said = str(error.value)
    named = [str(key) for key in keys if not isinstance(key, int) and key != 'FIRST']
    assert file in said and '\n' not in said and len(said) < 500, (value, said)
    assert named[0] in said or value == {}, (value, said)  # Something else is said of {}.


@pytest.mark.parametrize('key', ['kind', 'step', 'loss', 'cca_correlation', 'none_absent', 'pairs'])
def test_a_line_of_the_log_is_named(run, key):
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  for value in ('x', [[1]], {'accuracy': 'x', 'held_out_correlation': 3}):
    spoilt = [line | ({key: value} if key in line else {}) for line in lines]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in spoilt))
    if key == 'kind' and value == 'x':
      report.read([run])
      continue
    with pytest.raises(UserError, match=rf'metrics.jsonl, line \d.*{key}'):
      report.read([run])


@pytest.mark.filterwarnings('error')
def test_gaps_of_a_log_are_gaps_of_a_curve(run):
  """Older logs have NaN; newer ones null in a list, and no key."""
  nan = float('nan')
  lines = [
    {'kind': 'train', 'step': 1, 'loss': nan, 'cca_correlation': [nan]},
    {'kind': 'train', 'step': 1, 'images_per_second': float('inf')},
    {'kind': 'train', 'step': 2, 'loss': 1.5, 'cca_correlation': [None]},
    {'kind': 'train', 'step': 3, 'cca_correlation': [0.5, 0.25]},
    {'kind': 'validation', 'step': 3, 'none_absent': {'accuracy': nan}},
    {'kind': 'validation', 'step': 3, 'text_absent': {'num_examples': 0}},
    {'kind': 'validation', 'step': 4, 'none_absent': {'accuracy': 0.5}},
    {'kind': 'validation', 'step': 4, 'pairs': {'held_out_correlation': [None]}},
  ]
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  page = Texts(report.write([run]).read_text())
  assert not re.search(r'\b(nan|inf|None|null)\b', ' '.join(page.texts))


# ---- Nothing to score ----------------------------------------------------------------------------


def without_examples(run, conditions, scores):
  """Makes it a run that found no example to score under these conditions."""
  change(
    run / 'evaluation.json',
    lambda content: content['results'].update(
      {name: scores | {'num_examples': 0} for name in conditions}
    ),
  )
  p = records.Predictions.load(run / records.PREDICTIONS)
  p.counted_cn[[p.conditions.index(name) for name in conditions]] = False
  p.save(run / records.PREDICTIONS)
  change(
    run / 'mistakes.json',
    lambda content: content['conditions'].update(dict.fromkeys(conditions, [])),
  )


@pytest.mark.parametrize('scores', [{}, {'accuracy': 0.0, 'f1_macro': 0.0, 'f1_micro': 0.0}])
@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('drawn', [False, True])
@pytest.mark.filterwarnings('error')
def test_conditions_without_examples_have_no_number_on_the_page(
  hostile, small, tmp_path, monkeypatch, scores, count, drawn
):
  """Older evaluations wrote zeros there."""
  without = list(records.CONDITIONS)[-count:]
  runs = [shutil.copytree(small, tmp_path / name) for name in ('a', 'b')]
  if not drawn:
    monkeypatch.setattr(document, 'svg', lambda draw, label, **how: '<svg></svg>')
  elif scores or count == 2:
    pytest.skip('drawn once with, once without anything to score')
  for run in runs:
    without_examples(run, without, scores)
  for folders in (runs[:1],) if drawn else (runs[:1], runs):
    text = report.write(folders, tmp_path / 'page.html').read_text()
    hostile.check_page(text)
    page = Texts(text)
    assert sum('no example' in text for text in page.texts) >= count
    assert not re.search(r'\b(nan|inf|None)\b', ' '.join(page.texts))
  first = report.read(runs[:1])[0]
  for name in records.CONDITIONS:
    scored = name not in without
    assert (first.score(name) is not None) == (first.error(name) is not None) == scored
    assert (first.difference(first, name) is not None) == scored


# ---- Whatever else -------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_any_change_of_a_run_file_is_a_page_or_one_line(hostile, quick, tmp_path_factory, seed):
  hostile.trial(np.random.default_rng(seed), tmp_path_factory.mktemp('changed'))


def test_the_generator_draws_pages_too(fuzz):
  outcomes = fuzz('report', count=8, seed=7)['outcomes']
  assert outcomes['page'] and sum(outcomes.values()) == 8
