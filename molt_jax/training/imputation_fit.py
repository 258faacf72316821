"""Fits the maps of `missing.strategy=translate` in one closed pass over complete training pairs;
training does it at each validation.

The maps belong to the encoder of that moment, so nothing is lost to sums that lag behind it; a
resumed run has them in its checkpoint; and the training step pays nothing but their products. A
pass costs the head's evaluation of up to MAX_PAIRS examples in three missing patterns and, without
a feature store, one run of the towers over them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.data import missing, pipeline
from molt_jax.data.modalities import PATTERNS
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.methods.base import Method
from molt_jax.methods.parts.imputation import Moments
from molt_jax.runtime import compiling, console, sharding
from molt_jax.training.assembly import Assembly

MAX_PAIRS = 16384  # 16 for each channel of the widest common space in use, d_c = 1024.
CachedSplit = Mapping[str, pipeline.CachedStates] | None


class ImputationFit:
  """The pairs to fit on, and the compiled pass over them."""

  def __init__(self, assembly: Assembly, source: Source, present: np.ndarray, stored: CachedSplit):
    """Chooses the pairs: all examples that are complete, or MAX_PAIRS of them by a hash of their
    ids.

    Args:
      assembly: its config says seed, cca.ridge and molt.
      source: the training split.
      present: bool[N, 2], what the protocol leaves to each example.
      stored: the split's features by modality, or None.

    Raises:
      UserError: there are not two complete pairs.
    """
    self._assembly = assembly
    self._source, self._stored = complete_pairs(
      source, stored, present, limit=MAX_PAIRS, seed=assembly.config.seed, name='translate'
    )
    if len(self._source) < 2:
      raise UserError(
        "config.missing.strategy: 'translate' learns from complete training pairs, and there are "
        f'{len(self._source)}; give robust, null or zero'
      )
    step = functools.partial(_update, method=assembly.method)
    self._step = compiling.jit(step, out_shardings=sharding.replicated(assembly.mesh))

  def __call__(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the collection `statistics` of `variables` with maps fitted to the head as it is now.

    Raises:
      UserError: what the head makes of the pairs is not finite.
    """
    config, mesh = self._assembly.config, self._assembly.mesh
    empty = Moments.empty(self._assembly.method.num_layers, config.molt.width)
    moments = jax.device_put({'to_text': empty, 'to_image': empty}, sharding.replicated(mesh))
    with console.progress('fitting imputation', len(self._source), 'pairs') as bar:
      for batch in self._assembly.eval_batches(self._source, self._stored):
        moments = self._step(variables, frozen, sharding.put_batch(batch, mesh), moments)
        bar.advance(min(config.eval.batch_size, len(self._source) - bar.done))
    sums = jax.device_get(moments)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(sums)):
      raise UserError(
        "config.missing.strategy: 'translate' is fitted to what the head makes of training pairs, "
        'and that is not finite: training has diverged; give a smaller '
        'config.optimizer.learning_rate'
      )
    maps = {name: m.solve(ridge=config.cca.ridge) for name, m in sums.items()}
    old = variables['statistics']['translator']
    new = {**maps, 'pairs': np.asarray(moments['to_text'].weight)}
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new, old)
    return {**variables['statistics'], 'translator': placed}


def complete_pairs(
  source: Source, stored: CachedSplit, present: np.ndarray, *, limit: int, seed: int, name: str
) -> tuple[Source, CachedSplit]:
  """Returns the examples that are complete, or `limit` of them by a hash of their ids, in the
  split's order, and their features.

  Args:
    source: the split.
    stored: its features by modality, or None.
    present: bool[N, 2], what the protocol leaves to each example.
    limit: most examples.
    seed, name: of the draw.
  """
  complete = np.flatnonzero((source.present & present).all(axis=1))
  order = missing.hash_order([source.ids[n] for n in complete], seed=seed, name=name)
  return pipeline.take(source, stored, np.sort(complete[order[:limit]]).tolist())


def _update(
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  moments: Mapping[str, Moments],
  *,
  method: Method,
) -> dict[str, Moments]:
  """Adds a batch's pairs (alone, beside the other) in both directions."""
  features = method.features(frozen, batch)

  def one(keep_m):
    present_bm = batch['present'] & keep_m[None, :]
    out = method(variables, frozen, features, batch, present_bm)
    return out.pooled_image_lbc, out.pooled_text_lbc

  image_vlbc, text_vlbc = jax.lax.map(one, jnp.asarray(PATTERNS))
  pair_b = batch['weight'] * jnp.all(batch['present'], axis=-1)
  return {
    'to_text': moments['to_text'].update(image_vlbc[1], text_vlbc[0], pair_b),
    'to_image': moments['to_image'].update(text_vlbc[2], image_vlbc[0], pair_b),
  }
