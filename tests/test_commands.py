"""The commands: the script `molt`, typed flags, help that is complete, answers before JAX."""

import subprocess
import sys

import pytest

from molt_jax import commands
from molt_jax.config import preset_files
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least, between
from molt_jax.errors import UserError
from molt_jax.pairs import retrieval, scoring
from molt_jax.runtime import help_text
from molt_jax.runtime.command_line import parse
from molt_jax.runtime.flags import Flag, choice

# ---- The script ----------------------------------------------------------------------------------


def test_help_lists_every_command_with_its_purpose(capsys):
  assert commands.main(['--help']) == 0
  lines = capsys.readouterr().out.splitlines()
  for name, command in commands.COMMANDS.items():
    assert [line.split(maxsplit=1) for line in lines].count([name, command.purpose]) == 1


@pytest.mark.parametrize(
  ('word', 'hint'), [('trian', 'did you mean train?'), ('xyzzy', 'known: fit, train, evaluate,')]
)
def test_an_unknown_command_is_one_line(capsys, word, hint):
  assert commands.main([word]) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith('error: molt: no command ') and err.count('\n') == 1
  assert repr(word) in err and hint in err


def test_the_script_and_the_modules_are_the_same_commands(capsys):
  for name in commands.COMMANDS:
    with pytest.raises(SystemExit) as stopped:
      commands.main([name, '--help'])
    as_script = capsys.readouterr().out
    with pytest.raises(SystemExit):
      commands.run(name, ['--help'])
    as_module = capsys.readouterr().out
    assert stopped.value.code == 0 and as_script.startswith(f'usage: molt {name} ')
    assert as_module.startswith(f'usage: python -m molt_jax.{name} ')
    assert as_script.split('\n\n')[1:] == as_module.split('\n\n')[1:]


# ---- Help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_help_has_every_flag_and_field_and_fits_100_columns(capsys, name):
  with pytest.raises(SystemExit):
    commands.run(name, ['--help'])
  shown = capsys.readouterr().out
  lines = shown.splitlines()
  assert max(map(len, lines)) <= 100
  for flag in commands.flags_of(name):
    assert [line for line in lines if line.split('=')[0] == f'  --{flag.name}']
  words = ' '.join(shown.split())
  schema = commands.COMMANDS[name].schema
  for field_name, field in schema.items() if schema else ():
    assert f'  --config.{field_name}={field.default}' in lines
    assert ' '.join(field.meaning.split()) in words
    legal = field.legal.replace("'", '')
    assert f'Legal: {legal}.' in words or legal == 'a string'


ANSWERS = {
  'fit': ['products.csv'],
  'train': ['--config=nope', '--workdir=x'],
  'evaluate': ['--workdir=x', '--missing_rate=2'],
  'predict': ['--workdir=x'],
  'pretrain': ['--config=pretrain_openmoji', '--workdir=x', '--config.train.batch_size=0'],
  'evaluate_pair': ['--workdir=x', '--probes=knn'],
  'describe': ['--config=openmoji'],
  'export': ['--workdir=x', '--out=x.zip'],
  'serve': ['--workdir=x', '--port=http'],
  'report': ['--wrokdir=x'],
  'audit': ['--workdir=x', '--folds=1'],
  'explain': ['--workdir=x', '--split=all'],
}
QUICK = """
import sys
from molt_jax import commands
try:
  code = commands.run(sys.argv[1], sys.argv[2:])
except SystemExit as stopped:
  code = stopped.code
heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'numpy'} & set(sys.modules)
sys.exit(code if not heavy else f'imported: {heavy}')
"""


@pytest.mark.parametrize('name', commands.COMMANDS)
@pytest.mark.parametrize('asked', ['help', 'mistake'])
def test_help_and_mistakes_are_answered_before_jax_is_imported(name, asked):
  argv = ['--help'] if asked == 'help' else ANSWERS[name]
  out = subprocess.run(
    [sys.executable, '-c', QUICK, name, *argv], capture_output=True, text=True, check=False
  )
  assert out.returncode == (0 if asked == 'help' else 2), out.stderr
  if asked == 'mistake':
    assert out.stderr.startswith('error: ') and out.stderr.count('\n') == 1


def test_running_a_module_reads_its_arguments_first():
  command = [sys.executable, '-X', 'importtime', '-m', 'molt_jax.train', '--help']
  out = subprocess.run(command, capture_output=True, text=True, check=True)
  imported = {line.split('|')[-1].strip() for line in out.stderr.splitlines()}
  assert 'molt_jax.commands' in imported and not imported & {'jax', 'numpy', 'flax'}


def test_what_the_table_repeats_of_other_modules_is_theirs():
  """Names that stand in both places since the table imports nothing large."""
  flags = {flag.name: flag for flag in commands.flags_of('evaluate_pair')}
  assert flags['probes'].default == tuple(scoring.PROBES)
  assert flags['templates'].default == retrieval.TEMPLATES


# ---- Flags ---------------------------------------------------------------------------------------

FLAGS = (
  Flag('count', 'how many', 5, type=int, rule=at_least(1)),
  Flag('rates', 'shares', (0.5,), type=float, rule=between(0, 1), many=True),
  Flag('kinds', 'kinds', rule=choice('a', 'b'), many=True),
  Flag('prompts', 'prompts', many=True, separator='|'),
  Flag('name', 'a name', required=True),
  Flag('fast', 'go fast', switch=True),
)


def test_flags_have_their_types():
  argv = ['--name=x', '--count=7', '--rates=0,1e-1', '--rates', '1', '--kinds=b', '--prompts=a b|c']
  flags, overrides = parse('x', '', FLAGS, argv)
  assert overrides == {}
  assert vars(flags) == {
    'count': 7,
    'rates': [0.0, 0.1, 1.0],
    'kinds': ['b'],
    'prompts': ['a b', 'c'],
    'name': 'x',
    'fast': False,
  }
  assert type(flags.count) is int and type(flags.rates[0]) is float


def test_flags_that_are_not_given_have_their_defaults():
  flags, _ = parse('x', '', FLAGS, ['--name=x', '--fast', '--prompts='])
  assert (flags.count, flags.rates, flags.kinds, flags.fast) == (5, [0.5], None, True)
  assert flags.prompts == []


@pytest.mark.parametrize(
  ('argument', 'words'),
  [
    ('--count=0', "--count: '0' is not legal; give a whole number >= 1"),
    ('--count=2.5', 'give a whole number >= 1'),
    ('--count=1_0', 'give a whole number >= 1'),
    ('--count=' + '9' * 5000, 'give a whole number >= 1'),
    ('--rates=0.5,nan', "'nan' is not legal; give a number from 0 to 1"),
    ('--rates=2', "--rates: '2' is not legal; give a number from 0 to 1"),
    ('--kinds=a,c', "--kinds: 'c' is not legal; give one of a, b"),
    ('--name=', '--name: empty; give a name'),
    ('--cuont=1', 'did you mean --count?'),
    ('--config.seed=1', "unknown argument '--config.seed=1'"),
    ('--count', 'expected one argument'),
  ],
)
def test_a_wrong_flag_is_one_line(argument, words):
  with pytest.raises(UserError) as error:
    parse('x', '', FLAGS, ['--name=x', argument])
  assert words in str(error.value) and '\n' not in str(error.value)


def test_fields_are_taken_where_there_is_a_schema():
  flags = (Flag('name', 'a name', required=True),)
  argv = ['--name=x', '--config.seed=1', '--config.text.max_tokens', '2']
  _, overrides = parse('x', '', flags, argv, schema=CLASSIFIER)
  assert overrides == {'seed': '1', 'text.max_tokens': '2'}


def test_help_of_flags_says_what_is_legal():
  shown = help_text.render('x', 'Do.', FLAGS, None)
  for words in (
    'usage: x [--count=COUNT] [--rates=RATES[,RATES...]]',
    'How many. Legal: a whole number >= 1. Default: 5.',
    'Shares. Each a number from 0 to 1. Default: 0.5.',
    'A name. Required.',
    '[--fast]',
  ):
    assert words in shown


def test_help_names_the_presets():
  (config, *_) = commands.flags_of('train')
  assert config.name == 'config' and config.required
  for name in preset_files.names():
    assert name in config.meaning


def test_a_mistake_does_not_wait_for_threads():
  """A writer of checkpoints that a full disk stopped waits for minutes."""
  program = """
import threading
from molt_jax import commands
threading.Thread(target=threading.Event().wait).start()
print('said')
commands.end(2)
"""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, timeout=120)
  assert done.returncode == 2 and done.stdout == b'said\n'
