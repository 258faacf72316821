"""Score against missing rate, 0 to 100 %, for text, image and both, of models trained at 0 % and at
70 %; with --noise also the score under noise in images and texts.

  python experiments/robustness.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--methods=REGEX] [--set=FIELD=VALUE] [--noise] [...]

The field's protocol: that share of the complete rows lacks a modality for good, drawn by a hash of
(seed, split, id); `both`: half of them text, half image. Trained at 70 %: 70 % of the rows of train
and of validation, type `both`. Test rows do not influence each other, so every rate is put together
from the predictions under the three absences; the towers run once and the head three times.

Noise is added to the test split before the towers (`noise.py`), which read it once for all runs
with these towers: what the store keeps goes by its content.
"""

import time

import grid
import matplotlib
import noise
import numpy as np
from absl import flags

from molt_jax.config import resolved
from molt_jax.config.json_files import read_json
from molt_jax.evaluation import scoring, trained
from molt_jax.features import opening
from molt_jax.runtime import atomic, logbook

matplotlib.use('Agg')
import matplotlib.pyplot as plt

NOISE = flags.DEFINE_bool('noise', False, 'Also scores the runs under noise.')

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


# ---- Noise ---------------------------------------------------------------------------------------


def under_noise(table):
  """method -> 'kind, level' -> seed -> scores on the complete test split."""
  found = {}
  for method, by_seed in table.items():
    found[method] = {}
    for seed, made in by_seed.items():
      for name, scores in _noisy_scores(made).items():
        found[method].setdefault(name, {})[seed] = scores
  return found


def _noisy_scores(made):
  """'kind, level' -> scores of one run; made once, and kept in its folder."""
  path = made.folder / 'noise.json'
  key = resolved.config_hash(trained.open(made.folder).config)
  if path.exists():
    kept = read_json(path, 'delete it, and noise is scored anew')
    if kept['key'] == key:
      return kept['scores']
  run = trained.open(made.folder)
  source, _ = trained.open_split(run, 'test')
  variables, score = run.variables(), scoring.Scorer(run.assembly)
  conditions = scoring.conditions_of(('none',), len(source))
  scores = {}
  for kind, how in noise.KINDS.items():
    for level in noise.LEVELS:
      split = noise.Noisy(source, noise.Noise(level, **how))
      frozen, stored = opening.open_features(
        run.assembly.extraction, {'test': (split, np.asarray(source.present))}
      )
      how_read = {'stored': stored['test'], 'title': f'{kind}, level {level}'}
      found = score(variables, frozen, split, conditions, **how_read)
      scores[f'{kind}, {level}'] = next(iter(found.values()))
  atomic.write(path, logbook.to_json({'key': key, 'scores': scores}) + '\n')
  return scores


def noise_lines(found, made):
  """Markdown: a table a data set; a column a kind and level."""
  yield '# Score under noise\n'
  yield (
    'Test score in percent with noise in half of the images and texts, mean ± standard deviation '
    'over seeds; `experiments/noise.py` says what the levels are.\n'
  )
  for data, by_method in found.items():
    key = grid.metric_of(made[data])
    columns = list(next(iter(by_method.values())))
    yield f'## {data}, noise\n'
    yield '| method | none | ' + ' | '.join(columns) + ' |'
    yield '|---|' + '--:|' * (len(columns) + 1)
    for method, by_noise in by_method.items():
      clean = grid.runs.spread(grid.values(made[data], method, 'none_absent', key))
      cells = []
      for column in columns:
        cells.append(grid.runs.spread([s.get(key) for s in by_noise[column].values()]))
      yield f'| {method} | {clean} | ' + ' | '.join(cells) + ' |'
    yield ''


# ---- The page ------------------------------------------------------------------------------------


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
  page = list(lines(found))
  if NOISE.value:
    noisy = {data: under_noise(table) for data, table in made.items()}
    content['noise'] = noisy
    page += noise_lines(noisy, made)
  grid.publish('robustness', page, content, start)


if __name__ == '__main__':
  grid.start(main)
