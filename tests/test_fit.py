"""`molt fit`: a table as people have it trains untouched, and its run is one as any other."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import molt_jax
from molt_jax import commands, train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets
from molt_jax.data.tables import as_config, memory
from molt_jax.errors import UserError
from molt_jax.runtime import console

COLOURS = {'rot': (200, 30, 30), 'grün': (30, 180, 40), 'blau': (40, 60, 210)}
HEADER = ['Nr', 'Titel', 'Beschreibung', 'Foto', 'Preis', 'Kategorie']


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  """A folder with a shop's file: semicolons, Windows-1252, own column names, several kinds of
  picture, gaps, a web page named .jpg, a truncated file, an odd row.
  """
  root, rng = tmp_path_factory.mktemp('shop'), np.random.default_rng(0)
  (root / 'bilder').mkdir()
  rows = []
  for n in range(60):
    name = list(COLOURS)[n % 3]
    noisy = np.array(COLOURS[name]) + rng.normal(0, 30, (20, 20, 3))
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    mode, suffix = [('RGB', 'png'), ('CMYK', 'jpg'), ('RGBA', 'webp'), ('L', 'png')][n % 4]
    path = f'bilder/{n}.{suffix}'
    image.convert(mode).save(root / path)
    title = '' if n % 7 == 6 else f'Ein Würfel Nr. {n}, {name}'
    text = '' if n % 3 == 2 else 'sehr schön: "wie neu"; nur Abholung'
    rows.append([f'SKU-{n}', title, text, '' if n % 8 == 5 else path, f'{n},99', name])
  (root / rows[0][3]).write_bytes(b'<!DOCTYPE html><html>not found</html>')
  (root / rows[2][3]).write_bytes((root / rows[2][3]).read_bytes()[:80])
  rows[10][1:4] = ['', '', '']
  with open(root / 'artikel.csv', 'w', encoding='cp1252', newline='') as file:
    csv.writer(file, delimiter=';').writerows([HEADER, *rows])
  return root


@pytest.fixture(scope='module')
def preset(make_tiny_config, tmp_path_factory):
  """A preset file with tiny towers; 6 steps."""
  config = make_tiny_config()
  config.train.epochs, config.train.eval_every = 0.5, 3
  config.missing.views, config.missing.distill_weight = False, 0.0  # A smaller program.
  path = tmp_path_factory.mktemp('preset') / 'tiny.py'
  path.write_text(
    'import json\nfrom molt_jax.config.classifier import CLASSIFIER\n\n'
    f'def get_config():\n  return CLASSIFIER.from_dict(json.loads({resolved.to_json(config)!r}))\n'
  )
  return path


@pytest.fixture(scope='module')
def run(shop, preset, tmp_path_factory):
  """(the run's folder, what was logged) of `molt fit` in an empty folder."""
  lines, here = [], tmp_path_factory.mktemp('here')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(here)
    patch.setattr(console, 'log', lines.append)
    code = commands.main(
      ['fit', f'{shop}/artikel.csv', '--label=Kategorie', '--text=Titel,Beschreibung']
      + ['--workdir=run', f'--config={preset}']
    )
  assert code == 0
  return here / 'run', lines


def test_a_shops_file_trains_untouched(run):
  workdir, lines = run
  record = json.loads((workdir / 'evaluation.json').read_text())
  assert record['num_examples'] == 12 and set(record['results']['none_absent']) > {'accuracy'}
  facts = json.loads((workdir / 'run.json').read_text())['table']
  assert facts['image'] == ['Foto'] and facts['text'] == ['Titel', 'Beschreibung']
  assert facts['guessed'] == ['image', 'split'] and facts['unused'] == ['Nr', 'Preis']
  assert facts['read_as'] == ['separated by semicolons', 'cp1252']
  said = '\n'.join(lines)
  assert 'image = Foto' in said and '(guessed: image' in said and 'not used: Nr, Preis' in said
  assert "read as Windows-1252, for example 'Würfel" in said or "'Würfel" in said
  assert ' have the name of their class in them: artikel.csv:' in said
  assert '12 for test' in said and 'set aside: 1 odd row: artikel.csv row 12: both image' in said


def test_odd_rows_are_listed_in_the_runs_folder(run):
  with open(run[0] / 'rows_set_aside.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [(row['file'], row['row']) for row in rows] == [('artikel.csv', '12')]
  assert rows[0]['reason'] == 'both image and text are empty'


def test_scores_equal_those_of_the_data_rewritten_by_hand(run, shop, preset, tmp_path):
  config = CLASSIFIER.read_run(run[0])
  with open(shop / 'artikel.csv', encoding='cp1252', newline='') as file:
    given = list(csv.reader(file, delimiter=';'))
  for split, source in datasets.load_dataset(config).splits.items():
    with open(tmp_path / f'{split}.csv', 'w', newline='') as file:
      writer = csv.writer(file)
      writer.writerow(['image', 'text', 'label'])
      for row_id in source.ids:
        _, title, text, photo, _, label = given[int(row_id.split(':')[1]) - 1]
        both = f'{title}. {text}' if title and text else title or text
        writer.writerow([photo and shop / photo, both, label])
  rewritten = CLASSIFIER.load(str(preset), {'dataset.path': str(tmp_path)})
  record = train.train(rewritten, tmp_path / 'run')
  expected = json.loads((run[0] / 'evaluation.json').read_text())['results']
  assert record['results'].keys() == expected.keys()
  for condition, scores in record['results'].items():
    # Where a run orders rows by their ids, sums are rounded otherwise.
    assert scores == pytest.approx(expected[condition], rel=1e-4), condition


def test_other_commands_work_on_the_run_from_anywhere(run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  workdir = run[0]
  before = json.loads((workdir / 'evaluation.json').read_text())
  assert commands.main(['evaluate', f'--workdir={workdir}', '--split=test']) == 0
  after = json.loads((workdir / 'evaluation.json').read_text())
  assert after['results'] == before['results'] and after['data'] == before['data']
  assert after['data']['as_in_training']
  assert commands.main(['predict', f'--workdir={workdir}', '--text=Ein Würfel']) == 0
  assert '"labels"' in capsys.readouterr().out
  assert commands.main(['report', f'--workdir={workdir}']) == 0
  assert 'report.html' in {path.name for path in workdir.iterdir()}


def test_the_same_command_goes_on_and_other_data_are_refused(run, shop, preset, tmp_path, capsys):
  changed = tmp_path / 'artikel.csv'
  changed.write_bytes((shop / 'artikel.csv').read_bytes().replace(b'Nr. 7', b'Nr. 77'))
  argv = ['--label=Kategorie', '--text=Titel,Beschreibung', f'--workdir={run[0]}']
  argv += [f'--config={preset}', f'--image_folder={shop}']
  capsys.readouterr()
  assert commands.main(['fit', str(changed), *argv]) == 2
  assert 'the data have changed since step 6' in capsys.readouterr().err


def test_describe_takes_the_same_table_and_leaves_no_folder_of_refused_data(
  shop, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  tower = '--config.backbones.text.path=random:llama-tiny'
  assert commands.main(['describe', f'{shop}/artikel.csv', '--label=Kategorie', tower]) == 0
  report = json.loads((tmp_path / 'describe' / 'artikel' / 'describe.json').read_text())
  assert report['splits']['test']['examples'] == 12 and len(report['checks']) == 1
  assert capsys.readouterr().err.count('a web page in the place of an image') == 1
  (tmp_path / 'bad').mkdir()
  (tmp_path / 'bad' / 'bad.csv').write_text('text,label\nx,a\ny,a\n')
  assert commands.main(['describe', 'bad/bad.csv', tower]) == 2
  assert 'one class only' in capsys.readouterr().err
  assert [path.name for path in (tmp_path / 'describe').iterdir()] == ['artikel']


# ---- In Python -----------------------------------------------------------------------------------


def test_fit_in_python_goes_on_where_a_run_is_and_returns_a_predictor(run, shop, preset):
  model = molt_jax.fit(
    shop / 'artikel.csv',
    label='Kategorie',
    text=['Titel', 'Beschreibung'],
    workdir=run[0],
    preset=str(preset),
  )
  assert model.predict(text='Ein Würfel')['text'] and model.class_names == sorted(COLOURS)


def test_a_data_frame_is_the_file_that_it_was_read_from(run, shop, preset, tmp_path):
  frame = pd.read_csv(shop / 'artikel.csv', sep=';', encoding='cp1252')
  photos = [None if pd.isna(path) else shop / path for path in frame['Foto']]
  photos[3] = photos[3].read_bytes()
  frame['Foto'] = pd.Series(photos, dtype=object)
  frame['Teil'] = 'train'
  frame.loc[frame.index[-9:], 'Teil'] = ['test', 'Validation', 'dev'] * 3
  options = as_config.Options(label='Kategorie', text=['Titel', 'Beschreibung'], split='Teil')
  config, facts = as_config.configure(frame, options, CLASSIFIER.load(str(preset)), tmp_path)
  assert config.dataset.path.startswith(str(tmp_path / 'data'))
  assert facts['table']['image'] == ['Foto'] and facts['table']['unused'] == ['Nr', 'Preis']
  data = datasets.load_dataset(config)
  assert {split: len(source) for split, source in data.splits.items()} == {
    'train': 50,
    'validation': 6,
    'test': 3,
  }
  assert [(x.file, x.row) for x in data.aside] == [('data.arrow', 10)]
  examples = {}
  for source in datasets.load_dataset(CLASSIFIER.read_run(run[0])).splits.values():
    examples |= {int(x['id'].split(':')[1]) - 2: x for x in source}
  for x in data.splits['train']:
    as_file = examples[int(x['id'].split(':')[1])]
    assert {**x, 'id': ''} == {**as_file, 'id': ''}
  # Where the folder of the run was moved, the table in it is found.
  (tmp_path / 'data').rename(tmp_path / 'elsewhere')
  assert memory.moved(config.dataset.path, tmp_path) == config.dataset.path
  (tmp_path / 'run').mkdir()
  (tmp_path / 'elsewhere').rename(tmp_path / 'run' / 'data')
  found = memory.moved(config.dataset.path, tmp_path / 'run')
  assert found.startswith(str(tmp_path / 'run')) and found.endswith('data.arrow')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'labl': 'x'}, "no argument 'labl'; did you mean"),
    ({'label': 'sort'}, "--label: data has no column 'sort'; it has text, label"),
    ({'test': 1.5}, '--test: 1.5 is no share'),
    ({'separator': '::'}, '--separator'),
    ({'image': '', 'text': ''}, 'no column of images and none of text'),
    ({'preset': 'fats'}, "preset='fats'; give fast, good, best, a config (hateful_memes"),
    ({'preset': 'fats.py'}, "--config: no file 'fats.py'"),
  ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, preset):
  data = {'text': ['a b', 'c d'] * 10, 'label': ['x', 'y'] * 10}
  with pytest.raises(UserError) as error:
    molt_jax.fit(data, **{'workdir': tmp_path, 'preset': str(preset), **arguments})
  assert message in str(error.value) and '\n' not in str(error.value)
