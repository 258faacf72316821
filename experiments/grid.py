"""What the paper's tables and figures share: data sets x methods x seeds. Each run is made once, in
a folder named by its config.

A table's methods are names and the fields of the data set's preset that they change. Whoever asks
for the same config gets the same run, so the tables share theirs. A call that was cut off goes on;
a finished run is read.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import matplotlib
import ml_collections
import numpy as np
import runs
from absl import app, flags, logging

from molt_jax.config import presets, resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data.modalities import LABELS
from molt_jax.errors import UserError
from molt_jax.evaluation import records
from molt_jax.runtime import atomic, logbook, signals

matplotlib.rcParams['text.parse_math'] = False  # A $ in a text or a label is a dollar.

DATA = flags.DEFINE_multi_string(
  'data',
  ['openmoji'],
  'openmoji, NAME=FOLDER of a table, or NAME=PRESET.py[:VARIANTS]; may be repeated.',
)
SEEDS = flags.DEFINE_list(
  'seeds', ['0', '1', '2'], 'Seeds of parameters, data order, dropout and absence draws.'
)
ONLY = flags.DEFINE_string(
  'methods',
  '',
  'Regular expression: what to train in this call; the report is on all that is finished.',
)
SET = flags.DEFINE_multi_string('set', [], 'FIELD=VALUE of the config, for every run.')
RUNS = flags.DEFINE_string('runs', 'runs/experiments', 'Folder of the runs.')
OUT = flags.DEFINE_string(
  'out', None, 'Folder of the results; default: experiments/results/ and the name of the script.'
)

# Further conditions, of the missing-rate protocol: rate and kind.
MISSING = {'70 % both': (0.7, 'both')}

# What a method changes in a preset, whatever the preset has: the equations and the training as
# printed or our defaults, at its width, schedule and batch size; the baseline without MoLT has the
# inputs and the classifier of our defaults.
COMPLETE_ONLY = {'missing.views': False}
PRINTED = {
  name: presets.PAPER[name]
  for name in (
    'molt.input_norm',
    'fusion.residual',
    'classifier.kind',
    'classifier.dropout',
    'classifier.per_pattern',
    'missing.views',
    'cca.estimator',
    'optimizer.weight_decay',
  )
}
DEFAULT = {name: presets.ROBUST[name] for name in PRINTED}
# The same in presets of today, which read other states and have more beside the printed equations.
AS_PRINTED = PRINTED | {
  'molt.bilinear': 0,
  'molt.cells': 0,
  'molt.layers': '-4:',
  'ridge.landmarks': 0,
}
# What the presets quickstart and table said when the tables here were made, `usefulness.py` and
# `table1.py` apart: towers, states and head of commit c1ff4b1.
FIRST_RELEASE = {
  'backbones.text.path': presets.SMALL_TOWERS['backbones.text.path'],
  'backbones.image.path': presets.SMALL_TOWERS['backbones.image.path'],
  'backbones.image.resolution': 0,
  'image.resize': 'crop',
  'molt.bilinear': 0,
  'molt.cells': 0,
  'molt.layers': '-4:',
  'ridge.landmarks': 0,
}
FIRST_TEXT_LENGTH = {'text.max_tokens': 64}  # Of the preset table.
BASELINE = DEFAULT | {'method': 'late_fusion'} | COMPLETE_ONLY


@dataclasses.dataclass(frozen=True)
class Made:
  """A finished run: its folder, its scores (`result.json`) and its predictions on the test
  split.
  """

  folder: pathlib.Path
  result: dict[str, Any]

  @functools.cached_property
  def predictions(self) -> records.Predictions:
    return records.Predictions.load(self.folder / records.PREDICTIONS)

  def score(self, condition: str, metric: str) -> float | None:
    """Returns a score on the test split; None where it has none, as without an example."""
    if condition in MISSING:
      scores = self.predictions.missing_rate(*MISSING[condition])
    else:
      scores = self.result['test'].get(condition, {})
    if scores.get('num_examples') == 0:  # Older runs have a score of 0 there.
      return None
    return scores.get(metric)


Table = Mapping[str, Mapping[int, Made]]  # Method -> seed -> run.


def name_of(data: str) -> str:
  """The name of a data set as it is given on the command line."""
  return data.partition('=')[0]


def make_config(
  data: str, changes: Mapping[str, Any], seed: int, *, today: bool = False
) -> ml_collections.ConfigDict:
  """Returns the config of one run: of the presets quickstart and table as they were in the first
  release, or as they are `today`.

  Raises:
    UserError: no such data set, preset or field.
  """
  name, equals, where = data.partition('=')
  if not re.fullmatch(r'[\w.-]+', name):
    raise UserError(f'--data: {name!r} is no name; give letters, digits, -, _ and . before the =')
  configs = pathlib.Path(__file__).parents[1] / 'configs'
  given = dict(_assignment(item) for item in SET.value)
  if not equals and name == 'openmoji':
    preset = str(configs / 'quickstart.py')
    given = given if today else {**FIRST_RELEASE, **given}
  elif where.partition(':')[0].endswith('.py'):
    preset = where
  elif equals and name and pathlib.Path(where).is_dir():
    preset, given = str(configs / 'table.py'), given | {'dataset.path': where}
    given = given if today else {**FIRST_RELEASE, **FIRST_TEXT_LENGTH, **given}
  else:
    raise UserError(
      f'--data: {data!r} is neither openmoji nor NAME=FOLDER of a table (a folder that is there) '
      'nor NAME=PRESET.py'
    )
  written = {field: str(value) for field, value in given.items()}
  return runs.override(CLASSIFIER.load(preset, written), {**changes, 'seed': seed})


def _assignment(item):
  field, equals, value = item.partition('=')
  if not equals:
    raise UserError(f'--set: {item!r} has no value; write FIELD=VALUE, e.g. train.epochs=2')
  return field, value


def seeds() -> list[int]:
  """The seeds asked for."""
  if not SEEDS.value or not all(seed.isdigit() for seed in SEEDS.value):
    raise UserError(
      f'--seeds: {",".join(SEEDS.value)!r} is not legal; give whole numbers, e.g. 0,1,2'
    )
  return [int(seed) for seed in SEEDS.value]


def make(methods: Mapping[str, Mapping[str, Any]], *, today: bool = False) -> dict[str, Table]:
  """Makes or reads every run of these methods; returns data set -> method -> seed -> run, without
  methods that nobody asked for and none finished. `today`: see `make_config`.
  """
  made = {}
  for data in DATA.value:
    name = name_of(data)
    table = collections.defaultdict(dict)
    for seed in seeds():
      for method, changes in methods.items():
        config = make_config(data, changes, seed, today=today)
        folder = pathlib.Path(RUNS.value) / name / resolved.config_hash(config)
        if re.search(ONLY.value, method) or (folder / 'result.json').exists():
          table[method][seed] = Made(folder, runs.run(config, folder))
          run = table[method][seed]
          scores = ', '.join(
            f'{label} {runs.spread([run.score(c, metric(config))])}'
            for c, label in LABELS.items()
            if c in run.result['test']
          )
          print(f'{name}, seed {seed}, {method}: {scores}', flush=True)
    made[name] = {method: table[method] for method in methods if table[method]}
    if not made[name]:
      raise UserError(f'--methods: {ONLY.value!r} matches none of {", ".join(methods)}')
  return made


def metric(config: ml_collections.ConfigDict) -> str:
  """Key of the headline score."""
  return 'f1_micro' if config.dataset.multi_label else 'accuracy'


def metric_of(table: Table) -> str:
  """The same, of runs."""
  made = next(iter(next(iter(table.values())).values()))
  return 'f1_micro' if made.predictions.multi_label else 'accuracy'


def values(table: Table, method: str, condition: str, key: str) -> list[float]:
  """One score a seed that has one."""
  scores = [made.score(condition, key) for made in table[method].values()]
  return [score for score in scores if score is not None]


def paired(table: Table, method: str, reference: str, condition: str, key: str) -> list[float]:
  """Score of `method` minus that of `reference`, seed by seed where both have one."""
  pairs = [
    (made.score(condition, key), table[reference][seed].score(condition, key))
    for seed, made in table[method].items()
    if seed in table[reference]
  ]
  return [ours - theirs for ours, theirs in pairs if None not in (ours, theirs)]


def signed(differences: Sequence[float]) -> str:
  """'+1.2 ± 0.3', in points."""
  return (
    ('+' if 100 * np.mean(differences) > -0.05 else '')
    + runs.spread(differences).replace('-0.0', '0.0')
    if differences
    else '-'
  )


def seconds(table: Table, method: str) -> float:
  """Mean seconds of training, over seeds."""
  return float(np.mean([made.result['seconds'] for made in table[method].values()]))


def numbers(table: Table) -> dict[str, Any]:
  """What the JSON file keeps of runs."""

  def of(made):
    validation = {'validation': made.result['validation'].get('score')}
    found = {key: value for key, value in validation.items() if value is not None}
    return {'seconds': made.result['seconds'], **found, 'test': made.result['test']}

  return {
    method: {str(seed): of(made) for seed, made in by_seed.items()}
    for method, by_seed in table.items()
  }


def folder_of(script: str) -> pathlib.Path:
  """The folder of a script's results, made."""
  folder = (
    pathlib.Path(OUT.value) if OUT.value else pathlib.Path(__file__).parent / 'results' / script
  )
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def publish(script: str, lines: Sequence[str], content: Mapping[str, Any], start: float) -> None:
  """Writes NAME.json and NAME.md, with command, versions, seeds, device and seconds, and prints the
  second.
  """
  folder = folder_of(script)
  meta = runs.provenance() | {
    'seeds': seeds(),
    'device': jax.devices()[0].device_kind,
    'seconds_of_this_call': round(time.monotonic() - start, 1),
  }
  versions = ', '.join(f'{name} {version}' for name, version in meta['versions'].items())
  foot = (
    f'`{meta["command"]}`; seeds {", ".join(SEEDS.value)}; {versions}; device {meta["device"]}; '
    f'{meta["seconds_of_this_call"]:.0f} s in this '
    'call (runs that were finished before are read).'
  )
  atomic.write(folder / f'{script}.json', logbook.to_json(meta | dict(content), indent=1) + '\n')
  atomic.write(folder / f'{script}.md', '\n'.join([*lines, '', foot]) + '\n')
  print('\n'.join([*lines, '', foot]))


def start(main: Callable[[], None]) -> None:
  """Runs a script; a mistake of the user's is one line and exit code 2, a signal 130 or 143."""
  app.run(functools.partial(_run, main), flags_parser=_parse)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f'error: {" ".join(str(error).split())}; see --help', file=sys.stderr)
    sys.exit(2)


def _run(main, argv):
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise UserError(f'unknown argument {argv[1]!r}; see --help')
    main()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except signals.Interrupted as stopped:
    print(f'{stopped.args[0]} (the run that was at work)', file=sys.stderr)
    return 128 + stopped.args[1]
  return 0
