"""What `predict` is given: every kind of batch and of argument, and what is said of each."""

import array
import collections
import io
import itertools
import json
import os
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from PIL import Image

from molt_jax import predict
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import given
from molt_jax.errors import UserError

NAN = float('nan')


class Column:
  """Like a column of pandas."""

  def __init__(self, *items, dtype=object):
    self._array = np.empty(len(items), dtype)
    self._array[:] = items

  def __array__(self, dtype=None, copy=None):
    return self._array


class Table(Column):
  """Like a table of pandas: an iteration goes over the names of its columns."""

  columns = ['text']

  def __iter__(self):
    return iter(self.columns)


class Broken:
  """An array that cannot be had."""

  def __array__(self, dtype=None, copy=None):
    raise RuntimeError('gone')


@pytest.fixture
def predictor(make_preprocess, monkeypatch):
  """A predictor without towers, whose answer is always the first class; it keeps the examples."""
  made = object.__new__(predict.Predictor)
  towers = {'image': None, 'text': None}
  made._assembly = types.SimpleNamespace(towers=towers, preprocess=make_preprocess())
  made.class_names, made.examples = ['cat', 'dog'], []
  made.config = CLASSIFIER.default()

  def probabilities(examples):
    made.examples += examples
    return np.tile(np.array([0.75, 0.25]), (len(examples), 1))

  made._forward = types.SimpleNamespace(probabilities=probabilities)
  monkeypatch.setattr(predict, 'load', lambda workdir: made)
  return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
  Image.new('RGB', (4, 4), 'red').save(tmp_path / 'a.png')
  (tmp_path / 'no_image.txt').write_text('x')
  (tmp_path / 'empty.png').write_bytes(b'')
  (tmp_path / 'sub').mkdir()
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'loop').symlink_to('loop')
  monkeypatch.chdir(tmp_path)
  return tmp_path


TEXTS = ['a text', None, 'b']
BATCHES = {
  'list': lambda: ['a text', NAN, 'b'],
  'tuple': lambda: ('a text', None, 'b'),
  'generator': lambda: (text for text in ('a text', '', 'b')),
  'map': lambda: map(str, ['a text', 'nan', 'b']),
  'deque': lambda: collections.deque(['a text', None, 'b']),
  'array of strings': lambda: np.array(['a text', '', 'b']),
  'array of objects': lambda: np.array(['a text', NAN, 'b'], object),
  'masked array': lambda: np.ma.masked_array(np.array(['a text', 'x', 'b']), [False, True, False]),
  'strings of numpy': lambda: [np.str_('a text'), np.float32('nan'), np.str_('b')],
  'variable strings of numpy': lambda: np.array(['a text', ' ', 'b'], np.dtypes.StringDType()),
  'column of a table': lambda: Column('a text', NAN, 'b'),
  'arrow': lambda: pyarrow.array(['a text', None, 'b']),
  'chunks of arrow': lambda: pyarrow.chunked_array([['a text', None], ['b']]),
}


@pytest.mark.parametrize('name', BATCHES)
def test_every_kind_of_batch_is_a_list(name):
  pairs, many = given.read_inputs(['a.png'] * 3, BATCHES[name]())
  assert many and pairs == [('a.png', text) for text in TEXTS]
  assert all(type(text) is str for _, text in pairs if text is not None)


def test_batches_of_images(folder):
  paths = [pathlib.Path('a.png'), 'a.png', (folder / 'a.png').read_bytes(), None]
  for batch in (paths, tuple(paths), iter(paths), Column(*paths)):
    (first, second, third, fourth), many = given.read_inputs(batch, ['x'] * 4)
    assert (
      many and first[0] == second[0] == 'a.png' and third[0][:4] == b'\x89PNG' and fourth[0] is None
    )
  pairs, _ = given.read_inputs(Column(NAN, NAN, dtype=float), 'both')
  assert pairs == [(None, 'both')] * 2


def test_one_image_however_it_is_given(folder, predictor):
  pixels = np.asarray(Image.open('a.png'))
  for image in (
    'a.png',
    ' a.png ',
    pathlib.Path('a.png'),
    folder / 'a.png',
    str(folder / 'a.png'),
    (folder / 'a.png').read_bytes(),
    bytearray((folder / 'a.png').read_bytes()),
    pixels,
    jnp.asarray(pixels),
    Image.open('a.png'),
  ):
    answer = predictor.predict(image)
    assert answer['image'] and not answer['text'] and answer['labels'][0]['label'] == 'cat'
  assert all(np.array_equal(x['image'], predictor.examples[0]['image']) for x in predictor.examples)


def test_a_name_in_other_bytes_than_utf_8_is_a_path(folder, predictor):
  os.rename('a.png', b'caf\xe9.png')
  assert predictor.predict(image=os.listdir('.')[os.listdir(b'.').index(b'caf\xe9.png')])['image']


# image, text, what is said.
MISTAKES = {
  'nothing': (None, None, 'both image and text are absent; give at least one'),
  'blank': ('', ' ', 'both image and text are absent'),
  'NaN': (NAN, None, 'both image and text are absent'),
  'a word for nothing': (None, 'nan', r'absent \(a word such as nan is absent too\)'),
  'a gap in a list': (None, ['x', None], r'absent \(example 1\)'),
  'lengths': (['a.png', 'a.png'], ['x'], '2 images and 1 texts; give lists of equal length'),
  'bytes': (None, b'x', 'text is bytes: give one string'),
  'a number': (None, 3, r'text is a number \(3\)'),
  'a boolean': (None, True, 'text is true or false'),
  'numbers': (None, np.zeros(2), r'text\[0\], text\[1\] is a number'),
  'a list in a list': (None, ['x', ['y']], r'text\[1\] is a list'),
  'a tuple in a list': (None, [('x',)], r'text\[0\] is a tuple'),
  'a dict': (None, {'text': 'x'}, 'text is a dict: give a string, or a list of strings'),
  'a set': (None, {'x'}, 'text is a set'),
  'a file': (None, io.StringIO('x'), 'text is of type .StringIO.: give a string'),
  'a table': (None, Table('x'), 'text is of type .Table.: .* one column of a table'),
  'a table of arrow': (None, pyarrow.table({'text': ['x']}), "text is of type 'Table'"),
  'a path': (None, pathlib.Path('a.png'), 'text is a path object'),
  'an array of two dimensions': (None, np.array([['x']]), 'text is an array'),
  'an array without dimensions': (None, np.array('x'), 'text is an array'),
  'an object': (None, object(), "text is of type 'object'"),
  'without end': (None, itertools.repeat('x'), 'text has more than 4,194,304 items'),
  'the text first': ('slice of pizza', None, r"'slice of pizza' .*no such file.*text=\.\.\."),
  'no such file': ('b.png', None, r"image 'b.png' cannot be opened \(no such file\)"),
  'no such file in a list': (['a.png', 'b.png'], None, r"image\[1\] 'b.png' cannot be opened"),
  'a folder': ('sub', None, r"'sub' cannot be opened \(a folder\)"),
  'the folder itself': (pathlib.Path(), None, r'\(a folder\)'),
  'a pipe': ('pipe', None, r'\(a pipe\)'),
  'a device': ('/dev/zero', None, r'\(a device\)'),
  'a loop': ('loop', None, r'\(too many levels'),
  'a long name': ('x' * 5000, None, r'\(file name too long\)'),
  'a zero character': ('a\0.png', None, 'image has a zero character'),
  'half of a pair': ('\ud83d.png', None, 'image has half of a surrogate pair'),
  'an address': ('https://example.org/a.png', None, 'addresses are not read'),
  'no image': ('no_image.txt', None, r"'no_image.txt' cannot be decoded"),
  'an empty file': ('empty.png', None, 'cannot be decoded'),
  'bytes of no image': (b'x', None, 'image cannot be decoded'),
  'bytes of no image in a list': ([b'x'], None, r'image\[0\] cannot be decoded'),
  'floats': (np.zeros((4, 4, 3), np.float32), None, r'array float32\[4, 4, 3\]: give uint8'),
  'channels first': (np.zeros((3, 8, 9), np.uint8), None, r'array uint8\[3, 8, 9\]'),
  'a batch of pixels': (np.zeros((2, 4, 4, 3), np.uint8), None, r'array uint8\[2, 4, 4, 3\]'),
  'bytes as numbers': (np.zeros(9, np.uint8), None, r'array uint8\[9\]'),
  'an image that is a file': (io.BytesIO(b'x'), None, "image is of type 'BytesIO': .* bytes"),
  'an image that is a number': (3, None, r'image is a number \(3\)'),
  'an image that is a dict': ({'bytes': b''}, None, 'image is a dict'),
  'a broken array': (Broken(), None, "image is of type 'Broken'"),
  'numbers of an array': (array.array('B', [1]), None, r'image\[0\] is a number|type .array'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line(folder, predictor, name):
  image, text, says = MISTAKES[name]
  with pytest.raises(UserError, match=says) as error:
    predictor.predict(image, text)
  assert str(error.value).startswith('predict: ') and '\n' not in str(error.value)
  assert len(str(error.value)) < 600 and not predictor.examples


def test_with_errors_by_row_an_example_loses_what_cannot_be_used(folder, predictor):
  images = ['a.png', 'b.png', 'no_image.txt', 3, np.zeros((4, 4), np.uint16), None]
  answers = predictor.predict(images, ['x', 'y', None, 'z', {}, 'w'], errors='row')
  assert [(bool(x['labels']), x['image'], x['text']) for x in answers] == [
    (True, True, True),
    (True, False, True),
    (False, False, False),
    (True, False, True),
    (False, False, False),
    (True, False, True),
  ]
  assert ['error' in x for x in answers] == [False, True, True, True, True, False]
  assert "image[1] 'b.png' cannot be opened (no such file)" in answers[1]['error']
  assert 'cannot be decoded' in answers[2]['error'] and 'is a number' in answers[3]['error']
  assert predictor.predict('b.png', errors='row')['labels'] == []
  assert 'neither' in predictor.predict(errors='row')['error']
  assert list(predictor.classes_) == ['cat', 'dog']
  with pytest.raises(UserError, match="errors: ignore is not legal; give 'raise' or 'row'"):
    predictor.predict('a.png', errors='ignore')


@pytest.mark.parametrize('top_k', [0, -1, True, 2.0, '5', None, NAN])
def test_top_k_is_a_whole_number(predictor, top_k):
  with pytest.raises(UserError, match='top_k: .* give a whole number >= 1'):
    predictor.predict(text='x', top_k=top_k)


def test_answers_say_what_was_there(folder, predictor, capsys):
  answers = predictor.predict(['a.png', NAN, 'None'], ('x', 'y \ud83d', 'z'))
  assert [(answer['image'], answer['text']) for answer in answers] == [
    (True, True),
    (False, True),
    (False, True),
  ]
  assert capsys.readouterr().err.splitlines() == [
    'predict: text[1] has half of a surrogate pair or a zero character: replaced by U+FFFD',
    "predict: image[2] is a word that tables write for nothing ('None'): taken as absent",
  ]
  assert predictor.predict(text=[]) == [] and predictor.predict((), ()) == []
  assert repr(predictor) == '<Predictor: 2 classes, from image and text>'


ARGUMENTS = {
  'text': (['--text=a red square'], 0, '"text": true'),
  'bytes that are no UTF-8': (['--text=caf\udce9'], 0, '"text": true'),
  'both': (['--image=a.png', '--text=x'], 0, '"image": true'),
  'an empty image': (['--image=', '--text=x'], 0, '"image": false'),
  'an empty text': (['--image=a.png', '--text= '], 0, '"text": false'),
  'a word for nothing': (['--image=a.png', '--text=None'], 0, '"text": false'),
  'both empty': (['--image=', '--text='], 2, 'both image and text are absent'),
  'a word for nothing alone': (['--text=nan'], 2, 'both image and text are absent'),
  'a folder': (['--image=sub'], 2, "image 'sub' cannot be opened (a folder)"),
  'a pipe': (['--image=pipe'], 2, '(a pipe)'),
  'a text as an image': (['--image=slice of pizza'], 2, 'no such file'),
  'no file of other bytes': (['--image=caf\udce9.png'], 2, r"'caf\udce9.png' cannot be opened"),
}


@pytest.mark.parametrize('name', ARGUMENTS)
def test_the_command_line(folder, predictor, capsys, name):
  arguments, code, says = ARGUMENTS[name]
  assert predict.main(['--workdir=run', *arguments]) == code
  out, err = capsys.readouterr()
  if code:
    assert err.startswith('error: ') and err.count('\n') == 1 and says in err and not out
  else:
    assert says in out and len(json.loads(out)['labels']) == 2
