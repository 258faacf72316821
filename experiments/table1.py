"""The paper's Table 1 with every method of the harness: the same frozen towers, data, missing
patterns, seeds and small budget of hyperparameters; the paper's printed numbers beside ours.

  python experiments/table1.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--methods=REGEX] [--set=FIELD=VALUE] [--live_epochs=2] [--runs=...] [--out=...] [--list]

Rows: late fusion trained on complete examples alone (the paper's baseline); MoLT as printed, in our
default as a user gets it, and with the budget of the others, with and without its regression; every
registered method that any two towers will do for, trained for absence as our default is.
Conditions: complete, without text, without image, and 70 % of the examples without one of them.
Absent is never fed.

The budget is the same for each: three learning rates, a third of the preset's, it, and three times
it, then the best of these without weight decay, each tried for a quarter of the epochs on the first
seed of --tuned_on. The best validation score (mean over what is missing) decides for all seeds and
data sets; OUT/trials.json keeps all. Everything else is the preset's and the method's default.
Methods that run layers of a tower in each step (`live`) train for --live_epochs in batches of 16,
which gives few examples more steps, and so do the rows 'as short'.

Each row and seed is a process of its own, whose processor seconds and peak memory are kept with its
scores in OUT/DATA.json; a call that was cut off goes on. OUT/table1.md is made of all that is
there. Processor seconds are of the whole process: start, validations and evaluation too.
"""

import json
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import grid
import jobs
import matplotlib
import ml_collections
import numpy as np
import pooled_states
import runs
from absl import flags

from molt_jax.config import methods
from molt_jax.data import datasets
from molt_jax.errors import UserError

matplotlib.use('Agg')
import matplotlib.pyplot as plt

LIVE_EPOCHS = flags.DEFINE_float(
  'live_epochs', 2.0, 'Epochs of methods that run layers in each step, and of rows as short.'
)
TRIAL = flags.DEFINE_bool('trial', False, 'Used by this script itself: a trial.')
TUNED = flags.DEFINE_string('tuned', '{}', 'Used by this script itself: fields that were chosen.')
TUNED_ON = flags.DEFINE_string('tuned_on', 'openmoji', 'Data set that fields are tried on.')

HEAD_ALONE = {'ridge.landmarks': 0}
BASELINE = 'late_fusion, complete examples alone'
PRINTED, DEFAULT = 'MoLT, as printed', 'MoLT, default'
SAME, WITHOUT = 'MoLT, same budget', 'MoLT, same budget, without regression'
# Of a method that could read class names from a pair that shares a space.
NO_NAMES = {name: {f'{name}.classes': 'head'} for name in ('mmrl', 'mmrlpp', 'maple')}
# They run layers of a tower in each step; others read stored hidden states alone.
LIVE = ('pmf', 'mora', 'prompt_fuse', 'mmbt', 'mmrl', 'mmrlpp', 'maple', 'map', 'dcp')
ANYWHERE = [m for m, row in methods.METHODS.items() if m != 'molt' and row.names != 'must']


def _row(method):
  return grid.DEFAULT | HEAD_ALONE | {'method': method} | NO_NAMES.get(method, {})


BLIND, RADIAL = 'prompt_fuse, in front (BlindPrompt)', 'probe, radial'
STORED_ROWS = {
  BASELINE: _row('late_fusion') | grid.COMPLETE_ONLY,
  PRINTED: grid.AS_PRINTED,
  DEFAULT: grid.DEFAULT,
  SAME: grid.DEFAULT,
  WITHOUT: grid.DEFAULT | HEAD_ALONE,
  **{method: _row(method) for method in ANYWHERE if method not in LIVE},
  RADIAL: _row('probe') | {'probe.kernel': 'rbf'},
}
SHORT_ROWS = {
  'late_fusion, as short': _row('late_fusion'),
  f'{DEFAULT}, as short': STORED_ROWS[DEFAULT],
  **{method: _row(method) for method in ANYWHERE if method in LIVE},
  BLIND: _row('prompt_fuse') | {'prompt_fuse.placement': 'front'},
}
ROWS = STORED_ROWS | SHORT_ROWS
# What is learned in closed form, or not at all, has nothing to try here.
NOT_TRAINED = ('knn', 'probe', RADIAL)
# As a user gets it.
UNTUNED = (DEFAULT, f'{DEFAULT}, as short')
RATES = (1 / 3, 1.0, 3.0)
NO_DECAY = 'no decay'
# Of the epochs, in trials.
TRIAL_SHARE = 0.25
SHORT_BATCH = 16
# The regression does not enter the training of the head beside it, and short runs are no method.
TUNED_AS = {WITHOUT: SAME, 'late_fusion, as short': 'late_fusion'}
RATE, DECAY = 'optimizer.learning_rate', 'optimizer.weight_decay'

# As printed: MM-IMDb F1 micro / macro, UPMC Food-101 and SNLI-VE accuracy.
PAPER_DATA = ('MM-IMDb, F1 micro / macro', 'Food-101, accuracy', 'SNLI-VE, accuracy')
PAPER = {
  ('complete', 'MMBT'): ('66.8 / 61.8', '92.10', '74.69'),
  ('complete', 'MaPLe'): ('60.9 / 51.2', '90.80', '71.52'),
  ('complete', 'BlindPrompt'): ('56.5 / 50.2', '84.56', '65.54'),
  ('complete', 'PMF'): ('64.5 / 58.8', '91.51', '71.92'),
  ('complete', 'HUSE'): ('-', '92.30', '-'),
  ('complete', 'VisualBERT'): ('-', '92.30', '75.06'),
  ('complete', 'MoLT'): ('64.9 / 59.0', '92.12', '75.10'),
  ('absent, not said which', 'baseline without MoLT'): ('59.0 / 51.2', '85.2', '69.3'),
  ('without text', 'MoLT'): ('62.4 / 56.7', '88.9', '73.2'),
  ('without image', 'MoLT'): ('63.1 / 57.0', '89.2', '71.0'),
}
CAVEATS = (
  (
    'other data, other towers (LLaMA and CLIP ViT-L/14) and full-size training: the numbers cannot '
    'be compared with ours, only the pattern;'
  ),
  'one number each, no spread over seeds, no number of epochs, batch size or text length;',
  'it is not said which modality the baseline row lacks;',
  (
    'the absence rows cannot come from absence as meant here: without its hypothesis a pair of '
    'SNLI-VE has no label to be known (chance is 33.4), yet '
    '73.2 is printed; without the recipe 88.9 is printed for Food-101, where classifiers of images '
    'alone reach 71.7 to 73.6 (Gallo et al. 2020; Mittal '
    'et al. 2023). Either the absent modality still reached the MoLT branches or only the last '
    'layer was dropped. They are no target for a strict '
    'protocol;'
  ),
  'the full model scores 75.10 on SNLI-VE in Table 1 and 73.45 in Table 2.',
)
# Files beside those of data sets.
NO_DATA = ('table1.json', 'trials.json', 'first_release.json')
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7')


# ---- What is to be made --------------------------------------------------------------------------


def config_of(
  data: str, row: str, seed: int, tuned: Mapping[str, Any] | None = None, *, trial: bool = False
) -> ml_collections.ConfigDict:
  """Returns the config of a row.

  Args:
    data, row, seed: which.
    tuned: fields that are tried, or were chosen.
    trial: with its share of the epochs.
  """
  changes = dict(ROWS[row])
  if row in SHORT_ROWS:
    changes |= {'train.epochs': LIVE_EPOCHS.value, 'train.least_steps': 0}
    changes |= {'train.batch_size': SHORT_BATCH}
  config = jobs.with_store(grid.make_config(data, changes, seed, today=True), data)
  changes = dict(tuned or {})
  if trial:
    changes['train.epochs'] = TRIAL_SHARE * config.train.epochs
    changes['train.least_steps'] = round(TRIAL_SHARE * config.train.least_steps)
  return runs.override(config, changes)


def path_of(data: str) -> pathlib.Path:
  """Returns the JSON file of a data set's results."""
  return grid.folder_of('table1') / f'{grid.name_of(data)}.json'


def trials_path() -> pathlib.Path:
  """Returns the JSON file of what each trial scored on validation."""
  return grid.folder_of('table1') / 'trials.json'


def best_of(trials: Mapping[str, Any]) -> dict[str, float]:
  """Returns the fields of the trial with the best validation score."""
  best = max(trials.values(), key=lambda trial: trial['validation'])
  return {RATE: best['learning_rate'], DECAY: best['weight_decay']}


def chosen(row: str) -> dict[str, float]:
  """Returns the fields that validation chose for a row, {} unless all were tried."""
  trials = jobs.results(trials_path()).get(TUNED_AS.get(row, row), {})
  return best_of(trials) if len(trials) == len(RATES) + 1 else {}


def make(data: str, *, tune: bool) -> None:
  """Makes what is lacking of a data set, each row and seed in a process of its own.

  Args:
    data: as `--data` has it.
    tune: try the fields of the budget here.
  """
  prints = pooled_states.prints(datasets.load_dataset(config_of(data, DEFAULT, 0)))
  for row in ROWS:
    if not re.search(grid.ONLY.value, row):
      continue
    if tune and row not in (*NOT_TRAINED, *UNTUNED, *TUNED_AS):
      _try_all(data, row, prints)
    for seed in grid.seeds():
      _make_one(data, row, seed, chosen(row), prints)


def _try_all(data, row, prints):
  seed = grid.seeds()[0]
  preset = config_of(data, row, seed).optimizer.learning_rate
  for rate in RATES:
    _make_one(data, row, seed, {RATE: rate * preset}, prints, trial=str(rate))
  trials = jobs.results(trials_path()).get(row, {})
  by_rate = {name: trials[name] for name in map(str, RATES) if name in trials}
  if len(by_rate) == len(RATES):
    _make_one(data, row, seed, {**best_of(by_rate), DECAY: 0.0}, prints, trial=NO_DECAY)


def _make_one(data, row, seed, tuned, prints, *, trial=''):
  """Adds one result to a file, under its seed; of a trial, to that of trials, under its name."""
  path, name = (trials_path(), trial) if trial else (path_of(data), str(seed))
  config = config_of(data, row, seed, tuned, trial=bool(trial))
  key = jobs.digest(row, jobs.fields_of(config), prints)
  if jobs.results(path).get(row, {}).get(name, {}).get('key') == key:
    return
  rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
  what = f'learning rate {rate:.2g}, decay {decay:g}'
  print(f'{grid.name_of(data)}, seed {seed}, {row}, {what}', flush=True)
  if jobs.LIST.value:
    return
  more = [f'--tuned={json.dumps(tuned)}', f'--trial={bool(trial)}']
  more += [f'--live_epochs={LIVE_EPOCHS.value}']
  (result,) = jobs.in_process(__file__, data, row, [seed], more).values()
  result |= {'key': key, 'learning_rate': rate, 'weight_decay': decay}
  jobs.keep(path, list(ROWS), row, {name: result})


def job() -> None:
  """Makes a row of one data set in this process; writes seed -> result."""
  (data,), row, found = grid.DATA.value, jobs.JOB.value, {}
  for seed in grid.seeds():
    config = config_of(data, row, seed, json.loads(TUNED.value), trial=TRIAL.value)
    found[str(seed)] = jobs.tried(config, data) if TRIAL.value else jobs.trained(config, data)
  jobs.answer(found)


# ---- The table -----------------------------------------------------------------------------------


def metric_of(rows: Mapping[str, Any]) -> str:
  """Returns the key of the headline score of a data set."""
  return next(iter(next(iter(rows.values())).values()))['metric']


def values(rows: Mapping[str, Any], row: str, condition: str, metric: str) -> dict[str, float]:
  """Returns seed -> score, of the seeds that have one."""
  found = {seed: made['test'].get(condition, {}) for seed, made in rows.get(row, {}).items()}
  return {
    seed: scores[metric]
    for seed, scores in found.items()
    if scores.get('num_examples') != 0 and scores.get(metric) is not None
  }


def cell(rows: Mapping[str, Any], row: str, condition: str) -> str:
  """Returns 'mean ± standard deviation', with several labels F1 micro / macro."""
  keys = [metric_of(rows)]
  keys += ['f1_macro'] if keys == ['f1_micro'] else []
  return ' / '.join(runs.spread(values(rows, row, condition, key).values()) for key in keys)


def cost(row: str, made: Mapping[str, Any]) -> list[str]:
  """Returns cells: epochs, learning rate, weight decay, trained parameters, processor seconds of a
  run and of an epoch, gigabytes.

  Args:
    row: its name.
    made: seed -> result.
  """
  first = next(iter(made.values()))
  measured = [x for x in made.values() if x['cpu_seconds'] is not None]
  # Hidden states are computed once; that run says nothing on the others.
  stored = [x for x in measured if not x['extracted_features']] or measured
  epochs = first['epochs']
  tuned = [f'{first["learning_rate"]:.2g}', f'{first["weight_decay"]:g}']
  cells = [f'{epochs:.3g}', *tuned] if row not in NOT_TRAINED else ['-'] * 3
  cells.append(f'{first["parameters"]:,}')
  if not stored:
    return [*cells, '-', '-', '-']
  seconds = float(np.median([x['cpu_seconds'] for x in stored]))
  mark = ' (with towers)' if stored[0]['extracted_features'] else ''
  peak = max(x['peak_megabytes'] for x in stored) / 1024
  each = f'{seconds / epochs:.0f}' if epochs else '-'
  return [*cells, f'{seconds:.0f}{mark}', each, f'{peak:.1f}']


HEADS = ('seeds', 'epochs', 'learning rate', 'decay', 'trained', 'CPU, s', 'an epoch', 'peak, GB')


def data_lines(data: str, rows: Mapping[str, Any]) -> list[str]:
  """Returns the Markdown of one data set: its table, who is ahead, differences from MoLT."""
  columns = (*jobs.COLUMNS.values(), *HEADS)
  lines = [f'## {data}', '', f'| method | {" | ".join(columns)} |']
  lines += ['|---|' + '--:|' * len(columns)]
  for row, made in rows.items():
    scored = [cell(rows, row, condition) for condition in jobs.COLUMNS]
    seeds = '-' if row in NOT_TRAINED else str(len(made))
    lines.append(f'| {row} | {" | ".join([*scored, seeds, *cost(row, made)])} |')
  lines += ['', *(leader(rows, condition) for condition in jobs.COLUMNS), '']
  others = [row for row in rows if row != DEFAULT]
  if DEFAULT not in rows or not others:
    return lines
  lines += [f'Minus {DEFAULT}, points, paired by seed:', '']
  lines += [f'| method | {" | ".join(jobs.COLUMNS.values())} |']
  lines += ['|---|' + '--:|' * len(jobs.COLUMNS)]
  for row in others:
    against = [grid.signed(paired(rows, row, condition)) for condition in jobs.COLUMNS]
    lines.append(f'| {row} | {" | ".join(against)} |')
  return [*lines, '']


def paired(rows: Mapping[str, Any], row: str, condition: str) -> list[float]:
  """Returns the score of a row minus that of our default, seed by seed; of what nothing is drawn
  for, its one score minus each.
  """
  own = values(rows, row, condition, metric_of(rows))
  ours = values(rows, DEFAULT, condition, metric_of(rows))
  if row in NOT_TRAINED and own:
    return [next(iter(own.values())) - score for score in ours.values()]
  return [own[seed] - score for seed, score in ours.items() if seed in own]


def leader(rows: Mapping[str, Any], condition: str) -> str:
  """Says which row is ahead on the test split under a condition, and where our default is."""
  metric = metric_of(rows)
  means = {row: list(values(rows, row, condition, metric).values()) for row in rows}
  means = {row: float(np.mean(found)) for row, found in means.items() if found}
  if not means:
    return f'- {jobs.COLUMNS[condition]}: no example.'
  best = max(means, key=means.get)
  text = f'- {jobs.COLUMNS[condition]}: {best} is ahead ({100 * means[best]:.1f})'
  if DEFAULT not in means:
    return f'{text}.'
  if best == DEFAULT:
    del means[DEFAULT]
    second = max(means, key=means.get, default=None)
    return f'{text}, then {second} ({100 * means[second]:.1f}).' if second else f'{text}.'
  return f'{text}; {DEFAULT}: {100 * means[DEFAULT]:.1f}.'


def lines(found: Mapping[str, Any]) -> list[str]:
  """Returns the Markdown of all."""
  made = ['# Table 1: every method, with everything there, and with a modality absent', '']
  made += [
    'Test score in percent (accuracy; with several labels F1 micro / macro), mean ± standard '
    'deviation over seeds; without ±: one seed, or nothing is drawn. Trained: parameters. CPU: '
    'processor seconds of a run, start, validations and evaluation included, hidden states read '
    'from the store (with towers: computed in it); an epoch: that divided by epochs.',
    '',
    'Learning rate and weight decay: of three rates (a third of the preset, it, three times it) '
    'and the best of these without decay, what had the best validation score after '
    f'{TRIAL_SHARE:g} of the epochs on the first seed of {TUNED_ON.value}. As short: with the '
    f'epochs and batches ({SHORT_BATCH}) of methods that run layers of a tower in each step. '
    f'{DEFAULT} is the preset itself.',
    '',
  ]
  for data, rows in found.items():
    made += data_lines(data, rows)
  made += ['![scores by method and absence](table1.png)', '']
  made += [
    '## As the paper prints it',
    '',
    '| inference | method | ' + ' | '.join(PAPER_DATA) + ' |',
  ]
  made += ['|---|---|' + '--:|' * len(PAPER_DATA)]
  for (condition, method), printed in PAPER.items():
    made.append(f'| {condition} | {method} | ' + ' | '.join(printed) + ' |')
  return [*made, '', 'How to read it:', '', *(f'- {caveat}' for caveat in CAVEATS)]


def figure(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Dots with their spread over seeds: a panel a data set, a row a method."""
  rows = [row for row in ROWS if any(row in own for own in found.values())]
  size = (4.2 * len(found) + 3, 0.34 * len(rows) + 1.6)
  fig, axes = plt.subplots(
    1, len(found), figsize=size, layout='constrained', squeeze=False, sharey=True
  )
  for ax, (data, own) in zip(axes[0], found.items(), strict=True):
    for i, (condition, label) in enumerate(jobs.COLUMNS.items()):
      scored = {
        n: 100 * np.array(list(values(own, row, condition, metric_of(own)).values()))
        for n, row in enumerate(rows)
      }
      scored = {n: v for n, v in scored.items() if len(v)}
      ax.errorbar(
        [v.mean() for v in scored.values()],
        [n + 0.16 * (i - 1.5) for n in scored],
        xerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in scored.values()],
        fmt='osD^'[i],
        markersize=4,
        color=COLOURS[i],
        label=label,
      )
    name = metric_of(own).replace('f1_', 'F1 ')
    ax.set(title=data, xlabel=f'test {name}, %', yticks=range(len(rows)), yticklabels=rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis='x', alpha=0.4)
  handles = axes[0][0].get_legend_handles_labels()
  fig.legend(*handles, loc='outside lower center', ncols=4, frameon=False)
  fig.savefig(path, dpi=110)
  plt.close(fig)


def with_chosen_fields(rows: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the results without seeds that were made before other fields were chosen, unless there
  are no others yet.
  """
  kept = {}
  for row, made in rows.items():
    fields = chosen(row)
    wanted = fields.get(RATE), fields.get(DECAY)
    same = {
      seed: result
      for seed, result in made.items()
      if (result['learning_rate'], result['weight_decay']) == wanted
    }
    kept[row] = same or made
  return kept


def report(start: float) -> None:
  """Writes table1.md, table1.json and table1.png of all data sets that have results."""
  folder = grid.folder_of('table1')
  found = {
    path.stem: with_chosen_fields(jobs.results(path))
    for path in sorted(folder.glob('*.json'))
    if path.name not in NO_DATA
  }
  found = {data: rows for data, rows in found.items() if rows}
  if not found:
    raise UserError(f'--methods: {grid.ONLY.value!r} matches none of {", ".join(ROWS)}')
  figure(found, folder / 'table1.png')
  printed = [
    {'inference': c, 'method': m, **dict(zip(PAPER_DATA, p, strict=True))}
    for (c, m), p in PAPER.items()
  ]
  fields = ('learning_rate', 'weight_decay', 'validation')
  tried = {
    row: [{name: trial[name] for name in fields} for trial in own.values()]
    for row, own in jobs.results(trials_path()).items()
  }
  content = {'methods': ROWS, 'trials': tried, 'paper': printed, 'data': found}
  grid.publish('table1', lines(found), content, start)


def main():
  start = time.monotonic()
  if jobs.JOB.value:
    job()
    return
  for data in grid.DATA.value:
    make(data, tune=grid.name_of(data) == TUNED_ON.value)
  report(start)


if __name__ == '__main__':
  grid.start(main)
