"""A run in one file: the same answers, every byte checked, nothing believed; and as programs."""

import json
import pathlib
import runpy
import shutil
import socket
import sys
import types
import zipfile

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from PIL import Image

import molt_jax
from molt_jax import commands, evaluate, export
from molt_jax.data import transforms
from molt_jax.errors import UserError
from molt_jax.evaluation import model_file
from molt_jax.exporting import hub, programs
from molt_jax.runtime import compiling, sealed
from molt_jax.towers import loading, tokenizer


@pytest.fixture(scope='module')
def run(finished_run) -> pathlib.Path:
  return finished_run


@pytest.fixture(scope='module')
def file(run) -> pathlib.Path:
  """The file of the run."""
  path = run.parent / 'tiny.molt'
  found = export.export(run, path)
  assert found['difference'] <= 1e-6 and found['bytes'] == path.stat().st_size
  return path


@pytest.fixture(scope='module')
def photo(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('photo') / 'a.png'
  Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert('RGB').save(path)
  return path


def inputs(photo):
  return {'image': [photo, photo, None], 'text': ['a red square', None, 'the blue one']}


def probabilities(model, photo):
  answers = model.predict(**inputs(photo), top_k=9)
  return [{x['label']: x['probability'] for x in answer['labels']} for answer in answers]


def refused(path, words=''):
  with pytest.raises(UserError) as error:
    molt_jax.load(path)
  message = str(error.value)
  assert '\n' not in message and path.name in message and words in message
  return message


# ---- Answers -------------------------------------------------------------------------------------


def test_answers_are_those_of_the_run_without_its_towers_and_a_network(
  run, file, photo, tmp_path, monkeypatch
):
  wanted = probabilities(molt_jax.load(run), photo)

  def nothing_else(*args, **options):
    raise AssertionError(f'something beside the file is asked for: {args}')

  monkeypatch.setattr(loading, 'open_files', nothing_else)
  monkeypatch.setattr(socket, 'socket', nothing_else)
  monkeypatch.setenv('HOME', str(tmp_path))
  moved = shutil.copy(file, tmp_path / 'elsewhere.molt')
  found = probabilities(molt_jax.load(moved), photo)
  for one, other in zip(found, wanted, strict=True):
    assert one == pytest.approx(other, abs=1e-6)


def test_the_file_says_what_it_is_and_not_where_it_was(run, file, tmp_path):
  top = sealed.open(file)
  config = top.json('config.json')
  assert config['backbones']['image']['path'] == 'image' and '/' not in config['dataset']['path']
  with zipfile.ZipFile(file) as archive:
    assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    told = [archive.read(name) for name in archive.namelist() if name.endswith(('.json', '.md'))]
  assert not [text for text in told if str(run.parent).encode() in text]
  card = top.read('README.md').decode()
  scores = json.loads((run / 'evaluation.json').read_text())['results']
  assert f'| complete | 14 | {100 * scores["none_absent"]["accuracy"]:.1f} % |' in card
  assert '`blue`, `green`, `red`' in card
  again = tmp_path / 'again.molt'
  export.export(file, again)  # Of a file as of a folder.
  for name in ('head.safetensors', 'image/weights-00001.safetensors', 'text/tower.json'):
    assert sealed.open(again).read(name) == top.read(name)


def test_towers_in_int8_answer_nearly_the_same(run, file, photo, tmp_path):
  small = tmp_path / 'small.molt'
  export.export(run, small, quantize='int8')
  weights = safetensors.numpy.load(sealed.open(small).read('text/weights-00001.safetensors'))
  assert weights['layers/up_proj/kernel/qvalue'].dtype == np.int8
  found = probabilities(molt_jax.load(small), photo)
  for one, other in zip(found, probabilities(molt_jax.load(file), photo), strict=True):
    assert one == pytest.approx(other, abs=0.05)
  assert 'before the towers were quantised' in sealed.open(small).read('README.md').decode()


def test_prediction_sets_are_those_of_the_run(run, file, photo, monkeypatch):
  # A file is also tried where programs are compiled without options of their own.
  monkeypatch.setattr(compiling, '_quick', lambda: None)
  models = [molt_jax.load(x) for x in (run, file)]
  for given in ({'image': photo, 'text': 'green'}, {'image': photo}, {'text': 'green'}):
    one, other = (model.predict(**given, coverage=0.8) for model in models)
    assert one['set'] == other['set'] and other['coverage'] == 0.8


def test_examples_are_of_a_split_where_one_is_named(run, tmp_path):
  path = tmp_path / 'real.molt'
  export.export(run, path, split='test')
  examples = model_file.read(path).examples
  assert [(x.image is not None, x.text is not None) for x in examples] == [
    *[(True, True)] * 3,
    (True, False),
    (False, True),
  ]
  assert all(' square, number ' in x.text for x in examples if x.text)


def test_a_table_is_scored_beside_the_file(run, file, tmp_path):
  moved = shutil.copy(file, tmp_path / 'm.molt')
  table = json.loads((run / 'config.json').read_text())['dataset']['path']
  shutil.copytree(table, tmp_path / 'data')
  path = f'{tmp_path}/data/test.csv'
  assert evaluate.main([f'--workdir={moved}', f'--table={path}']) == 0
  record = json.loads((tmp_path / 'm_evaluation_test.json').read_text())
  wanted = json.loads((run / 'evaluation.json').read_text())['results']
  for name, scores in wanted.items():
    assert record['results'][name]['loss'] == pytest.approx(scores['loss'], abs=1e-5)
  assert evaluate.main([f'--workdir={moved}']) == 2


# ---- Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['evaluate', 'explain', 'audit'])
def test_what_needs_data_says_so_of_a_file(file, name, capsys):
  assert commands.main([name, f'--workdir={file}']) == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
  assert "a model in one file has no data beside it; give the run's folder" in line


def test_a_flipped_byte_anywhere_is_refused(file, tmp_path):
  content = file.read_bytes()
  rng = np.random.default_rng(0)
  ends = [*range(40), *range(len(content) - 120, len(content))]
  path = tmp_path / 'damaged.molt'
  for place in [*ends, *rng.integers(len(content), size=120).tolist()]:
    damaged = bytearray(content)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    refused(path)


def test_what_is_damaged_is_named(file, tmp_path):
  content = file.read_bytes()
  path = tmp_path / 'damaged.molt'
  place = content.index(sealed.open(file).read('text/tokenizer.json'))
  path.write_bytes(content[:place] + b'[' + content[place + 1 :])
  refused(path, "'text/tokenizer.json' in it is not what was written")


def test_what_is_cut_or_something_else_is_refused(file, tmp_path):
  content = file.read_bytes()
  path = tmp_path / 'other.molt'
  for size in (1, 80, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:size])
    refused(path)
  path.write_bytes(content + b'\0')
  refused(path)
  path.write_bytes(b'')
  refused(path, 'is empty')
  path.write_text('no model at all, but a text that is longer than the checksum at the end' * 2)
  refused(path, 'is no .molt file')


def rewritten(file, path, **changed):
  """A file whose checksums are right, with other members: None leaves one out."""
  top = sealed.open(file)
  members = {name: top.read(name) for name in top.top.members if name != sealed.MANIFEST}
  members |= {name.replace('__', '/').replace('_dot_', '.'): x for name, x in changed.items()}
  about = members.pop('about', top.manifest)
  there = [(name, x) for name, x in members.items() if x is not None]
  sealed.write(path, there, about)
  return path


def changed_json(file, name, change):
  content = sealed.open(file).json(name)
  change(content)
  return json.dumps(content).encode()


def test_a_file_that_means_harm_is_refused(file, tmp_path):
  path = tmp_path / 'hostile.molt'
  refused(rewritten(file, path, **{'../outside': b'x'}), 'lies outside')
  refused(rewritten(file, path, **{'/etc/passwd': b'x'}), 'lies outside')
  refused(rewritten(file, path, about={'kind': model_file.KIND, 'version': 2}), 'newer')
  refused(rewritten(file, path, about={'kind': 'else'}), 'no model of molt export')
  refused(rewritten(file, path, head_dot_safetensors=None), 'head.safetensors')
  refused(rewritten(file, path, text__tower_dot_json=b'[]'), 'tower.json')
  refused(rewritten(file, path, text__tokenizer_dot_json=b'{}'), 'tokenizer.json')
  config = changed_json(file, 'config.json', lambda c: c.update(run='import os'))
  with pytest.raises(UserError, match='no such field'):
    molt_jax.load(rewritten(file, path, config_dot_json=config))
  examples = changed_json(
    file, 'examples.json', lambda c: c['examples'][0].update(image='../../etc/passwd')
  )
  refused(rewritten(file, path, examples_dot_json=examples), 'No such file')
  head = safetensors.numpy.load(sealed.open(file).read('head.safetensors'))
  name = next(iter(head))
  for other in (head[name].reshape(-1)[:-1], np.full_like(head[name], np.nan)):
    content = safetensors.numpy.save({**head, name: other})
    refused(rewritten(file, path, head_dot_safetensors=content), 'what was trained is not')
  weights = safetensors.numpy.load(sealed.open(file).read('image/weights-00001.safetensors'))
  content = safetensors.numpy.save({**weights, 'patch_kernel': np.zeros((2, 2), np.float32)})
  with pytest.raises(UserError, match='patch_kernel is float32'):
    molt_jax.load(rewritten(file, path, **{'image/weights-00001.safetensors': content}))


def test_answers_that_are_not_those_of_the_examples_are_refused(file, tmp_path):
  def spoil(content):
    content['examples'][2]['probability'][0] += 0.02

  examples = changed_json(file, 'examples.json', spoil)
  path = rewritten(file, tmp_path / 'x.molt', examples_dot_json=examples)
  refused(path, 'answered otherwise than when it was written (probabilities differ by up to 0.02')


# ---- The hub, programs, mistakes -----------------------------------------------------------------


def test_the_hub_without_a_network_is_one_line(file):
  with pytest.raises(UserError) as error:
    hub.push('someone/shop', file, 'a card')
  message = str(error.value)
  assert "--push_to_hub: 'someone/shop' cannot be written" in message and '\n' not in message
  assert f'{file} is written' in message


def test_programs_answer_without_this_package(run, photo, tmp_path, capsys, monkeypatch):
  out = tmp_path / 'programs'
  assert export.main([f'--workdir={run}', f'--out={out}', '--format=stablehlo']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['programs'] == ['image_and_text', 'image', 'text']
  script = (out / 'run.py').read_text()
  assert 'molt_jax' not in script and len([x for x in script.splitlines() if x]) <= 30
  model = molt_jax.load(run)
  for given in ({'image': photo, 'text': 'a red square'}, {'image': photo}, {'text': 'blue'}):
    argv = ['run.py', *(f'--{name}={value}' for name, value in given.items())]
    monkeypatch.setattr(sys, 'argv', argv)
    runpy.run_path(str(out / 'run.py'), run_name='__main__')
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    wanted = {x['label']: x['probability'] for x in model.predict(**given)['labels']}
    assert {name: float(p) for p, name in lines} == pytest.approx(wanted, abs=3e-6)
  for argv in (['--txt=blue'], [], ['blue']):
    monkeypatch.setattr(sys, 'argv', ['run.py', *argv])
    with pytest.raises(
      SystemExit, match=r'^Classifies .*--text=STRING.* There is no .*stablehlo.$'
    ):
      runpy.run_path(str(out / 'run.py'), run_name='__main__')


def test_the_scripts_tokenizer_adds_cuts_and_fills_up_by_itself():
  words = {'[no]': 0, '[cls]': 1, '[x]': 2, '[sep]': 3, '[pad]': 4, 'red': 5, 'mug': 6}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[no]'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  for before, after in (((1, 2), (3,)), ((), (3,)), ((), ())):
    own = tokenizer.Tokenizer(backend, 4, 1, before, after, 'a test', '')
    whole = programs.whole_tokenizer(own, 6)
    for text in ('', 'red', 'red mug', 'red mug blue red mug red mug'):
      ids = own.encode(text, 6) if text else [*before, *after]
      found = whole.encode(text)
      assert found.ids == ids + [4] * (6 - len(ids)), (before, after, text)
      assert found.attention_mask == [1] * len(ids) + [0] * (6 - len(ids))


def test_bfloat16_is_written_as_its_bits():
  x = jnp.array([1.5, -3e38, 2e-39, 0.1], jnp.bfloat16)
  found = safetensors.numpy.load(safetensors.numpy.save({'x': programs.plain(x)}))['x']
  assert found.dtype == np.uint16
  np.testing.assert_array_equal(programs.restored(found, x.dtype), x)


@pytest.mark.parametrize(
  ('resize', 'scaled', 'rounded'),
  [
    ('squash', 0, True),
    ('squash', 23, False),
    ('crop', 0, True),
    ('crop', 24, False),
    ('letterbox', 0, True),
    ('letterbox', 0, False),
  ],
)
@pytest.mark.parametrize('size', [(31, 50), (40, 40), (57, 12)])
def test_the_script_sees_a_picture_as_the_run_does(
  tmp_path, monkeypatch, resize, scaled, rounded, size
):
  """Transparent and turned, of any shape."""
  clear = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50)
  colours = [clear, clear.rotate(180), clear.transpose(0), clear.rotate(90).resize(size)]
  exif = Image.Exif()
  exif[0x0112] = 6
  path = tmp_path / 'a.png'
  Image.merge('RGBA', colours).save(path, exif=exif)
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
  how = {'resize': resize, 'resample': 3, 'scaled': scaled, 'rounded': rounded}
  preprocess = types.SimpleNamespace(image_size=18, mean=mean, std=std, **how)
  about = {'classes': ['red'], 'image': programs.about_images(preprocess)}
  (tmp_path / 'model.json').write_text(json.dumps(about))
  shutil.copy(programs.SCRIPT, tmp_path / 'run.py')
  (tmp_path / 'image.stablehlo').write_bytes(b'')
  safetensors.numpy.save_file({}, tmp_path / 'weights.safetensors')
  seen = []

  def call(weights, pixels):
    seen.append(pixels)
    return np.ones((1, 1))

  monkeypatch.setattr(jax.export, 'deserialize', lambda _: types.SimpleNamespace(call=call))
  monkeypatch.setattr(sys, 'argv', ['run.py', f'--image={path}'])
  runpy.run_path(str(tmp_path / 'run.py'), run_name='__main__')
  (pixels,) = seen[0] / np.float32(255)
  read = transforms.decode(path.read_bytes())
  wanted = transforms.preprocess_image(read, size=18, mean=mean, std=std, **how)
  np.testing.assert_allclose((pixels - np.array(mean)) / np.array(std), wanted, atol=2e-5)


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--out=x.zip'], "--out: 'x.zip' is not legal; give a file NAME.molt"),
    (['--out=no/x.molt'], 'no/x.molt cannot be written'),
    (['--out=x.molt', '--push_to_hub=shop'], 'give USER/NAME'),
    (
      ['--out=x', '--format=stablehlo', '--quantize=int8'],
      '--quantize: it goes with --format=molt',
    ),
    (['--out=x.molt', '--workdir=nowhere'], "no run in 'nowhere'"),
  ],
)
def test_a_mistake_is_one_line(run, monkeypatch, tmp_path, capsys, flags, says):
  monkeypatch.chdir(tmp_path)
  assert export.main([f'--workdir={run}', *flags]) == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
  assert says in line and not list(tmp_path.iterdir())
