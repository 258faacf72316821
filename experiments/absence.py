"""One model against unimodal models and baselines, complete and with a modality absent.

  python experiments/absence.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--methods=REGEX] [--set=FIELD=VALUE] [--runs=...] [--out=...]

A unimodal model of each modality (the same head, trained on that modality alone), late fusion
trained in three ways, MoLT as printed, our default, and the default with one thing changed at a
time. Accuracy (with several labels F1 micro) on the test split, mean and sample standard deviation
over seeds; differences are paired by seed.
"""

import time

import grid
import jax
import matplotlib
import numpy as np
import runs

from molt_jax.data.modalities import LABELS, MODALITIES
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.runtime import logbook
from molt_jax.training.assembly import assemble

matplotlib.use('Agg')
import matplotlib.pyplot as plt

DROPOUT = grid.COMPLETE_ONLY | {'missing.train_dropout': 0.3}
UNIMODAL = {'text_absent': 'unimodal image model', 'image_absent': 'unimodal text model'}
DEFAULT = 'MoLT, default'
CHANGES = {
  'one classifier for all': {'classifier.per_pattern': False},
  'modality dropout in place of views': DROPOUT,
  'views of one modality x 2': {'missing.view_weight': 2.0},
  'hidden states as they are': {'molt.input_norm': 'none'},
  'fusion without residual': {'fusion.residual': False},
  'distillation': {'missing.distill_weight': 1.0},
  'no CCA': {'cca.weight': 0.0},
  'CCA of the batch': {'cca.estimator': 'batch'},
  'translate': {'missing.strategy': 'translate'},
  'translate, no CCA': {'missing.strategy': 'translate', 'cca.weight': 0.0},
  'null': {'missing.strategy': 'null'},
  'zero': {'missing.strategy': 'zero'},
  'towers in int8': {'backbones.quantization': 'int8'},
  'towers in int4': {'backbones.quantization': 'int4'},
  'stored hidden states in int8': {'features.dtype': 'int8'},
}
METHODS = {
  **{name: grid.DEFAULT | {'dataset.modalities': name.split()[1]} for name in UNIMODAL.values()},
  'late fusion': grid.BASELINE,
  'late fusion + modality dropout': grid.BASELINE | DROPOUT,
  'late fusion + views': grid.DEFAULT | {'method': 'late_fusion'},
  'MoLT, as printed': grid.PRINTED,
  'MoLT, as printed, translate': grid.PRINTED | {'missing.strategy': 'translate'},
  DEFAULT: grid.DEFAULT,
  **{f'{DEFAULT}, {name}': grid.DEFAULT | change for name, change in CHANGES.items()},
}

COLUMNS = LABELS | {name: name for name in grid.MISSING}
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
CURVES = ('late fusion', 'late fusion + views', 'MoLT, as printed', DEFAULT)
MARGIN = 0.005  # What one model may lose against a unimodal model.


def has(method, column):
  """Whether a method has a score there: a unimodal model knows no other modality to lose."""
  return method not in UNIMODAL.values() or column in (
    'none_absent',
    *(c for c, name in UNIMODAL.items() if name == method),
  )


def values(table, method, column):
  return grid.values(table, method, column, grid.metric_of(table))


def paired(table, method, reference, column):
  return grid.paired(table, method, reference, column, grid.metric_of(table))


def validation(table, method):
  """The mean over seeds, '-' without a score."""
  found = [made.result['validation'].get('score') for made in table[method].values()]
  found = [score for score in found if score is not None]
  return f'{100 * np.mean(found):.1f}' if found else '-'


def speed(made):
  """Median of the training examples per second in the run's log; None where it has none."""
  rates = [
    line['images_per_second'] for line in logbook.read(made.folder) if 'images_per_second' in line
  ]
  return float(np.median(rates)) if rates else None


def head_milliseconds(data, method):
  """Milliseconds of the head for one batch without text, the least of ten: what a method costs at
  inference, beside the towers.
  """
  config = grid.make_config(data, METHODS[method], grid.seeds()[0])
  assembly = assemble(config, class_names=tuple(map(str, range(100))))
  head, tower, rows = assembly.method, assembly.towers['image'].config, config.eval.batch_size
  variables = jax.jit(head.init)(jax.random.key(0))
  shape = head.num_layers, rows, tower.num_tokens, tower.hidden_size
  states = HiddenStates(
    jax.random.normal(jax.random.key(1), shape), None, np.zeros((rows, 1), bool)
  )
  present_bm = np.tile([True, False], (rows, 1))
  frozen = dict.fromkeys(MODALITIES)

  def logits(variables, states, present_bm):
    return head(variables, frozen, states, {}, present_bm).logits_bk

  classify = jax.jit(logits)
  times = []
  for _ in range(11):
    start = time.perf_counter()
    classify(variables, states, present_bm).block_until_ready()
    times.append(time.perf_counter() - start)
  return 1e3 * min(times[1:])


def target(table, method):
  """Lines that say whether `method` is one model for all: both unimodal models minus MARGIN, and
  the best late fusion on complete input.
  """
  baselines = [m for m in table if m.startswith('late fusion') and values(table, m, 'none_absent')]
  best = max(baselines, key=lambda m: np.mean(values(table, m, 'none_absent')), default=None)
  goals = [(column, name, -MARGIN) for column, name in UNIMODAL.items() if name in table] + (
    [('none_absent', best, 0.0)] if best else []
  )
  for column, baseline, least in goals:
    differences = paired(table, method, baseline, column)
    if not differences:
      yield f'{COLUMNS[column]}: no example to compare on'
      continue
    yield (
      f'{COLUMNS[column]}: {runs.spread(values(table, method, column))} against '
      f'{runs.spread(values(table, baseline, column))} ({baseline}), '
      f'paired difference {grid.signed(differences)}, allowed {100 * least:.1f}: '
      f'{"reached" if np.mean(differences) >= least else "MISSED"}'
    )


def scores(table, costs):
  """Markdown: a row a method."""
  yield (
    '| method | '
    + ' | '.join(COLUMNS.values())
    + ' | validation | seeds | train, s | train, examples/s | head, ms |'
  )
  yield '|---|' + '--:|' * (len(COLUMNS) + 5)
  for method, by_seed in table.items():
    cells = [runs.spread(values(table, method, c)) if has(method, c) else '-' for c in COLUMNS]
    speeds = [s for s in map(speed, by_seed.values()) if s]
    cells += [
      validation(table, method),
      str(len(by_seed)),
      f'{grid.seconds(table, method):.0f}',
      f'{np.median(speeds):.0f}' if speeds else '-',
      f'{costs[method]:.1f}' if method in costs else '-',
    ]
    yield f'| {method} | ' + ' | '.join(cells) + ' |'


def differences(table):
  """Markdown: each method minus the default, in points, seed by seed."""
  yield f'| minus {DEFAULT} | ' + ' | '.join(COLUMNS.values()) + ' |'
  yield '|---|' + '--:|' * len(COLUMNS)
  for method in table:
    if method != DEFAULT:
      cells = [
        grid.signed(paired(table, method, DEFAULT, c)) if has(method, c) else '-' for c in COLUMNS
      ]
      yield f'| {method} | ' + ' | '.join(cells) + ' |'


def report(data, table, costs):
  """Markdown of one data set."""
  yield f'## {data}: test score in percent\n'
  yield from scores(table, costs)
  if DEFAULT in table:
    goals = [f'- {line}' for line in target(table, DEFAULT)]
    yield from ['\nOne model instead of three?\n', *goals] if goals else []
    yield '\nPaired differences in points, mean ± standard deviation over seeds:\n'
    yield from differences(table)
  yield f'\n![score by condition and by missing rate](absence_{data}.png)\n'


def figure(data, table, path):
  """Bars by method and condition; curves over the missing rate."""
  fig, (bars, curves) = plt.subplots(
    1, 2, figsize=(14, 0.35 * len(table) + 2), layout='constrained', width_ratios=(3, 2)
  )
  for offset, (column, label) in enumerate(LABELS.items()):
    rows = [
      (n, 100 * np.array(values(table, m, column))) for n, m in enumerate(table) if has(m, column)
    ]
    rows = [(n, v) for n, v in rows if len(v)]
    bars.barh(
      [n + 0.27 * (offset - 1) for n, _ in rows],
      [v.mean() for _, v in rows],
      0.25,
      label=label,
      xerr=[v.std(ddof=1) if len(v) > 1 else 0 for _, v in rows],
    )
    if UNIMODAL.get(column) in table and values(table, UNIMODAL[column], column):
      bars.axvline(
        100 * np.mean(values(table, UNIMODAL[column], column)), color=f'C{offset}', linestyle=':'
      )
  bars.set(
    yticks=range(len(table)),
    yticklabels=list(table),
    xlabel='test score, %',
    title=f'{data} (dotted: unimodal models)',
  )
  bars.invert_yaxis()
  fig.legend(*bars.get_legend_handles_labels(), loc='outside lower left', ncols=3, frameon=False)
  for method in (m for m in CURVES if m in table):
    key = grid.metric_of(table)
    curve_sr = [
      [made.predictions.missing_rate(rate, 'both').get(key) for rate in RATES]
      for made in table[method].values()
    ]
    curves.plot(RATES, 100 * np.array(curve_sr, float).mean(axis=0), marker='o', label=method)
  curves.set(xlabel='missing rate (half text, half image)', ylabel='test score, %')
  curves.legend()
  fig.savefig(path, dpi=120)
  plt.close(fig)


def main():
  start = time.monotonic()
  made = grid.make(METHODS)
  lines, costs = ['# One model when a modality is absent\n'], {}
  for data in grid.DATA.value:
    name = grid.name_of(data)
    seen = made[name] if not costs else ()  # The same heads over any data: once is enough.
    costs[name] = {
      method: head_milliseconds(data, method)
      for method in seen
      if METHODS[method].get('dataset.modalities') != 'text'
    }
    lines += report(name, made[name], costs[name])
    figure(name, made[name], grid.folder_of('absence') / f'absence_{name}.png')
  content = {
    'methods': METHODS,
    'data': {name: grid.numbers(table) for name, table in made.items()},
    'head_milliseconds': costs,
  }
  grid.publish('absence', lines, content, start)


if __name__ == '__main__':
  grid.start(main)
