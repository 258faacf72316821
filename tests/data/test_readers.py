"""Tables as people have them: kinds of files, columns, splits, several images, addresses."""

import csv
import functools
import gzip
import http.server
import io
import json
import pickle
import threading
import zipfile

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from PIL import Image

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, pictures
from molt_jax.data.sources import images_of
from molt_jax.data.tables import layout, memory, roles, row_values, rows
from molt_jax.data.tables.csv_files import Dialect
from molt_jax.errors import UserError

COLOURS = ('red', 'green', 'blue')


def png(colour, size=(6, 5)):
  buffer = io.BytesIO()
  Image.new('RGB', size, colour).save(buffer, 'PNG')
  return buffer.getvalue()


def load(path, **fields):
  """Loads a table leniently, rows of test held out unless they are given."""
  config = CLASSIFIER.default()
  config.dataset.path = str(path)
  config.dataset.table.update(odd_rows='set_aside', test_fraction=0.25)
  for name, value in fields.items():
    part, _, leaf = name.rpartition('__')
    (config.dataset.table if part == 'table' else config.dataset)[leaf] = value
  return datasets.load_dataset(config)


def examples(data):
  """Returns row -> (image, text, label) of all splits."""
  found = {}
  for source in data.splits.values():
    for x in source:
      found[x['id'].rpartition(':')[2]] = x['image'], x['text'], data.class_names[x['label']]
  return found


def some_rows(count=24):
  return [
    {'image': f'{n}.png', 'text': f'thing number {n}', 'label': COLOURS[n % 3]}
    for n in range(count)
  ]


@pytest.fixture
def folder(tmp_path):
  for n in range(24):
    (tmp_path / f'{n}.png').write_bytes(png((n, 2 * n, 90)))
  return tmp_path


def expected(first):
  """Returns what `some_rows` are where the first is numbered so."""
  return {
    str(n + first): (png((n, 2 * n, 90)), f'thing number {n}', COLOURS[n % 3]) for n in range(24)
  }


# ---- Kinds of files ------------------------------------------------------------------------------


def write_csv(file, encoding='utf-8', **how):
  with open(file, 'w', encoding=encoding, newline='') as stream:
    writer = csv.DictWriter(stream, ['image', 'text', 'label'], **how)
    writer.writeheader()
    writer.writerows(some_rows())


def frame(file):
  """Returns a table whose images are bytes, of which the file needs no others."""
  images = [png((n, 2 * n, 90)) for n in range(24)]
  return pd.DataFrame(some_rows()).assign(image=images)


FILES = {
  'commas.csv': (write_csv, 2),
  'semicolons.csv': (functools.partial(write_csv, delimiter=';'), 2),
  'bars.txt': (functools.partial(write_csv, delimiter='|'), 2),
  'tabs.tsv': (functools.partial(write_csv, delimiter='\t'), 2),
  'utf-16.csv': (functools.partial(write_csv, encoding='utf-16'), 2),
  'utf-32.csv': (functools.partial(write_csv, encoding='utf-32', delimiter=';'), 2),
  'mark.csv': (functools.partial(write_csv, encoding='utf-8-sig'), 2),
  'list.json': (lambda file: file.write_text(json.dumps(some_rows(), indent=1)), 1),
  'lines.ndjson': (lambda file: file.write_text('\n'.join(map(json.dumps, some_rows()))), 1),
  'compressed.csv.gz': (lambda file: pd.DataFrame(some_rows()).to_csv(file, index=False), 2),
  'compressed.jsonl.gz': (
    lambda file: pd.DataFrame(some_rows()).to_json(file, orient='records', lines=True),
    1,
  ),
  'sheet.xlsx': (lambda file: pd.DataFrame(some_rows()).to_excel(file, index=False), 2),
  'paths.parquet': (lambda file: pd.DataFrame(some_rows()).to_parquet(file), 0),
  'bytes.parquet': (lambda file: frame(file).to_parquet(file, row_group_size=5), 0),
  'bytes.feather': (lambda file: pa.feather.write_feather(frame(file), str(file)), 0),
}


@pytest.mark.parametrize('name', FILES)
def test_every_kind_of_file_has_the_same_rows(folder, name):
  write, first = FILES[name]
  write(folder / name)
  data = load(folder / name)
  assert examples(data) == expected(first)
  assert {split: len(source) for split, source in data.splits.items()} == {
    'train': 16,
    'validation': 2,
    'test': 6,
  }
  source = data.splits['train']
  assert source.ids[0].startswith(f'{name}:') and pickle.loads(pickle.dumps(source))[3] == source[3]


def test_a_line_that_names_the_separator_is_no_header(folder):
  write_csv(folder / 'a.csv', delimiter=';')
  (folder / 'a.csv').write_text('sep=;\n' + (folder / 'a.csv').read_text())
  assert examples(load(folder / 'a.csv')) == expected(3)


def test_images_of_parquet_files_are_read_when_they_are_asked_for(folder, monkeypatch):
  frame(None).to_parquet(folder / 'a.parquet', row_group_size=5)
  read = []
  open_file = pictures.Cell.read
  monkeypatch.setattr(pictures.Cell, 'read', lambda cell: read.append(cell) or open_file(cell))
  source = load(folder / 'a.parquet').splits['train']
  held_out = len(read)  # Images of one size are compared.
  assert source.present.all() and source.read(0, image=False)['image'] is None
  assert len(read) == held_out
  image = source[0]['image']
  assert len(read) == held_out + 1 and image.startswith(b'\x89PNG')


def save_as_datasets(folder, table, features):
  """Writes what `datasets` 5.2 writes: an Arrow stream, state.json and dataset_info.json."""
  folder.mkdir(parents=True)
  written = json.dumps({'info': {'features': features}})
  schema = table.schema.with_metadata({'huggingface': written})
  file = folder / 'data-00000-of-00001.arrow'
  with pa.OSFile(str(file), 'wb') as sink, pa.ipc.new_stream(sink, schema) as writer:
    writer.write_table(table.cast(schema), max_chunksize=7)
  (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': file.name}]}))
  (folder / 'dataset_info.json').write_text(json.dumps({'features': features}))


def test_a_folder_saved_by_datasets(folder):
  images = [{'bytes': png((n, 2 * n, 90)), 'path': None} for n in range(24)]
  images[3] = {'bytes': None, 'path': str(folder / '3.png')}
  labels = [n % 3 for n in range(24)]
  labels[5] = -1  # As `datasets` has it where a label is not known.
  table = pa.table(
    {
      'image': pa.array(images, pa.struct([('bytes', pa.binary()), ('path', pa.string())])),
      'text': [f'thing number {n}' for n in range(24)],
      'label': pa.array(labels, pa.int64()),
    }
  )
  features = {
    'image': {'_type': 'Image'},
    'text': {'dtype': 'string', '_type': 'Value'},
    'label': {'names': list(COLOURS), '_type': 'ClassLabel'},
  }
  save_as_datasets(folder / 'saved/train', table.slice(0, 18), features)
  save_as_datasets(folder / 'saved/test', table.slice(18), features)
  (folder / 'saved/dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  data = load(folder / 'saved')
  assert data.class_names == ('blue', 'green', 'red') and len(data.splits['test']) == 6
  train = {x['id']: x for split in ('train', 'validation') for x in data.splits[split]}
  for n in range(18):
    x = train[f'train/data-00000-of-00001.arrow:{n}']
    assert x['image'] == png((n, 2 * n, 90)) and x['text'] == f'thing number {n}'
    label = -1 if n == 5 else data.class_names.index(COLOURS[n % 3])
    assert x['label'] == label


def test_folders_of_images_named_by_class(tmp_path):
  for split in ('train', 'val', 'test'):
    for n in range(9):
      path = tmp_path / split / COLOURS[n % 3] / f'{n}.PNG'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(png((n, len(split), 3)))
  (tmp_path / 'train' / 'red' / 'notes.txt').write_text('no image')
  data = load(tmp_path, modalities='image')
  assert data.class_names == ('blue', 'green', 'red')
  assert {split: len(source) for split, source in data.splits.items()} == dict.fromkeys(
    ('train', 'validation', 'test'), 9
  )
  (x,) = [x for x in data.splits['validation'] if x['id'] == 'val:green/4.PNG']
  assert x['image'] == png((4, 3, 3)) and data.class_names[x['label']] == 'green'


def test_metadata_beside_images_and_numbered_files(folder):
  for n, split in enumerate(('train', 'train', 'test')):
    part = [{'file_name': f'{k}.png', **x} for k, x in enumerate(some_rows())][8 * n : 8 * n + 8]
    if split == 'train':
      pd.DataFrame(part).to_parquet(folder / f'train-0000{n}-of-00002.parquet')
    else:
      write = '\n'.join(map(json.dumps, part))
      (folder / 'test.jsonl').write_text(write)
  assert sorted(layout.find(folder, Dialect())) == ['test', 'train']
  data = load(folder, table__image='file_name')
  assert len(data.splits['train']) + len(data.splits['validation']) == 16
  assert {x.partition(':')[0] for source in data.splits.values() for x in source.ids} == {
    'train-00000-of-00002.parquet',
    'train-00001-of-00002.parquet',
    'test.jsonl',
  }
  metadata = folder / 'images'
  metadata.mkdir()
  pd.DataFrame(some_rows()).to_csv(metadata / 'metadata.csv', index=False)
  for n in range(24):
    (folder / f'{n}.png').rename(metadata / f'{n}.png')
  assert examples(load(metadata)) == expected(2)


MISTAKES = {
  'nothing': (lambda folder: folder / 'no.csv', 'is not a folder, and no file'),
  'database': (lambda folder: write(folder / 'a.sqlite', b'x'), 'a kind that is not read'),
  'no spreadsheet': (
    lambda folder: write(folder / 'a.xlsx', zipped()),
    'cannot be read as a spreadsheet',
  ),
  'two tables': (
    lambda folder: write(folder / 'a.csv', b'x') and write(folder / 'b.csv', b'x').parent,
    'has several tables (a.csv, b.csv)',
  ),
  'no gzip': (lambda folder: write(folder / 'a.csv.gz', b'image,text,label'), 'Not a gzipped file'),
  'half of one': (
    lambda folder: write(folder / 'a.csv.gz', gzip.compress(b'image,text,label' * 9)[:-9]),
    'is damaged',
  ),
  'a compressed database': (lambda folder: write(folder / 'a.db.gz', b'x'), '(.db.gz)'),
  'no Parquet': (lambda folder: write(folder / 'a.parquet', b'PAR1'), 'cannot be read as Parquet'),
  'no Arrow': (lambda folder: write(folder / 'a.arrow', b'ARROW1'), 'cannot be read as Arrow'),
  'no JSON': (lambda folder: write(folder / 'a.json', b'[1, 2'), 'a.json is not valid JSON'),
  'an odd encoding': (
    lambda folder: write(folder / 'a.csv', 'image,text,label\n'.encode('utf-16-le')),
    'has zero bytes in its first line',
  ),
  'not Windows-1252 either': (
    lambda folder: write(folder / 'a.csv', b'image,text,label\n,\x81\xe9,x\n'),
    'give its encoding',
  ),
  'one label a row': (
    lambda folder: write(folder / 'a.csv', b'image,text,label\n,a b,7\n,c d,7\n'),
    "has one class only, '7'",
  ),
}


def zipped():
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as file:
    file.writestr('xl/workbook.xml', '')
  return buffer.getvalue()


def write(path, content):
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line(tmp_path, name):
  make, message = MISTAKES[name]
  with pytest.raises(UserError) as error:
    load(make(tmp_path))
  assert message in str(error.value) and '\n' not in str(error.value)


# ---- Odd rows ------------------------------------------------------------------------------------

ODD = b"""image,text,label
0.png,fine,red
1.png,\xc3\xbcber,green
gone.png,text remains,red
gone.png,,red
2.png,"one, two",red,more
3.png,,
,,green
4.png,x,b'cat'
5.png,y,green,
6.png,nan,red
7.png,z,green
"""


def test_odd_rows_are_set_aside_with_their_reasons(folder, capsys):
  write(folder / 'a.csv', ODD)
  data = load(folder / 'a.csv')
  assert [(row, reason.split(':')[0]) for _, row, reason in data.aside] == [
    (5, 'both image and text are empty (its image is not there'),
    (6, 'has 4 cells, the header 3'),
    (8, 'both image and text are empty'),
    (9, 'label is a list, dict, bytes or object that was written as text ("b\'cat\'")'),
  ]
  found = capsys.readouterr().err
  assert 'set aside: 4 odd rows: a.csv row 5:' in found
  assert '2 of 9 images are not there, taken as absent: row 4 gone.png (no such file)' in found
  assert "row 11: text is a word that tables write for nothing ('nan')" in found
  kept = {row for source in data.splits.values() for row in source.ids}
  assert kept == {f'a.csv:{row}' for row in (2, 3, 4, 7, 10, 11, 12)}
  text = rows.aside_as_csv([rows.Aside(*row) for row in data.aside])
  assert [row['row'] for row in csv.DictReader(io.StringIO(text))] == ['5', '6', '8', '9']


def test_one_damaged_byte_does_not_make_utf8_another_encoding(folder, capsys):
  write(
    folder / 'a.csv', ODD.replace(b'text remains', 'größer \udcff'.encode(errors='surrogateescape'))
  )
  texts = [x[1] for x in examples(load(folder / 'a.csv')).values()]
  assert 'größer \ufffd' in texts and 'über' in texts
  assert '1 bytes are not UTF-8, the first in line 4: read as U+FFFD' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'image,text,label\n' + b'gone.png,x,red\n' * 6, 'a.csv: 6 of 6 images are not there'),
    (b'image,text,label\n,x,red\n,,red\n,,green\n', '2 of 3 rows cannot be used; rows 3, 4: both'),
  ],
)
def test_where_most_rows_are_odd_nothing_is_set_aside(folder, content, message):
  write(folder / 'a.csv', content)
  with pytest.raises(UserError, match=message):
    load(folder / 'a.csv')


def test_words_for_nothing_are_the_users_if_he_names_them(folder):
  damage = ('None', 'scratch', 'dent')
  text = ''.join(f',car {n},{damage[n % 3]}\n,-,dent\n' for n in range(9))
  write(folder / 'a.csv', b'image,text,label\n' + text.encode())
  data = load(folder / 'a.csv')
  assert data.class_names == ('dent', 'scratch') and len(data.aside) == 3
  data = load(folder / 'a.csv', table__null_words='-')
  assert data.class_names == ('None', 'dent', 'scratch') and len(data.aside) == 9


def test_several_labels_and_none_of_them(folder, capsys):
  lines = ['{"text": "a", "label": ["x", "y"]}', '{"text": "b", "label": []}'] * 6
  write(folder / 'a.jsonl', '\n'.join(lines).encode())
  data = load(folder / 'a.jsonl', multi_label=True, modalities='text')
  assert data.class_names == ('x', 'y') and not data.aside
  assert set(data.splits['train'].labels) == {(0, 1), ()}
  found = capsys.readouterr().err
  assert 'a.jsonl rows 2, 4, 6, 8, 10 and 1 more: label is empty: taken as none' in found


def test_labels_that_are_no_classes_are_asked_about(folder):
  text = ''.join(f',thing {n},{n}.5\n' for n in range(40))
  write(folder / 'a.csv', b'image,text,label\n' + text.encode())
  with pytest.raises(UserError, match='label has 40 different values in 40 rows'):
    load(folder / 'a.csv')


def test_paths_as_windows_writes_them(folder):
  (folder / 'sub').mkdir()
  (folder / '0.png').rename(folder / 'sub' / '0.png')
  text = 'sub\\0.png,x,red\n1.png,y,blue\n' * 5
  write(folder / 'a.csv', b'image,text,label\n' + text.encode())
  assert {x[0] for x in examples(load(folder / 'a.csv')).values()} == {
    png((n, 2 * n, 90)) for n in (0, 1)
  }


def test_a_modality_that_is_not_used_needs_no_column(folder):
  write(folder / 'a.csv', 'text,label\n' + ''.join(f'thing {n},{"ab"[n % 2]}\n' for n in range(9)))
  config = CLASSIFIER.default()
  config.dataset.path, config.dataset.modalities = str(folder / 'a.csv'), 'text'
  config.dataset.table.test_fraction = 0.3
  assert len(datasets.load_dataset(config).splits['test']) == 3
  config.dataset.modalities = 'image,text'
  with pytest.raises(UserError, match='lacks the column image'):
    datasets.load_dataset(config)


# ---- Columns -------------------------------------------------------------------------------------


def assigned(data, **given):
  given = dict.fromkeys(('image', 'text', 'label', 'split')) | given
  return roles.assign(memory.open_table(data, 'data'), **given)


SHOP = {
  'sku': [f'SKU-{n}' for n in range(30)],
  'title': ['Classic owl', 'Eco worm', None] * 10,
  'description': ['Made in Portugal; hand wash only.'] * 30,
  'photo': [f'photos/{n}.JPG' for n in range(30)],
  'price': [3.5] * 30,
  'category': ['Toys', 'Food', 'Food'] * 10,
}


def test_columns_of_a_shop_are_guessed():
  found = assigned(SHOP)
  assert found == roles.Roles(
    image=('photo',),
    text=('title', 'description'),
    label='category',
    split='',
    several=False,
    guessed=('image', 'text', 'label', 'split'),
    unused=('sku', 'price'),
  )
  found = assigned(SHOP, text=['title'], image=())
  assert found.image == () and found.text == ('title',) and found.guessed == ('label', 'split')


def test_a_label_of_another_name_is_the_column_of_few_values():
  data = {'remark': [f'a longer remark {n}' for n in range(30)], 'art': ['gut', 'schlecht'] * 15}
  found = assigned(data | {'set': ['train', 'dev', 'Test'] * 10})
  assert (found.text, found.label, found.split) == (('remark',), 'art', 'set')
  data['farbe'] = ['rot', 'blau'] * 15
  with pytest.raises(UserError, match="which column is the label.*'art' and 'farbe' may be it"):
    assigned(data)


@pytest.mark.parametrize(
  'columns',
  [
    {
      'photos/1.jpg': ['photos/2.jpg'] * 20,
      'a thing': ['b thing'] * 20,
      'Toys': ['Food', 'Toys'] * 10,
    },
    {'a red thing': ['a blue thing'] * 20, 'Toys': ['Food', 'Toys'] * 10},
  ],
)
def test_a_first_line_of_cells_is_no_header(columns):
  with pytest.raises(UserError, match='which look like cells: put a line above it'):
    assigned(columns)


def test_empty_columns_are_nothing():
  found = assigned({'image': [None] * 4, 'text': ['a b'] * 4, 'label': ['x', 'y'] * 2})
  assert found.image == () and found.unused == ('image',)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'label': 'Category'}, "--label: data has no column 'Category'; did you mean 'category'?"),
    ({'image': ['foto']}, "--image: data has no column 'foto'; did you mean 'photo'?"),
    ({'text': ['xyzzy']}, "--text: data has no column 'xyzzy'; it has sku, title"),
  ],
)
def test_a_column_that_is_not_there_is_named(given, message):
  with pytest.raises(UserError) as error:
    assigned(SHOP, **given)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ('parts', 'text'),
  [
    (['a title', 'a body'], 'a title. a body'),
    (['A title!', ' a body '], 'A title! a body'),
    (['only'], 'only'),
    ([' as it is '], ' as it is '),
    ([], None),
    (['a', 'b:', 'c'], 'a. b: c'),
  ],
)
def test_texts_of_several_columns_become_one(parts, text):
  assert row_values.joined(parts) == text


# ---- Splits --------------------------------------------------------------------------------------


def test_rows_of_one_text_image_or_group_are_never_in_two_splits(folder):
  lines = [
    {
      'image': f'{n % 20}.png',
      'text': f'{"Thing" if n % 2 else "thing,"} no {n // 2}',
      'who': n % 9,
    }
    for n in range(60)
  ]
  frame = pd.DataFrame(lines).assign(label=[COLOURS[n % 3] for n in range(60)])
  frame['image'] = None
  frame.to_parquet(folder / 'a.parquet')
  split_of = {}
  for split, source in load(folder / 'a.parquet', modalities='text').splits.items():
    for x in source:
      split_of.setdefault(x['text'].lower().replace(',', ''), set()).add(split)
  assert all(len(splits) == 1 for splits in split_of.values()) and len(split_of) == 30
  data = load(folder / 'a.parquet', modalities='text', table__group='who')
  groups = {
    split: {int(x.split(':')[1]) % 9 for x in source.ids} for split, source in data.splits.items()
  }
  assert not groups['train'] & groups['test'] and not groups['train'] & groups['validation']
  assert all(groups.values())


def test_phrases_and_placeholders_bind_nothing(folder):
  write(folder / 'none.png', png('grey'))
  lines = [{'image': 'none.png', 'text': 'no text', 'label': COLOURS[n % 3]} for n in range(60)]
  pd.DataFrame(lines).to_parquet(folder / 'a.parquet')
  data = load(folder / 'a.parquet')
  assert [len(source) for source in data.splits.values()] == [41, 4, 15]


def test_a_column_says_which_split_a_row_is_in(folder, capsys):
  words = ['train'] * 14 + ['Training', 'dev', 'VALID', 'test', 'test', 'eval', 'holdout', 'test']
  table = pd.DataFrame(some_rows(22)).assign(part=words)
  table.loc[21, 'label'] = None
  table.to_csv(folder / 'a.csv', index=False)
  data = load(folder / 'a.csv', table__split='part')
  assert {split: len(source) for split, source in data.splits.items()} == {
    'train': 15,
    'validation': 2,
    'test': 3,
  }
  assert [(row, reason) for _, row, reason in data.aside] == [
    ('22', "part is 'holdout', none of train, validation, test"),
    ('23', 'label is empty'),
  ]
  with pytest.raises(UserError, match="a.csv:22: part is 'holdout'"):
    load(folder / 'a.csv', table__split='part', table__odd_rows='refuse')


def test_one_split_is_read_as_with_the_others(folder):
  write_csv(folder / 'a.csv')
  config = CLASSIFIER.default()
  config.dataset.path = str(folder / 'a.csv')
  config.dataset.table.test_fraction = 0.25
  whole = datasets.load_dataset(config)
  for split, source in whole.splits.items():
    alone = datasets.load_split(config, split).splits[split]
    assert alone.ids == source.ids


# ---- Several images ------------------------------------------------------------------------------


def test_several_images_of_a_row(folder, capsys):
  lines = ['image,more,text,label']
  lines += [f'{n}.png|gone.png,{n + 1}.png,,{COLOURS[n % 3]}' for n in range(9)]
  lines += [f'{n}.png,,,{COLOURS[n % 3]}' for n in range(9, 23)]
  write(folder / 'a.csv', '\n'.join(lines).encode())
  data = load(folder / 'a.csv', table__image='image,more', table__text='')
  source = data.splits['train']
  assert source.most_images == 2 and '9 of 41 images are not there' in capsys.readouterr().err
  for x in source:
    n = int(x['id'].split(':')[1]) - 2
    images = [png((k, 2 * k, 90)) for k in ([n, n + 1] if n < 9 else [n])]
    assert images_of(x) == images and x['image'] == images[0]
  assert len(np.unique(source.contents[:, 0])) > 1


# ---- Addresses -----------------------------------------------------------------------------------


@pytest.fixture
def server(folder):
  """The address of a folder, and what was asked for."""
  asked = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(folder))

    def log_message(self, *args):
      asked.append(self.path)

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{running.server_port}', asked
    running.shutdown()


def test_images_at_addresses_are_fetched_once_and_failures_are_absent(folder, server, tmp_path):
  address, asked = server
  table = [
    {
      'image': f'{address}/{n if n < 5 else "gone"}.png',
      'text': f'thing {n}',
      'label': COLOURS[n % 3],
    }
    for n in range(6)
  ]
  memory_file = fsspec.filesystem('memory').open('/z.png', 'wb')
  memory_file.write(png('white'))
  memory_file.close()
  table.append({'image': 'memory://z.png', 'text': 'in memory', 'label': 'red'})
  pd.DataFrame(table * 2).to_json(folder / 'a.jsonl', orient='records', lines=True)
  fields = {'data_dir': str(tmp_path / 'kept'), 'table__odd_rows': 'refuse'}
  train = load(folder / 'a.jsonl', **fields).splits['train']
  count = len(asked)
  assert len(list((tmp_path / 'kept' / 'images').iterdir())) == 6
  for index, row in enumerate(train.rows):
    if 'gone' in row.image.url:
      with pytest.raises(OSError, match='gone.png'):
        train.read(index, image=True)
    elif row.image.url.startswith('http'):
      n = int(row.image.url.rpartition('/')[2].partition('.')[0])
      assert train[index]['image'] == png((n, 2 * n, 90))
    else:
      assert train[index]['image'] == png('white')
  load(folder / 'a.jsonl', **fields)
  assert len(asked) == count  # What failed is not tried again by this process.


def test_an_address_of_an_unknown_kind_is_one_line(folder):
  write(folder / 'a.csv', b'image,text,label\n' + b'xyzzy://a/b.png,x,red\n,y,blue\n' * 9)
  with pytest.raises(UserError, match='images at addresses xyzzy:// cannot be fetched'):
    load(folder / 'a.csv', table__test_fraction=0.5)
