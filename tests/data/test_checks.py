"""What in a data set may not be what is meant: planted faults are found, and nothing else is."""

import io

import numpy as np
import pytest
from PIL import Image

from molt_jax.data import checks, duplicates, near_images, same
from molt_jax.data.sources import Dataset
from molt_jax.data.table_source import TableSource
from molt_jax.data.tables.rows import Row


def picture(seed, size=64):
  """A picture with structure: a few soft blobs of colour."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 255, (6, 6, 3)).astype(np.uint8)
  return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def saved(path, image, kind='PNG', **how):
  image.save(path, kind, **how)
  return str(path)


@pytest.fixture
def data(tmp_path):
  """60 rows of train, 20 each of the others; every image and text is another."""
  splits, seed = {}, 0
  for split, count in (('train', 60), ('validation', 20), ('test', 20)):
    rows = []
    for n in range(count):
      image = saved(tmp_path / f'{split}{n}.png', picture(seed))
      rows.append(Row(f'{split}.csv:{n}', image, f'remark {seed} of somebody', ('ab'[n % 2],)))
      seed += 1
    splits[split] = rows
  return splits


def look(splits):
  names = sorted({row.labels[0] for row in splits['train']})
  sources = {
    split: TableSource(tuple(rows), tuple(names.index(row.labels[0]) for row in rows))
    for split, rows in splits.items()
  }
  dataset = Dataset('x', tuple(names), False, sources)
  return {finding.check: finding for finding in checks.look(dataset, sample=100)}


def replaced(row, **fields):
  return Row(**{name: fields.get(name, getattr(row, name)) for name in row.__dataclass_fields__})


def test_clean_data_have_no_finding(data):
  assert look(data) == {}


def test_rows_of_test_that_train_has_too(data, tmp_path):
  train, test = data['train'], data['test']
  test[0] = replaced(test[0], text='REMARK 7 -- of somebody!', image=train[7].image)
  test[1] = replaced(test[1], text=train[8].text)
  test[2] = replaced(test[2], image=saved(tmp_path / 'again.png', picture(9)))
  found = look(data)
  assert {name: (x.count, x.examples) for name, x in found.items()} == {
    'same_example_in_test': (1, ('test.csv:0',)),
    'same_text_in_test': (1, ('test.csv:1',)),
    'same_image_in_test': (1, ('test.csv:2',)),
  }
  message = '1 of 20 rows of test have a text of train or validation: test.csv:1'
  assert found['same_text_in_test'].message == message


def test_pictures_that_were_resized_or_compressed_anew(data, tmp_path):
  test = data['validation']
  changed = saved(tmp_path / 'a.jpg', picture(3).resize((150, 150)), 'JPEG', quality=60)
  test[4] = replaced(test[4], image=changed)
  test[5] = replaced(test[5], image=saved(tmp_path / 'b.webp', picture(21), 'WEBP', quality=70))
  blank = [saved(tmp_path / f'{n}.png', Image.new('RGB', (9, 9 + n), 'white')) for n in range(2)]
  data['train'][0] = replaced(data['train'][0], image=blank[0])
  test[0] = replaced(test[0], image=blank[1])
  found = look(data)
  assert list(found) == ['nearly_same_image_in_validation']
  assert found['nearly_same_image_in_validation'].examples == (
    'validation.csv:4 like train.csv:3',
    'validation.csv:5 like train.csv:21',
  )


def test_an_image_that_two_splits_share_is_found_among_several(data):
  train, test = data['train'], data['test']
  test[0] = replaced(test[0], image=(test[0].image, train[5].image))
  train[6] = replaced(train[6], image=(train[6].image, data['validation'][3].image))
  test[1] = replaced(test[1], image=(test[1].image, test[2].image))
  found = look(data)
  assert {name: x.examples for name, x in found.items()} == {
    'same_image_in_validation': ('validation.csv:3',),
    'same_image_in_test': ('test.csv:0',),
  }
  sources = {split: TableSource(tuple(rows), (0,) * len(rows)) for split, rows in data.items()}
  twice = duplicates.find(sources, similar=False)
  assert [(x.kind, x.split, x.row, x.other_split, x.other_row) for x in twice] == [
    ('image', 'validation', 3, 'train', 6),
    ('image', 'test', 0, 'train', 5),
  ]


def test_one_example_with_two_labels_and_an_image_of_many(data, tmp_path):
  train = data['train']
  train[1] = replaced(train[1], text=train[0].text, image=train[0].image)
  placeholder = saved(tmp_path / 'none.png', picture(1000))
  for n in range(10, 20, 2):
    train[n] = replaced(train[n], image=placeholder)
  found = look(data)
  assert found['same_example_other_label'].examples == ('train.csv:0', 'train.csv:1')
  assert found['repeated_image'].count == 7 and len(found) == 2


def test_classes_of_few_rows_and_texts_that_name_theirs(data):
  train = data['train']
  for n in range(4):
    train[n] = replaced(train[n], labels=('c',), text=f'here is C, {n} of it')
  found = look(data)
  assert {name: x.count for name, x in found.items()} == {
    'class_of_few_rows': 1,
    'class_not_in_test': 1,
    'label_in_text': 4,
  }
  assert found['class_of_few_rows'].examples == ("'c' (4)",)


def test_gaps_are_no_duplicates(data):
  for rows in data.values():
    for n in range(0, len(rows), 2):
      rows[n] = replaced(rows[n], image=None)
    for n in range(1, len(rows), 2):
      rows[n] = replaced(rows[n], text=None)
  assert look(data) == {}


def test_difference_hash_by_hand():
  """A staircase of 17 columns that rises, but for one that falls."""
  value_w = np.arange(17) * 10
  value_w[8] = 0
  image = Image.fromarray(np.tile(value_w.astype(np.uint8), (16, 1)))
  buffer = io.BytesIO()
  image.save(buffer, 'PNG')
  bits_hw = near_images.difference_hash(buffer.getvalue()).reshape(16, 16)
  assert (bits_hw == (np.arange(16) != 7)).all()
  assert near_images.difference_hash(b'no image') is None


@pytest.mark.parametrize(
  ('one', 'other'),
  [('A  Big, red box!', 'a big red BOX'), ('Ｗｉｄｅ', 'wide'), ('!!!', ' !!! ')],
)
def test_texts_that_differ_in_form_alone_have_one_key(one, other):
  assert same.text_key(one) == same.text_key(other) != same.text_key(one + ' 2')


def test_groups_are_components_but_for_what_many_share():
  texts = [('a',), ('a',), ('b',), (), ('z',), *[(f'x{n}',) for n in range(55)]]
  images = [(1,), (2,), (2, 3), (3,), (4,), *[(5,)] * 55]
  numbers, kinds = same.groups({'text': texts, 'image': images})
  assert kinds == ['text', 'image'] and len(set(numbers[:4])) == 1
  assert len(set(numbers)) == 57  # 5 is a placeholder.
  questions = [(f'q{7 * n % 23}',) for n in range(60)]
  pictures = [(n // 3,) for n in range(60)]
  numbers, kinds = same.groups({'text': questions, 'image': pictures})
  assert kinds == ['image'] and numbers == [3 * (n // 3) for n in range(60)]
