"""Predictions of a run: one at a time, many at once, and every row of a table."""

import csv
import json
import pathlib
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from PIL import Image

import molt_jax
from molt_jax import commands, evaluate, predict, train
from molt_jax.data import examples

RED = (200, 30, 30)


@pytest.fixture(scope='module')
def run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """A run of a few steps."""
  config = make_tiny_config()
  config.train.epochs = 0.5
  config.missing.views, config.missing.distill_weight = False, 0.0  # A smaller program.
  workdir = tmp_path_factory.mktemp('predicted') / 'run'
  train.train(config, workdir)
  return workdir


@pytest.fixture(scope='module')
def model(run):
  return molt_jax.load(run)


def test_texts_are_packed_and_their_neighbours_change_nothing(run, monkeypatch):
  model, batches = molt_jax.load(run), []
  texts = ['a blue square', *map(str, range(31))]
  model.config.text.padding, model.config.eval.batch_size = 'packed', 32
  inside, step = model._forward, model._forward._plain
  monkeypatch.setattr(inside, '_plain', lambda *args: (batches.append(args[-1]), step(*args))[1])
  among = model.predict(text=texts, top_k=3)
  assert batches[0]['token_position'].shape == (1, 64)  # Of 32 x 12.
  model.config.text.padding = 'max_tokens'
  for n, one in ((n, model.predict(text=texts[n], top_k=3)) for n in (0, 9, 31)):
    assert [x['label'] for x in one['labels']] == [x['label'] for x in among[n]['labels']]
    wanted = [x['probability'] for x in one['labels']]
    assert [x['probability'] for x in among[n]['labels']] == pytest.approx(wanted, abs=5e-6)


# ---- Tables -------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with pictures: a good one, a web page named .png."""
  root = tmp_path_factory.mktemp('new')
  Image.new('RGB', (20, 20), RED).save(root / 'a.png')
  (root / 'page.png').write_bytes(b'<!DOCTYPE html><html>not found</html>')
  return root


# image, text; what is there (image, text); part of the problem.
ROWS = (
  ('a.png', 'a red square', (True, True), ''),
  ('', 'a blue square', (False, True), ''),
  ('', '', (False, False), 'both image and text are empty'),
  ('page.png', 'a green square', (False, True), 'a web page'),
  ('gone.png', 'red', (False, True), 'gone.png: no such file'),
  ('a.png', 'nan', (True, False), ''),
  ('page.png', '', (False, False), 'a web page'),
)


def write_table(path, header=('image', 'text'), separator=',', before=()):
  with open(path, 'w', newline='') as file:
    writer = csv.writer(file, delimiter=separator)
    writer.writerow([*before, *header])
    writer.writerows([*('7' for _ in before), *row[:2]] for row in ROWS)
  return path


def expected(model, folder):
  """The answers of `predict`, one row at a time."""
  answers = []
  for image, text, (has_image, has_text), _ in ROWS:
    given = {'image': folder / image if has_image else None, 'text': text if has_text else None}
    found = model.predict(**given, top_k=9, errors='row')['labels']
    answers.append({x['label']: x['probability'] for x in found})
  return answers


@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
def test_every_row_has_its_answer_or_its_reason(run, model, folder, tmp_path, suffix, capsys):
  table = write_table(folder / 'new.csv')
  out = tmp_path / f'scored.{suffix}'
  argv = ['predict', f'--workdir={run}', f'--table={table}', f'--out={out}']
  assert commands.main(argv) == 0
  counts = json.loads(capsys.readouterr().out)
  assert counts == {'rows': 7, 'unanswered': 2, 'problems': 4, 'out': str(out)}
  if suffix == 'csv':
    scored = pd.read_csv(out, keep_default_na=False).to_dict('records')
  else:
    scored = pyarrow.parquet.read_table(out).to_pylist()
  assert [row['row'] for row in scored] == [f'new.csv:{n}' for n in range(2, 9)]
  for row, given, answer in zip(scored, ROWS, expected(model, folder), strict=True):
    assert (row['image'], row['text']) == given[2]
    assert given[3] in row['problem'] and bool(row['problem']) == bool(given[3])
    assert (row['label'] or None) == (max(answer, key=answer.get) if answer else None)
    for name in model.class_names if answer else ():
      assert float(row[f'probability of {name}']) == pytest.approx(answer[name], abs=5e-6)
    if answer:
      assert float(row['probability']) == pytest.approx(max(answer.values()), abs=5e-6)


def test_columns_are_named_or_left_out(run, model, folder, tmp_path, capsys):
  write_table(folder / 'own.tsv', ('Foto', 'Titel'), '\t', before=('label',))
  how = {'image': ['Foto'], 'text': ['Titel']}
  found = model.predict_proba(folder / 'own.tsv', **how)
  assert found == pytest.approx(model.predict_proba(folder / 'new.csv'), abs=1e-6, nan_ok=True)
  shutil.copy(folder / 'own.tsv', tmp_path)
  moved = model.predict_proba(tmp_path / 'own.tsv', **how, image_folder=folder)
  assert np.array_equal(moved, found, equal_nan=True)
  argv = [f'--workdir={run}', f'--table={tmp_path}/own.tsv', f'--image_folder={folder}']
  assert predict.main([*argv, '--image=Foto', '--text=Titel', f'--out={tmp_path}/x.csv']) == 0
  # A table of texts alone.
  capsys.readouterr()
  texts = model.predict_proba({'text': ['a red square', None, 'x']})
  assert 'table has no column image: no row has images' in capsys.readouterr().err
  assert np.isnan(texts[1]).all() and texts[[0, 2]].sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_a_data_frame_gives_a_data_frame(model, folder):
  rows = [(folder / image if image else None, text) for image, text, *_ in ROWS[:2]]
  frame = pd.DataFrame(rows, columns=['image', 'text'], index=['x', 'y'])
  found = model.predict_proba(frame)
  assert list(found.index) == ['x', 'y'] and list(found.columns) == model.class_names
  assert list(model.classes_) == model.class_names
  wanted = [list(answer.values()) for answer in expected(model, folder)[:2]]
  assert np.sort(found.to_numpy()) == pytest.approx(np.sort(wanted), abs=5e-6)


def test_batches_go_one_after_another(model, tmp_path, monkeypatch):
  """More rows than a batch; odd rows at the start, between batches and at the end."""
  size = model.config.eval.batch_size
  texts = [f'red {n}' for n in range(2 * size)]
  for place in (2 * size, size, 0):
    texts.insert(place, '')
  seen = []
  made = examples.make_example
  monkeypatch.setattr(
    examples, 'make_example', lambda index, *a, **k: (seen.append(index), made(index, *a, **k))[1]
  )
  p_nk = model.predict_proba({'text': texts})
  assert len(p_nk) == len(texts) and len(seen) == 2 * size
  assert np.flatnonzero(np.isnan(p_nk).all(axis=1)).tolist() == [0, size + 1, 2 * size + 2]
  answer = {x['label']: x['probability'] for x in model.predict(text=texts[-2], top_k=9)['labels']}
  assert [answer[name] for name in model.class_names] == pytest.approx(p_nk[-2], abs=5e-6)


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--table=new.csv'], '--out: give the file of predictions'),
    (['--out=x.csv', '--text=x'], '--out: it goes with --table'),
    (['--table=new.csv', '--out=x.xlsx'], '.csv or .parquet'),
    (['--table=none.csv', '--out=x.csv'], "'none.csv' is not a folder, and no file"),
    (['--table=new.csv', '--out=x.csv', '--image=photo'], 'new.csv lacks the column photo'),
    (['--table=other.csv', '--out=x.csv'], 'other.csv lacks the column image'),
    (['--table=capital.csv', '--out=x.csv'], "is it 'Image'"),
    (['--table=blank.csv', '--out=x.csv'], 'it needs the columns image, text and at least'),
    (['--table=new.csv', '--out=no/x.csv'], 'no/x.csv cannot be written'),
  ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(run, folder, monkeypatch, capsys, flags, says):
  monkeypatch.chdir(folder)
  write_table(folder / 'new.csv')
  write_table(folder / 'other.csv', ('a', 'b'))
  write_table(folder / 'capital.csv', ('Image', 'text'))
  (folder / 'blank.csv').write_text('image,text\n')
  assert predict.main([f'--workdir={run}', *flags]) == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
  assert says in line and not (folder / 'x.csv').exists()


def test_another_table_is_scored_beside_the_runs_own(run, model, tmp_path):
  own = (run / 'evaluation.json').read_bytes()
  table = pathlib.Path(model.config.dataset.path)
  with open(table / 'test.csv', newline='') as file:
    header, *rows = csv.reader(file)
  image, label = header.index('image'), header.index('label')
  with open(tmp_path / 'more.csv', 'w', newline='') as file:
    for row in [header, *rows[:5]]:
      row[image] = str(table / row[image]) if row[image] and row is not header else row[image]
      csv.writer(file, delimiter=';').writerow(row)
  assert evaluate.main([f'--workdir={run}', f'--table={tmp_path}/more.csv', '--absent=none']) == 0
  assert (run / 'evaluation.json').read_bytes() == own
  record = json.loads((run / 'evaluation_more.json').read_text())
  p_nk = model.predict_proba(tmp_path / 'more.csv')
  right = [model.class_names[p.argmax()] == row[label] for p, row in zip(p_nk, rows, strict=False)]
  assert record['split'] == 'more.csv' and record['num_examples'] == 5
  assert record['results']['none_absent']['accuracy'] == pytest.approx(np.mean(right))
