"""One update of the head: views, losses, gradient, optimiser; a pure function to be jitted with the
state donated.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from molt_jax.config import resolved
from molt_jax.methods import model as model_lib
from molt_jax.methods.parts.interface import HeadOutput
from molt_jax.objectives import cross_entropy
from molt_jax.objectives.cca.estimators import CCAEstimator, make_estimator
from molt_jax.runtime import sharding
from molt_jax.training import train_state

VIEWS = np.array([[True, True], [True, False], [False, True]])  # Complete, image alone, text alone.


def train_step(
  state: train_state.TrainState,
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  class_weight_k: jax.Array | None,
  *,
  model: model_lib.Model,
  tx: optax.GradientTransformation,
  estimator: CCAEstimator,
  config: ml_collections.ConfigDict,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """One update of the head; `frozen` is only read. Returns the new state and metrics (scalars;
  `cca_...` have one value a layer).
  """
  present_bm = drop_modality(
    train_state.stream(state.seed, 'modality_dropout', state.step),
    batch['present'],
    rate=config.missing.train_dropout,
  )
  present_vbm = present_bm[None] & views(config)[:, None, :]
  gradients = _gradients if config.train.accumulate == 1 else _accumulated_gradients
  loss, parts, grads, statistics, cca = gradients(
    state,
    frozen,
    batch,
    present_vbm,
    class_weight_k,
    train_state.stream(state.seed, 'dropout', state.step),
    model=model,
    estimator=estimator,
    config=config,
  )
  with jax.named_scope('optimizer'):  # The scopes are what a profile is split by.
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  metrics = {'loss': loss, **parts, 'grad_norm': optax.tree.norm(grads)}
  return state.replace(
    step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state, cca=cca
  ), metrics


def _gradients(state, frozen, batch, present_vbm, class_weight_k, key, *, model, estimator, config):
  """Returns (loss, parts, gradients, new statistics, the estimator's new state)."""
  taps = model.taps(frozen, batch)

  def loss_fn(params):
    out_v, statistics = _views(
      model, params, state.statistics, taps, batch, present_vbm, key, update=True
    )
    total, parts, cca = total_loss(
      out_v, batch, present_vbm, class_weight_k, state.cca, estimator=estimator, config=config
    )
    return total, (parts, statistics, cca)

  (loss, (parts, statistics, cca)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  return loss, parts, grads, statistics, cca


def _accumulated_gradients(
  state, frozen, batch, present_vbm, class_weight_k, key, *, model, estimator, config
):
  """The same, in `train.accumulate` parts one after the other, and the gradient of the whole batch,
  exactly.

  Towers run once and their taps are kept. What is not a sum over rows comes first, by passes
  forward that keep nothing: the statistics of the whole batch, then its pooled pairs, whose L_CCA
  is differentiated with respect to them. Each part's gradient is that of its rows' losses (over the
  weight of the whole batch) plus the inner product of its pairs with that derivative.
  """
  count = config.train.accumulate
  batch_a, present_avbm = (
    _cut(batch, count),
    jnp.swapaxes(_cut(jnp.swapaxes(present_vbm, 0, 1), count), 1, 2),
  )
  parts_a = (
    jax.lax.map(lambda part: model.taps(frozen, part), batch_a),
    batch_a,
    present_avbm,
    jax.random.split(key, count),
  )
  totals = row_weights(batch, present_vbm, class_weight_k, config=config)

  def update(statistics, part):
    return _views(model, state.params, statistics, *part, update=True)[1], None

  statistics = (
    jax.lax.scan(update, state.statistics, parts_a)[0] if state.statistics else state.statistics
  )

  def pairs_of(params, part):
    return _pairs(_views(model, params, statistics, *part, update=False)[0], config)

  pairs = jax.lax.map(lambda part: pairs_of(state.params, part), parts_a)
  loss_cca, parts_cca, cca, slopes = jnp.zeros(()), {}, state.cca, None
  if pairs:
    (loss_cca, (parts_cca, cca)), slope = jax.value_and_grad(pair_loss, has_aux=True)(
      jax.tree.map(lambda x: _join(x, 2), pairs),
      batch,
      present_vbm,
      state.cca,
      estimator=estimator,
      config=config,
    )
    slopes = jax.tree.map(lambda x: _cut(x, count, 1), slope)

  def loss_fn(params, part, slope):
    out_v = _views(model, params, statistics, *part, update=False)[0]
    loss, parts = row_loss(out_v, part[1], part[2], class_weight_k, totals, config=config)
    pull = (
      sum(jnp.sum(x * g) for x, g in zip(_pairs(out_v, config), slope, strict=True))
      if slope
      else 0.0
    )
    return loss + pull, (loss, parts)

  def add(so_far, part_and_slope):
    grads, (loss, parts) = jax.grad(loss_fn, has_aux=True)(state.params, *part_and_slope)
    return jax.tree.map(jnp.add, so_far, (grads, loss, parts)), None

  xs = parts_a, slopes
  nothing = jax.eval_shape(
    lambda x: jax.grad(loss_fn, has_aux=True)(state.params, *x), jax.tree.map(lambda x: x[0], xs)
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (nothing[0], *nothing[1]))
  (grads, loss, parts), _ = jax.lax.scan(add, zeros, xs)
  return loss + loss_cca, parts | parts_cca, grads, statistics, cca


def _cut(tree: Any, count: int, axis: int = 0) -> Any:
  """Cuts an axis of B rows into [count, ..., B / count, ...], part m being rows m, m + count, ...:
  no row leaves its device.
  """

  def cut(x):
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :]), axis + 1, 0)

  return jax.tree.map(cut, tree)


def _join(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `_cut`; `axis` is that of the rows in the parts."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])


def _views(model, params, statistics, taps, batch, present_vbm, key, *, update):
  """Returns the head's output stacked over views, and the statistics (with those of these rows, or
  {}); each view has its own dropout.
  """

  def view(present_bm, dropout):
    return model.head.apply(
      {'params': params, 'statistics': statistics},
      taps,
      present_bm,
      train=True,
      content_bm=batch['present'],
      row_weight_b=batch['weight'],
      mutable=['statistics'] if update else [],
      rngs={'dropout': dropout},
    )

  out_v, mutated_v = jax.vmap(view)(present_vbm, jax.random.split(key, len(present_vbm)))
  return out_v, jax.tree.map(
    lambda x: x[0], mutated_v.get('statistics', {})
  )  # Of what may be read, so every view finds the same.


def _pairs(
  out_v: HeadOutput, config: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array] | None:
  """(h_i, h_t) of the complete view, [L, B, C] each; None where there is no L_CCA."""
  if (
    not config.cca.weight or out_v.pooled_image_lbc is None or len(resolved.modalities(config)) < 2
  ):
    return None
  return out_v.pooled_image_lbc[0], out_v.pooled_text_lbc[0]


def views(config: ml_collections.ConfigDict) -> np.ndarray:
  """Returns bool[V, 2], the modalities that each view of an example keeps: the complete one first,
  and alone where one modality is used at all.
  """
  return VIEWS if config.missing.views and len(resolved.modalities(config)) == 2 else VIEWS[:1]


def drop_modality(key: jax.Array, present_bm: jax.Array, *, rate: float) -> jax.Array:
  """Takes one modality, either with equal chance, from a share `rate` of the complete rows; a row
  never loses both.
  """
  key_row, key_side = jax.random.split(key)
  hit_b = jax.random.bernoulli(key_row, rate, present_bm.shape[:1]) & jnp.all(present_bm, axis=-1)
  lose_image_b = jax.random.bernoulli(key_side, 0.5, present_bm.shape[:1])
  return present_bm & ~jnp.stack([hit_b & lose_image_b, hit_b & ~lose_image_b], axis=-1)


def total_loss(
  out_v: HeadOutput,
  batch: Mapping[str, jax.Array],
  present_vbm: jax.Array,
  class_weight_k: jax.Array | None,
  cca_state: Any,
  *,
  estimator: CCAEstimator,
  config: ml_collections.ConfigDict,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Eq. 8, alpha L_CCA + beta L_CE, with the cross-entropy averaged over views and, beside it,
  their distillation from the complete view.

  Args:
    out_v: the head's output, stacked over views; the first view is the complete one, and L_CCA is
      its.
    batch: reads label (negative: not known, the row takes part in L_CCA alone) and weight.
    present_vbm: bool[V, B, 2], the modalities of each row in each view; a row that a view leaves
      with nothing does not count there.
    class_weight_k: weights of classes (multi-label: of positives), or None.
    cca_state: what the estimator remembers.
    estimator: of the canonical correlations.
    config: reads cca, loss, missing and dataset.multi_label.

  Returns:
    (loss, {'loss_ce', 'loss_distill' where there are views, 'loss_cca' and 'cca_...' [L] where
    there is L_CCA}, the estimator's new state).
  """
  totals = row_weights(batch, present_vbm, class_weight_k, config=config)
  loss, parts = row_loss(out_v, batch, present_vbm, class_weight_k, totals, config=config)
  if pairs := _pairs(out_v, config):
    loss_cca, (parts_cca, cca_state) = pair_loss(
      pairs, batch, present_vbm, cca_state, estimator=estimator, config=config
    )
    loss, parts = loss + loss_cca, parts | parts_cca
  return loss, parts, cca_state


def row_weights(batch, present_vbm, class_weight_k, *, config) -> tuple[jax.Array, jax.Array]:
  """Returns what the sums over rows are divided by, float32[V] each: the weight of each view's
  cross-entropy and of its distillation.
  """
  kind = cross_entropy.KINDS[config.dataset.multi_label]
  nothing_bk = jnp.zeros(
    (len(batch['weight']), 1 if class_weight_k is None else len(class_weight_k))
  )  # Weights do not depend on logits.
  weight_vb = _row_weight(batch, present_vbm)
  ce_v = jax.vmap(
    lambda weight_b: kind.cross_entropy(nothing_bk, batch['label'], weight_b, class_weight_k)[1]
  )(weight_vb)
  return jnp.maximum(ce_v, 1e-6), jnp.maximum(jnp.sum(weight_vb, axis=1), 1e-6)


def _row_weight(batch, present_vbm):
  labelled_b = jnp.all(batch['label'].reshape(len(batch['weight']), -1) >= 0, axis=-1)
  return (batch['weight'] * labelled_b)[None] * jnp.any(present_vbm, axis=-1)


def row_loss(
  out_v, batch, present_vbm, class_weight_k, totals, *, config
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The sums over rows in `total_loss`, over the weights `totals`: those of parts of a batch, over
  the whole batch's weights, add up to its.
  """
  kind = cross_entropy.KINDS[config.dataset.multi_label]
  weight_vb, (ce_total_v, distill_total_v) = _row_weight(batch, present_vbm), totals
  ce_v = (
    jax.vmap(
      lambda logits_bk, weight_b: kind.cross_entropy(
        logits_bk, batch['label'], weight_b, class_weight_k
      )[0]
    )(out_v.logits_bk, weight_vb)
    / ce_total_v
  )
  share_v = jnp.ones_like(ce_v).at[1:].set(config.missing.view_weight)
  parts = {'loss_ce': jnp.sum(ce_v * share_v) / jnp.sum(share_v)}
  loss = config.loss.weight * parts['loss_ce']
  if len(present_vbm) > 1 and config.missing.distill_weight:
    distill_v = jax.vmap(
      lambda logits_bk, weight_b: kind.distillation(
        logits_bk, out_v.logits_bk[0], weight_b, config.missing.distill_temperature
      )[0]
    )(out_v.logits_bk[1:], weight_vb[1:])
    parts['loss_distill'] = jnp.mean(distill_v / distill_total_v[1:])
    loss += config.loss.weight * config.missing.distill_weight * parts['loss_distill']
  return loss, parts


def pair_loss(
  pairs, batch, present_vbm, cca_state, *, estimator, config
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
  """alpha L_CCA of the complete rows' pairs (h_i, h_t): (loss, ({'loss_cca', 'cca_...'}, the
  estimator's new state)).
  """
  pair_b = batch['weight'] * jnp.all(present_vbm[0], axis=-1)
  with jax.named_scope('cca'):
    loss, cca_state, aux = estimator.loss(cca_state, *pairs, pair_b)
  return config.cca.weight * loss, (
    {'loss_cca': loss, **{f'cca_{name}': value_l for name, value_l in aux.items()}},
    cca_state,
  )


def make_cca_estimator(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> CCAEstimator:
  """Returns the estimator of canonical correlations that `config.cca` describes; on a mesh each
  device estimates them from all rows.
  """
  c = config.cca
  return make_estimator(
    c.estimator,
    num_directions=c.num_directions,
    window=c.window,
    ridge=c.ridge,
    solver=c.solver,
    seed=config.seed,
    gather=sharding.gather_rows(mesh) if mesh else lambda x: x,
  )
