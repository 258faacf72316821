"""What is printed: nothing that a terminal would obey, and no number that is cut."""

import json
import re
import unicodedata

import pytest
import rich.console
import rich.table
from hypothesis import given
from hypothesis import strategies as st

from molt_jax import describe, evaluate_pair
from molt_jax.errors import UserError
from molt_jax.evaluation import results
from molt_jax.runtime import console, terminal
from molt_jax.runtime.command_line import command

COUNTS = {'num_examples': 60, 'both': 51, 'image_only': 4, 'text_only': 5}
ONE_LABEL = {
  'accuracy': 0.5501,
  'f1_micro': 0.5501,
  'f1_macro': 0.2502,
  'f1_samples': 0.5501,
  'f1_weighted': 0.4593,
  'loss': 1234.5674,
} | COUNTS
LABEL_SETS = ONE_LABEL | {'f1_micro': 0.6104, 'f1_samples': 0.5803, 'auroc': 1.0}
NOTHING = dict.fromkeys(COUNTS, 0)


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    ('plain', 'plain'),
    ('a\nb\tc', 'a\\nb\\tc'),
    ('\x1b[31mred', '\\x1b[31mred'),
    ('\x9b31m', '\\x9b31m'),
    ('a\x00', 'a\\x00'),
    ('\u202egnp', '\\u202egnp'),
    ('\ud800', '\\ud800'),
    ('\u2028', '\\u2028'),
    ('\ufffe', '\\ufffe'),
    ('שלום é 😀', 'שלום é 😀'),
    ('\U0001f469\u200d\U0001f680', '\U0001f469\u200d\U0001f680'),
    ('', ''),
    ('[red]', '[red]'),
  ],
)
def test_what_would_be_obeyed_is_spelled_out(text, shown):
  assert terminal.clean(text) == shown


@given(st.text(st.characters()), st.none() | st.integers(1, 30))
def test_any_text_becomes_one_line_that_can_be_written(text, most):
  shown = terminal.clean(text, most)
  shown.encode('utf-8')
  assert not {unicodedata.category(c) for c in shown} & {'Cc', 'Cs', 'Zl', 'Zp'}
  if most is None and text.isprintable():
    assert shown == text
  if most:
    assert len(shown) <= 10 * most  # A character is spelled with ten at most.


@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_json_for_people_has_nothing_to_obey_and_is_read_back(text):
  line = terminal.json_line({'label': text})
  assert json.loads(line) == {'label': text}
  assert terminal.clean(line) == line


@pytest.fixture
def screen(monkeypatch, capsys):
  """Function (width, print) -> what it prints on a terminal of that width, without its styles."""
  monkeypatch.setattr(rich.console.Console, 'is_terminal', False)

  def show(width, draw):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    monkeypatch.setenv('COLUMNS', str(width))
    draw()
    return capsys.readouterr().out

  return show


def numbers(text):
  """The numbers in cells, not in the title above them."""
  rows = [line for line in text.splitlines() if line[:1] in '│|']
  return re.findall(r'\d+(?:\.\d+)?', '\n'.join(rows))


@pytest.mark.parametrize('width', [20, 40, 60, 80, 100, 130])
@pytest.mark.parametrize(
  ('result', 'shown'),
  [
    (ONE_LABEL, ['55.0', '25.0', '45.9', '1234.567']),
    (LABEL_SETS, ['55.0', '61.0', '25.0', '58.0', '45.9', '100.0', '1234.567']),
  ],
)
def test_every_number_of_the_score_table_is_whole(screen, width, result, shown):
  scores = {'none_absent': result, 'missing_both_0.25': result, 'image_absent': NOTHING}
  out = screen(width, lambda: results.print_table(scores, 'test split'))
  found = numbers(out)
  for number in (*shown, '51', '4', '5'):
    assert found.count(number) == 2, (number, out)
  assert set(found) == {*shown, '51', '4', '5', '0', '25'} and '…' not in out
  if width >= 60:
    assert max(map(len, out.splitlines())) <= width
  rows = [line for line in out.splitlines() if 'without image' in line]
  assert rows and not any(number in row for row in rows for number in ('0.0', '0.000'))


def test_the_score_table_says_each_thing_once_and_fits_80_columns(screen):
  out = screen(80, lambda: results.print_table({'none_absent': ONE_LABEL}, 'test split'))
  assert 'micro' not in out and 'samples' not in out and out.count('condition') == 1
  assert screen(80, lambda: results.print_table({'a': LABEL_SETS}, 'x')).count('micro') == 1


def test_a_pipe_gets_the_whole_width(capsys):
  results.print_table({'none_absent': ONE_LABEL, 'image_absent': NOTHING}, 'test split')
  out = capsys.readouterr().out
  assert '51 both, 4 image only, 5 text only' in out and 'f1 weighted' in out
  results.print_table({'none_absent': NOTHING}, 'nothing at all')
  assert re.search(r'complete\s*│\s*0\s*│', capsys.readouterr().out)


HOSTILE = '[red]x[/red]\x1b[31m\n\u202e'


def test_labels_and_names_are_shown_as_they_are(screen, capsys):
  counts = {'train': 3, 'test': 0}
  split = dict.fromkeys(('both', 'image_only', 'text_only', 'without_label', 'sampled'), 1)
  split |= dict.fromkeys(('words', 'tokens', 'image_width', 'image_height'))
  split |= {'longer_than_max_tokens': None, 'class_named_in_text': None, 'image_formats': {}}
  report = {
    'dataset': HOSTILE,
    'classes': {HOSTILE: counts, 'y' * 10_000: counts},
    'splits': {'train': split | {'examples': 3}, 'test': split | {'examples': 0}},
  }
  shown = '[red]x[/red]\\x1b[31m\\n\\u202e'
  for out in (
    screen(200, lambda: describe.print_tables(report)),
    screen(200, lambda: evaluate_pair.print_table({'modality_gap': 0.5}, HOSTILE)),
  ):
    assert shown in ''.join(out.split()) and '\x1b' not in out and '\u202e' not in out
  assert '3 (100.0 %)' in screen(200, lambda: describe.print_tables(report))


def test_messages_and_errors_are_one_line_whatever_they_quote(capsys):
  console.log(f'label {HOSTILE}')

  @command
  def fail(argv):
    raise UserError(f'label {HOSTILE}: {"x" * 100_000}')

  assert fail([]) == 2
  said, error = capsys.readouterr().err.splitlines()
  assert said == 'label [red]x[/red]\\x1b[31m\\n\\u202e'
  assert error.startswith('error: label [red]x[/red]\\x1b[31m\\n\\u202e: xxx')
  assert len(error) < 5_000


def test_a_table_is_printed_whole(screen):
  table = rich.table.Table('a')
  table.add_row('x' * 50)
  assert 'x' * 50 in screen(20, lambda: terminal.print_table(table))
