"""Score against missing rate, 0 to 100 %, for text, image and both, of models trained at 0 % and at
70 %.

  python experiments/robustness.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--methods=REGEX] [--set=FIELD=VALUE] [...]

The field's protocol: that share of the complete rows lacks a modality for good, drawn by a hash of
(seed, split, id); `both`: half of them text, half image. Trained at 70 %: 70 % of the rows of train
and of validation, type `both`. Test rows do not influence each other, so every rate is put together
from the predictions under the three absences; the towers run once and the head three times.
"""

import time

import grid
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

GAPS = {
  'missing.train_rate': 0.7,
  'missing.train_type': 'both',
  'missing.eval_rate': 0.7,
  'missing.eval_type': 'both',
}
FAMILIES = {
  'late_fusion': grid.BASELINE,
  'MoLT, as printed': grid.PRINTED,
  'MoLT, default': grid.DEFAULT,
}
TRAINED = {'0 %': {}, '70 %': GAPS}
METHODS = {
  f'{family}, trained at {rate}': FAMILIES[family] | TRAINED[rate]
  for rate in TRAINED
  for family in FAMILIES
}
KINDS = {'text': 'text missing', 'image': 'image missing', 'both': 'half text, half image'}
RATES = tuple(round(0.1 * i, 1) for i in range(11))
SHOWN = (0.0, 0.3, 0.5, 0.7, 1.0)


def curve(made, kind, key):
  """Scores of one run at RATES; None where no example is left to score."""
  return [made.predictions.missing_rate(rate, kind).get(key) for rate in RATES]


def curves(table):
  """method -> kind -> seed -> scores at RATES."""
  key = grid.metric_of(table)
  return {
    method: {
      kind: {seed: curve(made, kind, key) for seed, made in by_seed.items()} for kind in KINDS
    }
    for method, by_seed in table.items()
  }


def lines(found):
  """Markdown: a table a data set and kind; the last column is the mean over all rates."""
  yield '# Score against missing rate\n'
  yield (
    'Test score in percent, mean ± standard deviation over seeds; `mean` is over the rates 0, '
    '10, ..., 100 %.\n'
  )
  for data, by_method in found.items():
    for kind, label in KINDS.items():
      yield f'## {data}, {label}\n'
      yield '| method | ' + ' | '.join(f'{100 * rate:.0f} %' for rate in SHOWN) + ' | mean |'
      yield '|---|' + '--:|' * (len(SHOWN) + 1)
      for method, by_kind in by_method.items():
        scores_sr = np.array(list(by_kind[kind].values()), float)
        cells = [grid.runs.spread(scores_sr[:, RATES.index(rate)]) for rate in SHOWN] + [
          grid.runs.spread(scores_sr.mean(axis=1))
        ]
        yield f'| {method} | ' + ' | '.join(cells) + ' |'
      yield ''
    yield f'![score against missing rate](robustness_{data}.png)\n'


def figure(data, by_method, key, path):
  """A panel a kind; colour says the method, a dashed line training at 70 %; the band is the spread
  over seeds.
  """
  fig, axes = plt.subplots(1, len(KINDS), figsize=(13, 4.4), layout='constrained', sharey=True)
  colours = dict(zip(FAMILIES, ('#d55e00', '#e69f00', '#0072b2'), strict=True))
  for ax, (kind, label) in zip(axes, KINDS.items(), strict=True):
    for method, by_kind in by_method.items():
      family, _, rate = method.rpartition(', trained at ')
      scores_sr = 100 * np.array(list(by_kind[kind].values()), float)
      mean_r, spread_r = (
        scores_sr.mean(axis=0),
        scores_sr.std(axis=0, ddof=1) if len(scores_sr) > 1 else np.zeros(len(RATES)),
      )
      style = {
        'color': colours[family],
        'linestyle': '--' if rate == '70 %' else '-',
        'marker': 's' if rate == '70 %' else 'o',
        'markersize': 4,
      }
      ax.plot(100 * np.array(RATES), mean_r, label=method, **style)
      ax.fill_between(
        100 * np.array(RATES),
        mean_r - spread_r,
        mean_r + spread_r,
        color=colours[family],
        alpha=0.12,
        linewidth=0,
      )
    ax.set(title=f'{data}: {label}', xlabel='test rows that lack it, %')
    ax.grid(alpha=0.4)
  axes[0].set_ylabel(f'test {key.replace("f1_", "F1 ")}, %')
  axes[0].legend(fontsize=8)
  fig.savefig(path, dpi=130)
  plt.close(fig)


def main():
  start = time.monotonic()
  made = grid.make(METHODS)
  found = {data: curves(table) for data, table in made.items()}
  for data, table in made.items():
    figure(
      data,
      found[data],
      grid.metric_of(table),
      grid.folder_of('robustness') / f'robustness_{data}.png',
    )
  content = {
    'methods': METHODS,
    'rates': RATES,
    'data': {name: grid.numbers(table) for name, table in made.items()},
    'curves': found,
  }
  grid.publish('robustness', list(lines(found)), content, start)


if __name__ == '__main__':
  grid.start(main)
