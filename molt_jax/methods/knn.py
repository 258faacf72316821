"""Nearest neighbours on pooled hidden states: nothing is trained, k is chosen on validation. See
`parts.neighbours` and `docs/methods/knn.md`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts import kernel_ridge, neighbours
from molt_jax.methods.parts.interface import Output
from molt_jax.methods.parts.ridge_kernels import Examples

NEIGHBOURS = 'neighbours'  # Among the statistics.


@dataclasses.dataclass(frozen=True)
class Nearest(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    reads, modules, over_patterns: see `base.Method`.
    examples: most training examples that are compared with.
    num_classes: K.
    multi_label: whether an example can have several labels.
  """

  reads: Mapping[str, Reads]
  modules: Mapping[str, nn.Module | None]
  examples: int
  num_classes: int
  multi_label: bool
  over_patterns: Any = jax.vmap

  is_trained = False
  closed_form = (NEIGHBOURS,)

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    del key
    widths = {}
    for modality, module in self.modules.items():
      # Of an image the first token and the mean of the others, of a text the mean of all.
      tokens = 2 if modality == 'image' else 1
      widths[modality] = tokens * module.config.hidden_size if module else None
    sizes = {'examples': self.examples, 'num_classes': self.num_classes}
    return {'params': {}, 'statistics': {NEIGHBOURS: neighbours.empty(widths, **sizes)}}

  def fit_inputs(self, variables, frozen, features, batch) -> dict[str, dict[str, jax.Array]]:
    """See `base.Method`."""
    del variables, frozen
    return {m: {'mean': x} for m, x in _pooled(features, batch['present']).items()}

  def fit(self, training: Examples, held: Examples) -> dict[str, Any]:
    """See `base.Method`."""
    how = {'examples': self.examples, 'multi_label': self.multi_label}
    return {NEIGHBOURS: neighbours.fit(training, held, **how)}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`; in training, where there is nothing to learn, logits are zero."""
    if training:
      return Output(jnp.zeros((len(present_bm), self.num_classes)))
    # A text without a token is none.
    text_b = jnp.any(features.text_mask_bt, axis=1)
    present_bm = present_bm & jnp.stack([jnp.ones_like(text_b), text_b], axis=-1)
    pooled = _pooled(features, present_bm)
    own, how = variables['statistics'][NEIGHBOURS], {'multi_label': self.multi_label}
    return Output(neighbours.logits(own, pooled, present_bm, **how))


def _pooled(features, present_bm) -> dict[str, jax.Array]:
  """Modality -> float32[B, C] of its last hidden state."""
  found = {}
  for modality in MODALITIES:
    if features.of(modality) is not None:
      groups = kernel_ridge.pool_modality(features, present_bm, modality)
      last_bnd = groups['mean'][:, -1]
      if modality == 'text':
        last_bnd = last_bnd[:, kernel_ridge.MEAN : kernel_ridge.MEAN + 1]
      found[modality] = last_bnd.reshape(len(last_bnd), -1)
  return found


def build(config, towers, *, num_classes, class_names=()) -> Nearest:
  """See `base.make_method`."""
  del class_names
  reads = {modality: Reads((tower.config.num_layers,)) for modality, tower in towers.items()}
  modules = base.tower_modules(config, towers, reads)
  return Nearest(reads, modules, config.knn.examples, num_classes, config.dataset.multi_label)
