"""The schema, its errors, and the rule that every field is read by something."""

import ast
import dataclasses
import hashlib
import json
import pathlib

import pytest

from molt_jax import config as config_package
from molt_jax.config import layers, presets, resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PRESET = str(ROOT / 'configs' / 'quickstart.py')


@pytest.mark.parametrize('preset', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_every_preset_is_valid(preset):
  schema = PRETRAINING if preset.stem.startswith('pretrain') else CLASSIFIER
  schema.load(str(preset))
  schema.load(preset.stem)


@pytest.mark.parametrize(
  'overrides, words',
  [
    ({'molt.widht': '64'}, ['config.molt.widht', 'did you mean molt.width']),
    ({'batch_size': '64'}, ['config.batch_size', 'train.batch_size']),
    ({'molt.width': '6.5'}, ['config.molt.width', '6.5', 'int']),
    ({'molt.width': 'wide'}, ['config.molt.width', "'wide'", 'int']),
    ({'molt.width': '0'}, ['config.molt.width', '0', '>= 1']),
    ({'molt.layer_weights': '1'}, ['config.molt.layer_weights', 'bool']),
    ({'optimizer.learning_rate': '-1'}, ['config.optimizer.learning_rate', '-1', '> 0']),
    ({'optimizer.learning_rate': 'nan'}, ['config.optimizer.learning_rate']),
    ({'missing.strategy': 'guess'}, ["'guess'", 'robust', 'null', 'zero']),
    ({'molt.num_heads': '3'}, ['config.molt.num_heads', '3', 'config.molt.width']),
    ({'dataset.name': 'table'}, ['config.dataset.path']),
    (
      {'method': 'pmf', 'backbones.text.trainable': 'norm/.*'},
      ['config.backbones.text.trainable', "'norm/.*'", "'pmf'", 'molt or late_fusion'],
    ),
  ],
)
def test_a_wrong_override_is_one_line_that_says_what_is_legal(overrides, words):
  with pytest.raises(UserError) as error:
    CLASSIFIER.load(PRESET, overrides)
  text = str(error.value)
  assert '\n' not in text
  for word in words:
    assert word in text


def test_overrides_take_the_type_of_the_field():
  config = CLASSIFIER.load(
    PRESET,
    {
      'train.epochs': '2',
      'molt.cross_attention': 'false',
      'molt.width': '32',
      'image.resize': 'letterbox',
    },
  )
  assert (
    config.train.epochs,
    config.molt.cross_attention,
    config.molt.width,
    config.image.resize,
  ) == (2.0, False, 32, 'letterbox')
  assert isinstance(config.train.epochs, float)


@pytest.mark.parametrize(
  'text, words',
  [
    ('import nowhere_to_be_found', ['nowhere_to_be_found']),
    ('def get_config(): return 1 / 0', ['ZeroDivisionError']),
    ('x = 1', ['get_config']),
    (
      (
        'from molt_jax.config import default_config\ndef get_config():\n  c = default_config()\n  '
        'c.molt.widht = 3\n  return c'
      ),
      ['widht'],
    ),
    ('def get_config() return', ['SyntaxError']),
    ('import sys; sys.exit(0)', ['SystemExit']),
    ('x = "\0"', ['null bytes']),
    ('def get_config(): return get_config()', ['RecursionError']),
    ('def get_config(): raise MemoryError', ['MemoryError']),
    ('def get_config(): pass', ['returns a NoneType', 'default_config()']),
    ('def get_config(): return {}', ['returns a dict']),
    ('def get_config(): return 3', ['returns an int']),
    ('x = "caf\udce9"', ['SyntaxError', 'utf-8']),
  ],
)
def test_a_broken_preset_is_one_line(tmp_path, text, words):
  path = tmp_path / 'preset.py'
  path.write_text(text, errors='surrogateescape')
  with pytest.raises(UserError) as error:
    CLASSIFIER.load(str(path))
  assert '\n' not in str(error.value)
  for word in [str(path), *words]:
    assert word in str(error.value)


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('preset.json', '{}', 'is no Python file'),
    ('preset', '', 'is no Python file'),
    ('folder.py', None, 'no file'),
  ],
)
def test_what_is_no_preset_is_refused_in_one_line(tmp_path, name, content, words):
  path = tmp_path / name
  path.mkdir() if content is None else path.write_text(content)
  with pytest.raises(UserError, match=words) as error:
    CLASSIFIER.load(str(path))
  assert '\n' not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize('name', ['dataset.path', 'features.store', 'backbones.text.path'])
@pytest.mark.parametrize(
  'value, words', [('a\0b', 'NUL'), ('~nobody_of_that_name/x', 'home folder that is not known')]
)
def test_what_no_path_can_be_is_refused_by_field(name, value, words):
  with pytest.raises(UserError, match=words) as error:
    CLASSIFIER.load(PRESET, {name: value})
  assert str(error.value).startswith(f'config.{name}: ')


@pytest.mark.parametrize('text', ['(' * 5000, '-' * 100000 + '1', '[' * 100000, '9' * 10000])
def test_an_override_that_python_cannot_parse_is_one_line(text):
  with pytest.raises(UserError, match='config.molt.width'):
    CLASSIFIER.load(PRESET, {'molt.width': text})


def test_a_missing_preset_is_named():
  with pytest.raises(UserError, match='no file .nowhere.py.*one of the presets hateful_memes, mm_'):
    CLASSIFIER.load('nowhere.py')


def test_a_preset_of_the_package_goes_by_its_name_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert CLASSIFIER.load('quickstart').dataset.name == 'openmoji'
  assert CLASSIFIER.load('mm_imdb:robust') == CLASSIFIER.load(f'{ROOT}/configs/mm_imdb.py:robust')
  assert PRETRAINING.load('pretrain_openmoji').objective.v2v == 1.0
  with pytest.raises(UserError, match='no file .configs/table.py. here; .* is --config=table$'):
    CLASSIFIER.load('configs/table.py')
  (tmp_path / 'table').write_text('')  # No preset, as it does not end in .py.
  assert CLASSIFIER.load('table').dataset.name == 'table'


@pytest.mark.parametrize(
  ('schema', 'preset'), [(CLASSIFIER, 'pretrain_openmoji'), (PRETRAINING, 'quickstart')]
)
def test_a_preset_of_another_command_is_refused(schema, preset):
  with pytest.raises(UserError, match=f'{preset!r} is a preset of another command'):
    schema.load(preset)


def test_presets_share_what_a_laptop_needs():
  quickstart, table = (CLASSIFIER.load(name) for name in ('quickstart', 'table'))
  changed = {line.split(':')[0] for line in resolved.differences(quickstart, table)}
  assert changed == {
    'backbones.text.path',
    'dataset.name',
    'dataset.path',
    'text.max_tokens',
  }
  default, robust = CLASSIFIER.default(), CLASSIFIER.load('mm_imdb:small,robust')
  for name in presets.WITHOUT_ADDITIONS:
    assert CLASSIFIER.get(robust, name) == CLASSIFIER.get(default, name)
  for name in presets.BEST:
    assert CLASSIFIER.get(robust, name) == CLASSIFIER.get(quickstart, name)


def test_what_presets_of_users_import_is_there():
  assert config_package.default_config() == CLASSIFIER.default()
  pretrain = config_package.default_config(config_package.PRETRAIN_SCHEMA)
  assert pretrain == PRETRAINING.default()
  text = resolved.to_json(CLASSIFIER.load('quickstart'))
  assert config_package.from_json(text) == config_package.load_config('quickstart')
  assert config_package.load_config(
    'pretrain_openmoji', schema=config_package.PRETRAIN_SCHEMA
  ) == config_package.from_json(
    resolved.to_json(PRETRAINING.load('pretrain_openmoji')), config_package.PRETRAIN_SCHEMA
  )
  assert config_package.SCHEMA is CLASSIFIER


def test_fields_of_older_versions_are_read_under_their_new_names(tmp_path):
  renamed = {'molt.depth': ('molt.width', int), 'speed': ('optimizer.learning_rate', float)}
  schema = dataclasses.replace(CLASSIFIER, renamed=renamed)
  saved = json.loads(resolved.to_json(CLASSIFIER.load('quickstart')))
  del saved['molt']['width'], saved['optimizer']['learning_rate']
  saved['molt']['depth'], saved['speed'] = '32', 1
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  config = schema.read_run(tmp_path)
  assert (config.molt.width, config.optimizer.learning_rate) == (32, 1.0)
  with pytest.raises(UserError, match='holds no run of .*config.molt.depth: no such field'):
    CLASSIFIER.read_run(tmp_path)
  with pytest.raises(UserError, match='config.molt.depth: no such field'):
    schema.load('quickstart', {'molt.depth': '3'})  # What is written today uses today's names.


@pytest.mark.parametrize('kind', ['llama', 'clip'])
def test_the_config_of_a_run_of_an_older_version_is_read(tmp_path, kind):
  """It counted the last layers and named the kind of the text tower; fields since had defaults."""
  today = CLASSIFIER.load('quickstart', {'molt.layers': '-3:'})
  saved = json.loads(resolved.to_json(today))
  del saved['molt']['layers'], saved['mmrl'], saved['pmf'], saved['backbones']['param_dtype']
  del saved['backbones']['image']['trainable'], saved['backbones']['text']['trainable']
  saved['molt']['num_layers'], saved['backbones']['text']['kind'] = 3, kind
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  assert CLASSIFIER.read_run(tmp_path) == today
  for name, value in (('molt.num_layers', '3'), ('backbones.text.kind', kind)):
    with pytest.raises(UserError, match=f'config.{name}: no such field'):
      CLASSIFIER.load('quickstart', {name: value})


# ---- Which hidden states are read ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('text', 'num_layers', 'states'),
  [
    ('-4:', 12, (9, 10, 11, 12)),
    ('-4:', 3, (0, 1, 2, 3)),
    ('-1:', 3, (3,)),
    ('-1', 3, (3,)),
    ('2', 3, (2,)),
    ('0,3,6,9,12', 12, (0, 3, 6, 9, 12)),
    ('6,0', 6, (0, 6)),
    ('0,-1', 3, (0, 3)),
    ('0,-2:', 6, (0, 5, 6)),
    ('1:3,5', 6, (1, 2, 5)),
    (':-1', 3, (0, 1, 2)),
    (':', 2, (0, 1, 2)),
    ('0:13:3', 12, (0, 3, 6, 9, 12)),
    ('::2', 4, (0, 2, 4)),
    ('-4::2', 12, (9, 11)),
    ('all', 2, (0, 1, 2)),
  ],
)
def test_hidden_states_are_named_by_number(text, num_layers, states):
  assert layers.is_legal(text)
  assert layers.select(text, num_layers, field='f', tower='image') == states
  both = f'text={text};image=all'
  assert layers.is_legal(both)
  assert layers.of_modality(both, 'text') == text
  assert layers.of_modality(both, 'image') == 'all'
  assert layers.of_modality(text, 'text') == layers.of_modality(text, 'image') == text


@pytest.mark.parametrize(
  'text',
  [
    '',
    'last',
    'All',
    '1.5',
    '--1',
    '1,',
    ',1',
    '1, 2',
    '1;2',
    '::0',
    '::-1',
    '1:2:3:4',
    'all,1',
    'image=1',
    'image=1;text=',
    'image=1;image=2',
    'image=1;text=2;text=3',
    'image=1;audio=2',
    'image:1;text:2',
    'image=1;text=2;',
  ],
)
def test_what_names_no_hidden_states_is_one_line(text):
  with pytest.raises(UserError) as error:
    CLASSIFIER.load('quickstart', {'molt.layers': text})
  line = str(error.value)
  assert line.startswith(f'config.molt.layers: {text!r} is not legal') and '\n' not in line
  assert "'-4:', '0,3,6', 'all'" in line


@pytest.mark.parametrize(
  ('text', 'num_layers'),
  [
    ('-4:', 2),
    ('-4::2', 2),
    ('-5:-1', 3),
    ('0:5', 3),
    ('4', 3),
    ('-5', 3),
    ('0,0', 3),
    ('3,-1', 3),
    ('0:2,1', 3),
    ('4:', 3),
    ('2:1', 3),
  ],
)
def test_states_that_a_tower_does_not_have_are_refused(text, num_layers):
  """Also where a slice would quietly be shorter, and where one is named twice."""
  assert layers.is_legal(text)
  with pytest.raises(UserError) as error:
    layers.select(text, num_layers, field='config.molt.layers', tower='image')
  assert str(error.value) == (
    f'config.molt.layers: {text!r}, but the image tower has {num_layers} layers, so hidden states '
    f'0 to {num_layers} (or -{num_layers + 1} to -1); name different ones of these'
  )


def test_renamed_fields_are_not_fields():
  for schema in (CLASSIFIER, PRETRAINING):
    assert not set(schema.renamed) & {name for name, _ in schema.items()}


def test_json_round_trip_and_differences():
  one = CLASSIFIER.load(PRESET)
  two = CLASSIFIER.from_json(resolved.to_json(one))
  assert two == one and resolved.config_hash(two) == resolved.config_hash(one)
  two.molt.width = 64
  assert resolved.differences(one, two) == ['molt.width: 128 -> 64']
  assert resolved.config_hash(two) != resolved.config_hash(one)
  # Fields that came later leave the hash of older configs alone.
  older = two.to_dict()
  del older['train']['patience'], older['probe']['cells']
  content = json.dumps(older, sort_keys=True).encode()
  assert resolved.config_hash(two) == hashlib.sha256(content).hexdigest()[:16]
  two.train.patience = 5
  assert resolved.config_hash(two) != hashlib.sha256(content).hexdigest()[:16]


def _attributes_read():
  """Names read as an attribute or by a literal key anywhere in the package but the schema
  itself.
  """
  names = set()
  for path in (ROOT / 'molt_jax').rglob('*.py'):
    if path.parent.name == 'config':
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        names.add(node.attr)
      if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        names.add(node.slice.value)
      is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
      if is_call and node.func.attr == 'get' and isinstance(node.args[0], ast.Constant):
        names.add(node.args[0].value)  # Of a field that one of the schemas lacks.
  return names


@pytest.mark.parametrize('schema', [CLASSIFIER, PRETRAINING], ids=['train', 'pretrain'])
def test_every_field_is_read_by_some_module(schema):
  read = _attributes_read()
  assert [
    name
    for name, _ in schema.items()
    if name.split('.')[-1] not in read and not name.startswith('objective.')
  ] == []


def test_the_objectives_are_those_that_can_be_computed():
  from molt_jax.objectives import contrastive

  assert (
    set(PRETRAINING.fields['objective']) == set(contrastive.OBJECTIVES) == set(contrastive.NEEDS)
  )
