"""Spreadsheets, written by openpyxl, against what stands in their cells."""

import datetime
import pathlib
import random
import zipfile

import openpyxl
import openpyxl.drawing.image
import pytest
import python_calamine
from PIL import Image

from molt_jax.data.tables import csv_files, layout, spreadsheets
from molt_jax.errors import UserError

ROWS = (
  ('photo', 'title', 'price', 'since', 'opens', 'kept', None),
  ('a.jpg', 'Blue mug, 0.3 l', 12, datetime.date(2024, 5, 1), datetime.time(9, 30), True, None),
  ('b.jpg', 1984, 0.1 + 0.2, datetime.datetime(2024, 5, 1, 10, 30), None, False, None),
  (None,) * 7,
  (None, 'Größe M – „neu“\n100 %', -1.5e300, None, None, None, None),
)
# What each cell shows, by the number that a spreadsheet gives its row.
SHOWN = {
  2: ['a.jpg', 'Blue mug, 0.3 l', '12', '2024-05-01', '09:30:00', 'TRUE'],
  3: ['b.jpg', '1984', '0.3', '2024-05-01 10:30:00', '', 'FALSE'],
  5: ['', 'Größe M – „neu“\n100 %', '-1.5e+300', '', '', ''],
}


def workbook(path: pathlib.Path, rows=ROWS, before=0):
  """Writes a book of one sheet; returns it."""
  book = openpyxl.Workbook()
  book.active.title = 'Products'
  for _ in range(before):
    book.active.append([None])
  for row in rows:
    book.active.append(row)
  book.save(path)
  return book


def opened(path):
  return spreadsheets.open_spreadsheet(path, path.name, csv_files.Dialect())


@pytest.mark.parametrize('before', [0, 2])
def test_cells_are_what_a_spreadsheet_shows(tmp_path, before):
  workbook(tmp_path / 'a.xlsx', before=before)
  records = opened(tmp_path / 'a.xlsx')
  assert list(records.columns) == ['photo', 'title', 'price', 'since', 'opens', 'kept']
  expected = [
    (number + before, dict(zip(records.columns, cells, strict=True)))
    for number, cells in SHOWN.items()
  ]
  assert list(records.read(records.columns)) == expected
  assert list(records.read(['price'])) == [(n, {'price': row['price']}) for n, row in expected]
  assert records.notes == ("sheet 'Products'",)
  assert records.remarks == ()


def test_the_first_sheet_that_has_cells_is_read_and_others_are_named(tmp_path):
  path = tmp_path / 'a.xlsx'
  book = workbook(path)
  book.create_sheet('Empty', 0)
  hidden = book.create_sheet('Codes', 0)
  hidden.append(['x'])
  hidden.sheet_state = 'hidden'
  book.create_sheet('Prices').append(['y'])
  book.save(path)
  records = opened(path)
  assert list(records.columns)[:2] == ['photo', 'title']
  (remark,) = records.remarks
  assert "sheet 'Products' is read, not 'Prices'" in remark


def test_pictures_on_a_sheet_are_remarked(tmp_path):
  path = tmp_path / 'a.xlsx'
  book = workbook(path)
  Image.new('RGB', (4, 4)).save(tmp_path / 'p.png')
  book.active.add_image(openpyxl.drawing.image.Image(tmp_path / 'p.png'), 'H2')
  book.save(path)
  (remark,) = opened(path).remarks
  assert 'save them as files' in remark


def test_splits_are_found_and_locks_of_open_spreadsheets_are_not(tmp_path):
  workbook(tmp_path / 'train.xlsx')
  workbook(tmp_path / 'Test.XLSX')
  (tmp_path / 'val.tsv.gz').write_bytes(b'')
  (tmp_path / '~$train.xlsx').write_bytes(b'lock')
  found = layout.find(tmp_path, csv_files.Dialect())
  assert {split: [file.name for file in files] for split, files in found.items()} == {
    'train': ['train.xlsx'],
    'test': ['Test.XLSX'],
    'validation': ['val.tsv.gz'],
  }


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 rest', b'photo,title\n'])
def test_what_is_no_spreadsheet_is_refused_by_name(tmp_path, content):
  (tmp_path / 'a.xlsx').write_bytes(content)
  with pytest.raises(UserError, match=r'a\.xlsx cannot be read as a spreadsheet .*save it again'):
    opened(tmp_path / 'a.xlsx')


def test_a_spreadsheet_without_cells_is_refused(tmp_path):
  workbook(tmp_path / 'a.xlsx', [[None, ' ']])
  with pytest.raises(UserError, match=r'a\.xlsx has no sheet with cells'):
    opened(tmp_path / 'a.xlsx')


def test_a_password_is_asked_to_be_taken_off(tmp_path, monkeypatch):
  class Protected:
    @staticmethod
    def from_path(path):
      raise python_calamine.PasswordError('encrypted')

  monkeypatch.setattr(python_calamine, 'CalamineWorkbook', Protected)
  with pytest.raises(UserError, match=r'a\.xlsx is protected by a password'):
    opened(tmp_path / 'a.xlsx')


def test_damage_that_is_not_read_over_is_refused_in_one_line(tmp_path):
  """Bytes of the parts of a book are changed or cut, and the book is packed again."""
  workbook(tmp_path / 'a.xlsx')
  with zipfile.ZipFile(tmp_path / 'a.xlsx') as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
  draw = random.Random(0)
  for case in range(150):
    damaged = dict(parts)
    name = draw.choice(sorted(parts))
    content = bytearray(parts[name])
    for _ in range(draw.choice((1, 1, 5, 50))):
      content[draw.randrange(len(content))] = draw.randrange(256)
    damaged[name] = bytes(content[: draw.choice((len(content), draw.randrange(len(content))))])
    path = tmp_path / f'{case}.xlsx'
    with zipfile.ZipFile(path, 'w') as archive:
      for part, data in damaged.items():
        archive.writestr(part, data)
    try:
      records = opened(path)
      list(records.read(records.columns))
    except UserError as error:
      assert '\n' not in str(error)
