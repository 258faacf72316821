"""What CCA losses report and what they achieve, on independent, planted and real pairs. Writes one
figure, one table, one JSON file.

  python experiments/cca_study.py [--parts=report,planted,real] [--steps=2000] [--seeds=0,1,2]
  [--preset=configs/quickstart.py]
    [--out=experiments/results/cca]

Parts that are not asked for are read from the JSON file of an earlier call.

Report: the mean correlation that each loss claims for a batch of independent Gaussian views, as n /
d varies. Achieve, planted: linear encoders [256, 256] of two views that share 8 directions
(population correlations 0.9 ... 0.3, sum 4.8) among 256, trained with Adam on fresh batches of 64
pairs, then measured on 16384 new pairs along canonical directions fitted on 16384 others: those of
the k = 16 dimensions that the loss compares, or of the 16 leading principal components where it
compares all. Learning rates are chosen on seed 100. Achieve, real: the same with linear encoders to
128 dimensions of what the preset's two towers say about its pictures and texts (mean of the last
layer's tokens, standardised), in batches of 32, 128 and 512; directions fitted on the training
pairs, measured on the test pairs. Learning rates are chosen on the validation pairs. Beside it the
closed form: canonical directions of all training pairs, the ridge chosen on the validation pairs.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import runs
from absl import app, flags
from jax import lax

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data.modalities import MODALITIES
from molt_jax.features import opening
from molt_jax.objectives.cca.diagnostics import fit_directions, held_out_correlations
from molt_jax.objectives.cca.estimators import CCAEstimator, make_estimator
from molt_jax.objectives.cca.loss import cca_loss
from molt_jax.runtime import atomic, logbook
from molt_jax.training.assembly import assemble

matplotlib.use('Agg')
import matplotlib.pyplot as plt

PARTS = flags.DEFINE_list('parts', ['report', 'planted', 'real'], 'What to compute.')
STEPS = flags.DEFINE_integer('steps', 2000, 'Updates of each run.')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of data, encoders and projections.')
PRESET = flags.DEFINE_string(
  'preset',
  'configs/quickstart.py',
  'Towers and data set of the real pairs; fills its feature store.',
)
OUT = flags.DEFINE_string('out', 'experiments/results/cca', 'Folder of the results.')

WIDTH, BATCH, NUM_DIRECTIONS, WINDOW, HELD_OUT = 256, 64, 16, 8192, 16384
REAL_WIDTH, REAL_BATCHES, REAL_RIDGES = 128, (32, 128, 512), (1e-3, 1e-2, 0.1, 1.0)
PLANTED = np.linspace(0.9, 0.3, 8).astype(np.float32)
RATES = (1e-3, 3e-3)


class Pairs(NamedTuple):
  """Where pairs come from: sample(key, n) -> x, y [n, d]; `fit` and `measure` are the (x, y) that
  directions are fitted and measured on.
  """

  sample: Callable
  fit: tuple[jax.Array, jax.Array]
  measure: tuple[jax.Array, jax.Array]


# A candidate that is not part of the library.


def eckart_young_estimator(seed):
  """(-2 tr C + tr V V) / k with C the symmetrised cross-covariance and V the mean covariance: no
  inverse, least value -sum rho^2 / k.
  """
  base = make_estimator('moving_average', num_directions=NUM_DIRECTIONS, window=0, seed=seed)

  def loss(state, x_lbd, y_lbd, weight_b):
    del weight_b
    x_bk, y_bk = x_lbd[0] @ state['projection_x_ldk'][0], y_lbd[0] @ state['projection_y_ldk'][0]
    x_bk, y_bk = (v - v.mean(0, keepdims=True) for v in (x_bk, y_bk))
    v_kk = (x_bk.T @ x_bk + y_bk.T @ y_bk) / (2 * len(x_bk))
    value = (jnp.sum(v_kk * v_kk) - 2 * jnp.sum(x_bk * y_bk) / len(x_bk)) / NUM_DIRECTIONS
    return value, state, {'correlation': -value[None]}

  return CCAEstimator(base.init, loss, base.past)


CANDIDATES = {
  'batch': lambda seed: make_estimator('batch'),
  'projection alone': lambda seed: make_estimator(
    'moving_average', num_directions=NUM_DIRECTIONS, window=0, seed=seed
  ),
  'moving average (default)': lambda seed: make_estimator(
    'moving_average', num_directions=NUM_DIRECTIONS, window=WINDOW, seed=seed
  ),
  'moving average over 1024': lambda seed: make_estimator(
    'moving_average', num_directions=NUM_DIRECTIONS, window=1024, seed=seed
  ),
  'Eckart-Young': eckart_young_estimator,
}


# Data.


def planted(correlations, seed):
  """Hidden pairs of the given correlations in 256 dimensions, each view turned by its own
  rotation.
  """
  rng = np.random.default_rng(seed)
  turn_x, turn_y = (
    jnp.asarray(np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0], jnp.float32) for _ in range(2)
  )
  rho_1d = jnp.zeros((1, WIDTH)).at[0, : len(correlations)].set(jnp.asarray(correlations))

  def sample(key, n):
    a_nd, e_nd = jax.random.normal(key, (2, n, WIDTH))
    return a_nd @ turn_x, (rho_1d * a_nd + jnp.sqrt(1 - rho_1d**2) * e_nd) @ turn_y

  return Pairs(sample, *(sample(jax.random.key(10_000 + 2 * seed + i), HELD_OUT) for i in range(2)))


def tower_views(preset):
  """split -> (image [N, d1], text [N, d2]): the mean of the last layer's tokens, standardised by
  the training split.
  """
  config = CLASSIFIER.load(preset)
  assembly = assemble(config)
  splits = assembly.data.splits
  wanted = {split: (source, source.present) for split, source in splits.items()}
  _, stored = opening.open_features(assembly.extraction, wanted)
  views = {}
  for split, source in splits.items():
    complete = [
      row for row in range(len(source)) if all(stored[split][m].keys[row] for m in MODALITIES)
    ]
    views[split] = [
      np.stack([np.asarray(kept.mean(row)[-1], np.float32).mean(0) for row in complete])
      for kept in (stored[split][m] for m in MODALITIES)
    ]
  means, stds = (
    [f(view, axis=0, keepdims=True) for view in views['train']] for f in (np.mean, np.std)
  )
  return {
    split: tuple(jnp.asarray((v - m) / s) for v, m, s in zip(pair, means, stds, strict=True))
    for split, pair in views.items()
  }


def real(views):
  """Rows of the training split in random order, with replacement; measured on the validation pairs
  and on the test pairs.
  """

  def sample(key, n):
    rows = jax.random.randint(key, (n,), 0, len(views['train'][0]))
    return tuple(view[rows] for view in views['train'])

  return tuple(Pairs(sample, views['train'], views[split]) for split in ('validation', 'test'))


# Training, measuring.


measure = jax.jit(lambda fit, measure: held_out_correlations(fit_directions(*fit), *measure))


def held_out_sum(encode, pairs):
  """Sum of held-out correlations of what `encode` makes of both views."""
  return float(jnp.sum(measure(encode(*pairs.fit), encode(*pairs.measure))))


def principal(view_nd):
  return jnp.linalg.svd(view_nd - view_nd.mean(0, keepdims=True), full_matrices=False)[2][
    :NUM_DIRECTIONS
  ].T


@functools.cache
def make_trainer(name, sample, batch, steps):
  """Compiled: (params, the estimator's state, seed, rate) -> (params, state, what the estimator
  reported at each step).
  """
  estimator = CANDIDATES[name](0)  # The seed is in the state.

  def loss(params, state, x_bd, y_bd):
    value, state, aux = estimator.loss(
      state, (x_bd @ params['x'])[None], (y_bd @ params['y'])[None], jnp.ones(batch)
    )
    return value, (state, aux)

  def run(params, state, seed, rate):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, i):
      params, moments, state = carry
      gradients, (state, aux) = jax.grad(loss, has_aux=True)(
        params, state, *sample(jax.random.fold_in(jax.random.key(seed), i), batch)
      )
      updates, moments = optimizer.update(gradients, moments)
      return (optax.apply_updates(params, updates), moments, state), {
        key: value[0] for key, value in aux.items()
      }

    (params, _, state), aux = lax.scan(
      step, (params, optimizer.init(params), state), jnp.arange(steps)
    )
    return params, state, aux

  return jax.jit(run)


def train(name, pairs, rate, seed, steps, *, batch=BATCH, width=WIDTH):
  """Final held-out sum, and the mean correlation the estimator reports over the last tenth of
  training.
  """
  rng = np.random.default_rng([seed, 1])
  params = {
    view: jnp.asarray(rng.normal(size=(v.shape[1], width)) / v.shape[1] ** 0.5, jnp.float32)
    for view, v in zip('xy', pairs.fit, strict=True)
  }
  params, state, aux = make_trainer(name, pairs.sample, batch, steps)(
    params, CANDIDATES[name](seed).init(1, width), seed, rate
  )
  if 'projection_x_ldk' in state:
    x_dk, y_dk = (params[view] @ state[f'projection_{view}_ldk'][0] for view in 'xy')
  else:
    x_dk, y_dk = (
      params[view] @ principal(v_nd[:4096] @ params[view])
      for view, v_nd in zip('xy', pairs.fit, strict=True)
    )
  reported = {key: float(np.mean(value[-max(steps // 10, 1) :])) for key, value in aux.items()}
  return {'held_out_sum': held_out_sum(lambda x, y: (x @ x_dk, y @ y_dk), pairs), **reported}


def train_cca_zoo(pairs, rate, seed, steps, *, batch=BATCH, width=WIDTH):
  """The same with cca-zoo's CCALoss and PyTorch's autodiff: linear encoders to 16 dimensions, same
  data, batches, optimiser and schedule.
  """
  del width
  import torch
  from cca_zoo.deep.objectives import CCALoss

  sample = jax.jit(pairs.sample, static_argnums=1)
  torch.manual_seed(seed)
  encoders = [torch.nn.Linear(v.shape[1], NUM_DIRECTIONS, bias=False) for v in pairs.fit]
  criterion = CCALoss(reg_covar=1e-3)
  optimizer = torch.optim.Adam([p for e in encoders for p in e.parameters()], lr=rate)
  schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
  for i in range(steps):
    views = sample(jax.random.fold_in(jax.random.key(seed), i), batch)
    value = criterion(
      [encode(torch.from_numpy(np.array(v))) for encode, v in zip(encoders, views, strict=True)]
    )
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    schedule.step()
  x_dk, y_dk = (jnp.asarray(e.weight.detach().numpy().T) for e in encoders)
  return {'held_out_sum': held_out_sum(lambda x, y: (x @ x_dk, y @ y_dk), pairs)}


TRAINERS = {name: functools.partial(train, name) for name in CANDIDATES} | {
  'cca-zoo CCALoss': train_cca_zoo
}


def achieve(seeds, steps):
  """Planted pairs. For each candidate: the rate chosen on seed 100, and what it reaches on every
  seed.
  """
  results = {}
  for name, trainer in TRAINERS.items():
    start = time.perf_counter()
    tried = {
      rate: trainer(planted(PLANTED, 100), rate, 100, steps)['held_out_sum'] for rate in RATES
    }
    rate = max(tried, key=tried.get)
    results[name] = {
      'rate': rate,
      'selection': tried,
      'planted': [trainer(planted(PLANTED, seed), rate, seed, steps) for seed in seeds],
    }
    if name in ('batch', 'projection alone', 'moving average (default)'):
      results[name]['independent'] = [
        trainer(planted(PLANTED[:0], seed), rate, seed, steps) for seed in seeds
      ]
    sums = [run['held_out_sum'] for run in results[name]['planted']]
    print(
      (
        f'{name}: rate {rate}, held-out sum {np.mean(sums):.3f} of {PLANTED.sum():.2f}, '
        f'{time.perf_counter() - start:.0f} s'
      ),
      flush=True,
    )
  return results


def achieve_on_real(views, seeds, steps):
  """Real pairs: {'closed form': ..., 'batch n': {candidate: {'rate', 'selection', 'runs'}}}."""
  validation, test = real(views)
  results = {'closed form': closed_form(validation, test)}
  for batch in REAL_BATCHES:
    results[f'batch {batch}'] = {}
    for name, trainer in TRAINERS.items():
      options = {'batch': batch, 'width': REAL_WIDTH}
      tried = {
        rate: trainer(validation, rate, 100, steps, **options)['held_out_sum'] for rate in RATES
      }
      rate = max(tried, key=tried.get)
      made = [trainer(test, rate, seed, steps, **options) for seed in seeds]
      results[f'batch {batch}'][name] = {'rate': rate, 'selection': tried, 'runs': made}
      print(
        (
          f'real, batch {batch}, {name}: held-out sum '
          f'{np.mean([run["held_out_sum"] for run in made]):.3f}'
        ),
        flush=True,
      )
  return results


def closed_form(validation, test):
  """The 16 leading canonical directions of all training pairs, the ridge chosen on the validation
  pairs.
  """

  def measured(pairs, ridge):
    rho_k = held_out_correlations(fit_directions(*pairs.fit, ridge=ridge), *pairs.measure)
    return float(jnp.sum(rho_k[:NUM_DIRECTIONS]))

  tried = {ridge: measured(validation, ridge) for ridge in REAL_RIDGES}
  ridge = max(tried, key=tried.get)
  return {'ridge': ridge, 'selection': tried, 'held_out_sum': measured(test, ridge)}


def report(ratios=(0.25, 0.5, 1, 2, 4, 16, 64), d=64):
  """Mean correlation that batch losses claim for independent views. cca-zoo's CCALoss is read as
  the mean rho^2 it maximises.
  """
  import torch
  from cca_zoo.deep.objectives import CCALoss

  rows = []
  for ratio in ratios:
    n = int(ratio * d)
    rng = np.random.default_rng(n)
    x_nd, y_nd = (rng.normal(size=(n, d)).astype(np.float32) for _ in range(2))
    zoo = float(CCALoss(reg_covar=1e-3)([torch.from_numpy(x_nd), torch.from_numpy(y_nd)]))
    rows.append(
      {
        'n/d': ratio,
        'ours, batch': -float(cca_loss(x_nd, y_nd)),
        'cca-zoo CCALoss': -zoo / min(n - 1, d),
      }
    )
  return rows


# Output.


def planted_lines(part):
  """Markdown: a row a loss."""
  yield (
    f'Linear encoders, 8 planted directions in {WIDTH} (population sum {PLANTED.sum():.2f}), batch '
    f'{BATCH}, {part["steps"]} steps, '
    f'{len(part["seeds"])} seeds. Learning rate chosen on another seed among '
    f'{", ".join(map(str, RATES))}. `{part["command"]}`'
  )
  yield ''
  yield (
    '| loss | rate | held-out sum of correlations (mean, least, most) | share of population | '
    'mean correlation reported on independent views |'
  )
  yield '|---|---|---|---|---|'
  for name, result in part['results'].items():
    sums = [run['held_out_sum'] for run in result['planted']]
    claimed = [run['correlation'] for run in result.get('independent', [])]
    claim = f'{np.mean(claimed):.3f}' if claimed else ''
    yield (
      f'| {name} | {result["rate"]} | {_range(sums)} | {np.mean(sums) / PLANTED.sum():.1%} | '
      f'{claim} |'
    )
  yield ''
  yield (
    'Not in the library, because they did not win: Eckart-Young, and a memory of the last 8192 '
    'pairs. The projection alone is a window of 0.'
  )
  yield ''


def _range(values):
  return f'{np.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})'


def real_lines(part):
  """Markdown: a row a loss, a column a batch size."""
  closed, batches = (
    part['results']['closed form'],
    [name for name in part['results'] if name != 'closed form'],
  )
  yield (
    f'Real pairs, encoders to {REAL_WIDTH} dimensions, {part["steps"]} steps, {len(part["seeds"])} '
    f'seeds: held-out sum of {NUM_DIRECTIONS} '
    'correlations on the test pairs (mean, least, most) and, in brackets, the mean correlation '
    'that the loss reports at the end of training. '
    f'Canonical directions of all training pairs in closed form (ridge {closed["ridge"]:g}): '
    f'{closed["held_out_sum"]:.3f}. `{part["command"]}`'
  )
  yield ''
  yield (
    '| loss | '
    + ' | '.join(f'{name}, n/d {int(name.split()[1]) / REAL_WIDTH:g}' for name in batches)
    + ' |'
  )
  yield '|---|' + '---|' * len(batches)
  for name in TRAINERS:
    cells = []
    for batch in batches:
      made = part['results'][batch][name]['runs']
      claimed = [
        run['correlation'] for run in made if 'correlation' in run and name != 'Eckart-Young'
      ]
      cells.append(
        _range([run['held_out_sum'] for run in made])
        + (f' [{np.mean(claimed):.3f}]' if claimed else '')
      )
    yield f'| {name} | ' + ' | '.join(cells) + ' |'
  yield ''


def draw_report(axes, rows):
  for name, style in (('ours, batch', 'o-'), ('cca-zoo CCALoss', 's--')):
    axes.plot([row['n/d'] for row in rows], [row[name] for row in rows], style, label=name)
  axes.set(
    xscale='log',
    xlabel='rows / width',
    ylabel='mean correlation reported',
    title='Independent views (truth: 0)',
    ylim=(0, 1.05),
  )
  axes.legend(fontsize='small', loc='upper right')


def draw_planted(axes, results):
  for height, (name, result) in enumerate(reversed(results.items())):
    sums = [run['held_out_sum'] for run in result['planted']]
    axes.barh(height, np.mean(sums), color='tab:green' if 'default' in name else 'tab:gray')
    axes.plot(sums, [height] * len(sums), 'k.')
  axes.axvline(PLANTED.sum(), color='k', linestyle=':')
  axes.set(
    yticks=range(len(results)),
    yticklabels=list(reversed(results)),
    xlabel='held-out sum of correlations (dotted: population)',
    title='Planted views, same budget',
  )


def draw_real(axes, results):
  for name in TRAINERS:
    means = [
      np.mean([run['held_out_sum'] for run in results[f'batch {batch}'][name]['runs']])
      for batch in REAL_BATCHES
    ]
    axes.plot([batch / REAL_WIDTH for batch in REAL_BATCHES], means, 'o-', label=name)
  axes.axhline(
    results['closed form']['held_out_sum'],
    color='k',
    linestyle=':',
    label='closed form, all training pairs',
  )
  axes.set(
    xlabel='rows / width',
    ylabel='held-out sum of correlations',
    title='Real pairs, test split',
    ylim=(0, None),
  )
  axes.legend(fontsize='small')


COMPUTE = {
  'report': lambda seeds, steps: report(),
  'planted': achieve,
  'real': lambda seeds, steps: achieve_on_real(tower_views(PRESET.value), seeds, steps),
}
DRAW = {'report': draw_report, 'planted': draw_planted, 'real': draw_real}
LINES = {'planted': planted_lines, 'real': real_lines}


def main(argv):
  if len(argv) > 1 or not set(PARTS.value) <= set(COMPUTE):
    raise app.UsageError(
      f'Unknown arguments {argv[1:]} or --parts {PARTS.value}: parts are {", ".join(COMPUTE)}'
    )
  seeds, out = [int(seed) for seed in SEEDS.value], pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'cca_study.json'
  parts = json.loads(path.read_text()) if path.exists() else {}
  for name in PARTS.value:
    results = COMPUTE[name](seeds, STEPS.value)
    parts[name] = runs.provenance() | {
      'seeds': seeds,
      'selection_seed': 100,
      'steps': STEPS.value,
      'results': results,
    }
    atomic.write(path, logbook.to_json(parts, indent=1) + '\n')
  atomic.write(
    out / 'cca_study.md',
    '\n'.join(
      line for name, lines in LINES.items() if name in parts for line in lines(parts[name])
    ),
  )
  figure, axes = plt.subplots(1, len(DRAW), figsize=(16, 4), layout='constrained')
  for one, name in zip(axes, DRAW, strict=True):
    if name in parts:
      DRAW[name](one, parts[name]['results'])
  figure.savefig(out / 'cca_study.png', dpi=150)


if __name__ == '__main__':
  app.run(main)
