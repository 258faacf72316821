"""The gradient of a whole batch, exactly, from microbatches that are worked through one after the
other.

Features are computed once and kept. Two passes: the first, without gradient, computes what is no
sum over examples: the statistics of the whole batch, then its pooled pairs, whose L_CCA is
differentiated with respect to them. The second adds up each microbatch's gradient: of its examples'
losses, over the weight of the whole batch, plus the inner product of its pairs with that
derivative.
"""

from typing import Any

import jax
import jax.numpy as jnp

from molt_jax.methods.base import Training, run_patterns


def gradients(state, frozen, batch, *, method, objective, rngs, count):
  """As `step._gradients`, in `count` microbatches.

  Returns:
    (loss, parts, gradients, new statistics, the objective's new memory).
  """
  present_vbm = objective.present(batch, rngs['modality_dropout'])
  batch_a = _cut(batch, count)
  present_avbm = jnp.swapaxes(_cut(jnp.swapaxes(present_vbm, 0, 1), count), 1, 2)
  features_a = jax.lax.map(lambda part: method.features(frozen, part), batch_a)
  micro_a = features_a, batch_a, present_avbm, jax.random.split(rngs['dropout'], count)
  totals = objective.totals(batch, present_vbm)

  def run(params, statistics, micro, *, update):
    features, part, present, dropout = micro
    variables = {'params': params, 'statistics': statistics}
    training = Training({**rngs, 'dropout': dropout}, update)
    return run_patterns(method, variables, frozen, features, part, present, training)

  statistics = state.statistics
  if statistics:

    def gather(statistics, micro):
      return run(state.params, statistics, micro, update=True)[1], None

    statistics = jax.lax.scan(gather, statistics, micro_a)[0]

  def pairs_of(micro):
    return objective.pairs(run(state.params, statistics, micro, update=False)[0])

  pairs = jax.lax.map(pairs_of, micro_a)
  loss_pairs, parts_pairs, memory, slopes = jnp.zeros(()), {}, state.cca, None
  if pairs:
    whole = jax.tree.map(lambda x: _join(x, 2), pairs)
    of_pairs = jax.value_and_grad(objective.of_pairs, has_aux=True)
    (loss_pairs, (parts_pairs, memory)), slope = of_pairs(whole, batch, present_vbm, state.cca)
    slopes = jax.tree.map(lambda x: _cut(x, count, 1), slope)

  def loss_fn(params, micro, slope):
    out_v, _ = run(params, statistics, micro, update=False)
    loss, parts = objective.over_examples(out_v, micro[1], micro[2], totals)
    return loss + _inner(objective.pairs(out_v), slope), (loss, parts)

  grads, loss, parts = _sum(loss_fn, state.params, (micro_a, slopes))
  return loss + loss_pairs, parts | parts_pairs, grads, statistics, memory


def _inner(pairs, slope) -> jax.Array | float:
  if not slope:
    return 0.0
  return sum(jnp.sum(x * g) for x, g in zip(pairs, slope, strict=True))


def _sum(loss_fn, params, xs):
  """Returns (gradients, loss, parts), each summed over microbatches."""
  gradient = jax.grad(loss_fn, has_aux=True)

  def add(total, x):
    grads, (loss, parts) = gradient(params, *x)
    return jax.tree.map(jnp.add, total, (grads, loss, parts)), None

  grads, (loss, parts) = jax.eval_shape(
    lambda x: gradient(params, *x), jax.tree.map(lambda x: x[0], xs)
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, loss, parts))
  return jax.lax.scan(add, zeros, xs)[0]


def _cut(tree: Any, count: int, axis: int = 0) -> Any:
  """Cuts an axis of B examples into [count, ..., B / count, ...], microbatch m being examples m,
  m + count, ...: no example leaves its device.
  """

  def cut(x):
    x = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)

  return jax.tree.map(cut, tree)


def _join(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `_cut`; `axis` is that of the examples in the microbatches."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
