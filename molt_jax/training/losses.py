"""What a step minimises. A classifier: eq. 8 over missing patterns; see `pairs.method` for towers.

An objective has `present`, the missing patterns of a batch, and is called on a method's outputs for
them. Its state is what it remembers from step to step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.config.resolved import modalities
from molt_jax.data.modalities import PATTERNS
from molt_jax.data.sources import classes_of
from molt_jax.methods.parts.interface import Output
from molt_jax.objectives import cross_entropy
from molt_jax.objectives.cca.estimators import CCAEstimator, make_estimator
from molt_jax.runtime import sharding

_LEAST = 1e-6  # Of a sum of weights that is divided by.


@dataclasses.dataclass(frozen=True)
class ClassifierLoss:
  """Eq. 8, alpha L_CCA + beta L_CE, with the cross-entropy averaged over missing patterns and,
  beside it, their distillation from the complete pattern and the method's own losses.

  Attributes:
    config: reads cca, loss, missing and dataset.
    estimator: of the canonical correlations.
    weights: of the method's own losses, `Method.loss_weights`.
    branches: of the logits that it is trained by, `Method.branch_weights`.
    class_weight_k: float32[K], of classes (multi-label: of positives); None: all are alike.
  """

  config: ml_collections.ConfigDict
  estimator: CCAEstimator
  weights: Mapping[str, float]
  branches: Mapping[str, float]
  class_weight_k: np.ndarray | None = None

  def init(self, method: Any) -> Any:
    """Returns what the estimator remembers before the first step of a method."""
    return self.estimator.init(getattr(method, 'num_layers', 1), self.config.molt.width)

  @property
  def patterns(self):
    """bool[V, 2], the modalities that each pattern keeps: the complete one first, and alone where
    one modality is used at all.
    """
    several = self.config.missing.views and len(modalities(self.config)) == 2
    return PATTERNS if several else PATTERNS[:1]

  def present(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Returns bool[V, B, 2], the modalities of each example in each pattern."""
    rate = self.config.missing.train_dropout
    present_bm = drop_modality(key, batch['present'], rate=rate)
    return present_bm[None] & self.patterns[:, None, :]

  def __call__(
    self,
    out_v: Output,
    batch: Mapping[str, jax.Array],
    present_vbm: jax.Array,
    memory: Any,
    key: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Returns the loss of a batch.

    Args:
      out_v: the method's output, stacked over patterns; the first is the complete one, and L_CCA is
        its.
      batch: reads label (negative: not known, the example takes part in L_CCA alone) and weight.
      present_vbm: as `present` returned it; an example that a pattern leaves with nothing does not
        count there.
      memory: what the estimator remembers.
      key: not read.

    Returns:
      (loss, {'loss_ce', 'loss_distill' where there are patterns, 'loss_cca' and 'cca_...' [L] where
      there is L_CCA, the method's own}, the estimator's new memory).
    """
    del key
    totals = self.totals(batch, present_vbm)
    loss, parts = self.over_examples(out_v, batch, present_vbm, totals)
    pairs = self.pairs(out_v)
    if pairs:
      loss_cca, (parts_cca, memory) = self.of_pairs(pairs, batch, present_vbm, memory)
      loss, parts = loss + loss_cca, parts | parts_cca
    return loss, parts, memory

  def totals(self, batch, present_vbm) -> tuple[jax.Array, jax.Array]:
    """Returns what sums over examples are divided by, float32[V] each: the weight of each pattern's
    cross-entropy, and of its other losses.
    """
    kind = cross_entropy.KINDS[self.config.dataset.multi_label]
    class_weight_k = self.class_weight_k
    num_classes = 1 if class_weight_k is None else len(class_weight_k)
    # Weights do not depend on logits.
    nothing_bk = jnp.zeros((len(batch['weight']), num_classes))

    def weight(weight_b):
      return kind.cross_entropy(nothing_bk, batch['label'], weight_b, class_weight_k)[1]

    weight_vb = _example_weights(batch, present_vbm)
    ce_v = jax.vmap(weight)(weight_vb)
    return jnp.maximum(ce_v, _LEAST), jnp.maximum(jnp.sum(weight_vb, axis=1), _LEAST)

  def over_examples(
    self, out_v, batch, present_vbm, totals
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Per-example losses over the weights `totals`: those of microbatches, over the whole batch's
    weights, add up to its.
    """
    missing, beta = self.config.missing, self.config.loss.weight
    kind = cross_entropy.KINDS[self.config.dataset.multi_label]
    weight_vb, (ce_total_v, total_v) = _example_weights(batch, present_vbm), totals

    def ce(logits_bk, weight_b):
      return kind.cross_entropy(logits_bk, batch['label'], weight_b, self.class_weight_k)[0]

    if self.branches:
      named = out_v.branches_bk
      ce_v = sum(w * jax.vmap(ce)(named[name], weight_vb) for name, w in self.branches.items())
    else:
      ce_v = jax.vmap(ce)(out_v.logits_bk, weight_vb)
    ce_v /= ce_total_v
    share_v = jnp.ones_like(ce_v).at[1:].set(missing.view_weight)
    parts = {'loss_ce': jnp.sum(ce_v * share_v) / jnp.sum(share_v)}
    loss = beta * parts['loss_ce']
    if len(present_vbm) > 1 and missing.distill_weight:

      def distill(logits_bk, weight_b):
        temperature = missing.distill_temperature
        return kind.distillation(logits_bk, out_v.logits_bk[0], weight_b, temperature)[0]

      distill_v = jax.vmap(distill)(out_v.logits_bk[1:], weight_vb[1:])
      parts['loss_distill'] = jnp.mean(distill_v / total_v[1:])
      loss += beta * missing.distill_weight * parts['loss_distill']
    for name, loss_vb in out_v.losses_b.items():
      sum_v = jnp.sum(jnp.where(weight_vb > 0, loss_vb, 0.0) * weight_vb, axis=1)
      parts[f'loss_{name}'] = jnp.mean(sum_v / total_v)
      loss += self.weights[name] * parts[f'loss_{name}']
    return loss, parts

  def pairs(self, out_v: Output) -> tuple[jax.Array, jax.Array] | None:
    """Returns (h_i, h_t) of the complete pattern, [L, B, C] each; None where there is no L_CCA."""
    both = len(modalities(self.config)) == 2
    if not self.config.cca.weight or out_v.pooled_image_lbc is None or not both:
      return None
    return out_v.pooled_image_lbc[0], out_v.pooled_text_lbc[0]

  def of_pairs(self, pairs, batch, present_vbm, memory):
    """alpha L_CCA of the complete examples' pairs: (loss, ({'loss_cca', 'cca_...'}, the
    estimator's new memory)).
    """
    pair_b = batch['weight'] * jnp.all(present_vbm[0], axis=-1)
    with jax.named_scope('cca'):  # The scopes are what a profile is split by.
      loss, memory, aux = self.estimator.loss(memory, *pairs, pair_b)
    named = {f'cca_{name}': value_l for name, value_l in aux.items()}
    return self.config.cca.weight * loss, ({'loss_cca': loss, **named}, memory)


def _example_weights(batch, present_vbm) -> jax.Array:
  """float32[V, B], 0 for an example without a label and where a pattern leaves it nothing."""
  labels = batch['label'].reshape(len(batch['weight']), -1)
  labelled_b = jnp.all(labels >= 0, axis=-1)
  return (batch['weight'] * labelled_b)[None] * jnp.any(present_vbm, axis=-1)


def drop_modality(key: jax.Array, present_bm: jax.Array, *, rate: float) -> jax.Array:
  """Takes one modality, either with equal chance, from a share `rate` of the complete examples; an
  example never loses both.
  """
  key_example, key_side = jax.random.split(key)
  chosen_b = jax.random.bernoulli(key_example, rate, present_bm.shape[:1])
  affected_b = chosen_b & jnp.all(present_bm, axis=-1)
  lose_image_b = jax.random.bernoulli(key_side, 0.5, present_bm.shape[:1])
  lost_bm = jnp.stack([affected_b & lose_image_b, affected_b & ~lose_image_b], axis=-1)
  return present_bm & ~lost_bm


def make_cca_estimator(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> CCAEstimator:
  """Returns the estimator of canonical correlations that `config.cca` describes; on a mesh each
  device estimates them from all examples.
  """
  c = config.cca
  return make_estimator(
    c.estimator,
    num_directions=c.num_directions,
    window=c.window,
    ridge=c.ridge,
    solver=c.solver,
    seed=config.seed,
    gather=sharding.gather_rows(mesh) if mesh and mesh.size > 1 else None,
  )


def make_objective(assembly: Any) -> ClassifierLoss:
  """Returns what a classifier minimises; `assembly` is an `assembly.Assembly`."""
  config = ml_collections.FrozenConfigDict(assembly.config)
  estimator = make_cca_estimator(assembly.config, assembly.mesh)
  weights = class_weights(assembly) if assembly.data else None
  method = assembly.method
  return ClassifierLoss(config, estimator, method.loss_weights, method.branch_weights, weights)


def class_weights(assembly: Any) -> np.ndarray | None:
  """Returns float32[K] from the training split's class counts, or None."""
  config = assembly.config
  if config.loss.class_weights == 'none':
    return None
  labels = assembly.data.splits['train'].labels
  classes = [k for label in labels for k in classes_of(label)]
  count_k = np.bincount(classes, minlength=assembly.num_classes)
  if config.dataset.multi_label:
    return cross_entropy.balanced_positive_weights(count_k, num_examples=len(labels))
  return cross_entropy.balanced_class_weights(count_k)
