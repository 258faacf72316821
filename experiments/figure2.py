"""The paper's Figure 2: examples on which, with a modality absent, the baseline fails and MoLT does
not; and the reverse; and how many of each.

  python experiments/figure2.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--set=FIELD=VALUE] [...]

The pictures are of the first seed, the counts of every seed. Which examples are shown is drawn by a
hash of their ids among all cases of a kind: they are not picked. The probabilities are those of the
label and of what each model answers.
"""

import math
import time
import warnings

import grid
import matplotlib
import numpy as np

from molt_jax.data import datasets, missing, transforms
from molt_jax.data.modalities import LABELS
from molt_jax.runtime import terminal

matplotlib.use('Agg')
import matplotlib.pyplot as plt

BASELINE, TRAINED, OURS = 'late_fusion', 'late_fusion, trained for absence', 'MoLT, default'
METHODS = {
  BASELINE: grid.BASELINE,
  TRAINED: grid.DEFAULT | {'method': 'late_fusion'},
  OURS: grid.DEFAULT,
}
ABSENT = ('text_absent', 'image_absent')
SHOWN = 4  # Of each kind and absence.
RED, GREEN = '#d55e00', '#009e73'


def split_cases(ours, theirs, condition):
  """Rows by outcome: {'ours only', 'theirs only', 'both', 'neither'} -> positions."""
  c = ours.conditions.index(condition)
  if list(ours.ids) != list(theirs.ids):
    raise ValueError('the runs were scored on different examples')
  counted_n, right_n, other_n = ours.counted_cn[c], ours.right_cn[c], theirs.right_cn[c]
  rows = {
    'ours only': right_n & ~other_n,
    'theirs only': ~right_n & other_n,
    'both': right_n & other_n,
    'neither': ~right_n & ~other_n,
  }
  return {name: np.flatnonzero(rows_n & counted_n) for name, rows_n in rows.items()}


def sign_test(wins, losses):
  """Two-sided exact p-value that a win is as likely as a loss (McNemar's test)."""
  n = wins + losses
  tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
  return min(1.0, 2 * tail / 2**n)


def counts(table):
  """condition -> baseline -> seed -> counts and the sign test."""
  found = {}
  for condition in LABELS:
    found[condition] = {}
    for baseline in (r for r in (BASELINE, TRAINED) if r in table):
      by_seed = {}
      for seed in sorted(set(table[OURS]) & set(table[baseline])):
        rows = split_cases(
          table[OURS][seed].predictions, table[baseline][seed].predictions, condition
        )
        numbers = {name: len(cases) for name, cases in rows.items()}
        tested = {'p': sign_test(numbers['ours only'], numbers['theirs only'])}
        by_seed[seed] = numbers | (tested if any(numbers.values()) else {})
      found[condition][baseline] = by_seed
  return found


def lines(found):
  """Markdown: the counts, then the pictures."""
  yield '# Figure 2: where MoLT is right and the baseline is not, and the reverse\n'
  yield (
    'Test examples by outcome, mean over seeds; p: two-sided exact sign test over the examples on '
    'which exactly one is right, the largest over '
    f'seeds. MoLT is `{OURS}`. `{BASELINE}` is the baseline of the paper, trained on complete '
    'examples alone; the other baseline is trained for '
    'absence in the same way as MoLT.\n'
  )
  for data, by_condition in found.items():
    seeds = [seeds for against in by_condition.values() for seeds in against.values()]
    yield f'## {data}, {max(map(len, seeds))} seed(s)\n'
    yield (
      '| inference | baseline | MoLT alone right | baseline alone right | both right | both wrong '
      '| p |'
    )
    yield '|---|---|--:|--:|--:|--:|--:|'
    for condition, by_baseline in by_condition.items():
      for baseline, by_seed in by_baseline.items():
        means = [
          f'{np.mean([numbers[name] for numbers in by_seed.values()]):.0f}'
          for name in ('ours only', 'theirs only', 'both', 'neither')
        ]
        found = [numbers['p'] for numbers in by_seed.values() if 'p' in numbers]
        p = f'{max(found):.2g}' if found else '-'
        yield f'| {LABELS[condition]} | {baseline} | ' + ' | '.join(means) + f' | {p} |'
    yield f'\n![examples on which one of the two is right](figure2_{data}.png)\n'
  yield (
    f'Left: `{BASELINE}` is wrong and `{OURS}` right; right: the reverse. Drawn by a hash of the '
    'id among all such cases. What is greyed was '
    'there and was not fed.'
  )


def choose(predictions, rows):
  """SHOWN of these rows, by a hash of their ids."""
  order = missing.hash_order([predictions.ids[row] for row in rows], seed=0, name='figure2')
  return [int(rows[n]) for n in order[:SHOWN]]


def figure(table, source, path):
  """A line of cases an absence and draw; on the left MoLT alone is right, on the right the
  baseline.
  """
  seed = min(set(table[OURS]) & set(table[BASELINE]))
  ours, theirs = (table[method][seed].predictions for method in (OURS, BASELINE))
  position = {example_id: n for n, example_id in enumerate(source.ids)}
  fig, axes = plt.subplots(
    len(ABSENT) * SHOWN,
    4,
    figsize=(13, 1.5 * len(ABSENT) * SHOWN),
    layout='constrained',
    width_ratios=(1, 3, 1, 3),
  )
  shown = {}
  for block, condition in enumerate(ABSENT):
    rows = split_cases(ours, theirs, condition)
    for side, name in enumerate(('ours only', 'theirs only')):
      chosen = choose(ours, rows[name])
      shown[f'{condition}, {name}'] = [ours.ids[row] for row in chosen]
      for n in range(SHOWN):
        picture, words = axes[block * SHOWN + n, 2 * side : 2 * side + 2]
        picture.axis('off')
        words.axis('off')
        if n < len(chosen):
          example = source[position[ours.ids[chosen[n]]]]
          draw_image(picture, example, absent=condition == 'image_absent')
          draw_words(words, example, chosen[n], condition, ours, theirs)
      winner = ('MoLT right, baseline wrong', 'baseline right, MoLT wrong')[side]
      axes[block * SHOWN, 2 * side + 1].set_title(
        (f'{LABELS[condition]}: {winner} ({len(rows[name])} of {int(ours.counted_cn[0].sum())})'),
        fontsize=10,
        loc='left',
      )
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Glyph .* missing from font')
    fig.savefig(path, dpi=110)
  plt.close(fig)
  return {'seed': seed, **shown}


def draw_image(ax, example, *, absent):
  if example['image'] is None:
    ax.text(0.5, 0.5, 'no image', ha='center', va='center')
    return
  pixels = np.asarray(transforms.decode(example['image'])) / 255
  ax.imshow(
    0.75 + 0.25 * pixels.mean(axis=-1, keepdims=True).repeat(3, axis=-1) if absent else pixels
  )
  if absent:
    ax.plot([0, 1], [0, 1], transform=ax.transAxes, color=RED)


def draw_words(ax, example, row, condition, ours, theirs):
  """The text, the label and both answers with their probabilities."""
  text = _short(' '.join((example['text'] or 'no text').split()), 46)
  absent = condition == 'text_absent'
  ax.text(
    0,
    0.86,
    f'(not fed: {text})' if absent else text,
    fontsize=9,
    color='0.55' if absent else 'black',
    transform=ax.transAxes,
  )
  c = ours.conditions.index(condition)
  truth = _names(ours, ours.label[row])
  ax.text(0, 0.6, f'label: {truth}', fontsize=9, weight='bold', transform=ax.transAxes)
  for line, (who, p) in enumerate((('MoLT', ours), ('baseline', theirs))):
    answer, right = _names(p, p.predicted[c, row]), bool(p.right_cn[c, row])
    own = _probability(p, c, row, p.predicted[c, row])
    note = '' if right else f' (label: {_probability(p, c, row, p.label[row])})'
    ax.text(
      0,
      0.34 - 0.26 * line,
      f'{"✓" if right else "✗"} {who}: {answer}, {own}{note}',
      fontsize=9,
      color=GREEN if right else RED,
      transform=ax.transAxes,
    )


def _names(predictions, label):
  chosen = np.flatnonzero(label) if predictions.multi_label else [int(label)]
  return _short(', '.join(predictions.class_names[k] for k in chosen) or 'none', 40)


def _short(text, most):
  return terminal.clean(text, most)


def _probability(predictions, c, row, label):
  chosen = np.flatnonzero(label) if predictions.multi_label else [int(label)]
  return ', '.join(f'{predictions.probability_cnk[c, row, k]:.2f}' for k in chosen)


def main():
  start = time.monotonic()
  made = grid.make(METHODS)
  found, shown = {}, {}
  for data in grid.DATA.value:
    name = grid.name_of(data)
    if not {OURS, BASELINE} <= set(made[name]):
      raise grid.UserError(
        f'--methods: the figure needs {BASELINE!r} and {OURS!r}; one of them is neither finished '
        f'nor asked for on {name}'
      )
    source = datasets.load_dataset(grid.make_config(data, {}, grid.seeds()[0])).splits['test']
    found[name] = counts(made[name])
    shown[name] = figure(made[name], source, grid.folder_of('figure2') / f'figure2_{name}.png')
  content = {
    'methods': METHODS,
    'counts': found,
    'shown': shown,
    'data': {name: grid.numbers(table) for name, table in made.items()},
  }
  grid.publish('figure2', list(lines(found)), content, start)


if __name__ == '__main__':
  grid.start(main)
