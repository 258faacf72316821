"""What a cell means, wherever it comes from: absent, a value, or refused.

Tables (.csv, .jsonl), the files of published data sets and the arguments of `predict` are read by
`read`. No cell is ever turned into a string because that happened to work.

  cell                            image                text             label            id
  ------------------------------  -------------------  ---------------  ---------------  --------
  None, a NaN or NaT of any kind  absent               absent           absent           refused
  blank string (1)                absent               absent           absent           refused
  word for nothing (2)            absent, remarked     absent, remarked refused (3)      value
  other string                    path, trimmed        value (4)        value (5)        value (6)
  true, false                     refused              refused          'true', 'false'  refused
  whole number, also as 1.0       refused              refused          its digits (5)   its digits
  other finite number             refused              refused          as Python writes refused
  infinity, 2**53 and more (7)    refused              refused          refused          refused
  bytes                           content of a file    refused          refused          refused
  path object, PIL image          value                refused          refused          refused
  `pictures.Picture` (9)          value                refused          refused          refused
  uint8 array [H, W(, 3 or 4)]    value                refused          refused          refused
  other arrays                    refused              refused          refused          refused
  list                            several (10)         refused          several (8)      refused
  dict, tuple, set, anything else refused              refused          refused          refused

(1) Nothing in it can be seen: blanks of any script, control, zero-width and filler characters.
(2) `NULL_WORDS`, what pandas, R, spreadsheets and data bases write where there is nothing. In texts
    and images capitals do not count (a column in small letters has 'none'); in labels they do.
(3) 'None' or 'NA' (Namibia) may be a class, 'nan' may be a row without one: only the user knows.
(4) Halves of surrogate pairs and NUL become U+FFFD, which is remarked, and so are lists, dicts and
    bytes that were written as text.
(5) Unicode form NFC; trimmed, inner blanks one blank; invisible characters dropped, but not those
    that join (emoji, Persian). A whole number is one label however it is written: 1, 1.0, '1',
    '1.0', '+1', '1e+00'; not '01', an id, and not '1e5', whose sign is missing. 'True', 'TRUE' and
    true are 'true', never 1. Refused: control characters, halves of surrogate pairs, more than
    MOST_LABEL characters, and lists, dicts and bytes that were written as text ("b'cat'").
(6) A plain name: without slash, NUL and halves of surrogate pairs.
(7) As a floating point number, which is no longer exact there; a whole number may be as large.
(8) Where there may be several; each by the rules of a label, absent ones left out. 'a|b' is a list
    too.
(9) What stands for the bytes of an image in a Parquet or Arrow file until they are read.
(10) In a table alone; each by the rules of an image, absent ones left out. 'a.jpg|b.jpg' is a list
    too.

Where the user says which words stand for nothing, NULL_WORDS are strings as others.

A path is refused with NUL in it, and with halves of surrogate pairs unless they stand for the bytes
of a file's name (`os.fsdecode`).
"""

import decimal
import functools
import numbers
import os
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data.cell_values import (
  DROP,
  EXACT,
  MOST_LABEL,
  MOST_PATH,
  NULL_WORDS,
  VISIBLE,
  CellError,
  clean,
  describe,
  digits,
  is_null,
  is_null_word,
  is_written,
  plain,
  refused_type,
  shown,
  string,
)
from molt_jax.data.pictures import Picture

# What readers of cells need of values is found here too.
__all__ = [
  'MOST_LABEL',
  'MOST_PATH',
  'NULL_WORD',
  'NULL_WORDS',
  'REPLACED',
  'TWICE',
  'WRITTEN',
  'CellError',
  'Remark',
  'clean',
  'describe',
  'is_null',
  'is_null_word',
  'plain',
  'read',
  'read_labels',
  'shown',
]
_CONTROL = re.compile('[\x00-\x1f\x7f-\x9f]')
_SURROGATE = re.compile('[\ud800-\udfff]')
_WHOLE = re.compile(r'([+-]?)(0|[1-9][0-9]*)(?:\.0*)?')
_EXPONENT = re.compile(r'[+-]?[0-9](?:\.[0-9]*)?[eE][+-][0-9]{1,3}')
_BOOLEANS = {word: word.lower() for word in ('true', 'True', 'TRUE', 'false', 'False', 'FALSE')}
# What is remarked of a cell that is not refused.
NULL_WORD, REPLACED, WRITTEN, TWICE = 'null word', 'replaced', 'written', 'twice'
# Called with a kind of remark and the cell.
Remark = Callable[[str, str], None]


def read(
  column: str, value: Any, remark: Remark = lambda kind, value: None, *, words: bool = True
) -> Any:
  """Reads a cell by the table of this module's docstring.

  Args:
    column: 'image', 'text', 'label' or 'id'.
    value: what the cell holds.
    remark: called with what should be remarked of it.
    words: whether NULL_WORDS stand for nothing; else they are strings as others.

  Returns:
    None: absent. A str; of 'image' perhaps bytes, a PIL image or a uint8 array.

  Raises:
    CellError: it is refused.
  """
  return _RULES[column](value, remark, words)


def read_labels(
  value: Any, *, several: bool, remark: Remark = lambda kind, value: None, words: bool = True
) -> tuple[str, ...]:
  """Reads the labels of a row.

  Args:
    value: what the cell holds.
    several: whether a row can have several, in a list or joined by `|`.
    remark, words: as in `read`.

  Returns:
    names, sorted and without repetition; empty: absent.

  Raises:
    CellError: it is refused.
  """
  if isinstance(value, list) and not several:
    raise CellError('label', 'is a list', 'give one label, or set dataset.multi_label=True')
  if isinstance(value, list):
    parts = value
    for part in parts:
      if isinstance(part, str) and '|' in part:
        raise CellError(
          'label', 'is a list with | in a name', 'write each label by itself', shown(part)
        )
  else:
    parts = value.split('|') if several and isinstance(value, str) else [value]
  names = {read('label', part, remark, words=words) for part in parts}
  return tuple(sorted(names - {None}))


def _text(value: Any, remark: Remark, words: bool) -> str | None:
  if type(value) is not str:
    value = string('text', value, remedy='give one string')
  if value is None or not VISIBLE.search(value):
    return None
  if words and is_null_word(value):
    remark(NULL_WORD, value)
    return None
  if is_written(value):
    remark(WRITTEN, value)
  cleaned = clean(value)
  if cleaned != value:
    remark(REPLACED, value)
  return cleaned


def _image(value: Any, remark: Remark, words: bool) -> Any:
  if isinstance(value, bytes | bytearray | memoryview):
    return bytes(value)
  if isinstance(value, Image.Image | Picture):
    return value
  remedy = 'give the path of an image file'
  if isinstance(value, os.PathLike):
    try:
      return _path(os.fsdecode(value))
    except TypeError:  # Its __fspath__ gives something else.
      raise refused_type('image', value, remedy) from None
  if is_null(value):
    return None
  if not isinstance(value, str | numbers.Number) and hasattr(value, '__array__'):
    return _pixels(value)
  if (text := string('image', value, remedy=remedy)) is None or not VISIBLE.search(text):
    return None
  if words and is_null_word(text):
    remark(NULL_WORD, text)
    return None
  return _path(text.strip())


def _path(path: str) -> str:
  if '\0' in path:
    raise CellError(
      'image', 'has a zero character', 'give the path of an image file', shown(path, most=MOST_PATH)
    )
  try:
    os.fsencode(path)
  except UnicodeEncodeError:
    raise CellError(
      'image',
      'has half of a surrogate pair',
      'write the path of the file anew',
      shown(path, most=MOST_PATH),
    ) from None
  return path


def _pixels(value: Any) -> np.ndarray:
  try:
    array = np.asarray(value)
  except Exception:  # Whatever an object of another library raises.
    raise refused_type('image', value, 'give a path, bytes, a PIL or a NumPy image') from None
  legal = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
  if np.ma.isMaskedArray(value) or array.dtype != np.uint8 or not legal or not array.size:
    kind = 'a masked array' if np.ma.isMaskedArray(value) else 'an array'
    raise CellError(
      'image',
      f'is {kind} {array.dtype}{list(array.shape)}',
      'give uint8 of 0 to 255, [H, W] or [H, W, 3 or 4]',
    )
  return array


def _label(value: Any, remark: Remark, words: bool) -> str | None:
  del remark
  if isinstance(value, str):
    return _name(str.__str__(value), words)
  if isinstance(value, bool | np.bool_):
    return 'true' if value else 'false'
  remedy = 'give a string or a whole number'
  if not isinstance(value, int | float | np.integer | np.floating) or is_null(value):
    return string('label', value, remedy=remedy)
  if isinstance(value, int | np.integer):
    return digits('label', int(value), remedy)
  if not abs(value) < EXACT:
    raise CellError(
      'label', 'is a number too large to be exact', 'write it as a string', str(value)
    )
  return str(int(value)) if value == int(value) else str(value)


@functools.lru_cache(maxsize=1 << 16)
def _name(text: str, words: bool) -> str | None:
  """Returns the name of the class that a string stands for; None: blank."""
  if not VISIBLE.search(text):
    return None
  _check_name(text)
  name = ' '.join(unicodedata.normalize('NFC', DROP.sub('', text)).split())
  if words and name in NULL_WORDS:
    raise CellError(
      'label',
      'is a word that tables write for nothing',
      "leave it empty where there is no label; a class needs another name, such as 'no label'",
      shown(name),
    )
  if _CONTROL.search(name):
    raise CellError('label', 'has control characters', 'write it without them', shown(name))
  if is_written(name):
    raise CellError(
      'label',
      'is a list, dict, bytes or object that was written as text',
      'give one label, or several as a|b with dataset.multi_label=True',
      shown(name),
    )
  return _BOOLEANS.get(name) or _whole(name)


def _check_name(text: str) -> None:
  if len(text) > MOST_LABEL:
    raise CellError(
      'label', f'has more than {MOST_LABEL:,} characters', 'is it the right column?', shown(text)
    )
  if _SURROGATE.search(text):
    raise CellError('label', 'has half of a surrogate pair', 'write it anew', shown(text))


def _whole(name: str) -> str:
  """Returns the digits of a whole number, any other name as it is."""
  if match := _WHOLE.fullmatch(name):
    return str(int(match[1] + match[2]))
  if _EXPONENT.fullmatch(name):
    number = decimal.Decimal(name)
    if abs(number) < EXACT and number == number.to_integral_value():
      return str(int(number))
  return name


def _id(value: Any, remark: Remark, words: bool) -> str:
  del remark, words
  remedy = 'give a name or a whole number'
  if isinstance(value, int | np.integer) and not isinstance(value, bool):
    return digits('id', int(value), remedy)
  if isinstance(value, float | np.floating) and not is_null(value):
    if not abs(value) < EXACT or value != int(value):
      raise CellError('id', 'is no whole number', remedy, str(value))
    return str(int(value))
  name = string('id', value, remedy=remedy)
  if name is None or not VISIBLE.search(name):
    raise CellError('id', 'is empty', remedy)
  if '/' in name or _SURROGATE.search(name) or _CONTROL.search(name) or len(name) > MOST_LABEL:
    raise CellError('id', 'is no plain name', remedy, shown(name))
  return name.strip()


_RULES = {'image': _image, 'text': _text, 'label': _label, 'id': _id}
