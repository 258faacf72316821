"""What perfect alignment costs: theorem 3.1 of Jiang et al. (CVPR 2023) on data whose information
is known. Writes a figure, a table, a JSON file.

  python experiments/information_gap.py [--steps=2000] [--seeds=0,1,2]
  [--out=experiments/results/information_gap]

The label Y is four fair bits. An image shows some of them, a text others, each beside a coin of its
own that says nothing; so I(X_V;Y), I(X_T;Y) and the gap Delta = |I(X_V;Y) - I(X_T;Y)| are whole
bits. The theorem: if Z_V = Z_T always, the best cross-entropy from (Z_V, Z_T) is at least Delta
above the best from (X_V, X_T). Exactly: features that always agree are functions of the common part
of X_V and X_T (Gacs and Koerner 1973), and H(Y | common part) is summed up. Measured: two encoders
and a classifier are trained to predict Y and, with growing weight, to align, and scored on new
draws. Features lie on the unit sphere and are read with a little noise, so that no classifier can
enlarge a vanishing difference.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import runs
from absl import app, flags
from jax import lax
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from molt_jax.runtime import atomic, logbook

matplotlib.use('Agg')
import matplotlib.pyplot as plt

NUM_BITS, WIDTH, HIDDEN, NOISE = 4, 8, 64, 0.1
# Name -> the bits of Y that the image and the text show.
CASES = {
  'both show 4 bits': ((0, 1, 2, 3), (0, 1, 2, 3)),
  'the text shows 3 of 4': ((0, 1, 2, 3), (0, 1, 2)),
  'the text shows 2 of 4': ((0, 1, 2, 3), (0, 1)),
  'the text shows 1 of 4': ((0, 1, 2, 3), (0,)),
  'the text shows none': ((0, 1, 2, 3), ()),
  'each shows 3, 2 in common': ((0, 1, 2), (1, 2, 3)),
}
ALIGNMENT_WEIGHTS = (0.0, 0.3, 3.0, 10.0, 20.0, 30.0, 45.0, 60.0, 300.0)


# Exactly.


def codes(bits):
  """What an input shows for each of the 16 labels, [16]."""
  label_y = np.arange(2**NUM_BITS)
  return sum((((label_y >> bit) & 1) << i for i, bit in enumerate(bits)), np.zeros_like(label_y))


def joint(image_bits, text_bits):
  """p(x_v, x_t, y), [32, 32, 16]: x is twice the code plus the coin."""
  p_vty = np.zeros((2 ** (NUM_BITS + 1), 2 ** (NUM_BITS + 1), 2**NUM_BITS))
  for y, (v, t) in enumerate(zip(codes(image_bits), codes(text_bits), strict=True)):
    p_vty[2 * v : 2 * v + 2, 2 * t : 2 * t + 2, y] = 1 / (4 * 2**NUM_BITS)
  return p_vty


def conditional_entropy(p_xy):
  """H(Y | X) in nats."""
  p_x1 = p_xy.sum(axis=1, keepdims=True)
  ratio_xy = np.divide(p_xy, p_x1, out=np.ones_like(p_xy), where=p_xy > 0)
  return float(-np.sum(p_xy * np.log(ratio_xy)))


def common_part(p_vt):
  """For each x_v the number of its part: x_v and x_t are of one part if they can occur together, or
  are joined by a chain of such pairs.
  """
  v, t = np.nonzero(p_vt)
  size = sum(p_vt.shape)
  return connected_components(
    coo_array((np.ones(len(v)), (v, len(p_vt) + t)), shape=(size, size)), directed=False
  )[1][: len(p_vt)]


def exact(p_vty):
  """Information and losses in nats: 'image', 'text', 'gap', and 'aligned', the least excess
  cross-entropy of features that always agree.
  """
  entropy = conditional_entropy(p_vty.sum(axis=(0, 1))[None])
  image, text = (entropy - conditional_entropy(p_vty.sum(axis=axis)) for axis in (1, 0))
  part_v = common_part(p_vty.sum(axis=2))
  p_zy = np.zeros((part_v.max() + 1, p_vty.shape[2]))
  np.add.at(p_zy, part_v, p_vty.sum(axis=1))
  least = conditional_entropy(p_vty.reshape(-1, p_vty.shape[2]))
  return {
    'image': image,
    'text': text,
    'gap': abs(image - text),
    'aligned': conditional_entropy(p_zy) - least,
    'least': least,
  }


# Measured.


def losses(params, key, code_2y, draws):
  """(cross-entropy of Y, mean squared distance of the features): each label with each pair of
  coins, `draws` times with fresh noise.
  """
  y_b, coin_v_b, coin_t_b = (
    x.ravel() for x in jnp.meshgrid(jnp.arange(2**NUM_BITS), *[jnp.arange(2)] * 2, indexing='ij')
  )
  z = []
  for name, code_y, coin_b in (('image', code_2y[0], coin_v_b), ('text', code_2y[1], coin_t_b)):
    z_bc = jax.nn.one_hot(2 * code_y[y_b] + coin_b, 2 ** (NUM_BITS + 1)) @ params[name]
    z.append(z_bc / jnp.linalg.norm(z_bc, axis=1, keepdims=True))
  distance = jnp.mean(jnp.sum((z[0] - z[1]) ** 2, axis=1))
  clean_bc = jnp.tile(jnp.concatenate(z, axis=1), (draws, 1))
  read_bc = clean_bc + NOISE * jax.random.normal(key, clean_bc.shape)
  hidden_bh = jax.nn.relu(read_bc @ params['hidden'] + params['hidden_bias'][None])
  logits_by = hidden_bh @ params['output'] + params['output_bias'][None]
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits_by, jnp.tile(y_b, draws))
  ), distance


def initial(key):
  shapes = {
    'image': (2 ** (NUM_BITS + 1), WIDTH),
    'text': (2 ** (NUM_BITS + 1), WIDTH),
    'hidden': (2 * WIDTH, HIDDEN),
    'hidden_bias': (HIDDEN,),
    'output': (HIDDEN, 2**NUM_BITS),
    'output_bias': (2**NUM_BITS,),
  }
  scale = {
    'hidden': (2 * WIDTH) ** -0.5,
    'output': HIDDEN**-0.5,
    'hidden_bias': 0.0,
    'output_bias': 0.0,
  }
  return {
    name: scale.get(name, 1.0) * jax.random.normal(jax.random.fold_in(key, i), shape)
    for i, (name, shape) in enumerate(shapes.items())
  }


@functools.partial(jax.jit, static_argnames='steps')
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
def measure(code_2y, weight, seed, steps):
  """Trains with this weight of alignment; returns (cross-entropy, distance) on new samples,
  float32.
  """
  key = jax.random.key(seed)
  params = initial(key)
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

  def objective(params, key):
    cross_entropy, distance = losses(params, key, code_2y, 2)
    return cross_entropy + weight * distance

  def step(carry, i):
    params, moments = carry
    updates, moments = optimizer.update(
      jax.grad(objective)(params, jax.random.fold_in(key, i)), moments
    )
    return (optax.apply_updates(params, updates), moments), None

  (params, _), _ = lax.scan(step, (params, optimizer.init(params)), 1000 + jnp.arange(steps))
  return losses(params, jax.random.fold_in(key, 1), code_2y, 128)


def measure_all(cases, weights, seeds, steps):
  """(excess cross-entropy, distance), each [cases, weights, seeds]."""
  grid = [(name, weight, seed) for name in cases for weight in weights for seed in seeds]
  code_n2y = jnp.asarray([[codes(bits) for bits in CASES[name]] for name, _, _ in grid])
  cross_entropy, distance = measure(
    code_n2y, jnp.asarray([w for _, w, _ in grid]), jnp.asarray([s for _, _, s in grid]), steps
  )
  least = np.asarray([exact(joint(*CASES[name]))['least'] for name in cases])
  shape = (len(cases), len(weights), len(seeds))
  return np.asarray(cross_entropy, np.float64).reshape(shape) - least[:, None, None], np.asarray(
    distance, np.float64
  ).reshape(shape)


# Results.


def plot(cases, excess, distance, path):
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  for i, name in enumerate(cases):
    truth, mean_w, reach_w = (
      exact(joint(*CASES[name])),
      excess[i].mean(axis=1) / np.log(2),
      excess[i].std(axis=1) / np.log(2),
    )
    line = left.errorbar(
      np.maximum(distance[i].mean(axis=1), 1e-6),
      mean_w,
      reach_w,
      marker='o',
      markersize=3,
      label=name,
    )
    left.axhline(truth['gap'] / np.log(2), color=line[0].get_color(), linestyle=':', linewidth=1)
    right.errorbar(
      truth['gap'] / np.log(2),
      mean_w[-1],
      reach_w[-1],
      marker='o',
      color=line[0].get_color(),
      capsize=3,
    )
  left.set(
    xscale='log',
    xlabel='distance of the features, mean ||Z_V - Z_T||^2, at least 1e-6',
    ylabel='excess cross-entropy, bits',
    title='Aligning costs information (dotted: the gap)',
  )
  left.invert_xaxis()
  left.legend(fontsize=7)
  right.plot(
    [0, NUM_BITS], [0, NUM_BITS], color='grey', linestyle=':', linewidth=1, label='the bound'
  )
  right.set(
    xlabel='gap |I(X_V;Y) - I(X_T;Y)|, bits',
    ylabel='excess at the strongest alignment, bits',
    title='What is lost against the bound',
  )
  right.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def main(argv):
  del argv
  start, out = time.monotonic(), pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  cases, seeds = list(CASES), [int(seed) for seed in SEEDS.value]
  excess, distance = measure_all(cases, ALIGNMENT_WEIGHTS, seeds, STEPS.value)
  truths = {
    name: {key: value / np.log(2) for key, value in exact(joint(*CASES[name])).items()}
    for name in cases
  }
  rows = [
    (
      '| image and text | I(X_V;Y) | I(X_T;Y) | gap | lost when aligned, exact | measured, '
      'aligned | distance | measured, free |'
    ),
    '|---|---|---|---|---|---|---|---|',
  ]
  for i, (name, truth) in enumerate(truths.items()):
    aligned, free = (runs.spread(excess[i, w], scale=1 / np.log(2), digits=3) for w in (-1, 0))
    rows.append(
      f'| {name} | {truth["image"]:.0f} | {truth["text"]:.0f} | {truth["gap"]:.0f} | '
      f'{truth["aligned"]:.0f} | {aligned} | '
      f'{distance[i, -1].mean():.1e} | {free} |'
    )
  about = runs.provenance() | {
    'seeds': seeds,
    'steps': STEPS.value,
    'seconds': round(time.monotonic() - start, 1),
  }
  record = about | {
    'alignment_weights': ALIGNMENT_WEIGHTS,
    'exact_bits': truths,
    'excess_nats': excess.tolist(),
    'distance': distance.tolist(),
  }
  atomic.write(out / 'information_gap.json', logbook.to_json(record, indent=1) + '\n')
  (out / 'information_gap.md').write_text(
    '# What perfect alignment costs, in bits\n\nMean ± sample standard deviation over seeds; '
    'aligned: weight '
    f'{ALIGNMENT_WEIGHTS[-1]:g} of the alignment, free: weight 0. The bound of the theorem is the '
    'gap.\n\n'
    + '\n'.join(rows)
    + f'\n\n`{about["command"]}`, {about["seconds"]} s, {about["versions"]}\n',
    encoding='utf-8',
  )
  plot(cases, excess, distance, out / 'information_gap.png')
  print('\n'.join(rows))


if __name__ == '__main__':
  STEPS = flags.DEFINE_integer('steps', 2000, 'Updates of each run.')
  SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of parameters and samples.')
  OUT = flags.DEFINE_string('out', 'experiments/results/information_gap', 'Folder of the results.')
  app.run(main)
