"""One update of the head: views, losses, gradient, optimiser; a pure function to be jitted with the state donated."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from molt_jax import config as config_lib
from molt_jax import model as model_lib
from molt_jax import train_state
from molt_jax.modules.interface import HeadOutput
from molt_jax.objectives import classification
from molt_jax.objectives.cca_estimators import CCAEstimator, make_estimator

VIEWS = np.array([[True, True], [True, False], [False, True]])  # Complete, image alone, text alone.


def train_step(
    state: train_state.TrainState, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array], class_weight_k: jax.Array | None, *,
    model: model_lib.Model, tx: optax.GradientTransformation, estimator: CCAEstimator, config: ml_collections.ConfigDict
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """One update of the head; `frozen` is only read. Returns the new state and metrics (scalars; `cca_...` have one value a layer)."""
  present_bm = drop_modality(train_state.stream(config.seed, 'modality_dropout', state.step), batch['present'], rate=config.missing.train_dropout)
  present_vbm = present_bm[None] & views(config)[:, None, :]
  dropout_v = jax.random.split(train_state.stream(config.seed, 'dropout', state.step), len(present_vbm))
  taps = model.taps(frozen, batch)

  def loss_fn(params):
    def view(present_bm, dropout):
      return model.head.apply(
          {'params': params, 'statistics': state.statistics}, taps, present_bm, train=True, content_bm=batch['present'], row_weight_b=batch['weight'],
          mutable=['statistics'], rngs={'dropout': dropout})
    out_v, mutated_v = jax.vmap(view)(present_vbm, dropout_v)
    total, parts, cca = total_loss(out_v, batch, present_vbm, class_weight_k, state.cca, estimator=estimator, config=config)
    # Statistics are of what may be read, so every view finds the same.
    return total, (parts, cca, jax.tree.map(lambda x: x[0], mutated_v.get('statistics', {})))

  (loss, (parts, cca, statistics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': loss, **parts, 'grad_norm': optax.tree.norm(grads)}
  return train_state.TrainState(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state, cca=cca), metrics


def views(config: ml_collections.ConfigDict) -> np.ndarray:
  """Returns bool[V, 2], the modalities that each view of an example keeps: the complete one first, and alone where one modality is used at all."""
  return VIEWS if config.missing.views and len(config_lib.modalities(config)) == 2 else VIEWS[:1]


def drop_modality(key: jax.Array, present_bm: jax.Array, *, rate: float) -> jax.Array:
  """Takes one modality, either with equal chance, from a share `rate` of the complete rows; a row never loses both."""
  key_row, key_side = jax.random.split(key)
  hit_b = jax.random.bernoulli(key_row, rate, present_bm.shape[:1]) & jnp.all(present_bm, axis=-1)
  lose_image_b = jax.random.bernoulli(key_side, 0.5, present_bm.shape[:1])
  return present_bm & ~jnp.stack([hit_b & lose_image_b, hit_b & ~lose_image_b], axis=-1)


def total_loss(
    out_v: HeadOutput, batch: Mapping[str, jax.Array], present_vbm: jax.Array, class_weight_k: jax.Array | None, cca_state: Any, *,
    estimator: CCAEstimator, config: ml_collections.ConfigDict) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Eq. 8, alpha L_CCA + beta L_CE, with the cross-entropy averaged over views and, beside it, their distillation from the complete view.

  Args:
    out_v: the head's output, stacked over views; the first view is the complete one, and L_CCA is its.
    batch: reads label and weight.
    present_vbm: bool[V, B, 2], the modalities of each row in each view; a row that a view leaves with nothing does not count there.
    class_weight_k: weights of classes (multi-label: of positives), or None.
    cca_state: what the estimator remembers.
    estimator: of the canonical correlations.
    config: reads cca, loss, missing and dataset.multi_label.

  Returns:
    (loss, {'loss_ce', 'loss_distill' where there are views, 'loss_cca' and 'cca_...' [L] where there is L_CCA}, the estimator's new state).
  """
  kind = classification.KINDS[config.dataset.multi_label]
  weight_vb = batch['weight'][None] * jnp.any(present_vbm, axis=-1)

  def mean(loss_sum, weight_sum):
    return loss_sum / jnp.maximum(weight_sum, 1e-6)

  ce_v = jax.vmap(lambda logits_bk, weight_b: mean(*kind.cross_entropy(logits_bk, batch['label'], weight_b, class_weight_k)))(
      out_v.logits_bk, weight_vb)
  share_v = jnp.ones_like(ce_v).at[1:].set(config.missing.view_weight)
  parts = {'loss_ce': jnp.sum(ce_v * share_v) / jnp.sum(share_v)}
  loss = config.loss.weight * parts['loss_ce']
  if len(present_vbm) > 1 and config.missing.distill_weight:
    distill_v = jax.vmap(lambda logits_bk, weight_b: mean(*kind.distillation(
        logits_bk, out_v.logits_bk[0], weight_b, config.missing.distill_temperature)))(out_v.logits_bk[1:], weight_vb[1:])
    parts['loss_distill'] = jnp.mean(distill_v)
    loss += config.loss.weight * config.missing.distill_weight * parts['loss_distill']
  if config.cca.weight and out_v.pooled_image_lbc is not None and len(config_lib.modalities(config)) == 2:
    pair_b = batch['weight'] * jnp.all(present_vbm[0], axis=-1)
    parts['loss_cca'], cca_state, aux = estimator.loss(cca_state, out_v.pooled_image_lbc[0], out_v.pooled_text_lbc[0], pair_b)
    parts |= {f'cca_{name}': value_l for name, value_l in aux.items()}
    loss += config.cca.weight * parts['loss_cca']
  return loss, parts, cca_state


def make_cca_estimator(config: ml_collections.ConfigDict) -> CCAEstimator:
  """Returns the estimator of canonical correlations that `config.cca` describes."""
  c = config.cca
  return make_estimator(
      c.estimator, num_directions=c.num_directions, window=c.window, ridge=c.ridge, solver=c.solver, seed=config.seed)
