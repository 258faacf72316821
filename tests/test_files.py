"""Files that others wrote: what is wrong with one is one line; nothing waits or fills memory."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molt_jax.errors import UserError
from molt_jax.runtime import files


def pipe(path):
  os.mkfifo(path)


def sparse(path):
  with open(path, 'wb') as file:
    file.truncate(1 << 40)


def link(target):
  return lambda path: path.symlink_to(target)


def content(raw):
  return lambda path: path.write_bytes(raw)


DAMAGES = {
  'nothing there': (lambda path: None, 'cannot be read .No such file'),
  'a pipe': (pipe, 'a named pipe, not a file'),
  'a folder': (lambda path: path.mkdir(), 'a folder, not a file'),
  'a device': (link('/dev/zero'), 'a device, not a file'),
  'a link into nothing': (link('nowhere'), 'cannot be read'),
  'a link to itself': (link('x.json'), 'cannot be read .Too many levels'),
  'empty': (content(b''), 'is empty'),
  'a Git LFS pointer': (
    content(b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'),
    'Git LFS pointer.*git lfs pull',
  ),
  'a terabyte': (sparse, 'has 1099511627776 bytes, more than'),
  'cut': (content(b'{"a": 1, "b"'), 'not valid JSON'),
  'words': (content(b'hello'), 'not valid JSON'),
  'no UTF-8': (content(b'{"a": "\xff"}'), r'not UTF-8 .byte 7'),
  'UTF-16': (content('{"a": 1}'.encode('utf-16')), 'not UTF-8'),
  'a byte order mark': (content(b'\xef\xbb\xbf{}'), 'not valid JSON: Unexpected UTF-8 BOM'),
  'deep': (content(b'[' * 200_000), 'nested too deeply'),
  'deep objects': (content(b'{"a":' * 200_000), 'nested too deeply'),
  'a key twice': (content(b'{"a": 1, "b": {"c": 1, "c": 2}}'), "the key 'c' is there twice"),
  'a list': (content(b'[1, 2]'), r'holds \[1, 2\], expected an object'),
  'a number': (content(b'7'), 'holds 7, expected an object'),
  'endless digits': (content(b'{"a": ' + b'1' * 100_000 + b'}'), 'not valid JSON'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_what_is_wrong_with_a_json_file_is_one_line(tmp_path, name):
  make, says = DAMAGES[name]
  path = tmp_path / 'x.json'
  make(path)
  with pytest.raises(UserError, match=says) as error:
    files.read_json(path)
  assert '\n' not in str(error.value) and 'x.json' in str(error.value)


@pytest.mark.parametrize('name', ['a\0b', 'x' * 5000, 'a\ud800b'])
def test_paths_that_no_file_can_have_are_one_line(tmp_path, name):
  with pytest.raises(UserError, match='cannot be read') as error:
    files.read_json(str(tmp_path / name))
  assert str(error.value).isprintable()


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
  max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans())
def test_what_json_can_say_is_read_as_the_library_reads_it(value, ascii_only):
  raw = json.dumps(value, ensure_ascii=ascii_only).encode('utf-8', 'surrogatepass')
  try:
    expected = json.loads(raw.decode('utf-8'))
  except UnicodeDecodeError:
    with pytest.raises(UserError, match='not UTF-8'):
      files.parse_json(raw, 'x')
    return
  assert files.parse_json(raw, 'x') == expected


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_one_line(raw):
  try:
    assert isinstance(files.parse_json(raw, 'x'), dict)
  except UserError as error:
    assert '\n' not in str(error) and str(error).startswith('x ')


@given(JSON)
def test_values_are_shown_on_one_printable_line(value):
  assert files.shown(value).isprintable() and len(files.shown(value)) < 1000
