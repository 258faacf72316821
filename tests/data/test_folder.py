"""Preparing published data sets: the same files twice, nothing half done, nothing lost silently,
counts asserted.
"""

import csv
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from array_record.python import array_record_data_source
from PIL import Image
from tensorflow_datasets.core import shuffle

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, transforms
from molt_jax.errors import UserError
from molt_jax.runtime.command_line import parse
from molt_jax.runtime.flags import Flag


def config_for(name, source, data_dir, **changes):
  config = CLASSIFIER.default()
  values = {
    'dataset.name': name,
    'dataset.path': str(source),
    'dataset.data_dir': str(data_dir),
    'dataset.multi_label': name == 'mm_imdb',
    'dataset.allow_count_mismatch': True,
    **changes,
  }
  for field, value in values.items():
    resolved.set_field(config, field, value)
  return config


def load(name, source, data_dir, **changes):
  return datasets.load_dataset(config_for(name, source, data_dir, **changes))


def examples(dataset, split):
  source = dataset.splits[split]
  return {source.ids[n]: source[n] for n in range(len(source))}


def files_of(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def facts_of(data_dir):
  return json.loads(next(data_dir.rglob('metadata.json')).read_text())


# ---- MM-IMDb -------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', ['official', 'images_labels', 'image_meta_data'])
def test_every_layout_of_mm_imdb_gives_the_same_examples(miniature, tmp_path, layout):
  source = miniature('mm_imdb', layout)
  dataset = load('mm_imdb', source, tmp_path)
  assert {split: len(rows) for split, rows in dataset.splits.items()} == {
    'train': 24,
    'validation': 12,
    'test': 12,
  }
  train = examples(dataset, 'train')
  for movie in ('0001000', '0001007', '0001049'):
    record = json.loads(next(source.rglob(f'{movie}.json')).read_text())
    assert train[movie]['text'] == max(record['plot'], key=len)
    assert {dataset.class_names[k] for k in train[movie]['label']} == set(record['genres'])
    assert (
      train[movie]['image'] == next(source.rglob(f'{movie}.jpeg')).read_bytes()
    )  # The file's own bytes.
  assert (
    train['0001014']['image'] is None
    and train['0001021']['image'] is None
    and train['0001028']['text'] is None
  )
  assert train['0001042']['label'] == tuple(
    sorted(dataset.class_names.index(name) for name in ('Horror', 'Family'))
  )  # News is no class.
  assert '0001035' not in train and train['0001000#1']['text'] == train['0001000']['text']
  assert np.array_equal(
    dataset.splits['train'].present,
    [[x['image'] is not None, x['text'] is not None] for x in train.values()],
  )
  facts = facts_of(tmp_path)
  records = {'official': 'dataset', 'images_labels': 'labels', 'image_meta_data': 'meta_data'}[
    layout
  ]
  assert facts['left_out'] == [['train', '0001035', f'no {records}/0001035.json']]
  assert facts['repeated'] == [['0001000', 'train', 'train']] and set(facts['lost_images']) == {
    '0001014.jpeg',
    '0001021.jpeg',
  }


@pytest.mark.parametrize('choice', ['longest', 'outline', 'first', 'all'])
def test_the_text_of_a_movie_is_chosen(miniature, tmp_path, choice):
  source = miniature('mm_imdb')
  train = examples(load('mm_imdb', source, tmp_path, **{'dataset.mm_imdb.text': choice}), 'train')
  record = json.loads(next(source.rglob('0001056.json')).read_text())
  assert len(record['plot']) == 3 and 'plot outline' not in record
  outlined = json.loads(next(source.rglob('0001007.json')).read_text())
  wanted = max(record['plot'], key=len) if choice == 'longest' else record['plot'][0]
  assert train['0001056']['text'] == wanted
  assert train['0001007']['text'] == {
    'outline': outlined['plot outline'],
    'longest': max(outlined['plot'], key=len),
  }.get(choice, outlined['plot'][0])
  if choice == 'all':
    assert [train[f'0001056/{n}']['text'] for n in (1, 2)] == record['plot'][1:]
    assert (
      train['0001056/2']['image'] == train['0001056']['image']
      and facts_of(tmp_path)['counts']['train'] == 24
    )
  assert facts_of(tmp_path)['choices'] == {'genres': 'all', 'text': choice}


def test_the_papers_genre_filter_leaves_out_movies_with_another_genre(miniature, tmp_path):
  dataset = load('mm_imdb', miniature('mm_imdb'), tmp_path, **{'dataset.mm_imdb.genres': 'paper'})
  assert '0001042' not in dataset.splits['train'].ids and len(dataset.splits['train']) == 23
  facts = facts_of(tmp_path)
  assert facts['left_out_by_rule'] == {'a genre beside the 23': 3}  # One a split.
  assert facts['published'] == {'train': 15510, 'validation': 2599, 'test': 7779, 'classes': 23}
  # The four genres beside the 23 are carried by News 64, Adult 4, Talk-Show 2, Reality-TV 1 movies:
  # what the paper lacks of the official split.
  assert sum((15552, 2608, 7799)) - sum((15510, 2599, 7779)) == 64 + 4 + 2 + 1


# ---- UPMC-Food101 --------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', ['titles', 'flat'])
def test_food101_titles_have_no_header_and_validation_is_set_aside_by_seed(
  miniature, tmp_path, layout
):
  source = miniature('upmc_food101', layout)
  dataset = load('upmc_food101', source, tmp_path, seed=1)
  with open(source / 'texts/train_titles.csv', encoding='utf-8', newline='') as file:
    rows = {name: (title, label) for name, title, label in csv.reader(file)}
  train = examples(dataset, 'train') | examples(dataset, 'validation')
  assert (
    len(rows) == len(dataset.splits['train']) + len(dataset.splits['validation']) == 24
    and len(dataset.splits['test']) == 12
  )
  assert {
    name: (x['text'] or '', dataset.class_names[x['label']]) for name, x in train.items()
  } == rows
  assert (
    train['cheese_plate_1-2.jpg']['image']
    == next(source.rglob('cheese_plate_1-2.jpg')).read_bytes()
  )
  assert (
    {name for name, x in train.items() if x['image'] is None}
    == {'pizza_2.jpg', 'apple_pie_3.jpg'}
    == set(facts_of(tmp_path)['lost_images'])
  )
  again, other = (
    load('upmc_food101', source, tmp_path, seed=seed).splits['validation'].ids for seed in (1, 2)
  )
  assert again == dataset.splits['validation'].ids != other


def test_food101_pages_leave_out_what_has_none(miniature, tmp_path):
  source = miniature('upmc_food101', 'pages')
  dataset = load('upmc_food101', source, tmp_path, **{'dataset.upmc_food101.text': 'page'})
  train = examples(dataset, 'train') | examples(dataset, 'validation')
  assert (
    len(train) == 22
    and 'pizza_5.jpg' not in train
    and facts_of(tmp_path)['left_out_by_rule'] == {'no page': 2}
  )
  page = (source / 'texts_txt/apple_pie/apple_pie_0.txt').read_bytes()
  assert (
    train['apple_pie_0.jpg']['text'] == page.replace(b'\r\n', b'\n').decode('utf-8', 'replace')
    and '\ufffd' in train['apple_pie_0.jpg']['text']
  )
  with pytest.raises(UserError, match='does not hold upmc_food101; expected .* text=page'):
    load(
      'upmc_food101',
      miniature('upmc_food101', 'flat'),
      tmp_path,
      **{'dataset.upmc_food101.text': 'page'},
    )


# ---- SNLI-VE -------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout, suffix', [('flickr30k_images', ''), ('Flickr30K', '.jpg')])
def test_snli_ve_reads_the_hypothesis_alone_and_ids_with_and_without_suffix(
  miniature, tmp_path, layout, suffix
):
  source = miniature('snli_ve', layout)
  dataset = load('snli_ve', source, tmp_path)
  records = [
    json.loads(line) for line in (source / 'snli_ve_test.jsonl').read_text('utf-8').splitlines()
  ]
  assert {record['Flickr30K_ID'].endswith('.jpg') for record in records} == {suffix == '.jpg'}
  test = examples(dataset, 'test')
  assert {name: (x['text'], dataset.class_names[x['label']]) for name, x in test.items()} == {
    record['pairID']: (record['sentence2'], record['gold_label']) for record in records
  }
  for record in records:
    file = next(source.rglob(record['Flickr30K_ID'].removesuffix('.jpg') + '.jpg'))
    assert test[record['pairID']]['image'] == file.read_bytes()
  facts = facts_of(tmp_path)
  assert facts['left_out'] == [['train', '200017.jpg#2r1n', "gold label '-'"]] and facts[
    'repeated'
  ] == [['17.jpg#0r1e', 'train', 'train']]
  assert examples(dataset, 'train')['200017.jpg#1r1e']['image'] is None
  images = array_record_data_source.ArrayRecordDataSource(
    [str(next(tmp_path.rglob('images.array_record')))]
  )
  assert (
    len(images) == len(list(source.rglob('*.jpg'))) - 1
  )  # Each once, whatever the number of its hypotheses; one is cut short.


def test_snli_ve_takes_the_new_labels_of_validation_and_test(miniature, tmp_path):
  source = miniature('snli_ve')
  choice = {'dataset.snli_ve.neutral': 'relabelled'}
  old, new = (
    load('snli_ve', source, tmp_path / 'old'),
    load('snli_ve', source, tmp_path / 'new', **choice),
  )
  for split, file in (('validation', 'dev'), ('test', 'test')):
    with open(source / f'esnlive_{file}.csv', encoding='utf-8', newline='') as stream:
      labels = {row['pairID']: row['gold_label'] for row in csv.DictReader(stream)}
    before, after = examples(old, split), examples(new, split)
    assert {name: new.class_names[x['label']] for name, x in after.items()} == {
      name: labels.get(name, old.class_names[x['label']]) for name, x in before.items()
    }
    changed = sum(before[name]['label'] != after[name]['label'] for name in before)
    assert changed == facts_of(tmp_path / 'new')['notes'][f'{split} labels replaced'] > 0
  assert new.splits['train'].labels == old.splits['train'].labels
  with pytest.raises(UserError, match="'relabelled' needs esnlive_dev.csv and esnlive_test.csv"):
    load('snli_ve', miniature('snli_ve', 'Flickr30K'), tmp_path, **choice)


# ---- Hateful Memes -------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', ['root', 'data'])
def test_hateful_memes_reads_the_test_that_has_labels(miniature, tmp_path, layout):
  source = miniature('hateful_memes', layout)
  dataset = load('hateful_memes', source, tmp_path)
  records = [
    json.loads(line)
    for line in next(source.rglob('test_seen.jsonl')).read_text('utf-8').splitlines()
  ]
  test = examples(dataset, 'test')
  assert {name: (x['text'] or '', x['label']) for name, x in test.items()} == {
    f'{r["id"]:05d}': (r['text'], r['label']) for r in records
  }
  assert test['01270']['image'] == next(
    source.rglob('img/01270.png')
  ).read_bytes() and dataset.class_names == ('not hateful', 'hateful')
  shutil.copytree(source, tmp_path / 'unlabelled')
  next((tmp_path / 'unlabelled').rglob('test_seen.jsonl')).unlink()
  with pytest.raises(UserError, match='test.jsonl, which has no labels; add test_seen.jsonl'):
    load('hateful_memes', tmp_path / 'unlabelled', tmp_path)


# ---- All data sets -------------------------------------------------------------------------------


@pytest.mark.parametrize('dataset', ['mm_imdb', 'upmc_food101', 'snli_ve', 'hateful_memes'])
def test_preparing_twice_gives_the_same_files(miniature, tmp_path, dataset):
  for name in ('one', 'two'):
    load(dataset, miniature(dataset), tmp_path / name)
  assert files_of(tmp_path / 'one') == files_of(tmp_path / 'two') != {}


def test_more_than_tfds_holds_in_memory_needs_no_tensorflow(miniature, tmp_path, monkeypatch):
  monkeypatch.setattr(
    shuffle, 'MAX_MEM_BUFFER_SIZE', 1000
  )  # Past it TFDS imports TensorFlow, which is not here.
  assert (
    len(load('snli_ve', miniature('snli_ve'), tmp_path).splits['train']) == 24
    and shuffle.MAX_MEM_BUFFER_SIZE == 1000
  )


def test_one_corrupt_image_loses_only_that_image_and_says_so(miniature, tmp_path, capsys):
  shutil.copytree(miniature('mm_imdb'), tmp_path / 'source')
  whole = load('mm_imdb', tmp_path / 'source', tmp_path / 'whole')
  file = next((tmp_path / 'source').rglob('0001063.jpeg'))
  file.write_bytes(file.read_bytes()[:200])
  capsys.readouterr()
  damaged = load('mm_imdb', tmp_path / 'source', tmp_path / 'damaged')
  assert (
    'images that cannot be used (their examples have a text alone): 3, '
    in (said := capsys.readouterr().err)
    and '0001063.jpeg (' in said
  )
  for split in whole.splits:
    before, after = examples(whole, split), examples(damaged, split)
    assert [row for row in before if before[row] != after[row]] == (
      ['0001063'] if split == 'train' else []
    )
  assert after.keys() == before.keys() and examples(damaged, 'train')['0001063'] == examples(
    whole, 'train'
  )['0001063'] | {'image': None}


def test_half_a_surrogate_pair_is_replaced(miniature, tmp_path):
  shutil.copytree(miniature('hateful_memes'), tmp_path / 'source')
  file = tmp_path / 'source/test_seen.jsonl'
  first, rest = file.read_text('utf-8').split('\n', 1)
  file.write_text(
    json.dumps(json.loads(first) | {'text': 'half \ud83d of it'}) + '\nno JSON\n' + rest, 'utf-8'
  )
  dataset = load('hateful_memes', tmp_path / 'source', tmp_path / 'data')
  assert dataset.splits['test'][0]['text'] == 'half \ufffd of it'
  assert facts_of(tmp_path / 'data')['left_out'] == [
    ['test', 'test_seen.jsonl:2', 'not JSON: Expecting value at column 1']
  ]


@pytest.mark.parametrize('data', [b'', b'no image', 'truncated', 'cmyk', 'png', 'huge'])
def test_what_is_checked_fast_is_what_decodes(data):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8))
  if isinstance(data, str):
    buffer = io.BytesIO()
    image = (
      Image.new('L', (8200, 8200))
      if data == 'huge'
      else image.convert('CMYK')
      if data == 'cmyk'
      else image
    )
    image.save(buffer, 'PNG' if data in ('png', 'huge') else 'JPEG')
    data = buffer.getvalue()[: 400 if data == 'truncated' else None]

  def fails(function):
    try:
      function(data)
    except transforms.DecodeError as error:
      return str(error)
    return None

  assert fails(transforms.check) == fails(transforms.decode)


SLOW = """
import sys, time
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, transforms
check = transforms.check
def slow(data):
  print('image', file=sys.__stdout__, flush=True)
  time.sleep(0.05)
  check(data)
transforms.check = slow
config = CLASSIFIER.default()
config.dataset.name = 'mm_imdb'
config.dataset.path, config.dataset.data_dir = sys.argv[1:3]
config.dataset.multi_label = config.dataset.allow_count_mismatch = True
datasets.load_dataset(config)
"""


def test_a_killed_preparation_leaves_nothing_that_loads_and_is_swept_away(miniature, tmp_path):
  source, data = miniature('mm_imdb'), tmp_path / 'data'
  command = [sys.executable, '-c', SLOW, str(source), str(data)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    for _ in range(5):
      process.stdout.readline()
    process.kill()
  assert list(data.rglob('incomplete.*')) and not list(data.rglob('metadata.json'))
  assert len(load('mm_imdb', source, data).splits['train']) == 24
  load('mm_imdb', source, tmp_path / 'other')
  assert not list(data.rglob('incomplete.*')) and files_of(data) == files_of(tmp_path / 'other')


def test_two_processes_at_once_prepare_it_once(miniature, tmp_path):
  source, data = miniature('mm_imdb'), tmp_path / 'data'
  command = [sys.executable, '-c', SLOW, str(source), str(data)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    process.stdout.readline()
    assert len(load('mm_imdb', source, data).splits['train']) == 24  # Waits, and finds it done.
    assert process.wait(timeout=60) == 0
  assert len(list(data.rglob('metadata.json'))) == 1


def test_counts_are_asserted_and_differences_printed_row_by_row(miniature, tmp_path, capsys):
  changes = {'dataset.allow_count_mismatch': False}
  for _ in range(2):  # Not prepared; prepared.
    with pytest.raises(
      UserError, match='3 counts of mm_imdb are not the published ones .* --allow_count_mismatch$'
    ):
      load('mm_imdb', miniature('mm_imdb'), tmp_path, **changes)
    said = capsys.readouterr().err.splitlines()
    assert 'mm_imdb train: 24 here, 15,552 published (-15,528)' in said
    assert any(line.startswith('mm_imdb train 0001035 left out: no ') for line in said)
    load('mm_imdb', miniature('mm_imdb'), tmp_path)
    capsys.readouterr()


def test_the_flag_is_the_field():
  given = [
    parse('x', '', (Flag('config', ''),), argv, schema=CLASSIFIER)[1]
    for argv in (
      ['--allow_count_mismatch'],
      ['--allow_count_mismatch=false'],
      ['--config.dataset.allow_count_mismatch=true'],
    )
  ]
  assert given == [{'dataset.allow_count_mismatch': value} for value in ('true', 'false', 'true')]


def test_what_is_prepared_needs_no_source_and_notices_a_changed_one(miniature, tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(miniature('mm_imdb'), source)
  before = examples(load('mm_imdb', source, tmp_path / 'data'), 'test')
  source.rename(tmp_path / 'moved')
  after = load('mm_imdb', source, tmp_path / 'data')
  assert examples(after, 'test') == before
  again = pickle.loads(pickle.dumps(after.splits['test']))
  assert (
    again.ids == list(before)
    and again[3] == before[again.ids[3]]
    and again.read(3, image=False)['image'] is None
  )
  (tmp_path / 'moved').rename(source)
  split = next(source.rglob('split.json'))
  split.write_text(split.read_text() + ' ')
  with pytest.raises(UserError, match='split.json in .* changed since it was prepared; remove '):
    load('mm_imdb', source, tmp_path / 'data')


def empty(folder):
  for path in folder.iterdir():
    shutil.rmtree(path)


def without_images(folder):
  for path in folder.rglob('*.jpeg'):
    path.unlink()


def broken_images(folder):
  for path in folder.rglob('*.jpeg'):
    path.write_bytes(b'<html>404</html>')


def other_split(folder):
  next(folder.rglob('split.json')).write_text('{"train": 3}')


@pytest.mark.parametrize(
  'damage, changes, says',
  [
    (shutil.rmtree, {}, 'is not a folder; give the one that holds split.json with'),
    (empty, {}, 'does not hold mm_imdb; expected split.json with'),
    (without_images, {}, '0 images of mm_imdb are there; expected split.json'),
    (broken_images, {}, 'images of mm_imdb can be decoded'),
    (other_split, {}, 'split.json is not JSON with lists of ids'),
    (lambda folder: None, {'dataset.multi_label': False}, 'give True'),
    (lambda folder: None, {'dataset.data_dir': '/dev/null/x'}, 'cannot be prepared in /dev/null/x'),
  ],
)
def test_mistakes_are_one_line(miniature, tmp_path, damage, changes, says):
  shutil.copytree(miniature('mm_imdb'), tmp_path / 'source')
  damage(tmp_path / 'source')
  with pytest.raises(UserError) as error:
    load('mm_imdb', tmp_path / 'source', tmp_path / 'data', **changes)
  assert says in str(error.value) and '\n' not in str(error.value)
  assert not list(tmp_path.rglob('metadata.json'))


@pytest.mark.parametrize('how', ['gone', 'cut', 'empty', 'other'])
def test_damaged_prepared_files_are_one_line(miniature, tmp_path, how):
  source, data = miniature('hateful_memes'), tmp_path / 'data'
  before = examples(load('hateful_memes', source, data), 'test')
  folder = next(data.rglob('metadata.json')).parent
  damaged = []
  for file in sorted(folder.iterdir()):
    kept = file.read_bytes()
    if how == 'gone':
      file.unlink()
    else:
      contents = {'cut': kept[: len(kept) // 2], 'empty': b'', 'other': b'[1]' * len(kept)}
      file.write_bytes(contents[how])
    try:
      assert examples(load('hateful_memes', source, data), 'test') == before
    except UserError as error:
      assert 'remove that folder' in str(error) and '\n' not in str(error)
      damaged.append(file.name)
    # Without metadata.json nothing is prepared, so it is prepared again.
    file.write_bytes(kept)
  assert {'rows.npz', 'images.array_record', 'dataset_info.json'} <= set(damaged)


# ---- What was prepared ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['metadata.json', 'rows.npz'])
@pytest.mark.parametrize(
  'damage',
  [
    lambda raw: raw[:-9],
    lambda raw: b'',
    lambda raw: raw[:150] + bytes(8) + raw[158:],
    lambda raw: b'{}',
  ],
)
def test_what_was_prepared_and_is_damaged_is_named(miniature, tmp_path, name, damage):
  source = miniature('hateful_memes')
  load('hateful_memes', source, tmp_path)
  path = next(tmp_path.rglob(name))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=f'{path.parent} is damaged .*remove that folder'):
    load('hateful_memes', source, tmp_path).splits['test'].ids  # noqa: B018


def test_contents_change_with_images_and_texts_and_are_unknown_where_they_were_not_prepared(
  miniature, tmp_path
):
  source = load('mm_imdb', miniature('mm_imdb'), tmp_path).splits['train']
  for n in range(len(source)):
    example = source[n]
    image, text = (int(number) for number in source.contents[n])
    assert image == (0 if example['image'] is None else 1 + zlib.crc32(example['image']))
    assert text == (0 if example['text'] is None else 1 + zlib.crc32(example['text'].encode()))
  path = next(tmp_path.rglob('rows.npz'))
  with np.load(path) as table:
    older = {name: table[name] for name in table.files if '_numbers' not in name}
  np.savez(path, **older)
  assert load('mm_imdb', miniature('mm_imdb'), tmp_path).splits['train'].contents is None


# ---- Texts alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['mm_imdb', 'upmc_food101', 'snli_ve', 'hateful_memes'])
def test_images_are_not_asked_for_where_texts_alone_are_used(miniature, tmp_path, name):
  source = tmp_path / 'source'
  shutil.copytree(miniature(name), source)
  texts = {'dataset.modalities': 'text'}
  expected = load(name, source, tmp_path / 'whole')
  assert load(name, source, tmp_path / 'whole', **texts).splits.keys() == expected.splits.keys()
  assert len(list((tmp_path / 'whole').rglob('metadata.json'))) == 1  # It is there already.
  for path in source.rglob('*'):
    if path.suffix in ('.jpg', '.jpeg', '.png'):
      path.unlink()
  for path in sorted(source.rglob('*'), reverse=True):
    if path.is_dir() and not any(path.iterdir()):
      path.rmdir()
  with pytest.raises(UserError, match='expected'):
    load(name, source, tmp_path / 'alone')
  found = load(name, source, tmp_path / 'alone', **texts)
  again = load(name, source, tmp_path / 'alone', **texts)
  for split in ('train', 'test'):
    whole = {i: x for i, x in examples(expected, split).items() if x['text']}
    alone = examples(found, split)
    if name == 'upmc_food101' and split == 'train':  # Another validation split is held out of it.
      whole |= {i: x for i, x in examples(expected, 'validation').items() if x['text']}
      alone |= examples(found, 'validation')
    assert {i: {**x, 'image': None} for i, x in whole.items()} == alone
    assert examples(again, split).keys() == examples(found, split).keys()
