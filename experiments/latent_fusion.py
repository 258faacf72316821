"""Latent structures on a fusion-based model: the other half of the tables of Jiang et al. (CVPR
2023), on stored hidden states of frozen towers.

  python experiments/latent_fusion.py [--data=openmoji] [--data=NAME=FOLDER] [--seeds=0,1,2]
  [--methods=REGEX] [--set=FIELD=VALUE] [--examples=200] [--again=8] [...]

Rows: `method=albef` without latent structures, with each, and with all of them, at the weights of
`latent_structure.py`. Scored on test: the task that it is trained for, complete and with a modality
missing; retrieval among --examples complete examples by contrast (ITC), and with the best --again
of each ranked anew by matching (ITM). Equal texts, or images, count as the same answer.
"""

import time
from collections.abc import Mapping
from typing import Any

import grid
import jax
import numpy as np
from absl import flags

from molt_jax.config import resolved
from molt_jax.config.json_files import read_json
from molt_jax.data import missing, pipeline
from molt_jax.data.modalities import LABELS
from molt_jax.evaluation import trained
from molt_jax.features import opening
from molt_jax.runtime import atomic, logbook, sharding

EXAMPLES = flags.DEFINE_integer('examples', 200, 'Complete test examples to find each other in.')
AGAIN = flags.DEFINE_integer('again', 8, 'How many of the best of each are ranked anew.')

FUSED = grid.DEFAULT | {'method': 'albef', 'ridge.landmarks': 0}
METHODS = {
  'ALBEF': FUSED,
  '+Sep': FUSED | {'albef.separation': 1.0},
  '+Br': FUSED | {'albef.bridge': 1.0},
  '+GC': FUSED | {'albef.geometry': 0.25},
  '+all': FUSED | {'albef.separation': 1.0, 'albef.bridge': 1.0, 'albef.geometry': 0.25},
}
RANKS = (1, 5)
ROWS = 64  # Pairs that are matched at once.
COLUMNS = [
  f'{direction} R@{k}, {by}'
  for by in ('ITC', 'ITM')
  for direction in ('image to text', 'text to image')
  for k in RANKS
]


def retrieval(made: grid.Made) -> dict[str, float]:
  """Returns column -> share of a run's test examples that are found; kept in its folder."""
  path = made.folder / 'retrieval.json'
  run = trained.open(made.folder)
  key = [resolved.config_hash(run.config), EXAMPLES.value, AGAIN.value]
  if path.exists():
    kept = read_json(path, 'delete it, and retrieval is scored anew')
    if kept['key'] == key:
      return kept['scores']
  scores = _retrieval(run)
  atomic.write(path, logbook.to_json({'key': key, 'scores': scores}) + '\n')
  return scores


def _retrieval(run: trained.Trained) -> dict[str, float]:
  assembly, method = run.assembly, run.assembly.method
  source, _ = trained.open_split(run, 'test')
  wanted = {'test': (source, np.asarray(source.present))}
  frozen, stored = opening.open_features(assembly.extraction, wanted)
  complete = np.flatnonzero(np.asarray(source.present).all(axis=1))
  order = missing.hash_order([source.ids[n] for n in complete], seed=0, name='retrieval')
  rows = np.sort(complete[order[: EXAMPLES.value]]).tolist()
  part, features = pipeline.take(source, stored['test'], rows)
  variables = run.variables()

  def encode(variables, batch):
    return method.encode(variables, method.features(frozen, batch), batch['present'])

  step, found = jax.jit(encode), []
  for batch in assembly.eval_batches(part, features):
    found.append(jax.device_get(step(variables, sharding.put_batch(batch, assembly.mesh))))
  encoded = jax.tree.map(lambda *x: _stacked(x)[: len(rows)], *found)
  same_nn = _same(encoded.embeddings.image) | _same(encoded.embeddings.text)
  contrast_nn = encoded.embeddings.image @ encoded.embeddings.text.T
  matched_nn = _matched(method, variables, encoded, contrast_nn)
  scores = {}
  for by, score_nn in (('ITC', contrast_nn), ('ITM', matched_nn)):
    for direction, own_nn in (('image to text', score_nn), ('text to image', score_nn.T)):
      for k in RANKS:
        scores[f'{direction} R@{k}, {by}'] = recall(own_nn, same_nn, k)
  return scores


def _stacked(parts) -> np.ndarray:
  """Batches of texts that are padded differently, as one array."""
  most = np.max([x.shape[1:] for x in parts], axis=0)
  whole = []
  for x in parts:
    whole.append(np.pad(x, [(0, 0), *((0, m - n) for m, n in zip(most, x.shape[1:], strict=True))]))
  return np.concatenate(whole)


def _same(embeddings_nc: np.ndarray) -> np.ndarray:
  """bool[N, N]: equal inputs have equal embeddings, to rounding."""
  return embeddings_nc @ embeddings_nc.T > 1 - 1e-5


def _matched(method, variables, encoded, contrast_nn: np.ndarray) -> np.ndarray:
  """Scores of images (rows) and texts with the best of each, in either direction, above all others,
  in the order of their probability.
  """
  again_nn = _best(contrast_nn) | _best(contrast_nn.T).T
  image_p, text_p = np.nonzero(again_nn)
  judge, found = jax.jit(method.judge), []
  for begin in range(0, len(image_p), ROWS):
    # The last pairs are filled up with the first, so that one program serves all.
    own = np.arange(begin, begin + ROWS) % len(image_p)
    image, text = image_p[own], text_p[own]
    images = encoded.image_bid[image], encoded.image_mask_bi[image]
    found.append(judge(variables, *images, encoded.text_btd[text], encoded.text_mask_bt[text]))
  score_nn = contrast_nn.copy()
  score_nn[image_p, text_p] = 2 + np.concatenate(found)[: len(image_p)]
  return score_nn


def _best(score_nn: np.ndarray) -> np.ndarray:
  """bool[N, N], the best of each row."""
  best_nk = np.argsort(-score_nn, axis=1)[:, : AGAIN.value]
  found_nn = np.zeros(score_nn.shape, bool)
  np.put_along_axis(found_nn, best_nk, True, axis=1)
  return found_nn


def recall(score_nn: np.ndarray, right_nn: np.ndarray, k: int) -> float:
  """Returns the share of rows with a right column among the best k; ties count against."""
  best_n = np.where(right_nn, score_nn, -np.inf).max(axis=1)
  ahead_n = ((score_nn >= best_n[:, None]) & ~right_nn).sum(axis=1)
  return float(np.mean(ahead_n < k))


def lines(made: Mapping[str, grid.Table], found: Mapping[str, Any]):
  """Markdown: for each data set the task, then retrieval."""
  yield '# Latent structures on a fusion-based model\n'
  yield 'Percent on test, mean ± standard deviation over seeds.\n'
  for data, table in made.items():
    key = grid.metric_of(table)
    yield f'## {data}\n'
    yield '| | ' + ' | '.join([*LABELS.values(), *COLUMNS]) + ' |'
    yield '|---|' + '--:|' * (len(LABELS) + len(COLUMNS))
    for method in table:
      cells = [grid.runs.spread(grid.values(table, method, name, key)) for name in LABELS]
      for column in COLUMNS:
        cells.append(grid.runs.spread([s[column] for s in found[data][method].values()]))
      yield f'| {method} | ' + ' | '.join(cells) + ' |'
    yield ''


def main():
  start = time.monotonic()
  made = grid.make(METHODS, today=True)
  found = {}
  for data, table in made.items():
    found[data] = {
      method: {str(seed): retrieval(one) for seed, one in by_seed.items()}
      for method, by_seed in table.items()
    }
  content = {
    'methods': METHODS,
    'data': {name: grid.numbers(table) for name, table in made.items()},
    'retrieval': found,
  }
  grid.publish('latent_fusion', list(lines(made, found)), content, start)


if __name__ == '__main__':
  grid.start(main)
