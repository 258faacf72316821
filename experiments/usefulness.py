"""Our default against what a user would build in an afternoon, on every data set.

  python experiments/build_datasets.py --to=runs/data
  python experiments/usefulness.py --all=runs/data [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--methods=REGEX] [--set=FIELD=VALUE] [--runs=...] [--out=...]

Rows: kernel ridge, linear ridge and logistic regression on raw pixels and TF-IDF; linear and RBF
probes of pooled hidden states of the same towers, the last or all, each modality, both, and their
late fusion (`baselines.py`); our unimodal models and late fusion; MoLT as printed, of the first
release, and now. Conditions: complete, without text, without image, and 70 % of the examples
without one of them. Everything is chosen on validation.

Each row and seed is a process of its own, whose processor seconds and peak memory are kept with its
scores in OUT/DATA.json. What is there is not made again, so that a call that was cut off goes on,
and parts can be made by several calls at once. OUT/usefulness.md is made of all that is there, and
the summary in README.md.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import baselines
import grid
import jobs
import ml_collections
import numpy as np
import pooled_states
import runs
from absl import flags

from molt_jax.data import datasets
from molt_jax.data.modalities import COLUMN, CONDITIONS, MODALITIES, PATTERNS
from molt_jax.data.sources import Dataset
from molt_jax.errors import UserError
from molt_jax.evaluation import records
from molt_jax.runtime import atomic

ALL = flags.DEFINE_string('all', '', 'Folder whose folders with a train.csv are data sets too.')

COLUMNS = jobs.COLUMNS
DEFAULT = 'MoLT, default'
ALONE = {'image': 'our model of images alone', 'text': 'our model of texts alone'}
LATE_FUSION = 'our late fusion'
# The presets of commit c1ff4b1, towers and schedule included.
FIRST_RELEASE = {
  **grid.DEFAULT,
  **grid.FIRST_RELEASE,
  **grid.FIRST_TEXT_LENGTH,
  'backbones.dtype': 'float32',
  'compute_dtype': 'float32',
  'molt.width': 128,
  'optimizer.learning_rate': 1e-3,
  'optimizer.weight_decay': 3.0,
  'train.batch_size': 64,
  'train.epochs': 10.0,
  'eval.select': 'latest',
}
OURS = {
  **{name: {'dataset.modalities': modality} for modality, name in ALONE.items()},
  LATE_FUSION: {'method': 'late_fusion', 'ridge.landmarks': 0},
  'MoLT, as printed': grid.AS_PRINTED,
  'MoLT, first release': FIRST_RELEASE,
  DEFAULT: {},
}
# Fields of the config that the hidden states of a data set depend on.
READ_BY_PROBES = (
  'backbones.dtype',
  'backbones.quantization',
  'backbones.text.path',
  'backbones.image.path',
  'backbones.image.resolution',
  'image.resize',
  'text.max_tokens',
)
BASELINES = {**baselines.PIXELS_AND_TFIDF, **baselines.PROBES}
ROWS = (*BASELINES, *OURS)
# A difference that counts, in accuracy.
MARGIN = 0.005
README = pathlib.Path(__file__).parent / 'README.md'
BLOCK = re.compile('(<!-- usefulness:.*?-->\n).*?(<!-- /usefulness -->)', re.DOTALL)


# ---- What is to be made --------------------------------------------------------------------------


def data_sets() -> list[str]:
  """Returns the data sets asked for, as `grid.make_config` reads them."""
  named = [f'{path.parent.name}={path.parent}' for path in _found()]
  given = [data for data in grid.DATA.value if not (named and data == 'openmoji')]
  return list(dict.fromkeys([*named, *given]))


def _found():
  paths = sorted(pathlib.Path(ALL.value).glob('*/train.csv')) if ALL.value else []
  if ALL.value and not paths:
    raise UserError(f'--all: {ALL.value!r} holds no folder with a train.csv')
  return paths


def config_of(data: str, row: str, seed: int) -> ml_collections.ConfigDict:
  """Returns the config of a row: of a baseline, what its data and towers are read by."""
  changes = dict(OURS.get(row, {}))
  return jobs.with_store(grid.make_config(data, changes, seed, today=True), data)


def key_of(config: ml_collections.ConfigDict, row: str, prints: Mapping[str, Any]) -> str:
  """Returns a digest of what a result depends on: the data, and the config as far as it is read;
  not where data and stores lie.
  """
  fields = jobs.fields_of(config)
  if row in baselines.PIXELS_AND_TFIDF:
    fields = {}
  elif row in baselines.PROBES:
    fields = {name: _field(fields, name) for name in READ_BY_PROBES}
  return jobs.digest(row, fields, prints)


def _field(fields, name):
  for part in name.split('.'):
    fields = fields[part]
  return fields


def path_of(data: str) -> pathlib.Path:
  """Returns the JSON file of a data set's results."""
  return grid.folder_of('usefulness') / f'{grid.name_of(data)}.json'


def results(data: str) -> dict[str, dict[str, Any]]:
  """Returns row -> seed -> result, of those that are there."""
  return jobs.results(path_of(data))


def keep(data: str, row: str, found: Mapping[str, Any]) -> None:
  """Adds results (seed -> result) of a row to the file of a data set."""
  jobs.keep(path_of(data), ROWS, row, found)


def make(data: str) -> None:
  """Makes what is lacking of a data set, each row and seed in a process of its own."""
  prints = pooled_states.prints(datasets.load_dataset(config_of(data, DEFAULT, 0)))
  for row in ROWS:
    if not re.search(grid.ONLY.value, row):
      continue
    there, done = results(data).get(row, {}), set()
    for seed in grid.seeds():
      key = key_of(config_of(data, row, seed), row, prints)
      if there.get(str(seed), {}).get('key') == key or str(seed) in done:
        continue
      print(f'{grid.name_of(data)}, seed {seed}, {row}', flush=True)
      if jobs.LIST.value:
        continue
      found = _in_process(data, row, seed)
      for own, result in found.items():
        result['key'] = key_of(config_of(data, row, int(own)), row, prints)
        done.add(own)
      keep(data, row, found)


def _in_process(data, row, seed):
  """Returns seed -> result; a baseline makes all seeds at once."""
  return jobs.in_process(__file__, data, row, grid.SEEDS.value if row in BASELINES else [seed])


# ---- One row -------------------------------------------------------------------------------------


def job() -> None:
  """Makes a row of one data set in this process; writes seed -> result."""
  (data,), row = grid.DATA.value, jobs.JOB.value
  if row in BASELINES:
    found = _baseline(data, row)
    found = {seed: {**result, **jobs.cost()} for seed, result in found.items()}
  else:
    found = {str(n): jobs.trained(config_of(data, row, n), data) for n in grid.seeds()}
  jobs.answer(found)


def _baseline(data, row):
  config = config_of(data, row, 0)
  dataset = datasets.load_dataset(config)
  states, more = None, {}
  if row in baselines.PROBES:
    kept = pooled_states.load(config, pathlib.Path(grid.RUNS.value) / 'pooled' / grid.name_of(data))
    states = kept['states']
    more = {
      'features_cpu_seconds': round(kept['cpu_seconds'], 1),
      'towers': jobs.towers(config),
    }
  fits = BASELINES[row](inputs_of(dataset, states))
  more['validation'] = {name: fit.validation for name, fit in fits.items()}
  more['chosen'] = {name: dict(fit.chosen) for name, fit in fits.items()}
  found = {}
  for seed in grid.seeds():
    test = jobs.scores(predictions_of(dataset, fits, seed))
    found[str(seed)] = {**more, 'test': test}
  return found


def inputs_of(dataset: Dataset, states: Any = None) -> baselines.Inputs:
  """Returns a data set as baselines see it."""
  rows = {
    split: [source.read(n, image=True) for n in range(len(source))]
    for split, source in dataset.splits.items()
  }
  return baselines.Inputs(
    texts={split: [row['text'] or '' for row in own] for split, own in rows.items()},
    images={split: [row['image'] for row in own] for split, own in rows.items()},
    label={split: np.array(source.labels) for split, source in dataset.splits.items()},
    present={split: np.asarray(source.present) for split, source in dataset.splits.items()},
    states=states,
    num_classes=len(dataset.class_names),
  )


def predictions_of(dataset: Dataset, fits: baselines.Found, seed: int) -> records.Predictions:
  """Returns what a baseline answers on the test split, all its probability on one class."""
  source = dataset.splits['test']
  present_nm = np.asarray(source.present)
  answers_cn = np.stack([fits[name].score['test'].argmax(axis=1) for name in CONDITIONS])
  # An example counts where the condition leaves it something.
  counted_cn = np.stack([(present_nm & kept).any(axis=1) for kept in PATTERNS])
  return records.Predictions(
    split='test',
    step=0,
    config_hash='',
    seed=seed,
    of=len(source),
    conditions=CONDITIONS,
    class_names=dataset.class_names,
    ids=source.ids,
    label=np.array(source.labels, np.int32),
    present_nm=present_nm,
    counted_cn=counted_cn,
    probability_cnk=np.eye(len(dataset.class_names), dtype=np.float32)[answers_cn],
    loss_cn=np.zeros(counted_cn.shape, np.float32),
  )


# ---- The table -----------------------------------------------------------------------------------


def values(rows: Mapping[str, Any], row: str, condition: str) -> list[float]:
  """Returns the accuracy of each seed that has one."""
  found = [made['test'].get(condition, {}).get('accuracy') for made in rows.get(row, {}).values()]
  return [value for value in found if value is not None]


def mean(rows: Mapping[str, Any], row: str, condition: str) -> float | None:
  """Returns the mean accuracy over seeds; None without one."""
  found = values(rows, row, condition)
  return float(np.mean(found)) if found else None


def best_of(rows: Mapping[str, Any], names: Any, condition: str) -> tuple[float, str] | None:
  """Returns (mean accuracy on test, row) of the best of these rows; None where none has a score."""
  found = [(mean(rows, name, condition), name) for name in names]
  return max(((score, name) for score, name in found if score is not None), default=None)


def strongest(rows: Mapping[str, Any], condition: str) -> dict[str, tuple[float, str] | None]:
  """Returns what the default must reach, each less MARGIN: kind -> (score, row)."""
  kinds = {'baseline or probe': BASELINES, 'late fusion': [LATE_FUSION]}
  found = {kind: best_of(rows, names, condition) for kind, names in kinds.items()}
  if condition == 'none_absent':
    both = [best_of(rows, [*ALONE.values()], name) for name in CONDITIONS]
    own = [(mean(rows, DEFAULT, name), f'{DEFAULT}, {COLUMNS[name]}') for name in CONDITIONS[1:]]
    scored = [x for x in [*both, *own] if x and x[0] is not None]
    found['unimodal'] = max(scored, default=None)
  elif condition in CONDITIONS:
    left = MODALITIES[1 - COLUMN[condition.removesuffix('_absent')]]
    found['unimodal'] = best_of(rows, [ALONE[left]], condition)
  return found


def word(difference: float) -> str:
  """Says what a difference in accuracy is."""
  if difference >= MARGIN:
    return f'ahead by {100 * difference:.1f}'
  return 'level' if difference >= -MARGIN else f'**behind by {-100 * difference:.1f}**'


def costs(rows: Mapping[str, Any], row: str) -> list[str]:
  """Returns cells: processor seconds (most of the seeds: features are computed once), gigabytes."""
  made = [x for x in rows[row].values() if x['cpu_seconds'] is not None]
  if not made:
    return ['-', '-']
  seconds = max(x['cpu_seconds'] + x.get('features_cpu_seconds', 0) for x in made)
  return [f'{seconds:.0f}', f'{max(x["peak_megabytes"] for x in made) / 1024:.1f}']


def data_lines(data: str, rows: Mapping[str, Any]) -> list[str]:
  """Returns the Markdown of one data set: its table, then a line for each condition."""
  lines = [f'## {grid.name_of(data)}', '']
  lines += [f'| test accuracy | {" | ".join(COLUMNS.values())} | CPU, s | peak, GB |']
  lines += ['|---|' + '--:|' * (len(COLUMNS) + 2)]
  for row in rows:
    cells = [_cell(values(rows, row, name)) for name in COLUMNS]
    lines.append(f'| {row} | {" | ".join([*cells, *costs(rows, row)])} |')
  lines.append('')
  for condition, label in COLUMNS.items():
    own = mean(rows, DEFAULT, condition)
    for kind, best in strongest(rows, condition).items() if own is not None else ():
      if best:
        against = f'{word(own - best[0])} ({100 * own:.1f}, {100 * best[0]:.1f})'
        lines.append(f'- {label}, against the best {kind}, {best[1]}: {against}.')
  return [*lines, '']


def _cell(found):
  """Returns 'mean ± standard deviation'; the mean alone where nothing was drawn."""
  return runs.spread(found[:1] if len(set(found)) == 1 else found)


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns the Markdown of all: the default, the best else, and how far apart they are."""
  lines = ['| data set | ' + ' | '.join(COLUMNS.values()) + ' |', '|---|' + '---|' * len(COLUMNS)]
  for data, rows in found.items():
    cells = []
    for condition in COLUMNS:
      own = mean(rows, DEFAULT, condition)
      best = max((x for x in strongest(rows, condition).values() if x), default=None)
      if own is None or best is None:
        cells.append(f'{100 * best[0]:.1f} ({best[1]})' if best else '-')
      else:
        cells.append(f'{100 * own:.1f}: {word(own - best[0])} ({best[1]})')
    lines.append(f'| {data} | {" | ".join(cells)} |')
  return lines


def report() -> None:
  """Writes and prints usefulness.md of all data sets that have results; the summary goes into the
  README where the results are the repository's.
  """
  folder = grid.folder_of('usefulness')
  found = {path.stem: results(path.stem) for path in sorted(folder.glob('*.json'))}
  found = {data: rows for data, rows in found.items() if rows}
  lines = [
    'Test accuracy in percent, mean ± standard deviation over seeds. The default and the best'
  ]
  lines += [f'of all else on the test split; level: less than {100 * MARGIN:.1f} points apart.', '']
  lines += [*summary(found), '']
  for data, rows in found.items():
    lines += data_lines(data, rows)
  lines += ['CPU: processor seconds of all threads, features and start-up included, of the seed']
  lines += ['that computed them; peak: resident memory.']
  atomic.write(folder / 'usefulness.md', '\n'.join(lines) + '\n')
  print('\n'.join(lines))
  if not grid.OUT.value:
    text = BLOCK.sub(lambda m: '\n'.join([m[1], *summary(found), '', m[2]]), README.read_text())
    atomic.write(README, text)


def main():
  if jobs.JOB.value:
    job()
    return
  for data in data_sets():
    make(data)
  report()


if __name__ == '__main__':
  grid.start(main)
