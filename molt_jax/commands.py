"""The commands: `molt COMMAND` and `python -m molt_jax.COMMAND` are the same.

Each has its flags here and its work in `molt_jax/COMMAND.py`, as `command(flags)`. That module is
imported once the arguments are found to be in order, so that `--help` and mistakes are answered
before JAX is imported. A new command is an entry here and a module.
"""

import argparse
import difflib
import importlib
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from molt_jax.config import preset_files
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import Rule, at_least, between, inside
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.config.qualities import QUALITIES
from molt_jax.config.schema import Schema
from molt_jax.errors import UserError
from molt_jax.runtime import command_line, lost
from molt_jax.runtime.flags import DURATION, Flag, choice, duration

SPLITS = choice('train', 'validation', 'test')


class Command(NamedTuple):
  """A command.

  Attributes:
    purpose: one sentence for `--help`.
    flags: besides --config, which it has if there is a schema.
    schema: of the config that it reads; None: it reads none.
    preset: the config that it reads where none is given; '': one must be given.
    check: of flags together; raises UserError.
  """

  purpose: str
  flags: tuple[Flag, ...]
  schema: Schema | None = None
  preset: str = ''
  check: Callable[[argparse.Namespace], None] = lambda flags: None


def _what_of_sets(flags: argparse.Namespace) -> None:
  if flags.adaptive and flags.coverage is None:
    raise UserError('--adaptive: it goes with --coverage; give --coverage=0.9, or leave it out')


def _what_to_predict(flags: argparse.Namespace) -> None:
  _what_of_sets(flags)
  if flags.occlude and not flags.explain:
    raise UserError('--occlude: it goes with --explain; give both, or leave it out')
  if flags.table is not None and flags.explain:
    raise UserError('--explain: it goes with --image and --text; see molt explain for tables')
  if flags.table is None:
    for name in ('out', 'image_folder'):
      if getattr(flags, name) is not None:
        raise UserError(f'--{name}: it goes with --table; leave it out')
    if flags.image is None and flags.text is None:
      raise UserError(
        '--image and --text are both absent; give at least one of them, or --table=FILE'
      )
  elif flags.out is None:
    raise UserError('--out: give the file of predictions, .csv or .parquet')


def _what_to_export(flags: argparse.Namespace) -> None:
  if flags.format == 'stablehlo':
    for name in ('quantize', 'examples', 'push_to_hub'):
      if getattr(flags, name) not in (None, 'none'):
        raise UserError(f'--{name}: it goes with --format=molt; leave it out')
  elif not flags.out.endswith('.molt'):
    raise UserError(f'--out: {flags.out!r} is not legal; give a file NAME.molt')
  if flags.push_to_hub and not re.fullmatch(r'[\w.-]+/[\w.-]+', flags.push_to_hub):
    raise UserError(f'--push_to_hub: {flags.push_to_hub!r} is not legal; give USER/NAME')


def _table_of_pair(flags: argparse.Namespace) -> None:
  if flags.pair and not flags.table:
    raise UserError('--pair: a published pair was trained on no data of yours; give --table=FOLDER')


WORKDIR = Flag('workdir', 'folder of the run', required=True)
DATA_CHANGED = Flag(
  'data_changed', 'go on with data that have changed since the checkpoint', switch=True
)
# How much is spent on a run, and what it begins with.
CHOICES = (
  Flag(
    'preset',
    'how much is spent: good takes the config as it is; fast trains no head where a regression '
    'answers alone, and takes quick towers; best tries some changes, of which validation decides',
    'good',
    rule=choice(*QUALITIES),
  ),
  Flag(
    'time_limit',
    'when training ends, once it has gone through the data',
    type=duration,
    rule=DURATION,
  ),
  Flag('init_from', 'folder of a run to begin with what it has learned', ''),
)
# How a table is read; None: it is guessed, or found by looking.
TABLE = (
  Flag(
    'table',
    'the data: a table (CSV, Excel, JSON lines, Parquet, Arrow), a folder of train and test '
    'tables, one saved by `datasets`, or one of images in a folder a class',
    required=True,
    bare=True,
  ),
  Flag('image', 'columns of images, paths or addresses; default: guessed; empty: none', many=True),
  Flag('text', 'columns of text, joined to one; default: guessed; empty: none', many=True),
  Flag('label', 'column of labels; default: guessed'),
  Flag('split', 'column that says train, validation or test; default: guessed; empty: none'),
  Flag(
    'group',
    'column whose equal values are never in two splits; default: equal texts and images are not',
  ),
  Flag(
    'test',
    'rows to test on: a table, or the share that is held out; default: those that the data name, '
    'else 0.2',
  ),
  Flag(
    'validation',
    'rows to choose by: a table, or the share that is held out of the rest; default: those that '
    'the data name, else dataset.validation_fraction',
  ),
  Flag('multi_label', 'a row can have several labels, as a|b or a list', switch=True),
  Flag('image_folder', 'what paths of images are relative to; default: the folder of the table'),
  Flag('separator', 'of the cells of a CSV file; default: found by looking'),
  Flag('encoding', 'of a CSV or JSON file, such as cp1252; default: found by looking'),
  Flag('null_words', 'words for nothing; default: those of pandas, R, spreadsheets', many=True),
  Flag('strict', 'refuse odd rows and encodings, and set none aside', switch=True),
)
TRAINED = Flag('workdir', 'folder of a run of molt train', required=True)
SETS = (
  Flag(
    'coverage',
    'also give each example a set of labels that holds the true one with this probability',
    type=float,
    rule=inside(0, 1),
  ),
  Flag(
    'adaptive',
    'of --coverage: sets that are larger for hard examples and smaller for easy ones',
    switch=True,
  ),
)

COMMANDS = {
  'fit': Command(
    'Train a classifier on a table as it is.',
    (*TABLE, WORKDIR, *CHOICES, DATA_CHANGED),
    schema=CLASSIFIER,
    preset='table',
  ),
  'train': Command(
    'Train a robust image+text classifier on frozen towers.',
    (WORKDIR, *CHOICES, DATA_CHANGED),
    schema=CLASSIFIER,
  ),
  'evaluate': Command(
    'Evaluate a trained classifier with each modality missing.',
    (
      TRAINED,
      Flag('split', 'split to evaluate', 'test', rule=SPLITS),
      Flag('table', "another table with labels and the run's columns, in the place of a split"),
      Flag(
        'absent',
        "what is taken away, for one column of scores each; default: all that the run's "
        'dataset.modalities allow',
        rule=choice('none', 'text', 'image'),
        many=True,
      ),
      Flag(
        'missing_rate',
        'also evaluate with these shares of examples that lack a modality',
        (),
        type=float,
        rule=between(0, 1),
        many=True,
      ),
      Flag(
        'missing_type',
        'what those examples lack, at each rate',
        ('both',),
        rule=choice('text', 'image', 'both'),
        many=True,
      ),
      *SETS,
      Flag(
        'metrics',
        "further scores, by scikit-learn's names, such as balanced_accuracy,roc_auc_ovr",
        (),
        many=True,
      ),
    ),
    check=_what_of_sets,
  ),
  'predict': Command(
    'Classify an image, a text, or both; or every row of a table.',
    (
      TRAINED,
      Flag('image', "image file; with --table its columns of images; default: the run's"),
      Flag('text', "text; with --table its columns of text; default: the run's"),
      Flag('top_k', 'labels to print, without --table', 5, type=int, rule=at_least(1)),
      Flag(
        'table', 'a table to predict: CSV, Excel, JSON lines, Parquet, Arrow, a folder of images'
      ),
      Flag(
        'out',
        'file of the predictions of --table, with the row, label, probabilities, what was there '
        'and why something could not be used',
        rule=Rule('a file .csv or .parquet', lambda v: v.lower().endswith(('.csv', '.parquet'))),
      ),
      Flag(
        'image_folder',
        'what paths of images in --table are relative to; default: the folder of the table',
      ),
      *SETS,
      Flag(
        'explain',
        'also say what image and text each brought to the first label; not with --table',
        switch=True,
      ),
      Flag(
        'occlude',
        'of --explain: what each word and region of the image weighs, at a prediction each',
        switch=True,
      ),
    ),
    check=_what_to_predict,
  ),
  'pretrain': Command(
    'Train an image tower and a text tower on pairs.',
    (WORKDIR, DATA_CHANGED),
    schema=PRETRAINING,
  ),
  'evaluate_pair': Command(
    'Evaluate a pair of an image and a text tower, of a run or published.',
    (
      Flag(
        'workdir',
        'folder of a run of molt pretrain; with --pair, where scores are written',
        required=True,
      ),
      Flag(
        'pair',
        'a whole CLIP or SigLIP (Hugging Face directory or hub id), in the place of a run; needs '
        '--table',
        '',
      ),
      Flag(
        'dtype',
        'type of computation of --pair',
        'float32',
        rule=choice('float32', 'bfloat16'),
      ),
      Flag('split', 'split to score', 'test', rule=SPLITS),
      Flag(
        'table',
        'another data set in the own-data layout, in the place of the one it was trained on',
        '',
      ),
      Flag(
        'templates',
        'prompts for zero-shot classification, joined by |; {} is the class name',
        ('{}', 'a picture of {}', 'a drawing of {}', 'an image of {}'),
        many=True,
        separator='|',
      ),
      Flag(
        'probes',
        'linear probes; empty: none',
        ('tower', 'tokens', 'embedding', 'pixels', 'pca'),
        rule=choice('tower', 'tokens', 'embedding', 'pixels', 'pca'),
        many=True,
      ),
    ),
    check=_table_of_pair,
  ),
  'describe': Command(
    'Look at a data set before anything is trained.',
    (
      TABLE[0]._replace(required=False),
      *TABLE[1:],
      Flag('out', 'folder for describe.json and contact_sheet.png; default: describe/DATASET'),
      Flag(
        'sample',
        'examples per split whose texts and images are looked at',
        2000,
        type=int,
        rule=at_least(1),
      ),
      Flag('sheet', 'examples on the contact sheet', 24, type=int, rule=at_least(1)),
    ),
    schema=CLASSIFIER,
    preset='table',
  ),
  'export': Command(
    'Write a run as one file that works anywhere.',
    (
      Flag('workdir', 'folder of a run of molt train, or such a file', required=True),
      Flag('out', 'the file, NAME.molt; of programs, a folder', required=True),
      Flag(
        'format',
        'molt: one file with towers; stablehlo: a folder of programs, one a missing pattern, that '
        'JAX runs without this package',
        'molt',
        rule=choice('molt', 'stablehlo'),
      ),
      Flag('quantize', "type of the towers' matrices", 'none', rule=choice('none', 'int8')),
      Flag(
        'examples',
        'split that the five examples in the file are of, which then leave the machine with it; '
        'default: they are made up',
        rule=SPLITS,
      ),
      Flag('push_to_hub', 'repository of the Hugging Face hub, USER/NAME, that gets the file too'),
    ),
    check=_what_to_export,
  ),
  'serve': Command(
    'Serve a run over HTTP, with a page to try it.',
    (
      Flag('workdir', 'folder of a run of molt train, or a file of molt export', required=True),
      Flag('host', 'address to serve at; 0.0.0.0: every one of the machine', '127.0.0.1'),
      Flag('port', 'port to serve at', 8000, type=int, rule=between(0, 65535)),
      Flag(
        'max_batch',
        'most examples that are answered together',
        16,
        type=int,
        rule=between(1, 1024),
      ),
      Flag('max_mb', 'megabytes of the largest request', 16, type=int, rule=between(1, 1024)),
      Flag(
        'timeout',
        'seconds in which a request must have come, and in which it is answered',
        30.0,
        type=float,
        rule=between(0.1, 3600),
      ),
    ),
  ),
  'explain': Command(
    'Write one HTML page about what image and text brought to the answers to a split.',
    (
      TRAINED,
      Flag('split', 'split to explain', 'test', rule=SPLITS),
      Flag('table', "another table with labels and the run's columns, in the place of a split"),
      Flag(
        'occlude',
        'examples of the page whose words and image regions are taken away one by one, each at '
        'some 20 to 60 predictions; 0: none',
        6,
        type=int,
        rule=at_least(0),
      ),
      Flag('out', 'the page; default: explain.html in the folder of the run'),
    ),
  ),
  'audit': Command(
    "Look for rows of a run's data that may not be what is meant.",
    (
      TRAINED,
      Flag('split', 'split whose pairs and labels are judged', 'train', rule=SPLITS),
      Flag(
        'folds',
        'parts of the split, each of which is judged by a model that has not seen it',
        5,
        type=int,
        rule=between(2, 20),
      ),
      Flag(
        'out', 'the page, with a CSV file beside it; default: audit.html in the folder of the run'
      ),
    ),
  ),
  'report': Command(
    'Write one HTML page about one run, or several side by side.',
    (
      Flag('workdir', 'folders of runs of molt train', required=True, many=True),
      Flag(
        'out',
        'the page; default: report.html in the folder, of several runs comparison.html in the '
        'first',
      ),
    ),
  ),
}


def flags_of(name: str) -> tuple[Flag, ...]:
  """Returns the flags of a command."""
  command = COMMANDS[name]
  if not command.schema:
    return command.flags
  meaning = (
    f'a preset of the package ({", ".join(preset_files.names())}; some take variants, e.g. '
    'mm_imdb:robust) or a file such as configs/table.py'
  )
  config = Flag('config', meaning, command.preset, required=not command.preset)
  bare = [flag for flag in command.flags if flag.bare]
  return (*bare, config, *(flag for flag in command.flags if not flag.bare))


def run(name: str, argv: Sequence[str], prog: str = '') -> int:
  """Runs a command and returns its exit code.

  Args:
    name: of the command.
    argv: the words after it.
    prog: what the user typed before them; default: python -m molt_jax.NAME.
  """

  @command_line.command
  def work(argv):
    command = COMMANDS[name]
    flags, overrides = command_line.parse(
      prog or f'python -m molt_jax.{name}',
      command.purpose,
      flags_of(name),
      argv,
      schema=command.schema,
    )
    command.check(flags)
    if command.schema:
      flags.config = command.schema.load(flags.config, overrides)
      flags.given = tuple(overrides)
    return importlib.import_module(f'molt_jax.{name}').command(flags)

  return work(argv)


def end(code: int) -> NoReturn:
  """Ends the process with an exit code.

  After a mistake, threads are not waited for: writers of checkpoints that a full disk stopped wait
  minutes for each other.
  """
  main_thread = threading.main_thread()
  if code and any(not (t is main_thread or t.daemon) for t in threading.enumerate()):
    lost.end_now(code)
  sys.exit(code)


def script() -> NoReturn:
  """The console script `molt`."""
  end(main())


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `molt` and returns its exit code."""
  argv = sys.argv[1:] if argv is None else list(argv)
  if argv and argv[0] in COMMANDS:
    return run(argv[0], argv[1:], prog=f'molt {argv[0]}')
  return _without_a_command(argv)


@command_line.command
def _without_a_command(argv):
  if argv and argv[0] not in ('-h', '--help'):
    near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f'did you mean {near[0]}?' if near else f'known: {", ".join(COMMANDS)}'
    raise UserError(f'molt: no command {argv[0]!r}; {hint}')
  width = max(map(len, COMMANDS))
  print('usage: molt COMMAND [--help] [--FLAG=VALUE ...]\n')
  print('One classifier on images and texts that still answers when one of them is missing.\n')
  print('Commands:')
  for name, command in COMMANDS.items():
    print(f'  {name:{width}}  {command.purpose}')
  print(
    '\nTo begin, with a table of your own:\n'
    '  molt describe products.csv\n'
    '  molt fit products.csv --workdir=runs/products\n'
    "  molt predict --workdir=runs/products --text='some words'\n"
    '\nmolt COMMAND --help lists the flags of a command and the fields of its config.'
  )
