"""CLIP against its latent-structure regularisers, small: tables 1 and 3 of Jiang et al. (CVPR 2023)
on pictures that a CPU can train on.

  python experiments/latent_structure.py [--seeds=0,1,2] [--shifted=FOLDER]
  [--preset=configs/pretrain_openmoji.py] [--override=FIELD=VALUE ...]

Each variant pretrains the preset's towers with its own objectives, each seed with the same start
and the same data order for all variants. Scored on validation and test: zero-shot classification,
retrieval, linear probes on the frozen image tower. `--shifted` is a data set in the own-data layout
that no tower was trained on; its probes are fitted on its own training split. The text tower is
frozen and its input not augmented, so there is no t2t, and the independent text features take part
in deep feature separation without a contrastive term.

Everything is kept in --workdir: what is finished is read, not repeated, and a run that was cut off
goes on where it stopped.
"""

import contextlib
import json
import pathlib
import time

import matplotlib
import numpy as np
import runs
from absl import app, flags, logging

from molt_jax import evaluate_pair, pretrain
from molt_jax.config.pretraining import PRETRAINING
from molt_jax.pairs import in_use, scoring
from molt_jax.pairs.probes import linear_probe
from molt_jax.runtime import atomic, logbook, terminal

matplotlib.use('Agg')
import matplotlib.pyplot as plt

matplotlib.rcParams['text.parse_math'] = False  # A $ in a name is a dollar.

SEEDS = flags.DEFINE_list(
  'seeds', ['0', '1', '2'], 'Seeds of weights, data order and augmentation.'
)
VARIANTS = flags.DEFINE_list('variants', [], 'Variants to run; empty: all.')
PRESET = flags.DEFINE_string('preset', 'configs/pretrain_openmoji.py', 'What all variants share.')
OVERRIDE = flags.DEFINE_multi_string('override', [], 'FIELD=VALUE of the preset; repeatable.')
SHIFTED = flags.DEFINE_string(
  'shifted', '', 'Folder of another data set (train.csv, test.csv, images).'
)
WORKDIR = flags.DEFINE_string('workdir', 'runs/latent_structure', 'Folder of the runs.')
OUT = flags.DEFINE_string('out', 'experiments/results/latent_structure', 'Folder of the results.')

# L_Con: the two directions of CLIP and the two views of the image. The paper leaves the weights of
# the regularisers open; geometric consistency has that of CyCLIP (Goel et al. 2022), the others are
# such that no term outweighs the contrastive ones at the start.
CLIP = {'v2t': 0.5, 't2v': 0.5}
CON = {**CLIP, 'v2v': 0.5}
SEP = {'orthogonality': 1.0, 'contrastive_separation': 0.5, 'uniformity': 0.1}
BR = {'brownian_bridge': 1.0}
GC = {'geometric_original': 0.25, 'geometric_augmented': 0.25}
OBJECTIVES = {
  'CLIP': CLIP,
  'Con': CON,
  '+Sep': {**CON, **SEP},
  '+Br': {**CON, **BR},
  '+GC': {**CON, **GC},
  '+all': {**CON, **SEP, **BR, **GC},
}
# Column -> path in the results of one split.
COLUMNS = {
  'zero-shot top-1': ('zero_shot', 'top1'),
  'top-3': ('zero_shot', 'top3'),
  'top-5': ('zero_shot', 'top5'),
  'image to text R@1': ('image_to_text', 'R@1'),
  'image to text R@10': ('image_to_text', 'R@10'),
  'text to image R@1': ('text_to_image', 'R@1'),
  'text to image R@10': ('text_to_image', 'R@10'),
  'probe, tower': ('linear_probe', 'tower', 'accuracy'),
  'probe, embedding': ('linear_probe', 'embedding', 'accuracy'),
}
SHAPE = ('modality_gap', 'alignment', 'uniformity_image', 'uniformity_text')
SPLITS = ('validation', 'test')


# Runs.


def make_config(objectives, seed):
  """The preset with these objectives alone."""
  overrides = dict(item.split('=', 1) for item in OVERRIDE.value)
  weights = {
    f'objective.{name}': str(float(objectives.get(name, 0)))
    for name in PRETRAINING.fields['objective']
  }
  return PRETRAINING.load(PRESET.value, {**overrides, **weights, 'seed': str(seed)})


class PooledOnce:
  """A pair whose frozen text tower reads each text once for all runs."""

  def __init__(self, pair, pooled):
    self.pair, self.pooled = pair, pooled
    self.model, self.image_features, self.embed_images = (
      pair.model,
      pair.image_features,
      pair.embed_images,
    )

  def embed_texts(self, texts):
    p, new = self.pair, sorted(set(texts) - set(self.pooled))
    if new:
      self.pooled |= dict(
        zip(
          new,
          in_use.pool_texts(
            p.model, p.variables, p.preprocess, new, batch_size=p.batch_size, mesh=p.mesh
          ),
          strict=True,
        )
      )
    return p.embed_pooled_texts(np.stack([self.pooled[text] for text in texts]))


def run(variant, seed, data, pooled):
  """Pretrains and scores one variant unless that is done; returns {'seconds': .., data set: {split:
  scores}}.
  """
  config = make_config(OBJECTIVES[variant], seed)
  folder = pathlib.Path(WORKDIR.value) / f'{variant.strip("+").lower()}_{seed}'
  path, key = (
    folder / 'result.json',
    {'config': config.to_dict(), 'data': [name for name, *_ in data]},
  )
  if path.exists() and (result := json.loads(path.read_text(encoding='utf-8')))['key'] == key:
    return result
  folder.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  with (
    (folder / 'log.txt').open('a', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    pretrain.pretrain(config, folder)
    middle = time.monotonic()
    pair = pretrain.load_pair(folder)
    pair = PooledOnce(pair, pooled) if config.backbones.text.freeze else pair
    scores = {
      name: scoring.evaluate_examples(
        pair, examples, class_names, splits=SPLITS, probes=('tower', 'embedding')
      )
      for name, examples, class_names in data
    }
  result = {
    'key': key,
    'scores': scores,
    'seconds': {
      'training': round(middle - start, 1),
      'scoring': round(time.monotonic() - middle, 1),
    },
  }
  atomic.write(path, logbook.to_json(result) + '\n')
  return result


def open_data():
  """[(name, examples by split, class names)]: the preset's data set and the shifted one."""
  config = make_config(CLIP, 0)
  datasets = [
    evaluate_pair.open_dataset(config, table)
    for table in ('', SHIFTED.value)[: 1 + bool(SHIFTED.value)]
  ]
  return [
    (dataset.name, scoring.read_dataset(dataset), dataset.class_names) for dataset in datasets
  ]


def without_tower(data):
  """Probes on pixels and on their principal components: data set -> name -> split -> accuracy."""
  found = {}
  for name, examples, _ in data:
    path, counts = (
      pathlib.Path(WORKDIR.value) / f'without_tower_{name}.json',
      {split: len(part.labels) for split, part in examples.items()},
    )
    if not path.exists() or json.loads(path.read_text(encoding='utf-8'))['counts'] != counts:
      labels = {split: part.labels for split, part in examples.items()}
      fits = {
        probe: linear_probe(scoring.PROBES[probe](None, examples), labels)
        for probe in ('pixels', 'pca')
      }
      accuracy = {probe: fit['accuracy'] for probe, fit in fits.items()}
      atomic.write(path, logbook.to_json({'counts': counts, 'accuracy': accuracy}) + '\n')
    found[name] = json.loads(path.read_text(encoding='utf-8'))['accuracy']
  return found


# Tables and figure.


def values(results, variant, dataset, split, path):
  """One number a seed, in the order of the seeds; NaN where there is no such score."""
  found = []
  for result in results[variant].values():
    value = result['scores'][dataset][split]
    for key in path:
      value = {} if value is None else value.get(key, {})
    found.append(np.nan if value in ({}, None) else value)
  return np.asarray(found, float)


def table(results, dataset, split, references):
  lines = ['| | ' + ' | '.join(COLUMNS) + ' |', '|---' * (1 + len(COLUMNS)) + '|']
  for variant in results:
    cells = [
      runs.spread(values(results, variant, dataset, split, path)) for path in COLUMNS.values()
    ]
    lines.append(f'| {variant} | ' + ' | '.join(cells) + ' |')
  for name, accuracy in references[dataset].items():
    share = runs.spread([accuracy.get(split)])
    lines.append(f'| {name}, no tower |' + ' |' * (len(COLUMNS) - 2) + f' {share} | |')
  return lines


def differences(results, dataset, split, base):
  """Paired by seed."""
  lines = [f'| minus {base} | ' + ' | '.join(COLUMNS) + ' |', '|---' * (1 + len(COLUMNS)) + '|']
  for variant in results:
    if variant != base:
      cells = [
        runs.spread(
          values(results, variant, dataset, split, path)
          - values(results, base, dataset, split, path)
        )
        for path in COLUMNS.values()
      ]
      lines.append(f'| {variant} | ' + ' | '.join(cells) + ' |')
  return lines


def shape(results, dataset, split):
  lines = [
    '| | ' + ' | '.join(name.replace('_', ' ') for name in SHAPE) + ' |',
    '|---' * (1 + len(SHAPE)) + '|',
  ]
  for variant in results:
    cells = [
      runs.spread(values(results, variant, dataset, split, (name,)), scale=1, digits=3)
      for name in SHAPE
    ]
    lines.append(f'| {variant} | ' + ' | '.join(cells) + ' |')
  return lines


def plot(results, datasets, path):
  shown = ('zero-shot top-1', 'image to text R@10', 'probe, tower', 'probe, embedding')
  figure, axes = plt.subplots(
    len(datasets), len(shown), figsize=(3.2 * len(shown), 2.9 * len(datasets)), squeeze=False
  )
  for row, dataset in zip(axes, datasets, strict=True):
    for axis, column in zip(row, shown, strict=True):
      for i, variant in enumerate(results):
        value_s = 100 * values(results, variant, dataset, 'test', COLUMNS[column])
        axis.plot(np.full(len(value_s), i), value_s, 'o', color='grey', markersize=3)
        axis.plot([i - 0.3, i + 0.3], [value_s.mean()] * 2, color='black')  # NaN draws nothing.
      axis.set_xticks(range(len(results)), list(results), fontsize=8)
      axis.set_title(f'{dataset}: {column}', fontsize=8)
      axis.set_ylabel('test, %', fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def markdown(results, datasets, references, about):
  """The lines of the page."""
  lines = [
    '# CLIP against latent-structure regularisers',
    '',
    f'Percent, mean ± sample standard deviation over seeds {", ".join(SEEDS.value)}.',
  ]
  for dataset in datasets:
    for split in SPLITS:
      heading = f'## {terminal.clean(dataset, 80)}, {split}'
      lines += ['', heading, '', *table(results, dataset, split, references)]
      for base in ('CLIP', 'Con'):
        if base in results and len(results) > 1:
          lines += [
            '',
            'Paired differences, points.',
            '',
            *differences(results, dataset, split, base),
          ]
      lines += ['', 'The common space.', '', *shape(results, dataset, split)]
  lines += [
    '',
    f'`{about["command"]}`, {about["seconds"]:.0f} s of training and scoring, {about["versions"]}',
    '',
    'Weights:',
    '',
  ]
  lines += [f'- {variant}: {OBJECTIVES[variant]}' for variant in results]
  return lines


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  unknown = set(VARIANTS.value) - set(OBJECTIVES)
  if unknown:
    raise app.UsageError(
      f'--variants: no {", ".join(sorted(unknown))}; known: {", ".join(OBJECTIVES)}'
    )
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  data = open_data()
  pooled, results = (
    {},
    {variant: {} for variant in OBJECTIVES if variant in (VARIANTS.value or OBJECTIVES)},
  )
  for seed in SEEDS.value:
    for variant in results:
      results[variant][seed] = run(variant, int(seed), data, pooled)
      print(f'{variant}, seed {seed}: {results[variant][seed]["seconds"]}', flush=True)
  references, datasets = without_tower(data), [name for name, *_ in data]
  about = runs.provenance()
  if SHIFTED.value:  # Results do not say where it lies.
    about['command'] = about['command'].replace(SHIFTED.value, 'FOLDER')
  about |= {
    'seeds': SEEDS.value,
    'overrides': OVERRIDE.value,
    'objectives': {variant: OBJECTIVES[variant] for variant in results},
    'seconds': sum(
      sum(result['seconds'].values()) for by_seed in results.values() for result in by_seed.values()
    ),
  }
  scores = {
    variant: {seed: result['scores'] for seed, result in by_seed.items()}
    for variant, by_seed in results.items()
  }
  text = logbook.to_json(about | {'scores': scores, 'without_tower': references}, indent=1)
  (out / 'latent_structure.json').write_text(text + '\n', encoding='utf-8')
  lines = markdown(results, datasets, references, about)
  (out / 'latent_structure.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  plot(results, datasets, out / 'latent_structure.png')
  print('\n'.join(lines))


if __name__ == '__main__':
  app.run(main)
