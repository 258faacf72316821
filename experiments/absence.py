"""One model against specialists and rivals, with everything there and with a modality absent: trains all, writes table, figure and numbers.

  python experiments/absence.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2] [--methods=REGEX] [--set=FIELD=VALUE] [--out=...]

Each row of METHODS is the preset of the data set (configs/quickstart.py, configs/table.py) with some fields changed. `--data` may be repeated; FOLDER
is a table. A run has a folder of its own under --runs and is made once; a call that was cut off goes on, and one over all rows reads what calls over
some of them have made. Accuracy on the test split, mean and sample standard deviation over seeds; differences are paired by seed. Everything that is
chosen (the checkpoint of a run, the row called "chosen") is chosen by validation: accuracy, mean over the three conditions.
"""

import contextlib
import json
import pathlib
import re
import time

import jax
import matplotlib
import numpy as np
import runs
from absl import app, flags, logging

from molt_jax import config as config_lib
from molt_jax import evaluate, logbook
from molt_jax import model as model_lib
from molt_jax.backbones.features import Taps

matplotlib.use('Agg')
import matplotlib.pyplot as plt

DATA = flags.DEFINE_multi_string('data', ['openmoji'], 'openmoji, or NAME=FOLDER of a table.')
flags.register_validator(
  'data', lambda given: all(d == 'openmoji' or pathlib.Path(d.partition('=')[2] or '/no folder').is_dir() for d in given),
  message='each is openmoji, or NAME=FOLDER with a folder that is there')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of parameters, data order, dropout and absence draws.')
ONLY = flags.DEFINE_string('methods', '', 'Regular expression: rows to train in this call; the report is on what is finished.')
SET = flags.DEFINE_multi_string('set', [], 'FIELD=VALUE of the config, for every row.')
RUNS = flags.DEFINE_string('runs', 'runs/absence', 'Folder of the runs.')
OUT = flags.DEFINE_string('out', 'experiments/results/absence', 'Folder of the results.')

COMPLETE_ONLY = {'missing.views': False}
DROPOUT = {'missing.views': False, 'missing.train_dropout': 0.3}
VIEWS = {'missing.views': True}
DISTILLATION = {'missing.distill_weight': 1.0}
ONE = {'classifier.per_pattern': False}
LATE_FUSION = {'method': 'late_fusion'}
PAPER = {
  'molt.input_norm': 'none', 'fusion.residual': False, 'classifier.kind': 'linear', 'classifier.dropout': 0.0, 'cca.estimator': 'batch',
  **ONE, **COMPLETE_ONLY}
STANDARDIZED = PAPER | {'molt.input_norm': 'standardize'}
RESIDUAL = STANDARDIZED | {'fusion.residual': True, 'classifier.kind': 'mlp', 'classifier.dropout': 0.3}
WINDOW = RESIDUAL | {'cca.estimator': 'moving_average'}
SPECIALISTS = {'text_absent': 'image specialist', 'image_absent': 'text specialist'}
DEFAULT = 'MoLT, default'

METHODS = {
  'image specialist': {'dataset.modalities': 'image'},
  'text specialist': {'dataset.modalities': 'text'},
  'late fusion': LATE_FUSION | COMPLETE_ONLY,
  'late fusion + modality dropout': LATE_FUSION | DROPOUT,
  'late fusion + views': LATE_FUSION | VIEWS,
  'late fusion + views + distillation': LATE_FUSION | VIEWS | DISTILLATION,
  'MoLT as printed': PAPER,
  'MoLT as printed, no CCA': PAPER | {'cca.weight': 0.0},
  'MoLT as printed, translate': PAPER | {'missing.strategy': 'translate'},
  'MoLT + standardise': STANDARDIZED,
  'MoLT + residual, MLP': RESIDUAL,
  'MoLT + CCA over a window': WINDOW,
  'MoLT + CCA over a window, no CCA': WINDOW | {'cca.weight': 0.0},
  'MoLT + CCA over a window, translate': WINDOW | {'missing.strategy': 'translate'},
  'MoLT + modality dropout': WINDOW | DROPOUT,
  'MoLT + modality dropout, translate': WINDOW | DROPOUT | {'missing.strategy': 'translate'},
  'MoLT + views': VIEWS | ONE,
  'MoLT + views + distillation': VIEWS | ONE | DISTILLATION,
  DEFAULT: {},
  'MoLT, default, no CCA': {'cca.weight': 0.0},
  'MoLT, default, CCA of the batch': {'cca.estimator': 'batch'},
  'MoLT, default, translate': {'missing.strategy': 'translate'},
  'MoLT, default, null': {'missing.strategy': 'null'},
  'MoLT, default, zero': {'missing.strategy': 'zero'},
  'MoLT, default, distillation': DISTILLATION,
  'MoLT, default, distillation x 0.3': {'missing.distill_weight': 0.3},
  'MoLT, default, last checkpoint': {'eval.select': 'latest'},
}

CONDITIONS = {'none_absent': 'complete', 'text_absent': 'text absent', 'image_absent': 'image absent', 'missing_both_0.7': '70 % both'}
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
CURVES = ('late fusion', 'late fusion + modality dropout', 'MoLT as printed', 'MoLT + modality dropout', DEFAULT)
MARGIN = 0.005  # What one model may lose against a specialist.


# ---- Runs ----------------------------------------------------------------------------------------------------------------------------


def make_config(data, method, seed):
  """The config of one run; `data` is as on the command line."""
  folder = data.partition('=')[2]
  preset = pathlib.Path(__file__).parents[1] / 'configs' / ('table.py' if folder else 'quickstart.py')
  given = dict(item.split('=', 1) for item in SET.value) | ({'dataset.path': folder} if folder else {})
  return runs.override(config_lib.load_config(str(preset), given), METHODS[method] | {'seed': seed})


def run_folder(data, method, seed):
  return pathlib.Path(RUNS.value) / data.partition('=')[0] / re.sub(r'[^a-z0-9.]+', '-', method.lower()) / str(seed)


def run(data, method, seed):
  """Returns {'seconds', 'images_per_second', 'validation': mean score, 'accuracy': condition -> test accuracy} of one run, made if need be."""
  folder = run_folder(data, method, seed)
  result = runs.run(make_config(data, method, seed), folder)
  test = result['test'] if method in SPECIALISTS.values() else result['test'] | missing_rates(folder, result)
  rates = [line['images_per_second'] for line in logbook.read(folder) if 'images_per_second' in line]
  return {
    'seconds': result['seconds'], 'images_per_second': float(np.median(rates)) if rates else None, 'validation': result['validation']['score'],
    'accuracy': {name: scores['accuracy'] for name, scores in test.items()}}


def missing_rates(folder, result):
  """The test split at each missing rate, in one pass."""
  path = folder / 'missing_rates.json'
  if path.exists() and (record := json.loads(path.read_text()))['config_hash'] == result['config_hash']:
    return record['results']
  with (folder / 'log.txt').open('a') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
    results = evaluate.run(folder, absent=(), missing_rates=RATES)['results']
  results = {name: scores for name, scores in results.items() if name.startswith('missing_')}
  logbook.write_atomically(path, json.dumps({'config_hash': result['config_hash'], 'results': results}) + '\n')
  return results


def head_milliseconds(data, method, seed):
  """Milliseconds of the head for one batch without text, the least of ten: what a strategy costs at inference, beside the towers."""
  config = make_config(data, method, seed)
  towers, rows = model_lib.describe_towers(config), config.eval.batch_size
  model = model_lib.make_model(config, towers, num_classes=100)
  variables = jax.jit(model.init)(jax.random.key(0))
  tower = towers['image'].config
  taps = Taps(jax.random.normal(jax.random.key(1), (model.num_taps, rows, tower.num_tokens, tower.hidden_size)), None, np.zeros((rows, 1), bool))
  present_bm = np.tile([True, False], (rows, 1))
  classify = jax.jit(model.classify)
  times = []
  for _ in range(11):
    start = time.perf_counter()
    classify(variables, taps, present_bm).logits_bk.block_until_ready()
    times.append(time.perf_counter() - start)
  return 1e3 * min(times[1:])


# ---- Report --------------------------------------------------------------------------------------------------------------------------


def differences(records, method, reference, condition):
  """Test accuracy of `method` minus that of `reference`, seed by seed."""
  one, other = records[method], records[reference]
  return [one[seed]['accuracy'][condition] - other[seed]['accuracy'][condition] for seed in one if seed in other]


def values(records, method, condition):
  return [record['accuracy'][condition] for record in records[method].values() if condition in record['accuracy']]


def validation(records, method):
  return float(np.mean([record['validation'] for record in records[method].values()]))


def choose(records):
  """The MoLT row of the best mean validation score."""
  return max((m for m in records if m.startswith('MoLT')), key=lambda m: validation(records, m), default=None)


def signed(differences):
  return ('+' if np.mean(differences) >= 0 else '') + runs.spread(differences)


def target(records, method):
  """Lines that say whether `method` is one model for all: both specialists minus MARGIN, and the best late fusion on complete input."""
  rivals = [m for m in records if m.startswith('late fusion')]
  best = max(rivals, key=lambda m: np.mean(values(records, m, 'none_absent')), default=None)
  goals = [(condition, name, -MARGIN) for condition, name in SPECIALISTS.items() if name in records] + ([('none_absent', best, 0.0)] if best else [])
  for condition, rival, least in goals:
    difference = differences(records, method, rival, condition)
    word = 'reached' if np.mean(difference) >= least else 'MISSED'
    yield (f'{CONDITIONS[condition]}: {runs.spread(values(records, method, condition))} against {runs.spread(values(records, rival, condition))} '
           f'({rival}), paired difference {signed(difference)}, allowed {100 * least:.1f}: {word}')


def table(records, costs):
  """Markdown lines: a row a method."""
  yield '| method | ' + ' | '.join(CONDITIONS.values()) + ' | validation | train, s | train, examples/s | head, ms |'
  yield '|---|' + '---|' * (len(CONDITIONS) + 4)
  for method, by_seed in records.items():
    cells = [runs.spread(values(records, method, c)) if values(records, method, c) else '-' for c in CONDITIONS]
    speeds = [r['images_per_second'] for r in by_seed.values() if r['images_per_second']]
    cells += [f'{100 * validation(records, method):.1f}', f'{np.mean([r["seconds"] for r in by_seed.values()]):.0f}',
              f'{np.median(speeds):.0f}' if speeds else '-', f'{costs[method]:.1f}' if method in costs else '-']
    yield f'| {method} | ' + ' | '.join(cells) + ' |'


def paired_table(records, reference):
  """Markdown lines: each method minus the reference, in points, seed by seed."""
  yield f'| minus {reference} | ' + ' | '.join(CONDITIONS.values()) + ' |'
  yield '|---|' + '---|' * len(CONDITIONS)
  for method in records:
    if method != reference and method not in SPECIALISTS.values():
      yield f'| {method} | ' + ' | '.join(signed(differences(records, method, reference, c)) for c in CONDITIONS) + ' |'


def report(data, records, costs):
  """Markdown of one data set."""
  seeds = sorted({seed for by_seed in records.values() for seed in by_seed})
  yield f'## {data}: test accuracy in percent, {len(seeds)} seed(s)\n'
  yield from table(records, costs)
  chosen = choose(records)
  for method in dict.fromkeys(m for m in (DEFAULT, chosen) if m in records):
    yield f'\n{"Chosen by validation" if method == chosen else "The default"}: {method}. One model instead of three?\n'
    yield from (f'- {line}' for line in target(records, method))
  if DEFAULT in records:
    yield '\nPaired differences in points, mean and standard deviation over seeds:\n'
    yield from paired_table(records, DEFAULT)
  yield f'\n![accuracy by condition and by missing rate]({data}.png)\n'


def figure(data, records, path):
  """Bars by method and condition; curves over the missing rate."""
  fig, (bars, curves) = plt.subplots(1, 2, figsize=(14, 0.35 * len(records) + 2), layout='constrained', width_ratios=(3, 2))
  for offset, (condition, label) in enumerate(list(CONDITIONS.items())[:3]):
    rows = [(n, values(records, m, condition)) for n, m in enumerate(records) if values(records, m, condition)]
    bars.barh([n + 0.27 * (offset - 1) for n, _ in rows], [100 * np.mean(v) for _, v in rows], 0.25, label=label,
              xerr=[100 * np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in rows])
    if SPECIALISTS.get(condition) in records:
      bars.axvline(100 * np.mean(values(records, SPECIALISTS[condition], condition)), color=f'C{offset}', linestyle=':')
  bars.set(yticks=range(len(records)), yticklabels=list(records), xlabel='test accuracy, %', title=f'{data} (dotted: specialists)')
  bars.invert_yaxis()
  bars.legend()
  names = ['none_absent', *(f'missing_both_{rate:g}' for rate in RATES)]
  for method in (m for m in CURVES if m in records):
    curves.plot([0, *RATES], [100 * np.mean(values(records, method, name)) for name in names], marker='o', label=method)
  curves.set(xlabel='missing rate (half text, half image)', ylabel='test accuracy, %')
  curves.legend()
  fig.savefig(path, dpi=120)
  plt.close(fig)


def finished(data, method, seed):
  """Whether an earlier call has finished this run."""
  path = run_folder(data, method, seed) / 'result.json'
  return path.exists() and json.loads(path.read_text())['config_hash'] == config_lib.config_hash(make_config(data, method, seed))


def main(_):
  logging.set_verbosity(logging.WARNING)
  out, start = pathlib.Path(OUT.value), time.monotonic()
  out.mkdir(parents=True, exist_ok=True)
  lines, numbers = ['# One model when a modality is absent\n'], {}
  for data in DATA.value:
    name, records = data.partition('=')[0], {}
    for seed in map(int, SEEDS.value):
      for method in METHODS:
        if re.search(ONLY.value, method) or finished(data, method, seed):
          records.setdefault(method, {})[seed] = run(data, method, seed)
          print(name, seed, method, {k: round(v, 4) for k, v in records[method][seed]['accuracy'].items() if k in CONDITIONS}, flush=True)
    records = {method: records[method] for method in METHODS if method in records}
    first = int(SEEDS.value[0])
    costs = {method: head_milliseconds(data, method, first) for method in records if METHODS[method].get('dataset.modalities') != 'text'}
    lines += report(name, records, costs)
    numbers[name] = {'runs': records, 'head_milliseconds': costs, 'chosen': choose(records)}
    figure(name, records, out / f'{name}.png')
  meta = runs.provenance() | {
    'seeds': SEEDS.value, 'seconds_of_this_call': round(time.monotonic() - start, 1), 'device': jax.devices()[0].device_kind}
  lines.append(f'`{meta["command"]}`; versions {meta["versions"]}; device {meta["device"]}; {meta["seconds_of_this_call"]} s in this call '
               '(finished runs are read, their own seconds are in the tables).')
  logbook.write_atomically(out / 'absence.json', json.dumps(meta | {'methods': METHODS, 'data': numbers}, indent=1) + '\n')
  logbook.write_atomically(out / 'absence.md', '\n'.join(lines) + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  app.run(main)
