"""Cells: what is absent, a value or refused, at each entry point, against a table written by
hand.
"""

import copy
import csv
import decimal
import io
import json
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import cells, datasets, formats, given
from molt_jax.data.likeness import lookalikes
from molt_jax.data.published import hateful_memes, mm_imdb, snli_ve, upmc_food101
from molt_jax.data.published.layout import LeftOut
from molt_jax.data.sources import UNLABELLED
from molt_jax.errors import UserError

ABSENT, REFUSED = 'absent', 'refused'
NAN = float('nan')
FLAG = '\U0001f3f4\U000e0067\U000e0062\U000e007f'  # Tag characters after a flag.

# Column, cell, and what it is at every entry point that can hold it: a string in CSV, what JSON has
# in .jsonl, in predict and in the files of published data sets. A value stands in a list.
CASES = [
  # Texts.
  ('text', 'a text', ['a text']),
  ('text', ' kept as it is ', [' kept as it is ']),
  ('text', 'Größe 日本語 😀', ['Größe 日本語 😀']),
  ('text', '42', ['42']),
  ('text', 'nano', ['nano']),
  ('text', "['a', 'b']", ["['a', 'b']"]),
  ('text', None, ABSENT),
  ('text', NAN, ABSENT),
  *(
    ('text', blank, ABSENT)
    for blank in (
      '',
      ' ',
      '\t\n',
      '\u00a0\u2003\u3000',
      '\u200b',
      '\ufeff',
      '\u00ad\u2060',
      '\u3164',
      '\u2800',
    )
  ),
  *(
    ('text', word, ABSENT)
    for word in (
      'nan',
      'NaN',
      'None',
      'NA',
      'N/A',
      'NULL',
      'null',
      '<NA>',
      'NaT',
      '#N/A',
      'none',
      ' NaN ',
      '\ufeffnan',
      '#REF!',
      '\\N',
    )
  ),
  ('text', 'cut \ud83d', ['cut \ufffd']),
  ('text', '\udc00\ud83d\ude00\ud83d.', ['\ufffd\U0001f600\ufffd.']),
  ('text', 'nul\0', ['nul\ufffd']),
  *(
    ('text', value, REFUSED)
    for value in (
      0,
      1,
      4.5,
      float('inf'),
      10**400,
      True,
      False,
      [],
      ['a'],
      ['a', None],
      {},
      {'en': 'a'},
      [[1]],
    )
  ),
  # Images; a.png and ü.png are there, pipe is a pipe, sub a folder, loop a link to itself.
  ('image', 'a.png', ['a.png']),
  ('image', ' ./sub/../a.png\t', ['a.png']),
  ('image', 'ü.png', ['ü.png']),
  *(('image', blank, ABSENT) for blank in (None, NAN, '', '  ', '\u200b', 'nan', 'None', 'NULL')),
  *(
    ('image', value, REFUSED)
    for value in (
      'b.png',
      'pipe',
      'sub',
      'loop',
      'a.png/b',
      'x' * 300,
      'a\0.png',
      '\ud83d.png',
      0,
      1.5,
      True,
      {'path': 'a.png'},
      'https://example.org/a.png',
      'data:image/png;base64,AAAA',
    )
  ),
  # Labels.
  ('label', 'cat', ['cat']),
  ('label', '  hot \u00a0 dog ', ['hot dog']),
  ('label', 'cafe\u0301', ['caf\u00e9']),
  ('label', '\ufeffca\u200bt\u00ad', ['cat']),
  ('label', '👩\u200d🚀', ['👩\u200d🚀']),
  ('label', FLAG, [FLAG]),
  *(('label', one, ['1']) for one in (1, 1.0, '1', '1.0', '1.', '+1', '1e+00', '1.000E+00', ' 1 ')),
  *(('label', zero, ['0']) for zero in (0, -0.0, '0', '-0', '0.00')),
  ('label', -3.0, ['-3']),
  ('label', '1e+05', ['100000']),
  *(
    ('label', text, [text])
    for text in ('01', '007', '1e5', '1.5', '0x1', '1,0', '1_0', '١', 'none')
  ),
  ('label', 3.5, ['3.5']),
  ('label', 2**53 + 1, [str(2**53 + 1)]),
  ('label', str(2**53 + 1) + '.0', [str(2**53 + 1)]),
  *(('label', true, ['true']) for true in (True, 'true', 'True', 'TRUE')),
  *(('label', false, ['false']) for false in (False, 'false', 'False', 'FALSE')),
  *(('label', blank, ABSENT) for blank in (None, NAN, '', ' \u3000', '\u200b')),
  *(
    ('label', value, REFUSED)
    for value in (
      'nan',
      'NaN',
      'None',
      'NA',
      'N/A',
      'NULL',
      'null',
      '<NA>',
      'NaT',
      ' None ',
      'a\0',
      'a\x1bb',
      '\ud83d',
      'x' * 1001,
      "['a']",
      '["a", "b"]',
      "{'a': 1}",
      '[1, 2]',
      "('a', 'b')",
      1e300,
      float('inf'),
      2.0**53,
      {},
      {'a': 1},
      [],
      ['cat'],
      [['cat']],
    )
  ),
]
ANCHORS = [
  {'image': None, 'text': 'x', 'label': 'anchor one'},
  {'image': None, 'text': 'y', 'label': 'anchor two'},
]


@pytest.fixture
def folder(tmp_path):
  for name in ('a.png', 'ü.png'):
    Image.new('RGB', (4, 4), 'red').save(tmp_path / name)
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'loop').symlink_to('loop')
  return tmp_path


def record_with(column, value):
  """A row with this cell, whose other cells do not matter."""
  others = {'image': 'a.png' if column == 'text' else None, 'text': 'a text', 'label': 'anchor one'}
  return {**others, column: value}


def write_csv(file, records):
  with open(file, 'w', encoding='utf-8', newline='') as stream:
    rows = csv.writer(stream, quoting=csv.QUOTE_ALL)
    rows.writerow(('image', 'text', 'label'))
    rows.writerows(['' if r[name] is None else r[name] for name in r] for r in records)


def write_jsonl(file, records):
  file.write_text(''.join(json.dumps(record) + '\n' for record in records))


WRITERS = {'csv': write_csv, 'jsonl': write_jsonl}


def load_table(folder, records, kind, **fields):
  for split in ('validation', 'test'):
    write_csv(folder / f'{split}.csv', ANCHORS)
  WRITERS[kind](folder / f'train.{kind}', records)
  config = CLASSIFIER.default()
  config.dataset.update(name='table', path=str(folder), **fields)
  return datasets.load_dataset(config)


def from_table(folder, column, value, kind):
  dataset = load_table(folder, [record_with(column, value), *ANCHORS], kind)
  train = dataset.splits['train']
  if column == 'label':
    return None if train.labels[0] == UNLABELLED else dataset.class_names[train.labels[0]]
  if column == 'text':
    return train[0]['text']
  return train.rows[0].image and os.path.relpath(train.rows[0].image, folder.resolve())


def from_predict(folder, column, value):
  """In a list, so that a list in it is not the batch."""
  record = record_with(column, value)
  ((image, text),), many = given.read_inputs([record['image']], [record['text']])
  assert many
  if column == 'image' and image is not None:
    assert given.decoded(image, 'image').size == (4, 4)
  return text if column == 'text' else image and os.path.normpath(image)


def from_hateful_memes(folder, column, value):
  record = {**record_with(column, value), 'id': 7}
  record['img'] = record.pop('image')
  if column != 'label':
    record['label'] = 0
  write_jsonl(folder / 'train.jsonl', [record])
  (row,) = hateful_memes.Memes(folder, {'train': folder / 'train.jsonl'}).rows('train')
  if isinstance(row, LeftOut):
    raise UserError(row.reason)
  if column == 'image':
    return row.image and os.path.relpath(row.image, folder)
  return row.text if column == 'text' else str(row.labels[0])


def from_mm_imdb(folder, column, value):
  record = {'plot': 'a text' if column == 'label' else value}
  record['genres'] = [value] if column == 'label' else ['Drama']
  (folder / 'split.json').write_text('{"train": [7], "dev": [], "test": []}')
  (folder / '0000007.json').write_text(json.dumps(record))
  choices = {'text': 'longest', 'genres': 'all'}
  (row,) = mm_imdb.Movies(folder / 'split.json', folder, folder, choices).rows('train')
  if isinstance(row, LeftOut):
    raise UserError(row.reason)
  return row.text


def from_snli_ve(folder, column, value):
  record = {'pairID': 'p', 'Flickr30K_ID': 'a', 'gold_label': 'neutral', 'sentence2': value}
  write_jsonl(folder / 'snli_ve_train.jsonl', [record])
  (row,) = snli_ve.Pairs(folder, folder, False).rows('train')
  if isinstance(row, LeftOut):
    raise UserError(row.reason)
  return row.text


ENTRIES = {
  'csv': lambda *a: from_table(*a, 'csv'),
  'jsonl': lambda *a: from_table(*a, 'jsonl'),
  'predict': from_predict,
  'hateful_memes': from_hateful_memes,
  'mm_imdb': from_mm_imdb,
  'snli_ve': from_snli_ve,
}


def can_hold(entry, column, value, expected):
  """Whether the cell can come in by this entry, and its kind of column is there."""
  if entry in WRITERS and isinstance(value, str) and '://' in value:
    return False  # Tables read what is at addresses; test_readers.py looks at that.
  if entry == 'csv':
    return (
      value is None
      or (isinstance(value, str) and value.isprintable())
      or (isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value))
    )
  if entry == 'mm_imdb':
    return column == 'text' and not (isinstance(value, list) and expected == REFUSED)
  if entry == 'hateful_memes':  # Its only labels are 0 and 1; of files none need be there.
    missing = column == 'image' and isinstance(value, str) and expected == REFUSED
    return not missing and (column != 'label' or expected in (['0'], ['1'], REFUSED))
  return entry == 'jsonl' or column == 'text' or (column == 'image' and entry == 'predict')


def outcome(read, *arguments):
  try:
    value = read(*arguments)
  except UserError as error:
    assert '\n' not in str(error) and len(str(error)) < 2000
    return REFUSED, str(error)
  return (ABSENT, '') if value is None else ([value], '')


RUNS = [(entry, *case) for entry in ENTRIES for case in CASES if can_hold(entry, *case)]


@pytest.mark.parametrize(
  'entry, column, value, expected',
  RUNS,
  ids=[f'{entry}-{column}-{str(value)[:24]!r}' for entry, column, value, _ in RUNS],
)
def test_a_cell_is_the_same_at_every_entry(folder, monkeypatch, entry, column, value, expected):
  monkeypatch.chdir(folder)
  if entry == 'hateful_memes' and column == 'image' and expected == ABSENT:
    expected = ['img/00007.png']  # Where it lies when nothing is said.
  got, message = outcome(ENTRIES[entry], folder, column, value)
  assert got == expected
  if got == REFUSED and entry in WRITERS:
    assert (
      message.startswith(f'train.{entry}') and ('row 2' if entry == 'csv' else 'row 1') in message
    )
  if got == REFUSED:
    assert column in message or 'genres' in message or column == 'label'


# ---- What only Python can give -------------------------------------------------------------------


class Named(str):
  """A string whose str() is something else."""

  def __str__(self):
    return 'not this'


NAType = type('NAType', (), {'__module__': 'pandas._libs.missing', '__bool__': None})
NaTType = type('NaTType', (), {'__module__': 'pandas._libs.tslibs.nattype'})
NULLS = [
  None,
  NAN,
  np.float64('nan'),
  np.float32('nan'),
  np.float16('nan'),
  np.longdouble('nan'),
  decimal.Decimal('nan'),
  decimal.Decimal('snan'),
  np.datetime64('nat', 's'),
  np.timedelta64('nat', 's'),
  np.ma.masked,
  NAType(),
  NaTType(),
]
OTHERS = [
  b'bytes',
  bytearray(b'x'),
  memoryview(b'x'),
  np.bytes_(b'x'),
  np.int64(3),
  np.float32(2.5),
  np.bool_(True),
  1j,
  decimal.Decimal('1.5'),
  ('a',),
  {'a'},
  frozenset(),
  {'a': 1},
  object(),
  print,
  np.zeros(3),
  np.array('x'),
  np.array(['a', 'b']),
  io.StringIO('a'),
  pathlib.Path('a'),
  range(3),
  Image.new('L', (2, 2)),
  Ellipsis,
  int,
]


@pytest.mark.parametrize('column', ['text', 'image', 'label'])
@pytest.mark.parametrize(
  'value', NULLS, ids=[f'{n} {type(v).__name__}' for n, v in enumerate(NULLS)]
)
def test_everything_that_means_nothing_is_absent(column, value):
  assert cells.read(column, value) is None


@pytest.mark.parametrize(
  'value', OTHERS, ids=[f'{n} {type(v).__name__}' for n, v in enumerate(OTHERS)]
)
def test_no_object_becomes_a_text(value):
  with pytest.raises(cells.CellError) as error:
    cells.read('text', value)
  assert error.value.column == 'text' and '\n' not in str(error.value)
  with pytest.raises(UserError, match=r'predict: text\[1\] '):
    given.read_inputs(None, ['a text', value])


@pytest.mark.parametrize(
  'value',
  [v for v in OTHERS if not isinstance(v, np.bool_ | np.integer | np.floating)],
  ids=lambda value: type(value).__name__,
)
def test_no_object_becomes_a_label(value):
  with pytest.raises(cells.CellError):
    cells.read('label', value)


@pytest.mark.parametrize(
  'value, name',
  [
    (np.int64(3), '3'),
    (np.float32(3), '3'),
    (np.float32(0.5), '0.5'),
    (np.bool_(True), 'true'),
    (np.str_('a'), 'a'),
    (Named('a'), 'a'),
    (np.uint8(255), '255'),
  ],
)
def test_scalars_of_numpy_are_labels_like_pythons(value, name):
  assert cells.read('label', value) == name and type(cells.read('label', value)) is str


def test_a_string_of_another_type_is_its_characters():
  assert [cells.read('text', value) for value in (Named('this'), np.str_('a'))] == ['this', 'a']
  assert {type(cells.read('text', value)) for value in (Named('this'), np.str_('a'))} == {str}


PIXELS = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
  'value',
  [PIXELS, PIXELS[..., 0], np.zeros((4, 5, 4), np.uint8), Image.new('RGB', (2, 2)), b'bytes'],
)
def test_contents_of_images_are_taken_as_they_are(value):
  got = cells.read('image', value)
  assert got is value or np.array_equal(got, value)


@pytest.mark.parametrize(
  'value, says',
  [
    (PIXELS.astype(np.float32), r'array float32\[4, 5, 3\]'),
    (PIXELS.transpose(2, 0, 1), r'\[3, 4, 5\]'),
    (PIXELS[:0], 'array'),
    (PIXELS[None], 'array'),
    (PIXELS.astype(bool), 'array bool'),
    (PIXELS[..., :1], r'\[4, 5, 1\]'),
    (np.ma.masked_array(PIXELS), 'masked'),
    (np.uint8(3), 'number'),
    (PIXELS.tolist(), 'list'),
    (io.BytesIO(b'x'), 'BytesIO'),
    (object(), 'object'),
  ],
)
def test_other_images_are_refused_by_what_they_are(value, says):
  with pytest.raises(cells.CellError, match=says):
    cells.read('image', value)


WRITTEN = [
  "['a', 'b']",
  '["a"]',
  '[]',
  '[1, 2]',
  '[0.5 1.5]',
  '[None]',
  '[nan, 1]',
  '[[1], [2]]',
  '[{"a": 1}]',
  "{'a': 1}",
  '{}',
  '{1, 2}',
  '{1: 2}',
  "{'a', 'b'}",
  "('a', 'b')",
  "('a',)",
  '(1, 2)',
  "b'cat'",
  'b"it\'s"',
  '<__main__.Thing object at 0x7f00>',
  '<PIL.Image.Image size=4x4 at 0x7F00>',
]
NOT_WRITTEN = [
  '[red]',
  '(red)',
  '{red}',
  'b',
  "b'",
  'boy',
  "b'day",
  '[red',
  'red]',
  '(1)',
  '("red")',
  '<b>red</b>',
  'a[0]',
  '(a, b)',
  '[a]',
  'bé',
  '[x, 1]',
]


@pytest.mark.parametrize('text', WRITTEN)
def test_what_python_writes_of_objects_is_seen(text):
  remarks = []
  assert cells.read('text', text, lambda *remark: remarks.append(remark)) == text
  assert remarks == [(cells.WRITTEN, text)]
  with pytest.raises(cells.CellError, match='written as text'):
    cells.read('label', text)


@pytest.mark.parametrize('text', NOT_WRITTEN)
def test_brackets_alone_are_a_text(text):
  assert cells.read('text', text, pytest.fail) == cells.read('label', text) == text


@pytest.mark.parametrize('begin', ['[', '{', '(', '("', "['", '<', 'b"', ' ', '\u200b', '(1', '[1'])
def test_long_texts_are_read_in_one_pass(begin):
  for end in (')', ']', '}', '>', '"'):
    for middle in ('"', '",', '1', ' ', ', ', ' at 0x', '\0', '\ud83d', '\u200b', '(('):
      cells.read('text', begin + middle * 100_000 + end)  # By the square it would take hours.


# ---- Several labels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'value, names',
  [
    ('b | a |b', ('a', 'b')),
    (['b', 'a', 'b'], ('a', 'b')),
    ([1, 1.0, '1.0', True], ('1', 'true')),
    ([None, NAN, ' ', 'a'], ('a',)),
    ('a||', ('a',)),
    ([], ()),
    (None, ()),
    (3, ('3',)),
  ],
)
def test_several_labels(value, names):
  assert cells.read_labels(value, several=True) == names


@pytest.mark.parametrize(
  'value', [[['a']], [{}], ['a', ('b',)], [b'a'], ['a|b'], 'a|nan', {'a': 1}, ('a',), "['a', 'b']"]
)
def test_what_is_no_list_of_labels_is_refused(value):
  with pytest.raises(cells.CellError):
    cells.read_labels(value, several=True)


@pytest.mark.parametrize(
  'group',
  [
    'Cat cat CAT',
    'straße STRASSE',
    'ﬁne fine',
    'ice\u200dcream icecream',
    '1 01 1.00 １ ١',
    '1.5 1.50',
    'Sci-Fi Sci–Fi scifi sci_fi',
    "o'clock o’clock",
    '❤ ❤\ufe0f',
  ],
)
def test_names_that_look_alike(group):
  names = group.split(' ')
  assert lookalikes([*names, 'other', 'A', 'A-', 'A+', '-1', 'cats']) == [names]


@hypothesis.given(st.text())
def test_a_name_is_its_own_name(text):
  try:
    name = cells.read('label', text)
  except cells.CellError:
    return
  if name is not None:
    assert cells.read('label', name) == name and cells.read('label', f'\u200b {name}\t') == name


@hypothesis.given(st.text(st.characters(exclude_categories=())))
def test_cleaning_leaves_what_utf_8_can_hold(text):
  oracle = ''
  for position, c in enumerate(text):
    high, low = ('\ud800' <= x <= '\udbff' for x in (c, text[position - 1 : position] or 'x'))
    joins = '\udc00' <= text[position + 1 : position + 2] <= '\udfff'
    if high and joins:
      oracle += (c + text[position + 1]).encode('utf-16', 'surrogatepass').decode('utf-16')
    elif not (low and '\udc00' <= c <= '\udfff'):
      oracle += '\ufffd' if c == '\0' or '\ud800' <= c <= '\udfff' else c
  assert cells.clean(text) == oracle


# ---- Any JSON in any cell ------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | TEXTS
  | st.sampled_from(['nan', 'a.png']),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
  max_leaves=6,
)


@hypothesis.settings(
  max_examples=150,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.sampled_from(['image', 'text', 'label']), VALUES, st.booleans())
def test_any_json_in_any_cell_is_read_or_refused_in_one_line(folder, column, value, multi_label):
  record = record_with(column, copy.deepcopy(value))
  try:
    dataset = load_table(folder, [record, *ANCHORS], 'jsonl', multi_label=multi_label)
  except UserError as error:
    assert '\n' not in str(error)
    return
  row = dataset.splits['train'].rows[0]
  got = {'image': row.image, 'text': row.text, 'label': row.labels}[column]
  if column == 'label' and isinstance(value, list):
    assert multi_label and all(not isinstance(part, list | dict) for part in value)
  elif column == 'image' and isinstance(value, list):  # Several images of one row.
    assert all(part is None or isinstance(part, str) for part in value)
  elif got and column != 'label':
    assert isinstance(value, str) and (column == 'image' or got == cells.clean(value))
  else:
    assert not isinstance(value, list | dict)
  for reader in (from_hateful_memes, from_mm_imdb, from_snli_ve):
    outcome(reader, folder, 'text', value)


def test_a_list_of_images_is_several_images_of_a_row(folder):
  assert from_table(folder, 'image', ['a.png'], 'jsonl') == 'a.png'
  for value in ([['a.png']], [{'path': 'a.png'}], [3]):
    with pytest.raises(UserError):
      from_table(folder, 'image', value, 'jsonl')


# ---- Files of published data sets ----------------------------------------------------------------


def left_out(folder, data):
  (folder / 'train.jsonl').write_bytes(data)
  rows = list(hateful_memes.Memes(folder, {'train': folder / 'train.jsonl'}).rows('train'))
  return [f'{row.id} {row.reason}' for row in rows if isinstance(row, LeftOut)]


DAMAGED = {
  'cut': (b'{"id": 1, "label"', 'train.jsonl:1 not JSON'),
  'a list': (b'[1]', 'train.jsonl:1 not a JSON object'),
  'deep': (b'[' * 100_000, 'train.jsonl:1 not JSON: lists or objects inside each other'),
  'many digits': (b'{"id": ' + b'9' * 5000 + b'}', 'train.jsonl:1 not JSON: a number of too many'),
  'a key twice': (b'{"id": 1, "id": 2}', "train.jsonl:1 not JSON: the key 'id' is there twice"),
  'no id': (b'{"label": 1}', 'train.jsonl:1 id is empty'),
  'an id that is a path': (b'{"id": "../1", "label": 1}', 'train.jsonl:1 id is no plain name'),
  'an id that is a list': (b'{"id": [1], "label": 1}', 'train.jsonl:1 id is a list'),
  'no label': (b'{"id": 1}', '00001 no label'),
  'label true': (b'{"id": 1, "label": true}', "00001 label 'true'"),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_line_is_left_out_by_name(tmp_path, name):
  data, says = DAMAGED[name]
  (line,) = left_out(tmp_path, data + b'\n')
  assert line.startswith(says)


def test_a_file_in_another_encoding_is_one_line(tmp_path):
  with pytest.raises(UserError, match='train.jsonl is UTF-16, not UTF-8'):
    left_out(tmp_path, '{"id": 1}'.encode('utf-16'))


SPLITS = {
  'a key twice': (
    '{"train": [], "train": [], "dev": [], "test": []}',
    "key 'train' is there twice",
  ),
  'a string for a list': ('{"train": "0001000", "dev": [], "test": []}', 'is not JSON with lists'),
  'an id of no use': ('{"train": [null], "dev": [], "test": []}', 'id is empty'),
  'a path': ('{"train": ["../../x"], "dev": [], "test": []}', 'id is no plain name'),
  'deep': ('{"train": ' + '[' * 100_000, 'inside each other too deeply'),
  'cut': ('{"train": [1,', 'is not JSON'),
}


@pytest.mark.parametrize('name', SPLITS)
def test_a_damaged_split_of_mm_imdb_is_one_line(tmp_path, name):
  text, says = SPLITS[name]
  (tmp_path / 'split.json').write_text(text)
  with pytest.raises(UserError, match=says) as error:
    mm_imdb.Movies(tmp_path / 'split.json', tmp_path, tmp_path, {'text': 'first', 'genres': 'all'})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'record, says',
  [
    ('{"genres": "Drama", "plot": ["a", 3]}', 'text is a number'),
    ('{"genres": {"a": 1}}', 'label is a dict'),
    ('{"genres": [["Drama"]]}', 'label is a list'),
    ('{"genres": ["Drama", 1.5e300]}', 'label is a number'),
    ('{"plot": "x"}', 'JSON of a movie'),
    ('[]', 'JSON of a movie'),
    ('{"genres": [', 'Expecting value'),
    ('[' * 100_000, 'too deeply'),
    ('pipe', 'JSON of a movie'),
  ],
)
def test_a_damaged_movie_is_left_out_by_name(tmp_path, record, says):
  (tmp_path / 'split.json').write_text('{"train": ["7"], "dev": [], "test": []}')
  if record == 'pipe':
    os.mkfifo(tmp_path / '0000007.json')
  else:
    (tmp_path / '0000007.json').write_text(record)
  choices = {'text': 'longest', 'genres': 'all'}
  (row,) = mm_imdb.Movies(tmp_path / 'split.json', tmp_path, tmp_path, choices).rows('train')
  assert row.id == '0000007' and says in row.reason


def test_rows_of_food101_that_are_not_as_they_must_be_are_left_out_by_row(tmp_path):
  (tmp_path / 'test_titles.csv').write_text('pizza_1.jpg,x,pizza\n')
  rows = [
    ('pizza_1.jpg', 'x' * 200_000, 'pizza'),
    ('pizza_2.jpg', 'nan', 'cafe\u0301'),
    ('pizza_3.jpg', 'x'),
    ('no image', 'x', 'pizza'),
    ('pizza_4.jpg', 'x', 'NaN'),
    ('pizza_5.jpg', 'x', ' '),
  ]
  with open(tmp_path / 'train_titles.csv', 'w', encoding='utf-8', newline='') as stream:
    csv.writer(stream).writerows(rows)
  titles = upmc_food101.Titles(tmp_path, tmp_path, tmp_path)
  assert titles.class_names == ['caf\u00e9', 'pizza']
  got = list(titles.rows('train'))
  assert [row.text for row in got[:2]] == ['x' * 200_000, None]
  assert [row.id for row in got[2:]] == [f'train_titles.csv:{n}' for n in (3, 4, 5, 6)]
  assert [row.reason.split(' (')[0] for row in got[2:]] == [
    'not FILE,TITLE,CLASS',
    'not FILE,TITLE,CLASS',
    'label is a word that tables write for nothing',
    'no class',
  ]
  assert 'train train_titles.csv:2: text is a word' in titles.found['train'].remarks()[0]


@pytest.mark.parametrize(
  'text, says',
  [
    ('pairID,pairID,x\np,p,neutral\n', 'one column pairID and one gold_label'),
    ('pairID,gold_label\np\n', 'row 2: row of 1 cells'),
    ('pairID,gold_label\n,neutral\n', 'row 2: id'),
    ('pairID,gold_label\np,neutral\np,entailment\n', None),
  ],
)
def test_new_labels_of_snli_ve(tmp_path, text, says):
  (tmp_path / 'esnlive_dev.csv').write_text(text)
  (tmp_path / 'esnlive_test.csv').write_text(text)
  record = {'pairID': 'p', 'Flickr30K_ID': 1, 'gold_label': 'neutral', 'sentence2': 'a text'}
  write_jsonl(tmp_path / 'snli_ve_dev.jsonl', [record])
  pairs = snli_ve.Pairs(tmp_path, tmp_path, True)
  if says:
    with pytest.raises(UserError, match=says):
      list(pairs.rows('validation'))
  else:
    (row,) = pairs.rows('validation')
    assert (
      row.labels == (0,) and 'twice with different labels' in pairs.found['validation'].remarks()[0]
    )


# ---- Files that cells name -----------------------------------------------------------------------


def test_only_regular_files_of_bounded_size_are_read(folder):
  assert formats.read_file(folder / 'a.png') == (folder / 'a.png').read_bytes()
  with open(folder / 'huge', 'wb') as stream:
    stream.truncate(1 << 40)  # Sparse: it takes no room on the disk.
  for name in ('pipe', 'sub', 'loop', 'huge', 'nothing', '/dev/zero'):
    with pytest.raises(OSError):
      formats.read_file(folder / name)


def test_generators_of_cells(fuzz):
  outcomes = fuzz('cells', count=200)['outcomes']
  assert {'table read', 'table refused', 'predict read', 'predict refused'} <= outcomes.keys()
