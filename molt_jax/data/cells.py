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
  uint8 array [H, W(, 3 or 4)]    value                refused          refused          refused
  other arrays                    refused              refused          refused          refused
  list                            refused              refused          several (8)      refused
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

A path is refused with NUL in it, and with halves of surrogate pairs unless they stand for the bytes
of a file's name (`os.fsdecode`).
"""

import collections
import decimal
import functools
import numbers
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
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
_EXACT = 1 << 53
_SHOWN_CHARACTERS = 60
MOST_PATH = 300  # Characters of a path that a line shows.

# Characters that cannot be seen, beside blanks and controls. The first are dropped from labels; the
# second join or vary their neighbours, so they matter there.
_DROPPED = '\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb'
_JOINING = (
  '\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u200c\u200d\u2800\u3164\ufe00-\ufe0f\uffa0'
  '\U000e0000-\U000e0fff'
)
_VISIBLE = re.compile(f'[^\\s\x00-\x1f\x7f-\x9f{_DROPPED}{_JOINING}]')
_DROP = re.compile(f'[{_DROPPED}]')
_UNSEEN = re.compile(f'[\\s{_DROPPED}{_JOINING}]')
_CONTROL = re.compile('[\x00-\x1f\x7f-\x9f]')
_SURROGATE = re.compile('[\ud800-\udfff]')
_WHOLE = re.compile(r'([+-]?)(0|[1-9][0-9]*)(?:\.0*)?')
_EXPONENT = re.compile(r'[+-]?[0-9](?:\.[0-9]*)?[eE][+-][0-9]{1,3}')
_BETWEEN = re.compile(r'(?<=\w)[-_](?=\w)')
_NUMBER = re.compile(r'[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?')
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
_BOOLEANS = {word: word.lower() for word in ('true', 'True', 'TRUE', 'false', 'False', 'FALSE')}
_ALIKE = str.maketrans('‐‑‒–—−‘’“”', '------\'\'""')
_BLANK_TYPES = ('NAType', 'NaTType')  # Of pandas, which is not imported for them.

# What is remarked of a cell that is not refused.
NULL_WORD, REPLACED, WRITTEN, TWICE = 'null word', 'replaced', 'written', 'twice'
# Called with a kind of remark and the cell.
Remark = Callable[[str, str], None]


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


def read(column: str, value: Any, remark: Remark = lambda kind, value: None) -> Any:
  """Reads a cell by the table of this module's docstring.

  Args:
    column: 'image', 'text', 'label' or 'id'.
    value: what the cell holds.
    remark: called with what should be remarked of it.

  Returns:
    None: absent. A str; of 'image' perhaps bytes, a PIL image or a uint8 array.

  Raises:
    CellError: it is refused.
  """
  return _RULES[column](value, remark)


def read_labels(
  value: Any, *, several: bool, remark: Remark = lambda kind, value: None
) -> tuple[str, ...]:
  """Reads the labels of a row.

  Args:
    value: what the cell holds.
    several: whether a row can have several, in a list or joined by `|`.
    remark: as in `read`.

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
  names = {read('label', part, remark) for part in parts}
  return tuple(sorted(names - {None}))


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


# ---- The rules of the columns --------------------------------------------------------------------


def _text(value: Any, remark: Remark) -> str | None:
  if type(value) is not str:
    value = _string('text', value, remedy='give one string')
  if value is None or not _VISIBLE.search(value):
    return None
  if is_null_word(value):
    remark(NULL_WORD, value)
    return None
  if _is_written(value):
    remark(WRITTEN, value)
  cleaned = clean(value)
  if cleaned != value:
    remark(REPLACED, value)
  return cleaned


def _image(value: Any, remark: Remark) -> Any:
  if isinstance(value, bytes | bytearray | memoryview):
    return bytes(value)
  if isinstance(value, Image.Image):
    return value
  remedy = 'give the path of an image file'
  if isinstance(value, os.PathLike):
    try:
      return _path(os.fsdecode(value))
    except TypeError:  # Its __fspath__ gives something else.
      raise _refused_type('image', value, remedy) from None
  if is_null(value):
    return None
  if not isinstance(value, str | numbers.Number) and hasattr(value, '__array__'):
    return _pixels(value)
  if (text := _string('image', value, remedy=remedy)) is None or not _VISIBLE.search(text):
    return None
  if is_null_word(text):
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
    raise _refused_type('image', value, 'give a path, bytes, a PIL or a NumPy image') from None
  legal = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
  if np.ma.isMaskedArray(value) or array.dtype != np.uint8 or not legal or not array.size:
    kind = 'a masked array' if np.ma.isMaskedArray(value) else 'an array'
    raise CellError(
      'image',
      f'is {kind} {array.dtype}{list(array.shape)}',
      'give uint8 of 0 to 255, [H, W] or [H, W, 3 or 4]',
    )
  return array


def _label(value: Any, remark: Remark) -> str | None:
  del remark
  if isinstance(value, str):
    return _name(str.__str__(value))
  if isinstance(value, bool | np.bool_):
    return 'true' if value else 'false'
  remedy = 'give a string or a whole number'
  if not isinstance(value, int | float | np.integer | np.floating) or is_null(value):
    return _string('label', value, remedy=remedy)
  if isinstance(value, int | np.integer):
    return _digits('label', int(value), remedy)
  if not abs(value) < _EXACT:
    raise CellError(
      'label', 'is a number too large to be exact', 'write it as a string', str(value)
    )
  return str(int(value)) if value == int(value) else str(value)


@functools.lru_cache(maxsize=1 << 16)
def _name(text: str) -> str | None:
  """Returns the name of the class that a string stands for; None: blank."""
  if not _VISIBLE.search(text):
    return None
  _check_name(text)
  name = ' '.join(unicodedata.normalize('NFC', _DROP.sub('', text)).split())
  if name in NULL_WORDS:
    raise CellError(
      'label',
      'is a word that tables write for nothing',
      "leave it empty where there is no label; a class needs another name, such as 'no label'",
      shown(name),
    )
  if _CONTROL.search(name):
    raise CellError('label', 'has control characters', 'write it without them', shown(name))
  if _is_written(name):
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
    if abs(number) < _EXACT and number == number.to_integral_value():
      return str(int(number))
  return name


def _id(value: Any, remark: Remark) -> str:
  del remark
  remedy = 'give a name or a whole number'
  if isinstance(value, int | np.integer) and not isinstance(value, bool):
    return _digits('id', int(value), remedy)
  if isinstance(value, float | np.floating) and not is_null(value):
    if not abs(value) < _EXACT or value != int(value):
      raise CellError('id', 'is no whole number', remedy, str(value))
    return str(int(value))
  name = _string('id', value, remedy=remedy)
  if name is None or not _VISIBLE.search(name):
    raise CellError('id', 'is empty', remedy)
  if '/' in name or _SURROGATE.search(name) or _CONTROL.search(name) or len(name) > MOST_LABEL:
    raise CellError('id', 'is no plain name', remedy, shown(name))
  return name.strip()


_RULES = {'image': _image, 'text': _text, 'label': _label, 'id': _id}


# ---- What a value is -----------------------------------------------------------------------------


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
  return _DROP.sub('', word).strip().casefold() in _NULL_WORDS_FOLDED


def _is_written(text: str) -> bool:
  """Whether a string is what Python or JSON writes for a list, a dict, bytes or an object."""
  text = text.strip()
  if text[:2] in ('b"', "b'"):
    return len(text) > 2 and text[-1] == text[1]
  end, beginning = _WRITTEN.get(text[:1], ('', None))
  return bool(end) and text[-1] == end and beginning.match(text) is not None


def _string(column: str, value: Any, *, remedy: str) -> str | None:
  """Returns a string as it is, None for what stands for nothing; all else is refused."""
  if isinstance(value, str):
    return str.__str__(value)  # Of NumPy's strings, and of those with a __str__ of their own.
  if is_null(value):
    return None
  raise _refused_type(column, value, remedy)


def _refused_type(column: str, value: Any, remedy: str) -> CellError:
  reason = f'is {describe(value)}'
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  small = is_number and abs(value) < _EXACT
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


def _digits(column: str, number: int, remedy: str) -> str:
  if number.bit_length() > 3 * MOST_LABEL:  # Python refuses to write more digits than some 4,300.
    raise CellError(column, 'is a number of too many digits', remedy)
  return str(number)


# ---- Names of classes ----------------------------------------------------------------------------


def likeness(name: str) -> Any:
  """Returns what two names share that a reader may take for one class.

  Such are names that differ by case, Unicode form, invisible characters, quotes, or what stands
  between words (hot dog, hot-dog, hot_dog, hotdog), and numbers of one value.
  """
  folded = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', name).casefold())
  key = _UNSEEN.sub('', folded.translate(_ALIKE))
  return decimal.Decimal(key) if _NUMBER.fullmatch(key) else _BETWEEN.sub('', key)


def lookalikes(names: Iterable[str]) -> list[list[str]]:
  """Returns the groups of names that have one likeness."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[likeness(name)].append(name)
  return [group for group in groups.values() if len(group) > 1]
