"""Fits the maps of `missing.strategy=translate` in one closed pass over complete training pairs;
training does it at each validation.

The maps belong to the encoder of that moment, so nothing is lost to sums that lag behind it; a
resumed run has them in its checkpoint; and the training step pays nothing but their products. A
pass costs the head's evaluation of up to MAX_PAIRS examples in three views and, without a feature
store, one run of the towers over them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.data import missing, pipeline
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.methods import model as model_lib
from molt_jax.methods.parts.imputation import Moments
from molt_jax.runtime import console, sharding
from molt_jax.training.step import VIEWS

MAX_PAIRS = 16384  # 16 for each channel of the widest common space in use, d_c = 1024.


class TranslationFit:
  """The pairs to fit on, and the compiled pass over them."""

  def __init__(
    self,
    model: model_lib.Model,
    source: Source,
    preprocess: pipeline.Preprocess,
    *,
    present: np.ndarray,
    stored: Mapping[str, pipeline.StoredTaps] | None,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
  ):
    """Chooses the pairs: all rows that are complete, or MAX_PAIRS of them by a hash of their ids.

    Args:
      model: the classifier.
      source: the training split.
      preprocess: how an example becomes arrays.
      present: bool[N, 2], what the protocol leaves to each row.
      stored: the source's taps by modality, or None.
      config: reads seed, cca.ridge, molt, eval.batch_size, input.*.
      mesh: where to compute.

    Raises:
      UserError: there are not two complete pairs.
    """
    self._source, self._stored = complete_pairs(
      source, stored, present, limit=MAX_PAIRS, seed=config.seed, name='translate'
    )
    if len(self._source) < 2:
      raise UserError(
        "config.missing.strategy: 'translate' learns from complete training pairs, and there are "
        f'{len(self._source)}; give robust, null or zero'
      )
    self._preprocess, self._config, self._mesh = preprocess, config, mesh
    self._step = jax.jit(
      functools.partial(_update, model=model), out_shardings=sharding.replicated(mesh)
    )

  def __call__(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the collection `statistics` of `variables` with maps fitted to the head as it is
    now.
    """
    c, mesh = self._config, self._mesh
    empty = Moments.empty(c.molt.num_layers, c.molt.width)
    moments = jax.device_put({'to_text': empty, 'to_image': empty}, sharding.replicated(mesh))
    batches = pipeline.eval_batches(
      self._source,
      self._preprocess,
      batch_size=c.eval.batch_size,
      stored=self._stored,
      pack=sharding.packing(c, mesh),
      num_threads=c.input.num_threads,
      prefetch=c.input.prefetch,
      **sharding.data_shard(mesh),
    )
    with console.progress('fitting translation', len(self._source), 'pairs') as bar:
      for batch in batches:
        moments = self._step(variables, frozen, sharding.put_batch(batch, mesh), moments)
        bar.advance(min(c.eval.batch_size, len(self._source) - bar.done))
    sums = jax.device_get(moments)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(sums)):
      raise UserError(
        "config.missing.strategy: 'translate' is fitted to what the head makes of training pairs, "
        'and '
        'that is not finite: training has diverged; give a smaller config.optimizer.learning_rate'
      )
    maps = {name: m.solve(ridge=c.cca.ridge) for name, m in sums.items()}
    old = variables['statistics']['translator']
    new = {**maps, 'pairs': np.asarray(moments['to_text'].weight)}
    return {
      **variables['statistics'],
      'translator': jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new, old),
    }


def complete_pairs(
  source: Source,
  stored: Mapping[str, pipeline.StoredTaps] | None,
  present: np.ndarray,
  *,
  limit: int,
  seed: int,
  name: str,
) -> tuple[Source, dict[str, pipeline.StoredTaps] | None]:
  """Returns the rows that are complete, or `limit` of them by a hash of their ids, in the split's
  order, and their taps.

  Args:
    source: the split.
    stored: its taps by modality, or None.
    present: bool[N, 2], what the protocol leaves to each row.
    limit: most rows.
    seed, name: of the draw.
  """
  complete = np.flatnonzero((source.present & present).all(axis=1))
  order = missing.hash_order([source.ids[row] for row in complete], seed=seed, name=name)
  return pipeline.take(source, stored, np.sort(complete[order[:limit]]).tolist())


def _update(
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  moments: Mapping[str, Moments],
  *,
  model: model_lib.Model,
) -> dict[str, Moments]:
  """Adds a batch's pairs (alone, beside the other) in both directions."""
  taps = model.taps(frozen, batch)
  out_v = jax.lax.map(
    lambda keep_m: model.classify(variables, taps, batch['present'] & keep_m[None, :]),
    jnp.asarray(VIEWS),
  )
  image_vlbc, text_vlbc = out_v.pooled_image_lbc, out_v.pooled_text_lbc
  pair_b = batch['weight'] * jnp.all(batch['present'], axis=-1)
  return {
    'to_text': moments['to_text'].update(image_vlbc[1], text_vlbc[0], pair_b),
    'to_image': moments['to_image'].update(text_vlbc[2], image_vlbc[0], pair_b),
  }
