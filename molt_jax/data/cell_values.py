"""What the value of a cell is, whatever its column, and how a message shows it."""

import decimal
import numbers
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

NULL_WORDS = frozenset(
  (
    'nan',
    'NaN',
    '-nan',
    '-NaN',
    'None',
    'NA',
    'N/A',
    'n/a',
    'NULL',
    'null',
    'NaT',
    '<NA>',
    '#N/A',
    '#N/A N/A',
    '#NA',
    '#NULL!',
    '#REF!',
    '#VALUE!',
    '#DIV/0!',
    '#NAME?',
    '#NUM!',
    '1.#IND',
    '-1.#IND',
    '1.#QNAN',
    '-1.#QNAN',
    '\\N',
  )
)
_NULL_WORDS_FOLDED = frozenset(word.casefold() for word in NULL_WORDS)
_LONGEST_NULL_WORD = max(map(len, NULL_WORDS))
MOST_LABEL = 1000
EXACT = 1 << 53
_SHOWN_CHARACTERS = 60
MOST_PATH = 300  # Characters of a path that a line shows.
# Characters that cannot be seen, beside blanks and controls. The first are dropped from labels; the
# second join or vary their neighbours, so they matter there.
_DROPPED = '\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb'
_JOINING = (
  '\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u200c\u200d\u2800\u3164\ufe00-\ufe0f\uffa0'
  '\U000e0000-\U000e0fff'
)
VISIBLE = re.compile(f'[^\\s\x00-\x1f\x7f-\x9f{_DROPPED}{_JOINING}]')
DROP = re.compile(f'[{_DROPPED}]')
UNSEEN = re.compile(f'[\\s{_DROPPED}{_JOINING}]')
# What str() or json.dumps makes of objects, by how it begins and ends: ['a'], [1, 2], [], {'a': 1},
# {1, 2}, {}, ('a', 'b'), (1, 2), <Thing at 0x1f>.
_WRITTEN = {
  '[': (
    ']',
    re.compile(r"""\[\s*(?:['"\[{(\]]|(?:None|nan|null|[Tt]rue|[Ff]alse)\b|[-\d.,\s]*\])"""),
  ),
  '{': ('}', re.compile(r"""\{\s*(?:['"}]|-?\d[\d.]*\s*[:,])""")),
  '(': (')', re.compile(r"""\(\s*(?:(['"]).{0,200}?\1|-?\d[\d.]*)\s*,""", re.DOTALL)),
  '<': ('>', re.compile(r'<[^<>]* at 0x[0-9A-Fa-f]+>')),
}
_BLANK_TYPES = ('NAType', 'NaTType')  # Of pandas, which is not imported for them.


class CellError(ValueError):
  """A cell that is refused.

  Attributes:
    column: 'image', 'text', 'label' or 'id'.
    reason: what the cell is.
    remedy: what to give instead.
    value: the cell, shortened for a message; empty where the reason says all.
  """

  def __init__(self, column: str, reason: str, remedy: str, value: str = ''):
    self.column, self.reason, self.remedy, self.value = column, reason, remedy, value
    super().__init__(f'{column} {self.sentence()}')

  def sentence(self) -> str:
    """Returns reason, value and remedy."""
    value = f' ({self.value})' if self.value else ''
    return f'{self.reason}{value}: {self.remedy}'


def clean(text: str) -> str:
  """Puts U+FFFD for halves of surrogate pairs and for NUL; two halves that meet become a pair."""
  if not text.isascii():
    try:
      text.encode()
    except UnicodeEncodeError:
      text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return text.replace('\0', '\ufffd')


def shown(value: str, *, most: int = _SHOWN_CHARACTERS) -> str:
  """Returns a string in quotes, on one line and not too long."""
  return repr(value[:most]) + ('…' if len(value) > most else '')


def plain(text: str) -> str:
  """Returns a text as it is, in quotes where something in it cannot be seen or it is too long."""
  return text if text.isprintable() and len(text) <= MOST_PATH else shown(text, most=MOST_PATH)


def is_null(value: Any) -> bool:
  """Whether a value stands for nothing: None, NaN and NaT of Python, NumPy and pandas."""
  if value is None or value is np.ma.masked:
    return True
  if isinstance(value, decimal.Decimal):
    return value.is_nan()
  if isinstance(value, float | complex | np.inexact):
    return bool(value != value)
  if isinstance(value, np.datetime64 | np.timedelta64):
    return bool(np.isnat(value))
  kind = type(value)
  return kind.__name__ in _BLANK_TYPES and kind.__module__.partition('.')[0] == 'pandas'


def is_null_word(text: str) -> bool:
  """Whether a string is one of NULL_WORDS, in any capitals, blanks and unseen characters aside."""
  word = text.strip()
  if len(word) > 2 * _LONGEST_NULL_WORD:
    return False
  return DROP.sub('', word).strip().casefold() in _NULL_WORDS_FOLDED


def is_written(text: str) -> bool:
  """Whether a string is what Python or JSON writes for a list, a dict, bytes or an object."""
  text = text.strip()
  if text[:2] in ('b"', "b'"):
    return len(text) > 2 and text[-1] == text[1]
  end, beginning = _WRITTEN.get(text[:1], ('', None))
  return bool(end) and text[-1] == end and beginning.match(text) is not None


def string(column: str, value: Any, *, remedy: str) -> str | None:
  """Returns a string as it is, None for what stands for nothing; all else is refused."""
  if isinstance(value, str):
    return str.__str__(value)  # Of NumPy's strings, and of those with a __str__ of their own.
  if is_null(value):
    return None
  raise refused_type(column, value, remedy)


def digits(column: str, number: int, remedy: str) -> str:
  if number.bit_length() > 3 * MOST_LABEL:  # Python refuses to write more digits than some 4,300.
    raise CellError(column, 'is a number of too many digits', remedy)
  return str(number)


def refused_type(column: str, value: Any, remedy: str) -> CellError:
  reason = f'is {describe(value)}'
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  small = is_number and abs(value) < EXACT
  return CellError(column, reason, remedy, repr(value) if small else '')


# The first that fits; booleans are whole numbers to Python.
_TYPES = (
  ((bool, np.bool_), 'true or false'),
  (numbers.Number, 'a number'),
  (str, 'a string'),
  ((bytes, bytearray, memoryview), 'bytes'),
  (list, 'a list'),
  (tuple, 'a tuple'),
  (Mapping, 'a dict'),
  ((set, frozenset), 'a set'),
  (np.ndarray, 'an array'),
  (Image.Image, 'an image'),
  (os.PathLike, 'a path object'),
)


def describe(value: Any) -> str:
  """Returns what a value is, in words."""
  for types, words in _TYPES:
    if isinstance(value, types):
      return words
  return f'of type {shown(type(value).__name__)}'
