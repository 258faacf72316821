"""Own tables: what is read, what is refused and in which words, and how validation is set aside."""

import collections
import csv
import json
import pickle
import types

import hypothesis
import hypothesis.strategies as st
import pytest
from PIL import Image

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, table
from molt_jax.data.sources import UNLABELLED
from molt_jax.data.tables import holding_out, roles
from molt_jax.data.tables.rows import Row
from molt_jax.errors import UserError

HEADER = 'image,text,label\n'
GOOD = HEADER + 'a.png,first,cat\nb.png,,dog\n,third,cat\n'


@pytest.fixture
def folder(tmp_path):
  for name in 'ab':
    Image.new('RGB', (4, 4), 'red').save(tmp_path / f'{name}.png')
  for split in ('train', 'validation', 'test'):
    (tmp_path / f'{split}.csv').write_text(GOOD)
  return tmp_path


def load(folder, **fields):
  config = CLASSIFIER.default()
  with config.unlocked():
    config.dataset.update(name='table', path=str(folder), **fields)
  return datasets.load_dataset(config)


def test_empty_cells_are_absent_modalities(folder):
  dataset = load(folder)
  train = dataset.splits['train']
  assert (
    dataset.class_names == ('cat', 'dog') and len(train) == 3 and list(train.labels) == [0, 1, 0]
  )
  assert train.present.tolist() == [[True, True], [True, False], [False, True]]
  assert train[0] == {
    'id': 'train.csv:2',
    'image': (folder / 'a.png').read_bytes(),
    'text': 'first',
    'label': 0,
  }
  assert train[1]['text'] is None and train[2]['image'] is None
  assert train.read(0, image=False)['image'] is None
  assert train.ids == ['train.csv:2', 'train.csv:3', 'train.csv:4']
  assert pickle.loads(pickle.dumps(train))[0] == train[0]


def test_unicode_quotes_newlines_and_byte_order_mark(folder):
  text = 'Größe, „schön“\n日本語 "so"'
  quoted = '"' + text.replace('"', '""') + '"'
  (folder / 'train.csv').write_bytes(
    ('\ufeff' + HEADER + f'a.png,{quoted},Ünï\r\n\r\n,x,b\r\n').encode()
  )
  for split in ('validation', 'test'):
    (folder / f'{split}.csv').write_text(HEADER + ',x,b\n')
  dataset = load(folder)
  train = dataset.splits['train']
  assert train[0]['text'] == text and dataset.class_names == ('b', 'Ünï')
  assert train.ids == ['train.csv:2', 'train.csv:4']


def test_jsonl_with_other_columns_and_left_out_keys(folder):
  (folder / 'test.csv').unlink()
  rows = [
    {'image': 'a.png', 'text': None, 'label': 'dog', 'note': 1},
    {'text': 'x', 'label': 'cat'},
  ]
  (folder / 'test.jsonl').write_text('\n\n'.join(json.dumps(row) for row in rows))
  test = load(folder).splits['test']
  assert (
    test.present.tolist() == [[True, False], [False, True]]
    and list(test.labels) == [1, 0]
    and test.ids == ['test.jsonl:1', 'test.jsonl:3']
  )


def test_multi_label(folder):
  for split in ('train', 'validation', 'test'):
    (folder / f'{split}.csv').write_text(HEADER + ',x, b | a |b\n,y,c\n')
  dataset = load(folder, multi_label=True)
  assert (
    dataset.multi_label
    and dataset.class_names == ('a', 'b', 'c')
    and list(dataset.splits['train'].labels) == [(0, 1), (2,)]
  )
  assert load(folder).class_names == ('b | a |b', 'c')


def test_rows_of_train_may_lack_a_label(folder):
  blank = ',unknown,\n' * 30
  (folder / 'train.csv').write_text(HEADER + ',x,cat\n,y,dog\n' * 10 + blank)
  (folder / 'validation.csv').unlink()
  splits = load(folder).splits
  assert (
    sorted(splits['train'].labels).count(UNLABELLED) == 30
    and len(splits['train']) + len(splits['validation']) == 50
  )
  assert set(splits['validation'].labels) == {0, 1}  # Nothing is scored on what nobody knows.
  (folder / 'train.csv').write_text(HEADER + blank)
  check_one_line(folder, 'train.csv rows 2, 3, 4, 5, 6 and 25 more: label is empty')
  (folder / 'train.csv').write_text(HEADER + ',x,cat\n,y,dog\n' + blank)
  check_one_line(folder, 'label is empty', multi_label=True)


MISTAKES = {
  'empty file': ({'train': ''}, 'train.csv has no rows'),
  'header only': ({'test': HEADER}, 'test.csv has no rows'),
  'missing column': (
    {'train': 'image,caption,label\n,x,cat\n'},
    'lacks the column text (it has image, caption, label)',
  ),
  'missing images': (
    {'train': HEADER + 'nope.png,x,cat\na.png,x,dog\nsub/no.png,x,cat\n'},
    '2 image files do not exist: row 2 nope.png, row 4 sub/no.png',
  ),
  'many missing images': (
    {'train': HEADER + 'n.png,x,cat\n' * 9},
    (
      '9 image files do not exist: row 2 n.png, row 3 n.png, row 4 n.png, row 5 n.png, row 6 n.png '
      'and 4 more'
    ),
  ),
  'unseen label': (
    {'test': GOOD + ',x,owl\n'},
    "test.csv: labels that train does not have: 'owl' (row 5)",
  ),
  'unseen in validation': (
    {'validation': GOOD + ',x,owl\n'},
    "validation.csv: labels that train does not have: 'owl' (row 5)",
  ),
  'one class': ({'train': HEADER + ',x,cat\n,y,cat\n'}, "train.csv has one class only, 'cat'"),
  'both empty': ({'train': GOOD + ', ,cat\n'}, 'train.csv row 5: both image and text are empty'),
  'no label': ({'test': GOOD + ',x,\n,y, \n'}, 'test.csv rows 5, 6: label is empty'),
  'stray comma': ({'train': GOOD + ',one, two,cat\n'}, 'train.csv row 5 has 4 cells, the header 3'),
  'short row': ({'train': GOOD + 'cat\n'}, 'train.csv row 5 has 1 cells'),
  'open quote': ({'train': GOOD + ',"x,cat\n'}, 'train.csv is not a valid CSV file'),
  'not utf-8': (
    {'train': (HEADER + ',ä,cat\n').encode('latin-1')},
    'train.csv is not UTF-8 (byte 18)',
  ),
  'not utf-8 far down': (
    {'train': (HEADER + ',x,cat\n' * 9000 + ',ä,cat\n').encode('latin-1')},
    'train.csv is not UTF-8 (byte 63018) in line 9002',
  ),
  'utf-16 without a mark': ({'train': GOOD.encode('utf-16-le')}, 'train.csv has zero bytes in its'),
  'a column twice': (
    {'train': 'image,text,label,text\n,x,cat,y\n'},
    "the column text 2 times ('text', 'text')",
  ),
  'a column twice but for blanks and case': (
    {'test': 'image,text,label, LABEL \n,x,cat,y\n'},
    "label 2 times ('label', 'LABEL')",
  ),
  'columns in capitals': (
    {'train': 'Image,Text,Label\n,x,cat\n'},
    "is it 'Image', 'Text', 'Label'?",
  ),
  'a blank line first': ({'train': '\n' + GOOD}, 'train.csv begins with a blank line'),
  'a column name of many lines': (
    {'train': '"a\nb",text,label\n,x,cat\n'},
    "(it has 'a\\nb', text",
  ),
  'a bare carriage return': ({'train': GOOD + ',a\rb,cat\n'}, 'train.csv row 5 has 2 cells'),
  'null words alone': (
    {'train': HEADER + ',nan,cat\n,None,dog\n'},
    'rows 2, 3: both image and text are empty (a word',
  ),
  'null words as labels': (
    {'train': GOOD + ',x,nan\n,y,None\n'},
    'rows 5, 6: label is a word that tables write for nothing',
  ),
  'joined labels': (
    {'train': GOOD + ',x,cat|dog\n'},
    "'cat|dog' (1 row) is several labels, 'cat', 'dog'",
  ),
  'one label in other capitals': ({'test': GOOD + ',x,Cat\n'}, "'Cat' (row 5, train has 'cat')"),
  'an address of bytes': (
    {'train': GOOD + '"data:image/png;base64,iVBORw0K",x,cat\n'},
    'data: addresses are not read',
  ),
  'a folder for an image': (
    {'train': GOOD + '.,x,cat\n'},
    '1 images are not files: row 5 . (a folder)',
  ),
  'no test file': ({'test': None}, 'has no test.csv and no test.jsonl'),
  'no train file': ({'train': None}, 'has no train.csv and no train.jsonl'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line(folder, name):
  contents, message = MISTAKES[name]
  for split, content in contents.items():
    file = folder / f'{split}.csv'
    if content is None:
      file.unlink()
    else:
      file.write_bytes(content if isinstance(content, bytes) else content.encode())
  check_one_line(folder, message)


JSON_MISTAKES = {
  'not json': (
    '{"text": "x", "label": "cat", "image": null}\n{oops\n',
    'test.jsonl row 2 is not valid JSON',
  ),
  'not an object': ('[1, 2]\n', 'test.jsonl row 1 is not a JSON object'),
  'missing key': ('{"text": "x", "label": "cat"}\n', 'test.jsonl lacks the column image'),
  'list': ('{"text": "x", "label": ["cat"], "image": null}\n', 'test.jsonl row 1: label is a list'),
  'no rows': ('\n', 'test.jsonl has no rows'),
  'a key twice': (
    '{"text": "x", "text": "y"}\n',
    "test.jsonl row 1 is not valid JSON (the key 'text'",
  ),
  'a key in two capitals': (
    '{"image": null, "text": "x", "label": "cat"}\n{"Text": "x"}\n',
    "text 2 times ('text', 'Text')",
  ),
  'too deep': ('{"text": ' + '[' * 100_000, 'test.jsonl row 1 is not valid JSON (lists or objects'),
  'too many digits': (
    '{"n": ' + '9' * 5000 + '}',
    'test.jsonl row 1 is not valid JSON (a number of',
  ),
  'a mark inside': (
    '{"image": null, "text": "x", "label": "cat"}\n\ufeff{}\n',
    'test.jsonl row 2 is not valid JSON',
  ),
  'cells of other types': (
    '{"image": null, "text": ["x"], "label": "cat"}\n{"text": ["y", "z"], "label": "cat"}\n',
    'test.jsonl rows 1, 2: text is a list: give one string',
  ),
}


@pytest.mark.parametrize('name', JSON_MISTAKES)
def test_a_mistake_in_jsonl_is_one_line(folder, name):
  content, message = JSON_MISTAKES[name]
  (folder / 'test.csv').unlink()
  (folder / 'test.jsonl').write_text(content)
  check_one_line(folder, message)


def said(folder, capsys, rows, **fields):
  """What is said of train.csv with these rows."""
  (folder / 'train.csv').write_text(HEADER + rows)
  for split in ('validation', 'test'):
    (folder / f'{split}.csv').write_text(HEADER + rows.splitlines()[0] + '\n')
  load(folder, **fields)
  return [line for line in capsys.readouterr().err.splitlines() if line.startswith('train.csv')]


REMARKS = {
  'null words': (
    'a.png,x,cat\na.png,nan,dog\nNone,x,dog\na.png, NaN ,dog\n',
    {},
    [
      "train.csv rows 3, 5: text is a word that tables write for nothing ('nan', ' NaN '): "
      'taken as absent',
      "train.csv row 4: image is a word that tables write for nothing ('None'): taken as absent",
    ],
  ),
  'capitals': (
    ',x,cat\n,x,Cat\n,x,Cat\n,x,hot dog\n,x,hotdog\n',
    {},
    [
      'train.csv: labels that look alike are different classes: '
      "'Cat' (2 rows) and 'cat' (1 row), "
      "'hot dog' (1 row) and 'hotdog' (1 row); write them alike if they are one"
    ],
  ),
  'numbers of one value': (
    ',x,1.5\n,x,1.50\n,x,1\n,x,01\n,x,1.0\n',
    {},
    [
      "train.csv: labels that look alike are different classes: '01' (1 row) and '1' (2 rows), "
      "'1.5' (1 row) and '1.50' (1 row); write them alike if they are one"
    ],
  ),
  'names that a terminal may change': (
    ',x,:cat:\n,x,[b]x[/b]\n,x,:CAT:\n',
    {},
    [
      'train.csv: labels that look alike are different classes: '
      "':CAT:' (1 row) and ':cat:' (1 row); write them alike if they are one"
    ],
  ),
  'a class none': (
    ',x,cat\n,x,none\n',
    {},
    [
      "train.csv: a word that may mean nothing is a class: 'none' (1 row); "
      'leave the label empty if there is none'
    ],
  ),
  'a bar': (
    ',x,cat\n,x,a|b\n',
    {},
    [
      "train.csv: what may be several labels is one class: 'a|b' (1 row); "
      'set dataset.multi_label=True if | joins labels'
    ],
  ),
  'a comma': (
    ',x,cat\n,x,"a, b"\n',
    {'multi_label': True},
    [
      "train.csv: what may be several labels is one class: 'a, b' (1 row); "
      'give each label by itself, joined by |'
    ],
  ),
  'a list in a text': (
    ",\"['a', 'b']\",cat\n,x,dog\n",
    {},
    [
      'train.csv row 2: text is a list, dict, bytes or object that was written as text '
      "(\"['a', 'b']\"): "
      'read as the text that it is'
    ],
  ),
  'nothing': (',x,cat\n,"Salt, Pepper",dog\n,,dog\n'.replace(',,', ',y,'), {}, []),
}


@pytest.mark.parametrize('name', REMARKS)
def test_what_may_be_meant_otherwise_is_said_in_one_line(folder, capsys, name):
  rows, fields, lines = REMARKS[name]
  assert said(folder, capsys, rows, **fields) == lines


def test_a_list_of_known_labels_with_commas_is_refused(folder):
  (folder / 'train.csv').write_text(HEADER + ',x,cat\n,x,dog\n,x,"cat, dog"\n')
  check_one_line(folder, "'cat, dog' (1 row) is several labels", multi_label=True)


def test_whole_numbers_are_one_class_in_all_files(folder):
  (folder / 'train.csv').write_text(HEADER + ',a,1.0\n,b,0.0\n,c,\n,d,1.0\n')
  (folder / 'validation.csv').write_text(HEADER + ',a,+1\n,b,0\n')
  (folder / 'test.csv').unlink()
  rows = [{'image': None, 'text': 'a', 'label': 1}, {'text': 'b', 'label': 0.0}]
  (folder / 'test.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  dataset = load(folder)
  assert dataset.class_names == ('0', '1')
  assert dataset.splits['train'].labels == (1, 0, UNLABELLED, 1)
  assert dataset.splits['validation'].labels == dataset.splits['test'].labels == (1, 0)


def test_cells_of_any_length_are_read_and_the_limit_of_the_process_stays(folder):
  before = csv.field_size_limit()
  (folder / 'train.csv').write_text(GOOD + f',{"long " * 100_000},cat\n')
  assert len(load(folder).splits['train'][3]['text']) == 500_000
  assert csv.field_size_limit() == before


def test_two_files_for_a_split(folder):
  (folder / 'train.jsonl').write_text('')
  check_one_line(folder, 'both train.csv and train.jsonl')


@pytest.mark.parametrize('name', ['nowhere', 'x' * 5000, '~nobody/x', 'a\0b', '\ud83d'])
def test_no_folder(tmp_path, name):
  check_one_line(name if name[0] == '~' else tmp_path / name, 'is not a folder')


def check_one_line(folder, message, **fields):
  with pytest.raises(UserError) as error:
    load(folder, **fields)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_validation_is_set_aside_from_train(folder):
  (folder / 'validation.csv').unlink()
  (folder / 'train.csv').write_text(
    HEADER + ''.join(f',text {n},{"rare" if n % 10 == 0 else "common"}\n' for n in range(200))
  )
  (folder / 'test.csv').write_text(HEADER + ',x,rare\n')
  splits = load(folder, validation_fraction=0.2).splits
  assert len(splits['validation']) == 40 and collections.Counter(splits['validation'].labels) == {
    0: 36,
    1: 4,
  }
  assert sorted(splits['train'].ids + splits['validation'].ids, key=lambda i: int(i[10:])) == [
    f'train.csv:{n}' for n in range(2, 202)
  ]


def test_labels_that_train_does_not_have_are_set_aside_unless_they_are_most(folder):
  lenient = {'table': {'odd_rows': 'set_aside'}}
  (folder / 'test.csv').write_text(HEADER + ',x,cat\n,y,True\n,z,dog\n')
  assert load(folder, **lenient).splits['test'].ids == ['test.csv:2', 'test.csv:4']
  (folder / 'test.csv').write_text(HEADER + ',x,cat\n,y,True\n,z,False\n')
  says = "labels that train does not have: 'true' (row 3), 'false' (row 4)"
  check_one_line(folder, says, **lenient)


@pytest.mark.parametrize(
  ('name', 'values', 'found'),
  [
    ('Split', ['test', 'test'], True),
    ('fold', ['Train', 'dev', 'train', 'test'], True),
    ('fold', ['train', 'train'], False),
    ('fold', ['dev', 'test'], False),
    ('fold', ['train', 'test', 'other'], False),
    ('fold', [1, 2, 3], False),
  ],
)
def test_a_column_of_splits_is_guessed_by_its_name_or_its_values(name, values, found):
  sample = {'title': ['a b c', 'd'], 'empty': [], name: values}
  assert roles._guess_split(sample, set()) == (name if found else '')
  assert roles._guess_split(sample, {name}) == ''


def test_what_hangs_together_too_much_is_said():
  """Each row has the image of the next one too, so that all would be one group."""
  rows = [Row(f'a.csv:{n}', (f'{n}', f'{n + 1}'), f'text {n // 2}', ('a',)) for n in range(40)]
  spec = types.SimpleNamespace(group='', modalities=('image', 'text'))
  together, kept = holding_out._together(rows, spec)
  assert len(set(together.values())) == 20 and together['a.csv:2'] == together['a.csv:3']
  assert kept.startswith('; those of one text stay together; those of one image do not, as more')
  assert '--group=COLUMN' in kept


def test_too_small_to_set_validation_aside(folder):
  (folder / 'validation.csv').unlink()
  (folder / 'train.csv').write_text(HEADER + ',x,cat\n,y,dog\n')
  check_one_line(folder, 'too small to set a validation split aside')


LABELS = st.lists(st.frozensets(st.sampled_from('abcd'), min_size=1), min_size=2, max_size=80)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
  LABELS, st.floats(0.01, 0.9), st.integers(0, 9), st.randoms(use_true_random=False)
)
def test_setting_aside_is_stratified_and_does_not_depend_on_order(labels, fraction, seed, random):
  rows = [table.Row(str(n), None, 'x', tuple(sorted(names))) for n, names in enumerate(labels)]
  rest, aside = holding_out.split_off(rows, fraction=fraction, seed=seed)
  assert {row.id for row in rest} | {row.id for row in aside} == {row.id for row in rows} and len(
    rest
  ) + len(aside) == len(rows)
  assert {x for row in rest for x in row.labels} == {x for row in rows for x in row.labels}
  _, again = holding_out.split_off(random.sample(rows, len(rows)), fraction=fraction, seed=seed)
  assert {row.id for row in again} == {row.id for row in aside}
  share = max(1, round(fraction * len(rows))) / len(rows)
  taken, total = (collections.Counter(row.labels for row in part) for part in (aside, rows))
  assert all(taken[key] <= share * total[key] + 1 for key in total)
