"""Tables, files of published data sets and arguments of `predict` with hostile cells.

What becomes of a cell is known when it is made: it is built from what it means. The whole input is
then either refused in one line or read exactly as it was meant.
"""

import csv
import json
import os
import pathlib
import unicodedata

import numpy as np
from PIL import Image

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import given, table
from molt_jax.data.published import hateful_memes
from molt_jax.data.published.layout import LeftOut
from molt_jax.data.sources import classes_of
from molt_jax.errors import UserError

REFUSED = object()
NAN = float('nan')
BLANKS = (' ', '\t', '\n', '\u00a0', '\u2003', '\u3000', '\u200b', '\ufeff', '\u2060')
WORDS = ('nan', 'NaN', 'None', 'NA', 'N/A', 'NULL', 'null', '<NA>', 'NaT', '#N/A', '#NULL!', 'n/a')
LETTERS = 'abzQ éßñ 東京 жд 😀👩\u200d🚀 \u0301 \u0627 "\',;|&<>[]{}()\\/#%$0123.-_=+ \r\n'
CONTAINERS = ([], ['a'], {}, {'a': 1}, [[]], [None], {'en': 'a text'}, [1, 2])
BAD_PATHS = (
  'b.png',
  'sub',
  'pipe',
  'loop',
  'a.png/c',
  'x' * 400,
  '/dev/null',
  'data:image/png;base64,iVBORw0K',
  '~',
)
PATHS = ('a.png', './a.png', 'ü.png', 'sub/../a.png')
JOINED = 'anchor one|z'  # One label and another, where a row has one label.
MODES = ('csv', 'jsonl', 'predict', 'published', 'damaged')


class Cells:
  """Makes cells: (what is written, what it means), None for absent and REFUSED."""

  def __init__(
    self, rng: np.random.Generator, *, typed: bool, escapes: bool, several: bool = False
  ):
    """`typed`: cells may be other than strings; `escapes`: strings may have what UTF-8 cannot;
    `several`: a row may have several images, in a list.
    """
    self._rng, self._typed, self._escapes, self._several = rng, typed, escapes, several

  def one_of(self, choices):
    return choices[int(self._rng.integers(len(choices)))]

  def chance(self, share: float) -> bool:
    return self._rng.random() < share

  def blank(self) -> str:
    return ''.join(self.one_of(BLANKS) for _ in range(self._rng.integers(4)))

  def letters(self, most: int) -> str:
    return ''.join(self.one_of(LETTERS) for _ in range(self._rng.integers(most)))

  def absent(self):
    if self._typed and self.chance(0.4):
      return self.one_of((None, NAN))
    return self.blank()

  def text(self):
    kind = self._rng.random()
    if kind < 0.2:
      return self.absent(), None
    if kind < 0.3:
      word = self.one_of(WORDS)
      return self.one_of((word, word.lower(), word.upper(), f' {word}\n', f'\ufeff{word}')), None
    if kind < 0.4 and self._typed:
      return self.one_of((0, 1, -2.5, True, False, 1e400, 10**30, *CONTAINERS)), REFUSED
    words = 'word' + self.letters(30)
    if self.chance(0.02):
      words += 'x' * 140_000
    if self.chance(0.1):
      return f'{words}\0', f'{words}\ufffd'
    if self._escapes and self.chance(0.2):
      half = chr(int(self._rng.integers(0xD800, 0xE000)))
      return f'{words}{half} {half}', f'{words}\ufffd \ufffd'
    if self._escapes and self.chance(0.1):
      return f'{words}\ud83d\ude00', f'{words}\U0001f600'
    return words, words

  def image(self):
    kind = self._rng.random()
    if kind < 0.4:
      return self.absent(), None
    if kind < 0.5:
      return self.one_of(WORDS), None
    if kind < 0.55 and self._typed:
      value = self.one_of((0, 1.5, True, *CONTAINERS))
      return value, None if self._several and value in ([], [None]) else REFUSED
    if kind < 0.65:
      return self.one_of(BAD_PATHS), REFUSED
    if kind < 0.68:
      return 'a\0.png', REFUSED
    if kind < 0.7 and self._escapes:
      return '\ud83d.png', REFUSED
    path = self.one_of(PATHS)
    return self.one_of((path, f' {path}', f'{path}\t')), os.path.normpath(path)

  def label(self):
    kind = self._rng.random()
    if kind < 0.1:
      return self.absent(), None
    if kind < 0.2:
      bad = ('a\x1b', 'a\0', 'x' * 2000, "['a', 'b']", '{"a": 1}', '[1, 2]', JOINED)
      return self.one_of((*bad, *WORDS)), REFUSED
    if kind < 0.24 and self._escapes:
      return 'a\ud800', REFUSED
    if kind < 0.32 and self._typed:
      return self.one_of((1e300, float('inf'), 2.0**60, *CONTAINERS)), REFUSED
    if kind < 0.5:
      number = int(self._rng.integers(-20, 10**6))
      spelled = [f'{number}', f'{number}.0', f'{number}.', f'{number:+d}', f' {number}.000 ']
      if self._typed:
        spelled += [number, float(number)]
      if number:
        spelled.append(f'{number:.12e}')
      return self.one_of(spelled), str(number)
    if kind < 0.55:
      truth = self.chance(0.5)
      spelled = (
        str(truth),
        str(truth).lower(),
        str(truth).upper(),
        *([truth] if self._typed else []),
      )
      return self.one_of(spelled), str(truth).lower()
    return self.name()

  def labels(self):
    """Several labels in a cell, in a list or joined; what they mean is a set of names."""
    parts = [self.label() for _ in range(self._rng.integers(1, 4))]
    parts = [('z', 'z') if written == JOINED else (written, meant) for written, meant in parts]
    written = [cell for cell, _ in parts]
    joined = not self._typed or (self.chance(0.3) and all(isinstance(x, str) for x in written))
    names = {meant for _, meant in parts} - {None}
    return '|'.join(
      written
    ) if joined else written, REFUSED if REFUSED in names or not names else names

  def rows(self, columns):
    """Returns some rows; half of the time none is to be refused."""
    tame, rows = self.chance(0.5), []
    count = int(self._rng.integers(1, 6))
    while len(rows) < count:
      row = {column: getattr(self, column)() for column in columns}
      if not (tame and _is_bad(row)):
        rows.append(row)
    return rows

  def name(self):
    words = [
      self.one_of(('café', 'Ünï', 'hot', 'dog', '東京', '👩\u200d🚀', '01', '1e5', 'é' * 9))
      for _ in range(self._rng.integers(1, 4))
    ]
    meant = 'n ' + ' '.join(words)
    form = self.one_of(('NFC', 'NFD'))
    between = self.one_of((' ', '  ', '\u00a0', '\t '))
    written = self.blank() + between.join(['\u200bn', *words]) + self.blank()
    return unicodedata.normalize(form, written), unicodedata.normalize('NFC', meant)


def _is_bad(row) -> bool:
  no_content = row['image'][1] is None and row['text'][1] is None
  return no_content or any(meant is REFUSED for _, meant in row.values())


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Makes one input of one of the MODES; see `tools/fuzz.py`."""
  for name in ('a.png', 'ü.png'):
    Image.new('L', (2, 2)).save(folder / name)
  (folder / 'sub').mkdir()
  os.mkfifo(folder / 'pipe')
  (folder / 'loop').symlink_to('loop')
  mode = MODES[int(rng.integers(len(MODES)))]
  try:
    what = _TRIALS[mode](rng, folder)
  except UserError as error:
    raise AssertionError(f'{mode}: refused without a reason: {error}') from error
  return {what: 1}


def _one_line(error: UserError) -> None:
  message = str(error)
  assert '\n' not in message and len(message) < 4000, message[:4000]
  message.encode('utf-8', 'backslashreplace')


# ---- Tables --------------------------------------------------------------------------------------


def _table(rng, folder, kind: str) -> str:
  is_json = kind == 'jsonl'
  cells = Cells(rng, typed=is_json, escapes=is_json, several=is_json)
  label = ('label', 'labels')[int(rng.integers(2))]
  rows = cells.rows(('image', 'text', label))
  rows += [
    {'image': ('', None), 'text': ('x', 'x'), label: (name, name)}
    for name in ('anchor one', 'anchor two')
  ]
  records = [{name: cell[0] for name, cell in row.items()} for row in rows]
  for record in records:
    record['label'] = record.pop(label)
  _write(rng, folder / f'train.{kind}', records)
  for split in ('validation', 'test'):
    (folder / f'{split}.csv').write_text('image,text,label\n,x,anchor one\n')
  bad = any(map(_is_bad, rows))
  try:
    dataset = _load(folder, multi_label=label == 'labels')
  except UserError as error:
    _one_line(error)
    assert bad, f'refused without a reason: {error}'
    assert f'train.{kind}' in str(error), error
    return 'table refused'
  assert not bad, f'read, though it is to be refused: {rows}'
  _check_rows(dataset, [(row['image'][1], row['text'][1], row[label][1]) for row in rows], folder)
  return 'table read'


def _check_rows(dataset, rows, folder) -> None:
  source = dataset.splits['train']
  meant = [label if isinstance(label, set) else {label} - {None} for _, _, label in rows]
  assert set(dataset.class_names) == set().union(*meant), (dataset.class_names, meant)
  for number, (image, text, _) in enumerate(rows):
    got = source.read(number, image=False)
    names = [dataset.class_names[k] for k in classes_of(got['label'])]
    assert got['text'] == text, (got['text'], text)
    assert set(names) == meant[number] and len(names) == len(meant[number]), (names, meant[number])
    path = source.rows[number].image
    assert path is None if image is None else os.path.samefile(path, folder / image), (path, image)
    assert source.ids[number].startswith('train.')


def _load(folder, **fields):
  config = CLASSIFIER.default()
  config.dataset.update(name='table', path=str(folder), **fields)
  return table.load(config)


def _write(rng, file: pathlib.Path, records: list[dict]) -> None:
  if file.suffix == '.jsonl':
    end = ('\n', '\r\n', '\n\n')[int(rng.integers(3))]
    ascii_only = bool(rng.integers(2)) or any(
      '\ud83d' in repr(r) or '\\ud' in repr(r) for r in records
    )
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    file.write_bytes(end.join(lines).encode())
    return
  encoding = ('utf-8', 'utf-8-sig')[int(rng.integers(2))]
  how = {'lineterminator': ('\n', '\r\n', '\r')[int(rng.integers(3))], 'quoting': csv.QUOTE_ALL}
  if how['lineterminator'] == '\r\n':  # Else the csv module leaves the other one without quotes.
    how['quoting'] = (csv.QUOTE_ALL, csv.QUOTE_MINIMAL)[int(rng.integers(2))]
  extra = bool(rng.integers(2))
  with open(file, 'w', encoding=encoding, newline='') as stream:
    writer = csv.writer(stream, **how)
    writer.writerow(['label', 'image', *(['note', 'note'] if extra else []), ' text '])
    for r in records:
      cells = [r['label'], r['image'], *(['1', '2'] if extra else []), r['text']]
      writer.writerow(['' if cell is None else cell for cell in cells])


def _csv(rng, folder) -> str:
  return _table(rng, folder, 'csv')


def _jsonl(rng, folder) -> str:
  return _table(rng, folder, 'jsonl')


# ---- Arguments of predict ------------------------------------------------------------------------


def _predict(rng, folder) -> str:
  cells = Cells(rng, typed=True, escapes=True)
  rows = cells.rows(('image', 'text'))
  images = [row['image'][0] for row in rows]
  images = [_inside(rng, folder, path) for path in images]
  texts = [row['text'][0] for row in rows]
  batch = (list, tuple, iter)[int(rng.integers(3))]
  bad = any(map(_is_bad, rows))
  try:
    pairs, _ = given.read_inputs(batch(images), batch(texts))
    opened = [
      given.decoded(image, 'image') if isinstance(image, str | bytes) else image
      for image, _ in pairs
    ]
  except UserError as error:
    _one_line(error)
    assert bad, f'refused without a reason: {error}'
    return 'predict refused'
  assert not bad, f'read, though it is to be refused: {rows}'
  assert [text for _, text in pairs] == [row['text'][1] for row in rows]
  assert [image is None for image in opened] == [row['image'][1] is None for row in rows]
  return 'predict read'


def _inside(rng, folder, path):
  """Returns the path of one of the images as an absolute one, or the image; all else as it is."""
  if not isinstance(path, str) or path.strip() not in PATHS:
    return path
  file = folder / path.strip()
  kinds = (str(file), f' {file}', file, file.read_bytes(), Image.new('L', (2, 2)))
  return kinds[int(rng.integers(len(kinds)))]


# ---- Files of published data sets ----------------------------------------------------------------


GIVEN_LABELS = (
  (0, 0),
  (1, 1),
  (1.0, 1),
  ('0', 0),
  ('1.0', 1),
  (0, 0),
  (1, 1),
  (True, REFUSED),
  (2, REFUSED),
  (None, REFUSED),
  (NAN, REFUSED),
  ([1], REFUSED),
  ('yes', REFUSED),
)
GIVEN_IDS = (
  ('7', '00007'),
  (7, '00007'),
  (7.0, '00007'),
  ('a b', '00a b'),
  (7, '00007'),
  (7.5, REFUSED),
  (None, REFUSED),
  ([7], REFUSED),
  ('../7', REFUSED),
  (True, REFUSED),
)


def _published(rng, folder) -> str:
  cells = Cells(rng, typed=True, escapes=True)
  (row,) = cells.rows(('image', 'text'))[:1]
  text, image = row['text'], row['image']
  if isinstance(image[0], str) and image[1] is REFUSED and image[0].isprintable():
    image = ('c.png', 'c.png')  # Whether a file is there is found out later.
  label, name = cells.one_of(GIVEN_LABELS), cells.one_of(GIVEN_IDS)
  file = folder / 'train.jsonl'
  record = {'id': name[0], 'img': image[0], 'text': text[0], 'label': label[0]}
  file.write_text(json.dumps(record) + '\n')
  (row,) = hateful_memes.Memes(folder, {'train': file}).rows('train')
  bad = REFUSED in (text[1], image[1], label[1], name[1])
  assert isinstance(row, LeftOut) == bad, (row, record)
  if bad:
    assert '\n' not in f'{row.id} {row.reason}'
    return 'published refused'
  assert row.text == text[1] and row.labels == (label[1],) and row.id == name[1], (row, record)
  wanted = f'img/{name[1]}.png' if image[1] is None else image[1]
  assert os.path.normpath(row.image) == os.path.join(folder, wanted), (row, record)
  return 'published read'


# ---- Damaged files -------------------------------------------------------------------------------

GOOD = {
  'csv': 'image,text,label\na.png,ein schönes Bild,cat\n,"x, ""y""",dog\n'.encode(),
  'jsonl': b'{"image": "a.png", "text": "ein sch\xc3\xb6nes Bild", "label": "cat"}\n'
  b'{"image": null, "text": "x", "label": "dog", "note": [1, {"a": 2}]}\n',
}


def _damaged(rng, folder) -> str:
  """A file with bytes changed, cut, doubled or in another encoding: no wish but one line."""
  kind = ('csv', 'jsonl')[int(rng.integers(2))]
  data = bytearray(GOOD[kind])
  for _ in range(rng.integers(1, 4)):
    place = int(rng.integers(len(data) or 1))
    change = int(rng.choice(6, p=(0.4, 0.1, 0.2, 0.2, 0.05, 0.05)))
    if change == 0:
      data[place : place + 1] = bytes([int(rng.integers(256))])
    elif change == 1:
      del data[place : place + int(rng.integers(1, 9))]
    elif change == 2:
      data[place:place] = data[place : place + int(rng.integers(1, 40))]
    elif change == 3:
      data[place:place] = (b'"', b'\0', b'\r', b'[', b'{', b'\\ud800', b'\xef\xbb\xbf')[
        int(rng.integers(7))
      ] * int(rng.integers(1, 4))
    elif change == 4:
      del data[place:]
    else:
      encoding = ('utf-16', 'utf-16-le', 'latin-1', 'utf-32', 'utf-7')[int(rng.integers(5))]
      data = bytearray(data.decode('utf-8', 'replace').encode(encoding, 'replace'))
  (folder / f'train.{kind}').write_bytes(data)
  for split in ('validation', 'test'):
    (folder / f'{split}.csv').write_text('image,text,label\n,x,cat\n')
  try:
    dataset = _load(folder, multi_label=bool(rng.integers(2)))
  except UserError as error:
    _one_line(error)
    return 'damaged refused'
  for number in range(len(dataset.splits['train'])):
    example = dataset.splits['train'][number]
    assert example['text'] is None or isinstance(example['text'], str)
    (example['text'] or '').encode()
  for name in dataset.class_names:
    name.encode()
    assert name.isprintable() or not name.isascii(), name
  return 'damaged read'


_TRIALS = {
  'csv': _csv,
  'jsonl': _jsonl,
  'predict': _predict,
  'published': _published,
  'damaged': _damaged,
}
